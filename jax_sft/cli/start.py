"""What the commands share: exit statuses, joining the other processes, starting the devices, loading a model.

In: flags. Out: a JAX that runs, or one sentence why it cannot.
"""

import argparse
import os
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jax_sft.assistant import Assistant

EXIT_OK, EXIT_USER_ERROR, EXIT_TRY_AGAIN = 0, 1, 75


def check_writable(*paths: str | None) -> None:
    """Before the work, not after it."""
    for path in paths:
        if path is None:
            continue
        place = pathlib.Path(path).absolute()
        if not place.parent.is_dir():
            raise ValueError(f"{path}: the folder {pathlib.Path(path).parent} does not exist; make it first")
        if place.is_dir():
            raise ValueError(f"{path or '.'}: is a folder, where a file is to be written; name a file in it")
        if not os.access(place if place.exists() else place.parent, os.W_OK):
            raise ValueError(f"{path}: cannot be written; name a file elsewhere, or change the permissions")


def start_distributed() -> None:
    """Join the other processes if JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say so."""
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if not address:
        return
    names = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    missing = [name for name in names if not os.environ.get(name, "").isdigit()]
    if missing:
        raise ValueError(f"JAX_COORDINATOR_ADDRESS is set, but {' and '.join(missing)} is not a number; set all three")
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"JAX_COORDINATOR_ADDRESS = {address!r} must be host:port, the same on every process")
    import jax

    count, number = (int(os.environ[name]) for name in names)
    try:
        jax.distributed.initialize(address, num_processes=count, process_id=number)
    except RuntimeError as error:
        raise ValueError(
            f"process {number} of {count} could not join the others at {address}: {str(error).splitlines()[0]}; start "
            "all of them, with one address and each its own JAX_PROCESS_ID"
        ) from error


def start_devices() -> None:
    """Start JAX, which may have been told to use what is not there."""
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # jaxlib without the platform fails with a bare assert
        asked = f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}"
        reason = (str(error).splitlines() or ["this jaxlib has no such platform"])[0]
        raise ValueError(
            f"{asked}: JAX cannot start: {reason}; install jax-sft[cuda12], [cuda13] or [tpu] for it, or unset "
            "JAX_PLATFORMS"
        ) from error
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
        # A program that XLA:CPU reads back from the cache may run its collectives in another order in each process, and
        # all wait for ever.
        jax.config.update("jax_enable_compilation_cache", False)


def load(
    options: argparse.Namespace, model: str, *, chat_template: str | None, adapters: Sequence[str] = ()
) -> "Assistant":
    """A model of the flags of `eval` and `chat`."""
    start_devices()
    from jax_sft.assistant import load_assistant

    return load_assistant(
        model, revision=options.revision, dtype=options.dtype, chat_template=chat_template, adapters=adapters
    )
