"""CIFAR-10 as in the UvA replication: own heads, probes at every block's input, DDPM's 1000 steps, certainty 0.925.

Theirs sums the fit of u over exits and images, here it is a mean; loss.stop_target=False lets it move the heads too.
The only file in its repository has uem.name=attention_probe and time_scale=1.

python eval.py --config=configs/cifar10_uva_small.py --nnet_path=assets/uva/cifar10.pth
"""

from configs import base, cifar10_uvit_small


def get_config(arg=""):
    c = cifar10_uvit_small.experiment()
    c.process = "ddpm"
    c.nnet.update(heads="own", points=tuple(range(13)), time_scale=1e-3)
    c.uem.name = "probe"
    c.dataset.random_flip = False
    c.train.update(n_steps=100_000, grad_clip=1.0, ema_rate=0.0)  # it keeps no average of the weights
    c.optimizer.betas = (0.99, 0.99)
    c.lr_scheduler.update(name="cosine", warmup_steps=1_500)
    c.sample.algorithm = "ddpm"
    c.exit.threshold.certainty = 0.925  # u <= 0.075
    c.eval.reference = "assets/fid_stats/fid_stats_cifar10_train_pytorch.npz"
    return base.finish(c, arg)
