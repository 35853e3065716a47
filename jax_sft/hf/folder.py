"""Where a model lies: a folder here, a .gguf file here, or a model on the Hugging Face hub.

In: what a user wrote as `model.path` (and a revision). Out: a local folder or .gguf file that has what was asked of
it, or a `ValueError` with the way out. Downloads go to the hub's own cache; HF_TOKEN opens gated models.
"""

import difflib
import json
import pathlib
import re

import huggingface_hub
from huggingface_hub import errors

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
INDEX = "model.safetensors.index.json"
CERTIFICATE = "CERTIFICATE.json"  # of an export that has been read back
MARK = "jax_sft.json"  # a folder that holds it is an export of ours and may be replaced by the next one
# What a request to the hub raises: httpx's errors, the hub's and the cache's, hf_xet's.
HUB_ERRORS = (errors.HTTPError, OSError, RuntimeError)  # pyright: ignore[reportPrivateImportUsage]
SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]


def resolve(source: str | pathlib.Path, *, revision: str | None = None, weights: bool = True) -> pathlib.Path:
    """The local folder or .gguf file of `source`, downloaded if it is a hub id.

    Args:
        source: a folder, a .gguf file, or a hub id "org/name".
        revision: branch, tag or commit of a hub id.
        weights: whether safetensors must be there (False: a tokenizer is enough, and nothing else is downloaded).

    Raises:
        ValueError: nothing is there, the hub cannot be reached or does not let us in, or the folder lacks its config
            or its weights.
    """
    text = str(source)
    path = pathlib.Path(text).expanduser()
    if not text:
        raise ValueError("model path: it is empty; name a Hugging Face folder, a hub id or a .gguf file")
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"{path}: is a {path.suffix or 'nameless'} file; name its folder, or a .gguf file")
        return path
    if path.is_dir():
        folder = path
    elif HUB_ID.fullmatch(text) and path.suffix != ".gguf":
        folder = _download(text, revision, weights)
    else:
        raise ValueError(f"{path}: no such folder or file{_near(path)}; a model of the hub is written org/name")
    if weights:
        _check(folder, text)
    return folder


def weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The safetensors of a model: those its index names, or else all; never another format's copy beside them.

    Raises:
        ValueError: the index names files that are not there, or cannot be read.
    """
    where = tensors_by_index(folder)
    if where is None:
        files = (p for p in folder.glob("*.safetensors") if p.is_file())
        return sorted(p for p in files if not p.name.startswith(("consolidated", "adapter_")))
    names = sorted(set(where.values()))
    gone = [name for name in names if not (folder / name).is_file()]
    if gone:
        raise ValueError(
            f"{folder}: {INDEX} names {len(names)} files and {len(gone)} are missing ({', '.join(gone[:5])}"
            f"{', ...' if len(gone) > 5 else ''}); copy or download the rest of the model"
        )
    return [folder / name for name in names]


def tensors_by_index(folder: pathlib.Path) -> dict[str, str] | None:
    """The file of each tensor, as the index says; None where there is no index.

    Raises:
        ValueError: the index cannot be read, or names nothing.
    """
    index = folder / INDEX
    if not index.is_file():
        return None
    try:
        where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not where or not all(isinstance(file, str) for file in where.values()):
            raise ValueError("its weight_map does not give each tensor a file")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index}: is not an index of safetensors ({error}); copy or download it again") from error
    return where


def _near(path: pathlib.Path) -> str:
    names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def _download(hub_id: str, revision: str | None, weights: bool) -> pathlib.Path:
    wanted = [*SMALL_FILES, "*.safetensors"] if weights else SMALL_FILES
    place = f"{hub_id}: " if revision is None else f"{hub_id} at revision {revision}: "
    near = _near(pathlib.Path(hub_id))  # said only where the hub has failed too: the models of a family look alike
    try:
        folder = huggingface_hub.snapshot_download(
            hub_id, revision=revision, allow_patterns=wanted, ignore_patterns=["*/*", "consolidated*"]
        )
    except errors.GatedRepoError as error:
        raise ValueError(f"{place}is gated on the hub; accept its terms there and set HF_TOKEN") from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"{place}is neither a folder here nor a model on the hub; check its name, or set HF_TOKEN for a private one"
            f"{near}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(f"{place}the hub has no such revision; name a branch, tag or commit") from error
    except HUB_ERRORS as error:
        if getattr(getattr(error, "response", None), "status_code", None) == 401:
            raise ValueError(
                f"{place}the hub does not accept the token; run `hf auth login`, or set HF_TOKEN anew"
            ) from error
        reason = str(error).strip().partition("\n")[0].partition(". ")[0]
        raise ValueError(
            f"{place}is no folder here, is not in the hub's cache, and cannot be downloaded ({type(error).__name__}: "
            f"{reason}); name a local folder, or try again online{near}"
        ) from error
    return pathlib.Path(folder)


def _check(folder: pathlib.Path, said: str) -> None:
    """A folder that can be loaded has a config.json and safetensors."""
    gguf = sorted(folder.glob("*.gguf"))
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise ValueError(f"{said}: is a LoRA adapter, not a model; name the base model it was trained on")
        hint = f"name the file {gguf[0]}" if gguf else "name a folder that save_pretrained or jax-sft export wrote"
        raise ValueError(f"{said}: has no config.json, so it is no Hugging Face model; {hint}")
    if weight_files(folder):
        return
    pickles = sorted(p.name for p in [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
    if pickles:
        raise ValueError(
            f"{said}: holds its weights only as {pickles[0]}, a pickle, which runs code when read; write safetensors "
            f"with transformers: AutoModelForCausalLM.from_pretrained({said!r}).save_pretrained('converted')"
        )
    hint = f"name the file {gguf[0]}" if gguf else "copy or download the rest of the model"
    raise ValueError(f"{said}: has a config.json but no weights (*.safetensors); {hint}")
