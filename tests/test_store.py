"""COW stores seen without a device, against bytes built by hand."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest
from support import SECTOR, Rig, area_location, header_bytes, image, stamp, store_bytes

import cow
import cow.store


@pytest.fixture
def dm():
    with cow.Mapper(durability="process") as mapper:
        yield mapper


def put(tmp_path: Path, data: bytes | bytearray) -> str:
    return image(tmp_path / "snap.cow", bytes(data))


# --- open ---------------------------------------------------------------------------------------


def test_open_reads_the_header(tmp_path):
    store = cow.store.open(put(tmp_path, store_bytes([], 16)))
    assert (store.valid, store.version, store.chunk_size) == (True, 1, 16)


def test_open_takes_a_path_object(tmp_path):
    path = Path(put(tmp_path, store_bytes([], 8)))
    assert cow.store.open(path).chunk_size == 8


def test_open_reads_the_exceptions_in_order(tmp_path):
    records = [(5, 2), (6, 3), (3, 4), (12, 5), (14, 6)]
    store = cow.store.open(put(tmp_path, store_bytes(records)))
    assert store.exceptions.dtype == np.uint64
    assert store.exceptions.tolist() == [list(record) for record in records]


def test_open_of_an_empty_store_has_no_exceptions(tmp_path):
    store = cow.store.open(put(tmp_path, store_bytes([])))
    assert store.exceptions.shape == (0, 2)


@pytest.mark.parametrize("count", [1, 31, 32, 33, 64, 65, 96])
def test_open_reads_every_area(tmp_path, count):
    records = [(1000 - n, n + 2 + n // 32) for n in range(count)]
    store = cow.store.open(put(tmp_path, store_bytes(records, 1, size=200 * SECTOR)))
    assert store.exceptions.tolist() == [list(record) for record in records]


def test_a_record_with_no_new_chunk_ends_the_store(tmp_path):
    store = cow.store.open(put(tmp_path, store_bytes([(1, 2), (9, 0), (3, 3)])))
    assert store.exceptions.tolist() == [[1, 2]]


def test_open_tells_a_store_marked_invalid(tmp_path):
    assert cow.store.open(put(tmp_path, store_bytes([(1, 2)], valid=0))).valid is False


def test_any_mark_but_zero_is_valid(tmp_path):
    assert cow.store.open(put(tmp_path, store_bytes([(1, 2)], valid=7))).valid is True


@pytest.mark.parametrize(
    ("header", "code"),
    [
        (header_bytes(magic=0x11111111), errno.ENXIO),
        (header_bytes(version=2), errno.EINVAL),
        (header_bytes(12), errno.EINVAL),
        (header_bytes(0), errno.EINVAL),
        (header_bytes(1 << 24), errno.EINVAL),
    ],
)
def test_open_refuses_what_is_no_store(tmp_path, header, code):
    path = put(tmp_path, header.ljust(1 << 20, b"\0"))
    with pytest.raises(cow.CowError) as caught:
        cow.store.open(path)
    assert isinstance(caught.value, OSError)
    assert caught.value.errno == code


def test_open_of_a_missing_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        cow.store.open(tmp_path / "nosuch.cow")
    assert isinstance(caught.value, cow.CowError)


def test_open_changes_nothing(tmp_path):
    data = store_bytes([(1, 2)])
    path = put(tmp_path, data)
    cow.store.open(path)
    assert Path(path).read_bytes() == data


def test_open_reads_what_the_engine_wrote(dm, tmp_path):
    rig = Rig(dm, tmp_path)
    rig.snap("snap", "P 1")
    rig.write("base", 100, 40)
    rig.write("snap", 7, 1)
    dm.close()
    store = cow.store.open(rig.cows["snap"])
    assert store.exceptions.tolist() == [list(record) for record in rig.records()]
    assert len(store.exceptions) == 41


# --- check --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "records",
    [[], [(0, 2)], [(5, 2), (6, 3), (3, 4)], [(n, n + 2) for n in range(200)], [(7, 250)]],
    ids=["fresh", "one", "three", "many", "holes"],
)
def test_a_sound_store_has_no_findings(tmp_path, records):
    assert list(cow.store.check(put(tmp_path, store_bytes(records)))) == []


DAMAGED = {
    "a_new_chunk_past_the_end": [(1, 2), (2, 256)],
    "a_new_chunk_far_past_the_end": [(1, 1 << 60)],
    "an_old_chunk_twice": [(4, 2), (5, 3), (4, 4)],
    "a_new_chunk_twice": [(4, 2), (5, 2)],
    "a_new_chunk_on_the_first_area": [(4, 1)],
    "a_new_chunk_on_a_later_area": [(4, area_location(1, 1))],
}


def damaged(name: str) -> bytearray:
    """Return a store with the damage; its chunks are of one sector where areas are in reach."""
    if name == "a_new_chunk_on_a_later_area":
        return store_bytes(DAMAGED[name], 1, size=256 * SECTOR)
    return store_bytes(DAMAGED[name])


@pytest.mark.parametrize("name", DAMAGED)
def test_check_finds(tmp_path, name):
    assert len(cow.store.check(put(tmp_path, damaged(name)))) > 0


@pytest.mark.parametrize("name", DAMAGED)
def test_a_table_refuses(dm, tmp_path, name):
    rig = Rig(dm, tmp_path)
    data = damaged(name)
    rig.cows["snap"] = put(tmp_path, data)
    with pytest.raises(cow.CowError) as caught:
        dm.create("snap", rig.line("snap"))
    assert isinstance(caught.value, OSError)
    assert caught.value.errno in (errno.EINVAL, errno.EIO)
    assert Path(rig.cows["snap"]).read_bytes() == data
    assert dm.names() == ["base", "base-real"]


def test_a_refused_store_leaves_its_family_alone(dm, tmp_path):
    rig = Rig(dm, tmp_path)
    rig.snap("good")
    rig.cows["snap"] = put(tmp_path, damaged("an_old_chunk_twice"))
    with pytest.raises(cow.CowError):
        dm.create("snap", rig.line("snap"))
    rig.write("base", 0, 8)
    assert rig.read("good") == rig.before
    assert rig.usage("good") == "24/2048 16"


def test_a_refused_store_can_be_put_right_and_loaded(dm, tmp_path):
    rig = Rig(dm, tmp_path)
    rig.cows["snap"] = put(tmp_path, damaged("an_old_chunk_twice"))
    with pytest.raises(cow.CowError):
        dm.create("snap", rig.line("snap"))
    Path(rig.cows["snap"]).write_bytes(store_bytes([(4, 2)]))
    dm.create("snap", rig.line("snap"))
    assert rig.usage() == "24/2048 16"


# --- stores by hand, loaded in a table ----------------------------------------------------------


def test_a_store_by_hand_is_read_through_its_records(dm, tmp_path):
    rig = Rig(dm, tmp_path)
    data = store_bytes([(10, 5), (3, 2)])
    data[5 * 4096 : 6 * 4096] = stamp(80, 8, 7)
    data[2 * 4096 : 3 * 4096] = stamp(24, 8, 8)
    rig.cows["snap"] = put(tmp_path, data)
    dm.create("snap", rig.line("snap"))
    expected = bytearray(rig.before)
    expected[80 * SECTOR : 88 * SECTOR] = stamp(80, 8, 7)
    expected[24 * SECTOR : 32 * SECTOR] = stamp(24, 8, 8)
    assert rig.read("snap") == expected


def test_new_chunks_follow_the_highest_of_the_store(dm, tmp_path):
    rig = Rig(dm, tmp_path)
    rig.cows["snap"] = put(tmp_path, store_bytes([(10, 5), (3, 2)]))
    dm.create("snap", rig.line("snap"))
    assert rig.usage() == "48/2048 16"
    rig.write("base", 0)
    assert rig.records() == [(10, 5), (3, 2), (0, 6)]


def test_a_hole_below_the_highest_new_chunk_counts_as_used(dm, tmp_path):
    rig = Rig(dm, tmp_path)
    rig.cows["snap"] = put(tmp_path, store_bytes([(7, 250)]))
    dm.create("snap", rig.line("snap"))
    assert rig.usage() == "2008/2048 16"


def test_a_new_chunk_after_the_highest_skips_an_area(dm, tmp_path):
    rig = Rig(dm, tmp_path)
    data = store_bytes([(10, 33)], 1, size=128 * SECTOR)
    rig.cows["snap"] = put(tmp_path, data)
    dm.create("snap", rig.line("snap", "P 1"))
    assert rig.usage() == "35/128 2"
    rig.write("base", 0, 1)
    assert rig.records() == [(10, 33), (0, 35)]


def test_a_store_whose_last_area_is_full_opens_with_the_next(dm, tmp_path):
    rig = Rig(dm, tmp_path)
    records = [(n, n + 2) for n in range(32)]
    rig.cows["snap"] = put(tmp_path, store_bytes(records, 1, size=128 * SECTOR))
    dm.create("snap", rig.line("snap", "P 1"))
    assert rig.usage() == "35/128 3"


def test_a_store_whose_last_area_is_full_and_ends_there_is_refused(dm, tmp_path):
    rig = Rig(dm, tmp_path)
    data = store_bytes([(n, n + 2) for n in range(32)], 1, size=34 * SECTOR)
    rig.cows["snap"] = put(tmp_path, data)
    with pytest.raises(OSError, match="Failed to read snapshot metadata") as caught:
        dm.create("snap", rig.line("snap", "P 1"))
    assert caught.value.errno == errno.EIO
    assert Path(rig.cows["snap"]).read_bytes() == data


@pytest.mark.parametrize(
    ("sectors", "usage"), [(16, "16/16 16"), (37, "16/37 16"), (24, "16/24 16")]
)
def test_a_small_store_says_its_size_in_sectors(dm, tmp_path, sectors, usage):
    rig = Rig(dm, tmp_path)
    rig.snap("snap", "P 8", cow_sectors=sectors)
    assert rig.usage() == usage


@pytest.mark.parametrize("sectors", [1, 8, 15])
def test_a_store_too_small_for_its_first_area_is_refused(dm, tmp_path, sectors):
    rig = Rig(dm, tmp_path)
    with pytest.raises(OSError, match="Failed to read snapshot metadata") as caught:
        rig.snap("snap", "P 8", cow_sectors=sectors)
    assert caught.value.errno == errno.EIO
