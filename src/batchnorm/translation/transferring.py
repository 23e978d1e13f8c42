"""The numbers of a whole model in another one of the same architecture."""

from dataclasses import replace
from typing import Any

import numpy as np

from batchnorm.arrays import Array, namespace, to_numpy
from batchnorm.errors import OptionError
from batchnorm.graph import Layout, Norm, Weights
from batchnorm.models import adapt, framework_of
from batchnorm.protocol import Changes, Model, OneByOne
from batchnorm.translation.agreement import agree, meet
from batchnorm.translation.pairing import Call, Flat, calls, described, paired
from batchnorm.translation.result import Carried, Transfer

__all__ = ["transfer"]

Pairs = dict[Any, tuple[Call, Call]]


def transfer(source: Any, target: Any, example: Any | None = None) -> Transfer:
    """Give a model the numbers of another one of the same architecture, in any framework, and prove that both compute the same.

    Dense layers and convolutions are carried with their biases, each in the layout of its framework (OIHW, HWIO, depthwise,
    transposed; the features behind a Flatten in the order of the target), and batch normalization with γ, β, running mean and
    variance, eps, decay and, where the target's layers can keep it, the convention of the variance. Layers belong together that
    have the same sizes, and the same layers before and behind them. Both models are run on the example and on random inputs.

    Args:
        source: a ``torch.nn.Module``, a ``torch.export.ExportedProgram``, a Keras model, or an ONNX ``ModelProto`` or path, in
            evaluation mode.
        target: another one; it is left as it is.
        example: an input of the source, optional where one of the two knows its shapes.

    Returns:
        `Transfer`: ``model``, a copy of the target with the numbers of the source, ``carried`` and ``error``; prints as a
        table.

    Raises:
        OptionError: a layer that has no counterpart; the first pair that does not fit is named.
        VerificationError: the outputs differ; nothing is returned.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> make = lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=1e-3), nn.ReLU()).eval()
        >>> source, target = make(), make()
        >>> found = transfer(source, target, torch.randn(2, 3, 8, 8))
        >>> [(one.source, one.target) for one in found.carried]
        [('0', '0'), ('1', '1')]
        >>> torch.equal(found.model[0].weight, source[0].weight)
        True
    """
    before, after = adapt(source), adapt(target)
    meeting = meet(before, after, example)
    sides = [calls(graph, axis) for graph, axis in zip(meeting.graphs, meeting.axes, strict=True)]
    pairs = _layers(paired(*sides))
    if not pairs:
        raise OptionError("the models must hold dense layers, convolutions or batch normalization, they hold none")
    norms = {new: _numbers(a, b) for new, (a, b) in pairs.items() if isinstance(new, Norm)}
    linear = [new for new, (a, b) in pairs.items() if isinstance(new, Weights) and _fits(a, b)]
    changed = after.changed(Changes(weights=OneByOne(linear, lambda new: _weights(*pairs[new])), numbers=norms))
    # which conventions the layers have kept is seen in what they are now
    now = {call.layer.name: call.layer for call in calls(changed.graph(meeting.examples[1]), None)}
    rows = [_row(a, b, now[b.layer.name], framework_of(after.model)) for a, b in pairs.values()]
    uncarried = _uncarried(before, {row.source for row in rows}, meeting.examples[0])
    error = agree(before, changed, meeting, uncarried)
    return Transfer(changed.model, tuple(rows), error, meeting.examples[1])


def _row(a: Call, b: Call, now: Norm | Weights, framework: str) -> Carried:
    notes = ["features in another order"] if _order(a.flat, b.flat) is not None else []
    if isinstance(a.layer, Norm):
        assert isinstance(now, Norm)  # noqa: S101
        assert isinstance(b.layer, Norm)  # noqa: S101
        what, more, eps = _said(a.layer), _differences(a.layer, now, framework), (a.layer.eps, b.layer.eps)
    else:
        has_bias, eps = a.layer.read()[1] is not None, None
        what = f"weight {'×'.join(map(str, a.kind[1]))}{', bias' if has_bias else ''}"
        more = ["bias of zeros"] if b.layer.has_bias and not has_bias else []  # type: ignore[union-attr]
    return Carried(a.layer.name, b.layer.name, what, ", ".join(notes + more), eps)


def _layers(found: list[tuple[Call, Call]]) -> Pairs:
    """Return for each layer of the target the first call of it, with that of the source.

    Raises:
        OptionError: one layer of a model would be two of the other.
    """
    pairs: Pairs = {}
    partners: dict[Any, Any] = {}
    for a, b in found:
        first = pairs.setdefault(b.layer, (a, b))
        if first[0].layer is not a.layer or partners.setdefault(a.layer, b.layer) is not b.layer:
            raise OptionError(
                f"both models must share the same layers between their calls: {described(a)} of the source and {described(b)} "
                "of the target are called several times, but not in the same places"
            )
    return pairs


def _uncarried(view: Model, carried: set[str], example: Any) -> list[str]:
    layers = [layer.name for layer in view.layers(example) if layer.trainable + layer.frozen]
    return [name for name in layers if not any(one == name or one.startswith(f"{name}.") for one in carried)]


# -- batch normalization -----------------------------------------------------------------------------------------------


def _numbers(a: Call, b: Call) -> Norm:
    """Return the numbers that a layer of the target shall have.

    Raises:
        OptionError: it can't have them.
    """
    source, target = a.layer, b.layer
    assert isinstance(source, Norm)  # noqa: S101
    assert isinstance(target, Norm)  # noqa: S101
    for norm, side in ((source, "source"), (target, "target")):
        if norm.by_batch:
            raise OptionError(
                f"layer {norm.name!r} of the {side} must normalize by running statistics, it does so by those of the batch: "
                "put the model into evaluation, model.eval()"
            )
        if norm.mean is None or norm.variance is None:
            raise OptionError(
                f"layer {norm.name!r} of the {side} must keep running statistics: {norm.locked or 'it has none'}"
            )
    for word, held, room, neutral in (("γ", source.gamma, target.gamma, 1), ("β", source.beta, target.beta, 0)):
        if room is None and held is not None and (held != neutral).any():
            raise OptionError(
                f"{described(b)} of the target must have a {word}, as {described(a)} of the source has one: scale=True and "
                "center=True in Keras, affine=True in torch"
            )
    order = _order(a.flat, b.flat)
    vectors = (source.mean, source.variance, source.gamma, source.beta)
    mean, variance, gamma, beta = (v if v is None or order is None else v[order] for v in vectors)
    return replace(source, mean=mean, variance=variance, gamma=gamma, beta=beta)


def _said(norm: Norm) -> str:
    held = [*(["γ"] if norm.gamma is not None else []), *(["β"] if norm.beta is not None else []), "mean", "variance"]
    return f"{', '.join(held)}, eps {norm.eps:.4g}{'' if norm.decay is None else f', decay {norm.decay:.4g}'}"


def _differences(source: Norm, now: Norm, framework: str) -> list[str]:
    """Return what a layer of the target has on its own, or could not take."""
    notes = ["γ of ones"] if source.gamma is None and now.gamma is not None else []
    notes += ["β of zeros"] if source.beta is None and now.beta is not None else []
    if framework == "onnx":
        # which is not trained
        return notes
    if source.decay is None and now.decay is not None:
        notes.append(f"keeps its decay of {now.decay:.4g}")
    if None not in (source.unbiased, now.unbiased) and source.unbiased != now.unbiased:
        notes.append(f"{'unbiased' if now.unbiased else 'biased'} variance from now on")
    return notes


# -- dense layers and convolutions -------------------------------------------------------------------------------------


def _fits(a: Call, b: Call) -> bool:
    """Make sure that a layer of the target has room for the numbers.

    Raises:
        OptionError: it has none.
    """
    source, target = a.layer, b.layer
    assert isinstance(source, Weights)  # noqa: S101
    assert isinstance(target, Weights)  # noqa: S101
    if target.locked:
        raise OptionError(f"{described(b)} of the target must be free to take other weights: {target.locked}")
    bias = source.read()[1]
    if bias is not None and not target.has_bias and to_numpy(bias).any():
        raise OptionError(f"{described(b)} of the target must have a bias, as {described(a)} of the source has one")
    return True


def _weights(a: Call, b: Call) -> tuple[Array, Array | None]:
    """Return the weight and the bias of a layer of the source, as the target stores them."""
    source: Any = a.layer
    target: Any = b.layer
    weight, bias = source.read()
    old, old_bias = target.read()
    values = _spread(to_numpy(weight), source.layout)
    order = _order(a.flat, b.flat)
    values = values if order is None else values[:, order]
    values = _stored(values, target.layout, tuple(old.shape))
    if not target.has_bias:
        return _like(values, old), None
    wide = np.zeros(_outputs(b)) if bias is None else to_numpy(bias)
    return _like(values, old), _like(wide, old if old_bias is None else old_bias)


def _outputs(call: Call) -> int:
    layout: Layout = call.layer.layout  # type: ignore[union-attr]
    return int(call.kind[1][0]) * (layout.groups if layout.grouped == "in" else 1)


def _spread(values: np.ndarray, layout: Layout) -> np.ndarray:
    """Return a weight as outputs, inputs, places of the kernel."""
    values = values if layout.shape is None else values.reshape(layout.shape)
    return np.moveaxis(values, (layout.out_axis, layout.in_axis), (0, 1))


def _stored(values: np.ndarray, layout: Layout, shape: tuple[int, ...]) -> np.ndarray:
    """Return the reverse of `_spread`."""
    return np.ascontiguousarray(np.moveaxis(values, (0, 1), (layout.out_axis, layout.in_axis))).reshape(shape)


def _like(values: np.ndarray, old: Array) -> Array:
    xp = namespace(old)
    return xp.astype(xp.asarray(values, device=old.device), old.dtype)


def _order(source: Flat | None, target: Flat | None) -> np.ndarray | None:
    """Return which feature of the source stands at each place of the target; ``None`` where all stand as they are."""
    if source is None or target is None or len(source.sizes) != len(target.sizes):
        return None
    places = np.arange(int(np.prod(source.sizes))).reshape(source.sizes)
    turned = np.moveaxis(places, source.channel, target.channel)
    if turned.shape != target.sizes or (turned.reshape(-1) == places.reshape(-1)).all():
        return None
    return turned.reshape(-1)
