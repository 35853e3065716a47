"""Weights between a base and what was trained of it: how much is learnt against how much is kept, chosen afterwards.

In: a trained tree, what it started as, a factor. Out: start + factor x (trained - start), in float32 (WiSE-FT, Wortsman
et al. 2022, arXiv 2109.01903); of adapters alone the same, by their second factors. A `sweep` measures several folders.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jax_sft.assistant import load_assistant
from jax_sft.evaluate.forgetting import Drift, Text
from jax_sft.evaluate.losses import Losses
from jax_sft.parameters import Parameters


def check_factor(factor: float) -> None:
    """0 is the base, 1 what was trained.

    Raises:
        ValueError: it is not between the two.
    """
    if not (math.isfinite(factor) and 0 <= factor <= 1):
        raise ValueError(f"--interpolate {factor:g}: 0 is the base and 1 what was trained; choose between them")


def between(start: Any, trained: Any, factor: float) -> Any:
    """Trees of the same arrays, which are used up; with 0 and 1 one of them, bit for bit."""
    if factor in (0, 1):
        kept, dropped = (trained, start) if factor == 1 else (start, trained)
        jax.tree.map(lambda x: x.delete(), dropped)
        return kept
    places = jax.tree.map(lambda x: x.sharding, trained)
    mix = functools.partial(jax.tree.map, lambda s, t: s + factor * (t - s))
    return jax.jit(mix, out_shardings=places, donate_argnums=1)(start, trained)


def scaled_adapters(plan: Parameters, trained: Mapping[str, Any], start: Any, factor: float) -> dict[str, Any]:
    """Adapters whose update counts `factor` times, and what is trained beside them, between `start` and trained.

    Raises:
        ValueError: their update is not in proportion to a factor of theirs (DoRA), or starts at another one (PiSSA).
    """
    assert plan.lora is not None
    if plan.lora.dora or plan.lora.start == "pissa":
        kind = "DoRA" if plan.lora.dora else "PiSSA"
        raise ValueError(
            f"--interpolate: what {kind} adapters add is no multiple of a smaller one; export with --format merged, "
            "which averages the weights themselves"
        )

    def scaled(path: Sequence[Any], x: Any) -> Any:
        return x * factor if path[-1].key.startswith("b_") else x

    factors = {"lora": jax.tree.map_with_path(scaled, trained["lora"])}
    beside = {name: tree for name, tree in trained.items() if name != "lora"}
    return factors | between(start, beside, factor)


@dataclasses.dataclass(frozen=True)
class Point:
    """One folder of a sweep."""

    factor: float
    folder: str
    losses: Losses | None
    drift: Drift | None

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "factor": self.factor,
            "folder": self.folder,
            "losses": None if self.losses is None else self.losses.to_dict(),
            "forgetting": None if self.drift is None else self.drift.to_dict(),
        }


def sweep(
    folders: Mapping[float, pathlib.Path],
    *,
    base: str,
    revision: str | None,
    are_adapters: bool,
    data: Sequence[str],
    texts: Sequence[Text],
) -> list[Point]:
    """What each folder loses on files, and how far it is from the base on general texts.

    Raises:
        ValueError: of the files.
    """
    load_base = functools.partial(load_assistant, base, revision=revision)
    assistant = load_base()
    reading = assistant.reading(texts) if texts else None
    del assistant
    found = []
    for factor, folder in folders.items():
        model = load_base(adapters=[str(folder)]) if are_adapters else load_assistant(str(folder))
        losses = model.losses(data)[0] if data else None
        drift = None if reading is None else model.drift(reading)
        found.append(Point(factor, str(folder), losses, drift))
        del model
    return found


def lines(points: Sequence[Point]) -> list[str]:
    """A table in Markdown."""
    told = ["| factor | loss on the data | loss on general text | KL(base \\|\\| model) | same likeliest token |"]
    told.append("|--:|--:|--:|--:|--:|")
    for point in points:
        loss = "" if point.losses is None else f"{point.losses.loss:.4f}"
        of = point.drift
        drift = " | | " if of is None else f"{of.loss:.4f} ({of.loss_rise:+.4f}) | {of.kl:.4f} | {of.agreement:.1%}"
        told.append(f"| {point.factor:g} | {loss} | {drift} |")
    return told
