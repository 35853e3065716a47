import unicodedata

import pytest

from jax_sft.report.scripts import _RANGES, SCRIPTS, script_of

TEXTS = [
    ("The train leaves at nine.", "Latin"),
    ("Größe, façade, žluťoučký kůň, Tiếng Việt", "Latin"),
    ("火车九点开。", "Han"),
    ("电车は九時に出ます。", "Kana"),
    ("カタカナ", "Kana"),
    ("기차는 아홉 시에 떠납니다.", "Hangul"),
    ("Поезд отходит в девять.", "Cyrillic"),
    ("يغادر القطار في التاسعة", "Arabic"),
    ("ट्रेन नौ बजे निकलती है", "Devanagari"),
    ("รถไฟออกเก้าโมง", "Thai"),
    ("Το τρένο φεύγει στις εννέα", "Greek"),
    ("הרכבת יוצאת בתשע", "Hebrew"),
    ("மின்சாரம்", "other"),
    ("The word 火车站台 means a platform", "mixed"),
    ("用 Python 写的程序在这里运行得很好，没有问题。", "Han"),  # a name in another script does not make it mixed
    ("12 + 30 is 42", "Latin"),
    ("1.5, 2.5, 3.5!", "no letters"),
    ("🙂🙂", "no letters"),
    ("", "no letters"),
    (" \n", "no letters"),
    ("def f(x):\n    return {k: v for (k, v) in x.items()}", "code"),
    ("So:\n```python\nprint the sum of all numbers\nand then another\n```\nDone.", "code"),
    ("```\nnever closed, the text of a code fence", "code"),
    ("A list:\n- one (the first)\n- two; and more\nUse `x` for it.", "Latin"),
]


@pytest.mark.parametrize(("text", "script"), TEXTS)
def test_a_text_is_of_the_script_that_most_of_its_letters_have(text, script):
    assert script_of(text) == script
    assert script in SCRIPTS


def test_every_letter_that_unicode_names_after_a_script_is_in_it():
    named = {"LATIN": "Latin", "CYRILLIC": "Cyrillic", "HANGUL": "Hangul", "DEVANAGARI": "Devanagari", "THAI": "Thai"}
    named |= {"ARABIC": "Arabic", "HEBREW": "Hebrew", "GREEK": "Greek", "CJK": "Han", "HIRAGANA": "Kana"}
    # Phonetic signs (0x1D00 on, and two letters for scholars) may be anywhere.
    left_out = {*range(0x1D00, 0x1E00), 0x2183, 0x2184, 0xAB65}
    wrong = []
    for code in set(range(0x10000)) - left_out:
        character = chr(code)
        if unicodedata.category(character) not in ("Lu", "Ll", "Lo"):
            continue
        first = unicodedata.name(character, "").split(" ")[0]
        if first in named and script_of(character) != named[first]:
            wrong.append((hex(code), unicodedata.name(character), script_of(character)))
    assert wrong == []


def test_the_ranges_do_not_overlap():
    starts = [start for start, _ in _RANGES]
    assert starts == sorted(set(starts))


def test_half_a_surrogate_pair_is_no_letter():
    assert script_of("\ud800") == "no letters"
