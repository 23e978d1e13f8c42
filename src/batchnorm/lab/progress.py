"""A progress bar with the time left, or a line now and then where there is no terminal."""

import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from batchnorm.lab.train import Task

__all__ = ["Progress"]

LINE_EVERY_SECONDS = 15.0


class Progress:
    """Counts finished runs.

    Args:
        total: all runs.
        done: runs that were in the store already.
        shown: whether to show anything.
    """

    def __init__(self, total: int, done: int, shown: bool) -> None:
        self.console = Console(stderr=True, quiet=not shown)
        self.bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[last]}", style="dim"),
            console=self.console,
            disable=not (shown and self.console.is_terminal),
        )
        self.total, self.done, self.started = total, done, time.monotonic()
        self.first, self.said = done, self.started
        self.runs = self.bar.add_task("training", total=total, completed=done, last="")
        if done:
            self.console.print(f"{done} of {total} runs are in the output folder already")

    def advance(self, task: Task, row: dict[str, Any]) -> None:
        """Count one run."""
        self.done += 1
        result = "diverged" if row["status"] == "diverged" else f"accuracy {row['val_accuracy']:.3f}"
        last = f"{task.arm.name} at {task.learning_rate:g}, seed {task.seed}: {result}"
        self.bar.update(self.runs, advance=1, last=last)
        now = time.monotonic()
        if not self.console.is_terminal and (now - self.said > LINE_EVERY_SECONDS or self.done == self.total):
            left = (now - self.started) / (self.done - self.first) * (self.total - self.done)
            self.console.print(f"{self.done} of {self.total} runs, about {left:.0f} s left")
            self.said = now

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()
