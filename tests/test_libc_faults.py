"""No memory, a disk error, a signal in between: at the first libc call of the core, the second, …

Each test is run again and again, with the next call failing, until a run meets no fault. What the
failing call was for may fail with an error that says so; nothing else may suffer. An origin write
costs a snapshot at most, and a snapshot is intact or says that it is invalid.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import SECTOR, Rig, image, stamp, store_bytes, wait_merge
from support.crash import Content
from support.libc_faults import MEMORY, LibcFaults
from test_nbd import FLUSH, READ, TRIM, WRITE, WRITE_ZEROES, Client

import cow
from cow.export.nbd import NbdServer

SECTORS = 256
SIZE = SECTORS * SECTOR
FOREVER = 1 << 40


@pytest.fixture(scope="module")
def faults() -> LibcFaults:
    return LibcFaults()


@pytest.fixture
def folders(tmp_path) -> Iterator[Path]:
    """New folders, one for each run."""

    def make() -> Iterator[Path]:
        for number in itertools.count():
            (tmp_path / str(number)).mkdir()
            yield tmp_path / str(number)

    return make()


@pytest.fixture
def dm():
    with cow.Mapper(durability="process") as mapper:
        yield mapper


def attempt(code: int, call: Callable[..., Any], *args: Any) -> bool:
    """Do what may fail with errno `code`, or for want of memory; whether it was done."""
    try:
        call(*args)
    except MemoryError:
        assert code == errno.ENOMEM
    except OSError as error:
        # An overflow, and whatever meets a snapshot that is invalid by now, is EIO.
        if error.errno not in (code, errno.EIO):
            raise
    else:
        return True
    return False


class Watched:
    """Devices that are written while calls fail, and what each of them may show."""

    def __init__(self, rig: Rig, code: int) -> None:
        self.rig = rig
        self.code = code
        self.contents = {name: Content(rig.before) for name in ("base", *rig.cows)}
        self.tag = 10

    def write(self, name: str, offset: int, length: int) -> None:
        """Write; where that fails, each sector of it shows what it did, or what was written."""
        self.write_many(name, [offset], length, many=False)

    def write_many(self, name: str, offsets: list[int], length: int, many: bool = True) -> None:
        self.tag += 1
        data = stamp(100 * self.tag, -(-length // SECTOR), self.tag)[:length]
        content, device = self.contents[name], self.rig.dm.device(name)
        for offset in offsets:
            content.write(offset, data)
        if many:
            rows = np.frombuffer(data * len(offsets), np.uint8).reshape(len(offsets), length)
            done = attempt(self.code, device.write_many, offsets, rows)
        else:
            done = attempt(self.code, device.pwrite, data, offsets[0])
        if not done and "Invalid" not in self.rig.dm.status(name):
            shown = device.pread(SIZE, 0)
            assert content.wrong(shown) == [], name
            content.now[:] = shown
        content.flush()

    def check(self) -> None:
        """Check every device: it shows what it may, or is a snapshot that is invalid."""
        for name, content in self.contents.items():
            if "Invalid" in self.rig.dm.status(name):
                with pytest.raises(OSError, match="EIO"):
                    self.rig.dm.device(name).pread(SECTOR, 0)
                continue
            wrong = content.wrong(self.rig.dm.device(name).pread(SIZE, 0))
            assert not wrong, f"{name} is wrong in sectors {wrong}"

    def check_reopened(self) -> None:
        """Close the mapper and check the persistent snapshots as they lie on the disk."""
        rig = self.rig
        kept = [name for name in rig.cows if name in rig.dm.names() and name != "transient"]
        invalid = [name for name in kept if rig.usage(name) == "Invalid"]
        rig.dm.close()
        self.contents = {name: self.contents[name] for name in ("base", *kept)}
        with cow.Mapper(durability="process") as rig.dm:
            rig.dm.create("base-real", f"0 {SECTORS} linear {rig.origin} 0")
            for name in kept:
                rig.dm.create(name, rig.line(name, "P 0"))
            rig.dm.create("base", f"0 {SECTORS} snapshot-origin base-real")
            assert [name for name in kept if rig.usage(name) == "Invalid"] == invalid
            self.check()


def watched(dm: cow.Mapper, folder: Path, code: int, sparse: bool = False) -> Watched:
    """Make an origin with snapshots of several kinds."""
    rig = Rig(dm, folder, SECTORS)
    rig.snap("small", "P 1")
    rig.snap("large", "PO 16")
    rig.snap("transient", "N 8")
    if sparse:
        os.truncate(image(folder / "sparse.cow", 0), 1 << 20)
        rig.cows["sparse"] = str(folder / "sparse.cow")
        dm.create("sparse", rig.line("sparse", "P 8"))
    return Watched(rig, code)


def write_everywhere(devices: Watched) -> None:
    """Write in every way to every device."""
    devices.write("base", 700, 3000)
    devices.write("small", 8 * SECTOR, 8 * SECTOR)
    devices.write("large", 3 * SECTOR, 40 * SECTOR)
    devices.write_many("base", [64 * SECTOR, 80 * SECTOR, 65 * SECTOR], 2 * SECTOR)
    devices.write_many("transient", [16 * SECTOR, 128 * SECTOR], 8 * SECTOR)
    # More records than there is room for at first.
    devices.write("base", 100 * SECTOR, 150 * SECTOR)


# --- memory -------------------------------------------------------------------------------------


def test_without_memory_writes_cost_no_more_than_a_snapshot(faults, folders):
    for fault, folder in zip(faults.each(MEMORY, errno.ENOMEM), folders, strict=False):
        with cow.Mapper(durability="process") as dm:
            devices = watched(dm, folder, errno.ENOMEM)
            with fault:
                write_everywhere(devices)
            devices.check()
            devices.check_reopened()


def test_without_memory_a_device_is_not_made_and_can_be_made_later(faults, folders):
    for fault, folder in zip(faults.each(MEMORY, errno.ENOMEM), folders, strict=False):
        origin = image(folder / "o.img", stamp(0, SECTORS, 0))
        stores = [
            image(folder / "fresh.cow", 1024),
            image(folder / "old.cow", store_bytes([(1, 2), (5, 3)], 8)),
        ]
        tables = {
            "real": f"0 128 linear {origin} 0\n128 128 striped 2 8 {origin} 128 {origin} 192",
            "fresh": f"0 {SECTORS} snapshot real {stores[0]} P 8",
            "old": f"0 {SECTORS} snapshot real {stores[1]} P 8",
            "base": f"0 {SECTORS} snapshot-origin real",
            "slow": "0 8 delay base 0 0",
        }
        before = Path(stores[1]).read_bytes()
        with cow.Mapper(durability="process") as dm:
            made = []
            with fault:
                for name, table in tables.items():
                    try:
                        dm.create(name, table)
                    except (MemoryError, OSError) as error:
                        known = isinstance(error, MemoryError) or error.errno == errno.ENOMEM
                        # What it stands on may be missing.
                        assert known or (made != list(tables)[: len(made)] or name not in made)
                    else:
                        made.append(name)
            assert dm.names() == sorted(made)
            for name, table in tables.items():
                if name not in made:
                    dm.create(name, table)
            assert len(dm.device("old").pread(SIZE, 0)) == SIZE
            assert Path(stores[1]).read_bytes() == before


def finish_merge(rig: Rig, moment: bytes, usage: str) -> None:
    """Open what a merge left behind, and let it come to its end."""
    with cow.Mapper(durability="process") as rig.dm:
        rig.dm.create("base-real", f"0 {SECTORS} linear {rig.origin} 0")
        rig.dm.create("other", rig.line("other", "P 0"))
        rig.dm.create("base", rig.line("snap", "P 0", kind="snapshot-merge"))
        assert rig.read("base") == moment
        assert wait_merge(rig.dm, "base") == f"0 {SECTORS} snapshot-merge {usage}"
        assert rig.read("base") == rig.read("base-real") == moment
        if rig.usage("other") != "Invalid":
            assert rig.read("other") == rig.before


def test_without_memory_a_merge_stops_and_goes_on_later(faults, folders):
    for fault, folder in zip(faults.each(MEMORY, errno.ENOMEM), folders, strict=False):
        with cow.Mapper(durability="process") as dm:
            rig = Rig(dm, folder, SECTORS)
            rig.snap("snap", "P 8")
            rig.snap("other", "P 4")
            for sector in (0, 40, 16):
                rig.write("snap", sector)
            moment = rig.read("snap")
            dm.suspend("base")
            dm.remove("snap")
            merging = rig.line("snap", kind="snapshot-merge")
            with fault:
                attempt(errno.ENOMEM, dm.load, "base", merging)
                resumed = attempt(errno.ENOMEM, dm.resume, "base")
                if resumed and "snapshot-merge" in dm.table("base"):
                    dm.wait_merge("base", timeout=60)
        finish_merge(rig, moment, "16/2048 16")


def test_without_address_space_a_handover_is_refused_and_done_later(faults, folders):
    for fault, folder in zip(faults.each("mmap mremap", errno.ENOMEM), folders, strict=False):
        with cow.Mapper(durability="process") as dm:
            origin, store = image(folder / "o.img", stamp(0, 512, 0)), image(folder / "c", 2048)
            dm.create("real", f"0 {SECTORS} linear {origin} 0")
            snap = dm.create("snap", f"0 {SECTORS} snapshot real {store} P 1")
            base = dm.create("base", f"0 {SECTORS} snapshot-origin real")
            base.pwrite(bytes(SIZE), 0)
            dm.suspend("base")
            dm.suspend("snap")
            dm.load("real", f"0 512 linear {origin} 0")
            dm.resume("real")
            dm.load("snap", f"0 512 snapshot real {store} P 1")
            with fault:
                done = attempt(errno.ENOMEM, dm.resume, "snap")
            if not done:
                dm.resume("snap")
            dm.load("base", "0 512 snapshot-origin real")
            dm.resume("base")
            base.pwrite(bytes(512 * SECTOR), 0)
            assert snap.pread(512 * SECTOR, 0) == stamp(0, 512, 0)


def test_without_memory_a_snapshot_of_a_snapshot_is_all_that_is_lost(faults, folders):
    """What is copied out lies below a snapshot itself, and goes by way of a buffer."""
    for fault, folder in zip(faults.each(MEMORY, errno.ENOMEM), folders, strict=False):
        with cow.Mapper(durability="process") as dm:
            rig = Rig(dm, folder, SECTORS)
            rig.snap("snap", "P 8")
            store = image(folder / "second.cow", 2048)
            dm.create("second", f"0 {SECTORS} snapshot snap {store} P 8")
            dm.create("top", f"0 {SECTORS} snapshot-origin snap")
            with fault:
                done = attempt(errno.ENOMEM, dm.device("top").pwrite, stamp(0, 16, 5), 0)
            assert done or fault.fired
            assert rig.read("base") == rig.before
            if rig.usage("snap") == "Invalid":
                assert not done
                continue
            written = stamp(0, 16, 5) + rig.before[16 * SECTOR :]
            assert rig.read("top") == written if done else rig.read("top") in (rig.before, written)
            if rig.usage("second") != "Invalid":
                assert rig.read("second") == rig.before


def test_without_memory_a_mirror_is_not_made(faults, folders):
    for fault, folder in zip(faults.each(MEMORY, errno.ENOMEM), folders, strict=False):
        with cow.Mapper(durability="process") as dm:
            legs = [image(folder / name, SECTORS) for name in "ab"]
            table = f"0 {SECTORS} mirror core 1 64 2 {legs[0]} 0 {legs[1]} 0"
            with fault:
                done = attempt(errno.ENOMEM, dm.create, "m", table)
            assert done == (not fault.fired)
            if not done:
                assert dm.names() == []
                dm.create("m", table)
            dm.device("m").pwrite(stamp(0, 8, 1), 0)
            for leg in legs:
                assert Path(leg).read_bytes()[: 8 * SECTOR] == stamp(0, 8, 1)


def test_without_memory_a_device_of_snapshots_is_not_looked_at(faults, folders):
    for fault, folder in zip(faults.each(MEMORY, errno.ENOMEM), folders, strict=False):
        with cow.Mapper(durability="process") as dm:
            rig = Rig(dm, folder, SECTORS)
            snap = rig.snap("snap", "P 8")
            # Extents that differ, more than there is room for at first.
            for sector in range(0, SECTORS, 16):
                rig.write("base", sector)
            for number in range(20):
                dm.create(f"z{number}", "0 8 zero")
            lines = [
                f"{16 * i} 8 linear snap {8 * i}\n{16 * i + 8} 8 zero" for i in range(SECTORS // 8)
            ]
            dm.create("many", "\n".join(lines))
            with fault:
                done = attempt(errno.ENOMEM, dm.device("many").extents)
            assert done == (not fault.fired)
            assert len(dm.device("many").extents()) == 2 * SECTORS // 8
            assert snap.pread(SIZE, 0) == rig.before


def test_without_memory_a_filter_fails_the_request(faults, dm, tmp_path):
    path = image(tmp_path / "a.img", 64)
    device = dm.create("x", f"0 64 flakey {path} 0 0 60 5 corrupt_bio_byte 1 r 255 0")
    with faults.fault(MEMORY, errno.ENOMEM), pytest.raises(MemoryError, match="no memory"):
        device.pread(SECTOR, 0)
    assert device.pread(SECTOR, 0) == b"\xff" + bytes(SECTOR - 1)


# --- barriers and disks -------------------------------------------------------------------------


def test_a_flush_and_a_barrier_reach_the_system(faults, tmp_path):
    with cow.Mapper(durability="power") as dm:
        rig = Rig(dm, tmp_path, SECTORS)
        rig.snap("snap", "P 8")
        with faults.fault("fdatasync", errno.EIO) as flush:
            assert not attempt(errno.EIO, dm.device("base").flush)
        with faults.fault("msync", errno.EIO) as barrier:
            rig.write("base", 0)
        assert flush.fired
        assert barrier.fired
        assert rig.usage("snap") == "Invalid"


def test_a_barrier_waits_for_all_that_was_copied_and_for_the_record(faults, tmp_path):
    with cow.Mapper(durability="power") as dm:
        rig = Rig(dm, tmp_path, SECTORS)
        rig.snap("snap", "P 8")
        rig.write("base", 0)
        faults.synced()
        rig.write("base", 8, 40)
        assert faults.synced() >= 40 * SECTOR + 5 * 16


@pytest.mark.parametrize("times", [1, FOREVER])
def test_a_flush_that_fails_costs_no_more_than_a_snapshot(faults, folders, times):
    for fault, folder in zip(
        faults.each("fdatasync msync", errno.EIO, times), folders, strict=False
    ):
        with cow.Mapper(durability="power") as dm:
            devices = watched(dm, folder, errno.EIO)
            with fault:
                write_everywhere(devices)
                flushed = attempt(errno.EIO, dm.device("base").flush)
            assert flushed or fault.fired
            devices.check()
            devices.check_reopened()


def test_where_what_lies_behind_the_records_cannot_be_zeroed_only_the_snapshot_is_lost(
    faults, folders
):
    for fault, folder in zip(faults.each("fdatasync msync", errno.EIO), folders, strict=False):
        with cow.Mapper(durability="power") as dm:
            rig = Rig(dm, folder, SECTORS)
            rig.snap("snap", "P 8")
            rig.write("base", 0)
        with open(rig.cows["snap"], "r+b") as store:
            # A record that no commit got to: the one before it ends the list.
            store.seek(8 * SECTOR + 2 * 16)
            store.write(struct.pack("<QQ", 9, 7))
        with cow.Mapper(durability="power") as rig.dm:
            rig.dm.create("base-real", f"0 {SECTORS} linear {rig.origin} 0")
            rig.dm.create("snap", rig.line("snap", "P 0"))
            rig.dm.create("base", f"0 {SECTORS} snapshot-origin base-real")
            with fault:
                rig.write("base", 16)
            lost = rig.usage() == "Invalid"
            assert lost == fault.fired
        if not lost:
            assert rig.records() == [(0, 2), (2, 3)]
        with cow.Mapper(durability="power") as rig.dm:
            rig.dm.create("base-real", f"0 {SECTORS} linear {rig.origin} 0")
            rig.dm.create("snap", rig.line("snap", "P 0"))
            assert rig.usage() == ("Invalid" if lost else "32/2048 16")
            assert rig.read("base-real", 16, 8) == stamp(16, 8, 1)
            if not lost:
                assert rig.read("snap") == rig.before


@pytest.mark.parametrize("times", [1, FOREVER])
def test_a_merge_whose_flush_fails_stops_and_goes_on_later(faults, folders, times):
    for fault, folder in zip(
        faults.each("fdatasync msync", errno.EIO, times), folders, strict=False
    ):
        with cow.Mapper(durability="power") as dm:
            rig = Rig(dm, folder, SECTORS)
            rig.snap("snap", "P 1")
            rig.snap("other", "P 4")
            rig.write("snap", 8, 40)
            rig.write("snap", 100, 2)
            moment = rig.read("snap")
            dm.suspend("base")
            dm.remove("snap")
            dm.load("base", rig.line("snap", kind="snapshot-merge"))
            with fault:
                dm.resume("base")
                dm.wait_merge("base", timeout=60)
            assert rig.read("base") == moment
        finish_merge(rig, moment, "2/2048 2")


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("call", ["pwrite", "pread", "lseek", "ftruncate"])
def test_a_disk_error_costs_no_more_than_a_snapshot(faults, folders, call, code):
    for fault, folder in zip(faults.each(call, code), folders, strict=False):
        with cow.Mapper(durability="process") as dm:
            dm.image(image(folder / "growing.cow", 8), size=1 << 20)
            devices = watched(dm, folder, code, sparse=True)
            rig = devices.rig
            rig.cows["growing"] = str(folder / "growing.cow")
            with fault:
                attempt(code, dm.create, "growing", rig.line("growing"))
                if "growing" in dm.names():
                    devices.contents["growing"] = Content(rig.before)
                    devices.write("growing", 8 * SECTOR, 16 * SECTOR)
                    devices.write("growing", 3, SECTOR)
                devices.write("sparse", 8 * SECTOR, 16 * SECTOR)
                devices.write("sparse", 3, SECTOR)
                write_everywhere(devices)
            devices.check()
            devices.check_reopened()


def test_a_write_that_a_signal_cut_short_goes_on(faults, tmp_path, dm):
    rig = Rig(dm, tmp_path, SECTORS)
    os.truncate(image(tmp_path / "s.cow", 0), 1 << 20)
    rig.cows["snap"] = str(tmp_path / "s.cow")
    snap = dm.create("snap", rig.line("snap"))
    with faults.fault("pwrite", errno.EINTR, times=3) as fault:
        rig.write("base", 0, SECTORS)
    assert fault.fired
    assert snap.pread(SIZE, 0) == rig.before


def test_a_discard_writes_zeros_where_no_hole_can_be_made(faults, tmp_path, dm):
    device = dm.create("x", f"0 64 linear {image(tmp_path / 'a.img', stamp(0, 64, 1))} 0")
    with faults.fault("fallocate", errno.EOPNOTSUPP) as fault:
        device.discard(8 * SECTOR, 8 * SECTOR)
    assert fault.fired
    assert device.pread(64 * SECTOR, 0) == (stamp(0, 8, 1) + bytes(8 * SECTOR) + stamp(16, 48, 1))
    with faults.fault("fallocate", errno.EIO), pytest.raises(OSError, match="EIO"):
        device.discard(0, 8 * SECTOR)
    assert device.pread(8 * SECTOR, 0) == stamp(0, 8, 1)


def test_extents_call_data_what_nobody_can_tell(faults, tmp_path, dm):
    path = image(tmp_path / "a.img", 0)
    os.truncate(path, 64 * SECTOR)
    device = dm.create("x", f"0 64 linear {path} 0")
    assert device.extents()["zero"].tolist() == [True]
    with faults.fault("lseek", errno.EINVAL, times=FOREVER):
        found = device.extents()
    assert found["zero"].tolist() == [False]
    assert found["length"].tolist() == [64 * SECTOR]


@pytest.mark.parametrize(("call", "text"), [("mmap", "cannot map"), ("sigaction", "no SIGBUS")])
def test_an_image_that_cannot_be_mapped_is_refused_and_not_locked(faults, tmp_path, dm, call, text):
    path = image(tmp_path / "a.img", 8)
    with faults.fault(call, errno.EAGAIN), pytest.raises(OSError, match=text) as caught:
        dm.create("x", f"0 8 linear {path} 0")
    assert caught.value.errno == errno.EAGAIN
    with cow.Mapper() as other:
        other.create("x", f"0 8 linear {path} 0")


# --- NBD ----------------------------------------------------------------------------------------


def talk(client: Client, data: bytes) -> Iterator[bool]:
    """Write and read over a connection; whether each request was done."""
    for kind, offset, length, payload in (
        (WRITE, 4096, len(data), data),
        (READ, 4096, len(data), b""),
        (WRITE_ZEROES, 0, 4096, b""),
        (FLUSH, 0, 0, b""),
        (TRIM, 0, 4096, b""),
        (READ, 0, 512, b""),
    ):
        error, answer = client.ask(kind, offset, length, payload)
        assert error in (0, errno.ENOMEM, errno.EIO)
        if kind == READ and not error:
            assert answer in (data, bytes(length), stamp(8, length // SECTOR, 0), stamp(0, 1, 0))
        yield not error


@pytest.mark.parametrize(
    ("calls", "code"),
    [
        (MEMORY, errno.ENOMEM),
        ("send", errno.ECONNRESET),
        ("recv", errno.ECONNRESET),
        ("send recv", errno.EINTR),
    ],
)
def test_a_fault_of_one_connection_is_no_fault_of_another(faults, folders, calls, code):
    for fault, folder in zip(faults.each(calls, code), folders, strict=False):
        with cow.Mapper(durability="process") as dm:
            rig = Rig(dm, folder, 4096)
            with NbdServer(dm, f"unix:{folder}/nbd.sock"):
                client = Client(folder / "nbd.sock")
                client.go("base-real")
                done = []
                with fault, contextlib.suppress(EOFError, ConnectionError):
                    # Both buffers have to become larger.
                    done += talk(client, stamp(0, 1024, 7))
                client.close()
                assert fault.fired or all(done)
                if code == errno.EINTR:
                    assert len(done) == 6
                    assert all(done)
                other = Client(folder / "nbd.sock")
                other.go("base-real")
                assert other.ask(WRITE, 0, 512, b"x" * 512) == (0, b"")
                assert other.ask(READ, 0, 512) == (0, b"x" * 512)
                other.close()
            assert rig.read("base", 0, 1) == b"x" * 512
