"""Watch a torch model run: every operation, what it reads and writes, and the module that was running.

The model runs as it stands, in a copy, so that Python control flow and other people's functions are seen for what they do.
What a program does that looks at values of its input (detectors do, branches too) may depend on them, but for the modules that
looked at none.
"""

import contextlib
import gc
import traceback
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F  # noqa: N812 - as everybody calls it
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.weak import WeakTensorKeyDictionary

from batchnorm.errors import OptionError
from batchnorm.torch.evaluation import call, copied, kept_generators, silent, tensors_of
from batchnorm.torch.events import Call, Recording, Slot, Visit
from batchnorm.torch.graphs import own_buffers, structural_copy, watched
from batchnorm.torch.layers import BatchNorm

__all__ = ["record"]

_READS_A_VALUE = ("_local_scalar_dense", "is_nonzero", "equal", "item", "allclose")
_LEAVES_TORCH = (Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__)


class _Doors(TorchFunctionMode):
    """Notice tensors that leave for Python or NumPy."""

    def __init__(self, recorder: "_Recorder") -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _LEAVES_TORCH:
            self.recorder.look([self.recorder.slot(args[0])])
        return func(*args, **(kwargs or {}))


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
        reads: list[Slot] = []
        slotted, named = self._slotted(args, reads), {key: self._slotted(v, reads) for key, v in kwargs.items()}
        if func.overloadpacket.__name__ in _READS_A_VALUE or torch.Tag.dynamic_output_shape in func.tags:
            self.look(reads)
        result = func(*args, **kwargs)
        module, visit = self.stack[-1]
        node = self.node if self.node is not None and self.node[0] == module else None
        call = Call(func, slotted, named, reads, [], module, visit, node)
        depends = any(slot.depends for slot in reads)
        written = self._written(func, args, kwargs)
        tensors = [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor)]
        before = {id(tensor): self.slots.get(tensor) for tensor in written}
        for tensor in tensors:
            self._write(tensor, call, depends)
        for tensor in written:
            for slot in reads:
                slot.overwritten |= slot is before.get(id(tensor))
            if not any(tensor is other for other in tensors):
                self._write(tensor, call, depends)
            self._spoil_aliases(tensor, call)
        self.recording.calls.append(call)
        return result

    def _slotted(self, value: Any, reads: list[Slot]) -> Any:
        """Return an argument with slots in the place of its tensors, and note them in ``reads``."""
        if isinstance(value, Tensor):
            reads.append(self.slot(value))
            return reads[-1]
        if isinstance(value, list | tuple):
            return type(value)([self._slotted(item, reads) for item in value])
        return value

    def _write(self, tensor: Tensor, call: Call, depends: bool) -> None:
        slot = Slot(tuple(tensor.shape), tensor.dtype, source=call, depends=depends)
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
                    old.overwritten = True
                self.slots[tensor] = slot
        self.aliases[key] = [r for r in self.aliases.get(key, []) if r() is not None]

    def look(self, reads: list[Slot]) -> None:
        """Note that the program looks at values that depend on the input, and may go another way for another input."""
        if not any(slot.depends for slot in reads):
            return
        place = next(
            (f"{f.filename}:{f.lineno}" for f in reversed(traceback.extract_stack()) if not _is_inside(f.filename)),
            "an unknown place",
        )
        for _, visit in self.stack:
            if visit >= 0:
                open_visit = self.recording.visits[visit]
                open_visit.branch = (
                    open_visit.branch
                    or f"the model looks at values in {place}, and may go another way for another input"
                )

    # -- modules ---------------------------------------------------------------------------------------------------

    def enter(self, name: str, args: Any, kwargs: Any) -> None:
        leaves = [leaf for leaf in tree_flatten((args, kwargs))[0] if leaf is not None]
        tensors = [self.slot(leaf) for leaf in leaves if isinstance(leaf, Tensor)]
        given = sum(v is not None for v in (*args, *kwargs.values()))
        visit = Visit(name, self.stack[-1][1], tensors, arguments=given, only_tensors=len(tensors) == len(leaves))
        self.recording.visits.append(visit)
        self.stack.append((name, len(self.recording.visits) - 1))

    def leave(self, result: Any) -> None:
        _, visit = self.stack.pop()
        leaves = tree_flatten(result)[0]
        self.recording.visits[visit].outputs = [self.slot(leaf) for leaf in leaves if isinstance(leaf, Tensor)]


def record(model: nn.Module, example: Any) -> Recording:
    """Watch a copy of a model run on a copy of an example.

    Raises:
        OptionError: the model does not run on the example.
    """
    # hooks belong to the user, and are not called; but for models that work by hooks of their own
    problem: Exception | None = None
    for keep_hooks in (False, True):
        twin = structural_copy(model, own_buffers)
        with kept_generators(), torch.no_grad(), silent():
            try:
                return _watch(twin, copied(example), keep_hooks=keep_hooks)
            except Exception as error:
                problem = error
    raise OptionError(
        f"the model must run on the example, but it failed: {type(problem).__name__}: {problem}"
    ) from problem


def _watch(model: nn.Module, inputs: Any, *, keep_hooks: bool) -> Recording:
    recorder = _Recorder(model)
    hooked = _hooked(model, strip=not keep_hooks)
    for tensor in tensors_of(inputs):
        recorder.input(tensor)
    handles = list(_follow(model, recorder))
    try:
        with recorder, _Doors(recorder), _noting_switches() as switched, _single_values(model):
            result = call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    _spread_branches(recorder.recording, {name for name, module in model.named_modules() if module in switched})
    for tensor in tensors_of(result):
        _pin(recorder.slot(tensor), "it is an output of the model")
    _pin_what_is_kept(model, recorder)
    for visit in recorder.recording.visits:
        if visit.module in hooked:
            for slot in (*visit.inputs, *visit.outputs):
                _pin(slot, f"a hook of {visit.module or 'the model'} sees it")
    _pin_what_is_alive(recorder)
    recorder.recording.outputs = None if hooked and not keep_hooks else tensors_of(result)
    return recorder.recording


@contextlib.contextmanager
def _noting_switches() -> Iterator[set[nn.Module]]:
    """Note the modules that a program sets attributes of while it runs: so it may switch what they do."""
    switched: set[nn.Module] = set()
    original = nn.Module.__setattr__

    def noting(module: nn.Module, name: str, value: Any) -> None:
        switched.add(module)
        original(module, name, value)

    nn.Module.__setattr__ = noting  # type: ignore[method-assign, assignment]
    try:
        yield switched
    finally:
        nn.Module.__setattr__ = original  # type: ignore[method-assign]


@contextlib.contextmanager
def _single_values(model: nn.Module) -> Iterator[None]:
    """Let a copy in training normalize single values, which torch and layers of ours refuse: what follows is seen too."""
    for module in model.modules():
        if isinstance(module, BatchNorm) and module.options.on_single == "error":
            module.configure({"on_single": "skip"})
    functions: Any = F
    original = functions._verify_batch_size
    functions._verify_batch_size = lambda size: None
    try:
        yield
    finally:
        functions._verify_batch_size = original


def _spread_branches(recording: Recording, switched: set[str]) -> None:
    """Let what a branch may have switched be conditional as well."""
    branch = next((visit.branch for visit in recording.visits if visit.branch), "")
    for visit in recording.visits:
        if visit.module in switched:
            visit.branch = visit.branch or branch


def _pin_what_is_alive(recorder: _Recorder) -> None:
    """Pin what the program still holds after its run, wherever it does."""
    alive = [slot for slot in recorder.slots.values() if slot.source is not None and slot.depends and not slot.pinned]
    if alive:
        # what waits for the collector is held by nobody
        del alive
        gc.collect()
    for slot in recorder.slots.values():
        if slot.depends and slot.source is not None:
            _pin(slot, "the program keeps it after its run")


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


def _hooked(model: nn.Module, *, strip: bool) -> set[str]:
    """Return the names of the modules of a copy that have hooks, and remove these if asked."""
    hooked = set()
    for name, module in model.named_modules():
        if not isinstance(module, torch.jit.ScriptModule) and (module._forward_hooks or module._forward_pre_hooks):
            hooked.add(name)
            if strip:
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


def _is_inside(filename: str) -> bool:
    return any(part in filename for part in ("/torch/", "/batchnorm/torch/", "/batchnorm/fold/", "/contextlib.py"))
