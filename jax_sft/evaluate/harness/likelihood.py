"""How likely a model finds given tokens: log-probabilities at a few positions of many rows, batched by length.

In: rows of tokens, each with positions and the token that should follow there. Out: for each, its log-probability and
whether it is the likeliest token. Rows are rounded up to a few lengths, the longest first; the head runs only where a
token is asked for, a few positions at a time, so that full logits never exist.

B row, T position, P asked position, C asked position of a part, D model width, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jax_sft.sharding import batch_shards, constrain, replicated

_SHORTEST = 64  # tokens
_FEWEST = 4  # asked positions
_LOGITS_ROWS = 1024  # positions whose logits exist at once


@dataclasses.dataclass(frozen=True)
class Row:
    """Tokens, and what should follow some of them: `targets[i]` behind `tokens[at[i]]`. A position may be asked twice.

    tokens  5 6 7 8     at  2 3     targets  8 9
    """

    tokens: Sequence[int]
    at: Sequence[int]
    targets: Sequence[int]


@dataclasses.dataclass(frozen=True)
class Scored:
    """Of each target of a row: its log-probability (nats, float32 [P]), and whether no token is likelier ([P])."""

    logprob_P: np.ndarray
    is_best_P: np.ndarray


def score(
    graphdef: Any,
    params: Any,
    rows: Sequence[Row],
    *,
    batch_size: int,
    mesh: Mesh,
    on_scored: Callable[[int], None] = lambda _: None,
) -> list[Scored]:
    """Score every row; rows do not see each other. Every process calls it and gets all of them.

    Args:
        batch_size: a multiple of the parts that the mesh cuts rows into.
        on_scored: called with a row's number once it is done.
    """
    scored: dict[int, Scored] = {}
    size = min(batch_size, _up(len(rows), batch_shards(mesh)))
    for batch in batches_of(rows, size):
        length = bucket(max(len(rows[row].tokens) for row in batch))
        width = _power(max(len(rows[row].at) for row in batch), least=_FEWEST)
        tokens_BT = np.zeros((size, length), np.int32)
        length_B = np.ones(size, np.int32)  # rows that fill the batch up hold one token
        at_BP, target_BP = np.zeros((2, size, width), np.int32)
        for b, row in enumerate(rows[i] for i in batch):
            tokens_BT[b, : len(row.tokens)], length_B[b] = row.tokens, len(row.tokens)
            at_BP[b, : len(row.at)], target_BP[b, : len(row.at)] = row.at, row.targets
        run = _scorer(mesh, max(1, _LOGITS_ROWS // size))
        with jax.set_mesh(mesh):
            found = run(graphdef, params, tokens_BT, length_B, at_BP, target_BP)
        logprob_BP, is_best_BP = (np.asarray(x.addressable_data(0)) for x in found)
        for b, i in enumerate(batch):
            asked = len(rows[i].at)
            scored[i] = Scored(logprob_BP[b, :asked], is_best_BP[b, :asked])
            on_scored(i)
    return [scored[i] for i in range(len(rows))]


def batches_of(rows: Sequence[Row], size: int) -> Iterator[list[int]]:
    """Numbers of rows, the longest first; in a batch, lengths and counts of targets are about the same."""
    order = sorted(range(len(rows)), key=lambda i: (-bucket(len(rows[i].tokens)), -len(rows[i].at), i))
    yield from (order[start : start + size] for start in range(0, len(order), size))


def bucket(length: int) -> int:
    """A length rounded up to 64, 128, 192, 256, 384, 512, ...: two in each octave, so that few programs compile."""
    power = _power(length, least=_SHORTEST)
    return 3 * power // 4 if power > 2 * _SHORTEST and length <= 3 * power // 4 else power


def _power(number: int, *, least: int) -> int:
    return max(least, 1 << (number - 1).bit_length())


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


@functools.lru_cache
def _scorer(mesh: Mesh, positions_at_once: int) -> Any:
    def scored(
        graphdef: Any, params: Any, tokens_BT: Any, length_B: Any, at_BP: Any, target_BP: Any
    ) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graphdef, params)
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None, :], tokens_BT.shape)
        segments_BT = (positions_BT < length_B[:, None]).astype(jnp.int32)
        h_BTD = model.hidden(tokens_BT, positions_BT, segments_BT)
        h_BPD = constrain(jnp.take_along_axis(h_BTD, at_BP[:, :, None], axis=1), "BPD")

        def part(start: jax.Array) -> tuple[jax.Array, jax.Array]:
            h_BCD = jax.lax.dynamic_slice_in_dim(h_BPD, start, width, axis=1)
            target_BC = jax.lax.dynamic_slice_in_dim(target_BP, start, width, axis=1)
            logits_BCV = model.logits(h_BCD)
            target_logit_BC = jnp.take_along_axis(logits_BCV, target_BC[:, :, None], axis=2)[:, :, 0]
            logprob_BC = target_logit_BC - jax.nn.logsumexp(logits_BCV, axis=-1)
            return logprob_BC, jnp.argmax(logits_BCV, axis=-1).astype(jnp.int32) == target_BC

        B, P = at_BP.shape
        width = min(P, 1 << (positions_at_once.bit_length() - 1))  # P is a power of two, and so divides
        parts = jax.lax.map(part, jnp.arange(0, P, width, dtype=jnp.int32))
        logprob_BP, is_best_BP = (jnp.swapaxes(x, 0, 1).reshape(B, P) for x in parts)
        return logprob_BP, is_best_BP

    return jax.jit(scored, static_argnums=0, out_shardings=replicated(mesh))
