"""What the rules look at: a conversation's prompts and answers, its words, its scripts.

In: a `Conversation`. Out: a `View` of it, and small facts about texts.
"""

import dataclasses
import functools
import re
import unicodedata

from jax_sft.data.conversation import Conversation

# Han, kana and hangul: scripts whose words are not, or not only, told by spaces.
CJK = (
    "\u1100-\u11ff\u2e80-\u2fdf\u3040-\u30ff\u3100-\u312f\u31f0-\u31ff\u3400-"
    "\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
)
CJK_CHARACTER = re.compile(f"[{CJK}]")
FENCED = re.compile(r"^[ \t]*(```|~~~).*?(?:^[ \t]*\1[`~]*[ \t]*$|\Z)", re.DOTALL | re.MULTILINE)
INLINE_CODE = re.compile(r"`[^`\n]+`")
WORD = re.compile(f"[{CJK}]|[^\\W{CJK}]+")
CODE_LINE = re.compile(
    r"[{};]\s*$|^\s*(?:def|class|import|from|return|for|while|if|elif|else|try|print|#include|public|"
    r"private|function|const|let|var|SELECT|FROM|WHERE|INSERT|</?\w+)\b|^\s*(?://|/\*|#!|\$ |>>> )|\w\(.*\)$|"
    r"\w\s*=\s*\S"
)


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a rule found: a stable sentence that begins with the rule's name, and the text that made it."""

    reason: str
    excerpt: str = ""


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answer and the user's turn before it, "" if there is none."""

    prompt: str
    text: str
    has_calls: bool = False  # of tools: then the text may be empty


@dataclasses.dataclass(frozen=True)
class View:
    """A conversation as the rules look at it."""

    conversation: Conversation

    @functools.cached_property
    def answers(self) -> list[Answer]:
        """The assistant's turns, or a completion; a plain text has none."""
        of = self.conversation
        if of.text is not None:
            return [] if of.prompt_text is None else [Answer(of.prompt_text, of.text)]
        found, prompt = [], ""
        for message in of.messages:
            if message.role == "user":
                prompt = message.content
            elif message.role == "assistant":
                found.append(Answer(prompt, message.content, bool(message.extra.get("tool_calls"))))
        return found

    @functools.cached_property
    def said(self) -> list[str]:
        """What is trained on by default: the answers, or a plain text."""
        of = self.conversation
        return [of.text] if of.text is not None else [a.text for a in self.answers]

    @functools.cached_property
    def asked(self) -> str:
        """All that is not an answer, with system messages and tools' results, in lower case."""
        of = self.conversation
        if of.text is not None:
            return (of.prompt_text or "").lower()
        return "\n".join(m.content for m in of.messages if m.role != "assistant").lower()

    @functools.cached_property
    def lowered(self) -> list[str]:
        """`said` in lower case."""
        return [text.lower() for text in self.said]

    @functools.cached_property
    def texts(self) -> list[str]:
        """Everything, turn by turn."""
        of = self.conversation
        return [of.prompt_text or "", of.text] if of.text is not None else [m.content for m in of.messages]


def without_code(text: str) -> str:
    """The text without fenced and inline code."""
    if "`" not in text and "~~~" not in text:
        return text
    return INLINE_CODE.sub(" ", FENCED.sub("\n", text))


def looks_like_code(text: str) -> bool:
    """Whether at least a third of the lines (two or more) are written as in a program, fenced or not."""
    lines = [line for line in text.splitlines() if line.strip()]
    return len(lines) > 1 and 3 * sum(CODE_LINE.search(line) is not None for line in lines) >= len(lines)


def squeezed(text: str) -> str:
    """Letters and digits alone, in lower case: what is left of a text when case, spaces and points do not count."""
    return "".join(re.findall(r"\w+", text.casefold()))


def is_cjk(text: str) -> bool:
    """Whether the text is mainly Chinese, Japanese or Korean, by its letters; one of them says as much as three."""
    count = len(CJK_CHARACTER.findall(text))
    return count > 0 and 3 * count >= len(re.findall(r"[^\W\d_]", text)) - count


def tokens(text: str) -> list[str]:
    """Words in lower case; each character of Chinese, Japanese and Korean is one."""
    return WORD.findall(unicodedata.normalize("NFKC", text).lower())


def sentences_end(text: str) -> int:
    """How many sentences end in the text."""
    return len(re.findall(r"[.!?][\"')\]*_”’]*(?=\s|$)|[。！？…]", text))


def around(text: str, start: int, end: int, *, margin: int = 60) -> str:
    """What was found, with a bit of what stands around it."""
    left, right = max(0, start - margin), min(len(text), end + margin)
    return ("…" if left else "") + text[left:right] + ("…" if right < len(text) else "")
