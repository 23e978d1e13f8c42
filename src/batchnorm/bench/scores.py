"""Rows of contests as text: times, speed-ups with intervals, who was refused, who was not there."""

from collections.abc import Sequence
from statistics import median
from typing import Any

from batchnorm.bench.contestants import COPIES, NEW, OURS
from batchnorm.bench.ratios import AGAIN, is_unstable, mean_speed_up, multiple, noise, speed_up
from batchnorm.tables import table

__all__ = ["busy", "groups", "in_words", "left_out", "means", "scores", "shape_of"]

NOTES = (
    "×: the first contestant's time divided by this one's, median of the rounds, [95 % interval]. “no difference”: the",
    "interval holds 1, or the change is no larger than that of the first contestant beside itself (“again”).",
)


def groups(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return rows by their group, in order."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["group"], []).append(row)
    return found


def shape_of(row: dict[str, Any]) -> str:
    """Return a shape as ``32×64×7×7``, or the name of a row."""
    return str(row.get("name") or "×".join(map(str, row["shape"])))


def scores(rows: list[dict[str, Any]], head: str = "Batch") -> str:
    """Return a table with a row for each contest: the first contestant's time, the speed-up of each of the others."""
    first = rows[0]["first"]
    present = _names(rows)
    others = [name for name in present if name not in (first, COPIES, NEW)]
    floor = [(name, COPIES) for name in (OURS, NEW) if {name, COPIES} <= set(present)]
    lines = [
        (
            shape_of(row),
            _milliseconds(row, first),
            *(in_words(row, name) for name in others),
            *(_in_copies(row, *pair) for pair in floor),
            "unstable" if first in row["seconds"] and is_unstable(row) else "",
        )
        for row in rows
    ]
    return table((head, f"{first}, ms", *others, *(f"{name} / {of}" for name, of in floor), ""), lines)


def in_words(row: dict[str, Any], name: str) -> str:
    """Return the speed-up of a contestant, or why there is none."""
    if name in row["refused"]:
        return "refused"
    if name not in row["seconds"]:
        return "not measured" if name in row["absent"] else "–"
    ratio = speed_up(row, name)
    if name == row["first"] + AGAIN:
        return f"{ratio.value:.2f} [{ratio.interval[0]:.2f}, {ratio.interval[1]:.2f}]"
    return ratio.told(noise(row))


def busy(machine: dict[str, Any]) -> list[str]:
    """Say so where the machine had other work when the measurement began."""
    load = machine["load"]
    if load is None or load[0] < 0.25 * machine["cores"]:
        return []
    return [
        f"the machine had other work: a load of {load[0]:.1f} on {machine['cores']} cores. Threads wait for each other there."
    ]


def means(rows: list[dict[str, Any]], name: str) -> str:
    """Return the geometric mean of a contestant's speed-ups with the smallest, over the rows in which it was timed."""
    timed = [row for row in rows if name in row["seconds"]]
    if not timed:
        return f"{name}: not timed"
    ratio, far = mean_speed_up(timed, name)
    smallest = min(timed, key=lambda row: speed_up(row, name).value)
    least = f"smallest {speed_up(smallest, name).value:.2f} at {shape_of(smallest)}"
    missing = f"; {len(rows) - len(timed)} of {len(rows)} not timed" if len(timed) < len(rows) else ""
    return f"{name}: geometric mean {ratio.told(far)}, {least}{missing}"


def left_out(rows: list[dict[str, Any]]) -> list[str]:
    """Return a line for each contestant that was refused, and one for each that was not there."""
    lines = [
        f"refused: {name}, {row['group']}, {shape_of(row)}: {why}"
        for row in rows
        for name, why in row["refused"].items()
    ]
    absent = {f"not measured: {name}: {why}" for row in rows for name, why in row["absent"].items()}
    return lines + sorted(absent)


def _names(rows: list[dict[str, Any]]) -> list[str]:
    """Return everyone who was to take part in any of the rows."""
    return list(dict.fromkeys(name for row in rows for kind in ("seconds", "refused", "absent") for name in row[kind]))


def _milliseconds(row: dict[str, Any], name: str) -> str:
    return f"{1e3 * median(row['seconds'][name]):.3f}" if name in row["seconds"] else "–"


def _in_copies(row: dict[str, Any], name: str, of: str) -> str:
    if not {name, of} <= set(row["seconds"]):
        return "–"
    ratio = multiple(row, name, of)
    return f"{ratio.value:.2f} [{ratio.interval[0]:.2f}, {ratio.interval[1]:.2f}]"
