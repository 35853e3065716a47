"""What was found of a model's drift, in numbers and in words, and whether it is too much.

In: sums over compared tokens. Out: a `Drift` of means, lines for a terminal, an `Alarm` for each level of a
`ForgettingConfig` that is passed. Pure numbers and text, no jax.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from jax_sft.config import ForgettingConfig, LevelConfig

WAYS_OUT = (
    "lower optim.lr, train fewer steps, replay general data beside your own, pull the weights towards the base, or "
    "average them with the base at export"
)


@dataclasses.dataclass(frozen=True)
class Drift:
    """Means over the compared tokens, each by its weight; nats but for `agreement`, `tokens` and `by_source`."""

    loss: float  # of the model, a token
    base_loss: float  # of the model that it was fine-tuned from
    loss_per_byte: float | None  # of the UTF-8 text, so that tokenizers can be compared; None: the bytes are not known
    base_loss_per_byte: float | None
    kl: float  # KL(base || model): what the base would say, and the model would not
    reverse_kl: float  # KL(model || base)
    agreement: float  # share of the tokens where both find the same token the likeliest
    tokens: float
    by_source: Mapping[str, Mapping[str, float | None]] = dataclasses.field(default_factory=dict)  # the same of each

    @property
    def loss_rise(self) -> float:
        """How much more the model loses than the base, nats a token; below 0 where it got better."""
        return self.loss - self.base_loss

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {**dataclasses.asdict(self), "loss_rise": self.loss_rise}


@dataclasses.dataclass(frozen=True)
class Alarm:
    """A limit that is passed."""

    level: Literal["alarm", "stop"]
    text: str  # the number, the limit, and the ways out


def judge(drift: Drift, limits: ForgettingConfig) -> list[Alarm]:
    """An alarm for each limit that is passed, by its worse level; a number that is not finite passes every limit."""
    found = []
    measured = (
        ("the loss has risen by {} nats a token over the base's", drift.loss_rise, limits.loss_rise, False),
        ("KL(base || model) is {} nats a token", drift.kl, limits.kl, False),
        ("model and base agree on the likeliest token at a share of {} only", drift.agreement, limits.agreement, True),
    )
    for said, value, level, is_least in measured:
        passed = _passed(value, level, is_least=is_least)
        if passed is not None:
            word, limit = passed
            bound = "the least allowed" if is_least else "the limit"
            text = f"{said.format(_number(value))}, {bound} ({word}) is {limit:g}: the model forgets; {WAYS_OUT}"
            found.append(Alarm(word, text))
    return found


def _passed(value: float, level: LevelConfig, *, is_least: bool) -> tuple[Literal["alarm", "stop"], float] | None:
    def passes(limit: float) -> bool:
        # As "is not within", so that NaN passes.
        return not (math.isfinite(value) and (value >= limit if is_least else value <= limit))

    if level.stop is not None and passes(level.stop):
        return "stop", level.stop
    if level.alarm is not None and passes(level.alarm):
        return "alarm", level.alarm
    return None


def lines(drift: Drift, *, of: str = "general text") -> list[str]:
    """The drift for a terminal: losses, distances, and a line for each source where there are several."""
    per_byte = ""
    if drift.loss_per_byte is not None and drift.base_loss_per_byte is not None:
        per_byte = f"; a byte {drift.loss_per_byte:.4f}, base {drift.base_loss_per_byte:.4f}"
    told = [
        f"{of}: loss {drift.loss:.4f} nats a token, base {drift.base_loss:.4f} ({drift.loss_rise:+.4f}){per_byte}",
        f"{of}: KL(base || model) {_number(drift.kl)}, KL(model || base) {_number(drift.reverse_kl)} nats a token; the "
        f"same likeliest token at {drift.agreement:.1%} of {drift.tokens:,.0f} tokens",
    ]
    if len(drift.by_source) < 2:
        return told
    for name, part in drift.by_source.items():
        loss, base_loss, kl, agreement, tokens = (
            part[key] or 0.0 for key in ("loss", "base_loss", "kl", "agreement", "tokens")
        )
        told.append(
            f"  {name}: loss {loss:.4f}, base {base_loss:.4f} ({loss - base_loss:+.4f}), KL {_number(kl)}, "
            f"{agreement:.1%} of {tokens:,.0f} tokens"
        )
    return told


def _number(value: float) -> str:
    """Four digits behind the point, or as many as a small number needs to be seen."""
    return f"{value:.4f}" if not 0 < abs(value) < 1e-3 else f"{value:.1e}"
