"""What a start of a run costs: seconds by what they were spent on, and tokens.

In: when it began, and what is done in between. Out: plain numbers for the manifest.
"""

import collections
import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


class Clock:
    """Seconds of this process; those that nobody names are of the training itself."""

    def __init__(self, started: float) -> None:
        """`started` as `time.perf_counter()` gave it."""
        self._started = started
        self._parts: dict[str, float] = collections.defaultdict(float)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What happens inside is `name`; one part does not hold another."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._parts[name] += time.perf_counter() - start

    def set_up(self) -> None:
        """All until now was setting up."""
        self._parts["setting up"] = time.perf_counter() - self._started

    def cost(self, *, tokens: int, trained_tokens: int) -> dict[str, Any]:
        """Of this start, so far."""
        seconds = time.perf_counter() - self._started
        parts = {**self._parts, "training": max(0.0, seconds - sum(self._parts.values()))}
        return {"seconds": seconds, "parts": parts, "tokens": tokens, "trained_tokens": trained_tokens}


def total(costs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of several starts; goodput is the share of their seconds that was training."""
    parts: dict[str, float] = collections.defaultdict(float)
    for cost in costs:
        for name, seconds in cost["parts"].items():
            parts[name] += seconds
    sums = {name: sum(cost[name] for cost in costs) for name in ("seconds", "tokens", "trained_tokens")}
    return {**sums, "parts": dict(parts), "goodput": parts["training"] / sums["seconds"] if sums["seconds"] else 0.0}
