"""The tokenizer of a model, in and out, without torch.

In: a folder, hub id or .gguf file. Out: a fast tokenizer that cuts text as the model's tokenizer.json says, and the
files of one (`save_tokenizer`) that transformers 4 and 5 and vLLM read alike.
"""

import json
import pathlib
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from jax_sft.hf import gguf
from jax_sft.hf.folder import resolve
from jax_sft.hf.gguf_tokenizer import rebuild_tokenizer

# What a tokenizer's vocabulary may lie in, and the texts beside it.
_VOCABULARIES = ("tokenizer.json", "vocab*", "*.model", "*.tiktoken", "tekken.json")
_TEXTS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    "chat_template.jinja",
)


def load_tokenizer(source: str | pathlib.Path, *, revision: str | None = None) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a folder, a hub id or a .gguf file.

    Raises:
        ValueError: there is none, or no fast one can be made of it.
    """
    path = resolve(source, revision=revision, weights=False)
    if path.suffix == ".gguf":
        return rebuild_tokenizer(gguf.read(path))
    has_file = (path / "tokenizer.json").is_file()
    if not any(any(path.glob(name)) for name in _VOCABULARIES):
        raise ValueError(f"{source}: has no tokenizer.json; copy the tokenizer's files of its base model there")
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
    return template.get("default") if isinstance(template, dict) else template


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
