"""What is known of the model that is checked: each piece is found out when a rule asks for it, once."""

from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import chain
from typing import Any

from batchnorm.errors import BatchNormError, OptionError
from batchnorm.graph import Graph, Node, Norm, Normalize
from batchnorm.models import framework_of, processes
from batchnorm.observe import Observation, observe
from batchnorm.protocol import Model
from batchnorm.source import Source
from batchnorm.states import BatchSizes, NormState, Optimization, Rehearsal

__all__ = ["MissingError", "Subject"]


class MissingError(Exception):
    """A rule needs something that is not there; says what."""


class Subject:
    """A model and what the user gave with it.

    Args:
        view: of the model.
        example: an input; ``None`` to take it from the data, or from what the model knows of its own inputs.
        data: batches.
        optimizer: that trains the model.
        loader: of the batches that it is trained on.
        training: whether it is to be trained, or used as it is; ``None`` for what its mode and the other arguments say.
        options: of `observe`.

    Attributes:
        problems: what could not be used, a sentence each.
    """

    def __init__(
        self,
        view: Model,
        *,
        example: Any = None,
        data: Any = None,
        optimizer: Any = None,
        loader: Any = None,
        training: bool | None = None,
        **options: Any,
    ) -> None:
        self.view = view
        self.problems: list[str] = []
        self._example, self.data, self.optimizer, self._loader = example, data, optimizer, loader
        self.options = options
        given = optimizer is not None or loader is not None
        self.trains = bool(view.training) or given if training is None else training
        self.infers = not self.trains if training is not None else not (self.trains or data is not None)

    # -- the model itself ----------------------------------------------------------------------------------------------

    @cached_property
    def framework(self) -> str:
        """The name of the framework, as ``"torch"``."""
        return framework_of(self.view.model)

    @cached_property
    def states(self) -> list[NormState]:
        """The batch normalization layers."""
        return self.view.states()

    @cached_property
    def by_name(self) -> dict[str, NormState]:
        """The layers by their names."""
        return {state.name: state for state in self.states}

    def state_of(self, norm: Norm) -> NormState | None:
        """Return the layer that a normalization of the picture is; ``None`` where it is not one that is stored."""
        return self.by_name.get(norm.name) or self.by_name.get(norm.holder)

    def name_of(self, norm: Norm) -> str:
        """Return the name of the layer that a normalization of the picture is."""
        state = self.state_of(norm)
        return norm.name if state is None else state.name

    @cached_property
    def processes(self) -> int:
        """How many processes the model is trained in."""
        return processes()

    # -- on an example -------------------------------------------------------------------------------------------------

    @property
    def graph(self) -> Graph:
        """The picture of the model on an example."""
        return self._graph()

    @property
    def rehearsal(self) -> Rehearsal:
        """What a step of training on the example has shown."""
        return self._rehearsal()

    @cached_property
    def _graph(self) -> Callable[[], Graph]:
        def see() -> Graph:
            example = self.example
            return self.view.graph(example)

        return self._once("an example", see, "example input")

    @cached_property
    def _rehearsal(self) -> Callable[[], Rehearsal]:
        def see() -> Rehearsal:
            self._graph()
            return self.view.rehearse(self.example)

        return self._once("an example", see, "", said=False)

    @property
    def example(self) -> Any:
        """The example that was given, or the first batch."""
        if self._example is None and self.data is not None:
            self._example = self.view.example_of(self._first_batch)
        return self._example

    def calls(self) -> Iterator[tuple[Norm, list[Node]]]:
        """Yield the normalizations of the picture with their calls."""
        yield from self.graph.norms().items()

    def values(self, samples: int | None) -> Iterator[tuple[str, int, int]]:
        """Yield for each layer its name, the places of a sample and the values a channel of a batch.

        Args:
            samples: of a batch; ``None`` for those of the example.
        """
        for norm, nodes in self.calls():
            state = self.state_of(norm)
            sizes = [_sizes(node) for node in nodes]
            places = min(places for _, places in sizes)
            rows = min(rows for rows, _ in sizes) if samples is None else samples
            if state is not None and state.ghost is not None:
                rows = min(rows, state.ghost)
            together = self.processes if state is not None and state.synchronized else 1
            yield self.name_of(norm), places, rows * places * together

    # -- on data -------------------------------------------------------------------------------------------------------

    @property
    def observation(self) -> Observation:
        """What the data has shown, each layer alone: those before it normalize as in training."""
        return self._observation()

    @cached_property
    def _observation(self) -> Callable[[], Observation]:
        def see() -> Observation:
            return observe(self.view.model, self._batches, **self.options)

        return self._once("data", see, "data", missing=self.data is None)

    @cached_property
    def evaluation(self) -> Observation | None:
        """What the data shows where every layer normalizes by what it stores; ``None`` where it can't be read again."""
        if hasattr(self._batches, "__next__"):
            return None
        try:
            return observe(self.view.model, self._batches, **self.options, use="running")
        except BatchNormError:
            return None

    @cached_property
    def _batches(self) -> Any:
        """The data; what can be read only once keeps its first batch."""
        data = self.view.batches(self.data)
        if not hasattr(data, "__next__"):
            return data
        try:
            first = next(data)
        except StopIteration:
            return iter(())
        self._first = first
        return chain([first], data)

    @property
    def _first_batch(self) -> Any:
        batches = self._batches
        if hasattr(batches, "__next__"):
            if not hasattr(self, "_first"):
                raise OptionError("the data must hold at least one batch, it is empty: is the iterator used up?")
            return self._first
        first = next(iter(Source(batches, 1, repeated=False)), None)
        if first is None:
            raise OptionError("the data must hold at least one batch, it is empty: is the iterator used up?")
        return first

    # -- how it is trained ---------------------------------------------------------------------------------------------

    @property
    def optimization(self) -> Optimization:
        """What the optimizer does to γ and β."""
        return self._optimization()

    @cached_property
    def _optimization(self) -> Callable[[], Optimization]:
        def see() -> Optimization:
            return self.view.optimization(self.optimizer)

        return self._once("the optimizer", see, "optimizer", missing=self.optimizer is None)

    @property
    def sizes(self) -> BatchSizes:
        """The sizes of the batches that the model is trained on."""
        return self._sizes()

    @cached_property
    def _sizes(self) -> Callable[[], BatchSizes]:
        def see() -> BatchSizes:
            return self.view.batch_sizes(self._loader)

        return self._once("the loader", see, "loader", missing=self._loader is None)

    @property
    def seen(self) -> Observation | None:
        """The observation, if a rule has asked for it and it could be made."""
        try:
            return self._observation() if "_observation" in vars(self) else None
        except MissingError:
            return None

    @property
    def has_loader(self) -> bool:
        """Whether a loader was given."""
        return self._loader is not None

    @property
    def has_data(self) -> bool:
        """Whether data was given."""
        return self.data is not None

    # -- each piece once -----------------------------------------------------------------------------------------------

    def _once(
        self, needs: str, see: Callable[[], Any], given: str, *, missing: bool = False, said: bool = True
    ) -> Callable[[], Any]:
        """Return what gives a piece, or says why it is not there; a problem with what the user gave is noted."""
        if missing:
            return _raising(f"needs {needs}")
        try:
            found = see()
        except (BatchNormError, MissingError) as error:
            problem = " ".join(str(error).split())
            # the others know the shapes of their inputs
            bare = self._example is None and self.data is None and self.framework == "torch"
            wanted = given == "example input" and bare
            if said and isinstance(error, BatchNormError) and not wanted and problem not in self.problems:
                self.problems.append(problem)
            return _raising(f"needs {needs}" if wanted else problem)
        return lambda: found


def _raising(reason: str) -> Callable[[], Any]:
    def fail() -> Any:
        raise MissingError(reason)

    return fail


def _sizes(node: Node) -> tuple[int, int]:
    """Return the samples and the places of what a call normalizes."""
    assert isinstance(node.operation, Normalize)  # noqa: S101
    shape = node.inputs[0].shape
    places = 1
    for axis, size in enumerate(shape):
        if axis not in (0, node.operation.axis % len(shape)):
            places *= size
    return (shape[0] if shape else 1), places
