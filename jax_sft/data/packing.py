"""Sequences into rows of one static shape: the plan (which sequences share a row) and the filling of a row.

In: lengths and trained counts of all sequences. Out: rows as arrays of sequence indices; numpy `Batch` rows.
The plan is a pure function of lengths and seed, so every host computes the same one without a word exchanged.
Letters: N sequences, T positions in a row, P predicted positions in a row.
"""

import bisect
from collections.abc import Iterable

import numpy as np
from tqdm import tqdm

from jax_sft.batch import Batch
from jax_sft.data.conversation import Sequence

_PREDICT_MULTIPLE = 64  # predicted positions are rounded up to this: even chunks for the head
_PREDICT_SLACK = 1.1  # room over the mean trained share, so that balancing costs no fill
_TRIES = 64  # rows looked at for one sequence before a new one is opened


def predict_capacity(lengths_N: np.ndarray, trained_N: np.ndarray, *, max_length: int, packing: bool = True) -> int:
    """P, the static number of predicted positions in a row: a bit over the mean trained share, never under the largest.

    The head and the loss pay for P positions a row, not for T.
    """
    largest = int(trained_N.max(initial=1))
    share = float(trained_N.sum()) / max(float(lengths_N.sum()), 1.0)
    wanted = max(largest, _PREDICT_SLACK * share * max_length) if packing else largest
    return min(max_length, -(-int(np.ceil(wanted)) // _PREDICT_MULTIPLE) * _PREDICT_MULTIPLE)


def pack(
    lengths_N: np.ndarray, trained_N: np.ndarray, *, capacity: int, predict_capacity: int, seed: int | None
) -> list[np.ndarray]:
    """Best-fit-decreasing bin packing under two capacities: positions and predicted positions.

    Each sequence goes, longest first, into the fullest row that still holds it (Johnson 1974, with a second
    dimension as a condition). A seed shuffles equals before and rows after; None keeps the input's order.

    Returns:
        Rows of sequence indices; each sequence stands in exactly one.
    """
    if len(lengths_N) and (lengths_N.max() > capacity or trained_N.max() > predict_capacity):
        raise AssertionError(f"a sequence of {lengths_N.max()} positions cannot fit a row of {capacity}")
    rng = np.random.default_rng(seed) if seed is not None else None
    order = rng.permutation(len(lengths_N)) if rng is not None else np.arange(len(lengths_N))
    order = order[np.argsort(-lengths_N[order], kind="stable")]

    rows: list[list[int]] = []
    predict_left: list[int] = []
    rows_by_room: dict[int, list[int]] = {}  # free positions -> rows
    rooms: list[int] = []  # the keys of rows_by_room, ascending
    for i in tqdm(order.tolist(), desc="packing", unit="seq", delay=2, leave=False):
        length, trained = int(lengths_N[i]), int(trained_N[i])
        room = _take_row(rows_by_room, rooms, predict_left, length, trained)
        if room is None:
            row, free = len(rows), capacity
            rows.append([])
            predict_left.append(predict_capacity)
        else:
            row, free = room
        rows[row].append(i)
        predict_left[row] -= trained
        left = free - length
        if left:
            if left not in rows_by_room:
                rows_by_room[left] = []
                bisect.insort(rooms, left)
            rows_by_room[left].append(row)
    if rng is not None:
        rng.shuffle(rows)
    return [np.asarray(row, np.int64) for row in rows]


def _take_row(
    rows_by_room: dict[int, list[int]], rooms: list[int], predict_left: list[int], length: int, trained: int
) -> tuple[int, int] | None:
    """The fullest row with room for both, taken out of the index, and its free positions."""
    tries = 0
    for k in range(bisect.bisect_left(rooms, length), len(rooms)):
        room = rooms[k]
        candidates = rows_by_room[room]
        for j in range(len(candidates) - 1, -1, -1):
            if predict_left[candidates[j]] >= trained:
                row = candidates.pop(j)
                if not candidates:
                    del rows_by_room[room], rooms[k]
                return row, room
            tries += 1
            if tries >= _TRIES:
                return None
    return None


def fill_rows(
    rows: Iterable[Iterable[tuple[Sequence, int]]], *, length: int, predict_capacity: int, num_rows: int
) -> Batch:
    """Lay sequences (with their source index) into rows; rows that are missing up to `num_rows` stay empty.

    See `Batch` for a worked example.
    """
    shape = (num_rows, length)
    tokens_BT, targets_BT, segments_BT, sources_BT = (np.zeros(shape, np.int32) for _ in range(4))
    weights_BT = np.zeros(shape, np.float32)
    positions_BT = np.tile(np.arange(length, dtype=np.int32), (num_rows, 1))
    predict_BP = np.full((num_rows, predict_capacity), length, np.int32)
    for b, row in enumerate(rows):
        start = 0
        for segment, (sequence, source) in enumerate(row, 1):
            here = slice(start, start + len(sequence.tokens_T))
            tokens_BT[b, here] = sequence.tokens_T
            targets_BT[b, here] = sequence.targets_T
            weights_BT[b, here] = sequence.weights_T
            segments_BT[b, here] = segment
            positions_BT[b, here] = np.arange(len(sequence.tokens_T))
            sources_BT[b, here] = source
            start = here.stop
        positions_BT[b, start:] = np.arange(length - start)
        predicted = np.flatnonzero(weights_BT[b])
        predict_BP[b, : len(predicted)] = predicted
    return Batch(tokens_BT, targets_BT, weights_BT, segments_BT, positions_BT, sources_BT, predict_BP)
