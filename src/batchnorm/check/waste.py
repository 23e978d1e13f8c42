"""Rules on what a model carries for nothing."""

from collections.abc import Iterator

import numpy as np

from batchnorm.check.report import NOTE, WARNING, Finding
from batchnorm.check.rules import rule
from batchnorm.check.subject import MissingError, Subject
from batchnorm.fold.bias import redundant_biases
from batchnorm.fold.plan import GONE, plan_folding
from batchnorm.graph import Identity, Node, Normalize, Reshape, Transpose, Value

__all__: list[str] = []

# |γ| that counts as zero, absolutely and beside the layer's largest
TINY, BESIDE = 1e-4, 1e-2


@rule("BN301", "bias before a norm", "an example")
def redundant_bias(subject: Subject) -> Iterator[Finding]:
    """A norm subtracts the mean, and with it every bias that was added before."""
    for stripped in redundant_biases(subject.graph):
        yield Finding(
            "BN301",
            stripped.layer,
            f"its bias ({stripped.parameters} parameters) is subtracted again by {', '.join(stripped.into)} right after it.",
            "strip_bias(model, example), or bias=False from the start: β takes its place.",
            NOTE,
            float(stripped.parameters),
            {"parameters": float(stripped.parameters)},
        )


@rule("BN302", "norm that could be folded", "an example, and a model that only infers")
def foldable(subject: Subject) -> Iterator[Finding]:
    """In use a norm is a scale and shift, which the linear layer beside it can take in."""
    if not subject.infers:
        raise MissingError("needs a model that only infers (training=False)")
    for norm, fate in plan_folding(subject.graph).norms.items():
        if fate.state == GONE:
            yield Finding(
                "BN302",
                subject.name_of(norm),
                f"it can be folded into {', '.join(fate.into)}, and costs time and memory for nothing.",
                "fold(model, example) removes it, with a proof.",
                NOTE,
            )


@rule("BN303", "two norms in a row", "an example")
def in_a_row(subject: Subject) -> Iterator[Finding]:
    """The second of two norms undoes the first, but for ε and noise."""
    for norm, nodes in subject.calls():
        befores = [_norm_before(node.inputs[0]) for node in nodes]
        first = befores[0]
        if first is None or any(before is None for before in befores) or norm.plain:
            continue
        assert isinstance(first.operation, Normalize)  # noqa: S101
        yield Finding(
            "BN303",
            subject.name_of(norm),
            f"it normalizes what {subject.name_of(first.operation.norm)} has just normalized: one of the two does nothing.",
            "Leave one of them out, or fold(model, example) for a model in use.",
            NOTE,
        )


def _norm_before(value: Value) -> Node | None:
    """Return the norm that has written a value, or what it was reshaped from."""
    node = value.producer
    while node is not None and isinstance(node.operation, Identity | Reshape | Transpose):
        node = node.inputs[0].producer
    return node if node is not None and isinstance(node.operation, Normalize) else None


@rule("BN304", "channels with γ ≈ 0")
def switched_off(subject: Subject) -> Iterator[Finding]:
    """A channel whose γ is zero puts out its β, whatever comes in."""
    for state in subject.states:
        if state.gamma is None or not state.gamma.size or not np.isfinite(state.gamma).all():
            continue
        sizes = np.abs(state.gamma)
        off = sizes <= min(TINY, BESIDE * float(sizes.max())) if sizes.any() else sizes == 0
        waits = off.all() and (not state.updates) and (state.mean is None or not state.mean.any())
        if not off.any() or waits:
            # a branch that starts at zero on purpose
            continue
        yield Finding(
            "BN304",
            state.name,
            f"γ is (nearly) zero in {int(off.sum())} of {len(off)} channels, which put out a constant.",
            "prune(model, example, threshold=…) removes them, with a proof.",
            WARNING if off.all() else NOTE,
            float(off.mean()),
            {"channels": float(off.sum())},
        )
