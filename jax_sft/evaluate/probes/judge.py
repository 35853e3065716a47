"""The judgement of one answer to a probe, behaviour by behaviour.

In: a `Probe`, what a model said after it, whether it ended by itself. Out: a `Judgement`, with a reason for each fault.
"""

import dataclasses
import json
import re
from collections.abc import Callable

from jax_sft.data.conversation import Conversation, Message
from jax_sft.data.quality.answers import NOTHING, loops
from jax_sft.data.quality.language import LEAST_PROMPT, script_of
from jax_sft.data.quality.text import Finding, View, is_cjk, looks_like_code, sentences_end, without_code
from jax_sft.data.quality.text import tokens as words_of
from jax_sft.evaluate.probes import signs
from jax_sft.evaluate.probes.continuing import why_no_answer
from jax_sft.evaluate.probes.prompts import SCRIPT_OF, Probe

BEHAVIOURS = ("answers", "stops", "no_loop", "language", "role", "recall", "format")
NOT_ASKED = ""  # instead of a reason: the behaviour does not apply
EXCERPT = 120  # characters of an answer in a reason
LEAST_LANGUAGE = 4  # letters from which the language is judged where the probe is about it
OTHER_SCRIPT = 0.3  # share of the expected script below which a mixed text is in another language
_FENCE = re.compile(r"\s*```\w*\s*\n(.*?)\n?\s*```\s*\Z", re.DOTALL)
_BULLET = re.compile(r"^\s*(?:[-*+•·]|\d+[.)、．])\s*\S")
_WORD_CJK = re.compile(r"\W*\w{1,4}\W*")  # a Chinese, Japanese or Korean word
_NUMBER = re.compile(r"[-+−]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?%?")


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What an answer shows: True, False, or None where a behaviour does not apply or cannot be told."""

    id: str  # of the probe
    kind: str
    language_of_probe: str
    tokens: int
    answers: bool | None = None  # it does not continue, echo, ask on, or say nothing
    stops: bool | None = None  # it ended by itself
    no_loop: bool | None = None  # it does not say the same over and over
    language: bool | None = None  # it is in the language that it must be in, by script
    role: bool | None = None  # it keeps the system message's rule
    recall: bool | None = None  # it knows what was told earlier
    format: bool | None = None  # it has the form that was asked for
    length_ratio: float | None = None  # its words by the reference's, a CJK character being one
    reasons: dict[str, str] = dataclasses.field(default_factory=dict)  # behaviour -> why it is False, with an excerpt


def judge(probe: Probe, text: str, *, stopped: bool, tokens: int, reference: str | None = None) -> Judgement:
    """Judge the answer `text` of `tokens` tokens to the probe.

    Args:
        probe: what was put to the model.
        text: the answer alone, without control tokens.
        stopped: the model ended by itself, and not at a limit of tokens.
        tokens: how many the answer has.
        reference: a good answer, for `length_ratio` (None without it, or if it has no words).
    """
    found = {
        "answers": _answers(probe, text),
        "stops": None if stopped else _told(f"ran on to the limit of {tokens} tokens", text[-EXCERPT:]),
        "no_loop": _loops(probe, text),
        "language": _told(_language(probe, text), text),
        "role": _told(_role(probe, text), text) if probe.kind == "system" else NOT_ASKED,
        "recall": _told(_lacks(probe, text), text) if probe.kind == "recall" else NOT_ASKED,
        "format": _told(_format(probe, text), text) if probe.kind == "format" else NOT_ASKED,
    }
    return Judgement(
        id=probe.id,
        kind=probe.kind,
        language_of_probe=probe.language,
        tokens=tokens,
        **{b: None if why == NOT_ASKED else why is None for b, why in found.items()},
        length_ratio=_length_ratio(text, reference),
        reasons={b: why for b, why in found.items() if why},
    )


def _answers(probe: Probe, text: str) -> str | None:
    finding = why_no_answer(probe.question, text, plays_role=probe.kind == "system")
    return _of_finding(finding)


def _loops(probe: Probe, text: str) -> str | None:
    if not text.strip(NOTHING):
        return NOT_ASKED
    turns = Message("user", probe.question), Message("assistant", text)
    return _of_finding(loops(View(Conversation(turns, source="", id=probe.id))))


def _of_finding(finding: Finding | None) -> str | None:
    return finding and _told(finding.reason, finding.excerpt)


def _told(why: str | None, text: str) -> str | None:
    """The reason with an excerpt; what is no reason stays as it is."""
    return f"{why}: {' '.join(text.split())[:EXCERPT]!r}" if why else why


def _language(probe: Probe, text: str) -> str | None:
    """By script: English for French is not seen. Code, and texts of a few letters, cannot be told."""
    if probe.answer_language is None or looks_like_code(text):
        return NOT_ASKED
    must = SCRIPT_OF[probe.answer_language]
    least = LEAST_LANGUAGE if probe.kind == "language" else LEAST_PROMPT
    prose = without_code(text)
    its, shares = script_of(signs.QUOTED.sub(" ", prose), least=least)  # a foreign word may well be quoted
    if its == "unknown":
        its, shares = script_of(prose, least=least)
    if its == must:
        return None
    if not shares or (must == "Kana" and its == "Han") or (its == "unknown" and shares[must] >= OTHER_SCRIPT):
        return NOT_ASKED  # short, or a Japanese word without kana, or mixed
    return f"must be in {probe.answer_language!r}, is in the script {its if its != 'unknown' else 'of others'}"


def _role(probe: Probe, text: str) -> str | None:
    if why := _lacks(probe, text):
        return why
    for word in probe.forbid:
        if _has(text, word):
            return f"says {word!r}, which it must not"
    if probe.max_sentences is not None and (count := max(1, sentences_end(text.strip()))) > probe.max_sentences:
        return f"has {count} sentences, may have {probe.max_sentences}"
    if probe.max_words is not None and (count := len(words_of(text))) > probe.max_words:
        return f"has {count} words, may have {probe.max_words}"
    return None if text.strip(NOTHING) else "says nothing"


def _lacks(probe: Probe, text: str) -> str | None:
    for words in probe.expect:
        if not any(_has(text, word) for word in words.split("|")):
            return f"does not say {words.replace('|', ' or ')!r}"
    return None


def _has(text: str, word: str) -> bool:
    """Whether the text has the word, whatever its case; a word of letters or digits not as a part of another."""
    pattern = re.escape(word.casefold())
    if word[0].isalnum() and not is_cjk(word):
        pattern = rf"(?<![^\W_]){pattern}"
    if word[-1].isalnum() and not is_cjk(word):
        pattern = rf"{pattern}(?![^\W_])"
    return re.search(pattern, text.casefold(), re.ASCII if word.isascii() else 0) is not None


def _format(probe: Probe, text: str) -> str | None:
    return _FORMATS[probe.format or ""](probe, text)


def _json(probe: Probe, text: str) -> str | None:
    """The text, or the one code block that it consists of, is JSON."""
    fenced = _FENCE.match(text)
    try:
        value = json.loads(fenced[1] if fenced else text)
    except ValueError as error:
        return f"is no JSON alone ({error})"
    if not isinstance(value, dict | list):
        return "is no JSON object or array"
    lacking = [key for key in probe.keys if not isinstance(value, dict) or key not in value]
    return f"lacks the key {lacking[0]!r}" if lacking else None


def _bullets(probe: Probe, text: str) -> str | None:
    """Items of a list on lines of their own; one line that leads in, ending with a colon, may stand before them."""
    lines = [line for line in text.splitlines() if line.strip()]
    if lines and lines[0].rstrip("* ").endswith((":", "：")) and not _BULLET.match(lines[0]):
        lines = lines[1:]
    # Lines that are set further in belong to the item above.
    items = [line for line in lines if _BULLET.match(line) and not line.startswith(("  ", "\t"))]
    loose = [line for line in lines if not _BULLET.match(line) and not line.startswith(("  ", "\t"))]
    if not items or loose:
        return "is no list alone" if items else "is no list"
    if probe.count is not None and len(items) != probe.count:
        return f"has {len(items)} items, must have {probe.count}"
    return None


def _word(probe: Probe, text: str) -> str | None:
    del probe
    words = words_of(re.sub(r"(?<=\w)['’-](?=\w)", "", text))
    count = 1 if is_cjk(text) and _WORD_CJK.fullmatch(text) else len(words)
    return None if count == 1 else f"has {count} words, must have one"


def _number(probe: Probe, text: str) -> str | None:
    del probe
    return None if _NUMBER.fullmatch(text.strip(" \t\r\n*_`.。")) else "is not a number alone"


_FORMATS: dict[str, Callable[[Probe, str], str | None]] = {
    "json": _json,
    "bullets": _bullets,
    "word": _word,
    "number": _number,
}


def _length_ratio(text: str, reference: str | None) -> float | None:
    words = len(words_of(reference)) if reference else 0
    return len(words_of(text)) / words if words else None
