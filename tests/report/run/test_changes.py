import json

import numpy as np
import pytest

from jax_sft.evaluate.probes import wilson
from jax_sft.report.run import read_run
from jax_sft.report.run.changes import (
    Side,
    before_and_after,
    metric_changes,
    paired_interval,
    probe_changes,
    rule_changes,
)
from tests.report.run.workdirs import make_run, put_lines


def ones(values):
    return np.stack([np.asarray(values, float), np.ones(len(values))], 1)


def test_a_difference_that_is_the_same_in_each_row_has_an_interval_without_width():
    before = np.arange(12.0)
    assert paired_interval(ones(before), ones(before + 0.25)) == pytest.approx((0.25, 0.25))


def test_the_interval_is_that_of_the_binomial_that_the_draws_follow():
    # 100 rows, 20 of which rise by 1: the drawn mean is a binomial of 100 at 0.2, over 100
    before, after = np.zeros(100), np.repeat([1.0, 0.0], [20, 80])
    low, high = paired_interval(ones(before), ones(after))
    assert low == pytest.approx(0.12, abs=0.011) and high == pytest.approx(0.28, abs=0.011)
    assert paired_interval(ones(before), ones(after)) == (low, high)  # the same seed


def test_rows_that_pair_well_give_a_narrower_interval_than_rows_in_another_order():
    hard = np.random.default_rng(0).random(60)
    easy, other = hard + 0.1, np.roll(hard, 7) + 0.1
    width = [np.subtract(*paired_interval(ones(hard), ones(x))[::-1]) for x in (easy, other)]
    assert width[0] < 1e-6 < 0.1 < width[1]


def test_a_ratio_counts_instructions_and_not_prompts():
    before, after = np.asarray([[0.0, 1], [0, 3]] * 20), np.asarray([[1.0, 1], [0, 3]] * 20)
    low, high = paired_interval(before, after)
    assert low < 0.25 < high < 0.5


def test_one_row_has_no_interval():
    assert paired_interval(ones([0]), ones([1])) is None


def test_the_interval_of_a_share_is_wilson_s():
    assert wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(1.0, 0) == (0.0, 1.0)


def test_probes_rules_and_metrics_have_paired_intervals_around_their_differences(tmp_path):
    one, two = before_and_after(read_run(make_run(tmp_path / "run")))
    found = {c.name: c for c in (*probe_changes(one, two), *rule_changes(one, two), *metric_changes(one, two)["sums"])}
    for name in ("answers", "language", "prompt_strict", "instruction_strict", "exact_match"):
        change = found[name]
        assert change.interval[0] < change.difference < change.interval[1] and change.is_sure, name
    assert found["instruction_strict"].count == 60 and found["prompt_strict"].count == 40
    assert found["exact_match"].after_interval is not None
    assert found["prompt_loose"].difference and found["prompt_loose"].interval is None  # no row tells it
    assert found["chrf"].scale == 100 and found["chrf"].interval is None
    assert "not the mean of its rows" in found["chrf"].note


def test_without_predictions_only_the_numbers_are_told(tmp_path):
    run = make_run(tmp_path / "run")
    for path in (run / "evaluations").glob("*.predictions.jsonl"):
        path.unlink()
    one, two = before_and_after(read_run(run))
    assert all(c.interval is None and c.difference is not None for c in probe_changes(one, two))


def test_numbers_of_the_log_stand_in_for_a_missing_evaluation(tmp_path):
    put_lines(tmp_path / "metrics.jsonl", [{"step": 0, "probes/answers": 0.25}, {"step": 9, "probes/answers": 0.75}])
    (tmp_path / "manifest.json").write_text("{}")
    (change,) = probe_changes(*before_and_after(read_run(tmp_path)))
    assert (change.before, change.after, change.difference, change.interval) == (0.25, 0.75, 0.5, None)


def test_two_runs_are_paired_by_prompts_that_are_the_same(tmp_path):
    a = read_run(make_run(tmp_path / "a"))
    b_folder = make_run(tmp_path / "b", skill=0.6)
    path = b_folder / "evaluations" / "00000040.predictions.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        if row["id"] in ("probes/p1", "probes/p2"):
            row["prompt"] = [{"role": "user", "content": "Something else."}]
    put_lines(path, rows)
    change = probe_changes(Side(a), Side(read_run(b_folder)))[0]
    assert change.rows == 38 and change.difference < 0 and change.interval[1] < 0
    assert "interval of the 38 prompts that both answered" in change.note
