"""The rows of a lane, pass after pass, from wherever it stopped.

In: a `Plan` and a position. Out: rows with their places, and the position behind each. A position in a set is three
integers: the pass, the unit in the order of that pass, and how far into the unit, in bytes of lines that no other lane
shares, else in rows.
"""

import itertools
import json
from collections.abc import Generator, Iterator

from jax_sft.data.conversation import DataError
from jax_sft.data.source import (
    Row,
    Tables,
    as_object,
    extension_of,
    json_list,
    lines_of,
    opened,
    parquet_file,
    parse_json,
    table,
    without_nulls,
)
from jax_sft.data.stream.shards import Plan, Shard, Unit

GROUP_ROWS = 64  # of a Parquet file at once: a lane holds no more
COUNT_BYTES = 2**20
NAMED = 3  # shards of a lane in a message

SetPosition = tuple[int, int, int]  # pass, unit, offset
Read = tuple[Row | DataError, str, int]  # a row or why a line holds none, its place, the offset behind it


class UnreadableError(DataError):
    """The rest of a shard cannot be read."""

    def __init__(self, shard: Shard, message: str) -> None:
        super().__init__(message)
        self.shard = shard


class LaneReader:
    """The rows of one set in one lane, without end; `position` is behind the last row given."""

    def __init__(self, plan: Plan, *, of_set: int, lane: int, position: SetPosition, tables: Tables) -> None:
        self.position = position
        self.is_first = False  # the last row given is the first of its unit
        self._plan, self._set, self._lane, self._tables = plan, of_set, lane, tables
        self._reads: Generator[Read, None, None] | None = None
        self._order: list = []
        self._rows_in_pass: int | None = None  # None: the pass was begun by another reader

    def next_row(self) -> tuple[Row | DataError, str]:
        """The next row and its place; or why a line holds none.

        Raises:
            UnreadableError: the rest of a shard cannot be read; the next call goes on behind it.
            DataError: a whole pass had no row.
        """
        while True:
            number, at, offset = self.position
            if self._reads is None:
                self._reads = self._open(number, at, offset)
                if self._reads is None:
                    continue
            try:
                row, where, after = next(self._reads)
            except StopIteration:
                self._leave_unit()
                continue
            except Exception as error:  # far file systems raise their own kinds
                shard = self._unit(at).shard
                self._leave_unit()
                said = str(error) if isinstance(error, DataError) else f"{shard}: cannot be read ({error!r})"
                raise UnreadableError(shard, said) from error
            self.is_first = offset == 0
            self.position = number, at, after
            if self._rows_in_pass is not None:
                self._rows_in_pass += 1
            return row, where

    def close(self) -> None:
        """Let go of the open shard."""
        if self._reads is not None:
            self._reads.close()
            self._reads = None

    def _unit(self, at: int) -> Unit:
        return self._plan.units[self._set][self._order[at].unit]

    def _shards(self) -> str:
        """The first shards of the lane, and how many more there are."""
        names = sorted({str(self._unit(at).shard) for at in range(len(self._order))})
        more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
        return ", ".join(names[:NAMED]) + more

    def _open(self, number: int, at: int, offset: int) -> Generator[Read, None, None] | None:
        """The rows of unit `at` in pass `number` from an offset on; None where the pass is at its end."""
        if not self._order:
            self._order = self._plan.order(self._set, self._lane, number)
            if at == offset == 0:
                self._rows_in_pass = 0
        if at < len(self._order):
            piece = self._order[at]
            return _rows_of_piece(self._unit(at), piece.of, piece.number, offset=offset, tables=self._tables)
        if self._rows_in_pass == 0:
            raise DataError(
                f"{self._plan.sources[self._set]}: lane {self._lane} of {len(self._plan.pieces[self._set])} has no row "
                f"that can be read in {self._shards()}; there are fewer than rows in a batch, or they are torn: lower "
                "train.batch_size, or set data.stream.on = False for a set this small"
            )
        self._order, self.position = [], (number + 1, 0, 0)
        return None

    def _leave_unit(self) -> None:
        number, at, _ = self.position
        self.close()
        self.position = number, at + 1, 0


def _rows_of_piece(unit: Unit, of: int, number: int, *, offset: int, tables: Tables) -> Generator[Read, None, None]:
    if unit.kind == "lines" and of == 1:
        yield from _lines_of_range(unit, offset)
        return
    reads: Iterator[tuple[Row | DataError, str]]
    if unit.kind == "lines":
        reads = ((row, where) for row, where, _ in _lines_of_range(unit, 0))
    elif unit.kind == "group":
        reads = _rows_of_group(unit)
    else:
        reads = _rows_of_whole(unit.shard, tables)
    for i, (row, where) in enumerate(reads):
        if i >= offset and i % of == number:
            yield row, where, i + 1


def _lines_of_range(unit: Unit, offset: int) -> Generator[Read, None, None]:
    """Rows of the lines that begin between `start` and `stop`, from `offset` bytes on; that is where a line begins."""
    shard = unit.shard
    is_text = extension_of(shard)[0] == ".txt"
    with opened(shard, is_gzipped=False) as stream:
        at = unit.start + offset
        if unit.start and not offset:  # the line that the byte before belongs to began before
            stream.seek(unit.start - 1)
            at = unit.start - 1 + len(stream.readline())
        else:
            stream.seek(at)
        while at < unit.stop:
            raw = stream.readline()
            if not raw:
                raise DataError(
                    f"{shard}: ends at byte {at}, but had {shard.size} when the run began; it was torn meanwhile: "
                    "fetch or write it again"
                )
            begins, at = at, at + len(raw)
            if raw.strip():
                yield (
                    _line(shard, raw.removeprefix(b"\xef\xbb\xbf" if not begins else b""), begins, is_text),
                    (f"{shard}@{begins}"),
                    at - unit.start,
                )


def _line(shard: Shard, raw: bytes, begins: int, is_text: bool) -> Row | DataError:
    try:
        text = raw.decode("utf-8").rstrip("\r\n")
        return {"text": text} if is_text else as_object(json.loads(text), f"{shard}@{begins}")
    except (ValueError, RecursionError) as error:  # count the lines only now, and say the same as of a file read whole
        number = _line_number(shard, begins)
        if isinstance(error, UnicodeDecodeError):
            return DataError(
                f"{shard}:{number}: byte {begins + error.start} (0x{raw[error.start]:02x}) is not UTF-8 "
                f"({error.reason}); write the file as UTF-8, for instance with iconv"
            )
        try:
            as_object(parse_json(raw.decode("utf-8").rstrip("\r\n"), shard, number), f"{shard}:{number}")
        except DataError as told:
            return told
        raise


def _line_number(shard: Shard, begins: int) -> int:
    """Which line of its shard begins at a byte, from 1."""
    number, left = 1, begins
    with opened(shard, is_gzipped=False) as stream:
        while left and (read := stream.read(min(left, COUNT_BYTES))):
            number += read.count(b"\n")
            left -= len(read)
    return number


def _rows_of_group(unit: Unit) -> Iterator[tuple[Row, str]]:
    number = itertools.count(unit.first_row)
    with parquet_file(unit.shard, False) as file:
        for batch in file.iter_batches(batch_size=GROUP_ROWS, row_groups=[unit.start]):
            for row in batch.to_pylist():
                yield without_nulls(row), f"{unit.shard}[{next(number)}]"


def _rows_of_whole(shard: Shard, tables: Tables) -> Iterator[tuple[Row | DataError, str]]:
    """Rows of a file that cannot be cut."""
    extension, is_gzipped = extension_of(shard)
    match extension:
        case ".json":
            yield from json_list(shard, is_gzipped)
        case ".parquet":
            with parquet_file(shard, is_gzipped) as file:
                rows = (r for batch in file.iter_batches(batch_size=GROUP_ROWS) for r in batch.to_pylist())
                yield from ((without_nulls(row), f"{shard}[{i}]") for i, row in enumerate(rows))
        case ".jsonl" | ".txt":
            for number, line in lines_of(shard, is_gzipped):
                if line.strip():
                    yield _row_of_line(shard, line.rstrip("\r\n"), number, extension), f"{shard}:{number}"
        case _:
            delimiter = "," if extension == ".csv" else "\t"
            yield from table(shard, is_gzipped, delimiter=delimiter, tables=tables)


def _row_of_line(shard: Shard, line: str, number: int, extension: str) -> Row | DataError:
    if extension == ".txt":
        return {"text": line}
    try:
        return as_object(parse_json(line, shard, number), f"{shard}:{number}")
    except DataError as error:
        return error
