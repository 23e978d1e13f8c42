"""Every error a user can cause: what must hold, what was received, what to do."""

__all__ = [
    "BatchNormError",
    "BatchNormWarning",
    "ChannelError",
    "DataError",
    "DistributedError",
    "FusionError",
    "KernelError",
    "MissingDependencyError",
    "NonFiniteError",
    "NotInvertibleError",
    "OptionError",
    "OutputError",
    "RecomputeError",
    "ShapeError",
    "TransformError",
    "VerificationError",
    "WorkerError",
]


class BatchNormError(Exception):
    """The parent of every error that this library raises on purpose.

    Example:
        >>> from batchnorm.functional import ghost_batches
        >>> try:
        ...     ghost_batches(8, size=1)
        ... except BatchNormError as error:
        ...     print(error)
        virtual_batch_size must be at least 2 samples, got 1
    """


class OptionError(BatchNormError, ValueError):
    """An option has a value that it can't have, or options exclude each other."""


class ShapeError(BatchNormError, ValueError):
    """Arrays do not fit each other or the axes they are normalized over."""


class ChannelError(BatchNormError, RuntimeError):
    """An input has another number of channels than the layer (a ``RuntimeError``, as in torch)."""


class DataError(BatchNormError, ValueError):
    """A data set can't be read, or can't be learned from."""


class DistributedError(BatchNormError, RuntimeError):
    """The processes of a group can't work together: there is no group, a rank is missing, or ranks do different things."""


class OutputError(BatchNormError, OSError):
    """A result can't be written where it was asked for."""


class NonFiniteError(BatchNormError, ArithmeticError):
    """Parameters of a layer hold inf or NaN: training has diverged."""


class NotInvertibleError(BatchNormError, ArithmeticError):
    """An affine map with a zero scale has no inverse."""


class MissingDependencyError(BatchNormError, ImportError):
    """A part of the library needs a package that is not installed."""


class TransformError(BatchNormError, RuntimeError):
    """A ``torch.func`` transform runs over running statistics that it may not write to."""


class WorkerError(BatchNormError, RuntimeError):
    """A worker process died before its run was finished."""


class FusionError(BatchNormError, RuntimeError):
    """The output of a layer that is fused with what follows it was used in a way that fusing can't be right for."""


class KernelError(BatchNormError, RuntimeError):
    """An implementation was asked for that can't do what is needed, on this machine or with this input."""


class RecomputeError(BatchNormError, RuntimeError):
    """Something that a backward needs was changed in place since the forward (a ``RuntimeError``, as in torch)."""


class VerificationError(BatchNormError, RuntimeError):
    """A result did not agree with what it was derived from, and was not written."""


class BatchNormWarning(UserWarning):
    """Something was left out so that nothing else was harmed; said once for each layer."""
