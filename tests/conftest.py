"""The climate of the tests: eight CPU devices, strict promotion, no network, nothing downloaded.

Everything is an environment variable, set before jax starts, so that processes which tests start get the same
climate, and so that tests of `data/` can prove that jax was never imported.
"""

import gc
import os
import pathlib
import sys
from collections.abc import Iterator

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent

CLIMATE = {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "8",
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",  # bf16 + f32 without a cast is an error, not a silent float32
    "JAX_NUMPY_RANK_PROMOTION": "raise",  # BT + BTD without an explicit axis is an error
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",  # its threads do not survive a fork
    "WANDB_MODE": "disabled",
    "CUDA_VISIBLE_DEVICES": "",
}

# A GPU or TPU run names its platform: JAX_PLATFORMS=cuda pytest -m gpu
if os.environ.get("JAX_PLATFORMS", "cpu") != "cpu":
    for _name in ("JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES", "CUDA_VISIBLE_DEVICES"):
        CLIMATE.pop(_name)

os.environ.update(CLIMATE)

# A second run finds what the first one compiled. The continuous check runs once, and jaxlib once crashed there while it
# wrote a program into the cache.
if not os.environ.get("CI"):
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(REPOSITORY / ".cache" / "jax"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")


@pytest.fixture(autouse=True, scope="module")
def _compiled_programs_end_with_their_file() -> Iterator[None]:
    """Each program that XLA compiles on a CPU keeps tens of memory maps; a process may have 65,530 (vm.max_map_count).

    Past that, jaxlib crashes in whatever it does next: after 40 minutes of tests, at another place each time.
    """
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
        gc.collect()
