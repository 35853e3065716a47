"""The fast tokenizer that a GGUF file describes: byte-level BPE ("gpt2") or SentencePiece BPE ("llama").

In: the metadata under `tokenizer.ggml` and `tokenizer.chat_template`. Out: a fast tokenizer that gives the ids that
llama.cpp and the model's own tokenizer give. What the file leaves open is refused, never guessed: other tokens than
the model was trained on would go unnoticed.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from jax_sft.hf.gguf import GgufFile

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6  # token types of llama.cpp
_DIGITS_ONE_BY_ONE = ("smollm", "starcoder", "refact", "command-r", "codeshell", "minerva-7b")
_GPT2 = ("gpt-2", "gpt2")
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
_QWEN2 = ("qwen2", "deepseek-r1-qwen")
# Up to three digits together, or each alone; what else is cut is the same.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPACE = "▁"  # how SentencePiece writes a space


def rebuild_tokenizer(file: GgufFile) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a file, with its chat template.

    Raises:
        ValueError: the vocabulary is of another kind or incomplete, or text is cut before BPE in a way that is not
            known.
    """
    ggml = {k.removeprefix("tokenizer.ggml."): v for k, v in file.metadata.items() if k.startswith("tokenizer.ggml.")}
    kind = ggml.get("model")
    needed = {"gpt2": ("tokens", "merges"), "llama": ("tokens", "scores", "token_type")}
    if kind not in needed:
        raise ValueError(
            f"{file.path}: has a tokenizer of the kind {kind!r}, and only 'gpt2' (byte-level BPE) and 'llama' "
            "(SentencePiece BPE) can be rebuilt; name the model's Hugging Face folder"
        )
    missing = [f"tokenizer.ggml.{key}" for key in needed[kind] if not ggml.get(key)]
    if kind == "llama" and not missing and len({len(ggml[key]) for key in needed[kind]}) > 1:
        missing = ["a score or a type of some of its tokens"]
    if missing:
        raise ValueError(
            f"{file.path}: its tokenizer lacks {', '.join(missing)}; use a complete GGUF model, or name its Hugging "
            "Face folder"
        )
    if kind == "gpt2":
        tokens: list[str] = ggml["tokens"]
        backend = _byte_level_bpe(ggml, file.path)
        starts_by_default = ggml.get("pre") in _LLAMA3
    else:
        backend, tokens = _sentencepiece_bpe(ggml, file.path)
        starts_by_default = True
    bos = ggml.get("bos_token_id")
    if ggml.get("add_bos_token", starts_by_default) and bos is not None:
        start = tokens[bos]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{start} $A", pair=f"{start} $A {start}:1 $B:1", special_tokens=[(start, bos)]
        )
    keys = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    said = {ours: tokens[ggml[f"{theirs}_token_id"]] for ours, theirs in keys.items() if f"{theirs}_token_id" in ggml}
    rebuilt = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=file.said["context_length"],
        clean_up_tokenization_spaces=False,
        **said,
    )
    rebuilt.chat_template = file.metadata.get("tokenizer.chat_template")
    return rebuilt


def _byte_level_bpe(ggml: Mapping[str, Any], path: pathlib.Path) -> Tokenizer:
    """Merges in the order that the file lists; every text is bytes, written as letters."""
    tokens, kind = ggml["tokens"], ggml.get("pre", "default")
    merges = [tuple(merge.split(" ", 1)) for merge in ggml["merges"]]
    bpe = models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, ignore_merges=kind in _LLAMA3)
    backend = Tokenizer(bpe)
    backend.pre_tokenizer = _pre_tokenizer(kind, path)
    backend.decoder = decoders.ByteLevel()
    if kind in _QWEN2:
        backend.normalizer = normalizers.NFC()
    types = ggml.get("token_type", [_NORMAL] * len(tokens))
    whole = [(t, n == _CONTROL) for t, n in zip(tokens, types, strict=True) if n in (_CONTROL, _USER_DEFINED)]
    backend.add_tokens([AddedToken(token, special=special, normalized=False) for token, special in whole])
    return backend


def _pre_tokenizer(kind: str, path: pathlib.Path) -> pre_tokenizers.PreTokenizer:
    """How text is cut before BPE, by llama.cpp's name for it (llama-vocab.cpp)."""
    if kind in _DIGITS_ONE_BY_ONE:
        # ByteLevel alone would merge digits, since its own pattern keeps them together.
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if kind in _GPT2:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind in _LLAMA3 + _QWEN2:
        split = pre_tokenizers.Split(Regex(_SPLIT.replace("DIGITS", "{1,3}" if kind in _LLAMA3 else "")), "isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    known = ", ".join((*_DIGITS_ONE_BY_ONE, *_GPT2, *_LLAMA3, *_QWEN2))
    raise ValueError(
        f"{path}: its tokenizer cuts text in the way {kind!r}, and only {known} are known; name its Hugging Face folder"
    )


def _sentencepiece_bpe(ggml: Mapping[str, Any], path: pathlib.Path) -> tuple[Tokenizer, list[str]]:
    """Pieces that merge in the order of their scores, and all tokens as they are spelled in there.

    Characters that are no piece fall back to bytes.
    """
    is_prefixed = ggml.get("add_space_prefix", True)
    scores, types = ggml["scores"], _types(ggml["token_type"])
    tokens = _respelled(ggml["tokens"], types, is_prefixed=is_prefixed)
    merges = _merges(tokens, types, scores)
    if len(merges) > 1 and len({score for score, kind in zip(scores, types, strict=True) if kind == _NORMAL}) == 1:
        raise ValueError(
            f"{path}: all pieces of its tokenizer have one score, so the order in which they merge is lost; name the "
            "model's Hugging Face folder"
        )
    unknown = ggml.get("unknown_token_id", types.index(_UNKNOWN) if _UNKNOWN in types else None)
    bpe = models.BPE(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=merges,
        unk_token=None if unknown is None else tokens[unknown],
        fuse_unk=True,
        byte_fallback=_BYTE in types,
    )
    backend = Tokenizer(bpe)
    spaces = normalizers.Replace(" ", _SPACE)
    plain = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    # The text after a control token gets its space too, as in llama.cpp and in Llama 2's own tokenizer.json.
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if is_prefixed else spaces
    backend.decoder = decoders.Sequence([*plain, decoders.Strip(" ", 1, 0)] if is_prefixed else plain)
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    backend.add_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    # SentencePiece looks for these after it has rewritten spaces; a prefix, though, would be put in front of them too.
    whole = [token for token, kind in zip(tokens, types, strict=True) if kind == _USER_DEFINED]
    backend.add_tokens([AddedToken(token, normalized=not is_prefixed and " " not in token) for token in whole])
    return backend, tokens


def _types(types: Sequence[int]) -> list[int]:
    """The type of each token; of user-defined ones, llama.cpp's converter may not know it and call them normal."""
    # SentencePiece puts what it learned behind the bytes.
    first_byte = types.index(_BYTE) if _BYTE in types else 0
    return [_USER_DEFINED if kind == _NORMAL and i < first_byte else kind for i, kind in enumerate(types)]


def _respelled(tokens: Sequence[str], types: Sequence[int], *, is_prefixed: bool) -> list[str]:
    """SentencePiece's tokens as the vocabulary of `tokenizers` needs them; no id changes."""
    there, typed = set(tokens), list(zip(tokens, types, strict=True))
    # A character can be merged without being a piece, as the tab of Gemma, which has "\t\t": it is a byte, <0x09>.
    merged = {c for token, kind in typed if kind == _NORMAL and len(token) > 1 for c in token}
    bytes_of = {f"<0x{ord(c):02X}>": c for c in merged - there if c.isascii()}
    # The spaces of user-defined tokens are written as spaces, or as in pieces, by different converters.
    old, new = (_SPACE, " ") if is_prefixed else (" ", _SPACE)
    spelled = [t.replace(old, new) if kind == _USER_DEFINED else t for t, kind in typed]
    spelled = [bytes_of.get(t, t) if kind == _BYTE else t for t, kind in zip(spelled, types, strict=True)]
    # Two tokens of one name would be one: the second stays as it was.
    return [new if new == old or new not in there else old for new, old in zip(spelled, tokens, strict=True)]


def _merges(tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every pair of pieces that is a piece, by the score of the whole, as SentencePiece takes them."""
    # Only learned pieces merge, so none of their parts is another kind of token.
    symbols = {t for t, kind in zip(tokens, types, strict=True) if kind == _NORMAL or (kind == _BYTE and len(t) == 1)}
    found = [
        (-score, i, token[:cut], token[cut:])
        for i, (token, kind, score) in enumerate(zip(tokens, types, scores, strict=True))
        if kind == _NORMAL
        for cut in range(1, len(token))
        if token[:cut] in symbols and token[cut:] in symbols
    ]
    return [(left, right) for *_, left, right in sorted(found)]
