"""MXFP4 in: tensors of four bits a number, read as plain numbers.

In: what lies in safetensors files. Out: in place of each pair `x_blocks` and `x_scales`, a tensor `x`, whose parts are
dequantised as they are read. A block is 32 numbers that share a scale: 16 bytes, of which each holds two numbers (sign,
two bits of exponent, one of mantissa; the lower half first), and one byte s for the factor 2 ** (s - 127); OCP
Microscaling Formats 1.0.

    x [E, D, F]     x_blocks [E, F, D / 32, 16]     x_scales [E, F, D / 32]

E experts, D and F the last two axes of a matrix, whichever they are.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jax_sft.hf.tensorfile import Entry

BLOCK = 32  # numbers
_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_NUMBERS = np.array([*_POSITIVE, *(-x for x in _POSITIVE)], np.float32)
# The two float32 of each byte, the lower half first; as one word, which numpy looks up six times as fast as a pair.
_WORDS = np.stack([np.tile(_NUMBERS, 16), np.repeat(_NUMBERS, 16)], axis=1).view(np.uint64)[:, 0]


@dataclasses.dataclass(frozen=True)
class Mxfp4Tensor:
    """Where a stack of quantised matrices lies."""

    blocks: Entry
    scales: Entry

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape as plain numbers, [E, D, F]."""
        E, F, blocks = self.scales.shape
        return E, blocks * BLOCK, F

    @property
    def dtype(self) -> str:
        """The name of its number format."""
        return "MXFP4"

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """A part of it, in float32, which holds each of its numbers exactly; only the blocks of the part are read."""
        of_E, of_D, of_F = index
        first, last, step = of_D.indices(self.shape[1])
        held = slice(first // BLOCK, -(-last // BLOCK))
        words = np.take(_WORDS, self.blocks.read((of_E, of_F, held, slice(None))))
        numbers = words.view(np.float32)  # [E, F, blocks, 32]
        exponents = self.scales.read((of_E, of_F, held)).astype(np.int32) - 127
        numbers *= np.ldexp(np.float32(1), exponents)[..., None]
        x_EFD = numbers.reshape(*numbers.shape[:2], -1)
        start = held.start * BLOCK
        return x_EFD[:, :, first - start : last - start : step].swapaxes(1, 2)


def joined(stored: Mapping[str, Any]) -> dict[str, Any]:
    """`stored`, with one tensor for each pair of blocks and scales that fit together; the rest as it is."""
    found = dict(stored)
    for name in stored:
        base = name.removesuffix("_blocks")
        blocks, scales = stored[name], stored.get(f"{base}_scales")
        if base != name and scales is not None and _fit(blocks, scales):
            del found[name], found[f"{base}_scales"]
            found[base] = Mxfp4Tensor(blocks, scales)
    return found


def _fit(blocks: Entry, scales: Entry) -> bool:
    is_bytes = blocks.dtype == scales.dtype == "U8"
    return is_bytes and len(scales.shape) == 3 and blocks.shape == (*scales.shape, BLOCK // 2)
