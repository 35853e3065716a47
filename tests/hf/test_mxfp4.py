"""Files in MXFP4 are read as the numbers that transformers makes of them, and written as plain ones."""

import json
import pathlib
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jax_sft.hf import mxfp4, names, tensorfile
from jax_sft.hf.load import load_model
from jax_sft.model.families import read_model_config
from tests.hf.family_cases import hf_config, params_of, state_dict_of
from tests.hf.models import tiny_tokenizer
from tests.hf.test_save import out_over_a_mesh

QUANTISED = ("gate_up_proj", "down_proj")


def packed(E: int, F: int, D: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Blocks and scales of a matrix [E, D, F]."""
    random = np.random.RandomState(seed)
    blocks = random.randint(0, 256, (E, F, D // 32, 16)).astype(np.uint8)
    return {"x_blocks": blocks, "x_scales": random.randint(115, 130, blocks.shape[:-1]).astype(np.uint8)}


def stored(folder: pathlib.Path, tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    save_file(tensors, folder / "model.safetensors")
    return mxfp4.joined(tensorfile.read_header(folder / "model.safetensors"))


def by_hand(x_blocks: np.ndarray, x_scales: np.ndarray) -> np.ndarray:
    E, F, blocks = x_scales.shape
    out = np.zeros((E, blocks * 32, F))
    for e, d, f in np.ndindex(*out.shape):
        byte = int(x_blocks[e, f, d // 32, d % 32 // 2])
        bits = byte >> 4 if d % 2 else byte & 15
        size = [0, 0.5, 1, 1.5, 2, 3, 4, 6][bits & 7]
        out[e, d, f] = (-size if bits & 8 else size) * 2.0 ** (int(x_scales[e, f, d // 32]) - 127)
    return out


def test_numbers_are_those_of_the_format(tmp_path: pathlib.Path):
    tensors = packed(2, 4, 64)
    tensor = stored(tmp_path, tensors)["x"]
    assert (tensor.shape, tensor.dtype) == ((2, 64, 4), "MXFP4")
    np.testing.assert_array_equal(tensor.read((slice(None),) * 3), by_hand(**tensors))


def test_numbers_are_those_of_transformers(tmp_path: pathlib.Path):
    torch = pytest.importorskip("torch")
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    tensors = packed(3, 32, 96)
    tensors["x_blocks"][0, :16, 0] = np.arange(256).reshape(16, 16)  # every byte
    tensors["x_scales"][1] = np.arange(96).reshape(32, 3) + 60  # many scales
    wanted = convert_moe_packed_tensors(torch.from_numpy(tensors["x_blocks"]), torch.from_numpy(tensors["x_scales"]))
    got = stored(tmp_path, tensors)["x"].read((slice(None),) * 3)
    np.testing.assert_array_equal(got, wanted.float().numpy())
    # As bfloat16 they are the same: nothing is rounded.
    np.testing.assert_array_equal(got.astype(ml_dtypes.bfloat16).astype(np.float32), got)


def test_any_part_is_that_part_of_the_whole(tmp_path: pathlib.Path):
    tensor = stored(tmp_path, packed(3, 6, 96))["x"]
    whole = tensor.read((slice(None),) * 3)
    for of_D in (slice(0, 96), slice(5, 6), slice(31, 33), slice(40, 96), slice(64, 64), slice(7, 90, 2)):
        for of_E, of_F in ((slice(1, 2), slice(1, 6, 2)), (slice(0, 3), slice(2, 4))):
            np.testing.assert_array_equal(tensor.read((of_E, of_D, of_F)), whole[of_E, of_D, of_F])


def test_blocks_without_scales_that_fit_stay_what_they_are(tmp_path: pathlib.Path):
    tensors = packed(2, 4, 64)
    for odd in (
        {"x_blocks": tensors["x_blocks"]},
        tensors | {"x_scales": tensors["x_scales"][:1]},
        tensors | {"x_scales": tensors["x_scales"].astype(np.float32)},
    ):
        assert set(stored(tmp_path, odd)) == set(odd)


def write_quantised(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """A folder like those that gpt-oss was released in; returns its tensors as plain numbers."""
    hf = hf_config("gpt_oss") | {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 320}
    config = read_model_config(hf)
    state = {name: x.astype(ml_dtypes.bfloat16) for name, x in state_dict_of(config, params_of(config)).items()}
    on_disk = dict(state)
    for seed, name in enumerate(name for name in state if name.endswith(QUANTISED)):
        E, D, F = state[name].shape
        pair = packed(E, F, D, seed)
        del on_disk[name]
        on_disk |= {f"{name}_blocks": pair["x_blocks"], f"{name}_scales": pair["x_scales"]}
        state[name] = by_hand(**pair).astype(ml_dtypes.bfloat16)
    folder.mkdir()
    said = hf | {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}}
    (folder / "config.json").write_text(json.dumps(said))
    tiny_tokenizer().save_pretrained(folder)
    save_file(on_disk, folder / "model.safetensors")
    return state


@pytest.mark.parametrize("sizes", [(1, 1, 1), (4, 1, 2), (2, 2, 2)])  # fsdp cuts into half blocks
def test_a_quantised_model_is_exported_in_plain_numbers(sizes, tmp_path: pathlib.Path):
    state = write_quantised(tmp_path / "in")
    base, out = out_over_a_mesh(tmp_path / "in", tmp_path / "out", sizes, dtype="bfloat16")
    assert out.keys() == state.keys()
    for name, wanted in state.items():
        np.testing.assert_array_equal(out[name].astype(np.float32), wanted.astype(np.float32), err_msg=name)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert load_model(tmp_path / "out").config == base.config


def test_quantised_tensors_that_config_json_says_nothing_of_are_named(tmp_path: pathlib.Path):
    write_quantised(tmp_path / "in")
    path = tmp_path / "in" / "config.json"
    said = json.loads(path.read_text())
    del said["quantization_config"]
    path.write_text(json.dumps(said))
    with pytest.raises(ValueError, match="the weights do not fit config.json") as error:
        load_model(tmp_path / "in")
    assert "missing: model.layers.{0-1}.mlp.experts.gate_up_proj" in str(error.value)
    assert "not plain numbers: model.layers.{0-1}.mlp.experts.down_proj_blocks is U8" in str(error.value)


def test_all_experts_of_a_layer_are_dequantised_one_at_a_time(tmp_path: pathlib.Path, monkeypatch):
    write_quantised(tmp_path / "in")
    read, held = mxfp4.Mxfp4Tensor.read, []

    def noted(self: mxfp4.Mxfp4Tensor, index: tuple[slice, ...]) -> np.ndarray:
        held.append(read(self, index).shape[0])
        return read(self, index)

    monkeypatch.setattr(mxfp4.Mxfp4Tensor, "read", noted)
    base = load_model(tmp_path / "in")
    experts = [rule for rule in names.rules(base.config).values() if rule.hf.endswith(QUANTISED)]
    assert held == [1] * len(experts) * 2 * 6  # layers and experts
