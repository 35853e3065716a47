"""Whole runs whose training files are streamed: stopping, killing and moving them changes nothing."""

import contextlib
import json
import logging
import pathlib
import shutil
from typing import Any

import pytest

from jax_sft import cli
from jax_sft.config import ConfigError, RunConfig, default, from_config_dict
from jax_sft.signals import Signals
from jax_sft.train_loop import train
from tests.test_train_loop import assert_same_run, finish, losses, metrics, start, start_two
from tests.tiny import run_config, write_conversations

STREAM = ("data.stream.on=true", "data.stream.block=6", "data.stream.unit_bytes=2000")


class Signalled(Signals):
    """A signal came during the first step of a start."""

    @contextlib.contextmanager
    def collected(self):
        with super().collected():
            self.received = True
            yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    place = tmp_path_factory.mktemp("tiny")
    run_config(place)
    (place / "many").mkdir()
    for i in range(3):
        write_conversations(place / "many" / f"{i}.jsonl", 40, offset=100 * i)
    write_conversations(place / "few.jsonl", 40, offset=500)
    return place


def streamed(folder: pathlib.Path, **changes: Any) -> RunConfig:
    """Two sets in two stages of three steps."""
    config: Any = default()
    config.update(run_config(folder).to_dict())
    config.data.train = ()
    config.data.sets = {
        "few": {"paths": (str(folder / "few.jsonl"),), "weight": 1.0},
        "many": {"paths": (str(folder / "many"),), "weight": 3.0, "loss_weight": 0.5},
    }
    config.data.stream.update({"on": True, "block": 6, "unit_bytes": 2000})
    config.train.steps = None
    config.stages = ({"steps": 3}, {"steps": 3, "weights": {"few": 3.0, "many": 1.0}})
    config.update(changes)
    return from_config_dict(config)


@pytest.fixture(scope="module")
def whole(folder: pathlib.Path) -> pathlib.Path:
    outcome: Any = train(streamed(folder), folder / "whole", command="test")
    assert outcome.finished and outcome.after.loss < 0.9 * outcome.before.loss
    return folder / "whole"


def test_a_run_stopped_after_each_step_ends_bit_for_bit_like_one_that_was_not(folder, whole, monkeypatch, caplog):
    workdir = folder / "stopped"
    for step in range(1, 6):
        with monkeypatch.context() as patch:
            patch.setattr("jax_sft.train_loop.Signals", Signalled)
            assert train(streamed(folder), workdir, command="test").step == step
    with caplog.at_level(logging.INFO, "jax_sft"):
        assert train(streamed(folder), workdir, command="test").finished
    assert "train, since this start: read " in caplog.text  # what the five starts before read is not in it
    assert_same_run(workdir, whole)
    assert by_source(workdir) == by_source(whole)


def by_source(workdir: pathlib.Path) -> list[dict[str, float]]:
    """Losses and shares by set of each step."""
    return [{name: m[name] for name in m if "/" in name} for m in metrics(workdir) if "loss" in m]


def test_the_log_and_the_metrics_say_what_was_read(folder, whole):
    (*_, last) = [m for m in metrics(whole) if "data/read" in m]
    assert last["step"] == 6
    assert last["data/read"] == last["data/kept"] > 60
    assert last["data/dropped"] == 0
    both = [m for m in metrics(whole) if "loss/few" in m and "loss/many" in m]
    assert both and all(m["share/few"] + m["share/many"] == pytest.approx(1) for m in both)


def test_a_run_with_other_shards_is_no_resume(folder, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "w")
    write_conversations(folder / "many" / "9.jsonl", 5)
    try:
        with pytest.raises(ValueError, match=r"(?s)data: '\w+' when saved, '\w+' now"):
            train(streamed(folder), tmp_path / "w", command="test")
    finally:
        (folder / "many" / "9.jsonl").unlink()
    with pytest.raises(ValueError, match=r"data\.stream\.block: 6 when saved, 7 now"):
        train(streamed(folder, data={"stream": {"block": 7}}), tmp_path / "w", command="test")


def test_rows_longer_than_the_context_are_refused_before_training(folder, tmp_path):
    with pytest.raises(ValueError, match=r"data\.max_length = 1024, but the model has 512 positions .*stream may fill"):
        train(run_config(folder, *STREAM, "data.max_length=1024"), tmp_path / "w", command="test")


def test_a_torn_shard_stops_the_run_with_its_name_and_is_skipped_if_the_config_says_so(folder, tmp_path):
    (tmp_path / "data").mkdir()
    for i in range(3):
        write_conversations(tmp_path / "data" / f"{i}.jsonl", 40, offset=100 * i)
    with (tmp_path / "data" / "1.jsonl").open("r+b") as file:
        file.truncate(3000)
    config = (*STREAM, f"data.train={tmp_path / 'data'}", "train.steps=12", "data.workers=1")
    with pytest.raises(ValueError, match=r"data/1\.jsonl:\d+: broken JSON"):
        train(run_config(folder, *config), tmp_path / "w", command="test")
    assert train(run_config(folder, *config, "data.stream.unreadable=skip"), tmp_path / "x", command="test").finished
    (*_, last) = [m for m in metrics(tmp_path / "x") if "data/read" in m]
    assert last["data/dropped"] >= 1 and last["data/read"] == last["data/kept"] + last["data/dropped"]


@pytest.mark.slow
def test_a_run_of_two_processes_equals_one_and_goes_on_in_one(folder):
    stream = (*STREAM, "mesh.fsdp=2", "train.steps=8", "checkpoint.every_steps=4", "data.validation=()")
    alone, together = folder / "alone", folder / "together"
    finish(start(folder, alone, *stream, devices=2))
    for process in start_two(folder, together, *stream):
        finish(process)
    assert [step for step, _ in losses(together)] == list(range(1, 9))
    for (_, mine), (_, theirs) in zip(losses(together), losses(alone), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-6)
    # The step that two processes saved in the middle, gone on with by one.
    moved = folder / "moved"
    shutil.copytree(together, moved, ignore=shutil.ignore_patterns("export", "00000008"))
    assert "resuming from step 4 of 8" in finish(start(folder, moved, *stream, devices=2))
    for (_, mine), (_, theirs) in zip(losses(moved), losses(alone), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-6)


def test_the_data_command_shows_the_first_blocks_of_a_stream_and_says_so(folder, tmp_path, capsys):
    config = tmp_path / "config.py"
    config.write_text(
        "import json\nfrom jax_sft.config import default\n\ndef get_config():\n    config = default()\n"
        f"    config.update(json.loads({json.dumps(json.dumps(streamed(folder).to_dict()))}))\n    return config\n"
    )
    assert cli.main(["data", "--config", str(config), "--dump", str(tmp_path / "d.jsonl")]) == 0
    said = capsys.readouterr().out
    assert "the first block of each lane of the stream: " in said and "2 shards" not in said
    dumped = [json.loads(line) for line in (tmp_path / "d.jsonl").read_text().splitlines()]
    assert {line["source"] for line in dumped} == {"few", "many"} and 30 < len(dumped) <= 60


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": (), "train": {"epochs": 1.0}}, r"train\.epochs: nobody knows how long an epoch of data\.stream is"),
        ({"stages": ({"epochs": 1.0},)}, r"stages\.0\.epochs: nobody knows how long .*; set stages\.0\.steps instead"),
        ({"stages": ({"steps": 1, "order": "length"},)}, r"stages\.0\.order = 'length' sorts all there is"),
        ({"data": {"holdout": 0.1}}, r"data\.holdout would read all of data\.stream before training"),
        ({"data": {"temperature": 2.0}}, r"data\.temperature needs the sizes of all sets"),
        ({"data": {"stream": {"predicted": 129}}}, r"predicted = 129 is more than the data\.max_length = 128"),
        ({"data": {"stream": {"block": 0}}}, r"data\.stream\.block = 0 must be greater than 0"),
        ({"data": {"stream": {"unit_bytes": -1}}}, r"data\.stream\.unit_bytes = -1 must be greater than 0"),
        ({"data": {"stream": {"on": False}}}, r"data\.stream\.block is set, but data\.stream\.on is False"),
    ],
)
def test_what_does_not_go_with_a_stream_is_told_at_the_door(folder, changes, message):
    with pytest.raises(ConfigError, match=message):
        streamed(folder, **changes)


@pytest.mark.parametrize("key", ["count", "epochs", "cap"])
def test_sizes_that_only_a_whole_set_has_are_told_at_the_door(folder, key):
    told = (
        rf"(?s)data\.sets\.few\.{key} counts all of the set.*data\.sets\.few has no weight, and data\.stream does not"
    )
    few, many = {"weight": None, key: 1}, {"weight": None}
    with pytest.raises(ConfigError, match=told):
        streamed(folder, data={"sets": {"few": few, "many": many}}, stages=({"steps": 3},))


def test_weights_of_all_stages_are_enough(folder):
    sets = {name: {"weight": None} for name in ("few", "many")}
    run = streamed(folder, data={"sets": sets}, stages=({"steps": 3, "weights": {"few": 1.0}},))
    assert run.data.stream.on and run.stages[0].weights == {"few": 1.0}
