"""The door: `jax-sft train | data | eval | chat | export | report`. The only reader of flags.

In: a command line. Out: an exit status: 0 done, 1 a fault the user can mend (one clear message), 75 saved on a signal
(start again to go on).
"""

import argparse
import dataclasses
import functools
import json
import logging
import os
import pathlib
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from jax_sft import config as configs
from jax_sft.disk import told_if_full
from jax_sft.memory import told_if_short

if TYPE_CHECKING:
    from jax_sft.assistant import Assistant

EXIT_OK, EXIT_USER_ERROR, EXIT_TRY_AGAIN = 0, 1, 75


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and turn what a user can mend into one message on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        options, overrides = _parse(arguments)
        logging.basicConfig(level=logging.WARNING, format="%(message)s")
        logging.getLogger("jax_sft").setLevel(logging.INFO)
        places = filter(None, (getattr(options, name, None) for name in ("out", "workdir")))
        with told_if_full(*places), told_if_short(_DOING.get(str(options.command), str(options.command))):
            return options.run(options, overrides)
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except (ValueError, OSError, ImportError) as error:
        return _fail(error, str(error) or type(error).__name__)
    except MemoryError as error:
        return _fail(error, str(error) or "out of host memory")
    except KeyboardInterrupt:
        return _fail(None, "interrupted")
    except RuntimeError as error:
        first_line = (str(error).splitlines() or [""])[0]
        if any(word in str(error) for word in _OTHERS_GONE) and os.environ.get("JAX_COORDINATOR_ADDRESS"):
            return _fail(
                error,
                f"another process of this run ended or cannot be reached ({first_line}); see its last message, then "
                "start all of them again: they go on from the newest checkpoint",
            )
        raise


_OTHERS_GONE = ("Gloo", "gloo", "UNAVAILABLE", "DEADLINE_EXCEEDED", "NCCL", "coordination service")
# What a command does where no better name is known: of jax_sft.memory.
_DOING = {"eval": "losses", "chat": "answer"}


class _Parser(argparse.ArgumentParser):
    """argparse, but a wrong flag is a user error like any other: one sentence, exit status 1."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see {self.prog} --help")


def build_parser() -> argparse.ArgumentParser:
    """All commands and their flags."""
    parser = _Parser(prog="jax-sft", description="Supervised fine-tuning in JAX.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(run=run)
        return sub

    train = command("train", _train, "Fine-tune as a config file says; resumes by itself on the same workdir.")
    train.add_argument("--config", required=True, metavar="C.py")
    train.add_argument("--workdir", metavar="W", help="where the files go; default: the config's `workdir`")

    data = command("data", _data, "Show what would be trained on: counts, histograms, tokens in colour.")
    data.add_argument("--config", required=True, metavar="C.py")
    data.add_argument("--show", type=_not_negative, default=3, metavar="N", help="sequences shown token by token")
    data.add_argument("--html", metavar="F.html", help="the same and more as one self-contained page")
    data.add_argument("--card", metavar="F.md", help="a data card: files with hashes, counts, data.card, known limits")
    data.add_argument("--dump", metavar="F.jsonl", help="a line per sequence: id, source, tokens, weights, text")
    data.add_argument(
        "--clean", metavar="D", help="only write the training data as data.quality leaves it, and what it left out"
    )
    data.add_argument(
        "--score", metavar="F.jsonl", help="only this: how hard each conversation is for the model, a line for each"
    )

    evaluate = command("eval", _eval, "Loss and accuracy on a data file, alone or against another model.")
    _add_model_flags(evaluate)
    evaluate.add_argument("--data", default=[], nargs="+", metavar="F")
    evaluate.add_argument("--against", metavar="M", help="a second model: the same numbers, side by side")
    evaluate.add_argument(
        "--prompt", action="append", default=[], metavar="P", help="a prompt to answer; may be repeated"
    )
    evaluate.add_argument(
        "--answers", type=_not_negative, default=0, metavar="N", help="also answer the first N conversations"
    )
    evaluate.add_argument(
        "--probes",
        nargs="?",
        const="",
        metavar="F.jsonl",
        help="does it answer or continue, stop, keep its role; own prompts",
    )
    evaluate.add_argument(
        "--rules",
        nargs="?",
        const="",
        metavar="F.jsonl",
        help="instructions that a program checks; own prompts or IFEval's file",
    )
    evaluate.add_argument(
        "--metric",
        action="append",
        default=[],
        metavar="NAME",
        help="of answers to --data against its own: f1, chrf, ...",
    )
    evaluate.add_argument("--run-code", action="store_true", help="unsafe: pass_at_1 runs what the model wrote")
    evaluate.add_argument("--predictions", metavar="F.jsonl", help="what was said to probes, rules and tasks")
    evaluate.add_argument("--max-new-tokens", type=_positive, default=96, metavar="N")
    evaluate.add_argument(
        "--max-length",
        type=_positive,
        metavar="N",
        help="longer conversations are dropped, and counted; without it, one beyond a model's context is an error",
    )
    evaluate.add_argument("--batch-size", type=_positive, default=8, metavar="N")
    evaluate.add_argument(
        "--config",
        metavar="C.py",
        help="read the files as its data section says, and --model (not --against) with its model.chat_template",
    )
    evaluate.add_argument("--out", metavar="F.json")

    chat = command("chat", _chat, "Talk to a model in the terminal; with --prompt, print one answer.")
    _add_model_flags(chat)
    chat.add_argument("--prompt", metavar="P")
    chat.add_argument("--system", metavar="S", help="a system message before the conversation")
    chat.add_argument("--max-new-tokens", type=_positive, default=256, metavar="N")
    chat.add_argument("--greedy", action="store_true", help="the most likely token each time")
    chat.add_argument("--temperature", type=float, default=0.7)
    chat.add_argument("--top-k", type=int, default=0)
    chat.add_argument("--top-p", type=float, default=0.95)
    chat.add_argument("--repetition-penalty", type=float, default=1.0)
    chat.add_argument("--seed", type=int, default=0)

    export = command("export", _export, "Write a Hugging Face folder from a workdir or from another model.")
    source = export.add_mutually_exclusive_group(required=True)
    source.add_argument("--workdir", metavar="W")
    source.add_argument("--model", metavar="M")
    export.add_argument("--out", required=True, metavar="D")
    export.add_argument(
        "--adapter", action="append", metavar="A", help="with --model: a folder in PEFT's format, merged into it"
    )
    export.add_argument(
        "--format",
        choices=["full", "merged", "adapter"],
        help="of adapters: the base with them added in, or them alone; default: of a workdir as its config says",
    )
    export.add_argument("--step", type=_step, metavar="N|best", help="of the workdir; default: the newest")
    export.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    export.add_argument("--revision", metavar="R")
    export.add_argument("--no-certificate", action="store_true", help="do not read the folder back and compare")
    export.add_argument("--push-to-hub", type=_hub_name, metavar="org/name", help="then upload the folder, which stays")
    export.add_argument("--private", action="store_true", help="nobody else may see what is pushed")

    report = command("report", _report, "Write the page of a run, or of two beside each other; numbers and answers.")
    report.add_argument("workdirs", nargs="+", metavar="W", help="one or two workdirs of `jax-sft train`")
    report.add_argument("--out", metavar="F.html", help="default: report.html in the workdir")
    report.add_argument("--png", metavar="D", help="its plots as PNG files, too; needs matplotlib")
    return parser


def _positive(text: str) -> int:
    return _whole(text, least=1)


def _not_negative(text: str) -> int:
    return _whole(text, least=0)


def _step(text: str) -> int | str:
    return text if text == "best" else _not_negative(text)


def _hub_name(text: str) -> str:
    if not configs.is_hub_name(text):
        raise argparse.ArgumentTypeError(f"{text[:100]!r} is no name of the hub; write org/name, or user/name")
    return text


def _whole(text: str, *, least: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 10 and least <= int(text) < 2**31):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number from {least} to {2**31 - 1}")
    return int(text)


def _add_model_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="M", help="a Hugging Face folder, a hub id or a .gguf file")
    parser.add_argument("--revision", metavar="R", help="of a hub id")
    parser.add_argument(
        "--adapter", action="append", default=[], metavar="A", help="a folder in PEFT's format; may be repeated"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the computation")
    parser.add_argument("--chat-template", metavar="F", help="chatml, plain, alpaca or a Jinja file")


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Flags, and the `--config.a.b=value` overrides."""
    overrides, rest = [], []
    position = 0
    while position < len(arguments):
        word = arguments[position]
        if word.startswith("--config."):
            if "=" not in word and position + 1 < len(arguments):
                position += 1
                word = f"{word}={arguments[position]}"
            overrides.append(word.removeprefix("--config."))
        else:
            rest.append(word)
        position += 1
    options = build_parser().parse_args(rest)
    if overrides and not hasattr(options, "config"):
        raise ValueError(
            f"--config.{overrides[0]}: {options.command} takes no config; see jax-sft {options.command} --help"
        )
    return options, overrides


def _fail(error: BaseException | None, message: str) -> int:
    if error is not None and os.environ.get("JAX_SFT_TRACEBACK"):
        import traceback

        traceback.print_exception(error)
    print(f"jax-sft: {message}", file=sys.stderr)
    if os.environ.get("JAX_COORDINATOR_ADDRESS") and "jax" in sys.modules:
        # The usual way out would wait a minute for processes that are themselves waiting for this one, and then abort.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_USER_ERROR)
    return EXIT_USER_ERROR


def _train(options: argparse.Namespace, overrides: list[str]) -> int:
    run = configs.load(options.config, overrides)
    workdir = options.workdir or run.workdir
    if not workdir:
        raise ValueError("no workdir: pass --workdir W, or set it in the config")
    from jax_sft.signals import Signals, StoppedError

    try:
        with Signals() as signals:  # from the first second on: jax alone takes some to start
            _start_distributed()
            _start_devices()
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


def _check_writable(*paths: str | None) -> None:
    """Before the work, not after it."""
    for path in paths:
        if path is None:
            continue
        place = pathlib.Path(path).absolute()
        if not place.parent.is_dir():
            raise ValueError(f"{path}: the folder {pathlib.Path(path).parent} does not exist; make it first")
        if place.is_dir():
            raise ValueError(f"{path or '.'}: is a folder, where a file is to be written; name a file in it")
        if not os.access(place if place.exists() else place.parent, os.W_OK):
            raise ValueError(f"{path}: cannot be written; name a file elsewhere, or change the permissions")


def _check_apart(run: configs.RunConfig, *paths: str) -> None:
    """What is written must not replace the data it is about."""
    from jax_sft.data.source import files_of, training_parts, validation_parts

    parts = () if run.data.stream.on else (*training_parts(run.data), *validation_parts(run.data))
    read = [place.resolve() for part in parts for place in files_of(part.paths) if isinstance(place, pathlib.Path)]
    for path in paths:
        if pathlib.Path(path).resolve() in read:
            raise ValueError(f"{path}: is a file of the data, which would be replaced; name another")


def _start_distributed() -> None:
    """Join the other processes if JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say so."""
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if not address:
        return
    names = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    missing = [name for name in names if not os.environ.get(name, "").isdigit()]
    if missing:
        raise ValueError(f"JAX_COORDINATOR_ADDRESS is set, but {' and '.join(missing)} is not a number; set all three")
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"JAX_COORDINATOR_ADDRESS = {address!r} must be host:port, the same on every process")
    import jax

    count, number = (int(os.environ[name]) for name in names)
    try:
        jax.distributed.initialize(address, num_processes=count, process_id=number)
    except RuntimeError as error:
        raise ValueError(
            f"process {number} of {count} could not join the others at {address}: {str(error).splitlines()[0]}; start "
            "all of them, with one address and each its own JAX_PROCESS_ID"
        ) from error


def _data(options: argparse.Namespace, overrides: list[str]) -> int:
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
    _check_writable(options.html, options.card, options.dump, options.score)
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
    _start_distributed()
    _start_devices()
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


def _start_devices() -> None:
    """Start JAX, which may have been told to use what is not there."""
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # jaxlib without the platform fails with a bare assert
        asked = f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}"
        reason = (str(error).splitlines() or ["this jaxlib has no such platform"])[0]
        raise ValueError(
            f"{asked}: JAX cannot start: {reason}; install jax-sft[cuda12], [cuda13] or [tpu] for it, or unset "
            "JAX_PLATFORMS"
        ) from error
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
        # A program that XLA:CPU reads back from the cache may run its collectives in another order in each process, and
        # all wait for ever.
        jax.config.update("jax_enable_compilation_cache", False)


def _load(
    options: argparse.Namespace, model: str, *, chat_template: str | None, adapters: Sequence[str] = ()
) -> "Assistant":
    _start_devices()
    from jax_sft.assistant import load_assistant

    return load_assistant(
        model, revision=options.revision, dtype=options.dtype, chat_template=chat_template, adapters=adapters
    )


def _eval(options: argparse.Namespace, overrides: list[str]) -> int:
    data, chat_template = _eval_config(options, overrides)
    _check_writable(options.out)
    if options.against == options.model and not options.adapter:
        raise ValueError("--against names the same model as --model; name another one, or leave it out")
    from jax_sft.evaluate.answers import has_room
    from jax_sft.evaluate.side_by_side import conversations_of, print_accounts, print_answers, print_losses

    measured = _measured(options, data)
    # Adapters are those of --model; what it is compared with speaks by itself.
    asked = [(options.against, options.chat_template, [])] if options.against else []
    asked.append((options.model, chat_template, options.adapter))
    prompts = [[{"role": "user", "content": prompt}] for prompt in options.prompt]
    prompts += conversations_of(options.data, config=data, count=options.answers)
    prompts = _askable(options, prompts, asked) if prompts else []
    results, answers, accounts, reports = {}, {}, {}, {}
    for model, template, adapters in asked:
        assistant = _load(options, model, chat_template=template, adapters=adapters)
        for name in assistant.adapters or (None,):
            speaker, label = assistant.with_adapter(name), f"{model} + {name}" if name else model
            if options.data:
                results[label], accounts[label] = speaker.losses(
                    options.data, config=data, batch_size=options.batch_size
                )
            if prompts:
                answers[label] = speaker.answer_all(prompts, max_new_tokens=options.max_new_tokens)
            if measured is not None:
                ask = functools.partial(speaker.answer_all, max_new_tokens=options.max_new_tokens)
                asked_of_it = dataclasses.replace(measured, templated=speaker.base.chat_template is not None)
                fits = functools.partial(
                    has_room,
                    speaker.template,
                    max_positions=speaker.base.config.max_positions,
                    max_new_tokens=options.max_new_tokens,
                )
                asked_of_it, left_out = asked_of_it.fitting(fits)
                if left_out:
                    print(f"left out, {label} has no room for {left_out} prompts and their answers", file=sys.stderr)
                reports[label] = asked_of_it.measure(ask)
        del assistant
    if options.data:
        print_accounts(accounts)
        print_losses(results)
    if reports:
        from jax_sft.evaluate import behaviour
        from jax_sft.evaluate.metrics import write_predictions

        print("\n".join(behaviour.lines(reports)))
        if options.predictions:
            write_predictions(options.predictions, behaviour.predictions_of(reports))
    if prompts:
        print_answers(prompts, answers)
    if options.out:
        said = {
            name: (results[name].to_dict() | {"rows": dataclasses.asdict(accounts[name])} if options.data else {})
            | (reports[name].to_dict() if reports else {})
            for name in results or reports or answers
        }
        against = next(iter(said)) if options.against else None
        first, *others = (name for name in said if name != against)
        report = said[first]
        if others:
            report["adapters"] = {name: said[name] for name in others}
        if against is not None:
            report["against"] = said[against]
        if prompts:
            report["answers"] = [
                {"messages": messages, **{name: given[i].text for name, given in answers.items()}}
                for i, messages in enumerate(prompts)
            ]
        with told_if_full(options.out):
            text = json.dumps(report, indent=2, ensure_ascii=False)
            pathlib.Path(options.out).write_text(text + "\n", encoding="utf-8")
    return EXIT_OK


def _measured(options: argparse.Namespace, data: configs.DataConfig) -> Any:
    """What the model is asked beside its losses (`behaviour.Asked`), read before it is loaded; None if nothing."""
    wants = (options.probes is not None, options.rules is not None, bool(options.metric))
    if not (options.data or options.prompt or any(wants)):
        raise ValueError("there is nothing to measure; name files with --data, or ask for --probes or --rules")
    if options.metric and not options.data:
        raise ValueError("--metric compares answers with those of --data, which is not set; name files there")
    if options.predictions and not any(wants):
        raise ValueError("--predictions holds what was said to --probes, --rules or --metric; ask for one of them")
    if options.predictions and options.predictions == options.out:
        raise ValueError(f"--predictions and --out are both {options.out}; name two files")
    if not any(wants):
        return None
    from jax_sft.data.source import parts_of
    from jax_sft.evaluate import behaviour, metrics, probes, rules

    for name in options.metric:
        if name not in metrics.METRICS:
            known = tuple(metrics.METRICS)
            raise ValueError(
                f"--metric {name}: no metric{configs.did_you_mean(name, known)}; there are {', '.join(known)}"
            )
    if "pass_at_1" in options.metric and not options.run_code:
        raise ValueError("--metric pass_at_1 runs what the model wrote; say --run-code if that may be")
    _check_writable(options.predictions)
    asked = behaviour.Asked(
        probes=probes.read_prompts(options.probes or None) if wants[0] else (),
        rules=rules.read_prompts(options.rules or None) if wants[1] else (),
        tasks=behaviour.tasks_of(parts_of(options.data), config=data, count=options.answers or None)
        if options.metric
        else (),
        metrics=tuple(options.metric),
        runs_code=options.run_code,
    )
    asked.check()
    return asked


def _askable(
    options: argparse.Namespace, prompts: list[Any], asked: list[tuple[str, str | None, list[str]]]
) -> list[Any]:
    """The prompts that every model has room for: two columns of answers are answers to the same prompts."""
    from jax_sft.evaluate.answers import askable
    from jax_sft.hf.load import load_pretrained
    from jax_sft.hf.peft import with_template_of

    for model, template, adapters in asked:
        base = load_pretrained(model, revision=options.revision, chat_template=template)
        own = {adapter: with_template_of(adapter, base) for adapter in adapters} if template is None else {}
        for name, speaker in (own or {model: base}).items():
            prompts, reasons = askable(
                prompts,
                template=speaker.template,
                max_positions=base.config.max_positions,
                max_new_tokens=options.max_new_tokens,
            )
            for reason in reasons:
                print(f"left out, {name} cannot answer {reason}", file=sys.stderr)
    return prompts


# What else sets in `eval` what a config's key sets in `train`.
_EVAL_FLAGS = {
    "model.path": "--model",
    "model.revision": "--revision",
    "model.dtype": "--dtype",
    "model.chat_template": "--chat-template",
    "data.train": "--data",
    "data.validation": "--data",
    "train.batch_size": "--batch-size",
    "evaluate.prompts": "--prompt",
    "evaluate.max_new_tokens": "--max-new-tokens",
}


def _eval_config(options: argparse.Namespace, overrides: list[str]) -> tuple[configs.DataConfig, str | None]:
    """How `eval` reads its files: a config's data section, or the defaults, and overrides of either.

    And the chat template of --model: --chat-template, else the config's. An override that `eval` would not read is
    refused; a config file may hold what it likes, being one of a training.
    """
    keys = [override.partition("=")[0] for override in overrides]
    for key in keys:
        of_several = key.startswith(("stages.", "data.sets."))
        if of_several or (
            key in configs.known_keys() and (key in {*_EVAL_FLAGS, "data.cache"} or not key.startswith("data."))
        ):
            way_out = f"set {_EVAL_FLAGS[key]} instead" if key in _EVAL_FLAGS else "leave it out"
            raise ValueError(f"--config.{key}: eval does not read this key; {way_out}")
    if options.max_length and "data.max_length" in keys:
        raise ValueError("--max-length and --config.data.max_length are both set; leave one out")
    if options.config:
        run = configs.load(options.config, overrides)
    else:
        config = configs.default().to_dict()
        files = options.data or [options.model]  # a config names files; without --data none is read
        config["model"]["path"], config["data"]["train"], config["train"]["steps"] = options.model, files, 1
        run = configs.from_config_dict(config, overrides)
    data = dataclasses.replace(run.data, max_length=options.max_length) if options.max_length else run.data
    return data, options.chat_template or run.model.chat_template


def _chat(options: argparse.Namespace, _: list[str]) -> int:
    from jax_sft.chat import talk
    from jax_sft.generate import Sampling

    sampling = Sampling(
        temperature=0.0 if options.greedy else options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        repetition_penalty=options.repetition_penalty,
        seed=options.seed,
    )
    assistant = _load(options, options.model, chat_template=options.chat_template, adapters=options.adapter)
    history = [{"role": "system", "content": options.system}] if options.system else []
    if options.prompt is not None:
        history.append({"role": "user", "content": options.prompt})
        print(assistant.answer(history, max_new_tokens=options.max_new_tokens, sampling=sampling).text)
        return EXIT_OK
    talk(assistant, history, sampling=sampling, max_new_tokens=options.max_new_tokens)
    return EXIT_OK


def _export(options: argparse.Namespace, _: list[str]) -> int:
    from jax_sft.export import export_model, export_workdir
    from jax_sft.hf.push import check_push, push

    if options.private and not options.push_to_hub:
        raise ValueError("--private belongs to --push-to-hub; name what is to be pushed there, or leave it out")
    if options.push_to_hub:
        check_push(options.push_to_hub)
    _start_devices()
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


def _report(options: argparse.Namespace, _: list[str]) -> int:
    from jax_sft.report.run import report

    _check_writable(options.out)
    out, png = (pathlib.Path(path) if path else None for path in (options.out, options.png))
    for line in report([pathlib.Path(place) for place in options.workdirs], out=out, png=png):
        print(line)
    return EXIT_OK
