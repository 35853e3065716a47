"""What a chat template writes around an answer, learned once from two short conversations.

In: the template as a function of messages. Out: `Facts`: where an answer begins behind the generation prompt, what ends
it inside a conversation and at its end, which tokens inference must stop at. Strings only, no tokens.

    <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\n...
                                     header                      end_inside
"""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

Dicts = Sequence[Mapping[str, Any]]
# A stand-in for the content of message i. Unicode keeps these characters for use inside programs (see control.py), no
# message holds them.
OPEN, CLOSE = "\ufdde", "\ufddf"


class RefusedError(Exception):
    """The template raised on these messages; the text is its own."""


class NoFitError(Exception):
    """A method cannot follow this template on this conversation; the text says why."""


class Renderer(Protocol):
    """The template as functions of messages; each raises RefusedError where the template raises."""

    def plain(self, messages: Dicts, *, prompt: bool = False) -> str:
        """The rendering, with the generation prompt behind it if `prompt`."""
        ...

    def tagged(self, messages: Dicts) -> tuple[str, list[tuple[int, int]]]:
        """The rendering, and the characters inside {% generation %} marks."""
        ...


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a template writes around an assistant's content, learned once from two short conversations."""

    header: tuple[
        str, ...
    ]  # the part of the generation prompt that a rendering has before an answer, cut at its tokens
    header_is_prompt: bool  # whether that is the whole of the prompt
    end_inside: str  # what ends an answer that another message follows
    writes_end: bool  # whether a control token ends the last answer
    stops: tuple[str, ...]  # control tokens that end an answer; the first one is added where the template writes none
    tagged: bool  # whether the template carries {% generation %} marks
    control: re.Pattern[str]

    @functools.cached_property
    def stop(self) -> re.Pattern[str]:
        """One of the stops, and blanks before it."""
        return re.compile(r"\s*(?:" + "|".join(map(re.escape, self.stops)) + ")")

    @classmethod
    def probe(
        cls, render: Renderer, *, control: re.Pattern[str], tagged: bool, eos: str | None, stops: Sequence[str]
    ) -> "Facts":
        """Learn them.

        Args:
            control: matches a control token.
            eos: the tokenizer's end-of-sequence token.
            stops: tokens known to end an answer, from the model's generation config.

        Raises:
            RefusedError: the template raises even on a question and an answer.
            NoFitError: it does not write the answer, or no token could end it.
        """
        question = {"role": "user", "content": sentinel(0)}
        answer = {"role": "assistant", "content": sentinel(1)}
        once = render.plain([question, answer])
        if sentinel(1) not in once or sentinel(0) not in once:
            raise NoFitError("it leaves out the content of a message")
        end = once.split(sentinel(1))[-1]
        try:
            more = [question, answer, {"role": "user", "content": sentinel(2)}]
            between = render.plain([*more, {"role": "assistant", "content": sentinel(3)}])
            between = between.split(sentinel(1))[-1].split(sentinel(2))[0]
        except RefusedError:
            between = end  # a template for one question and one answer
        end_inside = _common_end(_pieces(end, control), _pieces(between, control), control)
        follower = control.match(between)
        if follower and control.match(end) and not control.search(end_inside):
            end_inside = follower[0]  # gpt-oss ends the last answer with a token of its own
        ends = control.findall(end)
        if ends:
            found = [ends[0], *(t for t in ends[1:] if t == eos or t in stops)]
        elif follower and follower[0] in stops:
            found = [follower[0]]  # GLM: the next header is what inference stops at
        else:
            found = [eos] if eos else []
        if not found and not stops:
            raise NoFitError("it writes no token behind an answer, and the tokenizer has no eos_token")
        header, header_is_prompt = _header(render, once, control)
        return cls(
            header=tuple(_pieces(header, control)),
            header_is_prompt=header_is_prompt,
            end_inside=end_inside,
            writes_end=bool(ends),
            stops=tuple(dict.fromkeys([*found, *stops])),
            tagged=tagged,
            control=control,
        )


def sentinel(i: int) -> str:
    """A content that a template cannot but show as it is."""
    return f"{OPEN}{i}{CLOSE}"


def _pieces(text: str, control: re.Pattern[str]) -> list[str]:
    """The text cut around control tokens."""
    out, at = [], 0
    for match in control.finditer(text):
        out += [text[at : match.start()], match[0]]
        at = match.end()
    return [p for p in (*out, text[at:]) if p]


def _common(a: Sequence[str], b: Sequence[str], control: re.Pattern[str]) -> str:
    """What both begin with; no control token is cut."""
    out = ""
    for x, y in zip(a, b, strict=False):
        if x != y:
            cut = control.fullmatch(x) or control.fullmatch(y)
            return out if cut else out + _same_beginning(x, y)
        out += x
    return out


def _common_end(end: Sequence[str], between: Sequence[str], control: re.Pattern[str]) -> str:
    """The part of `end` that `between` begins with; of a text that goes on otherwise, the blanks alone."""
    out = ""
    for x, y in zip(end, between, strict=False):
        if x != y:
            if control.fullmatch(x) or control.fullmatch(y):
                return out
            same = _same_beginning(x, y)
            return out + (x if same == x else same[: len(same) - len(same.lstrip())])
        out += x
    return out


def _same_beginning(x: str, y: str) -> str:
    length = next((i for i, (a, b) in enumerate(zip(x, y, strict=False)) if a != b), min(len(x), len(y)))
    return x[:length]


def _header(render: Renderer, once: str, control: re.Pattern[str]) -> tuple[str, bool]:
    """What a rendering and a prompt both write between question and answer, less what ends the question; is it all?"""
    question = {"role": "user", "content": sentinel(0)}
    prompt, asked = (_pieces(render.plain([question], prompt=p).split(sentinel(0))[-1], control) for p in (True, False))
    rendered = _pieces(once.split(sentinel(0))[-1].split(sentinel(1))[0], control)
    both = _common(prompt, rendered, control)
    header = both[len(_common(_pieces(both, control), asked, control)) :] or both
    return header, both == "".join(prompt)
