"""Drop-in layers: subclasses of torch's own, with the same ``state_dict``, that also do what those can't."""

from typing import Any

import torch
from torch import Tensor, fx, nn

from batchnorm.errors import BatchNormError, ChannelError, NonFiniteError, OptionError, ShapeError
from batchnorm.functional import Renorm, batch_norm_example_inference, ghost_batches
from batchnorm.moments import Moments
from batchnorm.torch import ops
from batchnorm.torch.across import normalize_across, share
from batchnorm.torch.deferred import defer
from batchnorm.torch.naming import describe
from batchnorm.torch.options import Options
from batchnorm.torch.plain import forward_plain
from batchnorm.torch.tracking import Tracking
from batchnorm.torch.weights import Weights

__all__ = ["BatchNorm", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]


class BatchNorm(Tracking):
    """What the three layers share; see `BatchNorm1d` for arguments and equations."""

    num_features: int
    eps: float
    weight: Any
    bias: Any
    # nothing is switched on: one kernel call does everything
    _plain: bool = True
    _ranks: tuple[int, ...] = ()
    # what the layer is fused with, at the places where it is called
    _followers: tuple[tuple[str, ...], ...] = ()

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: Any = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias)
        self.configure(options)

    def configure(self, given: dict[str, Any]) -> None:
        """Set options, given by name; the others keep their values."""
        options = Options.read({**self.options.changed(), **given})
        options.check(track_running_stats=self.track_running_stats, momentum=self.momentum)
        self.options = options
        self._make_state()
        self.settle()

    def settle(self) -> None:
        """Choose the short way where nothing is switched on."""
        special = (
            self.options.changed().keys() - {"activation"}
            or self.frozen_statistics
            or self.domain
            or self.is_collecting
        )
        self._plain = not special and (self.momentum is None or isinstance(self.momentum, int | float))

    def extra_repr(self) -> str:
        """Add the options that are switched on to torch's own description."""
        parts = [super().extra_repr(), *(f"{name}={value!r}" for name, value in self.options.changed().items())]
        parts += [f"fused with {' or '.join(map(', '.join, self._followers))}"] if self._followers else []
        return ", ".join([*parts, *(["frozen_statistics=True"] if self.frozen_statistics else [])])

    def reset_running_stats(self) -> None:
        """Forget the running statistics, those of the domains and the count of skipped batches too."""
        super().reset_running_stats()  # type: ignore[misc]
        self._skipped = None if self._skipped is None else torch.zeros_like(self._skipped)
        for domain in self.options.domains:
            for name, fresh in (("running_mean", 0), ("running_var", 1), ("num_batches_tracked", 0)):
                self.get_buffer(f"{name}_{domain}").fill_(fresh)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        sample_weight: Tensor | None = None,
        residual: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Return ``activation(normalize(x) + residual)``.

        Args:
            x: ``(N, C, *spatial)``.
            mask: bool, ``(N, *spatial)`` or broadcastable to it, true where a value is valid. Other places count for nothing,
                get the output 0 and the gradient 0.
            sample_weight: frequencies, ``(N,)`` or ``(N, *spatial)``.
            residual: added before the activation, the shape of ``x``.
            lengths: ``(N,)``, number of valid places at the start of the last axis; another way to say ``mask``.

        Raises:
            ShapeError: an input or argument of another shape, or one value a channel in training (a ``ValueError``).
            ChannelError: another number of channels (a ``RuntimeError``).
            OptionError: weights or lengths that can't be.
            NonFiniteError: γ that is inf or NaN, in training.
        """
        unweighted = mask is None and sample_weight is None and lengths is None
        if unweighted and self._plain and type(x) is Tensor and not self._followers:
            return self.normalize(x, residual, self.options.activation)
        anything: Any = x
        if isinstance(anything, fx.Proxy):
            leaf: Tensor = self._leaf_of(x, mask=mask, sample_weight=sample_weight, residual=residual, lengths=lengths)
            return leaf
        if unweighted:
            later = defer(self, x) if self._followers and residual is None else None
            if later is not None:
                return later
            return self.normalize(x, residual, self.options.activation)
        return self._normalize_with(x, residual, self.options.activation, mask, sample_weight, lengths)

    def normalize(self, x: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
        """Return ``activation(normalize(x) + residual)`` with an activation that need not be the layer's own."""
        if x.ndim not in self._ranks:
            self._check_input_dim(x)
        if self._plain:
            y = forward_plain(self, x, residual, activation)
            if y is not None:
                return y
        return self._normalize_with(x, residual, activation)

    def _normalize_with(
        self, x: Tensor, residual: Tensor | None, activation: str | None, *weighting: Tensor | None
    ) -> Tensor:
        if x.ndim not in self._ranks:
            self._check_input_dim(x)
        try:
            group = self._group(x)
            weights = Weights.read(x, *(weighting or (None, None, None)), alone=group is None)
            return self._forward(x, weights, residual, activation, group)
        except BatchNormError as error:
            error.args = (f"{describe(self)}: {error}",)
            raise

    def _check_input_dim(self, x: Tensor) -> None:
        try:
            super()._check_input_dim(x)  # type: ignore[misc]
        except ValueError as error:
            raise ShapeError(f"{error}, in {describe(self)}") from None

    def _leaf_of(self, x: Any, **arguments: Any) -> Any:
        """Show symbolic tracing one leaf, which it knows torch's own layers to be."""
        if x.tracer.root is self:
            raise fx.proxy.TraceError(f"{describe(self)} is a leaf: trace a model that holds it")
        given = {name: v for name, v in arguments.items() if v is not None}
        return x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), (x,), given)

    def _forward(
        self, x: Tensor, weights: Weights, residual: Tensor | None, activation: str | None, group: Any
    ) -> Tensor:
        # a trace would keep what is compared for good
        traced = torch._C._get_tracing_state() is not None
        if not traced:
            self._check_values(x, residual)
        if group is not None:
            y = self._normalize_across(x, weights, group)
        elif not traced and x.numel() == 0:
            y = self._normalize_nothing(x)
        elif not self.normalizes_by_batch():
            y = self._evaluate(x, weights)
        elif self._plain and not weights:
            return self._normalize_batch(x, weights, residual, activation)
        else:
            y = self._normalize_batch(x, weights)
        if residual is not None:
            y = weights.only_valid(y + residual)
        return weights.only_valid(ops.followed(y, None, activation))

    def _check_values(self, x: Tensor, residual: Tensor | None) -> None:
        if x.shape[1] != self.num_features:
            raise ChannelError(
                f"the input must have {self.num_features} channels on axis 1, running_mean should contain "
                f"{x.shape[1]} elements not {self.num_features} for an input of shape {tuple(x.shape)}"
            )
        by_batch = self.normalizes_by_batch()
        if self.eps < 0 or (by_batch and self.eps == 0):
            # torch's own words
            raise OptionError(
                f"batch_norm eps must be {'positive during training' if by_batch else 'non-negative'}, but got {self.eps}"
            )
        if residual is not None and residual.shape != x.shape:
            raise ShapeError(
                f"residual must have the shape of the input, {tuple(x.shape)}, got {tuple(residual.shape)}"
            )
        if ops.is_eager(x) and self.weight is not None and not bool(torch.isfinite(self.weight.detach()).all()):
            raise NonFiniteError(
                "γ must be finite, it holds inf or NaN: go back to a checkpoint and lower the learning rate"
            )

    def _normalize_nothing(self, x: Tensor) -> Tensor:
        """Return an empty output whose gradients are zero and not missing."""
        y = x * 1
        for v in (self.weight, self.bias):
            y = y if v is None else y + v.sum().to(x.dtype)
        return y

    def _evaluate(self, x: Tensor, weights: Weights) -> Tensor:
        x = weights.only_valid(x)
        mean, var, _ = self.running()
        if self.training and not self.frozen_statistics:
            # they move on before the backward needs them
            mean, var, _ = self.remember(x, None)
        if self.options.example_weight == 0:
            weight, bias = self.weight, self.bias
            if self.options.wide_statistics:
                weight, bias = (v if v is None else v.to(mean.dtype) for v in (weight, bias))
            y = torch.batch_norm(x, weight, bias, mean, var, False, 0.0, self.eps, torch.backends.cudnn.enabled)
        else:
            y = batch_norm_example_inference(
                x, mean, var, self.weight, self.bias,
                example_weight=self.options.example_weight, eps=self.eps, weight=weights.over_places(x),
            )  # fmt: skip
        return y

    def _normalize_batch(self, x: Tensor, weights: Weights, *follow: Any) -> Tensor:
        if torch._C._get_tracing_state() is not None and not weights and self._buffers["running_mean"] is None:
            y = torch.batch_norm(x, self.weight, self.bias, None, None, True, 0.0, self.eps, False)
            return ops.followed(y, *follow or (None, None))
        valid = weights.valid_places(x)
        if valid == 1:
            return ops.followed(self._normalize_single(x, weights), *follow or (None, None))
        state = self._renorm_state(x, weights)
        if self.options.virtual_batch_size is not None and not weights:
            size = self.options.virtual_batch_size
            parts = [self._normalize_group(x[part], weights, state) for part in ghost_batches(len(x), size)]
            y = torch.cat([y for y, _ in parts]) if len(parts) > 1 else parts[0][0]
            moments = Moments.empty().merge(*(moments for _, moments in parts))
        else:
            y, moments = self._normalize_group(x, weights, state, *follow)
        self.observe(moments)
        return y

    def _renorm_state(self, x: Tensor, weights: Weights) -> tuple[Tensor, Tensor, Renorm] | None:
        """Return what batch renormalization corrects towards, and how far; ``None`` where it is off."""
        renorm, (mean, _, batches) = self.options.renorm, self.running()
        if renorm is None or mean is None or not self.training:
            return None
        if ops.is_eager(x) or weights:
            return self.remember(x, renorm.bounds(self.steps(batches)))
        return self.remember(x, renorm.bounds_branch_free(batches))

    def _normalize_group(
        self, x: Tensor, weights: Weights, state: tuple[Tensor, Tensor, Renorm] | None, *follow: Any
    ) -> tuple[Tensor, Moments]:
        if weights:
            return ops.normalize_weighted(
                x, self.weight, self.bias, self.eps, mask=weights.mask, sample_weight=weights.sample_weight,
                virtual_batch_size=self.options.virtual_batch_size,
                running=(None, None) if state is None else state[:2], renorm=None if state is None else state[2],
            )  # fmt: skip
        if state is not None:
            return ops.renormalize(x, self.weight, self.bias, self.eps, state[:2], state[2])
        return ops.normalize(x, self.weight, self.bias, self.eps, *follow)

    def _normalize_across(self, x: Tensor, weights: Weights, group: Any) -> Tensor:
        """Normalize by the statistics of all ranks of a group."""
        agreement, size, x = self._agree(x, group), self.options.virtual_batch_size, weights.only_valid(x)
        weight = weights.over_places(x)
        inputs = (x, self.weight, self.bias, weight)
        derives = torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in inputs)
        shared = share(x, weight, agreement, size, self.eps, derives=derives)
        if shared.single:
            alone = x.numel() > 0 or self.options.on_single == "error"
            return self._normalize_single(x, weights) if alone else self._normalize_nothing(x)
        state = self._renorm_state(x, weights)
        correction = None if state is None else shared.correction(state[:2], state[2], self.eps)
        y = normalize_across(
            x, self.weight, self.bias, self.eps, shared, agreement, weight=weight, size=size, correction=correction
        )
        self.observe(shared.moments())
        return y

    def _normalize_single(self, x: Tensor, weights: Weights) -> Tensor:
        """Normalize the only value of each channel, which has no spread, as ``on_single`` says; no statistic moves."""
        if self.options.on_single == "error":
            # torch's own words first: programs look for them
            raise ShapeError(
                f"Expected more than 1 value per channel when training, got input size {x.size()}: give a larger batch "
                "(a DataLoader's drop_last=True), or on_single='running' or 'skip' to the layer"
            )
        if self.options.on_single == "running":
            return self._evaluate(x, weights)
        return ops.normalize_weighted(
            x, self.weight, self.bias, self.eps, mask=weights.mask, sample_weight=weights.sample_weight
        )[0]

    def __prepare_scriptable__(self) -> nn.Module:
        """Give TorchScript torch's own layer, where that does the same."""
        from batchnorm.torch.surgery import as_torchs

        return as_torchs(self)


class BatchNorm1d(BatchNorm, nn.BatchNorm1d):
    """Normalize each feature over the batch, and over the sequence where there is one.

    ::

        training:    y = activation(γ · (x - μ_B) / √(σ²_B + ε) + β + residual)       running = (1 - w) · running + w · batch
        evaluation:  y = activation(γ · (x - running_mean) / √(running_var + ε) + β + residual)

    The batch is normalized with its biased variance; the running variance is the unbiased one. Checkpoints of
    ``torch.nn.BatchNorm1d`` load, and the other way round. With no option given, outputs, gradients and statistics are
    torch's; a batch with inf or NaN does not reach the running statistics, and activation checkpointing counts once.

    Args:
        num_features: C, of an input ``(N, C)`` or ``(N, C, L)``.
        eps: added to the variance under the root.
        momentum: weight ``w`` of the new batch in the running statistics; ``None`` averages all batches alike; a callable
            gets the number of batches so far and returns the weight.
        affine: learn γ and β.
        track_running_stats: keep running statistics; without them evaluation uses the batch too.
        device: of the parameters and statistics.
        dtype: of the parameters and statistics.
        bias: learn β beside γ.
        activation: applied last: relu, relu6, leaky_relu, silu, gelu, hardswish, sigmoid or tanh.
        virtual_batch_size: normalize ghost batches of this many samples each; a last one of a single sample joins its
            neighbour.
        renorm: batch renormalization: True, or a dict of the fields of `RenormSchedule`.
        on_single: one value a channel in training is an ``"error"``, is normalized by the ``"running"`` statistics, or by
            itself (``"skip"``); the last two leave the statistics alone.
        unbiased: keep the unbiased running variance, as torch does; False keeps the biased one, as Keras does.
        debias: take the initial mean 0 and variance 1 out of the running statistics, from the first step on.
        total_variance: keep the variance between batches in the running variance too.
        example_weight: share of an example's own statistics in evaluation (needs spatial axes).
        domains: names of further running statistics, with the same γ and β; chosen by `domain`.
        wide_statistics: keep the running statistics in float32 when ``.half()`` or ``.bfloat16()`` casts the module.
        process_group: normalize in training by the statistics of all ranks of a group: ``"default"``, a ``ProcessGroup`` or a
            ``DeviceMesh`` of one dimension; see `sync`.

    Raises:
        ShapeError: an input of another rank, or one value a channel in training (a ``ValueError``).
        ChannelError: another number of channels (a ``RuntimeError``).
        OptionError: an option that can't be, or options that exclude each other.

    Example:
        >>> import torch
        >>> BatchNorm1d(1, eps=3.0)(torch.tensor([[1.0], [3.0]])).tolist()
        [[-0.5], [0.5]]
        >>> padded = torch.tensor([[[1.0, 3.0, 100.0]]])
        >>> BatchNorm1d(1, eps=3.0)(padded, lengths=torch.tensor([2])).tolist()
        [[[-0.5, 0.5, 0.0]]]

    Reference:
        Ioffe, Szegedy: Batch Normalization, 2015 (arXiv:1502.03167).
    """

    _ranks = (2, 3)


class BatchNorm2d(BatchNorm, nn.BatchNorm2d):
    """Normalize each channel of ``(N, C, H, W)`` over the batch and all places.

    Arguments, equations and errors are those of `BatchNorm1d`.

    Example:
        >>> import torch
        >>> BatchNorm2d(3, activation="relu")(torch.zeros(2, 3, 4, 4)).shape
        torch.Size([2, 3, 4, 4])

    Reference:
        Ioffe, Szegedy: Batch Normalization, 2015 (arXiv:1502.03167), section 3.2.
    """

    _ranks = (4,)


class BatchNorm3d(BatchNorm, nn.BatchNorm3d):
    """Normalize each channel of ``(N, C, D, H, W)`` over the batch and all places.

    Arguments, equations and errors are those of `BatchNorm1d`.

    Example:
        >>> import torch
        >>> BatchNorm3d(3, activation="relu")(torch.zeros(2, 3, 4, 4, 4)).shape
        torch.Size([2, 3, 4, 4, 4])

    Reference:
        Ioffe, Szegedy: Batch Normalization, 2015 (arXiv:1502.03167), section 3.2.
    """

    _ranks = (5,)
