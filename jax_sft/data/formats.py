"""Rows become conversations: `messages`, `sharegpt`, `alpaca`, `prompt_completion` and `text`.

In: rows with their places, from `source`. Out: `Conversation`s, nothing stripped, and an `Account` of the rows that
hold nothing to train on. A row of the wrong shape (a column missing or of the wrong type) is a `DataError`: it says
that the file is not what the config takes it for. One format holds for a whole file; `auto` reads it off its first row.
"""

import dataclasses
import difflib
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jax_sft.config import DataConfig
from jax_sft.data.conversation import Account, Conversation, DataError, Message
from jax_sft.data.source import Part, Row, files_of, kind_of, read_rows, stem_of

REQUIRED = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
OPTIONAL = {
    "messages": ("tools", "id", "source"),
    "sharegpt": ("system", "tools", "id", "source"),
    "alpaca": ("input", "system", "history", "id", "source"),
    "prompt_completion": ("tools", "id", "source"),
    "text": ("id", "source"),
}
ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool", "function", "ipython")}
SHAREGPT_ROLES = ROLES | {"human": "user", "gpt": "assistant"}
# Devices take what is below the smallest normal float32 for 0.
SMALLEST_WEIGHT, LARGEST_WEIGHT = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
SAME_CONTENT = "the same content as an earlier conversation, both stay"
SAME_ID = "the same id as an earlier conversation, both stay"


class Untrainable(Exception):
    """A sound row that holds nothing to train on; the message is the reason it is counted under."""


def read_conversations(config: DataConfig, parts: Sequence[Part], account: Account) -> Iterator[Conversation]:
    """Conversations of all `parts` in order. Rows are counted in `account.read`, those left out in `account.dropped`,
    and those that repeat the content or the id of one before in `account.noted` (some 100 bytes of memory a row).

    Raises:
        DataError: of `source`, or a row that does not follow its file's format.
    """
    fields = _fields_of(config.format)
    for field in config.columns:
        if field not in fields:
            raise DataError(
                f"data.columns.{field}: no field has this name{_did_you_mean(field, fields)}; map {', '.join(fields)}"
            )
    trained_roles = [role.strip() for role in config.train_on.split(",")]
    nothing = f"no {' or '.join(trained_roles)} message to train on"
    seen: set[bytes] = set()
    for part, place in [(of, place) for of in parts for place in files_of(of.paths)]:
        format = "auto"
        for row, where in read_rows([str(place)], split=config.split):
            if format == "auto":  # the first row
                _check_columns(row, where, config.columns)
                format = detect(row, where, columns=config.columns) if config.format == "auto" else config.format
            account.read += 1
            try:
                conversation = to_conversation(row, where, format=format, columns=config.columns, source=stem_of(place))
            except Untrainable as reason:
                account.drop(str(reason), where)
                continue
            if conversation.text is None and not any(_teaches(m, trained_roles) for m in conversation.messages):
                account.drop(nothing, where)
                continue
            _note_repeats(conversation, where, seen, account)
            source = conversation.source if part.name is None else part.name
            yield dataclasses.replace(conversation, source=source, loss_weight=part.loss_weight)


def detect(row: Row, where: str, *, columns: Mapping[str, str]) -> str:
    """The format whose columns the row has; a `text` column beside those of another format is taken for a copy.

    Raises:
        DataError: none fits, or more than one.
    """
    fits = [format for format, fields in REQUIRED.items() if all(columns.get(f, f) in row for f in fields)]
    if len(fits) > 1 and fits[-1] == "text":
        fits.pop()
    if len(fits) == 1:
        return fits[0]
    if fits:
        raise DataError(f"{where}: the columns fit the formats {' and '.join(fits)}; set data.format to one of them")
    needs = "; ".join(f"{format}: {', '.join(fields)}" for format, fields in REQUIRED.items())
    raise DataError(
        f"{where}: no format fits the columns {_listed(row)}; name them in data.columns (as in "
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
    messages: list[Message] = []
    text = prompt_text = None
    match format:
        case "messages":
            messages = [_message(turn, where, ROLES) for turn in _turns(row["messages"], where, "messages")]
        case "sharegpt":
            messages = _sharegpt(row, where)
        case "alpaca":
            messages = _alpaca(row, where)
        case "prompt_completion" if isinstance(row["prompt"], str) and isinstance(row["completion"], str):
            prompt_text = _text(row["prompt"], where, "prompt")
            text = _some_text(row["completion"], where, "completion")
        case "prompt_completion":
            messages = _prompt_completion(row, where)
        case _:
            text = _some_text(row["text"], where, "text")
    return Conversation(
        messages=tuple(messages),
        source=_name(row.get("source"), where, "source") or source,
        id=_name(row.get("id"), where, "id") or where,
        tools=_tools(row.get("tools"), where),
        text=text,
        prompt_text=prompt_text,
    )


def _note_repeats(conversation: Conversation, where: str, seen: set[bytes], account: Account) -> None:
    """Count a content or an id that is in `seen`, and put both into it."""
    turns = [(m.role, m.content, m.extra) for m in conversation.messages]
    parts: dict[str, Any] = {
        SAME_CONTENT: [turns, conversation.tools, conversation.prompt_text, conversation.text],
        SAME_ID: conversation.id,  # the place of a row without one: no other row has it
    }
    for what, part in parts.items():
        digest = hashlib.blake2b(json.dumps(part, default=str).encode(), digest_size=16).digest()
        if digest in seen:
            account.note(what, where)
        seen.add(digest)


def _teaches(message: Message, roles: Sequence[str]) -> bool:
    return message.role in roles or "all" in roles if message.train is None else message.train


def _sharegpt(row: Row, where: str) -> list[Message]:
    messages = [_message(turn, where, SHAREGPT_ROLES) for turn in _turns(row["conversations"], where, "conversations")]
    if row.get("system"):
        if messages[0].role == "system":
            raise Untrainable("a system column beside a system message")
        messages.insert(0, Message("system", _text(row["system"], where, "system")))
    return messages


def _alpaca(row: Row, where: str) -> list[Message]:
    """`system`, pairs of `history`, `instruction` and `input` on lines of their own, `output`: as in LLaMA-Factory."""
    asked = [_text(row[f], where, f) for f in ("instruction", "input") if row.get(f) or f == "instruction"]
    question = "\n".join(part for part in asked if part)
    if not question:
        raise Untrainable("empty instruction")
    messages = [Message("system", _text(row["system"], where, "system"))] if row.get("system") else []
    for pair in _list(row.get("history") or [], where, "history"):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise DataError(
                f"{where}: history holds {kind_of(pair)}, not pairs of a question and an answer; write those"
            )
        messages += [Message(r, _text(t, where, "history")) for r, t in zip(("user", "assistant"), pair, strict=True)]
    return [*messages, Message("user", question), Message("assistant", _some_text(row["output"], where, "output"))]


def _prompt_completion(row: Row, where: str) -> list[Message]:
    """Both as lists of messages: those of the prompt teach only where they say so themselves."""
    prompt, completion = row["prompt"], row["completion"]
    if prompt is None or completion is None:
        raise Untrainable("null prompt" if prompt is None else "null completion")
    if isinstance(prompt, str) != isinstance(completion, str):
        raise DataError(
            f"{where}: prompt is {kind_of(prompt)} and completion {kind_of(completion)}; "
            "make both texts, or both lists of messages"
        )
    messages = [_message(turn, where, ROLES, train=False) for turn in _turns(prompt, where, "prompt")]
    return messages + [_message(turn, where, ROLES) for turn in _turns(completion, where, "completion")]


def _message(turn: Mapping[str, Any], where: str, roles: Mapping[str, str], train: bool | None = None) -> Message:
    """One turn; `from` and `value` are understood where the format knows the roles that go with them."""
    role_key, content_key = ("from", "value") if roles is SHAREGPT_ROLES and "from" in turn else ("role", "content")
    calls = _tool_calls(turn, where)
    has_calls = bool(calls.get("tool_calls"))
    for key in (role_key, content_key):
        if key not in turn and not (key == content_key and has_calls):
            raise DataError(
                f"{where}: a message has no {key!r}, but {_listed(turn)}; write role and content (format messages), "
                "or from and value (format sharegpt)"
            )
    role = turn[role_key]
    if not isinstance(role, str) or role not in roles:
        raise Untrainable(f"unknown role {role!r}")
    content = turn.get(content_key)
    if content is None and has_calls:  # the call is all it says
        content = ""
    own = {role_key, content_key, "train", "weight", "loss_weight"}
    said = turn.get("train")
    if said is not None and not isinstance(said, bool):
        raise DataError(f"{where}: the train of a message is {said!r}; write true or false")
    return Message(
        role=roles[role],
        content=_content(content, where),
        train=train if said is None else said,
        weight=_weight(turn, where),
        extra={key: value for key, value in turn.items() if key not in own and value is not None} | calls,
    )


def _tool_calls(turn: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The key `tool_calls` of a turn that has it: a list of objects, each with the call or with a `function`."""
    if turn.get("tool_calls") is None:
        return {}
    calls = _list(turn["tool_calls"], where, "tool_calls")
    if not all(isinstance(c, Mapping) and isinstance(c.get("function") or {}, Mapping) for c in calls):
        raise DataError(
            f"{where}: tool_calls holds something else than calls; write objects like "
            "{'type': 'function', 'function': {'name': ..., 'arguments': {...}}}"
        )
    return {"tool_calls": calls}


def _content(content: Any, where: str) -> str:
    """A text, or the text parts of a list joined as they stand."""
    if not isinstance(content, list):
        return _text(content, where, "content")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind is None:
            raise DataError(f"{where}: content holds {kind_of(part)}, not parts like {{'type': 'text', 'text': ...}}")
        if kind != "text":
            raise Untrainable(f"content part of type {kind!r}")
        texts.append(_text(part.get("text", part.get("value")), where, "content"))
    return "".join(texts)


def _weight(turn: Mapping[str, Any], where: str) -> float:
    said = [turn[key] for key in ("weight", "loss_weight") if turn.get(key) is not None]
    if len(said) > 1:
        raise DataError(f"{where}: a message has both weight and loss_weight; they mean the same: keep one")
    weight = said[0] if said else 1.0
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not is_number or not (weight == 0 or SMALLEST_WEIGHT <= weight <= LARGEST_WEIGHT):
        raise DataError(
            f"{where}: the weight of a message is {weight!r}; write a number of at least 0 that a float32 can hold"
        )
    return float(weight)


def _turns(value: Any, where: str, field: str) -> list[Mapping[str, Any]]:
    if value is None:
        raise Untrainable(f"null {field}")
    turns = _list(value, where, field)
    if not turns:
        raise Untrainable("empty conversation")
    for turn in turns:
        if not isinstance(turn, Mapping):
            raise DataError(
                f"{where}: {field} holds {kind_of(turn)}, not messages; write objects with role and content"
            )
    return turns


def _list(value: Any, where: str, field: str) -> list[Any]:
    """A list, also one that is written as JSON in a text (a table has no other way)."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise DataError(f"{where}: {field} is a text that is not JSON; write a list") from None
    if not isinstance(value, list):
        raise DataError(f"{where}: {field} is {kind_of(value)}; write a list")
    return value


def _tools(value: Any, where: str) -> tuple[Any, ...]:
    return tuple(_list(value, where, "tools")) if value else ()


def _some_text(value: Any, where: str, field: str) -> str:
    if value == "":
        raise Untrainable(f"empty {field}")
    return _text(value, where, field)


def _text(value: Any, where: str, field: str) -> str:
    if value is None:
        raise Untrainable(f"null {field}")
    if not isinstance(value, str):
        raise DataError(f"{where}: {field} is {kind_of(value)}; write a text")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can write one half of an emoji, and no tokenizer reads it
        raise Untrainable(f"a broken character (half of a surrogate pair) in {field}") from None
    return value


def _name(value: Any, where: str, field: str) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError(f"{where}: {field} is {kind_of(value)}; write a text, or set data.columns.{field} = ''")
    return _text(str(value), where, field)


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
                f"{where}: a row of the format {format} needs the column {column!r}, but has {_listed(row)}{looks}"
                f"{_did_you_mean(column, list(row))}; correct the row, or set data.format and data.columns.{field}"
            )
    names = {field: columns.get(field, field) for field in _fields_of(format)}
    return {field: row[column] for field, column in names.items() if column in row}


def _check_columns(row: Row, where: str, columns: Mapping[str, str]) -> None:
    for field, column in columns.items():
        if column and column not in row:
            raise DataError(
                f"{where}: data.columns.{field} = {column!r} is not a column, there are {_listed(row)}"
                f"{_did_you_mean(column, list(row))}; correct it"
            )


@functools.cache
def _fields_of(format: str) -> tuple[str, ...]:
    formats = list(REQUIRED) if format == "auto" else [format]
    return tuple(dict.fromkeys(field for f in formats for field in REQUIRED[f] + OPTIONAL[f]))


def _listed(row: Mapping[str, Any]) -> str:
    return ", ".join(repr(name) for name in row) or "none"


def _did_you_mean(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
