"""What `jax-sft data` shows: what became of the rows, how long and how trained the sequences are, and the tokens.

In: a `TokenizedSet`, its tokenizer and a `Loader` of it. Out: text for a terminal, or one self-contained HTML page.
Nothing is printed or written here.
"""

import html
import itertools
import math
import os
import pathlib
import string
import sys
import unicodedata
from collections.abc import Iterable
from typing import Any

import numpy as np

from jax_sft.data.dataset import TokenizedSet
from jax_sft.data.loader import Loader
from jax_sft.data.pieces import Piece, pieces_of, visible
from jax_sft.data.summary import (
    Histogram,
    SourceLine,
    facts,
    headline,
    length_histogram,
    source_lines,
    trained_share_histogram,
)

_MOST_ROWS = 8  # packed rows that are drawn
_BARS = " ▏▎▍▌▋▊▉█"
_RESET = "\x1b[0m"
# 256-colour codes that read on dark and on light; tokens side by side alternate between two shades.
_CONTEXT = ("38;5;243", "38;5;248")
_BACKGROUND = {"trained": ("48;5;114", "48;5;77"), "weighted": ("48;5;221", "48;5;214")}
_TEXT, _CONTROL, _CONTROL_CONTEXT = "38;5;16", "1;38;5;90", "38;5;170"


def terminal_report(dataset: TokenizedSet, loader: Loader, *, title: str, width: int = 80) -> str:
    """Counts in and out, packing, two histograms and the table of sources, as lines of plain text."""
    out = [_rule(title, width), *map(visible, dataset.account.lines()), ""]
    named = facts(dataset, loader)
    indent = max(len(name) for name, _ in named)
    out += [f"{name:<{indent}}  {value}" for name, value in named]
    for histogram in (length_histogram(dataset), trained_share_histogram(dataset)):
        out += ["", histogram.title, *_bars(histogram, width)]
    return "\n".join([*out, "", *_source_table(source_lines(dataset)), ""])


def show_sequences(dataset: TokenizedSet, tokenizer: Any, count: int, *, colour: bool | None = None) -> str:
    """The first `count` sequences token by token, trained ones marked.

    Args:
        colour: ANSI colours, or «brackets»; None: as standard output wants it.
    """
    colour = wants_colour(sys.stdout) if colour is None else colour
    paint = _in_colour if colour else _in_brackets
    out = [_legend(colour)]
    for i in range(min(count, len(dataset))):
        place, source, counts = headline(dataset, i)
        out.append(_rule(visible(f"{i + 1}. {place}, {source}: {counts}"), 80))
        out += [paint(pieces_of(dataset[i], tokenizer)).removesuffix("\n"), ""]
    if len(dataset) > count:
        out.append(f"... and {len(dataset) - count:,} more sequences")
    return "\n".join(out)


def wants_colour(stream: Any) -> bool:
    """Whether ANSI colours belong on a stream: a terminal, and neither NO_COLOR nor TERM=dumb is set."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def html_page(dataset: TokenizedSet, tokenizer: Any, loader: Loader, *, count: int, title: str) -> str:
    """The same, and a picture of the first packed rows, as one page that loads nothing."""
    template = string.Template(pathlib.Path(__file__).with_name("show.html").read_text(encoding="utf-8"))
    shown = min(count, len(dataset))
    return template.substitute(
        title=_escape(title),
        fingerprint=_escape(dataset.fingerprint),
        account=_html_account(dataset),
        facts="".join(f"<div><dt>{_escape(k)}</dt><dd>{_escape(v)}</dd></div>" for k, v in facts(dataset, loader)),
        histograms=_svg_histogram(length_histogram(dataset)) + _svg_histogram(trained_share_histogram(dataset)),
        sources=_html_sources(source_lines(dataset)),
        rows=_svg_rows(loader),
        shown=f"{shown:,} of {len(dataset):,}",
        sequences="".join(_html_sequence(dataset, tokenizer, i) for i in range(shown)),
    )


# In the terminal


def _rule(title: str, width: int) -> str:
    return f"── {title} ".ljust(width - max(_cells(title) - len(title), 0), "─")


def _cells(text: str) -> int:
    """Columns a text takes in a terminal: two for a Chinese character or an emoji."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _bars(histogram: Histogram, width: int) -> Iterable[str]:
    label_width = max(map(len, histogram.labels))
    room = width - label_width - 12
    for label, count in zip(histogram.labels, histogram.counts, strict=True):
        eighths = math.ceil(8 * room * count / max(histogram.counts))
        bar = "█" * (eighths // 8) + _BARS[eighths % 8].strip()
        yield f"  {label:>{label_width}}  {bar} {count:,}" if count else f"  {label:>{label_width}}"


def _source_table(lines: list[SourceLine]) -> Iterable[str]:
    cells = [("source", "sequences", "tokens", "trained", "share", "of the loss")]
    cells += [
        (visible(x.name), f"{x.sequences:,}", f"{x.tokens:,}", f"{x.trained:,}", f"{x.trained / x.tokens:.0%}",
         f"{x.loss_share:.1%}")
        for x in lines
    ]  # fmt: skip
    widths = [max(_cells(line[column]) for line in cells) for column in range(6)]
    for name, *numbers in cells:
        padded = name + " " * (widths[0] - _cells(name))
        yield "  ".join([padded, *(n.rjust(w) for n, w in zip(numbers, widths[1:], strict=True))])


def _legend(colour: bool) -> str:
    if not colour:
        return "read only, «trained», «trained with another weight than 1»×0.5, ⟦control token⟧, ↵ newline"
    samples = [
        ("read only", _CONTEXT[0]),
        (" trained ", f"{_TEXT};{_BACKGROUND['trained'][0]}"),
        (" trained with another weight than 1 ", f"{_TEXT};{_BACKGROUND['weighted'][0]}"),
        ("control token", _CONTROL_CONTEXT),
        ("↵ newline", _CONTEXT[0]),
    ]
    return "  ".join(f"\x1b[{code}m{text}{_RESET}" for text, code in samples)


def _in_colour(pieces: list[Piece]) -> str:
    out = []
    for number, piece in enumerate(pieces):
        if piece.kind == "context":
            code = _CONTROL_CONTEXT if piece.is_control else _CONTEXT[number % 2]
        else:
            code = f"{_CONTROL if piece.is_control else _TEXT};{_BACKGROUND[piece.kind][number % 2]}"
        # The colour stops before the line does: a terminal would paint the rest of the line with it.
        lines = visible(piece.text).replace("\n", "↵\n").split("\n")
        out.append("\n".join(f"\x1b[{code}m{line}{_RESET}" if line else "" for line in lines))
    return "".join(out)


def _in_brackets(pieces: list[Piece]) -> str:
    out = []
    for (kind, weight), run in itertools.groupby(pieces, key=lambda p: (p.kind, max(p.weights))):
        texts = (f"⟦{p.text}⟧" if p.is_control else p.text for p in run)
        text = visible("".join(texts)).replace("\n", "↵\n")
        if kind != "context":
            end = "»" + (f"×{weight:g}" if kind == "weighted" else "")
            text = f"«{text[:-1]}{end}\n" if text.endswith("\n") else f"«{text}{end}"
        out.append(text)
    return "".join(out)


# On the page


def _escape(text: str) -> str:
    return html.escape(visible(text))


def _html_account(dataset: TokenizedSet) -> str:
    account = dataset.account
    dropped = sum(account.dropped.values())
    tiles = [("read", account.read, ""), ("kept", account.kept, ""), ("dropped", dropped, " bad" if dropped else "")]
    out = [f'<p class="tile{css}"><b>{number:,}</b> {_escape(name)}</p>' for name, number, css in tiles]
    lines = [
        (kind, count, what, ", ".join(account.examples.get(what, ())))
        for kind, counts in (("dropped", account.dropped), ("altered", account.altered), ("noted", account.noted))
        for what, count in sorted(counts.items(), key=lambda item: -item[1])
    ]
    lines += [("trained spans found by", n, method, "") for method, n in account.method.items()]
    body = "".join(
        f'<tr><td>{_escape(what)}<td class="n">{count:,}<td>{_escape(reason)}'
        + (f"<br><small>first: {_escape(places)}</small>" if places else "")
        for what, count, reason, places in lines
    )
    return f'<div class="tiles">{"".join(out)}</div><table class="account">{body}</table>'


def _html_sources(lines: list[SourceLine]) -> str:
    return "".join(
        f'<tr><td>{_escape(x.name)}<td class="n">{x.sequences:,}<td class="n">{x.tokens:,}<td class="n">{x.trained:,}'
        f'<td class="n">{x.trained / x.tokens:.0%}'
        f'<td class="share"><span style="--share:{x.loss_share:.4f}">{x.loss_share:.1%}</span>'
        for x in lines
    )


def _svg_histogram(histogram: Histogram) -> str:
    width, height, foot, head = 440, 200, 30, 18
    bins = len(histogram.counts)
    step, base = width / bins, height - foot
    bars = []
    for b, (label, count) in enumerate(zip(histogram.labels, histogram.counts, strict=True)):
        tall = (base - head) * count / max(histogram.counts)
        left, middle, top = b * step, (b + 0.5) * step, base - tall
        bars.append(
            f"<g><title>{_escape(label)}: {count:,}</title>"
            + _rect("hit", left, 0, step, height)
            + _rect("bar", left + 0.08 * step, top, 0.84 * step, tall)
            + (f'<text x="{middle:.1f}" y="{top - 5:.1f}">{_short(count)}</text>' if count else "")
        )
        if bins <= 10 or (bins - b) % 2:  # else the names of neighbours would overlap
            bars.append(f'<text class="axis" x="{middle:.1f}" y="{base + 18}">≤{_escape(label.split("-")[-1])}</text>')
        bars.append("</g>")
    title, numbers = histogram.title.split(": ", 1)
    return (
        f"<figure><figcaption><b>{_escape(title)}</b> {_escape(numbers)}</figcaption>"
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{_escape(histogram.title)}">{"".join(bars)}'
        f'<path class="line" d="M0 {base}H{width}"/></svg></figure>'
    )


def _short(count: int) -> str:
    return str(count) if count < 1000 else f"{count / 1000:.1f}k" if count < 10_000 else f"{count / 1000:,.0f}k"


def _svg_rows(loader: Loader) -> str:
    """The first rows of the first batch, a strip each: sequences side by side, trained positions filled."""
    count = min(_MOST_ROWS, loader.batch_size, loader.rows_per_epoch())
    batch, scale = loader.batch(0, np.arange(count)), 1000 / loader.max_length
    out = []
    for b, (segments_T, trained_T) in enumerate(zip(batch.segments_BT, batch.weights_BT > 0, strict=True)):
        changes = (np.diff(segments_T) != 0) | (np.diff(trained_T) != 0)
        edges = [0, *(np.flatnonzero(changes) + 1).tolist(), len(segments_T)]
        for start, end in itertools.pairwise(edges):
            if not segments_T[start]:
                continue
            name = "trained" if trained_T[start] else "context"
            begins = start == 0 or segments_T[start - 1] != segments_T[start]
            left = start * scale + 1.2 * begins  # a gap before each sequence
            told = f"sequence {segments_T[start]} of the row: {end - start:,} {name}"
            out.append(_rect(name, left, 22 * b, max(end * scale - left, 0.3), 16, told))
        out.append(_rect("frame", 0.5, 22 * b, 999, 16))
    height = 22 * count
    return f'<svg viewBox="0 0 1000 {height}" preserveAspectRatio="none" style="height:{height}px">{"".join(out)}</svg>'


def _rect(css: str, x: float, y: float, width: float, height: float, told: str = "") -> str:
    title = f"<title>{_escape(told)}</title>" if told else ""
    return f'<rect class="{css}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}">{title}</rect>'


def _html_sequence(dataset: TokenizedSet, tokenizer: Any, i: int) -> str:
    out = []
    for piece in pieces_of(dataset[i], tokenizer):
        css = piece.kind[0] + ("k" if piece.is_control else "")
        ids, weights = " ".join(map(str, piece.ids)), " ".join(f"{w:g}" for w in piece.weights)
        text = _escape(piece.text).replace("\n", "<s></s>\n")
        out.append(f'<i class="{css}" data-i="{ids}" data-w="{weights}">{text}</i>')
    place, source, counts = headline(dataset, i)
    return (
        f"<article><h3>{i + 1}. <bdi>{_escape(place)}</bdi>, <bdi>{_escape(source)}</bdi>: {counts}</h3>"
        f'<div class="tokens" dir="auto">{"".join(out)}</div></article>'
    )
