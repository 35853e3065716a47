"""Rows that are tokens already: `input_ids`, and `labels` or `loss_mask`; no chat template touches them.

In: lists of numbers as Hugging Face trainers take them, where labels stand at the place of their own token, -100 where
nothing is learnt. Out: `Tokens`; `chat.py` shifts them once, as it does all others.

    input_ids     5    6    7    8      labels   -100 -100    7    8
    weights       0    0    1    1
"""

from collections.abc import Mapping
from typing import Any

from jax_sft.data.conversation import DataError, Tokens
from jax_sft.data.messages import SMALLEST_WEIGHT, Untrainable
from jax_sft.data.source import kind_of

NOT_TRAINED = -100


def to_tokens(row: Mapping[str, Any], where: str) -> Tokens:
    """The tokens of a row and the weight of each; without labels and mask every token teaches.

    Raises:
        Untrainable: there are no tokens.
        DataError: a list is missing, of another length, or holds something else than it should.
    """
    ids = _numbers(row["input_ids"], where, "input_ids")
    if not ids:
        raise Untrainable("empty input_ids")
    if not all(isinstance(i, int) and i >= 0 for i in ids):
        raise DataError(f"{where}: input_ids holds something else than token ids; write whole numbers of at least 0")
    labels, mask = row.get("labels"), row.get("loss_mask")
    if labels is not None and mask is not None:
        raise DataError(f"{where}: labels and loss_mask both say what is trained; keep one of them")
    if labels is not None:
        labels = _numbers(labels, where, "labels", length=len(ids))
        for at, (label, token) in enumerate(zip(labels, ids, strict=True)):
            if label not in (NOT_TRAINED, token):
                raise DataError(
                    f"{where}: labels[{at}] is {label}, and input_ids[{at}] {token}; a label is its own token or "
                    f"{NOT_TRAINED}, at the same place: write them as they are, not shifted"
                )
        return Tokens(tuple(ids), tuple(float(label != NOT_TRAINED) for label in labels))
    weights = [1.0] * len(ids) if mask is None else _numbers(mask, where, "loss_mask", length=len(ids))
    if not all(weight == 0 or SMALLEST_WEIGHT <= weight < float("inf") for weight in weights):
        raise DataError(f"{where}: loss_mask holds something else than weights; write 0 and 1, or numbers above 0")
    return Tokens(tuple(ids), tuple(map(float, weights)))


def _numbers(value: Any, where: str, field: str, *, length: int | None = None) -> list[Any]:
    if not isinstance(value, list) or not all(isinstance(x, int | float) for x in value):
        raise DataError(f"{where}: {field} is {kind_of(value)}, not a list of numbers; write one for each token")
    if length is not None and len(value) != length:
        raise DataError(f"{where}: {field} has {len(value)} numbers, and input_ids {length}; write one for each token")
    return value
