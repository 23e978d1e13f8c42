"""The block of arguments that a kernel gets: 8-byte words, whole numbers, addresses and float64 alike."""

import hashlib
import struct
from array import array
from functools import lru_cache
from pathlib import Path

__all__ = ["block", "build_number", "word_of"]


@lru_cache(maxsize=1)
def build_number() -> int:
    """Return a number of the kernels' sources: a kernel that others have compiled is neither found nor run.

    Numba looks at the file that a kernel stands in, and not at those that it uses.
    """
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return int.from_bytes(digest.digest()[:7])


_WORDS = (
    # which sources the block was laid out by
    "build",
    # counted up by the threads: the next task, and what is done; of sums, of sums that are taken again, of outputs
    "next", "done", "next_again", "done_again", "next_output",
    # how many phases are over, and whether sums must be taken again
    "ready", "again",
    # addresses of elements: input, output, gradients of both, residual and its gradient
    "x", "y", "dy", "dx", "residual", "dresidual",
    # sizes: samples and places of a plane, or rows; channels; places
    "samples", "channels", "places",
    # tasks over rows: channels of a strip, rows of a block, numbers of both
    "width", "height", "strips", "blocks",
    # addresses of float64: γ, β (0: none), and what is found
    "gamma", "beta", "mean", "m2", "rstd", "dgamma", "dbeta", "parts", "affine",
    # addresses of the running statistics (0: none), which are float32, or float64 where x is, and of the number of batches
    "running_mean", "running_var", "batches",
    # switches: statistics are given; x needs a gradient; outputs are written past the cache; and the answer: all is finite
    "fixed", "derive", "past_cache", "finite",
    # float64
    "eps", "momentum",
)  # fmt: skip


(
    BUILD, NEXT, DONE, NEXT_AGAIN, DONE_AGAIN, NEXT_OUTPUT, READY, AGAIN, X, Y, DY, DX, RESIDUAL, DRESIDUAL, SAMPLES,
    CHANNELS, PLACES, WIDTH, HEIGHT, STRIPS, BLOCKS, GAMMA, BETA, MEAN, M2, RSTD, DGAMMA, DBETA, PARTS, AFFINE,
    RUNNING_MEAN, RUNNING_VAR, BATCHES, FIXED, DERIVE, PAST_CACHE, FINITE, EPS, MOMENTUM,
) = range(len(_WORDS))  # fmt: skip


def block(**sizes: int) -> "array[int]":
    """Return a block in which some words are given, and all others are 0."""
    words = array("q", bytes(8 * len(_WORDS)))
    words[BUILD] = build_number()
    for name, size in sizes.items():
        words[_WORDS.index(name)] = size
    return words


@lru_cache(maxsize=1024)
def word_of(number: float) -> int:
    """Return a float64 as a word."""
    (word,) = struct.unpack("q", struct.pack("d", number))
    return int(word)
