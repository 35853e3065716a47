"""Does an answer do what was asked, where a program can tell: so many words, valid JSON, no commas, in Chinese.

In: prompts with instructions of the kinds in `KINDS`, and an answer to each. Out: a `Verdict` for each, and shares.
Kinds, their arguments and their meaning are those of IFEval (arXiv 2311.07911) where it has them (`published`); more
are ours, in the manner of IFBench and for Chinese (`own`). No jax.
"""

from jax_sft.evaluate.rules.prompts import KINDS, Instruction, RulePrompt, read_prompts
from jax_sft.evaluate.rules.scoring import Verdict, check, scores

__all__ = ["KINDS", "Instruction", "RulePrompt", "Verdict", "check", "read_prompts", "scores"]
