"""Answers from a model: prompts as token ids in, new token ids out; batched, with a key-value cache.

A fixed number of rows write at one time. One prefill reads the first prompts, one jitted loop on the device writes
tokens; where rows have ended and prompts wait, a prefill of some of these replaces them, and the loop goes on:

    row 0   prompt 3 ....... prompt 9 ............
    row 1   prompt 0 .................... prompt 12 ...
    row 2   prompt 7 ....... prompt 1 ..............

Lengths are rounded up to powers of two, so that a chat whose history grows compiles a handful of programs.

B row, M row that is filled anew, T prompt position, S slot of the cache, V vocabulary, C candidate token, E stop id.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from jax_sft.model.attention import KVCache
from jax_sft.model.config import ModelConfig
from jax_sft.model.decoder import Decoder
from jax_sft.model.quantize import Quantized
from jax_sft.sharding import constrain

SHORTEST_BUCKET = 64  # tokens
STREAMED_STEPS = 8  # tokens of each row between two calls of on_token
BAR_STEPS = 16  # tokens of each row between two looks at the progress bar
ROWS_AT_ONCE = 32
REFILLED_PART = 4  # a fourth of the rows is filled anew at one time: fewer would wait less, but read prompts more often


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the filters apply in the order of transformers: penalty, temperature, k, p.

    Raises:
        ValueError: a value out of its range.
    """

    temperature: float = 0.0  # 0: the likeliest token, always
    top_k: int = 0  # only the k likeliest tokens; 0: all
    top_p: float = 1.0  # only the likeliest tokens that together reach p (Holtzman et al. 2020)
    repetition_penalty: float = (
        1.0  # above 1: tokens of the prompt and the answer become less likely (Keskar et al. 2019)
    )
    seed: int = 0  # 0 to 2**32 - 1

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:  # written so that NaN is refused
            raise ValueError(
                f"temperature = {self.temperature} must be a number of 0 or more; 0 takes the likeliest token"
            )
        if self.top_k < 0:
            raise ValueError(f"top_k = {self.top_k} must not be negative; 0 keeps all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p} must be above 0 and at most 1; 1 keeps all tokens")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(
                f"repetition_penalty = {self.repetition_penalty} must be a number above 0; 1 changes nothing"
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed = {self.seed} must be from 0 to {2**32 - 1} (2**32 - 1); choose another")


@dataclasses.dataclass(frozen=True)
class Generated:
    """One answer: its tokens without the stop id, and whether it ended by one (else by its length)."""

    tokens: list[int]
    stopped: bool


class _Rows(NamedTuple):
    """The state of the loop. Row b is tokens_BS[b, :length_B[b]]: its prompt, then its answer so far."""

    tokens_BS: jax.Array
    length_B: jax.Array
    stopped_B: jax.Array
    logits_BV: jax.Array  # for the token that follows
    cache: KVCache
    steps: jax.Array  # of the loop, all calls together


class _Asked(NamedTuple):
    """Which prompt each row answers, and how long that is; int32."""

    prompt_B: np.ndarray
    length_B: np.ndarray

    def replaced(self, places: Sequence[int], prompts: Sequence[int], length_M: np.ndarray) -> "_Asked":
        """With other prompts in some rows."""
        prompt_B, length_B = self.prompt_B.copy(), self.length_B.copy()
        prompt_B[places], length_B[places] = prompts, length_M[: len(places)]
        return _Asked(prompt_B, length_B)


class _Limits(NamedTuple):
    """When one call of the loop ends; int32 scalars."""

    tokens: np.int32  # of an answer
    steps: np.int32  # of this call
    ended: np.int32  # rows: with so many it pays to look after them


def generate(
    graphdef: nnx.GraphDef[Decoder],
    params: Mapping[str, Any],
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    pad_id: int,
    sampling: Sampling,
    on_token: Callable[[int, int], None] | None = None,
    rows_at_once: int = ROWS_AT_ONCE,
) -> list[Generated]:
    """Continue each prompt until a stop id or `max_new_tokens`; prompts do not see each other.

    What is drawn for a prompt depends on the seed, its place among the prompts and its own past alone.

    Args:
        prompts: token ids, of any lengths.
        pad_id: any id of the vocabulary; it fills rows up and has no effect.
        on_token: called with (prompt, token), each prompt's in order, as tokens come, a few at a time; never with a
            stop id.
        rows_at_once: how many prompts are answered at one time; the cache has room for as many of the longest.

    Raises:
        ValueError: an empty prompt, an id outside the vocabulary, more tokens than the model has positions, or no rows.
    """
    if not prompts:
        return []
    model = nnx.merge(graphdef, params)
    _check(prompts, max_new_tokens, pad_id, model.config, rows_at_once)
    params = _cast(params, dtype=model.dtype)  # once, and not at every token
    count = min(len(prompts), rows_at_once)
    part = max(1, count // REFILLED_PART)
    first, waiting = _in_order(prompts, count)
    tokens_BT, length_B = _padded([prompts[i] for i in first], count, pad_id)
    asked = _Asked(np.array(first, np.int32), length_B)
    slots = _bucket(max(map(len, prompts)) + max_new_tokens)
    rows = _prefill(graphdef, params, tokens_BT, length_B, slots=slots)

    stop_E = np.array(sorted(set(stop_ids)), np.int32)
    settings = dataclasses.replace(sampling, seed=0)  # a new seed is no new program
    stride = BAR_STEPS if on_token is None else STREAMED_STEPS
    limits = functools.partial(_Limits, np.int32(max_new_tokens), np.int32(stride))
    answers = [Generated([], False)] * len(prompts)
    with _bar(len(prompts) * max_new_tokens, shown=on_token is None) as bar:
        while True:
            enough = np.int32(min(part, len(waiting)) or count)
            rows = _continue(
                graphdef, params, rows, stop_E, asked, limits(enough), np.uint32(sampling.seed), settings=settings
            )
            said = _answers(rows, asked.length_B)
            bar.update(_tell(asked.prompt_B.tolist(), said, answers, on_token))
            ended = [b for b, answer in enumerate(said) if answer.stopped or len(answer.tokens) == max_new_tokens]
            if not waiting and len(ended) == count:
                return answers
            while waiting and len(ended) >= min(part, len(waiting)):
                next_ones, waiting = waiting[:part], waiting[part:]
                places, ended = ended[: len(next_ones)], ended[len(next_ones) :]
                tokens_MT, length_M = _padded([prompts[i] for i in next_ones], part, pad_id)
                place_M = np.array(places + [count] * (part - len(places)), np.int32)
                rows = _refill(graphdef, params, rows, tokens_MT, length_M, place_M)
                asked = asked.replaced(places, next_ones, length_M)


def _in_order(prompts: Sequence[Sequence[int]], count: int) -> tuple[list[int], list[int]]:
    """The prompts to begin with, and those that wait: the shortest first, so that few are filled up."""
    order = list(range(len(prompts)))
    if len(prompts) > count:
        order.sort(key=lambda i: len(prompts[i]))
    return order[:count], order[count:]


def _padded(prompts: Sequence[Sequence[int]], count: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` rows of tokens and their lengths; those without a prompt hold one token."""
    tokens_BT = np.full((count, _bucket(max(map(len, prompts)))), pad_id, np.int32)
    length_B = np.ones(count, np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, : len(prompt)] = prompt
        length_B[row] = len(prompt)
    return tokens_BT, length_B


def _tell(
    prompts: Sequence[int],
    said: Sequence[Generated],
    answers: list[Generated],
    on_token: Callable[[int, int], None] | None,
) -> int:
    """Put what the rows say to their prompts into `answers`, and tell what is new; how many tokens that is."""
    count = 0
    for prompt, answer in zip(prompts, said, strict=True):
        new = answer.tokens[len(answers[prompt].tokens) :]
        answers[prompt] = answer
        count += len(new)
        if on_token is not None:
            for token in new:
                on_token(prompt, token)
    return count


def _bar(total: int, *, shown: bool) -> tqdm:
    """Counts the tokens of all rows; rows that stop early end it early."""
    disable = not shown or jax.process_index() > 0
    return tqdm(total=total, desc="generating", unit="tokens", delay=2, leave=False, disable=disable)


def _check(
    prompts: Sequence[Sequence[int]], max_new_tokens: int, pad_id: int, config: ModelConfig, rows_at_once: int
) -> None:
    if rows_at_once < 1:
        raise ValueError(
            f"rows_at_once = {rows_at_once} must be at least 1; it is how many prompts are answered together"
        )
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens = {max_new_tokens} must be at least 1")
    if not 0 <= pad_id < config.vocab_size:
        raise ValueError(f"pad_id = {pad_id} is outside the vocabulary of {config.vocab_size}; any id in it will do")
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {row} is empty; give at least one token, e.g. the model's BOS")
        if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
            raise ValueError(
                f"prompt {row} holds an id outside the vocabulary of {config.vocab_size}; use this model's tokenizer"
            )
        if len(prompt) + max_new_tokens > config.max_positions:
            raise ValueError(
                f"prompt {row} has {len(prompt)} tokens; with max_new_tokens = {max_new_tokens} it exceeds the model's "
                f"{config.max_positions} positions; shorten one of them"
            )


def _bucket(length: int) -> int:
    return max(SHORTEST_BUCKET, 1 << (length - 1).bit_length())


def _answers(rows: _Rows, prompt_length_B: np.ndarray) -> list[Generated]:
    tokens_BS, length_B, stopped_B = jax.device_get((rows.tokens_BS, rows.length_B, rows.stopped_B))
    spans = zip(tokens_BS, prompt_length_B, length_B, stopped_B, strict=True)
    return [Generated(tokens_S[start:end].tolist(), bool(stopped)) for tokens_S, start, end, stopped in spans]


@functools.partial(jax.jit, static_argnames="dtype")
def _cast(params: Any, *, dtype: Any) -> Any:
    def cast(weights: Any) -> Any:
        return weights if isinstance(weights, Quantized) else weights.astype(dtype)

    return jax.tree.map(cast, params, is_leaf=lambda node: isinstance(node, Quantized))


@functools.partial(jax.jit, static_argnames=("graphdef", "slots"))
def _prefill(
    graphdef: nnx.GraphDef[Decoder], params: Any, tokens_BT: jax.Array, length_B: jax.Array, *, slots: int
) -> _Rows:
    B, T = tokens_BT.shape
    logits_BV, cache = nnx.merge(graphdef, params).prefill(tokens_BT, length_B, slots=slots)
    tokens_BS = jnp.pad(tokens_BT, [(0, 0), (0, slots - T)])
    return _readable(_Rows(tokens_BS, length_B, jnp.zeros(B, bool), logits_BV, cache, jnp.int32(0)))


@functools.partial(jax.jit, static_argnames="graphdef", donate_argnames="rows")
def _refill(
    graphdef: nnx.GraphDef[Decoder],
    params: Any,
    rows: _Rows,
    tokens_MT: jax.Array,
    length_M: jax.Array,
    place_M: jax.Array,
) -> _Rows:
    """Read prompts and put them into the rows `place_M`, where others have ended; a place that is no row is left out.

    What the last prompt has left behind the new one's tokens is never seen: `length_B` hides it.
    """
    T = tokens_MT.shape[1]
    logits_MV, new = nnx.merge(graphdef, params).prefill(tokens_MT, length_M, slots=T)
    cache = KVCache(
        k_LBSKH=rows.cache.k_LBSKH.at[:, place_M, :T].set(new.k_LBSKH, mode="drop"),
        v_LBSKH=rows.cache.v_LBSKH.at[:, place_M, :T].set(new.v_LBSKH, mode="drop"),
        length_B=rows.cache.length_B.at[place_M].set(length_M, mode="drop"),
    )
    return _readable(
        _Rows(
            tokens_BS=rows.tokens_BS.at[place_M, :T].set(tokens_MT, mode="drop"),
            length_B=rows.length_B.at[place_M].set(length_M, mode="drop"),
            stopped_B=rows.stopped_B.at[place_M].set(False, mode="drop"),
            logits_BV=rows.logits_BV.at[place_M].set(logits_MV, mode="drop"),
            cache=cache,
            steps=rows.steps,
        )
    )


@functools.partial(jax.jit, static_argnames=("graphdef", "settings"), donate_argnames="rows")
def _continue(
    graphdef: nnx.GraphDef[Decoder],
    params: Any,
    rows: _Rows,
    stop_E: jax.Array,
    asked: _Asked,
    limits: _Limits,
    seed: jax.Array,
    *,
    settings: Sampling,
) -> _Rows:
    """Write tokens until enough rows have stopped or are as long as an answer may be, or for so many steps."""
    model = nnx.merge(graphdef, params)
    slots_S = jnp.arange(rows.tokens_BS.shape[1], dtype=jnp.int32)
    last_step = rows.steps + limits.steps

    def is_open(rows: _Rows) -> jax.Array:
        return ~rows.stopped_B & (rows.length_B - asked.length_B < limits.tokens)

    def goes_on(rows: _Rows) -> jax.Array:
        return ((~is_open(rows)).sum(dtype=jnp.int32) < limits.ended) & (rows.steps < last_step)

    def step(rows: _Rows) -> _Rows:
        held_BS = slots_S[None, :] < rows.length_B[:, None]
        logits_BV = penalize(rows.logits_BV, rows.tokens_BS, held_BS, settings.repetition_penalty)
        token_B = _choose(logits_BV, rows.length_B - asked.length_B, jnp.asarray(asked.prompt_B), seed, settings)
        is_stop_B = (token_B[:, None] == stop_E[None, :]).any(axis=1)
        stopped_B = is_open(rows) & is_stop_B
        writes_B = is_open(rows) & ~is_stop_B
        here_BS = (slots_S[None, :] == rows.length_B[:, None]) & writes_B[:, None]
        logits_BV, cache = model.decode(token_B, rows.cache)
        return _Rows(
            tokens_BS=jnp.where(here_BS, token_B[:, None], rows.tokens_BS),
            length_B=rows.length_B + writes_B.astype(jnp.int32),
            stopped_B=rows.stopped_B | stopped_B,
            logits_BV=logits_BV,
            cache=cache,
            steps=rows.steps + 1,
        )

    return _readable(jax.lax.while_loop(goes_on, step, rows))


def _readable(rows: _Rows) -> _Rows:
    read = {name: _on_every_process(getattr(rows, name)) for name in ("tokens_BS", "length_B", "stopped_B")}
    cache = rows.cache._replace(
        k_LBSKH=constrain(rows.cache.k_LBSKH, "LBSKH"), v_LBSKH=constrain(rows.cache.v_LBSKH, "LBSKH")
    )
    return rows._replace(**read, cache=cache)


def _on_every_process(x: jax.Array) -> jax.Array:
    """Whole on each device, so that each process can read it."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, jax.P())


def penalize(logits_BV: jax.Array, tokens_BS: jax.Array, held_BS: jax.Array, penalty: float) -> jax.Array:
    """Make tokens that a row holds already less likely; as transformers' `RepetitionPenaltyLogitsProcessor`."""
    if penalty == 1:
        return logits_BV
    B, V = logits_BV.shape
    rows_B1 = jnp.arange(B, dtype=jnp.int32)[:, None]
    seen_BV = jnp.zeros((B, V), bool).at[rows_B1, jnp.where(held_BS, tokens_BS, V)].set(True, mode="drop")
    penalized_BV = jnp.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
    return jnp.where(seen_BV, penalized_BV, logits_BV)


def candidates(logits_BV: jax.Array, sampling: Sampling) -> tuple[jax.Array, jax.Array]:
    """Tokens that may follow and their logits at the temperature, both [B, C]; -inf where a filter has dropped one.

    The token that makes the sum reach `top_p` is kept; among equal logits the lower id comes first.
    """
    B, V = logits_BV.shape
    logits_BV = logits_BV / sampling.temperature
    if sampling.top_k == 0 and sampling.top_p == 1:
        return jnp.broadcast_to(jnp.arange(V, dtype=jnp.int32)[None, :], (B, V)), logits_BV
    logits_BC, ids_BC = jax.lax.top_k(logits_BV, min(sampling.top_k, V) or V)
    if sampling.top_p == 1:
        return ids_BC, logits_BC
    shares_BC = jax.nn.softmax(logits_BC, axis=-1)
    likelier_BC = jnp.cumsum(shares_BC, axis=-1) - shares_BC
    return ids_BC, jnp.where(likelier_BC < sampling.top_p, logits_BC, -jnp.inf)


def _choose(
    logits_BV: jax.Array, drawn_B: jax.Array, prompt_B: jax.Array, seed: jax.Array, sampling: Sampling
) -> jax.Array:
    """The next token of each row; its draws depend on the seed, its prompt's place among all and its past alone."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    ids_BC, logits_BC = candidates(logits_BV, sampling)

    def draw(prompt: jax.Array, drawn: jax.Array, logits_C: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), prompt), drawn)
        return jax.random.categorical(key, logits_C)

    drawn_B1 = jax.vmap(draw)(prompt_B, drawn_B, logits_BC)[:, None]
    return jnp.take_along_axis(ids_BC, drawn_B1, axis=1)[:, 0]
