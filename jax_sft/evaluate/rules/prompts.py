"""Prompts whose instructions a program can check: our own, or a file in the layout of IFEval.

In: JSON lines, each with key, prompt, instruction_id_list and kwargs (a mapping for each id; null is as if not there).
Out: `RulePrompt`s, whose ids and arguments are known to be right.
"""

import dataclasses
import difflib
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from jax_sft.data.conversation import DataError
from jax_sft.evaluate.rules.arguments import Kind
from jax_sft.evaluate.rules.own import OWN
from jax_sft.evaluate.rules.published import PUBLISHED

KINDS: dict[str, Kind] = {**PUBLISHED, **OWN}
_OURS = pathlib.Path(__file__).with_name("prompts.jsonl")
_FIELDS = ("key", "prompt", "instruction_id_list", "kwargs")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One thing that is asked: an id of `KINDS`, and its arguments as the checker takes them."""

    id: str
    arguments: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class RulePrompt:
    """What a model is asked, and what a program checks of its answer."""

    key: int | str
    prompt: str
    instructions: tuple[Instruction, ...]

    @classmethod
    def of(cls, row: Any, where: str) -> "RulePrompt":
        """Of a row in the layout of IFEval.

        Args:
            row: read from JSON.
            where: what messages call it, such as "file.jsonl:3".

        Raises:
            DataError: a field is missing or of another type, or an id or an argument is not known, is missing or not
                of its type.
        """
        if not isinstance(row, dict) or (missing := [name for name in _FIELDS if name not in row]):
            lacks = f"lacks {', '.join(missing)}" if isinstance(row, dict) else f"is {row!r}"
            raise DataError(f"{where}: the row {lacks}; a row is an object with {', '.join(_FIELDS)}")
        ids, kwargs = row["instruction_id_list"], row["kwargs"]
        if not isinstance(row["prompt"], str) or not row["prompt"].strip():
            raise DataError(f"{where}: prompt is {row['prompt']!r}; it must be a text that is not empty")
        if not (isinstance(ids, list) and ids and isinstance(kwargs, list) and len(ids) == len(kwargs)):
            raise DataError(
                f"{where}: instruction_id_list is {ids!r} and kwargs is {kwargs!r}; they must be lists of one length, "
                "with at least one instruction"
            )
        where = f"{where} (key {row['key']!r})"
        found = (_instruction(id, given, where) for id, given in zip(ids, kwargs, strict=True))
        return cls(row["key"], row["prompt"], tuple(found))


def read_prompts(path: str | None = None) -> list[RulePrompt]:
    """The prompts of a JSON lines file in the layout of IFEval; None for our own, in English and Chinese.

    Raises:
        DataError: the file cannot be read, has no rows, or a row is wrong (`RulePrompt.of`), with its line.
    """
    try:
        lines = pathlib.Path(path or _OURS).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the prompts cannot be read: {error}; name a JSON lines file in UTF-8") from error
    found = [_of_line(line, f"{path or _OURS.name}:{n}") for n, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise DataError(f"{path}: there are no prompts in it; a row is an object with {', '.join(_FIELDS)}")
    return found


def _of_line(line: str, where: str) -> RulePrompt:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON: {error}; write one object a line") from error
    return RulePrompt.of(row, where)


def _instruction(id: Any, given: Any, where: str) -> Instruction:
    if not isinstance(id, str) or id not in KINDS:
        raise DataError(
            f"{where}: the instruction id {id!r} is not known{_did_you_mean(id, KINDS)}; the ids are those of "
            "jax_sft.evaluate.rules.KINDS"
        )
    if given is not None and not isinstance(given, dict):
        raise DataError(f"{where}: {id}: its kwargs are {given!r}; write an object of its arguments, or null")
    kinds = KINDS[id].arguments
    told = {name: value for name, value in (given or {}).items() if value is not None}
    for name in told:
        if name not in kinds:
            raise DataError(
                f"{where}: {id} has no argument {name!r}{_did_you_mean(name, kinds)}; it has "
                f"{', '.join(kinds) or 'none'}"
            )
    arguments = {}
    for name, parse in kinds.items():
        if name not in told:
            raise DataError(f"{where}: {id} lacks its argument {name!r}; add it to the kwargs of this instruction")
        try:
            arguments[name] = parse(told[name])
        except ValueError as error:
            raise DataError(f"{where}: {id}: {name} is {told[name]!r}; it {error}") from error
    return Instruction(id, arguments)


def _did_you_mean(name: Any, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
