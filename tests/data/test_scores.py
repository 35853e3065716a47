"""Scores of conversations are read strictly, and every sequence that is to be put in order has one."""

import math
import re

import numpy as np
import pytest

from jax_sft.data.conversation import DataError
from jax_sft.data.scores import read_scores, scores_of
from tests.data.test_loader import make_set


def write(path, *lines: str) -> str:
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def test_a_score_is_the_mean_of_the_losses_of_an_id(tmp_path):
    lines = ['{"id": "a", "loss": 1, "ratio": 0.5}', "", '{"id": "b", "loss": 4.5}', '{"id": "a", "loss": 2.0}']
    assert read_scores(write(tmp_path / "s.jsonl", *lines)) == {"a": 1.5, "b": 4.5}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "b"}', 's.jsonl:2: \'{"id": "b"}\' is no score; write an id and a loss, such as'),
        ("[1, 2]", "s.jsonl:2: '[1, 2]' is no score"),
        ("no json", "s.jsonl:2: 'no json' is no score"),
        ('{"id": "b", "loss": null}', "s.jsonl:2: the loss of b is None; write a number, or take the line out"),
        ('{"id": "b", "loss": NaN}', "s.jsonl:2: the loss of b is nan; write a number"),
    ],
)
def test_a_line_that_says_no_score_is_told(tmp_path, line, message):
    path = write(tmp_path / "s.jsonl", '{"id": "a", "loss": 1.0}', line)
    with pytest.raises(DataError, match=re.escape(message)):
        read_scores(path)


def test_a_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(DataError, match=r"data\.scores = '.*none\.jsonl' cannot be read \(.*No such file.*; name a"):
        read_scores(str(tmp_path / "none.jsonl"))


def test_a_sequence_without_a_score_is_an_error_where_it_is_drawn():
    dataset = make_set(9)
    ids = [dataset.ids[i] for i in range(9)]
    scores = {ids[i]: float(i) for i in range(6)}
    found = scores_of(dataset, np.array([5, 0, 3]), scores, "s.jsonl")
    assert found[:6].tolist() == [0, 1, 2, 3, 4, 5] and all(map(math.isnan, found[6:]))
    message = (
        "data.scores = 's.jsonl' has no loss for 2 of the 3 sequences that a stage of order = 'score' draws "
        f"(first: {ids[7]}, {ids[8]}); score the files that are trained on"
    )
    with pytest.raises(DataError, match=re.escape(message)):
        scores_of(dataset, np.array([0, 7, 8]), scores, "s.jsonl")
