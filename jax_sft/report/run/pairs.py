"""Answers of two sides to the same prompts, side by side, and which of the two is better where scores tell.

In: the answers of a `RunRecord`. Out: `Pair`s.
"""

import dataclasses
from collections.abc import Mapping

from jax_sft.report.run.record import Answer, RunRecord

_MOST_OF_A_KIND = 500  # pairs on a page; the ones that changed come first
_ORDER = ("worse", "better", "changed", "same")
Answers = Mapping[tuple[str, str, int], Answer]


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two answers to one prompt; a side that has none is None."""

    kind: str
    id: str
    prompt: str
    reference: str | None
    one: Answer | None
    two: Answer | None

    @property
    def change(self) -> str:
        """better or worse by the mean of the scores that both have; else changed or same by the text; or alone."""
        if self.one is None or self.two is None:
            return "alone"
        names = self.one.scores.keys() & self.two.scores.keys()
        moved = sum(self.two.scores[name] - self.one.scores[name] for name in names)
        if abs(moved) > 1e-9:
            return "better" if moved > 0 else "worse"
        return "same" if self.one.answer == self.two.answer else "changed"


def first_and_last(record: RunRecord) -> list[Pair]:
    """The untrained model's answers beside the last ones; of each kind those of the last step that has it."""
    return _paired(record.answers.get(0, {}), last_answers(record))


def last_of_both(a: RunRecord, b: RunRecord) -> list[Pair]:
    """The last answers of two runs side by side; only prompts that both were asked."""
    pairs = _paired(last_answers(a), last_answers(b))
    return [pair for pair in pairs if pair.one is not None and pair.two is not None]


def last_answers(record: RunRecord) -> Answers:
    """Of each kind the answers of the last step after 0."""
    last: dict[str, int] = {}
    for step, answers in record.answers.items():
        for kind, _, _ in answers if step > 0 else ():
            last[kind] = max(step, last.get(kind, 0))
    return {key: a for step, of in record.answers.items() for key, a in of.items() if last.get(key[0]) == step}


def shown(pairs: list[Pair]) -> tuple[list[Pair], int]:
    """(the pairs that a page has room for, how many are left out); worse and better ones before those that are same."""
    by_kind: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_kind.setdefault(pair.kind, []).append(pair)
    kept = []
    for of in by_kind.values():
        ordered = sorted(of, key=lambda pair: (*_ORDER, "alone").index(pair.change))
        kept += ordered[:_MOST_OF_A_KIND]
    return kept, len(pairs) - len(kept)


def _paired(ones: Answers, twos: Answers) -> list[Pair]:
    """Both in the order of the second; an id that has another prompt now is another prompt, and stands alone."""
    pairs = []
    for key in {**twos, **ones}:
        one, two = ones.get(key), twos.get(key)
        if one is not None and two is not None and one.prompt != two.prompt:
            pairs += [_pair(one, None), _pair(None, two)]
        else:
            pairs.append(_pair(one, two))
    return pairs


def _pair(one: Answer | None, two: Answer | None) -> Pair:
    either = two or one
    assert either is not None
    return Pair(either.kind, either.id, either.prompt, either.reference, one, two)
