"""The tokenised set: what is in it, when the cache is used, and that nothing spoils it unseen."""

import itertools
import json
import logging
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jax_sft.config import DataConfig, SetConfig
from jax_sft.data import dataset as module
from jax_sft.data import store
from jax_sft.data.chat import ChatTemplate
from jax_sft.data.conversation import DataError
from jax_sft.data.dataset import TokenizedSet, dump, tokenize
from jax_sft.data.quality.duplicates import SAME_CONTENT
from jax_sft.data.quality.screen import BOTH_STAY
from jax_sft.data.source import parts_of
from jax_sft.data.workers import ALONE_SECONDS, _unasked, workers

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    return ChatTemplate(byte_tokenizer(), template=CHATML)


def write(path: pathlib.Path, count: int = 5, *, answer: str = "yes {}") -> str:
    rows: list[dict] = [
        {"messages": [{"role": "user", "content": "q" * (i % 7)}, {"role": "assistant", "content": answer.format(i)}]}
        for i in range(count)
    ]
    rows[1]["source"] = "other"
    rows[2]["id"] = "二"
    path.write_text("\n".join(json.dumps(r) for r in rows), encoding="utf-8")
    return str(path)


def contents(dataset: TokenizedSet) -> list[tuple]:
    return [
        (s.tokens_T.tolist(), s.targets_T.tolist(), s.weights_T.tolist(), s.source, s.id)
        for s in (dataset[i] for i in range(len(dataset)))
    ]


def read(path: str, template: ChatTemplate, cache: pathlib.Path | None = None, **options) -> TokenizedSet:
    return tokenize(DataConfig(**options), parts_of((path,)), template, cache_dir=cache, progress=False)


def home_of(cache: pathlib.Path) -> pathlib.Path:
    (home,) = cache.iterdir()
    return home


def test_the_set_holds_every_sequence_with_its_weights_source_and_id(tmp_path, template):
    path = write(tmp_path / "set.jsonl")
    dataset = read(path, template)
    assert len(dataset) == dataset.account.read == dataset.account.kept == 5
    assert dataset.sources == ("set", "other")
    assert dataset.source_ids_N.tolist() == [0, 1, 0, 0, 0]
    assert [dataset.ids[i] for i in range(len(dataset.ids))] == [
        f"{path}:1",
        f"{path}:2",
        "二",
        f"{path}:4",
        f"{path}:5",
    ]
    sequence = dataset[3]
    trained = sequence.targets_T[sequence.weights_T > 0]
    assert template.tokenizer.decode(trained).startswith("yes 3<|im_end|>")
    assert dataset.lengths_N.tolist() == [len(dataset[i].tokens_T) for i in range(5)]
    assert dataset.trained_N.tolist() == [int((dataset[i].weights_T > 0).sum()) for i in range(5)]
    np.testing.assert_array_equal(sequence.tokens_T[1:], sequence.targets_T[:-1])
    assert (sequence.tokens_T.dtype, sequence.weights_T.dtype) == (np.int32, np.float32)


def test_a_cached_set_equals_the_one_in_memory_and_keeps_its_account(tmp_path, template, monkeypatch):
    path = write(tmp_path / "set.jsonl")
    with open(path, "a", encoding="utf-8") as file:
        file.write('\n{"messages": []}\n')
    first = read(path, template, tmp_path / "cache")
    monkeypatch.setattr(module, "_build", lambda *_, **__: pytest.fail("the cache was not used"))
    again = read(path, template, tmp_path / "cache")
    monkeypatch.undo()
    for dataset in (first, again):
        assert contents(dataset) == contents(read(path, template))
        assert dataset.account == read(path, template).account
        assert dataset.account.dropped == {"empty conversation": 1}
        assert dataset.fingerprint == read(path, template).fingerprint
    assert not again.tokens_M.flags.writeable  # a map of the file
    assert again.tokens_M.base is not None


def test_the_key_follows_every_byte_that_matters_and_no_time(tmp_path, template):
    cache = tmp_path / "cache"
    path = write(tmp_path / "set.jsonl")
    other_name = shutil.copy(path, tmp_path / "set2.jsonl")
    read(path, template, cache)
    os.utime(path, (1, 1))
    read(path, template, cache, workers=0, packing=False)
    assert len(list(cache.iterdir())) == 1
    read(other_name, template, cache)
    for options in ({"max_length": 99}, {"train_turns": "last"}, {"columns": {"source": ""}}, {"too_long": "truncate"}):
        read(path, template, cache, **options)
    for text in (CHATML.replace("\n", " "), CHATML.replace("\n", "\n\n")):
        read(path, ChatTemplate(byte_tokenizer(), template=text), cache)
    read(path, ChatTemplate(byte_tokenizer(), template=CHATML, stop_ids=[5]), cache)
    changed = pathlib.Path(path)
    changed.write_bytes(changed.read_bytes().replace(b"yes 0", b"yes 9"))
    read(path, template, cache)
    assert len(list(cache.iterdir())) == 10


def test_the_key_follows_the_code(tmp_path, template, monkeypatch):
    path = write(tmp_path / "set.jsonl")
    before = module._key(DataConfig(), parts_of((path,)), template, progress=False)
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "chat.py").write_text("other code")
    monkeypatch.setattr(module, "__file__", str(tmp_path / "room" / "dataset.py"))
    assert module._key(DataConfig(), parts_of((path,)), template, progress=False) != before


def test_the_fingerprint_follows_tokens_weights_sources_and_order(tmp_path, template):
    path = write(tmp_path / "set.jsonl")
    lines = pathlib.Path(path).read_text(encoding="utf-8").split("\n")

    def fingerprint(rows: list[str], **options) -> str:
        pathlib.Path(path).write_text("\n".join(rows), encoding="utf-8")
        return read(path, template, **options).fingerprint

    weighted = lines[0].replace('"yes 0"', '"yes 0", "weight": 0.5')
    assert weighted != lines[0]
    variants = [lines, lines[::-1], [weighted, *lines[1:]], [lines[0].replace("yes", "no"), *lines[1:]], lines[:-1]]
    found = [fingerprint(rows) for rows in variants] + [fingerprint(lines, columns={"source": ""})]
    assert len(set(found)) == len(found)
    assert fingerprint(lines, max_length=1000, workers=0) == found[0]


def flip_bit(path: pathlib.Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


DAMAGES = {
    "bit in an array": lambda home: flip_bit(home / "tokens_M.npy", -9),
    "bit in a count": lambda home: flip_bit(home / "trained_N.npy", -4),
    "bit in a header": lambda home: flip_bit(home / "weights_M.npy", 70),
    "shorter array": lambda home: os.truncate(home / "tokens_M.npy", 200),
    "longer array": lambda home: os.truncate(home / "tokens_M.npy", 9000),
    "no array": lambda home: (home / "weights_M.npy").unlink(),
    "manifest torn": lambda home: os.truncate(home / "manifest.json", 40),
    "manifest gone": lambda home: (home / "manifest.json").unlink(),
    "manifest changed": lambda home: (home / "manifest.json").write_bytes(
        (home / "manifest.json").read_bytes().replace(b'"read": 5', b'"read": 6')
    ),
    "manifest of another kind": lambda home: (home / "manifest.json").write_text("[]"),
    "manifest empty": lambda home: (home / "manifest.json").write_text("{}"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_made_again_with_a_warning(tmp_path, template, caplog, damage):
    path = write(tmp_path / "set.jsonl")
    good = contents(read(path, template, tmp_path / "cache"))
    home = home_of(tmp_path / "cache")
    DAMAGES[damage](home)
    with caplog.at_level(logging.WARNING):
        dataset = read(path, template, tmp_path / "cache")
    assert contents(dataset) == good
    assert dataset.account.read == 5
    (record,) = caplog.records
    assert "the tokenised set is damaged" in record.getMessage()
    assert str(home) in record.getMessage()
    caplog.clear()
    read(path, template, tmp_path / "cache")
    assert not caplog.records


def test_a_large_cache_is_checked_by_its_sizes_alone(tmp_path, template, monkeypatch):
    monkeypatch.setattr(store, "VERIFIED_BYTES", 1000)
    path = write(tmp_path / "set.jsonl")
    read(path, template, tmp_path / "cache")
    home = home_of(tmp_path / "cache")
    assert json.loads((home / "manifest.json").read_text())["manifest"]["checksums"] == {}
    os.truncate(home / "tokens_M.npy", 200)
    with pytest.raises(ValueError, match=r"tokens_M\.npy has 200 bytes, not"):
        store.load(home, in_memory=False)


def test_a_run_that_stops_in_the_middle_leaves_no_set(tmp_path, template):
    path = write(tmp_path / "set.jsonl")
    with open(path, "a", encoding="utf-8") as file:
        file.write("\n{broken")
    with pytest.raises(DataError, match=r"set\.jsonl:6: broken JSON"):
        read(path, template, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_what_killed_runs_left_is_removed_after_a_day_and_no_sooner(tmp_path, template):
    path = write(tmp_path / "set.jsonl")
    cache = tmp_path / "cache"
    for name in ("old", "new"):
        (cache / f"x.tmp-{name}").mkdir(parents=True)
        (cache / f"x.tmp-{name}" / "tokens_M.npy").touch()
    for place in (cache / "x.tmp-old", cache / "x.tmp-new", cache / "x.tmp-old" / "tokens_M.npy"):
        os.utime(place, (1, 1))
    read(path, template, cache)
    assert [p.name for p in cache.glob("*.tmp-*")] == ["x.tmp-new"]


def test_a_set_that_another_process_made_meanwhile_is_taken(tmp_path, template, monkeypatch):
    path = write(tmp_path / "set.jsonl")
    rename = os.rename

    def slower(source, target):
        shutil.copytree(source, target)
        rename(source, target)

    monkeypatch.setattr(os, "rename", slower)
    assert len(read(path, template, tmp_path / "cache")) == 5
    assert home_of(tmp_path / "cache").is_dir()


def test_a_cache_that_cannot_be_written_is_an_error_with_the_way_out(tmp_path, template, monkeypatch):
    path = write(tmp_path / "set.jsonl")
    cache = tmp_path / "cache"

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        DataError, match=r"cache: the tokenised set cannot be written \(No space left .*set data\.cache to"
    ):
        read(path, template, cache)
    assert not list(cache.iterdir())


def test_order_account_and_fingerprint_do_not_depend_on_the_number_of_workers(tmp_path, template, monkeypatch):
    monkeypatch.setattr("jax_sft.data.workers.CHUNK", 16)  # enough of them for the queue to fill
    monkeypatch.setattr("jax_sft.data.workers.AHEAD", 1)
    path = write(tmp_path / "set.jsonl", count=300)
    with open(path, "a", encoding="utf-8") as file:
        file.write('\n{"messages": []}\n')
        file.write('{"messages": [{"role": "assistant", "content": "a"}]}\n' * 2)
    options = {"max_length": 29, "too_long": "drop"}  # some are dropped by workers, one by the reader
    alone = read(path, template, **options)
    assert sum(alone.account.dropped.values()) > 1
    assert alone.account.noted[SAME_CONTENT + BOTH_STAY] == 1 and len(alone.account.noted) == 2  # and who speaks first
    together = read(path, template, workers=2, **options)
    assert contents(together) == contents(alone)
    assert together.account == alone.account
    assert together.fingerprint == alone.fingerprint


@pytest.mark.parametrize(("seconds", "started"), [(0.0, [2]), (3600.0, [])])
def test_workers_are_started_unasked_for_what_is_left_of_a_large_set(tmp_path, template, monkeypatch, seconds, started):
    monkeypatch.setattr("jax_sft.data.workers.CHUNK", 16)
    for way in ("fork", "spawn"):
        monkeypatch.setitem(ALONE_SECONDS, way, seconds)
    monkeypatch.setattr("jax_sft.data.workers._unasked", lambda: 2)
    numbers = []
    monkeypatch.setattr("jax_sft.data.workers.workers", lambda *args: numbers.append(args[2]) or workers(*args))
    path = write(tmp_path / "set.jsonl", count=100)
    alone = read(path, template, workers=0)
    assert numbers == []
    unasked = read(path, template, workers=None)
    assert numbers == started
    assert contents(unasked) == contents(alone)
    assert unasked.account == alone.account


def test_one_core_gets_no_workers_unasked_and_many_get_eight(monkeypatch):
    for cores, number in ((1, 0), (2, 2), (64, 8)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=cores: set(range(n)))
        assert _unasked() == number


def test_a_worker_imports_no_jax_and_not_the_main_module(tmp_path, template, monkeypatch):
    main = types.ModuleType("__main__")
    main.__file__ = str(tmp_path / "main.py")
    (tmp_path / "main.py").write_text("import wave\nraise SystemExit('the main module ran again')")
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr("jax_sft.data.workers.start_method", lambda: "spawn")
    with workers(template, DataConfig(), 1) as pool:
        names = pool.submit(eval, "sorted(__import__('sys').modules)").result()
    assert sys.modules["__main__"] is main
    assert "jax_sft.data.chat" in names
    assert not {"jax", "jaxlib", "flax", "torch", "wave"} & set(names)


COPIED = """
import os, signal, sys, threading, time
from jax_sft.config import DataConfig
from jax_sft.data import workers
from tests.data.test_dataset import CHATML, ChatTemplate, byte_tokenizer, read
assert workers.start_method() == "fork"
template = ChatTemplate(byte_tokenizer(), template=CHATML)
alone, two = (read(sys.argv[1], template, workers=n) for n in (0, 2))
assert alone.fingerprint == two.fingerprint and alone.account == two.account
with workers.workers(template, DataConfig(), 1) as pool:
    print(pool.submit(os.getpid).result(), flush=True)
    thread = threading.Thread(target=time.sleep, args=(60,), daemon=True)
    thread.start()
    assert workers.start_method() == "spawn"
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="processes are copied on Linux alone")
def test_workers_are_copies_where_there_is_nothing_that_cannot_be_copied(tmp_path):
    path = write(tmp_path / "set.jsonl", count=200)
    done = subprocess.run([sys.executable, "-c", COPIED, str(path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    child, deadline = int(done.stdout.split()[0]), time.monotonic() + 30
    while pathlib.Path(f"/proc/{child}").exists() and "Z" not in state_of(child):
        assert time.monotonic() < deadline, "the worker outlives the process that it was copied from"
        time.sleep(0.05)
    beside_jax = (
        "import jax\nfrom jax_sft.data.workers import start_method\n"
        "assert start_method() == 'fork'\njax.devices()\nassert start_method() == 'spawn'"
    )
    subprocess.run([sys.executable, "-c", beside_jax], timeout=120, check=True)


def state_of(process: int) -> str:
    try:
        return pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def test_an_error_in_a_worker_comes_out_as_it_is(tmp_path, template):
    path = write(tmp_path / "set.jsonl", count=3)
    with pytest.raises(DataError, match=r"set\.jsonl:1: \d+ tokens, .*data\.max_length = 4"):
        read(path, template, workers=1, max_length=4, too_long="error")


def test_a_worker_that_dies_is_an_error_with_the_way_out(tmp_path, template, monkeypatch):
    path = write(tmp_path / "set.jsonl", count=3)
    monkeypatch.setattr("jax_sft.data.workers._work", os._exit)  # what a worker does when memory runs out
    monkeypatch.setattr("jax_sft.data.workers._chunks", lambda _: iter([9]))
    with pytest.raises(DataError, match=r"data\.workers = 1: a worker died .* set a smaller number"):
        read(path, template, workers=1)


def test_a_set_without_anything_to_train_on_is_an_error_with_the_reasons(tmp_path, template):
    path = tmp_path / "set.jsonl"
    rows = [[], [], [{"role": "user", "content": "q"}]]
    path.write_text("\n".join(json.dumps({"messages": m}) for m in rows))
    message = (
        r"set\.jsonl: nothing can be trained on; 3 conversations read, 2 dropped: empty conversation "
        r"\(first: .*set\.jsonl:1\); 1 dropped: no assistant message to train on \(first: .*:3\); correct the data, or"
    )
    for cache in (None, tmp_path / "cache"):
        with pytest.raises(DataError, match=message):
            read(str(path), template, cache)


def test_too_many_sources_are_an_error_with_the_way_out(tmp_path, template, monkeypatch):
    monkeypatch.setattr(store, "MAX_SOURCES", 1)
    path = write(tmp_path / "set.jsonl")
    with pytest.raises(DataError, match=r"jsonl:2: the column 'source' names more than 1 .* data\.columns\.source, or"):
        read(path, template)
    assert read(path, template, columns={"source": ""}).sources == ("set",)


def test_a_dump_line_holds_the_weight_of_predicting_each_token(tmp_path, template):
    path = write(tmp_path / "set.jsonl")
    dataset = read(path, template)
    lines = [json.loads(json.dumps(line)) for line in dump(dataset, template.tokenizer)]
    assert len(lines) == 5
    line, sequence = lines[1], dataset[1]
    assert list(line) == ["id", "source", "tokens", "weights", "text"]
    assert (line["id"], line["source"]) == (f"{path}:2", "other")
    assert line["text"].startswith("<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\nyes 1<|im_end|>")
    assert line["tokens"] == [*sequence.tokens_T.tolist(), int(sequence.targets_T[-1])]
    assert len(line["weights"]) == len(line["tokens"])
    trained = [t for t, w in zip(line["tokens"], line["weights"], strict=True) if w]
    assert template.tokenizer.decode(trained).startswith("yes 1<|im_end|>")


def test_the_progress_bars_are_full_at_the_end(tmp_path, template, monkeypatch):
    bars = []

    class Bar(module.tqdm):
        def close(self):
            bars.append((self.desc, self.n, self.total, self.delay))
            super().close()

    monkeypatch.setattr(module, "tqdm", Bar)
    path = write(tmp_path / "set.jsonl")
    size = pathlib.Path(path).stat().st_size
    tokenize(DataConfig(), parts_of((path,)), template, cache_dir=tmp_path / "cache", progress=True)
    assert list(dict.fromkeys(bars)) == [("hashing data", size, size, 2.0), ("tokenising data", 5, 5, 2.0)]


def test_a_plain_completion_teaches_itself_and_its_end_and_not_its_prompt(tmp_path, template):
    path = tmp_path / "set.jsonl"
    rows = [{"prompt": "2+2=", "completion": " 4"}, {"prompt": "", "completion": "二"}]
    path.write_text("\n".join(json.dumps(r) for r in rows), encoding="utf-8")
    dataset = read(str(path), template)
    lines = list(dump(dataset, template.tokenizer))
    assert [line["text"] for line in lines] == ["2+2= 4<|im_end|>", "二<|im_end|>"]
    assert [line["weights"] for line in lines] == [[0, 0, 0, 0, 1, 1, 1], [0, 1, 1, 1]]  # bytes


@pytest.mark.parametrize("workers", [0, 2])
def test_named_sets_are_read_one_after_the_other_under_their_names_and_weights(tmp_path, template, workers):
    paths = [write(tmp_path / f"{name}.jsonl") for name in ("one", "two")]
    sets = {"b": SetConfig(paths=(paths[0],), loss_weight=0.5), "a": SetConfig(paths=(paths[1],))}
    config = DataConfig(workers=workers)
    mixed = tokenize(config, parts_of(sets), template, cache_dir=None, progress=False)
    plain = [tokenize(config, parts_of((path,)), template, cache_dir=None, progress=False) for path in paths]
    assert mixed.sources == ("b", "a")
    assert mixed.of_source("b").tolist() == list(range(len(plain[0])))
    assert mixed.of_source("a").tolist() == list(range(len(plain[0]), len(mixed)))
    assert mixed.of_source("c").tolist() == []
    np.testing.assert_array_equal(mixed.tokens_M, np.concatenate([p.tokens_M for p in plain]))
    expected = np.concatenate([plain[0].weights_M * np.float32(0.5), plain[1].weights_M])
    np.testing.assert_array_equal(mixed.weights_M, expected)
    heavier = {**sets, "a": SetConfig(paths=(paths[1],), loss_weight=2.0)}
    keys = [module._key(config, parts_of(what), template, progress=False) for what in (sets, heavier, paths)]
    assert len(set(keys)) == 3


@pytest.mark.parametrize("block", [1, 40, 2**24])  # positions looked at together: less than a sequence, some, all
def test_answers_are_counted_by_their_trained_stretches(tmp_path, template, monkeypatch, block):
    monkeypatch.setattr("jax_sft.data.store.BLOCK", block)
    dataset = read(write(tmp_path / "set.jsonl"), template)
    for i in range(len(dataset)):
        is_trained_T = [False, *(dataset[i].weights_T > 0)]
        begins = sum(b and not a for a, b in itertools.pairwise(is_trained_T))
        assert dataset.answers_N[i] == begins > 0
