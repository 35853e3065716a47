"""Attention against a loop that is too plain to be wrong."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_sft.model import attention as attention_module
from jax_sft.model.attention import Scores, attention, cached_attention

B, N, K, H = 2, 4, 2, 6
PLAIN = Scores(scale=H**-0.5, cap=None, sinks_N=None, window=None)
SINKS_N = np.array([-2.0, 0.5, 3.0, 1.0], np.float32)  # one of them above every score
TURNED = Scores(scale=0.7, cap=1.5, sinks_N=jnp.asarray(SINKS_N), window=5)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(attention_module, "CHUNK", 8)
    monkeypatch.setattr(attention_module, "LONGEST_DENSE", 16)


def inputs(length: int, dtype: str = "float32") -> tuple[jax.Array, ...]:
    random = np.random.default_rng(0)
    heads = (N, K, K)
    return tuple(jnp.asarray(random.standard_normal((B, length, n, H)), dtype) for n in heads)


def segments(length: int) -> jax.Array:
    """Three segments and padding in the first row, two segments in the second."""
    cuts = np.array([[0, length // 5, length // 2, length - 2], [0, length // 3, length, length]])
    row = [[np.searchsorted(cuts[b], t, side="right") for t in range(length)] for b in range(B)]
    return jnp.asarray(
        np.where((np.arange(length)[None] >= length - 2) & (np.arange(B)[:, None] == 0), 0, row), jnp.int32
    )


def by_hand(q, k, v, segments_BT, scores: Scores = PLAIN) -> np.ndarray:
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(q.shape[:3]):
        seen = [s for s in range(t + 1) if segments_BT[b, s] == segments_BT[b, t]][-(scores.window or t + 1) :]
        found = scores.scale * np.array([q[b, t, n] @ k[b, s, n // (N // K)] for s in seen])
        if scores.cap is not None:
            found = scores.cap * np.tanh(found / scores.cap)
        sink = [] if scores.sinks_N is None else [float(scores.sinks_N[n])]
        shares = np.exp(np.concatenate([found, sink]))
        out[b, t, n] = shares[: len(seen)] / shares.sum() @ v[b, seen, n // (N // K)]
    return out


@pytest.mark.parametrize("backend", ["xla", "chunked", "auto"])
@pytest.mark.parametrize("length", [1, 7, 8, 21, 64, 203])  # one chunk, several, several groups, several a group, rests
def test_every_backend_equals_the_loop_by_hand(backend, length):
    q, k, v = inputs(length)
    got = jax.jit(lambda *qkv: attention(*qkv, segments_BT=segments(length), scores=PLAIN, backend=backend))(q, k, v)
    np.testing.assert_allclose(got, by_hand(q, k, v, np.asarray(segments(length))), atol=2e-6)


@pytest.mark.parametrize("backend", ["xla", "chunked"])
@pytest.mark.parametrize("length", [7, 64, 203])
@pytest.mark.parametrize("is_traced", [False, True])
def test_window_cap_scale_and_sinks_equal_the_loop_by_hand(backend, length, is_traced):
    q, k, v = inputs(length)

    def run(window, *qkv):
        scores = dataclasses.replace(TURNED, window=window if is_traced else TURNED.window)
        return attention(*qkv, segments_BT=segments(length), scores=scores, backend=backend)

    got = jax.jit(run)(jnp.int32(TURNED.window), q, k, v)
    np.testing.assert_allclose(got, by_hand(q, k, v, np.asarray(segments(length)), TURNED), atol=2e-6)


def test_a_cached_token_sees_as_far_as_the_window():
    q, k, v = inputs(9)
    whole = attention(q, k, v, segments_BT=jnp.ones((B, 9), jnp.int32), scores=TURNED, backend="xla")
    got = cached_attention(q[:, 7:8], k, v, last_slot_B=jnp.full(B, 7, jnp.int32), scores=TURNED)
    np.testing.assert_allclose(got[:, 0], whole[:, 7], atol=1e-6)


@pytest.mark.parametrize("length", [21, 203])
def test_chunked_has_the_gradient_of_xla(length):
    q, k, v = inputs(length)

    def gradients(backend):
        def loss(*qkv):
            return jnp.sin(3 * attention(*qkv, segments_BT=segments(length), scores=PLAIN, backend=backend)).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)

    for dense, chunked in zip(gradients("xla"), gradients("chunked"), strict=True):
        np.testing.assert_allclose(chunked, dense, atol=1e-5)


@pytest.mark.parametrize(("backend", "length"), [("xla", 21), ("chunked", 21), ("chunked", 203)])
def test_sinks_have_the_gradient_of_one_more_key_that_says_nothing(backend, length):
    """A key for each query head, of which nothing but its score is known; its value is zero."""
    q, k, v = inputs(length)
    is_seen_BTS = attention_module._packed_mask(segments(length), segments(length), 0, None)

    def plain(q, k, v, sinks_N):
        k, v = (jnp.repeat(x, N // K, axis=2) for x in (k, v))
        scores_BNTS = jnp.where(is_seen_BTS[:, None], PLAIN.scale * jnp.einsum("BTNH,BSNH->BNTS", q, k), -jnp.inf)
        sinks_BNT1 = jnp.broadcast_to(sinks_N[None, :, None, None], (B, N, length, 1))
        shares_BNTS = jax.nn.softmax(jnp.concatenate([scores_BNTS, sinks_BNT1], axis=-1), axis=-1)[..., :-1]
        return jnp.einsum("BNTS,BSNH->BTNH", shares_BNTS, v)

    def ours(q, k, v, sinks_N):
        scores = dataclasses.replace(PLAIN, sinks_N=sinks_N)
        return attention(q, k, v, segments_BT=segments(length), scores=scores, backend=backend)

    def gradients(attend):
        return jax.jit(jax.grad(lambda *x: jnp.sin(3 * attend(*x)).sum(), argnums=(0, 1, 2, 3)))(q, k, v, SINKS_N)

    for got, wanted in zip(gradients(ours), gradients(plain), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("backend", ["xla", "chunked"])
@pytest.mark.parametrize("length", [8, 40, 203])
def test_bfloat16_runs_forward_and_backward(backend, length):
    qkv = inputs(length, "bfloat16")

    def loss(*qkv):
        return attention(*qkv, segments_BT=segments(length), scores=PLAIN, backend=backend).astype(jnp.float32).sum()

    out = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*qkv)
    assert all(x.dtype == jnp.bfloat16 and bool(jnp.isfinite(x).all()) for x in out)


@pytest.mark.parametrize("backend", ["xla", "chunked"])
def test_nothing_leaks_between_segments_or_out_of_padding(backend):
    q, k, v = inputs(21)
    segments_BT = np.asarray(segments(21))

    def reach(v):  # sum over the outputs of one segment
        out = attention(q, k, v, segments_BT=jnp.asarray(segments_BT), scores=PLAIN, backend=backend)
        return jnp.where((segments_BT == 2)[:, :, None, None], out, 0).sum()

    touched = np.abs(np.asarray(jax.grad(reach)(v))).max(axis=(2, 3)) > 0
    np.testing.assert_array_equal(touched, segments_BT == 2)


@pytest.mark.parametrize("backend", ["xla", "chunked"])
def test_a_row_of_padding_alone_is_finite(backend):
    qkv = inputs(21)

    def loss(*qkv):
        return attention(*qkv, segments_BT=jnp.zeros((B, 21), jnp.int32), scores=PLAIN, backend=backend).sum()

    assert all(bool(jnp.isfinite(x).all()) for x in jax.grad(loss, argnums=(0, 1, 2))(*qkv))


def test_auto_cuts_long_rows_and_only_those(monkeypatch):
    called = []
    monkeypatch.setattr(attention_module, "_attend_in_chunks", lambda q, *_, **__: called.append(q.shape[1]) or q)
    for length in (16, 17):
        attention(*inputs(length), segments_BT=segments(length), scores=PLAIN, backend="auto")
        assert called == ([] if length == 16 else [8, 8, 1])


def test_chunked_leaves_out_keys_that_no_query_sees():
    def flops(length):
        run = jax.jit(lambda *qkv: attention(*qkv, segments_BT=segments(length), scores=PLAIN, backend="chunked"))
        return run.lower(*inputs(length)).compile().cost_analysis()["flops"]

    dense = jax.jit(lambda *qkv: attention(*qkv, segments_BT=segments(64), scores=PLAIN, backend="xla")).lower(
        *inputs(64)
    )
    assert flops(64) < 0.65 * dense.compile().cost_analysis()["flops"]


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="model.attention = 'flash' is no backend; choose one of auto, xla, chunked"):
        attention(*inputs(4), segments_BT=segments(4), scores=PLAIN, backend="flash")


def test_cached_attention_is_the_last_row_of_attention():
    q, k, v = inputs(9)
    whole = attention(q, k, v, segments_BT=jnp.ones((B, 9), jnp.int32), scores=PLAIN, backend="xla")
    last_B = jnp.array([8, 5], jnp.int32)
    q_B1NH = jnp.stack([q[0, 8:9], q[1, 5:6]])
    got = cached_attention(q_B1NH, k, v, last_slot_B=last_B, scores=PLAIN)
    np.testing.assert_allclose(got[:, 0], jnp.stack([whole[0, 8], whole[1, 5]]), atol=1e-6)
