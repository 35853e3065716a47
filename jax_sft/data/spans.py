"""Where in a rendered conversation the trained text is: spans of characters, found through the template itself.

In: messages and a function that renders them. Out: renderings with a span for each trained message, by the first
method that fits: tags (the template marks them), prefix (the difference of two renderings), sentinel (a stand-in for
the content shows where the template puts it), turns (one rendering for each assistant turn, as inference sees it).
Strings only: no tokens here. Template writers' `{% generation %}` marks are the model for what belongs to a turn:

    <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\n...
                                                          ^^^^^^^^^^^^^^^^^^   content, end-of-turn token, newline

The newline behind the end-of-turn token is part of the span, as in those marks; a space is not, because it would
share a token with what follows.
"""

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from jax_sft.data.facts import CLOSE, OPEN, Dicts, Facts, NoFitError, RefusedError, Renderer, sentinel

METHODS = ("tags", "prefix", "sentinel", "turns")
# From so many on, sentinel goes before prefix, which renders each beginning of a conversation, twice for each answer;
# where both fit they find the same.
_MANY_ANSWERS = 3
REASONING = ("reasoning_content", "reasoning", "thinking")
OFF_PROMPT = "answers that the chat template writes otherwise than behind its generation prompt"
UNENDED = "answers that no token ends, as the chat template writes them"
_SENTINEL = re.compile(f"({OPEN}\\d+{CLOSE})")


@dataclasses.dataclass(frozen=True)
class Span:
    """Characters [start, end) of a rendering that belong to one message."""

    start: int
    end: int
    message: int


@dataclasses.dataclass(frozen=True)
class Rendering:
    """A rendered conversation, or its beginning, and what is trained in it."""

    text: str
    spans: tuple[Span, ...]
    notes: tuple[str, ...] = ()  # what is not as one would expect it of the template


def find(
    messages: Dicts, trained: Collection[int], *, method: str, render: Renderer, facts: Facts
) -> tuple[str, list[Rendering]]:
    """The method that fits and its renderings; `method` is one of METHODS, or 'auto' for the first that fits.

    Args:
        trained: indices of the messages to find.

    Raises:
        RefusedError: the template raises on the whole conversation.
        NoFitError: no method (or not the one asked for) can follow the template.
    """
    answers = [i for i in sorted(trained) if messages[i]["role"] == "assistant"]
    others = [i for i in sorted(trained) if messages[i]["role"] != "assistant"]
    text, marks = render.tagged(messages) if facts.tagged else (render.plain(messages), [])

    def spans_by(name: str) -> Iterable[Span]:
        if name == "tags":
            return _by_tags(messages, answers, marks, render, facts)
        if name == "prefix":
            return _trimmed(text, _by_prefix(text, messages, answers, render, facts), facts)
        return _trimmed(text, _by_sentinel(text, messages, answers, render, facts), facts)

    methods = METHODS if method == "auto" else (method,)
    if method == "auto" and len(answers) >= _MANY_ANSWERS and facts.header_is_prompt:
        methods = ("tags", "sentinel", "prefix", "turns")
    reasons = []
    for name in methods:
        try:
            if name == "turns":
                return name, _by_turns(messages, answers, others, render, facts)
            found = [*spans_by(name), *_by_sentinel(text, messages, others, render, facts)]
            notes = (OFF_PROMPT,) if name == "sentinel" and answers and not facts.header_is_prompt else ()
            return name, [_ended(text, found, messages, render, facts, notes=notes)]
        except (NoFitError, RefusedError) as error:
            reasons.append(f"{name}: {error}")
    raise NoFitError("; ".join(reasons))


def _by_tags(
    messages: Dicts, answers: Collection[int], marks: Sequence[tuple[int, int]], render: Renderer, facts: Facts
) -> Iterable[Span]:
    """The template's own marks. A turn may have several (Phi-3 marks its last token apart): neighbours are joined."""
    if not facts.tagged:
        raise NoFitError("the template has no {% generation %} marks")
    blocks = _joined(marks)
    owners = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if len(blocks) != len(owners):
        text, marks = render.tagged([_with_sentinels(m, i, {}) if i in owners else m for i, m in enumerate(messages)])
        marks = _joined(marks)
        if len(marks) != len(blocks):
            raise NoFitError(f"the template marks {len(blocks)} spans for {len(owners)} answers")
        owners = _owners([text[a:b] for a, b in marks])
    return [Span(a, b, i) for (a, b), i in zip(blocks, owners, strict=True) if i in answers]


def _by_prefix(text: str, messages: Dicts, answers: Collection[int], render: Renderer, facts: Facts) -> Iterable[Span]:
    """What rendering one more message adds to the generation prompt, where both are a beginning of the whole.

    Behind the result of a tool a prompt may lack the header that the answer then has: no header is ever trained.
    """
    header = "".join(facts.header)
    for i in answers:
        prompt = render.plain(messages[:i], prompt=True) if i else ""
        upto = render.plain(messages[: i + 1]) if i + 1 < len(messages) else text
        if not prompt or not upto.startswith(prompt):
            raise NoFitError(f"message {i + 1} is not rendered behind the generation prompt")
        if not text.startswith(upto):
            raise NoFitError(f"message {i + 1} is rendered otherwise once others follow")
        yield Span(len(prompt) + len(header) * upto.startswith(header, len(prompt)), len(upto), i)


def _by_sentinel(
    text: str, messages: Dicts, trained: Collection[int], render: Renderer, facts: Facts, *, off_prompt: bool = False
) -> tuple[Span, ...]:
    """Where stand-ins of the contents are rendered; what is around them must be the real rendering, letter by letter.

    Args:
        off_prompt: accept an answer behind the beginning of the header alone.

    Raises:
        NoFitError: the rendering depends on the contents, or does not show them as they are.
    """
    if not trained:
        return ()
    contents: dict[str, str] = {}
    stand_ins = [_with_sentinels(m, i, contents) if i in trained else m for i, m in enumerate(messages)]
    literals, names = _walk(render.plain(stand_ins))
    places: dict[int, list[tuple[int, int, int]]] = {}  # message -> (piece, start, end) of each of its contents
    at = len(literals[0])
    if not text.startswith(literals[0]):
        raise NoFitError("the rendering depends on the contents")
    for piece, name in enumerate(names):
        content = contents[name]
        shown = next((c for c in _shown(content) if text.startswith(c + literals[piece + 1], at)), None)
        if shown is None:
            raise NoFitError(f"message {_owner(name) + 1} is not rendered as it is")
        places.setdefault(_owner(name), []).append((piece, at, at + len(shown)))
        at += len(shown) + len(literals[piece + 1])
    if at != len(text):
        raise NoFitError("the rendering depends on the contents")
    headers = [
        "".join(facts.header[:n]) for n in range(len(facts.header), 0 if off_prompt else len(facts.header) - 1, -1)
    ]
    return tuple(_around(i, places.get(i), literals, messages, headers, facts) for i in trained)


def _around(
    i: int,
    places: list[tuple[int, int, int]] | None,
    literals: list[str],
    messages: Dicts,
    headers: list[str],
    facts: Facts,
) -> Span:
    """The span of message i: its contents, from behind the header to the end of the turn."""
    if not places:
        raise NoFitError(f"message {i + 1} is left out")
    (first, start, _), (last, _, end) = places[0], places[-1]
    behind = literals[last + 1]
    if messages[i]["role"] != "assistant":
        return Span(start, end + len(facts.end_inside) if behind.startswith(facts.end_inside) else end, i)
    before = literals[first]
    header = next((h for h in headers if h and h in before), None)
    if header is None:
        raise NoFitError(f"message {i + 1} is not rendered behind the generation prompt")
    start -= len(before) - before.rfind(header) - len(header)
    if i + 1 == len(messages):
        return Span(start, end + len(behind), i)
    calls_tools = bool(messages[i].get("tool_calls"))
    end_at = behind.find(facts.end_inside)
    if end_at < 0 or (calls_tools and not facts.end_inside) or (end_at and not calls_tools):
        raise NoFitError(f"message {i + 1} does not end as others do")
    return Span(start, end + end_at + len(facts.end_inside), i)


def _by_turns(
    messages: Dicts, answers: Collection[int], others: Collection[int], render: Renderer, facts: Facts
) -> list[Rendering]:
    """The conversation cut behind each trained answer: what inference sees. Costs the history again for every turn."""
    out, done = [], -1
    for i in answers:
        beginning = messages[: i + 1]
        text, notes = render.plain(beginning), ()
        try:
            spans = list(_by_prefix(text, beginning, [i], render, facts))
        except NoFitError:
            spans, notes = _by_sentinel(text, beginning, [i], render, facts, off_prompt=True), (OFF_PROMPT,)
        between = [j for j in others if done < j < i]
        spans = [*_trimmed(text, spans, facts), *_by_sentinel(text, beginning, between, render, facts)]
        out.append(_ended(text, spans, beginning, render, facts, notes=notes))
        done = i
    if any(j > done for j in others):
        raise NoFitError("a trained message follows the last trained answer")
    return out


def _trimmed(text: str, spans: Iterable[Span], facts: Facts) -> Iterable[Span]:
    """Without a space behind the end-of-turn token (LLaVA writes one): it would train the next turn's first token."""
    for span in spans:
        kept = text[span.start : span.end].rstrip(" ")
        ends = [m.end() for m in facts.control.finditer(kept)] if len(kept) < span.end - span.start else []
        yield dataclasses.replace(span, end=span.start + len(kept)) if ends and ends[-1] == len(kept) else span


def _ended(
    text: str, spans: Sequence[Span], messages: Dicts, render: Renderer, facts: Facts, *, notes: tuple[str, ...] = ()
) -> Rendering:
    """Make sure that each answer ends in a token that inference stops at, and that this token is in the span.

    Raises:
        NoFitError: the template writes no such token inside a conversation.
    """
    out = []
    spans = sorted(spans, key=lambda s: s.start)
    last_of = {span.message: span for span in spans}
    for span in spans:
        end, message = span.end, messages[span.message]
        is_end = message["role"] == "assistant" and last_of[span.message] is span
        if is_end and not text[span.start : end].rstrip().endswith(facts.stops):
            behind = facts.stop.match(text, end)
            if behind:  # marks that leave it out, or the header that GLM stops at
                end = behind.end()
            elif not facts.writes_end and (end == len(text) or not message.get("tool_calls")):
                if end != len(text):
                    raise NoFitError(f"no token ends message {span.message + 1}")
                added = (
                    _stop_behind_call(text, messages, render, facts) if message.get("tool_calls") else facts.stops[0]
                )
                notes = notes if added else (*notes, UNENDED)
                text += added
                end = len(text)
            elif not re.search(f"(?:{facts.control.pattern})\\s*$", text[span.start : end]):
                notes = (*notes, UNENDED)
        out.append(dataclasses.replace(span, end=end))
    return Rendering(text, tuple(out), notes)


def _stop_behind_call(text: str, messages: Dicts, render: Renderer, facts: Facts) -> str:
    """What inference stops at behind a call that a conversation ends with: the header of the result (GLM), or ""."""
    try:
        more = render.plain([*messages, {"role": "tool", "content": sentinel(0)}])
    except RefusedError:
        return ""
    behind = more.removeprefix(text).lstrip() if more.startswith(text) else ""
    return next((stop for stop in facts.stops if behind.startswith(stop)), "")


def _with_sentinels(message: Mapping[str, Any], i: int, contents: dict[str, str]) -> dict[str, Any]:
    """The message with its content (4i) and its reasoning (4i + 1, ...) replaced; `contents` notes by what."""
    out = dict(message)
    for k, field in enumerate(("content", *REASONING)):
        value = message.get(field)
        is_between = field == "content" and message.get("tool_calls") and any(message.get(f) for f in REASONING)
        if is_between and not str(value or "").strip():
            continue  # templates write blanks between a content and a call, which a stand-in would bring
        if isinstance(value, str) and (field == "content" or value.strip()):
            out[field] = sentinel(4 * i + k)
            contents[out[field]] = value
    return out


def _owner(name: str) -> int:
    return int(name.strip(OPEN + CLOSE)) // 4


def _owners(blocks: Sequence[str]) -> list[int]:
    """The message of each block: the one whose content it shows; a block without content continues the one before."""
    owners, owner = [], -1
    for block in blocks:
        shown = _SENTINEL.findall(block)
        owner = _owner(shown[0]) if shown else owner
        owners.append(owner)
    return owners


def _walk(text: str) -> tuple[list[str], list[str]]:
    """The literals around sentinels, and the sentinels: literals[k], names[k], literals[k + 1], ..."""
    pieces = _SENTINEL.split(text)
    return pieces[0::2], pieces[1::2]


def _shown(content: str) -> tuple[str, ...]:
    """The ways a template shows a content: as it is, or stripped on a side."""
    return (content, content.strip(), content.strip("\n"), content.lstrip("\n"), content.rstrip(), content.lstrip())


def _joined(blocks: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Blocks in order, those that touch made one."""
    out: list[tuple[int, int]] = []
    for start, end in blocks:
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(end, out[-1][1]))
        else:
            out.append((start, end))
    return out
