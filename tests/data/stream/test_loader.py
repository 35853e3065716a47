"""A stream's batches: each row once in a pass, and the same rows whenever and on however many hosts a run goes on."""

import dataclasses
import gzip
import json
import logging
import pathlib
import re

import numpy as np
import pytest

from jax_sft.config import DataConfig, QualityConfig, SetConfig, StreamConfig
from jax_sft.data.chat import ChatTemplate
from jax_sft.data.source import training_parts
from jax_sft.data.stream.blocks import Maker, Task
from jax_sft.data.stream.loader import StreamLoader
from jax_sft.data.stream.shards import UNREADABLE_SHARD, make_plan
from tests.tiny import CHATML, tiny_tokenizer

LANES = 4
STEPS = (40, 60)
SHARES = ((0.75, 0.25), (0.2, 0.8))


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    return ChatTemplate(tiny_tokenizer(), template=CHATML)


def write(path: pathlib.Path, numbers: range, *, answer: str = "na") -> None:
    """Conversations with their number as the id, and answers of different lengths."""
    with path.open("w", encoding="utf-8") as file:
        for i in numbers:
            text = f"{answer} " * (1 + i * 7 % 5) + "."
            messages = [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": text}]
            file.write(json.dumps({"id": f"{path.stem[0]}{i}", "messages": messages}) + "\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Set a: 240 rows in 3 shards that are cut; set b: 70 rows in 2 shards of which lanes share one."""
    place = tmp_path_factory.mktemp("shards")
    for name in ("a", "b"):
        (place / name).mkdir()
    for i in range(3):
        write(place / "a" / f"a-{i}.jsonl", range(80 * i, 80 * i + 80))
    write(place / "b" / "b-0.jsonl", range(30))
    write(place / "b" / "b-1.jsonl", range(30, 70))
    return place


def config_of(folder: pathlib.Path, **changes) -> DataConfig:
    sets = {"a": SetConfig(paths=(str(folder / "a"),), weight=3), "b": SetConfig(paths=(str(folder / "b"),), weight=1)}
    stream = StreamConfig(**{"on": True, "block": 4, "unit_bytes": 700, **changes})
    return DataConfig(sets=sets, max_length=128, stream=stream)


def loader_of(template, config, *, lanes=LANES, steps=STEPS, shares=SHARES, plan=None) -> StreamLoader:
    plan = plan or make_plan(config, training_parts(config), lanes=lanes, seed=3)
    return StreamLoader(
        plan, template, config, batch_size=lanes, sources=plan.sources, steps=steps, shares=shares[: len(steps)]
    )


def rows_of(loader: StreamLoader, start: int, stop: int, lanes: np.ndarray) -> list[tuple]:
    """Of each step the tokens of each lane, and the ids in them."""
    out = []
    for step, batch in loader.prefetch(start, stop, rows=lanes):
        out.append((batch.tokens_BT.copy(), batch.segments_BT.copy(), batch.sources_BT.copy(), loader.ids(step)))
    return out


def states_at(loader: StreamLoader, done: int, lanes: np.ndarray) -> list[list[int]]:
    return loader.states_after(done, lanes).tolist()


@pytest.fixture(scope="module")
def whole(template, folder):
    """All steps in one go, and the states after each of them."""
    loader = loader_of(template, config_of(folder))
    lanes = np.arange(LANES)
    rows, states = [], [states_at(loader, 0, lanes)]
    for step, batch in loader.prefetch(0, sum(STEPS)):
        rows.append((batch.tokens_BT.copy(), batch.segments_BT.copy(), batch.sources_BT.copy(), loader.ids(step)))
        states.append(states_at(loader, step + 1, lanes))
    return loader.plan, rows, states


def assert_same(found, expected, lanes) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        for got, wanted in zip(mine[:3], theirs[:3], strict=True):
            np.testing.assert_array_equal(got, wanted[lanes])


def test_a_run_killed_at_any_of_1000_points_goes_on_with_the_same_rows_on_any_number_of_hosts(template, folder, whole):
    plan, rows, states = whole
    rng = np.random.default_rng(0)
    for _ in range(1000):
        step, hosts = int(rng.integers(0, sum(STEPS))), int(rng.choice([1, 2, 4]))
        lanes = np.split(np.arange(LANES), hosts)[rng.integers(hosts)]
        loader = loader_of(template, config_of(folder), plan=plan)
        loader.go_on_from(json.loads(json.dumps(states[step])))
        stop = min(step + 2, sum(STEPS))
        assert_same(rows_of(loader, step, stop, lanes), rows[step:stop], lanes)
        np.testing.assert_array_equal(loader.states_after(stop, lanes), np.asarray(states[stop])[lanes])


def test_a_run_of_one_host_goes_on_with_four_and_then_with_two(template, folder, whole):
    plan, rows, _ = whole
    states, at = None, 0
    for hosts, stop in ((1, 23), (4, 55), (2, 100)):
        gathered = np.zeros((LANES, 2 + 3 * 2), np.int64)
        for lanes in np.split(np.arange(LANES), hosts):
            loader = loader_of(template, config_of(folder), plan=plan)
            if states is not None:
                loader.go_on_from(states)
            assert_same(rows_of(loader, at, stop, lanes), rows[at:stop], lanes)
            gathered[lanes] = loader.states_after(stop, lanes)
        states, at = gathered.tolist(), stop


def test_processes_make_the_same_rows_as_this_one(template, folder, whole):
    plan, rows, _ = whole
    config = dataclasses.replace(config_of(folder), workers=2)
    found = rows_of(loader_of(template, config, plan=plan), 0, 50, np.arange(LANES))
    assert_same(found, rows[:50], np.arange(LANES))


def test_hosts_have_no_row_in_common(template, folder, whole):
    plan, rows, _ = whole
    of_hosts = []
    for lanes in np.split(np.arange(LANES), 4):
        loader = loader_of(template, config_of(folder), plan=plan)
        of_hosts.append({i for _, _, _, ids in rows_of(loader, 0, 100, lanes) for i in ids})
    assert sum(map(len, of_hosts)) == len(set().union(*of_hosts)) == len({i for row in rows for i in row[3]}) == 310


def test_a_stage_draws_its_own_proportions_and_says_what_it_leaves(template, folder, whole, caplog):
    _, rows, _ = whole
    with caplog.at_level(logging.INFO, "jax_sft"):
        rows_of(loader_of(template, config_of(folder)), 0, 41, np.arange(LANES))
    assert re.search(r"step 40: \d+ packed rows of the blocks of the last stage are left out", caplog.text)
    for stage, wanted in ((rows[:40], 0.25), (rows[40:], 0.8)):
        ids = [i for row in stage for i in row[3]]
        assert sum(i.startswith("b") for i in ids) / len(ids) == pytest.approx(wanted, abs=0.03)


def test_only_the_last_row_of_a_block_is_not_full(template, folder):
    config = config_of(folder, block=60)
    maker = Maker(make_plan(config, training_parts(config), lanes=1, seed=0), template, config,
                  shares=[(0.75, 0.25)], predicted=128)  # fmt: skip
    block = maker.make(Task(0, 0, 0, ((0, 0, 0), (0, 0, 0))))
    filled = sorted(sum(len(s.tokens_T) for s in row) for row in block.rows)
    assert len(filled) > 10 and filled[2] > 100, filled


def test_without_packing_each_row_is_one_conversation(template, folder):
    config = dataclasses.replace(config_of(folder), packing=False)
    for *_, ids in rows_of(loader_of(template, config), 0, 30, np.arange(LANES)):
        assert len(ids) == LANES


def test_an_answer_longer_than_the_predicted_positions_is_dropped_and_counted(template, folder):
    loader = loader_of(template, config_of(folder, predicted=15), steps=(40,))
    for _, batch in loader.prefetch(0, 40):
        assert batch.predict_BP.shape == (LANES, 15)
        assert (np.count_nonzero(batch.weights_BT, axis=1) <= 15).all()
    account = loader.account
    assert account.dropped.keys() == {"trained on more than data.stream.predicted = 15 positions"}
    assert account.read == account.kept + sum(account.dropped.values())


def test_states_of_another_stream_are_refused(template, folder):
    with pytest.raises(ValueError, match=r"knows \(1, 5\) integers of the stream, not \(4, 8\)"):
        loader_of(template, config_of(folder)).go_on_from([[0] * 5])


def test_batches_out_of_order_are_refused(template, folder):
    with pytest.raises(ValueError, match="come in order; ask prefetch"):
        loader_of(template, config_of(folder)).batch(0, np.arange(2))


def test_rules_of_one_conversation_are_tried_while_a_stream_is_read(tmp_path, template):
    write(tmp_path / "a.jsonl", range(20))
    write(tmp_path / "b.jsonl", range(20, 30), answer="mail wren@nest.net")
    quality = QualityConfig(personal_data="drop", same_content="note")
    config = DataConfig(train=(str(tmp_path),), max_length=128, quality=quality, stream=StreamConfig(on=True, block=40))
    plan = make_plan(config, training_parts(config), lanes=1, seed=0)
    loader = loader_of(template, config, lanes=1, steps=(1,), shares=((1.0,),), plan=plan)
    ids = {s.id for block in loader.first_blocks() for row in block.rows for s in row}
    assert len(ids) == 20 and all(name.startswith("a") for name in ids)
    ((reason, count),) = loader.account.dropped.items()
    assert reason.startswith("personal") and count >= 10  # of each pass


@pytest.mark.parametrize("workers", [0, 2])
def test_a_torn_shard_counts_once_though_lanes_share_it_and_passes_come_back_to_it(tmp_path, template, workers):
    write(tmp_path / "whole.jsonl", range(200))
    packed = gzip.compress((tmp_path / "whole.jsonl").read_bytes())
    (tmp_path / "torn.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    (tmp_path / "whole.jsonl").unlink()
    config = DataConfig(
        train=(str(tmp_path),),
        max_length=128,
        workers=workers,
        stream=StreamConfig(on=True, block=8, unreadable="skip"),
    )
    loader = loader_of(template, config, steps=(40,), shares=((1.0,),))
    rows_of(loader, 0, 40, np.arange(LANES))
    assert loader.epoch_of(40) > 2
    assert loader.account.dropped == {UNREADABLE_SHARD: 1}
    assert loader.account.examples[UNREADABLE_SHARD] == [str(tmp_path / "torn.jsonl.gz")]
    assert loader.account.read == loader.account.kept + 1


def test_the_log_counts_stages_from_one(template, folder):
    lines = loader_of(template, config_of(folder)).mixture_lines()
    assert lines[-2:] == [
        "stage 1: 40 steps: a block draws 75.0% of a, 25.0% of b",
        "stage 2: 60 steps: a block draws 20.0% of a, 80.0% of b",
    ]
