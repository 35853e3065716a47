"""What a configuration says of evaluations: names, files, levels, and what decides which step is the best.

In: a `RunConfig` whose values have their types. Out: a sentence for each problem, with the way out.
"""

import dataclasses
import difflib
import math
import os
from collections.abc import Iterator, Sequence

from jax_sft.config.sections import ForgettingConfig, LevelConfig, RunConfig

OWN_PROMPTS = "own"  # of evaluate.probes and evaluate.rules: those of ours
METRICS = (
    "exact_match", "f1", "final_number", "label_accuracy", "json_valid", "json_match", "bleu", "chrf", "rouge1",
    "rouge2", "rougeL", "pass_at_1",
)  # fmt: skip
# What may decide which step is the best, and where it comes from.
_MEASURED = {
    "validation/": "data.validation or data.holdout",
    "probes/": "evaluate.probes",
    "rules/": "evaluate.rules",
    "metric/": "evaluate.metrics",
    "forgetting/": "evaluate.forgetting.texts",
}


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """A question with the nearest of the known names, to be put behind a message; "" if none is near."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if not near:
        leaf = name.rsplit(".", 1)[-1]
        leaves = {k.rsplit(".", 1)[-1]: k for k in known}
        near = [leaves[m] for m in difflib.get_close_matches(leaf, list(leaves), n=1, cutoff=0.6)]
    return f"; did you mean {near[0]}?" if near else ""


def evaluation_checks(run: RunConfig) -> Iterator[str]:
    """All of them."""
    of = run.evaluate
    asked = of.prompts or of.probes or of.rules or of.forgetting.texts
    if of.every_steps is not None and not is_measured(run) and not asked:
        yield (
            "evaluate.every_steps is set, but there is nothing to evaluate; set data.validation, data.holdout, "
            "evaluate.prompts, probes, rules or forgetting.texts"
        )
    yield from _behaviour_checks(run)
    yield from _forgetting_checks(run)
    yield from _validation_checks(run)


def _behaviour_checks(run: RunConfig) -> Iterator[str]:
    """What the model is asked during training."""
    of = run.evaluate
    for name in ("probes", "rules"):
        path = getattr(of, name)
        if path is not None and path != OWN_PROMPTS and not os.path.isfile(os.path.expanduser(path)):
            yield f"evaluate.{name}: there is no file {path}; name a JSON-lines file, or 'own' for the prompts of ours"
    for name in of.metrics:
        if name not in METRICS:
            hint = did_you_mean(name, METRICS)
            yield f"evaluate.metrics: {name!r} is no metric{hint}; there are {', '.join(METRICS)}"
    if of.metrics and not is_measured(run):
        yield "evaluate.metrics compares answers with those of a validation set; set data.validation or data.holdout"
    if "pass_at_1" in of.metrics and not of.run_code:
        yield "evaluate.metrics: pass_at_1 runs what the model wrote; set evaluate.run_code = True if that may be"
    if of.run_code and "pass_at_1" not in of.metrics:
        yield "evaluate.run_code is for the metric pass_at_1, which is not in evaluate.metrics; leave it out"
    if of.behaviour_every_steps is not None:
        if not (of.probes or of.rules or of.metrics):
            yield "evaluate.behaviour_every_steps is set, but none of evaluate.probes, rules and metrics; set one"
        elif of.every_steps is None or of.behaviour_every_steps % of.every_steps:
            yield (
                f"evaluate.behaviour_every_steps = {of.behaviour_every_steps} must be a multiple of "
                f"evaluate.every_steps = {of.every_steps}, for it is measured with the losses; set both"
            )


def _forgetting_checks(run: RunConfig) -> Iterator[str]:
    """What the model is compared with its base by, and how far it may go."""
    of, default = run.evaluate.forgetting, ForgettingConfig()
    if of.texts is None:
        for field in dataclasses.fields(of):
            if getattr(of, field.name) != getattr(default, field.name):
                yield (
                    f"evaluate.forgetting.{field.name} is set, but evaluate.forgetting.texts is not; name a file of "
                    "general texts there, or 'own' for those of ours"
                )
        return
    if of.texts != OWN_PROMPTS and not os.path.isfile(os.path.expanduser(of.texts)):
        yield (
            f"evaluate.forgetting.texts: there is no file {of.texts}; name a .jsonl or .txt file, or 'own' for the "
            "texts of ours"
        )
    if of.every_steps is not None and (run.evaluate.every_steps is None or of.every_steps % run.evaluate.every_steps):
        yield (
            f"evaluate.forgetting.every_steps = {of.every_steps} must be a multiple of evaluate.every_steps = "
            f"{run.evaluate.every_steps}, for it is measured with the losses; set both, or leave it out"
        )
    for name in ("loss_rise", "kl", "agreement"):
        yield from _level_checks(name, getattr(of, name))


def _level_checks(name: str, level: LevelConfig) -> Iterator[str]:
    key, is_share = f"evaluate.forgetting.{name}", name == "agreement"
    for word, value in (("alarm", level.alarm), ("stop", level.stop)):
        if value is not None and not (math.isfinite(value) and 0 <= value <= (1 if is_share else math.inf)):
            wanted = "a share from 0 to 1" if is_share else "a number from 0 on"
            yield f"{key}.{word} = {value} is no level; give {wanted}, or None for none"
    if level.alarm is not None and level.stop is not None:
        first, last = (level.stop, level.alarm) if is_share else (level.alarm, level.stop)
        if first > last:
            yield f"{key} stops at {level.stop} before it alarms at {level.alarm}; exchange the two"


def is_measured(run: RunConfig) -> bool:
    """Whether there is a validation set."""
    return bool(run.data.validation or run.data.validation_sets or run.data.holdout)


def _validation_checks(run: RunConfig) -> Iterator[str]:
    """What is measured, and by what the best is chosen."""
    data, best = run.data, run.evaluate.best
    for key, is_set in (
        ("evaluate.patience", run.evaluate.patience is not None),
        ("export.weights = 'best'", run.export.weights == "best"),
    ):
        if is_set and not is_measured(run) and not (best and "/" in best):
            yield f"{key} goes by the validation loss; set data.validation or data.holdout, or leave it out"
    if run.evaluate.patience is not None and run.evaluate.every_steps is None:
        yield "evaluate.patience counts evaluations, and there is none on the way; set evaluate.every_steps"
    if run.evaluate.patience is not None and run.stages:
        yield "evaluate.patience would end the run within a stage; leave it out, and let stages start from the best"
    if not 0 <= data.holdout <= 0.5:
        yield f"data.holdout = {data.holdout} must lie between 0 and 0.5; it is a share of the prompts, such as 0.02"
    for name, paths in data.validation_sets.items():
        if not paths:
            yield f"data.validation_sets.{name} is empty; name at least one file, folder, glob or hub dataset id"
        if name in data.sets and data.holdout:
            yield (
                f"data.validation_sets.{name}: data.holdout takes a part of data.sets.{name} under the same name; call "
                "one of them otherwise"
            )
    names = [*data.validation_sets, *(data.sets if data.holdout else ())]
    if best is not None and "/" in best:
        asks = (
            is_measured(run),
            run.evaluate.probes,
            run.evaluate.rules,
            run.evaluate.metrics,
            run.evaluate.forgetting.texts,
        )
        is_asked = dict(zip(_MEASURED, map(bool, asks), strict=True))
        kind = f"{best.partition('/')[0]}/"
        if best in names:
            yield f"evaluate.best = {best!r} holds a slash, as names of metrics.jsonl do; write validation/loss/{best}"
        elif kind not in _MEASURED:
            yield f"evaluate.best = {best!r} is no name of metrics.jsonl; those begin with {', '.join(_MEASURED)}"
        elif not is_asked[kind]:
            yield f"evaluate.best = {best!r} is not measured; set {_MEASURED[kind]}"
    elif best is not None and best not in names:
        known = f"the named sets are {', '.join(names)}" if names else "no set has a name: see data.validation_sets"
        yield f"evaluate.best = {best!r} is no validation set{did_you_mean(best, names)}; {known}"
