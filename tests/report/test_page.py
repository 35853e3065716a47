import base64
import hashlib
import html.parser
import re

import numpy as np
import pytest

from jax_sft.data.conversation import Account
from jax_sft.report.card import Card
from jax_sft.report.page import View, html_page
from jax_sft.report.summary import summarize
from jax_sft.report.tokens import chosen
from tests.report.sets import byte_level, drawn_set, example, ids_of, make_loader, make_set, sequence_of

HOSTILE = (
    '</script><script src="https://evil.example/x.js">alert(1)</script><img src=x onerror=alert(1)></title></style>'
    "<!-- --></svg>'\" $title ${x} \x1b[31m\u202e\u2066\x00 &lt;"
)


def card_of(name="t", **changes):
    return Card(
        **{"name": name, "said": (), "missing": (), "files": (), "made": (), "counts": (), "limits": (), **changes}
    )


def page_of(dataset, tokenizer, *, count=5, card=None, validation=None, **loading):
    """The page of a set, and of another as validation."""
    sets = {"train": dataset, **({"validation": validation} if validation else {})}
    views = {}
    for name, of in sets.items():
        loader = make_loader(of, **loading)
        views[name] = View(of, loader, summarize(of, loader, tokenizer))
    return html_page(views, tokenizer, card or card_of(), count=count)


class Page(html.parser.HTMLParser):
    """Tokens, attributes and the texts of a page; complains about tags that do not close."""

    VOID = frozenset({"meta", "br", "input"})
    OPTIONAL = frozenset({"tr", "td", "th"})

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.tokens, self.attributes, self.hidden, self.text = [], [], [], [], [], ""
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
        if not {"style", "script"} & set(self.open):
            self.text += data


def weights_of(attributes):
    """As the page's script reads them: written, or told by the class."""
    usual = {"c": "0", "t": "1"}.get(attributes["class"][0])
    count = len(attributes["data-i"].split())
    return [float(w) for w in attributes.get("data-w", " ".join([str(usual)] * count)).split()]


def test_the_page_holds_every_token_with_its_id_and_weight():
    dataset, tokenizer = example()
    page = Page(page_of(dataset, tokenizer))
    ids = [int(i) for attributes, _ in page.tokens for i in attributes["data-i"].split()]
    weights = [w for attributes, _ in page.tokens for w in weights_of(attributes)]
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


def hostile_page():
    tokenizer = byte_level()
    ids = ids_of(tokenizer, HOSTILE)
    account = Account(read=9, kept=1, held_out=2)
    account.drop(f"rule: {HOSTILE}", HOSTILE, HOSTILE)
    account.drop("rule: another", HOSTILE, HOSTILE)
    account.alter(HOSTILE, HOSTILE, HOSTILE)
    account.note("\ud800 half a pair", "\ud800", "\ud800")
    account.use(HOSTILE)
    dataset = make_set([sequence_of(ids, [0.0] + [1.0] * (len(ids) - 1), source=HOSTILE, where=HOSTILE)], account)
    from jax_sft.report.card import FileLine

    card = card_of(
        HOSTILE,
        said=((HOSTILE, HOSTILE),),
        missing=(HOSTILE,),
        files=(FileLine(HOSTILE, HOSTILE, 3, HOSTILE, HOSTILE),),
        made=((HOSTILE, HOSTILE),),
        limits=(HOSTILE,),
    )
    return page_of(dataset, tokenizer, card=card, validation=dataset, max_length=512)


def test_the_page_loads_nothing_and_runs_nothing_of_the_data():
    text = hostile_page()
    page = Page(text)
    text.encode("utf-8")
    assert page.tags.count("script") == page.tags.count("style") == 1
    assert page.tags.count("title") == 1 + len(re.findall("<(?:g|rect[^>]*)><title>", text))
    assert not {"img", "link", "iframe", "object", "base"} & set(page.tags)
    names = {name for name, _ in page.attributes}
    assert not {"src", "xlink:href", "srcset", "action"} & names
    assert all(value.startswith("#") for name, value in page.attributes if name == "href")
    assert not [name for name in names if name.startswith("on")]
    (style,) = re.findall("<style>(.*?)</style>", text, re.DOTALL)
    assert "url(" not in style
    assert "@import" not in style
    shown = "".join(t for _, t in page.tokens)
    assert shown.startswith("</script><script src=")
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e\u2066]", text)


def test_no_script_runs_but_the_page_s_own():
    text = hostile_page()
    (script,) = re.findall("<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert ("content", policy) in Page(text).attributes


def test_the_page_draws_the_histograms_and_the_rows():
    dataset = drawn_set([(10, 5)] * 6 + [(20, 4)])
    text = page_of(dataset, byte_level(), count=0, max_length=40)
    assert "<title>1-10: 6" not in text  # the bins are 2 wide
    assert "<title>9-10: 6 (85.7%)</title>" in text
    assert "<title>40-50%: 6 (85.7%)</title>" in text
    strips = re.findall(r'class="(trained|context)" x="([\d.]+)" y="\d+\.0" width="([\d.]+)"', text)
    width = {kind: sum(float(w) for k, _, w in strips if k == kind) for kind in ("trained", "context")}
    assert width["trained"] == pytest.approx(1000 * 34 / 40, rel=0.02)
    assert width["context"] == pytest.approx(1000 * 46 / 40, rel=0.02)
    assert "0 of 7 sequences" in text


def test_the_page_reads_on_a_phone_and_in_the_dark():
    dataset, tokenizer = example()
    text = page_of(dataset, tokenizer, count=1)
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    assert "@media (prefers-color-scheme: dark)" in text
    assert "PingFang SC" in text
    assert '<meta charset="utf-8">' in text


def test_what_was_read_is_what_was_kept_dropped_and_held_out_or_the_page_says_so():
    dataset, tokenizer = example()
    account = dataset.account
    account.read, account.kept, account.held_out = 9, 4, 3
    account.drop("a rule: cut off", "x.jsonl:1", "an excerpt")
    account.drop("a rule: loops", "x.jsonl:2")
    tiles = r'<p class="tile ?(\w*) ?"><b>([\d,]+)</b> ([\w ]+)</p>'
    text = page_of(dataset, tokenizer)
    found = re.findall(tiles, text)
    assert found == [("", "9", "read"), ("kept", "4", "kept"), ("held", "3", "held out"), ("lost", "2", "dropped")]
    assert re.findall(r'class="(\w+)" style="flex-grow:(\d+)"', text) == [("kept", "4"), ("held", "3"), ("lost", "2")]
    account.read = 10
    assert ("unknown", "1", "not accounted for") in re.findall(tiles, page_of(dataset, tokenizer))


def test_reasons_stand_under_their_rule_with_places_and_excerpts():
    dataset, tokenizer = example()
    account = dataset.account
    account.read = 100
    for i in range(7):
        account.drop("cut_off: in a fence", f"a.jsonl:{i}", f"<b>excerpt {i}")
    account.drop("cut_off: in JSON", "b.jsonl:1", "{")
    account.note("same_id", "c.jsonl:1")
    text = page_of(dataset, tokenizer)
    blocks = re.findall("<details>(.*?)</details>", text, re.DOTALL)
    assert len(blocks) == 2
    assert "cut_off (2 findings)" in blocks[0] and "<b>8</b>" in blocks[0] and "(8.0%)" in blocks[0]
    assert blocks[0].count("<blockquote") == 6
    assert "&lt;b&gt;excerpt 4</blockquote>" in blocks[0]
    assert "excerpt 5" not in text
    assert "the first 5 of 7" in blocks[0]
    assert 'class="kind noted"' in blocks[1] and "c.jsonl:1" in blocks[1] and "<blockquote" not in blocks[1]


def test_very_many_reasons_are_summed_and_counted():
    dataset, tokenizer = example()
    dataset.account.read = 1000
    for i in range(130):
        dataset.account.drop(f"reason {i}", f"x.jsonl:{i}")
    text = page_of(dataset, tokenizer)
    assert text.count("<details>") == 100
    assert "30 other reasons: 30 conversations" in text


def test_every_source_has_a_sequence_on_the_page():
    sequences = [sequence_of([7] * 5, [0.0] + [1.0] * 4, source=s) for s in "aaaaaaaabbbc"]
    dataset = make_set(sequences)
    assert chosen(dataset, 4) == [0, 1, 8, 11]
    assert chosen(dataset, 20) == list(range(12))
    text = page_of(dataset, byte_level(), count=4)
    assert re.findall('<article data-source="(.)"', text) == ["a", "a", "b", "c"]


def test_a_page_of_very_long_sequences_stays_below_three_megabytes():
    tokenizer = byte_level()
    ids = np.random.default_rng(0).integers(0, 256, 20_000)
    sequences = [sequence_of(ids, [0.0] + [0.5] * 19_999, where=f"x.jsonl:{i}" * 500) for i in range(30)]
    account = Account(read=130, kept=30)
    for i in range(100):
        account.drop(f"rule {i}: {'<' * 5000}", "<" * 5000, "<" * 5000)
    dataset = make_set(sequences, account)
    text = page_of(dataset, tokenizer, count=30, max_length=20_000)
    assert len(text.encode()) < 3_000_000
    shown = text.count("<article")
    assert 1 <= shown < 30
    assert f"{shown} of 30 sequences" in text
    assert "more tokens" in text


def test_validation_is_shown_beside_training_where_there_is_some():
    dataset, tokenizer = example()
    other = drawn_set([(10, 5)] * 3)
    assert '<section id="validation">' not in page_of(dataset, tokenizer)
    text = page_of(dataset, tokenizer, validation=other)
    section = text[text.index('<section id="validation">') : text.index('<section id="card">')]
    assert "<b>3</b> read" in section


def test_a_mixture_says_what_an_epoch_draws():
    from jax_sft.config import SetConfig
    from jax_sft.data.loader import Loader, Stage
    from jax_sft.data.mixture import mixture

    sequences = [sequence_of([7] * 5, [0.0] + [1.0] * 4, source=s) for s in "aaaaaaaabb"]
    dataset = make_set(sequences)
    members = {name: dataset.of_source(name) for name in "ab"}
    drawn = mixture({"a": SetConfig(count=4), "b": SetConfig(epochs=3.0)}, members, seed=0)
    loader = Loader(
        dataset, batch_size=2, max_length=16, packing=True, sources=dataset.sources, seed=0,
        stages=[Stage(epochs=1, mixture=drawn)],
    )  # fmt: skip
    summary = summarize(dataset, loader, byte_level())
    assert summary.is_mixed
    assert [(x.name, x.sequences, x.drawn) for x in summary.sources] == [("a", 8, 4), ("b", 2, 6)]
    assert [x.drawn_share for x in summary.sources] == pytest.approx([0.4, 0.6])
    text = html_page({"train": View(dataset, loader, summary)}, byte_level(), card_of(), count=0)
    assert "an epoch draws" in text
    assert '<td class="n">6<td class="n">3.00' in text
    assert "an epoch draws" not in page_of(dataset, byte_level())


def test_the_card_is_on_the_page():
    dataset, tokenizer = example()
    card = card_of("News", said=(("licence", "CC0"),), missing=("origin",), limits=("Not looked for: loops.",))
    page = Page(page_of(dataset, tokenizer, card=card))
    assert "licenceCC0" in page.text
    assert "Not said in data.card: origin." in page.text
    assert "Not looked for: loops." in page.text
