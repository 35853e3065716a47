"""Task metrics: how well predictions do against their references, with what chance may have done to it.

In: predictions and references, a text each. Out: a `MetricResult`. Numpy only, no jax; `result` has intervals and
differences, each other module one kind of metric, and `METRICS` all of them by name.
"""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from jax_sft.config import did_you_mean
from jax_sft.evaluate.metrics import numbers, overlap, programs, structured, texts
from jax_sft.evaluate.metrics.predictions import Prediction, write_predictions
from jax_sft.evaluate.metrics.result import Difference, Measured, MetricResult, difference, interval, interval_of

__all__ = [
    "METRICS",
    "Difference",
    "Metric",
    "MetricResult",
    "Prediction",
    "difference",
    "interval",
    "score",
    "write_predictions",
]


@dataclasses.dataclass(frozen=True)
class Metric:
    """How a metric is measured, and what its values are out of: 1, or 100."""

    measure: Callable[..., Measured]  # (predictions, references, **options)
    scale: int = 1

    @property
    def options(self) -> tuple[str, ...]:
        """The names of what may be given besides."""
        return tuple(inspect.signature(self.measure).parameters)[2:]

    @property
    def about(self) -> str:
        """One line on what it measures."""
        return (inspect.getdoc(self.measure) or "").partition("\n")[0]


METRICS = {
    "exact_match": Metric(texts.exact_match),
    "f1": Metric(texts.f1),
    "final_number": Metric(numbers.final_number),
    "label_accuracy": Metric(texts.label_accuracy),
    "json_valid": Metric(structured.json_valid),
    "json_match": Metric(structured.json_match),
    "bleu": Metric(overlap.bleu, scale=100),
    "chrf": Metric(overlap.chrf, scale=100),
    "rouge1": Metric(overlap.rouge1),
    "rouge2": Metric(overlap.rouge2),
    "rougeL": Metric(overlap.rouge_l),
    "pass_at_1": Metric(programs.pass_at_1),
}


def score(
    name: str,
    predictions: Sequence[str],
    references: Sequence[str],
    *,
    seed: int = 0,
    draws: int = 1000,
    **options: Any,
) -> MetricResult:
    """Measure `predictions` against `references`, a row each, by the metric `name`; see its own docstring for options.

    The value is out of 1 (`scale`), or out of 100 for bleu and chrf. `seed` and `draws` are those of the interval.

    Raises:
        ValueError: an unknown metric or option, no row, other numbers of predictions and references, one that is no
            text, or what the metric itself refuses.
    """
    if name not in METRICS:
        raise ValueError(f"{name!r} is no metric{did_you_mean(name, tuple(METRICS))}; there are {', '.join(METRICS)}")
    metric = METRICS[name]
    for option in options:
        if option not in metric.options:
            known = ", ".join(metric.options) or "none"
            raise ValueError(
                f"{name} has no option {option!r}{did_you_mean(option, metric.options)}; its options are: {known}"
            )
    _check_rows(name, predictions, references)
    measured = metric.measure(predictions, references, **options)
    value = measured.combine(measured.statistics.sum(0), len(predictions))
    bounds = interval_of(measured, seed=seed, draws=draws)
    return MetricResult(name, value, bounds, metric.scale, measured.by_row, measured.notes, measured=measured)


def _check_rows(name: str, predictions: Sequence[str], references: Sequence[str]) -> None:
    if isinstance(predictions, str) or isinstance(references, str):
        raise ValueError(f"{name}: predictions and references are lists of texts; put a single text into a list")
    if len(predictions) != len(references):
        raise ValueError(
            f"{name}: {len(predictions)} predictions and {len(references)} references; give a reference for each "
            "prediction, in the same order"
        )
    if not len(predictions):
        raise ValueError(f"{name}: there is no prediction, so there is nothing to measure; give at least one")
    for kind, texts_of_kind in (("prediction", predictions), ("reference", references)):
        for row, text in enumerate(texts_of_kind, 1):
            if not isinstance(text, str):
                raise ValueError(f"{name}: {kind} {row} is {type(text).__name__}, not text; turn it into text")
