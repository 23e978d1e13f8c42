"""Watch a torch model run: every operation, what it reads and writes, and the module that was running.

The model runs as it stands, on fake tensors that have shapes and no values: nothing is computed and no memory is used. Where
a program asks for values (detectors do, branches too), it runs on real ones, in a copy; from the first branch on a value of
its input on, everything is pinned, since another input may take another way.
"""

import contextlib
import copy
import traceback
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from batchnorm.errors import OptionError
from batchnorm.torch.evaluation import call
from batchnorm.torch.graphs import watched

__all__ = ["Call", "Recording", "Slot", "record", "tensors_of"]

_READS_A_VALUE = ("_local_scalar_dense", "is_nonzero", "equal", "item", "allclose")


@dataclass(eq=False, slots=True)
class Slot:
    """A tensor at one time: written in place, it is another one.

    Args:
        shape: its sizes.
        dtype: its dtype.
        parameter: dotted name, for a parameter or buffer of the model.
        source: the call that wrote it, ``None`` for parameters, inputs and constants from outside.
        depends: whether it depends on the input.
        pinned: why its value may not change.
        value: a constant from outside.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    parameter: str = ""
    source: "Call | None" = None
    depends: bool = False
    pinned: str = ""
    value: Tensor | None = None


@dataclass(eq=False, slots=True)
class Call:
    """One operation: arguments with a `Slot` in the place of each tensor, the slots it writes, where it happened.

    Args:
        function: the overload, as ``aten.convolution.default``.
        args: positional arguments.
        kwargs: named arguments.
        outputs: what it returned, tensors only.
        module: dotted name of the innermost module that was running.
        visit: which call of that module it was, counted over the whole run.
        node: the ``torch.fx`` node that was running, ``(dotted name of the graph's module, name of the node)``, if it is
            one of the innermost module.
    """

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Slot]
    module: str
    visit: int
    node: tuple[str, str] | None = None

    @property
    def name(self) -> str:
        """The operation without its overload, as ``convolution``."""
        return str(self.function.overloadpacket.__name__)

    def slots(self) -> list[Slot]:
        """Return the tensors it reads."""
        return [leaf for leaf in tree_flatten((self.args, self.kwargs))[0] if isinstance(leaf, Slot)]


@dataclass(slots=True)
class Visit:
    """One call of a module: the tensors it was given and gave."""

    module: str
    inputs: list[Slot]
    outputs: list[Slot] = field(default_factory=list)
    arguments: int = 1


@dataclass(slots=True)
class Recording:
    """All calls of a run, in order; all visits of modules; the branch on a value, if one was seen."""

    calls: list[Call] = field(default_factory=list)
    visits: list[Visit] = field(default_factory=list)
    branch: str = ""


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recording = Recording()
        self.slots: Any = WeakTensorKeyDictionary()
        self.aliases: dict[int, list[Any]] = {}
        self.stack: list[tuple[str, int]] = [("", -1)]
        self.node: tuple[str, str] | None = None
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            self.slots[tensor] = Slot(tuple(tensor.shape), tensor.dtype, parameter=name)

    def slot(self, tensor: Tensor) -> Slot:
        found: Slot | None = self.slots.get(tensor)
        if found is None:
            found = Slot(tuple(tensor.shape), tensor.dtype, value=tensor)
            self._remember(tensor, found)
        return found

    def _remember(self, tensor: Tensor, slot: Slot) -> None:
        self.slots[tensor] = slot
        with contextlib.suppress(NotImplementedError, RuntimeError):
            self.aliases.setdefault(tensor.untyped_storage()._cdata, []).append(weakref.ref(tensor))

    def input(self, tensor: Tensor) -> None:
        self._remember(tensor, Slot(tuple(tensor.shape), tensor.dtype, depends=True))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":
            return func(*args, **kwargs)
        read = tree_map(lambda leaf: self.slot(leaf) if isinstance(leaf, Tensor) else leaf, (args, kwargs))
        result = func(*args, **kwargs)
        module, visit = self.stack[-1]
        node = self.node if self.node is not None and self.node[0] == module else None
        call = Call(func, read[0], read[1], [], module, visit, node)
        depends = any(slot.depends for slot in call.slots())
        if depends and call.name in _READS_A_VALUE:
            self._branch()
        written = self._written(func, args, kwargs)
        tensors = [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor)]
        for tensor in tensors:
            self._write(tensor, call, depends)
        for tensor in written:
            if not any(tensor is other for other in tensors):
                self._write(tensor, call, depends)
            self._spoil_aliases(tensor, call)
        self.recording.calls.append(call)
        return result

    def _write(self, tensor: Tensor, call: Call, depends: bool) -> None:
        slot = Slot(tuple(tensor.shape), tensor.dtype, source=call, depends=depends, pinned=self.recording.branch)
        call.outputs.append(slot)
        self._remember(tensor, slot)

    def _written(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        if not func._schema.is_mutable:
            return []
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        names = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        return [leaf for name in names for leaf in tree_flatten(given.get(name))[0] if isinstance(leaf, Tensor)]

    def _spoil_aliases(self, written: Tensor, call: Call) -> None:
        """Make every other view of what was written a tensor that nothing is known of."""
        key = written.untyped_storage()._cdata
        for reference in self.aliases.get(key, []):
            tensor = reference()
            if tensor is not None and tensor is not written and tensor.untyped_storage()._cdata == key:
                slot = Slot(
                    tuple(tensor.shape),
                    tensor.dtype,
                    source=call,
                    depends=True,
                    pinned="it is a view of what is written in place",
                )
                old = self.slots.get(tensor)
                if old is not None:
                    old.pinned = old.pinned or slot.pinned
                self.slots[tensor] = slot
        self.aliases[key] = [r for r in self.aliases.get(key, []) if r() is not None]

    def _branch(self) -> None:
        place = next(
            (f"{f.filename}:{f.lineno}" for f in reversed(traceback.extract_stack()) if not _is_inside(f.filename)),
            "an unknown place",
        )
        reason = f"the model looks at its values in {place}, and may go another way for another input"
        self.recording.branch = self.recording.branch or reason
        for slot in self.slots.values():
            if slot.depends:
                slot.pinned = slot.pinned or reason

    # -- modules ---------------------------------------------------------------------------------------------------

    def enter(self, name: str, args: Any, kwargs: Any) -> None:
        tensors = [self.slot(leaf) for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        given = len(args) + sum(v is not None for v in kwargs.values())
        self.recording.visits.append(Visit(name, tensors, arguments=given))
        self.stack.append((name, len(self.recording.visits) - 1))

    def leave(self, result: Any) -> None:
        _, visit = self.stack.pop()
        leaves = tree_flatten(result)[0]
        self.recording.visits[visit].outputs = [self.slot(leaf) for leaf in leaves if isinstance(leaf, Tensor)]


def record(model: nn.Module, example: Any) -> Recording:
    """Watch a model run on an example, without touching it.

    Raises:
        OptionError: the model does not run on the example.
    """
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.no_grad():
            with FakeCopyMode(fake):
                twin = copy.deepcopy(model)
            inputs = tree_map(lambda leaf: fake.from_tensor(leaf) if isinstance(leaf, Tensor) else leaf, example)
            return _watch(twin, inputs)
    except Exception:  # noqa: S110 - whatever can't be faked is run
        pass
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices), torch.no_grad():
        try:
            twin = copy.deepcopy(model)
        except Exception as error:
            raise OptionError(f"the model must be one that copy.deepcopy can copy, but it failed: {error}") from error
        try:
            return _watch(twin, copy.deepcopy(example))
        except Exception as error:
            raise OptionError(
                f"the model must run on the example, but it failed: {type(error).__name__}: {error}"
            ) from error


def _watch(model: nn.Module, inputs: Any) -> Recording:
    recorder = _Recorder(model)
    hooked = _strip_hooks(model)
    for tensor in tensors_of(inputs):
        recorder.input(tensor)
    handles = list(_follow(model, recorder))
    try:
        with recorder:
            result = call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    for tensor in tensors_of(result):
        _pin(recorder.slot(tensor), "it is an output of the model")
    _pin_what_is_kept(model, recorder)
    for visit in recorder.recording.visits:
        if visit.module in hooked:
            for slot in (*visit.inputs, *visit.outputs):
                _pin(slot, f"a hook of {visit.module or 'the model'} sees it")
    return recorder.recording


def _follow(model: nn.Module, recorder: _Recorder) -> Iterator[Any]:
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        if isinstance(module, fx.GraphModule):
            module.forward = watched(module, name, recorder)
        yield module.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: recorder.enter(name, args, kwargs), with_kwargs=True
        )
        yield module.register_forward_hook(lambda _, args, result: recorder.leave(result))


def _strip_hooks(model: nn.Module) -> set[str]:
    """Remove the user's hooks from a copy, and return the names of the modules that had some."""
    hooked = set()
    for name, module in model.named_modules():
        if not isinstance(module, torch.jit.ScriptModule) and (module._forward_hooks or module._forward_pre_hooks):
            hooked.add(name)
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
    return hooked


def _pin_what_is_kept(model: nn.Module, recorder: _Recorder) -> None:
    """Pin tensors that the run left in attributes of modules: somebody may read them."""
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if not key.startswith("_") or isinstance(value, Tensor):
                for tensor in tensors_of(value):
                    slot = recorder.slots.get(tensor)
                    if slot is not None and slot.depends:
                        _pin(slot, f"it is kept as {name}.{key}".replace(" .", " "))


def _pin(slot: Slot, reason: str) -> None:
    slot.pinned = slot.pinned or reason


def tensors_of(tree: Any) -> list[Tensor]:
    """Return the tensors of nested containers, dataclasses and plain objects among them."""
    found = []
    for leaf in tree_flatten(tree)[0]:
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, nn.Module | type) and not callable(leaf):
            found += [v for value in vars(leaf).values() for v in tree_flatten(value)[0] if isinstance(v, Tensor)]
    return found


def _is_inside(filename: str) -> bool:
    return any(part in filename for part in ("/torch/", "/batchnorm/torch/", "/batchnorm/fold/", "/contextlib.py"))
