"""A ``torch.export`` program, seen through the `Model` protocol: as the module it is made of, exported again at the end."""

import inspect
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_map

from batchnorm.errors import OptionError
from batchnorm.graph import Graph
from batchnorm.protocol import Changes, Layer, Measure, Pair, Statistics
from batchnorm.states import BatchSizes, Mend, NormState, Optimization, Rate, Rehearsal
from batchnorm.torch.evaluation import Inputs
from batchnorm.torch.model import TorchModel

__all__ = ["ExportedModel"]

_NOT_TRAINED = "an exported program is not trained: give the model that it was made of"


class ExportedModel:
    """The `Model` protocol for ``torch.export.ExportedProgram``."""

    def __init__(self, program: ExportedProgram) -> None:
        self.model = program
        self._view = TorchModel(_module_of(program))

    def layers(self, example: Any | None) -> list[Layer]:
        """List the modules that hold parameters."""
        return self._view.layers(None)

    def graph(self, example: Any | None) -> Graph:
        """Return the picture of the program, on its own example inputs where none is given."""
        return self._view.graph(self.inputs(example, None))

    def changed(self, changes: Changes) -> "ExportedModel":
        """Return the program with all changes made, with the same dynamic sizes."""
        module = self._view.changed(changes).model
        args, kwargs = self._example()
        shapes = _dynamic_shapes(self.model, args, kwargs)
        try:
            program = torch.export.export(module, args, kwargs, dynamic_shapes=shapes)
        except Exception as error:
            raise OptionError(
                f"the folded program must be one that torch.export can export, but it failed: {error}"
            ) from error
        return ExportedModel(program)

    def change(self, changes: Changes) -> None:
        """Refuse: a program can't be changed in place.

        Raises:
            OptionError: always.
        """
        raise OptionError("an ExportedProgram can't be changed in place: use the model of the result")

    def example(self, shapes: list[tuple[str, tuple[int, ...]]]) -> Any | None:
        """Return random inputs of these names (empty: by position) and shapes; ``None`` for none."""
        return self._view.example(shapes)

    def inputs(self, example: Any | None, seed: int | None) -> Any:
        """Return the example, or the program's own example inputs, or random inputs like them."""
        if example is None:
            example = Inputs(*self._example())
        return self._view.inputs(example, seed)

    def outputs(self, inputs: Any) -> list[np.ndarray]:
        """Run the program and return all tensors of the output."""
        return self._view.outputs(inputs)

    def cast(self, precision: str) -> TorchModel | None:
        """Return the module of the program in another dtype."""
        return self._view.cast(precision)

    def statistics(self) -> list[Statistics]:
        """List the running statistics of the program."""
        return self._view.statistics()

    def batches(self, data: Any) -> Any:
        """Return a loader for a ``Dataset``, which yields single samples; anything else as it is."""
        return self._view.batches(data)

    def measuring(
        self, statistics: list[Statistics], forward: Any | None, device: Any, *, watch: bool = False
    ) -> AbstractContextManager[Measure]:
        """Run the program and measure the inputs of its layers."""
        return self._view.measuring(statistics, forward, device, watch=watch)

    def write(self, statistics: Mapping[Statistics, Pair], batches: int) -> None:
        """Store new statistics in the program, all or none."""
        self._view.write(statistics, batches)

    def rates(self, optimizer: Any, layers: Sequence[str]) -> list[Rate]:
        """Refuse: a program is not trained.

        Raises:
            OptionError: always.
        """
        raise OptionError("an exported program is not trained: leave optimizer out, or give the model it was made of")

    @property
    def training(self) -> bool | None:
        """A program only infers."""
        return False

    @property
    def learns(self) -> bool:
        """Nothing of a program is trained."""
        return False

    def states(self) -> list[NormState]:
        """List what keeps a running mean and variance in the program."""
        return self._view.states()

    def example_of(self, batch: Any) -> Any:
        """Return the arguments that a batch calls the program with."""
        return self._view.example_of(batch)

    def rehearse(self, example: Any) -> Rehearsal:
        """Refuse: a program is not trained."""
        raise OptionError(_NOT_TRAINED)

    def batch_sizes(self, loader: Any) -> BatchSizes:
        """Refuse: a program is not trained."""
        raise OptionError(_NOT_TRAINED)

    def optimization(self, optimizer: Any) -> Optimization:
        """Refuse: a program is not trained."""
        raise OptionError(_NOT_TRAINED)

    def mend(self, mends: Mapping[str, Mend]) -> None:
        """Refuse: the structure of a program can't be changed in place."""
        raise OptionError("an ExportedProgram can't be changed in place: mend the model, and export it again")

    def spare(self, optimizer: Any) -> int:
        """Refuse: a program is not trained."""
        raise OptionError(_NOT_TRAINED)

    @property
    def precision(self) -> str:
        """The dtype of the first floating parameter."""
        return self._view.precision

    def _example(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self.model.example_inputs is None:
            raise OptionError("an example must be given, the program was saved without its example inputs")
        args, kwargs = self.model.example_inputs
        return tuple(args), dict(kwargs)


def _module_of(program: ExportedProgram) -> fx.GraphModule:
    module: Any = program.module(check_guards=False)
    # a program has no modes, and its module refuses to be asked for one
    for name in ("train", "eval"):
        vars(module).pop(name, None)
    return module.eval()  # type: ignore[no-any-return]


def _dynamic_shapes(program: ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return which sizes of the inputs are dynamic in a program, as ``torch.export.export`` wants to be told."""
    users = program.graph_signature.user_inputs
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    sizes = iter([_sizes(values.get(name), program.range_constraints) for name in users])
    positional, named = tree_map(lambda _: next(sizes), (args, kwargs))
    return {**dict(zip(_names(program), positional, strict=False)), **named} if named else positional


def _names(program: ExportedProgram) -> list[str]:
    """Return the names of the positional arguments of the module that was exported."""
    module: Any = program.module(check_guards=False)
    return list(inspect.signature(module.forward).parameters)


def _sizes(value: Any, ranges: Any) -> Any:
    dynamic = {}
    for axis, size in enumerate(getattr(value, "shape", ())):
        if not isinstance(size, int):
            bounds = ranges.get(size.node.expr)
            ends = {} if bounds is None else {"min": _finite(bounds.lower), "max": _finite(bounds.upper)}
            dynamic[axis] = Dim.DYNAMIC(**ends)
    return dynamic or None


def _finite(bound: Any) -> int | None:
    try:
        number = int(bound)
    except (OverflowError, TypeError, AttributeError):
        return None
    return number if abs(number) < 2**62 else None
