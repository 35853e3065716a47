"""What a run measures of its model: behaviour before, on the way and at the end; alarms; and nothing of it trains."""

import json
import pathlib
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from jax_sft.config import ConfigError, RunConfig, default, from_config_dict
from jax_sft.evaluations import Measured
from jax_sft.run_progress import RunProgress
from jax_sft.signals import Signals
from jax_sft.train_loop import train
from tests.tiny import run_config

PROBES = (
    {"id": "a", "kind": "answer", "language": "en", "messages": [{"role": "user", "content": "count to 3"}]},
    {"id": "b", "kind": "answer", "language": "en", "messages": [{"role": "user", "content": "count to 4"}]},
)
RULES = (
    {"key": 1, "prompt": "Say it without commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    place = tmp_path_factory.mktemp("evaluations")
    run_config(place)
    for name, lines in (("probes", PROBES), ("rules", RULES)):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return place


def asking(folder: pathlib.Path, **evaluate: Any) -> RunConfig:
    config = default()
    config.update(run_config(folder, "train.steps=4").to_dict())
    config.evaluate.update(
        {
            "every_steps": 1,
            "probes": str(folder / "probes.jsonl"),
            "rules": str(folder / "rules.jsonl"),
            "metrics": ("exact_match", "f1"),
            "metric_rows": 3,
            "max_new_tokens": 8,
            "behaviour_every_steps": 2,
            **evaluate,
        }
    )
    return from_config_dict(config)


def lines_of(workdir: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def measured(folder) -> pathlib.Path:
    train(asking(folder), folder / "measured", command="test")
    return folder / "measured"


def test_behaviour_is_measured_untrained_on_the_way_and_at_the_end(measured):
    files = sorted(path.name for path in (measured / "evaluations").glob("*.json"))
    assert files == ["00000000.json", "00000002.json", "00000004.json"]
    last = json.loads((measured / "evaluations" / files[-1]).read_text())
    assert last["step"] == 4 and {"f1", "exact_match"} == set(last["metrics"]["validation"])
    assert last["probes"]["count"] == 2 and last["rules"]["prompts"] == 1
    predictions = (measured / "evaluations" / "00000004.predictions.jsonl").read_text()
    told = [json.loads(line) for line in predictions.split("\n")[:-1]]
    assert [line["id"].partition("/")[0] for line in told] == ["probes"] * 2 + ["rules"] + ["validation"] * 3
    by_step = {line["step"]: line for line in lines_of(measured) if "probes/answers" in line}
    assert set(by_step) == {0, 2, 4}
    assert {"probes/stops", "rules/prompt_strict", "rules/instruction_loose", "metric/validation/f1"} <= set(by_step[4])


def test_measuring_does_not_change_what_is_trained(folder, measured):
    quiet = asking(folder, every_steps=None, probes=None, rules=None, metrics=(), behaviour_every_steps=None)
    train(quiet, folder / "quiet", command="test")
    mine, theirs = (load_file(w / "export" / "model.safetensors") for w in (measured, folder / "quiet"))
    assert all(np.array_equal(mine[name], theirs[name]) for name in mine)
    losses = [[(x["step"], x["loss"]) for x in lines_of(w) if "loss" in x] for w in (measured, folder / "quiet")]
    assert losses[0] == losses[1]


def test_the_gap_is_the_validation_loss_less_the_training_loss_since_the_last_evaluation(measured):
    lines = lines_of(measured)
    gaps = {line["step"]: line["validation/gap"] for line in lines if "validation/gap" in line}
    trained = {line["step"]: line["loss"] for line in lines if "loss" in line}
    measured_losses = {line["step"]: line["validation/loss"] for line in lines if "validation/loss" in line}
    assert set(gaps) == {1, 2, 3, 4}
    for step, gap in gaps.items():
        assert gap == pytest.approx(measured_losses[step] - trained[step], abs=1e-6)


def test_any_number_that_is_measured_may_choose_the_best_step(folder, tmp_path):
    config = asking(folder, best="validation/accuracy", behaviour_every_steps=None)
    train(config, tmp_path / "run", command="test")
    accuracy = {x["step"]: x["validation/accuracy"] for x in lines_of(tmp_path / "run") if "validation/accuracy" in x}
    saved = sorted((tmp_path / "run" / "checkpoints").glob("*/host/metadata"))
    losses = {int(path.parts[-3]): json.loads(path.read_text())["loss"] for path in saved}
    best = max((step for step in accuracy if step), key=lambda step: accuracy[step])
    assert losses[best] == -accuracy[best]


def test_a_best_that_nothing_measures_is_refused_before_training(folder, tmp_path):
    with pytest.raises(ValueError, match=r"evaluate.best = 'metric/validation/f2' is not measured; did you mean"):
        train(asking(folder, best="metric/validation/f2"), tmp_path / "run", command="test")


def test_a_best_of_a_run_that_measures_nothing_is_refused_too(folder):
    config = default()
    config.update(asking(folder, probes=None, rules=None, metrics=(), behaviour_every_steps=None).to_dict())
    config.data.validation, config.evaluate.prompts, config.evaluate.best = (), ("hi",), "probes/answers"
    with pytest.raises(ConfigError, match=r"evaluate.best = 'probes/answers' is not measured; set evaluate.probes"):
        from_config_dict(config)


def test_of_steps_that_are_equally_good_the_first_is_exported(folder, tmp_path, caplog):
    # Within two tokens nothing stops: the share is 0 at every step.
    config = asking(folder, best="probes/stops", max_new_tokens=2, patience=1, behaviour_every_steps=None)
    caplog.set_level("INFO", logger="jax_sft")
    outcome = train(config, tmp_path / "run", command="test")
    assert outcome.step == 2
    assert "the weights of step 1 are exported" in caplog.text and "without a better step" in caplog.text


@pytest.mark.parametrize(
    ("looks", "steps", "every_steps"),
    [
        ((2, 1, None, None), [2, 3, 4, 4], 2),  # at 2 with its evaluation owed; at 3; to the end; nothing left to do
        ((5, None, None), [4, 4, 4], None),  # that of the last step is owed
    ],
)
def test_an_evaluation_that_was_made_up_for_stays_through_later_starts(
    folder, tmp_path, monkeypatch, looks, steps, every_steps
):
    config = asking(folder, every_steps=2, behaviour_every_steps=every_steps)

    class Stopped(Signals):
        """A signal comes during a step."""

        after: int | None = None

        @property
        def received(self):
            self.looks = getattr(self, "looks", 0) + 1
            return self.after is not None and self.looks >= self.after

        @received.setter
        def received(self, value):
            pass

    monkeypatch.setattr("jax_sft.train_loop.Signals", Stopped)
    monkeypatch.setattr(Signals, "stop_if_received", lambda self: None)
    found = []
    for Stopped.after in looks:
        found.append(train(config, tmp_path / "run", command="test").step)
    assert found == steps
    train(config, tmp_path / "whole", command="test")

    def told(name: str) -> list[tuple[int, list[str]]]:
        timings = ("seconds", "per_s", "mfu", "padding_share")
        lines = lines_of(tmp_path / name)
        return sorted((x["step"], sorted(k for k in x if not any(t in k for t in timings))) for x in lines)

    assert told("run") == told("whole")


def test_a_loss_that_is_not_finite_is_no_lowest():
    progress = RunProgress()
    assert progress.overfitting(2, float("nan"), 2.0, rise=0.02) is None
    assert progress.overfitting(4, 1.5, 1.9, rise=0.02) is None and progress.lowest == (4, 1.5, 1.9)
    assert progress.overfitting(6, 1.6, 1.0, rise=0.02) is not None


def test_a_behaviour_that_applied_to_no_answer_is_not_measured_this_time(folder):
    config = asking(folder, best="probes/language")
    assert Measured(2, values={"probes/answers": 0.5}).deciding(config) is None
    assert Measured(2, values={"probes/language": 0.5}).deciding(config) == -0.5


def test_a_run_that_learns_by_heart_raises_an_alarm(folder, tmp_path):
    few = tmp_path / "few.jsonl"
    few.write_text("".join((folder / "train.jsonl").read_text().splitlines(keepends=True)[:2]))
    config = default()
    config.update(asking(folder, probes=None, rules=None, metrics=(), behaviour_every_steps=None).to_dict())
    config.data.train, config.train.steps = (str(few),), 16
    config.optim.lr, config.optim.schedule, config.train.batch_size = 0.03, "constant", 8
    config.evaluate.every_steps = 4
    train(from_config_dict(config), tmp_path / "run", command="test")
    alarms = [json.loads(line) for line in (tmp_path / "run" / "alarms.jsonl").read_text().splitlines()]
    assert alarms and {alarm["kind"] for alarm in alarms} == {"overfitting"}
    assert "above its lowest" in alarms[0]["text"] and "evaluate.patience" in alarms[0]["text"]


def test_a_run_that_learns_in_good_order_raises_none(measured):
    assert not (measured / "alarms.jsonl").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"probes": "/nowhere.jsonl"}, "evaluate.probes: there is no file /nowhere.jsonl"),
        ({"metrics": ("f2",)}, "evaluate.metrics: 'f2' is no metric; did you mean f1"),
        ({"metrics": ("pass_at_1",)}, "pass_at_1 runs what the model wrote; set evaluate.run_code = True"),
        ({"run_code": True}, "evaluate.run_code is for the metric pass_at_1"),
        ({"behaviour_every_steps": 3, "every_steps": 2}, "must be a multiple of evaluate.every_steps = 2"),
        (
            {"probes": None, "rules": None, "metrics": ()},
            "behaviour_every_steps is set, but none of evaluate.probes, rules and metrics",
        ),
        ({"best": "forgotten/kl"}, "evaluate.best = 'forgotten/kl' is no name of metrics.jsonl"),
        ({"best": "rules/prompt_loose", "rules": None}, "is not measured; set evaluate.rules"),
        ({"best": "loss/odd"}, "evaluate.best = 'loss/odd' is no name of metrics.jsonl"),
    ],
)
def test_what_cannot_be_asked_is_refused_at_the_door(folder, changes, message):
    with pytest.raises(ConfigError, match=message):
        asking(folder, **changes)


def test_prompts_without_room_for_an_answer_are_left_out_and_counted(folder, tmp_path, caplog):
    long = dict(PROBES[0], id="long", messages=[{"role": "user", "content": "count " * 100}])
    path = tmp_path / "probes.jsonl"
    path.write_text(json.dumps(PROBES[0]) + "\n" + json.dumps(long) + "\n")
    config = asking(folder, probes=str(path), rules=None, metrics=(), behaviour_every_steps=None, every_steps=None)
    train(config, tmp_path / "run", command="test")
    assert "1 prompts of the probes and rules are left out" in caplog.text
    assert json.loads((tmp_path / "run" / "evaluations" / "00000000.json").read_text())["probes"]["count"] == 1
