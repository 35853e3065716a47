"""The parts of a block that know nothing of other positions: norm, rotary positions, projections, gated MLP.

In and out: activations in the computing dtype; weights in whatever dtype they are stored, cast where they are used.
Norm and rotation are done in float32 and rounded once, as transformers does it.

B batch row, T position, D model width, F MLP width, H head width, N/K heads (query / key and value).
"""

import jax
import jax.numpy as jnp
import numpy as np

from jax_sft.model.config import Activation, LinearRope, Llama3Rope


def rms_norm(x_BTD: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm (Zhang and Sennrich 2019); the scale is applied after rounding, as in `LlamaRMSNorm`."""
    exact_BTD = x_BTD.astype(jnp.float32)
    mean_square_BT1 = jnp.mean(jnp.square(exact_BTD), axis=-1, keepdims=True)
    unit_BTD = exact_BTD * jax.lax.rsqrt(mean_square_BT1 + eps)
    return unit_BTD.astype(x_BTD.dtype) * scale_D.astype(x_BTD.dtype)[None, None, :]


def rope_frequencies(head_width: int, theta: float, scaling: LinearRope | Llama3Rope | None) -> np.ndarray:
    """Radians per position of each rotated pair, float32 [head_width / 2]; transformers/modeling_rope_utils.py."""
    exponents = np.arange(0, head_width, 2, dtype=np.float32) / np.float32(head_width)
    # The power is rounded once, as torch's is; numpy's own float32 power is off by a bit here and there.
    plain = np.float32(1) / np.power(theta, exponents.astype(np.float64)).astype(np.float32)
    match scaling:
        case None:
            return plain
        case LinearRope():
            return plain / np.float32(scaling.factor)
        case Llama3Rope():
            wavelengths = np.float32(2 * np.pi) / plain
            turns = scaling.original_positions / wavelengths
            low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
            # 0 where a wavelength does not fit into the old context often enough (stretched), 1 where it does (kept)
            kept = np.clip((turns - low) / (high - low), 0, 1)
            return ((1 - kept) * plain / scaling.factor + kept * plain).astype(np.float32)


def rope_angles(positions_BT: jax.Array, frequencies_H: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine, float32 [B, T, 1, H / 2], ready to meet any number of heads."""
    angles_BT1H = positions_BT.astype(jnp.float32)[:, :, None, None] * frequencies_H[None, None, None, :]
    return jnp.cos(angles_BT1H), jnp.sin(angles_BT1H)


def rotate(x_BTNH: jax.Array, cos_BT1H: jax.Array, sin_BT1H: jax.Array) -> jax.Array:
    """Rotary positions (Su et al. 2021); pair i is made of components i and i + H / 2, as in transformers."""
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = [first * cos_BT1H - second * sin_BT1H, second * cos_BT1H + first * sin_BT1H]
    return jnp.concatenate(turned, axis=-1).astype(x_BTNH.dtype)


def project(equation: str, x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """A linear map, e.g. "BTD,DNH->BTNH", computed in the dtype of `x`."""
    y = jnp.einsum(equation, x, kernel.astype(x.dtype))
    return y if bias is None else y + jnp.broadcast_to(bias.astype(x.dtype), y.shape)


def activate(x: jax.Array, activation: Activation) -> jax.Array:
    """The gate's nonlinearity."""
    match activation:
        case "silu":
            return jax.nn.silu(x)
        case "gelu":
            return jax.nn.gelu(x, approximate=False)
        case "gelu_tanh":
            return jax.nn.gelu(x, approximate=True)
