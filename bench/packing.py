"""How full rows are, and what a plan of a million sequences costs: python bench/packing.py [--data FOLDER]

First the fill of the sets of bench/data_speed.py at 2,048 and 4,096, beside TRL's packing "bfd" of the same lengths
(needs trl). Then plans of lengths that are drawn, and the loader of a large tokenised set, each in a process of its
own: wall clock, processor time, peak of memory.
"""

import argparse
import json
import math
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from jax_sft.config import DataConfig
from jax_sft.data.conversation import Account
from jax_sft.data.loader import Loader, Stage
from jax_sft.data.packing import pack, predict_capacity
from jax_sft.data.store import Ids, TokenizedSet

KINDS = ("chat", "two kinds", "long and short")


def main() -> None:
    """Print three tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=pathlib.Path, help="the folder of bench/data_speed.py")
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--skip-fill", action="store_true", help="the plans alone, without trl")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        what, kind = options.child
        print(json.dumps(measure_plan(kind, options.count) if what == "plan" else measure_loader(options.count)))
        return
    if not options.skip_fill:
        print_fill(options.data)
    print("| lengths | sequences | rows | fill | bound | wall s | CPU s | peak MB | of it above the start |")
    print("|:--|--:|--:|--:|--:|--:|--:|--:|--:|")
    for kind in KINDS:
        found = [in_a_process("plan", kind, options.count) for _ in range(options.repeats)]
        last = found[-1]
        print(
            f"| {kind} | {options.count:,} | {last['rows']:,} | {last['fill']:.2%} | {last['bound']:.2%} "
            f"| {spread(found, 'wall')} | {spread(found, 'cpu')} | {last['peak']:,.0f} | {last['above']:,.0f} |",
            flush=True,
        )
    print("| a loader of a large set | wall s | CPU s | peak MB |\n|:--|--:|--:|--:|")
    for what, (wall, cpu, peak) in in_a_process("loader", "-", options.count).items():
        print(f"| {what} | {wall:.2f} | {cpu:.2f} | {peak:,.0f} |")


def in_a_process(what: str, kind: str, count: int) -> dict[str, Any]:
    """What a fresh process measures."""
    command = [sys.executable, __file__, "--child", what, kind, "--count", str(count)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True).stdout)


def spread(found: list[dict[str, float]], key: str) -> str:
    """Median (least-most)."""
    values = sorted(f[key] for f in found)
    return f"{values[len(values) // 2]:.2f} ({values[0]:.2f}-{values[-1]:.2f})"


def draw(kind: str, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Lengths up to 2,048 and trained positions of sequences."""
    rng = np.random.default_rng(seed)
    if kind == "chat":  # log-normal, mean 390
        lengths_N = np.exp(rng.normal(5.5, 1.0, count))
    elif kind == "two kinds":  # four short ones for each long one
        lengths_N = np.where(rng.random(count) < 0.8, rng.normal(150, 40, count), rng.normal(1400, 200, count))
    else:  # as many long as short: most long ones stay alone with what short ones there are
        lengths_N = np.where(rng.random(count) < 0.5, rng.normal(150, 40, count), rng.normal(1400, 200, count))
    lengths_N = lengths_N.clip(10, 2048).astype(np.int32)
    return lengths_N, np.clip(lengths_N * rng.beta(2, 2, count), 1, lengths_N).astype(np.int32)


def measure_plan(kind: str, count: int) -> dict[str, float]:
    """P and the plan of one epoch; `bound` is the fill that no plan can exceed."""
    lengths_N, trained_N = draw(kind, count)
    before = peak_mb()
    wall, cpu = time.perf_counter(), time.process_time()
    predicted = predict_capacity(lengths_N, trained_N, max_length=2048)
    rows = pack(lengths_N, trained_N, capacity=2048, predict_capacity=predicted, seed=0)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    total = int(lengths_N.sum())
    # No two of more than half a row share one.
    least = max(math.ceil(total / 2048), int((lengths_N > 1024).sum()))
    return {
        "rows": len(rows),
        "fill": total / len(rows) / 2048,
        "bound": total / least / 2048,
        "wall": wall,
        "cpu": cpu,
        "peak": peak_mb(),
        "above": peak_mb() - before,
    }


def measure_loader(count: int) -> dict[str, tuple[float, float, float]]:
    """The set, its loader at the start and at a resume in the third epoch, and what orders and mixtures ask of it."""
    found: dict[str, tuple[float, float, float]] = {}

    def timed(what: str, work: Callable[[], Any]) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        result = work()
        found[what] = time.perf_counter() - wall, time.process_time() - cpu, peak_mb()
        return result

    with tempfile.TemporaryDirectory() as folder:
        dataset = timed("(making it)", lambda: large_set(count, pathlib.Path(folder)))
        options: dict[str, Any] = {
            "batch_size": 64, "max_length": 2048, "packing": True, "sources": dataset.sources, "seed": 0
        }  # fmt: skip
        timed("Loader, 1 epoch", lambda: Loader(dataset, **options))
        three = timed("Loader, 3 epochs", lambda: Loader(dataset, **options, stages=[Stage(epochs=3)]))
        timed("its first batch", lambda: three.batch(0))
        timed("its second batch", lambda: three.batch(1))
        by_steps = timed("Loader, by steps", lambda: Loader(dataset, **options, stages=[Stage(steps=10**6)]))
        at = three.total_steps - 1
        timed("its batch late in epoch 3", lambda: by_steps.batch(at))
        timed("its next", lambda: by_steps.batch(at - 1))
        timed("of_source", lambda: dataset.of_source("b"))
        timed("answers_N", lambda: dataset.answers_N)
        timed(
            "Loader, 1 epoch by answers", lambda: Loader(dataset, **options, stages=[Stage(epochs=1, order="answers")])
        )
        timed("the draw of an epoch", lambda: three._streams[0].mixture.epoch(1))
        timed("10,000 ids", lambda: [dataset.ids[i] for i in range(10_000)])
    return found


def large_set(count: int, folder: pathlib.Path) -> TokenizedSet:
    """A set of `count` sequences of the kind "chat", a quarter as long, in memory-mapped files."""
    lengths_N, trained_N = draw("chat", count)
    lengths_N = np.maximum(lengths_N // 4, 2)
    trained_N = np.minimum(np.maximum(trained_N // 4, 1), lengths_N)
    offsets_N1 = np.concatenate([[0], np.cumsum(lengths_N, dtype=np.int64)])
    total = int(offsets_N1[-1])
    maps = {
        name: np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=dtype, shape=(total,))
        for name, dtype in (("tokens", np.int32), ("targets", np.int32), ("weights", np.float32))
    }
    steps_M = np.zeros(total + 1, np.int8)  # the end of each sequence is trained
    np.add.at(steps_M, offsets_N1[1:] - trained_N, 1)
    np.add.at(steps_M, offsets_N1[1:], -1)
    maps["weights"][:] = np.cumsum(steps_M[:-1], dtype=np.int8)
    names = [f"data.jsonl:{i}".encode() for i in range(count)]
    id_lengths_N = np.fromiter(map(len, names), np.int32, count)
    return TokenizedSet(
        tokens_M=maps["tokens"].view(np.ndarray),
        targets_M=maps["targets"].view(np.ndarray),
        weights_M=maps["weights"].view(np.ndarray),
        offsets_N1=offsets_N1,
        lengths_N=lengths_N,
        trained_N=trained_N,
        sources=("a", "b"),
        source_ids_N=(np.arange(count) % 2).astype(np.int32),
        ids=Ids(np.frombuffer(b"".join(names), np.uint8), id_lengths_N),
        account=Account(),
        fingerprint="",
    )


def print_fill(data: pathlib.Path | None) -> None:
    """Fill by set and row length, ours beside TRL's of the same lengths."""
    import data_speed
    import datasets
    import trl

    from jax_sft.data.chat import ChatTemplate
    from jax_sft.data.dataset import tokenize
    from jax_sft.data.source import parts_of

    datasets.disable_caching()
    datasets.disable_progress_bars()
    tokenizer = data_speed.read_tokenizer(None)
    stock = pathlib.Path(trl.__file__).parent / "chat_templates" / "qwen2_5_training.jinja"
    template = ChatTemplate(tokenizer, template=stock.read_text(encoding="utf-8"))
    print("| set | sequences | mean / median / p95 / longest | trained | 2,048 | TRL | 4,096 | TRL |")
    print("|:--|--:|--:|--:|--:|--:|--:|--:|")
    for name in ["demo", *(data_speed.SETS if data else ())]:
        path = data_speed.DEMO if name == "demo" or data is None else data / data_speed.SETS[name]
        with tempfile.TemporaryDirectory() as scratch:
            messages = data_speed.write_messages(
                path, pathlib.Path(scratch) / "messages.jsonl", data_speed.COLUMNS.get(name, {})
            )
            config = DataConfig(max_length=4096, too_long="truncate")
            found = tokenize(config, parts_of((str(messages),)), template, cache_dir=None, progress=False)
        cells = []
        for max_length in (2048, 4096):
            lengths_N = np.minimum(found.lengths_N, max_length)
            trained_N = np.minimum(found.trained_N, max_length)
            predicted = predict_capacity(lengths_N, trained_N, max_length=max_length)
            ours = len(pack(lengths_N, trained_N, capacity=max_length, predict_capacity=predicted, seed=0))
            table = datasets.Dataset.from_dict({"input_ids": [[0] * n for n in lengths_N.tolist()]})
            packed: Any = trl.pack_dataset(table, max_length, "bfd")  # type: ignore[reportPrivateImportUsage]
            theirs = packed.num_rows
            total = lengths_N.sum() / max_length
            cells += [f"{total / ours:.1%} ({ours:,})", f"{total / theirs:.1%} ({theirs:,})"]
        lengths_N = found.lengths_N
        print(
            f"| {name} | {len(found):,} | {lengths_N.mean():.0f} / {np.median(lengths_N):.0f} "
            f"/ {np.percentile(lengths_N, 95):.0f} / {lengths_N.max()} "
            f"| {found.trained_N.sum() / lengths_N.sum():.0%} | {' | '.join(cells)} |",
            flush=True,
        )


def peak_mb() -> float:
    """Most memory that this process has had, in MB, not that of the one that started it."""
    status = pathlib.Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024 / 1e6  # type: ignore[index]


if __name__ == "__main__":
    main()
