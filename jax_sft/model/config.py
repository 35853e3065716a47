"""ModelConfig: what a Hugging Face config.json says, in fields named for what they do.

In: the dict of a config.json (`from_hf`). Out: the same dict again (`to_hf`), the shapes of all parameters, their
count, and the floating point operations of a training step.
Nothing here has a default: what config.json leaves out is filled in as transformers' `LlamaConfig` fills it in.

V vocabulary, D model width, F MLP width, N query heads, K key/value heads, H head width, L layers.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

from jax_sft.sharding import letters_of

Activation = Literal["silu", "gelu", "gelu_tanh"]

# transformers has several names for one function (transformers/activations.py)
_ACTIVATION_OF_HF: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
}
_HF_OF_ACTIVATION: dict[Activation, str] = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# What transformers' LlamaConfig takes where config.json is silent.
_HF_DEFAULTS: dict[str, Any] = {
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
_COUNTS = (*_SIZES, "num_key_value_heads", "head_dim", "max_position_embeddings")
_HF_OPTIONAL = ("num_key_value_heads", "head_dim", "rope_theta", "rope_scaling", "rope_parameters", "model_type")
# Fields that would change the arithmetic, with the only value that is modelled.
_FIXED: dict[str, Any] = {
    "pretraining_tp": 1,
    "attention_dropout": 0.0,
    "rope_interleaved": False,
    "partial_rotary_factor": 1.0,
    "sliding_window": None,
    "use_sliding_window": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "is_decoder": False,
    "quantization_config": None,
    "pruned_heads": {},
}
# Fields that say nothing about the arithmetic of logits; names that start with "_" are private and ignored too.
_IRRELEVANT = frozenset(
    """
    architectures bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id
    transformers_version torch_dtype dtype use_cache initializer_range is_llama_config transformers.js_config
    unsloth_fixed unsloth_version torchscript use_bfloat16 use_return_dict return_dict return_dict_in_generate
    output_attentions output_hidden_states output_scores chunk_size_feed_forward cross_attention_hidden_size
    tie_encoder_decoder tokenizer_class prefix task_specific_params problem_type id2label label2id finetuning_task
    tf_legacy_loss name_or_path max_length min_length do_sample early_stopping num_beams num_beam_groups
    diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens attn_implementation
    """.split()  # noqa: SIM905
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearRope:
    """All rotary frequencies divided by `factor` (kind "linear")."""

    factor: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Rope:
    """Long wavelengths stretched by `factor`, short ones kept, a ramp between them (kind "llama3", Llama 3.1)."""

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_positions: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One decoder-only transformer; hashable, so that it can travel in a graphdef.

    Raises:
        ValueError: sizes that do not fit together.
    """

    vocab_size: int  # V
    width: int  # D
    mlp_width: int  # F
    num_layers: int  # L
    num_heads: int  # N
    num_kv_heads: int  # K
    head_width: int  # H
    max_positions: int  # the context the model was made for; changes no arithmetic
    norm_eps: float
    rope_theta: float
    rope_scaling: LinearRope | Llama3Rope | None
    activation: Activation
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    tied_head: bool

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "mlp_width", "num_layers", "num_heads", "num_kv_heads", "head_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"model config: {name} = {getattr(self, name)} must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model config: num_attention_heads = {self.num_heads} must be a multiple of num_key_value_heads = "
                f"{self.num_kv_heads}"
            )
        if self.head_width % 2:
            raise ValueError(f"model config: head_dim = {self.head_width} must be even, to be rotated in pairs")

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "ModelConfig":
        """Read the dict of a config.json, in the spelling of transformers 4 (`rope_theta`) or 5 (`rope_parameters`).

        Raises:
            ValueError: another architecture, fields of a wrong type, or fields that would change the arithmetic and
                are not modelled; all at once, each by name.
        """
        if hf.get("model_type") != "llama":
            raise ValueError(f"config.json: model_type = {hf.get('model_type')!r} is not modelled; only 'llama' is")
        missing = [name for name in _SIZES if hf.get(name) is None]
        problems = [f"{name} is missing" for name in missing] + _misfits(hf) + _unmodelled(hf)
        said = _HF_DEFAULTS | {name: value for name, value in hf.items() if value is not None}
        if said["hidden_act"] not in [*_ACTIVATION_OF_HF]:  # a list: it may be what no dict can look up
            problems.append(f"hidden_act = {said['hidden_act']!r} is not one of {', '.join(_ACTIVATION_OF_HF)}")
        theta, scaling = _read_rope(hf, said["max_position_embeddings"], problems)
        if problems:
            raise ValueError("config.json cannot be followed exactly:\n" + "\n".join(f"  {p}" for p in problems))
        heads = said["num_attention_heads"]
        return cls(
            vocab_size=said["vocab_size"],
            width=said["hidden_size"],
            mlp_width=said["intermediate_size"],
            num_layers=said["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=said.get("num_key_value_heads", heads),
            head_width=said.get("head_dim", said["hidden_size"] // heads),
            max_positions=said["max_position_embeddings"],
            norm_eps=float(said["rms_norm_eps"]),
            rope_theta=theta,
            rope_scaling=scaling,
            activation=_ACTIVATION_OF_HF[said["hidden_act"]],
            qkv_bias=said["attention_bias"],
            output_bias=said["attention_bias"],
            mlp_bias=said["mlp_bias"],
            tied_head=said["tie_word_embeddings"],
        )

    def to_hf(self) -> dict[str, Any]:
        """The fields of a config.json that this class models; rope in both spellings, so that old readers agree."""
        assert self.qkv_bias == self.output_bias, "the Llama kind has one attention_bias for q, k, v and o"
        scaling = _write_rope_scaling(self.rope_scaling)
        return {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": self.vocab_size,
            "hidden_size": self.width,
            "intermediate_size": self.mlp_width,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_width,
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": self.norm_eps,
            "hidden_act": _HF_OF_ACTIVATION[self.activation],
            "attention_bias": self.qkv_bias,
            "mlp_bias": self.mlp_bias,
            "tie_word_embeddings": self.tied_head,
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling,
            "rope_parameters": {"rope_theta": self.rope_theta, **(scaling or {"rope_type": "default"})},
        }

    @property
    def shapes(self) -> dict[str, Any]:
        """The parameter tree, with shapes as leaves; every name ends in the letters of its axes."""
        block = [
            "attn_norm_LD",
            "q_LDNH",
            "k_LDKH",
            "v_LDKH",
            "o_LNHD",
            "mlp_norm_LD",
            "gate_LDF",
            "up_LDF",
            "down_LFD",
        ]
        block += ["q_bias_LNH", "k_bias_LKH", "v_bias_LKH"] if self.qkv_bias else []
        block += ["o_bias_LD"] if self.output_bias else []
        block += ["gate_bias_LF", "up_bias_LF", "down_bias_LD"] if self.mlp_bias else []
        top = ["embed_VD", "final_norm_D"] + ([] if self.tied_head else ["head_VD"])
        return {"blocks": {name: self._shape(name) for name in block}} | {name: self._shape(name) for name in top}

    @property
    def num_params(self) -> int:
        """Trainable numbers; a tied head counts once."""
        shapes = self.shapes
        blocks = shapes.pop("blocks")
        return sum(math.prod(shape) for shape in [*blocks.values(), *shapes.values()])

    def train_flops(self, *, tokens: int, predicted_tokens: int, squared_lengths: int) -> int:
        """Floating point operations that a full fine-tuning step cannot avoid; the numerator of MFU.

        6 x (matmul weights of the layers) x tokens, for forward (2) and both backward products (4), plus the head at
        the predicted tokens alone, plus attention over the causal half of every segment. Padding, masked tokens,
        recomputation (remat) and the embedding lookup add nothing.

        Args:
            tokens: real tokens in the step, over all devices and micro-batches; no padding.
            predicted_tokens: those that carry a target of weight above 0.
            squared_lengths: the sum over all segments of (tokens in the segment) squared.
        """
        per_layer = self.width * self.head_width * 2 * (self.num_heads + self.num_kv_heads)
        per_layer += 3 * self.width * self.mlp_width
        body = 6 * self.num_layers * per_layer * tokens
        head = 6 * self.vocab_size * self.width * predicted_tokens
        attention = 6 * self.num_layers * self.num_heads * self.head_width * squared_lengths
        return body + head + attention

    def _shape(self, name: str) -> tuple[int, ...]:
        sizes = {"V": self.vocab_size, "D": self.width, "F": self.mlp_width, "L": self.num_layers}
        sizes |= {"N": self.num_heads, "K": self.num_kv_heads, "H": self.head_width}
        return tuple(sizes[letter] for letter in letters_of((name,)))


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _misfits(hf: Mapping[str, Any]) -> list[str]:
    """Fields of a wrong type or range; one that is null counts as left out."""
    rope = ("rope_scaling", "rope_parameters")
    switches = ("tie_word_embeddings", "attention_bias", "mlp_bias")
    wanted: list[tuple[tuple[str, ...], Callable[[Any], bool], str]] = [
        (_COUNTS, lambda x: _is_positive(x) and isinstance(x, int), "a whole number of at least 1, without quotes"),
        (("rms_norm_eps", "rope_theta"), _is_positive, "a number above 0, without quotes"),
        (switches, lambda x: isinstance(x, bool), "true or false, without quotes"),
        (rope, lambda x: isinstance(x, Mapping), 'an object like {"rope_type": "linear", "factor": 2.0}'),
    ]
    return [
        f"{name} = {hf[name]!r} must be {what}"
        for names, fits, what in wanted
        for name in names
        if hf.get(name) is not None and not fits(hf[name])
    ]


def _unmodelled(hf: Mapping[str, Any]) -> list[str]:
    """Fields that change the arithmetic and have no place in `ModelConfig`."""
    problems = []
    known = {*_SIZES, *_HF_DEFAULTS, *_HF_OPTIONAL, *_IRRELEVANT}
    for name, value in hf.items():
        if name in _FIXED:
            if value is not None and value != _FIXED[name]:
                problems.append(f"{name} = {value!r} is not modelled; only {_FIXED[name]!r} is")
        elif name not in known and not name.startswith("_") and value is not None:
            problems.append(f"{name} = {value!r} is an unknown field; remove it if it has no effect on the logits")
    architectures = hf.get("architectures") or []
    modelled = ["LlamaForCausalLM", "LLaMAForCausalLM"]
    if not isinstance(architectures, list) or any(name not in modelled for name in architectures):
        problems.append(f"architectures = {architectures!r} is not modelled; only ['LlamaForCausalLM'] is")
    return problems


def _read_rope(
    hf: Mapping[str, Any], max_positions: int, problems: list[str]
) -> tuple[float, LinearRope | Llama3Rope | None]:
    """Rotary base and scaling from either spelling; both are fine if they agree."""
    if not all(isinstance(hf.get(name) or {}, Mapping) for name in ("rope_parameters", "rope_scaling")):
        return 0.0, None  # `_misfits` has said so
    new = dict(hf.get("rope_parameters") or {})
    old = dict(hf.get("rope_scaling") or {})
    for spelling in (new, old):
        spelling.setdefault("rope_type", spelling.pop("type", "default"))
        spelling.pop("type", None)
    said_thetas = [new.pop("rope_theta", None), old.pop("rope_theta", None), hf.get("rope_theta")]
    thetas = {float(theta) for theta in said_thetas if _is_positive(theta)}
    problems += [
        f"rope_theta = {theta!r} in rope_parameters or rope_scaling must be a number above 0, without quotes"
        for theta in said_thetas[:2]
        if theta is not None and not _is_positive(theta)
    ]
    if len(thetas) > 1:
        problems.append(f"rope_theta has several values, {sorted(thetas)}, at the top and in rope_parameters; keep one")
    if hf.get("rope_parameters") and hf.get("rope_scaling") and new != old:
        problems.append(f"rope_scaling = {old} and rope_parameters = {new} differ; keep one of them")
    theta = max(thetas, default=10_000.0)
    name, said = ("rope_scaling", old) if hf.get("rope_scaling") else ("rope_parameters", new)
    if said.get("partial_rotary_factor") == 1.0:
        said.pop("partial_rotary_factor")
    wanted = {
        "default": set(),
        "linear": {"factor"},
        "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    }
    kind = said.pop("rope_type")
    if kind not in [*wanted]:
        problems.append(f"{name}: rope_type = {kind!r} is not modelled; only {', '.join(wanted)} are")
        return theta, None
    if kind == "llama3":
        said.setdefault("original_max_position_embeddings", max_positions)
    odd = sorted((set(said) ^ wanted[kind]) | {key for key, value in said.items() if not _is_positive(value)})
    if odd:
        problems.append(f"{name}: {', '.join(odd)} missing, unknown or not a number above 0 for rope_type {kind!r}")
        return theta, None
    if kind == "linear":
        return theta, LinearRope(factor=float(said["factor"]))
    if kind == "llama3":
        if said["high_freq_factor"] <= said["low_freq_factor"]:
            problems.append(f"{name}: high_freq_factor must be greater than low_freq_factor")
        return theta, Llama3Rope(
            factor=float(said["factor"]),
            low_frequency_factor=float(said["low_freq_factor"]),
            high_frequency_factor=float(said["high_freq_factor"]),
            original_positions=int(said["original_max_position_embeddings"]),
        )
    return theta, None


def _write_rope_scaling(scaling: LinearRope | Llama3Rope | None) -> dict[str, Any] | None:
    match scaling:
        case None:
            return None
        case LinearRope():
            return {"rope_type": "linear", "factor": scaling.factor}
        case Llama3Rope():
            return {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_frequency_factor,
                "high_freq_factor": scaling.high_frequency_factor,
                "original_max_position_embeddings": scaling.original_positions,
            }
