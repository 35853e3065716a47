"""`jax-sft data`: what is trained on, shown, cleaned or scored."""

import argparse
import json
import pathlib

from jax_sft import config as configs
from jax_sft.cli.start import (
    EXIT_OK,
    check_writable,
    start_devices,
    start_distributed,
)
from jax_sft.disk import told_if_full
from jax_sft.memory import told_if_short


def run_data(options: argparse.Namespace, overrides: list[str]) -> int:
    """Show, dump, clean or score what would be trained on."""
    run = configs.load(options.config, overrides)
    written = {name: getattr(options, name) for name in ("html", "card", "dump", "score") if getattr(options, name)}
    if options.clean and written:
        raise ValueError(f"--clean does not combine with --{next(iter(written))}; call jax-sft data once more for that")
    if options.score and len(written) > 1:
        raise ValueError("--score does not combine with --html, --card and --dump; call jax-sft data again for those")
    _check_apart(run, *written.values())
    if options.clean:
        from jax_sft.data.quality.clean import clean

        with told_if_full(options.clean):
            for line in clean(run.data, pathlib.Path(options.clean)):
                print(line)
        return EXIT_OK
    check_writable(options.html, options.card, options.dump, options.score)
    if options.score:
        return _score(options, run)
    from jax_sft.data.dataset import check_context, dump, tokenize
    from jax_sft.data.source import training_parts, validation_groups, validation_parts
    from jax_sft.parameters import load_base
    from jax_sft.report.card import make_card, markdown
    from jax_sft.report.page import View, html_page
    from jax_sft.report.summary import summarize
    from jax_sft.report.terminal import show_sequences, terminal_report
    from jax_sft.run_data import epoch_loader, first_blocks

    base = load_base(run)
    cache = pathlib.Path(run.data.cache) if run.data.cache else None
    parts = {"train": training_parts(run.data), **validation_groups(run.data)}
    views: dict[str, View] = {}
    for name, of in parts.items():
        if name == "train" and run.data.stream.on:
            dataset = first_blocks(run, of, base.template, max_positions=base.config.max_positions)
            print(f"the first block of each lane of the stream: {len(dataset):,} sequences; the rest is not read here")
        else:
            references = validation_parts(run.data) if name == "train" else ()
            dataset = tokenize(run.data, of, base.template, cache_dir=cache, references=references)
        check_context(dataset, base.config.max_positions, name=f"data.{name.partition(',')[0]}")
        loader = epoch_loader(run, dataset, is_mixed=name == "train" and not run.data.stream.on)
        views[name] = View(dataset, loader, summarize(dataset, loader, base.tokenizer))
        print(terminal_report(views[name].summary, title=name))
        for line in loader.mixture_lines():
            print(line)
        if name == "train":
            print(show_sequences(dataset, base.tokenizer, options.show))
    if options.html or options.card:
        summaries = {name: view.summary for name, view in views.items()}
        card = make_card(run, parts, summaries, base.template, name=pathlib.Path(options.config).stem)
        if options.html:
            _write(options.html, html_page(views, base.tokenizer, card, count=max(options.show, 20)))
        if options.card:
            _write(options.card, markdown(card))
    if options.dump:
        with told_if_full(options.dump), pathlib.Path(options.dump).open("w", encoding="utf-8") as file:
            for line in dump(views["train"].dataset, base.tokenizer):
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        print(f"wrote {options.dump}")
    return EXIT_OK


def _check_apart(run: configs.RunConfig, *paths: str) -> None:
    """What is written must not replace the data it is about."""
    from jax_sft.data.source import files_of, training_parts, validation_parts

    parts = () if run.data.stream.on else (*training_parts(run.data), *validation_parts(run.data))
    read = [place.resolve() for part in parts for place in files_of(part.paths) if isinstance(place, pathlib.Path)]
    for path in paths:
        if pathlib.Path(path).resolve() in read:
            raise ValueError(f"{path}: is a file of the data, which would be replaced; name another")


def _write(path: str, text: str) -> None:
    with told_if_full(path):
        pathlib.Path(path).write_text(text, encoding="utf-8", errors="replace")
    print(f"wrote {path}")


def _score(options: argparse.Namespace, run: configs.RunConfig) -> int:
    out = pathlib.Path(options.score)
    from jax_sft.data.dataset import check_context, tokenize
    from jax_sft.data.scores import check_destination
    from jax_sft.data.source import training_parts, validation_parts
    from jax_sft.parameters import load_base

    check_destination(out)
    start_distributed()
    start_devices()
    from jax_sft.score import score

    base = load_base(run)
    cache = pathlib.Path(run.data.cache) if run.data.cache else None
    dataset = tokenize(
        run.data, training_parts(run.data), base.template, cache_dir=cache, references=validation_parts(run.data)
    )
    check_context(dataset, base.config.max_positions, name="data.train")
    with told_if_full(out), told_if_short("score"):
        for line in score(run, base, dataset, out):
            print(line)
    return EXIT_OK
