"""Faults of answers and turns: out of order, empty, cut off, the prompt again, the same over and over, too long.

In: a `View`. Out: what was found, or None. Each rule says what it takes for sound, for a rule that finds everything
finds nothing.
"""

import itertools
import json
import re
import zlib

from jax_sft.data.quality.text import (
    FENCED,
    Finding,
    View,
    is_cjk,
    looks_like_code,
    sentences_end,
    squeezed,
    tokens,
    without_code,
)

NOTHING = " \t\r\n\u00a0\u200b\u200c\u200d\u2060\ufeff\u3000.。…·,，;；:：-–—_*#`~\"'|"
PLACEHOLDERS = {
    "null",
    "nan",
    "<null>",
    "<nan>",
    "<noinput>",
    "<nooutput>",
    "<no output>",
    "undefined",
    "(空)",
    "[empty]",
}
LETTER = re.compile(r"\w")
LABEL = re.compile(
    r"\s*(?:#+\s*)?[*_>\"'“「]*\s*(?:question|prompt|instruction|user|human|q|input|问题|问|提问|用户|指令|题目)\s*"
    r"[*_]*\s*[:：]\s*[*_\"'“「]*",
    re.IGNORECASE,
)
# Words that no English sentence ends with; those that one may end with ("what I am looking for") are not here.
DANGLING = re.compile(
    r"(?:^|\s)(?:the|a|an|and|or|but|because|which|into|its|their|your|my|our|than|whether|including|between|without|"
    r"these|as|whose|both|several)$",
    re.IGNORECASE,
)
DANGLING_CJK = re.compile(
    r"(?:和|与|或|及|以及|并且|而且|因为|但是|由于|如果|通过|为了|对于|从而|例如|比如|被|把|其中|的)$"
)
OPEN_END = re.compile(r"[,，、;；:：(（\[【{「『《“]$")
CLOSED_END = re.compile(r"[.!?。！？…~～)）\]】}」』》”\"'’*_`|>]$")
LIST_LINE = re.compile(r"^\s*(?:[-*+•>|#]|\d+[.)、:]|[a-zA-Z][.)]|[①-⑳]|（?[一二三四五六七八九十]+[、）.])")
EMPTY_ITEM = re.compile(r"^\s*(?:[-*+•]|\d+[.)、])\s*$")
NOT_PROSE = re.compile(r"[=<>\\$|{}@#/_^]|https?:|\w\(|^\s*\S+:\s")
SIGNS_OFF_WORDS = 3
SIGN_OFF = re.compile(
    r"\b(?:yours|sincerely|regards|wishes|love|cheers|thanks|thank you)\b[^.!?]{0,40}$", re.IGNORECASE
)
LONG, LONG_CJK = 200, 60  # characters from which on an answer may have met a limit of tokens


def roles(view: View) -> Finding | None:
    """Turns out of order. Tools' turns and several answers in a row are sound; so is a system message at the start."""
    turns = [m for m in view.conversation.messages if m.role not in ("system", "developer")]
    all_turns = view.conversation.messages
    if not all_turns:
        return None
    if turns and turns[0].role == "assistant":
        return Finding("roles: the assistant speaks first", turns[0].content)
    seen_turn = False
    for message in all_turns:
        if message.role in ("system", "developer") and seen_turn:
            return Finding("roles: a system message in the middle", message.content)
        seen_turn = seen_turn or message.role not in ("system", "developer")
    for one, two in itertools.pairwise(all_turns):
        if one.role == two.role == "user":
            return Finding("roles: two user turns in a row", f"{one.content[:100]} | {two.content[:100]}")
    last = all_turns[-1]
    if last.role != "assistant":
        return Finding(f"roles: the last turn is of the role {last.role}, not an answer", last.content)
    return None


def empty_answer(view: View) -> Finding | None:
    """An answer without a letter, digit or sign; one that calls a tool may be."""
    for answer in view.answers:
        bare = answer.text.strip(NOTHING)
        if (
            not bare or bare.lower() in PLACEHOLDERS or answer.text.strip().lower() in PLACEHOLDERS
        ) and not answer.has_calls:
            return Finding("empty answer: nothing but space, points or a placeholder", repr(answer.text))
    return None


def repeats_prompt(view: View) -> Finding | None:
    """The answer is the prompt or begins with all of it; to quote a part, or later, is sound, as are short prompts."""
    for answer in view.answers:
        if not answer.prompt or len(answer.text) < len(answer.prompt) // 2:
            continue
        head = answer.text[: 2 * len(answer.prompt) + 80]
        if label := LABEL.match(head):
            head = head[label.end() :]
        # Most answers begin otherwise: say so before squeezing all of both.
        first, first_asked = LETTER.search(head), LETTER.search(answer.prompt)
        if not (first and first_asked and first[0].casefold()[0] == first_asked[0].casefold()[0]):
            continue
        asked = squeezed(answer.prompt[:40])
        if not asked or not squeezed(head[:80]).startswith(asked[:12]):
            continue
        asked, said = squeezed(answer.prompt), squeezed(head)
        long, least = (16, 6) if is_cjk(answer.prompt) else (32, 12)
        if said == asked and len(asked) >= least:
            return Finding("repeats prompt: the answer is the prompt", answer.text)
        if said.startswith(asked) and len(asked) >= long:
            return Finding("repeats prompt: the answer begins with the whole prompt", answer.text)
    return None


def cut_off(view: View) -> Finding | None:
    """The end of an answer is open: a code fence, JSON, a table's row, a list's item or a sentence."""
    for answer in view.answers:
        text = answer.text.rstrip()
        if text and not answer.has_calls and (what := _open_end(text)):
            return Finding(f"cut off: {what}", text[-200:])
    return None


def _open_end(text: str) -> str | None:
    fences = re.findall(r"^[ \t]*(?:[-*+>][ \t]+|\d+[.)][ \t]+)?```", text, re.MULTILINE)
    if len(fences) % 2:
        return "the answer ends inside a code fence"
    if text.endswith("```"):
        return None
    if _is_open_json(text):
        return "the answer ends inside JSON"
    lines = text.splitlines()
    last = lines[-1]
    if EMPTY_ITEM.match(last) and len(lines) > 1:
        return "the answer ends with an empty item of a list"
    if last.startswith("|") and len(lines) > 1 and lines[-2].rstrip().endswith("|") and not last.endswith("|"):
        return "the answer ends inside a row of a table"
    prose = without_code(text).rstrip()
    return "the answer ends in the middle of a sentence" if _ends_within_sentence(prose, last) else None


def _is_open_json(text: str) -> bool:
    if not re.match(r"\{\s*[\"}]|\[\s*[\"{\[]", text):
        return False
    try:
        json.JSONDecoder(strict=False).raw_decode(text)
    except ValueError:
        bare = re.sub(r"\"(?:[^\"\\]|\\.)*\"", "", text)  # no brackets of texts
        return bare.count("{") > bare.count("}") or bare.count("[") > bare.count("]") or bare.count('"') % 2 == 1
    return False


def _ends_within_sentence(text: str, last: str) -> bool:
    if len(text) < 10 or CLOSED_END.search(last) or looks_like_code(text):
        return False
    cjk = is_cjk(last)
    words = len(last.split())
    if OPEN_END.search(last):
        return (len(last) >= 8 if cjk else words > SIGNS_OFF_WORDS or last[-1] in ":：([{“") and not NOT_PROSE.search(
            last
        )
    if not (last[-1].isalnum()):
        return False  # a sign or an emoji
    if cjk:
        if len(last) >= 20 and DANGLING_CJK.search(last):
            return True
    elif words >= 4 and DANGLING.search(last):
        return True
    if len(text) < (LONG_CJK if cjk else LONG) or NOT_PROSE.search(last) or LIST_LINE.match(last):
        return False
    if not last[-1].isalpha() or SIGN_OFF.search(last):
        return False
    if sentences_end(last):  # "First this. Then the"
        return True
    # Other paragraphs end with a point, this one does not; and it is longer than a name below a letter.
    others = [line for line in text.splitlines()[:-1] if len(line) >= 20 and not LIST_LINE.match(line)]
    ends = sum(CLOSED_END.search(line.rstrip()) is not None for line in others)
    return len(others) > 0 and ends == len(others) and (len(last) >= 16 if cjk else words >= 6)


def loops(view: View) -> Finding | None:
    """The same letter, words or lines over and over; not in code, tables or rows of numbers, and not a refrain."""
    for text in view.said:
        if found := _looping(text):
            return Finding(f"loops: {found[0]}", found[1])
    return None


TAIL = 800  # characters at the end that are looked at closely: a model that loops does so to the end


def _looping(text: str) -> tuple[str, str] | None:
    if len(text) < 16:
        return None
    tail = text[-TAIL:].encode()
    # What repeats itself is packed well, and its end was there before; nearly all texts end here.
    is_suspect = text.count(text[-11:-1]) > 1 or len(set(text[-7:-1])) == 1
    if not is_suspect and len(zlib.compress(tail, 1)) > 0.55 * len(tail) + 12:
        return None
    prose = FENCED.sub("\n", text) if "```" in text else text
    if letter := re.search(r"([^\W\d_])\1{19,}", prose):
        return "one letter over and over", letter[0][:40]
    lines = [line.strip() for line in prose.splitlines() if line.strip()]
    run = 1
    for one, two in itertools.pairwise(lines):
        run = run + 1 if one == two else 1
        if run >= 4 and len(re.findall(r"[^\W\d_]", one)) >= 3 and not looks_like_code(text):
            return "one line over and over", one
    words = tokens("\n".join(line for line in lines if not line.startswith("|"))[-TAIL:])
    letters = [w for w in words if not w[0].isdigit()]
    if len(letters) < 0.7 * len(words) or not letters or looks_like_code(text):
        return None
    if _longest_run(words) >= 8:
        return "one word over and over", text[-120:]
    n = 6 if is_cjk(prose[-TAIL:]) else 4
    for window, share in ((letters, 0.5), (letters[-40:], 0.4)):
        grams = [tuple(window[i : i + n]) for i in range(len(window) - n + 1)]
        if len(grams) >= 16 and len(set(grams)) <= share * len(grams):
            return "the same words over and over", text[-160:]
    return None


def _longest_run(words: list[str]) -> int:
    longest = run = 1
    for one, two in itertools.pairwise(words):
        run = run + 1 if one == two else 1
        longest = max(longest, run)
    return longest
