"""A model is asked, and what it says is judged: with answers from a table instead of a model."""

import json

import pytest

from jax_sft.config import DataConfig
from jax_sft.data.source import parts_of
from jax_sft.evaluate import behaviour, metrics, probes, rules
from jax_sft.evaluate.answers import Answer


def saying(text, *, stopped=True):
    asked = []

    def ask(conversations):
        asked.extend(conversations)
        return [Answer(text if isinstance(text, str) else text(c), 5, stopped) for c in conversations]

    return ask, asked


def test_probes_tell_a_model_that_continues_from_one_that_answers():
    found = {}
    for name, text, stopped in (
        ("continues", lambda c: f"{c[-1]['content']}\n{c[-1]['content']}\n" * 5, False),
        ("answers", "Lima.", True),
    ):
        ask, asked = saying(text, stopped=stopped)
        found[name] = behaviour.Asked(probes=probes.read_prompts()).measure(ask)
        assert len(asked) == len(found[name].predictions) == 60
        assert {p.id.partition("/")[0] for p in found[name].predictions} == {"probes"}
    shares = {name: (report.probes["answers"], report.probes["stops"]) for name, report in found.items()}
    assert shares["continues"][0] < 0.2 and shares["continues"][1] == 0.0
    assert shares["answers"][0] > 0.9 and shares["answers"][1] == 1.0
    told = behaviour.lines(found)
    assert told[0] == "behaviour probes, continues -> answers" and any("answers" in line for line in told[1:])
    third = behaviour.lines(found | {"third": found["answers"]})
    assert [line for line in third if line.startswith("behaviour probes")] == [
        "behaviour probes, continues -> answers",
        "behaviour probes, continues -> third",
    ]
    said = behaviour.predictions_of(found)
    assert len(said) == 120 and said[0].id == f"continues: {found['continues'].predictions[0].id}"
    alone = behaviour.lines({"one": found["answers"]})
    assert alone[1].split() == ["behaviour", "share"] and not any("+" in line for line in alone)


def test_instructions_are_checked_and_each_is_in_the_predictions():
    prompts = [
        rules.RulePrompt.of(
            {
                "key": 1,
                "prompt": "No commas, please.",
                "instruction_id_list": ["punctuation:no_comma", "keywords:existence"],
                "kwargs": [{}, {"keywords": ["sun"]}],
            },
            "here",
        )
    ]
    ask, _ = saying("The sun is warm.")
    report = behaviour.Asked(rules=prompts).measure(ask)
    assert report.rules["prompt_strict"] == 1.0
    assert report.predictions[0].scores == {"punctuation:no_comma/0": 1.0, "keywords:existence/1": 1.0}
    ask, _ = saying("Rain, alas.")
    report = behaviour.Asked(rules=prompts).measure(ask)
    assert report.rules["instruction_strict"] == 0.0
    assert behaviour.lines({"m": report}) == [
        "m: of 2 instructions and 1 prompts followed 0.0%, 0.0% strictly, 0.0%, 0.0% loosely"
    ]


def test_tasks_are_the_conversations_that_end_with_an_answer(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}], "id": "a"},
        {"messages": [{"role": "user", "content": "3+3?"}, {"role": "assistant", "content": "6"},
                      {"role": "user", "content": "thanks"}]},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "5+5?"},
                      {"role": "assistant", "content": "It is 10."}]},
    ]  # fmt: skip
    path = tmp_path / "tasks.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    tasks = behaviour.tasks_of(parts_of((str(path),)), config=DataConfig())
    assert [(t.id, len(t.messages), t.reference) for t in tasks] == [("a", 1, "4"), (f"{path}:3", 2, "It is 10.")]
    assert len(behaviour.tasks_of(parts_of((str(path),)), config=DataConfig(), count=1)) == 1
    ask, _ = saying("so 10")
    report = behaviour.Asked(tasks=tasks, metrics=("final_number", "exact_match")).measure(ask)
    assert report.metrics["final_number"].value == 0.5
    assert [p.scores for p in report.predictions] == [
        {"final_number": 0.0, "exact_match": 0.0},
        {"final_number": 1.0, "exact_match": 0.0},
    ]
    assert report.to_dict()["metrics"]["final_number"]["value"] == 0.5 and "probes" not in report.to_dict()
    out = tmp_path / "said.jsonl"
    assert metrics.write_predictions(out, report.predictions) == 2
    assert json.loads(out.read_text().splitlines()[0])["prediction"] == "so 10"
    path.write_text(json.dumps(rows[1]))
    with pytest.raises(ValueError, match=r"tasks\.jsonl: no conversation ends with an answer"):
        behaviour.tasks_of(parts_of((str(path),)), config=DataConfig())


def test_what_a_metric_cannot_compare_with_is_told_before_anything_is_asked():
    tasks = [behaviour.Task("t", [{"role": "user", "content": "q"}], "")]
    with pytest.raises(ValueError, match="label"):
        behaviour.Asked(tasks=tasks, metrics=("label_accuracy",)).check()
    behaviour.Asked(tasks=[behaviour.Task("t", [], "assert f(1) == 2")], metrics=("pass_at_1",)).check()


def test_a_model_without_a_template_is_given_plain_text():
    prompts = [p for p in probes.read_prompts() if p.id in ("en-answer-capital", "zh-recall-city")]
    (rule,) = [
        rules.RulePrompt.of(
            {"key": 1, "prompt": "Hi.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}, ""
        )
    ]
    task = behaviour.Task("t", [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}], "a")
    asked_of_it = behaviour.Asked(prompts, [rule], [task], ("f1",), templated=False)
    ask, asked = saying("Lima")
    assert asked_of_it.fitting(lambda text: isinstance(text, str))[1] == 0
    asked_of_it.measure(ask)
    assert asked == [*map(probes.as_plain_text, prompts), "Hi.\n", "s\nq\n"]


def test_prompts_without_room_are_left_out_and_counted():
    asked = behaviour.Asked(probes=probes.read_prompts())
    kept, left_out = asked.fitting(lambda messages: len(messages) == 1)
    assert left_out > 0 and len(kept.probes) + left_out == 60
    with pytest.raises(ValueError, match="no room for any prompt of the probes and an answer; lower --max-new-tokens"):
        asked.fitting(lambda _: False)
