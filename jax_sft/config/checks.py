"""What one value of a configuration alone cannot tell: pairs that do not combine, numbers out of range, names.

In: a `RunConfig` whose values have their types. Out: a sentence for each problem, with the way out.
"""

import dataclasses
import importlib.util
import json
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from jax_sft.config.evaluation import did_you_mean, evaluation_checks, is_measured
from jax_sft.config.sections import RULES_OF_ALL, LoraConfig, QualityConfig, RunConfig

TEMPLATES = ("chatml", "plain", "alpaca")  # chat templates of ours, for models that have none
# What a chat template is given beside its arguments, or what would change how it is rendered.
RESERVED_ARGUMENTS = (
    "messages",
    "conversations",
    "tools",
    "documents",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "return_assistant_tokens_mask",
)
LARGEST = 2**31 - 1  # steps, lengths and sizes become int32 on the devices
PERSONAL_KINDS = (
    "iban", "card", "cn_id", "fr_insee", "us_ssn", "uk_nino", "br_cpf", "es_dni", "de_tax_id", "email", "ipv4", "phone"
)  # fmt: skip
# Keys of data.quality that a rule alone looks at: with the rule "off" they would do nothing.
_KEYS_OF_RULE = {
    "wrong_language": ("language_by",),
    "length": ("min_answer_characters", "max_answer_characters", "max_length_deviation"),
    "personal_data": ("personal_kinds",),
    "words": ("word_lists",),
    "score": ("scores", "min_ratio", "max_ratio", "max_loss"),
    "leakage": ("benchmarks", "leakage_words", "leakage_characters", "leakage_share"),
    "near_duplicate": ("near_duplicate_similarity",),
}
_ROLES = ("assistant", "user", "system", "developer", "tool", "all")
# What the hub takes for a model's name (huggingface_hub's validate_repo_id), with its organization or user.
_HUB_NAME = re.compile(r"(?!.*(?:--|\.\.|\.git$|[.-]$))[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)


def is_hub_name(text: str) -> bool:
    """Whether a model on the hub can be called `text`."""
    return _HUB_NAME.fullmatch(text) is not None


def cross_checks(run: RunConfig) -> Iterator[str]:
    """A sentence for each problem that one value alone cannot tell."""
    yield from _source_checks(run)
    yield from _lora_checks(run)
    yield from _data_checks(run)
    yield from evaluation_checks(run)
    yield from _stream_checks(run)
    yield from _range_checks(run)
    yield from _length_checks(run)
    sizes = {f"mesh.{axis}": size for axis, size in dataclasses.asdict(run.mesh).items()}
    for key, size in sizes.items():
        if size == 0 or size < -1:
            yield f"{key} = {size} must be a number of devices, or -1 for the devices left over"
    if list(sizes.values()).count(-1) > 1:
        yield "mesh: only one axis may be -1"


def _source_checks(run: RunConfig) -> Iterator[str]:
    """Where the model comes from and goes to."""
    if not run.model.path:
        yield "model.path is empty; set it to a Hugging Face folder, a hub id or a .gguf file"
    template = run.model.chat_template
    if template is not None and template not in TEMPLATES and not pathlib.Path(template).is_file():
        yield (
            f"model.chat_template: there is no file {template}; name a Jinja file or one of {', '.join(TEMPLATES)}"
            + did_you_mean(template, TEMPLATES)
        )
    if run.model.new_rows != "mean" and not run.model.new_tokens:
        yield (
            f"model.new_rows = {run.model.new_rows!r} says how the rows of model.new_tokens start, and that is empty; "
            "name the tokens there, or leave model.new_rows out"
        )
    if run.export.push_to is not None and not is_hub_name(run.export.push_to):
        yield f"export.push_to = {run.export.push_to!r} is no name of the hub; write org/name, or user/name"
    if run.export.push_private and run.export.push_to is None:
        yield "export.push_private belongs to export.push_to, which is not set; set it to org/name"
    if run.log.wandb_project is not None and importlib.util.find_spec("wandb") is None:
        yield "log.wandb_project is set, but wandb is not installed; install jax-sft[wandb]"


def _data_checks(run: RunConfig) -> Iterator[str]:
    """What is read, and which of it teaches."""
    for key, of in (("data.sets", run.data.sets), ("data.validation_sets", run.data.validation_sets)):
        if any(not name.strip() for name in of):
            yield f"{key}: a set has an empty name, which no log could tell; give it one"
    if not run.data.train and not run.data.sets:
        yield "data.train is empty; name at least one file, folder, glob or hub dataset id"
    yield from _mixture_checks(run)
    is_ordered = any(stage.order == "score" for stage in run.stages)
    yield from _quality_checks(run.data.quality, orders=is_ordered, is_measured=is_measured(run))
    for role in run.data.train_on.split(","):
        if role.strip() not in _ROLES:
            hint = did_you_mean(role.strip(), _ROLES)
            yield f"data.train_on: {role.strip()!r} is no role{hint}; the roles are {', '.join(_ROLES)}"
    if run.data.train_on == "all" and run.data.train_turns == "last":
        yield "data.train_on = 'all' trains every token, there is no last turn to choose; set data.train_turns = 'all'"
    for field, text in run.data.card.items():
        if not text.strip():
            yield f"data.card.{field} is empty; write what there is to say, or leave it out"
    yield from _template_checks("data.template_args", run.data.template_args)
    for name, of in run.data.sets.items():
        yield from _template_checks(f"data.sets.{name}.template_args", of.template_args)


def _template_checks(key: str, arguments: Mapping[str, Any]) -> Iterator[str]:
    """Arguments for the chat template."""
    for name, value in arguments.items():
        if name in RESERVED_ARGUMENTS:
            yield f"{key}.{name} is given to the chat template already; take it out"
        if not name.isidentifier():
            yield f"{key}: {name!r} is no name that a chat template could ask for; write letters, digits and _"
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            yield f"{key}.{name} = {value!r} is nothing that JSON can hold; write it as a text, a number or the like"


def _quality_checks(quality: QualityConfig, *, orders: bool, is_measured: bool) -> Iterator[str]:
    """Rules that need a library, a file or a bound; `orders` says whether a stage goes by the scores."""
    yield from _idle_keys(quality, orders=orders)
    if quality.near_duplicate != "off" and importlib.util.find_spec("datasketch") is None:
        yield "data.quality.near_duplicate needs datasketch, which is not installed; pip install 'jax-sft[quality]'"
    needs_model = quality.wrong_language != "off" and quality.language_by == "model"
    if needs_model and importlib.util.find_spec("py3langid") is None:
        yield (
            "data.quality.language_by = 'model' needs py3langid, which is not installed; pip install "
            "'jax-sft[quality]', or set it to 'script'"
        )
    for kind in quality.personal_kinds:
        if kind not in PERSONAL_KINDS:
            yield (
                f"data.quality.personal_kinds: {kind!r} is no kind{did_you_mean(kind, PERSONAL_KINDS)}; the kinds are "
                + ", ".join(PERSONAL_KINDS)
            )
    bounds = [name for name in ("min_ratio", "max_ratio", "max_loss") if getattr(quality, name) is not None]
    if bounds and quality.scores is None:
        yield f"data.quality.{bounds[0]} judges data.quality.scores, which is not set; name the file, or leave it out"
    if quality.scores is not None and quality.score != "off" and not bounds and not orders:
        yield (
            "data.quality.scores is set, but no bound; set data.quality.min_ratio, max_ratio or max_loss, or "
            "order = 'score' of a stage"
        )
    if quality.leakage != "off" and not quality.benchmarks and not is_measured:
        yield (
            f"data.quality.leakage = {quality.leakage!r}, but there is nothing whose prompts could leak; name files in "
            "data.quality.benchmarks or data.validation, or set data.holdout"
        )
    for low, high in (("min_ratio", "max_ratio"), ("min_answer_characters", "max_answer_characters")):
        least, most = getattr(quality, low), getattr(quality, high)
        if least is not None and most is not None and least > most:
            yield f"data.quality.{low} = {least} is above {high} = {most}, nothing lies between them; swap them"
    for name in ("near_duplicate_similarity", "leakage_share"):
        if not 0 < getattr(quality, name) <= 1:
            yield f"data.quality.{name} = {getattr(quality, name)} must be above 0 and at most 1"
    for name in ("leakage_words", "leakage_characters", "max_length_deviation"):
        if getattr(quality, name) is not None and getattr(quality, name) <= 0:
            yield f"data.quality.{name} = {getattr(quality, name)} must be greater than 0"


def _idle_keys(quality: QualityConfig, *, orders: bool) -> Iterator[str]:
    """Keys that are set beside a rule that is off; a stage's order goes by the scores without the rule."""
    default = QualityConfig()
    for rule, keys in _KEYS_OF_RULE.items():
        if getattr(quality, rule) != "off":
            continue
        ways = "'note', 'drop' or 'mask'" if rule == "personal_data" else "'note' or 'drop'"
        for key in keys:
            if getattr(quality, key) != getattr(default, key) and not (orders and key == "scores"):
                yield (
                    f"data.quality.{key} is set, but data.quality.{rule} = 'off'; set {rule} to {ways}, or leave {key} "
                    "out"
                )


def _mixture_checks(run: RunConfig) -> Iterator[str]:
    """Named sets, how much is drawn of each, and the stages that may draw otherwise."""
    sets = run.data.sets
    if sets and run.data.train:
        yield "data.train and data.sets are both set; put the files of data.train into a set of their own"
    if run.data.temperature is not None and not sets:
        yield "data.temperature belongs to data.sets, which is empty; name the sets, or leave it out"
    ways = ("weight", "count", "epochs")
    for name, part in sets.items():
        said = [way for way in ways if getattr(part, way) is not None]
        if not part.paths:
            yield f"data.sets.{name}.paths is empty; name at least one file, folder, glob or hub dataset id"
        if len(said) > 1:
            yield f"data.sets.{name}: {' and '.join(said)} both say how much is drawn; keep one of them"
        if said and run.data.temperature is not None:
            yield f"data.sets.{name}.{said[0]} and data.temperature both say how much is drawn; keep one of them"
    weighted = [name for name, part in sets.items() if part.weight is not None]
    if weighted and len(weighted) < len(sets):
        others = ", ".join(name for name in sets if name not in weighted)
        yield f"data.sets: {', '.join(weighted)} has a weight and {others} has none; weigh all of them, or none"
    for i, stage in enumerate(run.stages):
        unknown = [name for name in stage.weights if name not in sets]
        for name in unknown:
            yield f"stages.{i}.weights.{name}: there is no set {name}{did_you_mean(name, list(sets))}"
        if stage.weights and not unknown and not any(stage.weights.values()):
            yield f"stages.{i}.weights: all are 0; give one set a weight, or leave them out"
        if stage.start == "best" and i == 0:
            yield "stages.0.start = 'best': there is no stage before it; leave it out"
        if stage.start == "best" and not (is_measured(run) or "/" in (run.evaluate.best or "")):
            yield f"stages.{i}.start = 'best' is chosen by the validation loss; set data.validation or data.holdout"
    ordered = [i for i, stage in enumerate(run.stages) if stage.order == "score"]
    if ordered and run.data.quality.scores is None:
        yield f"stages.{ordered[0]}.order = 'score' needs a file of losses; name it in data.quality.scores"


def _stream_checks(run: RunConfig) -> Iterator[str]:
    """What cannot be had where the training files are read while training."""
    stream, sets = run.data.stream, run.data.sets
    if not stream.on:
        for field in dataclasses.fields(stream):
            if getattr(stream, field.name) != field.default:
                yield f"data.stream.{field.name} is set, but data.stream.on is False; set it to True, or leave this out"
        return
    parts = {f"stages.{i}": stage for i, stage in enumerate(run.stages)} or {"train": run.train}
    for place, part in parts.items():
        if part.epochs is not None:
            yield f"{place}.epochs: nobody knows how long an epoch of data.stream is; set {place}.steps instead"
    for i, stage in enumerate(run.stages):
        if stage.order != "random":
            yield f"stages.{i}.order = {stage.order!r} sorts all there is, which data.stream does not; leave it out"
    quality, default = run.data.quality, QualityConfig()
    for rule in RULES_OF_ALL:
        if getattr(quality, rule) not in ("off", getattr(default, rule)):
            yield (
                f"data.quality.{rule} compares all conversations, which data.stream does not hold; clean the files "
                "before, with jax-sft data --clean, or leave it out"
            )
    if quality.max_length_deviation is not None:
        yield (
            "data.quality.max_length_deviation looks at the beginning of the data, which data.stream does not; set "
            "min_answer_characters and max_answer_characters instead"
        )
    if run.data.holdout:
        yield "data.holdout would read all of data.stream before training; name files in data.validation instead"
    if run.data.temperature is not None:
        yield "data.temperature needs the sizes of all sets, which data.stream does not know; give each set a weight"
    for name, part in sets.items():
        for key in ("count", "epochs", "cap"):
            if getattr(part, key) is not None:
                yield f"data.sets.{name}.{key} counts all of the set, which data.stream does not; give it a weight"
    unweighed = [name for name, part in sets.items() if part.weight is None]
    if len(sets) > 1 and unweighed and not (run.stages and all(stage.weights for stage in run.stages)):
        yield (
            f"data.sets.{unweighed[0]} has no weight, and data.stream does not know the sizes that would say how much "
            "of it to draw; set data.sets.<name>.weight, or stages.<number>.weights"
        )
    if stream.predicted is not None and stream.predicted > run.data.max_length:
        yield (
            f"data.stream.predicted = {stream.predicted} is more than the data.max_length = {run.data.max_length} "
            "positions of a row; make it smaller, or leave it out"
        )


def _range_checks(run: RunConfig) -> Iterator[str]:
    """Numbers that are too small or too large."""
    positive = {
        "model.vocab_multiple": run.model.vocab_multiple,
        "lora.alpha": run.lora.alpha,
        "lora.b_lr_ratio": run.lora.b_lr_ratio,
        **{f"lora.rank_pattern.{name}": rank for name, rank in run.lora.rank_pattern.items()},
        **{f"lora.alpha_pattern.{name}": alpha for name, alpha in run.lora.alpha_pattern.items()},
        "data.max_length": run.data.max_length,
        "train.batch_size": run.train.batch_size,
        "train.accumulation": run.train.accumulation,
        "train.steps": run.train.steps,
        "train.epochs": run.train.epochs,
        "train.loss_chunk_tokens": run.train.loss_chunk_tokens,
        "evaluate.every_steps": run.evaluate.every_steps,
        "evaluate.patience": run.evaluate.patience,
        "evaluate.metric_rows": run.evaluate.metric_rows,
        "evaluate.behaviour_every_steps": run.evaluate.behaviour_every_steps,
        "evaluate.overfitting_rise": run.evaluate.overfitting_rise,
        "evaluate.forgetting.every_steps": run.evaluate.forgetting.every_steps,
        "evaluate.max_new_tokens": run.evaluate.max_new_tokens,
        "checkpoint.every_steps": run.checkpoint.every_steps,
        "checkpoint.keep": run.checkpoint.keep,
        "log.every_steps": run.log.every_steps,
        "optim.clip_norm": run.optim.clip_norm,
        "optim.eps": run.optim.eps,
        "optim.decay_steps": run.optim.decay_steps,
        "data.temperature": run.data.temperature,
        "data.stream.block": run.data.stream.block,
        "data.stream.unit_bytes": run.data.stream.unit_bytes,
        "data.stream.predicted": run.data.stream.predicted,
        **{
            f"data.sets.{name}.{key}": getattr(part, key)
            for name, part in run.data.sets.items()
            for key in ("weight", "count", "epochs", "cap", "loss_weight")
        },
        **{f"stages.{i}.{key}": getattr(s, key) for i, s in enumerate(run.stages) for key in ("steps", "epochs", "lr")},
    }
    for key, value in positive.items():
        if value is not None and value <= 0:
            yield f"{key} = {value} must be greater than 0"
    at_least_zero = {
        "lora.rank": run.lora.rank,
        "optim.lr": run.optim.lr,
        "optim.warmup_steps": run.optim.warmup_steps,
        "optim.weight_decay": run.optim.weight_decay,
        "optim.decay_to_base": run.optim.decay_to_base,
        "train.base_kl": run.train.base_kl,
        "evaluate.forgetting.task_batches": run.evaluate.forgetting.task_batches,
        "data.workers": run.data.workers,
        **{f"stages.{i}.weights.{name}": w for i, s in enumerate(run.stages) for name, w in s.weights.items()},
    }
    for key, value in at_least_zero.items():
        if value is not None and value < 0:
            yield f"{key} = {value} must not be negative"
    shares = {"optim.b1": run.optim.b1, "optim.b2": run.optim.b2, "lora.dropout": run.lora.dropout or 0.0}
    for key, value in shares.items():
        if not 0 <= value < 1:
            yield f"{key} = {value} must be at least 0 and below 1"
    if run.train.ema_decay is not None and not 0 < run.train.ema_decay < 1:
        yield f"train.ema_decay = {run.train.ema_decay} must lie between 0 and 1, such as 0.99; None averages nothing"
    if not 0 <= run.optim.final_lr_ratio <= 1:
        yield f"optim.final_lr_ratio = {run.optim.final_lr_ratio} must lie between 0 and 1"
    if not 0 <= run.seed < 2**32:
        yield f"seed = {run.seed} must lie between 0 and 2**32 - 1"


def _length_checks(run: RunConfig) -> Iterator[str]:
    """How long a run is, and what must fit into it."""
    parts = {f"stages.{i}": stage for i, stage in enumerate(run.stages)} or {"train": run.train}
    if run.stages and (run.train.steps is not None or run.train.epochs is not None):
        yield "train.steps and train.epochs: each of the stages has its own; leave these out"
    for place, part in parts.items():
        if (part.steps is None) == (part.epochs is None):
            said = "both are set" if part.steps is not None else "neither is set"
            yield f"{place}.steps and {place}.epochs: {said}; set exactly one of them"
        if part.steps is not None and run.optim.warmup_steps >= part.steps > 0:
            yield (
                f"optim.warmup_steps = {run.optim.warmup_steps} but {place}.steps = {part.steps}; "
                "make the warmup shorter or the run longer"
            )
        if part.epochs is not None and part.epochs > LARGEST:
            yield f"{place}.epochs = {part.epochs} is too large; the largest number here is {LARGEST} (2**31 - 1)"
    if run.optim.decay_steps is not None and run.optim.schedule != "wsd":
        yield f"optim.decay_steps belongs to optim.schedule = 'wsd', not {run.optim.schedule!r}; set it to None"
    if run.train.accumulation > 0 and run.train.batch_size % run.train.accumulation:
        yield (
            f"train.batch_size = {run.train.batch_size} cannot be cut into train.accumulation = "
            f"{run.train.accumulation} equal micro-batches; make the first a multiple of the second"
        )


def _lora_checks(run: RunConfig) -> Iterator[str]:
    """Adapters asked for halfway, and what belongs to them or to full fine-tuning alone."""
    lora, default = run.lora, LoraConfig()
    asked = [f.name for f in dataclasses.fields(LoraConfig) if getattr(lora, f.name) != getattr(default, f.name)]
    if lora.adapter is not None:
        said_by_it = [name for name in asked if name not in ("adapter", "dropout", "b_lr_ratio", "base")]
        if said_by_it:
            yield (
                f"lora.adapter = {lora.adapter!r} brings its own {' and '.join(said_by_it)}; leave out "
                + ", ".join(f"lora.{name}" for name in said_by_it)
            )
        if not pathlib.Path(lora.adapter).expanduser().is_dir():
            yield f"lora.adapter: there is no folder {lora.adapter}; name one that holds adapter_config.json"
    elif lora.rank == 0 and lora.base in ("int8", "nf4"):
        yield (
            f"lora.base = {lora.base!r} with lora.rank = 0: the weights of a quantised base cannot be trained; set "
            "lora.rank, such as 16, for adapters on it, or leave out lora.base for full fine-tuning"
        )
    elif lora.rank == 0 and asked:
        yield (
            f"lora.{asked[0]} asks for adapters, but lora.rank = 0 means full fine-tuning; set lora.rank, such as 16, "
            f"or leave out {', '.join(f'lora.{name}' for name in asked)}"
        )
    has_adapters = lora.rank > 0 or lora.adapter is not None
    if has_adapters and run.train.freeze:
        yield "train.freeze belongs to full fine-tuning; with adapters the base is frozen already, leave it out"
    if has_adapters and run.optim.decay_to_base:
        yield (
            "optim.decay_to_base with adapters: without them there is the base, and optim.weight_decay draws to that; "
            "set it instead, or train.base_kl"
        )
    if has_adapters and run.export.format == "full":
        yield "export.format = 'full' with adapters; choose 'merged' (the base with them added in) or 'adapter'"
    if not has_adapters and run.export.format in ("merged", "adapter"):
        yield f"export.format = {run.export.format!r}, but no adapters are trained; choose 'full', or set lora.rank"
    if has_adapters and run.model.new_tokens and run.export.format in (None, "adapter"):
        yield (
            "model.new_tokens with adapters: an adapter does not carry the rows of new tokens; set export.format = "
            "'merged', and lora.modules_to_save = ('embeddings',) if they are to be learnt"
        )
    if lora.layers is not None and _layer_numbers(lora.layers) is None:
        yield f"lora.layers = {lora.layers!r} is no list of layers; write it as 0-3,20-27"


def _layer_numbers(text: str) -> list[int] | None:
    """ "0-2,5" -> [0, 1, 2, 5]; None if it is no such list."""
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,5})\s*(?:-\s*(\d{1,5})\s*)?", part)
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            return None
        found.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return sorted(found)


def layer_numbers(text: str) -> list[int]:
    """Layers of a checked `lora.layers`: "0-2,5" -> [0, 1, 2, 5]."""
    numbers = _layer_numbers(text)
    assert numbers is not None
    return numbers
