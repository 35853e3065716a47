"""Fields of a config.json that no family reads: each is of no effect, followed at one value alone, or a second name.

In: the dict of a config.json. Out: what in it cannot be followed, each by name. A field that nobody here knows is one.
"""

from collections.abc import Mapping, Set
from typing import Any

from jax_sft.model.config import Activation

Said = Any  # transformers' config object of a model type, with everything filled in

# transformers has several names for one function (transformers/activations.py)
ACTIVATION_OF_HF: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
}
# Fields that change the arithmetic where a family reads them; elsewhere, the only values that are followed.
_FIXED: dict[str, tuple[Any, ...]] = {
    "rope_interleaved": (False,),
    "use_mrope": (False,),
    "partial_rotary_factor": (1.0,),
    "sliding_window": (None,),
    "use_sliding_window": (False,),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "lm_head_bias": (False,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "use_bidirectional_attention": (None, False),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "is_decoder": (False,),
    "quantization_config": (None,),
    "pruned_heads": ({},),
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([],),
    "clip_qkv": (None,),
    "router_jitter_noise": (0.0,),
}
# Those that a model type says of itself, and others do not.
_FIXED_OF: dict[str, dict[str, tuple[Any, ...]]] = {
    "phi3": {"full_attn_mod": (1,), "interpolate_factor": (1,)},
    "starcoder2": {
        "attention_softmax_in_fp32": (True,),
        "scale_attention_softmax_in_fp32": (True,),
        "scale_attn_weights": (True,),
        "mlp_type": ("default",),
        "norm_type": ("layer_norm",),
    },
    "qwen3_moe": {"qkv_bias": (False,), "use_qk_norm": (True,), "shared_expert_intermediate_size": (0,)},
}
# Second names, and the first ones, under which transformers reads the field: the two must say the same.
_COPIES_OF: dict[str, dict[str, str]] = {
    "llama": {"activation": "hidden_act"},
    "gemma": {"hidden_activation": "hidden_act"},
    "gemma2": {"hidden_act": "hidden_activation", "sliding_window_size": "sliding_window"},
    "gemma3_text": {"hidden_act": "hidden_activation"},
    "starcoder2": {"layer_norm_epsilon": "norm_epsilon"},
}
_DROPOUTS = ("attention_dropout", "resid_pdrop", "embd_pdrop", "residual_dropout", "embedding_dropout")
# Fields that say nothing about the arithmetic of logits; names that start with "_" are private and ignored too.
_IRRELEVANT = frozenset(
    """
    architectures bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id
    transformers_version torch_dtype dtype use_cache initializer_range is_llama_config transformers.js_config
    unsloth_fixed unsloth_version torchscript use_bfloat16 use_return_dict return_dict return_dict_in_generate
    output_attentions output_hidden_states output_scores chunk_size_feed_forward cross_attention_hidden_size
    tie_encoder_decoder tokenizer_class prefix task_specific_params problem_type id2label label2id finetuning_task
    tf_legacy_loss name_or_path max_length min_length do_sample early_stopping num_beams num_beam_groups
    diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens attn_implementation
    auto_map cache_implementation trust_remote_code max_sequence_length pretraining_tp
    """.split()  # noqa: SIM905
)


def dropouts(hf: Mapping[str, Any]) -> dict[str, float]:
    """The dropouts that a config.json asks for in training; none is applied here, and none changes logits."""
    return {name: hf[name] for name in _DROPOUTS if hf.get(name)}


def without_a_place(
    hf: Mapping[str, Any], *, read: Set[str], architecture: str, quantised: tuple[str, ...]
) -> list[str]:
    """Fields that change the arithmetic and have no place in `ModelConfig`; those named by `read` have one."""
    kind = hf["model_type"]
    fixed = _FIXED | _FIXED_OF.get(kind, {})
    problems = []
    for name, value in hf.items():
        if name in read or name in _IRRELEVANT or name in _DROPOUTS or name.startswith("_") or value is None:
            continue
        if name in _COPIES_OF.get(kind, {}):
            continue  # differing_copies
        if name == "layer_types":
            if isinstance(value, list) and any(layer != "full_attention" for layer in value):
                problems.append(f"layer_types = {value!r} is not modelled for this model type")
        elif name == "quantization_config" and quantised:
            if not isinstance(value, Mapping) or value.get("quant_method") not in quantised:
                problems.append(f"{name} = {value!r} is not modelled; only quant_method {quantised[0]!r} is")
        elif name in fixed:
            if value not in fixed[name]:
                problems.append(f"{name} = {value!r} is not modelled; only {fixed[name][-1]!r} is")
        else:
            problems.append(f"{name} = {value!r} is an unknown field; remove it if it has no effect on the logits")
    architectures = hf.get("architectures") or []
    modelled = [architecture, architecture.replace("Llama", "LLaMA")]
    if not isinstance(architectures, list) or any(name not in modelled for name in architectures):
        problems.append(f"architectures = {architectures!r} is not modelled; only [{architecture!r}] is")
    return problems


def differing_copies(hf: Mapping[str, Any], said: Said) -> list[str]:
    """Second names whose value is not what is read under the first name, or its default where only the second is."""
    return [
        f"{copy} = {hf[copy]!r} and {first} = {getattr(said, first)!r} differ; they must say the same"
        for copy, first in _COPIES_OF.get(hf["model_type"], {}).items()
        if hf.get(copy) is not None and _meaning(copy, hf[copy]) != _meaning(first, getattr(said, first))
    ]


def _meaning(name: str, value: Any) -> Any:
    if name == "activation" and value == "swiglu":  # Falcon 3: a gated MLP with silu
        return "silu"
    if name == "hidden_act" and value == "gelu":  # beside hidden_activation: Gemma's, of the first days
        return "gelu_tanh"
    return ACTIVATION_OF_HF[value] if name.startswith("hidden_act") else value
