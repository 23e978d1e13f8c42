"""The report: one HTML file that needs nothing else and asks nothing of a network."""

import datetime
import math
import platform
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from batchnorm.lab import figures
from batchnorm.lab.data import Dataset
from batchnorm.lab.tables import cells
from batchnorm.lab.train import Recipe
from batchnorm.lab.verdicts import Evidence

if TYPE_CHECKING:
    from batchnorm.lab.compare import Best

__all__ = ["Report", "write_report"]

_OPENINGS = {
    "log_loss": "Does it predict better?",
    "accuracy": "Is it right more often?",
    "steps": "Does it learn sooner?",
    "usable": "Is it easier to tune?",
}


@dataclass(frozen=True)
class Report:
    """What a report shows.

    Args:
        data: the data set.
        recipe: what all runs shared.
        evidence: the answers.
        rows: of every run.
        best: the network to deploy.
        command: the command line that makes it again.
        seconds: that the runs of this call took.
        ran: how many runs those were; the others were in the folder.
    """

    data: Dataset
    recipe: Recipe
    evidence: Evidence
    rows: list[dict[str, Any]]
    best: "Best"
    command: str
    seconds: float
    ran: int


def write_report(report: Report) -> str:
    """Return the report as HTML; every name that came from the user is escaped."""
    environment = Environment(
        loader=PackageLoader("batchnorm.lab", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    evidence = report.evidence
    questions = {
        opening: [verdict for verdict in evidence.verdicts if verdict.question == question]
        for question, opening in _OPENINGS.items()
    }
    return environment.get_template("report.html.jinja").render(
        report=report,
        evidence=evidence,
        questions={opening: found for opening, found in questions.items() if found},
        cells=[cells(result) for result in evidence.results],
        drift=_drift(report.rows, evidence),
        curves=_drawn(figures.learning_curves(report.rows, evidence)),
        rates=_drawn(figures.loss_by_rate(evidence)),
        differences=_drawn(figures.differences(evidence)),
        activations=_drawn(figures.activations(report.rows, evidence)),
        diverged=sum(row["status"] == "diverged" for row in report.rows),
        guess=math.log(len(report.data.classes)),
        memory=max(row["memory_mb"] for row in report.rows),
        machine=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}",
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _drawn(svg: str) -> Markup:
    """Let an SVG of ours into the page as it is; matplotlib has escaped the names in it."""
    return Markup(svg)  # noqa: S704


def _drift(rows: list[dict[str, Any]], evidence: Evidence) -> list[tuple[str, list[str]]]:
    """Return for each arm the mean drift of its activation layers over the seeds, at the best rate."""
    table = []
    for result in evidence.results:
        runs = [r["units"] for r in rows if r["arm"] == result.arm.name and r["learning_rate"] == result.learning_rate]
        layers = []
        for layer in zip(*runs, strict=False):
            known = [unit["drift"] for unit in layer if unit["drift"] is not None]
            layers.append(f"{sum(known) / len(known):.1f}" if known else "–")
        table.append((result.arm.name, layers))
    return table
