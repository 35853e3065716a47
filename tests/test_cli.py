"""The door: commands, exit codes, and one clear sentence for everything a user can mend."""

import json
import logging
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from jax_sft import cli
from jax_sft.assistant import Assistant
from jax_sft.cli.start import start_distributed
from jax_sft.data.conversation import Account
from jax_sft.evaluate.answers import Answer
from jax_sft.evaluate.losses import Losses
from tests.tiny import CHATML, run_config, tiny_tokenizer, write_conversations

CONFIG = """
import pathlib
from jax_sft import config as c
HERE = pathlib.Path(__file__).parent

def get_config():
    config = c.default()
    config.model.path = str(HERE / "model")
    config.model.dtype = "float32"
    config.data.train = (str(HERE / "train.jsonl"),)
    config.data.max_length = 128
    config.train.steps = 2
    config.log.tensorboard = False
    config.evaluate.prompts = ("count to 3",)
    config.evaluate.max_new_tokens = 4
    return config
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("door")
    run_config(folder)
    (folder / "c.py").write_text(CONFIG)
    return folder


@pytest.fixture(scope="module")
def workdir(place):
    assert cli.main(["train", "--config", str(place / "c.py"), "--workdir", str(place / "w")]) == 0
    return place / "w"


@pytest.fixture(scope="module")
def short(place):
    """The same model with a context of 128 tokens."""
    shutil.copytree(place / "model", place / "short")
    config = json.loads((place / "short" / "config.json").read_text())
    (place / "short" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 128}))
    return place / "short"


@pytest.fixture
def asked(monkeypatch):
    """The conversations that models are asked; each is answered with its own last message."""
    seen = []

    def answer(conversations):
        seen.extend([[m["content"] for m in messages] for messages in conversations])
        return [Answer(messages[-1]["content"], 1, True) for messages in conversations]

    monkeypatch.setattr(Assistant, "answer_all", lambda _, conversations, **options: answer(conversations))
    return seen


@pytest.fixture
def measured(monkeypatch):
    """What models are loaded with, instead of loading them; each drops more rows than the one before."""
    seen = []

    class Measured:
        adapters = ()

        def with_adapter(self, _):
            return self

        def losses(self, data, *, config, batch_size):
            seen[-1]["config"] = config
            account = Account(read=9, kept=9 - len(seen))
            account.dropped["too strange"] = len(seen)
            return Losses(1.0, 0.5, 3.0, {"a": {"loss": 1.0, "accuracy": 0.5, "tokens": 3.0}}), account

    def load(path, **options):
        seen.append({"path": path, **options})
        return Measured()

    monkeypatch.setattr("jax_sft.assistant.load_assistant", load)
    return seen


def fails(capsys, *words):
    assert cli.main([str(w) for w in words]) == cli.EXIT_USER_ERROR
    text = capsys.readouterr().err
    assert "Traceback" not in text
    assert text.count("jax-sft: ") == 1
    return text[text.index("jax-sft: ") :]  # behind the progress bars


def test_train_leaves_the_contract_s_files_and_samples(workdir):
    samples = [json.loads(line) for line in (workdir / "samples.jsonl").read_text().splitlines()]
    assert [s["step"] for s in samples] == [0, 2]
    assert samples[0]["prompt"] == "count to 3"
    assert (workdir / "export" / "model.safetensors").exists()


def test_data_shows_counts_fill_and_coloured_tokens(place, capsys, tmp_path):
    html, dump, card = tmp_path / "d.html", tmp_path / "d.jsonl", tmp_path / "DATA_CARD.md"
    words = ["data", "--config", place / "c.py", "--show", "1", "--html", html, "--dump", dump, "--card", card]
    words += ["--config.data.card.licence=CC BY 4.0"]
    assert cli.main([str(w) for w in words]) == 0
    out = capsys.readouterr().out
    assert "60" in out
    assert "count to" in out
    assert "count to" in re.sub("<[^>]*>", "", html.read_text())
    assert "CC BY 4.0" in html.read_text()
    assert "**licence**: CC BY 4.0" in card.read_text() and "| conversations read | 60 |" in card.read_text()
    lines = [json.loads(line) for line in dump.read_text().splitlines()]
    assert len(lines) == 60
    assert lines[0].keys() == {"id", "source", "tokens", "weights", "text"}
    trained = [t for t, w in zip(lines[0]["tokens"], lines[0]["weights"], strict=True) if w]
    answer = json.loads((place / "train.jsonl").read_text().splitlines()[0])["messages"][1]["content"]
    assert tiny_tokenizer().decode(trained).rstrip("\n") == answer + "<|im_end|>"


def test_eval_writes_loss_accuracy_tokens_and_sources(place, workdir, tmp_path, capsys):
    out = tmp_path / "e.json"
    words = ["eval", "--model", workdir / "export", "--against", place / "model", "--data", place / "validation.jsonl"]
    words += ["--out", out, "--answers", "1", "--max-new-tokens", "4", "--prompt", "count to 9"]
    assert cli.main([str(w) for w in words]) == 0
    report = json.loads(out.read_text())
    assert {"loss", "accuracy", "tokens", "by_source", "against", "answers"} <= report.keys()
    assert sorted(report["by_source"]) == ["even", "odd"]
    assert len(report["answers"]) == 2
    assert "loss change" in capsys.readouterr().out


def test_eval_probes_checks_rules_and_scores_answers(place, workdir, tmp_path, capsys):
    (tmp_path / "rules.jsonl").write_text(
        json.dumps({"key": 1, "prompt": "Say b.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]})
    )
    out, said = tmp_path / "e.json", tmp_path / "said.jsonl"
    words = ["eval", "--model", workdir / "export", "--against", place / "model", "--data", place / "validation.jsonl"]
    words += ["--probes", "--rules", tmp_path / "rules.jsonl", "--metric", "f1", "--metric", "exact_match"]
    words += ["--max-new-tokens", "12", "--out", out, "--predictions", said]
    assert cli.main([str(word) for word in words]) == 0
    shown = capsys.readouterr()
    assert "behaviour probes, " in shown.out and "95 % interval" in shown.out and "1 instructions" in shown.out
    report = json.loads(out.read_text())
    for one in (report, report["against"]):
        assert {"loss", "probes", "rules", "metrics"} <= set(one)
        assert 0 <= one["metrics"]["f1"]["value"] <= 1 and one["rules"]["prompts"] == 1
    lines = [json.loads(line) for line in said.read_text().splitlines()]
    count = int(report["probes"]["stops/count"])
    assert count == 60 and len(lines) == 2 * (60 + 1 + 12)
    assert lines[0]["id"].startswith(f"{place / 'model'}: probes/")
    assert cli.main(["eval", "--model", str(place / "model"), "--rules", str(tmp_path / "rules.jsonl")]) == 0


def test_eval_probes_a_base_model_without_a_template(place, tmp_path, capsys):
    shutil.copytree(place / "model", tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((tmp_path / "base" / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps(config))
    said = tmp_path / "said.jsonl"
    words = ["eval", "--model", tmp_path / "base", "--probes", "--max-new-tokens", "8", "--predictions", said]
    assert cli.main([str(word) for word in words]) == 0
    assert "behaviour probes" in capsys.readouterr().out
    assert len(said.read_text().splitlines()) == 60


def test_eval_loss_does_not_move_with_the_batch_size(place, tmp_path):
    found = []
    for size in ("8", "24"):
        out = tmp_path / f"{size}.json"
        words = ["eval", "--model", place / "model", "--data", place / "validation.jsonl", "--batch-size", size]
        assert cli.main([str(w) for w in [*words, "--out", out]]) == 0
        found.append(json.loads(out.read_text()))
    assert found[0]["tokens"] == found[1]["tokens"]
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-6)


def test_both_models_answer_the_prompts_that_fit_both(place, short, asked, tmp_path, capsys):
    out = tmp_path / "e.json"
    words = ["eval", "--model", short, "--against", place / "model", "--data", place / "validation.jsonl"]
    words += ["--out", out, "--max-new-tokens", "8"]
    for prompt in ("one", "x" * 150, "two", "broken \ud83d", "three"):
        words += ["--prompt", prompt]
    assert cli.main([str(w) for w in words]) == 0
    rows = json.loads(out.read_text())["answers"]
    assert [row["messages"][0]["content"] for row in rows] == ["one", "two", "three"]
    assert all(row[str(model)] == row["messages"][0]["content"] for row in rows for model in (short, place / "model"))
    assert asked == [["one"], ["two"], ["three"]] * 2
    left_out = [line for line in capsys.readouterr().err.splitlines() if line.startswith("left out, ")]
    assert len(left_out) == 2
    assert "cannot answer 'broken \\ud83d': a text holds half of a surrogate pair" in left_out[0]
    assert re.search(
        r"short cannot answer 'x+': too long, its \d+ tokens and 8 new ones exceed 128 positions", left_out[1]
    )


def test_eval_of_a_conversation_beyond_the_context_stops_unless_a_length_drops_it(place, short, capsys, tmp_path):
    data = write_conversations(tmp_path / "long.jsonl", 3)
    messages = [{"role": "user", "content": "go"}, {"role": "assistant", "content": "na " * 60}]
    with data.open("a") as file:
        file.write(json.dumps({"id": "giant", "messages": messages}) + "\n")
    words = ["eval", "--model", short, "--data", data]
    said = fails(capsys, *words)
    assert re.search(r"short: .*giant has \d+ tokens, but the model has 128 positions", said)
    assert "set data.max_length to 128 or less" in said
    assert cli.main([str(w) for w in [*words, "--max-length", "128"]]) == 0
    out = capsys.readouterr().out
    assert "read 4, kept 3, dropped 1" in out
    assert "longer than data.max_length = 128 tokens" in out


def test_eval_tells_the_rows_of_each_model_where_they_differ(measured, tmp_path, capsys):
    out = tmp_path / "e.json"
    assert cli.main(["eval", "--model", "new", "--against", "old", "--data", "d.jsonl", "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [
        "old: read 9, kept 8, dropped 1",
        "  dropped 1: too strange",
        "new: read 9, kept 7, dropped 2",
        "  dropped 2: too strange",
    ]
    report = json.loads(out.read_text())
    assert (report["rows"]["kept"], report["against"]["rows"]["kept"]) == (7, 8)


def test_eval_reads_the_data_section_and_the_template_of_a_config(place, measured, tmp_path):
    template = tmp_path / "mine.jinja"
    template.write_text(CHATML)
    config = tmp_path / "c.py"
    config.write_text(CONFIG.replace("return", f"config.model.chat_template = {str(template)!r}\n    return"))
    words = ["eval", "--model", "new", "--against", "old", "--data", "d.jsonl", "--config", str(config)]
    assert cli.main([*words, "--config.data.train_turns=last"]) == 0
    assert [(m["path"], m["chat_template"]) for m in measured] == [("old", None), ("new", str(template))]
    assert {(m["config"].max_length, m["config"].train_turns) for m in measured} == {(128, "last")}
    measured.clear()
    assert cli.main([*words, "--chat-template", "other.jinja", "--max-length", "64"]) == 0
    assert [(m["chat_template"], m["config"].max_length) for m in measured] == [("other.jinja", 64)] * 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr=5", "--config.optim.lr: eval does not read this key; leave it out"),
        ("model.chat_template=x", "--config.model.chat_template: eval does not read this key; set --chat-template"),
        ("data.train=x", "--config.data.train: eval does not read this key; set --data instead"),
        ("data.cache=x", "--config.data.cache: eval does not read this key; leave it out"),
        ("data.max_length=9", "--max-length and --config.data.max_length are both set; leave one out"),
        ("optm.lr=5", "optm.lr is not a config key; did you mean optim.lr?"),
    ],
)
def test_eval_refuses_an_override_that_it_would_not_read(measured, capsys, override, message):
    words = ["eval", "--model", "new", "--data", "d.jsonl", "--max-length", "9", f"--config.{override}"]
    assert message in fails(capsys, *words)
    assert measured == []


def test_chat_one_shot_prints_the_answer_alone(place, capsys):
    words = ["chat", "--model", str(place / "model"), "--prompt", "hi", "--greedy", "--max-new-tokens", "3"]
    assert cli.main(words) == 0
    first = capsys.readouterr().out
    assert cli.main(words) == 0
    assert capsys.readouterr().out == first


def test_eval_reads_columns_as_overrides_say_and_reports_dropped_rows(place, tmp_path, capsys):
    rows = [json.loads(line) for line in (place / "validation.jsonl").read_text().splitlines()]
    renamed = [{"talk": row["messages"], "source": "x"} for row in rows]
    renamed.append({"talk": [{"role": "user", "content": "no answer"}], "source": "x"})
    data = tmp_path / "renamed.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in renamed))
    out = tmp_path / "e.json"
    words = ["eval", "--model", place / "model", "--data", data, "--out", out, "--config.data.columns.messages=talk"]
    assert cli.main([str(w) for w in words]) == 0
    assert json.loads(out.read_text())["rows"]["kept"] == 12
    assert "read 13, kept 12, dropped 1" in capsys.readouterr().out


def test_a_chat_whose_context_is_full_forgets_its_oldest_turns_and_goes_on(place, capsys, monkeypatch):
    lines = iter(["a" * 180, "b" * 180, "c" * 180, "d" * 600, "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    assert cli.main(["chat", "--model", str(place / "model"), "--max-new-tokens", "20", "--greedy"]) == 0
    out = capsys.readouterr().out
    assert "the oldest 2 messages were forgotten" in out
    assert "exceeds the model's" in out


def test_chat_keeps_history_until_new_and_quit(place, capsys, monkeypatch, asked):
    lines = iter(["hello", "again", "", "/new", "fresh", "/quit", "never"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    assert cli.main(["chat", "--model", str(place / "model"), "--max-new-tokens", "2", "--system", "Be kind."]) == 0
    assert asked == [
        ["Be kind.", "hello"],
        ["Be kind.", "hello", "hello", "again"],
        ["Be kind.", "fresh"],
    ]
    assert capsys.readouterr().out.splitlines()[1:] == ["hello", "again", "fresh"]


def test_a_chat_goes_on_without_a_message_that_cannot_be_encoded(place, capsys, monkeypatch, asked):
    lines = iter(["hello", "half a pair \ud83d", "again"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines, "/quit"))
    assert cli.main(["chat", "--model", str(place / "model"), "--max-new-tokens", "2"]) == 0
    assert asked == [["hello"], ["hello", "hello", "again"]]
    assert "jax-sft: a text holds half of a surrogate pair" in capsys.readouterr().out


def test_export_of_a_workdir_equals_the_export_at_its_end(workdir, tmp_path):
    out = tmp_path / "again"
    assert cli.main(["export", "--workdir", str(workdir), "--out", str(out), "--no-certificate"]) == 0
    assert not (out / "CERTIFICATE.json").exists()
    assert (out / "model.safetensors").read_bytes() == (workdir / "export" / "model.safetensors").read_bytes()


def test_export_rewrites_a_model_in_another_dtype(place, tmp_path):
    out = tmp_path / "half"
    words = ["export", "--model", str(place / "model"), "--out", str(out), "--dtype", "float16"]
    assert cli.main([*words, "--no-certificate"]) == 0
    assert json.loads((out / "config.json").read_text()).get("dtype", "float16") == "float16"


def test_every_problem_of_a_config_comes_out_at_once(place, capsys):
    text = fails(capsys, "train", "--config", place / "c.py", "--config.optim.lrr=1", "--config.train.batch_size=x")
    assert "2 problems" in text
    assert "optim.lrr is not a config key; did you mean optim.lr?" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--config", "no.py"], "no such file"),
        (["train", "--config", "{p}/c.py"], "no workdir"),
        (["train", "--config", "{p}/c.py", "--workdir", "{t}", "--config.data.train=nothing.jsonl"], "nothing.jsonl"),
        (["train", "--config", "{p}/c.py", "--workdir", "{t}", "--config.model.path={p}/nowhere"], "nowhere"),
        (["train", "--config", "{p}/c.py", "--workdir", "{t}", "--config.mesh.fsdp=3"], "there are 8 devices"),
        (["train", "--config", "{p}/c.py", "--workdir", "{t}", "--config.train.batch_size=12"], "multiple of 8"),
        (["train", "--config", "{p}/c.py", "--workdir", "{t}", "--config.optim.warmup_steps=2"], "warmup shorter"),
        (["eval", "--model", "{p}/model", "--data", "gone.jsonl"], "gone.jsonl"),
        (["export", "--workdir", "{p}", "--out", "{t}/x"], "holds no manifest.json"),
        (["export", "--model", "{p}/model", "--out", "{t}/x", "--step", "3"], "belongs to --workdir"),
        (["chat", "--model", "{p}/model", "--config.optim.lr=1"], "takes no config"),
        (["train", "--confg", "x"], "arguments are required: --config; see jax-sft train --help"),
        (["tune"], "invalid choice: 'tune'"),
        (["eval", "--model", "{p}/model", "--data", "{p}/train.jsonl", "--batch-size", "0"], "number from 1"),
        (["eval", "--model", "m", "--data", "d", "--answers", "-3"], "--answers: '-3' is not a whole number from 0"),
        (["eval", "--model", "m", "--data", "d", "--answers", "9" * 10], "from 0 to 2147483647"),
        (["data", "--config", "{p}/c.py", "--show", "-1"], "--show: '-1' is not a whole number from 0"),
        (["export", "--workdir", "{p}", "--out", "{t}/x", "--step", "-1"], "--step: '-1' is not a whole number from 0"),
        (["export", "--workdir", "{p}", "--out", "{t}/x", "--step", "last"], "'last' is not a whole number from 0"),
        (["export", "--workdir", "{p}", "--out", "{t}/x", "--step", "best"], "holds no manifest.json"),
        (["chat", "--model", "m", "--top-k", "-1"], "top_k = -1 must not be negative"),
        (["eval", "--model", "m", "--data", "d", "--out", "{p}"], "is a folder, where a file is to be written"),
        (["data", "--config", "{p}/c.py", "--html", "{p}"], "is a folder, where a file is to be written"),
        (["data", "--config", "{p}/c.py", "--dump", "{p}"], "is a folder, where a file is to be written"),
        (["eval", "--model", "m", "--against", "m", "--data", "d"], "--against names the same model"),
        (
            ["eval", "--model", "m"],
            "there is nothing to measure; name files with --data, or ask for --probes, --rules, --tasks",
        ),
        (
            ["eval", "--model", "m", "--metric", "f1"],
            "--metric compares answers with those of --data, which is not set",
        ),
        (
            ["eval", "--model", "m", "--data", "d", "--metric", "rogue1"],
            "rogue1: no metric; did you mean rouge1?; there",
        ),
        (["eval", "--model", "m", "--data", "d", "--metric", "pass_at_1"], "runs what the model wrote; say --run-code"),
        (
            ["eval", "--model", "m", "--data", "d", "--predictions", "p"],
            "--predictions holds what was said to --probes",
        ),
        (["eval", "--model", "m", "--probes", "--out", "{t}", "--predictions", "{t}"], "name two files"),
        (["eval", "--model", "m", "--probes", "no.jsonl"], "no.jsonl"),
        (["eval", "--model", "m", "--rules", "no.jsonl"], "no.jsonl"),
        (["eval", "--model", "{p}/model", "--data", "x", "--out", "{t}/no/e.json"], "does not exist; make it first"),
        (["data", "--config", "{p}/c.py", "--html", "{t}/no/d.html"], "does not exist; make it first"),
        (["train", "--config", "{p}/c.py", "--workdir", "{p}/c.py"], "cannot be made a workdir"),
        (["export", "--model", "{p}/model", "--out", "{p}/model"], "which the model was read from; name a folder"),
        (["export", "--workdir", "{p}", "--out", "{t}/x", "--revision", "r"], "belongs to --model"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_status_1(place, tmp_path, capsys, words, message):
    assert message in fails(capsys, *[w.format(p=place, t=tmp_path / "out") for w in words])


@pytest.mark.parametrize("there", [False, True])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(capsys, monkeypatch, tmp_path, measured, there):
    out = tmp_path / "e.json"
    if there:
        out.write_text("{}")
    locked = out if there else tmp_path
    may = os.access
    monkeypatch.setattr(
        "os.access", lambda path, mode: may(path, mode) and pathlib.Path(path) != locked
    )  # root may all
    assert f"{out}: cannot be written; name a file elsewhere" in fails(
        capsys, "eval", "--model", "m", "--data", "d", "--out", out
    )
    assert measured == []


@pytest.mark.parametrize("flag", ["--html", "--dump", "--card"])
def test_data_on_a_full_disk_names_the_file_and_the_way_out(place, capsys, flag):
    said = fails(capsys, "data", "--config", place / "c.py", flag, "/dev/full")
    assert said.startswith("jax-sft: /dev/full: the disk is full (No space left on device); free some space, or name a")


def test_what_is_written_replaces_no_file_of_the_data(place, capsys):
    for flag in ("--html", "--dump", "--card", "--score"):
        said = fails(capsys, "data", "--config", place / "c.py", flag, place / "train.jsonl")
        assert f"{place / 'train.jsonl'}: is a file of the data, which would be replaced; name another" in said


def test_cleaning_is_a_command_of_its_own(place, capsys, tmp_path):
    said = fails(capsys, "data", "--config", place / "c.py", "--clean", tmp_path / "o", "--html", tmp_path / "h.html")
    assert "--clean does not combine with --html; call jax-sft data once more for that" in said


def test_a_report_on_a_full_disk_names_the_file(measured, capsys):
    assert "/dev/full: the disk is full" in fails(capsys, "eval", "--model", "m", "--data", "d", "--out", "/dev/full")


def test_a_workdir_on_a_full_disk_is_named(place, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jax_sft.train_loop.make_mesh", full)
    said = fails(capsys, "train", "--config", place / "c.py", "--workdir", tmp_path / "w")
    assert said.startswith(f"jax-sft: {tmp_path / 'w'}: the disk is full")


def test_data_shows_each_validation_set_by_itself_and_what_is_held_out(place, capsys, tmp_path):
    files = {
        name: write_conversations(tmp_path / f"{name}.jsonl", n, offset=500) for name, n in (("law", 7), ("own", 5))
    }
    config = (
        (place / "c.py")
        .read_text()
        .replace(
            "    return config",
            f"    config.data.holdout = 0.3\n    config.data.validation = ({str(files['own'])!r},)\n"
            f"    config.data.validation_sets = {{'law': ({str(files['law'])!r},)}}\n    return config",
        )
    )
    (place / "several.py").write_text(config)
    assert cli.main(["data", "--config", str(place / "several.py"), "--show", "0"]) == 0
    out = capsys.readouterr().out
    told = dict(re.findall(r"── (train|validation[^─]*?) ─+\n(read \d+, kept \d+, dropped 0[^;\n]*)", out))
    count = int(re.fullmatch(r"read (\d+), kept .*", told.pop("validation, held out"))[1])
    assert 0 < count < 60
    assert told == {
        "train": f"read 60, kept {60 - count}, dropped 0, held out {count} ({count / 60:.1%})",
        "validation": "read 5, kept 5, dropped 0",
        "validation, law": "read 7, kept 7, dropped 0",
    }


def test_broken_data_names_file_and_line(place, capsys, tmp_path):
    file = write_conversations(tmp_path / "bad.jsonl", 3)
    with file.open("a") as out:
        out.write('{"messages": [}\n')
    text = fails(capsys, "data", "--config", place / "c.py", f"--config.data.train={file}")
    assert "bad.jsonl:4" in text


def test_data_without_a_trained_token_exits_1_with_the_reasons(place, capsys, tmp_path):
    file = tmp_path / "users.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "hello"}]}\n')
    assert "nothing can be trained on" in fails(
        capsys, "data", "--config", place / "c.py", f"--config.data.train={file}"
    )


def test_running_out_of_memory_is_one_sentence_with_the_way_out(place, capsys, tmp_path):
    words = ["train", "--config", place / "c.py", "--workdir", tmp_path / "w", "--config.model.attention=xla"]
    words += ["--config.data.max_length=400000", "--config.data.packing=false", "--config.evaluate.prompts=()"]
    text = fails(capsys, *words)
    assert "out of memory" in text
    assert "train.remat = 'full'" in text


@pytest.mark.parametrize("error", [RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nlong"), MemoryError("no room")])
@pytest.mark.parametrize(
    ("words", "part", "way_out"),
    [
        (["chat", "--prompt", "hi", "--model"], "assistant.load_model", "Take a smaller model, or use more devices"),
        (["chat", "--prompt", "hi", "--model"], "assistant.answer", "Lower the tokens of an answer"),
        (["eval", "--data", "{data}", "--model"], "assistant.evaluate_losses", "Lower the batch size"),
        (["export", "--out", "{out}", "--model"], "export.load_model", "on the CPU with JAX_PLATFORMS=cpu"),
        (["data", "--config", "{config}"], "data.dataset.tokenize", "Give it fewer files at a time"),
    ],
)
def test_each_command_has_its_own_advice_against_a_lack_of_memory(
    place, tmp_path, capsys, monkeypatch, error, words, part, way_out
):
    def short(*_, **__):
        raise error

    monkeypatch.setattr(f"jax_sft.{part}", short)
    paths = {"data": place / "validation.jsonl", "out": tmp_path / "out", "config": place / "c.py"}
    words = [word.format(**paths) for word in words] + ([place / "model"] if words[-1] == "--model" else [])
    said = fails(capsys, *words)
    first = "out of host memory: no room" if isinstance(error, MemoryError) else "out of memory: RESOURCE_EXHAUSTED"
    assert said.startswith(f"jax-sft: {first}") and way_out in said
    assert "train." not in said and "long" not in said


def test_the_python_door_tells_which_keys_save_memory(place, tmp_path, monkeypatch):
    import jax_sft

    def short(*_, **__):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes.")

    monkeypatch.setattr("jax_sft.train_loop.load_sets", short)
    with pytest.raises(MemoryError, match=r"allocating 5 bytes\. Raise train\.accumulation"):
        jax_sft.train(place / "c.py", workdir=tmp_path / "w")


def test_the_python_doors_tell_what_the_command_line_tells(place, tmp_path, capsys, monkeypatch):
    import jax_sft

    log = logging.getLogger("jax_sft")
    for logger in (log, logging.getLogger()):  # as in a notebook
        monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(log, "level", logging.NOTSET)
    monkeypatch.setattr(log, "propagate", True)
    overrides = ("evaluate.prompts=()", "train.steps=1", "export.certify=False")
    for _ in range(2):
        assert jax_sft.train(place / "c.py", workdir=tmp_path / "w", overrides=overrides).finished
    jax_sft.load(place / "model")
    told = capsys.readouterr().err
    assert told.count("train: read 60, kept 60") == 2  # once for each start
    assert "resuming from step 1 of 1" in told
    assert "INFO" not in told


def test_a_program_with_handlers_of_its_own_keeps_them_alone(place, monkeypatch):
    import jax_sft

    log = logging.getLogger("jax_sft")
    monkeypatch.setattr(log, "handlers", [logging.NullHandler()])
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    jax_sft.load(place / "model")
    assert len(log.handlers) == 1


def test_the_python_doors_are_as_strict_as_the_command_line(place, tmp_path):
    import jax_sft

    with pytest.raises(ValueError, match="optim.lrr is not a config key"):
        jax_sft.train(place / "c.py", workdir=tmp_path, overrides=("optim.lrr=1",))
    with pytest.raises(ValueError, match="no workdir"):
        jax_sft.train(place / "c.py")


def test_the_python_doors_train_and_load(place, tmp_path):
    import jax_sft

    outcome = jax_sft.train(str(place / "c.py"), workdir=tmp_path / "w", overrides=("evaluate.prompts=()",))
    assert outcome.finished
    model = jax_sft.load(outcome.export)
    answer = model.answer("count to 5", max_new_tokens=4)
    assert answer.tokens <= 4
    losses, account = model.losses([str(place / "validation.jsonl")])
    assert losses.tokens > 0
    assert account.kept == 12
    with pytest.raises(ValueError, match="message 0 is"):
        model.answer([{"content": "no role"}])


def test_main_module_runs_the_same_door(place):
    words = [sys.executable, "-m", "jax_sft", "train", "--config", str(place / "c.py")]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=pathlib.Path(__file__).parent.parent)
    assert done.returncode == cli.EXIT_USER_ERROR
    assert done.stderr == "jax-sft: no workdir: pass --workdir W, or set it in the config\n"


@pytest.mark.parametrize(
    ("platform", "reason"), [("cuda", "no such platform|cuda"), ("banana", "Unable to initialize")]
)
def test_a_platform_that_is_not_there_is_one_sentence(tmp_path: pathlib.Path, platform: str, reason: str):
    command = [sys.executable, "-m", "jax_sft", "chat", "--model", str(tmp_path), "--prompt", "hi"]
    done = subprocess.run(
        command, env={**os.environ, "JAX_PLATFORMS": platform}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert re.search(
        rf"^jax-sft: JAX_PLATFORMS={platform}: JAX cannot start: .*({reason}).*unset JAX_PLATFORMS$", done.stderr, re.M
    )
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("address", ["garbage", "host:port", ":1234"])
def test_an_address_that_is_none_is_one_sentence(monkeypatch, address: str):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", address)
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    with pytest.raises(ValueError, match=f"JAX_COORDINATOR_ADDRESS = '{address}' must be host:port"):
        start_distributed()


def test_a_push_that_fails_keeps_the_export(place, tmp_path, capsys, monkeypatch):
    asked = {}

    def refuse(folder, name, **options):
        asked.update(options, folder=folder, name=name)
        raise ValueError(f"push to {name}: no")

    monkeypatch.setattr("jax_sft.hf.push.check_push", lambda name: None)
    monkeypatch.setattr("jax_sft.hf.push.push", refuse)
    monkeypatch.setattr(sys, "argv", ["x", "export", "--out", "a b"])
    out = tmp_path / "out"
    words = [
        "export",
        "--model",
        place / "model",
        "--out",
        out,
        "--push-to-hub",
        "org/name",
        "--private",
        "--no-certificate",
    ]
    assert fails(capsys, *words) == "jax-sft: push to org/name: no\n"
    assert asked == {"folder": out, "name": "org/name", "private": True, "again": "jax-sft export --out 'a b'"}
    assert (out / "model.safetensors").is_file()
    assert 'from_pretrained("org/name")' in (out / "README.md").read_text()
    monkeypatch.setattr("jax_sft.hf.push.push", lambda *_, **__: "https://hub/org/name")
    assert cli.main([str(w) for w in words]) == 0
    assert capsys.readouterr().out.endswith("pushed to https://hub/org/name\n")


def test_a_push_that_cannot_be_is_refused_before_the_export(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("jax_sft.export.export_model", lambda *_, **__: pytest.fail("exported"))
    words = ["export", "--model", place / "model", "--out", tmp_path / "out"]
    assert "HF_HUB_OFFLINE switches the hub off" in fails(capsys, *words, "--push-to-hub", "org/name")
    assert "'name' is no name of the hub; write org/name, or user/name" in fails(
        capsys, *words, "--push-to-hub", "name"
    )
    assert "--private belongs to --push-to-hub" in fails(capsys, *words, "--private")


def test_report_of_a_folder_that_is_no_workdir_says_so(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 1
    assert str(tmp_path) in capsys.readouterr().err
