"""One minute on a GPU, with torch and none of the optional packages: python -m pytest -m gpu tests/test_gpu.py."""

import pytest
import torch

from benchmarks.common import make_inputs, make_model, make_trainable, spread_exits
from libs.exits import EXIT_POLICIES, run_with_exits
from libs.losses import Objective
from sde import VPLinear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
POLICIES = {
    "full": {},
    "fixed": {"layer": 3},
    "threshold": {"certainty": 0.5},
    "patience": {"certainty": 0.5},
    "schedule": {},
    "power": {},
    "similarity": {"cosine": 0.9},
}


@pytest.mark.parametrize("name", POLICIES)
@torch.inference_mode()
def test_a_gpu_makes_the_cpus_outputs(name):
    """Catches rows that are joined in another order, and memories that mix, on CUDA only."""
    model = make_model("tiny", "cpu")
    x, t, time, cond = make_inputs(model, 64)
    spread_exits(model, x, time, cond)
    policy = EXIT_POLICIES[name](**POLICIES[name])
    wanted, used = run_with_exits(model, policy, x, t, time, cond)
    model.cuda()
    found, used_gpu = run_with_exits(model, policy, x.cuda(), t, time.cuda(), cond.cuda())
    same = torch.from_numpy(used == used_gpu)
    assert same.float().mean() > 0.95  # decisions within rounding of the threshold may differ
    torch.testing.assert_close(found.cpu()[same], wanted[same], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ("full", "fixed", "schedule", "power"))
@torch.inference_mode()
def test_static_policies_do_not_wait_for_the_device(name):
    """Catches an `.item()`, a `.cpu()` or a mask index in a call whose depth is known beforehand."""
    model = make_model("tiny", "cuda")
    x, t, time, cond = make_inputs(model, 64)
    policy = EXIT_POLICIES[name](**POLICIES[name])
    run_with_exits(model, policy, x, t, time, cond)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_with_exits(model, policy, x, t, time, cond)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_a_training_step_in_half_precision_is_finite(dtype):
    """Catches a loss or a gradient that leaves the range of the number format."""
    model = make_trainable("tiny", "cuda")
    x, t, _, cond = make_inputs(model, 16)
    eps, times, process = torch.randn_like(x), t.cuda().float(), VPLinear()
    with torch.autocast("cuda", dtype):
        exits = model(process.noised(x, times, eps), process.network_time(times), cond)
    loss, _ = Objective()(exits, process, "noise", x, eps, times)
    scale = 2.0**10 if dtype == torch.float16 else 1.0
    (scale * loss.mean()).backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads and all(torch.isfinite(grad).all() for grad in grads)


@torch.inference_mode()
def test_attention_backends_agree():
    """Catches a backend that scales or orders its heads otherwise."""
    x, _, time, cond = make_inputs(make_model("tiny", "cuda"), 8)
    wanted = make_model("tiny", "cuda", attention="math").backbone(x, time, cond)
    torch.testing.assert_close(make_model("tiny", "cuda", attention="sdpa").backbone(x, time, cond), wanted)
    pytest.importorskip("xformers")
    with torch.autocast("cuda", torch.bfloat16):
        half = make_model("tiny", "cuda", attention="xformers").backbone(x, time, cond)
    torch.testing.assert_close(half.float(), wanted, rtol=0.05, atol=0.05)


@torch.inference_mode()
def test_compiled_blocks_make_the_same_outputs():
    """Catches fused kernels that change more than rounding, and rows of another number that they were not made for."""
    model, compiled = make_model("tiny", "cuda"), make_model("tiny", "cuda")
    compiled.load_state_dict(model.state_dict())
    compiled.compile_blocks()
    x, t, time, cond = make_inputs(model, 64)
    spread_exits(model, x, time, cond)
    compiled.load_state_dict(model.state_dict())
    policy = EXIT_POLICIES["threshold"](certainty=0.5)
    for rows in (64, 48, 7):
        inputs = x[:rows], t[:rows], time[:rows], cond[:rows]
        wanted, used = run_with_exits(model, policy, *inputs)
        found, used_compiled = run_with_exits(compiled, policy, *inputs)
        same = torch.from_numpy(used == used_compiled)
        assert same.float().mean() > 0.8  # decisions within rounding of the threshold may differ
        torch.testing.assert_close(found[same], wanted[same], rtol=1e-3, atol=1e-3)
