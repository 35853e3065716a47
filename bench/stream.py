"""How fast and in how much memory a stream is read, tokenised and packed, against a small set read the same way.

Writes synthetic JSONL shards into a scratch folder, streams a small part of them and then all, and deletes them. What
is trained on does not matter here: no device takes part. The memory of this process and its workers is sampled ten
times a second. A run stops after --minutes; since each lane begins in a place of its own and reads its units in an
order drawn over all shards, even a run that was stopped has read from everywhere, and says from how many units.

    python bench/stream.py --gigabytes 10 --minutes 5 --workers 1
"""

import argparse
import ctypes
import gc
import json
import os
import pathlib
import random
import shutil
import sys
import tempfile
import threading
import time

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from jax_sft.config import DataConfig, StreamConfig
from jax_sft.data.chat import ChatTemplate
from jax_sft.data.source import training_parts
from jax_sft.data.stream.loader import StreamLoader
from jax_sft.data.stream.shards import Plan, make_plan
from jax_sft.hf.tokenizer import load_tokenizer
from tests.tiny import CHATML, tiny_tokenizer

SHARD_BYTES = 256 * 2**20
SMALL_BYTES = 64 * 2**20


def write_shards(folder: pathlib.Path, total: int) -> None:
    """Conversations of some 100 to 2,000 characters; a few thousand different ones, in another order in each shard."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(5000)]

    def text(least: int, most: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(least, most)))

    lines = []
    for i in range(20_000):
        turns = [{"role": "user", "content": text(5, 60)}, {"role": "assistant", "content": text(10, 250)}]
        lines.append(json.dumps({"id": f"c{i}", "messages": turns}).encode() + b"\n")
    written = number = 0
    while written < total:
        rng.shuffle(lines)
        with open(folder / f"shard-{number:05d}.jsonl", "wb") as file:
            while file.tell() < min(SHARD_BYTES, total - written):
                file.writelines(lines)
            written += file.tell()
        number += 1


class Memory(threading.Thread):
    """The most resident bytes of this process and those it started, together."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = 0
        self._stop_now = threading.Event()

    def run(self) -> None:
        """Look until `stop` is called."""
        while not self._stop_now.wait(0.1):
            self.most = max(self.most, sum(map(_resident, _family())))

    def stop(self) -> int:
        """The most seen."""
        self._stop_now.set()
        self.join()
        return self.most


def _family() -> list[int]:
    """This process and all below it."""
    parents = {}
    for entry in pathlib.Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue  # it has ended meanwhile
    found = [os.getpid()]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def _resident(pid: int) -> int:
    try:
        return int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def stream(config: DataConfig, plan: Plan, template: ChatTemplate, seconds: float, *, lanes: int) -> dict[str, float]:
    """Read for so long, not counting the start of the workers and the first batch."""
    loader = StreamLoader(plan, template, config, batch_size=lanes, sources=plan.sources, steps=[2**30], shares=[[1.0]])
    gc.collect()  # what the last one read
    if sys.platform == "linux":  # glibc keeps what the threads of the last one gave back, 0.2 GB a time
        ctypes.CDLL(None).malloc_trim(0)
    memory = Memory()
    memory.start()
    tokens = positions = 0
    started = last = 0.0
    touched: set[tuple[int, ...]] = set()
    for step, batch in loader.prefetch(0, 2**30):
        last = time.perf_counter()
        if not started:
            started = last
            continue
        tokens += int(np.count_nonzero(batch.segments_BT))
        positions += batch.segments_BT.size
        states = loader.states_after(step + 1, np.arange(lanes))
        touched |= {(lane, *state[2:4]) for lane, state in enumerate(states.tolist())}
        if last - started > seconds:
            break
    return {
        "seconds": last - started,
        "tokens_per_s": tokens / (last - started),
        "conversations": loader.account.kept,
        "filled": tokens / positions,
        "units": len(touched),
        "resident_bytes": memory.stop(),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=10.0)
    parser.add_argument("--minutes", type=float, default=5.0, help="of reading the large set")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--lanes", type=int, default=32, help="rows of a batch")
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--scratch", default=None, help="folder for the shards, which are deleted at the end")
    parser.add_argument("--tokenizer", default=None, help="a model folder; without it, bytes are tokens")
    options = parser.parse_args()
    tokenizer = load_tokenizer(pathlib.Path(options.tokenizer)) if options.tokenizer else tiny_tokenizer()
    template = ChatTemplate(tokenizer, template=CHATML)
    scratch = pathlib.Path(tempfile.mkdtemp(prefix="jax-sft-stream-", dir=options.scratch))
    results = {}
    try:
        for name, size in (("small", SMALL_BYTES), ("large", int(options.gigabytes * 1e9))):
            (scratch / name).mkdir()
            if shutil.disk_usage(scratch).free < 1.5 * size:
                raise SystemExit(f"{scratch}: less than {1.5 * size / 1e9:.1f} GB are free; name another --scratch")
            write_shards(scratch / name, size)
        # Twice, in turns: on a machine that others use, one of each says little.
        for name in ("small", "large", "small", "large"):
            config = DataConfig(
                train=(str(scratch / name),),
                max_length=options.max_length,
                workers=options.workers,
                stream=StreamConfig(on=True),
            )
            started = time.perf_counter()
            plan = make_plan(config, training_parts(config), lanes=options.lanes, seed=0)
            planned = time.perf_counter() - started
            seconds = 60 * options.minutes / 2 if name == "large" else min(60.0, 60 * options.minutes / 2)
            measured = stream(config, plan, template, seconds, lanes=options.lanes)
            results.setdefault(name, []).append(measured)
            print(
                f"{name}: {sum(u.size for u in plan.units[0]) / 1e9:.2f} GB in {len(plan.units[0]):,} units, planned "
                f"in {planned:.2f} s; {measured['seconds']:.0f} s, {measured['conversations']:,} conversations, "
                f"{measured['tokens_per_s']:,.0f} tokens/s, {measured['filled']:.1%} filled, from "
                f"{measured['units']:,} units, {measured['resident_bytes'] / 1e9:.2f} GB resident at "
                f"most, workers {options.workers}",
                flush=True,
            )
    finally:
        shutil.rmtree(scratch)
    best = {name: max(m["tokens_per_s"] for m in of) for name, of in results.items()}
    print(f"the large set at {best['large'] / best['small']:.1%} of the small one's rate (the better of two each)")


if __name__ == "__main__":
    main()
