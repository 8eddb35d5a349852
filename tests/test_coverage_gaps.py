"""What no other suite reaches: flakey and delay, holes and their extents, odd images, refusals."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import numpy as np
import pytest
from support import SECTOR, Rig, fill, image, stamp, store_bytes
from support.libc_faults import LibcFaults

import cow
import cow.store
from cow import _core
from cow.table import parse_concise


@pytest.fixture
def dm():
    with cow.Mapper(durability="process") as mapper:
        yield mapper


@pytest.fixture
def rig(dm, tmp_path):
    return Rig(dm, tmp_path, sectors=512)


def refusal(code: int, call, *args, **options) -> str:
    """Return the text of the CowError with errno `code` that a call ends with."""
    with pytest.raises(cow.CowError) as caught:
        call(*args, **options)
    assert caught.value.errno == code
    return str(caught.value)


# --- flakey: up for no time at all, so that what it does when down is always done -----------------


def flakey(dm, tmp_path: Path, features: str = "") -> tuple[cow.Device, str]:
    path = image(tmp_path / "b.img", stamp(0, 64, 1))
    return dm.create("x", f"0 64 flakey {path} 0 0 60{features}"), path


def test_flakey_without_features_fails_everything_when_down(dm, tmp_path):
    device, _ = flakey(dm, tmp_path)
    refusal(errno.EIO, device.pread, SECTOR, 0)
    refusal(errno.EIO, device.pwrite, bytes(SECTOR), 0)
    refusal(errno.EIO, device.discard, 0, SECTOR)
    refusal(errno.EIO, device.flush)
    assert dm.table("x").endswith(" 0 0 60 0")


def test_flakey_passes_everything_when_up(dm, tmp_path):
    path = image(tmp_path / "b.img", 64)
    device = dm.create("x", f"0 64 flakey {path} 0 60 1")
    device.pwrite(stamp(3, 1, 7), 3 * SECTOR)
    assert device.pread(SECTOR, 3 * SECTOR) == stamp(3, 1, 7)


def test_flakey_drops_writes_and_says_they_are_done(dm, tmp_path):
    device, path = flakey(dm, tmp_path, " 1 drop_writes")
    assert device.pwrite(bytes(SECTOR), 0) == SECTOR
    assert device.pread(SECTOR, 0) == stamp(0, 1, 1)
    assert Path(path).read_bytes() == stamp(0, 64, 1)


def test_flakey_fails_writes_and_lets_reads_pass(dm, tmp_path):
    device, _ = flakey(dm, tmp_path, " 1 error_writes")
    refusal(errno.EIO, device.pwrite, bytes(SECTOR), 0)
    assert device.pread(SECTOR, 0) == stamp(0, 1, 1)


def test_flakey_fails_reads_and_lets_writes_pass(dm, tmp_path):
    device, path = flakey(dm, tmp_path, " 1 error_reads")
    refusal(errno.EIO, device.pread, SECTOR, 0)
    device.pwrite(bytes(SECTOR), 0)
    assert Path(path).read_bytes()[:SECTOR] == bytes(SECTOR)


def test_flakey_corrupts_one_byte_of_a_read(dm, tmp_path):
    device, path = flakey(dm, tmp_path, " 5 corrupt_bio_byte 3 R 255 0")
    expected = bytearray(stamp(8, 2, 1))
    expected[2] = 255
    assert device.pread(2 * SECTOR, 8 * SECTOR) == expected
    assert Path(path).read_bytes() == stamp(0, 64, 1)
    assert dm.table("x").endswith(" 0 0 60 5 corrupt_bio_byte 3 r 255 0")


def test_flakey_corrupts_one_byte_of_a_write(dm, tmp_path):
    device, path = flakey(dm, tmp_path, " 5 corrupt_bio_byte 1 w 255 0")
    device.pwrite(bytes(SECTOR), SECTOR)
    assert Path(path).read_bytes()[SECTOR : 2 * SECTOR] == b"\xff" + bytes(SECTOR - 1)
    assert device.pread(SECTOR, 0) == stamp(0, 1, 1)


@pytest.mark.parametrize("way", ["read", "write"])
def test_flakey_corrupts_a_byte_at_random(dm, tmp_path, way):
    device, _ = flakey(dm, tmp_path, f" 2 random_{way}_corrupt 1000000000")
    data = bytes(16 * SECTOR)
    found = set()
    for _ in range(40):
        device.write_zeroes(0, len(data)) if way == "write" else None
        found.add(device.pread(16 * SECTOR, 0))
    assert len(found) > 1
    before = data if way == "write" else stamp(0, 16, 1)
    for each in found:
        assert sum(a != b for a, b in zip(each, before, strict=True)) <= 1


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ("0 1", "Invalid argument count"),
        ("0 0 0", "Total (up + down) interval is zero"),
        ("0 1 1 1", "Invalid number of feature args"),
        ("0 1 1 1 nonsense", "Unrecognised flakey feature requested"),
        ("0 1 1 2 drop_writes drop_writes", "Feature drop_writes duplicated"),
        ("0 1 1 2 drop_writes error_writes", "drop_writes is incompatible with error_writes"),
        ("0 1 1 1 corrupt_bio_byte", "Feature corrupt_bio_byte requires parameters"),
        ("0 1 1 5 corrupt_bio_byte 1 x 0 0", "Invalid corrupt bio direction (r or w)"),
        ("0 1 1 5 corrupt_bio_byte 0 r 0 0", "Invalid corrupt bio byte"),
        ("0 1 1 5 corrupt_bio_byte 1 r 256 0", "Invalid value to write to corrupt bio byte"),
        ("0 1 1 1 random_read_corrupt", "Feature random_read_corrupt requires a parameter"),
        ("0 1 1 2 random_write_corrupt 1000000001", "Invalid random corrupt argument"),
    ],
)
def test_flakey_refuses_wrong_arguments(dm, tmp_path, args, text):
    path = image(tmp_path / "b.img", 64)
    assert text in refusal(errno.EINVAL, dm.create, "x", f"0 64 flakey {path} {args}")


def test_a_filter_that_raises_fails_the_request(dm, tmp_path, monkeypatch):
    device, _ = flakey(dm, tmp_path, " 5 corrupt_bio_byte 3 r 255 0")
    assert device.live is not None
    target = type(device.live.targets[0].map)

    def no_space(*args: object) -> int:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(target, "mangle", no_space)
    refusal(errno.ENOSPC, device.pread, SECTOR, 0)
    monkeypatch.setattr(target, "mangle", lambda *args: 1 // 0)
    refusal(errno.EIO, device.pread, SECTOR, 0)
    monkeypatch.setattr(target, "start", lambda *args: 1 // 0)
    refusal(errno.EIO, device.pread, SECTOR, 0)


def test_a_snapshot_keeps_what_flakey_corrupted(dm, tmp_path):
    device, path = flakey(dm, tmp_path, " 5 corrupt_bio_byte 1 r 255 0")
    store = image(tmp_path / "s.cow", 256)
    dm.create("base", "0 64 snapshot-origin x")
    snap = dm.create("snap", f"0 64 snapshot x {store} P 8")
    dm.device("base").pwrite(bytes(8 * SECTOR), 0)
    assert snap.pread(SECTOR, 0)[:1] == b"\xff"
    assert Path(path).read_bytes()[: 8 * SECTOR] == bytes(8 * SECTOR)
    assert device.open_count == 2


# --- delay ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", ["{b} 0", "{b} 0 1 {b} 0", "{b} 0 1 {b} 0 1 {b} 0 1 9"])
def test_delay_wants_three_arguments_for_each_kind_of_request(dm, tmp_path, args):
    path = image(tmp_path / "b.img", 64)
    text = refusal(errno.EINVAL, dm.create, "x", "0 64 delay " + args.format(b=path))
    assert "Requires exactly 3, 6 or 9 arguments" in text


def test_delay_refuses_to_write_elsewhere_than_it_reads(dm, tmp_path):
    path = image(tmp_path / "b.img", 128)
    text = refusal(errno.EINVAL, dm.create, "x", f"0 64 delay {path} 0 1 {path} 64 1")
    assert "the same place" in text


def test_a_delayed_device_takes_discards(dm, tmp_path):
    path = image(tmp_path / "b.img", stamp(0, 64, 1))
    device = dm.create("x", f"0 64 delay {path} 0 0")
    device.discard(0, 8 * SECTOR)
    assert device.pread(8 * SECTOR, 0) == bytes(8 * SECTOR)


# --- holes ----------------------------------------------------------------------------------------


def sparse(path: Path, data: dict[int, bytes], size: int) -> str:
    """Write a file of `size` bytes with holes, and data at the offsets given."""
    with path.open("wb") as file:
        for offset, content in data.items():
            file.seek(offset)
            file.write(content)
        file.truncate(size)
    return str(path)


def has_holes(path: str) -> bool:
    file = os.open(path, os.O_RDONLY)
    try:
        return os.lseek(file, 0, os.SEEK_HOLE) < os.fstat(file).st_size
    finally:
        os.close(file)


def zeros(extents: np.ndarray) -> list[tuple[int, int, bool]]:
    return [(int(e["offset"]), int(e["length"]), bool(e["zero"])) for e in extents]


def test_extents_show_holes_as_zeros(dm, tmp_path):
    path = sparse(tmp_path / "b.img", {0: fill(65536, 1), 131072: fill(65536, 2)}, 262144)
    device = dm.create("x", f"0 512 linear {path} 0")
    if not has_holes(path):
        assert zeros(device.extents()) == [(0, 262144, False)]
        return
    assert zeros(device.extents()) == [
        (0, 65536, False),
        (65536, 65536, True),
        (131072, 65536, False),
        (196608, 65536, True),
    ]
    assert zeros(device.extents(65536 - 512, 1024)) == [(65024, 512, False), (65536, 512, True)]


def test_a_run_of_an_image_is_sought_once_however_often_it_is_looked_at(dm, tmp_path):
    path = sparse(tmp_path / "b.img", {65536: fill(65536, 1)}, 131072)
    if not has_holes(path):
        pytest.skip("the file system makes no holes")
    dm.create("b", f"0 256 linear {path} 0")
    lines = [f"{8 * n} 8 linear b {8 * (n // 2) + 128 * (n % 2)}" for n in range(32)]
    device = dm.create("x", "\n".join(lines))
    expected = [(4096 * n, 4096, n % 2 == 0) for n in range(32)]
    assert zeros(device.extents()) == expected
    faults = LibcFaults()
    # Where a run begins and ends: two calls for the data, one for the hole before it.
    with faults.fault("lseek", errno.EIO, at=4) as fault:
        assert zeros(device.extents()) == expected
    assert not fault.fired


def test_what_a_growing_image_does_not_have_yet_reads_as_zeros(dm, tmp_path):
    path = image(tmp_path / "b.img", stamp(0, 8, 1))
    grown = dm.image(path, size=64 * SECTOR)
    assert grown.sparse
    device = dm.create("x", f"0 64 linear {path} 0")
    assert device.pread(16 * SECTOR, 0) == stamp(0, 8, 1) + bytes(8 * SECTOR)
    assert device.pread(SECTOR, 63 * SECTOR) == bytes(SECTOR)
    assert Path(path).stat().st_size == 8 * SECTOR
    device.pwrite(stamp(63, 1, 2), 63 * SECTOR)
    assert device.pread(8 * SECTOR, 56 * SECTOR) == bytes(7 * SECTOR) + stamp(63, 1, 2)
    assert Path(path).stat().st_size == 64 * SECTOR


def test_extents_end_where_a_growing_image_ends(dm, tmp_path):
    path = image(tmp_path / "b.img", stamp(0, 8, 1))
    dm.image(path, size=64 * SECTOR)
    device = dm.create("x", f"0 64 linear {path} 0")
    assert zeros(device.extents()) == [(0, 8 * SECTOR, False), (8 * SECTOR, 56 * SECTOR, True)]


# --- images ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 256, 768, -512])
def test_a_logical_block_size_is_a_power_of_two_from_512_on(dm, tmp_path, size):
    path = image(tmp_path / "b.img", 8)
    refusal(errno.EINVAL, dm.image, path, logical_block_size=size)


def test_a_read_only_image_cannot_grow(dm, tmp_path):
    path = image(tmp_path / "b.img", 8)
    text = refusal(errno.EINVAL, dm.image, path, size=4096 * 8, readonly=True)
    assert "only a writable regular file can grow" in text


def test_a_directory_is_no_image(dm, tmp_path):
    refusal(errno.ENOTBLK, dm.image, str(tmp_path))


def test_a_character_device_is_no_image(dm):
    assert "neither a file nor a block device" in refusal(errno.ENOTBLK, dm.image, "/dev/null")


def test_an_image_is_opened_ahead_only_once(dm, tmp_path):
    path = image(tmp_path / "b.img", 8)
    first = dm.image(path)
    assert repr(first) == f"<Image {path} 8 sectors>"
    refusal(errno.EBUSY, dm.image, path)


def test_a_shared_image_stays_readable_where_it_cannot_be_had_for_writing(tmp_path):
    path = image(tmp_path / "b.img", stamp(0, 64, 1))
    with cow.Mapper() as first, cow.Mapper() as second:
        one = first.create("x", f"0 64 linear {path} 0", readonly=True)
        second.create("x", f"0 64 linear {path} 0", readonly=True)
        refusal(errno.EBUSY, first.create, "y", f"0 64 linear {path} 0")
        assert one.pread(SECTOR, 0) == stamp(0, 1, 1)
        refusal(errno.EBUSY, second.create, "y", f"0 64 linear {path} 0")


# --- requests -------------------------------------------------------------------------------------


def test_negative_lengths_are_refused(rig):
    device = rig.dm.device("base-real")
    refusal(errno.EINVAL, device.pread, -1, 0)
    refusal(errno.EINVAL, device.write_zeroes, 0, -1)
    refusal(errno.EINVAL, device.discard, 0, -1)
    refusal(errno.EINVAL, device.read_many, [0], -1)


def test_a_batch_fills_an_array_that_is_not_in_one_piece(rig):
    wide = np.zeros((2, 2 * SECTOR), np.uint8)
    out = wide[:, ::2]
    assert rig.dm.device("base").read_many([SECTOR, 0], SECTOR, out=out) is out
    assert out.tobytes() == stamp(1, 1, 0) + stamp(0, 1, 0)
    assert not wide[:, 1::2].any()


def test_large_batches_go_past_the_cache_and_are_right(dm, tmp_path):
    path = image(tmp_path / "b.img", stamp(0, 32768, 1))
    device = dm.create("x", f"0 32768 linear {path} 0")
    offsets = np.arange(0, 32768, 128, dtype=np.uint64)[::-1] * SECTOR
    rows = device.read_many(offsets, 64 * SECTOR)
    assert rows.tobytes() == b"".join(stamp(int(o) // SECTOR, 64, 1) for o in offsets)
    device.write_many(offsets + np.uint64(64 * SECTOR), rows)
    for offset in offsets[:3].tolist():
        data = device.pread(128 * SECTOR, offset)
        assert data[: 64 * SECTOR] == data[64 * SECTOR :]


def test_a_view_is_had_through_devices_and_lines_that_keep_an_image_in_one_piece(dm, tmp_path):
    path = image(tmp_path / "b.img", stamp(0, 64, 1))
    dm.create("low", f"0 16 linear {path} 8\n16 16 linear {path} 24\n32 8 linear {path} 0")
    device = dm.create("x", "0 40 linear low 0")
    assert bytes(device.view(8 * SECTOR, 16 * SECTOR)) == stamp(16, 16, 1)
    refusal(errno.EOPNOTSUPP, device.view, 24 * SECTOR, 16 * SECTOR)


def test_neighbours_that_are_alike_are_one_extent(rig):
    snap = rig.snap("snap", "P 8")
    for sector in (40, 56, 48):
        rig.write("base", sector)
    assert [(int(e["offset"]) // SECTOR, int(e["length"]) // SECTOR) for e in snap.extents()] == [
        (0, 40),
        (40, 24),
        (64, 448),
    ]


@pytest.mark.parametrize("batch", [False, True])
def test_one_write_breaks_sharing_in_more_families_than_one_group_holds(dm, tmp_path, batch):
    lines = []
    for number in range(12):
        path = image(tmp_path / f"b{number}.img", stamp(8 * number, 8, 0))
        store = image(tmp_path / f"c{number}.img", 64)
        dm.create(f"real{number}", f"0 8 linear {path} 0")
        dm.create(f"origin{number}", f"0 8 snapshot-origin real{number}")
        dm.create(f"snap{number}", f"0 8 snapshot real{number} {store} P 4")
        lines.append(f"{8 * number} 8 linear origin{number} 0")
    device = dm.create("all", "\n".join(lines))
    data = stamp(0, 96, 5)
    if batch:
        device.write_many(np.array([0], np.uint64), np.frombuffer(data, np.uint8)[None, :])
    else:
        device.pwrite(data, 0)
    assert device.pread(len(data), 0) == data
    for number in range(12):
        snap = dm.device(f"snap{number}")
        assert snap.pread(8 * SECTOR, 0) == stamp(8 * number, 8, 0)


def test_a_merge_of_runs_longer_than_a_step_loses_nothing(dm, tmp_path):
    sectors = 3 * 8192
    rig = Rig(dm, tmp_path, sectors=sectors)
    rig.snap("snap", "P 8", cow_sectors=sectors + 1024)
    rig.write("snap", 0, sectors - 8192, tag=1)
    rig.write("snap", sectors - 64, 64, tag=1)
    rig.write("snap", sectors - 256, 64, tag=1)
    moment = rig.read("snap")
    rig.merge("snap")
    assert rig.read("base") == moment


def test_a_handover_to_a_longer_table_takes_the_exceptions_along(dm, tmp_path):
    path = image(tmp_path / "b.img", stamp(0, 1024, 0))
    store = image(tmp_path / "s.cow", 4096)
    dm.create("real", f"0 256 linear {path} 0")
    dm.create("base", "0 256 snapshot-origin real")
    snap = dm.create("snap", f"0 256 snapshot real {store} P 1")
    dm.device("base").pwrite(bytes(256 * SECTOR), 0)
    dm.suspend("base")
    dm.suspend("snap")
    dm.load("real", f"0 1024 linear {path} 0")
    dm.resume("real")
    dm.load("snap", f"0 1024 snapshot real {store} P 1")
    dm.resume("snap")
    dm.load("base", "0 1024 snapshot-origin real")
    dm.resume("base")
    dm.device("base").pwrite(bytes(1024 * SECTOR), 0)
    assert snap.pread(1024 * SECTOR, 0) == stamp(0, 1024, 0)


def test_an_exception_is_looked_up_in_a_batch(rig):
    snap = rig.snap("snap", "P 8")
    rig.write("base", 16, 8)
    assert snap.live is not None
    found = snap.live.targets[0].map.lookup_many([0, 2, 3])
    assert found.tolist() == [2**64 - 1, 2, 2**64 - 1]


def test_a_long_batch_of_lookups_has_what_was_written_and_nothing_beyond_the_end(rig, seed):
    dice = random.Random(seed)
    snap = rig.snap("snap", "P 8")
    size = snap.size // (8 * SECTOR)
    written = dice.sample(range(size), size // 2)
    for chunk in written:
        rig.write("base", chunk * 8, 8)
    places = {chunk: 2 + number for number, chunk in enumerate(written)}
    asked = [dice.choice([dice.randrange(size), size, 2**40, 2**63]) for _ in range(1000)]
    found = snap.live.targets[0].map.lookup_many(asked)
    assert found.tolist() == [places.get(chunk, 2**64 - 1) for chunk in asked]


def test_a_chunk_the_origin_does_not_have_has_no_exception(rig):
    snap = rig.snap("snap", "P 8")
    assert snap.live.targets[0].map.lookup_many([1 << 40]).tolist() == [2**64 - 1]


def test_a_snapshot_of_16_tib_takes_writes_at_both_ends(dm, tmp_path):
    sectors = 16 << 31
    store = image(tmp_path / "s.cow", 256)
    dm.create("real", f"0 {sectors} zero")
    snap = dm.create("snap", f"0 {sectors} snapshot real {store} N 8")
    base = dm.create("base", f"0 {sectors} snapshot-origin real")
    for sector in (0, sectors - 8):
        snap.pwrite(stamp(sector, 8, 1), sector * SECTOR)
        base.pwrite(stamp(sector, 8, 2), sector * SECTOR)
        assert snap.pread(8 * SECTOR, sector * SECTOR) == stamp(sector, 8, 1)
    assert dm.status("snap").endswith(" 16/256 0")


def test_an_origin_that_became_shorter_fails_writes_behind_its_end(rig):
    rig.snap("snap", "P 8")
    rig.dm.load("base-real", f"0 256 linear {rig.origin} 0")
    rig.dm.resume("base-real")
    refusal(errno.EIO, rig.dm.device("base").pwrite, bytes(SECTOR), 300 * SECTOR)
    rig.write("base", 0, 8)
    assert rig.usage() == "24/2048 16"
    assert rig.read("snap", 0, 256) == rig.before[: 256 * SECTOR]


@pytest.mark.parametrize("batch", [False, True])
def test_an_overflowed_snapshot_takes_no_writes(rig, batch):
    snap = rig.snap("snap", "PO 8", cow_sectors=24)
    rig.write("snap", 0)
    refusal(errno.EIO, rig.write, "snap", 8)
    assert rig.usage() == "Overflow"
    for sector in (0, 8):
        data = stamp(sector, 8, 9)
        rows = np.frombuffer(data, np.uint8).reshape(1, -1)
        if batch:
            refusal(errno.EIO, snap.write_many, [sector * SECTOR], rows)
        else:
            refusal(errno.EIO, snap.pwrite, data, sector * SECTOR)
    assert rig.read("snap") == stamp(0, 8, 1) + rig.before[8 * SECTOR :]


def test_a_striped_leg_that_fails_fails_only_its_chunks(dm, tmp_path):
    path = image(tmp_path / "b.img", stamp(0, 32, 1))
    dm.create("bad", "0 32 error")
    device = dm.create("x", f"0 64 striped 2 8 {path} 0 bad 0")
    assert device.pread(8 * SECTOR, 16 * SECTOR) == stamp(8, 8, 1)
    refusal(errno.EIO, device.pread, 16 * SECTOR, 0)
    refusal(errno.EIO, device.pread, SECTOR, 8 * SECTOR)


def test_a_discard_that_fails_below_is_an_error(dm, tmp_path):
    path = image(tmp_path / "b.img", stamp(0, 64, 1))
    store = image(tmp_path / "s.cow", 256)
    dm.create("cow", f"0 256 linear {store} 0")
    words = "P 8 1 discard_zeroes_cow"
    snap = dm.create("snap", f"0 64 snapshot {path} cow {words}")
    snap.pwrite(bytes(16 * SECTOR), 0)
    dm.load("cow", "0 256 error")
    dm.resume("cow")
    refusal(errno.EIO, snap.discard, 0, 16 * SECTOR)


def test_what_stands_on_a_read_only_device_cannot_write_to_it(dm, tmp_path):
    path = image(tmp_path / "b.img", stamp(0, 64, 1))
    store = image(tmp_path / "s.cow", 256)
    dm.create("ro", f"0 64 linear {path} 0", readonly=True)
    words = "P 8 2 discard_zeroes_cow discard_passdown_origin"
    snap = dm.create("snap", f"0 64 snapshot ro {store} {words}")
    refusal(errno.EPERM, snap.discard, 0, 8 * SECTOR)
    device = dm.create("x", "0 64 linear ro 0")
    refusal(errno.EPERM, device.pwrite, bytes(SECTOR), 0)
    snap.pwrite(bytes(SECTOR), 0)
    assert Path(path).read_bytes() == stamp(0, 64, 1)


def test_a_growing_image_cut_short_fails_reads_up_to_where_it_ends(dm, tmp_path):
    path = image(tmp_path / "b.img", stamp(0, 16, 1))
    dm.image(path, size=1 << 20)
    device = dm.create("x", f"0 2048 linear {path} 0")
    assert device.pread(32 * SECTOR, 0) == stamp(0, 16, 1) + bytes(16 * SECTOR)
    os.truncate(path, 0)
    refusal(errno.EIO, device.pread, 32 * SECTOR, 0)


def test_an_image_can_be_viewed_without_a_device(dm, tmp_path):
    whole = dm.image(image(tmp_path / "b.img", stamp(0, 16, 1)))
    assert bytes(whole.view(SECTOR, 2 * SECTOR)) == stamp(1, 2, 1)


def test_a_view_finds_its_image_behind_a_device_that_has_another(dm, tmp_path):
    for name in ("one", "two"):
        path = image(tmp_path / f"{name}.img", stamp(0, 16, ord(name[0])))
        dm.create(name, f"0 16 linear {path} 0")
    device = dm.create("x", "0 16 linear one 0\n16 16 linear two 0")
    assert bytes(device.view(20 * SECTOR, SECTOR)) == stamp(4, 1, ord("t"))


def test_a_filter_that_says_nothing_lets_everything_pass(dm, tmp_path):
    low = dm.image(image(tmp_path / "b.img", stamp(0, 16, 1)))
    target = _core.FilterTarget(0, 16, low, 0)
    assert target.start("read", 0, SECTOR) == target.PASS
    data = bytearray(stamp(0, 1, 1))
    target.mangle("read", 0, memoryview(data))
    assert data == stamp(0, 1, 1)


# --- merging --------------------------------------------------------------------------------------


def test_a_merge_of_many_large_chunks_loses_nothing(dm, tmp_path):
    """More bytes than a step takes, in runs of all lengths, all recorded in one area."""
    sectors, chunk = 3 << 15, 64
    rig = Rig(dm, tmp_path, sectors=sectors)
    rig.snap("snap", f"P {chunk}", cow_sectors=sectors + 1024)
    rig.snap("other", "P 128", cow_sectors=sectors + 1024)
    at = 0
    for length in (100, 1, 40, 90, 130, 2, 7, 64, 128, 63):
        rig.write("snap", at * chunk, length * chunk, tag=length)
        at += length + 1
    moment = rig.read("snap")
    rig.merge("snap")
    assert rig.read("base") == rig.read("base-real") == moment
    assert rig.read("other") == rig.before


def test_writes_across_what_is_being_merged_are_all_there(dm, tmp_path):
    """A run longer than a step: parts of it are merged, are being merged, and are still to come."""
    sectors, chunk = 6 << 13, 64
    rig = Rig(dm, tmp_path, sectors=sectors)
    rig.snap("snap", f"P {chunk}", cow_sectors=sectors + 1024)
    rig.snap("other", "P 128", cow_sectors=sectors + 1024)
    # The first chunk has no exception; the sibling needs it still.
    rig.write("snap", chunk, sectors - chunk, tag=1)
    rig.dm.remove("snap")
    rig.dm.create("slow", f"0 {sectors + 1024} delay {rig.cows['snap']} 0 4")
    rig.dm.load("base", f"0 {sectors} snapshot-merge base-real slow P {chunk}")
    rig.dm.resume("base")
    rig.write("base", 0, sectors, tag=2)
    assert rig.dm.wait_merge("base", timeout=60).endswith(f" 128/{sectors + 1024} 128")
    assert rig.read("base") == rig.read("base-real") == stamp(0, sectors, 2)
    assert rig.read("other") == rig.before


def test_an_invalid_store_has_nothing_to_merge(rig):
    rig.snap("snap", "P 8")
    rig.write("snap", 0)
    target = rig.dm.device("snap").live.targets[0].map
    target.store.valid = False
    assert target.merge() is False
    assert rig.read("base") == rig.before


# --- the mapper -----------------------------------------------------------------------------------


def test_a_device_without_a_table_has_nothing_to_flush(dm):
    dm.create("empty")
    assert dm.device("empty").flush() is None


def test_messages_nobody_takes_are_refused(dm):
    dm.create("x", "0 8 zero")
    dm.create("empty")
    refusal(errno.EINVAL, dm.message, "x", 0, " ")
    refusal(errno.EINVAL, dm.message, "x", 0, "@nonsense")
    refusal(errno.ENXIO, dm.message, "empty", 0, "hello")


def test_waiting_for_a_merge_that_is_not_there_is_refused(dm):
    dm.create("x", "0 8 zero")
    assert "no snapshot-merge target" in refusal(errno.EINVAL, dm.wait_merge, "x")


def test_waiting_for_a_slow_merge_ends_with_its_time(rig):
    rig.snap("snap", "P 8")
    for sector in range(0, 512, 16):
        rig.write("snap", sector)
    moment = rig.read("snap")
    rig.dm.remove("snap")
    rig.dm.create("slow", f"0 2048 linear {rig.cows['snap']} 0")
    rig.dm.load("base", "0 512 snapshot-merge base-real slow P 8")
    rig.dm.suspend("slow")
    rig.dm.resume("base")
    with pytest.raises(TimeoutError, match="still merging"):
        rig.dm.wait_merge("base", timeout=0.001)
    rig.dm.resume("slow")
    assert rig.read("base") == moment


def test_remove_all_leaves_what_is_open(dm):
    device = dm.create("x", "0 8 zero")
    dm.create("y", "0 8 zero")
    with device.open():
        assert "in use: x" in refusal(errno.EBUSY, dm.remove_all)
        assert dm.names() == ["x"]


def test_what_interrupts_a_load_leaves_no_image_open(dm, tmp_path, monkeypatch):
    path = image(tmp_path / "b.img", 8)

    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cow.Device, "load", stop)
    with pytest.raises(KeyboardInterrupt):
        dm.create("x", f"0 8 linear {path} 0")
    monkeypatch.undo()
    with cow.Mapper() as other:
        other.create("x", f"0 8 linear {path} 0")


def test_a_target_whose_module_lacks_another_says_which(dm, monkeypatch):
    def lacking(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name="of_its_own")

    monkeypatch.setattr("cow.target.importlib.import_module", lacking)
    with pytest.raises(ModuleNotFoundError) as caught:
        dm.create("x", "0 8 zeros")
    assert caught.value.name == "of_its_own"


def test_a_uuid_has_no_slash(dm):
    refusal(errno.EINVAL, dm.create, "x", "0 8 zero", uuid="a/b")
    assert dm.names() == []


def test_a_minor_that_is_no_number_is_refused():
    with pytest.raises(cow.TableFormatError, match="Failed to parse minor number"):
        parse_concise("x,,minor,,0 8 zero")


def test_blanks_before_the_fields_of_a_concise_text_are_skipped():
    (device,) = parse_concise(" x,  u, 7,  ro,0 8 zero")
    assert (device.name, device.uuid, device.minor, device.readonly) == ("x", "u", 7, True)


def test_every_public_name_is_there():
    assert set(cow.__all__) <= set(dir(cow))
    for name in cow.__all__:
        assert getattr(cow, name) is not None
    with pytest.raises(AttributeError):
        _ = cow.nonsense


# --- files of devices -----------------------------------------------------------------------------


def test_a_read_only_device_opens_only_for_reading(dm, tmp_path):
    path = image(tmp_path / "b.img", 8)
    device = dm.create("x", f"0 8 linear {path} 0", readonly=True)
    refusal(errno.EACCES, device.open, "r+b")
    with device.open(buffering=0) as file, pytest.raises(OSError, match="not writable"):
        file.write(b"x")


def test_a_file_refuses_to_seek_before_the_start_and_to_work_when_closed(dm):
    device = dm.create("x", "0 8 zero")
    assert repr(device) == "<Device x 8 sectors>"
    file = device.open(buffering=0)
    refusal(errno.EINVAL, file.seek, -1)
    file.close()
    with pytest.raises(ValueError, match="closed file"):
        file.tell()
    dm.remove("x")
    refusal(errno.ENXIO, device.open)


# --- stores from outside --------------------------------------------------------------------------


def test_a_finding_and_a_store_say_what_they_are(tmp_path):
    path = image(tmp_path / "s.cow", bytes(store_bytes([(0, 2), (0, 3)], 8)))
    findings = cow.store.check(path)
    assert [str(each) for each in findings] == [
        "area 0, record 1: old chunk 0 has an exception already"
    ]
    assert repr(cow.store.open(path)) == f"<Store {path} valid chunk_size=8>"
    bad = image(tmp_path / "bad.cow", bytes(64 * SECTOR))
    (finding,) = cow.store.check(bad)
    assert str(finding) == finding.text


def test_a_disk_error_below_a_store_is_an_error(tmp_path, monkeypatch):
    path = image(tmp_path / "s.cow", bytes(store_bytes([(5, 2)], 8)))

    def fail(*args: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("cow.store.os.pread", fail)
    text = refusal(errno.EIO, cow.store.open, path)
    assert f"{path}: cannot read" in text


def test_repair_tells_its_progress(tmp_path):
    path = image(tmp_path / "s.cow", bytes(store_bytes([(5, 2), (7, 3)], 8)))
    calls = []
    cow.store.repair(path, tmp_path / "new.cow", progress=lambda *args: calls.append(args))
    assert calls == [(1, 2), (2, 2)]


def test_repair_that_cannot_write_leaves_nothing_behind(tmp_path):
    path = image(tmp_path / "s.cow", bytes(store_bytes([(5, 2)], 8)))
    refusal(errno.ENOENT, cow.store.repair, path, tmp_path / "no" / "new.cow")

    def stop(*args: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cow.store.repair(path, tmp_path / "new.cow", progress=stop)
    assert not (tmp_path / "new.cow").exists()


def test_repair_refuses_a_chunk_size_that_is_none(tmp_path):
    path = image(tmp_path / "s.cow", bytes(store_bytes([(5, 2)], 8)))
    refusal(errno.EINVAL, cow.store.repair, path, tmp_path / "new.cow", chunk_size=7)


def test_repair_of_a_store_cut_meanwhile_leaves_nothing_behind(tmp_path):
    path = image(tmp_path / "a.cow", bytes(store_bytes([(0, 2), (1, 3), (2, 4)])))

    def cut(done: int, total: int) -> None:
        os.truncate(path, 4 * 4096 + 512)

    refusal(errno.EIO, cow.store.repair, path, tmp_path / "new.cow", progress=cut)
    assert not (tmp_path / "new.cow").exists()


def test_repair_goes_on_after_a_write_that_was_cut_short(tmp_path, monkeypatch):
    records = [(0, 2), (1, 3), (2, 4)]
    store = store_bytes(records)
    for _, new in records:
        store[new * 4096 : (new + 1) * 4096] = stamp(new * 8, 8, 5)
    path = image(tmp_path / "a.cow", bytes(store))
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: whole(file, data[:1000], at))
    assert cow.store.repair(path, tmp_path / "new.cow").kept == 3
    assert (tmp_path / "new.cow").read_bytes() == store
