"""Low-rank adapters (LoRA, arXiv 2106.09685): what they are made of, how they start, what they add to a projection.

In: the path of a weight, whose letters say everything: `blocks.q_LDNH`, contracted over D, has the factors `a_LDR` and
`b_LRNH`, is stacked, scanned and sharded as it is. Out: trees of factors that lie beside the base, under "lora":

    {"lora": {"blocks": {"q_LDNH": {"a_LDR": ..., "b_LRNH": ...}}}}          base paths stay as they are

y = x W + scale (x A) B. With DoRA (arXiv 2402.09353) each output is then brought to a trained magnitude: times
m / ||W + scale A B||, the norm being that over the inputs, and constant in the backward pass as in section 4.3 there.
With PiSSA (arXiv 2404.02948) A B starts as the principal part of W, and A0 B0, what it started as, is taken off again
in every product rather than once from W: so the base stays what its files say.

L layers, E experts, D model width, F MLP width, N/K heads, H head width, V vocabulary, R rank.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jax_sft.model.quantize import Quantized, dense
from jax_sft.sharding import letters_of

Start = Literal["default", "pissa"]
Factors = Mapping[str, jax.Array]  # of one weight: a_DR, b_RNH and what else there is, by name

_INPUTS = {"q": "D", "k": "D", "v": "D", "o": "NH", "gate": "D", "up": "D", "down": "F", "embed": "V", "head": "D"}
_PISSA_OVERSAMPLING, _PISSA_ITERATIONS = 8, 4


@dataclasses.dataclass(frozen=True)
class Letters:
    """Axes of a weight by what they are for: "blocks.o_LNHD" -> L, NH, D."""

    stack: str  # L, LE or none: one matrix for each
    inputs: str
    outputs: str

    @property
    def a(self) -> str:
        """Of the factor that meets the input."""
        return f"{self.stack}{self.inputs}R"

    @property
    def b(self) -> str:
        """Of the factor that makes the output."""
        return f"{self.stack}R{self.outputs}"

    @property
    def magnitude(self) -> str:
        """Of DoRA's magnitude."""
        return f"{self.stack}{self.outputs}"


def letters(path: str) -> Letters:
    """The letters of an adaptable weight, by its path or its name.

    Raises:
        KeyError: it is no projection, embedding or head (a fault of ours: `jax_sft.hf.targets` finds no other).
    """
    name, all_letters = path.rsplit(".", 1)[-1].rsplit("_", 1)
    inputs = _INPUTS[name]
    stack = "".join(x for x in "LE" if x in all_letters)
    return Letters(stack, inputs, "".join(x for x in all_letters if x not in stack + inputs))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """One weight with an adapter."""

    path: str  # in our tree: "blocks.q_LDNH", "embed_VD", "head_VD"
    # Of each layer (one number where there are no layers). A smaller rank than the largest is filled up with zeros,
    # which nothing moves; a layer of rank 0 has no adapter.
    ranks: tuple[int, ...]
    scales: tuple[float, ...]  # times A B: alpha / rank, or alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732)

    @property
    def rank(self) -> int:
        """R, of the arrays."""
        return max(self.ranks)

    def num_params(self, sizes: Mapping[str, int]) -> int:
        """Numbers of A and B, without the zeros that fill up."""
        of = letters(self.path)
        matrices = math.prod(sizes[x] for x in of.stack.replace("L", ""))
        return matrices * sum(self.ranks) * sum(math.prod(sizes[x] for x in side) for side in (of.inputs, of.outputs))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora:
    """All adapters of a model; hashable, so that it can travel in a graphdef."""

    targets: tuple[Target, ...]
    dropout: float  # of what goes into the adapters of projections and head, while training
    dora: bool
    start: Start  # pissa: what A B started as is taken off, see above

    def shapes(self, sizes: Mapping[str, int]) -> dict[str, Any]:
        """The tree of the factors' shapes, under "lora"; `sizes` says what each letter stands for."""
        tree: dict[str, Any] = {}
        for target in self.targets:
            of, known = letters(target.path), dict(sizes) | {"R": target.rank}
            named = {"a": of.a, "b": of.b}
            if self.start == "pissa":
                named |= {"a_start": of.a, "b_start": of.b}
            if self.dora:
                named["magnitude"] = of.magnitude
            *parents, leaf = target.path.split(".")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[leaf] = {f"{name}_{x}": tuple(known[letter] for letter in x) for name, x in named.items()}
        return {"lora": tree}

    def num_params(self, sizes: Mapping[str, int]) -> int:
        """Trained numbers: without the zeros that fill up, and without where PiSSA started."""
        outputs = [(t, math.prod(sizes[x] for x in letters(t.path).outputs)) for t in self.targets]
        magnitudes = sum(width * sum(map(bool, t.ranks)) for t, width in outputs) if self.dora else 0
        return magnitudes + sum(target.num_params(sizes) for target in self.targets)


def is_constant(path: Sequence[Any]) -> bool:
    """Whether a leaf of the factors is never trained: what A and B started as."""
    return str(getattr(path[-1], "key", path[-1])).rsplit("_", 1)[0] in ("a_start", "b_start")


def initial_factors(
    lora: Lora, params: Mapping[str, Any], sizes: Mapping[str, int], *, seed: int, places: Any = None
) -> dict[str, Any]:
    """The factors, float32, as PEFT starts them: A B = 0, and with DoRA the magnitudes are those of the base.

    A is uniform within +- 1 / sqrt(inputs) (`kaiming_uniform_(a=sqrt(5))`), of the embedding B is normal and A zero.
    Each weight draws from a key of its own, by the seed and its path, and is a program of its own, that DoRA and PiSSA
    run through matrix by matrix: of a base that is held in few bits no more than one is there in float32 at one time.

    Args:
        params: the base's whole tree, read for DoRA and PiSSA; an adapted weight may be quantised.
        places: the shardings of the result, as a tree like it.
    """
    tree = lora.shapes(sizes)
    for target in lora.targets:
        *parents, leaf = target.path.split(".")
        node, base, place = tree["lora"], params, places and places["lora"]
        for parent in parents:
            node, base, place = node[parent], base[parent], place and place[parent]
        weight = base[leaf if leaf in base else "embed_VD"]  # a tied head
        start = functools.partial(_initial_of, lora, target, node[leaf], seed=seed)
        is_read = lora.dora or lora.start == "pissa"
        with jax.default_matmul_precision("highest"):  # for the orthogonal bases of PiSSA
            node[leaf] = jax.jit(start, out_shardings=place and place[leaf])(weight if is_read else None)
    return tree


def _initial_of(
    lora: Lora, target: Target, shapes: Mapping[str, Any], weight: Any, *, seed: int
) -> dict[str, jax.Array]:
    of = letters(target.path)
    number = int.from_bytes(hashlib.blake2b(target.path.encode(), digest_size=4).digest(), "big")
    key = jax.random.fold_in(jax.random.key(seed), np.uint32(number))
    a_name, b_name = f"a_{of.a}", f"b_{of.b}"
    a, b = jnp.zeros(shapes[a_name], jnp.float32), jnp.zeros(shapes[b_name], jnp.float32)
    used = _used(target, stacked=of.stack.startswith("L"))
    factors: dict[str, jax.Array] = {}
    if lora.start == "pissa":
        a, b = _principal(target, of, weight, key)
        a, b = a * _along(used, a, axis=-1), b * _along(used, b, axis=len(of.stack))
        factors = {f"a_start_{of.a}": a, f"b_start_{of.b}": b}
    elif of.inputs == "V":
        b = jax.random.normal(key, b.shape, jnp.float32) * _along(used, b, axis=len(of.stack))
    else:
        bound = 1 / math.sqrt(math.prod(a.shape[len(of.stack) : -1]))
        a = jax.random.uniform(key, a.shape, jnp.float32, -bound, bound) * _along(used, a, axis=-1)
    factors = {a_name: a, b_name: b, **factors}
    if lora.dora:
        factors[f"magnitude_{of.magnitude}"] = _norms(of, weight)
    return factors


def _norms(of: Letters, weight: Any) -> jax.Array:
    """Of each output, over the inputs."""

    def norms(w: jax.Array, inputs: range) -> jax.Array:
        return jnp.sqrt(jnp.sum(jnp.square(w), axis=tuple(inputs)))

    if isinstance(weight, Quantized):
        return _of_each_matrix(lambda w, _: norms(w, range(len(of.inputs))), of, weight)
    # A plain one is read, squared and summed in one go, and no float32 copy of it is made.
    return norms(dense(weight, jnp.float32), range(len(of.stack), len(of.stack) + len(of.inputs)))


def _of_each_matrix(function: Callable[[jax.Array, Any], Any], of: Letters, weight: Any) -> Any:
    """`function` of each matrix of a stack, in float32 with its inputs first, and of its number; results are stacked.

    One after the other, and each made float32 by itself: of all at one time it would be the whole weight. (But XLA:CPU,
    of a bfloat16 stack, makes one float32 copy all the same.)
    """

    def of_part(stack: str, part: Any, number: Any) -> Any:
        if not stack:
            exact = dense(part, jnp.float32)
            return function(exact.T if of.outputs + of.inputs == "VD" else exact, number)  # a head lies the other way
        numbers = number * part.shape[0] + jnp.arange(part.shape[0], dtype=jnp.uint32)
        return jax.lax.map(lambda numbered: of_part(stack[1:], *numbered), (part, numbers))

    return of_part(of.stack, weight, jnp.uint32(0))


def _used(target: Target, *, stacked: bool) -> np.ndarray:
    """1 where a layer has that rank, else 0: float32 [L, R], or [R] without layers."""
    used = (np.arange(target.rank)[None, :] < np.array(target.ranks)[:, None]).astype(np.float32)
    return used if stacked else used[0]


def _along(used: np.ndarray, like: jax.Array, *, axis: int) -> jax.Array:
    """`used` [L, R] or [R], spread over an array whose ranks lie along `axis`."""
    axes = (0, axis % like.ndim) if used.ndim == 2 else (axis % like.ndim,)
    return jax.lax.broadcast_in_dim(jnp.asarray(used), like.shape, axes)


def _principal(target: Target, of: Letters, weight: Any, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A and B of the largest singular values, scale A B ~ W: by a randomised method (Halko et al., arXiv 0909.4061)."""

    def of_one(exact: jax.Array, number: jax.Array) -> tuple[jax.Array, jax.Array]:
        inputs, outputs = exact.shape[: len(of.inputs)], exact.shape[len(of.inputs) :]
        w = exact.reshape(math.prod(inputs), math.prod(outputs))
        rank = min(target.rank, *w.shape)
        probes = min(rank + _PISSA_OVERSAMPLING, *w.shape)
        q = jnp.linalg.qr(w @ jax.random.normal(jax.random.fold_in(key, number), (w.shape[1], probes), w.dtype))[0]
        for _ in range(_PISSA_ITERATIONS):
            q = jnp.linalg.qr(w @ jnp.linalg.qr(w.T @ q)[0])[0]
        u, s, vt = jnp.linalg.svd(q.T @ w, full_matrices=False)
        root = jnp.sqrt(s[:rank])
        a, b = (q @ u[:, :rank]) * root[None, :], root[:, None] * vt[:rank]
        spare = target.rank - rank
        a, b = jnp.pad(a, [(0, 0), (0, spare)]), jnp.pad(b, [(0, spare), (0, 0)])
        return a.reshape(*inputs, -1), b.reshape(-1, *outputs)

    a, b = _of_each_matrix(of_one, of, weight)
    scales = np.array([1 / math.sqrt(s) if s else 0.0 for s in target.scales], np.float32)
    divisors = jnp.asarray(scales if "L" in of.stack else scales[0])
    return a * _spread_front(divisors, a), b * _spread_front(divisors, b)


def _spread_front(x: jax.Array, like: jax.Array) -> jax.Array:
    return jax.lax.broadcast_in_dim(x, like.shape, tuple(range(x.ndim)))


def both_factors(factors: Factors) -> tuple[jax.Array, jax.Array]:
    """A and B; with PiSSA [A, A0] and [B, -B0], of twice the rank, whose product is A B - A0 B0."""
    by_kind = {name.rsplit("_", 1)[0]: x for name, x in factors.items()}
    b_name = next(name for name in factors if name.rsplit("_", 1)[0] == "b")
    a, b = by_kind["a"], by_kind["b"]
    if "a_start" not in by_kind:
        return a, b
    axis = letters_of((b_name,)).index("R")
    a_start, b_start = (jax.lax.stop_gradient(by_kind[name]) for name in ("a_start", "b_start"))
    return jnp.concatenate([a, a_start], axis=-1), jnp.concatenate([b, -b_start], axis=axis)


def magnitude_of(factors: Factors) -> jax.Array | None:
    """DoRA's magnitude; None without DoRA."""
    return next((x for name, x in factors.items() if name.startswith("magnitude_")), None)


def output_gain(weight: Any, a: jax.Array, b: jax.Array, magnitude: jax.Array, scale: jax.Array) -> jax.Array:
    """DoRA's m / ||W + scale A B|| of each output of one matrix, float32; 1 where the scale is 0, so of no adapter.

    ||W + s A B||^2 = ||W||^2 + 2 s sum((A' W) B) + s^2 sum((A' A B) B), so that W + s A B is never made.
    """

    a, b = jax.lax.stop_gradient((a.astype(jnp.float32), b.astype(jnp.float32)))
    w = dense(weight, jnp.float32).reshape(-1, *weight.shape[a.ndim - 1 :])
    a_DR = a.reshape(w.shape[0], -1)
    with jax.default_matmul_precision("highest"):  # a TPU would multiply in bfloat16, and `merged` does not
        cross = jnp.tensordot(a_DR, w, axes=(0, 0))
        product = jnp.tensordot(a_DR.T @ a_DR, b, axes=(1, 0))
    squares = jnp.sum(jnp.square(w), axis=0) + jnp.sum(b * (2 * scale * cross + scale**2 * product), axis=0)
    gain = magnitude / jnp.sqrt(jnp.maximum(squares, jnp.finfo(jnp.float32).tiny))
    return jnp.where(scale == 0, jnp.ones_like(gain), gain)


def merged(lora: Lora, weights: Mapping[str, Any], factors: Mapping[str, Any]) -> dict[str, Any]:
    """The base with its adapters added in, float32: W + scale A B, times DoRA's gain.

    A tied head is one no longer if it or the embedding is adapted: the tree then has a `head_VD` of its own.

    Args:
        weights: the base's whole tree, float32; the adapted arrays are donated.
        factors: the tree under "lora".
    """
    merged = {**weights, "blocks": dict(weights["blocks"])}
    paths = [target.path for target in lora.targets]
    if "head_VD" not in merged and {"head_VD", "embed_VD"} & {*paths}:
        merged["head_VD"] = jnp.copy(merged["embed_VD"])
    for target in lora.targets:
        *parents, leaf = target.path.split(".")
        node, of_target = merged, factors
        for parent in parents:
            node, of_target = node[parent], of_target[parent]
        place = node[leaf].sharding
        add = jax.jit(functools.partial(_merged, target=target), donate_argnums=0, out_shardings=place)
        node[leaf] = add(node[leaf], of_target[leaf])
    return merged


def _merged(weight: jax.Array, factors: Factors, *, target: Target) -> jax.Array:
    of, all_letters = letters(target.path), target.path.rsplit("_", 1)[-1]
    a, b = both_factors(factors)
    scales = np.array(target.scales if "L" in of.stack else target.scales[0], np.float32)
    precise = functools.partial(jnp.einsum, precision="highest")  # a TPU would multiply in bfloat16
    product = precise(f"{of.a},{of.b}->{all_letters}", a.astype(jnp.float32), b.astype(jnp.float32))
    whole = weight + product * _spread_front(jnp.asarray(scales), product)
    magnitude = magnitude_of(factors)
    if magnitude is None:
        return whole
    inputs = tuple(all_letters.index(letter) for letter in of.inputs)
    norm = jnp.sqrt(jnp.sum(jnp.square(whole), axis=inputs))
    gain = magnitude / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny)
    gain = jnp.where(_spread_front(jnp.asarray(scales), gain) == 0, jnp.ones_like(gain), gain)
    return whole * jnp.expand_dims(gain, inputs)
