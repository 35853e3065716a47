"""Decoder: tokens in, hidden states and logits out. One stack of blocks for every family; a family is a ModelConfig.

The layers' weights are stacked ([L, ...]) and run by one `lax.scan`. Flax NNX defines the module; it is split once:

    graphdef = build(config, dtype="bfloat16", attention="auto")      static, hashable
    model = nnx.merge(graphdef, params)                               params: a pure nested dict, e.g. from the hf room
    h_BTD = model.hidden(tokens_BT, positions_BT, segments_BT)

B batch row, T position, S slot of the cache, D model width, F MLP width, N/K heads, H head width, V vocabulary,
L layers.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jax_sft.model.attention import KVCache, attention, cached_attention, check_backend
from jax_sft.model.config import ModelConfig
from jax_sft.model.layers import activate, project, rms_norm, rope_angles, rope_frequencies, rotate
from jax_sft.sharding import constrain

Rope = tuple[jax.Array, jax.Array]
Weights = Mapping[str, jax.Array]  # of one layer: names as in the tree, without the L


class Decoder(nnx.Module):
    """A decoder-only transformer; computes in `dtype` whatever dtype its weights are stored in.

    Raises:
        ValueError: `attention` is no backend.
    """

    def __init__(self, config: ModelConfig, *, dtype: Any, attention: str, rngs: nnx.Rngs) -> None:
        check_backend(attention)
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.attention = attention
        shapes = config.shapes
        self.embed_VD = _initial("embed_VD", shapes["embed_VD"], rngs)
        self.blocks = nnx.Dict({name: _initial(name, shape, rngs) for name, shape in shapes["blocks"].items()})
        self.final_norm_D = _initial("final_norm_D", shapes["final_norm_D"], rngs)
        if not config.tied_head:
            self.head_VD = _initial("head_VD", shapes["head_VD"], rngs)

    def hidden(
        self, tokens_BT: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array, *, remat: str = "none"
    ) -> jax.Array:
        """Hidden states [B, T, D] of packed rows after the last norm, in the computing dtype.

        `remat` says what the backward pass finds stored: everything ("none"), matmul and attention results ("dots"),
        the input of each block ("full"), or that and the attention result in host memory ("offload").
        A token outside the vocabulary makes NaN rather than a wrong answer.

        Raises:
            ValueError: `remat` is none of these.
        """
        x_BTD = self._embed(tokens_BT)
        rope = self._rope(positions_BT)

        def body(x_BTD: jax.Array, weights: Weights) -> tuple[jax.Array, None]:
            return self._block(x_BTD, weights, rope, segments_BT), None

        x_BTD, _ = jax.lax.scan(_rematerialise(body, remat), x_BTD, self._layers())
        return rms_norm(x_BTD, self.final_norm_D[...], self.config.norm_eps)

    def head(self) -> jax.Array:
        """The output matrix [V, D] as stored; the embedding itself when tied."""
        return self.embed_VD[...] if self.config.tied_head else self.head_VD[...]

    def logits(self, h_BTD: jax.Array) -> jax.Array:
        """Float32 logits [B, T, V]. Training uses the chunked loss instead, which never holds all of them."""
        head_VD = self.head().astype(h_BTD.dtype)
        logits_BTV = jnp.einsum("BTD,VD->BTV", h_BTD, head_VD, preferred_element_type=jnp.float32)
        return constrain(logits_BTV, "BTV")

    def empty_cache(self, rows: int, slots: int) -> KVCache:
        """A cache for `rows` sequences of at most `slots` tokens, in the computing dtype."""
        config = self.config
        shape = (config.num_layers, rows, slots, config.num_kv_heads, config.head_width)
        k_LBSKH, v_LBSKH = (constrain(jnp.zeros(shape, self.dtype), "LBSKH") for _ in range(2))
        return KVCache(k_LBSKH, v_LBSKH, jnp.zeros(rows, jnp.int32))

    def decode(
        self, tokens_BT: jax.Array, cache: KVCache, lengths_B: jax.Array | None = None
    ) -> tuple[jax.Array, KVCache]:
        """Continue each row by its next tokens: whole prompts padded on the right, then one token at a time.

            tokens_BT   5 6 7     lengths_B   3     logits_BV   after the 7
                        8 - -                 1                 after the 8

        Args:
            tokens_BT: new tokens; those past the length of their row are never stored.
            cache: what came before; donate it under jit, it is updated in place.
            lengths_B: how many tokens of each row are real; None: all of them. A row of 0 keeps its cache, and its
                logits mean nothing. A token past the last slot is not stored: make the cache long enough.

        Returns:
            float32 logits [B, V] after the last real token of each row, and the longer cache.
        """
        B, T = tokens_BT.shape
        S = cache.k_LBSKH.shape[2]
        lengths_B = jnp.full(B, T, jnp.int32) if lengths_B is None else lengths_B
        new_T = jnp.arange(T, dtype=jnp.int32)
        slots_BT = cache.length_B[:, None] + new_T[None, :]
        store_BT = jnp.where(new_T[None, :] < lengths_B[:, None], slots_BT, S)  # slot S does not exist: dropped
        rows_B1 = jnp.arange(B, dtype=jnp.int32)[:, None]
        rope = self._rope(slots_BT)

        # The cache is a carry, updated in place; as scanned inputs and outputs it would be copied at every token.
        def body(
            carry: tuple[jax.Array, ...], of_layer: tuple[jax.Array, Weights]
        ) -> tuple[tuple[jax.Array, ...], None]:
            x_BTD, k_LBSKH, v_LBSKH = carry
            layer, weights = of_layer
            q_BTNH, k_BTKH, v_BTKH = self._project_qkv(x_BTD, weights, rope)
            k_LBSKH = k_LBSKH.at[layer, rows_B1, store_BT].set(k_BTKH, mode="drop")
            v_LBSKH = v_LBSKH.at[layer, rows_B1, store_BT].set(v_BTKH, mode="drop")
            attended_BTNH = cached_attention(
                q_BTNH, k_LBSKH[layer], v_LBSKH[layer], slots_BT=slots_BT, backend=self.attention
            )
            return (self._add_and_mlp(x_BTD, attended_BTNH, weights), k_LBSKH, v_LBSKH), None

        layers = (jnp.arange(self.config.num_layers, dtype=jnp.int32), self._layers())
        carry, _ = jax.lax.scan(body, (self._embed(tokens_BT), cache.k_LBSKH, cache.v_LBSKH), layers)
        x_BTD, k_LBSKH, v_LBSKH = carry
        last_B11 = jnp.maximum(lengths_B - 1, 0)[:, None, None]
        x_B1D = rms_norm(jnp.take_along_axis(x_BTD, last_B11, axis=1), self.final_norm_D[...], self.config.norm_eps)
        return self.logits(x_B1D)[:, 0], KVCache(k_LBSKH, v_LBSKH, cache.length_B + lengths_B)

    def _embed(self, tokens_BT: jax.Array) -> jax.Array:
        # Looked up before the cast: the gradient of a token that occurs often is then summed in the stored dtype.
        x_BTD = jnp.take(self.embed_VD[...], tokens_BT, axis=0, mode="fill", fill_value=jnp.nan)
        return constrain(x_BTD.astype(self.dtype), "BTD")

    def _rope(self, positions_BT: jax.Array) -> Rope:
        config = self.config
        return rope_angles(positions_BT, rope_frequencies(config.head_width, config.rope_theta, config.rope_scaling))

    def _layers(self) -> dict[str, jax.Array]:
        """Stacked weights under the names that they have inside the scan, where the L is gone: q_LDNH as q_DNH."""
        return {name.replace("_L", "_", 1): stacked[...] for name, stacked in self.blocks.items()}

    def _block(self, x_BTD: jax.Array, weights: Weights, rope: Rope, segments_BT: jax.Array) -> jax.Array:
        x_BTD = checkpoint_name(x_BTD, "block_input")
        q_BTNH, k_BTKH, v_BTKH = self._project_qkv(x_BTD, weights, rope)
        attended_BTNH = attention(q_BTNH, k_BTKH, v_BTKH, segments_BT=segments_BT, backend=self.attention)
        return self._add_and_mlp(x_BTD, checkpoint_name(attended_BTNH, "attended"), weights)

    def _project_qkv(self, x_BTD: jax.Array, weights: Weights, rope: Rope) -> tuple[jax.Array, jax.Array, jax.Array]:
        normed_BTD = rms_norm(x_BTD, weights["attn_norm_D"], self.config.norm_eps)
        q_BTNH = project("BTD,DNH->BTNH", normed_BTD, weights["q_DNH"], weights.get("q_bias_NH"))
        k_BTKH = project("BTD,DKH->BTKH", normed_BTD, weights["k_DKH"], weights.get("k_bias_KH"))
        v_BTKH = project("BTD,DKH->BTKH", normed_BTD, weights["v_DKH"], weights.get("v_bias_KH"))
        q_BTNH, k_BTKH = rotate(q_BTNH, *rope), rotate(k_BTKH, *rope)
        return constrain(q_BTNH, "BTNH"), constrain(k_BTKH, "BTKH"), constrain(v_BTKH, "BTKH")

    def _add_and_mlp(self, x_BTD: jax.Array, attended_BTNH: jax.Array, weights: Weights) -> jax.Array:
        x_BTD += project("BTNH,NHD->BTD", attended_BTNH, weights["o_NHD"], weights.get("o_bias_D"))
        normed_BTD = rms_norm(x_BTD, weights["mlp_norm_D"], self.config.norm_eps)
        gate_BTF = project("BTD,DF->BTF", normed_BTD, weights["gate_DF"], weights.get("gate_bias_F"))
        up_BTF = project("BTD,DF->BTF", normed_BTD, weights["up_DF"], weights.get("up_bias_F"))
        inner_BTF = constrain(activate(gate_BTF, self.config.activation) * up_BTF, "BTF")
        x_BTD += project("BTF,FD->BTD", inner_BTF, weights["down_FD"], weights.get("down_bias_D"))
        return constrain(x_BTD, "BTD")


def build(config: ModelConfig, *, dtype: Any, attention: str) -> nnx.GraphDef[Decoder]:
    """The static half of a Decoder; `nnx.merge(graphdef, params)` or `(graphdef, params, frozen)` makes it whole."""
    abstract = nnx.eval_shape(lambda: Decoder(config, dtype=dtype, attention=attention, rngs=nnx.Rngs(0)))
    return nnx.split(abstract)[0]


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


def _initial(name: str, shape: tuple[int, ...], rngs: nnx.Rngs) -> nnx.Param:
    if "norm" in name:
        return nnx.Param(jnp.ones(shape, jnp.float32))
    if "bias" in name:
        return nnx.Param(jnp.zeros(shape, jnp.float32))
    return nnx.Param(0.02 * jax.random.normal(rngs.params(), shape, jnp.float32))


def _rematerialise(body: Callable[..., Any], remat: str) -> Callable[..., Any]:
    """`body` with its policy for the backward pass; inside a scan there is no common subexpression to guard against."""
    policies = jax.checkpoint_policies
    match remat:
        case "none":
            return body
        case "dots":
            # Without the attention result the backward pass would run the scores twice in the chunked backend.
            keep = policies.save_from_both_policies(
                policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names("attended")
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
