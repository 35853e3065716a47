"""A loaded model in one hand: a prompt is a conversation, a batch is its conversations, losses are those of a file."""

import dataclasses

import jax
import numpy as np
import pytest

from jax_sft.assistant import load_assistant
from jax_sft.config import DataConfig
from jax_sft.data.chat import ChatTemplate
from tests.tiny import write_conversations, write_model

TALKS = [
    [{"role": "user", "content": "hi"}],
    [{"role": "user", "content": "one"}, {"role": "assistant", "content": "1"}, {"role": "user", "content": "two, 二"}],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("assistant")


@pytest.fixture(scope="module")
def model(folder):
    """Weights far from uniform, so that greedy answers differ from prompt to prompt."""
    loaded = load_assistant(str(write_model(folder / "model", layers=1)))
    scaled = jax.tree.map_with_path(lambda path, x: x * np.float32(1 if "norm" in path[-1].key else 8), loaded.params)
    return dataclasses.replace(loaded, params=scaled)


@pytest.fixture(scope="module")
def answers(model):
    return model.answer_all(TALKS, max_new_tokens=6)


def test_a_text_is_a_conversation_of_one_user_turn(model, answers):
    text = model.answer("hi", max_new_tokens=6)
    assert text == model.answer(TALKS[0], max_new_tokens=6)
    assert text == answers[0]


def test_a_batch_answers_each_conversation_by_its_own_history(model, answers):
    assert answers[1] == model.answer(TALKS[1], max_new_tokens=6)
    assert answers[1].text != model.answer(TALKS[1][-1:], max_new_tokens=6).text


def test_tokens_come_one_by_one_and_are_those_of_the_answer(model, answers):
    seen = []
    answer = model.answer("hi", max_new_tokens=6, on_token=lambda row, token: seen.append((row, token)))
    assert {row for row, _ in seen} == {0}
    assert model.template.tokenizer.decode([t for _, t in seen], skip_special_tokens=True).strip() == answer.text
    assert answer == answers[0]


def test_an_answer_says_whether_it_ended_by_itself(model):
    token = []
    cut = model.answer("hi", max_new_tokens=1, on_token=lambda _, t: token.append(t))
    assert (cut.tokens, cut.stopped) == (1, False)
    template = ChatTemplate(model.base.tokenizer, template=model.base.chat_template, stop_ids=(token[0],))
    ended = dataclasses.replace(model, template=template).answer("hi", max_new_tokens=3)
    assert (ended.text, ended.tokens, ended.stopped) == ("", 0, True)


def test_the_losses_of_a_file_do_not_move_with_the_batch_size_and_carry_its_account(model, folder):
    path = write_conversations(folder / "d.jsonl", 9)
    losses, account = model.losses([str(path)], batch_size=1)  # eight devices take eight rows at the least
    larger, _ = model.losses([str(path)], batch_size=9, config=DataConfig(packing=False))
    assert account.read == account.kept == 9
    assert losses.by_source.keys() == {"even", "odd"}
    assert losses.tokens == larger.tokens > 0
    assert losses.loss == pytest.approx(larger.loss, rel=1e-5)


def test_a_conversation_longer_than_the_context_is_refused_or_left_out_by_length(model, folder):
    path = write_conversations(folder / "f.jsonl", 3)
    small = dataclasses.replace(
        model, base=dataclasses.replace(model.base, config=dataclasses.replace(model.base.config, max_positions=64))
    )
    with pytest.raises(
        ValueError, match=r"has \d+ tokens, but the model has 64 positions .* set data\.max_length to 64"
    ):
        small.losses([str(path)])
    _, account = small.losses([str(path)], config=DataConfig(max_length=64))
    assert (account.kept, sum(account.dropped.values())) == (2, 1)


def test_a_batch_of_no_rows_is_refused(model):
    with pytest.raises(ValueError, match="batch_size = 0 must be at least 1"):
        model.losses(["never read"], batch_size=0)


def test_room_is_what_the_prompt_leaves_of_the_context(model):
    short, long = (model.room([{"role": "user", "content": "x" * n}]) for n in (1, 101))
    assert short - long == 100
    assert model.room([{"role": "user", "content": "x" * 600}]) < 0


def test_weights_that_are_not_finite_are_named_and_not_averaged(model, folder):
    path = write_conversations(folder / "e.jsonl", 2)
    broken = dataclasses.replace(model, params=jax.tree.map(lambda x: x * np.float32(np.nan), model.params))
    with pytest.raises(ValueError, match=r"its loss on .*e\.jsonl is not finite"):
        broken.losses([str(path)])
