"""How much of each named set an epoch draws, and which of its sequences.

In: the sequences of each set, and what the config says of the sets. Out: the sequences of an epoch, by its number.
Of each set none is drawn twice before all have been drawn once, across epochs too:

    a set of 5, 3 drawn an epoch     epoch 0   4 0 2     epoch 1   1 3 | 0     epoch 2   2 4 1     | a new pass

A sequence is a conversation, or one answer of it where the chat template needs one rendering for each answer.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from jax_sft.config import SetConfig
from jax_sft.data.conversation import DataError


@dataclasses.dataclass(frozen=True)
class Share:
    """A set in a mixture."""

    name: str
    members: np.ndarray  # its sequences, increasing
    per_epoch: int  # drawn in an epoch; may be more than it has


class Mixture:
    """The sequences of each epoch."""

    def __init__(self, shares: Sequence[Share], *, seed: int | None) -> None:
        self.shares = tuple(share for share in shares if share.per_epoch)
        self._seed = seed

    def epoch(self, number: int) -> np.ndarray:
        """Sequences of an epoch, set after set, increasing in each; a small set may give the same one twice."""
        return np.concatenate([self._drawn(share, number) for share in self.shares])

    def members(self) -> np.ndarray:
        """All sequences that some epoch draws, in no order."""
        return np.concatenate([share.members for share in self.shares])

    def lines(self) -> list[str]:
        """What an epoch draws of each set, for the log; nothing where it draws everything there is, once."""
        total = sum(share.per_epoch for share in self.shares)
        if all(share.per_epoch == len(share.members) for share in self.shares):
            return []
        return [
            f"an epoch draws {share.per_epoch:,} of {share.name} ({share.per_epoch / total:.1%} of the epoch, "
            f"{share.per_epoch / len(share.members):.2f} passes over its {len(share.members):,})"
            for share in self.shares
        ]

    def _drawn(self, share: Share, epoch: int) -> np.ndarray:
        size, drawn = len(share.members), []
        at, stop = epoch * share.per_epoch, (epoch + 1) * share.per_epoch
        while at < stop:
            number, first = divmod(at, size)
            last = min(size, first + stop - at)
            drawn.append(self._pass(share, number)[first:last])
            at += last - first
        return np.sort(np.concatenate(drawn))

    def _pass(self, share: Share, number: int) -> np.ndarray:
        """All of a set in the order of one pass over it."""
        if self._seed is None:
            return share.members
        return np.random.default_rng([self._seed, _number_of(share.name), number]).permutation(share.members)


def everything(count: int, *, seed: int | None) -> Mixture:
    """All of `count` sequences once in an epoch."""
    return Mixture([Share("", np.arange(count), count)], seed=seed)


def mixture(
    sets: Mapping[str, SetConfig],
    members: Mapping[str, np.ndarray],
    *,
    seed: int,
    temperature: float | None = None,
    weights: Mapping[str, float] | None = None,
) -> Mixture:
    """What the config says of its sets.

    With weights (of a stage, or else of the sets, or by temperature) an epoch has as many sequences as the sets that
    have a weight, in the proportion of the weights; otherwise each set says how much of itself it gives. Temperature 1
    is in proportion to the sizes, a high one makes all sets alike (as in T5, arXiv 1910.10683).

    Args:
        members: the sequences of each set.
        weights: of a stage; they go before what the sets say. A set without one is left out.

    Raises:
        DataError: a set is empty, or so little of it is asked for that nothing would be drawn.
    """
    found = {name: _capped(name, part, members[name], seed) for name, part in sets.items()}
    for name, rows in found.items():
        if not len(rows):
            raise DataError(f"data.sets.{name}: none of its conversations is left to train on; mend it or take it out")
    sizes = {name: len(rows) for name, rows in found.items()}
    if not weights and temperature is not None:
        weights = {name: size ** (1 / temperature) for name, size in sizes.items()}
    if not weights:
        weights = {name: part.weight for name, part in sets.items() if part.weight is not None}
    counts = _by_weight(weights, sizes) if weights else {name: _own(part, sizes[name]) for name, part in sets.items()}
    nothing = [name for name, count in counts.items() if not count and (not weights or weights[name])]
    if nothing:
        raise DataError(
            f"data.sets.{nothing[0]}: not one of its {sizes[nothing[0]]} conversations would be drawn in an epoch; ask "
            "for more of it, or take it out"
        )
    return Mixture([Share(name, found[name], count) for name, count in counts.items()], seed=seed)


def _own(part: SetConfig, size: int) -> int:
    """What a set gives of itself in an epoch."""
    if part.count is not None:
        return part.count
    return size if part.epochs is None else round(part.epochs * size)


def _by_weight(weights: Mapping[str, float], sizes: Mapping[str, int]) -> dict[str, int]:
    """Whole numbers in proportion to the weights, together the sum of the sizes; the largest rests are rounded up."""
    total, together = sum(sizes[name] for name, w in weights.items() if w), sum(weights.values())
    exact = {name: total * weight / together for name, weight in weights.items()}
    counts = {name: int(x) for name, x in exact.items()}
    rests = sorted(exact, key=lambda name: (counts[name] - exact[name], name))
    for name in rests[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


def _capped(name: str, part: SetConfig, members: np.ndarray, seed: int) -> np.ndarray:
    if part.cap is None or len(members) <= part.cap:
        return members
    return np.sort(np.random.default_rng([seed, _number_of(name)]).choice(members, part.cap, replace=False))


def _number_of(name: str) -> int:
    """So that a set is drawn alike whatever other sets there are."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "big")
