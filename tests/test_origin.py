"""Forgetting in a run: measured against the model before its first step, alarmed at, ended; and the remedies."""

import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jax_sft.config import ConfigError, RunConfig, default, from_config_dict
from jax_sft.export import export_workdir
from jax_sft.signals import Signals
from jax_sft.train_loop import train
from tests.tiny import run_config

TEXTS = ("The river was low that summer, and boats lay in the mud.", "她把信放在桌上，没有打开。", "x = [1, 2, 3]")
FREE: dict[str, Any] = {name: {"alarm": None, "stop": None} for name in ("loss_rise", "kl", "agreement")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    place = tmp_path_factory.mktemp("forgetting")
    run_config(place)
    lines = [json.dumps({"text": text, "language": ("en", "zh", "code")[i]}) for i, text in enumerate(TEXTS)]
    (place / "general.jsonl").write_text("\n".join(lines) + "\n")
    return place


def forgetful(folder: pathlib.Path, *overrides: str, levels: dict[str, Any] = FREE, every: int = 2) -> RunConfig:
    config = default()
    config.update(run_config(folder).to_dict())
    config.evaluate.every_steps = every
    config.mesh.data, config.mesh.fsdp = 8, 1
    config.evaluate.forgetting.update({"texts": str(folder / "general.jsonl"), "task_batches": 1, **levels})
    return from_config_dict(config, overrides)


def measured(workdir: pathlib.Path, name: str) -> dict[int, float]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


@pytest.fixture(scope="module")
def free(folder) -> pathlib.Path:
    train(forgetful(folder), folder / "free", command="test")
    return folder / "free"


def weights(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    return load_file(workdir / "export" / "model.safetensors")


def test_a_run_measures_how_far_it_has_gone_from_where_it_started(free):
    kl = measured(free, "forgetting/kl")
    assert set(kl) == {0, 2, 4, 6}
    assert kl[0] == pytest.approx(0, abs=1e-6) and 0 < kl[2] < kl[4] < kl[6]
    agreement, task = measured(free, "forgetting/agreement"), measured(free, "forgetting/task_kl")
    assert agreement[0] == 1 and task[0] == pytest.approx(0, abs=1e-6) and task[6] > task[2] > 0
    assert len(set(measured(free, "forgetting/base_loss").values())) == 1
    rise, loss = measured(free, "forgetting/loss_rise"), measured(free, "forgetting/loss")
    assert rise[6] == pytest.approx(loss[6] - loss[0], abs=1e-5)
    file = json.loads((free / "evaluations" / "00000006.json").read_text())
    assert file["forgetting"]["kl"] == kl[6] and set(file["forgetting"]["by_source"]) == {"en", "zh", "code"}
    assert not (free / "alarms.jsonl").exists()


def test_measuring_it_does_not_change_what_is_trained(folder, free):
    train(run_config(folder, "mesh.data=8", "mesh.fsdp=1"), folder / "unmeasured", command="test")
    mine, theirs = weights(free), weights(folder / "unmeasured")
    assert all(np.array_equal(mine[name], theirs[name]) for name in theirs)


def test_going_too_far_raises_the_alarm_and_the_stop_ends_the_run_at_its_best_step(folder, free, caplog):
    kl = measured(free, "forgetting/kl")
    levels = {**FREE, "kl": {"alarm": (kl[0] + kl[2]) / 2, "stop": (kl[2] + kl[4]) / 2}}
    caplog.set_level("INFO", logger="jax_sft")
    outcome = train(forgetful(folder, levels=levels), folder / "stopped", command="test")
    assert outcome.finished and outcome.step == 4
    alarms = [json.loads(line) for line in (folder / "stopped" / "alarms.jsonl").read_text().splitlines()]
    assert [(a["step"], a["kind"], a["level"]) for a in alarms] == [
        (2, "forgetting", "alarm"),
        (4, "forgetting", "stop"),
    ]
    assert "average them with the base at export" in alarms[1]["text"]
    assert "the training ends at step 4 of 6: the model has forgotten more" in caplog.text
    assert "the weights of step 2 are exported" in caplog.text
    # Started again it is still over; with a higher level it goes on.
    again = train(forgetful(folder, levels=levels), folder / "stopped", command="test")
    assert again.finished and again.step == 4
    levels["kl"]["stop"] = 1e9
    assert train(forgetful(folder, levels=levels), folder / "stopped", command="test").step == 6


def test_the_best_step_may_be_the_one_that_forgot_least(folder, tmp_path, caplog):
    caplog.set_level("INFO", logger="jax_sft")
    train(forgetful(folder, "evaluate.best=forgetting/kl", "export.weights=best"), tmp_path / "run", command="test")
    assert "the weights of step 2 are exported: 0" in caplog.text


@pytest.mark.parametrize(
    "remedy", [("train.base_kl=2",), ("optim.decay_to_base=30",), ("train.ema_decay=0.9",)], ids=lambda r: r[0]
)
def test_each_remedy_holds_the_model_nearer_to_its_base(folder, free, tmp_path, remedy):
    train(forgetful(folder, *remedy), tmp_path / "run", command="test")
    mine, theirs = (measured(w, "forgetting/kl")[6] for w in (tmp_path / "run", free))
    assert mine < 0.9 * theirs
    assert bool(measured(tmp_path / "run", "base_kl")) == (remedy[0] == "train.base_kl=2")


@pytest.mark.parametrize("lora", [(), ("lora.rank=4", "export.format=adapter")], ids=["full", "lora"])
def test_a_run_that_is_held_back_and_averaged_goes_on_exactly(folder, tmp_path, monkeypatch, lora):
    extra = () if lora else ("optim.decay_to_base=5",)
    config = forgetful(folder, "train.base_kl=1", "train.ema_decay=0.9", *extra, *lora)
    whole = train(config, tmp_path / "whole", command="test")

    class Stopped(Signals):
        """A signal comes during the third step."""

        looks = 0

        @property
        def received(self):
            self.looks += 1
            return self.looks >= 3

        @received.setter
        def received(self, value):
            pass

    with monkeypatch.context() as patch:
        patch.setattr("jax_sft.train_loop.Signals", Stopped)
        patch.setattr(Signals, "stop_if_received", lambda _: None)
        assert not train(config, tmp_path / "cut", command="test").finished
    rest = train(config, tmp_path / "cut", command="test")
    assert whole.finished and rest.finished
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    mine, theirs = (load_file(tmp_path / w / "export" / name) for w in ("whole", "cut"))
    assert all(np.array_equal(mine[key], theirs[key]) for key in mine)
    for key in ("loss", "base_kl", "forgetting/kl", "forgetting/task_kl", "validation/loss"):
        assert measured(tmp_path / "whole", key) == measured(tmp_path / "cut", key)


def test_what_is_averaged_is_what_is_evaluated_and_exported(folder, free, tmp_path):
    config = forgetful(folder, "train.ema_decay=0.9")
    train(config, tmp_path / "run", command="test")
    export_workdir(tmp_path / "run", tmp_path / "again", certified=False)
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(np.array_equal(again[name], x) for name, x in weights(tmp_path / "run").items())
    assert measured(tmp_path / "run", "loss") == measured(free, "loss")
    assert measured(tmp_path / "run", "validation/loss")[6] != measured(free, "validation/loss")[6]
    assert any(not np.array_equal(again[name], x) for name, x in weights(free).items())


@pytest.mark.parametrize("base", ["bfloat16", "nf4"])
def test_adapters_are_compared_with_the_frozen_weights_and_drawn_to_them(folder, tmp_path, base):
    lora = ("lora.rank=4", f"lora.base={base}", "optim.lr=0.01", "export.format=adapter")
    for name, pull in (("free", ()), ("drawn", ("train.base_kl=20",))):
        train(forgetful(folder, *lora, *pull), tmp_path / name, command="test")
    free, drawn = (measured(tmp_path / name, "forgetting/task_kl") for name in ("free", "drawn"))
    assert free[0] == pytest.approx(0, abs=1e-6)
    assert 0 < drawn[6] < 0.9 * free[6]


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (("evaluate.forgetting.texts=nowhere.jsonl",), r"texts: there is no file nowhere.jsonl; name a .jsonl or .txt"),
        (("evaluate.forgetting.texts=None",), r"forgetting.task_batches is set, but evaluate.forgetting.texts is not"),
        (("evaluate.forgetting.every_steps=3",), r"every_steps = 3 must be a multiple of evaluate.every_steps = 2"),
        (("evaluate.forgetting.kl.alarm=-1",), r"forgetting.kl.alarm = -1.* is no level; give a number from 0 on"),
        (("evaluate.forgetting.agreement.stop=70",), r"agreement.stop = 70.* is no level; give a share from 0 to 1"),
        (
            ("evaluate.forgetting.kl.alarm=0.5", "evaluate.forgetting.kl.stop=0.2"),
            r"kl stops at 0.2 before it alarms at 0.5; exchange the two",
        ),
        (
            ("evaluate.forgetting.agreement.alarm=0.5", "evaluate.forgetting.agreement.stop=0.9"),
            r"agreement stops at 0.9 before it alarms at 0.5; exchange",
        ),
        (("evaluate.best=forgetting/kl", "evaluate.forgetting.texts=None", "evaluate.forgetting.task_batches=4"),
         r"is not measured; set evaluate.forgetting.texts"),
        (("optim.decay_to_base=1", "lora.rank=4"), r"optim.decay_to_base with adapters: .* optim.weight_decay"),
        (("train.ema_decay=1",), r"train.ema_decay = 1.* must lie between 0 and 1"),
        (("train.base_kl=-1",), r"train.base_kl = -1.* must not be negative"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused_before_anything_is_loaded(folder, overrides, fault):
    with pytest.raises(ConfigError, match=fault):
        forgetful(folder, *overrides, levels={})


def test_texts_of_which_none_can_be_compared_are_refused(folder, tmp_path):
    (tmp_path / "short.txt").write_text("a\n")
    with pytest.raises(ValueError, match="none of the 1 general texts has two tokens"):
        train(forgetful(folder, f"evaluate.forgetting.texts={tmp_path / 'short.txt'}"), tmp_path / "run", command="t")


def test_forgetting_is_the_same_on_any_mesh(folder, free, tmp_path):
    train(forgetful(folder, "mesh.data=1", "mesh.fsdp=8"), tmp_path / "run", command="test")
    assert jax.device_count() == 8
    for key in ("forgetting/kl", "forgetting/task_kl", "forgetting/loss"):
        mine, theirs = measured(tmp_path / "run", key), measured(free, key)
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-6)
