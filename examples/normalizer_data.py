"""Spoken or written English dates, times, numbers and money, and their normal form: generated, so nothing is downloaded.

    "the third of march twenty twenty one" → "2021-03-03"      "quarter past four pm" → "16:15"
    "two hundred and five" → "205"                             "twelve dollars and fifty cents" → "$12.50"

Held-out cases are those whose normal form hashes into one bucket of ten: no target is ever seen in training.
"""

from __future__ import annotations

import datetime
import hashlib
import random

ONES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
ONES += ["thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
TENS = ["", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
MONTHS = ["january", "february", "march", "april", "may", "june", "july", "august", "september", "october", "november", "december"]
ORDINALS = {1: "first", 2: "second", 3: "third", 5: "fifth", 8: "eighth", 9: "ninth", 12: "twelfth", 20: "twentieth", 30: "thirtieth"}
ALPHABET = " abcdefghijklmnopqrstuvwxyz0123456789-:$.,/"
PAD, BOS, EOS, FIRST = 0, 1, 2, 3
VOCABULARY = FIRST + len(ALPHABET)
MAX_INPUT, MAX_OUTPUT = 56, 12  # tokens, with EOS


def encode(text: str) -> list[int]:
    """Character ids and EOS."""
    return [*[ALPHABET.index(c) + FIRST for c in text], EOS]


def words(n: int) -> str:
    """0 … 999999 in words."""
    if n < 20:
        return ONES[n]
    if n < 100:
        return TENS[n // 10] + (f" {ONES[n % 10]}" if n % 10 else "")
    if n < 1000:
        return f"{ONES[n // 100]} hundred" + (f" and {words(n % 100)}" if n % 100 else "")
    return f"{words(n // 1000)} thousand" + (f" {words(n % 1000)}" if n % 1000 else "")


def ordinal(n: int) -> str:
    """1 … 31 as an ordinal in words."""
    if n in ORDINALS:
        return ORDINALS[n]
    if n < 20:
        return ONES[n] + "th"
    return f"{TENS[n // 10]} {ordinal(n % 10)}"


def _suffixed(n: int) -> str:
    return f"{n}" + ("th" if 10 <= n % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th"))


def _year(y: int, rng: random.Random) -> str:
    if rng.random() < 0.4:
        return str(y)
    if 2000 <= y <= 2009:
        return "two thousand" + (f" and {ONES[y - 2000]}" if y > 2000 else "")
    if y % 100 == 0:
        return f"{words(y // 100)} hundred"
    return f"{words(y // 100)} " + (f"oh {ONES[y % 100]}" if y % 100 < 10 else words(y % 100))


def _date(rng: random.Random) -> tuple[str, str]:
    day = datetime.date(1950, 1, 1) + datetime.timedelta(days=rng.randrange(36500))
    month, year = MONTHS[day.month - 1], _year(day.year, rng)
    number = rng.choice([ordinal(day.day), _suffixed(day.day), str(day.day)])
    forms = [
        f"the {number} of {month} {year}",
        f"{month} {number} {year}",
        f"{number} {month} {year}",
        f"{rng.choice([month, month[:3]])} {number}, {year}",
    ]
    return rng.choice(forms), day.isoformat()


def _time(rng: random.Random) -> tuple[str, str]:
    hour = rng.randrange(1, 13)
    minute = rng.choice([0, 15, 30, 45]) if rng.random() < 0.25 else rng.choice([5 * rng.randrange(12), rng.randrange(60)])
    half = rng.choice(["am", "pm"])
    forms = [f"{words(hour)} {'oh ' if minute < 10 else ''}{words(minute)} {half}", f"{hour}:{minute:02d} {half}"]
    if minute == 0:
        forms = [f"{words(hour)} o clock {half}", f"{hour} {half}", f"{words(hour)} {half}", f"{hour}:00 {half}"]
    elif minute <= 30:
        forms += [f"{_part(minute, rng)} past {words(hour)} {half}"] * 2
    elif hour != 11:  # "quarter to twelve am" would name the other half of the day
        forms += [f"{_part(60 - minute, rng)} to {words(hour % 12 + 1)} {half}"] * 2
    return rng.choice(forms), f"{hour % 12 + (12 if half == 'pm' else 0):02d}:{minute:02d}"


def _part(minutes: int, rng: random.Random) -> str:
    """1 … 30 minutes as people say them before "past" and "to"."""
    if minutes in (15, 30) and rng.random() < 0.7:
        return "quarter" if minutes == 15 else "half"
    return words(minutes) + rng.choice(["", f" minute{'s' if minutes > 1 else ''}"])


def _number(rng: random.Random) -> tuple[str, str]:
    n = rng.randrange(10 ** rng.randrange(1, 7))
    return words(n), str(n)


def _money(rng: random.Random) -> tuple[str, str]:
    dollars, cents = rng.randrange(1, 10 ** rng.randrange(1, 4)), rng.choice([0, rng.randrange(1, 100)])
    if cents and rng.random() < 0.1:
        return f"{words(cents)} cent{'s' if cents > 1 else ''}", f"$0.{cents:02d}"
    said = f"{words(dollars)} dollar{'s' if dollars > 1 else ''}"
    said += f" and {words(cents)} cent{'s' if cents > 1 else ''}" if cents else ""
    return said, f"${dollars}.{cents:02d}"


def held_out(target: str) -> bool:
    """Whether a normal form belongs to the evaluation set."""
    return hashlib.sha256(target.encode()).digest()[0] % 10 == 0


def cases(n: int, seed: int, evaluation: bool) -> list[tuple[str, str]]:
    """`n` generated (said, normal form) pairs of the training or the evaluation side; no evaluation case comes twice."""
    rng = random.Random(seed)
    found: list[tuple[str, str]] = []
    seen: set[str] = set()
    while len(found) < n:
        case = rng.choices([_date, _time, _number, _money], [4, 3, 2, 2])[0](rng)
        if len(case[0]) < MAX_INPUT and held_out(case[1]) == evaluation and case[0] not in seen:
            found.append(case)
            if evaluation:
                seen.add(case[0])
    return found
