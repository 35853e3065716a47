"""Export = what was trained: weights, template, stop ids; all of it or nothing."""

import json
import math
import os
import pathlib
import resource
import shutil
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from jax_sft.config import MeshConfig
from jax_sft.hf import save
from jax_sft.hf.folder import resolve
from jax_sft.hf.load import Pretrained, load_model, load_params, load_pretrained
from jax_sft.hf.save import check_destination, check_shard_size, save_model
from jax_sft.model.decoder import abstract_params
from jax_sft.sharding import make_mesh, shard_params
from tests.hf.conftest import TwoProcesses
from tests.hf.models import CHATML, TINY, tensors, write_folder

BIASED = TINY | {"attention_bias": True, "mlp_bias": True}
TIED = TINY | {"tie_word_embeddings": True}


def export(base: Pretrained, out: pathlib.Path, **changes: Any) -> list[pathlib.Path]:
    said = {
        "config": base.config,
        "params": base.params,
        "tokenizer": base.tokenizer,
        "hf_config": base.hf_config,
        "generation_config": base.generation_config,
        "chat_template": base.chat_template,
        "stop_ids": base.stop_ids,
        "dtype": "float32",
        "max_shard_size": "5GB",
        "facts": {"steps": 10},
    }
    return save_model(out, **{**said, **changes})


def out_over_a_mesh(
    source: pathlib.Path, out: pathlib.Path, sizes: tuple[int, int, int], **changes: Any
) -> tuple[Pretrained, dict[str, np.ndarray]]:
    """A folder in, spread over fsdp x expert x tensor devices, and out again: the model and the tensors written."""
    fsdp, expert, tensor = sizes
    mesh = make_mesh(MeshConfig(fsdp=fsdp, expert=expert, tensor=tensor), jax.devices()[: math.prod(sizes)])
    model = load_model(source, mesh=mesh)
    assert model.params is not None
    export(model, out, **changes)
    return model, read_tensors(out)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def read_tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    return {name: x for path in sorted(folder.glob("*.safetensors")) for name, x in load_file(path).items()}


@pytest.fixture
def base(tmp_path: pathlib.Path) -> Pretrained:
    write_folder(
        tmp_path / "base", TINY, generation={"eos_token_id": 2, "temperature": 0.7, "transformers_version": "1"}
    )
    return load_model(tmp_path / "base")


@pytest.mark.parametrize("config", [TINY, BIASED, TIED], ids=["plain", "biases", "tied"])
@pytest.mark.parametrize("max_shard_size", ["5GB", 4096], ids=["one file", "shards"])
def test_what_goes_out_is_what_came_in_byte_by_byte(tmp_path: pathlib.Path, config: dict, max_shard_size):
    weights = write_folder(tmp_path / "in", config, shards=2)
    model = load_model(tmp_path / "in")
    files = export(model, tmp_path / "out", max_shard_size=max_shard_size)
    read = read_tensors(tmp_path / "out")
    assert set(read) == set(weights)
    for name, x in weights.items():
        assert read[name].tobytes() == x.tobytes(), name
    again = load_model(tmp_path / "out")
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), again.params, model.params)
    assert again.config == model.config
    assert sorted(files) == sorted((tmp_path / "out").iterdir())


def test_shards_stay_below_their_size_and_have_an_index(tmp_path: pathlib.Path, base: Pretrained):
    export(base, tmp_path / "out", max_shard_size="10KB")
    shards = sorted((tmp_path / "out").glob("model-*-of-*.safetensors"))
    index = read_json(tmp_path / "out" / "model.safetensors.index.json")
    assert len(shards) > 2
    assert set(index["weight_map"].values()) == {p.name for p in shards}
    assert index["metadata"]["total_size"] == 4 * base.config.num_params
    for shard in shards:
        held = load_file(shard)
        assert len(held) == 1 or sum(x.nbytes for x in held.values()) <= 10_000


@pytest.mark.parametrize("sizes", [(1, 8, 1), (1, 1, 8), (2, 2, 2)])
def test_a_sharded_model_is_exported_whole(tmp_path: pathlib.Path, sizes: tuple[int, int, int]):
    weights = write_folder(tmp_path / "in", BIASED)
    mesh = make_mesh(MeshConfig(data=sizes[0], fsdp=sizes[1], tensor=sizes[2]))
    export(load_model(tmp_path / "in", mesh=mesh), tmp_path / "out")
    read = read_tensors(tmp_path / "out")
    assert all(read[name].tobytes() == x.tobytes() for name, x in weights.items())


@pytest.mark.parametrize(("dtype", "numpy"), [("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16)])
def test_weights_are_rounded_to_the_dtype_that_is_asked_for(
    tmp_path: pathlib.Path, base: Pretrained, dtype: str, numpy
):
    export(base, tmp_path / "out", dtype=dtype)
    for name, x in read_tensors(tmp_path / "out").items():
        np.testing.assert_array_equal(x, tensors(TINY)[name].astype(numpy))
    said = read_json(tmp_path / "out" / "config.json")
    assert said["dtype"] == said["torch_dtype"] == dtype


def test_an_unknown_dtype_is_refused(tmp_path: pathlib.Path, base: Pretrained):
    with pytest.raises(ValueError, match=r"export\.dtype = 'int8' is not one of float32, bfloat16, float16"):
        export(base, tmp_path / "out", dtype="int8")


def test_a_shard_size_that_is_none_is_refused(tmp_path: pathlib.Path, base: Pretrained):
    with pytest.raises(ValueError, match=r"export\.max_shard_size = '5 apples' is no size; write one like 5GB"):
        export(base, tmp_path / "out", max_shard_size="5 apples")


@pytest.mark.parametrize("size", ["banana", "", "5", "5GiB", "0GB", "-5GB", "nanGB", "infGB", 0, -1])
def test_a_bad_shard_size_is_known_at_the_door(size: str | int):
    with pytest.raises(ValueError, match=rf"export\.max_shard_size = {size!r} is no size; write one like 5GB"):
        check_shard_size(size)


@pytest.mark.parametrize("size", ["5GB", "1.5 gb", "200MB", "10KB", 4096])
def test_what_check_shard_size_lets_through_can_be_followed(tmp_path: pathlib.Path, base: Pretrained, size: str | int):
    check_shard_size(size)
    export(base, tmp_path / "out", max_shard_size=size)


def test_a_weight_that_does_not_fit_the_dtype_is_named(tmp_path: pathlib.Path, base: Pretrained):
    assert base.params is not None
    params = base.params | {"final_norm_D": base.params["final_norm_D"].at[3].set(1e5)}
    with pytest.raises(ValueError, match=r"model\.norm\.weight holds values that are not finite in float16"):
        export(base, tmp_path / "out", params=params, dtype="float16")
    assert not list(tmp_path.glob("*out*"))
    export(base, tmp_path / "out", params=params, dtype="bfloat16")


def test_the_whole_model_does_not_stay_on_the_host(tmp_path: pathlib.Path):
    write_folder(tmp_path / "in")
    model = load_model(tmp_path / "in", mesh=make_mesh(MeshConfig(fsdp=8)))
    export(model, tmp_path / "out")
    # jax keeps the numpy copy of a sharded array that was read as a whole for as long as the array lives.
    assert all(x._npy_value is None for x in jax.tree.leaves(model.params))
    np.asarray(model.params["embed_VD"])
    assert model.params["embed_VD"]._npy_value is not None


def test_the_model_stops_at_exactly_the_trained_ids(tmp_path: pathlib.Path, base: Pretrained):
    export(base, tmp_path / "one")
    said = read_json(tmp_path / "one" / "generation_config.json")
    assert said == {"bos_token_id": 1, "eos_token_id": [2], "pad_token_id": 0, "temperature": 0.7}
    export(base, tmp_path / "two", stop_ids=(2, 5))
    assert read_json(tmp_path / "two" / "generation_config.json")["eos_token_id"] == [2, 5]
    assert read_json(tmp_path / "two" / "config.json")["eos_token_id"] == [2, 5]
    assert load_pretrained(tmp_path / "two").stop_ids == (2, 5)


@pytest.mark.parametrize(
    ("generation", "stop_ids", "pad"),
    [
        ({"pad_token_id": 9}, (2,), 9),  # the source's own
        ({"pad_token_id": 2}, (2,), 0),  # pad = stop: the unknown token instead
        ({}, (2,), 0),  # the tokenizer's pad is a stop id too
        ({"pad_token_id": 9}, (2, 9, 0), None),  # nothing is left
    ],
)
def test_pad_is_never_a_stop_id(tmp_path: pathlib.Path, base: Pretrained, generation: dict, stop_ids, pad: int | None):
    export(base, tmp_path / "out", generation_config=generation, stop_ids=stop_ids)
    assert read_json(tmp_path / "out" / "generation_config.json").get("pad_token_id") == pad
    assert read_json(tmp_path / "out" / "config.json")["pad_token_id"] == pad
    assert load_pretrained(tmp_path / "out").tokenizer.pad_token_id == (2 if pad is None else pad)
    assert base.tokenizer.pad_token_id == 2


@pytest.mark.parametrize(
    ("stop_ids", "said"), [((), "there is none"), ((2, 320), r"\[320\] are outside the vocabulary")]
)
def test_a_model_that_could_not_stop_is_refused(tmp_path: pathlib.Path, base: Pretrained, stop_ids, said: str):
    with pytest.raises(ValueError, match=f"stop ids: {said}; a model without them never ends an answer"):
        export(base, tmp_path / "out", stop_ids=stop_ids)


def test_the_template_that_was_trained_travels(tmp_path: pathlib.Path, base: Pretrained):
    export(base, tmp_path / "out", chat_template="{{ 'mine' }}")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ 'mine' }}"
    assert load_pretrained(tmp_path / "out").chat_template == "{{ 'mine' }}"
    assert base.chat_template == CHATML


def test_the_config_keeps_what_says_nothing_about_the_weights(tmp_path: pathlib.Path, base: Pretrained):
    source = base.hf_config | {"_name_or_path": "/home/me/secret", "transformers_version": "4.1", "dtype": "float64"}
    export(base, tmp_path / "out", hf_config=source)
    said = read_json(tmp_path / "out" / "config.json")
    assert {k: said[k] for k in base.hf_config if k not in ("torch_dtype", "pad_token_id")} == {
        k: v for k, v in base.hf_config.items() if k not in ("torch_dtype", "pad_token_id")
    }
    assert not {"_name_or_path", "transformers_version"} & set(said)
    assert said["architectures"] == ["LlamaForCausalLM"]


def test_the_card_tells_the_facts(tmp_path: pathlib.Path, base: Pretrained):
    facts = {"base model": "org/name", "steps": 10, "note": "a|b", "license": "apache-2.0"}
    export(base, tmp_path / "out", facts=facts)
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "base_model: org/name\nlicense: apache-2.0\n---\n\n# out\n" in card
    assert "| steps | 10 |\n| note | a\\|b |" in card
    assert read_json(tmp_path / "out" / "jax_sft.json")["facts"] == facts


def test_the_card_names_no_local_path_as_base_model(tmp_path: pathlib.Path, base: Pretrained):
    export(base, tmp_path / "out", facts={"base model": "/home/me/model.gguf"})
    assert "base_model:" not in (tmp_path / "out" / "README.md").read_text()


def test_an_export_replaces_an_earlier_one_as_a_whole(tmp_path: pathlib.Path, base: Pretrained):
    export(base, tmp_path / "out", max_shard_size="10KB")
    export(base, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").glob("*.safetensors*")] == ["model.safetensors"]
    assert [p.name for p in tmp_path.iterdir() if p.name != "base"] == ["out"]


@pytest.mark.parametrize("folder", ["empty", "a/b/c"])
def test_an_empty_or_new_folder_with_new_parents_is_written_whole(
    tmp_path: pathlib.Path, base: Pretrained, folder: str
):
    (tmp_path / "empty").mkdir()
    export(base, tmp_path / folder)
    assert load_pretrained(tmp_path / folder).config == base.config


def test_somebody_elses_files_are_never_touched(tmp_path: pathlib.Path, base: Pretrained):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(ValueError, match="the folder is not empty and is no earlier export; name another one"):
        export(base, tmp_path / "mine")
    export(base, tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("added later")
    with pytest.raises(ValueError, match=r"beside an earlier export it holds notes\.txt; move that away first"):
        export(base, tmp_path / "out")
    with pytest.raises(ValueError, match="is a file; name a folder"):
        export(base, tmp_path / "out" / "notes.txt")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"
    assert (tmp_path / "out" / "notes.txt").exists()


def test_the_door_says_what_the_export_would_say(tmp_path: pathlib.Path, base: Pretrained):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    export(base, tmp_path / "broken")
    (tmp_path / "broken" / "jax_sft.json").write_text("[]")
    refused = {
        "mine": "the folder is not empty and is no earlier export; name another one",
        "mine/thesis.txt": "is a file; name a folder",
        "mine/thesis.txt/out": r"cannot be written there \(Not a directory\); name another folder",
        "broken": r"its jax_sft\.json cannot be read .*; name another folder",
    }
    for out, said in refused.items():
        for call in (check_destination, lambda out: export(base, out)):
            with pytest.raises(ValueError, match=f"export to .*{out}: {said}"):
                call(tmp_path / out)


def test_the_door_lets_good_folders_through_and_leaves_nothing(tmp_path: pathlib.Path, base: Pretrained):
    export(base, tmp_path / "old")
    (tmp_path / "empty").mkdir()
    for out in ("old", "empty", "new", "a/b/c"):
        check_destination(tmp_path / out, source=tmp_path / "base")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "empty", "old"]


def test_a_parent_that_cannot_be_written_is_known_at_the_door(tmp_path: pathlib.Path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(save.tempfile, "TemporaryDirectory", refuse)  # root may write everywhere
    with pytest.raises(ValueError, match=r"cannot be written there \(Permission denied\); name another folder"):
        check_destination(tmp_path / "a" / "out")


@pytest.mark.parametrize("out", ["model", "model/inside", "."])
@pytest.mark.parametrize("source", ["model", "model/weights.gguf"])
def test_the_source_is_never_written_to(tmp_path: pathlib.Path, base: Pretrained, out: str, source: str):
    if (source, out) == ("model/weights.gguf", "model/inside"):
        return  # beside the file: fine
    export(base, tmp_path / "model")  # an export of ours, which would otherwise be replaced
    (tmp_path / "link").symlink_to(tmp_path)
    said = r"it is, holds or lies in .*model.*, which the model was read from; name a folder beside it"
    for place in (tmp_path, tmp_path / "link"):
        with pytest.raises(ValueError, match=said):
            export(base, place / out, source=tmp_path / source)
        with pytest.raises(ValueError, match=said):
            check_destination(tmp_path / out, source=place / source)
    export(base, tmp_path / "model-2", source=tmp_path / source)


def test_a_disk_that_is_too_small_is_known_before_writing(tmp_path: pathlib.Path, base: Pretrained, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(
        OSError, match=r"export to .*out failed: 0\.00 GB are needed and 0\.00 GB are free; nothing was left"
    ):
        export(base, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_a_disk_that_fills_up_leaves_nothing_behind(tmp_path: pathlib.Path, base: Pretrained):
    export(base, tmp_path / "old")
    before = read_tensors(tmp_path / "old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # a real error of write(2), as a full disk gives
    try:
        for out in ("new", "old"):
            with pytest.raises(OSError, match="failed: File too large; nothing was left there, so free some space"):
                export(base, tmp_path / out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "old"]
    assert {k: x.tobytes() for k, x in read_tensors(tmp_path / "old").items()} == {
        k: x.tobytes() for k, x in before.items()
    }


@pytest.mark.parametrize("moment", ["weights", "renames"])
def test_a_killed_export_is_never_taken_for_a_whole_one(tmp_path: pathlib.Path, base: Pretrained, moment: str):
    export(base, tmp_path / "out", facts={"steps": 1})
    program = """
import os, pathlib, signal, sys
from jax_sft.hf import save
from tests.hf.test_save import export, load_model
base = load_model(sys.argv[1] + "/base")
def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "weights":
    save.save_tokenizer = die
else:
    real, seen = pathlib.Path.rename, []
    def rename(path, target):
        if seen: die()
        seen.append(path)
        return real(path, target)
    pathlib.Path.rename = rename
export(base, pathlib.Path(sys.argv[1] + "/out"), facts={"steps": 2})
"""
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path, moment],
        capture_output=True,
        env=os.environ | {"PYTHONPATH": "."},
        check=False,
    )
    assert done.returncode == -9, done.stderr.decode()
    (partial,) = tmp_path.glob(".out.partial")
    if moment == "weights":
        assert (partial / "model.safetensors").is_file()
        with pytest.raises(ValueError, match=r"has no config\.json"):
            resolve(partial)
        assert read_json(tmp_path / "out" / "jax_sft.json")["facts"] == {"steps": 1}
    else:
        assert not (tmp_path / "out").exists()
    export(base, tmp_path / "out", facts={"steps": 3})
    assert read_json(tmp_path / "out" / "jax_sft.json")["facts"] == {"steps": 3}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "out"]


def test_an_export_that_died_between_its_renames_keeps_the_old_one(tmp_path: pathlib.Path, base: Pretrained):
    export(base, tmp_path / "out", facts={"steps": 1})
    (tmp_path / "out").rename(tmp_path / ".out.old")
    with pytest.raises(ValueError, match="not finite"):
        export(base, tmp_path / "out", params=jax.tree.map(lambda x: x * jnp.inf, base.params))
    assert read_json(tmp_path / "out" / "jax_sft.json")["facts"] == {"steps": 1}


def test_every_process_learns_that_process_0_failed(tmp_path: pathlib.Path, base: Pretrained, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(save.multihost_utils, "broadcast_one_to_all", lambda ok: np.int32(0))
    with pytest.raises(OSError, match="process 0 could not write it"):
        export(base, tmp_path / "out")
    monkeypatch.setattr(save.multihost_utils, "broadcast_one_to_all", lambda ok: np.int32(1))
    assert export(base, tmp_path / "out") == []
    assert not (tmp_path / "out").exists()


TWO_PROCESSES = """
import os, pathlib, sys
import jax
rank, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=rank)
from jax_sft.config import MeshConfig
from jax_sft.sharding import make_mesh
from tests.hf.test_save import export, load_model
base = load_model(folder + "/base", mesh=make_mesh(MeshConfig(fsdp=2, tensor=2)))
assert not base.params["blocks"]["q_LDNH"].is_fully_addressable
files = export(base, pathlib.Path(folder + "/out"))
assert bool(files) == (rank == 0)
try:
    export(base, pathlib.Path(folder + "/base"))
except (OSError, ValueError) as error:
    print(type(error).__name__, error)
try:
    export(base, pathlib.Path(folder + "/infinite"), params=jax.tree.map(lambda x: x * float("inf"), base.params))
except ValueError as error:
    print("INFINITE", error)
from jax_sft.config import DataConfig
from jax_sft.exam import make_exam
exam = make_exam(base, DataConfig(train=(f"{folder}/rows{rank}.jsonl",)))  # the file of process 1 is not there
print("EXAM", pathlib.Path(exam.origin).name, len(exam.rows), exam.messages)
"""


def test_two_processes_export_what_one_does(tmp_path: pathlib.Path, base: Pretrained, two_processes: TwoProcesses):
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
    (tmp_path / "rows0.jsonl").write_text(json.dumps(row))
    said = two_processes(TWO_PROCESSES, tmp_path, 2)
    assert "ValueError export to" in said[0]
    assert "OSError export to" in said[1]
    for out in said:
        assert "INFINITE export: model.embed_tokens.weight holds values that are not finite" in out
        assert "EXAM rows0.jsonl 1 [{'role': 'user', 'content': 'hi'}]" in out
    export(base, tmp_path / "alone")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "alone" / "model.safetensors"
    ).read_bytes()


def test_padding_lies_over_the_mesh_and_leaves_with_no_export(tmp_path: pathlib.Path, base: Pretrained):
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=8))
    weights = write_folder(tmp_path / "m", TINY | {"vocab_size": 313})
    padded = load_pretrained(tmp_path / "m", vocab_multiple=128)
    params = load_params(padded, shardings=shard_params(abstract_params(padded.config), mesh))
    embed_VD = params["embed_VD"]
    assert embed_VD.shape[0] == 384 and embed_VD.sharding.spec[0] == "tensor"
    assert not np.asarray(embed_VD)[313:].any()
    assert padded.config.num_params == load_pretrained(tmp_path / "m").config.num_params
    export(padded, tmp_path / "out", params=params)
    read = read_tensors(tmp_path / "out")
    assert all(read[name].tobytes() == x.tobytes() for name, x in weights.items())
