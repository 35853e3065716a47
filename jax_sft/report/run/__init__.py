"""The report of a training run: one page that tells what came of it, or of two runs beside each other.

In: workdirs. Out: HTML, PNG files, lines for a terminal. `record` reads, `curves`, `changes`, `pairs` and `facts` find
what is told, `draw`, `pictures`, `page` and `terminal` show it, `door` does it all. Numpy only, no jax.
"""

from jax_sft.report.run.door import report
from jax_sft.report.run.page import comparison_page, run_page
from jax_sft.report.run.pictures import write_pngs
from jax_sft.report.run.record import RunRecord, read_run
from jax_sft.report.run.terminal import comparison_lines, terminal_lines

__all__ = [
    "RunRecord",
    "comparison_lines",
    "comparison_page",
    "read_run",
    "report",
    "run_page",
    "terminal_lines",
    "write_pngs",
]
