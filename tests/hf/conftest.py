"""What tests of several processes share."""

import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Callable

import pytest

# Of a program, a folder and a number of devices: what each of two processes prints.
TwoProcesses = Callable[[str, pathlib.Path, int], list[str]]


@pytest.fixture
def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def two_processes(free_port: int) -> TwoProcesses:
    """Run a program in two processes at once, which get rank, a port to meet at, and a folder; both must end well."""

    def run(program: str, folder: pathlib.Path, devices: int) -> list[str]:
        both = [
            subprocess.Popen(
                [sys.executable, "-c", program, str(rank), str(free_port), str(folder)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ
                | {"PYTHONPATH": ".", "JAX_ENABLE_COMPILATION_CACHE": "false", "JAX_NUM_CPU_DEVICES": str(devices)},
            )
            for rank in range(2)
        ]
        said = [p.communicate(timeout=120) for p in both]
        assert [p.returncode for p in both] == [0, 0], said
        return [out for out, _ in said]

    return run
