"""What a step with adapters leaves out: no product makes a frozen weight's gradient, and nothing stores one.

Nothing is rematerialised in any of the steps that are compared, so no product is made twice. FLOPs are those of the
matrix products of a step as it is traced, for models and adapters in the proportions of real ones.
"""

import functools
import itertools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_sft.batch import Batch
from jax_sft.config import LoraConfig, OptimConfig
from jax_sft.hf.targets import adaptation
from jax_sft.model.config import ModelConfig
from jax_sft.model.decoder import abstract_params, build
from jax_sft.model.families import read_model_config
from jax_sft.model.lora import letters
from jax_sft.model.quantize import Quantized, quantize
from jax_sft.optim import optimizer
from jax_sft.train_step import abstract_state, make_train_step, state_shardings
from tests.adapted import jaxprs_in, mesh_of

B, T, RANK = 6, 128, 8  # so that no activation has the shape of a weight
MODEL = read_model_config(
    {
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }
)
EXPERTS = read_model_config(
    {
        "model_type": "qwen3_moe",
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 384,
        "moe_intermediate_size": 64,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }
)
FULL, LORA, DORA = "full", "lora", "dora"
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


def held(base: Any, model: ModelConfig) -> dict[str, Any]:
    """The base as ShapeDtypeStructs."""
    tree = abstract_params(model)
    if base == "float32":
        return tree
    for name, kernel in tree["blocks"].items():
        if name.split("_")[0] in PROJECTIONS and "norm" not in name:
            make: Any = functools.partial(quantize, letters=name.split("_")[-1], inputs=letters(name).inputs, kind=base)
            tree["blocks"][name] = jax.eval_shape(make, kernel)
    return tree


def step_of(kind: str, base: str, model: ModelConfig, rank: int, rows: int, length: int) -> tuple[Any, tuple[Any, ...]]:
    """A train step and its abstract arguments."""
    mesh, lora, frozen = mesh_of(), None, {}
    trained: Any = abstract_params(model)
    if kind != FULL:
        lora = adaptation(LoraConfig(rank=rank, targets=("all-linear",), dora=kind == DORA), model)
        frozen = held(base, model)
        is_shape = {"is_leaf": lambda s: isinstance(s, tuple)}
        trained = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), lora.shapes(model.sizes), **is_shape)
    tx = optimizer(OptimConfig(lr=1e-3), 10, trained)
    step = make_train_step(
        build(model, dtype="float32", attention="xla", lora=lora),
        tx,
        num_sources=1,
        remat="none",
        loss_chunk_tokens=1024,
        mesh=mesh,
        state_shardings=state_shardings(trained, tx, mesh),
    )
    dtype_of = {"weights_BT": jnp.float32}
    leaves = [jax.ShapeDtypeStruct((1, rows, length), dtype_of.get(name, jnp.int32)) for name in Batch._fields]
    return step, (abstract_state(trained, tx, mesh), frozen, Batch(*leaves))


@functools.cache
def compiled(kind: str, base: str = "float32") -> jax.stages.Compiled:
    step, arguments = step_of(kind, base, MODEL, RANK, B, T)
    return step.lower(*arguments).compile()


_SHAPE = r"\w+\[([\d,]*)\]"
_DOT = re.compile(rf"= {_SHAPE}\S* dot\(")
_CALL = re.compile(rf"= {_SHAPE}\S* custom-call\(.*(?:matmul|dot)")


def made_by_products(program: jax.stages.Compiled) -> set[tuple[int, ...]]:
    """Shapes of what matrix products make in the compiled program, without axes of length 1."""
    text = program.as_text()
    assert text is not None
    found = [m for line in text.splitlines() for m in [_DOT.search(line) or _CALL.search(line)] if m]
    assert found, "no product is seen: this test looks at the wrong text"
    return {tuple(int(n) for n in m[1].split(",") if n and n != "1") for m in found}


def layouts(path: str, shape: tuple[int, ...]) -> set[tuple[int, ...]]:
    """All that a gradient of one layer may look like: its axes in any order, and neighbours put together."""
    of = letters(path)
    axes = dict(zip(path.rsplit("_", 1)[-1], shape, strict=True))
    inputs, outputs = (tuple(axes[x] for x in side) for side in (of.inputs, of.outputs))
    sides = [{inputs, (math.prod(inputs),)}, {outputs, (math.prod(outputs),)}]
    found = set()
    for ins, outs in itertools.product(*sides):
        found |= set(itertools.permutations((*ins, *outs)))
    return found


FROZEN = {
    f"blocks.{name}": shape
    for name, shape in MODEL.shapes["blocks"].items()
    if name.split("_")[0] in PROJECTIONS and "norm" not in name
} | {"head_VD": MODEL.shapes["head_VD"]}


def gradients(program: jax.stages.Compiled) -> set[str]:
    """Paths of the matrices whose gradient some product of the program may make."""
    made = made_by_products(program)
    return {path for path, shape in FROZEN.items() if layouts(path, shape) & made}


def test_the_shapes_tell_gradients_from_activations():
    assert len(FROZEN) == 8
    widths = [(128,), (64,), (384,), (512,), (4, 32), (2, 32), (4, T), (2, 2, T)]  # also of heads, and their scores
    activations = {(*rows, *width) for rows in ((B * T,), (B, T)) for width in widths}
    assert not any(layouts(path, shape) & activations for path, shape in FROZEN.items())


def test_the_full_step_makes_the_gradient_of_every_matrix():
    assert gradients(compiled(FULL)) == set(FROZEN)


@pytest.mark.parametrize(("kind", "base"), [(LORA, "float32"), (DORA, "nf4")])
def test_no_product_of_a_step_with_adapters_makes_a_frozen_weight_s_gradient(kind: str, base: str):
    assert gradients(compiled(kind, base)) == set()


def floats_kept_for_each_layer(jaxpr: Any) -> set[int]:
    """Sizes of what scans hand out of their loop in floating point, so of what their backward pass finds stored."""
    found: set[int] = set()
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            of_layers = [var.aval for var in equation.outvars[equation.params["num_carry"] :]]
            found |= {x.size for x in of_layers if jnp.issubdtype(x.dtype, jnp.floating)}
        found = found.union(*map(floats_kept_for_each_layer, jaxprs_in(equation)))
    return found


@pytest.mark.parametrize("base", ["int8", "nf4"])
@pytest.mark.parametrize(("kind", "model"), [(LORA, MODEL), (DORA, MODEL), (LORA, EXPERTS)])
def test_without_rematerialisation_no_dequantised_kernel_is_kept_for_the_backward_pass(
    kind: str, model: ModelConfig, base: str
):
    step, arguments = step_of(kind, base, model, RANK, B, 80)  # so that no activation is as large as a kernel
    kept = floats_kept_for_each_layer(step.trace(*arguments).jaxpr.jaxpr)
    kernels = {math.prod(x.shape) for x in arguments[1]["blocks"].values() if isinstance(x, Quantized)}
    assert len(kernels) == 3 and len(kept) > 5
    assert not kernels & kept


LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}
LLAMA_8B |= {"num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False}
SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
SMOLLM2 |= {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}


def product_flops(jaxpr: Any) -> float:
    """Of all matrix products, those of a loop as often as it turns."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            left, _ = equation.params["dimension_numbers"][0]
            summed = math.prod(equation.invars[0].aval.shape[i] for i in left)
            total += 2 * summed * math.prod(equation.outvars[0].aval.shape)
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        assert equation.primitive.name != "while" or not any(map(product_flops, jaxprs_in(equation)))
        total += times * sum(map(product_flops, jaxprs_in(equation)))
    return total


@functools.cache
def flops(kind: str, name: str, rank: int, base: str = "float32", length: int = 512) -> float:
    sizes = {"8B": LLAMA_8B, "135M": SMOLLM2}[name]
    rest = {"max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "hidden_act": "silu"}
    model = read_model_config({"model_type": "llama"} | sizes | rest)
    step, arguments = step_of(kind, base, model, rank, 1, length)
    return product_flops(step.trace(*arguments).jaxpr.jaxpr)


def test_flops_of_the_full_step_are_six_for_each_weight_and_token():
    weights, attention = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336) + 128256 * 4096, 32 * 4096 * 512
    assert flops(FULL, "8B", 16) == 6 * 512 * (weights + 2 * attention)


@pytest.mark.parametrize(
    ("name", "rank", "base", "length", "share"),
    [
        ("8B", 16, "float32", 512, 0.68),
        ("8B", 64, "float32", 512, 0.70),
        ("8B", 16, "nf4", 512, 0.68),
        ("135M", 4, "float32", 128, 0.70),  # in longer rows attention, the same in both, is a larger part of them
    ],
)
def test_a_step_with_adapters_takes_at_most_seven_tenths_of_the_full_step_s_flops(
    name: str, rank: int, base: str, length: int, share: float
):
    found = flops(LORA, name, rank, base, length) / flops(FULL, name, rank, length=length)
    assert 2 / 3 < found <= share, found


def test_the_state_and_the_output_of_a_step_hold_adapters_and_nothing_of_the_base():
    full, lora = compiled(FULL).memory_analysis(), compiled(LORA).memory_analysis()
    assert full is not None and lora is not None
    config = LoraConfig(rank=RANK, targets=("all-linear",))
    trained = adaptation(config, MODEL).num_params(MODEL.sizes)
    assert lora.output_size_in_bytes == pytest.approx(3 * 4 * trained, rel=0.01)
    assert full.output_size_in_bytes == pytest.approx(3 * 4 * MODEL.num_params, rel=0.01)


@pytest.mark.parametrize(("base", "dtype"), [("nf4", np.uint8), ("int8", np.int8)])
def test_frozen_matrices_of_a_quantised_base_go_in_as_8_bit_numbers(base: str, dtype: Any):
    frozen = held(base, MODEL)
    for name, kernel in frozen["blocks"].items():
        if name.split("_")[0] in PROJECTIONS:
            assert kernel.codes.dtype == dtype, name
            floats = sum(x.size for x in jax.tree.leaves(kernel) if jnp.issubdtype(x.dtype, jnp.floating))
            assert floats <= math.prod(kernel.shape) / 8, name
