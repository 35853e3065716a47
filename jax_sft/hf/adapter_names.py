"""What PEFT calls the parts of an adapter, and by which of its rules adapter_config.json gives each a rank and a scale.

In: a model. Out: a `Site` for each kind of module that can have an adapter, with our weights in it: one, or several
where the file fuses them (phi3's qkv_proj). Our factors and PEFT's are transposes of each other, letter groups flat:

    base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight   [R, D]       blocks.q_LDNH/a_LDR    of layer 3
    base_model.model.model.layers.3.self_attn.q_proj.lora_B.weight   [(N H), R]   blocks.q_LDNH/b_LRNH

L layers, E experts, D model width, N query heads, H head width, V vocabulary, R rank.
"""

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jax_sft.hf import names
from jax_sft.model.config import ModelConfig
from jax_sft.model.lora import Letters, letters

PREFIX = "base_model.model."
EMBED, HEAD = "model.embed_tokens", "lm_head"
_LINEAR = (".lora_A.weight", ".lora_B.weight")
_EMBEDDING = (".lora_embedding_A", ".lora_embedding_B")
MAGNITUDE = ".lora_magnitude_vector"
BASE_LAYER = ".base_layer.weight"  # the base's own matrix, which PEFT saves beside an adapter of embedding or head


class Factors(NamedTuple):
    """The adapter of one module as the file has it, float32."""

    a: np.ndarray  # [R, inputs]
    b: np.ndarray  # [outputs, R]
    magnitude: np.ndarray | None  # [outputs]


@dataclasses.dataclass(frozen=True)
class Site:
    """One kind of module, of all layers (and experts)."""

    module: str  # with `{layer}` and `{expert}`
    rules: tuple[names.Rule, ...]  # our weights in it, in the file's order

    @functools.cached_property
    def modules(self) -> dict[names.Shape, str]:
        """Names of the modules, by their place in the stack."""
        return {at: name.removesuffix(".weight") for at, name in self.rules[0].names.items()}

    @property
    def endings(self) -> tuple[str, str]:
        """What the tensors of A and B are called, after the module."""
        return _EMBEDDING if self.module == EMBED else _LINEAR

    @property
    def inputs(self) -> int:
        """Width of what goes in."""
        return self._size(self.letters(0).inputs)

    @property
    def outputs(self) -> tuple[int, ...]:
        """Widths of what comes out: of each of our weights in it."""
        return tuple(self._size(self.letters(i).outputs) for i in range(len(self.rules)))

    def letters(self, part: int) -> Letters:
        """The letters of one of our weights in it."""
        return letters(self.rules[part].path)

    def to_ours(self, theirs: Factors, part: int) -> dict[str, np.ndarray]:
        """Our factors of one weight and layer: "a", "b" and with DoRA "magnitude"."""
        of = self.letters(part)
        start = sum(self.outputs[:part])
        rows = slice(start, start + self.outputs[part])
        outputs = [self.rules[part].sizes[x] for x in of.outputs]
        ours = {
            "a": theirs.a.T.reshape(*[self.rules[part].sizes[x] for x in of.inputs], -1),
            "b": theirs.b[rows].T.reshape(-1, *outputs),
        }
        return ours if theirs.magnitude is None else ours | {"magnitude": theirs.magnitude[rows].reshape(outputs)}

    def to_theirs(self, ours: Mapping[str, np.ndarray], part: int) -> Factors:
        """What `to_ours` was made of, of one part."""
        magnitude = ours.get("magnitude")
        return Factors(
            ours["a"].reshape(self.inputs, -1).T,
            ours["b"].reshape(-1, self.outputs[part]).T,
            None if magnitude is None else magnitude.reshape(-1),
        )

    def _size(self, group: str) -> int:
        return math.prod(self.rules[0].sizes[x] for x in group)


def sites(config: ModelConfig) -> list[Site]:
    """Every kind of module that can have an adapter; a tied head too."""
    held: dict[str, list[names.Rule]] = {}
    for rule in untied_rules(config).values():
        # Experts that lie in one tensor are no modules; everything else that is adapted is a Linear or an Embedding.
        if _is_adaptable(rule.path) and rule.hf.endswith(".weight"):
            held.setdefault(rule.hf.removesuffix(".weight"), []).append(rule)
    return [Site(module, tuple(sorted(rules, key=lambda r: r.row.part))) for module, rules in held.items()]


def untied_rules(config: ModelConfig) -> dict[str, names.Rule]:
    """`names.rules`, with one for the head even if it is tied."""
    return names.rules(dataclasses.replace(config, tied_head=False))


def _is_adaptable(path: str) -> bool:
    try:
        letters(path)
    except KeyError:
        return False
    return True


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
