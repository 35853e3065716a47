"""What stands out in the scores of a set: quantiles, histograms, the hardest and the easiest conversations.

In: scores in the set's order, the set and its chat template. Out: lines for a terminal, and one self-contained SVG.
Nothing is printed or written here.
"""

import html
import itertools
from collections.abc import Sequence

import numpy as np

from jax_sft.data.pieces import visible
from jax_sft.data.scores import Score
from jax_sft.data.store import TokenizedSet
from jax_sft.data.template import ChatTemplate
from jax_sft.report.summary import Histogram

_QUANTILES = (0, 5, 25, 50, 75, 95, 100)
_EXTREMES = 5  # conversations shown of either end
_BINS = 20
_PROMPT_CHARACTERS, _ANSWER_CHARACTERS = 60, 100
_WIDTH, _HEIGHT, _MARGIN, _FOOT, _HEAD = 640, 220, 20, 36, 44  # of one histogram


def summary(scores: Sequence[Score], dataset: TokenizedSet, ends_C: np.ndarray, template: ChatTemplate) -> list[str]:
    """The lines.

    Args:
        ends_C: the sequence after the last of each conversation, as of `scores.conversation_ends`.
    """
    ratios = [(score.ratio, i) for i, score in enumerate(scores) if score.ratio is not None]
    lines = [f"scored {len(scores):,} conversations, {sum(score.tokens for score in scores):,} trained tokens"]
    lines.append("  quantiles            " + "".join(f"{_percent(q):>9}" for q in _QUANTILES))
    for name, values in (
        ("loss", [score.loss for score in scores]),
        ("loss without prompt", [s.loss_without_prompt for s in scores if s.loss_without_prompt is not None]),
        ("ratio", [ratio for ratio, _ in ratios]),
    ):
        if values:
            quantiles = np.percentile(np.asarray(values, np.float64), _QUANTILES)
            lines.append(f"  {name:<21}" + "".join(f"{x:9.3f}" for x in quantiles))
    without = sum(score.loss_without_prompt is None for score in scores)
    if without:
        lines.append(f"  {without:,} of them have no prompt, so that there is no ratio (null in the file)")
    if ratios:
        above = sum(ratio > 1 for ratio, _ in ratios)
        lines.append(f"  ratio above 1, where the prompt does not help: {above:,} ({above / len(ratios):.1%})")
    by, order = ("ratio", ratios) if ratios else ("loss", [(score.loss, i) for i, score in enumerate(scores)])
    order = sorted(order)
    for name, ends in (("highest", order[::-1]), ("lowest", order)):
        lines.append(f"  {name} {by}:")
        for value, i in ends[: min(_EXTREMES, -(-len(order) // 2))]:
            first = int(ends_C[i - 1]) if i else 0
            where = f"{visible(scores[i].id)} (loss {scores[i].loss:.3f}, {scores[i].tokens} tokens)"
            lines += [f"    {value:.3f}  {where}", f"           {_excerpt(dataset, first, template)}"]
    return lines


def _percent(quantile: int) -> str:
    return {0: "least", 50: "median", 100: "most"}.get(quantile, f"{quantile} %")


def _excerpt(dataset: TokenizedSet, i: int, template: ChatTemplate) -> str:
    """The end of what is asked in a sequence, and the beginning of its first answer, on one line."""
    sequence = dataset[i]
    tokens = np.concatenate([sequence.tokens_T[:1], sequence.targets_T])
    weights = np.concatenate([[0.0], sequence.weights_T])
    start = int(np.flatnonzero(weights)[0])
    end = start + int(np.argmin(np.append(weights[start:] > 0, False)))
    prompt, answer = (
        " ".join(visible(template.tokenizer.decode(part.tolist(), skip_special_tokens=True)).split())
        for part in (tokens[:start], tokens[start:end])
    )
    prompt = prompt if len(prompt) <= _PROMPT_CHARACTERS else "…" + prompt[-_PROMPT_CHARACTERS:]
    answer = answer if len(answer) <= _ANSWER_CHARACTERS else answer[:_ANSWER_CHARACTERS] + "…"
    return f"{prompt} → {answer}" if prompt else f"→ {answer}"


def histograms(scores: Sequence[Score]) -> list[Histogram]:
    """Of the ratio, where there is one, and of the loss; the rare highest values share the last bin."""
    values = {
        "ratio": [score.ratio for score in scores if score.ratio is not None],
        "loss": [score.loss for score in scores],
    }
    found = []
    for name, numbers in values.items():
        if not numbers:
            continue
        x = np.asarray(numbers, np.float64)
        low, high = 0.0, max(float(np.percentile(x, 99)), 1e-9)
        counts, edges = np.histogram(np.minimum(x, high), bins=_BINS, range=(low, high))
        labels = [f"{a:.2f} to {b:.2f}" for a, b in itertools.pairwise(edges.tolist())]
        labels[-1] = f"{edges[-2]:.2f} to {x.max():.2f}"
        title = f"{name}: median {np.median(x):.3f}, mean {x.mean():.3f}, {len(x):,} conversations"
        found.append(Histogram(title, tuple(labels), tuple(counts.tolist())))
    return found


def picture(drawn: Sequence[Histogram]) -> str:
    """Histograms, one above the other, as one SVG that loads nothing."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT * len(drawn)}" '
        f'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="#fff"/>'
    ]
    for number, histogram in enumerate(drawn):
        top, base = number * _HEIGHT, (number + 1) * _HEIGHT - _FOOT
        step = (_WIDTH - 2 * _MARGIN) / len(histogram.counts)
        parts.append(f'<text x="{_MARGIN}" y="{top + 24}" font-weight="bold">{html.escape(histogram.title)}</text>')
        for b, (label, count) in enumerate(zip(histogram.labels, histogram.counts, strict=True)):
            tall = (_HEIGHT - _FOOT - _HEAD) * count / max(histogram.counts)
            left = _MARGIN + b * step
            parts.append(
                f'<rect x="{left + 0.06 * step:.1f}" y="{base - tall:.1f}" width="{0.88 * step:.1f}" '
                f'height="{tall:.1f}" fill="#4477aa"><title>{html.escape(label)}: {count:,}</title></rect>'
            )
            if b % 4 == 0:
                parts.append(f'<text x="{left:.1f}" y="{base + 16}" fill="#555">{label.split(" ")[0]}</text>')
        parts.append(f'<path d="M{_MARGIN} {base}H{_WIDTH - _MARGIN}" stroke="#999"/>')
    return "".join([*parts, "</svg>\n"])
