"""Real instruction sets load in their own formats, and every row of them is trained on, dropped or held out.

The sets lie beside the repository, in shared/data; without them these tests are skipped.
"""

import dataclasses
import gzip
import pathlib
from typing import Any

import pytest

from jax_sft.config import DataConfig
from jax_sft.data.chat import ChatTemplate
from jax_sft.data.conversation import Account
from jax_sft.data.dataset import tokenize
from jax_sft.data.formats import read_conversations
from jax_sft.data.source import training_parts, validation_parts
from tests.data.chats import tokenizer_for

FOLDER = pathlib.Path(__file__).resolve().parents[3] / "shared" / "data"
SETS = sorted(
    path.relative_to(FOLDER).as_posix()
    for path in (FOLDER.rglob("*") if FOLDER.is_dir() else ())
    if path.is_file() and path.suffix != ".md"
)
# What a config says of a set whose columns are not those of a format; the number of rows is that of MANIFEST.md.
SAID: dict[str, dict[str, Any]] = {
    "chinese_poems.jsonl.gz": {"format": "text", "columns": {"text": "lines"}},
    "gpteacher_codegen.json.gz": {"columns": {"output": "response"}},
    "gpteacher_roleplay.json.gz": {"columns": {"output": "response"}},
    "gpteacher_toolformer06.json.gz": {"columns": {"output": "response"}},
    "gsm8k_train.jsonl.gz": {"columns": {"instruction": "question", "output": "answer"}},
    "mbpp.jsonl.gz": {"columns": {"instruction": "text", "output": "code"}},
    "scitldr_dev.jsonl.gz": {"columns": {"instruction": "source", "output": "target", "source": ""}},
    "scitldr_train.jsonl.gz": {"columns": {"instruction": "source", "output": "target", "source": ""}},
    "tatoeba_en_zh.tsv.gz": {"header": False, "quoted": False, "columns": {"prompt": "0", "completion": "1"}},
}
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

pytestmark = pytest.mark.skipif(not SETS, reason=f"NOT RUN: the real sets are not there, {FOLDER}")


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    return ChatTemplate(tokenizer_for(TEMPLATE), template=TEMPLATE)


def told_rows(name: str) -> int:
    """How many rows the list beside the set says that it has."""
    path = FOLDER / name
    for manifest in (path.parent / "MANIFEST.md", FOLDER / "MANIFEST.md"):
        lines = [line.split("|") for line in (manifest.read_text().splitlines() if manifest.is_file() else ())]
        tables = [[cell.strip() for cell in line] for line in lines if len(line) > 3]
        header = next((line for line in tables if "rows" in line), [])
        for line in tables:
            if line[1] in (name, path.name):
                return int(line[header.index("rows")])
    raise AssertionError(f"no list says how many rows {name} has")


def blank_lines(name: str) -> int:
    if ".txt" not in name:
        return 0
    lines = gzip.decompress((FOLDER / name).read_bytes()).decode().split("\n")
    return sum(not line.strip() for line in lines[:-1])


@pytest.mark.parametrize("name", SETS)
def test_as_many_rows_are_read_of_a_real_set_as_it_has(name: str):
    config, account = DataConfig(train=(str(FOLDER / name),), **SAID.get(name, {})), Account()
    kept = sum(1 for _ in read_conversations(config, training_parts(config), account))
    assert account.read == told_rows(name) - blank_lines(name)
    assert account.read == kept + sum(account.dropped.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_every_row_of_a_real_set_is_trained_on_dropped_or_held_out(name: str, template: ChatTemplate):
    config = DataConfig(train=(str(FOLDER / name),), max_length=100_000, holdout=0.2, **SAID.get(name, {}))
    trained, held_out = (
        tokenize(config, parts(config), template, cache_dir=None, progress=False)
        for parts in (training_parts, validation_parts)
    )
    account = trained.account
    assert account.read == account.kept + sum(account.dropped.values()) + account.held_out
    assert held_out.account.read == account.held_out
    assert held_out.account.kept + sum(held_out.account.dropped.values()) == account.held_out
    assert account.kept > 0.4 * account.read - account.held_out
    whole, of_whole = dataclasses.replace(config, holdout=0.0), Account()
    kept = sum(1 for _ in read_conversations(whole, training_parts(whole), of_whole))
    assert of_whole.read == kept + sum(of_whole.dropped.values()) == account.read


def test_what_is_said_of_a_set_is_said_of_one_that_is_there():
    assert set(SAID) <= set(SETS)
