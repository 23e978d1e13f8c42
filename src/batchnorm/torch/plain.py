"""A layer with nothing switched on: the short way, in one go."""

from typing import Any

import torch
from torch import Tensor

from batchnorm.torch import ops

__all__ = ["forward_plain"]


def forward_plain(layer: Any, x: Tensor, *follow: Any) -> Tensor | None:
    """Do it in one go; ``None`` where that is not exact, not possible or not right."""
    residual: Tensor | None = follow[0]
    if not ops.is_eager(x) or (residual is not None and residual.shape != x.shape):
        return None
    channels, values = x.shape[1], x.numel()
    # a dict is quicker to ask than a module
    parameters, buffers = layer._parameters, layer._buffers
    if channels != layer.num_features or values == 0 or "weight" not in parameters or layer.eps <= 0:
        return None
    weight, bias = parameters["weight"], parameters["bias"]
    mean, var, batches = buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
    if mean is None or var is None or batches is None:
        return None
    if not layer.training:
        return ops.evaluate(x, weight, bias, mean, var, layer.eps, *follow)
    if values == channels or mean.element_size() < 4 or not layer.track_running_stats:
        return None
    momentum = 1 / (batches.item() + 1) if layer.momentum is None else layer.momentum
    if callable(momentum):
        return None
    if torch._C._current_graph_task_id() != -1:
        # run again by activation checkpointing: the same kernel as the first time, on copies: what it saves must match
        copies = mean.clone(), var.clone(), None, momentum
        return ops.normalize_in_place(x, weight, bias, copies, layer.eps, *follow)
    return ops.normalize_in_place(x, weight, bias, (mean, var, batches, momentum), layer.eps, *follow)
