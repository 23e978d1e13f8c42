"""Compute in float64 what a model computes from its own parameters alone, such as the scale of a frozen normalization."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from batchnorm.torch.events import Call, Slot

__all__ = ["Constants", "UnknownConstantError"]


class UnknownConstantError(Exception):
    """A tensor is no constant, or one that was written in place."""


class Constants:
    """Constants of a recording, from the real tensors of a model."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.known: dict[Slot, Tensor] = {}

    def array(self, slot: Slot) -> np.ndarray:
        """Return a constant as a flat array in float64."""
        return self.tensor(slot).double().cpu().numpy().reshape(-1)

    def tensor(self, slot: Slot) -> Tensor:
        """Return a constant, floating point values in float64.

        Raises:
            UnknownConstantError: it depends on the input, or can't be computed again.
        """
        if slot not in self.known:
            value = self._compute(slot)
            self.known[slot] = value.double() if value.is_floating_point() else value
        return self.known[slot]

    def _compute(self, slot: Slot) -> Tensor:
        if slot.parameter:
            return self.tensors[slot.parameter].detach()
        if slot.value is not None:
            return slot.value.detach()
        call = slot.source
        if slot.depends or call is None or call.function._schema.is_mutable or len(call.outputs) != 1:
            raise UnknownConstantError(call.name if call is not None else "a tensor from outside")
        args, kwargs = tree_map(self._leaf, (call.args, call.kwargs))
        with torch.no_grad():
            return call.function(*args, **kwargs)  # type: ignore[no-any-return]

    def _leaf(self, leaf: Any) -> Any:
        return self.tensor(leaf) if isinstance(leaf, Slot) else leaf

    def affine(self, x: Slot, y: Slot, axis: int) -> tuple[np.ndarray, np.ndarray]:
        """Return scale and shift, ``(C,)`` in float64, of plain arithmetic that leads from ``x`` to ``y``.

        Raises:
            UnknownConstantError: it is no arithmetic of constants for each channel.
        """
        size = x.shape[axis]
        scale, shift = self._along(x, y)
        shape = [1] * len(x.shape)
        shape[axis] = size
        try:
            return tuple(v.expand(shape).reshape(-1).numpy() for v in (scale, shift))  # type: ignore[return-value]
        except RuntimeError as error:
            raise UnknownConstantError("a scale that is not one for each channel") from error

    def _along(self, x: Slot, y: Slot) -> tuple[Tensor, Tensor]:
        one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        if y is x:
            return one, zero
        call = y.source
        if call is None or not y.depends:
            raise UnknownConstantError("another input")
        first, *rest = call.args
        if call.kwargs or not isinstance(first, Slot) or y.dtype != x.dtype:
            raise UnknownConstantError(call.name)
        if call.name == "sub" and len(rest) == 1 and first.depends:
            scale, shift = self._along(x, first)
            return scale, shift - self._operand(rest[0])
        if call.name in ("add", "add_", "mul", "mul_", "div", "div_") and len(rest) == 1:
            return self._arithmetic(call, x, first, rest[0])
        raise UnknownConstantError(call.name)

    def _arithmetic(self, call: Call, x: Slot, first: Slot, second: Any) -> tuple[Tensor, Tensor]:
        if not first.depends and call.name.strip("_") != "div":
            first, second = second, first
        scale, shift = self._along(x, first)
        constant = self._operand(second)
        if call.name.startswith("add"):
            return scale, shift + constant
        if call.name.startswith("mul"):
            return scale * constant, shift * constant
        return scale / constant, shift / constant

    def _operand(self, operand: Any) -> Tensor:
        return self.tensor(operand).cpu() if isinstance(operand, Slot) else torch.tensor(operand, dtype=torch.float64)
