"""Runs of LoRA, DoRA and QLoRA keep the promises of full runs: one normaliser, packing, exports, exact resumes."""

import contextlib
import functools
import json
import math
import operator
import os
import pathlib
import shutil
import socket
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts
from safetensors.numpy import load_file

from jax_sft.batch import Batch
from jax_sft.checkpoint import Checkpoints
from jax_sft.exam import logits_of, make_exam
from jax_sft.export import export_workdir
from jax_sft.hf.load import load_configured, load_params, load_pretrained
from jax_sft.hf.peft import read_adapter
from jax_sft.model.decoder import abstract_params
from jax_sft.optim import optimizer
from jax_sft.parameters import joined, parameters
from jax_sft.sharding import make_mesh, shard_params
from jax_sft.signals import Signals
from jax_sft.train_loop import train
from jax_sft.train_step import abstract_state
from tests.adapted import ROWS, assert_close, rows_of, run_of, sequences, uneven_batch
from tests.tiny import run_config, write_model

REPOSITORY = pathlib.Path(__file__).parent.parent
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"targets": ("all-linear", "embeddings", "head")},
    "dora": {"dora": True},
    "qlora": {"base": "nf4"},
}
of_each_kind = pytest.mark.parametrize("kind", KINDS)

# Charter 1 and 2, step by step.


@of_each_kind
@pytest.mark.parametrize(
    ("sizes", "accumulation"),
    [((1, 1, 1), 8), ((1, 8, 1), 1), ((1, 4, 2), 2), ((2, 2, 2), 1)],
    ids=["8x1", "fsdp8", "2x4 on fsdp4-tensor2", "data2-fsdp2-tensor2"],
)
def test_micro_batches_and_meshes_change_only_float_error(kind: str, sizes: Any, accumulation: int):
    params, metrics = run_of(**KINDS[kind]).after(2)
    other, of_other = run_of(sizes, accumulation=accumulation, **KINDS[kind]).after(2)
    assert_close(other, params, atol=5e-6)
    assert of_other.tally.mean()["loss"] == pytest.approx(metrics.tally.mean()["loss"], rel=2e-6)
    np.testing.assert_allclose(of_other.grad_norm, metrics.grad_norm, rtol=2e-5)
    assert metrics.grad_norm > 0.5 and metrics.finite


@of_each_kind
def test_evaluation_does_not_move_with_the_batch_size(kind: str):
    run = run_of(**KINDS[kind])
    batch, params = uneven_batch(), run.init().params
    totals: list[dict[str, float]] = []
    for size in (2, 8):
        parts = [Batch(*(jnp.asarray(x[i : i + size]) for x in batch)) for i in range(0, ROWS, size)]
        tallies = [jax.device_get(run.evaluate(params, run.frozen, part)) for part in parts]
        totals.append(functools.reduce(operator.add, tallies).mean())
    assert totals[1] == pytest.approx(totals[0], rel=1e-6)


@of_each_kind
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 4, 2)], ids=["one device", "fsdp4-tensor2"])
def test_packed_equals_unpacked(kind: str, sizes: Any):
    run = run_of(sizes, **KINDS[kind])
    items = sequences((5, 9, 8, 3, 6, 10, 4, 12))
    packed, alone = rows_of(items[:3], items[3:6], items[6:]), rows_of(*([item] for item in items))
    assert packed.segments_BT.max() == 3
    start = jax.device_get(run.init().params)
    (params, metrics), (other, of_other) = run.after(1, packed, factors=start), run.after(1, alone, factors=start)
    assert of_other.tally.mean()["loss"] == pytest.approx(metrics.tally.mean()["loss"], rel=1e-6)
    np.testing.assert_allclose(of_other.grad_norm, metrics.grad_norm, rtol=1e-5)
    assert_close(other, params, atol=2e-6)


# Charter 7 and 8, whole runs.

OVERRIDES = {
    "lora": ["lora.rank=4", "lora.targets=('all-linear','head')", "lora.base=float32"],
    "dora": ["lora.rank=4", "lora.dora=true", "lora.rslora=true", "lora.modules_to_save=('norms',)", "lora.base=int8"],
    "qlora": ["lora.rank=4", "lora.base=nf4", "lora.dropout=0.1", "lora.b_lr_ratio=4.0"],
    "pissa": ["lora.rank=4", "lora.start=pissa", "lora.base=nf4"],
}
SHORT = ["train.steps=3", "checkpoint.every_steps=2", "optim.lr=2e-2"]
# Rows alone are spread: with weights spread too, XLA:CPU may start independent collectives of one step in another order
# on each of eight devices that share two cores, and wait forever. (Its other scheduler,
# --xla_cpu_enable_concurrency_optimized_scheduler=false, does not, but mixes up the collectives of two processes.)
ROWS_ALONE = ["mesh.data=8", "mesh.fsdp=1"]


class Signalled(Signals):
    """A signal came during the first step of a start."""

    @contextlib.contextmanager
    def collected(self):
        with super().collected():
            self.received = True
            yield


def config_of(folder: pathlib.Path, kind: str, *more: str) -> Any:
    return run_config(folder, *OVERRIDES[kind], *SHORT, *ROWS_ALONE, *more)


def losses(workdir: pathlib.Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(m["step"], m["loss"]) for m in lines if "loss" in m]


def saved(workdir: pathlib.Path, config: Any) -> tuple[int, Any]:
    """What the newest checkpoint holds of parameters."""
    shapes = parameters(config, load_configured(config.model, seed=config.seed)).abstract_trained
    places = shard_params(shapes, make_mesh(config.mesh))
    shapes = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, places)
    checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint, fingerprint=None)
    found, params, _ = checkpoints.restore_params(shapes)
    checkpoints.close()
    return found, params


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    place = tmp_path_factory.mktemp("adapted")
    run_config(place)
    return place


@pytest.fixture(scope="module")
def whole(folder: pathlib.Path) -> Any:
    """An uninterrupted run of each kind on eight devices, made when it is first asked for."""
    made: dict[str, pathlib.Path] = {}

    def run(kind: str) -> pathlib.Path:
        if kind not in made:
            outcome = train(config_of(folder, kind), folder / kind, command="test")
            assert outcome.finished and outcome.after.loss < outcome.before.loss  # pyright: ignore[reportOptionalMemberAccess]
            made[kind] = folder / kind
        return made[kind]

    return run


@pytest.mark.parametrize("kind", OVERRIDES)
def test_stopped_and_started_again_ends_bit_for_bit_the_same(folder, whole, tmp_path, monkeypatch, kind):
    config, workdir = config_of(folder, kind), tmp_path / "w"
    with monkeypatch.context() as patch:
        patch.setattr("jax_sft.train_loop.Signals", Signalled)
        outcome = train(config, workdir, command="test")
    assert (outcome.finished, outcome.step) == (False, 1)
    assert train(config, workdir, command="test").finished
    assert losses(workdir) == losses(whole(kind))
    mine, theirs = (restored_state(w, config) for w in (workdir, whole(kind)))
    assert len(jax.tree.leaves(mine)) > 3 * 14
    jax.tree.map(np.testing.assert_array_equal, mine, theirs)
    mine, theirs = (load_file(w / "export" / "adapter_model.safetensors") for w in (workdir, whole(kind)))
    assert mine.keys() == theirs.keys()
    for name in mine:
        np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)


def restored_state(workdir: pathlib.Path, config: Any) -> Any:
    """Step, adapters and optimizer of the newest checkpoint."""
    shapes = parameters(config, load_configured(config.model, seed=config.seed)).abstract_trained
    tx = optimizer(config.optim, config.train.steps, shapes, b_lr_ratio=config.lora.b_lr_ratio)
    checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint, fingerprint=None)
    restored = checkpoints.restore(abstract_state(shapes, tx, make_mesh(config.mesh)))
    checkpoints.close()
    assert restored is not None and restored[0] == config.train.steps
    return jax.device_get(restored[1])


@of_each_kind
def test_what_leaves_is_what_was_trained_as_an_adapter_and_merged(folder, whole, tmp_path, caplog, kind):
    caplog.set_level("INFO", logger="jax_sft")
    config = config_of(folder, kind)
    base = load_configured(config.model, seed=0)
    plan, exam, mesh = parameters(config, base), make_exam(base, config.data), make_mesh(config.mesh)
    weights = load_params(base, shardings=shard_params(abstract_params(base.config), mesh))
    trained = saved(whole(kind), config)[1]
    trained_RPV = logits_of(base, joined(weights, trained), exam, lora=plan.lora)
    plain_RPV, largest = logits_of(base, weights, exam), np.abs(trained_RPV).max()
    assert np.abs(trained_RPV - plain_RPV).max() > 0.05 * largest
    again = read_adapter(whole(kind) / "export", base.config)
    read = jax.device_put(again.params, shard_params(again.params, mesh))
    np.testing.assert_array_equal(logits_of(base, joined(weights, read), exam, lora=again.lora), trained_RPV)
    export_workdir(whole(kind), tmp_path / "merged", form="merged", dtype="float32", certified=False)
    said = (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")
    held = f"held in {config.lora.base}, which the validation losses of the training are of"
    assert (held in said) == (f"it was {held}" in caplog.text) == (kind != "lora")
    merged = load_pretrained(tmp_path / "merged")
    assert merged.config.tied_head == (kind != "lora")
    params = load_params(merged, shardings=shard_params(abstract_params(merged.config), mesh))
    np.testing.assert_allclose(logits_of(merged, params, exam), trained_RPV[..., :264], atol=1e-4 * largest)


def test_a_run_goes_on_on_other_devices(folder, whole, tmp_path):
    workdir, kind = tmp_path / "w", "qlora"
    shutil.copytree(whole(kind), workdir)
    shutil.rmtree(workdir / "checkpoints" / "00000003")
    assert "resuming from step 2 of 3" in finish(start(folder, workdir, *OVERRIDES[kind], *SHORT))  # on one device
    mine, theirs = losses(workdir), losses(whole(kind))
    assert mine[:2] == theirs[:2]  # the third is made anew
    np.testing.assert_allclose(mine[2], theirs[2], rtol=1e-5)


def test_a_base_whose_weights_were_changed_is_no_resume(folder, whole, tmp_path):
    workdir, model = tmp_path / "w", tmp_path / "model"
    shutil.copytree(whole("qlora"), workdir)
    shutil.copytree(folder / "model", model)
    same = f"model.path={model}"
    assert train(config_of(folder, "qlora", same), workdir, command="test").finished  # the same weights elsewhere
    shutil.rmtree(model)
    write_model(model, seed=5)
    with pytest.raises(ValueError, match=r"(?s)cannot go on with another configuration.*model\.weights: '\w+' when"):
        train(config_of(folder, "qlora", same), workdir, command="test")
    with pytest.raises(ValueError, match=r"lora\.base: 'nf4' when saved, 'int8' now"):
        train(config_of(folder, "qlora", "lora.base=int8"), workdir, command="test")


def test_full_fine_tuning_in_the_workdir_of_adapters_is_told_in_a_line(folder, whole):
    with pytest.raises(ValueError, match="(?s)workdir:\n  lora: set when saved, not set now$"):
        train(run_config(folder, *SHORT, *ROWS_ALONE), whole("lora"), command="test")


def test_a_checkpoint_of_adapters_is_small_and_names_its_base(folder, whole):
    step = whole("qlora") / "checkpoints" / "00000003"
    config = config_of(folder, "qlora")
    base = load_configured(config.model, seed=0)
    lora = parameters(config, base).lora
    assert lora is not None
    params = saved(whole("qlora"), config)[1]
    assert params.keys() == {"lora"}
    numbers = sum(x.size for x in jax.tree.leaves(params))
    assert numbers == lora.num_params(base.config.sizes) < base.config.num_params / 4
    host = json.loads((step / "host" / "metadata").read_text())
    assert host["fingerprint"]["model.weights"]
    assert host["fingerprint"]["lora"]["base"] == "nf4"
    state = restored_state(whole("qlora"), config)
    floats = [x for x in jax.tree.leaves(state) if x.ndim]
    assert sum(x.size for x in floats) == 3 * numbers  # and two moments of each
    on_disk = [arrays_of(step / item) for item in ("params", "optimizer")]
    assert len(on_disk[0]) == len(jax.tree.leaves(params)) and all(name.startswith("lora.") for name in on_disk[0])
    assert {name for name in on_disk[1] if ".lora." not in name} <= {"step", "opt_state.1.count"}
    assert sum(on_disk[0].values()) == numbers
    assert sum(size for name, size in on_disk[1].items() if ".lora." in name) == 2 * numbers


def arrays_of(item: pathlib.Path) -> dict[str, int]:
    """Names and sizes of the arrays that Orbax wrote: bytes of files would not do, it writes some of them twice."""
    store = ts.KvStore.open({"driver": "ocdbt", "base": {"driver": "file", "path": f"{item}/"}}).result()
    described = [key.decode() for key in store.list().result() if key.endswith(b"/.zarray")]
    shapes = {key.removesuffix("/.zarray"): json.loads(store[key.encode()])["shape"] for key in described}
    return {name: math.prod(shape) for name, shape in shapes.items()}


def test_a_checkpoint_of_pissa_holds_where_it_started_and_no_moments_of_that(folder, whole):
    state = restored_state(whole("pissa"), config_of(folder, "pissa"))
    of_params, of_moments = (sum(x.size for x in jax.tree.leaves(t)) for t in (state.params, state.opt_state))
    assert of_params == of_moments - 1  # A, B and what both started as; Adam's count; two moments of A and B


LAUNCHER = """
import logging, pathlib, sys
from jax_sft.cli.start import start_devices, start_distributed
logging.basicConfig(format="%(message)s")
logging.getLogger("jax_sft").setLevel(logging.INFO)
from tests.tiny import run_config
start_distributed()
start_devices()
from jax_sft.train_loop import train
outcome = train(run_config(pathlib.Path(sys.argv[1]), *sys.argv[3:]), pathlib.Path(sys.argv[2]), command="test")
sys.exit(0 if outcome.finished else 75)
"""


def start(folder: pathlib.Path, workdir: pathlib.Path, *overrides: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(folder), str(workdir), *overrides],
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "1", **environment},
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output[-3000:]
    return output


def together(folder: pathlib.Path, workdir: pathlib.Path, *overrides: str) -> list[str]:
    """Two processes over gloo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    shared = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    return [finish(p) for p in [start(folder, workdir, *overrides, **shared, JAX_PROCESS_ID=str(i)) for i in range(2)]]


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["lora.base=nf4", "lora.dora=true", "lora.dropout=0.1"]], ids=["lora", "qdora"])
def test_two_processes_train_adapters_as_one_and_go_on(folder, tmp_path, more):
    said = ["lora.rank=4", *more, *SHORT]
    finish(start(folder, tmp_path / "one", *said))
    together(folder, tmp_path / "two", *said, "export.certify=True")
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert [step for step, _ in two] == [1, 2, 3]
    np.testing.assert_allclose([x for _, x in two], [x for _, x in one], rtol=1e-5)
    certificate = json.loads((tmp_path / "two" / "export" / "CERTIFICATE.json").read_text())
    assert certificate["verdict"] == "passed"
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "00000003")
    outputs = together(folder, tmp_path / "two", *said)
    assert "resuming from step 2 of 3" in outputs[0]
    assert losses(tmp_path / "two") == two
