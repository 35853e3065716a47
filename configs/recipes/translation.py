"""Translation: English and Chinese, both ways, the translation and nothing else.

Purpose: sentences and paragraphs in the right register, terms kept, no preface and no comment.
Hardware: one device of 24 GB. By arithmetic: base 3.4 GB (1.7 B x 2 bytes), adapters of rank 32 0.6 GB (35 M x 16
bytes), inputs of 28 layers for 8 rows of 1,024 0.9 GB, logits and a layer at work 3 GB: 8 GB. Not run: no such
hardware here.
Time: by arithmetic 7 G FLOPs a token: at 40 % of 165 TFLOP/s 9,400 tokens/s; 200,000 pairs of 80 tokens once are 16 M
tokens, 28 minutes.
Expected result: lower loss on both directions, which are logged apart; answers that are a translation alone.
Command: jax-sft train --config configs/recipes/translation.py --workdir runs/translation

Data card: en_zh/ and zh_en/ are pairs as conversations, the instruction in varied words (a single one is learnt as a
password); terms/ are sentences with a glossary in the system message, drawn twice. Pairs made by a machine are marked
in `source`, or left out.
Checks: jax-sft data --config configs/recipes/translation.py --html translation.html; answers in the language of the
question are rows that were not translated; the language rule knows that a translation is asked for. Look at lengths:
a pair whose sides differ by more than three times is seldom one.
Watch: numbers, names and negations, which a low loss does not see; measure chrF or COMET on a set that is not from
the same site.
"""

from jax_sft import config as jax_sft_config


def get_config():
    config = jax_sft_config.default()
    config.model.path = "Qwen/Qwen3-1.7B"
    config.lora.rank = 32
    config.data.sets = {
        "en_zh": {"paths": ("data/en_zh/*.jsonl",)},
        "zh_en": {"paths": ("data/zh_en/*.jsonl",)},
        "terms": {"paths": ("data/terms/*.jsonl",), "epochs": 2.0},
    }
    config.data.holdout = 0.01
    config.data.quality.same_content = "drop"
    config.data.quality.same_prompt = "note"  # a sentence may have two good translations
    config.data.quality.mojibake = "drop"
    config.data.quality.markup = "drop"
    config.data.quality.repeats_prompt = "drop"  # what was not translated
    config.data.quality.leakage = "drop"
    config.data.quality.benchmarks = ("data/benchmarks/*.jsonl",)  # the test sets that it will be measured with
    config.data.card = {
        "licence": "of each file, with its link",
        "origin": "which pairs people wrote, and which a machine",
        "intended use": "English and Chinese, both ways",
        "must not be used for": "translations that nobody reads where an error does harm",
    }
    config.data.max_length = 1024
    config.train.epochs = 1.0
    config.train.batch_size = 32
    config.train.accumulation = 4
    config.optim.warmup_steps = 50
    config.evaluate.every_steps = 200
    config.evaluate.probes = "own"  # does it answer, stop, keep its role: untrained, and as exported
    config.evaluate.forgetting.texts = "own"  # how far it goes from the base on general text
    config.evaluate.prompts = (
        "Translate into Chinese: She had hardly sat down when the phone rang.",
        "把下面的句子译成英文：他不是不想来，是来不了。",
        "Translate into Chinese, keeping the terms: The plaintiff waives the right to appeal.",
    )
    return config
