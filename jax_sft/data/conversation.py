"""The nouns of the data room: what is read (Conversation), what is trained on (Sequence), what became of it (Account).

In: rows that a reader turned into messages. Out: token arrays, shifted once, and a count of everything that was not
kept as it came. Numpy only: a data worker never starts jax.

Letters: T position in a sequence.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

EXAMPLES_PER_REASON = 5
EXCERPT_CHARACTERS = 300


class DataError(ValueError):
    """The data cannot be trained on as it is; the message says where, what was found and one way out."""


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str
    train: bool | None = None  # None: as data.train_on and data.train_turns say
    weight: float = 1.0  # of the loss on this turn's tokens, where it is trained
    extra: Mapping[str, Any] = dataclasses.field(
        default_factory=dict
    )  # reasoning_content, tool_calls, name, ...: for the template


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A row that was tokenised elsewhere."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]  # of learning each of them, at its own place


@dataclasses.dataclass(frozen=True)
class Conversation:
    """What one row of the data says, before there are tokens."""

    messages: tuple[Message, ...]
    source: str  # the mixture's word for where it comes from: losses are summed by it
    id: str  # where it was read: "file:line" or "file[row]"
    tools: tuple[Any, ...] = ()
    text: str | None = None  # a plain text to continue: no template, every token trained
    prompt_text: str | None = None  # stands before `text` and is not trained; the end token after `text` is
    tokens: Tokens | None = None  # instead of messages and text
    template_args: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # for the chat template: enable_thinking
    loss_weight: float = 1.0  # times the weight of each trained token
    where: str = dataclasses.field(default="", compare=False)  # it was read, whatever the row says its id is


@dataclasses.dataclass(frozen=True)
class Sequence:
    """Tokens to train on, shifted here, once: position t holds `tokens_T[t]` and must predict `targets_T[t]`.

    The five tokens [1 2 3 4 5], of which 4 and 5 are trained, give length four:

        tokens_T    1 2 3 4
        targets_T   2 3 4 5
        weights_T   0 0 1 1     the weight of predicting targets_T
    """

    tokens_T: np.ndarray  # int32
    targets_T: np.ndarray  # int32
    weights_T: np.ndarray  # float32
    source: str
    id: str


@dataclasses.dataclass
class Account:
    """What went in, what came out, and why the rest did not: nothing is lost in silence."""

    read: int = 0  # conversations
    kept: int = 0  # conversations that gave at least one sequence
    held_out: int = 0  # conversations that go to validation
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)  # reason -> conversations
    # Of each reason, change or note the first few places, and what was found in each of them ("" where nobody says).
    examples: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    excerpts: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    altered: dict[str, int] = dataclasses.field(default_factory=dict)  # kept, but not as it came -> conversations
    noted: dict[str, int] = dataclasses.field(default_factory=dict)  # left as it came, but odd -> conversations
    method: dict[str, int] = dataclasses.field(default_factory=dict)  # how trained spans were found -> conversations

    def drop(self, reason: str, where: str, excerpt: str = "") -> None:
        """Count one conversation that is not trained on."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        self._exemplify(reason, where, excerpt)

    def alter(self, what: str, where: str, excerpt: str = "") -> None:
        """Count one conversation that is trained on, but not as it came."""
        self.altered[what] = self.altered.get(what, 0) + 1
        self._exemplify(what, where, excerpt)

    def note(self, what: str, where: str, excerpt: str = "") -> None:
        """Count one conversation that stays as it came, but has something that one would want to know."""
        self.noted[what] = self.noted.get(what, 0) + 1
        self._exemplify(what, where, excerpt)

    def use(self, method: str) -> None:
        """Count one conversation whose trained spans were found by `method`."""
        self.method[method] = self.method.get(method, 0) + 1

    def merge(self, other: "Account") -> None:
        """Add another account (of another file or worker) to this one, in place."""
        self.read += other.read
        self.kept += other.kept
        self.held_out += other.held_out
        for mine, theirs in (
            (self.dropped, other.dropped),
            (self.altered, other.altered),
            (self.noted, other.noted),
            (self.method, other.method),
        ):
            for key, count in theirs.items():
                mine[key] = mine.get(key, 0) + count
        for reason, places in other.examples.items():
            for where, excerpt in zip(places, other.excerpts[reason], strict=True):
                self._exemplify(reason, where, excerpt)

    def __add__(self, other: "Account") -> "Account":
        total = Account()
        total.merge(self)
        total.merge(other)
        return total

    def lines(self) -> list[str]:
        """The account as text for the terminal: one line, and one more for each thing that one may have to look at."""
        methods = ", ".join(f"{m} ({n})" for m, n in self.method.items())
        out = [f"read {self.read}, kept {self.kept}, dropped {sum(self.dropped.values())}"]
        out[0] += f", held out {self.held_out} ({self.held_out / self.read:.1%})" if self.held_out else ""
        out[0] += f"; trained spans found by {methods}" if methods else ""
        for kind, counts in (("dropped", self.dropped), ("altered", self.altered), ("noted", self.noted)):
            for what, count in sorted(counts.items(), key=lambda item: -item[1]):
                places = self.examples.get(what)
                out.append(f"  {kind} {count}: {what}" + (f" (first: {', '.join(places)})" if places else ""))
        return out

    def _exemplify(self, what: str, where: str, excerpt: str) -> None:
        places = self.examples.setdefault(what, [])
        if len(places) < EXAMPLES_PER_REASON:
            places.append(where)
            self.excerpts.setdefault(what, []).append(excerpt[:EXCERPT_CHARACTERS])
