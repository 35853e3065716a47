"""What a training takes of each device's memory, told before its first step, and what else would fit.

In: the train state and the frozen weights (arrays or ShapeDtypeStructs with shardings), the compiled train step. Out: a
`MemoryPlan` of plain numbers, and lines of it for the log.

XLA's memory analysis of a compiled step is of one device, on CPU as well, and after sharding: `argument` the shards of
state, frozen weights and batch; `output` the new state and the metrics; `alias` the part of the output that is written
into donated arguments, which is all of the state; `temp` all that comes and goes in between, the gradient among it. So
a step takes argument + output - alias + temp + generated code (0 on CPU). Its `peak_memory` is without `temp` on CPU.
Not counted: the batches made ahead, the programs of evaluation and sampling, what XLA keeps beside its programs.
"""

import dataclasses
import math
import os
import pathlib
from typing import Any, NamedTuple

import jax

_TRAINED_BYTES = 16  # of a parameter under AdamW: itself, two moments and its gradient in float32
# Of a frozen parameter, with the scales of its block: 64 values share one in nf4. In the last two, those of the
# vocabulary (embedding, head) stay bfloat16.
_FROZEN_BYTES = {"bfloat16": 2.0, "int8": 1.0, "nf4": 0.53}
# The most memory that a container may take, by control groups of version 2 and 1.
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Parameters of the whole model, bytes of one device (all hold the same)."""

    trained_parameters: int  # adapters and what is trained beside them; all of them in full fine-tuning
    all_parameters: int
    base_parameters: int  # without adapters; with the rows that fill up a vocabulary
    vocabulary_parameters: int  # of the base: embedding and head
    shards: float  # parts the base is cut into; what every device holds counts as not cut
    base_kind: str  # how most of the base is stored: float32, bfloat16, int8, nf4
    base_bytes: int  # frozen weights
    trained_bytes: int
    optimizer_bytes: int
    gradient_bytes: int
    activation_bytes: int | None  # activations and temporaries of a step; None: this platform does not tell
    rows: int  # of a micro-batch, on each device
    limit_bytes: int | None  # None: unknown
    beside_bytes: int = 0  # a moving average of what is trained, and a copy of the base that training is drawn to

    @property
    def total_bytes(self) -> int:
        """All of it at once."""
        return self._fixed_bytes + (self.activation_bytes or 0)

    @property
    def fits(self) -> bool:
        """Whether it is not known to be too much."""
        return self.limit_bytes is None or self.total_bytes <= self.limit_bytes

    @property
    def rows_that_fit(self) -> int | None:
        """About how many rows of a micro-batch a device has room for, if activations grow in proportion to rows.

        A part of them does not grow, so it is rather too few than too many.
        """
        if not self.activation_bytes or self.limit_bytes is None:
            return None
        return max(0, int((self.limit_bytes - self._fixed_bytes) * self.rows / self.activation_bytes))

    @property
    def _fixed_bytes(self) -> int:
        return self.base_bytes + self.trained_bytes + self.optimizer_bytes + self.gradient_bytes + self.beside_bytes

    def alternatives(self) -> dict[str, int]:
        """Bytes on each device, without activations, that other ways to train this base would about take.

        With the adapters of this run, if it has some; AdamW; the same mesh.
        """
        adapters = self.trained_bytes + self.optimizer_bytes + self.gradient_bytes if self.base_bytes else 0
        in_layers = self.base_parameters - self.vocabulary_parameters
        takes = {"full fine-tuning": _TRAINED_BYTES * self.base_parameters / self.shards}
        for kind, size in _FROZEN_BYTES.items():
            base = size * in_layers + _FROZEN_BYTES["bfloat16"] * self.vocabulary_parameters
            takes[f"LoRA on {kind}"] = base / self.shards + adapters
        takes.pop(f"LoRA on {self.base_kind}" if self.base_bytes else "full fine-tuning", None)
        return {name: round(size) for name, size in takes.items()}

    def lines(self) -> list[str]:
        """For the log."""
        frozen = self.base_bytes > 0
        parts = [f"base {_bytes(self.base_bytes)} ({self.base_kind})"] if frozen else []
        parts.append(f"{'trained' if frozen else 'parameters'} {_bytes(self.trained_bytes)}")
        parts += [f"optimizer {_bytes(self.optimizer_bytes)}", f"gradient {_bytes(self.gradient_bytes)}"]
        parts += [f"average and copy of the base {_bytes(self.beside_bytes)}"] * bool(self.beside_bytes)
        unknown = self.activation_bytes is None
        parts.append(f"activations and temporaries {'unknown' if unknown else _bytes(self.activation_bytes or 0)}")
        known = f"{'more than ' if unknown else ''}{_bytes(self.total_bytes)}"
        limit = "" if self.limit_bytes is None else f" of {_bytes(self.limit_bytes)}"
        share = f"{self.trained_parameters / max(self.all_parameters, 1):.1%}"
        without = "activations" if frozen else "adapters and activations"
        return [
            f"memory on each device: {', '.join(parts)}: {known}{limit}",
            f"trained {_count(self.trained_parameters)} of {_count(self.all_parameters)} parameters ({share})",
            *self._room(),
            f"instead, without {without}: "
            + ", ".join(f"{name} {_bytes(size)}" for name, size in self.alternatives().items()),
        ]

    def _room(self) -> list[str]:
        """The line on what fits, if that is known."""
        rows = self.rows_that_fit
        if not self.fits:
            assert self.limit_bytes is not None, "what has no limit fits"
            ways = ['train.remat = "full"', "more devices along mesh.fsdp", 'lora.base = "nf4"']
            if self.rows > 1:
                few = f" (room for about {rows} instead of {self.rows})" if rows else ""
                ways.insert(0, f"a higher train.accumulation, for fewer rows in a micro-batch{few}")
            over = _bytes(self.total_bytes - self.limit_bytes)
            return [f"this does not fit, by {over} on each device; ways out: {', '.join(ways)}"]
        if rows is None:
            return []
        return [f"would fit: about {rows} rows of a micro-batch on each device, instead of {self.rows}"]


def plan_memory(
    state: Any,
    frozen: Any,
    compiled: Any,
    *,
    origin: Any = None,
    trained_parameters: int,
    all_parameters: int,
    rows: int,
    limit_bytes: int | None,
) -> MemoryPlan:
    """The MemoryPlan of a train step.

    The gradient is counted as large as the trained parameters and taken off the temporaries, which hold it (a second
    one too, where micro-batches are added up).

    Args:
        state: a TrainState, leaves with `.shape`, `.dtype` and `.sharding`. What lies under a key "lora" is an adapter.
        frozen: the frozen weights, {} in full fine-tuning. A quantised one is a pytree of arrays with the `.shape` of
            what it stands for, and is named for its type.
        compiled: the `jax.stages.Compiled` train step.
        origin: the copy of the base that training is drawn to; None: there is none.
        trained_parameters: numbers that move. Arrays do not tell: they hold frozen layers, constants and filling too.
        all_parameters: of the model, and of its adapters those that are trained.
        rows: of a micro-batch, on each device.
        limit_bytes: see `device_limit`.
    """
    trained, weights = _weights(state.params), _weights(frozen)
    base = weights + [w for w in trained if "lora" not in w.names]
    kinds = dict.fromkeys((w.kind for w in base), 0)
    for weight in base:
        kinds[weight.kind] += weight.size
    gradient = _device_bytes(state.params)
    analysis = compiled.memory_analysis()
    activations = None
    if analysis is not None:
        not_aliased = max(0, analysis.output_size_in_bytes - analysis.alias_size_in_bytes)
        temporaries = max(0, analysis.temp_size_in_bytes - gradient)
        activations = temporaries + not_aliased + analysis.generated_code_size_in_bytes
    cut = frozen if weights else state.params
    return MemoryPlan(
        trained_parameters=trained_parameters,
        all_parameters=all_parameters,
        base_parameters=sum(w.size for w in base),
        vocabulary_parameters=sum(w.size for w in base if "V" in w.letters),
        shards=_whole_bytes(cut) / max(_device_bytes(cut), 1),
        base_kind=max(kinds, key=lambda kind: kinds[kind], default="float32"),
        base_bytes=_device_bytes(frozen),
        trained_bytes=gradient,
        optimizer_bytes=_device_bytes(state.opt_state),
        gradient_bytes=gradient,
        activation_bytes=activations,
        rows=rows,
        limit_bytes=limit_bytes,
        beside_bytes=_device_bytes((state.ema, origin)),
    )


def device_limit(device: Any) -> int | None:
    """Bytes that programs may take of a device: what its allocator says, else a share of the host's memory.

    The share is for CPU devices: the physical memory, or the container's limit if that is lower, over the devices of
    this process. Other processes on the host are not known. None if the device has memory of its own and tells nothing.
    """
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit or device.platform != "cpu":
        return limit
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in _CGROUP_LIMITS:
        path = pathlib.Path(name)
        text = path.read_text().strip() if path.is_file() else ""
        limits += [int(text)] if text.isdigit() else []  # "max" is none
    return min(limits) // len(device.client.local_devices())


class _Weight(NamedTuple):
    names: list[str]  # its path
    letters: str  # of its axes
    size: int
    kind: str


def _weights(tree: Any) -> list[_Weight]:
    """All weights of a tree; a quantised one, of several arrays, is one weight."""
    found = []
    for path, leaf in jax.tree.leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape")):
        names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
        kind = str(getattr(leaf, "dtype", type(leaf).__name__.lower()))
        found.append(_Weight(names, names[-1].rsplit("_", 1)[-1], math.prod(leaf.shape), kind))
    return found


def _device_bytes(tree: Any) -> int:
    """Bytes of the shards that one device holds; a leaf without a sharding is whole."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _whole_bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _bytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"
