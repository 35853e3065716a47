"""From a Hugging Face config.json to a ModelConfig: one table of what each model type means.

In: the dict of a config.json, in the spelling of transformers 4 or 5. Out: a ModelConfig that says the same.
What config.json leaves out is filled in by transformers' own config class of that type. A field that changes the
arithmetic and is not modelled, or that nobody here knows, is an error with its name: never a silent default.
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from jax_sft.model.config import ModelConfig
from jax_sft.model.config_fields import ACTIVATION_OF_HF, Said, differing_copies, without_a_place
from jax_sft.model.ropes import is_positive, layer_types, read_ropes, rope_problems, with_known_names

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_EXPERT_COUNTS = (
    *("num_experts", "num_local_experts", "num_experts_per_tok", "experts_per_token", "moe_intermediate_size"),
)
_COUNTS = (
    *(*_SIZES, "num_key_value_heads", "head_dim", "max_position_embeddings", "original_max_position_embeddings"),
    *("sliding_window", "sliding_window_pattern", "no_rope_layer_interval"),
    *_EXPERT_COUNTS,
)
_SWITCHES = (
    *("tie_word_embeddings", "attention_bias", "mlp_bias", "use_bias", "use_sliding_window"),
    *("norm_topk_prob", "output_router_logits"),
)
_ROPE = ("rope_theta", "rope_scaling", "rope_parameters")
_COMMON = frozenset(
    (*_SIZES, *_ROPE, "num_key_value_heads", "head_dim", "max_position_embeddings", "tie_word_embeddings", "model_type")
)


@dataclasses.dataclass(frozen=True)
class Family:
    """What a model type means: its class in transformers, the fields that it reads, and what they say."""

    architecture: str
    fields: frozenset[str]
    read: Callable[[Said], dict[str, Any]]
    interleaved_rope: bool = False
    ropes_by_layer_type: bool = False  # it has a set of rope parameters for each
    has_own_ropes: bool = False  # where config.json names no kind of rope, it has others than the plain one
    quantised: tuple[str, ...] = ()  # quant_methods of files that are read, as plain numbers


def read_model_config(hf: Mapping[str, Any]) -> ModelConfig:
    """Read the dict of a config.json, in the spelling of transformers 4 (`rope_theta`) or 5 (`rope_parameters`).

    Raises:
        ValueError: an unknown model type, fields of a wrong type, or fields that would change the arithmetic and are
            not modelled; all at once, each by name.
    """
    kind = hf.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None or not isinstance(kind, str):
        raise ValueError(f"config.json: model_type = {kind!r} is not modelled; these are: {', '.join(FAMILIES)}")
    missing = [f"{name} is missing" for name in _SIZES if hf.get(name) is None]
    problems = missing + _misfits(hf) + _two_counts_of_experts(hf)
    problems += rope_problems(
        hf, by_layer_type=family.ropes_by_layer_type, of_a_share="partial_rotary_factor" in family.fields
    )
    problems += without_a_place(
        hf, read=_COMMON | family.fields, architecture=family.architecture, quantised=family.quantised
    )
    if problems:
        raise _cannot_be_followed(problems)
    said = filled_in(hf)
    head_width = getattr(said, "head_dim", None) or said.hidden_size // said.num_attention_heads
    if problems := differing_copies(hf, said) + _nothing_left(said, head_width):
        raise _cannot_be_followed(problems)
    ropes = read_ropes(said, head_width, interleaved=family.interleaved_rope)
    activation = getattr(said, "hidden_activation", None) or said.hidden_act
    usual = {
        "model_type": kind,
        "vocab_size": said.vocab_size,
        "vocab_rows": said.vocab_size,
        "width": said.hidden_size,
        "mlp_width": said.intermediate_size,
        "num_layers": said.num_hidden_layers,
        "num_heads": said.num_attention_heads,
        "num_kv_heads": said.num_key_value_heads,
        "head_width": head_width,
        "max_positions": said.max_position_embeddings,
        "windows": _windows(said) if "sliding_window" in family.fields else (None,) * said.num_hidden_layers,
        "ropes": ropes,
        "norm": "rms",
        "norm_eps": float(getattr(said, "rms_norm_eps", 0.0)),
        "norm_offset": False,
        "norm_in_float32": False,
        "pre_norms": True,
        "post_norms": False,
        "qk_norm": "none",
        "query_scale": head_width**-0.5,
        "score_cap": None,
        "attention_sinks": False,
        "logit_cap": None,
        "embed_scale": 1.0,
        "residual_scale": 1.0,
        "logit_scale": 1.0,
        "activation": ACTIVATION_OF_HF[activation],
        "silu_slope": 1.0,
        "gated_mlp": True,
        "gate_limit": None,
        "up_offset": 0.0,
        "qkv_bias": False,
        "output_bias": False,
        "mlp_bias": False,
        "num_experts": 0,
        "experts_per_token": 0,
        "router_bias": False,
        "router_normalised": False,
        "router_aux_weight": 0.0,
        "tied_head": said.tie_word_embeddings,
    }
    return ModelConfig(**usual | family.read(said))


def _llama(said: Said) -> dict[str, Any]:
    bias = said.attention_bias
    return {"qkv_bias": bias, "output_bias": bias, "mlp_bias": getattr(said, "mlp_bias", False)}


def _mistral(said: Said) -> dict[str, Any]:
    del said
    return {}


def _qwen2(said: Said) -> dict[str, Any]:
    del said
    return {"qkv_bias": True}


def _qwen3(said: Said) -> dict[str, Any]:
    return _llama(said) | {"qk_norm": "head"}


def _gemma(said: Said) -> dict[str, Any]:
    return _llama(said) | {
        "norm_offset": True,
        "norm_in_float32": True,
        "embed_scale": math.sqrt(said.hidden_size),
    }


def _gemma2(said: Said) -> dict[str, Any]:
    return _gemma(said) | {
        "post_norms": True,
        "query_scale": said.query_pre_attn_scalar**-0.5,
        "score_cap": said.attn_logit_softcapping,
        "logit_cap": said.final_logit_softcapping,
    }


def _gemma3(said: Said) -> dict[str, Any]:
    return _gemma2(said) | {"qk_norm": "head"}


def _olmo2(said: Said) -> dict[str, Any]:
    return _llama(said) | {"norm_in_float32": True, "pre_norms": False, "post_norms": True, "qk_norm": "width"}


def _granite(said: Said) -> dict[str, Any]:
    return _llama(said) | {
        "query_scale": float(said.attention_multiplier),
        "embed_scale": float(said.embedding_multiplier),
        "residual_scale": float(said.residual_multiplier),
        "logit_scale": 1.0 / said.logits_scaling,
    }


def _glm(said: Said) -> dict[str, Any]:
    return {"qkv_bias": said.attention_bias}


def _glm4(said: Said) -> dict[str, Any]:
    return _glm(said) | {"post_norms": True}


def _starcoder2(said: Said) -> dict[str, Any]:
    bias = said.use_bias
    return {
        "norm": "layer",
        "norm_eps": float(said.norm_epsilon),
        "gated_mlp": False,
        "qkv_bias": bias,
        "output_bias": bias,
        "mlp_bias": bias,
    }


def _experts(said: Said) -> dict[str, Any]:
    return {
        "num_experts": said.num_experts,
        "experts_per_token": said.num_experts_per_tok,
        # As in transformers, which leaves the loss out of training unless the config asks for the router's logits.
        "router_aux_weight": float(said.router_aux_loss_coef) if said.output_router_logits else 0.0,
    }


def _mixtral(said: Said) -> dict[str, Any]:
    return _experts(said) | {"router_normalised": True}


def _qwen3_moe(said: Said) -> dict[str, Any]:
    width = said.moe_intermediate_size
    return _qwen3(said) | _experts(said) | {"mlp_width": width, "router_normalised": said.norm_topk_prob}


def _olmoe(said: Said) -> dict[str, Any]:
    return _llama(said) | _experts(said) | {"qk_norm": "width", "router_normalised": said.norm_topk_prob}


def _gpt_oss(said: Said) -> dict[str, Any]:
    return _llama(said) | {
        "mlp_bias": True,
        "norm_in_float32": True,
        "attention_sinks": True,
        "activation": "silu",  # whatever hidden_act says: transformers does not read it here
        "silu_slope": float(said.swiglu_alpha),
        "gate_limit": float(said.swiglu_limit),
        "up_offset": 1.0,
        **_experts(said),
        "router_bias": True,
        "router_normalised": True,
    }


_RMS = frozenset({"rms_norm_eps"})
_PLAIN = _RMS | {"hidden_act"}
_BIASED = _PLAIN | {"attention_bias", "mlp_bias"}
_WINDOWS = frozenset({"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"})
_EXPERTS = frozenset(
    {"num_experts", "num_local_experts", "num_experts_per_tok", "output_router_logits", "router_aux_loss_coef"}
)
_GEMMA = _RMS | {"attention_bias", "hidden_activation"}
_GEMMA2 = _GEMMA | {"query_pre_attn_scalar", "sliding_window", "layer_types", "final_logit_softcapping"}

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", _BIASED, _llama),
    "mistral": Family("MistralForCausalLM", _PLAIN | {"sliding_window"}, _mistral),
    "ministral": Family("MinistralForCausalLM", _PLAIN | {"sliding_window", "layer_types"}, _mistral),
    "qwen2": Family("Qwen2ForCausalLM", _RMS | {"hidden_act"} | _WINDOWS, _qwen2),
    "qwen3": Family("Qwen3ForCausalLM", _PLAIN | {"attention_bias"} | _WINDOWS, _qwen3),
    "gemma": Family("GemmaForCausalLM", (_GEMMA - {"hidden_activation"}) | {"hidden_act"}, _gemma),
    "gemma2": Family("Gemma2ForCausalLM", _GEMMA2 | {"attn_logit_softcapping"}, _gemma2),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        _GEMMA2 | {"rope_local_base_freq", "sliding_window_pattern"},
        _gemma3,
        has_own_ropes=True,
        ropes_by_layer_type=True,
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        _BIASED | {"no_rope_layers", "no_rope_layer_interval"} | _WINDOWS,
        _llama,
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        _PLAIN | {"partial_rotary_factor", "original_max_position_embeddings", "sliding_window"},
        _mistral,
    ),
    "olmo2": Family("Olmo2ForCausalLM", _PLAIN | {"attention_bias"}, _olmo2),
    "olmo3": Family(
        "Olmo3ForCausalLM",
        _PLAIN | {"attention_bias", "sliding_window", "layer_types"},
        _olmo2,
        has_own_ropes=True,
        ropes_by_layer_type=True,
    ),
    "granite": Family(
        "GraniteForCausalLM",
        _BIASED | {"attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling"},
        _granite,
    ),
    "glm": Family("GlmForCausalLM", _PLAIN | {"attention_bias", "partial_rotary_factor"}, _glm, interleaved_rope=True),
    "glm4": Family(
        "Glm4ForCausalLM", _PLAIN | {"attention_bias", "partial_rotary_factor"}, _glm4, interleaved_rope=True
    ),
    "starcoder2": Family(
        "Starcoder2ForCausalLM", frozenset({"hidden_act", "norm_epsilon", "use_bias", "sliding_window"}), _starcoder2
    ),
    "mixtral": Family("MixtralForCausalLM", _PLAIN | _EXPERTS | {"sliding_window"}, _mixtral),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        # Its window is that of all layers, whatever max_window_layers says.
        _PLAIN
        | _EXPERTS
        | (_WINDOWS - {"layer_types"})
        | {"attention_bias", "norm_topk_prob", "moe_intermediate_size"},
        _qwen3_moe,
    ),
    "olmoe": Family("OlmoeForCausalLM", _PLAIN | _EXPERTS | {"attention_bias", "norm_topk_prob"}, _olmoe),
    "gpt_oss": Family(
        "GptOssForCausalLM",
        _PLAIN
        | _EXPERTS
        | {"attention_bias", "sliding_window", "layer_types", "swiglu_alpha", "swiglu_limit"}
        # Its makers' words for num_experts_per_tok and for the first context of its rope; transformers reads neither.
        | {"experts_per_token", "initial_context_length"},
        _gpt_oss,
        has_own_ropes=True,
        quantised=("mxfp4",),
    ),
}


def filled_in(hf: Mapping[str, Any]) -> Said:
    """What transformers' config class of its type makes of a config.json, without the fields that nobody here reads."""
    kind = hf["model_type"]
    read = (_COMMON | FAMILIES[kind].fields) - {"model_type"}
    arithmetic = {k: v for k, v in with_known_names(hf).items() if k in read}
    # Ids of tokens say nothing here, and the defaults of the type may lie outside this vocabulary.
    ids: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    try:
        return CONFIG_MAPPING[kind](**copy.deepcopy(arithmetic), **ids)
    except (StrictDataclassError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
        raise _cannot_be_followed([" ".join(str(error).split())]) from error


def _cannot_be_followed(problems: list[str]) -> ValueError:
    return ValueError("config.json cannot be followed exactly:\n" + "\n".join(f"  {p}" for p in problems))


def _misfits(hf: Mapping[str, Any]) -> list[str]:
    """Fields of a wrong type or range; one that is null counts as left out."""
    acts = ("hidden_act", "hidden_activation")
    numbers = (
        *("rms_norm_eps", "norm_epsilon", "logits_scaling", "query_pre_attn_scalar"),
        *("swiglu_alpha", "swiglu_limit", "attention_multiplier", "embedding_multiplier", "residual_multiplier"),
    )
    wanted: list[tuple[tuple[str, ...], Callable[[Any], bool], str]] = [
        (_COUNTS, lambda x: is_positive(x) and isinstance(x, int), "a whole number of at least 1, without quotes"),
        (numbers, is_positive, "a number above 0, without quotes"),
        (("router_aux_loss_coef",), lambda x: x == 0 or is_positive(x), "0 or a number above it, without quotes"),
        (acts, lambda x: x in [*ACTIVATION_OF_HF], f"one of {', '.join(ACTIVATION_OF_HF)}"),
        (_SWITCHES, lambda x: isinstance(x, bool), "true or false, without quotes"),
        (("layer_types",), _is_list_of_texts, 'a list of texts like "full_attention", one for each layer'),
        (("no_rope_layers",), lambda x: _is_switch_of_each(x, hf), "a list of 1 and 0, one for each layer"),
    ]
    never_null = ("sliding_window_pattern", "no_rope_layer_interval")
    return [f"{name} = None must be a number, or left out" for name in never_null if hf.get(name, 1) is None] + [
        f"{name} = {hf[name]!r} must be {what}"
        for names, fits, what in wanted
        for name in names
        if hf.get(name) is not None and not fits(hf[name])
    ]


def _is_list_of_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _is_switch_of_each(value: Any, hf: Mapping[str, Any]) -> bool:
    layers = hf.get("num_hidden_layers")
    is_long_enough = isinstance(value, list) and (not isinstance(layers, int) or len(value) >= layers)
    return is_long_enough and all(each in (0, 1) for each in value)


def _nothing_left(said: Said, head_width: int) -> list[str]:
    """What is 0 or null although each for itself fits, and although its class fills in what is left out."""
    problems = []
    if head_width < 1:
        heads = said.num_attention_heads
        problems.append(f"hidden_size = {said.hidden_size} must be at least num_attention_heads = {heads}")
    if said.num_key_value_heads is None:
        problems.append("num_key_value_heads = None must be a whole number of at least 1 for this model type")
    return problems


def _two_counts_of_experts(hf: Mapping[str, Any]) -> list[str]:
    return [
        f"{new} = {hf[new]!r} and {old} = {hf[old]!r} differ; keep one of them"
        for new, old in (("num_experts", "num_local_experts"), ("num_experts_per_tok", "experts_per_token"))
        if hf.get(new) is not None and hf.get(old) is not None and hf[new] != hf[old]
    ]


def _windows(said: Said) -> tuple[int | None, ...]:
    return tuple(said.sliding_window if kind == "sliding_attention" else None for kind in layer_types(said))
