"""On sets that people use the rules stay quiet where people see no fault. Skipped where these sets are not at hand."""

import collections
import dataclasses
import itertools
import pathlib

import pytest

from jax_sft.config import DataConfig, QualityConfig
from jax_sft.data.conversation import Account
from jax_sft.data.formats import read_conversations
from jax_sft.data.quality.screen import rule_of, screened
from jax_sft.data.source import parts_of

ABOVE = pathlib.Path(__file__).resolve().parents
SHARED = next((p / "shared" / "data" for p in ABOVE if (p / "shared" / "data").is_dir()), None)
ROWS = 1000
RULES = (
    "roles",
    "empty_answer",
    "repeats_prompt",
    "mojibake",
    "cut_off",
    "loops",
    "markup",
    "boilerplate",
    "wrong_language",
    "personal_data",
)
SETS = {
    "llamafactory/alpaca_en_demo.json.gz": {},
    "llamafactory/alpaca_zh_demo.json.gz": {},
    "gsm8k_train.jsonl.gz": {"prompt": "question", "completion": "answer"},
    "gpteacher_codegen.json.gz": {"output": "response"},
    "mbpp.jsonl.gz": {"prompt": "text", "completion": "code"},
    "xquad.zh.json.gz": {},
}


@pytest.mark.skipif(SHARED is None, reason="THE REAL SETS ARE NOT AT HAND: what the rules do on them is NOT tested")
@pytest.mark.parametrize("name", SETS)
def test_rules_touch_few_rows_of_a_real_set(name: str):
    assert SHARED is not None
    config = DataConfig(columns=SETS[name])
    account = Account()
    rows = itertools.islice(read_conversations(config, parts_of((str(SHARED / name),)), account), ROWS)
    off = {f.name: "off" for f in dataclasses.fields(QualityConfig) if f.default == "note"}
    rules = QualityConfig(**{**off, **dict.fromkeys(RULES, "note")})
    kept = list(screened(rows, rules, account))
    assert len(kept) >= 900
    counts = collections.Counter({rule_of(reason): n for reason, n in account.noted.items()})
    assert all(n <= 0.02 * len(kept) for n in counts.values()), account.lines()
