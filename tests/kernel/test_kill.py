"""Either is killed in the middle of its work; the other opens what it left, goes on and merges.

Three devices change independently: the origin and two snapshots of it. Each sector carries its
number and the tag of the write that put it there. A sector is right if its tag is that of the
last write that was acknowledged, or of one that came after.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import SECTOR, stamp

import cow

from .judge import replayer
from .uml import Kernel

SECTORS = 2048
NAMES = ("base", "s0", "s1")
STORES = {"c0": "P 1", "c1": "PO 4"}
STACK = [
    ["create", "base-real", f"0 {SECTORS} linear @b 0"],
    ["create", "base", f"0 {SECTORS} snapshot-origin %base-real"],
    ["suspend", "base"],
    ["create", "s0", f"0 {SECTORS} snapshot %base-real @c0 {STORES['c0']}"],
    ["create", "s1", f"0 {SECTORS} snapshot %base-real @c1 {STORES['c1']}"],
    ["resume", "base"],
]
MERGE = [
    ["suspend", "base"],
    ["remove", "s0"],
    ["reload", "base", f"0 {SECTORS} snapshot-merge %base-real @c0 P 0"],
    ["resume", "base"],
]
GO_ON_MERGING = [
    STACK[0],
    ["create", "s1", f"0 {SECTORS} snapshot %base-real @c1 P 0"],
    ["create", "base", f"0 {SECTORS} snapshot-merge %base-real @c0 P 0"],
]
MERGED = ["waitmerge", "base"]

Write = tuple[str, int, int, int]  # device, first sector, count, tag
Tags = dict[str, np.ndarray]


# --- what was written, and what is there --------------------------------------------------------


def make_images(folder: Path) -> dict[str, Path]:
    """Write a stamped origin and two empty COW images into a new folder."""
    folder.mkdir()
    images = {name: folder / f"{name}.img" for name in ("b", *STORES)}
    images["b"].write_bytes(stamp(0, SECTORS, 0))
    for name in STORES:
        images[name].write_bytes(bytes(3 * SECTORS * SECTOR))
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


def nothing_written() -> Tags:
    return {name: np.zeros(SECTORS, np.uint64) for name in NAMES}


def apply(tags: Tags, writes: list[Write]) -> Tags:
    """Return the tags after writes."""
    after = {name: each.copy() for name, each in tags.items()}
    for name, first, count, tag in writes:
        after[name][first : first + count] = tag
    return after


def tags_of(data: bytes) -> np.ndarray:
    """Return the tag of each sector; fail where one is torn or stands in a wrong place."""
    words = np.frombuffer(data, "<u8").reshape(SECTORS, SECTOR // 16, 2)
    assert (words == words[:, :1, :]).all(), "a torn sector"
    assert (words[:, 0, 0] == np.arange(SECTORS)).all(), "a sector in a wrong place"
    return words[:, 0, 1]


def check_views(views: dict[str, bytes], writes: list[Write], acknowledged: int) -> Tags:
    """Check what each device shows after a kill, and return the tags."""
    expected = apply(nothing_written(), writes[:acknowledged])
    seen = {name: tags_of(data) for name, data in views.items()}
    for name, tags in seen.items():
        right = tags == expected[name]
        for other, first, count, tag in writes[acknowledged:]:
            if other == name:
                right[first : first + count] |= tags[first : first + count] == tag
        wrong = np.flatnonzero(~right)
        assert not len(wrong), (
            f"{name}: sector {wrong[0]} has tag {tags[wrong[0]]}, not "
            f"{expected[name][wrong[0]]}, after {acknowledged} writes"
        )
    return seen


def check_tags(views: dict[str, bytes], expected: Tags) -> None:
    for name, data in views.items():
        assert (tags_of(data) == expected[name]).all(), name


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

    def run(self, steps: list[Any]) -> None:
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
        self.kernel.run(None, [])

    def run(self, steps: list[Any]) -> list[Any]:
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


@contextmanager
def victim(
    folder: Path,
    images: dict[str, Path],
    writes: list[Write],
    durability: str,
    then: tuple[list[Any], float] = ([], 60),
) -> Iterator[subprocess.Popen[str]]:
    """A process that works through cow; it is killed at the end of the block, or kills itself."""
    job = folder / "victim.json"
    paths = {name: str(path) for name, path in images.items()}
    job.write_text(
        json.dumps(
            {
                "paths": paths,
                "durability": durability,
                "steps": STACK,
                "writes": writes,
                "then": then[0],
                "seconds": then[1],
            }
        )
    )
    places = [str(Path(__file__).parent.parent), *sys.path]
    with subprocess.Popen(
        [sys.executable, "-m", "kernel.victim", str(job)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(places)},
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def acknowledged(line: str) -> int:
    assert line.startswith("@did "), line
    return int(line.split()[1])


def go_on(side: Ours | Theirs, rng: random.Random, seen: Tags) -> None:
    """Write to all devices, merge the first snapshot, and check the bytes after each."""
    writes = random_writes(rng, 40, 1_000_000)
    side.write(writes)
    seen = apply(seen, writes)
    check_tags(side.views(), seen)
    side.run([*MERGE, MERGED])
    check_merged(side, seen)


def check_merged(side: Ours | Theirs, before: Tags) -> None:
    """Check that the origin is what s0 was, and s1 what it was."""
    after = side.views(("base", "s1"))
    check_tags(after, {"base": before["s0"], "s1": before["s1"]})
    used, metadata = side.used("base").split()
    assert used.split("/")[0] == metadata


# --- the tests ----------------------------------------------------------------------------------


@pytest.mark.parametrize("durability", ["process", "power"])
@pytest.mark.parametrize("number", range(4))
def test_the_kernel_goes_on_where_cow_was_killed(judge, seed, number, durability):
    rng = random.Random(f"{seed} {number} {durability}")
    folder = judge.new_folder()
    images = make_images(folder)
    writes = random_writes(rng, 1000)
    stop = rng.choice((rng.randrange(20), rng.randrange(600)))
    with victim(folder, images, writes, durability) as process:
        assert process.stdout is not None
        while acknowledged(process.stdout.readline()) < stop:
            pass
        time.sleep(rng.random() * 0.001)
        process.kill()
        done = max(map(acknowledged, process.stdout.readlines()), default=stop)
    with Theirs(judge.running(), images, judge.folder) as kernel:
        kernel.run(STACK)
        go_on(kernel, rng, check_views(kernel.views(), writes, done))


@pytest.mark.parametrize("number", range(3))
def test_cow_goes_on_where_the_kernel_was_killed(judge, seed, number):
    rng = random.Random(f"{seed} {number}")
    folder = judge.new_folder()
    images = make_images(folder)
    writes = random_writes(rng, 1000)
    stop = rng.choice((rng.randrange(20), rng.randrange(600)))
    kernel = Kernel(judge.folder)
    kernel.start(images, [*STACK, ["work", kernel_writes(writes)]])
    done = -1
    while done < stop:
        done = acknowledged(kernel.hear("@did", 60))
    time.sleep(rng.random() * 0.001)
    kernel.kill()
    done = max([done, *map(acknowledged, kernel.heard())])
    with Ours(images) as ours:
        ours.run(STACK)
        go_on(ours, rng, check_views(ours.views(), writes, done))


@pytest.mark.parametrize("number", range(8))
def test_the_kernel_ends_a_merge_that_cow_was_killed_in(judge, seed, number):
    rng = random.Random(f"{seed} {number}")
    folder = judge.new_folder()
    images = make_images(folder)
    writes = random_writes(rng, 400)
    before = apply(nothing_written(), writes)
    seconds = rng.random() * 0.0004
    with victim(folder, images, writes, "process", (MERGE, seconds)) as process:
        assert process.wait() == -signal.SIGKILL
    with Theirs(judge.running(), images, judge.folder) as kernel:
        kernel.run([*GO_ON_MERGING, MERGED])
        check_merged(kernel, before)


@pytest.mark.parametrize("number", range(3))
def test_cow_ends_a_merge_that_the_kernel_was_killed_in(judge, seed, number):
    rng = random.Random(f"{seed} {number}")
    folder = judge.new_folder()
    images = make_images(folder)
    writes = random_writes(rng, 400)
    before = apply(nothing_written(), writes)
    kernel = Kernel(judge.folder)
    kernel.start(images, [*STACK, ["work", kernel_writes(writes)], *MERGE, MERGED])
    while acknowledged(kernel.hear("@did", 60)) < len(writes):
        pass
    time.sleep(rng.random() * 0.12)
    kernel.kill()
    with Ours(images) as ours:
        ours.run([*GO_ON_MERGING, MERGED])
        check_merged(ours, before)
