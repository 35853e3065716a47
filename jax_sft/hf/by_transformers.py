"""A model folder read by transformers and torch, in a process of its own: a second opinion on what an export holds.

In: a folder, perhaps an adapter's that PEFT puts on it, and rows of token ids. Out: the logits at the last positions
of each row, in float32, and which tensors transformers missed or did not expect. torch is imported by that process
alone: it is no dependency, and a host that is too small for a second copy of the model loses that process and not the
run.
"""

import contextlib
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

_TIMEOUT_SECONDS = 1800
_CGROUP = pathlib.Path("/sys/fs/cgroup")


class UnreadError(Exception):
    """transformers could not come to an opinion, through no fault of the folder; the text is the reason."""


class Reading(NamedTuple):
    """What transformers made of a folder."""

    logits: list[np.ndarray]  # of each row: [positions, V]
    facts: dict[str, Any]  # versions, missing_keys, unexpected_keys


def why_not_here(num_params: int, *, with_adapter: bool = False) -> str | None:
    """Why transformers cannot read a model of this size on this host; None if it can."""
    needed = ("torch", "transformers", "peft") if with_adapter else ("torch", "transformers")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        return f"{' and '.join(missing)} is not installed"
    need, free = 4.5 * num_params, _free_bytes()  # float32, and the largest tensor once more
    if free is not None and need > free:
        return f"it needs {need / 1e9:.1f} GB of host memory, and {free / 1e9:.1f} GB are free"
    return None


def read_by_transformers(
    folder: pathlib.Path, rows: Sequence[Sequence[int]], *, positions: int, adapter: pathlib.Path | None = None
) -> Reading:
    """Logits of transformers, on the CPU and in float32, at the last `positions` of each row; of PEFT with an adapter.

    Raises:
        RuntimeError: it cannot load the folder; with the last line it said.
        UnreadError: it took too long, was killed, or does not know this kind of model.
    """
    with tempfile.TemporaryDirectory(prefix="jax_sft.") as place:
        asked, told = pathlib.Path(place, "rows.json"), pathlib.Path(place, "logits.npz")
        wanted = {"rows": [list(map(int, row)) for row in rows], "positions": positions}
        asked.write_text(json.dumps(wanted | {"adapter": None if adapter is None else str(adapter)}))
        try:
            done = subprocess.run(
                [sys.executable, "-m", "jax_sft.hf.by_transformers", str(folder), str(asked), str(told)],
                env=dict(os.environ, CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false"),
                capture_output=True,
                text=True,
                timeout=_TIMEOUT_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise UnreadError(f"it took longer than {_TIMEOUT_SECONDS} s") from error
        if done.returncode < 0:  # as the kernel does when memory runs out
            raise UnreadError(f"its process was killed by signal {-done.returncode}")
        if "does not recognize this architecture" in done.stderr:
            raise UnreadError("this version of transformers does not know the model type")
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"])[-1]
            raise RuntimeError(last[:500])
        with np.load(told) as held:
            facts = json.loads(str(held["facts"]))
            return Reading([held[f"row_{i}"] for i in range(len(rows))], facts)


def _read(folder: str, asked: str, told: str) -> None:
    """The work of the process of its own."""
    import torch
    import transformers

    given = json.loads(pathlib.Path(asked).read_text())
    automatic: Any = transformers.AutoModelForCausalLM
    model, loaded = automatic.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    versions = {"version": transformers.__version__, "torch": torch.__version__}
    missing, unexpected = [*loaded["missing_keys"]], [*loaded["unexpected_keys"]]
    if given["adapter"]:
        import peft

        versions["peft"] = peft.__version__
        config = peft.PeftConfig.from_pretrained(given["adapter"])
        model = peft.get_peft_model(model, config)
        held = peft.load_peft_weights(given["adapter"], device="cpu")
        put = peft.set_peft_model_state_dict(model, held)
        missing += [key for key in put.missing_keys if "lora_" in key or "modules_to_save" in key]
        unexpected += put.unexpected_keys
    model.eval()
    with torch.no_grad():
        logits = [model(torch.tensor([row])).logits[0, -given["positions"] :].numpy() for row in given["rows"]]
    facts = {
        **versions,
        "missing_keys": sorted(map(str, missing)),
        "unexpected_keys": sorted(map(str, unexpected)),
    }
    np.savez(told, facts=json.dumps(facts), **{f"row_{i}": row for i, row in enumerate(logits)})


def _free_bytes() -> int | None:
    """Memory that a new process may take, of the host and of the container; None where the system does not tell."""
    free = []
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
        free.append(1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))))
    with contextlib.suppress(OSError, ValueError):  # "max": no limit
        limit, used = (int((_CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        free.append(limit - used)
    return min(free, default=None)


if __name__ == "__main__":
    _read(*sys.argv[1:])
