"""Text to token ids, and which of the tokens lie where: the tokenizer's own result, most of it out of a cache of words.

In: a tokenizer of the library `tokenizers`, a text. Out: `Encoded`. A byte-level BPE tokenizer first cuts a text by a
regular expression and then merges within each part, so that a part has the same ids wherever it stands. `Words` cuts
the text more coarsely, only where every one of the known expressions cuts too, and remembers the ids of what it cut:

    We train 12 models.<|im_end|>      We| train| 12| models.|<|im_end|>        pieces, which are looked up
                                                    models|.                    where one is not known: smaller ones

What a piece is not known of is asked of the tokenizer, once. Tokenizers that are not of this kind, and texts that their
normaliser would change, are encoded by the tokenizer itself. No texts are kept but short pieces.
"""

import bisect
import functools
import itertools
import json
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer

# The expressions of GPT-2 (built into ByteLevel), Llama 3, Qwen 2 to 3.5, GPT-4o, Tekken and the models that took these
# over. All of them cut before a space between two words, where a run of letters and digits meets a newline or ASCII
# punctuation other than "'", where such punctuation meets a digit, and behind a single newline that is within a text.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPELLED_OUT = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LOWER, _UPPER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_KNOWN = {r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"}
for _digits in (r"\p{N}", r"\p{N}{1,3}"):
    for _short in (_CONTRACTIONS, _SPELLED_OUT):
        _start = rf"{_short}|[^\r\n\p{{L}}\p{{N}}]?"
        _KNOWN |= {
            rf"{_start}\p{{L}}+|{_digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}",
            rf"{_start}[\p{{L}}\p{{M}}]+|{_digits}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}",
        }
    for _short in ("", f"{_CONTRACTIONS}?"):
        _KNOWN.add(
            rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_short}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_short}"
            rf"|{_digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
        )
_RUN = re.compile(r" \s|\s ")  # spaces that do not stand alone between two words
_PUNCTUATION = r"!-&(-/:-@\[-`{-~"  # of ASCII, without "'"
# Before ASCII alone, and behind another blank before no digit: the step `Digits` cuts there, the blanks are one part.
_SPACE = re.compile(r"(?<=\S) (?=[!-~])| (?=[!-/:-~])")
_SMALLER = re.compile(
    rf"(?<=[A-Za-z0-9])(?=[\n{_PUNCTUATION}])|(?<=[{_PUNCTUATION}])(?=[0-9])|(?<=[!-~]\n)(?=[!-.0-~])"
)
_WORD = re.compile(r" ?[A-Z]?[a-z]+")  # one part in all of them
_CUT = "\0"
_LONGEST = 48  # characters of a piece that is remembered
_MOST = 2**17  # pieces; some 70 MB of unusual ones
_USUAL = 16  # a text of longer pieces than this on average (Chinese has no spaces) is not worth cutting


class Encoded:
    """The tokens of a text. Characters are counted in the text that was given."""

    def __init__(self, ids: list[int], offsets: Sequence[tuple[int, int]]) -> None:
        self.ids = ids
        self._offsets = offsets

    def ending_by(self, position: int) -> int:
        """How many tokens end at or before a character."""
        return bisect.bisect_right(self._offsets, position, key=lambda o: o[1])

    def starting_before(self, position: int) -> int:
        """How many tokens start before a character."""
        return bisect.bisect_left(self._offsets, position, key=lambda o: o[0])


class _InPieces(Encoded):
    """The tokens of pieces, whose offsets are asked for only where a position lies inside of one."""

    def __init__(self, pieces: list[str], found: list[tuple[int, ...]], words: "Words") -> None:
        super().__init__(list(itertools.chain.from_iterable(found)), ())
        self._pieces, self._found, self._words = pieces, found, words

    @functools.cached_property
    def _ends(self) -> tuple[list[int], list[int]]:
        """The character and the token behind each piece."""
        return list(itertools.accumulate(map(len, self._pieces))), list(itertools.accumulate(map(len, self._found)))

    def ending_by(self, position: int) -> int:
        return self._count(position, Encoded.ending_by)

    def starting_before(self, position: int) -> int:
        return self._count(position, Encoded.starting_before)

    def _count(self, position: int, count: Any) -> int:
        characters, tokens = self._ends
        piece = bisect.bisect_right(characters, position)
        start, before = (characters[piece - 1], tokens[piece - 1]) if piece else (0, 0)
        if position <= start or piece == len(self._pieces):
            return before
        for smaller, ids in self._words.smaller(self._pieces[piece]):
            if start + len(smaller) > position:
                return before + (count(self._words.whole(smaller), position - start) if start < position else 0)
            start, before = start + len(smaller), before + len(ids)
        raise AssertionError("a piece is as long as its parts")


class Words:
    """Encodes texts as a tokenizer does, without adding anything; control tokens written in a text become those."""

    def __init__(self, backend: Tokenizer) -> None:
        self._backend = backend
        self._control = _control_of(backend) if _cuts_as_known(backend) else None  # None: texts are not cut
        self._model = backend.model
        self._is_normalized = backend.normalizer is not None  # by NFC
        self._added = {token.content: (id,) for id, token in backend.get_added_tokens_decoder().items()}
        self._known: dict[str, tuple[int, ...]] = dict(self._added)

    def __reduce__(self) -> tuple[Any, ...]:
        return Words, (self._backend,)

    @property
    def cuts(self) -> bool:
        """Whether this tokenizer is one whose texts are cut."""
        return self._control is not None

    def encode(self, text: str) -> Encoded:
        """Raises what the tokenizer raises on a text that is no valid Unicode."""
        pieces = None if self._control is None else self._cut(text)
        if pieces is None:
            return self.whole(text)
        found = list(map(self._known.get, pieces))
        if None in found:
            found = [self._of_piece(p) if ids is None else ids for p, ids in zip(pieces, found, strict=True)]
        return _InPieces(pieces, found, self)  # type: ignore[arg-type]  there is no None any more

    def whole(self, text: str) -> Encoded:
        """The same, by the tokenizer itself."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        return Encoded(encoding.ids, encoding.offsets)

    def smaller(self, piece: str) -> list[tuple[str, tuple[int, ...]]]:
        """The parts of a piece that are looked up by themselves, with their ids."""
        parts = [piece] if piece in self._added else _SMALLER.split(piece)
        return [(part, self._known.get(part) or self._remembered(part, self._asked(part))) for part in parts if part]

    def _cut(self, text: str) -> list[str] | None:
        """The pieces of a text, end to end; None if it is better encoded as a whole."""
        assert self._control is not None
        if _CUT in text or (self._is_normalized and not unicodedata.is_normalized("NFC", text)):
            return None
        pieces: list[str] = []
        for i, part in enumerate(self._control.split(text)):
            if i % 2:
                pieces.append(part)
            elif part:
                cut = _SPACE.sub(_CUT + " ", part) if _RUN.search(part) else part.replace(" ", _CUT + " ")
                pieces += cut.split(_CUT)
        return pieces if len(text) <= _USUAL * len(pieces) else None

    def _of_piece(self, piece: str) -> tuple[int, ...]:
        """The ids of a piece that is not known yet."""
        parts = self.smaller(piece)
        if len(parts) == 1:
            return parts[0][1]
        return self._remembered(piece, tuple(itertools.chain.from_iterable(ids for _, ids in parts)))

    def _asked(self, piece: str) -> tuple[int, ...]:
        if _WORD.fullmatch(piece):  # ask the model at once; the way over the text's other steps takes thrice as long
            return tuple(token.id for token in self._model.tokenize(piece.replace(" ", "Ġ")))
        return tuple(self._backend.encode(piece, add_special_tokens=False).ids)

    def _remembered(self, piece: str, ids: tuple[int, ...]) -> tuple[int, ...]:
        if len(piece) <= _LONGEST:
            if len(self._known) >= _MOST:
                self._known = dict(self._added)
            self._known[piece] = ids
        return ids


def _cuts_as_known(backend: Tokenizer) -> bool:
    """Whether texts are cut by one of the known expressions, and nothing but NFC is done to them before."""
    model = backend.model
    if type(model).__name__ != "BPE" or model.dropout or model.continuing_subword_prefix or model.end_of_word_suffix:
        return False
    if backend.normalizer is not None and type(backend.normalizer).__name__ != "NFC":
        return False
    return _parts_of(backend) in ([], ["digits"], ["split"])


def _parts_of(backend: Tokenizer) -> list[str] | None:
    """What stands before the step to bytes in the tokenizer's cutting; None if there is no such step, or another."""
    if backend.pre_tokenizer is None:
        return None
    said = json.loads(backend.pre_tokenizer.__getstate__())
    steps = said["pretokenizers"] if said["type"] == "Sequence" else [said]
    *before, last = steps
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    names = []
    for step in before:
        if step["type"] == "Digits":
            names.append("digits")
        elif step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            names.append("split" if step["pattern"].get("Regex") in _KNOWN else "other")
        else:
            names.append("other")
    return names if last["use_regex"] == ("split" not in names) else None


def _control_of(backend: Tokenizer) -> re.Pattern[str] | None:
    """What finds the added tokens in a text, as the tokenizer does; None if some of them are found in another way."""
    added = [token for token in backend.get_added_tokens_decoder().values() if token.content]
    if any(token.lstrip or token.rstrip or token.single_word for token in added):
        return None
    if any(token.normalized for token in added) and not all(token.normalized for token in added):
        return None  # they are looked for in two goes
    if backend.normalizer is not None and any(
        token.normalized and not unicodedata.is_normalized("NFC", token.content) for token in added
    ):
        return None
    longest_first = sorted((token.content for token in added), key=lambda t: (-len(t), t))
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
