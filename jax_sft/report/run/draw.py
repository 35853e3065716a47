"""Curves against steps as SVG that stretches with the page, with a legend, and its numbers for the page's script.

In: `Plot`s. Out: HTML. Labels are text beside the picture, so they keep their size on a phone. Colours and dashes are
classes of run.css, `k1` to `k8`.
"""

import json
import math
from collections.abc import Iterable

import numpy as np

from jax_sft.data.pieces import visible
from jax_sft.report.plots import escape
from jax_sft.report.run.curves import Curve, Mark, Plot

_TICKS = 5  # about, on the upright axis
_STEPS = 4  # about, on the axis of the steps
_SIDE = 1000  # of the picture, in its own units
_MOST_MARKS = 6  # that the legend names
_NAME = 60  # characters of a curve's name


def figure(plot: Plot) -> str:
    """The plot as a figure; nothing where it has no curve."""
    if not plot.curves:
        return ""
    x, y = ranges(plot)
    lines = "".join(_line(curve, number, x, y) for number, curve in enumerate(plot.curves, 1))
    marks = "".join(_upright(mark, x) for mark in plot.marks)
    marks_y, marks_x = ticks(*y, _TICKS), _whole(ticks(*x, _STEPS))
    grid = "".join(f'<path class="grid" d="M0 {_at(v, y, up=True):.1f}H{_SIDE}"/>' for v in marks_y)
    names = "".join(
        f'<span class="y" style="top:{_at(v, y, up=True) / 10:.2f}%">{tick_name(v, marks_y)}</span>' for v in marks_y
    ) + "".join(f'<span class="x" style="left:{_at(v, x) / 10:.2f}%">{tick_name(v, marks_x)}</span>' for v in marks_x)
    told = escape(f"{plot.title}. {'. '.join(map(_told, plot.curves))}.")
    note = f'<p class="quiet">{escape(plot.note)}</p>' if plot.note else ""
    return (
        f'<figure class="plot{" wide" if plot.is_wide else ""}" tabindex="0" '
        f'data-plot="{escape(_numbers(plot, x, y))}">'
        f"<figcaption><b>{escape(plot.title, limit=_NAME)}</b> {escape(plot.unit)}</figcaption>{_legend(plot)}"
        f'<div class="area">{names}<svg viewBox="0 0 {_SIDE} {_SIDE}" preserveAspectRatio="none" role="img" '
        f'aria-label="{told}">{grid}{marks}{lines}</svg></div>{note}</figure>'
    )


def ranges(plot: Plot) -> tuple[tuple[float, float], tuple[float, float]]:
    """What the two axes reach from and to; the upright one begins at 0 where that costs little room."""
    steps = np.concatenate([curve.steps for curve in plot.curves])
    values = np.concatenate([curve.values for curve in plot.curves])
    values = values[np.isfinite(values)]
    low, high = float(values.min()), float(values.max())
    if 0 <= low <= 0.4 * high:
        low = 0.0
    if high - low <= 1e-9 * max(abs(high), abs(low)):  # a line alone: some air over and under it
        air = 0.1 * abs(high) or 1.0
        low, high = low - air, high + air
    marks = ticks(low, high, _TICKS)
    step = marks[1] - marks[0] if len(marks) > 1 else high - low
    first, last = float(steps.min()), float(steps.max())
    return (first, last if last > first else first + 1), (step * math.floor(low / step), step * math.ceil(high / step))


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers from `low` to `high`: at most `about` + 2 of them, 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(size for size in (1, 2, 5, 10) if size * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6)
    return [i * step for i in range(first, last + 1)]


def tick_name(value: float, among: list[float]) -> str:
    """A tick as short as its distance to its neighbours allows: 0.25, 1,500, 20k, 2e-5."""
    step, largest = among[1] - among[0] if len(among) > 1 else abs(value) or 1.0, max(map(abs, among))
    if value == 0:
        return "0"
    if largest < 1e-3:
        digits, _, power = f"{value:.2e}".partition("e")
        return f"{float(digits):g}e{int(power)}"
    size, unit = next(((s, u) for s, u in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if largest >= 10 * s), (1.0, ""))
    decimals = max(0, -math.floor(math.log10(step / size) + 1e-9))
    return f"{value / size:,.{decimals}f}{unit}"


def _whole(marks: list[float]) -> list[float]:
    """Steps are whole numbers."""
    return sorted({float(round(mark)) for mark in marks if abs(mark - round(mark)) < 1e-6}) or marks[:1]


def _at(value: float, of: tuple[float, float], *, up: bool = False) -> float:
    share = (value - of[0]) / (of[1] - of[0])
    return _SIDE * (1 - share if up else share)


def _line(curve: Curve, number: int, x: tuple[float, float], y: tuple[float, float]) -> str:
    """The curve as a path that breaks at gaps; a dot where a value was measured now and then, or stands alone."""
    points = [
        (f"{_at(step, x):.1f} {_at(value, y, up=True):.1f}" if math.isfinite(value) else None)
        for step, value in zip(curve.steps.tolist(), curve.values.tolist(), strict=True)
    ]
    path, dots = [], []
    for i, point in enumerate(points):
        if point is None:
            continue
        begins = i == 0 or points[i - 1] is None
        path.append(f"{'M' if begins else 'L'}{point}")
        is_alone = begins and (i + 1 == len(points) or points[i + 1] is None)
        if is_alone or not curve.is_dense:
            dots.append(f"M{point}h0")
    css = f"line k{number}{' dashed' if curve.dashed else ''}{' dense' if curve.is_dense else ''}"
    return f'<path class="{css}" d="{"".join(path)}"/>' + (
        f'<path class="dots k{number}" d="{"".join(dots)}"/>' if dots else ""
    )


def _upright(mark: Mark, x: tuple[float, float]) -> str:
    return f'<path class="mark {mark.kind}" d="M{_at(mark.step, x):.1f} 0V{_SIDE}"/>'


def _legend(plot: Plot) -> str:
    lines = [
        f'<li><span class="key k{number}{" dashed" if curve.dashed else ""}"></span>'
        f"{escape(curve.name, limit=_NAME)}</li>"
        for number, curve in enumerate(plot.curves, 1)
        if len(plot.curves) > 1 or curve.name not in plot.title.lower()
    ]
    if plot.is_wide:
        lines += [
            f'<li class="said"><span class="key mark {mark.kind}"></span>{escape(_of_mark(mark), limit=_NAME)}</li>'
            for mark in plot.marks[:_MOST_MARKS]
        ]
        rest = len(plot.marks) - _MOST_MARKS
        lines += [f"<li>and {rest:,} more marks</li>"] if rest > 0 else []
    return f'<ul class="lines">{"".join(lines)}</ul>' if lines else ""


def _of_mark(mark: Mark) -> str:
    return mark.text if mark.kind == "best" else f"{mark.text}, step {mark.step:,}"


def _told(curve: Curve) -> str:
    known = [
        (step, value)
        for step, value in zip(curve.steps.tolist(), curve.values.tolist(), strict=True)
        if math.isfinite(value)
    ]
    (first, begin), (last, end) = known[0], known[-1]
    return f"{curve.name}: from {begin:.4g} at step {first:,} to {end:.4g} at step {last:,}"


def _numbers(plot: Plot, x: Iterable[float], y: Iterable[float]) -> str:
    """What the page's script shows of a point: the steps and the values that are drawn."""
    curves = [
        {
            "name": visible(curve.name)[:_NAME],
            "steps": curve.steps.tolist(),
            "values": [float(f"{v:.5g}") if math.isfinite(v) else None for v in curve.values.tolist()],
        }
        for curve in plot.curves
    ]
    return json.dumps({"x": list(x), "y": list(y), "curves": curves}, separators=(",", ":"))
