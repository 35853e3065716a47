"""What a row of each format says, as messages: who asks, who answers, and which of it teaches.

In: rows under the names of their format's fields (`formats.py`). Out: lists of `Message`s.
"""

from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

from jax_sft.data.conversation import DataError, Message
from jax_sft.data.messages import (
    ROLES,
    SHAREGPT_ROLES,
    Untrainable,
    as_list,
    as_text,
    some_text,
    to_message,
    to_messages,
)
from jax_sft.data.source import Row, kind_of

_INSTRUCTS = ("system", "developer")
_ASKS = (*_INSTRUCTS, "user")


def unnested(row: Row, where: str) -> Iterator[tuple[Row, str]]:
    """The rows that a row holds: questions of SQuAD's paragraphs, instances of self-instruct's tasks; or itself.

    Other sets have columns of these names too (MuSiQue's paragraphs ask nothing): those are columns like all others.
    """
    paragraphs, instances = row.get("paragraphs"), row.get("instances")
    if _are_objects(paragraphs) and all("qas" in paragraph for paragraph in paragraphs):
        for p, paragraph in enumerate(paragraphs):
            for q, asked in enumerate(_objects(paragraph.get("qas") or [], where, "qas")):
                inner = {name: value for name, value in paragraph.items() if name not in ("qas", "id")}
                yield {**inner, **asked}, f"{where}.paragraphs[{p}].qas[{q}]"
    elif _are_objects(instances) and "instruction" in row and "output" not in row:
        outer = {name: value for name, value in row.items() if name != "instances"}
        for i, instance in enumerate(instances):
            own = {"id": f"{row['id']}[{i}]"} if "id" in row else {}
            yield {**outer, **instance, **own}, f"{where}.instances[{i}]"
    else:
        yield row, where


def sharegpt(row: Row, where: str) -> list[Message]:
    """`conversations` with from and value, and a column for the system message."""
    return _with_system(row, where, to_messages(row["conversations"], where, "conversations", SHAREGPT_ROLES))


def alpaca(row: Row, where: str) -> list[Message]:
    """`system`, pairs of `history`, `instruction` and `input` on lines of their own, `output`: as in LLaMA-Factory."""
    messages = []
    for pair in as_list(row.get("history") or [], where, "history"):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise DataError(
                f"{where}: history holds {kind_of(pair)}, not pairs of a question and an answer; write those"
            )
        messages += [Message(r, as_text(t, where, "history")) for r, t in zip(("user", "assistant"), pair, strict=True)]
    asked = [*messages, Message("user", _question(row, where))]
    return _with_system(row, where, [*asked, Message("assistant", some_text(row["output"], where, "output"))])


def prompt_completion(row: Row, where: str) -> list[Message]:
    """Both as lists of messages: those of the prompt teach only where they say so themselves."""
    prompt, completion = row["prompt"], row["completion"]
    if prompt is None or completion is None:
        raise Untrainable("null prompt" if prompt is None else "null completion")
    if isinstance(prompt, str) != isinstance(completion, str):
        raise DataError(
            f"{where}: prompt is {kind_of(prompt)} and completion {kind_of(completion)}; "
            "make both texts, or both lists of messages"
        )
    messages = to_messages(prompt, where, "prompt", ROLES, train=False)
    return messages + to_messages(completion, where, "completion", ROLES)


def preference(row: Row, where: str) -> list[Message]:
    """The chosen answer behind what was asked; the rejected one is never read, what was said before teaches nothing.

    What was asked is a column of turns (`conversations`, `messages`), a `prompt` of either kind, an `instruction`, or
    the beginning of `chosen` itself, as in TRL; beside the latter a column says no more than that (UltraFeedback has
    both).
    """
    history = _asked(row, where)
    chosen = row["chosen"]
    if isinstance(chosen, str):
        answer = [Message("assistant", some_text(chosen, where, "chosen"))]
    elif isinstance(chosen, Mapping):
        answer = [to_message(chosen, where, SHAREGPT_ROLES)]
    else:
        answer = to_messages(chosen, where, "chosen", SHAREGPT_ROLES)
    if not history and len(answer) < 2:
        raise DataError(
            f"{where}: nothing says what was asked; a row of the format preference needs conversations, messages, "
            "prompt or instruction beside chosen, or chosen with the turns before it"
        )
    said = {(m.role, m.content) for m in answer}
    if answer[0].role in _ASKS and all((m.role, m.content) in said for m in history if m.role == "user"):
        before = [] if answer[0].role in _INSTRUCTS else [m for m in history if m.role in _INSTRUCTS]
        before += [Message(m.role, m.content, m.train or False, m.weight, m.extra) for m in answer[:-1]]
        history, answer = before, answer[-1:]
    return _with_system(row, where, history + answer)


def _asked(row: Row, where: str) -> list[Message]:
    """What the columns of a preference say before the answers."""
    if row.get("conversations") is not None:
        return to_messages(row["conversations"], where, "conversations", SHAREGPT_ROLES, train=False)
    if row.get("messages") is not None:
        return to_messages(row["messages"], where, "messages", ROLES, train=False)
    if isinstance(row.get("prompt"), str):
        return [Message("user", some_text(row["prompt"], where, "prompt"))]
    if row.get("prompt") is not None:
        return to_messages(row["prompt"], where, "prompt", ROLES, train=False)
    if row.get("instruction") is not None:
        return [Message("user", _question(row, where))]
    return []


def squad(row: Row, where: str) -> list[Message]:
    """A text and a question about it, answered by the first of the answers given (SQuAD, arXiv 1606.05250)."""
    answers = row["answers"]
    texts = answers.get("text") if isinstance(answers, Mapping) else answers
    if not isinstance(texts, list):
        raise DataError(f"{where}: answers is {kind_of(answers)}; write [{{'text': ...}}] or {{'text': [...]}}")
    if not texts:
        raise Untrainable("a question that the text does not answer")
    first = texts[0].get("text") if isinstance(texts[0], Mapping) else texts[0]
    asked = [some_text(row[field], where, field) for field in ("context", "question")]
    return [Message("user", "\n\n".join(asked)), Message("assistant", some_text(first, where, "answers"))]


def _question(row: Row, where: str) -> str:
    asked = [as_text(row[f], where, f) for f in ("instruction", "input") if row.get(f) or f == "instruction"]
    question = "\n".join(part for part in asked if part)
    if not question:
        raise Untrainable("empty instruction")
    return question


def _with_system(row: Row, where: str, messages: list[Message]) -> list[Message]:
    if not row.get("system"):
        return messages
    if messages[0].role == "system":
        raise Untrainable("a system column beside a system message")
    return [Message("system", as_text(row["system"], where, "system")), *messages]


def _are_objects(values: Any) -> TypeGuard[list[Mapping[str, Any]]]:
    return isinstance(values, list) and bool(values) and all(isinstance(value, Mapping) for value in values)


def _objects(values: Any, where: str, field: str) -> list[Mapping[str, Any]]:
    if not values or _are_objects(values):
        return values
    raise DataError(f"{where}: {field} is something else than a list of objects; correct the file")
