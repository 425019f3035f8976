"""Numbers and names in words, for a console: any float will do, and no text moves the cursor."""

from __future__ import annotations

import math
from collections.abc import Collection

_SPARKS = "▁▂▃▄▅▆▇█"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as in ``1:02:03``; ``-`` if that is no number."""
    if not math.isfinite(seconds):
        return "-"
    minutes, rest = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def sparkline(values: Collection[float]) -> str:
    """A character a value, from the lowest to the highest; a dot for what is no number."""
    known = [value for value in values if math.isfinite(value)]
    low, high = min(known, default=0.0), max(known, default=0.0)
    span = high - low
    top = len(_SPARKS) - 1 if 0 < span < math.inf else 0  # else all the same, or too far apart

    def mark(value: float) -> str:
        if not math.isfinite(value):
            return "·"
        return _SPARKS[int((value - low) / span * top) if top else 0]

    return "".join(map(mark, values))


def count(value: float) -> str:
    """A whole number, as in ``1,024``; a fraction below 10 with two digits, as in ``0.27``."""
    if value % 1 and abs(value) < 10:
        return f"{value:.2g}"
    return f"{value:,.0f}" if abs(value) < 1e7 else f"{value:.3g}"


def percent(share: float) -> str:
    """As in ``12.5%``."""
    return f"{share:.1%}" if abs(share) < 1e3 else f"{share:.3g}"


def seconds(value: float) -> str:
    """Of something short, as in ``0.25 s``."""
    if abs(value) < 1:
        return f"{value:.2g} s"
    return f"{value:.1f} s" if abs(value) < 10 else age(value)


def age(value: float) -> str:
    """Whole seconds that something has lasted, as in ``12 s`` or ``1:02:03``."""
    return f"{value:.0f} s" if abs(value) < 100 else duration(value)


def tail(name: str) -> str:
    """What a name like ``loss/<component>`` has after its first slash."""
    return name.partition("/")[2]


def plain(text: str) -> str:
    """Without letters that would move the cursor."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def escaped(text: str) -> str:
    """The same with what is not printable spelled out, as in ``a\\nb``: one line, whatever a name.

    Bytes of a name that are not UTF-8 become ``\\xff``.
    """

    def spell(letter: str) -> str:
        byte = ord(letter) - 0xDC00  # as surrogateescape has it
        return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else ascii(letter)[1:-1]

    return "".join(letter if letter.isprintable() else spell(letter) for letter in text)
