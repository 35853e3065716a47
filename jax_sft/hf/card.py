"""The model card of an export: README.md with the facts of its training.

In: the facts as plain values. Out: Markdown under the header that the Hugging Face hub reads.
"""

import re
from collections.abc import Mapping
from typing import Any

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def text(name: str, facts: Mapping[str, Any]) -> str:
    """The card of a model called `name`; "base model" and "license" of `facts` also go into the header."""
    header = ["library_name: transformers", "pipeline_tag: text-generation", "tags: [sft, jax-sft]"]
    base = str(facts.get("base model", ""))
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
            "A language model fine-tuned with jax-sft. It loads in transformers and vLLM as it is. Its template is in",
            "`chat_template.jinja`; the tokens it was trained to stop at are in `generation_config.json`.",
            "",
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
            f'model = AutoModelForCausalLM.from_pretrained("{name}")',
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
