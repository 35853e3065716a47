"""Where numbers go: metrics.jsonl, samples.jsonl, TensorBoard, W&B; and the peak FLOP/s that MFU is measured by.

In: a step number and a flat dict of floats. Out: files in the workdir. Only the first process writes.
MFU = algorithmic FLOPs of the step (no recomputation, no padding, no masked position) / (seconds x peak FLOP/s of all
devices); the peak is the data sheet's bf16 number on accelerators and a measured float32 matmul on CPU.
"""

import dataclasses
import functools
import json
import logging
import math
import os
import pathlib
import re
import secrets
import time
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jax_sft.disk import told_if_full

_log = logging.getLogger(__name__)

MFU = (
    "(6 x layer weights x tokens + 6 x head weights x trained tokens, 4 for 6 where frozen, + 6 x layers x heads x "
    "head width x sum of squared lengths, as far as windows reach) / seconds / peak FLOP/s"
)

# Dense bf16 peak, FLOP/s per chip, by a part of `device_kind`; from the makers' data sheets.
_PEAK_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "B200": 2250e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}


@dataclasses.dataclass(frozen=True)
class Alarm:
    """Something of a run that its user should look at."""

    step: int
    kind: Literal["overfitting", "forgetting"]
    level: Literal["alarm", "stop"]  # stop: it ends the training
    text: str


class Metrics:
    """Writers of one run, opened for appending; lines past `start_step` (of a run that was cut off) are removed.

    `start_step` is None where nothing was restored: then all lines are. Of `owed_step` the evaluation is made up for
    now, so what an earlier start may have written of it is removed too.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        *,
        start_step: int | None,
        owed_step: int = -1,
        tensorboard: bool,
        wandb_project: str | None,
        config: Mapping[str, Any],
    ) -> None:
        self._writes = jax.process_index() == 0
        self._tensorboard: Any = None
        self._wandb: Any = None
        if not self._writes:
            return
        self._path = workdir / "metrics.jsonl"
        last_kept = -1 if start_step is None else start_step
        _keep_steps_until(self._path, last_kept, owed_step)
        for name in ("samples.jsonl", "alarms.jsonl"):
            _keep_steps_until(workdir / name, last_kept, owed_step)
        self._file = self._path.open("a", encoding="utf-8")
        self._samples = (workdir / "samples.jsonl").open("a", encoding="utf-8")
        self._alarms = workdir / "alarms.jsonl"
        if tensorboard:
            try:
                from tensorboardX import SummaryWriter

                self._tensorboard = SummaryWriter(str(workdir / "tensorboard"), purge_step=last_kept + 1)
            except ImportError:
                _log.warning(
                    "TensorBoard files are not written: install jax-sft[tensorboard], or set log.tensorboard = False"
                )
        if wandb_project:
            import wandb  # pyright: ignore[reportMissingImports]  an extra; the door refuses the config without it

            name = _wandb_id(workdir, anew=start_step is None)
            self._wandb = wandb.init(
                project=wandb_project, dir=str(workdir), config=dict(config), id=name, resume="allow"
            )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line for a step. A value that is not finite is written as null: the file stays JSON."""
        if not self._writes:
            return
        clean = {k: (v if math.isfinite(v) else None) for k, v in values.items()}
        with told_if_full(self._path):
            self._file.write(json.dumps({"step": step, **clean}) + "\n")
            self._file.flush()
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def write_samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Sample answers of a step, a line each, into samples.jsonl (and TensorBoard's text tab)."""
        if not self._writes:
            return
        with told_if_full(self._samples.name):
            lines = [json.dumps({"step": step, **sample}, ensure_ascii=False) + "\n" for sample in samples]
            self._samples.writelines(lines)
            self._samples.flush()
        for number, sample in enumerate(samples):
            if self._tensorboard is not None:
                text = f"**{sample['prompt']}**\n\n{sample['answer']}"
                self._tensorboard.add_text(f"samples/{number}", text, step)

    def write_alarm(self, alarm: Alarm) -> None:
        """A line into alarms.jsonl, and a warning in the log."""
        if not self._writes:
            return
        _log.warning("step %d, %s: %s", alarm.step, alarm.kind, alarm.text)
        with told_if_full(self._alarms), self._alarms.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(alarm), ensure_ascii=False) + "\n")

    def close(self) -> None:
        """Flush and close every writer."""
        if not self._writes:
            return
        for file in (self._file, self._samples):
            with told_if_full(file.name):  # once more, what a write before it could not
                file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _wandb_id(workdir: pathlib.Path, *, anew: bool) -> str:
    """The name under which W&B knows the run of this workdir; a run that begins anew gets another one."""
    path = workdir / "wandb_id"
    known = path.read_text(encoding="utf-8").strip() if path.exists() and not anew else ""
    if not known:
        known = secrets.token_hex(8)
        path.write_text(known + "\n", encoding="utf-8")
    return known


def _keep_steps_until(path: pathlib.Path, step: int, owed_step: int) -> None:
    """Drop lines of later steps and of an owed evaluation (they will be written again) and a torn last line."""
    if not path.exists():
        return
    kept = []
    *lines, _torn = (
        path.read_bytes().decode("utf-8", errors="replace").split("\n")
    )  # an answer may hold U+2028: only \n ends a line
    for line in lines:
        try:
            record = json.loads(line)
            is_owed = record["step"] == owed_step and "loss" not in record
            if record["step"] <= step and not is_owed:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            _log.warning("%s: left out a line that is no record: %.80s", path, line)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)


def peak_flops() -> tuple[float, str]:
    """Peak FLOP/s of all devices together, and where the number comes from; NaN for an unknown accelerator."""
    device = jax.devices()[0]
    for name, peak in _PEAK_FLOPS.items():
        if re.search(rf"\b{name}\b", device.device_kind):
            return peak * jax.device_count(), f"data sheet of {name}, bf16, x {jax.device_count()}"
    if device.platform != "cpu":
        return math.nan, f"unknown, {device.device_kind} is not in the table of metrics.py"
    # Fake CPU devices share the same cores: the machine's speed is measured once and counted once per process.
    return _measured_flops() * jax.process_count(), f"measured float32 matmul on {device.device_kind}"


@functools.cache
def _measured_flops(size: int = 1024, repeats: int = 4) -> float:
    x = jnp.ones((size, size), jnp.float32)
    product = jax.jit(lambda a: a @ a)
    product(x).block_until_ready()
    best = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        product(x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
