"""What comes back is what was saved, bit for bit; damage is seen, named, and gone around."""

import dataclasses
import gc
import json
import logging
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

import jax_sft.checkpoint
from jax_sft.checkpoint import Checkpoints
from jax_sft.config import CheckpointConfig, MeshConfig, OptimConfig
from jax_sft.optim import optimizer
from jax_sft.seal import seal_problem, write_seal
from jax_sft.sharding import make_mesh
from jax_sft.train_step import abstract_state, init_state

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent

# Orbax's own threads and coroutines fall over one another when a file cannot be read or written.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

SHAPES = {
    "embed_VD": (1024, 16),  # large enough that Orbax keeps it in a file of its own
    "blocks": {"attn_norm_LD": (2, 16), "q_LDNH": (2, 16, 4, 4)},
    "final_norm_D": (16,),
}
SHAPE_TREE = jax.tree.map(
    lambda s: jax.ShapeDtypeStruct(s, jnp.float32), SHAPES, is_leaf=lambda x: isinstance(x, tuple)
)
TX = optimizer(OptimConfig(lr=1e-5), 10, SHAPE_TREE)
FINGERPRINT = {"seed": 1, "optim": {"lr": 0.1, "b": (1, 2)}, "data": "abc"}


def mesh_of(data=2, fsdp=2, tensor=2):
    return make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), jax.devices()[: data * fsdp * tensor])


def state_of(step, mesh=None):
    """A state in which every number is random and depends on the step."""
    rng = np.random.default_rng(step)
    mesh = mesh or mesh_of()
    empty = init_state(jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), SHAPE_TREE), TX, mesh)

    def fill(x):
        new = rng.normal(size=x.shape) if jnp.issubdtype(x.dtype, jnp.floating) else np.full(x.shape, step)
        return jax.device_put(new.astype(x.dtype), x.sharding)

    return jax.tree.map(fill, empty)


def described(mesh=None):
    return abstract_state(SHAPE_TREE, TX, mesh or mesh_of())


def open_at(path, keep=2, fingerprint=FINGERPRINT):
    return Checkpoints(path, CheckpointConfig(keep=keep), fingerprint=fingerprint)


def assert_same_bits(got, wanted):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), got, wanted)


@pytest.fixture
def saved(tmp_path):
    """A folder with the checkpoints of steps 10 and 20."""
    with_steps = open_at(tmp_path / "checkpoints")
    for step in (10, 20):
        with_steps.save(step, state_of(step), {"counter": step})
    with_steps.close()
    return tmp_path / "checkpoints"


def largest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def test_a_restored_state_has_the_same_bits_shardings_and_notes(tmp_path):
    checkpoints = open_at(tmp_path)
    state, notes = state_of(7), {"best_loss": 1.5, "names": ["ä", None], "nested": {"n": 3}}
    assert checkpoints.save(7, state, notes)
    step, restored, extra = checkpoints.restore(described())
    checkpoints.close()
    assert (step, extra) == (7, notes)
    assert_same_bits(restored, state)
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, described())
    assert int(restored.step) == 7


def test_nothing_saved_restores_to_nothing(tmp_path):
    checkpoints = open_at(tmp_path / "new" / "checkpoints")
    assert checkpoints.restore(described()) is None
    assert (checkpoints.all_steps, checkpoints.best_step) == ([], None)
    checkpoints.close()


@pytest.mark.parametrize("sizes", [(1, 1, 1), (8, 1, 1), (1, 4, 2)])
def test_a_checkpoint_restores_onto_another_mesh(saved, sizes):
    mesh = mesh_of(*sizes)
    checkpoints = open_at(saved)
    step, restored, _ = checkpoints.restore(described(mesh))
    checkpoints.close()
    assert step == 20
    assert_same_bits(restored, state_of(20))
    assert restored.params["embed_VD"].sharding.mesh.size == math.prod(sizes)


def test_the_newest_and_the_best_are_kept(tmp_path):
    checkpoints = open_at(tmp_path, keep=2)
    for step, loss in ((1, math.nan), (2, 0.5), (3, 3.0), (4, None), (5, 0.7), (6, None)):
        checkpoints.save(step, state_of(step), {}, loss=loss)
    checkpoints.wait()
    assert checkpoints.all_steps == [2, 5, 6]
    assert checkpoints.best_step == 2
    checkpoints.close()
    again = open_at(tmp_path, keep=2)  # the losses are on disk
    again.save(7, state_of(7), {}, loss=0.9, wait=True)
    assert (again.all_steps, again.best_step) == ([2, 6, 7], 2)
    again.save(8, state_of(8), {}, loss=0.1, wait=True)
    assert (again.all_steps, again.best_step) == ([7, 8], 8)
    again.close()


def test_without_losses_only_the_newest_are_kept(tmp_path):
    checkpoints = open_at(tmp_path, keep=1)
    for step in (1, 2, 3):
        checkpoints.save(step, state_of(step), {})
    checkpoints.wait()
    assert (checkpoints.all_steps, checkpoints.best_step) == ([3], None)
    checkpoints.close()


def test_a_step_that_is_saved_already_is_left_alone(saved):
    checkpoints = open_at(saved)
    assert not checkpoints.save(20, state_of(99), {})
    _, restored, _ = checkpoints.restore(described())
    checkpoints.close()
    assert_same_bits(restored, state_of(20))


def test_every_sealed_file_is_watched(saved):
    step = epath.Path(saved / "00000020")
    assert seal_problem(step) is None
    sealed = json.loads((step / "seal.json").read_text())["blake2b"]
    assert {name.split("/")[0] for name in sealed} == {"params", "optimizer", "host"}
    for name in sealed:
        content = (step / name).read_bytes()
        for damaged in (content[: len(content) // 2], bytes([content[0] ^ 1]) + content[1:], content + b"x"):
            (step / name).write_bytes(damaged)
            assert seal_problem(step) == f"{name} does not have the content that was saved"
        (step / name).unlink()
        assert seal_problem(step) == f"{name} is missing"
        (step / name).write_bytes(content)
    assert seal_problem(step) is None


@pytest.fixture(autouse=True)
def _swept():
    """Orbax leaves threads and coroutines behind when a read or write fails; collect them where that is allowed."""
    yield
    gc.collect()


def damage(how, step_folder):
    array_data = largest_file(step_folder / "params")
    if how == "a bit flipped in an array":
        flip_a_bit(array_data)
    elif how == "a bit flipped in the optimizer":
        flip_a_bit(largest_file(step_folder / "optimizer"))
    elif how == "a truncated file":
        os.truncate(array_data, array_data.stat().st_size // 2)
    elif how == "a missing file":
        array_data.unlink()
    elif how == "damaged notes":
        flip_a_bit(step_folder / "host" / "metadata")
    elif how == "a missing seal":
        (step_folder / "seal.json").unlink()
    elif how == "a damaged seal":
        flip_a_bit(step_folder / "seal.json")
    elif how == "an empty folder":
        shutil.rmtree(step_folder)
        step_folder.mkdir()
    elif how == "a whole seal over files that Orbax cannot read":
        (step_folder / "params" / "_METADATA").write_text("{")
        write_seal(epath.Path(step_folder))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("a bit flipped in an array", "does not have the content that was saved"),
        ("a bit flipped in the optimizer", "optimizer/.* does not have the content"),
        ("a truncated file", "does not have the content"),
        ("a missing file", "params/.* is missing"),
        ("damaged notes", "host/metadata does not have the content"),
        ("a missing seal", "it has no seal.json"),
        ("a damaged seal", "is missing|does not have|seal.json"),
        ("an empty folder", "it has no seal.json"),
        ("a whole seal over files that Orbax cannot read", "it cannot be restored"),
    ],
)
def test_a_broken_checkpoint_is_named_and_the_one_before_it_used(saved, caplog, how, said):
    damage(how, saved / "00000020")
    checkpoints = open_at(saved)
    with caplog.at_level(logging.WARNING, logger="jax_sft"):
        step, restored, extra = checkpoints.restore(described())
    checkpoints.close()
    assert (step, extra) == (10, {"counter": 10})
    assert_same_bits(restored, state_of(10))
    (record,) = [r for r in caplog.records if r.name == "jax_sft.checkpoint"]
    assert "00000020 is broken" in record.getMessage()
    assert re.search(said, record.getMessage())


def test_without_the_seal_a_flipped_bit_would_go_unseen(saved, monkeypatch):
    damage("a bit flipped in an array", saved / "00000020")
    monkeypatch.setattr(jax_sft.checkpoint, "seal_problem", lambda folder: None)
    checkpoints = open_at(saved)
    step, restored, _ = checkpoints.restore(described())
    checkpoints.close()
    wrong = [not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (restored, state_of(20))), strict=True)]
    assert step == 20
    assert any(wrong)


def test_after_going_back_the_broken_step_is_saved_anew(saved, caplog):
    damage("a truncated file", saved / "00000020")
    checkpoints = open_at(saved)
    assert checkpoints.restore(described())[0] == 10
    assert checkpoints.save(15, state_of(15), {})
    assert checkpoints.save(20, state_of(21), {}, wait=True)
    checkpoints.close()
    assert (saved / "set_aside" / "00000020").is_dir()
    again = open_at(saved)
    step, restored, _ = again.restore(described())
    again.close()
    assert step == 20
    assert_same_bits(restored, state_of(21))
    assert again.all_steps == [15, 20]


def test_if_every_checkpoint_is_broken_the_error_says_so(saved):
    damage("a truncated file", saved / "00000010")
    damage("a missing seal", saved / "00000020")
    checkpoints = open_at(saved)
    with pytest.raises(
        ValueError, match=r"none of its checkpoints can be used \(step 20: it has no.*step 10: .*move the"
    ):
        checkpoints.restore(described())
    checkpoints.close()


def test_a_changed_fingerprint_lists_every_difference(saved):
    checkpoints = open_at(saved, fingerprint={"seed": 2, "optim": {"lr": 0.1, "b": (1, 3)}, "model": "m"})
    with pytest.raises(ValueError, match="the run of step 20 cannot go on") as caught:
        checkpoints.restore(described())
    checkpoints.close()
    assert str(caught.value).splitlines()[1:] == [
        "  data: 'abc' when saved, not set now",
        "  model: not set when saved, 'm' now",
        "  optim.b: [1, 2] when saved, [1, 3] now",
        "  seed: 1 when saved, 2 now",
    ]
    assert "set these back, or use a new workdir:" in str(caught.value)


def test_weights_that_differ_are_set_back_by_the_keys_that_name_the_model(saved):
    checkpoints = open_at(saved, fingerprint={"model.weights": "abc"})
    with pytest.raises(
        ValueError, match=r"back \(model.weights by model.path or model.revision\), or use a new workdir:"
    ):
        checkpoints.restore(described())
    checkpoints.close()


def test_parameters_alone_can_be_read_of_any_step(saved):
    reader = open_at(saved, fingerprint=None)
    step, params, extra = reader.restore_params(described().params)
    assert (step, extra) == (20, {"counter": 20})
    assert_same_bits(params, state_of(20).params)
    step, params, _ = reader.restore_params(described(mesh_of(1, 1, 1)).params, step=10)
    assert step == 10
    assert_same_bits(params, state_of(10).params)
    with pytest.raises(ValueError, match="holds no checkpoint of step 15; the steps there are 10, 20"):
        reader.restore_params(described().params, step=15)
    damage("a truncated file", saved / "00000010")
    with pytest.raises(ValueError, match="none of its checkpoints can be used"):
        reader.restore_params(described().params, step=10)
    reader.close()


def test_a_folder_without_checkpoints_is_an_error_for_a_reader(tmp_path):
    reader = open_at(tmp_path / "none", fingerprint=None)
    with pytest.raises(ValueError, match="holds no checkpoint; train first"):
        reader.restore_params(described().params)
    reader.close()
    assert not (tmp_path / "none").exists()


def test_a_reader_leaves_the_save_of_a_running_job_alone(saved):
    in_progress = saved / "00000030.orbax-checkpoint-tmp"
    in_progress.mkdir()
    damage("a truncated file", saved / "00000020")
    reader = open_at(saved, fingerprint=None)
    assert reader.restore_params(described().params)[0] == 10
    with pytest.raises(AssertionError, match="opened to read"):
        reader.save(30, state_of(30), {})
    reader.close()
    assert in_progress.is_dir()
    assert (saved / "00000020").is_dir()


def test_a_run_that_starts_again_clears_what_was_cut_off(saved):
    cut_off = saved / "00000017.orbax-checkpoint-tmp"
    cut_off.mkdir()
    checkpoints = open_at(saved)
    assert checkpoints.restore(described())[0] == 20
    checkpoints.save(30, state_of(30), {})
    checkpoints.close()
    assert not cut_off.exists()


def test_saving_returns_before_the_files_are_sealed_and_the_state_may_be_donated(tmp_path, monkeypatch):
    def slow_seal(folder):
        time.sleep(1.5)
        write_seal(folder)

    monkeypatch.setattr(jax_sft.checkpoint, "write_seal", slow_seal)
    checkpoints = open_at(tmp_path)
    checkpoints.save(1, state_of(1), {}, wait=True)  # the first save also imports and warms up
    state, expected = state_of(2), jax.device_get(state_of(2))
    start = time.perf_counter()
    checkpoints.save(2, state, {})
    seconds = time.perf_counter() - start
    state = jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)(state)
    jax.block_until_ready(state)
    assert seconds < 1.5
    assert not (tmp_path / "00000002").exists()  # not there before it is sealed
    checkpoints.wait()
    assert (tmp_path / "00000002" / "seal.json").is_file()
    _, restored, _ = checkpoints.restore(described())
    checkpoints.close()
    assert_same_bits(restored, expected)


def test_a_failed_save_is_reported_by_the_next_call_and_leaves_nothing(tmp_path, monkeypatch):
    checkpoints = open_at(tmp_path)
    checkpoints.save(1, state_of(1), {}, wait=True)

    def no_space(folder):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(jax_sft.checkpoint, "write_seal", no_space)
        checkpoints.save(2, state_of(2), {})
        message = r"the disk is full, so the checkpoint of step 2 was not saved; the checkpoint of step 1 is untouched"
        with pytest.raises(OSError, match=message):
            checkpoints.wait()
    assert [p.name for p in tmp_path.iterdir() if "0002" in p.name] == []
    assert checkpoints.restore(described())[0] == 1
    assert checkpoints.save(2, state_of(2), {}, wait=True)  # there is room again
    checkpoints.close()
    assert open_at(tmp_path).restore(described())[0] == 2


def test_preemption_is_not_watched_without_jax_distributed(tmp_path):
    checkpoints = open_at(tmp_path)
    assert checkpoints.reached_preemption(1) is False
    checkpoints.close()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(mount)]
    if os.geteuid() != 0 or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("a small file system can only be mounted by root: THE FULL DISK IS NOT TESTED HERE")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


FILL_A_DISK = """
import os, pathlib, shutil, sys
from tests.test_checkpoint import assert_same_bits, described, open_at, state_of
disk = pathlib.Path(sys.argv[1])
checkpoints = open_at(disk / "checkpoints")
checkpoints.save(1, state_of(1), {}, wait=True)
(disk / "filler").write_bytes(os.urandom(shutil.disk_usage(disk).free - int(sys.argv[2])))
try:
    checkpoints.save(2, state_of(2), {}, wait=True)
except OSError as error:
    print("SAID", error)
print("LEFT", checkpoints.all_steps)
step, restored, _ = checkpoints.restore(described())
assert_same_bits(restored, state_of(1))
(disk / "filler").unlink()
print("AGAIN", step, checkpoints.save(2, state_of(2), {}, wait=True))
checkpoints.close()
step, restored, _ = open_at(disk / "checkpoints").restore(described())
assert_same_bits(restored, state_of(2))
print("THEN", step, sorted(path.name for path in (disk / "checkpoints").iterdir()))
"""


@pytest.mark.parametrize("left_bytes", [0, 16 * 1024, 128 * 1024])
def test_a_full_disk_is_one_sentence_and_the_last_good_checkpoint_stays(small_disk, left_bytes):
    # In a process of its own: Orbax's threads and coroutines fall over one another when a write fails.
    done = subprocess.run(
        [sys.executable, "-c", FILL_A_DISK, str(small_disk), str(left_bytes)],
        cwd=REPOSITORY,
        env=dict(os.environ, PYTHONPATH=str(REPOSITORY)),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"SAID {small_disk}/checkpoints: the disk is full, so the checkpoint of step 2 was not saved" in done.stdout
    assert "the checkpoint of step 1 is untouched. Free some space" in done.stdout
    assert not done.stderr
    assert done.stdout.endswith("LEFT [1]\nAGAIN 1 True\nTHEN 2 ['00000001', '00000002']\n"), done.stdout


@pytest.mark.parametrize("error", [MemoryError("no room"), RuntimeError("RESOURCE_EXHAUSTED: out of memory")])
def test_too_little_memory_is_no_damage_of_the_checkpoint(saved, monkeypatch, error):
    checkpoints = open_at(saved)

    def restore(*_, **__):
        raise error

    monkeypatch.setattr(checkpoints._manager, "restore", restore)
    with pytest.raises(type(error), match=str(error)):
        checkpoints.restore(described())
    checkpoints.close()


def test_a_state_that_is_not_saved_by_this_run_is_named_when_shapes_differ(saved):
    checkpoints = open_at(saved)
    wrong = described()
    params = dict(
        wrong.params, embed_VD=jax.ShapeDtypeStruct((32, 16), jnp.float32, sharding=wrong.params["embed_VD"].sharding)
    )
    with pytest.raises(ValueError, match="none of its checkpoints can be used .*cannot be restored"):
        checkpoints.restore(dataclasses.replace(wrong, params=params))
    checkpoints.close()
