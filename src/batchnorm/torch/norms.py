"""The batch normalization of a torch model: layers, functions, and frozen layers that are plain arithmetic."""

from collections import Counter
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils._pytree import tree_flatten

from batchnorm.arrays import to_numpy
from batchnorm.graph import Norm, Normalize
from batchnorm.portable import complement
from batchnorm.torch.constants import UnknownConstantError
from batchnorm.torch.events import Call, Slot
from batchnorm.torch.graphs import is_batch_norm
from batchnorm.torch.keys import Site
from batchnorm.torch.layers import BatchNorm
from batchnorm.torch.preparing import BATCH_NORMS, is_stock
from batchnorm.torch.scene import Scene, nodes_of
from batchnorm.torch.vocabulary import arguments

__all__ = ["Norms"]


class Norms:
    """Tells which calls normalize, and keeps one `Norm` for each layer.

    Attributes:
        of_tensors: the layer that each statistic and parameter belongs to, by dotted name.
        frozen: the visits of modules that hold running statistics and apply them by plain arithmetic.
    """

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.norms: dict[Any, Norm] = {}
        self.of_tensors: dict[str, Norm] = {}
        self.frozen = self._frozen()
        self._owners: set[str] = set()
        self._listed = _listed(scene.model)

    def read(self, call: Call) -> tuple[Normalize, list[Slot]] | None:
        """Return the normalization that a call is, and what flows through it; ``None`` where it is none."""
        # instance normalization is built on it too
        if call.name not in BATCH_NORMS or isinstance(self.scene.modules.get(call.module), _InstanceNorm):
            return None
        given = arguments(call)
        x = given["input"]
        norm = self._norm(call, given)
        return Normalize(norm, 1), [x]

    def _norm(self, call: Call, given: dict[str, Any]) -> Norm:
        slots = [given.get("running_mean"), given.get("running_var"), given.get("weight"), given.get("bias")]
        self._owners |= {slot.parameter.rpartition(".")[0] for slot in slots[:2] if slot is not None}
        module = self.scene.modules.get(call.module)
        layer = isinstance(module, _BatchNorm) and is_stock(module)
        arguments = self.scene.recording.visits[call.visit].arguments
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
                decay=_decay(module.momentum if layer else given.get("momentum")),  # type: ignore[union-attr]
                unbiased=_unbiased(module),
                by_batch=training or (layer and module.training and module.track_running_stats),  # type: ignore[union-attr]
                locked=locked,
                computed=self._why_computed(module, slots),
                holder=self._holder(slots[0]),
                key=Site(call.module, nodes=nodes_of(call), arguments=arguments),
            )
            for slot in slots:
                if slot is not None and slot.parameter:
                    self.of_tensors[slot.parameter] = self.norms[key]
        norm = self.norms[key]
        self.scene.reads |= {(id(call), slot.parameter) for slot in slots if slot is not None}
        norm.key.arguments = max(norm.key.arguments, arguments)
        norm.locked = norm.locked or self._why_not_replaceable(call, slots)
        return norm

    def _holder(self, mean: Slot | None) -> str:
        """Return the name of the module that keeps a running mean."""
        if mean is None or not mean.parameter:
            return ""
        return mean.parameter.rpartition(".")[0] or type(self.scene.model).__name__

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
            other.node
            for other in self.scene.recording.calls
            if other.module == call.module and other.name in BATCH_NORMS
        }
        if call.node is not None and (len(several) > 1 or not call.module):
            return ".".join(part for part in call.node if part)
        return call.module or "batch_norm"

    def _order(self, call: Call) -> int:
        """Return which normalization of its module's visit a call is."""
        mates = [
            other for other in self.scene.recording.calls if other.visit == call.visit and other.name in BATCH_NORMS
        ]
        return next(i for i, other in enumerate(mates) if other is call)

    def _arrays(self, slots: list[Slot | None]) -> tuple[list[np.ndarray | None], str]:
        try:
            return [None if slot is None else self.scene.constants.array(slot) for slot in slots], ""
        except UnknownConstantError as unknown:
            return [None] * 4, f"its statistics or parameters are computed during the forward pass ({unknown})"

    def _why_not_replaceable(self, call: Call, slots: list[Slot | None]) -> str:
        """Return why no other module can stand in the place of the one that normalizes."""
        module = self.scene.modules.get(call.module)
        if call.node is not None:
            alone = is_batch_norm(self.scene.model, call.node)
            return "" if alone else f"it is called inside of {call.node[1]}, which can't be taken apart"
        if not isinstance(module, _BatchNorm):
            return f"{call.module or 'the model'} ({type(module).__name__}) calls batch_norm as a function: use a layer"
        if not is_stock(module):
            return f"{type(module).__name__} has a forward of its own: use torch's layer"
        if module._forward_hooks or module._forward_pre_hooks:
            return "it has a forward hook, which would see other values: remove the hook first"
        if slots[0] is not None and slots[0].parameter.rpartition(".")[0] != call.module:
            return "it normalizes with statistics that are not its own"
        if module in self._listed:
            return "it is kept in a list or dict of Python too: use nn.ModuleList or nn.ModuleDict"
        if self.scene.is_ambiguous(call.module):
            return "it stands in several places of a model that looks at values, and may be used otherwise"
        visit = self.scene.recording.visits[call.visit]
        if visit.arguments > 1 and not _takes_only_residual(visit):
            return "it is called with a mask or weights"
        return ""

    def _frozen(self) -> dict[int, str]:
        """Return the visits of modules that hold running statistics and apply them by plain arithmetic."""
        visits = {}
        for i, visit in enumerate(self.scene.recording.visits):
            module = self.scene.modules.get(visit.module)
            if module is None or isinstance(module, _BatchNorm) or any(module.children()):
                continue
            if all(
                isinstance(getattr(module, name, None), Tensor) for name in ("running_mean", "running_var")
            ) and not any(call.name in BATCH_NORMS for call in self.scene.by_visit[i]):
                visits[i] = visit.module
        return visits

    def read_frozen(self, visit_number: int) -> tuple[Normalize, list[Slot]] | None:
        """Return the normalization that a visit of a frozen layer is; ``None`` where its arithmetic is another one."""
        visit = self.scene.recording.visits[visit_number]
        try:
            scale, shift = self.scene.constants.affine(visit.inputs[0], visit.outputs[0], 1)
        except UnknownConstantError:
            return None
        module = self.scene.modules[visit.module]
        key = (visit.module, "")
        if key not in self.norms:
            hooked = module._forward_hooks or module._forward_pre_hooks
            self.norms[key] = Norm(
                visit.module, np.zeros_like(shift), np.ones_like(scale), scale, shift, 0.0,
                locked="it has a forward hook, which would see other values: remove the hook first" if hooked else "",
                computed="it is frozen",
                key=Site(visit.module),
            )  # fmt: skip
        return Normalize(self.norms[key], 1), visit.inputs[:1]

    def is_training_layer(self, call: Call) -> bool:
        """Whether a call is inside of a layer of ours that normalizes by the batch, with operations of its own."""
        module, visit = self.scene.modules.get(call.module), self.scene.recording.visits[call.visit]
        return isinstance(module, BatchNorm) and module.normalizes_by_batch() and visit.arguments == 1

    def has_activation(self, name: str) -> bool:
        """Whether a module is a layer of ours that ends in an activation."""
        module = self.scene.modules[name]
        return isinstance(module, BatchNorm) and module.options.activation is not None

    def read_training_layer(self, visit_number: int) -> tuple[Normalize, list[Slot]]:
        """Return the normalization by the batch that a visit of a layer of ours is."""
        visit = self.scene.recording.visits[visit_number]
        module: Any = self.scene.modules[visit.module]
        key = (visit.module, None)
        if key not in self.norms:
            vectors = (module.running_mean, module.running_var, module.weight, module.bias)
            mean, variance, gamma, beta = (None if v is None else to_numpy(v) for v in vectors)
            special = module.options.domains or module.options.debias
            self.norms[key] = Norm(
                visit.module, mean, variance, gamma, beta, module.eps, by_batch=True,
                decay=_decay(module.momentum), unbiased=_unbiased(module),
                computed="it keeps several running statistics, or debiases them" if special else "",
                key=Site(visit.module),
            )  # fmt: skip
        return Normalize(self.norms[key], 1), visit.inputs

    def uncalled(self) -> list[Norm]:
        """Return the layers of the model that no call was seen of."""
        seen = {norm.key.module for norm in self.norms.values()} | self._owners
        visited = {visit.module for visit in self.scene.recording.visits}
        constant = {call.module for call in self.scene.recording.calls if call.name in BATCH_NORMS}
        found = []
        for name, module in self.scene.modules.items():
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
            if key != "_modules" and isinstance(value, list | tuple | dict | set) and value:
                found |= {leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, nn.Module)}
    return found


def _decay(momentum: Any) -> float | None:
    return complement(momentum) if isinstance(momentum, int | float) else None


def _unbiased(module: nn.Module | None) -> bool:
    """Whether a running variance is that of n - 1, as all kernels of torch's keep it."""
    return module.options.unbiased if isinstance(module, BatchNorm) else True


def _takes_only_residual(visit: Any) -> bool:
    return bool(Counter(slot.shape for slot in visit.inputs).most_common(1)[0][1] == visit.arguments)
