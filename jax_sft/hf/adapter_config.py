"""adapter_config.json: what PEFT says of an adapter beside its tensors; read, followed by PEFT's own rules, written.

In: a folder, or the modules that have adapters with their ranks and scales. Out: the fields, of which none that would
change the arithmetic is passed over; the rank and alpha of a module by PEFT's patterns; and the other way round the
shortest patterns, target_modules and modules_to_save from which PEFT makes just that.
"""

import json
import math
import pathlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jax_sft.hf.adapter_names import sites, untied_rules
from jax_sft.model.config import ModelConfig

CONFIG = "adapter_config.json"

# Fields of PEFT's LoraConfig that this reads, or that change nothing once there are tensors.
_FOLLOWED = {
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_dropout", "peft_type"),
    *("base_model_name_or_path", "init_lora_weights", "modules_to_save", "ensure_weight_tying"),
}
_INERT = {
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "task_type", "auto_mapping"),
    *("peft_version", "revision", "inference_mode", "megatron_config", "megatron_core", "loftq_config", "eva_config"),
    *("corda_config", "lora_ga_config", "qalora_group_size", "runtime_config", "bias"),
}
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")  # those that leave the base as it was


def read_adapter_config(folder: str | pathlib.Path) -> dict[str, Any]:
    """adapter_config.json, of an adapter that we can follow.

    Raises:
        ValueError: it is not there, or says what is not modelled.
    """
    folder = pathlib.Path(folder).expanduser()
    path = folder / CONFIG
    if not folder.is_dir():
        raise ValueError(f"adapter {folder}: no such folder; name one that PEFT's save_pretrained or jax-sft wrote")
    if not path.is_file():
        raise ValueError(f"adapter {folder}: has no {CONFIG}, so it is no adapter; name a folder that has one")
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(config, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); copy or download it again") from error
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type = {config.get('peft_type')!r} is not modelled; only LORA is")
    _check_numbers(path, config)
    start = config.get("init_lora_weights")
    if start not in _STARTS:
        raise ValueError(
            f"{path}: init_lora_weights = {start!r} means that the base's weights were changed under the adapter; save "
            "it with PEFT as plain LoRA: save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    others = [key for key in config if key not in _FOLLOWED | _INERT and config[key]]
    others += [] if config.get("bias", "none") == "none" else ["bias"]
    if others:
        said = ", ".join(f"{key} = {config[key]!r}" for key in sorted(others))
        raise ValueError(
            f"{path}: {said} is not modelled; merge the adapter into its base with PEFT's merge_and_unload, and name "
            "the result with --model"
        )
    return config


def is_named(config: Mapping[str, Any], module: str) -> bool:
    """Whether target_modules and layers_to_transform name a module, by PEFT's rule (`check_target_module_exists`)."""
    targets, layers = config.get("target_modules"), config.get("layers_to_transform")
    if config.get("exclude_modules") or not targets or targets == "all-linear":
        return False  # what that was, only the tensors say
    if any(re.match(rf"(^|.*\.){whole}($|\..*)", module) for whole in config.get("modules_to_save") or ()):
        return False
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    if module in targets:
        return True
    if not any(module.endswith(f".{target}") for target in targets):
        return False
    number = re.search(r"\.layers\.(\d+)\.", module)
    chosen = [layers] if isinstance(layers, int) else layers
    return not chosen or number is None or int(number[1]) in chosen


class Strength(NamedTuple):
    """What adapter_config.json says of one module."""

    rank: int
    alpha: float

    def scale(self, *, rslora: bool) -> float:
        """What A B is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if rslora else self.rank)


def strength_of(config: Mapping[str, Any], module: str) -> Strength:
    """By PEFT's rule (`get_pattern_key`): the first pattern that matches the end of the module's name, or the default.

    Raises:
        re.error: a pattern is no regular expression.
    """

    def found(patterns: Mapping[str, Any] | None, default: Any) -> Any:
        matching = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module))
        return next(matching, default)

    return Strength(
        found(config.get("rank_pattern"), config["r"]), found(config.get("alpha_pattern"), config["lora_alpha"])
    )


def strength_of_scale(rank: int, scale: float, *, rslora: bool) -> Strength:
    """Rank and alpha that make this scale; an alpha that is whole but for rounding is whole."""
    alpha = scale * (math.sqrt(rank) if rslora else rank)
    return Strength(rank, round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-9) else alpha)


def strengths_config(strengths: Mapping[str, Strength], *, default: Strength | None = None) -> dict[str, Any]:
    """r, lora_alpha and the patterns from which `strength_of` gives each module what it has.

    The defaults are those of most modules, unless `default` says others.
    """
    rank = Counter(s.rank for s in strengths.values()).most_common(1)[0][0] if default is None else default.rank
    alpha = Counter(s.alpha for s in strengths.values()).most_common(1)[0][0] if default is None else default.alpha
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": _pattern({m: s.rank for m, s in strengths.items()}, rank),
        "alpha_pattern": _pattern({m: s.alpha for m, s in strengths.items()}, alpha),
    }


def _pattern(values: Mapping[str, float], default: float) -> dict[str, float]:
    """Those that differ: by the last part of their names where all of that last part agree, else by whole names."""
    by_leaf: dict[str, dict[str, float]] = {}
    for module, value in values.items():
        by_leaf.setdefault(module.rpartition(".")[2], {})[module] = value
    pattern: dict[str, float] = {}
    for leaf, held in by_leaf.items():
        one = set(held.values())
        pattern |= {leaf: one.pop()} if len(one) == 1 and default not in one else held
    return {key: value for key, value in pattern.items() if value != default}


def targets_config(adapted: Sequence[str], config: ModelConfig) -> dict[str, Any]:
    """target_modules and layers_to_transform that name just these modules, as short as PEFT's matching allows."""
    everything = [module for site in sites(config) for module in site.modules.values()]
    leaves = sorted({module.rpartition(".")[2] for module in adapted})
    same = [module for module in everything if module.rpartition(".")[2] in leaves]
    if set(same) == set(adapted):
        return {"target_modules": leaves, "layers_to_transform": None}
    layers = sorted({layer for module in adapted if (layer := layer_of(module)) is not None})
    in_layers = [module for module in same if layer_of(module) in layers]
    if set(in_layers) == set(adapted):
        return {"target_modules": leaves, "layers_to_transform": layers}
    return {"target_modules": sorted(adapted), "layers_to_transform": None}


def layer_of(module: str) -> int | None:
    """The layer that a module is in."""
    match = re.match(r"model\.layers\.(\d+)\.", module)
    return int(match[1]) if match else None


def saved_config(modules: Iterable[str], config: ModelConfig) -> list[str]:
    """modules_to_save that names just these modules: PEFT takes every module whose name ends so."""
    whole = {name.rpartition(".")[0] for rule in untied_rules(config).values() for name in rule.names.values()}
    wanted, endings = set(modules), []
    while wanted:
        parts = min(wanted, key=lambda m: (m.count("."), m)).split(".")
        tails = [".".join(parts[i:]) for i in reversed(range(len(parts)))]
        ending = next(t for t in tails if (ends := {m for m in whole if m.endswith(t)}) <= wanted and ends)
        endings.append(ending)
        wanted -= {m for m in wanted if m.endswith(ending)}
    return endings


def _check_numbers(path: pathlib.Path, config: Mapping[str, Any]) -> None:
    def is_number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

    def is_rank(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value > 0

    checks = {"r": is_rank, "lora_alpha": is_number}
    wrong = [key for key, fits in checks.items() if not fits(config.get(key))]
    dropout = config.get("lora_dropout", 0.0)
    wrong += [] if is_number(dropout) and 0 <= dropout < 1 else ["lora_dropout"]
    for key, fits in (("rank_pattern", is_rank), ("alpha_pattern", is_number)):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict) or not all(map(fits, pattern.values())) or not all(map(_is_regex, pattern)):
            wrong.append(key)
    if wrong:
        said = ", ".join(f"{key} = {config.get(key)!r}" for key in wrong)
        raise ValueError(f"{path}: {said} is no value that PEFT writes there; copy or download it again")


def _is_regex(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True
