"""Mixture of experts: in place of one MLP, each token goes through the few of many that a router chooses for it.

In: activations, the router's matrix, and the experts' matrices and biases, stacked. Out: the weighted sum of what the
chosen experts say. No token is dropped and no expert is padded: tokens are sorted by expert and multiplied as groups of
any size (MegaBlocks, arXiv 2211.15841), so what becomes of a token does not hang on the others in its batch.
The load-balancing loss is that of Switch Transformers (arXiv 2101.03961), as transformers computes it, row by row.

B batch row, T position, D model width, F MLP width, E experts, L layers; J choice of a token (the best expert first),
M pair of a token and a choice.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from jax_sft.model.layers import Gating, gated
from jax_sft.model.lora import Factors, both_factors
from jax_sft.sharding import BATCH_AXES, WEIGHT_AXIS_OF_LETTER, batch_shards, constrain


class Routing(NamedTuple):
    """Which experts each token goes to, and with what weight."""

    experts_BTJ: jax.Array  # int32
    weights_BTJ: jax.Array  # float32
    shares_BTE: jax.Array  # float32, the softmax over all experts


class Biases(NamedTuple):
    """What each expert adds to its three products."""

    gate_EF: jax.Array
    up_EF: jax.Array
    down_ED: jax.Array


class LowRank(NamedTuple):
    """What is added to the matrices of the experts: A B of each."""

    a: Any  # [E, inputs, R]
    b: Any  # [E, R, outputs], scaled


def low_rank(factors: Factors | None) -> LowRank | None:
    """The adapters of one kind of matrix, with their scale in B."""
    if factors is None:
        return None
    a, b = both_factors(factors)
    return LowRank(a, b * factors["scale"])


class Load(NamedTuple):
    """How the tokens of each row are spread over the experts, as sums; float32."""

    chosen_BE: jax.Array  # tokens that go to an expert
    shares_BE: jax.Array  # sum of its shares


def route(
    x_BTD: jax.Array, router_DE: jax.Array, bias_E: jax.Array | None, *, experts_per_token: int, normalised: bool
) -> Routing:
    """The best experts of each token by a softmax over all of them, in float32.

    `normalised`: weights of a token are divided by their sum; that is the softmax over the chosen ones alone.
    """
    logits_BTE = jnp.einsum("BTD,DE->BTE", x_BTD, router_DE.astype(x_BTD.dtype), preferred_element_type=jnp.float32)
    logits_BTE = constrain(logits_BTE, "BTE")  # all of a token's experts in one place, wherever their matrices lie
    if bias_E is not None:
        logits_BTE += bias_E.astype(jnp.float32)[None, None, :]
    shares_BTE = jax.nn.softmax(logits_BTE, axis=-1)
    weights_BTJ, experts_BTJ = jax.lax.top_k(shares_BTE, experts_per_token)
    if normalised:
        weights_BTJ = weights_BTJ / weights_BTJ.sum(axis=-1, keepdims=True)
    return Routing(experts_BTJ, weights_BTJ, shares_BTE)


def apply_experts(
    x_BTD: jax.Array,
    routing: Routing,
    gate_EDF: jax.Array,
    up_EDF: jax.Array,
    down_EFD: jax.Array,
    biases: Biases | None,
    adapters: Sequence[LowRank | None] = (None, None, None),
    *,
    gating: Gating,
) -> jax.Array:
    """Each token through its experts, [B, T, D], in the dtype of `x_BTD`; `adapters` are those of gate, up and down.

    On a mesh each device sorts and multiplies its own rows; F lies over tensor, as in a dense MLP. Where E lies over
    the expert axis, the devices along it exchange their rows, multiply those of their own experts, and add up.
    """
    biases_EF = None if biases is None else (biases.gate_EF, biases.up_EF)
    out_BTD = _apply(x_BTD, routing, gate_EDF, up_EDF, down_EFD, biases_EF, tuple(adapters), gating)
    # The last bias needs no sorting; and inside, each of the devices that F lies over would add it.
    return out_BTD if biases is None else out_BTD + _mixed(biases.down_ED, routing, x_BTD.dtype)


def _mixed(bias_ED: jax.Array, routing: Routing, dtype: jnp.dtype) -> jax.Array:
    """The weighted sum of the rows of each token's experts."""
    is_chosen_BTJE = routing.experts_BTJ[:, :, :, None] == _ids(bias_ED.shape[0])[None, None, None, :]
    weights_BTE = jnp.where(is_chosen_BTJE, routing.weights_BTJ[:, :, :, None], jnp.float32(0)).sum(axis=2)
    return jnp.einsum("BTE,ED->BTD", weights_BTE.astype(dtype), bias_ED.astype(dtype))


def _apply(
    x_BTD: jax.Array,
    routing: Routing,
    gate_EDF: jax.Array,
    up_EDF: jax.Array,
    down_EFD: jax.Array,
    biases_EF: tuple[jax.Array, jax.Array] | None,
    adapters: tuple[LowRank | None, ...],
    gating: Gating,
) -> jax.Array:
    cast = functools.partial(jax.tree.map, lambda w: w.astype(x_BTD.dtype))
    weights = cast((gate_EDF, up_EDF, down_EFD, biases_EF, adapters))  # first: less is gathered over fsdp
    own = functools.partial(_apply_to_own_rows, gating=gating)
    arguments = (x_BTD, routing.experts_BTJ, routing.weights_BTJ.astype(x_BTD.dtype), *weights)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return own(*arguments)

    def axis_of(letter: str, size: int) -> str | None:
        axis = WEIGHT_AXIS_OF_LETTER[letter]
        return axis if mesh.shape[axis] > 1 and size % mesh.shape[axis] == 0 else None

    rows = BATCH_AXES if x_BTD.shape[0] % batch_shards(mesh) == 0 else None
    cut_E, cut_F = axis_of("E", up_EDF.shape[0]), axis_of("F", up_EDF.shape[-1])

    def own_and_sum(x_BTD: Any, experts_BTJ: Any, weights_BTJ: Any, *rest: Any) -> jax.Array:
        tokens, first_expert = (x_BTD, experts_BTJ, weights_BTJ), None
        if cut_E is not None:
            first_expert = jax.lax.axis_index(cut_E) * (up_EDF.shape[0] // mesh.shape[cut_E])
            if rows is not None:
                tokens = tuple(jax.lax.all_gather(x, cut_E, axis=0, tiled=True) for x in tokens)
            else:
                # Said aloud: the gradient of taking rows in an order of each device's own leaves out the sum over them.
                tokens = tuple(jax.lax.pcast(x, cut_E, to="varying") for x in tokens)
        out_BTD = own(*tokens, *rest, first_expert=first_expert)
        if cut_F is not None:
            out_BTD = jax.lax.psum(out_BTD, cut_F)
        if cut_E is None:
            return out_BTD
        if rows is None:
            return jax.lax.psum(out_BTD, cut_E)
        return jax.lax.psum_scatter(out_BTD, cut_E, scatter_dimension=0, tiled=True)

    by_row, by_column = PartitionSpec(rows), PartitionSpec(cut_E, None, cut_F)
    by_line = PartitionSpec(cut_E, cut_F)  # [E, F, D], and biases [E, F]
    by_expert = PartitionSpec(cut_E)
    low_ranks = (LowRank(by_expert, by_column), LowRank(by_expert, by_column), LowRank(by_line, by_expert))
    in_specs = (
        *(by_row, by_row, by_row, by_column, by_column, by_line),
        None if biases_EF is None else (by_line,) * 2,
        tuple(spec if adapter else None for spec, adapter in zip(low_ranks, adapters, strict=True)),
    )
    return jax.shard_map(own_and_sum, in_specs=in_specs, out_specs=by_row)(*arguments)


def _apply_to_own_rows(
    x_BTD: jax.Array,
    experts_BTJ: jax.Array,
    weights_BTJ: jax.Array,
    gate_EDF: jax.Array,
    up_EDF: jax.Array,
    down_EFD: jax.Array,
    biases_EF: tuple[jax.Array, jax.Array] | None,
    adapters: tuple[LowRank | None, ...],
    *,
    gating: Gating,
    first_expert: jax.Array | None = None,
) -> jax.Array:
    """Sort the pairs of token and choice by expert, multiply group by group, put them back.

    experts_BTJ  (2 0) (0 1)   pairs of tokens a, b   a2 a0 b0 b1   sorted   a0 b0 b1 a2   sizes_E   2 1 1

    With `first_expert` the E experts are a part of all, from that one on; pairs of other experts come last and add 0.
    """
    B, T, D = x_BTD.shape
    J, E = experts_BTJ.shape[-1], gate_EDF.shape[0]
    experts_M = experts_BTJ.reshape(-1)
    if first_expert is not None:
        experts_M = experts_M - first_expert
        experts_M = jnp.where((experts_M >= 0) & (experts_M < E), experts_M, E)
    order_M = checkpoint_name(jnp.argsort(experts_M), "sorted")
    place_M = checkpoint_name(jnp.argsort(order_M), "sorted")
    is_of_ME = experts_M[:, None] == _ids(E)[None, :]
    sizes_E = checkpoint_name(is_of_ME.sum(axis=0, dtype=jnp.int32), "sorted")
    # A product again, and not each pair's row taken: the gradient of that would be a scatter, see below.
    picks_ME = None if biases_EF is None else _permuted(is_of_ME, order_M).astype(x_BTD.dtype)

    def of_these(x: jax.Array) -> jax.Array:
        # What a kernel writes to rows after the last group, and what it gives them as a gradient, is its own affair.
        is_of_these_M = jnp.arange(x.shape[0], dtype=jnp.int32) < sizes_E.sum()
        return x if first_expert is None else jnp.where(is_of_these_M[:, None], x, jnp.zeros((), x.dtype))

    def grouped(x: jax.Array, weights: jax.Array) -> jax.Array:
        return of_these(jax.lax.ragged_dot(of_these(x), weights, sizes_E))

    def adapted(x: jax.Array, *kernels: tuple[jax.Array, LowRank | None, jax.Array | None]) -> list[jax.Array]:
        """Products of one input with several matrices of each expert; their adapters share the first product."""
        outs = [grouped(x, kernel) for kernel, _, _ in kernels]
        firsts = [low.a for _, low, _ in kernels if low is not None]
        u = checkpoint_name(grouped(x, jnp.concatenate(firsts, axis=-1)), "grouped") if firsts else None
        start = 0
        for i, (_, low, bias_EF) in enumerate(kernels):
            if low is not None and u is not None:
                outs[i] += grouped(u[:, start : start + low.a.shape[-1]], low.b)
                start += low.a.shape[-1]
            if bias_EF is not None:
                outs[i] += jnp.einsum("ME,EF->MF", picks_ME, bias_EF)
        return [checkpoint_name(out, "grouped") for out in outs]

    # Repeated and then permuted, not taken by token: the gradient is then a permutation and a sum, and no scatter in
    # which several pairs meet, whose order of adding differs from run to run on a GPU.
    x_MD = _permuted(jnp.broadcast_to(x_BTD[:, :, None, :], (B, T, J, D)).reshape(-1, D), order_M)
    x_MD = checkpoint_name(x_MD, "sorted")
    gate_bias_EF, up_bias_EF = biases_EF or (None, None)
    low_gate, low_up, low_down = adapters
    gate_MF, up_MF = adapted(x_MD, (gate_EDF, low_gate, gate_bias_EF), (up_EDF, low_up, up_bias_EF))
    (out_MD,) = adapted(gated(gate_MF, up_MF, gating), (down_EFD, low_down, None))
    out_BTJD = _permuted(out_MD, place_M).reshape(B, T, J, D)
    return jnp.einsum("BTJD,BTJ->BTD", out_BTJD, weights_BTJ)


def _permuted(x_MD: jax.Array, order_M: jax.Array) -> jax.Array:
    return x_MD.at[order_M].get(unique_indices=True, mode="promise_in_bounds", wrap_negative_indices=False)


def _ids(experts: int) -> jax.Array:
    return jnp.arange(experts, dtype=jnp.int32)


def load_of(routing: Routing, counts_BT: jax.Array) -> Load:
    """The load of one layer, of the tokens that count (padding does not)."""
    ids_E = _ids(routing.shares_BTE.shape[-1])
    is_chosen_BTE = (routing.experts_BTJ[:, :, :, None] == ids_E[None, None, None, :]).any(axis=2)
    counts_BT1 = counts_BT[:, :, None]
    return Load(
        (is_chosen_BTE & counts_BT1).sum(axis=1, dtype=jnp.float32),
        jnp.where(counts_BT1, routing.shares_BTE, jnp.float32(0)).sum(axis=1),
    )


def imbalance(load_L: Load, counts_BT: jax.Array) -> jax.Array:
    """Sum over rows of (its tokens that count) x (its load-balancing loss): a sum, to be divided by all such tokens.

    A row's loss is E x sum over experts of (tokens an expert gets, per token) x (its mean share), both over all layers:
    `load_balancing_loss_func` of transformers for a batch of that one row. A batch of several rows is one unit there,
    and micro-batches and devices are others; here the row is the unit, so that neither changes the gradient.

    Args:
        load_L: the load of each layer, [L, B, E].
    """
    layers, experts = load_L.chosen_BE.shape[0], load_L.chosen_BE.shape[-1]
    tokens_B = counts_BT.sum(axis=1, dtype=jnp.float32)
    products_BE = load_L.chosen_BE.sum(axis=0) * load_L.shares_BE.sum(axis=0) / layers**2
    return experts * (products_BE.sum(axis=1) / jnp.maximum(tokens_B, 1.0)).sum()
