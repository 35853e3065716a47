import html.parser
import io
import re
import types

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from jax_sft.data.conversation import Account, Sequence
from jax_sft.data.dataset import TokenizedSet
from jax_sft.data.loader import Loader
from jax_sft.data.pieces import pieces_of, visible
from jax_sft.data.show import html_page, show_sequences, terminal_report, wants_colour
from jax_sft.data.summary import length_histogram, source_lines, trained_share_histogram

ANSI = re.compile(r"\x1b\[[\d;]*m")


def byte_level():
    """Every byte is a token, so 汉 is three and 🙂 four; "ab" is one merge."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "ab"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("    ", normalized=False)])
    return types.SimpleNamespace(backend_tokenizer=tokenizer)


def sentence_piece():
    """Llama 2's kind: ▁ for a blank, bytes for what is not in the vocabulary, the first blank stripped."""
    tokens = ["<s>", "</s>", "▁Hi", "▁you", ".", "▁", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return types.SimpleNamespace(backend_tokenizer=tokenizer)


def ids_of(tokenizer, text):
    """Ids of a text; ⟨im_end⟩ stands for the control token, <|im_end|> for the letters."""
    ids = []
    for part in re.split("(⟨im_start⟩|⟨im_end⟩)", text):
        if part.startswith("⟨"):
            ids.append(tokenizer.backend_tokenizer.token_to_id(f"<|{part[1:-1]}|>"))
        else:
            alone = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
            alone.encode_special_tokens = True
            ids += alone.encode(part).ids
    return ids


def sequence_of(ids, weights, *, source="chat", where="x.jsonl:1"):
    """`weights[i]` is the weight of predicting `ids[i]`."""
    return Sequence(
        np.asarray(ids[:-1], np.int32),
        np.asarray(ids[1:], np.int32),
        np.asarray(weights[1:], np.float32),
        source,
        where,
    )


def make_set(sequences, account=None):
    sources = tuple(dict.fromkeys(s.source for s in sequences))
    lengths_N = np.asarray([len(s.tokens_T) for s in sequences], np.int32)
    return TokenizedSet(
        tokens_M=np.concatenate([s.tokens_T for s in sequences]),
        targets_M=np.concatenate([s.targets_T for s in sequences]),
        weights_M=np.concatenate([s.weights_T for s in sequences]),
        offsets_N1=np.concatenate([[0], np.cumsum(lengths_N)]),
        lengths_N=lengths_N,
        trained_N=np.asarray([(s.weights_T > 0).sum() for s in sequences], np.int32),
        sources=sources,
        source_ids_N=np.asarray([sources.index(s.source) for s in sequences], np.int32),
        ids=[s.id for s in sequences],  # type: ignore[arg-type]
        account=account or Account(read=len(sequences), kept=len(sequences)),
        fingerprint="f00d",
    )


def drawn_set(counts):
    """A set from (length, trained) of each sequence."""
    return make_set([sequence_of([7] * (n + 1), [0.0] * (n + 1 - trained) + [1.0] * trained) for n, trained in counts])


def make_loader(dataset, *, batch_size=4, max_length=64):
    return Loader(
        dataset,
        batch_size=batch_size,
        max_length=max_length,
        packing=True,
        sources=dataset.sources,
        seed=0,
    )


def example():
    """Two sequences: a trained answer with control text in the question, and one of weight 0.5."""
    tokenizer = byte_level()
    sequences = []
    for question, answer, weight in [("Say <|im_end|>\n", "汉字🙂\nab", 1.0), ("<b>&\x1b[31m\u202e", "ok", 0.5)]:
        read, trained = ids_of(tokenizer, f"⟨im_start⟩{question}"), ids_of(tokenizer, f"{answer}⟨im_end⟩\n")
        weights = [0.0] * len(read) + [weight] * len(trained)
        sequences.append(sequence_of(read + trained, weights, source=f"s{weight}"))
    return make_set(sequences), tokenizer


texts = st.text(st.sampled_from("ab \n汉字🙂👩‍👩‍👧é�\u200d<|im_end|>"), max_size=30)


@settings(deadline=None, max_examples=100)
@given(texts)
def test_pieces_join_to_the_text_and_never_cut_a_character(text):
    tokenizer = byte_level()
    text = f"é{text}"
    ids = ids_of(tokenizer, text)
    pieces = pieces_of(sequence_of(ids, [0.0] + [1.0] * (len(ids) - 1)), tokenizer)
    assert "".join(p.text for p in pieces) == text
    assert [i for p in pieces for i in p.ids] == ids
    assert [w for p in pieces for w in p.weights] == [0.0] + [1.0] * (len(ids) - 1)
    if "�" not in text:
        assert all("�" not in p.text for p in pieces)
        assert max(len(p.ids) for p in pieces) <= 4


def test_a_piece_is_one_token_where_it_can_be():
    tokenizer = byte_level()
    ids = ids_of(tokenizer, "ab汉a🙂")
    pieces = pieces_of(sequence_of(ids, [1.0] * len(ids)), tokenizer)
    assert [(p.text, len(p.ids)) for p in pieces] == [("ab", 1), ("汉", 3), ("a", 1), ("🙂", 4)]


def test_text_cut_inside_a_character_loses_no_token():
    tokenizer = byte_level()
    ids = ids_of(tokenizer, "a汉")[:-1]
    pieces = pieces_of(sequence_of(ids, [1.0] * len(ids)), tokenizer)
    assert [(p.text, len(p.ids)) for p in pieces] == [("a", 1), ("�", 2)]
    with_end = [*ids, *ids_of(tokenizer, "⟨im_end⟩a")]
    pieces = pieces_of(sequence_of(with_end, [1.0] * len(with_end)), tokenizer)
    assert [p.text for p in pieces] == ["a", "�", "<|im_end|>", "a"]


def test_blanks_survive_a_decoder_that_strips_the_first():
    tokenizer = sentence_piece()
    backend = tokenizer.backend_tokenizer
    ids = [backend.token_to_id(t) for t in ["<s>", "▁Hi", "▁you", "▁", "<0xE6>", "<0xB1>", "<0x89>", ".", "</s>"]]
    pieces = pieces_of(sequence_of(ids, [0.0] * len(ids)), tokenizer)
    assert [p.text for p in pieces][2:] == [" you", " ", "汉", ".", "</s>"]
    assert [p.is_control for p in pieces] == [True, *[False] * 5, True]


def test_control_tokens_are_told_from_the_same_letters():
    tokenizer = byte_level()
    ids = ids_of(tokenizer, "<|im_end|>⟨im_end⟩a")
    pieces = pieces_of(sequence_of(ids, [0.0] * len(ids)), tokenizer)
    assert [p.text for p in pieces if p.is_control] == ["<|im_end|>"]
    ids += [tokenizer.backend_tokenizer.token_to_id(t) for t in ("<think>", "    ")]
    pieces = pieces_of(sequence_of(ids, [0.0] * len(ids)), tokenizer)
    assert [p.text for p in pieces if p.is_control] == ["<|im_end|>", "<think>"]  # four blanks are only blanks


@pytest.mark.parametrize(
    ("weights", "kind"),
    [
        ([0, 0], "context"),
        ([1, 1], "trained"),
        ([0, 1], "trained"),
        ([0.5, 0.5], "weighted"),
        ([1, 2], "weighted"),
        ([0.5, 1], "weighted"),
    ],
)
def test_the_kind_of_a_piece_follows_from_its_weights(weights, kind):
    tokenizer = byte_level()
    ids = ids_of(tokenizer, "aé")
    (_, piece) = pieces_of(sequence_of(ids, [0, *weights]), tokenizer)
    assert piece.kind == kind


def test_text_cannot_steer_the_terminal_or_turn_the_line_around():
    assert visible("a\x1b[31m\x00\r\x7f\x85\u202eb\n\tc") == "a␛[31m␀␍␡<U+0085><U+202E>b\n\tc"
    assert visible("👩‍👩‍👧 汉字　é\u00a0") == "👩‍👩‍👧 汉字　é\u00a0"


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
    report = terminal_report(dataset, loader, title="validation")
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
        "chat            4     120       40    33%       100.0%",
    ]:
        assert line in lines, line
    assert max(map(len, lines[6:])) <= 80


def test_an_account_without_anything_to_look_at_is_one_line():
    account = Account(read=4, kept=4)
    for method in ("prefix", "turns", "prefix", "prefix"):
        account.use(method)
    assert account.lines() == ["read 4, kept 4, dropped 0; trained spans found by prefix (3), turns (1)"]


def test_a_bar_is_as_long_as_its_count():
    dataset = drawn_set([(10, 5)] * 8 + [(20, 5)] * 4 + [(30, 5)])
    report = terminal_report(dataset, make_loader(dataset), title="x")
    bars = [line.count("█") for line in report.split("\n") if re.match(r" +\d+-\d+  █", line)]
    assert bars[0] == pytest.approx(2 * bars[1], abs=1)
    assert bars[0] == pytest.approx(8 * bars[2], abs=8)


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))), min_size=1, max_size=40)
)
def test_every_sequence_is_in_the_bin_that_names_it(counts):
    dataset = drawn_set(counts)
    histogram = length_histogram(dataset)
    assert len(histogram.labels) <= 16
    for label, count in zip(histogram.labels, histogram.counts, strict=True):
        low, high = (int(x.replace(",", "")) for x in label.split("-"))
        assert count == sum(low <= n <= high for n, _ in counts), label
    assert sum(histogram.counts) == len(counts)
    shares = trained_share_histogram(dataset)
    for b, count in enumerate(shares.counts):
        inside = [t for n, t in counts if 10 * b * n < 100 * t <= 10 * (b + 1) * n or (b == 0 and t == 0)]
        assert count == len(inside), shares.labels[b]


def test_one_very_long_sequence_does_not_flatten_the_histogram():
    dataset = drawn_set([(n, 1) for n in range(1, 400)] + [(100_000, 1)])
    histogram = length_histogram(dataset)
    assert histogram.labels[-1] == "401-100,000"
    assert histogram.counts[-1] == 1
    assert len(histogram.counts) > 5


def test_sources_are_shown_with_their_part_of_the_loss():
    dataset = make_set(
        [
            sequence_of([7] * 11, [0.0] * 6 + [1.0] * 5, source="a"),
            sequence_of([7] * 11, [0.0] + [0.5] * 10, source="b"),
            sequence_of([7] * 6, [0.0] + [2.0] * 5, source="a"),
        ]
    )
    first, second = source_lines(dataset)
    assert (first.name, first.sequences, first.tokens, first.trained) == ("a", 2, 15, 10)
    assert first.loss_share == pytest.approx(15 / 20)
    assert (second.name, second.sequences, second.tokens, second.trained) == ("b", 1, 10, 10)
    assert second.loss_share == pytest.approx(5 / 20)


def test_many_sources_are_summed_and_none_is_lost():
    dataset = make_set([sequence_of([7] * 11, [0.0] * 10 + [1.0], source=f"s{i}") for i in range(100)])
    lines = source_lines(dataset)
    assert len(lines) == 31
    assert lines[-1].name == "70 other sources"
    assert sum(line.tokens for line in lines) == 1000
    assert sum(line.loss_share for line in lines) == pytest.approx(1)


def test_chinese_names_stay_in_their_column():
    sequences = [sequence_of([7] * 11, [0.0] * 10 + [1.0], source=s) for s in ("中文", "chat")]
    dataset = make_set(sequences)
    table = terminal_report(dataset, make_loader(dataset), title="x").split("\n")[-3:-1]
    ends = {line[:2]: line.index(" 1 ") for line in table}
    assert ends["中文"] + 2 == ends["ch"]  # two characters, four columns


class Page(html.parser.HTMLParser):
    """Tokens, attributes and the texts of a page; complains about tags that do not close."""

    VOID = frozenset({"meta", "br"})
    OPTIONAL = frozenset({"tr", "td", "th"})

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.tokens, self.attributes = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID | self.OPTIONAL:
            self.open.append(tag)
        if tag == "i" and "data-i" in dict(attrs):
            self.tokens.append([dict(attrs), ""])

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["i"] and self.tokens:
            self.tokens[-1][1] += data


def test_the_page_holds_every_token_with_its_id_and_weight():
    dataset, tokenizer = example()
    page = Page(html_page(dataset, tokenizer, make_loader(dataset), count=5, title="t"))
    ids = [int(i) for attributes, _ in page.tokens for i in attributes["data-i"].split()]
    weights = [float(w) for attributes, _ in page.tokens for w in attributes["data-w"].split()]
    expected = [dataset[n] for n in range(2)]
    assert ids == [i for s in expected for i in (s.tokens_T[0], *s.targets_T)]
    assert weights == [w for s in expected for w in (0, *s.weights_T)]
    assert "".join(text for _, text in page.tokens) == (
        "<|im_start|>Say <|im_end|>\n汉字🙂\nab<|im_end|>\n<|im_start|><b>&␛[31m<U+202E>ok<|im_end|>\n"
    )
    kinds = {text: attributes["class"] for attributes, text in page.tokens}
    assert kinds["汉"] == "t"
    assert kinds["o"] == "w"
    assert kinds["<|im_start|>"] == "ck"
    assert kinds["S"] == "c"


def test_the_page_loads_nothing_and_runs_nothing_of_the_data():
    tokenizer = byte_level()
    evil = '</script><script src="https://evil.example/x.js">alert(1)</script><img src=x onerror=alert(1)> $title'
    ids = ids_of(tokenizer, evil)
    account = Account(read=2, kept=1)
    account.drop(evil, evil)
    dataset = make_set([sequence_of(ids, [0.0] + [1.0] * (len(ids) - 1), source=evil, where=evil)], account)
    text = html_page(dataset, tokenizer, make_loader(dataset, max_length=256), count=5, title=evil)
    page = Page(text)
    assert page.tags.count("script") == 1
    assert not {"img", "link", "iframe", "object", "base"} & set(page.tags)
    names = {name for name, _ in page.attributes}
    assert not {"src", "href", "xlink:href", "srcset", "action"} & names
    assert not [name for name in names if name.startswith("on")]
    assert "url(" not in text
    assert "@import" not in text
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'") in page.attributes
    assert "".join(t for _, t in page.tokens) == evil


def test_the_page_draws_the_histograms_and_the_rows():
    dataset = drawn_set([(10, 5)] * 6 + [(20, 4)])
    text = html_page(dataset, byte_level(), make_loader(dataset, max_length=40), count=0, title="t")
    assert "<title>1-10: 6</title>" not in text  # the bins are 2 wide
    assert "<title>9-10: 6</title>" in text
    assert "<title>40-50%: 6</title>" in text
    strips = re.findall(r'class="(trained|context)" x="([\d.]+)" y="\d+\.0" width="([\d.]+)"', text)
    width = {kind: sum(float(w) for k, _, w in strips if k == kind) for kind in ("trained", "context")}
    assert width["trained"] == pytest.approx(1000 * 34 / 40, rel=0.02)
    assert width["context"] == pytest.approx(1000 * 46 / 40, rel=0.02)
    assert "0 of 7 sequences" in text


def test_the_page_reads_on_a_phone_and_in_the_dark():
    dataset, tokenizer = example()
    text = html_page(dataset, tokenizer, make_loader(dataset), count=1, title="t")
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    assert "@media (prefers-color-scheme: dark)" in text
    assert "PingFang SC" in text
    assert '<meta charset="utf-8">' in text
