"""How the normalization of a model stands, and how it is trained: what a wing tells for `check`, and what it can mend."""

from dataclasses import dataclass, field

import numpy as np

__all__ = ["BatchSizes", "Mend", "NormState", "Optimization", "Rate", "Rehearsal"]


@dataclass(eq=False, slots=True)
class NormState:
    """One batch normalization layer: what it stores, and what it would do; arrays in float64, ``(C,)``.

    Args:
        name: dotted name of the layer, as in the picture of the model.
        kind: its class.
        mean: the running mean; ``None`` where the layer keeps none.
        variance: the running variance; ``None`` where the layer keeps none.
        gamma: the scale; ``None`` for 1.
        beta: the shift; ``None`` for 0.
        eps: added to the variance under the root.
        decay: weight of the past in the running statistics; ``None`` where all batches count alike, or nobody knows.
        updates: batches that the running statistics have seen; ``None`` where the framework does not count them.
        dtype: of the running statistics, as ``"float32"``.
        by_batch: whether it would normalize by the batch now, as it stands.
        training: whether it is in training mode, or would be in a model that trains.
        moves: whether a forward pass in training moves its statistics.
        trainable: whether γ or β get a gradient; ``None`` for a layer without γ and β.
        frozen: whether it was frozen in a way that lasts.
        debiased: whether the running statistics forget their initial values from the first batch on.
        synchronized: whether batches are normalized over all processes.
        ghost: samples that are normalized together; ``None`` for the whole batch.
        shared: names of other layers that hold the same statistics.
    """

    name: str
    kind: str
    mean: np.ndarray | None
    variance: np.ndarray | None
    gamma: np.ndarray | None
    beta: np.ndarray | None
    eps: float
    decay: float | None = None
    updates: int | None = None
    dtype: str = "float32"
    by_batch: bool = False
    training: bool = False
    moves: bool = False
    trainable: bool | None = True
    frozen: bool = False
    debiased: bool = False
    synchronized: bool = False
    ghost: int | None = None
    shared: tuple[str, ...] = ()

    @property
    def is_initial(self) -> bool:
        """Whether the running mean is 0 and the running variance 1 in all channels, as a layer starts."""
        mean, variance = self.mean, self.variance
        return mean is not None and variance is not None and not mean.any() and bool((variance == 1).all())

    @property
    def initial_share(self) -> float | None:
        """How much the initial values still weigh in the running statistics, 0 to 1; ``None`` where nobody knows.

        Example:
            >>> NormState("bn", "BatchNorm2d", None, None, None, None, 1e-5, decay=0.5, updates=2).initial_share
            0.25
        """
        if self.updates is None:
            return None
        if self.debiased or self.decay is None:
            return 0.0 if self.updates else 1.0
        return float(self.decay**self.updates)


@dataclass(slots=True)
class Rehearsal:
    """What one step of training on an example has shown, in a copy.

    Args:
        twice: layers whose running statistics moved once more in the backward pass.
        dropout: for layers that dropout reaches: its rate, and whether it stands directly before them.
        calls: how often each layer was called.
        variances: ``(C,)`` of what reached the layers that dropout reaches, while it dropped; where that was measured.
    """

    twice: tuple[str, ...] = ()
    dropout: dict[str, tuple[float, bool]] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    variances: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BatchSizes:
    """The sizes of the batches of a loader, in samples.

    Args:
        usual: of most batches.
        last: of the last batch; ``None`` where nobody knows.
        samples: of one pass; ``None`` where nobody knows.
    """

    usual: int
    last: int | None = None
    samples: int | None = None


@dataclass(slots=True)
class Optimization:
    """What an optimizer does to batch normalization.

    Args:
        decayed: weight decay of γ and β, by the name of the layer.
        steps: steps that it has made; ``None`` where it does not count them.
        accumulation: forward passes to each step, where it says so itself.
    """

    decayed: dict[str, float] = field(default_factory=dict)
    steps: int | None = None
    accumulation: int | None = None


@dataclass(slots=True)
class Mend:
    """What shall be set right in one layer; ``None`` and false leave things as they are.

    Args:
        training: put it into this mode.
        decay: the new weight of the past in its running statistics.
        eps: the new constant under the root.
        freeze: keep its statistics from moving, in a way that lasts.
        count_once: let activation checkpointing count a batch once.
        wide: keep its statistics in float32.
    """

    training: bool | None = None
    decay: float | None = None
    eps: float | None = None
    freeze: bool = False
    count_once: bool = False
    wide: bool = False


@dataclass(frozen=True, slots=True)
class Rate:
    """How fast the weights of one linear layer turn; their length is of no account where batch normalization follows.

    Args:
        layer: dotted name of the linear layer.
        learning_rate: of the optimizer, for these weights.
        size: ‖w‖, the root of the sum of all squares.
        gradient: ‖g‖ / ‖w‖; ``None`` where there is no gradient.
        norm: dotted name of the batch normalization layer that its output goes to as it is; empty where nobody knows.

    Example:
        >>> Rate("conv", learning_rate=0.1, size=5.0).effective
        0.004
    """

    layer: str
    learning_rate: float
    size: float
    gradient: float | None = None
    norm: str = ""

    @property
    def effective(self) -> float:
        """The effective learning rate lr / ‖w‖²: that of a weight of length 1 that plain gradient descent turns as fast."""
        return self.learning_rate / self.size**2 if self.size > 0 else float("inf")
