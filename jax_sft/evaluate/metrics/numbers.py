r"""The number that an answer ends with, against that of the reference: arithmetic as in GSM8K (arXiv 2110.14168).

In: predictions and references. Out: 0 or 1 for each row. Numbers are compared exactly: 0.5, .50, 1/2 and
\frac{1}{2} are one. Signs of money and of percent are ignored; numbers in words (twelve, 十二, 3万) are not read.
"""

import decimal
import fractions
import re
from collections.abc import Sequence

from jax_sft.evaluate.metrics.result import Measured

MARK = "####"  # GSM8K's answer is behind it
_BEFORE = " \t*$€£¥￥"  # what may stand between them
_PLAIN = str.maketrans("０１２３４５６７８９．／－−％＃", "0123456789./--%#")
# A Chinese comma parts the members of a list too: only between wide digits does it part thousands.
_WIDE_THOUSANDS = re.compile(r"(?<=[０-９])，(?=[０-９]{3}(?![０-９]))")
_LATEX = ((re.compile(r"\\[dt]?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}"), r"\1/\2"), (re.compile(r"\{,\}|\\,"), ","))
_MONEY = r"(?:\\?[$€£¥￥]\s?)?"
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w)\].%])-{_MONEY})?"
    r"(?:(?P<whole>[0-9]{1,9})\ (?=[0-9]+/[1-9]))?"  # of 1 1/2
    r"(?P<digits>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?P<power>[eE][+-]?[0-9]{1,3}(?!\w))?"
    r"(?:\s?/\s?(?P<below>[0-9]+)(?![0-9]*\.[0-9]))?"
)


def final_number(predictions: Sequence[str], references: Sequence[str], *, tolerance: float = 0.0) -> Measured:
    """1 where the last number of the answer is that of the reference, or that behind "####" where it stands.

    `tolerance` is the largest difference that counts as none, as a share of the reference: 0.01 takes 99.5 for 100.

    Raises:
        ValueError: a reference without a number.
    """
    values = []
    for row, (prediction, reference) in enumerate(zip(predictions, references, strict=True), 1):
        wanted, found = number_of(reference), number_of(prediction)
        if wanted is None:
            raise ValueError(
                f"row {row}: the reference {reference[-80:]!r} has no number; leave it out, or score by exact_match"
            )
        values.append(found is not None and abs(found - wanted) <= fractions.Fraction(tolerance) * abs(wanted))
    return Measured.rows(values)


def number_of(text: str) -> fractions.Fraction | None:
    """The number right behind the last "####", or else the last of the text; None if it has none.

    A heading of Markdown, such as "#### Step 3", marks nothing.
    """
    plain = _WIDE_THOUSANDS.sub(",", text).translate(_PLAIN)
    for pattern, replacement in _LATEX:
        plain = pattern.sub(replacement, plain)
    _, mark, behind = plain.rpartition(MARK)
    if mark and (marked := _NUMBER.match(behind.lstrip(_BEFORE))):
        return _value(marked)
    found = list(_NUMBER.finditer(plain))
    return _value(found[-1]) if found else None


def _value(match: re.Match[str]) -> fractions.Fraction:
    value = fractions.Fraction(decimal.Decimal(match["digits"].replace(",", "") + (match["power"] or "")))
    if match["below"] and (below := fractions.Fraction(decimal.Decimal(match["below"]))):
        value /= below
    value += int(match["whole"] or 0)
    return -value if match["sign"] else value
