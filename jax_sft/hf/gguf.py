"""GGUF files of the Llama and Qwen kinds: config, tokenizer and weights out of one file, with numpy alone.

In: a .gguf file of llama.cpp. Out: the dicts a Hugging Face folder would hold (`hf_config`, `generation_config`), a
fast tokenizer (`tokenizer`), and tensors in Hugging Face's names and layout (`tensors`), dequantised as they are read.
The layout of the file is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3.
"""

import dataclasses
import math
import pathlib
import re
import struct
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from jax_sft.hf import names
from jax_sft.model.families import FAMILIES, read_model_config

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_CONTROL, _USER_DEFINED = 3, 4  # token types of llama.cpp
_PLAIN = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}
_DIGITS_ONE_BY_ONE = ("smollm", "starcoder", "refact", "command-r", "codeshell", "minerva-7b")
_GPT2 = ("gpt-2", "gpt2")
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
_QWEN2 = ("qwen2", "deepseek-r1-qwen")
# Up to three digits together, or each alone; what else is cut is the same.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The architectures that can be read, with what llama.cpp's converter does to the rows of q and k.
_ARCHITECTURES = {"llama": "permuted", "qwen2": "as they are", "qwen3": "as they are"}


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """Where one tensor lies, under its Hugging Face name and shape."""

    file: pathlib.Path
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    rotated_heads: int  # of a q or k projection, whose rows llama.cpp reorders: its heads; else 0

    @property
    def dtype(self) -> str:
        """The name of its number format."""
        return self.kind.name

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """A part of it, dequantised to float32; only the blocks that hold the part are read."""
        if not self.rotated_heads:
            return self._read(index)
        # Within a head, llama.cpp interleaves the two halves that are rotated against each other (convert_hf_to_gguf's
        # permute), so a part of the rows is taken out of whole heads.
        head_rows = self.shape[0] // self.rotated_heads
        first, last, _ = index[0].indices(self.shape[0])
        low, high = first // head_rows * head_rows, math.ceil(last / head_rows) * head_rows
        x = self._read((slice(low, high), *index[1:]))
        x = x.reshape(-1, head_rows // 2, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
        return x[first - low : last - low]

    def _read(self, index: tuple[slice, ...]) -> np.ndarray:
        if dtype := _PLAIN.get(self.kind):
            return np.memmap(self.file, dtype, "r", self.offset, self.shape)[index]
        block, block_bytes = GGML_QUANT_SIZES[self.kind]
        row_bytes = self.shape[-1] // block * block_bytes
        blocks = np.memmap(self.file, np.uint8, "r", self.offset, (*self.shape[:-1], row_bytes))
        first, last, _ = index[-1].indices(self.shape[-1])
        low, high = first // block, math.ceil(last / block)
        part = np.ascontiguousarray(blocks[(*index[:-1], slice(low * block_bytes, high * block_bytes))])
        try:
            return dequantize(part, self.kind)[..., first - low * block : last - low * block]
        except NotImplementedError as error:
            raise ValueError(f"{self.file}: holds {self.kind.name}, which cannot be read; use Q8_0 or F16") from error


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """A .gguf file: its metadata, and its tensors by their GGUF names as (kind, shape, offset)."""

    path: pathlib.Path
    metadata: Mapping[str, Any]
    stored: Mapping[str, tuple[GGMLQuantizationType, tuple[int, ...], int]]

    @property
    def architecture(self) -> str:
        """llama.cpp's name for the kind of model."""
        return self.metadata["general.architecture"]

    @property
    def said(self) -> dict[str, Any]:
        """The metadata of the architecture, without its name in front."""
        start = f"{self.architecture}."
        return {key.removeprefix(start): value for key, value in self.metadata.items() if key.startswith(start)}

    def tensors(self) -> dict[str, GgufTensor]:
        """Every tensor under its Hugging Face name; one that the table does not know keeps its own name."""
        heads = {}
        if _ARCHITECTURES[self.architecture] == "permuted":
            said = self.said
            heads["attn_q"] = said["attention.head_count"]
            heads["attn_k"] = said.get("attention.head_count_kv", heads["attn_q"])
        patterns = {rule.row.gguf: rule.hf for rule in names.rules(read_model_config(hf_config(self))).values()}
        found = {}
        for name, (kind, shape, offset) in self.stored.items():
            match = re.fullmatch(r"(blk\.)(\d+)(\.([a-z_]+)\..*)", name)
            pattern = f"{match[1]}{{layer}}{match[3]}" if match else name
            layer = int(match[2]) if match else 0
            rotated = heads.get(match[4], 0) if match else 0
            hf_name = patterns.get(pattern, pattern).format(layer=layer)
            found[hf_name] = GgufTensor(self.path, kind, shape, offset, rotated)
        return found


def read(path: pathlib.Path) -> GgufFile:
    """Open a file: its metadata and where its tensors lie.

    Raises:
        ValueError: it is no GGUF file, is cut short, or holds an architecture that is not read.
    """
    try:
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError("it does not start with 'GGUF'")
            version, num_tensors, num_pairs = _scalars(file, "IQQ")
            if version not in (2, 3):
                raise ValueError(f"it is of GGUF version {version}, and 2 and 3 are known")
            metadata = {_string(file): _value(file, *_scalars(file, "I")) for _ in range(num_pairs)}
            infos = [_tensor_info(file) for _ in range(num_tensors)]
            alignment = metadata.get("general.alignment", 32)
            start = math.ceil(file.tell() / alignment) * alignment
    except (struct.error, UnicodeDecodeError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: is no GGUF file that can be read ({error}); copy or download it again") from error
    if metadata.get("general.architecture") not in _ARCHITECTURES:
        raise ValueError(
            f"{path}: holds the architecture {metadata.get('general.architecture')!r}, and only "
            f"{', '.join(_ARCHITECTURES)} can be read from GGUF; name the model's Hugging Face folder"
        )
    stored = {name: (kind, shape, start + offset) for name, kind, shape, offset in infos}
    size = path.stat().st_size
    for name, (kind, shape, offset) in stored.items():
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if offset + math.prod(shape) // block * block_bytes > size:
            raise ValueError(f"{path}: is cut short in the tensor {name}; copy or download it again")
    return GgufFile(path, metadata, stored)


def hf_config(file: GgufFile) -> dict[str, Any]:
    """The config.json that the metadata describes.

    Raises:
        ValueError: a key is missing, or the model has experts or rope factors, which cannot be read from a GGUF file.
    """
    wanted = {
        "block_count": "num_hidden_layers",
        "context_length": "max_position_embeddings",
        "embedding_length": "hidden_size",
        "feed_forward_length": "intermediate_size",
        "attention.head_count": "num_attention_heads",
        "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    }
    said = file.said
    missing = [f"{file.architecture}.{key}" for key in wanted if key not in said]
    if missing or "token_embd.weight" not in file.stored:
        raise ValueError(f"{file.path}: lacks {', '.join(missing) or 'token_embd.weight'}; use a complete GGUF model")
    if said.get("expert_count") or "rope_freqs.weight" in file.stored:
        what = "experts" if said.get("expert_count") else "rope factors (rope_freqs.weight)"
        raise ValueError(f"{file.path}: has {what}, which cannot be read from GGUF; name its Hugging Face folder")
    family = FAMILIES[file.architecture]
    config = {"model_type": file.architecture, "architectures": [family.architecture], "hidden_act": "silu"}
    config |= {hf: said[key] for key, hf in wanted.items()}
    config["num_key_value_heads"] = said.get("attention.head_count_kv", said["attention.head_count"])
    width = said.get("attention.key_length", said.get("rope.dimension_count"))
    config |= {} if width is None else {"head_dim": width}
    config["rope_theta"] = said.get("rope.freq_base", 10_000.0)
    if (kind := said.get("rope.scaling.type", "none")) != "none":
        config["rope_scaling"] = {"rope_type": kind, "factor": said.get("rope.scaling.factor", 1.0)}
        if (original := said.get("rope.scaling.original_context_length")) is not None and kind == "yarn":
            config["rope_scaling"]["original_max_position_embeddings"] = original
    config["vocab_size"] = file.stored["token_embd.weight"][1][0]
    config["tie_word_embeddings"] = "output.weight" not in file.stored
    biases = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_gate.bias"}
    config |= {field: name in file.stored for field, name in biases.items() if field in family.fields}
    return config | _special_ids(file)


def generation_config(file: GgufFile) -> dict[str, Any]:
    """The generation_config.json that the metadata describes: where a model starts, stops and pads."""
    ids = _special_ids(file)
    stops = [ids.get("eos_token_id"), file.metadata.get("tokenizer.ggml.eot_token_id")]
    ids["eos_token_id"] = list(dict.fromkeys(i for i in stops if i is not None))
    return ids


def tokenizer(file: GgufFile) -> PreTrainedTokenizerFast:
    """The fast tokenizer that the metadata describes, with its chat template; byte-level BPE alone.

    Raises:
        ValueError: the vocabulary is of another kind, or text is cut before BPE in a way that is not known: guessing
            would give other tokens than the model was trained on.
    """
    ggml = {k.removeprefix("tokenizer.ggml."): v for k, v in file.metadata.items() if k.startswith("tokenizer.ggml.")}
    if ggml.get("model") != "gpt2" or not ggml.get("tokens") or not ggml.get("merges"):
        raise ValueError(
            f"{file.path}: has a tokenizer of the kind {ggml.get('model')!r}, and only 'gpt2' (byte-level BPE) can be "
            "rebuilt; name the model's Hugging Face folder"
        )
    tokens, kind = ggml["tokens"], ggml.get("pre", "default")
    merges = [tuple(merge.split(" ", 1)) for merge in ggml["merges"]]
    bpe = models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, ignore_merges=kind in _LLAMA3)
    backend = Tokenizer(bpe)
    backend.pre_tokenizer = _pre_tokenizer(kind, file.path)
    backend.decoder = decoders.ByteLevel()
    if kind in _QWEN2:
        backend.normalizer = normalizers.NFC()
    types = ggml.get("token_type", [1] * len(tokens))
    whole = [(t, n == _CONTROL) for t, n in zip(tokens, types, strict=True) if n in (_CONTROL, _USER_DEFINED)]
    backend.add_tokens([AddedToken(token, special=special, normalized=False) for token, special in whole])
    bos = ggml.get("bos_token_id")
    if ggml.get("add_bos_token", kind in _LLAMA3) and bos is not None:
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


def _special_ids(file: GgufFile) -> dict[str, Any]:
    keys = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    ids = {ours: file.metadata.get(f"tokenizer.ggml.{theirs}_token_id") for ours, theirs in keys.items()}
    return {name: number for name, number in ids.items() if number is not None}


def _scalars(file: BinaryIO, letters: str) -> tuple[Any, ...]:
    layout = struct.Struct("<" + letters)
    return layout.unpack(file.read(layout.size))


def _string(file: BinaryIO) -> str:
    (length,) = _scalars(file, "Q")
    text = file.read(length)
    if len(text) != length:
        raise ValueError("it is cut short")
    return text.decode("utf-8")


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(file)
    if kind == _ARRAY:
        item, length = _scalars(file, "IQ")
        if item in _SCALARS:
            return list(_scalars(file, f"{length}{_SCALARS[item]}"))
        return [_value(file, item) for _ in range(length)]
    (value,) = _scalars(file, _SCALARS[kind])
    # 1e-5 was stored as a float32; its shortest decimal is what was meant, not 9.99999974e-06.
    return float(str(np.float32(value))) if _SCALARS[kind] == "f" else value


def _tensor_info(file: BinaryIO) -> tuple[str, GGMLQuantizationType, tuple[int, ...], int]:
    name = _string(file)
    (num_axes,) = _scalars(file, "I")
    axes = _scalars(file, f"{num_axes}Q")
    kind, offset = _scalars(file, "IQ")
    return name, GGMLQuantizationType(kind), tuple(reversed(axes)), offset
