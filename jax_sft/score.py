"""`jax-sft data --score`: how hard each conversation is for the base model, into a file, and what stands out.

In: a RunConfig, its model and its tokenised training set. Out: the file of scores (`data.scores`) and beside it a
picture, from the first process; lines for the terminal. All processes call it. What an interrupted scoring has done
is not done again.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import pathlib

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from jax_sft.config import RunConfig
from jax_sft.data.bare import Bare
from jax_sft.data.scores import PartialFile, check_ids, read_scores
from jax_sft.data.store import TokenizedSet
from jax_sft.evaluate.difficulty import Plan, Scorer, make_nll_step
from jax_sft.hf.load import Pretrained
from jax_sft.hf.stored import weights_hash
from jax_sft.model.decoder import build
from jax_sft.parameters import Parameters, parameters
from jax_sft.report.scores import histograms, picture, summary
from jax_sft.sharding import local_rows, make_mesh

_log = logging.getLogger(__name__)


def score(config: RunConfig, base: Pretrained, dataset: TokenizedSet, out: pathlib.Path) -> list[str]:
    """Score the set into `out`, which `check_destination` has allowed. Returns the summary; [] but on process 0.

    Raises:
        ValueError: rows cannot be spread over the mesh; two conversations have one id; a loss is not finite.
    """
    mesh = make_mesh(config.mesh)
    batch_size = config.train.batch_size // config.train.accumulation
    local_rows(mesh, batch_size=batch_size)  # whether that can be, before anything is loaded
    held = _held(config, base)
    plan = Plan.of(dataset, batch_size=batch_size, max_length=config.data.max_length)
    check_ids(dataset, plan.ends_C)
    partial = PartialFile(out, _fingerprint(config, base, held, dataset, plan))
    is_first = jax.process_index() == 0
    done = partial.chunks_done(dataset, plan.ends_C, plan.chunk_ends) if is_first else 0
    if jax.process_count() > 1:
        done = int(multihost_utils.broadcast_one_to_all(np.int32(done)))
    first = plan.chunk_ends[done - 1] if done else 0
    if done:
        _log.info("%s: goes on behind the %d conversations that are scored there", partial.path, first)
    count = len(plan.ends_C)
    with jax.set_mesh(mesh):
        graphdef = build(base.config, dtype=config.model.dtype, attention=config.model.attention, lora=held.lora)
        params, frozen = held.load(base, mesh, seed=config.seed)
        step = make_nll_step(graphdef, loss_chunk_tokens=config.train.loss_chunk_tokens, mesh=mesh)
        forward = functools.partial(step, params, frozen)
        scorer = Scorer(forward, dataset, Bare.of(base.template), plan, mesh)
        bar = tqdm(total=count, initial=first, desc="scoring", unit=" conversations", leave=False, disable=not is_first)
        with bar:
            for chunk in scorer.chunks(done, lambda at: bar.update(at - bar.n)):
                if is_first:
                    partial.append(chunk)
    if not is_first:
        return []
    partial.finish()
    return _told(out, dataset, plan, base)


def _told(out: pathlib.Path, dataset: TokenizedSet, plan: Plan, base: Pretrained) -> list[str]:
    """Draw the picture; what to say of the scores."""
    found = read_scores(out)
    drawn = histograms(found)
    image = out.with_name(f"{out.name}.svg")
    image.write_text(picture(drawn), encoding="utf-8")
    lines = summary(found, dataset, plan.ends_C, base.template)
    return [*lines, f"wrote {out} and {image}"]


def _held(config: RunConfig, base: Pretrained) -> Parameters:
    """The model as it is before the training: nothing is trained, and adapters are those of a folder alone."""
    if config.lora.adapter is not None:
        return parameters(config, base)
    return Parameters(
        model=base.config,
        lora=None,
        in_full=frozenset(),
        frozen_layers={},
        base=config.lora.base if config.lora.rank > 0 else config.model.dtype,
        rslora=False,
        adapter=None,
    )


def _fingerprint(config: RunConfig, base: Pretrained, held: Parameters, dataset: TokenizedSet, plan: Plan) -> str:
    """What scores must share to stand in one file."""
    told = {
        "data": dataset.fingerprint,
        "template": base.template.fingerprint,
        "model": dataclasses.asdict(base.config),
        "weights": weights_hash(base.path),
        "adapter": None if held.adapter is None else weights_hash(held.adapter.file),
        "base": held.base,
        "dtype": config.model.dtype,
        "rows": (plan.batch_size, plan.length),
    }
    return hashlib.blake2b(json.dumps(told, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()
