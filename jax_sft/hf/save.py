"""A trained model out: a Hugging Face folder that transformers and vLLM load unchanged.

In: the parameter tree (sharded or not, in one process or several), the tokenizer, template and stop ids that were
trained. Out: config.json, safetensors (with an index when there are several), tokenizer files, chat template,
generation_config.json, README.md and jax_sft.json (the facts and the list of files).
Everything is written into a sibling folder, config.json last, and renamed: half a folder is never taken for a whole.
"""

import collections
import contextlib
import functools
import json
import math
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from tqdm import tqdm

from jax_sft.hf import card, names, tensorfile
from jax_sft.hf.folder import CERTIFICATE, INDEX, MARK
from jax_sft.hf.tokenizer import save_tokenizer
from jax_sft.model.config import ModelConfig
from jax_sft.model.decoder import DTYPES
from jax_sft.model.spellings import with_both_spellings
from jax_sft.sharding import replicated

_NOT_ITS_OWN = ("transformers_version", "name_or_path", "quantization_config", "auto_map", "torch_dtype", "dtype")
# Tokens of known vocabularies that stand for nothing, in the order in which they make a good pad.
_PAD_TOKENS = ("<pad>", "<|pad|>", "<|finetune_right_pad_id|>", "<|endoftext|>", "[PAD]")


class Planned(NamedTuple):
    """One tensor that will be in a file: ours, or several of ours."""

    name: str
    parts: tuple[tuple[names.Rule, jax.Array], ...]  # each with all its layers and experts
    place: names.Shape  # where it lies in their stacks

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in the file."""
        return self.parts[0][0].file_shape


def save_model(
    out: str | pathlib.Path,
    *,
    config: ModelConfig,
    params: Mapping[str, Any],
    tokenizer: Any,
    hf_config: Mapping[str, Any],
    generation_config: Mapping[str, Any],
    chat_template: str | None,
    stop_ids: Sequence[int],
    dtype: str,
    max_shard_size: str | int,
    facts: Mapping[str, Any],
    name: str | None = None,
    source: pathlib.Path | None = None,
) -> list[pathlib.Path]:
    """Write the folder `out`; all processes of a run call it, process 0 writes.

    The weights come to the host one layer's tensor at a time. The exported model stops at exactly `stop_ids`, and pads
    with none of them: a pad that is also a stop id teaches later trainings to never stop. If the source's pad is one,
    the tokenizer's unknown token or a pad-like token of its vocabulary is written instead (generation_config.json,
    config.json, tokenizer_config.json); if it has none, generation_config.json and config.json name no pad.

    Args:
        out: the folder; it must be new, empty, or an earlier export, which is replaced as a whole.
        params: tree of arrays as `load_params` gives it.
        hf_config, generation_config: the source's; what says nothing about the weights travels on.
        chat_template: Jinja text that was trained with.
        stop_ids: token ids that were trained to end an answer.
        dtype: float32, bfloat16 or float16.
        max_shard_size: of one safetensors file, like "5GB".
        facts: what the model card tells of the training.
        name: what the model card calls the model; None: as the folder.
        source: the local folder or file that the model was read from, which is never written to.

    Returns:
        The files written; empty in processes other than 0.

    Raises:
        ValueError: the folder is the source's or somebody else's, there is no stop id, or a weight is not finite in
            `dtype`.
        OSError: the disk is full or cannot be written; nothing is left behind.
    """
    out = pathlib.Path(out).expanduser().resolve()
    if dtype not in DTYPES:
        raise ValueError(f"export.dtype = {dtype!r} is not one of {', '.join(DTYPES)}")
    check_stop_ids(out, stop_ids, config)
    files, index = _plan(params, config, np.dtype(dtype), max_shard_size)
    tensors = _fetched(files, np.dtype(dtype))
    pad_id = find_pad_id(tokenizer, generation_config, hf_config, stop_ids, config.vocab_size)
    generation = generation_json(generation_config, tokenizer, stop_ids, pad_id)
    written: list[str] = []

    def write(folder: pathlib.Path) -> None:
        _write_weights(folder, files, index, tensors, np.dtype(dtype))
        save_tokenizer(folder, tokenizer, chat_template=chat_template, pad_id=pad_id)
        write_json(folder / "generation_config.json", generation)
        (folder / "README.md").write_text(card.text(name or out.name, facts), encoding="utf-8")
        written.extend(sorted([*(p.name for p in folder.iterdir()), MARK, "config.json"]))
        write_json(folder / MARK, {"facts": dict(facts), "files": [*written, CERTIFICATE]})
        write_json(folder / "config.json", _config_json(hf_config, config, generation, dtype))

    write_together(out, source, tensors, write)
    return [out / name for name in written]


def check_stop_ids(out: pathlib.Path, stop_ids: Sequence[int], config: ModelConfig) -> None:
    """An exported model ends its answers.

    Raises:
        ValueError: there is no stop id, or one is outside the vocabulary.
    """
    strangers = [i for i in stop_ids if not 0 <= i < config.vocab_size]
    if not stop_ids or strangers:
        said = f"{strangers} are outside the vocabulary" if strangers else "there is none"
        raise ValueError(f"export to {out}: stop ids: {said}; a model without them never ends an answer")


def write_together(
    out: pathlib.Path,
    source: pathlib.Path | None,
    tensors: Iterator[np.ndarray],
    write: Callable[[pathlib.Path], None],
) -> None:
    """Process 0 writes the folder, by `write` into a sibling of it; all others take part in fetching `tensors`.

    Raises:
        ValueError, OSError: as `save_model`.
    """
    failure: Exception | None = None
    try:
        if jax.process_index() == 0:
            with _whole_or_nothing(out, source) as folder:
                write(folder)
    except (OSError, ValueError) as error:
        failure = error
    if jax.process_count() > 1:
        # Each fetch is a collective: every process goes through all of them, whatever became of process 0.
        try:
            collections.deque(tensors, maxlen=0)
        except ValueError as error:  # of weights that are not finite: found by all, told by all
            failure = failure or error
        if not multihost_utils.broadcast_one_to_all(np.int32(failure is None)) and failure is None:
            raise OSError(f"export to {out}: process 0 could not write it; see its message")
    if failure is not None:
        raise failure


def check_destination(out: str | pathlib.Path, *, source: pathlib.Path | None = None) -> None:
    """What `save_model` will ask of its folder, to be known before hours of training; nothing is left behind.

    Raises:
        ValueError: `out` is a file, a folder with somebody else's files in it, is, holds or lies in the `source`, or
            cannot be written.
    """
    out = pathlib.Path(out).expanduser().resolve()
    try:
        _check_place(out, source)
        # Asked by doing: permission bits say little of root, network disks and read-only mounts.
        with tempfile.TemporaryDirectory(prefix=".jax_sft.", dir=next(p for p in out.parents if p.exists())):
            pass
    except OSError as error:
        raise ValueError(
            f"export to {out}: cannot be written there ({error.strerror or error}); name another folder"
        ) from error


def check_shard_size(size: str | int) -> None:
    """`max_shard_size` can be followed.

    Raises:
        ValueError: it is no size above 0.
    """
    number = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*[KMGT]B\s*", str(size), re.IGNORECASE)
    if size <= 0 if isinstance(size, int) else number is None or float(number[1]) == 0:
        raise ValueError(f"export.max_shard_size = {size!r} is no size; write one like 5GB")


def _plan(
    params: Mapping[str, Any], config: ModelConfig, dtype: np.dtype, max_shard_size: str | int
) -> tuple[dict[str, list[Planned]], dict[str, Any] | None]:
    """What goes into which file, in order, and the index where there are several; the same in every process."""
    check_shard_size(max_shard_size)
    sharing: dict[str, list[tuple[names.Rule, jax.Array]]] = {}
    for rule, array in names.leaves(params, config):
        sharing.setdefault(rule.hf, []).append((rule, array))
    parts_of = {name: tuple(sorted(parts, key=lambda p: p[0].row.part)) for name, parts in sharing.items()}
    all_places = [Planned(name, parts, at) for parts in parts_of.values() for at, name in parts[0][0].names.items()]
    first, *rest = [p for p in all_places if not p.place]
    layers = sorted((p for p in all_places if p.place), key=lambda p: p.place[0])
    planned = {p.name: p for p in [first, *layers, *rest]}
    split = huggingface_hub.split_state_dict_into_shards_factory(
        planned,
        get_storage_size=lambda p: math.prod(p.shape) * dtype.itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    # Not in the order of `planned`: a tensor that fills a file by itself gets it at once.
    files = {file: [planned[name] for name in held] for file, held in split.filename_to_tensors.items()}
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    return files, index if split.is_sharded else None


def _fetched(files: Mapping[str, list[Planned]], dtype: np.dtype) -> Iterator[np.ndarray]:
    """Each tensor of the plan on this host, in the file's layout and dtype; the whole one even if it is sharded."""
    show = jax.process_index() == 0
    plan = [planned for held in files.values() for planned in held]
    for name, parts, place in tqdm(plan, "save weights", unit=" tensors", delay=1.0, disable=not show):
        tensor = names.file_tensor((rule, fetch(array, place, dtype=dtype)) for rule, array in parts)
        yield finite(name, tensor)


def finite(name: str, tensor: np.ndarray) -> np.ndarray:
    """`tensor` as it is.

    Raises:
        ValueError: it holds values that are not finite.
    """
    # Some at a time: what `isfinite` answers is half as large as what it is asked of.
    if not all(np.isfinite(part).all() for part in np.array_split(tensor.reshape(-1), 1 + tensor.size // 2**22)):
        raise ValueError(
            f"export: {name} holds values that are not finite in {tensor.dtype}; "
            "choose --dtype bfloat16 or float32, or an earlier checkpoint if the training diverged"
        )
    return tensor


def fetch(array: jax.Array, place: names.Shape, *, dtype: np.dtype) -> np.ndarray:
    """One layer (and expert) of an array on this host, whole and cast."""
    sharding = array.sharding
    cut = tuple(sharding.shard_shape(array.shape)[i] < array.shape[i] for i in range(len(place)))
    if jax.process_count() > 1 and isinstance(sharding, NamedSharding):
        whole = replicated(sharding.mesh)  # gathered on the devices, across hosts
        return np.asarray(_pick(whole, dtype, cut)(array, [jnp.int32(i) for i in place]).addressable_data(0))
    if place or array.dtype != dtype:
        # A layer's copy, not a slice of np.asarray(array): that stays cached on `array`, in the end the whole model.
        if isinstance(sharding, NamedSharding):
            own = (*sharding.spec, *[None] * array.ndim)[len(place) : array.ndim]  # as it lies, without L (and E)
            sharding = NamedSharding(sharding.mesh, PartitionSpec(*own))
        array = _pick(sharding, dtype, cut)(array, [jnp.int32(i) for i in place])
    tensor = np.empty(array.shape, dtype)
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            tensor[shard.index] = shard.data
    return tensor


@functools.lru_cache
def _pick(sharding: Sharding, dtype: np.dtype, cut: tuple[bool, ...]) -> Any:
    """Compiled once per shape: one layer (and expert) of a stacked array, cast.

    Along an axis that is `cut` over devices an index would gather all of it on each. There all but the one are set to
    zero and added up: as whole numbers with the same bits, since -0.0 + 0.0 would lose its sign.
    """
    as_bits = np.dtype(f"uint{8 * dtype.itemsize}")

    def pick(array: jax.Array, place: list[jax.Array]) -> jax.Array:
        for i, is_cut in zip(place, cut, strict=True):
            if is_cut:
                bits = jax.lax.bitcast_convert_type(array.astype(dtype), as_bits)
                ids = jax.lax.broadcasted_iota(jnp.int32, bits.shape, 0)
                only = jnp.where(ids == i, bits, jnp.zeros((), as_bits)).sum(0, dtype=as_bits)
                array = jax.lax.bitcast_convert_type(only, dtype)
            else:
                array = jax.lax.dynamic_index_in_dim(array, i, keepdims=False)
        return array.astype(dtype)

    return jax.jit(pick, out_shardings=sharding)


def _write_weights(
    folder: pathlib.Path,
    files: Mapping[str, list[Planned]],
    index: dict[str, Any] | None,
    tensors: Iterator[np.ndarray],
    dtype: np.dtype,
) -> None:
    need = sum(math.prod(p.shape) for held in files.values() for p in held) * dtype.itemsize
    free = shutil.disk_usage(folder).free
    if need > free:
        raise OSError(f"{need / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free")
    for file, held in files.items():
        tensorfile.write(folder / file, {p.name: p.shape for p in held}, dtype, tensors)
    if index is not None:
        write_json(folder / INDEX, index)


@contextlib.contextmanager
def _whole_or_nothing(out: pathlib.Path, source: pathlib.Path | None) -> Iterator[pathlib.Path]:
    """A folder beside `out` to write into; it becomes `out` at the end, or is gone if anything went wrong.

    Raises:
        ValueError: as `check_destination`.
        OSError: it could not be written.
    """
    folder, old = out.with_name(f".{out.name}.partial"), out.with_name(f".{out.name}.old")
    try:
        if old.exists():  # an earlier export died between its two renames, or just after them
            shutil.rmtree(old) if out.exists() else old.rename(out)
        check_destination(out, source=source)
        shutil.rmtree(folder, ignore_errors=True)  # what a killed export left
        folder.mkdir(parents=True)
        yield folder
        for path in [*folder.iterdir(), folder]:
            _sync(path)
        if out.exists():
            out.rename(old)
        folder.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise OSError(
            f"export to {out} failed: {error.strerror or error}; nothing was left there, so free some space or choose "
            "another folder and export again"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check_place(out: pathlib.Path, source: pathlib.Path | None) -> None:
    """`out` may be written: it is new, empty, or an export of ours with nothing added, and not the source itself."""
    source = None if source is None else source.resolve()
    if source is not None and (out.is_relative_to(source) or source.is_relative_to(out)):
        raise ValueError(
            f"export to {out}: it is, holds or lies in {source}, which the model was read from; name a folder beside it"
        )
    if out.is_file():
        raise ValueError(f"export to {out}: is a file; name a folder")
    held = {p.name for p in out.iterdir()} if out.is_dir() else set()
    if held and MARK not in held:
        raise ValueError(f"export to {out}: the folder is not empty and is no earlier export; name another one")
    try:
        files = json.loads((out / MARK).read_text(encoding="utf-8"))["files"] if held else []
        added = sorted(held.difference(files))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"export to {out}: its {MARK} cannot be read ({error}); name another folder") from error
    if added:
        raise ValueError(
            f"export to {out}: beside an earlier export it holds {', '.join(added[:5])}; move that away first"
        )


def find_pad_id(
    tokenizer: Any,
    generation_config: Mapping[str, Any],
    hf_config: Mapping[str, Any],
    stop_ids: Sequence[int],
    vocab_size: int,
) -> int | None:
    """A token to pad with that does not stop: the source's own, or one of its vocabulary that stands for nothing."""
    said = [generation_config.get("pad_token_id"), tokenizer.pad_token_id, hf_config.get("pad_token_id")]
    vocabulary = tokenizer.get_vocab()
    known = [tokenizer.unk_token_id, *(vocabulary.get(token) for token in _PAD_TOKENS)]
    return next((i for i in [*said, *known] if i is not None and 0 <= i < vocab_size and i not in stop_ids), None)


def generation_json(
    source: Mapping[str, Any], tokenizer: Any, stop_ids: Sequence[int], pad_id: int | None
) -> dict[str, Any]:
    """The source's generation_config.json, with what was trained to end an answer."""
    kept = {k: v for k, v in source.items() if k not in _NOT_ITS_OWN and not k.startswith("_")}
    bos_id = source.get("bos_token_id", tokenizer.bos_token_id)
    ids = {"bos_token_id": bos_id, "eos_token_id": [int(i) for i in dict.fromkeys(stop_ids)], "pad_token_id": pad_id}
    return {k: v for k, v in (kept | ids).items() if v is not None}


def _config_json(
    source: Mapping[str, Any], config: ModelConfig, generation: Mapping[str, Any], dtype: str
) -> dict[str, Any]:
    """The source's config.json, with what was trained, and with the ids that generation_config.json names."""
    kept = {k: v for k, v in source.items() if k not in _NOT_ITS_OWN and not k.startswith("_")}
    stops = generation["eos_token_id"]
    ids = {
        "bos_token_id": generation.get("bos_token_id"),
        "eos_token_id": stops[0] if len(stops) == 1 else stops,
        "pad_token_id": generation.get("pad_token_id"),
    }
    sizes = {"vocab_size": config.vocab_size}
    # Two spellings: readers before transformers 4.56 know only the first.
    return with_both_spellings(kept) | sizes | ids | {"torch_dtype": dtype, "dtype": dtype, "use_cache": True}


def write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object as the files of an export are written."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")


def _sync(path: pathlib.Path) -> None:
    """To the disk, before the rename says that it is there."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
