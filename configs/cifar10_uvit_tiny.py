"""CIFAR-10 32x32 with classes, an early-exit U-ViT of 9 layers, 19 epochs.

On two CPU cores without bf16 8 hours, at 32 images/s.

The recipe is that of configs/fashion_uvit_small.py, the network larger; CIFAR-10 as pictures in ten class folders is
read with --config.dataset.name=images --config.dataset.path=FOLDER.

python train.py --config=configs/cifar10_uvit_tiny.py
python eval.py --nnet_path=<workdir>/last.ckpt
"""

from configs import base, digits_uvit_tiny, fashion_uvit_small


def get_config(arg=""):
    c = base.config()
    fashion_uvit_small.backbone(c, in_chans=3, embed_dim=192, depth=8, num_heads=6)
    digits_uvit_tiny.recipe(c)
    c.optimizer.name = "muon"
    c.dataset.update(name="cifar10", p_uncond=0.1, random_flip=True, workers=0)
    c.train.update(n_steps=7_500, batch_size=128, ema_rate=0.999)
    fashion_uvit_small.evaluation(c)
    c.eval.fixed = (4, 5, 6)
    return base.finish(c, arg)
