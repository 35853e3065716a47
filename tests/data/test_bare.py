"""A bare answer is the very same tokens, behind nothing but what the template writes before every answer."""

import numpy as np
import pytest

from jax_sft.config import DataConfig
from jax_sft.data.bare import Bare
from jax_sft.data.chat import to_sequences
from jax_sft.data.conversation import Account, Conversation, Message, Sequence, Tokens
from jax_sft.data.template import ChatTemplate, named_template
from tests.tiny import CHATML, tiny_tokenizer

WITH_BOS = "{{ '<|pad|>' }}" + CHATML  # any control token may be the BOS


def template_of(text=CHATML, *, bos=None):
    tokenizer = tiny_tokenizer()
    if bos:
        tokenizer.bos_token = bos
    return ChatTemplate(tokenizer, template=text)


def sequence_of(template, *turns, config=None, **fields):
    messages = tuple(Message(role, content) for role, content in turns)
    conversation = Conversation(messages, "s", "c", **fields)
    (sequence,) = to_sequences(conversation, template, config or DataConfig(), Account())
    return sequence


def texts(template, sequence):
    """Each twin as text, with | where its trained part begins."""
    shown = []
    for twin in Bare.of(template).twins(sequence):
        tokens = [int(twin.tokens_T[0]), *twin.targets_T.tolist()]
        trained = 1 + int(np.flatnonzero(twin.weights_T)[0])
        assert (twin.weights_T[trained - 1 :] == 1).all()
        assert (twin.tokens_T[1:] == twin.targets_T[:-1]).all()
        shown.append(template.decode(tokens[:trained]) + "|" + template.decode(tokens[trained:]))
    return shown


HEADER, END = "<|im_start|>assistant\n", "<|im_end|>\n"


def test_the_twin_of_an_answer_is_its_tokens_behind_the_header():
    template = template_of()
    sequence = sequence_of(template, ("system", "Be short."), ("user", "Legs of a spider?"), ("assistant", "Eight."))
    assert texts(template, sequence) == [HEADER + "|Eight." + END]
    (twin,) = Bare.of(template).twins(sequence)
    trained = sequence.targets_T[sequence.weights_T > 0]
    np.testing.assert_array_equal(twin.targets_T[twin.weights_T > 0], trained)


def test_each_answer_of_a_conversation_has_a_twin_of_its_own():
    template = template_of()
    turns = [("user", "a"), ("assistant", "one"), ("user", "b"), ("assistant", "two")]
    assert texts(template, sequence_of(template, *turns)) == [HEADER + "|one" + END, HEADER + "|two" + END]


def test_the_bos_stays_before_the_header():
    template = template_of(WITH_BOS, bos="<|pad|>")
    sequence = sequence_of(template, ("user", "a"), ("assistant", "one"))
    assert texts(template, sequence) == ["<|pad|>" + HEADER + "|one" + END]


def test_a_header_that_begins_with_the_bos_has_no_second_one():
    template = template_of(bos="<|im_start|>")  # as SmolLM2-Instruct says
    sequence = sequence_of(template, ("user", "a"), ("assistant", "one"))
    assert texts(template, sequence) == [HEADER + "|one" + END]


@pytest.mark.parametrize(("text", "bos"), [(CHATML, None), (WITH_BOS, "<|pad|>")])
def test_an_answer_to_nothing_has_no_twin(text, bos):
    template = template_of(text, bos=bos)
    assert texts(template, sequence_of(template, ("assistant", "one"))) == []


def test_a_first_answer_to_nothing_has_a_twin_where_a_later_one_has_a_prompt():
    template = template_of()
    turns = [("assistant", "Hello!"), ("user", "b"), ("assistant", "two")]
    assert texts(template, sequence_of(template, *turns)) == [HEADER + "|Hello!" + END, HEADER + "|two" + END]


def test_a_header_without_a_control_token_is_found_by_its_text():
    tokenizer = tiny_tokenizer()
    template = ChatTemplate(tokenizer, template=named_template("alpaca", tokenizer))
    (shown,) = texts(template, sequence_of(template, ("user", "Legs?"), ("assistant", "Eight.")))
    assert shown == "### Response:\n|Eight.<|im_end|>"


def test_what_arguments_of_the_template_add_behind_the_header_stays():
    marked = template_of(
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{% if m['role'] == 'assistant' and loop.last and quiet is defined %}{{ '<t></t>' }}{% endif %}"
        "{{ m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if quiet is defined %}{{ '<t></t>' }}"
        "{% endif %}{% endif %}"
    )
    sequence = sequence_of(marked, ("user", "a"), ("assistant", "one"), template_args={"quiet": True})
    assert texts(marked, sequence) == [HEADER + "<t></t>|one" + END]


def test_another_role_s_turn_stands_behind_no_answer_s_header():
    template = template_of()
    turns = [("assistant", "Hi"), ("user", "ab")]
    sequence = sequence_of(template, *turns, config=DataConfig(train_on="user"))
    (shown,) = texts(template, sequence)
    assert shown.startswith("<|im_end|>|ab")  # no BOS: the end of a text stands between texts


@pytest.mark.parametrize(("bos", "start"), [("<|pad|>", "<|pad|>"), (None, "<|im_end|>")])
def test_a_plain_text_behind_its_prompt_stands_behind_the_bos_or_the_end_of_another(bos, start):
    template = template_of(bos=bos)
    sequence = sequence_of(template, text="blue", prompt_text="The sky is ")
    assert texts(template, sequence) == [start + "|blue<|im_end|>"]


def test_a_plain_text_without_a_prompt_has_no_twin():
    template = template_of()
    assert texts(template, sequence_of(template, text="The sky is blue")) == []


def test_where_everything_is_trained_there_is_no_prompt():
    template = template_of()
    config = DataConfig(train_on="all")
    assert texts(template, sequence_of(template, ("user", "a"), ("assistant", "one"), config=config)) == []


def test_a_plain_text_needs_no_chat_template():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    template = ChatTemplate(tokenizer)
    assert texts(template, sequence_of(template, text="blue", prompt_text="sky ")) == ["<|im_end|>|blue<|im_end|>"]


def test_tokens_from_a_file_have_twins_too():
    template = template_of()
    sequence = sequence_of(template, tokens=Tokens((1, 2, 3, 4, 5), (0, 0, 1, 0, 2)))
    twins = Bare.of(template).twins(sequence)
    end = template.tokenizer.eos_token_id
    assert [(t.tokens_T.tolist(), t.targets_T.tolist(), t.weights_T.tolist()) for t in twins] == [
        ([end], [3], [1]),
        ([end], [5], [1]),
    ]


def test_a_stretch_at_the_very_start_keeps_the_one_token_before_it():
    template = template_of()
    sequence = sequence_of(template, tokens=Tokens((1, 2, 3, 4), (0, 1, 0, 1)))
    end = template.tokenizer.eos_token_id
    assert [twin.tokens_T.tolist() for twin in Bare.of(template).twins(sequence)] == [[1], [end]]


def test_the_weight_of_a_message_does_not_show_in_its_twin():
    template = template_of()
    tokens, targets, weights = np.array([1, 2, 3]), np.array([2, 3, 4]), np.array([0, 0.25, 0.25])
    (twin,) = Bare.of(template).twins(Sequence(tokens, targets, weights, "s", "c"))
    assert twin.weights_T.tolist() == [1, 1]
