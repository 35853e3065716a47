"""The templates that a base model can be given by name: what they write, what they teach, what they need."""

import re

import pytest

from jax_sft.config import TEMPLATES, DataConfig
from jax_sft.data.chat import ChatTemplate, to_sequences
from jax_sft.data.conversation import Account, DataError
from jax_sft.data.template import named_template
from tests.data.chats import conversation, marked, tokenizer_for

TALK = ("system: Be brief.", "Hi", " Hello 😀", "再见\n", "拜拜！")
WRITTEN = {
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        "⟦ Hello 😀<|im_end|>⟧\n<|im_start|>user\n再见\n<|im_end|>\n<|im_start|>assistant\n⟦拜拜！<|im_end|>⟧\n"
    ),
    "plain": "Be brief.\n\nUser: Hi\n\nAssistant:⟦  Hello 😀</s>⟧\n\nUser: 再见\n\n\nAssistant:⟦ 拜拜！</s>⟧\n\n",
    "alpaca": (
        "Be brief.\n\n### Instruction:\nHi\n\n### Response:\n⟦ Hello 😀</s>⟧\n\n"
        "### Instruction:\n再见\n\n\n### Response:\n⟦拜拜！</s>⟧\n\n"
    ),
}


def template_of(name: str) -> ChatTemplate:
    tokenizer = tokenizer_for("<|im_start|><|im_end|>" if name == "chatml" else "")
    return ChatTemplate(tokenizer, template=named_template(name, tokenizer))


@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_and_their_end_are_trained_and_nothing_else(name):
    template, account = template_of(name), Account()
    (sequence,) = to_sequences(conversation(*TALK), template, DataConfig(), account)
    assert marked(sequence, template) == WRITTEN[name]
    assert (account.kept, account.altered) == (1, {})


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("method", ["tags", "prefix", "sentinel"])
def test_every_way_to_find_the_answers_finds_the_same(name, method):
    template = template_of(name)
    (sequence,) = to_sequences(conversation(*TALK), template, DataConfig(mask=method), Account())
    found, wanted = (re.findall("⟦(.*?)\n*⟧", text, re.DOTALL) for text in (marked(sequence, template), WRITTEN[name]))
    assert found == wanted  # but for the empty lines behind an end, which only the tags leave out


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_is_the_beginning_of_what_was_trained(name):
    template = template_of(name)
    messages = [{"role": "user", "content": "Hi"}]
    whole = template.render([*messages, {"role": "assistant", "content": "Hello"}])
    assert whole.startswith(template.render(messages, add_generation_prompt=True))
    ends_in = template.tokenizer.convert_ids_to_tokens(template.stop_ids[0])
    assert ends_in == ("<|im_end|>" if name == "chatml" else "</s>")


def test_a_tokenizer_without_the_tokens_is_refused_by_name():
    tokenizer = tokenizer_for("")
    with pytest.raises(DataError, match=r"'chatml' needs <\|im_end\|> and <\|im_start\|>, which .*; choose another of"):
        named_template("chatml", tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="'plain' needs an eos_token"):
        named_template("plain", tokenizer)
