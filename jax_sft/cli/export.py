"""`jax-sft export`."""

import argparse
import functools
import json
import pathlib
import shlex
import sys
from collections.abc import Callable
from typing import Any

from jax_sft.cli.start import EXIT_OK, start_devices
from jax_sft.disk import written_whole


def run_export(options: argparse.Namespace, _: list[str]) -> int:
    """Write the folder, or one of each factor, and push it if asked to."""
    from jax_sft.hf.push import check_push, push

    if options.private and not options.push_to_hub:
        raise ValueError("--private belongs to --push-to-hub; name what is to be pushed there, or leave it out")
    _check_factors(options)
    if options.push_to_hub:
        check_push(options.push_to_hub)
    start_devices()
    out, write = pathlib.Path(options.out), _writer(options)
    factors = options.interpolate or [1.0]
    if len(factors) == 1 and not (options.data or options.texts is not None):
        print(f"{write(out, factors[0])} to {out}")
    else:
        _sweep(options, out, factors, write)
    if options.push_to_hub:
        again = shlex.join(["jax-sft", *sys.argv[1:]])
        print(f"pushed to {push(out, options.push_to_hub, private=options.private, again=again)}")
    return EXIT_OK


def _writer(options: argparse.Namespace) -> Callable[[pathlib.Path, float], str]:
    """What writes one folder, at a factor, and says what it did."""
    from jax_sft.export import export_model, export_workdir

    written: dict[str, Any] = {"dtype": options.dtype, "name": options.push_to_hub, "form": options.format}
    written["certified"] = not options.no_certificate
    if options.workdir:
        if options.revision is not None:
            raise ValueError("--revision belongs to --model; a workdir's manifest names its own")
        if options.adapter is not None:
            raise ValueError("--adapter belongs to --model; a workdir has its own")
        export = functools.partial(export_workdir, pathlib.Path(options.workdir), step=options.step, **written)
        return lambda out, factor: f"exported step {export(out, factor=factor)}"
    if options.step is not None:
        raise ValueError("--step belongs to --workdir; a model folder has no steps")
    adapters = options.adapter or [None]
    if len(adapters) > 1:
        raise ValueError("--adapter is given twice, and one is exported at a time; merge one, then the next into that")
    rewrite = functools.partial(export_model, options.model, revision=options.revision, adapter=adapters[0], **written)

    def write(out: pathlib.Path, factor: float) -> str:
        rewrite(out, factor=factor)
        return "exported"

    return write


def _check_factors(options: argparse.Namespace) -> None:
    from jax_sft.interpolate import check_factor

    factors = options.interpolate
    if factors is None:
        if options.data or options.texts is not None:
            raise ValueError("--data and --texts measure what --interpolate writes, which is not set; see jax-sft eval")
        return
    for factor in factors:
        check_factor(factor)
        if factors.count(factor) > 1:
            raise ValueError(f"--interpolate names {factor:g} twice; leave one out")
    if options.push_to_hub and (len(factors) > 1 or options.data or options.texts is not None):
        raise ValueError(
            "--push-to-hub pushes one folder; look at those of --interpolate first, and export the best again, with "
            "one factor and without --data and --texts"
        )


def _sweep(
    options: argparse.Namespace, out: pathlib.Path, factors: list[float], write: Callable[[pathlib.Path, float], str]
) -> None:
    """A folder for each factor, and if data or texts are named a table of what each is worth."""
    from jax_sft.evaluate.forgetting import read_texts
    from jax_sft.interpolate import lines, sweep
    from jax_sft.manifest import read_config

    texts = [] if options.texts is None else read_texts(options.texts or None)
    folders = {factor: out / f"interpolate-{factor:g}" for factor in factors}
    for factor, folder in folders.items():
        print(f"{write(folder, factor)} to {folder}")
    if not (options.data or texts):
        return
    config = read_config(pathlib.Path(options.workdir)) if options.workdir else None
    form = options.format or (config.export.format if config else "merged")
    base, revision = (config.model.path, config.model.revision) if config else (options.model, options.revision)
    points = sweep(
        folders, base=base, revision=revision, are_adapters=form == "adapter", data=options.data, texts=texts
    )
    told = lines(points)
    print("\n".join(told))
    with written_whole(out / "interpolate.json") as file:
        file.write(json.dumps([point.to_dict() for point in points], indent=1, ensure_ascii=False) + "\n")
    with written_whole(out / "interpolate.md") as file:
        file.write("\n".join(told) + "\n")
