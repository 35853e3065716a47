"""One narrow face over a tokenizer and its chat template, for training and inference alike.

In: a Hugging Face fast tokenizer, a Jinja text, messages. Out: the rendering, its token ids and the characters of each,
the stop ids. Control text inside messages is escaped before the template sees it and encoded as text (control.py).
"""

import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from jax_sft.config import TEMPLATES
from jax_sft.data.control import BrokenTextError, ControlText
from jax_sft.data.conversation import DataError, Message
from jax_sft.data.facts import Dicts, Facts, NoFitError, RefusedError
from jax_sft.data.words import Encoded, Words

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
WAY_OUT = "set model.chat_template to a copy of the template with {% generation %} marks around what is trained"


def named_template(name: str, tokenizer: Any) -> str:
    """The Jinja text of a template of ours (`TEMPLATES` of the config), for models that have none.

    Raises:
        DataError: the tokenizer lacks a token that the template writes.
    """
    text = (pathlib.Path(__file__).parent / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in sorted(set(re.findall(r"<\|\w+\|>", text))) if token not in vocabulary]
    if "eos_token" in text and tokenizer.eos_token is None:
        missing.append("an eos_token")
    if missing:
        raise DataError(
            f"model.chat_template = {name!r} needs {' and '.join(missing)}, which the tokenizer does not have; choose "
            f"another of {', '.join(TEMPLATES)}, or name a Jinja file"
        )
    return text


def with_defaults(template: str, arguments: Mapping[str, Any]) -> str:
    """A template that renders as if it were given these arguments, wherever it is not given others.

    So a model that was trained with `enable_thinking` false is served so by whoever reads its folder. Values are what
    JSON can hold.
    """
    sets = [f"{{%- if {name} is not defined %}}{{%- set {name} = {_literal(v)} %}}{{%- endif %}}" for name, v in
            arguments.items()]  # fmt: skip
    # The newline is taken off again behind a block, and the template still begins a line, as some count on.
    return "".join([*sets, "\n", template]) if sets else template


def _literal(value: Any) -> str:
    """A value as Jinja writes it."""
    match value:
        case None | bool():
            return str(value).lower()
        case str():
            return ascii(value)
        case Mapping():
            return "{" + ", ".join(f"{str(k)!a}: {_literal(v)}" for k, v in value.items()) + "}"
        case list() | tuple():
            return "[" + ", ".join(map(_literal, value)) + "]"
    return repr(value)


class BrokenTemplateError(DataError):
    """A chat template is no Jinja text, or writes no conversation at all: no row is to blame."""


def check_template(text: str, *, name: str) -> None:
    """Compile a template.

    Raises:
        BrokenTemplateError: it is no Jinja text, with `name` and the line.
    """
    try:
        render_jinja_template(conversations=[[]], chat_template=text)
    except jinja2.TemplateSyntaxError as error:
        raise _broken(name, error) from error
    except Exception:  # noqa: BLE001  a template is a program: what it does with no messages is its own affair
        return


def _broken(name: str, error: jinja2.TemplateSyntaxError) -> BrokenTemplateError:
    return BrokenTemplateError(
        f"{name} is not valid Jinja, line {error.lineno}: {error.message}; correct it, or set model.chat_template to "
        f"one of {', '.join(TEMPLATES)}, or to another Jinja file"
    )


class ChatTemplate:
    """One narrow face over a tokenizer and its chat template.

    Args:
        tokenizer: a Hugging Face fast tokenizer.
        template: Jinja text that replaces the tokenizer's own.
        stop_ids: ids that end an answer according to the model's generation config; those outside the vocabulary are
            left out.
        name: what errors call the template.

    Raises:
        DataError: the tokenizer is not a fast one.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        template: str | None = None,
        stop_ids: Sequence[int] = (),
        name: str = "the chat template",
    ):
        if not getattr(tokenizer, "is_fast", False):
            raise DataError(
                f"the tokenizer is a {type(tokenizer).__name__} without character offsets; use a model folder that has "
                "a tokenizer.json"
            )
        self.tokenizer, self.name = tokenizer, name
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self.special_tokens = dict(tokenizer.special_tokens_map)  # templates read bos_token and eos_token
        self._template = template if template is not None else _own_template(tokenizer)
        self._facts: dict[str, tuple[Facts, bool]] = {}  # by the arguments of the template
        self._given_stop_ids = tuple(i for i in stop_ids if self._backend.id_to_token(i) is not None)

    @property
    def template(self) -> str:
        """The Jinja text.

        Raises:
            DataError: there is none.
        """
        if self._template is None:
            raise DataError(
                "the tokenizer has no chat template, as is usual for a base model; set model.chat_template to one of "
                f"{', '.join(TEMPLATES)}, or to a Jinja file"
            )
        return self._template

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: what the template writes behind one first, then those given."""
        if self._template is None:
            eos = self.tokenizer.eos_token_id
            return tuple(dict.fromkeys([*([] if eos is None else [eos]), *self._given_stop_ids]))
        return tuple(dict.fromkeys([*map(self._backend.token_to_id, self.facts.stops), *self._given_stop_ids]))

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex digest of everything that decides tokens and masks: vocabulary, template, stop ids."""
        parts = [self._backend.to_str(), self._template or "", str(self._given_stop_ids), str(self.special_tokens)]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def render(self, messages: Sequence[Any], *, tools: Sequence[Any] = (), add_generation_prompt: bool = False) -> str:
        """The text that the model sees for these messages (`Message`s, or mappings with role and content).

        Raises:
            DataError: the template refuses the messages.
        """
        chat = self.prepare(messages, tools=tools)
        return self.control.restore(_or_data_error(chat, add_generation_prompt))

    def encode_prompt(self, messages: Sequence[Any], *, tools: Sequence[Any] = ()) -> list[int]:
        """Token ids of the history and the generation prompt; text in a message never becomes a control token.

        Raises:
            DataError: the template refuses the messages.
        """
        chat = self.prepare(messages, tools=tools)
        return self.encode(_or_data_error(chat, True), escaped=chat.escaped).ids

    @functools.cached_property
    def control(self) -> ControlText:
        """The control tokens of this tokenizer and template."""
        return ControlText(self._backend, self._template or "")

    @functools.cached_property
    def _words(self) -> Words:
        return Words(self._backend)

    @property
    def facts(self) -> Facts:
        """What the template writes around an answer.

        Raises:
            DataError: the template cannot be followed, whatever the conversation.
        """
        return self._probed({})[0]

    def _probed(self, arguments: Mapping[str, Any]) -> tuple[Facts, bool]:
        """The facts under these arguments (Qwen 3 opens an answer otherwise if told not to think), and whether the
        template wants contents as lists of parts (templates of vision models do)."""
        key = json.dumps(arguments, sort_keys=True, default=str) if arguments else ""
        if key not in self._facts:
            self._facts[key] = self._probe(arguments)
        return self._facts[key]

    def _probe(self, arguments: Mapping[str, Any]) -> tuple[Facts, bool]:
        given = [self._backend.id_to_token(i) for i in self._given_stop_ids]
        problems = []
        for as_parts in (False, True):
            chat = Chat(self, (), arguments=arguments, as_parts=as_parts)
            try:
                facts = Facts.probe(
                    chat,
                    control=self.control.pattern,
                    tagged=bool(_MARKED.search(self.template)),
                    eos=self.tokenizer.eos_token,
                    stops=given,
                )
            except (RefusedError, NoFitError) as error:
                problems.append(str(error))
                continue
            bos = self.tokenizer.bos_token
            if bos and chat.plain([{"role": "user", "content": "?"}], prompt=True).startswith(bos + bos):
                raise DataError(
                    f"the chat template writes {bos!r} twice at the start; correct it in model.chat_template"
                )
            return facts, as_parts
        raise BrokenTemplateError(
            f"the chat template fails on a question and an answer ({problems[0]}); correct it, or {WAY_OUT}"
        )

    def prepare(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        *,
        tools: Sequence[Any] = (),
        arguments: Mapping[str, Any] | None = None,
    ) -> "Chat":
        """Messages as the template takes them, control text escaped; `arguments` are the template's own.

        Raises:
            BrokenTextError: a message cannot be told from what the program itself marks.
        """
        arguments = arguments or {}
        facts, as_parts = self._probed(arguments)
        dicts = [_as_dict(m) for m in messages]
        found = any(map(self.control.found_in_message, dicts)) or self.control.found_in(tools)
        if found:
            dicts = [self.control.escape(m, role=m["role"]) for m in dicts]
            tools = self.control.escape(tools)
        return Chat(self, tools, arguments=arguments, messages=dicts, escaped=found, as_parts=as_parts, facts=facts)

    def encode(self, text: str, *, escaped: bool) -> Encoded:
        """The tokens of a rendering; nothing is added.

        Raises:
            BrokenTextError: the text is no valid Unicode.
        """
        try:
            if escaped:
                return self.control.encode(text)
            self._backend.encode_special_tokens = False
            return self._words.encode(text)
        except (UnicodeEncodeError, TypeError) as error:
            raise BrokenTextError("a text holds half of a surrogate pair, which is no character; repair it") from error

    def encode_text(self, text: str, *, prompt: str = "") -> tuple[list[int], int]:
        """Token ids of a prompt and the text behind it, and how many of them end within the prompt.

        They stand behind the BOS, if the tokenizer is used to write one, and are closed by the EOS. Prompt and text are
        tokenised as one, as TRL does, so that the text alone is no other text (some tokenizers begin it with a space).

        Here control tokens are taken as they are written: such texts often are conversations rendered beforehand.

        Raises:
            DataError: the tokenizer has no eos_token.
        """
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise DataError("a text cannot be ended, the tokenizer has no eos_token; name one in tokenizer_config.json")
        encoded = self.encode(prompt + text, escaped=False)
        ids = encoded.ids
        if not ids:
            return [], 0
        before = self._bos_before(ids)
        num_prompt_tokens = encoded.ending_by(len(prompt)) if prompt else 0
        return [*before, *ids, *([] if ids[-1] == eos else [eos])], len(before) + num_prompt_tokens

    def encode_beginning(self, text: str) -> list[int]:
        """Token ids of a text that a model is to go on from, behind the BOS if the tokenizer is used to write one."""
        ids = self.encode(text, escaped=False).ids
        return [*self._bos_before(ids), *ids]

    def _bos_before(self, ids: Sequence[int]) -> list[int]:
        bos = self.tokenizer.bos_token_id
        return [bos] if bos is not None and self._adds_bos and ids[:1] != [bos] else []

    @functools.cached_property
    def _adds_bos(self) -> bool:
        return self.tokenizer("a", add_special_tokens=True)["input_ids"][0] == self.tokenizer.bos_token_id

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, control tokens included."""
        return self._backend.decode(list(ids), skip_special_tokens=False)


class Chat:
    """Messages ready for a template, and the template as a function of them (Renderer)."""

    def __init__(
        self,
        template: ChatTemplate,
        tools: Sequence[Any],
        *,
        arguments: Mapping[str, Any],
        as_parts: bool,
        messages: list[dict[str, Any]] | None = None,
        escaped: bool = False,
        facts: Facts | None = None,
    ):
        self.messages, self.escaped, self._facts = messages or [], escaped, facts
        self._template, self._tools, self._as_parts = template, list(tools) or None, as_parts
        self._arguments = arguments

    @property
    def facts(self) -> Facts:
        """What the template writes around an answer, under these arguments."""
        assert self._facts is not None, "asked while they are being found out"
        return self._facts

    def plain(self, messages: Dicts, *, prompt: bool = False) -> str:
        """The rendering, with the generation prompt behind it if `prompt`."""
        return self._rendered(messages, add_generation_prompt=prompt)[0]

    def tagged(self, messages: Dicts) -> tuple[str, list[tuple[int, int]]]:
        """The rendering, and the characters inside {% generation %} marks."""
        return self._rendered(messages, return_assistant_tokens_mask=True)

    def _rendered(self, messages: Dicts, **options: Any) -> tuple[str, list[tuple[int, int]]]:
        if self._as_parts:
            messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        try:
            rendered: Any = render_jinja_template(  # texts and marks, one for each conversation
                conversations=[list(messages)],  # type: ignore[arg-type]
                tools=self._tools,
                chat_template=self._template.template,
                **options,
                **{**self._template.special_tokens, **self._arguments},
            )
        except DataError:
            raise
        except jinja2.TemplateSyntaxError as error:
            raise _broken(self._template.name, error) from error
        except Exception as error:  # a template is a program: it may raise anything on a row
            raise RefusedError(str(error) or type(error).__name__) from error
        texts, marks = rendered
        return texts[0], marks[0] if marks else []


def _or_data_error(chat: Chat, prompt: bool) -> str:
    try:
        return chat.plain(chat.messages, prompt=prompt)
    except RefusedError as error:
        raise DataError(f"the chat template refuses the messages: {error}; change their order or roles") from error


def _own_template(tokenizer: Any) -> str | None:
    """The tokenizer's template; of several named ones, the default."""
    template = tokenizer.chat_template
    if isinstance(template, Mapping):
        if "default" not in template:
            names = ", ".join(map(repr, template))
            raise DataError(
                f"the tokenizer has chat templates {names} and no default; write one of them to a "
                "file, and set model.chat_template to that"
            )
        return template["default"]
    return template


def _as_dict(message: Message | Mapping[str, Any]) -> dict[str, Any]:
    """What a template reads; a key without a value is left out, as transformers does."""
    if isinstance(message, Message):
        message = {"role": message.role, "content": message.content, **message.extra}
    return {k: v for k, v in message.items() if v is not None}
