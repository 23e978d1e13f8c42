"""Running statistics moved by a batch that another has measured, once it is known that they may be moved by it."""

from collections.abc import Callable
from typing import Any

__all__ = ["FAR", "MOVED", "NOT_FINITE", "move"]

# what is answered: done; nothing done, as something is inf or NaN, or as the batch lies too far from zero for its spread
MOVED, NOT_FINITE, FAR = 0, 1, 2


def move(build: int) -> Callable[..., int]:
    """Return the kernel ``running += momentum · (batch - running)``, and one batch more, in one look at everything.

    ``batch`` holds the means of all channels, then the unbiased variances. A batch lies far where ``(mean · rstd)²`` of a
    channel is above ``bound``.
    """

    def kernel(
        built: int,
        batch: Any,
        rstd: Any,
        gamma: Any,
        mean: Any,
        var: Any,
        batches: Any,
        channels: int,
        bound: float,
        momentum: float,
    ) -> int:
        if built != build:
            return NOT_FINITE
        finite, near = True, True
        for c in range(channels):
            # the distance of inf and NaN from themselves is NaN
            finite &= batch[c] - batch[c] == 0.0
            finite &= batch[channels + c] - batch[channels + c] == 0.0
            finite &= mean[c] - mean[c] == 0.0
            finite &= var[c] - var[c] == 0.0
            finite &= gamma[c] - gamma[c] == 0.0
            ratio = batch[c] * rstd[c]
            near &= ratio * ratio <= bound
        if not finite:
            return NOT_FINITE
        if not near:
            return FAR
        for c in range(channels):
            mean[c] += momentum * (batch[c] - mean[c])
            var[c] += momentum * (batch[channels + c] - var[c])
        batches[0] += 1
        return MOVED

    return kernel
