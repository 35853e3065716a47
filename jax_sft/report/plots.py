"""Plots as text that an HTML page holds: SVG with axes and hover titles, and bars of plain elements. Nothing is loaded.

In: counts and names. Out: HTML. Every text of the data goes through `escape`. Colours are classes of the page's style
sheet: bar, grid, axis, hit, and those that a caller names.
"""

import html
import itertools
import math
from collections.abc import Sequence

import numpy as np

from jax_sft.data.pieces import visible

_WIDTH, _HEIGHT = 380, 200
_LEFT, _FOOT, _HEAD = 40, 26, 8  # room for the numbers of the two axes, and over the highest bar
_CHARACTER = 6.6  # about the width of a digit, in units of the picture
_TICKS = 4  # at most, over 0


def escape(text: str, *, limit: int | None = None) -> str:
    """Text for a page: no markup, nothing that turns a line around; cut behind `limit` characters."""
    cut = text if limit is None or len(text) <= limit else text[: limit - 1] + "…"
    # Half a surrogate pair cannot be written as UTF-8.
    return html.escape(visible(cut).encode("utf-8", "replace").decode("utf-8"))


def short(count: float) -> str:
    """A number of few characters: 950, 1.2k, 35k, 2.1M."""
    for size, unit in ((1_000_000_000, "G"), (1_000_000, "M"), (1000, "k")):
        if count >= 0.9995 * size:
            scaled = count / size
            return f"{scaled:,.0f}{unit}" if scaled >= 9.95 else f"{scaled:.1f}".removesuffix(".0") + unit
    return f"{count:,.0f}"


def ticks(highest: float) -> list[float]:
    """Round numbers from 0 to the first that is not below `highest`, at most five; whole ones."""
    step = next(
        step for power in itertools.count() for step in (10**power, 2 * 10**power, 5 * 10**power)
        if step * _TICKS >= highest
    )  # fmt: skip
    return [step * i for i in range(math.ceil(highest / step) + 1)]


def histogram(title: str, labels: Sequence[str], counts: Sequence[int]) -> str:
    """A figure of bars; the title is "what: numbers of it", a label is a range "1-5" or a name."""
    marks = ticks(max(counts))
    base, room = _HEIGHT - _FOOT, _HEIGHT - _FOOT - _HEAD
    step = (_WIDTH - _LEFT) / len(counts)
    out = []
    for mark in marks:
        y = base - room * mark / marks[-1]
        out.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH}"/>')
        out.append(f'<text class="axis end" x="{_LEFT - 6}" y="{y + 4:.1f}">{short(mark)}</text>')
    names = [_axis_name(label) for label in labels]
    longest = _CHARACTER * max(map(len, names))
    moved = max(longest / 2 - step / 2, 0)  # the last one, to the left, to stay in the picture
    every = math.ceil((longest + _CHARACTER + moved) / step)  # else the names of neighbours would overlap
    total = sum(counts)
    for b, (label, count) in enumerate(zip(labels, counts, strict=True)):
        tall, left = room * count / marks[-1], _LEFT + b * step
        told = f"{label}: {count:,} ({count / total:.1%})"
        out.append(f"<g><title>{escape(told)}</title>" + rect("hit", left, 0, step, _HEIGHT))
        if count:
            tall = max(tall, 1.0)  # one of thousands is seen, too
            out.append(rect("bar", left + 0.06 * step, base - tall, 0.88 * step, tall))
        out.append("</g>")
        if (len(labels) - 1 - b) % every == 0:
            middle = min(left + step / 2, _WIDTH - _CHARACTER * len(names[b]) / 2)
            out.append(f'<text class="axis" x="{middle:.1f}" y="{base + 18}">{escape(names[b])}</text>')
    what, _, numbers = title.partition(": ")
    return (
        f"<figure><figcaption><b>{escape(what)}</b> {escape(numbers)}</figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(out)}</svg></figure>'
    )


def bars(title: str, labels: Sequence[str], counts: Sequence[int]) -> str:
    """A figure of names with a bar, a share and a count each, for names that are too long for an axis."""
    total, highest = sum(counts), max(counts)
    what, _, numbers = title.partition(": ")
    lines = "".join(
        f'<li><span class="name">{escape(label, limit=60)}</span>'
        f'<span class="track"><span style="width:{100 * count / highest:.2f}%"></span></span>'
        f'<span class="n">{count / total:.1%}</span><span class="n quiet">{count:,}</span></li>'
        for label, count in zip(labels, counts, strict=True)
    )
    caption = f"<figcaption><b>{escape(what)}</b> {escape(numbers)}</figcaption>"
    return f'<figure class="wide">{caption}<ul class="bars">{lines}</ul></figure>'


def stacked(parts: Sequence[tuple[str, str, int]]) -> str:
    """One bar, cut into parts of (class, name, count), in proportion; those of 0 are left out."""
    total = max(sum(count for _, _, count in parts), 1)
    cut = "".join(
        f'<span class="{css}" style="flex-grow:{count}" title="{escape(f"{name}: {count:,} ({count / total:.1%})")}">'
        "</span>"
        for css, name, count in parts
        if count
    )
    told = ", ".join(f"{name} {count:,}" for _, name, count in parts if count)
    return f'<div class="stacked" role="img" aria-label="{escape(told)}">{cut}</div>'


def strips(segments_BT: np.ndarray, trained_BT: np.ndarray) -> str:
    """Packed rows, a strip each: sequences side by side, trained positions filled; segment 0 is padding."""
    count, length = segments_BT.shape
    scale, out = 1000 / length, []
    for b, (segments_T, trained_T) in enumerate(zip(segments_BT, trained_BT, strict=True)):
        changes = (np.diff(segments_T) != 0) | (np.diff(trained_T.astype(np.int8)) != 0)
        edges = [0, *(np.flatnonzero(changes) + 1).tolist(), length]
        for start, end in itertools.pairwise(edges):
            if not segments_T[start]:
                continue
            name = "trained" if trained_T[start] else "context"
            begins = start == 0 or segments_T[start - 1] != segments_T[start]
            left = start * scale + 1.2 * begins  # a gap before each sequence
            told = f"sequence {segments_T[start]} of the row: {end - start:,} {name}"
            out.append(rect(name, left, 22 * b, max(end * scale - left, 0.3), 16, told))
        out.append(rect("frame", 0.5, 22 * b, 999, 16))
    height = 22 * count
    return f'<svg viewBox="0 0 1000 {height}" preserveAspectRatio="none" style="height:{height}px">{"".join(out)}</svg>'


def rect(css: str, x: float, y: float, width: float, height: float, told: str = "") -> str:
    """A rectangle, with a hover title if something is told of it."""
    title = f"<title>{escape(told)}</title>" if told else ""
    return f'<rect class="{css}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}">{title}</rect>'


def _axis_name(label: str) -> str:
    """Of a range its end, with long numbers made short: "10,001-12,000" is ≤12k."""
    low, dash, high = label.rpartition("-")
    if not (dash and low and low.replace(",", "").isdigit()):
        return label
    number = high.rstrip("%").replace(",", "")
    if not number.isdigit():
        return label
    return f"≤{short(int(number))}" + ("%" if high.endswith("%") else "")
