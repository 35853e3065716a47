"""Word problems: a short working in one to four lines, then a last line with the answer."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date, timedelta
from fractions import Fraction
from math import ceil, comb, lcm
from random import Random

from tasks.draft import (
    MONTHS,
    NAMES,
    WEEKDAYS,
    ZH_NAMES,
    ZH_WEEKDAYS,
    Draft,
    Kind,
    clock,
    draft,
    money,
    num,
    reply,
)


def en(question: str, *working: str, answer: str) -> tuple[str, str]:
    """One English turn."""
    return question, reply("en", working, answer)


def zh(question: str, *working: str, answer: str) -> tuple[str, str]:
    """One Chinese turn."""
    return question, reply("zh", working, answer)


def shopping(rng: Random) -> Iterator[Draft]:
    """Bills and change."""
    count, price, case = rng.randint(3, 8), rng.randrange(115, 480, 5), rng.randrange(350, 995, 5)
    total = count * price + case
    yield draft(
        "en",
        en(
            f"{rng.choice(NAMES)} buys {count} notebooks at {money(price)} each and a pencil case for {money(case)}. "
            "What does the whole purchase cost?",
            f"Notebooks: {count} × {money(price)} = {money(count * price)}",
            f"With the case: {money(count * price)} + {money(case)} = {money(total)}",
            answer=money(total),
        ),
    )
    rolls, roll, teas, tea = (
        rng.randint(2, 3),
        rng.randrange(310, 395, 5),
        rng.randint(2, 3),
        rng.randrange(140, 210, 5),
    )
    spent, p = rolls * roll + teas * tea, lambda cents: money(cents, "£")
    yield draft(
        "en",
        en(
            f"I'm paying with a £20 note for {rolls} cheese rolls at {p(roll)} and {teas} teas at {p(tea)}. "
            "How much change should I get?",
            f"Rolls: {rolls} × {p(roll)} = {p(rolls * roll)}",
            f"Teas: {teas} × {p(tea)} = {p(teas * tea)}",
            f"Change: £20 - {p(rolls * roll)} - {p(teas * tea)} = {p(2000 - spent)}",
            answer=p(2000 - spent),
        ),
        en(
            "And if I leave out one of the teas?",
            f"One tea less to pay: {p(2000 - spent)} + {p(tea)} = {p(2000 - spent + tea)}",
            answer=p(2000 - spent + tea),
        ),
        system="You help at the till of a small bakery. Be brief and show the sums.",
    )
    kilos, apple, melon = rng.randint(2, 4), rng.randint(6, 11), rng.randint(18, 32)
    spent = kilos * apple + melon
    yield draft(
        "zh",
        zh(
            f"{rng.choice(ZH_NAMES)}买了{kilos}公斤苹果，每公斤{apple}元，又买了一个{melon}元的西瓜，付了100元，应找回多少钱？",
            f"苹果：{kilos} × {apple} = {kilos * apple}（元）",
            f"找回：100 - {kilos * apple} - {melon} = {100 - spent}（元）",
            answer=f"{100 - spent}元",
        ),
    )


def discounts(rng: Random) -> Iterator[Draft]:
    """Prices before and after a reduction."""
    price, off = rng.randrange(60, 260, 20), rng.choice((15, 25, 35))
    cut = Fraction(price * off, 100)
    yield draft(
        "en",
        en(
            f"The green raincoat is marked {money(price * 100)} and everything is {off}% off today. What will I pay?",
            f"Reduction: {price} × {off} ÷ 100 = {num(cut)}",
            f"Sale price: {price} - {num(cut)} = {num(price - cut)}",
            answer=money(int((price - cut) * 100)),
        ),
        system="You answer questions for a clothes shop. Work out prices in at most two lines before the answer.",
    )
    original, left = rng.randrange(50, 150, 5), 100 - rng.choice((20, 40))
    paid = Fraction(original * left, 100)
    yield draft(
        "en",
        en(
            f"After a {100 - left}% discount a pair of boots costs €{num(paid)}. What was the price before?",
            f"€{num(paid)} is {left}% of the old price.",
            f"Old price: {num(paid)} ÷ {left} × 100 = {original}",
            answer=f"€{original}",
        ),
    )
    price, fold = rng.randrange(120, 480, 20), rng.choice(("八五", "七五", "九"))
    rate = {"八五": Fraction(85, 100), "七五": Fraction(75, 100), "九": Fraction(9, 10)}[fold]
    yield draft(
        "zh",
        zh(
            f"一台原价{price}元的台灯打{fold}折，打折后比原来便宜多少元？",
            f"折后价：{price} × {num(rate)} = {num(price * rate)}（元）",
            f"便宜：{price} - {num(price * rate)} = {num(price - price * rate)}（元）",
            answer=f"{num(price - price * rate)}元",
        ),
    )


def travel(rng: Random) -> Iterator[Draft]:
    """Speed, distance and fuel."""
    one, two, hours = rng.randint(14, 19), rng.randint(20, 26), rng.randint(2, 4)
    gap = (one + two) * hours
    yield draft(
        "en",
        en(
            f"Two cyclists set out towards each other at the same moment, {gap} km apart. One rides at {one} km/h, the "
            f"other at {two} km/h. After how many hours do they meet?",
            f"Each hour the gap shrinks by {one} + {two} = {one + two} km.",
            f"{gap} ÷ {one + two} = {hours}",
            answer=f"{hours} hours",
        ),
    )
    use, distance, price = rng.randint(5, 8), rng.randrange(200, 700, 50), rng.randrange(150, 190, 10)
    litres = Fraction(use * distance, 100)
    yield draft(
        "en",
        en(
            f"My car uses {use} litres per 100 km and petrol costs €{money(price, '')} a litre. What does the "
            f"fuel for a {distance} km trip cost?",
            f"Fuel: {distance} ÷ 100 × {use} = {num(litres)} litres",
            f"Cost: {num(litres)} × €{money(price, '')} = {money(int(litres * price), '€')}",
            answer=money(int(litres * price), "€"),
        ),
    )
    speed, hours, extra = rng.randrange(200, 310, 10), rng.randint(2, 4), rng.randrange(100, 300, 10)
    far = speed * hours
    yield draft(
        "zh",
        zh(
            f"一列高铁平均每小时行{speed}千米，从始发站到终点站用了{hours}小时，全程多少千米？",
            f"路程 = 速度 × 时间：{speed} × {hours} = {far}（千米）",
            answer=f"{far}千米",
        ),
        zh(
            f"行到{extra}千米处时，离终点还有多远？",
            f"剩下的路程：{far} - {extra} = {far - extra}（千米）",
            answer=f"{far - extra}千米",
        ),
    )


def ages(rng: Random) -> Iterator[Draft]:
    """Ages now and later."""
    (older, younger), child, times = rng.sample(NAMES, 2), rng.randint(7, 12), rng.randint(3, 4)
    later = rng.randint(4, 9)
    total = child * (times + 1) + 2 * later
    yield draft(
        "en",
        en(
            f"{older} is {times} times as old as {younger}, who is {child}. What will their ages add up to in {later} "
            "years?",
            f"{older} is {times} × {child} = {times * child} now.",
            f"Together now: {times * child} + {child} = {times * child + child}",
            f"Both grow {later} years older: {times * child + child} + 2 × {later} = {total}",
            answer=f"{total}",
        ),
    )
    child, gap = rng.randint(6, 10), rng.randint(24, 30)
    wait = gap - child
    yield draft(
        "zh",
        zh(
            f"{rng.choice(ZH_NAMES)}今年{child}岁，妈妈比孩子大{gap}岁。再过几年，妈妈的年龄正好是孩子的2倍？",
            f"年龄差始终是{gap}岁，妈妈是孩子的2倍时，孩子正好{gap}岁。",
            f"还要过：{gap} - {child} = {wait}（年）",
            answer=f"{wait}年",
        ),
    )


def percentages(rng: Random) -> Iterator[Draft]:
    """Shares and changes in per cent."""
    seeds, share = rng.randrange(120, 400, 20), rng.choice((65, 75, 85, 95))
    up = seeds * share // 100
    yield draft(
        "en",
        en(
            f"Of the {seeds} bean seeds in our school garden, {share}% came up. How many did not?",
            f"Came up: {seeds} × {share} ÷ 100 = {up}",
            f"Did not: {seeds} - {up} = {seeds - up}",
            answer=f"{seeds - up} seeds",
        ),
    )
    before, growth = rng.randrange(400, 900, 50), rng.choice((6, 12, 18, 24))
    after = before + before * growth // 100
    yield draft(
        "en",
        en(
            f"The village museum had {before} visitors in May and {after} in June. By what percentage did the number rise?",
            f"Rise: {after} - {before} = {after - before}",
            f"As a percentage of May: {after - before} ÷ {before} × 100 = {growth}",
            answer=f"{growth}%",
        ),
        system="You are a patient maths tutor: name each step in a few words.",
    )
    total, absent = rng.choice((25, 40, 50)), rng.randint(1, 5)
    rate = Fraction((total - absent) * 100, total)
    yield draft(
        "zh",
        zh(
            f"某班有{total}名学生，今天有{absent}人请假，今天的出勤率是多少？",
            f"到校人数：{total} - {absent} = {total - absent}",
            f"出勤率：{total - absent} ÷ {total} × 100 = {num(rate)}",
            answer=f"{num(rate)}%",
        ),
    )


def units(rng: Random) -> Iterator[Draft]:
    """Conversion of units."""
    celsius = rng.randrange(-10, 45, 5)
    fahrenheit = celsius * 9 // 5 + 32
    yield draft(
        "en",
        en(
            f"A friend in Chicago writes that it is {fahrenheit} °F outside. What is that in degrees Celsius?",
            f"Subtract 32: {fahrenheit} - 32 = {fahrenheit - 32}",
            f"Multiply by 5/9: {fahrenheit - 32} × 5 ÷ 9 = {celsius}",
            answer=f"{celsius} °C",
        ),
    )
    inches = rng.randint(24, 55)
    width = Fraction(254 * inches, 100)
    limit = rng.randrange(90, 130, 5)
    verdict = "yes" if width <= limit else "no"
    yield draft(
        "en",
        en(
            f"Will a shelf {inches} inches wide fit into an alcove of {limit} cm? (1 inch = 2.54 cm)",
            f"Shelf: {inches} × 2.54 = {num(width)} cm",
            f"{num(width)} cm is {'not more' if verdict == 'yes' else 'more'} than {limit} cm.",
            answer=verdict,
        ),
    )
    jin, parts = rng.randrange(6, 20, 2), rng.choice((4, 5, 8))
    grams = jin * 500
    yield draft(
        "zh",
        zh(
            f"把{jin}斤大米平均装进{parts}个袋子，每袋多少克？（1斤 = 500克）",
            f"总重：{jin} × 500 = {grams}（克）",
            f"每袋：{grams} ÷ {parts} = {num(Fraction(grams, parts))}（克）",
            answer=f"{num(Fraction(grams, parts))}克",
        ),
    )


def clocks(rng: Random) -> Iterator[Draft]:
    """Times of day, time zones and dates."""
    leave, flight, zone = rng.randrange(480, 700, 5), rng.randrange(130, 420, 5), rng.choice((-3, -2, 2, 3, 5))
    landed = leave + flight
    ahead = f"{abs(zone)} hours {'ahead of' if zone > 0 else 'behind'}"
    yield draft(
        "en",
        en(
            f"My flight leaves at {clock(leave)} and lasts {flight // 60} h {flight % 60} min. The destination's clocks "
            f"are {ahead} ours. What is the local time there when I land?",
            f"Landing by our clocks: {clock(leave)} + {flight // 60} h {flight % 60} min is {clock(landed)}.",
            f"There it is {abs(zone)} hours {'later' if zone > 0 else 'earlier'}.",
            answer=clock(landed + 60 * zone),
        ),
        system="You work at an airport information desk. Give times on the 24-hour clock.",
    )
    start = date(2025, rng.choice((3, 5, 8, 10)), rng.randint(8, 26))
    end = start + timedelta(days=rng.randint(28, 40))
    left = (date(2025, start.month % 12 + 1, 1) - start).days - 1
    months = [d.strftime("%d").lstrip("0") + " " + MONTHS[d.month - 1] for d in (start, end)]
    middle = (date(2025, end.month, 1) - date(2025, start.month + 1, 1)).days
    between = f"{left} + {middle} + {end.day}" if middle else f"{left} + {end.day}"
    yield draft(
        "en",
        en(
            f"A library book borrowed on {months[0]} 2025 is due on {months[1]} 2025. How many days is that?",
            f"{left} days are left in {MONTHS[start.month - 1]} after the {start.day}"
            f"{'st' if start.day == 21 else 'nd' if start.day == 22 else 'rd' if start.day == 23 else 'th'}.",
            f"Up to the due date: {between} = {(end - start).days}",
            answer=f"{(end - start).days} days",
        ),
    )
    meet, walk, ride, early = rng.randrange(540, 660, 15), rng.randint(6, 14), rng.randint(18, 35), rng.choice((5, 10))
    need = walk + ride + early
    yield draft(
        "zh",
        zh(
            f"会议{clock(meet)}开始，我走到地铁站要{walk}分钟，坐车{ride}分钟，还想提前{early}分钟到。最晚几点出门？",
            f"一共需要：{walk} + {ride} + {early} = {need}（分钟）",
            f"从{clock(meet)}往前推{need}分钟。",
            answer=clock(meet - need),
        ),
        system="你是一位时间管理助手，先列出用时，再给出时刻。",
    )


def recipes(rng: Random) -> Iterator[Draft]:
    """Scaling a recipe."""
    base, flour = rng.choice((4, 6)), rng.randrange(180, 420, 60)
    people = base + rng.choice((2, 4, 8))
    each = Fraction(flour, base)
    eggs = base // 2
    yield draft(
        "en",
        en(
            f"My pancake recipe for {base} people takes {flour} g of flour. How much flour do I need for {people} people?",
            f"Per person: {flour} ÷ {base} = {num(each)} g",
            f"For {people}: {num(each)} × {people} = {num(each * people)} g",
            answer=f"{num(each * people)} g",
        ),
        en(
            f"The recipe also says {eggs} eggs. How many now?",
            f"Scale by the same factor: {eggs} × {people} ÷ {base} = {num(Fraction(eggs * people, base))}",
            answer=f"{num(Fraction(eggs * people, base))} eggs",
        ),
    )
    people, rice, guests = rng.choice((3, 5)), rng.choice((80, 90, 120)), rng.randint(7, 12)
    yield draft(
        "zh",
        zh(
            f"煮饭时{people}个人用{people * rice}克米。今晚来了客人，一共{guests}个人吃饭，要用多少克米？",
            f"每人：{people * rice} ÷ {people} = {rice}（克）",
            f"{guests}人：{rice} × {guests} = {rice * guests}（克）",
            answer=f"{rice * guests}克",
        ),
    )


def averages(rng: Random) -> Iterator[Draft]:
    """Means, and the value that a wanted mean needs."""
    marks, need = [rng.randint(68, 84) for _ in range(3)], rng.randint(82, 95)
    marks[0] -= (sum(marks) + need) % 4
    goal = (sum(marks) + need) // 4
    listed = " + ".join(map(str, marks))
    yield draft(
        "en",
        en(
            f"My first three test marks are {marks[0]}, {marks[1]} and {marks[2]}. What must I score in the fourth test "
            f"for an average of {goal}?",
            f"Four tests need 4 × {goal} = {4 * goal} points.",
            f"So far: {listed} = {sum(marks)}",
            f"Missing: {4 * goal} - {sum(marks)} = {need}",
            answer=f"{need}",
        ),
        system="You are a maths tutor for teenagers. Keep the working to three short lines.",
    )
    temps = [rng.randint(18, 30) for _ in range(4)]
    temps.append(-sum(temps) % 5 + 20)
    high = max(temps)
    yield draft(
        "zh",
        zh(
            f"这五天的最高气温是{'、'.join(map(str, temps))}度，平均是多少度？",
            f"总和：{' + '.join(map(str, temps))} = {sum(temps)}",
            f"平均：{sum(temps)} ÷ 5 = {sum(temps) // 5}",
            answer=f"{sum(temps) // 5}度",
        ),
        zh(
            "最热的那天比平均高多少度？",
            f"最热：{high}度，{high} - {sum(temps) // 5} = {high - sum(temps) // 5}",
            answer=f"{high - sum(temps) // 5}度",
        ),
    )


def geometry(rng: Random) -> Iterator[Draft]:
    """Lengths, areas, volumes and angles."""
    long, wide, price = rng.randint(11, 18), rng.randint(5, 9), rng.randint(7, 14)
    around = 2 * (long + wide)
    yield draft(
        "en",
        en(
            f"Fencing costs ${price} per metre. How much is a fence all round a vegetable plot of {long} m by {wide} m?",
            f"Perimeter: 2 × ({long} + {wide}) = {around} m",
            f"Cost: {around} × ${price} = ${around * price}",
            answer=f"${around * price}",
        ),
    )
    side, across, deep = rng.choice((25, 50)), rng.randint(3, 6), rng.randint(2, 4)
    tiles = (across * 100 // side) * (deep * 100 // side)
    yield draft(
        "en",
        en(
            f"How many square tiles with {side} cm sides cover a bathroom floor {across} m long and {deep} m wide?",
            f"Along the length: {across * 100} ÷ {side} = {across * 100 // side}",
            f"Along the width: {deep * 100} ÷ {side} = {deep * 100 // side}",
            f"Together: {across * 100 // side} × {deep * 100 // side} = {tiles}",
            answer=f"{tiles} tiles",
        ),
    )
    scale, (foot, height, ladder) = rng.choice((1, 2)), rng.choice(((3, 4, 5), (5, 12, 13), (8, 15, 17)))
    foot, height, ladder = foot * scale, height * scale, ladder * scale
    yield draft(
        "en",
        en(
            f"A rope {ladder} m long runs tight from the top of a mast to a hook {foot} m from its foot on level ground. "
            "How tall is the mast?",
            f"By Pythagoras the height squared is {ladder} × {ladder} - {foot} × {foot} = {height * height}.",
            f"{height} × {height} = {height * height}",
            answer=f"{height} m",
        ),
    )
    a, b, c = rng.randrange(40, 100, 10), rng.randrange(30, 60, 10), rng.randrange(20, 50, 10)
    litres = Fraction(a * b * c, 1000)
    yield draft(
        "en",
        en(
            f"How many litres of water does an aquarium of {a} cm × {b} cm × {c} cm hold when full?",
            f"Volume: {a} × {b} × {c} = {a * b * c} cubic centimetres",
            f"One litre is 1000 cubic centimetres: {a * b * c} ÷ 1000 = {num(litres)}",
            answer=f"{num(litres)} litres",
        ),
    )
    one, two = rng.randint(35, 75), rng.randint(40, 80)
    yield draft(
        "zh",
        zh(
            f"一个三角形有两个角分别是{one}度和{two}度，第三个角是多少度？",
            f"三角形内角和是180度：180 - {one} - {two} = {180 - one - two}",
            answer=f"{180 - one - two}度",
        ),
        system="你是初中数学老师，解题时先说用到的规律。",
    )


def rates(rng: Random) -> Iterator[Draft]:
    """Work done together."""
    slow, fast = rng.choice(((6, 3), (12, 4), (12, 6), (20, 5), (30, 6)))
    together = Fraction(slow * fast, slow + fast)
    yield draft(
        "en",
        en(
            f"One pump empties a cellar in {slow} hours, a stronger one in {fast} hours. How long do both take together?",
            f"Per hour they pump 1/{slow} + 1/{fast} = 1/{num(together)} of the water."
            if together.denominator == 1
            else f"Per hour they pump 1/{slow} + 1/{fast} = {slow + fast}/{slow * fast} of the water.",
            f"Time: {slow} × {fast} ÷ ({slow} + {fast}) = {num(together)}",
            answer=f"{num(together)} hours",
        ),
    )


def ratios(rng: Random) -> Iterator[Draft]:
    """Sharing in a given ratio."""
    (first, second), (a, b), part = (
        rng.sample(NAMES, 2),
        rng.choice(((2, 3), (3, 5), (4, 7), (1, 4))),
        rng.randint(12, 40),
    )
    total = (a + b) * part
    yield draft(
        "en",
        en(
            f"{first} and {second} share a prize of ${total} in the ratio {a}:{b}. How much does {second} get?",
            f"There are {a} + {b} = {a + b} parts of {total} ÷ {a + b} = {part} dollars.",
            f"{second}: {b} × {part} = {b * part}",
            answer=f"${b * part}",
        ),
    )
    water, part = rng.randint(3, 7), rng.randrange(50, 150, 10)
    yield draft(
        "zh",
        zh(
            f"果汁浓浆和水按1:{water}调配，要做{(water + 1) * part}毫升饮料，需要多少毫升浓浆？",
            f"一共 1 + {water} = {water + 1} 份。",
            f"浓浆：{(water + 1) * part} ÷ {water + 1} = {part}（毫升）",
            answer=f"{part}毫升",
        ),
    )


def mixtures(rng: Random) -> Iterator[Draft]:
    """Two kinds of thing, counted together."""
    fives, tens = rng.randint(4, 9), rng.randint(3, 9)
    count, worth = fives + tens, 5 * fives + 10 * tens
    yield draft(
        "en",
        en(
            f"A jar holds {count} coins, only 5-cent and 10-cent ones, worth {worth} cents in all. How many are 10-cent "
            "coins?",
            f"If all were 5-cent coins: {count} × 5 = {5 * count} cents",
            f"Missing: {worth} - {5 * count} = {worth - 5 * count} cents, and each 10-cent coin adds 5.",
            f"{worth - 5 * count} ÷ 5 = {tens}",
            answer=f"{tens}",
        ),
    )
    hens, rabbits = rng.randint(5, 14), rng.randint(4, 12)
    heads, legs = hens + rabbits, 2 * hens + 4 * rabbits
    yield draft(
        "zh",
        zh(
            f"笼子里有鸡和兔共{heads}只，一共{legs}条腿，鸡和兔各有几只？",
            f"假设全是鸡：{heads} × 2 = {2 * heads}（条腿），少了 {legs} - {2 * heads} = {legs - 2 * heads} 条。",
            f"兔：{legs - 2 * heads} ÷ 2 = {rabbits}（只），鸡：{heads} - {rabbits} = {hens}（只）",
            answer=f"鸡{hens}只，兔{rabbits}只",
        ),
    )


def series(rng: Random) -> Iterator[Draft]:
    """Amounts that grow by the same step."""
    first, step, weeks = rng.randint(3, 8), rng.randint(2, 4), rng.choice((6, 8, 10))
    last = first + (weeks - 1) * step
    total = weeks * (first + last) // 2
    yield draft(
        "en",
        en(
            f"{rng.choice(NAMES)} saves ${first} in the first week and ${step} more each week than the week before. "
            f"How much is saved after {weeks} weeks?",
            f"Last week: {first} + {weeks - 1} × {step} = {last}",
            f"Sum: {weeks} × ({first} + {last}) ÷ 2 = {total}",
            answer=f"${total}",
        ),
    )
    first, step, row = rng.randint(16, 24), rng.choice((2, 3)), rng.randint(9, 15)
    yield draft(
        "zh",
        zh(
            f"剧场第一排有{first}个座位，往后每排比前一排多{step}个。第{row}排有多少个座位？",
            f"第{row}排：{first} + {row - 1} × {step} = {first + (row - 1) * step}（个）",
            answer=f"{first + (row - 1) * step}个",
        ),
    )


def interest(rng: Random) -> Iterator[Draft]:
    """Simple interest."""
    capital, rate, years = rng.randrange(800, 3000, 200), rng.choice((2, 3, 4)), rng.randint(2, 5)
    yearly = capital * rate // 100
    yield draft(
        "en",
        en(
            f"I lend my cousin ${capital} at {rate}% simple interest a year. What is owed after {years} years, if nothing "
            "was paid back?",
            f"Interest per year: {capital} × {rate} ÷ 100 = {yearly}",
            f"Owed: {capital} + {years} × {yearly} = {capital + years * yearly}",
            answer=f"${capital + years * yearly}",
        ),
        en(
            f"Suppose {money(yearly * 100)} is paid back each year instead. What is owed then?",
            f"Each payment of {money(yearly * 100)} covers just that year's interest.",
            f"So the debt stays as it was: {capital} + {years} × {yearly} - {years} × {yearly} = {capital}",
            answer=f"${capital}",
        ),
        system="You explain money matters at a credit union. Plain words, short sums.",
    )


def weekdays(rng: Random) -> Iterator[Draft]:
    """Counting on in weeks."""
    day, ahead = rng.randrange(7), rng.choice((25, 38, 45, 60, 100))
    yield draft(
        "en",
        en(
            f"If today is {WEEKDAYS[day]}, what weekday will it be in {ahead} days?",
            f"{ahead} = {ahead // 7} × 7 + {ahead % 7}, so only {ahead % 7} days count.",
            f"{ahead % 7} days after {WEEKDAYS[day]} comes {WEEKDAYS[(day + ahead) % 7]}.",
            answer=WEEKDAYS[(day + ahead) % 7],
        ),
    )
    day, back = rng.randrange(7), rng.choice((10, 16, 30, 40))
    yield draft(
        "zh",
        zh(
            f"今天是{ZH_WEEKDAYS[day]}，{back}天以前是星期几？",
            f"{back} = {back // 7} × 7 + {back % 7}，只要往前数{back % 7}天。",
            answer=ZH_WEEKDAYS[(day - back) % 7],
        ),
    )


def chance_and_choice(rng: Random) -> Iterator[Draft]:
    """Probabilities and pairings."""
    red, blue, white = rng.randint(2, 5), rng.randint(3, 7), rng.randint(2, 6)
    total = red + blue + white
    hit = Fraction(total - blue, total)
    simple = "" if hit.denominator == total else f" = {hit}"
    yield draft(
        "en",
        en(
            f"A bag has {red} red, {blue} blue and {white} white marbles. I draw one without looking. What is the "
            "probability that it is not blue?",
            f"Marbles in all: {red} + {blue} + {white} = {total}",
            f"Not blue: {red} + {white} = {red + white}",
            f"Probability: {red + white}/{total}{simple}",
            answer=str(hit),
        ),
    )
    teams = rng.randint(6, 12)
    yield draft(
        "zh",
        zh(
            f"{teams}支球队打单循环赛，每两队比赛一场，一共要打多少场？",
            f"每队打{teams - 1}场，每场算了两次：{teams} × {teams - 1} ÷ 2 = {comb(teams, 2)}（场）",
            answer=f"{comb(teams, 2)}场",
        ),
    )


def rounding_up(rng: Random) -> Iterator[Draft]:
    """Whole vehicles for a number of people."""
    seats, pupils = rng.choice((8, 12, 16)), rng.randint(50, 110)
    pupils += pupils % seats == 0
    vans = ceil(pupils / seats)
    yield draft(
        "en",
        en(
            f"{pupils} pupils go on an outing in minibuses with {seats} seats for pupils. How many minibuses are needed?",
            f"{vans - 1} minibuses carry only {vans - 1} × {seats} = {(vans - 1) * seats} pupils.",
            f"That leaves {pupils} - {(vans - 1) * seats} = {pupils - (vans - 1) * seats}, so one more is needed.",
            answer=f"{vans}",
        ),
    )
    seats, people, price = rng.choice((4, 6)), rng.randint(21, 45), rng.choice((30, 40))
    people += people % seats == 0
    boats = ceil(people / seats)
    yield draft(
        "zh",
        zh(
            f"{people}人去划船，每条船最多坐{seats}人，每条船租金{price}元，至少要花多少租金？",
            f"{boats - 1}条船只能坐 {boats - 1} × {seats} = {(boats - 1) * seats} 人，还差一条，所以租{boats}条。",
            f"租金：{boats} × {price} = {boats * price}（元）",
            answer=f"{boats * price}元",
        ),
    )


def comparing(rng: Random) -> Iterator[Draft]:
    """Which offer, or who, comes first."""
    unit_small, unit_big = rng.sample(range(24, 45), 2)
    small, big = unit_small * 5, unit_big * 12
    better = "500 g" if unit_small < unit_big else "1200 g"
    yield draft(
        "en",
        en(
            f"Which is cheaper per 100 g: a 500 g bag of oats for {money(small)} or a 1200 g bag for {money(big)}?",
            f"Small bag: {small} ÷ 5 = {unit_small} cents per 100 g",
            f"Big bag: {big} ÷ 12 = {unit_big} cents per 100 g",
            answer=f"the {better} bag",
        ),
    )
    a, b, c, d = rng.sample(NAMES, 4)
    facts = [f"{a} is taller than {b}", f"{c} is shorter than {b}", f"{d} is taller than {a}"]
    rng.shuffle(facts)
    yield draft(
        "en",
        en(
            f"{facts[0]}. {facts[1]}. {facts[2]}. Who is the second tallest?",
            f"From tall to short: {d}, {a}, {b}, {c}.",
            answer=a,
        ),
    )
    a, b, c, d = rng.sample(ZH_NAMES, 4)
    facts = [f"{a}比{b}先到", f"{c}比{b}晚到", f"{d}比{a}先到"]
    rng.shuffle(facts)
    yield draft(
        "zh",
        zh(
            f"四人赛跑，{'，'.join(facts)}。谁是最后一名？",
            f"由先到后：{d}、{a}、{b}、{c}。",
            answer=c,
        ),
    )


def number_puzzles(rng: Random) -> Iterator[Draft]:
    """A sum and a difference; meeting again; a scale; posts along a road."""
    low, gap = rng.randint(11, 40), rng.randint(4, 18)
    total = 2 * low + gap
    yield draft(
        "en",
        en(
            f"Two numbers add up to {total} and differ by {gap}. Which numbers are they?",
            f"Twice the smaller one: {total} - {gap} = {2 * low}",
            f"Smaller: {2 * low} ÷ 2 = {low}",
            f"Larger: {low} + {gap} = {low + gap}",
            answer=f"{low} and {low + gap}",
        ),
    )
    one, two = rng.choice(((8, 12), (9, 12), (10, 15), (12, 18), (15, 20)))
    start = rng.randrange(360, 600, 30)
    both = lcm(one, two)
    yield draft(
        "en",
        en(
            f"Bus A leaves the square every {one} minutes and bus B every {two} minutes. Both leave at {clock(start)}. "
            "When do they next leave together?",
            f"The smallest common multiple of {one} and {two} is {both}.",
            f"{both} minutes after {clock(start)} is {clock(start + both)}.",
            answer=clock(start + both),
        ),
    )
    ratio, span = rng.choice((25000, 50000)), rng.randint(5, 15)
    metres = ratio * span // 100
    yield draft(
        "en",
        en(
            f"On a hiking map at 1:{ratio}, two huts are {span} cm apart. What is the real distance in kilometres?",
            f"In centimetres: {span} × {ratio} = {span * ratio}",
            f"In kilometres: {span * ratio} ÷ 100000 = {num(Fraction(metres, 1000))}",
            answer=f"{num(Fraction(metres, 1000))} km",
        ),
    )
    gap, count = rng.choice((4, 5, 6, 8)), rng.randint(15, 30)
    yield draft(
        "zh",
        zh(
            f"一条{gap * count}米长的小路，一侧每隔{gap}米种一棵树，两端都种，一共要种多少棵？",
            f"间隔数：{gap * count} ÷ {gap} = {count}",
            f"两端都种，棵数多1：{count} + 1 = {count + 1}（棵）",
            answer=f"{count + 1}棵",
        ),
    )


KINDS: tuple[Kind, ...] = (
    shopping,
    discounts,
    travel,
    ages,
    percentages,
    units,
    clocks,
    recipes,
    averages,
    geometry,
    rates,
    ratios,
    mixtures,
    series,
    interest,
    weekdays,
    chance_and_choice,
    rounding_up,
    comparing,
    number_puzzles,
)
