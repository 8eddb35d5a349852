"""Many threads on the same devices: nothing is lost, misplaced or seen too late.

Every sector carries its own number and the tag of the write that put it there, so that a
misplaced one says where it came from. Each writer has sectors of its own, in pieces of three, so
that writers meet in every chunk but never in a sector.

Reading sectors of a live device while another thread writes them is a race of the readers' own
making, as on any disk, and the thread sanitizer reports it as one. So in its build every fourth
piece is quiet: nobody writes it, and those who read a live device read only there. A table swapped
or a merge passing by still moves under them. Readers of snapshots read everywhere: whatever the
sanitizer finds there is a bug, and nothing is suppressed.
"""

from __future__ import annotations

import itertools
import os
import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support import SECTOR, Rig, image, stamp, stamps, wait_merge

import cow

SECTORS = 1536
WRITERS = 3
PIECE = 3
TSAN = os.environ.get("COW_BUILD") == "tsan"
STRIDE = WRITERS + 1 if TSAN else WRITERS


@pytest.fixture
def dm():
    with cow.Mapper(durability="process") as mapper:
        yield mapper


@pytest.fixture
def rig(dm, tmp_path):
    return Rig(dm, tmp_path, sectors=SECTORS)


class Crew:
    """Threads that work until they are told to stop; an error in one is an error of the test."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.errors: list[BaseException] = []
        self.threads: list[threading.Thread] = []

    def start(self, work: Callable[..., None], *args: Any) -> None:
        def run() -> None:
            try:
                work(*args)
            except BaseException as error:
                self.errors.append(error)
                self.stop.set()

        thread = threading.Thread(target=run, daemon=True)
        self.threads.append(thread)
        thread.start()

    def finish(self) -> None:
        """Stop every thread, and fail with the first error any of them met."""
        self.stop.set()
        for thread in self.threads:
            thread.join(60)
            assert not thread.is_alive(), "a thread hangs"
        if self.errors:
            raise self.errors[0]

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self.finish()
        self.stop.set()


class Writers:
    """Threads that write stamped sectors to a device; `last` tells the last tag of each sector."""

    def __init__(self, crew: Crew, device: Any) -> None:
        self.device = device
        self.crew = crew
        self.last = np.zeros(SECTORS, np.int64)
        self.rounds = [0] * WRITERS
        for writer in range(WRITERS):
            crew.start(self.work, writer)

    def work(self, writer: int) -> None:
        rng = random.Random(writer)
        own = range(writer, SECTORS // PIECE, STRIDE)
        for tag in itertools.count(1):
            piece = rng.choice(own) * PIECE
            number = tag * WRITERS + writer
            if tag % 5:
                self.device.pwrite(stamp(piece, PIECE, number), piece * SECTOR)
            else:
                offsets = np.array([piece, piece + 1, piece + 2], np.uint64) * SECTOR
                data = np.frombuffer(stamp(piece, PIECE, number), np.uint8)
                self.device.write_many(offsets, data.reshape(PIECE, SECTOR))
            self.last[piece : piece + PIECE] = number
            self.rounds[writer] = tag
            if self.crew.stop.is_set():
                return

    def wait_for_more(self, count: int = 60) -> None:
        """Return when every writer has written `count` times more."""
        goal = [done + count for done in self.rounds]
        while any(done < more for done, more in zip(self.rounds, goal, strict=True)):
            if self.crew.stop.wait(0.0002):
                return

    def expected(self, before: bytes) -> bytes:
        """Return what the device must hold once the writers have stopped."""
        data = bytearray(before)
        for sector in np.flatnonzero(self.last).tolist():
            at = sector * SECTOR
            data[at : at + SECTOR] = stamp(sector, 1, int(self.last[sector]))
        return bytes(data)


def check_numbers(data: bytes, first: int = 0) -> None:
    """Check that every 16 bytes carry the number of the sector they lie in."""
    words = np.frombuffer(data, "<u8").reshape(-1, SECTOR // 16, 2)[:, :, 0]
    wrong = np.flatnonzero((words != np.arange(first, first + len(words))[:, None]).any(axis=1))
    assert not len(wrong), f"sector {first + wrong[0]} holds {words[wrong[0]][:4]}"


def read_on(crew: Crew, device: Any) -> None:
    """Read random ranges until the crew stops; every sector must be where it belongs."""
    rng = random.Random(len(crew.threads))
    buffer = bytearray(64 * SECTOR)
    while not crew.stop.is_set():
        first = rng.randrange(SECTORS - 64)
        if rng.random() < 0.5:
            check_numbers(device.pread(64 * SECTOR, first * SECTOR), first)
        else:
            assert device.preadinto(buffer, first * SECTOR) == len(buffer)
            check_numbers(bytes(buffer), first)


def read_live(crew: Crew, device: Any) -> None:
    """Read a device that others write: random ranges, or quiet pieces under the sanitizer."""
    if not TSAN:
        read_on(crew, device)
        return
    rng = random.Random(len(crew.threads))
    buffer = bytearray(PIECE * SECTOR)
    while not crew.stop.is_set():
        first = rng.choice(range(WRITERS, SECTORS // PIECE, STRIDE)) * PIECE
        assert device.preadinto(buffer, first * SECTOR) == len(buffer)
        check_numbers(bytes(buffer), first)


def freeze(rig: Rig, name: str, words: str) -> bytes:
    """Take a snapshot while others write, and return what it must hold for ever."""
    rig.cows[name] = image(rig.folder / f"{name}.cow", 4 * SECTORS)
    rig.dm.suspend("base")
    moment = rig.read("base-real")
    rig.dm.create(name, rig.line(name, words))
    rig.dm.resume("base")
    return moment


def test_writers_of_one_chunk_lose_nothing(rig):
    with Crew() as crew:
        writers = Writers(crew, rig.dm.device("base"))
        writers.wait_for_more(2000)
    assert rig.read("base") == writers.expected(rig.before)


def test_writers_that_share_commits_lose_nothing(tmp_path):
    with cow.Mapper(durability="power") as dm:
        rig = Rig(dm, tmp_path, sectors=SECTORS)
        rig.snap("snap", "P 1", cow_sectors=4 * SECTORS)
        rig.snap("other", "P 8", cow_sectors=4 * SECTORS)
        with Crew() as crew:
            writers = Writers(crew, dm.device("base"))
            writers.wait_for_more(200)
        assert rig.read("base") == writers.expected(rig.before)
        assert rig.read("snap") == rig.read("other") == rig.before


def test_writers_of_one_snapshot_lose_nothing(rig):
    device = rig.snap("snap", "P 8", cow_sectors=4 * SECTORS)
    with Crew() as crew:
        writers = Writers(crew, device)
        writers.wait_for_more(2000)
    assert rig.read("snap") == writers.expected(rig.before)
    assert rig.read("base") == rig.before


def test_a_snapshot_never_changes_while_the_origin_is_written(rig):
    with Crew() as crew:
        writers = Writers(crew, rig.dm.device("base"))
        moments = {}
        for number, words in enumerate(["P 8", "N 4", "PO 16", "P 1", "P 64", "N 8"]):
            writers.wait_for_more()
            moments[f"s{number}"] = freeze(rig, f"s{number}", words)
            crew.start(read_on, crew, rig.dm.device(f"s{number}"))
            writers.wait_for_more()
            for name, moment in moments.items():
                assert rig.read(name) == moment
    assert rig.read("base") == writers.expected(rig.before)
    assert {name: rig.read(name) for name in moments} == moments


def test_a_moment_holds_no_torn_sector(rig):
    with Crew() as crew:
        writers = Writers(crew, rig.dm.device("base"))
        for number in range(20):
            writers.wait_for_more()
            moment = freeze(rig, f"s{number}", "P 8")
            assert (-1, -1) not in stamps(moment)
            assert stamps(rig.read(f"s{number}")) == stamps(moment)
            rig.dm.remove(f"s{number}")


def test_readers_see_every_sector_in_its_place_while_tables_are_swapped(rig):
    with Crew() as crew:
        for name in ("base", "base", "base-real"):
            crew.start(read_live, crew, rig.dm.device(name))
        writers = Writers(crew, rig.dm.device("base"))
        half = SECTORS // 2
        for number in range(60):
            writers.wait_for_more(10)
            table = f"0 {SECTORS} linear {rig.origin} 0"
            if number % 2:
                table = f"0 {half} linear {rig.origin} 0\n{half} {half} linear {rig.origin} {half}"
            rig.dm.load("base-real", table)
            rig.dm.resume("base-real")
    assert rig.read("base") == writers.expected(rig.before)


def test_a_snapshot_reloaded_under_readers_keeps_its_moment(rig):
    with Crew() as crew:
        writers = Writers(crew, rig.dm.device("base"))
        writers.wait_for_more()
        moment = freeze(rig, "snap", "P 8")
        crew.start(read_on, crew, rig.dm.device("snap"))
        for number in range(60):
            writers.wait_for_more(10)
            rig.dm.load("snap", rig.line("snap", ["P 8", "PO 8"][number % 2]))
            rig.dm.resume("snap")
        assert rig.read("snap") == moment
    assert rig.read("snap") == moment


@pytest.mark.parametrize("turn", range(8))
def test_a_merge_under_writers_and_readers_loses_nothing(rig, turn):
    for chunk in range(turn, SECTORS // 8, 2):
        rig.write("base", 8 * chunk, 8, tag=1 << 40)
    moment = freeze(rig, "snap", "P 8")
    rig.write("base", 0, SECTORS, tag=1 << 41)
    other = freeze(rig, "other", "P 16")
    rig.dm.suspend("base")
    rig.dm.remove("snap")
    rig.dm.load("base", rig.line("snap", kind="snapshot-merge"))
    with Crew() as crew:
        writers = Writers(crew, rig.dm.device("base"))
        crew.start(read_live, crew, rig.dm.device("base"))
        crew.start(read_on, crew, rig.dm.device("other"))
        rig.dm.resume("base")
        assert wait_merge(rig.dm, "base").endswith(f" 16/{4 * SECTORS} 16")
        writers.wait_for_more()
    assert rig.read("base") == writers.expected(moment)
    assert rig.read("other") == other


def test_a_slow_merge_under_writers_loses_nothing(rig):
    rig.snap("snap", "P 4", cow_sectors=4 * SECTORS)
    for piece in range(0, SECTORS, 24):
        rig.write("snap", piece, 8, tag=1 << 40)
    moment = rig.read("snap")
    rig.snap("other", "P 16")
    rig.dm.remove("snap")
    rig.dm.create("slow", f"0 {4 * SECTORS} delay {rig.cows['snap']} 0 1")
    with Crew() as crew:
        rig.dm.load("base", f"0 {SECTORS} snapshot-merge base-real slow P 4")
        rig.dm.resume("base")
        writers = Writers(crew, rig.dm.device("base"))
        assert wait_merge(rig.dm, "base").endswith(f" 8/{4 * SECTORS} 8")
    assert rig.read("base") == writers.expected(moment)
    assert rig.read("other") == rig.before


def test_every_chunk_is_copied_once_however_many_write_it(rig):
    rig.snap("snap", "P 64", cow_sectors=4 * SECTORS)
    start = threading.Barrier(8)

    def write(thread: int) -> None:
        start.wait(30)
        for sector in range(thread, SECTORS, 8):
            rig.write("base", sector, 1, tag=thread + 1)

    with Crew() as crew:
        for thread in range(8):
            crew.start(write, thread)
        for thread in crew.threads:
            thread.join(60)
    assert rig.read("snap") == rig.before
    old = [record[0] for record in rig.records()]
    assert sorted(old) == list(range(SECTORS // 64))


def test_a_store_that_fills_up_under_writers_fails_no_origin_write(rig):
    rig.snap("snap", "P 8", cow_sectors=SECTORS // 2)
    with Crew() as crew:
        writers = Writers(crew, rig.dm.device("base"))
        while rig.usage() != "Invalid" and not crew.stop.is_set():
            writers.wait_for_more(5)
        writers.wait_for_more()
    assert rig.read("base") == writers.expected(rig.before)
    assert rig.dm.events("snap") == 1


def test_a_store_that_grows_under_writers_and_readers_keeps_its_moment(rig):
    path = rig.folder / "growing.cow"
    path.write_bytes(bytes(SECTOR))
    rig.dm.image(str(path), size=4 * SECTORS * SECTOR)
    rig.dm.suspend("base")
    rig.dm.create("snap", f"0 {SECTORS} snapshot base-real {path} P 8")
    rig.dm.resume("base")
    with Crew() as crew:
        writers = Writers(crew, rig.dm.device("base"))
        for _ in range(2):
            crew.start(read_on, crew, rig.dm.device("snap"))
        writers.wait_for_more(1000)
    assert rig.read("snap") == rig.before
    assert path.stat().st_size > SECTORS * SECTOR // 2


def test_discards_beside_writers_and_readers_zero_nothing_else(dm, tmp_path):
    """Of every four pieces three are written, and of the fourth every other is discarded."""
    whole = 4 * 8
    path = image(tmp_path / "a.img", stamp(0, SECTORS, 0))
    device = dm.create("a", f"0 {SECTORS} linear {path} 0")

    def write(crew: Crew, part: int) -> None:
        for tag in itertools.count(1):
            for first in range(8 * part, SECTORS, whole):
                device.pwrite(stamp(first, 8, tag), first * SECTOR)
            if crew.stop.is_set() and tag > 20:
                return

    def read(crew: Crew) -> None:
        while not crew.stop.is_set():
            for first in range(24, SECTORS, 2 * whole):
                check_numbers(device.pread(8 * SECTOR, first * SECTOR), first)

    with Crew() as crew:
        for part in range(3):
            crew.start(write, crew, part)
        crew.start(read, crew)
        for first in range(24 + whole, SECTORS, 2 * whole):
            device.discard(first * SECTOR, 8 * SECTOR)
    for first in range(0, SECTORS, 8):
        data = device.pread(8 * SECTOR, first * SECTOR)
        if first % (2 * whole) == 24 + whole:
            assert data == bytes(8 * SECTOR)
        else:
            check_numbers(data, first)


def test_a_mirror_whose_leg_fails_under_writers_and_readers_loses_nothing(dm, tmp_path):
    """The mirror carries an origin; its second leg fails, and is brought in sync afterwards."""
    before = stamp(0, SECTORS, 0)
    legs = [image(tmp_path / f"{name}.img", before) for name in "ab"]
    store = image(tmp_path / "snap.cow", 4 * SECTORS)
    dm.create("leg", f"0 {SECTORS} linear {legs[1]} 0")
    dm.create("m", f"0 {SECTORS} mirror core 2 64 nosync 2 {legs[0]} 0 leg 0 1 handle_errors")
    snap = dm.create("snap", f"0 {SECTORS} snapshot m {store} P 8")
    base = dm.create("base", f"0 {SECTORS} snapshot-origin m")
    with Crew() as crew:
        writers = Writers(crew, base)
        crew.start(read_on, crew, snap)
        crew.start(read_live, crew, base)
        writers.wait_for_more(20)
        dm.load("leg", f"0 {SECTORS} error")
        dm.resume("leg")
        writers.wait_for_more()
        assert "AD" in dm.status("m").split()
        dm.suspend("m")
        dm.load("leg", f"0 {SECTORS} linear {legs[1]} 0")
        dm.resume("leg")
        dm.resume("m")
        assert "AA" in dm.status("m").split()
        writers.wait_for_more()
    expected = writers.expected(before)
    assert base.pread(SECTORS * SECTOR, 0) == expected
    assert snap.pread(SECTORS * SECTOR, 0) == before
    for leg in legs:
        assert (tmp_path / leg).read_bytes() == expected


def test_devices_come_and_go_while_others_work(rig):
    def come_and_go(crew: Crew, number: int) -> None:
        path = image(rig.folder / f"extra{number}.img", stamp(0, 64, number))
        while not crew.stop.is_set():
            device = rig.dm.create(f"extra{number}", f"0 64 linear {path} 0")
            check_numbers(device.pread(64 * SECTOR, 0))
            rig.dm.remove(f"extra{number}")

    rig.snap("snap", "P 8", cow_sectors=4 * SECTORS)
    with Crew() as crew:
        for number in range(3):
            crew.start(come_and_go, crew, number)
        writers = Writers(crew, rig.dm.device("base"))
        writers.wait_for_more(1000)
    assert rig.read("base") == writers.expected(rig.before)
    assert rig.read("snap") == rig.before
