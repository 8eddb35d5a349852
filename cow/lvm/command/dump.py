"""pvck --dump: label and metadata areas as they are on disk, field by field, right or wrong.

The fields are those of cow.lvm.label and cow.lvm.mda; nothing is believed here, so that damage can
be looked at. What differs from what should be there gets a line "CHECK: … expected …".
"""

from __future__ import annotations

import contextlib
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from cow import _core
from cow.lvm.devices import Devices
from cow.lvm.errors import LVMError, MetadataError
from cow.lvm.label import SECTORS, checksum
from cow.lvm.mda import HEADER_SIZE, MAGIC
from cow.lvm.text import parse
from cow.mapper import Mapper
from cow.units import SECTOR_SIZE

STANDARD_SECTOR: Final = 1
MAX_LOCATIONS: Final = 30
"""How many entries of a list are read at most; more than fit in a sector."""

_ID = re.compile(rb"[0-9A-Za-z!#]{32}")
_COPY = re.compile(
    rb"(?a)([A-Za-z0-9._+-]{1,127}) \{\nid = \"([0-9A-Za-z!#-]{38})\"\nseqno = (\d+)"
)


@contextlib.contextmanager
def open_device(mapper: Mapper | None, path: str) -> Iterator[_core.BlockDevice]:
    """Open a device to look at it."""
    devices = Devices(mapper, readonly=True)
    try:
        yield devices.open(path)
    finally:
        devices.close()


@dataclass
class Area:
    """A metadata area, as the label has it and then as its header has it."""

    number: int
    start: int
    size: int
    committed: tuple[int, int, int] = (0, 0, 0)
    """Offset, size and checksum of the text."""
    ignored: bool = False


@dataclass
class Dump:
    """Lines about a device, and the areas that were found on the way."""

    device: _core.BlockDevice
    lines: list[str] = field(default_factory=list)
    areas: list[Area] = field(default_factory=list)

    def read(self, offset: int, size: int) -> bytes:
        """Read what is there; zeros behind the end."""
        end = min(offset + size, self.device.size)
        data = self.device.pread(end - offset, offset) if offset < end else b""
        return bytes(data).ljust(size, b"\0")

    def value(self, name: str, value: object) -> None:
        """Write a line for a field."""
        self.lines.append(f"{name} {value}")

    def check(self, name: str, found: object, wanted: object) -> None:
        """Write a line if a field is not as it should be."""
        if found != wanted:
            shown = f"{wanted:#x}" if name.endswith(("crc", "checksum")) else wanted
            self.lines.append(f"CHECK: {name} expected {shown}")


def headers(device: _core.BlockDevice, sector: int | None = None) -> Dump:
    """Dump label and headers of the metadata areas."""
    dump = Dump(device)
    if sector is None:
        starts = (dump.read(n * SECTOR_SIZE, 8) for n in range(SECTORS))
        found = [n for n, start in enumerate(starts) if start == b"LABELONE"]
        sector = found[0] if found else STANDARD_SECTOR
    _label(dump, sector)
    for area in dump.areas:
        _area(dump, area)
    if not dump.areas:
        dump.lines.append("zero metadata copies")
    return dump


def _text(data: bytes) -> str:
    return "".join(chr(byte) if 32 <= byte < 127 else "?" for byte in data)


def _label(dump: Dump, sector: int) -> None:
    start = sector * SECTOR_SIZE
    data = dump.read(start, SECTOR_SIZE)
    name, number, crc, offset, kind = struct.unpack_from("<8sQII8s", data)
    dump.value("label_header at", start)
    dump.value("label_header.id", _text(name))
    dump.value("label_header.sector", number)
    dump.value("label_header.crc", f"{crc:#x}")
    dump.value("label_header.offset", offset)
    dump.value("label_header.type", _text(kind))
    for label, found, wanted in (
        ("id", _text(name), "LABELONE"),
        ("sector", number, sector),
        ("crc", crc, checksum(data[20:])),
        ("offset", offset, 32),
        ("type", _text(kind), "LVM2 001"),
    ):
        dump.check(f"label_header.{label}", found, wanted)
    at = 32
    dump.value("pv_header at", start + at)
    pv_id, size = struct.unpack_from("<32sQ", data, at)
    dump.value("pv_header.pv_uuid", _text(pv_id))
    dump.value("pv_header.device_size", size)
    if not _ID.fullmatch(pv_id):
        dump.lines.append("CHECK: pv_header.pv_uuid invalid format")
    _locations(dump, data, start, at + 40)


def _locations(dump: Dump, data: bytes, start: int, at: int) -> None:
    """Dump the lists of data areas and metadata areas, and the extension with its list."""
    number = 0
    for what in ("data", "metadata"):
        while at + 16 <= SECTOR_SIZE and number < MAX_LOCATIONS:
            offset, size = struct.unpack_from("<QQ", data, at)
            end = offset == 0
            comment = "location list end" if end else f"location of {what} area"
            _location(dump, f"pv_header.disk_locn[{number}]", start + at, comment, offset, size)
            if what == "metadata" and not end:
                dump.areas.append(Area(len(dump.areas) + 1, offset, size))
            at += 16
            number += 1
            if end:
                break
    if at + 8 > SECTOR_SIZE:
        return
    version, flags = struct.unpack_from("<II", data, at)
    dump.value("pv_header_extension at", start + at)
    dump.value("pv_header_extension.version", version)
    dump.value("pv_header_extension.flags", flags)
    at += 8
    number = 0
    while at + 16 <= SECTOR_SIZE and number < MAX_LOCATIONS:
        offset, size = struct.unpack_from("<QQ", data, at)
        comment = "location of bootloader area" if offset else "location list end"
        name = f"pv_header_extension.disk_locn[{number}]"
        _location(dump, name, start + at, comment, offset, size)
        at += 16
        number += 1
        if not offset:
            break


def _location(dump: Dump, name: str, at: int, comment: str, offset: int, size: int) -> None:
    dump.lines.append(f"{name} at {at} # {comment}")
    dump.value(f"{name}.offset", offset)
    dump.value(f"{name}.size", size)


def _area(dump: Dump, area: Area) -> None:
    name = f"mda_header_{area.number}"
    data = dump.read(area.start, HEADER_SIZE)
    crc, magic, version, start, size = struct.unpack_from("<I16sIQQ", data)
    dump.lines.append(f"{name} at {area.start} # metadata area")
    dump.value(f"{name}.checksum", f"{crc:#x}")
    dump.value(f"{name}.magic", f"0x{magic.hex()}")
    dump.value(f"{name}.version", version)
    dump.value(f"{name}.start", start)
    dump.value(f"{name}.size", size)
    dump.check(f"{name}.checksum", crc, checksum(data[4:]))
    if magic != MAGIC:
        dump.lines.append(f"CHECK: {name}.magic expected 0x{MAGIC.hex()}")
    dump.check(f"{name}.version", version, 1)
    for what, found, wanted in (("start", start, area.start), ("size", size, area.size)):
        if found != wanted:
            of_label = "offset" if what == "start" else what
            dump.lines.append(
                f"CHECK: {name}.{what} does not match pv_header.disk_locn.{of_label} {wanted}"
            )
    for slot, comment in enumerate(("commit", "precommit")):
        _slot(dump, area, f"{name}.raw_locn[{slot}]", data, 40 + 24 * slot, comment)
    _text_line(dump, area)


def _slot(dump: Dump, area: Area, name: str, data: bytes, at: int, comment: str) -> None:
    offset, size, crc, flags = struct.unpack_from("<QQII", data, at)
    wrapped = " wrapped" if offset and offset + size > area.size else ""
    dump.lines.append(f"{name} at {area.start + at} # {comment}{wrapped}")
    dump.value(f"{name}.offset", offset)
    dump.value(f"{name}.size", size)
    dump.value(f"{name}.checksum", f"{crc:#x}")
    ignored = " # RAW_LOCN_IGNORED" if flags & 1 else ""
    dump.value(f"{name}.flags", f"{flags:#x}{ignored}")
    if comment == "commit":
        area.committed = (offset, size, crc)
        area.ignored = bool(flags & 1)
    elif offset or size or crc or flags:
        dump.lines.append(f"CHECK: {name} for precommit not empty")


def area_text(dump: Dump, area: Area) -> bytes:
    """Return the committed text of an area as it is on disk, with its NUL; b"" if there is none."""
    offset, size, _ = area.committed
    if not HEADER_SIZE <= offset < area.size or not 0 < size <= area.size - HEADER_SIZE:
        return b""
    first = min(size, area.size - offset)
    text = dump.read(area.start + offset, first)
    return text + dump.read(area.start + HEADER_SIZE, size - first) if first < size else text


def _text_line(dump: Dump, area: Area) -> None:
    text = area_text(dump, area)
    offset, size, crc = area.committed
    if not offset or area.ignored:
        return
    where = f"metadata text at {area.start + offset}"
    if checksum(text) != crc:
        dump.lines.append(
            f"CHECK: {where} crc does not match mda_header_{area.number}.raw_locn[0].checksum"
        )
    found = _COPY.match(text)
    try:
        parse(text.partition(b"\0")[0])
    except MetadataError:
        found = None
    if found is None:
        dump.lines.append(f"CHECK: failed to parse {where} size {size}")
    name, seqno = (found[1].decode(), int(found[3])) if found else ("?", 0)
    dump.lines.append(f"{where} crc {checksum(text):#x} # vgname {name} seqno {seqno}")


def metadata(device: _core.BlockDevice) -> tuple[list[str], bytes]:
    """Return the line about the committed text of the first area that has one, and the text.

    Without an area the lines are those that tell so.
    """
    dump = headers(device)
    if not dump.areas:
        return _complaints(dump), b""
    for area in dump.areas:
        if text := area_text(dump, area):
            line = next(
                each
                for each in dump.lines
                if each.startswith(f"metadata text at {area.start + area.committed[0]} ")
            )
            return [line], text.partition(b"\0")[0]
    raise LVMError("No metadata text found on the device.")


def copies(device: _core.BlockDevice, *, search: bool) -> list[str]:
    """Return a line for each text that is still in the rings, old generations too."""
    dump = headers(device)
    lines = [] if dump.areas else _complaints(dump)
    if search and not dump.areas:
        area = Area(1, 4096, (1 << 20) - 4096)
        dump.areas.append(area)
        lines[-1:] = [
            f"Using common defaults for first mda: offset {area.start} size {area.size}.",
            'Override defaults with --settings "mda_offset=<bytes> mda_size=<bytes>"',
        ]
    for area in dump.areas:
        if search:
            lines.append(f"Searching for metadata at offset {area.start} size {area.size}")
        lines += _ring_copies(dump, area)
    return lines


def _complaints(dump: Dump) -> list[str]:
    """Return what is said of headers without a metadata area."""
    return [line for line in dump.lines if line.startswith(("CHECK: ", "zero "))]


def _ring_copies(dump: Dump, area: Area) -> Iterator[str]:
    ring = dump.read(area.start, min(area.size, 64 << 20))
    for at in range(HEADER_SIZE, len(ring), SECTOR_SIZE):
        found = _COPY.match(ring, at)
        if not found:
            continue
        end = ring.find(b"\0", at)
        text = ring[at:] if end < 0 else ring[at : end + 1]
        if end < 0:  # goes on at the beginning of the ring
            rest = ring[HEADER_SIZE : ring.find(b"\0", HEADER_SIZE) + 1]
            text += rest
        yield (
            f"metadata at {area.start + at} length {len(text)} crc {checksum(text):08x}"
            f" vg {found[1].decode()} seqno {int(found[3])} id {found[2].decode()}"
        )


def check_lines(device: _core.BlockDevice, name: str) -> list[str]:
    """Say what is found where; LVMError if there is no label."""
    dump = headers(device)
    sector = int(dump.lines[0].split()[-1]) // SECTOR_SIZE
    if any(line.startswith("CHECK: label_header") for line in dump.lines):
        raise LVMError(f"Could not find LVM label on {name}")
    lines = [f"Found label on {name}, sector {sector}, type=LVM2 001"]
    lines += [
        f"Found text metadata area: offset={area.start}, size={area.size}" for area in dump.areas
    ]
    return lines
