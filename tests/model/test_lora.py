"""Adapters change nothing when fresh, say what their merged weights say, share products, and only they are trained."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, traverse_util

from jax_sft.config import LoraConfig, OptimConfig
from jax_sft.hf.targets import adaptation, frozen_layers
from jax_sft.model.config import ModelConfig
from jax_sft.model.decoder import abstract_params, build
from jax_sft.model.lora import Lora, initial_factors, letters, merged
from jax_sft.model.projection import Dropout, project
from jax_sft.model.quantize import quantize
from jax_sft.optim import optimizer
from jax_sft.sharding import shard_params, weight_spec
from jax_sft.train_step import init_state, make_train_step, state_shardings
from tests.adapted import MODEL, Run, jaxprs_in, mesh_of, random_factors, run_of, uneven_batch
from tests.hf.family_cases import config_of, params_of, tokens_of

EVERYTHING = ("all-linear", "embeddings", "head")
LLAMA = config_of("llama")


def lora_of(model: ModelConfig, **said: Any) -> Lora:
    return adaptation(LoraConfig(**{"rank": 3, "targets": ("all-linear",)} | said), model)


def fresh(lora: Lora, model: ModelConfig) -> Any:
    return jax.jit(functools.partial(initial_factors, lora, sizes=model.sizes, seed=0))(params_of(model))


@functools.partial(jax.jit, static_argnums=0)
def logits_of(graphdef: Any, params: Any, tokens_BT: jax.Array) -> jax.Array:
    decoder = nnx.merge(graphdef, params)
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None], tokens_BT.shape)
    return decoder.logits(decoder.hidden(tokens_BT, positions_BT, jnp.ones_like(tokens_BT)))


def logits(model: ModelConfig, params: Any, lora: Lora | None = None) -> np.ndarray:
    graphdef = build(model, dtype="float32", attention="xla", lora=lora)
    return np.asarray(logits_of(graphdef, params, tokens_of(model, length=16)))


def flat(tree: Any) -> dict[str, Any]:
    return traverse_util.flatten_dict(tree, sep=".")


@pytest.mark.parametrize(
    ("path", "a", "b", "magnitude"),
    [
        ("blocks.q_LDNH", "LDR", "LRNH", "LNH"),
        ("blocks.k_LDKH", "LDR", "LRKH", "LKH"),
        ("blocks.v_LDKH", "LDR", "LRKH", "LKH"),
        ("blocks.o_LNHD", "LNHR", "LRD", "LD"),
        ("blocks.gate_LDF", "LDR", "LRF", "LF"),
        ("blocks.up_LDF", "LDR", "LRF", "LF"),
        ("blocks.down_LFD", "LFR", "LRD", "LD"),
        ("blocks.gate_LEDF", "LEDR", "LERF", "LEF"),
        ("blocks.up_LEDF", "LEDR", "LERF", "LEF"),
        ("blocks.down_LEFD", "LEFR", "LERD", "LED"),
        ("embed_VD", "VR", "RD", "D"),
        ("head_VD", "DR", "RV", "V"),
    ],
)
def test_factors_have_the_letters_of_their_weight(path: str, a: str, b: str, magnitude: str):
    of = letters(path)
    assert (of.a, of.b, of.magnitude) == (a, b, magnitude)
    assert letters(path.rsplit(".", 1)[-1].replace("_L", "_")).a == a.replace("L", "")  # inside the scan


@pytest.mark.parametrize("case", ["llama", "qwen3_moe"])
def test_factors_have_the_sizes_of_their_letters_and_lie_where_those_do(case: str):
    model = config_of(case)
    lora = lora_of(model, targets=EVERYTHING)
    shapes = flat(lora.shapes(model.sizes))
    expected = {"L": 4, "D": 16, "F": model.mlp_width, "N": 4, "K": 2, "H": 8, "V": 31, "R": 3, "E": model.num_experts}
    for key, shape in shapes.items():
        assert shape == tuple(expected[x] for x in key.rsplit("_", 1)[-1]), key
    dense = 2 * (4 if model.num_experts else 7)  # A and B of each
    assert len(shapes) == dense + 2 * 3 * bool(model.num_experts) + 2 * 2
    assert lora.num_params(model.sizes) == sum(math.prod(s) for s in shapes.values())
    mesh = mesh_of(fsdp=2, tensor=2)
    assert weight_spec("LDR", (4, 16, 4), mesh) == jax.P(None, "fsdp", None)  # of R nothing is cut
    assert weight_spec("LRNH", (4, 4, 4, 8), mesh) == jax.P(None, None, "tensor", None)


@pytest.mark.parametrize("case", ["llama", "gemma3_text", "qwen3_moe"])
def test_fresh_adapters_change_no_bit(case: str):
    model = config_of(case)
    lora, params = lora_of(model, targets=EVERYTHING), params_of(model)
    factors = fresh(lora, model)
    assert any(np.asarray(x).any() for x in jax.tree.leaves(factors))
    with_fresh, plain = logits(model, params | factors, lora), logits(model, params)
    np.testing.assert_array_equal(with_fresh, logits(model, params | jax.tree.map(jnp.zeros_like, factors), lora))
    if case == "llama":
        np.testing.assert_array_equal(with_fresh, plain)
    else:  # another program, that XLA fuses otherwise
        np.testing.assert_allclose(with_fresh, plain, atol=2e-6 * np.abs(plain).max())


@pytest.mark.parametrize("said", [{"start": "pissa"}, {"dora": True}])
def test_fresh_adapters_of_pissa_and_dora_change_nothing_but_rounding(said: dict[str, Any]):
    lora, params = lora_of(LLAMA, **said), params_of(LLAMA)
    plain = logits(LLAMA, params)
    changed = logits(LLAMA, params | fresh(lora, LLAMA), lora)
    np.testing.assert_allclose(changed, plain, atol=1e-5 * np.abs(plain).max())


MERGED = [
    ("llama", {"rslora": True, "alpha": 5.0, "targets": EVERYTHING}),
    ("llama", {"dora": True, "rank_pattern": {"layers.1": 1, "q_proj": 5}, "layers": "0-2"}),
    ("llama", {"start": "pissa", "targets": ("all-linear", "head")}),
    ("qwen3", {"dora": True, "rslora": True}),
    ("gemma3_text", {"targets": ("attention", "head")}),
    ("qwen3_moe", {"targets": ("experts", "o_proj", "embeddings"), "layers": "1-3", "rank_pattern": {"layers.2": 1}}),
]


@pytest.mark.parametrize(("case", "said"), MERGED, ids=[f"{case}-{'-'.join(said) or 'lora'}" for case, said in MERGED])
def test_adapters_beside_the_base_say_what_their_merged_weights_say(case: str, said: dict[str, Any]):
    model = config_of(case)
    lora, params = lora_of(model, **said), params_of(model)
    factors = random_factors(lora, params, model)
    beside, plain = logits(model, params | factors, lora), logits(model, params)
    largest = np.abs(beside).max()
    assert np.abs(beside - plain).max() > 0.05 * largest  # the adapters do say something
    whole = merged(lora, jax.tree.map(jnp.array, params), factors["lora"])
    untied = model
    if model.tied_head and {"embed_VD", "head_VD"} & {target.path for target in lora.targets}:
        untied = dataclasses.replace(model, tied_head=False)
        assert "head_VD" in whole
    else:
        assert whole.keys() == params.keys()
    np.testing.assert_allclose(logits(untied, whole), beside, atol=1e-4 * largest)


def test_computing_in_bfloat16_a_magnitude_counts_to_its_last_digit():
    """Of each output, on average over many tokens: each is rounded to bfloat16, whose numbers lie 0.4 % apart."""
    random = np.random.default_rng(0)
    shapes = {"x": (8, 512, 64), "q": (64, 4, 8), "a": (64, 3), "b": (3, 4, 8)}
    rounded = {k: np.asarray(jnp.asarray(random.normal(size=s), jnp.bfloat16), np.float64) for k, s in shapes.items()}
    whole_DNH = rounded["q"] + 0.5 * np.einsum("DR,RNH->DNH", rounded["a"], rounded["b"])
    norm_NH = np.sqrt(np.square(whole_DNH).sum(axis=0))
    exact_BTNH = np.einsum("BTD,DNH->BTNH", rounded["x"], whole_DNH) / norm_NH

    def share_of_exact(magnitude: float) -> np.ndarray:
        factors = {
            "a_DR": rounded["a"],
            "b_RNH": rounded["b"],
            "magnitude_NH": magnitude * np.ones((4, 8)),
            "scale": 0.5,
        }
        adapters = {"q_DNH": {name: jnp.asarray(x, jnp.float32) for name, x in factors.items()}}
        weights = {"q_DNH": jnp.asarray(rounded["q"], jnp.bfloat16), "adapters": adapters}
        (y_BTNH,) = jax.jit(lambda x: project(x, weights, "q_DNH"))(jnp.asarray(rounded["x"], jnp.bfloat16))
        assert y_BTNH.dtype == jnp.bfloat16
        return (np.asarray(y_BTNH, np.float64) * exact_BTNH).sum((0, 1)) / np.square(exact_BTNH).sum((0, 1))

    before, after = share_of_exact(1.3), share_of_exact(1.3 * 1.002)
    np.testing.assert_allclose(before, 1.3, rtol=5e-4)
    np.testing.assert_allclose(after / before, 1.002, rtol=3e-4)


def test_the_scale_is_alpha_by_rank_and_of_rslora_by_its_root():
    params = params_of(LLAMA)
    of = {rslora: lora_of(LLAMA, rank=4, alpha=6.0, targets=("o_proj",), rslora=rslora) for rslora in (False, True)}
    factors = random_factors(of[False], params, LLAMA)
    added = {
        rslora: merged(lora, jax.tree.map(jnp.array, params), factors["lora"])["blocks"]["o_LNHD"]
        - params["blocks"]["o_LNHD"]
        for rslora, lora in of.items()
    }
    pair = factors["lora"]["blocks"]["o_LNHD"]
    product = np.einsum("LNHR,LRD->LNHD", pair["a_LNHR"], pair["b_LRD"])
    np.testing.assert_allclose(added[False], 6 / 4 * product, atol=1e-5)
    np.testing.assert_allclose(added[True], 6 / 2 * product, atol=1e-5)


def products(model: ModelConfig, lora: Lora | None = None) -> list[tuple[int, ...]]:
    """Shapes that the matrix products of `hidden` make; the scan's body counts once."""
    graphdef = build(model, dtype="float32", attention="xla", lora=lora)
    params: Any = abstract_params(model)
    if lora is not None:
        params |= jax.eval_shape(functools.partial(initial_factors, lora, sizes=model.sizes, seed=0), params)
    tokens_BT = jax.ShapeDtypeStruct((2, 16), jnp.int32)
    jaxpr = jax.make_jaxpr(lambda p, t: nnx.merge(graphdef, p).hidden(t, t, jnp.ones_like(t)))(params, tokens_BT)
    found: list[tuple[int, ...]] = []

    def look(jaxpr: Any) -> None:
        for equation in jaxpr.eqns:
            if equation.primitive.name in ("dot_general", "ragged_dot_general", "ragged_dot"):
                found.append(equation.outvars[0].aval.shape)
            for inner in jaxprs_in(equation):
                look(inner)

    look(jaxpr.jaxpr)
    return found


def test_q_k_v_and_gate_up_share_their_adapters_first_product():
    rank = 3
    plain, adapted = products(LLAMA), products(LLAMA, lora_of(LLAMA, rank=rank))
    assert len(plain) == 7 + 2  # projections, scores, and values
    assert len(adapted) == len(plain) + 4 + 7  # not 7 + 7
    assert sorted(s[-1] for s in adapted if s[-1] in (rank, 2 * rank, 3 * rank)) == [rank, rank, 2 * rank, 3 * rank]


def test_gate_and_up_of_experts_share_their_adapters_first_product():
    model, rank = config_of("qwen3_moe"), 5
    lora = lora_of(model, rank=rank, targets=("experts",))
    plain, adapted = products(model), products(model, lora)
    assert len(adapted) == len(plain) + 2 + 3
    assert sorted(s[-1] for s in adapted if s[-1] in (rank, 2 * rank)) == [rank, 2 * rank]


def test_what_fills_up_ranks_stays_zero_through_training_and_changes_nothing():
    patterns = {"layers.0.self_attn": 1, "layers.1.self_attn.o_proj": 2}
    params, _ = Run(rank=4, targets=("q_proj", "o_proj"), rank_pattern=patterns).after(2)
    pair = params["lora"]["blocks"]["q_LDNH"]
    assert not pair["a_LDR"][0, :, 1:].any() and not pair["b_LRNH"][0, 1:].any()
    assert pair["a_LDR"][0, :, 0].all() and pair["b_LRNH"][1, 3].all()
    pair = params["lora"]["blocks"]["o_LNHD"]
    assert not pair["a_LNHR"][1, :, :, 2:].any() and not pair["b_LRD"][1, 2:].any()


def test_a_layer_of_rank_0_trains_nothing_and_is_the_base_s():
    run = run_of(layers="1", targets=("q_proj", "down_proj"), dora=True)
    before = random_factors(run.lora, params_of(MODEL), MODEL)
    after, _ = run.after(2, factors=before)
    for path, x in flat(after).items():
        if "magnitude" in path:
            np.testing.assert_array_equal(x[0], flat(before)[path][0], err_msg=path)
        else:
            assert not x[0].any(), path
        assert not np.array_equal(x[1], flat(before)[path][1]), path
    whole = merged(run.lora, jax.tree.map(jnp.array, params_of(MODEL)), after["lora"])
    for name in ("q_LDNH", "down_LFD"):
        np.testing.assert_array_equal(whole["blocks"][name][0], params_of(MODEL)["blocks"][name][0], err_msg=name)


def test_dropout_of_a_row_is_the_same_in_any_micro_batch_and_another_in_every_step():
    said = {"dropout": 0.5, "targets": ("v_proj", "head")}
    one, micro = run_of(**said), run_of((1, 2, 2), accumulation=2, **said)
    (params, metrics), (by_two, metrics_by_two) = one.after(2), micro.after(2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-6, rtol=0), by_two, params)
    assert metrics_by_two.tally.mean()["loss"] == pytest.approx(metrics.tally.mean()["loss"], rel=2e-6)
    state, placed = one.init(), one.put(uneven_batch())
    losses = []
    for step in range(3):
        state = state.__class__(step=jnp.int32(step), params=one.init().params, opt_state=one.init().opt_state)
        losses.append(jax.device_get(one.step(state, one.frozen, placed)[1]).tally.mean()["loss"])
    assert len({round(x, 4) for x in losses}) == 3
    params = params_of(MODEL) | random_factors(one.lora, params_of(MODEL), MODEL)
    np.testing.assert_array_equal(  # an evaluation sees all
        logits(MODEL, params, one.lora), logits(MODEL, params, dataclasses.replace(one.lora, dropout=0.0))
    )


def on_device(batch: Any) -> Any:
    return jax.tree.map(jnp.asarray, batch)


def test_dropout_differs_by_row_layer_and_site_and_keeps_the_mean():
    keys_B = jax.vmap(jax.random.key)(jnp.arange(3, dtype=jnp.uint32))
    dropout, x = Dropout(keys_B, 0.25), jnp.ones((3, 40, 50))
    seen = [
        np.asarray(dropout.of_layer(jnp.uint32(layer))(x, site))
        for layer in (0, 1)
        for site in ("q_DNH", "o_NHD", "up_DF", "down_FD")
    ]
    masks = [row > 0 for out in seen for row in out]
    assert len({mask.tobytes() for mask in masks}) == 2 * 4 * 3
    assert all(set(np.unique(out).round(5)) == {0.0, np.float32(4 / 3).round(5)} for out in seen)
    assert np.mean(masks) == pytest.approx(0.75, abs=0.01)


@pytest.mark.parametrize(
    ("case", "said"),
    [("llama", {"targets": EVERYTHING}), ("qwen3_moe", {"targets": ("experts", "v_proj")})],
)
def test_generation_with_adapters_says_what_the_whole_text_says(case: str, said: dict[str, Any]):
    model = config_of(case)
    lora, params = lora_of(model, **said), params_of(model)
    params |= random_factors(lora, params, model)
    decoder = nnx.merge(build(model, dtype="float32", attention="xla", lora=lora), params)
    tokens_BT, prompt = jnp.asarray(tokens_of(model, length=16)), 12
    whole = np.asarray(logits(model, params, lora))
    first, cache = jax.jit(lambda d, t: d.prefill(t, jnp.full(2, prompt, jnp.int32), slots=20))(
        decoder, tokens_BT[:, :prompt]
    )
    found, decode = [np.asarray(first)], jax.jit(lambda d, t, c: d.decode(t, c))
    for t in range(prompt, 15):
        said_next, cache = decode(decoder, tokens_BT[:, t], cache)
        found.append(np.asarray(said_next))
    np.testing.assert_allclose(np.stack(found, 1), whole[:, prompt - 1 : 15], atol=2e-5 * np.abs(whole).max())


def test_pissa_starts_as_the_best_approximation_of_its_rank():
    model, rank = MODEL, 3
    lora = lora_of(model, start="pissa", rank=rank, alpha=7.0, targets=("q_proj", "o_proj", "down_proj", "head"))
    params, factors = params_of(model), jax.device_get(fresh(lora, model))["lora"]

    def compare(found: np.ndarray, weight: np.ndarray) -> None:
        u, s, vt = np.linalg.svd(weight)
        best = (u[:, :rank] * s[:rank]) @ vt[:rank]
        # As near to the weight as can be; where singular values lie close together, by other vectors.
        assert np.linalg.norm(weight - found) == pytest.approx(np.linalg.norm(weight - best), rel=1e-3)
        assert np.linalg.matrix_rank(found, tol=1e-3) == rank

    for name, inner in {"q_LDNH": 16, "o_LNHD": 16, "down_LFD": 32}.items():
        pair, of = factors["blocks"][name], letters(name)
        for layer in range(2):
            a, b = pair[f"a_{of.a}"][layer].reshape(inner, rank), pair[f"b_{of.b}"][layer].reshape(rank, -1)
            compare(7 / 3 * a @ b, params["blocks"][name][layer].reshape(inner, -1))
    compare(7 / 3 * factors["head_VD"]["a_DR"] @ factors["head_VD"]["b_RV"], params["embed_VD"].T)


def test_where_pissa_started_is_never_moved():
    run = run_of(start="pissa", targets=("q_proj", "down_proj"))
    before = random_factors(run.lora, params_of(MODEL), MODEL)
    after, _ = run.after(2, factors=before)
    starts = [path for path in flat(after) if "_start_" in path]
    assert len(starts) == 4
    for path, x in flat(after).items():
        assert np.array_equal(x, flat(before)[path]) == (path in starts), path


STARTS: list[dict[str, Any]] = [{"dora": True}, {"start": "pissa"}]


@pytest.mark.parametrize("said", STARTS, ids=["dora", "pissa"])
def test_a_start_reads_a_quantised_base_one_matrix_at_a_time_and_each_weight_in_its_own_program(said: dict[str, Any]):
    model = dataclasses.replace(
        MODEL, width=256, mlp_width=512, num_layers=16, windows=(None,) * 16, ropes=(MODEL.ropes[0],) * 16
    )
    base: Any = abstract_params(model)
    for name, kernel in base["blocks"].items():
        if "norm" not in name:
            axes = name.split("_")[-1]
            of = functools.partial(quantize, letters=axes, inputs=letters(name).inputs, kind="nf4")
            base["blocks"][name] = jax.eval_shape(of, kernel)
    start = functools.partial(initial_factors, sizes=model.sizes, seed=0)
    one = lora_of(model, targets=("gate_proj",), **said)
    analysis = jax.jit(functools.partial(start, one)).lower(base).compile().memory_analysis()
    assert analysis is not None
    assert analysis.temp_size_in_bytes < 4 * 256 * 512 * 4  # of a layer; all are 16
    jaxpr = jax.make_jaxpr(functools.partial(start, lora_of(model, **said)))(base)
    assert [equation.params["name"] for equation in jaxpr.eqns] == ["_initial_of"] * 7


@pytest.mark.parametrize("said", [{}, *STARTS], ids=["lora", "dora", "pissa"])
def test_factors_start_where_they_are_to_lie_and_as_on_one_device(said: dict[str, Any]):
    lora, params, mesh = lora_of(LLAMA, **said), params_of(LLAMA), mesh_of(2, 2, 2)
    shapes = jax.eval_shape(functools.partial(initial_factors, lora, sizes=LLAMA.sizes, seed=0), params)
    places = shard_params(shapes, mesh)
    spread = jax.device_put(params, shard_params(params, mesh))
    found = flat(initial_factors(lora, spread, LLAMA.sizes, seed=0, places=places))
    for path, x in flat(fresh(lora, LLAMA)).items():
        assert found[path].sharding == flat(places)[path], path
        np.testing.assert_allclose(found[path], x, atol=2e-4 if "pissa" in said.values() else 1e-6, err_msg=path)


FEW: dict[str, Any] = {"dora": True, "targets": ("q_proj",)}


def updates_of(optim: OptimConfig, gradients: Any, factors: Any, **said: Any) -> dict[str, Any]:
    tx = optimizer(optim, 10, factors, **said)
    update = jax.jit(lambda g, f: tx.update(g, tx.init(f), f, step=jnp.int32(0))[0])
    return flat(jax.device_get(update(gradients, factors)))


def test_the_ratio_of_lora_plus_scales_the_update_of_b_alone():
    factors = random_factors(lora_of(MODEL, **FEW), params_of(MODEL), MODEL)
    optim = OptimConfig(lr=1e-3, schedule="constant", weight_decay=0.1)
    plain, faster = (updates_of(optim, factors, factors, b_lr_ratio=ratio) for ratio in (1.0, 16.0))
    assert len(plain) == 3
    for path, update in plain.items():
        ratio = 16 if path.rsplit(".", 1)[-1].startswith("b_") else 1
        assert np.abs(update).max() > 1e-4
        np.testing.assert_allclose(faster[path], ratio * update, rtol=1e-5, err_msg=path)


def test_the_ratio_of_lora_plus_is_not_for_embeddings_which_are_looked_up():
    """PEFT's `create_loraplus_optimizer` puts both of their factors into a group of its own, without the ratio."""
    factors = random_factors(lora_of(MODEL, targets=("embeddings", "head")), params_of(MODEL), MODEL)
    optim = OptimConfig(lr=1e-3, schedule="constant")
    plain, faster = (updates_of(optim, factors, factors, b_lr_ratio=ratio) for ratio in (1.0, 16.0))
    found = {path: round(float(np.mean(faster[path] / plain[path])), 3) for path in plain}
    of_head = {"lora.head_VD.a_DR": 1.0, "lora.head_VD.b_RV": 16.0}
    assert found == {"lora.embed_VD.a_VR": 1.0, "lora.embed_VD.b_RD": 1.0, **of_head}


def test_weight_decay_takes_of_a_and_b_and_leaves_magnitude_alone():
    factors = random_factors(lora_of(MODEL, start="pissa", **FEW), params_of(MODEL), MODEL)
    optim = OptimConfig(lr=0.5, schedule="constant", weight_decay=0.1)
    for path, update in updates_of(optim, jax.tree.map(jnp.zeros_like, factors), factors).items():
        share = 0.0 if "magnitude" in path or "_start_" in path else 0.05
        np.testing.assert_allclose(update, -share * flat(factors)[path], atol=1e-7, err_msg=path)


FREEZES = [("embeddings", "layers.0"), ("layers.1.self_attn.q_proj", "layers.0.mlp", "norms")]


@pytest.mark.parametrize("freeze", FREEZES, ids=["-".join(f) for f in FREEZES])
def test_frozen_layers_keep_every_bit_and_only_the_others_count(freeze: tuple[str, ...]):
    layers = frozen_layers(freeze, MODEL)
    params = flat(params_of(MODEL))
    whole = {path for path, meant in layers.items() if all(meant)}
    trained = traverse_util.unflatten_dict({k: v for k, v in params.items() if k not in whole}, sep=".")
    frozen = traverse_util.unflatten_dict({k: v for k, v in params.items() if k in whole}, sep=".")
    graphdef = build(MODEL, dtype="float32", attention="xla")
    optim, mesh = OptimConfig(lr=1e-2, schedule="constant", weight_decay=0.3), mesh_of()

    def step_of(tree: Any, held: Any) -> Any:
        tx = optimizer(optim, 10, tree, frozen_layers=held)
        shardings = state_shardings(tree, tx, mesh)
        step = make_train_step(
            graphdef,
            tx,
            num_sources=2,
            remat="none",
            loss_chunk_tokens=16,
            mesh=mesh,
            state_shardings=shardings,
            frozen_layers=held,
        )
        return step, init_state(jax.tree.map(jnp.array, tree), tx, mesh)

    batch = Run.put(run_of(), uneven_batch())
    step, state = step_of(trained, layers)
    state, metrics = step(state, frozen, batch)
    for _ in range(2):
        state, _ = step(state, frozen, batch)
    for path, x in flat(jax.device_get(state.params)).items():
        for layer in range(2):
            if not path.startswith("blocks."):
                assert not np.array_equal(x, params[path]), path
                break
            same = np.array_equal(x[layer], params[path][layer])
            assert same == layers.get(path, (False, False))[layer], (path, layer)
    assert float(metrics.grad_norm) == pytest.approx(norm_of_the_trained(layers), rel=1e-5)


@functools.cache
def full_gradient() -> dict[str, np.ndarray]:
    """Of the mean loss, from all logits."""
    batch = on_device(uneven_batch())
    graphdef = build(MODEL, dtype="float32", attention="xla")

    def loss(params: Any) -> jax.Array:
        decoder = nnx.merge(graphdef, params)
        logits_BTV = decoder.logits(decoder.hidden(batch.tokens_BT, batch.positions_BT, batch.segments_BT))
        nll_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, batch.targets_BT)
        return (batch.weights_BT * nll_BT).sum() / batch.weights_BT.sum()

    return flat(jax.device_get(jax.jit(jax.grad(loss))(params_of(MODEL))))


def norm_of_the_trained(layers: Any) -> float:
    total = 0.0
    for path, gradient in full_gradient().items():
        frozen = np.array(layers.get(path, (False,)))
        kept = gradient if len(frozen) == 1 and not frozen[0] else gradient[~frozen] if len(frozen) > 1 else 0
        total += float(np.sum(np.square(kept)))
    return math.sqrt(total)
