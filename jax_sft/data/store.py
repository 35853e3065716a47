"""Sequences as flat arrays in a folder: written one by one, read as memory maps, checked before they are believed.

In: sequences in order. Out: a `TokenizedSet`. The folder holds a .npy file for each of `ARRAYS` and a manifest, written
last, with their sizes, the account, and a checksum of itself. A set of less than `VERIFIED_BYTES` also has checksums of
its files there, verified by every `load`; of a larger one only the sizes are checked, as reading it takes too long.

Letters: N sequence, M position in all sequences laid end to end, T position in one.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import sys
from typing import Any

import numpy as np

from jax_sft.data.conversation import Account, DataError, Sequence

ARRAYS = {
    "tokens_M": np.int32,
    "targets_M": np.int32,
    "weights_M": np.float32,
    "lengths_N": np.int32,
    "trained_N": np.int32,  # positions with a weight above 0
    "source_ids_N": np.int32,  # index into `sources`
    "id_lengths_N": np.int32,  # bytes of each id
    "id_bytes": np.uint8,  # the ids as UTF-8, end to end
}
MANIFEST = "manifest.json"
VERIFIED_BYTES = 256 * 2**20
BLOCK = 2**24  # positions looked at together
MAX_SOURCES = 256  # losses are summed for each, on the device


class Ids:
    """The ids of N sequences as a list that is not in memory."""

    def __init__(self, id_bytes: np.ndarray, id_lengths_N: np.ndarray) -> None:
        self._bytes = id_bytes
        self._offsets_N1 = _offsets(id_lengths_N)

    def __len__(self) -> int:
        return len(self._offsets_N1) - 1

    def __getitem__(self, i: int) -> str:
        start, end = self._offsets_N1[i], self._offsets_N1[i + 1]
        return self._bytes[start:end].tobytes().decode("utf-8")


@dataclasses.dataclass(frozen=True, eq=False)
class TokenizedSet:
    """All sequences; `dataset[i]` is one. `fingerprint` changes with any token, weight, source, and the order."""

    tokens_M: np.ndarray  # int32
    targets_M: np.ndarray  # int32
    weights_M: np.ndarray  # float32
    offsets_N1: np.ndarray  # int64; sequence i lies at offsets_N1[i]:offsets_N1[i + 1]
    lengths_N: np.ndarray  # int32
    trained_N: np.ndarray  # int32; positions with a weight above 0
    sources: tuple[str, ...]  # in the order of their first sequences
    source_ids_N: np.ndarray  # int32; index into sources
    ids: Ids
    account: Account
    fingerprint: str

    @functools.cached_property
    def answers_N(self) -> np.ndarray:
        """How many trained stretches each sequence has: its trained answers."""
        found = [np.zeros(0, np.int32)]
        first = 0
        while first < len(self):  # in blocks: a large set has more positions than memory has bytes
            end = self.offsets_N1[first] + BLOCK
            last = max(first + 1, int(np.searchsorted(self.offsets_N1, end, side="right")) - 1)
            offsets = self.offsets_N1[first : last + 1]
            is_trained_M = self.weights_M[offsets[0] : offsets[-1]] > 0
            starts = offsets[:-1] - offsets[0]
            begins_M = is_trained_M.copy()
            begins_M[1:] &= ~is_trained_M[:-1]
            begins_M[starts] = is_trained_M[starts]
            found.append(np.add.reduceat(begins_M, starts, dtype=np.int32))
            first = last
        return np.concatenate(found)

    def of_source(self, name: str) -> np.ndarray:
        """Which sequences are of a source, increasing; none if there is no such source."""
        return np.flatnonzero(self.source_ids_N == (self.sources.index(name) if name in self.sources else -1))

    def __len__(self) -> int:
        return len(self.lengths_N)

    def __getitem__(self, i: int) -> Sequence:
        here = slice(self.offsets_N1[i], self.offsets_N1[i + 1])
        return Sequence(
            tokens_T=self.tokens_M[here],
            targets_T=self.targets_M[here],
            weights_T=self.weights_M[here],
            source=self.sources[self.source_ids_N[i]],
            id=self.ids[i],
        )


class Writer:
    """Sequences, one by one, at the end of .npy files; the files get their true length, and a manifest, at the end."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = folder
        self._files = {name: open(folder / f"{name}.npy", "wb") for name in ARRAYS}  # noqa: SIM115  closed on exit
        self._counts = dict.fromkeys(ARRAYS, 0)
        for name in ARRAYS:
            self._write_header(name)
        self._sources: dict[str, int] = {}
        self._digest = hashlib.blake2b(digest_size=16)
        self.trained = 0

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def append(self, sequence: Sequence) -> None:
        """Write one sequence behind the others.

        Raises:
            DataError: it brings more than `MAX_SOURCES` sources.
        """
        source_id = self._sources.setdefault(sequence.source, len(self._sources))
        if source_id == MAX_SOURCES:
            raise DataError(
                f"{sequence.id}: the column 'source' names more than {MAX_SOURCES} sources, and losses are summed for "
                "each; map another column in data.columns.source, or set it to '' to name sources after their files"
            )
        trained = int(np.count_nonzero(sequence.weights_T > 0))
        name = sequence.id.encode("utf-8", "replace")
        self._put("tokens_M", sequence.tokens_T)
        self._put("targets_M", sequence.targets_T)
        self._put("weights_M", sequence.weights_T)
        self._put_one("lengths_N", len(sequence.tokens_T))
        self._put_one("trained_N", trained)
        self._put_one("source_ids_N", source_id)
        self._put_one("id_lengths_N", len(name))
        self._put("id_bytes", np.frombuffer(name, np.uint8))
        self._digest.update(f"{len(sequence.tokens_T)} {sequence.source}\n".encode("utf-8", "surrogatepass"))
        for array in (sequence.tokens_T, sequence.targets_T, sequence.weights_T):
            self._digest.update(np.ascontiguousarray(array).data)
        self.trained += trained

    def finish(self, account: Account) -> None:
        """Write the true lengths and the manifest; from now on `load` takes the folder."""
        for name, file in self._files.items():
            file.seek(0)
            self._write_header(name)
            file.flush()
            os.fsync(file.fileno())
        sizes = {name: (self._folder / f"{name}.npy").stat().st_size for name in ARRAYS}
        is_small = sum(sizes.values()) < VERIFIED_BYTES
        manifest = {
            "sizes": sizes,
            "checksums": {name: _checksum_of_file(self._folder / f"{name}.npy") for name in ARRAYS if is_small},
            "sources": list(self._sources),
            "account": dataclasses.asdict(account),
            "fingerprint": self._digest.hexdigest(),
        }
        with open(self._folder / MANIFEST, "w", encoding="utf-8") as file:
            json.dump({"checksum": _checksum(manifest), "manifest": manifest}, file)
            file.flush()
            os.fsync(file.fileno())

    def _put(self, name: str, values: Any) -> None:
        self._files[name].write(np.asarray(values, ARRAYS[name]).tobytes())
        self._counts[name] += len(values)

    def _put_one(self, name: str, number: int) -> None:
        self._files[name].write(number.to_bytes(4, sys.byteorder))  # int32, as all arrays of one number a sequence
        self._counts[name] += 1

    def _write_header(self, name: str) -> None:
        # numpy leaves room in the header for a longer count, so that it can be written again.
        header = {"descr": np.dtype(ARRAYS[name]).str, "fortran_order": False, "shape": (self._counts[name],)}
        np.lib.format.write_array_header_1_0(self._files[name], header)


def load(folder: pathlib.Path, *, in_memory: bool) -> TokenizedSet:
    """Raises OSError, ValueError, KeyError or TypeError where the folder does not hold what its manifest says."""
    stored = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    manifest = stored["manifest"]
    if stored["checksum"] != _checksum(manifest):
        raise ValueError(f"the checksum of {MANIFEST} is wrong")
    for name, size in manifest["sizes"].items():
        found = (folder / f"{name}.npy").stat().st_size
        if found != size:
            raise ValueError(f"{name}.npy has {found} bytes, not {size}")
    for name, checksum in manifest["checksums"].items():
        if _checksum_of_file(folder / f"{name}.npy") != checksum:
            raise ValueError(f"the checksum of {name}.npy is wrong")
    # A plain view: slicing a np.memmap costs ten times as much.
    arrays = {n: np.load(folder / f"{n}.npy", mmap_mode=None if in_memory else "r").view(np.ndarray) for n in ARRAYS}
    return TokenizedSet(
        tokens_M=arrays["tokens_M"],
        targets_M=arrays["targets_M"],
        weights_M=arrays["weights_M"],
        offsets_N1=_offsets(arrays["lengths_N"]),
        lengths_N=arrays["lengths_N"],
        trained_N=arrays["trained_N"],
        sources=tuple(manifest["sources"]),
        source_ids_N=arrays["source_ids_N"],
        ids=Ids(arrays["id_bytes"], arrays["id_lengths_N"]),
        account=Account(**manifest["account"]),
        fingerprint=manifest["fingerprint"],
    )


def _offsets(lengths_N: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths_N, dtype=np.int64)])


def _checksum_of_file(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _checksum(manifest: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(manifest, sort_keys=True).encode(), digest_size=16).hexdigest()
