"""A matrix with outliers and a block of zeros, and what bitsandbytes makes of it in NormalFloat-4.

Run `python -m tests.model.nf4_cases` (with torch and bitsandbytes; it was 0.50.2, on a CPU) to record
tests/golden/nf4_bitsandbytes.npz again.
"""

import pathlib

import numpy as np

GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "golden" / "nf4_bitsandbytes.npz"
OUT, IN = 256, 128


def matrix() -> np.ndarray:
    """[out, in], as it stands in a file."""
    random = np.random.RandomState(0)
    out_in = (0.02 * random.standard_normal((OUT, IN))).astype(np.float32)
    out_in[3, 5], out_in[200, 127] = 0.7, -0.3
    out_in[7, :64] *= 50
    out_in[100, 64:] = 0
    return out_in


def bitsandbytes_nf4() -> dict[str, np.ndarray]:
    """Its code book, its bytes, its block maxima, and how far it then is from the matrix."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    given = torch.from_numpy(matrix())
    packed, state = quantize_4bit(given, quant_type="nf4", blocksize=64, compress_statistics=False)
    error = np.abs(dequantize_4bit(packed, state).numpy() - matrix())
    return {
        "values": state.code.numpy(),
        "bytes": packed.numpy().reshape(OUT, IN // 2),
        "maxima": state.absmax.numpy().reshape(OUT, IN // 64),
        "mean_error": error.mean(),
        "max_error": error.max(),
    }


if __name__ == "__main__":
    np.savez_compressed(GOLDEN, **bitsandbytes_nf4())
    print(f"wrote {GOLDEN}")
