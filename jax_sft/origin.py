"""The model before its first step: what a run keeps of it, to measure how far it has gone, and to hold it back.

In: the trained tree as it starts, beside what is frozen. Out: an `Origin`, the model itself for as long as its arrays
live; a copy of it that training is drawn to; and what is `Watched`, whose reference takes no copy of the weights.
"""

import dataclasses
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jax_sft.config import OWN_PROMPTS, ForgettingConfig, RunConfig
from jax_sft.data.loader import Loader
from jax_sft.evaluate.forgetting import (
    Compared,
    Drift,
    DriftStep,
    Text,
    make_drift_step,
    read_texts,
    reference_of,
    rows_of,
)
from jax_sft.hf.load import Pretrained
from jax_sft.model.decoder import build
from jax_sft.parameters import Parameters

_log = logging.getLogger(__name__)

GENERAL, TASK = "general text", "answers of the validation set"


@dataclasses.dataclass(frozen=True)
class Origin:
    """The model before its first step, beside what is frozen of it; without adapters, where these start at nothing."""

    graphdef: Any
    params: Any


@dataclasses.dataclass(frozen=True)
class Watched:
    """Tokens on which a run's model is compared with its origin, and what compares it."""

    name: str
    compared: Compared
    drift_step: DriftStep


@dataclasses.dataclass(frozen=True)
class Kept:
    """What a run keeps of its origin."""

    watched: tuple[Watched, ...] = ()
    pulls: Origin | None = None  # with arrays of its own


def keep(
    trained: Any | None,
    frozen: Any,
    *,
    graphdef: Any,
    config: RunConfig,
    plan: Parameters,
    base: Pretrained,
    mesh: Mesh,
    texts: Sequence[Text],
    validation: Loader | None,
) -> Kept:
    """What the config asks for of the trained tree as it starts, which may be donated afterwards.

    Without it, where a run goes on, it is read from the base's files once more, and let go.
    """
    if not texts and not _is_pulled(config):
        return Kept()
    start = plan.load_trained(base, frozen, mesh, seed=config.seed) if trained is None else trained
    origin = origin_of(config, plan, base, graphdef, start)
    watched = watched_from(
        origin,
        frozen,
        graphdef=graphdef,
        config=config,
        base=base,
        mesh=mesh,
        texts=texts,
        validation=validation,
    )
    # What is subtracted from float32 weights must be as exact; the forward pass rounds to its dtype anyway.
    dtype = "float32" if config.optim.decay_to_base else config.model.dtype
    kept = Kept(tuple(watched) if texts else (), copied(origin, dtype=dtype) if _is_pulled(config) else None)
    if trained is None:
        jax.tree.map(lambda x: x.delete(), start)
    return kept


def _is_pulled(config: RunConfig) -> bool:
    """Whether training is drawn to the origin."""
    return config.train.base_kl > 0 or config.optim.decay_to_base > 0


def origin_of(config: RunConfig, plan: Parameters, base: Pretrained, graphdef: Any, trained: Any) -> Origin:
    """Of the trained tree as it starts. An adapter that a run goes on from is a part of where it starts."""
    if plan.lora is None or plan.adapter is not None:
        return Origin(graphdef, trained)
    bare = build(base.config, dtype=config.model.dtype, attention=config.model.attention, lora=None)
    return Origin(bare, {name: tree for name, tree in trained.items() if name != "lora"})


def copied(origin: Origin, *, dtype: str) -> Origin:
    """With arrays of its own, which no train step donates."""
    shardings = jax.tree.map(lambda x: x.sharding, origin.params)
    copy = jax.jit(lambda params: jax.tree.map(lambda x: jnp.copy(x).astype(dtype), params), out_shardings=shardings)
    return Origin(origin.graphdef, copy(origin.params))


def texts_of(config: ForgettingConfig) -> list[Text]:
    """The general texts of a run; none if nothing is to be compared.

    Raises:
        ValueError: the file cannot be read, or a line of it is no text.
    """
    if config.texts is None:
        return []
    return read_texts(None if config.texts == OWN_PROMPTS else os.path.expanduser(config.texts))


def watched_from(
    origin: Origin,
    frozen: Any,
    *,
    graphdef: Any,
    config: RunConfig,
    base: Pretrained,
    mesh: Mesh,
    texts: Sequence[Text],
    validation: Loader | None,
) -> Iterator[Watched]:
    """Run the origin once over the general texts and the first of the validation set. Every process must call it.

    Raises:
        ValueError: no text has two tokens.
    """
    rows = rows_of(
        texts,
        base.template,
        max_length=config.data.max_length,
        batch_size=config.train.batch_size // config.train.accumulation,
    )
    if rows.cut:
        _log.info("of %d general texts the first data.max_length tokens are compared", rows.cut)
    task_batches = config.evaluate.forgetting.task_batches
    parts: list[tuple[str, Loader, Mapping[str, int] | None, int | None]]
    parts = [(GENERAL, rows.loader, rows.bytes_by_source, None)]
    if validation is not None and task_batches:
        parts.append((TASK, validation, None, task_batches))
    for name, loader, bytes_by_source, batches in parts:
        reference = reference_of(
            origin.graphdef,
            origin.params,
            frozen,
            loader=loader,
            mesh=mesh,
            max_batches=batches,
            label=f"reading {name} with the base",
        )
        step = make_drift_step(
            graphdef,
            num_sources=len(loader.sources),
            loss_chunk_tokens=config.train.loss_chunk_tokens,
            mesh=mesh,
        )
        yield Watched(name, Compared(loader, reference, bytes_by_source), step)


def numbers_of(drifts: Mapping[str, Drift]) -> dict[str, float]:
    """As metrics.jsonl names them, by the names of what was compared."""
    general = drifts[GENERAL].to_dict()
    wanted = ("loss", "base_loss", "loss_rise", "loss_per_byte", "base_loss_per_byte", "kl", "reverse_kl", "agreement")
    found = {key: general[key] for key in wanted if general[key] is not None}
    if TASK in drifts:
        found |= {f"task_{key}": getattr(drifts[TASK], key) for key in ("kl", "reverse_kl", "agreement")}
    return {f"forgetting/{key}": value for key, value in found.items()}
