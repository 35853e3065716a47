"""`jax-sft report`: read one workdir or two, write the page, say where it is.

In: folders. Out: an HTML file, PNG files if asked for, and lines to print.
"""

import pathlib
import re
from collections.abc import Sequence

from jax_sft.disk import written_whole
from jax_sft.report.run.page import comparison_page, run_page
from jax_sft.report.run.pictures import write_pngs
from jax_sft.report.run.record import read_run
from jax_sft.report.run.terminal import comparison_lines, terminal_lines


def report(
    workdirs: Sequence[pathlib.Path], *, out: pathlib.Path | None = None, png: pathlib.Path | None = None
) -> list[str]:
    """Write the page of one run, or of two, and return the lines to print.

    Args:
        workdirs: one, or two that are compared.
        out: the page; None: report.html in the workdir, of two report_vs_NAME.html in the first.
        png: a folder for the plots as PNG files; of two runs, a folder for each in it.

    Raises:
        ValueError: none or more than two, a folder that is no workdir, the same one twice, or a page that is a folder.
        ImportError: PNG files without matplotlib.
        OSError: a file cannot be written.
    """
    if len(workdirs) not in (1, 2):
        raise ValueError(f"report: {len(workdirs)} workdirs were given; name one, or two that are compared")
    if len(workdirs) == 2 and pathlib.Path(workdirs[0]).resolve() == pathlib.Path(workdirs[1]).resolve():
        raise ValueError(f"report: {workdirs[0]} was given twice; name two workdirs to compare them, or one alone")
    records = [read_run(pathlib.Path(workdir)) for workdir in workdirs]
    first, last = records[0], records[-1]
    is_alone = len(records) == 1
    other = re.sub(r"[^\w.-]", "_", last.name)
    name = "report.html" if is_alone else f"report_vs_{other}.html"
    path = first.workdir / name if out is None else pathlib.Path(out)
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; name the file that the page is written to, such as {path / name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as file:
        file.write(run_page(first) if is_alone else comparison_page(first, last))
    lines = terminal_lines(first) if is_alone else comparison_lines(first, last)
    for letter, record in zip("AB", records, strict=False):
        if png is not None:
            folder = pathlib.Path(png) if is_alone else pathlib.Path(png) / letter
            written = write_pngs(record, folder)
            lines.append(f"{len(written)} plots are in {folder}")
    return [*lines, f"the page is {path}"]
