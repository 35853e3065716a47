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


def table(before: Mapping[str, float], after: Mapping[str, float] | None = None) -> list[str]:
    """Lines for the terminal: the shares of a summary with intervals; of two, also their difference with its own.

    A line for each behaviour in all, then by kind and by language; "*" marks a difference whose interval has no zero.
    """
    models = [before] if after is None else [before, after]
    names = [k for k in dict.fromkeys(key for m in models for key in m) if k.split("/")[-1] in BEHAVIOURS]
    names.sort(key=lambda name: "/" in name)  # all probes first; parts stay in their order
    width = max(map(len, names), default=0)
    heads = ["share"] if after is None else ["before", "after"]
    change = "" if after is None else "change"
    lines = [f"{'behaviour':<{width}}  {''.join(f'{head:<25}' for head in heads)}{change}".rstrip()] if names else []
    for name in names:
        pairs = [(m[name], m[f"{name}/count"]) if name in m else None for m in models]
        cells = "".join(f"{_cell(pair):<25}" for pair in pairs)
        lines.append(f"{name:<{width}}  {cells}{_change(*pairs) if len(pairs) == 2 else ''}".rstrip())
    for name in ("tokens", "length_ratio"):
        if all(name in m for m in models):
            cells = "".join(f"{m[name]:<25.2f}" for m in models)
            moved = f"{models[-1][name] - before[name]:+.2f}" if len(models) == 2 else ""
            lines.append(f"{name:<{width}}  {cells}{moved}".rstrip())
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
