"""Check a model from its file, for the command line."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchnorm.check.checking import check
from batchnorm.check.formats import as_json, as_sarif
from batchnorm.check.mended import Mended
from batchnorm.check.report import NOTE, Report
from batchnorm.check.rules import RULES
from batchnorm.datafiles import BATCH_SIZE, cut
from batchnorm.errors import OptionError
from batchnorm.files import replacing
from batchnorm.fold.shell import check_shapes
from batchnorm.models import adapt, check_ending, load, save
from batchnorm.protocol import Model
from batchnorm.rooms import require
from batchnorm.tables import table

__all__ = ["FORMATS", "Outcome", "list_rules", "run"]

FORMATS = ("text", "json", "sarif", "html")
FOUND, UNUSABLE = 1, 2
# endings that say what is to be written
_ENDINGS = {".json": "json", ".sarif": "sarif", ".html": "html", ".htm": "html"}
_PAGE = Path("check.html")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a check says: on the standard output, beside it, and as an exit code."""

    said: str
    beside: tuple[str, ...]
    code: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What shall come out.

    Args:
        form: of the report, one of ``FORMATS``.
        out: the file of the report; ``None`` for the standard output.
        fix: the file of the mended model; ``None`` for none.
        command: what makes the report again.
    """

    form: str
    out: Path | None
    fix: Path | None
    command: str


def run(
    model: str,
    *,
    weights: Path | None = None,
    inputs: list[tuple[str, tuple[int, ...]]],
    data: Any | None = None,
    batch_size: int = BATCH_SIZE,
    batches: int | None = None,
    training: bool | None = None,
    form: str | None = None,
    out: Path | None = None,
    fix: Path | None = None,
    command: str = "",
    **codes: Any,
) -> Outcome:
    """Check a model, tell or write the report, and mend the model into a file where that is asked for.

    Args:
        model: a file, or ``package.module:factory``.
        weights: tensors for the model of a factory.
        inputs: name (may be empty) and shape of each input of an example; none for none.
        data: what `datafiles.read` returns, or an array ``(N, ...)``; ``None`` for none.
        batch_size: samples of a batch, where the data is arrays.
        batches: read at most these.
        training: whether the model is to be trained; ``None`` for what its mode says.
        form: ``"text"``, ``"json"``, ``"sarif"`` or ``"html"``; ``None`` for what the ending of ``out`` says.
        out: the file to write the report to, whole or not at all.
        fix: the file to write the mended model to.
        command: what makes the report again.
        codes: ``select`` and ``ignore`` of `check`.

    Returns:
        `Outcome`: the exit code is 0 without findings, 1 with findings (after mending: with errors or warnings that were
        left), 2 where something that was given could not be used.

    Raises:
        BatchNormError: whatever `models.load`, `check` or `models.save` raise; then nothing was written.
    """
    plan = _plan(model, form, out, fix, command)
    check_shapes(inputs)
    read = None if data is None else cut(data, batch_size)
    loaded = load(model, weights)
    if fix is not None:
        check_ending(loaded, fix)
    if training is False and hasattr(loaded, "eval"):
        # what a factory makes is in training mode
        loaded.eval()
    view = adapt(loaded)
    example = view.example(inputs)
    options: dict[str, Any] = {} if batches is None else {"batches": batches}
    report = check(view.model, example, data=read, training=training, **codes, **options)
    text = _told(report, model, plan)
    mended = None if fix is None else report.fix()
    if mended is not None and fix is not None:
        _save(mended.model, fix, view, example, read, training)
    lines = _written(report, text, plan) + ([] if mended is None else _mending(mended, plan))
    machine = plan.out is None and plan.form != "text"
    said, beside = ([text], lines) if machine else (lines, [])
    return Outcome("\n".join(said).rstrip("\n"), (*beside, *report.problems), _code(report, mended))


def list_rules() -> str:
    """Return the table of all rules: code, what it finds, what it needs beside the model."""
    return table(("Code", "Finds", "Needs"), [(r.code, r.title, r.needs or "–") for _, r in sorted(RULES.items())])


def _plan(model: str, form: str | None, out: Path | None, fix: Path | None, command: str) -> Plan:
    form = form or _ENDINGS.get(out.suffix if out else "", "text")
    out = _PAGE if form == "html" and out is None else out
    for path in (out, fix):
        if path is not None and not path.parent.is_dir():
            raise OptionError(f"the result must go into a folder that is there, {path.parent} is not")
    if out is not None and out.absolute() in (Path(model).absolute(), fix.absolute() if fix else None):
        raise OptionError(f"the report must go into a file of its own, {out} is the model's")
    if form == "html":
        require("batchnorm.check.page", "lab")
    return Plan(form, out, fix, command)


def _told(report: Report, model: str, plan: Plan) -> str:
    if plan.form == "text":
        return f"{report}\n"
    if plan.form == "html":
        return str(require("batchnorm.check.page", "lab").as_page(report, model, plan.command))
    return as_json(report, model) if plan.form == "json" else as_sarif(report, model)


def _written(report: Report, text: str, plan: Plan) -> list[str]:
    """Write the report if it goes to a file, and return what is said of it."""
    if plan.out is None:
        return [text.rstrip("\n")] if plan.form == "text" else []
    with replacing(plan.out) as partial:
        partial.write_text(text, encoding="utf-8")
    many = len(report)
    return [f"{many} finding{'' if many == 1 else 's'}, report written to {plan.out}"]


def _mending(mended: Mended, plan: Plan) -> list[str]:
    lines = [*str(mended).splitlines(), f"model written to {plan.fix}"]
    if plan.fix is not None and plan.fix.suffix in (".safetensors", ".pt"):
        lines.append("tensors alone: set modes, momenta and ε where the model is made")
    return lines


def _save(model: Any, path: Path, view: Model, example: Any, data: Any, training: bool | None) -> None:
    if training is not True and hasattr(model, "eval"):
        # a program keeps its mode for ever
        model.eval()
    if example is None and path.suffix == ".pt2" and hasattr(model, "forward"):
        if data is None or hasattr(data, "__next__"):
            raise OptionError(
                f"{path} holds a program, which is made with an example: give --input or --data, or write tensors"
            )
        example = view.example_of(next(iter(data)))
    save(model, path, example)


def _code(report: Report, mended: Mended | None) -> int:
    if report.problems:
        return UNUSABLE
    if mended is None:
        return FOUND if report.findings else 0
    notes = {(finding.code, finding.layer) for finding in report if finding.level == NOTE}
    return FOUND if any((left.code, left.layer) not in notes for left in mended.left) else 0
