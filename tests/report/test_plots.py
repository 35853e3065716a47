import itertools
import re

import pytest

from jax_sft.report.plots import bars, escape, histogram, short, stacked, ticks


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (7, "7"), (999, "999"), (1000, "1k"), (1234, "1.2k"), (9999, "10k"), (35_400, "35k"), (999_499, "999k"),
     (999_900, "1M"), (2_100_000, "2.1M"), (5_000_000_000, "5G")],
)  # fmt: skip
def test_a_long_number_is_told_in_few_characters(number, text):
    assert short(number) == text


@pytest.mark.parametrize(
    ("highest", "marks"),
    [(1, [0, 1]), (4, [0, 1, 2, 3, 4]), (5, [0, 2, 4, 6]), (83, [0, 50, 100]), (150, [0, 50, 100, 150]),
     (200, [0, 50, 100, 150, 200]), (9001, [0, 5000, 10_000])],
)  # fmt: skip
def test_an_axis_has_a_few_round_numbers_and_holds_the_highest_bar(highest, marks):
    assert ticks(highest) == marks


def test_a_bar_is_as_tall_as_its_count_and_the_smallest_is_still_seen():
    drawn = histogram("what: numbers", ["1-5", "6-10", "11-15", "16-99"], [1000, 500, 0, 1])
    tall = [float(h) for h in re.findall(r'class="bar".*?height="([\d.]+)"', drawn)]
    assert tall[0] == pytest.approx(2 * tall[1], abs=0.2)
    assert len(tall) == 3
    assert tall[2] >= 1
    assert "<title>6-10: 500 (33.3%)</title>" in drawn


@pytest.mark.parametrize("bins", [1, 5, 12, 40])
def test_names_below_an_axis_do_not_overlap(bins):
    labels = [f"{1000 * b + 1:,}-{1000 * b + 1000:,}" for b in range(bins)]
    drawn = histogram("what: numbers", labels, [3] * bins)
    names = re.findall(r'class="axis" x="([\d.]+)"[^>]*>([^<]+)<', drawn)
    assert names[-1][1] == f"≤{bins}k"
    spans = [(float(x) - 3.3 * len(name), float(x) + 3.3 * len(name)) for x, name in names]
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
    assert spans[-1][1] <= 380.1


def test_the_parts_of_a_bar_are_in_proportion_and_empty_ones_left_out():
    assert re.findall("flex-grow:(\\d+)", stacked([("a", "kept", 90), ("b", "lost", 10), ("c", "held", 0)])) == [
        "90",
        "10",
    ]
    assert "lost: 10 (10.0%)" in stacked([("a", "kept", 90), ("b", "lost", 10)])
    assert "<span" not in stacked([("a", "kept", 0)])


def test_bars_tell_share_and_count():
    drawn = bars("script: all", ["Latin", "<Han>"], [3, 1])
    assert "75.0%" in drawn and "&lt;Han&gt;" in drawn
    assert re.findall(r"width:([\d.]+)%", drawn) == ["100.00", "33.33"]


def test_text_is_escaped_cut_and_can_always_be_written():
    assert escape("<b>'\"&\x1b\u202e") == "&lt;b&gt;&#x27;&quot;&amp;␛&lt;U+202E&gt;"
    assert escape("abcdef", limit=4) == "abc…"
    assert escape("a\ud800") == "a?"
