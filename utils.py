"""Starting a command: flags, the resolved config, the run directory, errors that a person can act on."""

import hashlib
import importlib.util
import inspect
import os
import secrets
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from absl import app, flags
from accelerate import Accelerator
from ml_collections import config_flags

from configs import base
from libs.build import check_ranges, flat, in_use, lookup, nearest
from libs.checkpoints import file_of, settled
from libs.data import DATASETS
from libs.exits import EXIT_POLICIES
from libs.exits.policy import max_u_of
from libs.files import atomic_write
from libs.models import BACKBONES, ESTIMATORS, build_model
from libs.run import PROCESS_TIMEOUT, Run, precision_on, set_tf32
from libs.sampling.solvers import SAMPLERS
from libs.sampling.stored import beside
from libs.trainer import LR_SCHEDULES, OPTIMIZERS
from sde import PROCESSES

FLAGS = flags.FLAGS
TRACKERS = {"none": None, "tensorboard": "tensorboard", "wandb": "wandb"}
MENUS = {"process": PROCESSES, "dataset.name": DATASETS, "exit.name": EXIT_POLICIES, "uem.name": ESTIMATORS}
MENUS |= {"sample.algorithm": SAMPLERS, "optimizer.name": OPTIMIZERS, "lr_scheduler.name": LR_SCHEDULES}
MENUS["tracker"] = TRACKERS


# ---- flags ---------------------------------------------------------------------------------------------------------


def define_flags(kind: str) -> None:
    """Flags of the public U-ViT and AdaDiff scripts. `kind`: the command's, such as "train"."""
    stored = "" if kind == "train" else " Default: the one that the weights were trained with."
    config_flags.DEFINE_config_file("config", None, f"Experiment, configs/FILE.py or configs/FILE.py:PRESET.{stored}")
    flags.DEFINE_bool("dry_run", False, "Print what was chosen and the cost of every exit, then stop.")
    if kind == "train":
        flags.DEFINE_string("workdir", None, "Folder of the run. Default: workdir/<config>/<preset and settings>.")
        flags.DEFINE_alias("output", "workdir")
        flags.DEFINE_string("pretrained_weight", None, "Start from these U-ViT, AdaDiff, DDPM or own weights.")
    else:
        flags.DEFINE_string("nnet_path", None, "Weights: a file, a <step>.ckpt folder, or a run's folder (last.ckpt).")
        where = "the weights' own" if kind == "calibrate" else f"<config>-{kind} beside the weights"
        flags.DEFINE_string("output", None, f"Folder for results. Default: {where}.")
        flags.DEFINE_alias("output_path", "output")
    if kind in ("eval", "sample", "analyze", "prompts"):
        flags.DEFINE_list(
            "exit_threshold", None, "Certainties in (0, 1]: leave when 1 - u exceeds it; 1 = never. A list sweeps."
        )
    if kind in ("eval", "sample"):
        flags.DEFINE_string("plan", None, "File of scripts.calibrate --budget: solver, times and depths of all calls.")
        flags.DEFINE_float(
            "budget", None, "Share of the reference's MACs: the plan for it that lies beside the weights."
        )
    flags.DEFINE_bool("compile", False, "Compile the network's blocks: a minute once (U-ViT, DiT, SiT; no U-Net).")
    flags.DEFINE_bool("tf32", False, "GPUs: float32 products and convolutions in TF32, ten bits of precision, faster.")
    flags.DEFINE_bool("is_train", None, "Accepted for old scripts; has no effect.")


def parse_flags(kind: str, argv: list[str]) -> list[str]:
    """Read the command line into FLAGS; a mistake ends the command in one line with the nearest right name."""
    if {"--help", "-h", "-help", "--helpfull", "--helpshort"} & set(argv[1:]):
        print(usage(kind))
        sys.exit(0)
    try:
        argv = with_config(kind, argv)
        rest = FLAGS(argv)
        if len(rest) > 1:
            raise ValueError(f"unexpected argument {rest[1]!r}: settings are given as --config.name=value")
        return rest
    except (flags.Error, ValueError, TypeError, OSError, AttributeError, KeyError) as error:
        fail(error)


def fail(error: Exception) -> None:
    """One line on stderr, exit code 2."""
    text = str(error) or type(error).__name__
    print(f"error: {text}", file=sys.stderr)
    sys.exit(2)


def with_config(kind: str, argv: list[str]) -> list[str]:
    """argv with --config, taken from the weights where it is not given, after a check of every --config.NAME."""
    given = dict(arg.lstrip("-").partition("=")[::2] for arg in argv[1:] if arg.startswith("-"))
    at = next((i for i, arg in enumerate(argv) if arg in ("--config", "-config") and i + 1 < len(argv)), None)
    spec = argv[at + 1] if at else given.get("config")
    if not spec:
        path = given.get("nnet_path") or given.get("config.nnet_path")
        if kind == "train" or not path:
            missing = "" if kind == "train" else ", or the weights of a training here, --nnet_path=FOLDER"
            raise ValueError(f"--config is missing: name an experiment, --config=configs/FILE.py{missing}")
        spec = f"{base.__file__}:{path}"
        argv = [argv[0], f"--config={spec}", *argv[1:]]
    elif not at:  # what is said about the experiment comes after its name, also where ml_collections looks
        settings = (arg for arg in argv[1:] if arg.partition("=")[0].lstrip("-") != "config")
        argv = sys.argv = [argv[0], f"--config={spec}", *settings]
    experiment = load_experiment(spec).to_dict()
    backbone = experiment.get("nnet", {}).get("name")
    known, has = (
        setting_names(base.config(backbone if backbone in BACKBONES else "uvit").to_dict()),
        setting_names(experiment),
    )
    for setting in has:
        if setting not in known:
            raise ValueError(f"--config={spec}: {setting}: {elsewhere(setting, known)}")
    for setting in known:
        if setting not in has:
            raise ValueError(f"--config={spec} has no {setting}: an experiment starts from configs/base.py")
    for name in given:
        setting = name.removeprefix("config.")
        if setting != name and setting not in known:
            raise ValueError(f"--{name}: {elsewhere(setting, known)}")
    return argv


def elsewhere(setting: str, known: list[str]) -> str:
    """Why there is no `setting`: where the public codes' setting of that name went, or the nearest name."""
    if setting in base.PUBLIC:
        return f"there is no such setting here; {base.PUBLIC[setting]}"
    return f"there is no such setting{nearest(setting, known)}"


def load_experiment(spec: str):
    """The config of FILE or FILE:ARGUMENT."""
    file, _, arg = spec.partition(":")
    if not Path(file).is_file():
        files = sorted(f"configs/{path.name}" for path in Path(base.__file__).parent.glob("[!_]*.py"))
        raise ValueError(f"--config={spec}: there is no file {file}{nearest(file, files)}")
    module = importlib.util.spec_from_file_location("experiment", file)
    code = importlib.util.module_from_spec(module)
    module.loader.exec_module(code)
    return code.get_config(arg) if arg else code.get_config()


def setting_names(tree: dict, prefix: str = "") -> list[str]:
    """The full names of all settings and of their groups."""
    below = [
        name
        for key, value in tree.items()
        if isinstance(value, dict)
        for name in setting_names(value, f"{prefix}{key}.")
    ]
    return [*(f"{prefix}{key}" for key in tree), *below]


def usage(kind: str) -> str:
    """The command's own description, then every flag with its default."""
    lines = [
        inspect.getdoc(sys.modules["__main__"]) or "",
        "",
        "Flags (--NAME=VALUE; a switch also as --NAME, --noNAME):",
    ]
    modules = FLAGS.flags_by_module_dict()
    own = {flag.name: flag for module in ("utils", sys.argv[0], "__main__") for flag in modules.get(module, [])}
    for name in sorted(own):
        flag = own[name]
        alias = "" if "alias" not in (flag.help or "").lower() else f" {flag.help}"
        default = "" if flag.default is None or "Default" in flag.help else f" Default: {flag.default_as_str}."
        lines.append(f"  --{name}\n      {alias.strip() or (flag.help or '') + default}")
    lines.append(
        "  --config.GROUP.NAME\n      Any setting of the experiment; all stand, with units, in configs/base.py."
    )
    return "\n".join(lines)


def flag_numbers(flag: str) -> list[float]:
    """The values of a flag that is a list of numbers."""
    try:
        return [float(text) for text in FLAGS[flag].value]
    except ValueError:
        raise ValueError(f"--{flag}={','.join(FLAGS[flag].value)}: numbers separated by commas are needed") from None


# ---- from flags to work --------------------------------------------------------------------------------------------


def launch(work: Callable, regime: Callable, kind: str) -> None:
    """Run `work(config, regime(config), run)` as the main program; mistakes in settings become one clear line."""

    def main(_):
        try:
            config = resolve(kind)
            if FLAGS.dry_run:
                return dry_run(config)
            set_tf32(FLAGS.tf32)
            directory = workdir(config, kind)
            run = Run(directory, make_accelerator(config, directory))
            if kind != "train":  # the same checkpoint in all processes
                config.nnet_path = run.gather_list([settled(config.nnet_path)])[0]
            with run.stopping:
                start_trackers(config, run)
                work(config, regime(config), run)
            run.accelerator.end_training()
        except (ValueError, OSError, ImportError) as error:
            fail(error)

    define_flags(kind)
    app.run(main, flags_parser=lambda argv: parse_flags(kind, argv))


def resolve(kind: str):
    """The config with the command's own flags folded in, locked, and checked as far as that is possible in no time."""
    config = FLAGS.config
    if FLAGS.is_train is not None:
        print("note: --is_train has no effect: training never exits early and sampling may", file=sys.stderr)
    config.compile = FLAGS.compile or config.compile
    if kind == "train":
        config.pretrained_weight = FLAGS.pretrained_weight or config.pretrained_weight
    else:
        config.nnet_path = FLAGS.nnet_path or config.nnet_path
        if "exit_threshold" in FLAGS and FLAGS.exit_threshold:
            config.eval.thresholds = tuple(certainty(text) for text in FLAGS.exit_threshold)
            name = config.exit.name
            lookup(EXIT_POLICIES, name, "exit.name")
            given = f"--exit_threshold={','.join(FLAGS.exit_threshold)}"
            if kind == "sample" and len(config.eval.thresholds) > 1:
                raise ValueError(f"{given}: one set of images needs one value")
            if "certainty" not in (config.exit.get(name) or {}):
                raise ValueError(
                    f"{given} needs a policy with a certainty, and exit.name is {name!r}: add "
                    "--config.exit.name=threshold, or leave --exit_threshold out"
                )
        plan = FLAGS.plan if "plan" in FLAGS else None
        if kind in ("eval", "sample") and FLAGS.budget is not None:
            if plan:
                raise ValueError("--plan and --budget are both given; a budget takes the plan beside the weights")
            plan = beside(given_weights(config), FLAGS.budget).path
        if plan:
            if FLAGS.exit_threshold:
                raise ValueError("--plan or --budget, and --exit_threshold are given; a plan holds its own depths")
            refuse_what_a_plan_holds(kind)
            config.exit.name, config.exit.planned.path, config.eval.thresholds = "planned", plan, ()
    leave_out_reference_of_other_data(config)
    check_settings(config)
    return config


def refuse_what_a_plan_holds(kind: str) -> None:
    """An evaluation's calls are those of full depth, which a plan is held against; images have the plan's alone."""
    holds = ["exit."]
    if kind == "sample":
        holds += ["sample.sample_steps", "sample.algorithm", "sample.grid", "sample.forecast."]
        holds += [f"sample.{name}." for name in SAMPLERS]
    for key in config_flags.get_override_values(FLAGS["config"]):
        if key.startswith(tuple(holds)):
            raise ValueError(f"--plan or --budget, and --config.{key} are given; a plan holds its own calls and depths")


def leave_out_reference_of_other_data(config) -> None:
    """An experiment's eval.reference holds statistics of its own data set: with another one, nothing is like it."""
    given = config_flags.get_override_values(FLAGS["config"])
    if config.eval.reference and "dataset.name" in given and "eval.reference" not in given:
        own = load_experiment(config_flags.get_config_filename(FLAGS["config"])).dataset.name
        if config.dataset.name != own:
            print(
                f"note: eval.reference={config.eval.reference}, statistics of {own}, is left out, as dataset.name is "
                f"{config.dataset.name}: evaluations compare with these images",
                file=sys.stderr,
            )
            config.eval.reference = ""


def check_settings(config) -> None:
    """ValueError for a number out of its range or a name that is on no menu: found now, not after hours."""
    check_ranges(config)
    values = flat(config.to_dict())
    for public, instead in base.PUBLIC.items():
        setting, _, value = public.partition("=")
        if value and values.get(setting) == value:
            raise ValueError(f"{setting} is {value!r}, as the public code calls it; here {instead}")
    for setting, menu in MENUS.items():
        group, _, key = setting.rpartition(".")
        lookup(menu, (config[group] if group else config)[key], setting)
    PROCESSES[config.process]().check_prediction(config.pred)


def certainty(text: str) -> float:
    try:
        max_u_of(float(text))
    except ValueError:
        raise ValueError(
            f"--exit_threshold={text}: it is a certainty and must be a number in (0, 1], 1 = never exit early"
        ) from None
    return float(text)


def workdir(config, kind: str) -> Path:
    """Where the command writes."""
    file, _, arg = config_flags.get_config_filename(FLAGS["config"]).partition(":")
    stored = Path(file).resolve() == Path(base.__file__).resolve()
    if kind == "train":
        return Path(FLAGS.workdir or Path("workdir", Path(file).stem, run_name(arg, config.pretrained_weight)))
    given = Path(given_weights(config))
    beside = file_of(settled(given)).parent
    run = given if (given / "last.ckpt").exists() else given.parent
    name = kind if stored else f"{Path(file).stem}-{kind}"
    return Path(FLAGS.output or (beside if kind == "calibrate" else run / name))


def given_weights(config) -> str:
    if not config.nnet_path:
        raise ValueError("--nnet_path is missing: give the weights to evaluate (a file or a <step>.ckpt folder)")
    return config.nnet_path


def run_name(arg: str, pretrained: str) -> str:
    """ "default", or what distinguishes the run, joined by dashes: the config's argument, then key=value.

    As in U-ViT's code, of a key its last part stands for it; of `name` and `path`, the whole.
    """
    values = dict(config_flags.get_override_values(FLAGS["config"]))
    values |= {"pretrained_weight": Path(pretrained).stem} if pretrained else {}
    parts = [arg] if arg else []
    for key, value in values.items():
        last = key.split(".")[-1]
        parts.append(f"{key if last in ('name', 'path') else last}={value}")
    name = "-".join(parts).replace("/", "_").replace(" ", "") or "default"
    if len(name) > 200:  # file systems allow 255 bytes
        name = f"{name[:180]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    return name


def start_trackers(config, run: Run) -> None:
    """TensorBoard or wandb, if asked for; a resumed run goes on in the wandb run whose id its folder holds."""
    options: dict = {"dir": run.dir, "resume": "allow"}
    path = run.dir / "wandb_id.txt"
    if config.tracker == "wandb" and run.is_main:
        if not path.exists():
            with atomic_write(path, "w") as file:
                file.write(secrets.token_hex(8))
        options["id"] = path.read_text().strip()
    values = {
        key: value if isinstance(value, int | float) else str(value) for key, value in flat(config.to_dict()).items()
    }
    run.accelerator.init_trackers("adaptive-depth-diffusion", values, init_kwargs={"wandb": options})


def refuse_shards() -> None:
    """ValueError where the launcher asks for parameters that no process holds as a whole, before anything is done."""
    for name, variable in (("FSDP", "ACCELERATE_USE_FSDP"), ("DeepSpeed", "ACCELERATE_USE_DEEPSPEED")):
        if os.environ.get(variable, "").lower() in ("1", "true", "yes"):
            raise ValueError(
                f"the launcher asks for {name}, which splits parameters between processes; the running average of the "
                "weights and the checkpoints here need them whole. Launch with distributed_type MULTI_GPU, as in "
                "configs/accelerate/8-gpus.yaml; where memory is short, set --config.nnet.use_checkpoint=True"
            )


def make_accelerator(config, directory: Path) -> Accelerator:
    refuse_shards()
    if config.tracker == "wandb":
        os.environ.setdefault("WANDB_MODE", "offline")
    precision = None  # the launcher's choice
    if config.mixed_precision:
        gpu = torch.cuda.is_available() and not config.cpu
        precision = precision_on(torch.device("cuda" if gpu else "cpu"), config.mixed_precision)
    accelerator = Accelerator(
        cpu=config.cpu,
        mixed_precision=precision,
        log_with=TRACKERS[config.tracker],
        project_dir=directory,
        kwargs_handlers=[PROCESS_TIMEOUT],
    )
    precision_on(accelerator.device, accelerator.mixed_precision)  # refuses fp16 on a CPU
    return accelerator


def dry_run(config) -> None:
    """What was chosen, as differences from configs/base.py, and what every exit costs."""
    plain = flat(base.config(config.nnet.name).to_dict())
    print("settings in use that differ from configs/base.py:")
    for name, value in flat(in_use(config.to_dict())).items():
        if value != plain.get(name):
            print(f"  {name} = {value!r}")
    print("chosen, with their settings:")
    for group in ("nnet", "uem", "exit", "dataset", "sample"):
        tree = in_use(config[group].to_dict())
        chosen = tree.get("name", tree.get("algorithm"))
        own = tree if group == "nnet" else tree.get(chosen, {})
        print(f"  {group}: {chosen}", *(f"{key}={value!r}" for key, value in own.items() if key != "name"))
    with torch.device("meta"):  # shapes only: the largest models take no memory
        model = build_model(config)
    macs = model.macs()
    n = sum(parameter.numel() for parameter in model.parameters())
    print(f"{n:,} parameters; GMACs of one call per image by the exit taken (attention products and head counted):")
    for k in model.points:
        print(f"  after {k:2d} of {model.depth} layers: {macs.at(k) / 1e9:.4f}")
