"""Tokens as text that can be read: pieces of one token, or of the few tokens that share a character.

In: a sequence and its fast tokenizer. Out: `Piece`s whose texts, joined, are the decoded sequence.
A byte-level tokenizer cuts 汉 or 🙂 into tokens that are no text alone: those stay together.
"""

import dataclasses
import unicodedata
from typing import Any

from jax_sft.data.conversation import Sequence

_REPLACEMENT = "\ufffd"  # what half a character decodes to
_MOST_TOKENS = 16  # in a piece: text that is cut inside a character never becomes whole
_BIDI = {chr(c) for c in (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C)}


@dataclasses.dataclass(frozen=True)
class Piece:
    """Text of one or a few tokens, and the weight of predicting each."""

    text: str
    ids: tuple[int, ...]
    weights: tuple[float, ...]
    is_control: bool  # a token that only the chat template writes, not the same letters in a message

    @property
    def kind(self) -> str:
        """context (read, not trained), trained, or weighted (trained with another weight than 1)."""
        above_zero = {w for w in self.weights if w > 0}
        return "context" if not above_zero else "trained" if above_zero == {1.0} else "weighted"


def pieces_of(sequence: Sequence, tokenizer: Any) -> list[Piece]:
    """All tokens of a sequence, the first (which nothing predicts, weight 0) included."""
    tokens = [int(sequence.tokens_T[0]), *sequence.targets_T.tolist()]
    weights = [0.0, *sequence.weights_T.tolist()]
    backend = tokenizer.backend_tokenizer
    control = {
        token: added.content
        for token, added in backend.get_added_tokens_decoder().items()
        if added.special or not (added.content.isspace() or added.content.isalnum())
    }

    def decode(ids: list[int]) -> str:
        return backend.decode(ids, skip_special_tokens=False)

    pieces, start, before = [], 0, 0
    while start < len(tokens):
        end, text = start + 1, control.get(tokens[start])
        if text is None:
            # Decoded behind the piece before it: the first token of a text may lose its leading blank.
            known = len(decode(tokens[before:start]))
            text = decode(tokens[before:end])[known:]
            last = min(start + _MOST_TOKENS, len(tokens))
            while text.endswith(_REPLACEMENT) and end < last and tokens[end] not in control:
                end += 1
                text = decode(tokens[before:end])[known:]
        pieces.append(
            Piece(
                text=text or backend.id_to_token(tokens[start]) or "",
                ids=tuple(tokens[start:end]),
                weights=tuple(weights[start:end]),
                is_control=tokens[start] in control,
            )
        )
        before, start = start, end
    return pieces


def visible(text: str) -> str:
    """Text that cannot steer a terminal or turn a line around: such characters by their names; newline and tab stay."""
    return "".join(_visible(c) if not c.isprintable() else c for c in text)


def _visible(character: str) -> str:
    code = ord(character)
    if character in "\n\t":
        return character
    if code < 0x20 or code == 0x7F:
        return chr(0x2400 + code) if code < 0x20 else "\u2421"
    if character in _BIDI or unicodedata.category(character) == "Cc":
        return f"<U+{code:04X}>"
    return character  # joiners inside an emoji, wide blanks
