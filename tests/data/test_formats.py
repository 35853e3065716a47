"""Every format gives the conversation it means; what cannot be trained on is counted, what is malformed is an error."""

import json
import re

import pytest

from jax_sft.config import DataConfig
from jax_sft.data.conversation import Account, Conversation, DataError, Message, Tokens
from jax_sft.data.formats import Untrainable, detect, read_conversations, to_conversation
from jax_sft.data.source import Part, parts_of

U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]


def convert(row, format, **columns) -> Conversation:
    return to_conversation(row, "f.jsonl:3", format=format, columns=columns, source="f")


def turns(conversation: Conversation) -> list[tuple[str, str]]:
    return [(m.role, m.content) for m in conversation.messages]


def write(tmp_path, rows, name="set.jsonl") -> str:
    path = tmp_path / name
    path.write_text("\n".join(json.dumps(r) for r in rows), encoding="utf-8")
    return str(path)


def read(path: str, **options) -> tuple[list[Conversation], Account]:
    account = Account()
    return list(read_conversations(DataConfig(**options), parts_of((path,)), account)), account


def test_messages_keep_text_weights_flags_and_other_keys():
    tools = [{"type": "function", "function": {"name": "f"}}]
    row = {
        "messages": [
            {"role": "system", "content": " be brief\n"},
            {
                "role": "user",
                "content": [{"type": "text", "text": "q "}, {"type": "text", "value": "二"}],
                "loss_weight": 0,
            },
            {"role": "assistant", "content": None, "tool_calls": CALL, "train": False, "name": None},
            {"role": "tool", "content": "", "tool_call_id": "1"},
            {"role": "assistant", "content": "a", "weight": 0.5, "reasoning_content": "hm", "train": True},
        ],
        "tools": json.dumps(tools),
        "id": 7,
        "source": "news",
    }
    assert convert(row, "messages") == Conversation(
        messages=(
            Message("system", " be brief\n"),
            Message("user", "q 二", weight=0.0),
            Message("assistant", "", train=False, extra={"tool_calls": CALL}),
            Message("tool", "", extra={"tool_call_id": "1"}),
            Message("assistant", "a", train=True, weight=0.5, extra={"reasoning_content": "hm"}),
        ),
        source="news",
        id="7",
        tools=tuple(tools),
    )


def test_a_row_without_id_and_source_has_its_place_and_its_file():
    conversation = convert({"messages": [U, A], "id": None, "source": ""}, "messages")
    assert (conversation.id, conversation.source) == ("f.jsonl:3", "f")


def test_sharegpt_roles_and_system_column():
    says = [("system", None), ("human", "h"), ("gpt", "g"), ("user", "u"), ("assistant", "a")]
    row = {"conversations": [{"from": r, "value": v, "weight": 1} for r, v in says[1:]], "system": "s"}
    assert turns(convert(row, "sharegpt")) == [
        ("system", "s"), ("user", "h"), ("assistant", "g"), ("user", "u"), ("assistant", "a"),
    ]  # fmt: skip
    assert turns(convert({"conversations": [U, A], "system": ""}, "sharegpt")) == [("user", "q"), ("assistant", "a")]


def test_alpaca_history_and_input_make_turns():
    row = {"instruction": "i", "input": "x", "output": "o", "system": "s", "history": [["q1", "a1"], ["q2", "a2"]]}
    expected = [("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")]
    assert turns(convert(row, "alpaca")) == [("system", "s"), *expected, ("user", "i\nx"), ("assistant", "o")]
    bare = {"instruction": "i", "input": None, "output": "o", "system": None, "history": None}
    assert turns(convert(bare, "alpaca")) == [("user", "i"), ("assistant", "o")]
    assert turns(convert({"instruction": "", "input": "x", "output": "o"}, "alpaca"))[0] == ("user", "x")


def test_a_plain_completion_is_text_behind_a_prompt_without_a_template():
    conversation = convert({"prompt": "2+2=", "completion": " 4"}, "prompt_completion")
    assert (conversation.messages, conversation.prompt_text, conversation.text) == ((), "2+2=", " 4")


def test_a_prompt_of_messages_does_not_teach_unless_a_message_says_so():
    prompt = [U, A, {**A, "train": True}, U]
    conversation = convert({"prompt": prompt, "completion": [A]}, "prompt_completion")
    assert [m.train for m in conversation.messages] == [False, False, True, False, None]


def test_text_is_kept_as_it_stands():
    conversation = convert({"text": " \n x \n"}, "text")
    assert (conversation.text, conversation.prompt_text, conversation.messages) == (" \n x \n", None, ())


def test_columns_are_renamed_and_an_empty_name_leaves_one_out():
    row = {"question": "q", "answer": "a", "source": "a whole abstract", "lang": "en", "id": "x"}
    columns = {"instruction": "question", "output": "answer", "source": "lang", "id": ""}
    assert detect(row, "f:1", columns=columns) == "alpaca"
    conversation = convert(row, "alpaca", **columns)
    assert (turns(conversation), conversation.source) == ([("user", "q"), ("assistant", "a")], "en")
    assert conversation.id == "f.jsonl:3"


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"messages": [], "text": "a copy", "prompt": "p"}, "messages"),
        ({"conversations": [], "system": ""}, "sharegpt"),
        ({"instruction": "", "output": ""}, "alpaca"),
        ({"prompt": "", "completion": ""}, "prompt_completion"),
        ({"text": "", "url": ""}, "text"),
    ],
)
def test_a_format_is_known_by_its_columns(row, format):
    assert detect(row, "f:1", columns={}) == format


BROKEN_EMOJI = json.loads('"\\ud83d"')
UNTRAINABLE = [
    ("messages", {"messages": None}, "null messages"),
    ("messages", {"messages": []}, "empty conversation"),
    ("messages", {"messages": [U, {"role": "assistant", "content": None}]}, "null content"),
    ("messages", {"messages": [{"role": "narrator", "content": "x"}]}, "unknown role 'narrator'"),
    ("messages", {"messages": [{"role": None, "content": "x"}]}, "unknown role None"),
    (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "content part of type 'image_url'",
    ),
    ("messages", {"messages": [{"role": "user", "content": BROKEN_EMOJI}]}, "a broken character .* in content"),
    ("messages", {"messages": [U, A], "source": BROKEN_EMOJI}, "a broken character .* in source"),
    ("sharegpt", {"conversations": [{"from": "system", "value": "x"}], "system": "s"}, "a system column beside"),
    ("alpaca", {"instruction": None, "output": "o"}, "null instruction"),
    ("alpaca", {"instruction": "", "input": "", "output": "o"}, "empty instruction"),
    ("alpaca", {"instruction": "i", "output": None}, "null output"),
    ("alpaca", {"instruction": "i", "output": ""}, "empty output"),
    ("alpaca", {"instruction": "i", "output": "o", "history": [["q", None]]}, "null history"),
    ("prompt_completion", {"prompt": "p", "completion": ""}, "empty completion"),
    ("prompt_completion", {"prompt": "p", "completion": None}, "null completion"),
    ("prompt_completion", {"prompt": None, "completion": "c"}, "null prompt"),
    ("prompt_completion", {"prompt": [U], "completion": []}, "empty conversation"),
    ("text", {"text": ""}, "empty text"),
    ("text", {"text": None}, "null text"),
]


@pytest.mark.parametrize(("format", "row", "reason"), UNTRAINABLE)
def test_a_sound_row_without_anything_to_train_on_is_not_an_error(format, row, reason):
    with pytest.raises(Untrainable, match=reason):
        convert(row, format)


MALFORMED = [
    (
        "messages",
        {"conversations": [U, A]},
        r"needs the column 'messages', but has 'conversations' \(it looks like sharegpt",
    ),
    (
        "messages",
        {"mesages": [U]},
        r"but has 'mesages'; did you mean 'mesages'\?; correct the row, or set data\.format",
    ),
    ("messages", {"messages": 3}, r"messages is a number; write a list"),
    ("messages", {"messages": "hello"}, r"messages is a text that is not JSON; write a list"),
    ("messages", {"messages": ["hello"]}, r"messages holds a text, not messages; write objects with role and content"),
    ("messages", {"messages": [{"from": "human", "value": "x"}]}, r"no 'role', but 'from', 'value'; .*format sharegpt"),
    ("messages", {"messages": [{"role": "user"}]}, r"a message has no 'content', but 'role'; write"),
    ("messages", {"messages": [{"role": "user", "content": 4}]}, r"content is a number; write a text"),
    ("messages", {"messages": [{"role": "user", "content": ["x"]}]}, r"content holds a text, not parts like"),
    ("messages", {"messages": [{**A, "train": 1}]}, r"the train of a message is 1; write true or false"),
    ("messages", {"messages": [{**A, "weight": -1}]}, r"the weight of a message is -1; write a number of at least 0"),
    ("messages", {"messages": [{**A, "weight": float("nan")}]}, r"the weight of a message is nan"),
    ("messages", {"messages": [{**A, "weight": "1"}]}, r"the weight of a message is '1'"),
    ("messages", {"messages": [{**A, "weight": True}]}, r"the weight of a message is True"),
    (
        "messages",
        {"messages": [{**A, "weight": 1e39}]},
        r"is 1e\+39; write a number of at least 0 that a float32 can hold",
    ),
    ("messages", {"messages": [{**A, "weight": 10**400}]}, r"is 10{400}; write a number"),
    (
        "messages",
        {"messages": [{**A, "weight": 1e-39}]},
        r"is 1e-39; write a number of at least 0 that a float32 can hold",
    ),
    ("messages", {"messages": [{**A, "tool_calls": "abc"}]}, r"tool_calls is a text that is not JSON; write a list"),
    ("messages", {"messages": [{**A, "tool_calls": {"name": "f"}}]}, r"tool_calls is an object; write a list"),
    ("messages", {"messages": [{**A, "tool_calls": ["f"]}]}, r"tool_calls holds something else than calls; write obj"),
    ("messages", {"messages": [{**A, "tool_calls": [{"function": "f"}]}]}, r"tool_calls holds something else than"),
    ("messages", {"messages": [{**A, "weight": 1, "loss_weight": 1}]}, r"both weight and loss_weight; .* keep one"),
    ("messages", {"messages": [U, A], "tools": {"a": 1}}, r"tools is an object; write a list"),
    (
        "messages",
        {"messages": [U, A], "source": ["x"]},
        r"source is a list; write a text, or set data\.columns\.source = ''",
    ),
    ("alpaca", {"instruction": "i"}, r"the format alpaca needs the column 'output', but has 'instruction'"),
    ("alpaca", {"instruction": "i", "output": 7}, r"output is a number; write a text"),
    (
        "alpaca",
        {"instruction": "i", "output": "o", "history": [["q"]]},
        r"history holds a list, not pairs of a question",
    ),
    (
        "prompt_completion",
        {"prompt": "p", "completion": [A]},
        r"prompt is a text and completion a list; make both texts",
    ),
    ("prompt_completion", {"prompt": 1, "completion": 2}, r"prompt is a number; write a list"),
    ("text", {"text": {"x": 1}}, r"text is an object; write a text"),
    (
        "messages",
        {"messages": [{**A, "content": [{"type": ["a"], "text": "x"}]}]},
        r"content holds an object, not parts",
    ),
    ("text", {"text": ["x", 1]}, r"text is a number; write a text"),
    ("messages", {"messages": [U, A], "tools": ["f"]}, r"tools holds a text, not objects; write \{'type': 'function'"),
    (
        "messages",
        {"messages": [U, A], "chat_template_kwargs": [1]},
        r"chat_template_kwargs is a list; write an object, such as",
    ),
    ("messages", {"messages": [U, A], "chat_template_kwargs": "{"}, r"chat_template_kwargs is a text; write an object"),
    (
        "messages",
        {"messages": [U, A], "chat_template_kwargs": {"tools": []}},
        r"chat_template_kwargs names 'tools', which is given already; take it out",
    ),
    (
        "messages",
        {"messages": [U, A], "chat_template_kwargs": {"continue_final_message": True}},
        r"chat_template_kwargs names 'continue_final_message', which is given already; take it out",
    ),
    (
        "messages",
        {"messages": [U, {**A, "reasoning": "one", "content": [{"type": "thinking", "thinking": "two"}]}]},
        r"a message has reasoning in its content and in reasoning; keep one of them",
    ),
    ("messages", {"messages": [U, {**A, "thinking": ["x"]}]}, r"the thinking of a message is a list; write a text"),
    ("tokens", {"input_ids": [True]}, r"input_ids holds something else than token ids; write whole numbers"),
    ("tokens", {"input_ids": [1, None]}, r"input_ids holds null, not numbers alone; write one for each token"),
    ("tokens", {"input_ids": [1], "attention_mask": [2]}, r"attention_mask holds something else than 0 and 1; write 0"),
    ("tokens", {"input_ids": [1], "attention_mask": []}, r"attention_mask has 0 numbers, and input_ids 1; write one"),
    (
        "tokens",
        {"input_ids": [1], "completion_mask": [1], "assistant_masks": [1]},
        r"assistant_masks and completion_mask both say .*; keep one of them, or set data\.columns\.completion_mask =",
    ),
    ("squad", {"context": "c", "question": "q", "answers": 1}, r"answers is a number; write \[\{'text'"),
    ("tokens", {"input_ids": "1 2"}, r"input_ids is a text, not a list of numbers; write one for each token"),
    ("tokens", {"input_ids": [1.5]}, r"input_ids holds something else than token ids; write whole numbers"),
    ("tokens", {"input_ids": [1, 2], "labels": [1]}, r"labels has 1 numbers, and input_ids 2; write one for each"),
    (
        "tokens",
        {"input_ids": [1, 2, 3], "labels": [-100, 3, -100]},
        r"labels\[1\] is 3, and input_ids\[1\] 2; a label is its own token or -100, .* not shifted",
    ),
    ("tokens", {"input_ids": [1], "labels": [1], "loss_mask": [1]}, r"labels and loss_mask both say what is trained"),
    ("tokens", {"input_ids": [1], "loss_mask": [-1]}, r"loss_mask holds something else than weights; write 0 and 1"),
    ("preference", {"chosen": "a", "rejected": "b"}, r"nothing says what was asked; a row of the format preference"),
    ("squad", {"context": "c", "question": "q", "answers": "a"}, r"answers is a text; write \[\{'text'"),
]


@pytest.mark.parametrize(("format", "row", "message"), MALFORMED)
def test_a_malformed_row_is_an_error_with_its_place(format, row, message):
    with pytest.raises(DataError, match=message) as caught:
        convert(row, format)
    assert str(caught.value).startswith("f.jsonl:3: ")


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        (
            {"q": 1, "a": 2},
            {},
            r"f:1: no format fits the columns 'q', 'a'; name them in data\.columns .*alpaca: instruction, out",
        ),
        ({}, {}, r"f:1: no format fits the columns none"),
        (
            {"messages": 1, "prompt": 1, "completion": 1},
            {},
            r"fit the formats messages and prompt_completion; set data\.format",
        ),
    ],
)
def test_columns_that_fit_no_format_or_two_are_an_error(row, columns, message):
    with pytest.raises(DataError, match=message):
        detect(row, "f:1", columns=columns)


def test_rows_that_cannot_be_trained_on_are_counted_with_their_places(tmp_path):
    rows = [[U, A], [], [U], [U, {**A, "content": None}], [U, {**A, "train": False}], [{**U, "train": True}]]
    path = write(tmp_path, [{"messages": m} for m in rows])
    kept, account = read(path)
    assert [c.id for c in kept] == [f"{path}:1", f"{path}:6"]
    assert account.read == 6
    assert account.dropped == {"empty conversation": 1, "no assistant message to train on": 2, "null content": 1}
    assert account.examples["no assistant message to train on"] == [f"{path}:3", f"{path}:5"]


def test_the_roles_that_teach_decide_what_a_row_must_hold(tmp_path):
    path = write(tmp_path, [{"messages": [U]}, {"messages": [A]}])
    kept, account = read(path, train_on="user, tool")
    assert [c.id for c in kept] == [f"{path}:1"]
    assert account.dropped == {"no user or tool message to train on": 1}


def test_each_file_has_one_format_and_its_own_source(tmp_path):
    paths = (
        write(tmp_path, [{"messages": [U, A]}], "one.jsonl"),
        write(tmp_path, [{"instruction": "i", "output": "o"}, {"instruction": "i", "output": "o"}], "two.v2.jsonl"),
    )
    kept = list(read_conversations(DataConfig(), parts_of(paths), Account()))
    assert [c.source for c in kept] == ["one", "two.v2", "two.v2"]


def test_a_later_row_of_another_shape_is_an_error(tmp_path):
    path = write(tmp_path, [{"messages": [U, A]}, {"instruction": "i", "output": "o"}])
    message = r"set\.jsonl:2: a row of the format messages needs .* looks like alpaca, but one format holds for a file"
    with pytest.raises(DataError, match=message):
        read(path)


def test_a_named_format_is_not_guessed(tmp_path):
    path = write(tmp_path, [{"messages": [U, A], "text": "x"}])
    assert read(path, format="text")[0][0].text == "x"
    with pytest.raises(DataError, match=r"set\.jsonl:1: a row of the format alpaca needs the column 'instruction'"):
        read(path, format="alpaca")


@pytest.mark.parametrize(
    ("columns", "format", "message"),
    [
        (
            {"mesages": "chat"},
            "auto",
            r"data\.columns\.mesages: no field has this name; did you mean 'messages'\?; map chosen,",
        ),
        (
            {"prompt": "chat"},
            "messages",
            r"data\.columns\.prompt: no field has this name; map messages, label, tools,",
        ),
        (
            {"messages": "caht"},
            "auto",
            r"set\.jsonl:1: data\.columns\.messages = 'caht' is not a column, there are 'chat'",
        ),
        ({"messages": "caht"}, "messages", r"there are 'chat', 'lang'; did you mean 'chat'\?; correct it"),
        ({"tools": "lnag"}, "messages", r"data\.columns\.tools = 'lnag' is not a column, .* did you mean 'lang'\?"),
    ],
)
def test_an_unknown_column_is_an_error_with_the_columns_there_are(tmp_path, columns, format, message):
    path = write(tmp_path, [{"chat": [U, A], "lang": "en"}])
    with pytest.raises(DataError, match=message):
        read(path, columns=columns, format=format)


def test_mapped_columns_are_read_from_a_file(tmp_path):
    path = write(tmp_path, [{"chat": [U, A], "source": "x"}, {"chat": [U, A]}])
    kept, _ = read(path, columns={"messages": "chat", "source": ""})
    assert [(c.source, len(c.messages)) for c in kept] == [("set", 2), ("set", 2)]


def test_a_table_holds_messages_as_json(tmp_path):
    path = tmp_path / "set.csv"
    cell = json.dumps([U, A]).replace('"', '""')
    path.write_text(f'messages,id\n"{cell}",x\n')
    kept, _ = read(str(path))
    assert (turns(kept[0]), kept[0].id) == ([("user", "q"), ("assistant", "a")], "x")


CALLED = {"name": "rain", "arguments": {"city": "昆明"}}
AS_MESSAGE = Message("assistant", "", extra={"tool_calls": [{"type": "function", "function": CALLED}]})


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "tool_calls": [{"type": "function", "function": CALLED}]},
        {"role": "assistant", "content": None, "tool_calls": [CALLED]},
        {"role": "assistant", "content": "", "tool_calls": json.dumps([CALLED])},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {**CALLED, "arguments": '{"city": "昆明"}'}}]},
        {"role": "assistant", "content": [{"type": "tool_call", "value": json.dumps(CALLED)}]},
        {"role": "assistant", "content": None, "function_call": {**CALLED, "arguments": '{"city": "昆明"}'}},
        {"role": "assistant", "tool_calls": [{"name": "rain", "parameters": {"city": "昆明"}}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "rain", "parameters": {"city": "昆明"}}}]},
        {"from": "function_call", "value": json.dumps(CALLED)},
        {"from": "function_call", "value": json.dumps([CALLED])},
    ],
    ids=[
        *("OpenAI", "bare", "in a text", "arguments in a text", "part"),
        *("OpenAI before tool_calls", "Llama", "Llama in a function", "ShareGPT", "ShareGPT list"),
    ],
)
def test_calls_are_one_thing_however_they_are_written(turn):
    format, column = ("sharegpt", "conversations") if "from" in turn else ("messages", "messages")
    (_, called) = convert({column: [{"role": "user", "content": "q"}, turn]}, format).messages
    calls = [{"type": "function", **call} for call in called.extra["tool_calls"]]
    assert Message(called.role, called.content, extra={"tool_calls": calls}) == AS_MESSAGE


def test_observations_are_results_of_tools_and_bare_functions_are_wrapped():
    function = {"name": "rain", "parameters": {}}
    says = [("human", "q"), ("function_call", json.dumps([CALLED, CALLED])), ("observation", "wet"), ("gpt", "a")]
    row = {"conversations": [{"from": r, "value": v} for r, v in says], "tools": json.dumps([function])}
    told = convert(row, "sharegpt")
    assert [m.role for m in told.messages] == ["user", "assistant", "tool", "assistant"]
    assert len(told.messages[1].extra["tool_calls"]) == 2
    assert told.tools == ({"type": "function", "function": function},)


def test_an_empty_cell_of_a_table_is_no_call_no_tool_and_no_argument():
    row = {"messages": [U, {**A, "tool_calls": ""}], "tools": "", "chat_template_kwargs": ""}
    assert convert(row, "messages") == convert({"messages": [U, A]}, "messages")


def test_parts_of_reasoning_are_reasoning():
    parts = [
        {"type": "reasoning", "value": "hm "},
        {"type": "thinking", "thinking": "so"},
        {"type": "text", "text": "a"},
    ]
    (_, told) = convert({"messages": [U, {"role": "assistant", "content": parts}]}, "messages").messages
    assert told == Message("assistant", "a", extra={"reasoning_content": "hm so"})


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({"from": "function_call", "value": "rain(昆明)"}, "a function call that is not JSON"),
        (
            {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": "{"}]},
            "a function call whose arguments are not a JSON object",
        ),
        (
            {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": [1]}]},
            "a function call whose arguments are not a JSON object",
        ),
        ({"role": "assistant", "content": [{"type": "image", "image": "x"}]}, "content part of type 'image'"),
        ({"role": "user", "content": [{"type": "text"}]}, "a content part of type 'text' that says nothing"),
        ({"from": "function_call", "value": "[]"}, "a function call that calls nothing"),
    ],
)
def test_what_no_text_can_say_is_left_out_and_counted(turn, reason):
    with pytest.raises(Untrainable, match=f"^{re.escape(reason)}$"):
        convert({"conversations": [{"from": "human", "value": "q"}, turn]}, "sharegpt")


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "good"}},
        {"messages": [U], "chosen": A | {"content": "good"}},
        {"prompt": "q", "chosen": "good"},
        {"prompt": [U], "chosen": [A | {"content": "good"}]},
        {"instruction": "q", "input": "", "chosen": "good"},
        {"chosen": [U, A | {"content": "good"}]},
    ],
    ids=["ShareGPT", "messages", "texts", "lists", "Alpaca", "the prompt in the answer"],
)
def test_of_a_preference_the_chosen_answer_teaches_and_the_rejected_is_never_read(row):
    row = row | {"rejected": object()}
    assert detect(row, "f", columns={}) == "preference"
    said = [(m.role, m.content) for m in convert(row, "preference").messages]
    assert said == [("user", U["content"] if said[0][1] != "q" else "q"), ("assistant", "good")]


@pytest.mark.parametrize(
    "asked",
    [{"prompt": "q"}, {"messages": [U, A]}, {"prompt": [{"role": "system", "content": "s"}, U]}, {"instruction": "q"}],
    ids=["a prompt", "the chosen turns again", "a prompt of messages", "an instruction"],
)
def test_what_was_asked_is_said_once_where_the_chosen_turns_say_it_too(asked):
    row = {**asked, "chosen": [U, A, U, A | {"content": "b"}], "rejected": [U, A, U, A]}
    told = convert(row, "preference").messages
    system = [("system", "s")] if isinstance(asked.get("prompt"), list) else []
    expected = [*system, ("user", "q"), ("assistant", "a"), ("user", "q"), ("assistant", "b")]
    assert [(m.role, m.content) for m in told] == expected
    assert [m.content for m in told if m.role == "assistant" and m.train is None] == ["b"]


def test_chosen_turns_that_go_on_stand_behind_what_was_said_before():
    row = {"prompt": [U, A], "chosen": [{"role": "user", "content": "more"}, A | {"content": "b"}], "rejected": []}
    assert [m.content for m in convert(row, "preference").messages] == ["q", "a", "more", "b"]


def test_what_was_said_before_the_chosen_answer_teaches_nothing():
    row = {"conversations": [{"from": r, "value": "x"} for r in ("human", "gpt", "human")]}
    told = convert(row | {"chosen": {"from": "gpt", "value": "y"}, "rejected": {}, "system": "s"}, "preference")
    assert [m.train for m in told.messages] == [None, False, False, False, None]


def test_an_answer_that_is_labelled_false_is_left_out(tmp_path):
    rows = [{"messages": [U, A], "label": label} for label in (True, False, "no", 0)]
    kept, account = read(write(tmp_path, rows))
    assert (len(kept), account.dropped) == (3, {"label false: an answer that is not to be learnt": 1})


def test_a_table_says_false_in_letters(tmp_path):
    path = tmp_path / "kto.csv"
    path.write_text("prompt,completion,label\nq,good,True\nq,bad,False\n")
    kept, account = read(str(path))
    assert [c.text for c in kept] == ["good"]
    assert account.dropped == {"label false: an answer that is not to be learnt": 1}


def test_questions_about_a_text_are_conversations_of_their_own(tmp_path):
    asked = [{"id": "1", "question": "Who?", "answers": [{"text": "Wren", "answer_start": 0}]}]
    asked += [{"id": "2", "question": "When?", "answers": []}]
    nested = {"data": [{"title": "t", "paragraphs": [{"id": "p", "context": "Wren sings.", "qas": asked}]}]}
    flat = [{"context": "Wren sings.", "question": "Who?", "answers": {"text": ["Wren"], "answer_start": [0]}}]
    (tmp_path / "nested.json").write_text(json.dumps(nested))
    for path in (tmp_path / "nested.json", write(tmp_path, flat)):
        kept, account = read(str(path))
        assert [turns(c) for c in kept] == [[("user", "Wren sings.\n\nWho?"), ("assistant", "Wren")]]
        assert account.read == 1 + sum(account.dropped.values())
    assert [c.id for c in read(str(tmp_path / "nested.json"))[0]] == ["1"]


def test_instances_of_a_task_are_conversations_of_their_own(tmp_path):
    task = {
        "id": "t",
        "instruction": "Sort.",
        "instances": [{"input": "b a", "output": "a b"}, {"input": "", "output": "x"}],
    }
    kept, account = read(write(tmp_path, [task]))
    assert [(c.id, turns(c)[0][1]) for c in kept] == [("t[0]", "Sort.\nb a"), ("t[1]", "Sort.")]
    assert account.read == 2


@pytest.mark.parametrize(
    "more",
    [
        {"paragraphs": [{"idx": 0, "paragraph_text": "x"}]},
        {"paragraphs": ["x", "y"]},
        {"paragraphs": []},
        {"instances": [{"x": 1}, {"x": 2}]},
        {"instances": [1]},
        {"instances": []},
    ],
)
def test_columns_that_are_called_as_those_of_nested_sets_neither_hide_a_row_nor_repeat_it(tmp_path, more):
    for row in ({"messages": [U, A]}, {"instruction": "q", "output": "a"}):
        kept, account = read(write(tmp_path, [row | more]))
        assert [turns(c) for c in kept] == [[("user", "q"), ("assistant", "a")]]
        assert account.read == 1


def test_questions_that_are_no_objects_are_an_error_with_their_place(tmp_path):
    path = tmp_path / "set.json"
    path.write_text(json.dumps({"data": [{"paragraphs": [{"context": "c", "qas": ["Who?"]}]}]}))
    with pytest.raises(DataError, match=r"set\.json\[0\]: qas is something else than a list of objects; correct the"):
        read(str(path))


@pytest.mark.parametrize("mask", ["loss_mask", "assistant_masks", "completion_mask"])
def test_masks_of_other_trainers_say_what_is_trained(mask):
    row = {"input_ids": [5, 6, 7], mask: [0, 0, 1]}
    assert detect(row, "f", columns={}) == "tokens"
    assert convert(row, "tokens").tokens == Tokens((5, 6, 7), (0, 0, 1))


def test_padding_is_left_out_of_given_tokens():
    row = {"input_ids": [0, 5, 6, 0], "attention_mask": [0, 1, 1, 0]}
    assert convert(row, "tokens").tokens == Tokens((5, 6), (1, 1))
    assert convert(row | {"labels": [-100, -100, 6, 0]}, "tokens").tokens == Tokens((5, 6), (0, 1))
    with pytest.raises(Untrainable, match="^an attention_mask of zeros$"):
        convert({"input_ids": [5], "attention_mask": [0]}, "tokens")


def test_tokens_are_taken_with_their_labels():
    assert convert({"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, "tokens").tokens == Tokens((5, 6, 7), (0, 1, 1))
    assert convert({"input_ids": [5, 6], "loss_mask": [0, 0.5]}, "tokens").tokens == Tokens((5, 6), (0, 0.5))
    assert convert({"input_ids": [5, 6]}, "tokens").tokens == Tokens((5, 6), (1, 1))
    with pytest.raises(Untrainable, match="^empty input_ids$"):
        convert({"input_ids": []}, "tokens")


def test_arguments_of_the_template_are_of_the_row_before_the_set_before_all(tmp_path):
    path = write(tmp_path, [{"messages": [U, A], "chat_template_kwargs": '{"c": 3}'}, {"messages": [U, A]}])
    part = Part((path,), "a", template_args={"b": 2, "c": 2})
    config = DataConfig(template_args={"a": 1, "b": 1, "c": 1})
    first, second = read_conversations(config, [part], Account())
    assert first.template_args == {"a": 1, "b": 2, "c": 3}
    assert second.template_args == {"a": 1, "b": 2, "c": 2}


def test_a_table_without_a_header_has_numbered_columns(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_text("Hi.\t你好。\n")
    kept, _ = read(str(path), header=False, columns={"prompt": "0", "completion": "1"})
    assert [(c.prompt_text, c.text) for c in kept] == [("Hi.", "你好。")]


def test_quotes_may_be_letters(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_text('prompt\tcompletion\n"Hi," he said.\t“你好。”\n')
    with pytest.raises(DataError, match=r"pairs\.tsv:2: .* set data\.quoted = False if quotes are letters"):
        read(str(path))
    kept, _ = read(str(path), quoted=False)
    assert [(c.prompt_text, c.text) for c in kept] == [('"Hi," he said.', "“你好。”")]


def test_lines_of_a_text_file_are_texts_where_it_is_named(tmp_path):
    (tmp_path / "poem.txt").write_text("one\n\n two\r\n")
    kept, _ = read(str(tmp_path / "*.txt"))
    assert [c.text for c in kept] == ["one", " two"]
    write(tmp_path, [{"text": ["three", "four"]}])
    assert [c.text for c in read(str(tmp_path))[0]] == ["three\nfour"]


def test_what_stands_beside_what_was_read_does_not_take_its_place():
    beside = {"from": "human", "value": "two and two?", "content": "OTHER", "role": "weird"}
    row = {"conversations": [beside, {"from": "gpt", "value": "four"}]}
    assert convert(row, "sharegpt").messages[0] == Message("user", "two and two?")
