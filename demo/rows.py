"""The shape of a demo conversation, and every check that the demo set has to pass.

Shared by the generator, the assembler and the tests, so that each rule is written down once.
A row is {"id", "source", "language", "messages"}; a message is {"role", "content"}.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

SOURCES = (
    "translation",
    "summarising",
    "question-answering",
    "code",
    "writing",
    "extraction",
    "classification",
    "reasoning",
    "refusal",
    "identity",
)
LANGUAGES = ("en", "zh")
GENERATED_PREFIX = "gen"
MIN_TRAIN = 400
VALIDATION_SIZE = 60
MIN_MULTI_TURN = 120
MAX_GENERATED_SHARE = 1 / 3

PYTHON_BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


def load_rows(path: Path) -> list[Row]:
    """Read a JSON Lines file; a bad line raises ValueError with its place."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path.name}:{number}: {error}") from error
    return rows


def dump_rows(rows: Iterable[Row], path: Path) -> None:
    """Write rows as JSON Lines, UTF-8, one conversation a line."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8", newline="\n")


def texts(row: Row, role: str) -> list[str]:
    """What one role says in a conversation, in order."""
    return [message["content"] for message in row["messages"] if message["role"] == role]


def is_generated(row: Row) -> bool:
    """Whether the row came from generate.py rather than from a writer."""
    return row["id"].startswith(f"{GENERATED_PREFIX}-")


def is_multi_turn(row: Row) -> bool:
    """Whether the user speaks at least twice."""
    return len(texts(row, "user")) >= 2


def normalise(text: str) -> str:
    """Fold width, case, punctuation and spacing, so that near-identical prompts compare equal.

    A sign between digits or letters carries meaning ("3+4", "3.4") and is kept.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.sub(r"[^\w+\-*/<>=%$.:]+|[.:](?!\w)", " ", folded).split())


def first_prompt(row: Row) -> str:
    """The first user message, normalised."""
    return normalise(texts(row, "user")[0])


def rendered_prompt(row: Row) -> str:
    """Everything before the last answer, roles included, normalised."""
    return "\n".join(f"{message['role']}: {normalise(message['content'])}" for message in row["messages"][:-1])


def shape_problems(row: Row) -> list[str]:
    """What is wrong with the keys, the labels, the roles or the contents of a row."""
    if set(row) != {"id", "source", "language", "messages"}:
        return [f"keys are {sorted(row)}"]
    problems = []
    if not re.fullmatch(r"[a-z]+(-[a-z]+)?-\d{4}", row["id"]):
        problems.append("id is not PREFIX-0000")
    if row["source"] not in SOURCES:
        problems.append(f"unknown source {row['source']!r}")
    if row["language"] not in LANGUAGES:
        problems.append(f"unknown language {row['language']!r}")
    messages = row["messages"]
    if any(set(message) != {"role", "content"} for message in messages):
        return [*problems, "a message has other keys than role and content"]
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
        problems.append(f"roles are {roles}")
    if not all(isinstance(message["content"], str) and message["content"].strip() for message in messages):
        problems.append("a message is empty")
    return problems


def answer_problems(row: Row) -> list[str]:
    """What does not parse: JSON answers of extraction rows, and Python code in any answer.

    An extraction answer has to be JSON if it begins like JSON or a fence, or if the user turn or the system prompt
    says JSON.
    """
    problems = []
    system = "".join(texts(row, "system"))
    for user, answer in zip(texts(row, "user"), texts(row, "assistant"), strict=True):
        if row["source"] == "extraction" and (answer.lstrip()[0] in "{[`" or "json" in (system + user).casefold()):
            try:
                json.loads(answer)
            except json.JSONDecodeError as error:
                problems.append(f"not JSON ({error}): {answer[:60]!r}")
        for code in PYTHON_BLOCK.findall(answer):
            try:
                compile(code, row["id"], "exec")
            except SyntaxError as error:
                problems.append(f"Python does not compile: {error}")
    return problems


def repeats(keys: Iterable[tuple[str, str]]) -> list[str]:
    """Ids of (key, id) pairs whose key an earlier pair had, each with the id that had it first."""
    seen: dict[str, str] = {}
    return [f"{name} repeats {seen[key]}" for key, name in keys if seen.setdefault(key, name) is not name]


def set_problems(train: Sequence[Row], validation: Sequence[Row]) -> list[str]:
    """Everything wrong with the two splits, row by row and as a whole; empty when all is well."""
    rows = [*train, *validation]
    problems = [f"{row.get('id')}: {problem}" for row in rows for problem in shape_problems(row)]
    if problems:
        return problems
    problems += [f"{row['id']}: {problem}" for row in rows for problem in answer_problems(row)]
    ids = Counter(row["id"] for row in rows)
    problems += [f"id used {count} times: {name}" for name, count in ids.items() if count > 1]
    problems += [f"first prompt: {repeat}" for repeat in repeats((first_prompt(row), row["id"]) for row in rows)]
    problems += [f"whole prompt: {repeat}" for repeat in repeats((rendered_prompt(row), row["id"]) for row in rows)]
    if len(train) < MIN_TRAIN:
        problems.append(f"{len(train)} training rows, fewer than {MIN_TRAIN}")
    if len(validation) != VALIDATION_SIZE:
        problems.append(f"{len(validation)} validation rows, not {VALIDATION_SIZE}")
    multi_turn = sum(map(is_multi_turn, train))
    if multi_turn < MIN_MULTI_TURN:
        problems.append(f"{multi_turn} multi-turn training rows, fewer than {MIN_MULTI_TURN}")
    for name, split in (("training", train), ("validation", validation)):
        share = sum(map(is_generated, split)) / max(len(split), 1)
        if share > MAX_GENERATED_SHARE:
            problems.append(f"{share:.0%} of the {name} rows are generated")
    present = {(row["source"], row["language"]) for row in train}
    problems += [f"no {s} row in {lang}" for s in SOURCES for lang in LANGUAGES if (s, lang) not in present]
    return problems


def count_table(train: Sequence[Row], validation: Sequence[Row]) -> str:
    """A Markdown table: how many rows each source has, by split and language."""
    counts = Counter((name, r["source"], r["language"]) for name, rs in (("t", train), ("v", validation)) for r in rs)
    columns = [(split, language) for split in "tv" for language in LANGUAGES]
    lines = ["| source | train en | train zh | validation en | validation zh |", "|:--|--:|--:|--:|--:|"]
    for source in SOURCES:
        cells = [counts[split, source, language] for split, language in columns]
        lines.append(f"| {source} | " + " | ".join(map(str, cells)) + " |")
    totals = [sum(counts[split, source, language] for source in SOURCES) for split, language in columns]
    lines.append("| total | " + " | ".join(map(str, totals)) + " |")
    return "\n".join(lines)
