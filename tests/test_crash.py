"""kill -9 at any moment: no snapshot is lost, and every acknowledged write is there.

A child writes to an origin, merges into it, writes to two snapshots of it, reloads and flushes; it
acknowledges each operation, and is killed after a random number of them. Its judge knows the same
program, so it can tell what every device has to show; only the bytes of the operation that was cut
short may be old or new. The next child goes on with what the last one left.

COW_LONG=N makes it some 60 N times as long: thousands of kills for N = 1.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from support import SECTOR, count, image, stamp
from support.crash import (
    CHUNKS,
    COW_SECTORS,
    LONG,
    ORIGIN_SECTORS,
    Nursery,
    Operation,
    Work,
    open_store,
    operations,
    table_of,
)

import cow

SIZE = ORIGIN_SECTORS * SECTOR
KILLS = 2000 * LONG or 60


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()


class Judge:
    """What the devices have to show; `merging` while snap0 is on its way into the origin."""

    def __init__(self, folder: Path, durability: str) -> None:
        self.folder = folder
        self.durability = durability
        contents = stamp(0, ORIGIN_SECTORS, 7)
        image(folder / "origin.img", contents)
        # One store is a sparse file, whose holes are written by other means; the other one grows.
        image(folder / "snap1.cow", 0)
        os.truncate(folder / "snap1.cow", COW_SECTORS * SECTOR)
        self.contents = {name: np.frombuffer(contents, "u1").copy() for name in ("base", "snap1")}
        self.merging = False
        self.new_snapshot()

    def new_snapshot(self) -> None:
        """Let snap0 be a fresh snapshot of what the origin shows now."""
        image(self.folder / "snap0.cow", CHUNKS["snap0"])
        self.contents["snap0"] = self.contents["base"].copy()

    def work(self, seed: int, stream: str) -> Work:
        return Work(seed, str(self.folder), self.durability, self.merging, stream)

    def apply(self, work: Work, last: int) -> list[Operation]:
        """Do what was acknowledged, and return the operation under way when the child died."""
        program = operations(work)
        for operation in itertools.islice(program, last + 1):
            self.do(operation)
        under_way = list(itertools.islice(program, 1))
        if under_way and under_way[0].kind in ("merge", "handover"):
            # Whether or not it has begun: what a merge reads and leaves behind is the same.
            self.do(under_way[0])
        return under_way

    def do(self, operation: Operation) -> None:
        if operation.kind in ("merge", "handover"):
            self.merging = True
            self.contents["base"] = self.contents.pop("snap0")
        for offset, data in operation.writes:
            self.contents[operation.device][offset : offset + len(data)] = np.frombuffer(data, "u1")

    def check(self, under_way: list[Operation], where: str) -> None:
        """Open what was left behind and compare; what is read is what the next child begins with.

        The COW device of a merge is opened as a snapshot: so it is not merged by the looking.
        """
        plain = self.work(0, "all")._replace(merging=False)
        with cow.Mapper(durability=self.durability) as dm:
            open_store(dm, plain)
            dm.create("base-real", table_of(plain, "base-real"))
            for name in ("snap0", "snap1"):
                dm.create(name, table_of(plain, name))
                assert "/" in dm.status(name), f"{where}: {dm.status(name)}"
            dm.create("base", table_of(plain, "base"))
            for name, before in self.contents.items():
                source = "snap0" if self.merging and name == "base" else name
                writes = [
                    write
                    for operation in under_way
                    if operation.device == name
                    for write in operation.writes
                ]
                self.compare(dm, source, before, f"{where}: {name}", writes)
        if self.merging:
            self.contents.pop("snap0", None)

    def compare(
        self,
        dm: cow.Mapper,
        device: str,
        before: np.ndarray,
        where: str,
        writes: Sequence[tuple[int, bytes]] = (),
    ) -> None:
        """Compare each byte with what it was, and with what each of the cut writes makes it."""
        data = np.frombuffer(dm.device(device).pread(SIZE, 0), "u1")
        good = data == before
        for offset, new in writes:
            place = slice(offset, offset + len(new))
            good[place] |= data[place] == np.frombuffer(new, "u1")
        wrong = np.flatnonzero(~good)
        assert not len(wrong), f"{where}: wrong at {wrong[0]} and {len(wrong) - 1} more bytes"
        before[:] = data

    def finish_merge(self, where: str) -> None:
        """Finish the merge that was cut short, and begin anew with a fresh snapshot."""
        work = self.work(0, "all")
        with cow.Mapper(durability=self.durability) as dm:
            open_store(dm, work)
            for name in ("base-real", "snap1", "base"):
                dm.create(name, table_of(work, name))
            self.compare(dm, "base", self.contents["base"], f"{where}: merging")
            used, metadata = dm.wait_merge("base", timeout=60).split(" ", 3)[3].split()
            assert used.split("/")[0] == metadata, where
            for device in ("base", "base-real"):
                self.compare(dm, device, self.contents["base"], f"{where}: merged {device}")
            self.compare(dm, "snap1", self.contents["snap1"], f"{where}: sibling")
        self.merging = False
        self.new_snapshot()


@pytest.mark.parametrize("durability", ["process", "power"])
def test_a_killed_process_loses_nothing(tmp_path, seed, durability, nursery):
    rng = random.Random(f"{seed}/{durability}")
    judge = Judge(tmp_path, durability)
    for kill in range(KILLS):
        stream = "all" if judge.merging or rng.random() < 0.7 else "both"
        work = judge.work(rng.randrange(1 << 32), stream)
        after = rng.choice((0, 1, rng.randrange(1, 40), rng.randrange(1, 300)))
        acked, how = nursery.kill_one(work, after, rng.randrange(20000))
        where = f"kill {kill}, {work}, acknowledged {acked}, {how}"
        assert how in ("killed", "done"), where
        streams = ["all"] if stream == "all" else ["origin", "snapshots"]
        under_way = [
            operation
            for name in streams
            for operation in judge.apply(work._replace(stream=name), acked[name])
        ]
        judge.check(under_way, where)
        if judge.merging and (how == "done" or rng.random() < 0.5):
            judge.finish_merge(where)
        count("processes killed at work", how == "killed")
