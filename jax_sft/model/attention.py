"""Attention over packed rows and over a key-value cache.

In: q_BTNH, k_BSKH, v_BSKH (rotated already) and who may see whom. Out: attended_BTNH.
A query sees a key that is not later and lies in the same segment; padding (segment 0) sees padding alone, so that no
row of the softmax is empty and nothing leaks. Scores and softmax are float32.

B batch row, T query position, S key position (slot), N query heads, K key and value heads, G = N / K, H head width,
L layers, C query chunks.
"""

import functools
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

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
        raise ValueError(f"attention = {backend!r} is not a backend; choose one of {', '.join(get_args(Backend))}")


def attention(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, *, segments_BT: jax.Array, backend: str
) -> jax.Array:
    """Causal attention inside the segments of packed rows; exact on every backend."""
    length = q_BTNH.shape[1]
    slots_BT = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None, :], segments_BT.shape)
    if _resolve(backend, length) == "xla":
        return _dense(q_BTNH, k_BTKH, v_BTKH, slots_BT, segments_BT, segments_BT)
    # Keys after the last query of a group are masked for all of the group: static slices leave them out, which saves
    # up to half of the work. Eight groups keep the program small.
    group = _round_up(-(-length // 8), CHUNK)
    parts = []
    for start in range(0, length, group):
        rows = slice(start, min(start + group, length))
        keys = slice(0, rows.stop)
        part = _chunked(
            q_BTNH[:, rows],
            k_BTKH[:, keys],
            v_BTKH[:, keys],
            slots_BT[:, rows],
            segments_BT[:, rows],
            segments_BT[:, keys],
        )
        parts.append(part)
    return jnp.concatenate(parts, axis=1)


def cached_attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, *, slots_BT: jax.Array, backend: str
) -> jax.Array:
    """Attention of new tokens, which lie in `slots_BT`, to all slots up to their own."""
    attend = _dense if _resolve(backend, q_BTNH.shape[1]) == "xla" else _chunked
    return attend(q_BTNH, k_BSKH, v_BSKH, slots_BT, None, None)


def _resolve(backend: str, length: int) -> str:
    check_backend(backend)
    if backend == "auto":
        return "xla" if length <= LONGEST_DENSE else "chunked"
    return backend


def _dense(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    slots_BT: jax.Array,
    q_segments_BT: jax.Array | None,
    k_segments_BS: jax.Array | None,
) -> jax.Array:
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    mask_BTS = jnp.arange(S, dtype=jnp.int32)[None, None, :] <= slots_BT[:, :, None]
    if q_segments_BT is not None and k_segments_BS is not None:
        mask_BTS &= q_segments_BT[:, :, None] == k_segments_BS[:, None, :]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32) * H**-0.5
    scores_BKGTS = jnp.where(mask_BTS[:, None, None, :, :], scores_BKGTS, _MASKED)
    shares_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKH.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", shares_BKGTS, v_BSKH).reshape(B, T, N, H)


def _chunked(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    slots_BT: jax.Array,
    q_segments_BT: jax.Array | None,
    k_segments_BS: jax.Array | None,
) -> jax.Array:
    """`_dense`, a chunk of queries after the other; the backward pass computes each chunk's scores again."""
    B, T = slots_BT.shape
    chunks = -(-T // CHUNK)

    @functools.partial(jax.checkpoint, prevent_cse=chunks == 1)
    def attend(of_chunk: tuple[jax.Array, jax.Array, jax.Array | None]) -> jax.Array:
        q_BTNH, slots_BT, segments_BT = of_chunk
        return _dense(q_BTNH, k_BSKH, v_BSKH, slots_BT, segments_BT, k_segments_BS)

    if chunks == 1:  # a loop of one trip is inlined late by XLA:CPU, into bfloat16 products that it cannot run
        return attend((q_BTNH, slots_BT, q_segments_BT))

    def cut(x_BT: jax.Array | None) -> jax.Array | None:
        if x_BT is None:
            return None
        rest = [(0, chunks * CHUNK - T)] + [(0, 0)] * (x_BT.ndim - 2)
        padded_BT = jnp.pad(x_BT, [(0, 0), *rest])
        return jnp.moveaxis(padded_BT.reshape(B, chunks, CHUNK, *x_BT.shape[2:]), 1, 0)

    out_CBTNH = jax.lax.map(attend, (cut(q_BTNH), cut(slots_BT), cut(q_segments_BT)))
    return jnp.moveaxis(out_CBTNH, 0, 1).reshape(B, chunks * CHUNK, *q_BTNH.shape[2:])[:, :T]


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
