"""The certificate of an export: the folder is read back, and must say what the trained model said.

In: the trained parameters and an Exam (rows of tokens, one conversation) before the export; the folder after it. Out:
CERTIFICATE.json in the folder and lines on the terminal. Read by our own reader, the logits must be those of the
trained weights rounded to the exported dtype; read by transformers, where torch is installed, they must be the same
within float error. Then the model that was read back answers one conversation.

R row, T position, P compared position (the last ones of a row), V vocabulary.
"""

import dataclasses
import datetime
import functools
import hashlib
import importlib.metadata
import itertools
import json
import logging
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from jax_sft.config import DataConfig
from jax_sft.data.chat import to_sequences
from jax_sft.data.conversation import Account
from jax_sft.data.formats import read_conversations
from jax_sft.evaluate.answers import Messages, answer
from jax_sft.generate import Sampling
from jax_sft.hf.by_transformers import read_by_transformers, why_not_here
from jax_sft.hf.folder import CERTIFICATE, weight_files
from jax_sft.hf.load import Pretrained, load_params, load_pretrained
from jax_sft.model.decoder import build

_log = logging.getLogger(__name__)

_ROWS = 4
_ROW_TOKENS = 512  # of each row: the first ones
_POSITIONS = 32  # of each row: the last ones; their logits are compared
_MAX_NEW_TOKENS = 128
_OWN_TOLERANCE = 1e-5  # of the largest logit; the same program on the same numbers
_TRANSFORMERS_TOLERANCE = 1e-4  # of the largest logit; another program in float32
_LARGEST_BESIDE_OTHERS = 2e9  # parameters that process 0 reads with torch while other processes wait for it to end
_TEXTS = (
    "The harbour was quiet before sunrise. Two fishing boats lay at the quay, and a woman in a yellow coat counted "
    "crates: twelve, thirteen, fourteen.",
    "清晨的港口很安静。码头边停着两条渔船,一位穿黄色外套的女人正在数箱子:十二、十三、十四。",
    "def mean(values):\n    if not values:\n        raise ValueError('empty')\n    return sum(values) / len(values)\n",
)


@dataclasses.dataclass(frozen=True)
class Exam:
    """What the model is asked, before the export and after it."""

    origin: str  # where the rows come from
    rows: tuple[tuple[int, ...], ...]
    messages: Messages | None  # ends in a user's turn; None: the model has no chat template


@dataclasses.dataclass(frozen=True)
class Trained:
    """What the trained model said."""

    exact_RPV: np.ndarray  # as it was trained
    stored_RPV: np.ndarray  # with its weights rounded to the exported dtype


def make_exam(base: Pretrained, data: DataConfig | None = None, prompts: Sequence[str] = ()) -> Exam:
    """Rows of the validation set (or of the training set, if there is none), and a prompt.

    Where there is no data, or its files are gone, texts of our own take their place.
    """
    rows: list[tuple[int, ...]] = []
    origin, asked = "texts of the certificate's own", None
    paths = () if data is None else data.validation or data.train
    if data is not None:
        try:
            for conversation in itertools.islice(read_conversations(data, paths, Account()), 16 * _ROWS):
                found = to_sequences(conversation, base.template, data, Account())
                rows += [tuple(map(int, s.tokens_T[:_ROW_TOKENS])) for s in found]
                asked = asked or _up_to_last_question(conversation.messages)
                if len(rows) >= _ROWS:
                    break
            origin = ", ".join(paths)
        except (ValueError, OSError) as error:
            _log.info("certificate: the data cannot be read again (%s); texts of its own take their place", error)
    if not rows:
        rows = [tuple(base.tokenizer(text)["input_ids"]) for text in _TEXTS]
    if prompts:
        asked = [{"role": "user", "content": prompts[0]}]
    asked = asked or [{"role": "user", "content": "Hello! Who are you?"}]
    rows = [row[: base.config.max_positions] for row in rows[:_ROWS]]
    return Exam(origin, tuple(rows), asked if base.chat_template else None)


def examine(base: Pretrained, params: Any, exam: Exam, *, dtype: str) -> Trained:
    """What the model says as it was trained, and with its weights rounded to `dtype`. All processes call it."""
    exact = _logits(base, params, exam)
    shardings = jax.tree.map(lambda x: x.sharding, params)
    if all(x.dtype == dtype for x in jax.tree.leaves(params)):
        return Trained(exact, exact)
    # Rounded in a program of its own: inside one, XLA may leave out a rounding that is followed by a widening.
    stored = jax.jit(lambda params: jax.tree.map(lambda x: x.astype(dtype), params), out_shardings=shardings)(params)
    return Trained(exact, _logits(base, stored, exam))


def certify(
    folder: pathlib.Path, base: Pretrained, exam: Exam, trained: Trained, *, shardings: Any, dtype: str
) -> dict[str, Any]:
    """Read the folder back and write its certificate; all processes call it.

    Raises:
        ValueError: the folder does not hold what was trained; CERTIFICATE.json, which is written all the same, says
            where they differ.
    """
    if not _seen_by_all(folder):
        return _file(folder, {"verdict": "not made", "reason": "the folder is not seen by every process"}, [])
    said: dict[str, Any] = {
        "dtype": dtype,
        "rows": {
            "from": exam.origin,
            "tokens": [len(row) for row in exam.rows],
            "positions_compared": sum(min(_POSITIONS, len(row)) for row in exam.rows),
        },
    }
    try:
        again = load_pretrained(folder)
        padded = dataclasses.replace(again.config, vocab_rows=base.config.vocab_rows)  # as the shardings ask for
        again = dataclasses.replace(again, config=padded)
        problems = _differences(base, again)
        params = load_params(again, shardings=shardings, dtype=dtype)
        read_RPV = _logits(again, params, exam)
    except ValueError as error:
        return _file(folder, said, [f"it cannot be read: {error}"])
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _file(folder, {"verdict": "not made", "reason": "no memory is left to read the model back"}, [])
    largest = float(np.abs(trained.stored_RPV).max())
    difference = float(np.abs(read_RPV - trained.stored_RPV).max())
    said["jax_sft"] = {
        "version": importlib.metadata.version("jax-sft"),
        "largest_logit": largest,
        "largest_difference": difference,
        "largest_difference_by_rounding": float(np.abs(trained.exact_RPV - trained.stored_RPV).max()),
        "same_top_token_after_rounding": float((trained.exact_RPV.argmax(-1) == trained.stored_RPV.argmax(-1)).mean()),
    }
    if not difference <= _OWN_TOLERANCE * largest:  # written so that NaN is a problem
        problems.append(f"logits read back differ by {difference:.3g}, where the largest is {largest:.3g}")
    if exam.messages is not None and not problems:
        said["answer"] = _answer(again, params, exam.messages)
    del params
    if jax.process_index() == 0:
        said["transformers"], more = _by_transformers(folder, base, exam, read_RPV)
        problems += more
    return _file(folder, said, problems)


def _up_to_last_question(messages: Sequence[Any]) -> list[dict[str, str]] | None:
    turns = [{"role": m.role, "content": m.content} for m in messages]
    while turns and turns[-1]["role"] != "user":
        turns.pop()
    return turns or None


def _logits(base: Pretrained, params: Any, exam: Exam) -> np.ndarray:
    """Logits at the last positions of each row, float32 [R, P, V]; a shorter row starts with zeros."""
    length = -(-max(map(len, exam.rows)) // 64) * 64
    tokens_RT = np.zeros((len(exam.rows), length), np.int32)
    segments_RT = np.zeros_like(tokens_RT)
    for tokens_T, segments_T, row in zip(tokens_RT, segments_RT, exam.rows, strict=True):
        tokens_T[: len(row)], segments_T[: len(row)] = row, 1
    lengths_R1 = segments_RT.sum(axis=1, keepdims=True)
    at_RP = lengths_R1 - _POSITIONS + np.arange(_POSITIONS)[None, :]
    sharding = jax.tree.leaves(params)[0].sharding
    whole = NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else sharding
    graphdef = build(base.config, dtype="float32", attention="auto")
    with jax.default_matmul_precision("highest"):  # a TPU's default for float32 is bfloat16 products
        logits_RPV = _last_logits(whole)(graphdef, params, tokens_RT, segments_RT, np.maximum(at_RP, 0))
    return np.where((at_RP >= 0)[:, :, None], np.asarray(logits_RPV.addressable_data(0)), np.float32(0))


@functools.lru_cache
def _last_logits(whole: jax.sharding.Sharding) -> Any:
    def logits(graphdef: Any, params: Any, tokens_RT: Any, segments_RT: Any, at_RP: Any) -> jax.Array:
        model = nnx.merge(graphdef, params)
        positions_RT = jnp.broadcast_to(jnp.arange(tokens_RT.shape[1], dtype=jnp.int32)[None, :], tokens_RT.shape)
        h_RTD = model.hidden(tokens_RT, positions_RT, segments_RT)
        return model.logits(jnp.take_along_axis(h_RTD, at_RP[:, :, None], axis=1)).astype(jnp.float32)

    return jax.jit(logits, static_argnums=0, out_shardings=whole)


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
    if any(again.tokenizer(text)["input_ids"] != base.tokenizer(text)["input_ids"] for text in _TEXTS):
        problems.append("the tokenizer cuts text otherwise")
    return problems


def _answer(model: Pretrained, params: Any, messages: Messages) -> dict[str, Any]:
    graphdef = build(model.config, dtype="float32", attention="auto")
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
    folder: pathlib.Path, base: Pretrained, exam: Exam, ours_RPV: np.ndarray
) -> tuple[dict[str, Any], list[str]]:
    """What transformers says of the folder, and what is wrong with that."""
    reason = why_not_here(base.config.num_params)
    if reason is None and jax.process_count() > 1 and base.config.num_params > _LARGEST_BESIDE_OTHERS:
        reason = "other processes would wait for it; `jax-sft export --model` on this folder does it on one host"
    if reason is not None:
        return {"skipped": reason}, []
    try:
        reading = read_by_transformers(folder, exam.rows, positions=_POSITIONS)
    except RuntimeError as error:
        return {"error": str(error)}, [f"transformers cannot read it: {error}"]
    differences = [
        float(np.abs(theirs - ours_PV[-len(theirs) :]).max())
        for theirs, ours_PV in zip(reading.logits, ours_RPV, strict=True)
    ]
    largest, difference = float(np.abs(ours_RPV).max()), max(differences)
    problems = [
        f"transformers finds {what.replace('_', ' ')}: {', '.join(reading.facts[what][:5])}"
        for what in ("missing_keys", "unexpected_keys")
        if reading.facts[what]
    ]
    if not difference <= _TRANSFORMERS_TOLERANCE * largest:
        problems.append(f"logits of transformers differ by {difference:.3g}, where the largest is {largest:.3g}")
    return {**reading.facts, "largest_difference": difference}, problems


def _seen_by_all(folder: pathlib.Path) -> bool:
    seen = (folder / "config.json").is_file()
    if jax.process_count() == 1:
        return seen
    return bool(multihost_utils.process_allgather(np.int32(seen)).min())


def _file(folder: pathlib.Path, said: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Write the certificate, from process 0, and tell of it."""
    verdict = {"verdict": "failed" if problems else "passed", "problems": problems}
    made = {"made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
    certificate = verdict | made | dict(said)
    if jax.process_index() == 0:
        certificate["sha256"] = {file.name: _sha256(file) for file in weight_files(folder)}
        partial = folder.with_name(f".{folder.name}.{CERTIFICATE}")
        partial.write_text(json.dumps(certificate, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(partial, folder / CERTIFICATE)
        for line in told(certificate):
            _log.info("certificate: %s", line)
    if problems:
        raise ValueError(
            f"{folder}: the export does not hold what was trained: {'; '.join(problems)}. See {CERTIFICATE} there; do "
            "not use it; export again, onto another disk perhaps"
        )
    return certificate


def _sha256(file: pathlib.Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def told(certificate: Mapping[str, Any]) -> list[str]:
    """A certificate in a few lines."""
    if "jax_sft" not in certificate:
        return [f"{certificate['verdict']}: {certificate.get('reason', '')}"]
    own, other, given = certificate["jax_sft"], certificate["transformers"], certificate.get("answer", {})
    largest = own["largest_logit"]
    lines = [
        f"{certificate['verdict']}, on {certificate['rows']['positions_compared']} positions of "
        f"{certificate['rows']['from']}",
        f"read back by jax_sft: largest difference {own['largest_difference']:.2g} of logits up to {largest:.3g}; "
        f"{certificate['dtype']} against what was trained: {own['largest_difference_by_rounding']:.2g}, the likeliest "
        f"token is the same at {own['same_top_token_after_rounding']:.1%}",
    ]
    if "largest_difference" in other:
        lines.append(
            f"read by transformers {other['version']}: no tensor missing or unexpected, largest difference "
            f"{other['largest_difference']:.2g}"
            if not (other["missing_keys"] or other["unexpected_keys"])
            else f"read by transformers {other['version']}: {other['missing_keys']} {other['unexpected_keys']}"
        )
    else:
        lines.append(f"not read by transformers: {other.get('skipped') or other.get('error')}")
    if "text" in given:
        end = f"and stopped after {given['tokens']} tokens" if given["stopped"] else "and did not stop by itself"
        lines.append(f"asked {given['messages'][-1]['content']!r} it answered {given['text']!r} {end}")
    return lines
