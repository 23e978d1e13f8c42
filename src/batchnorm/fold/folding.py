"""See the network, plan, rewrite, prove."""

from dataclasses import replace
from math import inf
from typing import Any

import numpy as np

from batchnorm.arrays import Array, namespace
from batchnorm.errors import BatchNormError
from batchnorm.fold.absorption import absorbed, loss
from batchnorm.fold.plan import GONE, PLAIN, Fate, Plan, plan_folding
from batchnorm.fold.proof import Error, prove
from batchnorm.fold.result import Folded, FoldResult, Kept
from batchnorm.graph import Graph, Norm, Weights
from batchnorm.models import adapt
from batchnorm.protocol import Changes, Model, OneByOne

__all__ = ["fold"]


def fold(model: Any, example: Any | None = None, *, inplace: bool = False) -> FoldResult:
    """Remove batch normalization from a trained network, and prove that nothing else changed.

    In evaluation a layer is ``y = scale · x + shift`` for each channel, with ``scale = γ / √(running_var + ε)`` and
    ``shift = β - running_mean · scale``. It is multiplied into the linear layer before it, ``W' = scale · W`` and
    ``b' = scale · b + shift``, or into those after it, ``W' = W · scale`` and ``b' = b + W · shift``, through everything
    that it commutes with. What no linear layer can absorb becomes a plain scale and shift. The arithmetic is float64, the
    result is in the dtype of the weights. The outputs are compared on the example and on random inputs.

    Args:
        model: a ``torch.nn.Module``, ``torch.fx.GraphModule`` or ``torch.export.ExportedProgram``, a Keras model, or an ONNX
            ``ModelProto`` or path. It is seen in evaluation, and left as it is.
        example: an input (a tuple of inputs, a dict of named ones); optional where the model knows its shapes.
        inplace: change ``model`` itself too.

    Returns:
        `FoldResult`: ``model``, ``folded``, ``kept`` and ``error``; prints as a table.

    Raises:
        OptionError: a model of no known framework, or one that fails on the example.
        VerificationError: the folded model computes something else; nothing is returned, ``model`` is as it was.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
        >>> result = fold(net, torch.randn(2, 3, 16, 16))
        >>> result.model
        Sequential(
          (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
          (1): Identity()
          (2): ReLU()
        )
        >>> result.folded
        (Folded(layer='1', into=('0',), how='backward'),)

    Reference:
        Jacob et al.: Quantization and Training of Neural Networks, 2018 (arXiv:1712.05877), section 3.2.
    """
    before = adapt(model)
    graph = before.graph(example)
    inputs = before.inputs(example, None)
    closed: dict[Weights | Norm, str] = {}
    plan, changes = _decide(graph, closed)
    after = before.changed(changes)
    reason = _why_not_running(after, inputs)
    if reason:
        # a program that does more with its layers than call them
        closed |= dict.fromkeys(_culprits(before, graph, list(plan.norms), inputs), f"the model needs it: {reason}")
        plan, changes = _decide(graph, closed)
        after = before.changed(changes)
    exact = replace(changes, weights=OneByOne(changes.weights, lambda weights: _exact(weights, plan)))
    if changes.norms:
        error = prove(before, after, lambda wide: wide.change(exact), example, graph.weights(), _cancellation(plan))
    else:
        before.outputs(inputs)
        error = Error((), "nothing was changed, so that there is nothing to compare")
    if inplace:
        before.change(changes)
        after = before
    folded = [Folded(norm.name, fate.into, fate.how) for norm, fate in plan.norms.items() if fate.state == GONE]
    kept = [
        Kept(norm.name, fate.how, "scale and shift" if fate.state == PLAIN else "unchanged")
        for norm, fate in plan.norms.items()
        if fate.state != GONE and not (norm.plain and not _changes(norm, fate))
    ]
    kept += [Kept(norm.name, norm.locked or "it was not called on the example", "unchanged") for norm in graph.uncalled]
    return FoldResult(after.model, tuple(folded), tuple(kept), error)


def _cancellation(plan: Plan) -> float:
    """Return how many times larger than its output a norm's ``scale · x`` and ``shift`` may be."""
    fixed = [norm for norm, fate in plan.norms.items() if fate.affine is not None]
    sizes = [np.abs(norm.mean * norm.affine.scale).max(initial=0.0) for norm in fixed]
    return max((float(size) for size in sizes if np.isfinite(size)), default=0.0)


def _why_not_running(model: Model, inputs: Any) -> str:
    try:
        model.outputs(inputs)
    except BatchNormError as error:
        return str(error)
    return ""


def _culprits(before: Model, graph: Graph, norms: list[Norm], inputs: Any, held: tuple[Norm, ...] = ()) -> list[Norm]:
    """Return norms that must stay as they are, together with those that are held already, so that the model runs."""
    if len(norms) <= 1:
        return norms
    for half in (norms[: len(norms) // 2], norms[len(norms) // 2 :]):
        changes = _decide(graph, dict.fromkeys((*held, *half), "held"))[1]
        if not _why_not_running(before.changed(changes), inputs):
            return _culprits(before, graph, half, inputs, held)
    first, second = norms[: len(norms) // 2], norms[len(norms) // 2 :]
    found = _culprits(before, graph, first, inputs, (*held, *second))
    return found + _culprits(before, graph, second, inputs, (*held, *found))


def _decide(graph: Graph, closed: dict[Weights | Norm, str]) -> tuple[Plan, Changes]:
    """Plan, and return the changes in the weights' dtype; without what that dtype can't hold."""
    closed = dict(closed)
    while True:
        plan = plan_folding(graph, closed)
        rewritten = {weights: _rewritten(weights, plan) for weights in plan.absorbers()}
        refused: dict[Weights | Norm, str] = {
            weights: reason for weights, reason in rewritten.items() if isinstance(reason, str)
        }
        if not refused:
            norms = {norm: _replacement(fate) for norm, fate in plan.norms.items() if _changes(norm, fate)}
            arrays = {weights: new for weights, new in rewritten.items() if not isinstance(new, str)}
            return plan, Changes(weights=arrays, norms=norms, unpadded=plan.unpadded)
        closed.update(refused)


def _changes(norm: Norm, fate: Fate) -> bool:
    """Whether anything is to be written in the place of a norm."""
    if fate.state == PLAIN and norm.plain and fate.affine is not None:
        return bool((fate.affine.scale != norm.affine.scale).any() or (fate.affine.shift != norm.affine.shift).any())
    return fate.state in (GONE, PLAIN)


def _exact(weights: Weights, plan: Plan) -> tuple[Array, Array | None]:
    """Return the new weights of a layer in float64."""
    weight, bias = weights.read()
    before, after = plan.before.get(weights), plan.after.get(weights)
    wide, wide_bias = absorbed(weight, bias, weights.layout, before, after)
    shifted = bias is not None or any(a is not None and a.shift.any() for a in (before, after))
    return wide, wide_bias if shifted else None


def _replacement(fate: Fate) -> Any:
    if fate.state == PLAIN:
        return fate.affine
    return fate.border


def _rewritten(weights: Weights, plan: Plan) -> tuple[Array, Array | None] | str:
    """Return the new weights of a layer, or why its dtype can't hold them."""
    wide, wide_bias = _exact(weights, plan)
    weight, bias = weights.read()
    xp = namespace(wide)
    bias_dtype = (weight if bias is None else bias).dtype
    lost = loss(wide, weight.dtype, weights.layout)
    if wide_bias is not None and not xp.all(xp.abs(wide_bias) <= xp.finfo(bias_dtype).max):
        lost = inf
    if lost > 4 * xp.finfo(weight.dtype).eps:
        what = "would not be finite" if lost == inf else f"would lose {lost:.1%} of a channel"
        return f"folded, they {what} in {weight.dtype}"
    return xp.astype(wide, weight.dtype), None if wide_bias is None else xp.astype(wide_bias, bias_dtype)
