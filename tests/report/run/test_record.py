import json

import pytest

from jax_sft.report.run import read_run, run_page, terminal_lines
from jax_sft.report.run.facts import is_finished
from tests.report.run.workdirs import make_run, manifest_of, put_lines


def test_a_whole_workdir_is_read(tmp_path):
    record = read_run(make_run(tmp_path / "run"))
    assert (record.name, record.steps, record.total_steps, record.notes) == ("run", 40, 40, ())
    steps, values = record.series("validation/loss")
    assert steps.tolist() == [0, 10, 20, 30, 40] and values[0] == pytest.approx(2.85)
    assert sorted(record.answers) == [0, 10, 20, 30, 40]
    assert record.before("probes/answers") < record.after("probes/answers")
    assert record.after("metric/sums/chrf") > 1
    assert record.after("rules/kind=length:words/strict") == record.after("rules/instruction_strict")
    assert {answer.kind for answer in record.answers[40].values()} == {"samples", "probes", "rules", "sums"}
    assert [(a.step, a.kind, a.level) for a in record.alarms] == [(30, "overfitting", "alarm")]


def test_the_best_step_is_never_the_untrained_model_and_follows_the_set_that_decides(tmp_path):
    names = ("validation/loss", "validation/loss/x", "validation/accuracy")
    values = {0: (1, 1, 0.9), 5: (3, 2, 0.8), 9: (2, 4, 0.7)}
    lines = [{"step": s, **dict(zip(names, of, strict=True))} for s, of in values.items()]
    for name, best, step in (("all", None, 9), ("x", "x", 5), ("accuracy", "validation/accuracy", 5)):
        run = tmp_path / name
        put_lines(run / "metrics.jsonl", lines)
        (run / "manifest.json").write_text(json.dumps(manifest_of(9, **{"evaluate.best": best})))
        assert read_run(run).best_step() == step


def test_torn_and_damaged_lines_are_left_out_and_said(tmp_path):
    run = make_run(tmp_path / "run")
    for name in ("metrics.jsonl", "samples.jsonl", "evaluations/00000040.predictions.jsonl"):
        with (run / name).open("a") as file:
            file.write('{"step": 41, "lo')
    with (run / "alarms.jsonl").open("a") as file:
        file.write('[]\n{"step": "x"}\n' + "[" * 100_000 + "\n")
    (run / "evaluations" / "00000030.json").write_text("{")
    record = read_run(run)
    assert record.steps == 40 and len(record.alarms) == 1
    assert set(record.notes) == {
        "metrics.jsonl: the last line is torn and was left out",
        "samples.jsonl: the last line is torn and was left out",
        "evaluations/00000040.predictions.jsonl: the last line is torn and was left out",
        "evaluations/00000030.json: is damaged and was left out",
        "alarms.jsonl: 3 lines are no record and were left out",
    }


def test_a_number_that_was_not_finite_is_a_gap_and_what_is_no_number_is_left_out(tmp_path):
    put_lines(tmp_path / "metrics.jsonl", [{"step": 1, "loss": None, "lr": True, "x": "y"}, {"step": 2, "loss": 2}])
    (tmp_path / "manifest.json").write_text("{}")
    record = read_run(tmp_path)
    assert str(record.series("loss")[1].tolist()) == "[nan, 2.0]"
    assert set(record.columns) == {"loss"}


def test_rows_with_the_same_id_are_all_kept(tmp_path):
    run = make_run(tmp_path / "run", evaluated=False)
    rows = [{"id": None, "prompt": [], "prediction": text, "scores": {}} for text in ("a", "b")]
    put_lines(run / "evaluations" / "00000040.predictions.jsonl", rows)
    assert [a.answer for a in read_run(run).answers[40].values() if a.kind == "other"] == ["a", "b"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "is no folder; name the folder that was given to --workdir"),
        ({}, "holds no manifest.json, so it is no workdir of a run; name the folder"),
        ({"manifest.json": "{"}, "manifest.json: is damaged .*start `jax-sft train` on this workdir once more"),
        ({"manifest.json": "[]"}, "manifest.json: holds list, no object"),
        ({"manifest.json": "{}"}, "holds no metrics.jsonl, so nothing was logged; let the run log a step first"),
        ({"manifest.json": "{}", "metrics.jsonl": ""}, "metrics.jsonl: holds no number of any step; let the run log"),
    ],
)
def test_what_is_no_workdir_is_refused(tmp_path, files, message):
    folder = tmp_path / "w"
    if files is not None:
        folder.mkdir()
    for name, text in (files or {}).items():
        (folder / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_run(folder)


def test_an_exported_adapter_ends_a_run_too(tmp_path):
    run = make_run(tmp_path / "run")
    manifest = json.loads((run / "manifest.json").read_text()) | {"total_steps": 400}
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert not is_finished(read_run(run))
    (run / "export").mkdir(exist_ok=True)
    (run / "export" / "adapter_config.json").write_text("{}")
    assert is_finished(read_run(run))


def test_what_is_not_of_its_form_trips_nothing_up(tmp_path):
    run = make_run(tmp_path / "run")
    folder = run / "evaluations"
    (folder / "00000777.json").mkdir()
    (folder / f"{'9' * 23}.json").write_text('{"probes": {"answers": 1}}')
    last = json.loads((folder / "00000040.json").read_text())
    for of in last["metrics"].values():
        for told in of.values():
            told["notes"] = 7
    last["rules"]["prompts"] = 1e308
    (folder / "00000040.json").write_text(json.dumps(last))
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["config"] |= {"stages": True, "data": {"train": True}}
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert "<html" in run_page(read_run(run)) and terminal_lines(read_run(run))
