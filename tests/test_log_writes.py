"""The log-writes target: its lines and messages, and a log as stock tools read it."""

from __future__ import annotations

import errno
import random
import struct
import threading
from pathlib import Path

import pytest
from support import SECTOR, Rig, image, stamp, store_records
from support.crash import DISCARD, FLUSH, LOG_END, MARK, Entry, read_log

import cow

SECTORS = 256


@pytest.fixture
def dm():
    with cow.Mapper() as mapper:
        yield mapper


@pytest.fixture
def paths(tmp_path):
    disk = image(tmp_path / "disk.img", stamp(0, SECTORS, 1))
    log = image(tmp_path / "disk.log", 8192)
    return disk, log


@pytest.fixture
def dev(dm, paths):
    disk, log = paths
    return dm.create("disk", f"0 {SECTORS} log-writes {disk} {log}")


def logged(dm: cow.Mapper, log: str) -> list[Entry]:
    """Remove the device and return its log without the mark at its end."""
    dm.remove("disk")
    *entries, end = read_log(log)
    assert end.text == LOG_END
    return entries


def replayed(before: bytes, entries: list[Entry]) -> bytes:
    """Play a log back as a stock tool does."""
    disk = bytearray(before)
    for entry in entries:
        at = entry.sector * SECTOR
        data = bytes(entry.count * SECTOR) if entry.flags & DISCARD else entry.data
        if not entry.flags & MARK:
            disk[at : at + len(data)] = data
    return bytes(disk)


def test_its_table_and_status_lines(dm, dev, paths):
    disk, log = paths
    assert dm.table("disk") == f"0 {SECTORS} log-writes {disk} {log}"
    assert dm.status("disk") == f"0 {SECTORS} log-writes 0 0"
    dev.pwrite(bytes(3 * SECTOR), 0)
    assert dm.status("disk") == f"0 {SECTORS} log-writes 1 4"
    assert dm.message("disk", 0, "mark here") == ""
    assert dm.status("disk") == f"0 {SECTORS} log-writes 2 5"
    assert ("log-writes", (1, 1, 0)) in dm.targets()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("{disk}", "log-writes: Invalid argument count"),
        ("{disk}.no {log}", "log-writes: Device lookup failed"),
        ("{disk} {log}.no", "log-writes: Log device lookup failed"),
    ],
)
def test_it_refuses_with_the_words_of_the_kernel(dm, paths, words, text):
    disk, log = paths
    with pytest.raises(cow.TableError, match=text):
        dm.create("disk", f"0 {SECTORS} log-writes " + words.format(disk=disk, log=log))


def test_it_does_not_stand_on_a_snapshot(dm, tmp_path, paths):
    Rig(dm, tmp_path, SECTORS).snap()
    with pytest.raises(cow.TableError, match="neither an image nor linear targets"):
        dm.create("disk", f"0 {SECTORS} log-writes snap {paths[1]}")


@pytest.mark.parametrize("text", ["mark", "mark a b", "remember x"])
def test_other_messages_are_refused(dm, dev, text):
    with pytest.raises(cow.CowError) as caught:
        dm.message("disk", 0, text)
    assert caught.value.errno == errno.EINVAL


def test_everything_is_logged_in_order(dm, dev, paths):
    data = stamp(100, 2, 5)
    dev.pwrite(data, 4 * SECTOR)
    dev.flush()
    dm.message("disk", 0, "MARK middle")
    dev.discard(8 * SECTOR, 16 * SECTOR)
    dev.pread(SECTOR, 0)
    dev.write_zeroes(SECTOR, SECTOR)
    write, flush, mark, discard, zeroes = logged(dm, paths[1])
    assert write == Entry(4, 2, 0, 0, data)
    assert flush == Entry(0, 0, FLUSH, 0, b"")
    assert (mark.flags, mark.text) == (MARK, "middle")
    assert discard == Entry(8, 16, DISCARD, 0, b"")
    assert zeroes == Entry(1, 1, 0, 0, bytes(SECTOR))


def test_parts_of_sectors_are_logged_as_whole_ones(dm, dev, paths):
    dev.pwrite(b"a" * 10, SECTOR + 100)
    dev.pwrite(b"b" * 10, SECTOR + 105)
    dev.pwrite(b"c" * 600, SECTOR - 50)
    disk = bytearray(stamp(0, SECTORS, 1))
    entries = logged(dm, paths[1])
    for entry, data, at in zip(
        entries,
        (b"a" * 10, b"b" * 10, b"c" * 600),
        (SECTOR + 100, SECTOR + 105, SECTOR - 50),
        strict=True,
    ):
        disk[at : at + len(data)] = data
        place = slice(entry.sector * SECTOR, (entry.sector + entry.count) * SECTOR)
        assert entry.data == disk[place]
    assert [(entry.sector, entry.count) for entry in entries] == [(1, 1), (1, 1), (0, 3)]


def test_a_flush_of_a_range_names_it(dm, tmp_path, paths):
    disk, log = paths
    Path(disk).write_bytes(bytes(SECTORS * SECTOR))
    origin = image(tmp_path / "o.img", 64)
    dm.create("disk", f"0 {SECTORS} log-writes {disk} {log}")
    dm.create("snap", f"0 64 snapshot {origin} disk P 8")
    dm.device("snap").pwrite(b"x" * 4096, 8192)
    dm.remove("snap")
    area, barrier, zeroes, header, barrier2, data, barrier3, record, barrier4 = logged(dm, log)
    assert (area.sector, area.count) == (8, 8)
    assert barrier == Entry(8, 0, FLUSH, 4096, b"")
    assert (zeroes.sector, zeroes.count, header.sector, header.count) == (0, 8, 0, 1)
    assert barrier2 == Entry(0, 0, FLUSH, 4096, b"")
    assert data == Entry(16, 8, 0, 0, b"x" * 4096)
    assert barrier3 == Entry(16, 0, FLUSH, 4096, b"")
    assert (record.sector, record.count, record.data[:16]) == (8, 1, struct.pack("<QQ", 2, 2))
    assert barrier4 == Entry(8, 0, FLUSH, 16, b"")
    assert store_records(Path(disk).read_bytes()) == [(2, 2)]


def test_a_log_played_back_is_the_disk(dm, tmp_path, dev, paths, seed):
    rng = random.Random(seed)
    for _ in range(200):
        size = rng.choice((1, 7, 512, 1000, 4096))
        dev.pwrite(rng.randbytes(size), rng.randrange(SECTORS * SECTOR - size))
        if rng.random() < 0.1:
            dev.discard(rng.randrange(SECTORS) * SECTOR, rng.randrange(20) * SECTOR)
    entries = logged(dm, paths[1])
    assert replayed(stamp(0, SECTORS, 1), entries) == Path(paths[0]).read_bytes()


def test_threads_that_share_sectors_are_logged_as_they_end(dm, dev, paths):
    def work(number: int) -> None:
        for sector in range(32):
            for _ in range(3):
                dev.pwrite(bytes([number + 1]) * 64, sector * SECTOR + number * 64)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    entries = logged(dm, paths[1])
    assert len(entries) == 8 * 32 * 3
    assert replayed(stamp(0, SECTORS, 1), entries) == Path(paths[0]).read_bytes()


def test_it_stands_on_linear_targets_at_its_own_start(dm, paths):
    disk, log = paths
    dm.create("low", f"0 100 linear {disk} 50\n100 56 linear {disk} 0")
    dm.create("disk", f"0 90 zero\n90 20 log-writes low {log}")
    dm.device("disk").pwrite(b"y", 95 * SECTOR)
    dm.device("disk").pwrite(b"z", 105 * SECTOR + 1)
    one, two = logged(dm, log)
    assert (one.sector, one.data) == (95, b"y" + stamp(145, 1, 1)[1:])
    assert (two.sector, two.data[1:2], two.data[2:]) == (105, b"z", stamp(5, 1, 1)[2:])


def test_a_full_log_disables_logging_and_nothing_else(dm, tmp_path, paths):
    disk, log = paths[0], image(tmp_path / "small.log", 8)
    dm.create("disk", f"0 {SECTORS} log-writes {disk} {log}")
    for sector in range(10):
        dm.device("disk").pwrite(b"x" * SECTOR, sector * SECTOR)
    assert dm.status("disk").endswith(" logging_disabled")
    dm.remove("disk")
    assert Path(disk).read_bytes()[: 10 * SECTOR] == b"x" * 10 * SECTOR


def test_a_log_device_that_fails_disables_logging_and_nothing_else(dm, paths):
    dm.create("bad", "0 64 error")
    dm.create("disk", f"0 {SECTORS} log-writes {paths[0]} bad")
    dm.device("disk").pwrite(b"x" * SECTOR, 0)
    dm.suspend("disk")
    assert dm.status("disk").endswith(" logging_disabled")
    dm.resume("disk")
    assert dm.device("disk").pread(1, 0) == b"x"


def test_a_table_that_never_was_live_leaves_the_log_alone(dm, paths):
    disk, log = paths
    Path(log).write_bytes(b"precious" * 8192)
    dm.create("disk", None)
    dm.load("disk", f"0 {SECTORS} log-writes {disk} {log}")
    dm.clear("disk")
    dm.remove("disk")
    assert Path(log).read_bytes() == b"precious" * 8192


def test_suspend_waits_for_the_log(dm, dev, paths):
    dev.pwrite(b"x" * 65536, 0)
    dm.message("disk", 0, "mark done")
    dm.suspend("disk")
    assert [entry.text for entry in read_log(paths[1])] == ["", "done"]


def test_a_suspended_log_device_holds_up_nothing(dm, paths):
    disk, log = paths
    dm.create("log", f"0 4096 linear {log} 0")
    dev = dm.create("disk", f"0 {SECTORS} log-writes {disk} log")
    dm.suspend("log")
    dev.pwrite(b"x" * SECTOR, 0)
    dm.message("disk", 0, "mark late")
    dm.suspend("disk")
    dm.resume("log")
    dm.resume("disk")
    assert [entry.text for entry in logged(dm, log)] == ["", "late"]


def test_a_log_device_suspended_at_the_end_loses_what_is_not_written(dm, paths, caplog):
    disk, log = paths
    dm.create("log", f"0 4096 linear {log} 0")
    dev = dm.create("disk", f"0 {SECTORS} log-writes {disk} log")
    dm.suspend("log")
    dev.pwrite(b"x" * SECTOR, 0)
    dm.remove("disk")
    assert "log entries lost" in caplog.text
    dm.resume("log")
    assert Path(disk).read_bytes()[:SECTOR] == b"x" * SECTOR


def test_a_write_in_part_to_what_is_gone_below_fails(dm, paths):
    disk, log = paths
    dm.create("low", f"0 {SECTORS} linear {disk} 0")
    dev = dm.create("disk", f"0 {SECTORS} log-writes low {log}")
    dm.load("low", f"0 8 linear {disk} 0")
    dm.resume("low")
    with pytest.raises(OSError, match="EIO"):
        dev.pwrite(b"x", 100 * SECTOR)
    dev.pwrite(b"x", 1)
    (entry,) = logged(dm, log)
    assert entry.data == stamp(0, 1, 1)[:1] + b"x" + stamp(0, 1, 1)[2:]


def test_blocks_written_in_part_are_logged_whole_however_many_there_are(
    dm, dev, paths, monkeypatch
):
    monkeypatch.setattr("cow.targets.log_writes.KNOWN_BLOCKS", 2)
    for sector in range(0, 64, 2):
        dev.pwrite(b"x" * 10, sector * SECTOR + 7)
        dev.pwrite(b"y" * 10, sector * SECTOR + 20)
    entries = logged(dm, paths[1])
    assert len(entries) == 64
    assert replayed(stamp(0, SECTORS, 1), entries) == Path(paths[0]).read_bytes()


def test_a_long_mark_is_cut_to_its_sector(dm, dev, paths):
    dm.message("disk", 0, "mark " + "m" * 1000)
    assert logged(dm, paths[1])[0].text == "m" * (SECTOR - 33)
