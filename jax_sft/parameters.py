"""The parameters of a run: which are trained and which frozen, how each is held, where they come from.

In: a RunConfig and the model's files. Out: two trees that `nnx.merge` puts together, `trained` (float32: adapters under
"lora", and what is trained in full, at its own path) and `frozen` (the rest of the base, in float32, bfloat16, int8 or
nf4; {} in plain full fine-tuning). Only `trained` and its optimizer live in a TrainState and in checkpoints.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh

from jax_sft.config import RunConfig
from jax_sft.data.template import with_defaults
from jax_sft.hf.load import Pretrained, load_configured, load_params
from jax_sft.hf.peft import Adapter, check_base, read_adapter, with_template_of
from jax_sft.hf.stored import weights_hash
from jax_sft.hf.targets import adaptation, frozen_layers, in_words, summary, trained_in_full
from jax_sft.model.config import ModelConfig
from jax_sft.model.decoder import abstract_params
from jax_sft.model.lora import Lora, initial_factors, letters
from jax_sft.model.quantize import quantize, shardings
from jax_sft.sharding import shard_params

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parameters:
    """What is trained of a model, and how the rest of it is held."""

    model: ModelConfig
    lora: Lora | None  # None: full fine-tuning
    in_full: frozenset[str]  # paths of the base that are trained as they are
    frozen_layers: Mapping[str, tuple[bool, ...]]  # which layers of a path are not, also of `in_full`; others: none
    base: str  # of what is frozen: float32, bfloat16, or of projections int8 or nf4 (the rest is bfloat16 then)
    rslora: bool  # whether the scales are meant as alpha / sqrt(rank), which an adapter's file says
    adapter: Adapter | None  # what the adapters go on from; None: they start anew

    @property
    def abstract_trained(self) -> Params:
        """The trained tree, as ShapeDtypeStructs."""
        flat = _flat(abstract_params(self.model))
        chosen = {path: leaf for path, leaf in flat.items() if path in self.in_full}
        shapes = {} if self.lora is None else _flat(self.lora.shapes(self.model.sizes))
        factors = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}
        return _nested(chosen | factors)

    @property
    def num_params(self) -> int:
        """Numbers of the model and, of its adapters, those that are trained."""
        return self.model.num_params + (0 if self.lora is None else self.lora.num_params(self.model.sizes))

    @property
    def num_trained(self) -> int:
        """Numbers that are trained: none of what is constant, of layers that are frozen, or of what fills up."""
        flat = _flat(abstract_params(dataclasses.replace(self.model, vocab_rows=self.model.vocab_size)))
        total = 0 if self.lora is None else self.lora.num_params(self.model.sizes)
        for path in self.in_full:
            frozen = self.frozen_layers.get(path, (False,))
            total += flat[path].size * frozen.count(False) // len(frozen)
        return total

    def train_flops(self, lengths: np.ndarray, predicted_tokens: int) -> int:
        """See `ModelConfig.train_flops`; experts' adapters count as those of the experts that a token goes through."""
        flat = _flat(abstract_params(self.model))
        matrices = [path for path in flat if path.startswith("blocks.") and _name(path) in (*_PROJECTIONS, "router")]
        sizes, all_trained = {path: flat[path].size for path in matrices}, 0.0
        for path in self.in_full.intersection(matrices):
            frozen = self.frozen_layers.get(path, (False,))
            all_trained += sizes[path] * frozen.count(False) / len(frozen)
        seen = dict(self.model.sizes) | {"E": self.model.experts_per_token}
        in_layers = [target for target in self.lora.targets if target.path.startswith("blocks.")] if self.lora else []
        adapters = sum(target.num_params(seen) for target in in_layers)
        head = "embed_VD" if self.model.tied_head else "head_VD"
        return self.model.train_flops(
            lengths,
            predicted_tokens=predicted_tokens,
            trained_share=all_trained / sum(sizes.values()),
            is_head_trained=head in self.in_full,
            adapter_weights=adapters,
        )

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What is trained, where that is not everything, as JSON: another run's checkpoints are not this one's."""
        if self.lora is None:
            return {"train.freeze": {k: list(v) for k, v in self.frozen_layers.items()}} if self.frozen_layers else {}
        said: dict[str, Any] = {k: v for k, v in dataclasses.asdict(self.lora).items() if k != "targets"}
        for target in self.lora.targets:
            said[target.path] = {"ranks": list(target.ranks), "scales": list(target.scales)}
        from_file = {} if self.adapter is None else {"adapter": weights_hash(self.adapter.file)}
        return {"lora": said | {"base": self.base, "modules_to_save": sorted(self.in_full), **from_file}}

    def lines(self) -> list[str]:
        """What is trained, for the log; nothing where that is everything."""
        lines = [] if self.lora is None else [summary(self.lora, self.model)]
        if self.lora is not None and self.in_full:
            lines.append(f"trained in full beside it: {in_words(dict.fromkeys(self.in_full, (True,)))}")
        if self.lora is None and self.frozen_layers:
            lines.append(f"frozen: {in_words(self.frozen_layers)}")
        return lines

    def load(self, base: Pretrained, mesh: Mesh, *, seed: int) -> tuple[Params, Params]:
        """Trained and frozen, spread over the mesh; adapters as they start. All processes call it."""
        frozen = self.load_frozen(base, mesh)
        return self.load_trained(base, frozen, mesh, seed=seed), frozen

    def load_trained(self, base: Pretrained, frozen: Params, mesh: Mesh, *, seed: int) -> Params:
        """The trained part as it starts, beside the frozen one."""
        trained = self.load_in_full(base, mesh)
        if self.lora is None:
            return trained
        return joined(trained, self._start(joined(trained, frozen), mesh, seed=seed))

    def load_frozen(self, base: Pretrained, mesh: Mesh) -> Params:
        """The frozen part alone: what a checkpoint does not hold."""
        paths = {path for path in _flat(abstract_params(self.model)) if path not in self.in_full}
        if not paths:
            return {}
        places = shard_params(abstract_params(self.model), mesh)
        if self.base == "float32":
            return joined(load_params(base, shardings=places, only=paths), self._saved_beside(places, "float32"))
        then = functools.partial(_quantized, kind=self.base, mesh=mesh) if self.base in ("int8", "nf4") else None
        frozen = load_params(base, shardings=places, dtype="bfloat16", only=paths, then=then)
        return joined(frozen, self._saved_beside(places, "bfloat16"))

    def load_base(self, base: Pretrained, mesh: Mesh) -> Params:
        """The whole base in float32, as it was before anything was trained."""
        places = shard_params(abstract_params(self.model), mesh)
        return joined(load_params(base, shardings=places), self._saved_beside(places, "float32"))

    def beside(self, weights: Any, mesh: Mesh) -> Params:
        """The adapter's folder and the base's `weights`, together."""
        places = shard_params(abstract_params(self.model), mesh)
        return joined(weights, self._saved_beside(places, "float32"), self.load_adapter(mesh))

    def _saved_beside(self, places: Params, dtype: str) -> Params:
        """What an adapter's folder holds of its base: PEFT saves an embedding or head that has an adapter."""
        flat, place_of = _flat(self.adapter.base_params if self.adapter else {}), _flat(places)
        return _nested({path: jax.device_put(x.astype(dtype), place_of[path]) for path, x in flat.items()})

    def load_adapter(self, mesh: Mesh) -> Params:
        """What the adapter's folder holds: the trained tree."""
        assert self.adapter is not None
        return jax.device_put(self.adapter.params, shard_params(self.adapter.params, mesh))

    def load_in_full(self, base: Pretrained, mesh: Mesh) -> Params:
        """What is trained as it is, as the base's files have it."""
        if not self.in_full:
            return {}
        return load_params(base, shardings=shard_params(abstract_params(self.model), mesh), only=self.in_full)

    def _start(self, base: Params, mesh: Mesh, *, seed: int) -> Params:
        """The adapters, and from a folder what it says of weights that are trained in full."""
        assert self.lora is not None
        if self.adapter is not None:
            return self.load_adapter(mesh)
        places = shard_params({"lora": self.abstract_trained["lora"]}, mesh)
        return initial_factors(self.lora, base, self.model.sizes, seed=seed, places=places)


def load_base(config: RunConfig) -> Pretrained:
    """The model of a run, without weights; with the chat template of the adapter it goes on from, if nobody names one.

    The template carries `data.template_args`, so that what is exported is asked as it was trained.

    Raises:
        ValueError: it cannot be read.
    """
    base = load_configured(config.model, seed=config.seed)
    if config.lora.adapter is not None and config.model.chat_template is None:
        base = with_template_of(config.lora.adapter, base)
    if base.chat_template is None:
        return base
    return dataclasses.replace(base, chat_template=with_defaults(base.chat_template, config.data.template_args))


def of_adapter(folder: str, base: Pretrained) -> Parameters:
    """What a folder in PEFT's format trains of a model, which is held in float32.

    Raises:
        ValueError: it cannot be read, or belongs to another model.
    """
    check_base(folder, base)
    adapter = read_adapter(folder, base.config)
    in_full = frozenset(_flat(adapter.params)) - frozenset(_flat(adapter.lora.shapes(base.config.sizes)))
    return Parameters(
        model=base.config,
        lora=adapter.lora,
        in_full=in_full,
        frozen_layers={},
        base="float32",
        adapter=adapter,
        rslora=bool(adapter.config.get("use_rslora")),
    )


def parameters(config: RunConfig, base: Pretrained) -> Parameters:
    """What a config says of the parameters of a model.

    Raises:
        ValueError: names that the model does not have, or an adapter of another model.
    """
    model = base.config
    if config.lora.adapter is not None:
        plan = of_adapter(config.lora.adapter, base)
        assert plan.lora is not None
        dropout = plan.lora.dropout if config.lora.dropout is None else config.lora.dropout
        lora = dataclasses.replace(plan.lora, dropout=dropout)
        return dataclasses.replace(plan, lora=lora, base=config.lora.base)
    if config.lora.rank > 0:
        lora = adaptation(config.lora, model)
        in_full = frozenset(trained_in_full(config.lora.modules_to_save, model))
        return Parameters(
            model=model,
            lora=lora,
            in_full=in_full,
            frozen_layers={},
            base=config.lora.base,
            adapter=None,
            rslora=config.lora.rslora,
        )
    frozen = frozen_layers(config.train.freeze, model)
    paths = _flat(abstract_params(model))
    return Parameters(
        model=model,
        lora=None,
        in_full=frozenset(path for path in paths if not all(frozen.get(path, (False,)))),
        frozen_layers=frozen,
        base=config.model.dtype,
        rslora=False,
        adapter=None,
    )


def joined(*trees: Mapping[str, Any]) -> Params:
    """Trees that share no leaf, as one; a later one has the say where they do."""
    flat: dict[str, Any] = {}
    for tree in trees:
        flat |= _flat(tree)
    return _nested(flat)


def _quantized(path: str, array: jax.Array, *, kind: Any, mesh: Mesh) -> Any:
    """A projection of the blocks, quantised; anything else as it is."""
    if not path.startswith("blocks.") or _name(path) not in _PROJECTIONS:
        return array
    axes = path.rsplit("_", 1)[-1]
    make = functools.partial(quantize, letters=axes, inputs=letters(path).inputs, kind=kind)
    abstract = jax.eval_shape(make, array)
    quantized = jax.block_until_ready(jax.jit(make, out_shardings=shardings(axes, abstract, mesh))(array))
    array.delete()  # else the next one would be read beside both; donated, it would be of no use to the smaller codes
    return quantized


def _name(path: str) -> str:
    """blocks.q_LDNH -> q."""
    return path.rsplit(".", 1)[-1].rsplit("_", 1)[0]


_PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    return traverse_util.flatten_dict(dict(tree), sep=".")


def _nested(flat: Mapping[str, Any]) -> Params:
    return traverse_util.unflatten_dict(dict(flat), sep=".")
