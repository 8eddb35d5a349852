"""Bytes → table text → parsed, loaded, printed, loaded again; or refused with nothing changed."""

from __future__ import annotations

import contextlib
import fcntl
import re
from pathlib import Path

import scratch
from support import fill
from words import text_of

import cow
from cow.table import Line, parse, quote_arg

MAX_LEN = 96
SIZE = 64 * 512


def run(data: bytes) -> None:
    text = text_of(data)
    check_parse(text)
    with contextlib.chdir(scratch.folder()), cow.Mapper(durability="process") as dm:
        before = {name: fill(SIZE, seed) for seed, name in enumerate(("a.img", "d.img"), 1)}
        before["c.img"] = bytes(SIZE)
        for name, content in before.items():
            scratch.put(name, content)
        dm.create("huge", f"0 {1 << 50} zero")
        dm.create("lin", "0 64 linear a.img 0")
        dm.create("org", "0 64 snapshot-origin lin")
        try:
            dm.create("x", text)
        except cow.CowError:
            check_nothing_happened(dm, before)
        else:
            check_device(dm, text)


def check_parse(text: str) -> None:
    """Check that a text is refused as it should be, or that its lines can be written again."""
    try:
        lines = parse(text)
    except cow.TableFormatError:
        return
    again = "\n".join(written(line) for line in lines)
    assert [line[1:] for line in parse(again)] == [line[1:] for line in lines], again


def written(line: Line) -> str:
    return " ".join([str(line.start), str(line.length), line.type, *map(quote_arg, line.args)])


def check_nothing_happened(dm: cow.Mapper, before: dict[str, bytes]) -> None:
    assert dm.names() == ["huge", "lin", "org"]
    for name, content in before.items():
        assert Path(name).read_bytes() == content, f"{name} was changed"
    for name in ("c.img", "d.img"):
        with open(name, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def check_device(dm: cow.Mapper, text: str) -> None:
    """Use a device whose table was accepted, and load the table as it prints it."""
    device = dm.device("x")
    assert dm.info("x").live
    dm.status("x")
    dm.deps("x")
    if not re.search("delay|flakey|error", text):
        use(device)
    printed = dm.table("x")
    try:
        dm.load("x", printed)
    except cow.CowError:
        assert "snapshot" in printed, printed
    else:
        # What a snapshot is told in a handover, its chunk size too, is printed after it.
        assert "snapshot" in printed or dm.table("x", inactive=True) == printed
    dm.suspend("x")
    dm.clear("x")
    dm.resume("x")
    dm.remove("x")


def use(device: cow.Device) -> None:
    """Read what was written. A full or wrong COW device may fail a request, but only cleanly."""
    size = min(device.size, 1 << 14)
    try:
        device.pwrite(b"x" * size, 0)
        assert len(device.pread(size, 0)) == size
        assert device.extents(0, size)["length"].sum() == size
        device.discard(0, size)
        device.flush()
    except cow.CowError:
        pass
