"""No field of ModelConfig is decoration: turning any of them moves the logits or the parameter tree."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_sft.model.config import LinearRope, Llama3Rope, ModelConfig
from jax_sft.model.decoder import abstract_params, build
from tests.model.llama_cases import config_of, params_of, tokens_of

BASE = config_of("base")
LLAMA3 = Llama3Rope(factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_positions=32)
TURNS_TREE = {
    "vocab_size": 32,
    "width": 20,
    "mlp_width": 28,
    "num_layers": 3,
    "num_heads": 6,
    "num_kv_heads": 4,
    "head_width": 6,
    "qkv_bias": True,
    "output_bias": True,
    "mlp_bias": True,
    "tied_head": False,
}
TURNS_LOGITS = [
    ("norm_eps", 1e-2),
    ("rope_theta", 1e4),
    ("rope_scaling", LinearRope(factor=2.0)),
    ("rope_scaling", LLAMA3),
    ("activation", "gelu"),
    ("activation", "gelu_tanh"),
]
TURNS_NOTHING = {"max_positions"}  # only says how long prompts may be


def logits_of(config: ModelConfig) -> np.ndarray:
    tokens_BT = jnp.asarray(tokens_of(config))
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None, :], tokens_BT.shape)
    model = nnx.merge(build(config, dtype="float32", attention="xla"), jax.tree.map(jnp.asarray, params_of(config)))
    return np.asarray(model.logits(model.hidden(tokens_BT, positions_BT, jnp.ones_like(tokens_BT))))


def test_every_field_is_turned_below():
    turned = TURNS_TREE.keys() | {name for name, _ in TURNS_LOGITS} | TURNS_NOTHING
    assert turned == {field.name for field in dataclasses.fields(ModelConfig)}


@pytest.mark.parametrize("field", TURNS_TREE)
def test_field_moves_the_parameter_tree(field):
    turned = dataclasses.replace(BASE, **{field: TURNS_TREE[field]})
    assert abstract_params(turned) != abstract_params(BASE)


@pytest.mark.parametrize(("field", "value"), TURNS_LOGITS)
def test_field_moves_the_logits(field, value):
    turned = dataclasses.replace(BASE, **{field: value})
    assert abstract_params(turned) == abstract_params(BASE)
    assert np.abs(logits_of(turned) - logits_of(BASE)).max() > 1e-3


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Llama3Rope)])
def test_each_number_of_llama3_rope_moves_the_logits(field):
    turned = dataclasses.replace(LLAMA3, **{field: getattr(LLAMA3, field) * 2})
    wide = dataclasses.replace(BASE, head_width=12)  # six wavelengths: some in the ramp, some outside
    plain, changed = (logits_of(dataclasses.replace(wide, rope_scaling=scaling)) for scaling in (LLAMA3, turned))
    assert np.abs(plain - changed).max() > 1e-4
