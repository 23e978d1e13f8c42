"""Run a torch model in evaluation, and see what reaches its batch normalization layers."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - as everybody calls it
from torch.overrides import TorchFunctionMode

from batchnorm.errors import BatchNormError, DataError
from batchnorm.moments import Moments
from batchnorm.protocol import Measure, Measured, Pair, Statistics, note
from batchnorm.torch.batches import caller, moved, samples_of
from batchnorm.torch.evaluation import untraced
from batchnorm.torch.layers import BatchNorm
from batchnorm.torch.statistics import discovered
from batchnorm.torch.sums import moments_of
from batchnorm.torch.weights import Weights

__all__ = ["measuring"]

_ATEN = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "cudnn_enabled")
# what normalizes, and the names of its arguments; the last kind is what programs of torch.export call
_CALLS: dict[Any, tuple[str, ...]] = {
    F.batch_norm: ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    torch.batch_norm: _ATEN,
    torch.native_batch_norm: _ATEN[:-1],
    torch.ops.aten.batch_norm.default: _ATEN,
    torch.ops.aten.native_batch_norm.default: _ATEN[:-1],
    torch.ops.aten._native_batch_norm_legit.default: _ATEN[:-1],
    torch.ops.aten._native_batch_norm_legit_no_training.default: (*_ATEN[:5], "momentum", "eps"),
}


@contextmanager
def measuring(
    model: nn.Module, statistics: list[Statistics], forward: Callable[..., Any] | None, device: Any
) -> Iterator[Measure]:
    """Put a model into evaluation and yield what runs a batch; on exit modes, hooks and random generators are as before."""
    watch = _Watch(model, statistics)
    run = caller(model, forward)
    first = next((v for v in (*model.parameters(), *model.buffers()) if v.is_floating_point()), torch.empty(0))
    place = torch.device(device) if device is not None else first.device

    def measure(batch: Any, use: Mapping[Statistics, Pair] | None) -> Measured:
        watch.start(use)
        try:
            batch = moved(batch, place, first.dtype)
            with watch:
                run(batch)
        except BatchNormError:
            raise
        except Exception as error:
            raise DataError(
                f"the model must take the batches of the data (give forward=, where it is called in another way), but it "
                f"failed: {type(error).__name__}: {error}"
            ) from error
        return Measured(samples_of(batch), watch.found)

    with ExitStack() as stack:
        stack.enter_context(untraced(model))
        if "torch._dynamo" in sys.modules:
            # compiled parts would not be seen
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(watch.layers())
        yield measure


class _Watch(TorchFunctionMode):
    """Stands before every call that normalizes: measures its input, and lets it use other statistics."""

    def __init__(self, model: nn.Module, statistics: list[Statistics]) -> None:
        super().__init__()
        self.model = model
        kept = [one for one in statistics if one.key is not None]
        self.known = {id(one.key.mean): one for one in kept}
        self.ours = {one.key.module: one for one in kept if not one.fixed and isinstance(one.key.module, BatchNorm)}
        self.buffers = {id(buffer) for buffer in model.buffers()}
        self.centres: dict[Statistics, np.ndarray] = {}
        self.start(None)

    def start(self, use: Mapping[Statistics, Pair] | None) -> None:
        """Forget the last batch."""
        self.use = use
        self.found: dict[Statistics, Moments] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        names = _CALLS.get(func)
        if names is None:
            return func(*args, **kwargs)
        given = dict(zip(names, args, strict=False)) | kwargs
        one = self._statistics_of(given)
        if one is not None:
            given["running_mean"], given["running_var"] = self._note(one, given["input"])
        return func(**given)

    def _statistics_of(self, given: dict[str, Any]) -> Statistics | None:
        mean, var = given.get("running_mean"), given.get("running_var")
        if mean is None or var is None or id(mean) not in self.buffers or id(var) not in self.buffers:
            return None
        if id(mean) not in self.known:
            self.known[id(mean)] = discovered(self.model, mean, var, given.get("eps", 1e-5))
        one = self.known[id(mean)]
        return None if one.fixed else one

    def _note(self, one: Statistics, x: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Measure an input, and return the statistics that it is to be normalized by."""
        if weights is None:
            moments = moments_of(x, self.centres.get(one))
        else:
            found = Moments.of(x, "spatial", weights)
            count = torch.as_tensor(found.count).max().item()
            moments = Moments(count, found.mean.cpu().numpy(), found.m2.cpu().numpy())
        note(self.found, one, moments)
        if moments.count:
            self.centres[one] = moments.mean
        mean, var = one.key[:2]
        # a single value has no variance
        own = (moments.mean, moments.variance) if moments.count > 1 else None
        pair = own if self.use is None else self.use.get(one)
        if pair is None:
            # copies, which are not known here: a layer of ours would be measured a second time
            return mean.clone(), var.clone()
        return torch.as_tensor(pair[0]).to(mean), torch.as_tensor(pair[1]).to(var)

    @contextmanager
    def layers(self) -> Iterator[None]:
        """Watch our own layers, which may weigh their inputs."""
        hooks: list[Any] = []
        kept: dict[nn.Module, dict[str, Any]] = {}

        def before(layer: Any, args: Any, kwargs: Any) -> None:
            x, one = (args[0] if args else kwargs["x"]), self.ours[layer]
            given = dict(zip(("mask", "sample_weight"), args[1:3], strict=False)) | kwargs
            weights = Weights.read(x, *(given.get(name) for name in ("mask", "sample_weight", "lengths")))
            buffers = dict(layer._buffers)
            pair = self._note(one, x, weights.over_places(x))
            names = [name for old in one.key[:2] for name, buffer in buffers.items() if buffer is old]
            kept[layer] = buffers
            layer._buffers.update(zip(names, pair, strict=True))

        def after(layer: Any, *_: Any) -> None:
            layer._buffers.update(kept.pop(layer, {}))

        try:
            for layer in self.ours:
                hooks += [
                    layer.register_forward_pre_hook(before, with_kwargs=True),
                    layer.register_forward_hook(after, always_call=True),
                ]
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for module, buffers in kept.items():
                module._buffers.update(buffers)
