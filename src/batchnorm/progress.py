"""A progress bar with the time left, or a line now and then where there is no terminal."""

import sys
import time
from contextlib import nullcontext
from importlib.util import find_spec
from types import TracebackType
from typing import Any, Self

__all__ = ["Progress"]

LINE_EVERY_SECONDS = 15.0


class Progress:
    """Counts what is done, on the standard error stream.

    Args:
        doing: what is going on, as ``"training"``.
        things: what is counted, as ``"runs"``.
        total: how many there will be; ``None`` where nobody knows.
        done: how many are done already.
        shown: whether to show anything.

    Example:
        >>> with Progress("training", "runs", 2, shown=False) as progress:
        ...     progress.advance()
    """

    def __init__(self, doing: str, things: str, total: int | None, *, done: int = 0, shown: bool = True) -> None:
        self.things, self.total, self.done, self.shown = things, total, done, shown
        self.first, self.started = done, time.monotonic()
        self.said = self.started
        terminal = shown and sys.stderr.isatty() and find_spec("rich") is not None
        self.bar: Any = nullcontext()
        self.task: Any = None
        if terminal:
            self.bar = _bar()
            self.task = self.bar.add_task(doing, total=total, completed=done, last="")

    def advance(self, last: str = "") -> None:
        """Count one more; ``last`` says what it was."""
        self.done += 1
        if self.task is not None:
            self.bar.update(self.task, advance=1, last=last)
            return
        now = time.monotonic()
        if now - self.said > LINE_EVERY_SECONDS or (self.done == self.total and self.said > self.started):
            self.say(self._line(now))
            self.said = now

    def say(self, line: str) -> None:
        """Print a line."""
        if self.shown:
            print(line, file=sys.stderr)  # noqa: T201

    def _line(self, now: float) -> str:
        if self.total is None:
            return f"{self.done} {self.things}, {now - self.started:.0f} s"
        left = (now - self.started) / (self.done - self.first) * (self.total - self.done)
        return f"{self.done} of {self.total} {self.things}, about {left:.0f} s left"

    def __enter__(self) -> Self:
        self.bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.__exit__(kind, error, trace)


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    return Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[last]}", style="dim"),
        console=Console(stderr=True),
    )
