"""Next-token loss at the positions that carry a target, as sums and never as means; full logits never exist.

In: final hidden states of packed rows, the head's weight, a Batch. Out: one scalar to differentiate, sum(weight x nll),
and a Tally of sums by source. Dividing is left to whoever has added up everything.
Tokens go through the head in chunks; the gradient of a chunk is computed together with its loss (as in Liger Kernel,
arXiv 2410.10989), so the head's matmul is not repeated in the backward pass: 6 instead of 8 FLOPs a weight and token.
Letters: B row, T position, P predicted position, D width, V vocabulary; Z device with rows of its own, X chunk, C token
of a chunk, O source of data.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from jax_sft.batch import Batch
from jax_sft.model.layers import capped
from jax_sft.sharding import batch_shards, constrain

_LOWEST = -0.7 * float(jnp.finfo(jnp.float32).max)  # finite, so that it makes no inf - inf
_ALIGNMENT = 64  # chunk sizes are multiples of it where chunk_tokens is: what matrix units like


class Tally(NamedTuple):
    """Sums over predicted tokens, by source: float32 [num_sources] each. Tallies add; divide once, at the end."""

    loss: Any  # sum of weight x nll, in nats
    weight: Any  # sum of weights
    correct: Any  # sum of weights of the tokens that greedy decoding would hit
    tokens: Any  # number of tokens with a weight
    kl: Any  # sum of weight x KL(base || model), in nats; 0 where there is no base to compare with

    @classmethod
    def zeros(cls, num_sources: int) -> Self:
        """The Tally of nothing."""
        return cls(*(jnp.zeros(num_sources, jnp.float32) for _ in cls._fields))

    def __add__(self, other: "Tally") -> "Tally":  # pyright: ignore[reportIncompatibleMethodOverride]
        return Tally(*(a + b for a, b in zip(self, other, strict=True)))

    def mean(self) -> dict[str, float]:
        """Loss (nats per unit of weight), accuracy and token count over all sources; on the host.

        Raises:
            ValueError: nothing carried a weight.
        """
        loss, weight, correct, tokens, _ = (float(np.asarray(x, np.float64).sum()) for x in self)
        if weight == 0:
            raise ValueError("a mean over no trained token does not exist; check that the data has trained tokens")
        return {"loss": loss / weight, "accuracy": correct / weight, "tokens": tokens}

    def by_source(self, names: Sequence[str]) -> dict[str, dict[str, float]]:
        """`mean` of each source that has trained tokens."""
        columns = [np.asarray(x, np.float64) for x in self]
        return {
            name: Tally(*(column[i : i + 1] for column in columns)).mean()
            for i, name in enumerate(names)
            if columns[1][i] > 0
        }


def at_predicted(h_BTD: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Hidden states, targets, weights and sources at `batch.predict_BP`; "no position" gives zeros (and weight 0).

    batch [B, T]: predict_BP = 1 2 T T   targets_BT = 2 3 8 0 0   ->   targets_BP = 3 8 0 0
    """
    predict_BP = batch.predict_BP

    def take(x_BT: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x_BT, predict_BP, axis=1, mode="fill", fill_value=0)

    h_BPD = jnp.take_along_axis(h_BTD, predict_BP[:, :, None], axis=1, mode="fill", fill_value=0)
    return constrain(h_BPD, "BPD"), take(batch.targets_BT), take(batch.weights_BT), take(batch.sources_BT)


class Base(NamedTuple):
    """What a model's loss is drawn to beside its targets: the distributions of another one, for the same tokens."""

    h_BPD: jax.Array
    head_VD: jax.Array
    low_rank: tuple[jax.Array, jax.Array] | None
    kl: float  # so many times KL(base || model) counts


def loss_and_tally(
    h_BPD: jax.Array,
    head_VD: jax.Array,
    targets_BP: jax.Array,
    weights_BP: jax.Array,
    sources_BP: jax.Array,
    *,
    num_sources: int,
    chunk_tokens: int,
    low_rank: tuple[jax.Array, jax.Array] | None = None,
    logit_cap: float | None = None,
    vocab_size: int | None = None,
    base: Base | None = None,
) -> tuple[jax.Array, Tally]:
    """Sum of weight x nll, and with a `base` of weight x (nll + base.kl x KL(base || model)); and its Tally.

    Args:
        h_BPD: hidden states in the compute dtype; logits are float32 whatever it is.
        head_VD: the float32 master; it is cast to the compute dtype once, and its gradient is summed in float32.
        chunk_tokens: tokens of one device whose logits exist at one time.
        low_rank: u_BPR and b_VR of an adapter of the head, whose product is added to the logits; None: it has none.
        logit_cap: logits are squeezed into +- this by a tanh (Gemma 2); None: they are left as they are.
        vocab_size: rows of the head from here on are padding, which no probability falls on; None: there is none.

    Returns:
        A float32 scalar, differentiable in `h_BPD`, `head_VD` and `low_rank`, not in the base; and a Tally, which is
        not differentiable.
    """
    cut = _Cut.of(targets_BP.shape, chunk_tokens)
    shape = _Logits(logit_cap, head_VD.shape[0] if vocab_size is None else vocab_size, 0.0 if base is None else base.kl)
    h_BPD, head = _beside(h_BPD, head_VD, low_rank)
    pull = None
    if base is not None:
        base_h_BPD, base_head = _beside(base.h_BPD, base.head_VD, base.low_rank)
        pull = cut(base_h_BPD), base_head
    loss, nll_XZC, hit_XZC, kl_XZC = _weighted_nll(
        cut(h_BPD), head, cut(targets_BP), cut(weights_BP), jax.lax.stop_gradient(pull), shape
    )

    weights_XZC, sources_XZC = cut(weights_BP), cut(sources_BP)
    sources_O = jnp.arange(num_sources, dtype=sources_XZC.dtype)
    here_OXZC = sources_XZC[None] == sources_O[:, None, None, None]

    def by_source(x_XZC: jax.Array) -> jax.Array:
        # Compared and summed, not scattered: the same bits every time, on every backend.
        return jnp.where(here_OXZC, x_XZC[None], jnp.float32(0)).sum((1, 2, 3))

    trained_XZC = (weights_XZC > 0).astype(jnp.float32)
    sums = Tally(
        by_source(weights_XZC * nll_XZC),
        by_source(weights_XZC),
        by_source(weights_XZC * hit_XZC),
        by_source(trained_XZC),
        by_source(weights_XZC * kl_XZC),
    )
    return loss, sums


def nll_of_predicted(
    h_BPD: jax.Array,
    head_VD: jax.Array,
    targets_BP: jax.Array,
    *,
    chunk_tokens: int,
    low_rank: tuple[jax.Array, jax.Array] | None = None,
    logit_cap: float | None = None,
    vocab_size: int | None = None,
) -> jax.Array:
    """The negative log-likelihood of each target, in nats, float32 [B, P]; arguments as of `loss_and_tally`.

    Where `predict_BP` names no position it is a number without a meaning.
    """
    cut = _Cut.of(targets_BP.shape, chunk_tokens)
    shape = _Logits(logit_cap, head_VD.shape[0] if vocab_size is None else vocab_size)
    h_BPD, head = _beside(h_BPD, head_VD, low_rank)
    ones_BP = jnp.ones(targets_BP.shape, jnp.float32)
    return cut.back(_weighted_nll(cut(h_BPD), head, cut(targets_BP), cut(ones_BP), None, shape)[1])


class _Cut(NamedTuple):
    """How predicted tokens are cut into chunks, [B, P, ...] -> [X, Z, C, ...]: each device its own, so no row moves."""

    B: int
    P: int
    Z: int
    C: int
    X: int

    @classmethod
    def of(cls, shape_BP: tuple[int, ...], chunk_tokens: int) -> Self:
        B, P = shape_BP
        Z = _batch_shards(B)
        M = B // Z * P
        C = _chunk_size(M, chunk_tokens)
        return cls(B, P, Z, C, -(-M // C))

    def __call__(self, x: jax.Array) -> jax.Array:
        M = self.B // self.Z * self.P
        x = x.reshape(self.Z, M, *x.shape[2:])
        x = jnp.pad(x, [(0, 0), (0, self.X * self.C - M)] + [(0, 0)] * (x.ndim - 2))
        x = jnp.moveaxis(x.reshape(self.Z, self.X, self.C, *x.shape[2:]), 1, 0)
        return constrain(x, "XBCD"[: x.ndim])

    def back(self, x_XZC: jax.Array) -> jax.Array:
        """[X, Z, C] -> [B, P]."""
        x_ZM = jnp.moveaxis(x_XZC, 0, 1).reshape(self.Z, self.X * self.C)
        return x_ZM[:, : self.B // self.Z * self.P].reshape(self.B, self.P)


def _beside(
    h_BPD: jax.Array, head_VD: jax.Array, low_rank: tuple[jax.Array, jax.Array] | None
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """An adapter's part is more columns of both: h W' + u B' = (h | u) (W | B)'. The gradient is that of each alone."""
    if low_rank is None:
        return h_BPD, (head_VD,)
    u_BPR, b_VR = low_rank
    return jnp.concatenate([h_BPD, u_BPR.astype(h_BPD.dtype)], axis=-1), (head_VD, b_VR)


def _batch_shards(B: int) -> int:
    """Parts the rows of an activation lie in on the mesh in use; 1 without a mesh or where they do not divide."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return 1
    shards = batch_shards(mesh)
    return shards if B % shards == 0 else 1


def _chunk_size(tokens: int, chunk_tokens: int) -> int:
    """The size between half of `chunk_tokens` and all of it that wastes the least padding."""
    if tokens <= chunk_tokens:
        return tokens
    sizes = range(chunk_tokens, chunk_tokens // 2, -math.gcd(chunk_tokens, _ALIGNMENT))
    return min(sizes, key=lambda size: (-(-tokens // size) * size, -size))


class _Logits(NamedTuple):
    """How logits come about, beside h W."""

    cap: float | None
    vocab_size: int  # columns from here on are padding
    kl: float = 0.0  # so many times the divergence from a base counts

    def of(self, h_ZCD: jax.Array, head_VD: jax.Array) -> jax.Array:
        """Float32 logits; padding gets one so low that no probability is left for it."""
        logits_ZCV = jnp.einsum("ZCD,VD->ZCV", h_ZCD, head_VD, preferred_element_type=jnp.float32)
        return self.at_tokens(capped(constrain(logits_ZCV, "BCV"), self.cap), _LOWEST)

    def at_tokens(self, x_ZCV: jax.Array, elsewhere: float) -> jax.Array:
        """`x_ZCV`, with something else in the columns of padding."""
        if x_ZCV.shape[-1] == self.vocab_size:
            return x_ZCV
        is_token_V = jnp.arange(x_ZCV.shape[-1], dtype=jnp.int32) < self.vocab_size
        return jnp.where(is_token_V[None, None, :], x_ZCV, jnp.float32(elsewhere))


_Pull = tuple[jax.Array, tuple[jax.Array, ...]] | None  # h_XZCD of a base, and its head in parts


def _forward_alone(
    h_XZCD: jax.Array,
    parts: tuple[jax.Array, ...],
    targets_XZC: jax.Array,
    weights_XZC: jax.Array,
    pull: _Pull,
    shape: _Logits,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """sum(weight x (nll + shape.kl x KL)), and nll, hit (1 or 0) and KL of each token, all float32.

    The head is `parts` side by side.
    """
    head = _compute_copy(parts, h_XZCD.dtype)
    base_h_XZCD, base_head = _of_base(pull, h_XZCD.dtype)

    def chunk(_: None, xs: tuple[Any, ...]) -> tuple[None, tuple[jax.Array, ...]]:
        h_ZCD, targets_ZC, base_h_ZCD = xs
        logits_ZCV = shape.of(h_ZCD, head)
        nll_ZC, hit_ZC, lse_ZC = _nll_and_hit(logits_ZCV, targets_ZC)
        kl_ZC = _base_and_kl(shape, base_h_ZCD, base_head, logits_ZCV, lse_ZC)[1]
        return None, (nll_ZC, hit_ZC, kl_ZC)

    _, (nll_XZC, hit_XZC, kl_XZC) = jax.lax.scan(chunk, None, (h_XZCD, targets_XZC, base_h_XZCD))
    return _summed(weights_XZC, nll_XZC, kl_XZC, shape), nll_XZC, hit_XZC, kl_XZC


_weighted_nll = jax.custom_vjp(_forward_alone, nondiff_argnums=(5,))


def _weighted_nll_forward(h: Any, head: Any, targets: Any, weights: Any, pull: Any, shape: _Logits) -> tuple[Any, Any]:
    """The same, with the gradient of the sum, computed while a chunk's logits exist."""
    h_XZCD, targets_XZC, weights_XZC = h.value, targets.value, weights.value
    parts_VD = tuple(part.value for part in head)
    dtype = h_XZCD.dtype
    head_in_dtype = _compute_copy(parts_VD, dtype)
    base_h_XZCD, base_head = _of_base(jax.tree.map(lambda x: x.value, pull, is_leaf=_has_value), dtype)
    ids_V = jnp.arange(head_in_dtype.shape[0], dtype=targets_XZC.dtype)
    ends = list(itertools.accumulate(part.shape[1] for part in parts_VD))
    columns = [slice(end - part.shape[1], end) for end, part in zip(ends, parts_VD, strict=True)]

    def chunk(dparts_ZVD: list[Any], xs: tuple[Any, ...]) -> tuple[Any, tuple[jax.Array, ...]]:
        h_ZCD, targets_ZC, weights_ZC, base_h_ZCD = xs
        logits_ZCV = shape.of(h_ZCD, head_in_dtype)
        nll_ZC, hit_ZC, lse_ZC = _nll_and_hit(logits_ZCV, targets_ZC)
        is_target_ZCV = targets_ZC[:, :, None] == ids_V[None, None, :]
        p_ZCV = jnp.exp(logits_ZCV - lse_ZC[:, :, None])
        base_p_ZCV, kl_ZC = _base_and_kl(shape, base_h_ZCD, base_head, logits_ZCV, lse_ZC)
        apart_ZCV = p_ZCV - is_target_ZCV.astype(jnp.float32)
        if base_p_ZCV is not None:
            apart_ZCV += shape.kl * (p_ZCV - base_p_ZCV)
        dlogits_ZCV = weights_ZC[:, :, None] * apart_ZCV
        if shape.cap is not None:
            dlogits_ZCV *= shape.at_tokens(1 - jnp.square(logits_ZCV / shape.cap), 0)  # the slope of the tanh
        dlogits_ZCV = dlogits_ZCV.astype(dtype)
        dh_ZCD = jnp.einsum("ZCV,VD->ZCD", dlogits_ZCV, head_in_dtype, preferred_element_type=jnp.float32)
        dparts_ZVD = list(dparts_ZVD)
        for i, dpart_ZVD in enumerate(dparts_ZVD):
            if dpart_ZVD is not None:
                # Kept per Z: devices add up their gradients once, after the last chunk, and not after each.
                h_of_part = h_ZCD[:, :, columns[i]]
                product_ZVD = jnp.einsum("ZCV,ZCD->ZVD", dlogits_ZCV, h_of_part, preferred_element_type=jnp.float32)
                dparts_ZVD[i] = constrain(dpart_ZVD + product_ZVD, "BVD")
        return dparts_ZVD, (nll_ZC, hit_ZC, kl_ZC, dh_ZCD.astype(dtype))

    zeros_ZVD = [
        constrain(jnp.zeros((h_XZCD.shape[1], *part.value.shape), jnp.float32), "BVD") if part.perturbed else None
        for part in head
    ]
    dparts_ZVD, (nll_XZC, hit_XZC, kl_XZC, dh_XZCD) = jax.lax.scan(
        chunk, zeros_ZVD, (h_XZCD, targets_XZC, weights_XZC, base_h_XZCD)
    )
    dparts_VD = tuple(
        None if d_ZVD is None else d_ZVD.sum(0).astype(part.dtype)
        for d_ZVD, part in zip(dparts_ZVD, parts_VD, strict=True)
    )
    return (_summed(weights_XZC, nll_XZC, kl_XZC, shape), nll_XZC, hit_XZC, kl_XZC), (dh_XZCD, dparts_VD)


def _of_base(pull: _Pull, dtype: Any) -> tuple[jax.Array | None, jax.Array | None]:
    return (None, None) if pull is None else (pull[0].astype(dtype), _compute_copy(pull[1], dtype))


def _has_value(x: Any) -> bool:
    """Whether it is what `custom_vjp` wraps an argument in."""
    return hasattr(x, "perturbed")


def _base_and_kl(
    shape: _Logits, base_h_ZCD: Any, base_head: Any, logits_ZCV: jax.Array, lse_ZC: jax.Array
) -> tuple[jax.Array | None, jax.Array]:
    """What the base finds likely [Z, C, V], and KL(base || model) of each token; without a base None and zeros."""
    if base_h_ZCD is None:
        return None, jnp.zeros_like(lse_ZC)
    base_logits_ZCV = shape.of(base_h_ZCD, base_head)
    base_logp_ZCV = base_logits_ZCV - jax.nn.logsumexp(base_logits_ZCV, axis=-1)[:, :, None]
    base_p_ZCV = jnp.exp(base_logp_ZCV)
    apart_ZCV = shape.at_tokens(base_logp_ZCV - (logits_ZCV - lse_ZC[:, :, None]), 0)
    return base_p_ZCV, (base_p_ZCV * apart_ZCV).sum(-1)


def _summed(weights_XZC: jax.Array, nll_XZC: jax.Array, kl_XZC: jax.Array, shape: _Logits) -> jax.Array:
    loss = (weights_XZC * nll_XZC).sum()
    return loss + shape.kl * (weights_XZC * kl_XZC).sum() if shape.kl else loss


def _weighted_nll_backward(shape: _Logits, gradients: Any, cotangents: Any) -> tuple[Any, ...]:
    del shape  # the forward pass has seen to it
    dh_XZCD, dparts_VD = gradients
    scale, *of_tally = cotangents
    zero = jax.custom_derivatives.SymbolicZero
    if not all(isinstance(of, zero) for of in of_tally):
        raise TypeError("a Tally has no gradient; differentiate the scalar that loss_and_tally returns beside it")
    if isinstance(scale, zero):
        return None, (None,) * len(dparts_VD), None, None, None
    dh_XZCD = dh_XZCD * scale.astype(dh_XZCD.dtype)
    dhead = tuple(None if d_VD is None else d_VD * scale.astype(d_VD.dtype) for d_VD in dparts_VD)
    return dh_XZCD, dhead, None, None, None


_weighted_nll.defvjp(_weighted_nll_forward, _weighted_nll_backward, symbolic_zeros=True)


def _compute_copy(parts_VD: tuple[jax.Array, ...], dtype: Any) -> jax.Array:
    """The head in the compute dtype, gathered over fsdp once and not in every chunk; V stays over tensor."""
    copies = [constrain(part_VD.astype(dtype), "VD") for part_VD in parts_VD]
    return copies[0] if len(copies) == 1 else jnp.concatenate(copies, axis=-1)


def _nll_and_hit(logits_ZCV: jax.Array, targets_ZC: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Negative log-likelihood of the target, whether it is the argmax, and the log of the normaliser."""
    lse_ZC = jax.nn.logsumexp(logits_ZCV, axis=-1)
    target_ZC = jnp.take_along_axis(logits_ZCV, targets_ZC[:, :, None], axis=-1)[:, :, 0]
    hit_ZC = (jnp.argmax(logits_ZCV, axis=-1).astype(targets_ZC.dtype) == targets_ZC).astype(jnp.float32)
    return lse_ZC - target_ZC, hit_ZC, lse_ZC
