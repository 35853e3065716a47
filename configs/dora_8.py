"""DoRA on eight devices: Qwen3-14B, its weights spread over all of them.

Purpose: lora_8.py with magnitudes (arXiv 2402.09353), on a base that leaves room for longer rows.
Hardware: eight devices of 24 GB, linked fast. By arithmetic, on each: base 3.7 GB (14.8 B x 2 bytes / 8), adapters 0.1
GB (66.3 M x 16 bytes / 8), inputs of 40 layers for 1 row 1.7 GB, embedding and head whole while they are used 3.1 GB,
logits 2 GB, a layer whole 0.7 GB, in float32 for its norms 0.4 GB at a time, and at work 1 GB: 12 to 13 GB. Not run:
no such hardware here.
Time: unknown. By arithmetic: 6 x 14.8 G FLOPs a token and the norms: at 40 % of 165 TFLOP/s 5,900 tokens/s on all
eight.
Expected result: unknown; a validation loss below that of the untrained model (both are logged), and an adapter in
PEFT's format in the workdir's export. Before the first step the log says what the run takes of each device's memory.
Command: jax-sft train --config configs/dora_8.py --workdir runs/dora_8

data/train.jsonl and data/validation.jsonl are yours: conversations, one a line (`{"messages": [...]}`).
"""

from jax_sft import config as jax_sft_config


def get_config():
    config = jax_sft_config.default()
    config.model.path = "Qwen/Qwen3-14B"
    config.lora.rank = 16  # alpha stays 32, twice that, and the targets all linear maps
    config.lora.dora = True
    config.data.train = ("data/train.jsonl",)
    config.data.validation = ("data/validation.jsonl",)
    config.data.max_length = 4096
    config.train.epochs = 2.0
    config.train.batch_size = 16
    config.train.accumulation = 2  # 1 row at a time on each device
    config.train.remat = "full"  # where there is room, "dots" saves computing every layer twice
    # optim.lr stays at the default of adapters, 1e-4: ten times that of full fine-tuning, whatever the model and rank
    config.optim.warmup_steps = 10
    config.mesh.fsdp = 8
    return config
