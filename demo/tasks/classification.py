"""Labels that follow from a stated rule; every answer is the bare label."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date, timedelta
from random import Random

from tasks.draft import MONTHS, ZH_CITIES, Draft, Kind, clock, draft

PALINDROMES = ("level", "radar", "kayak", "rotor", "civic")
NOT_PALINDROMES = ("river", "lantern", "paper", "secret", "banana")


def numbers(rng: Random) -> Iterator[Draft]:
    """Properties of numbers."""
    n = rng.randint(1000, 9999)
    yield draft("en", (f"Is {n} even or odd? Answer with the one word.", "odd" if n % 2 else "even"))
    n = rng.choice((51, 57, 87, 91, 53, 59, 89, 97))
    prime = all(n % d for d in range(2, n))
    yield draft(
        "en",
        (f"{n}", "prime" if prime else "composite"),
        (f"{n * 3}", "composite"),
        system="For each whole number the user sends, reply with exactly one word: prime or composite.",
    )
    n, d = rng.randint(200, 999), rng.choice((3, 4, 6, 9))
    yield draft("zh", (f"{n}能被{d}整除吗？只回答“能”或“不能”。", "不能" if n % d else "能"))
    year = rng.choice((1900, 1996, 2000, 2014, 2024, 2100))
    leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
    yield draft("zh", (f"判断：公历{year}年是闰年还是平年？只写“闰年”或“平年”。", "闰年" if leap else "平年"))


def deadlines(rng: Random) -> Iterator[Draft]:
    """Late or on time."""
    due = date(2025, rng.randint(1, 12), rng.randint(3, 27))
    came = due + timedelta(days=rng.choice((-3, -1, 0, 1, 2)))
    said = [f"{d.day} {MONTHS[d.month - 1]}" for d in (due, came)]
    yield draft(
        "en",
        (
            f"Promised for {said[0]}, handed over on {said[1]}.",
            "late" if came > due else "on time",
        ),
        system='You label shipments for a warehouse. Reply only "on time" (on the promised day or earlier) or "late".',
    )
    paid_in, terms = rng.randint(10, 45), rng.choice((14, 30))
    yield draft(
        "en",
        (
            f"Payment terms are {terms} days. The customer paid {paid_in} days after the invoice. Label the payment as "
            "overdue or in time.",
            "overdue" if paid_in > terms else "in time",
        ),
    )
    start, late = rng.choice((510, 540)), rng.randint(-12, 18)
    status = "正常" if late <= 0 else "迟到" if late <= 10 else "旷工"
    yield draft(
        "zh",
        (f"上班时间{clock(start)}，打卡时间{clock(start + late)}。", status),
        system="考勤规则：准时或提前为“正常”，晚到10分钟以内（含10分钟）为“迟到”，超过10分钟为“旷工”。只输出标签。",
    )


def thresholds(rng: Random) -> Iterator[Draft]:
    """Bands of a measured value."""
    limit, measured = rng.choice((4, 6, 8)), rng.randrange(20, 110) / 10
    yield draft(
        "en",
        (
            f"Cold store rule: above {limit} °C means ALARM, otherwise OK. Sensor 7 reads {measured} °C. Label?",
            "ALARM" if measured > limit else "OK",
        ),
    )
    weight = rng.randrange(100, 4000, 50)
    band = "letter" if weight <= 500 else "small parcel" if weight <= 2000 else "large parcel"
    yield draft(
        "en",
        (
            f"Weighed at the counter: {weight} g.",
            band,
        ),
        system="Postal classes: up to 500 g letter; over 500 g and up to 2000 g small parcel; over 2000 g large parcel. "
        "Reply with the class alone.",
    )
    ages = rng.sample((4, 8, 15, 17, 18, 35, 64, 65, 80), 2)
    fares = ["child" if age < 16 else "senior" if age >= 65 else "adult" for age in ages]
    yield draft(
        "en",
        (
            f"Swimming pool tickets: child under 16, senior from 65, adult in between. Which ticket does "
            f"someone aged {ages[0]} need? One word.",
            fares[0],
        ),
        (f"And a visitor of {ages[1]}?", fares[1]),
    )
    stock, minimum = rng.randint(5, 60), rng.choice((20, 25, 30))
    yield draft(
        "zh",
        (
            f"库存规则：少于{minimum}件标“补货”，否则标“充足”。现有毛巾{stock}件，标签是？",
            "补货" if stock < minimum else "充足",
        ),
    )
    cost = rng.randrange(300, 9000, 100)
    who = "组长" if cost <= 1000 else "部门经理" if cost <= 5000 else "总经理"
    yield draft(
        "zh",
        (f"去{rng.choice(ZH_CITIES)}出差，预计花费{cost}元。", who),
        system="报销审批：1000元及以下由组长批，1000元以上至5000元由部门经理批，5000元以上由总经理批。只回答审批人。",
    )
    wind = rng.randint(3, 11)
    yield draft(
        "zh",
        (
            f"游船规定：风力6级及以上停航，不足6级开航。今天风力{wind}级，请给出“停航”或“开航”。",
            "停航" if wind >= 6 else "开航",
        ),
    )


def shapes_and_words(rng: Random) -> Iterator[Draft]:
    """Triangles, quadrants, words and votes."""
    sides = sorted(rng.randint(6, 11) for _ in range(3))  # any three of these lengths close to a triangle
    kind = {1: "equilateral", 2: "isosceles", 3: "scalene"}[len(set(sides))]
    yield draft(
        "en",
        (
            f"Classify the triangle with sides {sides[0]} cm, {sides[1]} cm and {sides[2]} cm as equilateral, isosceles "
            "(exactly two equal sides) or scalene. Label only.",
            kind,
        ),
    )
    x, y = rng.choice((-1, 1)) * rng.randint(2, 9), rng.choice((-1, 1)) * rng.randint(2, 9)
    quadrant = {(True, True): "I", (False, True): "II", (False, False): "III", (True, False): "IV"}[x > 0, y > 0]
    yield draft(
        "en",
        (f"In which quadrant (I, II, III or IV) does the point ({x}, {y}) lie? Give just the numeral.", quadrant),
    )
    word = rng.choice(PALINDROMES + NOT_PALINDROMES)
    yield draft(
        "en",
        (f'Does "{word}" read the same backwards? Reply yes or no.', "yes" if word == word[::-1] else "no"),
    )
    yes, no = rng.randint(4, 12), rng.randint(4, 12)
    verdict = "carried" if yes > no else "rejected"
    yield draft(
        "en",
        (
            f"{yes} votes for new benches, {no} against.",
            verdict,
        ),
        system="You keep the minutes of a residents' meeting. A motion with more votes for than against is carried, "
        "any other is rejected. Answer with carried or rejected.",
    )


KINDS: tuple[Kind, ...] = (numbers, deadlines, thresholds, shapes_and_words)
