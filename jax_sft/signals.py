"""Ctrl-C and SIGTERM: waited with until the end of a step, or passed on to all processes.

In: signals of the operating system. Out: a flag that the training loop reads each step, or an exception.
Imports no jax, so that the door can listen before it starts what takes seconds.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any, Self

from tqdm import tqdm


class StoppedError(BaseException):
    """A signal came where there is nothing to save; like KeyboardInterrupt, no library may swallow it."""


class Signals:
    """SIGINT and SIGTERM: inside `collected()` they wait for the end of the step, elsewhere they stop the run at once.

    Under jax.distributed JAX listens to SIGTERM and lets all processes agree on a step; SIGINT is passed on as one.
    """

    def __init__(self) -> None:
        self.received = False
        self._collects = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        with contextlib.suppress(ValueError):  # not the main thread: the host program keeps its own handlers
            for number in (signal.SIGINT,) if _runs_together() else (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            if number == signal.SIGINT or not _runs_together():  # else it has become JAX's
                signal.signal(number, handler)

    def stop_if_received(self) -> None:
        """Raise what a signal raised before: an exception can be lost where Python cannot pass it on (in a callback).

        Raises:
            StoppedError: a signal was received.
        """
        if self.received:
            raise StoppedError

    @contextlib.contextmanager
    def collected(self) -> Iterator[None]:
        """Inside, a signal only sets `received`."""
        self._collects = True
        try:
            yield
        finally:
            self._collects = False

    def _on_signal(self, number: int, _: Any) -> None:
        if number == signal.SIGINT and _runs_together():
            os.kill(os.getpid(), signal.SIGTERM)
            return
        is_second, self.received = self.received, True
        if not self._collects:
            raise StoppedError
        if is_second and number == signal.SIGINT:
            raise KeyboardInterrupt
        tqdm.write("\nstopping: saving after this step (Ctrl-C again ends at once)")


def _runs_together() -> bool:
    """Whether this process is one of several; asks jax only if it is there already."""
    jax = sys.modules.get("jax")
    return jax is not None and hasattr(jax, "distributed") and jax.distributed.is_initialized()
