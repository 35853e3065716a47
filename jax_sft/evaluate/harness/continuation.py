"""Answers that end at a text: prompts as token ids in, new token ids out, until a stop id or one of some texts.

The device writes tokens without knowing where they should end; the host reads along, a few tokens behind, and once
every row has ended it breaks off. So the answers to short questions do not cost `max_new_tokens`.
"""

import contextlib
import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

from jax_sft.generate import Sampling, generate


@dataclasses.dataclass(frozen=True)
class Continuation:
    """New tokens without the stop id, and whether they ended before their number was up."""

    tokens: list[int]
    ended: bool


def continue_until(
    graphdef: Any,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    tokenizer: Any,
    max_new_tokens: int,
    stop_ids: Collection[int],
    stop_texts: Sequence[str],
    sampling: Sampling,
) -> list[Continuation]:
    """Continue each prompt until a stop id, a stop text or `max_new_tokens`; behind a stop text may stand more tokens.

    Raises:
        ValueError: see `generate`.
    """
    reader = _Reader(tokenizer, len(prompts), frozenset(stop_ids), [text for text in stop_texts if text])
    with contextlib.suppress(_AllEndedError):
        generate(
            graphdef,
            params,
            prompts,
            max_new_tokens=max_new_tokens,
            stop_ids=(),  # the reader knows them: it must hear of every row that ends
            pad_id=0,  # never read
            sampling=sampling,
            on_token=reader.read,
        )
    return [Continuation(tokens, row not in reader.open) for row, tokens in enumerate(reader.tokens)]


class _AllEndedError(Exception):
    """Nothing more is wanted of the generation under way."""


class _Reader:
    """Reads the tokens of all rows as they come."""

    def __init__(self, tokenizer: Any, rows: int, stop_ids: frozenset[int], stop_texts: Sequence[str]) -> None:
        self.tokenizer, self.stop_ids, self.stop_texts = tokenizer, stop_ids, stop_texts
        self.tokens: list[list[int]] = [[] for _ in range(rows)]
        self.open = set(range(rows))
        # A token says at least a byte, so a text that has just ended lies within as many tokens.
        self._tail = 1 + max((len(text.encode()) for text in stop_texts), default=0)

    def read(self, row: int, token: int) -> None:
        """Take one more token of a row.

        Raises:
            _AllEndedError: every row has ended.
        """
        if row not in self.open:
            return
        if token in self.stop_ids:
            self.open.remove(row)
        else:
            self.tokens[row].append(token)
            if self._says_stop(self.tokens[row][-self._tail :]) and self._says_stop(self.tokens[row]):
                self.open.remove(row)
        if not self.open:
            raise _AllEndedError

    def _says_stop(self, tokens: list[int]) -> bool:
        if not self.stop_texts:
            return False
        said = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return any(text in said for text in self.stop_texts)
