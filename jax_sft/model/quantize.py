"""Kernels of a frozen base in 8 or 4 bits each: stored small, made floating point where they are multiplied.

In: a kernel of a projection, the letters of its axes, and which of them are summed over. Out: an `Int8` or an `Nf4`,
to stand in the kernel's place in the parameter tree. All its arrays have the kernel's axes, in the same order, some of
them shorter: so a scan over L cuts a layer out of it, and the kernel's letters say where it lies on a mesh.
`dense` makes the kernel of it again, rounded. Call it inside a jax.checkpoint together with the product: otherwise the
backward pass finds the floating point kernels of all layers stored.

D model width, F MLP width, H head width, N query heads, L layers, E experts.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jax_sft.sharding import weight_spec

Kind = Literal["int8", "nf4"]

# NormalFloat-4 of QLoRA (arXiv 2305.14314, appendix E): quantiles of a normal distribution, made to span -1..1 and to
# have a 0. To the last digit as in bitsandbytes.
NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_NF4 = np.array(NF4_VALUES, np.float32)
BLOCK = 64  # values that share a maximum
_TINY = np.finfo(np.float32).tiny  # in place of a divisor 0, where all that is divided is 0 too


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Int8:
    """codes x scale; one scale for each output."""

    codes: jax.Array  # int8 -127..127, shaped as the kernel
    scale: jax.Array  # float32, shaped as the kernel with 1 for each input axis

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the kernel."""
        return self.codes.shape


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Nf4:
    """NF4_VALUES[code] x the maximum of its block; that is low + step x maxima, QLoRA's double quantisation.

    Two codes share a byte, the first one in its high half, as in bitsandbytes. Of one output, in blocks of 4:

        kernel   0.55 -1.0 0.0 0.16 | 0.0 2.0 0.49 -2.0 | 0.1 1.4 -0.7 1.4      along the last input axis
        code     13   0    7   9    | 7   15  10   0    | 8   15  2    15
        codes    0xD0      0x79     | 0x7F    0xA0      | 0x8F    0x2F          half as long
        maxima   0                  | 255               | 102                   low = 1.0, step = 1 / 255
    """

    codes: jax.Array  # uint8, shaped as the kernel with `axis` halved
    maxima: jax.Array  # uint8, shaped as the kernel with `axis` divided by the length of a block
    low: jax.Array  # float32, shaped as the kernel with 1 for each input axis
    step: jax.Array  # float32, as `low`
    axis: int = dataclasses.field(metadata={"static": True})  # the last input axis, counted from the end: -1, -2, ...

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the kernel."""
        axis = self.codes.ndim + self.axis
        return (*self.codes.shape[:axis], 2 * self.codes.shape[axis], *self.codes.shape[axis + 1 :])


Quantized = Int8 | Nf4


def quantize(kernel: jax.Array, *, letters: str, inputs: str, kind: Kind) -> Quantized:
    """The kernel in few bits. To be jitted; layers are worked off one by one, so float32 copies are of one layer.

    (But XLA:CPU, of a bfloat16 stack, makes one float32 copy all the same.)

    "int8": for each output, in steps of 1/127 of its largest absolute value; to nearest, ties to even.
    "nf4": in blocks of 64 neighbours along the last input axis: bitsandbytes' blocks of the file's matrix [out, in],
    where 64 divides that axis. Where it does not, blocks are as long as the largest power of two that does.

    Args:
        kernel: in any floating dtype.
        letters: of its axes, e.g. "LNHD" of the output projection; a leading L is the stack of layers.
        inputs: those summed over in the product, e.g. "NH".

    Raises:
        ValueError: "nf4" of an axis of odd length.
    """
    length = kernel.shape[letters.index(inputs[-1])]
    if kind == "nf4" and length % 2:
        raise ValueError(
            f"lora.base = nf4: two codes share a byte, so axis {inputs[-1]} of a kernel {letters} must have an even "
            f"length, not {length}; set lora.base to int8"
        )
    if letters[0] == "L":
        return jax.lax.map(lambda layer: quantize(layer, letters=letters[1:], inputs=inputs, kind=kind), kernel)
    axes = tuple(letters.index(letter) for letter in inputs)
    exact = kernel.astype(jnp.float32)
    return _to_int8(exact, axes) if kind == "int8" else _to_nf4(exact, axes)


def dense(weight: jax.Array | Quantized, dtype: Any) -> jax.Array:
    """The kernel, computed in float32 and rounded once to `dtype`; one that is not quantised is cast."""
    match weight:
        case Int8():
            return (weight.codes.astype(jnp.float32) * weight.scale).astype(dtype)
        case Nf4():
            return _from_nf4(weight).astype(dtype)
        case _:
            return weight.astype(dtype)


def shardings(letters: str, weight: Any, mesh: Mesh) -> Any:
    """Where it lies, by the kernel's letters: `weight` (arrays or ShapeDtypeStructs) with a NamedSharding for each."""
    return jax.tree.map(lambda leaf: NamedSharding(mesh, weight_spec(letters, leaf.shape, mesh)), weight)


def num_bytes(weight: Any) -> int:
    """What it takes in memory, over all devices; of arrays or ShapeDtypeStructs."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(weight))


def _to_int8(kernel: jax.Array, axes: tuple[int, ...]) -> Int8:
    scale = jnp.max(jnp.abs(kernel), axis=axes, keepdims=True) / 127
    return Int8(codes=jnp.round(kernel / jnp.maximum(scale, _TINY)).astype(jnp.int8), scale=scale)


def _to_nf4(kernel: jax.Array, axes: tuple[int, ...]) -> Nf4:
    axis = axes[-1]
    blocks = _cut(kernel, axis, math.gcd(kernel.shape[axis], BLOCK))
    peaks = jnp.max(jnp.abs(blocks), axis=axis + 1)
    unit = blocks * (1 / jnp.maximum(jnp.expand_dims(peaks, axis + 1), _TINY))  # this way round, as bitsandbytes
    middles = (_NF4[1:] + _NF4[:-1]) / 2
    codes = sum((unit > middle).astype(jnp.uint8) for middle in middles)  # an addition each, and no axis of 16
    pairs = _cut(jnp.reshape(codes, kernel.shape), axis, 2)
    first, second = jnp.moveaxis(pairs, axis + 1, 0)
    low, high = (pick(peaks, axis=axes, keepdims=True) for pick in (jnp.min, jnp.max))
    step = (high - low) / 255
    maxima = jnp.round((peaks - low) / jnp.maximum(step, _TINY)).astype(jnp.uint8)
    return Nf4(codes=first << 4 | second, maxima=maxima, low=low, step=step, axis=axis - kernel.ndim)


def _from_nf4(weight: Nf4) -> jax.Array:
    axis = weight.codes.ndim + weight.axis
    peaks = weight.low + weight.step * weight.maxima.astype(jnp.float32)
    pairs = jnp.stack([weight.codes >> 4, weight.codes & 15], axis=axis + 1)
    codes = pairs.reshape(*peaks.shape[: axis + 1], -1, *peaks.shape[axis + 1 :])  # [..., block, of the block, ...]
    # A gather: for 2048 x 8192 in bfloat16 it took 18 ms on two CPU cores, a tree of 15 selections 28 ms, a chain of
    # them 34 ms (in float32 each took 41 ms, as a cast does). And a scan that is differentiated keeps what hangs on
    # no layer: of a gather that is this table, of selections 16 constants as large as a kernel.
    values = jnp.array(_NF4).at[codes].get(mode="promise_in_bounds")
    return (values * jnp.expand_dims(peaks, axis + 1)).reshape(weight.shape)


def _cut(x: jax.Array, axis: int, size: int) -> jax.Array:
    """The axis as two: groups, and the `size` neighbours in each."""
    return x.reshape(*x.shape[:axis], x.shape[axis] // size, size, *x.shape[axis + 1 :])
