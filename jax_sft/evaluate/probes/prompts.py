"""Probes: prompts whose answers show whether a model answers, and what must hold of each answer.

In: our own set (prompts.jsonl beside this module), or a file of the same layout. Out: a `Probe` each; its plain text.

A line is a JSON object with `id`, `kind`, `language`, `messages` (the last one the user's) and what the kind needs:

    answer    nothing more
    system    the rule that the system message sets, one or more of `expect`, `forbid`, `max_sentences`, `max_words`
    recall    `expect`, the words that were told earlier
    format    `format`, one of json, bullets, word, number; with json also `keys`, with bullets also `count`
    language  nothing more

`answer_language` is the language the answer must have, by default that of the probe; null: any. An entry of `expect`
names alternatives with "|" between them; every entry must be met.
"""

import dataclasses
import difflib
import json
import pathlib
from collections.abc import Iterable
from typing import Any

from jax_sft.data.conversation import DataError

OUR_PROMPTS = pathlib.Path(__file__).with_name("prompts.jsonl")
KINDS = ("answer", "system", "recall", "format", "language")
FORMATS = ("json", "bullets", "word", "number")
# Languages and the script, as jax_sft.data.quality.language names it, that tells them.
SCRIPT_OF = {
    **dict.fromkeys(("en", "fr", "de", "es", "it", "pt", "nl", "pl", "tr", "vi", "id"), "Latin"),
    "zh": "Han",
    "ja": "Kana",
    "ko": "Hangul",
    **dict.fromkeys(("ru", "uk", "bg"), "Cyrillic"),
    "el": "Greek",
    **dict.fromkeys(("ar", "fa"), "Arabic"),
    "he": "Hebrew",
    "hi": "Devanagari",
    "th": "Thai",
}
ROLES = ("system", "user", "assistant")
LABELS = {"zh": {"user": "用户：", "assistant": "助手："}}
LABELS_ELSE = {"user": "User: ", "assistant": "Assistant: "}
_RULES = ("expect", "forbid", "max_sentences", "max_words")
_OF_KIND = {
    "answer": (),
    "system": _RULES,
    "recall": ("expect",),
    "format": ("format", "keys", "count"),
    "language": (),
}
_ALWAYS = ("id", "kind", "language", "messages")


@dataclasses.dataclass(frozen=True)
class Probe:
    """One prompt, and what must hold of its answer."""

    id: str
    kind: str  # of KINDS
    language: str  # of the prompt
    messages: tuple[dict[str, str], ...]  # role and content; the last one is the user's
    answer_language: str | None  # None: any
    expect: tuple[str, ...] = ()  # each of them must be in the answer; "a|b": one of a and b
    forbid: tuple[str, ...] = ()  # none of them may be
    max_sentences: int | None = None
    max_words: int | None = None  # a character of Chinese, Japanese or Korean is one
    format: str | None = None  # of FORMATS
    keys: tuple[str, ...] = ()  # that the JSON object must have
    count: int | None = None  # of bullets

    @property
    def question(self) -> str:
        """The last user's turn."""
        return self.messages[-1]["content"]


def read_prompts(path: str | None = None) -> list[Probe]:
    """The probes of a JSONL file, by default our own 60, half of them English and half Chinese.

    Raises:
        DataError: the file cannot be read, has no probe or two of one id, or a line is no probe: names line and field.
    """
    file = pathlib.Path(path) if path is not None else OUR_PROMPTS
    try:
        lines = file.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read ({error}); probes are lines of JSON in UTF-8") from error
    probes: dict[str, Probe] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        probe = _probe(line, f"{file}:{number}")
        if probe.id in probes:
            raise DataError(f"{file}:{number}: id {probe.id!r} is there twice; give each probe an id of its own")
        probes[probe.id] = probe
    if not probes:
        raise DataError(f"{file}: has no probes; write one JSON object a line with {', '.join(_ALWAYS)}")
    return list(probes.values())


def as_plain_text(probe: Probe) -> str:
    """The probe for a base model, which has no template: a text that it can only continue.

    A question that stands alone is put as it is, with a line break after it. Where there are more messages the turns
    get labels ("User: ", "Assistant: ", in Chinese "用户：", "助手："), a system message comes first without one, and
    the text ends with the assistant's label.
    """
    if len(probe.messages) == 1:
        return probe.question + "\n"
    labels = LABELS.get(probe.language, LABELS_ELSE)
    lines = [labels.get(m["role"], "") + m["content"] + ("\n" if m["role"] == "system" else "") for m in probe.messages]
    return "\n".join([*lines, labels["assistant"].rstrip()])


def _probe(line: str, where: str) -> Probe:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: is no JSON ({error}); write one object a line") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: is {_short(row)}; write one JSON object a line")
    for field in _ALWAYS:
        if field not in row:
            raise DataError(f"{where}: the field {field!r} is missing; a probe has {', '.join(_ALWAYS)}")
    id_ = _text(row, "id", where)
    kind, language = _one_of(row, "kind", KINDS, where), _one_of(row, "language", SCRIPT_OF, where)
    known = (*_ALWAYS, "answer_language", *_OF_KIND[kind])
    for field in row:
        if field not in known:
            near = difflib.get_close_matches(field, known, 1)
            hint = f"; is it {near[0]!r}?" if near else f"; it may have {', '.join(known)}"
            raise DataError(f"{where}: the field {field!r} does not belong to the kind {kind!r}{hint}")
    if kind == "system" and not any(rule in row for rule in _RULES):
        raise DataError(f"{where}: the kind 'system' needs a rule to check; give one of {', '.join(_RULES)}")
    if kind == "recall" and "expect" not in row:
        raise DataError(f"{where}: the field 'expect' is missing; the kind 'recall' needs the words that were told")
    if kind == "format" and "format" not in row:
        raise DataError(f"{where}: the field 'format' is missing; give one of {', '.join(FORMATS)}")
    messages = _messages(row["messages"], where)
    if kind == "system" and messages[0]["role"] != "system":
        raise DataError(f"{where}: field 'messages': the kind 'system' begins with a message of the role 'system'")
    named = row.get("answer_language", language)
    return Probe(
        id=id_,
        kind=kind,
        language=language,
        messages=messages,
        answer_language=None
        if named is None
        else _one_of({"answer_language": named}, "answer_language", SCRIPT_OF, where),
        expect=_texts(row, "expect", where),
        forbid=_texts(row, "forbid", where),
        max_sentences=_count(row, "max_sentences", where),
        max_words=_count(row, "max_words", where),
        format=_one_of(row, "format", FORMATS, where) if "format" in row else None,
        keys=_texts(row, "keys", where),
        count=_count(row, "count", where),
    )


def _messages(messages: Any, where: str) -> tuple[dict[str, str], ...]:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: field 'messages' is {_short(messages)}; give a list of role and content")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise DataError(f"{where}: field 'messages'[{i}] is {_short(message)}; a message has role and content")
        if message["role"] not in ROLES or not isinstance(message["content"], str) or not message["content"].strip():
            raise DataError(
                f"{where}: field 'messages'[{i}] is {_short(message)}; its role is one of {', '.join(ROLES)}, and its "
                "content a text"
            )
    if messages[-1]["role"] != "user":
        raise DataError(f"{where}: field 'messages' ends with {messages[-1]['role']!r}; end it with the user's turn")
    return tuple(messages)


def _text(row: dict[str, Any], field: str, where: str) -> str:
    if not isinstance(row[field], str) or not row[field].strip():
        raise DataError(f"{where}: field {field!r} is {_short(row[field])}; give a text")
    return row[field]


def _one_of(row: dict[str, Any], field: str, known: Iterable[str], where: str) -> str:
    if not isinstance(row[field], str) or row[field] not in known:
        raise DataError(f"{where}: field {field!r} is {_short(row[field])}; give one of {', '.join(known)}")
    return row[field]


def _texts(row: dict[str, Any], field: str, where: str) -> tuple[str, ...]:
    if field not in row:
        return ()
    texts = row[field]
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
        raise DataError(f'{where}: field {field!r} is {_short(texts)}; give a list of texts, such as ["blue"]')
    return tuple(texts)


def _count(row: dict[str, Any], field: str, where: str) -> int | None:
    if field not in row:
        return None
    if type(row[field]) is not int or row[field] < 1:
        raise DataError(f"{where}: field {field!r} is {_short(row[field])}; give a whole number from 1 on")
    return row[field]


def _short(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)[:80]
