"""The data card: which files a run reads, with sizes and hashes, how they became tokens, and what nobody checked.

In: a `RunConfig`, the parts that its sets are made of, their `Summary`s. Out: a `Card`, shown on the page, and as
Markdown for DATA_CARD.md. What the config says of licence, origin and use (`data.card`) stands first, word for word.
"""

import dataclasses
import hashlib
import html
import pathlib
from collections.abc import Iterator, Mapping, Sequence

from jax_sft.config import DataConfig, RunConfig
from jax_sft.data.chat import ChatTemplate
from jax_sft.data.conversation import DataError
from jax_sft.data.formats import format_of
from jax_sft.data.pieces import visible
from jax_sft.data.quality.screen import rules_of
from jax_sft.data.source import HubSet, Part, files_of
from jax_sft.report.summary import Summary, in_words

_MOST_FILES = 100  # lines of the table; the others are summed in one more
_HASH_CHARACTERS = 16  # of the template's hash
# What a reader of the card looks for; those that the config does not say are told to be missing.
EXPECTED = ("licence", "origin", "intended use", "must not be used for")


@dataclasses.dataclass(frozen=True)
class FileLine:
    """One file, or hub dataset, of a set."""

    part: str
    name: str
    num_bytes: int | None  # None: on the hub
    sha256: str
    format: str


@dataclasses.dataclass(frozen=True)
class Card:
    """What must be known of data before they are used, or passed on."""

    name: str
    said: tuple[tuple[str, str], ...]  # by the config
    missing: tuple[str, ...]  # of `EXPECTED`
    files: tuple[FileLine, ...]
    made: tuple[tuple[str, str], ...]  # how tokens and mask came about
    counts: tuple[tuple[str, Summary], ...]
    limits: tuple[str, ...]


def make_card(
    config: RunConfig,
    parts: Mapping[str, Sequence[Part]],
    summaries: Mapping[str, Summary],
    template: ChatTemplate,
    *,
    name: str,
) -> Card:
    """Reads all files once more, for their hashes.

    Args:
        parts: of each set, "train" and "validation".
        name: what the card is called, unless `data.card` says otherwise.

    Raises:
        DataError: of `source` and `formats`.
    """
    said = {key.replace("_", " "): text for key, text in config.data.card.items()}
    name = said.pop("name", name)
    return Card(
        name=name,
        said=tuple(said.items()),
        missing=tuple(field for field in EXPECTED if field not in said),
        files=tuple(_files(config.data, parts)),
        made=tuple(_made(config, summaries, template)),
        counts=tuple(summaries.items()),
        limits=tuple(_limits(config.data)),
    )


def markdown(card: Card) -> str:
    """The card as a file of its own."""
    out = [f"# Data card: {_text(card.name)}", ""]
    out += [line for field, text in card.said for line in (f"**{_text(field)}**: {_text(text)}", "")]
    if card.missing:
        out += [f"Not said in `data.card`: {', '.join(card.missing)}.", ""]
    for set_name, summary in card.counts:
        account = summary.account
        out += [f"## {set_name}", "", *_table(("what", "value"), _count_rows(summary)), ""]
        out += [f"Fingerprint `{summary.fingerprint}`.", ""]
        lost = [(what, f"{count:,}") for what, count in sorted(account.dropped.items(), key=lambda x: -x[1])]
        out += [*_table(("dropped because", "conversations"), lost), ""] if lost else []
        sources = [
            (x.name, f"{x.sequences:,}", f"{x.tokens:,}", f"{x.trained:,}", f"{x.loss_share:.1%}")
            for x in summary.sources
        ]
        out += [*_table(("source", "sequences", "tokens", "trained", "share of the loss"), sources), ""]
    files = [
        (f.part, f.name, "" if f.num_bytes is None else f"{f.num_bytes:,}", f.format, f.sha256) for f in card.files
    ]
    out += ["## Files", "", *_table(("set", "file", "bytes", "format", "SHA-256"), files), ""]
    out += ["## From text to tokens", "", *_table(("what", "value"), card.made), ""]
    out += ["## Known limits", "", *(f"- {_text(limit)}" for limit in card.limits)]
    return "\n".join(out) + "\n"


def _count_rows(summary: Summary) -> list[tuple[str, str]]:
    account = summary.account
    counts = [("conversations read", account.read), ("kept", account.kept), ("dropped", sum(account.dropped.values()))]
    counts += [("held out", account.held_out)] if account.held_out else []
    rows = [(name, f"{count:,}") for name, count in counts] + list(summary.facts[:3])
    return [*rows, ("scripts", in_words(summary.scripts))]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + " --- |" * len(head)
    for row in rows:
        yield "| " + " | ".join(_text(cell).replace("|", "\\|") for cell in row) + " |"


def _text(text: str) -> str:
    """One line that holds no markup of HTML and no character that steers."""
    return html.escape(visible(" ".join(text.split())), quote=False)


def _files(config: DataConfig, parts: Mapping[str, Sequence[Part]]) -> Iterator[FileLine]:
    of_sets = [
        (part.name or set_name, place)
        for set_name, several in parts.items()
        for part in several
        if not part.takes_held_out  # of the same files
        for place in files_of(part.paths)
    ]
    for name, place in of_sets[:_MOST_FILES]:
        format = format_of(place, config)
        if isinstance(place, HubSet):
            yield FileLine(name, str(place), None, "a hub dataset", format)
        else:
            with open(place, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            yield FileLine(name, str(place), place.stat().st_size, digest, format)
    rest = [place for _, place in of_sets[_MOST_FILES:]]
    if rest:
        size = sum(place.stat().st_size for place in rest if isinstance(place, pathlib.Path))
        yield FileLine("", f"{len(rest):,} other files", size, "", "")


def _made(config: RunConfig, summaries: Mapping[str, Summary], template: ChatTemplate) -> Iterator[tuple[str, str]]:
    data, revision = config.data, config.model.revision
    yield "model and tokenizer", config.model.path + (f", revision {revision}" if revision else "")
    try:
        digest = hashlib.sha256(template.template.encode()).hexdigest()[:_HASH_CHARACTERS]
        yield "chat template", f"{config.model.chat_template or 'of the tokenizer'}, SHA-256 {digest}…"
    except DataError:
        yield "chat template", "none"
    yield "data.train_on", f"{data.train_on}, {data.train_turns} turns"
    methods: dict[str, int] = {}
    for summary in summaries.values():
        for method, count in summary.account.method.items():
            methods[method] = methods.get(method, 0) + count
    yield "trained spans found by", ", ".join(f"{method} ({count:,})" for method, count in methods.items())
    yield "data.max_length", f"{data.max_length:,} tokens; longer ones: {data.too_long}"
    yield "control tokens written out in a message", "as text" if data.control_text == "plain" else "dropped"


def _limits(config: DataConfig) -> Iterator[str]:
    rules = rules_of(config)
    for state, told in (("drop", "leave out what they find"), ("mask", "mask what they find"), ("note", "only count")):
        names = [name for name, value in rules.items() if value == state]
        if names:
            yield f"Rules of data.quality that {told}: {', '.join(names)}."
    off = [name for name, value in rules.items() if value == "off"]
    if off:
        yield f"Not looked for: {', '.join(off)}."
    yield "Nobody checked that the answers are true, harmless or free of rights of others."
    yield "Scripts are told by their characters: languages that share a script are not told apart."
