"""A run, or two, in a few lines for a terminal.

In: `RunRecord`s. Out: lines without control characters.
"""

from jax_sft.data.pieces import visible
from jax_sft.report.run import facts
from jax_sft.report.run.changes import Change, Side, before_and_after, metric_changes, probe_changes, rule_changes
from jax_sft.report.run.page import run_names, warnings
from jax_sft.report.run.record import RunRecord

_COST = ("wall time", "training steps took", "tokens per second", "MFU")


def terminal_lines(record: RunRecord) -> list[str]:
    """Headline, alarms, what changed, behaviour, cost."""
    out = [
        f"{record.name}: {facts.method(record)} of {facts.model_name(record)} on {facts.data_name(record)}, "
        f"{facts.progress(record)}{'' if facts.is_finished(record) else ' (not finished)'}"
    ]
    out += _alarms(record)
    out.append(facts.what_changed(record))
    out += _scores(*before_and_after(record))
    told = dict(facts.cost(record))
    out.append(", ".join(f"{name} {told[name]}" for name in _COST if name in told))
    return [_line(line) for line in out if line]


def comparison_lines(a: RunRecord, b: RunRecord) -> list[str]:
    """Warnings, where the configs differ, losses and scores of A and B."""
    names = run_names(a, b)
    out = [f"A: {names[0]}, B: {names[1]}"]
    out += [f"warning: {text}" for text in warnings(a, b)]
    out += [f"A {line}" for line in _alarms(a)] + [f"B {line}" for line in _alarms(b)]
    out += [f"config {key}: {one} -> {two}" for key, one, two in facts.config_differences(a, b)]
    one, two = (record.after("validation/loss") for record in (a, b))
    if one is not None and two is not None:
        out.append(f"validation loss after: {one:.4f} -> {two:.4f} ({two - one:+.4f})")
    return [_line(line) for line in out + _scores(Side(a), Side(b))]


def _alarms(record: RunRecord) -> list[str]:
    out = [f"{alarm.level or 'alarm'} at step {alarm.step:,}, {alarm.kind}: {alarm.text}" for alarm in record.alarms]
    return out + [f"note: {note}" for note in record.notes]


def _scores(one: Side, two: Side) -> list[str]:
    out = [_score("probes", change) for change in probe_changes(one, two)]
    out += [_score("rules", change) for change in rule_changes(one, two)]
    return out + [_score(name, change) for name, of in metric_changes(one, two).items() for change in of]


def _score(kind: str, change: Change) -> str:
    size, unit = (100, "%") if change.scale == 1 else (1, "")
    told = ["not measured" if value is None else f"{size * value:.1f}{unit}" for value in (change.before, change.after)]
    text = f"{kind}, {change.name.replace('_', ' ')}: {told[0]} -> {told[1]}"
    if change.difference is None:
        return text
    text += f" ({size * change.difference:+.1f}"
    if change.interval is not None:
        low, high = change.interval
        text += f", 95 % interval {size * low:+.1f} to {size * high:+.1f}"
    return f"{text})"


def _line(text: str) -> str:
    return visible(text).replace("\n", " ").encode("utf-8", "replace").decode()
