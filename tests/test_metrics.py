"""What a run writes down: lines stay JSON, a resume leaves each step once, TensorBoard reads what was written."""

import contextlib
import json
import math
import sys
import time
import types

import pytest

from jax_sft import metrics as module
from jax_sft.metrics import Metrics, peak_flops


@contextlib.contextmanager
def opened(workdir, *, start_step=None, tensorboard=False, wandb_project=None):
    writers = Metrics(workdir, start_step=start_step, tensorboard=tensorboard, wandb_project=wandb_project, config={})
    with contextlib.closing(writers):
        yield writers


def lines(workdir, name="metrics.jsonl"):
    return [json.loads(line) for line in (workdir / name).read_bytes().decode().split("\n")[:-1]]


def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


def sample(answer):
    return {"prompt": "?", "answer": answer}


def test_a_step_is_a_line_that_is_on_disk_at_once(tmp_path):
    with opened(tmp_path) as writers:
        writers.write(1, {"loss": 2.5, "lr": 1e-5})
        writers.write(2, {"validation/loss": 2.0})
        assert lines(tmp_path) == [{"step": 1, "loss": 2.5, "lr": 1e-5}, {"step": 2, "validation/loss": 2.0}]


def test_a_value_that_is_not_finite_is_null(tmp_path):
    with opened(tmp_path) as writers:
        writers.write(1, {"loss": math.nan, "grad_norm": math.inf, "lr": 0.1})
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line == {"step": 1, "loss": None, "grad_norm": None, "lr": 0.1}


def test_a_resume_keeps_the_lines_up_to_its_step_and_goes_on_behind_them(tmp_path):
    with opened(tmp_path) as writers:
        for step in range(5):
            writers.write(step, {"loss": float(step)})
            writers.write_samples(step, [sample("a"), sample("b")])
    with opened(tmp_path, start_step=2) as writers:
        writers.write(3, {"loss": 33.0})
    assert [(m["step"], m["loss"]) for m in lines(tmp_path)] == [(0, 0), (1, 1), (2, 2), (3, 33)]
    assert [m["step"] for m in lines(tmp_path, "samples.jsonl")] == [0, 0, 1, 1, 2, 2]


def test_where_nothing_was_restored_nothing_is_kept_not_even_step_0(tmp_path):
    with opened(tmp_path) as writers:
        writers.write(0, {"validation/loss": 1.0})
        writers.write_samples(0, [sample("old")])
    with opened(tmp_path) as writers:
        writers.write(0, {"validation/loss": 3.0})
    assert lines(tmp_path) == [{"step": 0, "validation/loss": 3.0}]
    assert lines(tmp_path, "samples.jsonl") == []


@pytest.mark.parametrize("torn", ['{"step": 2, "lo', '{"step": 2, "loss": 1.0}', "\x00\x00"])
def test_a_torn_last_line_is_removed_and_the_next_one_starts_fresh(tmp_path, torn):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n' + torn)
    with opened(tmp_path, start_step=2) as writers:
        writers.write(3, {"loss": 1.0})
    assert [m["step"] for m in lines(tmp_path)] == [1, 3]


def test_a_line_torn_inside_a_chinese_character_is_removed_too(tmp_path):
    whole = '{"step": 1, "answer": "中"}\n'.encode()
    (tmp_path / "samples.jsonl").write_bytes(whole + '{"step": 2, "answer": "中'.encode()[:-1])
    with opened(tmp_path, start_step=2):
        pass
    assert (tmp_path / "samples.jsonl").read_bytes() == whole


@pytest.mark.parametrize("answer", ["one\u2028two", "one\x85two\x0cthree", "one\r\ntwo\rthree\n", '中文 "👩\u200d🔬"'])
def test_an_answer_with_any_line_separator_survives_a_resume(tmp_path, answer):
    with opened(tmp_path) as writers:
        writers.write_samples(1, [sample(answer), sample("next")])
    with opened(tmp_path, start_step=1):
        pass
    assert [m["answer"] for m in lines(tmp_path, "samples.jsonl")] == [answer, "next"]


def test_a_full_disk_names_the_file_that_could_not_be_written(tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device")

    with opened(tmp_path) as writers:
        files = writers._file, writers._samples
        writers._file, writers._samples = (
            types.SimpleNamespace(name=file.name, write=full, writelines=full, close=full) for file in files
        )
        with pytest.raises(OSError, match=r"metrics\.jsonl: the disk is full"):
            writers.write(1, {"loss": 2.0})
        with pytest.raises(OSError, match=r"samples\.jsonl: the disk is full"):
            writers.write_samples(1, [sample("a")])
        with pytest.raises(OSError, match=r"metrics\.jsonl: the disk is full"):
            writers.close()
        writers._file, writers._samples = files


def test_a_resume_goes_on_with_its_run_of_wandb_and_a_new_run_is_another_one(tmp_path, monkeypatch):
    begun = []

    def init(**given):
        begun.append(given)
        return types.SimpleNamespace(log=lambda values, step: None, finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for workdir, start_step in (("a", None), ("a", 0), ("a", 4), ("b", None), ("a", None)):
        (tmp_path / workdir).mkdir(exist_ok=True)
        with opened(tmp_path / workdir, start_step=start_step, wandb_project="project"):
            pass
    ids = [given["id"] for given in begun]
    assert ids[0] == ids[1] == ids[2]
    assert len({*ids}) == 3
    assert all(given["resume"] == "allow" and given["project"] == "project" for given in begun)


def read_events(workdir):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(workdir / "tensorboard"))
    return events.Reload()


def test_tensorboard_shows_the_scalars_and_the_samples(tmp_path):
    pytest.importorskip("tensorboardX")
    with opened(tmp_path, tensorboard=True) as writers:
        writers.write(1, {"loss": 2.5, "validation/loss/中文": 3.0})
        writers.write(2, {"loss": math.nan})
        writers.write_samples(2, [sample("你好\u2028line")])
    events = read_events(tmp_path)
    assert sorted(events.Tags()["scalars"]) == ["loss", "validation/loss/中文"]
    first, second = events.Scalars("loss")
    assert (first.step, first.value, second.step) == (1, 2.5, 2)
    assert math.isnan(second.value)
    (tag,) = events.Tags()["tensors"]
    assert tag.startswith("samples/0")
    assert "你好\u2028line" in events.Tensors(tag)[0].tensor_proto.string_val[0].decode()


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    pytest.importorskip("tensorboardX")
    with opened(tmp_path, tensorboard=True) as writers:
        for step in range(1, 6):
            writers.write(step, {"loss": 1.0})
    time.sleep(1.1)  # the files are named by the second
    with opened(tmp_path, start_step=2, tensorboard=True) as writers:
        for step in range(3, 5):
            writers.write(step, {"loss": 7.0})
    assert [(e.step, e.value) for e in read_events(tmp_path).Scalars("loss")] == [(1, 1), (2, 1), (3, 7), (4, 7)]


def test_without_tensorboardx_the_run_goes_on_and_says_what_to_install(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with opened(tmp_path, tensorboard=True) as writers:
        writers.write(1, {"loss": 2.0})
    assert "install jax-sft[tensorboard]" in caplog.text
    assert lines(tmp_path) == [{"step": 1, "loss": 2.0}]


def stand_in(kind, platform, count):
    device = types.SimpleNamespace(device_kind=kind, platform=platform)
    return types.SimpleNamespace(devices=lambda: [device] * count, device_count=lambda: count)


@pytest.mark.parametrize(
    ("kind", "platform", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "gpu", 989e12),
        ("NVIDIA A100-SXM4-80GB", "gpu", 312e12),
        ("NVIDIA L4", "gpu", 121e12),
        ("NVIDIA L40S", "gpu", 362e12),
        ("NVIDIA B200", "gpu", 2250e12),
        ("TPU v4", "tpu", 275e12),
        ("TPU v5 lite", "tpu", 197e12),
        ("TPU v5", "tpu", 459e12),
        ("TPU v6 lite", "tpu", 918e12),
    ],
)
def test_the_peak_is_the_one_of_this_kind_of_device_times_their_number(monkeypatch, kind, platform, peak):
    monkeypatch.setattr(module, "jax", stand_in(kind, platform, 4))
    found, source = peak_flops()
    assert found == 4 * peak
    assert "x 4" in source


@pytest.mark.parametrize("kind", ["NVIDIA L40", "NVIDIA GH200 480GB", "NVIDIA GeForce RTX 4090"])
def test_an_unknown_accelerator_has_no_peak_rather_than_that_of_one_with_a_similar_name(monkeypatch, kind):
    monkeypatch.setattr(module, "jax", stand_in(kind, "gpu", 1))
    found, source = peak_flops()
    assert math.isnan(found)
    assert kind in source


def test_the_peak_of_a_cpu_is_measured_once_however_many_devices_it_plays():
    found, source = peak_flops()
    assert 1e8 < found < 1e14
    assert "measured" in source
