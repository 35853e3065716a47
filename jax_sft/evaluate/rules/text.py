"""What the rules count: sentences, paragraphs, lines, words, Chinese characters, emoji.

In: an answer. Out: its parts, in order.
"""

import re
import unicodedata

from jax_sft.data.quality.text import CJK

HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]")
EMOJI = re.compile(
    r"[\U0001f1e6-\U0001f1ff]{2}"  # a flag
    r"|[\u2600-\u27bf\u2b50\u2b55\U0001f300-\U0001faff]"
    r"(?:\ufe0f|[\U0001f3fb-\U0001f3ff]|\u200d[\u2600-\u27bf\U0001f300-\U0001faff])*"
)
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_WORD = re.compile(f"[{CJK}]|[^\\W_{CJK}]+(?:['’-][^\\W_{CJK}]+)*")
_STOP = re.compile(r"[.!?]+[\"'”’)\]*]*(?=\s|$)|[。！？]+[”’」』）\"*]*")
_TITLES = {
    "mr",
    "mrs",
    "ms",
    "dr",
    "prof",
    "st",
    "gen",
    "capt",
    "lt",
    "col",
    "rev",
    "vs",
    "e.g",
    "i.e",
    "fig",
    "approx",
}
_SHORT_FORMS = {"etc", "inc", "ltd", "co", "jr", "sr", "a.m", "p.m", "u.s", "u.k", "ph.d", "no", "vol", "dept"}
_LAST_WORD = re.compile(r"[^\s(\[\"“‘']*$")


def sentences(text: str) -> list[str]:
    """Split behind . ! ? where space follows, and behind 。！？; not behind abbreviations, initials, list numbers."""
    found, start = [], 0
    for stop in _STOP.finditer(text):
        if not _is_inside(text, stop):
            found.append(text[start : stop.end()].strip())
            start = stop.end()
    return [sentence for sentence in [*found, text[start:].strip()] if re.search(r"\w", sentence)]


def _is_inside(text: str, stop: re.Match) -> bool:
    """Whether a point does not end its sentence."""
    mark = stop[0].rstrip("\"'”’)]*")
    following = text[stop.end() :].lstrip()[:1]
    if mark.endswith("..."):
        return following.islower()
    if mark != ".":
        return False
    line = text[text.rfind("\n", 0, stop.start()) + 1 : stop.start()]
    if line.strip().isdigit():  # the number of an item of a list
        return True
    found = _LAST_WORD.search(line)
    word = found[0].lower() if found else ""
    is_initial = len(word) == 1 and word.isalpha() and word != "i"
    return word in _TITLES or (is_initial and following.isupper()) or (word in _SHORT_FORMS and following.islower())


def paragraphs(text: str) -> list[str]:
    """What stands between blank lines, without empty ones."""
    return [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]


def lines(text: str) -> list[str]:
    """Its lines without space around them, and without empty ones."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def words(text: str) -> list[str]:
    """Words with their hyphens and apostrophes; a Chinese character is one."""
    return _WORD.findall(text)


def count_words(text: str) -> int:
    """Runs of letters, digits and underscores, as IFEval counts; a vowel sign, as Hindi has them, ends no word."""
    if not text.isascii():
        text = "".join(letter for letter in text if not unicodedata.category(letter).startswith("M"))
    return len(re.findall(r"\w+", text))


def word_pattern(word: str) -> re.Pattern:
    """Finds `word` in either case as a word of its own; Chinese has no spaces, so there any place will do."""
    letter = f"[^\\W{CJK}]"
    before = f"(?<!{letter})" if re.match(letter, word) else ""
    after = f"(?!{letter})" if re.match(letter, word[-1]) else ""
    return re.compile(before + re.escape(word) + after, re.IGNORECASE)


def capital_words(text: str) -> list[str]:
    """Words all of whose letters are capitals; hyphenated ones are one word, "DON'T" and "I'M" are two as in NLTK."""
    pieces = re.split(r"[\s;@#$%&?!*()\[\]{}<>\"“”«»…]+|--+|\.{2,}|[,:](?!\d)", text)
    pieces = [part for piece in pieces for part in re.split(r"(?<=\w)(?='(?:S|M|D|LL|RE|VE)$|N'T$)", piece)]
    return [piece for piece in pieces if piece.isupper()]
