"""Draw the neutral picture of a torch model from a recording of its run."""

from typing import Any

from torch import nn

from batchnorm.graph import (
    Activation,
    Graph,
    Identity,
    Linear,
    Norm,
    Normalize,
    Operation,
    Other,
    Pool,
    Reshape,
    Value,
    Weights,
)
from batchnorm.torch.events import Call, Recording, Slot
from batchnorm.torch.linears import Linears
from batchnorm.torch.norms import Norms
from batchnorm.torch.preparing import is_stock
from batchnorm.torch.scene import VIEWS, Scene, behind_views
from batchnorm.torch.vocabulary import read

__all__ = ["draw"]


def draw(model: nn.Module, recording: Recording) -> Graph:
    """Return the picture of what was recorded; arrays are read from ``model``, whose twin was watched."""
    return _Artist(Scene(model, recording)).draw()


class _Artist:
    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.linears = Linears(scene)
        self.norms = Norms(scene)
        self.values: dict[Slot, Value] = {}
        self.visits: dict[int, int] = {}
        self.graph = Graph(borders=True)
        self.graph.training = scene.model.training

    def draw(self) -> Graph:
        whole: set[int] = set()
        for call in self.scene.recording.calls:
            if call.visit in whole or not any(slot.depends for slot in call.reads):
                continue
            if self._draw_visit(call):
                whole.add(call.visit)
            else:
                self._draw_call(call)
        self._lock_what_is_read_otherwise()
        self._pin_what_is_conditional()
        self.graph.uncalled = tuple(self.norms.uncalled())
        return self.graph

    def _draw_visit(self, call: Call) -> bool:
        """Draw the whole visit of a module as one node, where it is known as such."""
        found: tuple[Linear | Normalize | Identity, list[Slot]] | None = None
        if call.visit in self.norms.frozen:
            found = self.norms.read_frozen(call.visit)
        elif self.norms.is_training_layer(call):
            found = self.norms.read_training_layer(call.visit)
        elif type(self.scene.modules.get(call.module)) is nn.Linear and call.node is None:
            found = self.linears.dense(call.visit)
        elif self._is_dropout(call):
            found = self._dropout(call)
        if found is None:
            return False
        operation, sources = found
        outputs = self.scene.recording.visits[call.visit].outputs
        if isinstance(operation, Normalize) and self.norms.has_activation(call.module):
            middle = Slot(sources[0].shape, sources[0].dtype, depends=True)
            self._add(operation, sources, [middle], self._name(call, operation), call.visit)
            self._add(Activation(), [middle], outputs, self._name(call, operation), call.visit)
            return True
        self._add(operation, sources, outputs, self._name(call, operation), call.visit)
        return True

    def _is_dropout(self, call: Call) -> bool:
        """Whether a call is inside of a dropout layer in training, which is several operations."""
        module, outputs = self.scene.modules.get(call.module), self.scene.recording.visits[call.visit].outputs
        return (
            self.graph.training
            and isinstance(module, nn.modules.dropout._DropoutNd)
            and is_stock(module)
            and len(outputs) == 1
        )

    def _dropout(self, call: Call) -> tuple[Identity, list[Slot]]:
        layer: Any = self.scene.modules[call.module]
        return Identity(rate=layer.p), self.scene.recording.visits[call.visit].inputs[:1]

    def _pin_what_is_conditional(self) -> None:
        """Pin values between calls that may not follow each other for other inputs."""
        if not any(visit.branch for visit in self.scene.recording.visits):
            return
        for value in self.values.values():
            for reader in value.consumers if value.producer is not None else ():
                value.pin(
                    self.scene.recording.why_conditional(self.visits[id(value.producer)], self.visits[id(reader)])
                )

    def _lock_what_is_read_otherwise(self) -> None:
        """Lock weights that something else than their linear layer reads."""
        by_name: dict[str, Weights | Norm] = dict(self.norms.of_tensors)
        by_name |= {name: weights for weights in self.linears.weights.values() for name in weights.key.names()}
        for call in self.scene.recording.calls:
            for slot in [] if call.name in VIEWS else call.reads:
                name = behind_views(slot)[0].parameter
                if name in by_name and (id(call), name) not in self.scene.reads and not by_name[name].locked:
                    by_name[name].locked = f"{call.name} in {call.module or 'the model'} reads them too"

    # -- one call --------------------------------------------------------------------------------------------------

    def _draw_call(self, call: Call) -> None:
        found = self.linears.read(call) or self.norms.read(call) or read(call)
        if found is None:
            found = Other(call.name), [slot for slot in call.reads if slot.depends]
        operation, sources = found
        if isinstance(operation, Pool) and len(call.outputs[0].shape) < len(sources[0].shape):
            self._draw_pool_and_squeeze(operation, sources[0], call)
            return
        writes = call.function._schema.is_mutable
        self._add(operation, sources, call.outputs, self._name(call, operation), call.visit, in_place=writes)

    def _add(
        self,
        operation: Operation,
        sources: list[Slot],
        outputs: list[Slot],
        name: str,
        visit: int,
        *,
        in_place: bool = False,
    ) -> None:
        inputs = [self._value(slot) for slot in sources]
        # what a kernel returns beside its result (indices, saved statistics) is known to nobody else
        for slot, value in zip(
            outputs, self.graph.add(operation, inputs, [slot.shape for slot in outputs], name), strict=True
        ):
            value.pin(slot.pinned)
            value.overwritten = slot.overwritten
            self.values[slot] = value
        self.graph.nodes[-1].in_place = in_place
        self.visits[id(self.graph.nodes[-1])] = visit

    def _value(self, slot: Slot) -> Value:
        if slot not in self.values:
            self.values[slot] = Value(slot.shape, pinned=slot.pinned, overwritten=slot.overwritten)
        return self.values[slot]

    def _draw_pool_and_squeeze(self, operation: Pool, source: Slot, call: Call) -> None:
        kept = tuple(1 if axis in operation.axes else n for axis, n in enumerate(source.shape))
        before = len(self.graph.nodes)
        (middle,) = self.graph.add(operation, [self._value(source)], [kept], self._name(call, operation))
        (value,) = self.graph.add(Reshape(), [middle], [call.outputs[0].shape], self._name(call, operation))
        value.pin(call.outputs[0].pinned)
        self.values[call.outputs[0]] = value
        self.visits |= {id(node): call.visit for node in self.graph.nodes[before:]}

    def _name(self, call: Call, operation: Operation) -> str:
        if isinstance(operation, Linear):
            return operation.weights.name
        if isinstance(operation, Normalize):
            return operation.norm.name
        module = self.scene.modules.get(call.module)
        if call.module and module is not None and is_stock(module):
            return call.module
        return f"{call.name} in {call.module}" if call.module else call.name
