"""Our logits of a loaded model, and how near they must be to transformers'."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_sft.hf.load import Pretrained
from jax_sft.model.decoder import build


def our_logits(model: Pretrained, tokens_BT: np.ndarray) -> np.ndarray:
    """Float32 logits [B, T, V]."""
    graphdef = build(model.config, dtype="float32", attention="xla")

    @jax.jit
    def logits(params: Any, tokens_BT: jax.Array) -> jax.Array:
        decoder = nnx.merge(graphdef, params)
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None], tokens_BT.shape)
        return decoder.logits(decoder.hidden(tokens_BT, positions_BT, jnp.ones_like(tokens_BT)))

    return np.asarray(logits(model.params, jnp.asarray(tokens_BT, jnp.int32)))


def assert_close(ours: np.ndarray, theirs: np.ndarray, *, largest: float | None = None) -> None:
    """No logit is off by more than 2e-4 of the largest."""
    assert np.abs(ours - theirs).max() <= 2e-4 * (np.abs(theirs).max() if largest is None else largest)
