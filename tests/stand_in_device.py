"""A GPU that is not there: tensors that claim to lie on ``cuda:0``, compute on the CPU and refuse what CUDA refuses.

Inside ``stand_in_device()`` a machine without a GPU seems to have one. A ``TensorThere`` has CUDA's device below
autograd, so every operator, whoever called it, is looked at on its way: tensors of two devices are refused unless CUDA
takes them (scalars of the CPU in pointwise operators, indices on the CPU), and so are ``numpy`` of a tensor there,
random numbers from a generator of the other device, products of whole numbers, and histograms. What remains is computed
by the CPU in the same type, so the numbers must be the CPU's. Not imitated: other rounding, streams, memory, NCCL.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

THERE, HERE = torch.device("cuda:0"), torch.device("cpu")
_aten = torch.ops.aten
_COPIES = {_aten.copy_.default, _aten._to_copy.default, _aten._foreach_copy_.default}
_INDEXED = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default}
_FLOATS_ONLY = {_aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm, _aten.mv, _aten.addmv, _aten.dot, _aten.vdot}
_NOT_THERE = {_aten.histogram, _aten.histogramdd, _aten._histogramdd_from_bin_cts, _aten._histogramdd_bin_edges}
_RealGenerator = torch.Generator
_GENERATORS: dict[int, torch.Generator] = {}  # those that claim a device, by the address that operators are given


class TensorThere(Tensor):
    """Claims the device; ``inner`` holds the numbers."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> TensorThere:
        there = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=THERE,
        )
        there.inner = inner
        return there

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _computed(func, args, kwargs or {})

    def __repr__(self) -> str:
        return f"{self.inner!r} on {THERE}"

    def __format__(self, how: str) -> str:
        return format(self.item() if self.dim() == 0 else str(self), how)

    def tolist(self):
        return self.inner.tolist()

    def numpy(self, **_):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor first")


class _Generator(_RealGenerator):
    """CPU random numbers under either name."""

    def __new__(cls, device="cpu"):
        made = super().__new__(cls, "cpu")
        made.claimed = _device(device)
        _GENERATORS[made._cdata] = made
        return made

    @property
    def device(self):
        return self.claimed


class _Mode(TorchDispatchMode):
    """What no tensor's own dispatch sees: tensors made on the device, or moved there."""

    _mode_key = torch._C._TorchDispatchModeKey.FAKE  # torch looks for no driver while a mode of this key is on

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _computed(func, args, kwargs or {})


def _device(named) -> torch.device:
    device = torch.device(named)
    if device.type == "cuda" and device.index not in (None, 0):
        raise RuntimeError("CUDA error: invalid device ordinal")
    return THERE if device.type == "cuda" else device


def _computed(func, args, kwargs):
    """One operator, on the CPU, and its answer put where CUDA would put it."""
    if func is _aten._efficientzerotensor.default:  # zeros without memory, which no dispatch can follow
        func = _aten.zeros.default
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = any(isinstance(tensor, TensorThere) for tensor in given)
    asked = None if kwargs.get("device") is None else _device(kwargs["device"])
    device = asked or (THERE if there else HERE)
    generator = kwargs.get("generator")
    if generator is not None:
        claimed = _GENERATORS.get(generator._cdata, generator).device.type
        if claimed != device.type:
            raise RuntimeError(f"Expected a '{device.type}' device type for generator but found '{claimed}'")
    if there:
        _check(func, args, kwargs, given)
    elif device == HERE:
        return func(*args, **kwargs)
    here, options = tree_map(_inner, args), tree_map(_inner, kwargs)
    if asked is not None:
        options["device"] = HERE
    out = func(*here, **options)
    if torch.Tag.inplace_view in func.tags:  # the shape of the tensor there must follow
        return return_and_correct_aliasing(func, args, kwargs, TensorThere(out))
    changed = _changed(func, args, kwargs)
    if changed is not None:
        return changed
    if device == HERE:
        return tree_map(lambda value: value.clone() if any(value is x for x in tree_leaves(here)) else value, out)
    return tree_map(lambda value: TensorThere(value) if isinstance(value, Tensor) else value, out)


def _inner(value):
    return value.inner if isinstance(value, TensorThere) else value


def _changed(func, args, kwargs):
    """The argument that an operator changes in place and returns, or None."""
    if not func._schema.is_mutable or not func._schema.returns:
        return None
    written = [
        args[place] if place < len(args) else kwargs.get(argument.name)
        for place, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return written[0] if len(func._schema.returns) == 1 else tuple(written)


def _check(func, args, kwargs, given) -> None:
    """Refuse what CUDA refuses."""
    packet = func.overloadpacket
    if packet in _NOT_THERE:
        raise NotImplementedError(f"Could not run '{func}' with arguments from the 'CUDA' backend")
    if packet in _FLOATS_ONLY and not (given[0].is_floating_point() or given[0].is_complex()):
        raise RuntimeError(f'"{packet}_cuda" not implemented for {given[0].dtype}')
    here = [tensor for tensor in given if not isinstance(tensor, TensorThere)]
    if not here or func in _COPIES:
        return
    if func in _INDEXED:
        values = args[2:3]
        allowed = [*tree_leaves(args[1]), *(value for value in values if value.dim() == 0)]
    elif torch.Tag.pointwise in func.tags or packet in (
        _aten.where,
        _aten.masked_fill,
        _aten.masked_fill_,
        _aten.fill_,
    ):
        written = args[0] if func._schema.is_mutable else None
        allowed = [tensor for tensor in here if tensor.dim() == 0 and tensor is not written]
    else:
        allowed = []
    if any(all(tensor is not other for other in allowed) for tensor in here):
        shapes = [f"{tensor.device} {tuple(tensor.shape)}" for tensor in given]
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {', '.join(shapes)} ({func})")


def _walk_back(outputs, gradients, keep, create, inputs, allow_unreachable=True, accumulate_grad=True):
    """Autograd's graph from the outputs back, node by node: torch's own engine asks a GPU for its streams."""
    del keep, create, allow_unreachable
    flowing = {}
    for output, gradient in zip(outputs, gradients, strict=True):
        _add(flowing, (output.grad_fn, output.output_nr), gradient)
    waiting = _edges({output.grad_fn for output in outputs})
    wanted = {_edge(tensor): place for place, tensor in enumerate(inputs)}
    found = [None] * len(inputs)
    ready = [output.grad_fn for output in outputs if not waiting[output.grad_fn]]
    while ready:
        node = ready.pop()
        width = max([number for owner, number in flowing if owner is node], default=0) + 1
        arriving = [flowing.pop((node, number), None) for number in range(width)]
        for number, gradient in enumerate(arriving):
            if (node, number) in wanted:
                found[wanted[node, number]] = gradient
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            if accumulate_grad and not inputs and arriving[0] is not None:
                leaf.grad = arriving[0] if leaf.grad is None else leaf.grad + arriving[0]
            continue
        step = node.apply if isinstance(node, torch.autograd.function.BackwardCFunction) else node
        leaving = step(*arriving) if any(gradient is not None for gradient in arriving) else [None]
        leaving = leaving if isinstance(leaving, tuple | list) else [leaving]
        for (follower, number), gradient in zip_longest(node.next_functions, leaving[: len(node.next_functions)]):
            if follower is None:
                continue
            if gradient is not None:
                _add(flowing, (follower, number), gradient)
            waiting[follower] -= 1
            if not waiting[follower]:
                ready.append(follower)
    return tuple(found)


def _edges(roots) -> Counter:
    """How many edges lead to each node."""
    waiting, seen, open_nodes = Counter(), set(roots), list(roots)
    while open_nodes:
        for follower, _ in open_nodes.pop().next_functions:
            if follower is not None:
                waiting[follower] += 1
                if follower not in seen:
                    seen.add(follower)
                    open_nodes.append(follower)
    return waiting


def _edge(tensor: Tensor):
    edge = torch.autograd.graph.get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def _add(flowing, edge, gradient) -> None:
    node, number = edge
    wanted = node._input_metadata[number]
    gradient = gradient.sum_to_size(wanted.shape).to(wanted.dtype)
    flowing[edge] = flowing[edge] + gradient if edge in flowing else gradient


@contextmanager
def stand_in_device() -> Iterator[None]:
    """A machine on which ``cuda:0`` seems to be there."""
    fakes = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda _: None,
        "synchronize": lambda _=None: None,
        "get_device_name": lambda _=None: "a stand-in",
        "get_device_properties": lambda _=None: SimpleNamespace(total_memory=80 * 2**30),
        "get_rng_state": lambda _=None: torch.get_rng_state(),
        "set_rng_state": lambda state, _=None: torch.set_rng_state(state),
    }
    real, lifts = torch.autograd._engine_run_backward, torch._C._only_lift_cpu_tensors()
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()

    def run_backward(outputs, *rest, **options):
        walk = _walk_back if any(isinstance(output, TensorThere) for output in outputs) else real
        with torch.set_grad_enabled(walk is real and torch.is_grad_enabled()):
            return walk(outputs, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        for name, fake in fakes.items():
            patch.setattr(torch.cuda, name, fake)
        patch.setattr(torch, "Generator", _Generator)
        patch.setattr(torch.autograd, "_engine_run_backward", run_backward)
        patch.setattr(torch.backends.cudnn, "enabled", False)
        torch._C._ensureCUDADeviceGuardSet()
        torch._C._set_only_lift_cpu_tensors(True)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            with _Mode():
                yield
        finally:
            _GENERATORS.clear()
            torch.__future__.set_overwrite_module_params_on_conversion(overwrites)
            torch._C._set_only_lift_cpu_tensors(lifts)
