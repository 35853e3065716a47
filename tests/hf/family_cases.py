"""A tiny model of every family, with each of its switches turned, and what transformers answers to it.

Run `python -m tests.hf.family_cases` (with torch) to record tests/golden/family_logits.npz again.
"""

import copy
import json
import pathlib
import tempfile
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from jax_sft.hf import names
from jax_sft.model.config import ModelConfig
from jax_sft.model.families import FAMILIES, read_model_config
from tests.hf.models import tiny_tokenizer

GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "golden" / "family_logits.npz"
TOKENS = 40

LEFT_OUT = "left out"  # null would be something that config.json says

SIZES: dict[str, Any] = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rope_theta": 100.0,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Every family in the shape of its real models, small; windows are shorter than the text.
BASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 7},
    "ministral": {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "qwen2": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
    "qwen3": {},
    "gemma": {"tie_word_embeddings": True},
    "gemma2": {"sliding_window": 7, "tie_word_embeddings": True, "query_pre_attn_scalar": 12},
    "gemma3_text": {"sliding_window": 7, "sliding_window_pattern": 3, "tie_word_embeddings": True},
    "smollm3": {"no_rope_layer_interval": 2},
    "phi3": {"sliding_window": 9, "original_max_position_embeddings": 64, "head_dim": LEFT_OUT, "hidden_size": 32},
    "olmo2": {},
    "olmo3": {"sliding_window": 7},
    "granite": {
        "attention_multiplier": 0.4,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.6,
        "logits_scaling": 2.0,
    },
    "glm": {},
    "glm4": {},
    "starcoder2": {"sliding_window": 7, "norm_epsilon": 1e-5},
    "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 12,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": False, "head_dim": LEFT_OUT},
    "gpt_oss": {
        "num_local_experts": 6,
        "num_experts_per_tok": 3,
        "sliding_window": 7,
        "swiglu_limit": 1.5,  # low enough to cut something off
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "truncate": False},
    },
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.3, 1.7],
    "long_factor": [1.0, 2.0, 4.0, 9.0],
    "original_max_position_embeddings": 16,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# Each turns one thing more.
TURNED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_tied_with_biases": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama_linear": ("llama", {"rope_scaling": {"type": "linear", "factor": 3.0}}),
    "llama_llama3": ("llama", {"rope_scaling": LLAMA3}),
    "llama_dynamic": (
        "llama",
        {"rope_scaling": {"rope_type": "dynamic", "factor": 3.0}, "max_position_embeddings": 16},
    ),
    "llama_yarn": ("llama", {"rope_scaling": YARN}),
    "llama_yarn_turned": (
        "llama",
        {"rope_scaling": YARN | {"beta_fast": 8.0, "beta_slow": 0.5, "truncate": False, "attention_factor": 1.3}},
    ),
    "llama_longrope": ("llama", {"rope_scaling": LONG}),
    "llama_longrope_short": (
        "llama",
        {"rope_scaling": LONG | {"original_max_position_embeddings": 48}, "max_position_embeddings": 96},
    ),
    "mistral_without_window": ("mistral", {"sliding_window": None}),
    "qwen2_without_window": ("qwen2", {"use_sliding_window": False}),
    "qwen3_with_bias_and_window": (
        "qwen3",
        {"attention_bias": True, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "gemma_with_bias": ("gemma", {"attention_bias": True}),
    "gemma2_without_caps": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma2_low_caps": ("gemma2", {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 0.7}),
    "gemma3_linear": ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    "gemma3_local_theta": ("gemma3_text", {"rope_local_base_freq": 7.0, "final_logit_softcapping": 1.5}),
    "smollm3_windows": ("smollm3", {"use_sliding_window": True, "sliding_window": 5}),
    "smollm3_no_rope": ("smollm3", {"no_rope_layers": [0, 0, 0, 0]}),
    "phi3_longrope": (
        "phi3",
        {"rope_scaling": LONG, "original_max_position_embeddings": 16, "partial_rotary_factor": 1.0},
    ),
    "phi3_partial": ("phi3", {"partial_rotary_factor": 0.5}),
    "olmo3_yarn": (
        "olmo3",
        {
            "rope_theta": LEFT_OUT,
            "rope_parameters": {
                "full_attention": {"rope_theta": 50.0, **YARN},
                "sliding_attention": {"rope_theta": 100.0, "rope_type": "default"},
            },
        },
    ),
    "granite_with_biases": ("granite", {"attention_bias": True, "mlp_bias": True}),
    "glm_no_bias_all_rotated": ("glm", {"attention_bias": False, "partial_rotary_factor": 1.0}),
    "mixtral_one_of_five_and_window": (
        "mixtral",
        {"num_local_experts": 5, "num_experts_per_tok": 1, "sliding_window": 7, "tie_word_embeddings": True},
    ),
    "qwen3_moe_as_they_come_with_bias_and_window": (
        "qwen3_moe",
        {"norm_topk_prob": False, "attention_bias": True, "use_sliding_window": True, "sliding_window": 7},
    ),
    "olmoe_normalised_with_bias": ("olmoe", {"norm_topk_prob": True, "attention_bias": True}),
    "gpt_oss_without_attention_bias_and_yarn": (
        "gpt_oss",
        {
            "attention_bias": False,
            "layer_types": ["full_attention", "sliding_attention", "full_attention", "full_attention"],
            "num_experts_per_tok": 1,
            "swiglu_alpha": 0.8,
            "swiglu_limit": 0.7,
            "rope_scaling": LEFT_OUT,
            "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"},
        },
    ),
    "starcoder2_no_bias": ("starcoder2", {"use_bias": False, "sliding_window": None}),
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in BASES} | TURNED
assert set(BASES) == set(FAMILIES)


def hf_config(case: str) -> dict[str, Any]:
    kind, turned = CASES[case]
    said = SIZES | BASES[kind] | turned | {"model_type": kind, "architectures": [FAMILIES[kind].architecture]}
    return copy.deepcopy({k: v for k, v in said.items() if v is not LEFT_OUT})


def config_of(case: str) -> ModelConfig:
    return read_model_config(hf_config(case))


def params_of(config: ModelConfig, seed: int = 0) -> dict[str, Any]:
    """Weights large enough for every part to matter; norms and biases are random too."""
    random = np.random.RandomState(seed)

    def make(name: str, shape: tuple[int, ...]) -> np.ndarray:
        around = float("norm" in name and "bias" not in name and not config.norm_offset)
        return (around + 0.3 * random.standard_normal(shape)).astype(np.float32)

    shapes = config.shapes
    blocks = shapes.pop("blocks")
    return {"blocks": {name: make(name, blocks[name]) for name in sorted(blocks)}} | {
        name: make(name, shapes[name]) for name in sorted(shapes)
    }


def tokens_of(config: ModelConfig, rows: int = 2, length: int = TOKENS) -> np.ndarray:
    return np.random.RandomState(1).randint(0, config.vocab_size, (rows, length)).astype(np.int32)


def state_dict_of(config: ModelConfig, params: dict[str, Any]) -> dict[str, np.ndarray]:
    """The tensors of a Hugging Face file."""
    parts: dict[str, list[tuple[names.Rule, np.ndarray]]] = {}
    for rule, array in names.leaves(params, config):
        for place, name in rule.names.items():
            parts.setdefault(name, []).append((rule, array[(*place, ...)]))
    return {name: names.file_tensor(held) for name, held in parts.items()}


def write_family(folder: pathlib.Path, case: str) -> dict[str, np.ndarray]:
    """A folder of bfloat16 weights, in which each tensor starts with -0.0, and the tiny tokenizer; its weights."""
    config = config_of(case)
    state = {name: x.astype(ml_dtypes.bfloat16) for name, x in state_dict_of(config, params_of(config)).items()}
    for x in state.values():
        x.reshape(-1)[0] = -0.0
    tables = [names.EMBED] + ([] if config.tied_head else [names.HEAD])
    state |= {name: np.resize(state[name], (320, config.width)) for name in tables}  # what the tokenizer needs
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf_config(case) | {"vocab_size": 320}))
    tiny_tokenizer().save_pretrained(folder)
    save_file(state, folder / "model.safetensors")
    return state


def transformers_model(case: str) -> Any:
    """The model as transformers reads it from files, float32 on the CPU: no tensor missing, none unexpected."""
    import torch
    from transformers import AutoModelForCausalLM

    config = config_of(case)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder)
        (path / "config.json").write_text(json.dumps(hf_config(case)))
        save_file(state_dict_of(config, params_of(config)), path / "model.safetensors", metadata={"format": "pt"})
        model, found = AutoModelForCausalLM.from_pretrained(
            path,
            attn_implementation="eager",
            experts_implementation="eager",
            dtype=torch.float32,
            output_loading_info=True,
        )
    assert not any(found.values()), found
    return model.eval()


def transformers_gradients(model: Any) -> dict[str, np.ndarray]:
    """The gradients of a model after `backward`, as the tensors of the file that transformers would write."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(pathlib.Path(folder) / "model.safetensors")


def transformers_logits(case: str) -> np.ndarray:
    import torch

    with torch.no_grad():
        return transformers_model(case)(torch.from_numpy(tokens_of(config_of(case))).long()).logits.numpy()


if __name__ == "__main__":
    np.savez_compressed(GOLDEN, **{case: transformers_logits(case) for case in CASES})
