"""A process of its own that runs one answer and its asserts within limits. `programs` starts it as a script.

In: JSON on stdin: code, tests, seconds, bytes. Out: JSON on stdout: passed, reason, and what could be kept from the
code. On Linux the code gets namespaces of its own (no network, no other processes, no file to write but those of its
folder), which needs no root but a kernel that allows them; what it does not allow is left out and not claimed.
"""

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable

NEW_USER, NEW_PIDS, NEW_NETWORK, NEW_MOUNTS = 0x10000000, 0x20000000, 0x40000000, 0x00020000  # linux/sched.h
BIND, RECURSIVE, PRIVATE = 0x1000, 0x4000, 0x40000  # linux/mount.h
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, READ_ONLY = 442, -100, 0x8000, 1
DEATH_SIGNAL, SUBREAPER, NO_NEW_PRIVILEGES = 1, 36, 38  # linux/prctl.h
CAPABILITIES = 0x20080522  # linux/capability.h, version 3
FILE_BYTES = 64 * 2**20
LONGEST_REASON = 200
STEP = 0.005  # seconds between looks at what is left to kill


def main() -> None:
    """Confine, run, kill what is left, tell."""
    asked = json.load(sys.stdin)
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
    if libc is not None:
        libc.prctl(DEATH_SIGNAL, signal.SIGKILL)
        libc.prctl(SUBREAPER, 1)
    kept = _confine(libc)
    reading, writing = os.pipe()
    worker = os.fork()
    if worker == 0:
        os.close(reading)
        if libc is not None:
            libc.prctl(DEATH_SIGNAL, signal.SIGKILL)
            _give_up_rights(libc)
        _work(asked, writing)
    os.close(writing)
    told = _wait(reading, asked["seconds"])
    _kill_all(worker)
    print(json.dumps(told | {"kept": kept}))


def _confine(libc: ctypes.CDLL | None) -> list[str]:
    """Leave the network, the other processes and the files behind, as far as the kernel lets us; what was left."""
    if libc is None:
        return []
    user, group = os.getuid(), os.getgid()
    if libc.unshare(NEW_USER | NEW_PIDS | NEW_NETWORK | NEW_MOUNTS):
        return []
    for name, line in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        # Without it the code sees itself as nobody, and is kept from as much.
        with contextlib.suppress(OSError), open(f"/proc/self/{name}", "w") as file:
            file.write(line)
    return ["network", "processes"] + (["files"] if _only_this_folder(libc) else [])


def _only_this_folder(libc: ctypes.CDLL) -> bool:
    """Make every file system read-only but the folder we are in."""
    here = os.getcwd().encode()
    if libc.mount(b"none", b"/", None, RECURSIVE | PRIVATE, None) or libc.mount(here, here, None, BIND, None):
        return False
    # struct mount_attr: what is set, what is cleared, propagation, user namespace (Linux 5.12)
    locked, open_again = (ctypes.c_uint64 * 4)(READ_ONLY, 0, 0, 0), (ctypes.c_uint64 * 4)(0, READ_ONLY, 0, 0)
    failed = libc.syscall(MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, locked, 32)
    failed = failed or libc.syscall(MOUNT_SETATTR, AT_FDCWD, here, 0, open_again, 32)
    os.chdir(here)  # what was the folder before lies under the mount
    return not failed


def _give_up_rights(libc: ctypes.CDLL) -> None:
    """Drop what the new namespaces gave, and what root has: with it the code could mount the files writable again."""
    libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    libc.capset((ctypes.c_uint32 * 2)(CAPABILITIES, 0), (ctypes.c_uint32 * 6)())


def _work(asked: dict, writing: int) -> None:
    """In the worker: run both texts, and tell how it went; never returns."""
    os.setpgid(0, 0)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
    with contextlib.suppress(ValueError, OSError):  # macOS has it in name only
        resource.setrlimit(resource.RLIMIT_AS, (asked["bytes"], asked["bytes"]))
    names = {"__name__": "answer", "__builtins__": __builtins__}
    told = {"passed": True, "reason": "passed"}
    try:
        for text in ("code", "tests"):
            exec(compile(asked[text], text, "exec"), names)
    except BaseException as error:  # noqa: BLE001  whatever the code raises, SystemExit too
        told = {"passed": False, "reason": _told(error)}
    os.write(writing, json.dumps(told).encode())
    os._exit(0)


def _told(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return "memory"
    name = type(error).__name__
    try:
        words = str(error).strip()
    except Exception:  # noqa: BLE001  an exception of the code's own making
        words = ""
    return (f"{name}: {words}" if words else name)[:LONGEST_REASON]


def _wait(reading: int, seconds: float) -> dict:
    """What the worker says, unless its time is over or it ends without a word."""
    end = time.monotonic() + seconds
    said = b""
    while (left := end - time.monotonic()) > 0:
        if not select.select([reading], [], [], left)[0]:
            break
        part = os.read(reading, 4096)
        said += part
        try:
            told = json.loads(said)
            return {"passed": told["passed"] is True, "reason": str(told["reason"])}
        except (ValueError, TypeError, KeyError, RecursionError):  # half a word, or one of the code's own
            if not part:
                return {"passed": False, "reason": "ended before its tests"}
    return {"passed": False, "reason": "time"}


def _kill_all(worker: int) -> None:
    """Kill the worker, its group, and all that lost its parent and so became a child of ours."""
    end = time.monotonic() + 5
    _kill(os.kill, worker)
    while time.monotonic() < end:
        _kill(os.killpg, worker)
        for child in _children():
            _kill(os.kill, child)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(STEP)


def _kill(kill: Callable[[int, int], None], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        kill(number, signal.SIGKILL)


def _children() -> list[int]:
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            return [int(number) for number in file.read().split()]
    except OSError:
        return []


if __name__ == "__main__":
    main()
