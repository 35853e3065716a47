"""Conversations that were there before: the same, with the same id, the same prompt, or much the same text.

In: conversations in the order they are read. Out: of each what it repeats, with the place of the earlier one. Some
100 bytes of memory a row, and 2 kB where near duplicates are looked for.
"""

import dataclasses
import hashlib
import json
import re
import zlib
from typing import Any

import numpy as np

from jax_sft.data.conversation import Conversation, DataError
from jax_sft.data.quality.text import Finding, View, is_cjk, tokens

SAME_CONTENT = "the same content as an earlier conversation"
SAME_ID = "the same id as an earlier conversation"
SAME_PROMPT = "same prompt: as an earlier conversation, with another answer"
NEAR = "near duplicate: much the same text as an earlier conversation"
PERMUTATIONS = 128
ANSWERS = 0.5  # similarity that the answers alone must have
PROPOSED = 0.8  # LSH proposes from this part of the similarity on, so that it misses few; see `Near.find`
SHINGLE_WORDS, SHINGLE_CHARACTERS = 3, 4


def content_of(conversation: Conversation) -> list[Any]:
    """All that is trained on or seen, as it came."""
    turns = [(m.role, m.content, m.extra) for m in conversation.messages]
    of = conversation
    return [turns, of.tools, of.prompt_text, of.text, of.tokens and of.tokens.ids, of.template_args]


def prompt_of(view: View) -> list[Any] | None:
    """All before the last answer, case and spaces aside; None if that is nothing."""
    of = view.conversation
    if of.text is not None:
        return [_plain(of.prompt_text)] if of.prompt_text and of.prompt_text.strip() else None
    last = max((i for i, m in enumerate(of.messages) if m.role == "assistant"), default=0)
    before = [[m.role, _plain(m.content)] for m in of.messages[:last]]
    return [before, of.tools] if any(text for _, text in before) else None


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def key_of(part: Any) -> bytes:
    """What `Seen` knows a part by."""
    return hashlib.blake2b(json.dumps(part, default=str).encode(), digest_size=16).digest()


class Seen:
    """Where each content, id or prompt was first."""

    def __init__(self) -> None:
        self._places: dict[bytes, str] = {}

    def find(self, key: bytes) -> str | None:
        """The place of the first that had it."""
        return self._places.get(key)

    def add(self, key: bytes, where: str) -> None:
        """Remember it, unless it was there before."""
        self._places.setdefault(key, where)


def shingles(text: str) -> np.ndarray:
    """Hashes (uint32) of all runs of 3 words, or of 4 characters where the text is mainly of CJK scripts."""
    if is_cjk(text):
        parts, size = re.findall(r"\w", text.lower()), SHINGLE_CHARACTERS
    else:
        parts, size = tokens(text), SHINGLE_WORDS
    runs = {" ".join(parts[i : i + size]) for i in range(max(1, len(parts) - size + 1))} if parts else set()
    return np.array(sorted({zlib.crc32(run.encode()) for run in runs}), np.uint32)


@dataclasses.dataclass(frozen=True)
class Sketch:
    """What of a conversation is compared: shingles of all its turns with their MinHash, and of its answers alone."""

    of_all: np.ndarray
    of_answers: np.ndarray
    minhash: Any


class Near:
    """Finds conversations whose shingles are much the same, by MinHash and LSH (datasketch)."""

    def __init__(self, similarity: float) -> None:
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError as error:
            raise DataError(
                "data.quality.near_duplicate needs datasketch, which is not installed; pip install "
                "'jax-sft[quality]', or set it to 'off'"
            ) from error
        self._similarity = similarity
        self._index = MinHashLSH(threshold=max(0.1, PROPOSED * similarity), num_perm=PERMUTATIONS)
        self._rows: list[tuple[np.ndarray, np.ndarray, str]] = []  # shingles of all and of the answers, and place
        self._empty = MinHash(num_perm=PERMUTATIONS, seed=1, hashfunc=int)

    def sketch(self, view: View) -> Sketch:
        """What `find` and `add` need of a conversation."""
        found = shingles("\n".join(view.texts))
        minhash = self._empty.copy()
        minhash.update_batch(found.tolist())
        return Sketch(found, shingles("\n".join(view.said)), minhash)

    def find(self, of: Sketch) -> str | None:
        """The place of the first that this one is much the same as. LSH proposes, the shingles themselves decide.

        The answers must be alike too: several questions about one long passage are no duplicates.
        """
        for i in sorted(map(int, self._index.query(of.minhash))):  # type: ignore[arg-type]
            of_all, of_answers, where = self._rows[i]
            if similarity(of.of_all, of_all) >= self._similarity and similarity(of.of_answers, of_answers) >= ANSWERS:
                return where
        return None

    def add(self, of: Sketch, where: str) -> None:
        """Remember one that later ones are compared with."""
        if len(of.of_all):
            self._index.insert(len(self._rows), of.minhash)
            self._rows.append((of.of_all, of.of_answers, where))


def similarity(one: np.ndarray, two: np.ndarray) -> float:
    """Jaccard: what both have, of what either has; 1 if both are empty."""
    both = len(np.intersect1d(one, two, assume_unique=True))
    return both / (len(one) + len(two) - both) if len(one) or len(two) else 1.0


def repeats(what: str, first: str, view: View) -> Finding:
    """A finding that names the earlier conversation."""
    text = view.said[-1] if view.said else ""
    return Finding(what, f"as {first}: {text[:200]}")
