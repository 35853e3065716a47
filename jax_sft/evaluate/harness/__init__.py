"""Any task of EleutherAI's lm-evaluation-harness, answered by a model where it lies: on its mesh, without an export.

In: a model (`Examinee`) and tasks, by name or as YAML files and folders. Out: what the harness' own `simple_evaluate`
gives, as `lines` for a terminal and as `jsonable`. The harness is an extra: without it only `run_tasks` fails.
"""

import contextlib
import dataclasses
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
from flax import nnx

from jax_sft.data.chat import ChatTemplate
from jax_sft.evaluate.harness.results import jsonable, lines
from jax_sft.memory import told_if_short

if TYPE_CHECKING:
    from jax_sft.model.decoder import Decoder

__all__ = ["Examinee", "check_tasks", "jsonable", "lines", "run_tasks"]

_BOOTSTRAP_DRAWS = 1000  # of metrics whose error has no formula; the harness' own default is 100,000


@dataclasses.dataclass(frozen=True)
class Examinee:
    """A model that answers: what an `Assistant` holds, or a trainer."""

    name: str  # told in the results
    graphdef: "nnx.GraphDef[Decoder]"
    params: Any
    template: ChatTemplate
    mesh: jax.sharding.Mesh


def run_tasks(
    examinee: Examinee,
    tasks: Sequence[str],
    *,
    include_path: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    max_gen_toks: int = 256,
    apply_chat_template: bool = False,
    system_instruction: str | None = None,
    fewshot_as_multiturn: bool = True,
    gen_kwargs: Mapping[str, Any] | None = None,
    log_samples: bool = False,
    bootstrap_iters: int = _BOOTSTRAP_DRAWS,
    cache_requests: bool = False,
    seed: int = 0,
    fewshot_seed: int = 1234,
    confirm_run_unsafe_code: bool = False,
) -> dict[str, Any]:
    """Run tasks of the harness. Every process must call it; every process gets the same results.

    Args:
        tasks: names (with * for several), YAML files, or folders, of which every task is run.
        include_path: a folder whose tasks are known by their names.
        num_fewshot: examples in front of each question; None: as many as the task says.
        limit: questions of each task; None: all.
        batch_size: rows at once, rounded up to what the mesh divides; scores do not depend on it.
        max_length: tokens that the model sees at most; None: as many as it has positions. What is longer loses its
            beginning, as with the harness' own backends, and is counted.
        max_gen_toks: tokens of an answer, where the task does not say.
        apply_chat_template: questions are put as a conversation, in the model's own template.
        gen_kwargs: replace what tasks say of generation, such as {"do_sample": True, "temperature": 0.7}.
        log_samples: keep every question, answer and score under "samples".
        bootstrap_iters: draws for the errors of metrics that have no formula for it; 0: no errors.
        cache_requests: keep the questions, as the harness builds them, in its folder for the next run.
        seed: of sampled answers.
        fewshot_seed: of few-shot examples that are drawn; the harness' own default.
        confirm_run_unsafe_code: tasks may run code that the model wrote.

    Returns:
        The harness' results, versions, configs, n-shot, n-samples and config; under its "config", `cut_on_the_left`
        and `never_stopped` count requests longer than the context, and answers that reached their last token.

    Raises:
        ImportError: the harness is not installed.
        ValueError: an unknown task, no task file where one is named, a number out of its range, or what a task asks
            for cannot be done.
    """
    _check(batch_size=batch_size, max_gen_toks=max_gen_toks, limit=limit, num_fewshot=num_fewshot)
    _check_installed()
    from lm_eval.evaluator import simple_evaluate  # pyright: ignore[reportMissingImports]  an extra

    from jax_sft.evaluate.harness.served import Served
    from jax_sft.evaluate.harness.tasks import find_tasks

    served = Served(examinee, batch_size=batch_size, max_length=max_length, max_gen_toks=max_gen_toks, seed=seed)
    names, manager = find_tasks(tasks, include_path=include_path)
    with told_if_short("losses"), _one_process_of_the_harness():
        return simple_evaluate(
            served,
            tasks=names,
            task_manager=manager,
            num_fewshot=num_fewshot,
            limit=limit,
            batch_size=batch_size,
            apply_chat_template=apply_chat_template,
            system_instruction=system_instruction,
            fewshot_as_multiturn=apply_chat_template and fewshot_as_multiturn,
            gen_kwargs=dict(gen_kwargs) if gen_kwargs else None,
            log_samples=log_samples,
            bootstrap_iters=bootstrap_iters,
            cache_requests=cache_requests,
            random_seed=seed,
            fewshot_random_seed=fewshot_seed,
            confirm_run_unsafe_code=confirm_run_unsafe_code,
        )


def check_tasks(tasks: Sequence[str], *, include_path: str | None = None) -> None:
    """Find tasks before a model is loaded.

    Raises:
        ImportError: the harness is not installed.
        ValueError: an unknown task, or no task file where one is named.
    """
    _check_installed()
    from jax_sft.evaluate.harness.tasks import find_tasks

    find_tasks(tasks, include_path=include_path)


def _check(**numbers: int | None) -> None:
    for name, value in numbers.items():
        least = 0 if name == "num_fewshot" else 1
        if value is not None and value < least:
            raise ValueError(f"{name} = {value} must be at least {least}")


def _check_installed() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise ImportError(
            "the tasks are those of lm-evaluation-harness, which is not installed: pip install 'jax-sft[eval]'"
        )


@contextlib.contextmanager
def _one_process_of_the_harness() -> Iterator[None]:
    """Tell the harness to start no processes of its own, and that this one is all there is.

    It would fork, which programs that run JAX do not survive; and where a launcher has numbered the processes, it
    would give results to the first alone.
    """
    told = {"DISABLE_MULTIPROC": "1", "LOCAL_RANK": "0"}
    before = {name: os.environ.get(name) for name in told}
    os.environ.update(told)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
