"""A pretrained model in: what its files say, and its weights straight into their final place on the devices.

In: a folder, hub id or .gguf file (`load_pretrained` reads everything but the weights, `load_params` the weights,
`load_model` both). Out: `Pretrained`, whose `params` is a nested dict of arrays, layers stacked, sharded as asked.
Each device's part is read, cast and sent on its own: the host never holds more than one part of one stacked tensor.
"""

import dataclasses
import functools
import itertools
import json
import math
import pathlib
from collections.abc import Callable, Container, Mapping, Sequence
from concurrent import futures
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding
from tokenizers import AddedToken
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from jax_sft.config import TEMPLATES, ModelSource, NewRowsStart
from jax_sft.data.chat import ChatTemplate
from jax_sft.data.template import check_template, named_template
from jax_sft.hf import gguf, mxfp4, names, parts, tensorfile
from jax_sft.hf.folder import resolve
from jax_sft.hf.new_rows import NewRows, read_table
from jax_sft.hf.stored import StoredTensor, stored_tensors
from jax_sft.hf.tokenizer import load_tokenizer, template_text
from jax_sft.model.config import ModelConfig
from jax_sft.model.decoder import abstract_params, float_dtype
from jax_sft.model.families import read_model_config
from jax_sft.sharding import shard_params

_READERS = 4  # tensors read at a time; each holds its part in the file's dtype
_HEAD_CHECK_BYTES = 64 * 2**20  # of a tied head that is there all the same, compared at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A model as its files describe it."""

    path: pathlib.Path  # the local folder or .gguf file
    config: ModelConfig
    tokenizer: PreTrainedTokenizerFast
    chat_template: str | None  # Jinja text
    stop_ids: tuple[int, ...]  # where its own files say that it stops
    hf_config: dict[str, Any]
    generation_config: dict[str, Any]
    # Of tokens added here; the files have no rows for them, or rows that nothing was learned in.
    new_ids: tuple[int, ...]
    stored_vocab_size: int  # rows of the files' embedding
    new_rows: NewRowsStart  # how the rows of `new_ids` start
    seed: int  # of what they draw
    params: dict[str, Any] | None  # None where only the files were read

    @functools.cached_property
    def template(self) -> ChatTemplate:
        """Its tokenizer and chat template in one, with its stop ids."""
        name = f"the chat template of {self.path}"
        return ChatTemplate(self.tokenizer, template=self.chat_template, stop_ids=self.stop_ids, name=name)


def load_model(
    source: str | pathlib.Path,
    *,
    revision: str | None = None,
    mesh: Mesh | None = None,
    dtype: str = "float32",
    chat_template: str | pathlib.Path | None = None,
    new_tokens: Sequence[str] = (),
    new_rows: NewRowsStart = "mean",
    seed: int = 0,
) -> Pretrained:
    """Files and weights of a model; see `load_pretrained` and `load_params`.

    Args:
        mesh: the weights are spread over it by their letters; None: they all go to one device.
        dtype: of the weights on the devices.
    """
    base = load_pretrained(
        source, revision=revision, chat_template=chat_template, new_tokens=new_tokens, new_rows=new_rows, seed=seed
    )
    shardings = None if mesh is None else shard_params(abstract_params(base.config), mesh)
    return dataclasses.replace(base, params=load_params(base, shardings=shardings, dtype=dtype))


def load_pretrained(
    source: str | pathlib.Path,
    *,
    revision: str | None = None,
    chat_template: str | pathlib.Path | None = None,
    new_tokens: Sequence[str] = (),
    new_rows: NewRowsStart = "mean",
    seed: int = 0,
    vocab_multiple: int = 1,
) -> Pretrained:
    """Everything a model's files say, without its weights.

    Args:
        source: a Hugging Face folder, a hub id or a .gguf file.
        revision: branch, tag or commit of a hub id.
        chat_template: a Jinja file, or one of `TEMPLATES`, that replaces the model's own template.
        new_tokens: control tokens that the vocabulary gets, unless it has them; the model's vocabulary grows with it.
        new_rows: how their rows start; see `ModelSource`.
        seed: of what they draw.
        vocab_multiple: embedding and head get rows of padding up to a multiple of it, which no file ever has.

    Raises:
        ValueError: nothing is there, a file cannot be read or holds what it must not, the architecture is not modelled,
            or the tokenizer has ids that the model has no embedding for.
    """
    path = resolve(source, revision=revision)
    if path.suffix == ".gguf":
        file = gguf.read(path)
        hf_config, generation_config = gguf.hf_config(file), gguf.generation_config(file)
    else:
        hf_config = _read_json(path / "config.json")
        if hf_config.get("model_type") is None:
            raise ValueError(f"{path / 'config.json'}: names no model_type; copy or download it again")
        has_generation = (path / "generation_config.json").is_file()
        generation_config = _read_json(path / "generation_config.json") if has_generation else {}
    try:
        config = read_model_config(hf_config)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    tokenizer = load_tokenizer(path, vocab_size=config.vocab_size)
    stored_vocab_size, new_ids = config.vocab_size, _added(tokenizer, new_tokens)
    vocab_size = max(stored_vocab_size, *(i + 1 for i in new_ids), 0)
    vocab_rows = -(-vocab_size // vocab_multiple) * vocab_multiple
    config = dataclasses.replace(config, vocab_size=vocab_size, vocab_rows=vocab_rows)
    template = template_text(tokenizer) if chat_template is None else _given_template(chat_template, tokenizer)
    stops = [
        *_special_ids(f"{source}: generation_config.json", generation_config, config.vocab_size),
        *_special_ids(f"{source}: config.json", hf_config, config.vocab_size),
        *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]),
    ]
    return Pretrained(
        path=path,
        config=config,
        tokenizer=tokenizer,
        chat_template=template,
        stop_ids=tuple(dict.fromkeys(stops)),
        hf_config=hf_config,
        generation_config=generation_config,
        new_ids=new_ids,
        stored_vocab_size=stored_vocab_size,
        new_rows=new_rows,
        seed=seed,
        params=None,
    )


def load_configured(model: ModelSource, *, seed: int) -> Pretrained:
    """`load_pretrained` of what a run's config says under `model`, and of its seed."""
    return load_pretrained(
        model.path,
        revision=model.revision,
        chat_template=model.chat_template,
        new_tokens=model.new_tokens,
        new_rows=model.new_rows,
        seed=seed,
        vocab_multiple=model.vocab_multiple,
    )


def load_params(
    base: Pretrained,
    *,
    shardings: Any | None = None,
    dtype: str = "float32",
    only: Container[str] | None = None,
    then: Callable[[str, jax.Array], Any] | None = None,
) -> dict[str, Any]:
    """Read the weights of a model into a tree of arrays.

    Args:
        base: what `load_pretrained` returned.
        shardings: a tree like the parameters'; None: everything on one device. Each process reads only its own part.
        dtype: "float32", "bfloat16" or "float16"; files of any mixture of dtypes are cast.
        only: paths of the parameters that are wanted ("blocks.q_LDNH"); None: all of them.
        then: makes of each parameter, by its path, what takes its place in the tree, before the next one is read.

    Raises:
        ValueError: tensors are missing, unexpected, of a wrong shape or of a quantised dtype, all at once; or `dtype`
            is none of these.
    """
    host_dtype = np.dtype(float_dtype(dtype))
    stored = _stored_tensors(base)
    abstract = abstract_params(base.config)
    stored_config = dataclasses.replace(
        base.config, vocab_size=base.stored_vocab_size, vocab_rows=base.stored_vocab_size
    )
    _check_tensors(base.path, stored, stored_config)
    _check_tied_head(base.path, stored, stored_config)
    one_device = SingleDeviceSharding(jax.local_devices()[0])
    wanted: Any = jax.tree.map(lambda _: one_device, abstract) if shardings is None else shardings
    shape_of = {rule.path: leaf.shape for rule, leaf in names.leaves(abstract, base.config)}
    placed = [found for found in names.leaves(wanted, base.config) if only is None or found[0].path in only]
    params: dict[str, Any] = {}
    read_in = {rule.path: parts.by_rows(rule, sharding, shape_of[rule.path]) for rule, sharding in placed}
    parts_of = {path: parts.parts(sharding, shape_of[path]) for path, sharding in read_in.items()}
    total = sum(math.prod(high - low for low, high in bounds) for held in parts_of.values() for bounds in held)
    # `delay`: a bar for what takes longer than a second, nothing for less
    show = jax.process_index() == 0
    with tqdm(total=total, desc="load weights", unit=" params", unit_scale=True, delay=1.0, disable=not show) as bar:
        for rule, sharding in placed:
            shape = shape_of[rule.path]
            tensors = {place: stored[name] for place, name in rule.names.items()}
            arrays = []
            for bounds, devices in parts_of[rule.path].items():
                part = _read_part(rule, tensors, bounds, host_dtype, bar, base)
                # Waiting lets the host's copy go before the next one is made.
                arrays += [jax.block_until_ready(jax.device_put(part, device)) for device in devices]
            array = jax.make_array_from_single_device_arrays(shape, read_in[rule.path], arrays)
            array = parts.moved(array, sharding)
            names.put(params, rule.path, array if then is None else then(rule.path, array))
    return params


def _read_part(
    rule: names.Rule,
    tensors: Mapping[names.Shape, StoredTensor],
    bounds: parts.Bounds,
    dtype: np.dtype,
    bar: tqdm,
    base: Pretrained,
) -> np.ndarray:
    """A part of one parameter, from the files, some tensors at a time into their place in the stack."""
    part = np.empty([high - low for low, high in bounds], dtype)
    slices = tuple(slice(low, high) for low, high in bounds)
    if rule.letters == "VD" and (base.new_ids or base.config.vocab_rows > base.stored_vocab_size):
        bar.update(part.size)
        new = NewRows(
            ids=base.new_ids,
            stored=base.stored_vocab_size,
            end=base.config.vocab_size,
            start=base.new_rows,
            seed=base.seed,
        )
        table = tensors[()]
        read_table(table.read, part, slices, new, width=table.shape[1], name=rule.path)
        return part
    stack, own = bounds[: len(rule.stack)], slices[len(rule.stack) :]
    # A file's tensor of all experts is read by one expert at a time: what is dequantised takes no more room than that.
    first, *rest = own
    pieces = [slice(e, e + 1) for e in range(first.start, first.stop)] if rule.letters[0] == "E" else [first]

    def read(place: names.Shape, piece: slice) -> int:
        target = part[(*(at - low for at, (low, _) in zip(place, stack, strict=True)), ...)]
        target = target[piece.start - first.start : piece.stop - first.start]
        target[...] = rule.from_file(tensors[place].read(rule.file_slices((piece, *rest))), target.shape)
        return target.size

    places = itertools.product(*(range(low, high) for low, high in stack))
    with futures.ThreadPoolExecutor(_READERS) as pool:  # casts and transposes go on in numpy, without the lock
        for size in pool.map(read, *zip(*itertools.product(places, pieces), strict=True)):
            bar.update(size)
    return part


def _added(tokenizer: PreTrainedTokenizerFast, new_tokens: Sequence[str]) -> tuple[int, ...]:
    """Ids of the tokens that the vocabulary did not have; it has them now."""
    missing = [token for token in dict.fromkeys(new_tokens) if token not in tokenizer.get_vocab()]
    if any(not token.strip() for token in new_tokens):
        raise ValueError(f"model.new_tokens = {tuple(new_tokens)!r}: a token must have a character that is no blank")
    pieces = {*new_tokens} - {*missing} - {str(token) for token in tokenizer.added_tokens_decoder.values()}
    if pieces:
        raise ValueError(
            f"model.new_tokens: {', '.join(map(repr, sorted(pieces)))} is an ordinary piece of the vocabulary already, "
            "and would be no control token; choose another text"
        )
    added: Any = [AddedToken(token, special=True, normalized=False) for token in missing]
    tokenizer.add_tokens(added, special_tokens=True)
    return tuple(tokenizer.get_vocab()[token] for token in missing)


def _stored_tensors(base: Pretrained) -> Mapping[str, StoredTensor]:
    stored = stored_tensors(base.path)
    # Of quantised files, families.py lets none through but these.
    return mxfp4.joined(stored) if base.hf_config.get("quantization_config") else stored


def _check_tensors(path: pathlib.Path, stored: Mapping[str, StoredTensor], config: ModelConfig) -> None:
    """Every tensor is there, with its shape, and no other."""
    wanted: dict[str, tuple[int, ...]] = {}
    for rule in names.rules(config).values():
        wanted |= dict.fromkeys(rule.names.values(), rule.file_shape)
    copies = {names.HEAD} - set(wanted)  # a tied head may be there all the same
    missing = names.folded([name for name in wanted if name not in stored])
    unexpected = names.folded([name for name in stored if name not in wanted and name not in copies])
    wrong_shape: dict[str, list[str]] = {}
    quantised: dict[str, list[str]] = {}
    for name, tensor in stored.items():
        if name in wanted and tensor.shape != wanted[name]:
            wrong_shape.setdefault(f"{tensor.shape}, expected {wanted[name]}", []).append(name)
        if isinstance(tensor, tensorfile.Entry) and tensor.dtype not in tensorfile.DTYPES:
            quantised.setdefault(tensor.dtype, []).append(name)
    problems = [f"missing: {name}" for name in missing]
    problems += [f"unexpected: {name}" for name in unexpected]
    problems += [f"wrong shape: {n} is {what}" for what, of in wrong_shape.items() for n in names.folded(of)]
    problems += [f"not plain numbers: {n} is {dtype}" for dtype, of in quantised.items() for n in names.folded(of)]
    if problems:
        tied = len(problems) == 1 and missing == [names.HEAD]
        way_out = 'set "tie_word_embeddings": true there' if tied else "take both from one model, in plain numbers"
        lines = "\n".join(f"  {p}" for p in problems)
        raise ValueError(f"{path}: the weights do not fit config.json; {way_out}:\n{lines}")


def _check_tied_head(path: pathlib.Path, stored: Mapping[str, StoredTensor], config: ModelConfig) -> None:
    """A head that config.json ties to the embedding is absent from the file, or equal to the embedding."""
    if not config.tied_head or names.HEAD not in stored:
        return
    head, embed = stored[names.HEAD], stored[names.EMBED]
    rows = max(1, _HEAD_CHECK_BYTES // (4 * embed.shape[1]))
    same = head.shape == embed.shape and all(
        np.array_equal(head.read((s, slice(None))), embed.read((s, slice(None))))
        for s in (slice(i, i + rows) for i in range(0, embed.shape[0], rows))
    )
    if not same:
        raise ValueError(
            f"{path}: config.json ties the head to the embedding, but {names.HEAD} differs from {names.EMBED}; "
            'set "tie_word_embeddings": false'
        )


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        said = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error}); copy or download it again") from error
    if not isinstance(said, dict):
        raise ValueError(
            f"{path}: holds a JSON {'null' if said is None else type(said).__name__}, not an object {{...}}; copy or "
            "download it again"
        )
    return said


def _given_template(given: str | pathlib.Path, tokenizer: PreTrainedTokenizerFast) -> str:
    if given in TEMPLATES:
        return named_template(str(given), tokenizer)
    path = pathlib.Path(given)
    if not path.is_file():
        raise ValueError(
            f"model.chat_template: there is no file {path}; name a Jinja file or one of {', '.join(TEMPLATES)}"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"model.chat_template: {path} cannot be read ({error}); save it as UTF-8 text") from error
    check_template(text, name=f"model.chat_template: {path}")
    return text


def _special_ids(place: str, said: Mapping[str, Any], vocab_size: int) -> list[int]:
    """Where a file says that the model stops; its pad is checked too, since an export reads it."""

    def is_whole(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool)

    stops, pad = said.get("eos_token_id"), said.get("pad_token_id")
    if pad is not None and not is_whole(pad):
        raise ValueError(
            f"{place}: pad_token_id = {pad!r} must be a token's id, a whole number; write that, or remove it"
        )
    ids = stops if isinstance(stops, list) else [] if stops is None else [stops]
    if not all(is_whole(i) and 0 <= i < vocab_size for i in ids):
        raise ValueError(
            f"{place}: eos_token_id = {stops!r} must be a token's id, a whole number below vocab_size = {vocab_size}, "
            "or a list of such; write that, or remove it"
        )
    return ids
