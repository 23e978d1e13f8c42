"""What a comparison found, as `compare` returns it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchnorm.lab.shipping import Deployed
from batchnorm.lab.tables import results_table
from batchnorm.lab.tasks import Task
from batchnorm.lab.verdicts import ArmResult, Evidence, Verdict
from batchnorm.summary import Summary

__all__ = ["Best", "Comparison"]


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
        onnx: operators and error of the ONNX model; empty without one.
        left_out: a file that could not be written, and why; empty where all were.
    """

    task: Task
    before: tuple[float, float]
    recalibrated: tuple[float, float]
    deployed: Deployed
    summary: Summary
    files: tuple[Path, ...]
    onnx: dict[str, Any]
    left_out: str = ""


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
        seconds: that the runs of this call took.
        ran: how many runs those were; the others were in the folder already.
    """

    table: tuple[ArmResult, ...]
    verdicts: tuple[Verdict, ...]
    best: Best
    evidence: Evidence
    rows: tuple[dict[str, Any], ...]
    out: Path | None
    seconds: float
    ran: int

    def __str__(self) -> str:
        answer = [self.evidence.headline, ""] if self.evidence.headline else []
        return "\n".join([results_table(self.evidence), "", *answer, *map(str, self.verdicts), *self.evidence.notes])
