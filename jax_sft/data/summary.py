"""A tokenised set in numbers: lengths, trained shares, sources, packing. What `jax-sft data` shows, not how.

In: a `TokenizedSet` and a `Loader` of it. Out: histograms, table lines, names with values. A sequence's length is the
positions it takes in a row: its tokens but for the last, which predicts nothing.

Letters: N sequences.
"""

import dataclasses
import math

import numpy as np

from jax_sft.data.dataset import TokenizedSet
from jax_sft.data.loader import Loader

_MOST_SOURCES = 30  # lines of the table; the others are summed in one more


@dataclasses.dataclass(frozen=True)
class Histogram:
    """Counts by bin; a bin is named by its label."""

    title: str
    labels: tuple[str, ...]
    counts: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class SourceLine:
    """What one source brings."""

    name: str
    sequences: int
    tokens: int
    trained: int
    loss_share: float  # of the sum of weights: how much of the loss it decides


def length_histogram(dataset: TokenizedSet) -> Histogram:
    """Sequences by length, in about a dozen even bins; a thin tail of long ones shares the last."""
    lengths_N = dataset.lengths_N
    longest = int(lengths_N.max())
    width = _round_number(np.percentile(lengths_N, 99) / 12)
    bins = math.ceil(longest / width)
    if bins > 16:
        bins = math.ceil(np.percentile(lengths_N, 99) / width) + 1
    counts = np.bincount(np.minimum((lengths_N - 1) // width, bins - 1), minlength=bins)
    ends = [width * (b + 1) for b in range(bins - 1)] + [max(longest, width * bins)]
    middle, high = np.percentile(lengths_N, [50, 90])
    return Histogram(
        f"length in tokens: {lengths_N.min():,} to {longest:,}, mean {lengths_N.mean():,.0f}, median {middle:,.0f}, "
        f"nine of ten up to {high:,.0f}",
        tuple(f"{width * b + 1:,}-{end:,}" for b, end in enumerate(ends)),
        tuple(counts.tolist()),
    )


def trained_share_histogram(dataset: TokenizedSet) -> Histogram:
    """Sequences by the share of their positions that is trained."""
    share_N = dataset.trained_N / dataset.lengths_N
    counts = np.bincount(np.clip(np.ceil(share_N * 10).astype(int) - 1, 0, 9), minlength=10)
    return Histogram(
        f"trained share of a sequence: {share_N.min():.0%} to {share_N.max():.0%}, mean {share_N.mean():.0%}",
        tuple(f"{10 * b}-{10 * b + 10}%" for b in range(10)),
        tuple(counts.tolist()),
    )


def source_lines(dataset: TokenizedSet) -> list[SourceLine]:
    """A line for each source, the one with most trained tokens first."""
    weight_N = np.add.reduceat(dataset.weights_M, dataset.offsets_N1[:-1], dtype=np.float64)
    sums = [
        np.bincount(dataset.source_ids_N, weights=x, minlength=len(dataset.sources))
        for x in (np.ones(len(dataset)), dataset.lengths_N, dataset.trained_N, weight_N)
    ]
    lines = [
        SourceLine(name, int(n), int(tokens), int(trained), float(weight / weight_N.sum()))
        for name, n, tokens, trained, weight in zip(dataset.sources, *sums, strict=True)
    ]
    lines.sort(key=lambda line: -line.trained)
    rest = lines[_MOST_SOURCES:]
    if len(rest) < 2:
        return lines
    others = SourceLine(
        f"{len(rest)} other sources",
        sum(line.sequences for line in rest),
        sum(line.tokens for line in rest),
        sum(line.trained for line in rest),
        sum(line.loss_share for line in rest),
    )
    return [*lines[:_MOST_SOURCES], others]


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


def _round_number(x: float) -> int:
    """The next of 1, 2, 5, 10, 20, 50, ... that is not smaller."""
    power = 10 ** math.floor(math.log10(max(x, 1)))
    return next(power * n for n in (1, 2, 5, 10) if power * n >= x or n == 10)
