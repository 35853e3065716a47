"""What a config.json says of rotary positions, in the spelling of transformers 4 or 5, for all layers or by layer type.

In: the dict of a config.json (`rope_problems`) and what transformers' config class makes of it (`read_ropes`). Out:
what cannot be followed, and a `Rope` for each layer.
"""

import math
import sys
from collections.abc import Mapping
from typing import Any

from jax_sft.model.config import DynamicRope, LinearRope, Llama3Rope, LongRope, Rope, RopeScaling, YarnRope

LAYER_TYPES = ("full_attention", "sliding_attention")
# Numbers that some files name, and that transformers does not read: what a model was trained with, it is not run with.
_UNREAD = ("attn_factor", "finetuned")
_LIKE = '{"rope_type": "linear", "factor": 2.0}'


def rope_problems(hf: Mapping[str, Any], *, by_layer_type: bool, of_a_share: bool) -> list[str]:
    """What in it cannot be followed, each by name.

    Args:
        by_layer_type: whether this model type has a set of parameters for each layer type, or one for all.
        of_a_share: whether it rotates only as many components of a head as partial_rotary_factor says.
    """
    if problems := _problems_of_shape(hf, by_layer_type=by_layer_type):
        return problems
    return _problems_of_each(hf) + _problems_of_share(hf, of_a_share=of_a_share) or _contradictions(hf)


def with_known_names(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The same, with the names that Phi-3 had for longrope in its first days replaced."""
    if hf["model_type"] != "phi3":
        return dict(hf)
    given = {name: hf[name] for name in ("rope_scaling", "rope_parameters") if hf.get(name)}
    kinds = {name: _kind_of_rope(said, "phi3") for name, said in given.items()}
    return dict(hf) | {
        name: {k: v for k, v in said.items() if k != "type"} | {"rope_type": kinds[name]}
        for name, said in given.items()
        if kinds[name] == "longrope"
    }


def unread_by_transformers(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers of its ropes that other programs read and transformers does not; nor are they read here."""
    sets = {f"{name}.{k}": v for name in ("rope_scaling", "rope_parameters") for k, v in (hf.get(name) or {}).items()}
    sets |= {f"{place}.{k}": v for place, said in sets.items() if isinstance(said, Mapping) for k, v in said.items()}
    return {place: value for place, value in sets.items() if place.rpartition(".")[2] in _UNREAD}


def is_positive(value: Any) -> bool:
    """Whether it is a finite number above 0, and neither a text nor true."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


_SCALINGS: dict[str, tuple[set[str], set[str]]] = {  # numbers that a kind of rope must have, and those it may have
    "default": (set(), {"factor"}),
    "linear": ({"factor"}, set()),
    "dynamic": ({"factor"}, set()),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor"}, {"original_max_position_embeddings"}),
    "yarn": (
        set(),
        {
            "original_max_position_embeddings",
            "factor",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        },
    ),
    "longrope": (
        {"short_factor", "long_factor"},
        {"original_max_position_embeddings", "factor", "attention_factor"},
    ),
}


def _sets(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Each set of rope parameters, by where it is."""
    sets = {}
    for name in ("rope_scaling", "rope_parameters"):
        given = hf.get(name)
        if isinstance(given, Mapping):
            by_type = {f"{name}.{k}": v for k, v in given.items() if v is not None}
            sets |= by_type if is_by_layer_type(given) else {name: given}
    return sets


def _problems_of_shape(hf: Mapping[str, Any], *, by_layer_type: bool) -> list[str]:
    """What is no object, or has sets by layer type where there must be one, or the other way round."""
    problems = []
    for name in ("rope_scaling", "rope_parameters"):
        given = hf.get(name)
        if given is None or given == {}:
            continue
        if not isinstance(given, Mapping):
            problems.append(f"{name} = {given!r} must be an object like {_LIKE}")
        elif name == "rope_scaling" or not by_layer_type:
            if is_by_layer_type(given):
                problems.append(f"{name} = {given!r} must be one object for all layers, like {_LIKE}")
        elif any(k not in LAYER_TYPES or not isinstance(v, Mapping | None) for k, v in given.items()):
            problems.append(f"{name} = {given!r} must hold an object like {_LIKE} for each of {', '.join(LAYER_TYPES)}")
    if problems:
        return problems
    sets = _sets({"rope_parameters": hf.get("rope_parameters")})
    is_said = len(sets) >= (len(LAYER_TYPES) if by_layer_type else 1) and all("rope_theta" in x for x in sets.values())
    return [
        f"{name} = {hf[name]!r} must be a number above 0, without quotes"
        for name in ("rope_theta", "rope_local_base_freq")[: 1 + by_layer_type]
        if name in hf and not is_positive(hf[name]) and not (hf[name] is None and is_said)
    ]


def _problems_of_each(hf: Mapping[str, Any]) -> list[str]:
    """Kinds of rope that are not known, and numbers that a kind lacks or does not have."""
    problems = []
    for place, said in _sets(hf).items():
        if "rope_theta" in said and not is_positive(said["rope_theta"]):
            problems.append(f"rope_theta = {said['rope_theta']!r} in {place} must be a number above 0, without quotes")
        kind = _kind_of_rope(said, hf["model_type"])
        if kind not in [*_SCALINGS]:  # a list: it may be what no dict can look up
            problems.append(f"{place}: rope_type = {kind!r} is not modelled; only {', '.join(_SCALINGS)} are")
            continue
        must, may = _SCALINGS[kind]
        numbers = _numbers_of_rope(said)
        odd = must - set(numbers) | set(numbers) - must - may
        odd |= {k for k, v in numbers.items() if not _fits_rope(k, v)}
        if odd:
            problems.append(
                f"{place}: {', '.join(sorted(odd))} missing, unknown or not a number above 0 for rope_type {kind!r}"
            )
        elif kind == "default" and numbers.get("factor", 1) != 1:
            problems.append(f"{place}: factor = {numbers['factor']!r} must be 1 or left out for rope_type {kind!r}")
        elif kind == "llama3" and numbers["high_freq_factor"] <= numbers["low_freq_factor"]:
            problems.append(f"{place}: high_freq_factor must be greater than low_freq_factor")
    return problems


def _problems_of_share(hf: Mapping[str, Any], *, of_a_share: bool) -> list[str]:
    """A part of each head that is to be rotated, where this model type rotates all of it, or two such parts."""
    shares = {
        f"partial_rotary_factor in {place}": said.get("partial_rotary_factor") for place, said in _sets(hf).items()
    }
    if of_a_share:
        shares["partial_rotary_factor"] = hf.get("partial_rotary_factor")
    given = {place: share for place, share in shares.items() if share is not None}
    must = "a number above 0, without quotes" if of_a_share else "1.0 or left out for this model type"
    wrong = {place for place, share in given.items() if not (is_positive(share) and (of_a_share or share == 1))}
    problems = [f"{place} = {share!r} must be {must}" for place, share in given.items() if place in wrong]
    if not wrong and len({*given.values()}) > 1:
        problems.append(f"{' and '.join(f'{k} = {v!r}' for k, v in given.items())} differ; keep one of them")
    return problems


def _fits_rope(name: str, value: Any) -> bool:
    if name in ("short_factor", "long_factor"):
        return isinstance(value, list) and all(map(is_positive, value))
    if name == "original_max_position_embeddings":
        return is_positive(value) and value >= 2  # its logarithm divides
    return isinstance(value, bool) if name == "truncate" else is_positive(value)


def _kind_of_rope(said: Mapping[str, Any], model_type: str) -> Any:
    kind = said.get("rope_type", said.get("type", "default"))
    return "longrope" if model_type == "phi3" and kind in ("su", "yarn") else kind  # its names of the first days


def _numbers_of_rope(said: Mapping[str, Any]) -> dict[str, Any]:
    names = ("rope_type", "type", "rope_theta", "partial_rotary_factor", *_UNREAD)
    return {k: v for k, v in said.items() if k not in names and v is not None}


def _contradictions(hf: Mapping[str, Any]) -> list[str]:
    """The same thing said twice, differently: rope in the old and in the new spelling."""
    new, old = hf.get("rope_parameters") or {}, hf.get("rope_scaling") or {}
    if is_by_layer_type(new):
        return []
    problems = []
    said = [new.get("rope_theta"), old.get("rope_theta"), hf.get("rope_theta")]
    thetas = {float(theta) for theta in said if is_positive(theta)}
    if len(thetas) > 1:
        problems.append(f"rope_theta has several values, {sorted(thetas)}, at the top and in rope_parameters; keep one")
    if new and old and _scaling_of(new, hf) != _scaling_of(old, hf):
        problems.append(f"rope_scaling = {dict(old)} and rope_parameters = {dict(new)} differ; keep one of them")
    return problems


def _scaling_of(said: Mapping[str, Any], hf: Mapping[str, Any]) -> dict[str, Any]:
    """Its kind and numbers, with the first context, which some kinds have beside them, filled in."""
    kind = _kind_of_rope(said, hf["model_type"])
    numbers = _numbers_of_rope(said) if kind != "default" else {}
    name = "original_max_position_embeddings"
    beside = {name: hf.get(name) or hf.get("max_position_embeddings")} if kind in ("llama3", "yarn", "longrope") else {}
    return {"rope_type": kind} | beside | numbers


def is_by_layer_type(rope_parameters: Mapping[str, Any]) -> bool:
    """Whether it holds a set of parameters for each layer type, and not one for all."""
    return any(k in LAYER_TYPES or isinstance(v, Mapping) for k, v in rope_parameters.items())


def layer_types(said: Any) -> list[str]:
    """The kind of each layer, in transformers' words; of all layers alike, "sliding_attention" if there is a window."""
    kinds = getattr(said, "layer_types", None)
    if not kinds:
        kinds = ["full_attention" if said.sliding_window is None else "sliding_attention"] * said.num_hidden_layers
    return kinds


def read_ropes(said: Any, head_width: int, *, interleaved: bool) -> tuple[Rope | None, ...]:
    """Rotary positions of each layer."""
    given = said.rope_parameters
    by_type = given if is_by_layer_type(given) else None
    read: dict[str, Rope] = {}
    for kind, parameters in (by_type or {"": given}).items():
        read[kind] = Rope(
            theta=float(parameters["rope_theta"]),
            width=int(head_width * (parameters.get("partial_rotary_factor") or 1.0)),
            interleaved=interleaved,
            scaling=_rope_scaling(parameters, said.max_position_embeddings),
        )
    kinds = layer_types(said) if by_type else [""] * said.num_hidden_layers
    has_rope = getattr(said, "no_rope_layers", None) or [1] * len(kinds)
    return tuple(read[kind] if has else None for kind, has in zip(kinds, has_rope, strict=False))


def _rope_scaling(parameters: Mapping[str, Any], max_positions: int) -> RopeScaling | None:
    """What transformers/modeling_rope_utils.py makes of one set of rope parameters."""
    numbers = _numbers_of_rope(parameters)
    original = int(numbers.get("original_max_position_embeddings", max_positions))
    factor = float(numbers.get("factor", max_positions / original))
    match parameters["rope_type"]:
        case "linear":
            return LinearRope(factor=factor)
        case "dynamic":
            return DynamicRope(factor=factor, original_positions=max_positions)
        case "llama3":
            return Llama3Rope(
                factor=factor,
                low_frequency_factor=float(numbers["low_freq_factor"]),
                high_frequency_factor=float(numbers["high_freq_factor"]),
                original_positions=original,
            )
        case "yarn":
            return YarnRope(
                factor=factor,
                magnitude=_yarn_magnitude(factor, numbers),
                fast_turns=float(numbers.get("beta_fast", 32)),
                slow_turns=float(numbers.get("beta_slow", 1)),
                original_positions=original,
                whole_bounds=numbers.get("truncate", True),
            )
        case "longrope":
            natural = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
            return LongRope(
                short_factors=tuple(map(float, numbers["short_factor"])),
                long_factors=tuple(map(float, numbers["long_factor"])),
                magnitude=float(numbers.get("attention_factor", natural)),
                original_positions=original,
            )
    return None


def _yarn_magnitude(factor: float, numbers: Mapping[str, Any]) -> float:
    def natural(share: float) -> float:
        return 0.1 * share * math.log(factor) + 1.0 if factor > 1 else 1.0

    if numbers.get("attention_factor") is not None:
        return float(numbers["attention_factor"])
    if numbers.get("mscale") and numbers.get("mscale_all_dim"):
        return natural(numbers["mscale"]) / natural(numbers["mscale_all_dim"])
    return natural(1.0)
