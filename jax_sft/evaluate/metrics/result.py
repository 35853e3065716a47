"""What a metric gives: its value, the value of each row, and how far chance may have moved it.

In: numbers of each row. Out: `MetricResult`, bootstrap intervals (Efron 1979; percentiles of resampled rows) and paired
differences. Numpy only.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

LOW, HIGH = 2.5, 97.5  # percentiles of a 95 % interval

Combine = Callable[[np.ndarray, int], float]  # (sums [statistics], number of rows) -> value


def mean_of(sums: np.ndarray, rows: int) -> float:
    """The mean of rows that are one number each."""
    return float(sums[0]) / rows


@dataclasses.dataclass(frozen=True)
class Measured:
    """What was counted in each row, `[rows, statistics]`, and how the sums over rows become the value."""

    by_row: tuple[float, ...]
    statistics: np.ndarray
    combine: Combine = mean_of
    notes: tuple[str, ...] = ()

    @classmethod
    def rows(cls, values: Sequence[float], notes: tuple[str, ...] = ()) -> "Measured":
        """A metric whose value is the mean of its rows."""
        by_row = tuple(float(v) for v in values)
        return cls(by_row, np.asarray(by_row, float)[:, None], notes=notes)


@dataclasses.dataclass(frozen=True)
class MetricResult:
    """A metric over rows, out of `scale`: 1 (a share) or 100 (BLEU and chrF, as they are always told).

    `by_row` has a value of each row, of the same scale. Where `is_mean` is False (BLEU, chrF), the value is made of
    counts over all rows and is not the mean of them. `interval` is the 95 % interval of a bootstrap over rows: it says
    how the value moves with the rows that were chosen, not with the sampling of the model. Where all rows are equal it
    has no width, which says little of few rows.
    """

    name: str
    value: float
    interval: tuple[float, float]
    scale: int
    by_row: tuple[float, ...]
    notes: tuple[str, ...] = ()  # what a reader of the value has to know
    measured: Measured = dataclasses.field(kw_only=True, repr=False, compare=False)

    @property
    def is_mean(self) -> bool:
        """Whether the value is the mean of `by_row`."""
        return self.measured.combine is mean_of


@dataclasses.dataclass(frozen=True)
class Difference:
    """After minus before, in the scale of both, with its 95 % interval; chance alone is unlikely where 0 is outside."""

    value: float
    interval: tuple[float, float]
    rows: int


def interval(values: Sequence[float], seed: int = 0, draws: int = 1000) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean of `values`; the same seed gives the same interval.

    Raises:
        ValueError: no value, one that is not finite, or too few draws.
    """
    return interval_of(_measured(values), seed=seed, draws=draws)


def interval_of(measured: Measured, *, seed: int = 0, draws: int = 1000) -> tuple[float, float]:
    """The 95 % bootstrap interval of the value over resampled rows."""
    rows = len(measured.statistics)
    sums = _resampled(measured.statistics, seed=seed, draws=draws)
    return _percentiles([measured.combine(s, rows) for s in sums])


def difference(
    before: MetricResult | Sequence[float], after: MetricResult | Sequence[float], seed: int = 0, draws: int = 1000
) -> Difference:
    """How much better `after` is than `before` on the same rows: a paired bootstrap (Koehn 2004).

    Both are results of the same metric, or values of each row, whose means are compared. Rows are resampled together,
    so what is hard in a row is the same for both.

    Raises:
        ValueError: other metrics or numbers of rows, nothing to compare, or a value that is not finite.
    """
    one, two = _measured(before), _measured(after)
    if isinstance(before, MetricResult) and isinstance(after, MetricResult) and before.name != after.name:
        raise ValueError(f"difference: {before.name} cannot be compared with {after.name}; score both by one metric")
    if one.statistics.shape != two.statistics.shape:
        raise ValueError(
            f"difference: {len(one.statistics)} rows before and {len(two.statistics)} after; it compares the same "
            "rows in the same order, so score both on one set"
        )
    rows, width = one.statistics.shape
    sums = _resampled(np.hstack([one.statistics, two.statistics]), seed=seed, draws=draws)
    moved = [two.combine(s[width:], rows) - one.combine(s[:width], rows) for s in sums]
    value = two.combine(two.statistics.sum(0), rows) - one.combine(one.statistics.sum(0), rows)
    return Difference(value, _percentiles(moved), rows)


def _measured(values: MetricResult | Sequence[float]) -> Measured:
    return values.measured if isinstance(values, MetricResult) else Measured.rows(values)


def _resampled(statistics: np.ndarray, *, seed: int, draws: int) -> np.ndarray:
    """Sums over as many rows as there are, drawn with replacement: `[draws, statistics]`."""
    rows = len(statistics)
    if not rows:
        raise ValueError("there is no row, so there is nothing to measure; give at least one")
    if not np.isfinite(statistics).all():
        row = int(np.flatnonzero(~np.isfinite(statistics).all(1))[0])
        raise ValueError(f"row {row + 1}: its value is not finite; leave it out, or find out what made it so")
    if draws < 1:
        raise ValueError(f"draws = {draws} must be at least 1; 1000 is usual")
    rng = np.random.default_rng(seed)
    counts = (np.bincount(rng.integers(0, rows, rows), minlength=rows) for _ in range(draws))
    return np.stack([count @ statistics for count in counts])


def _percentiles(values: Sequence[float]) -> tuple[float, float]:
    low, high = np.percentile(values, [LOW, HIGH])
    return float(low), float(high)
