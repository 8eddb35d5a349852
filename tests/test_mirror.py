"""The mirror target: refusals and lines as the real kernel gave them, and what a failing leg costs.

The texts, statuses and event counts were seen on Linux 6.1 (dm-mirror 1.14.0).
"""

from __future__ import annotations

import errno
import struct
from pathlib import Path

import pytest
from support import SECTOR, image, stamp

import cow

SECTORS = 2048
HALF_BAD = "0 1024 linear {c} 0\n1024 1024 error"
EIO = f"^{errno.EIO}$"


@pytest.fixture
def dm():
    with cow.Mapper(durability="process") as mapper:
        yield mapper


class Legs:
    """Images to make mirrors of: a, b and c, and a log."""

    def __init__(self, dm: cow.Mapper, folder: Path) -> None:
        self.dm = dm
        self.paths = {name: image(folder / f"{name}.img", SECTORS) for name in "abc"}
        self.paths["log"] = image(folder / "log.img", 64)

    def fill(self, table: str) -> str:
        return table.format(**self.paths)

    def create(self, table: str, name: str = "m", *, readonly: bool = False) -> cow.Device:
        return self.dm.create(name, self.fill(table), readonly=readonly)

    def bytes_of(self, name: str) -> bytes:
        return Path(self.paths[name]).read_bytes()

    def put(self, name: str, data: bytes, offset: int = 0) -> None:
        with open(self.paths[name], "r+b") as file:
            file.seek(offset)
            file.write(data)

    def log_bits(self) -> tuple[bytes, int, int, int]:
        """Return magic, version and number of regions of the log on disk, and its bits."""
        log = self.bytes_of("log")
        magic, version, count = struct.unpack_from("<4sIQ", log)
        return magic, version, count, int.from_bytes(log[1024 : 1024 + -(-count // 8)], "little")


@pytest.fixture
def legs(dm, tmp_path):
    return Legs(dm, tmp_path)


NOSYNC = "0 2048 mirror core 2 64 nosync 2 {a} 0 {b} 0 1 handle_errors"
DISK = "0 2048 mirror disk 2 {log} 64 2 {a} 0 {b} 0 1 handle_errors"


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ("", "Insufficient mirror log arguments"),
        ("core", "Insufficient mirror log arguments"),
        ("core x 64", "Invalid mirror log argument count"),
        ("core 2 64", "Insufficient mirror log arguments"),
        ("bogus 1 64 2 {a} 0 {b} 0", "Error creating mirror dirty log"),
        ("core 0 2 {a} 0 {b} 0", "Error creating mirror dirty log"),
        ("core 1 63 2 {a} 0 {b} 0", "Error creating mirror dirty log"),
        ("core 1 4096 2 {a} 0 {b} 0", "Error creating mirror dirty log"),
        ("core 1 1 2 {a} 0 {b} 0", "Error creating mirror dirty log"),
        ("core 2 64 frob 2 {a} 0 {b} 0", "Error creating mirror dirty log"),
        ("core 1 64", "Invalid number of mirrors"),
        ("core 1 64 1 {a} 0", "Invalid number of mirrors"),
        ("core 1 64 10 {a} 0", "Invalid number of mirrors"),
        ("core 1 64 2 {a} 0", "Too few mirror arguments"),
        ("core 1 64 2 {a} 0 {b} x", "Invalid offset"),
        ("core 1 64 2 {a} 0 {b} 0 1 keep_log", "keep_log feature requires the handle_errors"),
        ("core 1 64 2 {a} 0 {b} 0 2 handle_errors", "Not enough arguments to support feature"),
        ("core 1 64 2 {a} 0 {b} 0 1 bogus", "Unrecognised feature requested"),
        ("core 1 64 2 {a} 0 {b} 0 1 HANDLE_ERRORS", "Unrecognised feature requested"),
        ("core 1 64 2 {a} 0 {b} 0 1 handle_errors 5", "Too many mirror arguments"),
        ("core 1 64 2 {a} 0 {b} 0 x", "Invalid number of features"),
        ("disk 1 64 2 {a} 0 {b} 0", "Error creating mirror dirty log"),
        ("disk 2 /none 64 2 {a} 0 {b} 0", "Error creating mirror dirty log"),
    ],
)
def test_what_the_kernel_refuses_is_refused_with_its_words(legs, args, text):
    with pytest.raises(cow.TableError, match=f"mirror: {text}") as caught:
        legs.create(f"0 2048 mirror {args}")
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize(
    ("args", "table"),
    [
        ("core 1 2 2 {a} 0 {b} 0", "core 1 2 2 7:0 0 7:1 0"),
        ("core 2 64 sync 2 {a} 0 {b} 0", "core 2 64 sync 2 7:0 0 7:1 0"),
        (
            "core 2 64 nosync 2 {a} 0 {b} 0 2 keep_log handle_errors",
            "core 2 64 nosync 2 7:0 0 7:1 0 2 handle_errors keep_log",
        ),
        ("core 2 64 nosync 2 {a} 0 {b} 0 0", "core 2 64 nosync 2 7:0 0 7:1 0"),
        ("disk 2 {log} 64 2 {a} 0 {b} 0", "disk 2 7:0 64 2 7:1 0 7:2 0"),
    ],
)
def test_the_table_line_is_the_kernels(legs, args, table):
    legs.create(f"0 2048 mirror {args}")
    assert legs.dm.table("m", numbers=True) == f"0 2048 mirror {table}"


@pytest.mark.parametrize(
    ("table", "status", "events"),
    [
        ("0 2048 mirror core 1 2 2 {a} 0 {b} 0", "2 7:0 7:1 1024/1024 1 AA 1 core", 1),
        ("0 2048 mirror core 2 64 sync 2 {a} 0 {b} 0", "2 7:0 7:1 32/32 1 AA 1 core", 1),
        (NOSYNC, "2 7:0 7:1 32/32 1 AA 1 core", 0),
        (DISK, "2 7:1 7:2 32/32 1 AA 3 disk 7:0 A", 1),
        (
            "0 2000 mirror core 2 64 nosync 3 {a} 0 {b} 8 {c} 0",
            "3 7:0 7:1 7:2 32/32 1 AAA 1 core",
            0,
        ),
    ],
)
def test_the_status_line_and_the_events_are_the_kernels(legs, table, status, events):
    legs.create(table)
    assert legs.dm.status("m", numbers=True).split(" ", 3)[3] == status
    assert legs.dm.events("m") == events


def test_a_write_goes_to_every_leg(legs):
    m = legs.create("0 2040 mirror core 2 64 nosync 3 {a} 0 {b} 8 {c} 4")
    data = stamp(0, 100, 1)
    m.pwrite(data, 300 * SECTOR)
    for name, start in (("a", 0), ("b", 8), ("c", 4)):
        at = (300 + start) * SECTOR
        assert legs.bytes_of(name)[at : at + len(data)] == data


def test_a_leg_that_cannot_be_read_is_replaced_by_the_next(legs):
    legs.put("b", stamp(0, SECTORS, 7))
    legs.put("c", stamp(0, SECTORS, 7))
    legs.create(HALF_BAD, "bad")
    m = legs.create("0 2048 mirror core 2 64 nosync 2 bad 0 {b} 0 1 handle_errors")
    assert m.pread(SECTORS * SECTOR, 0) == stamp(0, SECTORS, 7)
    assert legs.dm.status("m").endswith("32/32 1 RA 1 core")
    assert legs.dm.events("m") == 1
    m.pread(4096, 1600 * SECTOR)
    assert legs.dm.events("m") == 1


def test_without_a_good_leg_a_read_fails(legs):
    legs.create("0 2048 error", "bad")
    legs.create("0 2048 error", "worse")
    m = legs.create("0 2048 mirror core 2 64 nosync 2 bad 0 worse 0 1 handle_errors")
    with pytest.raises(cow.DeviceIOError) as caught:
        m.pread(4096, 0)
    assert caught.value.errno == errno.EIO
    assert legs.dm.status("m").endswith("32/32 1 RR 1 core")
    assert legs.dm.events("m") == 2


@pytest.mark.parametrize(("features", "events"), [("", 0), ("1 handle_errors", 1)])
def test_a_write_that_another_leg_refuses_is_done_and_leaves_the_region_out_of_sync(
    legs, features, events
):
    legs.create(HALF_BAD, "bad")
    m = legs.create(f"0 2048 mirror core 2 64 nosync 2 {{a}} 0 bad 0 {features}")
    data = stamp(1600, 8, 1)
    m.pwrite(data, 1600 * SECTOR)
    assert m.pread(len(data), 1600 * SECTOR) == data
    assert legs.dm.status("m").endswith("31/32 1 AD 1 core")
    assert legs.dm.events("m") == events


def test_a_write_that_the_first_leg_refuses_fails_and_the_others_keep_the_old_data(legs):
    legs.create(HALF_BAD, "bad")
    m = legs.create("0 2048 mirror core 2 64 nosync 2 bad 0 {b} 0 1 handle_errors")
    with pytest.raises(cow.DeviceIOError):
        m.pwrite(stamp(1600, 8, 1), 1600 * SECTOR)
    assert legs.dm.status("m").endswith("32/32 1 DA 1 core")
    assert m.pread(8 * SECTOR, 1600 * SECTOR) == bytes(8 * SECTOR)


def test_legs_that_may_differ_are_made_equal_to_the_first(legs):
    legs.put("a", stamp(0, SECTORS, 1))
    legs.put("b", stamp(0, SECTORS, 2))
    legs.create("0 2048 mirror core 1 64 2 {a} 0 {b} 0")
    assert legs.bytes_of("b") == legs.bytes_of("a") == stamp(0, SECTORS, 1)


def test_nosync_legs_are_left_alone(legs):
    legs.put("b", stamp(0, SECTORS, 2))
    legs.create(NOSYNC)
    assert legs.bytes_of("b") == stamp(0, SECTORS, 2)


def test_a_read_only_mirror_changes_no_leg_and_no_log(legs):
    legs.put("b", stamp(0, SECTORS, 2))
    before = {name: legs.bytes_of(name) for name in legs.paths}
    m = legs.create(DISK, readonly=True)
    assert m.pread(4096, 0) == bytes(4096)
    assert legs.dm.status("m").endswith(" 0/32 1 AA 3 disk " + legs.paths["log"] + " A")
    legs.dm.remove("m")
    assert {name: legs.bytes_of(name) for name in legs.paths} == before


def test_while_live_the_log_calls_every_region_out_of_sync(legs):
    legs.create(DISK)
    assert legs.log_bits() == (b"rRiM", 2, 32, 0)
    legs.dm.suspend("m")
    assert legs.log_bits() == (b"rRiM", 2, 32, 2**32 - 1)
    legs.dm.resume("m")
    assert legs.log_bits() == (b"rRiM", 2, 32, 0)
    legs.dm.remove("m")
    assert legs.log_bits() == (b"rRiM", 2, 32, 2**32 - 1)


def test_regions_the_log_calls_in_sync_are_not_compared(legs):
    legs.create(DISK)
    legs.dm.remove("m")
    legs.put("b", b"x" * 512, 64 * SECTOR)
    legs.put("log", struct.pack("<I", 0xFFFFFFFE), 1024)
    legs.put("b", b"y" * 512, 0)
    legs.create(DISK)
    assert legs.bytes_of("b")[:512] == bytes(512)
    assert legs.bytes_of("b")[64 * SECTOR :][:512] == b"x" * 512


def test_regions_that_lost_their_sync_are_so_in_the_log(legs):
    legs.create(HALF_BAD, "bad")
    m = legs.create("0 2048 mirror disk 3 {log} 64 nosync 2 {a} 0 bad 0 1 handle_errors")
    m.pwrite(stamp(1600, 8, 1), 1600 * SECTOR)
    legs.dm.remove("m")
    assert legs.log_bits()[3] == 2**32 - 1 - (1 << 1600 // 64)


def test_a_leg_that_works_again_is_brought_in_sync_at_the_next_resume(legs):
    legs.create(HALF_BAD, "bad")
    m = legs.create("0 2048 mirror core 2 64 nosync 2 {a} 0 bad 0 1 handle_errors")
    m.pwrite(stamp(1600, 8, 1), 1600 * SECTOR)
    legs.dm.suspend("m")
    legs.dm.load("bad", legs.fill("0 2048 linear {c} 0"))
    legs.dm.resume("bad")
    legs.dm.resume("m")
    assert legs.bytes_of("c") == legs.bytes_of("a")
    assert legs.dm.status("m").endswith("32/32 1 AA 1 core")


def test_a_mirror_over_a_suspended_leg_does_not_go_live(legs):
    legs.create("0 2048 linear {b} 0", "leg")
    legs.dm.suspend("leg")
    with pytest.raises(cow.ResumeError, match="a device below is suspended"):
        legs.create("0 2048 mirror core 1 64 2 {a} 0 leg 0")


def test_an_origin_may_be_a_mirror(legs, tmp_path):
    legs.create(NOSYNC, "real")
    base = legs.create("0 2048 snapshot-origin real", "base")
    store = image(tmp_path / "store.img", SECTORS)
    snap = legs.dm.create("snap", f"0 2048 snapshot real {store} P 8")
    base.pwrite(stamp(8, 16, 1), 8 * SECTOR)
    assert snap.pread(16 * SECTOR, 8 * SECTOR) == bytes(16 * SECTOR)
    assert base.pread(16 * SECTOR, 8 * SECTOR) == stamp(8, 16, 1)
    assert legs.bytes_of("a") == legs.bytes_of("b")


def test_a_store_may_be_a_mirror(legs, tmp_path):
    origin = image(tmp_path / "origin.img", stamp(0, SECTORS, 1))
    legs.create(NOSYNC, "cow")
    snap = legs.dm.create("snap", f"0 2048 snapshot {origin} cow P 8")
    snap.pwrite(stamp(3, 100, 2), 3 * SECTOR)
    legs.dm.remove("snap")
    assert legs.bytes_of("a") == legs.bytes_of("b")
    snap = legs.dm.create("snap", f"0 2048 snapshot {origin} cow P 8")
    expected = stamp(0, 3, 1) + stamp(3, 100, 2) + stamp(103, SECTORS - 103, 1)
    assert snap.pread(SECTORS * SECTOR, 0) == expected


def test_a_leg_may_have_snapshots(legs, tmp_path):
    legs.create("0 2048 linear {a} 0", "real")
    legs.create("0 2048 snapshot-origin real", "leg")
    store = image(tmp_path / "store.img", SECTORS)
    snap = legs.dm.create("snap", f"0 2048 snapshot real {store} P 8")
    m = legs.create("0 2048 mirror core 2 64 nosync 2 {b} 0 leg 0")
    m.pwrite(stamp(3, 100, 2), 3 * SECTOR)
    assert m.pread(100 * SECTOR, 3 * SECTOR) == stamp(3, 100, 2)
    assert legs.bytes_of("a") == legs.bytes_of("b")
    assert snap.pread(SECTORS * SECTOR, 0) == bytes(SECTORS * SECTOR)


def test_a_discard_goes_to_every_leg(legs):
    m = legs.create(NOSYNC)
    m.pwrite(stamp(0, SECTORS, 1), 0)
    m.discard(0, 1 << 19)
    expected = bytes(1 << 19) + stamp(1024, 1024, 1)
    assert legs.bytes_of("a") == legs.bytes_of("b") == expected


def test_a_flush_passes_an_error_target(legs):
    legs.create(HALF_BAD, "bad").flush()
    legs.create("0 8 error", "worse").flush()


# --- what a log or a leg that fails costs ---------------------------------------------------------


def test_a_mirror_that_was_only_suspended_is_not_compared_again(legs):
    legs.create(NOSYNC)
    legs.dm.suspend("m")
    legs.put("b", b"x" * 512)
    legs.dm.resume("m")
    assert legs.bytes_of("b")[:512] == b"x" * 512


def test_a_log_that_cannot_be_read_keeps_the_mirror_from_going_live(legs):
    legs.create("0 64 error", "bad")
    with pytest.raises(cow.ResumeError, match="log of the mirror") as caught:
        legs.create("0 2048 mirror disk 2 bad 64 2 {a} 0 {b} 0")
    assert caught.value.errno == errno.EIO


def test_a_log_of_another_version_keeps_the_mirror_from_going_live(legs):
    legs.put("log", struct.pack("<4sIQ", b"rRiM", 3, 32))
    before = {name: legs.bytes_of(name) for name in legs.paths}
    with pytest.raises(cow.ResumeError, match="log version 3, not 2"):
        legs.create(DISK)
    assert {name: legs.bytes_of(name) for name in legs.paths} == before


@pytest.mark.parametrize("fault", ["suspended", "error_writes"])
def test_a_log_that_was_not_written_at_suspend_has_the_legs_compared(legs, caplog, fault):
    legs.create("0 64 linear {log} 0", "log")
    legs.create(DISK.replace("{log}", "log"))
    if fault == "suspended":
        legs.dm.suspend("log")
    else:
        legs.dm.load("log", legs.fill("0 64 flakey {log} 0 0 1 1 error_writes"))
        legs.dm.resume("log")
    legs.dm.suspend("m")
    assert "not written" in caplog.text
    assert legs.log_bits()[3] == 0
    legs.put("b", b"x" * 512)
    legs.dm.remove("m", force=True)
    legs.dm.load("log", legs.fill("0 64 linear {log} 0"))
    legs.dm.resume("log")
    legs.create(DISK.replace("{log}", "log"))
    assert legs.bytes_of("b") == legs.bytes_of("a")


def test_a_leg_that_cannot_be_brought_in_sync_is_left_out_of_it(legs, caplog):
    legs.put("a", stamp(0, SECTORS, 1))
    legs.create("0 2048 error", "bad")
    m = legs.create("0 2048 mirror core 1 64 2 {a} 0 bad 0")
    assert "legs not brought in sync" in caplog.text
    assert legs.dm.status("m").split()[6] == "0/32"
    assert m.pread(SECTORS * SECTOR, 0) == stamp(0, SECTORS, 1)


def test_no_leg_that_may_be_stale_is_read_instead_of_the_first(legs):
    legs.put("a", stamp(0, SECTORS, 1))
    legs.create("0 2048 linear {a} 0", "first")
    legs.create("0 2048 error", "bad")
    m = legs.create("0 2048 mirror core 1 64 3 first 0 {b} 0 bad 0")
    legs.dm.load("first", "0 2048 error")
    legs.dm.resume("first")
    with pytest.raises(cow.DeviceIOError, match="EIO"):
        m.pread(SECTOR, 0)
