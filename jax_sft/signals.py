"""Ctrl-C and SIGTERM: waited with until the end of a step, or passed on to all processes.

In: signals of the operating system. Out: a flag that the training loop reads each step, or an exception.
"""

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import Any, Self

import jax
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
        together = jax.distributed.is_initialized()
        with contextlib.suppress(ValueError):  # not the main thread: the host program keeps its own handlers
            for number in (signal.SIGINT,) if together else (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._pass_on if together else self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def collected(self) -> Iterator[None]:
        """Inside, a signal only sets `received`."""
        self._collects = True
        try:
            yield
        finally:
            self._collects = False

    def _on_signal(self, number: int, _: Any) -> None:
        if not self._collects:
            raise StoppedError
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True
        tqdm.write("\nstopping: saving after this step (Ctrl-C again ends at once)")

    def _pass_on(self, number: int, _: Any) -> None:
        del number
        os.kill(os.getpid(), signal.SIGTERM)
