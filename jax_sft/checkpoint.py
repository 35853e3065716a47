"""Checkpoints: saved in the background, sealed, verified before they are trusted, resumed exactly.

In: a TrainState, a JSON dict of what the host must remember, a fingerprint of what must not change between save and
resume. Out: one folder per step; restoring goes back to the newest one that is whole and says which were not.
Each step is sealed: checksums of its files are written into its folder before Orbax renames it into place, so a step
is there whole and sealed, or it is not there. Orbax itself restores flipped bits without a word.

    checkpoints/00000500/params/ [ema/] optimizer/ host/ seal.json    checkpoints/set_aside/00000500 (was broken)
"""

import contextlib
import dataclasses
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from jax_sft.config import CheckpointConfig
from jax_sft.disk import is_full, leave_the_full_disk_to_us
from jax_sft.progress import stage
from jax_sft.seal import seal_problem, write_seal

_log = logging.getLogger(__name__)

_STEP_DIGITS = 8  # of a step's folder name; a reader must use the same
_SET_ASIDE = "set_aside"
_PARTS_THAT_FAIL = 4  # of Orbax's manager, each with its own error to raise: finalizer, writer, two metadata stores
_TIMEOUT_SECONDS = 3600  # of one save in the background, sealing included


class Checkpoints:
    """The checkpoints of one run. Every process makes one and calls the same methods in the same order.

    Kept are the newest `config.keep` and the one with the lowest validation loss.
    """

    def __init__(
        self, directory: str | os.PathLike[str], config: CheckpointConfig, *, fingerprint: Mapping[str, Any] | None
    ) -> None:
        """Open a folder; with a fingerprint to save and resume, with None only to read.

        A reader leaves everything as it is: a run may be writing there at this moment.
        """
        self._directory = epath.Path(os.path.abspath(directory) if "://" not in str(directory) else directory)
        self._fingerprint = None if fingerprint is None else _as_json(fingerprint)
        self._rejected: list[int] = []  # steps that restoring passed over; moved away before the next save
        self._saving: int | None = None
        self._losses: dict[int, float] = {}  # validation loss of a step, infinity if it has none
        self._measured_by: tuple[str | None] | None = None  # the validation set whose losses count; None: any
        self._keep = config.keep
        self._manager = self._open_manager()

    @property
    def all_steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending; whether it is whole is seen when it is restored."""
        return sorted(self._manager.all_steps())

    @property
    def best_step(self) -> int | None:
        """The step with the lowest validation loss; None if none was saved with a loss."""
        losses = {step: self._loss_of(step) for step in self.all_steps}
        best = min(losses, key=losses.__getitem__, default=None)
        return None if best is None or math.isinf(losses[best]) else best

    def save(
        self, step: int, state: Any, extra: Mapping[str, Any], *, loss: float | None = None, wait: bool = False
    ) -> bool:
        """Save in the background; returns once the state is copied to the host, so the state may be donated at once.

        Waits for the save before it, if that is still being written.

        Args:
            state: a dataclass with `step`, `params`, `opt_state` and `ema` (a TrainState).
            extra: what the host must remember; JSON.
            loss: the validation loss of these parameters, for keeping the best.
            wait: return only when the checkpoint is on disk and sealed.

        Returns:
            False if this step is saved already.

        Raises:
            OSError: this or the previous save found the disk full; what was saved before is untouched.
        """
        if self._fingerprint is None:
            raise AssertionError("opened to read; saving needs a fingerprint")
        leave_the_full_disk_to_us()
        with self._explained():
            self._manager.wait_until_finished()
            self._set_aside_rejected()
            if step in self._manager.all_steps():
                return False
            self._saving = step
            loss = loss if loss is not None and math.isfinite(loss) else None
            self._losses[step] = math.inf if loss is None else loss
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(state.params),
                    optimizer=ocp.args.StandardSave({"step": state.step, "opt_state": state.opt_state}),
                    host=ocp.args.JsonSave({"extra": dict(extra), "fingerprint": self._fingerprint, "loss": loss}),
                    **({} if state.ema is None else {"ema": ocp.args.StandardSave(state.ema)}),
                ),
                force=True,  # when to save is decided by the loop
            )
        if wait:
            self.wait()
        return True

    def note_loss(self, step: int, loss: float) -> None:
        """The validation loss of a step that was saved before it was evaluated; the next start must be told again."""
        self._losses[step] = loss

    def count_losses_of(self, validation: str | None) -> None:
        """From now on a loss counts only if the step was saved with this fingerprint as its extra `validation`.

        Losses of two validation sets do not compare.
        """
        self._measured_by, self._losses = (validation,), {}

    def wait(self) -> None:
        """Block until the save in the background is on disk and sealed.

        Raises:
            OSError: it found the disk full.
        """
        with self._explained(), stage("saving a checkpoint"):
            self._manager.wait_until_finished()

    def restore(self, abstract_state: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """The newest whole checkpoint as (step, state, extra); None if nothing was ever saved.

        A broken one is passed over with a warning that names it.

        Args:
            abstract_state: a TrainState of ShapeDtypeStructs with shardings, of any mesh.

        Raises:
            ValueError: there are checkpoints, but none is whole; or the run was saved under another fingerprint.
        """
        self.wait()  # a step counts from the start of its save, and is there at the end of it
        if not self._agreed(len(self.all_steps)):
            return None

        def load(step: int, extra: dict[str, Any]) -> tuple[int, Any, dict[str, Any]]:
            rest = {"step": abstract_state.step, "opt_state": abstract_state.opt_state}
            asked = {"params": abstract_state.params, "optimizer": rest}
            asked |= {} if abstract_state.ema is None else {"ema": abstract_state.ema}
            restored = dict(
                self._manager.restore(
                    step,
                    args=ocp.args.Composite(**{name: ocp.args.StandardRestore(of) for name, of in asked.items()}),
                )
            )
            return step, dataclasses.replace(abstract_state, **restored.pop("optimizer"), **restored), extra

        return self._newest_whole(load, self.all_steps)

    def restore_params(
        self, abstract_params: Any, *, step: int | None = None, averaged: bool = False
    ) -> tuple[int, Any, dict[str, Any]]:
        """The parameters alone, as (step, params, extra), of `step` or of the newest whole checkpoint.

        With `averaged` their moving average, which the run must have kept.

        Raises:
            ValueError: there is no such checkpoint, or it is broken.
        """
        steps = self.all_steps
        if not steps or (step is not None and step not in steps):
            asked = "no checkpoint" if step is None else f"no checkpoint of step {step}"
            there = f"the steps there are {', '.join(map(str, steps))}" if steps else "train first"
            raise ValueError(f"{self._directory}: holds {asked}; {there}")

        def load(step: int, extra: dict[str, Any]) -> tuple[int, Any, dict[str, Any]]:
            name = "ema" if averaged else "params"
            asked = ocp.args.Composite(**{name: ocp.args.StandardRestore(abstract_params)})
            return step, self._manager.restore(step, args=asked)[name], extra

        return self._newest_whole(load, steps if step is None else [step])

    def validation_of_newest(self) -> str | None:
        """The fingerprint of the validation set that the newest step was saved with, as its extra `validation`."""
        return self._host_notes(self.all_steps[-1])["extra"].get("validation") if self.all_steps else None

    def fingerprint_of(self, step: int) -> dict[str, Any]:
        """The fingerprint of the run that saved a step."""
        return self._host_notes(step)["fingerprint"]

    def reached_preemption(self, step: int) -> bool:
        """Whether the machine is about to be taken away; the same answer at the same step on every process.

        False without `jax.distributed`: then whoever runs the loop listens to signals.
        """
        return self._manager.reached_preemption(step)

    def close(self) -> None:
        """Wait for the save in the background and let go of the folder.

        Raises:
            OSError: that save found the disk full.
        """
        try:
            self.wait()
        finally:
            self._manager.close()

    def _open_manager(self) -> ocp.CheckpointManager:
        writes = self._fingerprint is not None
        return ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                # Not Orbax's own `metrics`: one damaged file of them, and the manager cannot even be made.
                preservation_policy=_NewestAndBest(self._keep, self._loss_of),
                step_format_fixed_length=_STEP_DIGITS,
                create=writes,
                cleanup_tmp_directories=writes,
                async_options=ocp.AsyncOptions(
                    timeout_secs=_TIMEOUT_SECONDS,
                    # Called on process 0 when every process has written its files, before the rename.
                    post_finalization_callback=self._seal,
                ),
            ),
        )

    def _seal(self) -> None:
        """Write the checksums of the step being saved into its folder; in Orbax's thread, on process 0."""
        assert self._saving is not None
        name = self._step_folder(self._saving).name
        for folder in self._directory.iterdir():
            if folder.name == name or folder.name.startswith(f"{name}.orbax"):
                write_seal(folder)

    def _step_folder(self, step: int) -> epath.Path:
        return self._directory / f"{step:0{_STEP_DIGITS}d}"

    def _host_notes(self, step: int) -> dict[str, Any]:
        return json.loads((self._step_folder(step) / "host" / "metadata").read_text())

    def _loss_of(self, step: int) -> float:
        if step not in self._losses:
            try:
                host = self._host_notes(step)
                counts = self._measured_by is None or host["extra"].get("validation") == self._measured_by[0]
                loss = host["loss"] if counts else None
            except (OSError, ValueError, KeyError):  # damaged: certainly not the best
                loss = None
            self._losses[step] = math.inf if loss is None else loss
        return self._losses[step]

    def _newest_whole(self, load: Any, steps: list[int]) -> Any:
        """`load(step, extra)` of the newest of `steps` that passes; process 0 judges the files, all try to load."""
        problems: dict[int, str] = {}
        candidates = sorted(steps, reverse=True)
        while True:
            step = -1
            if jax.process_index() == 0:
                step = next((s for s in candidates if s not in problems and self._is_whole(s, problems)), -1)
            step = self._agreed(step)
            if step < 0:
                break
            loaded = problem = None
            try:
                host = self._host_notes(step)
                self._compare_fingerprint(step, host["fingerprint"])
                with stage(f"restoring step {step}"):
                    loaded = load(step, host["extra"])
            except (FingerprintError, MemoryError):
                raise
            except Exception as error:
                if "RESOURCE_EXHAUSTED" in str(error):  # no fault of the checkpoint
                    raise
                problem = f"it cannot be restored ({type(error).__name__}: {str(error).splitlines()[0][:300]})"
            if self._agreed(int(problem is not None), any_process=True) == 0:
                self._rejected = self._agreed_list([s for s in candidates if s > step])
                return loaded
            problems[step] = problem or "another process could not restore it"
            _warn_passed_over(self._step_folder(step), problems[step])
        listed = "; ".join(f"step {s}: {p}" for s, p in sorted(problems.items(), reverse=True))
        raise ValueError(
            f"{self._directory}: none of its checkpoints can be used ({listed or 'see process 0'}); bring back a "
            "copy of one, or move the folder away to start from the beginning"
        )

    def _is_whole(self, step: int, problems: dict[int, str]) -> bool:
        problem = seal_problem(self._step_folder(step))
        if problem is None:
            return True
        problems[step] = problem
        _warn_passed_over(self._step_folder(step), problem)
        return False

    def _compare_fingerprint(self, step: int, saved: Mapping[str, Any]) -> None:
        if self._fingerprint is None:
            return
        lines = list(_differences(saved, self._fingerprint))
        if lines:
            other_model = any(line.startswith("  model.weights:") for line in lines)
            by = " (model.weights by model.path or model.revision)" if other_model else ""
            raise FingerprintError(
                f"{self._directory}: the run of step {step} cannot go on with another configuration; set these back"
                f"{by}, or use a new workdir:\n" + "\n".join(lines)
            )

    def _set_aside_rejected(self) -> None:
        """Move steps that restoring passed over out of the way: the run will come by them again and save them anew."""
        if not self._rejected:
            return
        if jax.process_index() == 0:
            for step in self._rejected:
                target = self._directory / _SET_ASIDE / self._step_folder(step).name
                if target.exists():
                    target.rmtree()
                target.parent.mkdir(exist_ok=True)
                self._step_folder(step).rename(target)
                _log.warning("%s: moved to %s; delete it when you no longer need it", self._step_folder(step), target)
        _barrier("set aside broken checkpoints")
        self._rejected = []
        self._manager.reload()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn a failed save into one sentence, and leave the folder as if it had not been tried."""
        try:
            yield
        except Exception as error:
            self._start_over()
            if not is_full(error):
                raise
            steps = self.all_steps
            last = f"the checkpoint of step {steps[-1]} is untouched" if steps else "there is no earlier checkpoint"
            raise OSError(
                f"{self._directory}: the disk is full, so the checkpoint of step {self._saving} was not saved; {last}. "
                "Free some space, or lower checkpoint.keep, and start the same command again"
            ) from error

    def _start_over(self) -> None:
        """A new manager after a failed save: parts of the old one would raise the same error again, one by one."""
        if jax.process_count() > 1:
            return  # the others have not failed and would not come along; this process is about to end
        for _ in range(_PARTS_THAT_FAIL):
            with contextlib.suppress(Exception):
                self._manager.close()
        # What a thread of the old manager still holds, or makes after this, is no checkpoint: the next start clears it.
        if self._saving is not None:
            for left in self._directory.glob(f"{self._step_folder(self._saving).name}.orbax*"):
                with contextlib.suppress(OSError):
                    left.rmtree(missing_ok=True)
        self._manager = self._open_manager()

    def _agreed(self, value: int, *, any_process: bool = False) -> int:
        """Process 0's value on every process; with `any_process` the largest of all."""
        if jax.process_count() == 1:
            return value
        if any_process:
            return int(multihost_utils.process_allgather(np.int32(value)).max())
        return int(multihost_utils.broadcast_one_to_all(np.int32(value)))

    def _agreed_list(self, steps: list[int]) -> list[int]:
        count = self._agreed(len(steps))
        return [self._agreed(step) for step in (steps if jax.process_index() == 0 else [0] * count)]


@dataclasses.dataclass(frozen=True)
class _NewestAndBest:
    """Which steps Orbax keeps once a save is sealed: the newest `keep`, and the one with the lowest loss."""

    keep: int
    loss_of: Callable[[int], float]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """One answer for each checkpoint; they come oldest first."""
        del context
        steps = [info.step for info in checkpoints]
        best = min(steps, key=self.loss_of, default=None)
        if best is not None and math.isinf(self.loss_of(best)):
            best = None
        return [step == best or step in steps[-self.keep :] for step in steps]


class FingerprintError(ValueError):
    """A checkpoint belongs to a run with another configuration; the message lists the differences."""


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _warn_passed_over(folder: epath.Path, problem: str) -> None:
    _log.warning("%s is broken and is passed over: %s; going back to the checkpoint before it", folder, problem)


def _as_json(value: Any) -> Any:
    """What `value` is after a round trip through JSON: tuples become lists."""
    return json.loads(json.dumps(value))


def _differences(saved: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Lines on what two fingerprints do not share; a section that only one of them has, such as lora, is one line."""
    missing = object()

    def said(value: Any) -> str:
        return "not set" if value is missing else "set" if isinstance(value, Mapping) else repr(value)

    for key in sorted({*saved, *now}):
        before, after = saved.get(key, missing), now.get(key, missing)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _differences(before, after, f"{prefix}{key}.")
        elif before != after:
            yield f"  {prefix}{key}: {said(before)} when saved, {said(after)} now"
