"""General texts as batches, in the form in which conversations come: every token but the first of a text is predicted.

In: `Text`s and a `ChatTemplate`, of which the tokenizer alone is used. Out: `Rows`: a Loader, whose sources are the
languages, and how many bytes of UTF-8 its predicted tokens spell. A text begins with the BOS if the tokenizer is used
to write one, and then its first token is predicted too; nothing is put behind it.
"""

import bisect
import dataclasses
import math
import pathlib
import tempfile
from collections.abc import Mapping
from collections.abc import Sequence as Several

import numpy as np

from jax_sft.data.conversation import Account, DataError, Sequence
from jax_sft.data.loader import Loader
from jax_sft.data.store import TokenizedSet, Writer, load
from jax_sft.data.template import ChatTemplate
from jax_sft.data.words import Encoded
from jax_sft.evaluate.forgetting.texts import Text

_LENGTH_MULTIPLE = 64
_SHORTEST_ROW = 512  # positions, where `max_length` allows it: a small set would fill few of the long rows of training


@dataclasses.dataclass(frozen=True)
class Rows:
    """Texts, ready for `compare`."""

    loader: Loader
    bytes_by_source: Mapping[str, int]  # of the characters that a predicted token has a part in
    cut: int  # texts that are longer than `max_length` allows, of which only the beginning is read


def rows_of(texts: Several[Text], template: ChatTemplate, *, max_length: int, batch_size: int) -> Rows:
    """Pack the texts into rows of one shape, in their order; texts are cut behind `max_length` predictions.

    Raises:
        DataError: a text is no valid Unicode, or no text has two tokens.
    """
    sequences, bytes_by_source, cut = [], {}, 0
    for text in texts:
        ids, covered, is_cut = _encoded(text, template, max_length=max_length)
        if len(ids) < 2:
            continue
        tokens = np.asarray(ids, np.int32)
        sequences.append(Sequence(tokens[:-1], tokens[1:], np.ones(len(ids) - 1, np.float32), text.language, text.id))
        bytes_by_source[text.language] = bytes_by_source.get(text.language, 0) + covered
        cut += is_cut
    if not sequences:
        raise DataError(
            f"none of the {len(texts)} general texts has two tokens, so that nothing is predicted; give longer ones"
        )
    longest = max(len(sequence.tokens_T) for sequence in sequences)
    length = math.ceil(max(longest, _SHORTEST_ROW) / _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
    dataset = _set_of(sequences)
    loader = Loader(
        dataset,
        batch_size=batch_size,
        max_length=min(length, max_length),
        packing=True,
        sources=dataset.sources,
        seed=None,
    )
    return Rows(loader, bytes_by_source, cut)


def _encoded(text: Text, template: ChatTemplate, *, max_length: int) -> tuple[list[int], int, bool]:
    """Token ids of a text, the bytes that those that are predicted spell, and whether it was cut."""
    try:
        ids, encoded = template.encode_beginning(text.text), template.encode(text.text, escaped=False)
    except DataError as error:
        raise DataError(f"{text.id}: {error}") from error
    before = len(ids) - len(encoded.ids)  # the BOS, or nothing
    kept = ids[: max_length + 1]
    start = 0 if before else _start_of_second(encoded, text.text)
    end = _end_of(encoded, text.text, len(kept) - before) if len(kept) < len(ids) else len(text.text)
    return kept, len(text.text[start:end].encode()), len(kept) < len(ids)


def _start_of_second(encoded: Encoded, text: str) -> int:
    """The first character that a token behind the first has a part in.

    Its own offset may come too late (without the blank that it begins with), and the end of the first token too (where
    several tokens are one character).
    """
    starts = bisect.bisect_left(range(len(text)), 2, key=lambda place: encoded.starting_before(place + 1))
    return min(starts, _end_of(encoded, text, 1))


def _end_of(encoded: Encoded, text: str, count: int) -> int:
    """The character behind the first `count` tokens."""
    return bisect.bisect_left(range(len(text)), count, key=encoded.ending_by)


def _set_of(sequences: Several[Sequence]) -> TokenizedSet:
    with tempfile.TemporaryDirectory(prefix="jax-sft-") as folder:
        with Writer(pathlib.Path(folder)) as writer:
            for sequence in sequences:
                writer.append(sequence)
            writer.finish(Account(read=len(sequences), kept=len(sequences)))
        return load(pathlib.Path(folder), in_memory=True)
