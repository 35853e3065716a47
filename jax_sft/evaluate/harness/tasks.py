"""The tasks that someone asked for, found among the harness' own, in a folder, or in a file.

In: names, patterns, paths. Out: what the harness' `simple_evaluate` takes: names or files, and who finds them.
"""

import difflib
import pathlib
from collections.abc import Sequence
from typing import Any

from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]  an extra

_FILE = (".yaml", ".yml")


def find_tasks(tasks: Sequence[str], *, include_path: str | None) -> tuple[list[str], Any]:
    """What to run, and the harness' index of tasks.

    Raises:
        ValueError: no task is named, a name is unknown, or a file or folder is not there or holds none.
    """
    if not tasks:
        raise ValueError("no task is named; name one of the harness, such as arc_easy, or a task's YAML file")
    if include_path is not None and not pathlib.Path(include_path).is_dir():
        raise ValueError(f"include_path = {include_path!r} is no folder; name the one that holds the tasks' YAML files")
    folders = [task for task in tasks if pathlib.Path(task).is_dir()]
    files = [task for task in tasks if _is_path(task) and task not in folders]
    for file in files:
        _check_file(file)
    known = [*([] if include_path is None else [include_path]), *folders]
    # The harness brings some thousands of tasks, which take seconds to read: only where one may be meant.
    manager = TaskManager(include_path=known, include_defaults=False)
    if not all(task in files or task in folders or _matching(task, manager) for task in tasks):
        manager = TaskManager(include_path=known)
    names: list[str] = []
    for task in tasks:
        if task in files:
            names.append(task)
        else:
            names += _in_folder(task, manager) if task in folders else _named(task, manager)
    return list(dict.fromkeys(names)), manager


def _is_path(task: str) -> bool:
    return task.endswith(_FILE) or pathlib.Path(task).is_dir()


def _check_file(file: str) -> None:
    if not pathlib.Path(file).is_file():
        raise ValueError(f"{file}: there is no such task file; name one that is there, or a task of the harness")


def _in_folder(folder: str, manager: Any) -> list[str]:
    root = pathlib.Path(folder).resolve()
    index = manager.task_index
    names = [n for n in manager.all_subtasks if (p := index[n].yaml_path) and p.resolve().is_relative_to(root)]
    if not names:
        raise ValueError(f"{folder}: the folder holds no task; a task is a .yaml file with a line 'task: its_name'")
    return names


def _matching(task: str, manager: Any) -> list[str]:
    return manager.match_tasks([task])


def _named(task: str, manager: Any) -> list[str]:
    found = _matching(task, manager)
    if found:
        return found
    near = difflib.get_close_matches(task, manager.all_tasks, n=3)
    hint = f"did you mean {', '.join(near)}?" if near else "no name is near it;"
    raise ValueError(
        f"unknown task {task!r}: {hint} the harness knows {len(manager.all_tasks):,} (lm_eval ls tasks lists them); a "
        "task of your own is named by its YAML file, or found in include_path"
    )
