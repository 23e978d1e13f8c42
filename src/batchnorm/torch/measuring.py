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
from batchnorm.torch.watching import LinearOutputs, fits, input_of, piece_of, weights_of

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
    model: nn.Module,
    statistics: list[Statistics],
    forward: Callable[..., Any] | None,
    device: Any,
    *,
    every: bool = False,
) -> Iterator[Measure]:
    """Put a model into evaluation and yield what runs a batch; on exit modes, hooks and random generators are as before.

    With ``every``, layers are watched that do not move too, and pieces of the first batch's inputs are kept.
    """
    watch = _Watch(model, statistics, every=every)
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
        return Measured(samples_of(batch), watch.found, watch.inputs, watch.linear)

    with ExitStack() as stack:
        stack.enter_context(untraced(model))
        if "torch._dynamo" in sys.modules:
            # compiled parts would not be seen
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(watch.layers())
        yield measure


class _Watch(TorchFunctionMode):
    """Stands before every call that normalizes: measures its input, and lets it use other statistics."""

    def __init__(self, model: nn.Module, statistics: list[Statistics], *, every: bool) -> None:
        super().__init__()
        self.model = model
        self.every = every
        kept = [one for one in statistics if one.key is not None]
        self.known = {id(one.key.mean): one for one in kept}
        modules = {type(model).__name__: model} | dict(model.named_modules())
        owners = {one: modules[one.name] if one.key is None else one.key.module for one in statistics}
        self.watched = {
            owner: one
            for one, owner in owners.items()
            if (every and one.fixed) or (isinstance(owner, BatchNorm) and not one.fixed)
        }
        self.buffers = {id(buffer) for buffer in model.buffers()}
        self.centres: dict[Statistics, np.ndarray] = {}
        self.first = every
        self.outputs = LinearOutputs()
        self.start(None)

    def start(self, use: Mapping[Statistics, Pair] | None) -> None:
        """Forget the last batch."""
        self.use = use
        self.first = self.every and not self.centres
        self.outputs.made.clear()
        self.found: dict[Statistics, list[Moments]] = {}
        self.inputs: dict[Statistics, np.ndarray] = {}
        self.linear: dict[Statistics, str] = {}

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
        return one if self.every or not one.fixed else None

    def _note(self, one: Statistics, x: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Measure an input, and return the statistics that it is to be normalized by."""
        self._measure(one, x, weights)
        mean, var = one.key[:2]
        moments = self.found[one][-1]
        # a single value has no variance
        own = (moments.mean, moments.variance) if moments.count > 1 and not one.fixed else None
        pair = own if self.use is None else self.use.get(one)
        if pair is None:
            # copies, which are not known here: a layer that is watched would be measured a second time
            return mean.clone(), var.clone()
        return torch.as_tensor(pair[0]).to(mean), torch.as_tensor(pair[1]).to(var)

    def _measure(self, one: Statistics, x: Tensor, weights: Tensor | None) -> None:
        if self.first and one not in self.found:
            self._look(one, x, whole=weights is None)
        moments = moments_of(x, self.centres.get(one), weights)
        note(self.found, one, moments)
        if moments.count:
            self.centres[one] = moments.mean

    def _look(self, one: Statistics, x: Tensor, *, whole: bool) -> None:
        """Keep a piece of what reaches a layer first, and the name of the linear layer that has made it."""
        if whole and x.numel():
            self.inputs[one] = piece_of(x)
        if name := self.outputs.maker(x):
            self.linear[one] = name

    @contextmanager
    def layers(self) -> Iterator[None]:
        """Watch our own layers, which may weigh their inputs, and those that a function would not be seen of."""
        hooks: list[Any] = []
        kept: dict[nn.Module, dict[str, Any]] = {}

        def before(layer: Any, args: Any, kwargs: Any) -> None:
            x, one = input_of(args, kwargs), self.watched[layer]
            if not isinstance(layer, BatchNorm) and not fits(one, x):
                return
            weights = weights_of(layer, args, kwargs)
            if one.key is None:
                self._measure(one, x, weights)
                return
            pair = self._note(one, x, weights)
            buffers = dict(layer._buffers)
            names = [name for old in one.key[:2] for name, buffer in buffers.items() if buffer is old]
            kept[layer] = buffers
            layer._buffers.update(zip(names, pair, strict=True))

        def after(layer: Any, *_: Any) -> None:
            layer._buffers.update(kept.pop(layer, {}))

        try:
            for layer in self.watched:
                hooks += [
                    layer.register_forward_pre_hook(before, with_kwargs=True),
                    layer.register_forward_hook(after, always_call=True),
                ]
            if self.every:
                hooks += self.outputs.hooks(self.model)
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for module, buffers in kept.items():
                module._buffers.update(buffers)
