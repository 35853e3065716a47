"""The pages of runs in a real browser, where there is one: Chromium without a window. Everything of it is local."""

import html
import json
import pathlib
import re
import shutil
import subprocess

import pytest

from jax_sft.report.run import comparison_page, read_run, run_page
from tests.report.run.workdirs import HOSTILE, make_run, put_lines

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")
pytestmark = pytest.mark.skipif(
    not BROWSER, reason="NO BROWSER: the pages of runs are not looked at; install chromium to have them checked"
)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--enable-logging=stderr"]
FLAGS += ["--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND", "--allow-file-access-from-files"]
POLICY = re.compile('<meta http-equiv="Content-Security-Policy"[^>]*>')


def browse(page: pathlib.Path):
    """(the page as the browser has built it, what it wrote to its console)."""
    profile = f"--user-data-dir={page.parent / 'profile'}"
    command = [BROWSER, *FLAGS, profile, "--virtual-time-budget=2000", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, re.findall(r"CONSOLE.*", done.stderr)


def answer(folder: pathlib.Path, page: str, script: str) -> str:
    """What the script makes the title; without the page's policy, which would not let it run."""
    path = folder / "asked.html"
    path.write_text(POLICY.sub("", page).replace("</body>", f"<script>{{{script}}}</script></body>"), encoding="utf-8")
    text, _ = browse(path)
    return html.unescape(re.findall("<title>(.*?)</title>", text, re.DOTALL)[0])


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    folder_a = make_run(folder / "a", manifest={"command": HOSTILE}, **{"data.train": ["w" * 300]})
    rows = [{"step": s, "prompt": "p" * 900, "answer": "a" * 900, "tokens": 1, "stopped": True} for s in (0, 40)]
    with (folder_a / "samples.jsonl").open("a") as file:  # words that no line holds
        file.writelines(json.dumps(row) + "\n" for row in rows)
    put_lines(folder_a / "alarms.jsonl", [{"step": 9, "kind": "k" * 99, "level": "stop", "text": "t" * 300}])
    a = read_run(folder_a)
    b = read_run(make_run(folder / "b", skill=0.5, **{"optim.lr": 3e-4}))
    return {"one": run_page(a), "two": comparison_page(a, b)}


@pytest.mark.parametrize("name", ["one", "two"])
def test_a_page_opens_from_a_file_without_a_complaint_or_a_request(pages, name, tmp_path):
    (tmp_path / "page.html").write_text(pages[name], encoding="utf-8")
    text, console = browse(tmp_path / "page.html")
    assert console == []  # a request that the policy blocks is told there, too
    assert re.search(r"<output[^>]*>\d+ of \d+ shown</output>", text)  # so its script ran
    assert "<img" not in text and text.count("<script") == 1
    asked = answer(tmp_path, pages[name], "document.title = performance.getEntriesByType('resource').length;")
    assert asked == "0"


def test_a_search_and_two_choices_narrow_the_answers(pages, tmp_path):
    script = """
        const log = [];
        for (const [k, c, t] of [["", "", ""], ["rules", "", ""], ["", "better", ""], ["", "", "MOSS"],
                                 ["probes", "", "(7)"], ["", "", "gnp.exe"], ["", "", "no such words"]]) {
          const [kind, change, input] = document.querySelectorAll("#filter select, #filter input");
          kind.value = k; change.value = c; input.value = t;
          input.dispatchEvent(new Event("input", {bubbles: true}));
          const seen = [...document.querySelectorAll(".pair")].filter(one => one.getBoundingClientRect().height > 0);
          log.push(seen.length);
        }
        document.title = log.join(" ");"""
    every, rules, better, moss, seven, hostile, nothing = map(int, answer(tmp_path, pages["one"], script).split())
    assert (every, rules, seven, hostile, nothing) == (122, 40, 1, 1, 0)
    assert 0 < better < every and 0 < moss < every


@pytest.mark.parametrize("name", ["one", "two"])
def test_a_phone_does_not_scroll_sideways(pages, name, tmp_path):
    (tmp_path / "page.html").write_text(pages[name], encoding="utf-8")
    frame = '<body><iframe src="page.html" style="width:380px;height:800px;border:0"></iframe></body>'
    script = """
        const frame = document.querySelector("iframe");
        frame.onload = () => {
          const inside = frame.contentDocument;
          for (const details of inside.querySelectorAll("details")) details.open = true;
          document.title = frame.contentWindow.innerWidth + " " + inside.documentElement.scrollWidth;
        };"""
    width, needed = map(int, answer(tmp_path, f"<head><title></title></head>{frame}", script).split())
    assert width == 380 and needed <= width


def test_values_are_told_under_the_pointer_and_by_the_arrow_keys(pages, tmp_path):
    script = """
        const figure = document.querySelector("[data-plot]"), area = figure.querySelector(".area");
        const tip = document.getElementById("tip"), box = area.getBoundingClientRect(), log = [];
        area.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + box.width / 2, clientY: box.top + 5}));
        log.push(tip.textContent);
        for (const key of ["End", "ArrowLeft", "Home"]) {
          figure.dispatchEvent(new KeyboardEvent("keydown", {key}));
          log.push(tip.textContent);
        }
        figure.dispatchEvent(new KeyboardEvent("keydown", {key: "Escape"}));
        document.title = [...log.map(text => text.replaceAll("\\n", " ")), tip.style.display].join("; ");"""
    middle, end, before, home, display = answer(tmp_path, pages["one"], script).split("; ")
    assert re.fullmatch(r"step 20 training: [\d.]+ validation: [\d.]+", middle)
    assert end.startswith("step 40 ") and re.fullmatch(r"step 39 training: [\d.]+", before)
    assert home == "step 0 validation: 2.85" and display == "none"
