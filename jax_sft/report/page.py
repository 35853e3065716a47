"""The data report: one HTML page that holds everything and loads nothing, made of page.html, page.css and page.js.

In: the sets of a run with their loaders and `Summary`s, a tokenizer, a `Card`. Out: the page as text. What comes from
the data is escaped, and a policy in the page lets no script run but its own, by its hash.
"""

import dataclasses
import re
import string
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jax_sft.data.conversation import Account
from jax_sft.data.dataset import TokenizedSet
from jax_sft.data.loader import Loader
from jax_sft.report.card import Card
from jax_sft.report.frame import framed, part
from jax_sft.report.plots import bars, escape, histogram, stacked, strips
from jax_sft.report.summary import Histogram, Summary
from jax_sft.report.tokens import articles, chosen

_MOST_ROWS = 8  # packed rows that are drawn
_MOST_REASONS = 100  # of one kind; the others are summed
_NAME, _PLACE = 120, 200  # characters of names and places of the data: nobody promised that they are short


@dataclasses.dataclass(frozen=True)
class View:
    """A set of a run as it is shown."""

    dataset: TokenizedSet
    loader: Loader
    summary: Summary


def html_page(views: Mapping[str, View], tokenizer: Any, card: Card, *, count: int) -> str:
    """The page of the sets "train" and, if there is one, "validation".

    Args:
        count: sequences of the training set that are shown token by token; fewer where the page would become too large.
    """
    view = views["train"]
    summary = view.summary
    shown = articles(view.dataset, tokenizer, chosen(view.dataset, count))
    plots = [summary.length, summary.trained_share, summary.answers, summary.answer_length]
    title = escape(card.name, limit=_PLACE)
    body = string.Template(part("page.html")).substitute(
        title=title,
        fingerprint=escape(summary.fingerprint),
        account=_account(summary.account),
        facts=_facts(summary),
        charts="".join(map(_plot, plots)) + bars(*_fields(summary.scripts)),
        sources=_sources(summary),
        packing=_plot(summary.fill) + _plot(summary.predicted) + _plot(summary.segments),
        rows=_rows(view.loader),
        validation="".join(_validation(views[name]) for name in views if name != "train"),
        card=_card(card),
        shown=f"{len(shown):,} of {len(view.dataset):,}",
        sequences="".join(shown),
    )
    return framed(f"Training data: {title}", body, styles=("page.css",), scripts=("filter.js", "page.js"))


def _fields(of: Histogram) -> tuple[str, tuple[str, ...], tuple[int, ...]]:
    return of.title, of.labels, of.counts


def _plot(of: Histogram) -> str:
    return histogram(*_fields(of))


def _facts(summary: Summary) -> str:
    """Names with values; the number that a value begins with stands out."""
    out = []
    for name, value in summary.facts:
        number, rest = re.fullmatch(r"([\d,.]+%?)?(.*)", value, re.DOTALL).groups("")  # type: ignore[union-attr]
        out.append(f"<div><dt>{escape(name)}</dt><dd><b>{escape(number)}</b>{escape(rest)}</dd></div>")
    return f"<dl>{''.join(out)}</dl>"


def _account(account: Account) -> str:
    """Conversations in = kept + dropped + held out, as tiles and a bar; then every reason with its examples."""
    dropped = sum(account.dropped.values())
    rest = account.read - account.kept - dropped - account.held_out
    parts = [("kept", "kept", account.kept), ("held", "held out", account.held_out), ("lost", "dropped", dropped)]
    parts += [("unknown", "not accounted for", abs(rest))] if rest else []
    tiles = [f'<p class="tile"><b>{account.read:,}</b> read</p><span class="sign">=</span>']
    tiles += [
        f'<p class="tile {css if number else ""}"><b>{number:,}</b> {name}</p>'
        for css, name, number in parts
        if number or css != "held"
    ]
    methods = ", ".join(f"{method} ({n:,})" for method, n in account.method.items())
    how = f'<p class="quiet">Trained spans found by {escape(methods)}.</p>' if methods else ""
    groups = [
        block
        for kind, counts in (("dropped", account.dropped), ("altered", account.altered), ("noted", account.noted))
        for block in _reasons(kind, counts, account)
    ]
    found = f'<div class="reasons">{"".join(groups)}</div>' if groups else ""
    return f'<div class="card"><div class="tiles">{"".join(tiles)}</div>{stacked(parts)}{how}</div>{found}'


def _reasons(kind: str, counts: Mapping[str, int], account: Account) -> Iterator[str]:
    """A block for each rule, the one with most conversations first; "rule: what it found" belongs to the rule."""
    groups: dict[str, list[str]] = {}
    ordered = sorted(counts, key=lambda reason: -counts[reason])
    for reason in ordered[:_MOST_REASONS]:
        groups.setdefault(reason.partition(": ")[0], []).append(reason)
    sums = {rule: sum(counts[reason] for reason in reasons) for rule, reasons in groups.items()}
    for rule in sorted(groups, key=lambda rule: -sums[rule]):
        of = f" of {account.read:,} ({sums[rule] / max(account.read, 1):.1%})"
        body = "".join(_examples(reason, counts[reason], account, len(groups[rule]) > 1) for reason in groups[rule])
        head = f'<span class="kind {kind}">{kind}</span> <span class="name">{escape(_said(rule, groups[rule]))}</span>'
        yield (
            f'<details><summary>{head} <span class="n"><b>{sums[rule]:,}</b><span class="quiet">{of}</span></span>'
            f"</summary>{body}</details>"
        )
    rest = ordered[_MOST_REASONS:]
    if rest:
        total = sum(counts[reason] for reason in rest)
        yield f'<p class="quiet">{kind}, {len(rest):,} other reasons: {total:,} conversations</p>'


def _said(rule: str, reasons: list[str]) -> str:
    """A rule with one thing found is told in full."""
    text = reasons[0] if len(reasons) == 1 else f"{rule} ({len(reasons)} findings)"
    return text if len(text) <= _PLACE else text[: _PLACE - 1] + "…"


def _examples(reason: str, count: int, account: Account, is_one_of_several: bool) -> str:
    places = account.examples.get(reason, [])
    excerpts = account.excerpts.get(reason, [""] * len(places))
    head = f'<h4>{escape(reason, limit=_PLACE)} <span class="quiet">{count:,}</span></h4>' if is_one_of_several else ""
    lines = "".join(
        f'<li><bdi class="place">{escape(place, limit=_PLACE)}</bdi>'
        + (f'<blockquote dir="auto">{escape(excerpt)}</blockquote>' if excerpt else "")
        + "</li>"
        for place, excerpt in zip(places, excerpts, strict=True)
    )
    more = f'<p class="quiet">the first {len(places)} of {count:,}</p>' if count > len(places) else ""
    return f"{head}<ul>{lines}</ul>{more}"


def _sources(summary: Summary) -> str:
    head = ["sequences", "tokens", "trained", "trained share", "share of the loss"]
    head += ["an epoch draws", "passes", "of its loss"] if summary.is_mixed else []
    lines = []
    for x in summary.sources:
        cells = [f"{x.sequences:,}", f"{x.tokens:,}", f"{x.trained:,}", f"{x.trained / x.tokens:.0%}"]
        line = f'<tr><td class="name"><bdi>{escape(x.name, limit=_NAME)}</bdi>'
        line += "".join(f'<td class="n">{cell}' for cell in cells) + _share(x.loss_share)
        if summary.is_mixed:
            line += f'<td class="n">{x.drawn:,}<td class="n">{x.drawn / x.sequences:.2f}' + _share(x.drawn_share)
        lines.append(line)
    heads = "".join(f'<th class="{"share" if "loss" in name else "n"}">{name}' for name in head)
    return f'<div class="card scroll"><table><tr><th>source{heads}{"".join(lines)}</table></div>'


def _share(share: float) -> str:
    return f'<td class="share"><span style="--share:{share:.4f}">{share:.1%}</span>'


def _rows(loader: Loader) -> str:
    """The first rows of the first batch."""
    count = min(_MOST_ROWS, loader.batch_size, loader.rows_per_epoch())
    batch = loader.batch(0, np.arange(count))
    return strips(batch.segments_BT, batch.weights_BT > 0)


def _validation(view: View) -> str:
    summary = view.summary
    return (
        '<section id="validation"><h2>Validation</h2>' + _account(summary.account)
        + f'<div class="card">{_facts(summary)}</div>'
        + f'<div class="charts">{_plot(summary.length)}{bars(*_fields(summary.scripts))}</div>'
        + f"{_sources(summary)}</section>"
    )  # fmt: skip


def _card(card: Card) -> str:
    said = "".join(f"<div><dt>{escape(k, limit=_NAME)}</dt><dd>{escape(v)}</dd></div>" for k, v in card.said)
    missing = f'<p class="quiet">Not said in data.card: {escape(", ".join(card.missing))}.</p>' if card.missing else ""
    made = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v, limit=1000)}</dd></div>" for k, v in card.made)
    files = "".join(
        f'<tr><td>{escape(f.part, limit=_NAME)}<td class="name"><bdi>{escape(f.name, limit=_PLACE)}</bdi>'
        f'<td class="n">{"" if f.num_bytes is None else f"{f.num_bytes:,}"}<td>{escape(f.format)}'
        f'<td class="hash">{escape(f.sha256)}'
        for f in card.files
    )
    limits = "".join(f"<li>{escape(limit, limit=2000)}</li>" for limit in card.limits)
    return (
        f'<div class="card">{f"<dl class=said>{said}</dl>" if said else ""}{missing}</div>'
        '<div class="card scroll"><table><tr><th>set<th>file<th class="n">bytes<th>format<th>SHA-256'
        f"{files}</table></div>"
        f'<div class="card"><h3>From text to tokens</h3><dl class="said">{made}</dl></div>'
        f'<div class="card"><h3>Known limits</h3><ul class="limits">{limits}</ul></div>'
    )
