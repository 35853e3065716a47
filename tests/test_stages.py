"""Runs of several sets and stages: what is drawn, what is told of it, and what a stage starts from."""

import contextlib
import json
import pathlib
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from jax_sft.checkpoint import Checkpoints
from jax_sft.config import RunConfig, default, from_config_dict
from jax_sft.signals import Signals
from jax_sft.step_log import StepLog
from jax_sft.train_loop import train
from tests.tiny import run_config, write_conversations

STAGES = [
    {"name": "short ones", "steps": 2, "order": "length", "weights": {"few": 3.0, "many": 1.0}},
    {"name": "too fast", "steps": 2, "lr": 3.0},
    {"name": "on from the best", "steps": 2, "start": "best"},
]


class Signalled(Signals):
    """A signal came during the first step of a start."""

    @contextlib.contextmanager
    def collected(self):
        with super().collected():
            self.received = True
            yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    place = tmp_path_factory.mktemp("stages")
    run_config(place)
    write_conversations(place / "few.jsonl", 10, offset=200)
    return place


def staged(folder: pathlib.Path, **changes: Any) -> RunConfig:
    """Two sets in three stages, the second of which ruins the model."""
    config = default()
    config.update(run_config(folder).to_dict())
    config.data.train = ()
    config.data.sets = {
        "few": {"paths": (str(folder / "few.jsonl"),)},
        "many": {"paths": (str(folder / "train.jsonl"),), "loss_weight": 0.5},
    }
    config.train.steps = None
    config.stages = tuple(STAGES)
    config.log.every_steps = 1
    config.optim.clip_norm = None
    config.update(changes)
    return from_config_dict(config)


@pytest.fixture(scope="module")
def whole(folder: pathlib.Path) -> pathlib.Path:
    outcome = train(staged(folder), folder / "whole", command="test")
    assert outcome.finished and outcome.step == 6
    return folder / "whole"


def metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_every_step_tells_its_stage_and_the_loss_and_share_of_each_set(whole):
    steps = [m for m in metrics(whole) if "loss" in m]
    assert [m["stage"] for m in steps] == [0, 0, 1, 1, 2, 2]
    for m in steps:
        names = [name for name in ("few", "many") if f"loss/{name}" in m]
        assert sum(m[f"share/{name}"] for name in names) == pytest.approx(1)
        assert sum(m[f"share/{n}"] * m[f"loss/{n}"] for n in names) == pytest.approx(m["loss"], rel=1e-5)
    assert any("loss/few" in m and "loss/many" in m for m in steps)


def test_a_stage_is_evaluated_and_saved_at_its_end_and_starts_its_own_learning_rate(whole):
    evaluated = [m["step"] for m in metrics(whole) if "validation/loss" in m]
    assert evaluated == [0, 2, 4, 6]
    rates = [m["lr"] for m in metrics(whole) if "lr" in m]
    assert rates[0] == rates[4] == pytest.approx(1e-2) and rates[2] == pytest.approx(3.0)
    assert rates[1] < rates[0] and rates[3] < rates[2]


def test_a_stage_that_starts_from_the_best_forgets_the_one_that_ruined_it(whole):
    loss = {m["step"]: m["validation/loss"] for m in metrics(whole) if "validation/loss" in m}
    trained = {m["step"]: m["loss"] for m in metrics(whole) if "loss" in m}
    assert loss[4] > 2 * loss[2] and loss[6] < loss[2]
    assert trained[4] > 1.5 * trained[2] and trained[5] < 1.2 * trained[2]
    checkpoints = Checkpoints(whole / "checkpoints", staged(whole.parent).checkpoint, fingerprint=None)
    assert checkpoints.best_step == 6
    checkpoints.close()


def test_a_run_stopped_after_every_step_ends_bit_for_bit_the_same(folder, whole, monkeypatch):
    workdir = folder / "stopped"
    for step in range(1, 6):
        with monkeypatch.context() as patch:
            patch.setattr("jax_sft.train_loop.Signals", Signalled)
            assert train(staged(folder), workdir, command="test").step == step
    assert train(staged(folder), workdir, command="test").finished
    mine, theirs = ([m["loss"] for m in metrics(w) if "loss" in m] for w in (workdir, whole))
    assert mine == theirs
    left, right = (load_file(w / "export" / "model.safetensors") for w in (workdir, whole))
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


@pytest.mark.parametrize("step", [3, 4, 5])  # before the end of the stage is saved, after it, and into the next stage
def test_a_run_killed_at_the_end_of_a_stage_ends_bit_for_bit_the_same(folder, whole, monkeypatch, step):
    workdir = folder / f"killed {step}"
    pend = StepLog.pend

    def killed(self, at, measured):
        if at == step:
            raise RuntimeError("killed")
        pend(self, at, measured)

    with monkeypatch.context() as patch:
        patch.setattr(StepLog, "pend", killed)
        with pytest.raises(RuntimeError, match="killed"):
            train(staged(folder), workdir, command="test")
    outcome = train(staged(folder), workdir, command="test")
    assert outcome.finished and outcome.step == 6
    left, right = (load_file(w / "export" / "model.safetensors") for w in (workdir, whole))
    for name in right:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def test_each_stage_says_what_it_is_as_it_begins(folder, tmp_path, caplog):
    with caplog.at_level("INFO", logger="jax_sft"):
        train(staged(folder), tmp_path, command="test")
    assert [r.getMessage() for r in caplog.records if "begins" in r.getMessage()] == [
        "stage 1 of 3 (short ones) begins: steps 1 to 2; weights few 3, many 1; short ones first; learning rate 0.01",
        "stage 2 of 3 (too fast) begins: steps 3 to 4; in random order; learning rate 3; from the last step",
        "stage 3 of 3 (on from the best) begins: steps 5 to 6; in random order; learning rate 0.01; from the step of "
        "the lowest validation loss",
    ]


def test_a_stage_in_the_order_of_scores_needs_those_it_draws_and_is_resumed_by_the_same_alone(folder, tmp_path):
    scores = tmp_path / "scores.jsonl"
    stages = {"steps": 2, "order": "score", "weights": {"few": 1.0}}, {"steps": 1}

    def run() -> None:
        train(
            staged(folder, stages=stages, data={"quality": {"scores": str(scores)}}), tmp_path / "run", command="test"
        )

    lines = [json.dumps({"id": f"c{i}", "loss": 300 - i}) for i in range(200, 210)]
    scores.write_text("\n".join(lines[1:]))
    with pytest.raises(ValueError, match=r"no loss for 1 of the 10 sequences .* \(first: c200\); score the files"):
        run()
    scores.write_text("\n".join(lines))
    run()
    scores.write_text("\n".join(reversed(lines)))
    with pytest.raises(ValueError, match=r"cannot go on with another configuration(.|\n)*  data\.quality\.scores: "):
        run()


def test_other_stages_or_weights_are_no_resume(folder, whole):
    other = [*STAGES[:2], {**STAGES[2], "steps": 3}]
    with pytest.raises(ValueError, match=r"cannot go on with another configuration(.|\n)*  stages: "):
        train(staged(folder, stages=tuple(other)), whole, command="test")
    sets = staged(folder).to_dict()["data"]["sets"]
    sets["few"] |= {"count": 3}
    with pytest.raises(ValueError, match=r"data\.sets\.few\.count: None when saved, 3 now"):
        train(staged(folder, data={"sets": sets}), whole, command="test")
