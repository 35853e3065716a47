"""Rows that are tokens already: `input_ids`, and `labels` or a mask; no chat template touches them.

In: lists of numbers as Hugging Face trainers take them, where labels stand at the place of their own token, -100 where
nothing is learnt. Out: `Tokens`; `chat.py` shifts them once, as it does all others.

    input_ids     5    6    7    8      labels   -100 -100    7    8
    weights       0    0    1    1

Padding, which `attention_mask` tells, is left out.
"""

import itertools
from collections.abc import Mapping
from typing import Any

from jax_sft.data.conversation import DataError, Tokens
from jax_sft.data.messages import LARGEST_WEIGHT, SMALLEST_WEIGHT, Untrainable
from jax_sft.data.source import kind_of

NOT_TRAINED = -100
LABELS = "labels"
MASKS = ("loss_mask", "assistant_masks", "completion_mask")  # ours, and as transformers and TRL call theirs


def to_tokens(row: Mapping[str, Any], where: str) -> Tokens:
    """The tokens of a row and the weight of each; without labels and mask every token teaches.

    Raises:
        Untrainable: there are no tokens.
        DataError: a list is missing, of another length, or holds something else than it should.
    """
    ids = _numbers(row["input_ids"], where, "input_ids")
    if not ids:
        raise Untrainable("empty input_ids")
    if not all(type(i) is int and i >= 0 for i in ids):
        raise DataError(f"{where}: input_ids holds something else than token ids; write whole numbers of at least 0")
    weights = _weights(row, ids, where)
    seen = row.get("attention_mask")
    if seen is None:
        return Tokens(tuple(ids), weights)
    seen = _numbers(seen, where, "attention_mask", length=len(ids))
    if not all(number in (0, 1) for number in seen):
        raise DataError(f"{where}: attention_mask holds something else than 0 and 1; write 0 for padding, else 1")
    if not any(seen):
        raise Untrainable("an attention_mask of zeros")
    return Tokens(*(tuple(itertools.compress(of, seen)) for of in (ids, weights)))


def _weights(row: Mapping[str, Any], ids: list[int], where: str) -> tuple[float, ...]:
    said = [field for field in (LABELS, *MASKS) if row.get(field) is not None]
    if len(said) > 1:
        raise DataError(
            f"{where}: {said[0]} and {said[1]} both say what is trained; keep one of them, or set "
            f"data.columns.{said[1]} = ''"
        )
    if not said:
        return (1.0,) * len(ids)
    (field,) = said
    given = _numbers(row[field], where, field, length=len(ids))
    if field == LABELS:
        for at, (label, token) in enumerate(zip(given, ids, strict=True)):
            if label not in (NOT_TRAINED, token):
                raise DataError(
                    f"{where}: labels[{at}] is {label}, and input_ids[{at}] {token}; a label is its own token or "
                    f"{NOT_TRAINED}, at the same place: write them as they are, not shifted"
                )
        return tuple(float(label != NOT_TRAINED) for label in given)
    if not all(weight == 0 or SMALLEST_WEIGHT <= weight <= LARGEST_WEIGHT for weight in given):
        raise DataError(f"{where}: {field} holds something else than weights; write 0 and 1, or numbers above 0")
    return tuple(map(float, given))


def _numbers(value: Any, where: str, field: str, *, length: int | None = None) -> list[Any]:
    if not isinstance(value, list):
        raise DataError(f"{where}: {field} is {kind_of(value)}, not a list of numbers; write one for each token")
    odd = next((x for x in value if not isinstance(x, int | float)), None) if None not in value else None
    if odd is not None or None in value:
        raise DataError(f"{where}: {field} holds {kind_of(odd)}, not numbers alone; write one for each token")
    if length is not None and len(value) != length:
        raise DataError(f"{where}: {field} has {len(value)} numbers, and input_ids {length}; write one for each token")
    return value
