"""Two models on the same tokens, of which one is there in full only while its last hidden states are taken.

In: the base's parameters, once; then those of the model in training, and batches with predicted positions. Out: a
`Drift`. Of the base there remain its hidden states at the predicted positions (after the last norm, in the computing
dtype; in host memory, each process its rows) and its head: the array itself where it is frozen, else a copy.

    logits of the base   h_BPX head_VX'        KL(base || model) = sum over V of p_base (log p_base - log p_model)

Logits exist for a chunk of tokens at a time, as in `loss`. An adapter of the head is more columns of both factors: X is
D, or D and the adapter's rank.
Letters: B row, T position, P predicted position, D width, X columns of the head, V vocabulary, C token of a chunk, S
chunk, O source of data.
"""

import dataclasses
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from jax_sft.batch import Batch
from jax_sft.data.loader import Loader
from jax_sft.evaluate.forgetting.drift import Drift
from jax_sft.evaluate.losses import added, placed_batches
from jax_sft.loss import at_predicted
from jax_sft.model.layers import capped
from jax_sft.sharding import batch_sharding, batch_shards, constrain, local_rows, replicated, weight_spec

Params = Any  # nested dict of arrays
ReferenceStep = Callable[[Params, Params, Batch], jax.Array]
_LOWEST = -0.7 * float(jnp.finfo(jnp.float32).max)  # the logit of padding; finite, so that it makes no inf - inf


class Sums(NamedTuple):
    """Sums over compared tokens, by source: float32 [num_sources] each. They add; divide once, at the end."""

    loss: Any  # sum of weight x nll of the model, in nats
    base_loss: Any
    kl: Any  # sum of weight x KL(base || model)
    reverse_kl: Any
    agreement: Any  # sum of weights where both have the same likeliest token
    weight: Any
    tokens: Any  # number of tokens with a weight


DriftStep = Callable[[Params, Params, Batch, jax.Array, jax.Array], Sums]


@dataclasses.dataclass(frozen=True)
class Reference:
    """What remains of the base: enough for its logits at the compared positions."""

    hidden: tuple[np.ndarray, ...]  # [rows of this process, P, X] of each batch
    head_VX: jax.Array
    checksums: tuple[int, ...]  # of the batches that they are of

    @property
    def host_bytes(self) -> int:
        """Host memory of this process that it takes."""
        return sum(h_BPX.nbytes for h_BPX in self.hidden)


@dataclasses.dataclass(frozen=True)
class Compared:
    """Tokens on which models are compared with a base, and what that made of them."""

    loader: Loader
    reference: Reference
    bytes_by_source: Mapping[str, int] | None  # as of `rows_of`; None: not known


def make_reference_step(graphdef: nnx.GraphDef, *, mesh: Mesh) -> ReferenceStep:
    """The jitted step: (params, frozen, batch with leaves [B, ...]) -> h_BPX, its rows spread as those of the batch."""

    def step(params: Params, frozen: Params, batch: Batch) -> jax.Array:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            model: Any = nnx.merge(graphdef, params, frozen)
            return _hidden_and_head(model, batch)[0]

    return jax.jit(step, out_shardings=batch_sharding(mesh))


def make_drift_step(graphdef: nnx.GraphDef, *, num_sources: int, loss_chunk_tokens: int, mesh: Mesh) -> DriftStep:
    """The jitted step: (params, frozen, batch, h_BPX and head_VX of the base) -> Sums on every device.

    Nothing is donated. `loss_chunk_tokens`: tokens of one device for which the logits of both models exist at one time.
    """

    def step(params: Params, frozen: Params, batch: Batch, base_h_BPX: jax.Array, base_head_VX: jax.Array) -> Sums:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            model: Any = nnx.merge(graphdef, params, frozen)
            h_BPX, head_VX, (targets_BP, weights_BP, sources_BP) = _hidden_and_head(model, batch)
            compared = _compared(
                (h_BPX, head_VX),
                (base_h_BPX, constrain(base_head_VX.astype(base_h_BPX.dtype), "VD")),
                targets_BP,
                chunk=max(1, loss_chunk_tokens // (targets_BP.shape[0] // batch_shards(mesh))),
                logit_cap=model.config.logit_cap,
                vocab_size=model.config.vocab_size,
            )
            sources_O = jnp.arange(num_sources, dtype=sources_BP.dtype)
            here_OBP = sources_BP[None] == sources_O[:, None, None]

            def by_source(x_BP: jax.Array) -> jax.Array:
                return jnp.where(here_OBP, x_BP[None], jnp.float32(0)).sum((1, 2))

            loss, base_loss, kl, reverse_kl, agreement = (by_source(weights_BP * x_BP) for x_BP in compared)
            tokens = by_source((weights_BP > 0).astype(jnp.float32))
            return Sums(loss, base_loss, kl, reverse_kl, agreement, by_source(weights_BP), tokens)

    return jax.jit(step, out_shardings=replicated(mesh))


def reference_of(
    graphdef: nnx.GraphDef,
    params: Params,
    frozen: Params,
    *,
    loader: Loader,
    mesh: Mesh,
    max_batches: int | None = None,
    label: str = "reading the base",
) -> Reference:
    """Run the base once over the first `max_batches` of a loader, or all of them. Every process must call it.

    For full fine-tuning the base is the model itself before its first step; for adapters the graphdef is that of
    `build(config, lora=None)`, and its weights are the frozen ones. A model that goes on from an adapter may be the
    base too. What is in `params` may be donated afterwards: nothing of it is kept; what is in `frozen` must stay.

    Raises:
        ValueError: the rows of a batch cannot be spread over the mesh.
    """
    rows = local_rows(mesh, batch_size=loader.batch_size)
    step = make_reference_step(graphdef, mesh=mesh)
    hidden, checksums = [], []
    count = loader.total_steps if max_batches is None else min(max_batches, loader.total_steps)
    for _, batch, placed in placed_batches(loader, mesh, label=label, count=count):
        hidden.append(_rows_here(step(params, frozen, placed), rows))
        checksums.append(_checksum(batch))
    return Reference(tuple(hidden), _kept_head(graphdef, params, frozen, mesh), tuple(checksums))


def measure_drift(
    drift_step: DriftStep,
    params: Params,
    *,
    frozen: Params,
    reference: Reference,
    loader: Loader,
    mesh: Mesh,
    sources: tuple[str, ...],
    bytes_by_source: Mapping[str, int] | None = None,
    label: str = "measuring drift",
) -> Drift:
    """Compare with the base, over the batches of the reference. Every process must call it and gets the same result.

    Args:
        bytes_by_source: bytes of UTF-8 that the loader's predicted tokens spell, as of `rows_of`; None: not known.
            They are not used where the reference is of some of the batches only.

    Raises:
        ValueError: the loader's batches are not those of the reference, or none of their tokens has a weight.
    """
    rows = local_rows(mesh, batch_size=loader.batch_size)
    count = len(reference.hidden)
    if count > loader.total_steps:
        raise ValueError(_other_batches(f"it has {count} batches, the loader {loader.total_steps}"))
    total: Sums | None = None
    for i, batch, placed in placed_batches(loader, mesh, label=label, count=count):
        if _checksum(batch) != reference.checksums[i]:
            raise ValueError(_other_batches(f"batch {i} holds other tokens"))
        base_h_BPX = _on_devices(reference.hidden[i], mesh, rows=rows, batch_size=loader.batch_size)
        total = added(total, drift_step(params, frozen, placed, base_h_BPX, reference.head_VX))
    assert total is not None, "a loader has at least one batch"
    return _drift(total, sources, bytes_by_source if count == loader.total_steps else None)


def drift_of(
    compared: Compared, drift_step: DriftStep, params: Params, *, frozen: Params, mesh: Mesh, label: str
) -> Drift:
    """`measure_drift` on these tokens."""
    return measure_drift(
        drift_step,
        params,
        frozen=frozen,
        reference=compared.reference,
        loader=compared.loader,
        mesh=mesh,
        sources=compared.loader.sources,
        bytes_by_source=compared.bytes_by_source,
        label=label,
    )


def _hidden_and_head(model: Any, batch: Batch) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    """h_BPX and head_VX in the computing dtype; targets, weights and sources [B, P]."""
    h_BTD = model.hidden(batch.tokens_BT, batch.positions_BT, batch.segments_BT)
    h_BPD, targets_BP, weights_BP, sources_BP = at_predicted(h_BTD, batch)
    h_BPX, head_VX = _beside_adapter(model, h_BPD)
    return constrain(h_BPX, "BPD"), constrain(head_VX, "VD"), (targets_BP, weights_BP, sources_BP)


def _beside_adapter(model: Any, h_BPD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both factors of the logits, the columns of the head's adapter, if there is one, behind those of the head."""
    head_VD = model.head().astype(h_BPD.dtype)
    adapter = model.head_adapter(h_BPD)
    if adapter is None:
        return h_BPD, head_VD
    u_BPR, b_VR = (x.astype(h_BPD.dtype) for x in adapter)
    return jnp.concatenate([h_BPD, u_BPR], axis=-1), jnp.concatenate([head_VD, b_VR], axis=-1)


def _kept_head(graphdef: nnx.GraphDef, params: Params, frozen: Params, mesh: Mesh) -> jax.Array:
    """The head as a frozen array itself; a copy in the computing dtype where it is trained or has an adapter."""

    def copy(params: Params, frozen: Params) -> jax.Array:
        model: Any = nnx.merge(graphdef, params, frozen)
        nothing_BPD = jnp.zeros((1, 1, model.head().shape[1]), model.dtype)
        return jnp.copy(_beside_adapter(model, nothing_BPD)[1])  # a train step donates the input

    shape = jax.eval_shape(copy, params, frozen).shape
    head_VD = frozen.get("head_VD", frozen.get("embed_VD") if "head_VD" not in params else None)
    if head_VD is not None and head_VD.shape == shape:  # else there are columns of an adapter
        return head_VD
    return jax.jit(copy, out_shardings=NamedSharding(mesh, weight_spec("VD", shape, mesh)))(params, frozen)


def _compared(
    model: tuple[jax.Array, jax.Array],
    base: tuple[jax.Array, jax.Array],
    targets_BP: jax.Array,
    *,
    chunk: int,
    logit_cap: float | None,
    vocab_size: int,
) -> list[jax.Array]:
    """Of each token: nll of the model and of the base, KL(base || model), KL(model || base), whether both agree.

    Each [B, P]. Cut along P, so that no row leaves its device.
    """
    P = targets_BP.shape[1]
    C = min(chunk, P)
    S = -(-P // C)

    def cut(x_BP: jax.Array) -> jax.Array:
        """[B, P, ...] -> [S, B, C, ...]."""
        padded = jnp.pad(x_BP, [(0, 0), (0, S * C - P)] + [(0, 0)] * (x_BP.ndim - 2))
        return constrain(jnp.moveaxis(padded.reshape(-1, S, C, *x_BP.shape[2:]), 1, 0), "SBCX"[: x_BP.ndim + 1])

    def back(x_SBC: jax.Array) -> jax.Array:
        return jnp.moveaxis(x_SBC, 0, 1).reshape(-1, S * C)[:, :P]

    def of_chunk(_: None, xs: tuple[jax.Array, ...]) -> tuple[None, tuple[jax.Array, ...]]:
        h_BCX, base_h_BCX, targets_BC = xs
        logp_BCV, top_BC = _log_probabilities(h_BCX, model[1], logit_cap, vocab_size)
        base_logp_BCV, base_top_BC = _log_probabilities(base_h_BCX, base[1], logit_cap, vocab_size)
        is_token_V = jnp.arange(logp_BCV.shape[-1], dtype=jnp.int32) < vocab_size
        apart_BCV = jnp.where(is_token_V[None, None], base_logp_BCV - logp_BCV, jnp.float32(0))
        return None, (
            _nll(logp_BCV, targets_BC),
            _nll(base_logp_BCV, targets_BC),
            (jnp.exp(base_logp_BCV) * apart_BCV).sum(-1),
            -(jnp.exp(logp_BCV) * apart_BCV).sum(-1),
            (top_BC == base_top_BC).astype(jnp.float32),
        )

    _, found = jax.lax.scan(of_chunk, None, (cut(model[0]), cut(base[0]), cut(targets_BP)))
    return [back(x_SBC) for x_SBC in found]


def _log_probabilities(
    h_BCX: jax.Array, head_VX: jax.Array, logit_cap: float | None, vocab_size: int
) -> tuple[jax.Array, jax.Array]:
    """Float32 log p [B, C, V], next to nothing for rows that fill up the vocabulary, and the likeliest token."""
    logits_BCV = jnp.einsum("BCX,VX->BCV", h_BCX, head_VX, preferred_element_type=jnp.float32)
    logits_BCV = capped(constrain(logits_BCV, "BCV"), logit_cap)
    if head_VX.shape[0] > vocab_size:
        is_token_V = jnp.arange(head_VX.shape[0], dtype=jnp.int32) < vocab_size
        logits_BCV = jnp.where(is_token_V[None, None], logits_BCV, jnp.float32(_LOWEST))
    return jax.nn.log_softmax(logits_BCV, axis=-1), jnp.argmax(logits_BCV, axis=-1)


def _nll(logp_BCV: jax.Array, targets_BC: jax.Array) -> jax.Array:
    return -jnp.take_along_axis(logp_BCV, targets_BC[:, :, None], axis=-1)[:, :, 0]


def _rows_here(h_BPX: jax.Array, rows: np.ndarray) -> np.ndarray:
    """The rows that this process holds, `rows` of the whole, in host memory."""
    found: dict[int, np.ndarray] = {}
    for shard in h_BPX.addressable_shards:
        index: Any = shard.index  # a slice for each axis
        first = index[0].start or 0
        if first not in found:  # other devices of a tensor axis hold the same rows
            found[first] = np.asarray(shard.data)
    here = np.concatenate([found[first] for first in sorted(found)])
    assert len(here) == len(rows), "rows lie where `local_rows` says"
    return here


def _on_devices(here_BPX: np.ndarray, mesh: Mesh, *, rows: np.ndarray, batch_size: int) -> jax.Array:
    """The opposite of `_rows_here`."""
    place = np.full(batch_size, -1)
    place[rows] = np.arange(len(rows))

    def part(index: Any) -> np.ndarray:
        return here_BPX[place[np.arange(batch_size)[index[0]]]]

    return jax.make_array_from_callback((batch_size, *here_BPX.shape[1:]), batch_sharding(mesh), part)


def _drift(sums: Sums, sources: tuple[str, ...], bytes_by_source: Mapping[str, int] | None) -> Drift:
    columns = dict(zip(Sums._fields, sums, strict=True))

    def means(of: Any, num_bytes: int | None) -> dict[str, Any]:
        total = {name: float(column[of].sum()) for name, column in columns.items()}
        weight, tokens = total.pop("weight"), total.pop("tokens")
        found: dict[str, Any] = {name: value / weight for name, value in total.items()}
        for name in ("loss", "base_loss"):
            found[f"{name}_per_byte"] = total[name] / num_bytes if num_bytes else None
        return {**found, "tokens": tokens}

    if not sums.weight.sum() > 0:
        raise ValueError("a drift over no token does not exist; check that the data has trained tokens")
    known = bytes_by_source or {}
    by_source = {name: means(slice(i, i + 1), known.get(name)) for i, name in enumerate(sources) if sums.weight[i] > 0}
    return Drift(**means(slice(None), sum(known.values()) or None), by_source=by_source)


def _checksum(batch: Batch) -> int:
    """Of what is compared in a batch: tokens and positions."""
    return zlib.crc32(batch.predict_BP.tobytes(), zlib.crc32(batch.tokens_BT.tobytes()))


def _other_batches(what: str) -> str:
    return f"the reference is of other batches ({what}); make it anew with the loader, mesh and batch size of now"
