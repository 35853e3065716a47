"""Whole runs of a tiny model: what they leave behind, and that stopping, killing and moving them changes nothing."""

import contextlib
import fcntl
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jax_sft.checkpoint import Checkpoints
from jax_sft.evaluate.answers import answer
from jax_sft.hf.load import load_configured
from jax_sft.model.decoder import abstract_params
from jax_sft.run_data import resume_fingerprint
from jax_sft.sharding import make_mesh, shard_params
from jax_sft.signals import Signals, StoppedError
from jax_sft.step_log import NonFiniteLossError
from jax_sft.train_loop import train
from tests.tiny import CHATML, run_config, write_conversations, write_model

REPOSITORY = pathlib.Path(__file__).parent.parent
LAUNCHER = """
import logging, pathlib, sys
from jax_sft.cli.start import start_devices, start_distributed
logging.basicConfig(format="%(message)s")
logging.getLogger("jax_sft").setLevel(logging.INFO)
from tests.tiny import run_config
start_distributed()
start_devices()
from jax_sft.train_loop import train
outcome = train(run_config(pathlib.Path(sys.argv[1]), *sys.argv[3:]), pathlib.Path(sys.argv[2]), command="test")
sys.exit(0 if outcome.finished else 75)
"""


class Signalled(Signals):
    """A signal came during the first step."""

    @contextlib.contextmanager
    def collected(self):
        with super().collected():
            self.received = True
            yield


def losses(workdir):
    return [(m["step"], m["loss"]) for m in metrics(workdir) if "loss" in m]


def metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def weights(workdir):
    return load_file(workdir / "export" / "model.safetensors")


def assert_same_run(left, right):
    assert losses(left) == losses(right)
    mine, theirs = weights(left), weights(right)
    assert mine.keys() == theirs.keys()
    for name in mine:
        np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)


def start(folder, workdir, *overrides, devices=1, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(folder), str(workdir), *overrides],
        env={**os.environ, "JAX_NUM_CPU_DEVICES": str(devices), **environment},
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start_two(folder, workdir, *overrides):
    """Two processes of one run, one device each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    shared = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    return [start(folder, workdir, *overrides, **shared, JAX_PROCESS_ID=str(i)) for i in range(2)]


def finish(process, *, status=0):
    output, _ = process.communicate(timeout=240)
    assert process.returncode == status, output[-3000:]
    return output


def wait_for(condition, process, what):
    deadline = time.monotonic() + 200
    while not condition():
        assert process.poll() is None, f"ended before {what}: {process.communicate()[0][-3000:]}"
        assert time.monotonic() < deadline, f"waited too long for {what}"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny model and its data."""
    place = tmp_path_factory.mktemp("tiny")
    run_config(place)
    return place


@pytest.fixture(scope="module")
def whole(folder):
    """An uninterrupted run on eight devices; others are compared with it."""
    outcome = train(run_config(folder), folder / "whole", command="test")
    assert outcome.finished
    return outcome


@pytest.fixture(scope="module")
def whole_alone(folder):
    """The same in a process of its own with one device."""
    finish(start(folder, folder / "whole_alone"))
    return folder / "whole_alone"


def test_a_run_lowers_the_loss_and_leaves_what_the_contract_names(whole):
    assert whole.after.loss < 0.9 * whole.before.loss
    for name in ("manifest.json", "metrics.jsonl", "samples.jsonl", "checkpoints", "export/config.json"):
        assert (whole.workdir / name).exists(), name
    assert [step for step, _ in losses(whole.workdir)] == [1, 2, 3, 4, 5, 6]
    assert sorted(whole.before.by_source) == ["even", "odd"]


def test_every_log_line_carries_speed_padding_and_the_used_learning_rate(whole):
    line = [line for line in metrics(whole.workdir) if "loss" in line][-1]
    assert {"loss", "lr", "grad_norm", "trained_tokens_per_s", "tokens_per_s", "padding_share", "mfu"} <= line.keys()
    assert 0 <= line["padding_share"] < 1
    assert 0 < line["trained_tokens_per_s"] < line["tokens_per_s"]


def test_the_manifest_holds_config_versions_data_hash_seed_and_command(whole):
    manifest = json.loads((whole.workdir / "manifest.json").read_text())
    assert manifest["command"] == "test"
    assert manifest["seed"] == 0
    assert manifest["config"]["optim"]["lr"] == 1e-2
    assert manifest["versions"]["jax"]
    assert manifest["data"]["train"] != manifest["data"]["validation"]
    assert manifest["data"]["accounts"]["train"]["kept"] == 60
    assert "6 x layer weights x tokens" in manifest["mfu"]["formula"] and manifest["mfu"]["peak_flops"] > 1e8
    assert manifest["mfu"]["peak_from"].startswith("measured float32 matmul")


def test_a_finished_run_started_again_trains_no_further(folder, whole):
    before = losses(whole.workdir)
    again = train(run_config(folder), whole.workdir, command="again")
    assert again.finished
    assert again.after.loss == whole.after.loss
    assert losses(whole.workdir) == before


def test_accumulation_and_mesh_change_only_float_error(folder, whole):
    config = run_config(folder, "train.accumulation=2", "mesh.fsdp=2", "mesh.tensor=2", "mesh.data=2")
    other = train(config, folder / "accumulated", command="test")
    np.testing.assert_allclose(
        [loss for _, loss in losses(other.workdir)], [loss for _, loss in losses(whole.workdir)], rtol=2e-5
    )


def test_a_config_that_would_break_the_resume_is_refused_with_the_differences(folder, whole):
    with pytest.raises(ValueError, match=r"(?s)optim\.lr: 0\.01 when saved, 0\.1 now.*seed: 0 when saved, 3 now"):
        train(run_config(folder, "optim.lr=0.1", "seed=3"), whole.workdir, command="test")


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_rows(folder):
    config = run_config(folder, "optim.lr=1e30", "optim.clip_norm=None")
    with pytest.raises(NonFiniteLossError, match=r"step 2: the loss .* is not finite.*Rows of the batch: .*c\d+"):
        train(config, folder / "nan", command="test")


def test_steps_that_are_not_finite_are_skipped_and_counted_if_the_config_says_so(folder, caplog):
    config = run_config(folder, "optim.lr=1e30", "optim.clip_norm=None", "train.nonfinite=skip", "data.validation=()")
    with contextlib.suppress(ValueError):  # weights of 1e30 cannot be exported, and need not
        train(config, folder / "skip", command="test")
    assert "5 steps were skipped" in caplog.text
    assert [m["grad_norm"] is None for m in metrics(folder / "skip")] == [False] + [True] * 5


def test_sigterm_saves_leaves_with_75_and_the_next_start_ends_bit_for_bit_the_same(folder):
    long = ("train.steps=80", "checkpoint.every_steps=1000", "data.validation=()")  # so that the signal comes within
    workdir, uninterrupted = folder / "terminated", folder / "long"
    finish(start(folder, uninterrupted, *long))
    process = start(folder, workdir, *long)
    wait_for(lambda: (workdir / "metrics.jsonl").exists() and len(losses(workdir)) >= 1, process, "the first step")
    process.send_signal(signal.SIGTERM)
    output = finish(process, status=75)
    assert "stopping: saving after this step" in output
    done = len(losses(workdir))
    assert 1 <= done < 80
    assert f"resuming from step {done} of 80" in finish(start(folder, workdir, *long))
    assert_same_run(workdir, uninterrupted)


def test_a_signal_in_the_last_step_saves_at_once_and_leaves_the_evaluation_to_the_next_start(folder, monkeypatch):
    config, workdir = run_config(folder, "train.steps=1"), folder / "last"
    with monkeypatch.context() as patch:
        patch.setattr("jax_sft.train_loop.Signals", Signalled)
        outcome = train(config, workdir, command="test")
    assert (outcome.finished, outcome.step, outcome.export) == (False, 1, None)
    assert [m["step"] for m in metrics(workdir) if "validation/loss" in m] == [0]
    outcome = train(config, workdir, command="test")
    assert outcome.finished
    assert outcome.after.loss < outcome.before.loss


@pytest.mark.slow
def test_ctrl_c_saves_leaves_with_75_and_a_second_one_ends_at_once(folder):
    long = ("train.steps=4000", "checkpoint.every_steps=100000", "data.validation=()")
    process = start(folder, folder / "interrupted", *long)
    first_step = folder / "interrupted" / "metrics.jsonl"
    wait_for(lambda: first_step.exists() and first_step.stat().st_size, process, "the first step")
    process.send_signal(signal.SIGINT)
    finish(process, status=75)
    done = losses(folder / "interrupted")[-1][0]
    again = start(folder, folder / "interrupted", *long)
    wait_for(lambda: losses(folder / "interrupted")[-1][0] > done, again, "a step after the resume")
    assert losses(folder / "interrupted")[done][0] == done + 1
    again.send_signal(signal.SIGINT)
    finish(again, status=75)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_of_two_processes_saves_and_ends_both_with_75(folder, number):
    long = ("train.steps=4000", "checkpoint.every_steps=100000", "data.validation=()", "mesh.fsdp=2")
    workdir = folder / f"together-{number}"
    both = start_two(folder, workdir, *long)
    first_step = workdir / "metrics.jsonl"
    wait_for(lambda: first_step.exists() and first_step.stat().st_size, both[0], "the first step")
    both[1].send_signal(number)
    for process in both:
        finish(process, status=75)
    assert f"{losses(workdir)[-1][0]:08d}" in {p.name for p in (workdir / "checkpoints").iterdir()}


def test_a_signal_whose_exception_is_lost_stops_the_run_all_the_same(folder, monkeypatch):
    """Python cannot pass on what a handler raises inside a callback of the garbage collector; the flag stays."""

    def lose(run, *_):
        with contextlib.suppress(StoppedError):
            signal.raise_signal(signal.SIGTERM)
        return make_mesh(run)

    monkeypatch.setattr("jax_sft.train_loop.make_mesh", lose)
    outcome = train(run_config(folder), folder / "lost", command="test")
    assert not outcome.finished
    assert not (folder / "lost" / "metrics.jsonl").read_text()


def test_a_second_run_in_the_same_workdir_is_refused(folder, tmp_path):
    with (tmp_path / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another run is at work there; wait for it, or name another"):
            train(run_config(folder), tmp_path, command="test")


def test_other_weights_or_other_data_options_are_no_resume_and_are_named(folder, tmp_path):
    train(run_config(folder, "train.steps=1"), tmp_path / "w", command="test")
    write_model(tmp_path / "other", seed=5)
    with pytest.raises(ValueError, match=r"model\.weights"):
        train(run_config(folder, "train.steps=1", f"model.path={tmp_path / 'other'}"), tmp_path / "w", command="test")
    with pytest.raises(ValueError, match=r"data\.train_turns: 'all' when saved, 'last' now"):
        train(run_config(folder, "train.steps=1", "data.train_turns=last"), tmp_path / "w", command="test")


def test_how_new_rows_start_is_part_of_a_resume_where_there_are_some(folder):
    def fingerprint(*overrides):
        config = run_config(folder, *overrides)
        data: Any = SimpleNamespace(fingerprint="data")
        return resume_fingerprint(config, load_configured(config.model, seed=config.seed), data)

    zeros = fingerprint("model.new_tokens=<|new|>", "model.new_rows=zeros")
    mean = fingerprint("model.new_tokens=<|new|>")
    assert zeros | {"model.new_rows": "mean"} == mean
    assert "model.new_rows" not in fingerprint()


def test_the_ratio_of_lora_plus_is_part_of_a_resume(folder):
    def fingerprint(*overrides):
        config = run_config(folder, "lora.rank=2", *overrides)
        data: Any = SimpleNamespace(fingerprint="data")
        return resume_fingerprint(config, load_configured(config.model, seed=config.seed), data)

    assert fingerprint() | {"lora.b_lr_ratio": 4.0} == fingerprint("lora.b_lr_ratio=4.0")


@pytest.mark.parametrize("starts", ["null", "3", '"text"', "[1]"])
def test_a_manifest_with_damaged_starts_is_written_anew(folder, tmp_path, starts, caplog):
    (tmp_path / "manifest.json").write_text(f'{{"starts": {starts}}}')
    train(run_config(folder, "train.steps=1"), tmp_path, command="test")
    assert "is damaged; it is written anew" in caplog.text
    assert len(json.loads((tmp_path / "manifest.json").read_text())["starts"]) == 1


def test_a_signal_before_the_first_step_leaves_with_75_at_once(folder):
    workdir = folder / "early"
    process = start(folder, workdir)
    wait_for(lambda: workdir.exists(), process, "the workdir")
    process.send_signal(signal.SIGTERM)
    assert "run the same command again" in finish(process, status=75)


def test_a_conversation_longer_than_the_model_s_context_is_refused(folder, tmp_path):
    long = tmp_path / "long.jsonl"
    write_conversations(long, 1)
    row = json.loads(long.read_text())
    row["messages"][1]["content"] = "x" * 600
    long.write_text(json.dumps(row) + "\n")
    config = run_config(folder, f"data.train={long}", "data.max_length=1024")
    with pytest.raises(ValueError, match=r"data\.train: .* has 6\d\d tokens, but the model has 512 positions"):
        train(config, tmp_path / "w", command="test")


def test_a_foreign_export_folder_and_a_bad_shard_size_are_refused_before_training(folder, tmp_path):
    (tmp_path / "w" / "export").mkdir(parents=True)
    (tmp_path / "w" / "export" / "mine.txt").write_text("keep me")
    with pytest.raises(ValueError, match="export"):
        train(run_config(folder), tmp_path / "w", command="test")
    with pytest.raises(ValueError, match="banana"):
        train(run_config(folder, "export.max_shard_size=banana"), tmp_path / "x", command="test")
    assert not (tmp_path / "w" / "manifest.json").exists()


def test_a_run_ends_with_the_push_that_its_config_names_and_says_at_its_start_if_it_cannot(
    folder, tmp_path, monkeypatch
):
    config = run_config(folder, "train.steps=1", "export.push_to=org/name", "export.push_private=true")
    with pytest.raises(ValueError, match="push to org/name: HF_HUB_OFFLINE switches the hub off"):
        train(config, tmp_path / "a run", command="test")
    assert not (tmp_path / "a run" / "checkpoints").exists()
    asked = []
    monkeypatch.setattr("jax_sft.train_loop.check_push", lambda name: None)
    monkeypatch.setattr("jax_sft.train_loop.push", lambda *given, **options: asked.append((*given, options)))
    outcome = train(config, tmp_path / "a run", command="test")
    again = (
        f"jax-sft export --workdir '{tmp_path}/a run' --out '{tmp_path}/a run/export' --push-to-hub org/name --private"
    )
    assert asked == [(outcome.export, "org/name", {"private": True, "again": again})]
    assert (tmp_path / "a run" / "export" / "config.json").is_file()


def test_dropped_rows_are_named_in_the_log_and_counted_in_the_manifest(folder, tmp_path, caplog):
    data = write_conversations(tmp_path / "some.jsonl", 8)
    with data.open("a") as file:
        file.write('{"id": "lonely", "messages": [{"role": "user", "content": "no answer"}]}\n')
    caplog.set_level("INFO", logger="jax_sft")
    train(run_config(folder, f"data.train={data}", "train.steps=1"), tmp_path / "w", command="test")
    assert "train: read 9, kept 8, dropped 1" in caplog.text
    assert "some.jsonl:9" in caplog.text
    accounts = json.loads((tmp_path / "w" / "manifest.json").read_text())["data"]["accounts"]
    assert (accounts["train"]["kept"], accounts["validation"]["kept"]) == (8, 12)


def test_an_evaluation_that_a_signal_left_out_is_made_up_for_at_the_next_start(folder, tmp_path, monkeypatch):
    config = run_config(folder, "train.steps=2", "evaluate.every_steps=1")
    with monkeypatch.context() as patch:
        patch.setattr("jax_sft.train_loop.Signals", Signalled)
        assert not train(config, tmp_path / "w", command="test").finished
    assert train(config, tmp_path / "w", command="test").finished
    assert [m["step"] for m in metrics(tmp_path / "w") if "validation/loss" in m] == [0, 1, 2]


def test_an_owed_evaluation_that_was_cut_off_again_is_written_once(folder, tmp_path, monkeypatch):
    config = run_config(folder, "train.steps=2", "evaluate.every_steps=1", 'evaluate.prompts=("hi",)')
    with monkeypatch.context() as patch:
        patch.setattr("jax_sft.train_loop.Signals", Signalled)
        for _ in range(2):  # the second start makes up for the evaluation of step 1, and is cut off in step 2
            assert not train(config, tmp_path / "w", command="test").finished
        shutil.rmtree(tmp_path / "w" / "checkpoints" / "00000002")  # as if the cut had come before the save
        assert not train(config, tmp_path / "w", command="test").finished
    assert train(config, tmp_path / "w", command="test").finished
    assert [m["step"] for m in metrics(tmp_path / "w") if "validation/loss" in m] == [0, 1, 2]
    samples = [json.loads(line)["step"] for line in (tmp_path / "w" / "samples.jsonl").read_text().splitlines()]
    assert samples == [0, 1, 2]


def test_samples_are_asked_with_the_template_arguments_of_the_training(folder, tmp_path, monkeypatch):
    template = tmp_path / "chatml.jinja"
    template.write_text(CHATML.replace("assistant\n'", "assistant\n' + (mood or '')"))
    asked = []

    def noted(*args, template, conversations, **more):
        asked.extend(template.render(c, add_generation_prompt=True) for c in conversations)
        return answer(*args, template=template, conversations=conversations, **more)

    monkeypatch.setattr("jax_sft.evaluations.answer", noted)
    overrides = (f"model.chat_template={template}", 'data.template_args={"mood": "calm"}', 'evaluate.prompts=("hi",)')
    config = run_config(folder, "train.steps=1", "export.certify=False", *overrides)
    assert train(config, tmp_path / "w", command="test").finished
    assert set(asked) == {"<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\ncalm"}


def test_kill_9_in_the_middle_of_a_save_then_resume_ends_bit_for_bit_the_same(folder, whole_alone):
    workdir = folder / "killed"
    process = start(folder, workdir)
    in_progress, checkpoints = "00000004.orbax-checkpoint-tmp*", workdir / "checkpoints"
    wait_for(lambda: any(checkpoints.glob(in_progress)), process, "the save of step 4")
    process.kill()
    process.communicate()
    assert any(checkpoints.glob(in_progress)), "the kill came after the save: nothing was proved"
    assert "resuming from step 2 of 6" in finish(start(folder, workdir))
    assert_same_run(workdir, whole_alone)


def test_a_flipped_bit_in_the_newest_checkpoint_is_seen_and_the_previous_one_used(folder, whole_alone):
    workdir = folder / "flipped"
    shutil.copytree(whole_alone, workdir)
    newest = sorted(p for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())[-1]
    data = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(bytes(content))
    output = finish(start(folder, workdir))
    assert f"{newest.name} is broken and is passed over" in output
    assert "resuming from step 4 of 6" in output
    assert_same_run(workdir, whole_alone)


def cut_after_step_4(run, workdir):
    """A copy of a run, as if it had been cut off between step 4 and the end."""
    shutil.copytree(run, workdir)
    shutil.rmtree(workdir / "checkpoints" / "00000006")
    shutil.rmtree(workdir / "export")
    return workdir


def assert_same_but_for_float_error(left, right):
    mine, theirs = losses(left), losses(right)
    assert [step for step, _ in mine] == [step for step, _ in theirs]
    np.testing.assert_allclose([loss for _, loss in mine], [loss for _, loss in theirs], rtol=2e-5)
    for name, value in weights(right).items():
        np.testing.assert_allclose(weights(left)[name], value, atol=2e-4, err_msg=name)


def test_a_run_of_one_device_goes_on_with_eight_on_another_mesh(folder, whole_alone, caplog):
    workdir = cut_after_step_4(whole_alone, folder / "one_to_eight")
    caplog.set_level("INFO", logger="jax_sft")
    config = run_config(folder, "mesh.fsdp=2", "mesh.tensor=2", "mesh.data=2")
    assert train(config, workdir, command="test").finished
    assert "resuming from step 4 of 6" in caplog.text
    assert len(json.loads((workdir / "manifest.json").read_text())["devices"]) == 8
    assert_same_but_for_float_error(workdir, whole_alone)


@pytest.mark.slow
def test_a_run_of_eight_devices_goes_on_with_four(folder, whole):
    workdir = cut_after_step_4(whole.workdir, folder / "eight_to_four")
    assert "resuming from step 4 of 6" in finish(start(folder, workdir, "mesh.data=2", "mesh.fsdp=2", devices=4))
    assert_same_but_for_float_error(workdir, whole.workdir)


@pytest.mark.slow
def test_a_run_of_one_process_goes_on_with_two(folder, whole_alone):
    workdir = cut_after_step_4(whole_alone, folder / "one_to_two")
    outputs = [finish(process) for process in start_two(folder, workdir, "mesh.fsdp=2")]
    assert all("resuming from step 4 of 6" in output for output in outputs)
    assert_same_but_for_float_error(workdir, whole_alone)


@pytest.mark.slow
def test_two_processes_over_gloo_give_the_losses_of_one(folder, whole_alone):
    workdir = folder / "two"
    outputs = [finish(process) for process in start_two(folder, workdir, "export.certify=True")]
    assert ["certificate: passed" in output for output in outputs] == [True, False]
    assert_same_but_for_float_error(workdir, whole_alone)


def test_a_vocabulary_that_is_padded_for_the_mesh_trains_and_leaves_as_it_came(folder, tmp_path):
    runs = {}
    for multiple in (1, 100):
        overrides = ["mesh.tensor=4", "mesh.fsdp=2", "train.steps=3", f"model.vocab_multiple={multiple}"]
        config = run_config(folder, *overrides, "optim.weight_decay=0.1", f"export.certify={multiple > 1}")
        assert train(config, tmp_path / str(multiple), command="jax-sft train").finished
        runs[multiple] = tmp_path / str(multiple)
    np.testing.assert_allclose(*([loss for _, loss in losses(runs[m])] for m in runs), rtol=1e-5)
    plain, padded = (weights(runs[m]) for m in runs)
    for name, value in plain.items():
        np.testing.assert_allclose(padded[name], value, atol=2e-4, err_msg=name)
    shapes = abstract_params(load_configured(config.model, seed=0).config)
    shardings = shard_params(shapes, make_mesh(config.mesh))
    shapes = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    saved = Checkpoints(runs[100] / "checkpoints", config.checkpoint, fingerprint=None).restore_params(shapes)[1]
    assert saved["embed_VD"].shape[0] == 300 and not np.asarray(saved["embed_VD"])[264:].any()
    assert json.loads((runs[100] / "export" / "CERTIFICATE.json").read_text())["verdict"] == "passed"


@pytest.mark.slow
def test_processes_that_are_not_about_the_same_run_end_at_once_and_say_why(folder, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text((folder / "train.jsonl").read_text().replace("count to 3", "count to 33"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    shared = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    told = (["seed=0"], ["seed=1", f"data.train=('{other}',)"])
    processes = [
        start(folder, tmp_path / "run", *overrides, **shared, JAX_PROCESS_ID=str(i)) for i, overrides in enumerate(told)
    ]
    for process in processes:
        said = " ".join(finish(process, status=1).split())
        differs = r"config.data.train is .*; config.seed is 0 and 1; data is '\w+'"
        assert re.search(f"processes 0 and 1 are not about the same run: {differs}", said), said
