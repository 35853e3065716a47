"""Two models in two columns: they line up in any script, nothing of an answer is lost, no pair of results breaks it."""

import json

import pytest

from jax_sft.config import DataConfig
from jax_sft.data.conversation import Account
from jax_sft.evaluate.answers import Answer
from jax_sft.evaluate.losses import Losses
from jax_sft.evaluate.side_by_side import conversations_of, print_accounts, print_answers, print_losses


def losses_of(loss, **by_source):
    parts = {name: {"loss": value, "accuracy": 0.5, "tokens": 10.0} for name, value in by_source.items()}
    return Losses(loss=loss, accuracy=0.5, tokens=20.0, by_source=parts)


def width_of(text):
    """Terminal columns of the plain Chinese, Latin and box characters used here."""
    return sum(2 if "\u2e80" <= c <= "\uffee" else 1 for c in text)


@pytest.fixture
def show(capsys, monkeypatch):
    """Lines of the table under the prompt, on a terminal of 63 columns: two columns of 30."""
    monkeypatch.setenv("COLUMNS", "63")

    def show(left, right, *, names=("before", "after"), stopped=True):
        answers = {name: [Answer(text, 1, stopped)] for name, text in zip(names, (left, right), strict=True)}
        print_answers([[{"role": "user", "content": "?"}]], answers)
        return capsys.readouterr().out.removeprefix("\n").split("\n")[1:-1]

    return show


def left_column(lines):
    return [line.split(" │")[0] for line in lines[2:]]


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("一二三" * 20, "plain words " * 9),
        ("short", "一二三四五六七八九十" * 5),
        ("mixed 中文 and a" * 6, "，。！" * 11),
        ("a\tb\n中\t文", "tabs\tmove"),
        ("first\n\n中文\n\nthird", "x"),
    ],
)
def test_the_line_between_the_columns_stands_still(show, left, right):
    lines = show(left, right)
    assert {width_of(line.partition("│")[0]) for line in lines if "│" in line} == {31}
    assert max(width_of(line) for line in lines) <= 63


def test_lines_break_between_words_also_where_scripts_mix(show):
    words = "the capital 首都 of Australia is Canberra and not 悉尼 Sydney"
    lines = [line.rstrip() for line in left_column(show(words, "x"))]
    assert lines == ["the capital 首都 of Australia", "is Canberra and not 悉尼", "Sydney"]


def test_a_word_wider_than_the_column_is_cut_and_nothing_of_it_lost(show):
    lines = [line.rstrip() for line in left_column(show("see " + "0123456789" * 7 + " end", "x"))]
    assert lines == ["see", "0123456789" * 3, "0123456789" * 3, "0123456789 end"]


def test_long_names_are_cut_at_the_front_to_the_width_of_their_column(show):
    heading = show("a", "b", names=("/models/" + "模型" * 20, "/a/very/long/folder/with/a/name/end"))[0]
    left, right = heading.split(" │ ")
    assert width_of(left) == width_of(right) == 30
    assert left.rstrip().endswith("模型") and right.endswith("/name/end")


@pytest.mark.parametrize("text", ["一二三四五" * 13, "supercalifragilistic" * 5, "e\u0301" * 40, "👩\u200d🔬" * 12])
def test_every_character_of_an_answer_is_shown(show, text):
    assert "".join(cell.rstrip() for cell in left_column(show(text, ""))) == text


def test_accents_take_no_column(show):
    assert left_column(show("e\u0301" * 30, "x"))[0] == "e\u0301" * 30


def test_paragraphs_and_empty_lines_stay(show):
    assert [cell.strip() for cell in left_column(show("one\n\ntwo", "x\n" * 4 + "y"))] == ["one", "", "two", "", ""]


def test_an_answer_that_was_cut_off_says_so(show):
    assert "[…]" in show("a", "b", stopped=False)[2]
    assert "[…]" not in show("a", "b")[2]


def test_rows_that_went_the_same_way_are_told_once_and_others_by_model(capsys):
    same = {name: Account(read=3, kept=2, dropped={"odd": 1}) for name in ("base", "tuned")}
    print_accounts(same)
    assert capsys.readouterr().out == "read 3, kept 2, dropped 1\n  dropped 1: odd\n"
    same["tuned"].alter("cut", "rows.jsonl:1")
    print_accounts(same)
    assert capsys.readouterr().out.splitlines() == [
        "base: read 3, kept 2, dropped 1",
        "  dropped 1: odd",
        "tuned: read 3, kept 2, dropped 1",
        "  dropped 1: odd",
        "  altered 1: cut (first: rows.jsonl:1)",
    ]


def test_the_change_is_relative_to_the_first_model(capsys):
    print_losses({"base": losses_of(2.0, a=2.0, b=4.0), "tuned": losses_of(1.0, a=1.5, b=5.0)})
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "base: loss 2.0000, accuracy 50.0%, 20 trained tokens"
    assert out[2:] == [
        "loss change: -50.0%",
        "  a  2.0000 -> 1.5000  -25.0%  (10 tokens)",
        "  b  4.0000 -> 5.0000  +25.0%  (10 tokens)",
    ]


def test_one_model_alone_has_no_change(capsys):
    print_losses({"base": losses_of(2.0, a=2.0)})
    assert capsys.readouterr().out.splitlines()[1:] == ["  a  2.0000  (10 tokens)"]


def test_a_source_that_one_model_has_no_tokens_of_is_still_a_line(capsys):
    print_losses({"base": losses_of(2.0, a=2.0), "tuned": losses_of(1.0, a=1.0, b=1.0)})
    assert capsys.readouterr().out.splitlines()[-1] == "  b  none -> 1.0000  (10 tokens)"


def test_a_loss_of_zero_has_no_relative_change(capsys):
    print_losses({"base": losses_of(0.0, a=0.0), "tuned": losses_of(1.0, a=1.0)})
    assert "loss change: from 0" in capsys.readouterr().out


def test_losses_of_sources_in_chinese_line_up(capsys):
    print_losses({"base": losses_of(2.0, 中文=2.0, english=3.0)})
    lines = capsys.readouterr().out.splitlines()[1:]
    assert len({width_of(line.partition(".")[0]) for line in lines}) == 1


def test_a_model_is_asked_up_to_the_last_user_turn_and_for_no_more_than_count(tmp_path):
    talks = [
        [("user", "one"), ("assistant", "1"), ("user", "two"), ("assistant", "2")],
        [("system", "alone"), ("assistant", "no user")],
        [("system", "s"), ("user", "three"), ("assistant", "3")],
        [("user", "four"), ("assistant", "4")],
    ]
    path = tmp_path / "d.jsonl"
    rows = [{"messages": [{"role": role, "content": content} for role, content in talk]} for talk in talks]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    asked = conversations_of([str(path)], count=2, config=DataConfig())
    assert [[m["content"] for m in turns] for turns in asked] == [["one", "1", "two"], ["s", "three"]]
    assert conversations_of([str(path)], count=0, config=DataConfig()) == []
