"""Two models next to each other: losses by source and answers to the same conversations, as text for a terminal.

In: what was measured of each model, by its name. Out: lines on stdout.
"""

import re
import shutil
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from jax_sft.config import DataConfig
from jax_sft.data.conversation import Account
from jax_sft.data.formats import read_conversations
from jax_sft.data.source import parts_of
from jax_sft.evaluate.answers import Answer, Messages, up_to_last_question
from jax_sft.evaluate.losses import Losses

_PIECES = re.compile(r"\s+|[!-\u2fff]+|.")  # spaces, a word of a script that has spaces, or one character of another


def conversations_of(paths: Sequence[str], *, config: DataConfig, count: int) -> list[list[dict[str, Any]]]:
    """The first `count` conversations of files, each up to its last user turn: what a model is asked to answer."""
    asked = []
    for conversation in read_conversations(config, parts_of(paths), Account()) if count else ():
        if turns := up_to_last_question(conversation):
            asked.append(turns)
        if len(asked) == count:
            break
    return asked


def print_accounts(accounts: Mapping[str, Account]) -> None:
    """What became of the rows; under each model's name where it differs: one template may refuse what another takes."""
    told = {name: account.lines() for name, account in accounts.items()}
    if len({tuple(lines) for lines in told.values()}) == 1:
        told = {"": next(iter(told.values()))}
    for name, lines in told.items():
        print("\n".join([f"{name}: {lines[0]}" if name else lines[0], *lines[1:]]))


def print_losses(results: Mapping[str, Losses]) -> None:
    """Loss and accuracy of each model, in total and by source; with two models, the change."""
    models = list(results.values())
    for name, result in results.items():
        print(f"{name}: loss {result.loss:.4f}, accuracy {result.accuracy:.1%}, {result.tokens:.0f} trained tokens")
    if len(models) == 2:
        print(f"loss change: {_change(models[0].loss, models[1].loss)}")
    # Templates differ in length: all of a source can be too long for one model alone.
    sources = list(dict.fromkeys(source for result in models for source in result.by_source))
    width = max(map(_columns, sources))
    for source in sources:
        parts = [result.by_source.get(source) for result in models]
        losses = " -> ".join(f"{part['loss']:.4f}" if part else "none" for part in parts)
        there = [part for part in parts if part]
        change = f"  {_change(there[0]['loss'], there[1]['loss'])}" if len(there) == 2 else ""
        print(f"  {_pad(source, width)}  {losses}{change}  ({int(there[0]['tokens'])} tokens)")


def print_answers(conversations: Sequence[Messages], answers: Mapping[str, Sequence[Answer]]) -> None:
    """Each conversation's last prompt, and under it every model's answer in a column of its own."""
    columns = len(answers)
    width = max(24, (min(shutil.get_terminal_size().columns, 160) - 3 * (columns - 1)) // columns)
    headings = [_fit(name, width) for name in answers]
    for i, messages in enumerate(conversations):
        before = f" (after {len(messages) - 1} earlier messages)" if len(messages) > 1 else ""
        print(f"\n{'━' * 3} {messages[-1]['content']}{before}")
        print(" │ ".join(_pad(h, width) for h in headings))
        print("─┼─".join("─" * width for _ in headings))
        blocks = [_wrap(given[i].text + ("" if given[i].stopped else " […]"), width) for given in answers.values()]
        for row in range(max(len(block) for block in blocks)):
            cells = [block[row] if row < len(block) else "" for block in blocks]
            print(" │ ".join(_pad(cell, width) for cell in cells).rstrip())


def _change(before: float, after: float) -> str:
    return f"{after / before - 1:+.1%}" if before else "from 0"


def _columns(text: str) -> int:
    """Terminal columns of a text: Chinese characters and emoji take two; accents and joiners none."""
    return sum(
        0 if unicodedata.category(c) in ("Mn", "Me", "Cf") else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def _pad(text: str, width: int) -> str:
    return text + " " * max(0, width - _columns(text))


def _fit(name: str, width: int) -> str:
    if _columns(name) <= width:
        return name
    while _columns(name) > width - 1:
        name = name[1:]
    return "…" + name


def _wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` columns, broken between words or at a wide character; a longer word is cut."""
    lines = []
    for paragraph in text.expandtabs(4).splitlines() or [""]:
        line = ""
        for piece in _PIECES.findall(paragraph):
            if _columns(line) + _columns(piece) <= width:
                line += piece
                continue
            if line:
                lines.append(line.rstrip())
            line = "" if piece.isspace() else piece
            while _columns(line) > width:
                end = next(i for i in range(1, len(line) + 1) if _columns(line[: i + 1]) > width)
                lines.append(line[:end])
                line = line[end:]
        lines.append(line.rstrip())  # an empty line stays one
    return lines
