"""The pictures of the report, as SVG whose colours are the page's own: one drawing serves light and dark."""

import io
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from batchnorm.lab.verdicts import ArmResult, Evidence, Verdict, runs_at_best

__all__ = ["activations", "differences", "learning_curves", "loss_by_rate"]

# matplotlib draws in these, which then become variables of the page's style sheet
_INK, _FAINT = "#010203", "#040506"
_ARMS = [f"#0a0b{i:02x}" for i in range(8)]
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["Arial", "Helvetica", "DejaVu Sans"],
    "font.size": 10,
    "text.parse_math": False,
    "text.color": _INK,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _FAINT,
    "grid.alpha": 0.35,
    "grid.linewidth": 0.6,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "legend.frameon": False,
}


def learning_curves(rows: Sequence[dict[str, Any]], evidence: Evidence) -> str:
    """Draw validation log-loss over steps for each arm at its best rate: the seeds' median, and all but the outer tenths."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for i, result in enumerate(evidence.results):
            curves = [run["curve"] for run in runs_at_best(rows, result)]
            steps = [point[0] for point in max(curves, key=len)]
            values = np.full((len(curves), len(steps)), np.nan)
            for k, curve in enumerate(curves):
                values[k, : len(curve)] = [math.nan if point[2] is None else point[2] for point in curve]
            low, middle, high = np.nanquantile(values, [0.1, 0.5, 0.9], axis=0)
            label = f"{_short(result.arm.name)}, rate {result.learning_rate:g}"
            axes.plot(steps, middle, color=_color(i), label=label, linewidth=1.8, linestyle=_dash(i))
            axes.fill_between(steps, low, high, color=_color(i), alpha=0.15, linewidth=0)
        axes.set_yscale("log")
        _plain_numbers(axes.yaxis)
        axes.set_xlabel("steps of training")
        axes.set_ylabel("validation log-loss (nats)")
        axes.legend()

    return _svg("Validation log-loss during training, one line for each arm", draw, (7.5, 3.6))


def loss_by_rate(evidence: Evidence) -> str:
    """Draw test log-loss against the learning rate for each arm, with 95 % intervals; the chosen rate has a ring."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for i, result in enumerate(evidence.results):
            rates = [at.learning_rate for at in result.rates]
            means = [at.test_log_loss.mean for at in result.rates]
            axes.plot(
                rates, means, color=_color(i), marker=_marker(i), label=_short(result.arm.name), linestyle=_dash(i)
            )
            bounds = [(at.test_log_loss.low, at.test_log_loss.high) for at in result.rates]
            if all(math.isfinite(v) for pair in bounds for v in pair):
                # a lower bound below zero can't be drawn on a logarithmic axis
                low, high = zip(*((max(a, m / 10), b) for (a, b), m in zip(bounds, means, strict=True)), strict=True)
                axes.fill_between(rates, low, high, color=_color(i), alpha=0.15, linewidth=0)
            best = rates.index(result.learning_rate)
            axes.plot(rates[best], means[best], "o", markersize=13, fillstyle="none", color=_color(i))
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            _plain_numbers(axis)
        axes.set_xlabel("learning rate")
        axes.set_ylabel("test log-loss (nats)")
        axes.legend()

    return _svg("Test log-loss against the learning rate, one line for each arm", draw, (7.5, 3.6))


def differences(evidence: Evidence) -> str:
    """Draw the paired differences of each pair of arms in log-loss and accuracy, with 95 % intervals."""
    panels = [
        ("log_loss", 1.0, "difference in test log-loss (nats)"),
        ("accuracy", 100.0, "difference in test accuracy (points)"),
    ]
    pairs = sum(verdict.question == "log_loss" for verdict in evidence.verdicts)

    def draw(figure: Figure) -> None:
        for axes, (question, scale, label) in zip(figure.subplots(1, 2), panels, strict=True):
            _forest(axes, [v for v in evidence.verdicts if v.question == question], scale)
            axes.set_xlabel(label)

    return _svg("Differences between the arms with 95 % intervals", draw, (9, 1.3 + 0.4 * pairs)) if pairs else ""


def activations(rows: Sequence[dict[str, Any]], evidence: Evidence) -> str:
    """Draw what flows into one unit of each activation layer during training: its 15th, 50th and 85th percentile.

    Reference:
        Ioffe, Szegedy: Batch Normalization, 2015 (arXiv:1502.03167), Figure 1 (b, c).
    """
    chosen = [_row_of(rows, result)["units"] for result in evidence.results]
    layers = max(map(len, chosen))
    if layers == 0:
        return ""

    def draw(figure: Figure) -> None:
        grid = figure.subplots(len(chosen), layers, sharex=True, squeeze=False)
        for i, (result, units) in enumerate(zip(evidence.results, chosen, strict=True)):
            for k, axes in enumerate(grid[i]):
                if k < len(units):
                    _percentiles(axes, units[k], i)
                if i == 0:
                    axes.set_title(f"activation layer {k + 1}")
                if i == len(chosen) - 1:
                    axes.set_xlabel("steps")
            grid[i][0].set_ylabel(_short(result.arm.name))

    size = (max(7.5, 1.9 * layers), 0.8 + 1.5 * len(chosen))
    return _svg("Percentiles of the input of one unit in each activation layer, a row for each arm", draw, size)


def _forest(axes: Axes, verdicts: Sequence[Verdict], scale: float) -> None:
    for y, verdict in enumerate(reversed(verdicts)):
        proved = verdict.outcome in ("first", "second")
        if math.isfinite(verdict.low):
            axes.plot([verdict.low * scale, verdict.high * scale], [y, y], color=_INK, linewidth=1.4)
        axes.plot(verdict.difference * scale, y, "o", color=_INK, fillstyle="full" if proved else "none")
    axes.axvline(0, color=_FAINT, linewidth=1.2)
    axes.set_yticks(range(len(verdicts)), [f"{_short(v.first)} − {_short(v.second)}" for v in reversed(verdicts)])
    axes.set_ylim(-0.6, len(verdicts) - 0.4)


def _percentiles(axes: Axes, unit: dict[str, Any], arm: int) -> None:
    low, middle, high = np.transpose(unit["percentiles"])
    axes.plot(unit["steps"], middle, color=_color(arm), linewidth=1.6)
    axes.fill_between(unit["steps"], low, high, color=_color(arm), alpha=0.2, linewidth=0)
    axes.tick_params(labelsize=8)


def _plain_numbers(axis: Axis) -> None:
    """Give a logarithmic axis plain numbers at 1, 2 and 5 of each decade."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))


def _row_of(rows: Sequence[dict[str, Any]], result: ArmResult) -> dict[str, Any]:
    """Return the run of an arm at its best rate whose seed did best."""
    return next(run for run in runs_at_best(rows, result) if run["seed"] == result.best_seed)


def _svg(title: str, draw: Any, size: tuple[float, float]) -> str:
    """Return a drawing as an SVG element that stands in an HTML page."""
    with rc_context({**_STYLE, "svg.hashsalt": title}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for name, color in {"ink": _INK, "faint": _FAINT, **{f"arm{i}": c for i, c in enumerate(_ARMS)}}.items():
        svg = svg.replace(color, f"var(--{name})")
    width = re.search(r'width="([\d.]+)pt"', svg)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    limit = f"{float(width[1]) * 4 / 3:.0f}px" if width else "100%"
    return svg.replace("<svg", f'<svg role="img" aria-label="{title}" style="max-width:{limit}"', 1)


def _short(name: str, most: int = 18) -> str:
    """Cut a name that would leave no room for the picture; tables show it whole."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _color(i: int) -> str:
    return _ARMS[i % len(_ARMS)]


def _dash(i: int) -> str:
    return ("-", "--", "-.", ":")[i // 2 % 4] if i else "-"


def _marker(i: int) -> str:
    return "osD^vPX*"[i % 8]
