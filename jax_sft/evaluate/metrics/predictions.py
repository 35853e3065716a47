"""Predictions as a file: a JSON line for each prompt, with what was said and how it scored.

In: `Prediction`s. Out: the file, whole or not at all.
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jax_sft.disk import written_whole


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One line: what was asked, what was wanted, what was said."""

    id: str | int | None
    prompt: Sequence[Mapping[str, Any]]  # messages, {"role": ..., "content": ...}
    reference: str | None
    prediction: str
    stopped: bool  # the model ended by itself
    tokens: int  # of the prediction
    scores: Mapping[str, float]  # by the name of the metric


def write_predictions(path: str | os.PathLike[str], rows: Iterable[Prediction]) -> int:
    """Write `rows` to `path` in UTF-8, and say how many there are; an older file stays until the new one is whole.

    Raises:
        ValueError: a row that JSON cannot hold, such as a score that is not a number.
        OSError: the file cannot be written.
    """
    count = 0
    with written_whole(path) as file:
        for count, row in enumerate(rows, 1):
            file.write(_line(row, count) + "\n")
    return count


def _line(row: Prediction, number: int) -> str:
    try:
        return json.dumps(dataclasses.asdict(row), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"prediction {number} (id {row.id!r}): {error}; scores are finite numbers, messages plain JSON"
        ) from error
