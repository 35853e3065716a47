"""Customer service: a model that solves a request over several turns, with the shop's tools, in the shop's voice.

Purpose: multi-turn dialogues with tool calls (look up an order, open a return), in the tone of the company.
Hardware: one device of 40 GB. By arithmetic: base 8.1 GB (4.0 B x 2 bytes), adapters of rank 16 0.5 GB (33 M x 16
bytes), inputs of 36 layers for 4 rows of 4,096 3 GB, logits and a layer at work 3 GB: 15 GB. Not run: no such
hardware here.
Time: by arithmetic 16 G FLOPs a token: at 40 % of 312 TFLOP/s 7,800 tokens/s; 20,000 dialogues of 700 tokens twice
are 28 M tokens, an hour.
Expected result: lower loss on dialogues/; tool calls with the right name and arguments, which decide more than the
words.
Command: jax-sft train --config configs/recipes/customer_service.py --workdir runs/customer_service

Data card: dialogues/ are solved cases, read by a team lead, with the tools of the shop in the column `tools` and
results as `tool` messages; unsolved and angry ones are left out, or end in a hand-over to a person. style/ are single
answers in the company's voice. Customers are real: names, addresses, order and card numbers are replaced before the
files come here, and what the patterns still find is masked.
Checks: jax-sft data --config configs/recipes/customer_service.py --show 5: tool calls must be coloured as trained,
results of tools not. Look at role order faults: exported tickets often have two customer messages in a row.
Watch: promises (refunds, dates) that no tool gave. Watch that it still asks when the order number is missing.
"""

from jax_sft import config as jax_sft_config


def get_config():
    config = jax_sft_config.default()
    config.model.path = "Qwen/Qwen3-4B-Instruct-2507"
    config.lora.rank = 16
    config.data.sets = {
        "dialogues": {"paths": ("data/dialogues/*.jsonl",), "weight": 4.0},
        "style": {"paths": ("data/style/*.jsonl",), "weight": 1.0, "cap": 5_000},
    }
    config.data.holdout = 0.02
    config.data.quality.roles = "drop"
    config.data.quality.same_content = "drop"
    config.data.quality.empty_answer = "drop"
    config.data.quality.refusal = "drop"  # an answer that calls itself a language model is not the shop's
    config.data.quality.personal_data = "mask"
    config.data.card = {
        "licence": "the company's own",
        "origin": "solved cases, from when to when, and who has read them",
        "intended use": "requests about orders and returns, with the shop's tools",
        "must not be used for": "promises that no tool has confirmed",
    }
    config.data.max_length = 4096
    config.train.epochs = 2.0
    config.train.batch_size = 16
    config.train.accumulation = 4
    config.optim.warmup_steps = 20
    config.evaluate.every_steps = 100
    config.evaluate.probes = "own"  # does it answer, stop, keep its role: untrained, and as exported
    config.evaluate.forgetting.texts = "own"  # how far it goes from the base on general text
    config.evaluate.prompts = (
        "Where is my parcel?",
        "我想退货，怎么办理？",
        "Your service is a joke. I want my money back NOW.",
    )
    return config
