r"""From what a config says of modules to weights of ours: which have adapters, are trained in full, or are frozen.

In: kinds ("all-linear", "attention", ...) and names as in a Hugging Face folder. A name is a module's or a tensor's
own, whole parts of it in a row ("q_proj", "self_attn", "layers.3.mlp"), or a regular expression of all of it. A part
is never cut, but an expression cuts where it likes: `model.layers.[0-7].*` is layer 10 too, `model\.layers\.[0-7]\..*`
is not. A tensor that holds several of ours (qkv_proj) stands for all of them.

Out: a `Lora`, or paths of our tree with the layers that are meant. What means nothing in a model is an error.
"""

import dataclasses
import difflib
import functools
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from jax_sft.config import LoraConfig, layer_numbers
from jax_sft.hf.names import HEAD, ranges, rules
from jax_sft.model.config import ModelConfig
from jax_sft.model.lora import Lora, Target, letters

_log = logging.getLogger(__name__)
T = TypeVar("T")

_ALL_LINEAR = ("attention", "mlp", "experts")
KINDS = ("all-linear", *_ALL_LINEAR, "embeddings", "head", "norms", "routers")
_ADAPTABLE = ("q", "k", "v", "o", "gate", "up", "down", "embed", "head")
_OF_WHOLE_WEIGHTS = ("lora.modules_to_save", "train.freeze")
_OF_A_TIED_HEAD = "is the embedding in this model, whose head is tied to it; write 'embeddings'"


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A tensor of the files, or the share in it of one of ours."""

    path: str
    name: str  # "model.layers.3.self_attn.q_proj.weight"
    module: str  # "model.layers.3.self_attn.q_proj"
    layer: int | None
    kind: str
    is_adaptable: bool
    is_stored: bool  # all but a tied head

    @property
    def short_name(self) -> str:
        return self.module.rsplit(".", 1)[-1]


def adaptation(config: LoraConfig, model: ModelConfig) -> Lora:
    """The adapters that `config`, of a rank above 0, asks for in this model.

    A tied head is a target of its own, "head_VD". `lora.layers` says nothing of embeddings and head. Of several keys of
    rank_pattern or alpha_pattern that match a module the first counts, as in PEFT.

    Raises:
        ValueError: something named is not there, cannot be adapted, or not in the way that is asked for.
    """
    layers = _layers_of(config, model)
    chosen = dict.fromkeys(config.targets, True)
    of = functools.partial(_by_layer, "lora.targets", chosen, model)
    of(
        among=lambda t: t.is_adaptable,
        otherwise="holds no projection, embedding or head, and others take no adapters; choose among "
        f"{', '.join(module_names(model))}, or name it in lora.modules_to_save to train it in full",
    )
    adapted = of(
        among=lambda t: t.is_adaptable and (t.layer is None or t.layer in layers),
        otherwise=f"has no module in lora.layers = {config.layers!r}; change one of the two, or leave lora.layers out",
    )
    _check_abilities(config, {path for path, meant in adapted.items() if any(meant)}, model)
    of_patterns = functools.partial(
        _by_layer,
        model=model,
        among=lambda t: bool(adapted[t.path][t.layer or 0]),
        otherwise="matches no module that has an adapter by lora.targets and lora.layers; leave it out, or add it",
    )
    ranks = of_patterns("lora.rank_pattern", config.rank_pattern)
    alphas = of_patterns("lora.alpha_pattern", config.alpha_pattern)
    targets = []
    for path, meant in adapted.items():
        own_ranks = [(r or config.rank) * bool(m) for r, m in zip(ranks[path], meant, strict=True)]
        scales = [
            (a or config.alpha or 2 * r) / (math.sqrt(r) if config.rslora else r) if r else 0.0
            for a, r in zip(alphas[path], own_ranks, strict=True)
        ]
        if any(own_ranks):
            targets.append(Target(path=path, ranks=tuple(own_ranks), scales=tuple(scales)))
    if not targets:
        raise ValueError("lora.targets is empty, but lora.rank asks for adapters; name kinds or modules, 'all-linear'")
    _warn_of_large_ranks(targets, model)
    return Lora(targets=tuple(targets), dropout=config.dropout or 0.0, dora=config.dora, start=config.start)


def trained_in_full(patterns: Sequence[str], model: ModelConfig) -> set[str]:
    """Paths of the weights that `lora.modules_to_save` names; the bias of a module belongs to it.

    Raises:
        ValueError: a pattern matches nothing, or some layers or experts only of a weight that holds all of them.
    """
    key = "lora.modules_to_save"
    found = _by_layer(key, dict.fromkeys(patterns, True), model, among=lambda t: t.is_stored, otherwise=_OF_A_TIED_HEAD)
    for path, meant in found.items():
        if any(meant) and not all(meant):
            name = next(t.short_name for t in _tensors(model) if t.path == path)
            layers = ranges(i for i, m in enumerate(meant) if m)
            raise ValueError(
                f"{key} = {tuple(patterns)} means {name} of layers {layers} alone, but a weight is trained in full in "
                f"all {len(meant)} layers or in none; leave the layer out of the name, or give those layers "
                "adapters by lora.targets"
            )
    return {path for path, meant in found.items() if any(meant)}


def frozen_layers(patterns: Sequence[str], model: ModelConfig) -> dict[str, tuple[bool, ...]]:
    """For each path that `train.freeze` names something of: whether each layer is frozen; one alone without layers.

    "attention", "mlp" and "experts" are their projections with biases and sinks; "norms" are all norms. Of a frozen
    embedding or head all rows are: those of model.new_tokens stay as they started too.

    Raises:
        ValueError: a pattern matches nothing, or some experts only of a layer; or nothing is left to train.
    """
    key, chosen = "train.freeze", dict.fromkeys(patterns, True)
    found = _by_layer(key, chosen, model, among=lambda t: t.is_stored, otherwise=_OF_A_TIED_HEAD)
    own = {path: tuple(map(bool, found[path])) for path in rules(model)}
    if all(all(meant) for meant in own.values()):
        raise ValueError(
            f"{key} = {tuple(patterns)} freezes every weight of this model ({model.model_type}), and nothing is "
            "left to train; leave something out of it"
        )
    return {path: meant for path, meant in own.items() if any(meant)}


def module_names(model: ModelConfig) -> tuple[str, ...]:
    """What can have adapters, by the last part of its name: ("embed_tokens", "q_proj", "k_proj", ...)."""
    return tuple(dict.fromkeys(t.short_name for t in _tensors(model) if t.is_adaptable))


def in_words(layers: Mapping[str, Sequence[object]]) -> str:
    """Paths with the layers that are meant: "embed; q, k of 30 layers; gate of layers 0-3,7"."""
    together: dict[str, list[str]] = {}
    for path, meant in layers.items():
        where = ""
        if path.startswith("blocks."):
            numbers = [i for i, m in enumerate(meant) if m]
            where = f" of {len(meant)} layers" if all(meant) else f" of layers {ranges(numbers)}"
        stem = _stem(path)
        together.setdefault(where, []).append(f"experts' {stem}" if _kind(path) == "experts" else stem)
    return "; ".join(", ".join(stems) + where for where, stems in together.items())


def summary(lora: Lora, model: ModelConfig) -> str:
    """One line for the log: "LoRA of rank 16 (scale 2) on q, k, v, o of 30 layers: 1.84 M parameters"."""
    ranks = sorted({r for t in lora.targets for r in t.ranks if r})
    scales = sorted({s for t in lora.targets for s in t.scales if s})
    start = " started by PiSSA" if lora.start == "pissa" else ""
    return (
        f"{'DoRA' if lora.dora else 'LoRA'} of rank {_from_to(ranks)} (scale {_from_to(scales)}){start} on "
        f"{in_words({t.path: t.ranks for t in lora.targets})}: {lora.num_params(model.sizes) / 1e6:.3g} M parameters"
    )


def _from_to(numbers: Sequence[float]) -> str:
    return " to ".join(f"{x:.4g}" for x in dict.fromkeys([numbers[0], numbers[-1]]))


def _check_abilities(config: LoraConfig, paths: set[str], model: ModelConfig) -> None:
    """What some weights cannot do."""
    kinds = {_kind(path) for path in paths}
    twice = paths & trained_in_full(config.modules_to_save, model)
    if both := [t.short_name for t in _tensors(model) if t.path in twice]:
        raise ValueError(
            f"{both[0]} is named by lora.targets and by lora.modules_to_save, but is either adapted or trained in "
            "full; leave it out of one of them"
        )
    if config.dora and (others := sorted(kinds - {"attention", "mlp"})):
        there = [repr(kind) for kind in ("attention", "mlp") if any(t.kind == kind for t in _tensors(model))]
        raise ValueError(
            f"lora.dora is for projections of attention and of dense MLPs, but lora.targets has {', '.join(others)} "
            f"too; set lora.targets to {' and '.join(there)}, or lora.dora = False"
        )
    if config.dropout and "experts" in kinds:
        raise ValueError(
            f"lora.dropout = {config.dropout}, but adapters of experts take none (nor do PEFT's); set it to 0, or "
            "leave the experts out of lora.targets"
        )
    if config.start == "pissa" and "embeddings" in kinds:
        raise ValueError(
            "lora.start = 'pissa' starts from what a product is made of, and an embedding is looked up; leave "
            "embeddings out of lora.targets, or set lora.start = 'default'"
        )


def _warn_of_large_ranks(targets: Sequence[Target], model: ModelConfig) -> None:
    """A product of more than the rank that a weight can have says no more, and costs more than the weight."""
    found: dict[str, int] = {}
    for target in targets:
        of = letters(target.path)
        side = min(math.prod(model.sizes[letter] for letter in axes) for axes in (of.inputs, of.outputs))
        if target.rank > side:
            found |= {t.short_name: side for t in _tensors(model) if t.path == target.path}
    if found:
        _log.warning(
            "adapters of a larger rank than the smaller side of their weight, which cost more than the weight itself "
            "and can say no more: of %s; lower lora.rank (or lora.rank_pattern), or name them in lora.modules_to_save",
            ", ".join(f"{name} ({side})" for name, side in found.items()),
        )


def _layers_of(config: LoraConfig, model: ModelConfig) -> set[int]:
    if config.layers is None:
        return set(range(model.num_layers))
    numbers = layer_numbers(config.layers)
    if numbers[-1] >= model.num_layers:
        raise ValueError(
            f"lora.layers = {config.layers!r}: this model has {model.num_layers} layers, 0 to {model.num_layers - 1}; "
            "name some of those, or leave lora.layers out for all"
        )
    return set(numbers)


def _by_layer(
    key: str, choices: Mapping[str, T], model: ModelConfig, *, among: Callable[[_Tensor], bool], otherwise: str
) -> dict[str, list[T | None]]:
    """For each path and each of its layers what the first pattern that matches says; None where none does.

    Args:
        choices: what is said, by the pattern it is said of.
        among: what counts of that which matches; a pattern of which nothing counts is an error, that it `otherwise`.
    """
    first: dict[_Tensor, str] = {}
    for pattern in choices:
        if not (met := [t for t in _matching(key, pattern, model) if among(t)]):
            raise ValueError(f"{key}: {pattern!r} {otherwise}")
        first = dict.fromkeys(met, pattern) | first
    found: dict[str, dict[int, T | None]] = {}
    for tensor in _tensors(model):
        pattern, layer = first.get(tensor), tensor.layer or 0
        said = None if pattern is None else choices[pattern]
        if found.setdefault(tensor.path, {}).setdefault(layer, said) != said:
            other = pattern or next(p for t, p in first.items() if (t.path, t.layer) == (tensor.path, layer))
            raise ValueError(
                f"{key}: {other!r} means some experts of layer {layer} and not others, but they can only be taken "
                "together; leave the expert's number out of the name"
            )
    return {path: list(layers.values()) for path, layers in found.items()}


def _matching(key: str, pattern: str, model: ModelConfig) -> list[_Tensor]:
    """All that a kind or a name stands for.

    Raises:
        ValueError: that is nothing.
    """
    tensors = _tensors(model)
    if pattern in KINDS:
        meant = _ALL_LINEAR if pattern == "all-linear" else (pattern,)
        found = [t for t in tensors if t.kind in meant]
    else:
        found = _named(key, pattern, tensors)
    if found:
        return found
    possible = [t for t in tensors if (t.is_stored if key in _OF_WHOLE_WEIGHTS else t.is_adaptable)]
    kinds = [kind for kind in KINDS if any(t.kind == kind for t in possible)]
    if pattern in KINDS:
        raise ValueError(f"{key}: this model ({model.model_type}) has no {pattern}; it has {', '.join(kinds)}")
    kinds, names = ["all-linear", *kinds], list(dict.fromkeys(t.short_name for t in possible))
    near = difflib.get_close_matches(pattern.rsplit(".", 1)[-1], [*kinds, *names], n=1)
    raise ValueError(
        f"{key}: {pattern!r} matches no module of this model ({model.model_type})"
        f"{f'; did you mean {near[0]}?' if near else '.'} Kinds are {', '.join(kinds)}, modules are "
        f"{', '.join(names)}, layers 0 to {model.num_layers - 1}"
    )


def _named(key: str, pattern: str, tensors: Sequence[_Tensor]) -> list[_Tensor]:
    try:
        whole = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{key}: {pattern!r} is no name and no regular expression ({error}); write a name such as 'q_proj', or an "
            r"expression of a whole name such as '.*\.q_proj'"
        ) from error
    return [
        t for t in tensors if f".{pattern}." in f".{t.name}." or whole.fullmatch(t.module) or whole.fullmatch(t.name)
    ]


@functools.lru_cache(maxsize=4)
def _tensors(model: ModelConfig) -> tuple[_Tensor, ...]:
    """All tensors in the order of the files, and a tied head as it would be named."""

    def tensor(path: str, name: str, layer: int | None, *, is_stored: bool = True) -> _Tensor:
        module = re.sub(r"\.(weight|bias)$", "", name)
        return _Tensor(path, name, module, layer, _kind(path), _stem(path) in _ADAPTABLE, is_stored)

    places = [(path, name, at) for path, rule in rules(model).items() for at, name in rule.names.items()]
    found = [tensor(path, name, at[0] if at else None) for path, name, at in places]
    return (*found, *[tensor("head_VD", HEAD, None, is_stored=False)] * model.tied_head)


def _stem(path: str) -> str:
    """ "blocks.q_bias_LNH" -> "q_bias"."""
    return path.rsplit(".", 1)[-1].rsplit("_", 1)[0]


def _kind(path: str) -> str:
    stem = _stem(path)
    if "norm" in stem:
        return "norms"
    stem = stem.removesuffix("_bias")
    if stem in ("gate", "up", "down"):
        return "experts" if "E" in path.rsplit("_", 1)[-1] else "mlp"
    return {"router": "routers", "embed": "embeddings", "head": "head"}.get(stem, "attention")
