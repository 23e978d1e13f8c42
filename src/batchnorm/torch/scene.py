"""What the parts of a picture share: a model, the recording of its run, and what is known of its tensors."""

from collections import Counter, defaultdict

from torch import Tensor, nn

from batchnorm.torch.constants import Constants
from batchnorm.torch.events import Call, Recording, Slot

__all__ = ["VIEWS", "Scene", "behind_views", "nodes_of"]

VIEWS = ("t", "transpose", "detach", "alias", "lift_fresh")


class Scene:
    """A model and the recording of its twin's run.

    Attributes:
        modules: by dotted name.
        tensors: parameters and buffers, by dotted name.
        owners: the attributes that are one tensor.
        by_visit: the calls of each visit of a module.
        constants: values that the model computes from its own tensors.
        reads: calls and tensors that they read as what they are: as weights, or as statistics.
    """

    def __init__(self, model: nn.Module, recording: Recording) -> None:
        self.model = model
        self.recording = recording
        self.modules = dict(model.named_modules())
        self.tensors: dict[str, Tensor] = dict((*model.named_parameters(), *model.named_buffers()))
        self.owners = _owners(model)
        self.by_visit: dict[int, list[Call]] = defaultdict(list)
        for call in recording.calls:
            self.by_visit[call.visit].append(call)
        self.constants = Constants(self.tensors)
        self.reads: set[tuple[int, str]] = set()
        self._branches = any(visit.branch for visit in recording.visits)
        self._places = Counter(module for _, module in model.named_modules(remove_duplicate=False))

    def is_ambiguous(self, name: str) -> bool:
        """Whether a module stands in several places of a model that may go another way."""
        return self._branches and name in self.modules and self._places[self.modules[name]] > 1


def _owners(model: nn.Module) -> dict[Tensor, list[str]]:
    """Return for each parameter and buffer the different modules' attributes that are this tensor."""
    owners: dict[Tensor, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        for attribute, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                owners[tensor].append(f"{name}.{attribute}".strip("."))
    return owners


def behind_views(slot: Slot) -> tuple[Slot, bool]:
    """Return the parameter behind views that at most transpose it, and whether they do."""
    flipped = False
    while slot.source is not None and slot.source.name in VIEWS and not slot.depends:
        flipped ^= slot.source.name in ("t", "transpose")
        slot = next(iter(slot.source.reads))
    return slot, flipped


def nodes_of(call: Call) -> list[tuple[str, str]]:
    """Return the node of a graph that a call is, if it is one."""
    return [] if call.node is None else [call.node]
