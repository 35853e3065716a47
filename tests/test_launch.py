"""What launch/venv.sh says while pip is at work: on a terminal how far a large download is, elsewhere nothing."""

import os
import pathlib
import pty
import subprocess

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
PIP = """#!/usr/bin/env bash
if [[ $* == *--help* ]]; then exit 0; fi
[[ $* == *"--progress-bar $BAR "* ]] || exit 9
echo "Collecting jaxlib==0.10.2 (from jax)"
echo "  Downloading https://index/jaxlib-0.10.2-cp311.whl (181.4 MB)"
if [[ $BAR == raw ]]; then printf 'Progress %s of 181400000\\n' 0 90700000 181400000; fi
echo "Installing collected packages: jaxlib"
exit $STATUS
"""
INSTALL = "set -euo pipefail; source launch/venv.sh; VENV=$PLACE PY=$PLACE/pip PINS=/dev/null; pip_install jaxlib"


def install(place, *, terminal, status=0):
    """Exit status and what was said, with a pip that is none."""
    (place / "pip").write_text(PIP)
    (place / "pip").chmod(0o755)
    ours, theirs = pty.openpty()
    environment = {**os.environ, "PLACE": str(place), "BAR": "raw" if terminal else "off", "STATUS": str(status)}
    done = subprocess.run(
        ["bash", "-c", INSTALL],
        cwd=REPOSITORY,
        env=environment,
        stdout=theirs if terminal else subprocess.PIPE,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(theirs)
    said = os.read(ours, 65536) if terminal else done.stdout
    os.close(ours)
    return done.returncode, said.decode(), done.stderr.decode()


def test_a_terminal_sees_how_far_the_download_of_a_large_package_is(tmp_path):
    status, said, error = install(tmp_path, terminal=True)
    assert (status, error) == (0, "")
    lines = said.split("\r")
    assert any("  1 jaxlib-0.10.2-cp311.whl (181.4 MB)" in line and line.endswith("   90 of  181 MB") for line in lines)
    assert not lines[-2].strip()  # wiped in the end
    assert "Progress" not in (tmp_path / "install.log").read_text()


def test_without_a_terminal_nothing_is_said_and_the_log_holds_it(tmp_path):
    assert install(tmp_path, terminal=False) == (0, "", "")
    assert "Collecting jaxlib" in (tmp_path / "install.log").read_text()


@pytest.mark.parametrize("terminal", [False, True])
def test_an_installation_that_fails_ends_with_the_log(tmp_path, terminal):
    status, _, error = install(tmp_path, terminal=terminal, status=1)
    assert status == 1
    assert "Installing collected packages" in error and f"the whole log is {tmp_path}/install.log" in error
