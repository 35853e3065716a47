import sys

import pytest

from jax_sft.report.run import read_run, write_pngs
from jax_sft.report.run.curves import all_plots
from tests.report.run.workdirs import make_run


def test_each_plot_becomes_a_png(tmp_path):
    pytest.importorskip("matplotlib", reason="NO MATPLOTLIB: the PNG files of plots are not looked at")
    record = read_run(make_run(tmp_path / "run"))
    written = write_pngs(record, tmp_path / "png")
    assert [path.stem for path in written] == [plot.key for plot in all_plots(record)]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    record = read_run(make_run(tmp_path / "run"))
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"need matplotlib .*pip install 'jax-sft\[plots\]', or leave out --png"):
        write_pngs(record, tmp_path / "png")
    assert not (tmp_path / "png").exists()
