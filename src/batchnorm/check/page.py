"""A report as a page: one HTML file that needs nothing else and asks nothing of a network."""

import datetime
import platform
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import batchnorm
from batchnorm.check import drawings
from batchnorm.check.drawings import SIGNS, number
from batchnorm.check.formats import title_of, why_of
from batchnorm.check.report import ERROR, NOTE, WARNING, Finding, Report

__all__ = ["as_page"]

LEVELS = (ERROR, WARNING, NOTE)
# small networks have the names of their layers in the strip, large ones those of their parts, where these are no more
NAMED, STAGES = 14, 24
# layers whose distributions are drawn: at most, at least, and those between that are so far off, in nats
MOST, LEAST, FAR = 12, 3, 0.02
# shares of less are usual
SHOWN = 0.05


@dataclass(slots=True)
class Cell:
    """One layer of the strip: its place (from 1), name, findings, and where a click leads."""

    place: int
    name: str
    findings: list[tuple[int, Finding]] = field(default_factory=list)
    distance: float | None = None

    @property
    def level(self) -> str:
        """The level of its worst finding; empty without findings."""
        return min((finding.level for _, finding in self.findings), key=LEVELS.index, default="")

    @property
    def sign(self) -> str:
        """What marks the level beside the colour."""
        return SIGNS[self.level]

    @property
    def target(self) -> str:
        """The worst finding, or the row of the layer."""
        worst = min(self.findings, key=lambda pair: LEVELS.index(pair[1].level), default=None)
        return f"finding-{worst[0]}" if worst else f"layer-{self.place}"

    @property
    def codes(self) -> list[tuple[int, str]]:
        """Number and code of each finding."""
        return [(i, finding.code) for i, finding in self.findings]

    @property
    def label(self) -> str:
        """What is read aloud."""
        said = ", ".join(dict.fromkeys(f"{finding.level} {finding.code}" for _, finding in self.findings))
        return f"Layer {self.place}, {self.name}: {said or 'nothing found'}"


@dataclass(slots=True)
class Part:
    """Findings of one rule that are mended alike, with their numbers in the report."""

    cure: str
    findings: list[tuple[int, Finding]] = field(default_factory=list)

    @property
    def message(self) -> str:
        """What was found, where it is the same everywhere; else empty."""
        messages = {finding.message for _, finding in self.findings}
        return next(iter(messages)) if len(messages) == 1 else ""

    @property
    def columns(self) -> list[str]:
        """The names of what was measured."""
        return list(dict.fromkeys(name for _, finding in self.findings for name in finding.numbers))


@dataclass(slots=True)
class Group:
    """All findings of one rule and level, in parts that are mended alike."""

    code: str
    title: str
    why: str
    level: str
    parts: dict[str, Part] = field(default_factory=dict)

    @property
    def layers(self) -> int:
        """How many layers it was found in."""
        return len({finding.layer for part in self.parts.values() for _, finding in part.findings if finding.layer})


def as_page(report: Report, model_name: str, command: str = "") -> str:
    """Return a report as one HTML page; every name that came from the user is escaped.

    Args:
        report: what `check` has returned.
        model_name: how the model is called, as the file that holds it.
        command: what makes the page again.

    Returns:
        HTML without scripts: a verdict, all layers in a strip, the findings, what the data has shown, what was not run.

    Example:
        >>> page = as_page(Report((), layers=("bn1", "bn2")), "<net>")
        >>> "Nothing was found in 2 normalization layers." in page, "&lt;net&gt;" in page
        (True, True)
    """
    cells = _cells(report)
    seen = _observed(report)
    return _environment().get_template("page.html.jinja").render(
        report=report,
        name=model_name,
        headline=_headline(report, cells),
        worst=report.findings[0] if report.findings else None,
        cells=cells,
        stages=_stages(cells),
        named=len(cells) <= NAMED,
        counts=[(level, SIGNS[level], sum(cell.level == level for cell in cells)) for level in (*LEVELS, "")],
        groups=_groups(report),
        gaps=_gaps(cells),
        panels=[_panel(cell, seen[cell.name]) for cell in _chosen(cells, seen)],
        observed=len(seen),
        kept=any(one.inputs is not None for one in seen.values()),
        reasons=_reasons(report),
        command=command,
        machine=_machine(report.model),
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )  # fmt: skip


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("batchnorm.check", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"number": number, "spoken": _spoken, "opened": _opened, "count": _count}
    return environment


def _headline(report: Report, cells: Sequence[Cell]) -> str:
    """Return the verdict in one sentence."""
    layers = _count(len(cells), "normalization layer")
    if not report.findings:
        return f"Nothing was found in {layers}."
    counts = [(level, sum(finding.level == level for finding in report)) for level in LEVELS]
    found = _listed([_count(many, level) for level, many in counts if many])
    sick = sum(bool(cell.findings) for cell in cells)
    names = {cell.name for cell in cells}
    places = [
        f"in {sick} of {layers}" if sick else "",
        "in layers beside them" if any(finding.layer and finding.layer not in names for finding in report) else "",
        "in the model as a whole" if any(not finding.layer for finding in report) else "",
    ]
    return f"{found} {_listed([place for place in places if place])}."


def _listed(parts: list[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _spoken(name: str) -> str:
    return name.replace("_", " ")


def _opened(sentence: str) -> str:
    if not re.match("[a-z]+ [^=]", sentence):
        # a name of code keeps its letters
        return sentence
    return f"{sentence[:1].upper()}{sentence[1:]}"


def _count(many: int, thing: str) -> str:
    return f"{many:,} {thing}{'' if many == 1 else 's'}"


def _cells(report: Report) -> list[Cell]:
    cells = {name: Cell(place, name) for place, name in enumerate(report.layers, 1)}
    for i, finding in enumerate(report.findings):
        # others name a layer beside a norm, or none
        if finding.layer in cells:
            cells[finding.layer].findings.append((i, finding))
    for name, one in _observed(report).items():
        if name in cells:
            cells[name].distance = one.distance
    return list(cells.values())


def _groups(report: Report) -> list[Group]:
    """Return the findings by rule, the worst first."""
    groups: dict[tuple[str, str], Group] = {}
    for i, finding in enumerate(report.findings):
        code = finding.code
        group = groups.setdefault(
            (code, finding.level), Group(code, title_of(code, report), why_of(code), finding.level)
        )
        group.parts.setdefault(finding.cure, Part(finding.cure)).findings.append((i, finding))
    return list(groups.values())


def _stages(cells: Sequence[Cell]) -> list[tuple[str, list[Cell]]]:
    """Return the cells in the parts of the network that their names tell, where that makes a few parts and not many."""
    if len(cells) > NAMED:
        # Keras has one name for the whole way, with underscores in it
        for separators in ("[./]", "[./_]"):
            stages = next((found for depth in range(1, 6) if len(found := _cut(cells, separators, depth)) > 1), [])
            if 1 < len(stages) <= min(STAGES, len(cells) / 2):
                return stages
    return [("", list(cells))]


def _cut(cells: Sequence[Cell], separators: str, depth: int) -> list[tuple[str, list[Cell]]]:
    """Return the cells in a row whose names begin alike, for so many parts of the name."""
    beginning = re.compile(rf"/?(?:.*?(?:{separators}|$)){{{depth}}}", re.DOTALL)
    stages: list[tuple[str, list[Cell]]] = []
    for cell in cells:
        found = beginning.match(cell.name)
        name = re.sub(f"{separators}$", "", found[0]) if found else cell.name
        if not stages or stages[-1][0] != name:
            stages.append((name, []))
        stages[-1][1].append(cell)
    return stages


def _observed(report: Report) -> dict[str, Any]:
    """Return what each layer has seen that can be held against what it stores."""
    if report.observation is None:
        return {}
    return {one.layer: one for one in report.observation.layers if one.kl is not None}


def _chosen(cells: Sequence[Cell], seen: dict[str, Any]) -> list[Cell]:
    """Return the layers whose distributions are drawn, in order: those with errors, and those that are far off."""

    def size(cell: Cell) -> tuple[bool, float]:
        return cell.level != ERROR, -(cell.distance or 0.0)

    first = sorted((cell for cell in cells if cell.name in seen), key=size)[:MOST]
    chosen = [cell for i, cell in enumerate(first) if i < LEAST or cell.level == ERROR or (cell.distance or 0.0) >= FAR]
    return sorted(chosen, key=lambda cell: cell.place)


def _gaps(cells: Sequence[Cell]) -> Markup:
    points = [
        drawings.Point(cell.name, cell.distance, cell.level, cell.target) for cell in cells if cell.distance is not None
    ]
    return _drawn(drawings.profile(points)) if len(points) > 1 else Markup("")


def _panel(cell: Cell, one: Any) -> dict[str, Any]:
    worst = [int(channel) for channel in np.argsort(-np.nan_to_num(one.kl), kind="stable")[: drawings.WORST]]
    return {
        "cell": cell,
        "facts": _facts(one),
        "overview": _drawn(drawings.overview(one, worst)),
        "channels": [_drawn(drawings.densities(one, channel)) for channel in worst],
    }


def _facts(one: Any) -> list[str]:
    """Return what else the data has shown, in words."""
    channels = int(np.size(one.mean))
    dead, saturated, between = round(one.dead * channels), one.saturated or 0.0, one.between or 0.0
    facts = [_count(channels, "channel")]
    if one.distance is not None:
        facts.append(f"distance {number(one.distance)}")
    if dead:
        facts.append(f"{dead} always the same")
    if one.off:
        facts.append(f"{one.off:.0%} never above 0")
    if saturated >= SHOWN:
        facts.append(f"{saturated:.0%} of the outputs beyond ±3")
    if between >= SHOWN:
        facts.append(f"{between:.0%} of the variance lies between batches")
    return facts


def _reasons(report: Report) -> list[tuple[str, list[Any]]]:
    """Return the rules that were not run, by reason."""
    reasons: dict[str, list[Any]] = {}
    for rule in report.not_run:
        reasons.setdefault(rule.reason, []).append(rule)
    return list(reasons.items())


def _machine(model: Any) -> str:
    root = type(model).__module__.partition(".")[0]
    versions = [f"batchnorm {batchnorm.__version__}", f"Python {platform.python_version()}", f"NumPy {np.__version__}"]
    for name in dict.fromkeys((root, "torch", "keras", "onnx")):
        version = getattr(sys.modules.get(name), "__version__", None)
        if version and name not in ("numpy", "builtins", "batchnorm"):
            versions.append(f"{name} {version}")
    return f"{platform.system()} {platform.machine()}, {', '.join(versions)}"


def _drawn(svg: str) -> Markup:
    """Let an SVG of ours into the page as it is; the drawings have escaped the names in it."""
    return Markup(svg)  # noqa: S704
