"""Forgetting: how far a fine-tuned model has gone from the model that it was made of, and whether that is too far.

In: general texts (our own, or a file), or the answers of a validation set; the parameters of both models, the base's
only once. Out: a `Drift` (losses, KL both ways, agreement), plain lines, and an `Alarm` for each level that it passes.
`texts` reads passages, `rows` makes batches of them, `compare` runs the models, `drift` says what came of it.
"""

from jax_sft.evaluate.forgetting.compare import (
    Compared,
    DriftStep,
    Reference,
    Sums,
    drift_of,
    make_drift_step,
    make_reference_step,
    measure_drift,
    reference_of,
)
from jax_sft.evaluate.forgetting.drift import Alarm, Drift, judge, lines
from jax_sft.evaluate.forgetting.rows import Rows, rows_of
from jax_sft.evaluate.forgetting.texts import Text, read_texts

__all__ = [
    "Alarm",
    "Compared",
    "Drift",
    "DriftStep",
    "Reference",
    "Rows",
    "Sums",
    "Text",
    "drift_of",
    "judge",
    "lines",
    "make_drift_step",
    "make_reference_step",
    "measure_drift",
    "read_texts",
    "reference_of",
    "rows_of",
]
