"""Train steps of a tiny Llama with adapters beside a frozen base, for the tests that compare them.

In: what `lora.*` of a config says, a mesh, how the base is held. Out: a `Run`, whose steps are compiled once.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh

from jax_sft.batch import Batch
from jax_sft.config import LoraConfig, MeshConfig, OptimConfig
from jax_sft.data.conversation import Sequence
from jax_sft.data.packing import fill_rows
from jax_sft.hf.targets import adaptation
from jax_sft.model.config import ModelConfig
from jax_sft.model.decoder import build
from jax_sft.model.families import read_model_config
from jax_sft.model.lora import Lora, initial_factors, letters
from jax_sft.model.quantize import quantize, shardings
from jax_sft.optim import optimizer
from jax_sft.sharding import local_rows, make_mesh, put_batch, shard_params
from jax_sft.train_step import init_state, make_eval_step, make_train_step, state_shardings
from tests.hf.family_cases import params_of

V, T, P, ROWS = 88, 24, 18, 8
MODEL = read_model_config(
    {
        "model_type": "llama",
        "vocab_size": V,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
    }
)
# A large eps: Adam turns the float noise of a gradient near zero into a step of full size.
OPTIM = OptimConfig(lr=1e-2, schedule="constant", weight_decay=0.1, clip_norm=0.5, eps=1e-3)


def mesh_of(data: int = 1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    return make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), jax.devices()[: data * fsdp * tensor])


def sequences(lengths: tuple[int, ...], *, seed: int = 0) -> list[Sequence]:
    """Random sequences; the first part of each is a prompt. Their weights differ."""
    random = np.random.default_rng(seed)
    found = []
    for i, n in enumerate(lengths):
        tokens, weights = random.integers(0, V, n + 1).astype(np.int32), np.zeros(n, np.float32)
        weights[-max(1, int(n * random.uniform(0.2, 0.6))) :] = random.choice([0.25, 1.0, 3.0])
        found.append(Sequence(tokens_T=tokens[:-1], targets_T=tokens[1:], weights_T=weights, source="s", id=str(i)))
    return found


def rows_of(*rows: list[Sequence]) -> Batch:
    numbered = [[(sequence, i % 2) for sequence in row] for i, row in enumerate(rows)]
    return fill_rows(numbered, length=T, predict_capacity=P, num_rows=ROWS)


def uneven_batch() -> Batch:
    """Eight rows of very different weight; some hold several conversations, the last none."""
    lengths = [(24,), (2,), (9, 9), (1,), (5,), (12, 3, 7), (2, 1), ()]
    return rows_of(*(sequences(n, seed=i) for i, n in enumerate(lengths)))


def random_factors(lora: Lora, params: Any, model: ModelConfig, *, seed: int = 0) -> dict[str, Any]:
    """Adapters that are not fresh: A B is far from 0, magnitudes far from the base's; what fills up ranks stays 0."""
    random = np.random.default_rng(seed)
    start = jax.device_get(jax.jit(functools.partial(initial_factors, lora, sizes=model.sizes, seed=seed))(params))
    flat: dict[str, Any] = dict(traverse_util.flatten_dict(start, sep="."))
    for target in lora.targets:
        for key in [key for key in flat if key.startswith(f"lora.{target.path}.")]:
            name, axes = key.rsplit(".", 1)[-1].rsplit("_", 1)
            if name == "magnitude":
                flat[key] = flat[key] * random.uniform(0.7, 1.3, flat[key].shape).astype(np.float32)
            elif name in ("a", "b"):
                used = np.arange(target.rank)[None, :] < np.array(target.ranks)[:, None]
                used = used if "L" in letters(target.path).stack else used[0]
                kept = "LR" if used.ndim == 2 else "R"
                shape = [n if x in kept else 1 for n, x in zip(flat[key].shape, axes, strict=True)]
                noise = 0.2 * random.standard_normal(flat[key].shape)
                flat[key] = flat[key] + (noise * used.reshape(shape)).astype(np.float32)
    return traverse_util.unflatten_dict(flat, sep=".")


def frozen_of(params: Any, base: Any, mesh: Mesh) -> Any:
    """The base on the mesh: in float32, or its projections quantised."""
    placed = jax.device_put(params, shard_params(params, mesh))
    if base == "float32":
        return placed
    for name, kernel in placed["blocks"].items():
        if name.rsplit("_", 1)[0] in ("q", "k", "v", "o", "gate", "up", "down"):
            axes = name.rsplit("_", 1)[-1]
            make = functools.partial(quantize, letters=axes, inputs=letters(name).inputs, kind=base)
            places = shardings(axes, jax.eval_shape(make, kernel), mesh)
            placed["blocks"][name] = jax.jit(make, out_shardings=places)(kernel)
    return placed


class Run:
    """A train step of adapters with everything it needs. Use `run_of`, so that each is compiled once."""

    def __init__(
        self,
        *,
        mesh: Mesh | None = None,
        accumulation: int = 1,
        base: str = "float32",
        model: ModelConfig = MODEL,
        optim: OptimConfig = OPTIM,
        b_lr_ratio: float = 1.0,
        **said: Any,
    ) -> None:
        self.mesh, self.accumulation, self.base, self.model = mesh or mesh_of(), accumulation, base, model
        said = {"rank": 3, "targets": ("all-linear",)} | said
        self.lora = adaptation(LoraConfig(**said), model)
        self.graphdef = build(model, dtype="float32", attention="xla", lora=self.lora)
        shapes = self.lora.shapes(model.sizes)
        abstract = jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s, jnp.float32), shapes, is_leaf=lambda s: isinstance(s, tuple)
        )
        self.tx = optimizer(optim, 10, abstract, b_lr_ratio=b_lr_ratio)
        self.step = make_train_step(
            self.graphdef,
            self.tx,
            num_sources=2,
            remat="none",
            loss_chunk_tokens=16,
            mesh=self.mesh,
            state_shardings=state_shardings(abstract, self.tx, self.mesh),
            dropout_seed=0 if self.lora.dropout else None,
        )
        self.evaluate = make_eval_step(self.graphdef, num_sources=2, loss_chunk_tokens=16, mesh=self.mesh)

    def init(self, factors: Any = None) -> Any:
        start = random_factors(self.lora, params_of(self.model), self.model) if factors is None else factors
        return init_state(jax.tree.map(jnp.array, start), self.tx, self.mesh)

    @functools.cached_property
    def frozen(self) -> Any:
        return frozen_of(params_of(self.model), self.base, self.mesh)

    def put(self, batch: Batch) -> Batch:
        rows = local_rows(self.mesh, batch_size=ROWS, accumulation=self.accumulation)
        return put_batch(batch, self.mesh, rows=rows, batch_size=ROWS, accumulation=self.accumulation)

    def after(self, steps: int, batch: Batch | None = None, *, factors: Any = None) -> tuple[Any, Any]:
        """Host copies of the adapters after some steps, and the last metrics."""
        state, placed = self.init(factors), self.put(uneven_batch() if batch is None else batch)
        metrics = None
        for _ in range(steps):
            state, metrics = self.step(state, self.frozen, placed)
        return jax.device_get(state.params), jax.device_get(metrics)


@functools.cache
def run_of(sizes: tuple[int, int, int] = (1, 1, 1), **said: Any) -> Run:
    return Run(mesh=mesh_of(*sizes), **said)


def assert_close(got: Any, wanted: Any, *, atol: float) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol, rtol=0), got, wanted)


def jaxprs_in(equation: Any) -> list[Any]:
    """The programs that an equation of a jaxpr runs."""
    found = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns"))
    return [getattr(x, "jaxpr", x) for x in found if hasattr(x, "eqns")]
