"""The whole settings tree, once. An experiment's file is its differences from this."""

from __future__ import annotations

import math
import os

from ml_collections import ConfigDict

from libs.build import MAY_CHANGE, Number, group, menu, settings
from libs.checkpoints import about
from libs.codecs import KL, ClipText
from libs.data import DATASETS
from libs.exits import EXIT_POLICIES
from libs.losses import Objective
from libs.models import BACKBONES, DIT_SIZES, ESTIMATORS, SIZES
from libs.run import portable
from libs.sampling.solvers import SAMPLERS

# What a resumed run may change: it takes effect and is recorded with the step it began at. A change of anything else
# is another experiment, which needs another workdir. A dot at the end stands for the whole group; the data below
# dataset.path are compared by content.
MAY_CHANGE.update(
    """
    cpu compile tracker nnet_path dataset.path dataset.workers nnet.use_checkpoint
    train.n_steps train.accumulate train.grad_clip train.keep
    train.log_interval train.sample_interval train.save_interval train.eval_interval
    optimizer.lr optimizer.muon_lr optimizer.weight_decay optimizer.betas
    eval. exit. sample.
    """.split()
)

# Settings and values of the public U-ViT and AdaDiff configs that are not here: what to write instead.
PUBLIC = {
    "z_shape": "nnet.in_chans and nnet.img_size say the shape of the latents",
    "exit_threshold": "eval.thresholds or --exit_threshold=0.92 evaluates with it, exit.threshold.certainty keeps it",
    "autoencoder.pretrained_path": "it is autoencoder.path",
    "autoencoder.scale_factor": "it is autoencoder.scale",
    "dataset.cfg": "dataset.p_uncond above 0 trains for guidance",
    "dataset.resolution": "it belongs to the data set: dataset.celeba.resolution, dataset.imagenet.resolution",
    "sample.cfg": "sample.scale above 0 guides",
    "train.mode": "nnet.num_classes above 0 trains with classes, regime=text with captions",
    "pred=noise_pred": "write noise",
    "pred=x0_pred": "write x0",
    "nnet.name=uvit_t2i": "write uvit with nnet.clip_dim above 0",
    "dataset.name=imagenet256_features": "write latents, or latents_npy for files of U-ViT's own extraction",
    "dataset.name=imagenet512_features": "write latents, or latents_npy for files of U-ViT's own extraction",
    "dataset.name=mscoco256_features": "write captions, or captions_npy for files of U-ViT's own extraction",
}


def config(backbone: str = "uvit") -> ConfigDict:
    c = group(
        "",
        regime="pixels",  # pixels | latents | text: which of train.py, train_ldm.py, train_t2i_discrete.py this is for
        seed=Number(1234, 0, below=2**63),
        process="vp_linear",  # vp_linear | vp_cosine | sd (Stable Diffusion's discrete betas) | ddpm | flow
        pred="noise",  # what the network regresses: noise | x0 | v | velocity (flow)
        pretrained_weight="",  # start from this U-ViT, AdaDiff, DDPM, DiT, SiT or own file
        nnet_path="",  # evaluate this one
        cpu=False,  # run on the CPU although there is a GPU
        mixed_precision="",  # no | fp16 | bf16 | auto (bf16 where the machine computes it); "" = what the launcher says
        compile=False,  # compile the network's blocks: a minute once (U-ViT, DiT, SiT)
        tracker="none",  # none | tensorboard | wandb (offline unless WANDB_MODE says otherwise); JSONL always
    )
    c.train = group(
        "train.",
        n_steps=Number(500_000, 1),
        batch_size=Number(128, 1),  # of all processes together
        accumulate=Number(1, 1),  # micro-batches per step
        grad_clip=Number(0.0, 0),  # global norm; 0 = off
        ema_rate=Number(0.9999, 0, below=1),
        stratified=False,  # spread a batch's times evenly over [0, 1) instead of drawing them independently
        freeze_backbone=False,  # train the estimator and own heads only
        depths="all",  # exits a batch trains: all | random: up to a drawn depth | schedule: up to the depth `exit` has
        log_interval=Number(10, 0),
        sample_interval=Number(5_000, 0),  # grids; 0 = never
        save_interval=Number(50_000, 0),
        eval_interval=Number(0, 0),  # monitor quality, keep the best weights as best.pth; 0 = never
        monitor_samples=Number(2_048, 1),
        monitor_steps=Number(50, 1),
        keep=Number(2, 1),  # newest checkpoints kept
    )
    c.optimizer = group(
        "optimizer.",
        name="adamw",
        lr=Number(2e-4, 0),
        weight_decay=Number(0.03, 0),
        betas=Number((0.99, 0.999), 0, below=1),
        muon_lr=Number(0.02, 0),
    )
    c.lr_scheduler = group("lr_scheduler.", name="customized", warmup_steps=Number(2_500, 0))

    c.nnet = settings(BACKBONES[backbone])
    c.nnet.name = backbone
    c.nnet.heads = "shared"  # shared | own: one head for all exits, or one each (in a U-Net: a bridge)
    c.nnet.points = ()  # layers after which the network can be left; () = all
    c.nnet.gaussian = 0  # directions of the data's Gaussian per class, which adds exit 0: no layers; 0 = none
    c.uem = menu(ESTIMATORS, "linear")
    c.loss = settings(Objective.__init__)
    c.exit = menu(EXIT_POLICIES, "threshold")

    c.dataset = menu(DATASETS, "digits")
    c.dataset.update(
        group(
            "dataset.",
            path="",  # where the data are; "" = the data set's own default
            random_flip=False,  # mirror half of the training images
            p_uncond=Number(0.0, 0, below=1),  # share of labels replaced by the null class (classifier-free guidance)
            workers=Number(4, 0),  # decoding processes; threads where there is nothing to decode (extracted features)
        )
    )

    c.autoencoder = settings(KL, omit=("device",))  # latent models only
    c.clip = settings(ClipText, omit=("device",))  # text-to-image only

    c.sample = menu(SAMPLERS, "euler_maruyama_sde", omit=("steps", "grid"))
    c.sample.algorithm = c.sample.name  # U-ViT's key
    del c.sample.name
    c.sample.update(
        group(
            "sample.",
            sample_steps=Number(1_000, 1),  # network evaluations
            grid="",  # time_uniform | logsnr | power:2 | karras:7 | times or a file of them; "" = as published
            # compute every `every`-th step (1: all) and the last `tail`; forecast the rest from order + 1 computed ones
            forecast=group("sample.forecast.", every=Number(1, 1), order=Number(1, 0, 3), tail=Number(4, 0)),
            n_samples=Number(50_000, 1),  # images per seed in an evaluation
            mini_batch_size=Number(500, 1),
            scale=Number(0.0),  # guidance: eps = cond + scale (cond - null)
            guided_channels=Number(0, 0),  # guide these first channels only; 0 = all (3 in DiT's and SiT's samplers)
            pair="free",  # free | tied | cond: guidance rows leave alone, where both would, where the cond row would
            labels=(),  # classes of images 0, 1, ... in turn; () draws them
            prompts="",  # text-to-image: a file with one prompt per line; "" draws captions of the validation split
            path="",  # keep the images of an evaluation here, <point>/seed-<seed>/<id>.png; "" keeps none
            inflight=False,  # images do not wait for their batch (threshold and calibrated policies): same images
            refresh=Number(0, 0),  # every n-th call runs full depth whatever the policy says; 0 = none is made to
            residual=False,  # add to an early output what the layers left out contributed at the last full-depth call
        )
    )

    c.eval = group(
        "eval.",
        extractor="inception",
        reference="",  # npz with mu and sigma; "" = statistics of the training data
        seeds=Number((0,), 0, below=2**63),  # reported noise seeds
        selection_seed=Number(99, 0, below=2**63),  # chooses the recommended point; not among what is reported
        tolerance=Number(0.05, 0),  # recommended: the fastest point at most this much worse than full depth
        thresholds=(),  # certainties of the exit policy; () = the one in `exit`
        pairs=(),  # under guidance, measure the thresholds with these pairs; () = sample.pair
        fixed=(),  # also leave every image at these layers
        fewer_steps=Number((), 1),  # also full depth with these step counts
        sweep=(),  # more points: "threshold.certainty=0.98", "steps=7,grid=power:2.5", dicts, or a JSON file
        paired=Number(2_048, 0),  # images compared with full depth (PSNR, SSIM)
        metrics=(),  # more: kid, precision_recall (in the extractor's features), cmmd, clip_score
        real="",  # folder or zip of the real images that these compare with; "" = the training data
        clip="openai/clip-vit-large-patch14",  # model of clip_score: folder, or name in huggingface_hub's cache
        timing_runs=Number(5, 1),
        timing_batch=Number(64, 1),
    )
    return c


def get_config(path: str) -> ConfigDict:
    """The experiment that weights were trained with, as --config=configs/base.py:FILE: what commands take without one.

    Settings that the file does not know have their defaults here; those of the machine are not taken over.
    """
    known = about(path).get("config")
    if not known:
        raise ValueError(f"{path} does not say which experiment it is from: name it, --config=configs/FILE.py")
    c = config(known["nnet"]["name"])
    machine = {
        "cpu",
        "compile",
        "tracker",
        "nnet_path",
        *(["mixed_precision"] if "ACCELERATE_MIXED_PRECISION" in os.environ else []),
    }
    fill(c, {key: value for key, value in known.items() if key not in machine})
    c.mixed_precision = portable(c.mixed_precision)
    return c


def fill(tree: ConfigDict, known: dict) -> None:
    """Set those settings of `tree` that `known` has; lists of JSON are tuples here."""
    for key, value in known.items():
        if isinstance(tree.get(key), ConfigDict):
            fill(tree[key], value)
        elif key in tree and value is not None:
            tree[key] = tuple(value) if isinstance(value, list) else value


def uvit(c: ConfigDict, size: str, **differences) -> None:
    """Set config.nnet to a published size (libs/models/uvit.py) with `differences`."""
    c.nnet.update(SIZES[size])
    c.nnet.update(differences)


def dit(c: ConfigDict, size: str, **differences) -> None:
    """Set config.nnet to a published size (libs/models/dit.py) with `differences`."""
    c.nnet.update(DIT_SIZES[size])
    c.nnet.update(differences)


def adadiff(c: ConfigDict, certainty: float, **train) -> None:
    """Turn a U-ViT experiment into AdaDiff's released recipe: fine-tune the U-ViT, leave by its rule at `certainty`."""
    c.uem.linear.norm = False
    c.loss.weights = "adadiff"
    c.train.update(save_interval=5_000, log_interval=100, **train)
    c.exit.name = "released_batch_mean"
    c.exit.released_batch_mean.update(certainty=certainty, per_image=True)  # as in batches of one, in any batch


# What early exit is held against, as differences from an experiment: --config=configs/<experiment>.py:<preset>.
PRESETS = {
    "paper": {"loss.target": "error"},  # the estimator learns the error, as published
    "unweighted": {"loss.weights": "unweighted"},
    "berxit": {"loss.weights": "berxit"},
    "calm": {"loss.weights": "calm", "exit.name": "similarity"},
    "frozen": {"train.freeze_backbone": True},  # with --pretrained_weight: only the estimator and own heads learn
    "plain": {  # L_simple only
        "loss.lambda_u": 0.0,
        "loss.lambda_layers": 0.0,
        "nnet.gaussian": 0,
        "exit.name": "full",
        "eval.fixed": (),
    },
}
PRESETS["small"] = PRESETS["plain"]  # and half the network
PRESETS["exit0"] = {"nnet.gaussian": 64}  # after another, as in plain,exit0: no layers or all


def finish(c: ConfigDict, arg: str) -> ConfigDict:
    """Apply the file's argument, names with commas between them.

    "" is the experiment, "quick" its small twin on synthetic data (seconds on a CPU), a preset one of its competitors.
    """
    names = arg.split(",") if arg else []
    for name in names:
        if name != "quick" and name not in PRESETS:
            raise ValueError(f"config argument is {arg!r}; its parts must be among quick, {', '.join(PRESETS)}")
    if "calm" in names and c.nnet.name == "unet":
        raise ValueError("preset calm leaves where neighbouring layers agree; a U-Net's layers have different sizes")
    if "quick" in names:
        shrink(c)
    for name in names:
        c.update_from_flattened_dict(PRESETS.get(name, {}))
        if name == "small":
            halve(c.nnet)
    return c


def halve(nnet: ConfigDict) -> None:
    """About half the MACs: half a transformer's depth; three quarters of the widths of a U-Net or a shallow U-ViT."""
    if nnet.name == "unet":
        nnet.widths = tuple(width * 3 // 4 for width in nnet.widths)
        nnet.groups = math.gcd(nnet.groups, *nnet.widths)
    elif nnet.name == "dit":
        nnet.depth = nnet.depth // 2
        nnet.points = tuple(k for k in nnet.points if k <= nnet.depth)
    elif nnet.depth < 4:
        nnet.embed_dim = nnet.embed_dim * 3 // 4
    else:
        nnet.depth = nnet.depth // 4 * 2  # even, as skips join the first half to the second
        nnet.points = tuple(k for k in nnet.points if k <= nnet.depth + 1)


def shrink(c: ConfigDict) -> None:
    """Make of an experiment its "quick" twin."""
    classes = c.nnet.num_classes - (c.dataset.p_uncond > 0)
    if c.nnet.name == "unet":
        side, depth = 8, 3
        c.nnet.update(img_size=side, widths=(8,) * depth, n_blocks=1, attention=(1,), groups=4)
    else:
        side, depth = c.nnet.patch_size * (4 if c.regime == "pixels" else 2), 5
        middle = c.nnet.name == "uvit"  # a U-ViT has one layer more than its setting says
        c.nnet.update(img_size=side, embed_dim=32, depth=depth - middle, num_heads=4, use_checkpoint=False)
    c.nnet.gaussian = 0  # it is made of the real data
    c.nnet.points = tuple(k for k in c.nnet.points if k <= depth)
    if c.nnet.num_classes > 0:
        classes = min(classes, 10)
        c.nnet.num_classes = classes + (c.dataset.p_uncond > 0)
    names = {"pixels": "synthetic", "latents": "synthetic_latents", "text": "synthetic_captions"}
    c.dataset.name, c.dataset.path, c.dataset.workers = names[c.regime], "", 0
    c.dataset.synthetic.update(resolution=side, n_classes=max(classes, 0))
    if c.regime == "pixels":
        c.dataset.synthetic.channels = c.nnet.in_chans
    c.dataset.synthetic_latents.update(size=side, n_classes=max(classes, 0))
    c.dataset.synthetic_captions.size = side
    c.autoencoder.update(path="random", channels=(8, 16), layers=1, groups=4)
    if c.regime == "text":
        c.nnet.update(num_clip_token=4, clip_dim=8)
        c.clip.update(path="random", length=4, width=8)
    c.train.update(n_steps=2, batch_size=8, log_interval=1, sample_interval=2, monitor_steps=3, eval_interval=0)
    c.sample.update(sample_steps=5, n_samples=8, mini_batch_size=8)
    c.eval.update(extractor="pixels", reference="", paired=8, timing_runs=1, timing_batch=4, fixed=(), fewer_steps=())
    c.eval.update(metrics=(), sweep=(), thresholds=c.eval.thresholds[:1])
