"""What the memory plan says of a device is what the device holds, and a run says it once, without a second compile."""

import dataclasses
import logging
import re
import shutil
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jax_sft import memory_plan
from jax_sft.batch import Batch
from jax_sft.config import MeshConfig, OptimConfig
from jax_sft.memory_plan import MemoryPlan, device_limit, plan_memory
from jax_sft.model.decoder import abstract_params, build, random_params
from jax_sft.model.families import read_model_config
from jax_sft.optim import optimizer
from jax_sft.sharding import abstract_batch, make_mesh, put_batch, shard_params
from jax_sft.train_loop import train
from jax_sft.train_step import TrainState, abstract_state, init_state, make_train_step, state_shardings
from tests.tiny import run_config

V, T, P = 88, 64, 16
MODEL = read_model_config(
    {
        "model_type": "llama",
        "vocab_size": V,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 4,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
    }
)
SHAPES = abstract_params(MODEL)
TX = optimizer(OptimConfig(lr=1e-5), 10, SHAPES)
PARAMETERS = sum(x.size for x in jax.tree.leaves(SHAPES))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int4:
    """As a quantised weight is: several arrays in the place of one."""

    codes: Any
    scale: Any

    @property
    def shape(self):
        return (*self.codes.shape[:-1], 2 * self.codes.shape[-1])


def compiled(*, temp=0, output=0, alias=0, code=0) -> Any:
    """A program that says of itself what the test wants."""
    analysis = SimpleNamespace(
        temp_size_in_bytes=temp,
        output_size_in_bytes=output,
        alias_size_in_bytes=alias,
        generated_code_size_in_bytes=code,
    )
    return SimpleNamespace(memory_analysis=lambda: analysis)


def mesh_of(fsdp=1, tensor=1):
    return make_mesh(MeshConfig(fsdp=fsdp, tensor=tensor), jax.devices()[: fsdp * tensor])


def empty_batch(rows):
    row_T, row_P = np.zeros((rows, T), np.int32), np.zeros((rows, P), np.int32)
    return Batch(row_T, row_T, np.zeros((rows, T), np.float32), row_T, row_T, row_T, row_P)


def held_by_device(tree):
    """Bytes of the real arrays on the device that holds most."""
    held = dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return max(held.values())


def compile_step(mesh, rows):
    step = make_train_step(
        build(MODEL, dtype="float32", attention="xla"),
        TX,
        num_sources=1,
        remat="none",
        loss_chunk_tokens=64,
        mesh=mesh,
        state_shardings=state_shardings(SHAPES, TX, mesh),
    )
    batch = abstract_batch(empty_batch(0), mesh, batch_size=rows)
    return step.lower(abstract_state(SHAPES, TX, mesh), {}, batch).compile(), batch


def plan(**changes):
    """A LoRA run on a bfloat16 base, of sizes that are easy to follow."""
    sizes: dict[str, Any] = {
        "trained_parameters": 5_000_000,
        "all_parameters": 1_005_000_000,
        "base_parameters": 1_000_000_000,
        "vocabulary_parameters": 200_000_000,
        "shards": 4.0,
        "base_kind": "bfloat16",
        "base_bytes": 500_000_000,
        "trained_bytes": 20_000_000,
        "optimizer_bytes": 40_000_000,
        "gradient_bytes": 20_000_000,
        "activation_bytes": 1_000_000_000,
        "rows": 2,
        "limit_bytes": 80_000_000_000,
    }
    return MemoryPlan(**sizes | changes)


COUNTS = {"trained_parameters": PARAMETERS, "all_parameters": PARAMETERS}


def test_bytes_of_a_device_are_those_of_the_shards_it_holds():
    mesh = mesh_of(fsdp=4, tensor=2)
    state = init_state(jax.device_put(random_params(MODEL, 0), shard_params(SHAPES, mesh)), TX, mesh)
    cut = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    whole = NamedSharding(mesh, PartitionSpec())
    frozen = {
        "embed_VD": jax.device_put(jnp.zeros((V, 16), jnp.bfloat16), cut),
        "up_DF": Int4(jax.device_put(jnp.zeros((16, 32), jnp.uint8), cut), jax.device_put(jnp.zeros((16, 1)), whole)),
    }
    found = plan_memory(state, frozen, compiled(), rows=1, limit_bytes=None, **COUNTS)
    assert found.base_bytes == held_by_device(frozen) == V * 16 * 2 // 8 + 16 * 32 // 8 + 16 * 4
    assert found.trained_bytes == found.gradient_bytes == held_by_device(state.params)
    assert found.optimizer_bytes == held_by_device(state.opt_state)
    assert (
        plan_memory(abstract_state(SHAPES, TX, mesh), frozen, compiled(), rows=1, limit_bytes=None, **COUNTS) == found
    )


def test_parameters_of_the_base_are_counted_over_the_whole_model_and_quantised_ones_as_what_they_stand_for():
    mesh = mesh_of(fsdp=8)
    adapter = {"lora": {"up_LDR": jax.ShapeDtypeStruct((2, 16, 4), jnp.float32)}}
    state = TrainState(step=None, params=adapter | {"head_VD": SHAPES["embed_VD"]}, opt_state=())
    sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
    frozen = {
        "embed_VD": jax.ShapeDtypeStruct((V, 16), jnp.bfloat16, sharding=sharding),
        "up_DF": Int4(
            jax.ShapeDtypeStruct((16, 1000), jnp.uint8, sharding=sharding),
            jax.ShapeDtypeStruct((16, 1), jnp.float32, sharding=sharding),
        ),
    }
    found = plan_memory(state, frozen, compiled(), rows=1, limit_bytes=None, **COUNTS)
    assert found.base_parameters == 2 * V * 16 + 16 * 2000  # without the adapter
    assert found.vocabulary_parameters == 2 * V * 16
    assert (found.base_kind, found.shards) == ("int4", 8.0)


def test_arguments_of_the_compiled_step_are_the_state_and_the_batch_of_one_device():
    mesh = mesh_of(fsdp=4, tensor=2)
    program, batch = compile_step(mesh, rows=4)
    state = abstract_state(SHAPES, TX, mesh)
    found = plan_memory(state, {}, program, rows=1, limit_bytes=None, **COUNTS)
    held = found.trained_bytes + found.optimizer_bytes + held_by_device(put_batch_of(batch, mesh)) + 4  # state.step
    analysis: Any = program.memory_analysis()
    assert analysis.argument_size_in_bytes == held
    assert analysis.alias_size_in_bytes == found.trained_bytes + found.optimizer_bytes + 4  # the state is donated
    assert found.total_bytes == pytest.approx(
        held + analysis.output_size_in_bytes - analysis.alias_size_in_bytes + analysis.temp_size_in_bytes, rel=0.01
    )


def put_batch_of(batch, mesh):
    rows = batch.tokens_BT.shape[1]
    return put_batch(empty_batch(rows), mesh, rows=np.arange(rows), batch_size=rows)


def test_an_abstract_batch_is_what_a_batch_becomes_on_its_way_to_the_devices():
    mesh = mesh_of(fsdp=4, tensor=2)
    real = put_batch(empty_batch(16), mesh, rows=np.arange(16), batch_size=16, accumulation=2)
    for expected, found in zip(real, abstract_batch(empty_batch(0), mesh, batch_size=16, accumulation=2), strict=True):
        assert (found.shape, found.dtype, found.sharding) == (expected.shape, expected.dtype, expected.sharding)


def test_rows_that_fit_take_about_what_they_were_said_to_take():
    mesh = mesh_of()
    state = abstract_state(SHAPES, TX, mesh)
    many = plan_memory(state, {}, compile_step(mesh, rows=16)[0], rows=16, limit_bytes=None, **COUNTS)
    few = plan_memory(state, {}, compile_step(mesh, rows=2)[0], rows=2, limit_bytes=many.total_bytes, **COUNTS)
    assert few.rows_that_fit == pytest.approx(16, rel=0.2)


def test_the_gradient_is_counted_once_and_what_is_not_written_into_the_arguments_is_counted():
    state = abstract_state(SHAPES, TX, mesh_of())
    program = compiled(temp=10**6, output=700, alias=500, code=30)
    found = plan_memory(state, {}, program, rows=1, limit_bytes=None, **COUNTS)
    assert found.gradient_bytes == 4 * PARAMETERS
    assert found.activation_bytes == 10**6 - 4 * PARAMETERS + 200 + 30
    assert found.total_bytes == 16 * PARAMETERS + 4 + found.activation_bytes  # 4: Adam's count


def test_the_lines_of_a_lora_run_say_what_it_takes_and_what_else_would_fit():
    assert plan().lines() == [
        "memory on each device: base 0.50 GB (bfloat16), trained 20.00 MB, optimizer 40.00 MB, gradient 20.00 MB, "
        "activations and temporaries 1.00 GB: 1.58 GB of 80.00 GB",
        "trained 5.00 M of 1.00 B parameters (0.5%)",
        "would fit: about 158 rows of a micro-batch on each device, instead of 2",
        "instead, without activations: full fine-tuning 4.00 GB, LoRA on int8 0.38 GB, LoRA on nf4 0.29 GB",
    ]


def test_the_lines_of_full_fine_tuning_name_no_base_and_compare_with_lora():
    full = plan(
        trained_parameters=10**9,
        all_parameters=10**9,
        base_bytes=0,
        base_kind="float32",
        trained_bytes=10**9,
        optimizer_bytes=2 * 10**9,
        gradient_bytes=10**9,
    )
    assert full.lines() == [
        "memory on each device: parameters 1.00 GB, optimizer 2.00 GB, gradient 1.00 GB, "
        "activations and temporaries 1.00 GB: 5.00 GB of 80.00 GB",
        "trained 1.00 B of 1.00 B parameters (100.0%)",
        "would fit: about 152 rows of a micro-batch on each device, instead of 2",
        "instead, without adapters and activations: LoRA on bfloat16 0.50 GB, LoRA on int8 0.30 GB, "
        "LoRA on nf4 0.21 GB",
    ]


def test_what_does_not_fit_is_said_with_the_ways_out():
    tight = plan(limit_bytes=1_100_000_000)
    assert not tight.fits
    assert tight.lines()[2] == (
        "this does not fit, by 0.48 GB on each device; ways out: a higher train.accumulation, for fewer rows in a "
        'micro-batch (room for about 1 instead of 2), train.remat = "full", more devices along mesh.fsdp, '
        'lora.base = "nf4"'
    )
    assert "room" not in plan(limit_bytes=100_000_000).lines()[2]
    assert "accumulation" not in plan(limit_bytes=1_100_000_000, rows=1).lines()[2]


def test_what_a_platform_does_not_tell_is_said_to_be_unknown():
    silent: Any = SimpleNamespace(memory_analysis=lambda: None)
    found = plan_memory(abstract_state(SHAPES, TX, mesh_of()), {}, silent, rows=1, limit_bytes=None, **COUNTS)
    assert found.activation_bytes is None
    assert (found.fits, found.rows_that_fit) == (True, None)
    first, *others = plan(activation_bytes=None, limit_bytes=None).lines()
    assert first.endswith("activations and temporaries unknown: more than 0.58 GB")
    assert not any("would fit" in line for line in others)


def test_the_limit_of_a_device_is_its_allocator_s_else_its_share_of_the_host(monkeypatch, tmp_path):
    gpu = SimpleNamespace(memory_stats=lambda: {"bytes_limit": 123}, platform="gpu")
    assert device_limit(gpu) == 123
    assert device_limit(SimpleNamespace(memory_stats=lambda: None, platform="other")) is None
    monkeypatch.setattr(memory_plan, "_CGROUP_LIMITS", (str(tmp_path / "limit"),))
    with open("/proc/meminfo") as file:
        physical = 1024 * int(re.findall(r"MemTotal: *(\d+) kB", file.read())[0])
    assert device_limit(jax.devices()[0]) == physical // 8
    (tmp_path / "limit").write_text("8000\n")
    assert device_limit(jax.devices()[0]) == 1000
    (tmp_path / "limit").write_text("max\n")
    assert device_limit(jax.devices()[0]) == physical // 8


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_says_its_memory_before_it_trains_and_compiles_the_step_once(tmp_path, caplog, accumulation):
    overrides = ["mesh.fsdp=2", "mesh.tensor=2", "mesh.data=2", f"train.accumulation={accumulation}", "train.steps=2"]
    config = run_config(tmp_path, *overrides, "data.validation=()", "checkpoint.every_steps=1")
    caplog.set_level("INFO", logger="jax_sft")
    with jax.log_compiles():
        train(config, tmp_path / "w", command="test")
    said = [r.getMessage() for r in caplog.records if r.name.startswith("jax_sft")]
    first = [line for line in said if line.startswith("memory on each device: parameters ")]
    assert len(first) == 1
    assert "would fit: about " in caplog.text
    finished = [r.getMessage() for r in caplog.records if "Finished XLA compilation of jit(step)" in r.getMessage()]
    assert len(finished) == 1


def test_a_resumed_run_says_it_again_and_compiles_once_and_a_finished_one_does_neither(tmp_path, caplog):
    overrides = ("mesh.fsdp=4", "mesh.tensor=2", "data.validation=()", "train.steps=2", "checkpoint.every_steps=1")
    config = run_config(tmp_path, *overrides)
    train(config, tmp_path / "w", command="test")
    for resumes in (True, False):
        if resumes:  # as if it had ended after step 1
            newest = tmp_path / "w" / "checkpoints" / "00000002"
            assert newest.is_dir()
            shutil.rmtree(newest)
        caplog.clear()
        caplog.set_level("INFO", logger="jax_sft")
        with jax.log_compiles():
            train(config, tmp_path / "w", command="test")
        assert ("resuming from step 1 of 2" in caplog.text) is resumes
        assert caplog.text.count("memory on each device") == resumes
        assert caplog.text.count("Finished XLA compilation of jit(step)") == resumes


def test_a_plan_that_does_not_fit_is_a_warning_and_the_run_goes_on(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("jax_sft.train_loop.device_limit", lambda device: 1000)
    config = run_config(tmp_path, "train.steps=1")
    assert train(config, tmp_path / "w", command="test").finished
    (line,) = [r for r in caplog.records if "this does not fit" in r.getMessage()]
    assert line.levelno == logging.WARNING


# Of the tiny model: embedding 264 x 32, two layers of q, o 32 x 32, k, v 32 x 16, three of 32 x 64, and two norms.
BASE = 264 * 32 + 2 * (2 * 1024 + 2 * 512 + 3 * 2048 + 2 * 32) + 32


@pytest.mark.parametrize(
    ("overrides", "trained", "adapters"),
    [
        ([], BASE, 0),
        (["train.freeze=('embeddings','layers.0')"], (BASE - 264 * 32 - 32) // 2 + 32, 0),
        (["train.freeze=('layers.0.mlp',)"], BASE - 3 * 2048, 0),  # nothing lies in the frozen tree
        (["lora.rank=4", "lora.targets=('q_proj',)", "lora.start=pissa"], 2 * 4 * 64, 2 * 4 * 64),
        (["lora.rank=4", "lora.targets=('q_proj',)", "lora.layers=1", "lora.dora=true"], 4 * 64 + 32, 4 * 64 + 32),
        (["lora.rank=4", "lora.targets=('q_proj',)", "lora.rank_pattern={'layers.0': 1}"], 5 * 64, 5 * 64),
        (["lora.rank=4", "lora.targets=('q_proj',)", "lora.modules_to_save=('norms',)"], 512 + 5 * 32, 512),
    ],
    ids=["full", "freeze", "freeze-mlp", "pissa", "dora-layer", "rank_pattern", "modules_to_save"],
)
def test_the_log_counts_what_moves(tmp_path, caplog, monkeypatch, overrides, trained, adapters):
    class Enough(Exception):
        """The line is said before the first step."""

    def stop(*_: Any, **__: Any):
        raise Enough

    monkeypatch.setattr("jax_sft.train_loop.StepLog", stop)
    caplog.set_level("INFO", logger="jax_sft")
    with pytest.raises(Enough):
        train(run_config(tmp_path, *overrides, "data.validation=()"), tmp_path / "w", command="test")
    total = BASE + adapters
    line = f"trained {trained / 1e6:.2f} M of {total / 1e6:.2f} M parameters ({trained / total:.1%})"
    assert line in [r.getMessage() for r in caplog.records]
