"""ModelConfig reads and writes config.json, and refuses what it cannot follow."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from jax_sft.model.config import LinearRope, Llama3Rope, Rope, YarnRope
from jax_sft.model.decoder import abstract_params, build, random_params
from jax_sft.model.families import FAMILIES, read_model_config
from jax_sft.model.ropes import unread_by_transformers
from jax_sft.model.spellings import with_both_spellings
from tests.hf import family_cases
from tests.model.llama_cases import BASE, CASES, LLAMA3_ROPE, config_of, hf_config

SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 49152,
}


def test_smollm2_is_read_whole():
    config = read_model_config(SMOLLM2)
    assert config.num_params == 134_515_008
    assert (config.num_heads, config.num_kv_heads, config.head_width) == (9, 3, 64)
    rope = Rope(theta=100_000.0, width=64, interleaved=False, scaling=None)
    assert (set(config.ropes), set(config.windows), config.tied_head) == ({rope}, {None}, True)


@pytest.mark.parametrize("case", family_cases.CASES)
def test_a_config_in_both_spellings_says_the_same(case):
    written = with_both_spellings(family_cases.hf_config(case))
    assert read_model_config(written) == family_cases.config_of(case)


@pytest.mark.parametrize("case", family_cases.CASES)
def test_what_transformers_writes_is_read_as_the_same_model(case):
    said = family_cases.hf_config(case)
    kind = said.pop("model_type")
    written = CONFIG_MAPPING[kind](**said).to_dict()
    assert read_model_config(written) == family_cases.config_of(case)
    assert read_model_config(with_both_spellings(written)) == family_cases.config_of(case)


@pytest.mark.parametrize(
    ("old", "new", "scaling"),
    [
        ({"rope_theta": 5e5}, {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, None),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}},
            {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}},
            LinearRope(factor=2.0),
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE},
            {"rope_parameters": {"rope_theta": 5e5, **LLAMA3_ROPE}},
            Llama3Rope(factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_positions=32),
        ),
    ],
)
def test_old_and_new_spelling_of_rope_mean_the_same(old, new, scaling):
    rest = {name: value for name, value in BASE.items() if name != "rope_theta"}
    config = read_model_config(rest | old)
    assert config == read_model_config(rest | new)
    assert {(rope.theta, rope.scaling) for rope in config.ropes if rope} == {(5e5, scaling)}


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_config_json_leaves_out_is_filled_in_as_transformers_does(kind):
    sizes = {k: BASE[k] for k in BASE if k.endswith("_size") or (k.startswith("num_") and "key" not in k)}
    sizes |= {"num_key_value_heads": 2, "pad_token_id": 0}
    ours = read_model_config({"model_type": kind, **sizes})
    assert ours == read_model_config(CONFIG_MAPPING[kind](**sizes).to_dict())


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("model_type", "bert", "model_type = 'bert' is not modelled; these are: llama, mistral"),
        ("model_type", ["llama"], r"model_type = \['llama'\] is not modelled"),
        ("hidden_size", None, "hidden_size is missing"),
        ("hidden_act", "relu", "hidden_act = 'relu' must be one of"),
        ("decoder_sparse_step", 2, "decoder_sparse_step = 2 is not modelled; only 1 is"),
        ("use_mrope", True, "use_mrope = True is not modelled; only False is"),
        ("lm_head_bias", True, "lm_head_bias = True is not modelled; only False is"),
        ("activation", "geglu", "activation = 'geglu' and hidden_act = 'silu' differ; they must say the same"),
        ("qkv_bias", False, "qkv_bias = False is an unknown field"),
        ("hidden_activation", "gelu_pytorch_tanh", "hidden_activation = 'gelu_pytorch_tanh' is an unknown field"),
        ("rope_interleaved", True, "rope_interleaved = True is not modelled"),
        ("sliding_window", 4096, "sliding_window = 4096 is not modelled"),
        ("quantization_config", {"bits": 4}, "quantization_config = .* is not modelled"),
        ("logit_scale", 0.5, "logit_scale = 0.5 is an unknown field; remove it"),
        ("architectures", ["LlamaForSequenceClassification"], "architectures = .* is not modelled"),
        ("rope_scaling", {"type": "cubic", "factor": 2.0}, "rope_type = 'cubic' is not modelled"),
        (
            "rope_parameters",
            {"rope_theta": 7.0, "rope_type": "default"},
            r"rope_theta has several values, \[7.0, 100.0\]",
        ),
        ("rope_scaling", {"type": "linear"}, "rope_scaling: factor missing"),
        ("rope_scaling", {"type": "linear", "factor": "2"}, "rope_scaling: factor missing, unknown or not a number"),
        ("rope_scaling", LLAMA3_ROPE | {"beta": 1.0}, "rope_scaling: beta missing, unknown"),
        (
            "rope_scaling",
            LLAMA3_ROPE | {"high_freq_factor": 1.0},
            "high_freq_factor must be greater than low_freq_factor",
        ),
        ("num_key_value_heads", 3, "num_attention_heads = 4 must be a multiple of num_key_value_heads = 3"),
        ("head_dim", 5, "requires an even rotary dimension, but got `head_dim`=5"),
        ("vocab_size", 0, "vocab_size = 0 must be a whole number of at least 1"),
    ],
)
def test_what_is_not_modelled_is_refused_by_name(field, value, said):
    with pytest.raises(ValueError, match=said):
        read_model_config(BASE | {field: value})


GPT_OSS_20B = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "pad_token_id": 199999,
    "quantization_config": {
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
        "quant_method": "mxfp4",
    },
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 201088,
}


def test_gpt_oss_20b_is_read_whole():
    config = read_model_config(GPT_OSS_20B)
    assert config.num_params == 20_914_757_184
    assert config.windows == (128, None) * 12
    assert (config.silu_slope, config.gate_limit, config.up_offset, config.router_aux_weight) == (1.702, 7.0, 1.0, 0.0)
    (rope,) = set(config.ropes)
    assert rope is not None and isinstance(rope.scaling, YarnRope) and not rope.scaling.whole_bounds


@pytest.mark.parametrize("said", [{}, {"rope_theta": 100.0}, {"rope_theta": 100.0, "rope_scaling": None}])
def test_a_rope_that_the_type_has_of_its_own_is_not_made_plain_by_the_other_spelling(said):
    hf = {k: v for k, v in GPT_OSS_20B.items() if not k.startswith("rope")} | said
    config = read_model_config(hf)
    assert all(rope is not None and isinstance(rope.scaling, YarnRope) for rope in config.ropes)
    assert read_model_config(with_both_spellings(hf)) == config


@pytest.mark.parametrize(
    ("hf", "value"),
    [
        *((GPT_OSS_20B, value) for value in ({"quant_method": "bitsandbytes"}, {"quant_method": ["mxfp4"]}, "mxfp4")),
        (SMOLLM2, {"quant_method": "mxfp4"}),
    ],
)
def test_a_quantisation_that_is_not_read_is_refused_by_name(hf, value):
    only = "quant_method 'mxfp4'" if hf is GPT_OSS_20B else "None"
    with pytest.raises(ValueError, match=f"quantization_config = .* is not modelled; only {only} is"):
        read_model_config(hf | {"quantization_config": value})


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("hidden_size", "32", "hidden_size = '32' must be a whole number of at least 1, without quotes"),
        ("hidden_size", 32.5, "hidden_size = 32.5 must be a whole number"),
        ("num_hidden_layers", True, "num_hidden_layers = True must be a whole number"),
        ("num_attention_heads", 0, "num_attention_heads = 0 must be a whole number of at least 1"),
        ("head_dim", "4", "head_dim = '4' must be a whole number"),
        ("max_position_embeddings", "512", "max_position_embeddings = '512' must be a whole number"),
        ("rms_norm_eps", "1e-5", "rms_norm_eps = '1e-5' must be a number above 0, without quotes"),
        ("rms_norm_eps", math.nan, "rms_norm_eps = nan must be a number above 0"),
        ("rope_theta", 0, "rope_theta = 0 must be a number above 0"),
        ("rope_theta", "high", "rope_theta = 'high' must be a number above 0"),
        ("tie_word_embeddings", "false", "tie_word_embeddings = 'false' must be true or false, without quotes"),
        ("hidden_act", ["silu"], r"hidden_act = \['silu'\] must be one of"),
        ("architectures", [["x"]], "architectures = .* is not modelled"),
        ("rope_scaling", "linear", "rope_scaling = 'linear' must be an object like .*linear"),
        ("rope_parameters", [1], r"rope_parameters = \[1\] must be an object like"),
        ("rope_parameters", {"rope_theta": "1e4"}, "rope_theta = '1e4' in rope_parameters must be"),
        (
            "rope_scaling",
            {"type": ["linear"], "factor": 2.0},
            r"rope_scaling: rope_type = \['linear'\] is not modelled",
        ),
        (
            "rope_scaling",
            {"type": "linear", "factor": math.nan},
            "rope_scaling: factor missing, unknown or not a number above 0",
        ),
    ],
)
def test_a_field_of_a_wrong_type_is_refused_by_name(field, value, said):
    with pytest.raises(ValueError, match=f"config.json cannot be followed exactly:\n  {said}"):
        read_model_config(BASE | {field: value})


PLAIN_ROPE = {"rope_type": "default", "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("case", "changed", "said"),
    [
        ("llama", {"rope_theta": None}, "rope_theta = None must be a number above 0"),
        ("llama", {"rope_theta": 10**400}, "rope_theta = 1000.* must be a number above 0"),
        ("llama", {"layer_types": 3}, 'layer_types = 3 must be a list of texts like "full_attention"'),
        ("qwen3", {"layer_types": [1] * 4}, r"layer_types = \[1, 1, 1, 1\] must be a list of texts"),
        ("qwen3", {"rope_parameters": {"full_attention": PLAIN_ROPE}}, "rope_parameters = .* must be one object for"),
        ("llama", {"rope_scaling": {"sliding_attention": PLAIN_ROPE}}, "rope_scaling = .* must be one object for all"),
        ("gemma3_text", {"rope_scaling": {"full_attention": PLAIN_ROPE}}, "rope_scaling = .* must be one object for"),
        (
            "gemma3_text",
            {"rope_parameters": PLAIN_ROPE},
            "rope_parameters = .* for each of full_attention, sliding_att",
        ),
        (
            "olmo3",
            {"rope_parameters": PLAIN_ROPE},
            "rope_parameters = .* for each of full_attention, sliding_attention",
        ),
        ("olmo3", {"rope_parameters": {"near": PLAIN_ROPE}}, "rope_parameters = .* for each of full_attention"),
        (
            "gemma3_text",
            {"rope_parameters": {"full_attention": {"rope_theta": None}}},
            "rope_theta = None in rope_parameters.full_attention must be a number above 0",
        ),
        *(
            ("gemma3_text", {"rope_local_base_freq": wrong}, r"rope_local_base_freq = .* must be a number above 0")
            for wrong in (None, [1], {})
        ),
        (
            "gemma3_text",
            {"sliding_window_pattern": 0},
            "sliding_window_pattern = 0 must be a whole number of at least 1",
        ),
        (
            "gemma3_text",
            {"sliding_window_pattern": None},
            "sliding_window_pattern = None must be a number, or left out",
        ),
        ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval = 0 must be a whole number of at least 1"),
        ("smollm3", {"no_rope_layers": [1]}, r"no_rope_layers = \[1\] must be a list of 1 and 0, one for each layer"),
        ("smollm3", {"no_rope_layers": [1, 2, 0, 1]}, "no_rope_layers = .* must be a list of 1 and 0"),
        ("glm", {"num_key_value_heads": None}, "num_key_value_heads = None must be a whole number of at least 1"),
        ("glm", {"partial_rotary_factor": [1]}, r"partial_rotary_factor = \[1\] must be a number above 0"),
        ("glm", {"partial_rotary_factor": {}}, "partial_rotary_factor = {} must be a number above 0"),
        (
            "glm",
            {"partial_rotary_factor": 0.5, "rope_scaling": {"type": "linear", "factor": 2, "partial_rotary_factor": 1}},
            "partial_rotary_factor in rope_scaling = 1 and partial_rotary_factor = 0.5 differ; keep one of them",
        ),
        ("phi3", {"hidden_size": 3}, "hidden_size = 3 must be at least num_attention_heads = 4"),
        ("granite", {"residual_multiplier": 10**400}, "residual_multiplier = 1000.* must be a number above 0"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not modelled; only 1.0 is"),
        *(
            (
                kind,
                {name: {"partial_rotary_factor": 0.5}},
                f"partial_rotary_factor in {name} = 0.5 must be 1.0 or left out",
            )
            for kind, name in (("llama", "rope_parameters"), ("qwen3_moe", "rope_scaling"))
        ),
        (
            "gemma3_text",
            {"rope_parameters": {"full_attention": {"partial_rotary_factor": 0.5}}},
            "partial_rotary_factor in rope_parameters.full_attention = 0.5 must be 1.0 or left out",
        ),
        (
            "llama",
            {"rope_scaling": {"type": "default", "factor": 2.0}},
            "rope_scaling: factor = 2.0 must be 1 or left out",
        ),
    ],
)
def test_what_its_model_type_has_not_or_cannot_be_is_refused_by_name(case, changed, said):
    with pytest.raises(ValueError, match=f"^config.json cannot be followed exactly:\n  {said}[^\n]*$"):
        read_model_config(family_cases.hf_config(case) | changed)


@pytest.mark.parametrize(
    ("case", "changed"),
    [
        ("llama", {"rope_scaling": {"type": "default", "factor": 1.0}}),
        ("llama", {"rope_scaling": {"type": "default", "factor": 1.0}, "rope_parameters": {"rope_theta": 100.0}}),
        ("llama", {"rope_theta": None, "rope_parameters": {"rope_theta": 100.0, "partial_rotary_factor": 1.0}}),
        ("gemma3_text", {"rope_parameters": {}}),
        ("gemma3_text", {"rope_parameters": {"full_attention": None}}),
        ("llama_yarn", {"rope_scaling": family_cases.YARN | {"attn_factor": 0.8782488562869419}}),
        ("llama_yarn", {"rope_scaling": family_cases.YARN | {"finetuned": True}}),
        ("phi3_longrope", {"rope_scaling": family_cases.LONG | {"rope_type": "su"}}),
        ("phi3_longrope", {"rope_scaling": {k: v for k, v in family_cases.LONG.items() if "_f" in k} | {"type": "su"}}),
        ("phi3_longrope", {"rope_scaling": None, "rope_parameters": family_cases.LONG | {"type": "yarn"}}),
    ],
)
def test_what_means_the_same_is_read_as_the_same(case, changed):
    said = family_cases.hf_config(case) | changed
    assert read_model_config(said) == family_cases.config_of(case)
    assert read_model_config(with_both_spellings(said)) == family_cases.config_of(case)


def test_numbers_that_transformers_does_not_read_are_told():
    said = {"rope_scaling": family_cases.YARN | {"attn_factor": 0.9}, "rope_theta": 100.0}
    assert unread_by_transformers(said) == {"rope_scaling.attn_factor": 0.9}
    by_type = {"rope_parameters": {"full_attention": family_cases.YARN | {"attn_factor": 0.9}}, "rope_scaling": None}
    assert unread_by_transformers(by_type) == {"rope_parameters.full_attention.attn_factor": 0.9}


def test_two_spellings_of_rope_must_agree():
    two, four = ({"rope_type": "linear", "factor": factor} for factor in (2.0, 4.0))
    with pytest.raises(ValueError, match="rope_scaling = .* and rope_parameters = .* differ"):
        read_model_config(BASE | {"rope_scaling": two, "rope_parameters": four})


def test_all_problems_are_named_at_once():
    with pytest.raises(ValueError, match=r"(?s)logit_scale.*mup") as error:
        read_model_config(BASE | {"logit_scale": 2.0, "mup": True, "clip_qkv": 8.0})
    assert str(error.value).count("\n") == 3


@pytest.mark.parametrize("case", CASES)
def test_shapes_are_those_of_the_parameters(case):
    config = config_of(case)
    made = jax.eval_shape(lambda: random_params(config, 0))
    assert made == abstract_params(config)
    assert config.num_params == sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(made))


def test_abstract_params_take_a_dtype():
    leaves = jax.tree.leaves(abstract_params(config_of("untied"), dtype="bfloat16"))
    assert {leaf.dtype for leaf in leaves} == {np.dtype("bfloat16")}


@pytest.mark.parametrize("dtype", ["bf16", "float64", "int8", None])
def test_a_dtype_that_is_none_of_ours_is_refused(dtype):
    with pytest.raises(ValueError, match=f"dtype = {dtype!r} is not one of float32, bfloat16, float16; name one"):
        build(config_of("base"), dtype=dtype, attention="xla")


def test_random_params_come_from_the_seed():
    config = config_of("attention_bias")
    one, same, other = (random_params(config, seed) for seed in (1, 1, 2))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), one, same))
    assert not bool((one["embed_VD"] == other["embed_VD"]).any())
    assert bool((one["final_norm_D"] == 1).all())
    assert bool((one["blocks"]["q_bias_LNH"] == 0).all())


def test_train_flops_are_counted_by_hand():
    config = read_model_config(hf_config("base") | {"num_hidden_layers": 3})
    q_and_o, k_and_v, mlp = 2 * 16 * 16, 2 * 16 * 8, 3 * 16 * 24
    body = 6 * 3 * (q_and_o + k_and_v + mlp) * 100
    head = 6 * 31 * 16 * 40
    attention = 6 * 3 * 4 * 4 * (60**2 + 40**2)
    got = config.train_flops([60, 40], predicted_tokens=40)
    assert got == body + head + attention


def test_a_window_saves_the_attention_that_it_does_not_see():
    config = read_model_config(hf_config("base"))
    narrow = dataclasses.replace(config, windows=(10, None))
    saved = config.train_flops([60, 5], predicted_tokens=0) - narrow.train_flops([60, 5], predicted_tokens=0)
    # of one layer: the triangle under 60 tokens, less the band of 10; two FLOPs a pair, twice, in three products
    assert saved == 12 * 4 * 4 * (60**2 / 2 - (10**2 / 2 + 50 * 10))


def test_config_is_hashable_and_frozen():
    assert hash(config_of("llama3_rope")) == hash(config_of("llama3_rope"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config_of("base").width = 3  # pyright: ignore[reportAttributeAccessIssue]
