"""The tokenizer of a model, in and out, without torch.

In: a folder, hub id or .gguf file. Out: a fast tokenizer that cuts text as the model's tokenizer.json says, and the
files of one (`save_tokenizer`) that transformers 4 and 5 and vLLM read alike.
"""

import importlib.util
import json
import logging
import pathlib
import re
import tempfile
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from jax_sft.hf import gguf
from jax_sft.hf.folder import resolve
from jax_sft.hf.gguf_tokenizer import rebuild_tokenizer

_log = logging.getLogger(__name__)

# What a tokenizer's vocabulary may lie in, and the texts beside it.
_VOCABULARIES = ("tokenizer.json", "vocab*", "*.model", "*.tiktoken", "tekken.json")
_TEXTS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    "chat_template.jinja",
)


def load_tokenizer(
    source: str | pathlib.Path, *, revision: str | None = None, vocab_size: int | None = None
) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a folder, a hub id or a .gguf file.

    Args:
        vocab_size: of the model. Tokens added beyond it (Gemma 3's text models carry an image token) are left out, with
            a line in the log; their text is then text like any other.

    Raises:
        ValueError: there is none, or no fast one can be made of it; or a token beyond `vocab_size` is not one that was
            added, or begins or ends texts, or is in the chat template.
    """
    path = resolve(source, revision=revision, weights=False)
    if path.suffix == ".gguf":
        tokenizer = rebuild_tokenizer(gguf.read(path))
        if vocab_size is not None and (beyond := _beyond(tokenizer, vocab_size, source)):
            raise ValueError(
                f"{source}: the model has no embedding for {', '.join(map(repr, beyond))}; use another file"
            )
        return tokenizer
    tokenizer = _read(path, source)
    beyond = [] if vocab_size is None else _beyond(tokenizer, vocab_size, source)
    if not beyond:
        return tokenizer
    _log.warning("%s: the model has no embedding for %s, which are left out", source, ", ".join(map(repr, beyond)))
    with tempfile.TemporaryDirectory(prefix="jax_sft.") as place:
        for name in _TEXTS:
            if not (path / name).is_file():
                continue
            text = (path / name).read_text(encoding="utf-8")
            if name == "tokenizer.json":
                held = json.loads(text)
                text = json.dumps(held | {"added_tokens": _without(held["added_tokens"], beyond)})
            elif name.endswith(".json"):
                text = json.dumps(_without(json.loads(text), beyond))
            (pathlib.Path(place) / name).write_text(text, encoding="utf-8")
        return _read(pathlib.Path(place), source)


def _read(path: pathlib.Path, source: str | pathlib.Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder, as its files have it."""
    has_file = (path / "tokenizer.json").is_file()
    if not any(any(path.glob(name)) for name in _VOCABULARIES):
        raise ValueError(f"{source}: has no tokenizer.json; copy the tokenizer's files of its base model there")
    if not has_file:
        _check_class(path, source)
    # AutoTokenizer follows `tokenizer_class`, and transformers 5 then rebuilds a default of that class instead of what
    # tokenizer.json says: SmolLM2 (GPT2Tokenizer) silently lost its digit-by-digit cutting. The file is the truth.
    reader = PreTrainedTokenizerFast if has_file else AutoTokenizer
    try:
        tokenizer = reader.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise a bare Exception for a broken file
        broken = _broken(path)
        found = f"a {broken or 'tokenizer.json'} that cannot be read" if broken or has_file else "no tokenizer.json"
        first_line = str(error).strip().splitlines()[0][:200]
        raise ValueError(
            f"{source}: has {found} ({type(error).__name__}: {first_line}); copy the tokenizer's files of its base "
            "model there"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"{source}: has only a slow tokenizer, without offsets; save a tokenizer.json beside it")
    return tokenizer


def _check_class(path: pathlib.Path, source: str | pathlib.Path) -> None:
    """Without a tokenizer.json, transformers' class decides how text is cut: it must be named, and work here."""
    save = "or write a tokenizer.json with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
    if not (path / "tokenizer_config.json").is_file():
        raise ValueError(
            f"{source}: has no tokenizer.json, and no tokenizer_config.json that names a class; copy the tokenizer's "
            "files of its base model there"
        )
    if any(path.glob("*.model")) and importlib.util.find_spec("sentencepiece") is None:
        raise ValueError(
            f"{source}: has no tokenizer.json, and reading its SentencePiece file needs sentencepiece; "
            f"pip install sentencepiece, {save}"
        )
    _log.warning("%s: has no tokenizer.json; its tokenizer is what transformers makes of the class it names", source)


def _beyond(tokenizer: PreTrainedTokenizerFast, vocab_size: int, source: str | pathlib.Path) -> list[str]:
    """Added tokens that the model has no embedding for, and that no text of a training needs."""
    beyond = {i: token for token, i in tokenizer.get_vocab().items() if i >= vocab_size}
    added = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items()}
    in_use = {str(tokenizer.bos_token), str(tokenizer.eos_token)}
    template = template_text(tokenizer) or ""
    needed = [i for i, token in beyond.items() if i not in added or token in in_use or token in template]
    if needed:
        raise ValueError(
            f"{source}: the tokenizer's largest id is {max(beyond)} ({beyond[max(beyond)]!r}), and the model's "
            f"vocab_size = {vocab_size} ends at {vocab_size - 1}; take both from one model, or remove the added "
            f"tokens from the tokenizer's files ({beyond[min(needed)]!r} is needed, so it cannot be left out)"
        )
    return [beyond[i] for i in sorted(beyond)]


def _without(said: Any, tokens: list[str]) -> Any:
    """What a tokenizer's JSON says, without these tokens, under whatever name."""

    def is_one(value: Any) -> bool:
        return (value.get("content") if isinstance(value, dict) else value) in tokens

    if isinstance(said, dict):
        return {k: _without(v, tokens) for k, v in said.items() if k not in tokens and not is_one(v)}
    return [_without(v, tokens) for v in said if not is_one(v)] if isinstance(said, list) else said


def _broken(path: pathlib.Path) -> str | None:
    """The first of a tokenizer's files that is not what its name says."""
    for name in _TEXTS:
        try:
            text = (path / name).read_text(encoding="utf-8")
            if name.endswith(".json") and not isinstance(json.loads(text), dict):
                return name
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError):
            return name
    return None


def template_text(tokenizer: Any) -> str | None:
    """The chat template a tokenizer carries; of several named ones, the one called "default"."""
    template = tokenizer.chat_template
    template = template.get("default") if isinstance(template, dict) else template
    return None if template is None else re.sub("\r\n?", "\n", template)  # as Jinja reads it, and as files come back


def save_tokenizer(folder: pathlib.Path, tokenizer: Any, *, chat_template: str | None, pad_id: int | None) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja into an existing folder.

    `tokenizer` is left as it is. Its pad token is written as `pad_id` where that is given.
    """
    tokenizer.save_pretrained(str(folder))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for name in ("is_local", "local_files_only", "name_or_path"):  # say where it was read, not what it is
        config.pop(name, None)
    # Both spellings that transformers 5 writes break readers of version 4; it reads these from either.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(extra := config.pop("extra_special_tokens", None), list) and extra:
        config["additional_special_tokens"] = extra
    if pad_id is not None:
        config["pad_token"] = tokenizer.convert_ids_to_tokens(pad_id)
    config.pop("chat_template", None)
    if chat_template is not None:
        config["chat_template"] = chat_template  # for readers that do not know the file of its own
        (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
