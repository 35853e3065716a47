"""Which part of a parameter each process reads from the files, and how it gets from there to its place.

In: a parameter's rule (how it lies in the file) and its sharding (where it is to lie). Out: the sharding to read it
in, the parts of it that this process holds, and the array moved to its place.
A file's tensor lies row by row. A cut through its rows (D of "(N H) D") leaves a piece of every row to each process,
and a disk reads whole pages, so every process would read the whole file. So several processes read whole rows, each
its own, and the devices exchange the pieces.
"""

import functools
import math
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jax_sft.hf.names import Rule

Bounds = tuple[tuple[int, int], ...]  # first and last + 1 of each axis


def parts(sharding: Any, shape: tuple[int, ...]) -> dict[Bounds, list[Any]]:
    """The different parts of an array that this process holds, each with its devices."""
    devices_of: dict[Bounds, list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        devices_of.setdefault(bounds, []).append(device)
    return devices_of


def by_rows(rule: Rule, sharding: Any, shape: tuple[int, ...]) -> Any:
    """`sharding` with the mesh axes that cut the file's rows moved to where they cut between rows, or between layers.

    It stays as it is in one process, which reads all parts anyway, and where nothing else can be cut evenly.
    """
    if not isinstance(sharding, NamedSharding) or sharding.is_fully_addressable:
        return sharding
    letters = rule.stack + rule.letters
    spec = (*sharding.spec, *[None] * (len(letters) - len(sharding.spec)))
    axes_of = {
        x: () if axes is None else axes if isinstance(axes, tuple) else (axes,)
        for x, axes in zip(letters, spec, strict=True)
    }
    outer = rule.groups[0][0] + rule.stack
    inner = tuple(axis for x in letters if x not in outer for axis in axes_of[x])
    size_of = dict(zip(letters, shape, strict=True))
    for letter in outer if inner else "":
        axes = (*inner, *axes_of[letter])
        if size_of[letter] % math.prod(sharding.mesh.shape[axis] for axis in axes) == 0:
            cut = {x: axes_of[x] if x in outer else () for x in letters} | {letter: axes}
            return NamedSharding(sharding.mesh, PartitionSpec(*(cut[x] or None for x in letters)))
    return sharding


def moved(array: jax.Array, sharding: Any) -> jax.Array:
    """`array` in its place; all processes call it."""
    return array if array.sharding == sharding else _mover(sharding)(array)


@functools.lru_cache
def _mover(sharding: Sharding) -> Any:
    return jax.jit(lambda array: array, out_shardings=sharding)
