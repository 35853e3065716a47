"""Answers without their prompts: what the difficulty of following an instruction is measured against.

In: a tokenised sequence and the chat template. Out: a sequence for each trained stretch of it (a run of positions with
a weight): the very same tokens, behind nothing but what the template writes before every answer.

    <bos> user: How many legs has a spider? assistant: Eight.     the trained stretch is "Eight."
    <bos> assistant: Eight.                                       its bare twin

So the loss of both is over the same tokens, for any template and any format, and nothing is rendered or tokenised anew:
a template that refuses an answer without a question is never asked. What stands before the stretch is

- in a conversation: the template's header of an answer as it stands in this sequence, behind the BOS if that begins it;
- elsewhere (a plain text behind its prompt, tokens from a file, a template without a header): the BOS alone, or the
  end-of-sequence token, which stands between texts in pretraining, where the tokenizer has no BOS.

Letters: T position in a sequence.
"""

import dataclasses
import functools

import numpy as np

from jax_sft.data.conversation import DataError, Sequence
from jax_sft.data.template import ChatTemplate

_MOST_BESIDE_HEADER = 16  # tokens that a template's arguments may add behind the header, such as an empty thought


@dataclasses.dataclass(frozen=True, eq=False)
class Bare:
    """What bare answers begin with."""

    template: ChatTemplate
    header: str  # what the template writes before an answer, without blanks around it; "": nothing
    stops: tuple[str, ...]  # none stands between the header and the answer

    @classmethod
    def of(cls, template: ChatTemplate) -> "Bare":
        """Of a template; one that a plain text does not need may be missing."""
        try:
            facts = template.facts
        except DataError:
            return cls(template, "", ())
        return cls(template, "".join(facts.header).strip(), facts.stops)

    def twins(self, sequence: Sequence) -> list[Sequence]:
        """The bare answers of a sequence, in order; none where no stretch of it has a prompt."""
        tokens = np.concatenate([sequence.tokens_T[:1], sequence.targets_T])
        edges = np.flatnonzero(np.diff(np.concatenate([[0], sequence.weights_T > 0, [0]]))) + 1
        stretches = edges.reshape(-1, 2).tolist()
        contexts = []
        before = 0  # the end of the stretch before
        for start, end in stretches:
            contexts.append(self._context(tokens[:start], since=before))
            before = end
        if all(len(context) == start for context, (start, _) in zip(contexts, stretches, strict=True)):
            return []
        twins = []
        for context, (start, end) in zip(contexts, stretches, strict=True):
            of_twin = np.concatenate([context, tokens[start:end]]).astype(np.int32)
            weights = (np.arange(1, len(of_twin)) >= len(context)).astype(np.float32)
            twins.append(Sequence(of_twin[:-1], of_twin[1:], weights, sequence.source, sequence.id))
        return twins

    def _context(self, before: np.ndarray, *, since: int) -> np.ndarray:
        """What is left of the tokens before a stretch; as many as there are means that there is no prompt."""
        bos, eos = self.template.tokenizer.bos_token_id, self.template.tokenizer.eos_token_id
        if len(before) == 1:
            return before
        first = before[:1]
        window = before[max(since, len(before) - self._window) :]
        n = self._header_tokens(tuple(window.tolist())) if self.header else 0
        if n:
            tail = before[len(before) - n :]
            begins = len(tail) < len(before) and first[0] == bos and tail[0] != bos
            return np.concatenate([first, tail]) if begins else tail
        start = bos if bos is not None else eos
        return first if start is None else np.asarray([start], np.int32)

    @functools.cached_property
    def _window(self) -> int:
        return len(self.template.encode(self.header, escaped=False).ids) + _MOST_BESIDE_HEADER

    @functools.lru_cache(maxsize=4096)  # noqa: B019  lives as long as one scoring
    def _header_tokens(self, window: tuple[int, ...]) -> int:
        """How many tokens at the end of the window begin with the header and hold no end of another turn; 0: none."""
        for n in range(1, len(window) + 1):
            text = self.template.decode(window[-n:])
            if self.header in text:
                rest = text.split(self.header)[-1]
                return 0 if any(stop in rest for stop in self.stops) else n
        return 0
