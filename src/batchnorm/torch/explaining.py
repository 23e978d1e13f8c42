"""Say which implementation a layer takes for an input, and why, without running it."""

from torch import Tensor

from batchnorm.torch import ops
from batchnorm.torch.choice import FEW, Choice, choose
from batchnorm.torch.fused import kernels
from batchnorm.torch.layers import BatchNorm

__all__ = ["explain"]


def explain(layer: BatchNorm, x: Tensor, residual: Tensor | None = None) -> Choice:
    """Say how a layer would normalize an input: by our kernel, by ATen or by the definition, and why.

    Nothing is computed and no statistic moves. Kernels take batches of the usual dtypes in both layouts; masks, weights and
    the options of a layer are computed by the definition or by ATen.

    Args:
        layer: one of ours.
        x: an input, of which shape, layout, dtype and device matter.
        residual: what would be added.

    Raises:
        KernelError: the kernel is forced, and can't run.

    Example:
        >>> import torch
        >>> from batchnorm.torch import BatchNorm2d
        >>> print(explain(BatchNorm2d(8), torch.zeros(32, 8, 14, 14)))
        kernel: everything fits
        >>> print(explain(BatchNorm2d(8), torch.zeros(2, 8, 4, 4)))
        aten: fewer than 8,192 values: a call costs more than the work
    """
    mean, var, batches = (layer._buffers[name] for name in ("running_mean", "running_var", "num_batches_tracked"))
    running = (mean, var, batches, 0.0) if layer.training and mean is not None and var is not None else None
    few = ops.few_of(x, residual, layer.options.activation) if layer.training else FEW
    choice = choose(x, layer.weight, layer.bias, residual, running, few=few)
    if choice.name == "kernel":
        return Choice("kernel", "; ".join((choice.reason, *kernels().notes())))
    return choice
