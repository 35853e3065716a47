"""Documents to JSON: the record is drawn first, and the document is written from it.

Every answer is one line of bare JSON with the keys that were asked for, in that order.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date, timedelta
from random import Random
from typing import Any

from tasks.draft import (
    CITIES,
    MONTHS,
    NAMES,
    SURNAMES,
    WEEKDAYS,
    ZH_CITIES,
    ZH_NAMES,
    Draft,
    Kind,
    as_json,
    clock,
    draft,
)


def a_day(rng: Random) -> date:
    """Some day of 2025 or 2026."""
    return date(2025, 1, 1) + timedelta(days=rng.randrange(700))


def in_words(day: date) -> str:
    """A date as in a letter: 7 March 2025."""
    return f"{day.day} {MONTHS[day.month - 1]} {day.year}"


def in_chinese(day: date) -> str:
    """A date as in a Chinese letter: 2025年3月7日."""
    return f"{day.year}年{day.month}月{day.day}日"


def person(rng: Random) -> str:
    """An invented full name."""
    return f"{rng.choice(NAMES)} {rng.choice(SURNAMES)}"


def keys(record: dict[str, Any]) -> str:
    """The keys of a record, as a prompt lists them."""
    return ", ".join(record)


def invoices(rng: Random) -> Iterator[Draft]:
    """Bills and receipts."""
    net, vat, day = rng.randrange(200, 900, 50), rng.choice((10, 20)), a_day(rng)
    record: dict[str, Any] = {"number": f"R-{rng.randint(1000, 9999)}", "date": day.isoformat(), "net": net}
    record |= {"vat": net * vat // 100, "total": net + net * vat // 100}
    yield draft(
        "en",
        (
            f"Extract {keys(record)} from this invoice as JSON. Write the date as YYYY-MM-DD and amounts as numbers.\n\n"
            f"INVOICE {record['number']}\nIssued on {in_words(day)}\nRoof repair, two days: {net}.00 EUR\n"
            f"VAT {vat} %: {record['vat']}.00 EUR\nTo pay: {record['total']}.00 EUR",
            as_json(record),
        ),
    )
    prices = rng.sample(range(95, 490, 5), 3)
    goods = dict(zip(rng.sample(("milk", "bread", "rice", "lemons", "honey", "salt", "tea"), 3), prices, strict=True))
    lines = "\n".join(f"{name.upper():<10}{cents / 100:.2f}" for name, cents in goods.items())
    record = {"items": [{"name": name, "price": cents / 100} for name, cents in goods.items()]}
    record["total"] = sum(prices) / 100
    yield draft(
        "en",
        (f"CORNER SHOP\n{lines}\n{'SUM':<10}{sum(prices) / 100:.2f}\nTHANK YOU", as_json(record)),
        system="You read till receipts. Reply with JSON only: items (a list of objects with name in lower case and price) "
        "and total.",
    )
    amount, day, payer = rng.randrange(300, 2000, 20), a_day(rng), rng.choice(ZH_NAMES)
    record = {
        "付款人": payer,
        "金额": amount,
        "日期": day.isoformat(),
        "用途": rng.choice(("房租", "学费", "装修定金")),
    }
    yield draft(
        "zh",
        (
            f"把这张收据整理成 JSON，键为：付款人、金额（数字）、日期（YYYY-MM-DD）、用途。\n\n"
            f"今收到{payer}交来{record['用途']}人民币{amount}元整。{in_chinese(day)}",
            as_json(record),
        ),
    )


def orders(rng: Random) -> Iterator[Draft]:
    """What customers ask for."""
    record: dict[str, Any] = {"customer": person(rng), "item": rng.choice(("desk lamp", "kettle", "garden chair"))}
    record |= {"quantity": rng.randint(2, 9), "city": rng.choice(CITIES), "gift_wrap": rng.random() < 0.5}
    wrap = "Please wrap it as a gift." if record["gift_wrap"] else "No gift wrapping, please."
    yield draft(
        "en",
        (
            f"Hello, this is {record['customer']}. I'd like to order the {record['item']}, {record['quantity']} pieces, to "
            f"be sent to {record['city']}. {wrap}",
            as_json(record),
        ),
        system=f"You take orders for a home store. Answer every message with one JSON object: {keys(record)} (true or "
        "false). No other text.",
    )
    first, second, more = rng.randint(2, 6), rng.randint(1, 4), rng.randint(1, 3)
    yield draft(
        "en",
        (
            f"From this café order make JSON that maps each drink to its number: {first} flat whites, {second} of the mint "
            "teas, nothing to eat.",
            as_json({"flat white": first, "mint tea": second}),
        ),
        (
            f"They've just added {more} more mint tea{'s' if more > 1 else ''}. Give me the updated JSON.",
            as_json({"flat white": first, "mint tea": second + more}),
        ),
    )
    size, colour = rng.choice(("S", "M", "L", "XL")), rng.choice(("深蓝", "米白", "墨绿"))
    record = {"商品": "衬衫", "颜色": colour, "尺码": size, "数量": rng.randint(2, 5), "电话": None}
    yield draft(
        "zh",
        (f"老板，上次那款衬衫给我来{record['数量']}件，要{colour}的，{size}码，电话我晚点再发你。", as_json(record)),
        system="你是服装店的接单助手，只输出 JSON，键为：商品、颜色、尺码、数量、电话；没有给出的信息写 null。",
    )


def appointments(rng: Random) -> Iterator[Draft]:
    """Who comes when, and why."""
    day, time, name = a_day(rng), rng.randrange(540, 1020, 15), person(rng)
    record: dict[str, Any] = {"patient": name, "date": day.isoformat(), "time": clock(time)}
    record["reason"] = rng.choice(("check-up", "vaccination", "blood test"))
    new = time + rng.choice((30, 45, 60))
    yield draft(
        "en",
        (
            f"{name} here. May I come on {in_words(day)} at {clock(time)} for a {record['reason']}?",
            as_json(record),
        ),
        (
            f"Sorry, could we make it {clock(new)} on the same day?",
            as_json(record | {"time": clock(new)}),
        ),
        system=f"You are the front desk of a clinic. Turn each message into JSON with {keys(record)}; date as YYYY-MM-DD, "
        "time as HH:MM.",
    )
    weekday, hour = rng.choice(WEEKDAYS[:5]), rng.randint(1, 6)
    record = {"day": weekday, "start": clock(60 * (12 + hour)), "minutes": rng.choice((40, 50, 90))}
    record["attendees"] = rng.sample(NAMES, 3)
    a, b, c = record["attendees"]
    yield draft(
        "en",
        (
            f"Pull the meeting out of this note as JSON with {keys(record)}, 24-hour clock: \"Let's sit down {weekday} at "
            f'{hour} pm, me ({a}), {b} and {c}; {record["minutes"]} minutes should do."',
            as_json(record),
        ),
    )
    day, who = a_day(rng), rng.choice(ZH_NAMES)
    hour = rng.randint(2, 5)
    record = {
        "客户": who,
        "日期": day.isoformat(),
        "时间": f"{hour + 12}:30",
        "服务": rng.choice(("剪发", "烫发", "染发")),
    }
    yield draft(
        "zh",
        (
            f"理发店留言：“我是{who}，想约{in_chinese(day)}下午{hour}点半{record['服务']}。”请提取成 JSON：客户、日期、时间"
            "（24小时制）、服务。",
            as_json(record),
        ),
    )


def journeys(rng: Random) -> Iterator[Draft]:
    """Tickets, stays and parcels."""
    start, end = rng.sample(CITIES, 2)
    record: dict[str, Any] = {"train": f"IC {rng.randint(100, 990)}", "from": start, "to": end}
    leave = rng.randrange(400, 1100, 7)
    record |= {
        "departure": clock(leave),
        "coach": rng.randint(2, 14),
        "seat": f"{rng.randint(11, 88)}{rng.choice('AD')}",
    }
    yield draft(
        "en",
        (
            f"Return only JSON ({keys(record)}; numbers where possible) for this ticket: {record['train']}, {start} - {end}, "
            f"dep. {record['departure']}, coach {record['coach']}, seat {record['seat']}, 2nd class.",
            as_json(record),
        ),
    )
    arrive = a_day(rng)
    leave_day = arrive + timedelta(days=rng.randint(2, 6))
    record = {"guest": person(rng), "check_in": arrive.isoformat(), "check_out": leave_day.isoformat()}
    record |= {"nights": (leave_day - arrive).days, "breakfast": rng.random() < 0.5}
    yield draft(
        "en",
        (
            f'Booking mail: "A double room for {record["guest"]}, arriving {in_words(arrive)} and leaving '
            f'{in_words(leave_day)}, {"with" if record["breakfast"] else "without"} breakfast." I need JSON with guest, '
            "check_in, check_out (ISO dates), nights (count them) and breakfast (true/false).",
            as_json(record),
        ),
    )
    record = {"tracking": f"PX{rng.randint(10**6, 10**7 - 1)}", "status": rng.choice(("in transit", "delivered"))}
    record |= {"place": rng.choice(CITIES), "weight_kg": rng.randint(11, 98) / 10}
    verb = "reached you in" if record["status"] == "delivered" else "is on its way and was last seen in"
    yield draft(
        "en",
        (
            f'Turn this text message into JSON with {keys(record)}. The status is either "in transit" or "delivered".\n'
            f"Your parcel {record['tracking']} ({record['weight_kg']} kg) {verb} {record['place']}.",
            as_json(record),
        ),
    )
    start, end = rng.sample(ZH_CITIES, 2)
    record = {
        "车次": f"G{rng.randint(101, 1999)}",
        "出发": start,
        "到达": end,
        "座位": f"{rng.randint(1, 16):02d}车{rng.randint(1, 17)}A",
    }
    yield draft(
        "zh",
        (
            f"从短信里提取车次、出发、到达、座位，输出 JSON：您已购{record['车次']}次列车，{start}站开往{end}站，"
            f"{record['座位']}号，请提前到站候车。",
            as_json(record | {"座位": record["座位"] + "号"}),
        ),
    )
    nights, price = rng.randint(2, 5), rng.randrange(260, 500, 20)
    record = {
        "酒店": rng.choice(("望湖楼", "青石客栈", "云边小筑")),
        "晚数": nights,
        "每晚": price,
        "总价": nights * price,
    }
    yield draft(
        "zh",
        (
            f"我订了{record['酒店']}，住{nights}晚，每晚{price}元。请用 JSON 给出酒店、晚数、每晚、总价，价格用数字。",
            as_json(record),
        ),
    )


def events(rng: Random) -> Iterator[Draft]:
    """Posters, matches and notices."""
    day, price = a_day(rng), rng.randint(6, 18)
    record: dict[str, Any] = {"title": rng.choice(("Harp by Candlelight", "Brass on the Pier", "An Evening of Tango"))}
    record |= {"date": day.isoformat(), "doors": clock(rng.randrange(1080, 1200, 15)), "price": price}
    record["free_for_children"] = True
    yield draft(
        "en",
        (
            f"{record['title'].upper()}\n{WEEKDAYS[day.weekday()]}, {in_words(day)}\nDoors {record['doors']}\nTickets "
            f"{price} EUR, children free",
            as_json(record),
        ),
        system=f"Extract poster texts as one JSON object with {keys(record)}. Titles in title case, dates as YYYY-MM-DD.",
    )
    home, away = rng.sample(CITIES, 2)
    goals = (rng.randint(0, 4), rng.randint(0, 4))
    winner = None if goals[0] == goals[1] else home if goals[0] > goals[1] else away
    record = {"home": home, "away": away, "home_goals": goals[0], "away_goals": goals[1], "winner": winner}
    yield draft(
        "en",
        (
            f"Match report: in front of a full house {home} played {away}; the final score was {goals[0]}-{goals[1]} from "
            f"the home side's view. As JSON, please: {keys(record)} (null for a draw).",
            as_json(record),
        ),
    )
    found = rng.choice(("a red umbrella", "a child's glove", "a silver key ring", "a pair of sunglasses"))
    record = {
        "object": found.split(" ", 1)[1],
        "place": rng.choice(("pool", "library", "tram stop")),
        "room": rng.randint(2, 30),
    }
    yield draft(
        "en",
        (
            f'Notice on the board: "Found: {found}, left at the {record["place"]} on Sunday. Pick it up in room '
            f'{record["room"]}." Fill a JSON object with object (without the article), place and room (a number).',
            as_json(record),
        ),
    )
    day, seats = a_day(rng), rng.randrange(20, 80, 5)
    record = {
        "讲座": rng.choice(("茶与水", "古琴入门", "城市里的鸟")),
        "日期": day.isoformat(),
        "地点": f"{rng.randint(2, 6)}楼报告厅",
    }
    record |= {"名额": seats, "收费": False}
    yield draft(
        "zh",
        (
            f"《{record['讲座']}》公益讲座将于{in_chinese(day)}在{record['地点']}举行，限{seats}人，免费参加。",
            as_json(record),
        ),
        system="把活动通知转成 JSON，键为讲座、日期（YYYY-MM-DD）、地点、名额、收费（true 或 false）。不要输出其他文字。",
    )
    runner, minutes, place = rng.choice(ZH_NAMES), rng.randint(38, 59), rng.randint(2, 9)
    yield draft(
        "zh",
        (
            f"赛后播报：{runner}以{minutes}分{minutes // 2}秒跑完十公里，名列第{place}。提取 JSON：选手、用时（MM:SS）、名次（数字）。",
            as_json({"选手": runner, "用时": f"{minutes}:{minutes // 2}", "名次": place}),
        ),
    )


def offices(rng: Random) -> Iterator[Draft]:
    """Contacts, tasks and job notices."""
    name = person(rng)
    first, last = name.split()
    record: dict[str, Any] = {
        "first_name": first,
        "last_name": last,
        "role": rng.choice(("surveyor", "notary", "editor")),
    }
    record |= {"email": f"{first.lower()}@{last.lower()}.example", "phone": None}
    yield draft(
        "en",
        (
            f'Signature of a mail: "Best wishes, {name}, {record["role"]}, {record["email"]}". Make a contact card in JSON '
            f"with {keys(record)}; use null for what is missing.",
            as_json(record),
        ),
    )
    owners, days = rng.sample(NAMES, 2), rng.sample(WEEKDAYS[:5], 2)
    tasks = rng.sample(("book the hall", "check the budget", "print the badges", "call the caterer"), 2)
    actions = [dict(zip(("owner", "task", "due"), row, strict=True)) for row in zip(owners, tasks, days, strict=True)]
    yield draft(
        "en",
        (
            "List the action items of these minutes as a JSON array of objects with owner, task and due.\n"
            f"{owners[0]} will {tasks[0]} by {days[0]}. The new logo was liked by all. {owners[1]} will {tasks[1]} by "
            f"{days[1]}.",
            as_json(actions),
        ),
        (
            f"Keep only what {owners[1]} has to do, still as an array.",
            as_json(actions[1:]),
        ),
    )
    low = rng.randrange(2400, 3600, 100)
    record = {"position": rng.choice(("night baker", "lab assistant", "tram driver")), "city": rng.choice(CITIES)}
    record |= {"hours_per_week": rng.choice((20, 30, 38)), "pay_min": low, "pay_max": low + 400}
    yield draft(
        "en",
        (
            f"We're hiring a {record['position']} in {record['city']}, {record['hours_per_week']} hours a week, €{low} to "
            f"€{low + 400} a month depending on experience.",
            as_json(record),
        ),
        system=f"You index job advertisements. Output: a JSON object with {keys(record)}; numbers without currency.",
    )
    names = rng.sample(ZH_NAMES, 3)
    yield draft(
        "zh",
        (
            f"会议记录：{names[0]}主持，{names[1]}和{names[2]}参加，王总请假。请输出 JSON：主持人（字符串）、"
            "参加者（数组，不含主持人）。",
            as_json({"主持人": names[0], "参加者": names[1:]}),
        ),
    )
    size, rent = rng.randint(38, 95), rng.randrange(1800, 4200, 100)
    record = {"城市": rng.choice(ZH_CITIES), "面积": size, "月租": rent, "电梯": rng.random() < 0.5}
    yield draft(
        "zh",
        (
            f"租房信息：{record['城市']}市中心两居室，{size}平方米，月租{rent}元，{'有' if record['电梯'] else '没有'}电梯，近地铁。"
            "提取为 JSON：城市、面积（数字）、月租（数字）、电梯（true/false）。",
            as_json(record),
        ),
        (
            "房东说月租降200元，请更新。",
            as_json(record | {"月租": rent - 200}),
        ),
    )


def measurements(rng: Random) -> Iterator[Draft]:
    """Logs, weather and observations."""
    record: dict[str, Any] = {
        "level": rng.choice(("ERROR", "WARN")),
        "service": rng.choice(("mailer", "billing", "search")),
    }
    record |= {"time": clock(rng.randrange(1440)) + f":{rng.randint(10, 59)}", "retries": rng.randint(2, 7)}
    day = a_day(rng).isoformat()
    yield draft(
        "en",
        (
            f"{day} {record['time']} [{record['level']}] {record['service']}: timeout after {record['retries']} retries",
            as_json(record),
        ),
        system=f"Each user message is one log line. Parse it to JSON with {keys(record)}. Nothing else.",
    )
    low, high = rng.randint(-8, 3), rng.randint(5, 14)
    record = {"city": rng.choice(CITIES), "low_c": low, "high_c": high, "rain_mm": rng.randint(1, 30) / 10}
    yield draft(
        "en",
        (
            f'"{record["city"]} tomorrow: between {abs(low)} {"below zero" if low < 0 else "above zero"} and {high} degrees '
            f'Celsius, with {record["rain_mm"]} mm of rain." JSON please: {keys(record)}.',
            as_json(record),
        ),
    )
    birds = dict(zip(rng.sample(("heron", "wren", "jay", "coot", "robin"), 3), rng.sample(range(1, 9), 3), strict=True))
    told = ", then ".join(f"{name} ×{count}" for name, count in birds.items())
    record = {"species": list(birds), "total_birds": sum(birds.values())}
    yield draft(
        "en",
        (
            f"My notes from the pond: {told}. Give me JSON with species (a list, in the order seen) and total_birds (the "
            "sum).",
            as_json(record),
        ),
    )
    record = {
        "车牌": f"测A{rng.randint(10000, 99999)}",
        "里程": rng.randrange(12000, 90000, 500),
        "油量": rng.randint(10, 55),
    }
    yield draft(
        "zh",
        (
            f"车辆交接：车牌{record['车牌']}，里程{record['里程']}公里，剩余油量{record['油量']}升。",
            as_json(record),
        ),
        system="你为租车公司录入数据。把用户的话变成 JSON：车牌、里程、油量，后两项为数字。",
    )
    temps = [rng.randint(10, 30) for _ in range(3)]
    yield draft(
        "zh",
        (
            f"东、中、西三个温室的温度分别是{temps[0]}、{temps[1]}、{temps[2]}度。用 JSON 写出：东、中、西、最高。",
            as_json({"东": temps[0], "中": temps[1], "西": temps[2], "最高": max(temps)}),
        ),
    )


def shelves(rng: Random) -> Iterator[Draft]:
    """Books, recipes, products and reviews."""
    year = rng.randint(1960, 2020)
    record: dict[str, Any] = {
        "title": rng.choice(("The Salt Road", "Glass Orchard", "Nine Winters")),
        "author": person(rng),
    }
    record |= {"year": year, "pages": rng.randint(140, 620)}
    yield draft(
        "en",
        (
            f"Catalogue entry: {record['author']}: {record['title']}. {year}. {record['pages']} p., hardback. Give {keys(record)} "
            "in JSON.",
            as_json(record),
        ),
    )
    record = {"product": rng.choice(("blender", "rucksack", "headset")), "stars": rng.randint(2, 4)}
    record |= {
        "pros": ["light", "quiet"],
        "cons": ["short cable"] if record["product"] != "rucksack" else ["stiff zip"],
    }
    if record["product"] == "rucksack":
        record["pros"] = ["light", "dry inside"]
    yield draft(
        "en",
        (
            f"{record['stars']} of 5 stars for this {record['product']}. Good: {record['pros'][0]}, {record['pros'][1]}. Bad: "
            f"{record['cons'][0]}. -- Summarise this review as JSON: {keys(record)} (the last two are lists).",
            as_json(record),
        ),
    )
    record = {"dish": rng.choice(("lentil soup", "onion tart", "rice pudding")), "serves": rng.randint(2, 6)}
    prep, cook = rng.randrange(10, 25, 5), rng.randrange(25, 60, 5)
    record |= {"prep_min": prep, "cook_min": cook, "total_min": prep + cook}
    yield draft(
        "en",
        (
            f"{record['dish'].capitalize()}, serves {record['serves']}. Preparation {prep} min, cooking {cook} min.\n\nFields: "
            f"{keys(record)} (add up the two times). Format: JSON.",
            as_json(record),
        ),
    )
    record = {"plant": rng.choice(("basil", "thyme", "sage")), "bed": rng.choice("ABCD"), "rows": rng.randint(2, 7)}
    sown = date(2025, rng.randint(3, 5), rng.randint(1, 30))
    record["sown"] = sown.isoformat()
    yield draft(
        "en",
        (
            f"Garden diary, {in_words(sown)}: sowed {record['rows']} rows of {record['plant']} in bed {record['bed']}. Structure "
            "this as JSON with plant, bed, rows and sown (ISO date).",
            as_json(record),
        ),
    )
    record = {
        "书名": rng.choice(("山里的灯", "海边日记", "雨巷旧事")),
        "作者": rng.choice(ZH_NAMES),
        "借期": rng.choice((14, 21, 30)),
    }
    yield draft(
        "zh",
        (
            f"借阅单：{record['作者']}著《{record['书名']}》，借期{record['借期']}天。请转成 JSON（书名、作者、借期）。",
            as_json(record),
        ),
    )


KINDS: tuple[Kind, ...] = (invoices, orders, appointments, journeys, events, offices, measurements, shelves)
