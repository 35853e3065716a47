"""Batches by step number: epochs, packing, shuffling, and a thread that works ahead.

In: a tokenised set. Out: numpy `Batch`es. The rows of all epochs form one stream; batch s is its rows
[s * batch_size, (s + 1) * batch_size). So the step number is the whole state: resume is exact, on any number of hosts,
and nothing is dropped at the end of an epoch (only the last batch of the run is filled up with empty rows).
"""

import bisect
import queue
import threading
from collections.abc import Iterator

import numpy as np

from jax_sft.batch import Batch
from jax_sft.data.conversation import Sequence
from jax_sft.data.dataset import TokenizedSet
from jax_sft.data.packing import fill_rows, pack, predict_capacity


class Loader:
    """Random access to the batches of a run.

    Exactly one of `epochs` (may be a fraction) and `steps` bounds the run.
    """

    def __init__(
        self,
        dataset: TokenizedSet,
        *,
        batch_size: int,
        max_length: int,
        packing: bool,
        sources: tuple[str, ...],
        seed: int | None,
        epochs: float | None = None,
        steps: int | None = None,
    ) -> None:
        if not len(dataset):
            raise ValueError("the tokenised set is empty: there is no batch to make of it")
        self.dataset = dataset
        self.batch_size = batch_size
        self.max_length = max_length
        self.packing = packing
        self.seed = seed
        self.predict_capacity = predict_capacity(
            dataset.lengths_N, dataset.trained_N, max_length=max_length, packing=packing
        )
        self._source_index = [sources.index(s) for s in dataset.sources]
        self._lock = threading.Lock()
        self._plans: dict[int, list[np.ndarray]] = {}
        self._starts = [0]  # first row of each planned epoch in the stream, and the row after the last
        if epochs is not None:
            self._end_row: int | None = self._rows_in(epochs)
            self.total_steps = -(-self._end_row // batch_size)
        else:
            assert steps is not None, "exactly one of epochs and steps is set"
            self._end_row = None
            self.total_steps = steps

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

    def epoch_of(self, step: int) -> float:
        """Passes over the set that are done before `step`."""
        row = step * self.batch_size
        if self._end_row is not None:
            row = min(row, self._end_row)
        epoch = self._epoch_of_row(max(row - 1, 0))  # the last row done: the epoch after it need not be planned
        return epoch + (row - self._starts[epoch]) / (self._starts[epoch + 1] - self._starts[epoch])

    def rows_per_epoch(self) -> int:
        """Packed rows of the first epoch (later epochs differ by a row or two)."""
        self._epoch_of_row(0)
        return self._starts[1]

    def fill(self) -> float:
        """Share of the positions of the first epoch's rows that hold a token."""
        return float(self.dataset.lengths_N.sum()) / (self.rows_per_epoch() * self.max_length)

    def prefetch(
        self, start_step: int, stop_step: int, *, rows: np.ndarray | None = None, ahead: int = 2
    ) -> Iterator[tuple[int, Batch]]:
        """Steps and batches in order, `ahead` of them built in a thread; its errors come out here."""
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
                    put((step, self.batch(step, rows)))
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

    def _sequence(self, i: int) -> tuple[Sequence, int]:
        return self.dataset[i], self._source_index[self.dataset.source_ids_N[i]]

    def _rows_of(self, step: int) -> list[np.ndarray]:
        if not 0 <= step < self.total_steps:
            raise IndexError(f"step {step} is outside the run of {self.total_steps} steps")
        first = step * self.batch_size
        last = first + self.batch_size
        if self._end_row is not None:
            last = min(last, self._end_row)
        rows = []
        for row in range(first, last):
            epoch = self._epoch_of_row(row)
            rows.append(self._plan(epoch)[row - self._starts[epoch]])
        return rows

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
        """Rows of an epoch. Only the two plans asked for last are kept; the row counts of all are."""
        with self._lock:  # the thread that works ahead and the loop both ask, at times on two sides of an epoch's end
            plan = self._plans.pop(epoch, None)
            if plan is None:
                plan = self._make_plan(epoch)
                if epoch == len(self._starts) - 1:
                    self._starts.append(self._starts[-1] + len(plan))
            self._plans[epoch] = plan
            while len(self._plans) > 2:
                self._plans.pop(next(iter(self._plans)))
            return plan

    def _make_plan(self, epoch: int) -> list[np.ndarray]:
        # Each epoch has its own draw: the same neighbours in a row would never meet others otherwise.
        seed = None if self.seed is None else int(np.random.SeedSequence([self.seed, epoch]).generate_state(1)[0])
        if self.packing:
            return pack(
                self.dataset.lengths_N,
                self.dataset.trained_N,
                capacity=self.max_length,
                predict_capacity=self.predict_capacity,
                seed=seed,
            )
        count = len(self.dataset)
        order = np.arange(count) if seed is None else np.random.default_rng(seed).permutation(count)
        return [order[i : i + 1] for i in range(count)]
