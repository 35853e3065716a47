"""Batches of a stream by step number, made ahead, and the few integers that a checkpoint keeps of them.

In: a `Plan`, the steps of each stage. Out: numpy `Batch`es in order, and after each step the state of the lanes:

    a lane: blocks of its stage that are done, rows given of the next block, and in each set where that block begins:
            pass, unit, offset

The state of all lanes makes a run go on exactly, on any number of hosts. Letters: B rows of a batch, which are lanes.
"""

import collections
import concurrent.futures
import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol

import numpy as np

from jax_sft.batch import Batch
from jax_sft.config import DataConfig
from jax_sft.data import conversation
from jax_sft.data.chat import ChatTemplate
from jax_sft.data.conversation import Account, DataError
from jax_sft.data.loader import worked_ahead
from jax_sft.data.packing import fill_rows
from jax_sft.data.stream.blocks import Block, Maker, Task
from jax_sft.data.stream.shards import UNREADABLE_SHARD, Plan
from jax_sft.data.workers import started

_KEPT_STEPS = 64  # whose ids and states are remembered: more than are made ahead

_log = logging.getLogger(__name__)


class StreamLoader:
    """The batches of a run; each step once, in order."""

    def __init__(
        self,
        plan: Plan,
        template: ChatTemplate,
        config: DataConfig,
        *,
        batch_size: int,
        sources: tuple[str, ...],
        steps: Sequence[int],
        shares: Sequence[Sequence[float]],
    ) -> None:
        self.plan = plan
        self.batch_size = batch_size
        self.max_length = config.max_length
        self.packing = config.packing
        self.sources = sources
        self.predict_capacity = min(config.stream.predicted or config.max_length, config.max_length)
        self.stage_ends = tuple(np.cumsum(steps).tolist())
        self.total_steps = self.stage_ends[-1]
        self.account = plan.account + Account()  # of the blocks that this start used, on this host
        self._torn: set[str] = set()  # shards in it that could not be read
        self._workers = config.workers or 0  # unasked, blocks are made by the thread that works ahead
        self._arguments = (plan, template, config, tuple(map(tuple, shares)), self.predict_capacity)
        self._shares = shares
        self._start = np.zeros((batch_size, 2 + 3 * len(plan.parts)), np.int64)
        self._given: collections.OrderedDict[int, _Given] = collections.OrderedDict()

    def go_on_from(self, states: Sequence[Sequence[int]]) -> None:
        """Begin where a checkpoint ended: its states, [lane][integer], of all lanes."""
        found = np.asarray(states, np.int64)
        if found.shape != self._start.shape:
            raise ValueError(f"the checkpoint knows {found.shape} integers of the stream, not {self._start.shape}")
        self._start = found

    def states_after(self, done: int, rows: np.ndarray) -> np.ndarray:
        """The states of the lanes `rows` when `done` steps are done, [row, integer]."""
        given = self._given.get(done - 1)
        return self._start[rows] if given is None else given.states

    def batch(self, step: int, rows: np.ndarray | None = None) -> Batch:
        """A batch without rows, for its shapes; those with rows come from `prefetch` alone."""
        del step
        if rows is None or len(rows):
            raise ValueError("the batches of a stream come in order; ask prefetch for them")
        return self._filled([])

    def lengths(self, step: int) -> np.ndarray:
        """Lengths of the sequences in the batch of a step; this host's rows stand for those of the others."""
        given = self._given[step]
        return np.tile(given.lengths, max(1, round(self.batch_size / max(1, len(given.states)))))

    def ids(self, step: int) -> list[str]:
        """Ids of the conversations in this host's rows of the batch of a step."""
        return self._given[step].ids

    def stage_of(self, step: int) -> int:
        """The stage that a step belongs to; of the step after the last, the last."""
        return min(int(np.searchsorted(self.stage_ends, step, side="right")), len(self.stage_ends) - 1)

    def epoch_of(self, step: int) -> float:
        """Passes of this host's lanes before `step`: about, for only whole units count; the mean over the sets."""
        given = self._given.get(step - 1)
        if given is None:
            return 0.0
        passes = given.states[:, 2::3].astype(float)
        for row, lane in enumerate(given.lanes):
            for of_set in range(len(self.plan.parts)):
                passes[row, of_set] += given.states[row, 3 + 3 * of_set] / len(self.plan.pieces[of_set][lane])
        return float(passes.mean())

    def mixture_lines(self) -> list[str]:
        """What is streamed, and what each stage draws of the sets, for the log."""
        lines = self.plan.lines()
        for number, (shares, end) in enumerate(zip(self._shares, self.stage_ends, strict=True)):
            steps = end - (self.stage_ends[number - 1] if number else 0)
            place = f"stage {number + 1}: {steps:,} steps" if len(self.stage_ends) > 1 else ""
            drawn = ", ".join(f"{x:.1%} of {name}" for name, x in zip(self.plan.sources, shares, strict=True))
            said = [place, f"a block draws {drawn}" if len(shares) > 1 else ""]
            lines += [": ".join(filter(None, said))] if any(said) else []
        return lines

    def prefetch(
        self, start_step: int, stop_step: int, *, rows: np.ndarray | None = None, ahead: int = 2
    ) -> Iterator[tuple[int, Batch]]:
        """Steps and batches in order, of this host's `rows`; blocks are made ahead by processes, batches by a thread.

        Raises:
            DataError: of the data; a process died.
        """
        lanes_of = np.arange(self.batch_size) if rows is None else rows
        with _makers(self._workers, self._arguments) as make:
            lanes = [_Lane(int(r), self._start[r].tolist(), make, self._count, self.stage_of(max(start_step - 1, 0)))
                     for r in lanes_of]  # fmt: skip

            def next_batch(step: int) -> Batch:
                if step in self.stage_ends[:-1]:
                    self._end_stage(step, lanes)
                given = [lane.next_row() for lane in lanes]
                self._remember(step, lanes_of, given, np.asarray([lane.state() for lane in lanes], np.int64))
                return self._filled(given)

            for lane in lanes:
                lane.begin()
            yield from worked_ahead(next_batch, start_step, stop_step, ahead=ahead)

    def first_blocks(self) -> Iterator[Block]:
        """The first block of each lane."""
        with _makers(self._workers, self._arguments) as make:
            position = ((0, 0, 0),) * len(self.plan.parts)
            for made in [make(Task(lane, 0, 0, position)) for lane in range(self.batch_size)]:
                block = made.result()
                self._count(block)
                yield block

    def _count(self, block: Block) -> None:
        """Add what became of a block's rows; a shard counts once, though lanes share it and passes come back to it."""
        self.account.merge(block.account)
        for shard, why in block.torn.items():
            if shard not in self._torn:
                self._torn.add(shard)
                self.account.read += 1
                self.account.drop(UNREADABLE_SHARD, shard, why)

    def _end_stage(self, step: int, lanes: "list[_Lane]") -> None:
        left = sum(lane.end_stage() for lane in lanes)
        _log.info("step %d: %d packed rows of the blocks of the last stage are left out", step, left)

    def _remember(
        self, step: int, lanes: np.ndarray, given: list[list[conversation.Sequence]], states: np.ndarray
    ) -> None:
        lengths = np.asarray([len(s.tokens_T) for row in given for s in row], np.int64)
        self._given[step] = _Given(lanes, states, lengths, [s.id for row in given for s in row])
        while len(self._given) > _KEPT_STEPS:
            self._given.popitem(last=False)

    def _filled(self, given: list[list[conversation.Sequence]]) -> Batch:
        return fill_rows(
            [[(s, self.sources.index(s.source)) for s in row] for row in given],
            length=self.max_length,
            predict_capacity=self.predict_capacity,
            num_rows=len(given),
        )


class _Given:
    """What is remembered of a step."""

    def __init__(self, lanes: np.ndarray, states: np.ndarray, lengths: np.ndarray, ids: list[str]) -> None:
        self.lanes, self.states, self.lengths, self.ids = lanes, states, lengths, ids


class _Later(Protocol):
    """A block that is being made, or will be when it is asked for."""

    def result(self) -> Block: ...

    def cancel(self) -> Any: ...


class _OnDemand:
    """A block that is made when it is asked for, in this process."""

    def __init__(self, maker: Maker, task: Task) -> None:
        self._maker, self._task = maker, task

    def result(self) -> Block:
        return self._maker.make(self._task)

    def cancel(self) -> None:
        """There is nothing to stop."""


class _Lane:
    """The rows of a lane, one after the other; the next block is made while one is used up."""

    def __init__(
        self, lane: int, state: list[int], make: Callable[[Task], _Later], count: Callable[[Block], None], stage: int
    ) -> None:
        self._lane, self._make, self._count = lane, make, count
        self._stage, self._number, self._rows_given = stage, state[0], state[1]
        self._position = tuple(zip(*[iter(state[2:])] * 3, strict=True))
        self._next: _Later | None = None  # the current block, until it is here; then the one after it
        self._block: Block | None = None

    def begin(self) -> None:
        """Have the first block made."""
        self._next = self._make(self._task())

    def state(self) -> list[int]:
        """What a new one needs to go on from here."""
        return [self._number, self._rows_given, *(x for in_set in self._position for x in in_set)]

    def next_row(self) -> list[conversation.Sequence]:
        """The sequences of the next row."""
        while self._rows_given >= len(self._current().rows):
            self._position = self._current().after
            self._number, self._rows_given, self._block = self._number + 1, 0, None
        row = self._current().rows[self._rows_given]
        self._rows_given += 1
        return row

    def end_stage(self) -> int:
        """Go on behind the current block, with the next stage's sets. Returns how many rows of it are left out."""
        block = self._current()
        left = len(block.rows) - self._rows_given
        assert self._next is not None
        self._next.cancel()
        self._position, self._stage, self._number, self._rows_given = block.after, self._stage + 1, 0, 0
        self._block = None
        self.begin()
        return left

    def _current(self) -> Block:
        if self._block is None:
            assert self._next is not None
            self._block = self._next.result()
            self._count(self._block)
            self._next = self._make(Task(self._lane, self._stage, self._number + 1, self._block.after))
        return self._block

    def _task(self) -> Task:
        return Task(self._lane, self._stage, self._number, self._position)


@contextlib.contextmanager
def _makers(workers: int, arguments: tuple[Any, ...]) -> Iterator[Callable[[Task], _Later]]:
    """How to have a block made: by processes, each with lanes of its own, or by this one when it is asked for."""
    if not workers:
        with contextlib.closing(_maker(*arguments)) as maker:
            yield lambda task: _OnDemand(maker, task)
        return
    pools = [started(_set_up, *arguments) for _ in range(workers)]
    try:
        yield lambda task: _Made(pools[task.lane % workers].submit(_work, task), workers)
    finally:
        for pool in pools:
            pool.shutdown(wait=False, cancel_futures=True)
        for pool in pools:
            pool.shutdown(wait=True)


class _Made:
    """A block that a process makes."""

    def __init__(self, future: concurrent.futures.Future[Block], workers: int) -> None:
        self._future, self._workers = future, workers

    def result(self) -> Block:
        try:
            return self._future.result()
        except BrokenProcessPool as error:
            raise DataError(
                f"data.workers = {self._workers}: a worker died while it made a block, for lack of memory perhaps; set "
                "a smaller number, or a smaller data.stream.block"
            ) from error

    def cancel(self) -> None:
        self._future.cancel()


_mine: Maker  # of a worker, set when it starts


def _maker(plan: Plan, template: ChatTemplate, config: DataConfig, shares: Any, predicted: int) -> Maker:
    return Maker(plan, template, config, shares=shares, predicted=predicted)


def _set_up(*arguments: Any) -> None:
    global _mine
    _mine = _maker(*arguments)


def _work(task: Task) -> Block:
    return _mine.make(task)
