"""Power cuts: whatever part of the unflushed writes reached the disk, no snapshot is lost.

An origin and the stores of its snapshots lie on one disk below a log-writes target, which records
every write and every flush with its range. From that log each state is built that the disk may be
in after a cut at any moment (support/crash.py), opened with a new mapper, and compared: a snapshot
shows what it was frozen with and what was flushed to it, whatever the origin shows; what was
written to it since is old or new, sector by sector.

Programs of a few operations are taken through all their states. Where more than MOST sectors-worth
of states are pending at once (one wide write), and for the long random programs, states are chosen:
everything, nothing, single sectors, prefixes, and random subsets.

COW_LONG=N: programs of three operations instead of two, and N times as many random ones.
"""

from __future__ import annotations

import itertools
import os
import random
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import SECTOR, area_location, count, stamp, store_bytes, wait_merge
from support.crash import FLUSH, LONG, MARK, PAGE, Content, Cuts, Entry, read_log

import cow

MOST = 1 << 12
LOG_SECTORS = 1 << 15


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder in memory, where there is one: the states are many, and nothing here is durable."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as name:
        yield Path(name)


class Plan:
    """How the disk is divided, and what is on it before the program that is recorded."""

    def __init__(
        self,
        chunk: int = 1,
        *,
        origin: int = 8,
        store: int = 24,
        kind: str = "P",
        preset: int = 0,
        snapshots: int = 1,
        growing: bool = False,
        stacked: bool = False,
    ) -> None:
        self.chunk = chunk
        self.origin = origin
        self.store = store
        self.kind = kind
        self.snapshots = snapshots
        self.sectors = origin + 2 * store
        self.growing = growing
        # The second snapshot is one of the first, which is written through its origin `top`.
        self.stacked = stacked
        disk = bytearray(stamp(0, origin, 1))
        for number in range(2):
            if number >= snapshots and growing:
                part = bytearray(store * SECTOR)
            elif number >= snapshots:
                # What a store left behind that was wiped by its first sector: all but the magic.
                part = store_bytes([(i, i + 2) for i in range(3)], chunk, size=store * SECTOR)
                part[0:4] = bytes(4)
            else:
                # Exceptions from the end of the origin backwards, so that a merge takes many runs.
                part = store_bytes(
                    [(origin // chunk - 1 - i, self.place(i)) for i in range(preset)],
                    chunk,
                    size=store * SECTOR,
                )
                for i in range(preset):
                    at = self.place(i) * chunk * SECTOR
                    part[at : at + chunk * SECTOR] = stamp(1000 + i * chunk, chunk, 2 + number)
            disk += part
        self.disk = bytes(disk)
        if growing:
            # Only the origin and the first pages of the store are in the file so far.
            used = (origin * SECTOR + 2 * PAGE - 1) // PAGE * PAGE
            assert not any(self.disk[used:])
            self.disk = self.disk[:used]

    def place(self, number: int) -> int:
        """Return the store chunk of the exception that is allocated as the `number`-th."""
        return number + 2 + number // (32 * self.chunk)

    @property
    def tight(self) -> bool:
        """Whether a store cannot hold all of the origin."""
        return self.place(self.origin // self.chunk) >= self.store // self.chunk

    def line(self, number: int, kind: str = "snapshot") -> str:
        below = "snap0" if self.stacked and number else "base-real"
        return f"0 {self.origin} {kind} {below} cow{number} {self.kind} {self.chunk}"

    def open(self, dm: cow.Mapper, path: Path, log: Path | None = None) -> None:
        """Make the devices up to origin and COW devices, recorded where there is a log."""
        if self.growing:
            dm.image(str(path), size=self.sectors * SECTOR)
        words = f"linear {path} 0" if log is None else f"log-writes {path} {log}"
        dm.create("disk", f"0 {self.sectors} {words}")
        dm.create("base-real", f"0 {self.origin} linear disk 0")
        for number in range(2):
            start = self.origin + number * self.store
            dm.create(f"cow{number}", f"0 {self.store} linear disk {start}")


class Legal:
    """What may be read at one moment: of each snapshot, and of the origin while it is merged."""

    def __init__(self) -> None:
        self.snapshots: dict[int, Content] = {}
        self.merged: Content | None = None
        self.merging = 0

    def copy(self) -> Legal:
        other = Legal()
        other.snapshots = {number: each.copy() for number, each in self.snapshots.items()}
        other.merged = self.merged.copy() if self.merged else None
        other.merging = self.merging
        return other


class Recorder:
    """Runs a program on recorded devices, and keeps what is legal at each mark."""

    def __init__(self, plan: Plan, folder: Path, rng: random.Random, disk: bytes = b"") -> None:
        self.plan = plan
        self.rng = rng
        self.path, self.log = folder / "disk.img", folder / "disk.log"
        self.before = disk or plan.disk
        self.path.write_bytes(self.before)
        self.log.write_bytes(b"")
        os.truncate(self.log, LOG_SECTORS * SECTOR)
        self.legal: dict[str, Legal] = {}
        self.now = Legal()
        self.tag = 10

    def run(self, program: list[tuple[Any, ...]]) -> list[Entry]:
        """Run the program and return its log."""
        plan = self.plan
        with cow.Mapper() as dm:
            self.dm = dm
            plan.open(dm, self.path, self.log)
            self.origin = Content(dm.device("base-real").pread(plan.origin * SECTOR, 0))
            for number in range(plan.snapshots):
                dm.create(f"snap{number}", plan.line(number))
                self.now.snapshots[number] = Content(self.read(f"snap{number}"))
            dm.create("base", f"0 {plan.origin} snapshot-origin base-real")
            if plan.stacked:
                dm.create("top", f"0 {plan.origin} snapshot-origin snap0")
            self.mark("start")
            for index, operation in enumerate(program):
                getattr(self, operation[0])(f"{index}", *operation[1:])
            if self.now.merged:
                dm.wait_merge("base", timeout=60)
                self.mark("merged")
            assert "disabled" not in dm.status("disk")
        return read_log(self.log)

    def read(self, name: str) -> bytes:
        return self.dm.device(name).pread(self.plan.origin * SECTOR, 0)

    def mark(self, text: str) -> None:
        last = next(reversed(self.legal.values()), None)
        for number, content in self.now.snapshots.items():
            name = f"snap{number}"
            if name in self.dm.names() and "Invalid" in self.dm.status(name):
                content.may_be_invalid = True
                if last and number in last.snapshots:
                    last.snapshots[number].may_be_invalid = True
        self.legal[text] = self.now.copy()
        self.dm.message("disk", 0, f"mark {text}")

    def content(self, device: str) -> Content:
        """Return what a device shows; nothing is claimed of an origin that is not merged into."""
        if device == "base":
            return self.now.merged or self.origin
        return self.now.snapshots[0 if device == "top" else int(device[4:])]

    def data(self, length: int) -> bytes:
        self.tag += 1
        return stamp(self.tag * 100, -(-length // SECTOR), self.tag)[:length]

    # The operations. What may be read while one is under way is told before, and again after.

    def write(self, mark: str, device: str, offset: int, length: int) -> None:
        data = self.data(length)
        self.content(device).write(offset, data)
        self.mark(mark + "-begun")
        try:
            self.dm.device(device).pwrite(data, offset)
        except OSError:
            # An overflow: what came before the chunk that found no room is written.
            assert device != "base"
            if "Overflow" in self.dm.status(device):
                self.now.snapshots[int(device[4:])].now[:] = self.read(device)
        self.mark(mark)

    def flush(self, mark: str, device: str) -> None:
        self.dm.device(device).flush()
        self.content(device).flush()
        self.mark(mark)

    def many(self, mark: str, device: str, offsets: tuple[int, ...], length: int) -> None:
        """Write several blocks in one call; they may overlap."""
        blocks = [self.data(length) for _ in offsets]
        for offset, data in zip(offsets, blocks, strict=True):
            self.content(device).write(offset, data)
        self.mark(mark + "-begun")
        self.dm.device(device).write_many(
            offsets, np.frombuffer(b"".join(blocks), "u1").reshape(-1, length)
        )
        self.mark(mark)

    def create(self, mark: str, number: int) -> None:
        """Make a snapshot as LVM does: what the origin shows is on the disk before."""
        if number in self.now.snapshots:
            return
        origin = "top" if self.plan.stacked else "base"
        self.dm.device(origin).flush()
        self.dm.suspend(origin)
        self.content(origin).flush()
        self.now.snapshots[number] = self.content(origin).copy()
        self.mark(mark + "-begun")
        self.dm.create(f"snap{number}", self.plan.line(number))
        self.dm.resume(origin)
        self.mark(mark)

    def reload(self, mark: str, number: int) -> None:
        self.dm.load(f"snap{number}", self.plan.line(number))
        self.dm.resume(f"snap{number}")

    def reopen(self, mark: str, number: int) -> None:
        """Remove a snapshot and make it again from its store, the origin suspended."""
        self.dm.suspend("base")
        self.dm.remove(f"snap{number}")
        self.dm.create(f"snap{number}", self.plan.line(number))
        self.dm.resume("base")

    def merge(self, mark: str, number: int) -> None:
        """Begin to merge; it goes on beside the operations that follow. Not what is invalid."""
        if self.now.snapshots[number].may_be_invalid:
            return
        self.dm.suspend("base")
        self.now.merged = self.now.snapshots.pop(number)
        self.now.merging = number
        self.mark(mark + "-begun")
        self.dm.remove(f"snap{number}")
        self.dm.load("base", self.plan.line(number, "snapshot-merge"))
        self.dm.resume("base")
        self.mark(mark)

    def wait(self, mark: str) -> None:
        self.dm.wait_merge("base", timeout=60)
        self.mark(mark)


class Judge:
    """Opens states and compares them with what is legal."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan = plan
        self.path = folder / "state.img"

    def check(self, state: bytes, legal: Legal, where: str) -> None:
        legal = legal.copy()
        plan = self.plan
        if plan.growing:
            state = state[: max(len(plan.disk), -(-len(state.rstrip(b"\0")) // PAGE) * PAGE)]
        self.path.write_bytes(state)
        with cow.Mapper() as dm:
            plan.open(dm, self.path)
            for number, content in legal.snapshots.items():
                name = f"snap{number}"
                dm.create(name, plan.line(number))
                self.compare(dm, name, content, where)
            if legal.merged is None:
                return
            dm.create("base", plan.line(legal.merging, "snapshot-merge"))
            self.compare(dm, "base", legal.merged, f"{where}, merging")
            used, metadata = wait_merge(dm, "base").split(" ", 3)[3].split()
            assert used.split("/")[0] == metadata, where
            for name in ("base", "base-real"):
                self.compare(dm, name, legal.merged, f"{where}, merged")
            for number, content in legal.snapshots.items():
                # The rest of the merge may have been too much for a sibling.
                content.may_be_invalid |= plan.tight
                self.compare(dm, f"snap{number}", content, f"{where}, merged")

    def compare(self, dm: cow.Mapper, name: str, content: Content, where: str) -> None:
        if "Invalid" in dm.status(name):
            assert content.may_be_invalid, f"{where}: {name} is invalid"
            return
        wrong = content.wrong(dm.device(name).pread(self.plan.origin * SECTOR, 0))
        assert not wrong, f"{where}: {name} is wrong in sectors {wrong}"


def visit(
    plan: Plan,
    folder: Path,
    program: list[tuple[Any, ...]],
    seed: int,
    most: int = MOST,
    before: bytes = b"",
    keep: int = 0,
) -> tuple[Cuts, list[bytes]]:
    """Run a program and judge every state. Return the count, and a choice of `keep` states."""
    rng = random.Random(seed)
    recorder = Recorder(plan, folder, rng, before)
    entries = recorder.run(program)
    full = recorder.before.ljust(plan.sectors * SECTOR, b"\0")
    judge = Judge(plan, folder)
    cuts = Cuts(most, rng)
    kept: list[bytes] = []
    for mark, state in cuts.of(full, entries):
        if mark:
            where = f"{program} cut after mark {mark!r} (state {cuts.visited})"
            judge.check(state, recorder.legal[mark], where)
            if len(kept) < keep:
                kept.append(state)
            elif keep and rng.randrange(cuts.visited) < keep:
                kept[rng.randrange(keep)] = state
    count("disk states after a power cut", cuts.visited)
    return cuts, kept


# --- every state of every short program ---------------------------------------------------------

SHORT = [
    ("write", "base", 512, 512),
    ("write", "base", 1024, 1536),
    ("write", "snap0", 1536, 512),
    ("write", "snap0", 700, 1000),
    ("flush", "base"),
    ("flush", "snap0"),
    ("create", 1),
    ("reopen", 0),
    ("reload", 0),
    ("many", "snap0", (512, 0, 512, 2048), 700),
    ("many", "base", (2048, 1024), 512),
]


@pytest.mark.parametrize("chunk", [1, 2])
def test_every_state_of_every_short_program(folder, seed, chunk):
    plan = Plan(chunk, store=24 * chunk)
    wide = 0
    for program in itertools.product(SHORT, repeat=3 if LONG else 2):
        cuts, _ = visit(plan, folder, list(program), seed)
        # A few programs of three wide writes have more states than MOST.
        wide += not cuts.all_of_them
    assert LONG or not wide


EDGES = {
    "an area becomes full": (1, 31, [("write", "base", 0, 1024), ("write", "snap0", 1024, 512)]),
    "an area was full": (1, 32, [("write", "base", 0, 512), ("write", "snap0", 1024, 1024)]),
    "one write fills an area twice over": (1, 30, [("write", "snap0", 0, 4 * 512)]),
    "records lie across two sectors": (2, 30, [("write", "base", 0, 4096)]),
    "a whole chunk and parts of two": (2, 2, [("write", "snap0", 512, 2048)]),
    "a copy of eight sectors": (8, 0, [("write", "base", 4608, 512), ("flush", "base")]),
}


@pytest.mark.parametrize("name", EDGES)
def test_every_state_where(folder, seed, name):
    chunk, preset, program = EDGES[name]
    plan = Plan(chunk, origin=40 * chunk, store=80 * chunk, preset=preset)
    cuts, _ = visit(plan, folder, program, seed)
    assert cuts.all_of_them


@pytest.mark.parametrize("chunk", [1, 4])
def test_every_state_of_a_store_being_made_over_an_old_one(folder, seed, chunk):
    plan = Plan(chunk, store=16 * chunk, snapshots=0)
    program = [("create", 1), ("write", "base", 512, 512), ("write", "snap1", 1024, 512)]
    cuts, _ = visit(plan, folder, program, seed)
    assert cuts.all_of_them


STALE = {
    "in the next area": (1, 31, 1, 0, [("write", "base", 0, 512), ("write", "snap0", 512, 512)]),
    "in the area after a wide write": (1, 30, 1, 2, [("write", "snap0", 512, 4 * 512)]),
    "behind the end of the list": (2, 30, 0, 32, [("write", "base", 1024, 2048)]),
}


@pytest.mark.parametrize("where", STALE)
def test_every_state_with_an_old_record(folder, seed, where):
    """No cut brings it to life: it is zeroed, and that is durable, before the list gets there."""
    chunk, preset, area, index, program = STALE[where]
    plan = Plan(chunk, origin=40 * chunk, store=80 * chunk, preset=preset)
    disk = bytearray(plan.disk)
    at = (plan.origin + area_location(area, chunk) * chunk) * SECTOR + index * 16
    disk[at : at + 16] = struct.pack("<QQ", 7, 70)
    cuts, _ = visit(plan, folder, program, seed, before=bytes(disk))
    assert cuts.all_of_them


def test_every_state_of_a_repair(folder, seed, monkeypatch):
    """No cut leaves a file that looks like a store and is not all of it; at the end it is safe."""
    size = 48 * SECTOR
    damaged = store_bytes([(0, 2), (2, 2), (5, 4), (6, 5)], 1, size=size)
    damaged[2 * SECTOR : 6 * SECTOR] = stamp(0, 4, 3)
    (folder / "bad").write_bytes(damaged)
    entries: list[Entry] = []

    def pwrite(file: int, data: bytes, offset: int, real=os.pwrite) -> int:
        entries.append(Entry(offset // SECTOR, len(data) // SECTOR, 0, 0, bytes(data)))
        return real(file, data, offset)

    def fsync(file: int, real=os.fsync) -> None:
        real(file)
        entries.append(Entry(0, 0, FLUSH, 0, b""))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        patch.setattr(os, "fsync", fsync)
        assert cow.store.repair(folder / "bad", folder / "new").kept == 3
    whole = (folder / "new").read_bytes()
    entries.append(Entry(0, 0, MARK, 4, b"done"))
    cuts = Cuts(MOST, random.Random(seed))
    for mark, state in cuts.of(bytes(size), entries):
        (folder / "new").write_bytes(state)
        if mark or state[:4] == whole[:4]:
            assert state == whole
    assert cuts.all_of_them
    count("disk states after a power cut", cuts.visited)


@pytest.mark.parametrize("name", ["new", "./new", None])
def test_the_name_of_a_repaired_store_is_durable(folder, name, monkeypatch):
    (folder / "bad").write_bytes(store_bytes([(0, 2)], 1, size=8 * SECTOR))
    synced = []

    def fsync(file: int, real=os.fsync) -> None:
        real(file)
        synced.append(os.readlink(f"/proc/self/fd/{file}"))

    monkeypatch.chdir(folder)
    monkeypatch.setattr(os, "fsync", fsync)
    cow.store.repair("bad", name or folder / "new")
    assert synced[-2:] == [str(folder / "new"), str(folder)]


@pytest.mark.parametrize("kind", ["P", "PO"])
@pytest.mark.parametrize("device", ["base", "snap0"])
def test_every_state_of_an_overflow(folder, seed, kind, device):
    # Header, area and four chunks; the fifth exception finds no room.
    plan = Plan(1, store=6, kind=kind)
    program = [
        ("write", device, 0, 3 * 512),
        ("write", device, 3 * 512, 1024),
        ("write", "base", 6 * 512, 512),
        ("write", "base", 0, 512),
    ]
    cuts, _ = visit(plan, folder, program, seed)
    assert cuts.all_of_them


@pytest.mark.parametrize("chunk", [1, 8])
def test_every_state_of_a_growing_store(folder, seed, chunk):
    plan = Plan(chunk, origin=4 * chunk, store=48 * chunk, growing=True)
    program = [
        ("write", "base", 0, 512),
        ("write", "snap0", 2 * chunk * 512, chunk * 512),
        ("write", "base", chunk * 512, 512),
    ]
    cuts, _ = visit(plan, folder, program, seed)
    assert cuts.all_of_them


MERGES = {
    "nothing else": (1, 5, [("merge", 0), ("wait",)]),
    "two areas": (1, 34, [("merge", 0), ("wait",)]),
    "records across two sectors": (2, 34, [("merge", 0), ("wait",)]),
    "a sibling": (1, 4, [("create", 1), ("merge", 0), ("wait",)]),
    "writes beside": (1, 4, [("merge", 0), ("write", "base", 37 * 512, 1024), ("flush", "base")]),
    "writes before": (1, 3, [("write", "snap0", 39 * 512, 512), ("merge", 0), ("wait",)]),
}


@pytest.mark.parametrize("name", MERGES)
def test_every_state_of_a_merge_with(folder, seed, name):
    chunk, preset, program = MERGES[name]
    plan = Plan(chunk, origin=40 * chunk, store=80 * chunk, preset=preset)
    visit(plan, folder, program, seed, most=1 << 10)


NEEDED = {
    "copies": (
        Plan(1, origin=40, store=80, preset=31),
        [("write", "base", 0, 1024), ("write", "base", 1024, 512)],
    ),
    "a fresh store": (Plan(1, store=16, snapshots=0), [("create", 1), ("write", "base", 512, 512)]),
    "an overflow": (
        Plan(1, store=6),
        [("write", "base", 0, 3 * 512), ("write", "base", 3 * 512, 1024)],
    ),
    "a merge": (Plan(1, preset=3), [("merge", 0), ("wait",)]),
}


def judge_all(judge: Judge, recorder: Recorder, cuts: Cuts, entries: list[Entry]) -> None:
    for mark, state in cuts.of(recorder.before, entries):
        if mark:
            judge.check(state, recorder.legal[mark], mark)


@pytest.mark.parametrize("name", NEEDED)
def test_every_barrier_is_needed_for(folder, seed, name):
    """The proof of the proof: without any one of the flushes, a state is found that is wrong."""
    plan, program = NEEDED[name]
    rng = random.Random(seed)
    recorder = Recorder(plan, folder, rng)
    entries = recorder.run(program)
    judge = Judge(plan, folder)
    flushes = [i for i, entry in enumerate(entries) if entry.flags & FLUSH]
    if name == "a fresh store":
        flushes.pop(0)  # LVM's, of an origin that has nothing to flush here
    if name == "a merge":
        flushes.pop()  # only keeps the last step from being done twice
    assert flushes
    for i in flushes:
        with pytest.raises(AssertionError, match=r"is wrong|is invalid"):
            judge_all(judge, recorder, Cuts(MOST, rng), entries[:i] + entries[i + 1 :])


@pytest.mark.parametrize("chunk", [1, 2])
def test_every_state_of_a_snapshot_of_a_snapshot(folder, seed, chunk):
    plan = Plan(chunk, store=24 * chunk, stacked=True, preset=2)
    program = [
        ("write", "top", 0, 512),
        ("create", 1),
        ("write", "base", 1024, 512),
        ("write", "top", 0, 1024),
        ("write", "snap1", 7 * 512, 512),
        ("write", "base", 0, 512),
    ]
    cuts, _ = visit(plan, folder, program, seed)
    assert cuts.all_of_them


# --- cut after cut, and long programs -----------------------------------------------------------

AGAIN = [
    (1, 30, [("write", "base", 0, 4 * 512)]),
    (2, 30, [("write", "snap0", 0, 8 * 512)]),
    (2, 33, [("merge", 0), ("wait",)]),
    (1, 34, [("merge", 0), ("wait",)]),
]


@pytest.mark.parametrize("case", range(len(AGAIN)))
def test_a_cut_after_a_cut(folder, seed, case):
    """What a torn write left behind the list of records must not come back to life."""
    chunk, preset, program = AGAIN[case]
    plan = Plan(chunk, origin=40 * chunk, store=80 * chunk, preset=preset)
    _, states = visit(plan, folder, program, seed, most=64, keep=15 * (LONG or 1))
    rng = random.Random(seed)
    for state in states:
        size = chunk * SECTOR
        offset = rng.randrange(8) * size
        again = [
            ("write", "snap0", offset, rng.randrange(1, 6) * size),
            ("write", "base", rng.randrange(20) * size, rng.randrange(1, 10) * size),
            ("flush", "snap0"),
            ("write", "snap0", rng.randrange(20) * size, size),
        ]
        visit(plan, folder, again[: rng.randrange(2, 5)], seed, 16, state)


def random_program(rng: random.Random, plan: Plan, length: int) -> list[tuple[Any, ...]]:
    program: list[tuple[Any, ...]] = []
    alive, merging = ["snap0"], False
    while len(program) < length:
        dice = rng.random()
        device = rng.choice(["base", *alive])
        size = rng.choice((512, 512, 700, 1024, 2048, plan.chunk * 512, 3 * plan.chunk * 512))
        if dice < 0.1:
            room = plan.origin * SECTOR - size
            offsets = tuple(rng.randrange(0, room, 512) for _ in range(rng.randrange(1, 6)))
            # A batch that overflows a store is an error in the middle of it.
            program.append(("many", "base" if plan.tight else device, offsets, size))
        elif dice < 0.7:
            offset = rng.randrange(plan.origin * SECTOR - size)
            offset -= offset % 512 if rng.random() < 0.8 else 0
            program.append(("write", device, offset, size))
        elif dice < 0.8:
            program.append(("flush", device))
        elif dice < 0.87 and alive:
            kind = rng.choice(("reload", "reload" if merging else "reopen"))
            program.append((kind, int(rng.choice(alive)[4:])))
        elif dice < 0.94 and "snap1" not in alive and not merging:
            program.append(("create", 1))
            alive.append("snap1")
        elif dice > 0.97 and not merging and len(program) > length // 2:
            program.append(("merge", 0))
            alive.remove("snap0")
            merging = True
    return program


def test_states_of_long_random_programs(folder, seed):
    rng = random.Random(seed)
    for number in range(100 * LONG or 12):
        chunk = rng.choice((1, 1, 2, 4, 8))
        # Some of the stores are too small, others of more than one area.
        plan = Plan(
            chunk,
            origin=rng.choice((16, 48)) * chunk,
            store=rng.choice((12, 80, 160)) * chunk,
            kind=rng.choice(("P", "PO")),
            preset=rng.randrange(4),
        )
        program = random_program(rng, plan, rng.randrange(5, 25))
        visit(plan, folder, program, seed + number, most=4)
