"""The progress of a comparison: each finished run with its result."""

from typing import Any

from batchnorm.lab.tasks import Task
from batchnorm.progress import Progress

__all__ = ["Runs"]


class Runs(Progress):
    """Counts finished runs.

    Args:
        total: all runs.
        done: runs that were in the store already.
        shown: whether to show anything.
    """

    def __init__(self, total: int, done: int, shown: bool) -> None:
        super().__init__("training", "runs", total, done=done, shown=shown)
        if done:
            self.say(f"{done} of {total} runs are in the output folder already")

    def finish(self, task: Task, row: dict[str, Any]) -> None:
        """Count one run."""
        result = "diverged" if row["status"] == "diverged" else f"accuracy {row['val_accuracy']:.3f}"
        self.advance(f"{task.arm.name} at {task.learning_rate:g}, seed {task.seed}: {result}")
