"""All commands and their flags.

In: nothing. Out: a parser, whose `run` of a command takes the parsed flags and the overrides of a config.
"""

import argparse
from typing import Any, NoReturn

from jax_sft import config as configs
from jax_sft.cli.chat import run_chat
from jax_sft.cli.data import run_data
from jax_sft.cli.evaluate import run_evaluate
from jax_sft.cli.export import run_export
from jax_sft.cli.report import run_report
from jax_sft.cli.train import run_train


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

    train = command("train", run_train, "Fine-tune as a config file says; resumes by itself on the same workdir.")
    train.add_argument("--config", required=True, metavar="C.py")
    train.add_argument("--workdir", metavar="W", help="where the files go; default: the config's `workdir`")

    data = command("data", run_data, "Show what would be trained on: counts, histograms, tokens in colour.")
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

    evaluate = command("eval", run_evaluate, "Loss and accuracy on a data file, alone or against another model.")
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
    evaluate.add_argument(
        "--forgetting",
        nargs="?",
        const="",
        metavar="F",
        help="how far --model has gone from --against, or --adapter from its base, on general texts: own ones, or a "
        ".jsonl or .txt file",
    )
    _add_task_flags(evaluate)
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

    chat = command("chat", run_chat, "Talk to a model in the terminal; with --prompt, print one answer.")
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

    export = command("export", run_export, "Write a Hugging Face folder from a workdir or from another model.")
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
    export.add_argument(
        "--interpolate",
        nargs="+",
        type=float,
        metavar="A",
        help="weights between the base, 0, and what was trained, 1; several: a folder of each in --out",
    )
    export.add_argument(
        "--data", nargs="+", default=[], metavar="F", help="of --interpolate: measure the loss on these"
    )
    export.add_argument(
        "--texts", nargs="?", const="", metavar="F", help="with --interpolate: what is forgotten, by these; own texts"
    )
    export.add_argument("--no-certificate", action="store_true", help="do not read the folder back and compare")
    export.add_argument("--push-to-hub", type=_hub_name, metavar="org/name", help="then upload the folder, which stays")
    export.add_argument("--private", action="store_true", help="nobody else may see what is pushed")

    report = command("report", run_report, "Write the page of a run, or of two beside each other; numbers and answers.")
    report.add_argument("workdirs", nargs="+", metavar="W", help="one or two workdirs of `jax-sft train`")
    report.add_argument("--out", metavar="F.html", help="default: report.html in the workdir")
    report.add_argument("--png", metavar="D", help="its plots as PNG files, too; needs matplotlib")
    return parser


def _positive(text: str) -> int:
    """A flag that is a whole number from 1 on."""
    return _whole(text, least=1)


def _not_negative(text: str) -> int:
    """A flag that is a whole number from 0 on."""
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


def _add_task_flags(parser: argparse.ArgumentParser) -> None:
    """Named as lm-evaluation-harness names them, where it has them."""
    parser.add_argument(
        "--tasks", default=[], nargs="+", metavar="T", help="of lm-evaluation-harness: names, YAML files or folders"
    )
    parser.add_argument("--tasks-folder", metavar="D", help="a folder whose tasks are known by their names")
    parser.add_argument("--limit", type=_positive, metavar="N", help="questions of each task; default: all")
    parser.add_argument("--num-fewshot", type=_not_negative, metavar="N", help="default: as the task says")
    parser.add_argument("--apply-chat-template", action="store_true", help="tasks are put as a conversation")


def _add_model_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="M", help="a Hugging Face folder, a hub id or a .gguf file")
    parser.add_argument("--revision", metavar="R", help="of a hub id")
    parser.add_argument(
        "--adapter", action="append", default=[], metavar="A", help="a folder in PEFT's format; may be repeated"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the computation")
    parser.add_argument("--chat-template", metavar="F", help="chatml, plain, alpaca or a Jinja file")
