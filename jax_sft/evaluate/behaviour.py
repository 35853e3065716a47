"""What a model does when it is asked: behaviour probes, instructions that a program can check, tasks with references.

In: how to ask a model, and prompts. Out: a `Report` of shares and scores with what was said. The rooms `probes`,
`rules` and `metrics` judge; here the model is asked, and the outcome is told.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jax_sft.config import DataConfig
from jax_sft.data.conversation import Account, Conversation
from jax_sft.data.formats import read_conversations
from jax_sft.data.source import Part
from jax_sft.evaluate import metrics
from jax_sft.evaluate import probes as behaviour_probes
from jax_sft.evaluate import rules as checked_rules
from jax_sft.evaluate.answers import Answer, Messages
from jax_sft.evaluate.metrics import MetricResult, Prediction

Ask = Callable[[Sequence[Messages | str]], Sequence[Answer]]  # a text is what a model without a template goes on from


@dataclasses.dataclass(frozen=True)
class Task:
    """A conversation up to its last answer, and that answer."""

    id: str
    messages: list[dict[str, Any]]
    reference: str


@dataclasses.dataclass(frozen=True)
class Report:
    """What was measured of one model; what was not asked for is empty."""

    probes: Mapping[str, float] = dataclasses.field(default_factory=dict)  # as `probes.summary`
    rules: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # as `rules.scores`
    metrics: Mapping[str, MetricResult] = dataclasses.field(default_factory=dict)
    predictions: Sequence[Prediction] = ()  # of all three, in this order

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON, without the predictions."""
        found = {
            name: {"value": r.value, "interval": list(r.interval), "scale": r.scale, "notes": list(r.notes)}
            for name, r in self.metrics.items()
        }
        parts = {"probes": dict(self.probes), "rules": dict(self.rules), "metrics": found}
        return {name: part for name, part in parts.items() if part}


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is measured."""

    probes: Sequence[behaviour_probes.Probe] = ()
    rules: Sequence[checked_rules.RulePrompt] = ()
    tasks: Sequence[Task] = ()
    metrics: Sequence[str] = ()  # names, for the tasks
    runs_code: bool = False  # whether pass_at_1 may run what the model wrote
    templated: bool = True  # whether the model has a chat template; if not, it is given plain text

    def check(self) -> None:
        """Find out before a model is asked what a metric would only say afterwards.

        Raises:
            ValueError: a package is missing, or references are not what the metric can compare with.
        """
        wanted = [task.reference for task in self.tasks]
        for name in self.metrics:
            if name != "pass_at_1":  # it would run the references
                metrics.score(name, wanted, wanted, draws=1)

    def fitting(self, fits: Callable[[Messages | str], bool]) -> tuple["Asked", int]:
        """The same without what does not fit, and how many prompts that leaves out.

        Raises:
            ValueError: it leaves out all of a kind.
        """
        kinds = {
            "probes": (self.probes, [probe for probe in self.probes if fits(self._of_probe(probe))]),
            "rules": (self.rules, [prompt for prompt in self.rules if fits(self._of_user(prompt.prompt))]),
            "tasks": (self.tasks, [task for task in self.tasks if fits(self._of_task(task))]),
        }
        for name, (all_of_it, kept) in kinds.items():
            if all_of_it and not kept:
                raise ValueError(
                    f"the model has no room for any prompt of the {name} and an answer; lower --max-new-tokens"
                )
        left_out = sum(len(all_of_it) - len(kept) for all_of_it, kept in kinds.values())
        return dataclasses.replace(self, **{name: kept for name, (_, kept) in kinds.items()}), left_out

    def measure(self, ask: Ask) -> Report:
        """Ask a model everything.

        Raises:
            ValueError: of the metrics, or of the model.
        """
        predictions: list[Prediction] = []
        shares = self._probed(ask, predictions) if self.probes else {}
        followed = self._followed(ask, predictions) if self.rules else {}
        scored = self._scored(ask, predictions) if self.tasks else {}
        return Report(shares, followed, scored, predictions)

    def _of_probe(self, probe: behaviour_probes.Probe) -> Messages | str:
        return list(probe.messages) if self.templated else behaviour_probes.as_plain_text(probe)

    def _of_user(self, text: str) -> Messages | str:
        return _of_user(text) if self.templated else text + "\n"

    def _of_task(self, task: Task) -> Messages | str:
        return task.messages if self.templated else "".join(f"{m['content']}\n" for m in task.messages)

    def _probed(self, ask: Ask, predictions: list[Prediction]) -> dict[str, float]:
        answers = ask(list(map(self._of_probe, self.probes)))
        judgements = [
            behaviour_probes.judge(probe, said.text, stopped=said.stopped, tokens=said.tokens)
            for probe, said in zip(self.probes, answers, strict=True)
        ]
        for probe, said, judgement in zip(self.probes, answers, judgements, strict=True):
            shown = {name: getattr(judgement, name) for name in behaviour_probes.BEHAVIOURS}
            scores = {name: float(is_so) for name, is_so in shown.items() if is_so is not None}
            predictions.append(_prediction(f"probes/{probe.id}", probe.messages, None, said, scores))
        return behaviour_probes.summary(judgements)

    def _followed(self, ask: Ask, predictions: list[Prediction]) -> dict[str, Any]:
        answers = ask([self._of_user(prompt.prompt) for prompt in self.rules])
        for prompt, said in zip(self.rules, answers, strict=True):
            verdict = checked_rules.check(prompt, said.text)
            scores = {
                f"{i.id}/{n}": float(x)
                for n, (i, x) in enumerate(zip(prompt.instructions, verdict.strict, strict=True))
            }
            predictions.append(_prediction(f"rules/{prompt.key}", _of_user(prompt.prompt), None, said, scores))
        return checked_rules.scores(self.rules, [said.text for said in answers])

    def _scored(self, ask: Ask, predictions: list[Prediction]) -> dict[str, MetricResult]:
        answers = ask(list(map(self._of_task, self.tasks)))
        texts, wanted = [said.text for said in answers], [task.reference for task in self.tasks]
        found = {
            name: metrics.score(name, texts, wanted, **({"unsafe": self.runs_code} if name == "pass_at_1" else {}))
            for name in self.metrics
        }
        for i, (task, said) in enumerate(zip(self.tasks, answers, strict=True)):
            scores = {name: result.by_row[i] for name, result in found.items() if result.by_row is not None}
            predictions.append(_prediction(task.id, task.messages, task.reference, said, scores))
        return found


def tasks_of(parts: Sequence[Part], *, config: DataConfig, count: int | None = None) -> list[Task]:
    """The conversations of files whose last message is an answer; at most `count` of them.

    Raises:
        DataError: of the files; ValueError: none of them has an answer.
    """
    found = []
    for conversation in read_conversations(config, parts, Account()):
        if len(found) == count:
            break
        found += _task(conversation)
    if not found:
        paths = ", ".join(path for part in parts for path in part.paths)
        raise ValueError(f"{paths}: no conversation ends with an answer that others could be compared with")
    return found


def _task(conversation: Conversation) -> Iterator[Task]:
    if conversation.text is not None and conversation.prompt_text:
        yield Task(conversation.id, _of_user(conversation.prompt_text), conversation.text)
    elif conversation.messages and conversation.messages[-1].role == "assistant":
        *before, last = conversation.messages
        if any(message.role == "user" for message in before):
            asked = [{"role": m.role, "content": m.content, **m.extra} for m in before]
            yield Task(conversation.id, asked, last.content)


def predictions_of(reports: Mapping[str, Report]) -> list[Prediction]:
    """What all models said; where there are several, the name of each stands before the ids."""
    if len(reports) == 1:
        return list(next(iter(reports.values())).predictions)
    return [
        dataclasses.replace(said, id=f"{name}: {said.id}") for name, of in reports.items() for said in of.predictions
    ]


def lines(reports: Mapping[str, Report]) -> list[str]:
    """The outcome for a terminal; of several models the others are compared with the first."""
    (first, before), *others = reports.items()
    out = []
    if before.probes:
        pairs = [(f"{first} -> {name}", after.probes) for name, after in others] or [(first, None)]
        for named, after in pairs:
            out += [f"behaviour probes, {named}", *behaviour_probes.table(before.probes, after)]
    for name, report in reports.items():
        if report.rules:
            of = report.rules
            strict, loose = (
                f"{of[f'instruction_{how}']:.1%}, {of[f'prompt_{how}']:.1%}" for how in ("strict", "loose")
            )
            counts = f"{of['instructions']} instructions and {of['prompts']} prompts"
            out.append(f"{name}: of {counts} followed {strict} strictly, {loose} loosely")
        for metric, r in report.metrics.items():
            low, high = r.interval
            out.append(f"{name}: {metric} {r.value:.4g} of {r.scale} (95 % interval {low:.4g} to {high:.4g})")
    return out


def _of_user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def _prediction(
    id: str, messages: Messages, reference: str | None, said: Answer, scores: Mapping[str, float]
) -> Prediction:
    return Prediction(id, messages, reference, said.text, said.stopped, said.tokens, scores)
