"""Batch: what a train step eats. Imports no jax, so that data workers never start it.

Letters: B packed row, T position in the row, P predicted position (the head runs on these alone).
"""

from typing import Any, NamedTuple

Array = Any  # numpy on the host, jax on the device


class Batch(NamedTuple):
    """Packed rows of one optimizer step (or one evaluation step); a pytree.

    Nothing below shifts again: `targets_BT[b, t]` is the token that position t must predict. A small row (T = 6) of two
    sequences, [1 2 3] and [7 8]; `-` is padding, a segment of its own:

        tokens_BT      1 2 | 7 | - - -        the last token of a sequence predicts nothing and is left out
        targets_BT     2 3 | 8 | 0 0 0
        weights_BT     0 1 | 1 | 0 0 0        the weight of predicting targets_BT
        segments_BT    1 1 | 2 | 0 0 0
        positions_BT   0 1 | 0 | 0 1 2
        sources_BT     0 0 | 4 | 0 0 0        index of the sequence's source, for sums by source
        predict_BP     1 2 6 6                positions with a weight, then T as padding (P = 4)
    """

    tokens_BT: Array  # int32
    targets_BT: Array  # int32
    weights_BT: Array  # float32
    segments_BT: Array  # int32; 0 is padding
    positions_BT: Array  # int32; restarts in each segment
    sources_BT: Array  # int32
    predict_BP: Array  # int32; T means "no position"
