"""Sequences token by token as HTML: trained ones coloured, the id and weight of each behind the pointer.

In: a `TokenizedSet` and its tokenizer. Out: an article for each chosen sequence, within a budget of characters.
"""

from typing import Any

import numpy as np

from jax_sft.data.dataset import TokenizedSet
from jax_sft.data.pieces import Piece, pieces_of
from jax_sft.report.plots import escape
from jax_sft.report.summary import headline

_BUDGET_CHARACTERS = 1_800_000  # of all articles: the page stays under 3 MB
_MOST_TOKENS = 8192  # of one sequence


def chosen(dataset: TokenizedSet, count: int) -> list[int]:
    """The first sequences of each source in turn, so that every source is seen, in the order of the set."""
    order = np.argsort(dataset.source_ids_N, kind="stable")
    ids = dataset.source_ids_N[order]
    begins = np.searchsorted(ids, np.arange(len(dataset.sources)))
    turn = np.arange(len(order)) - begins[ids]  # its number within its source
    return np.sort(order[np.lexsort((ids, turn))][:count]).tolist()


def articles(dataset: TokenizedSet, tokenizer: Any, which: list[int]) -> list[str]:
    """An article for each of the sequences `which`, fewer where the page would become too large."""
    out, room = [], _BUDGET_CHARACTERS
    for i in which:
        article = _article(dataset, tokenizer, i)
        room -= len(article.encode())
        if room < 0:
            break
        out.append(article)
    return out


def _article(dataset: TokenizedSet, tokenizer: Any, i: int) -> str:
    sequence = dataset[i]
    # A page of one sequence of a million tokens would be of no use.
    cut = slice(0, _MOST_TOKENS)
    shown = type(sequence)(
        sequence.tokens_T[cut], sequence.targets_T[cut], sequence.weights_T[cut], sequence.source, sequence.id
    )
    body = "".join(map(_html_piece, pieces_of(shown, tokenizer)))
    left = len(sequence.tokens_T) - len(shown.tokens_T)
    more = f'<p class="quiet">… and {left:,} more tokens</p>' if left else ""
    place, source, counts = headline(dataset, i)
    name = escape(source, limit=100)
    return (
        f'<article data-source="{name}"><h3><span>{i + 1:,}</span> <bdi>{escape(place, limit=200)}</bdi> '
        f'<span class="tag"><bdi>{name}</bdi></span> <span class="quiet">{counts}</span></h3>'
        f'<div class="tokens" dir="auto">{body}</div>{more}</article>\n'
    )


def _html_piece(piece: Piece) -> str:
    """The classes c, t and w (with k for control tokens) say the weights: none, 1, and others, which are written."""
    css = piece.kind[0] + ("k" if piece.is_control else "")
    ids = " ".join(map(str, piece.ids))
    usual = {"context": 0.0, "trained": 1.0}.get(piece.kind)
    said = "" if all(w == usual for w in piece.weights) else f' data-w="{" ".join(f"{w:g}" for w in piece.weights)}"'
    return f'<i class="{css}" data-i="{ids}"{said}>{escape(piece.text).replace(chr(10), "<s></s>" + chr(10))}</i>'
