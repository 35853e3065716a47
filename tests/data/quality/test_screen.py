"""What is done with what the rules find: noted, left out or masked, once, in order, and told with its place."""

import dataclasses
import json
import sys

import pytest

from jax_sft.config import ConfigError, DataConfig, QualityConfig, from_config_dict
from jax_sft.config.checks import PERSONAL_KINDS
from jax_sft.data.conversation import Account, Conversation, DataError, Tokens
from jax_sft.data.formats import read_conversations, to_conversation
from jax_sft.data.quality import duplicates, language, leakage, lists, personal
from jax_sft.data.quality.duplicates import SAME_CONTENT, SAME_ID
from jax_sft.data.quality.screen import BOTH_STAY, files_read, references_of, rule_of, screened
from jax_sft.data.source import parts_of

RUN = {"model": {"path": "m"}, "train": {"steps": 1}}
U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
ALL_OFF = QualityConfig(**{f.name: "off" for f in dataclasses.fields(QualityConfig) if f.default == "note"})
SAID = "Plants take up carbon dioxide through small pores in their leaves, and light does the rest of the work."

ZH = "植物的叶子由许多细胞组成，里面有叶绿素，所以看起来是绿色的。"


def only(**rules) -> QualityConfig:
    return dataclasses.replace(ALL_OFF, **rules)


def write(tmp_path, rows, name="set.jsonl") -> str:
    path = tmp_path / name
    path.write_text("\n".join(json.dumps(r) for r in rows), encoding="utf-8")
    return str(path)


def talk(*turns: str, where: str = "f:1", **more) -> Conversation:
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    return to_conversation({"messages": messages, **more}, where, format="messages", columns={}, source="s")


def screen(config: QualityConfig, *conversations: Conversation, references=()) -> tuple[list[Conversation], Account]:
    account = Account()
    return list(screened(conversations, config, account, references)), account


def read(config: QualityConfig, *paths: str) -> tuple[list[Conversation], Account]:
    account = Account()
    return list(screened(read_conversations(DataConfig(), parts_of(paths), account), config, account)), account


def test_repeated_contents_and_ids_are_counted_and_stay(tmp_path):
    called = {"role": "assistant", "content": "", "tool_calls": CALL}
    rows = [
        {"messages": [U, A], "id": "x"},
        {"messages": [U, called], "id": "x"},  # the id alone
        {"messages": [U, {**A, "weight": 0.5}]},  # the content of 1
        {"messages": [U, {**A, "content": "b"}]},
        {"messages": [A, U]},
        {"messages": [U, A], "tools": CALL},
        {"messages": [U, {**called, "tool_calls": json.dumps(CALL)}], "id": "x"},  # content and id of 2
    ]
    path, other = write(tmp_path, rows), write(tmp_path, rows[3:4], "two.jsonl")
    config = only(same_content="note", same_id="note")
    kept, account = read(config, path, other)
    assert len(kept) == account.read == 8
    assert account.noted == {SAME_CONTENT + BOTH_STAY: 3, SAME_ID + BOTH_STAY: 2}
    assert SAME_CONTENT + BOTH_STAY == "the same content as an earlier conversation, both stay"
    assert account.examples == {
        SAME_CONTENT + BOTH_STAY: [f"{path}:3", f"{path}:7", f"{other}:1"],
        SAME_ID + BOTH_STAY: [f"{path}:2", f"{path}:7"],
    }
    assert account.excerpts[SAME_CONTENT + BOTH_STAY][0].startswith(f"as {path}:1: a")
    kept, account = read(dataclasses.replace(config, same_content="drop", same_id="drop"), path, other)
    assert [c.where for c in kept] == [f"{path}:{n}" for n in (1, 4, 5, 6)]
    assert account.dropped == {SAME_CONTENT: 2, SAME_ID: 2}


def test_repeated_texts_are_counted_with_their_prompts(tmp_path):
    rows = [{"prompt": p, "completion": c} for p, c in [("a", "b"), ("a", "c"), ("", "ab"), ("a", "b")]]
    assert read(only(same_content="note"), write(tmp_path, rows))[1].noted == {SAME_CONTENT + BOTH_STAY: 1}
    assert read(only(same_prompt="drop"), write(tmp_path, rows))[1].dropped == {duplicates.SAME_PROMPT: 2}


def test_nothing_is_left_out_by_default(tmp_path):
    rows = [
        {"messages": [A, U, A]},
        {"messages": [U, {**A, "content": " "}]},
        {"messages": [U, {**A, "content": SAID}]},
        {"messages": [U, {**A, "content": SAID}]},
        {"messages": [U, {**A, "content": "cafÃ©"}]},
    ]
    kept, account = read(QualityConfig(), write(tmp_path, rows))
    assert len(kept) == 5 and not account.dropped and not account.altered
    assert {rule_of(reason) for reason in account.noted} == {"roles", "empty_answer", "same_content", "mojibake"}


def test_a_row_that_is_left_out_is_counted_once_and_repeated_by_none():
    empty, sound = talk("q", "", id="x", where="f:1"), talk("q", SAID, id="x", where="f:2")
    kept, account = screen(only(empty_answer="drop", roles="note", same_id="note", same_prompt="note"), empty, sound)
    assert [c.where for c in kept] == ["f:2"]
    assert account.dropped == {"empty answer: nothing but space, points or a placeholder": 1} and not account.noted


def test_a_conversation_noted_by_several_rules_is_noted_by_each():
    _, account = screen(only(markup="note", refusal="note"), talk("q", "<b>As an AI, I cannot say.</b>"))
    assert {rule_of(reason): n for reason, n in account.noted.items()} == {"markup": 1, "refusal": 1}


def test_a_near_duplicate_names_the_earlier_row_and_is_compared_with_those_that_stay():
    rows = [talk("q", f"{SAID} {end}", where=f"f:{i}") for i, end in enumerate(("One.", "Two.", "Three."), 1)]
    kept, account = screen(only(near_duplicate="drop", near_duplicate_similarity=0.7), *rows)
    assert [c.where for c in kept] == ["f:1"] and account.dropped == {duplicates.NEAR: 2}
    assert all(excerpt.startswith("as f:1: Plants") for excerpt in account.excerpts[duplicates.NEAR])
    exact, account = screen(only(near_duplicate="note", same_content="note"), rows[0], rows[0])
    assert len(exact) == 2 and account.noted == {SAME_CONTENT + BOTH_STAY: 1}  # not told twice


def test_several_questions_about_one_passage_are_no_near_duplicates():
    passage = " ".join(f"{SAID} This is fact {n} of them all." for n in range(9))
    rows = [talk(f"{passage}\n\n{q}", a, where=f"f:{a}") for q, a in (("What?", "Plants"), ("Where?", "Leaves"))]
    kept, account = screen(only(near_duplicate="drop"), *rows, talk(f"{passage} Hm.\n\nWhat?", "Plants", where="f:3"))
    assert len(kept) == 2 and account.examples == {duplicates.NEAR: ["f:3"]}


def test_personal_data_is_masked_everywhere_and_the_report_says_how():
    call = [{"type": "function", "function": {"name": "mail", "arguments": {"to": "anna.li@gmail.com"}}}]
    messages = [
        {"role": "user", "content": "Write to anna.li@gmail.com or 4532 0151 1283 0366"},
        {"role": "assistant", "content": "I do.", "tool_calls": call, "reasoning_content": "call +49 171 2345678"},
    ]
    of = to_conversation({"messages": messages}, "f:1", format="messages", columns={}, source="s")
    (kept,), account = screen(only(personal_data="mask"), of)
    assert kept.messages[0].content == "Write to <EMAIL> or <CARD>"
    assert kept.messages[1].extra["tool_calls"][0]["function"]["arguments"] == {"to": "<EMAIL>"}
    assert kept.messages[1].extra["reasoning_content"] == "call <PHONE>"
    reason = "personal data: an e-mail address is masked"
    assert account.altered[reason] == 1 and account.examples[reason] == ["f:1"]
    assert (
        "anna.li@gmail.com or 4532" in account.excerpts[reason][0]
        and "-> Write to <EMAIL>" in account.excerpts[reason][0]
    )
    (same,), account = screen(only(personal_data="mask", personal_kinds=("iban",)), of)
    assert same is of and not account.altered
    assert screen(only(personal_data="drop"), of)[1].dropped == {"personal data: an e-mail address": 1}
    assert len(screen(only(personal_data="note"), of)[1].noted) == 3


def test_personal_data_is_looked_for_in_the_descriptions_of_tools_too():
    sound = {"name": "post", "description": "Sends a letter.", "parameters": {"type": "object", "required": ["to"]}}
    to = {"type": "string", "description": "Such as anna.li@gmail.com", "enum": ["+49 171 2345678"]}
    asks = {"name": "mail", "parameters": {"type": "object", "properties": {"to": to}, "strict": True}}
    of = talk("q", SAID, tools=[sound, asks])
    (kept,), account = screen(only(personal_data="mask"), of)
    assert kept.tools[0] == of.tools[0] and kept.messages == of.messages
    parameters = kept.tools[1]["function"]["parameters"]
    assert parameters["properties"]["to"] == {
        "type": "string",
        "description": "Such as <EMAIL>",
        "enum": ["<PHONE>"],
    }
    assert parameters["strict"] is True
    assert len(account.altered) == 2
    assert screen(only(personal_data="drop"), of)[1].dropped == {"personal data: an e-mail address": 1}
    assert len(screen(only(personal_data="note"), of)[1].noted) == 2
    assert screen(only(personal_data="mask"), talk("q", SAID, tools=[sound]))[1].altered == {}


@pytest.mark.parametrize(
    "text",
    [
        "card 4111 1111 1111 1112", "id 11010519491231002Y", "110105194913310026", "SSN 000-12-3456", "SSN 666-12-3456",
        "GB 12 34 56 C", "DE89370400440532013001", "52998224726", "529.982.247-26", "12345678A", "111.111.111-11",
        "user@example.com", "192.168.1.20", "version 10.20.30.40", "3.14159265358979323846", "978-3-16-148410-0",
        "(212) 555-0123", "2023-10-12 14:30:00", "1,234,567,890", "13000000000", "order 1234567890123", "10.0.0.1",
    ],
)  # fmt: skip
def test_what_only_looks_like_personal_data_is_left_alone(text: str):
    assert personal.found_in(f"It is {text} here", tuple(personal.NAMES)) == []


def test_scores_are_judged_by_id_and_a_missing_one_is_noted(tmp_path):
    lines = [{"id": i, "loss": loss, "ratio": r} for i, loss, r in (("a", 1.0, 0.5), ("b", 9.0, 0.5), ("c", 1.0, None))]
    config = only(score="drop", scores=write(tmp_path, lines), max_ratio=0.8, max_loss=5.0, min_ratio=0.1)
    kept, account = screen(config, *(talk("q", SAID, id=i) for i in "abcd"))
    assert [c.id for c in kept] == ["a", "c", "d"]
    assert account.dropped == {"score: loss above data.quality.max_loss": 1} and account.noted == {lists.NO_SCORE: 1}
    assert account.excerpts["score: loss above data.quality.max_loss"][0].startswith("loss 9, ratio 0.5: Plants")
    for bound, said in (({"min_ratio": 0.6}, "below"), ({"max_ratio": 0.4}, "above")):
        (reason,) = screen(dataclasses.replace(config, **bound), talk("q", SAID, id="a"))[1].dropped
        assert reason == f"score: ratio {said} data.quality.{next(iter(bound))}"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["x"], r"scores.jsonl:1: is no score; write an object with id, loss"),
        (['{"id": "a", "ratio": 1}', '{"id": "a", "ratio": 1}'], r":2: the id 'a' has a score already"),
        (['{"id": "a", "loss": 1}'], r":1: has no 'ratio', which the bounds"),
        (['{"id": "a", "ratio": "1"}'], r":1: ratio is '1'; write a finite number, or null"),
        (['{"id": "a", "ratio": NaN}'], r":1: ratio is nan; write a finite number, or null where there is none"),
        (['{"id": "a", "ratio": 1}', '{"id": "b", "ratio": -Infinity}'], r":2: ratio is -inf; write a finite number"),
        (['{"id": "a", "ratio": 1, "loss": 1e999}'], r":1: loss is inf; write a finite number"),
        (['{"id": "a", "ratio": 1' + "0" * 400 + "}"], r":1: ratio is 10+; write a finite number"),
        ([], r"scores.jsonl: holds no score; write JSON lines"),
    ],
)
def test_a_file_of_scores_that_cannot_be_used_is_an_error(tmp_path, lines, message):
    (tmp_path / "scores.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match=message):
        screen(only(score="note", scores=str(tmp_path / "scores.jsonl"), max_ratio=1.0))


def test_a_list_of_words_that_cannot_be_used_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"data.quality.word_lists: .*none.txt cannot be read \(No such file.*in UTF-8"):
        screen(only(words="note", word_lists=(str(tmp_path / "none.txt"),)))
    (tmp_path / "empty.txt").write_text("# nothing\n")
    with pytest.raises(DataError, match=r"empty.txt: holds no word; write one a line"):
        screen(only(words="note", word_lists=(str(tmp_path / "empty.txt"),)))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match="latin.txt cannot be read .it is not UTF-8"):
        screen(only(words="note", word_lists=(str(tmp_path / "latin.txt"),)))


def test_words_are_whole_in_spaced_scripts_and_anywhere_in_chinese(tmp_path):
    (tmp_path / "words.txt").write_text("ass # a word\nc++ hater\n坏人\n", encoding="utf-8")
    config = only(words="drop", word_lists=(str(tmp_path / "words.txt"),))
    texts = ["You ASS!", "a classic assessment", "a C++  hater.", "他是个坏人吗", "c++ haters", "好人"]
    kept, account = screen(config, *(talk("q", text, where=str(i)) for i, text in enumerate(texts)))
    assert [c.where for c in kept] == ["1", "4", "5"]
    assert account.dropped == {"words: a word of data.quality.word_lists": 3}


def test_leaks_of_validation_and_benchmarks_name_the_prompt(tmp_path):
    asked = "A train leaves the old station at nine and travels for three hours before it meets the other one"
    validation = write(tmp_path, [{"messages": [{**U, "content": asked}, A]}], "validation.jsonl")
    of_benchmark = "小明在市场买了十二个苹果又送给邻居五个请问还剩下多少个苹果呢"
    benchmark = write(tmp_path, [{"question": of_benchmark, "answer": "7"}], "benchmark.jsonl")
    config = DataConfig(quality=only(leakage="drop", benchmarks=(benchmark,)))
    references = list(references_of(config, parts_of((validation,))))
    rows = [talk(f"Please solve: {asked.upper()}!", "b"), talk("q", f"好的。{of_benchmark}"), talk(SAID, "c")]
    kept, account = screen(config.quality, *rows, references=references)
    assert [c.messages[0].content for c in kept] == [SAID]
    reason = "leakage: a prompt of the validation set or of a benchmark"
    assert account.dropped == {reason: 2}
    assert [e.split(": ")[0] for e in account.excerpts[reason]] == [f"of {validation}:1", f"of {benchmark}:1"]
    assert {p.name for p in files_read(config.quality, parts_of((validation,)))} == {
        "validation.jsonl",
        "benchmark.jsonl",
    }
    assert not files_read(only(benchmarks=(benchmark,)), parts_of((validation,)))


def test_a_form_that_many_prompts_share_is_no_leak():
    form = "Read the following passage with care and then answer the question below in one short sentence:"
    references = [leakage.Reference(f"{form} what did {name} eat?", name) for name in "abcdefghijklmnop"]
    kept, account = screen(only(leakage="drop"), talk(f"{form} who won the cup?", "b"), references=references)
    assert len(kept) == 1 and not account.dropped


def test_a_benchmark_without_a_prompt_is_an_error(tmp_path):
    path = write(tmp_path, [{"a": "b"}])
    with pytest.raises(
        DataError, match=r":1: a row of data.quality.benchmarks has no text in question, .*but 'a'; write"
    ):
        list(leakage.benchmark_prompts((path,), split="train"))


def test_usual_lengths_come_of_the_first_conversations_and_bounds_are_named():
    rows = [talk("q", SAID + "x" * (i % 7), where=str(i)) for i in range(50)] + [talk("q", "a", where="short")]
    kept, account = screen(only(length="drop", max_length_deviation=6.0), *rows)
    assert len(kept) == 50 and account.dropped == {
        "length: far from the usual, by data.quality.max_length_deviation": 1
    }
    for bound, said in (({"min_answer_characters": 2}, "below"), ({"max_answer_characters": 0}, "above")):
        (reason,) = screen(only(length="drop", **bound), rows[-1])[1].dropped
        assert reason == f"length: {said} data.quality.{next(iter(bound))}"


def test_tokens_of_elsewhere_pass_the_rules_that_are_about_text():
    of = Conversation((), "s", "f:1", tokens=Tokens((1, 2), (1.0, 1.0)), where="f:1")
    rules = {
        f.name: "drop"
        for f in dataclasses.fields(QualityConfig)
        if f.default in ("note", "off") and f.name != "leakage"
    }
    kept, account = screen(QualityConfig(**rules, min_answer_characters=5), of, of)
    assert kept == [of] and account.dropped == {SAME_CONTENT: 1}


@pytest.mark.parametrize(
    ("prompt", "answer", "found"),
    [
        ("What is a leaf made of, and why is it green?", ZH, True),
        ("What is a leaf made of? Answer in Chinese.", ZH, False),
        ("What would my friend from the village answer if I say 植物的叶子 to her?", ZH, False),
        ("What is a leaf made of?", "绿色", False),  # too short to say
        ("写一个打印列表的Python程序", "for x in numbers: print(x)  # one number a line, as it was asked", False),
    ],
)
def test_the_language_is_judged_by_script_where_it_can_be(prompt, answer, found):
    assert bool(screen(only(wrong_language="note"), talk(prompt, answer))[1].noted) is found


def test_rules_whose_library_is_missing_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(
        DataError, match=r"near_duplicate needs datasketch, which is not installed; pip install 'jax-sft\[quality\]'"
    ):
        screen(only(near_duplicate="note"))
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    language._model.cache_clear()
    with pytest.raises(DataError, match=r"language_by = 'model' needs py3langid, which is not installed; pip install"):
        screen(only(wrong_language="note", language_by="model"))
    assert screen(only(wrong_language="note"), talk("q", SAID))[0]
    assert screen(QualityConfig(), talk("q", SAID))[0]  # defaults need nothing


def test_every_reason_belongs_to_its_rule():
    assert rule_of("near duplicate: much the same text as an earlier conversation") == "near_duplicate"
    assert rule_of(SAME_ID + BOTH_STAY) == "same_id" and rule_of("empty conversation") == "format"


@pytest.mark.parametrize(
    ("quality", "problem"),
    [
        ({"personal_kinds": ("mail",)}, r"personal_kinds: 'mail' is no kind; did you mean email\?; the kinds are iban"),
        ({"max_loss": 3.0}, r"data.quality.max_loss judges data.quality.scores, which is not set; name the file"),
        ({"scores": "s.jsonl"}, r"data.quality.scores is set, but no bound; set data.quality.min_ratio"),
        (
            {"scores": "s", "min_ratio": 2.0, "max_ratio": 1.0},
            r"min_ratio = 2.0 is above max_ratio = 1.0, nothing lies between",
        ),
        ({"min_answer_characters": 9, "max_answer_characters": 1}, r"min_answer_characters = 9 is above max_answer"),
        ({"near_duplicate_similarity": 1.5}, r"near_duplicate_similarity = 1.5 must be above 0 and at most 1"),
        ({"leakage_share": 0.0}, r"leakage_share = 0.0 must be above 0 and at most 1"),
        ({"leakage_words": 0}, r"leakage_words = 0 must be greater than 0"),
        ({"max_length_deviation": -1.0}, r"max_length_deviation = -1.0 must be greater than 0"),
        ({"cut_off": "mask"}, r"data.quality.cut_off = 'mask' is not one of off, note, drop"),
        (
            {"near_duplicates": "drop"},
            r"near_duplicates is not a config key; did you mean data.quality.near_duplicate\?",
        ),
    ],
)
def test_rules_that_cannot_be_followed_are_told_at_the_door(quality, problem):
    with pytest.raises(ConfigError, match=problem):
        from_config_dict({**RUN, "data": {"train": ("a.jsonl",), "quality": quality}})


@pytest.mark.parametrize(
    ("rule", "key", "value"),
    [
        ("wrong_language", "language_by", "model"),
        ("length", "min_answer_characters", 2),
        ("length", "max_answer_characters", 900),
        ("length", "max_length_deviation", 4.0),
        ("words", "word_lists", ("words.txt",)),
        ("score", "scores", "scores.jsonl"),
        ("score", "max_loss", 3.0),
        ("leakage", "benchmarks", ("b.jsonl",)),
        ("leakage", "leakage_words", 8),
        ("leakage", "leakage_characters", 8),
        ("leakage", "leakage_share", 0.9),
        ("near_duplicate", "near_duplicate_similarity", 0.7),
    ],
)
def test_a_key_whose_rule_is_off_would_do_nothing_and_is_told_at_the_door(rule, key, value):
    quality = {rule: "off", key: value} | ({"scores": "scores.jsonl"} if key == "max_loss" else {})
    said = rf"quality.{key} is set, but data.quality.{rule} = 'off'; set {rule} to 'note' or 'drop', or leave {key} out"
    with pytest.raises(ConfigError, match=said):
        from_config_dict({**RUN, "data": {"train": ("a.jsonl",), "quality": quality}})


def test_kinds_of_personal_data_are_told_where_none_is_looked_for():
    said = (
        r"personal_kinds is set, but data.quality.personal_data = 'off'; set personal_data to 'note', 'drop' or 'mask'"
    )
    with pytest.raises(ConfigError, match=said):
        from_config_dict({**RUN, "data": {"train": ("a.jsonl",), "quality": {"personal_kinds": ("email",)}}})


def test_scores_that_a_stage_goes_by_need_no_rule_but_their_bounds_do():
    run = {"model": {"path": "m"}, "stages": [{"steps": 3, "order": "score"}]}
    quality = {"scores": "scores.jsonl", "score": "off"}
    assert from_config_dict({**run, "data": {"train": ("a.jsonl",), "quality": quality}}).data.quality.score == "off"
    with pytest.raises(ConfigError) as caught:
        from_config_dict({**run, "data": {"train": ("a.jsonl",), "quality": quality | {"max_loss": 3.0}}})
    assert "data.quality.max_loss is set, but data.quality.score = 'off'" in str(caught.value)
    assert "data.quality.scores" not in str(caught.value)


def test_a_library_that_a_rule_needs_is_asked_for_at_the_door(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    rules = {"near_duplicate": "note", "wrong_language": "note", "language_by": "model"}
    with pytest.raises(
        ConfigError, match=r"(?s)needs datasketch, .*jax-sft\[quality\].*needs py3langid, .*or set it to"
    ):
        from_config_dict({**RUN, "data": {"train": ("a.jsonl",), "quality": rules}})


def test_the_kinds_of_the_config_are_those_that_are_looked_for():
    assert set(PERSONAL_KINDS) == set(personal.NAMES) == set(personal.TAGS)


def test_a_prompt_that_is_there_many_times_leaks_like_one():
    asked = "A train leaves the old station at nine and travels for three hours before it meets the other one"
    references = [leakage.Reference(asked, f"v:{i}") for i in range(30)]
    kept, account = screen(only(leakage="drop"), talk(asked, "b"), references=references)
    assert not kept and sum(account.dropped.values()) == 1


def test_a_short_prompt_leaks_where_it_is_all_that_the_user_says():
    references = list(leakage.prompts_of([talk("Capital of Peru?", "Lima."), talk("Good day!", "a", "Go on", "b")]))
    rows = [
        talk("capital of  PERU?", "b"),
        talk("Capital of Peru?", "b", "And of Chile?", "c"),
        talk("Good day!", "b"),
        talk("秘鲁的首都", "b"),
    ]
    references += [leakage.Reference(text, "b:1") for text in ("秘鲁的首都", "2+2", "👍", "...")]
    rows += [talk("2-2", "0"), talk("2 + 2?", "4"), talk("👍", "b"), talk("..", "b")]
    kept, account = screen(only(leakage="drop"), *rows, references=references)
    assert [c.messages[0].content for c in kept] == ["Capital of Peru?", "Good day!", "2-2", ".."]
    assert account.dropped == {leakage.REASON: 4}
