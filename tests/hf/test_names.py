"""The table: every reshape and slice between a file and our tree follows from letters."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from jax_sft.hf import names
from jax_sft.model.decoder import abstract_params
from tests.hf import family_cases

CONFIGS = {case: family_cases.config_of(case) for case in family_cases.CASES}
# Every row of every table once; N H is not D, and no two widths are equal where that can be.
SIZES = {"L": 2, "D": 5, "F": 7, "N": 4, "K": 2, "H": 3, "V": 11, "E": 6}
ROWS = {rule.row for config in CONFIGS.values() for rule in names.rules(config).values()}
RULES = [names.Rule(row, SIZES) for row in sorted(ROWS, key=lambda row: (row.path, row.hf))]


def named(rule: names.Rule) -> str:
    return f"{rule.path}={rule.hf}"


@pytest.mark.parametrize("rule", RULES, ids=named)
def test_to_file_and_back_is_the_same(rule: names.Rule):
    x = np.arange(np.prod(rule.layer_shape), dtype=np.float32).reshape(rule.layer_shape)
    there = rule.to_file(x)
    assert there.shape[1:] == tuple(n // turns for n, turns in zip(rule.file_shape, rule.turns, strict=True))[1:]
    assert there.flags.c_contiguous
    np.testing.assert_array_equal(rule.from_file(there, rule.layer_shape), x)


@pytest.mark.parametrize("rule", RULES, ids=named)
def test_any_part_of_ours_is_one_part_of_the_files(rule: names.Rule):
    shape = rule.layer_shape
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    inner = {letter for group in rule.groups for letter in group[1:]}
    choices = [
        [slice(None)] if letter in inner else [slice(None), slice(1, 2), slice(0, size // 2), slice(size // 2, None)]
        for letter, size in zip(rule.letters, shape, strict=True)
    ]
    # Two model types may call one tensor by other letters; those are the same part of it.
    others = [r for r in RULES if (r.hf, r.row.parts) == (rule.hf, rule.row.parts) and r.row.part != rule.row.part]
    whole = names.file_tensor([(r, np.full(r.layer_shape, -1, np.float32)) for r in others] + [(rule, x)])
    assert whole.shape == rule.file_shape
    for slices in itertools.product(*choices):
        part = x[slices]
        np.testing.assert_array_equal(rule.from_file(whole[rule.file_slices(slices)], part.shape), part)


def test_a_projection_is_laid_out_as_torch_does_it():
    # y = x @ W.T in torch, with rows of W in the order (head, width)
    rule = next(r for r in RULES if r.path == "blocks.q_LDNH" and not r.row.parts)
    w_DNH = np.arange(60, dtype=np.float32).reshape(5, 4, 3)
    x_D = np.array([1, -2, 3, 0.5, 2], np.float32)
    np.testing.assert_allclose(rule.to_file(w_DNH) @ x_D, np.einsum("D,DNH->NH", x_D, w_DNH).reshape(-1))


def test_gate_and_up_take_turns_where_the_file_says_so():
    gate, up = (next(r for r in RULES if r.path == f"blocks.{name}_LEDF" and 2 in r.turns) for name in ("gate", "up"))
    x_EDF = np.arange(6 * 5 * 7).reshape(6, 5, 7)
    whole = names.file_tensor([(gate, x_EDF), (up, -x_EDF)])
    np.testing.assert_array_equal(whole[..., ::2], x_EDF)
    np.testing.assert_array_equal(whole[..., 1::2], -x_EDF)
    assert gate.file_slices((slice(2, 3), slice(1, 5), slice(3, 7))) == (
        slice(2, 3, 1),
        slice(1, 5, 1),
        slice(6, 14, 2),
    )


def test_an_axis_inside_another_cannot_be_cut():
    rule = next(r for r in RULES if r.path == "blocks.q_LDNH" and not r.row.parts)
    with pytest.raises(ValueError, match="axis H is inside an axis of .*q_proj"):
        rule.file_slices((slice(None), slice(None), slice(0, 1)))


@pytest.mark.parametrize("case", CONFIGS)
def test_the_table_knows_every_parameter_of_the_model(case: str):
    found = names.rules(CONFIGS[case])
    assert len(found) == len(jax.tree.leaves(abstract_params(CONFIGS[case])))


def test_a_parameter_without_a_row_in_the_table_is_named():
    config = dataclasses.replace(CONFIGS["starcoder2"], model_type="llama")
    with pytest.raises(KeyError, match=r"no row for blocks\.attn_norm_bias_LD"):
        names.rules(config)


def test_what_was_put_at_a_path_lies_there_and_nothing_beyond_it():
    tree: dict = {}
    names.put(tree, "blocks.q_LDNH.a_LDR", 1)
    names.put(tree, "blocks.q_LDNH.b_LRNH", 2)
    assert names.get(tree, "blocks.q_LDNH") == {"a_LDR": 1, "b_LRNH": 2}
    assert names.get(tree, "blocks.q_LDNH.b_LRNH") == 2
    assert [names.get(tree, path) for path in ("embed_VD", "blocks.k_LDKH.a", "blocks.q_LDNH.a_LDR.x")] == [None] * 3


def test_folded_names_keep_every_layer():
    layers = [f"model.layers.{i}.b.c" for i in (0, 2, 3, 7)]
    found = names.folded(["model.layers.5.up", "a.norm.weight", *layers])
    assert found == ["model.layers.5.up", "a.norm.weight", "model.layers.{0,2-3,7}.b.c"]


def test_folded_names_draw_experts_together_and_then_the_layers_that_have_the_same_ones():
    wanted = [f"model.layers.{i}.experts.{e}.w1.weight" for i in range(3) for e in range(4)]
    assert names.folded(wanted) == ["model.layers.{0-2}.experts.{0-3}.w1.weight"]
    assert names.folded([*wanted[:5], *wanted[6:8]]) == [
        "model.layers.0.experts.{0-3}.w1.weight",
        "model.layers.1.experts.{0,2-3}.w1.weight",
    ]
