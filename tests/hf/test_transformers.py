"""Export = what was trained, as transformers sees it: the exported folder gives the same logits, tokens and stops."""

import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jax_sft.config import MeshConfig
from jax_sft.hf.load import Pretrained, load_model
from jax_sft.model.decoder import random_params
from jax_sft.sharding import make_mesh
from tests.hf.family_cases import write_family
from tests.hf.logits import assert_close, our_logits
from tests.hf.models import TINY, tiny_tokenizer, write_folder
from tests.hf.test_save import export

torch = pytest.importorskip("torch", reason="torch is the oracle here: pip install 'jax-sft[oracle]'")

LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CONFIGS = {
    "plain": TINY,
    "tied": TINY | {"tie_word_embeddings": True},
    "biases": TINY | {"attention_bias": True, "mlp_bias": True},
    "linear rope": TINY | {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "llama3 rope": TINY | {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 16}},
}


def their_logits(model: Any, tokens_BT: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens_BT, dtype=torch.long)).logits.float().numpy()


@pytest.fixture
def tokens_BT() -> np.ndarray:
    return np.random.default_rng(0).integers(0, TINY["vocab_size"], (2, 24))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_exported_model_gives_the_same_logits(tmp_path: pathlib.Path, config: dict, tokens_BT: np.ndarray):
    from transformers import AutoModelForCausalLM

    write_folder(tmp_path / "in", config)
    model = load_model(tmp_path / "in", mesh=make_mesh(MeshConfig(fsdp=4, tensor=2)))
    export(model, tmp_path / "out", max_shard_size=4096)
    base = AutoModelForCausalLM.from_pretrained(str(tmp_path / "in"))
    again, info = AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"), output_loading_info=True)
    assert not any(info.values()), info
    ours = our_logits(model, tokens_BT)
    assert_close(ours, their_logits(base, tokens_BT))
    assert_close(ours, their_logits(again, tokens_BT))
    assert again.dtype == torch.float32


@pytest.mark.parametrize("case", ["qwen3", "gemma3_text", "phi3", "gpt_oss"])
def test_an_exported_family_loads_whole_keeps_its_template_and_stops_where_it_was_trained_to(tmp_path, case):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    write_family(tmp_path / "in", case)
    model = load_model(tmp_path / "in")
    tokens = np.arange(5, 10)[None]  # none of which generate takes for padding
    first = int(our_logits(model, tokens)[0, -1].argmax())
    export(model, tmp_path / "out", stop_ids=(first,), dtype="float32")
    again, info = AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"), output_loading_info=True)
    assert not any(info.values()), info
    assert_close(our_logits(model, tokens), their_logits(again, tokens))
    made = again.generate(torch.tensor(tokens), max_new_tokens=10, do_sample=False)
    assert made.tolist() == [[*range(5, 10), first]]
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    said = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(said, tokenize=False) == "<|im_start|>user\nhi<|im_end|>\n"


def test_what_transformers_saves_we_load(tmp_path: pathlib.Path, tokens_BT: np.ndarray):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    theirs = LlamaForCausalLM(
        LlamaConfig(**{k: v for k, v in TINY.items() if k not in ("architectures", "model_type")})
    )
    theirs.save_pretrained(str(tmp_path / "in"), max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(str(tmp_path / "in"))
    assert_close(our_logits(load_model(tmp_path / "in"), tokens_BT), their_logits(theirs, tokens_BT))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_export_in_fewer_bits_is_that_dtype_in_transformers(tmp_path: pathlib.Path, dtype: str):
    from transformers import AutoModelForCausalLM

    write_folder(tmp_path / "in")
    model = load_model(tmp_path / "in")
    export(model, tmp_path / "out", dtype=dtype)
    again = AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"))
    assert again.dtype == getattr(torch, dtype)
    ours = np.asarray(model.params["embed_VD"].astype(dtype).astype(jnp.float32))
    np.testing.assert_array_equal(again.get_input_embeddings().weight.float().detach().numpy(), ours)


def test_the_exported_model_stops_in_transformers(tmp_path: pathlib.Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = TINY | {"tie_word_embeddings": True}
    write_folder(tmp_path / "in", config)
    model = load_model(tmp_path / "in")
    tokens = np.arange(5)[None]
    params = random_params(model.config, seed=1)
    first = int(our_logits(Pretrained(**{**vars(model), "params": params}), tokens)[0, -1].argmax())
    export(model, tmp_path / "out", params=params, stop_ids=(first, 2))
    again = AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"))
    made = again.generate(torch.tensor(tokens), max_new_tokens=10, do_sample=False)
    assert made.shape == (1, 6)
    assert again.generation_config.eos_token_id == [first, 2]
    assert again.generation_config.pad_token_id not in (first, 2)
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    said = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(said, tokenize=False) == "<|im_start|>user\nhi<|im_end|>\n"
