"""Normalize a torch batch: by our kernels, by ATen's where they are exact, by the definition where they are not."""

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from batchnorm.arrays import namespace
from batchnorm.functional import Renorm, batch_norm_backward, batch_norm_train
from batchnorm.moments import Moments
from batchnorm.torch import fused, native, operators
from batchnorm.torch.choice import FEW, Running, choose, is_eager
from batchnorm.torch.options import ACTIVATIONS
from batchnorm.torch.rows import FEW_ROWS, are_near, in_rows, normalize_rows, over_channels

__all__ = [
    "evaluate",
    "few_of",
    "followed",
    "has_no_values",
    "is_eager",
    "normalize",
    "normalize_in_place",
    "normalize_weighted",
    "renormalize",
]


# values from which the kernels are quicker, where there are few rows
FEW_IN_ROWS = 3 << 19

# the namespaces that a compiler must find, not look for
for _kind in (Tensor, torch.nn.Parameter):
    namespace(_kind(torch.empty(0)))


def has_no_values(x: Tensor) -> bool:
    """Say whether ``x`` is a shape and a dtype only, outside of a compiler."""
    return not torch.compiler.is_compiling() and (x.is_meta or isinstance(x, FakeTensor))


def normalize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *follow: Any
) -> tuple[Tensor, Moments]:
    """Return ``activation(normalize(x) + residual)`` by the fastest way that is exact, and the Moments of the batch.

    ``follow`` is the residual and the activation, or nothing.
    """
    residual, activation = follow or (None, None)
    if operators.is_kept(x, weight, bias, residual):
        return operators.normalize(x, weight, bias, eps, residual, activation)
    y, moments = _normalize(x, weight, bias, eps)
    return followed(y, residual, activation), moments


def _normalize(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Moments]:
    if peek_interpreter_stack() is not None and not torch.compiler.is_compiling():
        # functorch differentiates to any order and through any nesting, ATen's formulas do not
        step = batch_norm_train(x, weight, bias, eps=eps)
        return step.y, step.moments
    if torch.compiler.is_compiling():
        return native.normalize(x, weight, bias, eps)
    choice = choose(x, weight, bias, None, None, few=few_of(x))
    if choice.name == "definition":
        step = batch_norm_train(x, weight, bias, eps=eps)
        return step.y, step.moments
    if not is_eager(x):
        return native.normalize(x, weight, bias, eps)
    x = native.dense(x)
    if choice.name == "kernel":
        y, found = fused.normalize(x, weight, bias, None, fused.Step(None, eps))
        return y, Moments(x.numel() // x.shape[1], found.mean, found.m2)
    if not in_rows(x) or forward_ad._current_level >= 0:
        return native.normalize(x, weight, bias, eps)
    rows = x.numel() // x.shape[1]
    if rows <= FEW_ROWS:
        y, moments = native.normalize(x, weight, bias, eps)
        if are_near(moments.mean, (moments.variance + eps).rsqrt(), rows):
            return y, moments
    y, moments = normalize_rows(x, weight, bias, eps)
    return y, Moments(moments.count, torch.from_numpy(moments.mean), torch.from_numpy(moments.m2))


def few_of(x: Tensor, residual: Any = None, activation: str | None = None) -> int:
    """Return how many values of such a batch PyTorch's kernels normalize sooner, where nothing follows.

    Few rows are what its kernels are best at, and its node of autograd costs less than one in Python.
    """
    if residual is not None or activation is not None or x.dtype is not torch.float32:
        return FEW
    shape = x.shape
    few = shape[0] <= FEW_ROWS if len(shape) == 2 else in_rows(x) and x.numel() <= FEW_ROWS * shape[1]
    return FEW_IN_ROWS if few else FEW


def followed(y: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
    """Return ``activation(y + residual)``."""
    y = y if residual is None else y + residual
    return y if activation is None else ACTIVATIONS[activation](y)


def evaluate(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float, *follow: Any
) -> Tensor:
    """Return ``activation(normalize(x) + residual)`` by given statistics; ``follow`` is the residual and the activation."""
    residual, activation = follow
    alone = residual is None and activation is None
    if choose(x, weight, bias, residual, None, few=x.numel() + 1 if alone else fused.FEW).name != "kernel":
        return followed(torch.batch_norm(x, weight, bias, mean, var, False, 0.0, eps, False), residual, activation)
    x = native.dense(x)
    fixed = mean.detach().double(), (var.detach().double() + eps).rsqrt()
    return fused.normalize(x, weight, bias, alike(residual, x), fused.Step(activation, eps, fixed))[0]


def alike(residual: Tensor | None, x: Tensor) -> Tensor | None:
    """Return a residual in the layout of ``x``."""
    return None if residual is None else residual.contiguous(memory_format=fused.layout_of(x))


def normalize_in_place(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running: Running,
    eps: float,
    residual: Tensor | None,
    activation: str | None,
) -> Tensor | None:
    """Return ``activation(normalize(x) + residual)`` and move the running statistics, in as few readings as there can be.

    Returns ``None``, and changes nothing, if something is not finite. ``x`` is eager.
    """
    few = few_of(x, residual, activation)
    choice = choose(x, weight, bias, residual, running, few=few, at_hand=True).name
    if choice == "aten":
        y = native.normalize_in_place(x, weight, bias, running, eps)
        return y if y is None else followed(y, residual, activation)
    if choice == "definition":
        return None
    x = native.dense(x)
    fused_y, found = fused.normalize(x, weight, bias, alike(residual, x), fused.Step(activation, eps, None, running))
    return fused_y if found.finite else None


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
    if (sample_weight is not None and sample_weight.requires_grad) or not is_eager(x) or forward_ad._current_level >= 0:
        step = batch_norm_train(
            x, weight, bias, *running, eps=eps, mask=mask, sample_weight=sample_weight,
            virtual_batch_size=virtual_batch_size, renorm=renorm,
        )  # fmt: skip
        return step.y, step.moments
    kept = {"eps": eps, "virtual_batch_size": virtual_batch_size, "renorm": renorm}
    # the running statistics move on before the backward comes
    before = [None if v is None or renorm is None else v.clone() for v in running]
    y, count, mean, m2 = _Definition.apply(x, weight, bias, mask, sample_weight, *before, kept)  # type: ignore[no-untyped-call]
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
    y = y * over_channels(r.detach().to(y.dtype), x) + over_channels(d.detach().to(y.dtype), x)
    y = y if weight is None else y * over_channels(weight, x)
    y = y if bias is None else y + over_channels(bias, x)
    return y.to(x.dtype), moments


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
