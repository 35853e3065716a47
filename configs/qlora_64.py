"""QLoRA on 64 devices: Llama 3.1 405B in NormalFloat-4 bits.

Purpose: the size at which four bits are worth it on 64 devices too (arXiv 2305.14314): in bfloat16 the base alone
would take 12.7 GB of each.
Hardware: 64 devices of 24 GB, eight and eight linked fast. By arithmetic, on each: layers 3.3 GB (401.7 B x 0.53 bytes
/ 64), embedding and head in bfloat16 0.1 GB and gathered 1.1 GB, adapters 0.16 GB (623 M x 16 bytes / 64), inputs of
126 layers for 1 row 8.5 GB, logits 0.2 GB, a layer at work 2 GB: 15 to 16 GB. Not run: no such hardware here.
Time: unknown. By arithmetic: 6 x 406 G FLOPs a token and the dequantising: at 30 % of 989 TFLOP/s 7,800 tokens/s on
all 64.
Expected result: unknown; a validation loss below that of the untrained model (both are logged), and an adapter in
PEFT's format in the workdir's export. Before the first step the log says what the run takes of each device's memory.
Command: jax-sft train --config configs/qlora_64.py --workdir runs/qlora_64

data/train.jsonl and data/validation.jsonl are yours: conversations, one a line (`{"messages": [...]}`). The model is
gated: HF_TOKEN must be of an account that has accepted its licence.
"""

from jax_sft import config as jax_sft_config


def get_config():
    config = jax_sft_config.default()
    config.model.path = "meta-llama/Llama-3.1-405B-Instruct"
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
    config.mesh.tensor = 8
    return config
