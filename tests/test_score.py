"""`jax-sft data --score`: its file is whole or not there, the same from one process or two, and can be gone on with."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest

from jax_sft import cli
from jax_sft.data.scores import read_scores
from jax_sft.evaluate import difficulty
from tests.tiny import run_config

CONFIG = """
import pathlib
from jax_sft import config
def get_config():
    folder = pathlib.Path(__file__).parent
    c = config.default()
    c.model.path, c.model.dtype = str(folder / "model"), "float32"
    c.data.train, c.data.max_length = (str(folder / "train.jsonl"),), 128
    c.train.steps = 1
    return c
"""
REPOSITORY = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("score")
    run_config(folder)
    (folder / "c.py").write_text(CONFIG)
    return folder


def words_of(place, out, *overrides):
    words = ["data", "--config", place / "c.py", "--score", out, *(f"--config.{override}" for override in overrides)]
    return [str(word) for word in words]


def score(place, out, *overrides):
    assert cli.main(words_of(place, out, *overrides)) == 0
    return read_scores(out)


def refused(capsys, words):
    assert cli.main(words) == cli.EXIT_USER_ERROR
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def whole(place):
    return score(place, place / "whole.jsonl")


def assert_same(left, right, rel=1e-5):
    assert [(s.id, s.tokens) for s in left] == [(s.id, s.tokens) for s in right]
    for name in ("loss", "loss_without_prompt", "ratio"):
        assert [getattr(s, name) for s in left] == pytest.approx([getattr(s, name) for s in right], rel=rel)


def test_every_conversation_has_a_line_and_the_terminal_says_what_stands_out(place, tmp_path, capsys):
    out = tmp_path / "s.jsonl"
    found = score(place, out)
    assert [s.id for s in found] == [f"c{i}" for i in range(60)]
    assert json.loads(out.read_text().splitlines()[0]).keys() == {
        "id", "loss", "loss_without_prompt", "ratio", "tokens",
    }  # fmt: skip
    assert all(s.ratio == pytest.approx(s.loss / s.loss_without_prompt, rel=1e-6) for s in found)
    said = capsys.readouterr().out
    assert "scored 60 conversations" in said
    assert "highest ratio:" in said
    assert f"wrote {out} and {out}.svg" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.jsonl", "s.jsonl.svg"]


@pytest.mark.slow
def test_adapters_that_a_config_would_train_do_not_count_and_those_of_a_folder_do(place, tmp_path, whole):
    fresh = score(place, tmp_path / "a.jsonl", "lora.rank=4", "lora.base=float32")
    assert fresh == whole
    words = ["train", "--config", place / "c.py", "--workdir", tmp_path / "w", "--config.lora.rank=4"]
    words += ["--config.lora.base=float32", "--config.optim.lr=0.1", "--config.lora.b_lr_ratio=10"]
    assert cli.main([str(word) for word in [*words, "--config.export.certify=False"]]) == 0
    trained = score(place, tmp_path / "b.jsonl", "lora.base=float32", f"lora.adapter={tmp_path / 'w' / 'export'}")
    assert trained != whole
    assert [s.id for s in trained] == [s.id for s in whole]


@pytest.mark.parametrize("base", ["bfloat16", "int8", "nf4"])
def test_a_base_that_is_held_in_less_scores_nearly_the_same(place, tmp_path, whole, base):
    found = score(place, tmp_path / "s.jsonl", "lora.rank=4", f"lora.base={base}")
    assert found != whole
    assert_same(found, whole, rel=0.05)


def test_a_set_with_an_id_twice_is_refused_before_the_model_is_built(place, tmp_path, capsys, monkeypatch):
    rows = (place / "train.jsonl").read_text().splitlines(keepends=True)
    twice = tmp_path / "twice.jsonl"
    twice.write_text("".join(rows[:5]) + rows[2].replace("?", "!"))
    monkeypatch.setattr("jax_sft.score.build", lambda *_, **__: pytest.fail("it was built"))
    said = refused(capsys, words_of(place, tmp_path / "s.jsonl", f"data.train={twice}"))
    assert "the id 'c2' is that of conversation 3 " in said and "and of conversation 6 " in said
    assert [path.name for path in tmp_path.iterdir()] == ["twice.jsonl"]
    monkeypatch.undo()
    found = score(place, tmp_path / "s.jsonl", f"data.train={twice}", "data.quality.same_id=drop")
    assert [s.id for s in found] == [f"c{i}" for i in range(5)]


def test_an_interrupted_scoring_goes_on_and_ends_the_same(place, tmp_path, capsys, monkeypatch, caplog):
    monkeypatch.setattr(difficulty, "_BATCHES_IN_CHUNK", 1)
    monkeypatch.setattr(difficulty, "_SHORTEST_ROW", 1)
    expected = score(place, tmp_path / "expected.jsonl")
    out, done, chunk = tmp_path / "s.jsonl", [], difficulty.Scorer._chunk

    def until(self, begin, ends, progress):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(len(ends))
        return chunk(self, begin, ends, progress)

    monkeypatch.setattr(difficulty.Scorer, "_chunk", until)
    assert "interrupted" in refused(capsys, words_of(place, out))
    assert not out.exists()
    (partial,) = tmp_path.glob("s.jsonl.*.partial")
    assert len(partial.read_text().splitlines()) == sum(done)
    monkeypatch.setattr(difficulty.Scorer, "_chunk", chunk)
    caplog.clear()
    assert score(place, out) == expected
    assert f"goes on behind the {sum(done)} conversations that are scored there" in caplog.text
    assert not list(tmp_path.glob("*.partial"))


def test_what_another_model_or_other_data_left_is_not_gone_on_with(place, tmp_path, capsys, monkeypatch):
    def broken(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(difficulty.Scorer, "_chunk", broken)
    names = set()
    for override in ("seed=0", "model.dtype=bfloat16", "data.max_length=100", "train.batch_size=16", "lora.rank=2"):
        words = words_of(place, tmp_path / "s.jsonl", override)
        made = []
        monkeypatch.setattr("jax_sft.score.PartialFile", _remember(made))
        refused(capsys, words)
        names.add(made[0])
    assert len(names) == 5


def _remember(made):
    from jax_sft.data.scores import PartialFile

    def make(path, fingerprint):
        made.append(fingerprint)
        return PartialFile(path, fingerprint)

    return make


def test_a_file_that_is_no_scores_is_refused_before_the_work(place, capsys):
    other = place / "other.jsonl"
    other.write_bytes((place / "train.jsonl").read_bytes())
    said = refused(capsys, words_of(place, other))
    assert "other.jsonl: is there already and holds no scores, so it is not replaced" in said
    assert other.read_bytes() == (place / "train.jsonl").read_bytes()


def test_old_scores_are_replaced(place, tmp_path, whole):
    out = tmp_path / "s.jsonl"
    out.write_text((place / "whole.jsonl").read_text().splitlines()[0] + "\n")
    assert score(place, out) == whole


def test_wrong_words_are_told(place, tmp_path, capsys):
    out = tmp_path / "s.jsonl"
    assert "--score does not combine with --html, --card and --dump" in refused(
        capsys, [*words_of(place, out), "--dump", str(tmp_path / "d")]
    )
    assert "cannot be spread over" in refused(capsys, words_of(place, out, "train.batch_size=3"))
    assert "does not exist; make it first" in refused(capsys, words_of(place, tmp_path / "no" / "s.jsonl"))
    assert not out.exists()


def test_texts_without_prompts_have_no_ratio(place, tmp_path, capsys):
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(4)))
    found = score(place, tmp_path / "s.jsonl", f"data.train={path}")
    assert [(s.id, s.ratio, s.loss_without_prompt) for s in found] == [(f"{path}:{i}", None, None) for i in range(1, 5)]
    assert "4 of them have no prompt, so that there is no ratio" in capsys.readouterr().out


def test_a_lack_of_memory_says_what_to_lower(place, tmp_path, capsys, monkeypatch):
    def short(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr("jax_sft.score.make_mesh", short)
    assert "Lower train.batch_size or train.loss_chunk_tokens, hold the weights in less" in refused(
        capsys, words_of(place, tmp_path / "s.jsonl")
    )


@pytest.mark.slow
def test_two_processes_write_what_one_does(place, tmp_path, whole):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    out = tmp_path / "s.jsonl"
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "jax_sft", *words_of(place, out)],
            env={
                **os.environ,
                "JAX_NUM_CPU_DEVICES": "2",
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(i),
            },
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    said = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert_same(read_scores(out), whole)
    assert ["scored 60 conversations" in text for text in said] == [True, False]
