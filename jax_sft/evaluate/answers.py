"""Answers of a model to conversations, from the true assistant boundary of its own chat template.

In: weights, a ChatTemplate, conversations that end in a user's turn. Out: an Answer each.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax_sft.data.chat import ChatTemplate
from jax_sft.data.conversation import Conversation
from jax_sft.generate import Sampling, generate

Messages = Sequence[Mapping[str, Any]]  # {"role": ..., "content": ...}


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the model said, and whether it ended by itself."""

    text: str
    tokens: int
    stopped: bool


def answer(
    graphdef: Any,
    params: Any,
    *,
    template: ChatTemplate,
    conversations: Sequence[Messages | str],
    max_new_tokens: int,
    sampling: Sampling,
    on_token: Callable[[int, int], None] | None = None,
) -> list[Answer]:
    """Answer every conversation, and go on from every text.

    `on_token(row, token)` is called as tokens come. Of many, `generate.ROWS_AT_ONCE` are answered at one time.

    Raises:
        ValueError: a message without role or content, or a conversation too long for the model.
    """
    prompts = [encoded_prompt(template, asked) for asked in conversations]
    generated = generate(
        graphdef,
        params,
        prompts,
        max_new_tokens=max_new_tokens,
        stop_ids=template.stop_ids,
        pad_id=0,  # never read
        sampling=sampling,
        on_token=on_token,
    )
    return [
        Answer(
            text=template.tokenizer.decode(said.tokens, skip_special_tokens=True).strip(),
            tokens=len(said.tokens),
            stopped=said.stopped,
        )
        for said in generated
    ]


def encoded_prompt(template: ChatTemplate, asked: Messages | str) -> list[int]:
    """Token ids of a conversation and the generation prompt, or of a text as it is.

    Raises:
        ValueError: a message without role or content; the template refuses it, or there is none.
    """
    if isinstance(asked, str):
        return template.encode_beginning(asked)
    check_messages(asked)
    return template.encode_prompt(asked)


def has_room(template: ChatTemplate, asked: Messages | str, *, max_positions: int, max_new_tokens: int) -> bool:
    """Whether an answer fits behind it into the model's context; not if the template refuses it."""
    try:
        return len(encoded_prompt(template, asked)) + max_new_tokens <= max_positions
    except ValueError:
        return False


def askable(
    conversations: Sequence[Messages], *, template: ChatTemplate, max_positions: int, max_new_tokens: int
) -> tuple[list[Messages], list[str]]:
    """The conversations that leave a model room for an answer, and why each of the others is left out."""
    fitting, reasons = [], []
    for messages in conversations:
        name = repr(messages[-1]["content"][:60])
        try:
            length = len(template.encode_prompt(messages))
        except ValueError as error:
            reasons.append(f"{name}: {error}")
            continue
        if length + max_new_tokens > max_positions:
            reasons.append(
                f"{name}: too long, its {length} tokens and {max_new_tokens} new ones exceed {max_positions} positions"
            )
            continue
        fitting.append(messages)
    return fitting, reasons


def up_to_last_question(conversation: Conversation) -> list[dict[str, Any]]:
    """Its messages up to the last user's turn: what a model is asked to answer; none if no user speaks."""
    turns = [{"role": m.role, "content": m.content} for m in conversation.messages]
    while turns and turns[-1]["role"] != "user":
        turns.pop()
    return turns


def check_messages(messages: Messages) -> None:
    """Refuse what is no conversation.

    Raises:
        ValueError: a message is no mapping with the texts role and content.
    """
    for i, message in enumerate(messages):
        if not (isinstance(message, Mapping) and all(isinstance(message.get(k), str) for k in ("role", "content"))):
            raise ValueError(f'message {i} is {message!r}; a message is {{"role": "user", "content": "..."}}')
