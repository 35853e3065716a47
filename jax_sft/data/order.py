"""How hard each sequence is, by the losses that a model has on the conversations: for stages from easy to hard.

In: a tokenised set, and the file of `data.quality.scores`. Out: a number for each sequence.

Letters: N sequence.
"""

import math

import numpy as np

from jax_sft.config import QualityConfig
from jax_sft.data.conversation import EXAMPLES_PER_REASON, DataError
from jax_sft.data.quality.lists import read_scores
from jax_sft.data.scores import id_of
from jax_sft.data.store import TokenizedSet


def scores_of(dataset: TokenizedSet, asked: np.ndarray, config: QualityConfig) -> np.ndarray:
    """The loss of the conversation of each sequence; of those that are not `asked` for, NaN where there is none.

    Raises:
        DataError: one that is asked for has none, or the file is not as it should be.
    """
    assert config.scores is not None, "jax_sft.config refuses an order by scores without them"
    by_id = read_scores(config.scores, config).by_id
    losses = [by_id.get(id_of(dataset, i), {}).get("loss", math.nan) for i in range(len(dataset))]
    scores_N = np.array(losses, np.float64)
    missing = asked[np.isnan(scores_N[asked])]
    if len(missing):
        shown = ", ".join(dict.fromkeys(dataset.ids[i] for i in missing[:EXAMPLES_PER_REASON]))
        raise DataError(
            f"data.quality.scores = {config.scores!r} has no loss for {len(missing):,} of the {len(asked):,} sequences "
            f"that a stage of order = 'score' draws (first: {shown}); score the files that are trained on, under the "
            "same paths, or choose another order"
        )
    return scores_N
