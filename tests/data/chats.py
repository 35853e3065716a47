"""Tokenizers, templates and a notation for masks, for the tests of chat templates.

`tokenizer_for(template)` is a byte-level BPE with a few merges and the template's control tokens. `marked(sequence)`
writes a sequence as text with ⟦trained tokens⟧ in brackets.
"""

import functools
import itertools
import re

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from jax_sft.data.chat import ChatTemplate
from jax_sft.data.conversation import Conversation, Message, Sequence

CONTROL = re.compile(r"<[|｜][^<>|｜\s]+[|｜]>|</?[A-Za-z_][\w▁]*>|<\|\w+>|<\w+\|>|\[/?[A-Za-z]+\]")
MARKUP = {"<think>", "</think>", "<tool_call>", "</tool_call>"}  # added tokens, but not special, as in Qwen3
CORPUS = [
    "Hello there, how are you? user assistant system model\n\n\n the quick brown fox 你好，世界 😀😀 def f(x):\n    y"
] * 9

CHATML = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

CHATML_TAGGED = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}\
{% generation %}{{ m.content + '<|im_end|>\n' }}{% endgeneration %}\
{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

LLAMA = """{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}\
{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

GEMMA = """{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<end_of_turn>\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

# Writes the eos behind the last message alone: a shorter conversation is no beginning of a longer one.
PHI = """{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}\
{# <|user|> <|system|> #}"""

# Shows the reasoning of the last answer and takes it out of earlier ones.
THINKING = """{% for m in messages %}{% set text = m.content %}{% if m.role == 'assistant' %}\
{% set thought = m.reasoning_content or '' %}{% if '</think>' in text %}\
{% set thought = text.split('</think>')[0].split('<think>')[-1] %}\
{% set text = text.split('</think>')[-1] %}{% endif %}\
{% if loop.last %}{% set text = '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + text.lstrip('\n') %}{% endif %}\
{% endif %}{{ '<|im_start|>' + m.role + '\n' + text + '<|im_end|>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

# Ends an answer with nothing at all.
ALPACA = """{% for m in messages %}{{ '### ' + m.role + ':\n' + m.content + '\n\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"""

# Ends an answer with the next header, as GLM does.
GLM = """[gMASK]<sop>{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{# <|user|> <|system|> #}"""

# Takes contents as lists of parts, and silently leaves out a content that is a string.
PARTS = """<|im_start|>{% for m in messages %}{{ m.role | capitalize + ': ' }}{% for part in m.content %}\
{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{{ '<end_of_utterance>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""


@functools.cache
def tokenizer_for(
    template: str, *, bos: str = "<s>", eos: str = "</s>", trim_offsets: bool = False, adds_bos: bool = False
) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose added tokens are the template's control tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=360, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    found = sorted({*CONTROL.findall(template), bos, eos})
    backend.add_tokens([AddedToken(t, special=t not in MARKUP, normalized=False) for t in found])
    if trim_offsets:  # as many models have it: a token's offsets then leave out its leading blank
        backend.post_processor = processors.ByteLevel(trim_offsets=True)
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos)
    fast.chat_template = template
    return fast


def conversation(*turns: str | Message, **fields) -> Conversation:
    """User and assistant in turns; 'system: ...' is a system prompt."""
    messages, roles = [], itertools.cycle(("user", "assistant"))
    for turn in turns:
        if isinstance(turn, Message):
            messages.append(turn)
        elif turn.startswith("system: "):
            messages.append(Message("system", turn.removeprefix("system: ")))
        else:
            messages.append(Message(next(roles), turn))
    return Conversation(messages=tuple(messages), source="tests", id="rows.jsonl:7", **fields)


def marked(sequence: Sequence, template: ChatTemplate) -> str:
    """The sequence as text, ⟦trained tokens⟧ in brackets."""
    ids = [int(sequence.tokens_T[0]), *sequence.targets_T.tolist()]
    weights = [0.0, *sequence.weights_T.tolist()]
    runs = itertools.groupby(zip(ids, weights, strict=True), key=lambda pair: pair[1] > 0)
    texts = ((trained, template.decode([i for i, _ in run])) for trained, run in runs)
    return "".join(f"⟦{text}⟧" if trained else text for trained, text in texts)
