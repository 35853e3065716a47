"""The run, as frozen dataclasses: what a config file may say, checked once at the door.

In: a Python file with `get_config() -> ml_collections.ConfigDict` and overrides `a.b=value`.
Out: a `RunConfig`, or one `ConfigError` that lists every problem with the nearest right name.
Defaults live here and nowhere else; past the door nobody reads a string key.
"""

import ast
import copy
import dataclasses
import difflib
import importlib.util
import math
import pathlib
import re
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from ml_collections import ConfigDict

NewRowsStart = Literal["mean", "zeros", "sample"]
# What the hub takes for a model's name (huggingface_hub's validate_repo_id), with its organization or user.
_HUB_NAME = re.compile(r"(?!.*(?:--|\.\.|\.git$|[.-]$))[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)


class ConfigError(ValueError):
    """The configuration cannot be run; the message lists every problem."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Where the base model comes from and how it computes."""

    path: str = ""  # a Hugging Face folder, a hub id, or a .gguf file
    revision: str | None = None  # branch, tag or commit of a hub id
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of the computation; trained weights stay float32
    chat_template: str | None = None  # replaces the tokenizer's own: one of TEMPLATES, or a Jinja file
    new_tokens: tuple[str, ...] = ()  # control tokens to add to the vocabulary
    new_rows: NewRowsStart = "mean"  # how their rows start; sample: drawn with the others' mean and deviation, by seed
    vocab_multiple: int = 128  # embedding and head are padded to it in training, so that mesh axes divide them
    attention: Literal["auto", "xla", "chunked"] = "auto"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters beside a frozen base, instead of training all of it."""

    rank: int = 0  # 0: no adapters, full fine-tuning
    alpha: float | None = None  # what adapters say counts alpha / rank times; None: twice the rank
    dropout: float | None = None  # of what goes into them; None: none, or what lora.adapter says
    # Kinds (see TARGETS) or module names as in the Hugging Face folder: "q_proj", "self_attn", a regular expression.
    targets: tuple[str, ...] = ("all-linear",)
    layers: str | None = None  # such as "0-3,20-27"; None: all
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)  # other ranks, by module name
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    rslora: bool = False  # alpha / sqrt(rank) instead (arXiv 2312.03732)
    dora: bool = False  # magnitude and direction apart (arXiv 2402.09353)
    start: Literal["default", "pissa"] = "default"  # pissa: from the largest singular values (arXiv 2404.02948)
    b_lr_ratio: float = 1.0  # B learns this many times as fast as A (LoRA+, arXiv 2402.12354)
    modules_to_save: tuple[str, ...] = ()  # also trained, in full: embeddings, head, norms or module names
    base: Literal["float32", "bfloat16", "int8", "nf4"] = "bfloat16"  # how the frozen weights are held
    adapter: str | None = None  # a folder in PEFT's format to go on from; it says rank, alpha, targets and the like


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, how it is rendered, which tokens teach."""

    train: tuple[str, ...] = ()  # files, globs, folders or hub dataset ids
    validation: tuple[str, ...] = ()
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text"] = "auto"
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)  # our field -> the column's name in the files
    split: str = "train"  # of a hub dataset
    max_length: int = 2048  # tokens in a packed row, and the longest sequence
    packing: bool = True
    too_long: Literal["drop", "truncate", "error"] = "drop"
    train_on: str = "assistant"  # roles that teach, separated by commas
    train_turns: Literal["all", "last"] = "all"
    mask: Literal["auto", "tags", "prefix", "sentinel", "turns"] = "auto"  # how trained spans are found
    workers: int = 0  # processes that tokenise; 0: this one
    cache: str | None = None  # folder of tokenised sets; None: beside the workdir


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, how much at once."""

    batch_size: int = 8  # packed rows in one optimizer step, over all devices and micro-batches
    accumulation: int = 1  # micro-batches an optimizer step is cut into
    epochs: float | None = None  # passes over the training set; exactly one of epochs and steps
    steps: int | None = None
    remat: Literal["none", "dots", "full", "offload"] = "dots"
    nonfinite: Literal["stop", "skip"] = "stop"  # what a loss or gradient that is not finite does
    loss_chunk_tokens: int = 1024  # predicted tokens whose logits exist at one time
    freeze: tuple[str, ...] = ()  # what full fine-tuning leaves alone: kinds or module names, as lora.targets


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its learning rate."""

    name: Literal["adamw"] = "adamw"
    # None: 1e-5, and with adapters 1e-4, for their best rate is about ten times that of full fine-tuning whatever the
    # model and the rank ("LoRA Without Regret", Schulman and Thinking Machines 2025)
    lr: float | None = None
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup_steps: int = 0
    final_lr_ratio: float = 0.1  # the schedule ends at lr times this
    decay_steps: int | None = None  # of wsd: the steps of its last part; None: a fifth of the run
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices by axis; one of them may be -1 and takes what is left."""

    data: int = 1
    fsdp: int = -1
    expert: int = 1  # experts are spread over it, and rows too
    tensor: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Validation and sample answers during training."""

    every_steps: int | None = None  # None: at the start and the end alone
    prompts: tuple[str, ...] = ()
    max_new_tokens: int = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the state is saved and how many saves are kept; the best by validation loss is kept beside them."""

    every_steps: int = 500
    keep: int = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is written while training."""

    every_steps: int = 1
    tensorboard: bool = True
    wandb_project: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """The Hugging Face folder at the end."""

    format: Literal["full", "merged", "adapter"] | None = None  # None: adapter if there are adapters, else full
    dtype: Literal["float32", "bfloat16", "float16"] | None = None  # None: bfloat16, and of adapters float32
    max_shard_size: str = "5GB"
    certify: bool = True  # read the folder back, compare logits, answer once; CERTIFICATE.json
    push_to: str | None = None  # the hub's name, org/name, that the folder is pushed to when a training has ended
    push_private: bool = False  # nobody else may see it there


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run."""

    seed: int = 0
    workdir: str = ""
    model: ModelSource = ModelSource()
    lora: LoraConfig = LoraConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()
    mesh: MeshConfig = MeshConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    export: ExportConfig = ExportConfig()

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dicts, ready for JSON."""
        return dataclasses.asdict(self)


def default() -> ConfigDict:
    """A `ConfigDict` with every key at its default: what a config file starts from."""
    return ConfigDict(_plain(RunConfig()), convert_dict=True, type_safe=False)


def load(path: str | pathlib.Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a config file, apply `a.b=value` overrides, check everything.

    Raises:
        ConfigError: with all problems at once.
    """
    config = _run_config_file(pathlib.Path(path))
    return from_config_dict(config, overrides)


def from_config_dict(config: ConfigDict | Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """Check a config against `RunConfig` and freeze it; unknown keys, wrong types and bad pairs come out together."""
    if not isinstance(config, ConfigDict | Mapping):
        raise ConfigError(
            f"a config is a ConfigDict or a dict, not {type(config).__name__}; see jax_sft.config.default()"
        )
    tree = config.to_dict() if isinstance(config, ConfigDict) else copy.deepcopy(dict(config))
    problems: list[str] = []
    for override in [overrides] if isinstance(overrides, str) else overrides:
        _apply_override(tree, override, problems)
    run = _build(RunConfig, tree, "", problems)
    if run is not None and not problems:
        problems += list(_cross_checks(run))
        run = _resolved(run)
    if problems:
        lines = "\n".join(f"  {i}. {p}" for i, p in enumerate(problems, 1))
        noun = "problem" if len(problems) == 1 else "problems"
        raise ConfigError(f"the config has {len(problems)} {noun}:\n{lines}")
    assert run is not None
    return run


def _resolved(run: RunConfig) -> RunConfig:
    """With what follows from other keys filled in, so that a manifest says what was used."""
    has_adapters = run.lora.rank > 0 or run.lora.adapter is not None
    lr = run.optim.lr if run.optim.lr is not None else 1e-4 if has_adapters else 1e-5
    form = run.export.format or ("adapter" if has_adapters else "full")
    export = dataclasses.replace(run.export, format=form, dtype=run.export.dtype or export_dtype(form))
    return dataclasses.replace(run, optim=dataclasses.replace(run.optim, lr=lr), export=export)


def export_dtype(form: str) -> str:
    """Of an export, if nobody says another: adapters are small, and leave as they were trained."""
    return "float32" if form == "adapter" else "bfloat16"


def known_keys() -> list[str]:
    """Every dotted key, in the order of the dataclasses."""
    return list(_keys(RunConfig, ""))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return dict(value) if isinstance(value, Mapping) else value


def _keys(cls: type, prefix: str) -> Iterator[str]:
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(f.type):
            yield from _keys(typing.cast(type, f.type), f"{prefix}{f.name}.")
        else:
            yield prefix + f.name


def _run_config_file(path: pathlib.Path) -> ConfigDict:
    if not path.is_file():
        raise ConfigError(f"--config {path}: no such file; name a Python file with a function get_config()")
    spec = importlib.util.spec_from_file_location("jax_sft_run_config", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--config {path}: its name does not end in .py; name a Python file with get_config()")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise ConfigError(f"{path}: has no function get_config(); start from jax_sft.config.default()")
        config = module.get_config()
    except ConfigError:
        raise
    except Exception as error:  # a config file is the user's code: say where it failed, whatever it raised
        hint = ""
        if isinstance(error, AttributeError | KeyError):
            name = str(getattr(error, "name", None) or error.args[0]).strip("'\"").split("'")[0]
            hint = _did_you_mean(name, [f.name for f in dataclasses.fields(RunConfig)])
        raise ConfigError(f"{path}: get_config() failed with {type(error).__name__}: {error}{hint}") from error
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"{path}: get_config() returned {type(config).__name__}, not a ConfigDict")
    return config


def _apply_override(tree: dict[str, Any], override: str, problems: list[str]) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        problems.append(f"override {override!r} has no '='; write --config.optim.lr=1e-5")
        return
    *parents, leaf = key.split(".")
    sections = [f.name for f in dataclasses.fields(RunConfig) if dataclasses.is_dataclass(f.type)]
    if key in sections:
        problems.append(f"{key} is a section; set one of its keys, --config.{key}.<key>=<value>")
        return
    free_form = parents == ["data", "columns"]
    is_pattern = ".".join(parents[:2]) in ("lora.rank_pattern", "lora.alpha_pattern")
    if is_pattern:  # module names have dots of their own
        parents, leaf = parents[:2], key.split(".", 2)[2]
    if not free_form and not is_pattern and key not in known_keys():
        problems.append(f"{key} is not a config key{_did_you_mean(key, known_keys())}")
        return
    node: Any = tree
    for name in parents:
        node = node.setdefault(name, {})  # a section that the config leaves out has its defaults
        if not isinstance(node, dict):
            return  # `_build` says what is wrong with it
    node[leaf] = text if free_form or (not is_pattern and _is_text(key, text)) else _parse(text)


def _is_text(key: str, text: str) -> bool:
    """Whether a value is to be taken as it stands: a revision of digits is a text, no number."""
    kind: Any = RunConfig
    for name in key.split("."):
        kind = next(f.type for f in dataclasses.fields(kind) if f.name == name)
    return kind is str or (kind == str | None and text != "None")


def _parse(text: str) -> Any:
    """'1e-5' -> float, 'None' -> None, '(1, 2)' -> tuple, anything else is the string itself."""
    if text in ("true", "false"):
        return text == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # all that `literal_eval` may raise
        return text


def _build(cls: type, tree: Mapping[str, Any], prefix: str, problems: list[str]) -> Any:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for name in tree:
        if name not in fields:
            key = prefix + (name if isinstance(name, str) else repr(name))
            problems.append(f"{key} is not a config key{_did_you_mean(key, known_keys())}")
    values = {}
    for name, field in fields.items():
        if name not in tree:
            continue
        value = tree[name]
        if dataclasses.is_dataclass(field.type):
            if not isinstance(value, Mapping):
                problems.append(f"{prefix}{name} is a section, but was set to {value!r}; set {prefix}{name}.<key>")
                continue
            values[name] = _build(typing.cast(type, field.type), value, f"{prefix}{name}.", problems)
        else:
            values[name] = _checked(field.type, value, prefix + name, problems)
    return cls(**values)


_LARGEST = 2**31 - 1  # steps, lengths and sizes become int32 on the devices


def _checked(kind: Any, value: Any, key: str, problems: list[str]) -> Any:
    """`value` as `kind`, or a problem that says what would be right."""
    if isinstance(value, pathlib.PurePath):
        value = str(value)
    elif hasattr(value, "dtype") and getattr(value, "shape", None) == ():  # a numpy number
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        problems.append(f"{key} = {value} is not a finite number")
        return value
    # `Literal[...] | None` is the second of these
    is_union = typing.get_origin(kind) in (types.UnionType, typing.Union)
    options = typing.get_args(kind) if is_union else (kind,)
    for option in options:
        fits, converted = _fit(option, value)
        if fits and option is int and key != "seed" and abs(converted) > _LARGEST:  # the seed has a range of its own
            problems.append(f"{key} = {value} is too large; the largest whole number here is {_LARGEST} (2**31 - 1)")
        if fits:
            return converted
    problems.append(
        f"{key} = {value!r} is not {' or '.join(_describe(o) for o in options)}{_literal_hint(options, value)}"
    )
    return value


def _fit(kind: Any, value: Any) -> tuple[bool, Any]:
    origin = typing.get_origin(kind)
    if kind is types.NoneType:
        return value is None, None
    if origin is Literal:
        return isinstance(value, str) and value in typing.get_args(kind), value
    if kind is bool or kind is str:
        return isinstance(value, kind), value
    if kind is int:
        whole = isinstance(value, float) and value.is_integer()
        return (isinstance(value, int) and not isinstance(value, bool)) or whole, int(value) if whole else value
    if kind is float:
        number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
        return number, float(value) if number else value
    if origin is tuple:
        if isinstance(value, str):
            value = (value,) if value else ()
        fits = isinstance(value, list | tuple) and all(isinstance(v, str) for v in value)
        return fits, tuple(value) if fits else value
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        return False, value
    found = {key: _fit(typing.get_args(kind)[1], v) for key, v in value.items()}
    fits = all(is_right for is_right, _ in found.values())
    return fits, {key: v for key, (_, v) in found.items()} if fits else value


def _describe(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(typing.get_args(kind))
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", types.NoneType: "None"}
    if kind in names:
        return names[kind]
    if typing.get_origin(kind) is tuple:
        return "a list of texts"
    return {
        str: "a mapping of texts",
        int: "a mapping of texts to whole numbers",
        float: "a mapping of texts to numbers",
    }[typing.get_args(kind)[1]]


def _literal_hint(options: Sequence[Any], value: Any) -> str:
    words = [w for o in options if typing.get_origin(o) is Literal for w in typing.get_args(o)]
    return _did_you_mean(str(value), words) if words else ""


def _did_you_mean(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if not near:
        leaf = name.rsplit(".", 1)[-1]
        leaves = {k.rsplit(".", 1)[-1]: k for k in known}
        near = [leaves[m] for m in difflib.get_close_matches(leaf, list(leaves), n=1, cutoff=0.6)]
    return f"; did you mean {near[0]}?" if near else ""


def is_hub_name(text: str) -> bool:
    """Whether a model on the hub can be called `text`."""
    return _HUB_NAME.fullmatch(text) is not None


TARGETS = ("all-linear", "attention", "mlp", "experts", "embeddings", "head")  # kinds of modules
TEMPLATES = ("chatml", "plain", "alpaca")  # chat templates of ours, for models that have none
_ROLES = ("assistant", "user", "system", "developer", "tool", "all")


def _cross_checks(run: RunConfig) -> Iterator[str]:
    """What one value alone cannot tell."""
    if not run.model.path:
        yield "model.path is empty; set it to a Hugging Face folder, a hub id or a .gguf file"
    if not run.data.train:
        yield "data.train is empty; name at least one file, folder, glob or hub dataset id"
    template = run.model.chat_template
    if template is not None and template not in TEMPLATES and not pathlib.Path(template).is_file():
        yield (
            f"model.chat_template: there is no file {template}; name a Jinja file or one of {', '.join(TEMPLATES)}"
            + _did_you_mean(template, TEMPLATES)
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
    yield from _lora_checks(run)
    if run.log.wandb_project is not None and importlib.util.find_spec("wandb") is None:
        yield "log.wandb_project is set, but wandb is not installed; install jax-sft[wandb]"
    for role in run.data.train_on.split(","):
        if role.strip() not in _ROLES:
            hint = _did_you_mean(role.strip(), _ROLES)
            yield f"data.train_on: {role.strip()!r} is no role{hint}; the roles are {', '.join(_ROLES)}"
    if run.data.train_on == "all" and run.data.train_turns == "last":
        yield "data.train_on = 'all' trains every token, there is no last turn to choose; set data.train_turns = 'all'"
    if (run.train.steps is None) == (run.train.epochs is None):
        said = "both are set" if run.train.steps is not None else "neither is set"
        yield f"train.steps and train.epochs: {said}; set exactly one of them"
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
        "evaluate.max_new_tokens": run.evaluate.max_new_tokens,
        "checkpoint.every_steps": run.checkpoint.every_steps,
        "checkpoint.keep": run.checkpoint.keep,
        "log.every_steps": run.log.every_steps,
        "optim.clip_norm": run.optim.clip_norm,
        "optim.eps": run.optim.eps,
        "optim.decay_steps": run.optim.decay_steps,
    }
    for key, value in positive.items():
        if value is not None and value <= 0:
            yield f"{key} = {value} must be greater than 0"
    if run.train.epochs is not None and run.train.epochs > _LARGEST:
        yield f"train.epochs = {run.train.epochs} is too large; the largest number here is {_LARGEST} (2**31 - 1)"
    at_least_zero = {
        "lora.rank": run.lora.rank,
        "optim.lr": run.optim.lr,
        "optim.warmup_steps": run.optim.warmup_steps,
        "optim.weight_decay": run.optim.weight_decay,
        "data.workers": run.data.workers,
    }
    for key, value in at_least_zero.items():
        if value is not None and value < 0:
            yield f"{key} = {value} must not be negative"
    shares = {"optim.b1": run.optim.b1, "optim.b2": run.optim.b2, "lora.dropout": run.lora.dropout or 0.0}
    for key, value in shares.items():
        if not 0 <= value < 1:
            yield f"{key} = {value} must be at least 0 and below 1"
    if not 0 <= run.optim.final_lr_ratio <= 1:
        yield f"optim.final_lr_ratio = {run.optim.final_lr_ratio} must lie between 0 and 1"
    if not 0 <= run.seed < 2**32:
        yield f"seed = {run.seed} must lie between 0 and 2**32 - 1"
    if run.optim.decay_steps is not None and run.optim.schedule != "wsd":
        yield f"optim.decay_steps belongs to optim.schedule = 'wsd', not {run.optim.schedule!r}; set it to None"
    if run.train.accumulation > 0 and run.train.batch_size % run.train.accumulation:
        yield (
            f"train.batch_size = {run.train.batch_size} cannot be cut into train.accumulation = "
            f"{run.train.accumulation} equal micro-batches; make the first a multiple of the second"
        )
    if run.train.steps is not None and run.optim.warmup_steps >= run.train.steps > 0:
        yield (
            f"optim.warmup_steps = {run.optim.warmup_steps} but train.steps = {run.train.steps}; "
            "make the warmup shorter or the run longer"
        )
    if run.evaluate.every_steps is not None and not run.data.validation and not run.evaluate.prompts:
        yield "evaluate.every_steps is set, but there is nothing to evaluate; set data.validation or evaluate.prompts"
    sizes = {f"mesh.{axis}": size for axis, size in dataclasses.asdict(run.mesh).items()}
    for key, size in sizes.items():
        if size == 0 or size < -1:
            yield f"{key} = {size} must be a number of devices, or -1 for the devices left over"
    if list(sizes.values()).count(-1) > 1:
        yield "mesh: only one axis may be -1"


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
