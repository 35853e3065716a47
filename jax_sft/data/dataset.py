"""The tokenised set: every sequence of the data as flat memory-mapped arrays, made once and cached by content.

In: paths and a chat template. Out: a `TokenizedSet` and the `Account` of what became of each row. The cache's key is a
hash of all bytes that matter (files, tokenizer, template, options, this code), so that it is never stale. Workers
tokenise in processes of their own that import no jax; the order of the sequences does not depend on their number.

Letters: N sequence, M position in all sequences laid end to end, T position in one.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

from jax_sft.config import DataConfig
from jax_sft.data.chat import ChatTemplate
from jax_sft.data.conversation import Account, DataError, Sequence
from jax_sft.data.formats import read_conversations
from jax_sft.data.source import HubSet, count_rows, files_of, load_hub
from jax_sft.data.workers import tokenized

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
OPTIONS = (
    "format",
    "columns",
    "split",
    "max_length",
    "too_long",
    "train_on",
    "train_turns",
    "mask",
)  # shape the tokens
MAX_SOURCES = 256  # losses are summed for each, on the device
MANIFEST = "manifest.json"
HASH_BLOCK_BYTES = 2**20
ABANDONED_SECONDS = 24 * 3600.0
BAR_DELAY_SECONDS = 2.0  # what is done by then needs no bar

log = logging.getLogger(__name__)


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


@dataclasses.dataclass(frozen=True)
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


def tokenize(
    config: DataConfig,
    paths: tuple[str, ...],
    template: ChatTemplate,
    *,
    cache_dir: pathlib.Path | None,
    progress: bool = True,
) -> TokenizedSet:
    """The set of `paths`, from the cache or made now by `config.workers` processes (0: this one).

    A cached set that is damaged is made again, with a warning. Without `cache_dir` the arrays are in memory alone.

    Raises:
        DataError: of `source` and `formats`; nothing can be trained on; too many sources; the cache cannot be written.
    """
    if cache_dir is None:
        with tempfile.TemporaryDirectory(prefix="jax-sft-") as scratch:
            _build(pathlib.Path(scratch), config, paths, template, progress=progress)
            return _load(pathlib.Path(scratch), in_memory=True)
    home = cache_dir / _key(config, paths, template, progress=progress)
    if home.exists():
        try:
            return _load(home, in_memory=False)
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s: the tokenised set is damaged (%s); it is made again", home, error)
            shutil.rmtree(home)
    scratch = cache_dir / f"{home.name}.tmp-{secrets.token_hex(8)}"
    try:
        scratch.mkdir(parents=True)
        _remove_abandoned(cache_dir)
        _build(scratch, config, paths, template, progress=progress)
        try:
            os.rename(scratch, home)
        except OSError:
            if not home.exists():  # it does where another process was faster: its set is the same
                raise
    except OSError as error:
        raise DataError(
            f"{cache_dir}: the tokenised set cannot be written ({error.strerror or error}); "
            "free some space, or set data.cache to another folder"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return _load(home, in_memory=False)


def dump(dataset: TokenizedSet, tokenizer: Any) -> Iterator[dict[str, Any]]:
    """Each sequence before packing, ready for JSON: `weights[i]` is the weight of predicting `tokens[i]`.

    `tokenizer` is a Hugging Face one.
    """
    for i in range(len(dataset)):
        sequence = dataset[i]
        tokens = [int(sequence.tokens_T[0]), *sequence.targets_T.tolist()]
        yield {
            "id": sequence.id,
            "source": sequence.source,
            "tokens": tokens,
            "weights": [0.0, *sequence.weights_T.tolist()],
            "text": tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False),
        }


def _remove_abandoned(cache_dir: pathlib.Path) -> None:
    """Half-made sets of processes that were killed. A process that still works on one writes to it all the time."""
    for scratch in cache_dir.glob("*.tmp-*"):
        written = max((p.stat().st_mtime for p in [scratch, *scratch.iterdir()]), default=0.0)
        if time.time() - written > ABANDONED_SECONDS:
            shutil.rmtree(scratch, ignore_errors=True)


def _key(config: DataConfig, paths: tuple[str, ...], template: ChatTemplate, *, progress: bool) -> str:
    """A hash of every byte that can change the set, this room's code included."""
    digest = hashlib.blake2b(digest_size=16)

    def feed(part: bytes) -> None:
        digest.update(len(part).to_bytes(8, "little") + part)  # with its length: "ab", "c" is not "a", "bc"

    for module in sorted(pathlib.Path(__file__).parent.glob("*.py")):
        feed(module.read_bytes())
    feed(json.dumps({name: getattr(config, name) for name in OPTIONS}, sort_keys=True).encode())
    feed(template.fingerprint.encode())
    places = files_of(paths)
    size = sum(place.stat().st_size for place in places if isinstance(place, pathlib.Path))
    with _bar("hashing data", "B", size, progress) as bar:
        for place in places:
            feed(str(place).encode())  # ids and sources are made of it
            if isinstance(place, HubSet):
                for row in load_hub(place, config.split):
                    feed(json.dumps(row, sort_keys=True, default=str).encode())
                continue
            feed(place.stat().st_size.to_bytes(8, "little"))
            with open(place, "rb") as stream:
                while block := stream.read(HASH_BLOCK_BYTES):
                    digest.update(block)
                    bar.update(len(block))
    return digest.hexdigest()


def _build(
    folder: pathlib.Path, config: DataConfig, paths: tuple[str, ...], template: ChatTemplate, *, progress: bool
) -> None:
    """Tokenise everything and write the set into an empty folder, its manifest last."""
    reading, tokenising = Account(), Account()  # apart, because readers run ahead of workers by their number
    conversations = read_conversations(config, paths, reading)
    total = count_rows(paths, split=config.split) if progress else None
    with (
        _Writer(folder) as writer,
        _bar("tokenising data", " rows", total, progress) as bar,
        contextlib.closing(tokenized(conversations, template, config)) as results,
    ):
        for sequences, account in results:
            for sequence in sequences:
                writer.append(sequence)
            tokenising.merge(account)
            bar.update(reading.read - bar.n)
        account = reading + tokenising
        if not writer.trained:
            raise DataError(_nothing(paths, account))
        writer.finish(account)


def _nothing(paths: tuple[str, ...], account: Account) -> str:
    reasons = sorted(account.dropped.items(), key=lambda item: -item[1])
    said = "; ".join(f"{n} dropped: {reason} (first: {account.examples[reason][0]})" for reason, n in reasons[:5])
    return (
        f"{', '.join(paths)}: nothing can be trained on; {account.read} conversations read, {said or 'none dropped'}; "
        "correct the data, or data.format, data.columns, data.train_on or data.max_length"
    )


def _bar(what: str, unit: str, total: int | None, progress: bool) -> tqdm:
    scaled = unit == "B"
    return tqdm(
        desc=what, unit=unit, total=total, unit_scale=scaled, delay=BAR_DELAY_SECONDS, leave=False, disable=not progress
    )


class _Writer:
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

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def append(self, sequence: Sequence) -> None:
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
        self._put("lengths_N", [len(sequence.tokens_T)])
        self._put("trained_N", [trained])
        self._put("source_ids_N", [source_id])
        self._put("id_lengths_N", [len(name)])
        self._put("id_bytes", np.frombuffer(name, np.uint8))
        self._digest.update(f"{len(sequence.tokens_T)} {sequence.source}\n".encode())
        for array in (sequence.tokens_T, sequence.targets_T, sequence.weights_T):
            self._digest.update(np.ascontiguousarray(array).data)
        self.trained += trained

    def finish(self, account: Account) -> None:
        for name, file in self._files.items():
            file.seek(0)
            self._write_header(name)
            file.flush()
            os.fsync(file.fileno())
        manifest = {
            "sizes": {name: (self._folder / f"{name}.npy").stat().st_size for name in ARRAYS},
            "sources": list(self._sources),
            "account": dataclasses.asdict(account),
            "fingerprint": self._digest.hexdigest(),
        }
        with open(self._folder / MANIFEST, "w", encoding="utf-8") as file:
            json.dump({"checksum": _checksum(manifest), "manifest": manifest}, file, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())

    def _put(self, name: str, values: Any) -> None:
        self._files[name].write(np.asarray(values, ARRAYS[name]).tobytes())
        self._counts[name] += len(values)

    def _write_header(self, name: str) -> None:
        # numpy leaves room in the header for a longer count, so that it can be written again.
        header = {"descr": np.dtype(ARRAYS[name]).str, "fortran_order": False, "shape": (self._counts[name],)}
        np.lib.format.write_array_header_1_0(self._files[name], header)


def _load(folder: pathlib.Path, *, in_memory: bool) -> TokenizedSet:
    """Raises OSError, ValueError, KeyError or TypeError where the folder does not hold what its manifest says."""
    stored = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    manifest = stored["manifest"]
    if stored["checksum"] != _checksum(manifest):
        raise ValueError(f"the checksum of {MANIFEST} is wrong")
    for name, size in manifest["sizes"].items():
        found = (folder / f"{name}.npy").stat().st_size
        if found != size:
            raise ValueError(f"{name}.npy has {found} bytes, not {size}")
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


def _checksum(manifest: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(manifest, sort_keys=True).encode(), digest_size=16).hexdigest()
