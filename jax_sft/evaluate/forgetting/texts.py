"""General texts, which a fine-tuned model should still find as likely as before.

In: our own passages (texts.jsonl beside this module), or a user's file: .jsonl with a field `text` and, if it likes,
`id`, `language` and `kind`; or .txt, its passages parted by blank lines. Out: a `Text` each.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from jax_sft.data.conversation import DataError

OUR_TEXTS = pathlib.Path(__file__).with_name("texts.jsonl")
UNNAMED = "text"  # the language of a passage that names none
_NAMES = ("id", "language", "kind")


@dataclasses.dataclass(frozen=True)
class Text:
    """One passage."""

    id: str
    language: str  # en, zh, code, ...: losses are summed by it
    kind: str  # narrative, news, python, ...
    text: str


def read_texts(path: str | None = None) -> list[Text]:
    """The passages of a file, by default our own: English, Chinese and code of many kinds.

    Raises:
        DataError: the file cannot be read, is neither .jsonl nor .txt, has no passage, or a line is none: names it.
    """
    file = pathlib.Path(path) if path is not None else OUR_TEXTS
    readers = {".jsonl": _of_lines, ".txt": _of_paragraphs}
    if file.suffix not in readers:
        raise DataError(
            f"{file}: is neither .jsonl (a field 'text' in each line) nor .txt (passages parted by blank lines); "
            "convert it to one of them"
        )
    try:
        content = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{file}: the general texts cannot be read ({error}); correct the path, or save the file as UTF-8"
        ) from error
    found = list(readers[file.suffix](content, str(file)))
    if not found:
        raise DataError(f"{file}: has no text; write some passages, or name no file to use our own")
    return found


def _of_paragraphs(content: str, place: str) -> Iterator[Text]:
    passages = [passage.strip("\n") for passage in re.split(r"\n\s*\n", content) if passage.strip()]
    for number, passage in enumerate(passages, 1):
        yield Text(id=f"{place}[{number}]", language=UNNAMED, kind=UNNAMED, text=passage)


def _of_lines(content: str, place: str) -> Iterator[Text]:
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            yield _text(line, f"{place}:{number}")


def _text(line: str, where: str) -> Text:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: is no JSON ({error}); write one object a line") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: is {_short(row)}; write one JSON object a line, with a field 'text'")
    if "text" not in row:
        has = ", ".join(map(repr, row)) or "none"
        raise DataError(f"{where}: the field 'text' is missing, there are {has}; name the passage's field 'text'")
    text = row["text"]
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: field 'text' is {_short(text)}; give a text, or take the line out")
    names = {"id": where, "language": UNNAMED, "kind": UNNAMED}
    for field in _NAMES:
        if field in row:
            if not isinstance(row[field], str) or not row[field]:
                raise DataError(f"{where}: field {field!r} is {_short(row[field])}; give a text, or leave it out")
            names[field] = row[field]
    return Text(**names, text=text)


def _short(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)[:80]
