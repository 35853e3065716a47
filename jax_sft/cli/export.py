"""`jax-sft export`."""

import argparse
import pathlib
import shlex
import sys

from jax_sft.cli.start import (
    EXIT_OK,
    start_devices,
)


def run_export(options: argparse.Namespace, _: list[str]) -> int:
    """Write the folder, and push it if asked to."""
    from jax_sft.export import export_model, export_workdir
    from jax_sft.hf.push import check_push, push

    if options.private and not options.push_to_hub:
        raise ValueError("--private belongs to --push-to-hub; name what is to be pushed there, or leave it out")
    if options.push_to_hub:
        check_push(options.push_to_hub)
    start_devices()
    out = pathlib.Path(options.out)
    written = {"dtype": options.dtype, "name": options.push_to_hub, "certified": not options.no_certificate}
    if options.workdir:
        if options.revision is not None:
            raise ValueError("--revision belongs to --model; a workdir's manifest names its own")
        if options.adapter is not None:
            raise ValueError("--adapter belongs to --model; a workdir has its own")
        step = export_workdir(pathlib.Path(options.workdir), out, step=options.step, form=options.format, **written)
        print(f"exported step {step} to {out}")
    else:
        if options.step is not None:
            raise ValueError("--step belongs to --workdir; a model folder has no steps")
        adapters = options.adapter or [None]
        if len(adapters) > 1:
            raise ValueError(
                "--adapter is given twice, and one is exported at a time; merge one, then the next into that"
            )
        export_model(options.model, out, revision=options.revision, adapter=adapters[0], form=options.format, **written)
        print(f"exported to {out}")
    if options.push_to_hub:
        again = shlex.join(["jax-sft", *sys.argv[1:]])
        print(f"pushed to {push(out, options.push_to_hub, private=options.private, again=again)}")
    return EXIT_OK
