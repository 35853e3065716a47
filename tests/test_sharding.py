"""Where weights and rows lie: letters decide, what does not divide is replicated, every row arrives once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jax_sft.batch import Batch
from jax_sft.config import MeshConfig
from jax_sft.sharding import (
    batch_sharding,
    batch_shards,
    constrain,
    letters_of,
    local_rows,
    make_mesh,
    put_batch,
    shard_params,
    weight_spec,
)

T, P = 3, 2
MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 4, 2), (1, 1, 8)]


def mesh_of(data=1, fsdp=1, tensor=1):
    return make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), jax.devices()[: data * fsdp * tensor])


def batch_of(rows):
    """A batch whose every number says its row and its place in it."""
    rows = np.asarray(rows)[:, None]
    row_T = (100 * rows + np.arange(T)).astype(np.int32)
    row_P = (100 * rows + np.arange(P)).astype(np.int32)
    return Batch(row_T, row_T + 10, row_T.astype(np.float32) + 20, row_T + 30, row_T + 40, row_T + 50, row_P + 60)


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (MeshConfig(), (1, 8, 1, 1)),
        (MeshConfig(data=-1, fsdp=2, tensor=2), (2, 2, 1, 2)),
        (MeshConfig(data=4, fsdp=2, tensor=-1), (4, 2, 1, 1)),
        (MeshConfig(data=2, fsdp=1, expert=-1), (2, 1, 4, 1)),
    ],
)
def test_minus_one_takes_the_devices_that_are_left(config, sizes):
    mesh = make_mesh(config)
    assert dict(mesh.shape) == dict(zip(("data", "fsdp", "expert", "tensor"), sizes, strict=True))
    assert sorted(d.id for d in mesh.devices.flat) == sorted(d.id for d in jax.devices())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(data=3), "8 devices cannot be divided by 3"),
        (MeshConfig(data=2, fsdp=2, tensor=1), r"2 x 2 x 1 x 1 = 4, but there are 8 devices; set one of them to -1"),
        (MeshConfig(data=2, fsdp=8, tensor=1), r"= 16, but there are 8 devices"),
    ],
)
def test_sizes_that_do_not_fit_the_devices_are_an_error(config, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(config)


@pytest.mark.parametrize(
    ("letters", "shape", "expected"),
    [
        ("VD", (264, 32), ("tensor", "fsdp")),
        ("LDNH", (2, 32, 4, 8), (None, "fsdp", "tensor", None)),
        ("LNHD", (2, 4, 8, 32), (None, "tensor", None, "fsdp")),
        ("LDF", (2, 32, 64), (None, "fsdp", "tensor")),
        ("D", (32,), ("fsdp",)),
        ("LEDF", (2, 6, 32, 64), (None, "expert", "fsdp", "tensor")),
    ],
)
def test_the_letters_of_a_weight_say_where_it_lies(letters, shape, expected):
    assert weight_spec(letters, shape, mesh_of(2, 2, 2)) == PartitionSpec(*expected)


def test_a_dimension_that_its_axis_does_not_divide_is_replicated():
    mesh = mesh_of(1, 2, 4)
    assert weight_spec("LDKH", (2, 32, 2, 8), mesh) == PartitionSpec(None, "fsdp", None, None)
    assert weight_spec("VD", (263, 31), mesh) == PartitionSpec(None, None)


def test_no_axis_is_used_twice_and_the_next_dimension_takes_what_the_first_cannot():
    mesh = mesh_of(1, 2, 4)
    assert weight_spec("NK", (8, 8), mesh) == PartitionSpec("tensor", None)
    assert weight_spec("KN", (2, 8), mesh) == PartitionSpec(None, "tensor")


def test_every_device_holds_its_part_of_each_weight():
    params = {
        "embed_VD": jnp.zeros((16, 8)),
        "blocks": {"norm_LD": jnp.zeros((3, 8)), "q_LDNH": jnp.zeros((3, 8, 4, 5))},
    }
    placed = jax.device_put(params, shard_params(params, mesh_of(1, 4, 2)))
    parts = jax.tree.map(lambda x: {shard.data.shape for shard in x.addressable_shards}, placed)
    assert parts == {"embed_VD": {(8, 2)}, "blocks": {"norm_LD": {(3, 2)}, "q_LDNH": {(3, 2, 2, 5)}}}


def test_the_letters_stand_behind_the_last_underscore_of_a_jax_path_or_of_names():
    ((path, _),) = jax.tree.leaves_with_path({"blocks": {"attn_norm_LD": 0}})
    assert letters_of(path) == letters_of(("blocks", "attn_norm_LD")) == "LD"


def test_a_parameter_without_axis_letters_is_an_error():
    with pytest.raises(ValueError, match="'kernel' does not end in its axis letters"):
        shard_params({"kernel": jnp.zeros((2, 2))}, mesh_of(1, 2, 1))


@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_batch_comes_back_from_the_devices_as_micro_batches_of_its_rows_in_order(sizes, accumulation):
    mesh = mesh_of(*sizes)
    rows = local_rows(mesh, batch_size=16, accumulation=accumulation)
    np.testing.assert_array_equal(rows, np.arange(16))  # one process holds them all
    whole = batch_of(rows)
    placed = put_batch(whole, mesh, rows=rows, batch_size=16, accumulation=accumulation)
    for name, mine, theirs in zip(Batch._fields, whole, placed, strict=True):
        np.testing.assert_array_equal(theirs, mine.reshape(accumulation, -1, mine.shape[-1]), err_msg=name)
        assert theirs.dtype == mine.dtype, name


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 4, 2)])
def test_a_device_holds_the_rows_of_its_place_on_data_and_fsdp_alone(sizes):
    mesh = mesh_of(*sizes)
    rows = np.arange(16)
    tokens = put_batch(batch_of(rows), mesh, rows=rows, batch_size=16, accumulation=2).tokens_BT
    each = 8 // batch_shards(mesh)
    grid = rows.reshape(2, -1)
    for place, device in np.ndenumerate(mesh.devices):
        (mine,) = (shard.data for shard in tokens.addressable_shards if shard.device == device)
        first = (place[0] * sizes[1] + place[1]) * each
        np.testing.assert_array_equal(mine[:, :, 0] // 100, grid[:, first : first + each])


def test_rows_are_placed_by_their_number_and_not_by_where_they_stand():
    mesh = mesh_of(2, 2, 2)
    rows = np.random.default_rng(0).permutation(8)
    placed = put_batch(batch_of(rows), mesh, rows=rows, batch_size=8)
    np.testing.assert_array_equal(placed.tokens_BT[0], batch_of(np.arange(8)).tokens_BT)


def test_micro_batches_that_cannot_be_spread_evenly_name_a_batch_size_that_can():
    with pytest.raises(ValueError, match=r"micro-batches of 6 rows.*data x fsdp x expert = 4 devices.*a multiple of 8"):
        local_rows(mesh_of(2, 2, 2), batch_size=12, accumulation=2)


def test_an_activation_is_pinned_by_its_letters_inside_a_mesh_and_left_alone_without():
    x = jnp.arange(4 * 3 * 2 * 2, dtype=jnp.float32).reshape(4, 3, 2, 2)
    assert constrain(x, "BTNH") is x
    mesh = mesh_of(2, 2, 2)
    with jax.set_mesh(mesh):
        pinned = jax.jit(lambda x: constrain(x, "BTNH"))(x)
        odd = jax.jit(lambda x: constrain(x, "BTNH"))(x[:3])
    assert {shard.data.shape for shard in pinned.addressable_shards} == {(1, 3, 1, 2)}
    assert {shard.data.shape for shard in odd.addressable_shards} == {(3, 3, 1, 2)}
    np.testing.assert_array_equal(pinned, x)


def test_leading_axes_of_a_batch_are_not_cut():
    mesh = mesh_of(2, 2, 2)
    assert batch_sharding(mesh).shard_shape((8, 5)) == (2, 5)
    assert batch_sharding(mesh, leading_axes=1).shard_shape((8, 8, 5)) == (8, 2, 5)
