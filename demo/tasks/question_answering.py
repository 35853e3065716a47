"""Questions about a small table or list that comes with the prompt: look-ups, sums, sorting and counting."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from tasks.draft import CITIES, NAMES, WEEKDAYS, ZH_CITIES, ZH_NAMES, Draft, Kind, clock, draft, money


def table(head: tuple[str, ...], rows: list[tuple[object, ...]]) -> str:
    """A Markdown table."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def listed(words: list[str]) -> str:
    """Words as a sentence lists them: a, b and c."""
    return f"{', '.join(words[:-1])} and {words[-1]}"


def look_ups(rng: Random) -> Iterator[Draft]:
    """The largest, the smallest, or one cell of a table."""
    rain = dict(zip(rng.sample(CITIES, 4), rng.sample(range(12, 120), 4), strict=True))
    wet, dry = max(rain, key=rain.__getitem__), min(rain, key=rain.__getitem__)
    yield draft(
        "en",
        (
            f"Which of these cities had the most rain last month?\n\n{table(('city', 'rain (mm)'), [*rain.items()])}",
            f"{wet}, with {rain[wet]} mm.",
        ),
        (
            "And how much more was that than in the driest one?",
            f"{rain[wet] - rain[dry]} mm more: {dry} had only {rain[dry]} mm.",
        ),
    )
    hours = {day: (9 * 60 + rng.choice((0, 30)), rng.choice((17, 18, 20)) * 60) for day in WEEKDAYS[:4]}
    day = rng.choice(WEEKDAYS[:4])
    times = "; ".join(f"{name} {clock(opens)}-{clock(shuts)}" for name, (opens, shuts) in hours.items())
    yield draft(
        "en",
        (
            f"When does the counter shut on {day}, and how long is it open that day?",
            f"It shuts at {clock(hours[day][1])} and is open for {(hours[day][1] - hours[day][0]) / 60:g} hours.",
        ),
        system=f"You are the front desk of a town hall. Opening hours: {times}. Answer in one sentence.",
    )
    prices = dict(zip(("espresso", "cocoa", "lemonade", "cider"), rng.sample(range(180, 420, 10), 4), strict=True))
    budget = sorted(prices.values())[2]
    cheap = [name for name, cents in prices.items() if cents <= budget]
    yield draft(
        "en",
        (
            f"Menu: {', '.join(f'{name} {money(cents)}' for name, cents in prices.items())}. What can I get for "
            f"{money(budget)} or less?",
            f"{listed(cheap).capitalize()} each cost {money(budget)} or less.",
        ),
    )
    stock = dict(zip(rng.sample(("毛笔", "宣纸", "墨汁", "砚台", "印泥"), 4), rng.sample(range(5, 60), 4), strict=True))
    least = min(stock, key=stock.__getitem__)
    yield draft(
        "zh",
        (
            f"下表是文具店的库存，哪种最少？\n\n{table(('商品', '数量'), [*stock.items()])}",
            f"{least}最少，只有{stock[least]}件。",
        ),
        ("四种一共多少件？", f"一共{sum(stock.values())}件。"),
    )
    floors = dict(zip(("儿科", "眼科", "牙科", "内科"), rng.sample(range(1, 8), 4), strict=True))
    want = rng.choice(tuple(floors))
    yield draft(
        "zh",
        (f"请问{want}在几楼？", f"{want}在{floors[want]}楼。"),
        system=f"你在医院导诊台工作。楼层：{'，'.join(f'{name}{floor}楼' for name, floor in floors.items())}。一句话回答。",
    )


def orderings(rng: Random) -> Iterator[Draft]:
    """Sorting by a value or by the alphabet."""
    times = dict(zip(rng.sample(NAMES, 4), rng.sample(range(52, 99), 4), strict=True))
    ranked = sorted(times, key=times.__getitem__)
    told = ", ".join(f"{name} {seconds} s" for name, seconds in times.items())
    yield draft(
        "en",
        (f"Swimming results: {told}. Put the swimmers in order, fastest first.", f"{', '.join(ranked)}."),
        (
            f"How far behind the winner was {ranked[-1]}?",
            f"{times[ranked[-1]] - times[ranked[0]]} seconds: {times[ranked[-1]]} s against {times[ranked[0]]} s.",
        ),
        system="You help at a swimming club. Keep answers to one line.",
    )
    words = rng.sample(("plum", "apricot", "quince", "fig", "mango", "cherry", "date", "lime"), 5)
    yield draft(
        "en",
        (f"Sort alphabetically: {', '.join(words)}.", f"{', '.join(sorted(words)).capitalize()}."),
    )
    years = dict(zip(("bridge", "town hall", "mill", "school"), rng.sample(range(1790, 1940), 4), strict=True))
    oldest = sorted(years, key=years.__getitem__)
    yield draft(
        "en",
        (
            f"Our village guide says: {'; '.join(f'{name} built {year}' for name, year in years.items())}. Which two "
            "buildings are the oldest?",
            f"The {oldest[0]} ({years[oldest[0]]}) and the {oldest[1]} ({years[oldest[1]]}).",
        ),
    )
    heights = dict(zip(rng.sample(ZH_NAMES, 3), rng.sample(range(145, 185), 3), strict=True))
    ranked = sorted(heights, key=heights.__getitem__, reverse=True)
    yield draft(
        "zh",
        (
            f"{'，'.join(f'{name}身高{cm}厘米' for name, cm in heights.items())}。请按从高到矮排列。",
            f"{'、'.join(ranked)}。",
        ),
    )


def counting(rng: Random) -> Iterator[Draft]:
    """Letters, characters and matching entries."""
    word, letter = rng.choice((("mississippi", "s"), ("strawberry", "r"), ("committee", "t"), ("assessment", "s")))
    spots = [str(i) for i, c in enumerate(word, start=1) if c == letter]
    yield draft(
        "en",
        (
            f'How many times does the letter {letter} occur in "{word}"?',
            f"{len(spots)} times, at positions {listed(spots)}.",
        ),
    )
    word = rng.choice(("orchestra", "education", "umbrella", "satellite"))
    vowels = [c for c in word if c in "aeiou"]
    yield draft(
        "en",
        (f'Count the vowels in "{word}".', f"There are {len(vowels)}: {', '.join(vowels)}."),
    )
    grades = [rng.choice("ABCD") for _ in range(9)] + ["A", "A"]
    rng.shuffle(grades)
    yield draft(
        "en",
        (
            f"The class got these grades: {' '.join(grades)}. How many A's are there, and out of how many?",
            f"{grades.count('A')} of the {len(grades)} grades are A's.",
        ),
    )
    people = dict(zip(rng.sample(NAMES, 4), (rng.choice(CITIES[:2]) for _ in range(4)), strict=True))
    people |= {rng.choice([n for n in NAMES if n not in people]): CITIES[0]}
    there = [name for name, city in people.items() if city == CITIES[0]]
    verb = "lives" if len(there) == 1 else "live"
    yield draft(
        "en",
        (
            f"Address list: {', '.join(f'{name} ({city})' for name, city in people.items())}. Who lives in {CITIES[0]}?",
            f"{there[0] if len(there) == 1 else listed(there)} {verb} in {CITIES[0]}.",
        ),
        system="You are a secretary. Answer only from the list that you are given.",
    )
    line = rng.choice(("春眠不觉晓", "白日依山尽", "床前明月光", "千山鸟飞绝"))
    place = rng.randint(2, 5)
    yield draft(
        "zh",
        (
            f"“{line}”的第{'一二三四五'[place - 1]}个字是什么？",
            f"第{'一二三四五'[place - 1]}个字是“{line[place - 1]}”。",
        ),
    )
    visited = rng.sample(ZH_CITIES, 5)
    north = [city for city in visited if city.endswith("州")]
    yield draft(
        "zh",
        (
            f"我去过{'、'.join(visited)}，其中名字以“州”结尾的有几个？",
            f"有{len(north)}个：{'、'.join(north)}。" if north else "一个也没有。",
        ),
    )


def planning(rng: Random) -> Iterator[Draft]:
    """Timetables and budgets."""
    every, first = rng.choice((20, 25, 40)), rng.randrange(370, 420, 5)
    runs = [first + every * i for i in range(5)]
    now = runs[2] + rng.randint(3, 12)
    yield draft(
        "en",
        (
            f"Ferry departures: {', '.join(map(clock, runs))}. It's {clock(now)} now. When is the next one?",
            f"At {clock(runs[3])}, in {runs[3] - now} minutes.",
        ),
    )
    spent = dict(zip(("rent", "food", "travel", "repairs"), rng.sample(range(40, 700, 10), 4), strict=True))
    biggest = max(spent, key=spent.__getitem__)
    yield draft(
        "en",
        (
            f"My month in dollars:\n\n{table(('item', 'spent'), [*spent.items()])}\n\nWhat did I spend in all, and on "
            "what the most?",
            f"${sum(spent.values())} in all; the largest part, ${spent[biggest]}, went on {biggest}.",
        ),
        system="You look after household budgets. Be factual and do not judge.",
    )


KINDS: tuple[Kind, ...] = (look_ups, orderings, counting, planning)
