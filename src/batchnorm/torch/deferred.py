"""Outputs that wait for what follows, so that a normalization, an addition and an activation become one computation.

A layer that is marked returns a `Deferred`: a tensor in every respect but that its values are made when they are asked for. The
addition and the activation behind the layer reach it as torch functions, and are computed with it; everything else gets the
plain output. So whatever a program does, it computes the same.
"""

import contextlib
import operator
import sys
import threading
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F  # noqa: N812 - as everybody calls it
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._pytree import tree_flatten, tree_map

from batchnorm.errors import FusionError
from batchnorm.torch import ops
from batchnorm.torch.naming import describe
from batchnorm.torch.rows import in_rows

__all__ = ["ASKED", "Deferred", "Step", "defer", "fits", "hollow", "step_of", "suits"]


class Step(NamedTuple):
    """What a torch function does to an output: ``"add"`` or the name of an activation."""

    name: str
    in_place: bool


# name, whether it writes to its argument (None: it is asked to by inplace=), the arguments that it must have or may leave out
_FUNCTIONS: dict[Any, tuple[str, bool | None, dict[str, Any]]] = {
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__), ("add", False, {"alpha": 1})),
    **dict.fromkeys((Tensor.add_, Tensor.__iadd__), ("add", True, {"alpha": 1})),
    **dict.fromkeys((torch.relu, Tensor.relu), ("relu", False, {})),
    **dict.fromkeys((torch.relu_, Tensor.relu_), ("relu", True, {})),
    F.relu: ("relu", None, {}),
    F.relu6: ("relu6", None, {}),
    F.hardtanh: ("relu6", None, {"min_val": 0, "max_val": 6}),
    F.leaky_relu: ("leaky_relu", None, {"negative_slope": 0.01}),
    F.leaky_relu_: ("leaky_relu", True, {}),
    F.silu: ("silu", None, {}),
    F.gelu: ("gelu", False, {"approximate": "none"}),
    F.hardswish: ("hardswish", None, {}),
    **dict.fromkeys((torch.sigmoid, Tensor.sigmoid), ("sigmoid", False, {})),
    **dict.fromkeys((torch.sigmoid_, Tensor.sigmoid_), ("sigmoid", True, {})),
    **dict.fromkeys((torch.tanh, Tensor.tanh), ("tanh", False, {})),
    **dict.fromkeys((torch.tanh_, Tensor.tanh_), ("tanh", True, {})),
}
_SAID = (
    "shape", "dtype", "device", "ndim", "layout", "requires_grad", "itemsize", "is_cuda", "is_cpu", "is_meta", "is_mps",
    "is_sparse", "is_quantized", "is_nested",
)  # fmt: skip
_ATTRIBUTES: dict[str, Any] = {**vars(torch._C.TensorBase)}
# what is answered without any values
ASKED: frozenset[Any] = frozenset(
    {
        *(_ATTRIBUTES[name].__get__ for name in _SAID),
        Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.stride, Tensor.is_contiguous,
        Tensor.is_floating_point, Tensor.is_complex, Tensor.element_size, Tensor.get_device, Tensor.is_inference,
        Tensor.storage_offset, torch.is_floating_point, torch.is_complex, torch.numel,
    }
)  # fmt: skip
# what is about the place of a tensor in the graph of gradients, and not about its values
_OF_GRAPH = (
    Tensor.register_hook, Tensor.register_post_accumulate_grad_hook, Tensor.retain_grad, Tensor.backward, torch.autograd.grad,
    Tensor.detach_, Tensor.requires_grad_, *(_ATTRIBUTES[name].__get__ for name in ("grad", "grad_fn", "retains_grad")),
)  # fmt: skip
# what may be switched on beside a wait; anything else changes what is computed, and is computed at once
_BESIDE = frozenset({"on_single", "unbiased", "debias", "total_variance", "domains", "wide_statistics"})
_STATE = ("training", "momentum", "eps", "options", "frozen_statistics", "_domain", "_collected", "_plain")
_state_of = operator.attrgetter(*_STATE)
# values below which it costs more to wait than is saved
FEW = 1 << 16
_CURE = "take fusion out with convert(model, fuse=False), or fuse again with an example that goes this way"


def step_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Step | None:
    """Return the addition or activation that a torch function is asked for; ``None`` for everything else."""
    found = _FUNCTIONS.get(func)
    if found is None or len(args) != (2 if found[0] == "add" else 1):
        return None
    name, in_place, fixed = found
    if not kwargs and func is not F.hardtanh:
        return Step(name, bool(in_place))
    given = {key: v for key, v in kwargs.items() if key != "inplace"}
    if any(key not in fixed or v != fixed[key] for key, v in given.items()) or (func is F.hardtanh and len(given) != 2):
        return None
    return Step(name, bool(kwargs.get("inplace", False)) if in_place is None else in_place)


def fits(x: Tensor, other: Tensor) -> bool:
    """Whether a tensor can be a residual of an output like ``x``: it has the same shape, dtype and strides."""
    return (
        other.shape == x.shape
        and other.dtype is x.dtype
        and other.layout is torch.strided
        and other.device == x.device
        and other.stride() == x.stride()
    )


def hollow(kind: type[Tensor], like: Tensor, *, derives: bool) -> Any:
    """Return a tensor of some kind that has everything but values."""
    make: Any = Tensor._make_wrapper_subclass
    return make(kind, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device, requires_grad=derives)


def suits(layer: Any) -> bool:
    """Whether a layer does nothing but normalize, alone in its process."""
    hooked = layer._forward_hooks or layer._backward_hooks or layer._backward_pre_hooks
    hooked = hooked or _has_any_global_hook()  # type: ignore[no-untyped-call]
    if hooked or layer.options.activation is not None:
        return False
    return layer._plain or (not layer.is_collecting and _BESIDE.issuperset(layer.options.changed()))


def defer(layer: Any, x: Tensor) -> Tensor | None:
    """Return the output of a layer for ``x``, to be made later; ``None`` where the layer must make it now."""
    if not ops.is_eager(x):
        return None
    _flush(layer)
    special = x.is_inference() or forward_ad._current_level >= 0 or torch._C._len_torch_function_stack() > 0
    if special or x.numel() < FEW or not suits(layer) or not _is_regular(layer, x):
        return None
    return _waiting(_Call(layer, x), None)


def _is_regular(layer: Any, x: Tensor) -> bool:
    """Whether nothing is wrong with the input, so that there is nothing to say but for γ that are not finite."""
    if x.ndim not in layer._ranks or x.shape[1] != layer.num_features or layer.eps <= 0:
        return False
    values = x.numel()
    if values == 0 or (values == x.shape[1] and layer.normalizes_by_batch()):
        return False
    weight = layer._parameters.get("weight", x)
    narrow = x.element_size() < 4 and weight is not None and weight.dtype is torch.float32
    same = weight is None or weight.dtype is x.dtype or narrow
    return x.is_floating_point() and same and weight is not x and (x.is_contiguous() or in_rows(x))


class _Waiting(threading.local):
    """The last output of each layer that waits, in this thread: the running statistics must move in the order of the calls."""

    def __init__(self) -> None:
        # by the layer's id: weak keys cost more than all else that is looked up for a call
        self.outputs: dict[int, weakref.ref[Deferred]] = {}


_WAITING = _Waiting()


def _flush(layer: Any) -> None:
    reference = _WAITING.outputs.pop(id(layer), None)
    output = None if reference is None else reference()
    if output is not None and output.call.layer is layer and not output.call.moved:
        output.made()


def _modes() -> tuple[bool, bool]:
    return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")


class _Call:
    """One call of a layer: what it was given, how everything stood, and whether the running statistics have moved by it."""

    moved = False

    def __init__(self, layer: Any, x: Tensor) -> None:
        self.layer, self.x = layer, x
        self.modes = _modes()
        self.state = _state_of(layer)
        by_batch, parameters, buffers = layer.normalizes_by_batch(), layer._parameters, layer._buffers
        read = (x, parameters.get("weight"), parameters.get("bias"), *(() if by_batch else layer.running()[:2]))
        self.read = [v for v in read if v is not None]
        self.versions = self._versions()
        tracks = layer.training and layer.track_running_stats and buffers["running_mean"] is not None
        # activation checkpointing runs a forward again, inside of the backward
        self.moves = by_batch and tracks and torch._C._current_graph_task_id() == -1

    def _versions(self) -> list[int]:
        return [v._version for v in self.read]

    def compute(self, residual: Tensor | None, activation: str | None) -> Tensor:
        """Do what the layer was called for; the running statistics move once, however often this is called.

        Raises:
            FusionError: something that the layer reads was written to since.
        """
        again, self.moved = self.moved, True
        if self.moves and not again and torch._C._current_graph_task_id() != -1:
            # statistics do not move inside of a backward
            self.refuse()
        if self._versions() != self.versions:
            raise FusionError(
                f"{describe(self.layer)}: its input, γ, β or statistics were written to between its call and the use of its "
                f"output: {_CURE}"
            )
        state, changes = _state_of(self.layer), {}
        if state != self.state:
            changes = {k: old for k, old, new in zip(_STATE, self.state, state, strict=True) if old is not new}
        if again and self.moves:
            changes["track_running_stats"] = False
        if changes or _modes() != self.modes:
            with self._restored(changes):
                return self._normalize(residual, activation)
        return self._normalize(residual, activation)

    def _normalize(self, residual: Tensor | None, activation: str | None) -> Tensor:
        y: Tensor = self.layer.normalize(self.x, residual, activation)
        return y

    @contextlib.contextmanager
    def _restored(self, changes: dict[str, Any]) -> Iterator[None]:
        """Let everything stand as it did when the layer was called, but for what is asked otherwise."""
        kept = {name: getattr(self.layer, name) for name in changes}
        grad, cast = self.modes
        try:
            for name, value in changes.items():
                setattr(self.layer, name, value)
            with torch.set_grad_enabled(grad), torch.autocast("cpu", enabled=cast):
                yield
        finally:
            for name, value in kept.items():
                setattr(self.layer, name, value)

    def refuse(self, *_: Any) -> None:
        """Say that something took the output past all torch functions."""
        raise FusionError(
            f"{describe(self.layer)} is fused with what follows it, but its output reached something else, past all functions "
            f"of torch (a function with a backward of its own, a hook of a module, compiled code): {_CURE}"
        )

    def __del__(self) -> None:
        """Move the running statistics by a batch whose output nobody has used."""
        if self.moves and not self.moved and not sys.is_finalizing():
            self.modes = (False, self.modes[1])
            self.compute(None, None)


class Deferred(Tensor):
    """The output of a layer, whose values are made when they are used."""

    call: _Call
    residual: Tensor | None = None
    # of the residual, when it was given
    version: int = 0
    # once it was made, or written to
    value: Tensor | None = None
    # what followed was computed without this, which is no part of its graph
    passed: bool = False

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute an addition or activation together with the output, and anything else from it."""
        kwargs = kwargs or {}
        step = step_of(func, args, kwargs)
        if step is not None:
            y = _fused(step, args)
            if y is not None:
                return y
        elif func in ASKED and args and isinstance(args[0], Deferred) and args[0].value is None:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        elif func in _OF_GRAPH:
            for leaf in tree_flatten((args, kwargs))[0]:
                if isinstance(leaf, Deferred) and leaf.value is None and leaf.passed:
                    raise FusionError(
                        f"{describe(leaf.call.layer)}: what follows its output was computed without that, so the gradient of "
                        f"the output itself is not known: {_CURE}"
                    )
        args, kwargs = tree_map(lambda leaf: leaf.made() if isinstance(leaf, Deferred) else leaf, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Refuse: there are no values, and who comes here has passed every torch function."""
        next(leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Deferred)).call.refuse()

    def made(self) -> Tensor:
        """Return the plain output."""
        if self.value is None:
            self.value = self._compute(None)
        return self.value

    def added(self, other: Any, *, in_place: bool) -> Tensor | None:
        """Return the output with a residual; ``None`` where it must be added to the plain one."""
        plain = isinstance(other, Tensor) and ops.is_eager(other) and not other.is_inference()
        if not plain or not self._may() or self.residual is not None or not fits(self.call.x, other):
            return None
        if not _goes_on(self.call.layer._followers):
            return self._passed(self.call.compute(other, None), in_place=in_place)
        if not in_place:
            return self._passed(_waiting(self.call, other), in_place=False)
        with torch._C.DisableTorchFunctionSubclass():
            if other.requires_grad and self.call.modes[0] and not self.requires_grad:
                return None
        self.residual, self.version = other, other._version
        return self

    def activated(self, name: str, *, in_place: bool) -> Tensor | None:
        """Return the activation of the output; ``None`` where it must be computed from the plain one."""
        return self._passed(self._compute(name), in_place=in_place) if self._may() else None

    def _passed(self, y: Tensor, *, in_place: bool) -> Tensor:
        self.value, self.passed = (y, False) if in_place else (None, True)
        return y

    def _may(self) -> bool:
        """Whether what is asked for can be computed with the output, in the modes that it is asked in."""
        return self.value is None and _modes() == self.call.modes

    def _compute(self, activation: str | None) -> Tensor:
        if not self.call.modes[0]:
            with torch._C.DisableTorchFunctionSubclass():
                if self.grad_fn is not None:
                    # a function with a backward of its own has returned it
                    self.call.refuse()
        if self.residual is not None and self.residual._version != self.version:
            raise FusionError(
                f"{describe(self.call.layer)}: what was added to its output was written to before that was used: {_CURE}"
            )
        return self.call.compute(self.residual, activation)


def _waiting(call: _Call, residual: Tensor | None) -> Deferred:
    """Return an output, with or without something added, that has no values yet."""
    x, parameters = call.x, call.layer._parameters
    derives = call.modes[0] and (
        x.requires_grad
        or (residual is not None and residual.requires_grad)
        or any(v is not None and v.requires_grad for v in parameters.values())
    )
    output: Deferred = hollow(Deferred, x, derives=derives)
    output.call = call
    if residual is not None:
        output.residual, output.version = residual, residual._version
    if derives:
        # a gradient that arrives here would be lost
        with torch._C.DisableTorchFunctionSubclass():
            output._backward_hooks = {0: call.refuse}
    if call.moves:
        _WAITING.outputs[id(call.layer)] = weakref.ref(output)
    return output


def _goes_on(followers: tuple[tuple[str, ...], ...]) -> bool:
    """Whether an addition behind a layer is followed by an activation, wherever the layer is called."""
    return ("add",) not in followers and any(chain[0] == "add" for chain in followers)


def _fused(step: Step, args: tuple[Any, ...]) -> Tensor | None:
    host, other = args if step.name == "add" else (args[0], None)
    if not isinstance(host, Deferred) and not step.in_place:
        host, other = other, host
    if not isinstance(host, Deferred):
        return None
    if step.name != "add":
        return host.activated(step.name, in_place=step.in_place)
    return host.added(other.made() if isinstance(other, Deferred) else other, in_place=step.in_place)
