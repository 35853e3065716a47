"""Python programs in answers, run against the asserts of the references: pass@1 (Chen et al. 2021, arXiv 2107.03374).

In: predictions and references. Out: 0 or 1 for each row. The code of an answer is that of its last code fence, or all
of it. Each program runs in a process of its own, in a temporary folder that goes with it, without the environment's
variables, and is killed with its children when its time is over.

What is not prevented: it reads every file that you may read, and reaches services whose socket is a file, such as
Docker's. Code that means to cheat can tell that it passed, for the
asserts run in its own process. Memory is limited for each process and disk for each file (64 MiB), not for all
of them together; the number of processes is not limited. Where the kernel gives no namespaces (macOS, many containers),
it also has the network, can write wherever you may, can send signals to your other processes, and on macOS can leave
processes behind that left its group; the notes of the result say so. Run it in a container or a virtual machine
without secrets.
"""

import collections
import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence

from jax_sft.evaluate.metrics import confined
from jax_sft.evaluate.metrics.result import Measured

_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[^\n`]*\n(.*?)(?:^[ \t]*\1[`~]*[ \t]*$|\Z)", re.DOTALL | re.MULTILINE)
SPARE = 30.0  # seconds beyond its own that the confined process gets to start and to clean up
LEAST_MEMORY_MB = 64  # Python alone needs about 30
DENIED = {
    "network": "the network was not kept from the code",
    "processes": "your other processes were not kept from the code's signals",
    "files": "files outside its folder were not kept from the code's writing",
}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a program passed its asserts, and else why not; what was kept from it: network, processes, files."""

    passed: bool
    reason: str
    kept: frozenset[str] = frozenset()


def pass_at_1(
    predictions: Sequence[str],
    references: Sequence[str],
    *,
    unsafe: bool = False,
    seconds: float = 10.0,
    memory_mb: int = 1024,
) -> Measured:
    """1 where the program of the answer passes the asserts of the reference.

    `seconds` of the clock for each program; `memory_mb` MiB of address space for each of its processes, where the
    system limits that (macOS does not).

    Raises:
        ValueError: `unsafe` is not True; a limit is too small; a reference without an assert or that is no Python; the
            system is Windows.
        OSError: the process cannot be started.
    """
    if unsafe is not True:
        raise ValueError(
            "pass_at_1 runs code that a model wrote, on this computer and as you: it can read your files, and more "
            "where the system does not confine it; pass unsafe=True, best in a container without secrets"
        )
    if os.name != "posix":
        raise ValueError("pass_at_1 needs Linux or macOS, for the limits it sets; run it in WSL or in a container")
    if seconds <= 0 or memory_mb < LEAST_MEMORY_MB:
        raise ValueError(
            f"pass_at_1: seconds = {seconds} must be above 0, and memory_mb = {memory_mb} at least {LEAST_MEMORY_MB}"
        )
    for row, reference in enumerate(references, 1):
        _check_tests(reference, row)
    verdicts = [
        run_program(program_of(p), r, seconds=seconds, memory_mb=memory_mb)
        for p, r in zip(predictions, references, strict=True)
    ]
    return Measured.rows([v.passed for v in verdicts], notes=_notes(verdicts))


def program_of(answer: str) -> str:
    """The last code fence of an answer, closed or not; all of the answer if it has none."""
    fences = list(_FENCE.finditer(answer))
    return fences[-1][2] if fences else answer


def run_program(code: str, tests: str, *, seconds: float, memory_mb: int) -> Verdict:
    """Run a program, then its tests, in a process of its own."""
    asked = json.dumps({"code": code, "tests": tests, "seconds": seconds, "bytes": memory_mb * 2**20})
    with tempfile.TemporaryDirectory(prefix="pass-at-1-", ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", str(pathlib.Path(confined.__file__).resolve())],
            cwd=folder,
            env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            start_new_session=True,
        )
        try:
            said, complaint = process.communicate(asked, timeout=seconds + SPARE)
        except BaseException as error:  # Ctrl-C too: nothing of it may stay behind
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            if isinstance(error, subprocess.TimeoutExpired):
                return Verdict(False, "time")
            raise
    if process.returncode < 0:  # where nothing keeps it from that
        return Verdict(False, "killed the process that watches it")
    try:
        told = json.loads(said)
    except ValueError as error:
        raise OSError(f"the process that confines a program failed: {complaint.strip()[-300:] or 'no word'}") from error
    return Verdict(told["passed"], told["reason"], frozenset(told["kept"]))


def _check_tests(reference: str, row: int) -> None:
    try:
        with warnings.catch_warnings(action="ignore"):
            compile(reference, f"row {row}", "exec")
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"row {row}: the reference is no Python ({error}); give it asserts") from error
    if not re.search(r"\bassert\b|\braise\b|\bcheck\(|\.assert", reference):
        raise ValueError(f"row {row}: the reference has no assert, so every program passes; give it asserts")


def _notes(verdicts: Sequence[Verdict]) -> tuple[str, ...]:
    counted = collections.Counter(v.reason.partition(":")[0] for v in verdicts)
    kept = frozenset.intersection(*(v.kept for v in verdicts))
    denied = [words for name, words in DENIED.items() if name not in kept]
    return (", ".join(f"{reason} {count}" for reason, count in counted.most_common()), *denied)
