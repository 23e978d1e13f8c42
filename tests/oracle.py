"""The one helper that decides whether numbers agree. It raises, and is as strict everywhere."""

import numpy as np


def assert_near(got, expected, *, peer=None, ulps=4.0, what="result"):
    """Hold ``got`` to a float64 oracle.

    The error may be at most twice that of ``peer``, another implementation in the same dtype (none: zero), plus ``ulps``
    units in the last place of the largest expected value.
    """
    got, expected = np.asarray(got), np.asarray(expected, dtype=np.float64)
    if got.shape != expected.shape:
        raise AssertionError(f"{what}: shape {got.shape}, expected {expected.shape}")
    error = np.abs(got.astype(np.float64) - expected)
    if error.size == 0:
        return
    allowed = ulps * np.finfo(got.dtype).eps * max(np.abs(expected).max(), np.finfo(got.dtype).tiny)
    if peer is not None:
        allowed += 2 * np.abs(np.asarray(peer, dtype=np.float64) - expected).max()
    worst = np.unravel_index(np.argmax(np.where(np.isnan(error), np.inf, error)), error.shape)
    if not error[worst] <= allowed:
        raise AssertionError(
            f"{what}: error {error[worst]:.3e} > {allowed:.3e} at {tuple(map(int, worst))}: "
            f"got {got[worst]!r}, expected {expected[worst]!r}"
        )
