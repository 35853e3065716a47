"""Too little memory: how it is known, and the sentence that says what to lower, which differs from door to door.

In: an error of the host, or of JAX's devices (which give only text). Out: one sentence with the way out.
"""

import contextlib
from collections.abc import Iterator

_MORE_DEVICES = "use more devices, which share the weights"
# What to do about it, by what was being done.
WAYS_OUT = {
    "train": "Raise train.accumulation (smaller micro-batches), set train.remat = 'full', lower data.max_length or "
    "train.loss_chunk_tokens, or spread the weights over more devices with mesh.fsdp",
    "data": "Give it fewer files at a time, or a machine with more memory",
    "load": f"Take a smaller model, or {_MORE_DEVICES}",
    "answer": f"Lower the tokens of an answer (--max-new-tokens), ask fewer prompts at a time, or {_MORE_DEVICES}",
    "losses": f"Lower the batch size (--batch-size) or the length (--max-length), or {_MORE_DEVICES}",
    "score": "Lower train.batch_size or train.loss_chunk_tokens, hold the weights in less (lora.rank above 0 and "
    f"lora.base = 'nf4'), or {_MORE_DEVICES}",
    "export": f"Export where there is more of it, such as on the CPU with JAX_PLATFORMS=cpu, or {_MORE_DEVICES}",
}


class LackOfMemoryError(MemoryError):
    """There is too little memory; the message says the way out."""


@contextlib.contextmanager
def told_if_short(doing: str) -> Iterator[None]:
    """Say of a lack of memory what helps against it; `doing` is a key of `WAYS_OUT`.

    Raises:
        LackOfMemoryError: host or devices ran out of it.
    """
    try:
        yield
    except LackOfMemoryError:
        raise
    except MemoryError as error:
        raise LackOfMemoryError(f"out of host memory: {error}. {WAYS_OUT[doing]}") from error
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error).lower():
            raise
        raise LackOfMemoryError(
            f"out of memory: {str(error).splitlines()[0].rstrip('.')}. {WAYS_OUT[doing]}"
        ) from error
