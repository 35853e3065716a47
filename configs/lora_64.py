"""LoRA on 64 devices: Llama 3.3 70B, cut over rows' devices and inside its matrices.

Purpose: many devices and few rows: adapters take large batches worse than full fine-tuning does, so four devices share
a row (mesh.tensor) and 32 rows are enough for 64 devices.
Hardware: 64 devices of 24 GB or more, four and four linked fast. By arithmetic, on each: base 2.2 GB (70.6 B x 2 bytes
/ 64), adapters 0.05 GB (207 M x 16 bytes / 64), inputs of 80 layers for 2 rows 10.7 GB, embedding and head 1 GB, a
layer whole 0.4 GB and at work 1 GB: 15 to 16 GB. Not run: no such hardware here.
Time: unknown. By arithmetic: 6 x 70.6 G FLOPs a token: at 35 % of 989 TFLOP/s 52,000 tokens/s on all 64.
Expected result: unknown; a validation loss below that of the untrained model (both are logged), and an adapter in
PEFT's format in the workdir's export. Before the first step the log says what the run takes of each device's memory.
Command: jax-sft train --config configs/lora_64.py --workdir runs/lora_64

data/train.jsonl and data/validation.jsonl are yours: conversations, one a line (`{"messages": [...]}`). The model is
gated: HF_TOKEN must be of an account that has accepted its licence.
"""

from jax_sft import config as jax_sft_config


def get_config():
    config = jax_sft_config.default()
    config.model.path = "meta-llama/Llama-3.3-70B-Instruct"
    config.lora.rank = 16  # alpha stays 32, twice that, and the targets all linear maps
    config.data.train = ("data/train.jsonl",)
    config.data.validation = ("data/validation.jsonl",)
    config.data.max_length = 4096
    config.train.epochs = 2.0
    config.train.batch_size = 32
    config.train.remat = "full"  # where there is room, "dots" saves computing every layer twice
    # optim.lr stays at the default of adapters, 1e-4: ten times that of full fine-tuning, whatever the model and rank
    config.optim.warmup_steps = 10
    config.mesh.fsdp = 16
    config.mesh.tensor = 4
    return config
