"""The pure update: (state, frozen, batch) -> (state, metrics), and the pure evaluation.

In: a model split into graphdef, trainable params and frozen params; packed batches. Out: the next state, sums, the
gradient's norm. Micro-batches are added up as sums and divided once by the sum of all weights, over all devices and
hosts: a mean of means would weigh a token by the company it keeps.
Letters: A micro-batch (accumulation), B packed row, T position, P predicted position.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from jax_sft.batch import Batch
from jax_sft.loss import Base, Tally, at_predicted, loss_and_tally
from jax_sft.optim import moves
from jax_sft.sharding import replicated, shard_params

Params = Any  # nested dict of arrays, names end in their letters


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that changes from step to step; frozen weights travel beside it."""

    step: Any  # int32 scalar: optimizer steps taken, skipped ones included
    params: Params  # trainable, float32
    opt_state: Any
    ema: Params | None = None  # moving average of params; None: there is none

    @property
    def weights(self) -> Params:
        """What is evaluated and exported: the average, if there is one."""
        return self.params if self.ema is None else self.ema


@dataclasses.dataclass(frozen=True)
class Pull:
    """What a model is drawn to, beside `origin`, the weights of it that are not frozen."""

    graphdef: Any
    kl: float  # so many times KL(base || model) counts beside a token's loss; 0: the optimizer alone looks at `origin`


class StepMetrics(NamedTuple):
    """What a step reports; replicated on every device."""

    tally: Tally
    grad_norm: Any  # float32 scalar, global, before clipping, of the gradient of the mean loss
    finite: Any  # bool scalar; False: params, their average and opt_state are those of before the step


class _Micro(NamedTuple):
    """A micro-batch, or all of them, one after the other."""

    batch: Batch
    dropout_keys_B: Any  # a key for each row; None: no dropout


def state_shardings(
    abstract_params: Params, tx: optax.GradientTransformation, mesh: Mesh, *, averaged: bool = False
) -> TrainState:
    """A TrainState of `NamedSharding`: moments and averages lie where their parameter lies, counters everywhere."""
    params = shard_params(abstract_params, mesh)
    opt_state = optax.tree_map_params(
        tx,
        lambda moment, sharding: moment if _is_left_out(moment) else sharding,
        jax.eval_shape(tx.init, abstract_params),
        params,
        transform_non_params=lambda _: replicated(mesh),
        is_leaf=_is_left_out,
    )
    return TrainState(step=replicated(mesh), params=params, opt_state=opt_state, ema=params if averaged else None)


def _is_left_out(moment: Any) -> bool:
    """Whether it stands where a parameter, a constant, has no moment."""
    return isinstance(moment, optax.MaskedNode)


def abstract_state(
    abstract_params: Params, tx: optax.GradientTransformation, mesh: Mesh, *, averaged: bool = False
) -> TrainState:
    """The TrainState as ShapeDtypeStructs with shardings: what a checkpoint is restored into; nothing is allocated."""
    params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), abstract_params)
    shapes = TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32),
        params=params,
        opt_state=jax.eval_shape(tx.init, params),
        ema=params if averaged else None,
    )
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_shardings(params, tx, mesh, averaged=averaged),
    )


def init_state(params: Params, tx: optax.GradientTransformation, mesh: Mesh, *, averaged: bool = False) -> TrainState:
    """Step 0. The state takes over the buffers of `params`; the first train step donates them: do not use them again.

    Raises:
        ValueError: a parameter is not float32; small updates would be lost in bfloat16.
    """
    for path, leaf in jax.tree.leaves_with_path(params):
        if leaf.dtype != jnp.float32:
            raise ValueError(
                f"trainable parameter {jax.tree_util.keystr(path)} is {leaf.dtype}, but masters are float32; load the "
                "model with dtype='float32' (the computation has its own dtype)"
            )
    shardings = state_shardings(params, tx, mesh, averaged=averaged)
    params = jax.device_put(params, shardings.params)
    # Without out_shardings the moments would land on one device: zeros do not depend on where params lie.
    opt_state = jax.jit(tx.init, out_shardings=shardings.opt_state)(params)
    # Arrays of its own: a train step donates both.
    ema = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=shardings.ema)(params) if averaged else None
    step = jax.device_put(jnp.zeros((), jnp.int32), shardings.step)
    return TrainState(step=step, params=params, opt_state=opt_state, ema=ema)


def make_train_step(
    graphdef: nnx.GraphDef,
    tx: optax.GradientTransformationExtraArgs,
    *,
    num_sources: int,
    remat: str,
    loss_chunk_tokens: int,
    mesh: Mesh,
    state_shardings: TrainState,
    dropout_seed: int | None = None,
    frozen_layers: Mapping[str, Sequence[bool]] = MappingProxyType({}),
    pull: Pull | None = None,
    ema_decay: float | None = None,
) -> jax.stages.Wrapped:
    """The jitted optimizer step; its first argument is donated.

    (state, frozen, batch[, origin]) -> (state, StepMetrics): `frozen` holds what is not trained, {} if all is; leaves
    of `batch` are [A, B, ...]; `origin` is what a `pull` draws to.
    loss = sum(weight x nll) / sum(weight) over every micro-batch, row and device. A router that has a load-balancing
    loss adds its mean over all tokens to what is differentiated, not to the Tally. A loss or gradient that is not
    finite leaves params and opt_state as they were and reports finite=False; a batch without any weight leaves them
    too. With a `dropout_seed`, each row of each step draws from a key of its own, wherever it lies and in whichever
    micro-batch.

    Args:
        frozen_layers: which layers of a stacked parameter stay as they are, by its dotted path; see `optim.optimizer`.
        pull: a model that this one is drawn to: KL(base || model) of each trained token is added to its loss.
        ema_decay: how much of the moving average a step leaves, in the end; of a state that was made `averaged`.
    """

    def held(path: Any, x: jax.Array) -> jax.Array:
        moving = moves(path, x, frozen_layers)
        return x if moving is None else jnp.where(moving == 0, jax.lax.stop_gradient(x), x)

    def micro_gradient(
        params: Params, frozen: Params, micro: _Micro, balance_weight: Any, origin: Any
    ) -> tuple[Params, Tally]:
        base = None
        if pull is not None and pull.kl > 0:
            base = _base_of(pull, jax.lax.stop_gradient(origin), frozen, micro.batch)

        def weighted_sum(params: Params) -> tuple[jax.Array, Tally]:
            return _loss_and_tally(
                graphdef,
                jax.tree.map_with_path(held, params) if frozen_layers else params,
                frozen,
                micro.batch,
                num_sources=num_sources,
                remat=remat,
                chunk_tokens=loss_chunk_tokens,
                balance_weight=balance_weight,
                dropout_keys_B=micro.dropout_keys_B,
                base=base,
            )

        grads, tally = jax.grad(weighted_sum, has_aux=True)(params)
        # Pinned at once: else each device would hold, and add up, the whole gradient instead of its part.
        return jax.lax.with_sharding_constraint(grads, state_shardings.params), tally

    def step(
        state: TrainState, frozen: Params, batch: Batch, origin: Params | None = None
    ) -> tuple[TrainState, StepMetrics]:
        keys_AB = None if dropout_seed is None else _row_keys(dropout_seed, state.step, batch.tokens_BT.shape[:2])
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            grads, tally = _sum_over_micro_batches(
                lambda micro: micro_gradient(state.params, frozen, micro, _balance_weight(batch), origin),
                _Micro(batch, keys_AB),
                state.params,
                num_sources,
            )
        weight = tally.weight.sum()
        has_weight = weight > 0
        scale = jnp.where(has_weight, 1 / jnp.where(has_weight, weight, 1.0), 0.0)
        grads = jax.tree.map(lambda g: g * scale, grads)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(grad_norm) & jnp.isfinite(tally.loss.sum())

        updates, opt_state = tx.update(grads, state.opt_state, state.params, step=state.step, origin=origin)
        params = optax.apply_updates(state.params, updates)
        ema = None if ema_decay is None else _moved(state.ema, params, state.step, ema_decay)
        takes = finite & has_weight
        params, opt_state, ema = jax.tree.map(
            lambda new, old: jnp.where(takes, new, old),
            (params, opt_state, ema),
            (state.params, state.opt_state, state.ema),
        )
        new_state = TrainState(step=state.step + 1, params=params, opt_state=opt_state, ema=ema)
        return new_state, StepMetrics(tally=tally, grad_norm=grad_norm, finite=finite)

    return jax.jit(step, donate_argnums=0, out_shardings=(state_shardings, replicated(mesh)))


def make_eval_step(
    graphdef: nnx.GraphDef, *, num_sources: int, loss_chunk_tokens: int, mesh: Mesh
) -> Callable[[Params, Params, Batch], Tally]:
    """The jitted evaluation: (params, frozen, batch with leaves [B, ...]) -> Tally. Nothing is donated."""

    def step(params: Params, frozen: Params, batch: Batch) -> Tally:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return _loss_and_tally(
                graphdef, params, frozen, batch, num_sources=num_sources, remat="none", chunk_tokens=loss_chunk_tokens
            )[1]

    return jax.jit(step, out_shardings=replicated(mesh))


def _loss_and_tally(
    graphdef: nnx.GraphDef,
    params: Params,
    frozen: Params,
    batch: Batch,
    *,
    num_sources: int,
    remat: str,
    chunk_tokens: int,
    balance_weight: Any = None,
    dropout_keys_B: Any = None,
    base: Base | None = None,
) -> tuple[jax.Array, Tally]:
    """What is differentiated, and the Tally; `balance_weight` is that of a token's share of the router's loss."""
    model: Any = nnx.merge(graphdef, params, frozen)
    tokens = (batch.tokens_BT, batch.positions_BT, batch.segments_BT)
    if balance_weight is not None and model.config.router_aux_weight > 0:
        h_BTD, imbalance = model.hidden_and_imbalance(*tokens, remat=remat, dropout_keys_B=dropout_keys_B)
    else:
        h_BTD, imbalance = model.hidden(*tokens, remat=remat, dropout_keys_B=dropout_keys_B), None
    h_BPD, targets_BP, weights_BP, sources_BP = at_predicted(h_BTD, batch)
    loss, tally = loss_and_tally(
        h_BPD,
        model.head(),
        targets_BP,
        weights_BP,
        sources_BP,
        num_sources=num_sources,
        chunk_tokens=chunk_tokens,
        low_rank=model.head_adapter(h_BPD, dropout_keys_B=dropout_keys_B),
        logit_cap=model.config.logit_cap,
        vocab_size=model.config.vocab_size,
        base=base,
    )
    if imbalance is not None:
        loss += balance_weight * model.config.router_aux_weight * imbalance
    return loss, tally


def _base_of(pull: Pull, origin: Params, frozen: Params, batch: Batch) -> Base:
    """What the model finds at the predicted positions that this one is drawn to."""
    model: Any = nnx.merge(pull.graphdef, origin, frozen)
    h_BTD = model.hidden(batch.tokens_BT, batch.positions_BT, batch.segments_BT)
    h_BPD, *_ = at_predicted(h_BTD, batch)
    return Base(h_BPD, model.head(), model.head_adapter(h_BPD), pull.kl)


def _moved(ema: Any, params: Params, step: jax.Array, decay: float) -> Params:
    """The average after a step; it follows closely in the beginning, as TensorFlow's with `num_updates`."""
    n = step.astype(jnp.float32) + 1
    kept = jnp.minimum(decay, (1 + n) / (10 + n))
    return jax.tree.map(lambda mean, x: x + kept.astype(x.dtype) * (mean - x), ema, params)


def _balance_weight(batch: Batch) -> jax.Array:
    """sum(weight) / tokens, over all micro-batches: what is a mean over tokens once it is divided by sum(weight)."""
    tokens = (batch.segments_BT > 0).sum(dtype=jnp.float32)
    return batch.weights_BT.sum() / jnp.maximum(tokens, 1.0)


def _sum_over_micro_batches(
    gradient_of: Callable[["_Micro"], tuple[Params, Tally]], batches: "_Micro", params: Params, num_sources: int
) -> tuple[Params, Tally]:
    """Gradients and Tallies added up in float32, one micro-batch at a time."""
    if batches.batch.tokens_BT.shape[0] == 1:  # without a second copy of the gradient
        return gradient_of(jax.tree.map(lambda x: x[0], batches))

    def add(total: tuple[Params, Tally], micro: _Micro) -> tuple[tuple[Params, Tally], None]:
        return jax.tree.map(jnp.add, total, gradient_of(micro)), None

    zeros = (jax.tree.map(jnp.zeros_like, params), Tally.zeros(num_sources))
    return jax.lax.scan(add, zeros, batches)[0]


def _row_keys(seed: int, step: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A key for each row of a step [A, B], the same for a row however many micro-batches the step is cut into."""
    of_step = jax.random.fold_in(jax.random.key(seed), step)
    rows = jnp.arange(math.prod(shape), dtype=jnp.uint32)
    return jax.vmap(lambda row: jax.random.fold_in(of_step, row))(rows).reshape(shape)
