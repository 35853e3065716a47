"""jax_sft: supervised fine-tuning in JAX, Hugging Face weights in and out.

Two doors for notebooks, as strict as the command line: `train(config)` and `load(path)`. They import jax when they are
called, not before: data workers import this package and must stay light.
"""

import importlib.metadata
import logging
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jax_sft.config import RunConfig, from_config_dict
from jax_sft.config import load as load_config
from jax_sft.memory import told_if_short

if TYPE_CHECKING:
    from jax_sft.assistant import Assistant
    from jax_sft.train_loop import Outcome

__version__ = importlib.metadata.version("jax-sft")
__all__ = ["RunConfig", "__version__", "load", "train"]


def train(config: Any, *, workdir: str | pathlib.Path | None = None, overrides: tuple[str, ...] = ()) -> "Outcome":
    """Fine-tune; the same as `jax-sft train`.

    Args:
        config: a path of a config file, a ConfigDict (or nested dict), or a RunConfig.
        workdir: where the files go; None takes the config's `workdir`.
        overrides: `("optim.lr=1e-5", ...)`, as on the command line.

    Raises:
        ConfigError: all problems of the config at once.
        ValueError: data, model folder or loss are not fit for training.
        MemoryError: there is too little of it; with the keys to change.
    """
    _be_audible()  # before Orbax is imported, which gives the root logger a handler
    from jax_sft.train_loop import train as run

    if isinstance(config, str | pathlib.Path):
        checked = load_config(config, overrides)
    else:
        checked = from_config_dict(config.to_dict() if isinstance(config, RunConfig) else config, overrides)
    place = str(workdir) if workdir is not None else checked.workdir
    if not place:
        raise ValueError("no workdir: pass workdir=, or set it in the config")
    with told_if_short("train"):
        return run(checked, pathlib.Path(place), command="jax_sft.train")


def load(
    path: str | pathlib.Path,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    chat_template: str | None = None,
    adapters: Sequence[str] = (),
) -> "Assistant":
    """A model to talk to and to measure: a Hugging Face folder, a hub id or a .gguf file, with PEFT adapters.

    The first adapter speaks; `with_adapter(name)` of what is returned takes another.

    >>> model = jax_sft.load("runs/demo/export")                    # doctest: +SKIP
    >>> model.answer("What is the capital of France?").text         # doctest: +SKIP
    'Paris.'
    """
    _be_audible()
    from jax_sft.assistant import load_assistant

    return load_assistant(str(path), revision=revision, dtype=dtype, chat_template=chat_template, adapters=adapters)


class _Lines(logging.Handler):
    """What is told, above the progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


def _be_audible() -> None:
    """Tell what the command line tells, dropped rows and resumes among it, unless the program has set up logging."""
    log = logging.getLogger("jax_sft")
    if log.handlers or logging.getLogger().handlers:
        return
    log.addHandler(_Lines())
    log.propagate = False  # or all is told twice as soon as a library gives the root logger a handler
    if log.level == logging.NOTSET:
        log.setLevel(logging.INFO)
