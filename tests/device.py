"""A second memory without a GPU: what a CUDA stream would refuse, what would make the host wait, how many kernels run.

A tensor "on the device" wraps a CPU tensor and says that its torch device is `meta`, so that nothing but the dispatch
mode below can read it. The mode computes every operation, and, as CUDA would,

* raises `Mixed` where an operation mixes the two memories (a 0-dim CPU tensor and CPU indices are allowed, as on CUDA),
  and where a CPU generator fills a device tensor;
* notes what makes the host wait for the device: copies to the host, copies from the host that are not `non_blocking`,
  item/bool/float, nonzero, indexing by a mask or by CPU indices;
* counts kernels (views and empty tensors are none), and those on float64 tensors.

It cannot see waits inside of libraries' own kernels, memory written before a queued copy has read it, and autocast.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

DEVICE = torch.device("meta")
ROOT = Path(__file__).resolve().parents[1]
WAIT = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount", "equal"}
NO_KERNEL = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "alias", "lift_fresh"}
NO_KERNEL |= {"_reshape_alias", "_unsafe_view", "_local_scalar_dense"}
INDEXING = {"index", "index_put", "_index_put_impl", "_unsafe_index", "_unsafe_index_put"}
FROM_SHAPE = ("new_", "empty_like", "zeros_like", "ones_like", "full_like", "rand")  # read nothing of their input
DELAYED = {"tensor": torch.tensor, "autocast": torch.autocast, "save": torch.save}
SDPA = torch.nn.functional.scaled_dot_product_attention


class Mixed(RuntimeError):
    """An operation that CUDA would refuse."""


class Device(torch.Tensor):
    """A tensor in the second memory; `raw` is where its numbers are."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: torch.Tensor, requires_grad: bool = False):
        where = dict(strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype, device=DEVICE)
        tensor = torch.Tensor._make_wrapper_subclass(cls, raw.size(), **where, requires_grad=requires_grad)
        tensor.raw = raw
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if Log.on is None:
            raise RuntimeError(f"a device tensor outlived the emulation: {func}")
        return Log.on.run(func, args, kwargs or {})

    def tolist(self):
        Log.on.wait("to host")
        return self.raw.tolist()

    def __repr__(self, **_):
        return f"Device({tuple(self.shape)}, {self.dtype})"

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            memo[id(self)] = Device(self.raw.detach().clone()).requires_grad_(self.requires_grad)
            if isinstance(self, torch.nn.Parameter):
                memo[id(self)]._is_param = True
        return memo[id(self)]


@functools.cache
def composite(func) -> bool:
    """Whether `func` is made of others: in inference mode such functions arrive whole."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def place() -> str:
    """The innermost line of the project on the stack, this file left out."""
    frame = sys._getframe(2)
    while frame:
        name = frame.f_code.co_filename
        if name.startswith(str(ROOT)) and "/.venv/" not in name and name != __file__:
            return f"{Path(name).relative_to(ROOT)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "outside of the project"


class Log(TorchDispatchMode):
    """What happened: `waits` as (kind, place), `kernels` by name, `double` those with a float64 tensor."""

    on: Log | None = None

    def __init__(self):
        super().__init__()
        self.clear()

    def clear(self) -> None:
        self.waits: list[tuple[str, str]] = []
        self.kernels, self.double = Counter(), Counter()

    def wait(self, kind: str) -> None:
        self.waits.append((kind, place()))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run(func, args, kwargs or {})

    def run(self, func, args, kwargs):
        if composite(func):
            with self:
                made = func.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
        flat, spec = pytree.tree_flatten((args, kwargs))
        tensors = [x for x in flat if isinstance(x, torch.Tensor)]
        mine = [x for x in tensors if isinstance(x, Device)]
        asked = kwargs.get("device")
        on_device = bool(mine) if asked is None else torch.device(asked).type == DEVICE.type
        if not mine and not on_device:
            return func(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        if name == "copy_":
            on_device = isinstance(args[0], Device)
        self.judge(func, name, args, kwargs, tensors, mine, on_device)
        return self.compute(func, name, flat, spec, mine, on_device, asked is not None)

    def judge(self, func, name, args, kwargs, tensors, mine, on_device) -> None:
        """Raise for what CUDA would refuse; note what would wait."""
        base = name.rstrip("_")
        if name in ("_to_copy", "to"):
            if isinstance(args[0], Device) and not on_device:
                self.wait("to host")
            elif on_device and not isinstance(args[0], Device) and not kwargs.get("non_blocking"):
                self.wait("from host")
        elif name == "copy_":
            queued = kwargs.get("non_blocking") or args[2:] == (True,)
            if on_device != isinstance(args[1], Device) and not (on_device and queued):
                self.wait("from host" if on_device else "to host")
        elif base in INDEXING:
            self.judge_index(name, args)
        else:
            others = [x for x in tensors if not isinstance(x, Device) and (x.dim() or base in ("cat", "stack"))]
            reads = mine or on_device and not name.startswith(FROM_SHAPE)
            if others and reads:
                raise Mixed(f"{func}: a CPU tensor {tuple(others[0].shape)} beside the device's at {place()}")
        generators = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Generator)]
        if on_device and any(generator.device.type == "cpu" for generator in generators):
            raise Mixed(f"{func}: a CPU generator fills a device tensor at {place()}")
        if name == "_local_scalar_dense":
            self.wait("item")
        elif name in WAIT or name == "repeat_interleave" and kwargs.get("output_size") is None:
            self.wait(name)

    def judge_index(self, name, args) -> None:
        source, values = args[0], args[2] if len(args) > 2 else None
        for index in (i for i in args[1] if i is not None):
            if isinstance(index, Device) and not isinstance(source, Device):
                raise Mixed(f"{name}: a CPU tensor indexed by a device tensor at {place()}")
            if isinstance(source, Device) and not isinstance(index, Device):
                self.wait("CPU index")
            elif index.dtype in (torch.bool, torch.uint8) and isinstance(index, Device):
                self.wait("mask index")
        if (
            isinstance(values, torch.Tensor)
            and values.dim()
            and isinstance(values, Device) != isinstance(source, Device)
        ):
            raise Mixed(f"{name}: values in the other memory at {place()}")

    def compute(self, func, name, flat, spec, mine, on_device, asked):
        """The operation on the CPU tensors behind, its results wrapped again."""
        raw = [x.raw if isinstance(x, Device) else x for x in flat]
        args, kwargs = pytree.tree_unflatten(raw, spec)
        if asked:
            kwargs["device"] = torch.device("cpu")
            kwargs.pop("pin_memory", None)
        made = func(*args, **kwargs)
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if on_device and not view and name not in NO_KERNEL:
            self.kernels[name] += 1
            self.double[name] += any(x.dtype == torch.float64 and x.dim() for x in mine)
        if not on_device:
            return made
        known = {id(x.raw): x for x in mine}  # in-place functions return what they were given
        inference = mine[0].is_inference() if view and mine else torch.is_inference_mode_enabled()
        with torch.inference_mode(inference):
            return pytree.tree_map_only(torch.Tensor, lambda x: known[id(x)] if id(x) in known else Device(x), made)


# ---- what torch decides by the name of a device, before any operation ----------------------------------------------


def tensor(data, *args, device=None, **kwargs):
    made = DELAYED["tensor"](data, *args, **kwargs)
    return made.to(device) if device is not None else made  # from pageable memory: a wait, as on CUDA


class NoAutocast(contextlib.ContextDecorator):
    """The device's autocast does nothing."""

    def __new__(cls, device_type, *args, **kwargs):
        if device_type == DEVICE.type:
            return contextlib.nullcontext()
        return DELAYED["autocast"](device_type, *args, **kwargs)


def attention(q, k, v, *args, **kwargs):
    if not isinstance(q, Device) or torch.is_grad_enabled():
        return SDPA(q, k, v, *args, **kwargs)
    with _disable_current_modes():
        made = SDPA(q.raw, k.raw, v.raw, *args, **kwargs)
    Log.on.kernels["attention"] += 1
    return Device(made)


def save(obj, *args, **kwargs):
    with _disable_current_modes():
        plain = pytree.tree_map_only(Device, lambda x: x.raw.detach().clone(), obj)
        return DELAYED["save"](plain, *args, **kwargs)


@contextlib.contextmanager
def emulated():
    """The device, as long as the block lasts; gives its log."""
    with contextlib.ExitStack() as stack:
        for owner, name, new in (
            (torch, "tensor", tensor),
            (torch, "autocast", NoAutocast),
            (torch, "save", save),
            (torch.nn.functional, "scaled_dot_product_attention", attention),
        ):
            stack.enter_context(patch.object(owner, name, new))
        name = "_get_fused_kernels_supported_devices"
        for module in [m for key, m in sys.modules.items() if key.startswith("torch") and name in vars(m)]:
            kinds = getattr(module, name)
            stack.enter_context(patch.object(module, name, lambda kinds=kinds: [*kinds(), DEVICE.type]))
        log = Log.on = Log()
        stack.callback(setattr, Log, "on", None)
        stack.enter_context(log)
        yield log
