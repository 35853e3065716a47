"""What is said of long work that cannot say how far it is: nothing of short work, the seconds of long work, once."""

import re
import time

import pytest

from jax_sft import progress
from jax_sft.progress import stage


@pytest.fixture
def hurried(monkeypatch):
    """As if a second were a hundredth of one."""
    monkeypatch.setattr(progress, "_DELAY_SECONDS", 0.01)
    monkeypatch.setattr(progress, "_EVERY_SECONDS", 0.01)


def test_a_stage_that_takes_long_is_named_with_its_seconds(hurried, capsys):
    with stage("asking an oracle"):
        time.sleep(0.3)
    said = capsys.readouterr()
    assert re.search(r"asking an oracle: 00:00", said.err)
    assert not said.out


def test_a_stage_that_is_over_at_once_is_not_told(capsys):
    with stage("asking an oracle"):
        pass
    assert not capsys.readouterr().err


def test_the_first_process_tells_for_all(hurried, capsys, monkeypatch):
    monkeypatch.setattr(progress.jax, "process_index", lambda: 1)
    with stage("asking an oracle"):
        time.sleep(0.1)
    assert not capsys.readouterr().err


def test_a_stage_that_fails_stops_counting(hurried, capsys):
    with pytest.raises(ValueError, match="no"), stage("asking an oracle"):
        raise ValueError("no")
    capsys.readouterr()
    time.sleep(0.1)
    assert not capsys.readouterr().err
