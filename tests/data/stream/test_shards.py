"""What a stream reads: every row once in each pass, of every kind of shard; and that torn ones are not passed over."""

import collections
import csv
import gzip
import json
import pathlib

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from fsspec.registry import known_implementations

from jax_sft.config import DataConfig, StreamConfig
from jax_sft.data.chat import ChatTemplate
from jax_sft.data.conversation import Account, DataError
from jax_sft.data.source import Tables, training_parts
from jax_sft.data.stream.blocks import Maker, Task
from jax_sft.data.stream.reading import LaneReader
from jax_sft.data.stream.shards import UNREADABLE_LINE, UNREADABLE_SHARD, make_plan
from tests.tiny import CHATML, tiny_tokenizer

START = ((0, 0, 0),)


def row_of(i: int) -> dict:
    return {"id": f"r{i}", "prompt": f"question {i} é", "completion": "yes " * (1 + i % 5)}


def lines_of(numbers) -> bytes:
    return b"".join(json.dumps(row_of(i), ensure_ascii=False).encode() + b"\n" for i in numbers)


def write_table(path: pathlib.Path, numbers) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["id", "prompt", "completion"])
        writer.writeheader()
        writer.writerows(map(row_of, numbers))


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    return ChatTemplate(tiny_tokenizer(), template=CHATML)


@pytest.fixture
def kinds(tmp_path) -> tuple[str, ...]:
    """A shard of each kind; together the rows 0 to 299."""
    (tmp_path / "a.jsonl").write_bytes(
        b"\xef\xbb\xbf" + lines_of(range(60)) + b"\n\n" + lines_of(range(60, 100)).rstrip()
    )
    table = pyarrow.Table.from_pylist([row_of(i) for i in range(100, 150)])
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet", row_group_size=10)
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines_of(range(150, 200))))
    (tmp_path / "d.json").write_text(json.dumps([row_of(i) for i in range(200, 225)]))
    (tmp_path / "e.json.gz").write_bytes(gzip.compress(json.dumps([row_of(i) for i in range(225, 250)]).encode()))
    write_table(tmp_path / "f.csv", range(250, 300))
    return tuple(str(p) for p in sorted(tmp_path.iterdir()))


def config_of(*paths, **stream) -> DataConfig:
    return DataConfig(train=paths, stream=StreamConfig(**{"on": True, "unit_bytes": 300, **stream}))


def plan_of(config: DataConfig, lanes: int, seed: int = 0):
    return make_plan(config, training_parts(config), lanes=lanes, seed=seed)


def pass_of(plan, lane: int, number: int) -> list[str]:
    """Ids of a lane's pass, in order."""
    reader = LaneReader(plan, of_set=0, lane=lane, position=(number, 0, 0), tables=Tables())
    ids = []
    while True:
        row, _ = reader.next_row()
        if reader.position[0] > number:
            reader.close()
            return ids
        assert isinstance(row, dict)
        ids.append(row["id"])


def drain(template, config, *, lanes: int = 1, blocks: int = 1, torn: dict[str, str] | None = None):
    """The ids of blocks of lane 0, and their account; `torn` takes the shards that could not be read."""
    maker = Maker(plan_of(config, lanes), template, config, shares=[(1.0,)], predicted=config.max_length)
    ids, position, account = [], START, Account()
    for number in range(blocks):
        block = maker.make(Task(0, 0, number, position))
        ids += [s.id for row in block.rows for s in row]
        position = block.after
        account += block.account
        (torn if torn is not None else {}).update(block.torn)
    maker.close()
    return ids, account


@pytest.mark.parametrize("lanes", [1, 3, 8, 20])
def test_the_lanes_of_a_pass_are_all_rows_exactly_once_and_each_pass_has_an_order_of_its_own(kinds, lanes):
    plan = plan_of(config_of(*kinds), lanes)
    passes = [[i for lane in range(lanes) for i in pass_of(plan, lane, number)] for number in range(2)]
    for ids in passes:
        assert collections.Counter(ids) == {f"r{i}": 1 for i in range(300)}
    assert passes[0] != passes[1]


@pytest.mark.parametrize("kind", range(6))
def test_fewer_units_than_lanes_are_shared_row_by_row(kinds, kind):
    paths = kinds[kind : kind + 1]
    plan = plan_of(config_of(*paths, unit_bytes=10**9), 20)
    read = [pass_of(plan, lane, 0) for lane in range(20)]
    assert len({i for ids in read for i in ids}) == sum(map(len, read)) >= 25
    assert max(map(len, read)) - min(map(len, read)) <= 3


def test_a_lane_repeats_no_row_before_it_has_read_all_of_its_rows(template, kinds):
    config = config_of(*kinds, block=5)
    maker = Maker(plan_of(config, 6), template, config, shares=[(1.0,)], predicted=2048)
    for lane in range(6):
        mine, counts, position = set(pass_of(plan_of(config, 6), lane, 0)), collections.Counter(), START
        for number in range(25):
            block = maker.make(Task(lane, 0, number, position))
            position = block.after
            counts.update(s.id for row in block.rows for s in row)
            assert counts.keys() <= mine
            assert max(counts.values()) - min(counts[i] for i in mine) <= 1
        assert min(counts[i] for i in mine) >= 1


def test_a_reader_that_begins_in_the_middle_of_a_unit_goes_on_like_one_that_read_from_its_start(kinds):
    for lanes in (2, 30):
        plan = plan_of(config_of(*kinds), lanes)
        whole = LaneReader(plan, of_set=0, lane=1, position=(0, 0, 0), tables=Tables())
        for _ in range(200):
            position = whole.position
            other = LaneReader(plan, of_set=0, lane=1, position=position, tables=Tables())
            assert other.next_row() == whole.next_row()
            assert other.position == whole.position
            other.close()
        whole.close()


def test_lanes_get_about_the_same_number_of_bytes(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines_of(range(4000)))
    plan = plan_of(config_of(str(tmp_path), unit_bytes=10**9), 3)
    sizes = [sum(plan.units[0][p.unit].size for p in lane) for lane in plan.pieces[0]]
    assert max(sizes) < 1.3 * min(sizes)


def test_another_shard_or_size_is_another_stream(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of(range(50)))
    first = plan_of(config_of(str(tmp_path)), 2).fingerprint
    assert plan_of(config_of(str(tmp_path)), 2).fingerprint == first
    path.write_bytes(lines_of(range(51)))
    assert plan_of(config_of(str(tmp_path)), 2).fingerprint != first


@pytest.fixture
def shards(tmp_path) -> pathlib.Path:
    """Ten shards of 20 rows."""
    for i in range(10):
        (tmp_path / f"shard-{i}.jsonl").write_bytes(lines_of(range(20 * i, 20 * i + 20)))
    return tmp_path


def damage_line(folder: pathlib.Path) -> str:
    lines = (folder / "shard-7.jsonl").read_bytes().splitlines(keepends=True)
    lines[11] = lines[11].replace(b'"prompt"', b'"prompt')
    (folder / "shard-7.jsonl").write_bytes(b"".join(lines))
    return r"shard-7\.jsonl:12: broken JSON at column"


def damage_bytes(folder: pathlib.Path) -> str:
    lines = (folder / "shard-7.jsonl").read_bytes().splitlines(keepends=True)
    lines[11] = lines[11].replace("é".encode(), b"\xff")
    (folder / "shard-7.jsonl").write_bytes(b"".join(lines))
    return r"shard-7\.jsonl:12: byte \d+ \(0xff\) is not UTF-8"


@pytest.mark.parametrize("damage", [damage_line, damage_bytes])
def test_a_broken_line_stops_with_its_shard_and_number_or_is_skipped_and_counted(template, shards, damage):
    message = damage(shards)
    with pytest.raises(DataError, match=message):
        drain(template, config_of(str(shards), block=200))
    ids, account = drain(template, config_of(str(shards), block=199, unreadable="skip"))
    assert len(set(ids)) == 199 and "r151" not in ids
    assert account.dropped == {UNREADABLE_LINE: 1}
    assert (account.read, account.kept) == (200, 199)
    assert "shard-7.jsonl@" in account.examples[UNREADABLE_LINE][0]


def test_a_torn_gz_stops_with_its_name_or_its_rest_is_skipped_and_counted(template, shards):
    packed = gzip.compress(lines_of(range(200, 1200)))
    (shards / "torn.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(DataError, match=r"torn\.jsonl\.gz: cannot be unpacked to its end"):
        drain(template, config_of(str(shards), block=1500))
    config = config_of(str(shards), block=250, unreadable="skip")
    torn = {}
    ids, _ = drain(template, config, blocks=3, torn=torn)
    assert list(torn) == [str(shards / "torn.jsonl.gz")] and "cannot be unpacked to its end" in next(
        iter(torn.values())
    )
    assert set(ids) > {f"r{i}" for i in range(250)} and "r1199" not in ids  # what comes before the tear is trained on


def write_parquet(path: pathlib.Path) -> None:
    table = pyarrow.Table.from_pylist([row_of(i) for i in range(200, 400)])
    pyarrow.parquet.write_table(table, path, row_group_size=100, compression="gzip")


def test_a_truncated_parquet_stops_with_its_name_or_is_skipped_and_counted(template, shards):
    write_parquet(shards / "torn.parquet")
    (shards / "torn.parquet").write_bytes((shards / "torn.parquet").read_bytes()[:-100])
    with pytest.raises(DataError, match=r"torn\.parquet: cannot be read as Parquet"):
        plan_of(config_of(str(shards)), 2)
    plan = plan_of(config_of(str(shards), unreadable="skip"), 2)
    assert plan.account.dropped == {UNREADABLE_SHARD: 1}
    assert plan.account.examples == {UNREADABLE_SHARD: [str(shards / "torn.parquet")]}
    assert sum(len(pass_of(plan, lane, 0)) for lane in range(2)) == 200


def test_a_parquet_with_a_damaged_page_stops_with_its_name_or_is_skipped_and_counted(template, shards):
    write_parquet(shards / "torn.parquet")
    data = bytearray((shards / "torn.parquet").read_bytes())
    data[200:600] = bytes(400)
    (shards / "torn.parquet").write_bytes(data)
    with pytest.raises(DataError, match=r"torn\.parquet: cannot be read"):
        drain(template, config_of(str(shards), block=400))
    torn = {}
    drain(template, config_of(str(shards), block=290, unreadable="skip"), torn=torn)
    assert list(torn) == [str(shards / "torn.parquet")]


def test_a_shard_that_vanished_stops_with_its_name_or_is_skipped_and_counted(template, shards):
    for unreadable in ("stop", "skip"):
        config = config_of(str(shards), block=190, unreadable=unreadable)
        (shards / "shard-7.jsonl").write_bytes(lines_of(range(140, 160)))
        maker = Maker(plan_of(config, 1), template, config, shares=[(1.0,)], predicted=2048)
        (shards / "shard-7.jsonl").unlink()
        if unreadable == "stop":
            with pytest.raises(DataError, match=r"shard-7\.jsonl: cannot be read \(No such file"):
                maker.make(Task(0, 0, 0, START))
            continue
        block = maker.make(Task(0, 0, 0, START))
        assert list(block.torn) == [str(shards / "shard-7.jsonl")]
        assert len({s.id for row in block.rows for s in row}) == 180


def test_a_shard_that_became_shorter_stops_with_its_name(template, shards):
    config = config_of(str(shards), block=200)
    maker = Maker(plan_of(config, 1), template, config, shares=[(1.0,)], predicted=2048)
    (shards / "shard-7.jsonl").write_bytes(lines_of(range(140, 150)))
    with pytest.raises(DataError, match=r"shard-7\.jsonl: ends at byte \d+, but had \d+ when the run began"):
        maker.make(Task(0, 0, 0, START))


def test_a_lane_without_a_row_stops_the_run(template, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines_of(range(2)))
    config = config_of(str(tmp_path), unit_bytes=10**6)
    plan = plan_of(config, 5)
    (lane, *_) = [lane for lane, pieces in enumerate(plan.pieces[0]) if pieces[0].number == 4]
    said = f"lane {lane} of 5 has no row that can be read in {tmp_path / 'a.jsonl'}; there are fewer"
    with pytest.raises(DataError, match=said):
        Maker(plan, template, config, shares=[(1.0,)], predicted=9).make(Task(lane, 0, 0, START))


def test_a_lane_of_many_torn_shards_names_the_first_three(template, tmp_path):
    for i in range(5):
        (tmp_path / f"{i}.jsonl.gz").write_bytes(b"torn")
    config = config_of(str(tmp_path), unreadable="skip")
    maker = Maker(plan_of(config, 1), template, config, shares=[(1.0,)], predicted=9)
    with pytest.raises(
        DataError, match=r"can be read in .*/0\.jsonl\.gz, .*/1\.jsonl\.gz, .*/2\.jsonl\.gz and 2 more; "
    ):
        maker.make(Task(0, 0, 0, START))


def test_a_stream_with_nothing_to_train_on_stops_the_run_with_the_reasons(template, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "q", "completion": None}) + "\n")
    with pytest.raises(
        DataError, match=r"a whole pass of a lane has nothing.*dropped: null completion \(first: .*a\.js"
    ):
        drain(template, config_of(str(tmp_path)))


def test_far_shards_are_found_and_read_like_near_ones(template, shards):
    far = fsspec.filesystem("memory")
    near = pass_of(plan_of(config_of(str(shards)), 2), 0, 0)
    for path in shards.iterdir():
        far.pipe_file(f"/far/set/{path.name}", path.read_bytes())
    far.pipe_file("/far/set/README.md", b"not data")
    far.pipe_file("/far/packed.jsonl.gz", gzip.compress(lines_of(range(20))))
    table = pyarrow.Table.from_pylist([row_of(i) for i in range(20)])
    with far.open("/far/b.parquet", "wb") as file:
        pyarrow.parquet.write_table(table, file)
    try:
        for path in ("memory://far/set", "memory://far/set/*.jsonl"):
            assert pass_of(plan_of(config_of(path), 2), 0, 0) == near
        for path in ("memory://far/packed.jsonl.gz", "memory://far/b.parquet"):
            assert sorted(drain(template, config_of(path, block=20))[0]) == sorted(f"r{i}" for i in range(20))
        with pytest.raises(DataError, match="memory://far/none.jsonl: cannot be read"):
            plan_of(config_of("memory://far/none.jsonl"), 1)
        with pytest.raises(DataError, match=r"memory://far/\*\.csv: no file is there"):
            plan_of(config_of("memory://far/*.csv"), 1)
        with pytest.raises(
            DataError, match=r"memory:///far/set/README.md: the extension '.md' is not one that is read"
        ):
            plan_of(config_of("memory://far/set/*.md"), 1)
        plan = plan_of(config_of("memory://far/set"), 1)
        far.rm("/far/set/shard-3.jsonl")
        with pytest.raises(DataError, match=r"memory:///far/set/shard-3\.jsonl: cannot be read"):
            pass_of(plan, 0, 0)
    finally:
        far.rm("/far", recursive=True)


def test_a_driver_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(known_implementations, "far", {"class": "package_that_is_not_there.Files", "err": "install it"})
    with pytest.raises(DataError, match=r"far://bucket/a\.jsonl: paths of far:// need the package package_that_is_not"):
        plan_of(config_of("far://bucket/a.jsonl"), 1)
    with pytest.raises(DataError, match="nowhere://a.jsonl: Protocol not known: nowhere; name a file here, or one of"):
        plan_of(config_of("nowhere://a.jsonl"), 1)


def test_a_hub_dataset_is_streamed_by_its_files():
    with pytest.raises(
        DataError, match=r"org/name: a hub dataset is streamed by its files; write hf://datasets/org/name"
    ):
        plan_of(config_of("org/name"), 1)


def test_nothing_of_the_rows_is_read_when_lanes_are_dealt(shards, monkeypatch):
    monkeypatch.setattr("jax_sft.data.stream.shards.Shard.open", lambda *_: pytest.fail("a shard was opened"))
    assert len(plan_of(config_of(str(shards)), 4).pieces[0]) == 4
