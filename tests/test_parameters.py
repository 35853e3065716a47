"""Which weights of a run are trained and which frozen, in what they are held, and what they start as."""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from jax_sft.config import MeshConfig, default, from_config_dict
from jax_sft.data.template import with_defaults
from jax_sft.hf.load import load_configured
from jax_sft.model.quantize import Int8, Nf4, Quantized
from jax_sft.parameters import Parameters, joined, load_base, parameters
from jax_sft.sharding import make_mesh
from jax_sft.train_loop import train
from tests.tiny import run_config

KERNELS = {
    *("blocks.q_LDNH", "blocks.k_LDKH", "blocks.v_LDKH", "blocks.o_LNHD"),
    *("blocks.gate_LDF", "blocks.up_LDF", "blocks.down_LFD"),
}
NORMS = {"blocks.attn_norm_LD", "blocks.mlp_norm_LD", "final_norm_D"}
BASE = KERNELS | NORMS | {"embed_VD"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The tiny model, whose head is tied, and its data."""
    place = tmp_path_factory.mktemp("parameters")
    run_config(place)
    return place


def of(folder: pathlib.Path, *overrides: str) -> tuple[Parameters, dict[str, Any], dict[str, Any]]:
    """The plan, and trained and frozen leaves by their paths."""
    config = run_config(folder, *overrides)
    base = load_configured(config.model, seed=config.seed)
    plan = parameters(config, base)
    trees = plan.load(base, make_mesh(MeshConfig()), seed=config.seed)
    flat: list[dict[str, Any]] = [dict(traverse_util.flatten_dict(tree, sep=".")) for tree in trees]
    return plan, flat[0], flat[1]


@pytest.mark.parametrize(
    ("overrides", "in_full", "adapted"),
    [
        ([], BASE, set()),
        (["train.freeze=('embeddings',)"], BASE - {"embed_VD"}, set()),
        (["train.freeze=('norms','layers.0')"], BASE - NORMS, set()),
        (["lora.rank=2", "lora.targets=('attention','head')"], set(), {p for p in KERNELS if p[7] in "qkvo"}),
        (["lora.rank=2", "lora.modules_to_save=('embeddings',)"], {"embed_VD"}, KERNELS),
        (["lora.rank=2", "lora.modules_to_save=('norms',)", "lora.base=nf4"], NORMS, KERNELS),
        (
            ["lora.rank=2", "lora.targets=('q_proj',)", "lora.modules_to_save=('o_proj',)"],
            {"blocks.o_LNHD"},
            {"blocks.q_LDNH"},
        ),
    ],
)
def test_what_is_trained_and_what_is_frozen(folder, overrides: list[str], in_full: set[str], adapted: set[str]):
    plan, trained, frozen = of(folder, *overrides)
    assert {path for path in trained if not path.startswith("lora.")} == in_full == plan.in_full
    assert set(frozen) == BASE - in_full
    found = {path.removeprefix("lora.").rsplit(".", 1)[0] for path in trained if path.startswith("lora.")}
    assert found - {"head_VD"} == adapted
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(trained))
    shapes: dict[str, Any] = dict(traverse_util.flatten_dict(plan.abstract_trained, sep="."))
    assert {path: (x.shape, x.dtype) for path, x in trained.items()} == {
        p: (x.shape, x.dtype) for p, x in shapes.items()
    }
    counted = sum(x.size for x in trained.values())
    counted -= (trained["embed_VD"].shape[0] - 264) * 32 if "embed_VD" in trained else 0  # rows of padding
    if "layers.0" in str(overrides):
        assert plan.frozen_layers["blocks.q_LDNH"] == (True, False)
        counted -= sum(trained[path].size // 2 for path in KERNELS)
    assert plan.num_trained == counted


@pytest.mark.parametrize(
    ("base", "kernels", "others"),
    [
        ("float32", jnp.float32, jnp.float32),
        ("bfloat16", jnp.bfloat16, jnp.bfloat16),
        ("int8", Int8, jnp.bfloat16),
        ("nf4", Nf4, jnp.bfloat16),
    ],
)
def test_how_the_frozen_base_is_held(folder, base: str, kernels: Any, others: Any):
    said = ["lora.rank=2", "lora.targets=('q_proj',)", "lora.modules_to_save=('o_proj',)"]
    plan, trained, frozen = of(folder, *said, f"lora.base={base}")
    for path, x in frozen.items():
        if path in KERNELS:
            assert isinstance(x, kernels) if isinstance(x, Quantized) else x.dtype == kernels, path
        else:
            assert x.dtype == others, path
    assert trained["blocks.o_LNHD"].dtype == jnp.float32  # what is trained is whole, whatever the base is held in
    exact = of(folder, "train.freeze=('norms',)")[1]
    np.testing.assert_array_equal(trained["blocks.o_LNHD"], exact["blocks.o_LNHD"])
    source = load_configured(run_config(folder).model, seed=0)
    again = traverse_util.flatten_dict(plan.load_frozen(source, make_mesh(MeshConfig())), sep=".")
    jax.tree.map(np.testing.assert_array_equal, again, frozen)  # as a resume does


def test_the_template_of_a_run_carries_its_arguments(folder):
    config = default()
    config.update(run_config(folder).to_dict())
    plain = load_base(from_config_dict(config))
    config.data.template_args = {"enable_thinking": False}
    base = load_base(from_config_dict(config))
    assert plain.chat_template is not None
    assert base.chat_template == with_defaults(plain.chat_template, {"enable_thinking": False}) != plain.chat_template


def test_fresh_adapters_hang_on_the_seed_alone(folder):
    short = ["lora.rank=2", "lora.targets=('q_proj',)"]
    one, same, other = (of(folder, *short, said)[1] for said in ("seed=0", "lora.base=float32", "seed=1"))
    name = "lora.blocks.q_LDNH.a_LDR"
    np.testing.assert_array_equal(one[name], same[name])
    assert np.abs(one[name] - other[name]).max() > 0.01
    assert not np.asarray(one["lora.blocks.q_LDNH.b_LRNH"]).any()


def test_joined_trees_keep_every_leaf_and_the_last_has_the_say():
    assert joined({"a": {"x": 1}, "b": 2}, {"a": {"y": 3}}, {"b": 4}) == {"a": {"x": 1, "y": 3}, "b": 4}


@pytest.mark.parametrize("more", [[], ["lora.dora=true", "lora.modules_to_save=('norms',)"]], ids=["lora", "dora"])
def test_going_on_from_an_adapter_starts_where_its_run_ended(folder, tmp_path, more):
    short = ["train.steps=2", "evaluate.every_steps=2", "lora.base=float32", "mesh.data=8", "mesh.fsdp=1"]
    first = train(run_config(folder, "lora.rank=3", "lora.alpha=5.0", *more, *short), tmp_path / "1", command="test")
    assert first.finished and first.after is not None and first.before is not None
    assert first.after.loss < first.before.loss
    going_on = run_config(folder, f"lora.adapter={first.export}", *short, "seed=7")
    plan, trained, _ = of(folder, f"lora.adapter={first.export}")
    assert plan.lora is not None and plan.lora.targets[0].scales == (5 / 3, 5 / 3)
    second = train(going_on, tmp_path / "2", command="test")
    assert second.finished and second.before is not None and second.after is not None
    assert second.before.loss == first.after.loss
    assert second.after.loss < second.before.loss
    assert ("blocks.attn_norm_LD" in trained) == bool(more)
    said = [json.loads((tmp_path / n / "export" / "adapter_config.json").read_text()) for n in "12"]
    assert said[0] == said[1]
