"""The report: one HTML file that needs nothing else and asks nothing of a network."""

import datetime
import math
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from batchnorm.lab import figures
from batchnorm.lab.plan import Plan
from batchnorm.lab.results import Comparison
from batchnorm.lab.tables import cells
from batchnorm.lab.verdicts import Evidence, runs_at_best

__all__ = ["write_report"]

_OPENINGS = {
    "log_loss": "Does it predict better?",
    "accuracy": "Is it right more often?",
    "steps": "Does it learn sooner?",
    "usable": "Is it easier to tune?",
}


def write_report(plan: Plan, found: Comparison) -> str:
    """Return the report as HTML; every name that came from the user is escaped."""
    environment = Environment(
        loader=PackageLoader("batchnorm.lab", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    evidence, rows = found.evidence, found.rows
    questions = {
        opening: [verdict for verdict in found.verdicts if verdict.question == question]
        for question, opening in _OPENINGS.items()
    }
    versions = ", ".join(f"{name} {version}" for name, version in plan.framework.versions().items())
    return environment.get_template("report.html.jinja").render(
        plan=plan,
        found=found,
        evidence=evidence,
        questions={opening: verdicts for opening, verdicts in questions.items() if verdicts},
        cells=[cells(result) for result in found.table],
        drift=_drift(rows, evidence),
        curves=_drawn(figures.learning_curves(rows, evidence)),
        rates=_drawn(figures.loss_by_rate(evidence)),
        differences=_drawn(figures.differences(evidence)),
        activations=_drawn(figures.activations(rows, evidence)),
        diverged=sum(row["status"] == "diverged" for row in rows),
        guess=math.log(len(plan.data.classes)),
        command=plan.command(found.out or Path("comparison")),
        memory=max(row["memory_mb"] for row in rows),
        machine=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, {versions}",
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _drawn(svg: str) -> Markup:
    """Let an SVG of ours into the page as it is; matplotlib has escaped the names in it."""
    return Markup(svg)  # noqa: S704


def _drift(rows: Sequence[dict[str, Any]], evidence: Evidence) -> list[tuple[str, list[str]]]:
    """Return for each arm the mean drift of its activation layers over the seeds, at the best rate."""
    table = []
    for result in evidence.results:
        runs = [run["units"] for run in runs_at_best(rows, result)]
        layers = []
        for layer in zip(*runs, strict=False):
            known = [unit["drift"] for unit in layer if unit["drift"] is not None]
            layers.append(f"{sum(known) / len(known):.1f}" if known else "–")
        table.append((result.arm.name, layers))
    return table
