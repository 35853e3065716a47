"""`jax-sft eval`: what a model is worth, alone or against another."""

import argparse
import dataclasses
import functools
import json
import pathlib
import sys
from typing import TYPE_CHECKING, Any

from jax_sft import config as configs
from jax_sft.cli.start import EXIT_OK, check_writable, load
from jax_sft.disk import told_if_full

if TYPE_CHECKING:
    from jax_sft.assistant import Assistant


@dataclasses.dataclass
class _Found:
    """What was measured, by model, in the order in which they were asked."""

    names: list[str] = dataclasses.field(default_factory=list)
    losses: dict[str, Any] = dataclasses.field(default_factory=dict)
    accounts: dict[str, Any] = dataclasses.field(default_factory=dict)
    answers: dict[str, Any] = dataclasses.field(default_factory=dict)
    reports: dict[str, Any] = dataclasses.field(default_factory=dict)
    drifts: dict[str, Any] = dataclasses.field(default_factory=dict)
    tasks: dict[str, Any] = dataclasses.field(default_factory=dict)

    def of(self, name: str) -> dict[str, Any]:
        """Of one model, ready for JSON."""
        from jax_sft.evaluate.harness import jsonable

        said: dict[str, Any] = {}
        if name in self.losses:
            said |= self.losses[name].to_dict() | {"rows": dataclasses.asdict(self.accounts[name])}
        if name in self.reports:
            said |= self.reports[name].to_dict()
        if name in self.drifts:
            said["forgetting"] = self.drifts[name].to_dict()
        if name in self.tasks:
            said["tasks"] = jsonable(self.tasks[name])
        return said


def run_evaluate(options: argparse.Namespace, overrides: list[str]) -> int:
    """Measure, print, and write what --out asks for."""
    data, chat_template = _eval_config(options, overrides)
    check_writable(options.out)
    if options.against == options.model and not options.adapter:
        raise ValueError("--against names the same model as --model; name another one, or leave it out")
    from jax_sft.evaluate.side_by_side import conversations_of

    measured, texts = _measured(options, data), _texts(options)
    _check_tasks(options)
    # Adapters are those of --model; what it is compared with speaks by itself.
    asked = [(options.against, options.chat_template, [])] if options.against else []
    asked.append((options.model, chat_template, options.adapter))
    prompts = [[{"role": "user", "content": prompt}] for prompt in options.prompt]
    prompts += conversations_of(options.data, config=data, count=options.answers)
    prompts = _askable(options, prompts, asked) if prompts else []
    found, reading = _Found(), None
    for model, template, adapters in asked:
        assistant = load(options, model, chat_template=template, adapters=adapters)
        if texts and reading is None:  # with the model that is compared with, or without the adapters
            reading = assistant.with_adapter(None).reading(texts, batch_size=options.batch_size)
        for name in assistant.adapters or (None,):
            speaker, label = assistant.with_adapter(name), f"{model} + {name}" if name else model
            _measure(options, found, speaker, label, data=data, prompts=prompts, measured=measured)
            if reading is not None and model != options.against:
                found.drifts[label] = speaker.drift(reading)
        del assistant
    _print(options, found, prompts)
    if options.out:
        _write(options, found, prompts)
    return EXIT_OK


def _measure(
    options: argparse.Namespace,
    found: _Found,
    speaker: "Assistant",
    label: str,
    *,
    data: configs.DataConfig,
    prompts: list[Any],
    measured: Any,
) -> None:
    from jax_sft.evaluate.answers import has_room

    found.names.append(label)
    if options.data:
        found.losses[label], found.accounts[label] = speaker.losses(
            options.data, config=data, batch_size=options.batch_size
        )
    if prompts:
        found.answers[label] = speaker.answer_all(prompts, max_new_tokens=options.max_new_tokens)
    if measured is not None:
        asked = dataclasses.replace(measured, templated=speaker.base.chat_template is not None)
        fits = functools.partial(
            has_room,
            speaker.template,
            max_positions=speaker.base.config.max_positions,
            max_new_tokens=options.max_new_tokens,
        )
        asked, left_out = asked.fitting(fits)
        if left_out:
            print(f"left out, {label} has no room for {left_out} prompts and their answers", file=sys.stderr)
        ask = functools.partial(speaker.answer_all, max_new_tokens=options.max_new_tokens)
        found.reports[label] = asked.measure(ask)
    if options.tasks:
        from jax_sft.evaluate.harness import Examinee, run_tasks

        found.tasks[label] = run_tasks(
            Examinee(label, speaker.graphdef, speaker.params, speaker.template, speaker.mesh),
            options.tasks,
            include_path=options.tasks_folder,
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            batch_size=options.batch_size,
            apply_chat_template=options.apply_chat_template,
        )


def _print(options: argparse.Namespace, found: _Found, prompts: list[Any]) -> None:
    from jax_sft.evaluate import behaviour, forgetting, harness
    from jax_sft.evaluate.metrics import write_predictions
    from jax_sft.evaluate.side_by_side import print_accounts, print_answers, print_losses

    if found.losses:
        print_accounts(found.accounts)
        print_losses(found.losses)
    if found.reports:
        print("\n".join(behaviour.lines(found.reports)))
        if options.predictions:
            write_predictions(options.predictions, behaviour.predictions_of(found.reports))
    for name, drift in found.drifts.items():
        against = options.against or options.model
        print("\n".join([f"{name} against {against}", *forgetting.lines(drift)]))
    for name, results in found.tasks.items():
        print("\n".join([name, *harness.lines(results)]))
    if prompts:
        print_answers(prompts, found.answers)


def _write(options: argparse.Namespace, found: _Found, prompts: list[Any]) -> None:
    said = {name: found.of(name) for name in found.names}
    against = next(iter(said)) if options.against else None
    first, *others = (name for name in said if name != against)
    report = said[first]
    if others:
        report["adapters"] = {name: said[name] for name in others}
    if against is not None:
        report["against"] = said[against]
    if prompts:
        report["answers"] = [
            {"messages": messages, **{name: given[i].text for name, given in found.answers.items()}}
            for i, messages in enumerate(prompts)
        ]
    with told_if_full(options.out):
        text = json.dumps(report, indent=2, ensure_ascii=False)
        pathlib.Path(options.out).write_text(text + "\n", encoding="utf-8")


def _texts(options: argparse.Namespace) -> list[Any]:
    """General texts, read before a model is loaded; none if nothing is compared."""
    if options.forgetting is None:
        return []
    if not (options.against or options.adapter):
        raise ValueError(
            "--forgetting compares with what the model was made of; name that with --against, or the --adapter that "
            "was trained on it"
        )
    from jax_sft.evaluate.forgetting import read_texts

    return read_texts(options.forgetting or None)


def _check_tasks(options: argparse.Namespace) -> None:
    of_tasks = {
        "--tasks-folder": options.tasks_folder,
        "--limit": options.limit,
        "--num-fewshot": options.num_fewshot is not None,
        "--apply-chat-template": options.apply_chat_template,
    }
    for flag, value in of_tasks.items():
        if value and not options.tasks:
            raise ValueError(f"{flag} belongs to --tasks, which is not set; name tasks there, or leave it out")
    if options.tasks:
        from jax_sft.evaluate.harness import check_tasks

        check_tasks(options.tasks, include_path=options.tasks_folder)


def _measured(options: argparse.Namespace, data: configs.DataConfig) -> Any:
    """What the model is asked beside its losses (`behaviour.Asked`), read before it is loaded; None if nothing."""
    wants = (options.probes is not None, options.rules is not None, bool(options.metric))
    if not (options.data or options.prompt or options.tasks or options.forgetting is not None or any(wants)):
        raise ValueError(
            "there is nothing to measure; name files with --data, or ask for --probes, --rules, --tasks or --forgetting"
        )
    if options.metric and not options.data:
        raise ValueError("--metric compares answers with those of --data, which is not set; name files there")
    if options.predictions and not any(wants):
        raise ValueError("--predictions holds what was said to --probes, --rules or --metric; ask for one of them")
    if options.predictions and options.predictions == options.out:
        raise ValueError(f"--predictions and --out are both {options.out}; name two files")
    if not any(wants):
        return None
    from jax_sft.data.source import parts_of
    from jax_sft.evaluate import behaviour, metrics, probes, rules

    for name in options.metric:
        if name not in metrics.METRICS:
            known = tuple(metrics.METRICS)
            raise ValueError(
                f"--metric {name}: no metric{configs.did_you_mean(name, known)}; there are {', '.join(known)}"
            )
    if "pass_at_1" in options.metric and not options.run_code:
        raise ValueError("--metric pass_at_1 runs what the model wrote; say --run-code if that may be")
    check_writable(options.predictions)
    asked = behaviour.Asked(
        probes=probes.read_prompts(options.probes or None) if wants[0] else (),
        rules=rules.read_prompts(options.rules or None) if wants[1] else (),
        tasks=behaviour.tasks_of(parts_of(options.data), config=data, count=options.answers or None)
        if options.metric
        else (),
        metrics=tuple(options.metric),
        runs_code=options.run_code,
    )
    asked.check()
    return asked


def _askable(
    options: argparse.Namespace, prompts: list[Any], asked: list[tuple[str, str | None, list[str]]]
) -> list[Any]:
    """The prompts that every model has room for: two columns of answers are answers to the same prompts."""
    from jax_sft.evaluate.answers import askable
    from jax_sft.hf.load import load_pretrained
    from jax_sft.hf.peft import with_template_of

    for model, template, adapters in asked:
        base = load_pretrained(model, revision=options.revision, chat_template=template)
        own = {adapter: with_template_of(adapter, base) for adapter in adapters} if template is None else {}
        for name, speaker in (own or {model: base}).items():
            prompts, reasons = askable(
                prompts,
                template=speaker.template,
                max_positions=base.config.max_positions,
                max_new_tokens=options.max_new_tokens,
            )
            for reason in reasons:
                print(f"left out, {name} cannot answer {reason}", file=sys.stderr)
    return prompts


# What else sets in `eval` what a config's key sets in `train`.
_EVAL_FLAGS = {
    "model.path": "--model",
    "model.revision": "--revision",
    "model.dtype": "--dtype",
    "model.chat_template": "--chat-template",
    "data.train": "--data",
    "data.validation": "--data",
    "train.batch_size": "--batch-size",
    "evaluate.prompts": "--prompt",
    "evaluate.max_new_tokens": "--max-new-tokens",
}


def _eval_config(options: argparse.Namespace, overrides: list[str]) -> tuple[configs.DataConfig, str | None]:
    """How `eval` reads its files: a config's data section, or the defaults, and overrides of either.

    And the chat template of --model: --chat-template, else the config's. An override that `eval` would not read is
    refused; a config file may hold what it likes, being one of a training.
    """
    keys = [override.partition("=")[0] for override in overrides]
    for key in keys:
        of_several = key.startswith(("stages.", "data.sets."))
        if of_several or (
            key in configs.known_keys() and (key in {*_EVAL_FLAGS, "data.cache"} or not key.startswith("data."))
        ):
            way_out = f"set {_EVAL_FLAGS[key]} instead" if key in _EVAL_FLAGS else "leave it out"
            raise ValueError(f"--config.{key}: eval does not read this key; {way_out}")
    if options.max_length and "data.max_length" in keys:
        raise ValueError("--max-length and --config.data.max_length are both set; leave one out")
    if options.config:
        run = configs.load(options.config, overrides)
    else:
        config = configs.default().to_dict()
        files = options.data or [options.model]  # a config names files; without --data none is read
        config["model"]["path"], config["data"]["train"], config["train"]["steps"] = options.model, files, 1
        run = configs.from_config_dict(config, overrides)
    data = dataclasses.replace(run.data, max_length=options.max_length) if options.max_length else run.data
    return data, options.chat_template or run.model.chat_template
