"""ImageNet 256x256 latents, SiT-XL/2: flow matching. Published: FID 2.06 (7M steps, batch 256; guidance 1.5).

python train_ldm.py --config=configs/imagenet256_sit_xl.py --pretrained_weight=SiT-XL-2-256x256.pt
python eval_ldm.py --config=configs/imagenet256_sit_xl.py --nnet_path=SiT-XL-2-256x256.pt

The file has the tensors of DiT's, so this experiment must be named.
Euler's method stands for the released adaptive solver.
"""

from configs import base, imagenet256_dit_xl


def get_config(arg=""):
    c = imagenet256_dit_xl.experiment()
    c.nnet.convention, c.process, c.pred = "sit", "flow", "velocity"
    c.sample.algorithm = "euler_maruyama_ode"
    return base.finish(c, arg)
