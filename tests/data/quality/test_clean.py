"""The cleaned set: what is written is what is trained on, and every row is somewhere."""

import dataclasses
import errno
import importlib.metadata
import json
import pathlib

import pytest

from jax_sft.cli import main
from jax_sft.config import DataConfig, QualityConfig, SetConfig
from jax_sft.data import dataset
from jax_sft.data.conversation import Account, DataError
from jax_sft.data.dataset import tokenize
from jax_sft.data.formats import read_conversations
from jax_sft.data.quality.clean import clean
from jax_sft.data.source import files_of, parts_of
from jax_sft.data.stream.shards import shards_of
from tests.data.test_dataset import CHATML, ChatTemplate, byte_tokenizer, contents

SAID = "Plants take up carbon dioxide through small pores in their leaves."
RULES = QualityConfig(empty_answer="drop", same_content="drop", personal_data="mask", refusal="drop")


def lines(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def write(path: pathlib.Path, rows: list[dict]) -> str:
    path.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows), encoding="utf-8")
    return str(path)


def talk(answer: str, **more) -> dict:
    return {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}], **more}


@pytest.fixture
def config(tmp_path) -> DataConfig:
    tools = [{"type": "function", "function": {"name": "f"}}]
    talks = [
        talk(SAID, id="one", mood="good", tools=tools),
        talk(" "),
        {"messages": []},
        talk("Mail anna.li@gmail.com.", source="other", n=3),
        talk(SAID, id="two", tools=tools),
        talk("Yes.", chat_template_kwargs={"enable_thinking": False}),
    ]
    talks[3]["messages"][1] |= {"weight": 0.5, "train": True, "reasoning_content": "hm"}
    alpaca = [{"instruction": "i", "input": "j", "output": "o", "level": 2}, {"instruction": "", "output": "o"}]
    texts = [{"text": SAID, "url": "u"}, {"text": "b"}]
    asked, said = talk("y")["messages"]
    prompts = [{"prompt": "p", "completion": "c"}, {"prompt": [asked], "completion": [said]}]
    tokens = [{"input_ids": [65, 66, 67], "labels": [-100, 66, 67], "who": "me"}]
    sets = {"talks": talks, "alpaca": alpaca, "texts": texts, "prompts": prompts, "dropped": tokens}
    return DataConfig(
        train=tuple(write(tmp_path / f"{name}.jsonl", rows) for name, rows in sets.items()), quality=RULES
    )


def test_counts_in_are_written_and_dropped_and_every_row_says_why(tmp_path, config):
    out = tmp_path / "out"
    told = clean(config, out)
    summary = json.loads((out / "clean.json").read_text("utf-8"))
    assert summary["read"] == 13 == sum(summary["written"].values()) + sum(summary["dropped"].values())
    assert told[0] == "read 13, wrote 9, dropped 4" and any("dropped  empty answer" in line for line in told)
    dropped = lines(out / "dropped.jsonl")
    assert [d["rule"] for d in dropped] == ["empty_answer", "format", "same_content", "format"]
    talks = config.train[0]
    assert [d["where"] for d in dropped[:3]] == [f"{talks}:{n}" for n in (2, 3, 5)]
    assert dropped[2]["id"] == "two" and dropped[2]["row"]["messages"][1]["content"] == SAID
    assert dropped[2]["excerpt"].startswith(f"as {talks}:1: Plants")
    (changed,) = lines(out / "changed.jsonl")
    assert (
        changed["rule"] == "personal_data" and changed["source"] == "other" and "-> Mail <EMAIL>." in changed["excerpt"]
    )
    assert changed["row"]["messages"][1]["content"] == "Mail anna.li@gmail.com."


def test_ids_sources_tools_and_all_other_columns_stay(tmp_path, config):
    clean(config, tmp_path / "out")
    first, last = lines(tmp_path / "out" / "talks.jsonl")
    assert first["id"] == "one" and first["source"] == "talks" and first["mood"] == "good" and first["tools"]
    assert last["chat_template_kwargs"] == {"enable_thinking": False}
    (other,) = lines(tmp_path / "out" / "other.jsonl")
    assert other["n"] == 3
    turn = {"role": "assistant", "content": "Mail <EMAIL>.", "weight": 0.5, "train": True, "reasoning_content": "hm"}
    assert other["messages"][1] == turn
    text = lines(tmp_path / "out" / "texts.text.jsonl")[0]
    assert text == {"id": f"{config.train[2]}:1", "source": "texts", "text": SAID, "url": "u"}
    assert lines(tmp_path / "out" / "alpaca.jsonl")[0]["level"] == 2
    assert lines(tmp_path / "out" / "dropped_set.tokens.jsonl")[0]["who"] == "me"


def test_the_cleaned_set_read_again_gives_the_same_tokens(tmp_path, config):
    clean(config, tmp_path / "out")
    template = ChatTemplate(byte_tokenizer(), template=CHATML)
    before = tokenize(config, parts_of(config.train), template, cache_dir=None, progress=False)
    paths = sorted(p for p in (tmp_path / "out").glob("*.jsonl") if p.name not in ("dropped.jsonl", "changed.jsonl"))
    plain = DataConfig()
    after = tokenize(plain, parts_of(tuple(map(str, paths))), template, cache_dir=None, progress=False)
    assert sorted(contents(after), key=str) == sorted(contents(before), key=str) and len(before) == 9
    assert not after.account.dropped


def test_named_sets_have_a_file_each(tmp_path, config):
    sets = {"a": SetConfig(paths=config.train[:1]), "b": SetConfig(paths=config.train[2:3])}
    clean(dataclasses.replace(config, train=(), sets=sets), tmp_path / "out")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"a.jsonl", "b.text.jsonl", "dropped.jsonl", "changed.jsonl", "clean.json"}


def test_rows_that_the_reader_leaves_out_ahead_of_a_sample_find_their_line(tmp_path, config):
    quality = dataclasses.replace(RULES, length="drop", max_length_deviation=50.0)
    clean(dataclasses.replace(config, train=(*config.train, config.train[0]), quality=quality), tmp_path / "out")
    dropped = lines(tmp_path / "out" / "dropped.jsonl")
    assert [d["where"].rsplit(":")[-1] for d in dropped] == ["2", "3", "5", "2", "1", "2", "3", "4", "5", "6"]


def test_an_own_folder_is_replaced_and_another_one_left_alone(tmp_path, config):
    out = tmp_path / "out"
    clean(config, out)
    (out / "talks.jsonl").write_text("old")
    clean(config, out)
    assert lines(out / "talks.jsonl")[0]["id"] == "one"
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match=r"holds files that are not of an earlier --clean; name an empty or new folder"):
        clean(config, other)
    assert (other / "thesis.txt").read_text() == "mine"
    with pytest.raises(DataError, match=r"holds talks.jsonl, which the config reads; name another folder"):
        clean(config, tmp_path)
    with pytest.raises(DataError, match=r"texts.jsonl: is a file, where a folder is to be written"):
        clean(dataclasses.replace(config, train=config.train[:1]), tmp_path / "texts.jsonl")
    assert not list(tmp_path.glob("*.tmp-*"))


def test_a_folder_that_cannot_be_made_is_told_with_the_reason(tmp_path, config, monkeypatch):
    below = tmp_path / "texts.jsonl" / "out"
    said = (
        r"texts.jsonl/out: the folder cannot be made \(Not a directory\); name another, in a place where you may write"
    )
    with pytest.raises(DataError, match=said):
        clean(dataclasses.replace(config, train=config.train[:1]), below)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "mkdir", full)
    with pytest.raises(OSError, match="No space left"):  # of which another sentence is said
        clean(config, tmp_path / "new")


def test_screening_does_not_depend_on_the_number_of_workers(config):
    template = ChatTemplate(byte_tokenizer(), template=CHATML)
    alone = tokenize(config, parts_of(config.train), template, cache_dir=None, progress=False)
    several = dataclasses.replace(config, workers=2)
    together = tokenize(several, parts_of(config.train), template, cache_dir=None, progress=False)
    assert contents(alone) == contents(together) and alone.account == together.account
    assert alone.account.read == 13 == alone.account.kept + sum(alone.account.dropped.values())


def test_the_cache_knows_the_rules_and_the_files_they_read(tmp_path, config):
    template = ChatTemplate(byte_tokenizer(), template=CHATML)
    words = tmp_path / "words.txt"
    words.write_text("zzz\n")
    asked = write(tmp_path / "asked.jsonl", [talk("a")])

    def key(references: tuple[str, ...] = (), **quality) -> str:
        changed = dataclasses.replace(config, quality=dataclasses.replace(RULES, **quality))
        others = parts_of(references) if references else ()
        return dataset._key(changed, parts_of(config.train), template, others, progress=False)

    keys = [key(), key(refusal="note"), key(word_lists=(str(words),)), key(references=(asked,), leakage="note")]
    words.write_text("yyy\n")
    keys += [key(word_lists=(str(words),))]
    write(tmp_path / "asked.jsonl", [talk("b")])
    keys += [key(references=(asked,), leakage="note")]
    assert len(set(keys)) == len(keys)
    assert key(references=(asked,)) != keys[0]  # its prompts are noted where they are trained on


def test_the_cache_knows_the_libraries_that_rules_go_by_where_they_are_on(config, monkeypatch):
    template, version = ChatTemplate(byte_tokenizer(), template=CHATML), importlib.metadata.version
    needs = {"datasketch": {"near_duplicate": "note"}, "py3langid": {"wrong_language": "note", "language_by": "model"}}

    def key(**quality) -> str:
        changed = dataclasses.replace(config, quality=dataclasses.replace(RULES, **quality))
        return dataset._key(changed, parts_of(config.train), template, progress=False)

    def missing(name: str) -> str:
        if name in needs:
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    def newer(name: str) -> str:
        return version(name) if name not in needs else "1000"

    for rules in needs.values():
        keys = set()
        for told in (missing, newer, lambda name: version(name) if name not in needs else "999"):
            monkeypatch.setattr(importlib.metadata, "version", told)
            keys.add(key(**rules))
        assert len(keys) == 3
    monkeypatch.setattr(importlib.metadata, "version", missing)
    off = key(), key(wrong_language="note")
    monkeypatch.setattr(importlib.metadata, "version", newer)
    assert off == (key(), key(wrong_language="note"))


def test_the_command_writes_the_folder_and_needs_no_model(tmp_path, config, capsys):
    place = tmp_path / "config.py"
    place.write_text(
        "from jax_sft import config\n\ndef get_config():\n    c = config.default()\n    c.model.path = 'none'\n"
        f"    c.data.train = {config.train!r}\n    c.train.steps = 1\n    c.data.quality.empty_answer = 'drop'\n"
        "    return c\n"
    )
    assert main(["data", "--config", str(place), "--clean", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert (
        told.startswith("read 13, wrote 10, dropped 3\n")
        and "talks.jsonl" in told
        and "noted  the same content" in told
    )
    (tmp_path / "out" / "clean.json").unlink()
    assert main(["data", "--config", str(place), "--clean", str(tmp_path / "out")]) == 1
    assert "holds files that are not of an earlier --clean" in capsys.readouterr().err


def test_half_a_surrogate_pair_ends_no_cleaning(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [talk("ok \ud800 end"), talk(SAID, note="\udc00"), talk("Another answer.")]
    path.write_text("\n".join(map(json.dumps, rows)))
    clean(DataConfig(train=(str(path),), quality=RULES), tmp_path / "out")
    (dropped,) = (tmp_path / "out" / "dropped.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(dropped)["row"] == rows[0]
    assert len((tmp_path / "out" / "a.jsonl").read_text(encoding="utf-8").splitlines()) == 2


def test_masks_of_given_tokens_are_written_once(tmp_path):
    given = {"input_ids": [65, 66, 67, 0], "assistant_masks": [0, 1, 1, 0], "attention_mask": [1, 1, 1, 0]}
    path = write(tmp_path / "a.jsonl", [given])
    clean(DataConfig(train=(path,), quality=RULES), tmp_path / "out")
    (again,) = read_conversations(DataConfig(), parts_of((str(tmp_path / "out" / "a.tokens.jsonl"),)), Account())
    (first,) = read_conversations(DataConfig(), parts_of((path,)), Account())
    assert again.tokens == first.tokens


def test_the_folder_is_named_whole_or_by_a_glob_and_what_was_left_out_is_not_read(tmp_path, config):
    clean(config, tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "clean.json").read_text("utf-8"))
    names = set(summary["written"])
    assert summary["dropped"] and "dropped.jsonl" not in names
    for path in (tmp_path / "out", tmp_path / "out" / "*.jsonl"):
        assert {place.name for place in files_of([str(path)])} == names
    assert {shard.name for shard in shards_of([f"file://{tmp_path}/out"])} == names
    (tmp_path / "out" / "clean.json").write_text('[{"text": "of the user\'s"}]')  # then they are names like others
    all_of_them = names | {"clean.json", "dropped.jsonl", "changed.jsonl"}
    for found in (files_of([str(tmp_path / "out")]), shards_of([f"file://{tmp_path}/out"])):
        assert {place.name for place in found} == all_of_them
