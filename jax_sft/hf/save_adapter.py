"""An adapter out: a folder that PEFT and vLLM load onto the base it was trained on.

In: the trained tree (sharded or not, in one process or several), the base's config, tokenizer and stop ids. Out:
adapter_config.json, adapter_model.safetensors with the tensors that PEFT would write, in its order, tokenizer files,
generation_config.json, README.md and jax_sft.json, which says by a hash which weights the adapter belongs to.
What only fills up our arrays is cut off. What PEFT has in one module (phi3's qkv_proj) and we in three is one adapter
again where the three share their A; else their ranks are added up, B being zero where one has no part in another.
"""

import pathlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_sft.hf import card, names, tensorfile
from jax_sft.hf.adapter_config import (
    CONFIG,
    Strength,
    saved_config,
    strength_of,
    strength_of_scale,
    strengths_config,
    targets_config,
)
from jax_sft.hf.adapter_names import (
    BASE_LAYER,
    EMBED,
    HEAD,
    MAGNITUDE,
    PREFIX,
    Factors,
    Site,
    sites,
)
from jax_sft.hf.folder import CERTIFICATE, HUB_ID, MARK
from jax_sft.hf.peft import WEIGHTS
from jax_sft.hf.save import check_stop_ids, fetch, find_pad_id, finite, generation_json, write_json, write_together
from jax_sft.hf.stored import weights_hash
from jax_sft.hf.tokenizer import save_tokenizer
from jax_sft.model.config import ModelConfig
from jax_sft.model.decoder import DTYPES
from jax_sft.model.lora import Lora, Target, letters

_PEFT_VERSION = "0.18.0"  # whose format this is; PEFT reads older adapters by rules of their own
_MERGE = "export the merged model instead: export.format = 'merged', or --format merged"


class _Tensor(NamedTuple):
    """One tensor of the file: its shape, and how it comes to the host."""

    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]


class _One(NamedTuple):
    """The adapter of one of our weights in one layer (and expert), without what fills up."""

    factors: Factors
    scale: float


def write_adapter(
    out: str | pathlib.Path,
    *,
    lora: Lora,
    params: Mapping[str, Any],
    base_params: Mapping[str, Any] | None = None,
    config: ModelConfig,
    base_name: str,
    dtype: str,
    tokenizer: Any,
    hf_config: Mapping[str, Any],
    generation_config: Mapping[str, Any],
    chat_template: str | None,
    stop_ids: Sequence[int],
    facts: Mapping[str, Any],
    rslora: bool = False,
    source_config: Mapping[str, Any] | None = None,
    name: str | None = None,
    source: pathlib.Path | None = None,
) -> list[pathlib.Path]:
    """Write the folder `out`; all processes of a run call it, process 0 writes.

    Args:
        out: the folder; it must be new, empty, or an earlier export, which is replaced as a whole.
        params: the trained tree: factors under "lora", and parameters trained in full at their own places.
        base_params: parameters of the base that the folder holds too, as PEFT has it of an adapted embedding or head.
        base_name: of the model it was trained on: a hub id, or a local path.
        dtype: float32, bfloat16 or float16.
        hf_config, generation_config: the base's.
        chat_template, stop_ids: those that were trained with.
        facts: what the model card tells of the training.
        rslora: whether the file's scales are alpha / sqrt(rank), where there are no adapted experts; the scales
            themselves are those of `lora` either way.
        source_config: adapter_config.json of the adapter that was trained on; what it says beyond this stays.
        name: what the model card calls the adapter; None: as the folder.
        source: the folder or file that the base was read from; its hash travels along, and it is never written to.

    Returns:
        The files written; empty in processes other than 0.

    Raises:
        ValueError: PEFT has no form for what was trained; the folder is somebody else's; there is no stop id; or a
            number is not finite in `dtype`.
        OSError: the disk is full or cannot be written; nothing is left behind.
    """
    out = pathlib.Path(out).expanduser().resolve()
    if dtype not in DTYPES:
        raise ValueError(f"export.dtype = {dtype!r} is not one of {', '.join(DTYPES)}")
    check_stop_ids(out, stop_ids, config)
    check_form(lora, {path for path in names.rules(config) if names.get(params, path) is not None}, config)
    host_dtype = np.dtype(jnp.dtype(dtype))
    # PEFT 0.21 doubles rank and alpha where it fuses experts, which keeps alpha / rank alone.
    has_experts = any("E" in letters(target.path).stack for target in lora.targets)
    rslora = (rslora or bool((source_config or {}).get("use_rslora"))) and not has_experts
    adapted = _adapted(lora, params, config)
    strengths = {m: strength_of_scale(one.factors.a.shape[0], one.scale, rslora=rslora) for m, one in adapted.items()}
    whole, saved = _whole(params, config, set(adapted), host_dtype)
    beside = _beside(base_params or {}, config, set(adapted), host_dtype)
    tensors = dict(sorted((_adapter_tensors(adapted) | beside | whole).items()))
    said = _config_json(lora, strengths, saved, config, rslora=rslora, source=source_config)
    said |= {"base_model_name_or_path": base_name}
    pad_id = find_pad_id(tokenizer, generation_config, hf_config, stop_ids, config.vocab_size)
    generation = generation_json(generation_config, tokenizer, stop_ids, pad_id)
    made = _made(tensors, host_dtype)
    written: list[str] = []

    def write(folder: pathlib.Path) -> None:
        tensorfile.write(folder / WEIGHTS, {k: t.shape for k, t in tensors.items()}, host_dtype, made)
        save_tokenizer(folder, tokenizer, chat_template=chat_template, pad_id=pad_id)
        write_json(folder / "generation_config.json", generation)
        base = base_name if HUB_ID.fullmatch(base_name) else pathlib.PurePath(base_name).name  # a card is for everybody
        (folder / "README.md").write_text(card.text(name or out.name, facts, adapter_of=base), encoding="utf-8")
        written.extend(sorted([*(p.name for p in folder.iterdir()), MARK, CONFIG]))
        weights = None if source is None else weights_hash(source)
        write_json(folder / MARK, {"facts": dict(facts), "base_weights": weights, "files": [*written, CERTIFICATE]})
        write_json(folder / CONFIG, dict(sorted(said.items())))

    write_together(out, source, made, write)
    return [out / name for name in written]


def check_form(lora: Lora, in_full: Collection[str], config: ModelConfig) -> None:
    """PEFT has a form for these adapters, with the parameters at the paths `in_full` trained beside them.

    Raises:
        ValueError: it has none.
    """
    target_of = {target.path: target for target in lora.targets}
    if not target_of:
        raise ValueError(f"export: there is no adapter to write, only parameters trained in full; {_MERGE}")
    all_sites = sites(config)
    homeless = set(target_of) - {rule.path for site in all_sites for rule in site.rules}
    if homeless:
        raise ValueError(
            f"export: PEFT has no adapter form that vLLM reads for {', '.join(sorted(homeless))} of a "
            f"{config.model_type} model, whose experts lie in one tensor; {_MERGE}"
        )
    undone = [p for p in target_of if "E" in letters(p).stack or p in ("embed_VD", "head_VD")] if lora.dora else []
    if undone:
        raise ValueError(f"export: DoRA of embedding, head and experts is not modelled, and {', '.join(undone)} has it")
    for site in all_sites if lora.dora else ():
        for place, module in site.modules.items():
            targets = [target_of.get(rule.path) for rule in site.rules]
            has_rank = {target is not None and target.ranks[place[0] if place else 0] > 0 for target in targets}
            if len(has_rank) > 1:
                raise ValueError(
                    f"export: DoRA of only a part of {module} has no form in PEFT; adapt all of it, or {_MERGE}"
                )
    _check_modules(in_full, names.rules(config))


def _made(tensors: Mapping[str, _Tensor], dtype: np.dtype) -> Iterator[np.ndarray]:
    for name, tensor in tensors.items():
        # What does not fit the dtype becomes infinite, and is told by its name.
        with np.errstate(over="ignore"):
            made = tensor.make().astype(dtype, copy=False)
        yield finite(name, made)


def _adapted(lora: Lora, params: Mapping[str, Any], config: ModelConfig) -> dict[str, _One]:
    """The adapter of each module that has one, on the host, in float32."""
    target_of = {target.path: target for target in lora.targets}
    all_sites = sites(config)
    adapted: dict[str, _One] = {}
    for site in all_sites:
        held: list[tuple[Target, dict[str, np.ndarray]] | None] = []
        for rule in site.rules:
            target = target_of.get(rule.path)
            held.append(None if target is None else (target, _on_host(names.get(params["lora"], rule.path), rule)))
        for place, module in site.modules.items():
            parts = [None if one is None else _one(site, i, place, *one) for i, one in enumerate(held)]
            if (joined := _joined(site, parts)) is not None:
                adapted[module] = joined
    return adapted | _even_experts(adapted, all_sites)


def _even_experts(adapted: Mapping[str, _One], all_sites: Sequence[Site]) -> dict[str, _One]:
    """Adapters of the experts, all of one rank and scale, in all layers, and of gate, up and down, or of down alone.

    PEFT 0.21 fuses the experts' adapters as it loads them: what is not even it refuses, loses, or scales wrongly.
    """
    held = [site for site in all_sites if "E" in site.letters(0).stack]
    there = {m: adapted[m] for site in held for m in site.modules.values() if m in adapted}
    if not there:
        return {}
    rank = max(one.factors.a.shape[0] for one in there.values())
    scale = Counter(one.scale for one in there.values()).most_common(1)[0][0]
    touched = {site.rules[0].path for site in held if any(m in there for m in site.modules.values())}
    if any(site.rules[0].path in touched and site.letters(0).inputs == "D" for site in held):
        touched = {site.rules[0].path for site in held}
    even: dict[str, _One] = {}
    for site in held:
        for module in site.modules.values() if site.rules[0].path in touched else ():
            a = np.zeros((rank, site.inputs), np.float32)
            b = np.zeros((sum(site.outputs), rank), np.float32)
            if module in there:
                (own_a, own_b, _), own_scale = there[module]
                a[: len(own_a)] = own_a
                b[:, : len(own_a)] = own_b if own_scale == scale else own_b * np.float32(own_scale / scale)
            even[module] = _One(Factors(a, b, None), scale)
    return even


def _on_host(factors: Mapping[str, Any], rule: names.Rule) -> dict[str, np.ndarray]:
    """Factors by kind, whole, without rows that only pad the vocabulary."""
    found: dict[str, np.ndarray] = {}
    for name, x in sorted(factors.items()):
        kind, axes = name.rsplit("_", 1)
        x = fetch(x if isinstance(x, jax.Array) else jnp.asarray(x), (), dtype=np.dtype(np.float32))
        found[kind] = x[tuple(slice(rule.sizes["V"]) if axis == "V" else slice(None) for axis in axes)]
    return found


def _one(site: Site, part: int, place: names.Shape, target: Target, held: Mapping[str, np.ndarray]) -> _One | None:
    """One layer of one weight: its own ranks; PiSSA's as [A, A0] and [B, -B0], as PEFT converts it."""
    layer = place[0] if place else 0
    rank = target.ranks[layer]
    if not rank:
        return None
    of = {kind: x[place] for kind, x in held.items()}
    a, b = of["a"][..., :rank], of["b"][:rank]
    if "a_start" in of:
        a = np.concatenate([a, of["a_start"][..., :rank]], axis=-1)
        b = np.concatenate([b, -of["b_start"][:rank]], axis=0)
    ours = {"a": a, "b": b} | ({"magnitude": of["magnitude"]} if "magnitude" in of else {})
    return _One(site.to_theirs(ours, part), target.scales[layer])


def _joined(site: Site, parts: Sequence[_One | None]) -> _One | None:
    """One adapter for the module that holds our weights of these adapters."""
    there = [one for one in parts if one is not None]
    if not there or len(parts) == 1:
        return there[0] if there else None
    first = there[0]
    magnitudes = [one.factors.magnitude for one in there if one.factors.magnitude is not None]
    magnitude = np.concatenate(magnitudes) if magnitudes else None
    if len(there) == len(parts) and all(
        one.scale == first.scale and np.array_equal(one.factors.a, first.factors.a) for one in there
    ):
        b = np.concatenate([one.factors.b for one in there])
        return _One(Factors(first.factors.a, b, magnitude), first.scale)
    scale = next((one.scale for one in there if one.scale), 0.0)
    b = np.zeros((sum(site.outputs), sum(one.factors.a.shape[0] for one in there)), np.float32)
    row = column = 0
    for one, outputs in zip(parts, site.outputs, strict=True):
        if one is not None:
            rank = one.factors.a.shape[0]
            ratio = np.float32(one.scale / scale if scale else 1.0)
            b[row : row + outputs, column : column + rank] = one.factors.b * ratio
            column += rank
        row += outputs
    return _One(Factors(np.concatenate([one.factors.a for one in there]), b, magnitude), scale)


def _adapter_tensors(adapted: Mapping[str, _One]) -> dict[str, _Tensor]:
    tensors: dict[str, _Tensor] = {}

    def add(name: str, x: np.ndarray) -> None:
        tensors[PREFIX + name] = _Tensor(x.shape, lambda: np.ascontiguousarray(x))

    for module, (factors, _) in adapted.items():
        endings = (
            (".lora_embedding_A", ".lora_embedding_B") if module == EMBED else (".lora_A.weight", ".lora_B.weight")
        )
        add(module + endings[0], factors.a)
        add(module + endings[1], factors.b)
        if factors.magnitude is not None:
            add(module + MAGNITUDE, factors.magnitude)
    return tensors


def _whole(
    params: Mapping[str, Any], config: ModelConfig, adapted: set[str], dtype: np.dtype
) -> tuple[dict[str, _Tensor], list[str]]:
    """Tensors of parameters that were trained in full, and their modules."""
    tensors: dict[str, _Tensor] = {}
    saved: list[str] = []
    for name, tensor in _in_full(params, config, dtype):
        module, _, leaf = name.rpartition(".")
        # PEFT would train a copy of one of the two that are tied, and leave the other.
        for own in (EMBED, HEAD) if module == EMBED and config.tied_head else (module,):
            # A tied head with an adapter: as PEFT has it, embedding in full and the same beside the head's adapter.
            tensors[PREFIX + (own + BASE_LAYER if own in adapted else f"{own}.{leaf}")] = tensor
            saved += [] if own in adapted else [own]
    return tensors, list(dict.fromkeys(saved))


def _beside(
    base_params: Mapping[str, Any], config: ModelConfig, adapted: set[str], dtype: np.dtype
) -> dict[str, _Tensor]:
    """Tensors of the base, of modules that are adapted."""
    tensors: dict[str, _Tensor] = {}
    for name, tensor in _in_full(base_params, config, dtype):
        module = name.rpartition(".")[0]
        modules = (EMBED, HEAD) if module == EMBED and config.tied_head else (module,)
        tensors |= {PREFIX + own + BASE_LAYER: tensor for own in modules if own in adapted}
    return tensors


def _in_full(tree: Mapping[str, Any], config: ModelConfig, dtype: np.dtype) -> Iterator[tuple[str, _Tensor]]:
    """Each tensor of the files that lies in a tree like the parameters, which may lack some."""
    held: dict[str, list[tuple[names.Rule, Any]]] = {}
    for path, rule in names.rules(config).items():
        if (x := names.get(tree, path)) is not None:
            held.setdefault(rule.hf, []).append((rule, x if isinstance(x, jax.Array) else jnp.asarray(x)))
    for parts in held.values():
        ordered = sorted(parts, key=lambda part: part[0].row.part)
        for place, name in ordered[0][0].names.items():

            def make(ordered: Any = ordered, place: names.Shape = place) -> np.ndarray:
                return names.file_tensor((rule, fetch(x, place, dtype=dtype)) for rule, x in ordered)

            yield name, _Tensor(ordered[0][0].file_shape, make)


def _check_modules(in_full: Collection[str], rules: Mapping[str, names.Rule]) -> None:
    """PEFT saves modules as a whole: every parameter of each is there."""
    held = {rules[path].hf for path in in_full}
    modules = {hf.rpartition(".")[0] for hf in held}
    for rule in rules.values():
        if rule.hf in held and not rule.hf.endswith((".weight", ".bias")):
            raise ValueError(f"export: {rule.path} is no module of its own, which PEFT could save in full; {_MERGE}")
        if rule.hf.rpartition(".")[0] in modules and rule.path not in in_full:
            raise ValueError(
                f"export: PEFT saves {rule.hf.rpartition('.')[0]} as a whole, and {rule.path} in it was not trained; "
                f"{_MERGE}"
            )
        if rule.hf in held and "{expert}" in rule.hf:
            raise ValueError(f"export: {rule.path} trained in full has no form in PEFT; {_MERGE}")


def _config_json(
    lora: Lora,
    strengths: Mapping[str, Strength],
    saved: Sequence[str],
    config: ModelConfig,
    *,
    rslora: bool,
    source: Mapping[str, Any] | None,
) -> dict[str, Any]:
    kept = dict(source or {})
    # Experts have the defaults: PEFT renames them as it loads them, and patterns may miss them.
    experts = {m: s for m, s in strengths.items() if ".experts." in m}
    numbers = strengths_config(strengths, default=next(iter(experts.values()), None))
    if "r" in kept and source is not None and all(strength_of(source, m) == s for m, s in strengths.items()):
        numbers = {key: source[key] for key in numbers if key in source}
    start = kept.get("init_lora_weights", True)
    return (
        {"task_type": "CAUSAL_LM", "peft_version": _PEFT_VERSION, "bias": "none", "fan_in_fan_out": False}
        | kept
        | numbers
        | targets_config(list(strengths), config)
        | {
            "peft_type": "LORA",
            "auto_mapping": None,
            "init_lora_weights": start if lora.start == "default" else True,
            "inference_mode": True,
            "lora_dropout": lora.dropout,
            "modules_to_save": saved_config(saved, config) or None,
            "ensure_weight_tying": False,
            "use_rslora": rslora,
            "use_dora": lora.dora,
            "exclude_modules": None,
            "layers_pattern": None,
        }
    )
