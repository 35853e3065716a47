"""What a tokenised set holds, in numbers: the facts that a terminal and a page both show.

In: a `TokenizedSet`, its tokenizer and a `Loader` of it. Out: a `Summary`: histograms, table lines, names with values.
A sequence's length is the positions it takes in a row: its tokens but for the last, which predicts nothing.

Letters: N sequences, M positions in all of them.
"""

import dataclasses
import itertools
import math
from typing import Any

import numpy as np

from jax_sft.data.conversation import Account
from jax_sft.data.dataset import TokenizedSet
from jax_sft.data.loader import Loader
from jax_sft.report.scripts import SCRIPTS, script_of

_MOST_SOURCES = 30  # lines of the table; the others are summed in one more
_SCRIPTS_OF = 2000  # sequences whose text is looked at
_SCRIPTS_OF_TOKENS = 1000  # the first trained ones of each
_MOST_COUNTS = 10  # bins of small whole numbers
_AT_ONCE = 2**24  # positions whose weights are compared at one time


@dataclasses.dataclass(frozen=True)
class Histogram:
    """Counts by bin; a bin is named by its label. The title is "what: numbers of it"."""

    title: str
    labels: tuple[str, ...]
    counts: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class SourceLine:
    """What one source brings, and what an epoch takes of it."""

    name: str
    sequences: int
    tokens: int
    trained: int
    loss_share: float  # of the sum of weights: how much of the loss it decides
    drawn: int = 0  # sequences in the first epoch
    drawn_share: float = 0.0  # of the loss in it


@dataclasses.dataclass(frozen=True)
class Summary:
    """A set in numbers."""

    account: Account
    fingerprint: str
    facts: tuple[tuple[str, str], ...]
    sources: tuple[SourceLine, ...]
    is_mixed: bool  # whether an epoch takes something else than everything once
    length: Histogram
    trained_share: Histogram
    answers: Histogram
    answer_length: Histogram
    scripts: Histogram  # one bin for each script that was found
    segments: Histogram
    fill: Histogram
    predicted: Histogram


def summarize(dataset: TokenizedSet, loader: Loader, tokenizer: Any) -> Summary:
    """All facts of a set; a few seconds for 100,000 sequences of some hundred tokens."""
    rows = loader.epoch_rows()
    drawn_N = np.bincount(np.concatenate(rows), minlength=len(dataset))
    return Summary(
        account=dataset.account,
        fingerprint=dataset.fingerprint,
        facts=tuple(facts(dataset, loader)),
        sources=tuple(source_lines(dataset, drawn_N)),
        is_mixed=bool((drawn_N != 1).any()),
        length=length_histogram(dataset),
        trained_share=trained_share_histogram(dataset),
        answers=answers_histogram(dataset),
        answer_length=answer_length_histogram(dataset),
        scripts=scripts_histogram(dataset, tokenizer),
        segments=segments_histogram(rows),
        fill=_shares("filled positions of a row", _sums(dataset.lengths_N, rows) / loader.max_length),
        predicted=_shares(
            "predicted positions used in a row", _sums(dataset.trained_N, rows) / loader.predict_capacity
        ),
    )


def length_histogram(dataset: TokenizedSet) -> Histogram:
    """Sequences by length, in about a dozen even bins; a thin tail of long ones shares the last."""
    return _lengths("length in tokens", dataset.lengths_N)


def trained_share_histogram(dataset: TokenizedSet) -> Histogram:
    """Sequences by the share of their positions that is trained."""
    return _shares("trained share of a sequence", dataset.trained_N / dataset.lengths_N)


def answers_histogram(dataset: TokenizedSet) -> Histogram:
    """Conversations by the turns that teach: trained stretches, of all sequences that a conversation was cut into."""
    answers = dataset.answers_N
    if "turns" in dataset.account.method:  # a sequence for each answer: "chat.jsonl:7#1", "chat.jsonl:7#2"
        names = (dataset.ids[i].rpartition("#")[0] or i for i in range(len(dataset)))
        firsts = [len(list(same)) for _, same in itertools.groupby(names)]
        answers = np.add.reduceat(answers, np.cumsum([0, *firsts[:-1]]))
    most = max(int(answers.max()), 1)
    last = min(most, _MOST_COUNTS)
    counts = np.bincount(np.minimum(answers, last), minlength=last + 1)[1:]
    labels = [str(n) for n in range(1, last + 1)]
    labels[-1] += f"-{most}" if most > last else ""
    return Histogram(
        f"trained turns of a conversation: {answers.min():,} to {most:,}, mean {answers.mean():.1f}",
        tuple(labels),
        tuple(counts.tolist()),
    )


def answer_length_histogram(dataset: TokenizedSet) -> Histogram:
    """Trained stretches by their tokens, what ends an answer included."""
    return _lengths("length of a trained stretch", _answer_lengths(dataset))


def scripts_histogram(dataset: TokenizedSet, tokenizer: Any) -> Histogram:
    """Sequences by the writing system of their trained text, of all or of a sample drawn evenly."""
    count = min(len(dataset), _SCRIPTS_OF)
    chosen = np.sort(np.random.default_rng(0).permutation(len(dataset))[:count]).tolist()
    trained = []
    for i in chosen:
        here = slice(dataset.offsets_N1[i], dataset.offsets_N1[i + 1])
        targets = dataset.targets_M[here][dataset.weights_M[here] > 0]
        trained.append(targets[:_SCRIPTS_OF_TOKENS].tolist())
    texts = tokenizer.backend_tokenizer.decode_batch(trained, skip_special_tokens=True)
    found = [script_of(text) for text in texts]
    present = sorted((s for s in SCRIPTS if s in found), key=lambda s: -found.count(s))
    looked_at = f"all {count:,}" if count == len(dataset) else f"{count:,} of the {len(dataset):,}"
    return Histogram(
        f"script of the trained text: {looked_at} sequences looked at",
        tuple(present),
        tuple(found.count(script) for script in present),
    )


def segments_histogram(rows: list[np.ndarray]) -> Histogram:
    """Rows of an epoch by the sequences in them."""
    segments = np.asarray([len(row) for row in rows])
    most, least = int(segments.max()), int(segments.min())
    width = _round_number((most - least + 1) / 12)
    first = least // width * width
    bins = (most - first) // width + 1
    counts = np.bincount((segments - first) // width, minlength=bins)
    starts = [first + width * b for b in range(bins)]
    return Histogram(
        f"sequences in a row: {least:,} to {most:,}, mean {segments.mean():.1f}",
        tuple(f"{start}" if width == 1 else f"{start}-{start + width - 1}" for start in starts),
        tuple(counts.tolist()),
    )


def source_lines(dataset: TokenizedSet, drawn_N: np.ndarray | None = None) -> list[SourceLine]:
    """A line for each source, the one with most trained tokens first; `drawn_N`: how often an epoch has a sequence."""
    weight_N = np.add.reduceat(dataset.weights_M, dataset.offsets_N1[:-1], dtype=np.float64)
    drawn_N = np.ones(len(dataset)) if drawn_N is None else drawn_N
    columns = (np.ones(len(dataset)), dataset.lengths_N, dataset.trained_N, weight_N, drawn_N, drawn_N * weight_N)
    sums = [np.bincount(dataset.source_ids_N, weights=x, minlength=len(dataset.sources)) for x in columns]
    total, drawn_total = sums[3].sum(), sums[5].sum()
    lines = [
        SourceLine(name, int(n), int(tokens), int(trained), weight / total, int(drawn), drawn_weight / drawn_total)
        for name, n, tokens, trained, weight, drawn, drawn_weight in zip(dataset.sources, *sums, strict=True)
    ]
    lines.sort(key=lambda line: -line.trained)
    rest = lines[_MOST_SOURCES:]
    if len(rest) < 2:
        return lines
    numbers = [f.name for f in dataclasses.fields(SourceLine) if f.name != "name"]
    others = {name: sum(getattr(line, name) for line in rest) for name in numbers}
    return [*lines[:_MOST_SOURCES], SourceLine(f"{len(rest)} other sources", **others)]


def facts(dataset: TokenizedSet, loader: Loader) -> list[tuple[str, str]]:
    """Names and values: how much there is, how much of it teaches, how it is packed."""
    tokens, trained = int(dataset.lengths_N.sum()), int(dataset.trained_N.sum())
    rows = loader.rows_per_epoch()
    steps = math.ceil(rows / loader.batch_size)
    return [
        ("sequences", f"{len(dataset):,}"),
        ("tokens", f"{tokens:,}"),
        ("trained", f"{trained:,} ({trained / tokens:.1%} of the tokens)"),
        ("epoch", f"{rows:,} rows = {steps:,} {'step' if steps == 1 else 'steps'} of {loader.batch_size:,} rows"),
        ("row", f"{loader.max_length:,} positions, up to {loader.predict_capacity:,} of them predicted (P)"),
        ("filled", f"{loader.fill():.1%} of all positions" + ("" if loader.packing else "; data.packing is off")),
    ]


def headline(dataset: TokenizedSet, i: int) -> tuple[str, str, str]:
    """Id, source and counts of a sequence."""
    counts = f"{dataset.lengths_N[i]:,} tokens, {dataset.trained_N[i]:,} trained"
    return dataset.ids[i], dataset.sources[dataset.source_ids_N[i]], counts


def in_words(histogram: Histogram) -> str:
    """A histogram of few bins in one line, the empty ones left out: "1: 60, 2: 12 (1 to 2, mean 1.2)"."""
    total = sum(histogram.counts)
    found = [(label, count) for label, count in zip(histogram.labels, histogram.counts, strict=True) if count]
    numbers = histogram.title.partition(": ")[2]
    return ", ".join(f"{label} {count / total:.1%}" for label, count in found) + f" ({numbers})"


def _round_number(x: float) -> int:
    """The next of 1, 2, 5, 10, 20, 50, ... that is not smaller."""
    power = 10 ** math.floor(math.log10(max(x, 1)))
    return next(power * n for n in (1, 2, 5, 10) if power * n >= x or n == 10)


def _lengths(what: str, lengths: np.ndarray) -> Histogram:
    longest = int(lengths.max())
    width = _round_number(np.percentile(lengths, 99) / 12)
    bins = math.ceil(longest / width)
    if bins > 16:
        bins = math.ceil(np.percentile(lengths, 99) / width) + 1
    counts = np.bincount(np.minimum((lengths - 1) // width, bins - 1), minlength=bins)
    ends = [width * (b + 1) for b in range(bins - 1)] + [max(longest, width * bins)]
    middle, high = np.percentile(lengths, [50, 90])
    return Histogram(
        f"{what}: {lengths.min():,} to {longest:,}, mean {lengths.mean():,.0f}, median {middle:,.0f}, "
        f"nine of ten up to {high:,.0f}",
        tuple(f"{width * b + 1:,}-{end:,}" if width * b + 1 < end else f"{end:,}" for b, end in enumerate(ends)),
        tuple(counts.tolist()),
    )


def _shares(what: str, shares: np.ndarray) -> Histogram:
    """Ten bins; 0 is in the first."""
    counts = np.bincount(np.clip(np.ceil(shares * 10).astype(int) - 1, 0, 9), minlength=10)
    return Histogram(
        f"{what}: {shares.min():.0%} to {shares.max():.0%}, mean {shares.mean():.0%}",
        tuple(f"{10 * b}-{10 * b + 10}%" for b in range(10)),
        tuple(counts.tolist()),
    )


def _sums(numbers_N: np.ndarray, rows: list[np.ndarray]) -> np.ndarray:
    """Of the sequences in each row."""
    begins = np.cumsum([0, *(len(row) for row in rows[:-1])])
    return np.add.reduceat(numbers_N[np.concatenate(rows)], begins, dtype=np.int64)


def _answer_lengths(dataset: TokenizedSet) -> np.ndarray:
    """Tokens of each trained stretch, in parts of the set: the weights of all of it may not fit in memory."""
    found = []
    offsets_N1, start = dataset.offsets_N1, 0
    while start < len(dataset):
        end = int(np.searchsorted(offsets_N1, offsets_N1[start] + _AT_ONCE, side="right")) - 1
        end = min(max(end, start + 1), len(dataset))
        is_trained = dataset.weights_M[offsets_N1[start] : offsets_N1[end]] > 0
        begins = is_trained & ~np.concatenate([[False], is_trained[:-1]])
        firsts = offsets_N1[start:end] - offsets_N1[start]
        begins[firsts] = is_trained[firsts]
        # Each stretch runs to the next beginning; what lies between is not trained and adds nothing.
        found.append(np.add.reduceat(is_trained, np.flatnonzero(begins), dtype=np.int64) if begins.any() else [])
        start = end
    return np.concatenate(found)
