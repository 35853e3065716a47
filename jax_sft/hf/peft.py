"""An adapter in, as Hugging Face PEFT saves it: adapter_config.json and adapter_model.safetensors, without torch.

Out: an `Adapter`, our factors on the host. Layers that PEFT does not adapt have rank 0; where ranks differ, zeros fill
up to the largest. Of a module that holds several of our weights (phi3's qkv_proj) each gets the same A and its share
of B. Experts are read where each is a module, `...mlp.experts.3.gate_proj.lora_A.weight`, as PEFT wrote them with
transformers 4 and vLLM reads them. The layout of `target_parameters`, which PEFT writes with transformers 5, is not.
"""

import dataclasses
import json
import logging
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jax_sft.data.template import check_template
from jax_sft.hf import names, tensorfile
from jax_sft.hf.adapter_config import CONFIG, Strength, is_named, read_adapter_config, strength_of
from jax_sft.hf.adapter_names import (
    BASE_LAYER,
    EMBED,
    HEAD,
    PREFIX,
    Factors,
    Site,
    sites,
    untied_rules,
)
from jax_sft.hf.folder import MARK
from jax_sft.hf.load import Pretrained
from jax_sft.hf.stored import weights_hash
from jax_sft.model.config import ModelConfig
from jax_sft.model.lora import Lora, Target

WEIGHTS = "adapter_model.safetensors"
_log = logging.getLogger(__name__)

_PARTS = re.compile(r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.weight)?")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter as its files describe it."""

    lora: Lora
    # Float32 on the host: the factors under "lora", and parameters that were trained in full at their own places.
    params: dict[str, Any]
    # Likewise, parameters of the base that nothing trained: PEFT saves an embedding or head beside its adapter.
    base_params: dict[str, Any]
    config: dict[str, Any]  # adapter_config.json
    dtype: str  # of the file
    file: pathlib.Path  # the weights'

    @property
    def base_name(self) -> str:
        """The model that it was made for, as its config says; may be empty."""
        return str(self.config.get("base_model_name_or_path") or "")


class _Read(NamedTuple):
    """The tensors of an adapter by what they are."""

    factors: dict[str, dict[str, tensorfile.Entry]]  # of each module: "a", "b", "magnitude"
    whole: dict[str, tensorfile.Entry]  # by their names in the model: trained in full
    base: dict[str, tensorfile.Entry]  # likewise: of the base


def read_adapter(folder: str | pathlib.Path, model: ModelConfig) -> Adapter:
    """Read an adapter of `model`. The tensors say which modules have one, the config what its scales are.

    Raises:
        ValueError: the folder holds no LoRA adapter, or one of a kind that is not modelled; its files are damaged; or
            it was made for another model.
    """
    folder = pathlib.Path(folder).expanduser()
    config = read_adapter_config(folder)
    entries = tensorfile.read_header(_weights_file(folder))
    read = _sorted_out(entries, folder)
    all_sites = sites(model)
    _check_whole(read, all_sites, folder, config)
    _check_strengths(read, folder, config)
    _check_fit(read, all_sites, model, folder, config)
    lora, params = _factors(read, all_sites, model, folder, config)
    whole, beside = dict(read.whole), dict(read.base)
    if model.tied_head and names.EMBED in whole and names.HEAD in beside:
        whole[names.HEAD] = beside.pop(names.HEAD)  # what the head's adapter is beside is tied to what was trained
    wide = max((tensorfile.DTYPES[e.dtype] for e in entries.values()), key=lambda d: d.itemsize, default=None)
    if wide is None:
        raise ValueError(f"adapter {folder}: {WEIGHTS} holds no tensors; copy or download it again")
    return Adapter(
        lora=lora,
        params=params | _whole(whole, model, folder, config),
        base_params=_whole(beside, model, folder, config | {"modules_to_save": None}),
        config=config,
        dtype=wide.name,
        file=folder / WEIGHTS,
    )


def check_base(folder: str | pathlib.Path, base: Pretrained) -> None:
    """The adapter was trained on `base`: by the weights if it says which, else, with a warning, by the name.

    Raises:
        ValueError: it was trained on other weights.
    """
    folder = pathlib.Path(folder).expanduser()
    name = str(read_adapter_config(folder).get("base_model_name_or_path") or "")
    try:
        weights = json.loads((folder / MARK).read_text(encoding="utf-8")).get("base_weights")
    except FileNotFoundError:
        weights = None
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder / MARK}: cannot be read ({error}); copy the adapter again") from error
    if weights is not None:
        found = weights_hash(base.path)
        if weights != found:
            is_name = name == str(base.path)
            raise ValueError(
                f"adapter {folder} was trained on {name} (weights {str(weights)[:8]}), and the model is {base.path} "
                f"({found[:8]}); "
                + ("bring back the weights that were there then" if is_name else f"take {name}")
                + ", in files of any kind that hold the same numbers, or remove "
                f"{MARK} from the adapter's folder to put it on these all the same"
            )
    elif name and pathlib.PurePath(name).name.lower() != _last_name(base.path).lower():
        _log.warning("adapter %s was made for %s, and the model is %s", folder, name, base.path)


def with_template_of(folder: str | pathlib.Path, base: Pretrained) -> Pretrained:
    """The base with the chat template in an adapter's folder, with which it was trained; with its own if there is none.

    Raises:
        ValueError: the file cannot be read, or is no Jinja text.
    """
    file = pathlib.Path(folder).expanduser() / "chat_template.jinja"
    if not file.is_file():
        return base
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{file}: cannot be read ({error}); save it as UTF-8 text, or copy the adapter again"
        ) from error
    check_template(text, name=f"the chat template of {file}")
    return dataclasses.replace(base, chat_template=text)


def _last_name(path: pathlib.Path) -> str:
    """Of a snapshot in the hub's cache (models--org--name/snapshots/0ab1), the model's."""
    return path.parent.parent.name.rpartition("--")[2] if path.parent.name == "snapshots" else path.name


def _weights_file(folder: pathlib.Path) -> pathlib.Path:
    if (folder / WEIGHTS).is_file():
        return folder / WEIGHTS
    if (folder / "adapter_model.bin").is_file():
        raise ValueError(
            f"adapter {folder}: holds its weights only as adapter_model.bin, a pickle, which runs code when read; load "
            "it with PEFT and save_pretrained it again, which writes safetensors"
        )
    raise ValueError(f"adapter {folder}: has no {WEIGHTS}; copy or download the rest of the adapter")


def _sorted_out(entries: Mapping[str, tensorfile.Entry], folder: pathlib.Path) -> _Read:
    read = _Read({}, {}, {})
    numberless = names.folded([name for name, entry in entries.items() if entry.dtype not in tensorfile.DTYPES])
    if numberless:
        raise ValueError(
            f"adapter {folder}: {', '.join(numberless)}: not plain numbers; save it as float32 or bfloat16"
        )
    for full_name, entry in entries.items():
        name = full_name.removeprefix(PREFIX)
        match = _PARTS.fullmatch(name)
        if match:
            kind = {"A": "a", "B": "b", "r": "magnitude"}[match[2][-1]]
            read.factors.setdefault(match[1], {})[kind] = entry
        elif name.endswith(BASE_LAYER):
            read.base[name.removesuffix(BASE_LAYER) + ".weight"] = entry
        else:
            read.whole[name] = entry
    for kind, word in (("b", "lora_B"), ("a", "lora_A")):
        lacking = names.folded([f"{module}.{word}" for module, held in read.factors.items() if kind not in held])
        if lacking:
            raise ValueError(f"adapter {folder}: {', '.join(lacking)} missing; copy or download it again")
    return read


def _check_strengths(read: _Read, folder: pathlib.Path, config: Mapping[str, Any]) -> None:
    """What the config says of rank and alpha goes with the tensors, whatever the model."""
    differ: dict[tuple[int, int], list[str]] = {}
    silent: list[str] = []
    for module, held in read.factors.items():
        said = strength_of(config, module)
        ranks = {*held["a"].shape[:1], *held["b"].shape[-1:]}
        if len(ranks) == 1 and said.rank not in ranks:
            differ.setdefault((said.rank, ranks.pop()), []).append(module)
        if config.get("use_dora") and not said.alpha:
            silent.append(module)
    if differ:
        lines = "\n".join(
            f"  {name}: rank {said} in {CONFIG}, {found} in {WEIGHTS}"
            for (said, found), modules in differ.items()
            for name in names.folded(modules)
        )
        raise ValueError(
            f"adapter {folder}: config and tensors disagree on the rank, so they are of two adapters; copy both files "
            f"from one, or mend r and rank_pattern there:\n{lines}"
        )
    if silent:
        raise ValueError(
            f"adapter {folder}: lora_alpha = 0 with use_dora leaves only the magnitudes of "
            f"{', '.join(names.folded(silent))}, which is not modelled; merge the adapter into its base with PEFT's "
            "merge_and_unload, and name the result with --model"
        )


def _check_whole(read: _Read, all_sites: list[Site], folder: pathlib.Path, config: Mapping[str, Any]) -> None:
    """Each module that the config names has its tensors; of experts, which PEFT adapts in several ways, none need."""
    if not read.factors:
        raise ValueError(
            f"adapter {folder}: {WEIGHTS} holds no tensors of an adapter (lora_A, lora_B); copy or download it again"
        )
    dense = [name for site in all_sites if "E" not in site.letters(0).stack for name in site.modules.values()]
    lacking = names.folded([name for name in dense if is_named(config, name) and name not in read.factors])
    if lacking:
        raise ValueError(
            f"adapter {folder}: {CONFIG} names {', '.join(lacking)}, and {WEIGHTS} lacks their tensors; copy or "
            "download it again"
        )


def _check_fit(
    read: _Read, all_sites: list[Site], model: ModelConfig, folder: pathlib.Path, config: Mapping[str, Any]
) -> None:
    """Every tensor has a place in the model, and its shape."""
    site_of = {module: site for site in all_sites for module in site.modules.values()}
    rule_of = {name: rule for rule in untied_rules(model).values() for name in rule.names.values()}
    stays = {name.removesuffix(".weight") for name in rule_of} - set(site_of)
    strangers: list[str] = []
    unfit: dict[str, list[str]] = {}
    dora = bool(config.get("use_dora"))
    for module, held in read.factors.items():
        site = site_of.get(module)
        if site is None:
            if module in stays:
                unfit.setdefault("can have no adapter here", []).append(module)
            else:
                strangers.append(f"{module}.lora_A")
            continue
        rank = strength_of(config, module).rank
        wanted = {"a": (rank, site.inputs), "b": (sum(site.outputs), rank), "magnitude": (sum(site.outputs),)}
        if not dora:
            wanted.pop("magnitude")
        for kind in wanted.keys() | held.keys():
            said, found = wanted.get(kind), held[kind].shape if kind in held else None
            if said != found:
                unfit.setdefault(f"has shape {found}, expected {said}", []).append(f"{module}.lora_{kind}")
        if dora and ("E" in site.letters(0).stack or module in (EMBED, HEAD)):
            unfit.setdefault("DoRA of embedding, head and experts is not modelled", []).append(module)
    for name, entry in {**read.whole, **read.base}.items():
        if name not in rule_of:
            strangers.append(name)
        elif entry.shape != rule_of[name].file_shape:
            unfit.setdefault(f"has shape {entry.shape}, expected {rule_of[name].file_shape}", []).append(name)
    problems = [f"{name} is not in this model" for name in names.folded(strangers)]
    problems += [f"{name}: {what}" for what, of in unfit.items() for name in names.folded(of)]
    if problems:
        made_for = config.get("base_model_name_or_path") or "another model"
        lines = "\n".join(f"  {p}" for p in problems)
        raise ValueError(
            f"adapter {folder} does not fit this model; it was made for {made_for}, so name that one with --model:\n"
            f"{lines}"
        )


def _numbers(entry: tensorfile.Entry, name: str, folder: pathlib.Path) -> np.ndarray:
    x = entry.read((slice(None),) * len(entry.shape)).astype(np.float32)
    if not np.isfinite(x).all():
        raise ValueError(f"adapter {folder}: {name} holds values that are not finite; train or download it again")
    return x


def _factors(
    read: _Read, all_sites: list[Site], model: ModelConfig, folder: pathlib.Path, config: Mapping[str, Any]
) -> tuple[Lora, dict[str, Any]]:
    """All adapters, and their tree."""
    rslora = bool(config.get("use_rslora"))
    strengths = {module: strength_of(config, module) for module in read.factors}
    targets: list[Target] = []
    for site in all_sites:
        if any(module in strengths for module in site.modules.values()):
            ranks, scales = _of_layers(site, strengths, model, rslora=rslora)
            targets += [Target(path=rule.path, ranks=ranks, scales=scales) for rule in site.rules]
    lora = Lora(
        targets=tuple(targets),
        dropout=float(config.get("lora_dropout", 0.0)),
        dora=bool(config.get("use_dora")),
        start="default",
    )
    target_of = {target.path: target for target in targets}
    shapes = lora.shapes(model.sizes) if targets else {}
    tree: dict[str, Any] = {}
    for site in all_sites:
        if site.rules[0].path not in target_of:
            continue
        for rule in site.rules:
            for name, shape in names.get(shapes["lora"], rule.path).items():
                names.put(tree, f"lora.{rule.path}.{name}", np.zeros(shape, np.float32))
        for place, module in site.modules.items():
            if module not in read.factors:
                continue
            held = {k: _numbers(entry, f"{module}.lora_{k}", folder) for k, entry in read.factors[module].items()}
            theirs = Factors(held["a"], held["b"], held.get("magnitude"))
            for part, rule in enumerate(site.rules):
                scale = target_of[rule.path].scales[place[0] if place else 0]
                # Experts of one layer share a scale; B makes up for what is another one's.
                own = strengths[module].scale(rslora=rslora)
                theirs_part = theirs if own == scale else theirs._replace(b=theirs.b * np.float32(own / scale))
                node = names.get(tree["lora"], rule.path)
                for kind, x in site.to_ours(theirs_part, part).items():
                    whole = node[next(name for name in node if name.rsplit("_", 1)[0] == kind)]
                    whole[(*place, *(slice(size) for size in x.shape))] = x
    return lora, tree


def _of_layers(
    site: Site, strengths: Mapping[str, Strength], model: ModelConfig, *, rslora: bool
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Rank and scale of each layer (one of each where there are no layers)."""
    held: list[list[Strength]] = [[] for _ in range(model.num_layers if "{layer}" in site.module else 1)]
    for place, module in site.modules.items():
        held[place[0] if place else 0] += [strengths[module]] if module in strengths else []
    ranks = tuple(max((s.rank for s in layer), default=0) for layer in held)
    scales = tuple(next((s.scale(rslora=rslora) for s in layer if s.alpha), 0.0) for layer in held)
    return ranks, scales


def _whole(
    entries: Mapping[str, tensorfile.Entry], model: ModelConfig, folder: pathlib.Path, config: Mapping[str, Any]
) -> dict[str, Any]:
    """The parameters that are there in full."""
    entries = _with_tied_head(entries, model, folder, config)
    tree: dict[str, Any] = {}
    for path, rule in names.rules(model).items():
        there = {place: entries[name] for place, name in rule.names.items() if name in entries}
        if not there:
            continue
        if lacking := names.folded([name for place, name in rule.names.items() if place not in there]):
            raise ValueError(
                f"adapter {folder}: was trained in full in some layers and not in {', '.join(lacking)}, which is not "
                "modelled; merge it into its base with PEFT's merge_and_unload"
            )
        whole = np.zeros([model.sizes[x] for x in rule.stack + rule.letters], np.float32)
        slices = tuple(slice(size) for size in rule.layer_shape)
        for place, entry in there.items():
            share = _numbers(entry, rule.hf, folder)[rule.file_slices(slices)]
            whole[(*place, *slices)] = rule.from_file(share, rule.layer_shape)
        names.put(tree, path, whole)
    return tree


def _with_tied_head(
    entries: Mapping[str, tensorfile.Entry], model: ModelConfig, folder: pathlib.Path, config: Mapping[str, Any]
) -> dict[str, tensorfile.Entry]:
    """Where the model ties the head to the embedding, so must the adapter: PEFT trains copies, of one or of both."""
    embed, head = entries.get(names.EMBED), entries.get(names.HEAD)
    kept = {name: entry for name, entry in entries.items() if name != names.HEAD}
    if not model.tied_head:
        return dict(entries)
    if embed is not None and head is not None:
        if np.array_equal(_numbers(embed, names.EMBED, folder), _numbers(head, names.HEAD, folder)):
            return kept
    elif not config.get("modules_to_save") or config.get("ensure_weight_tying") or (embed is None and head is None):
        return kept if head is None else kept | {names.EMBED: head}
    raise ValueError(
        f"adapter {folder}: has an embedding and a head that differ, which its base ties to one matrix; merge it with "
        "PEFT's merge_and_unload into a model with tie_word_embeddings = false"
    )
