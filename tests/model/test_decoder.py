"""The decoder: packing, causality, scan, remat, cache, bfloat16, and any mesh; each against a plainer way."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from jax_sft.config import MeshConfig
from jax_sft.model import attention as attention_module
from jax_sft.model.attention import KVCache
from jax_sft.model.decoder import Decoder, build
from jax_sft.model.layers import rope_angles
from jax_sft.sharding import BATCH_AXES, make_mesh, shard_params
from tests.model.llama_cases import config_of, params_of, tokens_of

REMATS = ("none", "dots", "full", "offload")
BACKENDS = ("xla", "chunked")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(attention_module, "CHUNK", 8)


def params_for(case: str):
    return jax.tree.map(jnp.asarray, params_of(config_of(case)))


def hidden(case, params, tokens_BT, *, positions_BT=None, segments_BT=None, backend="xla", remat="none"):
    tokens_BT = jnp.asarray(tokens_BT)
    if positions_BT is None:
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None, :], tokens_BT.shape)
    segments_BT = jnp.ones_like(tokens_BT) if segments_BT is None else segments_BT
    model = nnx.merge(build(config_of(case), dtype="float32", attention=backend), params)
    return model.hidden(tokens_BT, positions_BT, segments_BT, remat=remat)


def packed_and_apart():
    """Two sequences of 13 and 9 tokens in a row of 26, padding after them; and the same in two rows."""
    tokens_T = tokens_of(config_of("base"), rows=1, length=26)[0]
    segments_T = np.repeat([1, 2, 0], [13, 9, 4]).astype(np.int32)
    positions_T = np.concatenate([np.arange(13), np.arange(9), np.arange(4)]).astype(np.int32)
    packed = tuple(jnp.asarray(x)[None] for x in (tokens_T, positions_T, segments_T))
    return packed, (tokens_T[None, :13], tokens_T[None, 13:22])


def assert_trees_close(got, wanted, rtol):
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(wanted), strict=True):
        scale = np.abs(np.asarray(b)).max()
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * scale, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_equals_unpacked_in_hidden_states_and_gradient(backend):
    (tokens_BT, positions_BT, segments_BT), parts = packed_and_apart()
    params = params_for("base")

    def packed(params):
        return hidden("base", params, tokens_BT, positions_BT=positions_BT, segments_BT=segments_BT, backend=backend)[
            0, :22
        ]

    def unpacked(params):
        return jnp.concatenate([hidden("base", params, part, backend="xla")[0] for part in parts])

    def loss(f, params):
        return jnp.sin(f(params)).sum()

    np.testing.assert_allclose(jax.jit(packed)(params), jax.jit(unpacked)(params), atol=2e-5)
    grads = [jax.jit(jax.grad(functools.partial(loss, f)))(params) for f in (packed, unpacked)]
    assert_trees_close(*grads, rtol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_position_sees_a_later_one_or_another_segment(backend):
    (tokens_BT, positions_BT, segments_BT), _ = packed_and_apart()
    params = params_for("base")
    for chosen in (5, 17):  # in the first and in the second segment
        # One row of the embedding for each position, so that the gradient says which positions were seen.
        own = {**params, "embed_VD": params["embed_VD"][tokens_BT[0]]}

        def state(embed_VD, own=own, chosen=chosen):
            places_BT = jnp.arange(26, dtype=jnp.int32)[None, :]
            h_BTD = hidden(
                "base",
                {**own, "embed_VD": embed_VD},
                places_BT,
                positions_BT=positions_BT,
                segments_BT=segments_BT,
                backend=backend,
            )
            return jnp.sin(h_BTD[0, chosen]).sum()

        seen_T = np.abs(np.asarray(jax.jit(jax.grad(state))(own["embed_VD"]))).max(axis=1) > 0
        start = 0 if chosen < 13 else 13
        np.testing.assert_array_equal(seen_T, (np.arange(26) >= start) & (np.arange(26) <= chosen))


def test_what_padding_holds_changes_nothing_and_is_finite():
    (tokens_BT, positions_BT, segments_BT), _ = packed_and_apart()
    params = params_for("base")
    outs = [
        hidden("base", params, tokens_BT.at[0, 22:].set(filler), positions_BT=positions_BT, segments_BT=segments_BT)
        for filler in (0, 30)
    ]
    np.testing.assert_array_equal(outs[0][0, :22], outs[1][0, :22])
    assert all(bool(jnp.isfinite(out).all()) for out in outs)


@pytest.mark.parametrize("case", ["base", "attention_bias"])
def test_scan_equals_a_python_loop_over_layers(case):
    config, params = config_of(case), params_for(case)
    tokens_BT = jnp.asarray(tokens_of(config))

    def looped(params):
        state = tokens_BT
        for layer in range(config.num_layers):
            one = {**params, "blocks": jax.tree.map(lambda w, i=layer: w[i : i + 1], params["blocks"])}
            model = nnx.merge(build(config, dtype="float32", attention="xla"), one)
            positions_BT = jnp.broadcast_to(jnp.arange(24, dtype=jnp.int32)[None, :], tokens_BT.shape)
            weights = {name: stacked[0] for name, stacked in model._layers().items()}
            x_BTD = model._embed(state) if layer == 0 else state
            angles = rope_angles(positions_BT, None, config.ropes[layer])
            state = model._block(x_BTD, weights, angles, jnp.ones_like(tokens_BT))[0]
        exact = state * jax.lax.rsqrt(jnp.square(state).mean(-1, keepdims=True) + config.norm_eps)
        return exact * params["final_norm_D"][None, None]

    np.testing.assert_allclose(
        jax.jit(functools.partial(hidden, case, tokens_BT=tokens_BT))(params), jax.jit(looped)(params), atol=1e-5
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_remat_policy_gives_the_same_gradient(backend):
    params = params_for("attention_bias")
    tokens_BT = tokens_of(config_of("base"))

    def gradient(remat):
        return jax.jit(
            jax.grad(lambda p: jnp.sin(hidden("attention_bias", p, tokens_BT, backend=backend, remat=remat)).sum())
        )(params)

    wanted = gradient("none")
    for remat in REMATS[1:]:
        assert_trees_close(gradient(remat), wanted, rtol=1e-5)


def test_each_remat_policy_stores_what_it_says():
    params = params_for("base")
    tokens_BT = tokens_of(config_of("base"))

    def residuals(remat):
        printed = jax.make_jaxpr(lambda p: jax.vjp(lambda p: hidden("base", p, tokens_BT, remat=remat), p)[1])(params)
        return sum(np.prod(v.aval.shape) for v in printed.jaxpr.outvars if len(v.aval.shape) > 2)

    stored = {remat: residuals(remat) for remat in REMATS}
    assert stored["none"] > stored["dots"] > stored["full"]
    for remat in ("full", "offload"):
        program = jax.make_jaxpr(jax.grad(lambda p, r=remat: hidden("base", p, tokens_BT, remat=r).sum()))(params)
        assert ("host" in str(program)) == (remat == "offload")


def test_unknown_remat_is_refused():
    with pytest.raises(ValueError, match="train.remat = 'some' is not a policy; choose none, dots, full or offload"):
        hidden("base", params_for("base"), tokens_of(config_of("base")), remat="some")


def test_unknown_attention_is_refused_when_the_model_is_built():
    with pytest.raises(ValueError, match="model.attention = 'flash' is no backend"):
        build(config_of("base"), dtype="float32", attention="flash")


def test_graphdefs_of_one_config_are_equal_and_frozen_weights_merge():
    config = config_of("untied")
    graphdefs = [build(config, dtype="float32", attention="auto") for _ in range(2)]
    assert graphdefs[0] == graphdefs[1]
    assert hash(graphdefs[0]) == hash(graphdefs[1])
    assert graphdefs[0] != build(config, dtype="bfloat16", attention="auto")
    params = params_for("untied")
    trained = {"blocks": {"q_LDNH": params["blocks"]["q_LDNH"]}}
    rest = {name: w for name, w in params["blocks"].items() if name != "q_LDNH"}
    frozen = {**{name: w for name, w in params.items() if name != "blocks"}, "blocks": rest}
    model = nnx.merge(graphdefs[0], trained, frozen)
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, nnx.to_pure_dict(nnx.state(model)), params))
    whole = nnx.merge(graphdefs[0], params, {})
    assert whole.head() is params["head_VD"]


def test_a_token_outside_the_vocabulary_is_nan_and_no_wrong_answer():
    assert bool(jnp.isnan(hidden("base", params_for("base"), np.array([[1, 31]], np.int32))[0, 1]).all())


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_weights_of_any_dtype_compute_in_the_given_one(stored):
    config = config_of("attention_bias")
    params = jax.tree.map(lambda w: jnp.asarray(w, stored), params_of(config))
    model = nnx.merge(build(config, dtype="bfloat16", attention="auto"), params)
    tokens_BT = jnp.asarray(tokens_of(config))
    h_BTD = model.hidden(tokens_BT, jnp.zeros_like(tokens_BT), jnp.ones_like(tokens_BT))
    assert h_BTD.dtype == jnp.bfloat16
    assert model.logits(h_BTD).dtype == jnp.float32


def uncached_logits(case, params, tokens_T) -> np.ndarray:
    model = nnx.merge(build(config_of(case), dtype="float32", attention="xla"), params)
    return np.asarray(model.logits(hidden(case, params, np.asarray(tokens_T)[None]))[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["base", "attention_bias", "llama3_rope", "one_kv_head"])
def test_cached_decode_equals_uncached_with_prompts_of_different_lengths(case, backend):
    config, params = config_of(case), params_for(case)
    lengths, steps = [11, 1, 6], 4
    tokens = tokens_of(config, rows=3, length=11 + steps)
    padded = np.full((3, 13), 7, np.int32)
    for row, length in enumerate(lengths):
        padded[row, :length] = tokens[row, :length]
    graphdef = build(config, dtype="float32", attention=backend)
    prefill = jax.jit(lambda p, t, n: nnx.merge(graphdef, p).prefill(t, n, slots=16))
    decode = jax.jit(lambda p, t, c: nnx.merge(graphdef, p).decode(t, c), donate_argnums=2)

    wanted = [uncached_logits(case, params, tokens[row]) for row in range(3)]
    logits_BV, cache = prefill(params, padded, np.array(lengths, np.int32))
    for step in range(steps + 1):
        for row, length in enumerate(lengths):
            np.testing.assert_allclose(logits_BV[row], wanted[row][length - 1 + step], atol=3e-5)
        np.testing.assert_array_equal(cache.length_B, np.array(lengths) + step)
        if step < steps:
            next_B = np.array([tokens[row, length + step] for row, length in enumerate(lengths)], np.int32)
            logits_BV, cache = decode(params, next_B, cache)


def test_one_row_decodes_as_in_a_batch():
    config, params = config_of("untied"), params_for("untied")
    model = nnx.merge(build(config, dtype="float32", attention="auto"), params)
    tokens_BT = jnp.asarray(tokens_of(config, rows=2, length=5))
    both, _ = model.prefill(tokens_BT, jnp.array([5, 5], jnp.int32), slots=8)
    one, cache = model.prefill(tokens_BT[:1], jnp.array([5], jnp.int32), slots=8)
    np.testing.assert_allclose(one, both[:1], atol=1e-5)
    assert cache.k_LBSKH.shape == (2, 1, 8, 2, 4)


def test_a_full_row_keeps_its_cache():
    config, params = config_of("base"), params_for("base")
    model: Decoder = nnx.merge(build(config, dtype="float32", attention="auto"), params)
    _, cache = model.prefill(jnp.asarray(tokens_of(config, rows=2, length=6)), jnp.array([6, 3], jnp.int32), slots=6)
    _, longer = model.decode(jnp.array([1, 2], jnp.int32), cache)
    np.testing.assert_array_equal(longer.k_LBSKH[:, 0], cache.k_LBSKH[:, 0])
    assert bool((longer.k_LBSKH[:, 1, 3] != cache.k_LBSKH[:, 1, 3]).all())
    np.testing.assert_array_equal(longer.k_LBSKH[:, 1, :3], cache.k_LBSKH[:, 1, :3])


MESHES = [
    MeshConfig(data=8, fsdp=1),
    MeshConfig(fsdp=8),
    MeshConfig(fsdp=1, tensor=8),
    MeshConfig(data=2, fsdp=2, tensor=2),
]


@pytest.mark.parametrize("mesh_config", MESHES, ids=lambda m: f"{m.data}x{m.fsdp}x{m.tensor}")
@pytest.mark.parametrize("backend", BACKENDS)
def test_sharded_equals_unsharded(mesh_config, backend):
    params = params_for("untied")
    tokens_BT = tokens_of(config_of("base"), rows=8)

    def loss(params, tokens_BT):
        h_BTD = hidden("untied", params, tokens_BT, backend=backend, remat="dots")
        model = nnx.merge(build(config_of("untied"), dtype="float32", attention=backend), params)
        return jnp.sin(model.logits(h_BTD)).sum()

    wanted = jax.jit(jax.value_and_grad(loss))(params, tokens_BT)
    mesh = make_mesh(mesh_config)
    shardings = shard_params(params, mesh)
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, jax.P(BATCH_AXES))
        step = jax.jit(jax.value_and_grad(loss), out_shardings=(None, shardings))
        got = step(jax.device_put(params, shardings), jax.device_put(tokens_BT, rows))
    assert got[1]["blocks"]["gate_LDF"].sharding.is_equivalent_to(shardings["blocks"]["gate_LDF"], 3)
    assert_trees_close(got, wanted, rtol=3e-5)


@pytest.mark.parametrize("mesh_config", MESHES[1:], ids=lambda m: f"{m.data}x{m.fsdp}x{m.tensor}")
def test_sharded_cache_equals_unsharded(mesh_config):
    config, params = config_of("untied"), params_for("untied")
    tokens_BT = tokens_of(config, rows=4, length=6)
    graphdef = build(config, dtype="float32", attention="auto")

    @jax.jit
    def two_tokens(params) -> tuple[jax.Array, KVCache]:
        model = nnx.merge(graphdef, params)
        _, cache = model.prefill(jnp.asarray(tokens_BT), jnp.array([6, 2, 4, 1], jnp.int32), slots=8)
        _, cache = model.decode(jnp.array([1, 2, 3, 4], jnp.int32), cache)
        return model.decode(jnp.array([5, 6, 7, 8], jnp.int32), cache)

    wanted = two_tokens(params)
    mesh = make_mesh(mesh_config)
    with jax.set_mesh(mesh):
        got = two_tokens(jax.device_put(params, shard_params(params, mesh)))
    assert_trees_close(got, wanted, rtol=1e-5)
