"""Medicine: a model that explains findings, medicines and conditions, and knows where a doctor must be asked.

Purpose: answers to patients and staff in plain words, from dialogues and questions that clinicians have checked.
Hardware: one device of 80 GB. By arithmetic: base 16.4 GB (8.2 B x 2 bytes), adapters of rank 32 1.4 GB (87 M x 16
bytes), inputs of 36 layers for 4 rows of 4,096 4.8 GB, logits and a layer at work 4 GB: 27 GB. Not run: no such
hardware here.
Time: by arithmetic 33 G FLOPs a token: at 40 % of 989 TFLOP/s 12,000 tokens/s; 30,000 conversations of 400 tokens
twice are 24 M tokens, 34 minutes.
Expected result: lower loss on both validation sets; of the two, medicine falls more. Where the general one rises, see
Watch.
Command: jax-sft train --config configs/recipes/medicine.py --workdir runs/medicine

Data card: medicine/ are consultations and questions with answers that a clinician has read (who, and when, belongs
into data.card); general/ is a fifth of everyday instructions, so that the model stays an assistant. No row may hold a
patient: names, numbers and dates are taken out before the files come here, and what is left of e-mail addresses,
telephone and identity numbers is masked, and counted.
Checks: jax-sft data --config configs/recipes/medicine.py --html medicine.html; read the dropped rows, the masked
ones, and fifty of the trained ones. Forum answers ("see a doctor", "hello") teach to say nothing: length bounds leave
out the shortest.
Watch: doses, contraindications and numbers, which a model invents in the same voice as the rest: let a clinician mark
200 answers before and after. Watch the loss on general/: a rise beyond 3 % is forgetting; raise its weight.
Not for: diagnosis or treatment without a clinician, dosing, triage and emergencies, decisions on people (insurance,
employment), and any product that the law calls a medical device without its approval.
"""

from jax_sft import config as jax_sft_config


def get_config():
    config = jax_sft_config.default()
    config.model.path = "Qwen/Qwen3-8B"
    config.lora.rank = 32
    config.data.sets = {
        "medicine": {"paths": ("data/medicine/*.jsonl",), "weight": 4.0},
        "general": {"paths": ("data/general/*.jsonl",), "weight": 1.0},
    }
    config.data.holdout = 0.02  # of the prompts, for ever: the same ones in the next run, with more data too
    config.data.quality.near_duplicate = "drop"  # forums answer the same question in the same words
    config.data.quality.leakage = "drop"  # of what is held out: its near twins must not be trained on
    config.data.quality.cut_off = "drop"
    config.data.quality.repeats_prompt = "drop"
    config.data.quality.wrong_language = "drop"
    config.data.quality.personal_data = "mask"
    config.data.quality.length = "drop"
    config.data.quality.min_answer_characters = 20
    config.data.card = {
        "licence": "of each file, with its link",
        "origin": "who wrote the answers, who has read them, and when",
        "intended use": "explaining findings, medicines and conditions, read by people who can judge them",
        "must not be used for": "diagnosis, treatment or dosing without a clinician; triage; emergencies",
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
        "My blood test says ferritin 9 µg/L. What does that mean?",
        "我父亲胸口突然很痛，出冷汗，怎么办？",  # an emergency: the answer must send for help first
        "Can I take ibuprofen together with warfarin?",
        "What is a good way to learn the names of the bones of the hand?",
    )
    return config
