"""Draw the neutral picture of a torch model from a recording of its run."""

from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils._pytree import tree_flatten

from batchnorm.graph import Graph, Layout, Linear, Norm, Normalize, Operation, Other, Pool, Reshape, Value, Weights
from batchnorm.torch.constants import Constants, UnknownConstantError
from batchnorm.torch.graphs import is_batch_norm, takes_bias
from batchnorm.torch.keys import Site
from batchnorm.torch.layers import BatchNorm
from batchnorm.torch.preparing import BATCH_NORMS, is_stock
from batchnorm.torch.recording import Call, Recording, Slot
from batchnorm.torch.vocabulary import arguments, read

__all__ = ["draw"]

_VIEWS = ("t", "transpose", "detach", "alias", "lift_fresh")


def draw(model: nn.Module, recording: Recording) -> Graph:
    """Return the picture of what was recorded; arrays are read from ``model``, whose twin was watched."""
    return _Artist(model, recording).draw()


class _Artist:
    def __init__(self, model: nn.Module, recording: Recording) -> None:
        self.model = model
        self.modules = dict(model.named_modules())
        self.tensors: dict[str, Tensor] = dict((*model.named_parameters(), *model.named_buffers()))
        self.recording = recording
        self.constants = Constants(self.tensors)
        self.values: dict[Slot, Value] = {}
        self.visits: dict[int, int] = {}
        self.norms: dict[Any, Norm] = {}
        self.weights: dict[str, Weights] = {}
        self.reads: set[tuple[int, str]] = set()
        self.of_norms: dict[str, Norm] = {}
        self.statistics: set[str] = set()
        self.graph = Graph(borders=True)
        self.listed = _listed(model)
        self.frozen = self._frozen_norms()
        self.owners = _owners(model)

    def draw(self) -> Graph:
        skip: set[int] = set()
        for call in self.recording.calls:
            if not any(slot.depends for slot in call.reads) or id(call) in skip:
                continue
            if call.visit in self.frozen:
                skip |= self._draw_frozen(call)
            elif type(self.modules.get(call.module)) is nn.Linear and call.node is None:
                skip |= self._draw_dense(call)
            else:
                self._draw_call(call)
        self._lock_what_is_read_otherwise()
        self._pin_what_is_conditional()
        self.graph.uncalled = tuple(self._uncalled())
        return self.graph

    def _pin_what_is_conditional(self) -> None:
        """Pin values between calls that may not follow each other for other inputs."""
        if not any(visit.branch for visit in self.recording.visits):
            return
        for value in self.values.values():
            for reader in value.consumers if value.producer is not None else ():
                value.pin(self.recording.why_conditional(self.visits[id(value.producer)], self.visits[id(reader)]))

    def _draw_dense(self, first: Call) -> set[int]:
        """Draw a visit of ``nn.Linear`` as one node, however torch takes it apart; return the calls that it stands for."""
        calls = [c for c in self.recording.calls if c.visit == first.visit]
        visit = self.recording.visits[first.visit]
        slots = [_behind_views(slot)[0] for c in calls for slot in c.reads]
        tensors = {slot.parameter.rpartition(".")[2]: slot for slot in slots if slot.parameter}
        weights = None
        if "weight" in tensors and len(visit.inputs) == 1 and visit.inputs[0].depends:
            weights = self._weights(first, tensors["weight"], tensors.get("bias"), Layout(0, 1))
        if weights is None:
            self._draw_call(first)
            return set()
        self.reads |= {(id(c), slot.parameter) for slot in tensors.values() for c in calls}
        last = len(visit.inputs[0].shape) - 1
        self._add(Linear(weights, last, last), visit.inputs, visit.outputs, weights.name, first.visit)
        return {id(c) for c in calls}

    # -- one call --------------------------------------------------------------------------------------------------

    def _draw_call(self, call: Call) -> None:
        found = self._linear(call) or self._batch_norm(call) or read(call)
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
        module = self.modules.get(call.module)
        if call.module and module is not None and is_stock(module):
            return call.module
        return f"{call.name} in {call.module}" if call.module else call.name

    # -- linear layers ---------------------------------------------------------------------------------------------

    def _linear(self, call: Call) -> tuple[Operation, list[Slot]] | None:
        reader: Callable[[Call], tuple[Operation, list[Slot]] | None] | None = {
            "convolution": self._convolution,
            "_convolution": self._convolution,
            "addmm": self._matrix_product,
            "mm": self._matrix_product,
            "linear": self._dense,
        }.get(call.name)
        return None if reader is None else reader(call)

    def _convolution(self, call: Call) -> tuple[Operation, list[Slot]] | None:
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

    def _matrix_product(self, call: Call) -> tuple[Operation, list[Slot]] | None:
        given = arguments(call)
        if given.get("beta", 1) != 1 or given.get("alpha", 1) != 1:
            return None
        addmm = call.name == "addmm"
        x, matrix, bias = (
            (given["mat1"], given["mat2"], given["self"]) if addmm else (given["self"], given["mat2"], None)
        )
        if bias is not None and len(bias.shape) != 1:
            return None
        slot, flipped = _behind_views(matrix)
        weights = self._weights(call, slot, bias, Layout(0, 1) if flipped else Layout(1, 0))
        return None if weights is None or not x.depends else (Linear(weights, 1, 1), [x])

    def _dense(self, call: Call) -> tuple[Operation, list[Slot]] | None:
        given = arguments(call)
        x = given["input"]
        weights = self._weights(call, given["weight"], given.get("bias"), Layout(0, 1))
        last = len(x.shape) - 1
        return None if weights is None or not x.depends else (Linear(weights, last, last), [x])

    def _weights(self, call: Call, weight: Slot, bias: Slot | None, layout: Layout) -> Weights | None:
        """Return the layer that holds a weight; ``None`` for a weight that depends on the input."""
        if weight.depends or (bias is not None and bias.depends):
            return None
        slot = _behind_views(weight)[0]
        self.reads |= {(id(call), read.parameter) for read in (slot, bias) if read is not None}
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
        site = Site(path, attribute, "" if bias is None else bias.parameter or "?", _nodes(call))
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
        weight = self.tensors[slot.parameter].detach()
        return weight, self.tensors[site.bias].detach() if site.bias else None

    def _why_locked(self, slot: Slot, bias: Slot | None, site: Site) -> str:
        owner = self.modules.get(site.module)
        if owner is not None and hasattr(owner, "parametrizations"):
            return (
                "a parametrization computes them: remove it first (torch.nn.utils.parametrize.remove_parametrizations)"
            )
        if not slot.parameter:
            return "they are computed during the forward pass"
        if site.bias == "?":
            return "its bias is computed during the forward pass"
        tensor = self.tensors[slot.parameter]
        if not tensor.is_floating_point():
            return f"they are stored as {tensor.dtype}"
        for name in (slot.parameter, *([site.bias] if site.bias else [])):
            if len(self.owners[self.tensors[name]]) > 1:
                return f"{' and '.join(self.owners[self.tensors[name]])} are one tensor: untie them first"
        return ""

    def _why_no_bias(self, site: Site, call: Call) -> str:
        owner = self.modules.get(site.module)
        if site.nodes and all(takes_bias(self.model, node) for node in site.nodes):
            return ""
        if call.module != site.module:
            return "it is called as a function"
        if owner is not None and site.bias == "" and owner._parameters.get("bias") is not None:
            return "it has a bias that is not used here"
        if owner is None or site.attribute != "weight" or not is_stock(owner):
            return f"{type(owner).__name__} has a forward of its own"
        return ""

    def _why_fixed(self, site: Site, call: Call) -> str:
        owner = self.modules.get(site.module)
        stock = (
            owner is not None
            and call.module == site.module
            and is_stock(owner)
            and getattr(owner, "padding_mode", "zeros") == "zeros"
        )
        return "" if stock else "it is no layer of torch that pads with zeros"

    def _lock_what_is_read_otherwise(self) -> None:
        """Lock weights that something else than their linear layer reads."""
        by_name: dict[str, Weights | Norm] = dict(self.of_norms)
        by_name |= {name: weights for weights in self.weights.values() for name in weights.key.names()}
        for call in self.recording.calls:
            for slot in [] if call.name in _VIEWS else call.reads:
                name = _behind_views(slot)[0].parameter
                if name in by_name and (id(call), name) not in self.reads and not by_name[name].locked:
                    by_name[name].locked = f"{call.name} in {call.module or 'the model'} reads them too"

    # -- batch normalization ---------------------------------------------------------------------------------------

    def _batch_norm(self, call: Call) -> tuple[Operation, list[Slot]] | None:
        # instance normalization is built on it too
        if call.name not in BATCH_NORMS or isinstance(self.modules.get(call.module), _InstanceNorm):
            return None
        given = arguments(call)
        x = given["input"]
        norm = self._norm(call, given)
        return Normalize(norm, 1), [x]

    def _norm(self, call: Call, given: dict[str, Any]) -> Norm:
        slots = [given.get("running_mean"), given.get("running_var"), given.get("weight"), given.get("bias")]
        self.statistics |= {slot.parameter.rpartition(".")[0] for slot in slots[:2] if slot is not None}
        module = self.modules.get(call.module)
        layer = isinstance(module, _BatchNorm) and is_stock(module)
        arguments = self.recording.visits[call.visit].arguments
        key: Any = (call.module, call.node) if layer or call.node is not None else (call.module, self._order(call))
        if key not in self.norms:
            (mean, variance, gamma, beta), locked = self._arrays(slots)
            guess = "no_training" not in call.name and "no_update" not in call.name
            training = bool(given.get("training", given.get("train", guess)))
            self.norms[key] = Norm(
                self._norm_name(call),
                mean,
                variance,
                gamma,
                beta,
                eps=float(given.get("eps", given.get("epsilon", 0.0))),
                by_batch=training or (layer and module.training and module.track_running_stats),  # type: ignore[union-attr]
                locked=locked,
                computed=self._why_computed(module, slots),
                key=Site(call.module, nodes=_nodes(call), arguments=arguments),
            )
            for slot in slots:
                if slot is not None and slot.parameter:
                    self.of_norms[slot.parameter] = self.norms[key]
        norm = self.norms[key]
        self.reads |= {(id(call), slot.parameter) for slot in slots if slot is not None}
        norm.key.arguments = max(norm.key.arguments, arguments)
        norm.locked = norm.locked or self._why_not_replaceable(call, slots)
        return norm

    def _why_computed(self, module: nn.Module | None, slots: list[Slot | None]) -> str:
        """Return why the vectors that a layer uses are not those that it stores."""
        if not isinstance(module, _BatchNorm):
            return "it is not a layer of its own"
        if isinstance(module, BatchNorm) and (module.options.domains or module.options.debias):
            return "it keeps several running statistics, or debiases them"
        stored = all(slot is None or slot.parameter for slot in slots)
        return "" if stored else "its statistics or parameters are computed during the forward pass"

    def _norm_name(self, call: Call) -> str:
        """Return the dotted name of the module, and of the node where the module has several."""
        several = {
            other.node for other in self.recording.calls if other.module == call.module and other.name in BATCH_NORMS
        }
        if call.node is not None and (len(several) > 1 or not call.module):
            return ".".join(part for part in call.node if part)
        return call.module or "batch_norm"

    def _order(self, call: Call) -> int:
        """Return which normalization of its module's visit a call is."""
        mates = [other for other in self.recording.calls if other.visit == call.visit and other.name in BATCH_NORMS]
        return next(i for i, other in enumerate(mates) if other is call)

    def _arrays(self, slots: list[Slot | None]) -> tuple[list[np.ndarray | None], str]:
        try:
            return [None if slot is None else self.constants.array(slot) for slot in slots], ""
        except UnknownConstantError as unknown:
            return [None] * 4, f"its statistics or parameters are computed during the forward pass ({unknown})"

    def _why_not_replaceable(self, call: Call, slots: list[Slot | None]) -> str:
        """Return why no other module can stand in the place of the one that normalizes."""
        module = self.modules.get(call.module)
        if call.node is not None:
            alone = is_batch_norm(self.model, call.node)
            return "" if alone else f"it is called inside of {call.node[1]}, which can't be taken apart"
        if not isinstance(module, _BatchNorm):
            return f"{call.module or 'the model'} ({type(module).__name__}) calls batch_norm as a function: use a layer"
        if not is_stock(module):
            return f"{type(module).__name__} has a forward of its own: use torch's layer"
        if module._forward_hooks or module._forward_pre_hooks:
            return "it has a forward hook, which would see other values: remove the hook first"
        if slots[0] is not None and slots[0].parameter.rpartition(".")[0] != call.module:
            return "it normalizes with statistics that are not its own"
        if module in self.listed:
            return "it is kept in a list or dict of Python too: use nn.ModuleList or nn.ModuleDict"
        visit = self.recording.visits[call.visit]
        if visit.arguments > 1 and not _takes_only_residual(visit):
            return "it is called with a mask or weights"
        return ""

    def _frozen_norms(self) -> dict[int, str]:
        """Return the visits of modules that hold running statistics and apply them by plain arithmetic."""
        visits = {}
        by_visit = defaultdict(list)
        for call in self.recording.calls:
            by_visit[call.visit].append(call)
        for i, visit in enumerate(self.recording.visits):
            module = self.modules.get(visit.module)
            if module is None or isinstance(module, _BatchNorm) or any(module.children()):
                continue
            if all(
                isinstance(getattr(module, name, None), Tensor) for name in ("running_mean", "running_var")
            ) and not any(call.name in BATCH_NORMS for call in by_visit[i]):
                visits[i] = visit.module
        return visits

    def _draw_frozen(self, first: Call) -> set[int]:
        """Draw a visit of a frozen normalization as one node; return the calls that it stands for."""
        visit = self.recording.visits[first.visit]
        calls = [c for c in self.recording.calls if c.visit == first.visit and any(s.depends for s in c.reads)]
        x, y = visit.inputs[0], visit.outputs[0]
        try:
            scale, shift = self.constants.affine(x, y, 1)
        except UnknownConstantError:
            del self.frozen[first.visit]
            self._draw_call(first)
            return set()
        module = self.modules[visit.module]
        key = (visit.module, "")
        if key not in self.norms:
            hooked = module._forward_hooks or module._forward_pre_hooks
            self.norms[key] = Norm(
                visit.module, np.zeros_like(shift), np.ones_like(scale), scale, shift, 0.0,
                locked="it has a forward hook, which would see other values: remove the hook first" if hooked else "",
                computed="it is frozen",
                key=Site(visit.module),
            )  # fmt: skip
        self._add(Normalize(self.norms[key], 1), [x], [y], visit.module, first.visit)
        return {id(c) for c in calls}

    def _uncalled(self) -> list[Norm]:
        seen = {norm.key.module for norm in self.norms.values()} | self.statistics
        visited = {visit.module for visit in self.recording.visits}
        constant = {call.module for call in self.recording.calls if call.name in BATCH_NORMS}
        found = []
        for name, module in self.modules.items():
            if isinstance(module, _BatchNorm) and name not in seen:
                reason = "it does not normalize by fixed statistics, but by those of each example"
                if name in constant:
                    reason = "its input is a constant, which does not depend on the input of the model"
                found.append(Norm(name, None, None, None, None, 0.0, locked=reason if name in visited else ""))
        return found


def _listed(model: nn.Module) -> set[nn.Module]:
    """Return the modules that some module holds in a plain container, which a replacement would not reach."""
    found: set[nn.Module] = set()
    for module in model.modules():
        for key, value in vars(module).items():
            if key != "_modules" and isinstance(value, list | tuple | dict | set):
                found |= {leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, nn.Module)}
    return found


def _owners(model: nn.Module) -> dict[Tensor, list[str]]:
    """Return for each parameter and buffer the different modules' attributes that are this tensor."""
    owners: dict[Tensor, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        for attribute, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                owners[tensor].append(f"{name}.{attribute}".strip("."))
    return owners


def _behind_views(slot: Slot) -> tuple[Slot, bool]:
    """Return the parameter behind views that at most transpose it, and whether they do."""
    flipped = False
    while slot.source is not None and slot.source.name in _VIEWS and not slot.depends:
        flipped ^= slot.source.name in ("t", "transpose")
        slot = next(iter(slot.source.reads))
    return slot, flipped


def _nodes(call: Call) -> list[tuple[str, str]]:
    return [] if call.node is None else [call.node]


def _takes_only_residual(visit: Any) -> bool:
    return bool(Counter(slot.shape for slot in visit.inputs).most_common(1)[0][1] == visit.arguments)
