import collections
import itertools
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_sft.config import SetConfig
from jax_sft.data.conversation import DataError
from jax_sft.data.mixture import Mixture, Share, everything, mixture

MEMBERS = {"law": np.arange(0, 60), "chat": np.arange(60, 90), "code": np.arange(90, 100)}


def flat(lists):
    return list(itertools.chain(*lists))


def drawn(sets, *, epoch=0, seed=1, **options):
    """How many sequences of each set an epoch has."""
    found = mixture(sets, MEMBERS, seed=seed, **options).epoch(epoch)
    return {name: int(np.isin(found, MEMBERS[name]).sum()) for name in sets}


def of(name, **said):
    return {name: SetConfig(paths=("x",), **said)}


@given(st.integers(1, 12), st.integers(1, 30), st.integers(1, 8))
def test_of_a_set_none_is_drawn_twice_before_all_were_drawn_once(size, per_epoch, epochs):
    found = Mixture([Share("s", np.arange(size), per_epoch)], seed=3)
    stream = np.concatenate([found.epoch(e) for e in range(epochs)])
    assert len(stream) == per_epoch * epochs
    counts = collections.Counter(stream.tolist())
    assert max(counts.values()) - min(counts.get(i, 0) for i in range(size)) <= 1


def test_each_pass_has_an_order_of_its_own_and_each_epoch_follows_from_its_number():
    found, again = (Mixture([Share("s", np.arange(50), 10)], seed=3) for _ in range(2))
    epochs = [found.epoch(e).tolist() for e in range(10)]
    assert sorted(flat(epochs[:5])) == sorted(flat(epochs[5:])) == list(range(50))
    assert epochs[:5] != epochs[5:]
    assert again.epoch(7).tolist() == epochs[7]
    assert Mixture([Share("s", np.arange(50), 10)], seed=4).epoch(0).tolist() != epochs[0]


def test_two_sets_are_drawn_independently():
    found = Mixture([Share("s", np.arange(50), 10), Share("t", np.arange(50, 100), 10)], seed=3).epoch(0)
    assert (found[:10] + 50).tolist() != found[10:].tolist()


def test_everything_is_everything_once_an_epoch():
    for seed in (None, 3):
        assert everything(7, seed=seed).epoch(5).tolist() == list(range(7))


def test_a_set_is_drawn_alike_whatever_other_sets_there_are():
    alone = mixture(of("law", count=7), MEMBERS, seed=1).epoch(3)
    beside = mixture(of("chat", epochs=2.0) | of("law", count=7), MEMBERS, seed=1).epoch(3)
    assert set(alone.tolist()) == set(beside.tolist()) & set(range(60))


def test_counts_epochs_and_nothing_said():
    sets = of("law", count=7) | of("chat", epochs=0.5) | of("code")
    assert drawn(sets) == {"law": 7, "chat": 15, "code": 10}
    assert drawn(of("code", epochs=2.5)) == {"code": 25}


def test_weights_share_out_what_all_sets_hold_together():
    assert drawn(of("law", weight=1.0) | of("chat", weight=3.0) | of("code", weight=1.0)) == {
        "law": 20,
        "chat": 60,
        "code": 20,
    }
    assert sum(drawn(of("law", weight=1.0) | of("chat", weight=1.0) | of("code", weight=1.0)).values()) == 100


def test_temperature_brings_sets_of_different_sizes_together():
    sets = of("law") | of("chat") | of("code")
    assert drawn(sets, temperature=1.0) == {"law": 60, "chat": 30, "code": 10}
    warm = drawn(sets, temperature=5.0)
    assert 40 > warm["law"] > warm["chat"] > warm["code"] > 25
    roots = {name: len(m) ** 0.2 for name, m in MEMBERS.items()}
    assert warm["law"] == round(100 * roots["law"] / sum(roots.values()))


def test_the_weights_of_a_stage_go_before_what_the_sets_say():
    sets = of("law", count=7) | of("chat") | of("code")
    assert drawn(sets, weights={"chat": 1.0, "code": 3.0}) == {"law": 0, "chat": 10, "code": 30}


def test_a_cap_is_a_draw_that_all_passes_share():
    found = mixture(of("law", cap=12), MEMBERS, seed=1)
    assert len(found.epoch(0)) == len(set(found.epoch(0).tolist())) == 12
    assert set(found.epoch(0).tolist()) == set(found.epoch(4).tolist())
    assert found.epoch(0).tolist() != list(range(12))
    assert len(mixture(of("code", cap=12), MEMBERS, seed=1).epoch(0)) == 10


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (of("none"), "data.sets.none: none of its conversations is left to train on"),
        (of("code", epochs=0.01), "data.sets.code: not one of its 10 conversations would be drawn in an epoch"),
        (of("law", weight=1e6) | of("code", weight=1.0), "data.sets.code: not one of its 10 conversations"),
    ],
)
def test_a_set_that_gives_nothing_is_an_error(sets, message):
    with pytest.raises(DataError, match=re.escape(message)):
        mixture(sets, MEMBERS | {"none": np.zeros(0, np.int64)}, seed=1)


def test_what_is_drawn_is_told_where_it_is_not_everything():
    assert mixture(of("law") | of("code"), MEMBERS, seed=1).lines() == []
    assert mixture(of("law") | of("code", epochs=2.0), MEMBERS, seed=1).lines() == [
        "an epoch draws 60 of law (75.0% of the epoch, 1.00 passes over its 60)",
        "an epoch draws 20 of code (25.0% of the epoch, 2.00 passes over its 10)",
    ]
