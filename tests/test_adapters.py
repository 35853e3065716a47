"""Adapters at the doors: several on one base, written anew, merged, and refused where they do not belong."""

import dataclasses
import json
import pathlib
import re
import shutil
from typing import Any

import numpy as np
import pytest

import jax_sft
from jax_sft.assistant import load_assistant
from jax_sft.cli import main
from jax_sft.export import export_model, export_workdir
from jax_sft.hf.load import load_pretrained
from jax_sft.hf.tensorfile import read_header
from jax_sft.model.lora import Lora, Target, merged
from jax_sft.parameters import load_base, of_adapter, parameters
from jax_sft.train_loop import train
from tests.hf.family_cases import write_family
from tests.hf.peft_cases import random_adapter, write
from tests.tiny import CHATML, run_config, write_model

# Rows are spread and weights are not: XLA:CPU may deadlock where eight devices share two cores.
ROWS_ALONE = ("mesh.data=8", "mesh.fsdp=1")
PLAIN = CHATML.replace("\n", " ")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A tiny model, `one` and `two`: adapters on it, the second with a chat template of its own."""
    folder = tmp_path_factory.mktemp("adapters")
    for name, lr in (("one", "1e-2"), ("two", "3e-2")):
        config = run_config(folder, "lora.rank=4", "lora.base=float32", f"optim.lr={lr}", *ROWS_ALONE)
        train(config, folder / name, command="")
    (folder / "two" / "export" / "chat_template.jinja").write_text(PLAIN, encoding="utf-8")
    return folder


def of(place: pathlib.Path, *names: str) -> list[str]:
    return [str(place / name / "export") for name in names]


def test_several_adapters_share_a_base_and_each_speaks_for_itself(place: pathlib.Path):
    shutil.copytree(place / "one" / "export", place / "first", dirs_exist_ok=True)
    shutil.copytree(place / "two" / "export", place / "second", dirs_exist_ok=True)
    both = load_assistant(str(place / "model"), adapters=[str(place / "first"), str(place / "second")])
    assert both.adapters == ("first", "second")
    data = [str(place / "validation.jsonl")]
    found = {name: both.with_adapter(name).losses(data)[0].loss for name in (*both.adapters, None)}
    alone = load_assistant(str(place / "model"), adapters=[str(place / "second")])
    assert found["second"] == pytest.approx(alone.losses(data)[0].loss, rel=1e-6)
    assert found[None] == pytest.approx(load_assistant(str(place / "model")).losses(data)[0].loss, rel=1e-6)
    assert len({round(loss, 4) for loss in found.values()}) == 3
    assert both.base.chat_template == CHATML and both.with_adapter("second").base.chat_template == PLAIN
    with pytest.raises(ValueError, match="there is no adapter 'third'; those loaded are first, second"):
        both.with_adapter("third")


def test_a_broken_template_in_an_adapters_folder_is_named_there(place: pathlib.Path, tmp_path: pathlib.Path):
    shutil.copytree(place / "one" / "export", tmp_path / "a")
    file = tmp_path / "a" / "chat_template.jinja"
    file.write_text("{% for m in messages %}", encoding="utf-8")
    with pytest.raises(ValueError, match=rf"the chat template of {re.escape(str(file))} is not valid Jinja, line 1"):
        load_assistant(str(place / "model"), adapters=[str(tmp_path / "a")])
    file.write_bytes(b"\xff")
    with pytest.raises(ValueError, match=rf"{re.escape(str(file))}: cannot be read"):
        load_assistant(str(place / "model"), adapters=[str(tmp_path / "a")])
    assert load_assistant(str(place / "model"), adapters=[str(tmp_path / "a")], chat_template="chatml")


def test_a_run_whose_adapter_could_not_be_written_ends_before_it_starts(place: pathlib.Path, tmp_path: pathlib.Path):
    write_family(tmp_path / "model", "starcoder2")
    said = (f"model.path={tmp_path / 'model'}", "model.chat_template=chatml", "lora.rank=2", "lora.base=float32")
    config = run_config(place, *said, r"lora.modules_to_save=('model\\.norm\\.weight',)", *ROWS_ALONE)
    with pytest.raises(ValueError, match=r"PEFT saves model.norm as a whole, .*export.format = 'merged'"):
        train(config, tmp_path / "run", command="")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock"}


def test_a_tied_embedding_trained_in_full_under_an_adapted_head_comes_back_as_it_left(
    place: pathlib.Path, tmp_path: pathlib.Path
):
    said = ("lora.rank=2", "lora.base=float32", "lora.targets=('head',)", "lora.modules_to_save=('embeddings',)")
    config = run_config(place, *said, "train.steps=2", "export.certify=True", *ROWS_ALONE)
    train(config, tmp_path / "run", command="")  # PEFT agrees, where it is installed
    base = load_pretrained(place / "model")
    before, again = parameters(config, base), of_adapter(str(tmp_path / "run" / "export"), base)
    assert again.in_full == before.in_full == {"embed_VD"}
    assert again.lora == before.lora
    assert not again.adapter.base_params


def test_eval_compares_an_adapter_with_its_base(place: pathlib.Path, tmp_path: pathlib.Path):
    model, (one, two) = str(place / "model"), of(place, "one", "two")
    data, out = str(place / "validation.jsonl"), tmp_path / "out.json"
    flags = ["--model", model, "--adapter", one, "--adapter", two, "--against", model, "--data", data]
    assert main(["eval", *flags, "--out", str(out)]) == 0
    said = json.loads(out.read_text())
    assert said["loss"] < said["against"]["loss"]
    assert [*said["adapters"]] == [f"{model} + {two}"]


def test_chat_answers_with_an_adapter(place: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    flags = ["--prompt", "count to 3", "--greedy", "--max-new-tokens", "4"]
    assert main(["chat", "--model", str(place / "model"), "--adapter", *of(place, "two"), *flags]) == 0
    expected, alone = (
        jax_sft.load(place / "model", adapters=adapters).answer("count to 3", max_new_tokens=4).text
        for adapters in (of(place, "two"), ())
    )
    assert expected != alone
    assert capsys.readouterr().out.strip() == expected


def test_an_adapter_written_anew_is_the_same_file_and_merged_has_the_dtype_of_its_base(
    place: pathlib.Path, tmp_path: pathlib.Path
):
    (one,) = of(place, "one")
    export_model(str(place / "model"), tmp_path / "again", adapter=one, form="adapter", certified=False)
    file = "adapter_model.safetensors"
    assert (tmp_path / "again" / file).read_bytes() == (pathlib.Path(one) / file).read_bytes()
    names = [json.loads((pathlib.Path(f) / "adapter_config.json").read_text()) for f in (one, tmp_path / "again")]
    assert names[0]["base_model_name_or_path"] == names[1]["base_model_name_or_path"] == str(place / "model")
    export_model(str(place / "model"), tmp_path / "merged", adapter=one, certified=True)
    for form in ("adapter", "merged"):  # the second has a chat template of its own
        export_model(str(place / "model"), tmp_path / "two", adapter=of(place, "two")[0], form=form, certified=False)
        assert (tmp_path / "two" / "chat_template.jinja").read_text(encoding="utf-8") == PLAIN
    assert {e.dtype for e in read_header(tmp_path / "merged" / "model.safetensors").values()} == {"F32"}
    merged = load_assistant(str(tmp_path / "merged"))
    beside = load_assistant(str(place / "model"), adapters=[one])
    losses = [model.losses([str(place / "validation.jsonl")])[0].loss for model in (merged, beside)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_a_merge_that_changes_what_is_said_is_refused_and_one_that_does_not_says_by_how_much(
    place: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    model, (one,), out = str(place / "model"), of(place, "one"), tmp_path / "merged"

    def export() -> None:
        export_model(model, out, adapter=one, form="merged", dtype="float32", certified=True)

    with caplog.at_level("INFO", logger="jax_sft.export"):
        export()
    assert re.search(r"merged: logits up to [\d.]+ differ by \S+ from those of the adapters beside", caplog.text)
    assert "largest logit difference by merging" in (out / "README.md").read_text(encoding="utf-8")
    before = (out / "model.safetensors").read_bytes()

    def without_one(lora: Lora, weights: Any, factors: Any) -> Any:
        return merged(dataclasses.replace(lora, targets=lora.targets[1:]), weights, factors)

    monkeypatch.setattr("jax_sft.export.merged", without_one)
    with pytest.raises(ValueError, match=r"(?s)merged model's logits differ by .*export with --format adapter instead"):
        export()
    assert (out / "model.safetensors").read_bytes() == before


def test_what_an_adapter_holds_of_its_base_is_written_anew_with_it(place: pathlib.Path, tmp_path: pathlib.Path):
    base = load_pretrained(place / "model")
    adapter = random_adapter(base.config, Target(path="embed_VD", ranks=(2,), scales=(1.0,)))
    table = np.ones((base.config.vocab_rows, base.config.width), np.float32)  # not the base's own any more
    adapter = dataclasses.replace(adapter, base_params={"embed_VD": table})
    more = {"eva_config": {"rho": 2}, "r": 1, "lora_alpha": 1}
    said = {"source_config": more, "config": base.config, "tokenizer": base.tokenizer, "hf_config": base.hf_config}
    write(tmp_path / "a", "llama", adapter, chat_template=base.chat_template, **said)
    export_model(str(place / "model"), tmp_path / "b", adapter=str(tmp_path / "a"), form="adapter", certified=False)
    first, second = (tmp_path / name / "adapter_model.safetensors" for name in "ab")
    assert "base_model.model.model.embed_tokens.base_layer.weight" in read_header(first)
    assert first.read_bytes() == second.read_bytes()
    first, second = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in "ab")
    assert first == second and first["eva_config"] == {"rho": 2}


def test_export_takes_one_adapter_and_a_form_that_fits(
    place: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
):
    one, two = of(place, "one", "two")
    model, out = str(place / "model"), str(tmp_path / "out")
    refused = {
        "given twice": ["--model", model, "--adapter", one, "--adapter", two],
        "has no place for an adapter": ["--model", model, "--adapter", one, "--format", "full"],
        "needs adapters": ["--model", model, "--format", "merged"],
        "has nothing to write": ["--workdir", str(place / "one"), "--format", "full"],
        "belongs to --model": ["--workdir", str(place / "one"), "--adapter", one],
    }
    for words, flags in refused.items():
        assert main(["export", *flags, "--out", out]) == 1
        assert words in capsys.readouterr().err


def test_a_base_with_other_weights_is_refused_at_every_door(place: pathlib.Path, tmp_path: pathlib.Path):
    other = tmp_path / "other"
    write_model(other, seed=1)
    (one,) = of(place, "one")
    with pytest.raises(ValueError, match=r"was trained on .*model \(weights .*\), and the model is .*other"):
        load_assistant(str(other), adapters=[one])
    with pytest.raises(ValueError, match="was trained on"):
        train(run_config(place, f"lora.adapter={one}", f"model.path={other}"), tmp_path / "on", command="")
    shutil.copytree(place / "model", tmp_path / "kept")
    shutil.copytree(other, place / "model", dirs_exist_ok=True)
    try:
        for form in ("adapter", "merged"):
            with pytest.raises(ValueError, match="was trained on other weights .* than .* holds now"):
                export_workdir(place / "one", tmp_path / "out", form=form)
        with pytest.raises(ValueError, match="bring back the weights that were there then"):
            load_assistant(str(place / "model"), adapters=[one])
    finally:
        shutil.copytree(tmp_path / "kept", place / "model", dirs_exist_ok=True)


def test_an_adapter_that_changed_under_a_run_is_refused(place: pathlib.Path, tmp_path: pathlib.Path):
    start = tmp_path / "start"
    shutil.copytree(place / "one" / "export", start)
    config = run_config(place, f"lora.adapter={start}", "lora.base=float32", "train.steps=2", *ROWS_ALONE)
    train(config, tmp_path / "run", command="")
    file = start / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 80}), encoding="utf-8")
    with pytest.raises(ValueError, match="the adapter that the run went on from has changed since"):
        export_workdir(tmp_path / "run", tmp_path / "out")
    with pytest.raises(ValueError, match=r"cannot go on with another configuration"):
        train(config, tmp_path / "run", command="")


def test_training_goes_on_with_the_template_of_the_adapter_unless_the_config_names_one(place: pathlib.Path):
    one, two = of(place, "one", "two")
    assert load_base(run_config(place, f"lora.adapter={one}")).chat_template == CHATML
    assert load_base(run_config(place, f"lora.adapter={two}")).chat_template == PLAIN
    named = load_base(run_config(place, f"lora.adapter={two}", "model.chat_template=alpaca"))
    assert named.chat_template not in (CHATML, PLAIN)


def test_a_run_does_not_replace_the_adapter_it_goes_on_from(place: pathlib.Path, tmp_path: pathlib.Path):
    shutil.copytree(place / "one" / "export", tmp_path / "run" / "export")
    config = run_config(place, f"lora.adapter={tmp_path / 'run' / 'export'}")
    with pytest.raises(ValueError, match="is where this run puts its own export, which would replace it"):
        train(config, tmp_path / "run", command="")
