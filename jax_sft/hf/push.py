"""A finished export, to the Hugging Face hub.

In: a folder that `save_model` wrote, and the name it is to have there, "org/name". Out: its address, or a `ValueError`
that says what stood in the way, that the folder is still here, and how to try again. HF_TOKEN, or the token that
`hf auth login` left, opens the door.
"""

import logging
import pathlib

import huggingface_hub
from huggingface_hub import constants

from jax_sft.hf.folder import CERTIFICATE, HUB_ERRORS, MARK

_log = logging.getLogger(__name__)

# Weights of an earlier push, in another number of files, would be read in place of these; so would its template.
_REPLACED = (".safetensors", ".safetensors.index.json", ".jinja")


def check_push(name: str) -> None:
    """What can be known of a push before the work that it comes after.

    Raises:
        ValueError: the hub is switched off, or there is no token.
    """
    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"push to {name}: HF_HUB_OFFLINE switches the hub off; unset it, or push later")
    if huggingface_hub.get_token() is None:
        raise ValueError(
            f"push to {name}: there is no token; run `hf auth login`, or set HF_TOKEN to one that may write there"
        )


def push(folder: pathlib.Path, name: str, *, private: bool, again: str) -> str:
    """Upload an export in one commit; a reader there sees the old model or the new one, never half of each.

    Args:
        folder: a whole export; all of it goes except the certificate and the list of files that marks it as ours.
        name: "org/name"; it is made if it is not there.
        private: nobody else may see it; a model that is public already is left alone.
        again: the command that tries this again.

    Returns:
        The address of the model.

    Raises:
        ValueError: the hub cannot be reached or does not let us write; the folder stays as it is.
    """
    _log.info("pushing %s to %s", folder, name)
    api = huggingface_hub.HfApi()
    try:
        address = api.create_repo(name, private=private or None, exist_ok=True)
        is_public = private and not api.model_info(name).private
        if not is_public:
            api.upload_folder(
                repo_id=name,
                folder_path=folder,
                commit_message="Export of jax-sft",
                ignore_patterns=[MARK, CERTIFICATE],  # it may quote a prompt of the data
                delete_patterns=[f for f in api.list_repo_files(name) if f.endswith(_REPLACED) and "/" not in f],
            )
    except (*HUB_ERRORS, ValueError) as error:  # a ValueError: of the card or the name
        reason, way_out = _explained(error)
        raise ValueError(_failed(name, folder, reason, way_out, again)) from error
    if is_public:
        way_out = "make it private there or choose another name"
        raise ValueError(_failed(name, folder, "it is there already, and public", way_out, again))
    _log.info("pushed to %s", address)
    return str(address)


def _failed(name: str, folder: pathlib.Path, reason: str, way_out: str, again: str) -> str:
    return f"push to {name}: {reason}; the export in {folder} is whole; {way_out}, then try again with: {again}"


def _explained(error: Exception) -> tuple[str, str]:
    """What went wrong, and what may mend it."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return "the hub does not accept the token", "run `hf auth login`, or set HF_TOKEN to one that may write there"
    if status in (403, 404):
        return (
            "the token may not write there",
            "set HF_TOKEN to one that may, or choose a name of your own or of your organization",
        )
    first_line = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
    said = f"{type(error).__name__}: {first_line}"
    if status is None and not isinstance(error, ValueError):
        return f"the hub cannot be reached ({said})", "look at the network and HF_ENDPOINT"
    return f"the hub refused it ({said})", "mend that"
