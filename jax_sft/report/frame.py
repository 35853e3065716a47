"""The frame of a page that is one file and loads nothing: head, style, and scripts that a policy knows by their hash.

In: a title, the body as HTML, style sheets and scripts beside this module or below it. Out: the page as text.
"""

import base64
import hashlib
import pathlib
import string
from collections.abc import Sequence

_HERE = pathlib.Path(__file__).parent


def part(name: str) -> str:
    """A file of the pages, such as "page.css" or "run/run.js"."""
    return (_HERE / name).read_text(encoding="utf-8").strip()


def framed(title: str, body: str, *, styles: Sequence[str], scripts: Sequence[str], more_policy: str = "") -> str:
    """The whole page; no script runs in it but those of `scripts`.

    Args:
        title, body: HTML, escaped already.
        more_policy: directives behind those that every page has, each after a semicolon.
    """
    script = "\n".join(map(part, scripts))
    return string.Template(part("frame.html")).substitute(
        title=title,
        body=body,
        style="\n".join(map(part, styles)),
        script=script,
        more_policy=more_policy,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
