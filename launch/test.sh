#!/usr/bin/env bash
# Runs the tests in an environment of their own: bash launch/test.sh [pytest arguments]
#
# Needs Python 3.11 or newer with venv; PYTHON=python3.12 chooses another one than python3.
# Slow tests, and those that need the model of the quickstart, run with CI=true. EXTRAS=oracle adds torch, trl and peft,
# which some tests compare with. JAX_PLATFORMS=cuda bash launch/test.sh -m gpu runs those that need a GPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh

ensure_venv test
marks='not gpu and not tpu and not slow'
if [[ -n ${CI:-} ]]; then
    ensure_smollm2
    marks='not gpu and not tpu'
fi
processes=auto # one for each core: much of a test's time is XLA compiling on one of them
if [[ ${JAX_PLATFORMS:-cpu} != cpu ]]; then
    processes=0 # a GPU's memory is one process's
fi
exec "$PY" -m pytest -n "$processes" --maxprocesses 4 --dist worksteal -m "$marks" "$@"
