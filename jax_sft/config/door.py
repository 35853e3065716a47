"""The door: a config file and overrides become a `RunConfig`, or one `ConfigError` that lists every problem."""

import ast
import copy
import dataclasses
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
    told = _keys_in(*problems)  # what hangs together with these shows when they are mended
    problems += [sentence for sentence in cross_checks(run) if not _keys_in(sentence) & told]
    if problems:
        lines = "\n".join(f"  {i}. {p}" for i, p in enumerate(problems, 1))
        noun = "problem" if len(problems) == 1 else "problems"
        raise ConfigError(f"the config has {len(problems)} {noun}:\n{lines}")
    return _resolved(run)


def _keys_in(*sentences: str) -> set[str]:
    """The dotted keys that sentences name; data.sets stands for data.train too, and stages for the length of a run."""
    named = {key for sentence in sentences for key in re.findall(r"[a-z_]+\.[a-z_]+|stages", sentence)}
    return named | {other for key, other in _INSTEAD_OF.items() if key in named}


_INSTEAD_OF = {"data.sets": "data.train", "stages": "train.steps"}


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
        section, between = _section_in(f.type)
        if section is None:
            yield prefix + f.name
        else:
            yield from _keys(section, f"{prefix}{f.name}.{between}")


def _section_in(kind: Any) -> tuple[type | None, str]:
    """The section that a field is, or holds several of by name or number, and what stands for those in a key."""
    arguments = typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return typing.cast(type, kind), ""
    if typing.get_origin(kind) is Mapping and dataclasses.is_dataclass(arguments[1]):
        return typing.cast(type, arguments[1]), "<name>."
    if typing.get_origin(kind) is tuple and dataclasses.is_dataclass(arguments[0]):
        return typing.cast(type, arguments[0]), "<number>."
    return None, ""


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
    found = _place_of(key)
    if found is None:
        problems.append(f"{key} is not a config key{did_you_mean(key, known_keys())}")
        return
    (*parents, leaf), kind = found
    if dataclasses.is_dataclass(kind):
        problems.append(f"{key} is a section; set one of its keys, --config.{key}.<key>=<value>")
        return
    node: Any = tree
    for name in parents:
        if isinstance(node, list | tuple) and name.isdecimal() and int(name) < len(node):
            node = node[int(name)]
        elif isinstance(node, dict):
            node = node.setdefault(name, {})  # a section that the config leaves out has its defaults
        else:
            break
    if isinstance(node, dict):
        is_text = kind is str or (kind == str | None and text != "None")  # a revision of digits is a text, no number
        node[leaf] = text if is_text else _parse(text)
    elif isinstance(node, list | tuple):
        problems.append(f"{key}: there is no number {name}; they are counted from 0, and there are {len(node)}")
    # else `_build` says what is wrong with it


def _place_of(key: str) -> tuple[list[str], Any] | None:
    """The names on the way to a key's value, and its type; None if there is no such key."""
    kind: Any = RunConfig
    names, path = key.split("."), []
    while names:
        if dataclasses.is_dataclass(kind):
            name = names.pop(0)
            kind = next((f.type for f in dataclasses.fields(kind) if f.name == name), None)
            path.append(name)
        elif _section_in(kind)[0] is not None:
            path.append(names.pop(0))
            kind = _section_in(kind)[0]
        elif typing.get_origin(kind) is Mapping:  # names of modules have dots of their own
            return [*path, ".".join(names)], typing.get_args(kind)[1]
        else:
            return None
    return None if kind is None else (path, kind)


def _parse(text: str) -> Any:
    """'1e-5' -> float, 'None' -> None, '(1, 2)' -> tuple, anything else is the string itself."""
    if text in ("true", "false"):
        return text == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # all that `literal_eval` may raise
        return text


# Stands for a value that cannot be taken: the default goes on in its place, to find what else is wrong.
_WRONG = object()


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
        values[name] = _value(field.type, tree[name], prefix + name, problems)
    return cls(**{name: value for name, value in values.items() if value is not _WRONG})


def _value(kind: Any, value: Any, key: str, problems: list[str]) -> Any:
    """What a field is set to: a section, several of them, a plain value, or `_WRONG`."""
    section, _ = _section_in(kind)
    if section is None:
        return _checked(kind, value, key, problems)
    several = typing.get_origin(kind)
    if several is None:
        if isinstance(value, Mapping):
            return _build(section, value, f"{key}.", problems)
        problems.append(f"{key} is a section, but was set to {value!r}; set {key}.<key>")
        return _WRONG
    if several is tuple:
        parts = dict(enumerate(value)) if isinstance(value, list | tuple) else None
    else:
        parts = value if isinstance(value, Mapping) else None
    if parts is None or not all(isinstance(part, Mapping) for part in parts.values()):
        problems.append(
            f"{key} = {value!r} is not a {'list of' if several is tuple else 'mapping of names to'} sections"
        )
        return _WRONG
    built = {name: _build(section, part, f"{key}.{name}.", problems) for name, part in parts.items()}
    return tuple(built.values()) if several is tuple else built


def _checked(kind: Any, value: Any, key: str, problems: list[str]) -> Any:
    """`value` as `kind`, or `_WRONG` and a problem that says what would be right."""
    if isinstance(value, pathlib.PurePath):
        value = str(value)
    elif hasattr(value, "dtype") and getattr(value, "shape", None) == ():  # a numpy number
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        problems.append(f"{key} = {value} is not a finite number")
        return _WRONG
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
    return _WRONG


def _fit(kind: Any, value: Any) -> tuple[bool, Any]:
    origin = typing.get_origin(kind)
    if kind is types.NoneType:
        return value is None, None
    if origin is Literal:
        return isinstance(value, str) and value in typing.get_args(kind), value
    if kind is Any:
        return True, value
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
        Any: "a mapping of texts to values",
        tuple[str, ...]: "a mapping of names to lists of texts",
    }[typing.get_args(kind)[1]]


def _literal_hint(options: Sequence[Any], value: Any) -> str:
    words = [w for o in options if typing.get_origin(o) is Literal for w in typing.get_args(o)]
    return did_you_mean(str(value), words) if words else ""
