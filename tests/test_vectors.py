"""What the real kernel did in twenty-one small experiments, each number and byte as it was seen."""

from __future__ import annotations

import errno
import itertools
from pathlib import Path

import numpy as np
import pytest
from support import (
    SECTOR,
    Rig,
    area_location,
    header_bytes,
    image,
    merge_is_over,
    poll,
    refused,
    stamp,
    store_bytes,
    wait_merge,
)

import cow


@pytest.fixture
def dm():
    with cow.Mapper(durability="process") as mapper:
        yield mapper


@pytest.fixture
def rig(dm, tmp_path):
    return Rig(dm, tmp_path)


# --- V1, V2: a fresh store ----------------------------------------------------------------------


@pytest.fixture
def fresh(dm, tmp_path):
    """A fresh store on an image full of old data after its zero magic."""
    origin = image(tmp_path / "b.img", 8192)
    old = bytes(SECTOR) + b"\xaa" * (2047 * SECTOR)
    store = image(tmp_path / "c.img", old)
    dm.create("snap", f"0 8192 snapshot {origin} {store} P 8")
    return Path(store).read_bytes()


def test_a_fresh_store_gets_a_header_of_one_chunk(fresh):
    assert fresh[:16] == bytes.fromhex("536e4170 01000000 01000000 08000000")
    assert fresh[16:4096] == bytes(4080)


def test_a_fresh_store_gets_an_empty_first_area(fresh):
    assert fresh[4096:8192] == bytes(4096)


def test_a_fresh_store_leaves_its_data_chunks_alone(fresh):
    assert fresh[8192:] == b"\xaa" * (len(fresh) - 8192)


def test_a_fresh_store_uses_two_chunks(dm, fresh):
    assert dm.status("snap") == "0 8192 snapshot 16/2048 16"


def test_a_snapshot_prints_its_table_as_it_was_loaded(dm, fresh, tmp_path):
    assert dm.table("snap") == f"0 8192 snapshot {tmp_path}/b.img {tmp_path}/c.img P 8"


def test_a_snapshot_prints_the_numbers_of_its_images(dm, fresh):
    assert dm.table("snap", numbers=True) == "0 8192 snapshot 7:0 7:1 P 8"


@pytest.mark.parametrize("block", [512, 4096])
def test_chunk_size_zero_becomes_32_sectors(dm, tmp_path, block):
    origin = image(tmp_path / "b.img", 8192)
    store = image(tmp_path / "c.img", 2048)
    dm.image(store, logical_block_size=block)
    dm.create("snap", f"0 8192 snapshot {origin} {store} P 0")
    assert dm.table("snap").endswith(" P 32")
    assert dm.status("snap") == "0 8192 snapshot 64/2048 64"
    assert Path(store).read_bytes()[12:16] == bytes.fromhex("20000000")


def test_origin_writes_are_kept_up_to_the_end_of_the_whole_table(rig):
    """The end of the snapshot's own line does not count, on Linux 6.1."""
    store = image(rig.folder / "short.cow", 2048)
    rig.dm.suspend("base")
    rig.dm.create("short", f"0 64 snapshot base-real {store} P 8\n64 32 zero")
    rig.dm.resume("base")
    used = []
    for sector in (56, 72, 96):
        rig.write("base", sector)
        used.append(rig.dm.status("short").split()[3])
    assert used == ["24/2048", "32/2048", "32/2048"]


# --- V3, V4: exceptions in order ----------------------------------------------------------------


def write_some(rig: Rig) -> list[str]:
    """Write to origin and snapshot as in vector V3; return the usage after each write."""
    usages = []
    writes = [("base", 40, 8), ("base", 48, 8), ("base", 24, 8), ("base", 40, 8)]
    for name, sector, count in [*writes, ("snap", 96, 1), ("snap", 112, 8)]:
        rig.write(name, sector, count)
        usages.append(rig.usage())
    return usages


def test_each_first_write_takes_one_chunk(rig):
    rig.snap()
    used = ["24", "32", "40", "40", "48", "56"]
    assert write_some(rig) == [f"{sectors}/2048 16" for sectors in used]


def test_exceptions_are_recorded_in_the_order_of_the_writes(rig):
    rig.snap()
    write_some(rig)
    assert rig.records() == [(5, 2), (6, 3), (3, 4), (12, 5), (14, 6)]


def test_the_old_chunks_are_kept_where_the_records_say(rig):
    rig.snap()
    write_some(rig)
    for sector, old in [(16, 40), (24, 48), (32, 24)]:
        assert rig.cow_bytes("snap", sector, 8) == stamp(old, 8, 0)


def test_a_partial_write_to_the_snapshot_keeps_the_rest_of_its_chunk(rig):
    rig.snap()
    write_some(rig)
    assert rig.cow_bytes("snap", 40, 8) == stamp(96, 1, 1) + stamp(97, 7, 0)


def test_a_whole_chunk_written_to_the_snapshot_lands_in_the_store(rig):
    rig.snap()
    write_some(rig)
    assert rig.cow_bytes("snap", 48, 8) == stamp(112, 8, 1)


def test_a_store_opens_again_as_it_was_left(rig):
    rig.snap()
    write_some(rig)
    before = rig.read("snap")
    rig.dm.remove("snap")
    rig.dm.create("snap", rig.line("snap"))
    assert rig.usage() == "56/2048 16"
    assert rig.read("snap") == before


# --- V5, V6: a full store -----------------------------------------------------------------------


def fill_up(rig: Rig, words: str) -> None:
    """Fill a store of four chunks through the snapshot and write once more, which fails."""
    rig.snap("snap", words, cow_sectors=32)
    chunk = 0
    while True:
        try:
            rig.write("snap", 8 * chunk)
        except cow.CowError:
            break
        chunk += 1
    assert refused(rig.write, "snap", 8 * chunk) == errno.EIO


@pytest.mark.parametrize("words", ["P 8", "PO 8"])
def test_a_store_of_four_chunks_takes_two_exceptions(rig, words):
    rig.snap("snap", words, cow_sectors=32)
    rig.write("snap", 0)
    assert rig.usage() == "24/32 16"
    rig.write("snap", 8)
    assert rig.usage() == "32/32 16"
    assert refused(rig.write, "snap", 16) == errno.EIO


def test_a_full_persistent_store_makes_the_snapshot_invalid(rig):
    fill_up(rig, "P 8")
    assert rig.usage() == "Invalid"
    assert refused(rig.read, "snap", 0, 8) == errno.EIO
    assert refused(rig.write, "snap", 0) == errno.EIO


def test_a_full_persistent_store_is_marked_invalid_on_disk(rig):
    fill_up(rig, "P 8")
    assert rig.header() == bytes.fromhex("536e4170 00000000 01000000 08000000")


def test_a_full_persistent_store_stays_invalid_when_opened_again(rig):
    fill_up(rig, "P 8")
    rig.dm.remove("snap")
    rig.dm.create("snap", rig.line("snap"))
    assert rig.usage() == "Invalid"


def test_becoming_invalid_is_an_event(rig):
    fill_up(rig, "P 8")
    assert rig.dm.events("snap") == 1


def test_a_full_store_with_overflow_reports_overflow(rig):
    fill_up(rig, "PO 8")
    assert rig.usage() == "Overflow"
    assert rig.dm.events("snap") == 0
    assert rig.header() == header_bytes(8)


def test_an_overflowed_snapshot_refuses_every_write(rig):
    fill_up(rig, "PO 8")
    assert refused(rig.write, "snap", 0) == errno.EIO


def test_an_overflowed_snapshot_is_still_read(rig):
    fill_up(rig, "PO 8")
    assert rig.read("snap", 0, 16) == stamp(0, 16, 1)
    assert rig.read("snap", 16) == rig.before[16 * SECTOR :]


def test_the_chunks_before_the_one_that_overflowed_are_written(rig):
    rig.snap("snap", "PO 8", cow_sectors=32)
    assert refused(rig.write, "snap", 0, 24) == errno.EIO
    assert rig.read("snap", 0, 24) == stamp(0, 16, 1) + stamp(16, 8, 0)


def test_an_origin_write_makes_an_overflowed_snapshot_invalid(rig):
    fill_up(rig, "PO 8")
    rig.write("base", 800)
    assert rig.usage() == "Invalid"
    assert rig.dm.events("snap") == 1
    assert rig.header() == header_bytes(8, valid=0)


def test_an_overflow_is_forgotten_by_a_new_device(rig):
    fill_up(rig, "PO 8")
    rig.dm.remove("snap")
    rig.dm.create("snap", rig.line("snap", "PO 8"))
    assert rig.usage() == "32/32 16"


@pytest.mark.parametrize("words", ["PO 8", "P 8"])
def test_an_overflow_is_carried_over_a_reload(rig, words):
    fill_up(rig, "PO 8")
    rig.dm.load("snap", rig.line("snap", words))
    rig.dm.resume("snap")
    assert rig.usage() == "Overflow"


@pytest.mark.parametrize("words", ["P 8", "PO 8", "N 8"])
def test_an_origin_write_succeeds_when_a_store_is_full(rig, words):
    rig.snap("snap", words, cow_sectors=32)
    data = rig.write("base", 0, 80)
    assert rig.read("base", 0, 80) == data
    assert rig.usage() == "Invalid"
    assert rig.dm.events("snap") == 1


def test_a_transient_store_uses_every_chunk(rig):
    rig.snap("snap", "N 8", cow_sectors=32)
    usages = []
    for chunk in range(4):
        rig.write("snap", 8 * chunk)
        usages.append(rig.usage())
    assert usages == ["8/32 0", "16/32 0", "24/32 0", "32/32 0"]
    assert refused(rig.write, "snap", 32) == errno.EIO


def test_a_full_transient_store_makes_the_snapshot_invalid(rig):
    fill_up(rig, "N 8")
    assert rig.usage() == "Invalid"
    assert rig.dm.events("snap") == 1


def test_a_transient_store_starts_empty_when_created_again(rig):
    fill_up(rig, "N 8")
    rig.dm.remove("snap")
    rig.dm.create("snap", rig.line("snap", "N 8"))
    assert rig.usage() == "0/32 0"
    assert rig.read("snap") == rig.before


# --- V7: the last chunks of a store -------------------------------------------------------------


@pytest.mark.parametrize(
    ("chunks", "fit", "usage"),
    [
        (33, 31, "33/33 2"),
        (34, 31, "33/34 2"),
        (35, 32, "35/35 3"),
        (36, 33, "36/36 3"),
        (67, 63, "66/67 3"),
        (68, 64, "68/68 4"),
    ],
)
def test_a_store_holds_as_many_chunks_as_fit_beside_its_areas(rig, chunks, fit, usage):
    rig.snap("snap", "P 1", cow_sectors=chunks)
    for sector in range(fit):
        rig.write("snap", 2 * sector, 1)
    assert rig.usage() == usage
    assert refused(rig.write, "snap", 2 * fit, 1) == errno.EIO
    assert rig.usage() == "Invalid"


def test_filling_an_area_opens_the_next_one(rig):
    rig.snap("snap", "P 1", cow_sectors=36)
    for sector in range(32):
        rig.write("snap", 2 * sector, 1)
    assert rig.usage() == "35/36 3"


def test_a_store_that_ends_before_its_next_area_fails_on_the_record_that_fills_the_last(rig):
    rig.snap("snap", "PO 1", cow_sectors=34)
    for sector in range(31):
        rig.write("snap", sector, 1)
    assert refused(rig.write, "snap", 31, 1) == errno.EIO
    assert rig.usage() == "Invalid"
    assert rig.header() == header_bytes(1, valid=0)


def test_a_batch_whose_record_fills_the_last_area_of_such_a_store_fails(rig):
    rig.snap("snap", "PO 1", cow_sectors=34)
    for sector in range(31):
        rig.write("snap", sector, 1)
    data = np.frombuffer(stamp(0, 1, 9), np.uint8).reshape(1, -1)
    write_many = rig.dm.device("snap").write_many
    assert refused(write_many, np.array([31 * SECTOR]), data) == errno.EIO
    assert rig.usage() == "Invalid"


def test_the_chunks_of_the_areas_are_never_handed_out(rig):
    rig.snap("snap", "P 1", cow_sectors=200)
    rig.write("snap", 0, 100)
    new = [chunk for _, chunk in rig.records()]
    assert new == [chunk for chunk in range(2, 200) if chunk % 33 != 1][:100]


# --- V8: several snapshots ----------------------------------------------------------------------


def test_each_snapshot_of_an_origin_copies_its_own_chunks(rig):
    rig.snap("s1", "P 8", cow_sectors=1024)
    rig.snap("s2", "PO 64", cow_sectors=1024)
    rig.cows["s3"] = image(rig.folder / "s3.cow", 1024)
    rig.dm.create("s3", f"0 1024 snapshot base-real {rig.cows['s3']} N 16")
    usages = []
    for sector, count in [(1000, 8), (1032, 8), (1200, 1), (512, 128)]:
        rig.write("base", sector, count)
        usages.append((rig.usage("s1"), rig.usage("s2"), rig.usage("s3")))
    assert usages == [
        ("24/1024 16", "192/1024 128", "16/1024 0"),
        ("32/1024 16", "256/1024 128", "16/1024 0"),
        ("40/1024 16", "320/1024 128", "16/1024 0"),
        ("168/1024 16", "448/1024 128", "144/1024 0"),
    ]


def test_every_snapshot_of_an_origin_keeps_its_own_moment(rig):
    moments = {}
    for number, words in enumerate(["P 8", "PO 64", "N 16"]):
        moments[f"s{number}"] = rig.read("base")
        rig.snap(f"s{number}", words)
        rig.write("base", 100 * number, 150, tag=number + 1)
    assert {name: rig.read(name) for name in moments} == moments


def test_a_snapshot_taken_without_suspending_the_origin_keeps_every_chunk(rig):
    rig.snap("s1", "P 64")
    rig.cows["s2"] = image(rig.folder / "s2.cow", 2048)
    rig.dm.create("s2", rig.line("s2", "P 8"))
    rig.write("base", 0, 128)
    assert rig.read("s2") == rig.before


# --- V9: headers --------------------------------------------------------------------------------


def header_device(rig: Rig, header: bytes, words: str = "P 8") -> bytes:
    """Create a snapshot over an image that begins with `header`; return the image before."""
    before = header.ljust(2048 * SECTOR, b"\0")
    rig.cows["snap"] = image(rig.folder / "snap.cow", before)
    rig.dm.create("snap", rig.line("snap", words))
    return before


@pytest.mark.parametrize(
    ("header", "code"),
    [
        (header_bytes(magic=0x12345678), errno.ENXIO),
        (header_bytes(version=2), errno.EINVAL),
        (header_bytes(version=2, valid=0), errno.EINVAL),
        (header_bytes(version=0), errno.EINVAL),
        (header_bytes(12), errno.EINVAL),
        (header_bytes(0), errno.EINVAL),
        (header_bytes(1 << 24), errno.EINVAL),
    ],
)
def test_a_header_that_cannot_be_used_is_refused_and_left_alone(rig, header, code):
    assert refused(header_device, rig, header) == code
    assert rig.cow_bytes() == header.ljust(2048 * SECTOR, b"\0")
    assert "snap" not in rig.dm.names()


def test_a_store_marked_invalid_loads_as_invalid(rig):
    before = header_device(rig, header_bytes(valid=0))
    assert rig.usage() == "Invalid"
    assert rig.cow_bytes() == before


def test_any_mark_but_zero_is_valid(rig):
    header_device(rig, header_bytes(valid=7))
    assert rig.usage() == "16/2048 16"


def test_the_chunk_size_on_disk_wins_over_the_table(rig):
    header_device(rig, header_bytes(8), "P 16")
    assert rig.dm.table("snap").endswith(" P 8")
    assert rig.usage() == "16/2048 16"


def test_only_the_magic_tells_a_fresh_store(rig):
    header_device(rig, header_bytes(12, version=9, magic=0))
    assert rig.header() == header_bytes(8)


def test_a_transient_store_ignores_a_header(rig):
    before = header_device(rig, header_bytes(version=2), "N 8")
    assert rig.usage() == "0/2048 0"
    assert rig.cow_bytes() == before


# --- V10, V11: handover -------------------------------------------------------------------------


def test_a_table_that_awaits_handover_shows_an_empty_store(rig):
    rig.snap()
    rig.dm.load("snap", rig.line("snap", "PO 32"))
    assert rig.dm.table("snap", inactive=True).endswith(" PO 0")
    assert rig.dm.status("snap", inactive=True) == "0 2048 snapshot 0/2048 0"


def test_a_reload_hands_the_exceptions_over(rig):
    rig.snap()
    rig.write("base", 0, 24)
    before = rig.read("snap")
    rig.dm.load("snap", rig.line("snap", "PO 32"))
    rig.dm.resume("snap")
    assert rig.dm.table("snap").endswith(" PO 8")
    assert rig.usage() == "40/2048 16"
    assert rig.read("snap") == before


@pytest.fixture
def waiting(rig):
    """A snapshot, and another device whose live table awaits its exceptions."""
    rig.snap()
    rig.write("base", 0, 24)
    rig.dm.create("next")
    rig.dm.load("next", rig.line("snap"))
    return rig


def test_exceptions_pass_to_another_device(waiting):
    before = waiting.read("snap")
    waiting.dm.suspend("snap")
    waiting.dm.resume("next")
    assert waiting.usage("next") == "40/2048 16"
    assert waiting.read("next") == before


def test_the_source_of_a_handover_is_invalid_and_empty(waiting):
    waiting.dm.suspend("snap")
    waiting.dm.resume("next")
    waiting.dm.resume("snap")
    assert waiting.usage("snap") == "Invalid"
    assert waiting.dm.table("snap").endswith(" P 0")
    assert refused(waiting.read, "snap", 0, 8) == errno.EIO
    assert waiting.header() == header_bytes(8)


def test_the_source_of_a_handover_has_the_letter_of_the_destination(rig):
    rig.snap(words="PO 8")
    rig.dm.create("next")
    rig.dm.load("next", rig.line("snap", "P 8"))
    rig.dm.suspend("snap")
    rig.dm.resume("next")
    assert rig.dm.table("snap").endswith(" P 0")
    assert rig.dm.table("next").endswith(" P 8")


def test_the_destination_of_a_handover_keeps_what_the_origin_loses(waiting):
    waiting.dm.suspend("snap")
    waiting.dm.resume("next")
    waiting.write("base", 0, 1600, tag=2)
    assert waiting.read("next") == waiting.before


def test_a_handover_waits_for_the_source_to_be_suspended(waiting):
    with pytest.raises(OSError, match="until source is suspended") as caught:
        waiting.dm.resume("next")
    assert caught.value.errno == errno.EINVAL
    assert waiting.dm.info("next").suspended
    assert waiting.read("snap") == waiting.before


def test_a_refused_handover_works_when_tried_again(waiting):
    refused(waiting.dm.resume, "next")
    waiting.dm.suspend("snap")
    waiting.dm.resume("next")
    assert waiting.read("next") == waiting.before


def test_the_source_of_a_handover_does_not_resume_before_it(waiting):
    waiting.dm.suspend("snap")
    with pytest.raises(OSError, match="until handover completes") as caught:
        waiting.dm.resume("snap")
    assert caught.value.errno == errno.EINVAL
    assert waiting.dm.info("snap").suspended


def test_a_third_table_for_one_store_is_refused(waiting):
    with pytest.raises(OSError, match="Snapshot cow pairing for exception table handover failed"):
        waiting.dm.create("third", waiting.line("snap"))
    assert "third" not in waiting.dm.names()


def test_removing_the_source_cancels_a_handover(waiting):
    waiting.dm.remove("snap")
    waiting.dm.resume("next")
    assert waiting.usage("next") == "Invalid"
    assert waiting.header() == header_bytes(8)


def test_a_store_whose_handover_was_cancelled_loads_again(waiting):
    waiting.dm.remove("snap")
    waiting.dm.remove("next")
    waiting.dm.create("snap", waiting.line("snap"))
    assert waiting.read("snap") == waiting.before


def test_clearing_the_destination_of_a_handover_is_harmless(waiting):
    waiting.dm.clear("next")
    waiting.dm.suspend("snap")
    waiting.dm.resume("snap")
    assert waiting.usage() == "40/2048 16"


# --- V12, V14, V15: merge -----------------------------------------------------------------------


@pytest.fixture
def merging(rig):
    """A snapshot with exceptions out of order, and another one of the same origin, merged."""
    rig.snap()
    rig.snap("other", "P 16")
    for chunk in [10, 11, 12, 50, 100, 51]:
        rig.write("snap", 8 * chunk)
    merged = rig.read("snap")
    status = rig.merge()
    return rig, merged, status


def test_a_merge_ends_with_an_empty_store(merging):
    rig, _, status = merging
    assert status == "0 2048 snapshot-merge 16/2048 16"
    assert rig.cow_bytes("snap", 8, 8) == bytes(4096)
    assert rig.header() == header_bytes(8)


def test_a_merge_leaves_the_origin_as_the_snapshot_was(merging):
    rig, merged, _ = merging
    assert rig.read("base") == merged
    assert Path(rig.origin).read_bytes() == merged


def test_another_snapshot_survives_a_merge(merging):
    rig, _, _ = merging
    assert rig.read("other") == rig.before


def test_a_merge_goes_from_the_last_record_to_the_first_in_runs(merging):
    rig, _, _ = merging
    assert rig.records("other") == [(25, 2), (50, 3), (5, 4), (6, 5)]


def test_a_merge_is_no_event(merging):
    rig, _, _ = merging
    assert rig.dm.events("base") == 0


def test_a_merge_by_handover_takes_the_exceptions_of_the_snapshot(rig):
    rig.snap()
    rig.write("base", 0, 16)
    rig.dm.load("base", rig.line("snap", kind="snapshot-merge"))
    rig.dm.suspend("snap")
    rig.dm.resume("base")
    assert wait_merge(rig.dm, "base").endswith(" 16/2048 16")
    assert rig.read("base") == rig.before


def test_the_snapshot_whose_merge_took_its_store_is_invalid(rig):
    rig.snap()
    rig.dm.load("base", rig.line("snap", kind="snapshot-merge"))
    rig.dm.suspend("snap")
    rig.dm.resume("base")
    rig.dm.resume("snap")
    assert rig.usage("snap") == "Invalid"
    assert refused(rig.read, "snap", 0, 8) == errno.EIO


def test_what_is_written_to_the_merging_device_stays(rig):
    rig.snap()
    rig.write("base", 0, 64)
    rig.merge()
    rig.write("base", 32, 8, tag=3)
    assert rig.read("base", 0, 64) == stamp(0, 32, 0) + stamp(32, 8, 3) + stamp(40, 24, 0)


def test_a_merged_store_serves_the_next_snapshot(rig):
    rig.snap()
    rig.write("base", 0, 64)
    rig.merge()
    rig.dm.load("base", "0 2048 snapshot-origin base-real")
    rig.dm.resume("base")
    rig.dm.create("snap", rig.line("snap"))
    rig.write("base", 800)
    assert rig.records() == [(100, 2)]


def test_a_merge_of_an_invalid_store_does_nothing(rig):
    rig.cows["snap"] = image(rig.folder / "snap.cow", bytes(store_bytes([(1, 2)], valid=0)))
    rig.dm.load("base", rig.line("snap", kind="snapshot-merge"))
    rig.dm.resume("base")
    assert rig.usage("base") == "Invalid"
    assert rig.read("base") == rig.before


def test_a_merge_of_an_invalid_store_passes_writes_to_the_origin(rig):
    rig.cows["snap"] = image(rig.folder / "snap.cow", bytes(store_bytes([(1, 2)], valid=0)))
    rig.dm.load("base", rig.line("snap", kind="snapshot-merge"))
    rig.dm.resume("base")
    data = rig.write("base", 8)
    assert Path(rig.origin).read_bytes()[8 * SECTOR : 16 * SECTOR] == data


def test_the_status_of_a_slow_merge_only_goes_down(rig):
    rig.snap("snap", "P 1", cow_sectors=4096)
    for number in range(72):
        rig.write("snap", 16 * number, 1)
    assert rig.usage() == "76/4096 4"
    rig.dm.remove("snap")
    rig.dm.create("slow", f"0 4096 delay {rig.cows['snap']} 0 2")
    rig.dm.load("base", "0 2048 snapshot-merge base-real slow P 1")
    rig.dm.resume("base")
    samples = [rig.dm.status("base")]
    while not merge_is_over(samples[-1]):
        samples.append(rig.dm.status("base"))
    usages = [sample.split(" ", 3)[3] for sample in samples]
    assert usages[-1] == "2/4096 2"
    numbers = [(int(u.split("/")[0]), int(u.split(" ")[1])) for u in usages]
    assert numbers[0] <= (76, 4)
    for (used, metadata), (later_used, later_metadata) in itertools.pairwise(numbers):
        assert later_used <= used
        assert later_metadata <= metadata
    assert all(0 <= used - 2 - 33 * (metadata - 2) <= 33 for used, metadata in numbers)


def test_a_merge_interrupted_by_suspend_goes_on_after_resume(rig):
    rig.snap("snap", "P 1", cow_sectors=4096)
    for number in range(72):
        rig.write("snap", 16 * number, 1)
    merged, records = rig.read("snap"), rig.records()
    rig.dm.remove("snap")
    rig.dm.create("slow", f"0 4096 delay {rig.cows['snap']} 0 2")
    rig.dm.load("base", "0 2048 snapshot-merge base-real slow P 1")
    rig.dm.resume("base")
    rig.dm.suspend("base")
    left = rig.records()
    assert left == records[: len(left)]
    rig.dm.resume("base")
    assert wait_merge(rig.dm, "base").endswith(" 2/4096 2")
    assert rig.read("base") == merged


def test_a_merge_interrupted_by_remove_goes_on_in_a_new_device(rig):
    rig.snap("snap", "P 1", cow_sectors=4096)
    for number in range(72):
        rig.write("snap", 16 * number, 1)
    merged = rig.read("snap")
    rig.dm.remove("snap")
    rig.dm.create("slow", f"0 4096 delay {rig.cows['snap']} 0 2")
    rig.dm.load("base", "0 2048 snapshot-merge base-real slow P 1")
    rig.dm.resume("base")
    rig.dm.remove("base")
    rig.dm.create("base", "0 2048 snapshot-merge base-real slow P 1")
    assert wait_merge(rig.dm, "base").endswith(" 2/4096 2")
    assert rig.read("base") == merged


# --- V13: a merge that fails --------------------------------------------------------------------


@pytest.fixture
def failing(rig):
    """A merge whose second run meets a bad chunk of the origin."""
    rig.snap()
    for chunk in [5, 10, 20]:
        rig.write("snap", 8 * chunk)
    for name in ("snap", "base", "base-real"):
        rig.dm.remove(name)
    rig.dm.create(
        "base-real",
        f"0 80 linear {rig.origin} 0\n80 8 error\n88 1960 linear {rig.origin} 88",
    )
    rig.dm.create("base", rig.line("snap", kind="snapshot-merge"))
    poll(lambda: rig.usage("base") == "Merge failed")
    return rig


def test_a_merge_over_a_bad_origin_fails(failing):
    assert failing.dm.status("base") == "0 2048 snapshot-merge Merge failed"
    assert failing.dm.events("base") == 0
    assert failing.header() == header_bytes(8)


def test_a_failed_merge_keeps_the_records_it_did_not_merge(failing):
    assert failing.records() == [(5, 2), (10, 3)]


def test_a_failed_merge_still_reads_right(failing):
    expected = bytearray(failing.before)
    for chunk in [5, 10, 20]:
        expected[chunk * 4096 : (chunk + 1) * 4096] = stamp(8 * chunk, 8, 1)
    assert failing.read("base") == expected


def test_a_failed_merge_keeps_a_write_to_the_bad_chunk_in_the_store(failing):
    data = failing.write("base", 80, tag=4)
    assert failing.read("base", 80, 8) == data
    assert failing.cow_bytes("snap", 24, 8) == data


def test_a_failed_merge_stays_failed_after_a_suspend(failing):
    failing.dm.suspend("base")
    failing.dm.resume("base")
    assert failing.usage("base") == "Merge failed"


def test_a_failed_merge_ends_in_a_new_device_once_the_origin_is_good(failing):
    merged = failing.read("base")
    failing.dm.remove("base")
    failing.dm.load("base-real", f"0 2048 linear {failing.origin} 0")
    failing.dm.resume("base-real")
    failing.dm.create("base", failing.line("snap", kind="snapshot-merge"))
    assert wait_merge(failing.dm, "base").endswith(" 16/2048 16")
    assert failing.read("base") == merged
    assert Path(failing.origin).read_bytes() == merged


def test_a_failed_merge_costs_a_sibling_nothing_where_it_did_not_get(rig):
    """Linux 6.1 makes copies for siblings run by run: those before the run that fails, and its."""
    bad = f"0 40 linear {rig.origin} 0\n40 48 error\n88 1960 linear {rig.origin} 88"
    rig.dm.load("base-real", bad)
    rig.dm.resume("base-real")
    for name, chunks in (("keep", [10]), ("snap", [5, 10])):
        rig.snap(name)
        for chunk in chunks:  # all of a chunk: the bad one is not read
            rig.write(name, 8 * chunk)
    rig.dm.suspend("base")
    rig.dm.remove("snap")
    rig.dm.load("base", rig.line("snap", kind="snapshot-merge"))
    rig.dm.resume("base")
    poll(lambda: rig.usage("base") == "Merge failed")
    assert rig.usage("keep") == "24/2048 16"


def test_a_whole_chunk_lands_in_a_store_below_an_origin_without_a_look_at_the_bad_one(rig):
    bad = f"0 24 linear {rig.origin} 0\n24 8 error\n32 2016 linear {rig.origin} 32"
    rig.dm.create("disk", bad)
    store = image(rig.folder / "disk.cow", 2048)
    rig.dm.create("snap", f"0 2048 snapshot disk {store} P 8")
    rig.dm.create("over", "0 2048 snapshot-origin snap")
    data = rig.write("over", 24)
    assert rig.read("over", 24, 8) == data


# --- V16: bad sectors under a store -------------------------------------------------------------


def with_bad(rig: Rig, name: str, path: str, sector: int, count: int = 8) -> None:
    """Map an image as a device of 2048 sectors, `count` of them from `sector` on being bad."""
    after = sector + count
    lines = [f"0 {sector} linear {path} 0"] if sector else []
    lines += [f"{sector} {count} error", f"{after} {2048 - after} linear {path} {after}"]
    table = "\n".join(lines)
    if name in rig.dm.names():
        rig.dm.load(name, table)
        rig.dm.resume(name)
    else:
        rig.dm.create(name, table)


@pytest.fixture
def cracked(rig):
    """A snapshot whose store has one good data chunk, then a bad one."""
    rig.cows["snap"] = image(rig.folder / "snap.cow", 2048)
    with_bad(rig, "cow-dev", rig.cows["snap"], 24)
    rig.dm.create("snap", "0 2048 snapshot base-real cow-dev P 8")
    rig.write("snap", 0)
    return rig


def test_a_bad_data_chunk_makes_the_snapshot_invalid(cracked):
    assert refused(cracked.write, "snap", 8) == errno.EIO
    assert cracked.usage() == "Invalid"
    assert cracked.header() == header_bytes(8, valid=0)


def test_the_records_before_a_bad_data_chunk_are_kept(cracked):
    refused(cracked.write, "snap", 8)
    assert cracked.records()[:1] == [(0, 2)]


def test_an_origin_write_succeeds_when_its_copy_cannot_be_written(cracked):
    data = cracked.write("base", 8)
    assert cracked.read("base", 8, 8) == data
    assert cracked.usage() == "Invalid"
    assert cracked.dm.events("snap") == 1


def test_a_bad_area_makes_the_snapshot_invalid(cracked):
    with_bad(cracked, "cow-dev", cracked.cows["snap"], 8)
    data = cracked.write("base", 8)
    assert cracked.read("base", 8, 8) == data
    assert cracked.usage() == "Invalid"
    assert cracked.header() == header_bytes(8, valid=0)
    assert cracked.records() == [(0, 2)]


def test_rewriting_a_chunk_that_went_bad_in_the_store_fails_that_write_alone(cracked):
    with_bad(cracked, "cow-dev", cracked.cows["snap"], 16)
    assert refused(cracked.write, "snap", 0) == errno.EIO
    assert cracked.usage() == "24/2048 16"


@pytest.mark.parametrize("sector", [0, 8])
def test_a_store_that_cannot_be_read_is_refused(rig, sector):
    rig.snap()
    rig.dm.remove("snap")
    with_bad(rig, "cow-dev", rig.cows["snap"], sector)
    with pytest.raises(OSError, match="Failed to read snapshot metadata") as caught:
        rig.dm.create("snap", "0 2048 snapshot base-real cow-dev P 8")
    assert caught.value.errno == errno.EIO


@pytest.fixture
def unreadable(rig):
    """A snapshot whose origin can be written but no longer read."""
    rig.snap()
    rig.dm.load("base-real", f"0 2048 flakey {rig.origin} 0 0 60 1 error_reads")
    rig.dm.resume("base-real")
    return rig


def test_reading_a_bad_origin_through_the_snapshot_leaves_it_valid(unreadable):
    assert refused(unreadable.read, "snap", 0, 8) == errno.EIO
    assert unreadable.usage() == "16/2048 16"


def test_a_copy_that_cannot_be_read_from_the_origin_makes_the_snapshot_invalid(unreadable):
    data = unreadable.write("base", 8)
    assert unreadable.usage() == "Invalid"
    assert Path(unreadable.origin).read_bytes()[8 * SECTOR : 16 * SECTOR] == data


# --- V17: discards ------------------------------------------------------------------------------


@pytest.fixture
def discarding(rig):
    """A snapshot with discard_zeroes_cow whose chunks 2, 1 and 5 are in the store."""
    rig.snap("snap", "P 16 1 discard_zeroes_cow")
    for chunk in [2, 1, 5]:
        rig.write("snap", 16 * chunk, 16)
    return rig


def discard(rig: Rig, name: str, sector: int, count: int) -> None:
    rig.dm.device(name).discard(sector * SECTOR, count * SECTOR)


def test_discarding_a_chunk_of_the_store_zeroes_it(discarding):
    used = discarding.usage()
    discard(discarding, "snap", 32, 16)
    assert discarding.read("snap", 32, 16) == bytes(16 * SECTOR)
    assert discarding.usage() == used
    assert discarding.records() == [(2, 2), (1, 3), (5, 4)]


def test_discarding_what_is_not_in_the_store_does_nothing(discarding):
    discard(discarding, "snap", 48, 16)
    assert discarding.read("snap", 48, 16) == stamp(48, 16, 0)
    assert len(discarding.records()) == 3


def test_a_misaligned_discard_touches_only_its_own_sectors(discarding):
    before = discarding.read("snap")
    discard(discarding, "snap", 24, 16)
    after = before[: 24 * SECTOR] + bytes(16 * SECTOR) + before[40 * SECTOR :]
    assert discarding.read("snap") == after


def test_a_discard_of_part_of_a_chunk_touches_only_its_own_sectors(discarding):
    before = discarding.read("snap")
    discard(discarding, "snap", 20, 4)
    after = before[: 20 * SECTOR] + bytes(4 * SECTOR) + before[24 * SECTOR :]
    assert discarding.read("snap") == after


def test_a_discard_leaves_the_origin_alone(discarding):
    discard(discarding, "snap", 0, 2048)
    assert discarding.read("base") == discarding.before


def test_a_discard_passed_down_zeroes_the_origin(rig):
    rig.snap("snap", "P 16 2 discard_zeroes_cow discard_passdown_origin")
    rig.write("snap", 32, 16)
    discard(rig, "snap", 32, 16)
    assert rig.read("snap", 32, 16) == bytes(16 * SECTOR)
    assert rig.read("base", 32, 16) == bytes(16 * SECTOR)
    assert rig.usage() == "48/2048 32"


def test_a_discard_passed_down_makes_no_exception(rig):
    rig.snap("snap", "P 16 2 discard_zeroes_cow discard_passdown_origin")
    discard(rig, "snap", 64, 16)
    assert rig.read("base", 64, 16) == bytes(16 * SECTOR)
    assert rig.records() == []


def test_a_snapshot_without_the_feature_takes_no_discard(rig):
    rig.snap()
    assert refused(discard, rig, "snap", 0, 8) == errno.EOPNOTSUPP


def test_an_origin_takes_no_discard(rig):
    assert refused(discard, rig, "base", 0, 8) == errno.EOPNOTSUPP


def test_a_snapshot_of_what_takes_no_discard_takes_none_either(rig):
    rig.snap()
    top_cow = image(rig.folder / "top.cow", 2048)
    rig.dm.create("top", f"0 2048 snapshot snap {top_cow} P 8 1 discard_zeroes_cow")
    assert refused(discard, rig, "top", 0, 8) == errno.EOPNOTSUPP


def test_a_discard_on_an_invalid_snapshot_fails(rig):
    rig.snap("snap", "P 8 1 discard_zeroes_cow", cow_sectors=16)
    rig.write("base", 0)
    assert refused(discard, rig, "snap", 0, 8) == errno.EIO


def test_a_discard_on_an_overflowed_snapshot_fails(rig):
    rig.snap("snap", "PO 8 1 discard_zeroes_cow", cow_sectors=24)
    rig.write("snap", 0)
    assert refused(rig.write, "snap", 8) == errno.EIO
    assert refused(discard, rig, "snap", 0, 8) == errno.EIO
    assert rig.read("snap", 0, 8) == stamp(0, 8, 1)


def test_a_merge_with_the_feature_ignores_discards(rig):
    rig.snap()
    rig.dm.remove("snap")
    words = "P 8 1 discard_zeroes_cow"
    rig.dm.load("base", rig.line("snap", words, kind="snapshot-merge"))
    rig.dm.resume("base")
    discard(rig, "base", 0, 8)
    assert rig.read("base") == rig.before


# --- V18, V19: a short last chunk, a snapshot of a snapshot -------------------------------------


@pytest.fixture
def odd(dm, tmp_path):
    """An origin of 2009 sectors with chunks of 64, the last of which has 25."""
    rig = Rig(dm, tmp_path, sectors=2009)
    rig.cows["snap"] = image(tmp_path / "snap.cow", bytes(SECTOR) + b"\xaa" * (2047 * SECTOR))
    dm.create("snap", rig.line("snap", "P 64"))
    return rig


def test_a_short_last_chunk_is_copied_as_far_as_the_origin_goes(odd):
    odd.write("base", 2000, 9)
    assert odd.records() == [(31, 2)]
    assert odd.cow_bytes("snap", 128, 64) == stamp(1984, 25, 0) + b"\xaa" * (39 * SECTOR)


def test_a_short_last_chunk_reads_as_it_was(odd):
    odd.write("base", 1984, 25)
    assert odd.read("snap") == odd.before


def test_a_short_last_chunk_written_whole_to_the_snapshot_is_read_back(odd):
    data = odd.write("snap", 1984, 25)
    assert odd.read("snap", 1984, 25) == data
    assert odd.read("base") == odd.before


def test_a_merge_of_a_short_last_chunk_ends_with_the_origin(odd):
    data = odd.write("snap", 2000, 9)
    odd.merge()
    assert odd.read("base", 2000, 9) == data
    assert Path(odd.origin).stat().st_size == 2009 * SECTOR


def test_a_write_copies_once_in_each_layer_of_snapshots(rig):
    rig.snap("s1", cow_sectors=512)
    rig.cows["s2"] = image(rig.folder / "s2.cow", 512)
    rig.dm.create("s1-origin", "0 2048 snapshot-origin s1")
    rig.dm.create("s2", f"0 2048 snapshot s1 {rig.cows['s2']} P 8")
    data = rig.write("s1-origin", 40)
    assert (rig.usage("s1"), rig.usage("s2")) == ("24/512 16", "24/512 16")
    assert rig.read("s1", 40, 8) == data
    assert rig.read("s2") == rig.before
    assert rig.read("base") == rig.before


# --- V20: the lines of status and table ---------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "status"),
    [
        ("0 100 linear {b} 500", "0 100 linear "),
        ("0 112 striped 2 7 {b} 0 {c} 0", "0 112 striped 2 {b} {c} 1 AA"),
        ("0 100 zero ", "0 100 zero "),
        ("0 100 error ", "0 100 error "),
        ("0 2048 snapshot-origin {b}", "0 2048 snapshot-origin "),
        ("0 2048 snapshot {b} {c} P 8", "0 2048 snapshot 16/2048 16"),
        ("0 2048 snapshot {b} {c} PO 1", "0 2048 snapshot 2/2048 2"),
        ("0 2048 snapshot {b} {c} P 32", "0 2048 snapshot 64/2048 64"),
        ("0 2048 snapshot {b} {c} N 8", "0 2048 snapshot 0/2048 0"),
        ("0 2048 snapshot-merge {b} {c} P 8", "0 2048 snapshot-merge 16/2048 16"),
        ("0 100 flakey {b} 8 0 60 1 error_writes", "0 100 flakey "),
        ("0 100 delay {b} 8 0", "0 100 delay 0 0 0"),
    ],
)
def test_table_and_status_lines_are_the_kernels(dm, tmp_path, table, status):
    paths = {"b": image(tmp_path / "b.img", 2048), "c": image(tmp_path / "c.img", 2048)}
    dm.create("x", table.format(**paths))
    assert dm.table("x") == table.format(**paths)
    assert dm.status("x").replace("7:0", paths["b"]).replace("7:1", paths["c"]) == (
        status.format(**paths)
    )


@pytest.mark.parametrize(
    ("words", "printed"),
    [
        ("p 8", "P 8"),
        ("pOxyz 8", "PO 8"),
        ("nXY 8", "N 8"),
        ("P 8 0", "P 8"),
        ("P 8 1 DISCARD_ZEROES_COW", "P 8 1 discard_zeroes_cow"),
        (
            "P 8 2 discard_passdown_origin discard_zeroes_cow",
            "P 8 2 discard_zeroes_cow discard_passdown_origin",
        ),
        ("P 8 2 discard_zeroes_cow discard_zeroes_cow", "P 8 1 discard_zeroes_cow"),
        ("P 8 1 discard_zeroes_cow more words", "P 8 1 discard_zeroes_cow"),
    ],
)
def test_a_snapshot_prints_its_arguments_in_the_kernels_form(rig, words, printed):
    rig.snap("snap", words)
    assert rig.dm.table("snap") == rig.line("snap", printed)


def test_all_devices_are_printed_by_name_in_order(dm):
    dm.create("b", "0 8 zero\n8 8 error")
    dm.create("a", "0 4 zero")
    assert dm.status() == "a: 0 4 zero \nb: 0 8 zero \nb: 8 8 error "
    assert dm.table() == "a: 0 4 zero \nb: 0 8 zero \nb: 8 8 error "


def test_lines_are_selected_by_target(dm):
    dm.create("b", "0 8 zero\n8 8 error")
    dm.create("a", "0 4 zero")
    assert dm.status(target="error") == "b: 8 8 error "
    assert dm.table(target="error") == "b: 8 8 error "


def test_the_inactive_table_is_printed_on_request(dm):
    dm.create("a", "0 4 zero")
    dm.load("a", "0 8 error")
    assert dm.table("a") == "0 4 zero "
    assert dm.table("a", inactive=True) == "0 8 error "
    assert dm.status("a", inactive=True) == "0 8 error "


def test_the_concise_form_is_the_kernels(dm):
    dm.create("c1", "0 8 zero\n8 8 error", minor=3)
    dm.create("c2", "0 4 zero", uuid="U2", readonly=True, minor=9)
    expected = "c1,,3,rw,0 8 zero ,8 8 error ;c2,U2,9,ro,0 4 zero "
    assert dm.table(concise=True) == expected


# --- V21: what is read and written at all -------------------------------------------------------


def test_a_whole_chunk_written_to_the_snapshot_needs_no_read_of_the_origin(unreadable):
    data = unreadable.write("snap", 8, 16)
    assert unreadable.read("snap", 8, 16) == data


def test_rewriting_a_chunk_of_the_origin_leaves_the_store_alone(rig):
    rig.snap()
    rig.write("base", 0, 64)
    before = rig.cow_bytes()
    rig.write("base", 0, 64, tag=2)
    assert rig.cow_bytes() == before


def test_suspend_and_resume_of_an_idle_snapshot_leave_its_store_alone(rig):
    rig.snap()
    rig.write("base", 0, 64)
    before = rig.cow_bytes()
    rig.dm.suspend("snap")
    rig.dm.resume("snap")
    assert rig.cow_bytes() == before


def test_the_record_of_an_area_lies_where_the_geometry_says(rig):
    rig.snap("snap", "P 1", cow_sectors=200)
    rig.write("base", 0, 33)
    start = area_location(1, 1) * SECTOR
    assert rig.cow_bytes()[start : start + 16] == (32).to_bytes(8, "little") + (35).to_bytes(
        8, "little"
    )
