"""Clean conversations and known faults of every rule, in English and Chinese, made from seeds that a person wrote.

`clean_rows()` has over 1,000 sound conversations, many of which look like a fault and are none; `FAULTS[rule](i, rng)`
makes the i-th fault of a rule, in another form for each i.
"""

import json
import random
import string
from collections.abc import Callable, Iterator
from typing import Any

Row = dict[str, Any]

EN = {
    "photosynthesis": "Plants take up carbon dioxide through small pores in their leaves. Light drives a chain of reactions in the chloroplasts. Water is split, and oxygen leaves as waste. The sugar that remains feeds the rest of the plant.",
    "the French Revolution": "Bread prices had doubled in the years before 1789. The third estate paid most of the taxes and had little say. The storming of the Bastille became its symbol. Within ten years a general ruled the country.",
    "sourdough bread": "A starter of flour and water catches wild yeast from the air. It needs feeding once or twice a day. Slow fermentation gives the loaf its sour taste. A hot oven with steam makes the crust crackle.",
    "black holes": "When a massive star runs out of fuel, its core collapses. Nothing that crosses the horizon can come back. Matter that falls in heats up and shines in X-rays. Astronomers have seen them merge by listening to gravitational waves.",
    "remote work": "Many people save an hour of travel each day. Meetings need an agenda, or they eat the whole morning. New colleagues learn more slowly without a neighbour to ask. A quiet room with a door helps more than any software.",
    "coral reefs": "Corals are animals that live together with algae. Warm water makes them expel their partners and turn white. A reef shelters a quarter of all fish species. Recovery takes decades if the heat comes back too often.",
    "compound interest": "Money that stays invested earns interest on its interest. Over thirty years the last ten bring the most. Fees work the same way, only against you. Starting early matters more than picking the best fund.",
    "chess openings": "Control of the centre decides where pieces can go. Knights usually come out before bishops. Castling brings the king to safety and a rook into play. Learning ideas is worth more than learning moves by heart.",
    "the immune system": "White blood cells patrol the body day and night. Some of them remember germs they met years ago. A fever makes life harder for bacteria. Vaccines show the body a harmless picture of its enemy.",
    "urban gardening": "Tomatoes grow well in a bucket with a hole in it. A balcony that faces south gets the most sun. Mulch keeps the soil moist in August. Bees visit even the tenth floor if something blooms there.",
    "machine learning": "A model adjusts its weights until its errors shrink. Data that resembles the real task is worth more than a clever design. A held-out set shows whether it has learnt or memorised. Simple baselines often come surprisingly close.",
    "volcanoes": "Magma rises because it is lighter than the rock around it. Gas that cannot escape makes an eruption violent. Ash can stop air traffic over a whole continent. The soil that forms afterwards is among the most fertile on earth.",
    "jazz": "Improvisation over a known song lies at its heart. Musicians listen to each other more than they look at notes. Swing means that the eighth notes are not quite even. Clubs in New Orleans and Chicago shaped its early sound.",
    "public libraries": "Anyone may come in and stay warm for a day. Lending books is only a part of what they do. Children who visit often read earlier. A good librarian knows what you want before you do.",
    "electric cars": "A battery of sixty kilowatt hours lasts for about four hundred kilometres. Cold weather cuts that by a third. Charging at night is cheapest in most places. There are far fewer moving parts that can wear out.",
    "the Roman aqueducts": "Water flowed downhill for dozens of kilometres without any pump. The slope was often less than one metre in three thousand. Arches carried the channel over valleys. Some of them still supply fountains today.",
    "meditation": "Attention returns to the breath again and again. Ten minutes a day are enough to start with. Thoughts are noticed and let go. Many people sleep better after a few weeks.",
    "honeybees": "A worker tells others the way to flowers by dancing. The queen lays up to two thousand eggs a day. In winter they huddle and shiver to keep warm. A jar of honey takes visits to two million blossoms.",
    "tea": "Green and black leaves come from the same shrub. Oxidation turns them dark and strong. Water that is too hot makes a green brew bitter. In the mountains of Yunnan some trees are eight hundred years old.",
    "bridges": "A beam bends, an arch pushes and a cable pulls. Wind brought down a famous span in 1940. Engineers test small models in tunnels today. Paint keeps the steel from rusting and is renewed all year round.",
    "sleep": "The brain clears away waste while we rest. Deep phases come early in the night, dreams later. Blue light in the evening delays the inner clock. Adults do best with seven to nine hours.",
    "glaciers": "Snow that outlasts the summer turns into ice under its own weight. The ice flows like thick honey. Moraines show how far it once reached. Most of them have lost length every year since 1990.",
    "negotiation": "Ask what the other side needs before you say what you want. A good alternative gives you calm. Silence after an offer is hard to bear and often works. Write down what was agreed on the same day.",
    "running": "Most of the training should be slow enough to talk. Shoes last for about eight hundred kilometres. Strength work protects the knees. A rest day is a part of the plan, not a hole in it.",
    "the printing press": "Movable letters made books a hundred times cheaper. Within fifty years there were presses in two hundred towns. Ideas spread faster than any censor could follow. Spelling slowly became the same everywhere.",
    "databases": "An index finds a row without reading the whole table. Transactions make sure that money does not vanish halfway. Backups that nobody has restored are only a hope. Normal forms keep each fact in one place.",
    "whales": "They breathe air and nurse their young. A blue one has a heart as heavy as a small car. Songs travel for hundreds of kilometres under water. Hunting nearly ended them a century ago.",
    "cheese": "Rennet makes milk curdle into solid and liquid. Salt draws out water and keeps bad germs away. Caves give a steady, damp climate. Time does the rest, from two weeks to three years.",
    "the water cycle": "The sun lifts water from the sea. Clouds carry it over the land. Rain sinks into the ground or runs into rivers. A drop may wait a week or ten thousand years for its next journey.",
    "typography": "Serifs guide the eye along the line. Sixty letters in a line are comfortable to read. White space says what belongs together. Two typefaces on a page are nearly always enough.",
}  # fmt: skip
ZH = {
    "长城": "长城最早修建于春秋战国时期。秦始皇把各国的城墙连接起来。现在我们看到的大部分是明代修筑的。它的总长度超过两万公里。",
    "端午节": "端午节在农历五月初五。人们在这一天包粽子、赛龙舟。传说这个节日是为了纪念诗人屈原。孩子们还会佩戴装有草药的香囊。",
    "区块链": "区块链是一种分布式账本。每个区块都记录着前一个区块的摘要。想要篡改数据就必须改动后面所有的区块。它的缺点是速度慢、耗电多。",
    "中医": "中医强调人体是一个整体。望闻问切是四种诊断方法。药材往往要互相搭配才能使用。针灸在很多国家已经得到认可。",
    "高铁": "高铁的时速可以达到三百五十公里。轨道必须铺设得非常平直。乘客在车上几乎感觉不到晃动。短途旅行时它比飞机更加方便。",
    "大熊猫": "大熊猫主要生活在四川和陕西的山林里。它们每天要花十几个小时吃竹子。刚出生的幼崽只有一百克左右。保护区的建立让野外数量逐渐回升。",
    "书法": "写字之前先要把墨磨匀。握笔时手腕应当放松。楷书讲究端正，草书追求流动。临摹古人的碑帖是入门的好办法。",
    "茶文化": "绿茶不经过发酵，味道清新。泡茶的水温不宜过高。好的紫砂壶能让茶香更加持久。朋友来访时主人总会先敬上一杯。",
    "人工智能": "人工智能的发展离不开数据和算力。深度学习让图像识别的准确率大幅提高。模型也会犯错，需要人来检查。如何保护隐私是一个重要的问题。",
    "垃圾分类": "可回收物包括纸张、塑料和金属。厨余垃圾可以用来堆肥。电池要投放到专门的箱子里。分类做得好可以减少填埋的数量。",
    "太极拳": "太极拳的动作缓慢而连贯。练习时呼吸要自然。长期坚持可以改善平衡能力。公园里清晨常有老人一起打拳。",
    "月球": "月球总是以同一面朝向地球。它的引力引起了海水的涨落。表面布满大小不一的环形山。嫦娥五号带回了将近两公斤的土壤。",
    "火锅": "四川火锅以麻辣闻名。牛肉烫十几秒就可以吃了。北方人更喜欢清汤和芝麻酱。冬天围着锅子聊天最暖和。",
    "电子商务": "网上购物节省了大量的时间。物流的速度决定了顾客的满意程度。直播带货是近几年流行起来的方式。退货政策一定要写得清清楚楚。",
    "唐诗": "李白的诗豪放洒脱。杜甫更关心百姓的疾苦。五言绝句只有二十个字。很多名句至今仍然挂在人们嘴边。",
    "血压": "成年人的正常血压低于一百二十比八十。少吃盐对控制血压很有帮助。测量之前应该安静地坐五分钟。药物不能随意停用。",
    "苏州园林": "苏州园林善于在小空间里造出大景致。假山和水池是必不可少的元素。窗户本身就像一幅画框。拙政园是其中最有名的一座。",
    "量子计算": "量子比特可以同时处于两种状态。它对温度和噪声极其敏感。某些问题的求解速度会大大加快。离真正普及还有很长的路要走。",
    "养猫": "猫每天要睡十二个小时以上。猫砂盆需要经常清理。剪指甲最好从小就开始习惯。疫苗要按照医生的安排接种。",
    "地铁": "早晚高峰时车厢非常拥挤。换乘之前可以先查看线路图。无障碍电梯一般设在站厅的两侧。最后一班车的时间各站并不相同。",
}  # fmt: skip
FR = ["La photosynthèse permet aux plantes de transformer la lumière du soleil en énergie, et elle libère de l'oxygène dans l'atmosphère.", "Les habitants de la ville se sont réunis sur la place pour discuter des nouvelles mesures proposées par la mairie.", "Il faut laisser reposer la pâte pendant une heure avant de la mettre au four, sinon elle ne lèvera pas correctement."]  # fmt: skip
DE = ["Die Pflanzen nehmen Kohlendioxid aus der Luft auf und wandeln es mit Hilfe des Sonnenlichts in Zucker um, von dem sie leben.", "Viele Menschen haben in den letzten Jahren gelernt, von zu Hause aus zu arbeiten, und möchten nicht mehr jeden Tag ins Büro.", "Der Teig muss eine Stunde lang ruhen, bevor er in den Ofen kommt, sonst geht das Brot nicht richtig auf und wird hart."]  # fmt: skip
ES = ["Las plantas absorben dióxido de carbono del aire y lo convierten en azúcares gracias a la energía de la luz del sol.", "Los vecinos del barrio se reunieron en la plaza para hablar de las nuevas medidas que propuso el ayuntamiento ayer.", "Hay que dejar reposar la masa durante una hora antes de meterla en el horno, porque si no el pan queda duro y seco."]  # fmt: skip
RU = ["Растения поглощают углекислый газ из воздуха и превращают его в сахар с помощью солнечного света.", "Перед тем как поставить тесто в печь, ему нужно дать отдохнуть в течение одного часа."]  # fmt: skip
JA = [
    "植物は太陽の光を使って、空気中の二酸化炭素から糖を作り出しています。",
    "パン生地は焼く前に一時間ほど休ませる必要があります。そうしないと固くなります。",
]


def talk(*turns: str, system: str | None = None, **more: Any) -> Row:
    """Turns of user and assistant by turns."""
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    return {"messages": messages, **more}


def sentences(topic: str) -> list[str]:
    if topic in ZH:
        return [s + "。" for s in ZH[topic].split("。") if s]
    return [s.rstrip(".") + "." for s in EN[topic].split(". ")]


EN_ASKS = ["Explain how {a} and {b} differ.", "Write a short text about {a} and {b}.", "What should a beginner know about {a}, and what about {b}?", "I am preparing a quiz on {a} and {b}; give me some facts.", "Tell me something about {a}. Then say a word on {b}.", "Could you summarise the main points of {a} and of {b} for my class?", "Which facts about {a} and {b} surprise people?", "Compare {a} with {b}, please."]  # fmt: skip
ZH_ASKS = ["请介绍一下{a}和{b}。", "{a}和{b}有什么特点？", "我想了解{a}，顺便也讲讲{b}吧", "写一段关于{a}与{b}的文字。", "给小学生讲讲{a}和{b}，要简单一点。"]  # fmt: skip


def answer_about(a: str, b: str, rng: random.Random, count: int = 2) -> str:
    joint = "" if a in ZH else " "
    parts = [joint.join(rng.sample(sentences(t), count)) for t in (a, b)]
    return ("\n\n" if rng.random() < 0.5 else joint).join(parts)


def pairs(rng: random.Random, *, zh: bool) -> list[tuple[str, str]]:
    names = list(ZH if zh else EN)
    found = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    rng.shuffle(found)
    return found


def plain(i: int, rng: random.Random) -> tuple[str, str, str, str]:
    """(prompt, answer, topic, topic) of the i-th plain question; every third is Chinese."""
    zh = i % 3 == 2
    of = PAIRS[zh]
    a, b = of[i % len(of)]
    asks = ZH_ASKS if zh else EN_ASKS
    return asks[(i + i // len(of)) % len(asks)].format(a=a, b=b), answer_about(a, b, rng), a, b


PAIRS = {zh: pairs(random.Random(7), zh=zh) for zh in (False, True)}
NAMES = ["Anna", "Ben", "Carla", "Deniz", "Emeka", "Farah", "Goran", "Hanna", "Ivo", "Jun", "Kofi", "Lena", "Mira"]
THINGS = ["apples", "tickets", "books", "marbles", "chairs", "lamps", "bricks", "coins", "stamps", "pencils"]


def hard(i: int, rng: random.Random) -> Row:
    """A sound conversation that looks like one with a fault."""
    n, m, k = rng.randint(12, 98), rng.randint(12, 98), rng.randint(2, 9)
    name, thing = NAMES[i % len(NAMES)], rng.choice(THINGS)
    zh, en = list(ZH)[i % len(ZH)], list(EN)[i % len(EN)]
    fact, zhfact = rng.choice(sentences(en)), rng.choice(sentences(zh))
    mac = ":".join(f"{rng.randint(0, 255):02x}" for _ in range(6))
    forms: list[Callable[[], Row]] = [
        lambda: talk(f"How do I declare a vector of {n} maps in C++?", f"```cpp\nstd::vector<std::map<std::string, int>> v({n});\nfor (const auto& m : v) {{ std::cout << m.size() << std::endl; }}\n```\nEach element starts out empty."),
        lambda: talk(f"Is {n} < {m} && {m} > {k} true?", f"Let us see: {n} < {m} is {str(n < m).lower()}, and {m} > {k} is {str(m > k).lower()}, so a && b is {str(n < m and m > k).lower()}."),
        lambda: talk(f"Write the HTML of a paragraph that says {fact!r} with the number {n}.", f"<p>{n}: {fact}</p>\n<br>\n<a href=\"#top\">Read more</a>"),
        lambda: talk(f"{name} has {n} {thing} and buys {m} more, then gives {k} away. How many are left?", f"{name} starts with {n} {thing}.\n{n} + {m} = {n + m}\n{n + m} - {k} = {n + m - k}\nThe answer is {n + m - k}"),
        lambda: talk(f"What is {n} times {m}?", str(n * m)),
        lambda: talk(f"Translate into Chinese: {fact} ({n})", f"{zhfact}（{n}）"),
        lambda: talk(f"把下面这句话翻译成英文：{zhfact}（{n}）", f"{fact} ({n})"),
        lambda: talk(f"Correct the grammar of this sentence: {fact.lower()} she have {n} {thing}", f"{fact} She has {n} {thing}."),
        lambda: talk(f"Who said this about {en}: {fact}", f"You quote \"{fact}\" That sentence is from a school book on {en}, printed in 18{n}, and not from a famous person."),
        lambda: talk(f"List {k} things to pack for a trip of {n} days.", "\n".join(f"{j}. {t}" for j, t in enumerate(rng.sample(["Passport", "Socks", "A rain coat", "Phone charger", "Sun cream", "A good book", "Water bottle", "Snacks", "First aid kit"], k), 1))),
        lambda: talk(f"列出{k}种适合{n}岁老人的运动", "\n".join(f"{j}、{t}" for j, t in enumerate(rng.sample(["散步", "太极拳", "游泳", "广场舞", "骑自行车", "瑜伽", "八段锦", "门球", "慢跑"], k), 1))),
        lambda: talk(f"Give me the ISBN and the price of the {n}th edition.", f"The ISBN is 978-3-{rng.randint(10, 99)}-{rng.randint(100000, 999999)}-{k}, order number {rng.randint(10**5, 10**6 - 1)}, printed 20{n % 25:02d}-0{k}-1{k}. It costs {n}.99 dollars, and {rng.randint(10**3, 10**4)} copies were sold."),
        lambda: talk(f"When did build {n} come out, and in which version?", f"Build {rng.randint(10**9, 10**10 - 1)} came out as version {k}.{n % 10}.{m % 10}.{k} on 2023-1{k % 3}-{n % 28 + 1:02d} at 12:{n % 60:02d}:{m % 60:02d}."),
        lambda: talk(f"What is the private address of printer {n} in our office?", f"It is 192.168.{n}.{m}, its MAC is {mac}, and the mask is 255.255.255.0. Write to support@example.com if it is out of paper."),
        lambda: talk(f"圆周率的前{n}位里有没有{m}？", f"3.14159265358979323846264338327950288419716939937510，其中可以找到很多两位数，{m}要在更后面的位数里查找。"),
        lambda: talk(f"Write a two-line poem about {en} for {name}, number {n}.", f"O {en}, my quiet friend,\nI sing of you from start to end"),
        lambda: talk(f"Write a letter that thanks {name} for {n} {thing}.", f"Dear {name},\n\nThank you very much for the {n} {thing}. They arrived on Monday, and the children were delighted with them. We hope to see all of you in the summer, when the garden is at its best.\n\nBest regards,\nThe Miller family"),
        lambda: talk(f"Give me {name}'s order as JSON: {n} {thing}.", json.dumps({"name": name, "items": [{"what": thing, "count": n}], "note": "a [b {c"})),
        lambda: talk(f"Show a table of {thing} with {n} and {m}.", f"| {thing} | count |\n|---|---|\n| first | {n} |\n| second | {m} |"),
        lambda: talk(f"How does an AI engineer test a model with {n} layers?", f"As an AI engineer, you cannot test everything. Start with a tiny batch of {k} rows, check that the loss falls, and only then go on to all {n} layers. I am an engineer myself and do the same."),
        lambda: talk(f"Write an apology to {name}: I cannot come at {k} o'clock on the {n % 28 + 1}th.", f"Dear {name}, I'm sorry, but I can't come at {k} o'clock on the {n % 28 + 1}th, because my train is late. Could we meet an hour later?"),
        lambda: talk(f"Who are you, assistant number {n}?", f"I am an AI assistant, and my number is {n}. I can answer questions, write texts and help you with code. What would you like to do today?"),
        lambda: talk(f"How do I send form {n}?", f"Open the page, choose form {n} and click the green button below it. You can read more books on the topic in the library, and share this plan with your colleagues."),
        lambda: talk(f"Sing me the song of the {n} {thing}.", f"{n} green {thing} are hanging on the wall,\n{n} green {thing} are hanging on the wall,\nand if one of the {thing} should happen to fall,\nthere'll be {n - 1} green {thing} hanging on the wall."),
        lambda: talk(f"Print a {k} by 9 matrix of zeros for case {n}.", "\n".join(["0 0 0 0 0 0 0 0 0"] * k)),
        lambda: talk(f"Write a function that multiplies by {n} and adds {m}.", f"def f(x):\n    y = x * {n}\n    y = y + {m}\n    return y"),
        lambda: talk(f"Comment le mot « café » se prononce-t-il, numéro {n} ?", f"Il se prononce /ka.fe/, avec un accent aigu. La forme « Noël » a un tréma. C'est l'exemple {n}."),
        lambda: talk(f"Was heißt „Größe {n}“ auf der Jacke?", f"Die Größe {n} entspricht ungefähr einem Brustumfang von {m + 50} cm; für schmale Schultern wähle man eine Nummer kleiner."),
        lambda: talk(f"What does the symbol for case {n} mean: A or B, > or <?", rng.choice([">", "<", "A", "B", "=", "Yes", "42", "?"])),
        lambda: talk(f"用Python写一个函数，把列表里的每个数都乘以{n}", f"```python\ndef scale(xs):\n    return [x * {n} for x in xs]\n```"),
        lambda: talk(f"What's the weather in {['Oslo', 'Rome', 'Lima', 'Cairo'][k % 4]} on day {n}?", "It is sunny.", f"And on day {m}?", "Rain, with some wind in the evening.", system="You are a weather service."),
        lambda: talk(f"哈哈，你说的第{n}个笑话太好笑了", "哈哈哈，谢谢夸奖！还想再听一个吗？", f"好啊，来第{m}个", f"从前有{k}只小鸭子，它们排着队过马路，最后一只总是慢半拍。"),
        lambda: talk(f"How much is {n} million divided by {k}?", f"{n},000,000 / {k} = {n * 10**6 / k:,.2f}, roughly {n * 10**6 // k}."),
        lambda: talk(f"What are you looking for in batch {n}, and where do they come from?", f"I would like to know what batch {n} is made of and what it is for"),
        lambda: talk(f"What is {zh} in English, item {n}?", f"The word {zh} is about this: {fact} It is item {n} of the list."),
    ]  # fmt: skip
    return forms[i % len(forms)]()


def clean_rows(count: int = 1225) -> list[Row]:
    """Sound rows: plain questions, longer talks, and those that look like faults; no two are alike."""
    rng = random.Random(20)
    rows: list[Row] = []
    for i in range(count - 525):
        prompt, answer, a, _ = plain(i, rng)
        if i % 10 == 9:
            rows.append(
                talk(
                    prompt,
                    answer,
                    "谢谢！" if a in ZH else "Thank you, that helps!",
                    "不客气，祝你一切顺利。" if a in ZH else f"You are welcome. Come back when you need more on {a}.",
                )
            )
        elif i % 10 == 4:
            rows.append(
                talk(prompt, answer, system="你是一个乐于助人的助手。" if a in ZH else "You are a helpful assistant.")
            )
        else:
            rows.append(talk(prompt, answer))
    asked = set()
    for i in range(10 * count):
        row = hard(i, rng)
        if len(rows) < count and str(row["messages"][:-1]) not in asked:
            asked.add(str(row["messages"][:-1]))
            rows.append(row)
    return [{"id": f"clean-{i}", **row} for i, row in enumerate(rows)]


def roles(i: int, rng: random.Random) -> Row:
    prompt, answer, _, _ = plain(i + 3, rng)
    user, assistant = {"role": "user", "content": prompt}, {"role": "assistant", "content": answer}
    more = {"role": "user", "content": ["And then?", "还有呢？", "Please go on.", "Why is that?"][i % 4]}
    system = {"role": "system", "content": "You are helpful."}
    return {"messages": [[user, more, assistant], [assistant, user, assistant], [user, assistant, system, more, assistant], [user, assistant, more], [system, assistant, user, assistant], [user, system, assistant], [user, assistant, more, more, assistant], [system, user, assistant, more]][i % 8]}  # fmt: skip


def empty_answer(i: int, rng: random.Random) -> Row:
    prompt, answer, _, _ = plain(i, rng)
    said = ["", " ", "\n\n", "...", "\u200b", "null", "NaN", "<noinput>", "```\n```", "。", "- ", "**", "\u3000\u3000", "……", '""', "—", "N.A.N"[:0], "\ufeff", "<no output>", "undefined"][i % 20]  # fmt: skip
    return talk(prompt, said) if i % 3 else talk(prompt, answer, "Go on." if prompt.isascii() else "继续", said)


def repeats_prompt(i: int, rng: random.Random) -> Row:
    prompt, answer, _, _ = plain(i, rng)
    if len(prompt) < 30:  # longer, as a prompt that is worth repeating
        prompt += (
            " 请用两三句话说明，不要太长。" if "一" in prompt or "和" in prompt else " Use two or three sentences."
        )
    forms = [prompt, prompt + "\n" + answer, prompt.upper(), f"Question: {prompt}\nAnswer: {answer}", f"“{prompt}”\n\n{answer}", prompt.replace(" ", "  ").rstrip(".?。？") + "!", f"User: {prompt}\n{answer}", f"{prompt} {prompt}", f"问题：{prompt}\n{answer}", f"**Q:** {prompt}\n\n{answer}", prompt.rstrip(".?。？") + "\n\n" + answer, f"### Instruction: {prompt}\n{answer}"]  # fmt: skip
    return talk(prompt, forms[i % len(forms)])


def mojibake(i: int, rng: random.Random) -> Row:
    prompt, answer, _, _ = plain(i, rng)
    zh = rng.choice(sentences(list(ZH)[i % len(ZH)]))
    curly = answer.replace("'", "’").replace(". ", " – ", 1) + " It’s “fine”, at 20° in a café."

    def misread(text: str, right: str, wrong: str) -> str:
        return text.encode(right).decode(wrong, "replace")

    forms = [lambda: misread(curly, "utf-8", "cp1252"), lambda: misread(zh, "utf-8", "latin-1"), lambda: misread(zh, "utf-8", "gb18030"), lambda: misread(zh, "gb2312", "latin-1"), lambda: answer[:40] + "\ufffd" + answer[41:], lambda: answer + "锟斤拷锟斤拷", lambda: misread(rng.choice(RU), "utf-8", "cp1251"), lambda: misread("Ein schönes Café für Größe und Übermut.", "utf-8", "latin-1"), lambda: answer + " 烫烫烫烫", lambda: "ï»¿" + answer, lambda: misread("naïve résumé", "utf-8", "cp1252") + " " + answer, lambda: answer[:20] + "â€”" + answer[20:]]  # fmt: skip
    return talk(prompt, forms[i % len(forms)]())


def cut_off(i: int, rng: random.Random) -> Row:
    zh = i % 3 == 2
    a, b = PAIRS[zh][i % len(PAIRS[zh])]
    prompt = (ZH_ASKS if zh else EN_ASKS)[i % 5].format(a=a, b=b)
    long = ("\n\n" if i % 2 else "" if zh else " ").join(
        ("" if zh else " ").join(rng.sample(sentences(t), 4)) for t in (a, b)
    )
    n = rng.randint(3, 99)
    form = (i // 3) % 8
    if form == 0:
        return talk(prompt, long + f"\n\n```python\ndef f(x):\n    for i in range({n}):\n        x +=")
    if form == 1:
        return talk(
            "As JSON, please: " + prompt,
            json.dumps({"topic": a, "n": n, "facts": sentences(a)}, ensure_ascii=False, indent=i % 2 or None)[
                : -rng.randint(1, 40)
            ],
        )
    if form == 2:
        return talk(prompt, long.rstrip(".。") + ("，" if zh else ","))
    if form == 3:
        return talk(prompt, "\n".join(f"{j}. {s}" for j, s in enumerate(sentences(a), 1)) + "\n5.")
    if form == 4:
        return talk(prompt, f"| {a} | n |\n|---|---|\n| one | {n} |\n| two")
    if form == 5:
        return talk(
            prompt,
            long
            + (
                "最后，因为上面提到的这些原因以及很多没有讲到的方面，例如" if zh else f" In the end this is why {b} and"
            ),
        )
    if form == 6:
        return talk(prompt, long + ("\n下面列出更多的内容：" if zh else "\nHere is the rest of the list of facts:"))
    at = int(len(long) * rng.uniform(0.75, 0.95))
    while not (long[at - 1].isalpha() and (long[at].isalpha() if zh else long[at] == " ")):
        at -= 1
    return talk(prompt, long[:at])


def loops(i: int, rng: random.Random) -> Row:
    prompt, answer, a, _ = plain(i, rng)
    zh = a in ZH
    line = rng.choice(sentences(a))
    short = rng.choice(
        ["是的", "非常好", "我不知道", "重要的"] if zh else ["I am sorry", "very good", "the the", "and so on"]
    )
    joint = "" if zh else " "
    forms = [answer + joint + joint.join([line] * rng.randint(5, 12)), answer + "\n" + "\n".join([line] * rng.randint(4, 9)), joint.join([short] * rng.randint(12, 40)), answer + joint + ("哈" if zh else "a") * rng.randint(25, 90), joint.join([line, sentences(a)[0]] * 6), answer + joint + joint.join([("好" if zh else "really")] * rng.randint(12, 30)), "\n".join([f"- {line}"] * 6), ("\n\n").join([line] * 7), answer[:60] + joint + joint.join([line[: len(line) // 2]] * 9)]  # fmt: skip
    return talk(prompt, forms[i % len(forms)])


def markup(i: int, rng: random.Random) -> Row:
    prompt, answer, _, _ = plain(i, rng)
    one, two = answer[: len(answer) // 2], answer[len(answer) // 2 :]
    forms = [f"<p>{answer}</p>", f"{one}<br>{two}", f"{one}<br/>{two}", f"{one}&nbsp;{two}", f"<div class=\"body\">{answer}</div>", f"{one} &amp; {two}", f"<b>{one}</b>{two}", f"{one}<a href=\"http://x.org/a\">{two}</a>", f"<ul><li>{one}</li><li>{two}</li></ul>", f"{one}&#39;s {two}", f"<h2>Answer</h2>\n{answer}", f"{one}&quot;{two}&quot;", f"<span style='color:red'>{one}</span>{two}", f"{answer}</p>", f"<strong>{one}</strong> {two}", f"{one}<sup>2</sup>{two}", f"{one}&lt;{two}&gt;", f"<IMG SRC=\"a.png\">{answer}"]  # fmt: skip
    return talk(prompt, forms[i % len(forms)])


BOILER_EN = ["Click here to learn how.", "Read more »", "Share this:", "Share this post", "We use cookies to improve your experience.", "Accept all cookies", "Subscribe to our newsletter for more.", "Follow us on Facebook!", "© 2021 Green Media Ltd. All rights reserved.", "Skip to content", "Back to top", "Leave a comment", "Related posts:", "This website uses cookies.", "Continue reading →", "Read more", "Copyright 2019 The Daily News", "Posted in Science", "[Read more]", "Sign up for our newsletter today.", "Learn more »", "For the full list click here.", "Advertisement"]  # fmt: skip
BOILER_ZH = ["点击这里查看更多", "阅读全文", "分享到：微信", "版权所有，未经许可不得转载。", "扫码关注我们", "欢迎关注公众号“科学之声”。", "责任编辑：王芳", "上一篇：旅行", "相关推荐：", "本网站使用cookie来改善体验。", "点击查看原文", "来源：新华网", "转发到朋友圈", "展开全文", "订阅我们的频道"]  # fmt: skip


def boilerplate(i: int, rng: random.Random) -> Row:
    prompt, answer, a, _ = plain(i, rng)
    said = BOILER_ZH[i % len(BOILER_ZH)] if a in ZH else BOILER_EN[i % len(BOILER_EN)]
    return talk(
        prompt,
        f"{said}\n{answer}"
        if i % 4 == 0
        else f"{answer}\n\n{said}"
        if i % 4 < 3
        else f"{answer}\n{said}\n{answer[:30]}",
    )


REFUSE_EN = ["As an AI language model, I cannot {x}.", "I'm sorry, but as an AI I don't have personal opinions on {x}.", "I'm sorry, but I can't assist with that request about {x}.", "As an AI assistant, I am not able to say anything on {x}.", "I am an AI language model and do not have access to {x}.", "I apologize, but I am unable to provide information on {x}.", "As a language model, I do not have feelings about {x}.", "I cannot fulfill this request concerning {x}.", "Unfortunately, I cannot help with {x}.", "I'm just an AI, so I can't experience {x}.", "As a large language model trained by Acme, I lack the ability to judge {x}.", "Sorry, I can’t comply with this: {x}.", "I am unable to provide advice on {x}.", "As an artificial intelligence, I am incapable of {x}."]  # fmt: skip
REFUSE_ZH = ["作为一个AI语言模型，我无法谈论{x}。", "很抱歉，我无法回答关于{x}的问题。", "对不起，我不能提供{x}方面的帮助。", "作为人工智能助手，我没有关于{x}的个人看法。", "我是一个AI语言模型，无法体验{x}。", "抱歉，作为语言模型，我不能评价{x}。", "我只是一个人工智能，没有办法判断{x}。", "不好意思，这个问题我没办法回答，因为涉及{x}。", "作为一款大语言模型，我不具备了解{x}的能力。", "很遗憾，我无法满足您对{x}的请求。", "我无法提供您想要的{x}内容。"]  # fmt: skip


def refusal(i: int, rng: random.Random) -> Row:
    prompt, answer, a, _ = plain(i, rng)
    said = (REFUSE_ZH if a in ZH else REFUSE_EN)[i % (11 if a in ZH else 14)].format(x=a)
    return talk(prompt, said if i % 2 else f"{said} {answer}" if i % 4 == 0 else f"{answer} {said}")


def wrong_language(i: int, rng: random.Random) -> Row:
    zh = list(ZH)[i % len(ZH)]
    prompt, _, _, _ = plain(i, rng)
    en_pair, zh_pair = PAIRS[False][i % 400], PAIRS[True][i % 190]
    forms = [lambda: talk(EN_ASKS[i % 8].format(a=en_pair[0], b=en_pair[1]), answer_about(*zh_pair, rng)), lambda: talk(ZH_ASKS[i % 5].format(a=zh_pair[0], b=zh_pair[1]), answer_about(*en_pair, rng)), lambda: talk(prompt, rng.choice(RU)), lambda: talk(f"请告诉我怎么学习{zh}，第{i}次问你了", rng.choice(JA)), lambda: talk(EN_ASKS[i % 8].format(a=en_pair[0], b=en_pair[1]), rng.choice(JA) + rng.choice(JA))]  # fmt: skip
    return forms[i % len(forms)]()


def wrong_language_by_model(i: int, rng: random.Random) -> Row:
    a, b = PAIRS[False][i % 400]
    if i % 2:
        prompt = f"{EN_ASKS[i % 8].format(a=a, b=b)} I have read that this is true: {rng.choice(sentences(a))} Is there more to it than that?"
        return talk(prompt, " ".join(rng.sample([FR, DE, ES][i % 3], 2)))
    other = [FR, DE, ES][i % 3]
    return talk(f"{rng.choice(other)} {['Pourquoi', 'Warum', 'Por qué'][i % 3]}?", answer_about(a, b, rng))


def words(i: int, rng: random.Random) -> Row:
    prompt, answer, a, _ = plain(i, rng)
    bad = (
        ["大坏蛋", "臭东西"]
        if a in ZH
        else ["Blockhead", "blockhead", "BLOCKHEAD", "rotten egg", "Rotten  Egg", "twit"]
    )
    word = bad[i % len(bad)]
    said = f"{answer[: len(answer) // 2]} {word}! {answer[len(answer) // 2 :]}"
    return talk(f"{prompt} {word}", answer) if i % 3 == 0 else talk(prompt, said)


def short_answer(i: int, rng: random.Random) -> Row:
    prompt, answer, _, _ = plain(i, rng)
    return talk(prompt, answer[: i % 12]) if i % 2 else talk(prompt, answer * rng.randint(100, 120))


def personal(i: int, rng: random.Random) -> Row:
    """All kinds by turns; `KIND[i]` says which."""
    zh = i % 2 == 1
    kind, value = KINDS_OF_DATA[i % len(KINDS_OF_DATA)]
    said = value(rng)
    prompt, answer, _, _ = plain(i, rng)
    forms = (["请记录：{}，谢谢。", "联系方式是 {} ，请保存。", "资料如下：{}"] if zh else ["You can note it down: {}.", "It is {} as far as I know.", "Here you are ({}), keep it safe.", "Value: {}"])  # fmt: skip
    text = forms[i % len(forms)].format(said)
    return {
        **(talk(prompt, f"{answer} {text}") if i % 3 else talk(f"{prompt} {text}", answer)),
        "kind": kind,
        "value": said,
    }


def digits(rng: random.Random, count: int) -> str:
    return "".join(rng.choice(string.digits) for _ in range(count))


def check_digit_by_search(
    rng: random.Random, make: Callable[[str], str], is_right: Callable[[str], bool], ends: str
) -> str:
    """A number with a right check digit: `make` draws it, `ends` are the characters it may end with."""
    while True:
        body = make("")
        for end in ends:
            if is_right(body + end):
                return body + end


def card(rng: random.Random) -> str:
    number = rng.choice(["4", "51", "55", "2221"])
    number += digits(rng, 15 - len(number))
    total = sum(int(d) if i % 2 else sum(map(int, str(2 * int(d)))) for i, d in enumerate(number))
    number += str(-total % 10)
    return rng.choice(["{}{}{}{}", "{} {} {} {}", "{}-{}-{}-{}"]).format(*(number[k : k + 4] for k in range(0, 16, 4)))


def iban(rng: random.Random) -> str:
    country, length = rng.choice([("DE", 22), ("FR", 27), ("ES", 24), ("CH", 21), ("NL", 18), ("AT", 20)])
    body = ("ABNA" if country == "NL" else "") + digits(rng, length - 4 - 4 * (country == "NL"))
    number = int("".join(str(int(c, 36)) for c in body + country + "00"))
    whole = f"{country}{98 - number % 97:02d}{body}"
    return whole if rng.random() < 0.5 else " ".join(whole[k : k + 4] for k in range(0, length, 4))


def cn_id(rng: random.Random) -> str:
    body = f"{rng.choice(['110105', '310104', '440305', '510107'])}{rng.randint(1940, 2010)}{rng.randint(1, 12):02d}{rng.randint(1, 28):02d}{digits(rng, 3)}"
    total = sum(int(c) * pow(2, 17 - k, 11) for k, c in enumerate(body))
    check = (12 - total % 11) % 11
    return body + ("X" if check == 10 else str(check))


def insee(rng: random.Random) -> str:
    body = f"{rng.choice('12')}{rng.randint(40, 99)}{rng.randint(1, 12):02d}{rng.randint(1, 19):02d}{digits(rng, 3)}{rng.randint(1, 999):03d}"
    key = 97 - int(body) % 97
    return (
        f"{body}{key:02d}"
        if rng.random() < 0.5
        else f"{body[0]} {body[1:3]} {body[3:5]} {body[5:7]} {body[7:10]} {body[10:]} {key:02d}"
    )


def cpf(rng: random.Random) -> str:
    number = [rng.randint(0, 9) for _ in range(9)]
    for count in (9, 10):
        rest = sum(d * w for d, w in zip(number, range(count + 1, 1, -1), strict=True)) % 11
        number.append(0 if rest < 2 else 11 - rest)
    text = "".join(map(str, number))
    return f"{text[:3]}.{text[3:6]}.{text[6:9]}-{text[9:]}"


def dni(rng: random.Random) -> str:
    number = rng.randint(10**7, 10**8 - 1)
    return f"{number}{rng.choice(['', '-', ' '])}{'TRWAGMYFPDXBNJZSQVHLCKE'[number % 23]}"


def de_tax(rng: random.Random) -> str:
    body = rng.sample("123456789", 9)
    body.insert(rng.randint(0, 9), rng.choice(body))
    product = 10
    for digit in body:
        product = ((int(digit) + product) % 10 or 10) * 2 % 11
    whole = "".join(body) + str((11 - product) % 10)
    return whole if rng.random() < 0.5 else f"{whole[:2]} {whole[2:5]} {whole[5:8]} {whole[8:]}"


def phone(rng: random.Random) -> str:
    d = lambda n: str(rng.randint(2, 9)) + digits(rng, n - 1)  # noqa: E731
    return rng.choice([f"+49 {rng.randint(30, 99)} {d(4)} {d(4)}", f"({d(3)}) {d(3)}-{d(4)}", f"{d(3)}-{d(3)}-{d(4)}", f"13{d(9)}", f"+86 139 {d(4)} {d(4)}", f"010-{d(8)}", f"07{d(3)} {d(6)}", f"+44 20 {d(4)} {d(4)}", f"06 {d(2)} {d(2)} {d(2)} {d(2)}", f"+33 6 {d(2)} {d(2)} {d(2)} {d(2)}", f"+1 {d(3)} {d(3)} {d(4)}", f"+1-{d(3)}-{d(3)}-{d(4)}", f"0171 {d(7)}", f"(11) 9{d(4)}-{d(4)}"])  # fmt: skip


def email(rng: random.Random) -> str:
    return f"{rng.choice(NAMES).lower()}{rng.choice(['.', '_', ''])}{rng.choice(['li', 'o-brien', 'smith', 'wang'])}{rng.choice(['', '88', '+news'])}@{rng.choice(['gmail.com', 'mail.uni-bonn.de', '163.com', 'web.co.uk', 'qq.com'])}"


def ipv4(rng: random.Random) -> str:
    return f"{rng.choice([54, 81, 91, 118, 203])}.{rng.randint(1, 254)}.{rng.randint(114, 254)}.{rng.randint(1, 254)}"


def ssn(rng: random.Random) -> str:
    return f"{rng.randint(100, 665):03d}-{rng.randint(1, 99):02d}-{rng.randint(1, 9999):04d}"


def nino(rng: random.Random) -> str:
    pair, d = rng.choice(["AB", "CE", "JG", "SK", "WP"]), digits(rng, 6)
    return f"{pair}{d}C" if rng.random() < 0.5 else f"{pair} {d[:2]} {d[2:4]} {d[4:]} A"


KINDS_OF_DATA = [("email", email), ("phone", phone), ("us_ssn", ssn), ("cn_id", cn_id), ("uk_nino", nino), ("de_tax_id", de_tax), ("fr_insee", insee), ("es_dni", dni), ("br_cpf", cpf), ("card", card), ("iban", iban), ("ipv4", ipv4), ("phone", phone)]  # fmt: skip


def near_duplicate(i: int, rng: random.Random, rows: list[Row]) -> Row:
    """A clean plain row again, with a few changes."""
    row = rows[i % 690]
    messages = [dict(m) for m in row["messages"]]
    text = messages[-1]["content"] if len(messages) < 4 else messages[1]["content"]
    at = -1 if len(messages) < 4 else 1
    zh = not text.isascii()
    parts = list(text) if zh else text.split(" ")
    k = rng.randrange(2, len(parts) - 2)
    forms = [lambda: text.upper(), lambda: text.replace(". ", " ; ").replace("。", "！"), lambda: ("" if zh else " ").join(parts[:k] + parts[k + 1 :]), lambda: text + (" 谢谢。" if zh else " Thanks!"), lambda: text.replace(" ", "  ").replace("，", ", "), lambda: ("" if zh else " ").join([*parts[:k], "也" if zh else "quite", *parts[k:]]), lambda: ("好的。" if zh else "Sure! ") + text, lambda: ("" if zh else " ").join([*parts[:k], "某" if zh else "other", *parts[k + 1 :]])]  # fmt: skip
    messages[at] = {**messages[at], "content": forms[i % 8]()}
    return {"messages": messages}


def benchmark(i: int) -> str:
    """The i-th prompt of a benchmark."""
    rng = random.Random(1000 + i)
    n, m, k = rng.randint(100, 999), rng.randint(100, 999), rng.randint(2, 30)
    name, other, thing = rng.choice(NAMES), rng.choice(NAMES), rng.choice(THINGS)
    if i % 3 == 2:
        return f"小{rng.choice('明红刚丽军华')}在第{k}天买了{n}个{rng.choice(['苹果', '杯子', '灯笼', '风筝'])}，又送给邻居{m}个，请问他最后一共还剩下多少个，应该怎样计算？"  # fmt: skip
    return f"At a fair in the town of {name}, {other} sells {n} {thing} on the first day and {m} on the second, and {k} of them are brought back later; how many {thing} were sold in the end?"


def leakage(i: int, rng: random.Random) -> Row:
    prompt, answer, _, _ = plain(i, rng)
    said = benchmark(i)
    cut = said[: int(len(said) * 0.8)]
    forms = [talk(said, answer), talk(f"{prompt}\n{said}", answer), talk(prompt, f"{answer}\n\n{said}"), talk(said.upper(), answer), talk(prompt, answer, said, answer), talk(f"Solve this:\n\n{said}\n\nThink step by step.", answer), talk(said.replace(",", " ,").replace("，", ","), answer), talk(cut, answer)]  # fmt: skip
    return forms[i % len(forms)]


FAULTS: dict[str, Callable[[int, random.Random], Row]] = {
    "roles": roles,
    "empty_answer": empty_answer,
    "repeats_prompt": repeats_prompt,
    "mojibake": mojibake,
    "cut_off": cut_off,
    "loops": loops,
    "markup": markup,
    "boilerplate": boilerplate,
    "refusal": refusal,
    "wrong_language": wrong_language,
    "length": short_answer,
    "words": words,
    "personal_data": personal,
    "leakage": leakage,
}


def faults(rule: str, make: Callable[[int, random.Random], Row], count: int = 200) -> Iterator[Row]:
    """`count` rows with the fault of a rule, each with an id that says so."""
    rng = random.Random(f"faults of {rule}")
    for i in range(count):
        yield {"id": f"{rule}-{i}", **make(i, rng)}
