"""LoRA on one device: adapters of rank 16 beside every linear map of Qwen3-4B.

Purpose: the usual fine-tuning: a base in bfloat16 that stays as it is, adapters of a few tens of megabytes.
Hardware: one device of 24 GB. By arithmetic: base 8.0 GB (4.02 B x 2 bytes), adapters with moments and gradient 0.5 GB
(33.0 M x 16 bytes), inputs of 36 layers for 2 rows 0.8 GB, logits and their gradient 2 GB, one layer at work 1 GB: 12
to 13 GB. Not run: no such hardware here.
Time: unknown. By arithmetic: 6 x 4.0 G FLOPs a token (2 forward, 2 again for remat, 2 backward): at 40 % of 165
TFLOP/s 2,700 tokens/s.
Expected result: unknown; a validation loss below that of the untrained model (both are logged), and an adapter in
PEFT's format in the workdir's export. Before the first step the log says what the run takes of each device's memory.
Command: jax-sft train --config configs/lora_1.py --workdir runs/lora_1

data/train.jsonl and data/validation.jsonl are yours: conversations, one a line (`{"messages": [...]}`).
"""

from jax_sft import config as jax_sft_config


def get_config():
    config = jax_sft_config.default()
    config.model.path = "Qwen/Qwen3-4B"
    config.lora.rank = 16  # alpha stays 32, twice that, and the targets all linear maps
    config.data.train = ("data/train.jsonl",)
    config.data.validation = ("data/validation.jsonl",)
    config.data.max_length = 2048
    config.train.epochs = 2.0
    config.train.batch_size = 16
    config.train.accumulation = 8  # 2 rows at a time
    config.train.remat = "full"  # where there is room, "dots" saves computing every layer twice
    # optim.lr stays at the default of adapters, 1e-4: ten times that of full fine-tuning, whatever the model and rank
    config.optim.warmup_steps = 10
    config.mesh.fsdp = 1
    return config
