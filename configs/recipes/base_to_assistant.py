"""Base to assistant: a model that only continues text learns to answer, in two stages, simple before hard.

Purpose: the whole way from a base model without a chat template: first short, clear instructions, so that it learns
to answer and to stop; then dialogues and long tasks, from the best weights of the first stage, at a third of its
rate.
Hardware: eight devices of 40 GB. By arithmetic, on each: weights, gradient and two moments in float32 3.4 GB (1.7 B x
16 bytes / 8), inputs of 24 layers for 4 rows of 2,048 0.8 GB, logits and a layer at work 2 GB: 7 GB. Not run: no such
hardware here.
Time: by arithmetic 10 G FLOPs a token: at 35 % of 8 x 312 TFLOP/s 87,000 tokens/s; 100,000 instructions of 200 tokens
and 200,000 dialogues of 900 tokens, twice, are 380 M tokens, 1.2 hours.
Expected result: before training it goes on with the question; after the first stage it answers and stops; after the
second it keeps a system message over several turns. Losses of both validation sets fall in their own stage.
Command: jax-sft train --config configs/recipes/base_to_assistant.py --workdir runs/base_to_assistant

Data card: instructions/ are single questions of many kinds with short answers (HuggingFaceTB/smol-smoltalk has such
rows); dialogues/ are several turns with system messages, long answers, and a tenth of instructions again, so that the
second stage does not undo the first.
Checks: jax-sft data --config configs/recipes/base_to_assistant.py --show 5: the stop token of the template must be
coloured as trained in every answer, or the model will never stop. Duplicates: public sets hold each other.
Watch: the sample answers before training, at the end of the first stage, at the end of the second. If the loss on
instructions/ rises in the second stage by more than 3 %, give them more weight there.
"""

from jax_sft import config as jax_sft_config


def get_config():
    config = jax_sft_config.default()
    config.model.path = "HuggingFaceTB/SmolLM2-1.7B"
    config.model.chat_template = "chatml"
    config.data.sets = {
        "instructions": {"paths": ("data/instructions/*.jsonl",), "weight": 1.0},
        "dialogues": {"paths": ("data/dialogues/*.jsonl",), "weight": 9.0},
    }
    config.stages = (
        {"name": "to answer", "epochs": 0.5, "weights": {"instructions": 1.0}, "lr": 3e-5, "order": "length"},
        {"name": "to converse", "epochs": 2, "lr": 1e-5, "start": "best"},
    )
    config.data.holdout = 0.01
    config.data.quality.near_duplicate = "drop"  # public sets hold each other
    config.data.quality.empty_answer = "drop"
    config.data.quality.cut_off = "drop"
    config.data.quality.loops = "drop"
    config.data.quality.refusal = "drop"
    config.data.quality.mojibake = "drop"
    config.data.quality.leakage = "drop"
    config.data.quality.benchmarks = ("data/benchmarks/*.jsonl",)
    config.data.card = {
        "licence": "of each file, with its link",
        "origin": "which sets, which versions, which model wrote their answers",
        "intended use": "an assistant for general questions",
        "must not be used for": "advice where an error does harm",
    }
    config.data.max_length = 2048
    config.train.batch_size = 64
    config.train.accumulation = 2
    config.optim.warmup_steps = 50
    config.mesh.fsdp = 8
    config.evaluate.every_steps = 200
    config.evaluate.probes = "own"  # does it answer, stop, keep its role: untrained, and as exported
    config.evaluate.forgetting.texts = "own"  # how far it goes from the base on general text
    config.evaluate.prompts = (
        "What is the capital of Australia?",
        "写一封短信，告诉邻居今晚有聚会，可能会吵。",
        "List three ways to save water at home.",
    )
    return config
