"""A model of ours behind the harness' interface: likelihoods and answers, in batches on the mesh.

In: requests of the harness. Out: what its own backend for transformers gives for them, to rounding. What contexts and
continuations are, how they are cut and where answers end is the harness' own code (`TemplateLM`, `models.utils`), or
follows its `HFLM` (lm_eval/models/huggingface.py) where that is not to be had without torch.
"""

import contextlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jinja2
import numpy as np
from flax import nnx
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]  an extra
from lm_eval.models.utils import (  # pyright: ignore[reportMissingImports]
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import (  # pyright: ignore[reportMissingImports]
    get_rolling_token_windows,
    make_disjoint_window,
)
from tqdm import tqdm

from jax_sft.evaluate.harness import Examinee
from jax_sft.evaluate.harness.continuation import continue_until
from jax_sft.evaluate.harness.likelihood import Row, score
from jax_sft.generate import Sampling
from jax_sft.sharding import batch_shards

_log = logging.getLogger(__name__)

# What a task may say of generation beside its length and its stops.
_SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty")
_Asked = tuple[tuple[str, str] | None, list[int], list[int]]  # the texts, context and continuation


class Served(TemplateLM):
    """The harness' idea of a model.

    Raises:
        ValueError: `max_length` is more than the model has positions, or nothing can stand before a text.
    """

    def __init__(
        self, examinee: Examinee, *, batch_size: int, max_length: int | None, max_gen_toks: int, seed: int
    ) -> None:
        super().__init__()
        self.examinee = examinee
        self.template, self.tokenizer = examinee.template, examinee.template.tokenizer
        model = nnx.merge(examinee.graphdef, examinee.params)
        self.dtype, positions = str(np.dtype(model.dtype)), model.config.max_positions
        if max_length is not None and not 2 <= max_length <= positions:
            raise ValueError(f"max_length = {max_length} must be from 2 to {positions}, the positions of the model")
        self.max_length, self.max_gen_toks, self.seed = max_length or positions, max_gen_toks, seed
        shards = batch_shards(examinee.mesh)
        self.batch_size = -(-batch_size // shards) * shards
        self.cut_on_the_left = self.never_stopped = 0
        ends = [i for i in (self.tokenizer.eos_token_id, *self.template.stop_ids) if i is not None]
        if not ends:
            raise ValueError(
                f"{examinee.name}: the tokenizer has no token that ends a text; set its eos_token, which the harness "
                "also puts before texts without a context"
            )
        self._eot, self._stop_ids = ends[0], frozenset(ends)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._eot

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context: BOS if there is one."""
        bos = self.tokenizer.bos_token_id
        return self._eot if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer and its template in the harness' cache of requests: other ones give other requests."""
        name = str(self.tokenizer.name_or_path or self.examinee.name).replace("/", "__")
        return f"{name}-{self.template.fingerprint[:16]}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The Jinja text that conversations are put in; None where none was asked for."""
        return self.template.template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the model's own template writes it; without the system's turn, if it takes none."""
        try:
            return self._rendered(chat_history, add_generation_prompt)
        except jinja2.TemplateError:
            without = [message for message in chat_history if message["role"] != "system"]
            if len(without) == len(chat_history):
                raise
            _log.warning("the chat template refuses a system turn; it is left out")
            return self._rendered(without, add_generation_prompt)

    def _rendered(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        return self.tokenizer.apply_chat_template(
            messages,
            chat_template=self.template.template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; a BOS that the text brings along is not put before it again."""
        if add_special_tokens is None and string.startswith(self.tokenizer.decode([self.prefix_token_id])):
            add_special_tokens = False
        return self._encoded(string, add_special_tokens)

    def _encoded(self, string: str, add_special_tokens: bool | None) -> list[int]:
        given = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **given))

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Sum of log-probabilities (nats) of each continuation, and whether greedy decoding would write it."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or jax.process_index() > 0)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Sum of log-probabilities (nats) of each text, window by window; each token counts once."""
        windows: list[_Asked] = []
        ends: list[int] = []
        for request in requests:
            found = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            windows += [(None, *make_disjoint_window(window)) for window in found]
            ends.append(len(windows))
        scores = [logprob for logprob, _ in self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)]
        sums = [sum(scores[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def _loglikelihood_tokens(
        self, requests: Sequence[_Asked], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        rows, places = self._rows(requests)
        waiting = np.bincount([row for row, _, _ in places], minlength=len(rows)) if rows else []
        with self._precisely(), self._bar(len(requests), "scoring", disable_tqdm) as bar:

            def told(row: int) -> None:
                bar.update(int(waiting[row]))

            scored = score(
                self.examinee.graphdef,
                self.examinee.params,
                rows,
                batch_size=self.batch_size,
                mesh=self.examinee.mesh,
                on_scored=told,
            )
        answers = []
        for asked, (row, start, end) in zip(requests, places, strict=True):
            of_row, texts = scored[row], asked[0]
            logprob = float(of_row.logprob_P[start:end].sum(dtype=np.float64))
            answers.append((logprob, bool(of_row.is_best_P[start:end].all())))
            if texts is not None:  # the windows of a longer text are none of the harness' requests
                self.cache_hook.add_partial("loglikelihood", texts, answers[-1])
        return answers

    def _rows(self, requests: Sequence[_Asked]) -> tuple[list[Row], list[tuple[int, int, int]]]:
        """Rows to run, and where in them each request stands: requests that the model sees alike share one.

            context  5 6 7     continuation  8 9
            tokens   5 6 7 8   at  2 3   targets  8 9

        Such are the letters of a multiple choice: their contexts are the same, and they are not read.
        """
        asked: dict[tuple[int, ...], tuple[list[int], list[int]]] = {}
        places, cut = [], 0
        for texts, context, continuation in requests:
            self._check_continuation(texts, continuation)
            whole = [*context, *continuation]
            cut += len(whole) > self.max_length + 1
            tokens = tuple(whole[-(self.max_length + 1) : -1])
            at, targets = asked.setdefault(tokens, ([], []))
            start = len(at)
            at += range(len(tokens) - len(continuation), len(tokens))
            targets += continuation
            places.append((tokens, start, len(at)))
        self._tell_cut(cut, len(requests), self.max_length)
        numbers = {tokens: row for row, tokens in enumerate(asked)}
        rows = [Row(tokens, at, targets) for tokens, (at, targets) in asked.items()]
        return rows, [(numbers[tokens], start, end) for tokens, start, end in places]

    def _check_continuation(self, texts: tuple[str, str] | None, continuation: list[int]) -> None:
        if not 1 <= len(continuation) <= self.max_length:
            told = "a text" if texts is None else f"the continuation {texts[1][:60]!r}"
            raise ValueError(
                f"{told} has {len(continuation)} tokens of its own; it must have from 1 to {self.max_length}, what the "
                "model sees at once; leave the document out, or raise max_length"
            )

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each context, up to the first of its stop texts."""
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(i)
        answers: dict[int, str] = {}
        endless = self.never_stopped
        with self._precisely(), self._bar(len(requests), "generating", disable_tqdm) as bar:
            for group in groups.values():
                contexts = [requests[i].args[0] for i in group]

                def told(place: int, text: str, group: list[int] = group) -> None:
                    answers[group[place]] = text
                    self.cache_hook.add_partial("generate_until", requests[group[place]].args, text)
                    bar.update()

                self._generate(contexts, requests[group[0]].args[1], told)
        if self.never_stopped > endless:
            _log.warning(
                "%d of %d answers reached their last token without a stop", self.never_stopped - endless, len(requests)
            )
        return [answers[i] for i in range(len(requests))]

    def _generate(self, contexts: list[str], gen_kwargs: Mapping[str, Any], told: Callable[[int, str], None]) -> None:
        """Answer contexts that want the same; `told` is called with the place of each and its answer."""
        wanted = dict(normalize_gen_kwargs(dict(gen_kwargs), self.max_gen_toks))
        eos = self.tokenizer.decode([self.eot_token_id], skip_special_tokens=False)
        until = handle_stop_sequences(wanted.pop("until", None), eos=eos)
        max_new = wanted.pop("max_gen_toks")
        sampling = self._sampling(wanted)
        room = self.max_length - max_new
        if max_new < 1 or room < 1:
            raise ValueError(
                f"max_gen_toks = {max_new} must be at least 1 and below the {self.max_length} tokens that the model "
                "sees at once, for a prompt must fit as well; lower it in the task or in gen_kwargs"
            )
        encoded = [self._prompt(context) for context in contexts]
        prompts = [prompt[-room:] for prompt in encoded]
        self._tell_cut(sum(len(prompt) > room for prompt in encoded), len(prompts), room)
        control = self.tokenizer.get_added_vocab()
        stop_ids = self._stop_ids | {control[text] for text in until if text in control}
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
        shards = batch_shards(self.examinee.mesh)
        size = min(self.batch_size, -(-len(order) // shards) * shards)
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            filled = [*batch, *batch[-1:] * (size - len(batch))]  # another size is another program
            with jax.set_mesh(self.examinee.mesh):
                said = continue_until(
                    self.examinee.graphdef,
                    self.examinee.params,
                    [prompts[i] for i in filled],
                    tokenizer=self.tokenizer,
                    max_new_tokens=max_new,
                    stop_ids=stop_ids,
                    stop_texts=until,
                    sampling=sampling(start // size),
                )
            for i, answer in zip(batch, said, strict=False):
                self.never_stopped += not answer.ended
                text = self.tokenizer.decode(answer.tokens, skip_special_tokens=True)
                told(i, postprocess_generated_text(text, stop=until, think_end_token=None))

    def _prompt(self, context: str) -> list[int]:
        bos = self.tokenizer.bos_token
        return self._encoded(context, False if bos and context.startswith(bos) else None) or [self.prefix_token_id]

    def _sampling(self, wanted: dict[str, Any]) -> Callable[[int], Sampling]:
        """How a batch of some number is sampled: equal prompts of several batches get different answers.

        Raises:
            ValueError: the task asks for what there is not, such as beams.
        """
        sampled = wanted.pop("do_sample", False)
        given = {name: wanted.pop(name) for name in _SAMPLING if wanted.get(name) is not None}
        others = {
            name: value for name, value in wanted.items() if (name, value) != ("num_beams", 1) and value is not None
        }
        if others:
            raise ValueError(
                f"generation_kwargs has {', '.join(sorted(others))}, which this backend does not follow; it follows "
                f"until, max_gen_toks, do_sample, {', '.join(_SAMPLING)}: take it out of the task"
            )
        if not sampled:
            given = {name: value for name, value in given.items() if name == "repetition_penalty"}
        return lambda batch: Sampling(**given, seed=(self.seed + batch) % 2**32)

    def _tell_cut(self, cut: int, of: int, room: int) -> None:
        self.cut_on_the_left += cut
        if cut:
            _log.warning("%d of %d requests have more than %d tokens; their beginnings are cut off", cut, of, room)

    def _bar(self, total: int, label: str, disable: bool) -> tqdm:
        return tqdm(total=total, desc=label, unit="request", delay=2, disable=disable or jax.process_index() > 0)

    def _precisely(self) -> contextlib.AbstractContextManager[Any]:
        """A TPU's default for float32 is bfloat16 products."""
        return jax.default_matmul_precision("highest") if self.dtype == "float32" else contextlib.nullcontext()

    def get_model_info(self) -> dict[str, Any]:
        """What the harness adds to the "config" of its results."""
        leaves = jax.tree.leaves(self.examinee.params)
        return {
            "model": self.examinee.name,
            "model_num_parameters": sum(int(np.prod(x.shape)) for x in leaves),
            "model_dtype": self.dtype,
            "max_length": self.max_length,
            "cut_on_the_left": self.cut_on_the_left,
            "never_stopped": self.never_stopped,
        }
