"""Between the base and what was trained: exact at both ends, the mean in the middle, and swept in one command."""

import json
import pathlib

import numpy as np
import pytest
from safetensors.numpy import load_file

from jax_sft.cli import main
from jax_sft.train_loop import train
from tests.tiny import run_config, write_model

ONE_AXIS = ("mesh.data=8", "mesh.fsdp=1", "train.steps=3")
LORA = ("lora.rank=4", "lora.base=float32", "export.format=adapter")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    place = tmp_path_factory.mktemp("interpolate")
    train(run_config(place, *ONE_AXIS), place / "full", command="test")
    train(run_config(place, *ONE_AXIS, *LORA), place / "lora", command="test")
    train(run_config(place, *ONE_AXIS, *LORA, "lora.dora=True"), place / "dora", command="test")
    return place


def export(folder: pathlib.Path, run: str, out: pathlib.Path, *flags: str) -> dict[str, np.ndarray]:
    assert main(["export", "--workdir", str(folder / run), "--out", str(out), "--dtype", "float32", *flags]) == 0
    return load_file(next(out.glob("*.safetensors")))


def test_both_ends_are_bit_for_bit_the_base_and_what_was_trained(folder, tmp_path):
    trained, base = (load_file(folder / name / "model.safetensors") for name in ("full/export", "model"))
    for factor, wanted in (("1", trained), ("0", base)):
        found = export(folder, "full", tmp_path / factor, "--interpolate", factor)
        assert set(found) == set(wanted)
        assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


def test_in_the_middle_is_the_mean_and_its_certificate_and_card_say_so(folder, tmp_path):
    found = export(folder, "full", tmp_path / "half", "--interpolate", "0.5")
    trained, base = (load_file(folder / name / "model.safetensors") for name in ("full/export", "model"))
    for name, x in found.items():
        np.testing.assert_allclose(x, (trained[name] + base[name]) / 2, atol=1e-6)
    assert json.loads((tmp_path / "half" / "CERTIFICATE.json").read_text())
    card = (tmp_path / "half" / "README.md").read_text()
    assert "0.5 of the way" in card and "validation loss after" not in card


def test_adapters_alone_and_merged_are_the_same_model_at_any_factor(folder, tmp_path):
    export(folder, "lora", tmp_path / "adapter", "--interpolate", "0.3")
    merged = export(folder, "lora", tmp_path / "merged", "--interpolate", "0.3", "--format", "merged")
    flags = ["--model", str(folder / "model"), "--adapter", str(tmp_path / "adapter"), "--dtype", "float32"]
    assert main(["export", *flags, "--out", str(tmp_path / "beside")]) == 0
    beside = load_file(tmp_path / "beside" / "model.safetensors")
    for name, x in merged.items():
        np.testing.assert_allclose(x, beside[name], atol=1e-6)
    # An adapter that is scaled down once more: 0.3 x 0.5.
    assert main(["export", *flags, "--out", str(tmp_path / "less"), "--interpolate", "0.5"]) == 0
    base, less = load_file(folder / "model" / "model.safetensors"), load_file(tmp_path / "less" / "model.safetensors")
    for name, x in less.items():
        np.testing.assert_allclose(x, (base[name] + merged[name]) / 2, atol=1e-6)


def test_dora_is_averaged_where_it_is_merged(folder, tmp_path):
    whole = export(folder, "dora", tmp_path / "whole", "--format", "merged")
    half = export(folder, "dora", tmp_path / "half", "--format", "merged", "--interpolate", "0.5")
    base = load_file(folder / "model" / "model.safetensors")
    for name, x in half.items():
        np.testing.assert_allclose(x, (base[name] + whole[name]) / 2, atol=1e-6)


@pytest.mark.parametrize("run", ["full", "lora"])
def test_a_sweep_writes_and_measures_a_folder_of_each_factor(folder, tmp_path, capsys, run):
    (tmp_path / "texts.txt").write_text("The boats lay in the mud.\n\n她把信放在桌上。\n")
    flags = ["--interpolate", "0", "0.5", "1", "--data", str(folder / "validation.jsonl"), "--no-certificate"]
    flags += ["--texts", str(tmp_path / "texts.txt"), "--dtype", "float32"]
    assert main(["export", "--workdir", str(folder / run), "--out", str(tmp_path / "out"), *flags]) == 0
    assert "| 0.5 | " in capsys.readouterr().out
    points = json.loads((tmp_path / "out" / "interpolate.json").read_text())
    assert [point["factor"] for point in points] == [0, 0.5, 1]
    losses, kls = ([p[part][key] for p in points] for part, key in (("losses", "loss"), ("forgetting", "kl")))
    assert losses[0] > losses[1] > losses[2] and kls[0] == pytest.approx(0, abs=1e-6) and kls[0] < kls[1] < kls[2]
    out = tmp_path / "again.json"
    model = ["--model", str(tmp_path / "out" / "interpolate-0.5")]
    if run == "lora":
        model = ["--model", str(folder / "model"), "--adapter", model[1]]
    assert main(["eval", *model, "--data", str(folder / "validation.jsonl"), "--out", str(out)]) == 0
    assert json.loads(out.read_text())["loss"] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        (["--interpolate", "1.5"], "--interpolate 1.5: 0 is the base and 1 what was trained; choose between them"),
        (["--interpolate", "nan"], "--interpolate nan: 0 is the base"),
        (["--interpolate", "half"], "invalid float value: 'half'"),
        (["--interpolate", "0.5", "0.5"], "--interpolate names 0.5 twice; leave one out"),
        (["--data", "x.jsonl"], "--data and --texts measure what --interpolate writes, which is not set"),
        (["--interpolate", "0.5", "1", "--push-to-hub", "a/b"], "--push-to-hub pushes one folder"),
        (["--interpolate", "0.5", "--texts", "--push-to-hub", "a/b"], "--push-to-hub pushes one folder"),
    ],
)
def test_what_cannot_be_meant_is_refused(folder, tmp_path, capsys, flags, fault):
    assert main(["export", "--workdir", str(folder / "full"), "--out", str(tmp_path / "out"), *flags]) == 1
    assert fault in capsys.readouterr().err


def test_what_has_no_base_or_no_proportion_is_refused(folder, tmp_path, capsys):
    model = ["--model", str(folder / "full" / "export"), "--interpolate", "0.5"]
    assert main(["export", *model, "--out", str(tmp_path / "out")]) == 1
    assert "--interpolate needs what was trained and its base; name a --workdir" in capsys.readouterr().err
    assert (
        main(["export", "--workdir", str(folder / "dora"), "--out", str(tmp_path / "o"), "--interpolate", "0.5"]) == 1
    )
    assert "what DoRA adapters add is no multiple" in capsys.readouterr().err


def test_a_base_that_has_changed_since_is_not_averaged_with(folder, tmp_path, capsys):
    run = tmp_path / "run"
    config = run_config(tmp_path, *ONE_AXIS)
    train(config, run, command="test")
    write_model(tmp_path / "model", seed=7)
    assert main(["export", "--workdir", str(run), "--out", str(tmp_path / "out"), "--interpolate", "0.5"]) == 1
    assert "was trained on other weights" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
