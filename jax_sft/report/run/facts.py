"""What a run was: model, data, method, cost, how to do it again; and where the configs of two runs differ.

In: `RunRecord`s. Out: names with values, as text that pages and terminals show. What nobody wrote down is not guessed.
"""

import datetime
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jax_sft.config import RunConfig
from jax_sft.report.plots import short
from jax_sft.report.run.record import RunRecord, finite, listed, mapping

Facts = list[tuple[str, str]]


def model_name(record: RunRecord) -> str:
    """The base model without its folders."""
    path = str(mapping(record.config.get("model")).get("path") or "")
    return pathlib.PurePath(path).name or "unknown model"


def method(record: RunRecord) -> str:
    """Full fine-tuning, or LoRA with its rank."""
    lora = mapping(record.config.get("lora"))
    rank = lora.get("rank")
    if lora.get("adapter"):
        return f"LoRA, going on from {pathlib.PurePath(str(lora['adapter'])).name}"
    return f"LoRA, rank {rank}" if rank else "full fine-tuning"


def data_name(record: RunRecord) -> str:
    """The names of the sets, or of the files."""
    data = mapping(record.config.get("data"))
    names = [str(name) for name in mapping(data.get("sets"))]
    names = names or [pathlib.PurePath(str(path)).name or str(path) for path in listed(data.get("train"))]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") if names else "unknown data"


def is_finished(record: RunRecord) -> bool:
    """Whether all planned steps were done, or the export was written (a run may end early, out of patience)."""
    return record.steps == record.total_steps or any(
        (record.workdir / "export" / name).is_file() for name in ("config.json", "adapter_config.json")
    )


def progress(record: RunRecord) -> str:
    """Steps done of those planned."""
    total = record.total_steps
    return f"{record.steps:,} steps" if total in (None, record.steps) else f"{record.steps:,} of {total:,} steps"


def what_changed(record: RunRecord) -> str:
    """One or two sentences on what the training did to the validation loss."""
    before, after = record.before("validation/loss"), record.after("validation/loss")
    if before is None or after is None:
        begin, end = _ends(record, "loss")
        if begin is None or end is None:
            return "No loss was logged."
        return f"No validation loss before and after is known; the training loss went from {begin:.4f} to {end:.4f}."
    if after == before:
        return f"Validation loss stayed at {before:.4f}."
    way, share = ("fell" if after < before else "rose"), abs(after - before) / before if before else math.nan
    said = f"Validation loss {way} from {before:.4f} to {after:.4f} ({after - before:+.4f}"
    said += f", {share:.0%}" if math.isfinite(share) else ""
    best, last = record.best_step(), max(record.columns["validation/loss"])
    lowest = record.columns["validation/loss"].get(best) if best is not None else None
    said += ")."
    if best is not None and best != last and lowest is not None and math.isfinite(lowest):
        said += (
            f" The best step was {best:,}, with {lowest:.4f}; the last evaluation, at step {last:,}, was not the best."
        )
    return said


def cost(record: RunRecord) -> Facts:
    """Time, tokens, speed, devices. The manifest's "cost" tells exactly; else the log tells about how much."""
    told = mapping(record.manifest.get("cost"))
    devices, seconds = record.manifest.get("devices"), mean(record, "seconds_per_step")
    facts: Facts = []
    if (total := finite(told.get("seconds"))) is not None:
        facts.append(("wall time", duration(total)))
    elif seconds is not None:
        facts.append(("training steps took", f"about {duration(seconds * record.steps)}"))
    if (first := max((v for v in record.columns.get("seconds_to_first_step", {}).values()), default=None)) is not None:
        facts.append(("to the first step", duration(first)))
    for name, key, rate in (
        ("tokens", "tokens", "tokens_per_s"),
        ("trained tokens", "trained_tokens", "trained_tokens_per_s"),
    ):
        if (exact := finite(told.get(key))) is not None:
            facts.append((name, f"{exact:,.0f}"))
        elif (per_step := _mean_product(record, rate, "seconds_per_step")) is not None:
            facts.append((name, f"{short(per_step * record.steps)}, about, from the log"))
        if (speed := mean(record, rate)) is not None:
            facts.append((f"{name} per second", f"{speed:,.0f}"))
    if (mfu := mean(record, "mfu")) is not None:
        peak = _peak(record)
        facts.append(("MFU", f"{mfu:.1%} of {peak / 1e12:,.3g} TFLOP/s" if peak else f"{mfu:.1%}"))
    if (padding := mean(record, "padding_share")) is not None:
        facts.append(("padding", f"{padding:.1%}"))
    if isinstance(devices, list) and devices:
        kinds = {str(kind): devices.count(kind) for kind in devices}
        facts.append(("devices", ", ".join(f"{n} × {kind}" for kind, n in kinds.items())))
    joules = finite(told.get("energy_joules"))
    facts.append(("energy", "not measured" if joules is None else f"{joules / 3.6e6:,.3g} kWh"))
    if (goodput := finite(told.get("goodput"))) is not None:
        facts.append(("goodput", f"{goodput:.1%}"))
    return facts  # fmt: skip


def cost_parts(record: RunRecord) -> list[tuple[str, float]]:
    """Seconds by part of the run, the longest first, where they are written down."""
    parts = mapping(mapping(record.manifest.get("cost")).get("parts"))
    found = [(str(name), seconds) for name, v in parts.items() if (seconds := finite(v)) is not None and seconds >= 0]
    return sorted(found, key=lambda part: -part[1])


def mean(record: RunRecord, name: str) -> float | None:
    """The mean over what was logged."""
    _, values = record.series(name)
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else None


def duration(seconds: float) -> str:
    """Seconds as people say them: 4.2 s, 3 min 20 s, 5 h 12 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60:,} h {minutes % 60} min"


def accounts(record: RunRecord) -> list[tuple[str, dict[str, int], dict[str, int]]]:
    """Of each set: its name; conversations read, kept, held out and dropped; and why they were dropped."""
    found = []
    for name, told in mapping(mapping(record.manifest.get("data")).get("accounts")).items():
        account = mapping(told)
        reasons = {str(reason): int(n) for reason, v in mapping(account.get("dropped")).items() if (n := finite(v))}
        counts = {key: int(finite(account.get(key)) or 0) for key in ("read", "kept", "held_out")}
        found.append((str(name), counts | {"dropped": sum(reasons.values())}, reasons))
    return found


def sizes(record: RunRecord) -> Mapping[str, Mapping[str, Any]]:
    """Sequences, tokens and trained tokens of each set, where the manifest has data.sizes."""
    found = mapping(mapping(record.manifest.get("data")).get("sizes"))
    return {str(name): mapping(of) for name, of in found.items()}


def source_shares(record: RunRecord) -> list[tuple[str, float]]:
    """The share of the loss's weight that each source had, the mean over the logged steps; the largest first."""
    # A step that had nothing of a source still names it, with 0.
    found = [(name.removeprefix("share/"), mean(record, name)) for name in record.names("share/")]
    return sorted(((name, share) for name, share in found if share is not None), key=lambda one: -one[1])


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Keys with dots, values as JSON."""
    found: dict[str, str] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{name}.")
        else:
            found[name] = json.dumps(value, ensure_ascii=False, default=str)
    return found


def config_rows(record: RunRecord) -> tuple[Facts, Facts]:
    """(keys that differ from their default, the others), in the order of the config."""
    defaults = flat(RunConfig().to_dict())
    rows = list(flat(record.config).items())
    return [row for row in rows if defaults.get(row[0]) != row[1]], [
        row for row in rows if defaults.get(row[0]) == row[1]
    ]


def config_differences(a: RunRecord, b: RunRecord) -> list[tuple[str, str, str]]:
    """(key, value of A, value of B) where they differ; "-" where one has no such key."""
    one, two = flat(a.config), flat(b.config)
    return [(key, one.get(key, "-"), two.get(key, "-")) for key in {**one, **two} if one.get(key) != two.get(key)]


def measures_same(a: RunRecord, b: RunRecord) -> bool | None:
    """Whether both were measured on the same validation set, by its fingerprint; None where one has none."""
    one, two = (mapping(record.manifest.get("data")).get("validation") for record in (a, b))
    return None if one is None or two is None else one == two


def made_with(record: RunRecord) -> Facts:
    """Seed, commit, starts and versions."""
    facts: Facts = [("seed", str(record.manifest.get("seed", "not written down")))]
    commit = record.manifest.get("git_commit")
    facts.append(("git commit", str(commit) if commit else "not written down"))
    processes = record.manifest.get("processes")
    facts += [("processes", str(processes))] if processes is not None else []
    starts = record.manifest.get("starts")
    for start in starts if isinstance(starts, Sequence) and not isinstance(starts, str) else ():
        facts.append((f"start from step {mapping(start).get('from_step', '?')}", _when(mapping(start).get("at"))))
    facts += [(str(name), str(version)) for name, version in mapping(record.manifest.get("versions")).items()]
    data = mapping(record.manifest.get("data"))
    facts += [(f"fingerprint, {name}", str(data[name])) for name in ("train", "validation") if data.get(name)]
    return facts


def data_card(record: RunRecord) -> str | None:
    """The data card in the workdir or beside the exported model, as a path from the workdir."""
    for name in ("DATA_CARD.md", "data.html", "export/DATA_CARD.md"):
        if (record.workdir / name).is_file():
            return name
    return None


def _when(at: Any) -> str:
    try:
        return datetime.datetime.fromisoformat(str(at)).strftime("%Y-%m-%d %H:%M %Z").strip()
    except ValueError:
        return str(at)


def _ends(record: RunRecord, name: str) -> tuple[float | None, float | None]:
    _, values = record.series(name)
    values = values[np.isfinite(values)]
    return (float(values[0]), float(values[-1])) if len(values) else (None, None)


def _mean_product(record: RunRecord, *names: str) -> float | None:
    columns = [record.columns.get(name, {}) for name in names]
    steps = set(columns[0]).intersection(*columns[1:])
    products = [math.prod(column[step] for column in columns) for step in steps]
    products = [value for value in products if math.isfinite(value)]
    return sum(products) / len(products) if products else None


def _peak(record: RunRecord) -> float | None:
    return finite(mapping(record.manifest.get("mfu")).get("peak_flops"))
