import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_sft.data.conversation import Sequence
from jax_sft.data.packing import fill_rows, pack, predict_capacity

# (length, trained) of each sequence; some lengths often, so that equals compete
lengths = st.integers(1, 64) | st.sampled_from([2, 3, 30, 40])
pairs = st.lists(lengths.flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))), max_size=60)


def arrays(lengths_and_trained):
    return np.asarray([p[0] for p in lengths_and_trained], np.int32), np.asarray(
        [p[1] for p in lengths_and_trained], np.int32
    )


def draw_set(kind, count, seed=0):
    """Lengths and trained counts like those of real sets, up to 2048 positions."""
    rng = np.random.default_rng(seed)
    if kind == "alpaca":  # short questions, answers of a paragraph
        lengths_N, share_N = np.exp(rng.normal(4.6, 0.7, count)), rng.beta(4, 2, count)
    elif kind == "chat":
        lengths_N, share_N = np.exp(rng.normal(5.5, 1.0, count)), rng.beta(2, 2, count)
    elif kind == "documents and chat":  # long prompts with short answers, short prompts with long answers
        lengths_N = np.exp(rng.normal(5.5, 1.0, count))
        share_N = np.where(lengths_N > np.median(lengths_N), 0.05, 0.9)
    else:
        assert kind == "no mixing"  # rows of one kind alone: no small P can fill them
        lengths_N = np.concatenate([rng.integers(1500, 2048, count // 20), rng.integers(20, 150, count)])
        share_N = np.where(lengths_N > 1000, 0.02, 0.95)
    lengths_N = np.minimum(lengths_N, 2048).astype(np.int32)
    return lengths_N, np.clip(lengths_N * share_N, 1, lengths_N).astype(np.int32)


def sequence(tokens, weights):
    return Sequence(
        np.asarray(tokens[:-1], np.int32), np.asarray(tokens[1:], np.int32), np.asarray(weights, np.float32), "s", "s:1"
    )


@settings(deadline=None, max_examples=300)
@given(pairs, st.integers(64, 100), st.integers(64, 100), st.none() | st.integers(0, 2**32 - 1))
def test_each_sequence_stands_in_exactly_one_row_within_both_capacities(sequences, capacity, predicted, seed):
    lengths_N, trained_N = arrays(sequences)
    rows = pack(lengths_N, trained_N, capacity=capacity, predict_capacity=predicted, seed=seed)
    assert sorted(i for row in rows for i in row.tolist()) == list(range(len(sequences)))
    for row in rows:
        assert len(row)
        assert lengths_N[row].sum() <= capacity
        assert trained_N[row].sum() <= predicted


@settings(deadline=None, max_examples=200)
@given(pairs, st.integers(64, 100))
def test_no_two_rows_fit_into_one(sequences, capacity):
    lengths_N, trained_N = arrays(sequences)
    rows = pack(lengths_N, trained_N, capacity=capacity, predict_capacity=capacity, seed=1)
    used = sorted(int(lengths_N[row].sum()) for row in rows)
    assert len(used) < 2 or used[0] + used[1] > capacity


def test_of_equals_the_first_with_few_enough_trained_positions_is_taken():
    lengths_N, trained_N = np.asarray([10, 10, 10, 10, 20]), np.asarray([9, 9, 8, 8, 0])
    rows = pack(lengths_N, trained_N, capacity=20, predict_capacity=17, seed=None)
    assert [row.tolist() for row in rows] == [[4], [0, 2], [1, 3]]


def test_a_row_is_filled_past_many_that_are_trained_too_much_for_it():
    lengths_N = np.asarray([4] * 40 + [1] * 40)
    rows = pack(lengths_N, lengths_N, capacity=20, predict_capacity=10, seed=0)
    assert [lengths_N[row].tolist() for row in rows] == [[4, 4, 1, 1]] * 20


@pytest.mark.parametrize(
    ("kind", "max_length", "least_fill"),
    [
        ("alpaca", 2048, 0.99),
        ("alpaca", 512, 0.99),
        ("chat", 2048, 0.99),
        ("documents and chat", 2048, 0.98),
        ("no mixing", 2048, 0.97),
    ],
)
def test_rows_are_nearly_full(kind, max_length, least_fill):
    lengths_N, trained_N = draw_set(kind, 5000)
    lengths_N, trained_N = np.minimum(lengths_N, max_length), np.minimum(trained_N, max_length)
    capacity = predict_capacity(lengths_N, trained_N, max_length=max_length)
    rows = pack(lengths_N, trained_N, capacity=max_length, predict_capacity=capacity, seed=0)
    assert lengths_N.sum() / (len(rows) * max_length) > least_fill


def test_long_prompts_and_long_answers_share_rows():
    # The head then pays for a third of the positions; without mixing, rows would be three times as many.
    lengths_N, trained_N = draw_set("documents and chat", 20_000)
    assert predict_capacity(lengths_N, trained_N, max_length=2048) < 2048 / 3


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_few_sequences_fill_rows_that_best_fit_leaves_open(seed, monkeypatch):
    lengths = np.clip(np.random.default_rng(0).lognormal(6.2, 0.55, 300), 60, 2000).astype(np.int64)
    trained = lengths // 2

    def plan() -> list[np.ndarray]:
        return pack(lengths, trained, capacity=2048, predict_capacity=1280, seed=seed)

    least = -(-int(lengths.sum()) // 2048)
    few = plan()
    assert len(few) == least
    assert sorted(np.concatenate(few).tolist()) == list(range(300))
    monkeypatch.setattr("jax_sft.data.packing._FEW", 0)
    assert len(plan()) > least


def test_200k_sequences_are_planned_in_seconds():
    lengths_N, trained_N = draw_set("alpaca", 200_000)
    start = time.perf_counter()
    capacity = predict_capacity(lengths_N, trained_N, max_length=2048)
    rows = pack(lengths_N, trained_N, capacity=2048, predict_capacity=capacity, seed=0)
    seconds = time.perf_counter() - start
    assert sum(len(row) for row in rows) == 200_000
    assert seconds < 15, f"{seconds:.1f} s (about one on an idle machine)"


def test_the_plan_follows_from_lengths_and_seed_alone():
    lengths_N, trained_N = draw_set("chat", 500)

    def plan(seed):
        rows = pack(lengths_N, trained_N, capacity=2048, predict_capacity=2048, seed=seed)
        return [row.tolist() for row in rows]

    assert plan(3) == plan(3)
    assert plan(3) != plan(4)
    assert plan(None) == plan(None)


def test_without_a_seed_equals_keep_the_order():
    ones_N = np.ones(6, np.int32)
    rows = pack(ones_N, ones_N, capacity=2, predict_capacity=2, seed=None)
    assert [row.tolist() for row in rows] == [[0, 1], [2, 3], [4, 5]]


def test_neighbours_in_a_row_change_with_the_seed():
    lengths_N = np.arange(50, 250)  # no two are equal

    def neighbours(seed):
        rows = pack(lengths_N, lengths_N, capacity=1024, predict_capacity=1024, seed=seed)
        return {pair for row in rows for pair in itertools.combinations(sorted(row.tolist()), 2)}

    assert len(neighbours(0) & neighbours(1)) < 0.2 * len(neighbours(0))


@pytest.mark.parametrize(
    ("lengths", "trained", "message"),
    [
        ([3, 9], [1, 1], "lengths 3 to 9 do not fit rows of 8 positions"),
        ([3, 0], [1, 0], "lengths 0 to 3 do not fit"),  # it would be lost in silence
        ([3, 8], [1, 6], "6 trained positions do not fit rows with room for 5"),
    ],
)
def test_a_sequence_that_fits_no_row_is_an_error(lengths, trained, message):
    with pytest.raises(AssertionError, match=message):
        pack(np.asarray(lengths), np.asarray(trained), capacity=8, predict_capacity=5, seed=0)


def test_no_sequences_give_no_rows():
    empty = np.zeros(0, np.int32)
    assert pack(empty, empty, capacity=8, predict_capacity=8, seed=0) == []


@settings(deadline=None, max_examples=100)
@given(pairs.filter(bool), st.sampled_from([64, 100, 128, 1000]), st.booleans())
def test_predict_capacity_holds_the_largest_and_is_an_even_number_of_chunks(sequences, max_length, packing):
    lengths_N, trained_N = arrays(sequences)
    capacity = predict_capacity(lengths_N, trained_N, max_length=max_length, packing=packing)
    assert trained_N.max() <= capacity <= max_length
    assert capacity % 64 == 0 or capacity == max_length


def test_without_packing_the_predict_capacity_is_that_of_the_largest_sequence():
    lengths_N, trained_N = np.asarray([90, 100]), np.asarray([90, 70])
    assert predict_capacity(lengths_N, trained_N, max_length=1024, packing=False) == 128
    assert predict_capacity(lengths_N, trained_N, max_length=1024, packing=True) == 960  # 1.1 x 160/190 x 1024


def test_the_example_of_batch():
    first, second = sequence([1, 2, 3], [0, 1]), sequence([7, 8], [1])
    batch = fill_rows([[(first, 0), (second, 4)]], length=6, predict_capacity=4, num_rows=1)
    assert {name: array[0].tolist() for name, array in batch._asdict().items()} == {
        "tokens_BT": [1, 2, 7, 0, 0, 0],
        "targets_BT": [2, 3, 8, 0, 0, 0],
        "weights_BT": [0, 1, 1, 0, 0, 0],
        "segments_BT": [1, 1, 2, 0, 0, 0],
        "positions_BT": [0, 1, 0, 0, 1, 2],
        "sources_BT": [0, 0, 4, 0, 0, 0],
        "predict_BP": [1, 2, 6, 6],
    }
    assert {name: array.dtype.name for name, array in batch._asdict().items()} == {
        name: "float32" if name == "weights_BT" else "int32" for name in batch._fields
    }


def test_empty_rows_predict_nothing():
    batch = fill_rows([[(sequence([5, 6], [0.5]), 2)], []], length=4, predict_capacity=2, num_rows=3)
    assert batch.tokens_BT.shape == (3, 4)
    for row in (1, 2):
        assert batch.predict_BP[row].tolist() == [4, 4]
        assert batch.segments_BT[row].tolist() == [0, 0, 0, 0]
        assert batch.weights_BT[row].tolist() == [0, 0, 0, 0]
        assert batch.positions_BT[row].tolist() == [0, 1, 2, 3]


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_rows_hold_the_sequences_unmixed_and_predict_where_there_is_a_weight(data):
    weights = data.draw(st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=9), max_size=8))
    tokens = [[100 * k + i for i in range(len(w) + 1)] for k, w in enumerate(weights)]
    sequences = [sequence(t, w) for t, w in zip(tokens, weights, strict=True)]
    lengths_N, trained_N = arrays([(len(w), sum(x > 0 for x in w)) for w in weights])
    rows = pack(lengths_N, trained_N, capacity=12, predict_capacity=10, seed=0)
    batch = fill_rows(
        [[(sequences[i], int(i)) for i in row] for row in rows], length=12, predict_capacity=10, num_rows=len(rows)
    )
    seen = []
    for b, row in enumerate(rows):
        for segment, i in enumerate(row.tolist(), 1):
            (here,) = np.nonzero(batch.segments_BT[b] == segment)
            assert here.tolist() == list(range(here[0], here[0] + len(weights[i]))), "a segment is one stretch"
            assert batch.tokens_BT[b, here].tolist() == tokens[i][:-1]
            assert batch.targets_BT[b, here].tolist() == tokens[i][1:]
            assert batch.weights_BT[b, here].tolist() == weights[i]
            assert batch.positions_BT[b, here].tolist() == list(range(len(here)))
            assert set(batch.sources_BT[b, here].tolist()) == {i}
            seen.append(i)
        padding = batch.segments_BT[b] == 0
        assert padding.sum() == 12 - lengths_N[row].sum()
        assert not padding[:-1][np.diff(padding.astype(int)) < 0].any(), "padding stands at the end"
        assert batch.positions_BT[b, padding].tolist() == list(range(padding.sum()))
        predicted = np.flatnonzero(batch.weights_BT[b] > 0).tolist()
        assert batch.predict_BP[b].tolist() == predicted + [12] * (10 - len(predicted))
    assert sorted(seen) == list(range(len(weights)))
