import numpy as np
import pytest

from jax_sft.report.run import read_run
from jax_sft.report.run.curves import Curve, Plot, all_plots, gap, overlaid, thinned, training_plots
from jax_sft.report.run.draw import figure, ranges, tick_name, ticks
from tests.report.run.workdirs import make_run, put_lines


@pytest.mark.parametrize("count", [601, 1000, 99_999])
def test_a_thinned_curve_keeps_its_spikes_gaps_and_ends(count):
    steps, values = np.arange(count) * 3, np.random.default_rng(0).normal(size=count)
    values[count // 3], values[count // 2], values[count // 5] = 50.0, -50.0, np.nan
    few, of = thinned(steps, values)
    assert len(few) <= 600 and (np.diff(few) > 0).all()
    assert np.nanmax(of) == 50 and np.nanmin(of) == -50 and np.isnan(of).sum() == 1
    assert (few[0], few[-1]) == (0, 3 * count - 3)
    assert all(values[step // 3] == v for step, v in zip(few, of, strict=True) if not np.isnan(v))


def test_each_stretch_of_a_thinned_curve_keeps_its_own_extremes():
    values = np.zeros(6000)
    spikes = np.arange(50, 6000, 200)
    values[spikes] = 1.0
    few, of = thinned(np.arange(6000), values)
    assert set(few[of == 1].tolist()) == set(spikes.tolist())


def test_a_short_curve_stays_as_it_is():
    steps, values = np.arange(600), np.arange(600.0)
    assert thinned(steps, values)[0] is steps


def test_plots_mark_the_best_step_stages_and_alarms(tmp_path):
    run = make_run(tmp_path / "run", stages=[{"name": "easy"}, {"name": "hard"}])
    loss = training_plots(read_run(run))[0]
    assert [(m.step, m.text) for m in loss.marks] == [(30, "best, step 30"), (21, "hard"), (30, "overfitting alarm")]
    assert [curve.name for curve in loss.curves] == ["training", "validation"]


def test_the_gap_is_told_or_found_from_the_last_logged_losses(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    lines = [{"step": s, "loss": 3.0 if s < 5 else 1.0} for s in range(1, 31)]
    lines += [{"step": 0, "validation/loss": 9.0}, {"step": 30, "validation/loss": 1.5}]
    put_lines(tmp_path / "metrics.jsonl", lines)
    found = gap(read_run(tmp_path))
    assert found.steps.tolist() == [30] and found.values.tolist() == [0.5]
    put_lines(tmp_path / "metrics.jsonl", [*lines, {"step": 30, "validation/gap": 0.7}])
    assert gap(read_run(tmp_path)).values.tolist() == [0.7]


def test_small_plots_over_time_need_a_measurement_in_between(tmp_path):
    often = {plot.key for plot in all_plots(read_run(make_run(tmp_path / "often")))}
    twice = {plot.key for plot in all_plots(read_run(make_run(tmp_path / "twice", every=40)))}
    assert often - twice == {"probes", "rules", "metrics_1", "metrics_1_points"}


def test_two_runs_lie_on_the_same_axes(tmp_path):
    a, b = (read_run(make_run(tmp_path / name)) for name in "ab")
    loss = overlaid(a, b, ("A", "B"))[0]
    assert [(c.name, c.dashed) for c in loss.curves] == [
        ("A: training", False), ("B: training", True), ("A: validation", False), ("B: validation", True),
    ]  # fmt: skip


def plot_of(values, steps=None):
    steps = np.arange(len(values)) if steps is None else np.asarray(steps)
    return Plot("k", "T", "u", (Curve("c", steps, np.asarray(values, float)),))


@pytest.mark.parametrize("values", [[1.0], [0, 0], [-3, -3], [1e-5, 2e-5], [5, 1e9], [-1e-3, 1e-3], [2.0, np.nan, 2.1]])
def test_any_values_have_axes(values):
    x, y = ranges(plot_of(values))
    assert x[0] < x[1] and y[0] <= np.nanmin(values) and np.nanmax(values) <= y[1]
    marks = ticks(*y, 5)
    names = [tick_name(mark, marks) for mark in marks]
    assert 2 <= len(names) <= 8 and len(set(names)) == len(names) and max(map(len, names)) <= 7
    assert "NaN" not in figure(plot_of(values)) and ">nan<" not in figure(plot_of(values))


def test_a_line_breaks_at_a_gap():
    drawn = figure(plot_of([1, 2, np.nan, 3, 4]))
    path = drawn.partition('class="line k1" d="')[2].partition('"')[0]
    assert path.count("M") == 2 and path.count("L") == 2
