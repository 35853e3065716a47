"""Blocks: the next conversations of a lane, tokenised, shuffled and packed with each other.

In: a lane, its position in each set, the proportion of the sets. Out: rows of sequences and the position behind them.
A block is a pure function of these, the config and the seed: which process makes it, and whether it was made before,
changes nothing. Only its last row is not full.
"""

import dataclasses
import math
from collections.abc import Sequence as Several

import numpy as np

from jax_sft.config import DataConfig
from jax_sft.data.chat import ChatTemplate, to_sequences
from jax_sft.data.conversation import Account, DataError, Sequence
from jax_sft.data.formats import conversation_of
from jax_sft.data.packing import pack
from jax_sft.data.quality.screen import RowRules
from jax_sft.data.rows import unnested
from jax_sft.data.source import Tables
from jax_sft.data.stream.reading import LaneReader, SetPosition, UnreadableError
from jax_sft.data.stream.shards import UNREADABLE_LINE, UNREADABLE_SHARD, Plan

GOLDEN = (math.sqrt(5) - 1) / 2  # spreads the beginnings of the lanes' proportions

Position = tuple[SetPosition, ...]  # in each set


@dataclasses.dataclass(frozen=True)
class Task:
    """Which block: of a lane, the `number`-th of a stage, from a position on."""

    lane: int
    stage: int
    number: int
    position: Position


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """Rows of a lane."""

    rows: list[list[Sequence]]
    after: Position  # behind its last conversation
    account: Account  # without torn shards, for other blocks meet them too
    torn: dict[str, str]  # shard -> why it, or the rest of it, cannot be read


class Maker:
    """Makes blocks; readers of lanes stay open where the last block ended.

    Args:
        shares: of each stage the share of each set, together 1.
        predicted: positions of a row that may be trained.
    """

    def __init__(
        self,
        plan: Plan,
        template: ChatTemplate,
        config: DataConfig,
        *,
        shares: Several[Several[float]],
        predicted: int,
    ) -> None:
        self._plan, self._template, self._config = plan, template, config
        self._shares, self._predicted = shares, predicted
        self._tables = Tables(has_header=config.header, has_quotes=config.quoted)
        self._rules = RowRules(config.quality)
        self._readers: dict[tuple[int, int], LaneReader] = {}

    def make(self, task: Task) -> Block:
        """The rows of a block.

        Raises:
            DataError: a shard cannot be read and the config does not say to skip it; of formats and templates; a set
                has nothing to train on.
        """
        account, torn, sequences, after = Account(), {}, [], []
        for of_set, (start, count) in enumerate(zip(task.position, self._counts(task), strict=True)):
            if not count:
                after.append(start)
                continue
            reader = self._reader(of_set, task.lane, start)
            sequences += self._take(reader, of_set, count, account, torn)
            after.append(reader.position)
        return Block(self._packed(sequences, task), tuple(after), account, torn)

    def close(self) -> None:
        """Let go of all shards."""
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()

    def _counts(self, task: Task) -> list[int]:
        """Conversations of each set: whole numbers whose sums over blocks follow the shares."""
        size, phase = self._config.stream.block, (task.lane * GOLDEN) % 1
        ends = [
            [math.floor(size * share * n + phase) for share in self._shares[task.stage]]
            for n in (task.number, task.number + 1)
        ]
        return [last - first for first, last in zip(*ends, strict=True)]

    def _reader(self, of_set: int, lane: int, position: SetPosition) -> LaneReader:
        reader = self._readers.get((of_set, lane))
        if reader is None or reader.position != position:
            if reader is not None:
                reader.close()
            reader = LaneReader(self._plan, of_set=of_set, lane=lane, position=position, tables=self._tables)
            self._readers[of_set, lane] = reader
        return reader

    def _take(
        self, reader: LaneReader, of_set: int, count: int, account: Account, torn: dict[str, str]
    ) -> list[Sequence]:
        """The sequences of the next `count` conversations that give any."""
        found: list[Sequence] = []
        kept, first_pass = 0, reader.position[0]
        while kept < count:
            for sequences in self._next(reader, of_set, account, torn):
                found += sequences
                kept += bool(sequences)
            if not kept and reader.position[0] > first_pass + 1:
                reasons = sorted(account.dropped.items(), key=lambda item: -item[1])
                said = [f"{n} dropped: {why} (first: {account.examples[why][0]})" for why, n in reasons[:5]]
                said += [f"{len(torn)} dropped: {UNREADABLE_SHARD} (first: {next(iter(torn))})"] if torn else []
                raise DataError(
                    f"{self._plan.sources[of_set]}: a whole pass of a lane has nothing that can be trained on; "
                    f"{'; '.join(said)}; "
                    "correct the data, or data.format, data.columns, data.train_on or data.max_length"
                )
        return found

    def _next(self, reader: LaneReader, of_set: int, account: Account, torn: dict[str, str]) -> list[list[Sequence]]:
        """The sequences of each conversation of the next row."""
        skips = self._config.stream.unreadable == "skip"
        try:
            row, where = reader.next_row()
        except UnreadableError as error:
            if not skips:
                raise DataError(str(error)) from error  # a plain one crosses from process to process
            torn.setdefault(str(error.shard), str(error))
            return []
        if isinstance(row, DataError):
            if not skips:
                raise row
            account.read += 1
            account.drop(UNREADABLE_LINE, where, str(row))
            return []
        part, found = self._plan.parts[of_set], []
        for inner, place in unnested(row, where):
            conversation = conversation_of(inner, place, self._config, part, account, is_first=reader.is_first)
            conversation = None if conversation is None else self._rules.kept(conversation, account)
            if conversation is not None:
                sequences = to_sequences(conversation, self._template, self._config, account)
                found.append(self._that_fit(sequences, account))
        return found

    def _that_fit(self, sequences: list[Sequence], account: Account) -> list[Sequence]:
        """Those of a conversation that are not trained on more positions than a row has room for."""
        fit = [s for s in sequences if np.count_nonzero(s.weights_T) <= self._predicted]
        if len(fit) < len(sequences):
            reason = f"trained on more than data.stream.predicted = {self._predicted} positions"
            if fit:
                account.alter(f"answers left out, {reason}", sequences[0].id)
            else:
                account.kept -= 1
                account.drop(reason, sequences[0].id)
        return fit

    def _packed(self, sequences: list[Sequence], task: Task) -> list[list[Sequence]]:
        """Rows in an order drawn for this block."""
        if not sequences:
            return []
        seed = np.random.SeedSequence([self._plan.seed, task.lane, task.stage, task.number]).generate_state(1)
        if not self._config.packing:
            order = np.random.default_rng(seed).permutation(len(sequences))
            return [[sequences[i]] for i in order.tolist()]
        rows = pack(
            np.asarray([len(s.tokens_T) for s in sequences]),
            np.asarray([np.count_nonzero(s.weights_T) for s in sequences]),
            capacity=self._config.max_length,
            predict_capacity=self._predicted,
            seed=int(seed[0]),
        )
        return [[sequences[i] for i in row.tolist()] for row in rows]
