"""Bytes → a PV: label, header of its metadata area, text → scanned, changed, or refused unchanged.

The first byte chooses what the others are: a label, a header or a text; whether checksums are put
right behind it; and, of a text, where in the ring it lies. What is not chosen is as it should be.
"""

from __future__ import annotations

import struct
from pathlib import Path

import scratch
from support import SECTOR
from support import lvm as by_hand

from cow import lvm
from cow.lvm.commit import metadata_bytes
from cow.lvm.errors import LVMError, MetadataError
from cow.lvm.metadata_text import vg_from_text, vg_section
from cow.lvm.text import parse, section_text

MAX_LEN = 4096
SIZE = 1 << 16
MDA, MDA_SIZE = 4096, 32768
PV_ID = "ZbUBmCEtZKqUNFl9cyxeF2ooX7tVSzTb"
LABEL, HEADER, TEXT, GRAMMAR = range(4)


def run(data: bytes) -> None:
    knobs, data = (data[0], data[1:]) if data else (0, b"")
    kind, fixed, place = knobs & 3, not knobs & 4, knobs >> 3
    if kind == GRAMMAR:
        check_grammar(data)
        return
    path = Path(scratch.folder()) / "pv.img"
    content = disk(kind, data, fixed, place)
    path.write_bytes(content)
    check(path, bytes(content))


def disk(kind: int, data: bytes, fixed: bool, place: int) -> bytearray:
    """Return the PV."""
    content = bytearray(SIZE)
    label = bytearray(by_hand.label_bytes(PV_ID, size=SIZE, data=40960, mdas=((MDA, MDA_SIZE),)))
    text = TEMPLATE
    if kind == LABEL:
        label[: min(len(data), SECTOR)] = data[:SECTOR]
        if fixed:
            label[16:20] = struct.pack("<I", by_hand.crc(bytes(label[20:])))
    elif kind == TEXT:
        text = data
    text = text.partition(b"\0")[0] + b"\0"
    offset = 512 + place * (MDA_SIZE - 512) // 32
    ring = MDA_SIZE - 512
    for index, byte in enumerate(text):
        content[MDA + 512 + (offset - 512 + index) % ring] = byte
    crc = by_hand.crc(text) if fixed else 0x12345678
    header = bytearray(by_hand.mda_header((offset, len(text), crc, 0), start=MDA, size=MDA_SIZE))
    if kind == HEADER:
        header[: min(len(data), SECTOR)] = data[:SECTOR]
        if fixed:
            header[:4] = struct.pack("<I", by_hand.crc(bytes(header[4:])))
    content[MDA : MDA + SECTOR] = header
    content[SECTOR : 2 * SECTOR] = label
    return content


TEMPLATE = b"""vga {
id = "XuUCCl-uJOO-f9hM-RQkp-Ah7n-h8NT-wOwYUR"
seqno = 1
status = ["RESIZEABLE", "READ", "WRITE"]
extent_size = 8
physical_volumes {
pv0 {
id = "ZbUBmC-EtZK-qUNF-l9cy-xeF2-ooX7-tVSzTb"
status = ["ALLOCATABLE"]
dev_size = 128
pe_start = 80
pe_count = 6
}
}
}
contents = "Text Format Volume Group"
version = 1
"""


def check_grammar(data: bytes) -> None:
    """What is parsed at all is written so that it is read the same."""
    try:
        section = parse(data)
    except MetadataError:
        return
    again = parse(section_text(section))
    assert again == section, (section, again)


def check(path: Path, content: bytes) -> None:
    """Look at the PV; change its VG if that may be changed; refuse without a trace if not."""
    with lvm.scan([path], readonly=True) as found:
        for vg in found.vgs:
            look(vg)
    assert path.read_bytes() == content
    with lvm.scan([path]) as found:
        vgs = [change(vg, path) for vg in found.vgs]
    changed = any(vgs)
    if not changed:
        assert path.read_bytes() == content
        return
    with lvm.scan([path], readonly=True) as found:
        assert [vg.lv("fuzzed").extent_count for vg in found.vgs] == [1]


def look(vg: lvm.VolumeGroup) -> None:
    """Use everything that reads, and check that the text comes back."""
    metadata = vg.metadata
    vg.problems()
    section = vg_section(metadata)
    again = vg_from_text(parse(metadata_bytes(metadata)))
    assert vg_section(again) == section
    assert vg_section(metadata.copy()) == section
    assert vg_section(vg_from_text(parse(vg.backup()))) == section
    for lv in metadata.lvs:
        assert lv.users is not None
        assert repr(lv)


def change(vg: lvm.VolumeGroup, path: Path) -> bool:
    """Make an LV; tell whether it was made."""
    before = path.read_bytes()
    old = vg_section(vg.metadata)
    try:
        vg.create_lv("fuzzed", extents=1)
    except LVMError:
        assert vg_section(vg.metadata) == old
        if vg.readonly_reason:
            assert path.read_bytes() == before
        return False
    new = vg_section(vg.metadata)
    assert new["seqno"] == old["seqno"] + 1
    return True
