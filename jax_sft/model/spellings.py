"""A config.json in the words of transformers 4 and of 5 at once, so that readers of either see the same model.

In: the dict of a config.json that can be followed. Out: the same dict, with what the other readers look for beside it.
What transformers 4 has no words for (another theta of near layers in OLMo 3) is in the words of 5 alone.
"""

from collections.abc import Mapping
from typing import Any

from jax_sft.model.config_fields import ACTIVATION_OF_HF
from jax_sft.model.families import FAMILIES, filled_in
from jax_sft.model.ropes import with_known_names

_NO_SCALING = ("rope_theta", "partial_rotary_factor")


def with_both_spellings(hf: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json that readers of transformers 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`) agree on.

    One of a type with ropes of its own that is in the words of 4 stays so: 5 has other defaults there.
    """
    said = with_known_names(hf)
    if said.get("rope_parameters"):
        said |= _old_ropes(said)
    elif said.get("rope_theta") is not None and not FAMILIES[said["model_type"]].has_own_ropes:
        said |= {"rope_parameters": _new_ropes(said)}
    if said["model_type"] == "phi3":
        said |= _phi3_scaling(said)
    return said | _gemma_activation(said) | _counts_of_experts(said)


def _old_ropes(said: Mapping[str, Any]) -> dict[str, Any]:
    """What `rope_parameters` says, in the words of transformers 4."""
    if FAMILIES[said["model_type"]].ropes_by_layer_type:
        # One theta and one scaling, of the layers that see everything; Gemma 3 has a second theta.
        ropes = filled_in(said).rope_parameters
        full, near = ropes["full_attention"], ropes["sliding_attention"]
        second = {"rope_local_base_freq": near["rope_theta"]} if said["model_type"] == "gemma3_text" else {}
        return {"rope_theta": full["rope_theta"], "rope_scaling": _scaling(full)} | second
    new = said["rope_parameters"]
    theta = {"rope_theta": new["rope_theta"]} if new.get("rope_theta") is not None else {}
    share = {k: new[k] for k in ("partial_rotary_factor",) if k in new and k not in said}
    return {"rope_scaling": _scaling(new)} | theta | share


def _scaling(rope: Mapping[str, Any]) -> dict[str, Any] | None:
    kept = {k: v for k, v in rope.items() if k not in _NO_SCALING}
    return None if kept.get("rope_type", kept.get("type", "default")) == "default" else kept


def _new_ropes(said: Mapping[str, Any]) -> dict[str, Any]:
    old = said.get("rope_scaling") or {}
    share = {k: said[k] for k in ("partial_rotary_factor",) if said.get(k) is not None}
    kind = {"rope_type": old.get("type", "default")} | {k: v for k, v in old.items() if k != "type"}
    return {"rope_theta": said["rope_theta"], **kind, **share}


def _phi3_scaling(said: Mapping[str, Any]) -> dict[str, Any]:
    """transformers 4 takes these three fields and no others; the first context stands beside them."""
    old = said.get("rope_scaling") or {}
    numbers = old.keys() - {"type", "rope_type", "original_max_position_embeddings", *_NO_SCALING}
    if numbers != {"short_factor", "long_factor"}:
        return {}
    return {"rope_scaling": {"type": "longrope", **{name: old[name] for name in ("short_factor", "long_factor")}}}


def _gemma_activation(said: Mapping[str, Any]) -> dict[str, Any]:
    """Gemma's "gelu" is the one by a tanh, which transformers 4 knows in some versions only, under one of two names."""
    if said["model_type"] != "gemma" or ACTIVATION_OF_HF[filled_in(said).hidden_act] != "gelu_tanh":
        return {}
    return dict.fromkeys(("hidden_act", "hidden_activation"), "gelu_pytorch_tanh")


def _counts_of_experts(said: Mapping[str, Any]) -> dict[str, Any]:
    """transformers 5 writes num_local_experts, by which 4 does not know the experts of Qwen 3."""
    count = said.get("num_local_experts")
    is_missing = said["model_type"] in ("qwen3_moe", "olmoe") and said.get("num_experts") is None
    return {"num_experts": count} if is_missing and count is not None else {}
