"""Logits equal transformers' LlamaForCausalLM; a recorded file stands in where torch is not installed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_sft.model.decoder import build
from jax_sft.model.families import read_model_config
from jax_sft.model.layers import rope_frequencies
from tests.model import llama_cases


def our_logits(case: str, backend: str = "xla", dtype: str = "float32") -> np.ndarray:
    config = llama_cases.config_of(case)
    graphdef = build(config, dtype=dtype, attention=backend)
    tokens_BT = jnp.asarray(llama_cases.tokens_of(config))
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None, :], tokens_BT.shape)

    @jax.jit
    def logits(params):
        model = nnx.merge(graphdef, params)
        return model.logits(model.hidden(tokens_BT, positions_BT, jnp.ones_like(tokens_BT)))

    return np.asarray(logits(llama_cases.params_of(config)))


@pytest.mark.parametrize("case", llama_cases.CASES)
def test_logits_equal_transformers_in_float32(case):
    wanted = np.load(llama_cases.GOLDEN)[case]
    np.testing.assert_allclose(our_logits(case), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("case", llama_cases.CASES)
def test_recorded_logits_are_those_of_transformers(case):
    pytest.importorskip("torch")
    wanted = llama_cases.transformers_logits(case)
    np.testing.assert_allclose(np.load(llama_cases.GOLDEN)[case], wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())


@pytest.mark.parametrize("case", llama_cases.CASES)
def test_every_case_has_other_logits(case):
    golden = np.load(llama_cases.GOLDEN)
    assert set(golden) == set(llama_cases.CASES)
    for other in golden:
        assert other == case or np.abs(golden[other] - golden[case]).max() > 1e-3


def test_logits_in_bfloat16_are_near():
    wanted = np.load(llama_cases.GOLDEN)["base"]
    got = our_logits("base", dtype="bfloat16")
    assert got.dtype == np.float32
    assert np.sqrt(np.mean((got - wanted) ** 2)) < 0.02 * np.sqrt(np.mean(wanted**2))


@pytest.mark.parametrize("head_width", [4, 10, 64, 80, 128])
@pytest.mark.parametrize("case", ["theta", "linear_rope", "llama3_rope"])
def test_rope_frequencies_equal_transformers_to_one_rounding(case, head_width):
    pytest.importorskip("torch")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    hf = llama_cases.hf_config(case) | {"head_dim": head_width}
    wanted = LlamaRotaryEmbedding(LlamaConfig(**{k: v for k, v in hf.items() if k != "model_type"})).inv_freq.numpy()
    rope = read_model_config(hf).ropes[0]
    assert rope is not None
    got = rope_frequencies(rope)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, wanted, rtol=2.5e-7)
    assert np.mean(got == wanted) > 0.9
