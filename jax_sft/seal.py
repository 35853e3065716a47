"""Seals: checksums of all files of a folder, written into it, so that later damage is seen.

In: a folder that is complete but not yet in its place. Out: its `seal.json` {"blake2b": {path: digest}}; later, a
sentence on what has changed since. A flipped bit in an array is the case that nothing else would notice.
"""

import concurrent.futures
import hashlib
import json
from collections.abc import Iterator

from etils import epath
from tqdm import tqdm

SEAL = "seal.json"
# Orbax writes these after the seal, at the moment of the rename; they hold times, and restoring does not need them.
_UNSEALED = frozenset({SEAL, "_CHECKPOINT_METADATA", "commit_success.txt"})
_BLOCK_BYTES = 8 << 20
_THREADS = 4


def write_seal(folder: epath.Path) -> None:
    """Seal every file under `folder`."""
    (folder / SEAL).write_text(json.dumps({"blake2b": _digests(folder)}, indent=1))


def seal_problem(folder: epath.Path) -> str | None:
    """What is wrong with a sealed folder, as the rest of a sentence; None if nothing is. Files added later are not."""
    if not (folder / SEAL).exists():
        return f"it has no {SEAL}, so it cannot be checked"
    try:
        sealed = json.loads((folder / SEAL).read_text())["blake2b"]
        found = _digests(folder, bar="checking a checkpoint")
    except (ValueError, KeyError, OSError) as error:
        return f"its {SEAL} or files cannot be read ({error})"
    changed = [name for name, digest in sealed.items() if found.get(name) != digest]
    if not changed:
        return None
    what = "is missing" if changed[0] not in found else "does not have the content that was saved"
    more = f" (and {len(changed) - 1} more files)" if len(changed) > 1 else ""
    return f"{changed[0]} {what}{more}"


def _digests(folder: epath.Path, *, bar: str | None = None) -> dict[str, str]:
    """blake2b of every file under `folder` that the seal covers, by relative path; after two seconds with a `bar`."""
    files = [path for path in _files(folder) if path.name not in _UNSEALED]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:  # hashing lets go of the interpreter's lock
        digests = tqdm(pool.map(_digest, files), bar, len(files), unit=" files", delay=2.0, disable=bar is None)
        return dict(zip([str(p.relative_to(folder)) for p in files], digests, strict=True))


def _files(folder: epath.Path) -> Iterator[epath.Path]:
    """All files, sorted; epath refuses rglob, for the sake of buckets."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from _files(path)
        else:
            yield path


def _digest(path: epath.Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
