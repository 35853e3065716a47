"""Conversations become tokens and a mask, by the model's own chat template.

In: a `Conversation`, a `ChatTemplate` (a Hugging Face fast tokenizer and its Jinja text), a `DataConfig`. Out:
`Sequence`s, shifted once, and an `Account` of what was dropped or changed. The conversation is rendered as one text,
tokenised once with offsets; spans.py says which characters teach, control.py keeps control text inside messages text.

Letters: T position in a sequence.
"""

import collections
import json
import unicodedata
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Several
from typing import Any

import numpy as np

from jax_sft.config import DataConfig
from jax_sft.data import spans
from jax_sft.data.control import BrokenTextError
from jax_sft.data.conversation import Account, Conversation, DataError, Message, Sequence, Tokens
from jax_sft.data.facts import NoFitError, RefusedError
from jax_sft.data.template import WAY_OUT, BrokenTemplateError, ChatTemplate
from jax_sft.data.words import Encoded

__all__ = ["ChatTemplate", "to_sequences"]


def to_sequences(
    conversation: Conversation, template: ChatTemplate, config: DataConfig, account: Account
) -> list[Sequence]:
    """The sequences of one conversation: one, or one for each answer, or none; counted in `account` as kept or dropped.

    Raises:
        DataError: the template cannot be followed, a trained span does not hold its message, or a sequence is too long
            and data.too_long says that this is an error.
    """
    where = conversation.id
    changes: set[str] = set()
    try:
        if conversation.tokens is not None:
            method, encoded = "tokens", [_given(conversation.tokens, template)]
        elif conversation.text is not None:
            method, encoded = "text", [_encoded_text(conversation.text, conversation.prompt_text, template, changes)]
        else:
            method, encoded = _encoded_chat(conversation, template, config, changes)
    except _LeftOutError as reason:
        account.drop(str(reason), where)
        return []
    except (RefusedError, BrokenTextError) as error:
        said = "the chat template refuses it: " if isinstance(error, RefusedError) else ""
        account.drop(f"{said}{error}", where)
        return []
    except NoFitError as error:
        raise DataError(
            f"{where}: the chat template cannot be followed ({error}); {WAY_OUT}, or another data.mask"
        ) from error
    except BrokenTemplateError:  # no row is to blame
        raise
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    sequences, reasons = [], []
    for number, (ids, weights) in enumerate(encoded, 1):
        name = f"{where}#{number}" if method == "turns" else where
        try:
            ids, weights = _fitted(ids, weights, config, name, changes)
        except _LeftOutError as reason:
            reasons.append(str(reason))
            continue
        tokens = np.asarray(ids, np.int32)
        weights = weights * np.float32(conversation.loss_weight)
        sequences.append(Sequence(tokens[:-1], tokens[1:], weights[1:], conversation.source, name))
    if not sequences:
        account.drop(reasons[0], where)
        return []
    account.kept += 1
    account.use(method)
    for change in sorted(changes | {f"answers left out, {reason}" for reason in reasons}):
        account.alter(change, where)
    return sequences


class _LeftOutError(Exception):
    """A conversation or sequence is not trained on; the text is the reason to count."""


def _given(tokens: Tokens, template: ChatTemplate) -> tuple[list[int], np.ndarray]:
    """Tokens that the file gives.

    Raises:
        DataError: one is beyond the vocabulary.
    """
    size = len(template.tokenizer)
    beyond = next((i for i in tokens.ids if i >= size), None)
    if beyond is not None:
        raise DataError(f"input_ids holds {beyond}, and the vocabulary {size} tokens; use the tokenizer they are of")
    return list(tokens.ids), np.asarray(tokens.weights, np.float32)


def _encoded_text(
    text: str, prompt: str | None, template: ChatTemplate, changes: set[str]
) -> tuple[list[int], np.ndarray]:
    """One text, of which the tokens of the prompt do not teach; a token that reaches over its end does."""
    ids, num_prompt_tokens = template.encode_text(text, prompt=prompt or "")
    if template.control.pattern.search((prompt or "") + text):
        changes.add("plain text with control tokens, taken as control tokens")
    weights = np.ones(len(ids), np.float32)
    weights[:num_prompt_tokens] = 0
    return ids, weights


def _encoded_chat(
    conversation: Conversation, template: ChatTemplate, config: DataConfig, changes: set[str]
) -> tuple[str, list[tuple[list[int], np.ndarray]]]:
    """Token ids and the weight of each token, for each rendering of the conversation."""
    weights, everywhere = _weights(conversation.messages, config)
    if not (weights or everywhere):
        raise _LeftOutError(f"no message to train on: {_why_none(conversation.messages, config)}")
    chat = template.prepare(conversation.messages, tools=conversation.tools, arguments=conversation.template_args)
    if chat.escaped and config.control_text == "drop":
        raise _LeftOutError("control tokens written out in a message (data.control_text = 'drop')")
    method, renderings = spans.find(chat.messages, weights, method=config.mask, render=chat, facts=chat.facts)
    if everywhere and len(renderings) != 1:
        raise NoFitError("data.train_on = 'all' cannot train one answer at a time")
    if chat.escaped:
        changes.add("control text as plain text")
    encoded = []
    for rendering in renderings:
        changes.update(rendering.notes)
        tokens = template.encode(rendering.text, escaped=chat.escaped)
        ids = tokens.ids
        weight_of = np.full(len(ids), everywhere, np.float32)
        said: dict[int, list[str]] = {}  # message -> the text of its trained tokens
        for span in rendering.spans:
            here = _tokens_of(tokens, span)
            weight_of[here] = weights[span.message]
            said.setdefault(span.message, []).append(template.decode(ids[here]))
        for i, texts in said.items():
            _check(conversation.messages[i], "".join(texts), changes)
        encoded.append((ids, weight_of))
    return method, encoded


def _weights(messages: Several[Message], config: DataConfig) -> tuple[dict[int, float], float]:
    """The weight of each message whose span is needed, and that of all other tokens (1 if everything teaches)."""
    roles = {role.strip() for role in config.train_on.split(",")}
    if "all" in roles:
        if config.train_turns == "last":
            raise DataError(
                "data.train_on = 'all' and data.train_turns = 'last' do not combine; set train_on to a role"
            )
        weights = {i: 0.0 if m.train is False else m.weight for i, m in enumerate(messages)}
        # The last answer's span is found always, because a stop token may have to be added to it.
        last_answer = len(messages) - 1 if messages and messages[-1].role == "assistant" else -1
        return {i: w for i, w in weights.items() if w != 1 or i == last_answer}, 1.0
    chosen = [i for i, m in enumerate(messages) if m.role in roles]
    if config.train_turns == "last":
        chosen = chosen[-1:]
    trained = [i for i, m in enumerate(messages) if (i in chosen if m.train is None else m.train)]
    return {i: messages[i].weight for i in trained if messages[i].weight > 0}, 0.0


def _why_none(messages: Several[Message], config: DataConfig) -> str:
    """Why `_weights` finds nothing."""
    roles = {role.strip() for role in config.train_on.split(",")}
    chosen = [m for m in messages if m.role in roles][-1 if config.train_turns == "last" else 0 :]
    if any(m.train for m in messages) or any(m.train is None for m in chosen):
        return "those that would be trained have weight 0"
    if not chosen:
        return f"none has a role in data.train_on = {config.train_on!r}"
    if config.train_turns == "last":
        return "the one that data.train_turns = 'last' chooses has train = false"
    return f"those with a role in data.train_on = {config.train_on!r} have train = false"


def _tokens_of(tokens: Encoded, span: spans.Span) -> slice:
    """The tokens that hold a character of the span.

    A byte-level tokenizer may cut the leading blank off a token's offsets, and gives all tokens of one emoji the same
    offsets: so the first token is the first that ends behind the start, not the first that starts there.
    """
    first = tokens.ending_by(span.start)
    return slice(first, max(first, tokens.starting_before(span.end)))


def _check(message: Message, decoded: str, changes: set[str]) -> None:
    """Compare what a message's trained tokens say with the message, and note what the template left out or changed.

    Blanks may differ. Letter case and Unicode form may differ too (a tokenizer's normaliser folds them, and a template
    can, with `upper`), and that is counted: the model learns other characters than the message has.

    Raises:
        DataError: the tokens do not say the message.
    """
    exact = message.content.strip() in decoded or _unspaced(message.content) in _unspaced(decoded)
    if not exact and _folded(message.content) not in _folded(decoded):
        raise DataError(
            f"the trained tokens say {_short(decoded)}, the {message.role} message {_short(message.content)}: the chat "
            f"template changes it or the mask is displaced; {WAY_OUT}"
        )
    calls = [call.get("function") or call for call in message.extra.get("tool_calls") or ()]
    for name, count in collections.Counter(call["name"] for call in calls).items():
        if decoded.count(name) < count:
            raise DataError(f"the chat template leaves out the tool call {name!r}; {WAY_OUT}")
    texts = {text for call in calls for text in _texts_in(call.get("arguments"))}
    if texts and not all(_is_written(text, _folded(decoded)) for text in texts):
        changes.add("arguments of a call that the chat template leaves out or changes")
    reasoning = next((message.extra[f] for f in spans.REASONING if message.extra.get(f)), None)
    if isinstance(reasoning, str) and _folded(reasoning) not in _folded(decoded):
        changes.add("reasoning that the chat template leaves out")
    elif isinstance(reasoning, str):
        exact = exact and _unspaced(reasoning) in _unspaced(decoded)
    if not exact:
        changes.add("letter case or Unicode form that the chat template or the tokenizer changes")


def _texts_in(value: Any) -> Iterator[str]:
    """The names and texts that an argument holds; numbers are written in too many ways."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from (name, *_texts_in(inner))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts_in(inner)


def _is_written(text: str, folded: str) -> bool:
    """Whether a text is there as it is, or as JSON or Python write it."""
    as_json = json.dumps(text, ensure_ascii=False)[1:-1]
    ways = (text, as_json, json.dumps(text)[1:-1], json.dumps(as_json, ensure_ascii=False)[1:-1], repr(text)[1:-1])
    return any(_folded(way) in folded for way in ways)


def _fitted(
    ids: list[int], weights: np.ndarray, config: DataConfig, where: str, changes: set[str]
) -> tuple[list[int], np.ndarray]:
    """Cut to data.max_length tokens in a row, or left out, as data.too_long says; a sequence of n tokens takes n - 1.

    A cut answer keeps what is left of it and has no stop token: the model is not taught that it ends there.
    """
    limit = config.max_length
    too_long = len(ids) - 1 > limit
    if too_long and config.too_long == "error":
        raise DataError(
            f"{where}: {len(ids) - 1} tokens, data.max_length = {limit}; raise it, or set data.too_long = 'truncate'"
        )
    if too_long and config.too_long == "drop":
        raise _LeftOutError(f"longer than data.max_length = {limit} tokens; raise it or set data.too_long = 'truncate'")
    if too_long:
        ids, weights = ids[: limit + 1], weights[: limit + 1]
    if not weights[1:].any():
        within = f" within data.max_length = {limit} tokens; raise it" if too_long else ""
        raise _LeftOutError(f"no trained token{within}")
    if too_long:
        changes.add(f"cut at data.max_length = {limit} tokens")
    return ids, weights


def _unspaced(text: str) -> str:
    """Text without blanks: templates strip them, SentencePiece tokenizers take ▁ for one."""
    return "".join(text.replace("▁", " ").split())


def _folded(text: str) -> str:
    """Text without blanks, in one letter case and one Unicode form (NFKC)."""
    return _unspaced(unicodedata.normalize("NFKC", text).casefold())


def _short(text: str, limit: int = 60) -> str:
    return repr(text if len(text) <= limit else text[:limit] + "...")
