"""The pictures of a check, as SVG in the colours of the page: what a layer has stored beside what the data has shown."""

from collections.abc import Sequence
from html import escape
from math import asinh, ceil, floor, isfinite, log10, sqrt
from typing import Any, NamedTuple

import numpy as np

__all__ = ["densities", "moves", "overview", "profile", "short"]

# worst channels that are drawn one by one
WORST = 3
# what lies below is no distance that anybody would see
FLOOR = 1e-4
BINS = 36
THOUSAND, MILLION = 1e3, 1e6
SIGNS = {"error": "✕", "warning": "!", "note": "i", "": "·"}


class Point(NamedTuple):
    """One layer of the profile: its name, its distance, the level of its worst finding, where a click leads."""

    layer: str
    distance: float
    level: str
    target: str


def profile(points: Sequence[Point]) -> str:
    """Draw a distance for each layer over depth, on a logarithmic scale; a click leads to the layer."""
    width, height, left, top, bottom = 900.0, 250.0, 56.0, 26.0, 40.0
    known = [max(point.distance, FLOOR) for point in points if isfinite(point.distance)]
    high = max(1.0, 10.0 ** ceil(log10(max(known, default=1.0))))
    low = min(10.0 ** floor(log10(min(known, default=1.0))), high / 100)
    floor_y = height - bottom

    def x(i: int) -> float:
        return left + (i + 0.5) * (width - left - 12) / len(points)

    def y(distance: float) -> float:
        share = log10(min(max(distance, low), high) / low) / log10(high / low) if isfinite(distance) else 1.0
        return floor_y - share * (floor_y - top)

    parts = [
        _line(left, y(tick), width, y(tick), "grid") + _text(left - 8, y(tick) + 4, _power(tick), "end")
        for tick in _decades(low, high)
    ]
    every = max(1, ceil(len(points) / 20))
    every = next(step for step in (1, 2, 5, 10, 20, 50, 100, 10**9) if step >= every)
    numbers = [i for i in range(len(points)) if i == 0 or (i + 1) % every == 0]
    parts += [_text(x(i), floor_y + 17, str(i + 1), "middle") for i in numbers]
    parts.append(_text((left + width) / 2, height - 4, "normalization layer, in order", "middle"))
    for i, point in enumerate(points):
        named = f"{point.layer}: distance {number(point.distance)}"
        mark = _mark(x(i), y(point.distance), point.level)
        stem = _line(x(i), floor_y, x(i), y(point.distance), f"stem {point.level or 'ok'}")
        parts.append(f'<a href="#{escape(point.target)}" tabindex="-1"><title>{escape(named)}</title>{stem}{mark}</a>')
    parts += _named(points, x, y)
    said = _said_of_profile(points)
    return _svg(said, width, height, parts, wide=True)


def _said_of_profile(points: Sequence[Point]) -> str:
    worst = max(points, key=lambda point: point.distance if isfinite(point.distance) else np.inf)
    return (
        f"Distance between stored statistics and data of {len(points)} layers over depth; "
        f"largest in {worst.layer}, {number(worst.distance)}"
    )


def _named(points: Sequence[Point], x: Any, y: Any) -> list[str]:
    """Name the layers that stand out, where there is room."""
    usual = float(np.median([point.distance for point in points]))
    order = sorted(range(len(points)), key=lambda i: points[i].distance, reverse=True)
    chosen: list[int] = []
    for i in order[:8]:
        if points[i].distance > 3 * usual and len(chosen) < WORST and all(abs(x(i) - x(k)) > 150 for k in chosen):
            chosen.append(i)
    return [
        _text(
            min(max(x(i), 90), 830), max(y(points[i].distance) - 12, 12), short(points[i].layer, 22), "middle", "name"
        )
        for i in chosen
    ]


def moves(seen: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return how far the mean of the data is off for each channel, in stored deviations, and the ratio of the variances."""
    mean, variance, stored_mean, stored = (
        np.asarray(part, np.float64).ravel()
        for part in (seen.mean, seen.variance, seen.stored_mean, seen.stored_variance)
    )
    with np.errstate(all="ignore"):
        return (mean - stored_mean) / np.sqrt(stored + seen.eps), (variance + seen.eps) / (stored + seen.eps)


def overview(seen: Any, worst: Sequence[int]) -> str:
    """Draw every channel: how far its mean is off, and by which factor its variance; the worst are marked.

    Args:
        seen: what one layer has seen (`Observed`).
        worst: channels to mark, as indices.
    """
    shift, ratio = moves(seen)
    with np.errstate(all="ignore"):
        factor = np.log2(ratio)
    finite = np.isfinite(shift) & np.isfinite(factor)
    width, height, left, right, top, bottom = 300.0, 212.0, 52.0, 12.0, 12.0, 40.0
    reach = max(1.0, 1.1 * float(np.abs(shift[finite]).max(initial=0.0)))
    rise = max(1.0, 1.1 * float(np.abs(factor[finite]).max(initial=0.0)))
    middle, half = (left + width - right) / 2, (width - right - left) / 2
    centre, tall = (top + height - bottom) / 2, (height - bottom - top) / 2

    def x(value: float) -> float:
        # far ones must not squeeze the others into one spot
        share = value / reach if reach <= 4 else asinh(2 * value) / asinh(2 * reach)
        return middle + half * share

    def y(value: float) -> float:
        return centre - tall * value / rise

    parts = [_line(x(t), top, x(t), height - bottom, "grid" if t else "axis") for t in _shifts(reach)]
    parts += [_text(x(t), height - bottom + 16, _signed(t), "middle") for t in _shifts(reach)]
    for tick, told in _factors(rise):
        parts.append(_line(left, y(tick), width - right, y(tick), "grid" if tick else "axis"))
        parts.append(_text(left - 7, y(tick) + 4, told, "end"))
    places = {(round(x(a), 1), round(y(b), 1)) for a, b in zip(shift[finite], factor[finite], strict=True)}
    path = "".join(f"M{a:g} {b:g}h0" for a, b in sorted(places))
    parts.append(f'<path class="dots" d="{path}"/>')
    for channel in worst:
        if finite[channel]:
            a, b = x(float(shift[channel])), y(float(factor[channel]))
            parts.append(
                f'<circle class="ring" cx="{a:.1f}" cy="{b:.1f}" r="5.5"><title>channel {channel}</title></circle>'
            )
    parts.append(_text(middle, height - 6, "mean of the data off by, in stored σ", "middle"))
    parts.append(
        f'<text class="tick" transform="translate(12 {centre:.0f}) rotate(-90)" text-anchor="middle">variance</text>'
    )
    said = (
        f"All {len(shift)} channels: mean of the data off by at most {number(float(np.abs(shift[finite]).max(initial=0)))} "
        f"stored deviations, variance by factors of {number(float(ratio[finite].min(initial=np.inf)))} to "
        f"{number(float(ratio[finite].max(initial=0)))}"
    )
    return _svg(said, width, height, parts)


def densities(seen: Any, channel: int) -> str:
    """Draw one channel: the normal density of the stored statistics, that of the data, and a histogram where there is one."""
    mean, variance, stored_mean, stored = (
        float(np.asarray(part).ravel()[channel])
        for part in (seen.mean, seen.variance, seen.stored_mean, seen.stored_variance)
    )
    width, height, top, bottom = 194.0, 172.0, 30.0, 26.0
    if not all(map(isfinite, (mean, variance, stored_mean, stored))):
        return _svg(f"Channel {channel} is not finite", width, height, [_text(10, 20, "not finite", "start")])
    deviations = [sqrt(max(v, 0.0)) for v in (variance, stored)]
    low = min(mean - 3.5 * deviations[0], stored_mean - 3.5 * deviations[1])
    high = max(mean + 3.5 * deviations[0], stored_mean + 3.5 * deviations[1])
    if high <= low:
        low, high = low - 1.0, high + 1.0
    base = height - bottom

    def x(value: float) -> float:
        return 8 + (value - low) / (high - low) * (width - 16)

    def y(share: float) -> float:
        return base - min(share, 1.2) / 1.2 * (base - top)

    parts = [_line(0, base, width, base, "axis")]
    parts += [_text(x(t), base + 16, number(t), "middle") for t in _ticks(low, high) if 12 < x(t) < width - 12]
    parts.append(_bars(seen, channel, (low, high), deviations[0], x, y))
    parts.append(_bell(mean, deviations[0], x, y, "data"))
    parts.append(_bell(stored_mean, deviations[1], x, y, "stored"))
    told = f"channel {channel}"
    if seen.kl is not None:
        told += f", {number(float(np.asarray(seen.kl).ravel()[channel]))} nats off"
    parts.append(_text(2, 14, told, "start", "name"))
    said = (
        f"Channel {channel}: stored mean {number(stored_mean)} and deviation {number(deviations[1])}, "
        f"of the data {number(mean)} and {number(deviations[0])}"
    )
    return _svg(said, width, height, parts)


def _bell(mean: float, deviation: float, x: Any, y: Any, kind: str) -> str:
    if deviation == 0.0:
        return _line(x(mean), y(0), x(mean), y(1), f"bell {kind}")
    steps = np.linspace(-3.5, 3.5, 57)
    path = " ".join(f"{x(mean + deviation * float(s)):.1f},{y(float(np.exp(-s * s / 2))):.1f}" for s in steps)
    return f'<polyline class="bell {kind}" points="{path}"/>'


def _bars(seen: Any, channel: int, span: tuple[float, float], deviation: float, x: Any, y: Any) -> str:
    """Draw the histogram of a channel's inputs, to the scale of the data's normal density."""
    values = inputs_of(seen, channel)
    if values is None or deviation == 0.0:
        return ""
    counts, edges = np.histogram(values, min(BINS, max(6, round(2 * float(np.cbrt(values.size))))), range=span)
    wide = edges[1] - edges[0]
    shares = counts / max(1, values.size) / wide * deviation * (2 * np.pi) ** 0.5
    path = "".join(
        f"M{x(float(a)):.1f} {y(0):.1f}V{y(float(share)):.1f}H{x(float(a + wide)):.1f}V{y(0):.1f}"
        for a, share in zip(edges, shares, strict=False)
        if share > 0
    )
    return f'<path class="bars" d="{path}"/>'


def inputs_of(seen: Any, channel: int) -> np.ndarray | None:
    """Return the inputs of one channel that were kept, flat; ``None`` where there are none."""
    if seen.inputs is None or channel not in seen.channels:
        return None
    place = int(np.flatnonzero(seen.channels == channel)[0])
    values = np.asarray(seen.inputs)[:, place].astype(np.float64).ravel()
    values = values[np.isfinite(values)]
    return values if values.size else None


def number(value: float) -> str:
    """Return a number as a person reads it."""
    if not isfinite(value):
        return "not a number" if value != value else "∞" if value > 0 else "−∞"
    plain = abs(value) < MILLION and (value == int(value) or abs(value) >= THOUSAND)
    return (f"{value:,.0f}" if plain else f"{value:.3g}").replace("-", "−")


def _signed(value: float) -> str:
    return f"+{number(value)}" if value > 0 else number(value)


def short(name: str, most: int) -> str:
    """Cut a dotted name that would leave no room; its end tells more than its beginning."""
    return name if len(name) <= most else f"…{name[1 - most :]}"


def _mark(x: float, y: float, level: str) -> str:
    """Return a mark whose shape tells the level too: a cross, a triangle, a square, a dot."""
    shape = {
        "error": f"M{x - 4:.1f} {y - 4:.1f}l8 8m0 -8l-8 8",
        "warning": f"M{x:.1f} {y - 5.5:.1f}l5 9h-10z",
        "note": f"M{x - 3.5:.1f} {y - 3.5:.1f}h7v7h-7z",
    }.get(level, f"M{x:.1f} {y:.1f}h0")
    return f'<path class="mark {level or "ok"}" d="{shape}"/>'


def _shifts(reach: float) -> list[float]:
    if reach <= 4:
        step = 1.0 if reach > 1.5 else 0.5
        most = floor(reach / step)
        return [step * k for k in range(-most, most + 1)]
    known = [first * 10.0**k for k in range(16) for first in (1, 3) if first * 10.0**k <= reach]
    chosen = known[:: -max(1, ceil(len(known) / 3))][::-1]
    return [*(-shift for shift in reversed(chosen)), 0.0, *chosen]


def _factors(rise: float) -> list[tuple[float, str]]:
    """Return where the axis of the ratios has ticks, as powers of 2, and what they say."""
    step = next((s for s in (1, 2, 5) if rise / s < 3.5), 10)
    step *= max(1, ceil(rise / step / 4))
    most = floor(rise / step)
    return [
        (float(k), "×1" if k == 0 else f"{'×' if k > 0 else '÷'}{_factor(2.0 ** abs(k))}")
        for k in range(-most * step, most * step + 1, step)
    ]


def _factor(value: float) -> str:
    return f"{value:g}" if value < 10000 else f"10{_raised(round(log10(value)))}"


def _decades(low: float, high: float) -> list[float]:
    first, last = round(log10(low)), round(log10(high))
    every = max(1, ceil((last - first) / 6))
    return [10.0**k for k in range(first, last + 1, every)]


def _power(value: float) -> str:
    return f"{value:g}" if 0.001 <= value <= 1000 else f"10{_raised(round(log10(value)))}"


def _raised(power: int) -> str:
    return str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _ticks(low: float, high: float) -> list[float]:
    """Return three to six round numbers between two."""
    rough = (high - low) / 4
    ten = 10.0 ** floor(log10(rough))
    step = next(s * ten for s in (1, 2, 5, 10) if s * ten >= rough)
    return [round(step * k, 12) + 0.0 for k in range(ceil(low / step), floor(high / step) + 1)]


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, said: str, anchor: str, kind: str = "tick") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(said)}</text>'


def _svg(said: str, width: float, height: float, parts: Sequence[str], *, wide: bool = False) -> str:
    sizes = f'viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}"'
    kind = ' class="wide"' if wide else ""
    role = "group" if wide else "img"
    return f'<svg{kind} {sizes} role="{role}" aria-label="{escape(said)}">{"".join(parts)}</svg>'
