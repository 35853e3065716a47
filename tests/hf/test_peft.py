import dataclasses
import json
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from jax_sft.config import MeshConfig
from jax_sft.hf import names
from jax_sft.hf.adapter_config import is_named
from jax_sft.hf.adapter_names import sites
from jax_sft.hf.load import load_pretrained
from jax_sft.hf.peft import Adapter, check_base, read_adapter
from jax_sft.hf.stored import weights_hash
from jax_sft.model.config import ModelConfig
from jax_sft.model.lora import Target
from jax_sft.sharding import make_mesh
from tests.hf.conftest import TwoProcesses
from tests.hf.family_cases import config_of, params_of, tokens_of
from tests.hf.models import write_folder
from tests.hf.peft_cases import CASES, GOLDEN, base_config, our_logits, peft_logits, random_adapter, save_peft, write

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LLAMA = config_of("llama")


def on(path: str, *ranks: int, scale: float = 1.5) -> Target:
    return Target(path=path, ranks=ranks, scales=tuple(scale if rank else 0.0 for rank in ranks))


def assert_close(ours: np.ndarray, theirs: np.ndarray) -> None:
    """No logit is off by more than 1e-4 of the largest."""
    assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()


def assert_same(first: Adapter, second: Adapter) -> None:
    assert first.lora == second.lora
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)


def with_embedding(adapter: Adapter) -> dict[str, Any]:
    """What is trained, and an embedding trained in full."""
    return adapter.params | {"embed_VD": np.resize(np.array([1, -0.0, 2], np.float32), (LLAMA.vocab_rows, LLAMA.width))}


def spread(params: Any) -> Any:
    """Arrays cut over eight devices along an axis that eight divides."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))

    def put(x: np.ndarray) -> jax.Array:
        cut = next((i for i in reversed(range(x.ndim)) if x.shape[i] % 8 == 0), None)
        sharding = NamedSharding(mesh, PartitionSpec(*["fsdp" if i == cut else None for i in range(x.ndim)]))
        return jax.make_array_from_callback(x.shape, sharding, lambda at: x[at])

    return jax.tree.map(put, params)


@pytest.fixture
def golden(tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of the recorded adapter, to be spoilt."""
    return pathlib.Path(shutil.copytree(GOLDEN, tmp_path / "golden"))


def say(folder: pathlib.Path, **said: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | said))


def change(folder: pathlib.Path, **tensors: np.ndarray | None) -> None:
    """Tensors of the first layer's q_proj or of the model, by the end of their names; None: taken away."""
    held = load_file(folder / FILE)
    for end, x in tensors.items():
        name = f"base_model.model.model.layers.0.self_attn.q_proj.{end}.weight"
        held.pop(name, None)
        held |= {} if x is None else {name: x}
    save_file(held, folder / FILE)


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_of_peft_gives_the_same_logits_and_comes_back_as_the_same_file(case: str, tmp_path: pathlib.Path):
    pytest.importorskip("peft")
    theirs = save_peft(case, tmp_path / "theirs")
    config, base = base_config(case), CASES[case][0]
    adapter = read_adapter(tmp_path / "theirs", config)
    assert_close(our_logits(config, adapter, tokens_of(config)), theirs)
    write(tmp_path / "ours", base, adapter)
    assert (tmp_path / "ours" / FILE).read_bytes() == (tmp_path / "theirs" / FILE).read_bytes()
    np.testing.assert_array_equal(peft_logits(base, tmp_path / "ours"), theirs)


def test_a_recorded_adapter_of_peft_gives_the_recorded_logits_and_comes_back_as_the_same_file(tmp_path: pathlib.Path):
    adapter = read_adapter(GOLDEN, LLAMA)
    assert_close(our_logits(LLAMA, adapter, tokens_of(LLAMA)), np.load(GOLDEN / "logits.npz")["logits"])
    write(tmp_path / "ours", "llama", adapter)
    assert (tmp_path / "ours" / FILE).read_bytes() == (GOLDEN / FILE).read_bytes()


# Ranks and scales that differ in every way in which ours may.
OURS: dict[str, tuple[str, list[Target], dict[str, Any]]] = {
    "ranks": ("llama", [on("blocks.q_LDNH", 4, 0, 2, 4), on("blocks.o_LNHD", 0, 3, 0, 0, scale=0.7)], {}),
    "dora": ("qwen3", [on("blocks.q_LDNH", 4, 0, 2, 4), on("blocks.up_LDF", 3, 3, 3, 3)], {"dora": True}),
    "pissa": ("llama", [on("blocks.v_LDKH", 4, 1, 4, 4), on("blocks.down_LFD", 3, 3, 3, 3)], {"start": "pissa"}),
    "pissa of embedding and head": ("gemma", [on("embed_VD", 4), on("head_VD", 3)], {"start": "pissa"}),
    "dora from pissa": ("llama", [on("blocks.v_LDKH", 4, 4, 4, 4)], {"dora": True, "start": "pissa"}),
    "a part of what is fused": ("phi3", [on("blocks.k_LDKH", 4, 4, 4, 4)], {}),
    "fused, each with an A": ("phi3", [on(f"blocks.{x}", 3, 3, 3, 3) for x in ("q_LDNH", "k_LDKH", "v_LDKH")], {}),
    "fused, ranks and scales differ": (
        "phi3",
        [
            on("blocks.q_LDNH", 4, 4, 2, 0),
            on("blocks.v_LDKH", 2, 2, 0, 3, scale=0.3),
            on("blocks.gate_LDF", 3, 0, 2, 1),
            on("blocks.up_LDF", 3, 1, 1, 0, scale=2.5),
        ],
        {},
    ),
    "fused dora": ("glm", [on("blocks.gate_LDF", 3, 3, 3, 3), on("blocks.up_LDF", 2, 2, 2, 2)], {"dora": True}),
    "experts": (
        "mixtral",
        [on(f"blocks.{x}", 3, 3, 3, 3) for x in ("q_LDNH", "gate_LEDF", "up_LEDF", "down_LEFD")],
        {},
    ),
    "some experts, ranks and scales differ": (
        "mixtral",
        [
            *(on(f"blocks.{x}", 4, 4, 4, 4) for x in ("q_LDNH", "k_LDKH", "v_LDKH", "o_LNHD")),
            on("blocks.gate_LEDF", 3, 0, 2, 3),
            on("blocks.down_LEFD", 2, 2, 0, 2, scale=0.4),
        ],
        {},
    ),
    "gates of experts": ("olmoe", [on("blocks.gate_LEDF", 3, 3, 3, 3)], {}),
    "downs of experts": ("olmoe", [on("blocks.down_LEFD", 3, 3, 3, 3)], {}),
    "experts of Qwen": (
        "qwen3_moe",
        [on(f"blocks.{x}", 3, 3, 3, 3) for x in ("gate_LEDF", "up_LEDF", "down_LEFD")],
        {},
    ),
    "a tied embedding in full": ("gemma3_text", [on("blocks.q_LDNH", 4, 4, 4, 4)], {"embed_VD": None}),
    "a tied embedding in full and an adapted head": (
        "llama_tied_with_biases",
        [on("blocks.q_LDNH", 4, 4, 4, 4), on("head_VD", 3)],
        {"embed_VD": None},
    ),
    "an embedding in full": ("llama", [on("blocks.q_LDNH", 4, 4, 4, 4)], {"embed_VD": None}),
}


def ours(case: str) -> tuple[str, ModelConfig, Adapter]:
    base, targets, said = OURS[case]
    config = config_of(base)
    full = {name: 1.5 * params_of(config)[name][::-1] for name, x in said.items() if x is None}
    return base, config, random_adapter(config, *targets, **said | full)


@pytest.mark.parametrize("rslora", [False, True], ids=["", "rslora"])
@pytest.mark.parametrize("case", OURS)
def test_peft_gives_an_adapter_of_ours_the_logits_that_it_has_here(case: str, rslora: bool, tmp_path: pathlib.Path):
    pytest.importorskip("peft")
    base, config, adapter = ours(case)
    write(tmp_path / "a", base, adapter, rslora=rslora)
    mine = our_logits(config, adapter, tokens_of(config))
    assert_close(peft_logits(base, tmp_path / "a"), mine)


@pytest.mark.parametrize("case", OURS)
def test_an_adapter_of_ours_is_read_back_with_the_logits_that_it_had(case: str, tmp_path: pathlib.Path):
    base, config, adapter = ours(case)
    write(tmp_path / "a", base, adapter)
    again = read_adapter(tmp_path / "a", config)
    assert set(again.params) == set(adapter.params)
    assert_close(our_logits(config, again, tokens_of(config)), our_logits(config, adapter, tokens_of(config)))
    write(tmp_path / "b", base, again)
    assert (tmp_path / "a" / FILE).read_bytes() == (tmp_path / "b" / FILE).read_bytes()


def test_what_fills_up_and_what_pads_the_vocabulary_is_not_written(tmp_path: pathlib.Path):
    config = config_of("gemma")
    targets = [on("blocks.q_LDNH", 4, 0, 2, 4), on("embed_VD", 4), on("head_VD", 3)]
    adapter = random_adapter(config, *targets, embed_VD=params_of(config)["embed_VD"])
    write(tmp_path / "a", "gemma", adapter)
    padded = dataclasses.replace(config, vocab_rows=48)
    more = read_adapter(tmp_path / "a", padded)
    assert more.params["lora"]["embed_VD"]["a_VR"].shape == (48, 4)
    assert more.params["lora"]["head_VD"]["b_RV"].shape == (3, 48)
    tokens_BT = tokens_of(config)
    assert_close(our_logits(padded, more, tokens_BT), our_logits(config, adapter, tokens_BT))
    write(tmp_path / "b", "gemma", more, config=padded)
    assert (tmp_path / "a" / FILE).read_bytes() == (tmp_path / "b" / FILE).read_bytes()
    shapes = {name: x.shape for name, x in load_file(tmp_path / "b" / FILE).items()}
    q = "base_model.model.model.layers.{}.self_attn.q_proj.lora_A.weight"
    assert (shapes[q.format(0)], shapes[q.format(2)]) == ((4, 16), (2, 16))
    assert q.format(1) not in shapes


def test_an_adapter_that_lies_over_devices_is_written_with_the_same_bytes(tmp_path: pathlib.Path):
    adapter = read_adapter(GOLDEN, LLAMA)
    params = with_embedding(adapter)
    write(tmp_path / "host", "llama", adapter, params=params)
    write(tmp_path / "devices", "llama", adapter, params=spread(params))
    assert (tmp_path / "host" / FILE).read_bytes() == (tmp_path / "devices" / FILE).read_bytes()


def test_a_bfloat16_adapter_comes_back_as_the_same_file(tmp_path: pathlib.Path):
    write(tmp_path / "half", "llama", read_adapter(GOLDEN, LLAMA), dtype="bfloat16")
    adapter = read_adapter(tmp_path / "half", LLAMA)
    assert adapter.dtype == "bfloat16"
    assert adapter.params["lora"]["blocks"]["q_LDNH"]["a_LDR"].dtype == np.float32
    write(tmp_path / "again", "llama", adapter)
    assert (tmp_path / "again" / FILE).read_bytes() == (tmp_path / "half" / FILE).read_bytes()
    assert (tmp_path / "half" / FILE).stat().st_size < 0.7 * (GOLDEN / FILE).stat().st_size


def test_tensors_lie_in_the_order_of_the_safetensors_library(tmp_path: pathlib.Path):
    layers = 11  # the tenth comes before the second
    config = dataclasses.replace(
        LLAMA, num_layers=layers, windows=LLAMA.windows[:1] * layers, ropes=LLAMA.ropes[:1] * layers
    )
    adapter = random_adapter(
        config, on("blocks.q_LDNH", *[2] * layers), on("head_VD", 2), final_norm_D=np.ones(16, "f4")
    )
    write(tmp_path / "a", "llama", adapter, config=config)
    save_file(load_file(tmp_path / "a" / FILE), tmp_path / "library", metadata={"format": "pt"})
    assert (tmp_path / "a" / FILE).read_bytes() == (tmp_path / "library").read_bytes()


def test_the_config_names_what_is_adapted_in_as_few_words_as_peft_understands(tmp_path: pathlib.Path):
    def said(*targets: Target, **more: Any) -> dict[str, Any]:
        write(tmp_path / "a", "llama", random_adapter(LLAMA, *targets), **more)
        return json.loads((tmp_path / "a" / CONFIG).read_text())

    q, v = "model.layers.{}.self_attn.q_proj", "model.layers.{}.self_attn.v_proj"
    plain = said(on("blocks.q_LDNH", 4, 4, 4, 4), on("blocks.v_LDKH", 2, 2, 2, 2))
    assert plain["target_modules"] == ["q_proj", "v_proj"]
    assert (plain["r"], plain["lora_alpha"], plain["layers_to_transform"]) == (4, 6, None)
    assert (plain["rank_pattern"], plain["alpha_pattern"]) == ({"v_proj": 2}, {"v_proj": 3})
    assert (plain["base_model_name_or_path"], plain["task_type"]) == ("somebody/tiny", "CAUSAL_LM")
    some = said(on("blocks.q_LDNH", 4, 0, 4, 4), on("blocks.v_LDKH", 4, 0, 2, 4))
    assert (some["target_modules"], some["layers_to_transform"]) == (["q_proj", "v_proj"], [0, 2, 3])
    assert (some["rank_pattern"], some["alpha_pattern"]) == ({v.format(2): 2}, {v.format(2): 3})
    mixed = said(on("blocks.q_LDNH", 4, 0, 0, 0), on("blocks.v_LDKH", 0, 4, 0, 0))
    assert (mixed["target_modules"], mixed["layers_to_transform"]) == ([q.format(0), v.format(1)], None)
    root = said(on("blocks.q_LDNH", 4, 4, 4, 4), rslora=True)
    assert (root["use_rslora"], root["lora_alpha"]) == (True, 3)
    assert read_adapter(tmp_path / "a", LLAMA).lora.targets[0].scales == (1.5,) * 4


def test_what_an_imported_config_says_beyond_the_adapter_stays(tmp_path: pathlib.Path):
    adapter = read_adapter(GOLDEN, LLAMA)
    write(
        tmp_path / "a", "llama", adapter, source_config=adapter.config | {"revision": "0ab1", "eva_config": {"rho": 2}}
    )
    said = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert (said["revision"], said["eva_config"]) == ("0ab1", {"rho": 2})
    assert said["rank_pattern"] == adapter.config["rank_pattern"]
    assert said["peft_version"] == adapter.config["peft_version"]


def test_an_adapters_folder_holds_tokenizer_template_stop_ids_and_a_card(tmp_path: pathlib.Path):
    write(tmp_path / "a", "llama", read_adapter(GOLDEN, LLAMA))
    held = {p.name for p in (tmp_path / "a").iterdir()}
    assert {CONFIG, FILE, "tokenizer.json", "chat_template.jinja", "README.md", "jax_sft.json"} <= held
    assert json.loads((tmp_path / "a" / "generation_config.json").read_text())["eos_token_id"] == [2]
    card = (tmp_path / "a" / "README.md").read_text()
    assert "library_name: peft" in card and "base_model: somebody/tiny" in card and "| steps | 3 |" in card
    files = set(json.loads((tmp_path / "a" / "jax_sft.json").read_text())["files"])
    assert files == {*held, "CERTIFICATE.json"}  # which comes later
    write(tmp_path / "a", "llama", read_adapter(GOLDEN, LLAMA))  # an earlier export is replaced


@pytest.mark.parametrize(
    ("said", "fault"),
    [
        ({"peft_type": "LOHA"}, "peft_type = 'LOHA' is not modelled; only LORA is"),
        ({"bias": "all"}, "bias = 'all' is not modelled; merge"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out = True is not modelled"),
        ({"lora_bias": True}, "lora_bias = True is not modelled"),
        ({"alora_invocation_tokens": [1]}, r"alora_invocation_tokens = \[1\] is not modelled"),
        ({"use_qalora": True, "layer_replication": [[0, 2]]}, r"layer_replication = .*, use_qalora = True is not"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "target_parameters = .* is not modelled; merge"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices = .* is not modelled"),
        ({"brand_new": {"x": 1}}, "brand_new = .* is not modelled"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights = 'pissa_niter_4' means that the base's weights"),
        ({"r": 0}, "r = 0 is no value that PEFT writes"),
        ({"lora_alpha": None, "lora_dropout": 1.0}, "lora_alpha = None, lora_dropout = 1.0 is no value"),
        ({"rank_pattern": {"(": 2}}, r"rank_pattern = \{'\(': 2\} is no value"),
        ({"alpha_pattern": {"q_proj": "2"}}, "alpha_pattern = .* is no value"),
        ({"use_dora": True}, r"layers.\{0-3\}.self_attn.q_proj.lora_magnitude: has shape None, expected \(32,\)"),
    ],
)
def test_what_a_config_says_and_is_not_followed_is_refused(golden: pathlib.Path, said: dict[str, Any], fault: str):
    say(golden, **said)
    with pytest.raises(ValueError, match=fault):
        read_adapter(golden, LLAMA)


def test_an_adapter_that_is_not_there_is_named(golden: pathlib.Path):
    with pytest.raises(ValueError, match="no such folder; name one"):
        read_adapter(golden / "nowhere", LLAMA)
    (golden / FILE).rename(golden / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"only as adapter_model.bin, a pickle.*save_pretrained it again"):
        read_adapter(golden, LLAMA)
    (golden / "adapter_model.bin").unlink()
    with pytest.raises(ValueError, match="has no adapter_model.safetensors; copy"):
        read_adapter(golden, LLAMA)
    (golden / CONFIG).write_text("[]")
    with pytest.raises(ValueError, match=r"cannot be read \(it is no JSON object\); copy"):
        read_adapter(golden, LLAMA)
    (golden / CONFIG).unlink()
    with pytest.raises(ValueError, match="has no adapter_config.json, so it is no adapter"):
        read_adapter(golden, LLAMA)


def test_damage_is_named(golden: pathlib.Path):
    whole = (golden / FILE).read_bytes()
    (golden / FILE).write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="damaged or cut short"):
        read_adapter(golden, LLAMA)
    (golden / FILE).write_bytes(whole)
    change(golden, lora_B=None)
    with pytest.raises(ValueError, match=r"model.layers.0.self_attn.q_proj.lora_B missing; copy"):
        read_adapter(golden, LLAMA)
    (golden / FILE).write_bytes(whole)
    change(golden, lora_A=None)
    with pytest.raises(ValueError, match=r"model.layers.0.self_attn.q_proj.lora_A missing; copy"):
        read_adapter(golden, LLAMA)
    (golden / FILE).write_bytes(whole)
    change(golden, lora_A=np.full((4, 16), np.nan, np.float32))
    with pytest.raises(ValueError, match=r"q_proj.lora_a holds values that are not finite"):
        read_adapter(golden, LLAMA)
    change(golden, lora_A=np.ones((4, 16), np.int8))
    with pytest.raises(ValueError, match="q_proj.lora_A.weight: not plain numbers"):
        read_adapter(golden, LLAMA)
    save_file({}, golden / FILE)
    with pytest.raises(ValueError, match="holds no tensors"):
        read_adapter(golden, LLAMA)


def test_an_adapter_of_another_model_is_refused_with_all_that_does_not_fit(golden: pathlib.Path):
    say(golden, base_model_name_or_path="somebody/else")
    other = dataclasses.replace(
        LLAMA, num_layers=2, windows=LLAMA.windows[:2], ropes=LLAMA.ropes[:2], mlp_width=40, num_heads=2
    )
    with pytest.raises(ValueError, match=r"it was made for somebody/else, so name that one with --model:\n") as error:
        read_adapter(golden, other)
    lines = str(error.value).splitlines()[1:]
    assert "  model.layers.{2-3}.self_attn.q_proj.lora_A is not in this model" in lines
    assert "  model.layers.{0-1}.mlp.down_proj.lora_a: has shape (4, 24), expected (4, 40)" in lines
    assert "  model.layers.0.self_attn.q_proj.lora_b: has shape (32, 4), expected (16, 4)" in lines


def test_tensors_that_have_no_place_are_refused(golden: pathlib.Path):
    held = load_file(golden / FILE)
    start = "base_model.model.model.layers.0."
    norm = {f"{start}input_layernorm.lora_A.weight": np.ones((4, 16), "f4")}
    norm |= {f"{start}input_layernorm.lora_B.weight": np.ones((16, 4), "f4")}
    save_file(held | norm, golden / FILE)
    with pytest.raises(ValueError, match=r"layers.0.input_layernorm: can have no adapter here"):
        read_adapter(golden, LLAMA)
    save_file(held | {f"{start}input_layernorm.weight": np.ones(16, "f4")}, golden / FILE)
    with pytest.raises(ValueError, match=r"trained in full in some layers and not in model.layers.\{1-3\}.input_layer"):
        read_adapter(golden, LLAMA)
    save_file(held | {"base_model.model.lm_head.weight": np.ones((9, 16), "f4")}, golden / FILE)
    with pytest.raises(ValueError, match=r"lm_head.weight: has shape \(9, 16\), expected \(31, 16\)"):
        read_adapter(golden, LLAMA)


def test_a_rank_that_config_and_tensors_disagree_on_is_no_fault_of_the_model(golden: pathlib.Path):
    pattern = json.loads((golden / CONFIG).read_text())["rank_pattern"]
    say(golden, r=8, rank_pattern=pattern | {"v_proj": 3})
    with pytest.raises(ValueError, match=r"config and tensors disagree on the rank, .*; copy both .*\n") as error:
        read_adapter(golden, LLAMA)
    assert "--model" not in str(error.value)
    lines = str(error.value).splitlines()[1:]
    assert f"  model.layers.{{0,2-3}}.self_attn.q_proj: rank 8 in {CONFIG}, 4 in {FILE}" in lines
    assert f"  model.layers.{{0-3}}.self_attn.v_proj: rank 3 in {CONFIG}, 1 in {FILE}" in lines


def test_dora_without_alpha_is_refused(tmp_path: pathlib.Path):
    q, v = on("blocks.q_LDNH", 4, 4, 4, 4), on("blocks.v_LDKH", 4, 4, 4, 4)
    write(tmp_path / "a", "llama", random_adapter(LLAMA, q, v, dora=True))
    say(tmp_path / "a", alpha_pattern={"v_proj": 0})
    with pytest.raises(ValueError, match=r"use_dora leaves only the magnitudes of model.layers.\{0-3\}.self_attn.v_pr"):
        read_adapter(tmp_path / "a", LLAMA)


def test_an_embedding_and_a_head_that_differ_are_refused_where_the_base_ties_them(golden: pathlib.Path):
    held = load_file(golden / FILE)
    tied = dataclasses.replace(LLAMA, tied_head=True)
    table = np.ones((31, 16), np.float32)
    embed, head = "base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"
    say(golden, modules_to_save=["lm_head"])
    for tables in ({head: table}, {embed: table}, {head: table, embed: 2 * table}):
        save_file(held | tables, golden / FILE)
        with pytest.raises(ValueError, match="an embedding and a head that differ, which its base ties"):
            read_adapter(golden, tied)
    save_file(held | {head: table, embed: table}, golden / FILE)
    np.testing.assert_array_equal(read_adapter(golden, tied).params["embed_VD"], table)
    # As PEFT has it of a head with an adapter: what it is beside, which training moves with the embedding here alone.
    say(golden, modules_to_save=["embed_tokens"])
    beside = {head.replace("weight", "base_layer.weight"): table}
    save_file(held | {embed: 2 * table} | beside, golden / FILE)
    with pytest.raises(ValueError, match="an embedding and a head that differ, which its base ties"):
        read_adapter(golden, tied)
    save_file(held | {embed: table} | beside, golden / FILE)
    again = read_adapter(golden, tied)
    np.testing.assert_array_equal(again.params["embed_VD"], table)
    assert not again.base_params


def test_an_adapter_that_lacks_a_module_or_all_of_them_is_refused(golden: pathlib.Path):
    held = load_file(golden / FILE)
    save_file({k: x for k, x in held.items() if ".layers.1." not in k}, golden / FILE)
    with pytest.raises(ValueError, match=r"names model\.layers\.1\.self_attn\.q_proj, .*lacks their tensors; copy"):
        read_adapter(golden, LLAMA)
    say(golden, layers_to_transform=[0, 2, 3])
    assert [t.ranks[1] for t in read_adapter(golden, LLAMA).lora.targets] == [0] * 7
    save_file({"base_model.model.model.norm.weight": np.ones(16, "f4")}, golden / FILE)
    with pytest.raises(ValueError, match="holds no tensors of an adapter"):
        read_adapter(golden, LLAMA)


@pytest.mark.parametrize(
    "said",
    [
        {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": 1},
        {"target_modules": ["q_proj"], "modules_to_save": ["self_attn"]},
        {"target_modules": ["model.layers.2.self_attn.q_proj", "v_proj"], "layers_to_transform": [0, 3]},
        {"target_modules": r"model\.layers\.[02]\.mlp\..*_proj"},
        {"target_modules": ["down_proj"], "layers_to_transform": []},
    ],
)
def test_modules_are_named_as_peft_names_them(said: dict[str, Any]):
    peft = pytest.importorskip("peft")
    from peft.tuners.tuners_utils import check_target_module_exists

    config = peft.LoraConfig(**said)
    modules = [name for site in sites(LLAMA) for name in site.modules.values()]
    assert [is_named(said, m) for m in modules] == [bool(check_target_module_exists(config, m)) for m in modules]


def test_dora_of_a_head_is_refused(golden: pathlib.Path):
    head = {"lora_A.weight": (4, 16), "lora_B.weight": (31, 4), "lora_magnitude_vector": (31,)}
    save_file({f"base_model.model.lm_head.{k}": np.ones(shape, "f4") for k, shape in head.items()}, golden / FILE)
    say(golden, use_dora=True, target_modules=["lm_head"])
    with pytest.raises(ValueError, match="lm_head: DoRA of embedding, head and experts is not modelled"):
        read_adapter(golden, LLAMA)


@pytest.mark.parametrize(
    ("base", "targets", "full", "said", "fault"),
    [
        ("gpt_oss", ["blocks.gate_LEDF"], [], {}, "no adapter form .* blocks.gate_LEDF .*export the merged model"),
        ("phi3", ["blocks.q_LDNH"], [], {"dora": True}, "DoRA of only a part of model.layers.0.self_attn.qkv_proj"),
        ("starcoder2", ["blocks.q_LDNH"], ["final_norm_D"], {}, "model.norm as a whole, and final_norm_bias_D in it"),
        ("gpt_oss", ["blocks.q_LDNH"], ["blocks.sinks_LN"], {}, "blocks.sinks_LN is no module of its own"),
        ("mixtral", ["blocks.q_LDNH"], ["blocks.up_LEDF"], {}, "blocks.up_LEDF trained in full has no form in PEFT"),
        ("mixtral", ["blocks.up_LEDF"], [], {"dora": True}, "DoRA of embedding, .* and blocks.up_LEDF has it"),
        ("llama", [], ["final_norm_D"], {}, "there is no adapter to write"),
    ],
)
def test_what_peft_has_no_form_for_is_refused(
    base: str, targets: list[str], full: list[str], said: dict[str, Any], fault: str, tmp_path: pathlib.Path
):
    config = config_of(base)
    adapter = random_adapter(config, *[on(path, 2, 2, 2, 2) for path in targets], **said)
    for path in full:
        names.put(adapter.params, path, names.get(params_of(config), path))
    with pytest.raises(ValueError, match=fault):
        write(tmp_path / "a", base, adapter)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("said", "fault"),
    [
        ({"dtype": "int8"}, "export.dtype = 'int8' is not one of"),
        ({"stop_ids": ()}, "stop ids: there is none"),
        ({"dtype": "float16"}, "q_proj.lora_B.weight holds values that are not finite in float16"),
    ],
)
def test_an_export_that_cannot_be_leaves_nothing_behind(tmp_path: pathlib.Path, said: dict[str, Any], fault: str):
    adapter = read_adapter(GOLDEN, LLAMA)
    adapter.params["lora"]["blocks"]["q_LDNH"]["b_LRNH"][1] = 1e6
    with pytest.raises(ValueError, match=fault):
        write(tmp_path / "a", "llama", adapter, **said)
    assert not list(tmp_path.iterdir())


def test_an_adapter_of_ours_is_held_to_the_weights_it_was_trained_on(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
):
    write_folder(tmp_path / "one")
    write_folder(tmp_path / "two", weights={k: 2 * v for k, v in load_file(tmp_path / "one/model.safetensors").items()})
    write(tmp_path / "a", "llama", read_adapter(GOLDEN, LLAMA), source=tmp_path / "one", base_name="somebody/one")
    check_base(tmp_path / "a", load_pretrained(tmp_path / "one"))
    first, second = (weights_hash(tmp_path / name)[:8] for name in ("one", "two"))
    fault = rf"trained on somebody/one \(weights {first}\), and the model is \S+two \({second}\); take somebody/one, "
    fault += "in files of any kind that hold the same numbers, or remove jax_sft.json from"
    with pytest.raises(ValueError, match=fault):
        check_base(tmp_path / "a", load_pretrained(tmp_path / "two"))
    (tmp_path / "a" / "jax_sft.json").write_text("{")
    with pytest.raises(ValueError, match=r"jax_sft.json: cannot be read"):
        check_base(tmp_path / "a", load_pretrained(tmp_path / "one"))
    (tmp_path / "a" / "jax_sft.json").unlink()  # the way out for whoever knows better
    check_base(tmp_path / "a", load_pretrained(tmp_path / "two"))
    assert "was made for somebody/one, and the model is" in caplog.text


def test_an_adapter_of_peft_is_held_to_the_name_of_its_base_with_a_warning(
    golden: pathlib.Path, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
):
    write_folder(tmp_path / "SmolLM2")
    base = load_pretrained(tmp_path / "SmolLM2")
    say(golden, base_model_name_or_path="hub/SMOLLM2")
    check_base(golden, base)
    snapshot = tmp_path / "models--hub--smollm2" / "snapshots" / "0ab1"
    check_base(golden, dataclasses.replace(base, path=snapshot))
    assert not caplog.records
    say(golden, base_model_name_or_path="hub/SmolLM3")
    check_base(golden, base)
    assert "was made for hub/SmolLM3, and the model is" in caplog.text


TWO_PROCESSES = """
import pathlib, sys
import jax
rank, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=rank)
from tests.hf.test_peft import GOLDEN, LLAMA, read_adapter, spread, with_embedding, write
adapter = read_adapter(GOLDEN, LLAMA)
params = spread(with_embedding(adapter))
assert not params["embed_VD"].is_fully_addressable
write(pathlib.Path(folder + "/out"), "llama", adapter, params=params)
params["embed_VD"] *= float("nan")
try:
    write(pathlib.Path(folder + "/nan"), "llama", adapter, params=params)
except ValueError as error:
    print("NAN", error)
"""


def test_two_processes_write_the_adapter_that_one_does(tmp_path: pathlib.Path, two_processes: TwoProcesses):
    said = two_processes(TWO_PROCESSES, tmp_path, 4)
    assert all("NAN export: base_model.model.model.embed_tokens.weight holds values" in out for out in said)
    adapter = read_adapter(GOLDEN, LLAMA)
    write(tmp_path / "alone", "llama", adapter, params=with_embedding(adapter))
    assert (tmp_path / "out" / FILE).read_bytes() == (tmp_path / "alone" / FILE).read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"out", "alone"}
