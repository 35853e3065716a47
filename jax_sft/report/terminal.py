"""What `jax-sft data` prints: what became of the rows, how long and how trained the sequences are, and the tokens.

In: a `Summary`, and of the tokens a `TokenizedSet` with its tokenizer. Out: text; nothing is printed or written here.
"""

import itertools
import math
import os
import sys
import textwrap
import unicodedata
from collections.abc import Iterable
from typing import Any

from jax_sft.data.dataset import TokenizedSet
from jax_sft.data.pieces import Piece, pieces_of, visible
from jax_sft.report.summary import Histogram, Summary, headline, in_words

_BARS = " ▏▎▍▌▋▊▉█"
_RESET = "\x1b[0m"
# 256-colour codes that read on dark and on light; tokens side by side alternate between two shades.
_CONTEXT = ("38;5;243", "38;5;248")
_BACKGROUND = {"trained": ("48;5;114", "48;5;77"), "weighted": ("48;5;221", "48;5;214")}
_TEXT, _CONTROL, _CONTROL_CONTEXT = "38;5;16", "1;38;5;90", "38;5;170"


def terminal_report(summary: Summary, *, title: str, width: int = 80) -> str:
    """Counts in and out, packing, histograms and the table of sources, as lines of plain text."""
    out = [_rule(title, width), *map(visible, summary.account.lines()), ""]
    named = [*summary.facts, ("scripts", in_words(summary.scripts))]
    named += [("turns", in_words(summary.answers)), ("packing", in_words(summary.segments))]
    indent = max(len(name) for name, _ in named)
    for name, value in named:
        lines = textwrap.wrap(value, width - indent - 2) or [""]
        out += [f"{name:<{indent}}  {lines[0]}", *(" " * (indent + 2) + line for line in lines[1:])]
    for histogram in (summary.length, summary.trained_share, summary.answer_length):
        out += ["", *textwrap.wrap(histogram.title, width), *_bars(histogram, width)]
    return "\n".join([*out, "", *_source_table(summary), ""])


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


def _source_table(summary: Summary) -> Iterable[str]:
    """Of a mixture also what an epoch takes of each, and what it then decides of the loss."""
    cells = [["source", "sequences", "tokens", "trained", "share", "of the loss"]]
    cells[0] += ["epoch", "of its loss"] if summary.is_mixed else []
    for x in summary.sources:
        line = [visible(x.name), f"{x.sequences:,}", f"{x.tokens:,}", f"{x.trained:,}", f"{x.trained / x.tokens:.0%}",
                f"{x.loss_share:.1%}"]  # fmt: skip
        cells.append(line + ([f"{x.drawn:,}", f"{x.drawn_share:.1%}"] if summary.is_mixed else []))
    widths = [max(_cells(line[column]) for line in cells) for column in range(len(cells[0]))]
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
