"""Normalize a batch whose parts lie on the ranks of a process group: one collective forward, one backward.

Each rank measures its part, one vector ``(count, mean, m2)`` of 2C + 1 numbers; the vectors of all ranks are gathered and
merged in the same order everywhere, so that all ranks hold the same numbers to the last bit. With ``Σ`` over all ranks::

    forward:   (N, μ, σ²) = merge of all          y = γ·(r·x̂ + d) + β
    backward:  Σ dy, Σ dy·x̂ are summed up         dx = γ·r/√(σ² + ε) · (dy - w/N · (Σ dy + x̂ · Σ dy·x̂))

``w`` is 1 or a value's weight; ``r`` and ``d`` are batch renormalization's constants, 1 and 0 without. Where derivatives of
a higher order are asked for, the backward is made of parts that can be differentiated, collectives included.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from batchnorm.functional import Renorm, ghost_batches
from batchnorm.moments import Moments
from batchnorm.torch.collectives import Agreement, Total, gather, total
from batchnorm.torch.ops import is_eager
from batchnorm.torch.portions import Portion, filled_count, measure, narrow_dtype, packed, unpacked, variance_of, x_hat
from batchnorm.torch.rows import full, over_channels

__all__ = ["Shared", "normalize_across", "share"]


class Shared(NamedTuple):
    """Moments of the ghost batches, packed in rows ``(count, mean, m2)``: of this rank and of all ranks together."""

    own: Tensor
    whole: Tensor
    single: bool
    # this rank needs no gradient and another does, whose backward asks all ranks
    asked: bool

    def moments(self) -> Moments:
        """Return the Moments of the whole batch."""
        parts = [Moments(*unpacked(row)) for row in self.whole]
        return parts[0].merge(*parts[1:])

    def correction(self, running: tuple[Tensor, Tensor], bounds: Renorm, eps: float) -> Tensor:
        """Return ``r`` and ``d`` of batch renormalization, ``(ghost batches, 2, C)``."""
        _, mean, _ = unpacked(self.whole)
        old_mean, old_var = (v.to(mean.dtype) for v in running)
        sigma = (old_var + eps).sqrt()
        r = ((variance_of(self.whole) + eps).sqrt() / sigma).clamp(1 / bounds.rmax, bounds.rmax)
        return torch.stack((r, ((mean - old_mean) / sigma).clamp(-bounds.dmax, bounds.dmax)), 1)


class _Plan(NamedTuple):
    eps: float
    parts: list[slice]
    agreement: Agreement


class _Gradients(NamedTuple):
    """Of x and the weights; and this rank's share of those of γ and β."""

    x: Tensor | None
    weight: Tensor | None
    gamma: Tensor
    beta: Tensor


def share(
    x: Tensor, weight: Tensor | None, agreement: Agreement, size: int | None, eps: float, *, derives: bool
) -> Shared:
    """Measure the ghost batches of this rank, and merge each with those of the same number on the other ranks.

    A rank that has fewer of them adds empty ones. A rank that has more than any rank had before says so in place of its
    Moments, and then all ranks gather again. The signs of numbers that are never negative say two things more: that a count
    is the weight of a single value, and that the rank needs gradients.
    """
    x, w = x.detach(), None if weight is None else weight.detach()
    parts = ghost_batches(len(x), size)
    own = torch.stack([packed(measure(x[part], None if w is None else w[part], eps)) for part in parts])
    signs = torch.stack([_sign(x[part], None if w is None else w[part], own) for part in parts])
    # rounding, and NaN as well, may come with a sign of their own
    last = own[:, -1:].abs()
    signed = torch.cat((own[:, :1] * signs, own[:, 1:-1], -last if derives else last), 1)
    if torch.compiler.is_compiling():
        everything = gather(signed, agreement)
    else:
        everything = gather(_filled(signed, agreement.ghosts), agreement)
        needed = 0 if size is None else int(everything[:, 0, 1].where(everything[:, 0, 0].isnan(), 0).max())
        if needed:
            agreement.ghosts = needed
            everything = gather(_filled(signed, needed), agreement)
    own = pad(own, (0, 0, 0, everything.shape[1] - len(own)))
    asked = not derives and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    asked = asked and bool(everything[..., -1].signbit().any())
    return Shared(own, _merged(everything), _is_single(x, w, everything[..., 0]), asked)


def normalize_across(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    shared: Shared,
    agreement: Agreement,
    *,
    weight: Tensor | None = None,
    size: int | None = None,
    correction: Tensor | None = None,
) -> Tensor:
    """Normalize this rank's part of the batch by the Moments of all ranks.

    Args:
        x: ``(N, C, *spatial)``, also empty; what is masked out must be 0.
        gamma: ``(C,)`` or ``None``.
        beta: ``(C,)`` or ``None``.
        eps: added to the variance under the root.
        shared: what `share` found.
        agreement: what `share` was given.
        weight: ``(N, 1, *spatial)``, what each value counts.
        size: of a ghost batch, in samples of a rank.
        correction: ``r`` and ``d`` of batch renormalization.
    """
    plan = _Plan(eps, ghost_batches(len(x), size), agreement)
    # what needs no gradient has no backward, and the others would wait for it
    anchor = x.new_zeros(()).requires_grad_() if shared.asked else None
    y: Tensor = _Across.apply(x, gamma, beta, weight, shared.own, shared.whole, correction, plan, anchor)  # type: ignore[no-untyped-call]
    return y


class _Across(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        weight: Tensor | None,
        own: Tensor,
        whole: Tensor,
        correction: Tensor | None,
        plan: _Plan,
        anchor: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, gamma, weight)
        # run again by activation checkpointing, these constants may have more rows: what is saved would not match
        ctx.constants, ctx.plan, ctx.beta = (own, whole, correction), plan, None if beta is None else beta.dtype
        outputs = []
        for i, part in enumerate(plan.parts):
            gain, offset = _gain(gamma, beta, None if correction is None else correction[i], x)
            outputs.append(Portion.of(x[part], whole[i], plan.eps).normalized(gain, offset))
        return _joined(outputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        (x, gamma, weight), (own, whole, correction) = ctx.saved_tensors, ctx.constants
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            g = _derivable_gradients(dy, x, gamma, weight, own, whole, correction, ctx.plan)
        else:
            needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[3])
            g = _gradients(dy, x, gamma, weight, whole, correction, ctx.plan, needs)
        dgamma = None if gamma is None else g.gamma.to(gamma.dtype)
        return g.x, dgamma, None if ctx.beta is None else g.beta.to(ctx.beta), g.weight, *[None] * 5


def _gradients(
    dy: Tensor,
    x: Tensor,
    gamma: Tensor | None,
    weight: Tensor | None,
    whole: Tensor,
    correction: Tensor | None,
    plan: _Plan,
    needs: tuple[bool, bool],
) -> _Gradients:
    portions = [Portion.of(x[part], whole[i], plan.eps) for i, part in enumerate(plan.parts)]
    sums = torch.stack([portion.sums(dy[part]) for portion, part in zip(portions, plan.parts, strict=True)])
    # every rank takes part, whether or not it needs the result: others do
    totals = total(pad(sums, (0, 0, 0, 0, 0, len(whole) - len(sums))), plan.agreement)
    dx, dw = [], []
    for i, part in enumerate(plan.parts):
        scale = _scale(gamma, None if correction is None else correction[i], whole)
        w = None if weight is None else weight[part]
        if needs[0]:
            dx.append(portions[i].dx(dy[part], w, totals[i], scale))
        if needs[1]:
            dw.append(_dw(x[part], whole[i], totals[i] * scale, plan.eps))
    dgamma, dbeta = _of_parameters(sums, correction)
    return _Gradients(_joined(dx) if dx else None, _joined(dw) if dw else None, dgamma, dbeta)


def _derivable_gradients(
    dy: Tensor,
    x: Tensor,
    gamma: Tensor | None,
    weight: Tensor | None,
    own: Tensor,
    whole: Tensor,
    correction: Tensor | None,
    plan: _Plan,
) -> _Gradients:
    """Return the same, in float64 and of operations that can be differentiated again."""
    wide = [x[part].to(whole.dtype) for part in plan.parts]
    ws = [None if weight is None else weight[part] for part in plan.parts]
    mine = torch.stack([packed(Moments.of(v, "spatial", w)) for v, w in zip(wide, ws, strict=True)])
    mine = pad(mine, (0, 0, 0, len(whole) - len(mine)))
    whole = _Merge.apply(mine, own, whole, plan.agreement)  # type: ignore[no-untyped-call]
    g = [dy[part].to(whole.dtype) for part in plan.parts]
    hats = [x_hat(v, row, plan.eps) for v, row in zip(wide, whole, strict=False)]
    axes = [0, *range(2, x.ndim)]
    sums = torch.stack([torch.stack((a.sum(axes), (a * hat).sum(axes))) for a, hat in zip(g, hats, strict=True)])
    totals = Total.apply(pad(sums, (0, 0, 0, 0, 0, len(whole) - len(sums))), plan.agreement)  # type: ignore[no-untyped-call]
    dx, dw = [], []
    for i, (a, hat, w) in enumerate(zip(g, hats, ws, strict=True)):
        scale = _scale(gamma, None if correction is None else correction[i], whole)
        plain, hatted = (over_channels(v, x) for v in totals[i] / filled_count(whole[i]))
        inv = over_channels((variance_of(whole[i]) + plan.eps).rsqrt() * scale, x)
        dx.append(inv * (a - (1.0 if w is None else w) * (plain + hat * hatted)))
        dw.append(_dw(wide[i], whole[i], totals[i] * scale, plan.eps))
    dgamma, dbeta = _of_parameters(sums, correction)
    return _Gradients(torch.cat(dx).to(x.dtype), None if weight is None else torch.cat(dw), dgamma, dbeta)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class _Merge(torch.autograd.Function):
    """The Moments of all ranks as a function of this rank's; they are known, so only the derivative asks the others."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor, own: Tensor, whole: Tensor, agreement: Agreement) -> Tensor:
        ctx.agreement, merged = agreement, whole.clone()
        ctx.save_for_backward(mine, merged)
        return merged

    @staticmethod
    def backward(ctx: Any, dv: Tensor) -> Any:
        mine, merged = ctx.saved_tensors
        _, dmean, dm2 = unpacked(dv_all := Total.apply(dv, ctx.agreement))  # type: ignore[no-untyped-call]
        count, mean, _ = unpacked(mine)
        d = mean - unpacked(merged)[1]
        share = dmean / filled_count(merged)
        dcount = dv_all[:, :1] + (share * d + dm2 * d**2).sum(1, keepdim=True)
        return torch.cat((dcount, count * (share + 2 * dm2 * d), dm2), 1), None, None, None


def _filled(rows: Tensor, ghosts: int) -> Tensor:
    """Return as many rows as all ranks send; where they do not suffice, the number that would, behind a NaN."""
    if len(rows) <= ghosts:
        return pad(rows, (0, 0, 0, ghosts - len(rows)))
    cry = rows.new_full((ghosts, rows.shape[1]), torch.nan)
    cry[0, 1] = len(rows)
    return cry


def _merged(everything: Tensor) -> Tensor:
    """Merge ``(ranks, ghost batches, 2C + 1)`` in rank order, pair by pair: the same numbers on every rank."""
    count, mean, m2 = unpacked(everything)
    parts = torch.cat((count.abs(), mean, m2.abs()), -1)
    while len(parts) > 1:
        parts = pad(parts, (0, 0, 0, 0, 0, len(parts) % 2))
        both = Moments(*unpacked(parts[::2])).merge(Moments(*unpacked(parts[1::2])))
        parts = torch.cat((both.count, both.mean, both.m2), -1)
    return parts[0]


def _sign(x: Tensor, w: Tensor | None, like: Tensor) -> Tensor:
    """Return -1 where there is one value a channel: its weight, which may be any number, would not tell."""
    if w is None:
        return like.new_full((1,), -1.0 if x.numel() == x.shape[1] else 1.0)
    return 1 - 2 * ((w > 0).sum() == 1).to(like.dtype).reshape(1)


def _is_single(x: Tensor, w: Tensor | None, counts: Tensor) -> bool:
    """Say whether all ranks together hold one value a channel; a rank with more knows that without waiting for a device."""
    if torch.compiler.is_compiling() or (not is_eager(x) and (w is not None or x.numel() > x.shape[1])):
        return False
    return bool(((counts != 0).sum() == 1) & (counts < 0).any())


def _gain(
    gamma: Tensor | None, beta: Tensor | None, correction: Tensor | None, x: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Return ``γ·r`` and ``γ·d + β``."""
    if correction is None:
        return full(gamma, x), full(beta, x)
    r, d = correction
    gain, offset = (r, d) if gamma is None else (gamma.to(r.dtype) * r, gamma.to(r.dtype) * d)
    offset = offset if beta is None else offset + beta.to(r.dtype)
    return gain.to(narrow_dtype(x)), offset.to(narrow_dtype(x))


def _scale(gamma: Tensor | None, correction: Tensor | None, like: Tensor) -> Tensor:
    """Return ``γ·r``, what the gradient is multiplied by."""
    scale = like.new_ones(()) if gamma is None else gamma.to(like.dtype)
    return scale if correction is None else scale * correction[0]


def _dw(x: Tensor, row: Tensor, totals: Tensor, eps: float) -> Tensor:
    """Return the gradient of the values' weights, which move mean and variance."""
    plain, hatted = totals / filled_count(row)
    hat = x_hat(x.to(row.dtype), row, eps)
    var = variance_of(row)
    pull = over_channels(plain, x) * hat + over_channels(hatted, x) * (hat**2 - over_channels(var / (var + eps), x)) / 2
    return -pull.sum(1, keepdim=True)


def _of_parameters(sums: Tensor, correction: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return dγ and dβ of this rank."""
    plain, hatted = sums.unbind(1)
    if correction is not None:
        r, d = correction[: len(sums)].unbind(1)
        hatted = hatted * r + plain * d
    return hatted.sum(0), plain.sum(0)
