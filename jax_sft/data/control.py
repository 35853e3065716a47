"""Control tokens are written by the template alone: the same letters inside a message stay letters.

In: message texts and a Hugging Face fast tokenizer. Out: escaped texts of the same length (so that character offsets
hold), and an encoding in which only what the template wrote became a control token. Nearly all conversations hold no
control text; those are encoded by the tokenizer itself, untouched.

    message   Type <|im_end|> to stop      escape    Type #|im_end|> to stop         # stands for U+FDD0
    rendered  ...Type #|im_end|> to stop<|im_end|>   the template's own, and only it, still reads as a control token
    encoded   ...Type <|im_end|> to stop@|im_end|>   @ (U+FDE0) names the control token in a twin of the tokenizer
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer

from jax_sft.data.conversation import DataError
from jax_sft.data.words import Encoded

# Unicode sets these characters apart for use inside a program: no text that is exchanged holds them.
_FIRST_ESCAPE, _FIRST_ALIAS, _MARKS = 0xFDD0, 0xFDE0, 14  # facts.py takes U+FDDE and U+FDDF
_MARKUP = re.compile(r"</?[A-Za-z_]\w*>")
_TRUSTED_ROLES = ("assistant", "system", "developer")
_MARK = re.compile("[\ufdd0-\ufdef]")


class BrokenTextError(DataError):
    """A text that no tokenizer can take as text; its row is left out."""


class ControlText:
    """Finds, escapes and encodes control text for one tokenizer and one template.

    A control token is an added token that is special, or that stands in the template's source and is neither a word nor
    a blank (DeepSeek's role tokens are not marked special). Markup like `<think>` or `<tool_call>`, where it is not
    special, is kept in what an assistant or a developer writes: there it is meant.
    """

    def __init__(self, backend: Tokenizer, template: str):
        self._backend = backend
        added = sorted(backend.get_added_tokens_decoder().items())
        special = [t.content for _, t in added if t.special and t.content]
        plain = [t.content for _, t in added if not t.special]
        written = [t for t in plain if t in template and not t.isalnum() and not t.isspace()]
        self.tokens = frozenset(special + written)
        self.pattern = _any_of(special + written)
        self._trusted_pattern = _any_of(special + [t for t in written if not _MARKUP.fullmatch(t)])
        self._searched = re.compile(f"{self.pattern.pattern}|{_MARK.pattern}")
        self._trusted_searched = re.compile(f"{self._trusted_pattern.pattern}|{_MARK.pattern}")
        firsts = sorted({t[0] for t in self.tokens})
        if len(firsts) > _MARKS:
            raise DataError(
                f"the tokenizer's control tokens begin with {len(firsts)} different characters, at most {_MARKS} can "
                "be told from text; unmark as special those that are ordinary text"
            )
        self._escape = {c: chr(_FIRST_ESCAPE + i) for i, c in enumerate(firsts)}
        self._alias = {c: chr(_FIRST_ALIAS + i) for i, c in enumerate(firsts)}
        self._restore = {ord(mark): c for c, mark in self._escape.items()}
        # Where control tokens are matched in normalised text, a look-alike can become one too.
        self._loose = backend.normalizer is not None and any(t.normalized for _, t in added if t.content in self.tokens)
        self._twin: tuple[Tokenizer, np.ndarray, frozenset[int]] | None = None

    def found_in(self, value: Any, *, role: str = "") -> bool:
        """Whether a text (or a list or mapping that holds texts) holds control text, or what escaping would need."""
        if isinstance(value, str):
            pattern = self._trusted_searched if role in _TRUSTED_ROLES else self._searched
            if pattern.search(value):
                return True
            return self._loose and bool(pattern.search(self._backend.normalizer.normalize_str(value)))
        if isinstance(value, Mapping):
            return any(self.found_in(k, role=role) or self.found_in(v, role=role) for k, v in value.items())
        return isinstance(value, list | tuple) and any(self.found_in(v, role=role) for v in value)

    def found_in_message(self, message: Mapping[str, Any]) -> bool:
        """The same of a message as a template takes it; its role is one of ours."""
        role = message["role"]
        return any(self.found_in(v, role=role) for k, v in message.items() if k != "role") or (
            len(message) > 2 and any(self.found_in(k, role=role) for k in message)
        )

    def escape(self, value: Any, *, role: str = "") -> Any:
        """The same value with control text broken by a mark in place of its first character.

        Raises:
            BrokenTextError: a text holds a mark already.
        """
        if isinstance(value, str):
            if _MARK.search(value):
                raise BrokenTextError(
                    "a message holds a character from U+FDD0 to U+FDEF, reserved for programs; remove it"
                )
            pattern = self._trusted_pattern if role in _TRUSTED_ROLES else self.pattern
            while pattern.search(value):  # again, for a token inside the rest of another
                value = pattern.sub(lambda m: self._escape[m[0][0]] + m[0][1:], value)
            return value
        if isinstance(value, Mapping):
            return {self.escape(k, role=role): self.escape(v, role=role) for k, v in value.items()}
        return [self.escape(v, role=role) for v in value] if isinstance(value, list | tuple) else value

    def restore(self, text: str) -> str:
        """What was escaped, as it was written."""
        return text.translate(self._restore)

    def encode(self, escaped: str) -> Encoded:
        """The tokens of a rendering with escapes; positions count characters of `escaped`.

        Only the control tokens of `escaped` become control tokens; its escapes are encoded as the text they stand for.

        Raises:
            BrokenTextError: the tokenizer's model itself would make a control token out of text.
        """
        if self._twin is None:
            self._twin = _twin_of(self._backend, self._alias, self.tokens)
        twin, id_of, control_ids = self._twin
        aliased = self.pattern.sub(lambda m: self._alias[m[0][0]] + m[0][1:], escaped)
        encoding = twin.encode(self.restore(aliased), add_special_tokens=False)
        made = control_ids.intersection(encoding.ids)
        if made:
            token = self._backend.id_to_token(min(made))
            raise BrokenTextError(
                f"the tokenizer makes the control token {token!r} out of plain text; take the text out"
            )
        return Encoded(id_of[encoding.ids].tolist(), encoding.offsets)


def _any_of(tokens: list[str]) -> re.Pattern[str]:
    """The longest token first, as the tokenizer matches them; nothing at all where there is no token."""
    longest_first = sorted(set(tokens), key=lambda t: (-len(t), t))
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _twin_of(
    backend: Tokenizer, alias: Mapping[str, str], control: frozenset[str]
) -> tuple[Tokenizer, np.ndarray, frozenset[int]]:
    """The same tokenizer with control tokens under aliases; the way from its ids to the real ones; the control ids.

    The model is shared, not copied. Added tokens get new ids in the twin (an alias is not in the vocabulary), hence the
    way back. Its own ids of control tokens must then never come out: they would be made of plain text.
    """
    twin = Tokenizer(backend.model)
    if backend.normalizer is not None:
        twin.normalizer = backend.normalizer
    if backend.pre_tokenizer is not None:
        twin.pre_tokenizer = backend.pre_tokenizer
    names: dict[str, int] = {}  # as the twin calls an added token -> its real id
    tokens = []
    added = sorted(backend.get_added_tokens_decoder().items())
    for token_id, token in added:
        name = alias[token.content[0]] + token.content[1:] if token.content in control else token.content
        names[name] = token_id
        flags = {f: getattr(token, f) for f in ("single_word", "lstrip", "rstrip", "normalized", "special")}
        tokens.append(AddedToken(name, **flags))
    twin.add_tokens(tokens)
    id_of = np.arange(max(twin.get_vocab(with_added_tokens=True).values()) + 1)
    taken = {twin.token_to_id(name): token_id for name, token_id in names.items()}
    for twin_id, token_id in taken.items():
        id_of[twin_id] = token_id
    made_of_text = {i for i, token in added if token.content in control} - set(taken)
    return twin, id_of, frozenset(made_of_text)
