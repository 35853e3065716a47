"""No field of ModelConfig is decoration: turning any of them moves the logits or the parameter tree."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_sft.model.config import DynamicRope, LinearRope, Llama3Rope, LongRope, ModelConfig, Rope, YarnRope
from jax_sft.model.decoder import abstract_params, build
from jax_sft.model.layers import rms_norm
from tests.model.llama_cases import config_of, params_of, tokens_of

BASE = config_of("base")  # 2 layers, 4 heads of width 4, texts of 24 tokens
LLAMA3 = Llama3Rope(factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_positions=32)
YARN = YarnRope(factor=4.0, magnitude=1.2, fast_turns=4.0, slow_turns=0.5, original_positions=200, whole_bounds=False)
LONG = LongRope(
    short_factors=(1.0, 1.1, 1.2, 1.3, 1.4, 1.5),
    long_factors=(2.0, 2.1, 2.2, 2.3, 2.4, 2.5),
    magnitude=1.1,
    original_positions=20,
)
MIXED = dataclasses.replace(BASE, num_experts=4, experts_per_token=2, tied_head=False)
TURNS_TREE = {
    "vocab_rows": BASE.vocab_size + 32,
    "width": 20,
    "mlp_width": 28,
    "num_heads": 6,
    "num_kv_heads": 4,
    "head_width": 6,
    "attention_sinks": True,
    "norm": "layer",
    "pre_norms": False,
    "post_norms": True,
    "qk_norm": "head",
    "gated_mlp": False,
    "qkv_bias": True,
    "output_bias": True,
    "mlp_bias": True,
    "tied_head": False,
}
TURNS_LOGITS = [
    ("windows", (5, 5)),
    ("windows", (None, 5)),
    ("windows", (5, None)),
    ("ropes", (None, None)),
    ("ropes", (BASE.ropes[0], None)),
    ("ropes", (None, BASE.ropes[0])),
    ("norm_eps", 1e-2),
    ("norm_offset", True),
    ("query_scale", 1.0),
    ("score_cap", 0.5),
    ("logit_cap", 0.5),
    ("embed_scale", 2.0),
    ("residual_scale", 0.5),
    ("logit_scale", 0.5),
    ("activation", "gelu"),
    ("activation", "gelu_tanh"),
    ("silu_slope", 1.702),
    ("gate_limit", 0.3),
    ("up_offset", 1.0),
]
TURNS_EXPERTS = [
    *(("num_experts", 5), ("experts_per_token", 1), ("router_normalised", True), ("router_bias", True)),
    *(("mlp_bias", True), ("activation", "gelu"), ("silu_slope", 1.702), ("gate_limit", 0.3), ("up_offset", 1.0)),
]
# How long prompts may be, what files look like, and four that have tests of their own.
TURNS_ELSEWHERE = {"max_positions", "model_type", "norm_in_float32", "num_layers", "router_aux_weight", "vocab_size"}


def logits_of(config: ModelConfig) -> np.ndarray:
    tokens_BT = jnp.asarray(tokens_of(config))
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None, :], tokens_BT.shape)
    model = nnx.merge(build(config, dtype="float32", attention="xla"), jax.tree.map(jnp.asarray, params_of(config)))
    return np.asarray(model.logits(model.hidden(tokens_BT, positions_BT, jnp.ones_like(tokens_BT))))


def test_every_field_is_turned_below():
    turned = TURNS_TREE.keys() | {name for name, _ in TURNS_LOGITS + TURNS_EXPERTS} | TURNS_ELSEWHERE
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


@pytest.mark.parametrize(("field", "value"), TURNS_EXPERTS)
def test_field_of_experts_moves_the_tree_or_the_logits(field, value):
    turned = dataclasses.replace(MIXED, **{field: value})
    if abstract_params(turned) == abstract_params(MIXED):
        assert np.abs(logits_of(turned) - logits_of(MIXED)).max() > 1e-3
    else:
        assert field in ("num_experts", "router_bias", "mlp_bias")


def test_padding_has_no_logits_and_no_embedding():
    padded = dataclasses.replace(BASE, vocab_rows=BASE.vocab_size + 8, tied_head=False)
    params = jax.tree.map(jnp.asarray, params_of(padded))  # what lies in the rows of padding is random
    alone = dataclasses.replace(padded, vocab_rows=BASE.vocab_size)
    cut = params | {name: params[name][: BASE.vocab_size] for name in ("embed_VD", "head_VD")}
    tokens_BT = jnp.asarray([[1, 2, BASE.vocab_size - 1], [1, 2, BASE.vocab_size]])
    one_BT, positions_BT = jnp.ones_like(tokens_BT), jnp.asarray([[0, 1, 2]] * 2)
    found = []
    for config, weights in ((padded, params), (alone, cut)):
        model = nnx.merge(build(config, dtype="float32", attention="xla"), weights)
        found.append(np.asarray(model.logits(model.hidden(tokens_BT, positions_BT, one_BT))))
    np.testing.assert_allclose(*found, atol=1e-6)  # a product of another width may add up in another order
    assert found[0].shape[-1] == BASE.vocab_size
    assert np.isfinite(found[0][0]).all() and np.isnan(found[0][1, 2]).all()


def test_fewer_rows_than_tokens_are_refused():
    with pytest.raises(ValueError, match="vocab_rows = 3 must be at least vocab_size"):
        dataclasses.replace(BASE, vocab_rows=3)


def test_every_layer_is_a_layer():
    more = dataclasses.replace(BASE, num_layers=3, windows=(None,) * 3, ropes=(BASE.ropes[0],) * 3)
    assert abstract_params(more) != abstract_params(BASE)


def test_a_norm_that_is_scaled_in_float32_rounds_once():
    x_BTD = jnp.asarray(np.random.RandomState(0).standard_normal((1, 9, 64)), jnp.bfloat16)
    scale_D = jnp.asarray(1 + 0.1 * np.random.RandomState(1).standard_normal(64), jnp.float32)
    once, twice = (rms_norm(x_BTD, scale_D, 1e-6, in_float32=is_once) for is_once in (True, False))
    exact = rms_norm(x_BTD.astype(jnp.float32), scale_D, 1e-6)
    assert once.dtype == twice.dtype == jnp.bfloat16
    assert np.abs(once.astype(np.float32) - exact).sum() < np.abs(twice.astype(np.float32) - exact).sum()


def rotated(rope: Rope) -> np.ndarray:
    """Logits of wide heads, of which twelve components make six wavelengths: some in a ramp, some outside."""
    return logits_of(dataclasses.replace(BASE, head_width=14, ropes=(rope,) * 2))


WIDE = Rope(theta=100.0, width=12, interleaved=False, scaling=None)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("theta", 1e4),
        ("width", 14),
        ("interleaved", True),
        ("scaling", LinearRope(factor=2.0)),
        ("scaling", DynamicRope(factor=2.0, original_positions=16)),
        ("scaling", LLAMA3),
        ("scaling", YARN),
        ("scaling", LONG),
    ],
)
def test_each_field_of_a_rope_moves_the_logits(field, value):
    assert np.abs(rotated(dataclasses.replace(WIDE, **{field: value})) - rotated(WIDE)).max() > 1e-3


@pytest.mark.parametrize(
    ("scaling", "field", "value"),
    [
        (LinearRope(factor=2.0), "factor", 3.0),
        (DynamicRope(factor=2.0, original_positions=16), "factor", 3.0),
        (DynamicRope(factor=2.0, original_positions=16), "original_positions", 20),
        *((LLAMA3, f.name, 2 * getattr(LLAMA3, f.name)) for f in dataclasses.fields(Llama3Rope)),
        *((YARN, f.name, 2 * getattr(YARN, f.name)) for f in dataclasses.fields(YarnRope) if f.name != "whole_bounds"),
        (YARN, "whole_bounds", True),
        (LONG, "long_factors", LONG.short_factors),
        (LONG, "original_positions", 24),
        (dataclasses.replace(LONG, original_positions=24), "short_factors", LONG.long_factors),
        (LONG, "magnitude", 1.2),
    ],
)
def test_each_number_of_a_rope_scaling_moves_the_logits(scaling, field, value):
    turned = dataclasses.replace(WIDE, scaling=dataclasses.replace(scaling, **{field: value}))
    plain = dataclasses.replace(WIDE, scaling=scaling)
    assert np.abs(rotated(plain) - rotated(turned)).max() > 1e-4
