"""Prompts that measure a model must not be in what it is trained on.

In: the prompts of validation sets and of benchmark files. Out: an index of their runs of words (characters in Chinese,
Japanese and Korean) that says of a conversation which prompt is in it. As in GPT-3 (arXiv 2005.14165, appendix C).
"""

import collections
import dataclasses
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

from jax_sft.config import QualityConfig
from jax_sft.data.conversation import Conversation, DataError
from jax_sft.data.quality.text import Finding, View, is_cjk, tokens
from jax_sft.data.source import read_rows

FIELDS = (
    "question",
    "prompt",
    "instruction",
    "problem",
    "input",
    "query",
    "text",
)  # of benchmarks, the first that is there
SHORTEST_WORDS, SHORTEST_CHARACTERS = 6, 10  # shorter ones, such as "Go on", leak where they are all the user says
REASON = "leakage: a prompt of the validation set or of a benchmark"
COMMON = 10  # prompts with the same run of words: it is of their form, not of one of them


@dataclasses.dataclass(frozen=True)
class Reference:
    """A prompt that must not be trained on, and where it is from."""

    text: str
    where: str
    is_all: bool = True  # all that the user says there; not one turn of several


def prompts_of(conversations: Iterable[Conversation]) -> Iterator[Reference]:
    """What users say in validation conversations, turn by turn."""
    for of in conversations:
        said = _asked(of)
        yield from (Reference(text, of.where or of.id, is_all=len(said) == 1) for text in said)


def _asked(of: Conversation) -> list[str]:
    """What the user says, turn by turn; of a text its prompt, or all of it."""
    if of.text is not None:
        return [of.prompt_text or of.text]
    return [message.content for message in of.messages if message.role == "user"]


def benchmark_prompts(paths: Sequence[str], *, split: str) -> Iterator[Reference]:
    """The prompts of benchmark files.

    Raises:
        DataError: of `source`; a row has no column that is a prompt.
    """
    for row, where in read_rows(paths, split=split) if paths else ():
        turns = row.get("messages") or row.get("conversations")
        if isinstance(turns, list):
            said = [t.get("content") or t.get("value") for t in turns if isinstance(t, dict)
                    and (t.get("role") or t.get("from")) in ("user", "human")]  # fmt: skip
            yield from (Reference(text, where, is_all=len(said) == 1) for text in said if isinstance(text, str))
            continue
        text = next((row[f] for f in FIELDS if isinstance(row.get(f), str) and row[f].strip()), None)
        if text is None:
            raise DataError(
                f"{where}: a row of data.quality.benchmarks has no text in {', '.join(FIELDS)} or messages, but "
                f"{', '.join(map(repr, row))}; write its prompt into one of these"
            )
        yield Reference(text, where)


class Leaks:
    """The index of references: hash of a run of words -> the references that have it."""

    def __init__(self, references: Iterable[Reference], config: QualityConfig) -> None:
        self._config = config
        self._places: list[str] = []
        self._counts: list[int] = []
        found: dict[int, list[int]] = collections.defaultdict(list)
        self._lengths: dict[bool, set[int]] = {True: set(), False: set()}
        self._short: dict[str, str] = {}  # what is all that a user says -> place
        known: set[tuple[str, ...]] = set()  # a prompt that is there several times is no form that several share
        for reference in references:
            cjk, parts = _parts(reference.text)
            full = config.leakage_characters if cjk else config.leakage_words
            length = min(full, len(parts))
            if length < min(full, SHORTEST_CHARACTERS if cjk else SHORTEST_WORDS):
                if reference.is_all and (said := _as_said(reference.text)):
                    self._short.setdefault(said, reference.where)
                continue
            if tuple(parts) in known:
                continue
            known.add(tuple(parts))
            runs = set(_runs(parts, length))
            self._lengths[cjk].add(length)
            for run in runs:
                found[run].append(len(self._places))
            self._places.append(reference.where)
            self._counts.append(len(runs))
        self._index = {run: of for run, of in found.items() if len(of) <= COMMON}
        for run, of in found.items():
            if run not in self._index:
                for i in of:
                    self._counts[i] -= 1

    def __len__(self) -> int:
        return len(self._places) + len(self._short)

    def __call__(self, view: View) -> Finding | None:
        """The reference that most of is in the conversation, or that is all the user says in it."""
        if self._short and len(asked := _asked(view.conversation)) == 1:
            where = self._short.get(_as_said(asked[0]))
            if where is not None:
                return Finding(REASON, f"of {where}: {asked[0][:200]}")
        for text in view.texts:
            if not text:
                continue
            cjk, parts = _parts(text)
            hits: dict[int, set[int]] = collections.defaultdict(set)
            for length in self._lengths[cjk]:
                for run in _runs(parts, length):
                    for i in self._index.get(run, ()):
                        hits[i].add(run)
            best = max(hits, key=lambda i: (len(hits[i]) / self._counts[i], -i), default=None)
            if best is not None and len(hits[best]) >= self._config.leakage_share * self._counts[best]:
                return Finding(REASON, f"of {self._places[best]}: {text[:200]}")
        return None


def _as_said(text: str) -> str:
    """A short text with its signs, for "2+2" is not "2-2"; but for letter case, blanks and a point at its end."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(".!?。！？…")


def _parts(text: str) -> tuple[bool, list[str]]:
    if is_cjk(text):
        return True, re.findall(r"\w", text.lower())
    return False, tokens(text)


def _runs(parts: list[str], length: int) -> Iterator[int]:
    return (hash(tuple(parts[i : i + length])) for i in range(len(parts) - length + 1))
