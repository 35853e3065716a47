"""Experts: every token goes through its own, on every mesh; the router's loss is transformers', in training only."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jax_sft.batch import Batch
from jax_sft.config import LoraConfig, MeshConfig, OptimConfig
from jax_sft.hf.targets import adaptation
from jax_sft.model.config import ModelConfig
from jax_sft.model.decoder import abstract_params, build
from jax_sft.model.experts import Biases, Routing, apply_experts, route
from jax_sft.model.families import read_model_config
from jax_sft.model.layers import Gating
from jax_sft.model.lora import letters
from jax_sft.model.quantize import Quantized, dense, quantize
from jax_sft.optim import optimizer
from jax_sft.sharding import local_rows, make_mesh, put_batch, shard_params
from jax_sft.train_step import init_state, make_eval_step, make_train_step, state_shardings
from tests.adapted import random_factors
from tests.hf.family_cases import config_of, hf_config, params_of, tokens_of

B, T, D, F, E, J = 3, 5, 6, 8, 4, 2
PLAIN = Gating(activation="silu", silu_slope=1.0, limit=None, up_offset=0.0)
TURNED = Gating(activation="silu", silu_slope=1.702, limit=1.5, up_offset=1.0)
MESHES = [(1, 1, 1), (8, 1, 1), (2, 2, 2), (1, 4, 2), (1, 1, 8), (1, 1, 1, 4), (2, 1, 2, 2), (1, 1, 1, 8)]


def mesh_of(data=1, fsdp=1, tensor=1, expert=1):
    """Of the last mesh the four experts do not divide over the expert axis: it is one more batch axis then."""
    config = MeshConfig(data=data, fsdp=fsdp, tensor=tensor, expert=expert)
    return make_mesh(config, jax.devices()[: data * fsdp * tensor * expert])


def weights_of(rows=B):
    random = np.random.RandomState(0)
    shapes = [(rows, T, D), (D, E), (E, D, F), (E, D, F), (E, F, D)]
    return [random.standard_normal(shape).astype(np.float32) for shape in shapes]


def biases_of() -> Biases:
    random = np.random.RandomState(1)
    return Biases(*(random.standard_normal(shape).astype(np.float32) for shape in [(E, F), (E, F), (E, D)]))


def every_expert_on_every_token(x_BTD, routing: Routing, gate_EDF, up_EDF, down_EFD, biases: Biases):
    """Dense, and as gpt-oss writes its gate."""
    gate_BTEF = jnp.einsum("BTD,EDF->BTEF", x_BTD, gate_EDF) + biases.gate_EF[None, None]
    up_BTEF = jnp.einsum("BTD,EDF->BTEF", x_BTD, up_EDF) + biases.up_EF[None, None]
    gate_BTEF, up_BTEF = gate_BTEF.clip(None, 1.5), up_BTEF.clip(-1.5, 1.5)
    inner_BTEF = (up_BTEF + 1) * gate_BTEF * jax.nn.sigmoid(1.702 * gate_BTEF)
    out_BTED = jnp.einsum("BTEF,EFD->BTED", inner_BTEF, down_EFD) + biases.down_ED[None, None]
    weights_BTE = (jax.nn.one_hot(routing.experts_BTJ, E) * routing.weights_BTJ[..., None]).sum(axis=2)
    return jnp.einsum("BTED,BTE->BTD", out_BTED, weights_BTE)


def one_token_at_a_time(x_BTD, routing: Routing, gate_EDF, up_EDF, down_EFD):
    out_BTD = np.zeros_like(x_BTD)
    for b, t, j in np.ndindex(*routing.experts_BTJ.shape):
        e = int(routing.experts_BTJ[b, t, j])
        gate_F, up_F = x_BTD[b, t] @ gate_EDF[e], x_BTD[b, t] @ up_EDF[e]
        inner_F = gate_F / (1 + np.exp(-gate_F)) * up_F
        out_BTD[b, t] += float(routing.weights_BTJ[b, t, j]) * (inner_F @ down_EFD[e])
    return out_BTD


@pytest.mark.parametrize("crowd", [0.0, 100.0])
@pytest.mark.parametrize("normalised", [False, True])
def test_every_token_goes_through_its_experts_however_crowded(crowd, normalised):
    x_BTD, router_DE, *experts = weights_of()
    x_BTD[..., 0], router_DE[0] = 1.0, [crowd, crowd, 0, 0]  # all tokens to the first two experts, none to the others
    routing = route(jnp.asarray(x_BTD), router_DE, None, experts_per_token=J, normalised=normalised)
    if crowd:
        assert set(np.unique(routing.experts_BTJ)) == {0, 1}
    if normalised:
        np.testing.assert_allclose(routing.weights_BTJ.sum(-1), 1.0, rtol=1e-6)
    got = apply_experts(jnp.asarray(x_BTD), routing, *experts, None, gating=PLAIN)
    np.testing.assert_allclose(got, one_token_at_a_time(x_BTD, routing, *experts), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("rows", [8, 3])
def test_experts_and_their_gradients_are_the_same_on_every_mesh(sizes, rows):
    """Three rows do not divide over the devices: then each computes them all."""

    @jax.jit
    def out_and_gradients(arguments):
        def summed(arguments):
            x_BTD, router_DE, *experts = arguments
            routing = route(x_BTD, router_DE, None, experts_per_token=J, normalised=True)
            out_BTD = apply_experts(x_BTD, routing, *experts, None, gating=PLAIN)
            return (out_BTD**3).sum(), out_BTD

        return jax.grad(summed, has_aux=True)(arguments)

    arguments = weights_of(rows)
    wanted = out_and_gradients(arguments)
    with jax.set_mesh(mesh_of(*sizes)):
        got = out_and_gradients(arguments)
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())


@pytest.mark.parametrize(
    ("sizes", "rows"),
    [((1, 1, 1), 3), ((2, 2, 2), 8), ((1, 1, 8), 3), ((2, 1, 2, 2), 8), ((1, 1, 1, 4), 3)],
)
def test_biases_of_router_and_experts_equal_a_dense_sum_and_so_do_all_gradients(sizes, rows):
    def out_and_gradients(apply):
        def summed(arguments):
            (x_BTD, router_DE, *experts), biases, bias_E = arguments
            routing = route(x_BTD, router_DE, bias_E, experts_per_token=J, normalised=True)
            out_BTD = apply(x_BTD, routing, *experts, biases)
            return (out_BTD**2).sum(), (out_BTD, routing.experts_BTJ)

        bias_E = np.array([2.0, -1.0, 0.5, 0.0], np.float32)
        return jax.jit(jax.grad(summed, has_aux=True))((weights_of(rows), biases_of(), bias_E))

    wanted = out_and_gradients(every_expert_on_every_token)
    with jax.set_mesh(mesh_of(*sizes)):
        got = out_and_gradients(functools.partial(apply_experts, gating=TURNED))
    assert len(jax.tree.leaves(got)) == 11
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())


def test_a_bias_of_the_router_moves_the_choice():
    x_BTD, router_DE, *_ = weights_of()
    bias_E = jnp.array([0.0, 100.0, 0.0, 0.0])
    routing = route(jnp.asarray(x_BTD), router_DE, bias_E, experts_per_token=J, normalised=False)
    assert (routing.experts_BTJ[..., 0] == 1).all()
    np.testing.assert_allclose(routing.shares_BTE[..., 1], 1.0)


def test_each_device_multiplies_its_own_rows_alone():
    arguments = [jnp.asarray(x) for x in weights_of(8)]

    def apply(x_BTD, router_DE, *experts):
        routing = route(x_BTD, router_DE, None, experts_per_token=J, normalised=True)
        return apply_experts(x_BTD, routing, *experts, biases_of(), gating=PLAIN)

    with jax.set_mesh(mesh_of(2, 2, 2)):
        text = str(jax.make_jaxpr(apply)(*arguments))
    assert re.search(rf"f32\[{2 * T * J},{F // 2}\][^=]*= ragged_dot_general", text)
    assert f"f32[{8 * T * J}," not in text


def test_a_device_holds_and_multiplies_its_own_experts_for_the_rows_of_its_neighbours():
    arguments = [jnp.asarray(x) for x in weights_of(8)]

    def apply(x_BTD, router_DE, *experts):
        routing = route(x_BTD, router_DE, None, experts_per_token=J, normalised=True)
        return apply_experts(x_BTD, routing, *experts, biases_of(), gating=PLAIN)

    mesh = mesh_of(2, 1, 1, 4)
    with jax.set_mesh(mesh):
        text = str(jax.make_jaxpr(apply)(*arguments))
    assert re.search(rf"f32\[{4 * T * J},{F}\][^=]*= ragged_dot_general", text)  # the four rows along the axis
    shapes = abstract_params(dataclasses.replace(BALANCED, num_experts=4))["blocks"]
    placed = shard_params(shapes, mesh)["up_LEDF"]
    assert placed.shard_shape(shapes["up_LEDF"].shape)[1] == 1


def batch_of(config: ModelConfig, rows=8, length=12) -> Batch:
    """Rows of two texts and padding; the weights of rows differ."""
    random = np.random.RandomState(3)
    tokens_BT = random.randint(1, config.vocab_size, (rows, length + 1)).astype(np.int32)
    ends_B = random.randint(4, length, rows)
    place_T = np.arange(length)
    segments_BT = np.where(place_T < 3, 1, np.where(place_T < ends_B[:, None], 2, 0)).astype(np.int32)
    weights_BT = (segments_BT > 0) * random.choice([0.0, 0.5, 2.0], (rows, length))
    return Batch(
        tokens_BT=tokens_BT[:, :-1],
        targets_BT=tokens_BT[:, 1:],
        weights_BT=weights_BT.astype(np.float32),
        segments_BT=segments_BT,
        positions_BT=np.where(place_T < 3, place_T, place_T - 3).astype(np.int32)[None].repeat(rows, 0),
        sources_BT=np.zeros_like(segments_BT),
        predict_BP=np.where(weights_BT > 0, place_T, length).astype(np.int32),
    )


BALANCED = dataclasses.replace(config_of("mixtral"), router_aux_weight=0.3)


@functools.cache
def gradient_of(config: ModelConfig, sizes=(1, 1, 1), accumulation=1, remat="none"):
    """The gradient that a train step takes, as the difference that a plain descent with rate 1 makes; its Tally."""
    mesh = mesh_of(*sizes)
    sgd = optax.sgd(1.0)
    tx = optax.GradientTransformationExtraArgs(sgd.init, lambda g, s, p=None, **_: sgd.update(g, s, p))
    graphdef = build(config, dtype="float32", attention="xla")
    params = params_of(config)
    step = make_train_step(
        graphdef,
        tx,
        num_sources=1,
        remat=remat,
        loss_chunk_tokens=16,
        mesh=mesh,
        state_shardings=state_shardings(abstract_params(config), tx, mesh),
    )
    rows = local_rows(mesh, batch_size=8, accumulation=accumulation)
    batch = put_batch(batch_of(config), mesh, rows=rows, batch_size=8, accumulation=accumulation)
    state, metrics = step(init_state(jax.tree.map(jnp.array, params), tx, mesh), {}, batch)
    assert metrics.finite
    return jax.tree.map(lambda old, new: old - np.asarray(new), params, state.params), jax.device_get(metrics.tally)


def assert_close(got, wanted, share=1e-4):
    for (path, mine), theirs in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(wanted), strict=True):
        error = np.abs(mine - theirs).max()
        assert error <= share * max(np.abs(theirs).max(), 1e-2), (jax.tree_util.keystr(path), error)


@pytest.mark.parametrize(
    ("sizes", "accumulation"),
    [((1, 1, 1), 4), ((8, 1, 1), 1), ((2, 2, 2), 2), ((1, 4, 2), 1), ((1, 1, 4), 1), ((1, 2, 2, 2), 1)],
)
def test_a_step_is_the_same_on_every_mesh_and_in_micro_batches(sizes, accumulation):
    wanted, tally = gradient_of(BALANCED)
    got, same = gradient_of(BALANCED, sizes, accumulation)
    assert_close(got, wanted)
    np.testing.assert_allclose(same.loss, tally.loss, rtol=1e-5)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_no_gradient(remat):
    assert_close(gradient_of(BALANCED, remat=remat)[0], gradient_of(BALANCED)[0])


def test_dots_keeps_the_products_of_experts_for_the_backward_pass():
    def ragged_dots(remat):
        def summed(params):
            model = nnx.merge(build(BALANCED, dtype="float32", attention="xla"), params)
            return model.hidden(*(jnp.ones((2, 8), jnp.int32),) * 3, remat=remat).sum()

        return str(jax.make_jaxpr(jax.grad(summed))(params_of(BALANCED))).count("ragged_dot_general[")

    assert ragged_dots("dots") == ragged_dots("none") < ragged_dots("full")


def test_the_routers_loss_is_added_to_the_gradient_and_not_to_the_tally():
    plain = dataclasses.replace(BALANCED, router_aux_weight=0.0)
    (with_it, tally), (without, same) = gradient_of(BALANCED), gradient_of(plain)
    assert tally.loss == same.loss and tally.weight == same.weight
    assert np.abs(with_it["blocks"]["router_LDE"] - without["blocks"]["router_LDE"]).max() > 1e-3


@pytest.mark.parametrize("case", ["mixtral", "gpt_oss"])
def test_the_routers_loss_and_its_gradient_are_those_of_transformers_row_by_row(case):
    """Texts of different lengths, padded: over all layers, and over tokens that are no padding."""
    torch = pytest.importorskip("torch")
    from tests.hf.family_cases import transformers_model

    config, lengths_B = config_of(case), [40, 23]
    tokens_BT = tokens_of(config).clip(1)
    segments_BT = (np.arange(tokens_BT.shape[1]) < np.array(lengths_B)[:, None]).astype(np.int32)
    positions_BT = np.arange(tokens_BT.shape[1], dtype=np.int32)[None].repeat(2, 0)
    model = transformers_model(case)
    wanted = 0.0
    for tokens_T, mask_T, length in zip(tokens_BT, segments_BT, lengths_B, strict=True):
        row, mask = torch.from_numpy(tokens_T).long()[None], torch.from_numpy(mask_T).long()[None]
        wanted = wanted + length * model(row, attention_mask=mask, output_router_logits=True).aux_loss
    wanted.backward()

    def summed(params):
        decoder = nnx.merge(build(config, dtype="float32", attention="xla"), params)
        return decoder.hidden_and_imbalance(tokens_BT, positions_BT, segments_BT)[1]

    got, gradient = jax.jit(jax.value_and_grad(summed))(params_of(config))
    np.testing.assert_allclose(got, wanted.item(), rtol=1e-5)
    for mine_DE, layer in zip(gradient["blocks"]["router_LDE"], model.model.layers, strict=True):
        router = layer.mlp.router if case == "gpt_oss" else layer.mlp.gate
        theirs_DE = router.weight.grad.numpy().T
        np.testing.assert_allclose(mine_DE, theirs_DE, rtol=0, atol=1e-4 * np.abs(theirs_DE).max())


def test_an_evaluation_knows_nothing_of_the_routers_loss():
    plain = dataclasses.replace(BALANCED, router_aux_weight=0.0)
    mesh, params = mesh_of(), params_of(BALANCED)
    tallies = [
        make_eval_step(build(c, dtype="float32", attention="xla"), num_sources=1, loss_chunk_tokens=16, mesh=mesh)(
            params, {}, batch_of(c)
        )
        for c in (BALANCED, plain)
    ]
    np.testing.assert_array_equal(tallies[0].loss, tallies[1].loss)


@pytest.mark.parametrize(("asks", "coefficient", "weight"), [(True, 0.02, 0.02), (False, 0.02, 0.0), (True, 0.0, 0.0)])
def test_the_routers_loss_is_there_where_the_config_asks_for_it(asks, coefficient, weight):
    said = hf_config("mixtral") | {"output_router_logits": asks, "router_aux_loss_coef": coefficient}
    assert read_model_config(said).router_aux_weight == weight


def test_flops_count_the_experts_that_a_token_uses_and_parameters_all():
    config = config_of("mixtral")  # 6 experts, 2 a token
    dense = dataclasses.replace(config, num_experts=0, experts_per_token=0)
    mlp, router = 3 * config.width * config.mlp_width, config.width * 6
    flops = [c.train_flops([10, 3], predicted_tokens=4) for c in (config, dense)]
    assert flops[0] - flops[1] == 6 * config.num_layers * 13 * (mlp + router)
    assert config.num_params - dense.num_params == config.num_layers * (5 * mlp + router)


def test_router_and_experts_decay_as_other_matrices_do():
    params = abstract_params(config_of("mixtral"))
    tx = optimizer(OptimConfig(lr=1.0, schedule="constant", warmup_steps=0, weight_decay=0.5), 10, params)
    ones = jax.tree.map(lambda p: jnp.ones(p.shape), params)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, ones), tx.init(ones), ones, step=jnp.int32(0))
    for name in ("router_LDE", "gate_LEDF", "up_LEDF", "down_LEFD", "q_LDNH"):
        np.testing.assert_allclose(updates["blocks"][name], -0.5)
    assert not updates["blocks"]["mlp_norm_LD"].any()


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (1, 2, 2, 2)], ids=str)
def test_adapters_beside_quantised_experts_have_the_gradient_they_have_beside_the_same_kernels_dense(sizes):
    """Though their backward pass finds no kernel stored; gpt-oss has biases too."""
    model, mesh = config_of("gpt_oss"), mesh_of(*sizes)
    lora = adaptation(LoraConfig(rank=3, targets=("experts", "q_proj")), model)
    factors, quantised = random_factors(lora, params_of(model), model), dict(params_of(model))
    quantised["blocks"] = dict(quantised["blocks"])
    for name in ("gate_LEDF", "up_LEDF", "down_LEFD"):
        of = functools.partial(quantize, letters=name.split("_")[-1], inputs=letters(name).inputs, kind="nf4")
        quantised["blocks"][name] = jax.jit(of)(quantised["blocks"][name])
    is_quantised = {"is_leaf": lambda x: isinstance(x, Quantized)}
    plain = jax.jit(lambda tree: jax.tree.map(lambda x: dense(x, jnp.float32), tree, **is_quantised))(quantised)
    graphdef = build(model, dtype="float32", attention="xla", lora=lora)
    tokens_BT = jnp.asarray(np.tile(tokens_of(model), (4, 1)))

    @jax.jit
    def gradient_of(factors, base):
        def total(factors):
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None], tokens_BT.shape)
            h_BTD = nnx.merge(graphdef, factors, base).hidden(tokens_BT, positions_BT, jnp.ones_like(tokens_BT))
            return jnp.tanh(h_BTD).sum()

        return jax.grad(total)(factors)

    with jax.set_mesh(mesh):
        wanted, found = (jax.device_get(gradient_of(factors, base)) for base in (plain, quantised))
    for path, gradient in jax.tree.leaves_with_path(wanted):
        own = found["lora"]["blocks"][path[-2].key][path[-1].key]
        np.testing.assert_allclose(own, gradient, atol=1e-5 * np.abs(gradient).max(), err_msg=str(path))
        assert np.abs(gradient).max() > 0.01, path


def test_experts_lie_on_the_mesh_by_their_letters():
    specs = shard_params(abstract_params(config_of("mixtral")), mesh_of(1, 4, 2))["blocks"]
    assert tuple(specs["gate_LEDF"].spec) == (None, "expert", "fsdp", "tensor")
    assert tuple(specs["down_LEFD"].spec) == (None, "expert", "tensor", "fsdp")
    assert tuple(specs["router_LDE"].spec) == (None, "fsdp", "expert")
    specs = shard_params(abstract_params(config_of("gpt_oss")), mesh_of(1, 4, 2))["blocks"]
    assert tuple(specs["up_bias_LEF"].spec) == (None, "expert", "tensor")
    assert tuple(specs["down_bias_LED"].spec) == (None, "expert", "fsdp")
    assert tuple(specs["sinks_LN"].spec) == (None, "tensor")


@pytest.mark.parametrize(
    ("case", "turned", "said"),
    [
        (
            "mixtral",
            {"num_experts_per_tok": 7},
            "num_experts_per_tok = 7 must be between 1 and the number of experts, 6",
        ),
        ("mixtral", {"num_local_experts": 0}, "num_local_experts = 0 must be a whole number of at least 1"),
        ("mixtral", {"num_experts": 5}, "num_experts = 5 and num_local_experts = 6 differ; keep one of them"),
        ("gpt_oss", {"experts_per_token": 4}, "num_experts_per_tok = 3 and experts_per_token = 4 differ; keep one of"),
        ("gpt_oss", {"swiglu_limit": -7.0}, "swiglu_limit = -7.0 must be a number above 0"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise = 0.1 is not modelled; only 0.0 is"),
        ("mixtral", {"router_aux_loss_coef": -1.0}, "router_aux_loss_coef = -1.0 must be 0 or a number above it"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers = \[0\] is not modelled; only \[\] is"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step = 2 is not modelled; only 1 is"),
        ("qwen3_moe", {"norm_topk_prob": "true"}, "norm_topk_prob = 'true' must be true or false, without quotes"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv = 8.0 is not modelled; only None is"),
        ("llama", {"num_experts": 8}, "num_experts = 8 is an unknown field"),
    ],
)
def test_experts_that_are_not_modelled_are_refused_by_name(case, turned, said):
    with pytest.raises(ValueError, match=said):
        read_model_config(hf_config(case) | turned)


def test_experts_without_a_gate_are_refused():
    with pytest.raises(ValueError, match="experts without a gate are not modelled; only gated ones are"):
        dataclasses.replace(config_of("mixtral"), gated_mlp=False)
