"""What is on the disks is read as LVM reads it: the samples, damage of every kind, and VGs that may
be looked at only.

The warnings are those that lvm2 2.03.16 gave for the same damage on loop devices.
"""

from __future__ import annotations

import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from support import lvm as support
from support.lvm import MDA, MDA_SIZE, MIB, SECTOR, Disk, mda_header, sample

import cow
from cow import lvm
from cow.lvm.command import Shell, run


def dump(vg: lvm.VolumeGroup) -> dict[str, list[tuple]]:
    """Return of each LV its segments: start, count, type, and legs or what else there is."""
    return {
        lv.name: [
            (s.start_extent, s.extent_count, s.type, *[(str(a.of.label), a.start) for a in s.areas])
            for s in lv.segments
        ]
        for lv in vg.metadata.lvs
    }


def open_sample(name: str, folder: Path, **options) -> lvm.VolumeGroup:
    return lvm.VolumeGroup.open(support.write_sample(name, folder), readonly=True, **options)


# The samples, as their texts and the README beside them describe them.

LINEAR = "striped"
LAYOUTS = {
    "a_linear": {"lin": [(0, 3, LINEAR, ("pv0", 0))]},
    "b_striped": {
        "str": [(0, 4, "striped", ("pv0", 0), ("pv1", 0))],
        "lin": [(0, 2, LINEAR, ("pv0", 2))],
    },
    "c_noncontig": {
        "one": [
            (0, 2, LINEAR, ("pv0", 0)),
            (2, 2, LINEAR, ("pv0", 4)),
            (4, 4, LINEAR, ("pv0", 7)),
        ],
        "three": [(0, 1, LINEAR, ("pv0", 6))],
    },
    "d_hyphens_tags": {
        "root-fs": [(0, 1, LINEAR, ("pv0", 0))],
        "a--b.c_d+e": [(0, 1, LINEAR, ("pv0", 1))],
    },
    "e_snapshots": {
        "org": [(0, 4, LINEAR, ("pv0", 0))],
        "snap1": [(0, 2, LINEAR, ("pv0", 4))],
        "snap2": [(0, 2, LINEAR, ("pv0", 6))],
        "rosnap": [(0, 1, LINEAR, ("pv0", 8))],
        "snapshot0": [(0, 4, "snapshot")],
        "snapshot1": [(0, 4, "snapshot")],
        "snapshot2": [(0, 4, "snapshot")],
    },
    "e2_merge_pending": {
        "org": [(0, 4, LINEAR, ("pv0", 0))],
        "snap1": [(0, 2, LINEAR, ("pv0", 4))],
        "snapshot0": [(0, 4, "snapshot")],
    },
    "e3_sparse_vorigin": {
        "sparse": [(0, 2, LINEAR, ("pv0", 0))],
        "sparse_vorigin": [(0, 25, "zero")],
        "snapshot0": [(0, 25, "snapshot")],
    },
    "f_thin": {
        "pool": [(0, 4, "thin-pool")],
        "th1": [(0, 25, "thin")],
        "th1snap": [(0, 25, "thin")],
        "cowofthin": [(0, 1, LINEAR, ("pv0", 6))],
        "lvol0_pmspare": [(0, 1, LINEAR, ("pv0", 0))],
        "pool_tmeta": [(0, 1, LINEAR, ("pv0", 5))],
        "pool_tdata": [(0, 4, LINEAR, ("pv0", 1))],
        "snapshot0": [(0, 25, "snapshot")],
    },
}
SHOWN = {
    "e_snapshots": ["org", "snap1", "snap2", "rosnap"],
    "e2_merge_pending": ["org"],
    "e3_sparse_vorigin": ["sparse"],
    "f_thin": ["pool", "th1", "th1snap", "cowofthin"],
}


@pytest.mark.parametrize("name", support.SAMPLES)
def test_a_sample_is_listed_as_lvm_lists_it(name, tmp_path):
    with open_sample(name, tmp_path) as vg:
        assert vg.name == support.SAMPLES[name][0]
        assert dump(vg) == LAYOUTS[name]
        assert [lv.name for lv in vg.lvs()] == SHOWN.get(name, list(LAYOUTS[name]))
        assert vg.warnings == []
        assert vg.problems() == []


@pytest.mark.parametrize("name", support.SAMPLES)
def test_reading_changes_no_byte_of_a_sample(name, tmp_path):
    paths = [Path(path) for path in support.write_sample(name, tmp_path)]
    before = [path.read_bytes() for path in paths]
    with lvm.VolumeGroup.open(paths, readonly=True) as vg:
        vg.backup()
        vg.refresh()
    assert [path.read_bytes() for path in paths] == before


@pytest.mark.parametrize("name", support.SAMPLES)
def test_the_backup_of_a_sample_is_what_vgcfgbackup_wrote(name, tmp_path):
    with open_sample(name, tmp_path) as vg:
        ours = vg.backup().partition(f"{vg.name} {{")[2]
    assert ours == support.backup_of(name).partition(f"{vg.name} {{")[2]


def test_stripes_have_their_size(tmp_path):
    with open_sample("b_striped", tmp_path) as vg:
        assert vg.lv("str").segments[0].stripe_size == 128
        assert [str(pv) for pv in vg.pvs] == [
            str(tmp_path / f"b_striped_pv{number}.img") for number in (0, 1)
        ]


def test_the_order_of_the_devices_does_not_matter(tmp_path):
    paths = support.write_sample("b_striped", tmp_path)
    with lvm.VolumeGroup.open(reversed(paths), readonly=True) as vg:
        assert dump(vg) == LAYOUTS["b_striped"]
        assert [pv.path for pv in vg.pvs] == paths


def test_tags_and_properties_of_lvs(tmp_path):
    with open_sample("d_hyphens_tags", tmp_path) as vg:
        lv = vg.lv("root-fs")
        assert vg.metadata.tags == ["vgtag"]
        assert lv.tags == ["k=v", "a:b"]
        assert not lv.writable
        assert (lv.allocation_policy, lv.read_ahead, lv.major, lv.minor) == (
            "contiguous",
            256,
            254,
            77,
        )
        assert (lv.creation_time, lv.creation_host) == (1795339730, "vmhost")


def test_a_snapshot_is_three_lvs(tmp_path):
    with open_sample("e_snapshots", tmp_path) as vg:
        org, snap, record = vg.lv("org"), vg.lv("snap2"), vg.lv("snapshot1")
        assert (record.segments[0].origin, record.segments[0].cow) == (org, snap)
        assert record.segments[0].chunk_size == 128
        assert (snap.snapshot, snap.is_cow, snap.is_origin) == (record, True, False)
        assert org.snapshots == [vg.lv(f"snapshot{number}") for number in range(3)]
        assert org.is_origin
        assert not org.is_virtual_origin
        assert org.merging_snapshot is None
        assert vg.lvs(hidden=True) == [org, vg.lv("snap1"), snap, vg.lv("rosnap")]


def test_a_pending_merge_hides_the_snapshot(tmp_path):
    with open_sample("e2_merge_pending", tmp_path) as vg:
        assert vg.lv("org").merging_snapshot is vg.lv("snapshot0")
        assert not vg.lv("snap1").visible
        assert vg.lvs(hidden=True) == [vg.lv("org"), vg.lv("snap1")]


def test_a_sparse_snapshot_is_visible_though_its_origin_is_not(tmp_path):
    with open_sample("e3_sparse_vorigin", tmp_path) as vg:
        assert vg.lv("sparse_vorigin").is_virtual_origin
        assert not vg.lv("sparse_vorigin").visible
        assert vg.lv("sparse").visible


def test_thin_segments_are_kept_and_not_runnable(tmp_path):
    with open_sample("f_thin", tmp_path) as vg:
        segment = vg.lv("th1snap").segments[0]
        assert segment.known
        assert not segment.runnable
        assert segment.extra == {
            "thin_pool": "pool",
            "transaction_id": 1,
            "device_id": 2,
            "origin": "th1",
        }
        assert vg.lv("pool") in [lv for lv in vg.lvs() if vg.lv("pool_tdata") in used_by(vg, lv)]


def used_by(vg: lvm.VolumeGroup, lv) -> list:
    return [other for other in vg.metadata.lvs if lv in other.users]


# Labels.


@pytest.mark.parametrize("sector", range(4))
def test_a_label_may_be_in_any_of_four_sectors(sector, tmp_path):
    (disk,) = sample("a_linear", tmp_path)
    pv_id = disk.read(SECTOR + 32, 32).decode()
    disk.write(SECTOR, bytes(SECTOR))
    disk.label(pv_id, sector=sector)
    with lvm.VolumeGroup.open([disk], readonly=True) as vg:
        assert dump(vg) == LAYOUTS["a_linear"]


def test_a_label_in_the_fifth_sector_is_none(tmp_path):
    (disk,) = sample("a_linear", tmp_path)
    disk.write(4 * SECTOR, disk.read(SECTOR, SECTOR))
    disk.write(SECTOR, bytes(SECTOR))
    with lvm.scan([disk], readonly=True) as found:
        assert (found.pvs, found.vgs, found.without_label) == ([], [], [str(disk)])


def test_the_first_of_two_labels_counts(tmp_path):
    (disk,) = sample("a_linear", tmp_path)
    disk.label("x" * 32, sector=3)
    with lvm.scan([disk], readonly=True) as found:
        assert [vg.name for vg in found.vgs] == ["vga"]
        assert found.warnings == [f"Ignoring additional label on {disk} at sector 3"]


@pytest.mark.parametrize(
    ("fields", "warning"),
    [
        ({"says_sector": 88}, "{}: Label for sector 88 found at sector 1 - ignoring."),
        ({"kind": b"LVM1 001"}, "{}: Label type b'LVM1 001' at sector 1 is not LVM2 - ignoring."),
        ({"pv_id": "-" * 32}, "{}: Label at sector 1 has no valid uuid - ignoring."),
        ({"pv_id": "é" * 16}, "{}: Label at sector 1 has no valid uuid - ignoring."),
    ],
)
def test_a_label_that_is_none_is_ignored(fields, warning, tmp_path):
    disk = Disk(tmp_path / "disk.img")
    disk.label(**{"pv_id": "x" * 32, **fields})
    with lvm.scan([disk], readonly=True) as found:
        assert found.pvs == []
        assert found.warnings == [warning.format(disk)]


@pytest.mark.parametrize("offset", [0, 31, 473, 512, 2**32 - 1])
def test_a_pv_header_outside_the_label_is_ignored(offset, tmp_path):
    disk = Disk(tmp_path / "disk.img")
    disk.label("x" * 32)
    data = bytearray(disk.read(SECTOR, SECTOR))
    data[20:24] = struct.pack("<I", offset)
    data[16:20] = struct.pack("<I", support.crc(bytes(data[20:])))
    disk.write(SECTOR, bytes(data))
    with lvm.scan([disk], readonly=True) as found:
        assert found.pvs == []
        assert len(found.warnings) == 1


def test_a_pv_header_may_lie_elsewhere_in_the_label(tmp_path):
    disk = Disk(tmp_path / "disk.img")
    disk.label("x" * 32, offset=200)
    with lvm.scan([disk], readonly=True) as found:
        assert [pv.label.pv_id for pv in found.pvs] == ["x" * 32]


def test_a_pv_header_at_the_very_end_has_no_areas(tmp_path):
    disk = Disk(tmp_path / "disk.img")
    header = b"x" * 32 + struct.pack("<Q", 64 * MIB)
    rest = (struct.pack("<I8s", 472, b"LVM2 001").ljust(452, b"\0") + header)[:492]
    disk.write(SECTOR, b"LABELONE" + struct.pack("<QI", 1, support.crc(rest)) + rest)
    with lvm.scan([disk], readonly=True) as found:
        assert found.pvs[0].label.metadata_areas == []


@pytest.mark.parametrize("byte", [16, 24, 40, 72, 104, 136, 511])
def test_a_damaged_label_makes_a_device_no_pv(byte, tmp_path):
    (disk,) = sample("a_linear", tmp_path)
    disk.flip(SECTOR + byte)
    with lvm.scan([disk], readonly=True) as found:
        assert found.vgs == []
        assert found.warnings == [f"{disk}: Label checksum incorrect at sector 1 - ignoring."]


def test_a_device_that_is_no_pv_is_no_error(tmp_path):
    empty, short = Disk(tmp_path / "empty.img"), Disk(tmp_path / "short.img", 1024)
    with lvm.scan([empty, short], readonly=True) as found:
        assert found.without_label == [str(empty), str(short)]
        assert found.warnings == []


@pytest.mark.parametrize(
    ("extension", "warning"),
    [
        (b"", "is using an old PV header, modify the VG to update."),
        (struct.pack("<II", 1, 0), "is using an old PV header, modify the VG to update."),
        (struct.pack("<II", 2, 0), "is missing the used flag in PV header."),
    ],
)
def test_an_old_label_is_told(extension, warning, tmp_path):
    (disk,) = sample("a_linear", tmp_path)
    disk.label(disk.read(SECTOR + 32, 32).decode(), extension=extension)
    with lvm.VolumeGroup.open([disk], readonly=True) as vg:
        assert vg.warnings == [f"WARNING: PV {disk} in VG vga {warning}"]


def test_a_pv_without_a_vg_is_an_orphan(tmp_path):
    used, free = Disk(tmp_path / "used.img"), Disk(tmp_path / "free.img")
    used.label("x" * 32, mdas=())
    free.label("y" * 32, mdas=(), extension=struct.pack("<II", 2, 0))
    with lvm.scan([used, free], readonly=True) as found:
        assert [(pv.path, pv.vg_name) for pv in found.pvs] == [(str(used), ""), (str(free), "")]
        assert found.warnings == [
            f"WARNING: PV {used} is marked in use but no VG was found using it.",
            f"WARNING: PV {used} might need repairing.",
        ]


# Metadata areas.


def header_warnings(disk: Disk, *first: str) -> list[str]:
    pv_id = disk.read(SECTOR + 32, 32).decode()
    return [
        *(f"WARNING: {text} on {disk} at {MDA}" for text in first),
        f"WARNING: bad metadata header on {disk} at {MDA}.",
        f"WARNING: scanning {disk} mda1 failed to read metadata summary.",
        f"WARNING: repair VG metadata on {disk} with vgck --updatemetadata.",
        f"WARNING: scan failed to get metadata summary from {disk} PVID {pv_id}",
    ]


@pytest.mark.parametrize(
    ("fields", "warning"),
    [
        ({"magic": b"?" * 16}, "wrong magic number in mda header"),
        ({"version": 2}, "wrong version 2 in mda header"),
        ({"start": 8192}, "wrong start sector 8192 in mda header"),
        ({"size": 511}, "wrong size 511 in mda header"),
    ],
)
def test_another_copy_is_taken_where_a_header_is_wrong(fields, warning, tmp_path):
    disks = sample("b_striped", tmp_path)
    slot = disks[0].slots()[0]
    disks[0].write(MDA, mda_header(slot, **fields))
    with lvm.VolumeGroup.open(disks, readonly=True) as vg:
        assert dump(vg) == LAYOUTS["b_striped"]
        assert vg.warnings == header_warnings(disks[0], warning)


def test_another_copy_is_taken_where_a_header_is_damaged(tmp_path):
    disks = sample("b_striped", tmp_path)
    disks[0].flip(MDA + 100)
    crc = struct.unpack("<I", disks[0].read(MDA, 4))[0]
    with lvm.VolumeGroup.open(disks, readonly=True) as vg:
        assert vg.warnings == header_warnings(disks[0], f"wrong checksum {crc:x} in mda header")


def test_an_area_whose_header_is_damaged_is_not_counted(tmp_path):
    disks = sample("b_striped", tmp_path)
    disks[0].flip(MDA + 100)
    said: list[str] = []
    environ = {"COW_LVM_DEVICES": ",".join(map(str, disks))}
    shell = Shell(said.append, lambda text: None, environ=environ)
    assert run(["vgs", "--noheadings", "-o", "vg_mda_count,vg_mda_used_count"], shell) == 0
    assert said[0].split() == ["1", "1"]


def test_another_copy_is_taken_where_a_text_is_damaged(tmp_path):
    disks = sample("b_striped", tmp_path)
    at = MDA + disks[1].slots()[0][0]
    disks[1].flip(at + 100)
    with lvm.VolumeGroup.open(disks, readonly=True) as vg:
        assert dump(vg) == LAYOUTS["b_striped"]
        assert vg.warnings == [
            f"WARNING: Checksum error on {disks[1]} at offset {at}.",
            f"WARNING: bad metadata text on {disks[1]} in mda1",
            f"WARNING: scanning {disks[1]} mda1 failed to read metadata summary.",
            f"WARNING: repair VG metadata on {disks[1]} with vgck --updatemetadata.",
        ]


@pytest.mark.parametrize(
    "slot",
    [
        (1, 100),
        (511, 100),
        (MDA_SIZE, 100),
        (2**63, 100),
        (512, 0),
        (512, MDA_SIZE - 511),
        (512, 2**32),
        (512, 2**64 - 1),
    ],
)
def test_a_text_outside_the_area_is_not_read(slot, tmp_path):
    disks = sample("b_striped", tmp_path)
    disks[0].write(MDA, mda_header((*slot, 0, 0)))
    with lvm.VolumeGroup.open(disks, readonly=True) as vg:
        assert dump(vg) == LAYOUTS["b_striped"]
        assert f"WARNING: bad metadata text on {disks[0]} in mda1" in vg.warnings


def test_an_area_that_goes_beyond_the_device_is_not_read(tmp_path):
    disk = Disk(tmp_path / "disk.img")
    disk.label("x" * 32, mdas=((64 * MIB - 256, MDA_SIZE), (2**63, 2**63)))
    with lvm.scan([disk], readonly=True) as found:
        assert found.vgs == []
        assert f"WARNING: bad metadata header on {disk} at {2**63}." in found.warnings


def test_a_huge_text_is_not_taken_into_memory(tmp_path):
    disk = Disk(tmp_path / "disk.img", 8 << 30)
    disk.label("x" * 32, mdas=((MDA, 6 << 30),), data=7 << 30)
    disk.write(MDA, mda_header((512, 4 << 30, 0, 0), size=6 << 30))
    with lvm.scan([disk], readonly=True) as found:
        assert "over the limit" in found.warnings[0]


@pytest.mark.parametrize("before_the_end", [1, 100, 511, 512, 513, 1000, 1200])
def test_a_text_wraps_at_the_end_of_its_area(before_the_end, tmp_path):
    (disk,) = sample("c_noncontig", tmp_path)
    text = disk.text()
    assert len(text) > 1200
    disk.set_text(text, offset=MDA_SIZE - before_the_end)
    with lvm.VolumeGroup.open([disk], readonly=True) as vg:
        assert dump(vg) == LAYOUTS["c_noncontig"]
        assert vg.warnings == []


@pytest.mark.parametrize("offset", [512, 513, 700, 4096, 500_001])
def test_a_text_may_begin_at_any_byte(offset, tmp_path):
    (disk,) = sample("c_noncontig", tmp_path)
    disk.set_text(disk.text(), offset=offset)
    with lvm.VolumeGroup.open([disk], readonly=True) as vg:
        assert dump(vg) == LAYOUTS["c_noncontig"]


def with_two_areas(disk: Disk) -> tuple[int, int]:
    """Give a PV a second metadata area at its end, with the same text."""
    second, size = 63 * MIB, MIB
    pv_id = disk.read(SECTOR + 32, 32).decode()
    disk.label(pv_id, mdas=((MDA, MDA_SIZE), (second, size)))
    disk.set_text(disk.text(), mda=second, size=size)
    return second, size


@pytest.mark.parametrize("damaged", [None, 0, 1])
def test_a_pv_may_have_two_areas(damaged, tmp_path):
    (disk,) = sample("c_noncontig", tmp_path)
    second, _ = with_two_areas(disk)
    if damaged is not None:
        disk.flip((MDA, second)[damaged] + 50)
    with lvm.VolumeGroup.open([disk], readonly=True) as vg:
        assert dump(vg) == LAYOUTS["c_noncontig"]
        assert [mda.number for mda in vg.pvs[0].mdas] == [1, 2]
        assert [bool(mda.bad) for mda in vg.pvs[0].mdas] == [damaged == 0, damaged == 1]


def test_an_ignored_area_holds_no_text(tmp_path):
    disks = sample("b_striped", tmp_path)
    disks[0].write(MDA, mda_header((0, 0, 0, 1)))
    with lvm.VolumeGroup.open(disks, readonly=True) as vg:
        assert dump(vg) == LAYOUTS["b_striped"]
        assert [mda.ignored for pv in vg.pvs for mda in pv.mdas] == [True, False]
        assert vg.warnings == []


def test_the_precommitted_text_does_not_count(tmp_path):
    (disk,) = sample("a_linear", tmp_path)
    slot = disk.slots()[0]
    text = disk.text().replace(b"seqno = 2", b"seqno = 3")
    disk.write(MDA + 8192, text)
    disk.write(MDA, mda_header(slot, (8192, len(text), support.crc(text), 0)))
    with lvm.VolumeGroup.open([disk], readonly=True) as vg:
        assert vg.metadata.seqno == 2
        assert vg.warnings == []


def test_a_pv_needs_no_area_if_another_has_one(tmp_path):
    disks = sample("b_striped", tmp_path)
    disks[1].label(disks[1].read(SECTOR + 32, 32).decode(), mdas=())
    with lvm.VolumeGroup.open(disks, readonly=True) as vg:
        assert dump(vg) == LAYOUTS["b_striped"]
        assert vg.warnings == []


# Copies that differ.


def test_the_highest_seqno_counts(tmp_path):
    disks = sample("b_striped", tmp_path)
    disks[1].edit(("seqno = 3", "seqno = 4"), ("\nlin {", "\nline {"))
    with lvm.VolumeGroup.open(disks, readonly=True) as vg:
        assert vg.metadata.seqno == 4
        assert list(dump(vg)) == ["str", "line"]
        assert vg.warnings == [
            f"WARNING: ignoring metadata seqno 3 on {disks[0]} for seqno 4 on {disks[1]} for VG"
            " vgb.",
            "WARNING: Inconsistent metadata found for VG vgb.",
            "See vgck --updatemetadata to correct inconsistency.",
        ]


def test_a_seqno_is_a_number_and_not_a_word(tmp_path):
    disks = sample("b_striped", tmp_path)
    disks[0].edit(("seqno = 3", "seqno = 9"))
    disks[1].edit(("seqno = 3", "seqno = 10"))
    with lvm.VolumeGroup.open(disks, readonly=True) as vg:
        assert vg.metadata.seqno == 10


def test_copies_of_one_seqno_that_differ_are_told(tmp_path):
    disks = sample("b_striped", tmp_path)
    disks[1].edit(("\nlin {", "\nline {"))
    with lvm.VolumeGroup.open(disks, readonly=True) as vg:
        assert list(dump(vg)) == ["str", "lin"]
        assert vg.warnings[0] == (
            f"WARNING: metadata seqno 3 on {disks[1]} differs from that on {disks[0]} for VG vgb."
        )


def test_a_vg_can_be_renamed_on_one_disk_only(tmp_path):
    disks = sample("b_striped", tmp_path)
    disks[0].edit(("seqno = 3", "seqno = 4"), ("vgb {", "other {"))
    with lvm.VolumeGroup.open(disks, readonly=True) as vg:
        assert vg.name == "other"


def test_a_missing_pv_is_told_and_the_rest_is_read(tmp_path):
    disks = sample("b_striped", tmp_path)
    with lvm.VolumeGroup.open(disks[:1], readonly=True) as vg:
        uuid = "465WgF-x13Z-K5Hu-DPnP-tFlN-hij0-2plaBt"
        assert dump(vg) == LAYOUTS["b_striped"]
        assert [pv.missing for pv in vg.pvs] == [False, True]
        assert str(vg.pvs[1]) == "[unknown]"
        assert vg.warnings == [
            f"WARNING: Couldn't find device with uuid {uuid}.",
            f"WARNING: VG vgb is missing PV {uuid} (last written to /dev/vdc).",
        ]
        assert vg.problems() == ["The volume group is missing 1 physical volumes."]


def test_a_pv_that_was_removed_while_it_was_away_is_told(tmp_path):
    disks = sample("b_striped", tmp_path)
    text = disks[0].text().decode()
    start, end = text.index("pv1 {"), text.index("}\n\nlogical_volumes")
    text = text[:start] + text[end:]
    text = text.replace("seqno = 3", "seqno = 4").replace("stripe_count = 2", "stripe_count = 1")
    text = text.replace('"pv0", 0,\n"pv1", 0', '"pv0", 6').replace("stripe_size = 128\n", "")
    disks[0].set_text(text.encode())
    with lvm.VolumeGroup.open(disks, readonly=True) as vg:
        assert len(vg.pvs) == 1
        assert vg.warnings[-2:] == [
            f"WARNING: outdated PV {disks[1]} seqno 3 has been removed in current VG vgb seqno 4.",
            "See vgck --updatemetadata to clear outdated metadata.",
        ]


def test_a_second_device_of_the_same_pv_is_not_used(tmp_path):
    (disk,) = sample("a_linear", tmp_path)
    copy = Disk(tmp_path / "copy.img")
    copy.path.write_bytes(disk.path.read_bytes())
    with lvm.VolumeGroup.open([disk, copy]) as vg:
        uuid = "ZbUBmC-EtZK-qUNF-l9cy-xeF2-ooX7-tVSzTb"
        assert vg.pvs[0].path == str(disk)
        assert vg.warnings[0] == f"WARNING: Not using device {copy} for PV {uuid}."
        with pytest.raises(
            lvm.VGNotWritable, match="Cannot update volume group vga with duplicate PV devices"
        ):
            vg.create_lv("x", extents=1)
        with pytest.raises(lvm.LVMError, match="Cannot activate LVs in VG vga while PVs appear on"):
            vg.activate()


def test_a_device_named_twice_is_one(tmp_path):
    (disk,) = sample("a_linear", tmp_path)
    link = tmp_path / "link.img"
    link.symlink_to(disk.path)
    with lvm.VolumeGroup.open([disk, link, disk], readonly=True) as vg:
        assert vg.warnings == []


def test_a_device_that_shrank_is_told(tmp_path):
    disks = sample("b_striped", tmp_path)
    with disks[1].path.open("r+b") as file:
        file.truncate(48 * MIB)
    with lvm.VolumeGroup.open(disks, readonly=True) as vg:
        assert vg.warnings == [
            f"WARNING: Device {disks[1]} has size of 98304 sectors which is smaller than"
            " corresponding PV size of 131072 sectors. Was device resized?",
            "WARNING: One or more devices used as PVs in VG vgb have changed sizes.",
        ]
        assert vg.readonly_reason == "Volume group vgb was opened read-only."


# The devices.


def test_images_are_given_back_when_a_vg_is_closed(tmp_path):
    disks = sample("b_striped", tmp_path)
    with lvm.VolumeGroup.open(disks) as vg, pytest.raises(cow.ImageLocked):
        lvm.VolumeGroup.open(disks, mapper=cow.Mapper())
    assert vg.name == "vgb"
    with lvm.VolumeGroup.open(disks, readonly=True), lvm.VolumeGroup.open(disks, readonly=True):
        pass


def test_a_mapper_keeps_an_image_as_long_as_somebody_uses_it(tmp_path):
    (disk,) = sample("a_linear", tmp_path)
    path = str(disk)
    with cow.Mapper() as dm:
        first = lvm.VolumeGroup.open([path], mapper=dm)
        second = lvm.VolumeGroup.open([path], mapper=dm)
        assert first.pvs[0].device is second.pvs[0].device
        dm.create("linear", f"0 8 linear {path} 2048")
        first.close()
        second.refresh()
        second.close()
        assert not second.pvs[0].device.removed
        dm.remove("linear")
        assert second.pvs[0].device.removed
        with lvm.VolumeGroup.open([path], mapper=dm) as third:
            third.create_lv("lv", extents=1)


def test_an_image_that_is_open_to_be_read_cannot_be_changed(tmp_path):
    (disk,) = sample("a_linear", tmp_path)
    with cow.Mapper() as dm:
        dm.image(str(disk), readonly=True)
        with lvm.VolumeGroup.open([disk], readonly=True, mapper=dm) as vg:
            assert vg.name == "vga"
        with pytest.raises(cow.ImageError, match="opened read-only"):
            lvm.VolumeGroup.open([disk], mapper=dm)


def test_pvs_may_be_on_dm_devices(tmp_path):
    disks = sample("b_striped", tmp_path)
    with cow.Mapper() as dm:
        for number, disk in enumerate(disks):
            dm.create(f"pv{number}", f"0 131072 linear {disk} 0")
        with lvm.VolumeGroup.open(["pv0", "/dev/mapper/pv1"], mapper=dm) as vg:
            assert [pv.path for pv in vg.pvs] == ["pv0", "/dev/mapper/pv1"]
            vg.create_lv("lv", extents=1)
            assert [pv.device_hint for pv in vg.pvs] == ["/dev/mapper/pv0", "/dev/mapper/pv1"]


def test_what_cannot_be_opened_is_an_error_and_closes_the_rest(tmp_path):
    (disk,) = sample("a_linear", tmp_path)
    with cow.Mapper() as dm:
        with pytest.raises(cow.ImageNotFound):
            lvm.scan([disk, tmp_path / "nosuch.img"], mapper=dm)
        with cow.Mapper() as other:
            lvm.VolumeGroup.open([disk], mapper=other).close()


# Several VGs.


def test_several_vgs_are_read_at_once(tmp_path):
    disks = [str(disk) for name in support.SAMPLES for disk in sample(name, tmp_path)]
    with lvm.scan(disks, readonly=True) as found:
        assert sorted(vg.name for vg in found.vgs) == sorted(n for n, _ in support.SAMPLES.values())
        assert dump(found.vg("vgc")) == LAYOUTS["c_noncontig"]
        assert {pv.vg_name for pv in found.pvs} == {vg.name for vg in found.vgs}
        with pytest.raises(lvm.RequestError, match="name a volume group"):
            found.vg()
        with pytest.raises(lvm.VGNotFound, match='Volume group "nosuch" not found'):
            found.vg("nosuch")


def test_a_vg_is_found_by_its_uuid(tmp_path):
    disks = [disk for name in ("a_linear", "c_noncontig") for disk in sample(name, tmp_path)]
    for name in ("MeJc3hnUGmY2u2VDCHSRUWsPhC5ugRcz", "MeJc3h-nUGm-Y2u2-VDCH-SRUW-sPhC-5ugRcz"):
        with lvm.VolumeGroup.open(disks, name, readonly=True) as vg:
            assert vg.name == "vgc"


def test_vgs_of_the_same_name_are_told_apart_by_uuid(tmp_path):
    disks = [*sample("a_linear", tmp_path), *sample("c_noncontig", tmp_path)]
    disks[1].edit(("vgc {", "vga {"))
    with lvm.scan(disks, readonly=True) as found:
        uuids = [lvm.VolumeGroup.id.fget(vg) for vg in found.vgs]
        assert found.warnings == [
            "WARNING: VG name vga is used by VGs XuUCCl-uJOO-f9hM-RQkp-Ah7n-h8NT-wOwYUR and"
            " MeJc3h-nUGm-Y2u2-VDCH-SRUW-sPhC-5ugRcz.",
            "Fix duplicate VG names with vgrename uuid, a device filter, or system IDs.",
        ]
        with pytest.raises(
            lvm.LVMError, match="Multiple VGs found with the same name: skipping vga"
        ):
            found.vg("vga")
        assert [found.vg(uuid).name for uuid in uuids] == ["vga", "vga"]


# Who may look but not touch.

READ_ONLY = {
    'extent_size = 8192\n => system_id = "other"\nextent_size = 8192\n': (
        "Cannot access VG vga with system ID other with unknown local system ID."
    ),
    'extent_size = 8192\n => lock_type = "sanlock"\nlock_args = "1.0.0:x"\nextent_size = 8192\n': (
        "Cannot access VG vga with lock type sanlock that requires lvmlockd."
    ),
    '"RESIZEABLE", => "RESIZEABLE", "EXPORTED",': "Volume group vga is exported",
    '"RESIZEABLE", => "RESIZEABLE", "CLUSTERED",': "Cannot access clustered VG vga.",
    '"RESIZEABLE", "READ", "WRITE" => "RESIZEABLE", "READ"': "Volume group vga is read-only.",
    '"RESIZEABLE", => "RESIZEABLE", "STRANGE",': (
        "Cannot change VG vga with unknown status flag 'STRANGE'."
    ),
    '"VISIBLE" => "VISIBLE", "STRANGE"': "Cannot change VG vga with unknown status flag 'STRANGE'.",
    '"ALLOCATABLE" => "STRANGE"': "Cannot change VG vga with unknown status flag 'STRANGE'.",
    '"ALLOCATABLE" => "ALLOCATABLE", "MISSING"': (
        "Cannot change VG vga while PVs are missing.\nSee vgreduce --removemissing."
    ),
    '"striped" => "strange"': "Cannot change VG vga with unknown segments in it!",
    '"striped" => "striped+STRANGE"': "Cannot change VG vga with unknown segments in it!",
}


@pytest.mark.parametrize("change", READ_ONLY)
def test_a_vg_may_be_read_but_not_changed(change, tmp_path):
    (disk,) = sample("a_linear", tmp_path)
    disk.edit(tuple(change.split(" => ")))
    before = disk.metadata()
    with lvm.VolumeGroup.open([disk]) as vg:
        assert [lv.name for lv in vg.lvs()] == ["lin"]
        with pytest.raises(lvm.VGNotWritable) as caught:
            vg.create_lv("new", extents=1)
        assert caught.value.strerror == READ_ONLY[change]
        assert caught.value.exit_code == 5
        with pytest.raises(lvm.VGNotWritable):
            vg.remove()
    assert disk.metadata() == before


@pytest.mark.parametrize("change", list(READ_ONLY)[:4])
def test_lvs_of_a_vg_that_others_use_are_activated_only_to_be_read(change, tmp_path):
    (disk,) = sample("a_linear", tmp_path)
    disk.edit(tuple(change.split(" => ")))
    with lvm.VolumeGroup.open([disk]) as vg:
        with pytest.raises(lvm.LVMError, match=re.escape(READ_ONLY[change])):
            vg.activate()
        assert not vg.is_active("lin")
    with lvm.VolumeGroup.open([disk], readonly=True) as vg:
        vg.activate()
        assert vg.is_active("lin")


def test_a_vg_that_misses_a_pv_is_not_changed(tmp_path):
    disks = sample("b_striped", tmp_path)
    with (
        lvm.VolumeGroup.open(disks[:1]) as vg,
        pytest.raises(lvm.VGNotWritable, match="Cannot change VG vgb while PVs are missing"),
    ):
        vg.remove_lv("lin")


def test_a_vg_opened_to_be_read_is_not_changed(tmp_path):
    with (
        open_sample("a_linear", tmp_path) as vg,
        pytest.raises(lvm.VGNotWritable, match="was opened read-only"),
    ):
        vg.remove_lv("lin")


# What the text may be like. lvm2 2.03.16 reads all of it but three: an unknown section in an LV,
# the header first, and a name in quotes (in backup files it reads the last two).

ACCEPTED = {
    "CRLF": lambda text: text.replace("\n", "\r\n"),
    "one line": lambda text: re.sub("#.*", "", text).replace("\n", " "),
    "no flags": lambda text: text.replace("flags = []\n", ""),
    "no newline at the end": lambda text: text.rstrip("\n"),
    "an unknown key": lambda text: text.replace("seqno", "strange = [1, -2, 3.5]\nseqno", 1),
    "an unknown section": lambda text: text.replace("seqno", "strange { a = 1 b { } }\nseqno", 1),
    "an unknown section in an LV": lambda text: text.replace(
        "segment_count", "strange { a = 1 }\nsegment_count"
    ),
    "an unknown flag": lambda text: text.replace("flags = []", 'flags = ["STRANGE"]'),
    "the header first": lambda text: text[text.index("# Gen") :] + text[: text.index("# Gen")],
    "octal numbers": lambda text: text.replace("8192", "020000"),
    "signs": lambda text: text.replace("8192", "+8192"),
    "comments": lambda text: text.replace("\n", " # } \" ' {\n"),
    "single quotes": lambda text: text.replace('"striped"', "'striped'"),
    "a bare word": lambda text: text.replace('"striped"', "striped"),
    "type linear": lambda text: text.replace('"striped"', '"linear"'),
    "a section after the VG": lambda text: text + "\nother { a = 1 }\n",
    "a quoted name": lambda text: text.replace("vga {", '"vga" {'),
    "no commas": lambda text: text.replace('"READ", "WRITE"', '"READ" "WRITE"'),
    "a path for a key": lambda text: text.replace("seqno", "a/b = 1\nseqno", 1),
    "text behind a NUL": lambda text: text + "\0 } garbage {",
    "a status that is no list": lambda text: text.replace('["ALLOCATABLE"]', '"ALLOCATABLE"'),
}


@pytest.mark.parametrize("change", ACCEPTED)
def test_a_text_is_accepted_with(change, tmp_path):
    (disk,) = sample("a_linear", tmp_path)
    text = ACCEPTED[change](disk.text().decode().rstrip("\0"))
    disk.set_text(text.encode())
    with lvm.VolumeGroup.open([disk], readonly=True) as vg:
        assert dump(vg) == LAYOUTS["a_linear"]
        assert vg.metadata.extent_size == 8192
        assert vg.warnings == []


def test_lvs_may_be_in_any_order(tmp_path):
    disks = sample("b_striped", tmp_path)
    text = disks[0].text().decode()
    first, second = text.index("str {"), text.index("lin {")
    end = text.index("}\n\n}\n# Generated")
    text = text[:first] + text[second:end] + text[first:second].rstrip() + "\n" + text[end:]
    for disk in disks:
        disk.set_text(text.encode())
    with lvm.VolumeGroup.open(disks, readonly=True) as vg:
        assert dump(vg) == LAYOUTS["b_striped"]
        assert [lv.name for lv in vg.lvs()] == ["lin", "str"]


def test_the_first_of_two_equal_keys_counts(tmp_path):
    (disk,) = sample("a_linear", tmp_path)
    disk.edit(("extent_size = 8192", "extent_size = 8192\nextent_size = 4096"))
    with lvm.VolumeGroup.open([disk], readonly=True) as vg:
        assert vg.metadata.extent_size == 8192
        assert vg.warnings == ["WARNING: Ignoring duplicate config value: vga/extent_size"]


REJECTED = {
    "contents = => kontents =": "Can't process text format file - missing contents field.",
    "version = 1 => version = 2": ("Can't process text format file - unrecognised version number."),
    "start_extent = 0 => start_extent = 1": (
        "LV lin invalid: segment 1 should begin at LE 0 (found 1)."
    ),
    '"pv0", 0 => "pv0", 13': "Segment with extent 16 in PV pv0 not found",
    '"pv0", 0 => "pv7", 0': "Couldn't find volume 'pv7' for segment",
    "segment_count = 1 => segment_count = 2": (
        "segment_count and actual number of segments disagree for logical volume lin: 2 and 1"
    ),
    "extent_count = 3 => extent_count = 0": "LV lin invalid: segment 1 has no extents.",
    "stripe_count = 1 => stripe_count = 2": "not a list of 2 pairs",
    "stripe_count = 1 => stripe_count = 0": "not a list of 0 pairs",
    "pe_count = 15 => pe_count = -1": "-1 is not from 0 to 4294967295",
    "pe_count = 15 => pe_count = 99999999999": "99999999999 is not from 0 to 4294967295",
    "pe_count = 15 => pe_count = 9223372036854775808": "number 9223372036854775808 out of range",
    "pe_count = 15 => pe_count = 089": "089 is not an octal number",
    "pe_count = 15 => pe_count = [1]": "expected an integer, found [1]",
    "pe_count = 15 => pe_count": "Parse error at byte",
    "extent_size = 8192 => extent_size = 0": "vga/extent_size: 0",
    "extent_size = 8192 => ": "vga/extent_size: missing, expected an integer",
    "id = => no_id =": "vga/id: missing",
    "JrcHbZ- => JrcHb?-": "is not a uuid of 32 characters",
    "physical_volumes { => physical_volumes = 1 x {": "expected a section, found 1",
}


@pytest.mark.parametrize("change", REJECTED)
def test_a_text_is_rejected_with(change, tmp_path):
    (disk,) = sample("a_linear", tmp_path)
    disk.edit(tuple(change.split(" => ")))
    with lvm.scan([disk], readonly=True) as found:
        assert found.vgs == []
        assert any(REJECTED[change] in warning for warning in found.warnings), found.warnings


def test_the_package_lists_what_it_has_before_it_is_imported():
    code = "import cow.lvm; print(*(n for n in cow.lvm.__all__ if n not in dir(cow.lvm)))"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout == "\n"
    assert set(lvm.__all__) <= set(dir(lvm))


def test_a_text_of_no_vg_is_rejected(tmp_path):
    (disk,) = sample("a_linear", tmp_path)
    disk.set_text(b'contents = "Text Format Volume Group"\nversion = 1\n')
    with lvm.scan([disk], readonly=True) as found:
        assert found.vgs == []
        assert any("Can't find volume group section." in each for each in found.warnings)


def test_an_extent_may_not_be_used_twice(tmp_path):
    disks = sample("b_striped", tmp_path)
    for disk in disks:
        disk.edit(('"pv0", 2', '"pv0", 1'))
    with pytest.raises(
        lvm.MetadataError, match="extent 1 of PV pv0 is used by str and lin"
    ) as caught:
        lvm.VolumeGroup.open(disks, readonly=True)
    assert caught.value.exit_code == 5


def test_an_older_copy_does_not_stand_in_for_a_newer_one_that_cannot_be(tmp_path):
    disks = sample("b_striped", tmp_path)
    disks[1].edit(("seqno = 3", "seqno = 4"), ('"pv0", 2', '"pv0", 1'))
    with pytest.raises(lvm.MetadataError, match="Cannot read volume group vgb"):
        lvm.VolumeGroup.open(disks, readonly=True)


def test_lvs_may_not_stand_on_each_other_in_a_circle(tmp_path):
    disks = sample("b_striped", tmp_path)
    for disk in disks:
        disk.edit(('"pv0", 0,\n"pv1", 0', '"lin", 0,\n"pv1", 0'), ('"pv0", 2', '"str", 2'))
    with pytest.raises(lvm.MetadataError, match="stands on itself"):
        lvm.VolumeGroup.open(disks, readonly=True)


def test_an_lv_may_stand_on_another(tmp_path):
    disks = sample("b_striped", tmp_path)
    for disk in disks:
        disk.edit(('"pv0", 2', '"str", 2'))
    with lvm.VolumeGroup.open(disks, readonly=True) as vg:
        assert vg.lv("lin").segments[0].areas[0].of is vg.lv("str")
        assert vg.lv("str").users == [vg.lv("lin")]
