"""Processes that die and processes that work together: kill -9 in the middle of a save, and two hosts over gloo."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
STEPS = 8
pytestmark = pytest.mark.slow

# A whole run: resume if there is something to resume, save every 3 steps, leave losses and final weights behind.
WORKER = """
import json, os, pathlib, sys, threading, time
import jax
options = json.loads(sys.argv[1])
if "processes" in options:
    jax.distributed.initialize(options["address"], num_processes=options["processes"], process_id=options["process"])
import numpy as np
from jax_sft.checkpoint import Checkpoints
import jax_sft.checkpoint
from jax_sft.config import CheckpointConfig, MeshConfig, OptimConfig
from jax_sft.batch import Batch
from jax_sft.model.decoder import abstract_params, build, random_params
from jax_sft.model.families import read_model_config
from jax_sft.optim import optimizer
from jax_sft.sharding import local_rows, make_mesh, put_batch
from jax_sft.train_step import abstract_state, init_state, make_train_step, state_shardings

MODEL = read_model_config({"model_type": "llama", "vocab_size": options["vocabulary"], "hidden_size": 16,
    "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": True})
root, STEPS, ROWS, T = pathlib.Path(options["root"]), options["steps"], 8, 16

def batch_of(step, rows):
    rng = np.random.default_rng(step)
    tokens = rng.integers(0, 64, (ROWS, T + 1)).astype(np.int32)
    weights = (rng.uniform(size=(ROWS, T)) < np.arange(1, ROWS + 1)[:, None] / 10).astype(np.float32)
    weights[:, -1] = 1
    same, zeros = np.ones((ROWS, T), np.int32), np.zeros((ROWS, T), np.int32)
    positions = np.tile(np.arange(T, dtype=np.int32), (ROWS, 1))
    predict = np.where(weights > 0, positions, T).astype(np.int32)
    whole = Batch(tokens[:, :-1], tokens[:, 1:], weights, same, positions, zeros, predict)
    return Batch(*(x[rows] for x in whole))

mesh = make_mesh(MeshConfig(data=options["data"], fsdp=-1))
tx = optimizer(OptimConfig(lr=1e-2, warmup_steps=2, weight_decay=0.1), STEPS, abstract_params(MODEL))
shape = abstract_state(abstract_params(MODEL), tx, mesh)
train_step = make_train_step(build(MODEL, dtype="float32", attention="xla"), tx, num_sources=1, remat="none",
    loss_chunk_tokens=32, mesh=mesh, state_shardings=state_shardings(abstract_params(MODEL), tx, mesh))
checkpoints = Checkpoints(root / "checkpoints", CheckpointConfig(keep=2), fingerprint={"seed": 0})
restored = checkpoints.restore(shape)
start, state, extra = restored or (0, init_state(random_params(MODEL, 0), tx, mesh), {"losses": []})
losses = extra["losses"]
print("start", start, flush=True)

# Ways to die.
if options.get("die") == "before the seal of step 6":
    seal = jax_sft.checkpoint.write_seal
    def slow_seal(folder):
        if "00000006" in folder.name:
            (root / "sealing").touch()
            time.sleep(600)
        seal(folder)
    jax_sft.checkpoint.write_seal = slow_seal
if options.get("die") == "while the arrays of step 6 are written":
    def watch():
        while not list((root / "checkpoints").glob("00000006.orbax*/params*")):
            pass
        os.kill(os.getpid(), 9)
    threading.Thread(target=watch, daemon=True).start()

rows = local_rows(mesh, batch_size=ROWS, accumulation=2)
for step in range(start, STEPS):
    placed = put_batch(batch_of(step, rows), mesh, rows=rows, batch_size=ROWS, accumulation=2)
    state, metrics = train_step(state, {}, placed)
    losses.append(metrics.tally.mean()["loss"])
    assert not checkpoints.reached_preemption(step + 1)
    if (step + 1) % 3 == 0:
        checkpoints.save(step + 1, state, {"losses": losses}, loss=losses[-1])
checkpoints.close()

if "processes" not in options:
    leaves = {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(state)}
    np.savez(root / "final.npz", losses=np.asarray(losses), **leaves)
else:
    from jax.experimental import multihost_utils
    again = Checkpoints(root / "checkpoints", CheckpointConfig(keep=2), fingerprint={"seed": 0})
    newest = again.restore(shape)[0]
    again.close()
    multihost_utils.sync_global_devices("read")
    if jax.process_index() == 0:  # a bit flips where only process 0 looks
        files = [p for p in (root / "checkpoints" / f"{newest:08d}").rglob("*") if p.is_file()]
        path = max(files, key=lambda p: p.stat().st_size)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    multihost_utils.sync_global_devices("damaged")
    again = Checkpoints(root / "checkpoints", CheckpointConfig(keep=2), fingerprint={"seed": 0})
    before, state, extra = again.restore(shape)
    again.save(newest, state, extra, wait=True)  # over the broken one
    again.close()
    sums = float(jax.jit(lambda t: sum(abs(x).sum() for x in jax.tree.leaves(t)))(state.params))
    other = Checkpoints(root / "checkpoints", CheckpointConfig(keep=2), fingerprint={"seed": 1})
    try:
        other.restore(shape)
    except ValueError as error:
        print("refused", "seed: 0 when saved, 1 now" in str(error))
    other.close()
    print("RESULT", json.dumps({"losses": losses, "newest": newest, "before": before, "sum": sums,
        "steps": again.all_steps}), flush=True)
"""


def start(root, devices, **options):
    defaults = {"root": str(root), "steps": STEPS, "vocabulary": 64, "data": 2}
    environment = dict(
        os.environ,
        JAX_NUM_CPU_DEVICES=str(devices),
        JAX_ENABLE_COMPILATION_CACHE="false",  # as `cli.start.start_devices` has it
        PYTHONPATH=os.pathsep.join([str(REPOSITORY), *sys.path]),
    )
    root.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, json.dumps(defaults | options)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process, timeout=240):
    output, _ = process.communicate(timeout=timeout)
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Final state and losses of a run that nothing disturbed; a large vocabulary makes saving take a while."""
    root = tmp_path_factory.mktemp("uninterrupted")
    finish(start(root, 4, vocabulary=60_000))
    return dict(np.load(root / "final.npz"))


@pytest.mark.parametrize("die", ["before the seal of step 6", "while the arrays of step 6 are written"])
def test_kill_9_in_the_middle_of_a_save_and_resume_equals_an_uninterrupted_run(tmp_path, uninterrupted, die):
    process = start(tmp_path, 4, vocabulary=60_000, die=die)
    if die.startswith("before"):
        deadline = time.monotonic() + 240
        while not (tmp_path / "sealing").exists():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == -signal.SIGKILL, output
    names = {p.name.split(".orbax")[0]: p.name for p in (tmp_path / "checkpoints").iterdir()}
    assert names["00000003"] == "00000003"
    assert names["00000006"] != "00000006", "the kill came too late: step 6 was saved"

    output = finish(start(tmp_path, 4, vocabulary=60_000))
    assert "start 3" in output
    resumed = dict(np.load(tmp_path / "final.npz"))
    assert resumed.keys() == uninterrupted.keys()
    for name, wanted in uninterrupted.items():
        assert np.array_equal(resumed[name], wanted), name
    assert len(resumed["losses"]) == STEPS
    assert (tmp_path / "checkpoints" / "00000006" / "seal.json").is_file()


def test_two_processes_train_save_and_restore_like_one(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    root = tmp_path / "two"
    workers = [start(root, 2, vocabulary=4096, processes=2, process=i, address=address) for i in range(2)]
    outputs = [finish(w) for w in workers]
    results = [json.loads(o.split("RESULT", 1)[1]) for o in outputs]
    assert results[0] == results[1]
    assert (results[0]["newest"], results[0]["before"], results[0]["steps"]) == (6, 3, [3, 6])
    assert all("refused True" in o for o in outputs)
    assert ["00000006 is broken" in o for o in outputs] == [True, False]  # said once, by process 0

    finish(start(tmp_path / "one", 4, vocabulary=4096))
    alone = dict(np.load(tmp_path / "one" / "final.npz"))
    np.testing.assert_allclose(results[0]["losses"], alone["losses"], atol=1e-5)

    # One process on half the devices goes on with what two have saved.
    assert "start 6" in finish(start(root, 2, vocabulary=4096, data=1))
