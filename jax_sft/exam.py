"""An exam: what a model is asked before its export and after it, and what it says.

In: a model as its files describe it, parameters, the data of a run. Out: rows of tokens and one conversation; logits at
the last positions of each row; a digest of every parameter's bits.

R row, T position, P compared position (the last ones of a row), D model width, V vocabulary.
"""

import dataclasses
import functools
import itertools
import json
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from jax_sft.config import DataConfig
from jax_sft.data.chat import to_sequences
from jax_sft.data.conversation import Account
from jax_sft.data.formats import read_conversations
from jax_sft.data.source import training_parts, validation_parts
from jax_sft.evaluate.answers import Messages, check_messages, up_to_last_question
from jax_sft.hf.load import Pretrained
from jax_sft.model.decoder import build
from jax_sft.model.lora import Lora
from jax_sft.sharding import replicated

_log = logging.getLogger(__name__)

_ROWS = 4
_ROW_TOKENS = 512  # of each row: the first ones
POSITIONS = 32  # of each row: the last ones; their logits are compared
_NUDGE = 2.0**-20  # relative, of the embeddings: as much as float32 rounds in some layers
TEXTS = (
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
    digests: dict[str, int]  # of those weights, by their paths


def make_exam(base: Pretrained, data: DataConfig | None = None, prompts: Sequence[str] = ()) -> Exam:
    """Rows of the validation set (or of the training set, if there is none), and a prompt.

    Where there is no data, or its files are gone, texts of our own take their place. Process 0 decides for all.
    """
    return _from_first_process(lambda: _make_exam(base, data, prompts))


def _make_exam(base: Pretrained, data: DataConfig | None, prompts: Sequence[str]) -> Exam:
    rows: list[tuple[int, ...]] = []
    origin, asked = "texts of the certificate's own", None
    if data is not None:
        parts = validation_parts(data) or training_parts(data)
        try:
            for conversation in itertools.islice(read_conversations(data, parts, Account()), 16 * _ROWS):
                found = to_sequences(conversation, base.template, data, Account())
                rows += [tuple(map(int, s.tokens_T[:_ROW_TOKENS])) for s in found]
                if found and asked is None:
                    asked = _askable(base, up_to_last_question(conversation))
                if len(rows) >= _ROWS:
                    break
            origin = ", ".join(path for part in parts for path in part.paths) if rows else origin
        except (ValueError, OSError) as error:
            _log.info("certificate: the data cannot be read again (%s); texts of its own take their place", error)
    if not rows:
        rows = [tuple(base.tokenizer(text)["input_ids"]) for text in TEXTS]
    if prompts:
        asked = _askable(base, [{"role": "user", "content": prompts[0]}])
    asked = asked or _askable(base, [{"role": "user", "content": "Hello! Who are you?"}])
    rows = [row[: base.config.max_positions] for row in rows[:_ROWS]]
    return Exam(origin, tuple(rows), asked)


def examine(base: Pretrained, params: Any, exam: Exam, *, dtype: str) -> Trained | None:
    """What the model says as it was trained, and with its weights rounded to `dtype`. All processes call it.

    None if there is no memory for it.
    """
    try:
        exact = stored = logits_of(base, params, exam)
        if any(x.dtype != dtype for x in jax.tree.leaves(params)):
            shardings = jax.tree.map(lambda x: x.sharding, params)
            # Rounded in a program of its own: inside one, XLA may leave out a rounding that a widening follows.
            rounded = jax.jit(lambda p: jax.tree.map(lambda x: x.astype(dtype), p), out_shardings=shardings)
            params = rounded(params)
            stored = logits_of(base, params, exam)
        return Trained(exact, stored, digests_of(params))
    except (MemoryError, RuntimeError) as error:
        if not is_lack_of_memory(error):
            raise
        return None


def _askable(base: Pretrained, messages: Messages) -> Messages | None:
    """`messages`, if the model's template takes them as they are: without tool calls and tools it may not."""
    try:
        check_messages(messages)
        return messages if messages and base.chat_template and base.template.encode_prompt(messages) else None
    except ValueError:
        return None


def _from_first_process(make: Callable[[], Exam]) -> Exam:
    """What process 0 makes, on every process: others may see other files."""
    if jax.process_count() == 1:
        return make()
    text = json.dumps(dataclasses.asdict(make())).encode() if jax.process_index() == 0 else b""
    said = json.loads(broadcast(text))
    return Exam(said["origin"], tuple(map(tuple, said["rows"])), said["messages"])


def broadcast(text: bytes) -> bytes:
    """The bytes of process 0, on every process."""
    if jax.process_count() == 1:
        return text
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    held = np.frombuffer(text.ljust(length, b"\0")[:length], np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(held), np.uint8))


def is_lack_of_memory(error: Exception) -> bool:
    """Whether host or devices ran out of it."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def logits_of(base: Pretrained, params: Any, exam: Exam, *, lora: Lora | None = None) -> np.ndarray:
    """Logits at the last positions of each row, float32 [R, P, V]; a shorter row starts with zeros."""
    length = -(-max(map(len, exam.rows)) // 64) * 64
    tokens_RT = np.zeros((len(exam.rows), length), np.int32)
    segments_RT = np.zeros_like(tokens_RT)
    for tokens_T, segments_T, row in zip(tokens_RT, segments_RT, exam.rows, strict=True):
        tokens_T[: len(row)], segments_T[: len(row)] = row, 1
    lengths_R1 = segments_RT.sum(axis=1, keepdims=True)
    at_RP = lengths_R1 - POSITIONS + np.arange(POSITIONS)[None, :]
    graphdef = build(base.config, dtype="float32", attention="auto", lora=lora)
    with jax.default_matmul_precision("highest"):  # a TPU's default for float32 is bfloat16 products
        logits_RPV = _last_logits(_whole(params))(graphdef, params, tokens_RT, segments_RT, np.maximum(at_RP, 0))
    return np.where((at_RP >= 0)[:, :, None], np.asarray(logits_RPV.addressable_data(0)), np.float32(0))


@functools.lru_cache
def _last_logits(whole: jax.sharding.Sharding) -> Any:
    def logits(graphdef: Any, params: Any, tokens_RT: Any, segments_RT: Any, at_RP: Any) -> jax.Array:
        model = nnx.merge(graphdef, params)
        positions_RT = jnp.broadcast_to(jnp.arange(tokens_RT.shape[1], dtype=jnp.int32)[None, :], tokens_RT.shape)
        h_RTD = model.hidden(tokens_RT, positions_RT, segments_RT)
        return model.logits(jnp.take_along_axis(h_RTD, at_RP[:, :, None], axis=1)).astype(jnp.float32)

    return jax.jit(logits, static_argnums=0, out_shardings=whole)


def digests_of(params: Any) -> dict[str, int]:
    """A number for each parameter that follows from all its bits and their places, however it is sharded."""
    flat = {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in jax.tree.leaves_with_path(params)}
    return {path: int(np.asarray(x.addressable_data(0))) for path, x in _digests(_whole(params))(flat).items()}


@functools.lru_cache
def _digests(whole: jax.sharding.Sharding) -> Any:
    def digest(x: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
        place = jnp.zeros(x.shape, jnp.uint32)
        for axis, size in enumerate(x.shape):
            place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        mixed = bits + place * jnp.uint32(0x9E3779B9)
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # the last steps of MurmurHash3
            mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
        return (mixed ^ (mixed >> 16)).sum(dtype=jnp.uint32)  # wraps around: the same in any order

    return jax.jit(lambda flat: jax.tree.map(digest, flat), out_shardings=whole)


def _whole(params: Any) -> jax.sharding.Sharding:
    """Where every device that holds a part of the parameters holds all of a result."""
    sharding = jax.tree.leaves(params)[0].sharding
    return replicated(sharding.mesh) if isinstance(sharding, NamedSharding) else sharding


def nudged(embed_VD: jax.Array) -> jax.Array:
    """Each number a little larger or smaller in turn, in float32."""

    def nudge(embed_VD: jax.Array) -> jax.Array:
        sign_VD = 1.0 - 2.0 * (jax.lax.broadcasted_iota(jnp.int32, embed_VD.shape, 1) % 2).astype(jnp.float32)
        return embed_VD.astype(jnp.float32) * (1.0 + _NUDGE * sign_VD)

    return jax.jit(nudge, out_shardings=embed_VD.sharding)(embed_VD)
