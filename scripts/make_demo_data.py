"""Writes the demo's conversations, data/demo/{train,val,facts}.jsonl: `python scripts/make_demo_data.py [--out DIR]`.

Everything is computed here: small problems in English and Chinese with the reasoning that solves them. A problem family
is a function that draws numbers and computes the values which the texts of demo_problems.txt name. Same seed, same
files; standard library only.
"""

import argparse
import json
import random
from collections.abc import Callable, Iterator
from datetime import date, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

SEED = 20250120
TRAIN, VAL = 360, 40

Values = dict[str, Any]
Message = dict[str, Any]
Family = Callable[[random.Random, bool], Values]
Exchange = tuple[list[str], str, str]  # question forms, reasoning, answer

NAMES = ["Anna", "Ben", "Chloe", "David", "Emma", "Felix", "Grace", "Henry", "Iris", "Jack", "Kate", "Leo"]
NAMES_ZH = ["小明", "小红", "小李", "小王", "小张", "小芳", "小刚", "小丽", "小军", "小华"]
ITEMS = ["pens", "apples", "notebooks", "cups", "tickets", "lamps", "books", "balls"]
ITEMS_ZH = ["支铅笔", "个苹果", "本笔记本", "个杯子", "张门票", "盏台灯", "本书", "个皮球"]
WORDS = ["strawberry", "banana", "committee", "mississippi", "bookkeeper", "parallel", "occurrence", "balloon"]
WORDS += ["successful", "tomorrow", "possession", "coffee", "address", "accommodation", "necessary", "millennium"]
WORDS += ["engineering", "raccoon", "assessment", "llama", "tennessee", "statistics", "referee"]
UNITS = [("kilometre", "metre", "千米", "米", 1000), ("kilogram", "gram", "千克", "克", 1000)]
UNITS += [("hour", "minute", "小时", "分钟", 60), ("metre", "centimetre", "米", "厘米", 100)]
UNITS += [("day", "hour", "天", "小时", 24), ("litre", "millilitre", "升", "毫升", 1000)]
MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August"]
MONTHS += ["September", "October", "November", "December"]
WEEKDAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
WEEKDAYS_ZH = ["星期一", "星期二", "星期三", "星期四", "星期五", "星期六", "星期日"]
# Peru (Lima) is not among them: the demo asks for it too.
CAPITALS = [
    ("France", "Paris", "法国", "巴黎"),
    ("Japan", "Tokyo", "日本", "东京"),
    ("Germany", "Berlin", "德国", "柏林"),
]
CAPITALS += [
    ("Italy", "Rome", "意大利", "罗马"),
    ("Spain", "Madrid", "西班牙", "马德里"),
    ("Russia", "Moscow", "俄罗斯", "莫斯科"),
]
CAPITALS += [
    ("Egypt", "Cairo", "埃及", "开罗"),
    ("Greece", "Athens", "希腊", "雅典"),
    ("Thailand", "Bangkok", "泰国", "曼谷"),
]
CAPITALS += [
    ("Cuba", "Havana", "古巴", "哈瓦那"),
    ("Kenya", "Nairobi", "肯尼亚", "内罗毕"),
    ("Norway", "Oslo", "挪威", "奥斯陆"),
]
CAPITALS += [
    ("Poland", "Warsaw", "波兰", "华沙"),
    ("Portugal", "Lisbon", "葡萄牙", "里斯本"),
    ("Iran", "Tehran", "伊朗", "德黑兰"),
]
CAPITALS += [
    ("Austria", "Vienna", "奥地利", "维也纳"),
    ("Ireland", "Dublin", "爱尔兰", "都柏林"),
    ("Vietnam", "Hanoi", "越南", "河内"),
]


def change(rng: random.Random, zh: bool) -> Values:
    price, count, more = rng.randint(2, 25), rng.randint(3, 12), rng.randint(2, 9)
    total = price * count
    paid = (total // 50 + 1) * 50
    name, item = (rng.choice(NAMES_ZH), rng.choice(ITEMS_ZH)) if zh else (rng.choice(NAMES), rng.choice(ITEMS))
    both = count + more
    return locals() | {"unit": item[0], "change": paid - total, "both_total": both * price}


def units(rng: random.Random, zh: bool) -> Values:
    big, small, big_zh, small_zh, factor = rng.choice(UNITS)
    value, back = rng.randint(2, 60), rng.randint(2, 60)
    texts = {"big": big_zh, "small": small_zh} if zh else {"article": "An" if big == "hour" else "A"}
    return locals() | {"product": value * factor, "source": back * factor} | texts


def decimals(rng: random.Random, zh: bool) -> Values:
    whole = rng.randint(1, 30)
    long = rng.choice([n for n in range(11, 100) if n % 10])
    short = rng.choice([n for n in range(1, 10) if n != long // 10])  # the first decimals differ
    first, second = rng.sample([f"{whole}.{long}", f"{whole}.{short}"], 2)
    low, high = sorted([first, second], key=Decimal)
    small, large = sorted([long, short * 10])
    gap = Decimal(high) - Decimal(low)
    return locals()


def day_text(day: date, zh: bool) -> str:
    return f"{day.year}年{day.month}月{day.day}日" if zh else f"{day.day} {MONTHS[day.month - 1]} {day.year}"


def dates(rng: random.Random, zh: bool) -> Values:
    start, days = date(2024, 1, 1) + timedelta(days=rng.randrange(1096)), rng.randint(32, 75)
    end, day, left = start + timedelta(days=days), start, days
    steps = []
    while (day.year, day.month) != (end.year, end.month):  # on to the first of the next month
        first = (day.replace(day=28) + timedelta(days=4)).replace(day=1)
        left -= (first - day).days
        gone, now = (first - day).days, day_text(first, zh)
        steps.append(f"过{gone}天到{now}，还剩{left}天。" if zh else f"After {gone} days it is {now}; {left} are left.")
        day = first
    names = WEEKDAYS_ZH if zh else WEEKDAYS
    return {
        **{"days": days, "start": day_text(start, zh), "end": day_text(end, zh), "steps": "\n".join(steps)},
        **{"day": day.day, "left": left, "end_day": end.day, "weeks": days // 7, "rest": days % 7},
        **{"begin": names[start.weekday()], "weekday": names[end.weekday()]},
    }


def letters(rng: random.Random, zh: bool) -> Values:
    word = rng.choice(WORDS)
    letter = rng.choice(sorted(set(word)))
    marks = [f"{char}({word[: i + 1].count(letter)})" if char == letter else char for i, char in enumerate(word)]
    numbered = " ".join(f"{char}{place}" for place, char in enumerate(word, 1))
    return locals() | {"spelled": " ".join(marks), "count": word.count(letter), "length": len(word)}


def sorting(rng: random.Random, zh: bool) -> Values:
    numbers = rng.sample(range(1, 100), rng.randint(4, 6))
    comma = "、" if zh else ", "
    left, steps = list(numbers), []
    while len(left) > 1:
        least = min(left)
        left.remove(least)
        rest = comma.join(map(str, left))
        steps.append(f"最小的是 {least}，剩下 {rest}。" if zh else f"The smallest is {least}; left are {rest}.")
    low, high = min(numbers), max(numbers)
    texts = {"listed": comma.join(map(str, numbers)), "ordered": comma.join(map(str, sorted(numbers)))}
    return {"low": low, "high": high, "gap": high - low, "steps": "\n".join(steps)} | texts


def taller(rng: random.Random, zh: bool) -> Values:
    first, second, third = rng.sample(NAMES_ZH if zh else NAMES, 3)
    return locals()


def sequence(rng: random.Random, zh: bool) -> Values:
    a, step, place = rng.randint(1, 40), rng.randint(2, 15), rng.randint(8, 20)
    b, c, d = (a + step * i for i in (1, 2, 3))
    return locals() | {"next": d + step, "far": a + (place - 1) * step}


def discount(rng: random.Random, zh: bool) -> Values:
    price, percent, count = 20 * rng.randint(2, 30), 5 * rng.randint(1, 10), rng.randint(2, 6)
    off = price * percent // 100  # exact: multiples of 20 and of 5
    now = price - off
    return locals() | {"total": now * count}


def rectangle(rng: random.Random, zh: bool) -> Values:
    wide, long = sorted(rng.sample(range(3, 40), 2))
    half = wide + long
    return locals() | {"area": wide * long, "edge": 2 * half}


def boxes(rng: random.Random, zh: bool) -> Values:
    size, full, rest = rng.randint(5, 12), rng.randint(3, 15), rng.randint(2, 4)
    packed = size * full
    return locals() | {"total": packed + rest, "needed": full + 1}


FAMILIES: list[Family] = [change, units, decimals, dates, letters, sorting]
FAMILIES += [taller, sequence, discount, rectangle, boxes]
# What a conversation is made of; 19 and the 11 families have no common factor, so that all pairs come.
SHAPES = ["one"] * 10 + ["two"] * 5 + ["three"] * 2 + ["tool", "retry"]


def read_texts() -> dict[tuple[str, bool], list[Exchange]]:
    """Reads demo_problems.txt: (family, is it Chinese) -> its two exchanges."""
    texts: dict[tuple[str, bool], list[Exchange]] = {}
    for block in (Path(__file__).parent / "demo_problems.txt").read_text(encoding="utf-8").split("\n\n")[1:]:
        (name, language), *lines = (line.split(" ", 1) for line in block.strip().splitlines())
        exchanges = texts[name, language == "zh"] = []
        questions: list[str] = []
        reasoning: list[str] = []
        for kind, text in lines:
            if kind == "A":
                exchanges.append((questions, "\n".join(reasoning), text))
                questions, reasoning = [], []  # of the next exchange
            else:
                (questions if kind == "Q" else reasoning).append(text)
    return texts


TEXTS = read_texts()


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def exchanges(rng: random.Random, family: Family, zh: bool) -> list[list[Message]]:
    """One problem of a family: its question and answer, then a follow-up's."""
    values = family(rng, zh)
    return [
        [
            user(rng.choice(questions).format(**values)),
            {"role": "assistant", "reasoning_content": work.format(**values), "content": answer.format(**values)},
        ]
        for questions, work, answer in TEXTS[family.__name__, zh]
    ]


def tool_conversation(rng: random.Random, zh: bool) -> list[Message]:
    """One question, one call, its result, the answer: products beyond mental arithmetic, and days between dates."""
    arguments: Values
    if rng.random() < 0.5:
        left, right = rng.randint(1000, 99999), rng.randint(101, 9999)
        name, arguments, result = "multiply", {"a": left, "b": right}, left * right
        question = f"{left} 乘以 {right} 等于多少？" if zh else f"What is {left} times {right}?"
        reasoning = "数太大，用 multiply 计算。" if zh else "These are large numbers; multiply gives the exact product."
        answer = f"{left} × {right} = **{result}**。" if zh else f"{left} × {right} = **{result}**."
    else:
        start = date(2020, 1, 1) + timedelta(days=rng.randrange(1500))
        end = start + timedelta(days=rng.randint(100, 900))
        name, result = "days_between", (end - start).days
        arguments = {"start": start.isoformat(), "end": end.isoformat()}
        texts = day_text(start, zh), day_text(end, zh)
        question = f"{texts[0]}到{texts[1]}有多少天？" if zh else f"How many days lie from {texts[0]} to {texts[1]}?"
        reasoning = "跨了好几个月，用 days_between 计算。" if zh else "Many months lie between; days_between counts."
        answer = f"一共有 **{result}** 天。" if zh else f"It is **{result}** days."
    offer = "You can call the tools multiply(a, b) and days_between(start, end)."
    if zh:
        offer = "你可以调用工具 multiply(a, b) 和 days_between(start, end)。"
    call = {"type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
    return [
        {"role": "system", "content": offer},
        user(question),
        {"role": "assistant", "reasoning_content": reasoning, "content": "", "tool_calls": [call]},
        {"role": "tool", "content": json.dumps({"result": result})},
        {"role": "assistant", "content": answer},
    ]


def conversation(rng: random.Random, index: int) -> list[Message]:
    """The index fixes the language, the problem family and the shape, so that all come evenly."""
    zh = index % 2 == 1
    family = FAMILIES[index // 2 % len(FAMILIES)]
    shape = SHAPES[index // 2 % len(SHAPES)]
    if shape == "tool":
        return tool_conversation(rng, zh)
    (question, answer), follow_up = exchanges(rng, family, zh)
    if shape == "retry":  # a first reply that is not worth learning, so without loss, then the real one
        guess = "我没有算，只能猜一下。" if zh else "I did not work it out; I would have to guess."
        again = "请一步一步算。" if zh else "Please work it out step by step."
        return [question, {"role": "assistant", "content": guess, "loss": False}, user(again), answer]
    messages = [question, answer]
    if shape in ("two", "three"):
        messages += follow_up
    if shape == "three":  # on to another subject
        messages += exchanges(rng, rng.choice([other for other in FAMILIES if other is not family]), zh)[0]
    if rng.random() < 0.25:
        system = "你是一位细心的数学老师。" if zh else "You are a careful mathematics teacher."
        messages.insert(0, {"role": "system", "content": system})
    return messages


def conversations(rng: random.Random) -> Iterator[list[Message]]:
    """Yields TRAIN + VAL conversations, no two with the same opening question."""
    seen: set[str] = set()
    for index in range(TRAIN + VAL):
        while True:
            messages = conversation(rng, index)
            opening = next(message["content"] for message in messages if message["role"] == "user")
            if opening not in seen:
                break
        seen.add(opening)
        yield messages


def facts() -> Iterator[list[Message]]:
    """Yields a question on each country's capital in English and in Chinese: few and short enough to be memorised."""
    for country, capital, zh_country, zh_capital in CAPITALS:
        yield fact(
            f"What is the capital of {country}?",
            f"{country} is governed from {capital}.",
            f"The capital of {country} is {capital}.",
        )
        yield fact(
            f"{zh_country}的首都是哪里？", f"{zh_country}的政府在{zh_capital}。", f"{zh_country}的首都是{zh_capital}。"
        )


def fact(question: str, reasoning: str, answer: str) -> list[Message]:
    return [user(question), {"role": "assistant", "reasoning_content": reasoning, "content": answer}]


def write(out: Path) -> None:
    rng = random.Random(SEED)
    rows = list(conversations(rng))
    rng.shuffle(rows)
    out.mkdir(parents=True, exist_ok=True)
    parts = {"train": rows[:TRAIN], "val": rows[TRAIN:], "facts": list(facts())}
    for name, part in parts.items():
        lines = [json.dumps({"messages": messages}, ensure_ascii=False) + "\n" for messages in part]
        (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "data" / "demo")
    write(parser.parse_args().out)


if __name__ == "__main__":
    main()
