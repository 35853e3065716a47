"""The door: commands, exit codes, and one clear sentence for everything a user can mend."""

import json
import pathlib
import re

import pytest

from jax_sft import cli
from tests.tiny import run_config, tiny_tokenizer, write_conversations

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
    html, dump = tmp_path / "d.html", tmp_path / "d.jsonl"
    words = ["data", "--config", place / "c.py", "--show", "1", "--html", html, "--dump", dump]
    assert cli.main([str(w) for w in words]) == 0
    out = capsys.readouterr().out
    assert "60" in out
    assert "count to" in out
    assert "count to" in re.sub("<[^>]*>", "", html.read_text())
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


def test_eval_loss_does_not_move_with_the_batch_size(place, tmp_path):
    found = []
    for size in ("8", "24"):
        out = tmp_path / f"{size}.json"
        words = ["eval", "--model", place / "model", "--data", place / "validation.jsonl", "--batch-size", size]
        assert cli.main([str(w) for w in [*words, "--out", out]]) == 0
        found.append(json.loads(out.read_text()))
    assert found[0]["tokens"] == found[1]["tokens"]
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-6)


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


def test_chat_keeps_history_until_new_and_quit(place, capsys, monkeypatch):
    lines = iter(["hello", "again", "/new", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    assert cli.main(["chat", "--model", str(place / "model"), "--max-new-tokens", "2", "--seed", "1"]) == 0
    assert "/new" in capsys.readouterr().out


def test_export_of_a_workdir_equals_the_export_at_its_end(workdir, tmp_path):
    out = tmp_path / "again"
    assert cli.main(["export", "--workdir", str(workdir), "--out", str(out)]) == 0
    assert (out / "model.safetensors").read_bytes() == (workdir / "export" / "model.safetensors").read_bytes()


def test_export_rewrites_a_model_in_another_dtype(place, tmp_path):
    out = tmp_path / "half"
    assert cli.main(["export", "--model", str(place / "model"), "--out", str(out), "--dtype", "float16"]) == 0
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
        (["eval", "--model", "{p}/model", "--data", "{p}/train.jsonl", "--batch-size", "0"], "above 0"),
        (["eval", "--model", "m", "--against", "m", "--data", "d"], "--against names the same model"),
        (["eval", "--model", "{p}/model", "--data", "x", "--out", "{t}/no/e.json"], "does not exist; make it first"),
        (["data", "--config", "{p}/c.py", "--html", "{t}/no/d.html"], "does not exist; make it first"),
        (["train", "--config", "{p}/c.py", "--workdir", "{p}/c.py"], "cannot be made a workdir"),
        (["export", "--model", "{p}/model", "--out", "{p}/model"], "model"),
        (["export", "--workdir", "{p}", "--out", "{t}/x", "--revision", "r"], "belongs to --model"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_status_1(place, tmp_path, capsys, words, message):
    assert message in fails(capsys, *[w.format(p=place, t=tmp_path / "out") for w in words])


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


def test_main_module_runs_the_same_door():
    text = pathlib.Path(cli.__file__).with_name("__main__.py").read_text()
    assert "from jax_sft.cli import main" in text
