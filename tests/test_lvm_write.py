"""What is written, byte by byte: labels, metadata areas, the safe protocol; and what is refused.

The real lvm2 looks at it too: `pvck --dump` reads plain files.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from support import lvm as support
from support.crash import FLUSH, Entry, read_log
from support.faults import Failing, Fault
from support.lvm import MDA, MIB, SECTOR, Disk, mda_header, sample

import cow
from cow import lvm
from cow.lvm.allocation import PVRange
from cow.lvm.backups import Backups
from cow.lvm.check import problems
from cow.lvm.commit import metadata_bytes
from cow.lvm.edit import remove_lv, rename_lv
from cow.lvm.label import Label, Region, label_bytes, read_label
from cow.lvm.mda import MetadataArea
from cow.lvm.metadata_text import vg_from_text
from cow.lvm.text import parse

PVCK = shutil.which("pvck", path="/usr/sbin:/sbin:/usr/bin")
needs_pvck = pytest.mark.skipif(PVCK is None, reason="pvck (Debian: lvm2) is not installed")


def pvck(what: str, disk: Disk | str) -> str:
    assert PVCK
    done = subprocess.run(
        [PVCK, "--dump", what, str(disk)], capture_output=True, text=True, check=True
    )
    assert "CHECK" not in done.stdout
    return done.stdout


def make_disks(folder: Path, count: int = 2, size: int = 64 * MIB) -> list[Disk]:
    return [Disk(folder / f"pv{number}.img", size) for number in range(count)]


def make_vg(disks: list[Disk], **options) -> lvm.VolumeGroup:
    vg = lvm.create_vg("vg", [str(disk) for disk in disks], **options)
    vg.said = []
    vg.report = vg.said.append
    return vg


def layout(vg: lvm.VolumeGroup, name: str) -> list[tuple]:
    return [
        (s.extent_count, *[(a.of.label, a.start) for a in s.areas]) for s in vg.lv(name).segments
    ]


# Labels and empty areas.


@pytest.mark.parametrize("disk_name", ["a_linear_pv0", "b_striped_pv1", "f_thin_pv0"])
def test_a_real_label_is_written_again_to_the_byte(disk_name, tmp_path):
    support.write_disk(disk_name, tmp_path / "disk.img")
    real = Disk(tmp_path / "disk.img").read(SECTOR, SECTOR)
    with cow.Mapper() as dm:
        label = read_label(dm.use(str(tmp_path / "disk.img"), readonly=True), "disk")
    assert label_bytes(label) == real


def test_a_label_of_more_areas_than_a_sector_holds_is_not_made():
    label = Label("x" * 32, 64 * MIB, [Region(MIB, 0)], [Region(4096, MIB)] * 30)
    with pytest.raises(lvm.MetadataError, match="does not fit into a sector"):
        label_bytes(label)


# Options of pvcreate, and where lvm2 2.03.16 then put: extents, metadata areas, bootloader area.
GEOMETRY = [
    ({}, 1048576, [(4096, 1044480)], None),
    ({"data_alignment": 4 * MIB}, 4194304, [(4096, 4190208)], None),
    ({"data_alignment": 65536, "metadata_size": 32768}, 65536, [(4096, 61440)], None),
    ({"metadata_size": MIB}, 2097152, [(4096, 2093056)], None),
    ({"metadata_size": 102400}, 1048576, [(4096, 1044480)], None),
    ({"metadata_size": 10240}, 1048576, [(4096, 1044480)], None),
    ({"metadata_copies": 2}, 1048576, [(4096, 1044480), (66060288, 1048576)], None),
    ({"metadata_copies": 0}, 1048576, [], None),
    (
        {"metadata_copies": 2, "metadata_size": 3 * MIB},
        4194304,
        [(4096, 4190208), (63963136, 3145728)],
        None,
    ),
    ({"bootloader_area_size": 102400}, 2097152, [(4096, 1044480)], (1048576, 1048576)),
    (
        {"bootloader_area_size": 2 * MIB, "metadata_copies": 2},
        3145728,
        [(4096, 1044480), (66060288, 1048576)],
        (1048576, 2097152),
    ),
    ({"data_alignment_offset": 3584}, 1052160, [(4096, 1048064)], None),
    ({"data_alignment": 65536, "data_alignment_offset": 3584}, 1052160, [(4096, 1048064)], None),
    ({"data_alignment": 98304}, 1081344, [(4096, 1077248)], None),
    ({"data_alignment": 1024}, 1048576, [(4096, 1044480)], None),
    ({"data_alignment": 4096, "metadata_size": 32768}, 36864, [(4096, 32768)], None),
    ({"data_alignment": 3072}, 1050624, [(4096, 1046528)], None),
]


@pytest.mark.parametrize(("options", "data", "mdas", "boot"), GEOMETRY)
def test_a_pv_is_laid_out_as_pvcreate_does(options, data, mdas, boot, tmp_path):
    (disk,) = make_disks(tmp_path, 1)
    pv_id = lvm.create_pv(str(disk), **options)
    expected = pv_id.encode() + struct.pack("<QQQQQ", 64 * MIB, data, 0, 0, 0)
    expected += b"".join(struct.pack("<QQ", *mda) for mda in mdas) + bytes(16)
    expected += struct.pack("<II", 2, 0) + (struct.pack("<QQ", *boot) if boot else b"")
    assert disk.read(SECTOR + 32, 480) == expected.ljust(480, b"\0")
    assert disk.read(0, SECTOR) == bytes(SECTOR)
    assert disk.read(2 * SECTOR, 2 * SECTOR) == bytes(2 * SECTOR)
    for start, size in mdas:
        assert disk.read(start, SECTOR) == mda_header(start=start, size=size)
    if PVCK:
        pvck("headers", disk)


def test_a_pv_may_have_its_label_elsewhere_and_its_area_ignored(tmp_path):
    (disk,) = make_disks(tmp_path, 1)
    lvm.create_pv(str(disk), label_sector=3, metadata_ignore=True)
    assert disk.read(3 * SECTOR, 8) == b"LABELONE"
    assert disk.slots() == [(0, 0, 0, 1), (0, 0, 0, 0)]


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"size": MIB}, lvm.RequestError, "Size must exceed minimum of 4096 sectors."),
        ({"size": 65 * MIB}, lvm.RequestError, "is more than the device's"),
        ({"data_alignment": 256 * MIB}, lvm.RequestError, "must not exceed device size"),
        ({"data_alignment": 1000}, lvm.RequestError, "must be whole sectors"),
        ({"metadata_copies": 3}, lvm.RequestError, "may only be 0, 1 or 2"),
        ({"metadata_size": 64 * MIB}, lvm.NoSpaceError, "no room for extents"),
        ({"label_sector": 4}, lvm.RequestError, "labelsector must be less than 4"),
        ({"uuid": "abc"}, lvm.MetadataError, "is not a uuid of 32 characters"),
    ],
)
def test_a_pv_that_cannot_be_is_refused_and_nothing_written(options, error, text, tmp_path):
    (disk,) = make_disks(tmp_path, 1)
    with pytest.raises(error, match=text):
        lvm.create_pv(str(disk), **options)
    assert not any(disk.read(0, 2 * MIB))


def test_a_device_under_two_mib_is_too_small(tmp_path):
    (disk,) = make_disks(tmp_path, 1, 2 * MIB - SECTOR)
    with pytest.raises(lvm.NoSpaceError, match="device is too small"):
        lvm.create_pv(str(disk))


def test_a_pv_of_a_vg_is_not_made_anew_or_removed(tmp_path):
    (disk,) = sample("a_linear", tmp_path)
    before = disk.metadata()
    with pytest.raises(lvm.InUse, match='of volume group "vga" without -ff'):
        lvm.create_pv(str(disk))
    with pytest.raises(lvm.InUse, match="is used by VG vga so please use vgreduce first"):
        lvm.remove_pv(str(disk))
    assert disk.metadata() == before


def test_a_pv_of_a_vg_is_told_by_the_other_pvs(tmp_path):
    disks = sample("b_striped", tmp_path)
    disks[1].label(
        disks[1].read(SECTOR + 32, 32).decode(), mdas=(), extension=struct.pack("<II", 2, 0)
    )
    with pytest.raises(lvm.InUse, match="is used by VG vgb"):
        lvm.remove_pv(str(disks[1]), others=[str(disks[0])])


def test_a_removed_pv_has_no_label(tmp_path):
    (disk,) = make_disks(tmp_path, 1)
    lvm.create_pv(str(disk))
    lvm.remove_pv(str(disk))
    assert not any(disk.read(0, 4 * SECTOR))
    with pytest.raises(lvm.PVNotFound, match="No PV found on device"):
        lvm.remove_pv(str(disk))


def test_an_orphan_is_made_anew_with_another_uuid(tmp_path):
    (disk,) = make_disks(tmp_path, 1)
    assert lvm.create_pv(str(disk)) != lvm.create_pv(str(disk))


SIGNATURES = [
    ("ext4", 1080, b"\x53\xef"),
    ("xfs", 0, b"XFSB"),
    ("btrfs", 65600, b"_BHRfS_M"),
    ("swap", 4086, b"SWAPSPACE2"),
    ("DM_snapshot_cow", 0, b"SnAp"),
]


@pytest.mark.parametrize(("name", "offset", "magic"), SIGNATURES)
def test_a_file_system_is_only_wiped_if_that_is_confirmed(name, offset, magic, tmp_path):
    (disk,) = make_disks(tmp_path, 1)
    disk.write(offset, magic)
    asked = []
    with pytest.raises(lvm.LVMError, match=f"Aborted wiping of {name}"):
        lvm.create_pv(str(disk), confirm=asked.append)
    assert asked == [f"WARNING: {name} signature detected on {disk} at offset {offset}. Wipe it?"]
    assert disk.read(offset, len(magic)) == magic
    lvm.create_pv(str(disk))  # who is not asked has said yes
    assert disk.read(offset, len(magic)) != magic


@pytest.mark.parametrize("kind", ["GPT", "MBR"])
def test_a_device_with_partitions_is_refused(kind, tmp_path):
    (disk,) = make_disks(tmp_path, 1)
    if kind == "GPT":
        disk.write(512, b"EFI PART")
    else:
        disk.write(446, struct.pack("<B3xB3xII", 0, 0x83, 2048, 4096))
        disk.write(510, b"\x55\xaa")
    with pytest.raises(lvm.InUse, match="device is partitioned"):
        lvm.create_pv(str(disk))


@pytest.mark.parametrize(
    ("offset", "data"),
    [
        (3, b"NTFS    "),
        (3, b"EXFAT   "),
        (54, b"FAT16"),
        (82, b"FAT32"),
        (446, struct.pack("<B3xB3xII", 0x7F, 0x83, 2048, 4096)),
    ],
)
def test_a_boot_sector_is_no_partition_table(offset, data, tmp_path):
    """Its end is the same, and where a table has its entries there may be anything."""
    (disk,) = make_disks(tmp_path, 1)
    disk.write(462, struct.pack("<B3xB3xII", 0, 0x83, 2048, 4096))
    disk.write(510, b"\x55\xaa")
    disk.write(offset, data)
    lvm.create_pv(str(disk))
    assert disk.read(SECTOR, 8) == b"LABELONE"


# VGs.


def test_a_new_vg_is_what_vgcreate_makes(tmp_path):
    disks = make_disks(tmp_path)
    with make_vg(disks) as vg:
        assert vg.metadata.seqno == 1
        assert [pv.pe_count for pv in vg.pvs] == [15, 15]
    for disk in disks:
        assert disk.text() == disks[0].text()
        assert disk.slots() == [(512, len(disk.text()), support.crc(disk.text()), 0), (0, 0, 0, 0)]
        assert disk.read(SECTOR + 136, 8) == struct.pack("<II", 2, 1)
    text = disks[0].text().decode()
    real = next(support.ring_texts("b_striped_pv0")).decode()
    assert shape(text) == shape(real)
    assert f'description = "Write from vgcreate vg {disks[0]} {disks[1]}."' in text


def shape(text: str) -> str:
    """Return a text without its names, ids and times."""
    text = re.sub(r'"[^"]*"', '""', text)
    text = re.sub(r"#.*", "#", text)
    return re.sub(r"creation_time = \d+", "", text).split(" ", 1)[1]


@needs_pvck
def test_pvck_finds_every_generation(tmp_path):
    disks = make_disks(tmp_path)
    with make_vg(disks) as vg:
        for number in range(5):
            vg.create_lv(f"lv{number}", extents=1)
    for disk in disks:
        found = re.findall(r"seqno (\d+)", pvck("metadata_search", disk))
        assert list(map(int, found)) == [1, 2, 3, 4, 5, 6]
        assert "vgname vg seqno 6" in pvck("headers", disk)
        assert disk.text().decode().rstrip("\0") in pvck("metadata", disk)


@needs_pvck
def test_pvck_reads_wrapped_texts(tmp_path):
    (disk,) = make_disks(tmp_path, 1)
    wrapped = 0
    with make_vg([disk], data_alignment=4096, metadata_size=32768) as vg:
        vg.create_lv("lv", size=1)
        for number in range(1, 50):
            vg.change_lv("lv", add_tags=["t" * 9 * number])
            headers = pvck("headers", disk)
            assert f"vgname vg seqno {number + 2}" in headers
            offset, size, _, _ = disk.slots()[0]
            assert offset % SECTOR == 0
            if offset + size > 32768:
                wrapped += 1
                assert "commit wrapped" in headers
    assert wrapped > 1


def ring_model(old: tuple[int, int] | None, size: int) -> int:
    """Return where LVM puts the next text of an area of `size` bytes, by the rule of its source."""
    if old is None:
        return 512
    last = old[0] + old[1] - 1
    if last >= size:
        last = last - size + 512
    new = (last // 512 + 1) * 512
    return 512 if size - last < 512 or new > size - 512 else new


@pytest.mark.parametrize("area", [32768, 32768 + 4096])
def test_texts_follow_each_other_round_the_ring(area, tmp_path):
    (disk,) = make_disks(tmp_path, 1)
    with make_vg([disk], data_alignment=4096, metadata_size=area) as vg:
        vg.create_lv("lv", extents=1)
        for number in range(80):
            old = disk.slots()[0]
            ring_before = disk.read(MDA + 512, area - 512)
            tag = "x" * (7 * number % 200 + 1)
            vg.change_lv("lv", add_tags=[tag], remove_tags=vg.lv("lv").tags)
            new = disk.slots()[0]
            assert new[0] == ring_model(old[:2], area)
            ring = disk.read(MDA + 512, area - 512)
            at = [(new[0] - 512 + i) % len(ring) for i in range(-(-new[1] // 512) * 512)]
            assert not any(ring[i] for i in at[new[1] :])
            changed = {i for i in range(len(ring)) if ring[i] != ring_before[i]}
            assert changed <= set(at)


def fill(vg: lvm.VolumeGroup) -> None:
    while True:
        vg.create_lv(extents=1, tags=["x" * 100])


def test_a_text_too_long_for_the_ring_is_refused(tmp_path):
    (disk,) = make_disks(tmp_path, 1)
    with make_vg([disk], data_alignment=4096, metadata_size=32768, extent_size=8) as vg:
        assert vg.pvs[0].mdas[0].max_text == (32768 - 512) // 2 - 512
        with pytest.raises(lvm.NoSpaceError) as caught:
            fill(vg)
        number = len(vg.lvs())
        assert re.fullmatch(
            rf"VG vg {number + 2} metadata on {disk} \(\d+ bytes\) exceeds maximum metadata size"
            r" \(15616 bytes\)",
            caught.value.strerror,
        )
        assert number > 30
        assert vg.metadata.seqno == number + 1
        vg.remove_lv("lvol0")
    assert disk.slots()[1] == (0, 0, 0, 0)


def test_a_text_is_never_written_over_the_committed_one(tmp_path):
    """One longer than LVM writes, by another program: the next does not fit beside it."""
    (disk,) = make_disks(tmp_path, 1)
    with make_vg([disk], data_alignment=4096, metadata_size=32768, extent_size=8):
        pass
    size = 32768
    text = disk.text(size=size).rstrip(b"\0") + b"# " + b"x" * 31000 + b"\n"
    disk.set_text(text, size=size)
    with lvm.VolumeGroup.open([disk]) as vg:
        with pytest.raises(lvm.NoSpaceError, match="does not fit beside the committed one"):
            vg.create_lv("lv", extents=1)
        assert vg.metadata.seqno == 1
    assert disk.text(size=size) == text + b"\0"
    with lvm.VolumeGroup.open([disk]) as vg:
        assert vg.lvs() == []


@pytest.fixture
def area(tmp_path):
    """An area of 64 sectors, empty, and four sectors behind it where the device ends."""
    disk = Disk(tmp_path / "disk.img", MDA + 68 * SECTOR)
    with cow.Mapper() as dm:
        made = MetadataArea(dm.use(str(disk)), "disk", MDA, 64 * SECTOR, 1)
        made.initialize()
        yield made


def committed(area: MetadataArea, text: bytes) -> None:
    area.write_text(text, "VG vg 1")
    area.precommit()
    area.commit()


def test_an_area_that_was_bad_keeps_its_new_text_while_the_next_is_written(area):
    area.device.pwrite(b"x", MDA + 100)
    area.read()
    assert area.bad
    committed(area, b"one\0")
    area.write_text(b"two\0", "VG vg 2")
    area.precommit()
    area.read()
    assert (area.read_text(), bool(area.bad)) == (b"one", False)


@pytest.mark.parametrize(
    ("slot", "size", "text"),
    [
        ((100, 10), 64, "metadata text offset 100 is outside the area on disk at 4096"),
        ((64 * SECTOR, 10), 64, "metadata text offset 32768 is outside the area"),
        ((512, 63 * SECTOR + 1), 64, "metadata text size 32257 is larger than the area on disk"),
        ((512, 0), 64, "metadata text size 0 is larger"),
        ((68 * SECTOR - 5, 10), 80, "Failed to read metadata text on disk at offset 38907"),
        ((70 * SECTOR, 10), 80, "Failed to read metadata text on disk at offset 39936"),
    ],
)
def test_a_text_that_cannot_be_where_its_slot_says_is_told(area, slot, size, text):
    header = mda_header((*slot, 0, 0), start=MDA, size=size * SECTOR)
    area.device.pwrite(header, MDA)
    area.read()
    with pytest.raises(lvm.MetadataError, match=text):
        area.read_text()


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"name": "a/b"}, lvm.RequestError, 'New volume group name "a/b" is invalid.'),
        ({"name": "-x"}, lvm.RequestError, 'New volume group name "-x" is invalid.'),
        ({"name": "."}, lvm.RequestError, 'New volume group name "." is invalid.'),
        ({"name": "x" * 128}, lvm.RequestError, "is invalid."),
        ({"name": "contents"}, lvm.RequestError, 'New volume group name "contents" is invalid.'),
        ({"extent_size": 0}, lvm.RequestError, "Physical extent size may not be zero"),
        ({"extent_size": 2**32}, lvm.RequestError, "4294967296 sectors is out of range."),
        ({"extent_size": 6}, lvm.LVMError, "must be a multiple of 128.00 KiB when not a power"),
        ({"tags": ["a@b"]}, lvm.RequestError, "Invalid tag a@b."),
        ({"policy": "any"}, lvm.RequestError, "Unrecognised allocation policy any"),
    ],
)
def test_a_vg_that_cannot_be_is_refused_and_nothing_written(arguments, error, text, tmp_path):
    (disk,) = make_disks(tmp_path, 1)
    with pytest.raises(error, match=re.escape(text)):
        lvm.create_vg(arguments.pop("name", "vg"), [str(disk)], **arguments)
    assert not any(disk.read(0, 2 * MIB))


def test_a_vg_has_a_pv(tmp_path):
    with pytest.raises(lvm.RequestError, match="Please enter physical volume paths"):
        lvm.create_vg("vg", [])


def test_a_copy_of_a_pv_is_not_taken(tmp_path):
    (disk,) = make_disks(tmp_path, 1)
    lvm.create_pv(str(disk))
    shutil.copy(disk.path, tmp_path / "copy.img")
    paths = [str(disk), str(tmp_path / "copy.img")]
    before = [Disk(Path(path)).metadata() for path in paths]
    with pytest.raises(lvm.InUse, match=r"Cannot use device .* with duplicates\."):
        lvm.create_vg("vg", paths)
    assert [Disk(Path(path)).metadata() for path in paths] == before


def test_a_vg_of_that_name_may_be_there_already(tmp_path):
    (used,) = sample("a_linear", tmp_path)
    (free,) = make_disks(tmp_path, 1)
    with pytest.raises(lvm.AlreadyExists, match="A volume group called vga already exists"):
        lvm.create_vg("vga", [str(free)], others=[str(used)])
    with pytest.raises(lvm.InUse, match="is already in volume group 'vga'"):
        lvm.create_vg("new", [str(free), str(used)])
    assert not any(free.read(0, 2 * MIB))


def test_a_pv_whose_vg_is_not_to_be_seen_is_not_taken(tmp_path):
    (disk,) = make_disks(tmp_path, 1)
    disk.label("x" * 32, mdas=())
    before = disk.metadata()
    for refused in (
        lambda: lvm.create_vg("vg", [str(disk)]),
        lambda: lvm.create_pv(str(disk)),
        lambda: lvm.remove_pv(str(disk)),
    ):
        with pytest.raises(lvm.InUse, match="is used by a VG but its metadata is missing"):
            refused()
    assert disk.metadata() == before


def test_a_vg_may_have_extents_of_384_kib(tmp_path):
    with make_vg(make_disks(tmp_path, 1), extent_size=768) as vg:
        assert vg.pvs[0].pe_count == 63 * 1024 // 384


def test_a_vg_grows_by_pvs(tmp_path):
    disks = make_disks(tmp_path, 3)
    with make_vg(disks[:1]) as vg:
        lvm_id = vg.id
        vg.extend([str(disk) for disk in disks[1:]], metadata_copies=2)
        assert vg.said == [
            f'Physical volume "{disks[1]}" successfully created.',
            f'Physical volume "{disks[2]}" successfully created.',
            'Volume group "vg" successfully extended',
        ]
        with pytest.raises(lvm.InUse, match="is already in volume group 'vg'"):
            vg.extend([str(disks[1])])
        vg.create_lv("all", extents=vg.metadata.free_extents)
    with lvm.VolumeGroup.open(reversed(disks), readonly=True) as vg:
        assert vg.id == lvm_id
        assert [pv.path for pv in vg.pvs] == [str(disk) for disk in disks]
        assert [pv.pe_count for pv in vg.pvs] == [15, 15, 15]
        assert vg.metadata.free_extents == 0
    assert disks[1].text(63 * MIB, MIB) == disks[0].text()


def test_a_pv_that_was_taken_out_is_an_orphan_and_the_rest_has_the_newest_text(tmp_path):
    paths = [str(disk) for disk in make_disks(tmp_path, 2)]
    with lvm.create_vg("vg", paths) as vg:
        vg.create_lv("one", extents=2)
        vg.reduce(paths[1])
        assert [pv.path for pv in vg.pvs] == paths[:1]
        with pytest.raises(lvm.LVMError, match="still in use"):
            vg.reduce(paths[0])
    with lvm.scan(paths, readonly=True) as scan:
        assert scan.warnings == []
        assert [pv.vg_name for pv in scan.pvs] == ["vg", ""]


def test_missing_pvs_are_taken_out_where_nothing_lies_on_them(tmp_path):
    paths = [str(disk) for disk in make_disks(tmp_path, 3)]
    with lvm.create_vg("vg", paths) as vg:
        vg.create_lv("one", extents=2)
    with lvm.VolumeGroup.open(paths[:2]) as vg:
        vg.remove_missing()
        assert [pv.path for pv in vg.pvs] == paths[:2]
        assert vg.readonly_reason is None
        vg.create_lv("two", extents=1)
    with lvm.VolumeGroup.open(paths[1:2]) as vg:
        before = vg.metadata.seqno
        with pytest.raises(lvm.LVMError, match="There are still partial LVs"):
            vg.remove_missing()
        assert vg.metadata.seqno == before
        assert [pv.missing for pv in vg.pvs] == [True, False]


def test_an_exported_vg_is_left_alone_until_it_is_imported(tmp_path):
    (path,) = map(str, make_disks(tmp_path, 1))
    with lvm.create_vg("vg", [path]) as vg:
        vg.create_lv("one", extents=1)
        vg.activate()
        with pytest.raises(lvm.LVMError, match="has active logical volumes"):
            vg.export_vg()
        vg.deactivate()
        vg.export_vg()
        assert vg.metadata.status == ["EXPORTED", "RESIZEABLE", "READ", "WRITE"]
        assert [pv.status for pv in vg.pvs] == [["ALLOCATABLE", "EXPORTED"]]
        for change in (vg.activate, vg.export_vg, lambda: vg.remove_lv("one")):
            with pytest.raises(lvm.LVMError, match="Volume group vg is exported"):
                change()
    with lvm.VolumeGroup.open([path], readonly=True) as vg:
        vg.activate()
        assert vg.device("one").pread(512, 0) == bytes(512)
    with lvm.VolumeGroup.open([path]) as vg:
        vg.import_vg()
        assert vg.metadata.status == ["RESIZEABLE", "READ", "WRITE"]
        vg.activate()


def test_a_vg_that_another_exported_is_not_activated_in_another_mapper(tmp_path):
    (path,) = map(str, make_disks(tmp_path, 1))
    with cow.Mapper() as dm, lvm.create_vg("vg", [path]) as vg:
        vg.create_lv("one", extents=1)
        with lvm.VolumeGroup.open([path], mapper=vg.mapper) as other:
            other.export_vg()
        with pytest.raises(lvm.LVMError, match="Volume group vg is exported"):
            vg.activate(dm)
        assert dm.names() == []


def test_a_vg_that_is_not_resizeable_does_not_grow(tmp_path):
    disks = make_disks(tmp_path)
    with make_vg(disks[:1]) as vg:
        vg.change_vg(resizeable=False)
        with pytest.raises(lvm.VGNotWritable, match="Volume group vg is not resizeable"):
            vg.extend([str(disks[1])])
        vg.create_lv("lv", extents=1)


def test_a_removed_vg_leaves_orphans(tmp_path):
    disks = make_disks(tmp_path)
    with make_vg(disks) as vg:
        vg.create_lv("lv", extents=2)
        vg.remove()
        assert vg.said[-2:] == [
            'Logical volume "lv" successfully removed.',
            'Volume group "vg" successfully removed',
        ]
    for disk in disks:
        assert disk.slots() == [(0, 0, 0, 0), (0, 0, 0, 0)]
        assert disk.read(SECTOR + 136, 8) == struct.pack("<II", 2, 0)
    with lvm.scan(disks) as found:
        assert (found.vgs, found.warnings) == ([], [])
        assert len(found.pvs) == 2
    with lvm.create_vg("again", [str(disk) for disk in disks]) as vg:
        assert vg.metadata.seqno == 1


def test_a_pv_grows_with_its_image_while_its_lvs_are_used(tmp_path):
    (disk,) = make_disks(tmp_path, 1)
    with make_vg([disk]) as vg:
        vg.create_lv("lv", extents=15)
        vg.activate()
        device = vg.device("lv")
        device.pwrite(b"a" * MIB, 0)
        os.truncate(disk.path, 128 * MIB)
        with pytest.raises(lvm.NoSpaceError):
            vg.extend_lv("lv", extents=31)
        vg.resize_pv(str(disk))
        assert vg.said[-1] == f'Physical volume "{disk}" changed'
        vg.extend_lv("lv", extents=31)
        device.pwrite(b"z" * MIB, device.size - MIB)
        assert device.pread(MIB, 0) == b"a" * MIB
    assert disk.read(MIB, MIB) == b"a" * MIB
    assert disk.read(MIB + 31 * 4 * MIB - MIB, MIB) == b"z" * MIB


def test_a_pv_becomes_smaller_and_its_size_is_written_as_lvm_does_it(tmp_path):
    """LVM 2.03.16 writes dev_size = 86016 when a PV is resized to 43 MiB, 88064 sectors."""
    (disk,) = make_disks(tmp_path, 1)
    with make_vg([disk]) as vg:
        vg.resize_pv(str(disk), size=43 * MIB)
        assert (vg.pvs[0].pe_start, vg.pvs[0].pe_count, vg.pvs[0].dev_size) == (2048, 10, 86016)
        vg.resize_pv(str(disk), size=41 * MIB)
        assert vg.problems() == []
        vg.create_lv("lv", extents=10)
        with pytest.raises(lvm.InUse, match="cannot resize to 9 extents as 10 are allocated"):
            vg.resize_pv(str(disk), size=40 * MIB)
        assert (vg.metadata.seqno, vg.pvs[0].pe_count) == (4, 10)


def test_more_extents_than_a_pv_says_it_has_room_for_are_a_problem(tmp_path):
    with make_vg(make_disks(tmp_path, 1)) as vg:
        vg.pvs[0].dev_size = 15 * vg.metadata.extent_size - 1
        (problem,) = vg.problems()
        assert problem.endswith("15 extents do not fit on 122879 sectors.")


WRONG_SIZES = {
    1 * MIB: "Size must exceed minimum of 4096 sectors on PV",
    4 * MIB: "Size must exceed physical extent start of 16384 sectors on PV",
    8 * MIB: "Size must ",
    64 * MIB + 1: "67108865 bytes are more than the device has",
}


@pytest.mark.parametrize("used", [False, True], ids=["orphan", "of a VG"])
@pytest.mark.parametrize("size", WRONG_SIZES)
def test_a_pv_does_not_get_a_size_it_cannot_have(size, used, tmp_path):
    (disk,) = make_disks(tmp_path, 1)
    lvm.create_pv(str(disk), data_alignment=8 * MIB)
    if used:
        lvm.create_vg("vg", [str(disk)]).close()
    before = disk.path.read_bytes()
    with pytest.raises(lvm.LVMError, match=WRONG_SIZES[size]):
        resize(str(disk), size, used=used)
    assert disk.path.read_bytes() == before


def resize(path: str, size: int, *, used: bool) -> None:
    """Resize a PV of a VG, or one that no VG has."""
    if not used:
        lvm.resize_pv(path, size=size)
        return
    with lvm.VolumeGroup.open([path]) as vg:
        vg.resize_pv(path, size=size)


@pytest.mark.parametrize("used", [False, True], ids=["orphan", "of a VG"])
def test_a_second_metadata_area_is_not_moved(used, tmp_path):
    (disk,) = make_disks(tmp_path, 1)
    lvm.create_pv(str(disk), metadata_copies=2)
    if used:
        lvm.create_vg("vg", [str(disk)]).close()
    before = disk.path.read_bytes()
    with pytest.raises(lvm.LVMError, match="its second metadata area, at the end, cannot be moved"):
        resize(str(disk), 40 * MIB, used=used)
    assert disk.path.read_bytes() == before


def test_only_a_pv_is_resized_and_one_of_a_vg_by_its_vg(tmp_path):
    disks = make_disks(tmp_path)
    with pytest.raises(lvm.PVNotFound, match="Failed to find physical volume"):
        lvm.resize_pv(str(disks[0]))
    vg = make_vg(disks[:1])
    with vg, pytest.raises(lvm.PVNotFound, match="Failed to find physical volume"):
        vg.resize_pv(str(disks[1]))
    with pytest.raises(lvm.InUse, match="physical volume not resized"):
        lvm.resize_pv(str(disks[0]))


def test_a_vg_is_renamed(tmp_path):
    disks = sample("e_snapshots", tmp_path)
    with lvm.VolumeGroup.open(disks) as vg:
        with pytest.raises(lvm.RequestError, match="must differ"):
            vg.rename("vge")
        vg.rename("new-name")
    with lvm.VolumeGroup.open(disks, "new-name", readonly=True) as vg:
        assert vg.lv("snapshot0").segments[0].origin is vg.lv("org")


def test_a_vg_does_not_get_the_name_of_another(tmp_path):
    disks = [*sample("e_snapshots", tmp_path), *sample("a_linear", tmp_path)]
    with lvm.VolumeGroup.open(disks, "vge") as vg:
        with pytest.raises(lvm.AlreadyExists, match='New VG name "vga" already exists'):
            vg.rename("vga")
        assert vg.name == "vge"


def test_a_pv_that_is_not_in_the_vg_is_not_taken_out(tmp_path):
    with make_vg(make_disks(tmp_path, 1)) as vg:
        with pytest.raises(lvm.PVNotFound, match='Failed to find physical volume "/nosuch"'):
            vg.reduce("/nosuch")
        assert vg.metadata.seqno == 1


def test_a_vg_is_not_removed_while_hidden_lvs_are_left(tmp_path):
    with make_vg(make_disks(tmp_path)) as vg:
        vg.create_lv("plain", extents=1)
        vg.create_lv("hidden", extents=1)
        with vg.change("hide") as new:
            new.lv("hidden").set_status("VISIBLE", False)
        with pytest.raises(lvm.LVMError, match=r"still contains 1 logical volume\(s\)"):
            vg.remove()
        assert [lv.name for lv in vg.metadata.lvs] == ["hidden"]


def test_tags_and_limits_of_a_vg(tmp_path):
    with make_vg(make_disks(tmp_path, 1), tags=["a", "b", "a"], max_lv=1) as vg:
        vg.change_vg(add_tags=["c"], remove_tags=["a", "z"], flags={"NOAUTOACTIVATE": True})
        assert (vg.metadata.tags, vg.metadata.flags) == (["b", "c"], ["NOAUTOACTIVATE"])
        vg.create_lv("one", extents=1)
        with pytest.raises(lvm.LVMError, match="Maximum number of logical volumes \\(1\\) reached"):
            vg.create_lv("two", extents=1)
        vg.change_vg(max_lv=0)
        vg.create_lv("two", extents=1)


# The protocol.

PV_SECTORS = 4096


class Recorded:
    """Two PVs on one disk, recorded write by write."""

    def __init__(self, folder: Path, dm: cow.Mapper) -> None:
        self.dm = dm
        self.path, self.log = folder / "disk.img", folder / "disk.log"
        for path, size in ((self.path, 2 * PV_SECTORS * SECTOR), (self.log, 16 * MIB)):
            with path.open("wb") as file:
                file.truncate(size)
        self.names = ["pv0", "pv1"]
        dm.create("disk", f"0 {2 * PV_SECTORS} linear {self.path} 0")
        for number, name in enumerate(self.names):
            dm.create(name, f"0 {PV_SECTORS} linear disk {number * PV_SECTORS}")

    def record(self, above: str = "linear") -> None:
        """Begin; `above` is the type of what stands between the record and the PVs."""
        self.dm.create("record", f"0 {2 * PV_SECTORS} log-writes {self.path} {self.log}")
        self.dm.load("disk", f"0 {2 * PV_SECTORS} {above} record 0")
        self.dm.suspend("disk")
        self.dm.resume("disk")

    def stop(self) -> list[Entry]:
        self.dm.load("disk", f"0 {2 * PV_SECTORS} linear {self.path} 0")
        self.dm.suspend("disk")
        self.dm.resume("disk")
        self.dm.remove("record")
        return read_log(self.log)


def small_vg(names: list[str], dm: cow.Mapper, **options) -> lvm.VolumeGroup:
    return lvm.create_vg(
        "vg", names, mapper=dm, data_alignment=4096, metadata_size=32768, extent_size=8, **options
    )


def protocol(entries: list[Entry]) -> list[str]:
    """Return what was written to the metadata areas, and where; of a header both slots.

    Slot 0 always is what it was, or what slot 1 was.
    """
    steps = []
    known: dict[int, set[tuple[int, ...]]] = {}
    for entry in entries:
        pv, sector = divmod(entry.sector, PV_SECTORS)
        if entry.flags & FLUSH:
            steps.append(f"flush {pv}")
        elif sector == 8 and entry.count:
            slots = [struct.unpack_from("<QQII", entry.data, at) for at in (40, 64)]
            steps.append(f"header {pv} {' '.join('-' if s[0] == 0 else str(s[0]) for s in slots)}")
            assert entry.data[:4] == struct.pack("<I", support.crc(entry.data[4:]))
            assert slots[0] in known.setdefault(pv, {slots[0]})
            assert slots[1][0] or not any(slots[1])
            known[pv].add(slots[1])
        elif entry.count:
            steps.append(f"text {pv} {(sector - 8) * SECTOR}")
    return steps


def test_the_steps_of_a_change_and_the_barriers_between_them(tmp_path):
    with cow.Mapper() as dm:
        recorded = Recorded(tmp_path, dm)
        with small_vg(recorded.names, dm) as vg:
            recorded.record()
            vg.create_lv("lv", extents=3)
            entries = recorded.stop()
    assert protocol(entries) == [
        "text 0 1536",
        "text 1 1536",
        "flush 0",
        "flush 1",
        "header 0 512 1536",
        "header 1 512 1536",
        "flush 0",
        "flush 1",
        "header 0 1536 -",
        "flush 0",
        "header 1 1536 -",
        "flush 1",
    ]


def test_a_commit_that_cannot_be_flushed_is_taken_back_with_a_barrier_behind(tmp_path, failing):
    """What was written and not flushed may be on the disk, and is what is then in force."""
    with cow.Mapper() as dm:
        recorded = Recorded(tmp_path, dm)
        with small_vg(recorded.names[:1], dm) as vg:
            recorded.record("failing")
            Failing.fault = Fault("flush", 3)
            with pytest.raises(lvm.LVMError, match="Failed to write VG vg"):
                vg.create_lv("lv", extents=3)
            assert Failing.fault.fired
            assert vg.lvs() == []
            entries = recorded.stop()
    assert protocol(entries) == [
        "text 0 1536",
        "flush 0",
        "header 0 512 1536",
        "flush 0",
        "header 0 1536 -",
        "header 0 512 -",
        "flush 0",
    ]


class Work:
    """Active work that writes down what it is told, and fails where it is to."""

    def __init__(self, fail: str = "", then=lambda: None) -> None:
        self.calls: list[str] = []
        self.fail = fail
        self.then = then

    def _told(self, name, old, new):
        self.calls.append(f"{name} {old.seqno} {new.seqno}")
        if name == self.fail:
            self.then()
            raise OSError(5, "told to fail")
        if self.fail == f"{name}, quietly":
            self.then()

    def preload(self, old, new):
        self._told("preload", old, new)

    def suspend(self, old, new):
        self._told("suspend", old, new)

    def resume(self, old, new):
        self._told("resume", old, new)

    def revert(self, old, new):
        self._told("revert", old, new)


def test_active_work_is_done_between_precommit_and_commit(tmp_path):
    disks = make_disks(tmp_path)
    with make_vg(disks) as vg:
        seen = []
        vg.work = Work("suspend, quietly", lambda: seen.append([disk.slots() for disk in disks]))
        vg.create_lv("lv", extents=1)
        assert vg.work.calls == ["preload 1 2", "suspend 1 2", "resume 1 2"]
        for slots in seen[0]:
            assert slots[0][0] == 512
            assert slots[1][0] > 512
        assert [disk.slots()[1] for disk in disks] == [(0, 0, 0, 0)] * 2


@pytest.mark.parametrize("fail", ["preload", "suspend"])
def test_a_change_is_reverted_where_active_work_fails(fail, tmp_path):
    disks = make_disks(tmp_path)
    with make_vg(disks) as vg:
        before = [disk.slots() for disk in disks]
        vg.work = Work(fail)
        with pytest.raises(lvm.LVMError, match="told to fail"):
            vg.create_lv("lv", extents=1)
        assert vg.work.calls[-1] == "revert 1 2"
        assert [disk.slots() for disk in disks] == before
        assert (vg.metadata.seqno, vg.lvs()) == (1, [])
        vg.work = None
        vg.create_lv("lv", extents=1)
        assert vg.metadata.seqno == 2


def test_a_change_is_in_force_when_the_devices_are_resumed(tmp_path):
    with make_vg(make_disks(tmp_path)) as vg:
        seen = []
        vg.work = Work("resume, quietly", lambda: seen.append(vg.metadata.seqno))
        vg.create_lv("lv", extents=1)
        assert seen == [2]


def test_a_change_that_failed_to_resume_is_made_all_the_same(tmp_path):
    disks = make_disks(tmp_path)
    with make_vg(disks) as vg:
        vg.work = Work("resume")
        with pytest.raises(OSError, match="told to fail"):
            vg.create_lv("lv", extents=1)
        assert vg.metadata.seqno == 2
        assert vg.lv("lv").extent_count == 1


def test_nothing_is_changed_if_the_block_raises(tmp_path):
    disks = make_disks(tmp_path)
    with make_vg(disks) as vg:
        before = [disk.metadata() for disk in disks]
        with pytest.raises(ZeroDivisionError), vg.change("nothing") as new:
            new.seqno //= 0
        assert vg.metadata.seqno == 1
        assert [disk.metadata() for disk in disks] == before


def test_a_change_that_is_interrupted_after_the_first_commit_is_made(tmp_path, monkeypatch):
    disks = make_disks(tmp_path)
    real, commits = MetadataArea.commit, []

    def commit(mda):
        commits.append(mda)
        if len(commits) == 2:
            raise KeyboardInterrupt
        real(mda)

    with make_vg(disks) as vg:
        vg.work = Work()
        monkeypatch.setattr(MetadataArea, "commit", commit)
        with pytest.raises(KeyboardInterrupt):
            vg.create_lv("lv", extents=1)
        monkeypatch.undo()
        assert vg.work.calls == ["preload 1 2", "suspend 1 2", "resume 1 2"]
        assert (vg.metadata.seqno, [lv.name for lv in vg.lvs()]) == (2, ["lv"])
    with lvm.VolumeGroup.open(disks) as vg:
        assert (vg.metadata.seqno, [lv.name for lv in vg.lvs()]) == (2, ["lv"])


@pytest.fixture
def two_pvs(tmp_path):
    """Two PVs as dm devices, whose tables can be changed under the VG."""
    with cow.Mapper() as dm:
        disks = make_disks(tmp_path)
        for number, disk in enumerate(disks):
            dm.create(f"pv{number}", f"0 131072 linear {disk} 0")
        with lvm.create_vg("vg", ["pv0", "pv1"], mapper=dm) as vg:
            vg.said = []
            vg.report = vg.said.append
            yield dm, disks, vg


def break_device(dm: cow.Mapper, name: str) -> None:
    dm.load(name, "0 131072 error")
    dm.suspend(name)
    dm.resume(name)


def mend_device(dm: cow.Mapper, name: str, disk: Disk) -> None:
    dm.load(name, f"0 131072 linear {disk} 0")
    dm.suspend(name)
    dm.resume(name)


@pytest.mark.parametrize("broken", ["pv0", "pv1"])
def test_a_change_is_refused_where_an_area_cannot_be_written(broken, two_pvs):
    dm, disks, vg = two_pvs
    dm.load(broken, f"0 131072 linear {disks[int(broken[2])]} 0", readonly=True)
    dm.suspend(broken)
    dm.resume(broken)
    before = [disk.slots() for disk in disks]
    with pytest.raises(lvm.LVMError, match="Failed to write VG vg"):
        vg.create_lv("lv", extents=1)
    assert [disk.slots() for disk in disks] == before
    assert vg.lvs() == []


@pytest.mark.parametrize("broken", ["pv0", "pv1"])
def test_a_commit_counts_if_one_area_has_it(broken, two_pvs):
    dm, disks, vg = two_pvs
    vg.work = Work("suspend, quietly", lambda: break_device(dm, broken))
    vg.create_lv("lv", extents=1)
    assert vg.work.calls[-1] == "resume 1 2"
    assert vg.metadata.seqno == 2
    assert vg.said[0].startswith(f"WARNING: Failed to commit VG vg on {broken}: ")
    mend_device(dm, broken, disks[int(broken[2])])
    vg.work = None
    vg.refresh()
    assert vg.metadata.seqno == 2
    assert "WARNING: Inconsistent metadata found for VG vg." in vg.warnings
    vg.create_lv("other", extents=1)
    assert f"WARNING: updating old metadata to 3 on {broken} for VG vg." in vg.said
    assert disks[0].text() == disks[1].text()
    assert vg.warnings == []


def test_a_commit_that_no_area_has_is_no_commit(two_pvs):
    dm, disks, vg = two_pvs

    def break_all() -> None:
        break_device(dm, "pv0")
        break_device(dm, "pv1")

    vg.work = Work("suspend, quietly", break_all)
    with pytest.raises(lvm.LVMError):
        vg.create_lv("lv", extents=1)
    assert vg.work.calls[-1] == "revert 1 2"
    for number, disk in enumerate(disks):
        mend_device(dm, f"pv{number}", disk)
    vg.work = None
    vg.refresh()
    assert vg.metadata.seqno == 1
    vg.create_lv("lv", extents=1)
    assert [disk.slots()[1] for disk in disks] == [(0, 0, 0, 0)] * 2


def test_what_another_changed_is_read_before_a_change(tmp_path):
    disks = make_disks(tmp_path)
    with cow.Mapper() as dm:
        names = [str(disk) for disk in disks]
        first = lvm.create_vg("vg", names, mapper=dm)
        second = lvm.VolumeGroup.open(names, mapper=dm)
        first.create_lv("one", extents=1)
        second.create_lv("two", extents=1)
        assert [lv.name for lv in second.lvs()] == ["one", "two"]
        assert second.metadata.seqno == 3


def test_an_ignored_area_gets_no_text(tmp_path):
    disks = make_disks(tmp_path)
    lvm.create_pv(str(disks[0]), metadata_ignore=True)
    with make_vg(disks) as vg:
        vg.create_lv("lv", extents=1)
    assert disks[0].slots() == [(0, 0, 0, 1), (0, 0, 0, 0)]
    with lvm.VolumeGroup.open(disks) as vg:
        assert vg.lv("lv").extent_count == 1


def test_a_vg_without_any_area_cannot_be_made(tmp_path):
    with pytest.raises(lvm.MetadataError, match="no metadata area that can be written"):
        make_vg(make_disks(tmp_path), metadata_copies=0)


def test_what_is_not_known_is_written_again(tmp_path):
    (disk,) = sample("a_linear", tmp_path)
    disk.edit(
        ("seqno = 2\n", 'seqno = 2\nfuture = ["x", 1]\nfuture_section {\na = 1\n}\n'),
        ("pe_count = 15\n", "pe_count = 15\nfuture_pv = 1.5\n"),
        ("segment_count", 'future_lv = "y\\"\\\\z"\nsegment_count'),
        ("stripe_count", "future_segment = 7\nstripe_count"),
        ("version = 1", "version = 1\nfuture_header = 2"),
        ("flags = []", 'flags = ["FUTURE"]'),
    )
    with lvm.VolumeGroup.open([disk]) as vg:
        vg.create_lv("new", extents=1)
    text = disk.text().decode()
    for piece in (
        'future = ["x", 1]\n',
        "future_section {\na = 1\n}\n",
        "future_pv = 1.5\n",
        'future_lv = "y\\"\\\\z"\n',
        "future_segment = 7\n",
        "future_header = 2\n",
    ):
        assert text.count(piece) == 1
    assert text.count('flags = ["FUTURE"]') == 3


def test_raid_and_thin_are_kept_where_another_lv_is_changed(tmp_path):
    (disk,) = sample("f_thin", tmp_path)
    with lvm.VolumeGroup.open([disk]) as vg:
        vg.create_lv("new", extents=1)
        vg.remove_lv("new")
        after = vg.backup()
    real = support.backup_of("f_thin").replace("/dev/vdi", str(disk))
    assert after.partition("seqno = 12")[2] == real.partition("seqno = 10")[2]


# vgck --updatemetadata, vgcfgbackup and vgcfgrestore.


def test_a_stale_copy_is_updated_by_the_next_change(tmp_path):
    disks = sample("b_striped", tmp_path)
    disks[1].edit(("seqno = 3", "seqno = 2"))
    with lvm.VolumeGroup.open(disks) as vg:
        said = []
        vg.report = said.append
        vg.create_lv("new", extents=1)
    assert said[0] == f"WARNING: updating old metadata to 4 on {disks[1]} for VG vgb."
    assert disks[0].text() == disks[1].text()


@pytest.mark.parametrize("damage", ["text", "header", "magic"])
def test_a_damaged_area_is_left_alone_until_it_is_repaired(damage, tmp_path):
    disks = sample("b_striped", tmp_path)
    where = {"text": MDA + disks[0].slots()[0][0], "header": MDA + 200, "magic": MDA + 4}[damage]
    disks[0].flip(where)
    damaged = disks[0].read(MDA, SECTOR)
    with lvm.VolumeGroup.open(disks) as vg:
        said = []
        vg.report = said.append
        vg.create_lv("new", extents=1)
        assert disks[0].read(MDA, SECTOR) == damaged
        vg.update_metadata()
        assert vg.metadata.seqno == 5
    bits = {"text": "0x8", "header": "0x14", "magic": "0x34"}[damage]
    if damage == "magic":
        assert f"WARNING: not repairing bad metadata ({bits}) for mda1 on {disks[0]}" in said
        assert disks[0].read(MDA, SECTOR) == damaged
    else:
        assert f"WARNING: repairing bad metadata ({bits}) in mda1 at 4096 on {disks[0]}." in said
        assert disks[0].text() == disks[1].text()
        with lvm.VolumeGroup.open(disks) as vg:
            assert vg.warnings == []


def test_an_outdated_pv_becomes_an_orphan(tmp_path):
    disks = make_disks(tmp_path)
    with make_vg(disks) as vg:
        vg.create_lv("lv", extents=1)
        old = disks[1].read(0, 2 * MIB)
        with vg.change("vgreduce") as new:
            del new.pvs[1]
    disks[1].write(0, old)
    with lvm.VolumeGroup.open(disks) as vg:
        assert any(text.startswith("WARNING: outdated PV") for text in vg.warnings)
        vg.update_metadata()
    with lvm.scan(disks) as found:
        assert found.warnings == []
        assert [pv.vg_name for pv in found.pvs] == ["vg", ""]


def test_old_labels_are_updated_by_the_next_change(tmp_path):
    (disk,) = sample("a_linear", tmp_path)
    real = disk.read(SECTOR, SECTOR)
    disk.label(real[32:64].decode(), extension=b"")
    with lvm.VolumeGroup.open([disk]) as vg:
        said = []
        vg.report = said.append
        vg.create_lv("new", extents=1)
    assert said[0] == f"WARNING: updating PV header on {disk} for VG vga."
    assert disk.read(SECTOR, SECTOR) == real


def test_a_backup_is_restored(tmp_path):
    disks = make_disks(tmp_path)
    with make_vg(disks) as vg:
        vg.create_lv("lv", extents=3, tags=["t"])
        text = vg.backup()
        vg.remove_lv("lv")
        vg.create_lv("other", extents=9)
        vg.restore(text)
        assert vg.said[-1] == "Restored volume group vg."
        assert (vg.metadata.seqno, [lv.name for lv in vg.lvs()]) == (5, ["lv"])
        assert vg.lv("lv").tags == ["t"]
    with lvm.VolumeGroup.open(disks) as vg:
        assert [lv.name for lv in vg.lvs()] == ["lv"]


def test_a_backup_of_another_vg_is_not_restored(tmp_path):
    with make_vg(make_disks(tmp_path)) as vg:
        with pytest.raises(lvm.LVMError, match="Backup of volume group vga is not one of vg"):
            vg.restore(support.backup_of("a_linear"))
        with pytest.raises(lvm.LVMError, match="has another uuid"):
            vg.restore(support.backup_of("a_linear").replace("vga", "vg"))


def test_a_backup_that_is_no_vg_is_not_restored(tmp_path):
    disks = make_disks(tmp_path)
    with make_vg(disks) as vg:
        vg.create_lv("lv", extents=3)
        text = vg.backup().replace("start_extent = 0", "start_extent = 1")
        with pytest.raises(lvm.MetadataError, match="should begin at LE 0"):
            vg.restore(text)
        assert vg.metadata.seqno == 2
    with pytest.raises(lvm.MetadataError, match="should begin at LE 0"):
        lvm.restore_vg(text, [str(disk) for disk in disks])
    with lvm.VolumeGroup.open(disks) as vg:
        assert vg.metadata.seqno == 2


def test_a_vg_is_not_restored_over_another(tmp_path):
    disks = make_disks(tmp_path, 3)
    with make_vg(disks[:2]) as vg:
        first = vg.backup()
        vg.remove()
    with make_vg(disks[1:]):
        pass
    with pytest.raises(lvm.AlreadyExists, match="A volume group called vg already exists"):
        lvm.restore_vg(first, [str(disk) for disk in disks])
    with lvm.VolumeGroup.open(disks[1:]) as vg:
        vg.rename("other")
    with pytest.raises(lvm.InUse, match="is already in volume group 'other'"):
        lvm.restore_vg(first, [str(disk) for disk in disks])
    with lvm.VolumeGroup.open(disks, "other") as vg:
        assert vg.metadata.seqno == 2


def test_a_vg_is_restored_on_new_disks_from_its_backup_alone(tmp_path):
    text = support.backup_of("b_striped")
    disks = make_disks(tmp_path)
    for disk, uuid in zip(disks, re.findall(r'id = "(\S+)"\n\t\t\tdevice', text), strict=True):
        lvm.create_pv(str(disk), uuid=uuid, restore=text)
    lvm.restore_vg(text, [str(disk) for disk in disks])
    with lvm.VolumeGroup.open(disks, readonly=True) as vg:
        assert (vg.name, vg.metadata.seqno, vg.warnings) == ("vgb", 4, [])
        assert layout(vg, "str") == [(4, ("pv0", 0), ("pv1", 0))]


def test_a_vg_is_not_restored_without_all_its_pvs(tmp_path):
    text = support.backup_of("b_striped")
    disks = sample("b_striped", tmp_path)
    disks[1].write(0, bytes(2 * MIB))
    with pytest.raises(
        lvm.PVNotFound,
        match="Couldn't find device with uuid 465WgF-x13Z-K5Hu-DPnP-tFlN-hij0-2plaBt",
    ):
        lvm.restore_vg(text, [str(disk) for disk in disks])


def test_a_lost_label_comes_back_with_the_layout_it_had(tmp_path):
    disks = sample("b_striped", tmp_path)
    real = disks[1].read(SECTOR, SECTOR)
    disks[1].write(SECTOR, bytes(SECTOR))
    text = support.backup_of("b_striped")
    with pytest.raises(lvm.PVNotFound, match="Can't find uuid"):
        lvm.create_pv(str(disks[1]), uuid="x" * 32, restore=text)
    lvm.create_pv(str(disks[1]), uuid="465WgF-x13Z-K5Hu-DPnP-tFlN-hij0-2plaBt", restore=text)
    lvm.restore_vg(text, [str(disk) for disk in disks])
    assert disks[1].read(SECTOR, SECTOR) == real


@pytest.mark.parametrize(
    ("change", "options", "text"),
    [
        (("pe_start = 2048", "pe_start = 8"), {}, "no room for a metadata area before byte 4096"),
        (
            ("pe_count = 15", "pe_count = 16"),
            {"metadata_copies": 2, "size": 65 * MIB},
            "no room for a metadata area behind byte 68157440",
        ),
        (("pe_count = 15", "pe_count = 17"), {}, r"Physical extents \(<69\.00 MiB\) end beyond"),
        ((), {"uuid": None}, "--uuid is required with --restorefile"),
    ],
)
def test_a_layout_that_does_not_fit_does_not_come_back(tmp_path, change, options, text):
    (disk,) = make_disks(tmp_path, 1, 66 * MIB)
    backup = support.backup_of("b_striped")
    assert not change or change[0] in backup
    if change:
        backup = backup.replace(*change)
    uuid = {"uuid": "465WgF-x13Z-K5Hu-DPnP-tFlN-hij0-2plaBt"}
    with pytest.raises(lvm.LVMError, match=text):
        lvm.create_pv(str(disk), restore=backup, **{**uuid, **options})
    assert not any(disk.read(0, 2 * MIB))


def test_a_uuid_that_is_there_is_not_given_again(tmp_path):
    used, new = make_disks(tmp_path)
    pv_id = lvm.create_pv(str(used))
    with pytest.raises(lvm.AlreadyExists, match="already in use"):
        lvm.create_pv(str(new), uuid=pv_id, others=[str(used)])


def test_each_command_is_archived_and_backed_up(tmp_path):
    backups = Backups(tmp_path / "etc" / "backup", tmp_path / "etc" / "archive")
    with make_vg(make_disks(tmp_path)) as vg:
        vg.backups = backups
        vg.command = "first command"
        vg.create_lv("a", extents=1)
        vg.create_lv("b", extents=1)
        assert vg.metadata.header["description"] == "Write[2] from first command."
        assert vg.command == "first command"
        vg.command = "second command"
        vg.remove_lv("a")
        assert vg.metadata.header["description"] == "Write from second command."
        archived = sorted(path.name for path in backups.archive_dir.iterdir())
        assert [name[:9] for name in archived] == ["vg_00000-", "vg_00001-"]
        texts = [(backups.archive_dir / name).read_text() for name in archived]
        assert "seqno = 1\n" in texts[0]
        assert "description = \"Created *before* executing 'second command'\"" in texts[1]
        assert "seqno = 3\n" in texts[1]
        now = backups.backup_dir / "vg"
        assert "description = \"Created *after* executing 'second command'\"" in now.read_text()
        assert "seqno = 4\n" in now.read_text()
        assert now.stat().st_mode & 0o777 == 0o600
        vg.restore(texts[1])
        assert [lv.name for lv in vg.lvs()] == ["a", "b"]


def test_a_backup_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").touch()
    with make_vg(make_disks(tmp_path)) as vg:
        vg.backups = Backups(backup_dir=tmp_path / "file")
        vg.create_lv("a", extents=1)
        assert vg.said[0].startswith("WARNING: This metadata update is NOT backed up: ")
        vg.backups = Backups(archive_dir=tmp_path / "file")
        with pytest.raises(OSError, match="file"):
            vg.create_lv("b", extents=1)
        assert vg.metadata.seqno == 2


# LVs.


def test_lvs_are_made_grown_shrunk_renamed_and_removed(tmp_path):
    disks = make_disks(tmp_path)
    with make_vg(disks) as vg:
        vg.create_lv("a", size=5 * MIB)
        vg.create_lv("s", extents=3, stripes=2)
        vg.extend_lv("a", extents=4)
        vg.extend_lv("s", extents=5)
        vg.rename_lv("a", "b")
        vg.reduce_lv("s", extents=3)
        vg.create_lv("z", extents=100, type="zero")
        vg.remove_lv("s")
        assert vg.said == [
            "Rounding up size to full physical extent 8.00 MiB",
            'Logical volume "a" created.',
            "Using default stripesize 64.00 KiB.",
            "Rounding size 12.00 MiB (3 extents) up to stripe boundary size 16.00 MiB (4 extents).",
            'Logical volume "s" created.',
            "Size of logical volume vg/a changed from 8.00 MiB (2 extents) to 16.00 MiB"
            " (4 extents).",
            "Logical volume vg/a successfully resized.",
            "Using stripesize of last segment 64.00 KiB",
            "Rounding size (5 extents) up to stripe boundary size for segment (6 extents).",
            "Size of logical volume vg/s changed from 16.00 MiB (4 extents) to 24.00 MiB"
            " (6 extents).",
            "Logical volume vg/s successfully resized.",
            'Renamed "a" to "b" in volume group "vg"',
            "Rounding size (3 extents) up to stripe boundary size for segment (4 extents).",
            "Size of logical volume vg/s changed from 24.00 MiB (6 extents) to 16.00 MiB"
            " (4 extents).",
            "Logical volume vg/s successfully resized.",
            'Logical volume "z" created.',
            'Logical volume "s" successfully removed.',
        ]
    with lvm.VolumeGroup.open(disks) as vg:
        assert [lv.name for lv in vg.lvs()] == ["b", "z"]
        assert layout(vg, "b") == [(2, ("pv0", 0)), (2, ("pv0", 4))]
        assert vg.metadata.seqno == 9


def test_lvs_get_names_and_numbers_of_their_own(tmp_path):
    with make_vg(make_disks(tmp_path)) as vg:
        names = [vg.create_lv(extents=1).name for _ in range(3)]
        vg.remove_lv("lvol1")
        names.append(vg.create_lv(extents=1).name)
        vg.remove_lv("lvol3")
        names.append(vg.create_lv(extents=1).name)
        assert names == ["lvol0", "lvol1", "lvol2", "lvol3", "lvol3"]
        assert len({lv.id for lv in vg.lvs()}) == 3


def test_properties_of_an_lv(tmp_path):
    (disk,) = make_disks(tmp_path, 1)
    with make_vg([disk]) as vg:
        vg.create_lv("lv", extents=1, permission="r", tags=["a"], policy="contiguous")
        vg.change_lv("lv", permission="rw", add_tags=["b"], policy="cling", read_ahead=3)
        vg.change_lv("lv", flags={"ACTIVATION_SKIP": True}, read_ahead=-1, policy="inherit")
        lv = vg.lv("lv")
        assert lv.status == ["READ", "WRITE", "VISIBLE"]
        assert (lv.tags, lv.flags, lv.read_ahead) == (["a", "b"], ["ACTIVATION_SKIP"], -1)
        assert lv.allocation_policy is None
    assert "WARNING: Overriding readahead to 8 sectors, a multiple of 4K page size." in vg.said


REFUSED = [
    (lambda vg: vg.create_lv("a b", extents=1), 3, 'Logical volume name "a b" is invalid.'),
    (lambda vg: vg.create_lv("-x", extents=1), 3, 'Logical volume name "-x" is invalid.'),
    (lambda vg: vg.create_lv(".", extents=1), 3, 'Logical volume name "." is invalid.'),
    (lambda vg: vg.create_lv("x" * 128, extents=1), 3, "is invalid."),
    (lambda vg: vg.create_lv("x" * 125, extents=1), 3, "is too long"),
    (
        lambda vg: vg.create_lv("snapshot1", extents=1),
        3,
        'Names starting "snapshot" are reserved. Please choose a different LV name.',
    ),
    (
        lambda vg: vg.create_lv("x_mlog", extents=1),
        3,
        'Names including "_mlog" are reserved. Please choose a different LV name.',
    ),
    (
        lambda vg: vg.create_lv("lv", extents=1),
        5,
        'Logical Volume "lv" already exists in volume group "vg"',
    ),
    (lambda vg: vg.create_lv("n", extents=0), 3, "--extents may not be zero."),
    (lambda vg: vg.create_lv("n"), 3, "Please specify either size or extents"),
    (
        lambda vg: vg.create_lv("n", extents=100),
        5,
        'Volume group "vg" has insufficient free space (26 extents): 100 required.',
    ),
    (lambda vg: vg.create_lv("n", extents=1, stripes=0), 3, "--stripes may not be zero."),
    (
        lambda vg: vg.create_lv("n", extents=1, stripes=129),
        3,
        "Number of stripes (129) must be between 1 and 128.",
    ),
    (
        lambda vg: vg.create_lv("n", extents=3, stripes=3),
        5,
        "Number of stripes (3) must not exceed number of physical volumes (2)",
    ),
    (
        lambda vg: vg.create_lv("n", extents=2, stripes=2, stripe_size=6),
        3,
        "Invalid stripe size 3.00 KiB.",
    ),
    (lambda vg: vg.create_lv("n", extents=1, tags=["@"]), 3, "Invalid tag @."),
    (lambda vg: vg.create_lv("n", extents=1, permission="w"), 3, "Invalid permission w"),
    (lambda vg: vg.create_lv("n", extents=1, type="raid1"), 5, "type raid1 is not supported"),
    (
        lambda vg: vg.create_lv("n", extents=14, policy="contiguous"),
        5,
        "Insufficient suitable contiguous allocatable extents for logical volume n: 14 more"
        " required",
    ),
    (
        lambda vg: vg.create_lv("n", extents=14, ranges=[PVRange(vg.pvs[0])]),
        5,
        "Insufficient free space: 14 extents needed, but only 13 available",
    ),
    (lambda vg: vg.extend_lv("nosuch", extents=9), 5, 'Failed to find logical volume "vg/nosuch"'),
    (
        lambda vg: vg.extend_lv("lv", extents=4),
        5,
        "New size (4 extents) matches existing size (4 extents).",
    ),
    (
        lambda vg: vg.extend_lv("lv", extents=1),
        5,
        "New size given (1 extents) not larger than existing size (4 extents)",
    ),
    (
        lambda vg: vg.extend_lv("lv", extents=31),
        5,
        "Insufficient free space: 28 extents needed, but only 26 available",
    ),
    (lambda vg: vg.reduce_lv("lv", extents=0), 5, "Unable to reduce vg/lv below 1 extent."),
    (
        lambda vg: vg.reduce_lv("lv", extents=5),
        5,
        "New size given (5 extents) not less than existing size (4 extents)",
    ),
    (
        lambda vg: vg.reduce_lv("lv", extents=3),
        5,
        "New size (4 extents) matches existing size (4 extents)",
    ),
    (lambda vg: vg.remove_lv("nosuch"), 5, 'Failed to find logical volume "vg/nosuch"'),
    (
        lambda vg: vg.rename_lv("nosuch", "x"),
        5,
        'Existing logical volume "nosuch" not found in volume group "vg"',
    ),
    (lambda vg: vg.rename_lv("lv", "a b"), 3, 'New logical volume name "a b" is invalid'),
    (lambda vg: vg.rename_lv("lv", "lv"), 3, "Old and new logical volume names must differ"),
    (lambda vg: vg.rename_lv("lv", "pvmove0"), 3, 'Names starting "pvmove" are reserved.'),
    (
        lambda vg: vg.change_lv("lv", permission="rw"),
        5,
        "Logical volume vg/lv is already writable.",
    ),
    (lambda vg: vg.change_lv("lv", policy="x"), 3, "Unrecognised allocation policy x"),
    (lambda vg: vg.change_lv("lv", read_ahead=0), 5, "Read ahead is already auto for vg/lv."),
    (lambda vg: vg.change_lv("lv", add_tags=["a b"]), 3, "Invalid tag a b."),
]


@pytest.mark.parametrize(("request_", "code", "text"), REFUSED)
def test_a_request_is_refused_and_changes_nothing(request_, code, text, tmp_path):
    disks = make_disks(tmp_path)
    with make_vg(disks) as vg:
        vg.create_lv("lv", extents=4, stripes=2)
        before = [disk.metadata() for disk in disks]
        with pytest.raises(lvm.LVMError) as caught:
            request_(vg)
        assert text in caught.value.strerror
        assert caught.value.exit_code == code
        assert [disk.metadata() for disk in disks] == before
        assert vg.metadata.seqno == 2


@pytest.mark.parametrize("name", ["org", "snap1", "snapshot0"])
def test_an_lv_that_others_need_is_not_removed(name, tmp_path):
    with lvm.VolumeGroup.open(sample("e_snapshots", tmp_path)) as vg:
        with pytest.raises(lvm.LVMError), vg.change("lvremove") as new:
            remove_lv(new, new.lv(name))
        assert vg.metadata.seqno == 8


def test_hidden_lvs_follow_the_name_of_theirs(tmp_path):
    disks = sample("e3_sparse_vorigin", tmp_path)
    with lvm.VolumeGroup.open(disks) as vg:
        vg.rename_lv("sparse", "thick")
    with lvm.VolumeGroup.open(disks, readonly=True) as vg:
        assert [lv.name for lv in vg.metadata.lvs] == ["thick", "thick_vorigin", "snapshot0"]
        segment = vg.lv("snapshot0").segments[0]
        assert (segment.origin, segment.cow) == (vg.lv("thick_vorigin"), vg.lv("thick"))


def test_what_names_an_lv_in_a_thin_segment_is_renamed_too(tmp_path):
    disks = sample("f_thin", tmp_path)
    with lvm.VolumeGroup.open(disks) as vg:
        vg.rename_lv("pool", "p")
        vg.rename_lv("th1", "t")
        with pytest.raises(lvm.LVMError, match='Cannot rename internal LV "p_tdata"'):
            vg.rename_lv("p_tdata", "x")
    text = disks[0].text().decode()
    assert 'metadata = "p_tmeta"\npool = "p_tdata"\n' in text
    assert 'thin_pool = "p"' in text
    assert text.count('origin = "t"') == 2
    assert "pool_tdata" not in text.partition("# Generated")[0]


def test_hidden_lvs_of_every_kind_follow_their_names():
    vg = vg_from_text(parse(support.every_kind()))
    for name in ("pool", "r1", "r0", "mir", "cached", "thin"):
        rename_lv(vg, name, f"new-{name}")
    text = metadata_bytes(vg).decode().partition("# Generated")[0]
    text = re.sub("type = .*", "", text)
    for name in ("pool", "r1", "r0", "mir", "cached", "thin"):
        assert not re.search(rf'^{name}(_\w+)? {{|"{name}(_\w+)?"[,\n ]', text, re.MULTILINE), name
    assert 'create = "new-thin"' in text
    assert problems(vg) == []


def test_a_mirror_goes_with_its_images_and_its_log():
    vg = vg_from_text(parse(support.every_kind()))
    with pytest.raises(lvm.InUse, match="w/mir_mlog: it is used by mir"):
        remove_lv(vg, vg.lv("mir_mlog"))
    with pytest.raises(lvm.LVMError, match="LVs of type raid1 are not supported"):
        remove_lv(vg, vg.lv("r1"))
    free = vg.free_extents
    remove_lv(vg, vg.lv("mir"))
    assert not [lv.name for lv in vg.lvs if "mir" in lv.name]
    assert vg.free_extents == free + 3
    remove_lv(vg, vg.lv("lin2"))
    assert vg.lv("a").visible


# Nothing that LVM would refuse is written, whoever edits.

WRONG = {
    "extent 0 of PV pv0 is used by": lambda vg: (
        vg.lvs[1].segments[0].areas.__setitem__(0, vg.lvs[0].segments[0].areas[0])
    ),
    "Segment with extent 103 in PV pv0 not found": lambda vg: setattr(
        vg.lvs[0].segments[0].areas[0], "start", 100
    ),
    "should begin at LE 0 (found 1)": lambda vg: setattr(vg.lvs[0].segments[0], "start_extent", 1),
    'Logical Volume "a" already exists': lambda vg: setattr(vg.lvs[1], "name", "a"),
    'Logical volume name "a b" is invalid.': lambda vg: setattr(vg.lvs[1], "name", "a b"),
    'Volume group name "a b" is invalid.': lambda vg: setattr(vg, "name", "a b"),
    "is not unique in VG vg": lambda vg: setattr(vg.lvs[1], "id", vg.lvs[0].id),
    "Invalid tag a b.": lambda vg: vg.lvs[1].tags.append("a b"),
    "creation_time and creation_host belong together": lambda vg: setattr(
        vg.lvs[1], "creation_host", None
    ),
    "extents do not fit on 131072 sectors": lambda vg: setattr(vg.pvs[0], "pe_count", 16),
    "has 3 extents in 2 stripes": lambda vg: (
        vg.lvs[0].segments[0].areas.append(vg.lvs[1].segments[0].areas[0])
    ),
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_generation_is_not_written(text, tmp_path):
    disks = make_disks(tmp_path)
    with make_vg(disks) as vg:
        vg.create_lv("a", extents=3)
        vg.create_lv("b", extents=3)
        before = [disk.metadata() for disk in disks]
        with pytest.raises(lvm.LVMError, match=re.escape(text)), vg.change("wrong") as new:
            WRONG[text](new)
        assert [disk.metadata() for disk in disks] == before


SNAPSHOT_WRONG = {
    "Chunk size must be a power of 2 in the range 4K to 512K.": lambda segment, vg: setattr(
        segment, "chunk_size", 2048
    ),
    "cannot be smaller than 3 chunks": lambda segment, vg: vg.lv("snap1").segments.clear(),
    "Snapshots of snapshots are not supported.": lambda segment, vg: setattr(
        segment, "origin", vg.lv("snap2")
    ),
    "COW store snap2 is used by snapshot1 and another snapshot": lambda segment, vg: setattr(
        segment, "cow", vg.lv("snap2")
    ),
    "larger than its origin org": lambda segment, vg: setattr(segment, "extent_count", 5),
    "has more than one merging snapshot": lambda segment, vg: [
        setattr(vg.lv(f"snapshot{number}").segments[0], "merging", True) for number in range(2)
    ],
}


@pytest.mark.parametrize("text", SNAPSHOT_WRONG)
def test_a_wrong_snapshot_is_not_written(text, tmp_path):
    with (
        lvm.VolumeGroup.open(sample("e_snapshots", tmp_path)) as vg,
        pytest.raises(lvm.LVMError) as caught,
        vg.change("wrong") as new,
    ):
        SNAPSHOT_WRONG[text](new.lv("snapshot0").segments[0], new)
    assert text in caught.value.strerror or text in str(problems(new))


def test_a_problem_that_was_there_does_not_forbid_another_change(tmp_path):
    (disk,) = sample("e_snapshots", tmp_path)
    disk.edit(("chunk_size = 128", "chunk_size = 2048"))
    with lvm.VolumeGroup.open([disk]) as vg:
        assert len(vg.problems()) == 1
        vg.change_lv("org", add_tags=["x"])
