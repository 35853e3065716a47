"""The rows that new tokens get in the embedding and in an untied head, beside the rows that the files have.

In: a reader of the file's table, and which part of ours is wanted. Out: that part, filled. How a new row starts follows
from the rows of the vocabulary before, which are all read for it, from the seed and from the token's id: never from
how the table is cut, nor from what other tokens are new.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from jax_sft.config import NewRowsStart

_BYTES = 64 * 2**20  # of the rows in float64 that are looked at at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class NewRows:
    """Which rows are new, and how they start."""

    ids: tuple[int, ...]  # of the tokens added here; files may have a row for them, in which nothing was learned
    stored: int  # rows of the files
    end: int  # rows from here on are padding: zeros
    start: NewRowsStart
    seed: int


def read_table(
    read: Callable[[tuple[slice, ...]], np.ndarray],
    part: np.ndarray,
    slices: tuple[slice, ...],
    new: NewRows,
    *,
    width: int,
    name: str,
) -> None:
    """Fill `part`, the rows and columns `slices` of an embedding or head.

    Args:
        read: a part of the file's table, which has `new.stored` rows of `width` numbers.
        name: of the table, so that embedding and head draw other numbers.
    """
    rows, columns = slices
    there = min(rows.stop, new.stored)
    if rows.start < there:
        part[: there - rows.start] = read((slice(rows.start, there), columns))
    part[max(rows.start, new.end) - rows.start :] = 0
    here = [i for i in {*new.ids, *range(new.stored, new.end)} if rows.start <= i < rows.stop]
    if not here:
        return
    if new.start == "zeros":
        part[[i - rows.start for i in here]] = 0
        return
    mean, deviation = _statistics(read, columns, part.shape[1], new, width)
    for i in here:
        row = mean
        if new.start == "sample":
            noise = np.random.default_rng([new.seed, i, *name.encode()]).standard_normal(width)
            row = mean + deviation * noise[columns]
        part[i - rows.start] = row.astype(part.dtype)


def _statistics(
    read: Callable[[tuple[slice, ...]], np.ndarray], columns: slice, count: int, new: NewRows, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each column over the rows of the vocabulary before."""
    known = np.ones(new.stored, bool)
    known[[i for i in new.ids if i < new.stored]] = False
    total, squares = np.zeros((2, count))
    # As many rows whatever columns are asked for: the sums, and so the rows, are the same bit for bit.
    step = max(1, _BYTES // (8 * width))
    for start in range(0, new.stored, step):
        stop = min(start + step, new.stored)
        held = read((slice(start, stop), columns)).astype(np.float64)[known[start:stop]]
        total += held.sum(0)
        squares += np.square(held).sum(0)
    mean = total / known.sum()
    return mean, np.sqrt(np.maximum(squares / known.sum() - np.square(mean), 0))
