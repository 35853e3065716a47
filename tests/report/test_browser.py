"""The page in a real browser, where there is one: Chromium without a window. Everything of it is local."""

import functools
import html
import html.parser
import http.server
import pathlib
import re
import shutil
import subprocess
import threading

import pytest

from tests.report.sets import byte_level, ids_of, make_set, sequence_of
from tests.report.test_page import HOSTILE, hostile_page, page_of

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")
pytestmark = pytest.mark.skipif(
    not BROWSER, reason="NO BROWSER: the page is not looked at; install chromium to have it checked"
)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--enable-logging=stderr"]
FLAGS += ["--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"]
POLICY = re.compile('<meta http-equiv="Content-Security-Policy"[^>]*>')


class Dom(html.parser.HTMLParser):
    """The tags of a page as the browser has built it."""

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def named(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]


def browse(address, folder):
    """(the page as the browser has built it, what it wrote to its console)."""
    command = [BROWSER, *FLAGS, f"--user-data-dir={folder}", "--virtual-time-budget=2000", "--dump-dom", address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, re.findall(r"CONSOLE.*", done.stderr)


@functools.cache
def built(folder: pathlib.Path):
    """The page of hostile data."""
    (folder / "page.html").write_text(hostile_page(), encoding="utf-8")
    return browse((folder / "page.html").as_uri(), folder / "profile")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("browser")


@pytest.fixture
def server():
    """Pages by path, and the paths that were asked for."""
    pages, asked = {}, []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            body = pages.get(self.path, "").encode()
            self.send_response(200 if body else 404)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", pages, asked
        running.shutdown()
        thread.join()


def test_a_browser_builds_the_whole_page_of_hostile_data(folder):
    text, _ = built(folder)
    dom = Dom(text)
    sections = ["account", "run", "lengths", "sources", "packing", "validation", "card", "tokens"]
    assert [attributes["id"] for attributes in dom.named("section")] == sections
    assert len(dom.named("svg")) == 9
    assert len(dom.named("details")) == 6
    assert [attributes["data-source"][:20] for attributes in dom.named("article")] == [HOSTILE[:20]]
    assert len(dom.named("script")) == len(dom.named("style")) == 1
    assert not [name for name in ("img", "iframe", "link", "object") if dom.named(name)]
    tokens = re.findall(r'<i class="\w+" data-i=[^>]*>(.*?)</i>', text, re.DOTALL)
    assert html.unescape("".join(tokens)).startswith(HOSTILE[:60])


def test_the_page_s_own_script_runs_in_a_browser(folder):
    text, _ = built(folder)
    assert re.search(r"<output[^>]*>1 of 1 shown</output>", text)


def test_sequences_are_found_by_source_and_by_text(tmp_path):
    tokenizer, sequences = byte_level(), []
    for source, text in (("a", "The Train"), ("a", "a boat"), ("b", "a train"), ("c", "")):
        ids = ids_of(tokenizer, f"⟨im_start⟩{text}⟨im_end⟩")
        sequences.append(sequence_of(ids, [0.0] + [1.0] * (len(ids) - 1), source=source))
    page = POLICY.sub("", page_of(make_set(sequences), tokenizer))  # or the script that follows would not run
    ask = """<script>
        const form = document.getElementById("filter"), log = [];
        const [select, input, output] = form.querySelectorAll("select, input, output");
        for (const [source, text] of [["", ""], ["a", ""], ["", "TRAIN"], ["a", "train"], ["c", "train"]]) {
          select.value = source; input.value = text;
          input.dispatchEvent(new Event("input", {bubbles: true}));
          const shown = [...document.querySelectorAll("article")].map(one => one.hidden ? 0 : 1);
          log.push(shown.join("") + " " + output.textContent);
        }
        document.title = [[...select.options].map(one => one.value).join("+"), form.hidden, ...log].join("; ");
        </script></body>"""
    (tmp_path / "page.html").write_text(page.replace("</body>", ask), encoding="utf-8")
    dom, _ = browse((tmp_path / "page.html").as_uri(), tmp_path / "profile")
    (title,) = re.findall("<head>.*?<title>(.*?)</title>", dom, re.DOTALL)
    assert title.split("; ") == [
        "+a+b+c",
        "false",
        "1111 4 of 4 shown",
        "1100 2 of 4 shown",
        "1010 2 of 4 shown",
        "1000 1 of 4 shown",
        "0000 0 of 4 shown",
    ]


def test_a_browser_has_nothing_to_complain_about(folder):
    _, console = built(folder)
    assert console == []


def test_a_browser_fetches_nothing_but_the_page(server, tmp_path):
    address, pages, asked = server
    page = hostile_page().replace("https://evil.example", f"{address}/evil")
    loading = f'<img src="{address}/evil/y.png"></body>'
    pages["/page"] = page
    pages["/closed"] = page.replace("</body>", loading)
    pages["/open"] = POLICY.sub("", page.replace("</body>", loading))
    seen = {}
    for path in pages:
        browse(address + path, tmp_path / "profile")
        seen[path] = [other for other in asked if other != "/favicon.ico"]
        asked.clear()
    assert seen["/page"] == ["/page"]
    assert seen["/closed"] == ["/closed"]  # the policy holds even where markup got in
    assert seen["/open"] == ["/open", "/evil/y.png"]  # so this server would have seen it


def test_a_browser_runs_no_script_but_the_page_s_own(tmp_path):
    page = hostile_page().replace("</body>", "<script>document.title = 'taken'</script></body>")
    for name, text in (("closed", page), ("open", POLICY.sub("", page))):
        (tmp_path / f"{name}.html").write_text(text, encoding="utf-8")
        dom, console = browse((tmp_path / f"{name}.html").as_uri(), tmp_path / "profile")
        assert ("<title>taken</title>" in dom) == (name == "open")
        assert any("Content Security Policy" in line for line in console) == (name == "closed")
