"""Reading and writing a device from Python: buffers, ends, batches, extents, views, files."""

from __future__ import annotations

import array
import errno
import io
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from support import SECTOR, Rig, image, refused, stamp

import cow

SIZE = 2048 * SECTOR


@pytest.fixture
def dm():
    with cow.Mapper(durability="process") as mapper:
        yield mapper


@pytest.fixture
def dev(dm, tmp_path):
    """A linear device over an image of stamped sectors."""
    path = image(tmp_path / "b.img", stamp(0, 2048, 0))
    return dm.create("dev", f"0 2048 linear {path} 0")


@pytest.fixture
def contents(tmp_path):
    """Read what the image of `dev` holds now."""
    return lambda: (tmp_path / "b.img").read_bytes()


@pytest.fixture
def rig(dm, tmp_path):
    rig = Rig(dm, tmp_path)
    rig.snap()
    return rig


# --- buffers ------------------------------------------------------------------------------------

DATA = stamp(500, 16, 7)


@pytest.mark.parametrize(
    "make",
    [
        bytes,
        bytearray,
        memoryview,
        lambda data: array.array("Q", data),
        lambda data: np.frombuffer(data, np.uint32),
        lambda data: np.frombuffer(data, np.uint8).reshape(4, -1),
        lambda data: memoryview(bytearray(data)).toreadonly(),
    ],
    ids=["bytes", "bytearray", "memoryview", "array", "numpy", "numpy_2d", "read_only"],
)
def test_any_buffer_is_written(dev, contents, make):
    assert dev.pwrite(make(DATA), 3 * SECTOR) == len(DATA)
    assert contents() == stamp(0, 3, 0) + DATA + stamp(19, 2029, 0)


def test_a_strided_buffer_is_written_in_its_order(dev, contents):
    every_other = np.arange(8192, dtype=np.uint16)[::2]
    assert dev.pwrite(every_other, 0) == 8192
    assert contents()[:8192] == every_other.tobytes()


def test_a_reversed_buffer_is_written_in_its_order(dev):
    dev.pwrite(memoryview(DATA)[::-1], 0)
    assert dev.pread(len(DATA), 0) == DATA[::-1]


@pytest.mark.parametrize("text", ["text", 7, None])
def test_what_is_no_buffer_is_refused(dev, contents, text):
    with pytest.raises(TypeError):
        dev.pwrite(text, 0)
    assert contents() == stamp(0, 2048, 0)


def test_pread_returns_bytes(dev):
    data = dev.pread(4096, SECTOR)
    assert type(data) is bytes
    assert data == stamp(1, 8, 0)


@pytest.mark.parametrize(
    "make",
    [
        bytearray,
        lambda size: memoryview(bytearray(size)),
        lambda size: array.array("Q", bytes(size)),
        lambda size: np.zeros(size // 4, np.uint32),
        lambda size: np.zeros((4, size // 4), np.uint8),
    ],
    ids=["bytearray", "memoryview", "array", "numpy", "numpy_2d"],
)
def test_any_writable_buffer_is_read_into(dev, make):
    buffer = make(4096)
    assert dev.preadinto(buffer, 8 * SECTOR) == 4096
    assert memoryview(buffer).cast("B") == stamp(8, 8, 0)


def test_a_strided_buffer_is_read_into(dev):
    block = np.zeros(4096, np.uint16)
    assert dev.preadinto(block[::2], 0) == 4096
    assert block[::2].tobytes() == stamp(0, 8, 0)
    assert not block[1::2].any()


def test_a_strided_buffer_read_short_keeps_its_tail(dev):
    block = np.full(2048, 9, np.uint16)
    assert dev.preadinto(block[::2], SIZE - SECTOR) == SECTOR
    assert block[::2][:256].tobytes() == stamp(2047, 1, 0)
    assert (block[::2][256:] == 9).all()


@pytest.mark.parametrize("buffer", [bytes(4096), memoryview(bytearray(4096)).toreadonly()])
def test_a_read_only_buffer_is_not_read_into(dev, buffer):
    with pytest.raises((BufferError, TypeError)):
        dev.preadinto(buffer, 0)
    assert bytes(buffer) == bytes(4096)


def test_a_zero_length_write_does_nothing(dev, contents):
    assert dev.pwrite(b"", 0) == 0
    assert contents() == stamp(0, 2048, 0)


def test_a_zero_length_read_is_empty(dev):
    assert dev.pread(0, 0) == b""
    assert dev.preadinto(bytearray(0), 0) == 0


def test_single_bytes_are_read_and_written(dev):
    expected = bytearray(stamp(0, 2048, 0))
    expected[1023:1026] = b"abc"
    dev.pwrite(b"abc", 1023)
    assert dev.pread(SIZE, 0) == expected
    assert dev.pread(5, 1022) == expected[1022:1027]


def test_single_bytes_written_under_a_snapshot_copy_their_chunk(rig):
    rig.dm.device("base").pwrite(b"x", 4095)
    assert rig.records() == [(0, 2)]
    assert rig.read("snap") == rig.before


# --- the end of a device, read-only devices -----------------------------------------------------


def test_a_read_over_the_end_is_short(dev):
    assert dev.pread(4096, SIZE - SECTOR) == stamp(2047, 1, 0)


def test_a_read_into_a_buffer_over_the_end_is_short(dev):
    buffer = bytearray(b"\xee" * 1024)
    assert dev.preadinto(buffer, SIZE - SECTOR) == SECTOR
    assert buffer == stamp(2047, 1, 0) + b"\xee" * SECTOR


@pytest.mark.parametrize("offset", [SIZE, SIZE + 1, 1 << 40, (1 << 63) - 1])
def test_a_read_at_or_past_the_end_is_empty(dev, offset):
    assert dev.pread(4096, offset) == b""


@pytest.mark.parametrize("offset", [SIZE - 4095, SIZE, SIZE + 4096, (1 << 63) - 1])
def test_a_write_that_reaches_past_the_end_writes_nothing(dev, contents, offset):
    assert refused(dev.pwrite, bytes(4096), offset) == errno.ENOSPC
    assert contents() == stamp(0, 2048, 0)


def test_zeroes_past_the_end_write_nothing(dev, contents):
    assert refused(dev.write_zeroes, SIZE - SECTOR, 1024) == errno.ENOSPC
    assert contents() == stamp(0, 2048, 0)


def test_a_write_past_the_end_under_a_snapshot_copies_nothing(rig):
    assert refused(rig.write, "base", 2044, 8) == errno.ENOSPC
    assert rig.records() == []


@pytest.mark.parametrize("call", ["pread", "pwrite", "preadinto", "write_zeroes", "discard"])
def test_a_negative_offset_is_refused(dev, contents, call):
    arguments = {
        "pread": (8, -1),
        "pwrite": (b"x", -1),
        "preadinto": (bytearray(8), -1),
        "write_zeroes": (-1, 8),
        "discard": (-512, 512),
    }
    assert refused(getattr(dev, call), *arguments[call]) == errno.EINVAL
    assert contents() == stamp(0, 2048, 0)


@pytest.mark.parametrize("call", ["pwrite", "write_zeroes", "write_many"])
def test_a_read_only_device_refuses_writes(dm, tmp_path, call):
    path = image(tmp_path / "b.img", stamp(0, 8, 0))
    dev = dm.create("dev", f"0 8 linear {path} 0", readonly=True)
    arguments = {
        "pwrite": (b"x", 0),
        "write_zeroes": (0, 512),
        "write_many": (np.zeros(1, np.uint64), np.zeros((1, 512), np.uint8)),
    }
    assert refused(getattr(dev, call), *arguments[call]) == errno.EPERM
    assert Path(path).read_bytes() == stamp(0, 8, 0)


def test_a_read_only_device_is_read(dm, tmp_path):
    path = image(tmp_path / "b.img", stamp(0, 8, 0))
    dev = dm.create("dev", f"0 8 linear {path} 0", readonly=True)
    assert dev.readonly
    assert dev.pread(4096, 0) == stamp(0, 8, 0)


def test_a_read_only_snapshot_still_takes_copies(rig):
    rig.cows["ro"] = image(rig.folder / "ro.cow", 2048)
    rig.dm.create("ro", rig.line("ro"), readonly=True)
    rig.write("base", 0)
    assert rig.usage("ro") == "24/2048 16"
    assert rig.read("ro") == rig.before
    assert refused(rig.write, "ro", 0) == errno.EPERM


@pytest.mark.parametrize("call", ["pread", "pwrite", "flush"])
def test_a_removed_device_does_no_io(dm, dev, call):
    dm.remove("dev")
    arguments = {"pread": (8, 0), "pwrite": (b"x", 0), "flush": ()}
    assert refused(getattr(dev, call), *arguments[call]) == errno.ENXIO


def test_an_error_target_fails_every_read_and_write(dm):
    dev = dm.create("dev", "0 8 error")
    assert refused(dev.pread, 512, 0) == errno.EIO
    assert refused(dev.pwrite, b"x", 0) == errno.EIO


def test_an_error_target_fails_only_its_own_sectors(dm, tmp_path):
    path = image(tmp_path / "b.img", stamp(0, 24, 0))
    dev = dm.create("dev", f"0 8 linear {path} 0\n8 8 error\n16 8 linear {path} 16")
    assert dev.pread(4096, 0) == stamp(0, 8, 0)
    assert dev.pread(4096, 8192) == stamp(16, 8, 0)
    assert refused(dev.pread, 4097, 0) == errno.EIO


def test_a_zero_target_reads_zeros_and_forgets_writes(dm):
    dev = dm.create("dev", "0 8 zero")
    assert dev.pwrite(b"\xff" * 4096, 0) == 4096
    assert dev.pread(4096, 0) == bytes(4096)


# --- remapping ----------------------------------------------------------------------------------


def test_a_linear_target_maps_from_its_start(dm, tmp_path):
    path = image(tmp_path / "b.img", stamp(0, 100, 0))
    dev = dm.create("dev", f"0 10 linear {path} 50\n10 20 linear {path} 3")
    assert dev.pread(30 * SECTOR, 0) == stamp(50, 10, 0) + stamp(3, 20, 0)


def test_a_striped_target_deals_its_chunks_to_the_legs_in_turn(dm, tmp_path):
    legs = [image(tmp_path / f"{tag}.img", stamp(0, 64, tag)) for tag in range(3)]
    where = " ".join(f"{leg} {offset}" for leg, offset in zip(legs, (0, 5, 9), strict=True))
    dev = dm.create("dev", f"0 42 striped 3 7 {where}")
    first = stamp(0, 7, 0) + stamp(5, 7, 1) + stamp(9, 7, 2)
    second = stamp(7, 7, 0) + stamp(12, 7, 1) + stamp(16, 7, 2)
    assert dev.pread(42 * SECTOR, 0) == first + second


def test_a_write_over_stripes_reaches_every_leg(dm, tmp_path):
    legs = [image(tmp_path / f"{tag}.img", 16) for tag in range(2)]
    dev = dm.create("dev", f"0 32 striped 2 4 {legs[0]} 0 {legs[1]} 0")
    dev.pwrite(stamp(0, 32, 1), 0)
    for leg, path in enumerate(legs):
        chunks = [stamp(4 * chunk, 4, 1) for chunk in range(leg, 8, 2)]
        assert Path(path).read_bytes() == b"".join(chunks)


def test_a_snapshot_on_a_later_line_counts_chunks_from_the_start_of_the_device(dm, tmp_path):
    origin = image(tmp_path / "b.img", stamp(0, 256, 0))
    store = image(tmp_path / "c.img", 1024)
    dev = dm.create("dev", f"0 64 zero\n64 64 snapshot {origin} {store} P 8")
    dev.pwrite(stamp(0, 8, 1), 64 * SECTOR)
    assert Path(store).read_bytes()[4096:4112] == bytes([8, *[0] * 7, 2, *[0] * 7])
    assert dev.pread(64 * SECTOR, 64 * SECTOR) == stamp(0, 8, 1) + stamp(72, 56, 0)


def test_a_device_of_terabytes_is_addressed_to_its_end(dm):
    dev = dm.create("dev", f"0 {1 << 35} zero")
    assert dev.size == 1 << 44
    assert dev.sectors == 1 << 35
    assert dev.pread(4096, (1 << 44) - 512) == bytes(512)


# --- write_zeroes, discard, flush ---------------------------------------------------------------


def test_zeroes_are_written(dev, contents):
    dev.write_zeroes(SECTOR, 2 * SECTOR)
    assert contents() == stamp(0, 1, 0) + bytes(2 * SECTOR) + stamp(3, 2045, 0)


def test_zeroes_written_to_the_origin_are_kept_out_of_the_snapshot(rig):
    rig.dm.device("base").write_zeroes(0, 16 * SECTOR)
    assert rig.read("base", 0, 16) == bytes(16 * SECTOR)
    assert rig.read("snap") == rig.before
    assert rig.records() == [(0, 2), (1, 3)]


def test_zeroes_written_to_a_snapshot_take_chunks(rig):
    rig.dm.device("snap").write_zeroes(4 * SECTOR, 8 * SECTOR)
    assert rig.read("snap", 0, 16) == stamp(0, 4, 0) + bytes(8 * SECTOR) + stamp(12, 4, 0)
    assert rig.records() == [(0, 2), (1, 3)]


def test_a_discarded_range_of_an_image_reads_zeros(dev):
    dev.discard(8 * SECTOR, 8 * SECTOR)
    assert dev.pread(24 * SECTOR, 0) == stamp(0, 8, 0) + bytes(8 * SECTOR) + stamp(16, 8, 0)


def test_flush_succeeds_on_an_invalid_snapshot(dm, tmp_path):
    rig = Rig(dm, tmp_path)
    rig.snap("snap", "P 8", cow_sectors=16)
    rig.write("base", 0)
    assert rig.usage() == "Invalid"
    dm.device("snap").flush()
    assert rig.usage() == "Invalid"


def test_what_was_flushed_is_in_the_image(dev, contents):
    dev.pwrite(DATA, 0)
    dev.flush()
    assert contents()[: len(DATA)] == DATA


# --- read_many and write_many -------------------------------------------------------------------


def test_read_many_returns_a_row_an_offset(dev):
    offsets = np.array([5, 0, 2040, 5], np.uint64) * SECTOR
    rows = dev.read_many(offsets, 4096)
    assert rows.shape == (4, 4096)
    assert rows.dtype == np.uint8
    assert [row.tobytes() for row in rows] == [stamp(s, 8, 0) for s in (5, 0, 2040, 5)]


def test_read_many_fills_out(dev):
    out = np.zeros((2, 1024), np.uint8)
    assert dev.read_many(np.array([0, 4096], np.uint64), 1024, out=out) is out
    assert out.tobytes() == stamp(0, 2, 0) + stamp(8, 2, 0)


@pytest.mark.parametrize(
    "out",
    [
        np.zeros((2, 1023), np.uint8),
        np.zeros((1, 1024), np.uint8),
        np.zeros((2, 1024), np.uint16),
        np.zeros(2048, np.uint8),
    ],
    ids=["short_rows", "few_rows", "wide_type", "one_dimension"],
)
def test_read_many_refuses_out_of_another_shape(dev, out):
    with pytest.raises(ValueError, match="out"):
        dev.read_many(np.array([0, 4096], np.uint64), 1024, out=out)
    assert not out.any()


def test_read_many_refuses_a_read_only_out(dev):
    out = np.zeros((1, 512), np.uint8)
    out.flags.writeable = False
    with pytest.raises((ValueError, BufferError)):
        dev.read_many(np.zeros(1, np.uint64), 512, out=out)
    assert not out.any()


def test_read_many_out_of_range_is_refused(dev):
    with pytest.raises(OSError, match="end"):
        dev.read_many(np.array([0, SIZE - 511], np.uint64), 512)


def test_read_many_of_nothing_is_empty(dev):
    assert dev.read_many(np.empty(0, np.uint64), 4096).shape == (0, 4096)


def test_read_many_goes_through_a_snapshot(rig):
    rig.write("base", 8, 16)
    rig.write("snap", 40, 1, tag=2)
    offsets = np.array([0, 4, 12, 36], np.uint64) * SECTOR
    rows = rig.dm.device("snap").read_many(offsets, 4096)
    expected = rig.read("snap")
    assert [row.tobytes() for row in rows] == [
        expected[offset : offset + 4096] for offset in offsets.tolist()
    ]


def test_write_many_writes_each_row_where_it_belongs(dev, contents):
    data = np.frombuffer(stamp(0, 16, 1), np.uint8).reshape(2, 4096)
    dev.write_many(np.array([80, 8], np.uint64) * SECTOR, data)
    expected = bytearray(stamp(0, 2048, 0))
    expected[80 * SECTOR : 88 * SECTOR] = stamp(0, 8, 1)
    expected[8 * SECTOR : 16 * SECTOR] = stamp(8, 8, 1)
    assert contents() == expected


def test_the_last_of_several_rows_for_one_offset_wins(rig):
    rows = np.repeat(np.arange(1, 5, dtype=np.uint8)[:, None], 4096, axis=1)
    offsets = np.array([8, 16, 8, 8], np.uint64) * SECTOR
    rig.dm.device("base").write_many(offsets, rows)
    assert rig.read("base", 8, 16) == b"\x04" * 4096 + b"\x02" * 4096
    assert rig.records() == [(1, 2), (2, 3)]
    assert rig.read("snap") == rig.before


def test_write_many_records_exceptions_in_the_order_of_the_rows(rig):
    offsets = np.array([40, 8, 24, 12], np.uint64) * SECTOR
    rig.dm.device("base").write_many(offsets, np.ones((4, 4096), np.uint8))
    assert rig.records() == [(5, 2), (1, 3), (3, 4), (2, 5)]


def test_write_many_out_of_range_changes_nothing(rig):
    offsets = np.array([0, 8, 2041], np.uint64) * SECTOR
    call = rig.dm.device("base").write_many
    assert refused(call, offsets, np.ones((3, 4096), np.uint8)) == errno.ENOSPC
    assert rig.read("base") == rig.before
    assert rig.records() == []


def test_write_many_with_rows_missing_changes_nothing(rig):
    with pytest.raises(ValueError, match="data"):
        rig.dm.device("base").write_many(np.zeros(3, np.uint64), np.ones((2, 512), np.uint8))
    assert rig.read("base") == rig.before


def test_write_many_takes_strided_arrays(dev):
    block = np.arange(4 * 2048, dtype=np.uint8).reshape(4, 2048)
    offsets = np.arange(8, dtype=np.uint64)[::2] * 4096
    dev.write_many(offsets, block[:, ::2])
    assert dev.read_many(offsets, 1024).tobytes() == block[:, ::2].tobytes()


def test_write_many_of_nothing_does_nothing(dev, contents):
    dev.write_many(np.empty(0, np.uint64), np.empty((0, 4096), np.uint8))
    assert contents() == stamp(0, 2048, 0)


def test_write_many_to_a_full_store_fails(dm, tmp_path):
    rig = Rig(dm, tmp_path)
    rig.snap("snap", "P 8", cow_sectors=32)
    offsets = np.arange(4, dtype=np.uint64) * 4096
    call = rig.dm.device("snap").write_many
    assert refused(call, offsets, np.ones((4, 4096), np.uint8)) == errno.EIO
    assert rig.usage() == "Invalid"


# --- extents ------------------------------------------------------------------------------------


def runs(extents) -> list[tuple[int, int, int]]:
    """Return the extents in sectors."""
    rows = zip(extents["offset"], extents["length"], extents["source"], strict=True)
    return [(int(o) // SECTOR, int(n) // SECTOR, int(s)) for o, n, s in rows]


def test_extents_tell_origin_from_store(rig):
    rig.write("base", 40, 8)
    rig.write("snap", 48, 1)
    assert runs(rig.dm.device("snap").extents()) == [
        (0, 40, cow.ORIGIN),
        (40, 16, cow.COW),
        (56, 1992, cow.ORIGIN),
    ]


def test_extents_of_a_range_begin_and_end_with_it(rig):
    rig.write("base", 40, 8)
    extents = rig.dm.device("snap").extents(44 * SECTOR, 8 * SECTOR)
    assert runs(extents) == [(44, 4, cow.COW), (48, 4, cow.ORIGIN)]


def test_extents_show_a_zero_target_as_zeros(dm, tmp_path):
    path = image(tmp_path / "b.img", stamp(0, 16, 0))
    dev = dm.create("dev", f"0 8 linear {path} 0\n8 24 zero\n32 8 linear {path} 8")
    assert runs(dev.extents()) == [
        (0, 8, cow.ORIGIN),
        (8, 24, cow.ZERO),
        (32, 8, cow.ORIGIN),
    ]


@pytest.mark.parametrize("look", ["extents", "view"])
def test_a_look_that_met_a_suspended_device_begins_again(rig, look):
    """Each wait ends with another pass, from the start: no piece is counted twice."""
    rig.dm.create("late", "0 8 zero" if look == "extents" else f"0 8 linear {rig.origin} 8")
    both = rig.dm.create("both", "0 8 linear base-real 0\n8 8 linear late 0")
    expected = getattr(both, look)().tolist()
    rig.dm.suspend("late")
    with ThreadPoolExecutor() as pool:
        found = pool.submit(lambda: getattr(both, look)().tolist())
        time.sleep(0.3)  # a wait lasts 100 ms at most
        rig.dm.resume("late")
    assert found.result() == expected


def test_extents_past_the_end_are_none(dev):
    assert len(dev.extents(SIZE)) == 0


def test_the_sources_of_extents_have_fixed_numbers():
    assert (cow.ORIGIN, cow.COW, cow.ZERO) == (0, 1, 2)


# --- views --------------------------------------------------------------------------------------


def test_a_view_shows_the_image_without_a_copy(dev):
    view = dev.view(SECTOR, 2 * SECTOR)
    assert view.readonly
    assert bytes(view) == stamp(1, 2, 0)
    dev.pwrite(stamp(2, 1, 5), 2 * SECTOR)
    assert bytes(view) == stamp(1, 1, 0) + stamp(2, 1, 5)


def test_a_view_of_everything_has_the_size_of_the_device(dev):
    assert dev.view().nbytes == SIZE


def test_a_view_outlives_its_device(dm, dev):
    view = dev.view(0, SECTOR)
    dm.remove("dev")
    dm.close()
    assert bytes(view) == stamp(0, 1, 0)


def test_a_snapshot_gives_no_view(rig):
    with pytest.raises(OSError, match="view"):
        rig.dm.device("snap").view(0, SECTOR)


def test_a_range_in_two_pieces_gives_no_view(dm, tmp_path):
    path = image(tmp_path / "b.img", 64)
    dev = dm.create("dev", f"0 8 linear {path} 32\n8 8 linear {path} 0")
    with pytest.raises(OSError, match="view"):
        dev.view(4096 - 512, 1024)


# --- file objects -------------------------------------------------------------------------------


def test_a_device_opens_as_a_file_to_read(dev):
    with dev.open() as file:
        assert file.readable()
        assert not file.writable()
        assert file.read(4096) == stamp(0, 8, 0)
        assert file.tell() == 4096


def test_a_file_seeks_from_start_here_and_end(dev):
    with dev.open() as file:
        assert file.seek(-SECTOR, io.SEEK_END) == SIZE - SECTOR
        assert file.read() == stamp(2047, 1, 0)
        assert file.seek(SECTOR) == SECTOR
        assert file.seek(SECTOR, io.SEEK_CUR) == 2 * SECTOR
        assert file.read(SECTOR) == stamp(2, 1, 0)


def test_a_file_reads_to_the_end_of_the_device(dev):
    with dev.open() as file:
        assert file.read() == stamp(0, 2048, 0)
        assert file.read(1) == b""


def test_a_file_is_written_and_flushed(dev, contents):
    with dev.open("r+b") as file:
        file.seek(10 * SECTOR)
        file.write(DATA)
        file.flush()
        assert contents() == stamp(0, 10, 0) + DATA + stamp(26, 2022, 0)


def test_a_file_written_and_closed_is_in_the_image(dev, contents):
    with dev.open("r+b") as file:
        file.write(b"x" * 100)
    assert contents()[:100] == b"x" * 100


def test_a_file_opened_to_read_is_not_written(dev):
    with dev.open("rb") as file, pytest.raises(io.UnsupportedOperation):
        file.write(b"x")


def test_an_open_file_counts_as_an_open(dm, dev):
    file = dev.open()
    assert dm.info("dev").open_count == 1
    assert dev.open_count == 1
    file.close()
    assert dm.info("dev").open_count == 0


def test_a_device_with_an_open_file_is_not_removed(dm, dev):
    with dev.open() as file:
        assert refused(dm.remove, "dev") == errno.EBUSY
        assert file.read(SECTOR) == stamp(0, 1, 0)
    dm.remove("dev")
    assert dm.names() == []


@pytest.mark.parametrize("mode", ["w", "r", "text", "xb"])
def test_a_mode_that_is_none_for_a_device_is_refused(dm, dev, mode):
    with pytest.raises(ValueError, match=mode):
        dev.open(mode)
    assert dm.info("dev").open_count == 0


# --- names and numbers --------------------------------------------------------------------------


def test_a_device_knows_itself(dm, tmp_path):
    dev = dm.create("dev", "0 100 zero", uuid="U-1", minor=7)
    assert (dev.name, dev.uuid, dev.major, dev.minor) == ("dev", "U-1", 254, 7)
    assert (dev.size, dev.sectors) == (51200, 100)
    assert (dev.readonly, dev.suspended, dev.event_nr, dev.open_count) == (False, False, 0, 0)


def test_a_device_is_found_by_name(dm, dev):
    found = dm.device("dev")
    assert found.name == "dev"
    assert found.pread(SECTOR, SECTOR) == stamp(1, 1, 0)


def test_an_image_opened_with_a_size_grows_on_demand(dm, tmp_path):
    path = tmp_path / "grow.img"
    path.write_bytes(b"")
    dm.image(path, size=1 << 20)
    dev = dm.create("dev", f"0 2048 linear {path} 0")
    assert dev.pread(SECTOR, SIZE - SECTOR) == bytes(SECTOR)
    dev.pwrite(DATA, 0)
    assert dev.pread(len(DATA), 0) == DATA
    assert path.read_bytes()[: len(DATA)] == DATA


def test_a_store_grows_on_demand(dm, tmp_path):
    rig = Rig(dm, tmp_path)
    path = tmp_path / "grow.cow"
    path.write_bytes(b"")
    dm.image(path, size=1 << 20)
    rig.cows["snap"] = str(path)
    dm.create("snap", rig.line("snap"))
    assert rig.usage() == "16/2048 16"
    rig.write("base", 0, 64)
    assert rig.read("snap") == rig.before
    assert len(rig.records()) == 8
    assert path.stat().st_size < 1 << 20
