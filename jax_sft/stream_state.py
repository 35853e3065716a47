"""What the hosts of a streamed run tell each other: where their lanes are, and what became of the rows.

In: each host's `StreamLoader`. Out: the states of all lanes for a checkpoint; sums over the hosts for the log. Every
process must call these at the same step.
"""

import logging

import jax
import numpy as np
from jax.experimental import multihost_utils

from jax_sft.data.stream.loader import StreamLoader
from jax_sft.metrics import Metrics

_log = logging.getLogger(__name__)


def gathered_states(loader: StreamLoader, done: int, rows: np.ndarray) -> list[list[int]]:
    """The states of all lanes when `done` steps are done, [lane][integer]; `rows` are those of this host."""
    mine = np.concatenate([rows[:, None], loader.states_after(done, rows)], axis=1)
    assert mine.max(initial=0) < 2**31, "jax gathers int32; a unit has fewer bytes and rows than that"
    states = {lane: state for lane, *state in _gathered(mine).tolist()}
    return [states[lane] for lane in range(loader.batch_size)]


def tell_account(loader: StreamLoader, metrics: Metrics, step: int) -> None:
    """Log what this start has read so far; the reasons on each host, the sums of all hosts as metrics.

    A checkpoint keeps no account: what earlier starts of a run read is not in it, and the text says so.
    """
    account = loader.account
    for line in account.lines():
        _log.info("train, since this start: %s", line)
    counts = {"read": account.read, "kept": account.kept}
    counts |= {kind: sum(getattr(account, kind).values()) for kind in ("dropped", "altered")}
    sums = _gathered(np.asarray([list(counts.values())])).sum(axis=0)
    metrics.write(step, {f"data/{name}": float(count) for name, count in zip(counts, sums, strict=True)})


def _gathered(mine: np.ndarray) -> np.ndarray:
    """The arrays of all processes, end to end."""
    if jax.process_count() == 1:
        return mine
    return np.asarray(multihost_utils.process_allgather(mine.astype(np.int32), tiled=True))
