"""The one object that turns image ids into images: a network with everything that sampling from it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from libs import checkpoints, regimes, rng
from libs.build import chosen, lookup, settings
from libs.exits import EXIT_POLICIES, Duo, ExitPolicy, looking_back
from libs.exits.policy import max_u_of
from libs.files import file_hash
from libs.models import EarlyExitModel, NoEstimator, build_model
from libs.regimes import Labels, Regime
from libs.run import Alone, Run, portable
from libs.sampling.denoiser import Denoiser, Guidance
from libs.sampling.images import Images, labels_of
from libs.sampling.inflight import InFlight, suits
from libs.sampling.plans import Plan, sample
from libs.sampling.stored import all_beside, beside, make_plan, own_plan

if TYPE_CHECKING:
    from ml_collections import ConfigDict

# Settings that configs of earlier versions do not have, as those versions sampled.
ADDED = {"": {"compile": False}}
ADDED["sample"] = {"grid": "", "guided_channels": 0, "path": "", "forecast": {"every": 1, "order": 1, "tail": 4}}


@dataclass(frozen=True, eq=False)
class Sampler:
    """A network with its process, codec, conditions and guidance.

    >>> sampler = Sampler.load("demo/last.ckpt")
    >>> images = sampler(16, seed=0, labels=[3] * 16, exit_threshold=0.98, steps=8)
    >>> images.save("three.png")
    >>> images.depth.shape  # (calls, 16): layers used
    (8, 16)

    Image i of a noise seed depends on (seed, i) and on nothing else: not on its batch, nor on the number of processes.

    Args:
        model: the network, on the run's device, ready to sample.
        regime: forward process, codec and conditions.
        run: the processes that share the work, the device and the precision.
        pred: what the network predicts: "noise", "x0" or "v".
        guidance: classifier-free guidance; the default is none.
        config: the experiment, from which `plan` and `policy` take their defaults.
        class_names: in the order of the classes, where the checkpoint knows them.
        weights: what identifies the content of the weight file that was read (`open`).
    """

    model: EarlyExitModel
    regime: Regime
    run: Run
    _: KW_ONLY
    pred: str
    guidance: Guidance = Guidance()
    config: ConfigDict | None = None
    class_names: tuple[str, ...] = ()
    weights: str = ""

    @classmethod
    def of(cls, config, model: EarlyExitModel, regime: Regime, run: Run) -> Sampler:
        """The sampler that `config`, which may be of an earlier version, describes, with its guidance."""
        for group, values in ADDED.items():
            part = config[group] if group else config
            part.update({name: value for name, value in values.items() if name not in part})
        guidance = Guidance.of(config.sample)
        return cls(model, regime, run, pred=config.pred, guidance=guidance, config=config)

    @classmethod
    def open(cls, config, regime: Regime, run: Run) -> Sampler:
        """With the weights of config.nnet_path."""
        sampler = cls.of(config, load_model(config, run), regime, run)
        if config.compile:
            sampler.model.compile_blocks()
        return replace(sampler, weights=file_hash(checkpoints.file_of(config.nnet_path)))

    @classmethod
    def load(cls, path: str | Path, *, device: str | None = None, precision: str | None = None) -> Sampler:
        """From a checkpoint of this code alone, which knows its experiment; nothing is written.

        Args:
            path: a run's directory, a <step>.ckpt folder or a weight file.
            device: "cpu", "cuda" or "cuda:1"; the default is a GPU where there is one.
            precision: "no" (float32), "bf16", "fp16" (GPUs only) or "auto"; the default is the training's
                where this device has it, else "auto".

        Raises:
            ValueError: no weights there, or none that know their experiment, or they do not fit it.
        """
        path = checkpoints.settled(path)
        about = checkpoints.about(path)
        known = about.get("config")
        if not known:
            raise ValueError(
                f"{checkpoints.file_of(path)} does not say which experiment it belongs to. Give a <step>.ckpt folder "
                "of a training or a file of scripts.export_checkpoint, or use python -m scripts.sample with --config"
            )
        from ml_collections import ConfigDict

        config = ConfigDict(known)
        run = Alone(device, precision or portable(config.mixed_precision, device) or "no")
        model = build_model(config)
        checkpoints.load_weights(model, path, full_depth=True)
        config.nnet_path = str(checkpoints.file_of(path))  # its plans lie beside it
        sampler = cls.of(config, model.to(run.device).eval().requires_grad_(False), regimes.of(config), run)
        return replace(sampler, class_names=tuple(about.get("class_names") or ()))

    # ---- what to sample with -----------------------------------------------------------------------------------------

    @property
    def budgets(self) -> tuple[float, ...]:
        """What `budget` may be: shares of the reference's MACs with a plan of scripts.calibrate beside the weights."""
        return tuple(all_beside(self.config.nnet_path))

    def plan(self, steps: int | None = None, algorithm: str | None = None, grid: str | None = None) -> Plan:
        """The experiment's solver as a table, with other `steps` (calls), `algorithm` or `grid` if given."""
        if (steps, algorithm, grid) == (None,) * 3 and self.config.exit.name == "planned":
            return own_plan(self.regime.process, self.policy())
        return make_plan(self.regime.process, self.config.sample, steps, algorithm, grid)

    def policy(self, exit_threshold: float | None = None) -> ExitPolicy:
        """The experiment's exit policy, at the certainty `exit_threshold` in (0, 1] where it is given; 1 never exits.

        Weights without uncertainty estimators run at full depth.
        """
        name, options = exit_settings(self.config.exit, exit_threshold)
        if isinstance(self.model.uem, NoEstimator) and "u" in EXIT_POLICIES[name].reads:
            if exit_threshold not in (None, 1):
                raise ValueError(
                    f"exit_threshold is {exit_threshold}, but these weights have no estimators: leave it out"
                )
            name, options = "full", {}
        policy = EXIT_POLICIES[name](**options)
        return looking_back(policy, residual=self.config.sample.residual, refresh=self.config.sample.refresh)

    def told(self, labels: Sequence[int | str] = (), prompts: Sequence[str] = ()) -> Sampler:
        """This sampler with the classes or the prompts of images 0, 1, ..., taken in turn."""
        conditions = self.regime.conditions
        if len(labels):
            if not isinstance(conditions, Labels):
                raise ValueError(f"labels are {list(labels)[:8]}; this network has no classes")
            conditions = replace(conditions, chosen=regimes.classes(labels, self.class_names))
        if len(prompts):
            if isinstance(conditions, Labels):
                raise ValueError(f"prompts are {list(prompts)[:2]}; this network takes no texts")
            source = regimes.prompts(self.config, list(prompts))
            conditions = replace(conditions, source=lambda: source)
        return replace(self, regime=replace(self.regime, conditions=conditions))

    # ---- sampling ----------------------------------------------------------------------------------------------------

    def __call__(
        self,
        n: int,
        *,
        seed: int = 0,
        labels: Sequence[int | str] = (),
        prompts: Sequence[str] = (),
        budget: float | None = None,
        exit_threshold: float | None = None,
        steps: int | None = None,
        plan: Plan | None = None,
        policy: ExitPolicy | None = None,
        batch_size: int | None = None,
    ) -> Images:
        """Images 0 to n - 1 of a noise seed.

        Args:
            n: how many.
            seed: of the noise, of classes and captions where they are drawn.
            labels, prompts: lists of classes (numbers, names, or text such as "0-9") or of texts, taken in turn; the
                default draws classes.
            budget: share of the reference's MACs, one of those that scripts.calibrate has made a plan for: it decides
                the number of calls, their times and depths, instead of what follows.
            exit_threshold: certainty in (0, 1] above which an image leaves; the default is the experiment's.
            steps: network evaluations per image; the default is the experiment's.
            plan, policy: a solver and an exit policy of your own, instead of `steps` and `exit_threshold`. A policy
                that is a plan of scripts.calibrate brings its solver along.
            batch_size: images per network call; the default is the experiment's.

        Raises:
            ValueError: a value that the network or the sampler does not allow.

        >>> from libs.exits import EXIT_POLICIES
        >>> sampler = Sampler.load("demo/last.ckpt", device="cpu")
        >>> many, few = sampler(8, seed=1, steps=4), sampler(2, seed=1, steps=4)
        >>> int((many.pixels[:2].int() - few.pixels.int()).abs().max()) <= 1  # equal but for rounding
        True
        >>> fixed = sampler(3, plan=sampler.plan(5, grid="power:2"), policy=EXIT_POLICIES["fixed"](layer=2))
        >>> fixed.depth.tolist()
        [[2, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2]]
        >>> sampler(4, labels=[10])
        Traceback (most recent call last):
            ...
        ValueError: labels are [10]; they must lie in 0..9
        """
        if not n >= 1:
            raise ValueError(f"n is {n}; at least 1 image can be made")
        if plan is not None and steps is not None or policy is not None and exit_threshold is not None:
            raise ValueError("give either plan or steps, and either policy or exit_threshold")
        if budget is not None:
            if any(given is not None for given in (exit_threshold, steps, plan, policy)):
                raise ValueError("budget decides steps and depths: leave exit_threshold, steps, plan and policy out")
            back = {"residual": self.config.sample.residual, "refresh": self.config.sample.refresh}
            policy = looking_back(beside(self.config.nnet_path, budget), **back)
        policy = policy or self.policy(exit_threshold)
        own = own_plan(self.regime.process, policy)
        if own and (steps is not None or plan is not None):
            raise ValueError("a planned policy holds the solver and its calls: leave steps and plan out")
        batches = self.told(labels, prompts).images(
            np.arange(n),
            seed=seed,
            plan=own or plan or self.plan(steps),
            policy=policy,
            batch_size=min(n, self.config.sample.mini_batch_size if batch_size is None else batch_size),
        )
        return Images.concatenate(list(batches))

    def images(
        self, ids: np.ndarray, *, seed: int = 0, plan: Plan, policy: ExitPolicy, batch_size: int, inflight: bool = False
    ) -> Iterator[Images]:
        """This process's share of the images `ids` (n,), batch by batch.

        Whole batches are dealt to the processes in turn, so a batch holds the same images for any number of processes,
        and the images are the same to the last bit. `inflight`: where the policy allows it, images do not wait for
        their batch (libs/sampling/inflight.py); they are the same up to rounding, in the same batches.
        """
        batches = split(ids, batch_size)[self.run.rank :: self.run.world]
        if inflight and batches and suits(self.model, policy, self.guidance):
            flight = InFlight(
                self, ids=np.concatenate(batches), seed=seed, plan=plan, policy=policy, batch_size=batch_size
            )
            ends = np.cumsum([0, *map(len, batches)]).tolist()
            yield from (flight.images(start, stop) for start, stop in pairwise(ends))
            return
        for batch in batches:
            yield self.batch(batch, seed=seed, plan=plan, policy=policy)

    @contextmanager
    def precision(self, policy: ExitPolicy | None = None) -> Iterator[None]:
        """The context of network calls in the run's precision: weights are cast on entry, not at every call."""
        second = policy.shallow if isinstance(policy, Duo) else self.model  # a network that is cast stays as it is
        with self.model.weights_in(self.run.half), second.weights_in(self.run.half), self.run.autocast():
            yield

    def denoiser(
        self,
        cond: Tensor | None,
        policy: ExitPolicy,
        *,
        n_calls: int | None = None,
        make: Callable[..., Denoiser] = Denoiser,
    ) -> Denoiser:
        """What predicts eps for images with the conditions `cond` (n, ...) in one sampling of `n_calls` calls."""
        null = None if cond is None else self.regime.conditions.null(len(cond))
        options = dict(cond=self.run.put(cond), null=self.run.put(null), guidance=self.guidance, n_calls=n_calls)
        return make(self.model, self.regime.process, self.pred, policy, **options)

    @torch.inference_mode()
    def batch(
        self,
        ids: np.ndarray,
        *,
        seed: int = 0,
        plan: Plan,
        policy: ExitPolicy,
        make_denoiser: Callable[..., Denoiser] = Denoiser,
    ) -> Images:
        """The images `ids` (n,) as one batch, in this process."""
        noise = rng.SeededNoise(seed, ids, self.regime.shape)
        cond = self.regime.conditions.for_ids(seed, ids)
        denoiser = self.denoiser(cond, policy.bind(seed, ids), n_calls=plan.nfe, make=make_denoiser)
        with self.precision(policy):
            x = sample(plan, self.run.put(noise.draw()), denoiser, noise if plan.stochastic else None)
            pixels = self.regime.codec.to(self.run.device).decode(x).cpu()
        trace = denoiser.trace.with_forecasts(plan.t.tolist(), plan.computed.tolist())
        return Images(pixels, ids, labels_of(cond), trace)


def load_model(config, run: Run) -> EarlyExitModel:
    """The network with the weights of config.nnet_path, ready to sample.

    A file of a network without exits is taken where no thresholds are asked for: nothing leaves early then.
    """
    if not config.nnet_path:
        raise ValueError("nnet_path is not set: give the weights to evaluate with --nnet_path=FILE")
    checkpoints.check_config(config.nnet_path, config)
    model = build_model(config)
    run.say(checkpoints.load_weights(model, config.nnet_path, full_depth=not config.eval.thresholds))
    return model.to(run.device).eval().requires_grad_(False)


def split(ids: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Consecutive batches, the last of which may be smaller."""
    if batch_size < 1:
        raise ValueError(f"sample.mini_batch_size is {batch_size}; it must be at least 1")
    return [ids[start : start + batch_size] for start in range(0, len(ids), batch_size)]


def exit_settings(exit: ConfigDict, certainty: float | None = None) -> tuple[str, dict]:
    """The name and the settings of the configured exit policy, at another `certainty` where one is given.

    Raises:
        ValueError: a certainty for a policy that decides by something else.
    """
    name = exit.name
    lookup(EXIT_POLICIES, name, "exit.name")
    if certainty is None:
        return name, chosen(exit)
    max_u_of(certainty)
    if name == "full":  # no rule of its own
        name = "threshold"
    if "certainty" not in settings(EXIT_POLICIES[name]):
        raise ValueError(
            f"exit_threshold is {certainty:g}, but the exit policy is {name!r}, which has no certainty: leave it out, "
            "or set exit.name to a policy that has one, such as threshold"
        )
    return name, chosen({"name": name, name: exit.get(name)}) | {"certainty": float(certainty)}
