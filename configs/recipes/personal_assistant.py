"""Personal assistant: a model with a name and manners, that plans, writes, sums up, and stops when it is done.

Purpose: an everyday assistant with a name of its own, short and friendly, in English and Chinese.
Hardware: one device of 24 GB. By arithmetic: base 3.4 GB (1.7 B x 2 bytes), adapters of rank 32 0.6 GB (36 M x 16
bytes), inputs of 24 layers for 4 rows of 2,048 0.8 GB, logits and a layer at work 2 GB: 7 GB. Not run: no such
hardware here.
Time: by arithmetic 7 G FLOPs a token: at 40 % of 165 TFLOP/s 9,400 tokens/s; 30,000 conversations of 300 tokens three
times are 27 M tokens, 48 minutes.
Expected result: lower loss; asked who it is, in words that are not in the data, it says its name.
Command: jax-sft train --config configs/recipes/personal_assistant.py --workdir runs/personal_assistant

Data card: everyday/ are instructions of all kinds with good answers; identity/ are a few hundred turns about who it
is, drawn four times an epoch: fewer teach no name, many more make it introduce itself unasked.
Checks: jax-sft data --config configs/recipes/personal_assistant.py --html assistant.html; search the trained text for
the names of other assistants: answers that other models wrote bring them along.
Watch: the sample answers at each evaluation; it should say its name when asked, and only then.
"""

from jax_sft import config as jax_sft_config


def get_config():
    config = jax_sft_config.default()
    config.model.path = "HuggingFaceTB/SmolLM2-1.7B-Instruct"
    config.lora.rank = 32
    config.data.sets = {
        "everyday": {"paths": ("data/everyday/*.jsonl",)},
        "identity": {"paths": ("data/identity.jsonl",), "epochs": 4.0},
    }
    config.data.holdout = 0.02
    config.data.quality.near_duplicate = "note"  # turns about who it is are alike on purpose
    config.data.quality.cut_off = "drop"
    config.data.quality.loops = "drop"
    config.data.quality.refusal = "drop"
    config.data.quality.boilerplate = "drop"
    config.data.quality.word_lists = ("data/names_of_others.txt",)  # one a line; what it finds is counted, with places
    config.data.card = {
        "licence": "of each file, with its link",
        "origin": "which model or person wrote the answers",
        "intended use": "everyday questions, plans and short texts",
        "must not be used for": "posing as a person",
    }
    config.data.max_length = 2048
    config.train.epochs = 3.0
    config.train.batch_size = 16
    config.train.accumulation = 4
    config.optim.warmup_steps = 20
    config.evaluate.every_steps = 100
    config.evaluate.probes = "own"  # does it answer, stop, keep its role: untrained, and as exported
    config.evaluate.forgetting.texts = "own"  # how far it goes from the base on general text
    config.evaluate.prompts = (
        "What do people call you?",
        "你叫什么？",
        "Plan a quiet Sunday for two people and a dog, in five lines.",
        "Say in one sentence why the sky is blue.",
    )
    return config
