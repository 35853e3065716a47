"""Answers against references as texts: the same answer, the same words, the label that was named.

In: predictions and references. Out: 0..1 for each row. English is normalised as SQuAD does (Rajpurkar et al. 2016,
arXiv 1606.05250; empty answers as in its version 2), Chinese, Japanese and Korean are compared by characters.
"""

import collections
import re
import string
import unicodedata
from collections.abc import Sequence

from jax_sft.data.quality.text import CJK, CJK_CHARACTER
from jax_sft.evaluate.metrics.result import Measured

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PIECES = re.compile(f"[{CJK}]|[^\\s{CJK}]+")
_HALF_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: 0x20}
_WORD = f"[^\\W{CJK}]"  # a character of a word that spaces end


def pieces(text: str) -> list[str]:
    """What is left of an answer: words without case, punctuation and articles; of CJK, the characters.

    Full-width letters and digits become plain ones. A text of punctuation or articles alone, such as the choice "A", is
    its own only piece, for else it would be the same as every other of them.
    """
    plain = text.translate(_HALF_WIDTH).lower()
    is_cjk = CJK_CHARACTER.search(plain) is not None
    kept = "".join(c for c in plain if not _is_punctuation(c, is_cjk))
    return _PIECES.findall(_ARTICLES.sub(" ", kept)) or plain.split()


def _is_punctuation(character: str, is_cjk: bool) -> bool:
    """SQuAD knows only that of ASCII; in Chinese texts all of it counts, and that of Chinese counts everywhere."""
    if character in string.punctuation or "\u3001" <= character <= "\u303f":
        return True
    return is_cjk and unicodedata.category(character).startswith("P")


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> Measured:
    """1 where nothing but case, punctuation, articles and spaces differs."""
    return Measured.rows([pieces(p) == pieces(r) for p, r in zip(predictions, references, strict=True)])


def f1(predictions: Sequence[str], references: Sequence[str]) -> Measured:
    """The harmonic mean of precision and recall of the words (characters of CJK), each counted as often as it is."""
    return Measured.rows([f_of(pieces(p), pieces(r)) for p, r in zip(predictions, references, strict=True)])


def f_of(found: Sequence, wanted: Sequence) -> float:
    """F1 of two bags. Nothing against nothing is 1, against something 0."""
    if not found or not wanted:
        return float(not found and not wanted)
    shared = (collections.Counter(found) & collections.Counter(wanted)).total()
    return 2 * shared / (len(found) + len(wanted))


def label_accuracy(
    predictions: Sequence[str], references: Sequence[str], *, labels: Sequence[str] | None = None
) -> Measured:
    """1 where the first label that the answer names is the reference; 0 where it names another, or none.

    `labels` are those of the references unless they are given. Of two that begin at one place the longer is named. Case
    is ignored, but for labels of one letter, for "a" is a word. A Latin label is a whole word; a Chinese one is found
    anywhere, so with the labels 正确 and 错误, "不正确" names 正确: give 不正确 as a label too. What is denied counts
    as named.

    Raises:
        ValueError: an empty label, or a reference that is not among `labels`.
    """
    known = {_label(name): name for name in (references if labels is None else labels)}
    if "" in known:
        raise ValueError("label_accuracy: a label is empty; give each row the label that is right")
    for row, reference in enumerate(references, 1):
        if _label(reference) not in known:
            raise ValueError(f"row {row}: the reference {reference!r} is not among the labels; add it to labels")
    pattern = re.compile("|".join(_pattern(label) for label in sorted(known, key=len, reverse=True)))
    return Measured.rows([_named(p, pattern) == _label(r) for p, r in zip(predictions, references, strict=True)])


def _label(text: str) -> str:
    """What two spellings of a label have in common."""
    label = " ".join(text.translate(_HALF_WIDTH).split())
    return label if len(label) == 1 else label.lower()


def _pattern(label: str) -> str:
    body = r"\s+".join(re.escape(word) for word in label.split())
    before = f"(?<!{_WORD})" if re.match(_WORD, label) else ""
    after = f"(?!{_WORD})" if re.match(_WORD, label[-1]) else ""
    if label[-1].isdigit():
        after += r"(?!\.\d)"
    return before + (body if len(label) == 1 else f"(?i:{body})") + after


def _named(text: str, pattern: re.Pattern[str]) -> str | None:
    found = pattern.search(text.translate(_HALF_WIDTH))
    return _label(found[0]) if found else None
