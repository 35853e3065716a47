"""Results of the harness for people and for files.

In: what `run_tasks` gives. Out: lines for a terminal, and a dict that JSON can hold.
"""

import inspect
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

_NO_SCORES = ("alias", "name", "sample_len", "sample_count")


def lines(results: Mapping[str, Any]) -> list[str]:
    """A line for each task and metric, and one for what was cut or never stopped.

    gsm8k  5-shot, 100 of 1319  exact_match (strict-match)  0.4200 ± 0.0496
    """
    found = []
    for task, scores in results["results"].items():
        shots, asked = results.get("n-shot", {}).get(task), results.get("n-samples", {}).get(task)
        about = [] if shots is None else [f"{shots}-shot"]
        about += [f"{asked['effective']} of {asked['original']}"] if asked else []
        for key, value in scores.items():
            metric, _, kept_by = key.partition(",")
            if key in _NO_SCORES or metric.endswith("_stderr"):
                continue
            error = scores.get(f"{metric}_stderr,{kept_by}")
            name = metric if kept_by in ("", "none") else f"{metric} ({kept_by})"
            told = f"{value:.4f}" if isinstance(value, float) else str(value)
            told += f" ± {error:.4f}" if isinstance(error, float) and math.isfinite(error) else ""
            found.append((task, ", ".join(about), name, told))
    widths = [max(map(len, column), default=0) for column in zip(*found, strict=True)]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in found]
    return table + _notes(results.get("config", {}))


def _notes(config: Mapping[str, Any]) -> list[str]:
    notes = []
    if cut := config.get("cut_on_the_left"):
        notes.append(
            f"{cut} requests were longer than the context of {config['max_length']} tokens and lost their beginning"
        )
    if endless := config.get("never_stopped"):
        notes.append(f"{endless} answers reached their last token without a stop")
    return notes


def jsonable(results: Any) -> Any:
    """The same with what JSON can hold: numbers of numpy as numbers, functions as their source, NaN as None."""
    match results:
        case Mapping():
            return {str(key): jsonable(value) for key, value in results.items()}
        case list() | tuple() | set() | frozenset():
            return [jsonable(value) for value in results]
        case np.ndarray() | np.generic():
            return jsonable(results.tolist())
        case float():
            return results if math.isfinite(results) else None
        case None | bool() | int() | str():
            return results
    return _source(results) if callable(results) else str(results)


def _source(function: Any) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):  # made by a program, or an object with a call of its own
        return getattr(function, "__qualname__", type(function).__qualname__)
