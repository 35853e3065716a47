"""The door: `jax-sft train | data | eval | chat | export | report`. The only reader of flags.

A command has a module of its own. In: a command line. Out: an exit status: 0 done, 1 a fault the user can mend (one
clear message), 75 saved on a signal (start again to go on).
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from jax_sft.cli.flags import build_parser
from jax_sft.cli.start import EXIT_OK, EXIT_USER_ERROR
from jax_sft.disk import told_if_full
from jax_sft.memory import told_if_short


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and turn what a user can mend into one message on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        options, overrides = _parse(arguments)
        logging.basicConfig(level=logging.WARNING, format="%(message)s")
        logging.getLogger("jax_sft").setLevel(logging.INFO)
        places = filter(None, (getattr(options, name, None) for name in ("out", "workdir")))
        with told_if_full(*places), told_if_short(_DOING.get(str(options.command), str(options.command))):
            return options.run(options, overrides)
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except (ValueError, OSError, ImportError) as error:
        return _fail(error, str(error) or type(error).__name__)
    except MemoryError as error:
        return _fail(error, str(error) or "out of host memory")
    except KeyboardInterrupt:
        return _fail(None, "interrupted")
    except RuntimeError as error:
        first_line = (str(error).splitlines() or [""])[0]
        if any(word in str(error) for word in _OTHERS_GONE) and os.environ.get("JAX_COORDINATOR_ADDRESS"):
            return _fail(
                error,
                f"another process of this run ended or cannot be reached ({first_line}); see its last message, then "
                "start all of them again: they go on from the newest checkpoint",
            )
        raise


_OTHERS_GONE = ("Gloo", "gloo", "UNAVAILABLE", "DEADLINE_EXCEEDED", "NCCL", "coordination service")


# What a command does where no better name is known: of jax_sft.memory.
_DOING = {"eval": "losses", "chat": "answer"}


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Flags, and the `--config.a.b=value` overrides."""
    overrides, rest = [], []
    position = 0
    while position < len(arguments):
        word = arguments[position]
        if word.startswith("--config."):
            if "=" not in word and position + 1 < len(arguments):
                position += 1
                word = f"{word}={arguments[position]}"
            overrides.append(word.removeprefix("--config."))
        else:
            rest.append(word)
        position += 1
    options = build_parser().parse_args(rest)
    if overrides and not hasattr(options, "config"):
        raise ValueError(
            f"--config.{overrides[0]}: {options.command} takes no config; see jax-sft {options.command} --help"
        )
    return options, overrides


def _fail(error: BaseException | None, message: str) -> int:
    if error is not None and os.environ.get("JAX_SFT_TRACEBACK"):
        import traceback

        traceback.print_exception(error)
    print(f"jax-sft: {message}", file=sys.stderr)
    if os.environ.get("JAX_COORDINATOR_ADDRESS") and "jax" in sys.modules:
        # The usual way out would wait a minute for processes that are themselves waiting for this one, and then abort.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_USER_ERROR)
    return EXIT_USER_ERROR
