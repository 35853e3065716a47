"""Trained weights out, as a Hugging Face folder: from a live state, a workdir's checkpoint, or another model file.

In: parameters and the base they came from. Out: a folder that transformers loads, whose template and stop ids are the
ones that were trained. With an Exam it is read back and certified.
"""

import dataclasses
import functools
import logging
import pathlib
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from jax_sft.certificate import certify, certify_adapter
from jax_sft.checkpoint import Checkpoints
from jax_sft.config import MeshConfig, RunConfig, export_dtype
from jax_sft.evaluate.losses import Losses
from jax_sft.exam import Exam, examine, logits_of, make_exam
from jax_sft.hf.folder import HUB_ID
from jax_sft.hf.load import Pretrained, load_model, load_pretrained
from jax_sft.hf.peft import with_template_of
from jax_sft.hf.save import save_model
from jax_sft.hf.save_adapter import write_adapter
from jax_sft.hf.stored import weights_hash
from jax_sft.interpolate import between, scaled_adapters
from jax_sft.manifest import read_config
from jax_sft.model.lora import merged
from jax_sft.parameters import Parameters, joined, load_base, of_adapter, parameters
from jax_sft.progress import stage
from jax_sft.sharding import make_mesh, shard_params

_log = logging.getLogger(__name__)

_MERGE_TOLERANCE = 1e-4  # of the largest logit; the same sums in another order


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """What every export is told."""

    out: pathlib.Path  # the folder
    dtype: str
    max_shard_size: str = "5GB"
    facts: dict[str, Any]  # of the model card
    exam: Exam | None  # with one, the folder is read back and gets its certificate
    name: str | None = None  # on the model card; None: the folder's


def write_export(base: Pretrained, params: Any, export: Export) -> pathlib.Path:
    """Write the folder of a model.

    With an exam the arrays of `params` are deleted before it is read back: the model is never on the devices twice.

    Raises:
        ValueError: of `save_model`; or the folder does not hold what was trained.
    """
    exam, dtype = export.exam, export.dtype
    with stage("asking the trained model"):
        trained = None if exam is None else examine(base, params, exam, dtype=dtype)
    save_model(
        export.out,
        params=params,
        dtype=dtype,
        max_shard_size=export.max_shard_size,
        facts=export.facts,
        name=export.name,
        **_as_before(base),
    )
    if exam is not None:
        shardings = jax.tree.map(lambda x: x.sharding, params)
        jax.tree.map(lambda x: x.delete(), params)
        certify(export.out.expanduser().resolve(), base, exam, trained, shardings=shardings, dtype=dtype)
    return export.out


def write_trained(
    base: Pretrained,
    plan: Parameters,
    trained: Any,
    frozen: Any,
    export: Export,
    *,
    form: str,
    base_name: str | None = None,
    revision: str | None = None,
    factor: float = 1.0,
) -> pathlib.Path:
    """Write what was trained: all weights ("full"), or adapters: added to their base ("merged"), or alone ("adapter").

    With a `factor` below 1, weights between the base's and these; see `interpolate`. Both trees are used up. An adapter
    names its base as `base_name`, a hub id or a path; None: the path it lies at.

    Raises:
        ValueError: of `write_export`; the merged model says something else than the adapters beside their base.
    """
    if plan.base in ("int8", "nf4"):
        export = dataclasses.replace(export, facts=export.facts | {"base while training": _held(plan.base)})
        _log.info("exported for the base as its files have it; it was %s", _held(plan.base))
    if factor != 1:
        export = dataclasses.replace(export, facts=export.facts | {"averaged with the base": f"{factor:g} of the way"})
        mesh = jax.tree.leaves(trained)[0].sharding.mesh
        if form == "adapter":
            trained = scaled_adapters(plan, trained, plan.load_in_full(base, mesh), factor)
        elif form == "full":
            trained = between(plan.load_in_full(base, mesh), trained, factor)
    if form == "adapter":
        assert plan.lora is not None
        write_adapter(
            export.out,
            lora=plan.lora,
            params=trained,
            base_params=None if plan.adapter is None else plan.adapter.base_params,
            base_name=base_name or str(base.path),
            dtype=export.dtype,
            facts=export.facts,
            rslora=plan.rslora,
            source_config=_source_config(plan, revision),
            name=export.name,
            **_as_before(base),
        )
        if export.exam is not None:
            jax.tree.map(lambda x: x.delete(), frozen)  # its numbers are read again, in float32
            mesh, folder = jax.tree.leaves(trained)[0].sharding.mesh, export.out.expanduser().resolve()
            certify_adapter(folder, base, plan, trained, export.exam, mesh=mesh, dtype=export.dtype)
        return export.out
    params = joined(trained, frozen)
    if form == "merged":
        assert plan.lora is not None
        mesh = jax.tree.leaves(trained)[0].sharding.mesh
        jax.tree.map(lambda x: x.delete(), frozen)  # its numbers are read again, in float32
        is_tied = base.config.tied_head
        base, params, said = _merged(base, plan, trained, mesh, export.exam)
        if factor != 1 and base.config.tied_head != is_tied:
            raise ValueError(
                "--interpolate: adapters of a tied embedding or head untie the two, and the base has no such head; "
                "export with --format adapter"
            )
        if factor != 1:
            params = between(plan.load_base(base, mesh), params, factor)
        export = dataclasses.replace(export, facts=export.facts | said)
    return write_export(base, params, export)


def _as_before(base: Pretrained) -> dict[str, Any]:
    """What every export has of its base as it was."""
    return {
        "config": base.config,
        "tokenizer": base.tokenizer,
        "hf_config": base.hf_config,
        "generation_config": base.generation_config,
        "chat_template": base.chat_template,
        "stop_ids": base.template.stop_ids,
        "source": base.path,
    }


def _held(kind: str) -> str:
    return f"held in {kind}, which the validation losses of the training are of"


def _source_config(plan: Parameters, revision: str | None) -> dict[str, Any] | None:
    """What adapter_config.json says beyond what was trained: of the adapter gone on from, and the base's revision."""
    said = {} if plan.adapter is None else dict(plan.adapter.config)
    return said | ({} if revision is None else {"revision": revision}) or None


def _merged(
    base: Pretrained, plan: Parameters, trained: Any, mesh: Mesh, exam: Exam | None
) -> tuple[Pretrained, Any, dict[str, Any]]:
    """The model with its adapters in its weights, and what is to be said of it.

    They are added to the weights of the base's files in float32, also where the frozen base was held in fewer bits.
    """
    lora, factors = plan.lora, trained["lora"]
    assert lora is not None
    in_full = {key: tree for key, tree in trained.items() if key != "lora"}
    weights = joined(plan.load_base(base, mesh), in_full)
    beside = None if exam is None else logits_of(base, joined(weights, {"lora": factors}), exam, lora=lora)
    params = merged(lora, weights, factors)
    if base.config.tied_head and "head_VD" in params:
        _log.info("the adapters are of embedding or head alone, so the merged model no longer ties the two")
        untied = dataclasses.replace(base.config, tied_head=False)
        base = dataclasses.replace(base, config=untied, hf_config=base.hf_config | {"tie_word_embeddings": False})
    facts = {"adapters": f"LoRA of rank {max(target.rank for target in lora.targets)}, merged in float32"}
    if exam is None or beside is None:
        return base, params, facts
    difference = float(np.abs(logits_of(base, params, exam) - beside).max())
    largest = float(np.abs(beside).max())
    _log.info(
        "merged: logits up to %.3g differ by %.2g from those of the adapters beside the base", largest, difference
    )
    if not difference <= _MERGE_TOLERANCE * largest:
        raise ValueError(
            f"the merged model's logits differ by {difference:.3g} from those of the adapters beside their base, where "
            f"the largest is {largest:.3g}; export with --format adapter instead, which changes nothing"
        )
    return base, params, facts | {"largest logit difference by merging": difference}


def training_facts(config: RunConfig, total_steps: int, before: Losses | None, after: Losses | None) -> dict[str, Any]:
    """What the model card says of the training."""
    facts: dict[str, Any] = {
        "base model": _public_name(config.model.path),
        "training data": ", ".join(config.data.sets or map(_public_name, config.data.train)),
        "steps": total_steps,
        "packed rows per step": config.train.batch_size,
        "row length": config.data.max_length,
        "learning rate": config.optim.lr,
        "schedule": config.optim.schedule,
        "seed": config.seed,
    }
    if before and after:
        facts["validation loss before"] = round(before.loss, 4)
        facts["validation loss after"] = round(after.loss, 4)
    return facts


def _public_name(path: str) -> str:
    """A hub id as it is; of a local path the last name, since a model card is for everybody."""
    return path if HUB_ID.fullmatch(path) else pathlib.PurePath(path).name


def export_workdir(
    workdir: pathlib.Path,
    out: pathlib.Path,
    *,
    step: int | Literal["best"] | None = None,
    dtype: str | None = None,
    form: str | None = None,
    certified: bool = True,
    name: str | None = None,
    factor: float = 1.0,
) -> int:
    """Export the newest good checkpoint of a workdir, or the one of `step`. Returns the step that was exported.

    "best" is the step with the lowest validation loss.

    Args:
        form: full, merged or adapter; None: as the run's config says.
        certified: whether the folder is read back and gets a certificate.
        factor: how far from the base, 0, to what was trained, 1; see `interpolate`.

    Raises:
        ValueError: the folder is no workdir, or holds no good checkpoint of that step.
    """
    config = read_config(workdir)
    base = load_base(config)
    mesh = make_mesh(MeshConfig())
    plan = parameters(config, base)
    form = form or config.export.format or "full"
    if (form == "full") != (plan.lora is None):
        raise ValueError(
            f"{workdir}: trained adapters, so --format full has nothing to write; choose merged or adapter"
            if plan.lora is not None
            else f"{workdir}: trained no adapters, so --format {form} has nothing to write; choose full"
        )
    shape = plan.abstract_trained
    shape = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shape, shard_params(shape, mesh)
    )
    checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint, fingerprint=None)
    if step == "best":
        checkpoints.count_losses_of(checkpoints.validation_of_newest())
        step = checkpoints.best_step
        if step is None:
            raise ValueError(
                f"{workdir}: none of its checkpoints was saved with a validation loss, so none is the best; leave "
                "--step out for the newest, or set data.validation in the next run"
            )
    found, trained, notes = checkpoints.restore_params(shape, step=step, averaged=config.train.is_averaged)
    checkpoints.close()
    _check_still_the_same(workdir, plan, base, checkpoints.fingerprint_of(found), reads_base=factor != 1)
    before = Losses(**notes["before"]) if notes.get("before") else None
    is_measured = notes.get("after") and notes["after_step"] == found and factor == 1
    after = Losses(**notes["after"]) if is_measured else None
    facts = training_facts(config, found, before, after)
    same_form = form == config.export.format
    export = Export(
        out=out,
        dtype=dtype or (config.export.dtype if same_form else None) or export_dtype(form),
        max_shard_size=config.export.max_shard_size,
        facts=facts,
        exam=make_exam(base, config.data, config.evaluate.prompts) if certified else None,
        name=name,
    )
    frozen = plan.load_frozen(base, mesh) if form == "full" else {}  # else it is read as its files have it
    write_trained(
        base,
        plan,
        trained,
        frozen,
        export,
        form=form,
        base_name=config.model.path,
        revision=config.model.revision,
        factor=factor,
    )
    return found


def _check_still_the_same(
    workdir: pathlib.Path, plan: Parameters, base: Pretrained, saved: dict[str, Any], *, reads_base: bool
) -> None:
    """What a checkpoint does not hold is what it was: the base, and how adapters count.

    Args:
        saved: the fingerprint of the run.
        reads_base: whether the base's weights are read, beside all that were trained, to average with them.

    Raises:
        ValueError: it is not.
    """
    if plan.lora is None and not plan.frozen_layers and not reads_base:
        return
    found = weights_hash(base.path)
    if saved["model.weights"] != found:
        raise ValueError(
            f"{workdir}: was trained on other weights ({saved['model.weights'][:8]}) than {base.path} holds now "
            f"({found[:8]}); bring those back, in files of any kind that hold the same numbers, or start the training "
            "again with model.path or model.revision naming them, which writes its export anew"
        )
    if any(saved.get(key) != value for key, value in plan.fingerprint.items()):
        raise ValueError(
            f"{workdir}: the adapter that the run went on from has changed since, and with it what the trained one "
            "means; bring it back as it was"
        )


def export_model(
    source: str,
    out: pathlib.Path,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    adapter: str | None = None,
    form: str | None = None,
    certified: bool = True,
    name: str | None = None,
    factor: float = 1.0,
) -> None:
    """Rewrite a model as a Hugging Face folder: a .gguf file becomes one, or a folder changes its dtype.

    `dtype` None keeps the one that the model's config.json names; `certified` as for `export_workdir`. An `adapter` is
    merged into the model, or with `form` "adapter" written anew beside it.
    """
    told = functools.partial(Export, out=out, max_shard_size=max_shard_size, name=name)
    mesh = make_mesh(MeshConfig())
    if adapter is None:
        if factor != 1:
            raise ValueError(
                "--interpolate needs what was trained and its base; name a --workdir, or an --adapter of --model"
            )
        if form not in (None, "full"):
            raise ValueError(f"--format {form} needs adapters; name them with --adapter, or choose full")
        base = load_model(source, revision=revision, mesh=mesh)
        exam, facts = make_exam(base) if certified else None, {"rewritten from": _public_name(source)}
        write_export(base, base.params, told(dtype=dtype or _stored_dtype(base), facts=facts, exam=exam))
        return
    if form == "full":
        raise ValueError("--format full has no place for an adapter; choose merged or adapter")
    form = form or "merged"
    base = with_template_of(adapter, load_pretrained(source, revision=revision))
    plan = of_adapter(adapter, base)
    assert plan.adapter is not None
    dtype = dtype or (plan.adapter.dtype if form == "adapter" else _stored_dtype(base))
    facts = {"base model": _public_name(source), "adapter": _public_name(adapter)}
    export = told(dtype=dtype, facts=facts, exam=make_exam(base) if certified else None)
    base_name = plan.adapter.base_name or source
    write_trained(base, plan, plan.load_adapter(mesh), {}, export, form=form, base_name=base_name, factor=factor)


def _stored_dtype(base: Pretrained) -> str:
    """The one that the model's config.json names."""
    return base.hf_config.get("dtype") or base.hf_config.get("torch_dtype") or "bfloat16"
