import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_sft.data.conversation import Account
from jax_sft.report.summary import (
    answer_length_histogram,
    answers_histogram,
    length_histogram,
    scripts_histogram,
    segments_histogram,
    source_lines,
    summarize,
    trained_share_histogram,
)
from tests.report.sets import byte_level, drawn_set, ids_of, make_loader, make_set, sequence_of


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))), min_size=1, max_size=40)
)
def test_every_sequence_is_in_the_bin_that_names_it(counts):
    dataset = drawn_set(counts)
    histogram = length_histogram(dataset)
    assert len(histogram.labels) <= 16
    for label, count in zip(histogram.labels, histogram.counts, strict=True):
        low, *rest = (int(x.replace(",", "")) for x in label.split("-"))
        (high,) = rest or [low]
        assert count == sum(low <= n <= high for n, _ in counts), label
    assert sum(histogram.counts) == len(counts)
    shares = trained_share_histogram(dataset)
    for b, count in enumerate(shares.counts):
        inside = [t for n, t in counts if 10 * b * n < 100 * t <= 10 * (b + 1) * n or (b == 0 and t == 0)]
        assert count == len(inside), shares.labels[b]


def test_one_very_long_sequence_does_not_flatten_the_histogram():
    dataset = drawn_set([(n, 1) for n in range(1, 400)] + [(100_000, 1)])
    histogram = length_histogram(dataset)
    assert histogram.labels[-1] == "401-100,000"
    assert histogram.counts[-1] == 1
    assert len(histogram.counts) > 5


def test_sources_are_shown_with_their_part_of_the_loss():
    dataset = make_set(
        [
            sequence_of([7] * 11, [0.0] * 6 + [1.0] * 5, source="a"),
            sequence_of([7] * 11, [0.0] + [0.5] * 10, source="b"),
            sequence_of([7] * 6, [0.0] + [2.0] * 5, source="a"),
        ]
    )
    first, second = source_lines(dataset)
    assert (first.name, first.sequences, first.tokens, first.trained) == ("a", 2, 15, 10)
    assert first.loss_share == pytest.approx(15 / 20)
    assert (second.name, second.sequences, second.tokens, second.trained) == ("b", 1, 10, 10)
    assert second.loss_share == pytest.approx(5 / 20)


def test_many_sources_are_summed_and_none_is_lost():
    dataset = make_set([sequence_of([7] * 11, [0.0] * 10 + [1.0], source=f"s{i}") for i in range(100)])
    lines = source_lines(dataset)
    assert len(lines) == 31
    assert lines[-1].name == "70 other sources"
    assert sum(line.tokens for line in lines) == 1000
    assert sum(line.loss_share for line in lines) == pytest.approx(1)


def test_trained_stretches_are_counted_and_measured(monkeypatch):
    sequences = [
        sequence_of([7] * 9, [0, 1, 1, 0, 1, 0, 0, 1, 1]),  # ends trained
        sequence_of([7] * 4, [0, 1, 1, 1]),  # begins trained: a stretch of its own
        sequence_of([7] * 6, [0, 0, 0, 0, 0, 1]),
    ]
    dataset = make_set(sequences)
    for at_once in (2**24, 9, 1):
        monkeypatch.setattr("jax_sft.report.summary._AT_ONCE", at_once)
        lengths = answer_length_histogram(dataset)
        assert dict(zip(lengths.labels, lengths.counts, strict=True)) == {"1": 2, "2": 2, "3": 1}
    turns = answers_histogram(dataset)
    assert dict(zip(turns.labels, turns.counts, strict=True)) == {"1": 2, "2": 0, "3": 1}
    assert turns.title == "trained turns of a conversation: 1 to 3, mean 1.7"


def test_a_conversation_in_several_sequences_is_counted_once():
    parts = [("a:1#1", 1), ("a:1#2", 1), ("a:1#3", 1), ("a:2#1", 1), ("b", 1)]
    account = Account(read=3, kept=3)
    dataset = make_set([sequence_of([7] * 3, [0, 0, 1], where=where) for where, _ in parts], account)
    assert answers_histogram(dataset).counts == (5,)  # an id of the data may look like that
    account.use("turns")
    turns = answers_histogram(dataset)
    assert dict(zip(turns.labels, turns.counts, strict=True)) == {"1": 2, "2": 0, "3": 1}


def test_many_turns_share_the_last_bin():
    dataset = make_set([sequence_of([7] * (2 * n + 1), [0.0] + [1.0, 0.0] * n) for n in (1, 10, 11, 40)])
    turns = answers_histogram(dataset)
    assert turns.labels[-1] == "10-40"
    assert turns.counts == (1, 0, 0, 0, 0, 0, 0, 0, 0, 3)


def test_scripts_are_of_the_trained_text_and_a_sample_says_how_many_it_is(monkeypatch):
    tokenizer, sequences = byte_level(), []
    for question, answer in [("Say it", "火车九点开"), ("火车", "The train"), ("a", "a good day"), ("x", "{[()]};<>")]:
        read, trained = ids_of(tokenizer, f"⟨im_start⟩{question}"), ids_of(tokenizer, f"{answer}⟨im_end⟩")
        sequences.append(sequence_of(read + trained, [0.0] * len(read) + [1.0] * len(trained)))
    dataset = make_set(sequences)
    scripts = scripts_histogram(dataset, tokenizer)
    assert dict(zip(scripts.labels, scripts.counts, strict=True)) == {"Latin": 2, "Han": 1, "code": 1}
    assert scripts.title == "script of the trained text: all 4 sequences looked at"
    monkeypatch.setattr("jax_sft.report.summary._SCRIPTS_OF", 3)
    scripts = scripts_histogram(dataset, tokenizer)
    assert sum(scripts.counts) == 3
    assert scripts.title.endswith("3 of the 4 sequences looked at")


def test_packing_counts_rows_by_what_is_in_them():
    dataset = make_set([sequence_of([7] * 11, [0.0] * 6 + [1.0] * 5)] * 5)
    summary = summarize(dataset, make_loader(dataset, max_length=40), byte_level())
    assert dict(zip(summary.segments.labels, summary.segments.counts, strict=True)) == {"1": 1, "2": 0, "3": 0, "4": 1}
    assert [summary.fill.counts[2], summary.fill.counts[9]] == [1, 1]  # 10 and 40 of 40 positions


def test_predicted_positions_are_compared_with_those_there_is_room_for():
    dataset = make_set([sequence_of([7] * 11, [0.0] * 6 + [1.0] * 5)] * 51)
    loader = make_loader(dataset, max_length=256)
    assert loader.predict_capacity == 192
    summary = summarize(dataset, loader, byte_level())
    assert summary.predicted.title == "predicted positions used in a row: 3% to 65%, mean 44%"  # 5 and 125 of 192


def test_a_row_of_many_short_sequences_is_in_the_bin_that_names_it():
    for counts in ([100, 137, 161], [3], [7, 8, 30]):
        found = segments_histogram([np.zeros(n, int) for n in counts])
        assert sum(found.counts) == len(counts)
        for label, count in zip(found.labels, found.counts, strict=True):
            low, _, high = label.partition("-")
            assert count == sum(int(low) <= n <= int(high or low) for n in counts)
