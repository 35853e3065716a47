"""Decoder: tokens in, hidden states and logits out. One stack of blocks for every family; a family is a ModelConfig.

The layers' weights are stacked ([L, ...]) and run by one `lax.scan`. Flax NNX defines the module; it is split once:

    graphdef = build(config, dtype="bfloat16", attention="auto")      static, hashable
    model = nnx.merge(graphdef, params)                               params: a pure nested dict, e.g. from the hf room
    h_BTD = model.hidden(tokens_BT, positions_BT, segments_BT)

B batch row, T position, S slot of the cache, D model width, F MLP width, N/K heads, H head width, V vocabulary,
L layers, E experts.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jax_sft.model.attention import KVCache, Scores, attention, cached_attention, check_backend, put_in_rows
from jax_sft.model.config import ModelConfig, Rope
from jax_sft.model.experts import Biases, Load, Routing, apply_experts, imbalance, load_of, low_rank, route
from jax_sft.model.layers import (
    Gating,
    activate,
    capped,
    depends_on_length,
    gated,
    layer_norm,
    rms_norm,
    rope_angles,
    rotate,
)
from jax_sft.model.lora import Lora, both_factors
from jax_sft.model.projection import Dropout, Weights, project
from jax_sft.model.quantize import Quantized, dense
from jax_sft.sharding import constrain

Angles = tuple[jax.Array, jax.Array]  # cosine and sine
DTYPES = ("float32", "bfloat16", "float16")
_ALL = 2**30  # a window that ends nowhere
_EXPERTS = ("gate_EDF", "up_EDF", "down_EFD")


class Decoder(nnx.Module):
    """A decoder-only transformer; computes in `dtype` whatever dtype its weights are stored in.

    Raises:
        ValueError: `attention` is no backend, or `dtype` is not one of `DTYPES`.
    """

    def __init__(
        self, config: ModelConfig, *, dtype: Any, attention: str, rngs: nnx.Rngs, lora: Lora | None = None
    ) -> None:
        check_backend(attention)
        self.config = config
        self.dtype = float_dtype(dtype)
        self.attention = attention
        shapes = config.shapes

        def initial(name: str, shape: tuple[int, ...]) -> nnx.Param:
            if "bias" in name or ("norm" in name and config.norm_offset):
                return nnx.Param(jnp.zeros(shape, jnp.float32))
            if "norm" in name:
                return nnx.Param(jnp.ones(shape, jnp.float32))
            return nnx.Param(0.02 * jax.random.normal(rngs.params(), shape, jnp.float32))

        self.embed_VD = initial("embed_VD", shapes["embed_VD"])
        self.blocks = nnx.Dict({name: initial(name, shape) for name, shape in shapes["blocks"].items()})
        self.final_norm_D = initial("final_norm_D", shapes["final_norm_D"])
        if config.norm == "layer":
            self.final_norm_bias_D = initial("final_norm_bias_D", shapes["final_norm_bias_D"])
        if not config.tied_head:
            self.head_VD = initial("head_VD", shapes["head_VD"])
        self.adaptation = lora
        if lora is not None:
            self.lora = _params_of(lora.shapes(config.sizes)["lora"])

    def hidden(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        segments_BT: jax.Array,
        *,
        remat: str = "none",
        dropout_keys_B: jax.Array | None = None,
    ) -> jax.Array:
        """What the head multiplies, [B, T, D], of packed rows: after the last norm, in the computing dtype.

        `remat` says what the backward pass finds stored: everything ("none"), matmul and attention results ("dots"),
        the input of each block ("full"), or that and the attention result in host memory ("offload").
        A token outside the vocabulary makes NaN rather than a wrong answer. With keys of its rows, what goes into
        adapters loses a part to dropout, as in training.

        Raises:
            ValueError: `remat` is none of these.
        """
        return self._hidden(tokens_BT, positions_BT, segments_BT, remat, dropout_keys_B)[0]

    def hidden_and_imbalance(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        segments_BT: jax.Array,
        *,
        remat: str = "none",
        dropout_keys_B: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """`hidden`, and how unevenly the router spreads the tokens over the experts: see `experts.imbalance`."""
        h_BTD, load_L = self._hidden(tokens_BT, positions_BT, segments_BT, remat, dropout_keys_B)
        return h_BTD, jnp.float32(0) if load_L is None else imbalance(load_L, segments_BT > 0)

    def head(self) -> jax.Array:
        """The output matrix [V, D] as stored; the embedding itself when tied."""
        return self.embed_VD[...] if self.config.tied_head else self.head_VD[...]

    def head_adapter(
        self, h_BTD: jax.Array, *, dropout_keys_B: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array] | None:
        """What an adapter adds to the logits, in two factors, [B, T, R] and [V, R]; None if the head has none."""
        found = self._adapter("head_VD")
        if found is None:
            return None
        factors, scale = found
        a_DR, b_RV = both_factors(factors)
        seen_BTD = h_BTD if dropout_keys_B is None else self._dropout(dropout_keys_B)(h_BTD, "head")
        u_BTR = jnp.einsum("BTD,DR->BTR", seen_BTD, a_DR.astype(h_BTD.dtype)) * jnp.asarray(scale, h_BTD.dtype)
        return u_BTR, b_RV.T

    def logits(self, h_BTD: jax.Array) -> jax.Array:
        """Float32 logits [B, T, vocab_size]. Training uses the chunked loss instead, which never holds all of them."""
        head_VD = self.head().astype(h_BTD.dtype)
        logits_BTV = jnp.einsum("BTD,VD->BTV", h_BTD, head_VD, preferred_element_type=jnp.float32)
        if (low_rank := self.head_adapter(h_BTD)) is not None:
            u_BTR, b_VR = low_rank
            b_VR = b_VR.astype(h_BTD.dtype)
            logits_BTV += jnp.einsum("BTR,VR->BTV", u_BTR, b_VR, preferred_element_type=jnp.float32)
        return constrain(capped(logits_BTV, self.config.logit_cap), "BTV")[..., : self.config.vocab_size]

    def prefill(self, tokens_BT: jax.Array, lengths_B: jax.Array, *, slots: int) -> tuple[jax.Array, KVCache]:
        """Read whole prompts, padded on the right, into a new cache.

            tokens_BT   5 6 7     lengths_B   3     logits_BV   after the 7
                        8 - -                 1                 after the 8

        Args:
            tokens_BT: prompts; what stands in the padding has no effect, if it is in the vocabulary.
            lengths_B: tokens of each prompt, at least 1.
            slots: tokens a row of the cache can hold, prompt included; at least T.

        Returns:
            float32 logits [B, V] after the last token of each prompt, and the cache, in the computing dtype.
        """
        positions_T = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)
        segments_BT = jnp.ones_like(tokens_BT)  # padding comes last: causality alone hides it from the prompt
        positions_BT = jnp.broadcast_to(positions_T[None, :], tokens_BT.shape)
        angles = self._angles(positions_BT, lambda: jnp.broadcast_to(lengths_B[:, None], tokens_BT.shape))

        def body(x_BTD: jax.Array, weights: Weights) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            q_BTNH, k_BTKH, v_BTKH = self._project_qkv(x_BTD, weights, angles)
            attended_BTNH = self._attend(q_BTNH, k_BTKH, v_BTKH, weights, segments_BT)
            return self._add_and_mlp(x_BTD, attended_BTNH, weights)[0], (k_BTKH, v_BTKH)

        x_BTD, kv_LBTKH = jax.lax.scan(body, self._embed(tokens_BT), self._layers())
        room = [(0, 0), (0, 0), (0, slots - tokens_BT.shape[1]), (0, 0), (0, 0)]
        k_LBSKH, v_LBSKH = (constrain(jnp.pad(x_LBTKH, room), "LBSKH") for x_LBTKH in kv_LBTKH)
        x_B1D = jnp.take_along_axis(x_BTD, lengths_B[:, None, None] - 1, axis=1)
        return self._last_logits(x_B1D), KVCache(k_LBSKH, v_LBSKH, lengths_B)

    def decode(self, tokens_B: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """Continue each row by one token: float32 logits [B, V] after it, and the cache that holds it.

        Donate the cache under jit. A row that is full (`length_B` = slots) stays as it is and its logits mean nothing.
        """
        slots_S = jnp.arange(cache.k_LBSKH.shape[2], dtype=jnp.int32)
        is_new_BS11 = (slots_S[None, :] == cache.length_B[:, None])[:, :, None, None]
        angles = self._angles(cache.length_B[:, None], lambda: cache.length_B[:, None] + 1)

        def body(x_B1D: jax.Array, of_layer: tuple[Weights, jax.Array, jax.Array]) -> tuple[jax.Array, Any]:
            weights, k_BSKH, v_BSKH = of_layer
            q_B1NH, k_B1KH, v_B1KH = self._project_qkv(x_B1D, weights, angles)
            k_BSKH, v_BSKH = jnp.where(is_new_BS11, k_B1KH, k_BSKH), jnp.where(is_new_BS11, v_B1KH, v_BSKH)
            scores = self._scores(weights)
            attended_B1NH = cached_attention(q_B1NH, k_BSKH, v_BSKH, last_slot_B=cache.length_B, scores=scores)
            return self._add_and_mlp(x_B1D, attended_B1NH, weights)[0], (k_B1KH, v_B1KH)

        layers = (self._layers(), cache.k_LBSKH, cache.v_LBSKH)
        x_B1D, (k_LB1KH, v_LB1KH) = jax.lax.scan(body, self._embed(tokens_B[:, None]), layers)
        longer = KVCache(
            k_LBSKH=put_in_rows(cache.k_LBSKH, k_LB1KH, cache.length_B),
            v_LBSKH=put_in_rows(cache.v_LBSKH, v_LB1KH, cache.length_B),
            length_B=cache.length_B + 1,
        )
        return self._last_logits(x_B1D), longer

    def _hidden(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        segments_BT: jax.Array,
        remat: str,
        dropout_keys_B: jax.Array | None,
    ) -> tuple[jax.Array, Load | None]:
        angles = self._angles(positions_BT, lambda: _segment_lengths(positions_BT, segments_BT))
        layers = self._layers()
        if dropout_keys_B is not None:
            layers["layer"] = jnp.arange(self.config.num_layers, dtype=jnp.uint32)

        def body(x_BTD: jax.Array, weights: Weights) -> tuple[jax.Array, Load | None]:
            dropout = None
            if dropout_keys_B is not None:
                dropout = self._dropout(dropout_keys_B).of_layer(weights["layer"])
            return self._block(x_BTD, weights, angles, segments_BT, dropout)

        x_BTD, load_L = jax.lax.scan(_rematerialise(body, remat), self._embed(tokens_BT), layers)
        return self._final(x_BTD), load_L

    def _dropout(self, keys_B: jax.Array) -> Dropout:
        assert self.adaptation is not None, "dropout is that of adapters"
        return Dropout(keys_B, self.adaptation.dropout)

    def _adapter(self, path: str) -> tuple[dict[str, jax.Array], float] | None:
        """Factors and scale of a weight that is not one of the blocks'."""
        target = next((t for t in self.adaptation.targets if t.path == path), None) if self.adaptation else None
        return None if target is None else ({k: v[...] for k, v in self.lora[path].items()}, target.scales[0])

    def _last_logits(self, x_B1D: jax.Array) -> jax.Array:
        h_B1D = self._final(x_B1D)
        # A second row: XLA:CPU multiplies a single bfloat16 row ten times slower than two.
        h_2B1D = jnp.concatenate([h_B1D, h_B1D]) if h_B1D.shape[0] == 1 else h_B1D
        return self.logits(h_2B1D)[: x_B1D.shape[0], 0]

    def _embed(self, tokens_BT: jax.Array) -> jax.Array:
        # Gathered over fsdp first: a lookup in a table cut along D cannot be moved to rows cut along B efficiently.
        embed_VD = constrain(self.embed_VD[...], "VD")
        if self.config.vocab_rows > self.config.vocab_size:
            tokens_BT = jnp.where(tokens_BT < self.config.vocab_size, tokens_BT, self.config.vocab_rows)
        # Looked up before the cast: the gradient of a token that occurs often is then summed in the stored dtype.
        x_BTD = jnp.take(embed_VD, tokens_BT, axis=0, mode="fill", fill_value=jnp.nan)
        if (found := self._adapter("embed_VD")) is not None:
            factors, scale = found
            a_VR, b_RD = both_factors(factors)
            u_BTR = jnp.take(constrain(a_VR, "VR"), tokens_BT, axis=0, mode="fill", fill_value=jnp.nan)
            x_BTD = x_BTD.astype(jnp.float32) + scale * jnp.einsum("BTR,RD->BTD", u_BTR, b_RD)
        x_BTD = x_BTD.astype(self.dtype)
        if self.config.embed_scale != 1:
            x_BTD *= jnp.asarray(self.config.embed_scale, self.dtype)
        return constrain(x_BTD, "BTD")

    def _final(self, x_BTD: jax.Array) -> jax.Array:
        bias = {"final_norm_bias_D": self.final_norm_bias_D[...]} if self.config.norm == "layer" else {}
        h_BTD = self._norm(x_BTD, {"final_norm_D": self.final_norm_D[...], **bias}, "final_norm")
        return h_BTD if self.config.logit_scale == 1 else h_BTD * self.config.logit_scale

    def _angles(self, positions_BT: jax.Array, lengths: Callable[[], jax.Array]) -> Angles | None:
        """Cosine and sine of every kind of rope that the layers have: [B, T, 1, H / 2], with several R in front."""
        kinds = self._rope_kinds()
        lengths_BT = lengths() if any(rope is not None and depends_on_length(rope) for rope in kinds) else None
        turned: dict[Rope | None, Angles] = {}
        for rope in kinds:
            if rope is not None:
                turned[rope] = rope_angles(positions_BT, lengths_BT, rope)
        if not turned:
            return None
        cos_BT1H, sin_BT1H = next(iter(turned.values()))
        turned[None] = jnp.ones_like(cos_BT1H), jnp.zeros_like(sin_BT1H)  # turned by nothing: exactly as it was
        if len(kinds) == 1:
            return turned[kinds[0]]
        cos, sin = zip(*(turned[rope] for rope in kinds), strict=True)
        return jnp.stack(cos), jnp.stack(sin)

    def _rope_kinds(self) -> list[Rope | None]:
        return list(dict.fromkeys(self.config.ropes))

    def _layers(self) -> dict[str, Any]:
        """Stacked weights under the names that they have inside the scan, where the L is gone: q_LDNH as q_DNH.

        Where the layers differ in them, "window" and "rope" say which is theirs; "adapters" holds factors and scales.
        """

        def named(stacks: Mapping[str, nnx.Variable]) -> dict[str, Any]:
            # `get_value`, since what is quantised is several arrays and cannot be indexed.
            return {name.replace("_L", "_", 1): stacked.get_value() for name, stacked in stacks.items()}

        layers = named(self.blocks)
        if self.adaptation is not None and "blocks" in self.lora:
            scales = {t.path.removeprefix("blocks."): jnp.array(t.scales, jnp.float32) for t in self.adaptation.targets}
            layers["adapters"] = {
                name.replace("_L", "_", 1): {**named(factors), "scale": scales[name]}
                for name, factors in self.lora["blocks"].items()
            }
        windows, kinds = self.config.windows, self._rope_kinds()
        if len(set(windows)) > 1:
            layers["window"] = jnp.array([_ALL if w is None else w for w in windows], jnp.int32)
        if len(kinds) > 1:
            layers["rope"] = jnp.array([kinds.index(rope) for rope in self.config.ropes], jnp.int32)
        return layers

    def _norm(self, x: jax.Array, weights: Weights, name: str) -> jax.Array:
        """The norm of that name, over the axes that its scale has."""
        config = self.config
        scale = next(w for key, w in weights.items() if key.rsplit("_", 1)[0] == name)
        if config.norm_offset:
            scale = 1 + scale.astype(jnp.float32)
        if config.norm == "layer":
            return layer_norm(x, scale, weights[f"{name}_bias_D"], config.norm_eps)
        return rms_norm(x, scale, config.norm_eps, in_float32=config.norm_in_float32)

    def _block(
        self,
        x_BTD: jax.Array,
        weights: Weights,
        angles: Angles | None,
        segments_BT: jax.Array,
        dropout: Dropout | None = None,
    ) -> tuple[jax.Array, Load | None]:
        x_BTD = checkpoint_name(x_BTD, "block_input")
        q_BTNH, k_BTKH, v_BTKH = self._project_qkv(x_BTD, weights, angles, dropout)
        attended_BTNH = self._attend(q_BTNH, k_BTKH, v_BTKH, weights, segments_BT)
        x_BTD, routing = self._add_and_mlp(x_BTD, checkpoint_name(attended_BTNH, "attended"), weights, dropout)
        return x_BTD, None if routing is None else load_of(routing, segments_BT > 0)

    def _project_qkv(
        self, x_BTD: jax.Array, weights: Weights, angles: Angles | None, dropout: Dropout | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        config = self.config
        normed_BTD = self._norm(x_BTD, weights, "attn_norm") if config.pre_norms else x_BTD
        q_BTNH, k_BTKH, v_BTKH = project(normed_BTD, weights, "q_DNH", "k_DKH", "v_DKH", dropout=dropout)
        if config.qk_norm != "none":
            q_BTNH, k_BTKH = self._norm(q_BTNH, weights, "q_norm"), self._norm(k_BTKH, weights, "k_norm")
        if angles is not None:
            cos, sin = angles if "rope" not in weights else (x[weights["rope"]] for x in angles)
            interleaved = any(rope is not None and rope.interleaved for rope in config.ropes)
            q_BTNH = rotate(q_BTNH, cos, sin, interleaved=interleaved)
            k_BTKH = rotate(k_BTKH, cos, sin, interleaved=interleaved)
        return constrain(q_BTNH, "BTNH"), constrain(k_BTKH, "BTKH"), constrain(v_BTKH, "BTKH")

    def _scores(self, weights: Weights) -> Scores:
        config = self.config
        window, sinks_N = weights.get("window", config.windows[0]), weights.get("sinks_N")
        return Scores(scale=config.query_scale, cap=config.score_cap, sinks_N=sinks_N, window=window)

    def _attend(
        self, q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, weights: Weights, segments_BT: jax.Array
    ) -> jax.Array:
        scores = self._scores(weights)
        return attention(q_BTNH, k_BTKH, v_BTKH, segments_BT=segments_BT, scores=scores, backend=self.attention)

    def _add_and_mlp(
        self, x_BTD: jax.Array, attended_BTNH: jax.Array, weights: Weights, dropout: Dropout | None = None
    ) -> tuple[jax.Array, Routing | None]:
        config = self.config

        def add(x_BTD: jax.Array, out_BTD: jax.Array, part: str) -> jax.Array:
            if config.post_norms:
                out_BTD = self._norm(out_BTD, weights, f"{part}_post_norm")
            return x_BTD + (out_BTD if config.residual_scale == 1 else out_BTD * config.residual_scale)

        x_BTD = add(x_BTD, project(attended_BTNH, weights, "o_NHD", dropout=dropout)[0], "attn")
        normed_BTD = self._norm(x_BTD, weights, "mlp_norm") if config.pre_norms else x_BTD
        out_BTD, routing = (
            self._experts(normed_BTD, weights)
            if config.num_experts
            else (self._mlp(normed_BTD, weights, dropout), None)
        )
        return constrain(add(x_BTD, out_BTD, "mlp"), "BTD"), routing

    def _experts(self, normed_BTD: jax.Array, weights: Weights) -> tuple[jax.Array, Routing]:
        config = self.config
        routing = route(
            normed_BTD,
            weights["router_DE"],
            weights.get("router_bias_E"),
            experts_per_token=config.experts_per_token,
            normalised=config.router_normalised,
        )
        kernels = [weights[name] for name in _EXPERTS]
        adapters = [low_rank(weights.get("adapters", {}).get(name)) for name in _EXPERTS]
        biases = (
            Biases(weights["gate_bias_EF"], weights["up_bias_EF"], weights["down_bias_ED"]) if config.mlp_bias else None
        )

        def apply(normed_BTD: jax.Array, routing: Routing, kernels: Sequence[Any], biases: Any, adapters: Any) -> Any:
            gate_EDF, up_EDF, down_EFD = (dense(kernel, normed_BTD.dtype) for kernel in kernels)
            gating = self._gating()
            return apply_experts(normed_BTD, routing, gate_EDF, up_EDF, down_EFD, biases, adapters, gating=gating)

        if any(isinstance(kernel, Quantized) for kernel in kernels):
            # Dequantised anew in the backward pass, as in `project`, but no product and no sorting is done again.
            keep = jax.checkpoint_policies.save_only_these_names("grouped", "sorted")
            apply = jax.checkpoint(apply, prevent_cse=False, policy=keep)
        out_BTD = apply(normed_BTD, routing, kernels, biases, adapters)
        return out_BTD, routing

    def _mlp(self, normed_BTD: jax.Array, weights: Weights, dropout: Dropout | None) -> jax.Array:
        config = self.config
        if config.gated_mlp:
            up_BTF, gate_BTF = project(normed_BTD, weights, "up_DF", "gate_DF", dropout=dropout)
            inner_BTF = constrain(gated(gate_BTF, up_BTF, self._gating()), "BTF")
        else:
            (up_BTF,) = project(normed_BTD, weights, "up_DF", dropout=dropout)
            inner_BTF = constrain(activate(up_BTF, config.activation, silu_slope=config.silu_slope), "BTF")
        return project(inner_BTF, weights, "down_FD", dropout=dropout)[0]

    def _gating(self) -> Gating:
        config = self.config
        return Gating(
            activation=config.activation,
            silu_slope=config.silu_slope,
            limit=config.gate_limit,
            up_offset=config.up_offset,
        )


def _params_of(shapes: Mapping[str, Any]) -> nnx.Dict:
    """Params of zeros, at the places of a tree of shapes."""
    return nnx.Dict(
        {k: _params_of(v) if isinstance(v, Mapping) else nnx.Param(jnp.zeros(v)) for k, v in shapes.items()}
    )


def _segment_lengths(positions_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """How many tokens the segment of each token has: its last position, and one."""

    def of_row(positions_T: jax.Array, segments_T: jax.Array) -> jax.Array:
        last = jax.ops.segment_max(positions_T, segments_T, num_segments=len(positions_T) + 1)
        return last[segments_T] + 1

    return jax.vmap(of_row)(positions_BT, segments_BT)


def build(config: ModelConfig, *, dtype: Any, attention: str, lora: Lora | None = None) -> nnx.GraphDef[Decoder]:
    """The static half of a Decoder; `nnx.merge(graphdef, params)` or `(graphdef, params, frozen)` makes it whole."""
    abstract = nnx.eval_shape(lambda: Decoder(config, dtype=dtype, attention=attention, rngs=nnx.Rngs(0), lora=lora))
    return nnx.split(abstract)[0]


def float_dtype(dtype: Any) -> jnp.dtype:
    """What `dtype` names.

    Raises:
        ValueError: it is not one of `DTYPES`.
    """
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found.name not in DTYPES:
        raise ValueError(f"dtype = {dtype!r} is not one of {', '.join(DTYPES)}; name one of them in full")
    return found


def abstract_params(config: ModelConfig, dtype: Any = jnp.float32) -> dict[str, Any]:
    """The parameter tree as `jax.ShapeDtypeStruct`s; nothing is allocated."""
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, dtype), config.shapes, is_leaf=lambda node: isinstance(node, tuple)
    )


def random_params(config: ModelConfig, seed: int) -> dict[str, Any]:
    """Fresh float32 weights: normal of deviation 0.02, norms 1, biases 0."""

    @jax.jit
    def make() -> dict[str, Any]:
        model = Decoder(config, dtype=jnp.float32, attention="auto", rngs=nnx.Rngs(seed))
        return nnx.to_pure_dict(nnx.state(model))

    return make()


def _rematerialise(body: Callable[..., Any], remat: str) -> Callable[..., Any]:
    """`body` with its policy for the backward pass; inside a scan there is no common subexpression to guard against."""
    policies = jax.checkpoint_policies
    match remat:
        case "none":
            return body
        case "dots":
            # Without the attention result the backward pass would run the scores twice in the chunked backend.
            keep = policies.save_from_both_policies(
                policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names("attended", "grouped")
            )
        case "full":
            keep = policies.nothing_saveable
        case "offload":
            keep = policies.save_and_offload_only_these_names(
                names_which_can_be_saved=[],
                names_which_can_be_offloaded=["block_input", "attended"],
                offload_src="device",
                offload_dst="pinned_host",
            )
        case _:
            raise ValueError(f"train.remat = {remat!r} is not a policy; choose none, dots, full or offload")
    return jax.checkpoint(body, prevent_cse=False, policy=keep)
