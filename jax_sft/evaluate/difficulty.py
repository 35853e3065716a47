"""How hard each conversation is for a model: the loss of its answers, with the prompt and without it.

In: a model on a mesh, a tokenised set, the answers' bare twins (`data.bare`). Out: a `Score` for each conversation, in
order (instruction-following difficulty, IFD: Li et al. 2023, arXiv 2308.12032).

    loss                  sum of nll / number of tokens, over all trained tokens of the conversation, each counted once
                          whatever its weight, given all that stands before it
    loss_without_prompt   the same over the very same tokens, each trained stretch by itself behind nothing but the
                          template's header of an answer (`data.bare`): earlier turns and earlier answers are left out
    ratio                 loss / loss_without_prompt: how little the prompt helps; above 1 it hurts

Sequences are packed into rows of one shape, a chunk of conversations at a time; a step gives the nll of each predicted
token, and sums are made in float64 on the host, so that neither packing nor mesh nor batch size can be seen in them.
Letters: B row, T position, P predicted position, N sequence, C conversation.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jax_sft.batch import Batch
from jax_sft.data.bare import Bare
from jax_sft.data.conversation import Sequence as Tokenised
from jax_sft.data.packing import fill_rows, pack, predict_capacity
from jax_sft.data.scores import Score, conversation_ends, id_of
from jax_sft.data.store import TokenizedSet
from jax_sft.loss import at_predicted, nll_of_predicted
from jax_sft.sharding import local_rows, put_batch, replicated

_LENGTH_MULTIPLE = 64
_SHORTEST_ROW = 512  # positions, where data.max_length allows it: shorter rows would be many small batches
_BATCHES_IN_CHUNK = 32  # of which the last is seldom full

Step = Callable[[Any, Any, Batch], jax.Array]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static shapes of a scoring, and which conversations are done together; a function of the set alone."""

    batch_size: int
    length: int  # T; attention pays for T in each position, so it is not longer than the data need
    predict_capacity: int  # P of rows of whole sequences; bare ones are trained nearly everywhere
    ends_C: np.ndarray  # the sequence after the last of each conversation
    chunk_ends: tuple[int, ...]  # the conversation after the last of each chunk

    @classmethod
    def of(cls, dataset: TokenizedSet, *, batch_size: int, max_length: int) -> "Plan":
        """For a set whose sequences have up to `max_length` tokens."""
        longest = max(int(dataset.lengths_N.max()), min(_SHORTEST_ROW, max_length))
        length = _rounded_up(longest)
        ends_C = conversation_ends(dataset)
        tokens_C = dataset.offsets_N1[ends_C]  # up to the end of each
        chunk_C = tokens_C // (_BATCHES_IN_CHUNK * batch_size * length)
        chunk_ends = (*(np.flatnonzero(np.diff(chunk_C)) + 1).tolist(), len(ends_C))
        predicted = predict_capacity(dataset.lengths_N, dataset.trained_N, max_length=length)
        return cls(batch_size, length, predicted, ends_C, chunk_ends)


def make_nll_step(graphdef: nnx.GraphDef, *, loss_chunk_tokens: int, mesh: Mesh) -> Step:
    """The jitted step: (params, frozen, batch with leaves [B, ...]) -> nll_BP on every device. Nothing is donated."""

    def step(params: Any, frozen: Any, batch: Batch) -> jax.Array:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            model: Any = nnx.merge(graphdef, params, frozen)
            h_BTD = model.hidden(batch.tokens_BT, batch.positions_BT, batch.segments_BT)
            h_BPD, targets_BP, _, _ = at_predicted(h_BTD, batch)
            return nll_of_predicted(
                h_BPD,
                model.head(),
                targets_BP,
                chunk_tokens=loss_chunk_tokens,
                low_rank=model.head_adapter(h_BPD),
                logit_cap=model.config.logit_cap,
                vocab_size=model.config.vocab_size,
            )

    return jax.jit(step, out_shardings=replicated(mesh))


@dataclasses.dataclass(frozen=True)
class Scorer:
    """A set, and the model that scores it."""

    forward: Callable[[Batch], jax.Array]  # see make_nll_step
    dataset: TokenizedSet
    bare: Bare
    plan: Plan
    mesh: Mesh

    def chunks(
        self, first_chunk: int = 0, progress: Callable[[int], object] = lambda done: None
    ) -> Iterator[list[Score]]:
        """The scores of each chunk, in the set's order. Every process must call it.

        Args:
            progress: told how many conversations are done, as far as that can be said of packed rows.

        Raises:
            ValueError: the loss of a conversation is not finite, or rows cannot be spread over the mesh.
        """
        starts = (0, *self.plan.chunk_ends[:-1])
        for first, last in list(zip(starts, self.plan.chunk_ends, strict=True))[first_chunk:]:
            begin = int(self.plan.ends_C[first - 1]) if first else 0
            yield self._chunk(
                begin,
                self.plan.ends_C[first:last].tolist(),
                lambda share, first=first, last=last: progress(first + int((last - first) * share)),
            )

    def _chunk(self, begin: int, ends: list[int], progress: Callable[[float], object]) -> list[Score]:
        """The scores of the conversations that begin at the sequence `begin` and end before those of `ends`."""
        whole = [self.dataset[i] for i in range(begin, ends[-1])]
        twins = [self.bare.twins(sequence) for sequence in whole]
        flat = [twin for of_sequence in twins for twin in of_sequence]
        everything, done = sum(len(sequence.tokens_T) for sequence in (*whole, *flat)), 0

        def told(tokens: int) -> None:
            nonlocal done
            done += tokens
            progress(done / everything)

        nll_N = self._nll_sums(whole, length=self.plan.length, predicted=self.plan.predict_capacity, told=told).tolist()
        # A header that the sequence itself has not may make a long answer's twin longer than the sequence.
        length = max(self.plan.length, _rounded_up(max((len(twin.tokens_T) for twin in flat), default=0)))
        of_twins = iter(self._nll_sums(flat, length=length, predicted=length, told=told).tolist())
        # Of a sequence that has no prompt, nothing is left out.
        bare_N = [
            math.fsum(next(of_twins) for _ in of_sequence) if of_sequence else nll
            for of_sequence, nll in zip(twins, nll_N, strict=True)
        ]
        found = []
        for start, end in zip([begin, *ends[:-1]], ends, strict=True):
            mine, name = slice(start - begin, end - begin), id_of(self.dataset, start)
            tokens = int(self.dataset.trained_N[start:end].sum())
            loss, bare_loss = math.fsum(nll_N[mine]) / tokens, math.fsum(bare_N[mine]) / tokens
            if not (math.isfinite(loss) and math.isfinite(bare_loss)):
                raise ValueError(
                    f"{name}: the model's loss is not finite ({loss}, without the prompt {bare_loss}); see that its "
                    "weights are whole, or set model.dtype = 'float32'"
                )
            found.append(Score.of(name, loss, bare_loss if any(twins[mine]) else None, tokens))
        return found

    def _nll_sums(
        self, sequences: Sequence[Tokenised], *, length: int, predicted: int, told: Callable[[int], None]
    ) -> np.ndarray:
        """The sum of nll over the trained tokens of each sequence, float64 [N]; whichever way they are packed."""
        lengths_N = np.asarray([len(sequence.tokens_T) for sequence in sequences], np.int64)
        trained_N = np.asarray([np.count_nonzero(sequence.weights_T) for sequence in sequences], np.int64)
        sums_N = np.zeros(len(sequences), np.float64)
        rows = pack(lengths_N, trained_N, capacity=length, predict_capacity=predicted, seed=None)
        size = self.plan.batch_size
        here = local_rows(self.mesh, batch_size=size)

        def read(nll_BP: jax.Array, packed: list[np.ndarray]) -> None:
            for nll_P, row in zip(np.asarray(jax.device_get(nll_BP), np.float64), packed, strict=False):
                places = np.cumsum([0, *trained_N[row]]).tolist()
                sums_N[row] = [nll_P[a:b].sum() for a, b in itertools.pairwise(places)]
                told(int(lengths_N[row].sum()))

        pending: tuple[jax.Array, list[np.ndarray]] | None = None
        for first in range(0, len(rows), size):
            packed = rows[first : first + size]
            filled = [[(sequences[i], 0) for i in packed[r]] if r < len(packed) else [] for r in here]
            batch = fill_rows(filled, length=length, predict_capacity=predicted, num_rows=len(here))
            placed = put_batch(batch, self.mesh, rows=here, batch_size=size)
            nll_BP = self.forward(Batch(*(x[0] for x in placed)))
            if pending is not None:  # read while the device is at work on the next one
                read(*pending)
            pending = nll_BP, packed
        if pending is not None:
            read(*pending)
        return sums_N


def _rounded_up(length: int) -> int:
    return math.ceil(length / _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
