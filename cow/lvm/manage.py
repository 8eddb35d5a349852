"""What there is no VG for yet, or no more: make and remove PVs, make VGs, restore lost ones."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from cow.lvm.check import check_change, reading_problems, refuse_change
from cow.lvm.commit import flush_devices, new_header, usable_mdas, write_generation
from cow.lvm.create import check_policy
from cow.lvm.devices import Devices
from cow.lvm.errors import AlreadyExists, InUse, LVMError, MetadataError, PVNotFound, RequestError
from cow.lvm.group import VolumeGroup
from cow.lvm.label_scan import Findings, scan_devices
from cow.lvm.mda import REPAIRABLE
from cow.lvm.metadata import VolumeGroupMetadata
from cow.lvm.metadata_text import vg_from_text
from cow.lvm.names import check_tag, check_vg_name, dashed_id, new_id, plain_id
from cow.lvm.pv import (
    PVOptions,
    check_new_device,
    check_unused,
    connect_pvs,
    device_hint,
    layout,
    make_pv,
    make_pvs,
    new_pv,
    resize_unused,
    set_used,
    size_of,
    unmake_pv,
)
from cow.lvm.text import parse
from cow.mapper import Mapper
from cow.units import bytes_of, is_power_of_2

log = logging.getLogger("cow.lvm")

Report = Callable[[str], None]
Confirm = Callable[[str], bool]

DEFAULT_EXTENT_SIZE = 8192
"""Sectors."""


def _yes(question: str) -> bool:
    return True


def create_pv(
    path: str,
    *,
    mapper: Mapper | None = None,
    others: Iterable[str] = (),
    restore: str | None = None,
    report: Report = log.info,
    confirm: Confirm = _yes,
    **options: Any,  # noqa: ANN401
) -> str:
    """Make a PV of a device and return its uuid; `options` are those of PVOptions.

    `others` are devices that are looked at too, for a PV of the same uuid. `restore` is the text of
    a backup: a PV it names by `uuid` gets the layout it had. InUse if the PV belongs to a VG.
    """
    choice = PVOptions(**options)
    devices = Devices(mapper)
    try:
        device = devices.open(path)
        devices.open_all(others)
        findings = scan_devices(devices.items())
        for found in (*findings.devices, *findings.duplicates):
            if found.device is device and found.vg_name:
                raise InUse(
                    f'Can\'t initialize physical volume "{path}" of volume group'
                    f' "{found.vg_name}" without -ff\n{path}: physical volume not initialized.'
                )
            if found.device is device:
                check_unused(found, "physical volume not initialized.")
                continue
            if choice.uuid is not None and found.label.pv_id == plain_id(choice.uuid):
                raise AlreadyExists(f'uuid {choice.uuid} already in use on "{found.path}".')
        if restore is not None:
            choice = _as_it_was(choice, restore, findings, report)
        label = layout(path, device.size, choice)
        if not any(found.device is device for found in findings.devices):
            check_new_device(path, device, confirm, report)
        make_pv(path, device, choice, label)
    finally:
        devices.close()
    report(f'Physical volume "{path}" successfully created.')
    return label.pv_id


def _as_it_was(options: PVOptions, text: str, findings: Findings, report: Report) -> PVOptions:
    """Return the options that give a PV the layout that a backup says it had, on any device."""
    if options.uuid is None:
        raise RequestError("--uuid is required with --restorefile")
    vg = vg_from_text(parse(text))
    there = {found.label.pv_id for found in findings.devices}
    for missing in (pv for pv in vg.pvs if pv.id not in there):
        report(f"WARNING: Couldn't find device with uuid {dashed_id(missing.id)}.")
    pv = vg.pv_with_id(plain_id(options.uuid))
    if pv is None:
        raise PVNotFound(f"Can't find uuid {options.uuid} in backup file")
    return PVOptions(
        uuid=options.uuid,
        size=options.size,
        metadata_copies=options.metadata_copies,
        metadata_ignore=options.metadata_ignore,
        label_sector=options.label_sector,
        pe_start=bytes_of(pv.pe_start),
        extents_end=bytes_of(pv.pe_start + pv.pe_count * vg.extent_size),
        bootloader_area_start=bytes_of(pv.ba_start),
        bootloader_area_size=bytes_of(pv.ba_size),
    )


def remove_pv(
    path: str,
    *,
    mapper: Mapper | None = None,
    others: Iterable[str] = (),
    report: Report = log.info,
) -> None:
    """Take the label off a device. InUse if the PV belongs to a VG.

    `others` are further devices, whose metadata may name the PV.
    """
    devices = Devices(mapper)
    try:
        device = devices.open(path)
        devices.open_all(others)
        findings = scan_devices(devices.items())
        pvs = (*findings.devices, *findings.duplicates)
        found = next((each for each in pvs if each.device is device), None)
        if found is None:
            raise PVNotFound(f"No PV found on device {path}.")
        check_unused(found, "physical volume label not removed.")
        unmake_pv(found)
    finally:
        devices.close()
    report(f'Labels on physical volume "{path}" successfully wiped.')


def resize_pv(
    path: str,
    *,
    mapper: Mapper | None = None,
    others: Iterable[str] = (),
    size: int | None = None,
    report: Report = log.info,
) -> None:
    """Let a PV that no VG has be as large as its device, or `size` bytes.

    `others` are further devices, whose metadata may name the PV: InUse. One of a VG is resized with
    VolumeGroup.resize_pv.
    """
    devices = Devices(mapper)
    try:
        device = devices.open(path)
        devices.open_all(others)
        findings = scan_devices(devices.items())
        pvs = (*findings.devices, *findings.duplicates)
        found = next((each for each in pvs if each.device is device), None)
        if found is None:
            raise PVNotFound(f'Failed to find physical volume "{path}".')
        check_unused(found, "physical volume not resized.")
        resize_unused(found, size_of(device) if size is None else size)
    finally:
        devices.close()
    report(f'Physical volume "{path}" changed')


def create_vg(
    name: str,
    paths: Sequence[str],
    *,
    mapper: Mapper | None = None,
    others: Iterable[str] = (),
    extent_size: int = DEFAULT_EXTENT_SIZE,
    max_lv: int = 0,
    max_pv: int = 0,
    tags: Sequence[str] = (),
    policy: str | None = None,
    flags: Sequence[str] = (),
    command: str = "",
    report: Report = log.info,
    confirm: Confirm = _yes,
    **options: Any,  # noqa: ANN401
) -> VolumeGroup:
    """Make a VG of PVs and open it; devices without a PV get one, as `options` (PVOptions) say.

    `extent_size` in sectors. `others` are devices of VGs that may have the name already.
    """
    check_vg_name(name)
    check_extent_size(extent_size)
    check_policy(policy)
    for tag in tags:
        check_tag(tag)
    devices = Devices(mapper)
    try:
        devices.open_all([*paths, *others])
        findings = scan_devices(devices.items())
        if any(vg.name == name for vg in findings.vgs):
            raise AlreadyExists(f"A volume group called {name} already exists.")
        members = make_pvs(paths, devices, findings, PVOptions(**options), confirm, report)
        vg = VolumeGroupMetadata(
            name=name,
            id=new_id(),
            seqno=1,
            extent_size=extent_size,
            max_lv=max_lv,
            max_pv=max_pv,
            tags=list(dict.fromkeys(tags)),
            flags=list(flags),
            allocation_policy=None if policy in ("inherit", "normal") else policy,
        )
        vg.pvs = [new_pv(found, extent_size) for found in members]
        vg.number_pvs()
        for pv in vg.pvs:
            pv.device_hint = device_hint(pv)
        described = command or f"vgcreate {name} {' '.join(paths)}"
        vg.header = new_header(vg.header, f"Write from {described}.")
        check_change(None, vg)
        for found in members:
            set_used(found, True)
        flush_devices(found.device for found in members)
        write_generation(vg, vg, usable_mdas(vg), report=report)
        report(f'Volume group "{name}" successfully created')
        return VolumeGroup.of_devices(devices, vg.id)
    except BaseException:
        devices.close()
        raise


def check_extent_size(extent_size: int) -> None:
    """Refuse an extent size, in sectors, that LVM does not have."""
    if extent_size == 0:
        raise RequestError("Physical extent size may not be zero")
    if not 0 < extent_size < 2**32:
        raise RequestError(f"Physical extent size {extent_size} sectors is out of range.")
    if not is_power_of_2(extent_size) and extent_size % 256:
        raise LVMError(
            "Physical Extent size must be a multiple of 128.00 KiB when not a power of 2."
        )


def restore_vg(
    text: str,
    paths: Sequence[str],
    *,
    mapper: Mapper | None = None,
    command: str = "",
    report: Report = log.info,
) -> None:
    """Write the metadata of a backup to its PVs, whatever is there of the VG now (vgcfgrestore).

    Every PV it names has to be there by its uuid, and in no other VG; none of its LVs may be
    active.
    """
    new = vg_from_text(parse(text))
    if wrong := reading_problems(new):
        raise MetadataError(wrong[0])
    devices = Devices(mapper)
    try:
        devices.open_all(paths)
        findings = scan_devices(devices.items())
        for found in findings.devices:
            if new.pv_with_id(found.label.pv_id) and found.vg_name not in ("", new.name):
                raise InUse(
                    f"Physical volume '{found.path}' is already in volume group '{found.vg_name}'"
                )
        if any(vg.name == new.name and vg.id != new.id for vg in findings.vgs):
            raise AlreadyExists(f"A volume group called {new.name} already exists.")
        seqnos = [copy.seqno for vg in findings.vgs if vg.id == new.id for copy in vg.copies]
        connect_pvs(new, findings.devices)
        refuse_change(new)
        new.number_pvs()
        new.seqno = max([new.seqno, *seqnos]) + 1
        for pv in new.pvs:
            pv.device_hint = device_hint(pv)
        described = command or f"vgcfgrestore {new.name}"
        new.header = new_header(new.header, f"Write from {described}.")
        members = [each for each in findings.devices if new.pv_with_id(each.label.pv_id)]
        for found in members:
            set_used(found, True)
        flush_devices(found.device for found in members)
        mdas = [mda for pv in new.pvs for mda in pv.mdas if not mda.ignored]
        mdas = [mda for mda in mdas if not mda.bad & ~REPAIRABLE]
        write_generation(new, new, mdas, report=report)
    finally:
        devices.close()
    report(f"Restored volume group {new.name}.")
