"""GGUF files of the Llama, Qwen and Gemma kinds: config and weights out of one file, with numpy alone.

In: a .gguf file of llama.cpp. Out: the dicts a Hugging Face folder would hold (`hf_config`, `generation_config`), and
tensors in Hugging Face's names and layout (`tensors`), dequantised as they are read; its tokenizer is rebuilt in
hf/gguf_tokenizer.py. The layout of the file is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md,
versions 2 and 3.
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

from jax_sft.hf import names
from jax_sft.model.families import FAMILIES, read_model_config

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_PLAIN = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}


@dataclasses.dataclass(frozen=True)
class _Architecture:
    """What llama.cpp's converter makes of a kind of model."""

    model_type: str
    activation: str = "silu"  # not in the file
    has_permuted_heads: bool = False  # rows of q and k are in another order
    norm_shift: int = 0  # is added to the weights of all norms


_ARCHITECTURES = {
    "llama": _Architecture("llama", has_permuted_heads=True),
    "qwen2": _Architecture("qwen2"),
    "qwen3": _Architecture("qwen3"),
    "gemma": _Architecture("gemma", "gelu_pytorch_tanh", norm_shift=1),
    "gemma2": _Architecture("gemma2", "gelu_pytorch_tanh", norm_shift=1),
    "gemma3": _Architecture("gemma3_text", "gelu_pytorch_tanh", norm_shift=1),
}
# Layers of the one size of its kind whose scores are scaled by the width per head, and not by the head width.
_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """Where one tensor lies, under its Hugging Face name and shape."""

    file: pathlib.Path
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    rotated_heads: int  # of a q or k projection, whose rows llama.cpp reorders: its heads; else 0
    shift: int  # of a norm, to whose weights llama.cpp adds: what it added; else 0

    @property
    def dtype(self) -> str:
        """The name of its number format."""
        return self.kind.name

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """A part of it, dequantised to float32; only the blocks that hold the part are read."""
        if self.shift:
            return self._read(index).astype(np.float32) - np.float32(self.shift)
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
        known = _ARCHITECTURES[self.architecture]
        if known.has_permuted_heads:
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
            shift = known.norm_shift if name.endswith("norm.weight") else 0
            found[hf_name] = GgufTensor(self.path, kind, shape, offset, rotated, shift)
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
    known = _ARCHITECTURES[file.architecture]
    family = FAMILIES[known.model_type]
    config = {"model_type": known.model_type, "architectures": [family.architecture]}
    config["hidden_activation" if "hidden_activation" in family.fields else "hidden_act"] = known.activation
    config |= {hf: said[key] for key, hf in wanted.items()}
    heads = said["attention.head_count"]
    config["num_key_value_heads"] = said.get("attention.head_count_kv", heads)
    # Where nothing is said, a model type of transformers may have another default than llama.cpp's.
    width_per_head = config["hidden_size"] // heads
    config["head_dim"] = said.get("attention.key_length", said.get("rope.dimension_count", width_per_head))
    config["rope_theta"] = said.get("rope.freq_base", 10_000.0)
    # llama.cpp takes a factor without a kind as linear, and has an older word for it.
    factor = said.get("rope.scaling.factor") or said.get("rope.scale_linear") or 1.0
    kind = said.get("rope.scaling.type", "linear" if factor != 1 else "none")
    if kind != "none":
        config["rope_scaling"] = {"rope_type": kind, "factor": factor}
        if (original := said.get("rope.scaling.original_context_length")) is not None and kind == "yarn":
            config["rope_scaling"]["original_max_position_embeddings"] = original
    config["vocab_size"] = file.stored["token_embd.weight"][1][0]
    config["tie_word_embeddings"] = "output.weight" not in file.stored
    biases = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_gate.bias"}
    config |= {field: name in file.stored for field, name in biases.items() if field in family.fields}
    return config | _gemma_fields(file, config) | _special_ids(file)


def _gemma_fields(file: GgufFile, config: Mapping[str, Any]) -> dict[str, Any]:
    """What Gemma 2 and 3 have beyond the first, with llama.cpp's own defaults (src/models/gemma2.cpp, gemma3.cpp)."""
    said, layers = file.said, config["num_hidden_layers"]
    if file.architecture not in _LAYERS_OF_27B:
        return {}
    is_second = file.architecture == "gemma2"
    is_27b = layers == _LAYERS_OF_27B[file.architecture]
    width_per_head = config["hidden_size"] // config["num_attention_heads"]
    window = said.get("attention.sliding_window", 4096 if is_second else None)
    every = said.get("attention.sliding_window_pattern", 2 if is_second else 6)
    slides = every if isinstance(every, list) else [(i + 1) % every != 0 for i in range(layers)]
    fields = {
        "query_pre_attn_scalar": width_per_head if is_27b else config["head_dim"],
        "layer_types": ["sliding_attention" if window and slid else "full_attention" for slid in slides],
        "final_logit_softcapping": said.get("final_logit_softcapping", 30.0 if is_second else None),
    }
    fields |= {"sliding_window": window} if window else {}
    if is_second:
        return fields | {"attn_logit_softcapping": said.get("attn_logit_softcapping", 50.0)}
    return fields | {"rope_local_base_freq": said.get("rope.freq_base_swa", 10_000.0)}


def generation_config(file: GgufFile) -> dict[str, Any]:
    """The generation_config.json that the metadata describes: where a model starts, stops and pads."""
    ids = _special_ids(file)
    end_of_turn = file.metadata.get("tokenizer.ggml.eot_token_id")
    tokens = file.metadata.get("tokenizer.ggml.tokens", [])
    if end_of_turn is None and "<end_of_turn>" in tokens:  # as llama.cpp finds it: Gemma 2 and 3 are written without
        end_of_turn = tokens.index("<end_of_turn>")
    stops = [ids.get("eos_token_id"), end_of_turn]
    ids["eos_token_id"] = list(dict.fromkeys(i for i in stops if i is not None))
    return ids


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
