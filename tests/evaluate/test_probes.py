"""Probes tell an answer from a continuation, and say what is wrong: each behaviour with answers that pass and fail.

`probe_answers.jsonl` has answers by hand, a line each: what base models and what assistants say to a probe or a prompt.
"""

import dataclasses
import itertools
import json
import pathlib
import subprocess
import sys

import pytest

from jax_sft.data.conversation import DataError
from jax_sft.data.quality.language import SCRIPTS
from jax_sft.evaluate import probes
from jax_sft.evaluate.probes import continuing, shares
from jax_sft.evaluate.probes.prompts import KINDS, SCRIPT_OF

OURS = {probe.id: probe for probe in probes.read_prompts()}
ANSWERS = [
    json.loads(line) for line in pathlib.Path(__file__).with_name("probe_answers.jsonl").read_text("utf-8").splitlines()
]
PLAIN = OURS["en-answer-capital"]


def asked(prompt: str, **fields) -> probes.Probe:
    return dataclasses.replace(PLAIN, id="x", messages=({"role": "user", "content": prompt},), **fields)


def judged(probe: probes.Probe | str, text: str, **how) -> probes.Judgement:
    probe = OURS[probe] if isinstance(probe, str) else probe
    return probes.judge(probe, text, **{"stopped": True, "tokens": 9, **how})


def failing(behaviour: str, probe: probes.Probe | str, text: str, **how) -> str:
    """The reason of a judgement that must be False."""
    judgement = judged(probe, text, **how)
    assert getattr(judgement, behaviour) is False, (text, judgement)
    return judgement.reasons[behaviour]


def write(tmp_path, *rows) -> str:
    path = tmp_path / "probes.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in rows), "utf-8")
    return str(path)


# The set and its file.


def test_our_set_has_every_kind_in_both_languages():
    counts = {}
    for probe in OURS.values():
        counts[probe.kind, probe.language] = counts.get((probe.kind, probe.language), 0) + 1
    assert set(counts) == {(kind, language) for kind in KINDS for language in ("en", "zh")}
    assert min(counts.values()) >= 5 and len(OURS) == 60
    assert sum(n for (_, language), n in counts.items() if language == "zh") == 30
    assert all(p.messages[0]["role"] == "system" and len(p.messages) >= 4 for p in OURS.values() if p.kind == "system")
    assert all(len(p.messages) >= 5 for p in OURS.values() if p.kind == "recall")
    assert set(SCRIPT_OF.values()) <= set(SCRIPTS)


def test_no_recalled_word_stands_in_the_last_question():
    for probe in OURS.values():
        if probe.kind == "recall":
            told = " ".join(m["content"] for m in probe.messages[:-1])
            for words in probe.expect:
                assert any(word in told for word in words.split("|")), probe.id
                assert not any(word in probe.question for word in words.split("|")), probe.id


def test_a_file_of_the_same_layout_is_read(tmp_path):
    messages = [{"role": "user", "content": "Nenne eine Farbe."}]
    row = {"id": "farbe", "kind": "format", "language": "de", "messages": messages, "format": "word"}
    [probe] = probes.read_prompts(write(tmp_path, row, ""))
    assert probe.answer_language == "de" and probe.format == "word" and probe.question == "Nenne eine Farbe."
    [probe] = probes.read_prompts(write(tmp_path, row | {"answer_language": None}))
    assert probe.answer_language is None


ROW = {"id": "a", "kind": "answer", "language": "en", "messages": [{"role": "user", "content": "Hm?"}]}
SYSTEM = [{"role": "system", "content": "Be brief."}, *ROW["messages"]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "2: is no JSON"),
        ("[1]", r"2: is \[1\]; write one JSON object a line"),
        ({k: v for k, v in ROW.items() if k != "kind"}, "2: the field 'kind' is missing"),
        (ROW | {"id": 3}, "2: field 'id' is 3; give a text"),
        (ROW | {"kind": "quiz"}, "2: field 'kind' is \"quiz\"; give one of answer, system"),
        (ROW | {"language": "xx"}, "2: field 'language' is \"xx\"; give one of en"),
        (ROW | {"answer_language": "english"}, "2: field 'answer_language' is \"english\""),
        (ROW | {"expect": ["x"]}, "2: the field 'expect' does not belong to the kind 'answer'"),
        (ROW | {"kind": "recall", "expects": ["x"]}, "'expects' does not belong to the kind 'recall'; is it 'expect'"),
        (ROW | {"kind": "recall"}, "2: the field 'expect' is missing"),
        (ROW | {"kind": "recall", "expect": "x"}, "2: field 'expect' is \"x\"; give a list of texts"),
        (ROW | {"kind": "format"}, "2: the field 'format' is missing; give one of json"),
        (ROW | {"kind": "format", "format": "xml"}, "2: field 'format' is \"xml\""),
        (ROW | {"kind": "format", "format": "bullets", "count": 0}, "2: field 'count' is 0; give a whole number"),
        (ROW | {"kind": "system", "messages": SYSTEM}, "2: the kind 'system' needs a rule to check"),
        (ROW | {"kind": "system", "max_words": 5}, "2: field 'messages': the kind 'system' begins with"),
        (ROW | {"messages": []}, r"2: field 'messages' is \[\]"),
        (ROW | {"messages": [{"role": "user"}]}, r"2: field 'messages'\[0\]"),
        (ROW | {"messages": [{"role": "bot", "content": "x"}]}, r"2: field 'messages'\[0\] .* its role is one of"),
        (ROW | {"messages": SYSTEM[:1]}, "2: field 'messages' ends with 'system'; end it with the user's turn"),
        (ROW | {"id": "first"}, "2: id 'first' is there twice"),
    ],
)
def test_what_is_no_probe_is_named_by_line_and_field(tmp_path, row, message):
    with pytest.raises(DataError, match=r"probes\.jsonl:" + ("" if message.startswith("2") else "2: .*") + message):
        probes.read_prompts(write(tmp_path, ROW | {"id": "first"}, row))


def test_a_file_without_probes_or_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(DataError, match="has no probes; write one JSON object a line"):
        probes.read_prompts(write(tmp_path, ""))
    with pytest.raises(DataError, match="cannot be read"):
        probes.read_prompts(str(tmp_path / "none.jsonl"))


def test_a_lone_question_is_put_as_it_is_and_turns_get_labels():
    assert probes.as_plain_text(PLAIN) == "What is the capital of Portugal?\n"
    text = probes.as_plain_text(OURS["en-system-bird"])
    assert text.startswith("You are Pip") and text.endswith("\nUser: Remind me, who are you?\nAssistant:")
    assert "\n\nUser: Good morning! Is it windy up there?\nAssistant: Good morning!" in text
    assert probes.as_plain_text(OURS["zh-recall-city"]).endswith("\n用户：我下个月要去哪座城市？\n助手：")


def test_no_jax_is_imported():
    code = "import sys; from jax_sft.evaluate import probes; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# An answer or a continuation.


def test_answers_are_told_from_continuations():
    right = {"base": [], "assistant": []}
    wrong = []
    for row in ANSWERS:
        probe = OURS[row["probe"]] if "probe" in row else asked(row["prompt"])
        judgement = judged(probe, row["text"])
        is_right = judgement.answers is (row["by"] == "assistant")
        right[row["by"]].append(is_right)
        if not is_right:
            why = judgement.reasons.get("answers", "taken for an answer")
            wrong.append(f"{row['by']:<10} {probe.question[-40:]!r:<44} {row['text'][:60]!r:<64} {why}")
    table = "\n" + "\n".join(wrong)
    assert min(len(r) for r in right.values()) >= 100
    assert all(sum(r) >= 0.95 * len(r) for r in right.values()), table


def test_answers_of_a_training_set_are_no_continuations():
    demo = pathlib.Path(__file__).resolve().parents[2] / "demo" / "train.jsonl"
    wrong, count = [], 0
    for row in map(json.loads, demo.read_text("utf-8").splitlines()):
        for one, two in itertools.pairwise(row["messages"]):
            if (one["role"], two["role"]) == ("user", "assistant"):
                count += 1
                if found := continuing.why_no_answer(one["content"], two["content"]):
                    wrong.append(f"{found.reason}: {one['content'][-60:]!r} {two['content'][:60]!r}")
    assert count > 500 and len(wrong) <= 0.01 * count, "\n".join(wrong)


@pytest.mark.parametrize(
    ("prompt", "text", "reason"),
    [
        ("What is a fjord?", "", "empty answer"),
        ("What is a fjord?", " \n…", "empty answer"),
        ("What is a fjord?", "What is a fjord?\nA narrow bay.", "repeats prompt"),
        ("What is a fjord?", ", and how does it form?", "goes on with the question's sentence"),
        ("What is a fjord?", "A bay.\nUser: And a delta?", "writes the next turn"),
        ("What is a fjord?", "A bay.\nAssistant: Anything else?", "writes the next turn"),
        ("What is a fjord?", "a) a bay b) a hill c) a fish", "writes options"),
        ("What is a fjord?", "A fjord is a ______ between cliffs.", "writes blanks"),
        ("What is a fjord?", "(3 points)", "writes a sheet"),
        ("What is a fjord?", "3. Where are there many of them", "goes on with a list"),
        ("What is a fjord?", "Describe how ice forms it. Explain why it is deep.", "goes on with more tasks"),
        ("Draw up a menu.", "Your menu should have three courses.", "goes on with demands"),
        ("Draw up a menu.", "Draw up a shopping list.", "goes on with more tasks of the prompt's kind"),
        ("What is a fjord?", "What is a delta? What is a cape?", "asks where it should answer"),
        ("What is a fjord?", "How deep is the sea there?\nUp to a mile.", "begins with a question on a line"),
        (
            "What is a fjord?",
            "It is a narrow bay. It is deep. It is old. What is a bay?",
            "goes on with the next question",
        ),
        ("What is a fjord?", "I need to know it for an exam.", "speaks as the one who asks"),
        ("What is a fjord?", "Posted by norwegian, 12 comments", "writes a page"),
        ("What is a fjord?", "A bay. Click here to see more.", "boilerplate"),
        ("峡湾是什么？", "峡湾是什么？峡湾是海湾。", "repeats prompt"),
        ("峡湾是什么？", "海湾。\n用户：那三角洲呢？", "writes the next turn"),
        ("峡湾是什么？", "A．海湾 B．小山 C．鱼", "writes options"),
        ("峡湾是什么？", "二、三角洲是怎样形成的", "goes on with a list"),
        ("峡湾是什么？", "三角洲是什么？海角是什么？", "asks where it should answer"),
        ("峡湾是什么？", "我想知道它有多深。", "speaks as the one who asks"),
        ("写一份菜单。", "要求：三道菜。", "goes on with demands"),
    ],
)
def test_each_sign_of_a_continuation_has_its_reason(prompt, text, reason):
    assert failing("answers", asked(prompt), text).startswith(reason)


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("What is a fjord?", 'Your question "What is a fjord?" is quickly answered: a narrow, deep bay.'),
        ("What is a fjord?", "# What is a fjord?\nA narrow, deep bay."),
        ("What is a fjord?", "A narrow, deep bay. Would you like some examples? Or do you want a map?"),
        ("What is a fjord?", "Bay"),
        ("How many?", "3."),
        ("What is a fjord?", "```\nUser: x\n```\nThe block shows it."),
        ("Give me four questions about fjords.", "1. How deep are they?\n2. How old are they?"),
        ("Write an interview with a fisher.", "Question: Is it cold?\nAnswer: It is."),
        ("Write a letter to a fjord guide.", "I need to book a tour. Thanks in advance!"),
        ("Give me an answer with options.", "A. Yes B. No C. Perhaps"),
        ("What is new?", "Sorry, what do you mean?"),
        ("峡湾是什么？", "“峡湾是什么？”这个问题很好：它是狭长的海湾。"),
        ("峡湾是什么？", "狭长的海湾。需要我举几个例子吗？"),
        ("峡湾是什么？", "海湾"),
        ("出两道题考考我。", "1. 峡湾是什么？\n2. 它有多深？"),
    ],
)
def test_sound_answers_are_no_continuations(prompt, text):
    judgement = judged(asked(prompt), text)
    assert judgement.answers is True, judgement.reasons


def test_a_role_may_speak_of_itself():
    assert continuing.why_no_answer("Who are you?", "I am a student of magic.", plays_role=True) is None
    assert continuing.why_no_answer("Who are you?", "I am a student of magic.") is not None


# The other behaviours.


def test_an_answer_stops_by_itself_or_at_the_limit():
    assert judged(PLAIN, "Lisbon.").stops is True
    reason = failing("stops", PLAIN, "Lisbon is " + "very " * 30 + "old", stopped=False, tokens=33)
    assert reason.startswith("ran on to the limit of 33 tokens: ") and reason.endswith("very old'")


@pytest.mark.parametrize("text", ["It is old. " * 12, "很好很好" * 20, "Well\n" * 9])
def test_loops_are_seen(text):
    assert failing("no_loop", PLAIN, text).startswith("loops: ")


@pytest.mark.parametrize("text", ["Row, row, row your boat.", "它又大又高，又远又静。", "1\n2\n3\n4\n5"])
def test_what_is_said_twice_is_no_loop(text):
    assert judged(PLAIN, text).no_loop is True


def test_nothing_neither_loops_nor_has_a_language():
    judgement = judged(PLAIN, "  ")
    assert judgement.no_loop is None and judgement.language is None and judgement.answers is False


@pytest.mark.parametrize(
    ("probe", "text", "is_right"),
    [
        ("en-answer-capital", "The capital is Lisbon.", True),
        ("en-answer-capital", "葡萄牙的首都是里斯本。", False),
        ("en-answer-capital", "Lisbon", None),  # too short to tell
        ("zh-answer-capital", "The capital is Lisbon.", False),
        ("zh-answer-capital", "葡萄牙的首都是里斯本（Lisbon）。", True),
        ("zh-answer-capital", "首都はリスボンです。とてもきれいな町です。", False),
        ("en-language-chinese", "因为叶绿素分解了。", True),
        ("en-language-chinese", "好", None),
        ("en-language-chinese", "Green fades.", False),  # the kind is judged from a few letters on
        ("zh-language-english", "Chlorophyll breaks down, and red remains.", True),
        ("zh-language-english", "因为叶绿素分解了。", False),
        ("zh-language-about-word", "“serendipity”是指意外的好运气。", True),
        ("zh-language-about-word", "serendipity 指好运气", None),  # mixed
        ("zh-answer-code", "def f(x):\n    return x", None),
        ("zh-answer-sea", "def f(x):\n    return x\nprint(f(1))", None),  # code has no language
    ],
)
def test_the_language_is_told_by_script(probe, text, is_right):
    judgement = judged(probe, text)
    assert judgement.language is is_right
    assert ("language" in judgement.reasons) == (is_right is False)


@pytest.mark.parametrize(
    ("probe", "text", "reason"),
    [
        ("en-system-bird", "I am Pip, the bird!", None),
        ("en-system-bird", "I am pip.", None),
        ("en-system-bird", "I am a bird.", "does not say 'Pip'"),
        ("en-system-bird", "I am Pippa.", "does not say 'Pip'"),  # no part of another word
        ("en-system-bird", "I play Pip, but I am a language model.", "says 'language model'"),
        ("en-system-bird", "Pip! Said in vain, by the tail of a kite.", None),  # "AI" within words
        ("en-system-one-sentence", "Magma rises.", None),
        ("en-system-one-sentence", "Magma rises. Then it breaks out.", "has 2 sentences, may have 1"),
        ("en-system-one-sentence", " ", "says nothing"),
        ("en-system-ten-words", "Rivers carry salt into it.", None),
        ("en-system-ten-words", "Rivers carry salt into it, year after year, and it stays there.", "has 12 words"),
        ("en-system-no-price", "Please ask at the shop.", None),
        ("en-system-no-price", "It is $20 at the shop.", "says '$'"),
        ("zh-system-bird", "我是啾啾，一只小鸟。", None),
        ("zh-system-bird", "我是人工智能啾啾。", "says '人工智能'"),
        ("zh-system-one-sentence", "岩浆上升。然后喷发。", "has 2 sentences"),
        ("zh-system-twenty", "河流把盐分带进了大海。", None),
        ("zh-system-twenty", "河流不断地把岩石里的盐分带进大海，水分蒸发以后盐就留了下来。", "has 28 words"),
        ("zh-system-no-price", "请您到店里看看。", None),
        ("zh-system-closing", "可以带。", "does not say '一路顺风'"),
    ],
)
def test_the_system_message_holds(probe, text, reason):
    if reason is None:
        judgement = judged(probe, text)
        assert judgement.role is True, judgement.reasons
    else:
        assert failing("role", probe, text).startswith(reason)


@pytest.mark.parametrize(
    ("probe", "text", "is_right"),
    [
        ("en-recall-name", "You are Teodora.", True),
        ("en-recall-name", "I do not know.", False),
        ("en-recall-train", "At seven forty-two.", True),  # the other wording
        ("en-recall-train", "At 7:24.", False),
        ("en-recall-train", "At 17:42.", False),
        ("en-recall-dog", "Biscuit, a beagle.", True),
        ("en-recall-dog", "She is called Biscuit.", False),  # both words must be there
        ("zh-recall-city", "您要去泉州。", True),
        ("zh-recall-city", "您要去福州。", False),
    ],
)
def test_what_was_told_is_recalled(probe, text, is_right):
    assert judged(probe, text).recall is is_right


@pytest.mark.parametrize(
    ("probe", "text", "reason"),
    [
        ("en-format-json", '{"name": "Lena", "age": 31}', None),
        ("en-format-json", '```json\n{"name": "Lena", "age": 31}\n```', None),
        ("en-format-json", 'Here it is: {"name": "Lena", "age": 31}', "is no JSON alone"),
        ("en-format-json", '{"name": "Lena"}', "lacks the key 'age'"),
        ("en-format-json", '["name", "age"]', "lacks the key 'name'"),
        ("en-format-array", '["spring", "summer", "autumn", "winter"]', None),
        ("en-format-array", '"spring"', "is no JSON object or array"),
        ("zh-format-json", '{"姓名": "林娜", "年龄": 31}', None),
        ("en-format-bullets", "- one\n- two\n- three", None),
        ("en-format-bullets", "Three uses:\n\n* one\n  more of it\n* two\n* three", None),
        ("en-format-bullets", "- one\n- two", "has 2 items, must have 3"),
        ("en-format-bullets", "One, two and three.", "is no list"),
        ("en-format-bullets", "- one\n- two\n- three\nThat is all.", "is no list alone"),
        ("zh-format-bullets", "1. 去水垢\n2. 擦玻璃\n3. 去异味", None),
        ("en-format-word", "Mercury.", None),
        ("en-format-word", "**Mercury**", None),
        ("en-format-word", "It is Mercury.", "has 3 words, must have one"),
        ("zh-format-word", "水星。", None),
        ("zh-format-word", "是离太阳最近的水星", "has 9 words"),
        ("en-format-number", "180", None),
        ("en-format-number", "**180**.", None),
        ("en-format-number", "180 minutes", "is not a number alone"),
        ("zh-format-number", "180。", None),
        ("zh-format-number", "180分钟", "is not a number alone"),
        ("zh-format-number", "", "is not a number alone"),
    ],
)
def test_the_format_is_checked(probe, text, reason):
    if reason is None:
        judgement = judged(probe, text)
        assert judgement.format is True, judgement.reasons
    else:
        assert failing("format", probe, text).startswith(reason)


def test_what_does_not_apply_is_none():
    judgement = judged(PLAIN, "The capital is Lisbon.")
    assert (judgement.role, judgement.recall, judgement.format, judgement.length_ratio) == (None,) * 4
    assert judgement.reasons == {} and judgement.tokens == 9


def test_the_length_is_told_by_words_of_a_reference():
    assert judged(PLAIN, "It is Lisbon.", reference="Lisbon, on the Tagus river.").length_ratio == 3 / 5
    assert judged(PLAIN, "里斯本。", reference="首都是里斯本").length_ratio == 0.5
    assert judged(PLAIN, "Lisbon", reference="").length_ratio is None


# Many of them.


def test_the_summary_has_shares_and_counts_by_kind_and_language():
    judgements = [
        judged("en-answer-capital", "Lisbon.", tokens=2, reference="Lisbon"),
        judged("en-answer-capital", "What is the capital of Spain?", stopped=False, tokens=8, reference="It is Lisbon"),
        judged("zh-recall-city", "泉州。", tokens=5),
    ]
    found = probes.summary(judgements)
    assert found["count"] == 3 and found["tokens"] == 5
    assert found["answers"] == pytest.approx(2 / 3) and found["answers/count"] == 3
    assert found["kind=answer/stops"] == 0.5 and found["kind=answer/stops/count"] == 2
    assert found["language=zh/recall"] == 1.0 and found["recall/count"] == 1
    assert found["length_ratio"] == pytest.approx((1 + 6 / 3) / 2) and found["length_ratio/count"] == 2
    assert not any(key.split("/")[-1] == "format" for key in found)  # it applied to none
    assert probes.summary([]) == {"count": 0.0}


def test_wilson_intervals_are_those_of_the_formula():
    assert shares.wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert shares.wilson(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert shares.wilson(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert shares.wilson(0.0, 0) == (0.0, 1.0)
    # 56 of 70 and 48 of 80: the example in Newcombe's paper, with the sign turned.
    assert shares.difference((56 / 70, 70), (48 / 80, 80)) == pytest.approx((-0.3339, -0.0524), abs=1e-4)


def test_the_table_shows_both_the_difference_and_its_interval():
    before = probes.summary([judged(PLAIN, "What is the capital of Spain?", stopped=False)] * 20)
    after = probes.summary([judged(PLAIN, "It is Lisbon, of course.")] * 19 + [judged(PLAIN, "")])
    lines = probes.table(before, after)
    [answers] = [line for line in lines if line.startswith("answers ")]
    assert "0% [0%, 16%] of 20" in answers and "95% [76%, 99%] of 20" in answers and "+95% [+" in answers
    assert answers.endswith("*")
    assert lines[0].split() == ["behaviour", "before", "after", "change"]
    assert [line.split()[0] for line in lines[1:5]] == ["answers", "stops", "no_loop", "language"]
    assert any(line.startswith("kind=answer/stops") for line in lines) and lines[-1].startswith("tokens")
    assert probes.table(before, before)[1].split()[-1] != "*"


def test_the_table_bears_what_one_model_lacks():
    before, after = probes.summary([judged(PLAIN, "Lisbon.")]), probes.summary([judged("zh-recall-city", "泉州")])
    [recall] = [line for line in probes.table(before, after) if line.startswith("recall ")]
    assert "none" in recall and "100% [21%, 100%] of 1" in recall
    assert probes.table({}, {}) == []
