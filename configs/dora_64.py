"""DoRA on 64 devices: Llama 3.3 70B, cut over rows' devices and inside its matrices.

Purpose: lora_64.py with magnitudes (arXiv 2402.09353); it differs in nothing else.
Hardware: 64 devices of 24 GB or more, four and four linked fast. By arithmetic, on each: as lora_64.py, adapters 0.05
GB (214 M x 16 bytes / 64), a matrix in float32 for its norms 0.2 GB at a time: 15 to 16 GB. Not run: no such hardware
here.
Time: unknown. By arithmetic: as lora_64.py, and the norms.
Expected result: unknown; a validation loss below that of the untrained model (both are logged), and an adapter in
PEFT's format in the workdir's export. Before the first step the log says what the run takes of each device's memory.
Command: jax-sft train --config configs/dora_64.py --workdir runs/dora_64

data/train.jsonl and data/validation.jsonl are yours: conversations, one a line (`{"messages": [...]}`). The model is
gated: HF_TOKEN must be of an account that has accepted its licence.
"""

from jax_sft import config as jax_sft_config


def get_config():
    config = jax_sft_config.default()
    config.model.path = "meta-llama/Llama-3.3-70B-Instruct"
    config.lora.rank = 16  # alpha stays 32, twice that, and the targets all linear maps
    config.lora.dora = True
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
