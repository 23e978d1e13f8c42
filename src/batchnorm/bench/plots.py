"""The pictures of contests, as SVG beside the raw values."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, StrMethodFormatter

from batchnorm.bench.ratios import multiple
from batchnorm.bench.scores import groups, shape_of

__all__ = ["dots", "lines"]

_STYLE: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "batchnorm", "font.size": 8, "legend.frameon": False}
_COLOURS = {"torch": "#555555", "ours": "#00796b", "torch.compile": "#b26a00", "JAX": "#5e35b1"}


def dots(rows: Sequence[dict[str, Any]], names: Sequence[str], base: str, label: str, file: Path) -> Path:
    """Draw the time of some contestants as a multiple of another's, a panel for each group of rows.

    A dot is the median of the rounds, its bar the 95 % interval. The line at 1 is ``base``.

    Args:
        rows: contests; those without ``base`` are left out.
        names: whose dots are drawn.
        base: whose time is 1.
        label: of the axis.
        file: where the picture goes.
    """
    panels = {
        group: some
        for group, every in groups(rows).items()
        if (some := [row for row in every if base in row["seconds"]])
    }
    heights = [len(some) + 1.5 for some in panels.values()] or [1]

    def draw(figure: Figure) -> None:
        every = figure.subplots(max(1, len(panels)), 1, height_ratios=heights, squeeze=False, sharex=True)[:, 0]
        for axes, (group, some) in zip(every, panels.items(), strict=False):
            _panel(axes, some, names, base)
            axes.set_title(group, loc="left", fontsize=9)
        every[-1].set_xlabel(label)
        legend = {
            label: handle for axes in every for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(legend.values(), legend, loc="outside upper right", ncols=len(legend) or 1)

    return _saved(draw, (7.0, 0.8 + 0.22 * sum(heights)), file)


def _panel(axes: Axes, rows: list[dict[str, Any]], names: Sequence[str], base: str) -> None:
    for i, name in enumerate(names):
        points = [(place, multiple(row, name, base)) for place, row in enumerate(rows) if name in row["seconds"]]
        if not points:
            continue
        values = [ratio.value for _, ratio in points]
        bars = [
            [max(0.0, ratio.value - ratio.interval[0]) for _, ratio in points],
            [max(0.0, ratio.interval[1] - ratio.value) for _, ratio in points],
        ]
        colour = _COLOURS.get(name, f"C{i}")
        axes.errorbar(values, [p for p, _ in points], xerr=bars, fmt="o", ms=4, lw=1, color=colour, label=name)
    axes.axvline(1, color="black", lw=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks([0.25, 0.5, 1, 2, 4, 8, 16, 32])
    axes.grid(axis="x", alpha=0.3)
    axes.set_yticks(range(len(rows)), [shape_of(row) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)


def lines(rows: Sequence[dict[str, Any]], names: Sequence[str], file: Path) -> Path:
    """Draw nanoseconds an element over the number of elements."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for i, name in enumerate(names):
            timed = [row for row in rows if name in row["seconds"]]
            points = [(row["elements"], 1e9 * median(row["seconds"][name]) / row["elements"]) for row in timed]
            if points:
                axes.plot(*zip(*points, strict=True), "o-", color=_COLOURS.get(name, f"C{i}"), label=name)
        axes.set_xscale("log")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("elements of the batch")
        axes.set_ylabel("ns an element, forward and backward")
        axes.legend()

    return _saved(draw, (6.0, 3.2), file)


def _saved(draw: Any, size: tuple[float, float], file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file
