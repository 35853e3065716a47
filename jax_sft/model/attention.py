"""Attention over packed rows and over a key-value cache.

In: q_BTNH, k_BSKH, v_BSKH (rotated already) and who may see whom. Out: attended_BTNH.
A query sees a key that is not later and lies in the same segment; padding (segment 0) sees padding alone, so that no
row of the softmax is empty and nothing leaks. Scores and softmax are float32.

B batch row, T query position, S key position (slot), N query heads, K key and value heads, G = N / K, H head width,
L layers, C query chunks.
"""

import dataclasses
import functools
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from jax_sft.model.layers import capped

Backend = Literal["auto", "xla", "chunked"]

CHUNK = 256  # queries whose scores exist at one time in the chunked backend
LONGEST_DENSE = 512  # auto: longer rows are cut, which on CPU is faster from here on and takes less memory
_MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)  # finite, so that a masked score never makes inf - inf


class KVCache(NamedTuple):
    """Keys and values of all layers; a pytree. Slot s of row b holds the row's s-th token if s < length_B[b]."""

    k_LBSKH: jax.Array
    v_LBSKH: jax.Array
    length_B: jax.Array  # int32: tokens held


def check_backend(backend: str) -> None:
    """Refuse a name that is no backend.

    Raises:
        ValueError: with the names there are.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"model.attention = {backend!r} is no backend; choose one of {', '.join(get_args(Backend))}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """How a layer's scores come about, beside q k."""

    scale: float
    cap: float | None  # squeezed into +- this before the mask
    sinks_N: jax.Array | None  # one more score of each query head, of no key: its share of the softmax goes nowhere
    window: int | jax.Array | None  # tokens back that are seen, the token itself included; None: all


def attention(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, *, segments_BT: jax.Array, scores: Scores, backend: str
) -> jax.Array:
    """Causal attention inside the segments of packed rows; every backend is exact."""
    check_backend(backend)
    length = q_BTNH.shape[1]
    if backend == "auto":
        backend = "xla" if length <= LONGEST_DENSE else "chunked"
    if backend == "xla":
        return _attend(q_BTNH, k_BTKH, v_BTKH, _packed_mask(segments_BT, segments_BT, 0, scores.window), scores)
    # Keys after the last query of a group are masked for all of the group: static slices leave them out, which saves
    # up to half of the work. Eight groups keep the program small.
    group = _round_up(-(-length // 8), CHUNK)
    ends = [min(start + group, length) for start in range(0, length, group)]
    parts = [
        _attend_in_chunks(
            q_BTNH[:, start:end], k_BTKH[:, :end], v_BTKH[:, :end], segments_BT[:, :end], scores, first_query=start
        )
        for start, end in zip([0, *ends], ends, strict=False)
    ]
    return jnp.concatenate(parts, axis=1)


def cached_attention(
    q_B1NH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, *, last_slot_B: jax.Array, scores: Scores
) -> jax.Array:
    """Attention of one new token a row to all slots up to its own, `last_slot_B`, as far as the window goes."""
    back_B1S = last_slot_B[:, None, None] - jnp.arange(k_BSKH.shape[1], dtype=jnp.int32)[None, None, :]
    return _attend(q_B1NH, k_BSKH, v_BSKH, _is_seen(back_B1S, scores.window), scores)


def put_in_rows(x_LBSKH: jax.Array, new_LB1KH: jax.Array, slot_B: jax.Array) -> jax.Array:
    """The cache with one new token a row, at slot_B[b] of row b; a row without such a slot stays as it is.

    Donate the cache under jit: in float32 on one device nothing of it moves then but the new tokens.
    """
    slots, mesh = x_LBSKH.shape[2], jax.sharding.get_abstract_mesh()
    if x_LBSKH.dtype != jnp.float32 or mesh.size > 1:
        # One selection over all of the cache: it leaves rows on their devices, and XLA:CPU would turn a bfloat16
        # scatter, or a bfloat16 cache carried through a loop, into float32 copies of the whole cache.
        is_new_BS = jnp.arange(slots, dtype=jnp.int32)[None, :] == slot_B[:, None]
        return jnp.where(is_new_BS[None, :, :, None, None], new_LB1KH, x_LBSKH)

    def put(b: jax.Array, x_LBSKH: jax.Array) -> jax.Array:
        zero, slot = jnp.int32(0), jnp.minimum(slot_B[b], slots - 1)
        here = (zero, b, slot, zero, zero)
        new_L11KH = jax.lax.dynamic_slice_in_dim(new_LB1KH, b, 1, axis=1)
        old_L11KH = jax.lax.dynamic_slice(x_LBSKH, here, new_L11KH.shape)
        return jax.lax.dynamic_update_slice(x_LBSKH, jnp.where(slot_B[b] < slots, new_L11KH, old_L11KH), here)

    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(x_LBSKH.shape[1]), put, x_LBSKH)


def _attend(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array, scores: Scores) -> jax.Array:
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32) * scores.scale
    scores_BKGTS = capped(scores_BKGTS, scores.cap)
    scores_BKGTS = jnp.where(mask_BTS[:, None, None, :, :], scores_BKGTS, _MASKED)
    sinks_KG = None if scores.sinks_N is None else scores.sinks_N.astype(jnp.float32).reshape(K, N // K)
    shares_BKGTS = _shares(scores_BKGTS, sinks_KG).astype(v_BSKH.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", shares_BKGTS, v_BSKH).reshape(B, T, N, H)


def _shares(scores_BKGTS: jax.Array, sinks_KG: jax.Array | None) -> jax.Array:
    """Softmax over the keys and, if there is one, the sink, whose share is left out: they sum to less than one."""
    if sinks_KG is None:
        return jax.nn.softmax(scores_BKGTS, axis=-1)
    sinks_1KG11 = sinks_KG[None, :, :, None, None]
    top_BKGT1 = jnp.maximum(scores_BKGTS.max(axis=-1, keepdims=True), sinks_1KG11)
    top_BKGT1 = jax.lax.stop_gradient(top_BKGT1)  # taken off above and below, it changes nothing
    exp_BKGTS = jnp.exp(scores_BKGTS - top_BKGT1)
    # Not a column more of scores: that would be a copy of all of them.
    return exp_BKGTS / (exp_BKGTS.sum(axis=-1, keepdims=True) + jnp.exp(sinks_1KG11 - top_BKGT1))


def _is_seen(back: jax.Array, window: int | jax.Array | None) -> jax.Array:
    """Whether a key so many tokens back is seen; one ahead (back < 0) never is."""
    return back >= 0 if window is None else (back >= 0) & (back < window)


def _packed_mask(
    q_segments_BT: jax.Array,
    k_segments_BS: jax.Array,
    first_query: int | jax.Array,
    window: int | jax.Array | None,
) -> jax.Array:
    """Same segment, seen, not later; query t of this piece lies at position first_query + t of the row."""
    queries_T = first_query + jnp.arange(q_segments_BT.shape[1], dtype=jnp.int32)
    keys_S = jnp.arange(k_segments_BS.shape[1], dtype=jnp.int32)
    is_seen_TS = _is_seen(queries_T[:, None] - keys_S[None, :], window)
    return (q_segments_BT[:, :, None] == k_segments_BS[:, None, :]) & is_seen_TS[None, :, :]


def _attend_in_chunks(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segments_BS: jax.Array,
    scores: Scores,
    *,
    first_query: int,
) -> jax.Array:
    """The last T queries of S positions, a chunk after the other; the backward pass computes the scores again."""
    B, T = q_BTNH.shape[:2]
    chunks = -(-T // CHUNK)

    @functools.partial(jax.checkpoint, prevent_cse=chunks == 1)
    def attend(q_BTNH: jax.Array, segments_BT: jax.Array, first: jax.Array) -> jax.Array:
        mask_BTS = _packed_mask(segments_BT, segments_BS, first, scores.window)
        return _attend(q_BTNH, k_BSKH, v_BSKH, mask_BTS, scores)

    segments_BT = segments_BS[:, first_query:]
    if chunks == 1:  # a loop of one trip is inlined late by XLA:CPU, into bfloat16 products that it cannot run
        return attend(q_BTNH, segments_BT, jnp.int32(first_query))

    def cut(x_BT: jax.Array) -> jax.Array:
        padding = [(0, 0), (0, chunks * CHUNK - T)] + [(0, 0)] * (x_BT.ndim - 2)
        return jnp.moveaxis(jnp.pad(x_BT, padding).reshape(B, chunks, CHUNK, *x_BT.shape[2:]), 1, 0)

    first_C = first_query + CHUNK * jnp.arange(chunks, dtype=jnp.int32)
    out_CBTNH = jax.lax.map(lambda of_chunk: attend(*of_chunk), (cut(q_BTNH), cut(segments_BT), first_C))
    return jnp.moveaxis(out_CBTNH, 0, 1).reshape(B, chunks * CHUNK, *q_BTNH.shape[2:])[:, :T]


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
