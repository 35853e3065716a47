"""Sequences into rows of one static shape: the plan (which sequences share a row) and the filling of a row.

In: lengths and trained counts of all sequences. Out: rows as arrays of sequence indices; numpy `Batch` rows.
The plan is a pure function of lengths and seed, so every host computes the same one without a word exchanged.
Letters: N sequences, T positions in a row, P predicted positions in a row.
"""

import bisect
import math
from collections.abc import Iterable

import numpy as np
from tqdm import tqdm

from jax_sft.batch import Batch
from jax_sft.data.conversation import Sequence

_PREDICT_MULTIPLE = 64  # predicted positions are rounded up to this: even chunks for the head
_PREDICT_SLACK = 1.1  # room over the mean trained share, so that balancing costs no fill
_PREDICT_GROWTH = 1.25  # step to the next larger P that is tried
_ROWS_FOR_PREDICT = 1.02  # rows that a small P may cost: the layers are paid for in rows
_SAMPLE = 20_000  # sequences that P is tried on
_JITTER = 0.7  # the next sequence of a row may be this much shorter than the longest, while there is room for two
_ROWS_BETWEEN_UPDATES = 1024  # of the progress bar
_FEW, _FEW_LEFT = 2048, 50  # sequences of which rows are filled as full as they can be
_MOST_WORK = 2**34  # bits of sums that this may go through; some 0.2 s
_TRIES = 32  # sequences looked at for one with few enough trained positions, before only shorter ones are


def predict_capacity(lengths_N: np.ndarray, trained_N: np.ndarray, *, max_length: int, packing: bool = True) -> int:
    """P, the static number of predicted positions in a row: a bit over the mean trained share, never under the largest.

    The head and the loss pay for P positions a row, not for T. Where so few predicted positions would cost more than
    2 % more rows (long prompts that cannot be mixed with long answers), P grows until they do not.
    """
    largest = int(trained_N.max(initial=1))
    if not packing:
        return _round_up(largest, max_length)
    share = float(trained_N.sum()) / max(float(lengths_N.sum()), 1.0)
    wanted = max(largest, _PREDICT_SLACK * share * max_length)
    sample = np.random.default_rng(0).permutation(len(lengths_N))[:_SAMPLE]

    def num_rows(predicted: int) -> int:
        return len(_best_fit(lengths_N[sample], trained_N[sample], max_length, predicted, None)[1]) - 1

    most_rows = _ROWS_FOR_PREDICT * num_rows(max_length)
    while (predicted := _round_up(wanted, max_length)) < max_length and num_rows(predicted) > most_rows:
        wanted *= _PREDICT_GROWTH
    return predicted


def _round_up(predicted: float, max_length: int) -> int:
    return min(max_length, math.ceil(predicted / _PREDICT_MULTIPLE) * _PREDICT_MULTIPLE)


def pack(
    lengths_N: np.ndarray, trained_N: np.ndarray, *, capacity: int, predict_capacity: int, seed: int | None
) -> list[np.ndarray]:
    """Bin packing under two capacities: positions and predicted positions.

    Of few sequences, where a row more or less is a percent, two plans are made and the one of fewer rows is taken:
    `_best_fit` and `_filled_best`; of many, the first alone. A seed draws among equals and among nearly equals (other
    neighbours meet each time), and shuffles the rows; None keeps the order.

    Returns:
        Rows of sequence indices; each sequence stands in exactly one.
    """
    if len(lengths_N) and not (1 <= lengths_N.min() <= lengths_N.max() <= capacity):
        raise AssertionError(f"lengths {lengths_N.min()} to {lengths_N.max()} do not fit rows of {capacity} positions")
    if trained_N.max(initial=0) > predict_capacity:
        raise AssertionError(f"{trained_N.max()} trained positions do not fit rows with room for {predict_capacity}")
    rng = np.random.default_rng(seed) if seed is not None else None
    taken, ends = _best_fit(lengths_N, trained_N, capacity, predict_capacity, rng)
    least = -(-int(lengths_N.sum()) // capacity)
    if least + 1 < len(ends) and len(lengths_N) <= _FEW and len(lengths_N) ** 2 * capacity <= _MOST_WORK:
        other = _filled_best(lengths_N, trained_N, capacity, predict_capacity, rng)
        taken, ends = min((taken, ends), other, key=lambda plan: len(plan[1]))
    rows = np.arange(len(ends) - 1)
    if rng is not None:
        rng.shuffle(rows)
    taken_N = np.asarray(taken, np.int64)
    return [taken_N[ends[row] : ends[row + 1]] for row in rows.tolist()]


def _best_fit(
    lengths_N: np.ndarray,
    trained_N: np.ndarray,
    capacity: int,
    predict_capacity: int,
    rng: np.random.Generator | None,
) -> tuple[list[int], list[int]]:
    """Best-fit-decreasing, row by row (Johnson 1974): the sequences of all rows end to end, and where each row ends.

    Each row starts with the longest sequence left and takes, again and again, the longest that still fits. It takes it
    from those trained more than the mean while the row is trained less, and the other way round: else the long prompts
    would fill rows of their own, and the long answers would be left with rows that are out of predicted positions while
    half empty. While there is room for more than one, it takes one that is nearly as long.
    """
    order = rng.permutation(len(lengths_N)) if rng is not None else np.arange(len(lengths_N))
    mean_share = float(trained_N.sum()) / max(float(lengths_N.sum()), 1.0)
    is_high = (trained_N > mean_share * lengths_N)[order]
    lengths, trained = lengths_N.tolist(), trained_N.tolist()  # plain numbers: the loop is ten times as fast
    nearness = rng.uniform(_JITTER, 1.0, len(order)).tolist() if rng is not None else [1.0] * len(order)
    low = _Pool(order[~is_high], lengths_N, trained)
    high = _Pool(order[is_high], lengths_N, trained)

    taken: list[int] = []
    ends = [0]
    with tqdm(total=len(order), desc="packing", unit="seq", delay=2, leave=False) as progress:
        while longest := max(low.longest(), high.longest()):
            free, predict_free, surplus = capacity, predict_capacity, 0.0
            i = (high if high.longest() == longest else low).take(free, predict_free, 1.0)
            while i is not None:
                taken.append(i)
                free -= lengths[i]
                predict_free -= trained[i]
                surplus += trained[i] - mean_share * lengths[i]
                wanted, other = (low, high) if surplus > 0 else (high, low)
                near = nearness[i]
                i = wanted.take(free, predict_free, near)
                if i is None:
                    i = other.take(free, predict_free, near)
            ends.append(len(taken))
            if len(ends) % _ROWS_BETWEEN_UPDATES == 0:
                progress.update(len(taken) - progress.n)
    return taken, ends


def _filled_best(
    lengths_N: np.ndarray,
    trained_N: np.ndarray,
    capacity: int,
    predict_capacity: int,
    rng: np.random.Generator | None,
) -> tuple[list[int], list[int]]:
    """As `_best_fit`, but each row takes what fills it best together (subset sums; Gupta and Ho 1999), not one by one.

    Where that is trained too much, it takes the longest that fit. With a seed it looks at half of what is left.
    """
    order = rng.permutation(len(lengths_N)) if rng is not None else np.arange(len(lengths_N))
    left = order[np.argsort(lengths_N[order], kind="stable")].tolist()  # the longest last
    lengths, trained = lengths_N.tolist(), trained_N.tolist()
    taken: list[int] = []
    ends = [0]
    while left:
        first = left.pop()
        free, predict_free = capacity - lengths[first], predict_capacity - trained[first]
        fit = left[: bisect.bisect_right(left, free, key=lambda i: lengths[i])]
        if rng is not None and len(fit) > _FEW_LEFT:
            fit = [i for i, kept in zip(fit, (rng.random(len(fit)) < 0.5).tolist(), strict=True) if kept]
        row = _fullest(fit, lengths, free)
        if sum(trained[i] for i in row) > predict_free:
            row = []
            for i in reversed(fit):
                if lengths[i] <= free and trained[i] <= predict_free:
                    row.append(i)
                    free, predict_free = free - lengths[i], predict_free - trained[i]
        taken += [first, *row]
        ends.append(len(taken))
        gone = set(row)
        left = [i for i in left if i not in gone]
    return taken, ends


def _fullest(sequences: list[int], lengths: list[int], free: int) -> list[int]:
    """Those whose lengths together come nearest to what is free; of several ways the one with the longest of them."""
    sums = [1]  # bit s of sums[k]: some of the first k sequences are s long together
    for i in sequences:
        sums.append((sums[-1] | sums[-1] << lengths[i]) & ((1 << free + 1) - 1))
    missing, row = sums[-1].bit_length() - 1, []
    for k in range(len(sequences), 0, -1):
        length = lengths[sequences[k - 1]]
        if missing >= length and sums[k - 1] >> missing - length & 1:
            row.append(sequences[k - 1])
            missing -= length
    return row


class _Pool:
    """Sequences that no row holds yet, by length."""

    def __init__(self, order: np.ndarray, lengths_N: np.ndarray, trained: list[int]) -> None:
        self._trained = trained
        order = order[::-1]  # the first is taken first, from the end
        order = order[np.argsort(lengths_N[order], kind="stable")]
        found, starts = np.unique(lengths_N[order], return_index=True)
        self._lengths: list[int] = found.tolist()
        self._by_length = {
            length: same.tolist()
            for length, same in zip(self._lengths, np.split(order, starts[1:]) if len(order) else [], strict=True)
        }

    def longest(self) -> int:
        """Length of the longest sequence; 0 when the pool is empty."""
        return self._lengths[-1] if self._lengths else 0

    def take(self, free: int, predict_free: int, near: float) -> int | None:
        """The longest sequence that fits, taken out; or None. Where two would fit, one of `near` times its length."""
        tries = 0
        k = bisect.bisect_right(self._lengths, free) - 1
        if k >= 0 and 2 * self._lengths[k] <= free:
            k = bisect.bisect_left(self._lengths, near * self._lengths[k])
        while k >= 0:
            same_length = self._by_length[self._lengths[k]]
            for j in range(len(same_length) - 1, -1, -1):
                if self._trained[same_length[j]] <= predict_free:
                    i = same_length.pop(j)
                    if not same_length:
                        del self._by_length[self._lengths.pop(k)]
                    return i
                tries += 1
                if tries == _TRIES:  # a sequence this short fits, however much of it is trained
                    k = min(k, bisect.bisect_right(self._lengths, predict_free))
                    break
            k -= 1
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
