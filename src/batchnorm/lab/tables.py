"""Results as lines of text."""

import math

from batchnorm.lab.verdicts import ArmResult, Estimate, Evidence
from batchnorm.lab.words import span

__all__ = ["results_table"]

_HEAD = ("Arm", "Best rate", "Test log-loss", "Test accuracy %", "Steps to", "Usable rates")


def results_table(evidence: Evidence) -> str:
    """Return the table of arms: means over seeds with 95 % intervals, at each arm's best learning rate."""
    head = (*_HEAD[:4], f"{_HEAD[4]} {100 * evidence.threshold:.1f} %", _HEAD[5])
    rows = [cells(result) for result in evidence.results]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)]
    return "\n".join([lines[0], "─" * (sum(widths) + 2 * len(widths) - 2), *lines[1:]])


def cells(result: ArmResult) -> tuple[str, ...]:
    """Return the cells of an arm's row."""
    return (
        result.arm.name,
        f"{result.learning_rate:g}",
        _interval(result.log_loss, 1, 4),
        _interval(result.accuracy, 100, 2),
        f"{result.steps:.0f}" if math.isfinite(result.steps) else "never",
        f"{span(result.usable)} ({len(result.usable)} of {len(result.rates)})",
    )


def _interval(estimate: Estimate, scale: float, digits: int) -> str:
    mean = f"{estimate.mean * scale:.{digits}f}"
    if not math.isfinite(estimate.low):
        return mean
    return f"{mean} [{estimate.low * scale:.{digits}f}, {estimate.high * scale:.{digits}f}]"
