"""A certificate says what was read back, and an export that does not hold what was trained gets none that passes."""

import importlib.util
import json
import shutil
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jax_sft import certificate, export, progress
from jax_sft.config import MeshConfig
from jax_sft.exam import digests_of, make_exam
from jax_sft.export import export_model, export_workdir, write_export
from jax_sft.hf import by_transformers
from jax_sft.hf.folder import CERTIFICATE
from jax_sft.hf.load import load_model
from jax_sft.sharding import make_mesh
from jax_sft.train_loop import train
from tests.tiny import CHATML, run_config, write_model

HAS_TORCH = importlib.util.find_spec("torch") is not None


def read(folder):
    return json.loads((folder / CERTIFICATE).read_text())


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A finished run of two steps, exported in bfloat16, with its certificate."""
    place = tmp_path_factory.mktemp("certified")
    config = run_config(
        place, "export.certify=True", "export.dtype=bfloat16", "train.steps=2", "evaluate.prompts=('hi',)"
    )
    outcome = train(config, place / "run", command="jax-sft train")
    assert outcome.finished
    return place


def test_a_run_ends_with_a_certificate_of_what_was_read_back(place):
    said = read(place / "run" / "export")
    assert (said["verdict"], said["problems"], said["dtype"]) == ("passed", [], "bfloat16")
    assert said["rows"]["from"] == str(place / "validation.jsonl")
    assert len(said["rows"]["tokens"]) == 4 and said["rows"]["positions_compared"] == 4 * 32
    own = said["jax_sft"]
    assert own["largest_difference"] == 0
    assert 0 < own["largest_difference_by_rounding"] < 0.1 * own["largest_logit"]
    assert own["same_top_token_after_rounding"] > 0.5
    assert said["answer"]["messages"] == [{"role": "user", "content": "hi"}]
    assert said["answer"]["stop_tokens"] == ["<|im_end|>"]
    assert isinstance(said["answer"]["stopped"], bool) and said["answer"]["tokens"] > 0
    assert set(said["sha256"]) == {"model.safetensors"}


@pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed: EXTRAS=oracle bash launch/test.sh")
def test_transformers_reads_the_same_logits(place):
    told = read(place / "run" / "export")["transformers"]
    assert told["missing_keys"] == told["unexpected_keys"] == []
    assert told["largest_difference"] <= 1e-4 * read(place / "run" / "export")["jax_sft"]["largest_logit"]


def without_transformers(monkeypatch):
    monkeypatch.setattr(certificate, "why_not_here", lambda _, **__: "left out by the test")


def test_a_folder_with_a_certificate_may_be_replaced_by_the_next_export(place, tmp_path, monkeypatch):
    without_transformers(monkeypatch)
    for dtype in ("bfloat16", "float32"):
        export_workdir(place / "run", tmp_path / "out", dtype=dtype)
        assert read(tmp_path / "out")["dtype"] == dtype
    assert read(tmp_path / "out")["jax_sft"]["largest_difference_by_rounding"] == 0
    assert read(tmp_path / "out")["transformers"] == {"skipped": "left out by the test"}
    export_workdir(place / "run", tmp_path / "out", certified=False)
    assert not (tmp_path / "out" / CERTIFICATE).exists()


def test_a_rewritten_model_is_certified_on_texts_of_the_certificates_own(place, tmp_path, monkeypatch):
    without_transformers(monkeypatch)
    export_model(str(place / "model"), tmp_path / "out")
    assert read(tmp_path / "out")["rows"]["from"] == "texts of the certificate's own"


def test_data_that_is_gone_is_replaced_by_texts_of_its_own(place, tmp_path, caplog):
    base = load_model(place / "model")
    config = run_config(place, f"data.validation=('{tmp_path}/gone.jsonl',)")
    with caplog.at_level("INFO", logger="jax_sft"):
        exam = make_exam(base, config.data)
    assert exam.origin == "texts of the certificate's own" and len(exam.rows) == 3
    assert "the data cannot be read again" in caplog.text and "gone.jsonl" in caplog.text
    assert exam.messages[-1]["role"] == "user"


def damaged_after(monkeypatch, damage):
    """Exports whose folder is damaged between the writing and the reading back."""
    real = export.save_model

    def save(out, **rest):
        real(out, **rest)
        damage(out)

    monkeypatch.setattr(export, "save_model", save)


def flip_a_weight(folder):
    held = bytearray((folder / "model.safetensors").read_bytes())
    held[-3] ^= 0x40  # in the exponent of one of the last tensor's numbers
    (folder / "model.safetensors").write_bytes(held)


def damage_a_row_a_little(folder):
    held = load_file(folder / "model.safetensors")
    held["model.embed_tokens.weight"][263] *= np.float32(1.001)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})


def change(name, key, value):
    def damage(folder):
        said = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(said | {key: value}))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_weight, r"other bits were read back in .*; logits read back differ by"),
        (damage_a_row_a_little, r"other bits were read back in embed_VD; logits"),
        (change("generation_config.json", "eos_token_id", [3]), r"the stop ids are \[3, .*trained were"),
        (change("config.json", "rms_norm_eps", 0.5), "config.json is read as norm_eps = 0.5, trained was 1e-05"),
        (lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"), "chat template is another one"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"cut"), r"it cannot be read: .*model\.safetensors"),
    ],
)
def test_a_folder_that_does_not_hold_what_was_trained_fails_and_says_how(place, tmp_path, monkeypatch, damage, message):
    without_transformers(monkeypatch)
    damaged_after(monkeypatch, damage)
    with pytest.raises(ValueError, match=f"the export does not hold what was trained: .*{message}"):
        export_model(str(place / "model"), tmp_path / "out", dtype="float32")
    said = read(tmp_path / "out")
    assert said["verdict"] == "failed" and said["problems"]


@pytest.mark.parametrize(
    ("facts", "shift", "message"),
    [
        ({"missing_keys": ["model.norm.weight"]}, 0, "transformers finds missing keys: model.norm.weight"),
        ({"unexpected_keys": ["head"]}, 0, "transformers finds unexpected keys: head"),
        ({}, 1, "logits of transformers differ by 1"),
    ],
)
def test_what_transformers_finds_wrong_fails_the_certificate(place, tmp_path, monkeypatch, facts, shift, message):
    ours = {}
    real = certificate.logits_of

    def logits(base, params, exam, lora=None):
        ours.setdefault("first", real(base, params, exam, lora=lora))
        return real(base, params, exam, lora=lora)

    def reading(folder, rows, *, positions, adapter):
        told = {"version": "5", "torch": "2", "missing_keys": [], "unexpected_keys": []} | facts
        return by_transformers.Reading([row + np.float32(shift) for row in ours["first"]], told)

    monkeypatch.setattr(certificate, "why_not_here", lambda _, **__: None)
    monkeypatch.setattr(certificate, "logits_of", logits)
    monkeypatch.setattr(certificate, "read_by_transformers", reading)
    with pytest.raises(ValueError, match=message):
        export_model(str(place / "model"), tmp_path / "out", dtype="float32")


def test_a_model_that_makes_much_of_little_is_compared_with_what_a_nudge_does(place, tmp_path, monkeypatch):
    first = []

    def reading(folder, rows, *, positions, adapter):
        told = {"version": "5", "torch": "2", "missing_keys": [], "unexpected_keys": []}
        return by_transformers.Reading([row + np.float32(0.5) for row in first[0]], told)

    def logits(base, params, exam, lora=None):
        found = certificate_logits(base, params, exam, lora=lora)
        first.append(found)
        return found + np.float32(len(first) > 1)  # the nudge moves them by 1, and so more than transformers does

    certificate_logits = certificate.logits_of
    monkeypatch.setattr(certificate, "why_not_here", lambda _, **__: None)
    monkeypatch.setattr(certificate, "logits_of", logits)
    monkeypatch.setattr(certificate, "read_by_transformers", reading)
    export_model(str(place / "model"), tmp_path / "out", dtype="float32")
    said = read(tmp_path / "out")
    assert said["verdict"] == "passed" and len(first) == 2
    assert said["transformers"]["largest_difference"] == pytest.approx(0.5, abs=1e-3)
    assert said["transformers"]["largest_difference_by_a_nudge_of_1e-6"] == pytest.approx(1, abs=1e-2)


@pytest.mark.parametrize("reason", ["its process was killed by signal 9", "it took longer than 1800 s"])
def test_a_second_opinion_that_cannot_be_had_is_no_failure(place, tmp_path, monkeypatch, reason):
    def no_reading(*_, **__):
        raise by_transformers.UnreadError(reason)

    monkeypatch.setattr(certificate, "why_not_here", lambda _, **__: None)
    monkeypatch.setattr(certificate, "read_by_transformers", no_reading)
    export_model(str(place / "model"), tmp_path / "out", dtype="float32")
    assert read(tmp_path / "out")["verdict"] == "passed"
    assert read(tmp_path / "out")["transformers"] == {"skipped": reason}


def test_each_stage_of_an_export_is_named_while_it_lasts(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "_DELAY_SECONDS", 0.0)
    monkeypatch.setattr(certificate, "why_not_here", lambda _, **__: None)

    def slow_reading(folder, rows, *, positions, adapter):
        time.sleep(0.2)
        raise by_transformers.UnreadError("asleep")

    monkeypatch.setattr(certificate, "read_by_transformers", slow_reading)
    export_workdir(place / "run", tmp_path / "out")
    said = capsys.readouterr().err
    stages = ["restoring step 2", "asking the trained model", "asking the export", "asking transformers"]
    places = [said.find(f"{name}: 00:0") for name in stages]
    assert -1 not in places and places == sorted(places), said


def test_a_killed_child_is_no_opinion(monkeypatch):
    monkeypatch.setattr(by_transformers.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="ended with status 1"):
        by_transformers.read_by_transformers("x", [[1]], positions=1)
    done = subprocess.CompletedProcess([], -9, "", "")
    monkeypatch.setattr(by_transformers.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(by_transformers.UnreadError, match="killed by signal 9"):
        by_transformers.read_by_transformers("x", [[1]], positions=1)
    done.returncode, done.stderr = 1, "ValueError: ... does not recognize this architecture. This"
    with pytest.raises(by_transformers.UnreadError, match="does not know the model type"):
        by_transformers.read_by_transformers("x", [[1]], positions=1)


def test_a_row_that_the_template_refuses_is_not_what_the_model_is_asked(place, tmp_path):
    template = "{% if messages[0]['role'] == 'assistant' %}{{ raise_exception('user first') }}{% endif %}" + CHATML
    (tmp_path / "t.jinja").write_text(template)
    says = [{"role": role, "content": text} for role, text in (("assistant", "hi"), ("user", "a"), ("assistant", "b"))]
    with (tmp_path / "v.jsonl").open("w") as file:
        for messages in (says, says[1:]):
            file.write(json.dumps({"messages": messages}) + "\n")
    base = load_model(place / "model", chat_template=tmp_path / "t.jinja")
    exam = make_exam(base, run_config(place, f"data.validation=('{tmp_path}/v.jsonl',)").data)
    assert exam.messages == [{"role": "user", "content": "a"}] and len(exam.rows) == 1


def test_too_little_memory_to_ask_the_trained_model_still_gives_an_export(place, tmp_path, monkeypatch):
    def no_memory(*_, **__):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr("jax_sft.exam.logits_of", no_memory)
    export_model(str(place / "model"), tmp_path / "out", dtype="float32")
    said = read(tmp_path / "out")
    assert (said["verdict"], said["reason"]) == ("not made", "no memory was left to ask the trained model")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_digest_tells_every_bit_and_its_place_however_the_weights_lie():
    x = np.random.default_rng(0).standard_normal((6, 8)).astype(np.float32)
    swapped, flipped = x.copy(), x.copy()
    swapped[[0, 1]] = x[[1, 0]]
    flipped.view(np.uint32)[5, 7] ^= 1
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=4))
    cut = jax.device_put(x, jax.NamedSharding(mesh, jax.P("fsdp", "tensor")))
    found = [digests_of({"a": {"x": jnp.asarray(v)}})["a.x"] for v in (x, swapped, flipped, np.full_like(x, -0.0))]
    found += [digests_of({"a": {"x": jnp.zeros_like(x)}})["a.x"]]
    assert len(set(found)) == 5
    assert digests_of({"a": {"x": cut}}) == {"a.x": found[0]}


def test_too_little_memory_to_read_it_back_is_no_failure_and_is_told(place, tmp_path, monkeypatch, caplog):
    def load(*_, **__):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(certificate, "load_params", load)
    with caplog.at_level("INFO", logger="jax_sft"):
        export_model(str(place / "model"), tmp_path / "out", dtype="float32")
    assert (read(tmp_path / "out")["verdict"], "no memory is left" in caplog.text) == ("not made", True)


def test_the_parameters_are_given_up_before_the_folder_is_read_back(place, tmp_path, monkeypatch):
    base = load_model(place / "model", mesh=make_mesh(MeshConfig(data=4, fsdp=2)))
    leaves = jax.tree.leaves(base.params)
    real, seen = certificate.load_params, []

    def load(*args, **kwargs):
        seen.extend(leaf.is_deleted() for leaf in leaves)
        return real(*args, **kwargs)

    without_transformers(monkeypatch)
    monkeypatch.setattr(certificate, "load_params", load)
    told = export.Export(out=tmp_path / "out", dtype="float32", facts={}, exam=make_exam(base))
    write_export(base, base.params, told)
    assert seen and all(seen)
    assert read(tmp_path / "out")["verdict"] == "passed"


def test_a_base_model_without_a_template_is_certified_without_an_answer(tmp_path, monkeypatch):
    without_transformers(monkeypatch)
    folder = write_model(tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    said = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in said.items() if k != "chat_template"}))
    export_model(str(folder), tmp_path / "out")
    said = read(tmp_path / "out")
    assert said["verdict"] == "passed" and "answer" not in said


def test_why_transformers_is_not_asked(monkeypatch):
    monkeypatch.setattr(by_transformers.importlib.util, "find_spec", lambda name: None if name == "torch" else object())
    assert by_transformers.why_not_here(1) == "torch is not installed"
    monkeypatch.setattr(by_transformers.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(by_transformers, "_free_bytes", lambda: 8_000_000_000)
    assert by_transformers.why_not_here(1_000_000_000) is None
    assert by_transformers.why_not_here(2_000_000_000) == "it needs 9.0 GB of host memory, and 8.0 GB are free"


@pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed: EXTRAS=oracle bash launch/test.sh")
def test_a_folder_that_transformers_cannot_read_is_said_with_its_last_line(place, tmp_path):
    shutil.copytree(place / "model", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(RuntimeError, match="header|Error"):
        by_transformers.read_by_transformers(tmp_path / "model", [[1, 2, 3]], positions=2)
