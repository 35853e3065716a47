"""`jax-sft train`."""

import argparse
import pathlib
import shlex
import sys

from jax_sft import config as configs
from jax_sft.cli.start import (
    EXIT_OK,
    EXIT_TRY_AGAIN,
    start_devices,
    start_distributed,
)


def run_train(options: argparse.Namespace, overrides: list[str]) -> int:
    """Train, or go on; the exit status tells whether it is done."""
    run = configs.load(options.config, overrides)
    workdir = options.workdir or run.workdir
    if not workdir:
        raise ValueError("no workdir: pass --workdir W, or set it in the config")
    from jax_sft.signals import Signals, StoppedError

    try:
        with Signals() as signals:  # from the first second on: jax alone takes some to start
            start_distributed()
            start_devices()
            from jax_sft.train_loop import train

            signals.stop_if_received()
            outcome = train(run, pathlib.Path(workdir), command=shlex.join(["jax-sft", *sys.argv[1:]]))
    except StoppedError:
        print("jax-sft: stopped before anything was done; start again to go on", file=sys.stderr)
        return EXIT_TRY_AGAIN
    if not outcome.finished:
        return EXIT_TRY_AGAIN
    import jax

    if jax.process_index() > 0:
        return EXIT_OK
    if outcome.before and outcome.after:
        change = outcome.after.loss / outcome.before.loss - 1
        told = f"{abs(change):.1%} {'lower' if change < 0 else 'higher'}"
        print(f"validation loss {outcome.before.loss:.4f} -> {outcome.after.loss:.4f} ({told})")
    print(f"exported to {outcome.export}")
    return EXIT_OK
