"""What is known of the model that is checked, and of what was given with it."""

from collections.abc import Iterator
from functools import cached_property
from itertools import chain
from typing import Any

from batchnorm.check.pieces import MissingError, piece
from batchnorm.errors import BatchNormError, DataError, OptionError
from batchnorm.graph import Graph, Node, Norm, Normalize
from batchnorm.models import framework_of, processes
from batchnorm.observe import Observation, Observed, observe
from batchnorm.protocol import Model
from batchnorm.source import Source
from batchnorm.states import BatchSizes, NormState, Optimization, Rehearsal

__all__ = ["MissingError", "Subject"]


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
        trains: whether the model is to be trained.
        infers: whether the model is to be used as it is.
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
        self.found: dict[str, Any] = {}
        self.data, self.optimizer, self.loader, self.options = data, optimizer, loader, options
        self._given = example
        given = optimizer is not None or loader is not None
        self.trains = bool(view.training) or given if training is None else training
        self.infers = not self.trains if training is not None else not (self.trains or data is not None)

    def lacks(self, what: str, *, failed: bool = False) -> bool:
        """Whether something was not given, by its name in words; ``failed`` where it was tried without."""
        given = {"data": self.data, "the optimizer": self.optimizer, "the loader": self.loader}
        if what in given:
            return given[what] is None
        # most models know the shapes of their inputs; of modules of torch it can't be asked
        return failed and self._given is None and self.data is None and self.framework == "torch"

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

    def momentum(self, decay: float) -> float:
        """Return the weight of the past in the framework's own word: torch's momentum is the weight of the new batch."""
        return 1 - decay if self.framework == "torch" else decay

    @cached_property
    def processes(self) -> int:
        """How many processes the model is trained in."""
        return processes()

    # -- on an example -------------------------------------------------------------------------------------------------

    @piece("an example")
    def example(self) -> Any:
        """The example that was given, or the first batch; ``None`` where the model knows its inputs."""
        if self._given is None and self.data is not None:
            return self.view.example_of(self._first_batch)
        return self._given

    @piece("an example")
    def graph(self) -> Graph:
        """The picture of the model on the example."""
        return self.view.graph(self.example)

    @piece("an example", told=False)
    def rehearsal(self) -> Rehearsal:
        """What a step of training on the example has shown."""
        # an example that fails is told once
        assert self.graph is not None  # noqa: S101
        return self.view.rehearse(self.example)

    def calls(self) -> Iterator[tuple[Norm, list[Node]]]:
        """Yield the normalizations of the picture with their calls."""
        yield from self.graph.norms().items()

    def state_of(self, norm: Norm) -> NormState | None:
        """Return the layer that a normalization of the picture is; ``None`` where it is not one that is stored."""
        return self.by_name.get(norm.name) or self.by_name.get(norm.holder)

    def name_of(self, norm: Norm) -> str:
        """Return the name of the layer that a normalization of the picture is."""
        state = self.state_of(norm)
        return norm.name if state is None else state.name

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

    @piece("data")
    def observation(self) -> Observation:
        """What the data has shown, each layer alone: those before it normalize as in training."""
        try:
            return observe(self.view.model, self._batches, **self.options)
        except OptionError as error:
            if self.states:
                raise
            raise MissingError("needs a model with batch normalization") from error

    def observed(self, name: str) -> Observed | None:
        """What the data has shown of a layer; ``None`` without data, or where nothing has reached it."""
        try:
            return next((one for one in self.observation if one.layer == name), None)
        except MissingError:
            return None

    @cached_property
    def evaluation(self) -> Observation | None:
        """What the data shows where every layer normalizes by what it stores; ``None`` where it can't be read again."""
        if hasattr(self._batches, "__next__"):
            return None
        try:
            return observe(self.view.model, self._batches, **self.options, use="running")
        except BatchNormError:
            return None

    @property
    def seen(self) -> Observation | None:
        """The observation, if a rule has asked for it and it could be made."""
        found = self.found.get("observation")
        return found if isinstance(found, Observation) else None

    @cached_property
    def _batches(self) -> Any:
        """The data; what can be read only once keeps its first batch."""
        data = self.view.batches(self.data)
        if not hasattr(data, "__next__"):
            return data
        first = next(data, None)
        self._first = first
        return iter(()) if first is None else chain([first], data)

    @property
    def _first_batch(self) -> Any:
        batches = self._batches
        once = hasattr(batches, "__next__")
        first = self._first if once else next(iter(Source(batches, 1, repeated=False)), None)
        if first is None:
            raise DataError("the data must hold at least one batch, it is empty: is the iterator used up?")
        return first

    # -- how it is trained ---------------------------------------------------------------------------------------------

    @piece("the optimizer")
    def optimization(self) -> Optimization:
        """What the optimizer does to γ and β."""
        return self.view.optimization(self.optimizer)

    @piece("the loader")
    def sizes(self) -> BatchSizes:
        """The sizes of the batches that the model is trained on."""
        return self.view.batch_sizes(self.loader)


def _sizes(node: Node) -> tuple[int, int]:
    """Return the samples and the places of what a call normalizes."""
    assert isinstance(node.operation, Normalize)  # noqa: S101
    shape = node.inputs[0].shape
    places = 1
    for axis, size in enumerate(shape):
        if axis not in (0, node.operation.axis % len(shape)):
            places *= size
    return (shape[0] if shape else 1), places
