"""The change itself: a model trained from nothing first continues the question, and after fine-tuning answers it.

A model of two layers reads sheets of questions, as a base model reads the web, and then a few conversations. Nobody
reads what it says: the probes tell the two apart.
"""

import itertools
import json
import pathlib
import random
import re

import pytest

from jax_sft.assistant import load_assistant
from jax_sft.config import RunConfig, default, from_config_dict
from jax_sft.evaluate import behaviour, probes
from jax_sft.train_loop import train
from tests import tiny

THINGS = ("cat", "dog", "boat", "lamp", "hill", "road", "tree", "fish", "cup", "map")
QUESTIONS = ("Where is the {}?", "Who owns the {}?", "What is a {}?")
ANSWERS = ("The {} is here.", "Ann owns the {}.", "A {} is a thing.")
PAIRS = [
    (question.format(thing), answer.format(thing))
    for thing, (question, answer) in itertools.product(THINGS, zip(QUESTIONS, ANSWERS, strict=True))
]
HELD_OUT = PAIRS[::4]  # never in a conversation that is trained on


def lines(path: pathlib.Path, rows) -> str:
    path.write_text("".join(json.dumps({"id": f"r{i}", **row}) + "\n" for i, row in enumerate(rows)))
    return str(path)


def chat(question: str, *answer: str):
    return {"messages": [{"role": r, "content": c} for r, c in zip(("user", "assistant"), (question, *answer))]}  # noqa: B905


def run(model: pathlib.Path, data: str, *, form: str, steps: int, lr: float, **evaluate) -> RunConfig:
    config = default()
    config.model.path, config.model.dtype = str(model), "float32"
    config.data.train, config.data.format, config.data.max_length = (data,), form, 128
    config.data.too_long = "truncate"  # a sheet goes on and on
    config.train.steps, config.optim.lr, config.train.batch_size = steps, lr, 8
    config.mesh.data, config.mesh.fsdp = 8, 1
    config.log.tensorboard, config.export.certify, config.export.dtype = False, False, "float32"
    config.evaluate.update(evaluate)
    return from_config_dict(config)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, monkeypatch_module):
    folder = tmp_path_factory.mktemp("change")
    monkeypatch_module.setattr(tiny, "WIDTHS", {**tiny.WIDTHS, "hidden_size": 64, "intermediate_size": 128})
    words = {
        f"{gap}{word}" for pair in PAIRS for text in pair for word in re.findall(r"\w+", text) for gap in ("", "Ġ")
    }
    tiny.write_model(folder / "nothing", words=tuple(sorted(words)))
    draw = random.Random(0)
    sheets = ({"text": "\n".join(draw.choice(PAIRS)[0] for _ in range(40))} for _ in range(400))
    asked = [{**chat(q), "id": f"p{i}", "kind": "answer", "language": "en"} for i, (q, _) in enumerate(HELD_OUT)]
    (folder / "probes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
    text = run(folder / "nothing", lines(folder / "text.jsonl", sheets), form="text", steps=100, lr=5e-3)
    train(text, folder / "base", command="test")
    taught = [chat(*pair) for pair in PAIRS if pair not in HELD_OUT]
    config = run(
        folder / "base" / "export",
        lines(folder / "chat.jsonl", taught),
        form="messages",
        steps=80,
        lr=3e-3,
        probes=str(folder / "probes.jsonl"),
        max_new_tokens=48,
    )
    train(config, folder / "tuned", command="test")
    return folder


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def probed(folder: pathlib.Path, name: str, *, templated: bool):
    assistant = load_assistant(str(folder / name / "export"))
    asked = behaviour.Asked(probes=probes.read_prompts(str(folder / "probes.jsonl")), templated=templated)
    return asked.measure(lambda prompts: assistant.answer_all(prompts, max_new_tokens=48))


def test_the_base_continues_and_what_was_made_of_it_answers_and_stops(trained):
    before, after = probed(trained, "base", templated=False), probed(trained, "tuned", templated=True)
    assert before.probes["answers"] <= 0.1 and before.probes["stops"] <= 0.1
    assert after.probes["answers"] >= 0.9 and after.probes["stops"] >= 0.9
    said = [line.prediction for line in before.predictions]
    assert sum("?" in text for text in said) >= 0.9 * len(said)  # it goes on with the sheet


def test_the_run_itself_and_its_page_tell_the_change(trained):
    metrics = [json.loads(line) for line in (trained / "tuned" / "metrics.jsonl").read_text().splitlines()]
    answers = {line["step"]: line["probes/answers"] for line in metrics if "probes/answers" in line}
    assert answers[0] <= 0.1 and answers[80] >= 0.9
    page = (trained / "tuned" / "report.html").read_text()
    after = json.loads((trained / "tuned" / "evaluations" / "00000080.predictions.jsonl").read_text().splitlines()[0])
    assert HELD_OUT[0][0] in page and after["prediction"] in page
