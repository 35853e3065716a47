"""DoRA on one device: Qwen3-4B, direction and magnitude of each output trained apart.

Purpose: where LoRA falls short of full fine-tuning at a small rank (arXiv 2402.09353); compare with lora_1.py, which
differs in nothing else.
Hardware: one device of 24 GB. By arithmetic: as lora_1.py, adapters 0.55 GB (34.1 M x 16 bytes), and the norms of each
matrix in float32 while it is at work 0.1 GB: 12 to 13 GB. Not run: no such hardware here.
Time: unknown. By arithmetic: as lora_1.py, and in every step the norm of every column: BENCHMARKS.md has what that
costs on a CPU.
Expected result: unknown; a validation loss below that of the untrained model (both are logged), and an adapter in
PEFT's format in the workdir's export. Before the first step the log says what the run takes of each device's memory.
Command: jax-sft train --config configs/dora_1.py --workdir runs/dora_1

data/train.jsonl and data/validation.jsonl are yours: conversations, one a line (`{"messages": [...]}`).
"""

from jax_sft import config as jax_sft_config


def get_config():
    config = jax_sft_config.default()
    config.model.path = "Qwen/Qwen3-4B"
    config.lora.rank = 16  # alpha stays 32, twice that, and the targets all linear maps
    config.lora.dora = True
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
