"""A line that counts the seconds of work that cannot say how far it is: restoring, compiling, another program.

In: the name of a stage. Out: on stderr, from the first process alone, once the stage has taken more than a second.
"""

import contextlib
import threading
from collections.abc import Iterator

import jax
from tqdm import tqdm

_DELAY_SECONDS = 1.0  # what is over before is not told
_EVERY_SECONDS = 1.0


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    """Show `name` and its seconds for as long as the block runs."""
    if jax.process_index() > 0:
        yield
        return
    over = threading.Event()

    def count() -> None:
        if over.wait(_DELAY_SECONDS):
            return
        with tqdm(desc=name, bar_format="{desc}: {elapsed}", leave=False) as line:
            while not over.wait(_EVERY_SECONDS):
                line.refresh()

    thread = threading.Thread(target=count, name=f"jax_sft: {name}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
