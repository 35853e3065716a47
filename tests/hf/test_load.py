"""Weights come in whole, cast, and straight into their place; what does not fit is named at once."""

import json
import math
import pathlib
import re
import subprocess
import sys
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from safetensors.numpy import save_file
from tokenizers import AddedToken

from jax_sft.config import MeshConfig
from jax_sft.export import Export, write_export
from jax_sft.hf.load import Pretrained, load_model, load_params, load_pretrained
from jax_sft.model.decoder import abstract_params
from jax_sft.sharding import make_mesh, shard_params
from tests.hf.models import CHATML, TINY, reference, tensors, write_folder

BIASED = TINY | {"attention_bias": True, "mlp_bias": True}
TIED = TINY | {"tie_word_embeddings": True}


def assert_same(found, wanted):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), b), found, wanted)


@pytest.mark.parametrize("config", [TINY, BIASED, TIED], ids=["plain", "biases", "tied"])
@pytest.mark.parametrize("shards", [1, 3])
def test_every_weight_arrives_where_it_belongs(tmp_path: pathlib.Path, config: dict, shards: int):
    weights = write_folder(tmp_path / "m", config, shards=shards)
    model = load_model(tmp_path / "m")
    assert_same(model.params, reference(weights, config))
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), model.params)
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), abstract_params(model.config))
    assert all(len(x.sharding.device_set) == 1 for x in jax.tree.leaves(model.params))


@pytest.mark.parametrize("sizes", [(1, 8, 1), (1, 1, 8), (2, 2, 2), (1, 4, 2)])
def test_weights_lie_on_the_mesh_as_asked(tmp_path: pathlib.Path, sizes: tuple[int, int, int]):
    weights = write_folder(tmp_path / "m", BIASED)
    mesh = make_mesh(MeshConfig(data=sizes[0], fsdp=sizes[1], tensor=sizes[2]))
    model = load_model(tmp_path / "m", mesh=mesh)
    assert_same(model.params, reference(weights, BIASED))
    wanted = shard_params(abstract_params(model.config), mesh)
    assert all(jax.tree.leaves(jax.tree.map(lambda x, s: x.sharding == s, model.params, wanted)))
    assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(model.params))


def test_shards_read_only_their_own_part(tmp_path: pathlib.Path, monkeypatch):
    from jax_sft.hf import tensorfile

    write_folder(tmp_path / "m")
    read_sizes = []
    whole_read = tensorfile.Entry.read

    def counted(entry, index):
        found = whole_read(entry, index)
        read_sizes.append(found.size)
        return found

    monkeypatch.setattr(tensorfile.Entry, "read", counted)
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    model = load_model(tmp_path / "m", mesh=mesh)
    # Replicas of a part are read once: all reads together are the model, once.
    assert sum(read_sizes) == model.config.num_params


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_folder_of_mixed_dtypes_is_cast_to_the_one_asked_for(tmp_path: pathlib.Path, dtype: str):
    stored = [np.float32, np.float16, ml_dtypes.bfloat16, np.float64]
    weights = {name: x.astype(stored[i % 4]) for i, (name, x) in enumerate(tensors(TINY).items())}
    write_folder(tmp_path / "m", TINY, weights, shards=2)
    params = load_params(load_pretrained(tmp_path / "m"), dtype=dtype)
    cast = {
        name: x.astype(np.float32 if x.dtype == np.float64 else x.dtype).astype(dtype) for name, x in weights.items()
    }
    assert_same(params, reference(cast, TINY))
    assert {x.dtype.name for x in jax.tree.leaves(params)} == {dtype}


def test_a_tied_head_may_be_there_if_it_is_the_embedding(tmp_path: pathlib.Path):
    weights = tensors(TIED)
    head = weights["model.embed_tokens.weight"]
    write_folder(tmp_path / "same", TIED, weights | {"lm_head.weight": head.copy()})
    assert "head_VD" not in load_model(tmp_path / "same").params
    head = head.copy()
    head[-1, -1] += 1
    write_folder(tmp_path / "other", TIED, weights | {"lm_head.weight": head})
    with pytest.raises(ValueError, match=r'lm_head.weight differs from .*set "tie_word_embeddings": false'):
        load_model(tmp_path / "other")


def test_a_missing_head_says_how_to_tie_it(tmp_path: pathlib.Path):
    weights = tensors(TINY)
    del weights["lm_head.weight"]
    write_folder(tmp_path / "m", TINY, weights)
    with pytest.raises(ValueError, match=r'set "tie_word_embeddings": true there:\n  missing: lm_head\.weight$'):
        load_model(tmp_path / "m")


def test_all_that_does_not_fit_is_named_at_once(tmp_path: pathlib.Path):
    weights = tensors(TINY)
    for i in range(3):
        del weights[f"model.layers.{i}.mlp.up_proj.weight"]
    weights["model.layers.1.self_attn.q_proj.weight"] = np.zeros((3, 4), np.float32)
    weights["model.layers.0.self_attn.q_norm.weight"] = np.zeros(6, np.float32)
    weights["model.norm.weight"] = np.zeros(16, np.int8)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(3, np.float32)  # harmless, and everywhere
    write_folder(tmp_path / "m", TINY, weights)
    with pytest.raises(ValueError, match="do not fit config.json") as error:
        load_model(tmp_path / "m")
    assert str(error.value).splitlines()[1:] == [
        "  missing: model.layers.{0-2}.mlp.up_proj.weight",
        "  unexpected: model.layers.0.self_attn.q_norm.weight",
        "  wrong shape: model.layers.1.self_attn.q_proj.weight is (3, 4), expected (24, 16)",
        "  not plain numbers: model.norm.weight is I8",
    ]


def test_a_tensor_in_two_files_is_an_error(tmp_path: pathlib.Path):
    weights = write_folder(tmp_path / "m")
    save_file({"lm_head.weight": weights["lm_head.weight"]}, tmp_path / "m" / "model-copy.safetensors")
    with pytest.raises(ValueError, match=r"lm_head\.weight is in two files"):
        load_model(tmp_path / "m")


def test_a_shard_cut_short_is_named(tmp_path: pathlib.Path):
    write_folder(tmp_path / "m", shards=2)
    shard = tmp_path / "m" / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model-00002-of-00002\.safetensors: is damaged or cut short"):
        load_model(tmp_path / "m")


def test_an_architecture_that_is_not_modelled_names_the_source(tmp_path: pathlib.Path):
    write_folder(tmp_path / "m", TINY | {"model_type": "mamba"}, tensors(TINY))
    with pytest.raises(ValueError, match=r"/m: .*'mamba'"):
        load_pretrained(tmp_path / "m")


def test_a_config_that_is_no_json_is_named(tmp_path: pathlib.Path):
    write_folder(tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"generation_config\.json: cannot be read as JSON"):
        load_pretrained(tmp_path / "m")


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_a_json_file_that_holds_no_object_is_named(tmp_path: pathlib.Path, file: str):
    write_folder(tmp_path / "m", generation={})
    (tmp_path / "m" / file).write_text("[1]")
    with pytest.raises(ValueError, match=rf"/{file}: holds a JSON list, not an object .*; copy or download it again"):
        load_pretrained(tmp_path / "m")


@pytest.mark.parametrize("stop", ["<|im_end|>", -1, 320, 2.0, True, [2, "x"], {"id": 2}])
@pytest.mark.parametrize("file", ["config", "generation_config"])
def test_a_stop_id_that_is_no_token_of_the_model_is_named(tmp_path: pathlib.Path, file: str, stop):
    said = {"eos_token_id": stop}
    of_config, generation = (said, {}) if file == "config" else ({}, said)
    write_folder(tmp_path / "m", TINY | of_config, tensors(TINY), generation=generation)
    with pytest.raises(
        ValueError,
        match=rf"/m: {file}\.json: eos_token_id = {re.escape(repr(stop))} must be a token's id, a whole number below "
        "vocab_size = 320, or a list of such; write that, or remove it",
    ):
        load_pretrained(tmp_path / "m")


def test_a_pad_id_that_is_no_number_is_named(tmp_path: pathlib.Path):
    write_folder(tmp_path / "m", generation={"pad_token_id": "<pad>"})
    with pytest.raises(
        ValueError, match=r"generation_config\.json: pad_token_id = '<pad>' must be a token's id, a who"
    ):
        load_pretrained(tmp_path / "m")


def test_a_field_of_a_wrong_type_names_the_folder_and_the_file(tmp_path: pathlib.Path):
    write_folder(tmp_path / "m", TINY | {"hidden_size": "16"}, tensors(TINY))
    with pytest.raises(ValueError, match=r"(?s)/m: config\.json cannot.*hidden_size = '16' must be a whole number"):
        load_pretrained(tmp_path / "m")


def with_tokens_beyond(folder: pathlib.Path, **changes: Any) -> Pretrained:
    """The tiny folder, and a tokenizer with three tokens more than the model has embeddings."""
    write_folder(folder)
    base = load_pretrained(folder)
    last = max(base.tokenizer.get_vocab().values())
    assert last < base.config.vocab_size - 1
    filling = [f"<fill_{i}>" for i in range(base.config.vocab_size - last - 1)]
    base.tokenizer.add_tokens([*filling, AddedToken("<image>", special=True), "<beyond>"])
    base.tokenizer.add_special_tokens({"extra_special_tokens": ["<image>", "<audio>"]})
    for name, value in changes.items():
        setattr(base.tokenizer, name, value)
    base.tokenizer.save_pretrained(str(folder))
    return base


def test_added_tokens_that_the_model_has_no_embedding_for_are_left_out(tmp_path: pathlib.Path, caplog):
    base = with_tokens_beyond(tmp_path / "m", pad_token="<audio>")
    loaded = load_pretrained(tmp_path / "m")
    assert "the model has no embedding for '<image>', '<beyond>', '<audio>', which are left out" in caplog.text
    vocabulary = loaded.tokenizer.get_vocab()
    assert max(vocabulary.values()) == loaded.config.vocab_size - 1 and "<fill_0>" in vocabulary
    assert loaded.tokenizer.pad_token is None and loaded.chat_template == base.chat_template
    for text in ["The quick fox <fill_1> 2024", "<|im_start|>user\n你好<|im_end|>"]:
        assert loaded.tokenizer(text).input_ids == base.tokenizer(text).input_ids
    assert loaded.tokenizer.decode(loaded.tokenizer("a <image> b").input_ids) == "a <image> b"
    export_again = load_model(tmp_path / "m")
    write_export(export_again, export_again.params, Export(out=tmp_path / "out", dtype="float32", facts={}, exam=None))
    assert load_pretrained(tmp_path / "out").tokenizer.get_vocab() == vocabulary


@pytest.mark.parametrize("name", ["eos_token", "bos_token", "chat_template"])
def test_a_token_without_embedding_that_is_needed_is_refused(tmp_path: pathlib.Path, name: str):
    with_tokens_beyond(tmp_path / "m", **{name: "<beyond>"})
    with pytest.raises(
        ValueError,
        match=r"/m: the tokenizer's largest id is 322 \('<audio>'\), and the model's vocab_size = 320 ends at 319; "
        r"take both from one model, or remove the added tokens .*'<beyond>' is needed",
    ):
        load_pretrained(tmp_path / "m")


def test_a_dtype_that_is_none_of_ours_is_refused(tmp_path: pathlib.Path):
    write_folder(tmp_path / "m")
    with pytest.raises(ValueError, match="dtype = 'bf16' is not one of float32, bfloat16, float16; name one of them"):
        load_model(tmp_path / "m", dtype="bf16")


def test_stop_ids_are_all_that_the_files_say(tmp_path: pathlib.Path):
    write_folder(tmp_path / "m", TINY | {"eos_token_id": [7, 2]}, tensors(TINY), generation={"eos_token_id": 0})
    base = load_pretrained(tmp_path / "m")
    assert base.stop_ids == (0, 7, 2)
    assert base.generation_config == {"eos_token_id": 0}
    assert base.params is None


def test_a_template_comes_from_the_tokenizer_or_a_file(tmp_path: pathlib.Path):
    write_folder(tmp_path / "m")
    assert load_pretrained(tmp_path / "m").chat_template == CHATML
    (tmp_path / "mine.jinja").write_text("{{ messages }}")
    assert load_pretrained(tmp_path / "m", chat_template=tmp_path / "mine.jinja").chat_template == "{{ messages }}"
    with pytest.raises(ValueError, match=r"model\.chat_template: there is no file .*other\.jinja"):
        load_pretrained(tmp_path / "m", chat_template=tmp_path / "other.jinja")
    (tmp_path / "mine.jinja").write_bytes("{# für #}".encode("latin-1"))
    with pytest.raises(ValueError, match=r"model\.chat_template: .*mine\.jinja cannot be read .* save it as UTF-8"):
        load_pretrained(tmp_path / "m", chat_template=tmp_path / "mine.jinja")


def test_a_template_that_is_no_jinja_is_named_and_only_a_given_one_stops_the_loading(tmp_path: pathlib.Path):
    write_folder(tmp_path / "m")
    mine = tmp_path / "mine.jinja"
    mine.write_text("{% for m in messages %}")
    with pytest.raises(
        ValueError, match=r"^model\.chat_template: .*mine\.jinja is not valid Jinja, line 1: .*or to another"
    ):
        load_pretrained(tmp_path / "m", chat_template=mine)
    mine.write_text("{{ messages[0].content }}")  # fails where there is no message, and is Jinja all the same
    assert load_pretrained(tmp_path / "m", chat_template=mine).chat_template == mine.read_text()
    (tmp_path / "m" / "chat_template.jinja").write_text("\n{{ oh }")
    own = load_pretrained(tmp_path / "m")  # an export or plain texts do without it
    with pytest.raises(
        ValueError, match=r"^the chat template of .*/m is not valid Jinja, line 2: .*set model\.chat_template"
    ):
        own.template.encode_prompt([{"role": "user", "content": "hi"}])


def test_a_model_without_template_has_none(tmp_path: pathlib.Path):
    write_folder(tmp_path / "m")
    (tmp_path / "m" / "chat_template.jinja").unlink()
    assert load_pretrained(tmp_path / "m").chat_template is None


MEASURE = """
import re, sys
import jax, jax.numpy as jnp
from jax_sft.config import MeshConfig
from jax_sft.hf.load import load_params, load_pretrained
from jax_sft.model.decoder import abstract_params
from jax_sft.sharding import make_mesh, shard_params

def memory(what):
    return int(re.search(what + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

base = load_pretrained(sys.argv[1])
shardings = shard_params(abstract_params(base.config), make_mesh(MeshConfig()))
jax.block_until_ready(jnp.ones(8) + 1)
start = memory("VmRSS")
params = load_params(base, shardings=shardings, dtype="bfloat16")
sizes = [x.nbytes for x in jax.tree.leaves(params)]
print(memory("VmHWM") - start, sum(sizes), max(sizes))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_host_memory_is_the_model_and_less_than_one_stacked_tensor(tmp_path: pathlib.Path):
    # The devices of the CPU are the host, so the model itself counts; a reader that holds it twice needs 800 MB.
    config = TINY | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12, "head_dim": 64}
    config |= {"num_attention_heads": 16, "num_key_value_heads": 16, "tie_word_embeddings": True}
    write_folder(tmp_path / "m", TINY, {})
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    (tmp_path / "m" / "model.safetensors").unlink()
    one_layer = {k: x.astype(ml_dtypes.bfloat16) for k, x in tensors(config | {"num_hidden_layers": 1}).items()}
    for i in range(config["num_hidden_layers"]):
        named = {k.replace("layers.0", f"layers.{i}"): x for k, x in one_layer.items() if ".layers." in k or i == 0}
        save_file(named, tmp_path / "m" / f"model-{i}.safetensors")
    done = subprocess.run([sys.executable, "-c", MEASURE, tmp_path / "m"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    used, model, largest = map(int, done.stdout.split())
    assert model > 390e6
    assert used < model + largest, f"{used / 1e6:.0f} MB for {model / 1e6:.0f} MB, of which {largest / 1e6:.0f} in one"


def test_the_load_of_a_sharded_model_holds_one_part_at_a_time(tmp_path: pathlib.Path, monkeypatch):
    from jax_sft.hf import load

    write_folder(tmp_path / "m")
    mesh = make_mesh(MeshConfig(fsdp=8))
    largest = []
    real = load._read_part

    def seen(*args):
        part = real(*args)
        largest.append(part.nbytes)
        return part

    monkeypatch.setattr(load, "_read_part", seen)
    model = load_model(tmp_path / "m", mesh=mesh)
    parts = [s.data.nbytes for x in jax.tree.leaves(model.params) for s in x.addressable_shards]
    assert isinstance(model.params["embed_VD"].sharding, NamedSharding)
    assert max(largest) == max(parts)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 4)])
def test_new_tokens_get_the_mean_row_and_the_rest_stays(tmp_path: pathlib.Path, tied: bool, shape):
    """Vocabulary 320, of which the tokenizer has 310: ten of twelve new tokens find an unused row, two a new one."""
    config = TINY | {"tie_word_embeddings": tied}
    weights = tensors(config)
    write_folder(tmp_path / "m", config, weights)
    size = len(load_pretrained(tmp_path / "m").tokenizer)
    new = [f"<|new_{i}|>" for i in range(322 - size)]
    mesh = make_mesh(MeshConfig(data=shape[0], fsdp=shape[1], tensor=shape[2]), jax.devices()[: math.prod(shape)])
    base = load_model(tmp_path / "m", mesh=mesh, new_tokens=[*new, "<|im_end|>", new[0]])
    assert base.new_ids == tuple(range(size, 322))
    assert base.config.vocab_size == 322
    assert base.tokenizer("hi<|new_0|>")["input_ids"][-1] == size
    for ours, name in [("embed_VD", "model.embed_tokens.weight"), ("head_VD", "lm_head.weight")][: 1 if tied else 2]:
        got = np.asarray(base.params[ours])
        np.testing.assert_array_equal(got[:size], weights[name][:size])
        np.testing.assert_allclose(got[size:], np.tile(weights[name][:size].mean(0), (322 - size, 1)), rtol=1e-6)
    assert load_model(tmp_path / "m").config.vocab_size == 320


def test_new_tokens_leave_with_the_export_and_come_back(tmp_path: pathlib.Path):
    write_folder(tmp_path / "m", TINY, tensors(TINY))
    base = load_model(tmp_path / "m", new_tokens=[f"<|new_{i}|>" for i in range(20)])
    write_export(base, base.params, Export(out=tmp_path / "out", dtype="float32", facts={}, exam=None))
    back = load_model(tmp_path / "out")
    assert back.config == base.config
    assert back.tokenizer.get_vocab() == base.tokenizer.get_vocab()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == base.config.vocab_size
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), back.params, base.params)
    with pytest.raises(ValueError, match=r"model\.new_tokens = .*: a token must have a character that is no blank"):
        load_pretrained(tmp_path / "m", new_tokens=[" "])
