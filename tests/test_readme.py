"""The README tells the truth: its tree, its commands, its links and its config example."""

import pathlib
import re
import shlex
import subprocess
from collections.abc import Iterator

import pytest

from jax_sft import cli, config

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
README = (REPOSITORY / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    """The fenced code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def shell_commands() -> Iterator[str]:
    for block in blocks("bash"):
        yield from (line for line in block.splitlines() if line and not line.startswith("#"))


JAX_SFT_COMMANDS = [c for c in shell_commands() if c.startswith("jax-sft ")]
SCRIPTS = sorted(set(re.findall(r"bash (\S+\.sh|\.ci/run)", README)))
LINKS = sorted({link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link})


def printed_tree() -> dict[str, list[str]]:
    """`{"": top level names, "jax_sft/": names in it}` as the README prints them."""
    (tree,) = (block for block in blocks("text") if "jax_sft/\n" in block)
    names: dict[str, list[str]] = {"": []}
    parent = ""
    for line in tree.splitlines():
        name = line.split()[0]
        if line.startswith("  "):
            names[parent].append(name)
        else:
            parent = name
            names[""].append(name)
            names.setdefault(name, [])
    return names


def in_package() -> list[str]:
    """Modules and folders of the package as the README would print them."""
    paths = [p for p in (REPOSITORY / "jax_sft").iterdir() if p.name != "__pycache__"]
    rooms = [f"{p.name}/" for p in paths if p.is_dir() and any(p.glob("*.py"))]
    return sorted(rooms + [p.name for p in paths if p.suffix == ".py"])


def tracked_folders() -> set[str]:
    """Top-level folders that git knows; none outside a git repository."""
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=False).stdout
    return {f"{name.split('/')[0]}/" for name in listed.splitlines() if "/" in name and not name.startswith(".")}


def test_the_tree_is_the_tree_on_disk():
    tree = printed_tree()
    assert sorted(tree["jax_sft/"]) == in_package()
    assert all((REPOSITORY / folder).is_dir() for folder in tree[""])
    assert tracked_folders() <= set(tree[""])


def test_there_are_commands_to_check():
    assert {shlex.split(c)[1] for c in JAX_SFT_COMMANDS} >= {"train", "data", "eval", "chat"}


@pytest.mark.parametrize("command", JAX_SFT_COMMANDS)
def test_command_is_accepted_by_the_door(command: str):
    words = shlex.split(command, comments=True)[1:]
    overrides = [w.removeprefix("--config.") for w in words if w.startswith("--config.")]
    cli.build_parser().parse_args(
        [w for w in words if not w.startswith("--config.")]
    )  # exits on a flag it does not know
    config.from_config_dict(example_config(), overrides)


def test_the_contract_names_every_command():
    (contract,) = (block for block in blocks("text") if block.startswith("jax-sft "))
    documented = {line.split()[1]: set(re.findall(r"--[a-z-]+(?!\.)\b", line)) for line in contract.splitlines()}
    (commands,) = (a.choices for a in cli.build_parser()._actions if isinstance(a.choices, dict))
    assert set(documented) == set(commands)
    for name, flags in documented.items():
        known = set(commands[name]._option_string_actions)
        assert flags - {"--config"} <= known, f"jax-sft {name} has no {flags - known}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_exists(script: str):
    assert (REPOSITORY / script).is_file()


@pytest.mark.parametrize("link", LINKS)
def test_link_leads_somewhere(link: str):
    assert (REPOSITORY / link).exists()


def example_config():
    (source,) = (block for block in blocks("python") if "def get_config" in block)
    scope: dict = {}
    exec(compile(source, "README.md", "exec"), scope)
    return scope["get_config"]()


def test_the_example_config_is_valid():
    run = config.from_config_dict(example_config())
    assert run.model.path
    assert run.train.epochs == 2.0


def test_keys_named_in_the_text_exist():
    sections = {key.split(".")[0] for key in config.known_keys() if "." in key}
    files = {"config.py", "train.jsonl", "data.html"}
    named = set(re.findall(rf"`((?:{'|'.join(sections)})\.[a-z_]+)`", README)) - files
    assert named
    assert named <= set(config.known_keys())
