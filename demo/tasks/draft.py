"""What a task kind yields, and the small formatting helpers that the kinds share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from random import Random
from typing import Any

NAMES = (
    "Amara", "Bruno", "Celine", "Dario", "Elif", "Farid", "Greta", "Hana", "Ivo", "Jonas", "Keiko", "Lena", "Marek",
    "Nadia", "Oskar", "Priya", "Quentin", "Rosa", "Samir", "Tessa", "Umar", "Vera", "Wim", "Ximena", "Yusuf", "Zofia",
)  # fmt: skip
SURNAMES = (
    "Abbott", "Baumann", "Castel", "Dumont", "Eklund", "Fontaine", "Garrity", "Holm", "Ibarra", "Jansen", "Kowal",
    "Lindqvist", "Moreau", "Novak", "Okoro", "Petrov", "Quist", "Romano", "Sato", "Tanaka", "Varga", "Weiss",
)  # fmt: skip
CITIES = ("Lisbon", "Oslo", "Turin", "Ghent", "Krakow", "Porto", "Leeds", "Bern", "Aarhus", "Graz", "Cork", "Nantes")
ZH_NAMES = (
    "林晓", "陈默", "周航", "沈月", "许诺", "何苗", "郑远", "苏晴", "罗一鸣", "唐果", "蒋舟", "叶知秋", "方圆", "孟甜", "程野",
)  # fmt: skip
ZH_CITIES = ("杭州", "成都", "青岛", "昆明", "长沙", "西安", "苏州", "厦门", "兰州", "桂林")
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
ZH_WEEKDAYS = ("星期一", "星期二", "星期三", "星期四", "星期五", "星期六", "星期日")


@dataclass(frozen=True)
class Draft:
    """A conversation without its id and source: (user, assistant) turns and perhaps a system prompt."""

    language: str
    turns: tuple[tuple[str, str], ...]
    system: str = ""

    def messages(self) -> list[dict[str, str]]:
        """The conversation as chat messages."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for user, assistant in self.turns:
            messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
        return messages


Kind = Callable[[Random], Iterator[Draft]]


def draft(language: str, *turns: tuple[str, str], system: str = "") -> Draft:
    """A draft from its turns."""
    return Draft(language, turns, system)


def as_json(value: Any) -> str:
    """One line of JSON, with Chinese left readable."""
    return json.dumps(value, ensure_ascii=False)


def num(value: int | Fraction) -> str:
    """An exact decimal without trailing zeros; ValueError where there is none with six places."""
    text = f"{float(value):.6f}".rstrip("0").rstrip(".")
    if Fraction(text) != value:
        raise ValueError(f"{value} has no short decimal")
    return text


def money(cents: int, sign: str = "$") -> str:
    """An amount as a shop would print it, without cents when there are none."""
    return f"{sign}{cents // 100}" + (f".{cents % 100:02d}" if cents % 100 else "")


def clock(minutes: int) -> str:
    """Minutes after midnight as HH:MM on a 24-hour clock."""
    return f"{minutes // 60 % 24:02d}:{minutes % 60:02d}"


def reply(language: str, working: Sequence[str], answer: str) -> str:
    """Lines of working and a last line with the answer."""
    return "\n".join([*working, f"{'答案：' if language == 'zh' else 'Answer: '}{answer}"])
