"""What is said of each training step: loss, gradient norm, speed, padding, MFU; and which rows made a loss not finite.

In: a step's device-side numbers, and when it ended. Out: a line of metrics and of the progress bar, one step late,
so that the device never waits for the host.
"""

import collections
import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np
from tqdm import tqdm

from jax_sft.data.loader import Loader
from jax_sft.data.stream.loader import StreamLoader
from jax_sft.loss import Tally
from jax_sft.metrics import MFU, Metrics, peak_flops
from jax_sft.train_step import StepMetrics

_log = logging.getLogger(__name__)

_SPEED_STEPS = 20  # speed is an average over this many steps


class NonFiniteLossError(ValueError):
    """A loss or gradient was not a number; the message names the rows of the batch."""


class StepLog:
    """Reads a step's numbers one step late and turns them into a log line.

    Args:
        lr_at: the learning rate of a step.
        every_steps: steps between two lines of metrics.
        nonfinite: what a loss that is not finite does.
        started: `time.perf_counter()` when the run began, for the time to the first step.
    """

    def __init__(
        self,
        metrics: Metrics,
        *,
        loader: Loader | StreamLoader,
        flops_of: Callable[[np.ndarray, int], int],
        lr_at: Callable[[Any], Any],
        every_steps: int,
        nonfinite: Literal["stop", "skip"],
        started: float,
    ) -> None:
        self._metrics = metrics
        self._loader = loader
        self._flops_of = flops_of
        self._lr_at = lr_at
        self._every_steps = every_steps
        self._nonfinite = nonfinite
        self._started = started
        self._pending: tuple[int, StepMetrics] | None = None
        self._peak, source = peak_flops()
        self._paused = 0.0  # seconds of evaluations and saves, which are no training
        # Clock and running sums after each of the last steps. Speed is measured over all of them: a single interval
        # between two readings may be zero, since a step can be finished long before its numbers are read.
        self._marks: collections.deque[dict[str, float]] = collections.deque(maxlen=_SPEED_STEPS + 1)
        _log.info("MFU = %s, which is %.3g (%s)", MFU, self._peak, source)

    def pend(self, step: int, measured: StepMetrics) -> None:
        """Keep the numbers of a step that was just sent to the device."""
        self._pending = (step, measured)

    @property
    def tokens(self) -> tuple[int, int]:
        """Since the start, those of the rows and those that were trained on."""
        newest = self._marks[-1] if self._marks else {"tokens": 0.0, "trained": 0.0}
        return int(newest["tokens"]), int(newest["trained"])

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time spent inside out of the speed."""
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    def finish_pending(self, bar: tqdm) -> tuple[int, float, float]:
        """Wait for the kept step and log it.

        Returns:
            1 if the step was skipped, else 0; and of one that was not, its sums of weighted loss and of weight.

        Raises:
            NonFiniteLossError: it was not finite and `train.nonfinite` says stop.
        """
        if self._pending is None:
            return 0, 0.0, 0.0
        (step, measured), self._pending = self._pending, None
        tally, grad_norm, finite = jax.device_get((measured.tally, measured.grad_norm, measured.finite))
        done = step + 1
        weight = float(np.sum(tally.weight, dtype=np.float64))
        values = {
            "loss": float(np.sum(tally.loss, dtype=np.float64)) / weight if weight else math.nan,
            "accuracy": float(np.sum(tally.correct, dtype=np.float64)) / weight if weight else math.nan,
            "lr": float(self._lr_at(step)),
            "grad_norm": float(grad_norm),
            "epoch": self._loader.epoch_of(done),
        }
        base_kl = float(np.sum(tally.kl, dtype=np.float64))
        if weight and base_kl:  # train.base_kl compares
            values["base_kl"] = base_kl / weight
        if len(self._loader.stage_ends) > 1:
            values["stage"] = self._loader.stage_of(step)
        values |= _by_source(tally, self._loader.sources, weight) if len(self._loader.sources) > 1 else {}
        if not self._marks:
            values["seconds_to_first_step"] = time.perf_counter() - self._started
        values |= self._speed(self._loader.lengths(step).astype(np.int64), int(np.sum(tally.tokens)))
        bar.update()
        shown = {"loss": "loss={:.4f}", "lr": "lr={:.2e}", "grad_norm": "grad={:.2f}", "tokens_per_s": "tok/s={:.0f}"}
        shown |= {"trained_tokens_per_s": "trained/s={:.0f}", "padding_share": "pad={:.1%}", "mfu": "mfu={:.1%}"}
        bar.set_postfix_str(" ".join(text.format(values[key]) for key, text in shown.items() if key in values))
        if done % self._every_steps == 0 or done == self._loader.total_steps or not finite:
            self._metrics.write(done, values)
        if not finite:
            self._report_nonfinite(step)
        return (0, float(np.sum(tally.loss, dtype=np.float64)), weight) if finite else (1, 0.0, 0.0)

    def _speed(self, lengths: np.ndarray, trained: int) -> dict[str, float]:
        """Tokens per second, padding and MFU over the last steps; the first compiles, the second is read too soon."""
        flops = self._flops_of(lengths, trained)
        sums = {
            "tokens": float(lengths.sum()),
            "trained": float(trained),
            "positions": float(self._loader.batch_size * self._loader.max_length),
            "flops": float(flops),
            "steps": 1.0,
        }
        before = self._marks[-1] if self._marks else dict.fromkeys(sums, 0.0)
        mark = {key: before[key] + value for key, value in sums.items()}
        mark["seconds"] = time.perf_counter() - self._paused
        self._marks.append(mark)
        if len(self._marks) < 3:
            return {"padding_share": 1 - sums["tokens"] / sums["positions"]}
        done = {key: mark[key] - self._marks[0][key] for key in mark}
        return {
            "padding_share": 1 - done["tokens"] / done["positions"],
            "tokens_per_s": done["tokens"] / done["seconds"],
            "trained_tokens_per_s": done["trained"] / done["seconds"],
            "mfu": done["flops"] / done["seconds"] / self._peak,
            "seconds_per_step": done["seconds"] / done["steps"],
        }

    def _report_nonfinite(self, step: int) -> None:
        ids = self._loader.ids(step)
        shown = ", ".join(ids[:20]) + (f" and {len(ids) - 20} more" if len(ids) > 20 else "")
        message = (
            f"step {step + 1}: the loss or its gradient is not finite; the weights were left as they were. Rows of the "
            f"batch: {shown}. Look at them with `jax-sft data --dump`. To leave such steps out, go on here with "
            "--config.train.nonfinite=skip; or correct the data or lower optim.lr, and begin in a new workdir"
        )
        if self._nonfinite == "stop":
            raise NonFiniteLossError(message)
        _log.warning(message)


def _by_source(tally: Tally, sources: Sequence[str], weight: float) -> dict[str, float]:
    """Loss and accuracy of each source that the step had, and its share of the step's weight."""
    shares = dict(zip(sources, np.asarray(tally.weight, np.float64) / (weight or 1), strict=True))
    values = {}
    for name, means in tally.by_source(sources).items():
        values |= {f"loss/{name}": means["loss"], f"accuracy/{name}": means["accuracy"], f"share/{name}": shares[name]}
    return values
