"""GGUF files written by llama.cpp's own Python package, as its converter writes them."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import gguf as llama_cpp
import numpy as np

from tests.hf.models import CHATML, CONTROL, TINY, gguf_name, permuted, tensors, tiny_tokenizer
from tests.hf.sentencepiece_cases import Piece

Kind = llama_cpp.GGMLQuantizationType
# Rows of quantised tensors are whole blocks of 32.
BLOCKS = TINY | {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "vocab_size": 320}


def write_gguf(
    path: pathlib.Path,
    config: Mapping[str, Any] = BLOCKS,
    weights: Mapping[str, np.ndarray] | None = None,
    *,
    kind: Kind = Kind.F32,
    pre: str = "smollm",
    arch: str = "llama",
    metadata: Mapping[str, Any] | None = None,
    pieces: Sequence[Piece] | None = None,
) -> dict[str, np.ndarray]:
    """A .gguf file as llama.cpp's converter makes it; returns the weights as they are after quantisation.

    `pieces`: a SentencePiece vocabulary in the place of the tiny byte-level one.
    """
    weights = dict(weights if weights is not None else tensors(config))
    writer = llama_cpp.GGUFWriter(path, arch)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_key_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if pieces is None:
        add_tokenizer(writer, pre)
    else:
        add_pieces(writer, pieces)
    for key, value in (metadata or {}).items():
        writer.add_key_value(key, *value)
    stored = {}
    for name, x in weights.items():
        heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
        heads = heads if arch == "llama" else {}  # convert_hf_to_gguf permutes Llama's alone
        count = next((n for part, n in heads.items() if part in name), 0)
        rows = np.ascontiguousarray(permuted(x, count)) if count else x
        shift = np.float32(arch.startswith("gemma") and name.endswith("norm.weight"))  # as GemmaModel.modify_tensors
        rows = rows + shift
        is_kind = kind if x.ndim == 2 else Kind.F32
        raw = llama_cpp.quantize(rows, is_kind)
        there = llama_cpp.dequantize(raw, is_kind) - shift
        writer.add_tensor(gguf_name(name, arch), raw, raw_dtype=is_kind)
        stored[name] = unpermuted(there, count) if count else there
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def add_tokenizer(writer: llama_cpp.GGUFWriter, pre: str) -> None:
    tokenizer = tiny_tokenizer()
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in CONTROL else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHATML)


def add_pieces(writer: llama_cpp.GGUFWriter, pieces: Sequence[Piece]) -> None:
    texts, scores, types = zip(*pieces, strict=True)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(texts)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_chat_template(CHATML)


def unpermuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """By search rather than by the formula under test: where each row went."""
    went = permuted(np.arange(rows.shape[0]), heads)
    found = np.empty_like(rows)
    found[went] = rows
    return found
