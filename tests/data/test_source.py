"""Rows and their places out of every kind of file, and a sentence for every file that cannot be read."""

import gzip
import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from jax_sft.data.conversation import DataError
from jax_sft.data.source import HubSet, count_rows, files_of, read_rows, stem_of

ROWS = [{"text": "one\u2028line"}, {"text": "two 二 🙂"}]


def write(path: pathlib.Path, content: str | bytes) -> str:
    data = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def table(rows: list[dict[str, Any]], separator: str) -> str:
    return f"text{separator}n\n" + "".join(f'"{r["text"]}"{separator}1\n' for r in rows)


CONTENTS: dict[str, Callable[[], str | bytes]] = {
    ".json": lambda: json.dumps(ROWS, indent=1),
    ".jsonl": lambda: "\n\n".join(json.dumps(r, ensure_ascii=False) for r in ROWS),
    ".parquet": lambda: parquet(ROWS),
    ".csv": lambda: table(ROWS, ","),
    ".tsv": lambda: table(ROWS, "\t"),
}
PLACES = {".json": ("[0]", "[1]"), ".jsonl": (":1", ":3"), ".parquet": ("[0]", "[1]"), ".csv": (":2", ":3")}


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize("extension", CONTENTS)
def test_every_kind_of_file_gives_its_rows_and_their_places(tmp_path, extension, gz):
    path = write(tmp_path / f"set.v1{extension}{gz}", CONTENTS[extension]())
    rows = list(read_rows([path], split="train"))
    assert [row["text"] for row, _ in rows] == [row["text"] for row in ROWS]
    assert [where for _, where in rows] == [path + p for p in PLACES.get(extension, PLACES[".csv"])]
    assert stem_of(pathlib.Path(path)) == "set.v1"
    assert abs(count_rows([path], split="train") - 2) <= 1


def test_an_object_with_data_is_a_list_of_rows(tmp_path):
    path = write(tmp_path / "a.json", json.dumps({"version": 1, "data": ROWS}))
    assert [row for row, _ in read_rows([path], split="train")] == ROWS


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "x"}\n')
    assert next(read_rows([path], split="train"))[0] == {"text": "x"}


def test_a_cell_of_many_lines_keeps_the_place_of_its_row(tmp_path):
    path = write(tmp_path / "a.csv", 'text,id\n"a ""b""\n\nc,d",1\ne,2\n')
    rows = list(read_rows([path], split="train"))
    assert rows == [({"text": 'a "b"\n\nc,d', "id": "1"}, f"{path}:2"), ({"text": "e", "id": "2"}, f"{path}:5")]


def test_a_long_cell_is_read(tmp_path):
    path = write(tmp_path / "a.csv", f"text\n{'x' * 200_000}\n")
    assert len(next(read_rows([path], split="train"))[0]["text"]) == 200_000


def test_parquet_keeps_null_contents_and_loses_the_keys_that_arrow_added(tmp_path):
    turns = [{"role": "user", "content": "a", "name": "Ada"}, {"role": "assistant", "content": None}]
    path = write(tmp_path / "a.parquet", parquet([{"messages": turns, "system": None}]))
    assert next(read_rows([path], split="train"))[0] == {"messages": turns, "system": None}


def test_files_come_in_the_order_named_and_sorted_within_a_folder_or_glob(tmp_path):
    names = ["b/2.jsonl", "b/10.csv", "b/c/1.json.gz", "a.jsonl", "b/README.md", "b/.hidden/x.jsonl", "b/.x.jsonl"]
    for name in names:
        write(tmp_path / name, "x")
    (tmp_path / "b/22").mkdir()
    found = files_of([str(tmp_path / "b"), str(tmp_path / "*.jsonl"), str(tmp_path / "**/2*")])
    expected = ["b/10.csv", "b/2.jsonl", "b/c/1.json.gz", "a.jsonl", "b/2.jsonl"]
    assert [str(p.relative_to(tmp_path)) for p in found if isinstance(p, pathlib.Path)] == expected


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path):
    path = write(tmp_path / "a[1].jsonl", "x")
    assert files_of([path]) == [pathlib.Path(path)]


def test_a_hub_id_is_read_through_datasets(tmp_path, monkeypatch):
    import datasets

    monkeypatch.chdir(tmp_path)
    asked = []

    def load_dataset(name, config, *, split):
        asked.append((name, config, split))
        return [{"text": "x"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert files_of(["org/name:de", "org/name"]) == [HubSet("org/name", "de"), HubSet("org/name")]
    assert list(read_rows(["org/name:de"], split="dev")) == [({"text": "x"}, "org/name:de/dev[0]")]
    assert count_rows(["org/name"], split="train") == 1
    assert asked == [("org/name", "de", "dev"), ("org/name", None, "train")]


def test_an_unreachable_hub_id_is_an_error_with_the_local_near_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data/train/a.jsonl", "x")
    message = (
        r"data/trian: no local file .* \(near it: train\).* cannot be loaded: .*Hub.*; check the name, data\.split"
    )
    with pytest.raises(DataError, match=message):
        list(read_rows(["data/trian"], split="train"))


def fault(name: str, content: str | bytes, message: str, id: str) -> Any:
    return pytest.param(name, content, message, id=id)


FAULTS = [
    fault(
        "a.jsonl", '{"a": 1}\n{"a": }\n', r"a\.jsonl:2: broken JSON at column 7 .* begins '{\"a\": }'; repair", "line"
    ),
    fault("a.jsonl", '{"a": 1}\n{"a": "tor', r"a\.jsonl:2: broken JSON at column 7 \(Unterminated string", "torn line"),
    fault("a.jsonl", '{"a": "x\ny"}', r"a\.jsonl:1: broken JSON at column", "raw newline"),
    fault("a.jsonl", "[1]\n", r"a\.jsonl:1: holds a list, not an object; write", "list in lines"),
    fault("a.jsonl", "null\n", r"a\.jsonl:1: holds null, not an object; write", "null in lines"),
    fault("a.jsonl", "[" * 200_000, r"a\.jsonl:1: JSON that cannot be read", "nesting"),
    fault("a.json", '[\n{"a": 1},\n{"b" 2}]', r"a\.json:3: broken JSON at column 6 .* begins '{\"b\" 2}\]'", "list"),
    fault(
        "a.json", '{"a": 1}\n{"a": 2}', r"a\.json:2: broken JSON .*Extra data.* name the file \.jsonl", "lines in .json"
    ),
    fault("a.json", '{"rows": []}', r"a\.json: holds an object, not a list of objects or", "object"),
    fault("a.json", "[1]", r"a\.json\[0\]: holds a number, not an object", "number"),
    fault("a.jsonl", "\n \n", r"a\.jsonl: it has no rows; fill it, or take it out", "blank lines"),
    fault("a.json", "[]", r"a\.json: it has no rows", "empty list"),
    fault("a.json", "", r"a\.json: it has no rows", "empty json"),
    fault("a.csv", "text\n", r"a\.csv: it has no rows", "header alone"),
    fault("a.csv", "", r"a\.csv: it has no rows", "empty csv"),
    fault("a.csv", "a,b\n1,2\n1,2,3\n", r"a\.csv:3: the row has 3 fields, the header 2; put", "long row"),
    fault("a.csv", "a,a\n1,2\n", r"a\.csv:1: the header names the column 'a' twice; rename", "header"),
    fault("a.csv", 'a\nx\n"torn\nz\n', r"a\.csv:3: cannot be read as a table, .* \(unexpected end of data\)", "quote"),
    fault("a.csv", 'a,b\n"x"y,1\n', r"a\.csv:2: cannot be read as a table", "stray quote"),
    fault("a.xml", "x", r"a\.xml: the extension '\.xml' is not one that is read; write the data as \.json, ", "xml"),
    fault("a", "x", r"a: the extension '' is not one that is read", "no extension"),
    fault("a.jsonl", b'{"a": "x"}\n{"a": "\xb5"}', r"a\.jsonl:2: byte 18 \(0xb5\) is not UTF-8 .* iconv", "latin-1"),
    fault("a.jsonl", b'\xef\xbb\xbf{"\xff"', r"a\.jsonl:1: byte 5 \(0xff\) is not UTF-8", "after a mark"),
    fault("a.json", '[{"a": "é"}]'.encode("utf-16"), r"a\.json:1: byte 0 \(0xff\) is not UTF-8", "utf-16"),
    fault("a.parquet", b"PAR1 torn", r"a\.parquet: cannot be read as Parquet .* torn or of another", "parquet"),
    fault("a.parquet.gz", b"PAR1 torn", r"a\.parquet\.gz: cannot be read as Parquet", "parquet.gz"),
]


@pytest.mark.parametrize(("name", "content", "message"), FAULTS)
def test_a_file_that_cannot_be_read_says_where_what_and_the_way_out(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=message) as caught:
        list(read_rows([path], split="train"))
    assert str(caught.value).startswith(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["torn", "flipped", "plain"])
def test_gzip_that_does_not_unpack_is_an_error(tmp_path, kind):
    path = pathlib.Path(write(tmp_path / "a.jsonl.gz", "".join(f'{{"text": "{i}"}}\n' for i in range(5000))))
    whole = path.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]
    path.write_bytes({"torn": whole[:middle], "flipped": flipped, "plain": b'{"text": "x"}\n'}[kind])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz(:\d+)?: (cannot be unpacked to its end|broken JSON|byte \d+)"):
        list(read_rows([str(path)], split="train"))


def test_a_torn_parquet_file_is_an_error(tmp_path):
    path = write(tmp_path / "a.parquet", parquet(ROWS)[:-10])
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read as Parquet"):
        list(read_rows([path], split="train"))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("data/trane.jsonl", r"trane\.jsonl: no such file or folder \(near it: train\.jsonl\); correct the path"),
        ("deta/train.jsonl", r"train\.jsonl: no such file or folder \(there is no folder .*deta either\)"),
        ("data/train", r"data/train: no such file or folder \(near it: train\.jsonl\)"),
        ("data/zzz.jsonl", r"zzz\.jsonl: no such file or folder; correct the path"),
        ("data/*.json", r"\*\.json: no file matches this pattern.*; correct it, or name the files"),
        ("data/empty", r"empty: the folder has no file that is read; put \.json, "),
    ],
)
def test_a_path_without_a_file_names_what_is_near(tmp_path, path, message):
    write(tmp_path / "data/train.jsonl", "x")
    write(tmp_path / "data/empty/notes.md", "x")
    with pytest.raises(DataError, match=message):
        files_of([str(tmp_path / path)])


def test_a_relative_path_with_an_extension_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"^data/train\.jsonl: no such file or folder"):
        files_of(["data/train.jsonl"])


def test_a_file_that_may_not_be_opened_is_an_error(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", "x")
    monkeypatch.setattr("builtins.open", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(
        DataError, match=r"a\.jsonl: cannot be read \(Permission denied\); check the file and its rights"
    ):
        list(read_rows([path], split="train"))


def test_a_broken_line_stops_the_reading_where_it_stands(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "x"}\n{\n{"text": "y"}\n')
    rows = read_rows([path], split="train")
    assert next(rows)[0] == {"text": "x"}
    with pytest.raises(DataError, match=re.escape(f"{path}:2:")):
        next(rows)


def test_a_far_path_is_told_where_it_can_be_read():
    with pytest.raises(DataError, match=r"s3://b/x\.jsonl: is no local file .* by data\.stream\.on = True, or copy"):
        files_of(["s3://b/x.jsonl"])
