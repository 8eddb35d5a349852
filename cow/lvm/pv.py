"""Make and unmake PVs: where label, metadata areas and the first extent go; signatures of others.

    sector 0–3    label                              4 KiB       mda1, up to the bootloader area
    then          bootloader area, where asked for   pe_start    extents, up to mda2 at the end

Everything behind the label is aligned to the data alignment, 1 MiB where nothing else is asked for.
(format_text/format-text.c)
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from cow import _core
from cow.device import Device
from cow.image import Image
from cow.lvm.devices import Devices
from cow.lvm.errors import InUse, LVMError, NoSpaceError, PVNotFound, RequestError
from cow.lvm.label import (
    EXTENSION_USED,
    EXTENSION_VERSION,
    SECTORS,
    STANDARD_SECTOR,
    Label,
    Region,
    wipe_labels,
    write_label,
)
from cow.lvm.label_scan import Findings, PVDevice
from cow.lvm.mda import MetadataArea
from cow.lvm.metadata import PhysicalVolume, VolumeGroupMetadata
from cow.lvm.names import dashed_id, new_id, plain_id
from cow.lvm.size import display_size
from cow.mapper import DIRECTORY
from cow.units import SECTOR_SIZE, sectors

MDA_START: Final = 4096
DEFAULT_ALIGNMENT: Final = 1 << 20
DEFAULT_METADATA_SIZE: Final = DEFAULT_ALIGNMENT - MDA_START
MIN_METADATA_SIZE: Final = 8 * 4096
MIN_PV_SIZE: Final = 2 << 20
"""Bytes: LVM does not look for PVs on smaller devices."""


@dataclass(frozen=True)
class PVOptions:
    """How a PV is laid out; sizes in bytes."""

    uuid: str | None = None
    size: int | None = None
    """Taken instead of the device's."""
    data_alignment: int | None = None
    data_alignment_offset: int = 0
    metadata_size: int | None = None
    metadata_copies: int = 1
    metadata_ignore: bool = False
    bootloader_area_size: int = 0
    label_sector: int = STANDARD_SECTOR
    pe_start: int | None = None
    """Taken instead of what alignment and sizes give: the layout a PV had before."""
    extents_end: int | None = None
    """With `pe_start`: where its extents ended, which a second metadata area may not cross."""
    bootloader_area_start: int = 0


def layout(path: str, device_size: int, options: PVOptions) -> Label:
    """Work out the label of a new PV; RequestError or NoSpaceError if it cannot be."""
    if device_size < MIN_PV_SIZE:
        raise NoSpaceError(f"Cannot use {path}: device is too small (pv_min_size)")
    size = device_size if options.size is None else options.size // SECTOR_SIZE * SECTOR_SIZE
    if size < MIN_PV_SIZE:
        raise RequestError(f"{path}: Size must exceed minimum of {sectors(MIN_PV_SIZE)} sectors.")
    if size > device_size:
        raise RequestError(f"{path}: Size {size} is more than the device's {device_size} bytes.")
    if not 0 <= options.label_sector < SECTORS:
        raise RequestError(f"labelsector must be less than {SECTORS}.")
    if options.metadata_copies not in (0, 1, 2):
        raise RequestError("Metadatacopies may only be 0, 1 or 2")
    label = Label(
        pv_id=new_id() if options.uuid is None else plain_id(options.uuid),
        device_size=size,
        data_areas=[],
        sector=options.label_sector,
    )
    if options.pe_start is None:
        _lay_out_new(path, label, options)
    else:
        _lay_out_as_before(path, label, options, options.pe_start)
    return label


def _lay_out_new(path: str, label: Label, options: PVOptions) -> None:
    size = label.device_size
    alignment = options.data_alignment or DEFAULT_ALIGNMENT
    offset = options.data_alignment_offset
    for name, value in (("alignment", alignment), ("alignment offset", offset)):
        if value < 0 or value % SECTOR_SIZE:
            raise RequestError(f"Data {name} must be whole sectors, not {value} bytes")
    if alignment > size:
        raise RequestError(f"{path}: Data alignment must not exceed device size.")
    wanted = DEFAULT_METADATA_SIZE
    if options.metadata_size is not None:
        wanted = max(options.metadata_size, MIN_METADATA_SIZE)
    start = _up(MDA_START + wanted, alignment) + offset
    if options.metadata_copies:
        label.metadata_areas.append(Region(MDA_START, start - MDA_START))
    if options.bootloader_area_size:
        boot = Region(start, _up(options.bootloader_area_size, alignment))
        label.bootloader_areas.append(boot)
        start += boot.size
    end = size
    if options.metadata_copies == 2:
        end = (size - wanted) // alignment * alignment
        label.metadata_areas.append(Region(end, size - end))
    if start >= end:
        raise NoSpaceError(f"{path}: no room for extents beside the metadata areas.")
    label.data_areas.append(Region(start, 0))


def _lay_out_as_before(path: str, label: Label, options: PVOptions, start: int) -> None:
    boot = Region(options.bootloader_area_start, options.bootloader_area_size)
    if boot.size:
        label.bootloader_areas.append(boot)
    end = boot.offset if boot.size else start
    extents_end = start if options.extents_end is None else options.extents_end
    if extents_end > label.device_size:
        raise NoSpaceError(
            f"Physical extents ({display_size(sectors(extents_end) - 1)}) end beyond end of device"
            f" ({display_size(sectors(label.device_size))}) {path}.\n"
            f"Format-specific initialisation of physical volume {path} failed.\n"
            f'Failed to setup physical volume "{path}".'
        )
    if options.metadata_copies:
        if end - MDA_START < MIN_METADATA_SIZE:
            raise NoSpaceError(f"{path}: no room for a metadata area before byte {end}.")
        label.metadata_areas.append(Region(MDA_START, end - MDA_START))
    if options.metadata_copies == 2:
        second = _up(extents_end, MDA_START)
        if label.device_size - second < MIN_METADATA_SIZE:
            raise NoSpaceError(f"{path}: no room for a metadata area behind byte {second}.")
        label.metadata_areas.append(Region(second, label.device_size - second))
    label.data_areas.append(Region(start, 0))


def _up(value: int, alignment: int) -> int:
    return -(-value // alignment) * alignment


def make_pv(path: str, device: _core.BlockDevice, options: PVOptions, label: Label) -> PVDevice:
    """Write label and empty metadata areas, the label last; what was in its place is wiped."""
    device.pwrite(bytes(SECTORS * SECTOR_SIZE), 0)
    mdas = [
        MetadataArea(device, path, region.offset, region.size, number)
        for number, region in enumerate(label.metadata_areas, 1)
    ]
    for mda in mdas:
        mda.initialize(ignored=options.metadata_ignore)
    device.flush()
    write_label(device, label)
    device.flush()
    return PVDevice(path, device, label, mdas)


def unmake_pv(found: PVDevice) -> None:
    """Zero the label: the device is no PV any more."""
    wipe_labels(found.device)
    found.device.flush()


def resize_unused(found: PVDevice, size: int) -> None:
    """Write another size, in bytes, into the label of a PV that no VG has."""
    check_pv_size(found.path, sectors(size))
    label = found.label
    if size > size_of(found.device):
        raise LVMError(f"{found.path}: {size} bytes are more than the device has.")
    if label.data_areas and size <= label.data_areas[0].offset:
        raise LVMError(
            "Size must exceed physical extent start of"
            f" {sectors(label.data_areas[0].offset)} sectors on PV {found.path}."
        )
    if any(region.offset > MDA_START for region in label.metadata_areas):
        raise LVMError(f"{found.path}: its second metadata area, at the end, cannot be moved.")
    label.device_size = size // SECTOR_SIZE * SECTOR_SIZE
    write_label(found.device, label)
    found.device.flush()


def set_used(found: PVDevice, used: bool) -> None:
    """Write into a label, as the extension of today has it, whether the PV belongs to a VG."""
    label = found.label
    label.extension_version = max(label.extension_version, EXTENSION_VERSION)
    flags = label.extension_flags & ~EXTENSION_USED
    label.extension_flags = flags | (EXTENSION_USED if used else 0)
    write_label(found.device, label)


def check_pv_size(path: str, size: int) -> None:
    """Refuse to resize a PV to a size, in sectors, that LVM does not have."""
    if size < sectors(MIN_PV_SIZE):
        raise LVMError(f"Size must exceed minimum of {sectors(MIN_PV_SIZE)} sectors on PV {path}.")


def size_of(device: _core.BlockDevice) -> int:
    """Return the size of a device in bytes; an open image grows with its file first."""
    if isinstance(device, Image):
        with device.gate:
            device.update_size()
    return device.size


def new_pv(found: PVDevice, extent_size: int) -> PhysicalVolume:
    """Return the PV as a VG's metadata has it; `extent_size` in sectors."""
    label = found.label
    start = label.data_areas[0].offset if label.data_areas else DEFAULT_ALIGNMENT
    end = label.device_size
    for region in label.metadata_areas:
        if region.offset > start:
            end = min(end, region.offset)
    pe_count = max(sectors(end - start) // extent_size, 0)
    boot = label.bootloader_areas[0] if label.bootloader_areas else Region(0, 0)
    return PhysicalVolume(
        label="",
        id=label.pv_id,
        pe_start=sectors(start),
        pe_count=pe_count,
        dev_size=sectors(label.device_size),
        device_hint=found.path,
        ba_start=sectors(boot.offset),
        ba_size=sectors(boot.size),
        device=found.device,
        path=found.path,
        mdas=found.mdas,
    )


def device_hint(pv: PhysicalVolume) -> str:
    """Return what a text says about where the PV was last seen."""
    if isinstance(pv.device, Image):
        return os.path.abspath(pv.device.path)
    if isinstance(pv.device, Device):
        return DIRECTORY + pv.device.name
    return pv.device_hint


def connect_pvs(vg: VolumeGroupMetadata, devices: Sequence[PVDevice]) -> None:
    """Give the PVs of a text their devices; PVNotFound if one is not there."""
    for pv in vg.pvs:
        at = next((each for each in devices if each.label.pv_id == pv.id), None)
        if at is None:
            raise PVNotFound(f"Couldn't find device with uuid {dashed_id(pv.id)}.")
        at.vg_name, at.vg_id = vg.name, vg.id
        pv.device, pv.path, pv.mdas = at.device, at.path, at.mdas


# What may be lost.


def find_signatures(device: _core.BlockDevice) -> list[tuple[str, int]]:
    """Return (name, offset in bytes) of file systems and the like that are on a device."""
    found = []
    for name, offset, magic in _SIGNATURES:
        if device.pread(len(magic), offset) == magic:
            found.append((name, offset))
    return found


def is_partitioned(device: _core.BlockDevice) -> bool:
    """Tell whether there is a partition table: GPT, or MBR with an entry that can be one."""
    start = device.pread(2 * SECTOR_SIZE, 0)
    if start[SECTOR_SIZE : SECTOR_SIZE + 8] == b"EFI PART":
        return True
    if start[510:512] != b"\x55\xaa" or start[54:59] in (b"FAT12", b"FAT16"):
        return False
    if start[82:87] == b"FAT32" or start[3:11] in (b"NTFS    ", b"EXFAT   "):
        return False
    entries = [struct.unpack_from("<B3xB3xII", start, 446 + 16 * i) for i in range(4)]
    if any(status not in (0, 0x80) for status, _, _, _ in entries):
        return False
    return any(kind and length for _, kind, _, length in entries)


_SIGNATURES = (
    ("ext4", 0x438, b"\x53\xef"),
    ("xfs", 0, b"XFSB"),
    ("btrfs", 0x10040, b"_BHRfS_M"),
    ("swap", 4086, b"SWAPSPACE2"),
    ("crypto_LUKS", 0, b"LUKS\xba\xbe"),
    ("DM_snapshot_cow", 0, b"SnAp"),
    ("linux_raid_member", 4096, b"\xfc\x4e\x2b\xa9"),
    ("vfat", 82, b"FAT32   "),
    ("vfat", 54, b"FAT16   "),
    ("ntfs", 3, b"NTFS    "),
    ("iso9660", 0x8001, b"CD001"),
)


def check_new_device(
    path: str,
    device: _core.BlockDevice,
    confirm: Callable[[str], bool],
    report: Callable[[str], None],
) -> None:
    """Refuse a device with partitions; wipe signatures of file systems if that is confirmed."""
    if is_partitioned(device):
        raise InUse(f"Cannot use {path}: device is partitioned")
    for name, offset in find_signatures(device):
        where = f"{name} signature detected on {path} at offset {offset}"
        if not confirm(f"WARNING: {where}. Wipe it?"):
            raise LVMError(f"Aborted wiping of {name}.")
    for name, offset in find_signatures(device):
        report(f"Wiping {name} signature on {path}.")
        magic = next(m for n, o, m in _SIGNATURES if (n, o) == (name, offset))
        device.pwrite(bytes(len(magic)), offset)


def make_pvs(
    paths: Sequence[str],
    devices: Devices,
    findings: Findings,
    options: PVOptions,
    confirm: Callable[[str], bool],
    report: Callable[[str], None],
) -> list[PVDevice]:
    """Return PVs that no VG has, for each path: those that are there, others made."""
    if not paths:
        raise RequestError("Please enter physical volume paths")
    found = []
    for path in dict.fromkeys(paths):
        device = devices.open(path)
        there = next((each for each in findings.devices if each.device is device), None)
        if any(each.device is device for each in findings.duplicates):
            raise InUse(f"Cannot use device {path} with duplicates.")
        if there is not None and there.vg_name:
            raise InUse(
                f"Physical volume '{path}' is already in volume group '{there.vg_name}'\n"
                f"Unable to add physical volume '{path}' to volume group '{there.vg_name}'\n"
                f"{path}: physical volume not initialized."
            )
        if there is not None and there.claimed:
            raise InUse(
                f"PV {path} is used by a VG but its metadata is missing.\n"
                f"Can't initialize PV '{path}' without -ff."
            )
        if there is None:
            layout(path, device.size, options)
            check_new_device(path, device, confirm, report)
        found.append((path, device, there))
    made = []
    for path, device, there in found:
        if there is None:
            label = layout(path, device.size, options)
            there = make_pv(path, device, options, label)
            report(f'Physical volume "{path}" successfully created.')
        made.append(there)
    return made


def check_unused(found: PVDevice, action: str) -> None:
    """Refuse to touch a PV that belongs to a VG."""
    if found.vg_name:
        raise InUse(
            f"PV {found.path} is used by VG {found.vg_name} so please use vgreduce first.\n"
            f"{found.path}: {action}"
        )
    if found.claimed:
        raise InUse(
            f"PV {found.path} is used by a VG but its metadata is missing.\n{found.path}: {action}"
        )
