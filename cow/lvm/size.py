"""Sizes as LVM's command line takes them and as its reports and messages show them.

What is given is base 2, whatever the case of its unit (-L 4M is 4 MiB); what is shown follows
--units, where capital letters mean powers of 1000. In here a size is a number of sectors.
(lvm(8), lvs(8))
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

from cow.lvm.errors import RequestError
from cow.units import SECTOR_SIZE

LETTERS: Final = "kmgtpe"
MAX_BYTES: Final = 1 << 64

_SIZE = re.compile(r"(?P<number>[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:(?P<unit>[a-zA-Z])i?[bB]?)?")
_EXTENTS = re.compile(r"(?P<count>[0-9]+)(?P<percent>%(?P<of>[a-zA-Z]*))?")
_UNITS = re.compile(r"(?P<number>[0-9]+(?:\.[0-9]*)?|\.[0-9]+)?(?P<letter>[a-zA-Z])")

PERCENT_OF: Final = ("VG", "FREE", "PVS", "ORIGIN", "LV")
"""What a number of extents can be a percentage of; any beginning of a name will do."""


class SizeError(RequestError):
    """An argument is no size; the message has no option in it."""


# ---- what is given


def parse_size(text: str, default: str = "m") -> int:
    """Return a size without a sign, "4m", in sectors; `default` is the unit of a bare number.

    A size in bytes has to be whole sectors; other ones are cut to them.
    """
    if text.startswith("-"):
        raise SizeError("Size may not be negative.")
    if not re.match(r"[0-9.]", text):
        raise SizeError("Size requires number argument.")
    found = _SIZE.fullmatch(text)
    unit = (found["unit"] or default).lower() if found else "?"
    if not found or unit not in "bs" + LETTERS:
        raise SizeError("Can't parse size argument.")
    size = Fraction(found["number"].rstrip(".")) * factor(unit)
    if size >= MAX_BYTES:
        raise SizeError("Size is too big (>=16EiB).")
    if unit == "b" and size % SECTOR_SIZE:
        below = int(size) // SECTOR_SIZE * SECTOR_SIZE
        tries = f"{below} or {below + SECTOR_SIZE}"
        raise SizeError(f"Size is not a multiple of {SECTOR_SIZE}. Try using {tries}.")
    return int(size / SECTOR_SIZE)


def factor(letter: str) -> int:
    """Return the bytes of a unit: a power of 1024, of 1000 for a capital letter."""
    if letter in "bB":
        return 1
    if letter in "sS":
        return SECTOR_SIZE
    power: int = (1000 if letter.isupper() else 1024) ** (LETTERS.index(letter.lower()) + 1)
    return power


@dataclass(frozen=True)
class Amount:
    """An argument of -L or -l: so many sectors, so many extents, or a percentage of something."""

    sign: str
    """+ to add, - to take away, or nothing."""
    sectors: int | None = None
    extents: int | None = None
    """A count, or a percentage of `percent_of`."""
    percent_of: str = ""


def parse_amount(text: str) -> Amount:
    """Return the argument of -L, a sign in front of it or not."""
    sign = text[0] if text[:1] in ("+", "-") else ""
    return Amount(sign, sectors=parse_size(text[len(sign) :]))


def parse_extents(text: str) -> Amount:
    """Return the argument of -l: [+-]COUNT[%VG|%FREE|%PVS|%ORIGIN|%LV]."""
    sign = text[0] if text[:1] in ("+", "-") else ""
    found = _EXTENTS.fullmatch(text[len(sign) :])
    if not found:
        raise SizeError("")
    percent_of = ""
    if found["percent"]:
        name = found["of"].upper()
        percent_of = next((each for each in PERCENT_OF if name and each.startswith(name)), "")
        if not percent_of:
            raise SizeError(f"Specified {found['percent']} is unknown.")
    return Amount(sign, extents=int(found["count"]), percent_of=percent_of)


# ---- what is shown


@dataclass(frozen=True)
class Units:
    """What sizes are shown in: the argument of --units."""

    letter: str = "r"
    """As given: h, H, r or R choose a unit for each size, b and s are bytes and sectors."""
    bytes_each: int = 0
    """Of one unit; 0 where it is chosen for each size."""
    custom: bool = False
    """Whether it is a multiple that has no name: 4k."""
    suffix: bool = True
    """Whether the unit stands behind the number; where it is chosen it always does."""

    @property
    def human(self) -> bool:
        """Whether a unit is chosen for each size."""
        return self.bytes_each == 0


def parse_units(text: str, *, suffix: bool = True) -> Units:
    """Return the units that --units names, "h", "S", "4k"."""
    found = _UNITS.fullmatch(text)
    if not found or found["letter"] not in "hHrRbBsS" + LETTERS + LETTERS.upper():
        raise RequestError("Invalid units specification")
    letter, number = found["letter"], found["number"]
    if letter in "hHrR":
        if number:
            raise RequestError("Invalid units specification")
        return Units(letter, suffix=suffix)
    times = Fraction(number.rstrip(".")) if number else Fraction(1)
    if times <= 0 or times * factor(letter) < 1:
        raise RequestError("Invalid units specification")
    return Units(letter, int(times * factor(letter)), times != 1, suffix)


DEFAULT_UNITS: Final = Units()


def report_size(sectors: int, units: Units = DEFAULT_UNITS) -> str:
    """Return a size as reports have it: "8.00m", "<63.94m", "0 "."""
    if sectors == 0 and units.human:
        return "0 "
    return _write(sectors, units, _SHORT)


def display_size(sectors: int, units: Units = DEFAULT_UNITS) -> str:
    """Return a size as messages and lvdisplay have it: "8.00 MiB"; no size is "0" and blanks."""
    if sectors == 0 and units.human:
        return "0   "
    return _write(sectors, units, _LONG)


_SHORT = {letter: letter for letter in LETTERS + LETTERS.upper()} | {
    "b": "B", "B": "B", "s": "S", "S": "S", "hb": "b", "HB": "B", "": "U",
}  # fmt: skip
_LONG = {letter: f" {letter.upper()}iB" for letter in LETTERS} | {
    **{letter: f" {letter}B" for letter in LETTERS.upper()}, "K": " kB",
    "b": " B ", "B": " B ", "s": " Se", "S": " Se", "hb": " B", "HB": " B ", "": " Un",
}  # fmt: skip
"""What stands behind a number; hb, HB: bytes where the unit is chosen, "": no unit with a name."""


def _write(sectors: int, units: Units, suffixes: dict[str, str]) -> str:
    size = sectors * SECTOR_SIZE
    letter, each = "" if units.custom else units.letter, units.bytes_each
    if units.human:
        letters = LETTERS if units.letter.islower() else LETTERS.upper()
        letter = max((one for one in letters if factor(one) <= size), key=factor, default="b")
        each = factor(letter)
        if letter == "b":
            letter = "hb" if units.letter.islower() else "HB"
    if size == 0 or letter in ("b", "B", "s", "S", "hb", "HB"):
        number = str(size // each)
    else:
        number = f"{size / each:.2f}"
        if units.letter in "rR" and Fraction(number) * each > size:
            number = "<" + number
    return number + suffixes[letter] if units.human or units.suffix else number
