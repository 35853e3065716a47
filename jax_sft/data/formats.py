"""Rows become conversations, by their format: the columns that it needs, and those that it may have.

In: rows with their places, from `source`. Out: `Conversation`s, nothing stripped, and an `Account` of the rows that
hold nothing to train on. A row of the wrong shape (a column missing or of the wrong type) is a `DataError`: it says
that the file is not what the config takes it for. One format holds for a whole file; `auto` reads it off its first row.
"""

import contextlib
import dataclasses
import difflib
import functools
import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

from jax_sft.config import RESERVED_ARGUMENTS, DataConfig
from jax_sft.data import rows
from jax_sft.data.conversation import Account, Conversation, DataError, Message
from jax_sft.data.holdout import is_held_out
from jax_sft.data.messages import ROLES, Untrainable, as_text, listed, some_text, to_messages, to_tools
from jax_sft.data.pretokenised import LABELS, MASKS, to_tokens
from jax_sft.data.source import Part, Row, Tables, files_of, kind_of, read_rows, stem_of

REQUIRED = {
    "preference": ("chosen", "rejected"),
    "tokens": ("input_ids",),
    "squad": ("context", "question", "answers"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
_EVERYWHERE = ("id", "source")
_RENDERED = ("tools", "chat_template_kwargs", *_EVERYWHERE)
OPTIONAL = {
    "preference": ("conversations", "messages", "prompt", "instruction", "input", "system", *_RENDERED),
    "tokens": (LABELS, *MASKS, "attention_mask", *_EVERYWHERE),
    "squad": _EVERYWHERE,
    "messages": ("label", *_RENDERED),
    "sharegpt": ("system", "label", *_RENDERED),
    "alpaca": ("input", "system", "history", "chat_template_kwargs", *_EVERYWHERE),
    "prompt_completion": ("label", *_RENDERED),
    "text": _EVERYWHERE,
}
# Their columns may stand beside those of another format, which then only say what these say too.
_TAKE_ALL = ("preference", "tokens", "squad")


def read_conversations(config: DataConfig, parts: Sequence[Part], account: Account) -> Iterator[Conversation]:
    """Conversations of all `parts` in order. Rows are counted in `account.read`, those left out in `account.dropped`.

    Raises:
        DataError: of `source`; a row that does not follow its file's format; a source with the name of another part.
    """
    fields = _fields_of(config.format)
    for field in config.columns:
        if field not in fields:
            raise DataError(
                f"data.columns.{field}: no field has this name{_did_you_mean(field, fields)}; map {', '.join(fields)}"
            )
    names = {part.name for part in parts} - {None}
    for part, place in [(of, place) for of in parts for place in files_of(of.paths)]:
        format, source = "auto", stem_of(place)
        for row, where in rows_at(place, config):
            if format == "auto":  # the first row
                _check_columns(row, where, config.columns)
                format = detect(row, where, columns=config.columns) if config.format == "auto" else config.format
            account.read += not part.takes_held_out
            try:
                conversation = _taken(row, where, config, part, format=format, source=source)
            except Untrainable as reason:
                if not part.takes_held_out:  # the training set's account has it already
                    account.drop(str(reason), where)
                continue
            if part.holdout and is_held_out(conversation, part.holdout) != part.takes_held_out:
                account.held_out += not part.takes_held_out
                continue
            account.read += part.takes_held_out
            if part.name is None and conversation.source in names:
                raise DataError(
                    f"{where}: its source {conversation.source!r} is the name of a set too, and the losses of both "
                    "would be one; call the set otherwise, or put these files into a set of data.validation_sets"
                )
            yield conversation


def _taken(row: Row, where: str, config: DataConfig, part: Part, *, format: str, source: str) -> Conversation:
    """A row as a conversation of its part; `source` is of rows that have none, in a part without a name.

    Raises:
        Untrainable, DataError: as `to_conversation`; no message teaches.
    """
    found = to_conversation(row, where, format=format, columns=config.columns, source=source)
    roles = _roles(config.train_on)
    if found.messages and not any(_teaches(message, roles) for message in found.messages):
        raise Untrainable(f"no {' or '.join(roles)} message to train on")
    return dataclasses.replace(
        found,
        source=found.source if part.name is None else part.name,
        loss_weight=part.loss_weight,
        template_args={**config.template_args, **part.template_args, **found.template_args},
    )


@functools.cache
def _roles(train_on: str) -> tuple[str, ...]:
    return tuple(role.strip() for role in train_on.split(","))


def rows_at(place: Any, config: DataConfig) -> Generator[tuple[Row, str], None, None]:
    """The rows of one file or hub dataset as they are converted, each with its place."""
    tables = Tables(has_header=config.header, has_quotes=config.quoted)
    for row, where in read_rows([str(place)], split=config.split, tables=tables):
        yield from rows.unnested(row, where)


def format_of(place: Any, config: DataConfig) -> str:
    """What a file is read as: what the config says, or its first row shows.

    Raises:
        DataError: of `source`, or no format fits.
    """
    if config.format != "auto":
        return config.format
    with contextlib.closing(rows_at(place, config)) as read:
        row, where = next(read, ({}, str(place)))
    return detect(row, where, columns=config.columns)


def detect(row: Row, where: str, *, columns: Mapping[str, str]) -> str:
    """The format whose columns the row has; a `text` column beside those of another format is taken for a copy.

    Raises:
        DataError: none fits, or more than one.
    """
    fits = [format for format, fields in REQUIRED.items() if all(columns.get(f, f) in row for f in fields)]
    if fits and fits[0] in _TAKE_ALL:
        return fits[0]
    if len(fits) > 1 and fits[-1] == "text":
        fits.pop()
    if len(fits) == 1:
        return fits[0]
    if fits:
        raise DataError(f"{where}: the columns fit the formats {' and '.join(fits)}; set data.format to one of them")
    needs = "; ".join(f"{format}: {', '.join(fields)}" for format, fields in REQUIRED.items())
    raise DataError(
        f"{where}: no format fits the columns {listed(row)}; name them in data.columns (as in "
        f"data.columns.instruction = 'question'), so that one has all it needs ({needs})"
    )


def to_conversation(row: Row, where: str, *, format: str, columns: Mapping[str, str], source: str) -> Conversation:
    """One row as a conversation.

    Args:
        where: its place; the id, unless the row has a column `id`.
        format: a key of `REQUIRED`.
        columns: our field -> the row's column; an empty name means that there is none.
        source: of rows that have no column `source`.

    Raises:
        Untrainable: the row is sound, but there is nothing to train on.
        DataError: a column or key is missing, or of a wrong type.
    """
    row = _by_field(row, where, format, columns)
    if _is_false(row.get("label")):  # of KTO; a label that is something else is a column that nothing reads
        raise Untrainable("label false: an answer that is not to be learnt")
    messages: list[Message] = []
    text = prompt_text = tokens = None
    match format:
        case "messages":
            messages = to_messages(row["messages"], where, "messages", ROLES)
        case "sharegpt":
            messages = rows.sharegpt(row, where)
        case "alpaca":
            messages = rows.alpaca(row, where)
        case "preference":
            messages = rows.preference(row, where)
        case "squad":
            messages = rows.squad(row, where)
        case "tokens":
            tokens = to_tokens(row, where)
        case "prompt_completion" if isinstance(row["prompt"], str) and isinstance(row["completion"], str):
            prompt_text = as_text(row["prompt"], where, "prompt")
            text = some_text(row["completion"], where, "completion")
        case "prompt_completion":
            messages = rows.prompt_completion(row, where)
        case _:
            text = some_text(_joined(row["text"], where), where, "text")
    return Conversation(
        messages=tuple(messages),
        source=_name(row.get("source"), where, "source") or source,
        id=_name(row.get("id"), where, "id") or where,
        tools=to_tools(row.get("tools"), where),
        text=text,
        prompt_text=prompt_text,
        tokens=tokens,
        template_args=_arguments(row.get("chat_template_kwargs"), where),
        where=where,
    )


def _is_false(label: Any) -> bool:
    return label is False or (isinstance(label, str) and label.lower() == "false")  # as tables write it


def conversation_of(
    row: Row, where: str, config: DataConfig, part: Part, account: Account, *, is_first: bool
) -> Conversation | None:
    """A row of a stream, whose files are not read from their beginning: `auto` reads the format off each row.

    Rows that hold nothing to train on are None, and counted. Args: is_first: look whether the columns are there.

    Raises:
        DataError: the row does not follow the format.
    """
    if is_first:
        _check_columns(row, where, config.columns)
    format = detect(row, where, columns=config.columns) if config.format == "auto" else config.format
    account.read += 1
    try:
        found = _taken(row, where, config, part, format=format, source="")
    except Untrainable as reason:
        account.drop(str(reason), where)
        return None
    return dataclasses.replace(found, source=part.name or "train")  # sources must be known before the first row


def _arguments(value: Any, where: str) -> Mapping[str, Any]:
    """What a row hands to the chat template beside its messages."""
    if value is None or value == "":  # of a table
        return {}
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise DataError(
            f"{where}: chat_template_kwargs is {kind_of(value)}; write an object, such as {{'enable_thinking': false}}"
        )
    for name in RESERVED_ARGUMENTS:
        if name in value:
            raise DataError(f"{where}: chat_template_kwargs names {name!r}, which is given already; take it out")
    return value


def _joined(value: Any, where: str) -> Any:
    """A text, or lines of one."""
    return "\n".join(as_text(line, where, "text") for line in value) if isinstance(value, list) else value


def _teaches(message: Message, roles: Sequence[str]) -> bool:
    return message.role in roles or "all" in roles if message.train is None else message.train


def _name(value: Any, where: str, field: str) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError(f"{where}: {field} is {kind_of(value)}; write a text, or set data.columns.{field} = ''")
    return as_text(str(value), where, field)


def _by_field(row: Row, where: str, format: str, columns: Mapping[str, str]) -> Row:
    """The row under our names of the format's fields; a column that is not mapped has the name of its field."""
    for field in REQUIRED[format]:
        if columns.get(field, field) not in row:
            others = [
                f for f, needs in REQUIRED.items() if f != format and all(columns.get(n, n) in row for n in needs)
            ]
            looks = f" (it looks like {others[0]}, but one format holds for a file)" if others else ""
            column = columns.get(field, field)
            raise DataError(
                f"{where}: a row of the format {format} needs the column {column!r}, but has {listed(row)}{looks}"
                f"{_did_you_mean(column, list(row))}; correct the row, or set data.format and data.columns.{field}"
            )
    names = {field: columns.get(field, field) for field in _fields_of(format)}
    return {field: row[column] for field, column in names.items() if column in row}


def _check_columns(row: Row, where: str, columns: Mapping[str, str]) -> None:
    for field, column in columns.items():
        if column and column not in row:
            raise DataError(
                f"{where}: data.columns.{field} = {column!r} is not a column, there are {listed(row)}"
                f"{_did_you_mean(column, list(row))}; correct it"
            )


@functools.cache
def _fields_of(format: str) -> tuple[str, ...]:
    formats = list(REQUIRED) if format == "auto" else [format]
    return tuple(dict.fromkeys(field for f in formats for field in REQUIRED[f] + OPTIONAL[f]))


def _did_you_mean(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
