"""One turn of a row becomes a `Message`: roles, contents and their parts, weights, calls of tools.

In: turns as `messages` and `sharegpt` files write them. Out: messages as chat templates take them: what was said is
`content`, what was thought `reasoning_content`, a call {"type": "function", "function": {"name", "arguments"}} with
arguments as an object, as a server hands them to the template, whatever of these the file writes as JSON in a text.

    {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'}      an assistant with tool_calls
    {"from": "observation", "value": "..."}                                         role tool
    {"type": "reasoning", "value": "..."}, {"type": "tool_call", "value": "..."}    parts of a content
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from jax_sft.data.conversation import DataError, Message
from jax_sft.data.source import kind_of
from jax_sft.data.spans import REASONING

ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool", "function", "ipython")}
SHAREGPT_ROLES = ROLES | {"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "assistant"}
# Devices take what is below the smallest normal float32 for 0.
SMALLEST_WEIGHT, LARGEST_WEIGHT = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
# What a message is made of; a `content` beside the `value` that was read would take its place in the rendering.
_OWN = frozenset(("role", "content", "from", "value", "train", "weight", "loss_weight", "tool_calls", "function_call"))
_PLAIN, _PLAIN_ROLES = {"role", "content"}, ("user", "assistant", "system")  # that all formats call so
_REASONING_PARTS = ("reasoning", "thinking")
_SPOKEN_PARTS = ("text", *_REASONING_PARTS, "tool_call")


class Untrainable(Exception):
    """A sound row that holds nothing to train on; the message is the reason it is counted under."""


def to_messages(
    value: Any, where: str, field: str, roles: Mapping[str, str], *, train: bool | None = None
) -> list[Message]:
    """The turns of a column.

    Args:
        roles: how the format calls them; with `SHAREGPT_ROLES`, `from` and `value` are understood too.
        train: what holds for turns that do not say themselves whether they teach.

    Raises:
        Untrainable: there is nothing in it, or something that no text can say.
        DataError: it is no list of turns.
    """
    return [to_message(turn, where, roles, train=train) for turn in _turns(value, where, field)]


def to_message(turn: Mapping[str, Any], where: str, roles: Mapping[str, str], *, train: bool | None = None) -> Message:
    """One turn, as `to_messages`."""
    if turn.keys() == _PLAIN and isinstance(turn["content"], str) and turn["role"] in _PLAIN_ROLES:  # as nearly all are
        return Message(role=turn["role"], content=as_text(turn["content"], where, "content"), train=train)
    role_key, content_key = ("from", "value") if roles is SHAREGPT_ROLES and "from" in turn else ("role", "content")
    given = turn.get("tool_calls")
    calls = [] if given is None or given == "" else [_call(call, where) for call in as_list(given, where, "tool_calls")]
    if turn.get("function_call") is not None:  # as the OpenAI API wrote the one call of a message before tool_calls
        calls += _written_calls(turn["function_call"], where)
    for key in (role_key, content_key):
        if key not in turn and not (key == content_key and calls):
            raise DataError(
                f"{where}: a message has no {key!r}, but {listed(turn)}; write role and content (format messages), "
                "or from and value (format sharegpt)"
            )
    role, content = turn[role_key], turn.get(content_key)
    if not isinstance(role, str) or role not in roles:
        raise Untrainable(f"unknown role {role!r}")
    if role == "function_call":
        content, calls = "", [*calls, *_written_calls(content, where)]
    text, thought, said_calls = _content("" if content is None and calls else content, where)
    calls += said_calls
    said = turn.get("train")
    if said is not None and not isinstance(said, bool):
        raise DataError(f"{where}: the train of a message is {said!r}; write true or false")
    for key in REASONING:
        if key in turn and not isinstance(turn[key], str | bool | None):
            raise DataError(f"{where}: the {key} of a message is {kind_of(turn[key])}; write a text")
    twice = next((key for key in REASONING if turn.get(key)), None) if thought else None
    if twice is not None:
        raise DataError(f"{where}: a message has reasoning in its content and in {twice}; keep one of them")
    return Message(
        role=roles[role],
        content=text,
        train=train if said is None else said,
        weight=_weight(turn, where),
        extra={key: value for key, value in turn.items() if key not in _OWN and value is not None}
        | ({"reasoning_content": thought} if thought else {})
        | ({"tool_calls": calls} if calls else {}),
    )


def to_tools(value: Any, where: str) -> tuple[Any, ...]:
    """The tools of a row; a bare function becomes what servers hand to templates, {"type": "function", "function": ..}.

    Raises:
        DataError: they are no list of objects.
    """
    tools = as_list(value, where, "tools") if value else []
    for tool in tools:
        if not isinstance(tool, Mapping):
            raise DataError(f"{where}: tools holds {kind_of(tool)}, not objects; write {{'type': 'function', ...}}")
    return tuple({"type": "function", "function": t} if "name" in t and "function" not in t else t for t in tools)


def as_list(value: Any, where: str, field: str) -> list[Any]:
    """A list, also one that is written as JSON in a text (a table has no other way)."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise DataError(f"{where}: {field} is a text that is not JSON; write a list") from None
    if not isinstance(value, list):
        raise DataError(f"{where}: {field} is {kind_of(value)}; write a list")
    return value


def as_text(value: Any, where: str, field: str) -> str:
    """A text that a tokenizer can read."""
    if value is None:
        raise Untrainable(f"null {field}")
    if not isinstance(value, str):
        raise DataError(f"{where}: {field} is {kind_of(value)}; write a text")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can write one half of an emoji, and no tokenizer reads it
        raise Untrainable(f"a broken character (half of a surrogate pair) in {field}") from None
    return value


def some_text(value: Any, where: str, field: str) -> str:
    """A text that is not empty."""
    if value == "":
        raise Untrainable(f"empty {field}")
    return as_text(value, where, field)


def listed(row: Mapping[str, Any]) -> str:
    """The names that a row or a turn has, for a message."""
    return ", ".join(repr(name) for name in row) or "none"


def _turns(value: Any, where: str, field: str) -> list[Mapping[str, Any]]:
    if value is None:
        raise Untrainable(f"null {field}")
    turns = as_list(value, where, field)
    if not turns:
        raise Untrainable("empty conversation")
    for turn in turns:
        if not isinstance(turn, Mapping):
            raise DataError(
                f"{where}: {field} holds {kind_of(turn)}, not messages; write objects with role and content"
            )
    return turns


def _content(content: Any, where: str) -> tuple[str, str, list[dict[str, Any]]]:
    """What is said, thought and called: a text, or the parts of a list, those of one kind joined as they stand."""
    if not isinstance(content, list):
        return as_text(content, where, "content"), "", []
    texts, thoughts, calls = [], [], []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str):
            raise DataError(f"{where}: content holds {kind_of(part)}, not parts like {{'type': 'text', 'text': ...}}")
        if kind in _SPOKEN_PARTS and not any(key in part for key in ("value", kind, "text")):
            raise Untrainable(f"a content part of type {kind!r} that says nothing")  # or null, where Arrow wrote it
        said = part.get("value", part.get(kind, part.get("text")))
        if kind == "text":
            texts.append(as_text(said, where, "content"))
        elif kind in _REASONING_PARTS:
            thoughts.append(as_text(said, where, "content"))
        elif kind == "tool_call":
            calls += _written_calls(said, where)
        else:
            raise Untrainable(f"content part of type {kind!r}")
    return "".join(texts), "".join(thoughts), calls


def _written_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Calls in a text: the JSON of one, or of a list of them."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise Untrainable("a function call that is not JSON") from None
    if value == []:
        raise Untrainable("a function call that calls nothing")
    return [_call(call, where) for call in (value if isinstance(value, list) else [value])]


def _call(call: Any, where: str) -> dict[str, Any]:
    """A call with its function inside, and arguments as an object."""
    inside = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(inside, Mapping) or not isinstance(inside.get("name"), str):
        raise DataError(
            f"{where}: tool_calls holds something else than calls; write objects like "
            "{'type': 'function', 'function': {'name': ..., 'arguments': {...}}}"
        )
    if "arguments" not in inside and "parameters" in inside:  # Llama's models call them so
        inside = {"arguments" if key == "parameters" else key: value for key, value in inside.items()}
    arguments = inside.get("arguments")
    if isinstance(arguments, str):  # as the OpenAI API writes them
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError:
            arguments = None
    elif "arguments" not in inside:
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise Untrainable("a function call whose arguments are not a JSON object")
    outside = dict(call) if "function" in call else {"type": "function"}
    return {**outside, "function": {**inside, "arguments": arguments}}


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
