"""What a run costs is in its manifest, over all its starts, and its page is there when it has ended."""

import json
import logging

import pytest

from jax_sft import cost
from jax_sft.cost import Clock, total
from jax_sft.train_loop import train
from tests.tiny import run_config


def test_seconds_are_told_by_what_they_were_spent_on(monkeypatch):
    now = iter([13.0, 20.0, 25.0, 40.0])  # set up until; an evaluation from, to; the end
    monkeypatch.setattr(cost.time, "perf_counter", lambda: next(now))
    clock = Clock(10.0)
    clock.set_up()
    with clock.part("evaluating"):
        pass
    found = clock.cost(tokens=7, trained_tokens=3)
    assert found == {
        "seconds": 30.0,
        "parts": {"setting up": 3.0, "evaluating": 5.0, "training": 22.0},
        "tokens": 7,
        "trained_tokens": 3,
    }
    both = total(
        [found, {"seconds": 10.0, "parts": {"training": 8.0, "saving": 2.0}, "tokens": 1, "trained_tokens": 1}]
    )
    assert both["seconds"] == 40 and both["tokens"] == 8 and both["goodput"] == 30 / 40
    assert both["parts"] == {"setting up": 3.0, "evaluating": 5.0, "training": 30.0, "saving": 2.0}


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cost")
    train(run_config(folder, "train.steps=3"), folder / "run", command="jax-sft train --config c.py")
    return folder


def test_the_manifest_tells_the_cost_and_the_sizes_of_the_sets(ended):
    manifest = json.loads((ended / "run" / "manifest.json").read_text())
    lines = [json.loads(line) for line in (ended / "run" / "metrics.jsonl").read_text().splitlines()]
    told, sizes = manifest["cost"], manifest["data"]["sizes"]
    assert set(told["parts"]) == {"setting up", "evaluating", "saving", "exporting", "training"}
    assert sum(told["parts"].values()) == pytest.approx(told["seconds"])
    assert 0 < told["trained_tokens"] < told["tokens"] and 0 < told["goodput"] < 1
    assert sizes["train"]["sequences"] == 60 and sizes["validation"]["sequences"] == 12
    assert told["tokens"] <= 3 * 8 * 128 and len([line for line in lines if "loss" in line]) == 3


def test_a_run_that_has_ended_leaves_its_page(ended):
    page = (ended / "run" / "report.html").read_text()
    assert "jax-sft train --config c.py" in page and "<svg" in page


def test_a_page_that_cannot_be_written_is_told_and_is_no_fault_of_the_run(ended, caplog):
    (ended / "run" / "report.html").unlink()
    (ended / "run" / "report.html").mkdir()
    with caplog.at_level(logging.WARNING, logger="jax_sft"):
        assert train(run_config(ended, "train.steps=3"), ended / "run", command="again").finished
    assert "report.html is not written" in caplog.text
    starts = json.loads((ended / "run" / "manifest.json").read_text())["starts"]
    assert [start["cost"]["tokens"] > 0 for start in starts] == [True, False]
