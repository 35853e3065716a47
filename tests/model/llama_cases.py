"""Tiny Llama models with known logits: configs, weights made from a seed, and what transformers says of them.

Run `python -m tests.model.llama_cases` (with torch) to record tests/golden/llama_logits.npz again.
"""

import copy
import pathlib
from typing import Any

import numpy as np

from jax_sft.model.config import ModelConfig
from jax_sft.model.families import read_model_config

GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "golden" / "llama_logits.npz"

BASE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# Each case turns one thing.
CASES: dict[str, dict[str, Any]] = {
    "base": {},
    "untied": {"tie_word_embeddings": False},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "wide_heads": {"head_dim": 10},
    "one_kv_head": {"num_key_value_heads": 1},
    "all_kv_heads": {"num_key_value_heads": 4},
    "eps": {"rms_norm_eps": 0.3},
    "theta": {"rope_theta": 1e6},
    "linear_rope": {"rope_scaling": {"type": "linear", "factor": 3.0}},
    "llama3_rope": {"rope_scaling": LLAMA3_ROPE, "head_dim": 12},
    "gelu": {"hidden_act": "gelu"},
    "gelu_tanh": {"hidden_act": "gelu_new"},
}


def hf_config(case: str) -> dict[str, Any]:
    return copy.deepcopy(BASE | CASES[case])  # transformers writes into the dicts it is given


def config_of(case: str) -> ModelConfig:
    return read_model_config(hf_config(case))


def params_of(config: ModelConfig, seed: int = 0) -> dict[str, Any]:
    """Weights large enough for every part to matter; norms and biases are random too."""
    random = np.random.RandomState(seed)

    def make(name: str, shape: tuple[int, ...]) -> np.ndarray:
        return (("norm" in name and "bias" not in name) + 0.3 * random.standard_normal(shape)).astype(np.float32)

    shapes = config.shapes
    blocks = shapes.pop("blocks")
    return {"blocks": {name: make(name, blocks[name]) for name in sorted(blocks)}} | {
        name: make(name, shapes[name]) for name in sorted(shapes)
    }


def tokens_of(config: ModelConfig, rows: int = 2, length: int = 24) -> np.ndarray:
    random = np.random.RandomState(1)
    return random.randint(0, config.vocab_size, (rows, length)).astype(np.int32)


def transformers_logits(case: str) -> np.ndarray:
    """What `LlamaForCausalLM` answers, float32 on the CPU."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = config_of(case)
    said = {name: value for name, value in hf_config(case).items() if name != "model_type"}
    model = LlamaForCausalLM(LlamaConfig(**said, attn_implementation="eager")).eval()
    state = {name: torch.from_numpy(array) for name, array in _to_hf_names(params_of(config), config).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    with torch.no_grad():
        return model(torch.from_numpy(tokens_of(config)).long()).logits.numpy()


def _to_hf_names(params: dict[str, Any], config: ModelConfig) -> dict[str, np.ndarray]:
    """Written here a second time, on purpose: the test must not lean on the name table of the package."""
    parts = {
        "attn_norm_LD": "input_layernorm.weight",
        "mlp_norm_LD": "post_attention_layernorm.weight",
        "q_LDNH": "self_attn.q_proj.weight",
        "k_LDKH": "self_attn.k_proj.weight",
        "v_LDKH": "self_attn.v_proj.weight",
        "o_LNHD": "self_attn.o_proj.weight",
        "gate_LDF": "mlp.gate_proj.weight",
        "up_LDF": "mlp.up_proj.weight",
        "down_LFD": "mlp.down_proj.weight",
        "q_bias_LNH": "self_attn.q_proj.bias",
        "k_bias_LKH": "self_attn.k_proj.bias",
        "v_bias_LKH": "self_attn.v_proj.bias",
        "o_bias_LD": "self_attn.o_proj.bias",
        "gate_bias_LF": "mlp.gate_proj.bias",
        "up_bias_LF": "mlp.up_proj.bias",
        "down_bias_LD": "mlp.down_proj.bias",
    }
    out = {"model.embed_tokens.weight": params["embed_VD"], "model.norm.weight": params["final_norm_D"]}
    if "head_VD" in params:
        out["lm_head.weight"] = params["head_VD"]
    for name, stacked in params["blocks"].items():
        for layer, array in enumerate(stacked):
            if parts[name].endswith("bias") or "norm" in name:
                matrix = array.reshape(-1)
            elif name == "o_LNHD":
                matrix = array.reshape(-1, config.width).T
            else:
                matrix = array.reshape(array.shape[0], -1).T
            out[f"model.layers.{layer}.{parts[name]}"] = np.ascontiguousarray(matrix)
    return out


if __name__ == "__main__":
    np.savez_compressed(GOLDEN, **{case: transformers_logits(case) for case in CASES})
    print(f"wrote {GOLDEN}")
