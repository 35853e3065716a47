"""The tokenised set: every sequence of the data as flat memory-mapped arrays, made once and cached by content.

In: paths and a chat template. Out: a `TokenizedSet` and the `Account` of what became of each row. The cache's key is a
hash of all bytes that matter (files, tokenizer, template, options, this code), so that it is never stale. Workers
tokenise in processes of their own that import no jax; the order of the sequences does not depend on their number.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
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

from tqdm import tqdm

from jax_sft.config import DataConfig
from jax_sft.data.chat import ChatTemplate
from jax_sft.data.conversation import Account, DataError
from jax_sft.data.formats import read_conversations
from jax_sft.data.holdout import digest_of, noting
from jax_sft.data.quality.screen import files_read, references_of, screened
from jax_sft.data.source import HubSet, Part, count_rows, files_of, load_hub, opened
from jax_sft.data.store import TokenizedSet, Writer, load
from jax_sft.data.workers import tokenized

# The options that shape the tokens.
OPTIONS = (
    "format",
    "columns",
    "header",
    "quoted",
    "split",
    "max_length",
    "too_long",
    "train_on",
    "train_turns",
    "mask",
    "template_args",
    "control_text",
)
HASH_BLOCK_BYTES = 2**20
ABANDONED_SECONDS = 24 * 3600.0
BAR_DELAY_SECONDS = 2.0  # what is done by then needs no bar

log = logging.getLogger(__name__)


def tokenize(
    config: DataConfig,
    parts: tuple[Part, ...],
    template: ChatTemplate,
    *,
    cache_dir: pathlib.Path | None,
    progress: bool = True,
    references: tuple[Part, ...] = (),
) -> TokenizedSet:
    """The set of all `parts`, from the cache or made now, by processes as `config.workers` says.

    What `config.quality` says is screened before; `references` are the sets whose prompts must not be trained on.

    A cached set that is damaged (`store` says what is checked) is made again, with a warning. Without `cache_dir` the
    arrays are in memory alone.

    Raises:
        DataError: of `source` and `formats`; nothing can be trained on; too many sources; the cache cannot be written.
    """
    if cache_dir is None:
        with _writing_to(tempfile.gettempdir()), tempfile.TemporaryDirectory(prefix="jax-sft-") as scratch:
            _build(pathlib.Path(scratch), config, parts, template, references, progress=progress)
            return load(pathlib.Path(scratch), in_memory=True)
    home = cache_dir / _key(config, parts, template, references, progress=progress)
    with _writing_to(cache_dir):
        if home.exists():
            try:
                return load(home, in_memory=False)
            except (OSError, ValueError, KeyError, TypeError) as error:
                log.warning("%s: the tokenised set is damaged (%s); it is made again", home, error)
                shutil.rmtree(home)
        scratch = cache_dir / f"{home.name}.tmp-{secrets.token_hex(8)}"
        try:
            scratch.mkdir(parents=True)
            _remove_abandoned(cache_dir)
            _build(scratch, config, parts, template, references, progress=progress)
            try:
                os.rename(scratch, home)
            except OSError:
                if not home.exists():  # it does where another process was faster: its set is the same
                    raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return load(home, in_memory=False)


def check_context(found: TokenizedSet, max_positions: int, *, name: str) -> None:
    """Refuse conversations longer than the model was made for.

    Raises:
        ValueError: with the longest and the model's number of positions.
    """
    longest = int(found.lengths_N.max())
    if longest > max_positions:
        where = found.ids[int(found.lengths_N.argmax())]
        raise ValueError(
            f"{name}: {where} has {longest} tokens, but the model has {max_positions} positions "
            f"(max_position_embeddings); set data.max_length to {max_positions} or less"
        )


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


@contextlib.contextmanager
def _writing_to(folder: pathlib.Path | str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{folder}: the tokenised set cannot be written ({error.strerror or error}); "
            "free some space, or set data.cache to another folder"
        ) from error


def _remove_abandoned(cache_dir: pathlib.Path) -> None:
    """Half-made sets of processes that were killed. A process that still works on one writes to it all the time."""
    for scratch in cache_dir.glob("*.tmp-*"):
        with contextlib.suppress(OSError):  # gone meanwhile
            written = max(p.stat().st_mtime for p in [scratch, *scratch.iterdir()])
            if time.time() - written > ABANDONED_SECONDS:
                shutil.rmtree(scratch, ignore_errors=True)


def _key(
    config: DataConfig,
    parts: tuple[Part, ...],
    template: ChatTemplate,
    references: tuple[Part, ...] = (),
    *,
    progress: bool,
) -> str:
    """A hash of all that can change the set, this room's code included."""
    digest = hashlib.blake2b(digest_size=16)

    def feed(part: bytes) -> None:
        digest.update(len(part).to_bytes(8, "little") + part)  # with its length: "ab", "c" is not "a", "bc"

    for module in sorted(pathlib.Path(__file__).parent.rglob("*.py")):
        feed(module.read_bytes())
    for library in ("tokenizers", "transformers", "jinja2"):
        feed(importlib.metadata.version(library).encode())
    needs_model = config.quality.wrong_language != "off" and config.quality.language_by == "model"
    for library, is_asked in (("datasketch", config.quality.near_duplicate != "off"), ("py3langid", needs_model)):
        if is_asked:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # the rule itself says what to install
                feed(f"{library} {importlib.metadata.version(library)}".encode())
    feed(json.dumps(dataclasses.asdict(config.quality), sort_keys=True).encode())
    feed(json.dumps({name: getattr(config, name) for name in OPTIONS}, sort_keys=True).encode())
    feed(template.fingerprint.encode())
    of_parts = [files_of(part.paths) for part in parts]
    told = [{**dataclasses.asdict(p), "paths": len(of)} for p, of in zip(parts, of_parts, strict=True)]
    feed(json.dumps(told, sort_keys=True).encode())
    places = [place for of in of_parts for place in of]
    places += files_of([path for part in references if not part.takes_held_out for path in part.paths])
    places += files_read(config.quality, references)
    size = sum(place.stat().st_size for place in places if isinstance(place, pathlib.Path))
    with _bar("hashing data", "B", size, progress) as bar:
        for place in places:
            feed(os.fsencode(str(place)))  # ids and sources are made of it
            if isinstance(place, HubSet):
                for row in load_hub(place, config.split):
                    feed(json.dumps(row, sort_keys=True, default=str).encode())
                continue
            feed(place.stat().st_size.to_bytes(8, "little"))
            with opened(place, is_gzipped=False) as stream:
                while block := stream.read(HASH_BLOCK_BYTES):
                    digest.update(block)
                    bar.update(len(block))
    return digest.hexdigest()


def _build(
    folder: pathlib.Path,
    config: DataConfig,
    parts: tuple[Part, ...],
    template: ChatTemplate,
    references: tuple[Part, ...],
    *,
    progress: bool,
) -> None:
    """Tokenise everything and write the set into an empty folder, its manifest last."""
    reading, tokenising = Account(), Account()  # apart, because readers run ahead of workers by their number
    conversations = screened(
        read_conversations(config, parts, reading), config.quality, reading, references_of(config, references)
    )
    measured = read_conversations(config, [part for part in references if not part.takes_held_out], Account())
    conversations = noting(conversations, frozenset(map(digest_of, measured)), reading)
    paths = tuple(path for part in parts for path in part.paths)
    total = count_rows(paths, split=config.split) if progress else None
    with (
        Writer(folder) as writer,
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
            raise DataError(_nothing(parts, account))
        writer.finish(account)


def _nothing(parts: tuple[Part, ...], account: Account) -> str:
    named = ", ".join(dict.fromkeys(path for part in parts for path in part.paths))
    if account.held_out and account.held_out + sum(account.dropped.values()) == account.read:
        dropped = f", {account.read - account.held_out} dropped" if account.dropped else ""
        return (
            f"{named}: nothing is left to train on; data.holdout = {parts[0].holdout} holds out {account.held_out} of "
            f"{account.read} conversations{dropped}; lower it, or add conversations with other prompts"
        )
    if not account.read and all(part.takes_held_out for part in parts):
        return (
            f"{named}: data.holdout = {parts[0].holdout} holds out none of these conversations; raise it, or name "
            "files in data.validation"
        )
    reasons = sorted(account.dropped.items(), key=lambda item: -item[1])
    said = "; ".join(f"{n} dropped: {reason} (first: {account.examples[reason][0]})" for reason, n in reasons[:5])
    return (
        f"{named}: nothing can be trained on; {account.read} conversations read, {said or 'none dropped'}; "
        "correct the data, or data.format, data.columns, data.train_on or data.max_length"
    )


def _bar(what: str, unit: str, total: int | None, progress: bool) -> tqdm:
    scaled = unit == "B"
    return tqdm(
        desc=what, unit=unit, total=total, unit_scale=scaled, delay=BAR_DELAY_SECONDS, leave=False, disable=not progress
    )
