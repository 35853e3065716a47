"""An export holds the weights of the step that was asked for, and its card says of them only what is true."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jax_sft.checkpoint import Checkpoints
from jax_sft.config import MeshConfig
from jax_sft.evaluate.losses import Losses
from jax_sft.export import export_model, export_workdir, training_facts
from jax_sft.hf.load import load_model
from jax_sft.optim import optimizer
from jax_sft.sharding import make_mesh
from jax_sft.train_step import init_state
from tests.tiny import run_config

BEFORE, AFTER = (Losses(loss=loss, accuracy=0.5, tokens=9.0, by_source={}) for loss in (5.0, 3.0))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Checkpoints whose weights are the base times 2 (step 2) and times 4 (step 4); validation ran at step 2 alone."""
    place = tmp_path_factory.mktemp("export")
    config, folder = run_config(place, "model.vocab_multiple=1"), place / "run"
    mesh = make_mesh(MeshConfig())
    base = load_model(config.model.path, mesh=mesh)
    tx = optimizer(config.optim, 6, base.params)
    checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint, fingerprint={"seed": 0})
    for step in (2, 4):
        state = init_state(jax.tree.map(lambda x, step=step: x * np.float32(step), base.params), tx, mesh)
        notes = {"before": BEFORE, "after": AFTER}
        notes = {name: dataclasses.asdict(losses) for name, losses in notes.items()} | {"after_step": 2}
        checkpoints.save(step, state, notes, loss={2: AFTER.loss}.get(step), wait=True)
    checkpoints.close()
    (folder / "manifest.json").write_text(json.dumps({"config": config.to_dict()}))
    return folder


@pytest.fixture(scope="module")
def base(workdir):
    return load_file(workdir.parent / "model" / "model.safetensors")


def assert_scaled(out, base, factor):
    found = load_file(out / "model.safetensors")
    assert found.keys() == base.keys()
    for name, value in base.items():
        np.testing.assert_array_equal(found[name], value * np.float32(factor), err_msg=name)


@pytest.mark.parametrize(("step", "factor"), [(None, 4), (2, 2), ("best", 2)])
def test_the_export_holds_the_weights_of_the_newest_step_or_of_the_one_asked_for(workdir, base, tmp_path, step, factor):
    assert export_workdir(workdir, tmp_path / "out", step=step, certified=False) == factor
    assert_scaled(tmp_path / "out", base, factor)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| steps | {factor} |" in card and "| training data | train.jsonl |" in card
    assert str(workdir.parent) not in card  # a card is for everybody
    assert ("| validation loss after | 3.0 |" in card) == (factor == 2)


def test_a_step_without_a_checkpoint_is_an_error_that_names_the_steps_there_are(workdir, tmp_path):
    with pytest.raises(ValueError, match="no checkpoint of step 3; the steps there are 2, 4"):
        export_workdir(workdir, tmp_path / "out", step=3)
    assert not (tmp_path / "out").exists()


def test_without_a_validation_loss_no_step_is_the_best(workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "00000002")
    with pytest.raises(ValueError, match="run: none of its checkpoints was saved with a validation loss.*leave --step"):
        export_workdir(tmp_path / "run", tmp_path / "out", step="best", certified=False)


def test_a_folder_without_a_manifest_is_no_workdir(tmp_path):
    with pytest.raises(ValueError, match=r"holds no manifest\.json.*name the folder given to --workdir"):
        export_workdir(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("text", ["{", "{}", "[1]", ""])
def test_a_damaged_manifest_says_how_to_mend_it(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json: is damaged.*once more"):
        export_workdir(tmp_path, tmp_path / "out")


def test_the_dtype_asked_for_wins_over_the_one_of_the_config(workdir, tmp_path):
    export_workdir(workdir, tmp_path / "half", dtype="float16", certified=False)
    assert {x.dtype for x in load_file(tmp_path / "half" / "model.safetensors").values()} == {np.dtype(np.float16)}


def test_a_rewritten_model_has_its_weights_and_names_its_source(workdir, base, tmp_path):
    source = workdir.parent / "model"
    export_model(str(source), tmp_path / "out", dtype="float32", certified=False)
    assert_scaled(tmp_path / "out", base, 1)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| rewritten from | model |" in card and str(tmp_path.parent) not in card


def test_facts_without_validation_name_no_loss(tmp_path):
    config = run_config(tmp_path, "optim.lr=0.5", "data.max_length=64")
    facts = training_facts(config, 6, None, None)
    assert not [name for name in facts if "loss" in name]
    assert (facts["steps"], facts["learning rate"], facts["row length"]) == (6, 0.5, 64)
    assert training_facts(config, 6, BEFORE, AFTER)["validation loss after"] == 3.0
