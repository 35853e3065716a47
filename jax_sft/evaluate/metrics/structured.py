"""Answers that are to be JSON.

In: predictions and references. Out: 0 or 1 for each row. The whole answer must be JSON (RFC 8259: no NaN), or one code
fence with nothing around it.
"""

import decimal
import json
import re
from collections.abc import Sequence
from typing import Any

from jax_sft.evaluate.metrics.result import Measured

_FENCE = re.compile(r"\s*```[^\n`]*\n(.*?)\n?[ \t]*```\s*", re.DOTALL)
_NOTHING = object()  # None is a value of JSON


def json_valid(predictions: Sequence[str], references: Sequence[str]) -> Measured:
    """1 where the answer is JSON; the references are not looked at."""
    return Measured.rows([_read(p) is not _NOTHING for p, _ in zip(predictions, references, strict=True)])


def json_match(predictions: Sequence[str], references: Sequence[str]) -> Measured:
    """1 where the answer is JSON of the same value: the order of keys does not count, 1 is 1.0, true is not 1.

    Raises:
        ValueError: a reference that is no JSON.
    """
    values = []
    for row, (prediction, reference) in enumerate(zip(predictions, references, strict=True), 1):
        wanted = _read(reference)
        if wanted is _NOTHING:
            raise ValueError(f"row {row}: the reference {reference[:80]!r} is no JSON; mend it, or score by json_valid")
        values.append(is_same(_read(prediction), wanted))
    return Measured.rows(values)


def _read(text: str) -> Any:
    fenced = _FENCE.fullmatch(text)
    try:
        # Decimal: Python refuses integers of more than 4300 digits, JSON does not.
        return json.loads(fenced[1] if fenced else text, parse_int=decimal.Decimal, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return _NOTHING


def _refuse(name: str) -> Any:
    raise ValueError(name)


def is_same(one: Any, two: Any) -> bool:
    """Whether two values of JSON are equal, however deep they are."""
    pairs = [(one, two)]
    while pairs:
        a, b = pairs.pop()
        if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
            pairs += [(a[key], b[key]) for key in a]
        elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
            pairs += zip(a, b, strict=True)
        elif isinstance(a, dict | list) or isinstance(a, bool) != isinstance(b, bool) or a != b:
            return False
    return True
