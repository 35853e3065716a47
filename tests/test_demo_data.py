"""What the committed demo conversations promise: their shape, their mixture, and answers that are right.

The arithmetic is checked again here without the generator: equations are evaluated as they stand in the answers,
questions are read back out of the committed prompts, and programs are run in a fresh interpreter.
"""

import ast
import calendar
import json
import operator
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from datetime import date, timedelta
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "demo"))

import assemble
import generate
import rows

DEMO = assemble.HERE
TRAIN = rows.load_rows(DEMO / "train.jsonl")
VALIDATION = rows.load_rows(DEMO / "validation.jsonl")
EVERY_ROW = [*TRAIN, *VALIDATION]
GENERATED = [row for row in EVERY_ROW if rows.is_generated(row)]

TEXT_BLOCK = re.compile(r"```text\n(.*?)```", re.DOTALL)
OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def value_of(expression: str) -> Fraction:
    """The exact value of an arithmetic expression; SyntaxError if it is not one."""

    def walk(node: ast.expr) -> Fraction:
        match node:
            case ast.BinOp(left, op, right) if type(op) in OPERATORS:
                return OPERATORS[type(op)](walk(left), walk(right))
            case ast.UnaryOp(ast.USub(), operand):
                return -walk(operand)
            case ast.Constant(int() | float() as number):
                return Fraction(str(number))
        raise SyntaxError(expression)

    return walk(ast.parse(expression.strip(), mode="eval").body)


def equations(text: str) -> list[tuple[str, str]]:
    """The sides of every `a op b = c` in a text, currency signs dropped and operators as Python writes them."""
    plain = re.sub(r"[$€£]", "", text).translate(str.maketrans("×÷", "*/"))
    side = r"\(?-?\d[\d.]*\)?"
    found = re.findall(rf"((?:{side}|\()(?:\s*[-+*/]\s*\(?{side}\)?)+)\s*=\s*(-?[\d./]+)", plain)
    return [(left, right.rstrip("./")) for left, right in found]


def numbers(text: str) -> list[Fraction]:
    """All unsigned numbers of a text, in order."""
    return [Fraction(found) for found in re.findall(r"\d+(?:\.\d+)?", text)]


def minutes(text: str) -> list[int]:
    """All times of day of a text, in minutes after midnight."""
    return [60 * int(hour) + int(minute) for hour, minute in re.findall(r"(\d\d):(\d\d)", text)]


def generated_turn(pattern: str) -> tuple[str, str]:
    """The first question and answer of the one generated row whose question matches."""
    found = [row for row in GENERATED if re.search(pattern, rows.texts(row, "user")[0])]
    assert len(found) == 1, pattern
    return rows.texts(found[0], "user")[0], rows.texts(found[0], "assistant")[0]


def final_answer(answer: str) -> str:
    """What stands after "Answer:" in the last line."""
    return re.split(r"Answer: |答案：", answer.splitlines()[-1])[-1]


# --- the set as a whole ---


def test_the_committed_files_pass_every_check():
    assert rows.set_problems(TRAIN, VALIDATION) == []


def test_the_committed_files_are_what_the_assembler_writes(tmp_path: Path):
    for name, split in zip(("train", "validation"), assemble.assemble(), strict=True):
        rows.dump_rows(split, tmp_path / name)
        assert (tmp_path / name).read_bytes() == (DEMO / f"{name}.jsonl").read_bytes()


def test_the_set_has_the_promised_size_and_mixture():
    assert len(TRAIN) >= 400
    assert len(VALIDATION) == 60
    assert sum(len(rows.texts(row, "user")) > 1 for row in TRAIN) >= 120
    assert 3 * sum(row["id"].startswith("gen-") for row in TRAIN) <= len(TRAIN)
    pairs = {(row["source"], row["language"]) for row in TRAIN}
    assert pairs == {(source, language) for source in rows.SOURCES for language in ("en", "zh")}


def test_validation_holds_every_source_and_both_languages():
    assert {row["source"] for row in VALIDATION} == set(rows.SOURCES)
    assert {row["language"] for row in VALIDATION} == {"en", "zh"}


def test_no_id_and_no_prompt_occurs_twice_in_or_across_the_splits():
    for key in (lambda row: row["id"], rows.first_prompt, rows.rendered_prompt):
        assert [text for text, count in Counter(map(key, EVERY_ROW)).items() if count > 1] == []


def test_the_readme_shows_the_mixture_of_the_committed_files():
    assert rows.count_table(TRAIN, VALIDATION) in (DEMO / "README.md").read_text(encoding="utf-8")


# --- the checks notice what they are for ---


def good_row(**changes: Any) -> rows.Row:
    messages = [{"role": "user", "content": "Two plus two?"}, {"role": "assistant", "content": "Four."}]
    return {"id": "en-0001", "source": "reasoning", "language": "en", "messages": messages} | changes


def test_a_good_row_has_no_problems():
    assert rows.shape_problems(good_row()) == []
    assert rows.answer_problems(good_row()) == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"extra": 1}, "keys are"),
        ({"id": "one"}, "id is not"),
        ({"source": "poetry"}, "unknown source"),
        ({"language": "fr"}, "unknown language"),
        ({"messages": []}, "roles are"),
        ({"messages": [{"role": "user", "content": "Hi"}]}, "roles are"),
        ({"messages": [{"role": "assistant", "content": "Hi"}, {"role": "user", "content": "Hi"}]}, "roles are"),
        ({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " "}]}, "empty"),
        ({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "text": "Hi"}]}, "other keys"),
    ],
)
def test_a_misshapen_row_is_named(changes: dict[str, Any], problem: str):
    assert any(problem in found for found in rows.shape_problems(good_row(**changes)))


@pytest.mark.parametrize(
    ("source", "answer"),
    [
        ("extraction", '{"total": 12'),
        ("extraction", '```json\n{"total": 12}\n```'),
        ("extraction", "The total is 12."),
        ("code", "```python\nprint(1\n```"),
    ],
)
def test_an_answer_that_does_not_parse_is_named(source: str, answer: str):
    row = good_row(source=source)
    row["messages"][0]["content"] = "The total as JSON, please."
    row["messages"][-1]["content"] = answer
    assert len(rows.answer_problems(row)) == 1


def test_a_prompt_that_differs_only_in_case_spacing_or_punctuation_counts_as_repeated():
    twin = good_row(id="en-0002", messages=[{"role": "user", "content": " two  PLUS two!"}, good_row()["messages"][1]])
    problems = rows.set_problems([good_row()], [twin])
    assert "first prompt: en-0002 repeats en-0001" in problems
    assert "whole prompt: en-0002 repeats en-0001" in problems


# --- the generated rows ---


def test_the_generator_reproduces_exactly_the_committed_rows():
    for made, committed in zip(generate.generate(), (TRAIN, VALIDATION), strict=True):
        kept = sorted((row for row in committed if rows.is_generated(row)), key=lambda row: row["id"])
        assert made == kept


def test_the_generator_holds_the_promised_numbers():
    train, validation = generate.generate()
    assert Counter(row["source"] for row in train) == {
        "reasoning": 45,
        "extraction": 30,
        "classification": 15,
        "code": 15,
        "question-answering": 15,
    }
    assert len(validation) == 15


@pytest.mark.parametrize("seed", range(25))
def test_every_seed_gives_distinct_well_formed_rows_with_true_equations(seed: int):
    made = [row for split in generate.generate(seed) for row in split]
    assert [problem for row in made for problem in rows.shape_problems(row) + rows.answer_problems(row)] == []
    assert len({rows.first_prompt(row) for row in made}) == len(made) == 135
    assert_equations_hold(made)


def assert_equations_hold(checked: list[rows.Row]) -> int:
    count = 0
    for row in checked:
        for answer in rows.texts(row, "assistant") if row["source"] == "reasoning" else []:
            for left, right in equations(answer):
                assert value_of(left) == value_of(right), (row["id"], left, right)
                count += 1
    return count


def test_every_equation_in_a_generated_working_holds():
    assert assert_equations_hold(GENERATED) >= 80


def test_a_false_equation_would_be_found():
    with pytest.raises(AssertionError):
        assert_equations_hold([good_row(messages=[{"role": "assistant", "content": "Bill: 3 × $2.50 = $8"}])])


def test_every_reasoning_answer_ends_with_an_answer_line():
    for row in GENERATED:
        for answer in rows.texts(row, "assistant") if row["source"] == "reasoning" else []:
            *working, last = answer.splitlines()
            assert 1 <= len(working) <= 4, row["id"]
            assert re.match(r"答案：." if row["language"] == "zh" else r"Answer: .", last), row["id"]


# Each question is read back from its prompt, and answered in another way than the generator's where there is one.
WORD_PROBLEMS: dict[str, Callable[[list[Fraction]], Fraction]] = {
    r"What does the whole purchase cost": lambda n: n[0] * n[1] + n[2],
    r"How much change should I get": lambda n: n[0] - (n[1] * n[2] + n[3] * n[4]),
    r"green raincoat": lambda n: n[0] * (1 - n[1] / 100),
    r"pair of boots": lambda n: n[1] / (1 - n[0] / 100),
    r"Two cyclists": lambda n: n[0] / (n[1] + n[2]),
    r"petrol costs": lambda n: n[3] * n[0] / n[1] * n[2],
    r"times as old as": lambda n: n[0] * n[1] + n[2] + n[1] + n[2],
    r"bean seeds": lambda n: n[0] * (100 - n[1]) / 100,
    r"village museum": lambda n: (n[1] / n[0] - 1) * 100,
    r"pancake recipe": lambda n: n[1] * n[2] / n[0],
    r"first three test marks": lambda n: 4 * n[3] - n[0] - n[1] - n[2],
    r"Fencing costs": lambda n: n[0] * (n[1] + n[1] + n[2] + n[2]),
    r"square tiles": lambda n: n[1] * n[2] / (n[0] / 100) ** 2,
    r"aquarium": lambda n: (n[0] / 10) * (n[1] / 10) * (n[2] / 10),
    r"One pump": lambda n: 1 / (1 / n[0] + 1 / n[1]),
    r"share a prize": lambda n: n[0] * n[2] / (n[1] + n[2]),
    r"only 5-cent": lambda n: next(Fraction(t) for t in range(int(n[0])) if 5 * (n[0] - t) + 10 * t == n[3]),
    r"saves \$": lambda n: sum((n[0] + n[1] * week for week in range(int(n[2]))), Fraction(0)),
    r"lend my cousin": lambda n: n[0] * (1 + n[1] * n[2] / 100),
    r"hiking map": lambda n: n[1] * n[2] / 100_000,
    r"minibuses": lambda n: Fraction(-(-n[0] // n[1])),
    r"应找回多少钱": lambda n: n[2 + 1] - n[0] * n[1] - n[2],
    r"出勤率": lambda n: (n[0] - n[1]) / n[0] * 100,
    r"大米平均装进": lambda n: n[0] * n[3] / n[1],
    r"高铁": lambda n: n[0] * n[1],
    r"煮饭时": lambda n: n[1] / n[0] * n[2],
    r"平均是多少度": lambda n: sum(n, Fraction(0)) / len(n),
    r"三角形有两个角": lambda n: 180 - n[0] - n[1],
    r"果汁浓浆": lambda n: n[2] / (n[0] + n[1]) * n[0],
    r"剧场第一排": lambda n: n[0] + n[1] * (n[2] - 1),
    r"单循环赛": lambda n: sum(map(Fraction, range(int(n[0]))), Fraction(0)),
    r"种一棵树": lambda n: Fraction(len(range(0, int(n[0]) + 1, int(n[1])))),
    r"去划船": lambda n: -(-n[0] // n[1]) * n[2],
}


@pytest.mark.parametrize("pattern", WORD_PROBLEMS)
def test_a_word_problem_read_back_from_its_prompt_has_the_committed_answer(pattern: str):
    question, answer = generated_turn(pattern)
    assert numbers(final_answer(answer)) == [WORD_PROBLEMS[pattern](numbers(question))]


def test_an_arrival_in_another_time_zone_is_right():
    question, answer = generated_turn("local time there when I land")
    hours, more, zone = map(int, re.findall(r"(\d+) h (\d+) min.* (\d+) hours", question)[0])
    there = minutes(question)[0] + 60 * hours + more + 60 * (zone if "ahead" in question else -zone)
    assert minutes(final_answer(answer)) == [there % 1440]


def test_a_loan_period_is_counted_right():
    question, answer = generated_turn("library book borrowed")
    months = list(calendar.month_name)
    days = [date(int(y), months.index(m), int(d)) for d, m, y in re.findall(r"(\d+) (\w+) (\d{4})", question)]
    assert numbers(final_answer(answer)) == [(days[1] - days[0]).days]


def test_weekdays_are_counted_right():
    question, answer = generated_turn("what weekday will it be")
    monday = date(2024, 1, 1)
    start = next(d for d in (monday + timedelta(days=k) for k in range(7)) if f"{d:%A}" in question)
    assert final_answer(answer) == f"{start + timedelta(days=int(numbers(question)[0])):%A}"


def test_hens_and_rabbits_have_the_stated_heads_and_legs():
    question, answer = generated_turn("鸡和兔共")
    heads, legs = numbers(question)
    hens, rabbits = numbers(final_answer(answer))
    assert (hens + rabbits, 2 * hens + 4 * rabbits) == (heads, legs)


def test_a_program_prints_what_the_answer_says():
    ran = 0
    for row in GENERATED:
        for user, answer in zip(rows.texts(row, "user"), rows.texts(row, "assistant"), strict=True):
            programs = rows.PYTHON_BLOCK.findall(answer) or rows.PYTHON_BLOCK.findall(user)
            for program, said in zip(programs, TEXT_BLOCK.findall(answer), strict=False):
                command = [sys.executable, "-I", "-X", "utf8", "-c", program]
                done = subprocess.run(command, capture_output=True, check=True, encoding="utf-8", timeout=60)
                assert done.stdout == said, row["id"]
                ran += 1
    assert ran >= 16


def test_generated_extractions_hold_only_what_their_documents_say():
    computed = {"vat", "total", "nights", "total_birds", "total_min", "总价", "最高", "用时"}

    def leaves(value: Any, key: str = "") -> list[tuple[str, Any]]:
        if isinstance(value, dict):
            return [leaf for name, inner in value.items() for leaf in leaves(inner, name)]
        return [leaf for inner in value for leaf in leaves(inner, key)] if isinstance(value, list) else [(key, value)]

    for row in GENERATED:
        if row["source"] != "extraction":
            continue
        document = rows.texts(row, "user")[0]
        for key, value in leaves(json.loads(rows.texts(row, "assistant")[0])):
            if key in computed or isinstance(value, bool) or value is None or re.search(r"\d-\d\d-\d\d", str(value)):
                continue
            if re.fullmatch(r"\d\d:30|\d\d:00", str(value)) and str(value) not in document:  # "2 pm", "下午5点半"
                value = int(str(value)[:2]) - 12
            said = Fraction(str(abs(value))) in numbers(document) if isinstance(value, int | float) else False
            assert said or str(value).casefold() in document.casefold(), (row["id"], key, value)


def test_generated_sums_inside_extractions_are_right():
    _, invoice = generated_turn("INVOICE")
    bill = json.loads(invoice)
    assert bill["net"] + bill["vat"] == bill["total"]
    _, receipt = generated_turn("CORNER SHOP")
    bill = json.loads(receipt)
    assert sum(round(100 * item["price"]) for item in bill["items"]) == round(100 * bill["total"])
    question, booking = generated_turn("Booking mail")
    stay = json.loads(booking)
    assert (date.fromisoformat(stay["check_out"]) - date.fromisoformat(stay["check_in"])).days == stay["nights"]
    assert ("without breakfast" in question) is not stay["breakfast"]


def test_generated_labels_follow_from_the_rules_in_their_prompts():
    question, label = generated_turn("even or odd")
    assert label == ("odd" if question.split()[1][-1] in "13579" else "even")
    question, label = generated_turn("Cold store rule")
    limit, _, measured = numbers(question)
    assert label == ("ALARM" if measured > limit else "OK")
    question, label = generated_turn("Payment terms")
    terms, waited = numbers(question)
    assert label == ("overdue" if waited > terms else "in time")
    question, label = generated_turn("库存规则")
    minimum, stock = numbers(question)
    assert label == ("补货" if stock < minimum else "充足")
    question, label = generated_turn("Classify the triangle")
    assert label == {1: "equilateral", 2: "isosceles", 3: "scalene"}[len(set(numbers(question)))]


def test_generated_counts_and_orders_are_right():
    question, answer = generated_turn("does the letter")
    letter, word = re.findall(r'letter (\w) occur in "(\w+)"', question)[0]
    assert answer.startswith(f"{word.count(letter)} times")
    assert [word[int(place) - 1] for place in numbers(answer)[1:]] == [letter] * word.count(letter)
    question, answer = generated_turn("Put the swimmers in order")
    times = {name: int(seconds) for name, seconds in re.findall(r"(\w+) (\d+) s", question)}
    assert answer == ", ".join(sorted(times, key=times.__getitem__)) + "."
