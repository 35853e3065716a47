"""Runs that are measured by several sets, or by what is held out of their own files."""

import json
import pathlib
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from jax_sft.checkpoint import Checkpoints
from jax_sft.config import RunConfig, default, from_config_dict
from jax_sft.data.holdout import MEASURED, is_held_out
from jax_sft.data.source import training_parts, validation_parts
from jax_sft.export import export_workdir
from jax_sft.run_data import load_sets
from jax_sft.train_loop import train
from tests.data.chats import tokenizer_for
from tests.data.test_holdout import asked
from tests.tiny import CHATML, run_config, write_conversations

SHORT = {"train": {"steps": 2}, "evaluate": {"every_steps": 1}, "checkpoint": {"every_steps": 1, "keep": 1}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    place = tmp_path_factory.mktemp("validation")
    run_config(place)
    write_conversations(place / "other.jsonl", 20, offset=300)
    return place


def measured(folder: pathlib.Path, **data: Any) -> RunConfig:
    config = default()
    config.update(run_config(folder).to_dict())
    config.update(SHORT)
    config.data.update(data)
    return from_config_dict(config)


def evaluations(workdir: pathlib.Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "validation/loss" in line]


def test_named_sets_have_losses_of_their_own_and_one_of_them_may_choose_the_best(folder, tmp_path, monkeypatch):
    saved: dict[int, float | None] = {}
    save = Checkpoints.save

    def noting(self, step, *args, loss, **options):
        saved[step] = loss
        return save(self, step, *args, loss=loss, **options)

    monkeypatch.setattr(Checkpoints, "save", noting)
    sets = {name: (str(folder / f"{name}.jsonl"),) for name in ("validation", "other")}
    config = measured(folder, validation=(), validation_sets=sets)
    for best, key in ((None, "validation/loss"), ("other", "validation/loss/other")):
        changed = default()
        changed.update(config.to_dict())
        changed.evaluate.best = best
        train(from_config_dict(changed), tmp_path / str(best), command="test")
        lines = {line["step"]: line for line in evaluations(tmp_path / str(best))}
        assert {step: lines[step][key] for step in (1, 2)} == saved
        for line in lines.values():
            assert {f"validation/{what}/{name}" for what in ("loss", "accuracy") for name in sets} <= set(line)
            assert line["validation/loss/other"] != line["validation/loss"] != line["validation/loss/validation"]


def test_what_is_held_out_is_measured_and_not_trained_on(folder, tmp_path):
    sets = {name: {"paths": (str(folder / f"{name}.jsonl"),)} for name in ("train", "other")}
    config = measured(folder, train=(), validation=(), sets=sets, holdout=0.3)
    outcome = train(config, tmp_path / "run", command="test")
    assert outcome.before is not None and set(outcome.before.by_source) == {"train", "other"}
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["config"]["data"]["holdout"] == 0.3
    template = template_of(folder)
    trained, held_out = load_sets(config, template, tmp_path / "sets", max_positions=512)
    assert held_out is not None
    ids = [{found.ids[i] for i in range(len(found))} for found in (trained, held_out)]
    assert not ids[0] & ids[1]
    assert len(ids[0]) + len(ids[1]) == 80 == trained.account.read
    assert trained.account.held_out == len(ids[1]) == held_out.account.read


@pytest.mark.slow
def test_a_run_ends_when_the_loss_has_not_fallen_for_long_and_exports_the_best(folder, tmp_path):
    config = default()
    few = write_conversations(tmp_path / "few.jsonl", 3, offset=500)  # it learns these by heart
    config.update(measured(folder, train=(str(few),)).to_dict())
    config.train.steps, config.optim.lr, config.checkpoint.every_steps = 20, 0.02, 100
    config.optim.schedule = "constant"
    config.evaluate.patience, config.export.certify, config.export.dtype = 2, False, "float32"
    outcome = train(from_config_dict(config), tmp_path / "run", command="test")
    lines = evaluations(tmp_path / "run")
    losses = {line["step"]: line["validation/loss"] for line in lines}
    best = min(losses, key=lambda step: losses[step])
    assert outcome.finished and 0 < best < outcome.step == best + 2 < 20

    def exported(workdir: pathlib.Path) -> dict[str, np.ndarray]:
        return load_file(workdir / "export" / "model.safetensors")

    export_workdir(tmp_path / "run", tmp_path / "best", step=best, dtype="float32", certified=False)
    of_best = load_file(tmp_path / "best" / "model.safetensors")
    found = exported(tmp_path / "run")
    assert all(np.array_equal(found[name], of_best[name]) for name in of_best)
    # Started again it has nothing to do; with more patience it goes on as one that had it from the start.
    again = train(from_config_dict(config), tmp_path / "run", command="test")
    assert again.step == outcome.step and len(evaluations(tmp_path / "run")) == len(lines)
    config.evaluate.patience, config.export.weights = 50, "last"
    for name in ("run", "whole"):
        train(from_config_dict(config), tmp_path / name, command="test")
    on, whole = exported(tmp_path / "run"), exported(tmp_path / "whole")
    assert all(np.array_equal(on[name], whole[name]) for name in whole)
    assert not all(np.array_equal(on[name], of_best[name]) for name in whole)


@pytest.mark.slow
def test_where_the_untrained_model_is_the_best_a_step_is_exported_and_that_is_said(folder, tmp_path, caplog):
    config = default()
    config.update(measured(folder).to_dict())
    config.train.steps, config.optim.lr, config.checkpoint.every_steps = 8, 5.0, 100
    config.evaluate.patience, config.export.certify = 2, False
    with caplog.at_level("INFO"):
        outcome = train(from_config_dict(config), tmp_path / "run", command="test")
    losses = {line["step"]: line["validation/loss"] for line in evaluations(tmp_path / "run")}
    untrained = losses.pop(0)
    best = min(losses, key=lambda step: losses[step])
    assert untrained < losses[best] and outcome.step == best + 2
    said = f"the weights of step {best} are exported: {losses[best]:.4f} is the lowest validation loss of a step; the"
    assert f"{said} untrained model's is {untrained:.4f}" in caplog.text
    # Another validation set: what the old one said of the steps does not count.
    config.data.validation = (str(folder / "other.jsonl"),)
    config.train.steps = 8
    caplog.clear()
    with caplog.at_level("INFO"):
        train(from_config_dict(config), tmp_path / "run", command="test")
    later = {line["step"]: line["validation/loss"] for line in evaluations(tmp_path / "run")}
    later = {step: loss for step, loss in later.items() if step > outcome.step}
    best = min(later, key=lambda step: later[step])
    assert f"the weights of step {best} are exported" in caplog.text


def template_of(folder: pathlib.Path) -> Any:
    from jax_sft.data.chat import ChatTemplate

    return ChatTemplate(tokenizer_for(CHATML), template=CHATML)


def test_a_share_that_holds_out_nothing_is_told(folder, tmp_path):
    config = measured(folder, validation=(), holdout=1e-9)
    with pytest.raises(ValueError, match=r"data\.holdout = 1e-09 holds out none of these conversations; raise it, or"):
        load_sets(config, template_of(folder), tmp_path, max_positions=512)


def test_a_share_that_holds_out_nothing_beside_validation_files_is_told(folder, tmp_path):
    config = measured(folder, holdout=1e-9)
    with pytest.raises(ValueError, match=r"data\.holdout = 1e-09 holds out none of the 60 conversations; raise it, or"):
        load_sets(config, template_of(folder), tmp_path, max_positions=512)


def test_a_share_that_leaves_nothing_to_train_on_is_told(folder, tmp_path):
    held_out = next(i for i in range(900, 999) if is_held_out(asked(f"count to {i}"), 0.5))
    place = write_conversations(tmp_path / "one.jsonl", 1, offset=held_out)
    config = measured(folder, train=(str(place),), holdout=0.5)
    with pytest.raises(
        ValueError, match=r"one\.jsonl: nothing is left to train on; data\.holdout = 0\.5 holds out 1 of 1"
    ):
        load_sets(config, template_of(folder), tmp_path, max_positions=512)


def test_a_named_set_of_which_nothing_is_left_is_told(folder, tmp_path):
    place = tmp_path / "empty.jsonl"
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "na " * 900}]
    place.write_text(json.dumps({"messages": turns}))
    config = measured(folder, validation_sets={"law": (str(place),)})
    with pytest.raises(ValueError, match=r"data\.validation_sets\.law: none of its conversations is left to measure"):
        load_sets(config, template_of(folder), tmp_path, max_positions=512)


def test_other_validation_files_are_another_account_of_the_same_training_set(folder, tmp_path):
    beside = tmp_path / "beside.jsonl"  # another content under the same name is another key of the cache
    found = []
    for offset in (300, 0):
        write_conversations(beside, 60, offset=offset)
        config = measured(folder, validation=(str(beside),))
        found.append(load_sets(config, template_of(folder), tmp_path, max_positions=512)[0])
    first, second = found
    assert first.fingerprint == second.fingerprint
    assert (first.account.noted.get(MEASURED), second.account.noted.get(MEASURED)) == (None, 60)


def test_a_set_of_which_nothing_is_held_out_cannot_choose_the_best(folder, tmp_path):
    kept = next(i for i in range(900, 999) if not is_held_out(asked(f"count to {i}"), 0.2))
    write_conversations(folder / "one.jsonl", 1, offset=kept)
    sets = {name: {"paths": (str(folder / f"{name}.jsonl"),)} for name in ("train", "one")}
    config = measured(folder, train=(), validation=(), sets=sets, holdout=0.2)
    changed = default()
    changed.update(config.to_dict())
    changed.evaluate.best = "one"
    with pytest.raises(ValueError, match=r"evaluate\.best = 'one': none of its conversations is held out; raise"):
        load_sets(from_config_dict(changed), template_of(folder), tmp_path, max_positions=512)
    assert len(training_parts(config.data)) == len(validation_parts(config.data)) == 2
