"""Tutor: a model that leads a learner to the answer, a step at a time, and checks that it was understood.

Purpose: lessons of many turns in mathematics and languages, where the tutor's questions teach and the solution comes
last.
Hardware: one device of 40 GB. By arithmetic: base 8.1 GB (4.0 B x 2 bytes), adapters of rank 32 1.1 GB (66 M x 16
bytes), inputs of 36 layers for 4 rows of 4,096 3 GB, logits and a layer at work 3 GB: 15 GB. Not run: no such
hardware here.
Time: by arithmetic 16 G FLOPs a token: at 40 % of 312 TFLOP/s 7,800 tokens/s; 15,000 lessons of 900 tokens twice are
27 M tokens, 58 minutes.
Expected result: lower loss on lessons/; first turns that ask or hint instead of solving.
Command: jax-sft train --config configs/recipes/tutor.py --workdir runs/tutor

Data card: lessons/ are dialogues of 6 to 30 turns, each with the level of the learner in the system message; working/
are solved exercises with their steps, so that what it teaches is right. The first stage takes exercises alone, the
second both: first right, then patient.
Checks: jax-sft data --config configs/recipes/tutor.py --html tutor.html; turns per conversation (many short ones
teach to hurry), and cut-off lessons, which teach to leave.
Watch: whether it gives the answer away in its first turn, and whether it praises wrong answers.
Not for: marks and decisions about learners, and children alone without somebody who answers for it.
"""

from jax_sft import config as jax_sft_config


def get_config():
    config = jax_sft_config.default()
    config.model.path = "Qwen/Qwen3-4B-Instruct-2507"
    config.lora.rank = 32
    config.data.sets = {
        "working": {"paths": ("data/working/*.jsonl",), "weight": 1.0},
        "lessons": {"paths": ("data/lessons/*.jsonl",), "weight": 3.0},
    }
    config.stages = (
        {"name": "exercises", "epochs": 0.5, "weights": {"working": 1.0}, "order": "length"},
        {"name": "lessons", "epochs": 1.5},
    )
    config.data.holdout = 0.02
    config.data.quality.roles = "drop"
    config.data.quality.cut_off = "drop"  # a lesson that ends in the middle teaches to leave
    config.data.quality.repeats_prompt = "drop"
    config.data.quality.personal_data = "mask"  # learners write their names and addresses
    config.data.card = {
        "licence": "of each file, with its link",
        "origin": "which levels and subjects; who has checked the working",
        "intended use": "lessons beside a teacher, step by step",
        "must not be used for": "marks and decisions about learners",
    }
    config.data.max_length = 4096
    config.train.batch_size = 16
    config.train.accumulation = 4
    config.optim.warmup_steps = 20
    config.evaluate.every_steps = 100
    config.evaluate.probes = "own"  # does it answer, stop, keep its role: untrained, and as exported
    config.evaluate.forgetting.texts = "own"  # how far it goes from the base on general text
    config.evaluate.prompts = (
        "I don't get it: why is 1/2 + 1/3 not 2/5?",
        "老师，这道题我不会：一个数的三倍加四等于十九，这个数是多少？",
        "Just tell me the answer: what is the derivative of x^3?",
    )
    return config
