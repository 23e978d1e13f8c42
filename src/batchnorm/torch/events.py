"""What a recording of a torch model holds: tensors at one time, operations, and visits of modules."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["Call", "Recording", "Slot", "Visit"]


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
        overwritten: whether something is written over it later.
        value: a constant from outside.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    parameter: str = ""
    source: "Call | None" = field(default=None, repr=False)
    depends: bool = False
    pinned: str = ""
    overwritten: bool = False
    value: Tensor | None = field(default=None, repr=False)


@dataclass(eq=False, slots=True)
class Call:
    """One operation: arguments with a `Slot` in the place of each tensor, the slots it writes, where it happened.

    Args:
        function: the overload, as ``aten.convolution.default``.
        args: positional arguments.
        kwargs: named arguments.
        reads: the tensors among them.
        outputs: what it returned, tensors only.
        module: dotted name of the innermost module that was running.
        visit: which call of that module it was, counted over the whole run.
        node: the ``torch.fx`` node that was running, ``(dotted name of the graph's module, name of the node)``, if it is
            one of the innermost module.
    """

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reads: list[Slot]
    outputs: list[Slot]
    module: str
    visit: int
    node: tuple[str, str] | None = None

    @property
    def name(self) -> str:
        """The operation without its overload, as ``convolution``."""
        return str(self.function.overloadpacket.__name__)


@dataclass(slots=True)
class Visit:
    """One call of a module.

    Args:
        module: its dotted name.
        parent: the visit that made it, -1 for the model itself.
        inputs: the tensors it was given.
        outputs: the tensors it gave.
        arguments: how many arguments it was given.
        only_tensors: whether it was given nothing but tensors.
        branch: where a value of its input, or a number of results, was looked at while it ran.
    """

    module: str
    parent: int
    inputs: list[Slot]
    outputs: list[Slot] = field(default_factory=list)
    arguments: int = 1
    only_tensors: bool = True
    branch: str = ""


@dataclass(slots=True)
class Recording:
    """A run.

    Args:
        calls: all operations, in order.
        visits: all calls of modules.
        outputs: what the model returned; ``None`` where hooks were taken away, which might have changed it.
    """

    calls: list[Call] = field(default_factory=list)
    visits: list[Visit] = field(default_factory=list)
    outputs: list[Tensor] | None = None

    def why_conditional(self, first: int, second: int) -> str:
        """Return why what joins two visits may not happen for other inputs; empty where it always does."""
        common = self._common(first, second)
        if common < 0 or self.visits[common].branch:
            return self.visits[common].branch if common >= 0 else ""
        outer = common
        while outer >= 0 and not self.visits[outer].branch:
            outer = self.visits[outer].parent
        # a branch outside can choose what is handed in
        return "" if outer < 0 or self.visits[common].only_tensors else self.visits[outer].branch

    def _common(self, first: int, second: int) -> int:
        line = set()
        while first >= 0:
            line.add(first)
            first = self.visits[first].parent
        while second >= 0 and second not in line:
            second = self.visits[second].parent
        return second
