"""Full disks, failing requests, files cut or taken away, locks, corrupt stores.

Nothing here may end the process, and nothing but the snapshot concerned may suffer: an origin write
goes through, a snapshot is intact or says that it is invalid, an error is an error of one request.

COW_LONG=N: N thousand corrupt stores more.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import resource
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import (
    SECTOR,
    Rig,
    count,
    header_bytes,
    image,
    stamp,
    store_bytes,
    store_header,
    wait_merge,
)
from support.crash import LONG, PAGE
from support.faults import Failing, Fault

import cow

SECTORS = 128
BEFORE = stamp(0, SECTORS, 0)


@pytest.fixture
def dm():
    with cow.Mapper(durability="process") as mapper:
        yield mapper


@pytest.fixture
def memory(tmp_path) -> Iterator[Path]:
    """A folder in memory, where there is one: for many flushes."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


# --- full disks ---------------------------------------------------------------------------------


def attempt(call: Any, *args: Any, **kwargs: Any) -> bool:
    """Do something that may find no room; any other failure is one of the test."""
    try:
        call(*args, **kwargs)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EIO):
            raise
        return False
    return True


def usage(dm: cow.Mapper, name: str) -> str:
    return dm.status(name).split(" ", 3)[3]


def intact_or_invalid(dm: cow.Mapper, name: str, contents: bytes) -> bool:
    """Check a snapshot; whether it is valid."""
    if usage(dm, name) == "Invalid":
        with pytest.raises(OSError, match="EIO"):
            dm.device(name).pread(SECTOR, 0)
        return False
    assert dm.device(name).pread(SECTORS * SECTOR, 0) == contents
    return True


@pytest.mark.parametrize("words", ["P 8", "P 16", "PO 8", "N 8"])
@pytest.mark.parametrize("durability", ["process", "power"])
def test_a_disk_full_at_any_moment_costs_no_more_than_the_snapshot(disk, words, durability):
    for free in range(disk.pages):
        count("runs on a full disk")
        disk.clear()
        origin = image(disk.folder / "origin.img", BEFORE)
        stores = [disk.sparse(f"{i}.cow", 256) for i in range(2)]
        disk.fill(free)
        after = bytearray(BEFORE)
        mine = bytearray(BEFORE)
        clean = True
        valid: dict[str, bool] = {}
        with cow.Mapper(durability=durability) as dm:
            dm.create("real", f"0 {SECTORS} linear {origin} 0")
            for i, store in enumerate(stores):
                clean &= attempt(
                    dm.create, f"snap{i}", f"0 {SECTORS} snapshot real {store} {words}"
                )
            base = dm.create("base", f"0 {SECTORS} snapshot-origin real")
            for number in range(6):
                data = stamp(number * 20, 12, number + 1)
                base.pwrite(data, number * 20 * SECTOR)
                after[number * 20 * SECTOR : (number * 20 + 12) * SECTOR] = data
                if "snap1" in dm.names():
                    at = (number * 20 + 3) * SECTOR
                    written = attempt(dm.device("snap1").pwrite, data[: 6 * SECTOR], at)
                    if written:
                        mine[at : at + 6 * SECTOR] = data[: 6 * SECTOR]
                    clean &= written
                    if not written and usage(dm, "snap1") not in ("Invalid",):
                        # What came before the chunk that found no room is written.
                        now = dm.device("snap1").pread(6 * SECTOR, at)
                        for i in range(0, len(now), SECTOR):
                            sector = now[i : i + SECTOR]
                            old = mine[at + i : at + i + SECTOR]
                            assert sector in (old, data[i : i + SECTOR])
                        mine[at : at + 6 * SECTOR] = now
            assert base.pread(SECTORS * SECTOR, 0) == after
            for name, contents in (("snap0", BEFORE), ("snap1", bytes(mine))):
                if name in dm.names():
                    valid[name] = intact_or_invalid(dm, name, contents)
                    clean &= valid[name]
        assert Path(origin).read_bytes() == after
        disk.fill(disk.pages)
        (disk.folder / "ballast").unlink()
        with cow.Mapper() as dm:
            dm.create("real", f"0 {SECTORS} linear {origin} 0", readonly=True)
            for i, was_valid in enumerate(valid.values() if words[0] == "P" else ()):
                name = list(valid)[i]
                dm.create(name, f"0 {SECTORS} snapshot real {stores[int(name[4:])]} {words}")
                contents = bytes(mine) if name == "snap1" else BEFORE
                assert intact_or_invalid(dm, name, contents) == was_valid
        if clean:
            assert free > 20
            return
    pytest.fail("no run was clean")


def test_a_merge_into_a_sparse_origin_on_a_full_disk_stops_and_goes_on_later(disk):
    for free in range(disk.pages):
        count("runs on a full disk")
        disk.clear()
        origin = disk.sparse("origin.img", 512)
        store = disk.sparse("0.cow", 1024)
        with cow.Mapper() as dm:
            dm.create("snap", f"0 512 snapshot {origin} {store} P 16")
            data = stamp(0, 512, 3)
            for sector in (100, 300, 10, 400):
                at = sector * SECTOR
                dm.device("snap").pwrite(data[at : at + 32 * SECTOR], at)
            contents = dm.device("snap").pread(512 * SECTOR, 0)
        disk.fill(free)
        with cow.Mapper() as dm:
            dm.create("base", f"0 512 snapshot-merge {origin} {store} P 16")
            failed = "Merge failed" in wait_merge(dm, "base")
        disk.fill(disk.pages)
        (disk.folder / "ballast").unlink()
        with cow.Mapper() as dm:
            base = dm.create("base", f"0 512 snapshot-merge {origin} {store} P 16")
            assert base.pread(512 * SECTOR, 0) == contents
            assert wait_merge(dm, "base") == "0 512 snapshot-merge 32/1024 32"
        assert Path(origin).read_bytes() == contents
        if not failed:
            assert free > 4
            return
    pytest.fail("no run was clean")


def test_a_write_to_a_sparse_image_on_a_full_disk_is_enospc(disk, dm):
    disk.clear()
    dev = dm.create("dev", f"0 256 linear {disk.sparse('a.img', 256, b'x' * PAGE)} 0")
    disk.fill(2)
    for number in range(1, 4):
        done = attempt(dev.pwrite, b"y" * PAGE, number * PAGE)
        assert done == (number < 3)
    with pytest.raises(OSError, match="ENOSPC"):
        dev.pwrite(b"y" * PAGE, 20 * PAGE)
    dev.pwrite(b"z" * PAGE, 0)
    assert dev.pread(3 * PAGE, 0) == b"z" * PAGE + b"y" * 2 * PAGE


def test_a_hole_in_an_image_on_a_full_disk_reads_zeros(disk, dm):
    disk.clear()
    dev = dm.create("dev", f"0 256 linear {disk.sparse('a.img', 256, b'x' * PAGE)} 0")
    disk.fill(0)
    assert dev.pread(2 * PAGE, 0) == b"x" * PAGE + bytes(PAGE)


def test_a_hole_in_an_origin_on_a_full_disk_costs_no_snapshot(disk, tmp_path, dm):
    disk.clear()
    origin = disk.sparse("origin.img", SECTORS, BEFORE[:PAGE])
    store = image(tmp_path / "a.cow", 1024)
    disk.fill(0)
    dm.create("snap", f"0 {SECTORS} snapshot {origin} {store} P 8")
    base = dm.create("base", f"0 {SECTORS} snapshot-origin {origin}")
    assert not attempt(base.pwrite, b"y" * PAGE, 5 * PAGE)
    base.pwrite(b"y" * PAGE, 0)
    assert dm.device("snap").pread(SECTORS * SECTOR, 0) == BEFORE[:PAGE].ljust(65536, b"\0")


def test_a_snapshot_dropped_on_a_full_disk_is_dropped_on_the_disk_too(disk, tmp_path):
    """Though the rest of the header's chunk is a hole: `cp --sparse` makes such a store."""
    disk.clear()
    origin = image(tmp_path / "origin.img", BEFORE)
    store = disk.sparse("a.cow", 256, header_bytes(16))
    with open(store, "r+b") as file:
        os.pwrite(file.fileno(), bytes(2 * PAGE), 2 * PAGE)
    disk.fill(0)
    with cow.Mapper() as dm:
        dm.create("snap", f"0 {SECTORS} snapshot {origin} {store} P 16")
        base = dm.create("base", f"0 {SECTORS} snapshot-origin {origin}")
        base.pwrite(b"y" * PAGE, 0)
        assert usage(dm, "snap") == "Invalid"
    assert store_header(Path(store).read_bytes())[1] == 0


def test_a_repair_on_a_full_disk_is_whole_or_leaves_nothing(disk, tmp_path):
    store = sound_store(16, [(3, 2), (4, 4), (0, 5)])
    path = image(tmp_path / "a.cow", bytes(store))
    for free in range(disk.pages):
        count("runs on a full disk")
        disk.clear()
        disk.fill(free)
        output = disk.folder / "new.cow"
        if attempt(cow.store.repair, path, output):
            assert free > 6
            assert cow.store.check(output) == []
            assert expected(output.read_bytes()) == expected(bytes(store))
            return
        assert not output.exists()
    pytest.fail("no run was clean")


def test_a_growing_image_that_may_not_grow_is_an_error_of_the_request(tmp_path, dm):
    path = image(tmp_path / "a.img", 16)
    dm.image(path, size=1 << 20)
    dev = dm.create("dev", f"0 2048 linear {path} 0")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, hard))
    try:
        dev.pwrite(b"x" * PAGE, 32 * 1024)
        with pytest.raises(OSError, match="EFBIG"):
            dev.pwrite(b"x" * PAGE, 128 * 1024)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    dev.pwrite(b"x" * PAGE, 128 * 1024)
    assert dev.pread(PAGE, 32 * 1024) == dev.pread(PAGE, 128 * 1024) == b"x" * PAGE


def test_a_growing_store_that_may_not_grow_is_full(tmp_path, dm):
    origin, store = image(tmp_path / "o.img", BEFORE), image(tmp_path / "a.cow", 24)
    dm.image(store, size=1 << 20)
    dm.create("snap", f"0 {SECTORS} snapshot {origin} {store} P 8")
    base = dm.create("base", f"0 {SECTORS} snapshot-origin {origin}")
    base.pwrite(b"x" * PAGE, 0)
    size = os.stat(store).st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max(size, 64 * 1024), hard))
    try:
        for number in range(1, 16):
            base.pwrite(b"x" * PAGE, number * PAGE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert base.pread(SECTORS * SECTOR, 0) == b"x" * SECTORS * SECTOR
    intact_or_invalid(dm, "snap", BEFORE)


# --- the n-th request fails ---------------------------------------------------------------------


@pytest.mark.parametrize("op", ["read", "write", "flush"])
@pytest.mark.parametrize("where", ["origin", "cow"])
def test_the_nth_failing_request_costs_no_more_than_the_snapshot(failing, memory, where, op):
    for n in range(1, 500):
        Failing.fault = Fault(op, n)
        _fail_one(memory, where)
        if not Failing.fault.fired:
            count("requests made to fail", n - 1)
            return
    pytest.fail("no run was clean")


def _fail_one(folder: Path, where: str) -> None:
    """Run a program once, with faults below the origin or below the COW devices."""
    origin = image(folder / "origin.img", BEFORE)
    kinds = {name: "failing" if name == where else "linear" for name in ("origin", "cow")}
    # The second store has room for six chunks, and overflows.
    stores = [image(folder / f"{i}.cow", 256 - i * 192) for i in range(2)]
    alive: dict[str, bool] = {}
    after, unsure = bytearray(BEFORE), set()
    with cow.Mapper() as dm:
        dm.create("real", f"0 {SECTORS} {kinds['origin']} {origin} 0")
        for i, store in enumerate(stores):
            dm.create(f"cow{i}", f"0 {256 - i * 192} {kinds['cow']} {store} 0")
            attempt(dm.create, f"snap{i}", f"0 {SECTORS} snapshot real cow{i} P 8")
        base = dm.create("base", f"0 {SECTORS} snapshot-origin real")
        for sector in (0, 4, 40, 42, 17, 90, 64, 120, 104):
            data = stamp(sector, 8, sector + 1)
            if attempt(base.pwrite, data, sector * SECTOR):
                after[sector * SECTOR : (sector + 8) * SECTOR] = data
            else:
                # Only the origin itself may fail it.
                assert where == "origin"
                unsure.update(range(sector, sector + 8))
        attempt(base.flush)
        for i in range(2):
            name = f"snap{i}"
            if name in dm.names():
                alive[name] = usage(dm, name) != "Invalid"
                if alive[name]:
                    assert _reads(dm.device(name), BEFORE)
        assert _reads(base, bytes(after), unsure)
        dm.remove("base")
        if "snap0" in dm.names():
            dm.remove("snap0")
            if attempt(dm.create, "base", f"0 {SECTORS} snapshot-merge real cow0 P 8"):
                wait_merge(dm, "base")
    fault, Failing.fault = Failing.fault, None
    assert fault is not None
    with cow.Mapper() as dm:
        # With the fault gone: what was valid is, what was dropped stays so, the merge ends well.
        dm.create("real", f"0 {SECTORS} linear {origin} 0")
        for name, valid in alive.items():
            store = stores[int(name[4:])]
            if name == "snap1":
                dm.create(name, f"0 {SECTORS} snapshot real {store} P 8")
                # The kernel's own gap: who fails to write the header cannot say "invalid" there.
                if not valid and (fault.op, fault.offset, fault.length) == ("write", 0, 16):
                    continue
                assert intact_or_invalid(dm, name, BEFORE) <= valid, where_failed(fault)
            elif valid:
                dm.create("base", f"0 {SECTORS} snapshot-merge real {store} P 8")
                if usage(dm, "base") != "Invalid":
                    wait_merge(dm, "base")
                    assert dm.device("real").pread(SECTORS * SECTOR, 0) == BEFORE
    Failing.fault = fault


def where_failed(fault: Fault) -> str:
    return f"after the {fault.op} of {fault.length} bytes at {fault.offset} failed"


def _reads(dev: Any, contents: bytes, unsure: set[int] | frozenset[int] = frozenset()) -> bool:
    """Compare sector by sector; a read may meet the fault, and passes the second time."""
    for sector in range(SECTORS):
        at = sector * SECTOR
        try:
            data = dev.pread(SECTOR, at)
        except OSError:
            data = dev.pread(SECTOR, at)
        if sector not in unsure and data != contents[at : at + SECTOR]:
            return False
    return True


def test_a_bad_spot_in_an_origin_fails_only_what_reads_it(tmp_path, dm):
    origin = image(tmp_path / "o.img", BEFORE)
    dm.create("real", f"0 40 linear {origin} 0\n40 8 error\n48 {SECTORS - 48} linear {origin} 48")
    store = image(tmp_path / "a.cow", 1024)
    other = dm.create("other", f"0 256 linear {image(tmp_path / 'x.img', 256)} 0")
    snap = dm.create("snap", f"0 {SECTORS} snapshot real {store} P 8")
    base = dm.create("base", f"0 {SECTORS} snapshot-origin real")
    for dev in (snap, base):
        with pytest.raises(OSError, match="EIO"):
            dev.pread(SECTORS * SECTOR, 0)
        assert dev.pread(40 * SECTOR, 0) == BEFORE[: 40 * SECTOR]
    base.pwrite(b"x" * 8 * SECTOR, 0)
    assert snap.pread(40 * SECTOR, 0) == BEFORE[: 40 * SECTOR]
    # A copy of what cannot be read cannot be kept: the snapshot goes, not the origin.
    with pytest.raises(OSError, match="EIO"):
        base.pwrite(b"x" * 8 * SECTOR, 40 * SECTOR)
    assert usage(dm, "snap") == "Invalid"
    base.pwrite(b"x" * 8 * SECTOR, 48 * SECTOR)
    other.pwrite(b"x", 0)


def test_a_store_that_stops_writing_costs_the_snapshot(tmp_path, dm):
    origin = image(tmp_path / "o.img", BEFORE)
    store = image(tmp_path / "a.cow", 1024)
    dm.create("cow", f"0 1024 linear {store} 0")
    dm.create("snap", f"0 {SECTORS} snapshot {origin} cow P 8")
    base = dm.create("base", f"0 {SECTORS} snapshot-origin {origin}")
    base.pwrite(b"x" * PAGE, 0)
    dm.load("cow", f"0 1024 flakey {store} 0 0 1 1 error_writes")
    dm.resume("cow")
    assert dm.device("snap").pread(SECTORS * SECTOR, 0) == BEFORE
    base.pwrite(b"x" * PAGE, PAGE)
    assert usage(dm, "snap") == "Invalid"
    assert base.pread(2 * PAGE, 0) == b"x" * 2 * PAGE


# --- files cut, deleted, replaced ---------------------------------------------------------------


def test_a_store_cut_while_open_fails_what_it_lost(tmp_path, dm):
    rig = Rig(dm, tmp_path, SECTORS)
    rig.snap()
    other = rig.snap("other")
    rig.write("base", 0, 64)
    before = rig.before
    os.truncate(rig.cows["snap"], 6 * PAGE)
    with pytest.raises(OSError, match="EIO"):
        rig.read("snap")
    # Four chunks of data are left behind header and area.
    assert rig.read("snap", 0, 32) == before[: 32 * SECTOR]
    assert other.pread(SECTORS * SECTOR, 0) == before
    rig.write("base", 64, 64)
    assert rig.read("base") == b"".join(stamp(sector, 64, 1) for sector in (0, 64))
    assert rig.usage("snap") == "Invalid"
    assert other.pread(SECTORS * SECTOR, 0) == before


@pytest.mark.parametrize("growing", [False, True])
def test_a_sparse_store_cut_while_open_shows_no_zeros_for_what_it_lost(tmp_path, growing):
    """The next copy must not make the file long again: its holes would read as data."""
    origin, store = str(tmp_path / "o.img"), str(tmp_path / "a.cow")
    # Cut it after each copy: some come just before the file has to grow.
    for copied in range(1, 64):
        image(Path(origin), stamp(0, 1024, 0))
        Path(store).write_bytes(bytes(PAGE))
        with cow.Mapper(durability="process") as dm:
            if growing:
                dm.image(store, size=1 << 20)
            else:
                os.truncate(store, 1 << 20)
            snap = dm.create("snap", f"0 1024 snapshot {origin} {store} P 8")
            base = dm.create("base", f"0 1024 snapshot-origin {origin}")
            for chunk in range(copied):
                base.pwrite(bytes(PAGE), chunk * PAGE)
            os.truncate(store, 2 * PAGE)
            base.pwrite(bytes(PAGE), copied * PAGE)
            for chunk in range(copied):
                with contextlib.suppress(OSError):
                    assert snap.pread(PAGE, chunk * PAGE) == stamp(chunk * 8, 8, 0), copied


def test_an_origin_cut_while_open_fails_what_it_lost(tmp_path, dm):
    rig = Rig(dm, tmp_path, SECTORS)
    rig.snap()
    rig.write("base", 96, 8)
    os.truncate(rig.origin, 8 * PAGE)
    for name in ("base", "snap"):
        assert rig.read(name, 0, 64) == rig.before[: 64 * SECTOR]
        with pytest.raises(OSError, match="EIO"):
            rig.read(name, 64, 8)
    assert rig.read("snap", 96, 8) == rig.before[96 * SECTOR : 104 * SECTOR]
    rig.write("base", 8, 8)
    assert rig.read("snap", 8, 8) == rig.before[8 * SECTOR : 16 * SECTOR]
    with pytest.raises(OSError, match="EIO"):
        rig.write("base", 72, 8)
    rig.write("base", 0, 8)
    assert os.stat(rig.origin).st_size == 8 * PAGE


def test_a_merge_of_a_cut_store_fails_and_leaves_the_rest(tmp_path, dm):
    rig = Rig(dm, tmp_path, SECTORS)
    rig.snap()
    for sector in (0, 48, 16):
        rig.write("snap", sector)
    os.truncate(rig.cows["snap"], 3 * PAGE)
    dm.suspend("base")
    dm.remove("snap")
    image(tmp_path / "snap.cow", Path(rig.cows["snap"]).read_bytes().ljust(2048 * SECTOR, b"\0"))
    dm.load("base", rig.line("snap", kind="snapshot-merge"))
    os.truncate(rig.cows["snap"], 3 * PAGE)
    dm.resume("base")
    assert "Merge failed" in wait_merge(dm, "base")
    assert rig.read("base", 0, 8) == stamp(0, 8, 1)
    assert rig.read("base", 56, 72) == rig.before[56 * SECTOR :]
    rig.write("base", 100, 8, 9)


@pytest.mark.parametrize("replaced", [False, True])
def test_a_deleted_file_works_on_while_it_is_open(tmp_path, dm, replaced):
    rig = Rig(dm, tmp_path, SECTORS)
    rig.snap()
    for path in (rig.origin, rig.cows["snap"]):
        os.unlink(path)
        if replaced:
            image(Path(path), 2048)
    rig.write("base", 0, 64)
    rig.write("snap", 100)
    expected = bytearray(rig.before)
    expected[100 * SECTOR : 108 * SECTOR] = stamp(100, 8, 1)
    assert rig.read("snap") == expected
    if replaced:
        # The new file of that name is another image.
        assert dm.create("new", f"0 64 linear {rig.origin} 0").pread(SECTOR, 0) == bytes(SECTOR)
        assert Path(rig.origin).read_bytes() == bytes(2048 * SECTOR)


# --- locks --------------------------------------------------------------------------------------

HOLDER = """
import sys, cow
with cow.Mapper() as dm:
    for name, table in zip(sys.argv[1::2], sys.argv[2::2]):
        dm.create(name, table)
    print("open", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def held(**tables: str) -> Iterator[int]:
    """Have another process hold devices; its pid."""
    words = [word for pair in tables.items() for word in pair]
    path = str(Path(cow.__file__).parent.parent)
    with subprocess.Popen(
        [sys.executable, "-P", "-c", HOLDER, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"open\n"
        yield process.pid
        assert process.stdin is not None
        process.stdin.close()


def refused_pid(dm: cow.Mapper, table: str, **options: Any) -> int:
    """Expect a table to be refused because of a lock; the holder's pid as the text names it."""
    with pytest.raises(OSError, match=r"in use by") as caught:
        dm.create("dev", table, **options)
    assert caught.value.errno == errno.EBUSY
    assert dm.names() == []
    return int("".join(c for c in str(caught.value).partition("in use by")[2] if c.isdigit()))


def test_an_image_of_another_process_is_refused_with_its_pid(tmp_path, dm):
    path = image(tmp_path / "a.img", 64)
    other = str(tmp_path / "link.img")
    os.link(path, other)
    with held(dev=f"0 64 linear {path} 0") as pid:
        for name in (path, other):
            for readonly in (False, True):
                assert refused_pid(dm, f"0 64 linear {name} 0", readonly=readonly) == pid
    dm.create("dev", f"0 64 linear {path} 0")


def test_a_store_of_another_process_is_refused_with_its_pid(tmp_path, dm):
    origin, store = image(tmp_path / "o.img", BEFORE), image(tmp_path / "a.cow", 1024)
    line = f"0 {SECTORS} snapshot {origin} {store} P 8"
    with held(snap=line) as pid:
        before = Path(store).read_bytes()
        assert refused_pid(dm, line) == pid
        assert refused_pid(dm, f"0 {SECTORS} snapshot-merge {origin} {store} P 8") == pid
        assert Path(store).read_bytes() == before
    assert usage(dm, dm.create("snap", line).name) == "16/1024 16"


def test_a_holder_nobody_tells_is_another_process(tmp_path, dm, monkeypatch):
    path = image(tmp_path / "a.img", 64)

    def hidden(name: str, **options: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), name)

    monkeypatch.setattr("cow.image.open", hidden, raising=False)
    with held(dev=f"0 64 linear {path} 0"), pytest.raises(OSError, match="another process"):
        dm.create("dev", f"0 64 linear {path} 0")


def test_an_image_is_read_by_many_processes(tmp_path, dm):
    path = image(tmp_path / "a.img", BEFORE)
    store = image(tmp_path / "a.cow", 1024)
    with cow.Mapper() as theirs:
        theirs.create("dev", f"0 64 linear {path} 0", readonly=True)
        with pytest.raises(OSError, match="in use by another mapper of this process"):
            dm.create("dev", f"0 64 linear {path} 0")
        assert dm.create("dev", f"0 64 linear {path} 0", readonly=True).pread(1, 0) == BEFORE[:1]
        # A snapshot only reads its origin.
        dm.create("snap", f"0 {SECTORS} snapshot {path} {store} P 8").pwrite(b"x", 0)


def test_an_image_that_is_written_after_all_is_nobody_elses_any_more(tmp_path, dm):
    path = image(tmp_path / "a.img", 64)
    with cow.Mapper() as first:
        first.create("look", f"0 64 linear {path} 0", readonly=True)
        first.create("dev", f"0 64 linear {path} 0").pwrite(b"x", 0)
        assert refused_pid(dm, f"0 64 linear {path} 0", readonly=True) == os.getpid()


def test_an_image_that_could_not_be_written_is_still_read_alone_or_with_readers(tmp_path, dm):
    path = image(tmp_path / "a.img", 64)
    table = f"0 64 linear {path} 0"
    with cow.Mapper() as first:
        first.create("look", table, readonly=True)
        with cow.Mapper() as second:
            second.create("look", table, readonly=True)
            with pytest.raises(OSError, match="in use by another mapper of this process"):
                first.create("dev", table)
        assert refused_pid(dm, table) == os.getpid()
        dm.create("dev", table, readonly=True)


def test_a_second_mapper_of_this_process_is_refused_with_our_pid(tmp_path, dm):
    origin, store = image(tmp_path / "o.img", BEFORE), image(tmp_path / "a.cow", 1024)
    line = f"0 {SECTORS} snapshot {origin} {store} P 8"
    with cow.Mapper() as theirs:
        theirs.create("snap", line)
        assert refused_pid(dm, line) == os.getpid()
    dm.create("snap", line)


# --- corrupt stores -----------------------------------------------------------------------------

RECORDS = [(3, 2), (4, 3), (9, 4), (0, 5), (15, 6), (7, 7)]
STORE_SECTORS = 12 * 8


def sound_store(chunk: int = 8, records: list[tuple[int, int]] = RECORDS) -> bytearray:
    """Return a store whose data says where it lies."""
    store = store_bytes(records, chunk, size=STORE_SECTORS * SECTOR)
    for _, new in records:
        at = new * chunk * SECTOR
        store[at : at + chunk * SECTOR] = stamp(new * chunk, chunk, 5)
    return store


def expected(store: bytes, table_chunk: int = 8) -> bytes | str:
    """Say by hand what a store shows over BEFORE, or "refused" or "invalid"."""
    if len(store) < table_chunk * SECTOR:
        return "refused"
    magic, valid, version, chunk = store_header(store)
    if magic == 0:
        return BEFORE
    if magic != 0x70416E53 or chunk not in [1 << i for i in range(22)] or version != 1:
        return "refused"
    if not valid:
        return "invalid"
    contents = bytearray(BEFORE)
    size = chunk * SECTOR
    per_area = size // 16
    nr_chunks = len(store) // SECTOR * SECTOR // size
    old_chunks, new_chunks = set(), set()
    for number in range(1 << 30):
        area, index = divmod(number, per_area)
        at = (1 + (per_area + 1) * area) * size + index * 16
        if at + 16 > len(store):
            return "refused"
        old, new = struct.unpack_from("<QQ", store, at)
        if new == 0:
            # The whole area is looked at, for what may stand behind the end.
            return bytes(contents) if at - index * 16 + size <= len(store) else "refused"
        wrong = old * size >= len(BEFORE) or new >= nr_chunks or new % (per_area + 1) == 1
        if wrong or old in old_chunks or new in new_chunks:
            return "refused"
        old_chunks.add(old)
        new_chunks.add(new)
        data = store[new * size : (new + 1) * size]
        contents[old * size : (old + 1) * size] = data[: len(contents) - old * size]
    raise AssertionError


def salvaged(store: bytes, chunk: int) -> tuple[bytes, int, int]:
    """Say by hand what can be kept: what it shows over BEFORE, exceptions kept, and lost.

    Of two exceptions with a chunk in common the first is the sound one.
    """
    contents = bytearray(BEFORE)
    size = chunk * SECTOR
    per_area = size // 16
    nr_chunks = len(store) // size
    old_chunks, new_chunks = set(), set()
    kept = lost = 0
    for number in range(1 << 30):
        area, index = divmod(number, per_area)
        start = (1 + (per_area + 1) * area) * size
        if start + size > len(store):
            break
        old, new = struct.unpack_from("<QQ", store, start + index * 16)
        if new == 0:
            break
        wrong = old * size >= len(BEFORE) or new >= nr_chunks or new % (per_area + 1) == 1
        if wrong or old in old_chunks or new in new_chunks:
            lost += 1
        else:
            kept += 1
            data = store[new * size : (new + 1) * size]
            contents[old * size : (old + 1) * size] = data[: len(contents) - old * size]
        old_chunks.add(old)
        new_chunks.add(new)
    return bytes(contents), kept, lost


def check_repair(folder: Path, store: bytes, where: str) -> None:
    """Repair a store; what can be kept is in the new one, and what is lost was told."""
    path, output = image(folder / "bad.cow", store), folder / "repaired.cow"
    output.unlink(missing_ok=True)
    options: dict[str, Any] = {"force": True, "origin_size": len(BEFORE)}
    known = expected(store)
    header = [finding for finding in cow.store.check(path) if finding.kind == "header"]
    if header:
        assert known in ("refused", BEFORE), where
        options["chunk_size"] = 8
    if len(store) < 2 * 8 * SECTOR:
        return
    done = cow.store.repair(path, output, **options)
    chunk = 8 if header else store_header(store)[3]
    contents, kept, lost = salvaged(store, chunk)
    assert done.kept == kept, where
    told = {(each.area, each.record) for each in done.findings if each.kind[:3] in ("old", "new")}
    assert len(told) == lost, where
    assert expected(output.read_bytes()) == contents, where
    assert Path(path).read_bytes() == store
    if known == "refused":
        assert done.findings or header, where
    elif known not in ("invalid", BEFORE):
        assert (contents, lost) == (known, 0), where


@contextlib.contextmanager
def opened(folder: Path, store: bytes) -> Iterator[tuple[cow.Mapper, str]]:
    """Open a store over an origin of BEFORE; the mapper and the outcome of the open."""
    path, origin = image(folder / "bad.cow", bytes(store)), image(folder / "o.img", BEFORE)
    with cow.Mapper(durability="process") as dm:
        try:
            dm.create("snap", f"0 {SECTORS} snapshot {origin} {path} P 8")
        except cow.CowError as error:
            if not isinstance(error, OSError) or Path(path).read_bytes() != store:
                raise
            yield dm, "refused"
            return
        dm.create("base", f"0 {SECTORS} snapshot-origin {origin}")
        yield dm, "invalid" if usage(dm, "snap") == "Invalid" else "served"


def check_corrupt(folder: Path, store: bytes, where: str) -> str:
    """Open a store, compare with what it has to show, work on it, look again after reopening."""
    store = bytes(store)
    known = expected(store)
    count("damaged stores opened")
    check_repair(folder, store, where)
    with opened(folder, store) as (dm, outcome):
        if isinstance(known, str):
            assert outcome == known, where
            return outcome
        assert outcome == "served", where
        assert dm.device("snap").pread(SECTORS * SECTOR, 0) == known, where
        base = dm.device("base")
        for sector in range(0, SECTORS, 24):
            base.pwrite(stamp(sector, 8, 8), sector * SECTOR)
        valid = usage(dm, "snap") != "Invalid"
        if valid:
            assert dm.device("snap").pread(SECTORS * SECTOR, 0) == known, where
    with cow.Mapper() as dm:
        dm.create("snap", f"0 {SECTORS} snapshot {folder / 'o.img'} {folder / 'bad.cow'} P 8")
        assert (usage(dm, "snap") != "Invalid") == valid, where
        if valid:
            assert dm.device("snap").pread(SECTORS * SECTOR, 0) == known, where
    return outcome


def values(width: int, now: int, rng: random.Random) -> list[int]:
    top = (1 << width) - 1
    near = [now + 1, max(0, now - 1), now * 2, now // 2]
    return [
        0,
        1,
        2,
        7,
        top,
        top >> 1,
        1 << (width - 1),
        *near,
        rng.randrange(top),
        rng.randrange(64),
    ]


def test_every_field_of_a_header_with_a_wrong_value(tmp_path, seed):
    rng = random.Random(seed)
    outcomes = []
    for name, at in (("magic", 0), ("valid", 4), ("version", 8), ("chunk size", 12)):
        store = sound_store()
        now = struct.unpack_from("<I", store, at)[0]
        for value in values(32, now, rng):
            struct.pack_into("<I", store, at, value)
            outcomes.append(check_corrupt(tmp_path, store, f"{name} {value}"))
    assert set(outcomes) == {"refused", "invalid", "served"}


def test_every_field_of_a_record_with_a_wrong_value(tmp_path, seed):
    rng = random.Random(seed)
    outcomes = []
    for index, record in enumerate([*RECORDS, (0, 0)]):
        for field, now in enumerate(record):
            for value in values(64, now, rng):
                store = sound_store()
                struct.pack_into("<Q", store, 8 * SECTOR + 16 * index + 8 * field, value)
                where = f"record {index}, field {field}: {value}"
                outcomes.append(check_corrupt(tmp_path, store, where))
    assert set(outcomes) == {"refused", "served"}


@pytest.mark.parametrize("chunk", [1, 8])
def test_flipped_bits(tmp_path, seed, chunk):
    rng = random.Random(seed)
    outcomes = []
    for _ in range(1000 * LONG + 150):
        # With chunks of a sector there is more than one area.
        records = RECORDS if chunk == 8 else [(i, i + 2 + i // 32) for i in range(40)]
        store = sound_store(chunk, records)
        places = [(0, 16), (chunk * SECTOR, chunk * SECTOR + 16 * min(len(records) + 1, 32))]
        if chunk == 1:
            places.append((34 * SECTOR, 34 * SECTOR + 16 * 9))
        flips = []
        for _ in range(rng.choice((1, 1, 2, 5))):
            first, end = rng.choice(places)
            bit = rng.randrange(first * 8, end * 8)
            store[bit // 8] ^= 1 << bit % 8
            flips.append(bit)
        outcomes.append(check_corrupt(tmp_path, store, f"bits {flips}"))


def test_a_store_cut_anywhere(tmp_path):
    store = sound_store()
    outcomes = []
    for size in [*range(1, 20), *range(0, len(store), SECTOR), len(store) - 1]:
        if size >= SECTOR:
            outcomes.append(check_corrupt(tmp_path, store[:size], f"cut to {size}"))
        elif size:
            with opened(tmp_path, bytes(store[:size])) as (_, outcome):
                assert outcome == "refused"
    assert set(outcomes) == {"refused", "served"}


def test_a_store_of_noise(tmp_path, seed):
    rng = random.Random(seed)
    for number in range(1000 * LONG + 60):
        noise = bytearray(rng.randbytes(STORE_SECTORS * SECTOR))
        if number % 2:
            noise[:16] = header_bytes(rng.choice((1, 2, 8, 16, 64)))
        check_corrupt(tmp_path, noise, f"noise {number}")
