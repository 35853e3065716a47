"""What grouped products cost: `jax.lax.ragged_dot` against one dense product of as many operations.

Run: python bench/experts.py

In: nothing. Out: for some numbers of experts, how many times longer the grouped product takes, forward and with both
gradients. Tokens are spread over the experts at random; medians of five, the two measured in turn.

M pair of a token and a choice, D model width, F width of an expert, E experts.
"""

import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

M, D = 2048, 512
SHAPES = [(8, 1024), (32, 512), (128, 256)]  # E, F
REPETITIONS = 5


def grouped(x_MD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    return jax.lax.ragged_dot(x_MD, w_EDF, sizes_E)


def dense(x_MD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    del sizes_E
    return x_MD @ w_EDF[0]


def gradients(product: Callable[..., jax.Array]) -> Callable[..., object]:
    return jax.jit(jax.grad(lambda *arguments: (product(*arguments) ** 2).sum(), (0, 1)))


def times_as_long(one: Callable[..., object], other: Callable[..., object], *arguments: jax.Array) -> float:
    taken: list[list[float]] = [[], []]
    for repetition in range(REPETITIONS + 1):
        for run, times in zip((one, other), taken, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(run(*arguments))
            if repetition:  # the first compiles
                times.append(time.perf_counter() - start)
    return statistics.median(taken[0]) / statistics.median(taken[1])


def main() -> None:
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, M {M}, D {D}, float32")
    for experts, width in SHAPES:
        random = np.random.default_rng(0)
        x_MD = jnp.asarray(random.standard_normal((M, D)), jnp.float32)
        w_EDF = jnp.asarray(random.standard_normal((experts, D, width)), jnp.float32)
        sizes_E = jnp.asarray(np.bincount(random.integers(0, experts, M), minlength=experts), jnp.int32)
        forward = times_as_long(jax.jit(grouped), jax.jit(dense), x_MD, w_EDF, sizes_E)
        backward = times_as_long(gradients(grouped), gradients(dense), x_MD, w_EDF, sizes_E)
        print(f"E {experts:4}, F {width:4}: forward {forward:6.1f} x, gradients {backward:6.1f} x")


if __name__ == "__main__":
    main()
