"""Models from the hub and to it, against a server here that answers as the hub does; clients are other processes."""

import base64
import hashlib
import json
import os
import pathlib
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from jax_sft.hf.folder import CERTIFICATE, MARK
from tests.hf.models import write_folder

TOKEN = "hf_goodtoken"


class Hub(ThreadingHTTPServer):
    """The endpoints that snapshot_download and upload_folder of huggingface_hub use, for models of small files."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, Any]] = {}
        self.asked: list[tuple[str, str, str | None]] = []  # method, path, token
        self.readers_only = {"hf_reader"}

    def put(self, name: str, files: dict[str, bytes], *, branch: str = "main", **about: Any) -> str:
        """Commit the files that a repository then has."""
        repo = self.repos.setdefault(name, {"commits": {}, "refs": {}, "gated": False, "private": False, "cut": False})
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        repo["commits"][commit], repo["refs"][branch] = files, commit
        repo.update(about)
        return commit

    def files(self, name: str) -> dict[str, bytes]:
        repo = self.repos[name]
        return repo["commits"][repo["refs"]["main"]]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.heard()
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            name, what, revision = found.groups()
            if (commit := self.commit(name, revision or "main")) is None:
                return
            repo = self.server.repos[name]
            files = repo["commits"][commit]
            about = {
                "id": name,
                "sha": commit,
                "private": repo["private"],
                "siblings": [{"rfilename": f} for f in files],
            }
            listed = [{"type": "file", "path": f, "size": len(x), "oid": sha(x)} for f, x in files.items()]
            self.say(200, listed if what == "tree" else about, cut=repo["cut"])
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            name, revision, file = found.groups()
            if (commit := self.commit(name, revision)) is None:
                return
            if self.server.repos[name]["gated"]:
                return self.refuse(403, "GatedRepo", "Access to model is restricted.")
            content = self.server.repos[name]["commits"][commit][file]
            self.say(200, content, ETag=f'"{sha(content)}"', **{"X-Repo-Commit": commit})
        else:
            self.refuse(404, "EntryNotFound", path)

    def do_POST(self) -> None:
        path, body = self.heard(), self.rfile.read(int(self.headers["Content-Length"] or 0))
        if path == "/api/validate-yaml":
            return self.say(200, {"errors": [], "warnings": []})
        if self.token() != TOKEN:
            return (
                self.refuse(403, "", "Forbidden") if self.token() in self.server.readers_only else self.unknown_token()
            )
        if path == "/api/repos/create":
            said = json.loads(body)
            name = f"{said['organization']}/{said['name']}"
            there = name in self.server.repos
            if not there:
                self.server.put(name, {".gitattributes": b"x"}, private=said.get("visibility") == "private")
            return self.say(409 if there else 200, {"url": f"http://{self.headers['Host']}/{name}"})
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path)
        assert found, path
        if found[2] == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.say(200, {"files": files})
        held = dict(self.server.files(found[1]))
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                held[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del held[value["path"]]
        commit = self.server.put(found[1], held)
        self.say(200, {"commitUrl": f"http://{self.headers['Host']}/{found[1]}/commit/{commit}", "commitOid": commit})

    def heard(self) -> str:
        path = self.path.partition("?")[0]
        self.server.asked.append((self.command, path, self.token()))
        return path

    def token(self) -> str | None:
        said = self.headers["Authorization"]
        return said and said.removeprefix("Bearer ")

    def commit(self, name: str, revision: str) -> str | None:
        """The commit that is asked for, or an answer why there is none."""
        repo = self.server.repos.get(name)
        if self.token() not in (None, TOKEN, *self.server.readers_only):
            return self.unknown_token()
        if repo is None or (repo["private"] and self.token() != TOKEN):
            return self.refuse(404 if self.token() else 401, "RepoNotFound", "Repository not found")
        commit = repo["refs"].get(revision, revision if revision in repo["commits"] else None)
        return commit or self.refuse(404, "RevisionNotFound", "Invalid rev id")

    def unknown_token(self) -> None:
        self.refuse(401, "", "Invalid credentials in Authorization header")

    def refuse(self, status: int, code: str, message: str) -> None:
        self.say(status, {"error": message}, **({"X-Error-Code": code} if code else {}), **{"X-Error-Message": message})

    def say(self, status: int, said: Any, *, cut: bool = False, **headers: str) -> None:
        body = said if isinstance(said, bytes) else json.dumps(said).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.close_connection = True


def sha(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        yield hub
        hub.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> dict[str, bytes]:
    """The files of a model."""
    folder = tmp_path_factory.mktemp("hub") / "m"
    write_folder(folder)
    return {p.name: p.read_bytes() for p in folder.iterdir()}


LOAD = """
import json, sys
from jax_sft.hf.folder import resolve
for name, revision in json.loads(sys.argv[1]):
    try:
        folder = resolve(name, revision=revision)
        print(json.dumps({p.name: p.stat().st_size for p in folder.iterdir()} | {"commit": folder.name}))
    except ValueError as error:
        print(json.dumps(str(error)))
"""


def run(hub: Hub, home: pathlib.Path, *command: str, token: str | None = None) -> subprocess.CompletedProcess[str]:
    """A client of this hub alone."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_address[1]}",
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
    } | ({"HF_TOKEN": token} if token else {})
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def load(hub: Hub, home: pathlib.Path, *models: tuple[str, str | None], token: str | None = None) -> list[Any]:
    """What each model resolves to: the sizes of its files and its commit, or what is said instead."""
    done = run(hub, home, "-c", LOAD, json.dumps(models), token=token)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_revision_that_is_asked_for_is_fetched_with_the_token_and_then_read_with_the_hub_gone(tmp_path, hub, model):
    old = hub.put(
        "org/name", model | {"v1.json": b"{}", "pytorch_model.bin": b"x", "onnx/config.json": b"{}"}, branch="v1"
    )
    new = hub.put("org/name", model)
    secret = hub.put("org/secret", model | {"private.json": b"{}"}, private=True)
    (first, again, private) = load(
        hub, tmp_path, ("org/name", "v1"), ("org/name", None), ("org/secret", None), token=TOKEN
    )
    assert first == {"v1.json": 2, "commit": old} | {f: len(x) for f, x in model.items()}
    assert again["commit"] == new
    assert private["commit"] == secret
    assert {token for _, path, token in hub.asked if "/org/" in path} == {TOKEN}
    assert ("GET", f"/org/name/resolve/{old}/v1.json", TOKEN) in hub.asked
    assert not any("pytorch_model.bin" in path or "onnx" in path for _, path, _ in hub.asked)

    hub.shutdown()
    hub.server_close()
    assert load(hub, tmp_path, ("org/name", "v1"), ("org/name", None)) == [first, again]


def test_each_refusal_of_the_hub_is_one_sentence_with_the_way_out(tmp_path, hub, model):
    hub.put("org/name", model)
    hub.put("org/gated", model, gated=True)
    hub.put("org/private", model, private=True)
    hub.put("org/cut", model, cut=True)
    asked = [("org/gated", None), ("org/nothing", None), ("org/private", None), ("org/name", "v9"), ("org/cut", None)]
    said = load(hub, tmp_path, *asked)
    not_there = "is neither a folder here nor a model on the hub; check its name, or set HF_TOKEN for a private one"
    assert said[:4] == [
        "org/gated: is gated on the hub; accept its terms there and set HF_TOKEN",
        f"org/nothing: {not_there}",
        f"org/private: {not_there}",
        "org/name at revision v9: the hub has no such revision; name a branch, tag or commit",
    ]
    assert re.fullmatch(r"org/cut: .*cannot be downloaded \(.*\); name a local folder, or try again online", said[4])
    wrong = load(hub, tmp_path, ("org/name", None), ("org/gated", None), token="hf_stale")
    assert wrong == [
        f"org/{name}: the hub does not accept the token; run `hf auth login`, or set HF_TOKEN anew"
        for name in ("name", "gated")
    ]
    assert load(hub, tmp_path, ("org/gated", None), token="hf_reader") == said[:1]


PUSH = """
import json, logging, os, pathlib, sys
from jax_sft.hf.push import check_push, push
folder = pathlib.Path(sys.argv[1])
for name, token, private, offline in json.loads(sys.argv[2]):
    os.environ.pop("HF_TOKEN", None)
    os.environ |= {"HF_TOKEN": token} if token else {}
    import huggingface_hub.constants
    huggingface_hub.constants.HF_HUB_OFFLINE = offline == "off"
    huggingface_hub.constants.ENDPOINT = "http://127.0.0.1:9" if offline == "gone" else os.environ["HF_ENDPOINT"]
    try:
        check_push(name)
        print(json.dumps(push(folder, name, private=private, again="the command")))
    except ValueError as error:
        print(json.dumps(str(error)))
"""


def push_all(
    hub: Hub, home: pathlib.Path, folder: pathlib.Path, *steps: tuple[str, str | None, bool, str]
) -> list[str]:
    """What each push says: an address or what stood in the way."""
    done = run(hub, home, "-c", PUSH, str(folder), json.dumps(steps))
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_push_is_the_export_and_nothing_else_and_takes_the_place_of_the_one_before(tmp_path, hub, model):
    export = tmp_path / "export"
    write_folder(export, shards=2)
    (export / MARK).write_text("{}")
    sent = {p.name: p.read_bytes() for p in export.iterdir() if p.name not in (MARK, CERTIFICATE)}
    (export / CERTIFICATE).write_text("it may quote a prompt of the data")
    own = {"LICENSE": b"mine", ".gitattributes": b"x", "onnx/model.safetensors": b"kept"}
    hub.put("org/there", own | {"model.safetensors": b"old", "chat_template.jinja": b"old"})
    hub.put("org/public", own)
    steps = [(name, TOKEN, True, "") for name in ("org/new", "org/public")] + [("org/there", TOKEN, False, "")] * 2
    said = push_all(hub, tmp_path, export, *steps)
    assert hub.files("org/new") == sent | {".gitattributes": b"x"}
    assert hub.repos["org/new"]["private"]
    assert hub.files("org/there") == sent | own, "weights of an earlier push would be read in place of these"
    assert hub.files("org/public") == own
    assert re.fullmatch(r"push to org/public: it is there already, and public; .* make it private there or .*", said[1])
    assert [re.sub(r"http://[^/]*", "", said[i]) for i in (0, 2, 3)] == ["/org/new", "/org/there", "/org/there"]


def test_each_push_that_fails_says_what_stays_and_how_to_try_again(tmp_path, hub, model):
    export = tmp_path / "export"
    write_folder(export)
    said = push_all(
        hub,
        tmp_path,
        export,
        ("org/name", None, False, ""),
        ("org/name", TOKEN, False, "off"),
        ("org/name", "hf_stale", False, ""),
        ("org/name", "hf_reader", False, ""),
        ("org/name", TOKEN, False, "gone"),
    )
    login = "run `hf auth login`, or set HF_TOKEN to one that may write there"
    stays, again = f"; the export in {export} is whole; ", ", then try again with: the command"
    assert said[:4] == [
        f"push to org/name: there is no token; {login}",
        "push to org/name: HF_HUB_OFFLINE switches the hub off; unset it, or push later",
        f"push to org/name: the hub does not accept the token{stays}{login}{again}",
        f"push to org/name: the token may not write there{stays}set HF_TOKEN to one that may, or choose a name of your "
        f"own or of your organization{again}",
    ]
    assert re.fullmatch(
        rf"push to org/name: the hub cannot be reached \(ConnectError: .*\){re.escape(stays)}look at the network and "
        rf"HF_ENDPOINT{re.escape(again)}",
        said[4],
    )
    assert not hub.repos
