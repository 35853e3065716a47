"""A model is asked what it has room to answer, and what is left out is told."""

import pytest

from jax_sft.data.chat import ChatTemplate
from jax_sft.evaluate.answers import askable
from tests.tiny import CHATML, tiny_tokenizer

TEMPLATE = ChatTemplate(tiny_tokenizer())
SHORT, LONG = ([{"role": "user", "content": "x" * n}] for n in (4, 40))
LENGTH = len(TEMPLATE.encode_prompt(LONG))


@pytest.mark.parametrize("room", [LENGTH + 7, LENGTH + 8])
def test_a_conversation_must_leave_room_for_its_whole_answer(room):
    kept, reasons = askable([SHORT, LONG, SHORT], template=TEMPLATE, max_positions=room, max_new_tokens=8)
    fits = room == LENGTH + 8
    assert kept == ([SHORT, LONG, SHORT] if fits else [SHORT, SHORT])
    too_long = f"{'x' * 40!r}: too long, its {LENGTH} tokens and 8 new ones exceed {room} positions"
    assert reasons == ([] if fits else [too_long])


def test_a_conversation_that_the_template_refuses_is_left_out_with_the_template_s_words():
    picky = "{% if messages[0].content == 'xxxx' %}{{ raise_exception('no x') }}{% endif %}" + CHATML
    template = ChatTemplate(tiny_tokenizer(), template=picky)
    kept, reasons = askable([SHORT, LONG], template=template, max_positions=512, max_new_tokens=8)
    assert kept == [LONG]
    assert reasons == ["'xxxx': the chat template refuses the messages: no x; change their order or roles"]
