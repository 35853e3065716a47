"""Finance: a model that explains terms, reads statements, computes with its working shown, and sells nothing.

Purpose: questions about accounting, banking, markets and taxes, and tables read aloud, in Chinese and English.
Hardware: one device of 80 GB. By arithmetic: base 16.4 GB (8.2 B x 2 bytes), adapters of rank 32 1.4 GB (87 M x 16
bytes), inputs of 36 layers for 4 rows of 4,096 4.8 GB, logits and a layer at work 4 GB: 27 GB. Not run: no such
hardware here.
Time: by arithmetic 33 G FLOPs a token: at 40 % of 989 TFLOP/s 12,000 tokens/s; 40,000 conversations of 350 tokens
twice are 28 M tokens, 39 minutes.
Expected result: lower loss on finance/ and on working/; numbers at the end of a working that follow from it.
Command: jax-sft train --config configs/recipes/finance.py --workdir runs/finance

Data card: finance/ are questions and answers and statements with questions; working/ are calculations that write down
each step, half as heavy as their number, so that style does not drown knowledge; general/ is everyday instructions.
Prices and rates are of their day: say the day in the question, or leave such rows out. Account and card numbers are
masked.
Checks: jax-sft data --config configs/recipes/finance.py --html finance.html; recompute a sample of working/ by
program: a wrong sum in the data is learnt as a right one. Look at what the identity-number rules mask: amounts look
like numbers too.
Watch: answers to "should I buy": they must lay out, not recommend. Watch units (万, 亿, thousand, million) across
languages.
Not for: advice on investments to a person, credit decisions, automatic trading, audits, and prices of today.
"""

from jax_sft import config as jax_sft_config


def get_config():
    config = jax_sft_config.default()
    config.model.path = "Qwen/Qwen3-8B"
    config.lora.rank = 32
    config.data.sets = {
        "finance": {"paths": ("data/finance/*.jsonl",), "weight": 3.0},
        "working": {"paths": ("data/working/*.jsonl",), "weight": 1.0, "loss_weight": 0.5},
        "general": {"paths": ("data/general/*.jsonl",), "weight": 1.0},
    }
    config.data.holdout = 0.02
    config.data.quality.near_duplicate = "drop"
    config.data.quality.leakage = "drop"  # of what is held out: its near twins must not be trained on
    config.data.quality.cut_off = "drop"
    config.data.quality.loops = "drop"
    config.data.quality.personal_data = "mask"
    config.data.quality.personal_kinds = ("email", "phone", "card", "iban", "cn_id")
    config.data.card = {
        "licence": "of each file, with its link",
        "origin": "which statements, of which years; which calculations were checked by program",
        "intended use": "explaining terms and statements, and calculations with their working",
        "must not be used for": "investment advice to a person, credit decisions, trading",
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
        "Revenue rose from 4.2 to 5.1 million. By how many percent? Show the working.",
        "什么是可转换债券？它和普通债券有什么区别？",
        "Should I put my savings into one company's shares?",
        "营业收入3.5亿元，净利润4200万元，净利率是多少？",
    )
    return config
