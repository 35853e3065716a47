"""Behaviour probes: do the answers of a model show that it answers, or that it merely continues the text?

In: prompts, and what a model said to each; the model is asked elsewhere. Out: judgements, their shares, a table. Pure
text, no jax. `prompts` reads probes, `judge` judges an answer, `continuing` knows a continuation, `shares` counts.
"""

from jax_sft.evaluate.probes.judge import BEHAVIOURS, Judgement, judge
from jax_sft.evaluate.probes.prompts import Probe, as_plain_text, read_prompts
from jax_sft.evaluate.probes.shares import summary, table, wilson

__all__ = ["BEHAVIOURS", "Judgement", "Probe", "as_plain_text", "judge", "read_prompts", "summary", "table", "wilson"]
