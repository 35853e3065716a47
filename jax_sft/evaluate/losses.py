"""Loss and accuracy of a model on a tokenised set, in total and by source.

In: an evaluation step and a Loader over the set. Out: sums over every trained token, divided once at the end, so the
result does not move with the batch size.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from jax_sft.batch import Batch
from jax_sft.data.loader import Loader
from jax_sft.loss import Tally
from jax_sft.sharding import local_rows, put_batch

_Sums = TypeVar("_Sums")  # a tree of sums


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
    total: Tally | None = None
    for _, _, placed in placed_batches(loader, mesh, label=label):
        total = added(total, eval_step(params, frozen, placed))
    assert total is not None, "a tokenised set is never empty"
    return Losses(**total.mean(), by_source=total.by_source(sources))


def placed_batches(
    loader: Loader, mesh: Mesh, *, label: str, count: int | None = None
) -> Iterator[tuple[int, Batch, Batch]]:
    """The first `count` batches of a loader, or all: number, rows of this process, and the whole on the devices.

    With a progress bar. Every process must go through it.
    """
    rows = local_rows(mesh, batch_size=loader.batch_size)
    steps = loader.total_steps if count is None else count
    bar = tqdm(total=steps, desc=label, unit="batch", delay=2, leave=False, disable=jax.process_index() > 0)
    with bar:
        for number, batch in loader.prefetch(0, steps, rows=rows):
            placed = put_batch(batch, mesh, rows=rows, batch_size=loader.batch_size)
            yield number, batch, Batch(*(x[0] for x in placed))
            bar.update()


def added(total: _Sums | None, found: _Sums) -> _Sums:
    """Sums of a batch on top of those before, in float64 on the host: in float32 millions of tokens lose digits."""
    found = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get(found))
    return found if total is None else jax.tree.map(np.add, total, found)
