"""manifest.json, what a run was made of: config, versions, data hashes and counts, seed, command, and each start.

In: a run's config and its tokenised sets. Out: a file in the workdir, read again by `jax-sft export`.
"""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import logging
import math
import pathlib
import platform
from collections.abc import Mapping
from typing import Any

import jax

from jax_sft.config import RunConfig, from_config_dict
from jax_sft.cost import total
from jax_sft.data.dataset import TokenizedSet
from jax_sft.data.stream.shards import Plan
from jax_sft.disk import written_whole
from jax_sft.metrics import MFU, peak_flops

_log = logging.getLogger(__name__)

_NAME = "manifest.json"
_VERSIONS_OF = ("jax-sft", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "datasets", "numpy")


def write_manifest(
    workdir: pathlib.Path,
    *,
    config: RunConfig,
    sets: Mapping[str, TokenizedSet | Plan | None],
    total_steps: int,
    start_step: int,
    command: str,
) -> None:
    """Write what this start of the run is made of; earlier starts stay in the list `starts`.

    Args:
        sets: the tokenised sets by name, `train` and `validation`; the plan of one that is streamed.
        start_step: 0, or the step that this start resumes from.
    """
    path = workdir / _NAME
    starts = []
    if path.exists():
        try:
            starts = list(map(dict, json.loads(path.read_text(encoding="utf-8"))["starts"]))
        except (ValueError, KeyError, TypeError):
            _log.warning("%s is damaged; it is written anew, without the earlier starts", path)
    versions = {"python": platform.python_version()}
    for name in _VERSIONS_OF:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    peak, peak_from = peak_flops()
    manifest = {
        "command": command,
        "seed": config.seed,
        "config": config.to_dict(),
        "data": {
            **{name: found.fingerprint if found else None for name, found in sets.items()},
            "accounts": {name: dataclasses.asdict(found.account) for name, found in sets.items() if found},
            "sizes": {name: _size(found) for name, found in sets.items() if isinstance(found, TokenizedSet)},
        },
        "mfu": {"formula": MFU, "peak_flops": peak if math.isfinite(peak) else None, "peak_from": peak_from},
        "versions": versions,
        "devices": [str(d.device_kind) for d in jax.devices()],
        "processes": jax.process_count(),
        "total_steps": total_steps,
        "starts": [*starts, {"at": now, "from_step": start_step, "command": command}],
    }
    _write(path, manifest)


def write_cost(workdir: pathlib.Path, cost: Mapping[str, Any]) -> None:
    """What the newest start cost, beside it, and under `cost` what all starts did that ended by themselves."""
    path = workdir / _NAME
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["starts"][-1]["cost"] = dict(cost)
    manifest["cost"] = total([start["cost"] for start in manifest["starts"] if "cost" in start])
    _write(path, manifest)


def _size(found: TokenizedSet) -> dict[str, int]:
    tokens, trained = int(found.lengths_N.sum()), int(found.trained_N.sum())
    return {"sequences": len(found), "tokens": tokens, "trained_tokens": trained}


def _write(path: pathlib.Path, manifest: Mapping[str, Any]) -> None:
    with written_whole(path) as file:
        file.write(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")


def read_config(workdir: pathlib.Path) -> RunConfig:
    """The config that the newest start of a workdir's run was given.

    Raises:
        ValueError: the folder has no manifest, or a damaged one.
    """
    path = workdir / _NAME
    if not path.is_file():
        raise ValueError(
            f"{workdir}: holds no {_NAME}, so it is no workdir of a run; name the folder given to --workdir"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))["config"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: is damaged ({type(error).__name__}: {error}); start `jax-sft train` on this workdir once more, "
            "which writes it anew"
        ) from error
    return from_config_dict(config)
