"""One normaliser over micro-batches, devices and rows; packed = unpacked; the state changes only when it should."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jax_sft.batch import Batch
from jax_sft.config import MeshConfig, OptimConfig
from jax_sft.data.conversation import Sequence
from jax_sft.data.packing import fill_rows
from jax_sft.model.decoder import abstract_params, build, random_params
from jax_sft.model.families import read_model_config
from jax_sft.optim import optimizer
from jax_sft.sharding import local_rows, make_mesh, put_batch
from jax_sft.train_step import (
    Pull,
    StepMetrics,
    TrainState,
    abstract_state,
    init_state,
    make_eval_step,
    make_train_step,
    state_shardings,
)

V, T, P, ROWS = 88, 24, 18, 8
MODEL = read_model_config(
    {
        "model_type": "llama",
        "vocab_size": V,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 4,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
    }
)
# A large eps: Adam turns the float noise of a gradient near zero into a step of full size.
OPTIM = OptimConfig(lr=1e-2, schedule="linear", warmup_steps=2, weight_decay=0.1, clip_norm=0.5, eps=1e-3)


def mesh_of(data=1, fsdp=1, tensor=1):
    return make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), jax.devices()[: data * fsdp * tensor])


@functools.cache
def initial(model):
    return jax.device_get(random_params(model, seed=0))


def params_of(model=MODEL):
    """Host copies, to keep: a train step donates what it is given."""
    scale = 8.0  # far from a uniform answer, so that losses of rows differ
    return jax.tree.map_with_path(
        lambda path, x: x * np.float32(1.0 if "norm" in path[-1].key else scale), initial(model)
    )


def sequences(lengths, *, seed=0, share=0.6):
    """Random sequences; a first part of each is the prompt. Rows end up with very different weights."""
    rng = np.random.default_rng(seed)
    out = []
    for i, n in enumerate(lengths):
        tokens = rng.integers(0, V, n + 1).astype(np.int32)
        weights = np.zeros(n, np.float32)
        trained = max(1, int(n * share * rng.uniform(0.3, 1.0)))
        weights[-trained:] = rng.choice([0.25, 1.0, 3.0])
        out.append(Sequence(tokens_T=tokens[:-1], targets_T=tokens[1:], weights_T=weights, source="s", id=str(i)))
    return out


def uneven_batch():
    """Eight rows that hold 1 to 18 trained tokens."""
    rows = [
        sequences(lengths, seed=i) for i, lengths in enumerate([(24,), (2,), (9, 9), (1,), (5,), (12, 3, 7), (2, 1)])
    ]
    rows.append([])  # the last row of an epoch may be empty
    return fill_rows(
        [[(s, (i + j) % 2) for j, s in enumerate(row)] for i, row in enumerate(rows)],
        length=T,
        predict_capacity=P,
        num_rows=ROWS,
    )


class Run:
    """A train step with everything it needs. Use `run_of`, so that each is compiled once."""

    def __init__(
        self,
        mesh,
        accumulation=1,
        dtype="float32",
        remat="none",
        chunk_tokens=16,
        optim=OPTIM,
        model=MODEL,
        total=10,
        kl=None,
        ema_decay=None,
    ):
        """With a `kl`, which may be 0, the step is drawn to an origin."""
        self.averaged = ema_decay is not None
        self.mesh, self.accumulation = mesh, accumulation
        self.graphdef = build(model, dtype=dtype, attention="xla")
        self.tx = optimizer(optim, total, abstract_params(model))
        self.step = make_train_step(
            self.graphdef,
            self.tx,
            num_sources=2,
            remat=remat,
            loss_chunk_tokens=chunk_tokens,
            mesh=mesh,
            state_shardings=state_shardings(abstract_params(model), self.tx, mesh, averaged=self.averaged),
            pull=None if kl is None else Pull(self.graphdef, kl),
            ema_decay=ema_decay,
        )
        self.model = model

    def init(self, params=None):
        return init_state(
            params_of(self.model) if params is None else params, self.tx, self.mesh, averaged=self.averaged
        )

    def put(self, batch):
        size = batch.tokens_BT.shape[0]
        rows = local_rows(self.mesh, batch_size=size, accumulation=self.accumulation)
        return put_batch(batch, self.mesh, rows=rows, batch_size=size, accumulation=self.accumulation)

    def after(self, steps, batch=None):
        """Host copies of the params after some steps, and the last metrics."""
        state, placed = self.init(), self.put(uneven_batch() if batch is None else batch)
        for _ in range(steps):
            state, metrics = self.step(state, {}, placed)
        return jax.device_get(state.params), jax.device_get(metrics)


@functools.cache
def run_of(*sizes, **options):
    return Run(mesh_of(*sizes), **options)


def full_logits_loss(params, batch, model=MODEL, dtype="float32"):
    """sum(weight x nll) / sum(weight) from all logits of all positions."""
    decoder = nnx.merge(build(model, dtype=dtype, attention="xla"), params)
    logits_BTV = decoder.logits(decoder.hidden(batch.tokens_BT, batch.positions_BT, batch.segments_BT))
    nll_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, batch.targets_BT)
    return (batch.weights_BT * nll_BT).sum() / batch.weights_BT.sum()


full_logits_gradient = jax.jit(jax.value_and_grad(full_logits_loss))


def assert_close(got, wanted, *, atol):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol, rtol=0), got, wanted)


@pytest.fixture(scope="module")
def baseline():
    """Two steps on one device without accumulation."""
    return run_of().after(2)


def test_the_loss_and_its_gradient_norm_are_those_of_full_logits():
    batch = jax.tree.map(jnp.asarray, uneven_batch())
    expected, gradient = full_logits_gradient(params_of(), batch)
    _, metrics = run_of().after(1)
    np.testing.assert_allclose(metrics.tally.mean()["loss"], expected, rtol=1e-6)
    np.testing.assert_allclose(metrics.grad_norm, optax.tree.norm(gradient), rtol=1e-5)
    assert metrics.grad_norm > 2 * OPTIM.clip_norm  # before clipping
    weights_BT = uneven_batch().weights_BT
    np.testing.assert_allclose(metrics.tally.weight.sum(), weights_BT.sum(), rtol=1e-6)
    assert metrics.tally.tokens.sum() == (weights_BT > 0).sum()
    assert metrics.finite


@pytest.mark.parametrize("accumulation", [2, 4, 8])
def test_accumulation_equals_one_large_batch(baseline, accumulation):
    params, metrics = run_of(accumulation=accumulation).after(2)
    assert_close(params, baseline[0], atol=2e-6)
    np.testing.assert_allclose(metrics.tally.mean()["loss"], baseline[1].tally.mean()["loss"], rtol=1e-6)
    np.testing.assert_allclose(metrics.grad_norm, baseline[1].grad_norm, rtol=1e-5)


def test_a_mean_of_means_would_be_another_loss():
    batch = jax.tree.map(jnp.asarray, uneven_batch())
    params = params_of()
    together = full_logits_gradient(params, batch)[0]
    alone = [full_logits_gradient(params, Batch(*(x[i : i + 1] for x in batch)))[0] for i in range(ROWS - 1)]
    assert abs(together - np.mean(alone)) > 0.05


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 1, 4), (1, 2, 4), (2, 2, 2)])
def test_one_device_equals_any_mesh(baseline, sizes):
    params, metrics = run_of(*sizes).after(2)
    assert_close(params, baseline[0], atol=2e-6)
    np.testing.assert_allclose(metrics.tally.mean()["loss"], baseline[1].tally.mean()["loss"], rtol=2e-6)
    np.testing.assert_allclose(metrics.grad_norm, baseline[1].grad_norm, rtol=1e-5)


def test_a_mesh_with_accumulation_equals_one_device_without(baseline):
    params, _ = run_of(2, 1, 2, accumulation=4, remat="full").after(2)
    assert_close(params, baseline[0], atol=2e-6)


@pytest.mark.parametrize("chunk_tokens", [7, 10_000])
def test_the_loss_chunk_changes_nothing(baseline, chunk_tokens):
    params, metrics = run_of(chunk_tokens=chunk_tokens).after(2)
    assert_close(params, baseline[0], atol=2e-6)
    np.testing.assert_allclose(metrics.tally.mean()["loss"], baseline[1].tally.mean()["loss"], rtol=1e-6)


def test_packed_equals_unpacked():
    lengths = [5, 9, 8, 3, 6, 10, 4, 12]
    items = [(s, i % 2) for i, s in enumerate(sequences(lengths))]
    packed = fill_rows([items[:3], items[3:6], items[6:], []], length=T, predict_capacity=P, num_rows=ROWS)
    unpacked = fill_rows([[item] for item in items], length=T, predict_capacity=P, num_rows=ROWS)
    assert packed.segments_BT.max() == 3
    run = run_of()
    packed_params, packed_metrics = run.after(2, packed)
    params, metrics = run.after(2, unpacked)
    np.testing.assert_allclose(packed_metrics.tally.mean()["loss"], metrics.tally.mean()["loss"], rtol=1e-6)
    np.testing.assert_allclose(packed_metrics.grad_norm, metrics.grad_norm, rtol=1e-5)
    assert_close(packed_metrics.tally, metrics.tally, atol=1e-3)
    assert_close(packed_params, params, atol=2e-6)


def test_the_weight_of_a_message_is_its_share_of_the_loss():
    first, second = sequences([8, 8], share=1.0)

    def loss(weight):
        heavy = np.where(second.weights_T > 0, np.float32(weight), np.float32(0))
        light = np.where(first.weights_T > 0, np.float32(1), np.float32(0))
        rows = [
            [
                (Sequence(s.tokens_T, s.targets_T, w, s.source, s.id), i)
                for i, (s, w) in enumerate([(first, light), (second, heavy)])
            ]
        ]
        batch = fill_rows(rows, length=T, predict_capacity=P, num_rows=1)
        return run.after(1, batch)[1].tally

    run = run_of()
    plain, weighted, off = loss(1), loss(3), loss(0)
    np.testing.assert_allclose(weighted.loss, plain.loss * [1, 3], rtol=1e-6)
    np.testing.assert_allclose(weighted.weight, plain.weight * [1, 3], rtol=1e-6)
    np.testing.assert_array_equal(weighted.tokens, plain.tokens)
    np.testing.assert_allclose(off.loss, plain.loss * [1, 0], rtol=1e-6)
    assert off.tokens[1] == 0


def test_evaluation_does_not_move_with_the_batch_size():
    run = run_of()
    evaluate = make_eval_step(run.graphdef, num_sources=2, loss_chunk_tokens=16, mesh=run.mesh)
    batch, params = uneven_batch(), params_of()
    totals = []
    for size in (1, 2, 8):
        parts = [Batch(*(jnp.asarray(x[i : i + size]) for x in batch)) for i in range(0, ROWS, size)]
        total = sum((jax.device_get(evaluate(params, {}, part)) for part in parts[1:]), evaluate(params, {}, parts[0]))
        totals.append(total)
    for total in totals[1:]:
        assert total.mean()["loss"] == pytest.approx(totals[0].mean()["loss"], rel=1e-6)
        assert total.mean()["tokens"] == totals[0].mean()["tokens"]
        assert total.by_source(("a", "b")).keys() == {"a", "b"}
    _, metrics = run.after(1)
    assert totals[0].mean() == pytest.approx(metrics.tally.mean(), rel=1e-6)


def test_evaluation_is_the_same_on_a_mesh():
    run = run_of(2, 2, 2)
    evaluate = make_eval_step(run.graphdef, num_sources=2, loss_chunk_tokens=16, mesh=run.mesh)
    placed = Batch(*(x[0] for x in run.put(uneven_batch())))
    got = jax.device_get(evaluate(run.init().params, {}, placed))
    assert got.mean() == pytest.approx(run_of().after(1)[1].tally.mean(), rel=2e-6)


def test_the_frozen_part_stays_and_the_rest_learns_the_same():
    run = run_of()
    params = params_of()
    frozen = {"embed_VD": params.pop("embed_VD")}
    tx = optimizer(OPTIM, 10, params)
    shardings = state_shardings(params, tx, run.mesh)
    step = make_train_step(
        run.graphdef, tx, num_sources=2, remat="none", loss_chunk_tokens=16, mesh=run.mesh, state_shardings=shardings
    )
    state = init_state(params, tx, run.mesh)
    assert "embed_VD" not in str(jax.tree.structure(state))
    frozen_on_device = jax.device_put(frozen)
    placed = run.put(uneven_batch())
    batch = jax.tree.map(jnp.asarray, uneven_batch())
    gradient = full_logits_gradient(params | frozen, batch)[1]
    del gradient["embed_VD"]
    state, metrics = step(state, frozen_on_device, placed)
    np.testing.assert_allclose(metrics.grad_norm, optax.tree.norm(gradient), rtol=1e-5)
    np.testing.assert_array_equal(frozen_on_device["embed_VD"], frozen["embed_VD"])  # neither changed nor donated
    assert not np.array_equal(state.params["blocks"]["q_LDNH"], params["blocks"]["q_LDNH"])
    evaluate = make_eval_step(run.graphdef, num_sources=2, loss_chunk_tokens=16, mesh=run.mesh)
    assert np.isfinite(evaluate(state.params, frozen_on_device, batch).mean()["loss"])


def test_several_steps_compile_once_and_keep_their_shardings():
    run = Run(mesh_of(2, 2, 2), accumulation=2)
    state, placed = run.init(), run.put(uneven_batch())
    wanted = jax.tree.map(lambda x: x.sharding, state)
    assert state.opt_state[1].mu["blocks"]["down_LFD"].sharding.spec == jax.P(None, "tensor", "fsdp")
    for i in range(4):
        state, metrics = run.step(state, {}, placed)
        assert int(state.step) == i + 1
        same = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, wanted)
        assert all(jax.tree.leaves(same))
    assert run.step._cache_size() == 1
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(metrics))
    described = abstract_state(abstract_params(MODEL), run.tx, run.mesh)
    facts = [jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), tree) for tree in (described, state)]
    assert facts[0] == facts[1]


def test_the_state_is_donated():
    run = run_of()
    state, placed = run.init(), run.put(uneven_batch())
    new, _ = run.step(state, {}, placed)
    assert all(x.is_deleted() for x in jax.tree.leaves((state.params, state.opt_state)))
    assert not any(x.is_deleted() for x in jax.tree.leaves((new, placed)))


def test_bfloat16_compute_keeps_float32_masters_moments_and_sums():
    run = run_of(dtype="bfloat16", accumulation=2)
    state, metrics = run.step(run.init(), {}, run.put(uneven_batch()))
    floats = [x for x in jax.tree.leaves((state, metrics)) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert all(x.dtype == jnp.float32 for x in floats)
    exact = run_of().after(1)[1]
    assert metrics.tally.mean()["loss"] == pytest.approx(exact.tally.mean()["loss"], rel=0.02)
    assert float(metrics.grad_norm) == pytest.approx(float(exact.grad_norm), rel=0.1)
    # A step far below bfloat16's resolution is not lost.
    tiny = run_of(dtype="bfloat16", optim=OptimConfig(lr=1e-7, schedule="constant"))
    before = params_of()
    after, _ = tiny.after(1)
    assert not np.array_equal(after["blocks"]["q_LDNH"], before["blocks"]["q_LDNH"])


def test_bfloat16_trainable_parameters_are_an_error():
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params_of())
    with pytest.raises(ValueError, match=r"trainable parameter .* is bfloat16, but masters are float32"):
        run_of().init(params)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loss_that_is_not_finite_changes_nothing_but_the_step(accumulation):
    run = run_of(accumulation=accumulation)
    batch = uneven_batch()
    bad = batch._replace(tokens_BT=np.where(np.arange(ROWS)[:, None] == 5, V + 1, batch.tokens_BT).astype(np.int32))
    state, _ = run.step(run.init(), {}, run.put(batch))
    before = jax.device_get(state)
    state, metrics = run.step(state, {}, run.put(bad))
    assert not metrics.finite
    assert int(state.step) == 2
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.device_get((state.params, state.opt_state)),
        (before.params, before.opt_state),
    )
    state, metrics = run.step(state, {}, run.put(batch))
    assert metrics.finite
    assert not np.array_equal(state.params["embed_VD"], before.params["embed_VD"])


def test_a_gradient_that_overflows_changes_nothing_even_if_the_loss_is_finite():
    run = run_of()
    params = params_of()
    params["embed_VD"] *= np.float32(1e-3)
    params["blocks"]["o_LNHD"] *= np.float32(0)
    params["blocks"]["down_LFD"] *= np.float32(0)
    params["final_norm_D"] *= np.float32(1e3)  # undoes the small embedding, and divides by it again on the way back
    batch = uneven_batch()
    heavy = batch._replace(weights_BT=np.where(batch.weights_BT > 0, np.float32(2e35), np.float32(0)))
    before = jax.tree.map(np.array, params)
    state, metrics = run.step(run.init(params), {}, run.put(heavy))
    assert np.isfinite(metrics.tally.loss.sum())
    assert not np.isfinite(metrics.grad_norm)
    assert not metrics.finite
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), before)


def test_a_batch_without_a_trained_token_changes_nothing_and_is_finite():
    run = run_of()
    batch = uneven_batch()
    nothing = batch._replace(weights_BT=np.zeros_like(batch.weights_BT), predict_BP=np.full_like(batch.predict_BP, T))
    state, _ = run.step(run.init(), {}, run.put(batch))
    before = jax.device_get(state)
    state, metrics = run.step(state, {}, run.put(nothing))
    assert metrics.finite
    assert float(metrics.grad_norm) == 0
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.device_get((state.params, state.opt_state)),
        (before.params, before.opt_state),
    )


def test_the_same_steps_give_the_same_bits():
    run = run_of(2, 2, 2, accumulation=2)
    jax.tree.map(np.testing.assert_array_equal, run.after(3), run.after(3))


def test_training_lowers_the_loss():
    run = run_of(total=40, optim=OptimConfig(lr=2e-2, schedule="cosine"))
    state, placed = run.init(), run.put(uneven_batch())
    state, first = run.step(state, {}, placed)
    for _ in range(30):
        state, last = run.step(state, {}, placed)
    assert last.tally.mean()["loss"] < 0.5 * first.tally.mean()["loss"]


def test_no_tensor_of_the_compiled_step_holds_the_logits_of_a_batch():
    run = run_of(chunk_tokens=16)
    lowered = run.step.lower(run.init(), {}, run.put(uneven_batch()))
    for text in (lowered.as_text(), lowered.compile().as_text()):
        shapes = {
            tuple(int(n) for n in re.split("[x,]", dims)) for dims in re.findall(r"(?:tensor<|f32\[)([\dx,]*\d)", text)
        }
        with_vocabulary = {s for s in shapes if V in s}
        assert with_vocabulary, "the head is not seen: this test looks at the wrong text"
        tokens = max(np.prod(s) // V for s in with_vocabulary)
        assert tokens <= max(16, MODEL.width) < ROWS * P


def test_metrics_are_a_pytree_that_can_be_fetched():
    _, metrics = run_of().after(1)
    assert isinstance(metrics, StepMetrics)
    assert isinstance(jax.tree.map(np.asarray, TrainState(0, {}, ())), TrainState)
