"""The linear layers of a torch model: dense layers and convolutions, as layers and as functions."""

from collections.abc import Callable

from torch import Tensor

from batchnorm.graph import Layout, Linear, Weights
from batchnorm.torch.events import Call, Slot
from batchnorm.torch.graphs import takes_bias
from batchnorm.torch.keys import Site
from batchnorm.torch.preparing import is_stock
from batchnorm.torch.scene import Scene, behind_views, nodes_of
from batchnorm.torch.vocabulary import arguments

__all__ = ["Linears"]


class Linears:
    """Tells which calls are linear layers, and keeps one `Weights` for each weight."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.weights: dict[str, Weights] = {}

    def read(self, call: Call) -> tuple[Linear, list[Slot]] | None:
        """Return the linear layer that a call is, and what flows through it; ``None`` where it is none."""
        reader: Callable[[Call], tuple[Linear, list[Slot]] | None] | None = {
            "convolution": self._convolution,
            "_convolution": self._convolution,
            "addmm": self._matrix_product,
            "mm": self._matrix_product,
            "linear": self._dense,
        }.get(call.name)
        return None if reader is None else reader(call)

    def _convolution(self, call: Call) -> tuple[Linear, list[Slot]] | None:
        given = arguments(call)
        x, weight, groups, transposed = given["input"], given["weight"], given["groups"], given["transposed"]
        layout = Layout(1, 0, groups, "in") if transposed else Layout(0, 1, groups)
        weights = self._weights(call, weight, given.get("bias"), layout)
        if weights is None or not x.depends:
            return None
        padding = tuple((2 + i, p, p) for i, p in enumerate(given["padding"]))
        if transposed or not any(given["padding"]):
            padding = ()
        return Linear(weights, 1, 1, padding, every_tap=not transposed), [x]

    def _matrix_product(self, call: Call) -> tuple[Linear, list[Slot]] | None:
        given = arguments(call)
        if given.get("beta", 1) != 1 or given.get("alpha", 1) != 1:
            return None
        addmm = call.name == "addmm"
        x, matrix, bias = (
            (given["mat1"], given["mat2"], given["self"]) if addmm else (given["self"], given["mat2"], None)
        )
        if bias is not None and len(bias.shape) != 1:
            return None
        slot, flipped = behind_views(matrix)
        weights = self._weights(call, slot, bias, Layout(0, 1) if flipped else Layout(1, 0))
        return None if weights is None or not x.depends else (Linear(weights, 1, 1), [x])

    def _dense(self, call: Call) -> tuple[Linear, list[Slot]] | None:
        given = arguments(call)
        x = given["input"]
        weights = self._weights(call, given["weight"], given.get("bias"), Layout(0, 1))
        last = len(x.shape) - 1
        return None if weights is None or not x.depends else (Linear(weights, last, last), [x])

    def _weights(self, call: Call, weight: Slot, bias: Slot | None, layout: Layout) -> Weights | None:
        """Return the layer that holds a weight; ``None`` for a weight that depends on the input."""
        if weight.depends or (bias is not None and bias.depends):
            return None
        slot = behind_views(weight)[0]
        self.scene.reads |= {(id(call), read.parameter) for read in (slot, bias) if read is not None}
        key = slot.parameter or f"{call.module}:{id(slot)}"
        if key in self.weights:
            known = self.weights[key]
            known.no_bias = known.no_bias or self._why_no_bias(known.key, call)
            known.fixed = known.fixed or self._why_fixed(known.key, call)
            if call.node is not None:
                known.key.nodes.append(call.node)
            if known.layout != layout or known.key.bias != ("" if bias is None else bias.parameter or "?"):
                known.locked = known.locked or "it is used in two different ways"
            return known
        path, _, attribute = slot.parameter.rpartition(".")
        site = Site(path, attribute, "" if bias is None else bias.parameter or "?", nodes_of(call))
        self.weights[key] = Weights(
            path or call.module or (slot.parameter and "the model") or call.name,
            layout,
            lambda: self._stored(site, slot),
            has_bias=bias is not None,
            no_bias=self._why_no_bias(site, call),
            locked=self._why_locked(slot, bias, site),
            fixed=self._why_fixed(site, call),
            key=site,
        )
        return self.weights[key]

    def _stored(self, site: Site, slot: Slot) -> tuple[Tensor, Tensor | None]:
        weight = self.scene.tensors[slot.parameter].detach()
        return weight, self.scene.tensors[site.bias].detach() if site.bias else None

    def _why_locked(self, slot: Slot, bias: Slot | None, site: Site) -> str:
        owner = self.scene.modules.get(site.module)
        if owner is not None and hasattr(owner, "parametrizations"):
            return (
                "a parametrization computes them: remove it first (torch.nn.utils.parametrize.remove_parametrizations)"
            )
        if not slot.parameter:
            return "they are computed during the forward pass"
        if site.bias == "?":
            return "its bias is computed during the forward pass"
        if self.scene.is_ambiguous(site.module):
            return "the layer stands in several places of a model that looks at values, and may be used otherwise"
        tensor = self.scene.tensors[slot.parameter]
        if not tensor.is_floating_point():
            return f"they are stored as {tensor.dtype}"
        for name in (slot.parameter, *([site.bias] if site.bias else [])):
            if len(self.scene.owners[self.scene.tensors[name]]) > 1:
                return f"{' and '.join(self.scene.owners[self.scene.tensors[name]])} are one tensor: untie them first"
        return ""

    def _why_no_bias(self, site: Site, call: Call) -> str:
        owner = self.scene.modules.get(site.module)
        if site.nodes and all(takes_bias(self.scene.model, node) for node in site.nodes):
            return ""
        if call.module != site.module:
            return "it is called as a function"
        if owner is not None and site.bias == "" and owner._parameters.get("bias") is not None:
            return "it has a bias that is not used here"
        if owner is None or site.attribute != "weight" or not is_stock(owner):
            return f"{type(owner).__name__} has a forward of its own"
        return ""

    def _why_fixed(self, site: Site, call: Call) -> str:
        owner = self.scene.modules.get(site.module)
        if owner is None or call.module != site.module or call.node is not None:
            return "a program calls it as a function, and expects it as it is"
        return (
            "" if is_stock(owner) else f"{type(owner).__name__} has a forward of its own, which may expect it as it is"
        )

    def dense(self, visit: int) -> tuple[Linear, list[Slot]] | None:
        """Return the layer that a visit of ``nn.Linear`` is, however torch takes it apart."""
        calls, inputs = self.scene.by_visit[visit], self.scene.recording.visits[visit].inputs
        slots = [behind_views(slot)[0] for call in calls for slot in call.reads]
        tensors = {slot.parameter.rpartition(".")[2]: slot for slot in slots if slot.parameter}
        if "weight" not in tensors or len(inputs) != 1 or not inputs[0].depends:
            return None
        weights = self._weights(calls[0], tensors["weight"], tensors.get("bias"), Layout(0, 1))
        if weights is None:
            return None
        self.scene.reads |= {(id(call), slot.parameter) for slot in tensors.values() for call in calls}
        last = len(inputs[0].shape) - 1
        return Linear(weights, last, last), inputs
