"""Two processes load one model: each reads bytes of its own, in whole rows, and together they read everything."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

from tests.hf.models import TINY, write_folder

WORKER = """
import json, sys
import jax, numpy as np
rank, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=rank)
from jax_sft.config import MeshConfig
from jax_sft.hf import tensorfile
from jax_sft.hf.load import load_model
from jax_sft.sharding import make_mesh
from tests.hf.models import TINY, reference, tensors

read, ranges = tensorfile.Entry.read, {}

def recorded(entry, index):
    # Runs of neighbours in memory, as the returned view lies in the file: what is touched, not what was asked for.
    found = read(entry, index)
    whole = read(entry, (slice(None),) * len(entry.shape))
    at = np.arange(whole.size).reshape(whole.shape)[index].reshape(-1) * whole.itemsize + entry.offset
    assert found.base is not None, "a copy was read whole"
    cuts = np.flatnonzero(np.diff(at) != whole.itemsize) + 1
    runs = [(int(run[0]), int(run[-1]) + whole.itemsize) for run in np.split(at, cuts)]
    ranges.setdefault(entry.file.name, []).extend(runs)
    return found

tensorfile.Entry.read = recorded
wanted, said = reference(tensors(TINY), TINY), {}
for name, sizes in json.loads(sys.argv[4]).items():
    ranges.clear()
    params = load_model(folder, mesh=make_mesh(MeshConfig(**sizes))).params
    for found, right in zip(jax.tree.leaves(params), jax.tree.leaves(wanted), strict=True):
        for shard in found.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), right[shard.index])
    cut = sum(not x.sharding.is_fully_replicated for x in jax.tree.leaves(params))
    said[name] = {"ranges": dict(ranges), "cut": cut}
print("RESULT", json.dumps(said))
"""
MESHES = {"fsdp": {"data": 1, "fsdp": 2, "tensor": 1}, "tensor": {"data": 1, "fsdp": 1, "tensor": 2}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("load") / "m"
    write_folder(folder, TINY, shards=2)
    return folder


@pytest.fixture(scope="module")
def said(folder: pathlib.Path) -> list[dict]:
    """What each process read, by mesh."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    both = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(port), str(folder), json.dumps(MESHES)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": ".", "JAX_ENABLE_COMPILATION_CACHE": "false", "JAX_NUM_CPU_DEVICES": "1"},
        )
        for rank in range(2)
    ]
    outputs = [p.communicate(timeout=120) for p in both]
    assert [p.returncode for p in both] == [0, 0], outputs
    return [json.loads(out.split("RESULT", 1)[1]) for out, _ in outputs]


def entries(folder: pathlib.Path):
    """(file, tensor, first byte, last byte + 1) of all that is in the files, by the library's format, not by ours."""
    for file in sorted(folder.glob("*.safetensors")):
        content = file.read_bytes()
        length = int.from_bytes(content[:8], "little")
        for name, entry in json.loads(content[8 : 8 + length]).items():
            if name != "__metadata__":
                yield file.name, name, *(8 + length + at for at in entry["data_offsets"])


@pytest.mark.parametrize("mesh", MESHES)
def test_two_processes_read_disjoint_bytes_and_together_all_of_them(folder, said, mesh):
    totals, whole, shared = [0, 0], 0, 0
    for file, name, start, end in entries(folder):
        touched = np.zeros((2, end - start), bool)
        runs: list[list[tuple[int, int]]] = [[], []]
        for rank in range(2):
            runs[rank] = [(a, b) for a, b in said[rank][mesh]["ranges"][file] if start <= a < end]
            assert sum(b - a for a, b in runs[rank]) <= end - start, f"{name} is read twice by process {rank}"
            for a, b in runs[rank]:
                touched[rank, a - start : b - start] = True
            totals[rank] += int(touched[rank].sum())
        assert touched.any(0).all(), f"{name} is not read whole"
        whole += end - start
        if touched.all():  # what lies on every device is read by every process
            assert "norm" in name, f"{name} is read by both"
            shared += end - start
            continue
        assert not touched.all(0).any(), f"{name}: both read some bytes"
        # A disk reads pages: pieces of rows would be the whole file, for each process.
        assert all(len(r) <= 1 for r in runs), f"{name} is read in pieces: {runs}"
    assert said[0][mesh]["cut"] == (12 if mesh == "fsdp" else 9)
    assert (shared == 0) == (mesh == "fsdp")
    assert max(totals) <= 0.52 * (whole - shared) + shared
