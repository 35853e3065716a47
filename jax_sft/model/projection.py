"""Linear maps of a block, with what adapts them: several of one input at once, so that their adapters share a product.

In: an input, the weights of a layer, the names of projections. Out: one output for each, in the dtype of the input.
Of q, k and v the first factors lie side by side and meet the input in one skinny product:

    x [.., D] @ (A_q | A_k | A_v) [D, 3 R]  ->  u_q | u_k | u_v      q = x W_q + u_q B_q

A frozen kernel may be quantised; it is dequantised here, where it is used, so one layer at a time.

B batch row, T position, D model width, F MLP width, N/K heads, H head width, R rank.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_sft.model.lora import Factors, both_factors, letters, magnitude_of, output_gain
from jax_sft.model.quantize import Quantized, dense

# Of one layer: names as in the tree, without the L. Under "adapters" factors by the name of their weight.
Weights = Mapping[str, Any]


class Dropout(NamedTuple):
    """Zeros among what goes into adapters; each row draws from a key of its own, so micro-batches change nothing."""

    keys_B: jax.Array
    rate: float

    def of_layer(self, layer: jax.Array) -> "Dropout":
        """Keys of one layer."""
        return Dropout(_folded(self.keys_B, layer), self.rate)

    def __call__(self, x: jax.Array, site: str) -> jax.Array:
        """`x` [B, ...] with zeros, the rest scaled up to make up for them (Srivastava et al. 2014)."""
        keys_B = _folded(self.keys_B, jnp.uint32(int.from_bytes(site.encode()[:4], "big")))
        kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - self.rate, x.shape[1:]))(keys_B)
        return jnp.where(kept, x / (1 - self.rate), jnp.zeros((), x.dtype))


def _folded(keys_B: jax.Array, number: jax.Array) -> jax.Array:
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys_B)


def project(x: jax.Array, weights: Weights, *names: str, dropout: Dropout | None = None) -> list[jax.Array]:
    """Linear maps of `x` by the kernels of those names ("q_DNH", "k_DKH"), with biases and adapters where there are.

    Args:
        x: [B, T, inputs], in the computing dtype.
        dropout: of what the adapters see; None: they see all.
    """
    outputs = [_product(x, weights[name]) for name in names]
    adapters = weights.get("adapters", {})
    adapted = [name for name in names if name in adapters]
    if adapted:
        seen = x if dropout is None else dropout(x, adapted[0])
        low_ranks = dict(zip(adapted, _first_products(seen, [adapters[name] for name in adapted]), strict=True))
    for i, name in enumerate(names):
        if name in adapted:
            outputs[i] = _adapted(outputs[i], low_ranks[name], weights[name], adapters[name])
        bias = weights.get(_bias_name(name))
        if bias is not None:
            outputs[i] = outputs[i] + jnp.broadcast_to(bias.astype(x.dtype), outputs[i].shape)
    return outputs


def _bias_name(name: str) -> str:
    return f"{name.rsplit('_', 1)[0]}_bias_{letters(name).outputs}"


def _product(x: jax.Array, kernel: Any) -> jax.Array:
    def multiply(x: jax.Array, kernel: Any) -> jax.Array:
        return _flat_product(x, dense(kernel, x.dtype))

    if isinstance(kernel, Quantized):
        # Made anew in the backward pass: stored, the dequantised kernels of all layers would be there at one time.
        return jax.checkpoint(multiply, prevent_cse=False)(x, kernel)
    return multiply(x, kernel)


def _first_products(x: jax.Array, adapters: Sequence[Factors]) -> list[jax.Array]:
    """x A of each, in one product; [B, T, R] each."""
    firsts = [both_factors(factors)[0].astype(x.dtype) for factors in adapters]
    u = _flat_product(x, jnp.concatenate(firsts, axis=-1))
    ends = [sum(a.shape[-1] for a in firsts[: i + 1]) for i in range(len(firsts) - 1)]
    return jnp.split(u, ends, axis=-1)


def _adapted(y: jax.Array, u_BTR: jax.Array, kernel: Any, factors: Factors) -> jax.Array:
    """y = x W with what its adapter adds, and DoRA's magnitude."""
    a, b = both_factors(factors)
    scale = factors["scale"]
    y = y + _flat_product(u_BTR * scale.astype(u_BTR.dtype), b.astype(u_BTR.dtype))
    magnitude = magnitude_of(factors)
    if magnitude is None:
        return y
    # In float32: magnitudes move by less than bfloat16 can tell from none.
    gain = output_gain(kernel, a, b, magnitude, scale)
    return (y.astype(jnp.float32) * jnp.broadcast_to(gain, y.shape)).astype(y.dtype)


def _flat_product(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [B, T, inputs] times w [inputs, outputs], as one product of two matrices.

    Over [B, T] apart, XLA:CPU would copy what goes in, turned round, for each gradient of a weight: of an MLP's inner
    width that took longer than the product with an adapter.
    """
    inputs = w.shape[: x.ndim - 2]
    width = math.prod(inputs)
    y = x.reshape(-1, width) @ w.reshape(width, -1)
    return y.reshape(*x.shape[:2], *w.shape[len(inputs) :])
