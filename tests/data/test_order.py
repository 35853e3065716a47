"""Every sequence that is to be put in order has a score."""

import json
import re

import numpy as np
import pytest

from jax_sft.config import QualityConfig
from jax_sft.data.conversation import DataError
from jax_sft.data.order import scores_of
from tests.data.test_loader import make_set


def test_a_sequence_without_a_loss_is_an_error_where_it_is_drawn(tmp_path):
    dataset = make_set(9)
    ids = [dataset.ids[i] for i in range(9)]
    lines = [json.dumps({"id": ids[i], "loss": i if i < 6 else None, "ratio": 0.5}) for i in range(8)]
    path = tmp_path / "s.jsonl"
    path.write_text("\n".join(reversed(lines)))
    config = QualityConfig(scores=str(path))
    found = scores_of(dataset, np.array([5, 0, 3]), config)
    np.testing.assert_array_equal(found, [0, 1, 2, 3, 4, 5, np.nan, np.nan, np.nan])
    message = (
        f"data.quality.scores = {str(path)!r} has no loss for 2 of the 3 sequences that a stage of order = 'score' "
        f"draws (first: {ids[7]}, {ids[8]}); score the files that are trained on"
    )
    with pytest.raises(DataError, match=re.escape(message)):
        scores_of(dataset, np.array([0, 7, 8]), config)
