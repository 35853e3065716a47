"""The training data as `data.quality` leaves it, written as files that are read again: `jax-sft data --clean D`.

In: a data config. Out: a folder of its own: a file per set or source, `dropped.jsonl` and `changed.jsonl`, which say of
each row that is not there as it was why, and `clean.json`, the counts. No model is needed: what only tokens tell, such
as rows that are too long, stays.
"""

import dataclasses
import json
import pathlib
import secrets
import shutil
from collections.abc import Iterator, Mapping
from typing import IO, Any

from jax_sft.config import DataConfig
from jax_sft.data.conversation import Account, Conversation, DataError, Message
from jax_sft.data.formats import read_conversations, rows_at
from jax_sft.data.quality.screen import references_of, rule_of, screened
from jax_sft.data.source import CLEANED_BY, CLEANING, Part, Row, files_of, parts_of, validation_parts, was_cleaned
from jax_sft.disk import is_full

SUMMARY, DROPPED, CHANGED = CLEANING
RESERVED = tuple(pathlib.PurePath(name).stem for name in CLEANING)
# What a conversation says itself, and what would make another format of the row; other columns are written as they are.
_SAID = {"messages", "conversations", "instruction", "output", "input", "system", "history", "prompt", "completion",
         "text", "tools", "id", "source", "chosen", "answers", "input_ids", "labels", "loss_mask", "assistant_masks",
         "completion_mask", "attention_mask", "label"}  # fmt: skip


def clean(config: DataConfig, out: pathlib.Path) -> list[str]:
    """Write the folder, and say what was done as lines for the terminal.

    Raises:
        DataError: of reading and screening; `out` is a file, holds other things or the data, or cannot be made.
    """
    parts = parts_of(config.sets or config.train)
    _check_out(out, parts)
    scratch = _scratch_beside(out)
    try:
        account, written = _write(config, parts, scratch)
        summary = {"made_by": CLEANED_BY, "read": account.read, "written": written, "dropped": account.dropped,
                   "altered": account.altered, "noted": account.noted}  # fmt: skip
        (scratch / SUMMARY).write_text(json.dumps(summary, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        if out.is_dir():
            shutil.rmtree(out)
        scratch.rename(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return _table(account, written, out)


def _scratch_beside(out: pathlib.Path) -> pathlib.Path:
    """A new folder that becomes `out` when it is whole."""
    scratch = out.with_name(f"{out.name}.tmp-{secrets.token_hex(4)}")
    try:
        scratch.mkdir(parents=True)
    except OSError as error:
        if is_full(error):
            raise
        raise DataError(
            f"{out}: the folder cannot be made ({error.strerror}); name another, in a place where you may write"
        ) from error
    return scratch


def _check_out(out: pathlib.Path, parts: tuple[Part, ...]) -> None:
    if out.exists() and not out.is_dir():
        raise DataError(f"{out}: is a file, where a folder is to be written; name another")
    for place in (place for part in parts for place in files_of(part.paths)):
        if isinstance(place, pathlib.Path) and place.resolve().is_relative_to(out.resolve()):
            raise DataError(f"{out}: holds {place.name}, which the config reads; name another folder to write to")
    if out.is_dir() and any(out.iterdir()) and not was_cleaned(out):
        raise DataError(f"{out}: holds files that are not of an earlier --clean; name an empty or new folder")


class _Recorder(Account):
    """An account that also remembers each event until it is written."""

    def __init__(self) -> None:
        super().__init__()
        self.drops: dict[str, list[tuple[str, str]]] = {}  # where -> reason, excerpt
        self.changes: dict[str, list[tuple[str, str]]] = {}

    def drop(self, reason: str, where: str, excerpt: str = "") -> None:
        """As in `Account`."""
        super().drop(reason, where, excerpt)
        self.drops.setdefault(where, []).append((reason, excerpt))

    def alter(self, what: str, where: str, excerpt: str = "") -> None:
        """As in `Account`."""
        super().alter(what, where, excerpt)
        self.changes.setdefault(where, []).append((what, excerpt))


def _write(config: DataConfig, parts: tuple[Part, ...], folder: pathlib.Path) -> tuple[Account, dict[str, int]]:
    """Write all rows; the account, and how many went into each file. Rows are read twice, side by side."""
    account = _Recorder()
    written: dict[str, int] = {}
    rows = _rows(config, parts)
    files: dict[str, IO[str]] = {}
    try:
        for name in (DROPPED, CHANGED):
            files[name] = (folder / name).open("w", encoding="utf-8")
        kept = screened(
            read_conversations(config, parts, account),
            config.quality,
            account,
            # What would be held out stays in the set that is written, and would be its own leak.
            references_of(config, validation_parts(dataclasses.replace(config, holdout=0.0))),
        )
        for conversation in kept:
            row, where = next(rows)
            while where != conversation.where:
                _write_dropped(files[DROPPED], account, row, where)
                row, where = next(rows)
            line = _as_row(conversation, _others(row, config.columns))
            name = _file_of(line)
            if name not in files:
                files[name] = (folder / name).open("w", encoding="utf-8")
            _dump(files[name], line)
            written[name] = written.get(name, 0) + 1
            for what, excerpt in account.changes.pop(where, ()):
                said = {"id": conversation.id, "source": conversation.source, "where": where, "change": what}
                _dump(files[CHANGED], said | {"rule": rule_of(what), "excerpt": excerpt, "row": row})
        for row, where in rows:
            _write_dropped(files[DROPPED], account, row, where)
    finally:
        for file in files.values():
            file.close()
    lost = account.read - sum(written.values()) - sum(account.dropped.values())
    if lost:
        raise AssertionError(f"{lost} of {account.read} rows were neither written nor dropped")
    return account, written


def _rows(config: DataConfig, parts: tuple[Part, ...]) -> Iterator[tuple[Row, str]]:
    """All rows again, in the order of `read_conversations`, each with its place."""
    for place in (place for part in parts for place in files_of(part.paths)):
        yield from rows_at(place, config)


def _write_dropped(file: IO[str], account: _Recorder, row: Row, where: str) -> None:
    reason, excerpt = account.drops[where].pop(0)  # a file that is named twice has each place twice
    _dump(file, {"id": row.get("id", where), "source": row.get("source"), "where": where, "reason": reason,
                 "rule": rule_of(reason), "excerpt": excerpt, "row": row})  # fmt: skip


def _others(row: Row, columns: Mapping[str, str]) -> dict[str, Any]:
    """Columns that no field of a conversation comes from, under the names that our fields have."""
    ours = {column: field for field, column in columns.items() if column}
    named = {ours.get(column, column): value for column, value in row.items()}
    return {name: value for name, value in named.items() if name not in _SAID}


def _as_row(of: Conversation, others: dict[str, Any]) -> dict[str, Any]:
    """The conversation in the format messages; a text as text or as prompt and completion, tokens as tokens."""
    said: dict[str, Any]
    if of.tokens is not None:
        said = {"input_ids": of.tokens.ids, "loss_mask": of.tokens.weights}
    elif of.text is not None:
        said = {"text": of.text} if of.prompt_text is None else {"prompt": of.prompt_text, "completion": of.text}
    else:
        said = {"messages": [_as_turn(m) for m in of.messages]}
    if of.tools:
        said["tools"] = of.tools
    return {"id": of.id, "source": of.source, **said, **others}


def _as_turn(message: Message) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": message.content, **message.extra}
    if message.train is not None:
        turn["train"] = message.train
    if message.weight != 1:
        turn["weight"] = message.weight
    return turn


def _file_of(line: Mapping[str, Any]) -> str:
    """A file per source and format: one format holds for a file."""
    stem = "".join(c if c.isalnum() or c in "-_. " else "_" for c in line["source"])[:100].strip(". ") or "data"
    kinds = {"messages": "", "text": ".text", "prompt": ".prompts", "input_ids": ".tokens"}
    kind = next(kind for field, kind in kinds.items() if field in line)
    return f"{stem}_set{kind}.jsonl" if stem in RESERVED else f"{stem}{kind}.jsonl"


def _dump(file: IO[str], line: Mapping[str, Any]) -> None:
    text = json.dumps(line, ensure_ascii=False, default=str)
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, in a row that is left out or a column that nothing reads
        text = json.dumps(line, default=str)
    file.write(text + "\n")


def _table(account: Account, written: Mapping[str, int], out: pathlib.Path) -> list[str]:
    lines = [f"read {account.read}, wrote {sum(written.values())}, dropped {sum(account.dropped.values())}"]
    lines += [f"  {count:>8}  {out / name}" for name, count in written.items()]
    for what, counts in (("dropped", account.dropped), ("altered", account.altered), ("noted", account.noted)):
        lines += [f"  {n:>8}  {what}  {reason}" for reason, n in sorted(counts.items(), key=lambda item: -item[1])]
    return lines
