"""GGUF files of the Gemma kinds: what llama.cpp's converter changes or leaves out is put back."""

import pathlib
from typing import Any

import gguf as llama_cpp
import jax
import numpy as np
import pytest

from jax_sft.hf import gguf
from jax_sft.hf.load import load_model, load_pretrained
from jax_sft.model.config import LinearRope, ModelConfig
from jax_sft.model.families import FAMILIES, read_model_config
from tests.hf import family_cases, sentencepiece_cases
from tests.hf.gguf_files import BLOCKS, Kind, write_gguf
from tests.hf.models import CHATML, write_folder

MODEL_TYPES = {"gemma": "gemma", "gemma2": "gemma2", "gemma3": "gemma3_text"}
# Of the widths of `BLOCKS`; 7 layers have one of Gemma 3 that sees everything.
SIZES: dict[str, Any] = {k: BLOCKS[k] for k in ("hidden_size", "intermediate_size", "head_dim", "vocab_size")}
OF_KIND: dict[str, dict[str, Any]] = {
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0},
    "gemma3": {"query_pre_attn_scalar": 16, "sliding_window_pattern": 6, "num_hidden_layers": 7},
}
FLOAT, UINT, STRING = (
    llama_cpp.GGUFValueType.FLOAT32,
    llama_cpp.GGUFValueType.UINT32,
    llama_cpp.GGUFValueType.STRING,
)
METADATA: dict[str, dict[str, Any]] = {
    "gemma": {},
    "gemma2": {
        "gemma2.attention.sliding_window": (7, UINT),
        "gemma2.attn_logit_softcapping": (20.0, FLOAT),
        "gemma2.final_logit_softcapping": (10.0, FLOAT),
    },
    "gemma3": {"gemma3.attention.sliding_window": (7, UINT)},
}


def hf_config(arch: str) -> dict[str, Any]:
    eps = {"rms_norm_eps": 1e-6, "pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
    return family_cases.hf_config(MODEL_TYPES[arch]) | SIZES | eps | OF_KIND[arch]


def weights_of(config: ModelConfig) -> dict[str, np.ndarray]:
    """Norms on a grid, as those of real files are: in bfloat16, 1 is added and taken away without a rounding."""
    weights = family_cases.state_dict_of(config, family_cases.params_of(config))
    return {k: np.round(v * 256) / 256 if k.endswith("norm.weight") else v for k, v in weights.items()}


def read_config(arch: str, *, layers: int = 2, width: int = 64, heads: int = 4, **said: Any) -> ModelConfig:
    """What a file of nothing but metadata says; `__` in the name of a key is a dot."""
    start = {
        "block_count": layers,
        "context_length": 64,
        "embedding_length": width,
        "feed_forward_length": 96,
        "attention.head_count": heads,
        "attention.key_length": 16,
        "attention.layer_norm_rms_epsilon": 1e-6,
    }
    start |= {key.replace("__", "."): value for key, value in said.items()}
    metadata = {"general.architecture": arch} | {f"{arch}.{key}": value for key, value in start.items()}
    file = gguf.GgufFile(pathlib.Path("m.gguf"), metadata, {"token_embd.weight": (Kind.F32, (320, width), 0)})
    return read_model_config(gguf.hf_config(file))


@pytest.mark.parametrize(
    ("arch", "kind"),
    [
        *((arch, Kind.F32) for arch in MODEL_TYPES),
        *(("gemma3", kind) for kind in (Kind.F16, Kind.BF16, Kind.Q8_0)),
    ],
)
def test_a_gemma_arrives_as_its_folder_would(tmp_path: pathlib.Path, arch: str, kind: Kind):
    said = hf_config(arch)
    weights = weights_of(read_model_config(said))
    stored = write_gguf(tmp_path / "m.gguf", said, weights, kind=kind, arch=arch, metadata=METADATA[arch])
    exact = weights if kind == Kind.F32 else {k: v for k, v in weights.items() if k.endswith("norm.weight")}
    write_folder(tmp_path / "folder", said, stored | exact)
    ours, folder = load_model(tmp_path / "m.gguf"), load_model(tmp_path / "folder")
    assert ours.config == folder.config
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), ours.params, folder.params)


def test_1_is_taken_from_norms_in_float32_in_whole_and_in_part(tmp_path: pathlib.Path):
    said = hf_config("gemma2")
    weights = weights_of(read_model_config(said))
    write_gguf(tmp_path / "m.gguf", said, weights, arch="gemma2", metadata=METADATA["gemma2"])
    file = gguf.read(tmp_path / "m.gguf")
    name = "model.layers.1.post_feedforward_layernorm.weight"
    found = file.tensors()[name]
    assert found.read((slice(3, 9),)).dtype == np.float32
    np.testing.assert_array_equal(found.read((slice(3, 9),)), weights[name][3:9])
    _, shape, offset = file.stored["blk.1.post_ffw_norm.weight"]
    there = np.memmap(file.path, np.float32, "r", offset, shape)
    np.testing.assert_array_equal(there, weights[name] + 1)


def test_the_config_is_one_that_a_folder_would_have(tmp_path: pathlib.Path):
    said = hf_config("gemma3")
    write_gguf(tmp_path / "m.gguf", said, weights_of(read_model_config(said)), arch="gemma3")
    found = gguf.hf_config(gguf.read(tmp_path / "m.gguf"))
    assert (found["model_type"], found["architectures"]) == ("gemma3_text", [FAMILIES["gemma3_text"].architecture])
    assert found["hidden_activation"] == "gelu_pytorch_tanh"
    assert found["tie_word_embeddings"]


@pytest.mark.parametrize(
    ("arch", "layers", "width", "heads", "scalar"),
    [
        ("gemma2", 26, 2304, 8, 16),
        ("gemma2", 46, 4608, 32, 144),
        ("gemma3", 62, 5376, 32, 168),
        ("gemma3", 46, 64, 4, 16),
    ],
)
def test_scores_of_the_27b_sizes_are_scaled_by_the_width_per_head(
    arch: str, layers: int, width: int, heads: int, scalar: int
):
    config = read_config(arch, layers=layers, width=width, heads=heads)
    assert config.query_scale == scalar**-0.5


def test_ropes_of_gemma_3_are_scaled_where_everything_is_seen_alone():
    scaling = {"rope__scaling__type": "linear", "rope__scaling__factor": 8.0, "rope__freq_base": 1e6}
    config = read_config("gemma3", layers=12, attention__sliding_window=512, **scaling)
    assert config.windows == (*[512] * 5, None) * 2
    near, far = config.ropes[0], config.ropes[5]
    assert near is not None
    assert far is not None
    assert (near.theta, near.scaling) == (10_000.0, None)
    assert (far.theta, far.scaling) == (1e6, LinearRope(factor=8.0))
    assert config.ropes == (*[near] * 5, far) * 2


def test_other_patterns_of_windows_are_followed():
    window = {"attention__sliding_window": 8}
    assert read_config("gemma3", layers=3).windows == (None, None, None)
    assert read_config("gemma3", layers=3, attention__sliding_window_pattern=2, **window).windows == (8, None, 8)
    given = read_config("gemma2", layers=3, attention__sliding_window_pattern=[True, True, False], **window)
    assert given.windows == (8, 8, None)
    assert read_config("gemma3", rope__freq_base_swa=500.0, **window).ropes[0].theta == 500.0  # pyright: ignore


def test_what_old_files_leave_out_is_as_llama_cpp_has_it():
    second = read_config("gemma2")
    assert (second.windows, second.score_cap, second.logit_cap) == ((4096, None), 50.0, 30.0)
    assert (read_config("gemma3").score_cap, read_config("gemma3").logit_cap) == (None, None)
    first = read_config("gemma")
    assert first.ropes[0].theta == 10_000.0  # pyright: ignore[reportOptionalMemberAccess]
    assert first.head_width == 16


def test_its_vocabulary_its_template_and_its_stops_come_out_of_the_file(tmp_path: pathlib.Path):
    pieces, ids = sentencepiece_cases.recorded("gemma")
    said = hf_config("gemma2") | {"vocab_size": len(pieces), "num_hidden_layers": 1}
    bool_ = llama_cpp.GGUFValueType.BOOL
    metadata = {"bos_token_id": (2, UINT), "eos_token_id": (1, UINT), "add_space_prefix": (False, bool_)}
    metadata = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    weights = weights_of(read_model_config(said))
    write_gguf(tmp_path / "m.gguf", said, weights, arch="gemma2", metadata=metadata, pieces=pieces)
    base = load_pretrained(tmp_path / "m.gguf")
    assert {text: base.tokenizer(text).input_ids for text in ids} == {text: [2, *found] for text, found in ids.items()}
    assert base.chat_template == CHATML
    assert base.stop_ids == (1, base.tokenizer.convert_tokens_to_ids("<end_of_turn>"))


def test_it_stops_at_the_end_of_a_turn_that_only_its_vocabulary_names(tmp_path: pathlib.Path):
    said = hf_config("gemma2")
    write_gguf(tmp_path / "m.gguf", said, weights_of(read_model_config(said)), arch="gemma2")
    file = gguf.read(tmp_path / "m.gguf")
    assert gguf.generation_config(file)["eos_token_id"] == [2]
    tokens = ["<end_of_turn>", *file.metadata["tokenizer.ggml.tokens"][1:]]
    named = gguf.GgufFile(file.path, {**file.metadata, "tokenizer.ggml.tokens": tokens}, file.stored)
    assert gguf.generation_config(named)["eos_token_id"] == [2, 0]
    said_otherwise = gguf.GgufFile(file.path, {**named.metadata, "tokenizer.ggml.eot_token_id": 7}, file.stored)
    assert gguf.generation_config(said_otherwise)["eos_token_id"] == [2, 7]


def test_a_missing_key_of_a_gemma_is_named():
    with pytest.raises(ValueError, match=r"m\.gguf: lacks gemma3\.block_count; use a complete GGUF model"):
        gguf.hf_config(gguf.GgufFile(pathlib.Path("m.gguf"), without_layers(), {}))


def without_layers() -> dict[str, Any]:
    keys = ["context_length", "embedding_length", "feed_forward_length", "attention.head_count"]
    keys += ["attention.layer_norm_rms_epsilon"]
    return {"general.architecture": "gemma3"} | {f"gemma3.{key}": 1 for key in keys}


@pytest.mark.parametrize("arch", ["gemma3n", "rwkv7", "t5"])
def test_relatives_and_others_are_refused_by_name(tmp_path: pathlib.Path, arch: str):
    writer = llama_cpp.GGUFWriter(tmp_path / "m.gguf", arch)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ValueError, match=f"holds the architecture '{arch}', and only .*gemma3 can.*; name the model's"):
        load_pretrained(tmp_path / "m.gguf")
