"""One step of training in a copy of a model, for `check`: what dropout reaches, and what a backward pass moves."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F  # noqa: N812 - as everybody calls it
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten
from torch.utils.weak import WeakTensorKeyDictionary

from batchnorm.errors import OptionError
from batchnorm.states import Rehearsal
from batchnorm.torch.evaluation import call, copied, kept_generators, silent, tensors_of
from batchnorm.torch.graphs import own_buffers, structural_copy
from batchnorm.torch.statistics import statistics_modules
from batchnorm.torch.sums import moments_of

__all__ = ["rehearse"]

# what drops, with the places of the rate and of the switch
_DROPOUT = {
    F.dropout: (1, 2), F.dropout1d: (1, 2), F.dropout2d: (1, 2), F.dropout3d: (1, 2), F.alpha_dropout: (1, 2),
    F.feature_alpha_dropout: (1, 2), torch.dropout: (1, 2), torch.dropout_: (1, 2), torch.alpha_dropout: (1, 2),
    torch.feature_dropout: (1, 2), torch.native_dropout: (1, 2),
}  # fmt: skip
_SWITCHES = ("training", "train")
# what starts anew behind it
_NORMALIZES = {F.batch_norm, torch.batch_norm, F.layer_norm, F.group_norm, F.instance_norm, torch.layer_norm}
# the same values in another shape
_MOVES = {
    "view", "reshape", "flatten", "permute", "transpose", "squeeze", "unsqueeze", "contiguous", "movedim", "swapaxes", "t",
    "clone", "detach", "to", "float", "double", "half", "bfloat16", "view_as", "unflatten", "identity",
}  # fmt: skip


def rehearse(model: nn.Module, example: Any) -> Rehearsal:
    """Run a copy forward and backward in training.

    Raises:
        OptionError: it fails on the example.
    """
    problem: Exception | None = None
    found: Rehearsal | None = None
    for keep_hooks in (False, True):
        # gradients are the copy's own, values the model's
        twin = structural_copy(model, lambda t: t.detach() if isinstance(t, nn.Parameter) else own_buffers(t))
        stripped = not keep_hooks and _strip_hooks(twin)
        if not model.training:
            twin.train()
        try:
            with kept_generators(), silent():
                found, whole = _rehearse(twin, copied(example))
            if whole or not stripped:
                return found
        except Exception as error:
            problem = problem or error
    if found is not None:
        return found
    raise OptionError(
        f"the model must run on the example in training, but it failed: {type(problem).__name__}: {problem}"
    ) from problem


def _strip_hooks(model: nn.Module) -> bool:
    """Take off hooks, which may do anything; return whether there were some."""
    found = False
    for module in model.modules():
        if not isinstance(module, torch.jit.ScriptModule):
            found = found or bool(module._forward_hooks or module._forward_pre_hooks)
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
    return found


def _rehearse(twin: nn.Module, example: Any) -> tuple[Rehearsal, bool]:
    """Return what was seen, and whether the outputs hang on all layers: hooks may be what collects outputs."""
    layers = statistics_modules(twin)
    watch = _Watch()
    with torch.enable_grad(), _noting_hooks() as hooks, watch.layers(layers), watch:
        result = call(twin, example)
    before = {name: _copies(module) for name, module in layers}
    ends = [t for t in tensors_of(result) if t.requires_grad and t.is_floating_point()]
    passed = _passed(ends)
    learned = {id(p) for name, module in layers if watch.calls[name] for p in module.parameters() if p.requires_grad}
    whole = learned <= {id(getattr(node, "variable", None)) for node in passed}
    if ends and (hooks or any(isinstance(node, BackwardCFunction) for node in passed)):
        # functions of Python, or who changes what is saved for the backward pass: the two ways to run modules again in there
        torch.autograd.backward(ends, [torch.randn_like(t) for t in ends])
    twice = tuple(name for name, module in layers if not _equal(before[name], _copies(module)))
    return Rehearsal(twice, watch.dropout, dict(watch.calls), watch.variances), whole


@contextmanager
def _noting_hooks() -> Iterator[list[Any]]:
    """Note who changes what is saved for the backward pass."""
    seen: list[Any] = []
    original = saved_tensors_hooks.__enter__

    def enter(hooks: Any) -> None:
        seen.append(hooks)
        original(hooks)

    saved_tensors_hooks.__enter__ = enter  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        saved_tensors_hooks.__enter__ = original  # type: ignore[method-assign]


def _passed(ends: list[Tensor]) -> set[Any]:
    """Return everything that a gradient passes on its way back from some tensors."""
    seen: set[Any] = set()
    waiting: list[Any] = [t.grad_fn for t in ends]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    return seen


def _copies(module: nn.Module) -> list[Tensor]:
    return [b.clone() for name, b in module._buffers.items() if b is not None and name.startswith(("running_", "num_"))]


def _equal(old: list[Tensor], new: list[Tensor]) -> bool:
    # NaN stays NaN
    return all(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in zip(old, new, strict=True))


class _Watch(TorchFunctionMode):
    """Follows what dropout has touched from function to function, up to the layers that it reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.touched: Any = WeakTensorKeyDictionary()
        self.dropout: dict[str, tuple[float, bool]] = {}
        self.calls: Counter[str] = Counter()
        self.variances: dict[str, Any] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        rate = _rate(func, args, kwargs)
        found = [self.touched[t] for t in _tensors((args, kwargs)) if t in self.touched]
        mark = (rate, True) if rate else _worst(found, direct=getattr(func, "__name__", "") in _MOVES)
        for tensor in _tensors(result):
            if mark is None or func in _NORMALIZES:
                self.touched.pop(tensor, None)
            else:
                self.touched[tensor] = mark
        return result

    @contextmanager
    def layers(self, layers: list[tuple[str, nn.Module]]) -> Iterator[None]:
        """Note what reaches each layer, and that nothing of it goes on."""

        def before(name: str, args: Any, kwargs: Any) -> None:
            self.calls[name] += 1
            found = [self.touched[t] for t in _tensors((args, kwargs)) if t in self.touched]
            if found and name not in self.dropout:
                self.dropout[name] = found[0]
                x = next((t for t in _tensors((args, kwargs)) if t.ndim > 1), None)
                if x is not None:
                    self.variances[name] = moments_of(x).variance

        def after(result: Any) -> None:
            for tensor in _tensors(result):
                self.touched.pop(tensor, None)

        hooks: list[Any] = []
        try:
            for name, module in layers:
                hooks += [
                    module.register_forward_pre_hook(
                        lambda _, args, kwargs, name=name: before(name, args, kwargs), with_kwargs=True
                    ),
                    module.register_forward_hook(lambda _, args, result: after(result)),
                ]
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def _worst(found: list[tuple[float, bool]], *, direct: bool) -> tuple[float, bool] | None:
    if not found:
        return None
    rate, straight = max(found)
    return rate, straight and direct


def _rate(func: Any, args: Any, kwargs: Any) -> float:
    """Return the share of values that a function drops; 0 for any other function, and where it is switched off."""
    if func not in _DROPOUT:
        return 0.0
    rate = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
    switch = next((kwargs[name] for name in _SWITCHES if name in kwargs), args[2] if len(args) > 2 else True)
    return float(rate) if switch else 0.0
