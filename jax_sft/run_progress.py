"""What the host must remember of a run from start to start; it travels with every checkpoint.

In: what was measured, step by step. Out: which step is the best, how long there was none better, what to be alarmed at.
"""

import dataclasses
import logging
import math
from typing import Any

from jax_sft.config import RunConfig, deciding_key, is_better_low
from jax_sft.evaluate.losses import Losses
from jax_sft.evaluations import Measured
from jax_sft.metrics import Alarm

_log = logging.getLogger(__name__)


@dataclasses.dataclass
class RunProgress:
    """See the module; as JSON in a checkpoint's host notes."""

    before: Losses | None = None  # validation, untrained
    before_deciding: float | None = None
    after: Losses | None = None  # the newest validation, of step `after_step`
    after_step: int = -1
    after_loss: float | None = None  # of that evaluation, what decides which step is the best: the lower the better
    best_loss: float | None = None  # of a step, not of the untrained model, which no checkpoint holds
    waited: int = 0  # evaluations since that
    stopped_by: list[float | None] | None = None  # the levels of evaluate.forgetting that ended the training
    skipped_steps: int = 0
    owed_step: int = -1  # a step whose evaluation a signal left to the next start
    late_losses: dict[str, float] = dataclasses.field(default_factory=dict)  # of such steps: not in their checkpoints
    validation: str | None = None  # fingerprint of the set that the losses belong to
    base: str = ""  # the model that the checkpoint belongs to, which one of adapters is nothing without
    lanes: list[list[int]] = dataclasses.field(default_factory=list)  # of a stream: where each of them is
    trained_loss: float = 0.0  # sums over the trained tokens since the last evaluation
    trained_weight: float = 0.0
    # The evaluation of the lowest validation loss: its step, that loss, and the training loss before it
    lowest: tuple[int, float, float] | None = None

    @classmethod
    def from_notes(cls, notes: dict[str, Any]) -> "RunProgress":
        """What `to_notes` made."""
        losses = {key: Losses(**notes[key]) if notes.get(key) else None for key in ("before", "after")}
        return cls(**{**notes, **losses})

    def to_notes(self) -> dict[str, Any]:
        """As JSON holds it."""
        return dataclasses.asdict(self)

    def compare_validation(self, fingerprint: str | None) -> None:
        """Losses of another validation set are no measure for the best."""
        if fingerprint != self.validation:
            _log.warning("the validation set is another one than before: the best loss is looked for anew")
            self.validation, self.best_loss, self.before, self.waited = fingerprint, None, None, 0
            self.after_step, self.after_loss, self.late_losses = -1, None, {}
            self.before_deciding, self.lowest = None, None

    def count(self, skipped: int, loss: float, weight: float) -> None:
        """Numbers of the steps since the last evaluation: those skipped, sums of the others."""
        self.skipped_steps += skipped
        self.trained_loss += loss
        self.trained_weight += weight

    def take(self, found: Measured, config: RunConfig) -> float | None:
        """Remember an evaluation. Returns what decides if it is the best so far."""
        deciding = found.deciding(config)
        if found.step == 0:
            self.before, self.before_deciding = found.losses, deciding
        self.stopped_by = _stop_levels(config) if found.must_stop else None
        if found.must_stop:  # such a step is never the best
            deciding = None
        self.after, self.after_step, self.after_loss = found.losses, found.step, deciding
        if found.step == 0 or deciding is None:
            return None
        if not deciding < (math.inf if self.best_loss is None else self.best_loss):
            self.waited += 1
            return None
        self.best_loss, self.waited = deciding, 0
        return deciding

    def trained_mean(self) -> float | None:
        """The training loss since the last evaluation, which begins anew; None if nothing was trained."""
        mean = self.trained_loss / self.trained_weight if self.trained_weight else None
        self.trained_loss = self.trained_weight = 0.0
        return mean

    def overfitting(self, step: int, loss: float, trained: float, *, rise: float | None) -> Alarm | None:
        """An alarm if the validation loss is well above its lowest while the training loss has gone on falling."""
        if not math.isfinite(loss):
            return None
        if self.lowest is None or loss < self.lowest[1]:
            self.lowest = (step, loss, trained)
            return None
        at, lowest, trained_then = self.lowest
        if rise is None or loss < lowest * (1 + rise) or trained >= trained_then:
            return None
        return Alarm(
            step,
            "overfitting",
            "alarm",
            f"validation loss {loss:.4f} is {loss / lowest - 1:.1%} above its lowest, {lowest:.4f} at step {at}, "
            f"while the training loss fell from {trained_then:.4f} to {trained:.4f}: the model learns its rows by "
            "heart. Train shorter (evaluate.patience ends in time and exports the best step), on more data, or with a "
            "lower optim.lr",
        )

    def best(self, config: RunConfig) -> str:
        """What is said of the best step: how good it is, or that the untrained model was better."""
        key = deciding_key(config.evaluate.best)
        is_low = is_better_low(key)
        name = "validation loss" if key == "validation/loss" else key
        if self.best_loss is None:
            return f"no step has a {name}"
        best, before = (None if x is None else x if is_low else -x for x in (self.best_loss, self.before_deciding))
        end = "lowest" if is_low else "highest"
        if self.before_deciding is not None and not self.best_loss < self.before_deciding:
            return f"{best:.4f} is the {end} {name} of a step; the untrained model's is {before:.4f}"
        return f"the {end} {name}, {best:.4f}"

    def is_over(self, config: RunConfig) -> bool:
        """Whether it forgot too much, or what decides has not become better for as long as the config is patient.

        With other levels, or more patience, it is not.
        """
        return self._has_forgotten(config) or (
            config.evaluate.patience is not None and self.waited >= config.evaluate.patience
        )

    def end(self, config: RunConfig) -> str:
        """Why it is over."""
        if self._has_forgotten(config):
            return "the model has forgotten more than evaluate.forgetting allows"
        return f"{self.waited} evaluations in a row without a better step"

    def _has_forgotten(self, config: RunConfig) -> bool:
        return self.stopped_by is not None and self.stopped_by == _stop_levels(config)


def _stop_levels(config: RunConfig) -> list[float | None]:
    of = config.evaluate.forgetting
    return [of.loss_rise.stop, of.kl.stop, of.agreement.stop]
