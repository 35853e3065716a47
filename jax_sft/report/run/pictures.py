"""The plots of a run as PNG files, drawn by matplotlib, which is an extra.

In: a `RunRecord`, a folder. Out: a file for each plot, of the same numbers as the page.
"""

import pathlib

from jax_sft.report.run.curves import Plot, all_plots
from jax_sft.report.run.record import RunRecord

# As in run.css, for a light page.
COLOURS = ("#2f7d4f", "#3567b0", "#c2571a", "#8a2f9e", "#a07400", "#c0392f", "#0e7f8a", "#5f6670")
_OF_MARK = {"best": "#2f7d4f", "stage": "#77808c", "alarm": "#c9574d"}


def write_pngs(record: RunRecord, folder: pathlib.Path) -> list[pathlib.Path]:
    """Write a PNG file for each plot into `folder`, which is made if need be.

    Raises:
        ImportError: matplotlib is not there.
        OSError: the folder cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # pyright: ignore[reportMissingImports]  an extra
        from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            f"PNG files of the plots need matplotlib ({error}): pip install 'jax-sft[plots]', or leave out --png"
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for plot in all_plots(record):
        picture = Figure(figsize=(9 if plot.is_wide else 6, 4), dpi=150, layout="constrained")
        FigureCanvasAgg(picture)
        _draw(picture.add_subplot(), plot)
        path = folder / f"{plot.key}.png"
        picture.savefig(path)
        written.append(path)
    return written


def _draw(axes, plot: Plot) -> None:
    """Draw on matplotlib's axes. Names are plain text: a dollar sign in them begins no formula."""
    for curve, colour in zip(plot.curves, COLOURS, strict=False):
        style = "--" if curve.dashed else "-"
        name = curve.name.encode("utf-8", "replace").decode().replace("$", r"\$")
        marker = None if curve.is_dense else "o"
        axes.plot(
            curve.steps, curve.values, style, color=colour, marker=marker, markersize=4, linewidth=1.5, label=name
        )
    for mark in plot.marks:
        axes.axvline(mark.step, color=_OF_MARK[mark.kind], linewidth=1, linestyle=":")
    axes.set_title(f"{plot.title}{f' ({plot.unit})' if plot.unit else ''}".replace("$", r"\$"), fontsize=11)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    if len(plot.curves) > 1:
        handles, labels = axes.get_legend_handles_labels()
        # A name that begins with an underscore would be left out of the legend.
        axes.legend(handles, [f" {label}" if label.startswith("_") else label for label in labels], fontsize=9)
