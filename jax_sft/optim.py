"""AdamW, its learning rate over the run, and who decays.

In: `OptimConfig` and the number of optimizer steps. Out: a schedule (step -> learning rate) and an optax
transformation whose `update` takes `step=`, so that the rate that is logged is the rate that was used.
Follows Loshchilov and Hutter (arXiv 1711.05101); `wsd` is warmup, stable, decay (arXiv 2404.06395).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jax_sft.config import OptimConfig
from jax_sft.model.lora import is_constant

Schedule = Callable[[Any], jax.Array]

# In a parameter's name; embeddings decay. The magnitude is DoRA's, the starts are constants.
_NOT_DECAYED = ("norm", "bias", "sinks", "magnitude", "a_start", "b_start")


def schedule(config: OptimConfig, total_steps: int, *, stages: Sequence[tuple[int, float | None]] = ()) -> Schedule:
    """The learning rate of step 0 .. total_steps - 1; `total_steps` includes warmup, `config.lr` is set.

    With `stages`, the steps of each (together `total_steps`) and its rate (None: that of the config), each has a whole
    curve of its own.

        rate  lr      ____
                     /    \\_        step s of a warmup of W steps has lr (s + 1) / (W + 1): the first is not wasted
                    /       \\_      step W has lr
        lr x ratio /          \\     step total_steps would have lr x final_lr_ratio: the last is not wasted either

    `wsd` stays at lr and falls in a line over its last `decay_steps` (a fifth of the run if None); `constant` stays.

    Raises:
        ValueError: warmup and decay do not fit into the run.
    """
    if stages:
        return _one_after_the_other(
            [schedule(config if lr is None else dataclasses.replace(config, lr=lr), steps) for steps, lr in stages],
            [steps for steps, _ in stages],
        )
    warmup, final, kind = config.warmup_steps, config.final_lr_ratio, config.schedule
    if warmup >= total_steps:
        raise ValueError(
            f"optim.warmup_steps = {warmup}, but the run has {total_steps} steps and they include the warmup; "
            "make the warmup shorter or the run longer"
        )
    if config.decay_steps is not None and kind != "wsd":
        raise ValueError(f"optim.decay_steps belongs to optim.schedule = 'wsd', not {kind!r}; set it to None")
    start = warmup
    if kind == "wsd":
        asked = config.decay_steps
        decay = min(max(total_steps // 5, 1), total_steps - warmup) if asked is None else asked
        if not 0 < decay <= total_steps - warmup:
            raise ValueError(
                f"optim.decay_steps = {decay} does not fit into the {total_steps - warmup} steps after the warmup; "
                "choose it between 1 and that"
            )
        start = total_steps - decay

    def rate(step: Any) -> jax.Array:
        s = jnp.asarray(step).astype(jnp.float32)
        rise = jnp.minimum((s + 1) / (warmup + 1), 1.0)
        done = jnp.clip((s - start) / (total_steps - start), 0.0, 1.0)
        if kind == "constant":
            fall = jnp.ones_like(s)
        elif kind == "cosine":
            fall = final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * done))
        else:
            fall = 1 - (1 - final) * done
        assert config.lr is not None, "jax_sft.config fills it in"
        return config.lr * rise * fall

    return rate


def _one_after_the_other(rates: Sequence[Schedule], steps: Sequence[int]) -> Schedule:
    def rate(step: Any) -> jax.Array:
        step, start = jnp.asarray(step), 0
        found = rates[0](step)
        for before, later in zip(steps, rates[1:], strict=False):
            start += before
            found = jnp.where(step >= start, later(step - start), found)
        return found

    return rate


def optimizer(
    config: OptimConfig,
    total_steps: int,
    abstract_params: Any,
    *,
    stages: Sequence[tuple[int, float | None]] = (),
    b_lr_ratio: float = 1.0,
    frozen_layers: Mapping[str, Sequence[bool]] = MappingProxyType({}),
) -> optax.GradientTransformationExtraArgs:
    """Clip by global norm, Adam, decoupled weight decay, decay towards the base, learning rate.

    `update(grads, opt_state, params, step=..., origin=...)`: `origin` are the params as they started, which only
    `config.decay_to_base` looks at; `step` is the optimizer step, counted from 0. Adam's own count is only
    for its bias correction, and differs from `step` once a step was skipped.

    Args:
        abstract_params: the trainable tree (arrays or ShapeDtypeStructs): its names decide who decays.
        stages: see `schedule`.
        b_lr_ratio: the second factors of adapters learn this many times as fast (LoRA+, arXiv 2402.12354), but for
            those of embeddings; see `is_second_factor`.
        frozen_layers: which layers of a stacked parameter stay as they are, by its dotted path.
    """
    decay_mask = jax.tree.map_with_path(lambda path, _: decays(path), abstract_params)
    clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    return optax.chain(
        clip,
        _adam(config, abstract_params),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
        *([_add_way_from_origin(config.decay_to_base)] if config.decay_to_base else []),
        _scale_by_rate_of_step(schedule(config, total_steps, stages=stages)),
        *([] if b_lr_ratio == 1 else [_scaled(lambda path, _: b_lr_ratio if is_second_factor(path) else None)]),
        *([] if not frozen_layers else [_scaled(lambda path, like: moves(path, like, frozen_layers))]),
    )


def is_second_factor(path: Sequence[Any]) -> bool:
    """Whether a parameter is the B of a product's adapter, which LoRA+ means: lora/blocks/q_LDNH/b_LRNH.

    It shall learn faster because what A learns adds up over as many inputs as the model is wide, and what B learns over
    the rank (arXiv 2402.12354: rates of the order 1/n and 1 for a width of n). An embedding's A is looked up, so that
    nothing adds up, and A is what starts at zero there: both of its factors learn at the plain rate. The paper's code
    and PEFT's `create_loraplus_optimizer` leave them out of the ratio too; they give them a fixed rate of their own
    (`loraplus_lr_embedding`, 1e-6), whatever the others' is.
    """
    names = _names(path)
    return names[0] == "lora" and names[-1].startswith("b_") and not names[-2].startswith("embed_")


def moves(path: Sequence[Any], like: Any, frozen_layers: Mapping[str, Sequence[bool]]) -> jax.Array | None:
    """1 in the layers that are trained and 0 in the others, shaped to meet the parameter; None: it is all trained."""
    frozen = frozen_layers.get(".".join(_names(path)))
    if frozen is None:
        return None
    return 1.0 - jnp.asarray(frozen, like.dtype).reshape(-1, *(1,) * (like.ndim - 1))


def decays(path: Sequence[Any]) -> bool:
    """Whether a parameter decays, by the names on its path: all but norms, biases and attention sinks.

    Never by the number of dimensions: stacked over layers, a norm has two.
    """
    return not any(word in name.lower() for name in _names(path) for word in _NOT_DECAYED)


def _names(path: Sequence[Any]) -> list[str]:
    return [str(getattr(key, "key", getattr(key, "name", key))) for key in path]


def _scaled(factor_of: Callable[[Sequence[Any], Any], Any]) -> optax.GradientTransformation:
    """Updates times what `factor_of(path, update)` says; None: as they are."""

    def scale(path: Sequence[Any], update: Any) -> Any:
        factor = factor_of(path, update)
        return update if factor is None else update * factor

    return optax.stateless(lambda updates, _: jax.tree.map_with_path(scale, updates))


def _adam(config: OptimConfig, abstract_params: Any) -> optax.GradientTransformation:
    """optax's Adam; it raises a float to an integer count, which strict promotion (of the tests) would refuse.

    Constants have no moments. Where there are none its state is the plain one, which older checkpoints hold.
    """
    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    is_trained = jax.tree.map_with_path(lambda path, _: not is_constant(path), abstract_params)
    if not all(jax.tree.leaves(is_trained)):
        adam = optax.masked(adam, is_trained)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        with jax.numpy_dtype_promotion("standard"):
            return adam.update(updates, state, params)

    return optax.GradientTransformation(adam.init, update)


def _add_way_from_origin(decay: float) -> optax.GradientTransformationExtraArgs:
    """Weight decay, but towards where the parameters started (L2-SP, Li, Grandvalet and Davoine, arXiv 1802.01483)."""

    def update(updates: Any, state: Any, params: Any = None, *, origin: Any, **_: Any) -> tuple[Any, Any]:
        return jax.tree.map(lambda u, p, start: u + decay * (p - start), updates, params, origin), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)  # pyright: ignore[reportArgumentType]


def _scale_by_rate_of_step(rate: Schedule) -> optax.GradientTransformationExtraArgs:
    """Multiply by -rate(step). optax's own counts its updates and would fall behind after a skipped one."""

    def update(updates: Any, state: Any, params: Any = None, *, step: jax.Array, **_: Any) -> tuple[Any, Any]:
        scale = -rate(step)
        return jax.tree.map(lambda u: u * scale.astype(u.dtype), updates), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)  # pyright: ignore[reportArgumentType]
