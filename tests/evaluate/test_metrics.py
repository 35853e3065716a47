"""Task metrics: worked by hand, in English and Chinese, against recorded values of sacrebleu and rouge-score."""

import json
import math
import os
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest

from jax_sft import config as configs
from jax_sft.evaluate import metrics
from jax_sft.evaluate.metrics import confined, overlap, programs
from jax_sft.evaluate.metrics.numbers import number_of
from jax_sft.evaluate.metrics.programs import program_of, run_program
from jax_sft.evaluate.metrics.structured import is_same

# What sacrebleu 2.6.0 and rouge-score 0.1.2 (use_stemmer=False) say of these, recorded once. For the Chinese ROUGE,
# rouge-score was given a tokenizer that makes a token of each character.
PREDICTIONS = (
    "The cat sat quietly on the old mat.",
    "A storm closed two of the three bridges.",
    "",
    "She sold seven red apples, and kept one.",
)
REFERENCES = (
    "The old cat sat on the mat.",
    "The storm closed three bridges in the north.",
    "Nobody answered.",
    "She sold seven apples and kept one for herself.",
)
ZH_PREDICTIONS = ("小猫安静地坐在垫子上。", "暴风雨关闭了两座桥。", "", "今天下午天气很好")
ZH_REFERENCES = ("小猫坐在旧垫子上。", "暴风雨让北方的三座桥关闭了。", "没有人回答。", "今天天气非常好")
ROUGE = {
    "rouge1": ((0.933333, 0.625, 0.0, 0.823529), (0.777778, 0.727273, 0.0, 0.666667)),
    "rouge2": ((0.461538, 0.285714, 0.0, 0.666667), (0.5, 0.5, 0.0, 0.307692)),
    "rougeL": ((0.8, 0.5, 0.0, 0.823529), (0.777778, 0.545455, 0.0, 0.666667)),
}
BLEU, ZH_BLEU, CHRF, CHRF_PLUS_PLUS, ZH_CHRF = 15.0167753, 18.4524477, 51.6195108, 52.3830132, 20.2785364
SENTENCE_BLEU = (17.7474053, 14.9237295, 0.0, 28.2279839)


def rows(name, *pairs, **options) -> list[float]:
    """The value of each (prediction, reference)."""
    predictions, references = zip(*pairs, strict=True)
    return list(metrics.score(name, predictions, references, **options).by_row)


def test_exact_match_ignores_case_punctuation_articles_and_spaces():
    assert rows(
        "exact_match",
        ("The  Eiffel Tower.", "eiffel tower"),
        ("an Eiffel towers", "Eiffel tower"),
        ("北京。", "北京"),
        ("《 红楼 梦 》", "红楼梦"),
        ("红楼", "红楼梦"),
        ("ＡＢＣ１２", "abc12"),
        ("“是的”", "是的"),
        ("", "yes"),
        ("A", "A"),
        ("the", "A"),  # nothing but articles: compared as they stand
        ("+", "-"),
    ) == [1, 0, 1, 1, 0, 1, 1, 0, 1, 0, 0]


def test_f1_counts_shared_words_and_characters():
    got = rows(
        "f1",
        ("the red old car", "a red car"),  # red, car of 3 and of 2: P 2/3, R 1
        ("red red red", "red car"),  # one red counts: P 1/3, R 1/2
        ("red red", "red red car"),  # two do: P 1, R 2/3
        ("blue", "red"),
        ("", "red"),
        ("北京大学", "北京"),  # P 2/4, R 1
        ("买了iPhone手机", "iPhone 手机"),  # 买 了 iphone 手 机: P 3/5, R 1
    )
    assert got == pytest.approx([0.8, 0.4, 0.8, 0, 0, 2 / 3, 0.75])
    assert metrics.score("f1", ["red", ""], ["red", "blue"]).value == 0.5


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("So 40 + 32 = 72.", "72"),
        ("She has 5 left.\n#### 72", "72"),
        ("#### 72\nThat is 3 more than 69.", "72"),  # what GSM8K marks, not what comes last
        ("#### none, so 7", "7"),
        ("The price is $1,234.50", "2469/2"),
        ("#### $1,000", "1000"),
        ("#### -4 degrees, 3 less", "-4"),
        ("#### Step 3\nSo it is 20.", "20"),
        ("about 1,234,567 people", "1234567"),
        ("2,3", "3"),  # a list
        ("it is .5", "1/2"),
        ("it is 3/4 of it", "3/4"),
        ("it is 1 1/2 cups", "3/2"),
        (r"\boxed{\frac{3}{4}}", "3/4"),
        (r"1{,}000", "1000"),
        ("-3", "-3"),
        ("−3 and -$20", "-20"),
        ("10-5", "5"),
        ("5/0", "5"),
        ("2e3", "2000"),
        ("答案是７２。", "72"),
        ("共１，２００元", "1200"),
        ("一共有苹果3，梨400个", "400"),
        ("分别是3，400", "400"),  # no thousands
        ("四分之三，即３／４", "3/4"),
        ("占25％", "25"),
        ("no number", None),
        ("", None),
        ("9" * 5000, "9" * 300),
    ],
)
def test_the_last_number_is_read(text, number):
    if len(text) == 5000:  # more digits than int() takes
        assert number_of(text) == 10**5000 - 1
    else:
        found = number_of(text)
        assert (None if found is None else str(found)) == number


def test_final_number_compares_values():
    assert rows(
        "final_number",
        ("I get 72.0", "6 * 12 = <<72>>\n#### 72"),
        ("72 apples and 3 pears", "#### 72"),
        ("0.75", "3/4"),
        ("", "#### 72"),
        ("共有１，０００个。", "1000"),
        ("共有1001个。", "1000"),
    ) == [1, 0, 1, 0, 1, 0]
    assert rows("final_number", ("3.14", "3.1416"), ("3.2", "3.1416"), tolerance=0.001) == [1, 0]
    with pytest.raises(ValueError, match="row 2: the reference 'many' has no number; leave it out"):
        metrics.score("final_number", ["1", "2"], ["1", "many"])


def test_label_accuracy_takes_the_first_label_that_is_named():
    assert rows(
        "label_accuracy",
        ("Positive: I do not see anything negative.", "positive"),
        ("Negative, not positive", "positive"),
        ("It is not spam", "not spam"),  # begins before spam
        ("It is spam", "spam"),
        ("unpositive", "positive"),  # a whole word
        ("答案是positive。", "positive"),
        ("", "negative"),
    ) == [1, 0, 1, 1, 0, 1, 0]
    assert rows(
        "label_accuracy", ("这条评论是负面的", "负面"), ("正面，不是负面", "负面"), ("中性", "中性"), ("不知道", "正面")
    ) == [1, 0, 1, 0]
    assert rows("label_accuracy", ("不正确", "不正确"), ("不正确", "正确")) == [1, 0]
    assert rows("label_accuracy", ("It is a dog, so B", "B"), ("A.", "A"), ("Ｃ", "C")) == [1, 1, 1]
    assert rows("label_accuracy", ("10", "10"), ("1", "1"), ("1.5", "1"), ("C++", "C++"), ("in C", "C")) == [
        1, 1, 0, 1, 1,
    ]  # fmt: skip
    assert rows("label_accuracy", ("maybe, yes", "yes"), labels=["yes", "no", "maybe"]) == [0]
    with pytest.raises(ValueError, match="row 1: the reference 'yes' is not among the labels"):
        metrics.score("label_accuracy", ["yes"], ["yes"], labels=["no"])
    with pytest.raises(ValueError, match="a label is empty"):
        metrics.score("label_accuracy", ["yes"], [" "])


def test_json_is_valid_as_a_whole_or_in_a_fence():
    pairs = {
        '{"a": [1, 2]}': 1,
        '```json\n{"城市": "北京"}\n```': 1,
        "null": 1,
        "1" * 5000: 1,
        'Here it is: {"a": 1}': 0,
        '{"a": 1,}': 0,
        "{'a': 1}": 0,
        "NaN": 0,
        "": 0,
        "[" * 100_000: 0,
    }
    assert rows("json_valid", *[(text, "") for text in pairs]) == list(pairs.values())


def test_json_match_compares_values():
    assert rows(
        "json_match",
        ('{"b": 1, "a": [true, null]}', '{"a": [true, null], "b": 1.0}'),
        ('{"a": 1}', '{"a": true}'),
        ("0", "false"),
        ("[1, 2]", "[2, 1]"),
        ('{"a": 1, "b": 2}', '{"a": 1}'),
        ('{"城市": "北京"}', '{"城市": "\\u5317\\u4eac"}'),
        ("", "null"),
        ("[]", "{}"),
    ) == [1, 0, 0, 0, 0, 1, 0, 0]
    deep = other = 1
    for _ in range(5000):
        deep, other = [deep], [other]
    assert is_same(deep, other) and not is_same(deep, [other])
    with pytest.raises(ValueError, match="row 1: the reference 'red' is no JSON; mend it, or score by json_valid"):
        metrics.score("json_match", ["{}"], ["red"])


@pytest.mark.parametrize("name", ["rouge1", "rouge2", "rougeL"])
def test_rouge_is_that_of_rouge_score(name):
    english, chinese = ROUGE[name]
    assert metrics.score(name, PREDICTIONS, REFERENCES).by_row == pytest.approx(english, abs=1e-6)
    assert metrics.score(name, ZH_PREDICTIONS, ZH_REFERENCES).by_row == pytest.approx(chinese, abs=1e-6)


def test_rouge_by_hand():
    # the, cat, sat / the, cat, ran: two of three words, one of two pairs, a subsequence of two
    pair = ("The cat sat", "the cat ran")
    assert [rows(name, pair)[0] for name in ROUGE] == pytest.approx([2 / 3, 1 / 2, 2 / 3])
    assert [rows(name, ("", ""))[0] for name in ROUGE] == [0, 0, 0]
    assert rows("rouge2", ("猫", "猫")) == [0]  # no pair


def test_the_longest_common_subsequence_is_that_of_the_table():
    def by_table(one, two):
        table = np.zeros((len(one) + 1, len(two) + 1), int)
        for i, a in enumerate(one):
            for j, b in enumerate(two):
                table[i + 1, j + 1] = table[i, j] + 1 if a == b else max(table[i, j + 1], table[i + 1, j])
        return table[-1, -1]

    rng = np.random.default_rng(0)
    for _ in range(50):
        one, two = ("".join(rng.choice(list("abcd"), rng.integers(0, 20))) for _ in range(2))
        assert overlap.longest_common(one, two) == by_table(one, two)


def test_bleu_and_chrf_are_those_of_sacrebleu():
    pytest.importorskip("sacrebleu")
    bleu = metrics.score("bleu", PREDICTIONS, REFERENCES)
    assert bleu.value == pytest.approx(BLEU) and bleu.by_row == pytest.approx(SENTENCE_BLEU)
    assert bleu.scale == 100 and not bleu.is_mean and "tok:13a" in bleu.notes[0]
    assert bleu.interval[0] < bleu.value < bleu.interval[1]
    assert metrics.score("bleu", ZH_PREDICTIONS, ZH_REFERENCES).value == pytest.approx(ZH_BLEU)
    assert metrics.score("bleu", ZH_PREDICTIONS, ZH_REFERENCES, tokenize="13a").value == 0
    assert metrics.score("chrf", PREDICTIONS, REFERENCES).value == pytest.approx(CHRF)
    assert metrics.score("chrf", PREDICTIONS, REFERENCES, word_order=2).value == pytest.approx(CHRF_PLUS_PLUS)
    assert metrics.score("chrf", ZH_PREDICTIONS, ZH_REFERENCES).value == pytest.approx(ZH_CHRF)
    assert metrics.score("bleu", REFERENCES, REFERENCES).value == pytest.approx(100)
    assert metrics.score("chrf", [""], ["a"]).value == metrics.score("bleu", [""], ["a"]).value == 0
    better = metrics.difference(bleu, metrics.score("bleu", REFERENCES, REFERENCES))
    assert better.value == pytest.approx(100 - BLEU)
    with pytest.raises(ValueError, match="tokenize = 'chinese' is none of sacrebleu's .*zh"):
        metrics.score("bleu", ["a"], ["a"], tokenize="chinese")


class Counting:
    """Stands in for sacrebleu's metrics: shared characters out of all, told as they tell it."""

    TOKENIZERS = ("13a", "zh")

    def __init__(self, **options):
        self.options = options

    def _extract_corpus_statistics(self, hypotheses, references):
        return [[len(set(h) & set(r)), len(set(r))] for h, r in zip(hypotheses, references[0], strict=True)]

    def _compute_score_from_stats(self, stats):
        return types.SimpleNamespace(score=100 * stats[0] / stats[1])

    def get_signature(self):
        return f"tok:{self.options.get('tokenize')}"


def test_corpus_metrics_add_up_counts_and_choose_the_tokeniser(monkeypatch):
    monkeypatch.setattr(overlap, "_of_sacrebleu", lambda _: types.SimpleNamespace(BLEU=Counting, CHRF=Counting))
    result = metrics.score("bleu", ["ab", "z"], ["abcd", "z"])
    assert result.by_row == (50, 100) and result.value == 60  # 3 of 5 characters, not the mean of the rows
    assert result.interval == (50, 100) and result.notes == ("tok:13a",)
    assert metrics.score("bleu", ["猫"], ["猫 and 狗是"]).notes == ("tok:zh",)
    assert metrics.score("bleu", ["猫"], ["the word 猫"]).notes == ("tok:13a",)
    assert metrics.score("bleu", ["1"], ["1"]).notes == ("tok:13a",)


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_without_sacrebleu_the_way_out_is_said(name, monkeypatch):
    for module in ("sacrebleu", "sacrebleu.metrics", "sacrebleu.metrics.bleu", "sacrebleu.metrics.chrf"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"^{name} is counted by sacrebleu, which is not .* 'jax-sft\[eval\]'"):
        metrics.score(name, ["a"], ["a"])


def test_every_metric_has_a_line_and_a_scale():
    assert tuple(metrics.METRICS) == configs.METRICS  # what the door knows without reading them
    assert {m.scale for m in metrics.METRICS.values()} == {1, 100}
    assert metrics.METRICS["json_valid"].about.startswith("1 where the answer is JSON")
    assert all(m.about for m in metrics.METRICS.values())
    assert metrics.METRICS["pass_at_1"].options == ("unsafe", "seconds", "memory_mb")


@pytest.mark.parametrize("name", ["exact_match", "f1", "json_match", "label_accuracy", "rouge1", "rougeL"])
def test_empty_predictions_score_nothing(name):
    result = metrics.score(name, ["", " "], ["1", "22"])
    assert result.value == 0 and result.interval == (0, 0) and result.by_row == (0, 0) and result.is_mean


@pytest.mark.parametrize(
    ("arguments", "options", "said"),
    [
        (
            ("exact_mach", ["a"], ["a"]),
            {},
            "'exact_mach' is no metric; did you mean exact_match.; there are exact_match",
        ),
        (("final_number", ["1"], ["1"]), {"tolerence": 1}, "no option 'tolerence'; did you mean tolerance"),
        (("f1", ["1"], ["1"]), {"labels": ()}, "f1 has no option 'labels'; its options are: none"),
        (("f1", ["a", "b"], ["a"]), {}, "f1: 2 predictions and 1 references"),
        (("f1", [], []), {}, "f1: there is no prediction"),
        (("f1", ["a", None], ["a", "b"]), {}, "f1: prediction 2 is NoneType, not text"),
        (("f1", ["a"], [3]), {}, "f1: reference 1 is int, not text"),
        (("f1", "a", "a"), {}, "are lists of texts"),
        (("f1", ["a"], ["a"]), {"draws": 0}, "draws = 0 must be at least 1"),
    ],
)
def test_what_cannot_be_scored_is_refused(arguments, options, said):
    with pytest.raises(ValueError, match=said):
        metrics.score(*arguments, **options)


def test_the_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(1)
    answers = rng.random((300, 100)) < 0.7  # 300 exams of 100 questions, each right in 7 of 10
    bounds = [metrics.interval(exam.astype(float), seed=i, draws=300) for i, exam in enumerate(answers)]
    covered = np.mean([low <= 0.7 <= high for low, high in bounds])
    assert 0.91 <= covered <= 0.98
    width = np.mean([high - low for low, high in bounds])
    assert width == pytest.approx(2 * 1.96 * math.sqrt(0.7 * 0.3 / 100), rel=0.05)


def test_the_interval_is_that_of_its_seed():
    values = list(np.random.default_rng(0).random(30))
    assert metrics.interval(values) == metrics.interval(values, seed=0, draws=1000) != metrics.interval(values, seed=1)
    assert metrics.interval([0.25]) == (0.25, 0.25)
    with pytest.raises(ValueError, match="there is no row"):
        metrics.interval([])
    with pytest.raises(ValueError, match="row 2: its value is not finite"):
        metrics.interval([0.0, math.nan])


def test_a_difference_is_paired():
    rng = np.random.default_rng(2)
    before = rng.random(200)  # some rows are much harder than others
    after = before + 0.02 + 0.02 * rng.standard_normal(200)
    got = metrics.difference(list(before), list(after))
    assert got.rows == 200 and got.value == pytest.approx(np.mean(after - before))
    assert 0.01 < got.interval[0] < got.value < got.interval[1] < 0.03
    assert got == metrics.difference(list(before), list(after))
    low, high = metrics.difference(list(before), list(rng.permutation(before))).interval
    assert low < 0 < high  # no change, and not paired


def test_differences_of_results_and_what_cannot_be_compared():
    before = metrics.score("exact_match", ["a cat", "dog", "x"], ["cat", "cow", "y"])
    after = metrics.score("exact_match", ["cat", "cow", "x"], ["cat", "cow", "y"])
    assert metrics.difference(before, after).value == pytest.approx(1 / 3)
    assert metrics.difference(after, before).value == pytest.approx(-1 / 3)
    with pytest.raises(ValueError, match="exact_match cannot be compared with f1"):
        metrics.difference(before, metrics.score("f1", ["a"] * 3, ["a"] * 3))
    with pytest.raises(ValueError, match="3 rows before and 2 after"):
        metrics.difference(before, [0.0, 1.0])


def test_the_difference_covers_no_change_as_often_as_it_says():
    rng = np.random.default_rng(3)
    covered = 0
    for i in range(300):
        before, after = rng.random((2, 60)) < 0.5
        low, high = metrics.difference(before.astype(float), after.astype(float), seed=i, draws=300).interval
        covered += low <= 0 <= high
    assert 0.91 <= covered / 300 <= 0.98


def prediction(number: int, **more) -> metrics.Prediction:
    fields = {
        "id": number,
        "prompt": [{"role": "user", "content": "二加二？"}],
        "reference": "4",
        "prediction": "四\n4",
        "stopped": True,
        "tokens": 3,
        "scores": {"exact_match": 1.0},
    }
    return metrics.Prediction(**(fields | more))


def test_predictions_are_written_whole(tmp_path):
    path = tmp_path / "p.jsonl"
    odd = prediction(2, reference=None, prediction="\ud800\u2028")
    assert metrics.write_predictions(path, [prediction(1), odd]) == 2
    text = path.read_bytes().decode()
    first, second = (json.loads(line) for line in text.split("\n")[:-1])
    assert first == {
        "id": 1,
        "prompt": [{"role": "user", "content": "二加二？"}],
        "reference": "4",
        "prediction": "四\n4",
        "stopped": True,
        "tokens": 3,
        "scores": {"exact_match": 1.0},
    }
    assert "二加二" in text and second["prediction"] == "\ud800\u2028" and second["reference"] is None
    assert metrics.write_predictions(path, []) == 0 and path.read_text() == ""
    assert list(tmp_path.iterdir()) == [path]


def test_predictions_that_fail_leave_the_old_file(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text("old")
    with pytest.raises(ValueError, match=r"prediction 2 \(id 7\): .*; scores are finite numbers"):
        metrics.write_predictions(path, [prediction(1), prediction(7, scores={"f1": math.nan})])
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


# pass_at_1

TESTS = "assert add(1, 2) == 3\nassert add(-1, 1) == 0"
GOOD = "def add(a, b):\n    return a + b\n"
KEPT = run_program("", "assert True", seconds=10, memory_mb=256).kept if os.name == "posix" else frozenset()
posix = pytest.mark.skipif(os.name != "posix", reason="limits of processes are those of Linux and macOS")
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc, and limits that macOS does not keep")


def kept_from_the_code(what: str):
    return pytest.mark.skipif(what not in KEPT, reason=f"this kernel does not let us keep {what} from the code")


def verdict(code: str, *, seconds: float = 20, tests: str = TESTS) -> tuple[bool, str]:
    told = run_program(code, tests, seconds=seconds, memory_mb=256)
    return told.passed, told.reason


def test_code_is_not_run_unless_that_is_asked_for(monkeypatch):
    monkeypatch.setattr(programs, "run_program", lambda *_, **__: pytest.fail("it ran"))
    for options in ({}, {"unsafe": False}, {"unsafe": "no"}):
        with pytest.raises(ValueError, match="runs code that a model wrote, on this computer .*; pass unsafe=True"):
            metrics.score("pass_at_1", [GOOD], [TESTS], **options)
    for options in ({"seconds": 0}, {"memory_mb": 1}):
        with pytest.raises(ValueError, match="must be above 0"):
            metrics.score("pass_at_1", [GOOD], [TESTS], unsafe=True, **options)
    for reference, said in (("print(1)", "has no assert"), ("assert (", "is no Python")):
        with pytest.raises(ValueError, match=f"row 1: the reference {said}"):
            metrics.score("pass_at_1", [GOOD], [reference], unsafe=True)


@posix
def test_pass_at_1_runs_the_last_fence():
    answers = [
        f"Not this:\n```python\nadd = None\n```\nbut this:\n```python\n{GOOD}```\nIt adds.",
        f"```py\n{GOOD}",  # cut off before the fence closed
        GOOD,
        "def add(a, b):\n    return a - b",
        "我不知道",
        "",
    ]
    result = metrics.score("pass_at_1", answers, [TESTS] * len(answers), unsafe=True)
    assert result.by_row == (1, 1, 1, 0, 0, 0) and result.value == 0.5 and result.scale == 1
    assert result.notes[0] == "passed 3, NameError 2, AssertionError 1"
    assert list(result.notes[1:]) == [said for what, said in programs.DENIED.items() if what not in KEPT]
    assert program_of("~~~\na\n~~~\n") == "a\n" and program_of("a `b` c") == "a `b` c"


@posix
@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise ValueError('no')", "ValueError: no"),
        ("def add(a, b) return", "SyntaxError"),
        ("import sys\nsys.exit(0)", "SystemExit: 0"),
        ("import os\nos._exit(0)", "ended before its tests"),
        ("import os\nos.abort()", "ended before its tests"),
        ("input()", "EOFError"),
        ("def add(a, b):\n    return add(b, a)", "RecursionError"),
        ("class E(Exception):\n    def __str__(self):\n        return 1 / 0\nraise E", "E"),
        ("\ud800", "UnicodeEncodeError"),
        ("class passed(Exception):\n    pass\nraise passed", "passed"),
    ],
)
def test_code_that_fails_fails(code, said):
    passed, reason = verdict(code)
    assert not passed and reason.startswith(said)


@posix
def test_code_that_loops_is_stopped():
    assert verdict("while True:\n    pass", seconds=0.3) == (False, "time")
    assert verdict("try:\n    while True:\n        pass\nfinally:\n    add = max", seconds=0.3) == (False, "time")


@linux
def test_code_that_eats_memory_is_stopped():
    assert verdict("rows = []\nwhile True:\n    rows.append(bytes(2**20))") == (False, "memory")
    raised = "import resource\nresource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))"
    if "processes" in KEPT or os.getuid():  # root alone may raise its limits, and not in a namespace of its own
        assert verdict(raised)[1].startswith("ValueError")


NAMED = "import ctypes, os, time\nctypes.CDLL(None).prctl(15, b'{name}')\n"  # a name that /proc tells


def alive(name: str) -> int:
    found = 0
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            said = path.read_text()
        except OSError:
            continue
        found += f"({name})" in said and said.rpartition(")")[2].split()[0] != "Z"
    return found


@pytest.fixture(params=["confined", "not confined"])
def bare(request, monkeypatch, tmp_path) -> bool:
    """With what the kernel keeps from the code, and as where it keeps nothing."""
    if request.param == "confined":
        return False
    script = tmp_path / "bare.py"
    script.write_text(
        f"import importlib.util as u\ns = u.spec_from_file_location('c', {str(confined.__file__)!r})\n"
        "c = u.module_from_spec(s)\ns.loader.exec_module(c)\nc._confine = lambda libc: []\nc.main()\n"
    )
    monkeypatch.setattr(programs, "confined", types.SimpleNamespace(__file__=str(script)))
    return True


@linux
def test_code_that_forks_leaves_nothing_behind(bare):
    name = f"forks{os.getpid() % 10**6}{'b' if bare else 'c'}"
    forks = NAMED.format(name=name) + "for _ in range(3):\n    os.fork()\n    os.fork() or os.setsid()\n"
    assert verdict(forks + "time.sleep(60)", seconds=0.5) == (False, "time")
    assert alive(name) == 0
    daemon = "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(60)\n    os._exit(0)\n"
    assert verdict(NAMED.format(name=name) + daemon + GOOD) == (True, "passed")
    assert alive(name) == 0


@linux
def test_code_does_not_stop_the_scoring(bare):
    passed, reason = verdict("import os\nos.kill(os.getppid(), 9)\nos.kill(os.getpid(), 9)")
    assert not passed and (reason == "killed the process that watches it" or not bare)
    assert verdict("import os\nos.closerange(0, 100)")[1] == "ended before its tests"
    everywhere = (
        "import os\nfor fd in range(20):\n    try:\n        os.write(fd, b'[1]')\n    except OSError:\n        pass\n"
    )
    assert verdict(everywhere + GOOD)[1] == "ended before its tests"
    assert verdict(GOOD) == (True, "passed")


@posix
def test_code_writes_into_its_own_folder_which_is_gone_afterwards():
    code = "import os\nopen('here', 'w').write(os.getcwd())\nadd = lambda a, b: int(open('here').read() == '') + a + b"
    assert verdict(code) == (True, "passed")
    passed, folder = verdict("import os\nraise ValueError(os.getcwd())")
    assert not passed and not pathlib.Path(folder.removeprefix("ValueError: ")).exists()
    assert verdict("open('big', 'wb').write(bytes(2**20 * 65))")[1] != "passed"


@posix
def test_code_does_not_get_the_environment(monkeypatch):
    monkeypatch.setenv("SOME_SECRET", "x")
    assert verdict("import os\nassert 'SOME_SECRET' not in os.environ\n" + GOOD) == (True, "passed")


@kept_from_the_code("files")
def test_code_cannot_write_outside_its_folder(tmp_path):
    code = f"import os\nopen({str(tmp_path / 'out')!r}, 'w')"
    assert "Read-only file system" in verdict(code)[1]
    again = "import ctypes\nassert ctypes.CDLL(None).mount(None, b'/', None, 0x1020, None) == 0\n"
    assert verdict(again + code)[1] == "AssertionError"
    assert list(tmp_path.iterdir()) == []


@linux
def test_where_nothing_is_kept_the_notes_say_so(monkeypatch):
    real = run_program(GOOD, TESTS, seconds=5, memory_mb=256)
    bare = programs.Verdict(real.passed, real.reason)
    monkeypatch.setattr(programs, "run_program", lambda *_, **__: bare)
    result = metrics.score("pass_at_1", [GOOD], [TESTS], unsafe=True)
    assert result.notes == ("passed 1", *programs.DENIED.values())


@kept_from_the_code("network")
def test_code_has_no_network():
    code = "import socket\nsocket.create_connection(('127.0.0.1', 9), timeout=1)"
    assert "unreachable" in verdict(code)[1]


@kept_from_the_code("processes")
def test_code_cannot_signal_other_processes():
    code = f"import os\nos.kill({os.getpid()}, 0)"
    assert verdict(code)[1].startswith("ProcessLookupError")


def test_no_jax_is_imported():
    code = "import sys, jax_sft.evaluate.metrics; raise SystemExit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=pathlib.Path(__file__).parents[2]).returncode == 0
