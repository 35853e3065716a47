"""A tiny model folder and tiny conversations, made by the tests that need a whole run.

In: a folder. Out: a Hugging Face folder of a 2-layer Llama with a byte-level tokenizer and a ChatML template, and
JSONL files of short conversations.
"""

import json
import pathlib

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jax_sft.config import RunConfig, default, from_config_dict
from jax_sft.hf.save import save_model
from jax_sft.model.decoder import random_params
from jax_sft.model.families import read_model_config

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WIDTHS = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}


def tiny_tokenizer(words: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """256 bytes, three control tokens, and `words` that are a token each: any text is tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab, merges = {c: i for i, c in enumerate(alphabet)}, []
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocab:
                vocab[word[:end]] = len(vocab)
                merges.append((word[: end - 1], word[end - 1]))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = CHATML
    return fast


def write_model(folder: pathlib.Path, *, seed: int = 0, layers: int = 2, words: tuple[str, ...] = ()) -> pathlib.Path:
    """A model folder; the vocabulary is 264, of which the tokenizer uses 259, and more for `words`."""
    tokenizer = tiny_tokenizer(words)
    stop = tokenizer.eos_token_id
    hf_config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": len(tokenizer) + 5,
        "num_hidden_layers": layers,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "eos_token_id": stop,
        **WIDTHS,
    }
    config = read_model_config(hf_config)
    save_model(
        folder,
        config=config,
        params=random_params(config, seed),
        tokenizer=tokenizer,
        hf_config=hf_config,
        generation_config={"eos_token_id": stop},
        chat_template=CHATML,
        stop_ids=(stop,),
        dtype="float32",
        max_shard_size="5GB",
        facts={},
    )
    return folder


def write_conversations(path: pathlib.Path, count: int, *, offset: int = 0) -> pathlib.Path:
    """Short conversations of two sources and very different lengths."""
    with path.open("w", encoding="utf-8") as file:
        for i in range(offset, offset + count):
            answer = f"{i} {'na ' * (1 + i * 7 % 23)}done"
            messages = [{"role": "user", "content": f"count to {i}"}, {"role": "assistant", "content": answer}]
            row = {"id": f"c{i}", "source": ("odd", "even")[i % 2], "messages": messages}
            file.write(json.dumps(row) + "\n")
    return path


def run_config(folder: pathlib.Path, *overrides: str) -> RunConfig:
    """A run of 6 steps on the tiny model, in float32; makes the model and the data in `folder` if they're not there."""
    if not (folder / "model").exists():
        write_model(folder / "model")
        write_conversations(folder / "train.jsonl", 60)
        write_conversations(folder / "validation.jsonl", 12, offset=60)
    config = default()
    config.model.path = str(folder / "model")
    config.model.dtype = "float32"
    config.data.train = (str(folder / "train.jsonl"),)
    config.data.validation = (str(folder / "validation.jsonl"),)
    config.data.max_length = 128
    config.train.batch_size = 8
    config.train.steps = 6
    config.optim.lr = 1e-2
    config.checkpoint.every_steps = 2
    config.log.tensorboard = False
    config.export.dtype = "float32"
    config.export.certify = False  # tests/test_certificate.py
    return from_config_dict(config, overrides)
