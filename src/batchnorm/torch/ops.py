"""Normalize a torch batch: by ATen's kernels where they are exact, by the definition where they are not.

ATen sums channels-last and ``(N, C)`` batches in float32, one row after another, which costs digits as a batch grows or its
mean moves away from zero. Here many rows are summed in short columns that are merged as Moments, and a batch far from zero
is shifted first. ATen's derivatives are right up to the second order; when more are asked for, the definition gives them.
"""

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad

from batchnorm.functional import Renorm, batch_norm_backward, batch_norm_train
from batchnorm.moments import Moments

__all__ = ["is_eager", "normalize", "normalize_in_place", "normalize_weighted", "renormalize"]

SHORT_COLUMN = 128
MANY_ROWS = 2 * SHORT_COLUMN
# mean² / variance beyond which ATen's float32 sums over few, over many rows lose digits that the dtype has
FAR_FEW_ROWS, FAR_MANY_ROWS = 30.0**2, 100.0**2


def is_eager(x: Tensor) -> bool:
    """Say whether the values of ``x`` are at hand in this process: not compiled, traced, transformed, fake or on a device."""
    return (
        type(x) is Tensor
        and x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
    )


def normalize(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Moments]:
    """Return `batch_norm_train` of ``x`` by the fastest way that is exact, and the Moments of the batch."""
    if peek_interpreter_stack() is not None:
        # functorch differentiates to any order and through any nesting, ATen's formulas do not
        step = batch_norm_train(x, weight, bias, eps=eps)
        return step.y, step.moments
    if not is_eager(x) or not _in_rows(x):
        return _native(x, weight, bias, eps)
    count = x.numel() // x.shape[1]
    if count >= MANY_ROWS and forward_ad._current_level < 0:
        y, mean, m2 = _ManyRows.apply(x, weight, bias, eps)
        return y, Moments(count, mean, m2)
    y, moments = _native(x, weight, bias, eps)
    if not _is_far(moments.mean, moments.variance, FAR_FEW_ROWS):
        return y, moments
    shift = moments.mean.to(x.dtype if x.element_size() > 2 else torch.float32)
    y, moments = _native(x - _over_channels(shift, x), weight, bias, eps)
    return y.to(x.dtype), Moments(moments.count, moments.mean + shift, moments.m2)


def normalize_in_place(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, momentum: float, eps: float
) -> Tensor | None:
    """Normalize and update the running statistics by one call of ATen's, or return ``None`` and change nothing.

    Changes nothing where ATen's sums are not exact or something is not finite: another way must be taken.
    """
    rows = _in_rows(x)
    if rows and x.numel() // x.shape[1] >= MANY_ROWS:
        return None
    before = torch.cat((mean, var))
    # without .data, DDP's broadcast into the buffers would invalidate what the backward has saved
    y, batch_mean, invstd = torch.native_batch_norm(x, weight, bias, mean.data, var.data, True, momentum, eps)
    far = batch_mean * invstd if rows else None
    if _is_finite(var, weight) and (far is None or far.dot(far).item() <= FAR_FEW_ROWS):
        _derive_to_any_order(y)
        return y
    with torch.no_grad():
        mean.data.copy_(before[: len(mean)])
        var.data.copy_(before[len(mean) :])
    return None


def normalize_weighted(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
    virtual_batch_size: int | None = None,
    running: tuple[Tensor, Tensor] | tuple[None, None] = (None, None),
    renorm: Renorm | None = None,
) -> tuple[Tensor, Moments]:
    """Return `batch_norm_train` with everything it can do, by the definition; the backward keeps ``x`` and no copy of it."""
    if sample_weight is not None and sample_weight.requires_grad or not is_eager(x) or forward_ad._current_level >= 0:
        step = batch_norm_train(
            x, weight, bias, *running, eps=eps, mask=mask, sample_weight=sample_weight,
            virtual_batch_size=virtual_batch_size, renorm=renorm,
        )  # fmt: skip
        return step.y, step.moments
    kept = {"eps": eps, "virtual_batch_size": virtual_batch_size, "renorm": renorm}
    # the running statistics move on before the backward comes
    running = (None, None) if renorm is None else tuple(v.clone() for v in running)
    y, count, mean, m2 = _Definition.apply(x, weight, bias, mask, sample_weight, *running, kept)
    return y, Moments(count, mean, m2)


def renormalize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, running: tuple[Tensor, Tensor], bounds: Renorm
) -> tuple[Tensor, Moments]:
    """Return batch renormalization: ``γ·(x̂·r + d) + β`` with constants ``r``, ``d``."""
    wide = x if x.element_size() > 2 else x.float()
    y, moments = normalize(wide, None, None, eps)
    mean, var = (v.double() for v in running)
    sigma = (var + eps).sqrt()
    r = ((moments.variance + eps).sqrt() / sigma).clamp(1 / bounds.rmax, bounds.rmax)
    d = ((moments.mean - mean) / sigma).clamp(-bounds.dmax, bounds.dmax)
    y = y * _over_channels(r.detach().to(y.dtype), x) + _over_channels(d.detach().to(y.dtype), x)
    y = y if weight is None else y * _over_channels(weight, x)
    y = y if bias is None else y + _over_channels(bias, x)
    return y.to(x.dtype), moments


def _native(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Moments]:
    """Normalize by ATen, which leaves the batch's statistics in buffers of our own: a step of momentum 1."""
    count = x.numel() // x.shape[1]
    # statistics are never kept in half precision
    weight, bias = (v if v is None or v.element_size() > 2 else v.float() for v in (weight, bias))
    dtype = torch.float32 if x.element_size() < 4 else x.dtype
    mean, var = x.new_zeros(2, x.shape[1], dtype=dtype).unbind()
    y = torch.batch_norm(x, weight, bias, mean, var, True, 1.0, eps, torch.backends.cudnn.enabled)
    if is_eager(x):
        _derive_to_any_order(y)
    m2 = var.double() * (count - 1) if count > 1 else torch.zeros_like(var, dtype=torch.float64)
    return y, Moments(count, mean.double(), m2)


class _Definition(torch.autograd.Function):
    """The definition, forward and explicit backward: derivatives of any order, in the memory of one."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mask: Tensor | None,
        sample_weight: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        kept: dict[str, Any],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Normalize; the Moments are constants."""
        step = batch_norm_train(
            x, weight, bias, running_mean, running_var, mask=mask, sample_weight=sample_weight, **kept
        )
        ctx.save_for_backward(x, weight, mask, sample_weight, running_mean, running_var)
        ctx.kept, ctx.bias = kept, None if bias is None else bias.dtype
        count = torch.as_tensor(step.moments.count, dtype=torch.float64)
        moments = (count, step.moments.mean, step.moments.m2)
        ctx.mark_non_differentiable(*moments)
        return step.y, *moments

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> Any:
        """Return the gradients of x, γ and β."""
        x, weight, mask, sample_weight, *running = ctx.saved_tensors
        g = batch_norm_backward(dy, x, weight, *running, mask=mask, sample_weight=sample_weight, **ctx.kept)
        dgamma = None if weight is None else g.dgamma.to(weight.dtype)
        return g.dx, dgamma, None if ctx.bias is None else g.dbeta.to(ctx.bias), None, None, None, None, None


class _ManyRows(torch.autograd.Function):
    """Normalize a batch that lies in memory row by row, with sums over short columns."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return output, mean and m2; the last two are constants."""
        moments = _moments_of_rows(_rows(x))
        dtype = torch.float32 if x.element_size() < 4 else x.dtype
        mean, var = moments.mean.to(dtype), moments.variance.to(dtype)
        gamma, beta = (v if v is None or v.element_size() > 2 else v.float() for v in (weight, bias))
        y = torch.batch_norm(x, gamma, beta, mean, var, False, 0.0, eps, False)
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps, ctx.bias = eps, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(moments.mean, moments.m2)
        return y, moments.mean, moments.m2

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> Any:
        """Return the gradients of x, γ and β."""
        x, weight, mean, var = ctx.saved_tensors
        if torch.is_grad_enabled():
            g = batch_norm_backward(dy, x, weight, eps=ctx.eps)
        else:
            g = _backward_of_rows(dy, x, weight, mean, var, ctx.eps, ctx.needs_input_grad[0])
        dgamma = None if weight is None else g[1].to(weight.dtype)
        return g[0], dgamma, None if ctx.bias is None else g[2].to(ctx.bias), None


def _moments_of_rows(rows: Tensor) -> Moments:
    moments = _moments_of_columns(rows)
    if not _is_far(moments.mean, moments.variance, FAR_MANY_ROWS):
        return moments
    shift = moments.mean.to(torch.float32 if rows.element_size() < 4 else rows.dtype)
    shifted = _moments_of_columns(rows - shift)
    return Moments(shifted.count, shifted.mean + shift, shifted.m2)


def _moments_of_columns(rows: Tensor) -> Moments:
    """Measure ``(M, C)`` rows in columns of `SHORT_COLUMN` values each, and merge them all at once by Chan's formula."""
    total = Moments.empty()
    for columns, parts in _short_columns(rows):
        dtype = torch.float32 if rows.element_size() < 4 else rows.dtype
        mean, var = torch.batch_norm_update_stats(columns, *torch.zeros(2, columns.shape[1], dtype=dtype).unbind(), 0.0)
        means, m2s = mean.double().view(parts, -1), var.double().view(parts, -1) * len(columns)
        mean = means.mean(0)
        part = Moments(columns.numel() // rows.shape[1], mean, (m2s + len(columns) * (means - mean) ** 2).sum(0))
        total = total.merge(part)
    return total


def _short_columns(rows: Tensor) -> list[tuple[Tensor, int]]:
    """View ``(M, C)`` as ``(128, parts · C)``, and what is left over as it is: parts of a channel are channels of their own."""
    parts = len(rows) // SHORT_COLUMN
    whole = parts * SHORT_COLUMN
    columns = [(rows[:whole].view(SHORT_COLUMN, -1), parts)]
    return columns if whole == len(rows) else [*columns, (rows[whole:], 1)]


def _backward_of_rows(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, var: Tensor, eps: float, needs_dx: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return dx, dγ and dβ: sums over short columns, then ``dx = a·dy + b·x + c`` for each channel."""
    dy = dy.contiguous(memory_format=_memory_format(x)).to(x.dtype)
    invstd = (var.double() + eps).rsqrt()
    dgamma, dbeta = _sums_of_columns(_rows(dy), _rows(x), mean, var, eps)
    if not needs_dx:
        return None, dgamma, dbeta
    gamma = weight if weight is None or weight.element_size() > 2 else weight.float()
    if x.element_size() == 2:
        # three terms rounded to half precision would cost a digit: ATen rounds once
        dx, *_ = torch.ops.aten.native_batch_norm_backward(
            dy, x, gamma, None, None, mean, invstd.to(mean.dtype), True, eps, [True, False, False]
        )
        return dx, dgamma, dbeta
    count = x.numel() // x.shape[1]
    a = invstd if gamma is None else invstd * gamma.double()
    b = -a * invstd * dgamma / count
    c = -a * dbeta / count - b * mean.double()
    zeros, ones = torch.zeros_like(mean), torch.ones_like(mean)
    dx = torch.batch_norm(dy, a.to(x.dtype), c.to(x.dtype), zeros, ones, False, 0.0, 0.0, False)
    return dx.addcmul_(x, _over_channels(b.to(x.dtype), x)), dgamma, dbeta


def _sums_of_columns(dy: Tensor, x: Tensor, mean: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return ``Σ dy·x̂`` and ``Σ dy`` in float64, by ATen's backward for fixed statistics, which sums both in one reading."""
    dgamma, dbeta = 0.0, 0.0
    for (dy_columns, parts), (x_columns, _) in zip(_short_columns(dy), _short_columns(x), strict=True):
        _, scaled, plain = torch.ops.aten.native_batch_norm_backward(
            dy_columns, x_columns, None, mean.repeat(parts), var.repeat(parts), None, None, False, eps, [False, True, True]
        )  # fmt: skip
        dgamma = dgamma + scaled.double().view(parts, -1).sum(0)
        dbeta = dbeta + plain.double().view(parts, -1).sum(0)
    return dgamma, dbeta


def _is_far(mean: Tensor, variance: Tensor, bound: float) -> bool:
    """Say whether a channel lies so far from zero, for its spread, that float32 sums lose digits."""
    return bool((mean * mean > bound * variance).any())


def _is_finite(var: Tensor, weight: Tensor | None) -> bool:
    # one product tells: 0 · inf and NaN stay NaN; an overflow of sound values only costs a second look
    total = var.dot(var if weight is None or weight.dtype != var.dtype else weight.detach()).item()
    return -torch.inf < total < torch.inf


def _in_rows(x: Tensor) -> bool:
    """Say whether the channels of one place lie side by side in memory: ``(N, C)`` and channels-last."""
    if x.ndim == 2:
        return x.is_contiguous()
    return x.ndim > 3 and not x.is_contiguous() and x.is_contiguous(memory_format=_memory_format(x))


def _memory_format(x: Tensor) -> torch.memory_format:
    return {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim, torch.contiguous_format)


def _rows(x: Tensor) -> Tensor:
    return x if x.ndim == 2 else x.movedim(1, -1).reshape(-1, x.shape[1])


def _over_channels(v: Tensor, x: Tensor) -> Tensor:
    return v.view(1, -1, *[1] * (x.ndim - 2))


def _exact_derivative(grad_inputs: tuple[Tensor | None, ...], grad_outputs: tuple[Tensor, ...]) -> Any:
    """Replace the gradients of ATen's node by the definition's, which can be differentiated again."""
    node: Any = torch._C._current_autograd_node()
    node.metadata.pop("exact").remove()
    g = batch_norm_backward(grad_outputs[0], node._saved_input, node._saved_weight, eps=node._saved_eps)
    return tuple(
        None if old is None else new.to(old.dtype).reshape(old.shape) for old, new in zip(grad_inputs, g, strict=True)
    )


def _when_derived_again(dy: Tensor) -> None:
    """Hook the node that this gradient reaches, if it is asked for a graph of its own."""
    if torch.is_grad_enabled():
        node: Any = torch._C._current_autograd_node()
        node.metadata["exact"] = node.register_hook(_exact_derivative)


def _derive_to_any_order(y: Tensor) -> None:
    if y.grad_fn is not None:
        y.grad_fn._register_hook_dict(_CARRIER)


# Hooking each output costs a tenth of a small layer's time; a node borrows the hooks of this tensor at next to none.
_CARRIER: Any = torch.zeros((), requires_grad=True)
_CARRIER._backward_hooks = OrderedDict({0: _when_derived_again})
