"""Which conversations are held out for validation: a share of the prompts, by a hash that nothing else moves.

In: a conversation. Out: whether it is held out. The hash is of the prompt alone, so that rows added, taken out, put in
another order or into other files move no other row, and a prompt with several answers is never on both sides. No seed
takes part: a run with another seed must not train on what this one was measured by.
"""

import hashlib
import unicodedata
from collections.abc import Iterable, Iterator

from jax_sft.data.conversation import Account, Conversation

MEASURED = "the prompt is in the validation files too, so that their loss says less of what is new"
_SALT = b"jax_sft held out by prompt 1\0"  # another one would be another split of everybody's data
_NOT_ASKED = ("system", "developer")  # the same question under two of them is one prompt


def is_held_out(conversation: Conversation, share: float) -> bool:
    """Whether its prompt is in the share of all prompts that is held out; a larger share holds out those and more."""
    return int.from_bytes(digest_of(conversation), "big") < share * 2**64


def digest_of(conversation: Conversation) -> bytes:
    """Eight bytes that stand for its prompt."""
    return hashlib.blake2b(_SALT + prompt_of(conversation).encode("utf-8", "surrogatepass"), digest_size=8).digest()


def noting(
    conversations: Iterable[Conversation], measured: frozenset[bytes], account: Account
) -> Iterator[Conversation]:
    """All of them; those whose prompts are among the `measured` are noted."""
    for conversation in conversations:
        if measured and digest_of(conversation) in measured:
            account.note(MEASURED, conversation.where or conversation.id)
        yield conversation


def prompt_of(conversation: Conversation) -> str:
    """What was asked before the first answer to it, in one Unicode form (NFKC), in one letter case, with single blanks.

    An answer that nothing was asked before (a greeting) is passed over. Where nothing is asked at all, the prompt is
    all of the conversation: else all such conversations would be one prompt. Of a plain text its prompt, or all of it
    where it has none; of tokens, those before the first that teaches.
    """
    if conversation.tokens is not None:
        trained = [i for i, weight in enumerate(conversation.tokens.weights) if weight > 0]
        return " ".join(map(str, conversation.tokens.ids[: trained[0] if trained and trained[0] else None]))
    if conversation.text is not None:
        return _normal(conversation.prompt_text or conversation.text)
    asked = []
    for message in conversation.messages:
        if message.role == "assistant":
            if asked:
                break
        elif message.role not in _NOT_ASKED:
            asked.append(message)
    return _normal("\0".join(f"{m.role}\0{m.content}" for m in asked or conversation.messages))


def _normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
