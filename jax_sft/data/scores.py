"""The file of scores: a line for each conversation of a set, how hard it is for a model.

In: scores in the set's order. Out: JSON lines {id, loss, loss_without_prompt, ratio, tokens}; `evaluate.difficulty`
says what they mean. A file of scores is whole or not there: lines go into a partial file beside it, which is given its
name at the end, and which a scoring that was interrupted goes on with.

Letters: N sequence, C conversation.
"""

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Iterable
from typing import Any, Self

import numpy as np

from jax_sft.data.conversation import DataError
from jax_sft.data.store import TokenizedSet

_DIGITS = 7  # what float32 knows
_NUMBER = re.compile(r"#(\d+)$")  # of the answers of one conversation, each a sequence of its own


@dataclasses.dataclass(frozen=True)
class Score:
    """One conversation. Losses are nats per trained token."""

    id: str
    loss: float
    loss_without_prompt: float | None  # None: there is no prompt
    ratio: float | None  # None: there is no prompt, or the answer alone has no loss
    tokens: int  # trained ones

    @classmethod
    def of(cls, id: str, loss: float, loss_without_prompt: float | None, tokens: int) -> Self:
        """With its ratio, all in as many digits as count."""
        ratio = loss / loss_without_prompt if loss_without_prompt else None
        without, ratio = (None if x is None else _short(x) for x in (loss_without_prompt, ratio))
        return cls(id, _short(loss), without, ratio, tokens)


FIELDS = tuple(field.name for field in dataclasses.fields(Score))


def _short(x: float) -> float:
    return float(f"{x:.{_DIGITS}g}")


def conversation_ends(dataset: TokenizedSet) -> np.ndarray:
    """For each conversation the sequence after its last; only data.mask "turns" makes more than one sequence of one."""
    ends_C = np.arange(1, len(dataset) + 1)
    if "turns" not in dataset.account.method:
        return ends_C
    goes_on_N = np.zeros(len(dataset), bool)  # whether the next sequence is of the same conversation
    before, number_before = "", 0
    for i in range(len(dataset)):
        stem, number = _cut(dataset.ids[i])
        if i and number > number_before > 0 and stem == before:
            goes_on_N[i - 1] = True
        before, number_before = stem, number
    return ends_C[~goes_on_N]


def id_of(dataset: TokenizedSet, i: int) -> str:
    """The id of the conversation that sequence i is of."""
    return _cut(dataset.ids[i])[0] if "turns" in dataset.account.method else dataset.ids[i]


def check_ids(dataset: TokenizedSet, ends_C: np.ndarray) -> None:
    """Refuse a set in which two conversations share an id, for no reader could tell their scores apart.

    Raises:
        DataError: there are such.
    """
    starts = [0, *ends_C[:-1].tolist()]
    first: dict[str, int] = {}  # id -> number of its first conversation
    for number, i in enumerate(starts):
        name = id_of(dataset, i)
        if name in first:
            sources = [dataset.sources[dataset.source_ids_N[starts[n]]] for n in (first[name], number)]
            raise DataError(
                f"the id {name!r} is that of conversation {first[name] + 1:,} (source {sources[0]}) and of "
                f"conversation {number + 1:,} (source {sources[1]}) of the tokenised set, and a score goes by its id; "
                "give each conversation an id of its own, or set data.quality.same_id = 'drop'"
            )
        first[name] = number


def _cut(id: str) -> tuple[str, int]:
    """a.jsonl:3#2 -> a.jsonl:3, 2; without a number 0."""
    found = _NUMBER.search(id)
    return (id[: found.start()], int(found[1])) if found else (id, 0)


def check_destination(path: pathlib.Path) -> None:
    """Refuse to replace what is no file of scores.

    Raises:
        DataError: there is such a file.
    """
    if not path.exists() or (path.is_file() and not path.stat().st_size):
        return
    try:
        with path.open(encoding="utf-8") as file:
            _score(json.loads(file.readline()))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{path}: is there already and holds no scores, so it is not replaced; name another file, or remove it"
        ) from error


def read_scores(path: pathlib.Path) -> list[Score]:
    """All scores of a file.

    Raises:
        DataError: a line is none.
    """
    with path.open(encoding="utf-8") as file:
        found = []
        for number, line in enumerate(file, 1):
            try:
                found.append(_score(json.loads(line)))
            except (ValueError, TypeError, KeyError) as error:
                raise DataError(
                    f"{path}:{number}: is no score, a line with {', '.join(FIELDS)}; write the file anew with "
                    "jax-sft data --score"
                ) from error
    return found


def _score(row: Any) -> Score:
    score = Score(**row)  # TypeError where a row has other fields, or is none
    if not isinstance(score.id, str) or not isinstance(score.loss, float | int):
        raise ValueError("no score")
    return score


class PartialFile:
    """The scores so far, beside the file that they will be; its name holds what they are scores of."""

    def __init__(self, path: pathlib.Path, fingerprint: str):
        self.path = path.with_name(f"{path.name}.{fingerprint}.partial")
        self._whole = path

    def chunks_done(self, dataset: TokenizedSet, ends_C: np.ndarray, chunk_ends: tuple[int, ...]) -> int:
        """How many chunks an interrupted scoring has left whole; what follows them is cut off, and all that is damaged.

        Args:
            chunk_ends: the conversation after the last of each chunk.
        """
        if not self.path.is_file():
            return 0
        starts_C = np.concatenate([[0], ends_C[:-1]])
        chunks, places = 0, [0]  # bytes up to the end of each chunk
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    same = _score(json.loads(line)).id == id_of(dataset, int(starts_C[number - 1]))
                except (ValueError, TypeError, KeyError, IndexError):
                    break
                if not (same and line.endswith(b"\n")):
                    break
                if number == chunk_ends[chunks]:
                    chunks += 1
                    places.append(file.tell())
                    if chunks == len(chunk_ends):
                        break
        os.truncate(self.path, places[-1])
        return chunks

    def append(self, scores: Iterable[Score]) -> None:
        """A chunk more."""
        with self.path.open("a", encoding="utf-8") as file:
            for score in scores:
                file.write(json.dumps(dataclasses.asdict(score), ensure_ascii=False) + "\n")

    def finish(self) -> None:
        """From now on it is the file."""
        with self.path.open("r+b") as file:
            os.fsync(file.fileno())
        os.replace(self.path, self._whole)
