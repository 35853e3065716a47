"""Rows out of files, folders, globs and hub datasets, each with the place it was read at.

In: what `data.train` says. Out: plain dicts, one by one, with "file:line" or "file[row]". JSON lines, Parquet,
tables and lines of text are streamed; a JSON list is parsed as a whole. Everything that cannot be read is a `DataError`
that says where, what was found and one way out: a file is read to its end, or the run stops.
"""

import codecs
import contextlib
import csv
import dataclasses
import difflib
import glob
import gzip
import io
import json
import os
import pathlib
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from jax_sft.config import DataConfig, SetConfig
from jax_sft.data.conversation import DataError

EXTENSIONS = (".json", ".jsonl", ".parquet", ".csv", ".tsv", ".txt")
IN_FOLDERS = EXTENSIONS[:-1]  # a .txt of a folder may as well be a licence: it is read where it is named
CLEANING = ("clean.json", "dropped.jsonl", "changed.jsonl")  # what `--clean` tells of a set, where the first lies
CLEANED_BY = "jax-sft data --clean"
MOST_SUMMARY_BYTES = 2**20
READ = ", ".join(EXTENSIONS) + " (each also .gz)"
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(:[\w.-]+)?")
PARQUET_ROWS_AT_ONCE = 1024
PARQUET_BUFFER_BYTES = 2**20  # of a column; 0 would read all of a row group's column at once
SHOWN_CHARACTERS = 60  # of a line that is broken

Row = dict[str, Any]
Readable = Any  # a pathlib.Path, or what has its `name` and `open`: a shard of a stream


@dataclasses.dataclass(frozen=True)
class HubSet:
    """A dataset on the hub, written `org/name` or `org/name:config`."""

    name: str
    config: str | None = None

    def __str__(self) -> str:
        return f"{self.name}:{self.config}" if self.config else self.name


@dataclasses.dataclass(frozen=True)
class Tables:
    """How tables (CSV, TSV) are written."""

    has_header: bool = True  # without one, columns are called "0", "1" and so on
    has_quotes: bool = True  # without them, a quote is a letter, and no field holds a separator or a newline


@dataclasses.dataclass(frozen=True)
class Part:
    """Files that belong together: a named set of a mixture, or all there is."""

    paths: tuple[str, ...]
    name: str | None = None  # the source of its rows; None: what a row says, or else its file
    loss_weight: float = 1.0  # times the weight of each of its tokens
    template_args: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # for the chat template
    holdout: float = 0.0  # this share of its prompts is held out,
    takes_held_out: bool = False  # and they are what this part is of, or the others


def training_parts(config: DataConfig) -> tuple[Part, ...]:
    """What is trained on, without what is held out."""
    return tuple(dataclasses.replace(p, holdout=config.holdout) for p in parts_of(config.sets or config.train))


def validation_parts(config: DataConfig) -> tuple[Part, ...]:
    """What is measured: files of their own, sets by name, and what is held out of the training files."""
    return tuple(part for parts in validation_groups(config).values() for part in parts)


def validation_groups(config: DataConfig) -> dict[str, tuple[Part, ...]]:
    """The same, by what they are called where each is told by itself."""
    groups = {"validation": parts_of(config.validation)} if config.validation else {}
    groups |= {f"validation, {name}": (Part(paths, name),) for name, paths in config.validation_sets.items()}
    if config.holdout:
        held_out = (dataclasses.replace(part, takes_held_out=True) for part in training_parts(config))
        groups["validation, held out"] = tuple(held_out)
    return groups


def parts_of(what: Sequence[str] | Mapping[str, SetConfig]) -> tuple[Part, ...]:
    """Paths as one part; the sets of a mixture as one each."""
    if isinstance(what, Mapping):
        return tuple(Part(of.paths, name, of.loss_weight, of.template_args) for name, of in what.items())
    return (Part(tuple(what)),)


def files_of(paths: Sequence[str]) -> list[pathlib.Path | HubSet]:
    """Local files and hub datasets, in the order of `paths`; the matches of a glob and the files of a folder sorted.

    A folder gives every file below it of `IN_FOLDERS`, but hidden ones; neither a folder nor a glob gives what
    `--clean` tells of a set. A file named twice is there twice.

    Raises:
        DataError: a path is neither there nor a hub id, a glob or a folder gives no file, an extension is unknown.
    """
    found: list[pathlib.Path | HubSet] = []
    for text in paths:
        path = pathlib.Path(text).expanduser()
        if path.is_dir():
            inside = [
                p
                for p in path.rglob("*")
                if p.is_file()
                and _is_read(p, IN_FOLDERS)
                and not _is_hidden(p.relative_to(path))
                and not is_of_cleaning(p.parent, p.name)
            ]
            if not inside:
                raise DataError(
                    f"{text}: the folder has no file that is read; put {', '.join(IN_FOLDERS)} (each also .gz) "
                    "into it, or name another"
                )
            found += sorted(inside)
        elif path.exists():
            found.append(path)
        elif glob.has_magic(text):
            matches = [pathlib.Path(m) for m in sorted(glob.glob(str(path), recursive=True)) if os.path.isfile(m)]
            matches = [m for m in matches if not is_of_cleaning(m.parent, m.name)]
            if not matches:
                raise DataError(f"{text}: no file matches this pattern{_near(path)}; correct it, or name the files")
            found += matches
        elif HUB_ID.fullmatch(text) and not _is_read(path):
            name, _, config = text.partition(":")
            found.append(HubSet(name, config or None))
        elif "://" in text:
            raise DataError(
                f"{text}: is no local file or folder; shards far away are read by data.stream.on = True, or copy the "
                "file here"
            )
        else:
            raise DataError(f"{text}: no such file or folder{_near(path)}; correct the path")
    for place in found:
        if isinstance(place, pathlib.Path):
            extension, _ = extension_of(place)
            if extension not in EXTENSIONS:
                raise DataError(
                    f"{place}: the extension {extension!r} is not one that is read; write the data as {READ}"
                )
    return found


def is_of_cleaning(folder: pathlib.Path, name: str) -> bool:
    """Whether a file is what `--clean` tells of the set beside it, not a part of the set."""
    return name in CLEANING and was_cleaned(folder)


def was_cleaned(folder: pathlib.Path) -> bool:
    """Whether `--clean` wrote a folder: its summary says so. Others may have a file of that name."""
    try:
        with open(folder / CLEANING[0], "rb") as file:
            return is_summary(file.read(MOST_SUMMARY_BYTES))
    except OSError:
        return False


def is_summary(text: bytes) -> bool:
    """Whether a file of the summary's name holds what `--clean` writes there."""
    try:
        return json.loads(text)["made_by"] == CLEANED_BY
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def stem_of(place: pathlib.Path | HubSet) -> str:
    """A file's name without its extensions, a hub dataset's name: the source of rows that do not name their own."""
    if isinstance(place, HubSet):
        return str(place)
    return pathlib.PurePath(place.stem if extension_of(place)[1] else place.name).stem


def read_rows(paths: Sequence[str], *, split: str, tables: Tables = Tables()) -> Iterator[tuple[Row, str]]:
    """Rows of all `paths` in order, each with its place: "file:line" (from 1), or "file[row]" (from 0).

    `split` is of hub datasets.

    Raises:
        DataError: something cannot be found or read, is not made of objects, or has no rows.
    """
    for place in files_of(paths):
        count = 0
        for row, where in _rows_of(place, split, tables):
            count += 1
            yield row, where
        if not count:
            raise DataError(f"{place}: it has no rows; fill it, or take it out of the list")


def count_rows(paths: Sequence[str], *, split: str) -> int:
    """About how many rows `read_rows` will give, for a progress bar: lines are counted, not parsed."""
    count = 0
    for place in files_of(paths):
        if isinstance(place, HubSet):
            count += len(load_hub(place, split))
            continue
        extension, is_gzipped = extension_of(place)
        if extension == ".json":
            count += sum(1 for _ in json_list(place, is_gzipped))
        elif extension == ".parquet":
            with parquet_file(place, is_gzipped) as file:
                count += file.metadata.num_rows
        else:
            with opened(place, is_gzipped=is_gzipped) as stream:
                count += sum(1 for _ in stream)
    return count


@contextlib.contextmanager
def opened(path: Readable, *, is_gzipped: bool) -> Iterator[BinaryIO]:
    """The bytes of a file; what goes wrong while they are read comes out as a `DataError`."""
    try:
        with (
            open(path, "rb") if isinstance(path, pathlib.Path) else path.open("rb") as stream,
            _unpacked(stream) if is_gzipped else contextlib.nullcontext(stream) as unpacked,
        ):
            yield unpacked
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path}: cannot be unpacked to its end ({error}); the file is torn or not gzip: fetch or write it again"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); check the file and its rights") from error


def _unpacked(stream: BinaryIO) -> BinaryIO:
    return gzip.GzipFile(fileobj=stream)  # type: ignore[return-value]  it reads like one


def kind_of(value: Any) -> str:
    """What a value of the data is, for a message: "a list", "null"."""
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    kinds |= {int: "a number", float: "a number"}
    return kinds.get(type(value), f"a {type(value).__name__}")


def load_hub(place: HubSet, split: str) -> Any:
    """A hub dataset through `datasets`, downloaded or from its cache.

    Raises:
        DataError: the hub, the dataset, its config or its split cannot be reached.
    """
    import datasets  # a second to import, and local files need none of it

    try:
        return datasets.load_dataset(place.name, place.config, split=split)
    except Exception as error:  # it raises a dozen kinds: of the network, of the hub, of the files
        raise DataError(
            f"{place}: no local file or folder has this name{_near(pathlib.Path(place.name))}, and as a hub dataset "
            f"(split {split!r}) it cannot be loaded: {first_line(error)}; check the name, data.split and the network"
        ) from error


def _rows_of(place: pathlib.Path | HubSet, split: str, tables: Tables) -> Iterator[tuple[Row, str]]:
    if isinstance(place, HubSet):
        return ((without_nulls(row), f"{place}/{split}[{i}]") for i, row in enumerate(load_hub(place, split)))
    extension, is_gzipped = extension_of(place)
    match extension:
        case ".jsonl":
            return _json_lines(place, is_gzipped)
        case ".json":
            return json_list(place, is_gzipped)
        case ".parquet":
            return _parquet(place, is_gzipped)
        case ".txt":
            return _texts(place, is_gzipped)
        case _:
            return table(place, is_gzipped, delimiter="," if extension == ".csv" else "\t", tables=tables)


def _texts(path: Readable, is_gzipped: bool) -> Iterator[tuple[Row, str]]:
    """A text a line; those of blanks alone are none."""
    for number, line in lines_of(path, is_gzipped):
        if line.strip():
            yield {"text": line.rstrip("\r\n")}, f"{path}:{number}"


def _json_lines(path: Readable, is_gzipped: bool) -> Iterator[tuple[Row, str]]:
    for number, line in lines_of(path, is_gzipped):
        if line.strip():
            where = f"{path}:{number}"
            yield as_object(parse_json(line.rstrip("\r\n"), path, number), where), where


def json_list(path: Readable, is_gzipped: bool) -> Iterator[tuple[Row, str]]:
    """The objects of a list, or of the list `data` of an object; all of it is in memory."""
    text = "".join(line for _, line in lines_of(path, is_gzipped))
    if not text.strip():
        return
    rows = parse_json(text, path, 1)
    if isinstance(rows, dict) and isinstance(rows.get("data"), list):
        rows = rows["data"]
    if not isinstance(rows, list):
        raise DataError(
            f'{path}: holds {kind_of(rows)}, not a list of objects or {{"data": [...]}}; write it so, or as .jsonl'
        )
    for i, row in enumerate(rows):
        yield as_object(row, f"{path}[{i}]"), f"{path}[{i}]"


def _parquet(path: Readable, is_gzipped: bool) -> Iterator[tuple[Row, str]]:
    number = 0
    with parquet_file(path, is_gzipped) as file:
        for batch in file.iter_batches(batch_size=PARQUET_ROWS_AT_ONCE):
            for row in batch.to_pylist():
                yield without_nulls(row), f"{path}[{number}]"
                number += 1


@contextlib.contextmanager
def parquet_file(path: Readable, is_gzipped: bool) -> Iterator[Any]:
    """A `pyarrow.parquet.ParquetFile`; what goes wrong while it is open comes out as a `DataError`."""
    import pyarrow  # half a second to import, and JSON needs none of it
    import pyarrow.parquet

    with opened(path, is_gzipped=is_gzipped) as stream:
        try:
            # Its index is at the end, and gzip would unpack all before it again and again.
            place = io.BytesIO(stream.read()) if is_gzipped else stream
            yield pyarrow.parquet.ParquetFile(place, buffer_size=PARQUET_BUFFER_BYTES)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(
                f"{path}: cannot be read as Parquet ({first_line(error)}); "
                "the file is torn or of another kind: fetch or write it again"
            ) from error


def table(path: Readable, is_gzipped: bool, *, delimiter: str, tables: Tables) -> Iterator[tuple[Row, str]]:
    """The rows of a table by the names in its header."""
    csv.field_size_limit(2**31 - 1)  # 128 KiB otherwise, and a conversation may be longer
    # Strict: a stray quote would swallow the rows up to the next one, and nobody would know.
    quoting = csv.QUOTE_MINIMAL if tables.has_quotes else csv.QUOTE_NONE
    lines = (line for _, line in lines_of(path, is_gzipped))
    reader = csv.reader(lines, delimiter=delimiter, strict=True, quoting=quoting)
    header: list[str] | None = None
    start = 1
    try:
        for fields in reader:
            where, start = f"{path}:{start}", reader.line_num + 1
            if header is None and not tables.has_header:
                header = [str(i) for i in range(len(fields))]
            if header is None:
                header = fields
                twice = sorted({h for h in header if header.count(h) > 1})
                if twice:
                    raise DataError(f"{where}: the header names the column {twice[0]!r} twice; rename one of them")
            elif len(fields) == len(header):
                yield dict(zip(header, fields, strict=True)), where
            elif fields:
                raise DataError(
                    f"{where}: the row has {len(fields)} fields, the header {len(header)}; "
                    'put a field that holds a separator or a quote into quotes, and write a quote in it as ""'
                )
    except csv.Error as error:
        raise DataError(
            f"{path}:{start}: cannot be read as a table, from this row on ({error}); put the field into quotes and "
            'write a quote in it as "", set data.quoted = False if quotes are letters, or write the file as .jsonl'
        ) from error


def lines_of(path: Readable, is_gzipped: bool) -> Iterator[tuple[int, str]]:
    """Line numbers from 1 and lines with their ends. Only a newline ends a line: texts hold U+2028 and the like."""
    position = 0
    with opened(path, is_gzipped=is_gzipped) as stream:
        for number, raw in enumerate(stream, 1):
            mark = len(codecs.BOM_UTF8) if number == 1 and raw.startswith(codecs.BOM_UTF8) else 0
            try:
                line = raw[mark:].decode("utf-8")
            except UnicodeDecodeError as error:
                at = position + mark + error.start
                raise DataError(
                    f"{path}:{number}: byte {at} (0x{raw[mark + error.start]:02x}) is not UTF-8 ({error.reason}); "
                    "write the file as UTF-8, for instance with iconv"
                ) from error
            position += len(raw)
            yield number, line


def parse_json(text: str, path: Readable, first_line: int) -> Any:
    """The value of a JSON text that begins at a line of the file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = text.split("\n")[error.lineno - 1]
        hint = "; if each line is an object of its own, name the file .jsonl" if error.msg == "Extra data" else ""
        raise DataError(
            f"{path}:{first_line + error.lineno - 1}: broken JSON at column {error.colno} ({error.msg}); "
            f"the line begins {line[:SHOWN_CHARACTERS]!r}; repair or remove it{hint}"
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise DataError(f"{path}:{first_line}: JSON that cannot be read ({error}); repair or remove it") from error


def as_object(row: Any, where: str) -> Row:
    """The row, if it is an object."""
    if not isinstance(row, dict):
        raise DataError(f'{where}: holds {kind_of(row)}, not an object; write {{"messages": [...]}} or the like')
    return row


def first_line(error: Exception) -> str:
    """Of what an error says."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def without_nulls(row: Row) -> Row:
    """The row without the nulls that Arrow wrote where an object had no such key; a null column or content stays."""

    def prune(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: prune(v) for k, v in value.items() if v is not None or k in ("content", "value")}
        return [prune(v) for v in value] if isinstance(value, list) else value

    return {name: prune(value) for name, value in row.items()}


def extension_of(path: Readable) -> tuple[str, bool]:
    """Extension, and whether the file is gzipped."""
    name = path.name.lower()
    return pathlib.PurePath(name.removesuffix(".gz")).suffix, name.endswith(".gz")


def _is_read(path: pathlib.Path, extensions: Sequence[str] = EXTENSIONS) -> bool:
    return extension_of(path)[0] in extensions


def _is_hidden(path: pathlib.Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _near(path: pathlib.Path) -> str:
    """What in the folder looks like the missing name, or that the folder itself is not there."""
    folder = path.parent
    if not folder.is_dir():
        return f" (there is no folder {folder} either)"
    stems: dict[str, list[str]] = {}  # without extensions, which would make all names of a folder look alike
    for name in sorted(os.listdir(folder)):
        stems.setdefault(name.split(".")[0], []).append(name)
    near = difflib.get_close_matches(path.name.split(".")[0], list(stems), n=3)
    names = [name for stem in near for name in stems[stem]]
    return f" (near it: {', '.join(names)})" if names else ""
