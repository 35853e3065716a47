"""The harness' tasks have the scores that its own backend for transformers gives them, request by request.

Where torch is installed the tiny model is compared live; otherwise, and for the real model, with what was recorded
(harness_cases.py). Without lm-eval only what needs no harness is tested.
"""

import datetime
import importlib.util
import json
import logging
import math
import os
import pathlib
import re
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from jax_sft import cli
from jax_sft.assistant import Assistant, load_assistant
from jax_sft.config import MeshConfig
from jax_sft.data.chat import ChatTemplate
from jax_sft.evaluate import harness
from jax_sft.evaluate.harness import Examinee, continuation, jsonable, lines, run_tasks
from jax_sft.evaluate.harness.continuation import continue_until
from jax_sft.evaluate.harness.likelihood import Row, batches_of, bucket, score
from jax_sft.generate import Sampling, generate
from jax_sft.hf.load import load_model, load_params, load_pretrained
from jax_sft.model.decoder import abstract_params, build
from jax_sft.sharding import make_mesh, shard_params
from tests.evaluate import harness_cases as cases
from tests.hf.conftest import TwoProcesses, free_port, two_processes  # noqa: F401  fixtures
from tests.hf.models import smollm2

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm-eval is not installed, so nothing is compared with the harness: pip install 'jax-sft[eval]'",
)
HAS_TORCH = importlib.util.find_spec("torch") is not None


@pytest.fixture(autouse=True)
def _no_pip_list(monkeypatch: pytest.MonkeyPatch):
    """The harness asks pip and the machine what they are, which takes seconds, and puts it into the results."""
    if importlib.util.find_spec("lm_eval") is not None:
        monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path):
    """Task files name their data from there; what `datasets` makes of it goes to a folder of the test's own."""
    import datasets

    monkeypatch.chdir(cases.REPOSITORY)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return cases.write_tiny(tmp_path_factory.mktemp("harness") / "tiny")


@pytest.fixture(scope="module")
def tiny(folder: pathlib.Path) -> Examinee:
    return on(make_mesh(MeshConfig(), jax.devices()[:1]), folder)


@pytest.fixture(scope="module")
def theirs(folder: pathlib.Path) -> dict[str, Any]:
    return cases.theirs_of(folder) if HAS_TORCH else cases.recorded()["tiny"]


def on(mesh: jax.sharding.Mesh, folder: pathlib.Path) -> Examinee:
    base = load_model(folder, mesh=mesh)
    graphdef = build(base.config, dtype="float32", attention="auto")
    return Examinee("tiny", graphdef, base.params, base.template, mesh)


def examinee_of(assistant: Assistant, name: str) -> Examinee:
    return Examinee(name, assistant.graphdef, assistant.params, assistant.template, assistant.mesh)


def served(examinee: Examinee, **changes: Any) -> Any:
    from jax_sft.evaluate.harness.served import Served

    return Served(examinee, **{"batch_size": 8, "max_length": None, "max_gen_toks": 16, "seed": 0, **changes})


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for (our_sum, our_greedy), (their_sum, their_greedy) in zip(
        ours["loglikelihood"], theirs["loglikelihood"], strict=True
    ):
        assert our_sum == pytest.approx(their_sum, abs=1e-3)
        assert our_greedy == their_greedy
    assert ours["rolling"] == pytest.approx(theirs["rolling"], abs=1e-3)
    assert ours["texts"] == theirs["texts"]


# ---- the same as the harness' own backend


@needs_harness
def test_every_request_is_answered_as_by_transformers(tiny: Examinee, theirs: dict[str, Any]):
    greedy = [is_greedy for _, is_greedy in theirs["loglikelihood"]]
    assert any(greedy) and not all(greedy)
    assert_same(cases.answers_of(served(tiny)), theirs)


@needs_harness
@pytest.mark.skipif(not HAS_TORCH, reason="torch is the oracle here: pip install 'jax-sft[oracle]'")
def test_what_is_on_record_is_what_transformers_says(theirs: dict[str, Any]):
    assert_same(theirs, cases.recorded()["tiny"])


@needs_harness
def test_answers_do_not_depend_on_batches_nor_on_the_mesh(folder: pathlib.Path, tiny: Examinee):
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    assert_same(cases.answers_of(served(on(mesh, folder), batch_size=3)), cases.answers_of(served(tiny)))


@needs_harness
def test_rows_that_only_pad_the_vocabulary_do_not_count(folder: pathlib.Path, tiny: Examinee):
    mesh = tiny.mesh
    base = load_pretrained(folder, vocab_multiple=256)
    assert base.config.vocab_rows > base.config.vocab_size
    params = load_params(base, shardings=shard_params(abstract_params(base.config), mesh), dtype="float32")
    rows = params["embed_VD"].shape[0]
    beyond = np.arange(rows)[:, None] >= base.config.vocab_size
    head = jax.device_put(np.where(beyond, np.float32(50), np.asarray(params["head_VD"])), params["head_VD"].sharding)
    padded = Examinee(
        "padded",
        build(base.config, dtype="float32", attention="auto"),
        {**params, "head_VD": head},
        base.template,
        mesh,
    )
    pairs = cases.instances("loglikelihood", cases.PAIRS)
    assert flat(served(padded).loglikelihood(pairs)) == pytest.approx(flat(served(tiny).loglikelihood(pairs)), abs=1e-4)


@needs_harness
@pytest.mark.slow
@pytest.mark.parametrize("run", sorted(cases.RUNS))
def test_a_real_model_has_the_scores_that_transformers_has(run: str):
    record, asked = cases.recorded()["smollm2"][run], cases.RUNS[run]
    examinee = examinee_of(load_assistant(str(smollm2())), "SmolLM2-135M-Instruct")
    given = {**asked, "tasks": [f"{cases.TASKS}/{task}" for task in asked["tasks"]]}
    results = run_tasks(examinee, given.pop("tasks"), log_samples=True, bootstrap_iters=0, batch_size=8, **given)
    found = cases.scores_of(results)
    for task, scores in record["scores"].items():
        assert found["scores"][task] == pytest.approx(scores, rel=1e-4)
        assert flat(found["said"][task]) == pytest.approx(flat(record["said"][task]), abs=1e-3)


def flat(said: Any) -> list[Any]:
    """Texts, sums and truths in one list."""
    if isinstance(said, list | tuple):
        return [leaf for part in said for leaf in flat(part)]
    return [said]


# ---- tasks


@needs_harness
def test_a_folder_of_tasks_runs_and_is_told_in_lines_and_json(tiny: Examinee):
    results = run_tasks(tiny, [cases.TASKS], limit=3, log_samples=True)
    assert set(results["results"]) == {"everyday_endings", "short_answers", "small_texts"}
    assert {"configs", "versions", "n-samples", "n-shot", "config", "samples"} <= set(results)
    assert results["config"]["model"] == "tiny"
    assert len(results["samples"]["short_answers"]) == 3
    told = lines(results)
    assert re.fullmatch(r"everyday_endings +0-shot, 3 of 8 +acc +[01]\.\d{4} ± 0\.\d{4}", told[0])
    assert any(line.startswith("small_texts") and "byte_perplexity" in line for line in told)
    again = json.loads(json.dumps(jsonable(results), allow_nan=False))
    assert again["results"]["short_answers"]["exact_match,none"] == pytest.approx(
        results["results"]["short_answers"]["exact_match,none"]
    )


@needs_harness
def test_few_shot_examples_and_the_chat_template_stand_before_the_question(tiny: Examinee):
    results = run_tasks(
        tiny,
        [f"{cases.TASKS}/short_answers.yaml"],
        limit=1,
        num_fewshot=1,
        apply_chat_template=True,
        system_instruction="Be brief.",
        log_samples=True,
        gen_kwargs={"max_gen_toks": 2},
        max_length=None,
    )
    prompt, kwargs = results["samples"]["short_answers"][0]["arguments"][0]
    assert prompt.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nQuestion: ")
    assert prompt.count("<|im_start|>user") == 2
    assert prompt.endswith("<|im_start|>assistant\n")
    assert kwargs["max_gen_toks"] == 2
    assert results["n-shot"]["short_answers"] == 1


@needs_harness
def test_a_task_is_found_by_its_name_in_a_folder_that_is_named(tiny: Examinee):
    results = run_tasks(tiny, ["short_*"], include_path=cases.TASKS, limit=1)
    assert list(results["results"]) == ["short_answers"]
    assert "samples" not in results


@needs_harness
def test_an_unknown_task_is_refused_with_the_nearest_names(tiny: Examinee, monkeypatch: pytest.MonkeyPatch):
    from lm_eval.tasks import TaskManager

    # The thousands of tasks that the harness brings take seconds to read.
    own = lambda include_path, include_defaults=True: TaskManager(include_path=cases.TASKS, include_defaults=False)  # noqa: E731
    monkeypatch.setattr("jax_sft.evaluate.harness.tasks.TaskManager", own)
    told = (
        r"unknown task 'short_answer': did you mean short_answers\? the harness knows 3 .*own is named by its YAML file"
    )
    with pytest.raises(ValueError, match=told):
        run_tasks(tiny, ["short_answer"])
    with pytest.raises(ValueError, match="unknown task 'qqqq': no name is near it;"):
        run_tasks(tiny, ["qqqq"])


@needs_harness
def test_task_files_and_folders_must_be_there(tiny: Examinee, tmp_path: pathlib.Path):
    with pytest.raises(ValueError, match=r"nowhere\.yaml: there is no such task file; name one that is there"):
        run_tasks(tiny, [str(tmp_path / "nowhere.yaml")])
    with pytest.raises(ValueError, match=r"the folder holds no task; a task is a \.yaml file with a line 'task:"):
        run_tasks(tiny, [str(tmp_path)])
    with pytest.raises(ValueError, match=r"include_path = .*nowhere' is no folder; name the one that holds"):
        run_tasks(tiny, ["short_answers"], include_path=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="no task is named; name one of the harness"):
        run_tasks(tiny, [])


def test_without_the_harness_the_way_to_it_is_told(tiny: Examinee, monkeypatch: pytest.MonkeyPatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else real(name, *a))
    with pytest.raises(ImportError, match=r"not installed: pip install 'jax-sft\[eval\]'"):
        run_tasks(tiny, ["arc_easy"])


@pytest.mark.parametrize(("name", "value"), [("batch_size", 0), ("limit", 0), ("max_gen_toks", 0), ("num_fewshot", -1)])
def test_numbers_out_of_range_are_refused(tiny: Examinee, name: str, value: int):
    with pytest.raises(ValueError, match=f"{name} = {value} must be at least {value + 1}"):
        run_tasks(tiny, ["arc_easy"], **{name: value})


@needs_harness
def test_the_environment_is_left_as_it_was(tiny: Examinee, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.delenv("DISABLE_MULTIPROC", raising=False)
    assert run_tasks(tiny, [f"{cases.TASKS}/everyday.yaml"], limit=1)["results"]
    assert os.environ["LOCAL_RANK"] == "3"
    assert "DISABLE_MULTIPROC" not in os.environ


# ---- too long, endless, sampled


@needs_harness
def test_what_is_longer_than_the_context_loses_its_beginning_and_is_counted(
    tiny: Examinee, caplog: pytest.LogCaptureFixture
):
    lm = served(tiny)
    with caplog.at_level(logging.WARNING):
        lm.loglikelihood(cases.instances("loglikelihood", [(cases.LONG, " fox"), ("short", " fox")]))
        greedy = {"do_sample": False, "max_gen_toks": 28, "until": []}
        (answer,) = lm.generate_until(cases.instances("generate_until", [(cases.LONG, greedy)]))
    assert "1 of 2 requests have more than 128 tokens; their beginnings are cut off" in caplog.text
    assert "1 of 1 requests have more than 100 tokens" in caplog.text
    assert lm.get_model_info()["cut_on_the_left"] == 2
    end = lm.tok_encode(cases.LONG)[-100:]
    with jax.set_mesh(tiny.mesh):
        (expected,) = generate(
            tiny.graphdef, tiny.params, [end], max_new_tokens=28, stop_ids=[2], pad_id=0, sampling=Sampling()
        )
    assert answer == lm.tokenizer.decode(expected.tokens, skip_special_tokens=True)


@needs_harness
def test_a_model_that_never_stops_is_cut_and_counted(tiny: Examinee, caplog: pytest.LogCaptureFixture):
    lm = served(tiny)
    asked = ("In 12 months", {"do_sample": False, "max_gen_toks": 5, "until": ["\n"]})
    assert lm.generate_until(cases.instances("generate_until", [asked])) == ["IIIII"]
    assert lm.get_model_info()["never_stopped"] == 1
    assert "1 of 1 answers reached their last token without a stop" in caplog.text


@needs_harness
def test_an_answer_must_leave_room_for_a_prompt(tiny: Examinee):
    asked = cases.instances("generate_until", [("x", {"max_gen_toks": 128, "until": []})])
    with pytest.raises(ValueError, match="max_gen_toks = 128 must be at least 1 and below the 128 tokens .*lower it"):
        served(tiny).generate_until(asked)
    with pytest.raises(ValueError, match="max_length = 129 must be from 2 to 128, the positions of the model"):
        served(tiny, max_length=129)


@needs_harness
def test_a_continuation_that_cannot_be_scored_is_refused(tiny: Examinee):
    for text in ("", cases.LONG):
        asked = cases.instances("loglikelihood", [("a", text)])
        found = len(served(tiny).tok_encode(f"a{text}")) - 1
        with pytest.raises(ValueError, match=f"has {found} tokens of its own; it must have from 1 to 128.*raise max"):
            served(tiny).loglikelihood(asked)


@needs_harness
def test_what_a_task_asks_for_and_nobody_follows_is_refused(tiny: Examinee):
    asked = cases.instances("generate_until", [("x", {"num_beams": 4, "until": []})])
    with pytest.raises(ValueError, match="generation_kwargs has num_beams, which this backend does not follow; it"):
        served(tiny).generate_until(asked)


@needs_harness
def test_sampled_answers_differ_between_rows_and_batches_and_follow_the_seed(tiny: Examinee):
    hot = {"do_sample": True, "temperature": 5.0, "max_gen_toks": 6, "until": []}
    asked = cases.instances("generate_until", [("The quick", hot)] * 12)  # two batches
    first = served(tiny).generate_until(asked)
    assert len(set(first)) == 12
    assert served(tiny).generate_until(asked) == first
    assert served(tiny, seed=7).generate_until(asked) != first
    cold = [("The quick", {**hot, "do_sample": False})] * 2
    assert len(set(served(tiny).generate_until(cases.instances("generate_until", cold)))) == 1


@needs_harness
def test_a_stop_that_is_a_control_token_ends_an_answer(tiny: Examinee, monkeypatch: pytest.MonkeyPatch):
    seen: list[set[int]] = []
    real = continue_until

    def spy(*args: Any, **given: Any) -> Any:
        seen.append(set(given["stop_ids"]))
        return real(*args, **given)

    monkeypatch.setattr("jax_sft.evaluate.harness.served.continue_until", spy)
    asked = [("x", {"max_gen_toks": 2, "until": ["<|endoftext|>", "\n"]})]
    served(tiny).generate_until(cases.instances("generate_until", asked))
    assert seen == [{0, 2}]


@needs_harness
def test_the_cache_of_requests_knows_the_template(tiny: Examinee):
    other = ChatTemplate(tiny.template.tokenizer, template=tiny.template.template.replace("assistant", "helper"))
    names = {
        served(e).tokenizer_name for e in (tiny, Examinee("t", tiny.graphdef, tiny.params, other, tiny.mesh), tiny)
    }
    assert len(names) == 2
    assert not any("/" in name for name in names)
    assert served(tiny).chat_template(True) == tiny.template.template


@needs_harness
def test_a_template_without_a_system_turn_gets_none(tiny: Examinee):
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + tiny.template.template
    template = ChatTemplate(tiny.template.tokenizer, template=refuses)
    lm = served(Examinee("t", tiny.graphdef, tiny.params, template, tiny.mesh))
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert lm.apply_chat_template(turns) == "<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n"


# ---- without the harness


def test_scores_are_those_of_whole_logits(tiny: Examinee):
    draw = np.random.default_rng(0)
    rows = []
    for length in (1, 2, 5, 63, 64, 65, 100, 128):
        tokens = draw.integers(3, 300, length).tolist()
        at = sorted(draw.integers(0, length, min(length, 7)).tolist())  # a position may be asked twice
        rows.append(Row(tokens, at, draw.integers(0, 320, len(at)).tolist()))
    done: list[int] = []
    found = score(tiny.graphdef, tiny.params, rows, batch_size=8, mesh=tiny.mesh, on_scored=done.append)
    assert sorted(done) == list(range(len(rows)))
    assert set(done[:3]) == {5, 6, 7}  # the longest first

    @jax.jit
    def whole(params: Any, tokens_1T: Any, positions_1T: Any) -> jax.Array:
        model = nnx.merge(tiny.graphdef, params)
        return model.logits(model.hidden(tokens_1T, positions_1T, jax.numpy.ones_like(tokens_1T)))[0]

    positions_1T = np.arange(128, dtype=np.int32)[None]
    for row, scored in zip(rows, found, strict=True):
        tokens_1T = np.zeros((1, 128), np.int32)
        tokens_1T[0, : len(row.tokens)] = row.tokens
        logits_TV = np.asarray(whole(tiny.params, tokens_1T, positions_1T))  # what follows a token does not change it
        logprob_TV = logits_TV - np.log(np.exp(logits_TV.astype(np.float64)).sum(-1, keepdims=True))
        np.testing.assert_allclose(scored.logprob_P, logprob_TV[row.at, row.targets], atol=1e-4)
        assert scored.is_best_P.tolist() == (logits_TV[row.at].argmax(-1) == row.targets).tolist()


def test_lengths_are_rounded_up_to_a_few():
    assert [bucket(n) for n in (1, 64, 65, 128, 129, 192, 193, 384, 385, 1024, 1025)] == [
        64, 64, 128, 128, 192, 192, 256, 384, 512, 1024, 1536,
    ]  # fmt: skip
    rows = [Row([0] * n, [0], [0]) for n in (3, 200, 70, 500)]
    assert list(batches_of(rows, 2)) == [[3, 1], [2, 0]]


def test_generation_ends_soon_after_every_row_has_said_a_stop(tiny: Examinee, monkeypatch: pytest.MonkeyPatch):
    heard: list[int] = []
    real = continuation._Reader.read

    def counted(self: Any, row: int, token: int) -> None:
        heard.append(row)
        real(self, row, token)

    monkeypatch.setattr(continuation._Reader, "read", counted)
    tokenizer = tiny.template.tokenizer
    prompts = [tokenizer.encode(text) for text in ("In 12 months", "The lazy dog")]
    with jax.set_mesh(tiny.mesh):
        found = continue_until(
            tiny.graphdef,
            tiny.params,
            prompts,
            tokenizer=tokenizer,
            max_new_tokens=64,
            stop_ids=[2],
            stop_texts=["III", "wer"],
            sampling=Sampling(),
        )
    assert tokenizer.decode(found[0].tokens) == "III"
    assert all(said.ended for said in found)
    assert len(heard) < 20


def test_notes_tell_what_was_cut_and_what_never_stopped():
    results = {
        "results": {"sums": {"alias": "sums", "exact_match,strict": 0.5, "exact_match_stderr,strict": "N/A"}},
        "n-shot": {"sums": 5},
        "n-samples": {"sums": {"original": 10, "effective": 4}},
        "config": {"cut_on_the_left": 3, "never_stopped": 2, "max_length": 64},
    }
    assert lines(results) == [
        "sums  5-shot, 4 of 10  exact_match (strict)  0.5000",
        "3 requests were longer than the context of 64 tokens and lost their beginning",
        "2 answers reached their last token without a stop",
    ]


def test_json_gets_what_it_can_hold():
    held = {1: (np.float32(0.5), np.arange(2), {7}), "f": lines, "n": math.nan, "d": datetime.date(2020, 1, 2)}
    found = jsonable(held)
    assert found["1"] == [0.5, [0, 1], [7]]
    assert found["f"].startswith("def lines(")
    assert found["n"] is None
    assert found["d"] == "2020-01-02"


def test_importing_the_room_imports_no_harness():
    assert "lm_eval" not in vars(harness)


@needs_harness
def test_eval_runs_tasks_beside_its_other_measurements(folder: pathlib.Path, tmp_path: pathlib.Path, capsys):
    out = tmp_path / "out.json"
    flags = ["--tasks", "short_*", "--tasks-folder", cases.TASKS, "--limit", "2", "--num-fewshot", "0"]
    assert cli.main(["eval", "--model", str(folder), *flags, "--apply-chat-template", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "short_answers" in said and "2 of 6" in said
    found = json.loads(out.read_text())["tasks"]
    assert found["n-samples"]["short_answers"]["effective"] == 2
    assert found["config"]["model"]
    assert cli.main(["eval", "--model", str(folder), "--tasks", str(tmp_path / "nowhere.yaml")]) == 1
    assert "nowhere.yaml: there is no such task file" in capsys.readouterr().err
