"""Loss and accuracy of a model on a tokenised set, in total and by source.

In: an evaluation step and a Loader over the set. Out: sums over every trained token, divided once at the end, so the
result does not move with the batch size.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from jax_sft.batch import Batch
from jax_sft.data.loader import Loader
from jax_sft.loss import Tally
from jax_sft.sharding import local_rows, put_batch


@dataclasses.dataclass(frozen=True)
class Losses:
    """Means over trained tokens: nats per token, share of tokens that greedy decoding would hit."""

    loss: float
    accuracy: float
    tokens: float
    by_source: dict[str, dict[str, float]]

    def to_dict(self) -> dict[str, Any]:
        """The shape of `jax-sft eval --out`."""
        return dataclasses.asdict(self)


def evaluate_losses(
    eval_step: Callable[[Any, Any, Batch], Tally],
    params: Any,
    *,
    frozen: Any,
    loader: Loader,
    mesh: Mesh,
    sources: tuple[str, ...],
    label: str = "evaluating",
) -> Losses:
    """Run the whole loader once. Every process must call it; every process gets the same result."""
    rows = local_rows(mesh, batch_size=loader.batch_size)
    total: Tally | None = None
    bar = tqdm(
        total=loader.total_steps, desc=label, unit="batch", delay=2, leave=False, disable=jax.process_index() > 0
    )
    with bar:
        for _, batch in loader.prefetch(0, loader.total_steps, rows=rows):
            placed = put_batch(batch, mesh, rows=rows, batch_size=loader.batch_size)
            tally = jax.device_get(eval_step(params, frozen, Batch(*(x[0] for x in placed))))
            # float64 sums on the host: a set of millions of tokens loses digits in float32.
            tally = jax.tree.map(lambda x: np.asarray(x, np.float64), tally)
            total = tally if total is None else jax.tree.map(np.add, total, tally)
            bar.update()
    assert total is not None, "a tokenised set is never empty"
    return Losses(**total.mean(), by_source=total.by_source(sources))
