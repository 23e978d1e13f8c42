"""The main job: find out on your own data whether, where and how batch normalization helps."""

import json
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from batchnorm.errors import OutputError
from batchnorm.lab import grid
from batchnorm.lab.arms import Arm, resolve
from batchnorm.lab.data import load_data
from batchnorm.lab.outputs import facts_of, rows_as_csv, write
from batchnorm.lab.plan import Plan, at_least, rates_of, source_options
from batchnorm.lab.progress import Runs
from batchnorm.lab.report import write_report
from batchnorm.lab.results import Best, Comparison
from batchnorm.lab.shipping import Deployed, Saved
from batchnorm.lab.store import Store
from batchnorm.lab.tasks import Recipe, Task
from batchnorm.lab.verdicts import Evidence, Margins, analyse

__all__ = ["compare"]

LEARNING_RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


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
        model: ``"mlp"``, ``"cnn"``, ``"resmlp"``, or ``"package.module:factory"``, called as ``factory(shape, classes, arm)``;
            in Keras ``"keras:dense"``, ``"keras:cnn"`` or ``"keras:package.module:factory"``.
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
        MissingDependencyError: a package that the model needs is not installed.
        OptionError: an option out of range.
        OutputError: ``out`` can't be written, or holds another comparison.

    Example:
        >>> found = compare("digits", arms=["none", "before"], learning_rates=[0.1], seeds=1, steps=20, jobs=1)
        >>> [result.arm.name for result in found.table]
        ['none', 'before']

    Reference:
        Ioffe, Szegedy 2015 (arXiv:1502.03167), section 4.1. Bjorck and others 2018 (arXiv:1806.02375).
    """
    plan = Plan(
        data=load_data(data, target=target, drop=tuple(drop), image_size=image_size),
        arms=resolve(arms),
        rates=rates_of(learning_rates),
        seeds=range(at_least(1, "seeds", seeds)),
        recipe=Recipe(model, at_least(1, "steps", steps), at_least(2, "batch_size", batch_size)),
        margins=margins or Margins(),
        threshold=threshold,
        source_options=source_options(target, drop, image_size),
    )
    plan.check()
    workers = at_least(1, "jobs", os.cpu_count() or 1 if jobs is None else jobs)
    folder = None if out is None else Path(out)
    with Store(folder, plan.identity()) as store:
        started = time.perf_counter()
        missing = store.missing(plan.tasks)
        finished = grid.run(missing, plan.recipe, plan.data, jobs=workers, parallel=parallel, cluster=cluster)
        with Runs(len(plan.tasks), len(plan.tasks) - len(missing), shown=progress) as bar:
            for task, row in finished:
                store.add(task, row)
                bar.finish(task, row)
        seconds = time.perf_counter() - started
        rows = store.rows(plan.tasks)
    found = _conclude(plan, rows, folder, seconds, len(missing))
    if folder is not None:
        try:
            write(folder / "runs.csv", rows_as_csv(rows))
            write(folder / "comparison.json", json.dumps(facts_of(plan, found), indent=2) + "\n")
            write(folder / "report.html", write_report(plan, found))
        except OSError as error:
            raise OutputError(f"the output folder {folder} must be one that can be written: {error}") from error
    return found


def _conclude(plan: Plan, rows: list[dict[str, Any]], folder: Path | None, seconds: float, ran: int) -> Comparison:
    evidence = analyse(rows, plan.arms, plan.rates, chance=plan.chance, margins=plan.margins, threshold=plan.threshold)
    return Comparison(
        table=evidence.results,
        verdicts=evidence.verdicts,
        best=_best(plan, evidence, folder),
        evidence=evidence,
        rows=tuple(rows),
        out=folder,
        seconds=seconds,
        ran=ran,
    )


def _best(plan: Plan, evidence: Evidence, folder: Path | None) -> Best:
    """Train the winner again, which gives the same network, and make it ready to ship."""
    winner, framework = evidence.best, plan.framework
    task = Task(winner.arm, winner.learning_rate, winner.best_seed)
    with framework.alone():
        network, _ = framework.train(task, plan.recipe, plan.data)
        split = plan.data.split(task.seed)
        deployed = framework.deploy(network, split.x_train, split.x_test)
        saved = _save(plan, task, deployed, split.x_test, folder)
        return Best(
            task=task,
            before=framework.score(network, split.x_test, split.y_test),
            recalibrated=framework.score(deployed.network, split.x_test, split.y_test),
            deployed=deployed,
            summary=framework.summary(network, split.x_test[:2]),
            files=() if folder is None else tuple(folder / "best" / name for name in saved.files),
            onnx=saved.onnx,
            left_out=saved.left_out,
        )


def _save(plan: Plan, task: Task, deployed: Deployed, x: np.ndarray, folder: Path | None) -> Saved:
    if folder is None:
        return Saved()
    about = {
        "model": plan.recipe.model,
        "arm": task.arm.to_dict(),
        "shape": plan.data.shape,
        "classes": plan.data.classes,
    }
    try:
        return plan.framework.save(deployed, folder / "best", x, about)
    except OSError as error:
        raise OutputError(f"the output folder {folder} must be one that can be written: {error}") from error
