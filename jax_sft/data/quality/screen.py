"""The order of the rules, and what is done with a conversation that one of them finds.

In: conversations as they are read, in the order of their files. Out: those that stay, masked where that is asked for;
the account has everything else. Rules of one conversation come first, those against other conversations after them; a
conversation that is left out is counted once, under the first rule that leaves it out, and later ones do not repeat it.
"""

import dataclasses
import functools
import itertools
import math
import pathlib
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from jax_sft.config import RULES_OF_ALL, DataConfig, QualityConfig
from jax_sft.data.conversation import Account, Conversation
from jax_sft.data.formats import read_conversations
from jax_sft.data.quality import answers, language, leakage, lists, personal, remains
from jax_sft.data.quality.duplicates import (
    NEAR,
    SAME_CONTENT,
    SAME_ID,
    SAME_PROMPT,
    Near,
    Seen,
    content_of,
    key_of,
    prompt_of,
    repeats,
)
from jax_sft.data.quality.leakage import Leaks, Reference
from jax_sft.data.quality.text import Finding, View
from jax_sft.data.source import HubSet, Part, files_of

SAMPLE = 2000  # conversations that say what length is usual
LEAST_DEVIATION = 0.1  # of log lengths: where all are alike, a little more is no outlier
BOTH_STAY = ", both stay"
# Rules that find nothing unless one of these is set.
_GO_BY = {
    "length": ("min_answer_characters", "max_answer_characters", "max_length_deviation"),
    "words": ("word_lists",),
    "score": ("min_ratio", "max_ratio", "max_loss"),
}

Judge = Callable[[View], Finding | None]


def screened(
    conversations: Iterable[Conversation],
    config: QualityConfig,
    account: Account,
    references: Iterable[Reference] = (),
) -> Iterator[Conversation]:
    """Those that stay, in order; the others are dropped in the account, and what is odd is noted there.

    Args:
        references: prompts that must not be in any conversation; read only if `config.leakage` is on.

    Raises:
        DataError: a file that the rules need cannot be used, or a library is missing.
    """
    stream = iter(conversations)
    usual = None
    if config.length != "off" and config.max_length_deviation is not None:
        sample = list(itertools.islice(stream, SAMPLE))
        usual = _usual_length(sample)
        stream = itertools.chain(sample, stream)
    judges = _judges(config, usual, references)
    seen = _Seen(config)
    for conversation in stream:
        kept = _screen(conversation, config, judges, seen, account)
        if kept is not None:
            yield kept


def references_of(config: DataConfig, validation: Sequence[Part]) -> Iterator[Reference]:
    """Prompts of the validation sets, what is held out among them, and of the benchmarks.

    Raises:
        DataError: of `source`, `formats` and `leakage`.
    """
    if validation:
        yield from leakage.prompts_of(read_conversations(config, validation, Account()))
    yield from leakage.benchmark_prompts(config.quality.benchmarks, split=config.split)


def files_read(config: QualityConfig, validation: Sequence[Part]) -> list[pathlib.Path | HubSet]:
    """Files other than the data that the outcome depends on.

    Raises:
        DataError: of `source`; a list cannot be read.
    """
    places: list[pathlib.Path | HubSet] = []
    if config.leakage != "off":
        places += files_of((*(path for part in validation for path in part.paths), *config.benchmarks))
    if config.words != "off" and config.word_lists:
        lists.read_words(config.word_lists)  # says what is wrong with them
        places += [pathlib.Path(path).expanduser() for path in config.word_lists]
    if config.score != "off" and config.scores is not None:
        lists.read_scores(config.scores, config)
        places.append(pathlib.Path(config.scores).expanduser())
    return places


def _judges(
    config: QualityConfig, usual: tuple[float, float] | None, references: Iterable[Reference]
) -> list[tuple[str, Judge]]:
    """(what to do, the rule) of each rule of one conversation that is on, in order."""
    if config.wrong_language != "off" and config.language_by == "model":
        language.check_model()
    has_bounds = (config.min_answer_characters, config.max_answer_characters, usual) != (None, None, None)
    rules: list[tuple[str, Judge | None]] = [
        (config.roles, answers.roles),
        (config.empty_answer, answers.empty_answer),
        (config.repeats_prompt, answers.repeats_prompt),
        (config.mojibake, remains.mojibake),
        (config.cut_off, answers.cut_off),
        (config.loops, answers.loops),
        (config.markup, remains.markup),
        (config.boilerplate, remains.boilerplate),
        (config.refusal, remains.refusal),
        (config.wrong_language, functools.partial(language.wrong_language, by=config.language_by)),
        (config.length, functools.partial(_length, config=config, usual=usual) if has_bounds else None),
        (config.words, lists.read_words(config.word_lists) if config.words != "off" and config.word_lists else None),
        (config.score, lists.read_scores(config.scores, config) if config.score != "off" and config.scores else None),
        (config.leakage, Leaks(references, config) if config.leakage != "off" else None),
    ]
    return [(what, rule) for what, rule in rules if what != "off" and rule is not None]


def rules_of(config: DataConfig) -> dict[str, str]:
    """What each rule does with what it finds; "off" too for one that has no bound to go by or no place in a stream."""
    quality, rules = config.quality, {}
    for field in dataclasses.fields(QualityConfig):
        if "off" not in typing.get_args(field.type):
            continue
        has_bound = any(getattr(quality, key) not in (None, ()) for key in _GO_BY.get(field.name, (field.name,)))
        is_possible = not config.stream.on or field.name not in RULES_OF_ALL
        rules[field.name] = getattr(quality, field.name) if has_bound and is_possible else "off"
    return rules


class RowRules:
    """The rules of one conversation, for who does not read all of them: what was before is not known.

    Raises:
        DataError: as `screened`.
    """

    def __init__(self, config: QualityConfig) -> None:
        self._config = dataclasses.replace(config, **dict.fromkeys(RULES_OF_ALL, "off"))
        self._judges, self._seen = _judges(self._config, None, ()), _Seen(self._config)

    def kept(self, conversation: Conversation, account: Account) -> Conversation | None:
        """The conversation, perhaps masked; None if a rule leaves it out, which is counted."""
        return _screen(conversation, self._config, self._judges, self._seen, account)


class _Seen:
    """What earlier conversations were."""

    def __init__(self, config: QualityConfig) -> None:
        self.content = Seen() if config.same_content != "off" else None
        self.id = Seen() if config.same_id != "off" else None
        self.prompt = Seen() if config.same_prompt != "off" else None
        self.near = Near(config.near_duplicate_similarity) if config.near_duplicate != "off" else None


def _screen(
    conversation: Conversation,
    config: QualityConfig,
    judges: Sequence[tuple[str, Judge]],
    seen: _Seen,
    account: Account,
) -> Conversation | None:
    """The conversation, perhaps masked; None if a rule leaves it out."""
    where = conversation.where or conversation.id
    view = View(conversation)
    notes: list[Finding] = []
    for what, judge in judges:
        finding = judge(view)
        if finding is None:
            continue
        if what == "drop" and finding.reason != lists.NO_SCORE:
            account.drop(finding.reason, where, finding.excerpt)
            return None
        notes.append(finding)
    changes: list[Finding] = []
    kinds = config.personal_kinds or tuple(personal.NAMES)
    if config.personal_data == "mask":
        masked, changes = personal.mask(conversation, kinds)
        view = View(masked)
    elif config.personal_data != "off":
        found = personal.findings(conversation, kinds)
        if found and config.personal_data == "drop":
            account.drop(found[0].reason, where, found[0].excerpt)
            return None
        notes += found
    dropped = _repeated(view, where, config, seen, notes)
    if dropped is not None:
        account.drop(dropped.reason, where, dropped.excerpt)
        return None
    for note in notes:
        account.note(note.reason, where, note.excerpt)
    for change in changes:
        account.alter(change.reason, where, change.excerpt)
    return view.conversation


def _repeated(view: View, where: str, config: QualityConfig, seen: _Seen, notes: list[Finding]) -> Finding | None:
    """Why the conversation is left out as one that was there before, if it is; it is remembered if it is not."""
    content = key_of(content_of(view.conversation)) if seen.content else None
    id = key_of(view.conversation.id) if seen.id else None
    prompt = None
    first = seen.content.find(content) if seen.content and content else None
    is_same = first is not None
    found: list[tuple[str, str, str | None]] = [(config.same_content, SAME_CONTENT, first)]
    if seen.id is not None and id is not None:
        found.append((config.same_id, SAME_ID, seen.id.find(id)))
    if seen.prompt is not None and not is_same and (asked := prompt_of(view)) is not None:
        prompt = key_of(asked)
        found.append((config.same_prompt, SAME_PROMPT, seen.prompt.find(prompt)))
    sketch = near = None
    # The costly one last, and not for what is left out without it.
    if seen.near is not None and not is_same and not any(what == "drop" and f is not None for what, _, f in found):
        sketch = seen.near.sketch(view)
        near = seen.near.find(sketch)
        found.append((config.near_duplicate, NEAR, near))
    for what, reason, earlier in found:
        if earlier is None:
            continue
        if what == "drop":
            return repeats(reason, earlier, view)
        stays = BOTH_STAY if reason in (SAME_CONTENT, SAME_ID) else ""
        notes.append(repeats(reason + stays, earlier, view))
    if seen.content is not None and content is not None:
        seen.content.add(content, where)
    if seen.id is not None and id is not None:
        seen.id.add(id, where)
    if seen.prompt is not None and prompt is not None:
        seen.prompt.add(prompt, where)
    if seen.near is not None and sketch is not None and near is None:
        seen.near.add(sketch, where)
    return None


def _usual_length(sample: Sequence[Conversation]) -> tuple[float, float]:
    """Median and robust deviation (1.4826 times the median distance from it) of the log lengths."""
    logs = np.array([_log_length(View(of)) for of in sample] or [0.0])
    median = float(np.median(logs))
    return median, 1.4826 * float(np.median(np.abs(logs - median)))


def _log_length(view: View) -> float:
    """By bytes: a Chinese character says as much as three letters, and has as many bytes."""
    return math.log1p(sum(len(text.encode()) for text in view.said))


def _length(view: View, *, config: QualityConfig, usual: tuple[float, float] | None) -> Finding | None:
    """The length of all answers of a conversation together, or of a plain text."""
    if view.conversation.tokens is not None:
        return None  # there is no text
    count = sum(map(len, view.said))
    what = None
    if config.min_answer_characters is not None and count < config.min_answer_characters:
        what = "below data.quality.min_answer_characters"
    elif config.max_answer_characters is not None and count > config.max_answer_characters:
        what = "above data.quality.max_answer_characters"
    elif usual is not None and config.max_length_deviation is not None:
        median, deviation = usual
        if abs(_log_length(view) - median) > config.max_length_deviation * max(deviation, LEAST_DEVIATION):
            what = "far from the usual, by data.quality.max_length_deviation"
    text = view.said[-1] if view.said else ""
    return None if what is None else Finding(f"length: {what}", f"{count} characters: {text[:150]}")


def rule_of(reason: str) -> str:
    """The key of data.quality that a reason comes from, or "format" if the rows' reader gave it."""
    if reason.startswith((SAME_CONTENT, SAME_ID)):
        return "same_content" if reason.startswith(SAME_CONTENT) else "same_id"
    name = reason.partition(":")[0].replace(" ", "_")
    return name if name in {f.name for f in dataclasses.fields(QualityConfig)} else "format"
