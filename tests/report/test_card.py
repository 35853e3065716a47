import dataclasses
import gzip
import hashlib
import json
import typing

import pytest

from jax_sft import config as configs
from jax_sft.config import ConfigError, DataConfig, QualityConfig, StreamConfig
from jax_sft.data.chat import ChatTemplate
from jax_sft.data.conversation import DataError
from jax_sft.data.dataset import tokenize
from jax_sft.data.source import training_parts, validation_parts
from jax_sft.report.card import _limits, make_card, markdown
from jax_sft.report.summary import summarize
from jax_sft.run_data import epoch_loader
from tests.data.chats import CHATML, tokenizer_for


def rows(count):
    return [
        {"messages": [{"role": "user", "content": f"Question {i}"}, {"role": "assistant", "content": f"Answer {i}"}]}
        for i in range(count)
    ]


@pytest.fixture
def files(tmp_path):
    """A file of conversations, one of instructions, and one to measure by."""
    chat, alpaca, measured = (tmp_path / name for name in ("chat.jsonl", "alpaca.json", "measured.jsonl.gz"))
    chat.write_text("".join(json.dumps(row) + "\n" for row in rows(5)))
    alpaca.write_text(json.dumps([{"instruction": "Add", "output": "Done"}]))
    with gzip.open(measured, "wt") as file:
        file.write(json.dumps(rows(1)[0]) + "\n")
    return chat, alpaca, measured


def config_of(files, *overrides, **data):
    tree = {"model": {"path": "some/model"}, "train": {"steps": 1, "batch_size": 2}}
    tree["data"] = {"train": [str(files[0]), str(files[1])], "validation": [str(files[2])], "max_length": 64, **data}
    return configs.from_config_dict(tree, overrides)


def card_of(run, name="mine"):
    template = ChatTemplate(tokenizer_for(CHATML))
    parts = {"train": training_parts(run.data), "validation": validation_parts(run.data)}
    summaries = {}
    for set_name, of in parts.items():
        if of:
            dataset = tokenize(run.data, of, template, cache_dir=None, progress=False)
            summaries[set_name] = summarize(dataset, epoch_loader(run, dataset, is_mixed=False), template.tokenizer)
    return make_card(run, parts, summaries, template, name=name)


def test_each_file_is_there_with_size_hash_and_format(files):
    card = card_of(config_of(files))
    assert [(f.part, f.name, f.format) for f in card.files] == [
        ("train", str(files[0]), "messages"),
        ("train", str(files[1]), "alpaca"),
        ("validation", str(files[2]), "messages"),
    ]
    for line, path in zip(card.files, files, strict=True):
        content = path.read_bytes()
        assert (line.num_bytes, line.sha256) == (len(content), hashlib.sha256(content).hexdigest())


def test_sets_go_by_their_names_and_what_is_held_out_is_of_the_same_files(files):
    sets = {"talk": {"paths": [str(files[0])]}, "task": {"paths": [str(files[1])]}}
    card = card_of(config_of(files, train=[], validation=[], sets=sets, holdout=0.4))
    assert [(f.part, f.format) for f in card.files] == [("talk", "messages"), ("task", "alpaca")]
    assert [name for name, _ in card.counts] == ["train", "validation"]


def test_many_files_are_summed_in_one_line(files, monkeypatch):
    monkeypatch.setattr("jax_sft.report.card._MOST_FILES", 1)
    card = card_of(config_of(files))
    assert len(card.files) == 2
    size = sum(path.stat().st_size for path in files[1:])
    assert (card.files[1].name, card.files[1].num_bytes) == ("2 other files", size)


def test_what_the_config_says_stands_word_for_word_and_what_it_does_not_is_named(files):
    card = card_of(config_of(files, "data.card.licence=CC BY 4.0", "data.card.must_not_be_used_for=medicine"))
    assert card.said == (("licence", "CC BY 4.0"), ("must not be used for", "medicine"))
    assert card.missing == ("origin", "intended use")
    assert card.name == "mine"
    assert card_of(config_of(files, card={"name": "News"})).name == "News"


def test_the_card_says_how_tokens_came_about_and_what_nobody_checked(files):
    card = card_of(config_of(files))
    made = dict(card.made)
    digest = hashlib.sha256(CHATML.encode()).hexdigest()[:16]
    assert made["chat template"] == f"of the tokenizer, SHA-256 {digest}…"
    assert made["trained spans found by"] == "prefix (7)"
    assert made["model and tokenizer"] == "some/model"
    assert any(limit.startswith("Not looked for: ") for limit in card.limits)


def test_the_card_as_markdown_holds_files_counts_and_fingerprints(files):
    card = card_of(config_of(files, "data.card.licence=CC0"))
    text = markdown(card)
    assert text.startswith("# Data card: mine\n\n**licence**: CC0\n")
    assert "| conversations read | 6 |" in text
    assert f"| train | {files[0]} | {files[0].stat().st_size:,} | messages | {card.files[0].sha256} |" in text
    for _, summary in card.counts:
        assert f"Fingerprint `{summary.fingerprint}`." in text
    assert "Not said in `data.card`: origin, intended use, must not be used for." in text


def test_text_of_the_data_breaks_no_table_and_brings_no_markup(files):
    run = config_of(files, card={"licence": "a\n\n# b <script>\u202e|"})
    named = [{"source": "a|b\n<img>", **row} for row in rows(2)]
    files[0].write_text("".join(json.dumps(row) + "\n" for row in named))
    text = markdown(card_of(run))
    assert "**licence**: a # b &lt;script&gt;&lt;U+202E&gt;|\n" in text
    assert "| a\\|b &lt;img&gt; | 2 |" in text
    assert "<script>" not in text


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ({"licence": ""}, "data.card.licence is empty; write what there is to say, or leave it out"),
        ({"licence": 4}, "data.card = {'licence': 4} is not a mapping of texts"),
        ("CC0", "data.card = 'CC0' is not a mapping of texts"),
    ],
)
def test_a_card_holds_texts(files, card, message):
    with pytest.raises(ConfigError, match=message):
        config_of(files, card=card)


def test_a_file_that_fits_no_format_stops_the_card(files):
    run = config_of(files)
    parts = {"train": training_parts(run.data)}
    files[0].write_text('{"a": 1}\n')
    with pytest.raises(DataError, match="no format fits the columns"):
        make_card(run, parts, {}, ChatTemplate(tokenizer_for(CHATML)), name="x")


OFF = {field.name: "off" for field in dataclasses.fields(QualityConfig) if "off" in typing.get_args(field.type)}


def limits_of(stream=False, **quality):
    """The beginnings of the card's limits, and what stands behind them."""
    data = DataConfig(quality=QualityConfig(**{**OFF, **quality}), stream=StreamConfig(on=stream))
    told = (limit.rstrip(".").partition(": ") for limit in _limits(data))
    return {head: names.split(", ") for head, colon, names in told if colon}


def test_the_card_says_which_rules_were_on_and_which_were_not():
    told = limits_of(loops="drop", cut_off="note", personal_data="mask", language_by="model")
    assert told["Rules of data.quality that leave out what they find"] == ["loops"]
    assert told["Rules of data.quality that mask what they find"] == ["personal_data"]
    assert told["Rules of data.quality that only count"] == ["cut_off"]
    assert set(told["Not looked for"]) == set(OFF) - {"loops", "cut_off", "personal_data"}


@pytest.mark.parametrize(
    ("rule", "bound"),
    [
        ("length", {"min_answer_characters": 0}),
        ("length", {"max_length_deviation": 4.0}),
        ("words", {"word_lists": ("words.txt",)}),
        ("score", {"scores": "scores.jsonl", "max_loss": 3.0}),
    ],
)
def test_a_rule_without_anything_to_go_by_is_not_told_to_have_been_tried(rule, bound):
    assert rule in limits_of(**{rule: "drop"})["Not looked for"]
    assert limits_of(**{rule: "drop"}, **bound)["Rules of data.quality that leave out what they find"] == [rule]


def test_the_card_of_a_stream_names_no_rule_that_compares_all_conversations():
    quality = {"roles": "note", "same_content": "note", "same_id": "note"}
    assert limits_of(**quality)["Rules of data.quality that only count"] == list(quality)
    told = limits_of(stream=True, **quality)
    assert told["Rules of data.quality that only count"] == ["roles"]
    assert {"same_content", "same_id"} <= set(told["Not looked for"])
