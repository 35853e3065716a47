"""The curves of a run as numbers: what is plotted against the steps, thinned where a run is long, and what is marked.

In: `RunRecord`s. Out: `Plot`s, which `draw` turns into SVG and `pictures` into PNG files.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from jax_sft.report.run.record import RunRecord, listed, mapping

MOST_POINTS = 600  # of a curve
_MOST_CURVES = 8  # of a plot: as many colours can be told apart
_GAP_STEPS = 20  # logged steps whose mean is the training loss that validation is compared with


@dataclasses.dataclass(frozen=True)
class Curve:
    """Values by step; a value that is not finite is a gap."""

    name: str
    steps: np.ndarray  # int64 [points], rising
    values: np.ndarray  # float64 [points]
    is_dense: bool = False  # measured at each logged step, so drawn without dots
    dashed: bool = False


@dataclasses.dataclass(frozen=True)
class Mark:
    """A step that is marked in a plot."""

    step: int
    text: str
    kind: str  # best, stage or alarm


@dataclasses.dataclass(frozen=True)
class Plot:
    """Curves that share their axes."""

    key: str  # a file name without its ending
    title: str
    unit: str
    curves: tuple[Curve, ...]
    marks: tuple[Mark, ...] = ()
    is_wide: bool = False
    note: str = ""


def thinned(steps: np.ndarray, values: np.ndarray, most: int = MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most `most` points: of each stretch of steps the lowest and the highest, and a gap where there was one.

    The first and the last point stay, so no spike and no end is lost.
    """
    count = len(steps)
    if count <= most:
        return steps, values
    kept = {0, count - 1}
    each = 3 if np.isnan(values).any() else 2
    for bucket in np.array_split(np.arange(count), (most - 2) // each):
        of = values[bucket]
        known = bucket[~np.isnan(of)]
        if len(known):
            kept |= {int(known[np.argmin(values[known])]), int(known[np.argmax(values[known])])}
        if len(known) < len(bucket):
            kept.add(int(bucket[np.isnan(of)][0]))
    index = np.asarray(sorted(kept))
    return steps[index], values[index]


def training_plots(record: RunRecord) -> list[Plot]:
    """Loss, gap, loss by set and source, accuracy, learning rate, gradient norm, speed; those that were measured."""
    marks = _marks(record)

    def dense(name: str, shown: str) -> Curve:
        return _curve(record, name, shown, is_dense=True)

    sets, sources = (record.names(prefix) for prefix in ("validation/loss/", "loss/"))
    accuracy = [dense("accuracy", "training"), _curve(record, "validation/accuracy", "validation")]
    speed = [dense("tokens_per_s", "all"), dense("trained_tokens_per_s", "trained")]
    plots = [
        _plot("loss", "Loss", "nats per trained token", _loss_curves(record), marks, is_wide=True),
        _plot("gap", "Gap", "validation loss less training loss", [gap(record)], marks),
        _plot("validation_sets", "Validation loss by set", "", _of(record, sets, "validation/loss/"), marks),
        _plot("sources", "Training loss by source", "", _of(record, sources, "loss/", is_dense=True), marks),
        _plot("accuracy", "Accuracy", "share of trained tokens predicted", accuracy, marks),
        _plot("lr", "Learning rate", "", [dense("lr", "learning rate")], marks),
        _plot("grad_norm", "Gradient norm", "before clipping", [dense("grad_norm", "gradient norm")], marks),
        _plot("speed", "Speed", "tokens per second", speed, marks),
    ]
    if len(sets) < 2:
        plots = [plot for plot in plots if plot.key != "validation_sets"]
    return [plot for plot in plots if plot.curves]


def behaviour_plots(record: RunRecord) -> list[Plot]:
    """Probes, rules and metrics over the steps, where they were measured between the beginning and the end, too."""
    probes = [name for name in record.names("probes/") if _is_share_of_probes(name)]
    rules = [name for name in record.names("rules/") if name.count("/") == 1 and name.endswith(("strict", "loose"))]
    plots = [
        _plot("probes", "Behaviour probes", "share of answers", _of(record, probes, "probes/")),
        _plot("rules", "Instructions followed", "share", _of(record, rules, "rules/")),
    ]
    by_set: dict[str, list[str]] = {}
    for name in record.names("metric/"):
        by_set.setdefault(name.rpartition("/")[0], []).append(name)
    for number, (of, names) in enumerate(by_set.items(), 1):
        for scale in (False, True):  # shares and points have no axis in common
            some = [name for name in names if _is_in_points(record, name) == scale]
            unit = "points" if scale else "share"
            title = f"Task metrics: {of.removeprefix('metric/')}"
            key = f"metrics_{number}{'_points' if scale else ''}"
            plots.append(_plot(key, title, unit, _of(record, some, f"{of}/")))
    return [plot for plot in plots if any(len(curve.steps) > 2 for curve in plot.curves)]


def forgetting_plots(record: RunRecord) -> list[Plot]:
    """Loss on general text beside the base model's, by token and by byte; how far predictions moved."""
    plots = []
    for end, unit in (("loss", "nats per token"), ("loss_per_byte", "nats per byte")):
        base = _curve(record, f"forgetting/base_{end}", "base", dashed=True)
        curves = [_curve(record, f"forgetting/{end}", "this run"), base]
        plots.append(_plot(f"forgetting_{end}", "Loss on general text", unit, curves))
    for end, title, unit in (
        ("kl", "KL from the base", "nats per token"),
        ("agreement", "Agreement with the base", "share of tokens with the same first choice"),
    ):
        task = _curve(record, f"forgetting/task_{end}", "the task")
        curves = [_curve(record, f"forgetting/{end}", "general text"), task]
        plots.append(_plot(f"forgetting_{end}", title, unit, curves))
    return [plot for plot in plots if plot.curves]


def all_plots(record: RunRecord) -> list[Plot]:
    """Every plot of a run."""
    return [*training_plots(record), *behaviour_plots(record), *forgetting_plots(record)]


def overlaid(a: RunRecord, b: RunRecord, names: tuple[str, str]) -> list[Plot]:
    """The plots of two runs on the same axes: the second is dashed. Only those that both have a curve of."""
    found = []
    parts: Sequence[Callable[[RunRecord], list[Plot]]] = (training_plots, behaviour_plots, forgetting_plots)
    for part in parts:
        theirs = {(plot.title, plot.unit): plot for plot in part(b)}
        for mine in part(a):
            other = theirs.get((mine.title, mine.unit))
            if other is not None:
                curves = _paired(mine.curves, other.curves, names)
                missing = len({c.name for c in (*mine.curves, *other.curves)}) - _MOST_CURVES // 2
                note = f"{missing:,} more are not drawn" if missing > 0 else ""
                marks = [m for m in mine.marks if m.kind == "best"]
                marks = [dataclasses.replace(m, text=f"{names[0]}: {m.text}") for m in marks]
                marks += [dataclasses.replace(m, text=f"{names[1]}: {m.text}") for m in other.marks if m.kind == "best"]
                found.append(dataclasses.replace(mine, curves=curves, marks=tuple(marks), note=note))
    return found


def gap(record: RunRecord) -> Curve:
    """Validation loss less training loss by step, as logged or else from the mean of the last logged losses."""
    if record.columns.get("validation/gap"):
        return _curve(record, "validation/gap", "gap")
    steps, losses = record.series("loss")
    at, values = record.series("validation/loss")
    found = []
    for step, value in zip(at.tolist(), values.tolist(), strict=True):
        before = losses[steps <= step][-_GAP_STEPS:]
        before = before[np.isfinite(before)]
        if step > 0 and len(before):
            found.append((step, value - float(before.mean())))
    return Curve("gap", np.asarray([s for s, _ in found], np.int64), np.asarray([g for _, g in found], float))


def _loss_curves(record: RunRecord) -> list[Curve]:
    return [_curve(record, "loss", "training", is_dense=True), _curve(record, "validation/loss", "validation")]


def _curve(record: RunRecord, name: str, shown: str, *, is_dense: bool = False, dashed: bool = False) -> Curve:
    return Curve(shown, *record.series(name), is_dense=is_dense, dashed=dashed)


def _of(record: RunRecord, names: Iterable[str], prefix: str, *, is_dense: bool = False) -> list[Curve]:
    return [_curve(record, name, name.removeprefix(prefix).replace("_", " "), is_dense=is_dense) for name in names]


def _plot(
    key: str, title: str, unit: str, curves: Sequence[Curve], marks: Sequence[Mark] = (), *, is_wide: bool = False
) -> Plot:
    """Curves without a number are left out, and those that are too many for a plot: the ones with the fewest points."""
    known = [curve for curve in curves if np.isfinite(curve.values).any()]
    most = sorted(known, key=lambda curve: -len(curve.steps))[:_MOST_CURVES]
    note = f"{len(known) - len(most):,} more are not drawn" if len(known) > len(most) else ""
    drawn = tuple(
        dataclasses.replace(curve, steps=steps, values=values)
        for curve in known
        if any(curve is one for one in most)
        for steps, values in (thinned(curve.steps, curve.values),)
    )
    first, last = (of(int(c.steps[end]) for c in drawn) if drawn else 0 for of, end in ((min, 0), (max, -1)))
    return Plot(key, title, unit, drawn, tuple(m for m in marks if first <= m.step <= last), is_wide, note)


def _paired(mine: Sequence[Curve], theirs: Sequence[Curve], names: tuple[str, str]) -> tuple[Curve, ...]:
    """Curves of the same name stand together, as many names as there are pairs of colours."""
    of_a, of_b = ({curve.name: curve for curve in curves} for curves in (mine, theirs))
    found = []
    for name in list(of_a | of_b)[: _MOST_CURVES // 2]:
        for run, curves, dashed in ((names[0], of_a, False), (names[1], of_b, True)):
            if name in curves:
                found.append(dataclasses.replace(curves[name], name=f"{run}: {name}", dashed=dashed))
    return tuple(found)


def _marks(record: RunRecord) -> list[Mark]:
    best = record.best_step()
    found = [] if best is None else [Mark(best, f"best, step {best:,}", "best")]
    steps, stages = record.series("stage")
    names = [str(mapping(stage).get("name") or "") for stage in listed(record.config.get("stages"))]
    for (_, before), (step, stage) in itertools.pairwise(zip(steps.tolist(), stages.tolist(), strict=True)):
        if stage != before and math.isfinite(stage):
            number = int(stage)
            name = names[number] if 0 <= number < len(names) and names[number] else f"stage {number + 1}"
            found.append(Mark(step, name, "stage"))
    return found + [Mark(alarm.step, f"{alarm.kind} {alarm.level}", "alarm") for alarm in record.alarms]


def _is_share_of_probes(name: str) -> bool:
    return name.count("/") == 1 and name not in ("probes/count", "probes/tokens", "probes/length_ratio")


def _is_in_points(record: RunRecord, name: str) -> bool:
    of, _, metric = name.removeprefix("metric/").rpartition("/")
    return any(step.get(of, {}).get(metric, {}).get("scale") == 100 for step in record.metrics.values())
