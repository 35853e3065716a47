"""Rows of new tokens start as the config says, whatever the table is cut into."""

import math
import pathlib

import jax
import numpy as np
import pytest

from jax_sft.config import MeshConfig, ModelSource, NewRowsStart
from jax_sft.hf.load import load_configured, load_model
from jax_sft.sharding import make_mesh
from tests.hf.models import TINY, tensors, tiny_tokenizer, write_folder

KNOWN = len(tiny_tokenizer())  # of the 320 rows of the files; the rest was never learned
TABLES = {"embed_VD": "model.embed_tokens.weight", "head_VD": "lm_head.weight"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("rows") / "m"
    write_folder(folder)
    return folder


def tables(folder, start: NewRowsStart, *, end: int = 328, seed: int = 0, sizes=(1, 1, 1)):
    """Embedding and head with new tokens for every id from the first without a token up to `end`."""
    mesh = make_mesh(MeshConfig(data=sizes[0], fsdp=sizes[1], tensor=sizes[2]), jax.devices()[: math.prod(sizes)])
    new = [f"<|new_{i}|>" for i in range(end - KNOWN)]
    params = load_model(folder, mesh=mesh, new_tokens=new, new_rows=start, seed=seed).params
    return {name: np.asarray(params[name]) for name in TABLES}


@pytest.mark.parametrize("start", ["mean", "zeros", "sample"])
def test_new_rows_are_the_same_bit_for_bit_on_every_mesh_and_old_ones_stay(folder, start: NewRowsStart, monkeypatch):
    monkeypatch.setattr("jax_sft.hf.new_rows._BYTES", 8 * 16 * 100)  # the old rows are read in four blocks
    alone, weights = tables(folder, start), tensors(TINY)
    for sizes in [(1, 2, 4), (1, 8, 1), (2, 1, 4)]:
        spread = tables(folder, start, sizes=sizes)
        for name, stored in TABLES.items():
            assert alone[name].shape == (328, 16)
            np.testing.assert_array_equal(spread[name], alone[name])
            np.testing.assert_array_equal(alone[name][:KNOWN], weights[stored][:KNOWN])


def test_zeros_are_zeros_in_both_tables(folder):
    assert all((table[KNOWN:] == 0).all() for table in tables(folder, "zeros").values())


def test_samples_have_the_mean_and_the_deviation_of_the_old_rows_by_column(tmp_path):
    weights = tensors(TINY)
    scale, shift = np.linspace(0.5, 2, 16, dtype=np.float32), np.linspace(-3, 3, 16, dtype=np.float32)
    for stored in TABLES.values():
        weights[stored] = weights[stored] * scale + shift
        weights[stored][KNOWN:] = 99  # nothing was learned there, so it counts for nothing
    write_folder(tmp_path / "m", TINY, weights)
    found = tables(tmp_path / "m", "sample", end=1900)
    for name, stored in TABLES.items():
        old, new = weights[stored][:KNOWN], found[name][KNOWN:]
        assert np.abs(new.mean(0) - old.mean(0)).max() < 4 * old.std(0).max() / math.sqrt(len(new))
        np.testing.assert_allclose(new.std(0), old.std(0), rtol=0.1)


def test_a_sample_follows_from_the_seed_the_table_and_the_id_alone(folder):
    one, other, more = (tables(folder, "sample", seed=seed, end=end) for seed, end in [(0, 328), (1, 328), (0, 336)])
    for name in TABLES:
        new = one[name][KNOWN:]
        assert len({row.tobytes() for row in new}) == len(new)
        assert not np.isclose(new, other[name][KNOWN:]).all(1).any()
        np.testing.assert_array_equal(new, more[name][KNOWN:328])
    deviations = {name: (t[KNOWN:] - t[:KNOWN].mean(0)) / t[:KNOWN].std(0) for name, t in one.items()}
    assert not np.isclose(deviations["embed_VD"], deviations["head_VD"], rtol=1e-3).all(1).any()


def test_a_run_s_config_says_how_and_its_seed_what(folder):
    source = ModelSource(path=str(folder), new_tokens=("<|new|>",), new_rows="sample")
    base = load_configured(source, seed=7)
    assert (base.new_rows, base.seed, base.new_ids) == ("sample", 7, (KNOWN,))


def test_an_ordinary_piece_of_the_vocabulary_is_no_new_control_token(folder):
    piece = next(token for token, i in tiny_tokenizer().get_vocab().items() if i > 270)
    with pytest.raises(
        ValueError, match=r"is an ordinary piece of the vocabulary already, and would be no control token"
    ):
        load_model(folder, new_tokens=[piece, "<|new|>"])
    assert load_model(folder, new_tokens=["<|im_end|>"]).new_ids == ()  # is one already
