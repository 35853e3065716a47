"""Masks found on stock templates equal those of hand-made twins with {% generation %} marks.

TRL ships, beside many models' own templates, a twin of each in which a person put the marks. transformers makes a mask
of them; ours, found on the template without marks, must be the same. Where it is not, a table says why, and the test
checks exactly that difference and no other.
"""

import json
import pathlib

import numpy as np
import pytest

from jax_sft.config import DataConfig
from jax_sft.data.chat import ChatTemplate, to_sequences
from jax_sft.data.conversation import Account, Conversation, DataError, Message
from jax_sft.data.spans import OFF_PROMPT
from jax_sft.data.template import Chat
from tests.data.chats import conversation, tokenizer_for

trl = pytest.importorskip("trl")
FOLDER = pathlib.Path(trl.__file__).parent / "chat_templates"
TWINS = sorted(path.name.removesuffix("_training.jinja") for path in FOLDER.glob("*_training.jinja"))

CASES = {
    "single": conversation("Hi there", "Hello!"),
    "system": conversation("system: Be brief.", "Hi", "Hello 😀😀", "你好", "你好，世界！"),
    "turns": conversation("a", "b b", "c\n\nd", "One.\n\nTwo:\n```py\nx = 1\n```", "😀", "  padded \n"),
    "empty": conversation("x", "", "", "fine"),
    "empty at the end": conversation("x", "ok", "y", ""),
    "newlines": conversation("\n\nx\n", "\nfoo\n\n"),
    "emoji at the end": conversation("😀", "再见 👩‍👩‍👧😀"),
    "reasoning": conversation("1+1?", Message("assistant", "2", extra={"reasoning_content": "I count."})),
}


def num_answers(told: Conversation) -> int:
    return sum(m.role == "assistant" for m in told.messages)


# These twins mark the end of the generation prompt too. Inference is given it and never writes it: we do not train it.
PROMPT_IN_TWIN = {
    "deepseek_r1_distill": "<｜Assistant｜>",
    "deepseekv3": "<｜Assistant｜>",
    "gptoss": "<|start|>assistant",
    "muse_glimmer": "<|start|>assistant",
    "nemotron_3_5_lightning": "<think>",
    "nemotron_3_nano": "<think>",
    "nemotron_3_super": "<think>",
    "nemotron_3_ultra": "<think>",
    "qwen2_5": "\n",
    "qwen3_5_nothink": "<think>\n\n</think>\n\n",
    "qwen3_5_think": "<think>\n",
    "qwen3_6": "<think>\n",
    "qwen3_8": "<think>\n",
}
# With reasoning in it, the answer shares more of the prompt, or less.
PROMPT_IN_TWIN_WITH_REASONING = {
    **{name: "<think>\n" for name in PROMPT_IN_TWIN if name.startswith("nemotron")},
    "qwen3_5_nothink": "<think>",
}
# These twins keep the thinking block of earlier answers, the stock templates take it out: with more than one answer the
# renderings differ, and there is a twin's mask for the last answer of a conversation alone (the test of turns).
HISTORY_DIFFERS = {"qwen3", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6"}
# Refused by the stock template and the twin alike.
REFUSED = {("gemma", "system")}
# Nothing ends an answer but the next header; the model's generation config names it.
GIVEN_STOPS = {"glm4moe": ["<|user|>", "<|observation|>"]}
# An answer without text is not rendered like one with text: a stand-in for its content does not fit.
NO_SENTINEL = {("glm4moe", "empty"), ("glm4moe", "empty at the end"), ("qwen3_5_nothink", "reasoning")}
# The generation prompt is no beginning of a rendered answer: it opens a thinking block that the answer does not have,
# or (Qwen 3.5 without thinking) closes one.
NO_PREFIX = {(name, case) for name in TWINS for case in CASES if name.startswith("deepseek")}
NO_PREFIX |= {(name, case) for name in TWINS for case in CASES if name.startswith("nemotron") and case != "reasoning"}
NO_PREFIX |= {("qwen3_5_nothink", "reasoning")}
# The last answer ends otherwise than those before it.
NO_PREFIX |= {(name, case) for name in ("gptoss", "phi3", "phi3_5") for case in CASES if num_answers(CASES[case]) > 1}


def stock_and_twin(name: str) -> tuple[ChatTemplate, ChatTemplate]:
    stock, twin = ((FOLDER / f"{name}{kind}.jinja").read_text(encoding="utf-8") for kind in ("", "_training"))
    tokenizer = tokenizer_for(stock + twin)
    stop_ids = [tokenizer.get_vocab()[token] for token in GIVEN_STOPS.get(name, [])]
    first, second = (ChatTemplate(tokenizer, template=text, stop_ids=stop_ids) for text in (stock, twin))
    return first, second


def twin_mask(twin: ChatTemplate, messages, tools: list | None = None) -> tuple[list[int], list[int]]:
    """Ids and mask of the twin, by transformers."""
    as_parts = twin._probed({})[1]
    dicts = [
        {"role": m.role, "content": [{"type": "text", "text": m.content}] if as_parts else m.content, **m.extra}
        for m in messages
    ]
    out = twin.tokenizer.apply_chat_template(
        dicts,
        tools=tools,
        chat_template=twin.template,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"return_offsets_mapping": True},
    )
    ids, mask, offsets = list(out["input_ids"]), list(out["assistant_masks"]), out["offset_mapping"]
    for i in range(1, len(ids)):  # transformers ends a span at the first of the tokens that make up its last emoji
        mask[i] = mask[i] or (mask[i - 1] and offsets[i] == offsets[i - 1])
    return ids, mask


def our_mask(sequence) -> tuple[list[int], list[int]]:
    ids = [int(sequence.tokens_T[0]), *sequence.targets_T.tolist()]
    return ids, [0, *(sequence.weights_T > 0).astype(int).tolist()]


def with_prompt(template: ChatTemplate, ids: list[int], mask: list[int], prompt: str) -> list[int]:
    """The mask with the tokens of `prompt` in front of each answer, where they must be.

    Its last letters may share a token with the answer (a newline and a newline): that token is trained anyway.
    """
    mask = list(mask)
    for start in [i for i in range(1, len(mask)) if mask[i] and not mask[i - 1]] if prompt else []:
        first, end = start, start if template.decode(ids[:start]).endswith(prompt) else start + 1
        while not template.decode(ids[first:end]).startswith(prompt):
            first -= 1
        assert prompt.startswith(template.decode(ids[first:start]))
        mask[first:start] = [1] * (start - first)
    return mask


def prompt_in_twin(name: str, case: str) -> str:
    differs = PROMPT_IN_TWIN_WITH_REASONING if case == "reasoning" else {}
    return differs.get(name, PROMPT_IN_TWIN.get(name, ""))


def last_run(ids: list[int], mask: list[int]) -> list[int]:
    end = max(i for i, m in enumerate(mask) if m) + 1
    start = end
    while start and mask[start - 1]:
        start -= 1
    return ids[start:end]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", TWINS)
def test_the_mask_on_the_stock_template_is_that_of_its_twin(name, case):
    told = CASES[case]
    stock, twin = stock_and_twin(name)
    if (name, case) in REFUSED:
        account = Account()
        assert to_sequences(told, stock, DataConfig(), account) == []
        assert list(account.dropped) == ["the chat template refuses it: System role not supported"]
        return
    ids, expected = twin_mask(twin, told.messages)
    (tagged,) = to_sequences(told, twin, DataConfig(mask="tags"), Account())
    assert our_mask(tagged) == (ids, expected)
    if name in HISTORY_DIFFERS and num_answers(told) > 1:
        return
    for method in ("auto", "prefix", "sentinel"):
        if (name, case) in {"prefix": NO_PREFIX, "sentinel": NO_SENTINEL}.get(method, ()):
            with pytest.raises(DataError, match="cannot be followed"):
                to_sequences(told, stock, DataConfig(mask=method), Account())
            continue
        (sequence,) = to_sequences(told, stock, DataConfig(mask=method), Account())
        ours, mask = our_mask(sequence)
        assert ours == ids, method
        assert with_prompt(stock, ours, mask, prompt_in_twin(name, case)) == expected, method


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", TWINS)
def test_one_answer_at_a_time_trains_what_the_twin_trains_last(name, case):
    told = CASES[case]
    if (name, case) in REFUSED:
        return
    stock, twin = stock_and_twin(name)
    answers = [i for i, m in enumerate(told.messages) if m.role == "assistant"]
    sequences = to_sequences(told, stock, DataConfig(mask="turns"), Account())
    for sequence, i in zip(sequences, answers, strict=True):
        ours, mask = our_mask(sequence)
        mask = with_prompt(stock, ours, mask, prompt_in_twin(name, case))
        assert np.diff([0, *mask, 0]).clip(0).sum() == 1  # one answer
        assert last_run(ours, mask) == last_run(*twin_mask(twin, told.messages[: i + 1]))


@pytest.mark.parametrize("name", TWINS)
def test_a_prompt_is_the_beginning_of_what_is_trained(name):
    """What inference sees before an answer is what training saw, but for the end of a prompt that no answer repeats."""
    stock, _ = stock_and_twin(name)
    told, account = CASES["single"], Account()
    (sequence,) = to_sequences(told, stock, DataConfig(), account)
    before = sequence.tokens_T[: np.flatnonzero(sequence.weights_T)[0] + 1].tolist()
    prompt = stock.decode(stock.encode_prompt(told.messages[:1]))
    assert prompt.startswith(stock.decode(before))
    beyond = prompt.removeprefix(stock.decode(before))
    if account.altered:
        assert list(account.altered) == [OFF_PROMPT]
        assert beyond == ("<think>\n" if name.startswith("deepseek") else "\n")
    else:  # at most a blank that shares a token with the answer
        assert beyond in ("", "\n")


def test_every_exception_is_about_a_template_that_is_there():
    pairs = REFUSED | NO_SENTINEL | NO_PREFIX
    named = {*PROMPT_IN_TWIN, *PROMPT_IN_TWIN_WITH_REASONING, *HISTORY_DIFFERS, *GIVEN_STOPS, *(n for n, _ in pairs)}
    assert named <= set(TWINS)
    assert len(TWINS) >= 30


# Calls of tools: what a twin marks, stock templates give too.


def called(name: str, **arguments: object) -> dict:
    return {"type": "function", "id": "call00001", "function": {"name": name, "arguments": arguments}}


RAIN = {
    "name": "rain",
    "description": "Will it rain?",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "description": "where"}},
        "required": ["city"],
    },
}
TOOLS = ({"type": "function", "function": RAIN},)
RESULT = {"name": "rain", "tool_call_id": "call00001"}


def with_tools(*said: tuple) -> Conversation:
    """(role, content) or (role, content, more)."""
    messages = tuple(Message(role, content, extra=dict(*more)) for role, content, *more in said)
    return Conversation(messages, "s", "id", tools=TOOLS)


ASKED = ("user", "Rain in Kunming?")
TOOL_CASES = {
    "call": with_tools(ASKED, ("assistant", "", {"tool_calls": [called("rain", city="昆明 😀")]})),
    "call and answer": with_tools(
        ASKED,
        ("assistant", "", {"tool_calls": [called("rain", city="Kunming")]}),
        ("tool", '{"wet": true}', RESULT),
        ("assistant", "Yes, it rains."),
    ),
    "said and called": with_tools(
        ASKED,
        ("assistant", "Let me look.", {"tool_calls": [called("rain", city="Kunming", days={"from": 1, "to": [2, 3]})]}),
        ("tool", "wet", RESULT),
        ("assistant", "Yes."),
        ("user", "Thanks"),
        ("assistant", "Welcome!"),
    ),
    "two calls": with_tools(
        ASKED,
        ("assistant", "", {"tool_calls": [called("rain", city="a"), called("rain", city="b")]}),
        ("tool", "wet", RESULT),
        ("tool", "dry", RESULT),
        ("assistant", "In one of them."),
    ),
    "odd arguments": with_tools(
        ASKED,
        (
            "assistant",
            "",
            {
                "tool_calls": [
                    called("rain", city='昆"明\n😀', days={"from": {"里": [1, 2.5, None, True]}, "to": []}),
                    called("snow", city="b\\c", empty={}),
                ]
            },
        ),
        ("tool", '{"wet": {"里": [true]}}', RESULT),
        ("tool", "none", RESULT | {"name": "snow"}),
        ("assistant", "It rains."),
    ),
    "thought and called": with_tools(
        ASKED,
        ("assistant", "", {"reasoning_content": "I ask.", "tool_calls": [called("rain", city="a")]}),
        ("tool", "wet", RESULT),
        ("assistant", "Yes.", {"reasoning_content": "It said so."}),
    ),
}
TOOL_TWINS = [name for name in TWINS if "tools" in (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")]
# The template writes no call, or one alone, or no text beside one: told, with the way out.
LEFT_OUT = {
    **{("lfm2", case): "leaves out the tool call 'rain'" for case in TOOL_CASES},
    ("muse_glimmer", "said and called"): "the chat template changes it",
    ("gptoss", "two calls"): "leaves out the tool call 'rain'",
    ("gptoss", "odd arguments"): "leaves out the tool call 'snow'",
}
# Gemma's call ends in the token that begins the result; inference stops at it, the twin does not train it.
STOP_BEYOND_TWIN = {"diffusion_gemma": "<|tool_response>"}
# What was said or thought before is left out of the history, so each answer has a rendering of its own.
TOOL_HISTORY_DIFFERS = {
    ("diffusion_gemma", "said and called"),
    ("gptoss", "said and called"),
    ("gptoss", "thought and called"),
    ("qwen3", "call and answer"),
    ("qwen3", "said and called"),
    ("qwen3", "two calls"),
    ("qwen3", "odd arguments"),
    ("qwen3_5_nothink", "said and called"),
    ("qwen3_5_nothink", "thought and called"),
    ("qwen3_5_think", "said and called"),
    ("qwen3_6", "said and called"),
}


def twin_mask_with_tools(twin: ChatTemplate, messages) -> tuple[list[int], list[int]]:
    return twin_mask(twin, messages, tools=list(TOOLS))


@pytest.mark.parametrize("case", TOOL_CASES)
@pytest.mark.parametrize("name", TOOL_TWINS)
def test_the_mask_of_calls_is_that_of_the_twin(name, case):
    told = TOOL_CASES[case]
    stock, twin = stock_and_twin(name)
    if (name, case) in LEFT_OUT:
        with pytest.raises(DataError, match=LEFT_OUT[name, case]):
            to_sequences(told, stock, DataConfig(), Account())
        return
    prompt = prompt_in_twin(name, "reasoning" if "thought" in case else case)
    if (name, case) in TOOL_HISTORY_DIFFERS:
        answers = [i for i, m in enumerate(told.messages) if m.role == "assistant"]
        sequences = to_sequences(told, stock, DataConfig(mask="turns"), Account())
        for sequence, i in zip(sequences, answers, strict=True):
            ours, mask = our_mask(sequence)
            got = without_stop(name, stock, last_run(ours, with_prompt(stock, ours, mask, prompt)))
            assert got == last_run(*twin_mask_with_tools(twin, told.messages[: i + 1]))
        return
    (sequence,) = to_sequences(told, stock, DataConfig(), Account())
    ours, mask = our_mask(sequence)
    ids, expected = twin_mask_with_tools(twin, told.messages)
    assert ours == ids
    mask = with_prompt(stock, ours, mask, prompt)
    beyond = stock.decode([i for i, m, e in zip(ours, mask, expected, strict=True) if m and not e])
    assert beyond == STOP_BEYOND_TWIN.get(name, "")
    assert all(m or not e for m, e in zip(mask, expected, strict=True))


def without_stop(name: str, template: ChatTemplate, ids: list[int]) -> list[int]:
    beyond = STOP_BEYOND_TWIN.get(name)
    return ids[:-1] if beyond and template.decode(ids[-1:]) == beyond else ids


@pytest.mark.parametrize("case", TOOL_CASES)
@pytest.mark.parametrize("name", TOOL_TWINS)
def test_trained_spans_say_the_calls_the_thoughts_and_the_answers(name, case):
    if (name, case) in LEFT_OUT:
        return
    stock, _ = stock_and_twin(name)
    account = Account()
    sequences = to_sequences(TOOL_CASES[case], stock, DataConfig(), account)
    trained = "".join(stock.decode([i for i, m in zip(*our_mask(s), strict=True) if m]) for s in sequences)
    left_out = "reasoning that the chat template leaves out" in account.altered
    for message in TOOL_CASES[case].messages:
        if message.role != "assistant":
            assert not message.content or f">{message.content}<" not in trained
            continue
        thought = "" if left_out else message.extra.get("reasoning_content", "")
        arguments = [c["function"]["arguments"] for c in message.extra.get("tool_calls", ())]
        cities = [a["city"] for a in arguments]
        for said in (message.content, thought):
            assert said in trained
        for city in cities:
            assert any(way in trained for way in (city, json.dumps(city, ensure_ascii=False), repr(city)))
    assert "arguments of a call that the chat template leaves out or changes" not in account.altered


def test_every_exception_of_calls_is_about_a_template_that_is_there():
    named = {*STOP_BEYOND_TWIN, *(n for n, _ in LEFT_OUT), *(n for n, _ in TOOL_HISTORY_DIFFERS)}
    assert named <= set(TOOL_TWINS)
    assert len(TOOL_TWINS) >= 18


LONG = conversation(*(f"{'asked' if i % 2 == 0 else 'answered'} {i} 你好 😀\n\nso" for i in range(10)))


@pytest.mark.parametrize("name", TWINS)
def test_many_answers_are_found_by_few_renderings_where_they_would_be_by_many(name, monkeypatch):
    stock, _ = stock_and_twin(name)
    expected = None
    try:
        (expected,) = to_sequences(LONG, stock, DataConfig(mask="prefix"), Account())
    except DataError:
        assert not stock.facts.header_is_prompt or name in HISTORY_DIFFERS | {"gptoss", "phi3", "phi3_5"}
    count = 0
    rendered = Chat._rendered

    def counting(self, messages, **options):
        nonlocal count
        count += 1
        return rendered(self, messages, **options)

    monkeypatch.setattr(Chat, "_rendered", counting)
    found = to_sequences(LONG, stock, DataConfig(), Account())
    if expected is not None:
        assert count <= 3
        assert [our_mask(s) for s in found] == [our_mask(expected)]
