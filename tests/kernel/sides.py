"""Three devices that change independently, on either side: an origin and two snapshots of it.

Each sector carries its number and the tag of the write that put it there, in every 16 bytes.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
from support import SECTOR, stamp

import cow

from .judge import replayer
from .uml import Kernel

SECTORS = 2048
NAMES = ("base", "s0", "s1")
IMAGES = ("c0", "c1")
CHUNKS = (1, 2, 4, 8, 16, 32, 64)
WORDS = SECTOR // 8

Step = list[Any]
Write = tuple[str, int, int, int]  # device, first sector, count, tag
Contents = dict[str, np.ndarray]  # by device: uint64[SECTORS, WORDS]


def stack(stores: dict[str, str]) -> list[Step]:
    """Return steps that put an origin and two snapshots on images; `stores`: letter and chunk."""
    return [
        ["create", "base-real", f"0 {SECTORS} linear @b 0"],
        ["create", "base", f"0 {SECTORS} snapshot-origin %base-real"],
        ["suspend", "base"],
        ["create", "s0", f"0 {SECTORS} snapshot %base-real @c0 {stores['c0']}"],
        ["create", "s1", f"0 {SECTORS} snapshot %base-real @c1 {stores['c1']}"],
        ["resume", "base"],
    ]


def random_stack(rng: random.Random, chunk: int = 0) -> list[Step]:
    """Return the steps of a stack with chunks of any size; `chunk`: sectors of those of s0."""
    return stack({"c0": f"P {chunk or rng.choice(CHUNKS)}", "c1": f"PO {rng.choice(CHUNKS)}"})


STACK = stack({"c0": "P 0", "c1": "PO 0"})
"""For stores that there are: of any chunk size."""

MERGE = [
    ["suspend", "base"],
    ["remove", "s0"],
    ["reload", "base", f"0 {SECTORS} snapshot-merge %base-real @c0 P 0"],
    ["resume", "base"],
]
SLOWLY = [
    ["reload", "base-real", f"0 {SECTORS} delay @b 0 0 @b 0 1"],
    ["resume", "base-real"],
]
"""A write to the origin takes a millisecond from now on."""

GO_ON_MERGING = [
    STACK[0],
    ["create", "s1", f"0 {SECTORS} snapshot %base-real @c1 P 0"],
    ["create", "base", f"0 {SECTORS} snapshot-merge %base-real @c0 P 0"],
]
MERGED = ["waitmerge", "base"]


# --- what was written, and what is there --------------------------------------------------------


def make_images(folder: Path, cow_sectors: int = 3 * SECTORS) -> dict[str, Path]:
    """Write a stamped origin and two empty COW images into a new folder."""
    folder.mkdir()
    images = {name: folder / f"{name}.img" for name in ("b", *IMAGES)}
    images["b"].write_bytes(stamp(0, SECTORS, 0))
    for name in IMAGES:
        images[name].write_bytes(bytes(cow_sectors * SECTOR))
    return images


def random_writes(rng: random.Random, count: int, first_tag: int = 1) -> list[Write]:
    """Return writes of all devices, each with a tag of its own."""
    writes = []
    for tag in range(first_tag, first_tag + count):
        length = rng.choice((1, 4, 8, 8, 16, rng.randint(1, 60)))
        start = rng.randrange(SECTORS - length)
        if rng.random() < 0.5:
            start -= start % 8
        writes.append((rng.choice(NAMES), start, length, tag))
    return writes


def words(data: bytes) -> np.ndarray:
    return np.frombuffer(data, "<u8").reshape(-1, WORDS)


def nothing_written() -> Contents:
    return {name: words(stamp(0, SECTORS, 0)) for name in NAMES}


def apply(contents: Contents, writes: list[Write]) -> Contents:
    """Return the contents after writes."""
    after = {name: each.copy() for name, each in contents.items()}
    for name, first, count, tag in writes:
        after[name][first : first + count] = words(stamp(first, count, tag))
    return after


def check_views(views: dict[str, bytes], writes: list[Write], acknowledged: int) -> Contents:
    """Check what each device shows after a kill, and return it.

    What was acknowledged is there. A later write may be there in part: a process that is killed
    leaves a copy to its image in the middle of a sector, too.
    """
    expected = apply(nothing_written(), writes[:acknowledged])
    seen = {name: words(data) for name, data in views.items()}
    for name, data in seen.items():
        right = data == expected[name]
        for other, first, count, tag in writes[acknowledged:]:
            if other == name:
                place = slice(first, first + count)
                right[place] |= data[place] == words(stamp(first, count, tag))
        wrong = np.argwhere(~right)
        assert not len(wrong), (
            f"{name}: sector {wrong[0][0]} is {data[wrong[0][0]][:2]}, not "
            f"{expected[name][wrong[0][0]][:2]}, after {acknowledged} writes"
        )
    return seen


def check_contents(views: dict[str, bytes], expected: Contents) -> None:
    for name, data in views.items():
        wrong = np.argwhere(words(data) != expected[name])
        assert not len(wrong), f"{name}: sector {wrong[0][0]} and {len(wrong) - 1} words more"


# --- the two sides ------------------------------------------------------------------------------


class Ours:
    """cow on the images, in this process."""

    def __init__(self, images: dict[str, Path]) -> None:
        self.images = images

    def __enter__(self) -> Ours:
        self.dm = cow.Mapper(durability="process")
        self.replayer = replayer(self.dm, self.images)
        return self

    def __exit__(self, *_: object) -> None:
        self.dm.close()

    def run(self, steps: list[Step]) -> None:
        for step in steps:
            assert isinstance(self.replayer.answer(step), list), step

    def write(self, writes: list[Write]) -> None:
        for name, first, count, tag in writes:
            self.dm.device(name).pwrite(stamp(first, count, tag), first * SECTOR)

    def views(self, names: tuple[str, ...] = NAMES) -> dict[str, bytes]:
        return {name: self.dm.device(name).pread(SECTORS * SECTOR, 0) for name in names}

    def used(self, name: str) -> str:
        return self.dm.status(name).split(" ", 3)[3]


class Theirs:
    """The kernel on the images."""

    def __init__(self, kernel: Kernel, images: dict[str, Path], folder: Path) -> None:
        self.kernel = kernel
        self.images = images
        self.folder = folder

    def __enter__(self) -> Theirs:
        self.kernel.run(self.images, [], clean=False)
        return self

    def __exit__(self, *_: object) -> None:
        if not self.kernel.failed:  # else the test has failed, and the next one boots another
            self.kernel.run(None, [])

    def run(self, steps: list[Step]) -> list[Any]:
        answers = self.kernel.run(None, steps, clean=False)
        assert all(answer["rc"] == 0 for answer in answers), (steps, answers)
        return answers

    def write(self, writes: list[Write]) -> None:
        self.run([["work", kernel_writes(writes)]])

    def views(self, names: tuple[str, ...] = NAMES) -> dict[str, bytes]:
        self.run([["dump", name, f"{name}.dump"] for name in names])
        views = {}
        for name in names:
            file = self.folder / f"{name}.dump"
            views[name] = file.read_bytes()
            file.unlink()
        return views

    def used(self, name: str) -> str:
        lines = self.run([["status"]])[0]["out"]
        return next(line.split(" ", 4)[4] for line in lines if line.startswith(f"{name}: "))


def kernel_writes(writes: list[Write]) -> list[list[Any]]:
    return [
        [name, first * SECTOR, count * SECTOR, stamp(first, count, tag)]
        for name, first, count, tag in writes
    ]


def go_on(side: Ours | Theirs, rng: random.Random, seen: Contents) -> None:
    """Write to all devices, merge the first snapshot, and check the bytes after each."""
    writes = random_writes(rng, 40, 1_000_000)
    side.write(writes)
    seen = apply(seen, writes)
    check_contents(side.views(), seen)
    side.run([*MERGE, MERGED])
    check_merged(side, seen)


def check_merged(side: Ours | Theirs, before: Contents) -> None:
    """Check that the origin is what s0 was, and s1 what it was."""
    after = side.views(("base", "s1"))
    check_contents(after, {"base": before["s0"], "s1": before["s1"]})
    used, metadata = side.used("base").split()
    assert used.split("/")[0] == metadata
