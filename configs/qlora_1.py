"""QLoRA on one device: Qwen3-14B held in NormalFloat-4 bits.

Purpose: the largest base that a card for games trains (arXiv 2305.14314): its matrices in four bits, made bfloat16 one
at a time where they are multiplied.
Hardware: one device of 24 GB. By arithmetic: layers 7.0 GB (13.2 B x 0.53 bytes), embedding and head in bfloat16 3.1
GB, adapters 1.0 GB (64.2 M x 16 bytes), inputs of 40 layers for 1 row 0.8 GB, logits 2 GB, one layer at work 1 GB: 15
GB. While the weights are read, one kind of matrix of all layers is there in bfloat16 beside its four bits, 7.1 GB at
most. Not run: no such hardware here.
Time: unknown. By arithmetic: 6 x 14.8 G FLOPs a token and the dequantising: at 30 % of 165 TFLOP/s 550 tokens/s.
Expected result: unknown; a validation loss below that of the untrained model (both are logged), and an adapter in
PEFT's format in the workdir's export. Before the first step the log says what the run takes of each device's memory.
Command: jax-sft train --config configs/qlora_1.py --workdir runs/qlora_1

data/train.jsonl and data/validation.jsonl are yours: conversations, one a line (`{"messages": [...]}`).
"""

from jax_sft import config as jax_sft_config


def get_config():
    config = jax_sft_config.default()
    config.model.path = "Qwen/Qwen3-14B"
    config.lora.rank = 16  # alpha stays 32, twice that, and the targets all linear maps
    config.lora.base = "nf4"
    config.data.train = ("data/train.jsonl",)
    config.data.validation = ("data/validation.jsonl",)
    config.data.max_length = 2048
    config.train.epochs = 2.0
    config.train.batch_size = 16
    config.train.accumulation = 16  # 1 row at a time
    config.train.remat = "full"  # where there is room, "dots" saves computing every layer twice
    # optim.lr stays at the default of adapters, 1e-4: ten times that of full fine-tuning, whatever the model and rank
    config.optim.warmup_steps = 10
    config.mesh.fsdp = 1
    return config
