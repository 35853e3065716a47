"""A full disk is one sentence that names the file, and the only one."""

import errno
import logging

import pytest

from jax_sft import disk
from jax_sft.disk import is_full, leave_the_full_disk_to_us, told_if_full


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_with_the_place_and_the_way_out(code):
    said = r"a/b or c: the disk is full \(so\); free some space, or name a place on another"
    with pytest.raises(OSError, match=said), told_if_full("a/b", "c"):
        raise OSError(code, "so")


def test_the_file_that_the_error_names_is_the_place():
    with pytest.raises(OSError, match="x/y: the disk is full"), told_if_full("a"):
        raise OSError(errno.ENOSPC, "so", "x/y")


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "so"), OSError("said better"), ValueError("so")])
def test_what_is_no_full_disk_or_is_said_already_stays_as_it_is(error):
    with pytest.raises(type(error)) as caught, told_if_full("outer"), told_if_full("inner"):
        raise error
    assert caught.value is error


def test_the_innermost_place_is_told():
    with pytest.raises(OSError, match="^inner: the disk"), told_if_full("outer"), told_if_full("inner"):
        raise OSError(errno.ENOSPC, "so")


def test_a_full_disk_is_known_by_number_by_words_and_by_what_it_caused():
    caused = KeyError("x")
    caused.__cause__ = ValueError("RESOURCE_EXHAUSTED: write failed: No space left on device")
    assert is_full(caused)
    assert is_full(OSError(errno.EDQUOT, "x"))
    assert not is_full(OSError(errno.EACCES, "x")) and not is_full(ValueError("RESOURCE_EXHAUSTED"))


def test_a_thread_of_orbax_tells_of_everything_but_a_full_disk_and_its_leavings(caplog, monkeypatch):
    monkeypatch.setattr(disk._STRAY, "_met", False)
    leave_the_full_disk_to_us()
    leave_the_full_disk_to_us()
    absl, unfinished = logging.getLogger("absl"), "00000002.orbax-checkpoint-tmp/params"
    full, denied = OSError(errno.ENOSPC, "full"), OSError(errno.EACCES, "denied", unfinished)
    absl.error("a thread raised", exc_info=FileNotFoundError(errno.ENOENT, "gone", unfinished))
    absl.error("a thread raised", exc_info=denied)
    absl.warning("%s already exists", unfinished)
    assert len(caplog.records) == 2  # no disk was full so far
    absl.error("a thread raised", exc_info=full)
    absl.error("a thread said: No space left on device")
    logging.getLogger("asyncio").error("Task exception was never retrieved", exc_info=full)
    absl.error("a thread raised", exc_info=denied)
    absl.warning("%s already exists", unfinished)
    assert len(caplog.records) == 2
    absl.error("a thread raised", exc_info=OSError(errno.EACCES, "denied", "00000001/params"))
    assert len(caplog.records) == 3
