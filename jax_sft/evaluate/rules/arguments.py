"""What the argument of an instruction may be.

In: a value out of JSON. Out: the value as the checkers take it, or a ValueError that says what it must be.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jax_sft.evaluate.rules.language import LANGUAGES

_COMPARED: dict[str, Callable[[int, int], bool]] = {
    "less than": lambda found, asked: found < asked,
    "at least": lambda found, asked: found >= asked,
    "at most": lambda found, asked: found <= asked,
    "exactly": lambda found, asked: found == asked,
}


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of instruction: its checker, called with the answer and the arguments by name, and what these may be."""

    follows: Callable[..., bool]
    arguments: Mapping[str, Callable[[Any], Any]] = dataclasses.field(default_factory=dict)


def compare(found: int, relation: str, asked: int) -> bool:
    """Whether `found` is less than, at least, at most or exactly `asked`."""
    return _COMPARED[relation](found, asked)


def count(value: Any) -> int:
    """A whole number from 0 on; 100.0 is one, as tables with empty cells write them."""
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if not (is_whole or (isinstance(value, float) and value.is_integer())) or value < 0:
        raise ValueError("must be a whole number from 0 on")
    return int(value)


def text(value: Any) -> str:
    """A text that is not blank."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError("must be a text that is not empty")
    return value


def texts(value: Any) -> tuple[str, ...]:
    """A list of texts, at least one."""
    if not isinstance(value, list) or not value:
        raise ValueError("must be a list of texts")
    return tuple(text(each) for each in value)


def character(value: Any) -> str:
    """One character."""
    if len(text(value)) != 1:
        raise ValueError("must be one character")
    return value


def language(value: Any) -> str:
    """A code of a language that is known."""
    return _one_of(value, LANGUAGES)


def published_relation(value: Any) -> str:
    """The two relations of IFEval."""
    return _one_of(value, ("less than", "at least"))


def relation(value: Any) -> str:
    """The relations of our own kinds."""
    return _one_of(value, tuple(_COMPARED))


def _one_of(value: Any, known: tuple[str, ...]) -> str:
    if value not in known:
        raise ValueError(f"must be one of {', '.join(map(repr, known))}")
    return value
