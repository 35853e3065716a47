"""A conversation in the terminal: lines in, answers out while their tokens come, the history kept as far as it fits.

In: an Assistant and how to sample. Out: text on stdout.
"""

from jax_sft.assistant import Assistant
from jax_sft.generate import Sampling


def talk(assistant: Assistant, history: list[dict[str, str]], *, sampling: Sampling, max_new_tokens: int) -> None:
    """Answer lines from stdin until /quit or its end; `history` is what every conversation begins with."""
    switch = "/adapter NAME takes another adapter, /adapter none; " if assistant.adapters else ""
    print(f"Type a message; {switch}/new starts over, /quit or Ctrl-D ends, Ctrl-C cuts an answer short.")
    if assistant.adapters:
        print(f"adapters: {', '.join(assistant.adapters)}; the first one speaks")
    start, history = history, list(history)
    while True:
        try:
            line = input("\n> ").strip()
        except EOFError:
            print()
            return
        if line == "/quit":
            return
        if line == "/new":
            history = list(start)
            continue
        if not line:
            continue
        if line.split()[0] == "/adapter":
            assistant = _switched(assistant, line.removeprefix("/adapter").strip())
            continue
        history.append({"role": "user", "content": line})
        printed = _StreamedText(assistant)
        try:
            history = _shortened(assistant, history, keep=len(start), max_new_tokens=max_new_tokens)
            text = assistant.answer(
                history, max_new_tokens=max_new_tokens, sampling=sampling, on_token=printed.add
            ).text
        except KeyboardInterrupt:
            text = printed.shown
        except ValueError as error:  # this message cannot be answered; the conversation goes on without it
            history.pop()
            print(f"jax-sft: {error}")
            continue
        printed.finish(text)
        history.append({"role": "assistant", "content": text})


def _switched(assistant: Assistant, name: str) -> Assistant:
    """With the adapter of that name, if there is one; the conversation goes on."""
    try:
        assistant = assistant.with_adapter(None if name == "none" else name)
    except ValueError as error:
        print(f"jax-sft: {error}")
    return assistant


def _shortened(
    assistant: Assistant, history: list[dict[str, str]], *, keep: int, max_new_tokens: int
) -> list[dict[str, str]]:
    """The history without its oldest turns, as far as the model's context asks for it; the system message stays."""
    dropped = 0
    while len(history) > keep + 2 and assistant.room(history) < max_new_tokens:
        history = history[:keep] + history[keep + 2 :]
        dropped += 2
    if dropped:
        print(f"(the context is full: the oldest {dropped} messages were forgotten)")
    return history


class _StreamedText:
    """Prints an answer while its tokens come; a character is held back until all its bytes are there."""

    def __init__(self, assistant: Assistant) -> None:
        self._tokenizer = assistant.template.tokenizer
        self._tokens: list[int] = []
        self.shown = ""

    def add(self, row: int, token: int) -> None:
        del row
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens, skip_special_tokens=True).lstrip()
        if text.startswith(self.shown) and not text.endswith("\ufffd"):
            print(text[len(self.shown) :], end="", flush=True)
            self.shown = text

    def finish(self, text: str) -> None:
        print(text[len(self.shown) :] if text.startswith(self.shown) else "")
