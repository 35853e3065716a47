"""Short Python programs: the answer quotes what the program printed when the generator ran it."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import redirect_stdout
from random import Random
from textwrap import dedent

from tasks.draft import Draft, Kind, draft


def output_of(program: str) -> str:
    """What a program prints. The programs are the literals below, run in this process."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(compile(program, "program", "exec"), {"__name__": "__main__"})
    return printed.getvalue().rstrip("\n")


def fenced(program: str) -> str:
    """A program as a Python code block."""
    return f"```python\n{program}\n```"


def printed(program: str) -> str:
    """A program's output as a text block."""
    return f"```text\n{output_of(program)}\n```"


def what_prints(language: str, question: str, program: str, why: str, system: str = "") -> Draft:
    """A question about the output of a program, with the output and a reason as the answer."""
    program = dedent(program).strip()
    return draft(language, (f"{question}\n\n{fenced(program)}", f"{printed(program)}\n{why}"), system=system)


def loops(rng: Random) -> Iterator[Draft]:
    """Counting, skipping and collecting."""
    stop, step = rng.randint(9, 16), rng.randint(2, 4)
    yield what_prints(
        "en",
        "What does this print?",
        f"""
        total = 0
        for n in range(0, {stop}, {step}):
            total += n
        print(total)
        """,
        f"`range(0, {stop}, {step})` gives {', '.join(map(str, range(0, stop, step)))}, and the loop adds them up.",
    )
    skip = rng.randint(2, 4)
    yield what_prints(
        "en",
        "I'm learning `continue`. Which lines will appear when I run this?",
        f"""
        for n in range(1, 6):
            if n == {skip}:
                continue
            print(n)
        """,
        f"`continue` jumps to the next round when n is {skip}, so that number is missing.",
        system="You teach Python to beginners. Show the output first, then one sentence of explanation.",
    )
    start = rng.choice((40, 50, 72, 96))
    halves = [start]
    while halves[-1] % 2 == 0:
        halves.append(halves[-1] // 2)
    yield what_prints(
        "zh",
        "下面的循环最后输出什么？",
        f"""
        n = {start}
        while n % 2 == 0:
            n //= 2
        print(n)
        """,
        f"n 依次为 {'、'.join(map(str, halves))}，变成奇数后循环停止。",
    )
    rows = rng.randint(3, 4)
    yield what_prints(
        "zh",
        "运行这段代码会看到什么图形？",
        f"""
        for i in range(1, {rows + 1}):
            print("*" * i)
        """,
        f"第 i 行打印 i 个星号，一共 {rows} 行。",
        system="你是编程老师，先给出输出，再用一句话解释。",
    )


def sequences(rng: Random) -> Iterator[Draft]:
    """Slices, lists and strings."""
    word, cut = rng.choice(("lighthouse", "watermelon", "basketball")), rng.randint(3, 5)
    yield what_prints(
        "en",
        "Can you tell me the output without running it?",
        f"""
        word = "{word}"
        print(word[:{cut}])
        print(word[-{cut}:])
        """,
        f"The first slice takes the first {cut} letters, the second the last {cut}.",
    )
    values = rng.sample(range(2, 30), 5)
    keep = rng.randint(8, 16)
    rising = f"values = {values}\nprint(sorted([v for v in values if v > {keep}]))"
    falling = rising.replace("])", "], reverse=True)")
    yield draft(
        "en",
        (
            f"Here is a list: {values}. Write Python that prints the values above {keep} in ascending order, and show the "
            "output.",
            f"{fenced(rising)}\n{printed(rising)}",
        ),
        ("Now largest first, please.", f"{fenced(falling)}\n{printed(falling)}"),
    )
    numbers = rng.sample(range(1, 10), 3)
    yield what_prints(
        "en",
        "Why do both names show the same list here, and what is printed?",
        f"""
        a = {numbers}
        b = a
        b.append({sum(numbers)})
        print(a)
        print(a is b)
        """,
        "`b = a` copies no list: both names refer to one object, so the append shows through `a` as well.",
    )
    items = rng.sample(("茶", "米", "盐", "糖", "油"), 3)
    yield what_prints(
        "zh",
        "这段程序的输出是什么？",
        f"""
        items = {items!r}
        for i, name in enumerate(items, start=1):
            print(i, name)
        """,
        "enumerate 从 1 开始编号，逐行打印序号和名称。",
    )
    values = [rng.randint(1, 20) for _ in range(4)]
    spread = f"nums = {values}\nprint(max(nums) - min(nums))"
    both = f"{spread}\nprint(sum(nums))"
    yield draft(
        "zh",
        (
            f"用 Python 求列表 {values} 中最大值与最小值的差，并给出结果。",
            f"{fenced(spread)}\n{printed(spread)}",
        ),
        ("再顺便打印总和。", f"{fenced(both)}\n{printed(both)}"),
    )


def dictionaries(rng: Random) -> Iterator[Draft]:
    """Counting and looking up."""
    word = rng.choice(("banana", "pepper", "cookie", "coffee"))
    yield what_prints(
        "en",
        "Predict the output of this letter counter.",
        f"""
        counts = {{}}
        for letter in "{word}":
            counts[letter] = counts.get(letter, 0) + 1
        print(counts)
        """,
        "`get` returns 0 for a letter not seen yet; the keys stay in order of first appearance.",
    )
    price, default = rng.randint(2, 9), rng.randint(0, 1)
    yield what_prints(
        "en",
        "Does this raise a KeyError? If not, what comes out?",
        f"""
        prices = {{"tea": {price}}}
        print(prices.get("tea", {default}), prices.get("cocoa", {default}))
        """,
        f"No KeyError: `get` falls back to {default} for the missing key.",
    )
    scores = rng.sample(range(60, 100), 3)
    yield what_prints(
        "zh",
        "请说出输出结果：",
        f"""
        scores = {{"甲": {scores[0]}, "乙": {scores[1]}, "丙": {scores[2]}}}
        print(max(scores, key=scores.get))
        """,
        "max 按分数比较，返回分数最高的键。",
    )


def functions(rng: Random) -> Iterator[Draft]:
    """Calls, defaults, recursion and mistakes."""
    n = rng.randint(4, 7)
    yield what_prints(
        "en",
        "Trace this recursive function for me: what is the result?",
        f"""
        def f(n):
            return 1 if n <= 1 else n * f(n - 1)

        print(f({n}))
        """,
        f"It is the factorial: {' × '.join(str(k) for k in range(n, 0, -1))}.",
    )
    a, b = rng.randint(17, 60), rng.randint(4, 9)
    yield what_prints(
        "en",
        f"What are `//` and `%` doing with {a} and {b}?",
        f"""
        print({a} // {b}, {a} % {b})
        """,
        f"{b} fits {a // b} times into {a}, which leaves {a % b}.",
    )
    wrong = f"def mean(xs):\n    return sum(xs) / len(xs) - 1\n\nprint(mean([{n}, {n + 2}, {n + 7}]))"
    right = wrong.replace(" - 1", "")
    yield draft(
        "en",
        (
            f"This mean comes out too small. What is wrong?\n\n{fenced(wrong)}",
            f"`- 1` is applied after the division, so the result is 1 too small. Drop it:\n{fenced(right)}\n"
            f"It now prints {output_of(right)} instead of {output_of(wrong)}.",
        ),
        system="You review code. Name the fault in one sentence, then give the corrected program.",
    )
    x = rng.randint(2, 9)
    yield what_prints(
        "en",
        "Beginner question: what's the output, and why isn't the outer variable changed?",
        f"""
        x = {x}

        def change():
            x = {x * 10}

        change()
        print(x)
        """,
        "The assignment inside `change` makes a local `x`; the global one keeps its value.",
    )
    times = rng.randint(3, 5)
    yield what_prints(
        "zh",
        "函数的默认参数怎样起作用？下面打印什么？",
        f"""
        def repeat(text, times=2):
            return text * times

        print(repeat("哈"))
        print(repeat("哈", {times}))
        """,
        f"不传 times 时用默认值 2，传入 {times} 时重复 {times} 次。",
    )


KINDS: tuple[Kind, ...] = (loops, sequences, dictionaries, functions)
