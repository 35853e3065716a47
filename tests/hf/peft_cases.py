"""Adapters as PEFT makes them, of the tiny models, and what PEFT answers with them.

Run `python -m tests.hf.peft_cases` (with torch and peft) to record tests/golden/peft_llama_tiny again.
"""

import contextlib
import dataclasses
import pathlib
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_sft.hf.peft import Adapter
from jax_sft.hf.save_adapter import write_adapter
from jax_sft.model.config import ModelConfig
from jax_sft.model.decoder import build
from jax_sft.model.lora import Lora, Start, Target
from tests.hf.family_cases import config_of, hf_config, params_of, tokens_of, transformers_model
from tests.hf.models import tiny_tokenizer

GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "golden" / "peft_llama_tiny"

_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
_EMBEDDING_AND_ALL = [*_ATTENTION, "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"]
# What is adapted, and how, of which tiny model.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}),
    "llama_all": ("llama", {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "lora_dropout": 0.1}),
    "llama_with_biases": ("llama_tied_with_biases", {"r": 3, "target_modules": "all-linear", "use_dora": True}),
    "llama_rslora": ("llama", {"r": 5, "lora_alpha": 3, "target_modules": _ATTENTION, "use_rslora": True}),
    "llama_dora": ("llama", {"r": 4, "target_modules": "all-linear", "use_dora": True}),
    "llama_patterns": (
        "llama",
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": "all-linear",
            "rank_pattern": {"layers.1.self_attn.q_proj": 2, r"layers\.[23]\.mlp.*_proj": 7, "v_proj": 1},
            "alpha_pattern": {"o_proj": 5, r"model.layers.1.self_attn.[qk]_proj": 3, "v_proj": 9},
        },
    ),
    "llama_rslora_patterns": (
        "llama",
        {"r": 4, "target_modules": _ATTENTION, "use_rslora": True, "rank_pattern": {"k_proj": 2, "o_proj": 3}},
    ),
    "llama_without_alpha": (
        "llama",
        {"r": 4, "target_modules": _ATTENTION, "alpha_pattern": {"v_proj": 0, r"layers\.1.*k_proj": 0}},
    ),
    "llama_some_layers": (
        "llama",
        {"r": 4, "target_modules": _ATTENTION, "layers_to_transform": [1, 3], "use_dora": True},
    ),
    "llama_regex": (
        "llama",
        {"r": 4, "target_modules": r".*\.(1\.self_attn\.q|2\.mlp\.down)_proj"},
    ),
    "llama_without_some": (
        "llama",
        {"r": 4, "target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*layers\.0.*q_proj"},
    ),
    "llama_saved": (
        "llama",
        {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens", "model.norm"]},
    ),
    "qwen3_saved_norms": (
        "qwen3",
        {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["q_norm", "input_layernorm", "down_proj"]},
    ),
    "llama_embedding_and_head": ("llama", {"r": 4, "lora_alpha": 6, "target_modules": _EMBEDDING_AND_ALL}),
    "llama_tied_embedding_and_head": ("llama_tied_with_biases", {"r": 4, "target_modules": _EMBEDDING_AND_ALL}),
    "llama_tied_head": ("llama_tied_with_biases", {"r": 4, "target_modules": ["v_proj", "lm_head"]}),
    "gemma3_embedding": ("gemma3_text", {"r": 4, "target_modules": ["q_proj", "embed_tokens"]}),
    "qwen3_all": ("qwen3", {"r": 4, "target_modules": "all-linear"}),
    "qwen3_rslora": ("qwen3", {"r": 5, "lora_alpha": 3, "target_modules": _ATTENTION, "use_rslora": True}),
    "qwen3_dora": ("qwen3", {"r": 4, "target_modules": "all-linear", "use_dora": True}),
    "gemma3_all": ("gemma3_text", {"r": 4, "target_modules": "all-linear"}),
    "gemma3_rslora": ("gemma3_text", {"r": 5, "lora_alpha": 3, "target_modules": "all-linear", "use_rslora": True}),
    "gemma3_dora": ("gemma3_text", {"r": 4, "target_modules": "all-linear", "use_dora": True}),
    "gemma3_rslora_dora": ("gemma3_text", {"r": 4, "target_modules": _ATTENTION, "use_rslora": True, "use_dora": True}),
    "phi3_all": ("phi3", {"r": 4, "target_modules": "all-linear"}),
    "phi3_dora": ("phi3", {"r": 4, "target_modules": ["qkv_proj"], "use_dora": True}),
    "phi3_saved": ("phi3", {"r": 4, "target_modules": ["o_proj"], "modules_to_save": ["gate_up_proj"]}),
    "glm_all": ("glm", {"r": 4, "target_modules": "all-linear"}),
    "starcoder2_all": ("starcoder2", {"r": 4, "target_modules": "all-linear", "modules_to_save": ["model.norm"]}),
    "gpt_oss_attention": ("gpt_oss", {"r": 4, "target_modules": _ATTENTION}),
}


def base_config(case: str) -> ModelConfig:
    return config_of(CASES[case][0])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """PEFT warns of much that is meant here; and torch is faster here without threads that others stop."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_num_threads(threads)


def save_peft(case: str, folder: pathlib.Path) -> np.ndarray:
    """Save an adapter of random numbers with PEFT; the logits that it gives."""
    import peft
    import torch

    base, said = CASES[case]
    with quiet():
        config = peft.LoraConfig(task_type="CAUSAL_LM", **said)
        model: Any = peft.get_peft_model(transformers_model(base), config).eval()
        torch.manual_seed(0)
        with torch.no_grad():
            for name, x in model.named_parameters():
                if "lora_magnitude" in name:
                    x.mul_(1 + 0.3 * torch.rand_like(x))
                elif "lora_" in name or "modules_to_save" in name:
                    x.add_(0.2 * torch.randn_like(x))
            model.save_pretrained(folder)
            return model(torch.from_numpy(tokens_of(base_config(case))).long()).logits.numpy()


def peft_logits(base: str, folder: pathlib.Path) -> np.ndarray:
    """What PEFT answers with the adapter in `folder`, of which it has found everything and nothing else."""
    import peft
    import torch

    with quiet(), torch.no_grad():
        model: Any = peft.PeftModel.from_pretrained(transformers_model(base), folder).eval()
        logits = model(torch.from_numpy(tokens_of(config_of(base))).long()).logits.numpy()
        found = model.load_adapter(folder, "again")
    lost = [key for key in found.missing_keys if ".again." in key]
    assert not lost and not found.unexpected_keys, (lost, found.unexpected_keys)
    return logits


def random_adapter(
    config: ModelConfig, *targets: Target, dora: bool = False, start: Start = "default", **full: np.ndarray
) -> Adapter:
    """Random factors, zero where a layer has no such rank or the vocabulary no such token."""
    draw = np.random.default_rng(0)
    lora = Lora(targets=targets, dropout=0.0, dora=dora, start=start)
    tree = lora.shapes(config.sizes)
    ranks_of = {target.path: target.ranks for target in targets}

    def make(node: Any, path: str) -> Any:
        made = {}
        for name, held in node.items():
            here = f"{path}.{name}".removeprefix(".")
            if isinstance(held, dict):
                made[name] = make(held, here)
                continue
            axes = name.rsplit("_", 1)[1]
            x = np.abs(draw.normal(1, 0.3, held)) if name.startswith("magnitude") else draw.normal(0, 0.2, held)
            if "R" in axes:
                at = np.arange(held[axes.index("R")]).reshape([-1 if axis == "R" else 1 for axis in axes])
                ranks = np.array(ranks_of[path]).reshape([-1 if axis == "L" else 1 for axis in axes])
                x = np.where(at < ranks, x, 0)
            if "V" in axes:
                x[tuple(slice(config.vocab_size, None) if axis == "V" else slice(None) for axis in axes)] = 0
            made[name] = x.astype(np.float32)
        return made

    params = {"lora": make(tree["lora"], "")} | full
    return Adapter(lora=lora, params=params, base_params={}, config={}, dtype="float32", file=pathlib.Path("made here"))


def merged(params: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`params` with what `over` has beside or in place of it."""
    both = {k: merged(params.get(k, {}), v) if isinstance(v, dict) else v for k, v in over.items()}
    return params | both


def our_logits(config: ModelConfig, adapter: Adapter, tokens_BT: np.ndarray) -> np.ndarray:
    """Logits of the tiny base with an adapter; its vocabulary may be padded."""
    base = params_of(dataclasses.replace(config, vocab_rows=config.vocab_size))
    for name in ("embed_VD", "head_VD"):
        if name in base:
            base[name] = np.pad(base[name], [(0, config.vocab_rows - config.vocab_size), (0, 0)])
    params = merged(merged(base, adapter.base_params), adapter.params)
    graphdef = build(config, dtype="float32", attention="xla", lora=adapter.lora)

    @jax.jit
    def logits(params: Any, tokens_BT: jax.Array) -> jax.Array:
        decoder = nnx.merge(graphdef, params)
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None], tokens_BT.shape)
        return decoder.logits(decoder.hidden(tokens_BT, positions_BT, jnp.ones_like(tokens_BT)))

    return np.asarray(logits(params, jnp.asarray(tokens_BT, jnp.int32)))


def write(out: pathlib.Path, base: str, adapter: Adapter, **said: Any) -> None:
    """Write an adapter that was read, or one like it, with all that goes along."""
    arguments: dict[str, Any] = {
        "lora": adapter.lora,
        "params": adapter.params,
        "base_params": adapter.base_params,
        "config": config_of(base),
        "base_name": "somebody/tiny",
        "dtype": adapter.dtype,
        "tokenizer": tiny_tokenizer(),
        "hf_config": hf_config(base),
        "generation_config": {},
        "chat_template": "{{ messages }}",
        "stop_ids": (2,),
        "facts": {"steps": 3},
        "source_config": adapter.config or None,
    }
    write_adapter(out, **arguments | said)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        logits = save_peft("llama_patterns", pathlib.Path(place))
        GOLDEN.mkdir(exist_ok=True)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (GOLDEN / name).write_bytes((pathlib.Path(place) / name).read_bytes())
        np.savez_compressed(GOLDEN / "logits.npz", logits=logits)
