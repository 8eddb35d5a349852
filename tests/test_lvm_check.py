"""What is wrong with a VG is told: each rule broken once, in a VG that is in order otherwise."""

from __future__ import annotations

import dataclasses
import re
from types import SimpleNamespace

import pytest

from cow.lvm.check import change_problem, problems, refuse_change
from cow.lvm.errors import VGNotWritable
from cow.lvm.metadata import Area, VolumeGroupMetadata
from cow.lvm.metadata_text import vg_from_text
from cow.lvm.text import parse

TEXT = """vg {
id = "XuUCCl-uJOO-f9hM-RQkp-Ah7n-h8NT-wOwYUR"
seqno = 3
status = ["RESIZEABLE", "READ", "WRITE"]
flags = []
extent_size = 8192
max_lv = 0
max_pv = 0
physical_volumes {
pv0 {
id = "ZbUBmC-EtZK-qUNF-l9cy-xeF2-ooX7-tVSzTb"
status = ["ALLOCATABLE"]
dev_size = 819200
pe_start = 2048
pe_count = 99
}
}
logical_volumes {
org {
id = "AAAAAA-EtZK-qUNF-l9cy-xeF2-ooX7-tVSzTb"
status = ["READ", "WRITE", "VISIBLE"]
segment_count = 1
segment1 {
start_extent = 0
extent_count = 4
type = "striped"
stripe_count = 1
stripes = ["pv0", 0]
}
}
store {
id = "BBBBBB-EtZK-qUNF-l9cy-xeF2-ooX7-tVSzTb"
status = ["READ", "WRITE"]
segment_count = 1
segment1 {
start_extent = 0
extent_count = 2
type = "striped"
stripe_count = 1
stripes = ["pv0", 4]
}
}
snapshot0 {
id = "CCCCCC-EtZK-qUNF-l9cy-xeF2-ooX7-tVSzTb"
status = ["READ", "WRITE", "VISIBLE"]
segment_count = 1
segment1 {
start_extent = 0
extent_count = 4
type = "snapshot"
chunk_size = 8
origin = "org"
cow_store = "store"
}
}
}
}
contents = "Text Format Volume Group"
version = 1
"""


@pytest.fixture
def vg() -> VolumeGroupMetadata:
    """A VG with a snapshot, in which nothing is wrong."""
    found = vg_from_text(parse(TEXT.encode()))
    found.pvs[0].device = SimpleNamespace(size=819200 * 512)
    assert problems(found) == []
    assert change_problem(found) is None
    return found


def org(vg):
    return vg.find_lv("org")


def segment(vg, name="org"):
    return vg.find_lv(name).segments[0]


def another_snapshot(vg, **changes):
    """Add a second record, of another name and uuid."""
    record = vg.snapshot_records[0]
    new = vg.copy().snapshot_records[0]
    new.vg, new.name, new.id = vg, "snapshot1", "D" * 32
    new.segments = [dataclasses.replace(record.segments[0], **changes)]
    vg.lvs.append(new)


WRONG = {
    "a PV twice": (lambda vg: vg.pvs.append(vg.pvs[0]), "Duplicate PV uuid"),
    "a gap": (lambda vg: setattr(segment(vg), "start_extent", 1), "segment 1 should begin at LE 0"),
    "no extents": (lambda vg: setattr(segment(vg), "extent_count", 0), "segment 1 has no extents."),
    "past the PV": (
        lambda vg: setattr(vg.pvs[0], "pe_count", 3),
        "Segment with extent 4 in PV pv0",
    ),
    "an extent used twice": (
        lambda vg: setattr(segment(vg, "store").areas[0], "start", 3),
        "extent 3 of PV pv0 is used by org and store.",
    ),
    "the extent size": (lambda vg: setattr(vg, "extent_size", 8200), "neither a power of 2"),
    "too many LVs": (lambda vg: setattr(vg, "max_lv", 1), "Maximum number of logical volumes (1)"),
    "too many PVs": (
        lambda vg: (setattr(vg, "max_pv", 1), vg.pvs.append(vg.pvs[0])),
        "Maximum number of physical volumes (1) exceeded",
    ),
    "a device too small": (lambda vg: setattr(vg.pvs[0].device, "size", 512), "do not fit on 1 se"),
    "a PV too small": (lambda vg: setattr(vg.pvs[0], "dev_size", 8192), "do not fit on 8192"),
    "half a creation": (lambda vg: setattr(org(vg), "creation_time", 7), "belong together"),
    "too many extents": (
        lambda vg: setattr(segment(vg), "extent_count", 2**32),
        "LV org: 4294967296 extents, more than 4294967295",
    ),
    "a record of two segments": (
        lambda vg: vg.find_lv("snapshot0").segments.append(
            dataclasses.replace(segment(vg, "snapshot0"), start_extent=4)
        ),
        "LV snapshot0: only one segment permitted for snapshot",
    ),
    "past the LV": (
        lambda vg: setattr(segment(vg), "areas", [Area(vg.find_lv("store"), 0)]),
        "LV org invalid: segment 1 needs LE 3 of store.",
    ),
    "the name of a PV below": (
        lambda vg: (
            setattr(vg.find_lv("store"), "name", "pv0"),
            setattr(segment(vg), "areas", [Area(vg.find_lv("pv0"), 0)]),
        ),
        "LV pv0 has the name of a PV's section and an LV stands on it.",
    ),
    "too many stripes": (
        lambda vg: setattr(segment(vg), "areas", segment(vg).areas * 129),
        "LV org: 129 stripes, more than 128.",
    ),
    "the name of the VG": (lambda vg: setattr(vg, "name", "a b"), 'name "a b" is invalid.'),
    "a uuid twice": (lambda vg: setattr(org(vg), "id", vg.pvs[0].id), "is not unique in VG vg."),
    "a name twice": (lambda vg: setattr(org(vg), "name", "store"), '"store" already exists'),
    "the name of an LV": (lambda vg: setattr(org(vg), "name", "a/b"), 'name "a/b" is invalid.'),
    "a name too long": (lambda vg: setattr(org(vg), "name", "x" * 126), "is too long."),
    "a tag": (lambda vg: org(vg).tags.append("a b"), "Invalid tag a b."),
    "the chunk size": (
        lambda vg: setattr(segment(vg, "snapshot0"), "chunk_size", 7),
        "Chunk size must be a power of 2",
    ),
    "a store too small": (
        lambda vg: (setattr(vg, "extent_size", 8), None),
        "Snapshot volume store cannot be smaller than",
    ),
    "a snapshot of its store": (
        lambda vg: setattr(segment(vg, "snapshot0"), "origin", vg.find_lv("store")),
        "store and store cannot be origin and COW store.",
    ),
    "a store of two": (another_snapshot, "COW store store is used by"),
    "larger than its origin": (
        lambda vg: setattr(segment(vg, "snapshot0"), "extent_count", 5),
        "larger than its origin org.",
    ),
    "two merges": (
        lambda vg: (
            setattr(segment(vg, "snapshot0"), "merging", True),
            another_snapshot(vg, merging=True),
        ),
        "has more than one merging snapshot: snapshot0, snapshot1.",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_told(vg, name):
    change, text = WRONG[name]
    change(vg)
    assert any(text in problem for problem in problems(vg)), problems(vg)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda vg: vg.status.append("EXPORTED"), "Volume group vg is exported"),
        (lambda vg: vg.status.remove("WRITE"), "Volume group vg is read-only."),
        (lambda vg: vg.flags.append("WRITE_LOCKED"), "Volume group vg is write-locked."),
        (lambda vg: vg.status.append("PVMOVE"), "Volume group vg has a pvmove in progress."),
        (lambda vg: org(vg).status.append("PVMOVE"), "Volume group vg has a pvmove in progress."),
        (lambda vg: vg.status.append("NEW"), "with unknown status flag 'NEW'."),
        (lambda vg: vg.status.append("CLUSTERED"), "Cannot access clustered VG vg."),
        (lambda vg: setattr(vg, "system_id", "me"), "with system ID me"),
        (lambda vg: setattr(vg, "lock_type", "sanlock"), "with lock type sanlock"),
    ],
)
def test_why_a_vg_may_only_be_read_is_told(vg, change, text):
    change(vg)
    assert text in change_problem(vg)
    with pytest.raises(VGNotWritable, match=re.escape(text)):
        refuse_change(vg)
