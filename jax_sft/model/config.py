"""ModelConfig: one decoder-only transformer, in fields named for what they do and never for who has it.

In: numbers and switches (families.py reads them off a config.json). Out: the shapes of all parameters, their count, and
the floating point operations of a training step. Nothing here has a default: a field left out would be a silent guess.

V vocabulary, D model width, F MLP width, N query heads, K key/value heads, H head width, L layers, E experts.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from jax_sft.sharding import letters_of

Activation = Literal["silu", "gelu", "gelu_tanh"]
_PARTS = ("attn", "mlp")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearRope:
    """All rotary frequencies divided by `factor` (kind "linear")."""

    factor: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicRope:
    """A base that grows with texts longer than `original_positions` (kind "dynamic", NTK-aware)."""

    factor: float
    original_positions: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Rope:
    """Long wavelengths stretched by `factor`, short ones kept, a ramp between them (kind "llama3", Llama 3.1)."""

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_positions: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnRope:
    """Low frequencies stretched, high ones kept, a ramp over the components between (kind "yarn", arXiv 2309.00071)."""

    factor: float
    magnitude: float  # of cosine and sine
    fast_turns: float  # components that turn more often than this in the old context are kept
    slow_turns: float  # those that turn less often are stretched
    original_positions: int
    whole_bounds: bool  # the ends of the ramp are rounded outwards to whole components


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongRope:
    """A divisor for each frequency, of two sets by the length of the text (kind "longrope", arXiv 2402.13753)."""

    short_factors: tuple[float, ...]  # up to `original_positions` tokens
    long_factors: tuple[float, ...]
    magnitude: float  # of cosine and sine
    original_positions: int


RopeScaling = LinearRope | DynamicRope | Llama3Rope | YarnRope | LongRope


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary positions of a layer."""

    theta: float
    width: int  # how many components of a head are rotated: the first ones
    interleaved: bool  # a pair is two neighbours, 2i and 2i + 1, and not i and i + width / 2
    scaling: RopeScaling | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One decoder-only transformer; hashable, so that it can travel in a graphdef.

    Raises:
        ValueError: sizes that do not fit together.
    """

    model_type: str  # how its files are named and laid out; no arithmetic reads it
    vocab_size: int  # tokens that have logits
    vocab_rows: int  # V, of embedding and head: one for each token, and padding that a mesh axis can divide
    width: int  # D
    mlp_width: int  # F; of one expert, where there are experts
    num_layers: int  # L
    num_heads: int  # N
    num_kv_heads: int  # K
    head_width: int  # H
    max_positions: int  # the context the model was made for; changes no arithmetic
    windows: tuple[int | None, ...]  # of each layer: how many tokens back it sees, itself included; None: all
    ropes: tuple[Rope | None, ...]  # of each layer; None: it knows no positions
    norm: Literal["rms", "layer"]  # "layer" takes the mean off and has a bias
    norm_eps: float
    norm_offset: bool  # the scale is 1 + weight
    norm_in_float32: bool  # scaled before it is rounded to the computing dtype, and not after
    pre_norms: bool  # of what goes into attention and MLP
    post_norms: bool  # of what comes out of them
    qk_norm: Literal["none", "head", "width"]  # of queries and keys: each head by itself, or all heads together
    query_scale: float  # times q k, before the softmax
    score_cap: float | None  # attention scores are squeezed into +- this by a tanh
    attention_sinks: bool  # of each query head, a learned score of no key joins the softmax and takes its share
    logit_cap: float | None  # and so are logits
    embed_scale: float
    residual_scale: float  # times what attention and MLP add
    logit_scale: float
    activation: Activation
    silu_slope: float  # silu is x sigmoid(slope x)
    gated_mlp: bool  # act(gate) * up, and not act(up)
    gate_limit: float | None  # there, gate is cut off above this, and up beyond +- this
    up_offset: float  # added to up, after that
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool  # of each expert, where there are experts
    num_experts: int  # E: MLPs of a layer, of which a router chooses some for each token; 0: one MLP for all
    experts_per_token: int
    router_bias: bool
    router_normalised: bool  # weights of the chosen experts are divided by their sum
    router_aux_weight: float  # of the load-balancing loss, in training; changes no logits
    tied_head: bool

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "mlp_width", "num_layers", "num_heads", "num_kv_heads", "head_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"model config: {name} = {getattr(self, name)} must be at least 1")
        if self.vocab_rows < self.vocab_size:
            raise ValueError(
                f"model config: vocab_rows = {self.vocab_rows} must be at least vocab_size = {self.vocab_size}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model config: num_attention_heads = {self.num_heads} must be a multiple of num_key_value_heads = "
                f"{self.num_kv_heads}"
            )
        if self.num_experts and not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"model config: num_experts_per_tok = {self.experts_per_token} must be between 1 and the number of "
                f"experts, {self.num_experts}"
            )
        if self.num_experts and not self.gated_mlp:
            raise ValueError("model config: experts without a gate are not modelled; only gated ones are")
        if not len(self.windows) == len(self.ropes) == self.num_layers:
            raise ValueError(
                f"model config: {self.num_layers} layers, but windows for {len(self.windows)} and rotary positions for "
                f"{len(self.ropes)} of them; make layer_types and no_rope_layers name the kind of each layer"
            )
        kinds = {(rope.width, rope.interleaved) for rope in self.ropes if rope is not None}
        if len(kinds) > 1:
            raise ValueError(f"model config: layers rotate differently many or other components, {sorted(kinds)}")
        for width, _ in kinds:
            if width % 2 or not 0 < width <= self.head_width:
                raise ValueError(
                    f"model config: {width} of head_dim = {self.head_width} components are rotated; that must be even, "
                    "to be rotated in pairs, and not more than there are"
                )
        for scaling in {rope.scaling for rope in self.ropes if rope is not None}:
            if isinstance(scaling, LongRope):
                lengths = len(scaling.short_factors), len(scaling.long_factors)
                if any(2 * length != width for length in lengths for width, _ in kinds):
                    raise ValueError(
                        f"model config: rope has {lengths[0]} short and {lengths[1]} long factors, but not as many "
                        "pairs are rotated; there must be one for each pair"
                    )

    @property
    def sizes(self) -> dict[str, int]:
        """What each letter stands for."""
        return {
            "V": self.vocab_rows,
            "D": self.width,
            "F": self.mlp_width,
            "L": self.num_layers,
            "N": self.num_heads,
            "K": self.num_kv_heads,
            "H": self.head_width,
            "E": self.num_experts,
        }

    @property
    def shapes(self) -> dict[str, Any]:
        """The parameter tree, with shapes as leaves; every name ends in the letters of its axes."""
        has_bias = self.norm == "layer"
        norms = {part: [f"{part}_norm"] * self.pre_norms + [f"{part}_post_norm"] * self.post_norms for part in _PARTS}
        mlp = ["gate_LDF"] * self.gated_mlp + ["up_LDF", "down_LFD"]
        mlp_biases = ["gate_bias_LF"] * self.gated_mlp + ["up_bias_LF", "down_bias_LD"]
        if self.num_experts:
            mlp = ["router_LDE", "gate_LEDF", "up_LEDF", "down_LEFD"]
            mlp_biases = ["gate_bias_LEF", "up_bias_LEF", "down_bias_LED"]
        block = [f"{norm}_LD" for norm in norms["attn"]] + ["q_LDNH", "k_LDKH", "v_LDKH", "o_LNHD"]
        block += [f"{norm}_LD" for norm in norms["mlp"]] + mlp
        block += [f"{norm}_bias_LD" for part in _PARTS for norm in norms[part] if has_bias]
        block += {"none": [], "head": ["q_norm_LH", "k_norm_LH"], "width": ["q_norm_LNH", "k_norm_LKH"]}[self.qk_norm]
        block += ["q_bias_LNH", "k_bias_LKH", "v_bias_LKH"] if self.qkv_bias else []
        block += ["o_bias_LD"] if self.output_bias else []
        block += mlp_biases if self.mlp_bias else []
        block += ["router_bias_LE"] if self.num_experts and self.router_bias else []
        block += ["sinks_LN"] if self.attention_sinks else []
        top = ["embed_VD", "final_norm_D"] + ["final_norm_bias_D"] * has_bias + ["head_VD"] * (not self.tied_head)
        return {"blocks": {name: self._shape(name) for name in block}} | {name: self._shape(name) for name in top}

    @property
    def num_params(self) -> int:
        """Trainable numbers; a tied head counts once, and padding not at all."""
        shapes = dataclasses.replace(self, vocab_rows=self.vocab_size).shapes
        blocks = shapes.pop("blocks")
        return sum(math.prod(shape) for shape in [*blocks.values(), *shapes.values()])

    def train_flops(
        self,
        lengths: Sequence[int] | np.ndarray,
        *,
        predicted_tokens: int,
        trained_share: float = 1.0,
        is_head_trained: bool = True,
        adapter_weights: int = 0,
    ) -> int:
        """Floating point operations that a training step cannot avoid; the numerator of MFU.

        6 x (matmul weights of the layers) x tokens, for forward (2) and both backward products (4), plus the head at
        the predicted tokens alone, plus attention over the causal half of every segment, inside the layer's window.
        Of experts, those count that a token goes through. Frozen weights have one backward product less: 4, not 6.
        Padding, masked tokens, recomputation (remat) and the embedding lookup add nothing.

        Args:
            lengths: tokens of each segment in the step, over all devices and micro-batches; no padding.
            predicted_tokens: those that carry a target of weight above 0.
            trained_share: of the matmul weights of the layers.
            adapter_weights: numbers in the layers' adapters, all trained.
        """
        lengths = np.asarray(lengths, np.int64)
        per_layer = self.width * self.head_width * 2 * (self.num_heads + self.num_kv_heads)
        mlp = (3 if self.gated_mlp else 2) * self.width * self.mlp_width
        per_layer += mlp * self.experts_per_token + self.width * self.num_experts if self.num_experts else mlp
        of_layers = (4 + 2 * trained_share) * self.num_layers * per_layer + 6 * adapter_weights
        body = round(of_layers * int(lengths.sum()))
        head = (6 if is_head_trained else 4) * self.vocab_size * self.width * predicted_tokens
        twice_seen = 0  # twice the number of (query, key) pairs, over all layers
        for window in self.windows:
            out = lengths if window is None else np.minimum(lengths, window)
            twice_seen += int((out * (2 * lengths - out)).sum())
        return body + head + 6 * self.num_heads * self.head_width * twice_seen

    def _shape(self, name: str) -> tuple[int, ...]:
        sizes = self.sizes
        return tuple(sizes[letter] for letter in letters_of((name,)))
