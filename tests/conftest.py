"""Tiny models with exits that spread, and one-process runs."""

from __future__ import annotations

import pytest
import torch

from libs.models import ESTIMATORS, EarlyExitModel, UViT
from libs.run import Run

torch.set_num_threads(1)


def tiny(uem="linear", heads="shared", seed=0, points=(), uem_options=None, spread=True, **nnet) -> EarlyExitModel:
    """Seven layers of width 32 on 8x8 images, whose estimators disagree between images: exits are spread over layers."""
    torch.manual_seed(seed)
    options = dict(img_size=8, patch_size=2, in_chans=1, embed_dim=32, depth=6, num_heads=4, init="xavier") | nnet
    model = EarlyExitModel(UViT(**options), ESTIMATORS[uem], points=points, heads=heads, **(uem_options or {}))
    for parameter in model.heads.parameters():  # own heads start as copies: make them differ
        parameter.data += 0.05 * torch.randn_like(parameter)
    for linear in getattr(model.uem, "maps", {}).values():
        linear.weight.data *= 40
    for linear in getattr(model.uem, "time_maps", {}).values():
        linear.weight.data *= 10
    if spread and not model.uem.scalar and not model.backbone.context_shape:
        x, _, time, cond = inputs(16, model=model)
        for _ in range(30):  # level the exits' mean u, then let it fall slowly with depth
            u = model(x, time, cond).mean_u.mean(1)
            for (k, linear), mean in zip(model.uem.maps.items(), u.tolist(), strict=True):
                linear.bias.data += 3 * (0.6 - 0.025 * int(k) - mean)
    return model.eval()


def inputs(n=64, seed=1, model=None):
    """x (n, 1, 8, 8), t (n,) on the CPU, network time (n,), and labels where the model has classes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 1, 8, 8, generator=generator)
    t = torch.rand(n, generator=generator, dtype=torch.float64)
    classes = model.backbone.num_classes if model is not None else 0
    cond = torch.randint(classes, (n,), generator=generator) if classes else None
    return x, t, (999 * t).float(), cond


@pytest.fixture
def run(tmp_path) -> Run:
    return Run.single(tmp_path / "run")
