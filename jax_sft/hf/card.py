"""The model card of an export: README.md with the facts of its training.

In: the facts as plain values. Out: Markdown under the header that the Hugging Face hub reads.
"""

import re
from collections.abc import Mapping
from typing import Any

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

_MODEL = (
    "A language model fine-tuned with jax-sft. It loads in transformers and vLLM as it is. Its template is in",
    "`chat_template.jinja`; the tokens it was trained to stop at are in `generation_config.json`.",
)
_ADAPTER = (
    "A LoRA adapter trained with jax-sft, for the base model below. It loads in PEFT. The template it was trained with",
    "is in `chat_template.jinja`; the tokens it was trained to stop at are in `generation_config.json`.",
)
_TOKENIZER = 'tokenizer = AutoTokenizer.from_pretrained("{name}")'
_LOAD = (
    "from transformers import AutoModelForCausalLM, AutoTokenizer",
    "",
    _TOKENIZER,
    'model = AutoModelForCausalLM.from_pretrained("{name}")',
)
_LOAD_ADAPTER = (
    "from peft import PeftModel",
    "from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig",
    "",
    _TOKENIZER,
    'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{name}")',
    'model.generation_config = GenerationConfig.from_pretrained("{name}")',
)


def text(name: str, facts: Mapping[str, Any], *, adapter_of: str | None = None) -> str:
    """The card of a model called `name`, or of an adapter of the base `adapter_of`.

    "base model" and "license" of `facts` also go into the header.
    """
    library, tags = ("transformers", "sft, jax-sft") if adapter_of is None else ("peft", "lora, sft, jax-sft")
    header = [f"library_name: {library}", "pipeline_tag: text-generation", f"tags: [{tags}]"]
    base = str(facts.get("base model", "")) if adapter_of is None else adapter_of
    if _HUB_ID.fullmatch(base) and not base.endswith(".gguf"):  # the hub refuses a card that names a local path here
        header.append(f"base_model: {base}")
    if "license" in facts:
        header.append(f"license: {facts['license']}")
    rows = [f"| {_cell(fact)} | {_cell(value)} |" for fact, value in facts.items()]
    table = ["| what | value |", "|---|---|", *rows] if rows else []
    return "\n".join(
        [
            "---",
            *header,
            "---",
            "",
            f"# {name}",
            "",
            *(_MODEL if adapter_of is None else _ADAPTER),
            "",
            "```python",
            *(line.format(name=name, base=adapter_of) for line in (_LOAD if adapter_of is None else _LOAD_ADAPTER)),
            'messages = [{"role": "user", "content": "Hello!"}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
            ")",
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0]))",
            "```",
            "",
            *(["## Training", ""] if table else []),
            *table,
            "",
        ]
    )


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
