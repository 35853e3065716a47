"""What a model's files store, tensor by tensor, and a hash of its numbers that does not depend on how they are stored.

In: a folder, a .gguf or a .safetensors file. Out: tensors by their Hugging Face names, to be read in part; or the hash,
from a sample of each tensor in float32: the same for other shards, for a dtype or format that holds the same numbers,
and for a tied head that is stored all the same.
"""

import hashlib
import math
import pathlib
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from jax_sft.hf import gguf, mxfp4, names, tensorfile
from jax_sft.hf.folder import INDEX, tensors_by_index, weight_files

_RUNS = 8  # places of a matrix that are looked at, from its first row to its last
_RUN = 64  # neighbours that are looked at in each


class StoredTensor(Protocol):
    """A tensor in a file: a safetensors entry, plain or quantised, or one of a GGUF file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its whole shape."""
        ...

    @property
    def dtype(self) -> str:
        """The file's name for its number format."""
        ...

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """A part of it."""
        ...


def stored_tensors(path: pathlib.Path) -> dict[str, StoredTensor]:
    """Every tensor of a folder or file by its Hugging Face name, as it is stored; no weights are read.

    Raises:
        ValueError: a file is damaged, the index names what is not there, or two files hold the same tensor.
    """
    if path.suffix == ".gguf":
        return {**gguf.read(path).tensors()}
    stored: dict[str, tensorfile.Entry] = {}
    for file in [path] if path.is_file() else weight_files(path):
        for name, entry in tensorfile.read_header(file).items():
            if name in stored:
                raise ValueError(
                    f"{path}: {name} is in two files, {stored[name].file.name} and {file.name}; remove the copy"
                )
            stored[name] = entry
    if path.is_dir():
        _check_index(path, stored)
    return {name: tensor for name, tensor in stored.items() if not names.NOT_WEIGHTS.search(name)}


def weights_hash(path: pathlib.Path) -> str:
    """A hash of the numbers in a model's files: of each tensor its name, its shape and a sample of its elements.

    Changes that miss the sample go unseen: it tells one training's weights from another's, not a forgery.

    Raises:
        ValueError: as `stored_tensors`.
    """
    digests = {name: _digest(tensor) for name, tensor in mxfp4.joined(stored_tensors(path)).items()}
    if digests.get(names.HEAD) == digests.get(names.EMBED):
        digests.pop(names.HEAD, None)
    whole = hashlib.blake2b(digest_size=16)
    for name, digest in sorted(digests.items()):
        whole.update(name.encode() + digest)
    return whole.hexdigest()


def _check_index(path: pathlib.Path, stored: dict[str, tensorfile.Entry]) -> None:
    """Every tensor that the index names is there; a tied head may be named all the same."""
    there = {*stored, names.HEAD}
    lost = names.folded([name for name in tensors_by_index(path) or () if name not in there])
    if lost:
        lines = "\n".join(f"  {name}" for name in lost)
        raise ValueError(
            f"{path}: {INDEX} names tensors that are in none of its files; copy or download the index and the files of "
            f"one model:\n{lines}"
        )


def _digest(tensor: StoredTensor) -> bytes:
    digest = hashlib.blake2b(str(tensor.shape).encode(), digest_size=16)
    if isinstance(tensor, tensorfile.Entry) and tensor.dtype not in tensorfile.DTYPES:
        digest.update(tensor.dtype.encode())  # who loads it says that these are no plain numbers
        return digest.digest()
    for index in _sample(tensor.shape):
        with np.errstate(over="ignore"):  # float64 that no float32 holds is infinite
            digest.update(tensor.read(index).astype(np.float32).tobytes())
    return digest.digest()


def _sample(shape: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """Where to look: all of a vector; of a matrix (or a stack of them) some neighbours in some of the rows."""
    if not shape or 0 in shape:
        return
    *stack, width = shape
    num_rows = math.prod(stack)
    runs = min(_RUNS, num_rows)
    length = min(_RUN, width) if stack else width
    for i in range(runs):
        share = i / max(runs - 1, 1)
        place = np.unravel_index(round(share * (num_rows - 1)), stack)
        start = round(share * (width - length))
        yield (*(slice(int(at), int(at) + 1) for at in place), slice(start, start + length))
