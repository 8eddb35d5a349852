"""Names as libdm treats them: mangling, the parts of an LVM name, the disk name of a device."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

MAJOR = 254
MAX_NAME = 127
MAX_UUID = 128
PLAIN = frozenset(b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz#+-.:=@_")
"""The characters that libdm keeps in a node's name; others become \\xNN."""


class Refused(Exception):
    """A command ends with these lines on stderr."""

    def __init__(self, *lines: str) -> None:
        super().__init__(*lines)
        self.lines = lines


def no_node(name: str) -> str:
    """Return what libdm says of a device that never had a live table."""
    return f"/dev/mapper/{name}: open failed: No such file or directory"


def mangle(name: str) -> str:
    """Return a name as its node below /dev/mapper has it."""
    data = name.encode("utf-8", "surrogateescape")
    return "".join(chr(byte) if byte in PLAIN else f"\\x{byte:02x}" for byte in data)


def unmangle(name: str) -> str:
    r"""Return the name that a user means: \xNN are taken back where all the rest is plain."""
    plain = re.sub(r"\\x([0-9a-fA-F]{2})", "", name)
    if plain == name or not all(ord(char) < 128 and ord(char) in PLAIN for char in plain):
        return name
    data = re.sub(rb"\\x([0-9a-fA-F]{2})", lambda hit: bytes([int(hit[1], 16)]), name.encode())
    return data.decode("utf-8", "surrogateescape")


def check_new_name(name: str, *, renaming: bool = False) -> None:
    """Refuse a name as libdm does, before anything is asked."""
    if renaming and not name:
        raise Refused("Non empty new name is required.")
    if "/" in name:
        raise Refused(f'Name "{name}" invalid. It contains "/".')
    if len(name.encode("utf-8", "surrogateescape")) > MAX_NAME:
        raise Refused(f'Name "{name}" too long{"" if renaming else "."}')


def check_new_uuid(uuid: str) -> None:
    """Refuse a uuid as libdm does."""
    if len(mangle(uuid)) > MAX_UUID:
        raise Refused(
            f'Mangled form of the UUID too long for "{uuid}".',
            f'Failed to mangle device uuid "{uuid}".',
        )


def disk_name(device: dict[str, Any]) -> str | None:
    """Return dm-N or loopN; None for a device that never had a table."""
    if device["major"] != MAJOR:
        return f"loop{device['minor']}"
    if not device.get("live", True) and not device.get("inactive", True):
        return None
    return f"dm-{device['minor']}"


class SubsystemName(NamedTuple):
    """A name taken apart: empty where the subsystem is not LVM."""

    subsystem: str
    vg: str = ""
    lv: str = ""
    layer: str = ""


def split_name(subsystem: str, name: str) -> SubsystemName:
    """Take an LVM name apart at single dashes; two stand for one in the part itself."""
    if subsystem != "LVM":
        return SubsystemName(subsystem)
    parts = []
    rest = name
    for _ in range(3):
        end = re.match(r"(?:[^-]|--|-$)*", rest)
        assert end
        parts.append(end[0].replace("--", "-"))
        rest = rest[end.end() + 1 :]
    return SubsystemName(subsystem, *parts)
