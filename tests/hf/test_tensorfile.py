"""The safetensors format, against the safetensors library in both directions."""

import json
import pathlib
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jax_sft.hf import tensorfile

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_we_write_the_library_reads(tmp_path: pathlib.Path, dtype: type):
    x = {"b": np.arange(6).reshape(2, 3).astype(dtype), "a": np.full(5, 0.5, dtype), "c": np.zeros((0, 2), dtype)}
    tensorfile.write(tmp_path / "x.safetensors", {k: v.shape for k, v in x.items()}, np.dtype(dtype), iter(x.values()))
    read = load_file(tmp_path / "x.safetensors")
    assert set(read) == set(x)
    for name, value in x.items():
        assert read[name].dtype == dtype
        np.testing.assert_array_equal(read[name], value)
    with safe_open(tmp_path / "x.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_what_the_library_writes_we_read_in_parts_and_mixed_dtypes(tmp_path: pathlib.Path):
    x = {f"t{i}": np.random.default_rng(i).normal(size=(4, 6)).astype(d) for i, d in enumerate(DTYPES)}
    save_file(x, tmp_path / "x.safetensors")
    entries = tensorfile.read_header(tmp_path / "x.safetensors")
    assert {name: (e.shape, tensorfile.DTYPES[e.dtype]) for name, e in entries.items()} == {
        name: (v.shape, v.dtype) for name, v in x.items()
    }
    for name, value in x.items():
        for index in [(slice(None), slice(None)), (slice(1, 3), slice(2, 5)), (slice(0, 0), slice(None))]:
            np.testing.assert_array_equal(entries[name].read(index), value[index])


def test_a_write_takes_only_its_own_tensors(tmp_path: pathlib.Path):
    tensors = iter([np.zeros(2, np.float32), np.ones(3, np.float32)])
    tensorfile.write(tmp_path / "a", {"a": (2,)}, np.dtype(np.float32), tensors)
    tensorfile.write(tmp_path / "b", {"b": (3,)}, np.dtype(np.float32), tensors)
    np.testing.assert_array_equal(load_file(tmp_path / "b")["b"], np.ones(3))


def test_a_tensor_that_belies_the_header_is_not_written(tmp_path: pathlib.Path):
    with pytest.raises(TypeError, match="the header says float32"):
        tensorfile.write(tmp_path / "a", {"a": (2,)}, np.dtype(np.float32), iter([np.zeros(2, np.float16)]))


@pytest.mark.parametrize("damage", ["short", "long", "no header", "not json", "empty"])
def test_a_damaged_file_is_named(tmp_path: pathlib.Path, damage: str):
    path = tmp_path / "model.safetensors"
    save_file({"a": np.ones((8, 8), np.float32)}, path)
    whole = path.read_bytes()
    damaged = {
        "short": whole[:-10],
        "long": whole + b"more",
        "no header": whole[:20],
        "not json": struct.pack("<Q", 4) + b"abcd",
        "empty": b"",
    }
    path.write_bytes(damaged[damage])
    with pytest.raises(ValueError, match=r"model\.safetensors: is damaged or cut short .* copy or download it again"):
        tensorfile.read_header(path)


def test_a_header_of_another_format_is_an_error_of_one_sentence(tmp_path: pathlib.Path):
    header = json.dumps({"a": [1, 2]}).encode()
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ValueError, match="is damaged or cut short"):
        tensorfile.read_header(tmp_path / "x")
