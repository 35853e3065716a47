"""What a run is measured by before, while and after it trains: losses, sample answers, behaviour, forgetting.

In: trained parameters at a step. Out: `Measured`; lines in the metrics, samples and alarms, and for behaviour and
forgetting the files evaluations/STEP.json and evaluations/STEP.predictions.jsonl in the workdir. Every process calls
it; the first writes.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tqdm import tqdm

from jax_sft.config import OWN_PROMPTS, RunConfig, deciding_key, did_you_mean, is_better_low
from jax_sft.data.loader import Loader
from jax_sft.data.source import validation_groups
from jax_sft.disk import written_whole
from jax_sft.evaluate import behaviour, probes, rules
from jax_sft.evaluate.answers import Answer, Messages, answer, has_room
from jax_sft.evaluate.forgetting import drift_of, judge, lines
from jax_sft.evaluate.losses import Losses, evaluate_losses
from jax_sft.evaluate.metrics import write_predictions
from jax_sft.exam import broadcast
from jax_sft.generate import Sampling
from jax_sft.hf.load import Pretrained
from jax_sft.metrics import Alarm, Metrics
from jax_sft.origin import GENERAL, Watched, numbers_of
from jax_sft.parameters import joined

_log = logging.getLogger(__name__)

_FOLDER = "evaluations"


@dataclasses.dataclass(frozen=True)
class Measured:
    """What an evaluation found."""

    step: int
    losses: Losses | None = None
    values: Mapping[str, float] = dataclasses.field(default_factory=dict)  # all of it, as metrics.jsonl names it
    must_stop: bool = False  # it forgot more than it may

    def deciding(self, config: RunConfig) -> float | None:
        """What tells which step is the best, the lower the better; None if there is no validation set.

        Raises:
            ValueError: `evaluate.best` names what is not measured.
        """
        key = deciding_key(config.evaluate.best)
        # A behaviour that applied to none of the answers is not there this time.
        is_behaviour = config.evaluate.probes is not None and key.removeprefix("probes/") in probes.BEHAVIOURS
        if key not in self.values and config.evaluate.best is not None and not is_behaviour:
            known = sorted(self.values)
            raise ValueError(
                f"evaluate.best = {config.evaluate.best!r} is not measured{did_you_mean(key, known)}; what is: "
                + ", ".join(known)
            )
        value = self.values.get(key)
        return None if value is None else value if is_better_low(key) else -value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluations:
    """What is measured of a run's model, and with what."""

    config: RunConfig
    workdir: pathlib.Path
    mesh: Mesh
    base: Pretrained
    graphdef: Any
    frozen: Any
    validation: Loader | None
    sources: tuple[str, ...]
    eval_step: Callable[..., Any]
    asked: Mapping[str, behaviour.Asked]  # probes and rules under "", tasks under the names of their sets
    watched: tuple[Watched, ...]  # what the model is compared with its origin by

    def at(self, step: int, params: Any, metrics: Metrics) -> Measured:
        """Losses, sample answers and, if it is time for them, behaviour and forgetting."""
        losses = self._losses(step, params, metrics)
        self._sample(step, params, metrics)
        values, must_stop, of = {} if losses is None else _values(losses), False, self.config.evaluate
        if self._is_due(step, ("probes/", "rules/", "metric/"), of.behaviour_every_steps):
            values |= self.behaviour_at(step, params, metrics)
        if self._is_due(step, ("forgetting/",), of.forgetting.every_steps or 1):
            found, must_stop = self.forgetting_at(step, params, metrics)
            values |= found
        return Measured(step, losses, values, must_stop)

    def complete(self, step: int, params: Any, metrics: Metrics) -> None:
        """Of a step that is exported, what was not due when it was evaluated."""
        if self.asked and not self._is_noted(step, ("probes", "rules", "metrics")):
            self.behaviour_at(step, params, metrics)
        if self.watched and not self._is_noted(step, ("forgetting",)):
            self.forgetting_at(step, params, metrics)

    def forgetting_at(self, step: int, params: Any, metrics: Metrics) -> tuple[dict[str, float], bool]:
        """How far the model has gone from its origin; its numbers, and whether that is too far to go on."""
        if not self.watched:
            return {}, False
        drifts = {
            of.name: drift_of(
                of.compared,
                of.drift_step,
                params,
                frozen=self.frozen,
                mesh=self.mesh,
                label=f"{of.name} at step {step}",
            )
            for of in self.watched
        }
        values = numbers_of(drifts)
        metrics.write(step, values)
        for name, drift in drifts.items():
            _say("\n".join(lines(drift, of=name)))
        alarms = judge(drifts[GENERAL], self.config.evaluate.forgetting)
        for alarm in alarms:
            metrics.write_alarm(Alarm(step, "forgetting", alarm.level, alarm.text))
        told = {name.partition("/")[2]: value for name, value in values.items()}
        self._note(step, {"forgetting": told | {"by_source": drifts[GENERAL].by_source}})
        return values, any(alarm.level == "stop" for alarm in alarms)

    def behaviour_at(self, step: int, params: Any, metrics: Metrics) -> dict[str, float]:
        """Probes, rules and tasks, answered and judged; their numbers."""
        if not self.asked:
            return {}
        reports = {
            name: asked.measure(self._asking(params, f"{name or 'probes and rules'} at step {step}"))
            for name, asked in self.asked.items()
        }
        # One process has the say: a program may run out of its time on one host alone.
        values: dict[str, float] = json.loads(broadcast(json.dumps(dict(_numbers(reports))).encode()))
        metrics.write(step, values)
        if jax.process_index() == 0:
            self._write(step, reports)
            for name, report in reports.items():
                tqdm.write("\n".join(behaviour.lines({f"step {step}" + (f", {name}" if name else ""): report})))
        return values

    def _is_noted(self, step: int, parts: Sequence[str]) -> bool:
        """Whether any of the parts was measured at a step; the same answer on every process."""
        is_there = any(part in _noted(_place(self.workdir, step)) for part in parts)
        return bool(multihost_utils.broadcast_one_to_all(np.int32(is_there))) if jax.process_count() > 1 else is_there

    def _is_due(self, step: int, deciding: tuple[str, ...], every: int | None) -> bool:
        """At the start, where it decides which step is the best, and `every` so many steps."""
        if step == 0 or deciding_key(self.config.evaluate.best).startswith(deciding):
            return True
        return every is not None and step % every == 0

    def _losses(self, step: int, params: Any, metrics: Metrics) -> Losses | None:
        if self.validation is None:
            return None
        label = f"validation at step {step}" if step else "validation before training"
        losses = evaluate_losses(
            self.eval_step,
            params,
            frozen=self.frozen,
            loader=self.validation,
            mesh=self.mesh,
            sources=self.sources,
            label=label,
        )
        metrics.write(step, _values(losses))
        _say(f"{label}: loss {losses.loss:.4f}, accuracy {losses.accuracy:.1%}, {losses.tokens:.0f} trained tokens")
        if len(losses.by_source) > 1:
            for name, part in losses.by_source.items():
                _say(f"  {name}: loss {part['loss']:.4f}, accuracy {part['accuracy']:.1%}")
        return losses

    def _sample(self, step: int, params: Any, metrics: Metrics) -> None:
        prompts = self.config.evaluate.prompts
        if not prompts:
            return
        answers = self._asking(params)([[{"role": "user", "content": prompt}] for prompt in prompts])
        samples = [
            {"prompt": prompt, "answer": a.text, "tokens": a.tokens, "stopped": a.stopped}
            for prompt, a in zip(prompts, answers, strict=True)
        ]
        metrics.write_samples(step, samples)
        for sample in samples:
            _say(f"  > {sample['prompt']}\n    {sample['answer']}{'' if sample['stopped'] else ' …'}")

    def _asking(self, params: Any, label: str | None = None) -> behaviour.Ask:
        def ask(conversations: Sequence[Messages | str]) -> list[Answer]:
            if label is not None:
                _say(f"{label}: {len(conversations)} prompts")
            return answer(
                self.graphdef,
                joined(params, self.frozen),
                template=self.base.template,
                conversations=conversations,
                max_new_tokens=self.config.evaluate.max_new_tokens,
                sampling=Sampling(),
            )

        return ask

    def _write(self, step: int, reports: Mapping[str, behaviour.Report]) -> None:
        own = reports.get("", behaviour.Report()).to_dict()
        tasks = {name: report.to_dict()["metrics"] for name, report in reports.items() if name}
        place = _place(self.workdir, step)
        place.parent.mkdir(exist_ok=True)
        predictions = [
            dataclasses.replace(line, id=f"{name}/{line.id}" if name else line.id)
            for name, report in reports.items()
            for line in report.predictions
        ]
        write_predictions(place.with_suffix(".predictions.jsonl"), predictions)
        self._note(step, {**own, **({"metrics": tasks} if tasks else {})})

    def _note(self, step: int, part: Mapping[str, Any]) -> None:
        """Beside what the step's file holds already."""
        if jax.process_index() > 0:
            return
        place = _place(self.workdir, step)
        place.parent.mkdir(exist_ok=True)
        said = {"step": step, **_noted(place), **part}
        with written_whole(place) as file:
            file.write(json.dumps(said, indent=1, ensure_ascii=False) + "\n")


def asked_of(config: RunConfig, base: Pretrained) -> dict[str, behaviour.Asked]:
    """What `config.evaluate` wants to know of the model, as far as its prompts fit into the context.

    Raises:
        ValueError: a file of prompts is missing or wrong, a metric cannot be measured, or no prompt of a kind fits.
    """
    of, found = config.evaluate, {}
    is_templated = base.chat_template is not None
    if of.probes is not None or of.rules is not None:
        found[""] = behaviour.Asked(
            probes=() if of.probes is None else probes.read_prompts(_file(of.probes)),
            rules=() if of.rules is None else rules.read_prompts(_file(of.rules)),
            templated=is_templated,
        )
    for name, parts in validation_groups(config.data).items() if of.metrics else ():
        found[name.removeprefix("validation, ")] = behaviour.Asked(
            tasks=behaviour.tasks_of(parts, config=config.data, count=of.metric_rows),
            metrics=of.metrics,
            runs_code=of.run_code,
            templated=is_templated,
        )

    fits = functools.partial(
        has_room, base.template, max_positions=base.config.max_positions, max_new_tokens=of.max_new_tokens
    )
    for name, asked in found.items():
        asked.check()
        found[name], left_out = asked.fitting(fits)
        if left_out:
            _log.warning(
                "evaluate: %d prompts of %s are left out, the model has no room for them and an answer of %d tokens",
                left_out, name or "the probes and rules", of.max_new_tokens,
            )  # fmt: skip
    return found


def fingerprint_of(*measured: Any) -> str:
    """Of what is measured and by what: prompts, texts, bounds; anything that tells itself by `repr`."""
    return hashlib.blake2b(repr(measured).encode("utf-8", "replace"), digest_size=16).hexdigest()


def forget_after(workdir: pathlib.Path, step: int | None, *, owed_step: int) -> None:
    """Delete what was measured of steps that are trained or evaluated anew: `owed_step`, those after `step`, or all."""
    if jax.process_index() > 0:
        return
    for path in (workdir / _FOLDER).glob("*.json*"):
        number = path.name.partition(".")[0]
        if number.isdigit() and (step is None or int(number) > step or int(number) == owed_step):
            path.unlink()


def _file(prompts: str) -> str | None:
    return None if prompts == OWN_PROMPTS else os.path.expanduser(prompts)


def _place(workdir: pathlib.Path, step: int) -> pathlib.Path:
    return workdir / _FOLDER / f"{step:08d}.json"


def _noted(place: pathlib.Path) -> dict[str, Any]:
    return json.loads(place.read_text(encoding="utf-8")) if place.exists() else {}


def _values(losses: Losses) -> dict[str, float]:
    values = {"validation/loss": losses.loss, "validation/accuracy": losses.accuracy}
    for name, part in losses.by_source.items():
        values |= {f"validation/loss/{name}": part["loss"], f"validation/accuracy/{name}": part["accuracy"]}
    return values


def _numbers(reports: Mapping[str, behaviour.Report]) -> Iterator[tuple[str, float]]:
    """The main numbers by their names in metrics.jsonl."""
    for name, report in reports.items():
        for key in probes.BEHAVIOURS:
            if key in report.probes:
                yield f"probes/{key}", report.probes[key]
        for level in ("prompt", "instruction"):
            for how in ("strict", "loose"):
                if report.rules:
                    yield f"rules/{level}_{how}", report.rules[f"{level}_{how}"]
        for metric, result in report.metrics.items():
            yield f"metric/{name}/{metric}", result.value


def _say(text: str) -> None:
    """A line above the progress bars, from the first process."""
    if jax.process_index() == 0:
        tqdm.write(text)
