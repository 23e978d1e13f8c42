"""The verb `strip_bias`: a bias before a normalization moves into the running mean."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from batchnorm.affine import Affine
from batchnorm.arrays import to_numpy
from batchnorm.fold import motion
from batchnorm.fold.moving import Absorption, BlockedError, Mover
from batchnorm.fold.proof import Error, prove
from batchnorm.fold.result import Kept
from batchnorm.graph import Graph, Linear, Node, Norm, Normalize, Value, Weights
from batchnorm.models import adapt
from batchnorm.protocol import Changes
from batchnorm.tables import table

__all__ = ["StripResult", "Stripped", "redundant_biases", "strip_bias"]


@dataclass(frozen=True, slots=True)
class Stripped:
    """A bias that is gone.

    Args:
        layer: dotted name of the linear layer.
        into: names of the normalization layers whose running mean took it in.
        parameters: how many numbers it had.
    """

    layer: str
    into: tuple[str, ...]
    parameters: int


@dataclass(frozen=True, slots=True)
class StripResult:
    """A model without the biases that normalization takes out again, and the proof; prints as a table.

    Args:
        model: the model, of the type that was given.
        stripped: biases that are gone.
        kept: linear layers before a normalization that keep their bias, each with its reason.
        error: the measured differences and their bounds.
    """

    model: Any
    stripped: tuple[Stripped, ...]
    kept: tuple[Kept, ...]
    error: Error

    def __str__(self) -> str:
        rows = [(s.layer, "without bias", f"into {', '.join(s.into)}") for s in self.stripped]
        rows += [(k.layer, k.became, k.reason) for k in self.kept]
        total = f"{sum(s.parameters for s in self.stripped)} parameters less in {len(self.stripped)} layers"
        return "\n".join([table(("Layer", "Became", "How, or why not"), rows), total, str(self.error)])


def strip_bias(model: Any, example: Any | None = None, *, inplace: bool = False) -> StripResult:
    """Remove every bias that the batch normalization after it subtracts again.

    A batch norm subtracts the mean of its input, and with it a bias ``b`` that was added before: in training
    ``(W x + b) - mean(W x + b) = W x - mean(W x)``. In evaluation ``(W x + b) - running_mean = W x - (running_mean - b)``. So
    the bias is dropped, ``b`` is subtracted from the running mean, and outputs, gradients and further training stay as they
    were, but for rounding. Dropout between the two would have dropped the bias too; in evaluation nobody sees it, and the bias
    goes.

    Args:
        model: as in `fold`; training mode is welcome too.
        example: as in `fold`.
        inplace: change ``model`` itself too. The optimizer then holds biases that nothing uses any more.

    Returns:
        `StripResult`: ``model``, ``stripped``, ``kept`` and ``error``; prints as a table.

    Raises:
        OptionError: a model of no known framework, or one that fails on the example.
        VerificationError: the outputs in evaluation differ; nothing is returned, ``model`` is as it was.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> strip_bias(net, torch.randn(2, 3, 16, 16)).stripped
        (Stripped(layer='0', into=('1',), parameters=8),)

    Reference:
        Ioffe, Szegedy: Batch Normalization, 2015 (arXiv:1502.03167), section 3.2.
    """
    before = adapt(model)
    graph = before.graph(example)
    stripper = _Stripper(graph)
    stripper.strip()
    after = before.changed(stripper.changes)
    error = prove(before, after, lambda wide: wide.change(stripper.changes), example, graph.weights())
    if inplace:
        before.change(stripper.changes)
        after = before
    return StripResult(after.model, tuple(stripper.stripped), tuple(stripper.kept), error)


def redundant_biases(graph: Graph) -> list[Stripped]:
    """List the biases of a network that a normalization after them subtracts again."""
    stripper = _Stripper(graph)
    stripper.strip()
    return stripper.stripped


class _Stripper:
    def __init__(self, graph: Graph) -> None:
        self.calls: dict[Any, list[Node]] = {**graph.norms(), **graph.weights()}
        self.layers = [weights for weights in graph.weights() if weights.has_bias]
        self.trains = graph.training
        self.mover = Mover(self._take, lambda node: False, drops=graph.training)
        self.changes = Changes()
        self.stripped: list[Stripped] = []
        self.kept: list[Kept] = []

    def strip(self) -> None:
        for weights in self.layers:
            try:
                self._strip(weights)
            except BlockedError as blocked:
                if self._meets_norm(weights):
                    self.kept.append(Kept(weights.name, str(blocked), "unchanged"))

    def _strip(self, weights: Weights) -> None:
        if weights.locked or weights.fixed:
            raise BlockedError(weights.locked or weights.fixed)
        held = weights.read()[1]
        assert held is not None  # noqa: S101
        bias = to_numpy(held)
        if not bias.any():
            # zeros pass through everything, and what training makes of them does not
            self._absorbed(weights, np.ones_like(bias))
        found = self._absorbed(weights, bias)
        for norm, own in found.items():
            if norm.mean is not None:
                self.changes.means[norm] = self.changes.means.get(norm, norm.mean) - own[0].affine.shift
        self.changes.biasless.add(weights)
        self.stripped.append(Stripped(weights.name, tuple(norm.name for norm in found), int(bias.shape[0])))

    def _absorbed(self, weights: Weights, bias: np.ndarray) -> dict[Norm, list[Absorption]]:
        """Return the norms that would take in a bias, or raise `BlockedError`."""
        shift = Affine(np.ones(bias.shape[0]), bias)
        found: dict[Norm, list[Absorption]] = {}
        for node in self.calls[weights]:
            assert isinstance(node.operation, Linear)  # noqa: S101
            value = node.outputs[0]
            spread = motion.spread(shift, node.operation.out_axis, len(value.shape))
            for absorption in self.mover.push_forward(value, spread):
                assert isinstance(absorption.node.operation, Normalize)  # noqa: S101
                found.setdefault(absorption.node.operation.norm, []).append(absorption)
        for norm, own in found.items():
            self._check(norm, own)
        return found

    def _check(self, norm: Norm, own: list[Absorption]) -> None:
        hits = Counter(id(absorption.node) for absorption in own)
        if set(hits) != {id(node) for node in self.calls[norm]} or max(hits.values()) > 1:
            raise BlockedError(f"{norm.name} normalizes the output of other layers too")
        if any((absorption.affine.shift != own[0].affine.shift).any() for absorption in own):
            raise BlockedError(f"{norm.name} is called several times, each time after another bias")

    def _take(self, node: Node, affine: Affine, value: Value, after: bool) -> Absorption:
        operation = node.operation
        if not isinstance(operation, Normalize):
            raise BlockedError(f"{node.name} reads it, which does not normalize")
        if self.trains and not operation.norm.by_batch:
            raise BlockedError(f"{node.name} is frozen while others train: the bias still learns there")
        if operation.norm.computed:
            raise BlockedError(f"{node.name} can't take it in: {operation.norm.computed}")
        vectors = motion.along(affine, operation.axis, value.shape[operation.axis])
        if vectors is None:
            raise BlockedError(f"{node.name} normalizes another axis")
        return Absorption(node, vectors, after)

    def _meets_norm(self, weights: Weights) -> bool:
        return any(
            isinstance(reader.operation, Normalize)
            for node in self.calls[weights]
            for reader in node.outputs[0].consumers
        )
