"""The shards of a stream, near or far, and the units that they are read in, dealt to the lanes of a batch.

In: paths (files, folders and globs, local or of any file system that fsspec knows), sizes, a seed. Out: a `Plan`, the
same on every host: which units each lane reads. Nothing is read but sizes and the footers of Parquet files.

A set of three shards over four lanes; part.jsonl.gz has no place to begin in but its start:

    a.jsonl    bytes 0-8, 8-16, 16-20      lane 0: a[8-16]             lane 1: b[group 0]
    b.parquet  row group 0                 lane 2: a[0-8], a[16-20]    lane 3: part.jsonl.gz
    part.jsonl.gz

With fewer units than lanes, lanes share one: of k lanes the j-th takes its rows j, j + k, j + 2k and so on.
"""

import concurrent.futures
import dataclasses
import hashlib
import heapq
import io
import itertools
import json
import pathlib
from collections.abc import Sequence
from typing import Any, BinaryIO, Literal

import numpy as np

from jax_sft.config import DataConfig
from jax_sft.data.conversation import Account, DataError
from jax_sft.data.source import (
    CLEANING,
    EXTENSIONS,
    IN_FOLDERS,
    MOST_SUMMARY_BYTES,
    READ,
    HubSet,
    Part,
    extension_of,
    files_of,
    first_line,
    is_summary,
    parquet_file,
)

LEAST_BYTES = 16 * 2**10  # smaller units would be more seeking than reading
UNITS_PER_LANE = 8  # wanted of files that can be cut, so that the lanes are about as long as each other
AT_ONCE = 16  # footers read side by side
FAR_BLOCK_BYTES = 2**20  # read ahead of a far file
UNREADABLE_SHARD = "a shard that cannot be read, or the rest of it (counted as one)"
UNREADABLE_LINE = "a line that cannot be read"


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file, here or far away; `source` reads it like a `pathlib.Path`."""

    url: str
    size: int | None  # bytes; None where the file system does not say

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """Its last part, with the extensions."""
        return self.url.partition("?")[0].rsplit("/", 1)[-1]

    def open(self, mode: Literal["rb"]) -> BinaryIO:
        """Its bytes, from any position."""
        if "://" not in self.url:
            return open(self.url, mode)
        files, path = _file_system(self.url)
        if self.url.startswith("memory://"):  # it hands out one stream, with one position, to all who ask
            return io.BytesIO(files.cat_file(path))
        return files.open(path, mode, block_size=FAR_BLOCK_BYTES)


@dataclasses.dataclass(frozen=True)
class Unit:
    """What is read in one go: the lines that begin in a range of bytes, a row group of a Parquet file, a whole file."""

    shard: Shard
    kind: Literal["lines", "group", "whole"]
    start: int = 0  # byte, or number of the row group
    stop: int = 0
    first_row: int = 0  # of a row group, in its file
    size: int = 0  # bytes, for balance


@dataclasses.dataclass(frozen=True)
class Piece:
    """Of a unit the rows `number`, `number + of`, `number + 2 of` and so on."""

    unit: int
    of: int = 1
    number: int = 0


@dataclasses.dataclass(frozen=True)
class Plan:
    """What each lane reads. `units[s]` are of set s, `pieces[s][lane]` its units in no order."""

    parts: tuple[Part, ...]
    units: tuple[tuple[Unit, ...], ...]
    pieces: tuple[tuple[tuple[Piece, ...], ...], ...]
    seed: int
    account: Account  # of shards that could not be read when the run began
    fingerprint: str  # of the units and their sizes; contents are not read

    @property
    def sources(self) -> tuple[str, ...]:
        """The source of each set's rows: its name, or "train"."""
        return tuple(part.name or "train" for part in self.parts)

    def order(self, of_set: int, lane: int, number: int) -> list[Piece]:
        """The pieces of a lane in the order of its pass `number`."""
        pieces = self.pieces[of_set][lane]
        rng = np.random.default_rng([self.seed, *self.sources[of_set].encode(), lane, number])
        return [pieces[i] for i in rng.permutation(len(pieces)).tolist()]

    def lines(self) -> list[str]:
        """What is streamed, for the log."""
        out = []
        for name, units, lanes in zip(self.sources, self.units, self.pieces, strict=True):
            size = sum(unit.size for unit in units)
            shards = len({unit.shard.url for unit in units})
            said = f"stream {name}: {size:,} bytes in {shards:,} shards, {len(units):,} units for {len(lanes):,} lanes"
            shared = max(piece.of for lane in lanes for piece in lane)
            if shared > 1:
                said += (
                    f"; up to {shared} lanes share a unit, and each reads all of it for its part: more shards, or "
                    "plain .jsonl, would be faster"
                )
            out.append(said)
        return out


def make_plan(config: DataConfig, parts: Sequence[Part], *, lanes: int, seed: int) -> Plan:
    """Find the shards of all parts, cut them into units, deal these to the lanes.

    Raises:
        DataError: a path cannot be found or read, an extension is unknown, a driver is not installed.
    """
    account = Account()
    units = []
    for part in parts:
        found = _cut(config, shards_of(part.paths), lanes, account)
        if not found:
            raise DataError(f"{', '.join(part.paths)}: no shard has a row; fill them, or take them out of the list")
        units.append(tuple(found))
    pieces = tuple(_dealt(of_set, lanes, np.random.default_rng([seed, i])) for i, of_set in enumerate(units))
    said = [[dataclasses.astuple(unit) for unit in of_set] for of_set in units]
    digest = hashlib.blake2b(json.dumps(said).encode(), digest_size=16).hexdigest()
    return Plan(tuple(parts), tuple(units), pieces, seed, account, digest)


def shards_of(paths: Sequence[str]) -> list[Shard]:
    """The shards of paths in order; the matches of a glob and the files of a folder sorted.

    Raises:
        DataError: a path is not there, gives no file, or needs a driver that is not installed.
    """
    found: list[Shard] = []
    for text in paths:
        if "://" in text:
            found += _far(text)
            continue
        for place in files_of([text]):
            if isinstance(place, HubSet):
                raise DataError(
                    f"{text}: a hub dataset is streamed by its files; write hf://datasets/{place.name}/**/*.parquet, "
                    "or as its files are called"
                )
            found.append(Shard(str(place), place.stat().st_size))
    for shard in found:
        extension, _ = extension_of(shard)
        if extension not in EXTENSIONS:
            raise DataError(f"{shard}: the extension {extension!r} is not one that is read; write the data as {READ}")
    return found


def _far(url: str) -> list[Shard]:
    """Shards of one path of a file system that fsspec knows."""
    import glob

    files, path = _file_system(url)
    try:
        if glob.has_magic(path) and not url.startswith(("http://", "https://")):
            known = files.glob(path, detail=True)
        elif not url.startswith(("http://", "https://")) and files.isdir(path):
            inside = {pathlib.PurePosixPath(name): info for name, info in files.find(path, detail=True).items()}
            cleaned = {at.parent for at in inside if at.name == CLEANING[0] and _was_cleaned(files, at.parent)}
            known = {
                str(at): info
                for at, info in inside.items()
                if extension_of(at)[0] in IN_FOLDERS and not (at.name in CLEANING and at.parent in cleaned)
            }
        else:
            return [Shard(url, files.info(path).get("size"))]
    except Exception as error:  # each file system raises its own kinds
        raise DataError(
            f"{url}: cannot be read ({_told(error)}); check the path, the network and your rights"
        ) from error
    shards = [Shard(files.unstrip_protocol(n), i.get("size")) for n, i in sorted(known.items()) if i["type"] == "file"]
    if not shards:
        raise DataError(f"{url}: no file is there that can be read; correct the path, or name the files")
    return shards


def _was_cleaned(files: Any, folder: pathlib.PurePath) -> bool:
    """As `source.was_cleaned`, of a folder that has a file of the summary's name."""
    try:
        return is_summary(files.cat_file(str(folder / CLEANING[0]), end=MOST_SUMMARY_BYTES))
    except OSError:
        return False


def _file_system(url: str) -> tuple[Any, str]:
    import fsspec  # local files need none of it
    from fsspec.registry import known_implementations

    protocol = url.partition("://")[0]
    try:
        return fsspec.url_to_fs(url)
    except ImportError as error:
        known = known_implementations[protocol]["class"].partition(".")[0]
        raise DataError(
            f"{url}: paths of {protocol}:// need the package {known}, which is not installed; pip install {known}"
        ) from error
    except ValueError as error:
        raise DataError(
            f"{url}: {first_line(error)}; name a file here, or one of gs://, s3://, hf://, https://"
        ) from error


def _cut(config: DataConfig, shards: list[Shard], lanes: int, account: Account) -> list[Unit]:
    """Units of the shards of one set, in order."""
    lines = [s.size or 0 for s in shards if extension_of(s) in ((".jsonl", False), (".txt", False))]
    wanted = max(LEAST_BYTES, sum(lines) // (UNITS_PER_LANE * lanes))
    step = min(config.stream.unit_bytes, wanted)

    def units_of(shard: Shard) -> list[Unit] | DataError:
        extension, is_gzipped = extension_of(shard)
        if extension in (".jsonl", ".txt") and not is_gzipped and shard.size is not None:
            count = -(-shard.size // step)  # even ones: a short last one might have no line
            ends = [shard.size * i // count for i in range(count + 1)] if count else []
            return [Unit(shard, "lines", a, b, size=b - a) for a, b in itertools.pairwise(ends)]
        if extension == ".parquet" and not is_gzipped:
            try:
                return _row_groups(shard)
            except DataError as error:
                return error
        return [Unit(shard, "whole", size=shard.size or 1)] if shard.size != 0 else []

    units: list[Unit] = []
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        for shard, found in zip(shards, pool.map(units_of, shards), strict=True):
            if not isinstance(found, DataError):
                units += found
                continue
            if config.stream.unreadable == "stop":
                raise found
            account.read += 1
            account.drop(UNREADABLE_SHARD, str(shard), str(found))
    return units


def _row_groups(shard: Shard) -> list[Unit]:
    units, row = [], 0
    try:
        with parquet_file(shard, False) as file:
            for i in range(file.metadata.num_row_groups):
                group = file.metadata.row_group(i)
                if group.num_rows:
                    units.append(Unit(shard, "group", i, i + 1, first_row=row, size=group.total_byte_size))
                row += group.num_rows
    except DataError:
        raise
    except Exception as error:  # of a far file system
        raise DataError(f"{shard}: cannot be read ({_told(error)}); fetch or write it again") from error
    return units


def _dealt(units: Sequence[Unit], lanes: int, rng: np.random.Generator) -> tuple[tuple[Piece, ...], ...]:
    """Pieces of each lane: about the same number of bytes for each."""
    order = rng.permutation(len(units)).tolist()
    dealt: list[list[Piece]] = [[] for _ in range(lanes)]
    if len(units) >= lanes:
        loads = [(0, lane) for lane in rng.permutation(lanes).tolist()]
        heapq.heapify(loads)
        for i in sorted(order, key=lambda i: -units[i].size):
            load, lane = heapq.heappop(loads)
            dealt[lane].append(Piece(i))
            heapq.heappush(loads, (load + units[i].size, lane))
        return tuple(map(tuple, dealt))
    shares = [1] * len(units)
    for _ in range(lanes - len(units)):  # one more lane to where each has most to read
        most = max(range(len(units)), key=lambda i: (units[i].size / shares[i], -i))
        shares[most] += 1
    pieces = [Piece(i, shares[i], number) for i in range(len(units)) for number in range(shares[i])]
    for lane, place in enumerate(rng.permutation(lanes).tolist()):
        dealt[lane].append(pieces[place])
    return tuple(map(tuple, dealt))


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
