"""The config.json of published models, with all the words that they say, is read; their parameters are counted."""

import copy
from typing import Any

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from jax_sft.model.config import YarnRope
from jax_sft.model.families import FAMILIES, read_model_config
from jax_sft.model.spellings import with_both_spellings


def sizes(shape: str, **more: Any) -> dict[str, Any]:
    """Vocabulary, D, F, L, N, K, in that order."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return dict(zip((*names, "num_key_value_heads"), map(int, shape.split()), strict=True)) | more


def longrope(kind: str, pairs: int) -> dict[str, Any]:
    factors = {f"{which}_factor": [by + i / 8 for i in range(pairs)] for which, by in (("short", 1.0), ("long", 2.0))}
    return {"type": kind, **factors}


LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}
LLAMA = {"model_type": "llama", "hidden_act": "silu", "pretraining_tp": 1, "rms_norm_eps": 1e-5, "rope_scaling": None}
LLAMA |= {"tie_word_embeddings": False}
LLAMA31 = LLAMA | {"rope_theta": 5e5, "attention_bias": False, "mlp_bias": False, "max_position_embeddings": 131072}
LLAMA32 = LLAMA31 | {"tie_word_embeddings": True, "rope_scaling": LLAMA3 | {"factor": 32.0}}
MISTRAL = {"model_type": "mistral", "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 1e6}
MISTRAL |= {"sliding_window": None, "tie_word_embeddings": False, "max_position_embeddings": 32768}
MIXTRAL = {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.02}
QWEN2 = {"model_type": "qwen2", "hidden_act": "silu", "max_window_layers": 28, "rms_norm_eps": 1e-6, "rope_theta": 1e6}
QWEN2 |= {"sliding_window": 131072, "use_sliding_window": False, "tie_word_embeddings": False}
QWEN3 = QWEN2 | {"model_type": "qwen3", "attention_bias": False, "head_dim": 128, "sliding_window": None}
QWEN3_MOE = QWEN3 | {"model_type": "qwen3_moe", "decoder_sparse_step": 1, "mlp_only_layers": [], "num_experts": 128}
QWEN3_MOE |= {"num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True}
QWEN3_MOE |= {"output_router_logits": False, "router_aux_loss_coef": 0.001}
QWEN3_CODER = {"qkv_bias": False, "use_qk_norm": True, "shared_expert_intermediate_size": 0}
GEMMA = {"model_type": "gemma", "attention_bias": False, "head_dim": 256, "hidden_act": "gelu", "rms_norm_eps": 1e-6}
GEMMA |= {"rope_theta": 1e4}
TANH = "gelu_pytorch_tanh"
GEMMA2 = GEMMA | {"model_type": "gemma2", "hidden_act": TANH, "hidden_activation": TANH, "sliding_window": 4096}
GEMMA2 |= {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 256}
GEMMA2 |= {"cache_implementation": "hybrid"}
GEMMA3 = {"model_type": "gemma3_text", "head_dim": 256, "hidden_activation": TANH, "query_pre_attn_scalar": 256}
GEMMA3 |= {"rope_local_base_freq": 10000, "rope_theta": 1000000, "rope_scaling": None, "sliding_window": 512}
GEMMA3 |= {"attn_logit_softcapping": None, "final_logit_softcapping": None, "cache_implementation": "hybrid"}
PHI3 = {"model_type": "phi3", "attention_bias": False, "hidden_act": "silu", "resid_pdrop": 0.0, "embd_pdrop": 0.0}
PHI3 |= {"original_max_position_embeddings": 4096, "max_position_embeddings": 4096, "rope_scaling": None}
PHI3 |= {"auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "tie_word_embeddings": False}
PHI3_LONG = PHI3 | {"max_position_embeddings": 131072, "sliding_window": 262144}
PHI4_MINI = PHI3_LONG | {"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False}
PHI4_MINI |= {"partial_rotary_factor": 0.75, "rope_scaling": longrope("longrope", 48), "tie_word_embeddings": True}
OLMO2 = {"model_type": "olmo2", "attention_bias": False, "hidden_act": "silu", "rope_theta": 500000}
OLMO2 |= {"tie_word_embeddings": False}
OLMO3 = OLMO2 | {"model_type": "olmo3", "sliding_window": 4096, "max_position_embeddings": 65536}
OLMO3 |= {"layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 8}
OLMO3_YARN = {"attention_factor": 1.2079441541679836, "beta_fast": 32, "beta_slow": 1, "factor": 8.0}
OLMO3_YARN |= {"original_max_position_embeddings": 8192, "rope_type": "yarn"}
OLMOE = {"model_type": "olmoe", "clip_qkv": None, "norm_topk_prob": False, "num_experts": 64, "num_experts_per_tok": 8}
OLMOE |= {"hidden_act": "silu", "router_aux_loss_coef": 0.01, "output_router_logits": False}
GRANITE = {"model_type": "granite", "attention_bias": False, "attention_dropout": 0.1, "mlp_bias": False}
GRANITE |= {"attention_multiplier": 0.015625, "embedding_multiplier": 12.0, "residual_multiplier": 0.22}
GRANITE |= {"hidden_act": "silu", "logits_scaling": 8.0, "rope_theta": 5000000.0, "tie_word_embeddings": True}
SMOLLM3 = {"model_type": "smollm3", "layer_types": ["full_attention"] * 36, "max_window_layers": 28, "mlp_bias": False}
SMOLLM3 |= {"no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9, "pretraining_tp": 2, "rope_theta": 5e6}
SMOLLM3 |= {"use_sliding_window": False, "sliding_window": None, "attention_bias": False, "hidden_act": "silu"}
GLM = {"model_type": "glm", "attention_bias": True, "head_dim": 128, "partial_rotary_factor": 0.5, "hidden_act": "silu"}
GLM |= {"tie_word_embeddings": False}
STARCODER2 = {"model_type": "starcoder2", "norm_epsilon": 1e-5, "hidden_act": TANH, "sliding_window": 4096}
STARCODER2 |= {"residual_dropout": 0.1, "embedding_dropout": 0.1, "attention_dropout": 0.1, "use_bias": True}
STARCODER2_OLD = {"attention_softmax_in_fp32": True, "scale_attention_softmax_in_fp32": True, "norm_type": "layer_norm"}
STARCODER2_OLD |= {"scale_attn_weights": True, "layer_norm_epsilon": 1e-5, "mlp_type": "default"}

# name: (config.json, how many parameters its makers count)
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "Llama 1 7B": (
        LLAMA | sizes("32000 4096 11008 32 32 32", max_sequence_length=2048, max_position_embeddings=2048),
        6738415616,
    ),
    "Llama 2 70B": (LLAMA | sizes("32000 8192 28672 80 64 8"), 68976648192),
    "Vicuna 7B 1.5": (
        LLAMA | sizes("32000 4096 11008 32 32 32", max_sequence_length=2048, max_position_embeddings=4096),
        6738415616,
    ),
    "Code Llama 7B": (LLAMA | sizes("32016 4096 11008 32 32 32", rope_theta=1000000), 6738546688),
    "Llama 3.1 8B": (
        LLAMA31 | sizes("128256 4096 14336 32 32 8", rope_scaling=LLAMA3 | {"factor": 8.0}),
        8030261248,
    ),
    "Llama 3.2 1B": (LLAMA32 | sizes("128256 2048 8192 16 32 8", head_dim=64), 1235814400),
    "Llama 3.2 3B": (LLAMA32 | sizes("128256 3072 8192 28 24 8", head_dim=128), 3212749824),
    "Llama 3.3 70B": (
        LLAMA31 | sizes("128256 8192 28672 80 64 8", rope_scaling=LLAMA3 | {"factor": 8.0}),
        70553706496,
    ),
    "TinyLlama 1.1B": (LLAMA | sizes("32000 2048 5632 22 32 4"), 1100048384),
    "Yi 6B": (LLAMA | sizes("64000 4096 11008 32 32 4", rope_theta=5e6), 6061035520),
    "SmolLM2 1.7B": (
        LLAMA | sizes("49152 2048 8192 24 32 32", tie_word_embeddings=True, rope_interleaved=False),
        1711376384,
    ),
    "Falcon3 7B": (
        LLAMA31 | sizes("131072 3072 23040 28 12 4", head_dim=256, activation="swiglu", rope_theta=1000042),
        7455550464,
    ),
    "Mistral 7B 0.1": (MISTRAL | sizes("32000 4096 14336 32 32 8", sliding_window=4096, rope_theta=1e4), 7241732096),
    "Mistral Nemo": (MISTRAL | sizes("131072 5120 14336 40 32 8", head_dim=128), 12247782400),
    "Ministral 8B": (MISTRAL | sizes("131072 4096 12288 36 32 8", head_dim=128, sliding_window=32768), 8019808256),
    "Mixtral 8x7B": (MISTRAL | MIXTRAL | sizes("32000 4096 14336 32 32 8", router_jitter_noise=0.0), 46702792704),
    "Qwen2.5 0.5B": (
        QWEN2 | sizes("151936 896 4864 24 14 2", use_mrope=False, tie_word_embeddings=True, max_window_layers=24),
        494032768,
    ),
    "Qwen2.5 7B Instruct": (QWEN2 | sizes("152064 3584 18944 28 28 4"), 7615616512),
    "DeepSeek R1 Distill Qwen 1.5B": (QWEN2 | sizes("151936 1536 8960 28 12 2", use_mrope=False), 1777088000),
    "Qwen2.5 32B": (QWEN2 | sizes("152064 5120 27648 64 40 8", max_window_layers=70), 32763876352),
    "Qwen3 0.6B": (QWEN3 | sizes("151936 1024 3072 28 16 8", tie_word_embeddings=True), 596049920),
    "Qwen3 8B": (QWEN3 | sizes("151936 4096 12288 36 32 8"), 8190735360),
    "Qwen3 30B-A3B": (QWEN3_MOE | sizes("151936 2048 6144 48 32 4"), 30532122624),
    "Qwen3 Coder 30B-A3B": (QWEN3_MOE | QWEN3_CODER | sizes("151936 2048 6144 48 32 4"), 30532122624),
    "Gemma 2B": (GEMMA | sizes("256000 2048 16384 18 8 1", hidden_activation=None), 2506172416),
    "Gemma 1.1 7B": (GEMMA | sizes("256000 3072 24576 28 16 16", hidden_activation=TANH), 8537680896),
    "Gemma 2 2B": (GEMMA2 | sizes("256000 2304 9216 26 8 4"), 2614341888),
    "Gemma 2 9B": (GEMMA2 | sizes("256000 3584 14336 42 16 8", sliding_window_size=4096), 9241705984),
    "Gemma 2 27B": (
        GEMMA2 | sizes("256000 4608 36864 46 32 16", head_dim=128, query_pre_attn_scalar=144),
        27227128320,
    ),
    "Gemma 3 1B": (GEMMA3 | sizes("262144 1152 6912 26 4 1", sliding_window_pattern=6), 999885952),
    "Gemma 3 270M": (
        GEMMA3
        | sizes("262144 640 2048 18 4 1", _sliding_window_pattern=6, use_bidirectional_attention=False)
        | {"layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3},
        268098176,
    ),
    "Phi-3 mini 4k": (PHI3 | sizes("32064 3072 8192 32 32 32", sliding_window=2047), 3821079552),
    "Phi-3 medium 4k": (PHI3 | sizes("32064 5120 17920 40 40 10", sliding_window=2047), 13960238080),
    "Phi-3.5 mini": (
        PHI3_LONG | sizes("32064 3072 8192 32 32 32", rope_scaling=longrope("longrope", 48)),
        3821079552,
    ),
    "Phi-4": (PHI3 | sizes("100352 5120 17920 40 40 10", original_max_position_embeddings=16384), 14659507200),
    "Phi-4 mini": (PHI4_MINI | sizes("200064 3072 8192 32 24 8"), 3836021760),
    "OLMo 2 1B": (OLMO2 | sizes("100352 2048 8192 16 16 16"), 1484916736),
    "OLMo 2 7B": (OLMO2 | sizes("100352 4096 11008 32 32 32"), 7298617344),
    "OLMo 3 7B": (OLMO3 | sizes("100278 4096 11008 32 32 32", rope_scaling=OLMO3_YARN), 7298011136),
    "OLMoE 1B-7B": (OLMOE | sizes("50304 2048 1024 16 16 16"), 6919161856),
    "Granite 3.1 2B": (GRANITE | sizes("49155 2048 8192 40 32 8"), 2533531648),
    "SmolLM3 3B": (SMOLLM3 | sizes("128256 2048 11008 36 16 4"), 3075098624),
    "GLM-4 9B chat": (GLM | sizes("151552 4096 13696 40 32 2"), 9399951360),
    "GLM-4 9B 0414": (GLM | sizes("151552 4096 13696 40 32 2", model_type="glm4"), 9400279040),
    "StarCoder2 3B": (STARCODER2 | STARCODER2_OLD | sizes("49152 3072 12288 30 24 2"), 3030371328),
    "StarCoder2 15B": (
        STARCODER2 | sizes("49152 6144 24576 40 48 4", tie_word_embeddings=False),
        15957889024,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_is_read_whole(name):
    said, parameters = PUBLISHED[name]
    said = said | {"architectures": [FAMILIES[said["model_type"]].architecture], "use_cache": True, "bos_token_id": 1}
    assert read_model_config(said).num_params == parameters


def as_transformers_5_writes(said: dict[str, Any]) -> dict[str, Any]:
    fields = copy.deepcopy({k: v for k, v in said.items() if k != "model_type"})
    return CONFIG_MAPPING[said["model_type"]](**fields).to_dict()


@pytest.mark.parametrize("name", PUBLISHED)
def test_it_says_the_same_in_the_words_of_transformers_4_and_5(name):
    """Also after a way through transformers' own class, which writes the words of 5 alone."""
    said, _ = PUBLISHED[name]
    rewritten = as_transformers_5_writes(said)
    assert not {"rope_theta", "rope_scaling"} & rewritten.keys()
    for source in (said, rewritten):
        both = with_both_spellings(source)
        assert read_model_config(both) == read_model_config(said)
        assert read_model_config(as_transformers_5_writes(both)) == read(name)
        if source is rewritten or "rope_theta" in said:
            assert both["rope_theta"] == said.get("rope_theta", 1e4)
        old, new = both.get("rope_scaling"), said.get("rope_scaling")
        assert (old is None) == (new is None)
        if new is not None:
            assert {k: v for k, v in new.items() if k != "type"}.items() <= old.items()


def test_words_that_only_transformers_4_looks_for_are_written():
    def exported(name: str, **changed: Any) -> dict[str, Any]:
        return with_both_spellings(as_transformers_5_writes(PUBLISHED[name][0] | changed))

    gemma = exported("Gemma 3 1B", rope_local_base_freq=777, rope_scaling={"rope_type": "linear", "factor": 8.0})
    assert (gemma["rope_theta"], gemma["rope_local_base_freq"]) == (1000000, 777)
    assert gemma["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    assert exported("OLMo 3 7B")["rope_scaling"] == OLMO3_YARN
    for name in ("Phi-3.5 mini", "Phi-4 mini"):
        phi = exported(name)
        assert phi["rope_scaling"] == longrope("longrope", 48)
        assert phi["original_max_position_embeddings"] == 4096
    assert exported("Phi-4 mini")["partial_rotary_factor"] == 0.75
    assert exported("Qwen3 30B-A3B")["num_experts"] == 128
    gemma_2b = PUBLISHED["Gemma 2B"][0]
    for source in (gemma_2b, exported("Gemma 2B"), {k: v for k, v in gemma_2b.items() if k != "hidden_act"}):
        both = with_both_spellings(source)
        assert (both["hidden_act"], both["hidden_activation"]) == (TANH, TANH)
    assert with_both_spellings(gemma_2b | {"hidden_act": "silu"})["hidden_act"] == "silu"


@pytest.mark.parametrize("name", ["OLMo 3 7B", "Phi-3.5 mini", "Llama 3.2 1B"])
def test_null_in_the_older_words_does_not_hide_what_the_newer_say(name):
    said = with_both_spellings(as_transformers_5_writes(PUBLISHED[name][0]))
    again = with_both_spellings(said | {"rope_theta": None, "rope_scaling": None})
    assert (again["rope_theta"], again["rope_scaling"]) == (said["rope_theta"], said["rope_scaling"])


def read(name: str, **changed: Any):
    return read_model_config(PUBLISHED[name][0] | changed)


def test_what_some_of_them_say_is_what_is_done():
    tanh = {name for name in PUBLISHED if read(name).activation == "gelu_tanh"}
    assert tanh == {name for name in PUBLISHED if name.startswith(("Gemma", "StarCoder2"))}
    assert {name for name in PUBLISHED if any(read(name).windows)} == {
        *("Mistral 7B 0.1", "Ministral 8B", "Gemma 2 2B", "Gemma 2 9B", "Gemma 2 27B", "Gemma 3 1B", "Gemma 3 270M"),
        *("Phi-3 mini 4k", "Phi-3 medium 4k", "Phi-3.5 mini", "Phi-4 mini", "OLMo 3 7B"),
        *("StarCoder2 3B", "StarCoder2 15B"),
    }
    assert read("Gemma 2 9B").windows == (4096, None) * 21
    assert read("SmolLM3 3B").ropes[2:5] == (read("SmolLM3 3B").ropes[0], None, read("SmolLM3 3B").ropes[0])
    full, near = read("OLMo 3 7B").ropes[3], read("OLMo 3 7B").ropes[0]
    assert full and near and isinstance(full.scaling, YarnRope) and near.scaling is None
    assert {rope.width for rope in read("Phi-4 mini").ropes if rope} == {96}


@pytest.mark.parametrize(
    ("name", "field", "value", "said"),
    [
        ("Phi-4 mini", "full_attn_mod", 2, "full_attn_mod = 2 is not modelled; only 1 is"),
        ("Phi-4 mini", "interpolate_factor", 4, "interpolate_factor = 4 is not modelled; only 1 is"),
        ("StarCoder2 3B", "mlp_type", "gated", "mlp_type = 'gated' is not modelled; only 'default' is"),
        ("StarCoder2 3B", "norm_type", "rms", "norm_type = 'rms' is not modelled; only 'layer_norm' is"),
        ("StarCoder2 3B", "scale_attn_weights", False, "scale_attn_weights = False is not modelled; only True is"),
        ("StarCoder2 3B", "layer_norm_epsilon", 1e-6, "layer_norm_epsilon = 1e-06 and norm_epsilon = 1e-05 differ"),
        ("Qwen3 Coder 30B-A3B", "qkv_bias", True, "qkv_bias = True is not modelled; only False is"),
        ("Qwen3 Coder 30B-A3B", "use_qk_norm", False, "use_qk_norm = False is not modelled; only True is"),
        ("Qwen3 Coder 30B-A3B", "shared_expert_intermediate_size", 768, "= 768 is not modelled; only 0 is"),
        ("Qwen3 8B", "use_qk_norm", True, "use_qk_norm = True is an unknown field"),
        ("Gemma 2 9B", "sliding_window_size", 512, "sliding_window_size = 512 and sliding_window = 4096 differ"),
        ("Gemma 2 2B", "hidden_act", "silu", "hidden_act = 'silu' and hidden_activation = 'gelu_pytorch_tanh' differ"),
        ("Gemma 2 2B", "hidden_activation", "silu", "hidden_act = .* and hidden_activation = 'silu' differ"),
        ("Gemma 1.1 7B", "hidden_act", "silu", "hidden_activation = .* and hidden_act = 'silu' differ"),
        ("Gemma 1.1 7B", "hidden_activation", "gelu", "hidden_activation = 'gelu' and hidden_act = .* differ"),
    ],
)
def test_a_field_of_fixed_value_or_a_second_name_that_says_another_is_refused(name, field, value, said):
    with pytest.raises(ValueError, match=said):
        read(name, **{field: value})


@pytest.mark.parametrize("act", ["gelu", TANH])
def test_gemma_2_with_the_older_name_alone_keeps_the_default_of_the_newer(act):
    said = {k: v for k, v in PUBLISHED["Gemma 2 2B"][0].items() if k != "hidden_activation"}
    assert read_model_config(said | {"hidden_act": act}) == read("Gemma 2 2B")
    with pytest.raises(ValueError, match="hidden_act = 'silu' and hidden_activation = 'gelu_pytorch_tanh' differ"):
        read_model_config(said | {"hidden_act": "silu"})
