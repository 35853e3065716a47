"""What changed between two times of a run, or two runs: values, differences, and how far chance may go.

In: `RunRecord`s. Out: `Change`s. A difference has a 95 % interval where the answers of both sides are known by row: a
paired bootstrap over prompts (Koehn 2004), with a fixed seed. Numpy only.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from jax_sft.evaluate.probes import BEHAVIOURS, wilson
from jax_sft.report.run.record import Answer, RunRecord, finite, listed

DRAWS, SEED = 2000, 0
_MOST = 2**53  # a count beyond it is none
_AT_ONCE = 200  # draws that are held in memory
_SAME = 5e-4  # of the scale: rows give the reported value if they are as near as this
_FOLLOWED = ("prompt_strict", "prompt_loose", "instruction_strict", "instruction_loose")
Interval = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Change:
    """A number on both sides, with its difference."""

    name: str
    before: float | None
    after: float | None
    scale: int = 1  # 1: shares; 100: points
    count: int | None = None  # prompts (or instructions) that the later share is of
    before_interval: Interval | None = None
    after_interval: Interval | None = None
    interval: Interval | None = None  # of the difference, over `rows` prompts that both sides answered
    rows: int = 0
    note: str = ""

    @property
    def difference(self) -> float | None:
        """After less before; None where one of them is unknown."""
        return None if self.before is None or self.after is None else self.after - self.before

    @property
    def is_sure(self) -> bool:
        """Whether the interval of the difference leaves out 0."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


@dataclasses.dataclass(frozen=True)
class Side:
    """One of two sides that are compared: a run, at one step or where each number was measured last."""

    record: RunRecord
    step: int | None = None  # None: the last one after 0 at which it was measured

    def value(self, name: str) -> float | None:
        """A number of `RunRecord.columns`."""
        if self.step is None:
            return self.record.after(name)
        return finite(self.record.columns.get(name, {}).get(self.step))

    def step_of(self, name: str) -> int | None:
        """The step at which the number was measured."""
        if self.step is not None:
            return self.step
        return max((step for step in self.record.columns.get(name, ()) if step > 0), default=None)

    def answers(self, name: str, kind: str) -> Mapping[tuple[str, str, int], Answer]:
        """The answers that the number was made of."""
        step = self.step_of(name)
        rows = {} if step is None else self.record.answers.get(step, {})
        return {key: answer for key, answer in rows.items() if key[0] == kind}


def before_and_after(record: RunRecord) -> tuple[Side, Side]:
    """The untrained model and the last one."""
    return Side(record, 0), Side(record)


def probe_changes(one: Side, two: Side) -> list[Change]:
    """The behaviours, in the order in which they are told; shares with intervals of their own (Wilson 1927)."""
    return [
        _share_change(one, two, "probes", behaviour) for behaviour in BEHAVIOURS if _has(one, two, "probes", behaviour)
    ]


def rule_changes(one: Side, two: Side) -> list[Change]:
    """How often instructions were followed, of prompts and of single instructions, strictly and loosely."""
    return [_share_change(one, two, "rules", how) for how in _FOLLOWED if _has(one, two, "rules", how)]


def part_changes(one: Side, two: Side, prefix: str) -> list[Change]:
    """Numbers of parts, such as kinds of probes ("probes/kind=") or of rules ("rules/kind="); without intervals."""
    names = sorted({name for side in (one, two) for name in side.record.names(prefix)})
    return [
        Change(name.removeprefix(prefix), one.value(name), two.value(name), count=_count(two, f"{name}/count"))
        for name in names
        if not name.endswith("/count") and (one.value(name) is not None or two.value(name) is not None)
    ]


def metric_changes(one: Side, two: Side) -> dict[str, list[Change]]:
    """Task metrics by validation set."""
    found: dict[str, list[Change]] = {}
    for name in sorted({name for side in (one, two) for name in side.record.names("metric/")}):
        of, _, metric = name.removeprefix("metric/").rpartition("/")
        if one.value(name) is not None or two.value(name) is not None:
            found.setdefault(of, []).append(_metric_change(one, two, of, metric))
    return found


def paired_interval(before: np.ndarray, after: np.ndarray, *, seed: int = SEED, draws: int = DRAWS) -> Interval | None:
    """The 95 % interval of the ratio of sums after less that before; None where nothing can be drawn.

    Args:
        before, after: `[rows, 2]`, numerator and denominator of each prompt, in the same order of prompts.
    """
    rows = len(before)
    if rows < 2:
        return None
    rng, moved = np.random.default_rng(seed), []
    both = np.hstack([before, after]).astype(float)
    for start in range(0, draws, _AT_ONCE):
        counts = rng.multinomial(rows, np.full(rows, 1 / rows), size=min(_AT_ONCE, draws - start))
        sums = counts @ both
        with np.errstate(divide="ignore", invalid="ignore"):
            moved.append(sums[:, 2] / sums[:, 3] - sums[:, 0] / sums[:, 1])
    values = np.concatenate(moved)
    values = values[np.isfinite(values)]  # a draw may hold no prompt that a behaviour applies to
    if not len(values):
        return None
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def row_of(answer: Answer, kind: str, name: str) -> tuple[float, float] | None:
    """Numerator and denominator that one prompt gives to a number; None where it gives none.

    Rows of rules may tell each instruction by itself ("ID/NUMBER", strictly followed) or the four numbers by name.
    """
    if name in answer.scores:
        weight = answer.weights.get("instructions", 0.0) if name.startswith("instruction_") else 1.0
        return (answer.scores[name] * weight, weight) if weight > 0 else None
    if kind != "rules" or not name.endswith("_strict"):
        return None
    followed = [value for key, value in answer.scores.items() if key.rpartition("/")[2].isdigit()]
    if not followed:
        return None
    if name == "prompt_strict":
        return float(all(value > 0 for value in followed)), 1.0
    return float(sum(followed)), float(len(followed))


def _has(one: Side, two: Side, kind: str, name: str) -> bool:
    return any(side.value(f"{kind}/{name}") is not None for side in (one, two))


def _count(side: Side, name: str) -> int | None:
    found = side.value(name)
    return None if found is None or abs(found) > _MOST else int(found)


def _share_change(one: Side, two: Side, kind: str, name: str) -> Change:
    full = f"{kind}/{name}"
    of = f"{full}/count" if kind == "probes" else f"rules/{name.partition('_')[0]}s"
    counts = _count(one, of), _count(two, of)
    bounds = [
        wilson(min(max(value, 0.0), 1.0), count) if (value := side.value(full)) is not None and count else None
        for side, count in zip((one, two), counts, strict=True)
    ]
    return _paired(
        one,
        two,
        full,
        kind,
        Change(name, one.value(full), two.value(full), 1, counts[1] or counts[0], bounds[0], bounds[1]),
    )


def _metric_change(one: Side, two: Side, of: str, metric: str) -> Change:
    full = f"metric/{of}/{metric}"
    told = [_told(side, of, metric, full) for side in (one, two)]
    scale = next((t["scale"] for t in reversed(told) if t.get("scale") in (1, 100)), 1)
    bounds = [_bounds(t.get("interval")) for t in told]
    notes = [str(note) for note in listed(told[1].get("notes")) if isinstance(note, str)]
    change = Change(
        metric, one.value(full), two.value(full), scale, None, bounds[0], bounds[1], note="; ".join(notes)
    )  # fmt: skip
    return _paired(one, two, full, of, change)


def _told(side: Side, of: str, metric: str, full: str) -> Mapping:
    step = side.step_of(full)
    return {} if step is None else side.record.metrics.get(step, {}).get(of, {}).get(metric, {})


def _bounds(value: object) -> Interval | None:
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        return None
    low, high = (finite(v) for v in value)
    return None if low is None or high is None else (low, high)


def _paired(one: Side, two: Side, full: str, kind: str, change: Change) -> Change:
    """The change with the interval of its difference, where the rows of both sides give the reported values."""
    if change.before is None or change.after is None:
        return change
    here, there = one.answers(full, kind), two.answers(full, kind)
    same = [key for key in here if key in there and here[key].prompt == there[key].prompt]
    name = change.name
    pairs = [(row_of(here[key], kind, name), row_of(there[key], kind, name)) for key in same]
    rows = np.asarray([(*(a or (0.0, 0.0)), *(b or (0.0, 0.0))) for a, b in pairs if a or b], float).reshape(-1, 4)
    if not len(rows):
        return change
    if not (rows[:, 1].sum() and rows[:, 3].sum()):
        return change
    sums = rows.sum(0)
    is_whole = len(same) == len(here) == len(there)
    agrees = all(
        abs(value - reported) <= _SAME * change.scale
        for value, reported in ((sums[0] / sums[1], change.before), (sums[2] / sums[3], change.after))
    )
    if is_whole and not agrees:
        # BLEU and the like are made of counts over all rows: the mean of rows is another number.
        note = "no interval of the difference: the value is not the mean of its rows"
        return dataclasses.replace(change, note="; ".join(filter(None, (change.note, note))))
    if not is_whole:
        values = f"{sums[0] / sums[1]:.3g} and {sums[2] / sums[3]:.3g}"
        note = f"interval of the {len(rows):,} prompts that both answered: {values}"
        change = dataclasses.replace(change, note="; ".join(filter(None, (change.note, note))))
    return dataclasses.replace(change, interval=paired_interval(rows[:, :2], rows[:, 2:]), rows=len(rows))
