"""What is held out follows from the prompt alone: other rows, orders, files and seeds move nothing."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_sft.config import DataConfig, SetConfig
from jax_sft.data.conversation import Account, Conversation, DataError, Message, Tokens
from jax_sft.data.formats import read_conversations
from jax_sft.data.holdout import MEASURED, digest_of, is_held_out, noting, prompt_of
from jax_sft.data.source import training_parts, validation_parts


def asked(prompt: str, answer: str = "a", *, system: str | None = None, more: tuple = ()) -> Conversation:
    before = [Message("system", system)] if system else []
    return Conversation((*before, Message("user", prompt), Message("assistant", answer), *more), "s", "id")


def row(prompt: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


def split(config: DataConfig) -> tuple[list[str], list[str], Account, Account]:
    """Prompts that are trained on and prompts that are held out, and the accounts of both."""
    accounts = Account(), Account()
    sides = [
        [c.messages[0].content for c in read_conversations(config, parts, account)]
        for parts, account in zip((training_parts(config), validation_parts(config)), accounts, strict=True)
    ]
    return sides[0], sides[1], *accounts


def write(path, rows) -> str:
    path.write_text("\n".join(json.dumps(r) for r in rows), encoding="utf-8")
    return str(path)


@settings(deadline=None, max_examples=30)
@given(
    prompts=st.lists(st.text(min_size=1, max_size=12).filter(str.strip), min_size=3, max_size=40),
    order=st.randoms(use_true_random=False),
    share=st.sampled_from([0.1, 0.3, 0.5]),
)
def test_rows_added_taken_out_shuffled_or_put_into_other_files_move_no_other(tmp_path_factory, prompts, order, share):
    folder = tmp_path_factory.mktemp("split")
    rows = [row(p, f"answer {i}") for i, p in enumerate(prompts)]
    first = split(DataConfig(train=(write(folder / "a.jsonl", rows),), holdout=share))
    changed = [r for i, r in enumerate(rows) if i % 4] + [row(f"new {i}", "x") for i in range(9)]
    order.shuffle(changed)
    paths = write(folder / "b.jsonl", changed[::2]), write(folder / "c.jsonl", changed[1::2])
    second = split(DataConfig(train=paths, holdout=share))
    for trained, held_out, *_ in (first, second):
        assert not {" ".join(p.lower().split()) for p in trained} & {" ".join(p.lower().split()) for p in held_out}
    assert not set(first[0]) & set(second[1])
    assert not set(first[1]) & set(second[0])


def test_counts_add_up_and_a_broken_row_is_counted_once(tmp_path):
    rows = [row(f"question {i % 60}", f"answer {i}") for i in range(100)]
    rows += [{"messages": []}, {"messages": [{"role": "user", "content": "no answer"}]}]
    config = DataConfig(train=(write(tmp_path / "a.jsonl", rows),), holdout=0.3)
    trained, held_out, of_training, of_validation = split(config)
    assert len(trained) + len(held_out) == 100
    assert (of_training.read, of_training.held_out) == (102, len(held_out))
    assert sum(of_training.dropped.values()) == 2
    assert (of_validation.read, of_validation.dropped) == (len(held_out), {})
    assert 0 < of_training.held_out < 60
    assert f"held out {len(held_out)} ({len(held_out) / 102:.1%})" in of_training.lines()[0]


def test_about_the_share_is_held_out_and_a_larger_one_holds_out_more_of_the_same():
    conversations = [asked(f"question number {i}") for i in range(20_000)]
    small, large = ({c.messages[0].content for c in conversations if is_held_out(c, s)} for s in (0.02, 0.1))
    assert 330 < len(small) < 470
    assert 1850 < len(large) < 2150
    assert small < large
    assert not any(is_held_out(c, 0.0) for c in conversations)


def test_the_split_is_that_of_every_version():
    """Recorded: another hash would put what earlier runs trained on into the validation of later ones."""
    held_out = [i for i in range(200) if is_held_out(asked(f"question number {i}"), 0.05)]
    assert held_out == RECORDED


RECORDED = [47, 69, 75, 114, 123, 131, 148, 149, 167, 172, 193]


def test_a_prompt_is_what_was_asked_before_the_first_answer():
    same = [
        asked("How  are\nyou?"),
        asked("How are you? ", "another answer"),
        asked("Ｈow are you?", system="Be brief."),
        asked("HOW ARE YOU?"),
        asked("How are you?", more=(Message("user", "And now?"), Message("assistant", "b"))),
    ]
    assert len({prompt_of(c) for c in same}) == 1
    assert prompt_of(asked("Straße?")) == prompt_of(asked("STRASSE?"))
    assert prompt_of(asked("How are you!")) != prompt_of(same[0])
    assert prompt_of(Conversation((), "s", "id", text="t", prompt_text="p")) == "p"
    assert prompt_of(Conversation((), "s", "id", text="t")) == "t"
    assert prompt_of(Conversation((), "s", "id", tokens=Tokens((5, 6, 7), (0, 0, 1)))) == "5 6"
    assert prompt_of(Conversation((), "s", "id", tokens=Tokens((5, 6), (1, 1)))) == "5 6"


def test_conversations_that_begin_with_an_answer_or_ask_nothing_are_not_one_prompt():
    def said(*turns: tuple[str, str]) -> str:
        return prompt_of(Conversation(tuple(Message(role, text) for role, text in turns), "s", "id"))

    greeted = said(("system", "x"), ("assistant", "Hello!"), ("user", "Who?"), ("assistant", "I."), ("user", "And?"))
    assert greeted == said(("user", "Who?"), ("assistant", "Me."))
    assert said(("system", "Write a poem."), ("assistant", "a")) != said(
        ("system", "Write a song."), ("assistant", "a")
    )
    assert said(("assistant", "a")) != said(("assistant", "b"))


def test_a_prompt_that_is_measured_too_is_noted_and_stays():
    account = Account()
    measured = frozenset(map(digest_of, (asked("two", "another answer"), asked("four"), asked("five"))))
    conversations = [asked(prompt, "an answer") for prompt in ("one", "two ", "three", "four")]
    assert list(noting(conversations, measured, account)) == conversations
    assert account.noted == {MEASURED: 2}


def test_validation_files_whose_source_is_the_name_of_a_set_are_told(tmp_path):
    place = {name: write(tmp_path / f"{name}.jsonl", [row(name, "a")]) for name in ("a", "law", "other")}
    config = DataConfig(train=(place["a"],), validation=(place["law"],), validation_sets={"law": (place["other"],)})
    with pytest.raises(
        DataError, match=r"law\.jsonl:1: its source 'law' is the name of a set too, .*call the set other"
    ):
        split(config)


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_validation_is_files_sets_by_name_and_what_is_held_out(tmp_path, share):
    place = {name: write(tmp_path / f"{name}.jsonl", [row(name, "a")]) for name in ("a", "b", "own", "law")}
    config = DataConfig(
        sets={"a": SetConfig(paths=(place["a"],)), "b": SetConfig(paths=(place["b"],))},
        validation=(place["own"],),
        validation_sets={"law": (place["law"],)},
        holdout=share,
    )
    names = [(part.name, part.takes_held_out) for part in validation_parts(config)]
    assert names == [(None, False), ("law", False), *([("a", True), ("b", True)] if share else [])]
