"""The table: every reshape and slice between a file and our tree follows from letters."""

import itertools

import jax
import numpy as np
import pytest

from jax_sft.hf import names
from jax_sft.model.config import ModelConfig
from jax_sft.model.decoder import abstract_params
from tests.hf.models import TINY

SIZES = {"L": 2, "D": 4, "F": 5, "N": 4, "K": 2, "H": 3, "V": 7}
BIASED = TINY | {"attention_bias": True, "mlp_bias": True}


def shape_of(rule: names.Rule) -> tuple[int, ...]:
    return tuple(SIZES[letter] for letter in ("L" if rule.stacked else "") + rule.letters)


@pytest.mark.parametrize("rule", names.TABLE, ids=lambda rule: rule.path)
def test_to_file_and_back_is_the_same(rule: names.Rule):
    shape = rule.layer_shape(shape_of(rule))
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    there = rule.to_file(x)
    assert there.shape == rule.file_shape(shape)
    assert there.flags.c_contiguous
    np.testing.assert_array_equal(rule.from_file(there, shape), x)


@pytest.mark.parametrize("rule", names.TABLE, ids=lambda rule: rule.path)
def test_any_part_of_ours_is_one_part_of_the_files(rule: names.Rule):
    shape = rule.layer_shape(shape_of(rule))
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    inner = {letter for group in rule.groups for letter in group[1:]}
    choices = [
        [slice(None)] if letter in inner else [slice(None), slice(1, 2), slice(0, size // 2), slice(size // 2, None)]
        for letter, size in zip(rule.letters, shape, strict=True)
    ]
    for slices in itertools.product(*choices):
        part = x[slices]
        read = rule.to_file(x)[rule.file_slices(slices, shape)]
        np.testing.assert_array_equal(rule.from_file(read, part.shape), part)


def test_a_projection_is_laid_out_as_torch_does_it():
    # y = x @ W.T in torch, with rows of W in the order (head, width)
    rule = next(r for r in names.TABLE if r.path == "blocks.q_LDNH")
    w_DNH = np.arange(24, dtype=np.float32).reshape(4, 2, 3)
    x_D = np.array([1, -2, 3, 0.5], np.float32)
    np.testing.assert_allclose(rule.to_file(w_DNH) @ x_D, np.einsum("D,DNH->NH", x_D, w_DNH).reshape(-1))


def test_an_axis_inside_another_cannot_be_cut():
    rule = next(r for r in names.TABLE if r.path == "blocks.q_LDNH")
    with pytest.raises(ValueError, match="axis H is inside an axis of .*q_proj"):
        rule.file_slices((slice(None), slice(None), slice(0, 1)), (4, 4, 3))


@pytest.mark.parametrize("config", [TINY, BIASED, TINY | {"tie_word_embeddings": True}])
def test_the_table_knows_every_parameter_of_the_model(config: dict):
    abstract = abstract_params(ModelConfig.from_hf(config))
    rules = [rule for rule, _ in names.leaves(abstract)]
    assert len(rules) == len(jax.tree.leaves(abstract))


def test_a_parameter_without_a_row_in_the_table_is_named():
    with pytest.raises(KeyError, match="no row for blocks.gate_norm_LD"):
        list(names.leaves({"embed_VD": 0, "blocks": {"gate_norm_LD": 0}}))


def test_folded_names_keep_every_layer():
    layers = [f"model.layers.{i}.b.c" for i in (0, 2, 3, 7)]
    found = names.folded(["model.layers.5.up", "a.norm.weight", *layers])
    assert found == ["model.layers.5.up", "a.norm.weight", "model.layers.{0,2-3,7}.b.c"]
