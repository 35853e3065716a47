"""The alphabet, the mesh, and which letter lies on which axis of it.

B batch row, T query/token position, S key position, D model width, F MLP width, N query heads, K key/value heads,
G query heads per key/value head, H head width, V vocabulary, L layers, E experts, P predicted position.

A weight's letters (its layout in memory) are the suffix of its name in the parameter tree: `kernel_LDNH` -> "LDNH".
From the letters alone follows its place on the mesh.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jax_sft.batch import Batch
from jax_sft.config import MeshConfig

AXES = ("data", "fsdp", "expert", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")  # rows are spread over all of them
WEIGHT_AXIS_OF_LETTER = {"D": "fsdp", "E": "expert", "F": "tensor", "N": "tensor", "K": "tensor", "V": "tensor"}


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> Mesh:
    """The device mesh with the axes of `AXES`.

    Raises:
        ValueError: the sizes do not multiply to the number of devices.
    """
    devices = devices if devices is not None else jax.devices()
    sizes = [getattr(config, axis) for axis in AXES]
    if -1 in sizes:
        known = -math.prod(sizes)
        if len(devices) % known:
            raise ValueError(
                f"mesh: {len(devices)} devices cannot be divided by {known}, what mesh.{', .'.join(AXES)} name; "
                "change them"
            )
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"mesh: {' x '.join(AXES)} = {' x '.join(map(str, sizes))} = {math.prod(sizes)}, but there are "
            f"{len(devices)} devices; set one of them to -1 to take what is left"
        )
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def letters_of(path: tuple[Any, ...]) -> str:
    """Axis letters of a parameter: what follows the last underscore of its name.

    `path` is a jax key path or a tuple of names.
    """
    last = path[-1]
    name = str(getattr(last, "key", getattr(last, "name", last)))
    letters = name.rsplit("_", 1)[-1]
    if not letters.isupper():
        raise ValueError(f"parameter {name!r} does not end in its axis letters")
    return letters


def weight_spec(letters: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Where a weight lies; an axis that does not divide its dimension, or is used already, is left out."""
    used: set[str] = set()
    spec: list[str | None] = []
    for letter, size in zip(letters, shape, strict=True):
        axis = WEIGHT_AXIS_OF_LETTER.get(letter)
        if axis is None or axis in used or size % mesh.shape[axis]:
            spec.append(None)
        else:
            used.add(axis)
            spec.append(axis)
    return PartitionSpec(*spec)


def shard_params(abstract: Mapping[str, Any], mesh: Mesh) -> Any:
    """A tree of `NamedSharding` like `abstract` (arrays or ShapeDtypeStructs whose names end in their letters)."""
    return jax.tree.map_with_path(
        lambda path, leaf: NamedSharding(mesh, weight_spec(letters_of(path), leaf.shape, mesh)), abstract
    )


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Every device holds all of it."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, leading_axes: int = 0) -> NamedSharding:
    """Rows over the batch axes; `leading_axes` unsharded axes (micro-batches) come first."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * leading_axes, BATCH_AXES))


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """How many parts the rows of a batch are cut into."""
    return math.prod(mesh.shape[a] for a in BATCH_AXES)


def constrain(x: jax.Array, letters: str) -> jax.Array:
    """Pin an activation to the mesh in use: B over the batch axes, N K F V over tensor; no-op without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    spec: list[Any] = []
    for letter, size in zip(letters, x.shape, strict=True):
        axes = BATCH_AXES if letter == "B" else {"N": "tensor", "K": "tensor", "F": "tensor", "V": "tensor"}.get(letter)
        names = (axes,) if isinstance(axes, str) else axes or ()
        spec.append(axes if axes and size % math.prod(mesh.shape[a] for a in names) == 0 else None)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def local_rows(mesh: Mesh, *, batch_size: int, accumulation: int = 1) -> np.ndarray:
    """Which of the `batch_size` rows the devices of this process hold, ascending.

    Raises:
        ValueError: a micro-batch cannot be spread evenly over the batch axes.
    """
    grid = np.arange(batch_size).reshape(accumulation, -1)
    shards = batch_shards(mesh)
    if grid.shape[1] % shards:
        raise ValueError(
            f"train.batch_size = {batch_size} / train.accumulation = {accumulation} gives micro-batches of "
            f"{grid.shape[1]} rows, which cannot be spread over {' x '.join(BATCH_AXES)} = {shards} devices; make the "
            f"batch size a multiple of {shards * accumulation}"
        )
    places = batch_sharding(mesh, leading_axes=1).addressable_devices_indices_map(grid.shape)
    held = [np.arange(grid.shape[1])[index[1]] for index in places.values() if index is not None]
    return np.sort(grid[:, np.unique(np.concatenate(held))].reshape(-1))


def put_batch(batch: Batch, mesh: Mesh, *, rows: np.ndarray, batch_size: int, accumulation: int = 1) -> Batch:
    """Send this process's `rows` (see `local_rows`) to its devices: global arrays [accumulation, B, ...]."""
    grid = np.arange(batch_size).reshape(accumulation, -1)
    place = np.full(batch_size, -1)
    place[rows] = np.arange(len(rows))
    sharding = batch_sharding(mesh, leading_axes=1)

    def put(x: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            return x[place[grid[index[:2]]]]

        return jax.make_array_from_callback((*grid.shape, *x.shape[1:]), sharding, part)

    return Batch(*(put(np.asarray(x)) for x in batch))


def abstract_batch(batch: Batch, mesh: Mesh, *, batch_size: int, accumulation: int = 1) -> Batch:
    """What `put_batch` makes of batches like `batch` (of any number of rows), as ShapeDtypeStructs."""
    leading, sharding = (accumulation, batch_size // accumulation), batch_sharding(mesh, leading_axes=1)
    return Batch(*(jax.ShapeDtypeStruct((*leading, *x.shape[1:]), x.dtype, sharding=sharding) for x in batch))
