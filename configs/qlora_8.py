"""QLoRA on eight devices: Llama 3.3 70B in NormalFloat-4 bits.

Purpose: 70 B on eight small cards (arXiv 2305.14314), cut over them and held in four bits a weight.
Hardware: eight devices of 24 GB. By arithmetic, on each: layers 4.5 GB (68.5 B x 0.53 bytes / 8), embedding and head
in bfloat16 0.5 GB and whole while they are used 4.2 GB, adapters 0.4 GB (207 M x 16 bytes / 8), inputs of 80 layers
for 1 row 2.7 GB, logits 2 GB, a matrix in bfloat16 0.5 GB and a layer at work 1 GB: 16 GB. Not run: no such hardware
here.
Time: unknown. By arithmetic: 6 x 70.6 G FLOPs a token and the dequantising: at 30 % of 165 TFLOP/s 930 tokens/s on all
eight.
Expected result: unknown; a validation loss below that of the untrained model (both are logged), and an adapter in
PEFT's format in the workdir's export. Before the first step the log says what the run takes of each device's memory.
Command: jax-sft train --config configs/qlora_8.py --workdir runs/qlora_8

data/train.jsonl and data/validation.jsonl are yours: conversations, one a line (`{"messages": [...]}`). The model is
gated: HF_TOKEN must be of an account that has accepted its licence.
"""

from jax_sft import config as jax_sft_config


def get_config():
    config = jax_sft_config.default()
    config.model.path = "meta-llama/Llama-3.3-70B-Instruct"
    config.lora.rank = 16  # alpha stays 32, twice that, and the targets all linear maps
    config.lora.base = "nf4"
    config.data.train = ("data/train.jsonl",)
    config.data.validation = ("data/validation.jsonl",)
    config.data.max_length = 2048
    config.train.epochs = 2.0
    config.train.batch_size = 16
    config.train.accumulation = 2  # 1 row at a time on each device
    config.train.remat = "full"  # where there is room, "dots" saves computing every layer twice
    # optim.lr stays at the default of adapters, 1e-4: ten times that of full fine-tuning, whatever the model and rank
    config.optim.warmup_steps = 10
    config.mesh.fsdp = 8
    return config
