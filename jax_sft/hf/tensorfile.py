"""The safetensors format, read and written tensor by tensor, so that no file is ever in memory as a whole.

In: a path. Out: what lies in it (`read_header`), a part of a tensor (`Entry.read`), or a new file (`write`).
The format: eight bytes N, then N bytes of JSON {name: {dtype, shape, data_offsets}}, then the data
(https://github.com/huggingface/safetensors). The library of that name writes a file only from all its tensors at once.
"""

import dataclasses
import json
import math
import pathlib
import struct
from collections.abc import Iterator, Mapping
from typing import BinaryIO

import ml_dtypes
import numpy as np

DTYPES: Mapping[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_READ = {**DTYPES, "U8": np.dtype(np.uint8)}  # bytes too, for those who know what they mean
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where one tensor lies."""

    file: pathlib.Path
    dtype: str  # the format's name of it; DTYPES holds those that are plain numbers
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """A part of it, as a view of the mapped file: only the pages that are touched are read."""
        if 0 in self.shape:
            return np.empty(self.shape, _READ[self.dtype])[index]
        # Mapped anew each time, so that pages read for one tensor do not count as memory while the next is read.
        return np.memmap(self.file, _READ[self.dtype], "r", self.offset, self.shape)[index]


def read_header(path: pathlib.Path) -> dict[str, Entry]:
    """What lies in a file.

    Raises:
        ValueError: it is not a safetensors file, is cut short, or is a pointer that git-lfs left in its place.
    """
    with open(path, "rb") as file:
        start = file.read(8)
        if start == b"version ":  # https://git-lfs.github.com/spec/v1
            raise ValueError(f"{path}: is a pointer of git-lfs, not the weights; run `git lfs pull` there")
        try:
            return _entries(path, start, file)
        except (ValueError, RecursionError) as error:
            reason = str(error)
        except (KeyError, TypeError, AttributeError) as error:
            reason = f"its header is none of this format: {type(error).__name__}: {error}"
    raise ValueError(f"{path}: is damaged or cut short ({reason}); copy or download it again")


def _entries(path: pathlib.Path, start: bytes, file: BinaryIO) -> dict[str, Entry]:
    """What the header says, which must fit the file and itself, as the format asks: no gap and no overlap."""
    size = path.stat().st_size
    length = int.from_bytes(start, "little")
    if size < 8 or length > size - 8:
        raise ValueError(f"it has {size} bytes and should have a header of {length if size >= 8 else 8}")
    header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    header.pop("__metadata__", None)
    end = 0
    for name, said in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        (first, after), shape, dtype = said["data_offsets"], said["shape"], said["dtype"]
        if first != end:
            raise ValueError(f"{name} should start at byte {end} of the data and starts at {first}")
        if dtype in DTYPES and after - first != math.prod(shape) * DTYPES[dtype].itemsize:
            raise ValueError(f"{name} has {after - first} bytes, which is no {dtype} of shape {shape}")
        end = after
    if 8 + length + end != size:
        raise ValueError(f"it has {size} bytes and should have {8 + length + end}")
    return {
        name: Entry(path, said["dtype"], tuple(said["shape"]), 8 + length + said["data_offsets"][0])
        for name, said in header.items()
    }


def write(
    path: pathlib.Path, shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype, tensors: Iterator[np.ndarray]
) -> None:
    """Write a file of tensors of one dtype, taking as many of `tensors` as `shapes` names, in that order."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # readers before transformers 5 insist on it
    offset = 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data starts at a multiple of eight
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            tensor = next(tensors)
            if tensor.shape != shape or tensor.dtype != dtype:
                raise TypeError(f"{name}: is {tensor.dtype}{tensor.shape}, and the header says {dtype}{shape}")
            file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
