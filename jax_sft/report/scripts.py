"""Which writing system a text is in, or whether it is more code than prose. By character ranges alone.

In: a text. Out: one of `SCRIPTS`. The script of a language is certain, the language in it is not: English, German and
Vietnamese are all Latin here.
"""

import re

import numpy as np

# The first code point of each range, in order, and whose it is; "" is nobody's (digits, signs, blanks).
_RANGES = (
    (0x0000, ""), (0x0041, "Latin"), (0x005B, ""), (0x0061, "Latin"), (0x007B, ""), (0x00AA, "Latin"), (0x00AB, ""),
    (0x00BA, "Latin"), (0x00BB, ""), (0x00C0, "Latin"), (0x00D7, ""), (0x00D8, "Latin"), (0x00F7, ""),
    (0x00F8, "Latin"), (0x02B0, ""), (0x0370, "Greek"), (0x0400, "Cyrillic"), (0x0530, "other"), (0x0590, "Hebrew"),
    (0x0600, "Arabic"), (0x0700, "other"), (0x0750, "Arabic"), (0x0780, "other"), (0x0870, "Arabic"),
    (0x0900, "Devanagari"), (0x0980, "other"), (0x0E00, "Thai"), (0x0E80, "other"), (0x1100, "Hangul"),
    (0x1200, "other"), (0x1C80, "Cyrillic"), (0x1C90, "other"), (0x1E00, "Latin"), (0x1F00, "Greek"), (0x2000, ""),
    (0x2C60, "Latin"), (0x2C80, "other"), (0x2DE0, "Cyrillic"), (0x2E00, ""), (0x2E80, "Han"), (0x3000, ""),
    (0x3005, "Han"), (0x3008, ""), (0x3040, "Kana"), (0x3100, "Han"), (0x3130, "Hangul"), (0x3190, ""),
    (0x31F0, "Kana"), (0x3200, ""), (0x3400, "Han"), (0x4DC0, ""), (0x4E00, "Han"), (0xA000, "other"),
    (0xA640, "Cyrillic"), (0xA6A0, "other"), (0xA720, "Latin"), (0xA800, "other"), (0xA8E0, "Devanagari"),
    (0xA900, "other"), (0xA960, "Hangul"), (0xA980, "other"), (0xAB30, "Latin"), (0xAB70, "other"),
    (0xAC00, "Hangul"), (0xD800, ""), (0xF900, "Han"), (0xFB00, "Latin"), (0xFB07, "other"), (0xFB1D, "Hebrew"),
    (0xFB50, "Arabic"), (0xFE00, ""), (0xFE70, "Arabic"), (0xFEFF, ""), (0xFF21, "Latin"), (0xFF3B, ""),
    (0xFF41, "Latin"), (0xFF5B, ""), (0xFF66, "Kana"), (0xFFA0, "Hangul"), (0xFFE0, ""), (0x10000, "other"),
    (0x1F000, ""), (0x20000, "Han"), (0x323B0, ""),
)  # fmt: skip
_WRITTEN = ("Latin", "Han", "Kana", "Hangul", "Cyrillic", "Arabic", "Devanagari", "Thai", "Greek", "Hebrew", "other")
SCRIPTS = (*_WRITTEN, "mixed", "code", "no letters")

_STARTS = np.asarray([start for start, _ in _RANGES])
_NUMBERS = np.asarray([_WRITTEN.index(name) if name else -1 for _, name in _RANGES])
_DENSE = ("Han", "Kana", "Hangul")  # a character of these says as much as a few letters of an alphabet
_LETTERS_IN_DENSE = 3
_ONE_SCRIPT = 0.8  # of the letters: less than that in one script is mixed
_JAPANESE = 0.1  # of Han and Kana together: Japanese has more kana than this, Chinese has none
_FENCED = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
_CODE_SIGNS = frozenset("{}[]()<>;=_\\/|&^$#~")
_CODE = 0.12  # of all characters but blanks: prose has a few of a hundred
_FENCED_CODE = 0.5  # of the text


def script_of(text: str) -> str:
    """One of `SCRIPTS`: whose most letters are; "mixed" where no script has four of five, "code" before all others."""
    solid = [c for c in text if not c.isspace()]
    if not solid:
        return "no letters"
    fenced = sum(len(block) for block in _FENCED.findall(text))
    if fenced >= _FENCED_CODE * len(text) or sum(c in _CODE_SIGNS for c in solid) > _CODE * len(solid):
        return "code"
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    numbers = _NUMBERS[np.searchsorted(_STARTS, codes, side="right") - 1]
    counts = np.bincount(numbers[numbers >= 0], minlength=len(_WRITTEN))
    letters = {
        name: int(n) * (_LETTERS_IN_DENSE if name in _DENSE else 1) for name, n in zip(_WRITTEN, counts, strict=True)
    }
    if letters["Kana"] > _JAPANESE * (letters["Han"] + letters["Kana"]):
        letters["Kana"], letters["Han"] = letters["Kana"] + letters["Han"], 0
    most, total = max(letters, key=lambda name: letters[name]), sum(letters.values())
    if not total:
        return "no letters"
    return most if letters[most] >= _ONE_SCRIPT * total else "mixed"
