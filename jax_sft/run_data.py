"""What a run reads: its sets, tokenised; its batches, stage after stage; what a resume must find as it was.

In: a RunConfig and the model's chat template. Out: tokenised sets and loaders, numpy only.
"""

import dataclasses
import hashlib
import logging
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jax_sft.config import QualityConfig, RunConfig, SetConfig, deciding_key
from jax_sft.data.chat import ChatTemplate
from jax_sft.data.conversation import DataError
from jax_sft.data.dataset import OPTIONS, TokenizedSet, check_context, tokenize
from jax_sft.data.loader import Loader, Stage
from jax_sft.data.mixture import Mixture, mixture
from jax_sft.data.order import scores_of
from jax_sft.data.source import Part, training_parts, validation_parts
from jax_sft.data.store import Writer, load
from jax_sft.data.stream.loader import StreamLoader
from jax_sft.data.stream.shards import Plan, make_plan
from jax_sft.hf.load import Pretrained
from jax_sft.hf.stored import weights_hash

_log = logging.getLogger(__name__)

_ORDERS = {
    "random": "in random order",
    "length": "short ones first",
    "answers": "those of few answers first",
    "score": "those of low loss first, as data.quality.scores says",
}
_STARTS = {"last": "from the last step", "best": "from the step of the lowest validation loss"}


def load_sets(
    config: RunConfig, template: ChatTemplate, workdir: pathlib.Path, *, max_positions: int
) -> tuple[TokenizedSet | Plan, TokenizedSet | None]:
    """The tokenised training and validation sets; the cache lies in `data.cache` or in the workdir. Of a training set
    that is streamed, the plan.

    Raises:
        ValueError: nothing is left of one of them, or of the part that decides.
    """
    cache = pathlib.Path(config.data.cache) if config.data.cache else workdir / "cache"
    sets = []
    for name, parts in (("train", training_parts(config.data)), ("validation", validation_parts(config.data))):
        if name == "train" and config.data.stream.on:
            sets.append(_planned(config, parts, max_positions))
            continue
        references = validation_parts(config.data) if name == "train" else ()
        found = tokenize(config.data, parts, template, cache_dir=cache, references=references) if parts else None
        if found is not None:
            check_context(found, max_positions, name=f"data.{name}")
            for line in found.account.lines():
                _log.info("%s: %s", name, line)
        sets.append(found)
    _check_measured(config, *sets)
    return sets[0], sets[1]


def _check_measured(config: RunConfig, train_set: TokenizedSet, validation_set: TokenizedSet | None) -> None:
    """Raises DataError where a part of the validation that the config asks for is not there."""
    if config.data.holdout and not train_set.account.held_out:
        raise DataError(
            f"data.holdout = {config.data.holdout} holds out none of the {train_set.account.read} conversations; raise "
            "it, or leave it out"
        )
    sources = validation_set.sources if validation_set else ()
    for name in config.data.validation_sets:
        if name not in sources:
            raise DataError(
                f"data.validation_sets.{name}: none of its conversations is left to measure (see the account of the "
                "validation above); mend it or take it out"
            )
    best = config.evaluate.best
    if best is not None and "/" not in best and best not in sources:
        raise DataError(
            f"evaluate.best = {best!r}: none of its conversations is held out; raise data.holdout, or name another of "
            + ", ".join(sources)
        )


def measured_by(config: RunConfig, validation_set: TokenizedSet | None, fingerprints: Mapping[str, str]) -> str | None:
    """What deciding numbers must share to be compared: the validation set, which of them decides, and what was asked.

    Args:
        fingerprints: "answers", of probes, rules and tasks, and "forgetting", of general texts.
    """
    best = config.evaluate.best
    kind = deciding_key(best).partition("/")[0]
    of_answers = fingerprints["answers"] if kind in ("probes", "rules", "metric") else ""
    of_texts = fingerprints["forgetting"] if kind == "forgetting" else ""
    said = ["" if validation_set is None else validation_set.fingerprint, best, of_answers or of_texts]
    return " ".join(filter(None, said)) or None


def _planned(config: RunConfig, parts: Sequence[Part], max_positions: int) -> Plan:
    """Which lane of the batch reads what of the training files.

    Raises:
        ValueError: they cannot be found, or rows are longer than the model's context.
    """
    if config.data.max_length > max_positions:  # nobody knows how long the longest conversation will be
        raise DataError(
            f"data.max_length = {config.data.max_length}, but the model has {max_positions} positions "
            f"(max_position_embeddings), and a stream may fill them all; set it to {max_positions} or less"
        )
    return make_plan(config.data, parts, lanes=config.train.batch_size, seed=config.seed)


def training_loader(
    config: RunConfig, train_set: TokenizedSet | Plan, sources: tuple[str, ...], template: ChatTemplate
) -> Loader | StreamLoader:
    """The batches of the whole training, stage after stage.

    Raises:
        ValueError: a set of the mixture has nothing to give.
    """
    if isinstance(train_set, Plan):
        stages = config.stages or (config.train,)
        return StreamLoader(
            train_set,
            template,
            config.data,
            batch_size=config.train.batch_size,
            sources=sources,
            steps=[stage.steps or 0 for stage in stages],
            shares=[_shares(config, getattr(stage, "weights", {})) for stage in stages],
        )
    return Loader(
        train_set,
        stages=_stages_of(config, train_set),
        batch_size=config.train.batch_size,
        max_length=config.data.max_length,
        packing=config.data.packing,
        sources=sources,
        seed=config.seed,
    )


def epoch_loader(config: RunConfig, dataset: TokenizedSet, *, is_mixed: bool) -> Loader:
    """The batches of one epoch, as the first of a training would be, of all sets or as the config mixes them."""
    drawn = _mixture_of(config, dataset, {}) if is_mixed else None
    return Loader(
        dataset,
        stages=[Stage(epochs=1, mixture=drawn)],
        batch_size=config.train.batch_size,
        max_length=config.data.max_length,
        packing=config.data.packing,
        sources=dataset.sources,
        seed=config.seed,
    )


def _stages_of(config: RunConfig, train_set: TokenizedSet) -> list[Stage]:
    """The parts of the training; one, if the config names none."""
    if not config.stages:
        drawn = _mixture_of(config, train_set, {})
        return [Stage(epochs=config.train.epochs, steps=config.train.steps, mixture=drawn)]
    drawn = [_mixture_of(config, train_set, stage.weights) for stage in config.stages]
    scores_N = None
    if _is_scored(config):
        everything = np.arange(len(train_set))
        scored = [of for stage, of in zip(config.stages, drawn, strict=True) if stage.order == "score"]
        asked = np.unique(np.concatenate([everything if of is None else of.members() for of in scored]))
        scores_N = scores_of(train_set, asked, config.data.quality)
    return [
        Stage(epochs=stage.epochs, steps=stage.steps, mixture=of, order=stage.order, scores_N=scores_N)
        for stage, of in zip(config.stages, drawn, strict=True)
    ]


def _mixture_of(config: RunConfig, train_set: TokenizedSet, weights: Mapping[str, float]) -> Mixture | None:
    """What an epoch draws of the named sets; None if there are none."""
    sets = config.data.sets
    if not sets:
        return None
    members = {name: train_set.of_source(name) for name in sets}
    return mixture(sets, members, seed=config.seed, temperature=config.data.temperature, weights=weights)


def stage_line(config: RunConfig, loader: Loader | StreamLoader, number: int) -> str:
    """What a stage is: its steps, what it draws, in which order, its learning rate, what it starts from."""
    stage = config.stages[number]
    first, last = loader.stage_ends[number - 1] if number else 0, loader.stage_ends[number]
    said = [f"steps {first + 1:,} to {last:,}"]
    said += [f"weights {', '.join(f'{name} {weight:g}' for name, weight in stage.weights.items())}"] * bool(
        stage.weights
    )
    said += [_ORDERS[stage.order]]
    said += [f"learning rate {config.optim.lr if stage.lr is None else stage.lr:g}"]
    said += [_STARTS[stage.start]] * bool(number)
    name = f" ({stage.name})" if stage.name else ""
    return f"stage {number + 1} of {len(config.stages)}{name} begins: " + "; ".join(said)


def first_blocks(
    config: RunConfig, parts: Sequence[Part], template: ChatTemplate, *, max_positions: int
) -> TokenizedSet:
    """What a stream begins with: the first block of each row of the batch, as a set.

    Raises:
        ValueError: of the data.
    """
    plan = _planned(config, parts, max_positions)
    loader = training_loader(config, plan, plan.sources, template)
    assert isinstance(loader, StreamLoader)
    with tempfile.TemporaryDirectory(prefix="jax-sft-") as scratch:
        with Writer(pathlib.Path(scratch)) as writer:
            for block in loader.first_blocks():
                for row in block.rows:
                    for sequence in row:
                        writer.append(sequence)
            writer.finish(loader.account)
        return load(pathlib.Path(scratch), in_memory=True)


def _shares(config: RunConfig, weights: Mapping[str, float]) -> list[float]:
    """Of each set of a stream its part of a block's conversations."""
    sets = config.data.sets
    if len(sets) < 2:
        return [1.0]
    drawn = [weights.get(name, 0.0) if weights else part.weight or 0.0 for name, part in sets.items()]
    return [weight / sum(drawn) for weight in drawn]


def rates(config: RunConfig, loader: Loader | StreamLoader) -> list[tuple[int, float | None]]:
    """Steps and learning rate of each stage."""
    steps = np.diff(loader.stage_ends, prepend=0).tolist()
    return [(n, stage.lr) for n, stage in zip(steps, config.stages, strict=True)] if config.stages else []


def validation_loader(config: RunConfig, validation_set: TokenizedSet, sources: tuple[str, ...]) -> Loader:
    """One pass over the validation set in a fixed order, in batches of a micro-batch's size."""
    return Loader(
        validation_set,
        batch_size=config.train.batch_size // config.train.accumulation,
        max_length=config.data.max_length,
        packing=config.data.packing,
        sources=sources,
        seed=None,
    )


def resume_fingerprint(config: RunConfig, base: Pretrained, train_set: TokenizedSet | Plan) -> dict[str, Any]:
    """What must be the same for a resumed run to equal an uninterrupted one; cadence and mesh may change."""
    scores = config.data.quality.scores
    # What the data's hash is made of is said beside it, so that a difference has a name.
    options = {f"data.{name}": getattr(config.data, name) for name in OPTIONS}
    return options | {
        "model": dataclasses.asdict(base.config),
        "model.weights": weights_hash(base.path),
        "model.dtype": config.model.dtype,
        **({"model.new_rows": config.model.new_rows} if base.new_ids else {}),
        "data": train_set.fingerprint,
        **({"data.holdout": config.data.holdout} if config.data.holdout else {}),
        **(_streamed(config, base) if config.data.stream.on else {}),
        "data.max_length": config.data.max_length,
        "data.packing": config.data.packing,
        **({"data.sets": {name: _drawn(part) for name, part in config.data.sets.items()}} if config.data.sets else {}),
        **({"data.quality.scores": _hash_of(scores)} if scores and _is_scored(config) else {}),
        **({"data.quality": dataclasses.asdict(config.data.quality)} if config.data.quality != QualityConfig() else {}),
        **({"data.temperature": config.data.temperature} if config.data.temperature is not None else {}),
        **({"stages": [dataclasses.asdict(stage) for stage in config.stages]} if config.stages else {}),
        "seed": config.seed,
        **({"train.base_kl": config.train.base_kl} if config.train.base_kl else {}),
        **({"train.ema_decay": config.train.ema_decay} if config.train.ema_decay else {}),
        **({"lora.b_lr_ratio": config.lora.b_lr_ratio} if config.lora.b_lr_ratio != 1 else {}),
        "train.batch_size": config.train.batch_size,
        "train.epochs": config.train.epochs,
        "train.steps": config.train.steps,
        **{f"optim.{k}": v for k, v in dataclasses.asdict(config.optim).items() if k != "decay_to_base" or v},
    }


def _is_scored(config: RunConfig) -> bool:
    return any(stage.order == "score" for stage in config.stages)


def _hash_of(path: str) -> str:
    return hashlib.blake2b(pathlib.Path(path).expanduser().read_bytes(), digest_size=16).hexdigest()


def _streamed(config: RunConfig, base: Pretrained) -> dict[str, Any]:
    """What is part of a tokenised set's own hash, but not of the hash of a stream's units."""
    told = dataclasses.asdict(config.data.stream) | {"template": base.template.fingerprint}
    return {f"data.stream.{name}": value for name, value in told.items()}


def _drawn(part: SetConfig) -> dict[str, Any]:
    """What a set says beside its files, which the data's hash knows."""
    return {name: value for name, value in dataclasses.asdict(part).items() if name != "paths"}
