"""The loss is sum(weight x nll), whatever the chunk, the dtype or the mesh; full logits never exist."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_sft.batch import Batch
from jax_sft.config import MeshConfig
from jax_sft.loss import Base, Tally, at_predicted, loss_and_tally, nll_of_predicted
from jax_sft.sharding import batch_sharding, make_mesh, replicated, weight_spec

B, P, D, V = 8, 12, 16, 64
NUM_SOURCES = 3


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    h_BPD = rng.normal(size=(B, P, D)).astype(np.float32)
    head_VD = rng.normal(size=(V, D)).astype(np.float32)
    targets_BP = rng.integers(0, V, (B, P)).astype(np.int32)
    weights_BP = (rng.uniform(0, 2, (B, P)) * (rng.uniform(size=(B, P)) > 0.3)).astype(np.float32)
    sources_BP = rng.integers(0, NUM_SOURCES, (B, P)).astype(np.int32)
    return h_BPD, head_VD, targets_BP, weights_BP, sources_BP


def reference(h_BPD, head_VD, targets_BP, weights_BP, sources_BP):
    """Float64, all logits at once: sums by source, and the gradients of the sum."""
    h, head, w = (x.astype(np.float64) for x in (h_BPD, head_VD, weights_BP))
    logits = h @ head.T
    logits -= logits.max(-1, keepdims=True)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    one_hot = np.eye(V)[targets_BP]
    nll = -np.log((p * one_hot).sum(-1))
    hit = logits.argmax(-1) == targets_BP
    by_source = [sources_BP == s for s in range(NUM_SOURCES)]
    sums = [[(x * here).sum() for here in by_source] for x in (w * nll, w, w * hit, w > 0)]
    dlogits = w[..., None] * (p - one_hot)
    return sums, dlogits @ head, np.einsum("bpv,bpd->vd", dlogits, h)


def gradients(data, *, chunk_tokens, dtype=jnp.float32):
    h_BPD, head_VD, *rest = map(jnp.asarray, data)

    def loss(h_BPD, head_VD):
        return loss_and_tally(h_BPD, head_VD, *rest, num_sources=NUM_SOURCES, chunk_tokens=chunk_tokens)

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(h_BPD.astype(dtype), head_VD)


@pytest.mark.parametrize("chunk_tokens", [5, 32, B * P, 10_000])
def test_loss_and_gradients_equal_full_logits_for_any_chunk_size(data, chunk_tokens):
    (loss, sums), (dh, dhead) = gradients(data, chunk_tokens=chunk_tokens)
    expected, expected_dh, expected_dhead = reference(*data)
    np.testing.assert_allclose(loss, np.sum(expected[0]), rtol=1e-6)
    np.testing.assert_allclose(dh, expected_dh, atol=1e-5)
    np.testing.assert_allclose(dhead, expected_dhead, atol=1e-5)
    for got, wanted in zip(sums, [*expected, np.zeros(NUM_SOURCES)], strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-6)


@pytest.mark.parametrize("chunk_tokens", [5, 10_000])
@pytest.mark.parametrize("cap", [None, 4.0])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
def test_a_pull_to_a_base_adds_its_divergence_in_value_and_gradient(data, chunk_tokens, cap, sizes):
    """Against float64 derivatives of all logits at once; with padded rows of the head and an adapter's columns."""
    h_BPD, head_VD, targets_BP, weights_BP, sources_BP = data
    kl, adapter = 0.7, (h_BPD[:, :, :2], head_VD[:, :2])
    rng = np.random.default_rng(1)
    base = Base(h_BPD + 0.3 * rng.normal(size=h_BPD.shape).astype(np.float32), head_VD, None, kl)
    padded_VD = np.concatenate([head_VD, np.full((8, D), 50, np.float32)])
    padded = (
        base._replace(head_VD=padded_VD),
        (adapter[0], np.concatenate([adapter[1], np.zeros((8, 2), np.float32)])),
    )
    mesh = make_mesh(MeshConfig(data=sizes[0], fsdp=sizes[1], tensor=sizes[2]), jax.devices()[: int(np.prod(sizes))])

    def loss(h_BPD, head_VD):
        return loss_and_tally(
            h_BPD, head_VD, targets_BP, weights_BP, sources_BP, num_sources=NUM_SOURCES, chunk_tokens=chunk_tokens,
            low_rank=padded[1], logit_cap=cap, vocab_size=V, base=padded[0],
        )  # fmt: skip

    with jax.set_mesh(mesh):
        (found, sums), (dh, dhead) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(h_BPD, padded_VD)
        plain = jax.jit(loss)(h_BPD, padded_VD)

    def logp(h, head, low_rank):
        logits = h @ head.T + (0 if low_rank is None else low_rank[0] @ low_rank[1].T)
        return jax.nn.log_softmax(logits if cap is None else cap * jnp.tanh(logits / cap), axis=-1)

    def expected(h_BPD, head_VD):
        model, other = logp(h_BPD, head_VD, adapter), logp(base.h_BPD, base.head_VD, None)
        divergence = (jnp.exp(other) * (other - model)).sum(-1)
        nll = -jnp.take_along_axis(model, targets_BP[..., None], -1)[..., 0]
        return (weights_BP * (nll + kl * divergence)).sum(), (weights_BP * nll, weights_BP * divergence)

    (wanted, (nll, divergence)), (wanted_dh, wanted_dhead) = jax.value_and_grad(expected, (0, 1), has_aux=True)(
        h_BPD, head_VD
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    np.testing.assert_allclose(plain[0], wanted, rtol=1e-5)  # without a gradient
    np.testing.assert_allclose(sums.loss.sum(), nll.sum(), rtol=1e-5)  # what is reported is without the pull
    np.testing.assert_allclose(sums.kl.sum(), divergence.sum(), rtol=1e-5)
    np.testing.assert_allclose(dh, wanted_dh, atol=3e-5)
    np.testing.assert_allclose(dhead[:V], wanted_dhead, atol=3e-5)
    np.testing.assert_array_equal(dhead[V:], 0)


@pytest.mark.parametrize("chunk_tokens", [5, 32, 10_000])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
def test_each_token_s_own_loss_stands_at_its_place(data, chunk_tokens, sizes):
    h_BPD, head_VD, targets_BP, *_ = data
    low_rank = (h_BPD[:, :, :2], head_VD[:, :2])
    logits = (h_BPD @ head_VD.T + low_rank[0] @ low_rank[1].T).astype(np.float64)
    expected = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets_BP[..., None], -1)[..., 0]
    mesh = make_mesh(MeshConfig(data=sizes[0], fsdp=sizes[1], tensor=sizes[2]), jax.devices()[: int(np.prod(sizes))])

    def nll(h_BPD, head_VD, targets_BP, low_rank):
        return nll_of_predicted(h_BPD, head_VD, targets_BP, chunk_tokens=chunk_tokens, low_rank=low_rank)

    with jax.set_mesh(mesh):
        found = jax.jit(nll)(h_BPD, head_VD, targets_BP, low_rank)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("chunk_tokens", [32, B * P])
def test_bfloat16_states_keep_float32_logits_sums_and_head_gradient(data, chunk_tokens):
    (loss, sums), (dh, dhead) = gradients(data, chunk_tokens=chunk_tokens, dtype=jnp.bfloat16)
    assert (loss.dtype, dh.dtype, dhead.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    assert all(x.dtype == jnp.float32 for x in sums)
    expected, expected_dh, expected_dhead = reference(*data)
    np.testing.assert_allclose(loss, np.sum(expected[0]), rtol=5e-3)
    np.testing.assert_allclose(dh.astype(jnp.float32), expected_dh, atol=0.06)
    np.testing.assert_allclose(dhead, expected_dhead, atol=0.06)


def test_logits_of_bfloat16_states_are_not_rounded_to_bfloat16(data):
    h_BPD, head_VD, *rest = data
    exact = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for x in (h_BPD, head_VD)]
    (_, sums), _ = gradients((*exact, *rest), chunk_tokens=32, dtype=jnp.bfloat16)
    np.testing.assert_allclose(sums.loss, reference(*exact, *rest)[0][0], rtol=1e-6)


@pytest.mark.parametrize("cap", [None, 3.0])
def test_rows_of_padding_get_no_probability_and_no_gradient(data, cap):
    h_BPD, head_VD, *rest = map(jnp.asarray, data)
    padded_VD = jnp.concatenate([head_VD, 9 * jnp.ones((7, D), jnp.float32)])  # large logits, if they counted

    def loss(h_BPD, head_VD, vocab_size):
        sizes = {"num_sources": NUM_SOURCES, "chunk_tokens": 32, "logit_cap": cap, "vocab_size": vocab_size}
        return loss_and_tally(h_BPD, head_VD, *rest, **sizes)

    of_both = jax.value_and_grad(loss, (0, 1), has_aux=True)
    (wanted, wanted_sums), (wanted_dh, wanted_dhead) = of_both(h_BPD, head_VD, None)
    (found, sums), (dh, dhead) = of_both(h_BPD, padded_VD, V)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    np.testing.assert_allclose(dh, wanted_dh, atol=1e-5)
    np.testing.assert_allclose(dhead[:V], wanted_dhead, atol=1e-5)
    np.testing.assert_array_equal(dhead[V:], 0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), sums, wanted_sums)
    np.testing.assert_allclose(loss(h_BPD, padded_VD, V)[0], wanted, rtol=1e-6)  # without a gradient


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 1, 4), (2, 2, 2)])
def test_any_mesh_gives_the_loss_of_one_device(data, sizes):
    mesh = make_mesh(MeshConfig(data=sizes[0], fsdp=sizes[1], tensor=sizes[2]))
    (loss, sums), (dh, dhead) = sharded_gradients(data, mesh)[0]
    (expected, expected_sums), (expected_dh, expected_dhead) = gradients(data, chunk_tokens=8)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(dh, expected_dh, atol=1e-5)
    np.testing.assert_allclose(dhead, expected_dhead, atol=2e-5)
    for got, wanted in zip(sums, expected_sums, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=2e-6)


def sharded_gradients(data, mesh):
    rows, head = batch_sharding(mesh), jax.sharding.NamedSharding(mesh, weight_spec("VD", (V, D), mesh))
    arrays = [jax.device_put(x, head if x.shape == (V, D) else rows) for x in data]

    def loss(h_BPD, head_VD, *rest):
        return loss_and_tally(h_BPD, head_VD, *rest, num_sources=NUM_SOURCES, chunk_tokens=4)

    whole = replicated(mesh)
    step = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True), out_shardings=((whole, whole), (rows, head)))
    with jax.set_mesh(mesh):
        return step(*arrays), step.lower(*arrays).compile().as_text()


def collectives(hlo, *, in_loop):
    """Names of the collectives inside or outside of while bodies."""
    found, inside = [], False
    for line in hlo.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            inside = "region" in line.split("(")[0]
        match = re.search(r" (all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)\(", line)
        if match and inside == in_loop:
            found.append(match[1])
    return found


def test_rows_stay_on_their_device_and_the_head_gradient_is_added_up_once(data):
    for sizes in ((8, 1, 1), (1, 8, 1)):
        hlo = sharded_gradients(data, make_mesh(MeshConfig(data=sizes[0], fsdp=sizes[1], tensor=sizes[2])))[1]
        assert "while(" in hlo
        assert collectives(hlo, in_loop=True) == []
        # The head is gathered once over fsdp; nothing else moves.
        assert collectives(hlo, in_loop=False).count("all-gather") == (1 if sizes[1] > 1 else 0)
        assert not {"all-to-all", "collective-permute"} & set(collectives(hlo, in_loop=False))


def test_full_logits_never_exist(data):
    h_BPD, head_VD, *rest = map(jnp.asarray, data)

    def loss(h_BPD, head_VD):
        return loss_and_tally(h_BPD, head_VD, *rest, num_sources=NUM_SOURCES, chunk_tokens=8)

    hlo = jax.jit(jax.grad(loss, (0, 1), has_aux=True)).lower(h_BPD, head_VD).compile().as_text()
    sizes = [np.prod([int(n) for n in dims.split(",")]) for dims in re.findall(r"f32\[([\d,]+)\]", hlo)]
    assert max(sizes) < B * P * V / 2


def test_the_head_is_multiplied_three_times_and_twice_when_it_is_frozen(data):
    h_BPD, head_VD, *rest = map(jnp.asarray, data)

    def loss(h_BPD, head_VD):
        return loss_and_tally(h_BPD, head_VD, *rest, num_sources=NUM_SOURCES, chunk_tokens=8)

    def dots(argnums):
        return str(jax.make_jaxpr(jax.grad(loss, argnums, has_aux=True))(h_BPD, head_VD)).count("dot_general[")

    assert dots((0, 1)) == 3
    assert dots(0) == 2


def test_only_predicted_positions_get_a_hidden_state_and_a_gradient():
    T = 6  # the example of `Batch`
    batch = Batch(
        tokens_BT=jnp.array([[1, 2, 7, 0, 0, 0]]),
        targets_BT=jnp.array([[2, 3, 8, 0, 0, 0]]),
        weights_BT=jnp.array([[0.0, 1, 0.5, 0, 0, 9]]),  # the 9 is bait: no position is not the last position
        segments_BT=jnp.array([[1, 1, 2, 0, 0, 0]]),
        positions_BT=jnp.array([[0, 1, 0, 0, 1, 2]]),
        sources_BT=jnp.array([[0, 0, 4, 0, 0, 0]]),
        predict_BP=jnp.array([[1, 2, T, T]]),
    )
    h_BTD = jnp.arange(1.0, T * 2 + 1).reshape(1, T, 2)
    h_BPD, targets_BP, weights_BP, sources_BP = at_predicted(h_BTD, batch)
    np.testing.assert_array_equal(h_BPD, [[[3, 4], [5, 6], [0, 0], [0, 0]]])
    np.testing.assert_array_equal(targets_BP, [[3, 8, 0, 0]])
    np.testing.assert_array_equal(weights_BP, [[1, 0.5, 0, 0]])
    np.testing.assert_array_equal(sources_BP, [[0, 4, 0, 0]])

    gradient = jax.grad(lambda h: at_predicted(h, batch)[0].sum())(h_BTD)
    np.testing.assert_array_equal(gradient[0, :, 0], [0, 1, 1, 0, 0, 0])


def test_a_model_without_an_opinion_is_not_always_right(data):
    _, head_VD, targets_BP, weights_BP, sources_BP = map(jnp.asarray, data)
    _, flat = loss_and_tally(
        jnp.zeros((B, P, D)), head_VD, targets_BP, weights_BP, sources_BP, num_sources=NUM_SOURCES, chunk_tokens=32
    )
    assert flat.correct.sum() < 0.2 * flat.weight.sum()
    np.testing.assert_allclose(flat.loss / flat.weight, np.log(V), rtol=1e-6)


def test_tallies_add_and_are_divided_once():
    one = Tally(*(np.array(x) for x in ([2.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 0.0])))
    other = Tally(*(np.array(x) for x in ([4.0, 9.0], [3.0, 2.0], [0.0, 1.0], [3.0, 2.0], [0.0, 0.0])))
    total = one + other
    assert total.mean() == {"loss": 15 / 6, "accuracy": 2 / 6, "tokens": 6}
    assert total.mean()["loss"] != (one.mean()["loss"] + other.mean()["loss"]) / 2
    assert total.by_source(("chat", "code")) == {
        "chat": {"loss": 6 / 4, "accuracy": 1 / 4, "tokens": 4},
        "code": {"loss": 9 / 2, "accuracy": 1 / 2, "tokens": 2},
    }
    assert list(one.by_source(("chat", "code"))) == ["chat"]
    zeros = Tally.zeros(2)
    assert [float(x) for x in (zeros + one).loss] == [2, 0]


def test_the_mean_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="no trained token"):
        Tally(*(np.zeros(2),) * 5).mean()


def test_differentiating_a_tally_is_an_error_and_not_a_zero(data):
    h_BPD, head_VD, *rest = map(jnp.asarray, data)

    def wrong(h_BPD):
        return loss_and_tally(h_BPD, head_VD, *rest, num_sources=NUM_SOURCES, chunk_tokens=32)[1].loss.sum()

    with pytest.raises(TypeError, match="a Tally has no gradient"):
        jax.grad(wrong)(h_BPD)
