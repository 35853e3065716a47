"""How hard each conversation is, out of a file of scores: for a stage that goes from easy to hard.

In: JSON lines, each with the `id` of a conversation and the `loss` that a model has on it, and whatever else. Out: a
number for each sequence. A conversation that has several lines (one for each of its answers) has their mean.

Letters: N sequence.
"""

import collections
import json
import math
import pathlib

import numpy as np

from jax_sft.data.conversation import EXAMPLES_PER_REASON, DataError
from jax_sft.data.store import TokenizedSet


def read_scores(path: str) -> dict[str, float]:
    """The loss of each id.

    Raises:
        DataError: the file is not there, or a line does not say an id and a loss.
    """
    found: dict[str, list[float]] = collections.defaultdict(list)
    try:
        with pathlib.Path(path).expanduser().open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    name, loss = _score_in(line, f"{path}:{number}")
                    found[name].append(loss)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.scores = {path!r} cannot be read ({error}); name a file of JSON lines") from error
    return {name: sum(losses) / len(losses) for name, losses in found.items()}


def scores_of(dataset: TokenizedSet, asked: np.ndarray, scores: dict[str, float], path: str) -> np.ndarray:
    """The scores of all sequences; of those that are not `asked` for, NaN where there is none.

    Raises:
        DataError: one that is asked for has none.
    """
    scores_N = np.array([scores.get(dataset.ids[i], math.nan) for i in range(len(dataset))], np.float64)
    missing = asked[np.isnan(scores_N[asked])]
    if len(missing):
        shown = ", ".join(dict.fromkeys(dataset.ids[i] for i in missing[:EXAMPLES_PER_REASON]))
        raise DataError(
            f"data.scores = {path!r} has no loss for {len(missing):,} of the {len(asked):,} sequences that a stage of "
            f"order = 'score' draws (first: {shown}); score the files that are trained on, under the same paths, or "
            "choose another order"
        )
    return scores_N


def _score_in(line: str, where: str) -> tuple[str, float]:
    try:
        row = json.loads(line)
        name, loss = str(row["id"]), row["loss"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f'{where}: {line.strip()[:60]!r} is no score; write an id and a loss, such as {{"id": "a.jsonl:1", '
            '"loss": 1.5}'
        ) from error
    if isinstance(loss, bool) or not isinstance(loss, int | float) or not math.isfinite(loss):
        raise DataError(f"{where}: the loss of {name} is {loss!r}; write a number, or take the line out")
    return name, float(loss)
