"""Adapters on a real model: SmolLM2-135M with adapters that PEFT made says what it says in PEFT."""

import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from jax_sft.hf.load import Pretrained, load_model
from jax_sft.hf.peft import Adapter, read_adapter
from jax_sft.hf.save_adapter import write_adapter
from jax_sft.model.decoder import build
from jax_sft.parameters import joined
from tests.hf.models import smollm2
from tests.hf.test_smollm2 import golden, torch_logits

VARIANTS = {"LoRA": {}, "rsLoRA": {"use_rslora": True}, "DoRA": {"use_dora": True}}


@pytest.fixture(scope="module")
def model() -> Pretrained:
    return load_model(smollm2())


@pytest.fixture(scope="module")
def theirs() -> Any:
    torch = pytest.importorskip("torch", reason="torch is the oracle here: pip install 'jax-sft[oracle]'")
    pytest.importorskip("peft", reason="PEFT is the oracle here: pip install 'jax-sft[oracle]'")
    from transformers import AutoModelForCausalLM

    file = smollm2()
    return AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)


def write_back(out: pathlib.Path, model: Pretrained, adapter: Adapter) -> None:
    write_adapter(
        out,
        lora=adapter.lora,
        params=adapter.params,
        base_params=adapter.base_params,
        config=model.config,
        base_name=adapter.base_name,
        dtype=adapter.dtype,
        tokenizer=model.tokenizer,
        hf_config=model.hf_config,
        generation_config=model.generation_config,
        chat_template=model.chat_template,
        stop_ids=model.stop_ids,
        facts={},
        source_config=adapter.config,
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of PEFT and transformers about each other
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_real_model_with_an_adapter_says_what_it_says_in_peft(
    model: Pretrained, theirs: Any, variant: str, tmp_path: pathlib.Path
):
    import peft
    import torch

    config = peft.LoraConfig(
        r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM", **VARIANTS[variant]
    )
    adapted = peft.get_peft_model(theirs, config)
    torch.manual_seed(0)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
        elif "magnitude" in name:
            weight.data *= 1 + 0.1 * torch.rand_like(weight)
    adapted.save_pretrained(tmp_path)
    adapted.eval()
    tokens_T = np.asarray(golden()["prompt_tokens"])
    theirs_TV = torch_logits(adapted, tokens_T)
    base_TV = torch_logits(adapted.unload(), tokens_T)
    assert np.abs(theirs_TV - base_TV).max() > 0.05 * np.abs(base_TV).max()  # the adapter says something

    adapter = read_adapter(tmp_path, model.config)
    write_back(tmp_path / "ours", model, adapter)
    file = "adapter_model.safetensors"
    assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / file).read_bytes()
    again = peft.PeftModel.from_pretrained(adapted.unload(), tmp_path / "ours").eval()
    np.testing.assert_array_equal(torch_logits(again, tokens_T), theirs_TV)
    again.unload()
    graphdef = build(model.config, dtype="float32", attention="xla", lora=adapter.lora)
    decoder: Any = nnx.merge(graphdef, joined(model.params or {}, jax.tree.map(jax.numpy.asarray, adapter.params)))
    tokens_BT = tokens_T[None].astype(np.int32)
    positions_BT = np.arange(len(tokens_T), dtype=np.int32)[None]
    ours_TV = np.asarray(decoder.logits(decoder.hidden(tokens_BT, positions_BT, np.ones_like(tokens_BT)))[0])
    assert np.abs(ours_TV - theirs_TV).max() <= 1e-4 * np.abs(theirs_TV).max()
