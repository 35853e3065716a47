import html.parser
import json
import re

import pytest

from jax_sft.report.run import comparison_lines, comparison_page, read_run, report, run_page, terminal_lines
from jax_sft.report.run.pairs import first_and_last, last_of_both, shown
from tests.report.run.workdirs import HOSTILE, add_evaluation, make_run, manifest_of, put_lines


class Page(html.parser.HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.append(dict(attrs))

    def handle_data(self, data):
        self.text += data

    def sections(self):
        return [a["id"] for tag, a in zip(self.tags, self.attributes, strict=True) if tag == "section"]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    b = make_run(folder / "b", skill=0.6, validation="bbbb", **{"optim.lr": 3e-4, "lora.rank": 8})
    return read_run(make_run(folder / "a")), read_run(b)


def test_the_page_tells_the_story_in_order(two):
    page = Page(run_page(two[0]))
    assert page.sections() == ["result", "curves", "behaviour", "answers", "forgetting", "data", "cost", "again"]
    for told in (
        "Validation loss fell from 2.8500 to 1.4975 (-1.3525, 47%)",
        "The best step was 30",
        "alarm, overfitting, step 30: validation loss rises",
        "full fine-tuning of small on a.jsonl",
        "not measured",  # energy
        "too long",
        "jax-sft train --config c.py",
        "optim.lr",
    ):
        assert told in page.text, told


def test_hostile_text_is_text_and_its_control_characters_are_seen(tmp_path):
    run = make_run(tmp_path / "run", manifest={"command": HOSTILE})
    told = manifest_of(40, **{"model.path": HOSTILE, "data.train": [HOSTILE]})
    accounts = {HOSTILE: {"read": 1, "dropped": {HOSTILE: 1}}}
    told["data"]["accounts"] = accounts
    (run / "manifest.json").write_text(json.dumps(told | {"command": HOSTILE, "devices": [HOSTILE]}))
    put_lines(run / "alarms.jsonl", [{"step": 3, "kind": HOSTILE, "level": "stop", "text": HOSTILE}])
    lines = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(lines.replace("loss/books", json.dumps(f"loss/{HOSTILE}")[1:-1]))
    record = read_run(run)
    for text in (run_page(record), comparison_page(record, record)):
        page = Page(text)
        assert "img" not in page.tags and page.tags.count("script") == 1
        assert not [name for of in page.attributes for name in of if name.startswith("on")]
        assert not set("\u202e\x1b") & set(text)
        assert "\\u202e" not in text  # nor where the page's script would turn it into one
        assert "<U+202E>" in page.text and "\u241b" in page.text
    assert not set("\u202e\x1b\n") & set("".join(terminal_lines(record)))


def test_the_page_loads_nothing_and_runs_its_own_script_alone(two):
    for text in (run_page(two[0]), comparison_page(*two)):
        assert "default-src 'none'" in text and "script-src 'sha256-" in text
        assert not re.search(r"""(src|href|action)\s*=\s*["']?(?!#)|url\(|@import|https?://""", text.split("<body>")[0])
        found = Page(text).attributes
        assert {a["href"][0] for a in found if "href" in a} == {"#"} and not [a for a in found if "src" in a]


def test_missing_parts_leave_their_sections_out(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    put_lines(tmp_path / "metrics.jsonl", [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}])
    record = read_run(tmp_path)
    page = Page(run_page(record))
    assert page.sections() == ["result", "curves", "cost", "again"]
    assert "the training loss went from 2.0000 to 1.0000" in page.text
    assert "unknown model" in page.text and "not written down" in page.text
    assert "The run is not finished" in page.text
    assert terminal_lines(record) and comparison_page(record, record) and comparison_lines(record, record)


@pytest.mark.parametrize("value", [None, [], "x", 3, {"a": []}, [[1]]])
def test_a_manifest_of_another_form_is_no_obstacle(tmp_path, value):
    keys = ("config", "data", "devices", "starts", "versions", "mfu", "cost", "total_steps", "seed", "command")
    told = dict.fromkeys(keys, value)
    told["config"] = {"model": value, "data": value, "lora": value, "evaluate": value, "stages": None}
    (tmp_path / "manifest.json").write_text(json.dumps(told))
    put_lines(tmp_path / "metrics.jsonl", [{"step": 1, "loss": 2.0, "stage": 0}, {"step": 2, "loss": 2.0, "stage": 1}])
    assert "<section" in run_page(read_run(tmp_path))


def test_costs_that_are_written_down_are_exact_and_others_are_called_about(tmp_path):
    cost = {"seconds": 7320, "tokens": 1234567, "energy_joules": 7.2e6, "goodput": 0.9, "parts": {"saving": 61}}
    exact = Page(run_page(read_run(make_run(tmp_path / "a", manifest={"cost": cost})))).text
    for told in ("2 h 2 min", "1,234,567", "2 kWh", "90.0%", "saving", "1 min 1 s"):
        assert told in exact, told
    about = Page(run_page(read_run(make_run(tmp_path / "b")))).text
    assert "about 20.0 s" in about and "420k, about, from the log" in about


def test_two_runs_with_other_validation_sets_are_not_compared_in_silence(two):
    page = Page(comparison_page(*two))
    assert "The validation sets differ, so the validation losses cannot be compared." in page.text
    assert "warning: The validation sets differ" in "\n".join(comparison_lines(*two))
    assert "The validation sets differ" not in comparison_page(two[0], two[0])


def test_two_runs_are_shown_by_config_curves_scores_answers_and_costs(two):
    page = Page(comparison_page(*two))
    assert page.sections() == ["result", "config", "curves", "behaviour", "answers", "forgetting", "cost"]
    assert re.search(r"optim\.lr\s*0\.0001\s*0\.0003", page.text) and "LoRA, rank 8" in page.text
    lines = "\n".join(comparison_lines(*two))
    assert "config lora.rank: 0 -> 8" in lines
    assert re.search(r"probes, answers: [\d.]+% -> [\d.]+% \(-[\d.]+, 95 % interval -[\d.]+ to -[\d.]+\)", lines)


def test_answers_are_better_or_worse_by_their_scores_and_changed_by_their_text(tmp_path):
    run = make_run(tmp_path / "run", evaluated=False)
    asked = {"prompt": [{"role": "user", "content": "q"}], "stopped": True, "tokens": 1}

    def rows(*told):
        return [{"id": f"probes/{i}", "prediction": t, "scores": s, **asked} for i, (t, s) in enumerate(told)]

    first = rows(("a", {"x": 0.0}), ("a", {"x": 1.0}), ("a", {}), ("a", {"x": 1.0}))
    last = rows(("b", {"x": 1.0}), ("b", {"x": 0.0}), ("b", {}), ("a", {"x": 1.0}), ("new", {}))
    put_lines(run / "evaluations" / "00000000.predictions.jsonl", first)
    put_lines(run / "evaluations" / "00000040.predictions.jsonl", last)
    record = read_run(run)
    changes = {pair.id: pair.change for pair in first_and_last(record) if pair.kind == "probes"}
    assert changes == {"0": "better", "1": "worse", "2": "changed", "3": "same", "4": "alone"}
    assert {pair.change for pair in last_of_both(record, record)} == {"same"}


def test_a_page_of_very_many_answers_says_how_many_it_leaves_out(tmp_path):
    run = make_run(tmp_path / "run", evaluated=False)
    for step, skill in ((0, 0.1), (40, 0.9)):
        add_evaluation(run, step, skill, prompts=700)
    kept, missing = shown(first_and_last(read_run(run)))
    assert missing == 600 and len(kept) == 1501
    assert "600 more are not on this page" in run_page(read_run(run))


def test_the_door_writes_the_page_and_says_where(tmp_path):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    assert report([a])[-1] == f"the page is {a / 'report.html'}" and (a / "report.html").is_file()
    assert report([a, b])[-1] == f"the page is {a / 'report_vs_b.html'}" and (a / "report_vs_b.html").is_file()
    report([a], out=tmp_path / "new" / "page.html")
    assert (tmp_path / "new" / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert not list(a.glob("*.tmp-*"))


def test_the_door_refuses_what_it_cannot_report(tmp_path):
    a = make_run(tmp_path / "a")
    for workdirs, message in (
        ([], "report: 0 workdirs were given; name one, or two"),
        ([a] * 3, "report: 3 workdirs were given; name one, or two"),
        ([a, a], "was given twice; name two workdirs"),
        ([tmp_path / "no"], "no: is no folder"),
        ([tmp_path], "holds no manifest.json, so it is no workdir"),
    ):
        with pytest.raises(ValueError, match=message):
            report(workdirs)
    with pytest.raises(ValueError, match="is a folder; name the file that the page is written to"):
        report([a], out=tmp_path)
