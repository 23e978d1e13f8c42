"""A layer with nothing switched on: the short way, in one go."""

from typing import Any

from torch import Tensor
from torch._C import _current_graph_task_id

from batchnorm.torch import ops
from batchnorm.torch.choice import is_eager

__all__ = ["forward_plain"]


def forward_plain(layer: Any, x: Tensor, residual: Tensor | None, activation: str | None) -> Tensor | None:
    """Do it in one go; ``None`` where that is not exact, not possible or not right."""
    if not is_eager(x) or (residual is not None and residual.shape != x.shape):
        return None
    channels, values = x.shape[1], x.numel()
    # a dict is quicker to ask than a module
    parameters, buffers, eps = layer._parameters, layer._buffers, layer.eps
    if channels != layer.num_features or values == 0 or "weight" not in parameters or eps <= 0:
        return None
    weight, bias = parameters["weight"], parameters["bias"]
    mean, var, batches = buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
    if mean is None or var is None or batches is None:
        return None
    if not layer.training:
        return ops.evaluate(x, weight, bias, mean, var, eps, residual, activation)
    momentum = layer.momentum
    if values == channels or mean.element_size() < 4 or not layer.track_running_stats or callable(momentum):
        return None
    if momentum is None:
        momentum = 1 / (batches.item() + 1)
    running = (mean, var, batches, momentum)
    if _current_graph_task_id() != -1:
        # run again by activation checkpointing: the same kernel as the first time, on copies: what it saves must match
        running = (mean.clone(), var.clone(), None, momentum)
    return ops.normalize_in_place(x, weight, bias, running, eps, residual, activation)
