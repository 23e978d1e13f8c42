"""Look at the batch normalization of a model while it is trained."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from batchnorm.errors import OptionError
from batchnorm.history import History, check_every
from batchnorm.moments import Moments
from batchnorm.observed import Observed, Part, json_ready, judged, normalizing, outputs, rounding
from batchnorm.protocol import Statistics
from batchnorm.states import NormState, Rate
from batchnorm.torch.rates import rates
from batchnorm.torch.states import states
from batchnorm.torch.statistics import stored, unwrapped
from batchnorm.torch.sums import moments_of
from batchnorm.torch.watching import LinearOutputs, fits, input_of, piece_of, weights_of

__all__ = ["Monitor"]


class Monitor:
    """Observe the batch normalization of a model in every so many-th step of a training, without a second forward pass.

    A step is a call of the model in training mode. In the steps that are observed, hooks read what reaches each layer and hold
    it against the running statistics as they stand before the step, as `observe` does for a data set. Outputs, gradients,
    running statistics and random numbers are those of a training without it; between observed steps only the steps are
    counted. A model that ``torch.compile(model)`` has returned runs eagerly in observed steps, and compiled in all others.

    Numbers of each layer: ``distance`` (KL divergence of the batch from the running statistics, nats a channel), ``dead``,
    ``off`` and ``saturated`` (shares), ``gamma`` (mean |γ|), ``values`` (of a channel that were normalized together). With an
    optimizer, of each linear layer whose output reaches a layer as it is (of all, where there is none): ``effective_rate``,
    lr / ‖w‖², and ``gradient``, ‖g‖ / ‖w‖, both right before the optimizer moves the weights.

    Args:
        model: any module, also in ``DistributedDataParallel`` (each rank sees its own batch: give one of them the folder).
        log_dir: a folder for TensorBoard: all numbers as scalars, and as histograms γ, β, running mean and variance and a piece
            of the inputs; ``None`` to write nothing. Needs ``pip install 'batchnorm[monitor]'``.
        every: observe each so many-th step, the first one included.
        optimizer: the one that trains the model.

    Attributes:
        history: a dict for each observed step: ``step``, ``layers`` and ``weights``, each with numbers by name. What is not
            finite, or can't be known, is ``None``.

    Raises:
        OptionError: a model or optimizer of another kind, or one that ``model.compile()`` has compiled in place.
        MissingDependencyError: ``log_dir`` is given, and what writes it is not installed.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with Monitor(model, every=2, optimizer=optimizer) as monitor:
        ...     for _ in range(4):
        ...         model(torch.randn(8, 4)).square().mean().backward()
        ...         optimizer.step()
        >>> [record["step"] for record in monitor.history]
        [0, 2]
        >>> list(monitor.history[0]["layers"]), list(monitor.history[0]["weights"])
        (['1'], ['0'])

    Reference:
        Effective learning rate: van Laarhoven 2017 (arXiv:1706.05350).
    """

    def __init__(
        self, model: nn.Module, log_dir: str | Path | None = None, every: int = 50, optimizer: Any = None
    ) -> None:
        if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
            raise OptionError(f"model must be a torch.nn.Module, got a {type(model).__name__}")
        self.model, self.every, self.optimizer = model, check_every(every), optimizer
        if optimizer is not None:
            rates(unwrapped(model), optimizer)
        self._kept = History(log_dir)
        self._step = 0
        self._linear: dict[str, str] = {}
        self._pending: int | None = None
        self._hooks: list[Any] = []
        self._observing: _Step | None = None

    @property
    def history(self) -> list[dict[str, Any]]:
        """The records so far."""
        return self._kept.records

    def to_dict(self) -> dict[str, Any]:
        """Return the history, ready for JSON."""
        return {"every": self.every, "history": [dict(record) for record in self.history]}

    def __enter__(self) -> Self:
        if getattr(self.model, "_compiled_call_impl", None) is not None:
            raise OptionError(
                "model must not be compiled in place, its hooks are not called any more: use torch.compile(model), and give "
                "the monitor what it returns"
            )
        self._hooks = [
            self.model.register_forward_pre_hook(_Hook(self, "_before"), with_kwargs=True),
            self.model.register_forward_hook(_Hook(self, "_after"), always_call=True),
        ]
        if self.optimizer is not None:
            self._hooks.append(self.optimizer.register_step_pre_hook(self._before_step))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._end()
        self._kept.close()

    def _before(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        if not model.training or self._observing is not None or any(map(is_lazy, model.parameters())):
            return
        if self._step % self.every == 0:
            self._observing = _Step(unwrapped(self.model))
            # hooks that a running call is given come too late for it
            self._observing.see(model, args, kwargs)
        self._step += 1

    def _after(self, model: nn.Module, _: Any, result: Any) -> None:
        observing = self._end()
        failed = result is None and sys.exc_info()[0] is not None
        if observing is None or failed:
            return
        found, step = observing.found(), self._step - 1
        self._linear |= {one.linear: one.layer for one in found if one.linear}
        self._kept.add(step, {one.layer: _numbers(one) for one in found}, {one.layer: _arrays(one) for one in found})
        self._pending = step if self.optimizer is not None else None

    def _end(self) -> "_Step | None":
        observing, self._observing = self._observing, None
        if observing is not None:
            observing.close()
        return observing

    def _before_step(self, optimizer: Any, *_: Any) -> None:
        if self._pending is None:
            return
        found = rates(unwrapped(self.model), optimizer, tuple(self._linear))
        self._kept.add_weights(self._pending, {rate.layer: _rate(rate) for rate in found})
        self._pending = None


class _Hook:
    """What a module calls; a copy of the module, or a pickled one, is not observed and does not hold the monitor."""

    def __init__(self, monitor: Monitor | None = None, method: str = "") -> None:
        self.monitor, self.method = monitor, method

    def __call__(self, *given: Any) -> None:
        if self.monitor is not None:
            getattr(self.monitor, self.method)(*given)

    def __deepcopy__(self, _: Any) -> "_Hook":
        return _Hook()

    def __reduce__(self) -> Any:
        return _Hook, ()


class _Step:
    """One forward pass that is observed, with hooks that are there for so long."""

    def __init__(self, model: nn.Module) -> None:
        self.ulp = _ulp(model)
        self.known = {state.name: state for state in states(model)}
        self.calls: dict[Statistics, list[Moments]] = {}
        self.inputs: dict[Statistics, np.ndarray] = {}
        self.linear: dict[Statistics, str] = {}
        self.outputs = LinearOutputs()
        self.owners: dict[nn.Module, Statistics] = {}
        with ExitStack() as stack:
            if "torch._dynamo" in sys.modules:
                # compiled parts would not be seen
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            for hook in (*self.outputs.hooks(model), *self._layer_hooks(model)):
                stack.callback(hook.remove)
            self.stack = stack.pop_all()

    def _layer_hooks(self, model: nn.Module) -> Iterator[Any]:
        modules = {type(model).__name__: model} | dict(model.named_modules())
        for one in stored(model):
            owner = modules[one.name] if one.key is None else one.key.module
            self.owners[owner] = one
            yield owner.register_forward_pre_hook(self.see, with_kwargs=True)

    def see(self, layer: nn.Module, args: Any, kwargs: Any) -> None:
        """See a call of a layer; calls of other modules are none of ours."""
        one, x = self.owners.get(layer), input_of(args, kwargs)
        # what does not fit is told by the layer itself
        if one is not None and fits(one, x):
            with torch.no_grad(), np.errstate(all="ignore"):
                self._see(one, x, weights_of(layer, args, kwargs))

    def _see(self, one: Statistics, x: torch.Tensor, weights: torch.Tensor | None) -> None:
        if one not in self.calls:
            self.linear[one] = self.outputs.maker(x)
            if weights is None and x.numel():
                self.inputs[one] = piece_of(x)
        self.calls.setdefault(one, []).append(moments_of(x, weights=weights))

    def close(self) -> None:
        """Take the hooks away."""
        self.stack.close()

    def found(self) -> list[Observed]:
        """Return what was seen of the layers that values have reached."""
        with np.errstate(all="ignore"):
            return [self._judged(one, calls) for one, calls in self.calls.items() if any(m.count > 0 for m in calls)]

    def _judged(self, one: Statistics, calls: list[Moments]) -> Observed:
        state: NormState | None = self.known.get(one.name)
        gamma, beta, eps = (None, None, one.eps) if state is None else (state.gamma, state.beta, state.eps)
        off = saturated = None
        inputs = self.inputs.get(one)
        if inputs is not None:
            off, saturated = outputs(inputs, normalizing(one, calls[0], by_batch=True), gamma, beta, eps)
        values = min(float(m.count) for m in calls if m.count > 0)
        part = Part(tuple(calls), Moments.empty().merge(*calls).m2, values, off, saturated, self.linear[one])
        return judged(one, part, ulp=self.ulp, gamma=gamma, beta=beta, eps=eps, inputs=inputs)


def _ulp(model: nn.Module) -> float:
    first = next((v for v in (*model.parameters(), *model.buffers()) if v.is_floating_point()), torch.empty(0))
    return rounding(str(first.dtype).removeprefix("torch."))


def _numbers(one: Observed) -> dict[str, float | None]:
    sound = bool(np.isfinite(one.mean).all() and np.isfinite(one.variance).all())
    return {
        "distance": json_ready(one.distance),
        "dead": one.dead,
        "off": one.off if sound else None,
        "saturated": one.saturated if sound else None,
        "gamma": None if one.gamma is None else json_ready(float(np.abs(one.gamma).mean())),
        "values": one.values,
    }


def _arrays(one: Observed) -> dict[str, np.ndarray | None]:
    return {
        "gamma_of_channels": one.gamma,
        "beta_of_channels": one.beta,
        "running_mean": one.stored_mean,
        "running_variance": one.stored_variance,
        "input": one.inputs,
    }


def _rate(rate: Rate) -> dict[str, float | None]:
    return {"effective_rate": json_ready(rate.effective), "gradient": json_ready(rate.gradient)}
