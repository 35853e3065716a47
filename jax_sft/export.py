"""Trained weights out, as a Hugging Face folder: from a live state, a workdir's checkpoint, or another model file.

In: parameters and the base they came from. Out: a folder that transformers loads, whose template and stop ids are the
ones that were trained. With an Exam it is read back and certified.
"""

import pathlib
from typing import Any

import jax

from jax_sft.certificate import certify
from jax_sft.checkpoint import Checkpoints
from jax_sft.config import MeshConfig, RunConfig
from jax_sft.evaluate.losses import Losses
from jax_sft.exam import Exam, examine, make_exam
from jax_sft.hf.folder import HUB_ID
from jax_sft.hf.load import Pretrained, load_configured, load_model
from jax_sft.hf.save import save_model
from jax_sft.manifest import read_config
from jax_sft.model.decoder import abstract_params
from jax_sft.sharding import make_mesh, shard_params


def write_export(
    base: Pretrained,
    params: Any,
    out: pathlib.Path,
    *,
    dtype: str,
    max_shard_size: str,
    facts: dict[str, Any],
    exam: Exam | None,
    name: str | None = None,
) -> pathlib.Path:
    """Write the folder; `facts` and `name` (None: the folder's) go into its model card.

    With an `exam` the folder is read back and gets its certificate; the arrays of `params` are deleted before, so that
    the model is never on the devices twice.

    Raises:
        ValueError: of `save_model`; or the folder does not hold what was trained.
    """
    trained = None if exam is None else examine(base, params, exam, dtype=dtype)
    save_model(
        out,
        config=base.config,
        params=params,
        tokenizer=base.tokenizer,
        hf_config=base.hf_config,
        generation_config=base.generation_config,
        chat_template=base.chat_template,
        stop_ids=base.template.stop_ids,
        dtype=dtype,
        max_shard_size=max_shard_size,
        facts=facts,
        name=name,
        source=base.path,
    )
    if exam is not None:
        shardings = jax.tree.map(lambda x: x.sharding, params)
        jax.tree.map(lambda x: x.delete(), params)
        certify(out.expanduser().resolve(), base, exam, trained, shardings=shardings, dtype=dtype)
    return out


def training_facts(config: RunConfig, total_steps: int, before: Losses | None, after: Losses | None) -> dict[str, Any]:
    """What the model card says of the training."""
    facts: dict[str, Any] = {
        "base model": _public_name(config.model.path),
        "training data": ", ".join(map(_public_name, config.data.train)),
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
    step: int | None = None,
    dtype: str | None = None,
    certified: bool = True,
    name: str | None = None,
) -> int:
    """Export the newest good checkpoint of a workdir, or the one of `step`. Returns the step that was exported.

    Args:
        certified: whether the folder is read back and gets a certificate.

    Raises:
        ValueError: the folder is no workdir, or holds no good checkpoint of that step.
    """
    config = read_config(workdir)
    base = load_configured(config.model, seed=config.seed)
    mesh = make_mesh(MeshConfig())
    shape = abstract_params(base.config)
    shape = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shape, shard_params(shape, mesh)
    )
    checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint, fingerprint=None)
    found, params, notes = checkpoints.restore_params(shape, step=step)
    checkpoints.close()
    before = Losses(**notes["before"]) if notes.get("before") else None
    after = Losses(**notes["after"]) if notes.get("after") and notes["after_step"] == found else None
    facts = training_facts(config, found, before, after)
    write_export(
        base,
        params,
        out,
        dtype=dtype or config.export.dtype,
        max_shard_size=config.export.max_shard_size,
        facts=facts,
        exam=make_exam(base, config.data, config.evaluate.prompts) if certified else None,
        name=name,
    )
    return found


def export_model(
    source: str,
    out: pathlib.Path,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    certified: bool = True,
    name: str | None = None,
) -> None:
    """Rewrite a model as a Hugging Face folder: a .gguf file becomes one, or a folder changes its dtype.

    `dtype` None keeps the one that the model's config.json names; `certified` as for `export_workdir`.
    """
    base = load_model(source, revision=revision, mesh=make_mesh(MeshConfig()))
    stored = base.hf_config.get("dtype") or base.hf_config.get("torch_dtype") or "bfloat16"
    write_export(
        base,
        base.params,
        out,
        dtype=dtype or stored,
        max_shard_size=max_shard_size,
        facts={"rewritten from": _public_name(source)},
        exam=make_exam(base) if certified else None,
        name=name,
    )
