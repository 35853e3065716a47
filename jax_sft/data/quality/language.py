"""The language of a prompt and of its answer: told by script, or by a model where scripts are the same.

In: a `View`. Out: what was found, or None. Short and mixed texts are unknown, and what is unknown is not wrong.
"""

import functools
import re
from collections.abc import Callable

from jax_sft.data.conversation import DataError
from jax_sft.data.quality.text import Finding, View, looks_like_code, without_code

SCRIPTS = {
    "Latin": "A-Za-z\u00c0-\u024f\u1e00-\u1eff",
    "Han": "\u3400-\u4dbf\u4e00-\u9fff",
    "Kana": "\u3040-\u30ff",
    "Hangul": "\uac00-\ud7af\u1100-\u11ff",
    "Cyrillic": "\u0400-\u04ff",
    "Greek": "\u0370-\u03ff",
    "Arabic": "\u0600-\u06ff",
    "Hebrew": "\u0590-\u05ff",
    "Devanagari": "\u0900-\u097f",
    "Thai": "\u0e00-\u0e7f",
}
_COUNTED = {script: re.compile(f"[{letters}]") for script, letters in SCRIPTS.items()}
DENSE = {"Han", "Kana", "Hangul"}  # a character of these says as much as three letters
LEAST = 40  # letters of an answer that is judged, a dense one counted three times
LEAST_PROMPT = 12
LEAST_MODEL_CHARACTERS = 80  # shorter texts mislead the model
SURE = 0.9  # probability from which the model is believed

_NAMED = re.compile(
    r"translat|transliterat|languages?\b|bilingual|pinyin|romaji|\b(?:english|chinese|mandarin|cantonese|japanese|"
    r"korean|"
    r"french|german|spanish|italian|portuguese|russian|arabic|hebrew|hindi|thai|greek|latin|dutch|turkish|polish|"
    r"swedish|"
    r"vietnamese|indonesian|ukrainian|persian|farsi|urdu|bengali|czech|danish|finnish|norwegian|hungarian|romanian|"
    r"catalan|galician|basque|bulgarian|serbian|croatian|slovak|tamil|telugu|marathi|punjabi|swahili|malay|tagalog)\b|"
    r"翻译|译成|译为|英译|中译|[英汉中日韩法德俄]译|双语|拼音|语言|[英中日韩法德俄汉外母]语|[英中日韩法德俄]文|"
    r"葡萄牙语|西班牙语|阿拉伯语|意大利语|"
    r"翻訳|訳し|번역|영어|한국어|日本語|перев|по-(?:русски|английски)|traduc|tradui|übersetz|"
    r"\b(?:französisch|englisch|deutsch|spanisch|anglais|français|allemand|inglés|español|english)\b"
)
_PROGRAMS = re.compile(
    r"\b(?:code|python|java|javascript|sql|regex|script|html|css|bash|shell|api|json|linux|command|function|c\+\+|"
    r"formula|latex)\b|"
    r"代码|程序|函数|正则|命令|编程|脚本|公式|变量|算法|关键词|歌名|书名|片名"
)


def script_of(text: str, *, least: int = LEAST) -> tuple[str, dict[str, float]]:
    """The script that most of the text is written in, or "unknown"; and each script's share of the letters."""
    counts = {script: len(pattern.findall(text)) for script, pattern in _COUNTED.items()}
    weights = {script: n * (3 if script in DENSE else 1) for script, n in counts.items()}
    total = sum(weights.values())
    if total < least:
        return "unknown", {}
    shares = {script: n / total for script, n in weights.items()}
    if shares["Kana"] >= 0.1 and shares["Kana"] + shares["Han"] >= 0.6:  # Japanese has both
        return "Kana", shares
    best = max(shares, key=lambda s: shares[s])
    return (best if shares[best] >= 0.7 else "unknown"), shares


def wrong_language(view: View, *, by: str) -> Finding | None:
    """An answer in another language than its prompt, where nothing asks for a translation or names a language."""
    for answer in view.answers:
        if not answer.prompt or len(answer.text) < LEAST // 3:
            continue
        if answer.prompt.isascii() and answer.text.isascii() and by == "script":
            continue  # both are Latin, if anything
        said = _prose(answer.text)
        its, shares_said = script_of(said)
        asked_text = _prose(answer.prompt)
        asked, _ = script_of(asked_text, least=LEAST_PROMPT)
        if "unknown" in (its, asked):
            continue
        if its == asked:
            found = _by_model(asked_text, said) if by == "model" else None
        else:
            # What is about a foreign word or text, here or in an earlier turn, may well be answered in that language.
            # Chinese and Japanese share characters: there kana alone tell.
            _, shares_all = script_of(view.asked, least=LEAST_PROMPT)
            share = shares_all[its] if {its, asked} != {"Han", "Kana"} else 0.0
            is_mixed = (shares_said[asked] >= 0.3 and its != "Kana") or share >= 0.05
            found = None if is_mixed else (f"written in {asked}", f"written in {its}")
        if found is None or _NAMED.search(view.asked):
            continue
        if its == "Latin" and (_PROGRAMS.search(view.asked) or looks_like_code(answer.text)):
            continue
        return Finding(
            f"wrong language: a prompt {found[0]}, an answer {found[1]}", f"{answer.prompt[:120]} | {answer.text[:150]}"
        )
    return None


def _prose(text: str) -> str:
    return re.sub(r"https?://\S+|[\w.]+@[\w.]+|\$[^$\n]*\$|\\\w+", " ", without_code(text))


def _by_model(asked: str, said: str) -> tuple[str, str] | None:
    languages = [language_of(text) for text in (asked, said)]
    if "unknown" in languages or languages[0] == languages[1]:
        return None
    return f"in {languages[0]!r}", f"in {languages[1]!r}"


def language_of(text: str) -> str:
    """The language by `py3langid`, such as "en"; "unknown" if the text is short or the model is not sure."""
    if len(text) < LEAST_MODEL_CHARACTERS:
        return "unknown"
    language, probability = _model()(text)
    return language if probability >= SURE else "unknown"


@functools.cache
def _model() -> Callable[[str], tuple[str, float]]:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise DataError(
            "data.quality.language_by = 'model' needs py3langid, which is not installed; pip install "
            "'jax-sft[quality]', or set it to 'script'"
        ) from error
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True).classify


def check_model() -> None:
    """Say at the start, not at the first long row, that the model is not installed.

    Raises:
        DataError: with what to install.
    """
    _model()
