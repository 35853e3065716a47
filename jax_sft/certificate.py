"""The certificate of an export: the folder is read back, and must say what the trained model said.

In: the trained parameters and an Exam (rows of tokens, one conversation) before the export; the folder after it. Out:
CERTIFICATE.json in the folder and lines on the terminal. Read by our own reader, every weight must have the bits, and
the logits be those, of the trained weights rounded to the exported dtype; read by transformers, where torch is
installed, the logits must be the same within float error. The model that was read back answers one conversation.

R row, T position, P compared position (the last ones of a row), V vocabulary.
"""

import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import logging
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jax_sft.evaluate.answers import Messages, answer
from jax_sft.exam import POSITIONS, TEXTS, Exam, Trained, broadcast, digests_of, is_lack_of_memory, logits_of, nudged
from jax_sft.generate import Sampling
from jax_sft.hf.by_transformers import UnreadError, read_by_transformers, why_not_here
from jax_sft.hf.folder import CERTIFICATE, weight_files
from jax_sft.hf.load import Pretrained, load_params, load_pretrained
from jax_sft.hf.peft import WEIGHTS, read_adapter
from jax_sft.model.decoder import build
from jax_sft.model.lora import Lora
from jax_sft.parameters import Parameters, joined
from jax_sft.progress import stage
from jax_sft.sharding import shard_params

_log = logging.getLogger(__name__)

_MAX_NEW_TOKENS = 128
_OWN_TOLERANCE = 1e-5  # of the largest logit; the same program on the same numbers
_TRANSFORMERS_TOLERANCE = 1e-4  # of the largest logit; another program in float32
_LARGEST_BESIDE_OTHERS = 2e9  # parameters that process 0 reads with torch while other processes wait for it to end


class Adapted(NamedTuple):
    """An adapter on the model that is compared."""

    folder: pathlib.Path
    lora: Lora


def certify(
    folder: pathlib.Path, base: Pretrained, exam: Exam, trained: Trained | None, *, shardings: Any, dtype: str
) -> dict[str, Any]:
    """Read the folder back and write its certificate; all processes call it.

    Raises:
        ValueError: the folder does not hold what was trained; CERTIFICATE.json, which is written all the same, says
            where they differ.
    """
    if trained is None:
        return _not_made(folder, "no memory was left to ask the trained model")
    if not _seen_by_all(folder):
        return _not_made(folder, "the folder is not seen by every process")
    said: dict[str, Any] = {"dtype": dtype, **_rows(exam)}
    try:
        again = load_pretrained(folder)
        padded = dataclasses.replace(again.config, vocab_rows=base.config.vocab_rows)  # as the shardings ask for
        again = dataclasses.replace(again, config=padded)
        problems = _differences(base, again)
        params = load_params(again, shardings=shardings, dtype=dtype)
        with stage("asking the export"):
            read_RPV = logits_of(again, params, exam)
            digests = digests_of(params)
    except ValueError as error:
        return _file(folder, said, [f"it cannot be read: {error}"])
    except (MemoryError, RuntimeError) as error:
        if not is_lack_of_memory(error):
            raise
        return _not_made(folder, "no memory is left to read the model back")
    if moved := sorted(path for path in trained.digests if digests.get(path) != trained.digests[path]):
        problems.append(f"other bits were read back in {', '.join(moved[:5])}{', ...' if len(moved) > 5 else ''}")
    largest = float(np.abs(trained.stored_RPV).max())
    difference = float(np.abs(read_RPV - trained.stored_RPV).max())
    said["jax_sft"] = {
        "version": importlib.metadata.version("jax-sft"),
        "weights": moved or "bit for bit those that were trained",
        "largest_logit": _number(largest),
        "largest_difference": _number(difference),
        "largest_difference_by_rounding": _number(np.abs(trained.exact_RPV - trained.stored_RPV).max()),
        "same_top_token_after_rounding": float((trained.exact_RPV.argmax(-1) == trained.stored_RPV.argmax(-1)).mean()),
    }
    if not difference <= _OWN_TOLERANCE * largest:  # written so that NaN is a problem
        problems.append(f"logits read back differ by {difference:.3g}, where the largest is {largest:.3g}")
    if exam.messages is not None and not problems:
        with stage("hearing the export's answer"):
            said["answer"] = _answer(again, params, exam.messages)
    said["transformers"], more = _by_transformers(folder, again, params, exam, read_RPV)
    return _file(folder, said, problems + more)


def certify_adapter(
    folder: pathlib.Path, base: Pretrained, plan: Parameters, trained: Any, exam: Exam, *, mesh: Mesh, dtype: str
) -> dict[str, Any]:
    """Read an adapter's folder back and write its certificate; all processes call it.

    The base stands beside it in float32 as its files say, however it was held in training: so PEFT has it too.

    Raises:
        ValueError: as `certify`.
    """
    if not _seen_by_all(folder):
        return _not_made(folder, "the folder is not seen by every process")
    said: dict[str, Any] = {"dtype": dtype, **_rows(exam)}
    try:
        weights = plan.load_base(base, mesh)
        trained_RPV = logits_of(base, joined(weights, trained), exam, lora=plan.lora)
        again = read_adapter(folder, base.config)
        params = joined(weights, jax.device_put(again.params, shard_params(again.params, mesh)))
        read_RPV = logits_of(base, params, exam, lora=again.lora)
    except ValueError as error:
        return _file(folder, said, [f"it cannot be read: {error}"])
    except (MemoryError, RuntimeError) as error:
        if not is_lack_of_memory(error):
            raise
        return _not_made(folder, "no memory is left for the base in float32")
    largest, difference = float(np.abs(trained_RPV).max()), float(np.abs(read_RPV - trained_RPV).max())
    said["jax_sft"] = {
        "version": importlib.metadata.version("jax-sft"),
        "largest_logit": _number(largest),
        "largest_difference": _number(difference),
    }
    problems = []
    if dtype == "float32" and not difference <= _OWN_TOLERANCE * largest:  # written so that NaN is a problem
        problems.append(f"logits read back differ by {difference:.3g}, where the largest is {largest:.3g}")
    if exam.messages is not None and not problems:
        said["answer"] = _answer(base, params, exam.messages, lora=again.lora)
    if base.path.is_dir():
        beside = Adapted(folder, again.lora)
        said["transformers"], more = _by_transformers(base.path, base, params, exam, read_RPV, adapted=beside)
        problems += more
    else:
        said["transformers"] = {"skipped": f"PEFT has no base to put it on: {base.path.name} is no folder"}
    return _file(folder, said, problems)


def _rows(exam: Exam) -> dict[str, Any]:
    return {
        "rows": {
            "from": exam.origin,
            "tokens": [len(row) for row in exam.rows],
            "positions_compared": sum(min(POSITIONS, len(row)) for row in exam.rows),
        }
    }


def _number(x: Any) -> float | str:
    """As JSON can hold it, which has no infinity."""
    return float(x) if np.isfinite(x) else str(float(x))


def _differences(base: Pretrained, again: Pretrained) -> list[str]:
    """What the files of a folder say otherwise than the model they were written from."""
    before, now = dataclasses.asdict(base.config), dataclasses.asdict(again.config)
    problems = [
        f"config.json is read as {k} = {now[k]!r}, trained was {before[k]!r}" for k in now if now[k] != before[k]
    ]
    if again.chat_template != base.chat_template:
        return [*problems, "the chat template is another one"]
    stops = [sorted(model.template.stop_ids) for model in (again, base)]
    if stops[0] != stops[1]:
        problems.append(f"the stop ids are {stops[0]}, trained were {stops[1]}")
    if any(again.tokenizer(text)["input_ids"] != base.tokenizer(text)["input_ids"] for text in TEXTS):
        problems.append("the tokenizer cuts text otherwise")
    return problems


def _answer(model: Pretrained, params: Any, messages: Messages, *, lora: Lora | None = None) -> dict[str, Any]:
    graphdef = build(model.config, dtype="float32", attention="auto", lora=lora)
    room = model.config.max_positions - len(model.template.encode_prompt(messages))
    if room < 1:
        return {"messages": messages, "skipped": "the conversation fills the model's context"}
    (given,) = answer(
        graphdef,
        params,
        template=model.template,
        conversations=[messages],
        max_new_tokens=min(_MAX_NEW_TOKENS, room),
        sampling=Sampling(),
    )
    stops = model.tokenizer.convert_ids_to_tokens(list(model.template.stop_ids))
    return {"messages": messages, **dataclasses.asdict(given), "stop_tokens": stops}


def _by_transformers(
    folder: pathlib.Path,
    again: Pretrained,
    params: Any,
    exam: Exam,
    ours_RPV: np.ndarray,
    *,
    adapted: Adapted | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """What transformers says of the folder, and what is wrong with that; process 0 reads, all know."""
    said, problems, difference = {}, [], 0.0
    if jax.process_index() == 0:
        said, problems, difference = _second_opinion(folder, again, exam, ours_RPV, adapted)
    if jax.process_count() > 1:
        told = json.dumps([said, problems, difference]).encode() if jax.process_index() == 0 else b""
        said, problems, difference = json.loads(broadcast(told))
    largest = float(np.abs(ours_RPV).max())
    tolerance = _TRANSFORMERS_TOLERANCE * largest
    if not difference <= tolerance:
        # Some models make much of little: then so do two programs that round in different places.
        almost = dict(params) | {"embed_VD": nudged(params["embed_VD"])}
        lora = None if adapted is None else adapted.lora
        with stage("asking the export, nudged"):
            by_nudge = float(np.abs(logits_of(again, almost, exam, lora=lora) - ours_RPV).max())
        said["largest_difference_by_a_nudge_of_1e-6"] = _number(by_nudge)
        tolerance = max(tolerance, by_nudge)
    if not difference <= tolerance:
        problems = [*problems, f"logits of transformers differ by {difference:.3g}, where the largest is {largest:.3g}"]
    return said, problems


def _second_opinion(
    folder: pathlib.Path, again: Pretrained, exam: Exam, ours_RPV: np.ndarray, adapted: Adapted | None
) -> tuple[dict[str, Any], list[str], float]:
    """What is said of it, what is wrong with it, and the largest difference in logits."""
    num_params = again.config.num_params
    reason = why_not_here(num_params, with_adapter=adapted is not None)
    if reason is None and jax.process_count() > 1 and num_params > _LARGEST_BESIDE_OTHERS:
        reason = "other processes would wait for it; `jax-sft export --model` on this folder does it on one host"
    if reason is not None:
        return {"skipped": reason}, [], 0.0
    try:
        adapter = None if adapted is None else adapted.folder
        with stage("asking transformers"):
            reading = read_by_transformers(folder, exam.rows, positions=POSITIONS, adapter=adapter)
    except UnreadError as error:
        return {"skipped": str(error)}, [], 0.0
    except RuntimeError as error:
        return {"error": str(error)}, [f"transformers cannot read it: {error}"], 0.0
    difference = max(
        float(np.abs(theirs - ours_PV[-len(theirs) :]).max())
        for theirs, ours_PV in zip(reading.logits, ours_RPV, strict=True)
    )
    problems = [
        f"transformers finds {what.replace('_', ' ')}: {', '.join(reading.facts[what][:5])}"
        for what in ("missing_keys", "unexpected_keys")
        if reading.facts[what]
    ]
    return {**reading.facts, "largest_difference": _number(difference)}, problems, difference


def _seen_by_all(folder: pathlib.Path) -> bool:
    seen = (folder / "config.json").is_file() or (folder / WEIGHTS).is_file()
    if jax.process_count() == 1:
        return seen
    return bool(multihost_utils.process_allgather(np.int32(seen)).min())


def _not_made(folder: pathlib.Path, reason: str) -> dict[str, Any]:
    return _file(folder, {"verdict": "not made", "reason": reason}, [])


def _file(folder: pathlib.Path, said: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Write the certificate, from process 0, and tell of it."""
    verdict = {"verdict": "failed" if problems else "passed", "problems": problems}
    made = {"made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
    certificate = verdict | made | dict(said)
    if jax.process_index() == 0:
        held = [folder / WEIGHTS] if (folder / WEIGHTS).is_file() else weight_files(folder)
        with stage("checksums of the export"):
            certificate["sha256"] = {file.name: _sha256(file) for file in held}
        partial = folder.with_name(f".{folder.name}.{CERTIFICATE}")
        partial.write_text(json.dumps(certificate, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(partial, folder / CERTIFICATE)
        for line in told(certificate):
            _log.info("certificate: %s", line)
    if problems:
        raise ValueError(
            f"{folder}: the export does not hold what was trained: {'; '.join(problems)}. {CERTIFICATE} there says "
            "more; do not use the folder"
        )
    return certificate


def _sha256(file: pathlib.Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def told(certificate: Mapping[str, Any]) -> list[str]:
    """A certificate in a few lines."""
    if "transformers" not in certificate:
        reason = certificate.get("reason") or "; ".join(certificate["problems"])
        return [f"{certificate['verdict']}: {reason}"]
    own, other, given = certificate["jax_sft"], certificate["transformers"], certificate.get("answer", {})
    largest = own["largest_logit"]
    read_back = f"read back by jax_sft: logits up to {_short(largest)} differ by {_short(own['largest_difference'])}"
    if "same_top_token_after_rounding" in own:  # of an adapter, the rounding is in the difference itself
        read_back += (
            f"; {certificate['dtype']} against what was trained: {_short(own['largest_difference_by_rounding'])}, "
            f"the likeliest token is the same at {own['same_top_token_after_rounding']:.1%}"
        )
    lines = [
        f"{certificate['verdict']}, on {certificate['rows']['positions_compared']} positions of "
        f"{certificate['rows']['from']}",
        read_back,
    ]
    if "largest_difference" not in other:
        lines.append(f"not read by transformers: {other.get('skipped') or other.get('error')}")
    elif other["missing_keys"] or other["unexpected_keys"]:
        lines.append(f"read by {_readers(other)}: {other['missing_keys']} {other['unexpected_keys']}")
    else:
        lines.append(
            f"read by {_readers(other)}: no tensor missing or unexpected, largest difference "
            f"{_short(other['largest_difference'])}"
        )
    if "text" in given:
        end = f"and stopped after {given['tokens']} tokens" if given["stopped"] else "and did not stop by itself"
        lines.append(f"asked {given['messages'][-1]['content']!r} it answered {given['text']!r} {end}")
    return lines


def _readers(versions: Mapping[str, Any]) -> str:
    adapter = f"PEFT {versions['peft']} on " if "peft" in versions else ""
    return f"{adapter}transformers {versions['version']}"


def _short(x: float | str) -> str:
    return x if isinstance(x, str) else f"{x:.2g}"
