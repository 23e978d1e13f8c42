"""Drop-in layers: subclasses of torch's own, with the same ``state_dict``, running on ATen's kernels."""

from torch import nn

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]


class BatchNorm1d(nn.BatchNorm1d):
    """Normalize each feature over the batch, and over the sequence where there is one.

    ::

        training:    y = γ · (x - μ_B) / √(σ²_B + ε) + β       running = (1 - momentum) · running + momentum · batch
        evaluation:  y = γ · (x - running_mean) / √(running_var + ε) + β

    The batch is normalized with its biased variance; the running variance is the unbiased one. Checkpoints of
    ``torch.nn.BatchNorm1d`` load, and the other way round.

    Args:
        num_features: C, of an input ``(N, C)`` or ``(N, C, L)``.
        eps: added to the variance under the root.
        momentum: weight of the new batch in the running statistics; ``None`` averages all batches alike.
        affine: learn γ and β.
        track_running_stats: keep running statistics; without them evaluation uses the batch too.
        device: of the parameters and statistics.
        dtype: of the parameters and statistics.
        bias: learn β beside γ.

    Raises:
        ValueError: an input of another rank, or one value a channel in training.

    Example:
        >>> import torch
        >>> BatchNorm1d(1, eps=3.0)(torch.tensor([[1.0], [3.0]])).tolist()
        [[-0.5], [0.5]]

    Reference:
        Ioffe, Szegedy: Batch Normalization, 2015 (arXiv:1502.03167).
    """


class BatchNorm2d(nn.BatchNorm2d):
    """Normalize each channel of ``(N, C, H, W)`` over the batch and all places; see `BatchNorm1d` for the equations.

    Args:
        num_features: C, of an input ``(N, C, H, W)``.
        eps: added to the variance under the root.
        momentum: weight of the new batch in the running statistics; ``None`` averages all batches alike.
        affine: learn γ and β.
        track_running_stats: keep running statistics; without them evaluation uses the batch too.
        device: of the parameters and statistics.
        dtype: of the parameters and statistics.
        bias: learn β beside γ.

    Raises:
        ValueError: an input of another rank, or one value a channel in training.

    Example:
        >>> import torch
        >>> BatchNorm2d(3)(torch.zeros(2, 3, 4, 4)).shape
        torch.Size([2, 3, 4, 4])

    Reference:
        Ioffe, Szegedy: Batch Normalization, 2015 (arXiv:1502.03167), section 3.2.
    """


class BatchNorm3d(nn.BatchNorm3d):
    """Normalize each channel of ``(N, C, D, H, W)`` over the batch and all places; see `BatchNorm1d` for the equations.

    Args:
        num_features: C, of an input ``(N, C, D, H, W)``.
        eps: added to the variance under the root.
        momentum: weight of the new batch in the running statistics; ``None`` averages all batches alike.
        affine: learn γ and β.
        track_running_stats: keep running statistics; without them evaluation uses the batch too.
        device: of the parameters and statistics.
        dtype: of the parameters and statistics.
        bias: learn β beside γ.

    Raises:
        ValueError: an input of another rank, or one value a channel in training.

    Example:
        >>> import torch
        >>> BatchNorm3d(3)(torch.zeros(2, 3, 4, 4, 4)).shape
        torch.Size([2, 3, 4, 4, 4])

    Reference:
        Ioffe, Szegedy: Batch Normalization, 2015 (arXiv:1502.03167), section 3.2.
    """
