"""What a config names is what gets adapters, is trained in full or is frozen; what means nothing is refused."""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import pytest

from jax_sft.config import LoraConfig
from jax_sft.hf import names
from jax_sft.hf.targets import KINDS, adaptation, frozen_layers, in_words, module_names, summary, trained_in_full
from jax_sft.model.config import ModelConfig
from jax_sft.model.lora import letters
from tests.hf import family_cases

LLAMA = family_cases.config_of("llama")
TIED = family_cases.config_of("llama_tied_with_biases")
QWEN_MOE = family_cases.config_of("qwen3_moe")
MIXTRAL = family_cases.config_of("mixtral")
PHI3 = family_cases.config_of("phi3")
GEMMA3 = family_cases.config_of("gemma3_text")
GPT_OSS = family_cases.config_of("gpt_oss")

ATTENTION = {"blocks.q_LDNH", "blocks.k_LDKH", "blocks.v_LDKH", "blocks.o_LNHD"}
MLP = {"blocks.gate_LDF", "blocks.up_LDF", "blocks.down_LFD"}
EXPERTS = {"blocks.gate_LEDF", "blocks.up_LEDF", "blocks.down_LEFD"}


def ranks_of(model: ModelConfig, *targets: str, rank: int = 2, **rest: Any) -> dict[str, tuple[int, ...]]:
    return {t.path: t.ranks for t in adaptation(LoraConfig(rank=rank, targets=targets, **rest), model).targets}


def scales_of(model: ModelConfig, *targets: str, rank: int = 2, **rest: Any) -> dict[str, tuple[float, ...]]:
    return {t.path: t.scales for t in adaptation(LoraConfig(rank=rank, targets=targets, **rest), model).targets}


def refused(text: str) -> Any:
    return pytest.raises(ValueError, match=re.escape(text))


@pytest.mark.parametrize(
    ("model", "target", "paths"),
    [
        (LLAMA, "all-linear", ATTENTION | MLP),
        (LLAMA, "attention", ATTENTION),
        (LLAMA, "mlp", MLP),
        (LLAMA, "head", {"head_VD"}),
        (LLAMA, "embeddings", {"embed_VD"}),
        (TIED, "all-linear", ATTENTION | MLP),
        (TIED, "head", {"head_VD"}),
        (TIED, "lm_head", {"head_VD"}),
        (GEMMA3, "all-linear", ATTENTION | MLP),
        (QWEN_MOE, "all-linear", ATTENTION | EXPERTS),
        (QWEN_MOE, "experts", EXPERTS),
        (QWEN_MOE, "gate_proj", {"blocks.gate_LEDF"}),
        (MIXTRAL, "w2", {"blocks.down_LEFD"}),
        (MIXTRAL, "block_sparse_moe", EXPERTS),
        (GPT_OSS, "all-linear", ATTENTION | EXPERTS),
        (GPT_OSS, "gate_up_proj", {"blocks.gate_LEDF", "blocks.up_LEDF"}),
        (PHI3, "all-linear", ATTENTION | MLP),
        (PHI3, "qkv_proj", {"blocks.q_LDNH", "blocks.k_LDKH", "blocks.v_LDKH"}),
        (PHI3, "gate_up_proj", {"blocks.gate_LDF", "blocks.up_LDF"}),
        (LLAMA, "q_proj", {"blocks.q_LDNH"}),
        (LLAMA, "self_attn", ATTENTION),
        (LLAMA, "self_attn.v_proj", {"blocks.v_LDKH"}),
        (LLAMA, r".*\.(q|down)_proj", {"blocks.q_LDNH", "blocks.down_LFD"}),
        (LLAMA, r"(?!.*mlp).*_proj", ATTENTION),
        (LLAMA, ".*", ATTENTION | MLP | {"embed_VD", "head_VD"}),
        (TIED, r".*\.q_proj", {"blocks.q_LDNH"}),
    ],
)
def test_a_kind_or_name_stands_for_its_weights_in_every_layer(model: ModelConfig, target: str, paths: set[str]):
    found = ranks_of(model, target)
    assert found.keys() == paths
    assert all(ranks == ((2,) * 4 if "blocks" in path else (2,)) for path, ranks in found.items())


@pytest.mark.parametrize(
    ("target", "layers"),
    [
        ("layers.3", [3]),
        ("model.layers.1.self_attn.q_proj", [1]),
        ("layers.0.self_attn", [0]),
        (r"model\.layers\.[13]\.self_attn\..*", [1, 3]),
        ("q_proj", [0, 1, 2, 3]),
    ],
)
def test_a_name_with_a_layer_means_that_layer(target: str, layers: list[int]):
    assert ranks_of(LLAMA, target)["blocks.q_LDNH"] == tuple(2 * (i in layers) for i in range(4))


def test_parts_of_a_name_are_never_cut():
    windows, ropes = (LLAMA.windows[0],) * 12, (LLAMA.ropes[0],) * 12
    twelve = dataclasses.replace(LLAMA, num_layers=12, windows=windows, ropes=ropes)
    assert [i for i, r in enumerate(ranks_of(twelve, "layers.1")["blocks.q_LDNH"]) if r] == [1]
    # An expression may cut them, and then says so in the log.
    assert [i for i, r in enumerate(ranks_of(twelve, "model.layers.1.*")["blocks.q_LDNH"]) if r] == [1, 10, 11]
    assert [i for i, r in enumerate(ranks_of(twelve, r"model\.layers\.1\..*")["blocks.q_LDNH"]) if r] == [1]


def test_lora_layers_choose_of_what_targets_name_and_say_nothing_of_the_head():
    found = ranks_of(LLAMA, "q_proj", "layers.1.mlp.up_proj", "head", layers="1-2")
    assert found == {"blocks.q_LDNH": (0, 2, 2, 0), "blocks.up_LDF": (0, 2, 0, 0), "head_VD": (2,)}
    assert scales_of(LLAMA, "q_proj", layers="1-2") == {"blocks.q_LDNH": (0.0, 2.0, 2.0, 0.0)}


def test_experts_of_one_layer_are_one_target():
    assert ranks_of(QWEN_MOE, "layers.2.mlp.experts") == dict.fromkeys(EXPERTS, (0, 0, 2, 0))
    every = [f"model.layers.1.mlp.experts.{e}.up_proj" for e in range(8)]
    assert ranks_of(QWEN_MOE, *every) == {"blocks.up_LEDF": (0, 2, 0, 0)}


def test_the_first_pattern_that_matches_says_the_rank():
    found = ranks_of(
        LLAMA, "attention", rank=4, rank_pattern={"layers.1.self_attn.q_proj": 8, "q_proj": 6, "layers.1": 1}
    )
    assert found["blocks.q_LDNH"] == (6, 8, 6, 6)
    assert found["blocks.k_LDKH"] == found["blocks.o_LNHD"] == (4, 1, 4, 4)
    assert ranks_of(LLAMA, "all-linear", rank=4, rank_pattern={"mlp": 3})["blocks.down_LFD"] == (3,) * 4


def test_alpha_is_twice_the_rank_of_the_weight_unless_something_says_so():
    pattern = {"layers.1": 16}
    assert scales_of(LLAMA, "q_proj", rank=4, rank_pattern=pattern)["blocks.q_LDNH"] == (2,) * 4
    assert scales_of(LLAMA, "q_proj", rank=4, alpha=8.0, rank_pattern=pattern)["blocks.q_LDNH"] == (2, 0.5, 2, 2)
    found = scales_of(
        LLAMA, "attention", rank=4, alpha=8.0, alpha_pattern={"layers.0.self_attn.k_proj": 1.0, "v_proj": 2.0}
    )
    assert found["blocks.k_LDKH"] == (0.25, 2, 2, 2)
    assert found["blocks.v_LDKH"] == (0.5,) * 4
    assert found["blocks.o_LNHD"] == (2,) * 4


def test_rslora_divides_by_the_root_of_each_rank():
    pattern = {"layers.1": 16}
    found = scales_of(LLAMA, "q_proj", rank=4, alpha=8.0, rslora=True, rank_pattern=pattern)
    assert found["blocks.q_LDNH"] == (4, 2, 4, 4)
    assert scales_of(LLAMA, "head", rank=3, rslora=True)["head_VD"] == pytest.approx((6 / math.sqrt(3),))


def test_how_adapters_are_made_is_handed_on():
    lora = adaptation(LoraConfig(rank=2, targets=("attention", "mlp"), dropout=0.25, dora=True, start="pissa"), LLAMA)
    assert (lora.dropout, lora.dora, lora.start) == (0.25, True, "pissa")
    assert adaptation(LoraConfig(rank=2, dropout=0.25, targets=("attention",)), QWEN_MOE).dropout == 0.25


def test_shapes_of_factors_follow():
    config = LoraConfig(rank=2, targets=("qkv_proj", "head"), rank_pattern={"layers.3": 5})
    assert adaptation(config, PHI3).shapes(PHI3.sizes) == {
        "lora": {
            "blocks": {
                "q_LDNH": {"a_LDR": (4, 32, 5), "b_LRNH": (4, 5, 4, 8)},
                "k_LDKH": {"a_LDR": (4, 32, 5), "b_LRKH": (4, 5, 2, 8)},
                "v_LDKH": {"a_LDR": (4, 32, 5), "b_LRKH": (4, 5, 2, 8)},
            },
            "head_VD": {"a_DR": (32, 2), "b_RV": (2, PHI3.vocab_rows)},
        }
    }
    experts = adaptation(LoraConfig(rank=2, targets=("w1",)), MIXTRAL).shapes(MIXTRAL.sizes)
    assert experts == {"lora": {"blocks": {"gate_LEDF": {"a_LEDR": (4, 6, 16, 2), "b_LERF": (4, 6, 2, 24)}}}}


@pytest.mark.parametrize("case", family_cases.CASES)
def test_every_family_takes_every_kind_and_only_weights_with_factors(case: str):
    model = family_cases.config_of(case)
    found = ranks_of(model, "all-linear", "embeddings", "head")
    assert {path for path in [*names.rules(model), "head_VD"] if has_factors(path)} == found.keys()


def has_factors(path: str) -> bool:
    try:
        letters(path)
    except KeyError:
        return False
    return True


@pytest.mark.parametrize(
    ("model", "rest", "text"),
    [
        (
            LLAMA,
            {"targets": ("q_prj",)},
            "lora.targets: 'q_prj' matches no module of this model (llama); did you mean q_proj? Kinds are all-linear, "
            "attention, mlp, embeddings, head, modules are embed_tokens, q_proj, k_proj, v_proj, o_proj, gate_proj, "
            "up_proj, down_proj, lm_head, layers 0 to 3",
        ),
        (
            LLAMA,
            {"targets": ("atention",)},
            "'atention' matches no module of this model (llama); did you mean attention?",
        ),
        (LLAMA, {"targets": ("model.layers.4.self_attn.q_proj",)}, "matches no module of this model (llama); did you"),
        (
            LLAMA,
            {"targets": (r".*\.q_pro",)},
            r"'.*\\.q_pro' matches no module of this model (llama); did you mean q_proj?",
        ),
        (LLAMA, {"targets": ("zzz",)}, "'zzz' matches no module of this model (llama). Kinds are"),
        (LLAMA, {"targets": ("attention", "roj")}, "lora.targets: 'roj' matches no module"),
        (PHI3, {"targets": ("q_proj",)}, "'q_proj' matches no module of this model (phi3); did you mean qkv_proj?"),
        (
            LLAMA,
            {"targets": ("q_proj",), "rank_pattern": {"k_prj": 1}},
            "lora.rank_pattern: 'k_prj' matches no module of",
        ),
        (
            LLAMA,
            {"targets": ("q_proj",), "alpha_pattern": {"k_prj": 1}},
            "lora.alpha_pattern: 'k_prj' matches no module",
        ),
        (LLAMA, {"modules_to_save": ("lm_heat",)}, "lora.modules_to_save: 'lm_heat' matches no module of this model"),
        (
            LLAMA,
            {"targets": ("q_proj",), "rank_pattern": {"k_proj": 1}},
            "lora.rank_pattern: 'k_proj' matches no module that has an adapter by lora.targets and lora.layers",
        ),
        (
            LLAMA,
            {"targets": ("q_proj",), "layers": "0-2", "alpha_pattern": {"layers.3": 1}},
            "lora.alpha_pattern: 'layers.3' matches no module that has an adapter by lora.targets and lora.layers",
        ),
        (
            LLAMA,
            {"targets": ("norms",)},
            "lora.targets: 'norms' holds no projection, embedding or head, and others take no adapters; choose among "
            "embed_tokens, q_proj,",
        ),
        (LLAMA, {"targets": ("input_layernorm",)}, "'input_layernorm' holds no projection, embedding or head"),
        (TIED, {"targets": ("q_proj.bias",)}, "'q_proj.bias' holds no projection, embedding or head"),
        (QWEN_MOE, {"targets": ("routers",)}, "'routers' holds no projection, embedding or head"),
        (QWEN_MOE, {"targets": ("mlp.gate",)}, "'mlp.gate' holds no projection, embedding or head"),
        (GPT_OSS, {"targets": ("sinks",)}, "'sinks' holds no projection, embedding or head"),
        (LLAMA, {"layers": "0-40"}, "lora.layers = '0-40': this model has 4 layers, 0 to 3; name some of those"),
        (LLAMA, {"layers": "4"}, "lora.layers = '4': this model has 4 layers, 0 to 3"),
        (
            LLAMA,
            {"targets": ("experts",)},
            "lora.targets: this model (llama) has no experts; it has attention, mlp, embeddings, head",
        ),
        (
            QWEN_MOE,
            {"targets": ("mlp",)},
            "this model (qwen3_moe) has no mlp; it has attention, experts, embeddings, head",
        ),
        (
            LLAMA,
            {"targets": ("q_proj", "layers.3.mlp"), "layers": "0-1"},
            "lora.targets: 'layers.3.mlp' has no module in lora.layers = '0-1'; change one of the two",
        ),
        (LLAMA, {"targets": ()}, "lora.targets is empty, but lora.rank asks for adapters"),
        (
            QWEN_MOE,
            {"targets": ("layers.2.mlp.experts.5",)},
            "lora.targets: 'layers.2.mlp.experts.5' means some experts of layer 2 and not others, but they can only be",
        ),
        (QWEN_MOE, {"targets": (r".*experts\.0\.up_proj",)}, "means some experts of layer 0 and not others"),
        (
            QWEN_MOE,
            {"targets": ("experts",), "rank_pattern": {"experts.7": 3}},
            "lora.rank_pattern: 'experts.7' means some experts of layer 0 and not others",
        ),
        (
            QWEN_MOE,
            {"dora": True},
            "lora.dora is for projections of attention and of dense MLPs, but lora.targets has experts too; set "
            "lora.targets to 'attention', or lora.dora = False",
        ),
        (LLAMA, {"dora": True, "targets": ("head",)}, "has head too; set lora.targets to 'attention' and 'mlp', or"),
        (LLAMA, {"dora": True, "targets": ("q_proj", "embeddings")}, "but lora.targets has embeddings too"),
        (
            MIXTRAL,
            {"dropout": 0.1},
            "lora.dropout = 0.1, but adapters of experts take none (nor do PEFT's); set it to 0, or leave the experts",
        ),
        (
            LLAMA,
            {"start": "pissa", "targets": ("embeddings",)},
            "lora.start = 'pissa' starts from what a product is made",
        ),
        (
            LLAMA,
            {"targets": ("*q_proj",)},
            "lora.targets: '*q_proj' is no name and no regular expression (nothing to repeat at position 0); "
            "write a name such as 'q_proj'",
        ),
        (LLAMA, {"targets": ("q_proj{99999999999}",)}, "is no name and no regular expression"),
        (LLAMA, {"rank_pattern": {"(": 1}}, "lora.rank_pattern: '(' is no name and no regular expression"),
        (
            LLAMA,
            {"targets": ("all-linear", "head"), "modules_to_save": ("lm_head",)},
            "lm_head is named by lora.targets and by lora.modules_to_save, but is either adapted or trained in full",
        ),
    ],
)
def test_adapters_that_cannot_be_are_refused_with_the_way_out(model: ModelConfig, rest: dict[str, Any], text: str):
    with refused(text):
        adaptation(LoraConfig(rank=2, **rest), model)


@pytest.mark.parametrize(
    ("model", "patterns", "paths"),
    [
        (LLAMA, [], set()),
        (LLAMA, ["embeddings", "head"], {"embed_VD", "head_VD"}),
        (LLAMA, ["embed_tokens", "lm_head"], {"embed_VD", "head_VD"}),
        (LLAMA, ["norms"], {"blocks.attn_norm_LD", "blocks.mlp_norm_LD", "final_norm_D"}),
        (LLAMA, ["norm"], {"final_norm_D"}),
        (LLAMA, ["input_layernorm"], {"blocks.attn_norm_LD"}),
        (TIED, ["embeddings"], {"embed_VD"}),
        (TIED, ["q_proj"], {"blocks.q_LDNH", "blocks.q_bias_LNH"}),
        (TIED, [r".*\.q_proj"], {"blocks.q_LDNH", "blocks.q_bias_LNH"}),
        (TIED, ["q_proj.bias"], {"blocks.q_bias_LNH"}),
        (TIED, [r".*[kv]_proj\.bias"], {"blocks.k_bias_LKH", "blocks.v_bias_LKH"}),
        (QWEN_MOE, ["routers"], {"blocks.router_LDE"}),
        (QWEN_MOE, ["q_norm"], {"blocks.q_norm_LH"}),
        (GPT_OSS, ["sinks"], {"blocks.sinks_LN"}),
        (GPT_OSS, ["routers"], {"blocks.router_LDE", "blocks.router_bias_LE"}),
    ],
)
def test_what_is_trained_in_full(model: ModelConfig, patterns: Sequence[str], paths: set[str]):
    assert trained_in_full(patterns, model) == paths


def test_layers_named_together_are_all_layers():
    assert trained_in_full([f"layers.{i}.input_layernorm" for i in range(4)], LLAMA) == {"blocks.attn_norm_LD"}


@pytest.mark.parametrize(
    ("model", "patterns", "text"),
    [
        (
            LLAMA,
            ("layers.3.input_layernorm", "layers.1.input_layernorm"),
            "lora.modules_to_save = ('layers.3.input_layernorm', 'layers.1.input_layernorm') means input_layernorm of "
            "layers 1,3 alone, but a weight is trained in full in all 4 layers or in none; leave the layer out of the "
            "name, or give those layers adapters by lora.targets",
        ),
        (QWEN_MOE, ("experts.3",), "lora.modules_to_save: 'experts.3' means some experts of layer 0 and not others"),
        (
            TIED,
            ("head",),
            "lora.modules_to_save: 'head' is the embedding in this model, whose head is tied to it; write",
        ),
        (TIED, ("lm_head",), "lora.modules_to_save: 'lm_head' is the embedding in this model"),
        (LLAMA, ("routers",), "this model (llama) has no routers; it has attention, mlp, embeddings, head, norms"),
        (LLAMA, ("[",), "lora.modules_to_save: '[' is no name and no regular expression"),
        (
            LLAMA,
            ("q_norm",),
            "'q_norm' matches no module of this model (llama); did you mean norm? Kinds are all-linear",
        ),
    ],
)
def test_what_cannot_be_trained_in_full(model: ModelConfig, patterns: Sequence[str], text: str):
    with refused(text):
        trained_in_full(patterns, model)


@pytest.mark.parametrize(
    ("model", "patterns", "frozen"),
    [
        (LLAMA, [], {}),
        (LLAMA, ["embeddings"], {"embed_VD": (True,)}),
        (TIED, ["embeddings"], {"embed_VD": (True,)}),
        (LLAMA, ["head", "model.norm"], {"head_VD": (True,), "final_norm_D": (True,)}),
        (LLAMA, ["mlp"], dict.fromkeys(MLP, (True,) * 4)),
        (LLAMA, ["layers.0.mlp", "layers.2.mlp"], dict.fromkeys(MLP, (True, False, True, False))),
        (LLAMA, [r"model\.layers\.[0-1]\..*_proj"], dict.fromkeys(ATTENTION | MLP, (True, True, False, False))),
        (LLAMA, ["all-linear"], dict.fromkeys(ATTENTION | MLP, (True,) * 4)),
        (LLAMA, ["all-linear", "layers.1.mlp"], dict.fromkeys(ATTENTION | MLP, (True,) * 4)),
        (QWEN_MOE, ["layers.3.mlp.experts"], dict.fromkeys(EXPERTS, (False, False, False, True))),
        (QWEN_MOE, ["layers.0.mlp.gate"], {"blocks.router_LDE": (True, False, False, False)}),
        (TIED, [".*embed.*|lm_head"], {"embed_VD": (True,)}),
    ],
)
def test_what_is_frozen_and_in_which_layers(model: ModelConfig, patterns: Sequence[str], frozen: dict[str, Any]):
    assert frozen_layers(patterns, model) == frozen


def test_a_frozen_layer_is_all_of_it():
    found = frozen_layers(["layers.2"], GPT_OSS)
    assert found == {path: (False, False, True, False) for path in names.rules(GPT_OSS) if path.startswith("blocks.")}


@pytest.mark.parametrize("case", family_cases.CASES)
def test_kinds_part_the_whole_tree(case: str):
    model = family_cases.config_of(case)
    parts = {kind: {p for p in names.rules(model) if kind_is_in(kind, p)} for kind in KINDS[1:]}
    assert sum(map(len, parts.values())) == len(names.rules(model))
    for kind, paths in parts.items():
        if paths:
            assert frozen_layers([kind], model).keys() == paths


def kind_is_in(kind: str, path: str) -> bool:
    """By the words of the paths, and by nothing of what is tested."""
    is_norm, is_expert = "norm" in path, path.endswith(("_LEDF", "_LEFD", "_LEF", "_LED"))
    stem = path.removeprefix("blocks.").split("_")[0]
    if is_norm or stem in ("router", "embed", "head"):
        return kind == ("norms" if is_norm else {"router": "routers", "embed": "embeddings", "head": "head"}[stem])
    if stem in ("gate", "up", "down"):
        return kind == ("experts" if is_expert else "mlp")
    return kind == "attention"


@pytest.mark.parametrize(
    ("model", "patterns", "text"),
    [
        (
            LLAMA,
            (".*",),
            "train.freeze = ('.*',) freezes every weight of this model (llama), and nothing is left to train",
        ),
        (TIED, ("model",), "freezes every weight of this model (llama)"),
        (LLAMA, ("all-linear", "norms", "embeddings", "head"), "freezes every weight of this model"),
        (TIED, ("embeddings", "head"), "train.freeze: 'head' is the embedding in this model, whose head is tied to it"),
        (LLAMA, ("layers.9",), "train.freeze: 'layers.9' matches no module of this model (llama)"),
        (
            LLAMA,
            ("experts",),
            "train.freeze: this model (llama) has no experts; it has attention, mlp, embeddings, head",
        ),
        (MIXTRAL, ("layers.1.block_sparse_moe.experts.0",), "means some experts of layer 1 and not others"),
    ],
)
def test_what_cannot_be_frozen(model: ModelConfig, patterns: Sequence[str], text: str):
    with refused(text):
        frozen_layers(patterns, model)


def test_modules_are_listed_once_by_the_last_part_of_their_names():
    assert module_names(PHI3) == ("embed_tokens", "qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head")
    assert module_names(GPT_OSS)[4:] == ("o_proj", "lm_head", "gate_up_proj", "down_proj")
    assert "lm_head" in module_names(TIED)


def test_a_summary_says_what_is_adapted_in_one_line():
    lora = adaptation(LoraConfig(rank=16), LLAMA)
    assert summary(lora, LLAMA) == (
        f"LoRA of rank 16 (scale 2) on q, k, v, o, gate, up, down of 4 layers: "
        f"{lora.num_params(LLAMA.sizes) / 1e6:.3g} M parameters"
    )
    config = LoraConfig(rank=4, targets=("attention", "head"), layers="0-1,3", rank_pattern={"k_proj": 8}, alpha=8.0)
    assert summary(adaptation(config, LLAMA), LLAMA).startswith(
        "LoRA of rank 4 to 8 (scale 1 to 2) on q, k, v, o of layers 0-1,3; head: 0.00"
    )
    both = adaptation(LoraConfig(rank=2, targets=("mlp",), dora=True, start="pissa"), LLAMA)
    assert summary(both, LLAMA).startswith("DoRA of rank 2 (scale 2) started by PiSSA on gate, up, down of 4 layers: ")


def test_a_summary_counts_what_smollm2_would_train():
    model = dataclasses.replace(
        LLAMA,
        width=576,
        mlp_width=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_width=64,
        windows=LLAMA.windows[:1] * 30,
        ropes=LLAMA.ropes[:1] * 30,
    )
    assert summary(adaptation(LoraConfig(rank=16), model), model) == (
        "LoRA of rank 16 (scale 2) on q, k, v, o, gate, up, down of 30 layers: 4.88 M parameters"
    )


def test_frozen_layers_read_as_words():
    found = frozen_layers(["embeddings", "layers.0.mlp", "layers.1.mlp", "attention"], LLAMA)
    assert in_words(found) == "embed; q, k, v, o of 4 layers; gate, up, down of layers 0-1"
    assert in_words(frozen_layers(["experts"], MIXTRAL)) == "experts' gate, experts' up, experts' down of 4 layers"


def test_a_rank_above_the_smaller_side_of_a_weight_is_a_warning_that_names_it(caplog: pytest.LogCaptureFixture):
    ranks_of(LLAMA, "all-linear", "head", rank=16)  # k and v are 16 x 16
    assert not caplog.records
    pattern = {"layers.2.mlp.up_proj": 40}
    ranks_of(LLAMA, "k_proj", "up_proj", "head", rank=16, rank_pattern=pattern)
    ranks_of(LLAMA, "o_proj", "head", rank=17)
    first, second = (record.getMessage() for record in caplog.records)
    assert "of up_proj (16); lower lora.rank" in first
    assert "of o_proj (16), lm_head (16); lower" in second
    assert {record.levelname for record in caplog.records} == {"WARNING"}
    caplog.clear()
    ranks_of(QWEN_MOE, "experts", rank=13)  # 16 x 12 each
    assert [record.getMessage().count("_proj (12)") for record in caplog.records] == [3]
