"""Finished runs, one durable row each: what is in the store is never computed again."""

import json
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from batchnorm.errors import OutputError
from batchnorm.lab.tasks import Task

__all__ = ["Store"]


class Store:
    """Rows in an SQLite file; a row is either there as a whole or not at all, whatever kills the process.

    Args:
        folder: where ``runs.sqlite`` is; made where it is missing. ``None`` keeps the rows in memory.
        experiment: what the rows belong to. A folder with rows of another experiment is refused.

    Raises:
        OutputError: the folder can't be written, or holds something else.
    """

    def __init__(self, folder: Path | None, experiment: dict[str, Any]) -> None:
        self.folder = folder
        try:
            if folder is not None:
                _refuse_foreign(folder)
                folder.mkdir(parents=True, exist_ok=True)
            self._rows = sqlite3.connect(folder / "runs.sqlite" if folder else ":memory:", timeout=30)
            self._rows.execute("CREATE TABLE IF NOT EXISTS experiment (key TEXT PRIMARY KEY, value TEXT)")
            self._rows.execute("CREATE TABLE IF NOT EXISTS runs (task TEXT PRIMARY KEY, row TEXT)")
            self._claim(experiment)
        except (OSError, sqlite3.Error) as error:
            if isinstance(error, OutputError):
                raise
            raise OutputError(f"the output folder {folder} must be one that can be written: {error}") from error

    def _claim(self, experiment: dict[str, Any]) -> None:
        wanted = {key: json.dumps(value, sort_keys=True) for key, value in experiment.items()}
        found = dict(self._rows.execute("SELECT key, value FROM experiment"))
        if not found:
            with self._rows:
                self._rows.executemany("INSERT INTO experiment VALUES (?, ?)", wanted.items())
            return
        differing = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
        if differing:
            said = ", ".join(f"{key} {found.get(key)} there, {wanted.get(key)} here" for key in differing)
            raise OutputError(f"{self.folder} holds the runs of another comparison ({said}): choose another --out")

    def missing(self, tasks: Iterable[Task]) -> list[Task]:
        """Return the tasks that have no row yet."""
        done = {key for (key,) in self._rows.execute("SELECT task FROM runs")}
        return [task for task in tasks if _key(task) not in done]

    def add(self, task: Task, row: dict[str, Any]) -> None:
        """Write a row, durably: when this returns, it survives the death of the process."""
        try:
            with self._rows:
                self._rows.execute("INSERT OR REPLACE INTO runs VALUES (?, ?)", (_key(task), json.dumps(row)))
        except sqlite3.Error as error:
            raise OutputError(
                f"a finished run can't be written to {self.folder}: {error}; those before it are kept, make room and "
                "start the same command again"
            ) from error

    def rows(self, tasks: Iterable[Task]) -> list[dict[str, Any]]:
        """Return the rows of these tasks, in their order."""
        found = dict(self._rows.execute("SELECT task, row FROM runs"))
        return [json.loads(found[_key(task)]) | {"arm": task.arm.name} for task in tasks]

    def close(self) -> None:
        """Close the file."""
        self._rows.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _refuse_foreign(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"the output must be a folder, {folder} is a file: choose another --out")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "runs.sqlite").is_file():
        raise OutputError(f"the output folder must be new or of an earlier comparison, {folder} holds other files")


def _key(task: Task) -> str:
    """Name a task by all that decides its numbers, but not by what the arm is called."""
    arm = task.arm.to_dict() | {"name": None}
    return json.dumps([arm, task.learning_rate, task.seed], sort_keys=True)
