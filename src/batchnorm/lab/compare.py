"""The main job: find out on your own data whether, where and how batch normalization helps."""

import csv
import hashlib
import io
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from batchnorm.errors import DataError, OptionError, OutputError
from batchnorm.lab import deploy, grid
from batchnorm.lab.arms import ARMS, Arm, resolve
from batchnorm.lab.data import Dataset, load
from batchnorm.lab.networks import NETWORKS, build, factory_of
from batchnorm.lab.progress import Progress
from batchnorm.lab.report import Report, write_report
from batchnorm.lab.store import Store
from batchnorm.lab.tables import results_table
from batchnorm.lab.train import Recipe, Task, score, train_network
from batchnorm.lab.verdicts import ArmResult, Evidence, Margins, Verdict, analyse
from batchnorm.summary import Summary, summary

__all__ = ["Best", "Comparison", "compare"]

LEARNING_RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


@dataclass(frozen=True)
class Best:
    """The network to deploy: the best arm at its best learning rate, of the seed with the lowest validation log-loss.

    Args:
        task: arm, learning rate and seed.
        before: test log-loss and accuracy with the running statistics of training.
        recalibrated: the same with statistics over the training set.
        deployed: the folded network and its proof.
        summary: layers and parameters before folding.
        files: where it was saved; empty without an output folder.
        onnx: operators and error of the ONNX model; empty without an output folder.
    """

    task: Task
    before: tuple[float, float]
    recalibrated: tuple[float, float]
    deployed: deploy.Deployed
    summary: Summary
    files: tuple[Path, ...]
    onnx: dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """What `compare` found; prints as a table and the verdicts in words.

    Args:
        table: what each arm reaches.
        verdicts: what the pairs of arms prove, question by question.
        best: the network to deploy.
        evidence: all of it, with the notes on what limits it.
        rows: of every run.
        out: the folder with ``report.html``, ``runs.csv`` and ``best/``; ``None`` where nothing was written.
    """

    table: tuple[ArmResult, ...]
    verdicts: tuple[Verdict, ...]
    best: Best
    evidence: Evidence
    rows: tuple[dict[str, Any], ...]
    out: Path | None

    def __str__(self) -> str:
        return "\n".join([results_table(self.evidence), "", *map(str, self.verdicts), *self.evidence.notes])


def compare(
    data: Any,
    *,
    target: str | None = None,
    drop: Sequence[str] = (),
    image_size: tuple[int, int] | None = None,
    model: str = "mlp",
    arms: Iterable[Arm | str] = ("none", "before", "after"),
    learning_rates: Sequence[float] = LEARNING_RATES,
    seeds: int = 10,
    steps: int = 500,
    batch_size: int = 64,
    margins: Margins | None = None,
    threshold: float | None = None,
    out: str | Path | None = None,
    jobs: int | None = None,
    parallel: str = "processes",
    cluster: str | None = None,
    progress: bool = False,
) -> Comparison:
    """Train the same network with and without batch normalization, over learning rates and paired seeds, and say what helps.

    Every arm is trained at every learning rate with every seed; a seed fixes split, initial weights and order of the batches in
    all arms alike. Each arm's best learning rate is chosen on validation rows; arms are compared on test rows, seed by seed,
    by sign-flip permutation tests, corrected by Holm over the pairs of arms. The best network gets the statistics of the whole
    training set, is folded, verified and saved.

    Args:
        data: ``"digits"``; a ``.csv``, ``.tsv``, ``.parquet``, ``.npz`` or IDX file; a folder of IDX files or of class folders
            with images; arrays ``(x, y)``.
        target: the column of labels, for tables.
        drop: columns to leave out, for tables.
        image_size: ``(width, height)`` to scale images to.
        model: ``"mlp"``, ``"cnn"``, ``"resmlp"``, or ``"package.module:factory"``, called as ``factory(shape, classes, arm)``.
        arms: names of `batchnorm.lab.ARMS`, `batchnorm.lab.Arm` objects, or texts ``"name: key=value, key=value"``.
        learning_rates: the grid, positive.
        seeds: how many; 0, 1, 2, …
        steps: of stochastic gradient descent in each run.
        batch_size: rows a step.
        margins: differences that would not matter, for the verdict "no difference larger than".
        threshold: validation accuracy for "steps to" and "usable learning rates"; by default 90 % of the way from chance to the
            best arm's.
        out: folder for the report and the model. Finished runs in it are not computed again. ``None`` writes nothing.
        jobs: local processes; by default one for each core.
        parallel: ``"processes"``, ``"dask"`` or ``"ray"``.
        cluster: address of the Dask or Ray cluster.
        progress: show a progress bar.

    Returns:
        `Comparison`: ``.table``, ``.verdicts``, ``.best``; print it.

    Raises:
        DataError: data that can't be read or learned from.
        OptionError: an option out of range.
        OutputError: ``out`` can't be written, or holds another comparison.

    Example:
        >>> found = compare("digits", arms=["none", "before"], learning_rates=[0.1], seeds=1, steps=20, jobs=1)
        >>> [result.arm.name for result in found.table]
        ['none', 'before']

    Reference:
        Ioffe, Szegedy 2015 (arXiv:1502.03167), section 4.1. Bjorck and others 2018 (arXiv:1806.02375).
    """
    plan = _Plan(
        data=load(data, target=target, drop=tuple(drop), image_size=image_size),
        arms=resolve(arms),
        rates=_rates(learning_rates),
        seeds=range(_at_least(1, "seeds", seeds)),
        recipe=Recipe(model, _at_least(1, "steps", steps), _at_least(2, "batch_size", batch_size)),
        margins=margins or Margins(),
        threshold=threshold,
        source_options=_source_options(target, drop, image_size),
    )
    plan.check()
    workers = _at_least(1, "jobs", os.cpu_count() or 1 if jobs is None else jobs)
    folder = None if out is None else Path(out)
    with Store(folder, plan.identity()) as store:
        started = time.perf_counter()
        missing = store.missing(plan.tasks)
        finished = grid.run(missing, plan.recipe, plan.data, jobs=workers, parallel=parallel, cluster=cluster)
        with Progress(len(plan.tasks), len(plan.tasks) - len(missing), shown=progress) as bar:
            for task, row in finished:
                store.add(task, row)
                bar.advance(task, row)
        seconds = time.perf_counter() - started
        rows = store.rows(plan.tasks)
    return _conclude(plan, rows, folder, seconds, len(missing))


@dataclass(frozen=True)
class _Plan:
    """Everything that decides the numbers of a comparison."""

    data: Dataset
    arms: tuple[Arm, ...]
    rates: tuple[float, ...]
    seeds: range
    recipe: Recipe
    margins: Margins
    threshold: float | None
    source_options: tuple[str, ...]

    @property
    def tasks(self) -> list[Task]:
        """All runs, seeds outermost, so that an interrupted comparison has whole pairs."""
        return [Task(arm, rate, seed) for seed, rate, arm in product(self.seeds, self.rates, self.arms)]

    @property
    def chance(self) -> float:
        """The accuracy of always naming the most frequent class."""
        return float(np.bincount(self.data.y).max() / len(self.data.y))

    def check(self) -> None:
        """Refuse what every run would fail on, before the first one starts."""
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise OptionError(f"threshold must be an accuracy between 0 and 1, got {self.threshold}")
        split = self.data.split(0)
        for arm in self.arms:
            size = arm.batch_size or self.recipe.batch_size
            if len(split.y_train) < size:
                raise DataError(
                    f"{self.data.source}: a batch of arm {arm.name!r} needs {size} training rows, there are "
                    f"{len(split.y_train)} of {len(self.data.y)} rows: choose a smaller --batch-size"
                )
            x = torch.from_numpy(split.x_train[: max(2, size)])
            network = build(self.recipe.model, self.data.shape, len(self.data.classes), arm, 0, x)
            _check_output(network, x, arm, len(self.data.classes), self.recipe.model)

    def identity(self) -> dict[str, Any]:
        """What rows must share to be compared; arms, learning rates and seeds may be added later."""
        return {
            "data": self.data.fingerprint,
            "model": self.recipe.model,
            "model source": _source_of(self.recipe.model),
            "steps": self.recipe.steps,
            "batch_size": self.recipe.batch_size,
            "torch": torch.__version__,
        }


def _check_output(network: torch.nn.Module, x: torch.Tensor, arm: Arm, classes: int, model: str) -> None:
    try:
        with torch.no_grad():
            logits = network(x)
    except Exception as error:
        raise OptionError(
            f"{model} with arm {arm.name!r} must run on rows of shape {tuple(x.shape[1:])}: {error}"
        ) from error
    if not isinstance(logits, torch.Tensor) or logits.shape != (len(x), classes):
        got = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise OptionError(f"{model} must return one logit for each class, {(len(x), classes)}, got {got}")


def _source_of(model: str) -> str | None:
    """Return a digest of the file that a user's factory stands in: rows of an older version are not mixed in."""
    if model in NETWORKS:
        return None
    file = getattr(sys.modules.get(factory_of(model).__module__), "__file__", None)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else None


def _conclude(plan: _Plan, rows: list[dict[str, Any]], folder: Path | None, seconds: float, ran: int) -> Comparison:
    evidence = analyse(rows, plan.arms, plan.rates, chance=plan.chance, margins=plan.margins, threshold=plan.threshold)
    best = _best(plan, evidence, folder)
    found = Comparison(evidence.results, evidence.verdicts, best, evidence, tuple(rows), folder)
    if folder is not None:
        try:
            _write(folder / "runs.csv", _csv(rows))
            _write(
                folder / "comparison.json",
                json.dumps(_facts(plan, found) | {"ran": ran, "seconds": seconds}, indent=2) + "\n",
            )
            report = Report(plan.data, plan.recipe, evidence, rows, best, _command(plan, folder), seconds, ran)
            _write(folder / "report.html", write_report(report))
        except OSError as error:
            raise OutputError(f"the output folder {folder} must be one that can be written: {error}") from error
    return found


def _best(plan: _Plan, evidence: Evidence, folder: Path | None) -> Best:
    """Train the winner again, which gives the same network, and make it ready to ship."""
    winner = evidence.best
    task = Task(winner.arm, winner.learning_rate, winner.best_seed)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        network, _ = train_network(task, plan.recipe, plan.data)
        split = plan.data.split(task.seed)
        deployed = deploy.deploy(network, split.x_train, split.x_test)
        files, onnx = _save(plan, task, deployed, split.x_test, folder)
        return Best(
            task=task,
            before=score(network, split.x_test, split.y_test),
            recalibrated=score(deployed.network, split.x_test, split.y_test),
            deployed=deployed,
            summary=summary(network, torch.from_numpy(split.x_test[:2])),
            files=files,
            onnx=onnx,
        )
    finally:
        torch.set_num_threads(before)


def _save(
    plan: _Plan, task: Task, deployed: deploy.Deployed, x: np.ndarray, folder: Path | None
) -> tuple[tuple[Path, ...], dict[str, Any]]:
    if folder is None:
        return (), {}
    about = {
        "model": plan.recipe.model,
        "arm": task.arm.to_dict(),
        "shape": plan.data.shape,
        "classes": plan.data.classes,
    }
    try:
        onnx = deploy.save(deployed, folder / "best", x, about)
    except OSError as error:
        raise OutputError(f"the output folder {folder} must be one that can be written: {error}") from error
    return (folder / "best" / "model.safetensors", folder / "best" / "model.onnx"), onnx


def _source_options(target: str | None, drop: Sequence[str], image_size: tuple[int, int] | None) -> tuple[str, ...]:
    """Return the words of a command line that read the same data."""
    words = [] if target is None else ["--target", target]
    words += ["--drop", ",".join(drop)] if drop else []
    words += [] if image_size is None else ["--image-size", f"{image_size[0]}x{image_size[1]}"]
    return tuple(words)


def _rates(given: Sequence[float]) -> tuple[float, ...]:
    rates = tuple(sorted({float(rate) for rate in given}))
    if not rates or not all(math.isfinite(rate) and rate > 0 for rate in rates):
        raise OptionError(f"learning rates must be positive numbers, got {list(given)}")
    return rates


def _at_least(least: int, name: str, value: int) -> int:
    if value < least:
        raise OptionError(f"{name} must be at least {least}, got {value}")
    return value


_COLUMNS = (
    "arm", "learning_rate", "seed", "status", "steps",
    "val_log_loss", "val_accuracy", "test_log_loss", "test_accuracy",
)  # fmt: skip


def _csv(rows: list[dict[str, Any]]) -> str:
    """Return the numbers that depend on nothing but the seeds: the same comparison gives the same file."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _facts(plan: _Plan, found: Comparison) -> dict[str, Any]:
    best = found.best
    return {
        "data": plan.data.source,
        "identity": plan.identity(),
        "threshold": found.evidence.threshold,
        "worker_memory_mb": max(row["memory_mb"] for row in found.rows),
        "worker_threads": max(row["threads"] for row in found.rows),
        "arms": [
            {
                "name": r.arm.name,
                "learning_rate": r.learning_rate,
                "test_log_loss": [r.log_loss.mean, r.log_loss.low, r.log_loss.high],
                "test_accuracy": [r.accuracy.mean, r.accuracy.low, r.accuracy.high],
                "median_steps": r.steps if math.isfinite(r.steps) else None,
                "usable_learning_rates": r.usable,
            }
            for r in found.table
        ],
        "verdicts": [
            {
                "question": v.question,
                "arms": [v.first, v.second],
                "outcome": v.outcome,
                "difference": v.difference if math.isfinite(v.difference) else None,
                "interval": [b if math.isfinite(b) else None for b in (v.low, v.high)],
                "p": v.p,
                "p_holm": v.p_holm,
                "text": v.text,
            }
            for v in found.verdicts
        ],
        "notes": found.evidence.notes,
        "best": {
            "arm": best.task.arm.to_dict(),
            "learning_rate": best.task.learning_rate,
            "seed": best.task.seed,
            "test_running_statistics": best.before,
            "test_recalibrated_folded": best.recalibrated,
            "folded": best.deployed.folded,
            "kept": best.deployed.kept,
            "error": best.deployed.error,
            "bound": best.deployed.bound,
            "onnx": best.onnx,
        },
    }


def _command(plan: _Plan, folder: Path) -> str:
    """Return the command line that makes this comparison again."""
    words = ["batchnorm", "compare", plan.data.source, *plan.source_options]
    words += ["--out", str(folder), "--model", plan.recipe.model]
    for arm in plan.arms:
        words += ["--arm", arm.name if ARMS.get(arm.name) == arm else str(arm)]
    words += [
        "--learning-rates",
        ",".join(f"{rate:g}" for rate in plan.rates),
        "--seeds",
        str(len(plan.seeds)),
    ]
    words += ["--steps", str(plan.recipe.steps), "--batch-size", str(plan.recipe.batch_size)]
    if plan.threshold is not None:
        words += ["--threshold", f"{plan.threshold:g}"]
    return shlex.join(words)


def _write(path: Path, text: str) -> None:
    """Write a file as a whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
