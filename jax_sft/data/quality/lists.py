"""What the user brings: lists of words that should not be there, and a model's scores of the answers.

In: text files with a word or phrase a line; JSON lines of `id`, `loss`, `loss_without_prompt`, `ratio`. Out: what was
found in a conversation, or None.
"""

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from jax_sft.config import QualityConfig
from jax_sft.data.conversation import DataError
from jax_sft.data.quality.text import CJK_CHARACTER, Finding, View, around

NO_SCORE = "score: there is none of this id in data.quality.scores, it stays"


@dataclasses.dataclass(frozen=True)
class Words:
    """Words and phrases of one or more lists: whole words, or anywhere if they are of Chinese, Japanese or Korean."""

    pattern: re.Pattern[str]

    def __call__(self, view: View) -> Finding | None:
        """What is found in any turn."""
        for text in view.texts:
            if match := self.pattern.search(text):
                return Finding("words: a word of data.quality.word_lists", around(text, *match.span()))
        return None


def read_words(paths: Sequence[str]) -> Words:
    """All lists as one.

    Raises:
        DataError: a file cannot be read or holds no word.
    """
    words: dict[str, None] = {}
    for path in paths:
        lines = [line.partition("#")[0].strip() for line in _lines(path, "word_lists")]
        if not any(lines):
            raise DataError(f"{path}: holds no word; write one a line, or leave it out of data.quality.word_lists")
        words.update(dict.fromkeys(filter(None, lines)))
    whole = [w for w in words if not CJK_CHARACTER.search(w)]
    anywhere = [w for w in words if CJK_CHARACTER.search(w)]
    either = []
    for some, form in ((whole, r"(?<!\w)(?:{})(?!\w)"), (anywhere, "(?:{})")):
        if some:  # the longest first; any space may stand between the words of a phrase
            sorted_words = sorted(some, key=len, reverse=True)
            either.append(form.format("|".join(r"\s+".join(map(re.escape, w.split())) for w in sorted_words)))
    return Words(re.compile("|".join(either), re.IGNORECASE))


@dataclasses.dataclass(frozen=True)
class Scores:
    """What a model makes of each conversation's answers, and the bounds."""

    by_id: dict[str, dict[str, float]]
    config: QualityConfig

    def __call__(self, view: View) -> Finding | None:
        """A score outside of the bounds; `NO_SCORE` where there is none."""
        found = self.by_id.get(view.conversation.id)
        if found is None:
            return Finding(NO_SCORE, "")
        said = ", ".join(f"{key} {value:.4g}" for key, value in found.items())
        bounds = (
            ("ratio", self.config.min_ratio, "min_ratio", -1),
            ("ratio", self.config.max_ratio, "max_ratio", 1),
            ("loss", self.config.max_loss, "max_loss", 1),
        )
        for key, bound, name, sign in bounds:
            value = found.get(key)
            if bound is not None and value is not None and sign * value > sign * bound:
                side = "below" if sign < 0 else "above"
                answer = view.said[-1] if view.said else ""
                return Finding(f"score: {key} {side} data.quality.{name}", f"{said}: {answer[:150]}")
        return None


def read_scores(path: str, config: QualityConfig) -> Scores:
    """The file of scores.

    Raises:
        DataError: it cannot be read, a line is not as it should be, or an id is there twice.
    """
    by_id: dict[str, dict[str, float]] = {}
    needed = [
        k
        for k, b in (("ratio", (config.min_ratio, config.max_ratio)), ("loss", (config.max_loss,)))
        if any(v is not None for v in b)
    ]
    for number, line in enumerate(_lines(path, "scores"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        row = _object(line, where)
        name = str(row["id"])
        values = {key: row[key] for key in ("loss", "loss_without_prompt", "ratio") if row.get(key) is not None}
        for key in needed:
            if key not in row:
                raise DataError(
                    f"{where}: has no {key!r}, which the bounds of data.quality are about; write it, or null"
                )
        for key, value in values.items():
            if not _is_number(value):
                raise DataError(f"{where}: {key} is {value!r}; write a finite number, or null where there is none")
        if name in by_id:
            raise DataError(f"{where}: the id {name!r} has a score already; give each conversation an id of its own")
        by_id[name] = {key: float(value) for key, value in values.items()}
    if not by_id:
        raise DataError(f"{path}: holds no score; write JSON lines of id, loss, loss_without_prompt, ratio")
    return Scores(by_id, config)


def _is_number(value: Any) -> bool:
    """Whether it is a finite number; JSON of Python knows NaN and Infinity too."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # more digits than a float has
        return False


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict) or not isinstance(row.get("id"), str | int):
        raise DataError(f"{where}: is no score; write an object with id, loss, loss_without_prompt and ratio")
    return row


def _lines(path: str, key: str) -> list[str]:
    try:
        return pathlib.Path(path).expanduser().read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        what = getattr(error, "strerror", None) or "it is not UTF-8"
        raise DataError(f"data.quality.{key}: {path} cannot be read ({what}); name a text file in UTF-8") from error
