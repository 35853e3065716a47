import dataclasses
import io
import re

import pytest

from jax_sft.data.conversation import Account
from jax_sft.report.summary import summarize
from jax_sft.report.terminal import show_sequences, terminal_report, wants_colour
from tests.report.sets import byte_level, drawn_set, example, make_loader, make_set, sequence_of

ANSI = re.compile(r"\x1b\[[\d;]*m")


def test_brackets_mark_what_is_trained():
    dataset, tokenizer = example()
    shown = show_sequences(dataset, tokenizer, 2, colour=False)
    assert "\x1b" not in shown
    assert shown.split("\n")[1:] == [
        "── 1. x.jsonl:1, s1.0: 29 tokens, 14 trained ───────────────────────────────────",
        "⟦<|im_start|>⟧Say <|im_end|>↵",
        "«汉字🙂↵",
        "ab⟦<|im_end|>⟧↵»",
        "",
        "── 2. x.jsonl:1, s0.5: 16 tokens, 4 trained ────────────────────────────────────",
        "⟦<|im_start|>⟧<b>&␛[31m<U+202E>«ok⟦<|im_end|>⟧↵»×0.5",
        "",
    ]


def test_only_as_many_sequences_as_asked_for_are_shown():
    dataset, tokenizer = example()
    assert show_sequences(dataset, tokenizer, 1, colour=False).endswith("\n... and 1 more sequences")
    assert "2." not in show_sequences(dataset, tokenizer, 1, colour=False).replace("×", "")
    assert "more sequences" not in show_sequences(dataset, tokenizer, 2, colour=False)


def test_colours_mark_what_is_trained():
    dataset, tokenizer = example()
    shown = show_sequences(dataset, tokenizer, 2, colour=True)
    plain = show_sequences(dataset, tokenizer, 2, colour=False)
    assert ANSI.sub("", shown).split("\n")[1:] == re.sub("[«»⟦⟧]|×0.5", "", plain).split("\n")[1:]
    body = shown.split("\n", 1)[1]
    painted = re.findall(r"\x1b\[([\d;]+)m(.*?)\x1b\[0m", body)
    green = "".join(text for code, text in painted if ";48;5;114" in code or ";48;5;77" in code)
    yellow = "".join(text for code, text in painted if ";48;5;221" in code or ";48;5;214" in code)
    assert green == "汉字🙂↵ab<|im_end|>↵"
    assert yellow == "ok<|im_end|>↵"
    codes = [code for code, text in painted if text == "<|im_end|>"]
    assert len(set(codes)) == 2, "the control token, trained, in green and in yellow"
    assert [code for code, text in painted if text == "<|im_start|>"] == ["38;5;170"] * 2


def test_no_colour_runs_over_the_end_of_a_line():
    dataset, tokenizer = example()
    for line in show_sequences(dataset, tokenizer, 2, colour=True).split("\n"):
        assert line.count("\x1b[0m") * 2 == line.count("\x1b[")
        assert not ANSI.findall(line) or line.rstrip("─ ").endswith("\x1b[0m") or line.startswith("──")


def test_the_legend_says_what_the_marks_mean():
    dataset, tokenizer = example()
    for colour in (True, False):
        legend = ANSI.sub("", show_sequences(dataset, tokenizer, 1, colour=colour)).split("\n")[0]
        for word in ("read only", "trained", "another weight than 1", "control token", "newline"):
            assert word in legend


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_colours_are_for_terminals_that_want_them(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    assert wants_colour(Terminal())
    assert not wants_colour(io.StringIO())
    monkeypatch.setenv("TERM", "dumb")
    assert not wants_colour(Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "")  # empty means unset
    assert wants_colour(Terminal())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not wants_colour(Terminal())
    dataset, tokenizer = example()
    monkeypatch.setattr("sys.stdout", Terminal())
    assert "\x1b" not in show_sequences(dataset, tokenizer, 1)
    monkeypatch.delenv("NO_COLOR")
    assert "\x1b" in show_sequences(dataset, tokenizer, 1)


def test_the_report_counts_what_went_in_and_out_and_how_it_is_packed():
    account = Account(read=9, kept=4)
    for line in (3, 5, 8):
        account.drop("no message to train on", f"chat.jsonl:{line}")
    account.drop("of two\x1b[0m lines", "chat.jsonl:9")
    account.alter("truncated", "chat.jsonl:2")
    account.note("the same id", "chat.jsonl:7")
    account.use("prefix")
    dataset = make_set([sequence_of([7] * 31, [0.0] * 21 + [1.0] * 10)] * 4, account)
    loader = make_loader(dataset, batch_size=3)
    report = report_of(dataset, loader, title="validation")
    lines = report.split("\n")
    assert lines[0].startswith("── validation ──")
    for line in [
        "read 9, kept 4, dropped 4; trained spans found by prefix (1)",
        "  dropped 3: no message to train on (first: chat.jsonl:3, chat.jsonl:5, chat.jsonl:8)",
        "  dropped 1: of two␛[0m lines (first: chat.jsonl:9)",
        "  altered 1: truncated (first: chat.jsonl:2)",
        "  noted 1: the same id (first: chat.jsonl:7)",
        "tokens     120",
        "trained    40 (33.3% of the tokens)",
        "epoch      2 rows = 1 step of 3 rows",
        "row        64 positions, up to 64 of them predicted (P)",
        "filled     93.8% of all positions",
        "scripts    code 100.0% (all 4 sequences looked at)",
        "turns      1 100.0% (1 to 1, mean 1.0)",
        "packing    2 100.0% (2 to 2, mean 2.0)",
        "length of a trained stretch: 10 to 10, mean 10, median 10, nine of ten up to 10",
        "chat            4     120       40    33%       100.0%",
    ]:
        assert line in lines, line
    assert max(map(len, lines[6:])) <= 80


def report_of(dataset, loader, *, title):
    return terminal_report(summarize(dataset, loader, byte_level()), title=title)


def test_an_account_without_anything_to_look_at_is_one_line():
    account = Account(read=4, kept=4)
    for method in ("prefix", "turns", "prefix", "prefix"):
        account.use(method)
    assert account.lines() == ["read 4, kept 4, dropped 0; trained spans found by prefix (3), turns (1)"]


def test_a_bar_is_as_long_as_its_count():
    dataset = drawn_set([(10, 5)] * 8 + [(20, 5)] * 4 + [(30, 5)])
    report = report_of(dataset, make_loader(dataset), title="x")
    bars = [line.count("█") for line in report.split("\n") if re.match(r" +\d+-\d+  █", line)]
    assert bars[0] == pytest.approx(2 * bars[1], abs=1)
    assert bars[0] == pytest.approx(8 * bars[2], abs=8)


def test_chinese_names_stay_in_their_column():
    sequences = [sequence_of([7] * 11, [0.0] * 10 + [1.0], source=s) for s in ("中文", "chat")]
    dataset = make_set(sequences)
    table = report_of(dataset, make_loader(dataset), title="x").split("\n")[-3:-1]
    ends = {line[:2]: line.index(" 1 ") for line in table}
    assert ends["中文"] + 2 == ends["ch"]  # two characters, four columns


def test_a_mixture_has_two_columns_more():
    sequences = [sequence_of([7] * 5, [0.0] + [1.0] * 4, source=s) for s in "aaaabb"]
    dataset = make_set(sequences)
    summary = summarize(dataset, make_loader(dataset), byte_level())
    last = terminal_report(summary, title="x").split("\n")[-4]
    assert last.split("  ")[-1] == "of the loss"
    lines = [dataclasses.replace(line, drawn=12, drawn_share=0.25) for line in summary.sources]
    mixed = dataclasses.replace(summary, sources=tuple(lines), is_mixed=True)
    head, first, *_ = terminal_report(mixed, title="x").split("\n")[-4:]
    assert head.endswith("of the loss  epoch  of its loss")
    assert re.search(r"66\.7% +12 +25\.0%$", first)
