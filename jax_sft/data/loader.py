"""Batches by step number: stages, epochs, packing, shuffling, and a thread that works ahead.

In: a tokenised set, and the stages of the run. Out: numpy `Batch`es. The rows of all epochs of a stage form one stream,
and its batch s is rows [s * batch_size, (s + 1) * batch_size) of it. So the step number is the whole state: resume is
exact, on any number of hosts, and nothing is dropped at the end of an epoch (only the last batch of a stage is filled
up with empty rows).
"""

import bisect
import dataclasses
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np

from jax_sft.batch import Batch
from jax_sft.data import conversation
from jax_sft.data.dataset import TokenizedSet
from jax_sft.data.mixture import Mixture, everything
from jax_sft.data.packing import fill_rows, pack, predict_capacity

Order = Literal["random", "length", "answers", "score"]

_MOST_PARTS = 20  # that an ordered epoch is cut into: each is packed and shuffled by itself
_ROWS_KEPT = 1_000_000  # of plans, some 150 MB
_ROWS_IN_PART = 64  # at least: the last row of each part is seldom full


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of a run. Exactly one of `epochs` (may be a fraction) and `steps` bounds it."""

    epochs: float | None = None
    steps: int | None = None
    mixture: Mixture | None = None  # None: everything once in an epoch
    order: Order = "random"
    scores_N: np.ndarray | None = None  # of the order "score": low before high


class Loader:
    """Random access to the batches of a run."""

    def __init__(
        self,
        dataset: TokenizedSet,
        *,
        batch_size: int,
        max_length: int,
        packing: bool,
        sources: tuple[str, ...],
        seed: int | None,
        stages: Sequence[Stage] = (Stage(epochs=1),),
    ) -> None:
        if not len(dataset):
            raise ValueError("the tokenised set is empty: there is no batch to make of it")
        self.dataset = dataset
        self.batch_size = batch_size
        self.max_length = max_length
        self.packing = packing
        self.sources = sources
        self.predict_capacity = predict_capacity(
            dataset.lengths_N, dataset.trained_N, max_length=max_length, packing=packing
        )
        self._source_index = [sources.index(s) for s in dataset.sources]
        self._streams = [_Stream(self, stage, number, seed) for number, stage in enumerate(stages)]
        self.stage_ends = tuple(np.cumsum([stream.total_steps for stream in self._streams]).tolist())
        self.total_steps = self.stage_ends[-1]

    def batch(self, step: int, rows: np.ndarray | None = None) -> Batch:
        """The batch of a step (0 is the first), or this host's `rows` (indices into it) alone."""
        chosen = self._rows_of(step)
        if rows is not None:
            chosen = [chosen[r] if r < len(chosen) else np.zeros(0, np.int64) for r in rows]
        return fill_rows(
            [[self._sequence(i) for i in row.tolist()] for row in chosen],
            length=self.max_length,
            predict_capacity=self.predict_capacity,
            num_rows=self.batch_size if rows is None else len(rows),
        )

    def lengths(self, step: int) -> np.ndarray:
        """Lengths of all sequences in the batch of a step, over all hosts: for token counts and FLOPs."""
        rows = self._rows_of(step)
        return self.dataset.lengths_N[np.concatenate(rows)] if rows else np.zeros(0, np.int64)

    def ids(self, step: int) -> list[str]:
        """Ids of the conversations in the batch of a step."""
        return [self.dataset.ids[i] for row in self._rows_of(step) for i in row]

    def stage_of(self, step: int) -> int:
        """The stage that a step belongs to; of the step after the last, the last."""
        return min(bisect.bisect_right(self.stage_ends, step), len(self.stage_ends) - 1)

    def epoch_of(self, step: int) -> float:
        """Epochs of its stage that are done before `step`; at the first step of a stage, 0."""
        stage = self.stage_of(step)
        return self._streams[stage].epoch_of(step - self._first_step(stage))

    def mixture_lines(self) -> list[str]:
        """What each stage draws of the sets, for the log; nothing where that is everything, once."""
        many = len(self._streams) > 1
        lines = []
        for number, stream in enumerate(self._streams):
            place = f"stage {number + 1}: " if many else ""
            lines += [place + f"{stream.total_steps:,} steps"] if many else []
            lines += [place + line for line in stream.mixture.lines()]
        return lines

    def rows_per_epoch(self) -> int:
        """Packed rows of the first epoch (later epochs differ by a row or two)."""
        return self._streams[0].rows_per_epoch()

    def epoch_rows(self) -> list[np.ndarray]:
        """The rows of the first epoch, as the sequences in each."""
        return self._streams[0].epoch_rows()

    def fill(self) -> float:
        """Share of the positions of the first epoch's rows that hold a token."""
        return self._streams[0].fill()

    def prefetch(
        self, start_step: int, stop_step: int, *, rows: np.ndarray | None = None, ahead: int = 2
    ) -> Iterator[tuple[int, Batch]]:
        """Steps and batches in order, `ahead` of them built in a thread; its errors come out here."""
        return worked_ahead(lambda step: self.batch(step, rows), start_step, stop_step, ahead=ahead)

    def _sequence(self, i: int) -> tuple[conversation.Sequence, int]:
        return self.dataset[i], self._source_index[self.dataset.source_ids_N[i]]

    def _first_step(self, stage: int) -> int:
        return self.stage_ends[stage - 1] if stage else 0

    def _rows_of(self, step: int) -> list[np.ndarray]:
        if not 0 <= step < self.total_steps:
            raise IndexError(f"step {step} is outside the run of {self.total_steps} steps")
        stage = self.stage_of(step)
        return self._streams[stage].rows_of(step - self._first_step(stage))


def worked_ahead(
    make: Callable[[int], Batch], start_step: int, stop_step: int, *, ahead: int
) -> Iterator[tuple[int, Batch]]:
    """Steps and their batches in order, `ahead` of them made in a thread; its errors come out here."""
    ready: queue.Queue[tuple[int, Batch] | BaseException | None] = queue.Queue(maxsize=ahead)
    stop = threading.Event()

    def put(item: tuple[int, Batch] | BaseException | None) -> None:
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for step in range(start_step, stop_step):
                put((step, make(step)))
                if stop.is_set():
                    return
            put(None)
        except BaseException as error:  # noqa: BLE001  it is raised again where the batch is asked for
            put(error)

    thread = threading.Thread(target=work, name="batches", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()


class _Stream:
    """The rows of one stage, by its own step numbers."""

    def __init__(self, loader: Loader, stage: Stage, number: int, seed: int | None) -> None:
        self._loader = loader
        self._number = number
        self._seed = seed
        self._order = stage.order
        self._scores_N = stage.scores_N
        self.mixture = stage.mixture or everything(len(loader.dataset), seed=seed)
        self._lock = threading.Lock()
        self._plans: dict[int, list[np.ndarray]] = {}
        self._starts = [0]  # first row of each planned epoch in the stream, and the row after the last
        if stage.epochs is not None:
            self._end_row: int | None = self._rows_in(stage.epochs)
            self.total_steps = -(-self._end_row // loader.batch_size)
        else:
            assert stage.steps is not None, "exactly one of epochs and steps is set"
            self._end_row = None
            self.total_steps = stage.steps

    def rows_of(self, step: int) -> list[np.ndarray]:
        first = step * self._loader.batch_size
        last = first + self._loader.batch_size
        if self._end_row is not None:
            last = min(last, self._end_row)
        rows = []
        for row in range(first, last):
            epoch = self._epoch_of_row(row)
            rows.append(self._plan(epoch)[row - self._starts[epoch]])
        return rows

    def epoch_of(self, step: int) -> float:
        row = step * self._loader.batch_size
        if self._end_row is not None:
            row = min(row, self._end_row)
        epoch = self._epoch_of_row(max(row - 1, 0))  # the last row done: the epoch after it need not be planned
        return epoch + (row - self._starts[epoch]) / (self._starts[epoch + 1] - self._starts[epoch])

    def rows_per_epoch(self) -> int:
        self._epoch_of_row(0)
        return self._starts[1]

    def epoch_rows(self) -> list[np.ndarray]:
        return self._plan(0)

    def fill(self) -> float:
        tokens = self._loader.dataset.lengths_N[self.mixture.epoch(0)].sum()
        return float(tokens) / (self.rows_per_epoch() * self._loader.max_length)

    def _rows_in(self, epochs: float) -> int:
        whole, part = int(epochs), epochs - int(epochs)
        for epoch in range(whole + (part > 0)):
            self._plan(epoch)
        rows = self._starts[whole]
        return rows + (round(part * len(self._plan(whole))) if part else 0) or 1

    def _epoch_of_row(self, row: int) -> int:
        while row >= self._starts[-1]:
            self._plan(len(self._starts) - 1)
        return bisect.bisect_right(self._starts, row) - 1

    def _plan(self, epoch: int) -> list[np.ndarray]:
        """Rows of an epoch. The last plans are kept, two or as `_ROWS_KEPT` allows; the row counts of all are.

        A run of so many epochs needs the row counts of all at its start, and then plans none of a usual set again.
        """
        with self._lock:  # the thread that works ahead and the loop both ask, at times on two sides of an epoch's end
            plan = self._plans.pop(epoch, None)
            if plan is None:
                plan = self._make_plan(epoch)
                if epoch == len(self._starts) - 1:
                    self._starts.append(self._starts[-1] + len(plan))
            self._plans[epoch] = plan
            while len(self._plans) > 2 and sum(map(len, self._plans.values())) > _ROWS_KEPT:
                self._plans.pop(next(iter(self._plans)))
            return plan

    def _make_plan(self, epoch: int) -> list[np.ndarray]:
        # Each epoch has its own draw: the same neighbours in a row would never meet others otherwise.
        of_epoch = None if self._seed is None else np.random.SeedSequence([self._seed, epoch, self._number])
        chosen = self.mixture.epoch(epoch)
        if self._order == "random":
            return self._rows(chosen, None if of_epoch is None else int(of_epoch.generate_state(1)[0]))
        parts = _in_parts(chosen, self._loader.dataset, self._difficulty_N(), max_length=self._loader.max_length)
        seeds = [None] * len(parts) if of_epoch is None else of_epoch.generate_state(len(parts)).tolist()
        return [row for part, seed in zip(parts, seeds, strict=True) for row in self._rows(part, seed)]

    def _difficulty_N(self) -> np.ndarray:
        dataset = self._loader.dataset
        if self._order == "score":
            assert self._scores_N is not None, "the order 'score' comes with scores"
            return self._scores_N
        return dataset.lengths_N if self._order == "length" else dataset.answers_N

    def _rows(self, chosen: np.ndarray, seed: int | None) -> list[np.ndarray]:
        """The sequences `chosen` in rows, shuffled by the seed."""
        loader = self._loader
        if not loader.packing:
            order = chosen if seed is None else np.random.default_rng(seed).permutation(chosen)
            return [order[i : i + 1] for i in range(len(order))]
        rows = pack(
            loader.dataset.lengths_N[chosen],
            loader.dataset.trained_N[chosen],
            capacity=loader.max_length,
            predict_capacity=loader.predict_capacity,
            seed=seed,
        )
        return [chosen[row] for row in rows]


def _in_parts(
    chosen: np.ndarray, dataset: TokenizedSet, difficulty_N: np.ndarray, *, max_length: int
) -> list[np.ndarray]:
    """Easy before hard, in parts that are packed and shuffled apart: a row holds sequences of like difficulty."""
    lengths = dataset.lengths_N[chosen]
    rows = int(lengths.sum()) / max_length
    parts = int(np.clip(rows / _ROWS_IN_PART, 1, _MOST_PARTS))
    return np.array_split(chosen[np.lexsort((lengths, difficulty_N[chosen]))], parts)
