"""A file of scores is whole or not there, belongs to its set, and never replaces what is something else."""

import dataclasses
import json
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from jax_sft.config import DataConfig
from jax_sft.data.conversation import Account
from jax_sft.data.dataset import tokenize
from jax_sft.data.scores import (
    FIELDS,
    PartialFile,
    Score,
    check_destination,
    check_ids,
    conversation_ends,
    id_of,
    read_scores,
)
from jax_sft.data.source import parts_of
from jax_sft.data.template import ChatTemplate
from jax_sft.report.scores import histograms, picture, summary
from tests.tiny import tiny_tokenizer, write_conversations


@pytest.fixture(scope="module")
def template():
    return ChatTemplate(tiny_tokenizer())


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, template):
    path = write_conversations(tmp_path_factory.mktemp("scores") / "d.jsonl", 10)
    return tokenize(DataConfig(), parts_of((str(path),)), template, cache_dir=None, progress=False)


def with_ids(dataset, ids, *, method="turns"):
    """As many sequences as ids."""
    count = len(ids)
    return dataclasses.replace(
        dataset,
        lengths_N=dataset.lengths_N[:count],
        ids=ids,
        account=Account(method={method: count}),
    )


def scores_of(dataset):
    return [Score.of(dataset.ids[i], 1.0 + i, 2.0, 3) for i in range(len(dataset))]


def test_the_ratio_is_that_of_the_losses():
    assert Score.of("a", 1.0, 3.0, 7) == Score("a", 1.0, 3.0, 0.3333333, 7)


@pytest.mark.parametrize("without", [None, 0.0])
def test_without_a_loss_to_divide_by_there_is_no_ratio(without):
    assert Score.of("a", 1.0, without, 1).ratio is None


def test_the_answers_of_one_conversation_are_one(dataset):
    ids = ["a#1", "a#2", "b#2", "c", "d#1", "d#1", "d#3"]
    found = with_ids(dataset, ids)
    assert conversation_ends(found).tolist() == [2, 3, 4, 5, 7]
    assert [id_of(found, i) for i in (0, 2, 3, 4)] == ["a", "b", "c", "d"]


def test_an_id_that_ends_in_a_number_stays_where_no_conversation_was_cut(dataset):
    found = with_ids(dataset, ["a#1", "a#2"], method="tags")
    assert conversation_ends(found).tolist() == [1, 2]
    assert id_of(found, 1) == "a#2"


def test_two_conversations_of_one_id_are_refused_with_their_numbers(dataset):
    answers = with_ids(dataset, ["a#1", "a#2", "b#1", "c", "a#1"])
    said = (
        r"the id 'a' is that of conversation 1 \(source \w+\) and of conversation 4 \(source \w+\) .*same_id = 'drop'"
    )
    with pytest.raises(ValueError, match=said):
        check_ids(answers, conversation_ends(answers))
    whole = with_ids(dataset, ["a#1", "a#2", "b", "c", "b"], method="tags")
    with pytest.raises(ValueError, match=r"the id 'b' is that of conversation 3 .* and of conversation 5 "):
        check_ids(whole, conversation_ends(whole))
    sound = with_ids(dataset, ["a#1", "a#2", "b#1", "c"])
    check_ids(sound, conversation_ends(sound))


def test_scores_are_read_as_they_were_written(dataset, tmp_path):
    out = tmp_path / "s.jsonl"
    partial = PartialFile(out, "0")
    partial.append(scores_of(dataset))
    assert not out.exists()
    partial.finish()
    assert read_scores(out) == scores_of(dataset)
    assert list(tmp_path.iterdir()) == [out]
    assert {tuple(json.loads(line)) for line in out.read_text().splitlines()} == {FIELDS}
    assert FIELDS == ("id", "loss", "loss_without_prompt", "ratio", "tokens")
    check_destination(out)


SCORE = '{"id": "a", "loss": 1.0, "loss_without_prompt": 1.0, "ratio": 1.0, "tokens": 1}\n'
OTHERS = ['{"id": "a", "messages": []}\n', "not JSON\n", '{"loss": 1.0}\n', "[]\n", "3\n"]
OTHERS += [SCORE.replace('"loss": 1.0', '"loss": "low"'), SCORE.replace("{", '{"more": 1, '), SCORE.replace('"a"', "3")]


@pytest.mark.parametrize("text", OTHERS)
def test_what_is_no_file_of_scores_is_not_replaced(tmp_path, text):
    path = tmp_path / "train.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"train.jsonl: is there already and holds no scores, so it is not replaced"):
        check_destination(path)
    with pytest.raises(ValueError, match=r"train.jsonl:1: is no score, a line with id, loss, loss_without_prompt"):
        read_scores(path)


def test_a_name_that_is_free_or_an_empty_file_is_taken(tmp_path):
    check_destination(tmp_path / "new.jsonl")
    (tmp_path / "empty.jsonl").touch()
    check_destination(tmp_path / "empty.jsonl")


ENDS = (4, 7, 10)  # of the chunks


def left(tmp_path, dataset, text):
    """The partial file after it was opened again, and the chunks that are left of it."""
    partial = PartialFile(tmp_path / "s.jsonl", "0")
    partial.path.write_text(text)
    done = partial.chunks_done(dataset, conversation_ends(dataset), ENDS)
    return done, len(partial.path.read_text().splitlines())


def lines_of(dataset):
    return [json.dumps(dataclasses.asdict(score)) + "\n" for score in scores_of(dataset)]


@pytest.mark.parametrize(("lines", "chunks"), [(0, 0), (3, 0), (4, 1), (6, 1), (7, 2), (9, 2), (10, 3)])
def test_an_interrupted_scoring_goes_on_behind_its_last_whole_chunk(tmp_path, dataset, lines, chunks):
    kept = ENDS[chunks - 1] if chunks else 0
    assert left(tmp_path, dataset, "".join(lines_of(dataset)[:lines])) == (chunks, kept)


def test_half_a_line_and_what_follows_it_are_done_again(tmp_path, dataset):
    lines = lines_of(dataset)
    assert left(tmp_path, dataset, "".join(lines[:4]) + lines[4][:-9]) == (1, 4)
    assert left(tmp_path, dataset, "".join(lines[:7]).removesuffix("\n")) == (1, 4)
    assert left(tmp_path, dataset, "".join([*lines[:5], "\0\n", *lines[6:]])) == (1, 4)


def test_scores_of_other_conversations_are_done_again(tmp_path, dataset):
    lines = lines_of(dataset)
    assert left(tmp_path, dataset, "".join([*lines[:4], *lines[5:]])) == (1, 4)
    assert left(tmp_path, dataset, "".join(reversed(lines))) == (0, 0)


def test_more_lines_than_conversations_are_cut_off(tmp_path, dataset):
    assert left(tmp_path, dataset, "".join(lines_of(dataset) * 2)) == (3, 10)


def test_the_summary_names_both_ends_and_where_the_prompt_does_not_help(dataset, template):
    scores = [Score.of(dataset.ids[i], 0.3 * (i + 1), 1.0, 5) for i in range(len(dataset))]
    text = "\n".join(summary(scores, dataset, conversation_ends(dataset), template))
    assert "scored 10 conversations, 50 trained tokens" in text
    assert "where the prompt does not help: 7 (70.0%)" in text
    highest, lowest = text.split("lowest ratio:")
    assert "3.000  c9 (loss 3.000, 5 tokens)" in highest
    assert "0.300  c0 (loss 0.300, 5 tokens)" in lowest
    assert "count to 9 assistant → 9 na na" in highest
    assert np.isclose(float(text.split("  ratio    ")[1].split()[3]), 1.65)


def test_without_ratios_the_summary_goes_by_the_loss(dataset, template):
    scores = [Score.of(dataset.ids[i], float(i), None, 5) for i in range(len(dataset))]
    text = "\n".join(summary(scores, dataset, conversation_ends(dataset), template))
    assert "10 of them have no prompt, so that there is no ratio" in text
    assert "highest loss:\n    9.000  c9" in text
    assert "prompt does not help" not in text


def test_the_picture_is_one_whole_svg_that_loads_nothing():
    scores = [Score.of(f"<{i}>", 0.1 * i, 1.0, 5) for i in range(200)]
    drawn = histograms(scores)
    assert [sum(histogram.counts) for histogram in drawn] == [200, 200]
    root = ET.fromstring(picture(drawn))
    assert root.tag.endswith("svg")
    assert "href" not in picture(drawn)
    assert len(root.findall(".//{*}title")) == sum(len(histogram.counts) for histogram in drawn)


@pytest.mark.parametrize("losses", [[1.0], [0.0, 0.0]])
def test_a_set_of_one_value_has_a_picture(losses):
    (histogram,) = histograms([Score.of("a", loss, None, 1) for loss in losses])
    assert sum(histogram.counts) == len(losses)
    ET.fromstring(picture([histogram]))
