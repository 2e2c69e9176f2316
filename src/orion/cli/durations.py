"""The parser and the printers of durations such as `90s`."""

from __future__ import annotations

import re

from orion.errors import InvalidInput

_UNITS = {"w": 604800, "d": 86400, "h": 3600, "m": 60, "s": 1}
_WRITTEN = re.compile(r"(?:(\d+)w)?(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?")


def parse(text: str) -> int:
    """Return the seconds of `90s`, `30m`, `2h`, `7d`, `1w`, `1h30m`, or of a bare number of seconds."""
    match = _WRITTEN.fullmatch(text.strip().lower())
    if not match or not any(match.groups()) or len(text) > 20 or not text.isascii():
        forms = "without blanks, such as 90s, 30m, 2h, 7d, 1w or 1h30m"
        raise InvalidInput(f"{text!r} is not a duration. Write it {forms}")
    return sum(int(number or 0) * unit for number, unit in zip(match.groups(), _UNITS.values(), strict=True))


def within(text: str, option: str, least_s: int, most_s: int) -> int:
    """Return the seconds of a duration. Raise InvalidInput if it is shorter or longer than allowed."""
    if not least_s <= (seconds := parse(text)) <= most_s:
        bounds = f"at least {exact(least_s)} and at most {exact(most_s)}"
        raise InvalidInput(f"{option} is {text.strip()} but must be {bounds}")
    return seconds


def exact(seconds: int) -> str:
    """Return the duration in a form that `parse` reads back as the same number of seconds."""
    text = ""
    for letter in "dhms":  # without weeks, as people say 30 days, not four weeks and two days
        number, seconds = divmod(seconds, _UNITS[letter])
        text += f"{number}{letter}" if number else ""
    return text or "0s"


def rough(seconds: float) -> str:
    """Return the duration rounded to one unit: `12 s`, `45 min`, `24 h`, `3 d`."""
    seconds = max(0, round(seconds))
    for unit, name, below in ((1, "s", 120), (60, "min", 120), (3600, "h", 48)):
        if seconds < below * unit:
            return f"{round(seconds / unit)} {name}"
    return f"{round(seconds / 86400)} d"
