"""Code: a model that writes what was asked for, in one block, that runs, and explains it shortly.

Purpose: functions, tests, fixes and explanations in the languages of the house.
Hardware: eight devices of 80 GB. By arithmetic, on each: weights, gradient and two moments in float32 15 GB (7.6 B x
16 bytes / 8), a layer whole 1 GB, inputs of 28 layers for 2 rows of 8,192 3.3 GB, embedding and head whole 4.4 GB,
logits and a layer at work 5 GB: 29 GB. Not run: no such hardware here.
Time: by arithmetic 46 G FLOPs a token: at 40 % of 8 x 989 TFLOP/s 69,000 tokens/s; 300,000 conversations of 700
tokens twice are 420 M tokens, 1.7 hours.
Expected result: lower loss on code/; shorter answers than before, with one block of code.
Command: jax-sft train --config configs/recipes/code.py --workdir runs/code

Data card: code/ are tasks with answers that were run against tests (rows that failed are not in it); review/ are
explanations and fixes; licences of the code that answers quote belong into the card. Keys and passwords are searched
for and taken out before the files come here; the patterns of data.quality know e-mail addresses and numbers, not
secrets.
Checks: jax-sft data --config configs/recipes/code.py --html code.html; leakage: name the benchmarks that you will
measure with in data.quality.benchmarks, or the score is worth nothing. Angle brackets are not HTML: look at what that
rule finds before dropping.
Watch: validation loss of whitespace-heavy code falls without better code: measure pass@1. Watch libraries that do not
exist.
"""

from jax_sft import config as jax_sft_config


def get_config():
    config = jax_sft_config.default()
    config.model.path = "Qwen/Qwen2.5-Coder-7B"
    config.model.chat_template = "chatml"
    config.data.sets = {
        "code": {"paths": ("data/code/*.jsonl",), "weight": 4.0},
        "review": {"paths": ("data/review/*.jsonl",), "weight": 1.0},
    }
    config.data.holdout = 0.01
    config.data.quality.near_duplicate = "drop"
    config.data.quality.cut_off = "drop"  # a block of code that is not closed
    config.data.quality.loops = "note"  # code repeats itself for good reasons: look before dropping
    config.data.quality.leakage = "drop"
    config.data.quality.benchmarks = ("data/benchmarks/*.jsonl",)
    config.data.card = {
        "licence": "of the answers and of the code that they quote",
        "origin": "which answers were run against tests",
        "intended use": "functions, tests, fixes and explanations, read by a programmer",
        "must not be used for": "code that nobody reads before it runs",
    }
    config.data.max_length = 8192
    config.train.epochs = 2.0
    config.train.batch_size = 64
    config.train.accumulation = 4
    config.train.remat = "full"
    config.optim.lr = 1e-5
    config.optim.warmup_steps = 50
    config.mesh.fsdp = 8
    config.evaluate.every_steps = 200
    config.evaluate.probes = "own"  # does it answer, stop, keep its role: untrained, and as exported
    config.evaluate.forgetting.texts = "own"  # how far it goes from the base on general text
    config.evaluate.prompts = (
        "Write a Python function that merges overlapping intervals.",
        "用 Python 写一个函数，判断一个字符串是否是回文，忽略标点。",
        "Why does this loop never end?\n\nwhile i < 10:\n    print(i)",
    )
    return config
