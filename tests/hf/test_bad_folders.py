"""A folder that is no whole model ends in one message: where, what was found, a way out; never in a traceback."""

import json
import os
import pathlib
import re
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jax_sft import cli
from jax_sft.hf.load import load_params, load_pretrained
from tests.hf.models import TINY, tensors, write_folder

WEIGHTS, SECOND = "model.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
TENSORS = tensors(TINY)
NORM = "model.norm.weight"


@pytest.fixture
def refused(tmp_path: pathlib.Path, capsys, monkeypatch) -> Callable[..., str]:
    """What `jax-sft chat` says of a folder after some damage, without the folder's own name in front."""
    monkeypatch.chdir(tmp_path)

    def refused(damage: Callable[[pathlib.Path], Any], *, shards: int = 1, **changed: np.ndarray) -> str:
        weights = {name: x for name, x in (TENSORS | changed).items() if x.size}
        write_folder(tmp_path / "m", TINY, weights, shards=shards)
        damage(tmp_path / "m")
        assert cli.main(["chat", "--model", "m", "--prompt", "hi"]) == cli.EXIT_USER_ERROR
        said, error = capsys.readouterr()
        assert said == ""
        assert "Traceback" not in error
        assert error.startswith("jax-sft: m"), error
        return error.removeprefix("jax-sft: m").removeprefix("/").removeprefix(": ").removesuffix("\n")

    return refused


def write(name: str, content: bytes | str) -> Callable[[pathlib.Path], Any]:
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def edit_header(edit: Callable[[dict[str, Any]], Any]) -> Callable[[pathlib.Path], None]:
    """The data stays, and the header says something else of it."""

    def damage(folder: pathlib.Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        edit(header)
        text = json.dumps(header).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    return damage


def edit_json(name: str, edit: Callable[[dict[str, Any]], Any]) -> Callable[[pathlib.Path], None]:
    def damage(folder: pathlib.Path) -> None:
        said = json.loads((folder / name).read_text())
        edit(said)
        (folder / name).write_text(json.dumps(said))

    return damage


def cut(name: str, count: int) -> Callable[[pathlib.Path], Any]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - count)


AGAIN = "; copy or download it again"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (write(WEIGHTS, b""), "(it has 0 bytes and should have a header of 8)"),
        (write(WEIGHTS, b"<!doctype html>"), "(it has 15 bytes and should have a header of 8104636974849335612)"),
        (write(WEIGHTS, struct.pack("<Q", 9) + b'{"model": data'), r"(Expecting value: line 1 column 10 (char 9))"),
        (write(WEIGHTS, struct.pack("<Q", 3) + b"\xff\xfe\xff"), None),
        (write(WEIGHTS, struct.pack("<Q", 8) + b"[1,2,3] "), "(its header is no JSON object)"),
        (write(WEIGHTS, struct.pack("<Q", 9**6) + b"[" * 9**6), None),
        (cut(WEIGHTS, 1000), "(it has 71032 bytes and should have 72032)"),
        (edit_header(lambda h: h[NORM].pop("dtype")), "(its header is none of this format: KeyError: 'dtype')"),
        (edit_header(lambda h: h[NORM].update(data_offsets=[1])), None),
        (edit_header(lambda h: h[NORM].update(shape=[4])), f"({NORM} has 64 bytes, which is no F32 of shape [4])"),
        (
            edit_header(lambda h: h[NORM].update(data_offsets=[0, 64])),
            "(lm_head.weight should start at byte 64 of the data and starts at 0)",
        ),
    ],
    ids=["empty", "html", "cut json", "no text", "list", "deep", "cut data", "no dtype", "offsets", "shape", "overlap"],
)
def test_a_damaged_shard_is_named_with_what_is_wrong_in_it(refused, damage, said: str | None):
    found = refused(damage)
    pattern = r"\(.+\)" if said is None else re.escape(said)
    assert re.fullmatch(rf"{re.escape(WEIGHTS)}: is damaged or cut short {pattern}{AGAIN}", found)


def test_a_pointer_of_git_lfs_is_known_as_one(refused):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 134515784\n"
    found = refused(write(WEIGHTS, pointer))
    assert found == f"{WEIGHTS}: is a pointer of git-lfs, not the weights; run `git lfs pull` there"


def test_a_missing_shard_and_a_folder_in_its_place_are_named(refused, tmp_path):
    found = refused(lambda folder: (folder / SECOND).unlink(), shards=2)
    assert found == f"{INDEX} names 2 files and 1 are missing ({SECOND}); copy or download the rest of the model"
    (tmp_path / "m").rename(tmp_path / "other")

    def folder_in_its_place(folder: pathlib.Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / WEIGHTS).mkdir()

    found = refused(folder_in_its_place)
    assert found == "has a config.json but no weights (*.safetensors); copy or download the rest of the model"


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda index: index["weight_map"].clear(), "its weight_map does not give each tensor a file"),
        (lambda index: index["weight_map"].update(a=3), "its weight_map does not give each tensor a file"),
        (lambda index: index.pop("weight_map"), "'weight_map'"),
    ],
    ids=["empty", "number", "none"],
)
def test_an_index_that_is_none_is_named(refused, edit, said: str):
    found = refused(edit_json(INDEX, edit), shards=2)
    assert found == f"{INDEX}: is not an index of safetensors ({said}){AGAIN}"


def test_tensors_that_the_index_names_and_no_file_has_are_named_at_once(refused):
    extra = {f"model.layers.{i}.mlp.up_proj.weight": SECOND for i in (7, 8, 9)} | {"model.extra": SECOND}
    found = refused(edit_json(INDEX, lambda index: index["weight_map"].update(extra)), shards=2)
    assert found.splitlines() == [
        f"{INDEX} names tensors that are in none of its files; copy or download the index and the files of one model:",
        "  model.layers.{7-9}.mlp.up_proj.weight",
        "  model.extra",
    ]


def test_an_index_may_name_a_tied_head_that_no_file_has(tmp_path):
    config = TINY | {"tie_word_embeddings": True}
    write_folder(tmp_path / "m", config, tensors(config), shards=2)
    edit_json(INDEX, lambda index: index["weight_map"].update({"lm_head.weight": SECOND}))(tmp_path / "m")
    assert "head_VD" not in load_params(load_pretrained(tmp_path / "m"))


def test_a_tensor_in_two_shards_is_named_with_both(refused):
    def copied(folder: pathlib.Path) -> None:
        save_file(
            load_file(folder / SECOND) | {NORM: TENSORS[NORM], "lm_head.weight": TENSORS["lm_head.weight"]},
            folder / SECOND,
        )

    found = refused(copied, shards=2)
    assert re.fullmatch(rf"\S+ is in two files, model-00001-of-00002\.safetensors and {SECOND}; remove the copy", found)


def test_all_that_does_not_fit_the_config_is_named_at_once(refused):
    nothing = np.zeros(0, np.float32)
    changed = {
        NORM: nothing,
        "model.layers.0.mlp.up_proj.weight": nothing,
        "foo.weight": np.ones(3, np.float32),
        "model.layers.1.input_layernorm.weight": np.ones(8, np.float32),
        "model.layers.2.input_layernorm.weight": np.ones(16, np.int8),
    }
    found = refused(lambda folder: None, **changed)
    assert found.splitlines() == [
        "the weights do not fit config.json; take both from one model, in plain numbers:",
        "  missing: model.layers.0.mlp.up_proj.weight",
        "  missing: model.norm.weight",
        "  unexpected: foo.weight",
        "  wrong shape: model.layers.1.input_layernorm.weight is (8,), expected (16,)",
        "  not plain numbers: model.layers.2.input_layernorm.weight is I8",
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", r"cannot be read as JSON \(Expecting value.*\)"),
        (b"\xff\xfe", r"cannot be read as JSON \('utf-8' codec.*\)"),
        ("[" * 9**6, r"cannot be read as JSON \(maximum recursion depth.*\)"),
        ("[1]", r"holds a JSON list, not an object \{\.\.\.\}"),
        ("null", r"holds a JSON null, not an object \{\.\.\.\}"),
        ("{}", "names no model_type"),
    ],
    ids=["empty", "no text", "deep", "list", "null", "{}"],
)
def test_a_config_that_says_nothing_is_named(refused, content, said: str):
    assert re.fullmatch(rf"config\.json: {said}{AGAIN}", refused(write("config.json", content)))


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (
            lambda c: c.update(model_type="mamba"),
            r"config\.json: model_type = 'mamba' is not modelled; these are: llama, .+",
        ),
        (
            lambda c: c.update(clip_qkv=8.0),
            r"config\.json cannot be .*:\n  clip_qkv = 8\.0 is not modelled; only None is",
        ),
        (lambda c: c.update(magic=1), r"config\.json cannot be .*:\n  magic = 1 is an unknown field; remove it if .*"),
        (lambda c: c.pop("hidden_size"), r"config\.json cannot be .*:\n  hidden_size is missing"),
    ],
    ids=["model type", "not modelled", "unknown", "missing"],
)
def test_a_config_that_is_not_followed_says_why(refused, edit, said: str):
    assert re.fullmatch(said, refused(edit_json("config.json", edit)))


def test_a_folder_without_a_tokenizer_says_what_to_copy(refused):
    def gone(folder: pathlib.Path) -> None:
        for file in folder.glob("tokenizer*"):
            file.unlink()

    assert refused(gone) == "has no tokenizer.json; copy the tokenizer's files of its base model there"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
        ("chat_template.jinja", b"\xff"),
    ],
)
def test_a_tokenizer_s_broken_file_is_the_one_that_is_named(refused, file: str, content):
    found = refused(write(file, content))
    assert re.fullmatch(
        rf"has a {re.escape(file)} that cannot be read \(.+\); copy the tokenizer's files of its .*", found
    )


def test_an_export_of_a_bad_folder_leaves_nothing_behind(tmp_path, capsys):
    write_folder(tmp_path / "m")
    cut(WEIGHTS, 10)(tmp_path / "m")
    assert cli.main(["export", "--model", str(tmp_path / "m"), "--out", str(tmp_path / "out")]) == cli.EXIT_USER_ERROR
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "is damaged or cut short" in error
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
