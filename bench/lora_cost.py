"""What a step costs with adapters: full fine-tuning, LoRA, DoRA and QLoRA beside each other.

Run: python bench/lora_cost.py [--rows 2 8] [--remat none dots full] [--steps 3] [--layers 30]

In: nothing. The model has the shapes of SmolLM2-135M and random weights, which cost what trained ones do. It computes
in float32 on rows of 512 tokens, two texts each, every other token predicted; adapters have rank 16 on all linear maps.
Out: two tables in Markdown. The first is of compiled steps: bytes of the base, of what is trained and its optimizer,
of temporaries (the gradient among them), and the matmul FLOPs against the full step's. The second is measured at the
first number of rows: seconds of a step against the full one's, all of them in turn, medians; `--steps 0` leaves it out.
"""

import argparse
import math
import re
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jax_sft.batch import Batch
from jax_sft.config import LoraConfig, MeshConfig, OptimConfig
from jax_sft.hf.targets import adaptation
from jax_sft.model.decoder import abstract_params, build, random_params
from jax_sft.model.families import read_model_config
from jax_sft.model.lora import initial_factors, letters
from jax_sft.model.quantize import num_bytes, quantize
from jax_sft.optim import optimizer
from jax_sft.parameters import Parameters
from jax_sft.sharding import make_mesh
from jax_sft.train_step import abstract_state, init_state, make_train_step, state_shardings

SMOLLM2_135M = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}
LENGTH = 512
WAYS: dict[str, tuple[LoraConfig | None, str]] = {  # what is trained, how the rest is held
    "full": (None, "float32"),
    "LoRA, float32 base": (LoraConfig(rank=16), "float32"),
    "LoRA": (LoraConfig(rank=16), "bfloat16"),
    "DoRA": (LoraConfig(rank=16, dora=True), "bfloat16"),
    "QLoRA int8": (LoraConfig(rank=16), "int8"),
    "QLoRA nf4": (LoraConfig(rank=16), "nf4"),
}


class Way:
    """One way to train the model: its parts by shape, and steps compiled from them."""

    def __init__(self, name: str, layers: int) -> None:
        lora, self.base = WAYS[name]
        self.name = name
        self.model = read_model_config({**SMOLLM2_135M, "num_hidden_layers": layers})
        self.mesh = make_mesh(MeshConfig())
        self.lora = None if lora is None else adaptation(lora, self.model)
        self.whole = abstract_params(self.model)
        self.plan = Parameters(
            model=self.model,
            lora=self.lora,
            in_full=frozenset(traverse_util.flatten_dict(self.whole, sep=".") if lora is None else ()),
            frozen_layers={},
            base=self.base,
            rslora=False,
            adapter=None,
        )
        self.tx = optimizer(OptimConfig(lr=1e-4), 100, self.plan.abstract_trained)
        self.state = abstract_state(self.plan.abstract_trained, self.tx, self.mesh)
        self.frozen = {} if lora is None else jax.eval_shape(self.held, self.whole)

    def held(self, params: Any) -> Any:
        """The base as it is held."""

        def hold(path: str, array: Any) -> Any:
            name = path.rsplit(".", 1)[-1]
            if self.base == "float32":
                return array
            if self.base == "bfloat16" or not path.startswith("blocks.") or "norm" in name:
                return array.astype(jnp.bfloat16)
            kind: Any = self.base
            return quantize(
                array.astype(jnp.bfloat16), letters=name.rsplit("_", 1)[1], inputs=letters(path).inputs, kind=kind
            )

        flat = traverse_util.flatten_dict(params, sep=".")
        return traverse_util.unflatten_dict({path: hold(path, array) for path, array in flat.items()}, sep=".")

    def compiled(self, rows: int, remat: str) -> jax.stages.Compiled:
        """Its train step."""
        with jax.set_mesh(self.mesh):
            step = make_train_step(
                build(self.model, dtype="float32", attention="auto", lora=self.lora),
                self.tx,
                num_sources=1,
                remat=remat,
                loss_chunk_tokens=1024,
                mesh=self.mesh,
                state_shardings=state_shardings(self.plan.abstract_trained, self.tx, self.mesh),
            )
            return step.lower(self.state, self.frozen, batch_of(rows)).compile()

    def start(self) -> tuple[Any, Any]:
        """A state and frozen weights of random numbers."""
        params = random_params(self.model, 0)
        if self.lora is None:
            return init_state(params, self.tx, self.mesh), {}
        factors = initial_factors(self.lora, params, self.model.sizes, seed=0)
        return init_state(factors, self.tx, self.mesh), jax.jit(self.held, donate_argnums=0)(params)


def batch_of(rows: int) -> Batch:
    """One micro-batch of random tokens: each row two texts of half its length, every other token predicted."""
    shape = (1, rows, LENGTH)
    tokens = np.random.default_rng(0).integers(0, SMOLLM2_135M["vocab_size"], shape).astype(np.int32)
    places = np.arange(LENGTH, dtype=np.int32)
    return Batch(
        tokens_BT=tokens,
        targets_BT=np.roll(tokens, -1, axis=-1),
        weights_BT=np.broadcast_to((places % 2 == 0).astype(np.float32), shape),
        segments_BT=np.broadcast_to(1 + places // (LENGTH // 2), shape),
        positions_BT=np.broadcast_to(places % (LENGTH // 2), shape),
        sources_BT=np.zeros(shape, np.int32),
        predict_BP=np.broadcast_to(places[::2], (1, rows, LENGTH // 2)),
    )


def matmul_flops(program: str) -> int:
    """FLOPs of all products in a compiled program, those in a loop as often as it runs.

    `cost_analysis` counts the body of a loop once, and the layers are one.
    """
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in program.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = header[2]
            entry = name if header[1] else entry
            bodies[name] = []
        elif name:
            bodies[name].append(line)
    counted: dict[str, int] = {}

    def of(name: str) -> int:
        if name in counted:
            return counted[name]
        shapes = {m[1]: _dims(m[2]) for m in re.finditer(r"%([\w.\-]+) = \w+\[([\d,]*)\]", "\n".join(bodies[name]))}
        total = 0
        for line in bodies[name]:
            if dot := re.search(r"= \w+\[([\d,]*)\]\S* dot\(%([\w.\-]+),.*lhs_contracting_dims=\{([\d,]*)\}", line):
                contracted = math.prod(shapes[dot[2]][axis] for axis in _dims(dot[3]))
                total += 2 * math.prod(_dims(dot[1])) * contracted
            times = int(m[1]) if (m := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line)) else 1
            for called in re.findall(r"(?:calls|body|to_apply)=%?([\w.\-]+)", line):
                total += times * of(called)
        counted[name] = total
        return total

    return of(entry)


def _dims(text: str) -> list[int]:
    return [int(x) for x in text.split(",") if x]


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f}" if size < 1e8 else f"{size / 1e6:,.0f}"


def main() -> None:
    """Compile, then measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--remat", nargs="+", default=["none", "dots", "full"])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS), metavar="WAY")
    options = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {options.layers} layers, rows of {LENGTH} tokens\n")
    ways = [Way(name, options.layers) for name in options.ways]
    for rows in options.rows:
        columns = [f"temporary, {remat}" for remat in options.remat] + [f"matmuls, {remat}" for remat in options.remat]
        print(f"| {rows} rows; MB | base | trained | optimizer | {' | '.join(columns)} |", flush=True)
        print(f"|:--|{'--:|' * (3 + len(columns))}", flush=True)
        full: dict[str, int] = {}
        for way in ways:
            sizes = [num_bytes(way.frozen), num_bytes(way.state.params), num_bytes(way.state.opt_state)]
            temporary, products = [], []
            for remat in options.remat:
                step = way.compiled(rows, remat)
                flops = matmul_flops(step.as_text() or "")
                analysis: Any = step.memory_analysis()
                temporary.append(analysis.temp_size_in_bytes)
                products.append(f"{flops / full.setdefault(remat, flops):.2f} x")
            cells = [*map(_megabytes, [*sizes, *temporary]), *products]
            print(f"| {way.name} | {' | '.join(cells)} |", flush=True)
        print()
    if options.steps:
        remat = "dots" if "dots" in options.remat else options.remat[0]
        measure(ways, options.rows[0], remat, options.steps)


def measure(ways: list[Way], rows: int, remat: str, steps: int) -> None:
    """Print seconds of a step, of all ways in turn."""
    batch = jax.device_put(batch_of(rows))
    running = [[way.compiled(rows, remat), *way.start()] for way in ways]
    taken: list[list[tuple[float, float]]] = [[] for _ in ways]
    for repetition in range(steps + 1):
        for one, times in zip(running, taken, strict=True):
            step, state, frozen = one
            clocks = time.perf_counter(), time.process_time()
            one[1], _ = jax.block_until_ready(step(state, frozen, batch))
            if repetition:  # the first touches its memory for the first time
                times.append((time.perf_counter() - clocks[0], time.process_time() - clocks[1]))
    print(f"| {rows} rows, remat {remat}, {steps} steps | s a step | against {ways[0].name} | processor | against it |")
    print("|:--|--:|--:|--:|--:|")
    first = [statistics.median(column) for column in zip(*taken[0], strict=True)]
    for way, times in zip(ways, taken, strict=True):
        wall, processor = (statistics.median(column) for column in zip(*times, strict=True))
        print(f"| {way.name} | {wall:.2f} | {wall / first[0]:.2f} x | {processor:.2f} | {processor / first[1]:.2f} x |")


if __name__ == "__main__":
    main()
