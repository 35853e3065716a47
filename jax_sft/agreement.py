"""The processes of a run are about the same run, or none of them begins: else they would wait for each other in vain.

In: what a process was told and what it read, as a mapping. Out: nothing, or on every process the same error that names
what differs. In one process there is nothing to compare.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

_MOST_NAMED = 5  # differences that are written out


def check_agreement(said: Mapping[str, Any]) -> None:
    """Compare with all processes; each must call it.

    Raises:
        ValueError: two processes say something else.
    """
    if jax.process_count() == 1:
        return
    text = json.dumps(said, sort_keys=True, default=str).encode()
    digests_P16 = _gathered(np.frombuffer(hashlib.blake2b(text, digest_size=16).digest(), np.uint8))
    others = np.flatnonzero((digests_P16 != digests_P16[0]).any(axis=1))
    if not len(others):
        return
    lengths_P = _gathered(np.asarray([len(text)], np.int32))[:, 0]
    padded = np.zeros(lengths_P.max(), np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    texts = [row[:length].tobytes() for row, length in zip(_gathered(padded), lengths_P.tolist(), strict=True)]
    first, other = (json.loads(texts[i]) for i in (0, int(others[0])))
    found = list(_differences(first, other))
    more = f" and {len(found) - _MOST_NAMED} more" if len(found) > _MOST_NAMED else ""
    raise ValueError(
        f"processes 0 and {others[0]} are not about the same run: {'; '.join(found[:_MOST_NAMED])}{more}; start all "
        "processes with the same config, data and model"
    )


def _gathered(mine: np.ndarray) -> np.ndarray:
    """[process, ...] of all."""
    return np.asarray(multihost_utils.process_allgather(mine))


def _differences(one: Mapping[str, Any], two: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key in sorted({*one, *two}):
        a, b = one.get(key), two.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key} is {a!r} and {b!r}"
