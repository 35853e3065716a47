"""Many judgements as shares, and two models side by side.

In: judgements. Out: numbers by behaviour, kind and language; lines for the terminal.
"""

import math
import statistics
from collections.abc import Mapping, Sequence

from jax_sft.evaluate.probes.judge import BEHAVIOURS, Judgement

Z = 1.959964  # of a normal distribution: 95 % lie within as many deviations


def summary(judgements: Sequence[Judgement]) -> dict[str, float]:
    """Shares of True among what is True or False, and over how many answers.

    Keys: "answers" and "answers/count" (and so for each behaviour that applied at all), the same of a part of the
    probes as "kind=recall/answers" and "language=zh/answers/count"; "count", answers in all; "tokens", the mean of an
    answer; "length_ratio", the median, and "length_ratio/count" where there were references.
    """
    numbers = {"count": float(len(judgements)), **_shares(judgements, "")}
    if judgements:
        numbers["tokens"] = statistics.fmean(j.tokens for j in judgements)
    ratios = [j.length_ratio for j in judgements if j.length_ratio is not None]
    if ratios:
        numbers |= {"length_ratio": statistics.median(ratios), "length_ratio/count": float(len(ratios))}
    for kind in dict.fromkeys(j.kind for j in judgements):
        numbers |= _shares([j for j in judgements if j.kind == kind], f"kind={kind}/")
    for language in dict.fromkeys(j.language_of_probe for j in judgements):
        numbers |= _shares([j for j in judgements if j.language_of_probe == language], f"language={language}/")
    return numbers


def _shares(judgements: Sequence[Judgement], part: str) -> dict[str, float]:
    numbers = {}
    for behaviour in BEHAVIOURS:
        told = [j for j in (getattr(one, behaviour) for one in judgements) if j is not None]
        if told:
            numbers |= {f"{part}{behaviour}": sum(told) / len(told), f"{part}{behaviour}/count": float(len(told))}
    return numbers


def wilson(share: float, count: float) -> tuple[float, float]:
    """The 95 % interval of a share of `count` answers; (0, 1) of none.

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, Journal of the American
    Statistical Association 22 (1927), 209-212.
    """
    if not count:
        return 0.0, 1.0
    middle = share + Z * Z / (2 * count)
    half = Z * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count))
    scale = 1 + Z * Z / count
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def difference(before: tuple[float, float], after: tuple[float, float]) -> tuple[float, float]:
    """The 95 % interval of the second share less the first, each (share, count), as if of answers to other probes.

    Both models answer the same probes, so the true interval is rather narrower. Source: R. G. Newcombe, Interval
    estimation for the difference between independent proportions, Statistics in Medicine 17 (1998), 873-890, method 10.
    """
    (low_b, high_b), (low_a, high_a) = wilson(*before), wilson(*after)
    change = after[0] - before[0]
    down = math.hypot(after[0] - low_a, high_b - before[0])
    up = math.hypot(high_a - after[0], before[0] - low_b)
    return max(-1.0, change - down), min(1.0, change + up)


def table(before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
    """Lines for the terminal from two summaries: shares with intervals, and their difference with its own.

    A line for each behaviour in all, then by kind and by language; "*" marks a difference whose interval has no zero.
    """
    names = [k for k in dict.fromkeys((*before, *after)) if k.split("/")[-1] in BEHAVIOURS]
    names.sort(key=lambda name: "/" in name)  # all probes first; parts stay in their order
    width = max(map(len, names), default=0)
    lines = [f"{'behaviour':<{width}}  {'before':<25}{'after':<25}change"] if names else []
    for name in names:
        pairs = [(m[name], m[f"{name}/count"]) if name in m else None for m in (before, after)]
        cells = "".join(f"{_cell(pair):<25}" for pair in pairs)
        lines.append(f"{name:<{width}}  {cells}{_change(*pairs)}".rstrip())
    for name in ("tokens", "length_ratio"):
        if name in before and name in after:
            lines.append(f"{name:<{width}}  {before[name]:<25.2f}{after[name]:<25.2f}{after[name] - before[name]:+.2f}")
    return lines


def _cell(pair: tuple[float, float] | None) -> str:
    if pair is None:
        return "none"
    low, high = wilson(*pair)
    return f"{pair[0]:.0%} [{low:.0%}, {high:.0%}] of {pair[1]:.0f}"


def _change(before: tuple[float, float] | None, after: tuple[float, float] | None) -> str:
    if before is None or after is None:
        return ""
    low, high = difference(before, after)
    sure = " *" if low > 0 or high < 0 else ""
    return f"{after[0] - before[0]:+.0%} [{low:+.0%}, {high:+.0%}]{sure}"
