"""Law: a model that explains rules and drafts, names the jurisdiction it speaks of, and does not invent sources.

Purpose: answers about contracts, tenancy, work and procedure, and first drafts, for people who check them.
Hardware: one device of 80 GB. By arithmetic: base 16.4 GB (8.2 B x 2 bytes), adapters of rank 32 1.4 GB (87 M x 16
bytes), inputs of 36 layers for 2 rows of 8,192 4.8 GB, logits and a layer at work 5 GB: 28 GB. Not run: no such
hardware here.
Time: by arithmetic 36 G FLOPs a token at this length: at 40 % of 989 TFLOP/s 11,000 tokens/s; 20,000 conversations of
900 tokens twice are 36 M tokens, 55 minutes.
Expected result: lower loss on law/; answers that name statute and jurisdiction where the data do.
Command: jax-sft train --config configs/recipes/law.py --workdir runs/law

Data card: law/ are questions with answers written or read by lawyers, each with jurisdiction and date in the system
message (law changes: what was right in 2015 is not marked as such by the text itself); general/ is a fifth of
everyday instructions. Judgments name people: use anonymised ones; numbers of identity papers and accounts that remain
are masked.
Checks: jax-sft data --config configs/recipes/law.py --html law.html; look at languages (a statute in one language
under a question in another), at cut-off answers (contracts end in the middle) and at near duplicates: forms repeat.
Watch: citations. Take 100 answers with a section or a case number and look each of them up, before and after:
training on citations teaches their form, not their truth. Watch answers that lost their "it depends".
Not for: advice to a person without a lawyer who answers for it, filing anything unread, predictions about judges or
sentences, decisions about people (credit, asylum, employment), and jurisdictions that the data do not hold.
"""

from jax_sft import config as jax_sft_config


def get_config():
    config = jax_sft_config.default()
    config.model.path = "Qwen/Qwen3-8B"
    config.lora.rank = 32
    config.data.sets = {
        "law": {"paths": ("data/law/*.jsonl",), "weight": 4.0},
        "general": {"paths": ("data/general/*.jsonl",), "weight": 1.0},
    }
    config.data.holdout = 0.02
    config.data.quality.near_duplicate = "drop"  # forms repeat
    config.data.quality.leakage = "drop"  # of what is held out: its near twins must not be trained on
    config.data.quality.cut_off = "drop"
    config.data.quality.wrong_language = "note"  # a statute may be quoted in its own language
    config.data.quality.personal_data = "mask"
    config.data.quality.markup = "drop"  # what was taken from the sites of courts brings it along
    config.data.card = {
        "licence": "of each file, with its link",
        "origin": "jurisdictions, the years they speak of, who has read the answers",
        "intended use": "explaining rules and first drafts, for people who check them",
        "must not be used for": "advice without a lawyer who answers for it; decisions about people",
    }
    config.data.max_length = 8192
    config.train.epochs = 2.0
    config.train.batch_size = 8
    config.train.accumulation = 4
    config.optim.warmup_steps = 20
    config.evaluate.every_steps = 100
    config.evaluate.probes = "own"  # does it answer, stop, keep its role: untrained, and as exported
    config.evaluate.forgetting.texts = "own"  # how far it goes from the base on general text
    config.evaluate.prompts = (
        "My landlord in Berlin wants to raise the rent by 30 %. May he?",
        "试用期最长可以约定多久？",
        "Draft a one-paragraph confidentiality clause for a contract between two software companies.",
        "Which court decides about a parking fine?",  # no jurisdiction: the answer must ask, or say which it takes
    )
    return config
