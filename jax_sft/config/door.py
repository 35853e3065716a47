"""The door: a config file and overrides become a `RunConfig`, or one `ConfigError` that lists every problem."""

import ast
import copy
import dataclasses
import importlib.util
import math
import pathlib
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from ml_collections import ConfigDict

from jax_sft.config.checks import LARGEST, cross_checks, did_you_mean
from jax_sft.config.sections import RunConfig


class ConfigError(ValueError):
    """The configuration cannot be run; the message lists every problem."""


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
        problems += list(cross_checks(run))
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
            hint = did_you_mean(name, [f.name for f in dataclasses.fields(RunConfig)])
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
        problems.append(f"{key} is not a config key{did_you_mean(key, known_keys())}")
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
            problems.append(f"{key} is not a config key{did_you_mean(key, known_keys())}")
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
        if fits and option is int and key != "seed" and abs(converted) > LARGEST:  # the seed has a range of its own
            problems.append(f"{key} = {value} is too large; the largest whole number here is {LARGEST} (2**31 - 1)")
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
    return did_you_mean(str(value), words) if words else ""
