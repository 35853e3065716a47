"""The parts of a block that know nothing of other positions: norm, rotary positions, gated MLP.

In and out: activations in the computing dtype; weights in whatever dtype they are stored, cast where they are used.
Norm and rotation are done in float32 and rounded once, as transformers does it.

B batch row, T position, D model width, F MLP width, H head width, N/K heads (query / key and value).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from jax_sft.model.config import Activation, DynamicRope, LinearRope, Llama3Rope, LongRope, Rope, YarnRope


def rms_norm(x: jax.Array, scale: jax.Array, eps: float, *, in_float32: bool = False) -> jax.Array:
    """Root-mean-square norm (Zhang and Sennrich 2019) over the axes of `scale`, the last ones of `x`.

    The scale is applied after rounding to the dtype of `x`, as in `LlamaRMSNorm`, or before (`GemmaRMSNorm`).
    """
    exact = x.astype(jnp.float32)
    axes = tuple(range(-scale.ndim, 0))
    unit = exact * jax.lax.rsqrt(jnp.mean(jnp.square(exact), axis=axes, keepdims=True) + eps)
    if in_float32:
        return (unit * _spread(scale.astype(jnp.float32), x)).astype(x.dtype)
    return unit.astype(x.dtype) * _spread(scale.astype(x.dtype), x)


def layer_norm(x_BTD: jax.Array, scale_D: jax.Array, bias_D: jax.Array, eps: float) -> jax.Array:
    """Layer norm (Ba et al. 2016), in float32, rounded once."""
    exact_BTD = x_BTD.astype(jnp.float32)
    centred_BTD = exact_BTD - jnp.mean(exact_BTD, axis=-1, keepdims=True)
    unit_BTD = centred_BTD * jax.lax.rsqrt(jnp.mean(jnp.square(centred_BTD), axis=-1, keepdims=True) + eps)
    scaled_BTD = unit_BTD * _spread(scale_D.astype(jnp.float32), unit_BTD)
    return (scaled_BTD + _spread(bias_D.astype(jnp.float32), scaled_BTD)).astype(x_BTD.dtype)


def _spread(x: jax.Array, like: jax.Array) -> jax.Array:
    return jax.lax.broadcast_in_dim(x, like.shape, tuple(range(like.ndim - x.ndim, like.ndim)))


def rope_frequencies(rope: Rope, *, long: bool = False) -> np.ndarray:
    """Radians per position of each rotated pair, float32 [rope.width / 2]; transformers/modeling_rope_utils.py.

    `long`: of a text longer than the model was first made for, where that makes a difference. For the kind "dynamic",
    whose frequencies follow from the length itself, see `rope_angles`.
    """
    exponents = np.arange(0, rope.width, 2, dtype=np.float32) / np.float32(rope.width)
    # The power is rounded once, as torch's is; numpy's own float32 power is off by a bit here and there.
    periods = np.power(rope.theta, exponents.astype(np.float64)).astype(np.float32)
    plain = np.float32(1) / periods
    match rope.scaling:
        case None | DynamicRope():
            return plain
        case LinearRope(factor=factor):
            return plain / np.float32(factor)
        case Llama3Rope() as scaling:
            wavelengths = np.float32(2 * np.pi) / plain
            turns = scaling.original_positions / wavelengths
            low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
            # 0 where a wavelength does not fit into the old context often enough (stretched), 1 where it does (kept)
            kept = np.clip((turns - low) / (high - low), 0, 1)
            return ((1 - kept) * plain / scaling.factor + kept * plain).astype(np.float32)
        case YarnRope() as scaling:
            bounds = [
                rope.width * math.log(scaling.original_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))
                for turns in (scaling.fast_turns, scaling.slow_turns)
            ]
            if scaling.whole_bounds:
                bounds = [math.floor(bounds[0]), math.ceil(bounds[1])]
            first, last = max(bounds[0], 0), min(bounds[1], rope.width - 1)
            last += 0.001 if first == last else 0
            pairs = np.arange(rope.width // 2, dtype=np.float32)
            kept = 1 - np.clip((pairs - np.float32(first)) / np.float32(last - first), 0, 1)
            stretched = np.float32(1) / (np.float32(scaling.factor) * periods)
            return (stretched * (1 - kept) + plain * kept).astype(np.float32)
        case LongRope() as scaling:
            factors = np.array(scaling.long_factors if long else scaling.short_factors, np.float32)
            return np.float32(1) / (factors * periods)


def depends_on_length(rope: Rope) -> bool:
    """Whether the angles follow from the length of the text, and not from the position alone."""
    return isinstance(rope.scaling, DynamicRope | LongRope)


def rope_angles(positions_BT: jax.Array, lengths_BT: jax.Array | None, rope: Rope) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine, float32 [B, T, 1, rope.width / 2], ready to meet any number of heads.

    Args:
        lengths_BT: how many tokens the text (the segment) of each token has; needed where `depends_on_length`.
    """
    frequencies_H = jnp.asarray(rope_frequencies(rope))[None, None, :]
    magnitude = rope.scaling.magnitude if isinstance(rope.scaling, YarnRope | LongRope) else 1.0
    match rope.scaling:
        case LongRope(original_positions=original):
            is_long_BT1 = (_known(lengths_BT) > original)[:, :, None]
            frequencies_H = jnp.where(is_long_BT1, rope_frequencies(rope, long=True)[None, None, :], frequencies_H)
        case DynamicRope(factor=factor, original_positions=original):
            times_BT1 = jnp.maximum(_known(lengths_BT), original).astype(jnp.float32)[:, :, None] / original
            growth_BT1 = (factor * times_BT1 - (factor - 1)) ** (rope.width / (rope.width - 2))
            exponents_H = jnp.arange(0, rope.width, 2, dtype=jnp.float32)[None, None, :] / rope.width
            frequencies_H = frequencies_H / growth_BT1**exponents_H
    angles_BT1H = (positions_BT.astype(jnp.float32)[:, :, None] * frequencies_H)[:, :, None, :]
    return jnp.cos(angles_BT1H) * magnitude, jnp.sin(angles_BT1H) * magnitude


def _known(lengths_BT: jax.Array | None) -> jax.Array:
    assert lengths_BT is not None, "this kind of rope follows from the length of the text"
    return lengths_BT


def rotate(x_BTNH: jax.Array, cos_BT1H: jax.Array, sin_BT1H: jax.Array, *, interleaved: bool) -> jax.Array:
    """Rotary positions (Su et al. 2021) of the first components of each head, as many as there are angles, times two.

    Pair i is made of components i and i + width / 2, as in transformers' Llama, or of the neighbours 2i and 2i + 1.
    """
    width = 2 * cos_BT1H.shape[-1]
    turned_BTNH, kept_BTNH = x_BTNH[..., :width].astype(jnp.float32), x_BTNH[..., width:]
    if interleaved:
        first, second = turned_BTNH[..., 0::2], turned_BTNH[..., 1::2]
    else:
        first, second = jnp.split(turned_BTNH, 2, axis=-1)
    parts = [first * cos_BT1H - second * sin_BT1H, second * cos_BT1H + first * sin_BT1H]
    if interleaved:
        turned_BTNH = jnp.stack(parts, axis=-1).reshape(turned_BTNH.shape)
    else:
        turned_BTNH = jnp.concatenate(parts, axis=-1)
    turned_BTNH = turned_BTNH.astype(x_BTNH.dtype)
    return jnp.concatenate([turned_BTNH, kept_BTNH], axis=-1) if kept_BTNH.shape[-1] else turned_BTNH


def capped(x: jax.Array, cap: float | None) -> jax.Array:
    """Squeezed softly into +- `cap` (Gemma 2)."""
    return x if cap is None else cap * jnp.tanh(x / cap)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gating:
    """What a gated MLP makes of its two halves."""

    activation: Activation
    silu_slope: float
    limit: float | None  # the gate is cut off above this, and up beyond +- this; None: nothing is cut off
    up_offset: float  # added to up, after that


def gated(gate: jax.Array, up: jax.Array, gating: Gating) -> jax.Array:
    """act(gate) * up."""
    if gating.limit is not None:
        gate, up = jnp.minimum(gate, gating.limit), jnp.clip(up, -gating.limit, gating.limit)
    if gating.up_offset != 0:
        up = up + gating.up_offset
    return activate(gate, gating.activation, silu_slope=gating.silu_slope) * up


def activate(x: jax.Array, activation: Activation, *, silu_slope: float) -> jax.Array:
    """The nonlinearity of an MLP."""
    match activation:
        case "silu":
            return jax.nn.silu(x) if silu_slope == 1 else x * jax.nn.sigmoid(silu_slope * x)
        case "gelu":
            return jax.nn.gelu(x, approximate=False)
        case "gelu_tanh":
            return jax.nn.gelu(x, approximate=True)
