"""The label of a PV: one of the first four sectors, with the uuid and where everything lies.

In the sector, little-endian: "LABELONE", u64 its own number, u32 checksum of what follows, u32
where the PV header begins, "LVM2 001"; the PV header: 32 characters of uuid, u64 size of the device
in bytes, then three lists of (u64 offset, u64 size) in bytes, each ended by offset 0: data areas,
metadata areas, and, behind u32 version and u32 flags of the extension, bootloader areas.
(lib/label/label.c, format_text/layout.h)
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from cow.lvm.errors import MetadataError
from cow.lvm.names import ID_LENGTH
from cow.units import SECTOR_SIZE

if TYPE_CHECKING:
    from cow import _core

MAGIC: Final = b"LABELONE"
TYPE: Final = b"LVM2 001"
SECTORS: Final = 4
"""A label is in one of so many sectors from the start of the device."""
STANDARD_SECTOR: Final = 1

EXTENSION_VERSION: Final = 2
EXTENSION_USED: Final = 1
"""The flag of the extension that says: the PV belongs to a VG."""

_HEAD = struct.Struct("<8sQII8s")
_CHECKED_FROM = 20
_PV_HEADER = struct.Struct(f"<{ID_LENGTH}sQ")
_REGION = struct.Struct("<QQ")
_EXTENSION = struct.Struct("<II")


class Region(NamedTuple):
    """A part of a device, in bytes; size 0 of a data area: up to the end."""

    offset: int
    size: int


@dataclass
class Label:
    """What a label says. `metadata_areas` are the mdas of the PV, at most two."""

    pv_id: str
    """32 characters, no dashes."""
    device_size: int
    """Bytes; the VG's text knows better."""
    data_areas: list[Region]
    metadata_areas: list[Region] = field(default_factory=list)
    bootloader_areas: list[Region] = field(default_factory=list)
    extension_version: int = EXTENSION_VERSION
    extension_flags: int = 0
    sector: int = STANDARD_SECTOR

    @property
    def used(self) -> bool:
        """Whether it says that the PV belongs to a VG."""
        return self.extension_version >= 2 and bool(self.extension_flags & EXTENSION_USED)


def checksum(*parts: bytes | memoryview) -> int:
    """Return LVM's CRC-32 of the parts in a row: its own initial value, no final inversion."""
    value = 0xF597A6CF ^ 0xFFFFFFFF
    for part in parts:
        value = zlib.crc32(part, value)
    return value ^ 0xFFFFFFFF


def read_label(
    device: _core.BlockDevice, where: str, warn: Callable[[str], None] | None = None
) -> Label | None:
    """Return the first valid label, or None; `warn` is told of those that are not."""
    start = device.pread(SECTORS * SECTOR_SIZE, 0)
    label: Label | None = None
    for number in range(len(start) // SECTOR_SIZE):
        sector = start[number * SECTOR_SIZE : (number + 1) * SECTOR_SIZE]
        if not sector.startswith(MAGIC):
            continue
        found, wrong = _parse(sector, number)
        if label is not None:
            wrong = f"Ignoring additional label on {where} at sector {number}"
        elif found is not None:
            label = found
        else:
            wrong = f"{where}: {wrong} - ignoring."
        if wrong and warn:
            warn(wrong)
    return label


def _parse(sector: bytes, number: int) -> tuple[Label | None, str]:
    """Return the label of one sector, or what is wrong with it."""
    _, own_number, crc, offset, kind = _HEAD.unpack_from(sector)
    if own_number != number:
        return (
            None,
            f"Label for sector {own_number} found at sector {number}",
        )
    if crc != checksum(sector[_CHECKED_FROM:]):
        return None, f"Label checksum incorrect at sector {number}"
    if kind != TYPE:
        return None, f"Label type {kind!r} at sector {number} is not LVM2"
    if not _HEAD.size <= offset <= SECTOR_SIZE - _PV_HEADER.size:
        return None, f"PV header at byte {offset} of the label"
    pv_id, device_size = _PV_HEADER.unpack_from(sector, offset)
    if not re.fullmatch(rb"[0-9A-Za-z!#]{32}", pv_id):
        return None, f"Label at sector {number} has no valid uuid"
    reader = _Reader(sector, offset + _PV_HEADER.size)
    label = Label(pv_id.decode(), device_size, reader.regions(), reader.regions(), sector=number)
    label.extension_version, label.extension_flags = reader.extension()
    if label.extension_version:
        label.bootloader_areas = reader.regions()
    else:
        label.extension_flags = 0
    return label, ""


class _Reader:
    """Takes one thing after the other from a label; it ends where the sector does."""

    def __init__(self, sector: bytes, at: int) -> None:
        self._sector = sector
        self._at = at

    def regions(self) -> list[Region]:
        found = []
        while self._at + _REGION.size <= len(self._sector):
            region = Region(*_REGION.unpack_from(self._sector, self._at))
            self._at += _REGION.size
            if region.offset == 0:
                break
            found.append(region)
        return found

    def extension(self) -> tuple[int, int]:
        if self._at + _EXTENSION.size > len(self._sector):
            return 0, 0
        version, flags = _EXTENSION.unpack_from(self._sector, self._at)
        self._at += _EXTENSION.size
        return version, flags


def label_bytes(label: Label) -> bytes:
    """Return the sector of a label; MetadataError if it has too many areas."""
    end = _REGION.pack(0, 0)
    header = _PV_HEADER.pack(label.pv_id.encode(), label.device_size)
    for regions in (label.data_areas, label.metadata_areas):
        header += b"".join(_REGION.pack(*region) for region in regions) + end
    header += _EXTENSION.pack(label.extension_version, label.extension_flags)
    header += b"".join(_REGION.pack(*region) for region in label.bootloader_areas) + end
    size = SECTOR_SIZE - _HEAD.size
    if len(header) > size:
        raise MetadataError(f"The label of PV {label.pv_id} does not fit into a sector.")
    checked = struct.pack("<I8s", _HEAD.size, TYPE) + header.ljust(size, b"\0")
    return struct.pack("<8sQI", MAGIC, label.sector, checksum(checked)) + checked


def write_label(device: _core.BlockDevice, label: Label) -> None:
    """Write a label into its sector."""
    device.pwrite(label_bytes(label), label.sector * SECTOR_SIZE)


def wipe_labels(device: _core.BlockDevice) -> None:
    """Zero every sector with a label in it."""
    start = device.pread(SECTORS * SECTOR_SIZE, 0)
    for number in range(len(start) // SECTOR_SIZE):
        if start.startswith(MAGIC, number * SECTOR_SIZE):
            device.pwrite(bytes(SECTOR_SIZE), number * SECTOR_SIZE)
