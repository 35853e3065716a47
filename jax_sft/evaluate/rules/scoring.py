"""Whether answers follow their prompts' instructions, and how often.

In: `RulePrompt`s and an answer to each. Out: a `Verdict` for each, and shares, strict and loose as IFEval has them.
"""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

from jax_sft.evaluate.rules.prompts import KINDS, RulePrompt


@dataclasses.dataclass(frozen=True)
class Verdict:
    """For each instruction of a prompt, in order, whether the answer follows it."""

    strict: tuple[bool, ...]
    loose: tuple[bool, ...]  # some variant of the answer follows it, see `check`


def check(prompt: RulePrompt, answer: str) -> Verdict:
    """Check one answer; a blank one follows nothing.

    Strict looks at the answer as it is. Loose is content if the answer, or the answer without its first line, its last
    or both, follows the instruction, each of these also without asterisks: a line of greeting and bold type are
    forgiven (IFEval, section 2.2).
    """
    variants = _variants(answer)
    followed = [
        [bool(v.strip()) and KINDS[i.id].follows(v, **i.arguments) for v in variants] for i in prompt.instructions
    ]
    return Verdict(strict=tuple(f[0] for f in followed), loose=tuple(map(any, followed)))


def scores(prompts: Sequence[RulePrompt], answers: Sequence[str]) -> dict[str, Any]:
    """How often the answers follow.

    Returns:
        prompts, instructions: how many there are. prompt_strict, prompt_loose: the share of prompts all of whose
        instructions are followed. instruction_strict, instruction_loose: the share of instructions. by_kind: of each
        id that occurs, {"count", "strict", "loose"}, in the order of their names. Shares are from 0 to 1.

    Raises:
        ValueError: no prompts, or not an answer for each.
    """
    if not prompts or len(prompts) != len(answers):
        raise ValueError(f"{len(prompts)} prompts and {len(answers)} answers; give at least one prompt, each an answer")
    verdicts = [check(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    by_kind: dict[str, list[tuple[bool, bool]]] = collections.defaultdict(list)
    for prompt, verdict in zip(prompts, verdicts, strict=True):
        for instruction, strict, loose in zip(prompt.instructions, verdict.strict, verdict.loose, strict=True):
            by_kind[instruction.id].append((strict, loose))
    every = [followed for kind in by_kind.values() for followed in kind]
    return {
        "prompts": len(prompts),
        "instructions": len(every),
        "prompt_strict": _share([all(v.strict) for v in verdicts]),
        "prompt_loose": _share([all(v.loose) for v in verdicts]),
        "instruction_strict": _share([strict for strict, _ in every]),
        "instruction_loose": _share([loose for _, loose in every]),
        "by_kind": {
            id: {
                "count": len(kind),
                "strict": _share([s for s, _ in kind]),
                "loose": _share([loose for _, loose in kind]),
            }
            for id, kind in sorted(by_kind.items())
        },
    }


def _share(followed: Sequence[bool]) -> float:
    return sum(followed) / len(followed)


def _variants(answer: str) -> list[str]:
    lines = answer.split("\n")
    kept = [answer, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return [*kept, *(text.replace("*", "") for text in kept)]
