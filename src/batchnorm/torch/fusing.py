"""`convert`, and what it fuses: the layers whose output goes into an addition or an activation and nowhere else.

The model is watched while a copy of it runs in training: outputs of layers note what is asked of them, and by whom they are
held at the end.
"""

import contextlib
import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map

from batchnorm.errors import OptionError
from batchnorm.torch import surgery
from batchnorm.torch.deferred import ASKED, Step, fits, hollow, step_of, suits
from batchnorm.torch.evaluation import call, copied, kept_generators, silent
from batchnorm.torch.graphs import own_buffers, structural_copy
from batchnorm.torch.layers import BatchNorm

__all__ = ["convert"]

Chain = tuple[str, ...]
_PLAIN = (Tensor, FakeTensor)


def convert(model: nn.Module, *, fuse: bool = False, example: Any = None, **options: Any) -> nn.Module:
    """Make every ``torch.nn.BatchNorm`` layer of a model one of ours, in place; with ``fuse``, one with what follows it.

    The modules stay the same objects: parents that share one, hooks, devices, dtypes, training flags, parameters and the
    optimizers that hold them are untouched, and the ``state_dict`` keeps its keys. Layers that are ours already get the
    options too. A subclass with a ``forward`` of its own is left as it is, with a warning.

    A fused layer computes ::

        y = activation(normalize(x) + residual)

    in one go where a program normalizes, adds and activates one after the other, by modules, functions or methods, in place or
    not. A copy of the model runs once in training, on tensors without values (on the example itself where that fails), to find
    the layers whose output goes into nothing but an addition or an activation. Nothing is replaced: their output waits for
    what follows, and is an ordinary tensor to whatever else asks for it. ``fuse=False`` takes fusion out of a model.

    Args:
        model: any module, also a single layer.
        fuse: compute additions and activations together with the normalization before them.
        example: an input of the model, which ``fuse`` needs: a tensor, a tuple of positional or a dict of named arguments.
        options: given to every layer, as in `BatchNorm1d`.

    Returns:
        The model itself.

    Raises:
        OptionError: an option that a layer can't have, no example, or one that the model does not run on; then nothing was
            changed.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> convert(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), on_single="skip")[1]
        BatchNorm1d(3, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True, on_single='skip')
        >>> convert(nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()), fuse=True, example=torch.randn(4, 3))[0]
        BatchNorm1d(3, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True, fused with relu)
    """
    found = _followers(model, example, options) if fuse else {}
    surgery.convert(model, **options)
    for name, layer in surgery.named_layers(model):
        layer.__dict__.pop("_followers", None)
        if name in found:
            layer._followers = found[name]
    return model


def _followers(model: nn.Module, example: Any, options: dict[str, Any]) -> dict[str, tuple[Chain, ...]]:
    """Return what follows each layer that can be fused, by its dotted name.

    Raises:
        OptionError: there is no example, or the model does not run on it.
    """
    if example is None:
        raise OptionError(
            "fuse=True must see the model run, but got no example: give an input of the model, "
            "convert(model, fuse=True, example=x)"
        )
    problem: Exception | None = None
    # hooks belong to the user, and are not called; but for models that work by hooks of their own
    for keep_hooks in (False, True) if any(map(_hooks_of, model.modules())) else (False,):
        for fake in (True, False):
            try:
                return _watch(_twin(model, options), copied(example), keep_hooks=keep_hooks, fake=fake)
            except Exception as error:
                problem = error
    raise OptionError(
        f"the model must run on the example, but it failed: {type(problem).__name__}: {problem}"
    ) from problem


def _twin(model: nn.Module, options: dict[str, Any]) -> nn.Module:
    """Return a converted copy in training; gradients and statistics are its own, the values of its parameters the model's."""
    twin = structural_copy(model, lambda t: t.detach() if isinstance(t, nn.Parameter) else own_buffers(t))
    with silent():
        surgery.convert(twin, **options)
    return twin.train()


def _watch(twin: nn.Module, example: Any, *, keep_hooks: bool, fake: bool) -> dict[str, tuple[Chain, ...]]:
    seen: dict[str, list[_Uses]] = {}
    for name, layer in surgery.named_layers(twin):
        layer.__dict__.pop("_followers", None)
        if suits(layer):
            layer.forward = _watched(layer, seen.setdefault(name, []))  # type: ignore[method-assign]
        # what follows single values is seen too; other processes run nothing now
        single = "skip" if layer.options.on_single == "error" else layer.options.on_single
        layer.configure({"on_single": single, "process_group": None})
    _show_hooks(twin, strip=not keep_hooks)
    with kept_generators(), silent(), torch.enable_grad(), _noting_functions(), contextlib.ExitStack() as stack:
        if fake:
            example = stack.enter_context(_without_values(example))
        # the outputs of the model are held until all chains are read
        _outputs = call(twin, example)
    if any(uses.is_held() for calls in seen.values() for uses in calls):
        # what waits for the collector is held by nobody
        gc.collect()
    chains = {name: [uses.chain() for uses in calls] for name, calls in seen.items()}
    return {name: tuple(dict.fromkeys(found)) for name, found in chains.items() if found and all(found)}


@contextlib.contextmanager
def _without_values(example: Any) -> Iterator[Any]:
    """Let tensors have no values; what can't be done then is told to nobody else."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, logger.disabled = logger.disabled, True
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            yield tree_map(lambda v: mode.from_tensor(v) if isinstance(v, Tensor) else v, example)
    finally:
        logger.disabled = disabled


def _watched(layer: BatchNorm, calls: list["_Uses"]) -> Callable[..., Tensor]:
    """Return a forward for a layer of the copy, whose outputs note how they are used."""
    original = layer.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x, args, kwargs = _values((x, args, kwargs), noting=True)
        alone = all(v is None for v in (*args, *kwargs.values())) and peek_interpreter_stack() is None
        if not alone or type(x) not in _PLAIN or x.ndim not in layer._ranks:
            return original(x, *args, **kwargs)
        y = original(x) if type(x) is Tensor else _like_output(layer, x)
        if y.stride() != x.stride():
            return y
        calls.append(_Uses())
        return _Watched(y, calls[-1], [x])

    return forward


def _like_output(layer: BatchNorm, x: Tensor) -> Tensor:
    """Return a tensor without values in the place of an output: the layer itself would take most of the time."""
    weight = torch.ones(layer.num_features) if layer.weight is None else layer.weight
    return x * weight.to(x.dtype).view(-1, *[1] * (x.ndim - 2))


def _hooks_of(module: nn.Module) -> list[dict[int, Any]]:
    if isinstance(module, torch.jit.ScriptModule):
        return []
    kinds = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return [hooks for hooks in kinds if hooks]


def _show_hooks(model: nn.Module, *, strip: bool) -> None:
    """Let hooks of modules count as uses of what they see, and take them away if asked."""
    for module in list(model.modules()):
        kinds = [
            getattr(module, f"_{kind}_hooks", {}) for kind in ("forward", "forward_pre", "backward", "backward_pre")
        ]
        if isinstance(module, torch.jit.ScriptModule) or not any(kinds):
            continue
        for hooks in kinds if strip else ():
            hooks.clear()
        module.register_forward_pre_hook(lambda _, *given: _note(given), with_kwargs=True, prepend=True)
        module.register_forward_hook(lambda _, *given: _note(given[1]), prepend=True)


@contextlib.contextmanager
def _noting_functions() -> Iterator[None]:
    """Let functions with a backward of their own count as uses of what they get and return: gradients go through them."""
    original: Any = vars(torch.autograd.Function)["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = _values((args, kwargs), noting=True)
        return _values(original.__func__(cls, *args, **kwargs), noting=True)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.autograd.Function.apply = original  # type: ignore[method-assign]


class _Uses:
    """What was asked of the output of one call, in order, and whether somebody holds it still."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.sum: _Uses | None = None
        self.added: tuple[Tensor, int] | None = None
        self.holder: Callable[[], Any] = lambda: None

    def chain(self) -> Chain:
        """Return the addition and the activation that may be computed with the output: nothing else sees what is between."""
        name, in_place = self.steps[0] if self.steps else ("", False)
        if not name or not self._ends_with(0):
            return ()
        if name != "add":
            return (name,)
        after, place = (self, 1) if in_place else (self.sum or self, 0)
        following = after.steps[place].name if len(after.steps) > place else ""
        if self.added is not None and self.added[0]._version != self.added[1]:
            # a backward through an activation may need what was added
            return ("add",)
        return ("add", following) if following not in ("", "add") and after._ends_with(place) else ("add",)

    def is_held(self) -> bool:
        """Whether somebody holds the output, or its sum with something else, after the run."""
        return self.holder() is not None or (self.sum is not None and self.sum.is_held())

    def _ends_with(self, place: int) -> bool:
        """Whether what comes after a step can't tell that there was something before it."""
        return self.steps[place][1] or (len(self.steps) == place + 1 and self.holder() is None)


class _Watched(Tensor):
    """An output of a layer, or its sum with something else, that notes what it is used for."""

    @staticmethod
    def __new__(cls: type["_Watched"], value: Tensor, *_: Any, **__: Any) -> "_Watched":
        """Make a tensor that stands for ``value``."""
        made: _Watched = hollow(cls, value, derives=value.requires_grad)
        return made

    def __init__(self, value: Tensor, uses: _Uses, read: list[Tensor], *, is_sum: bool = False) -> None:
        self.value, self.uses, self.is_sum = value, uses, is_sum
        self.read = [(tensor, tensor._version) for tensor in read]
        uses.holder = weakref.ref(self)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the use, and do it with the values."""
        kwargs = kwargs or {}
        step = step_of(func, args, kwargs)
        host = None if step is None else _host(step, args)
        args, kwargs = _values((args, kwargs), noting=func not in ASKED, but=host)
        y = func(*args, **kwargs)
        if step is None or host is None:
            return y
        host.uses.steps.append(step)
        if step.name != "add":
            return y
        (other,) = (v for v in args if v is not host.value)
        host.uses.added = (other, other._version)
        read = [*(tensor for tensor, _ in host.read), other]
        if step.in_place:
            host.__init__(y, host.uses, read, is_sum=True)  # type: ignore[misc]
            return host
        host.uses.sum = _Uses()
        return _Watched(y, host.uses.sum, read, is_sum=True)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Note that something has got here past the functions of torch."""
        args, kwargs = _values((args, kwargs or {}), noting=True)
        return func(*args, **kwargs)

    def takes(self, step: Step, others: list[Any]) -> bool:
        """Whether a step can be computed together with the layer."""
        used = any(not step.name for step in self.uses.steps) or (others and self.is_sum)
        if used or any(tensor._version != version for tensor, version in self.read):
            return False
        return all(type(other) in _PLAIN and fits(self.value, other) for other in others)


def _host(step: Step, args: tuple[Any, ...]) -> _Watched | None:
    """Return the output that a step can be computed with."""
    orders = [args] if step.name != "add" or step.in_place else [args, args[::-1]]
    for host, *others in orders:
        if any(other is host for other in others):
            return None
        if isinstance(host, _Watched) and host.takes(step, _values(others, noting=False)):
            return host
    return None


def _note(tree: Any) -> None:
    _values(tree, noting=True)


def _values(tree: Any, *, noting: bool, but: _Watched | None = None) -> Any:
    """Return nested values with plain tensors in the place of watched ones, and note that these are used."""

    def value(leaf: Any) -> Any:
        if not isinstance(leaf, _Watched):
            return leaf
        if noting and leaf is not but:
            leaf.uses.steps.append(Step("", False))
        return leaf.value

    return tree_map(value, tree)
