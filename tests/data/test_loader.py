import itertools
import threading
import time

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding

from jax_sft.config import MeshConfig
from jax_sft.data import loader as loader_module
from jax_sft.data.conversation import Account
from jax_sft.data.dataset import TokenizedSet
from jax_sft.data.loader import Loader, Stage
from jax_sft.data.mixture import Mixture, Share
from jax_sft.sharding import local_rows, make_mesh, put_batch

MAX_LENGTH = 32


def make_set(count, *, seed=0, sources=("a", "b", "c")):
    """Sequence i holds the tokens 1000 i, 1000 i + 1, ...: every position says where it comes from."""
    rng = np.random.default_rng(seed)
    lengths_N = rng.integers(1, MAX_LENGTH + 1, count).astype(np.int32)
    weights = [(rng.random(n) < 0.6).astype(np.float32) * rng.choice([0.5, 1.0]) for n in lengths_N]
    for w in weights:
        w[-1] = 1.0
    offsets_N1 = np.concatenate([[0], np.cumsum(lengths_N)]).astype(np.int64)
    tokens_M = np.concatenate([1000 * i + np.arange(n) for i, n in enumerate(lengths_N)] or [[]]).astype(np.int32)
    return TokenizedSet(
        tokens_M=tokens_M,
        targets_M=tokens_M + 1,
        weights_M=np.concatenate(weights or [np.zeros(0, np.float32)]),
        offsets_N1=offsets_N1,
        lengths_N=lengths_N,
        trained_N=np.asarray([(w > 0).sum() for w in weights], np.int32),
        sources=sources,
        source_ids_N=(np.arange(count) % len(sources)).astype(np.int32),
        ids=[f"x.jsonl:{i}" for i in range(count)],  # type: ignore[arg-type]
        account=Account(),
        fingerprint="",
    )


def make_loader(dataset, **options):
    settings = {
        "batch_size": 8,
        "max_length": MAX_LENGTH,
        "packing": True,
        "sources": dataset.sources,
        "seed": 7,
    }
    bound = {"epochs": options.pop("epochs", 1), "steps": options.pop("steps", None)}
    return Loader(dataset, **{"stages": [Stage(**bound)], **settings, **options})


def assert_equal(one, other):
    for name, x, y in zip(one._fields, one, other, strict=True):
        assert x.dtype == y.dtype, name
        np.testing.assert_array_equal(x, y, err_msg=name)


def sequences_in(batch):
    """Indices of the sequences in a batch, in order; each must be whole and in one piece."""
    found = []
    for tokens_T, segments_T in zip(batch.tokens_BT, batch.segments_BT, strict=True):
        for segment in range(1, segments_T.max() + 1):
            tokens = tokens_T[segments_T == segment]
            assert tokens.tolist() == list(range(tokens[0], tokens[0] + len(tokens)))
            assert tokens[0] % 1000 == 0
            found.append(int(tokens[0]) // 1000)
    return found


def stream(loader):
    return [i for step in range(loader.total_steps) for i in sequences_in(loader.batch(step))]


def plans(loader, epochs):
    return [[tuple(row.tolist()) for row in loader._streams[0]._plan(epoch)] for epoch in range(epochs)]


@pytest.mark.parametrize("packing", [True, False])
def test_an_epoch_holds_every_sequence_once(packing):
    dataset = make_set(101)
    loader = make_loader(dataset, packing=packing)
    assert sorted(stream(loader)) == list(range(101))
    batches = [loader.batch(step) for step in range(loader.total_steps)]
    assert sum(b.weights_BT.sum() for b in batches) == pytest.approx(dataset.weights_M.sum())
    assert sum((b.segments_BT > 0).sum() for b in batches) == dataset.lengths_N.sum()


def test_the_rows_of_an_epoch_are_those_that_its_batches_hold():
    dataset = make_set(50)
    loader = make_loader(dataset)
    rows = loader.epoch_rows()
    assert sorted(np.concatenate(rows).tolist()) == list(range(50))
    held = [i for step in range(loader.total_steps) for i in loader.ids(step)]
    assert held[:50] == [dataset.ids[i] for row in rows for i in row]


def test_each_epoch_is_another_order_of_the_same_sequences():
    dataset = make_set(60)
    loader = make_loader(dataset, epochs=3)
    seen = stream(loader)
    epochs = [seen[60 * e : 60 * (e + 1)] for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(60))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_without_a_seed_every_epoch_has_the_order_of_the_set():
    loader = make_loader(make_set(30), seed=None, packing=False, epochs=2)
    assert stream(loader) == [*range(30), *range(30)]


def test_another_seed_is_another_order():
    dataset = make_set(60)
    assert stream(make_loader(dataset, seed=1)) == stream(make_loader(dataset, seed=1))
    assert stream(make_loader(dataset, seed=1)) != stream(make_loader(dataset, seed=2))


def test_the_last_batch_is_filled_up_with_empty_rows():
    dataset = make_set(19)
    loader = make_loader(dataset, packing=False)
    assert loader.total_steps == 3
    last = loader.batch(2)
    assert (last.segments_BT.max(1) > 0).tolist() == [True] * 3 + [False] * 5
    assert (last.predict_BP[3:] == MAX_LENGTH).all()
    assert last.weights_BT[3:].sum() == 0


def test_epochs_follow_each_other_without_a_gap():
    # 19 rows an epoch, 8 in a batch: the third batch holds the end of one epoch and the start of the next.
    loader = make_loader(make_set(19), packing=False, epochs=2)
    assert loader.total_steps == 5  # 38 rows
    assert (loader.batch(2).segments_BT.max(1) > 0).all()
    assert sorted(stream(loader)) == sorted([*range(19), *range(19)])


@pytest.mark.parametrize(("epochs", "rows"), [(0.25, 5), (1.5, 30), (2.0, 40), (1e-6, 1), (2.9999999, 60)])
def test_a_fraction_of_an_epoch(epochs, rows):
    loader = make_loader(make_set(20), packing=False, epochs=epochs)
    assert len(stream(loader)) == rows
    assert loader.total_steps == -(-rows // 8)
    assert loader.epoch_of(loader.total_steps) == pytest.approx(rows / 20)


def test_steps_bound_a_run_over_epochs():
    dataset = make_set(20)
    loader = make_loader(dataset, packing=False, epochs=None, steps=6)  # 48 rows, 2.4 epochs
    assert loader.total_steps == 6
    seen = stream(loader)
    assert len(seen) == 48
    assert seen == stream(make_loader(dataset, packing=False, epochs=3))[:48]
    with pytest.raises(IndexError, match="step 6 is outside the run of 6 steps"):
        loader.batch(6)
    with pytest.raises(IndexError, match="step -1"):
        loader.batch(-1)


def test_a_batch_larger_than_the_set_spans_epochs():
    loader = make_loader(make_set(3), packing=False, epochs=None, steps=2)
    seen = stream(loader)
    assert [sorted(seen[i : i + 3]) for i in range(0, 15, 3)] == [[0, 1, 2]] * 5


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_random_access_equals_sequential(data):
    dataset = make_set(data.draw(st.integers(1, 40)), seed=3)
    options = {"batch_size": data.draw(st.integers(1, 9)), "packing": data.draw(st.booleans()), "epochs": 4.3}
    sequential = make_loader(dataset, **options)
    batches = [sequential.batch(step) for step in range(sequential.total_steps)]
    fresh = make_loader(dataset, **options)
    for step in data.draw(st.lists(st.integers(0, sequential.total_steps - 1), max_size=12)):
        assert_equal(fresh.batch(step), batches[step])


@pytest.mark.parametrize("bound", [{"epochs": 5}, {"epochs": None, "steps": 14}])
def test_a_resumed_run_sees_the_batches_of_an_uninterrupted_one(bound):
    dataset = make_set(40)
    whole = list(make_loader(dataset, **bound).prefetch(0, 14))
    for start in (1, 5, 13):
        resumed = make_loader(dataset, **bound)
        assert resumed.epoch_of(start) == make_loader(dataset, **bound).epoch_of(start)
        for (step, batch), (expected_step, expected) in zip(resumed.prefetch(start, 14), whole[start:], strict=True):
            assert step == expected_step
            assert_equal(batch, expected)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_rows_of_hosts_are_disjoint_and_make_up_the_batch(accumulation, monkeypatch):
    loader = make_loader(make_set(150), batch_size=16, epochs=None, steps=3)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    everywhere = NamedSharding.addressable_devices_indices_map
    whole = loader.batch(1)
    seen = []
    for host in (0, 1):  # as if each had four of the eight devices
        devices = set(mesh.devices[host].flat)
        monkeypatch.setattr(
            NamedSharding,
            "addressable_devices_indices_map",
            lambda self, shape, devices=devices: {d: i for d, i in everywhere(self, shape).items() if d in devices},
        )
        rows = local_rows(mesh, batch_size=16, accumulation=accumulation)
        assert len(rows) == 8
        seen += rows.tolist()
        part = loader.batch(1, rows)
        for x, y in zip(part, whole, strict=True):
            np.testing.assert_array_equal(x, y[rows])
    assert sorted(seen) == list(range(16))


def test_rows_past_the_end_of_the_run_are_empty_on_their_host():
    loader = make_loader(make_set(11), packing=False)  # the last batch has three rows
    whole, part = loader.batch(1), loader.batch(1, np.asarray([2, 3, 6]))
    for x, y in zip(part, whole, strict=True):
        np.testing.assert_array_equal(x, y[[2, 3, 6]])
    assert (part.segments_BT.max(1) > 0).tolist() == [True, False, False]


def test_the_batch_on_the_devices_is_the_batch():
    assert jax.device_count() == 8
    loader = make_loader(make_set(150), batch_size=16)
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    rows = local_rows(mesh, batch_size=16, accumulation=2)
    placed = put_batch(loader.batch(0, rows), mesh, rows=rows, batch_size=16, accumulation=2)
    for x, y in zip(placed, loader.batch(0), strict=True):
        assert x.shape == (2, 8, *y.shape[1:])
        np.testing.assert_array_equal(np.asarray(x).reshape(y.shape), y)


def test_a_batch_that_cannot_be_spread_is_an_error():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    with pytest.raises(
        ValueError,
        match=r"batch_size = 24 / train.accumulation = 2 gives micro-batches of 12 rows.*make the batch size a "
        r"multiple of 16",
    ):
        local_rows(mesh, batch_size=24, accumulation=2)


def test_sources_are_numbered_as_the_run_numbers_them():
    dataset = make_set(9, sources=("b", "d"))
    loader = make_loader(dataset, packing=False, seed=None, sources=("a", "b", "c", "d"))
    assert [int(row[0]) for row in loader.batch(0).sources_BT] == [1, 3] * 4
    with pytest.raises(ValueError, match="not in tuple"):
        make_loader(dataset, sources=("a",))


def test_predicted_positions_are_those_with_a_weight():
    loader = make_loader(make_set(50))
    for step in range(loader.total_steps):
        batch = loader.batch(step)
        assert batch.predict_BP.shape == (8, loader.predict_capacity)
        for weights_T, predict_P in zip(batch.weights_BT, batch.predict_BP, strict=True):
            positions = np.flatnonzero(weights_T > 0).tolist()
            assert predict_P.tolist() == positions + [MAX_LENGTH] * (loader.predict_capacity - len(positions))


def test_ids_lengths_and_fill_tell_of_the_batches():
    dataset = make_set(50)
    loader = make_loader(dataset, epochs=2)
    for step in range(loader.total_steps):
        batch = loader.batch(step)
        assert loader.ids(step) == [f"x.jsonl:{i}" for i in sequences_in(batch)]
        assert loader.lengths(step).sum() == (batch.segments_BT > 0).sum()
    rows = len(plans(loader, 1)[0])
    assert loader.rows_per_epoch() == rows
    assert loader.fill() == pytest.approx(dataset.lengths_N.sum() / (rows * MAX_LENGTH))
    assert 0.8 < loader.fill() <= 1


@pytest.mark.parametrize("bound", [{"epochs": 2}, {"epochs": None, "steps": 5}])
def test_epoch_of_grows_by_the_rows_of_a_step(bound):
    loader = make_loader(make_set(20), packing=False, **bound)
    assert [loader.epoch_of(step) for step in range(6)] == pytest.approx([0, 0.4, 0.8, 1.2, 1.6, 2.0])
    assert make_loader(make_set(20), packing=False, **bound).epoch_of(5) == pytest.approx(2.0)


def test_the_end_of_a_run_plans_no_epoch_past_it(monkeypatch):
    loader = make_loader(make_set(80), epochs=2)
    calls = count_plans(monkeypatch)
    assert loader.epoch_of(loader.total_steps) == 2.0
    assert not calls


def test_an_empty_set_is_an_error():
    with pytest.raises(ValueError, match="the tokenised set is empty"):
        make_loader(make_set(0), epochs=None, steps=3)


def count_plans(monkeypatch):
    calls = []
    pack = loader_module.pack
    monkeypatch.setattr(loader_module, "pack", lambda *a, **k: (calls.append(1), pack(*a, **k))[1])
    return calls


def test_asking_on_both_sides_of_the_end_of_an_epoch_plans_nothing_again(monkeypatch):
    # The thread ahead is in the next epoch while the loop still asks for lengths in the last one.
    monkeypatch.setattr(loader_module, "_ROWS_KEPT", 0)  # two plans are kept all the same
    loader = make_loader(make_set(80), epochs=3)
    boundary = loader.rows_per_epoch() // 8
    for step in (0, boundary + 1):
        loader.batch(step)
    calls = count_plans(monkeypatch)
    for _ in range(3):
        loader.lengths(boundary - 1)
        loader.batch(boundary + 1)
    assert not calls


@pytest.mark.parametrize(("rows_kept", "most_plans"), [(0, 12), (1_000_000, 6)])
def test_a_run_plans_each_epoch_once_or_where_plans_are_large_twice(monkeypatch, rows_kept, most_plans):
    monkeypatch.setattr(loader_module, "_ROWS_KEPT", rows_kept)
    calls = count_plans(monkeypatch)
    loader = make_loader(make_set(80), epochs=6)
    for step, _ in loader.prefetch(0, loader.total_steps):
        loader.lengths(step)
        loader.epoch_of(step)
    assert len(calls) <= most_plans


def test_of_large_plans_two_are_kept(monkeypatch):
    monkeypatch.setattr(loader_module, "_ROWS_KEPT", 0)
    loader = make_loader(make_set(80), epochs=6)
    assert list(loader._streams[0]._plans) == [4, 5]


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_prefetch_gives_the_same_batches_in_order(ahead):
    loader = make_loader(make_set(200), batch_size=4)
    rows = np.asarray([0, 3])
    steps = []
    for step, batch in make_loader(make_set(200), batch_size=4).prefetch(2, 9, rows=rows, ahead=ahead):
        steps.append(step)
        assert_equal(batch, loader.batch(step, rows))
    assert steps == list(range(2, 9))
    assert batch_threads() == []


def test_prefetch_builds_ahead_and_no_further(monkeypatch):
    loader = make_loader(make_set(200), batch_size=2)
    built = []
    batch = loader.batch
    monkeypatch.setattr(loader, "batch", lambda step, rows=None: (built.append(step), batch(step, rows))[1])
    batches = loader.prefetch(0, 20, ahead=2)
    next(batches)
    wait_until(lambda: len(built) >= 4)  # one taken, two waiting, one in the hand of the thread
    time.sleep(0.3)
    assert built == [0, 1, 2, 3]
    batches.close()  # type: ignore[attr-defined]


def test_an_error_in_the_thread_reaches_the_consumer(monkeypatch):
    loader = make_loader(make_set(200), batch_size=4)
    batch = loader.batch

    def failing(step, rows=None):
        if step == 3:
            raise OSError("the disk is gone")
        return batch(step, rows)

    monkeypatch.setattr(loader, "batch", failing)
    batches = loader.prefetch(0, 9)
    assert [next(batches)[0] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)
    assert batch_threads() == []


def test_a_step_past_the_end_is_an_error_and_never_a_quiet_end():
    loader = make_loader(make_set(16), packing=False)
    batches = loader.prefetch(0, 3)
    assert [next(batches)[0] for _ in range(2)] == [0, 1]
    with pytest.raises(IndexError, match="step 2 is outside the run of 2 steps"):
        next(batches)


def test_leaving_early_ends_the_thread():
    batches = make_loader(make_set(200), batch_size=2).prefetch(0, 20)
    next(batches)
    assert len(batch_threads()) == 1
    batches.close()  # type: ignore[attr-defined]
    assert batch_threads() == []


def test_an_error_in_the_loop_body_ends_the_thread():
    def run():
        for _ in make_loader(make_set(200), batch_size=2).prefetch(0, 20):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    wait_until(lambda: not batch_threads())


def batch_threads():
    return [t for t in threading.enumerate() if t.name == "batches" and t.is_alive()]


def wait_until(is_true, seconds=10.0):
    end = time.perf_counter() + seconds
    while not is_true():
        assert time.perf_counter() < end, "nothing happened"
        time.sleep(0.01)


def flat(lists):
    return list(itertools.chain(*lists))


def in_stages(dataset, *stages, **options):
    return make_loader(dataset, stages=stages, **options)


def test_stages_follow_each_other_each_with_its_own_batches():
    dataset = make_set(60)
    few = Mixture([Share("a", np.arange(0, 60, 3), 20)], seed=7)
    loader = in_stages(dataset, Stage(epochs=2, mixture=few), Stage(steps=3), Stage(epochs=1), packing=False)
    assert loader.stage_ends == (5, 8, 16)  # 40 rows, 24 rows, 60 rows, of 8
    assert [loader.stage_of(step) for step in range(17)] == [0] * 5 + [1] * 3 + [2] * 9
    assert loader.total_steps == 16
    seen = [sequences_in(loader.batch(step)) for step in range(16)]
    assert sorted(flat(seen[:5])) == sorted([*range(0, 60, 3)] * 2)
    assert len(set(flat(seen[5:8]))) == 24
    assert sorted(flat(seen[8:])) == list(range(60))
    assert flat(seen[5:8]) != flat(seen[8:])[:24]  # another stage, another draw
    assert [loader.epoch_of(step) for step in (0, 3, 5, 8, 16)] == pytest.approx([0, 1.2, 0, 0, 1])


def test_the_log_counts_stages_from_one():
    few = Mixture([Share("a", np.arange(0, 60, 3), 20)], seed=7)
    lines = in_stages(make_set(60), Stage(epochs=2, mixture=few), Stage(steps=3), packing=False).mixture_lines()
    assert lines == ["stage 1: 5 steps", "stage 2: 3 steps"]


def test_the_first_stage_draws_as_a_run_of_one_stage():
    dataset = make_set(60)
    staged, alone = in_stages(dataset, Stage(steps=4), Stage(steps=4)), make_loader(dataset, steps=4, epochs=None)
    for step in range(4):
        assert_equal(staged.batch(step), alone.batch(step))


@pytest.mark.parametrize(("order", "name"), [("length", "lengths_N"), ("answers", "answers_N")])
def test_an_ordered_stage_begins_with_the_easy_ones(order, name):
    dataset = make_set(8000, seed=2)
    loader = in_stages(dataset, Stage(epochs=2, order=order))
    steps = loader.total_steps // 2
    difficulty = getattr(dataset, name)
    means = [difficulty[sequences_in(loader.batch(step))].mean() for step in range(2 * steps)]
    thirds = [np.mean(means[i * steps // 3 : (i + 1) * steps // 3]) for i in range(6)]
    assert thirds[0] < thirds[1] < thirds[2] and thirds[3] < thirds[4] < thirds[5] and thirds[3] < thirds[2]
    seen = [i for step in range(steps - 1) for i in sequences_in(loader.batch(step))]
    assert len(seen) == len(set(seen))
    random = in_stages(dataset, Stage(epochs=1))
    # Half of these are longer than half a row: of them two never share one.
    assert loader.rows_per_epoch() < 1.3 * random.rows_per_epoch()


@settings(deadline=None, max_examples=20)
@given(st.data())
def test_random_access_across_stages_equals_sequential(data):
    dataset = make_set(data.draw(st.integers(3, 40)), seed=3)
    share = Mixture([Share("s", np.arange(3), 2), Share("t", np.arange(len(dataset)), 5)], seed=1)
    stages = [Stage(epochs=1.5, mixture=share), Stage(steps=4, order="length"), Stage(epochs=2)]
    sequential = in_stages(dataset, *stages)
    batches = [sequential.batch(step) for step in range(sequential.total_steps)]
    fresh = in_stages(dataset, *stages)
    for step in data.draw(st.lists(st.integers(0, sequential.total_steps - 1), max_size=12)):
        assert_equal(fresh.batch(step), batches[step])


def test_a_stage_in_the_order_of_scores_begins_with_low_ones():
    dataset = make_set(4000, seed=2)
    scores_N = np.random.default_rng(5).random(len(dataset))
    loader = in_stages(dataset, Stage(epochs=1, order="score", scores_N=scores_N))
    means = [scores_N[sequences_in(loader.batch(step))].mean() for step in range(loader.total_steps)]
    fifths = [np.mean(part) for part in np.array_split(means, 5)]
    np.testing.assert_allclose(fifths, [0.1, 0.3, 0.5, 0.7, 0.9], atol=0.03)
