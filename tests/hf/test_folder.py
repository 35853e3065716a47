"""Where a model lies, and what is said when it lies nowhere."""

import json
import pathlib
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors

from jax_sft.hf.folder import resolve, weight_files
from tests.hf.models import write_folder


def test_a_folder_and_a_gguf_file_are_themselves(tmp_path: pathlib.Path):
    write_folder(tmp_path / "model")
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    assert resolve(str(tmp_path / "model")) == tmp_path / "model"
    assert resolve(tmp_path / "x.gguf") == tmp_path / "x.gguf"


def test_a_missing_path_names_its_neighbour(tmp_path: pathlib.Path):
    write_folder(tmp_path / "SmolLM2-135M")
    with pytest.raises(ValueError, match=r"SmolLM-135M: no such folder or file; did you mean .*SmolLM2-135M\?"):
        resolve(tmp_path / "SmolLM-135M")
    with pytest.raises(ValueError, match="no such folder or file; a model of the hub is written org/name"):
        resolve("gpt2-nowhere")
    with pytest.raises(ValueError, match="no such folder or file"):
        resolve("models/missing.gguf")
    with pytest.raises(ValueError, match="it is empty; name a Hugging Face folder"):
        resolve("")


def test_a_file_that_is_no_gguf_is_refused(tmp_path: pathlib.Path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"is a \.safetensors file; name its folder"):
        resolve(tmp_path / "model.safetensors")


def test_a_folder_without_config_says_what_it_is(tmp_path: pathlib.Path):
    with pytest.raises(ValueError, match=r"has no config\.json, so it is no Hugging Face model"):
        resolve(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="is a LoRA adapter, not a model; name the base model"):
        resolve(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"name the file .*m\.gguf"):
        resolve(tmp_path)


def test_a_folder_without_safetensors_says_the_way_out(tmp_path: pathlib.Path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has a config\.json but no weights"):
        resolve(tmp_path)
    assert resolve(tmp_path, weights=False) == tmp_path
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"only as pytorch_model\.bin, a pickle.*AutoModelForCausalLM.*save_pretrained"
    ):
        resolve(tmp_path)


def test_a_missing_shard_is_named(tmp_path: pathlib.Path):
    write_folder(tmp_path / "m", shards=3)
    (tmp_path / "m" / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match=r"names 3 files and 1 are missing \(model-00002-of-00003\.safetensors\)"):
        resolve(tmp_path / "m")


def test_a_broken_index_is_named(tmp_path: pathlib.Path):
    write_folder(tmp_path / "m", shards=2)
    (tmp_path / "m" / "model.safetensors.index.json").write_text('{"weight_map": ')
    with pytest.raises(ValueError, match=r"index\.json: is not an index of safetensors"):
        resolve(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors.index.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"index\.json: is not an index of safetensors"):
        resolve(tmp_path / "m")


def test_the_copy_of_another_format_is_not_read(tmp_path: pathlib.Path):
    write_folder(tmp_path / "m")
    (tmp_path / "m" / "consolidated.safetensors").write_bytes(b"")
    assert [p.name for p in weight_files(tmp_path / "m")] == ["model.safetensors"]


def test_a_hub_id_is_downloaded_with_its_revision_and_without_pickles(tmp_path: pathlib.Path, monkeypatch):
    asked = {}

    def download(hub_id: str, **options):
        asked.update(options, hub_id=hub_id)
        return str(tmp_path / "cached")

    write_folder(tmp_path / "cached")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("org/name", revision="v1") == tmp_path / "cached"
    assert (asked["hub_id"], asked["revision"]) == ("org/name", "v1")
    assert "*.safetensors" in asked["allow_patterns"]
    assert not any("bin" in pattern for pattern in asked["allow_patterns"])
    resolve("org/name", weights=False)
    assert "*.safetensors" not in asked["allow_patterns"]


def test_a_hub_id_in_the_cache_works_offline(tmp_path: pathlib.Path, monkeypatch):
    commit = "0" * 40
    repo = tmp_path / "models--org--name"
    write_folder(repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert resolve("org/name").name == commit


def test_a_hub_id_offline_says_so(tmp_path: pathlib.Path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"org/name: is no folder here, is not in the hub's cache, and cannot be"):
        resolve("org/name")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (errors.RepositoryNotFoundError, "is neither a folder here nor a model on the hub; check its name"),
        (errors.GatedRepoError, "is gated on the hub; accept its terms there and set HF_TOKEN"),
        (errors.RevisionNotFoundError, "at revision v9: the hub has no such revision"),
        (ConnectionError, r"cannot be downloaded \(ConnectionError: no\); name a local folder"),
    ],
)
def test_each_refusal_of_the_hub_has_its_sentence(monkeypatch, error: type[Exception], said: str):
    def refuse(*_, **__):
        raise (
            error("no") if error is ConnectionError else error("no", response=SimpleNamespace(headers={}, request=None))
        )

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ValueError, match=said):
        resolve("org/name", revision="v9")


def test_a_folder_that_reads_like_a_hub_id_names_its_neighbour(tmp_path: pathlib.Path, monkeypatch):
    def refuse(*_, **__):
        raise errors.RepositoryNotFoundError("no", response=SimpleNamespace(headers={}, request=None))

    write_folder(tmp_path / "w1" / "export")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ValueError, match=r"w1/exprot: is neither a folder .*; did you mean w1/export\?$"):
        resolve("w1/exprot")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"w1/exprot: is no folder here.*; did you mean w1/export\?$"):
        resolve("w1/exprot")


def test_a_download_without_safetensors_is_refused(tmp_path: pathlib.Path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps({}))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(ValueError, match=r"org/name: has a config\.json but no weights"):
        resolve("org/name")
