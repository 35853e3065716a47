"""Known faults among sound conversations: each rule finds its own and leaves the sound ones alone."""

import dataclasses
import functools
import json
import pathlib
import random
import tempfile

import pytest

from jax_sft.config import DataConfig, QualityConfig
from jax_sft.data.conversation import Account, Conversation
from jax_sft.data.formats import to_conversation
from jax_sft.data.quality.leakage import Reference
from jax_sft.data.quality.screen import screened
from tests.data.quality import planted

LEAST_FOUND, MOST_TOUCHED, PER_RULE = 0.95, 0.02, 200
ALL_OFF = QualityConfig(
    **{f.name: "off" for f in dataclasses.fields(QualityConfig) if f.type not in (tuple, str) and f.default == "note"}
)
WORD_LIST = "# of a user\nblockhead\nrotten egg\ntwit\n大坏蛋\n臭东西\n"
RULES = (
    *planted.FAULTS,
    "wrong_language by model",
    "length by deviation",
    "score",
    "same_content",
    "same_id",
    "same_prompt",
    "near_duplicate",
)


@functools.cache
def clean() -> list[dict]:
    return planted.clean_rows()


def conversation(row: dict) -> Conversation:
    return to_conversation(row, row["id"], format="messages", columns={}, source="planted")


def rows_of(rule: str) -> list[dict]:
    """200 faults; those of repeats need the clean rows before them."""
    rng, rows = random.Random(rule), clean()
    match rule:
        case "wrong_language by model":
            return list(planted.faults(rule, planted.wrong_language_by_model))
        case "length by deviation":
            return list(planted.faults(rule, planted.short_answer))
        case "score":
            return list(planted.faults(rule, lambda i, r: planted.talk(*planted.plain(i, r)[:2])))
        case "same_content":
            return [{**rows[k], "id": f"{rule}-{k}"} for k in range(PER_RULE)]
        case "same_id":
            return [{**planted.talk(*planted.plain(k, rng)[:2]), "id": rows[k]["id"]} for k in range(PER_RULE)]
        case "same_prompt":
            return [other_answer(rows[k], k, rng) for k in range(PER_RULE)]
        case "near_duplicate":
            return list(planted.faults(rule, lambda i, r: planted.near_duplicate(i, r, rows)))
        case _:
            return list(planted.faults(rule, planted.FAULTS[rule]))


def other_answer(row: dict, k: int, rng: random.Random) -> dict:
    messages = [dict(m) for m in row["messages"]]
    messages[-1]["content"] = planted.plain(k + 50, rng)[1]
    if k % 2:  # case and spaces do not make another prompt
        messages[0]["content"] = messages[0]["content"].upper() + " "
    return {"messages": messages, "id": f"same_prompt-{k}"}


def config_of(rule: str, folder: pathlib.Path) -> QualityConfig:
    key, _, way = rule.partition(" by ")
    more: dict = {key: "drop"}
    match key:
        case "words":
            (folder / "words.txt").write_text(WORD_LIST, encoding="utf-8")
            more["word_lists"] = (str(folder / "words.txt"),)
        case "length" if way:
            more["max_length_deviation"] = 4.0
        case "length":
            more |= {"min_answer_characters": 12, "max_answer_characters": 4000}
            return dataclasses.replace(ALL_OFF, **more)
        case "wrong_language" if way:
            more["language_by"] = "model"
        case "score":
            rng = random.Random(3)
            lines = [score(f"clean-{i}", rng.uniform(0.2, 0.9), rng.uniform(0.5, 3)) for i in range(len(clean()))]
            for i in range(PER_RULE):
                ratio, loss = [(rng.uniform(1.01, 2), 2.0), (rng.uniform(0, 0.04), 0.1), (0.5, rng.uniform(5, 9))][
                    i % 3
                ]
                lines.append(score(f"score-{i}", ratio, loss))
            (folder / "scores.jsonl").write_text("\n".join(lines), encoding="utf-8")
            more |= {"scores": str(folder / "scores.jsonl"), "min_ratio": 0.05, "max_ratio": 1.0, "max_loss": 4.0}
    return dataclasses.replace(ALL_OFF, **more)


def score(id: str, ratio: float, loss: float) -> str:
    return json.dumps({"id": id, "loss": loss, "loss_without_prompt": loss / max(ratio, 1e-6), "ratio": ratio})


def dropped_ids(rule: str, rows: list[dict], folder: pathlib.Path) -> set[int]:
    """Which rows, by their number, a rule leaves out of all of them."""
    account = Account()
    numbered = [dataclasses.replace(conversation(row), where=str(i)) for i, row in enumerate(rows)]
    references = [Reference(planted.benchmark(i), f"benchmark:{i}") for i in range(PER_RULE)]
    kept = {int(c.where) for c in screened(numbered, config_of(rule, folder), account, references)}
    assert len(kept) + sum(account.dropped.values()) == len(rows)
    return set(range(len(rows))) - kept


@functools.cache
def measured(rule: str) -> tuple[int, int, list[dict], list[dict]]:
    """(planted, found, those that are missed, sound ones that are touched)."""
    rows, wrong = clean(), rows_of(rule)
    if rule.startswith("length"):  # rows that are short for a reason are sound to the bounds of no one
        rows = [r for r in rows if sum(len(m["content"]) for m in r["messages"] if m["role"] == "assistant") >= 12]
    with tempfile.TemporaryDirectory() as folder:
        found = dropped_ids(rule, [*rows, *wrong], pathlib.Path(folder))
    missed = [row for i, row in enumerate(wrong) if len(rows) + i not in found]
    return len(wrong), len(wrong) - len(missed), missed, [row for i, row in enumerate(rows) if i in found]


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_finds_its_faults_and_leaves_sound_rows_alone(rule: str):
    count, found, missed, touched = measured(rule)
    assert count == PER_RULE and len(clean()) >= 1000
    shown = [row["messages"] for row in (*missed[:3], *touched[:3])]
    assert found >= LEAST_FOUND * count, f"{found} of {count}: {shown}"
    assert len(touched) <= MOST_TOUCHED * len(clean()), f"{len(touched)} sound rows: {shown}"


def test_the_table_of_all_rules(capsys):
    with capsys.disabled():
        print(f"\n| rule | planted | found | recall | of {len(clean())} sound rows | precision |\n|" + "---|" * 6)
        for rule in RULES:
            count, found, _, touched = measured(rule)
            precision = found / max(1, found + len(touched))
            print(f"| {rule} | {count} | {found} | {found / count:.1%} | {len(touched)} | {precision:.1%} |")


def test_every_kind_of_personal_data_is_found_and_named(tmp_path):
    rows = rows_of("personal_data")
    account = Account()
    config = dataclasses.replace(ALL_OFF, personal_data="mask")
    kept = list(screened([conversation(row) for row in rows], config, account))
    assert len(kept) == len(rows) and not account.dropped
    left = [r["value"] for r, c in zip(rows, kept, strict=True) if any(r["value"] in m.content for m in c.messages)]
    assert len(left) <= 0.05 * len(rows), left
    assert len(account.altered) == len({row["kind"] for row in rows}) == 12
    assert DataConfig().quality.personal_data == "off"
