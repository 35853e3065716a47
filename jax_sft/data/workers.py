"""Conversations become sequences, in this process or in workers, in the order they came in.

In: conversations and a chat template. Out: chunks of sequences, each with the account of its conversations. Workers
import no jax, and leave when the process that started them does. They are copies of it (fork) where it has nothing that
cannot be copied, and else are started afresh (spawn), which takes each a second of imports.
"""

import collections
import concurrent.futures
import contextlib
import itertools
import multiprocessing
import os
import signal
import sys
import threading
import time
import types
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Literal

from tqdm import TMonitor

from jax_sft.config import DataConfig
from jax_sft.data.chat import ChatTemplate, to_sequences
from jax_sft.data.conversation import Account, Conversation, DataError, Sequence

CHUNK = 64  # conversations a worker gets at once
AHEAD = 4  # chunks that wait for each worker
# Of work in this process before workers are started unasked, by how they start.
ALONE_SECONDS = {"fork": 0.5, "spawn": 3.0}
MOST_UNASKED = 8  # more would wait for the process that reads

_mine: tuple[ChatTemplate, DataConfig]  # of a worker, set when it starts


def tokenized(
    conversations: Iterable[Conversation], template: ChatTemplate, config: DataConfig
) -> Generator[tuple[list[Sequence], Account], None, None]:
    """Chunks in order, whatever the number of workers.

    Where the config leaves the number open, this process begins alone, and what it has not done after `ALONE_SECONDS`
    goes to a worker for each core: a small set never waits for workers to start.

    Raises:
        DataError: of `to_sequences`; a worker died.
    """
    chunks = _chunks(conversations)
    number = _unasked() if config.workers is None else config.workers
    begun, alone = time.monotonic(), ALONE_SECONDS[start_method()]
    while not number or (config.workers is None and time.monotonic() - begun < alone):
        chunk = next(chunks, None)
        if chunk is None:
            return
        yield _tokenize_chunk(chunk, template, config)
    with workers(template, config, number) as pool:
        pending: collections.deque[concurrent.futures.Future[tuple[list[Sequence], Account]]] = collections.deque()
        try:
            for chunk in chunks:
                pending.append(pool.submit(_work, chunk))
                if len(pending) > AHEAD * number:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise DataError(
                f"data.workers = {number}: a worker died while it tokenised, for lack of memory perhaps; "
                "set a smaller number"
            ) from error
        finally:
            for future in pending:
                future.cancel()


def _unasked() -> int:
    """A worker for each core that this process may use; 0 where there is but one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_UNASKED) if cores > 1 else 0


def start_method() -> Literal["fork", "spawn"]:
    """Fork on Linux, where no thread of jax or of Python could be caught in the middle of something."""
    others = [t for t in threading.enumerate() if t is not threading.current_thread() and not isinstance(t, TMonitor)]
    return "spawn" if sys.platform != "linux" or _jax_has_started() or others else "fork"


def _jax_has_started() -> bool:
    """Whether jax holds its devices, with threads of its own; merely imported it has none."""
    jax = sys.modules.get("jax")
    bridge = sys.modules.get("jax._src.xla_bridge")  # jax has no public way to ask without starting
    if jax is None or bridge is None:
        return False
    return jax.distributed.is_initialized() or getattr(bridge, "backends_are_initialized", lambda: True)()


@contextlib.contextmanager
def workers(
    template: ChatTemplate, config: DataConfig, number: int
) -> Iterator[concurrent.futures.ProcessPoolExecutor]:
    """A pool of `number` processes that hold the template; they start when they get work."""
    with (
        _main_hidden(),
        warnings.catch_warnings(action="ignore", category=DeprecationWarning),  # Python 3.12 on any fork with threads
        concurrent.futures.ProcessPoolExecutor(
            number,
            mp_context=multiprocessing.get_context(start_method()),
            initializer=_start,
            initargs=(template, config),
        ) as pool,
    ):
        yield pool


def started(setup: Callable[..., None], *arguments: Any) -> concurrent.futures.ProcessPoolExecutor:
    """One process, begun now, that has called `setup(*arguments)` and leaves with this one."""
    with _main_hidden():
        pool = concurrent.futures.ProcessPoolExecutor(
            1, mp_context=multiprocessing.get_context("spawn"), initializer=_set_up, initargs=(setup, arguments)
        )
        pool.submit(os.getpid)  # it is started by the first thing to do
    return pool


@contextlib.contextmanager
def _main_hidden() -> Iterator[None]:
    """A spawned process imports its parent's main module again: ours imports jax, a user's script would run twice."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _set_up(setup: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    setup(*arguments)
    _follow_parent()


def _start(template: ChatTemplate, config: DataConfig) -> None:
    global _mine
    _mine = template, config
    _follow_parent()


def _follow_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent alone decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a copy has the parent's handler, and must end when it is told to
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """Without this a worker whose parent was killed waits for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(chunk: list[Conversation]) -> tuple[list[Sequence], Account]:
    template, config = _mine
    return _tokenize_chunk(chunk, template, config)


def _tokenize_chunk(
    chunk: list[Conversation], template: ChatTemplate, config: DataConfig
) -> tuple[list[Sequence], Account]:
    account = Account()
    return [s for conversation in chunk for s in to_sequences(conversation, template, config, account)], account


def _chunks(conversations: Iterable[Conversation]) -> Iterator[list[Conversation]]:
    stream = iter(conversations)
    while chunk := list(itertools.islice(stream, CHUNK)):
        yield chunk
