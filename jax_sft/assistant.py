"""A model with its tokenizer and template in one hand: what `jax-sft chat`, `jax-sft eval` and notebooks use.

In: a model folder, hub id or .gguf file, and adapters. Out: answers, and losses on a data set.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from jax_sft.config import DataConfig, MeshConfig
from jax_sft.data.chat import ChatTemplate
from jax_sft.data.conversation import Account
from jax_sft.data.dataset import check_context, tokenize
from jax_sft.data.loader import Loader
from jax_sft.data.source import parts_of
from jax_sft.evaluate.answers import Answer, Messages, answer, encoded_prompt
from jax_sft.evaluate.forgetting import (
    Compared,
    Drift,
    Text,
    drift_of,
    make_drift_step,
    reference_of,
    rows_of,
)
from jax_sft.evaluate.losses import Losses, evaluate_losses
from jax_sft.generate import Sampling
from jax_sft.hf.load import Pretrained, load_model
from jax_sft.hf.peft import with_template_of
from jax_sft.memory import told_if_short
from jax_sft.model.decoder import build
from jax_sft.parameters import of_adapter
from jax_sft.sharding import batch_shards, make_mesh
from jax_sft.train_step import make_eval_step


class Voice(NamedTuple):
    """A model, or a model with one of its adapters."""

    base: Pretrained
    graphdef: Any
    params: Any


class Reading(NamedTuple):
    """General texts, and what a model made of them: others are compared with it."""

    name: str
    vocab: Mapping[str, int]
    compared: Compared


@dataclasses.dataclass(frozen=True)
class Assistant:
    """A loaded model, and the adapters that were loaded with it: they share its weights, one at a time speaks."""

    base: Pretrained
    template: ChatTemplate
    graphdef: Any
    params: Any
    mesh: jax.sharding.Mesh
    voices: Mapping[str | None, Voice]  # by the adapter's name; None: the model by itself

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters, in the order in which they were asked for."""
        return tuple(name for name in self.voices if name is not None)

    def with_adapter(self, name: str | None) -> "Assistant":
        """The same model with another of its adapters, or with None by itself; nothing is copied.

        Raises:
            ValueError: it has no adapter of that name.
        """
        if name not in self.voices:
            raise ValueError(f"there is no adapter {name!r}; those loaded are {', '.join(self.adapters) or 'none'}")
        base, graphdef, params = self.voices[name]
        return dataclasses.replace(self, base=base, template=base.template, graphdef=graphdef, params=params)

    def answer(
        self,
        messages: str | Messages,
        *,
        max_new_tokens: int = 256,
        sampling: Sampling = Sampling(),
        on_token: Callable[[int, int], None] | None = None,
    ) -> Answer:
        """Answer one prompt, or one conversation that ends in a user's turn. Greedy unless `sampling` says else."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return self.answer_all([messages], max_new_tokens=max_new_tokens, sampling=sampling, on_token=on_token)[0]

    def answer_all(
        self,
        conversations: Sequence[Messages | str],
        *,
        max_new_tokens: int = 256,
        sampling: Sampling = Sampling(),
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[Answer]:
        """Answer several conversations, batched; a text among them is gone on from, without a chat template."""
        with jax.set_mesh(self.mesh), told_if_short("answer"):
            return answer(
                self.graphdef,
                self.params,
                template=self.template,
                conversations=conversations,
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                on_token=on_token,
            )

    def room(self, asked: Messages | str) -> int:
        """Tokens that an answer to a conversation may have before the model's context is full; negative: too long."""
        return self.base.config.max_positions - len(encoded_prompt(self.template, asked))

    def losses(
        self, data: Sequence[str], *, config: DataConfig = DataConfig(), batch_size: int = 8
    ) -> tuple[Losses, Account]:
        """Loss and accuracy over the trained tokens of files, by source, and what became of each row.

        `config` says how files are read and masked.

        Raises:
            ValueError: a conversation is longer than the model's context (a smaller `config.max_length` leaves it out,
                counted), the loss is not finite, or `batch_size` is below 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size = {batch_size} must be at least 1; the losses do not depend on it")
        dataset = tokenize(config, parts_of(tuple(data)), self.template, cache_dir=None)
        check_context(dataset, self.base.config.max_positions, name=str(self.base.path))
        loader = Loader(
            dataset,
            batch_size=self._spread(batch_size),
            max_length=min(config.max_length, max(int(dataset.lengths_N.max()), 512)),
            packing=config.packing,
            sources=dataset.sources,
            seed=None,
        )
        with jax.set_mesh(self.mesh), told_if_short("losses"):
            step = make_eval_step(
                self.graphdef, num_sources=len(dataset.sources), loss_chunk_tokens=1024, mesh=self.mesh
            )
            losses = evaluate_losses(
                step, self.params, frozen={}, loader=loader, mesh=self.mesh, sources=dataset.sources
            )
        if not math.isfinite(losses.loss):
            raise ValueError(
                f"{self.base.path}: its loss on {', '.join(data)} is not finite; its weights may be damaged"
            )
        return losses, dataset.account

    def reading(self, texts: Sequence[Text], *, batch_size: int = 8) -> Reading:
        """Read general texts once, so that models that were made of this one can be compared with it.

        Raises:
            ValueError: no text has two tokens.
        """
        length = min(self.base.config.max_positions, 1024)
        rows = rows_of(texts, self.template, max_length=length, batch_size=self._spread(batch_size))
        with jax.set_mesh(self.mesh), told_if_short("losses"):
            label = f"reading with {self.base.path}"
            reference = reference_of(self.graphdef, self.params, {}, loader=rows.loader, mesh=self.mesh, label=label)
        compared = Compared(rows.loader, reference, rows.bytes_by_source)
        return Reading(str(self.base.path), self.template.tokenizer.get_vocab(), compared)

    def drift(self, reading: Reading) -> Drift:
        """How far this model is from the one that did the reading.

        Raises:
            ValueError: the two do not have the same vocabulary.
        """
        is_sized_alike = reading.compared.reference.head_VX.shape[0] == self.base.config.vocab_rows
        if reading.vocab != self.template.tokenizer.get_vocab() or not is_sized_alike:
            raise ValueError(
                f"{self.base.path} has another vocabulary than {reading.name}, so that what they expect of a token "
                "cannot be compared; name the model that it was fine-tuned from"
            )
        num_sources = len(reading.compared.loader.sources)
        with jax.set_mesh(self.mesh), told_if_short("losses"):
            step = make_drift_step(self.graphdef, num_sources=num_sources, loss_chunk_tokens=1024, mesh=self.mesh)
            label = f"comparing {self.base.path}"
            return drift_of(reading.compared, step, self.params, frozen={}, mesh=self.mesh, label=label)

    def _spread(self, batch_size: int) -> int:
        """Rows of a batch, rounded up to what the mesh divides."""
        return -(-batch_size // batch_shards(self.mesh)) * batch_shards(self.mesh)


def load_assistant(
    path: str,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    chat_template: str | None = None,
    adapters: Sequence[str] = (),
) -> Assistant:
    """Load a model onto this host's devices, computing in `dtype`; rows and weights are spread over all of them.

    Args:
        adapters: folders in PEFT's format; the first one speaks. Each brings the chat template that it was trained
            with, unless `chat_template` names another.
    """
    mesh = make_mesh(MeshConfig())
    voices: dict[str | None, Voice] = {}
    with told_if_short("load"):
        base = load_model(path, revision=revision, mesh=mesh, chat_template=chat_template)
        for name, folder in _named(adapters).items():
            plan = of_adapter(folder, base)
            own = with_template_of(folder, base) if chat_template is None else base
            graphdef = build(base.config, dtype=dtype, attention="auto", lora=plan.lora)
            voices[name] = Voice(own, graphdef, plan.beside(base.params, mesh))
    voices[None] = Voice(base, build(base.config, dtype=dtype, attention="auto"), base.params)
    base, graphdef, params = next(iter(voices.values()))
    return Assistant(base=base, template=base.template, graphdef=graphdef, params=params, mesh=mesh, voices=voices)


def _named(adapters: Sequence[str]) -> dict[str, str]:
    """Folders by the last part of their paths; where two end alike, by the whole path."""
    paths = [str(pathlib.Path(folder)) for folder in dict.fromkeys(adapters)]
    last = [pathlib.Path(path).resolve().name for path in paths]
    return {path if last.count(name) > 1 else name: path for name, path in zip(last, paths, strict=True)}
