"""Mixture of experts: in place of one MLP, each token goes through the few of many that a router chooses for it.

In: activations, the router's matrix, and the experts' matrices, stacked. Out: the weighted sum of what the chosen
experts say. No token is dropped and no expert is padded: tokens are sorted by expert and multiplied as groups of any
size (MegaBlocks, arXiv 2211.15841), so what becomes of a token does not hang on the others in its batch.
The load-balancing loss is that of Switch Transformers (arXiv 2101.03961), as transformers computes it, row by row.

B batch row, T position, D model width, F MLP width, E experts, L layers; J choice of a token (the best expert first),
M pair of a token and a choice.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from jax_sft.model.config import Activation
from jax_sft.model.layers import activate
from jax_sft.sharding import BATCH_AXES, WEIGHT_AXIS_OF_LETTER


class Routing(NamedTuple):
    """Which experts each token goes to, and with what weight."""

    experts_BTJ: jax.Array  # int32
    weights_BTJ: jax.Array  # float32
    shares_BTE: jax.Array  # float32, the softmax over all experts


class Load(NamedTuple):
    """How the tokens of each row are spread over the experts, as sums; float32."""

    chosen_BE: jax.Array  # tokens that go to an expert
    shares_BE: jax.Array  # sum of its shares


def route(x_BTD: jax.Array, router_DE: jax.Array, *, experts_per_token: int, normalised: bool) -> Routing:
    """The best experts of each token by a softmax over all of them, in float32.

    `normalised`: weights of a token are divided by their sum; that is the softmax over the chosen ones alone.
    """
    logits_BTE = jnp.einsum("BTD,DE->BTE", x_BTD, router_DE.astype(x_BTD.dtype), preferred_element_type=jnp.float32)
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
    activation: Activation,
) -> jax.Array:
    """Each token through its experts, [B, T, D], in the dtype of `x_BTD`.

    On a mesh each device sorts and multiplies its own rows; F lies over tensor, as in a dense MLP.
    """
    weights = [w.astype(x_BTD.dtype) for w in (gate_EDF, up_EDF, down_EFD)]  # cast first: less is gathered over fsdp
    own = functools.partial(_apply_to_own_rows, activation=activation)
    arguments = (x_BTD, routing.experts_BTJ, routing.weights_BTJ.astype(x_BTD.dtype), *weights)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return own(*arguments)
    tensor = WEIGHT_AXIS_OF_LETTER["F"]
    rows = BATCH_AXES if x_BTD.shape[0] % math.prod(mesh.shape[axis] for axis in BATCH_AXES) == 0 else None
    cut = tensor if up_EDF.shape[-1] % mesh.shape[tensor] == 0 else None

    def own_and_sum(*arguments: jax.Array) -> jax.Array:
        out_BTD = own(*arguments)
        return out_BTD if cut is None else jax.lax.psum(out_BTD, cut)

    by_row, by_column, by_line = PartitionSpec(rows), PartitionSpec(None, None, cut), PartitionSpec(None, cut)
    return jax.shard_map(
        own_and_sum, in_specs=(by_row, by_row, by_row, by_column, by_column, by_line), out_specs=by_row
    )(*arguments)


def _apply_to_own_rows(
    x_BTD: jax.Array,
    experts_BTJ: jax.Array,
    weights_BTJ: jax.Array,
    gate_EDF: jax.Array,
    up_EDF: jax.Array,
    down_EFD: jax.Array,
    *,
    activation: Activation,
) -> jax.Array:
    """Sort the pairs of token and choice by expert, multiply group by group, put them back.

    experts_BTJ  (2 0) (0 1)   pairs of tokens a, b   a2 a0 b0 b1   sorted   a0 b0 b1 a2   sizes_E   2 1 1
    """
    B, T, D = x_BTD.shape
    J, E = experts_BTJ.shape[-1], gate_EDF.shape[0]
    experts_M = experts_BTJ.reshape(-1)
    order_M = jnp.argsort(experts_M)
    place_M = jnp.argsort(order_M)
    sizes_E = (experts_M[:, None] == jnp.arange(E, dtype=experts_M.dtype)[None, :]).sum(axis=0, dtype=jnp.int32)

    def grouped(x: jax.Array, weights: jax.Array) -> jax.Array:
        return checkpoint_name(jax.lax.ragged_dot(x, weights, sizes_E), "grouped")

    # Repeated and then permuted, not taken by token: the gradient is then a permutation and a sum, and no scatter in
    # which several pairs meet, whose order of adding differs from run to run on a GPU.
    x_MD = _permuted(jnp.broadcast_to(x_BTD[:, :, None, :], (B, T, J, D)).reshape(-1, D), order_M)
    inner_MF = activate(grouped(x_MD, gate_EDF), activation) * grouped(x_MD, up_EDF)
    out_BTJD = _permuted(grouped(inner_MF, down_EFD), place_M).reshape(B, T, J, D)
    return jnp.einsum("BTJD,BTJ->BTD", out_BTJD, weights_BTJ)


def _permuted(x_MD: jax.Array, order_M: jax.Array) -> jax.Array:
    return x_MD.at[order_M].get(unique_indices=True, mode="promise_in_bounds", wrap_negative_indices=False)


def load_of(routing: Routing, counts_BT: jax.Array) -> Load:
    """The load of one layer, of the tokens that count (padding does not)."""
    ids_E = jnp.arange(routing.shares_BTE.shape[-1], dtype=routing.experts_BTJ.dtype)
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
