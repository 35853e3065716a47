"""The hash of a model's weights is one of their numbers: how they lie in files is nothing to it."""

import pathlib
import time
from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jax_sft.hf.stored import weights_hash
from tests.hf.gguf_files import BLOCKS, Kind, write_gguf
from tests.hf.models import TINY, smollm2, tensors, write_folder

TIED = TINY | {"tie_word_embeddings": True}


def in_bfloat16(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: x.astype(ml_dtypes.bfloat16) for name, x in weights.items()}


def test_other_shards_and_a_dtype_that_holds_the_numbers_are_the_same_weights(tmp_path: pathlib.Path):
    weights = in_bfloat16(tensors(TINY))
    write_folder(tmp_path / "one", TINY, weights)
    write_folder(tmp_path / "shards", TINY, dict(reversed(weights.items())), shards=3)
    write_folder(tmp_path / "wide", TINY, {name: x.astype(np.float32) for name, x in weights.items()}, shards=2)
    write_folder(tmp_path / "rounded", TINY, tensors(TINY))
    found = [weights_hash(tmp_path / name) for name in ("one", "shards", "wide", "rounded")]
    assert found[0] == found[1] == found[2] != found[3]


def test_a_tied_head_that_is_stored_and_frequencies_of_old_files_do_not_matter(tmp_path: pathlib.Path):
    weights = write_folder(tmp_path / "one", TIED)
    more = {"lm_head.weight": weights["model.embed_tokens.weight"]}
    more |= {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)}
    write_folder(tmp_path / "more", TIED, weights | more)
    write_folder(tmp_path / "other", TIED, weights | {"lm_head.weight": 2 * more["lm_head.weight"]})
    found = [weights_hash(tmp_path / name) for name in ("one", "more", "other")]
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q8_0])
def test_a_gguf_file_and_a_folder_of_its_numbers_are_the_same_weights(tmp_path: pathlib.Path, kind: Kind):
    held = write_gguf(tmp_path / "m.gguf", BLOCKS, kind=kind)
    write_folder(tmp_path / "m", BLOCKS, held)
    assert weights_hash(tmp_path / "m.gguf") == weights_hash(tmp_path / "m")


CHANGES: dict[str, Callable[[dict[str, np.ndarray]], None]] = {
    "the last number of a norm": lambda w: w["model.layers.2.input_layernorm.weight"].__setitem__(-1, 0.25),
    "the first row of a matrix": lambda w: w["model.layers.1.mlp.up_proj.weight"].__setitem__(0, 0.25),
    "the last row of a matrix": lambda w: w["model.layers.1.mlp.up_proj.weight"].__setitem__(-1, 0.25),
    "a matrix, by little": lambda w: w["model.layers.0.self_attn.k_proj.weight"].__imul__(np.float32(1.0001)),
    "two tensors trade names": lambda w: w.update(
        {f"model.layers.{i}.mlp.down_proj.weight": w[f"model.layers.{1 - i}.mlp.down_proj.weight"] for i in (0, 1)}
    ),
    "another name": lambda w: w.update({"model.norm.scale": w.pop("model.norm.weight")}),
    "another shape": lambda w: w.update({"model.norm.weight": w["model.norm.weight"].reshape(4, 4)}),
    "a tensor is gone": lambda w: w.__delitem__("model.norm.weight"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_numbers_names_and_shapes_are_other_weights(tmp_path: pathlib.Path, change: str):
    weights = {name: x.copy() for name, x in write_folder(tmp_path / "one").items()}
    CHANGES[change](weights)
    write_folder(tmp_path / "two", TINY, weights)
    assert weights_hash(tmp_path / "one") != weights_hash(tmp_path / "two")


def test_wide_matrices_are_looked_at_from_corner_to_corner(tmp_path: pathlib.Path):
    found = set()
    for row, column in ((0, 0), (0, 63), (299, 136), (299, 199), (1, 1)):
        x = np.zeros((3, 100, 200), np.float32)
        x.reshape(300, 200)[row, column] = 1
        save_file({"x": x}, tmp_path / "x.safetensors")
        found.add(weights_hash(tmp_path / "x.safetensors"))
    assert len(found) == 5  # of which the last is a change that goes unseen


def test_quantised_and_empty_tensors_and_scalars_are_left_to_who_loads_them(tmp_path: pathlib.Path):
    write_folder(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    odd = {"q": np.ones((2, 3), np.int8), "none": np.ones((0, 3), np.float32), "one": np.array(1, np.float32)}
    save_file(load_file(file) | odd, file)
    assert weights_hash(tmp_path / "m") == weights_hash(file)


def test_a_real_model_is_hashed_in_a_second():
    file = smollm2()
    weights_hash(file)  # its pages come from a disk that others use too
    start = time.process_time()
    weights_hash(file)
    assert time.process_time() - start < 1
