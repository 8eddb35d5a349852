"""Sizes as LVM's messages and reports show them."""

from __future__ import annotations

from typing import Final

_UNITS: Final = ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def display_size(sectors: int) -> str:
    """Write a size as messages have it: "8.00 MiB"; "<" in front where rounding went up."""
    size = sectors * 512
    if size < 1024:
        return f"{size} B"
    unit = 1024
    names = iter(_UNITS)
    name = next(names)
    while size >= unit * 1024 and name != _UNITS[-1]:
        unit *= 1024
        name = next(names)
    hundredths = (size * 200 + unit) // (2 * unit)
    up = "<" if hundredths * unit > size * 100 else ""
    return f"{up}{hundredths // 100}.{hundredths % 100:02} {name}"
