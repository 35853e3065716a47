"""A full disk: how it is known, the sentence that says so, and what others say of it besides.

In: an error. Out: one sentence that names the file or folder and the way out. Orbax and TensorStore print a page of
tracebacks for each of their threads that met the full disk; one sentence is enough.
"""

import contextlib
import errno
import logging
import os
import pathlib
import secrets
import sys
from collections.abc import Iterator
from typing import Any, TextIO

_FULL = (errno.ENOSPC, errno.EDQUOT)
_WORDS = ("no space left", "disk quota exceeded")


def is_full(error: BaseException | None) -> bool:
    """Whether the operating system or TensorStore (which gives only text) ran out of space."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if any(words in str(error).lower() for words in _WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def told_if_full(*places: str | os.PathLike[str]) -> Iterator[None]:
    """Say of an error of the operating system that a disk is full, and where: `places`, unless it names a file itself.

    Raises:
        OSError: the disk is full, and nobody has said more of it yet.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        place = error.filename or " or ".join(str(place) for place in places) or "a file"
        raise OSError(
            f"{place}: the disk is full ({error.strerror}); free some space, or name a place on another disk, and "
            "start the same command again"
        ) from error


@contextlib.contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[TextIO]:
    """A UTF-8 file that is there when it is whole; until then an older one stays.

    What is no Unicode, half a surrogate pair, becomes the escape that JSON has for it.

    Raises:
        OSError: it cannot be written, or the disk is full.
    """
    path = pathlib.Path(path)
    partial = path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")
    try:
        with told_if_full(path), partial.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def leave_the_full_disk_to_us() -> None:
    """Keep the tracebacks of Orbax's and TensorStore's threads off the terminal where a full disk is their cause."""
    if _STRAY in logging.getLogger("absl").filters:
        return
    for name in ("absl", "asyncio"):  # a task that nobody waits for any longer is told of by asyncio
        logging.getLogger(name).addFilter(_STRAY)
    before = sys.unraisablehook

    def hook(told: Any) -> None:
        # TensorStore wakes up the event loop that the first failed write has closed.
        if (
            told.object is None
            and isinstance(told.exc_value, RuntimeError)
            and "Event loop is closed" in str(told.exc_value)
        ):
            return
        before(told)

    sys.unraisablehook = hook


class _OfAFullDisk(logging.Filter):
    """Lets through what is not of a full disk, nor of the unfinished save that one left behind."""

    def __init__(self) -> None:
        super().__init__()
        self._met = False

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
        said = f"{record.getMessage()} {error or ''}"
        if is_full(error) or any(words in said.lower() for words in _WORDS):
            self._met = True
            return False
        # A thread that went on after the save it worked for had failed and was cleared away.
        is_late = isinstance(error, FileNotFoundError) or self._met
        return not (is_late and ".orbax-checkpoint-tmp" in said)


_STRAY = _OfAFullDisk()
