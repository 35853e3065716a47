"""GGUF files of the Llama and Qwen kinds: written here by llama.cpp's own Python package, read by ours."""

import dataclasses
import pathlib

import gguf as llama_cpp
import jax
import numpy as np
import pytest

from jax_sft.config import MeshConfig
from jax_sft.hf import gguf
from jax_sft.hf.gguf_tokenizer import rebuild_tokenizer
from jax_sft.hf.load import load_model, load_pretrained
from jax_sft.hf.tokenizer import load_tokenizer
from jax_sft.model.config import LinearRope, YarnRope
from jax_sft.model.families import read_model_config
from jax_sft.sharding import make_mesh
from tests.hf import family_cases
from tests.hf.gguf_files import BLOCKS, Kind, write_gguf
from tests.hf.models import CHATML, reference, tiny_tokenizer

PARTS = [
    (slice(None), slice(None)),
    (slice(16, 48), slice(None)),
    (slice(0, 16), slice(8, 40)),
    (slice(5, 37), slice(33, 64)),
]


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0])
def test_weights_of_every_number_format_arrive_as_llama_cpp_means_them(tmp_path: pathlib.Path, kind: Kind):
    weights = write_gguf(tmp_path / "m.gguf", kind=kind)
    model = load_model(tmp_path / "m.gguf")
    wanted = reference(weights, BLOCKS)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), b), model.params, wanted)


@pytest.mark.parametrize("kind", [Kind.F32, Kind.BF16, Kind.Q4_1])
def test_a_part_is_the_part_of_the_whole(tmp_path: pathlib.Path, kind: Kind):
    weights = write_gguf(tmp_path / "m.gguf", kind=kind)
    stored = gguf.read(tmp_path / "m.gguf").tensors()
    for name in ("model.layers.1.self_attn.q_proj.weight", "model.layers.2.mlp.up_proj.weight"):
        for part in PARTS:
            np.testing.assert_array_equal(stored[name].read(part), weights[name][part])


def test_a_sharded_load_equals_a_whole_one(tmp_path: pathlib.Path):
    config = BLOCKS | {"tie_word_embeddings": True}
    weights = write_gguf(tmp_path / "m.gguf", config, kind=Kind.Q4_0)
    model = load_model(tmp_path / "m.gguf", mesh=make_mesh(MeshConfig(fsdp=4, tensor=2)), dtype="float32")
    wanted = reference(weights, config)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), b), model.params, wanted)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_other_architectures_arrive_as_their_folder_would(tmp_path: pathlib.Path, kind: str):
    said = family_cases.hf_config(kind) | {"vocab_size": 320, "use_sliding_window": False, "rms_norm_eps": 1e-6}
    config = read_model_config(said)
    params = family_cases.params_of(config)
    write_gguf(tmp_path / "m.gguf", said, family_cases.state_dict_of(config, params), arch=kind, pre="qwen2")
    model = load_model(tmp_path / "m.gguf")
    assert model.config == config
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), b), model.params, params)


def test_qwen_cuts_digits_one_by_one_and_composes_accents(tmp_path: pathlib.Path):
    said = family_cases.hf_config("qwen2") | {"vocab_size": 320, "use_sliding_window": False, "rms_norm_eps": 1e-6}
    config = read_model_config(said)
    weights = family_cases.state_dict_of(config, family_cases.params_of(config))
    write_gguf(tmp_path / "m.gguf", said, weights, arch="qwen2", pre="qwen2")
    backend = rebuild_tokenizer(gguf.read(tmp_path / "m.gguf")).backend_tokenizer
    assert backend.normalizer.normalize_str("e\u0301") == "\u00e9"
    pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str("in 2024, don't\n\nstop")]
    assert pieces == ["in", "Ġ", "2", "0", "2", "4", ",", "Ġdon", "'t", "ĊĊ", "stop"]


def test_biases_of_q_and_k_are_put_back_in_order_too(tmp_path: pathlib.Path):
    config = BLOCKS | {"attention_bias": True, "mlp_bias": True}
    weights = write_gguf(tmp_path / "m.gguf", config)
    model = load_model(tmp_path / "m.gguf")
    assert model.config.qkv_bias
    assert model.config.mlp_bias
    wanted = reference(weights, config)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), b), model.params, wanted)


def test_the_reader_agrees_with_llama_cpps_own(tmp_path: pathlib.Path):
    write_gguf(tmp_path / "m.gguf", kind=Kind.Q8_0)
    ours, theirs = gguf.read(tmp_path / "m.gguf"), llama_cpp.GGUFReader(tmp_path / "m.gguf")
    fields = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert set(ours.metadata) == set(fields)
    for key, value in fields.items():
        assert ours.metadata[key] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), key
    places = {t.name: (t.tensor_type, tuple(t.shape[::-1].tolist()), int(t.data_offset)) for t in theirs.tensors}
    assert dict(ours.stored) == places


def test_the_config_is_the_one_that_was_converted(tmp_path: pathlib.Path):
    write_gguf(tmp_path / "m.gguf")
    said = gguf.hf_config(gguf.read(tmp_path / "m.gguf"))
    wanted = {k: v for k, v in BLOCKS.items() if k not in ("initializer_range", "torch_dtype")} | {"pad_token_id": 2}
    assert said == wanted
    assert said["rms_norm_eps"] == 1e-5  # not the float32 nearest to it


def test_rope_scaling_is_read_and_an_unknown_kind_is_refused_by_name(tmp_path: pathlib.Path):
    float32 = llama_cpp.GGUFValueType.FLOAT32
    string = llama_cpp.GGUFValueType.STRING
    factor = {"llama.rope.scaling.factor": (4.0, float32)}
    write_gguf(tmp_path / "a.gguf", metadata=factor | {"llama.rope.scaling.type": ("linear", string)})
    (rope,) = set(load_pretrained(tmp_path / "a.gguf").config.ropes)
    assert rope is not None
    assert rope.scaling == LinearRope(factor=4.0)
    for i, key in enumerate(["llama.rope.scaling.factor", "llama.rope.scale_linear"]):  # no kind is linear
        write_gguf(tmp_path / f"old{i}.gguf", metadata={key: (4.0, float32)})
        (rope,) = set(load_pretrained(tmp_path / f"old{i}.gguf").config.ropes)
        assert rope.scaling == LinearRope(factor=4.0)
    original = {"llama.rope.scaling.original_context_length": (32, llama_cpp.GGUFValueType.UINT32)}
    write_gguf(tmp_path / "b.gguf", metadata=factor | original | {"llama.rope.scaling.type": ("yarn", string)})
    (rope,) = set(load_pretrained(tmp_path / "b.gguf").config.ropes)
    assert rope is not None
    assert isinstance(rope.scaling, YarnRope)
    assert (rope.scaling.factor, rope.scaling.original_positions) == (4.0, 32)
    write_gguf(tmp_path / "c.gguf", metadata=factor | {"llama.rope.scaling.type": ("cubic", string)})
    with pytest.raises(ValueError, match=r"c\.gguf: (?s:.*)'cubic' is not modelled"):
        load_pretrained(tmp_path / "c.gguf")


def test_where_it_stops_is_eos_and_end_of_turn(tmp_path: pathlib.Path):
    number = llama_cpp.GGUFValueType.UINT32
    write_gguf(tmp_path / "m.gguf", metadata={"tokenizer.ggml.eot_token_id": (0, number)})
    base = load_pretrained(tmp_path / "m.gguf")
    assert base.generation_config == {"bos_token_id": 1, "eos_token_id": [2, 0], "pad_token_id": 2}
    assert base.stop_ids == (2, 0)


def test_the_tokenizer_is_the_one_that_was_converted(tmp_path: pathlib.Path):
    write_gguf(tmp_path / "m.gguf")
    rebuilt, original = load_tokenizer(tmp_path / "m.gguf"), tiny_tokenizer()
    for text in ["The quick fox in 2024, 12.", "你好，世界 ", "<|im_start|>user\nhi<|im_end|>\n", "\ttabs\n\n  end "]:
        assert rebuilt(text).input_ids == original(text).input_ids
        assert rebuilt.decode(rebuilt(text).input_ids) == text
    assert rebuilt.special_tokens_map == original.special_tokens_map
    assert rebuilt.chat_template == original.chat_template == CHATML
    assert rebuilt.model_max_length == 64
    assert rebuilt.decode([1, 50, 2], skip_special_tokens=True) == rebuilt.decode([50])


def test_digits_are_cut_one_by_one_where_the_file_says_smollm(tmp_path: pathlib.Path):
    write_gguf(tmp_path / "smollm.gguf")
    write_gguf(tmp_path / "gpt2.gguf", pre="gpt-2")
    pieces = [load_tokenizer(tmp_path / f"{n}.gguf").backend_tokenizer.pre_tokenizer for n in ("smollm", "gpt2")]
    assert [[piece for piece, _ in p.pre_tokenize_str("in 2024")] for p in pieces] == [
        ["in", "Ġ", "2", "0", "2", "4"],
        ["in", "Ġ2024"],
    ]


def test_llama3_cuts_digits_by_three_and_starts_with_bos(tmp_path: pathlib.Path):
    write_gguf(tmp_path / "m.gguf", pre="llama-bpe")
    tokenizer = load_tokenizer(tmp_path / "m.gguf")
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("It's 20245 days\n\n ok")
    assert [piece for piece, _ in pieces] == ["It", "'s", "Ġ", "202", "45", "Ġdays", "ĊĊ", "Ġok"]
    assert tokenizer("hi").input_ids[0] == 1
    assert tokenizer("hi", add_special_tokens=False).input_ids == tokenizer("hi").input_ids[1:]


def test_bos_is_added_only_where_the_file_says_so(tmp_path: pathlib.Path):
    boolean = llama_cpp.GGUFValueType.BOOL
    write_gguf(tmp_path / "yes.gguf", metadata={"tokenizer.ggml.add_bos_token": (True, boolean)})
    write_gguf(tmp_path / "no.gguf", pre="llama-bpe", metadata={"tokenizer.ggml.add_bos_token": (False, boolean)})
    assert load_tokenizer(tmp_path / "yes.gguf")("hi").input_ids[0] == 1
    assert load_tokenizer(tmp_path / "no.gguf")("hi").input_ids[0] != 1


def test_an_unknown_way_to_cut_text_is_refused_not_guessed(tmp_path: pathlib.Path):
    write_gguf(tmp_path / "m.gguf", pre="tekken")
    with pytest.raises(ValueError, match=r"m\.gguf: its tokenizer cuts text in the way 'tekken', and only smollm"):
        load_tokenizer(tmp_path / "m.gguf")


def test_another_architecture_is_refused(tmp_path: pathlib.Path):
    write_gguf(tmp_path / "m.gguf", weights={}, arch="falcon")
    with pytest.raises(
        ValueError, match="holds the architecture 'falcon', and only llama, qwen2, qwen3, gemma, gemma2, gemma3 can"
    ):
        load_pretrained(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("key", "what"), [("llama.expert_count", "experts"), ("rope_freqs.weight", r"rope factors \(rope_freqs.weight\)")]
)
def test_what_a_gguf_file_cannot_tell_is_refused(tmp_path: pathlib.Path, key: str, what: str):
    write_gguf(tmp_path / "m.gguf")
    file = gguf.read(tmp_path / "m.gguf")
    file = gguf.GgufFile(
        file.path, {**file.metadata, key: 8}, {**file.stored, **({key: (Kind.F32, (8,), 0)} if "rope" in key else {})}
    )
    with pytest.raises(ValueError, match=f"has {what}, which cannot be read from GGUF; name its Hugging Face folder"):
        gguf.hf_config(file)


def test_a_head_width_that_is_not_said_is_llama_cpps(tmp_path: pathlib.Path):
    write_gguf(
        tmp_path / "m.gguf", BLOCKS | {"head_dim": 12}, weights={"model.embed_tokens.weight": np.ones((320, 64))}
    )
    file = gguf.read(tmp_path / "m.gguf")
    said = {k: v for k, v in file.metadata.items() if k != "llama.attention.key_length"}
    assert gguf.hf_config(dataclasses.replace(file, metadata=said))["head_dim"] == 12
    said.pop("llama.rope.dimension_count")
    assert gguf.hf_config(dataclasses.replace(file, metadata=said))["head_dim"] == 64 // 4


def test_a_missing_key_is_named(tmp_path: pathlib.Path):
    path = tmp_path / "m.gguf"
    write_gguf(path)
    path.write_bytes(path.read_bytes().replace(b"llama.context_length", b"llama.context_lengtk"))
    with pytest.raises(ValueError, match=r"m\.gguf: lacks llama\.context_length; use a complete GGUF model"):
        gguf.hf_config(gguf.read(path))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("not gguf", "it does not start with 'GGUF'"),
        ("version", "it is of GGUF version 1, and 2 and 3 are known"),
        ("metadata", "is no GGUF file that can be read"),
        ("tensors", "is cut short in the tensor"),
    ],
)
def test_a_damaged_file_says_what_is_wrong(tmp_path: pathlib.Path, damage: str, said: str):
    path = tmp_path / "m.gguf"
    write_gguf(path)
    whole = path.read_bytes()
    damaged = {
        "not gguf": b"PK" + whole,
        "version": whole[:4] + b"\1" + whole[5:],
        "metadata": whole[:2000],
        "tensors": whole[:-5000],
    }
    path.write_bytes(damaged[damage])
    with pytest.raises(ValueError, match=f"{said}.*copy or download it again"):
        gguf.read(path)


def test_a_format_that_numpy_cannot_unpack_is_named(tmp_path: pathlib.Path, monkeypatch):
    write_gguf(tmp_path / "m.gguf", kind=Kind.Q8_0)

    def refuse(*_):
        raise NotImplementedError

    monkeypatch.setattr(gguf, "dequantize", refuse)
    with pytest.raises(ValueError, match="holds Q8_0, which cannot be read; use Q8_0 or F16"):
        load_model(tmp_path / "m.gguf")
