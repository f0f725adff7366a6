"""The cost model against torch's own counter, and against the published totals."""

import numpy as np
import pytest
import torch
from conftest import inputs, tiny
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from libs.exits import EXIT_POLICIES, Trace, run_with_exits
from libs.metrics.cost import macs_per_image
from libs.models import ESTIMATORS, SIZES, UViT

KINDS = {
    "plain": dict(attention="math"),
    "classes, no conv": dict(attention="math", num_classes=4, conv=False),
    "time mlp": dict(attention="math", mlp_time_embed=True),
}


def count_macs(work) -> int:
    """Attention runs as plain products: torch's counter knows no fused kernel of a CPU, which torch 2.14 prefers."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("uem", ESTIMATORS)
def test_macs_of_every_exit(kind, uem):
    """Catches a cost that is pasted, forgets the skip projection, the estimator, the head or the attention products."""
    model = tiny(uem, "own", **KINDS[kind])
    x, t, time, cond = inputs(1, model=model)
    macs = model.macs()
    for k in model.points:
        policy = EXIT_POLICIES["fixed"](layer=k)
        assert macs.at(k) == count_macs(lambda policy=policy: run_with_exits(model, policy, x, t, time, cond))
    question = model.predict_ahead if model.uem.ahead else lambda carry: model.uncertainty(3, carry)
    counted = count_macs(lambda: question(model.embed(x, time, cond))) - count_macs(lambda: model.embed(x, time, cond))
    assert macs.ask[0 if model.uem.ahead else 3] == counted > 0
    asked = set(model.questions(model.points)) - (
        {7} if uem.endswith("probe") else set()
    )  # which has none at the last exit
    assert sum(macs.ask) == counted * len(asked)


def test_text_model_macs():
    """Catches text tokens that are not counted."""
    model = tiny(attention="math", clip_dim=24, num_clip_token=5)
    x, t, time, _ = inputs(1)
    context = torch.randn(1, 5, 24)
    assert model.macs().at(7) == count_macs(lambda: model.backbone(x, time, context))


def test_cost_of_looking_ahead():
    """Catches a look ahead that is charged at every exit, or only to the rows that go deep."""
    model = tiny("ahead")
    macs = model.macs()
    trace = Trace(model.depth, model.questions((1, 2, 3)))
    trace.add(0.5, np.array([[1, 7]]))
    plain = np.array([macs.at(1), macs.at(7)])
    np.testing.assert_allclose(macs_per_image(trace, macs), plain + model.uem.macs(0))


def test_cost_of_a_trace():
    """Catches costs that forget questions asked on the way, or guidance branches."""
    model = tiny()
    x, t, time, _ = inputs(16)
    policy = EXIT_POLICIES["threshold"](certainty=0.8)
    _, used = run_with_exits(model, policy, x, t, time, None)
    trace = Trace(model.depth, policy.asked(model.points))
    trace.add(0.5, used.reshape(2, 8))
    macs = model.macs()
    by_hand = [
        macs.embed + sum(macs.layers[:k]) + macs.head[k] + sum(macs.ask[j] for j in range(1, 7) if j <= k) for k in used
    ]
    np.testing.assert_allclose(macs_per_image(trace, macs), np.array(by_hand).reshape(2, 8).sum(0))


# U-ViT's READMEs and papers count GMACs with attention products; parameters are those of the released files.
PUBLISHED = {
    "CIFAR-10 S/2": (dict(SIZES["S"], img_size=32, patch_size=2, in_chans=3), 44_255_328, 12.201),
    "ImageNet 256 L/2": (
        dict(SIZES["L"], img_size=32, patch_size=2, in_chans=4, num_classes=1001),
        286_763_172,
        76.456,
    ),
    "ImageNet 256 H/2": (
        dict(SIZES["H"], img_size=32, patch_size=2, in_chans=4, num_classes=1001, conv=False),
        500_832_016,
        133.197,
    ),
    "MS-COCO S/2": (dict(SIZES["S"], img_size=32, patch_size=2, in_chans=4, clip_dim=768), 44_692_644, 16.230),
    "MS-COCO S/2 deep": (
        dict(SIZES["S-deep"], img_size=32, patch_size=2, in_chans=4, clip_dim=768),
        58_345_636,
        21.240,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    """Catches a network that is not the released one: parameters exactly, GMACs to the third digit."""
    settings, parameters, gmacs = PUBLISHED[name]
    with torch.device("meta"):
        model = UViT(**settings)
    assert sum(p.numel() for p in model.parameters()) == parameters
    # The published figures run the head on the extra tokens too; ours does not.
    extra = model.extras * model.decoder_pred.weight.numel()
    assert (model.macs().at(model.depth) + extra) / 1e9 == pytest.approx(gmacs, abs=6e-4)
