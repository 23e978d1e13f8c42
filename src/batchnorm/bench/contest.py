"""One way to measure contestants that do the same work: verified first, timed in turns, every raw value kept."""

import datetime
import gc
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from batchnorm.bench.machine import describe
from batchnorm.bench.ratios import AGAIN

__all__ = ["Absent", "Contestant", "Maker", "begin", "hold"]

# rounds of each contest; the first ones fill caches and are kept apart
LEAST, MOST, WARM = 6, 2000, 2
# seconds of a turn in which short steps follow each other, and how many do at most
TURN, LONGEST = 1e-3, 10

# for each result the error, and what is allowed
Errors = dict[str, tuple[float, float]]


class Absent(Exception):  # noqa: N818 - nothing went wrong
    """A contestant can't take part; says why."""


@dataclass(frozen=True)
class Contestant:
    """Who takes part.

    Args:
        step: what is timed, once a round.
        errors: what it gets wrong. It is called once, before anything is timed.
    """

    step: Callable[[], object]
    errors: Callable[[], Errors]


# makes a contestant with a state of its own, or raises `Absent`
Maker = Callable[[], Contestant]


def begin() -> dict[str, Any]:
    """Return what every file of raw values begins with: the machine, the date, the threads; draw from seed 0 from here on."""
    torch.manual_seed(0)
    date = datetime.datetime.now(datetime.UTC).isoformat()
    return {"machine": describe(), "date": date, "threads": torch.get_num_threads()}


def hold(facts: Mapping[str, Any], makers: Mapping[str, Maker], *, seconds: float, warm: int = WARM) -> dict[str, Any]:
    """Hold a contest, and return all of it as a row for JSON.

    The first contestant is what the others are compared with. It takes part twice, so that noise is seen. A contestant with
    an error above what is allowed is refused and not timed; where the first one is refused, nobody is timed. The order is
    drawn anew for each round. Short steps are taken several times in a row, as a training takes them, and their mean is kept.

    Args:
        facts: what the row says of the work.
        makers: contestants by name.
        seconds: how long to go on; at least `LEAST` rounds are made, at most `MOST`.
        warm: rounds before those that count.

    Returns:
        ``facts``, and: ``first``; ``errors``, pairs of error and allowed; ``refused`` and ``absent``, reasons by name;
        ``seconds`` and ``processor`` of a step, lists by name, on the clock and of all threads; ``in_a_row``, the steps of a
        turn; ``warm_up``, seconds of the warm rounds.

    Example:
        >>> right = Contestant(lambda: None, lambda: {"y": (0.0, 0.0)})
        >>> wrong = Contestant(lambda: None, lambda: {"y": (1.0, 0.5)})
        >>> row = hold({"shape": [2]}, {"torch": lambda: right, "ours": lambda: wrong}, seconds=0)
        >>> print(row["refused"], list(row["seconds"]))
        {'ours': 'error of y is 1.0e+00, allowed 5.0e-01'} ['torch', 'torch again']
    """
    first, make = next(iter(makers.items()))
    row: dict[str, Any] = {**facts, "first": first, "errors": {}, "refused": {}, "absent": {}}
    steps = {}
    for name, maker in {first: make, first + AGAIN: make, **makers}.items():
        step = _admitted(name, maker, row)
        if step is not None:
            steps[name] = step
    if first not in steps or first + AGAIN not in steps:
        steps = {}
    return row | _timed(steps, seconds, warm)


def _admitted(name: str, maker: Maker, row: dict[str, Any]) -> Callable[[], object] | None:
    """Verify a contestant and note what was found; ``None`` for one that is not to be timed."""
    try:
        contestant = maker()
        row["errors"][name] = contestant.errors()
    except Absent as reason:
        row["absent"][name] = str(reason)
        return None
    except Exception as error:
        # programs of others, which may break as they like
        row["refused"][name] = f"{type(error).__name__}: {error}".splitlines()[0]
        return None
    wrong = [
        f"error of {what} is {error:.1e}, allowed {allowed:.1e}"
        for what, (error, allowed) in row["errors"][name].items()
        if not (math.isfinite(error) and error <= allowed)
    ]
    if wrong:
        row["refused"][name] = "; ".join(wrong)
    return None if wrong else contestant.step


def _timed(steps: dict[str, Callable[[], object]], seconds: float, warm: int) -> dict[str, Any]:
    found: dict[str, Any] = {kind: {name: [] for name in steps} for kind in ("warm_up", "seconds", "processor")}
    if not steps:
        return found
    names, rounds, started, in_a_row = list(steps), 0, math.inf, 1
    # whoever came before has left the caches as they are: nobody shall always come after the same one
    order = np.random.default_rng(0)
    gc.disable()
    try:
        while rounds < warm + LEAST or (time.perf_counter() - started < seconds and rounds < warm + MOST):
            if rounds == warm:
                started, in_a_row = time.perf_counter(), _in_a_row(found["warm_up"])
            for name in names:
                took, processor = _turn(steps[name], in_a_row)
                if rounds < warm:
                    found["warm_up"][name].append(took)
                else:
                    found["seconds"][name].append(took)
                    found["processor"][name].append(processor)
            order.shuffle(names)
            rounds += 1
    finally:
        gc.enable()
    return found | {"in_a_row": in_a_row}


def _in_a_row(warm_up: dict[str, list[float]]) -> int:
    """Return how many steps a turn has: a short one alone would be about the code that others have put out of the cache."""
    shortest = min((min(values) for values in warm_up.values() if values), default=math.inf)
    return max(1, min(LONGEST, int(TURN / max(shortest, 1e-9))))


def _turn(step: Callable[[], object], count: int) -> tuple[float, float]:
    """Return the seconds of a step, on the clock and of all threads: the mean of some."""
    processor, clock = time.process_time(), time.perf_counter()
    for _ in range(count):
        step()
    took = time.perf_counter() - clock
    return took / count, (time.process_time() - processor) / count
