"""Personal data: addresses and numbers that name a person, by their pattern and, where there is one, their check digit.

In: a text. Out: where something was found and of which kind; or the text with `<EMAIL>`, `<PHONE>`, ... in its place.
Numbers that only look like it (a wrong check digit, a documentation address, a fictional number) are left alone.
"""

import dataclasses
import datetime
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any

from jax_sft.data.conversation import Conversation
from jax_sft.data.quality.text import Finding, around

NAMES = {
    "iban": "an IBAN",
    "card": "a card number",
    "cn_id": "a Chinese resident ID",
    "fr_insee": "a French INSEE number",
    "us_ssn": "a US social security number",
    "uk_nino": "a UK national insurance number",
    "br_cpf": "a Brazilian CPF",
    "es_dni": "a Spanish DNI or NIE",
    "de_tax_id": "a German tax ID",
    "email": "an e-mail address",
    "ipv4": "an IP address",
    "phone": "a phone number",
}
TAGS = {kind: f"<{kind.upper()}>" for kind in NAMES} | {"ipv4": "<IP>"}
_IBAN_LENGTHS = {
    "AD": 24, "AE": 23, "AT": 20, "BE": 16, "BG": 22, "CH": 21, "CY": 28, "CZ": 24, "DE": 22, "DK": 18, "EE": 20,
    "ES": 24, "FI": 18, "FR": 27, "GB": 22, "GR": 27, "HR": 21, "HU": 28, "IE": 22, "IL": 23, "IS": 26, "IT": 27,
    "LI": 21, "LT": 20, "LU": 20, "LV": 21, "MC": 27, "MT": 31, "NL": 18, "NO": 15, "PL": 28, "PT": 25, "QA": 29,
    "RO": 24, "SA": 24, "SE": 24, "SI": 19, "SK": 24, "SM": 27, "TR": 26, "UA": 29, "BR": 29,
}  # fmt: skip
_PLACEHOLDER_HOSTS = re.compile(
    r"(?:^|\.)(?:example|test|invalid|localhost|domain|yourdomain|email|company|yourcompany)(?:\.|$)"
)
_SIGNS = re.compile(r"@|\d[\d\s.()/-]{5,}|[A-Z]{2}\d{2}")  # without one of these there is nothing to look for


def _digits(text: str) -> str:
    return re.sub(r"\D", "", text)


def luhn(number: str) -> bool:
    """Whether the last digit is the check digit of ISO/IEC 7812-1."""
    total = 0
    for i, digit in enumerate(reversed(number)):
        value = int(digit) * (2 if i % 2 else 1)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def _card(text: str) -> bool:
    number = _digits(text)
    start = int(number[:4])
    is_issued = (
        (number[0] == "4" and len(number) in (13, 16, 19))
        or ((51 <= start // 100 <= 55 or 2221 <= start <= 2720) and len(number) == 16)
        or (start // 100 in (34, 37) and len(number) == 15)
        or ((start == 6011 or start // 100 in (62, 65)) and 16 <= len(number) <= 19)
        or (3528 <= start <= 3589 and len(number) == 16)
        or (start // 100 in (36, 38) and len(number) == 14)
    )
    return is_issued and len(set(number)) > 2 and luhn(number)


def _iban(text: str) -> bool:
    number = text.replace(" ", "")
    if _IBAN_LENGTHS.get(number[:2]) != len(number):
        return False
    return int("".join(str(int(c, 36)) for c in number[4:] + number[:4])) % 97 == 1


def _cn_id(text: str) -> bool:
    try:
        born = datetime.date(int(text[6:10]), int(text[10:12]), int(text[12:14]))
    except ValueError:
        return False
    weights = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
    check = "10X98765432"[sum(int(c) * w for c, w in zip(text, weights, strict=False)) % 11]
    return born.year >= 1900 and text[0] in "12345678" and check == text[17].upper()


def _fr_insee(text: str) -> bool:
    number = text.replace(" ", "").upper()
    whole = number[:13].replace("2A", "19").replace("2B", "18")
    return whole.isdigit() and 97 - int(whole) % 97 == int(number[13:])


def _us_ssn(text: str) -> bool:
    area, group, serial = re.split(r"[- ]", text)
    return area not in ("000", "666") and area < "900" and group != "00" and serial != "0000"


def _uk_nino(text: str) -> bool:
    return text[:2] not in ("BG", "GB", "KN", "NK", "NT", "TN", "ZZ")


def _br_cpf(text: str) -> bool:
    number = _digits(text)

    def check(count: int) -> int:
        return sum(int(c) * w for c, w in zip(number, range(count + 1, 1, -1), strict=False)) * 10 % 11 % 10

    return len(set(number)) > 1 and check(9) == int(number[9]) and check(10) == int(number[10])


def _es_dni(text: str) -> bool:
    number = re.sub(r"[-. ]", "", text).upper()
    return "TRWAGMYFPDXBNJZSQVHLCKE"[int(number[:-1].translate(str.maketrans("XYZ", "012"))) % 23] == number[-1]


def _de_tax_id(text: str) -> bool:
    """ISO 7064 mod 11,10; of the first ten digits one is there twice or thrice, each other at most once."""
    number = _digits(text)
    counts = sorted((number[:10].count(d) for d in set(number[:10])), reverse=True)
    if number[0] == "0" or counts[0] not in (2, 3) or counts[1] > 1:
        return False
    product = 10
    for digit in number[:10]:
        product = ((int(digit) + product) % 10 or 10) * 2 % 11
    return (11 - product) % 10 == int(number[10])


def _email(text: str) -> bool:
    local, _, host = text.lower().rpartition("@")
    return not _PLACEHOLDER_HOSTS.search(host) and local not in (
        "user",
        "username",
        "name",
        "your.name",
        "yourname",
        "xxx",
    )


def _ipv4(text: str) -> bool:
    octets = [int(part) for part in text.split(".")]
    if max(octets) > 255 or max(octets) < 10:  # 1.2.3.4 is a version
        return False
    first, second, third, _ = octets
    is_private = first in (0, 10, 127) or first >= 224 or (first, second) in ((192, 168), (169, 254))
    is_private |= first == 172 and 16 <= second <= 31
    is_documentation = (first, second, third) in ((192, 0, 2), (198, 51, 100), (203, 0, 113))
    return not is_private and not is_documentation and text not in ("8.8.8.8", "8.8.4.4", "1.1.1.1", "9.9.9.9")


def _phone(text: str) -> bool:
    number = _digits(text)
    is_fictional = re.search(r"555[-. ]?01\d\d$", text) is not None
    is_round = number.endswith("000000") or len(set(number[-7:])) == 1
    return (
        9 <= len(number) <= 15
        and not is_fictional
        and not is_round
        and number[-10:] not in ("1234567890", "0123456789")
    )


@dataclasses.dataclass(frozen=True)
class _Kind:
    pattern: re.Pattern[str]
    is_one: Callable[[str], bool]


def _bounded(pattern: str, flags: int = re.ASCII) -> re.Pattern[str]:
    """No digit, letter or sign of a longer number right before or after."""
    return re.compile(rf"(?<![A-Za-z0-9_$€£¥.,/=-])(?:{pattern})(?![A-Za-z0-9_]|[.,/=-]\d)", flags)


_KINDS = {
    "iban": _Kind(_bounded(r"[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?"), _iban),
    "card": _Kind(
        _bounded(r"\d{4}([ -]?)\d{4}\1\d{4}\1\d{4}(?:\1?\d{1,3})?|3[4678]\d{2}([ -]?)\d{6}\2\d{4,5}|4\d{12}"), _card
    ),
    "cn_id": _Kind(_bounded(r"\d{17}[\dXx]"), _cn_id),
    "fr_insee": _Kind(
        _bounded(r"[12] ?\d{2} ?(?:0[1-9]|1[0-2]|[2-9]\d) ?(?:\d{2}|2[ABab]) ?\d{3} ?\d{3} ?(?:0[1-9]|[1-8]\d|9[0-7])"),
        _fr_insee,
    ),
    "us_ssn": _Kind(_bounded(r"\d{3}-\d{2}-\d{4}|(?<=SSN )\d{3} \d{2} \d{4}|(?<=SSN: )\d{3} \d{2} \d{4}"), _us_ssn),
    "uk_nino": _Kind(_bounded(r"[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z] ?\d{2} ?\d{2} ?\d{2} ?[A-D]"), _uk_nino),
    "br_cpf": _Kind(_bounded(r"\d{3}\.\d{3}\.\d{3}-\d{2}|\d{9}-\d{2}|\d{11}"), _br_cpf),
    "es_dni": _Kind(
        _bounded(r"\d{8}[- ]?[A-HJ-NP-TV-Z]|\d{2}\.\d{3}\.\d{3}[- ]?[A-HJ-NP-TV-Z]|[XYZ][- ]?\d{7}[- ]?[A-HJ-NP-TV-Z]"),
        _es_dni,
    ),
    "de_tax_id": _Kind(_bounded(r"[1-9]\d ?\d{3} ?\d{3} ?\d{3}"), _de_tax_id),
    "email": _Kind(
        re.compile(r"(?<![\w.+-])[A-Za-z0-9][\w.+-]{0,63}@(?:[A-Za-z0-9-]+\.)+[A-Za-z]{2,24}(?![\w@])", re.ASCII),
        _email,
    ),
    "ipv4": _Kind(
        re.compile(r"(?<![\w.])(?<!version )(?<!Version )(?<!§ )\d{1,3}(?:\.\d{1,3}){3}(?!\.?\w)(?!\.\d)", re.ASCII),
        _ipv4,
    ),
    "phone": _Kind(
        re.compile(
            r"(?<![\w.,/=#$€£¥+-])(?:"
            r"\+\d{1,3}[ .-]?(?:\(0?\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){2,4}"  # with its country
            r"|\(\d{3}\) ?\d{3}[-. ]\d{4}|(?:1[-. ])?[2-9]\d{2}[-.][2-9]\d{2}[-.]\d{4}"  # North America
            r"|(?:86[- ]?)?1[3-9]\d(?:\d{8}|[- ]\d{4}[- ]\d{4})|\(?0\d{2,3}\)?[- ]\d{7,8}"  # China
            r"|07\d{3}[ -]?\d{3}[ -]?\d{3}|0(?:20|1\d{2,3}) \d{3,4} \d{3,4}"  # United Kingdom
            r"|0[1-9](?:[ .]\d{2}){4}"  # France
            r"|01[567]\d[ /-]?\d{7,8}|0\d{2,4}[ /]\d{5,8}"  # Germany
            r"|\(\d{2}\) ?9?\d{4}-\d{4}|0\d{1,2}-\d{4}-\d{4}"  # Brazil, Japan
            r")(?![\w%]|[.,/=-]\d| ?(?:元|个|人|次|万|亿|米|km\b|USD|dollars))",
            re.ASCII,
        ),
        _phone,
    ),
}


def found_in(text: str, kinds: Collection[str]) -> list[tuple[int, int, str]]:
    """(start, end, kind) of all that was found, in order; where two kinds fit, the one with the stricter check."""
    if not _SIGNS.search(text):
        return []
    found: list[tuple[int, int, str]] = []
    for kind, of in _KINDS.items():
        if kind not in kinds or (kind == "email" and "@" not in text):
            continue
        for match in of.pattern.finditer(text):
            start, end = match.span()
            if all(end <= s or start >= e for s, e, _ in found) and of.is_one(match[0]):
                found.append((start, end, kind))
    return sorted(found)


def masked(text: str, kinds: Collection[str]) -> str:
    """The text with a tag in the place of each."""
    for start, end, kind in reversed(found_in(text, kinds)):
        text = text[:start] + TAGS[kind] + text[end:]
    return text


def findings(conversation: Conversation, kinds: Collection[str]) -> list[Finding]:
    """One for each kind that is somewhere in the conversation: in its turns, calls of tools, or tools' descriptions."""
    found: dict[str, Finding] = {}
    for text in _all_texts(conversation):
        for start, end, kind in found_in(text, kinds):
            if kind not in found:
                found[kind] = Finding(f"personal data: {NAMES[kind]}", around(text, start, end, margin=40))
    return list(found.values())


def mask(conversation: Conversation, kinds: Collection[str]) -> tuple[Conversation, list[Finding]]:
    """The conversation with tags in the place of personal data, and for each kind one "before -> after"."""
    changes: dict[str, Finding] = {}

    def of(text: str) -> str:
        spans = found_in(text, kinds)
        for start, end, kind in spans:
            if kind not in changes:
                left, right = text[max(0, start - 40) : start], text[end : end + 40]
                said = f"{left}{text[start:end]}{right} -> {left}{TAGS[kind]}{right}"
                changes[kind] = Finding(f"personal data: {NAMES[kind]} is masked", said)
        return masked(text, kinds) if spans else text

    changed = dataclasses.replace(
        conversation,
        messages=tuple(
            dataclasses.replace(m, content=of(m.content), extra=_mapped(m.extra, of)) for m in conversation.messages
        ),
        tools=tuple(_mapped(tool, of) for tool in conversation.tools),
        text=None if conversation.text is None else of(conversation.text),
        prompt_text=None if conversation.prompt_text is None else of(conversation.prompt_text),
    )
    return (changed if changes else conversation), list(changes.values())


def _all_texts(conversation: Conversation) -> Iterator[str]:
    yield from filter(None, (conversation.prompt_text, conversation.text))
    for message in conversation.messages:
        yield message.content
        if message.extra:
            yield from _strings(message.extra)
    yield from _strings(conversation.tools)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _strings(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _strings(part)


def _mapped(value: Any, of: Callable[[str], str]) -> Any:
    """Nested lists and objects with each text changed."""
    if isinstance(value, str):
        return of(value)
    if isinstance(value, dict):
        return {key: _mapped(part, of) for key, part in value.items()}
    return [_mapped(part, of) for part in value] if isinstance(value, list | tuple) else value
