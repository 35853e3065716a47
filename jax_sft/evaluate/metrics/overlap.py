"""How much of a reference's text an answer has: BLEU and chrF by sacrebleu, ROUGE here.

In: predictions and references. Out: BLEU and chrF in 0..100, over the counts of all rows; ROUGE in 0..1, each row's
F-measure (Lin 2004) of lower-cased words without stemming, and of the characters of CJK.
"""

import importlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from jax_sft.data.quality.text import WORD
from jax_sft.evaluate.metrics.result import Measured
from jax_sft.evaluate.metrics.texts import f_of

_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff]")
_LETTER = re.compile(r"[^\W\d_]")
ZH_SHARE = 0.5  # of the letters of the references, from which on they are Chinese


def rouge1(predictions: Sequence[str], references: Sequence[str]) -> Measured:
    """F-measure of single words."""
    return _rouge_n(predictions, references, 1)


def rouge2(predictions: Sequence[str], references: Sequence[str]) -> Measured:
    """F-measure of pairs of words; 0 where a text has but one."""
    return _rouge_n(predictions, references, 2)


def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> Measured:
    """F-measure of the longest common subsequence, over the whole text (rougeL, not rougeLsum)."""
    return Measured.rows([_f_of_lcs(_words(p), _words(r)) for p, r in zip(predictions, references, strict=True)])


def _words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def _rouge_n(predictions: Sequence[str], references: Sequence[str], n: int) -> Measured:
    pairs = ((_runs(p, n), _runs(r, n)) for p, r in zip(predictions, references, strict=True))
    return Measured.rows([f_of(found, wanted) if found and wanted else 0.0 for found, wanted in pairs])


def _runs(text: str, n: int) -> list[tuple[str, ...]]:
    words = _words(text)
    return list(zip(*(words[i:] for i in range(n)), strict=False))


def _f_of_lcs(found: list[str], wanted: list[str]) -> float:
    return 2 * longest_common(found, wanted) / (len(found) + len(wanted)) if found and wanted else 0.0


def longest_common(one: Sequence[str], two: Sequence[str]) -> int:
    """Length of the longest common subsequence, a bit for each word of `one` (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for i, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << i
    every = (1 << len(one)) - 1
    row = every  # a zero where the subsequence grows
    for word in two:
        matched = row & places.get(word, 0)
        row = ((row + matched) | (row - matched)) & every
    return len(one) - row.bit_count()


def bleu(predictions: Sequence[str], references: Sequence[str], *, tokenize: str | None = None) -> Measured:
    """BLEU as sacrebleu makes it; `by_row` is that of each sentence, with effective order.

    `tokenize` is a name of sacrebleu's; None is "zh" where the references are mainly Chinese, else "13a". For
    Japanese and Korean, name "char", or one of sacrebleu's that needs a package of its own.

    Raises:
        ValueError: sacrebleu is not installed, or does not know the tokeniser.
    """
    tokenize = tokenize or ("zh" if is_chinese(references) else "13a")
    kind = _of_sacrebleu("bleu").BLEU
    if tokenize not in kind.TOKENIZERS:
        raise ValueError(f"bleu: tokenize = {tokenize!r} is none of sacrebleu's {', '.join(kind.TOKENIZERS)}")
    whole = kind(tokenize=tokenize, force=True)  # force: no advice about answers that end in " ."
    # effective_order changes scores of sentences alone; both objects count the same.
    return _corpus(whole, kind(tokenize=tokenize, effective_order=True), predictions, references)


def chrf(predictions: Sequence[str], references: Sequence[str], *, word_order: int = 0) -> Measured:
    """ChrF as sacrebleu makes it, or chrF++ with `word_order=2`; spaces do not count, so Chinese needs nothing else.

    Raises:
        ValueError: sacrebleu is not installed.
    """
    metric = _of_sacrebleu("chrf").CHRF(word_order=word_order)
    return _corpus(metric, metric, predictions, references)


def is_chinese(texts: Sequence[str]) -> bool:
    """Whether at least half of their letters are Han."""
    han, letters = (sum(len(pattern.findall(text)) for text in texts) for pattern in (_HAN, _LETTER))
    return han > 0 and han >= ZH_SHARE * letters


def _of_sacrebleu(module: str) -> Any:
    try:
        return importlib.import_module(f"sacrebleu.metrics.{module}")
    except ImportError as error:
        raise ValueError(
            f"{module} is counted by sacrebleu, which is not installed; pip install 'jax-sft[eval]', or score by "
            "rougeL, which needs nothing"
        ) from error


def _corpus(metric: Any, of_sentences: Any, predictions: Sequence[str], references: Sequence[str]) -> Measured:
    """What sacrebleu counts in each row, by the two methods that each of its metrics has to have."""
    counted = metric._extract_corpus_statistics(list(predictions), [list(references)])
    by_row = tuple(of_sentences._compute_score_from_stats(list(row)).score for row in counted)

    def combine(sums: np.ndarray, _: int) -> float:
        return metric._compute_score_from_stats([int(n) for n in sums]).score

    return Measured(by_row, np.asarray(counted, np.int64), combine, notes=(str(metric.get_signature()),))
