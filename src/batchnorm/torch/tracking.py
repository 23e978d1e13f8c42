"""Running statistics: which ones, how fast they move, and when they must not."""

import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack

from batchnorm.errors import BatchNormWarning, OptionError, TransformError
from batchnorm.functional import Renorm, ghost_batches, update_running
from batchnorm.moments import Moments
from batchnorm.torch.collectives import Agreement, agree
from batchnorm.torch.naming import describe, path_of
from batchnorm.torch.ops import has_no_values, is_eager
from batchnorm.torch.options import Options

__all__ = ["Tracking", "recomputing"]

# of one step; a layer is rarely called more often before its backward
REMEMBERED_FORWARDS = 256


def recomputing() -> bool:
    """Say whether this forward runs inside a backward pass: activation checkpointing is doing it for the second time."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


@contextmanager
def _explaining_transforms() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if torch.compiler.is_compiling() or peek_interpreter_stack() is None:
            raise
        raise TransformError(
            f"torch.func can't read or write running statistics that it was not given, or count by them ({error}): pass the "
            "buffers to functional_call (vmap: stacked, and no schedule), or freeze(model), or track_running_stats=False"
        ) from error


class Tracking(nn.Module):
    """The running statistics of a layer; mixed into a module with torch's buffers.

    A step of weight ``w`` is ``running = (1 - w) · running + w · batch``. The weight is the momentum, or ``1 / t`` at step t
    where the momentum is ``None``, or a schedule's value; debiased it is ``momentum / (1 - (1 - momentum)^t)``, which is 1 at
    the first step: the initial mean 0 and variance 1 leave no trace.
    """

    options: Options = Options()
    frozen_statistics: bool = False
    momentum: Any
    track_running_stats: bool
    # what batches have given since `accumulate` began, by domain; None outside of it
    _collected: dict[str | None, Moments] | None = None
    # which of γ and β needed a gradient before they were frozen
    _frozen_affine: dict[str, bool] | None = None
    _domain: str | None = None
    _warned: bool = False
    _skipped: Tensor | None = None
    _seen: Any = None
    _seen_again: bool = False
    _agreement: Agreement | None = None

    def _make_state(self) -> None:
        """Register the statistics of domains, and start to count."""
        if self._skipped is None:
            # not a buffer: programs that pair the buffers of two models would find one too many
            like = self._buffers.get("running_mean")
            self._skipped = torch.zeros((), dtype=torch.long, device=None if like is None else like.device)
        for domain in self.options.domains:
            if f"running_mean_{domain}" not in self._buffers:
                self._add_domain(domain)

    def _add_domain(self, domain: str) -> None:
        """Give a domain statistics that start where those of the layer are."""
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            source = self._buffers[name]
            assert source is not None  # noqa: S101 - options with domains exclude track_running_stats=False
            self.register_buffer(f"{name}_{domain}", source.clone())

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items() if self.options.wide_statistics else ():
            new = self._buffers[name]
            if old is not None and new is not None and new.is_floating_point() and new.element_size() < 4:
                self._buffers[name] = old.to(new.device)
        self._skipped = None if self._skipped is None else fn(self._skipped)
        return self

    @property
    def skipped_updates(self) -> int:
        """Number of batches with inf or NaN, which the running statistics were kept from."""
        return 0 if self._skipped is None or self._skipped.is_meta else int(self._skipped)

    @property
    def domain(self) -> str | None:
        """The domain whose running statistics are in use; ``None`` is the layer's own."""
        return self._domain

    @domain.setter
    def domain(self, name: str | None) -> None:
        if name is not None and name not in self.options.domains:
            raise OptionError(f"domain must be None or one of {self.options.domains}, got {name!r}: add_domains first")
        self._domain = name
        self.settle()

    @property
    def is_collecting(self) -> bool:
        """Whether batches are collected for one update at the end."""
        return self._collected is not None

    def start_collecting(self) -> None:
        """Keep the Moments of the batches that follow, and leave the running statistics alone."""
        self._collected = {}
        self.settle()

    def stop_collecting(self, *, update: bool) -> None:
        """Use what was collected for one update of each domain, or throw it away."""
        collected, self._collected, chosen = self._collected or {}, None, self._domain
        for self._domain, moments in collected.items() if update else ():
            self._update(moments)
        self.domain = chosen

    def settle(self) -> None:
        """Choose the way of the next forwards; called after every change of state."""

    def running(self) -> tuple[Any, Any, Any]:
        """Return running mean, running variance and number of batches of the domain that is chosen."""
        suffix = "" if self._domain is None else f"_{self._domain}"
        names = ("running_mean", "running_var", "num_batches_tracked")
        mean, var, batches = (self._buffers.get(name + suffix) for name in names)
        return mean, var, batches

    def normalizes_by_batch(self) -> bool:
        """Say whether the next forward takes the batch's statistics."""
        return (self.training and not self.frozen_statistics) or self._buffers.get("running_mean") is None

    def _group(self, x: Tensor) -> Any:
        """Return the process group whose statistics the next forward takes; ``None`` is this process alone.

        Raises:
            DistributedError: the layer is synchronized and in training, and there is no group.
        """
        given = self.options.process_group
        if given is None or not self.training or self.frozen_statistics or has_no_values(x):
            return None
        group = given.resolve()
        if group.size() == 1:
            return None
        if not torch.compiler.is_compiling() and (
            peek_interpreter_stack() is not None or torch._C._get_tracing_state() is not None
        ):
            raise TransformError(
                "torch.func and torch.jit.trace can't follow a batch to other processes: unsync(model)"
            )
        return group

    def _agree(self, x: Tensor, group: Any) -> Agreement:
        """Make sure, once, that the ranks of a group call the same layer.

        Raises:
            DistributedError: they do not.
        """
        size = self.options.virtual_batch_size
        if torch.compiler.is_compiling():
            return Agreement(group, type(self).__name__)
        if self._agreement is None or self._agreement.group is not group:
            options = {name: v for name, v in self.options.changed().items() if name != "process_group"}
            kind = f"{type(self).__name__}({self.num_features}, eps={self.eps}, {x.dtype}, {options})"
            self._agreement = agree(group, path_of(self), kind, len(ghost_batches(len(x), size)), x.device)
        return self._agreement

    def observe(self, moments: Moments) -> None:
        """Move the running statistics by one batch, unless it is seen for the second time or is not finite."""
        moves = self.training and self.track_running_stats and not self.frozen_statistics
        if not moves or self._buffers.get("running_mean") is None or recomputing():
            return
        moments = Moments(moments.count, moments.mean.detach(), moments.m2.detach())
        if not is_eager(moments.mean):
            self._update_branch_free(moments)
        elif not self._is_sound(moments):
            self.skip_update()
        elif self._collected is None:
            self._update(moments)
        else:
            self._collected[self._domain] = self._collected.get(self._domain, Moments.empty()).merge(moments)

    def steps(self, batches: Tensor) -> int:
        """Return the number of batches so far, which schedules are read by; 0 where numbers have no values."""
        with _explaining_transforms():
            return 0 if batches.is_meta else int(batches)

    def step_weight(self, steps: int) -> float:
        """Return the weight of the batch that follows ``steps`` others."""
        if self.momentum is None:
            return 1 / (steps + 1)
        momentum = float(self.momentum(steps)) if callable(self.momentum) else float(self.momentum)
        if not self.options.debias or momentum <= 0:
            return momentum
        # rounding must not leave a trace of the initial values either
        return min(1.0, momentum / (1 - (1 - momentum) ** (steps + 1)))

    def skip_update(self) -> None:
        """Count a batch that was left out, and say so once."""
        self._skipped = torch.zeros((), dtype=torch.long) if self._skipped is None else self._skipped
        self._skipped.add_(1)
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{describe(self)}: a batch with inf or NaN was left out of the running statistics (and so will others, "
                "counted in .skipped_updates): look for what made it, here or in a layer before",
                BatchNormWarning,
                stacklevel=2,
            )

    def _is_sound(self, moments: Moments) -> bool:
        dtype = self.running_mean.dtype
        spread = moments.variance.to(dtype) + moments.mean.to(dtype)
        return bool(torch.isfinite(spread).all())

    def _update(self, moments: Moments) -> None:
        mean, var, batches = self.running()
        if not bool(torch.as_tensor(moments.count > 0).any()):
            return
        new_mean, new_var = self._moved(mean, var, moments, 1 - self.step_weight(int(batches)))
        mean.copy_(new_mean)
        var.copy_(new_var)
        batches.add_(1)

    def _update_branch_free(self, moments: Moments) -> None:
        """Update where a look at the values would break a graph or wait for a device: the choice is made by numbers."""
        mean, var, batches = self.running()
        new_mean, new_var = self._moved(mean, var, moments, 1 - self._step_weight_of(batches))
        count = torch.as_tensor(moments.count, device=mean.device)
        seen = (count > 0).any()
        sound = torch.isfinite(new_mean).all() & torch.isfinite(new_var).all()
        with _explaining_transforms():
            for old, new in ((mean, new_mean), (var, new_var), (batches, batches + 1)):
                old.copy_(torch.where(sound & seen, new, old))
        if self._skipped is not None and not torch.compiler.is_exporting() and peek_interpreter_stack() is None:
            self._skipped.add_((~sound).long())

    def _step_weight_of(self, batches: Tensor) -> Any:
        if callable(self.momentum):
            return self.step_weight(self.steps(batches))
        if self.momentum is None:
            return 1 / (batches + 1).double()
        if not self.options.debias:
            return self.momentum
        return (self.momentum / (1 - (1 - self.momentum) ** (batches + 1).double())).clamp(max=1.0)

    def _moved(self, mean: Any, var: Any, moments: Moments, decay: Any) -> tuple[Tensor, Tensor]:
        kept = {"unbiased": self.options.unbiased, "total_variance": self.options.total_variance}
        return update_running(mean, var, moments, decay=decay, **kept)

    # renormalization reads the running statistics, which have moved on when a checkpointed forward is run again

    def remember(self, x: Tensor, bounds: Renorm | None) -> tuple[Tensor, Tensor, Any]:
        """Return a copy of running mean and variance, and the bounds, for a forward on ``x``; the same when it is run again."""
        if recomputing():
            self._seen_again = True
            for key, mean, var, kept in reversed(self._seen or ()):
                if torch.equal(key, _fingerprint(x)):
                    return mean, var, kept
        mean, var, _ = self.running()
        state = (mean.clone(), var.clone(), bounds)
        if is_eager(x):
            if self._seen is None or self._seen_again:
                self._seen, self._seen_again = deque(maxlen=REMEMBERED_FORWARDS), False
            self._seen.append((_fingerprint(x), *state))
        return state


def _fingerprint(x: Tensor) -> Tensor:
    """Return two sums that tell a batch from others."""
    ends = x.detach()[[0, -1] if len(x) else []]
    return ends.flatten(1).sum(1, dtype=torch.float64)
