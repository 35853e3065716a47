"""Every module stands on a floor and imports only downwards; this is the table, and the README's tree follows it."""

import ast
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "jax_sft"

# A room is a module of jax_sft, or a folder with all that is in it.
FLOORS = {
    0: {"config", "batch", "disk", "memory", "sharding"},  # the words
    1: {"model", "data"},  # two rooms without a door between them
    2: {
        "loss",
        "optim",
        "train_step",
        "seal",
        "checkpoint",
        "hf",
        "parameters",
        "generate",
        "evaluate",
        "report",
        "metrics",
        "step_log",
        "agreement",
        "stream_state",
        "cost",
        "manifest",
        "memory_plan",
        "progress",
        "signals",
    },  # the verbs
    3: {
        "evaluations",
        "run_data",
        "run_progress",
        "origin",
        "interpolate",
        "score",
        "train_loop",
        "certificate",
        "exam",
        "export",
        "assistant",
        "chat",
    },  # the story: side effects
    4: {"cli", "__main__", "__init__"},  # the doors
}
FLOOR_OF = {room: floor for floor, rooms in FLOORS.items() for room in rooms}

# Who may lean on a neighbour of the same floor. No two lean on each other.
SIDEWAYS = {
    "sharding": {"batch", "config"},
    "train_step": {"loss", "optim"},
    "checkpoint": {"progress", "seal"},
    "parameters": {"hf"},
    "evaluate": {"generate", "loss"},
    "report": {"evaluate"},
    "step_log": {"loss", "metrics", "train_step"},
    "manifest": {"cost", "metrics"},
    "stream_state": {"metrics"},
    "certificate": {"exam"},
    "export": {"certificate", "exam", "interpolate"},
    "interpolate": {"assistant"},
    "evaluations": {"exam", "origin"},
    "run_progress": {"evaluations"},
    "train_loop": {"evaluations", "exam", "export", "origin", "run_data", "run_progress"},
    "chat": {"assistant"},
    "__main__": {"cli"},
}

NO_JAX = {
    "config",
    "batch",
    "disk",
    "memory",
    "data",
    "report",
}  # data workers are processes of their own: starting jax in them costs seconds and a GPU
JAX = {"jax", "jaxlib", "flax", "optax", "orbax", "chex"}
NEVER = {"torch", "tensorflow"}
A_PROCESS_OF_ITS_OWN = {"jax_sft.hf.by_transformers"}  # and so may import torch


def imports(tree: ast.AST, module: str) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of everything `module` imports, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            # `from jax_sft import data` names a room only in its second half.
            yield from ((f"{base}.{alias.name}" if base == "jax_sft" else base, node.lineno) for alias in node.names)


def violations(source: str, module: str) -> list[str]:
    """What breaks the table in the source of `module` (dotted, from jax_sft on), each with its line."""
    room = module.split(".")[1]
    if room not in FLOOR_OF:
        return [f"0: {room} stands on no floor; give it one in tests/test_floors.py and a line in the README's tree"]
    found = []
    for name, line in imports(ast.parse(source), module):
        top, _, rest = name.partition(".")
        if (top in NEVER and module not in A_PROCESS_OF_ITS_OWN) or (top in JAX and room in NO_JAX):
            found.append(f"{line}: {room} must not import {top}")
        target = rest.split(".")[0]
        if top != "jax_sft" or target == room:
            continue
        if target not in FLOOR_OF:
            found.append(f"{line}: {room} imports {target or 'jax_sft'}, which stands on no floor")
        elif FLOOR_OF[target] >= FLOOR_OF[room] and target not in SIDEWAYS.get(room, ()):
            found.append(
                f"{line}: {room} on floor {FLOOR_OF[room]} imports {target} on floor {FLOOR_OF[target]}; go downwards"
            )
        elif target == "sharding" and room in NO_JAX:
            found.append(f"{line}: {room} must not import sharding, which imports jax")
    return found


def modules() -> list[tuple[pathlib.Path, str]]:
    """Every file of the package with its dotted name."""
    files = sorted(PACKAGE.rglob("*.py"))
    return [(f, ".".join(["jax_sft", *f.relative_to(PACKAGE).with_suffix("").parts])) for f in files]


def test_modules_import_only_downwards():
    wrong = [f"{file}:{fault}" for file, module in modules() for fault in violations(file.read_text("utf-8"), module)]
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        (
            "jax_sft.model.decoder",
            "import numpy\nfrom jax_sft.data.chat import ChatTemplate",
            r"2: model .* imports data",
        ),
        ("jax_sft.data.loader", "def f():\n    from jax_sft import model", r"2: data .* imports model"),
        ("jax_sft.data.loader", "from jax_sft.sharding import make_mesh", "1: data must not import sharding"),
        ("jax_sft.data.loader", "import jax.numpy as jnp", "1: data must not import jax"),
        ("jax_sft.data.loader", "from ..train_loop import train", r"1: data .* imports train_loop"),
        ("jax_sft.loss", "from jax_sft import train_step", r"1: loss .* imports train_step"),
        ("jax_sft.hf.load", "import torch", "1: hf must not import torch"),
        ("jax_sft.helpers", "", "helpers stands on no floor"),
        ("jax_sft.cli", "from jax_sft.helpers import f", "1: cli imports helpers, which stands on no floor"),
    ],
)
def test_an_import_upwards_is_found_with_its_line(module: str, source: str, fault: str):
    (found,) = violations(source, module)
    assert re.search(fault, found)


def test_neighbours_do_not_lean_on_each_other():
    def reaches(room: str, seen: frozenset[str]) -> set[str]:
        return {room}.union(*(reaches(n, seen | {n}) for n in SIDEWAYS.get(room, ()) if n not in seen))

    for room, neighbours in SIDEWAYS.items():
        assert all(FLOOR_OF[n] == FLOOR_OF[room] for n in neighbours)
        assert room not in set().union(*(reaches(n, frozenset({n})) for n in neighbours))


def test_data_never_starts_jax():
    data = [module.removesuffix(".__init__") for _, module in modules() if module.startswith("jax_sft.data.")]
    program = f"import sys, {', '.join(data)}; print(sorted({JAX!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_importing_the_package_starts_no_jax():
    done = subprocess.run(
        [sys.executable, "-c", "import sys, jax_sft, jax_sft.cli; print('jax' in sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "False"
