"""`jax-sft report`."""

import argparse
import pathlib

from jax_sft.cli.start import (
    EXIT_OK,
    check_writable,
)


def run_report(options: argparse.Namespace, _: list[str]) -> int:
    """Write the page, and say where it is."""
    from jax_sft.report.run import report

    check_writable(options.out)
    out, png = (pathlib.Path(path) if path else None for path in (options.out, options.png))
    for line in report([pathlib.Path(place) for place in options.workdirs], out=out, png=png):
        print(line)
    return EXIT_OK
