"""What a run's workdir tells, read once: numbers by name and step, answers, alarms, and what of it was damaged.

In: a workdir. Out: a `RunRecord`. Only manifest.json and metrics.jsonl must be there; what else is missing was not
measured. Nothing of a file is trusted: what is not of the form it should have is left out, and said.
"""

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jax_sft.config import deciding_key, is_better_low

_EVALUATION = re.compile(r"(\d{1,12})\.json")
_PREDICTIONS = re.compile(r"(\d{1,12})\.predictions\.jsonl")
_OTHER_THAN_SCORES = {"instructions", "tokens", "count", "length_ratio"}  # numbers of a row that are not good or bad


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model said to one prompt at one step."""

    id: str
    kind: str  # probes, rules, samples, or the name of a validation set
    prompt: str  # all messages as one text; roles are told where there is more than a user's message
    answer: str
    reference: str | None = None
    stopped: bool | None = None  # the model ended by itself; None: not told
    tokens: int | None = None
    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)  # by name, higher is better
    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)  # numbers beside them, such as instructions


@dataclasses.dataclass(frozen=True)
class Alarm:
    """What training warned of."""

    step: int
    kind: str
    level: str
    text: str


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """A run as its workdir tells it.

    `columns` holds every number by name and step: those of metrics.jsonl, and of the evaluations under "probes/",
    "rules/" (its kinds as "rules/kind=ID/strict"), "metric/SET/NAME" and "forgetting/". Where both tell a number, the
    evaluation's stands. A number that was not finite is NaN.
    """

    workdir: pathlib.Path
    manifest: Mapping[str, Any]
    columns: Mapping[str, Mapping[int, float]]
    alarms: Sequence[Alarm]
    metrics: Mapping[int, Mapping[str, Mapping[str, Mapping[str, Any]]]]  # step -> set -> name -> value, interval, ...
    answers: Mapping[int, Mapping[tuple[str, str, int], Answer]]  # step -> (kind, id, number among its equals) ->
    notes: Sequence[str]  # what was left out of damaged files

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.workdir.resolve().name

    @property
    def config(self) -> Mapping[str, Any]:
        """The config of the newest start."""
        return mapping(self.manifest.get("config"))

    @property
    def steps(self) -> int:
        """The last step that was trained and logged; 0 where none was."""
        return max((step for name in ("loss", "lr") for step in self.columns.get(name, ())), default=0)

    @property
    def total_steps(self) -> int | None:
        """How many were planned."""
        found = self.manifest.get("total_steps")
        return found if isinstance(found, int) and not isinstance(found, bool) else None

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps (int64) and values (float64) of a number, `[points]` each, in the order of steps; empty if unknown."""
        column = self.columns.get(name, {})
        steps = sorted(column)
        return np.asarray(steps, np.int64), np.asarray([column[step] for step in steps], float)

    def names(self, prefix: str) -> list[str]:
        """The names that begin with `prefix`, sorted."""
        return sorted(name for name in self.columns if name.startswith(prefix))

    def before(self, name: str) -> float | None:
        """The number of the untrained model, step 0."""
        return finite(self.columns.get(name, {}).get(0))

    def after(self, name: str) -> float | None:
        """The number at the last step after 0 that has it."""
        column = self.columns.get(name, {})
        last = max((step for step in column if step > 0), default=None)
        return None if last is None else finite(column[last])

    def best_step(self) -> int | None:
        """The step of the best deciding number, by default the validation loss; the untrained model is no step."""
        best = mapping(self.config.get("evaluate")).get("best")
        key = deciding_key(str(best) if best else None)
        sign = 1 if is_better_low(key) else -1
        steps, values = self.series(key)
        found = [(sign * value, step) for step, value in zip(steps.tolist(), values.tolist(), strict=True) if step > 0]
        found = [pair for pair in found if math.isfinite(pair[0])]
        return min(found)[1] if found else None


def read_run(workdir: pathlib.Path) -> RunRecord:
    """Read what is there of a run.

    Raises:
        ValueError: no folder, no workdir, or one without a usable manifest.json or metrics.jsonl.
    """
    workdir = pathlib.Path(workdir)
    if not workdir.is_dir():
        raise ValueError(f"{workdir}: is no folder; name the folder that was given to --workdir")
    notes: list[str] = []
    manifest = _manifest(workdir / "manifest.json")
    columns = _columns(workdir / "metrics.jsonl", notes)
    answers: dict[int, dict[tuple[str, str, int], Answer]] = {}
    for line in _lines(workdir / "samples.jsonl", notes):
        _put(answers, _step(line), _answer(line, kind="samples"))
    metrics = {}
    folder = workdir / "evaluations"
    files = [path for path in sorted(folder.iterdir()) if path.is_file()] if folder.is_dir() else []
    for path in files:
        if found := _EVALUATION.fullmatch(path.name):
            step, read = int(found[1]), _evaluation(path, notes)
            metrics[step] = _metrics(read)
            for name, value in _numbers_of(read):
                columns.setdefault(name, {})[step] = value
    sets = {name for of in metrics.values() for name in of}
    for path in files:
        if found := _PREDICTIONS.fullmatch(path.name):
            for line in _lines(path, notes):
                _put(answers, int(found[1]), _answer(line, kind=_kind_of(line.get("id"), sets)))
    alarms = [_alarm(line) for line in _lines(workdir / "alarms.jsonl", notes)]
    return RunRecord(workdir, manifest, columns, alarms, metrics, answers, tuple(notes))


def mapping(value: Any) -> Mapping[str, Any]:
    """`value` if it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def listed(value: Any) -> Sequence[Any]:
    """`value` if it is a list, else an empty one."""
    return value if isinstance(value, list | tuple) else ()


def number(value: Any) -> float | None:
    """`value` as a float, NaN for null; None if it is no number."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else math.nan
    except OverflowError:
        return math.nan


def finite(value: Any) -> float | None:
    """`value` as a float; None if it is no finite number."""
    found = number(value)
    return None if found is None or math.isnan(found) else found


def _manifest(path: pathlib.Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise ValueError(
            f"{path.parent}: holds no manifest.json, so it is no workdir of a run; name the folder given to --workdir"
        )
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: is damaged ({type(error).__name__}: {error}); start `jax-sft train` on this workdir once more, "
            "which writes it anew"
        ) from error
    if not isinstance(read, Mapping):
        raise ValueError(f"{path}: holds {type(read).__name__}, no object; start `jax-sft train` once more")
    return read


def _columns(path: pathlib.Path, notes: list[str]) -> dict[str, dict[int, float]]:
    if not path.is_file():
        raise ValueError(f"{path.parent}: holds no metrics.jsonl, so nothing was logged; let the run log a step first")
    columns: dict[str, dict[int, float]] = {}
    for line in _lines(path, notes):
        step = _step(line)
        for name, value in line.items():
            if name != "step" and (found := number(value)) is not None:
                columns.setdefault(name, {})[step] = found
    if not columns:
        raise ValueError(f"{path}: holds no number of any step; let the run log a step first")
    return columns


def _lines(path: pathlib.Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """The objects of a JSON Lines file, which may be missing; a torn last line and what is no record are noted."""
    if not path.is_file():
        return
    wrong, name = 0, "/".join(path.parts[-2:]) if path.parent.name == "evaluations" else path.name
    has_step = "predictions" not in path.name
    *lines, torn = path.read_bytes().split(b"\n")  # a text may hold U+2028: only \n ends a line
    if torn.strip():
        notes.append(f"{name}: the last line is torn and was left out")
    for line in lines:
        if not line.strip():
            continue
        try:
            read = json.loads(line.decode("utf-8", errors="replace"))
        except (ValueError, RecursionError):
            read = None
        if isinstance(read, dict) and (not has_step or _is_step(read.get("step"))):
            yield read
        else:
            wrong += 1
    if wrong:
        notes.append(
            f"{name}: {wrong:,} {'line is' if wrong == 1 else 'lines are'} no record and {_were(wrong)} left out"
        )


def _were(count: int) -> str:
    return "was" if count == 1 else "were"


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _step(line: Mapping[str, Any]) -> int:
    return line["step"]


def _alarm(line: Mapping[str, Any]) -> Alarm:
    kind, level, text = (str(line.get(name) or "") for name in ("kind", "level", "text"))
    return Alarm(_step(line), kind, level, text)


def _evaluation(path: pathlib.Path, notes: list[str]) -> Mapping[str, Any]:
    try:
        return mapping(json.loads(path.read_text(encoding="utf-8", errors="replace")))
    except (ValueError, RecursionError):
        notes.append(f"evaluations/{path.name}: is damaged and was left out")
        return {}


def _metrics(evaluation: Mapping[str, Any]) -> dict[str, dict[str, Mapping[str, Any]]]:
    sets = mapping(evaluation.get("metrics"))
    return {name: {metric: mapping(told) for metric, told in mapping(of).items()} for name, of in sets.items()}


def _numbers_of(evaluation: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of an evaluation under the names that metrics.jsonl has for them."""
    for part in ("probes", "rules", "forgetting"):
        yield from _prefixed(f"{part}/", mapping(evaluation.get(part)))
    for kind, told in mapping(mapping(evaluation.get("rules")).get("by_kind")).items():
        yield from _prefixed(f"rules/kind={kind}/", mapping(told))
    for name, of in _metrics(evaluation).items():
        yield from _prefixed(f"metric/{name}/", {metric: told.get("value") for metric, told in of.items()})


def _prefixed(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if (found := number(value)) is not None:
            yield f"{prefix}{name}", found


def _kind_of(id: Any, sets: set[str]) -> str:
    """What stands before the row's own id; names of sets may hold a slash themselves."""
    text = str(id)
    known = [name for name in sets if text.startswith(f"{name}/")]
    return max(known, key=len) if known else text.partition("/")[0] if "/" in text else "other"


def _answer(line: Mapping[str, Any], *, kind: str) -> Answer:
    prompt = _prompt(line.get("prompt", line.get("messages")))
    id = str(line.get("id") if kind != "samples" else prompt)
    values = {name: found for name, v in mapping(line.get("scores")).items() if (found := finite(v)) is not None}
    tokens, stopped = finite(line.get("tokens")), line.get("stopped")
    reference = line.get("reference")
    return Answer(
        id=id.removeprefix(f"{kind}/"),
        kind=kind,
        prompt=prompt,
        answer=str(line.get("prediction", line.get("answer", "")) or ""),
        reference=None if reference is None else str(reference),
        stopped=stopped if isinstance(stopped, bool) else None,
        tokens=None if tokens is None else int(tokens),
        scores={name: value for name, value in values.items() if name not in _OTHER_THAN_SCORES},
        weights={name: value for name, value in values.items() if name in _OTHER_THAN_SCORES},
    )


def _prompt(messages: Any) -> str:
    """A text as it is; of messages the one of the user alone, or all with their roles."""
    if not isinstance(messages, list):
        return str(messages or "")
    told = [(str(mapping(m).get("role") or "?"), str(mapping(m).get("content") or "")) for m in messages]
    if len(told) == 1 and told[0][0] == "user":
        return told[0][1]
    return "\n".join(f"[{role}] {content}" for role, content in told)


def _put(answers: dict[int, dict[tuple[str, str, int], Answer]], step: int, answer: Answer) -> None:
    """Rows that have the same id are told apart by their order."""
    of_step, number_of = answers.setdefault(step, {}), 0
    while (answer.kind, answer.id, number_of) in of_step:
        number_of += 1
    of_step[answer.kind, answer.id, number_of] = answer
