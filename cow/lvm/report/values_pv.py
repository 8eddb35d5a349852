"""What stands in the fields of PVs, of their pieces, and of VGs; see cow.lvm.report.values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

from cow.device import Device
from cow.image import Image
from cow.lvm.mda import Bad, MetadataArea
from cow.lvm.metadata import PhysicalVolume, VolumeGroupMetadata, may_write
from cow.lvm.names import dashed_id
from cow.lvm.report.rows import Row
from cow.lvm.report.values import Value, Values
from cow.units import sectors

# ---- PVs


def pv_name(row: Row) -> str:
    """Return how the user named the device; [unknown] if it is missing."""
    if row.pv is not None:
        return str(row.pv)
    return row.device.path if row.device is not None else row.path


def pv_uuid(row: Row) -> str:
    """Return the uuid of the PV."""
    if row.pv is not None:
        return dashed_id(row.pv.id)
    return dashed_id(row.device.label.pv_id) if row.device is not None else ""


def device_sectors(row: Row) -> int:
    """Return the size of the device below."""
    return sectors(row.device.device.size) if row.device is not None else 0


def pv_sectors(row: Row) -> int:
    """Return what a PV has for extents; of an orphan its size."""
    if row.pv is None or row.vg is None:
        known = row.device is not None and not row.duplicate
        return sectors(row.device.label.device_size) if row.device and known else 0
    return row.pv.pe_count * row.vg.extent_size


def pv_used_extents(row: Row) -> int:
    """Return how many extents of the PV are in use."""
    if row.pv is None or row.vg is None:
        return 0
    return used_extents(row.vg, row.pv)


def used_extents(vg: VolumeGroupMetadata, pv: PhysicalVolume) -> int:
    """Return how many extents of a PV the LVs of its VG use."""
    return sum(
        segment.area_extents
        for lv in vg.lvs
        for segment in lv.segments
        for area in segment.areas
        if area.of is pv
    )


def pv_free_sectors(row: Row) -> int:
    """Return what is free on a PV; an orphan is all free, unless a VG that is not there has it."""
    if row.pv is None or row.vg is None:
        return 0 if is_used(row) else pv_sectors(row)
    return (row.pv.pe_count - pv_used_extents(row)) * row.vg.extent_size


def is_used(row: Row) -> bool:
    """Tell whether the PV belongs to a VG, even to one that is not there."""
    return row.pv is not None or (row.device is not None and row.device.label.used)


def pv_attributes(row: Row) -> str:
    """Return the three letters of pv_attr."""
    pv = row.pv
    if row.duplicate:
        first = "d"
    elif pv is None:
        first = "u" if is_used(row) else "-"
    else:
        first = "a" if "ALLOCATABLE" in pv.status else "u"
    exported = row.vg is not None and "EXPORTED" in row.vg.status
    return first + ("x" if exported else "-") + ("m" if pv is not None and pv.missing else "-")


def _lacks_its_vg(row: Row) -> bool:
    device = row.device if row.piece is None else None
    return device is not None and device.claimed and not device.vg_name


def _extension_version(row: Row) -> int | None:
    known = row.device is not None and not row.duplicate
    return row.device.label.extension_version if row.device and known else None


def _mdas(row: Row) -> Sequence[MetadataArea]:
    if row.device is not None:
        return _readable(row.device.mdas)
    return _readable(row.pv.mdas) if row.pv is not None else ()


def _readable(mdas: Iterable[MetadataArea]) -> list[MetadataArea]:
    """Return the areas that count: those whose header can be read."""
    return [mda for mda in mdas if not mda.bad & Bad.HEADER]


def _free_sectors(mda: MetadataArea) -> int:
    """Return the room for text in an area; one that is ignored is not read, and has none."""
    return 0 if mda.ignored else sectors(mda.free)


def _pe_start(row: Row) -> int:
    if row.pv is not None:
        return row.pv.pe_start
    known = row.device is not None and not row.duplicate
    areas = row.device.label.data_areas if row.device and known else []
    return sectors(areas[0].offset) if areas else 0


def _boot(row: Row) -> tuple[int, int]:
    if row.pv is not None:
        return row.pv.ba_start, row.pv.ba_size
    areas = row.device.label.bootloader_areas if row.device is not None else []
    return (sectors(areas[0].offset), sectors(areas[0].size)) if areas else (0, 0)


def _number_of_device(row: Row, index: int) -> str:
    device = row.device.device if row.device is not None else None
    if row.pv is not None and row.pv.missing:
        return "0"
    return str(device.major_minor[index]) if isinstance(device, Image | Device) else "-1"


def _of_pv(tell: Callable[[PhysicalVolume], Value], absent: Value) -> Values:
    return lambda row: absent if row.pv is None else tell(row.pv)


# ---- VGs


def vg_attributes(vg: VolumeGroupMetadata) -> str:
    """Return the six letters of vg_attr."""
    policies = {"contiguous": "c", "cling": "l", "normal": "n", "anywhere": "a"}
    shared = "c" if "CLUSTERED" in vg.status else "s" if vg.needs_lockd else "-"
    return "".join(
        (
            "w" if may_write(vg.status, vg.flags) else "r",
            "z" if "RESIZEABLE" in vg.status else "-",
            "x" if "EXPORTED" in vg.status else "-",
            "p" if vg.missing_pvs else "-",
            policies.get(vg.allocation_policy or "normal", "n"),
            shared,
        )
    )


def vg_mdas(vg: VolumeGroupMetadata) -> list[MetadataArea]:
    """Return the metadata areas of all PVs."""
    return [mda for pv in vg.pvs for mda in _readable(pv.mdas)]


def _vg_mda_free(vg: VolumeGroupMetadata) -> int:
    return min((sectors(mda.free) for mda in vg_mdas(vg) if not mda.ignored), default=0)


def visible_lvs(vg: VolumeGroupMetadata) -> int:
    """Return how many LVs the user sees."""
    return sum(lv.visible for lv in vg.lvs)


def _of_vg(tell: Callable[[VolumeGroupMetadata], Value], absent: Value = "") -> Values:
    return lambda row: absent if row.vg is None else tell(row.vg)


PV_VALUES: Final[dict[str, Values]] = {
    "pv_fmt": lambda row: "lvm2" if row.pv or row.device else "",
    "pv_uuid": pv_uuid,
    "dev_size": device_sectors,
    "pv_name": pv_name,
    "pv_major": lambda row: _number_of_device(row, 0),
    "pv_minor": lambda row: _number_of_device(row, 1),
    "pv_mda_free": lambda row: min(map(_free_sectors, _mdas(row)), default=0),
    "pv_mda_size": lambda row: min((sectors(mda.size) for mda in _mdas(row)), default=0),
    "pv_ext_vsn": _extension_version,
    "pe_start": _pe_start,
    "pv_size": pv_sectors,
    "pv_free": pv_free_sectors,
    "pv_used": lambda row: pv_used_extents(row) * row.vg.extent_size if row.vg else 0,
    "pv_attr": pv_attributes,
    "pv_allocatable": _of_pv(lambda pv: "ALLOCATABLE" in pv.status, False),
    "pv_exported": lambda row: row.vg is not None and "EXPORTED" in row.vg.status,
    "pv_missing": _of_pv(lambda pv: pv.missing, False),
    "pv_pe_count": _of_pv(lambda pv: pv.pe_count, 0),
    "pv_pe_alloc_count": pv_used_extents,
    "pv_tags": _of_pv(lambda pv: sorted(pv.tags), []),
    "pv_mda_count": lambda row: len(_mdas(row)),
    "pv_mda_used_count": lambda row: sum(not mda.ignored for mda in _mdas(row)),
    "pv_ba_start": lambda row: _boot(row)[0],
    "pv_ba_size": lambda row: _boot(row)[1],
    "pv_in_use": is_used,
    "pv_duplicate": lambda row: row.duplicate,
    "pvseg_start": lambda row: row.piece.start if row.piece else 0,
    "pvseg_size": lambda row: row.piece.count if row.piece else 0,
}

VG_VALUES: Final[dict[str, Values]] = {
    "vg_fmt": _of_vg(lambda vg: vg.format),
    "vg_uuid": _of_vg(lambda vg: dashed_id(vg.id)),
    "vg_name": lambda row: row.vg.name if row.vg else "[unknown]" if _lacks_its_vg(row) else "",
    "vg_attr": _of_vg(vg_attributes),
    "vg_permissions": _of_vg(
        lambda vg: "writeable" if may_write(vg.status, vg.flags) else "read-only"
    ),
    "vg_extendable": _of_vg(lambda vg: "RESIZEABLE" in vg.status, False),
    "vg_exported": _of_vg(lambda vg: "EXPORTED" in vg.status, False),
    "vg_autoactivation": _of_vg(lambda vg: "NOAUTOACTIVATE" not in vg.flags, False),
    "vg_partial": _of_vg(lambda vg: bool(vg.missing_pvs), False),
    "vg_allocation_policy": _of_vg(lambda vg: vg.allocation_policy or "normal"),
    "vg_clustered": _of_vg(lambda vg: "CLUSTERED" in vg.status, False),
    "vg_shared": _of_vg(lambda vg: vg.needs_lockd, False),
    "vg_size": _of_vg(lambda vg: vg.extent_count * vg.extent_size, 0),
    "vg_free": _of_vg(lambda vg: vg.free_extents * vg.extent_size, 0),
    "vg_sysid": _of_vg(lambda vg: vg.system_id or ""),
    "vg_systemid": _of_vg(lambda vg: vg.system_id or ""),
    "vg_lock_type": _of_vg(lambda vg: (vg.lock_type or "") if vg.needs_lockd else ""),
    "vg_lock_args": _of_vg(lambda vg: str(vg.extra.get("lock_args", ""))),
    "vg_extent_size": _of_vg(lambda vg: vg.extent_size, 0),
    "vg_extent_count": _of_vg(lambda vg: vg.extent_count, 0),
    "vg_free_count": _of_vg(lambda vg: vg.free_extents, 0),
    "max_lv": _of_vg(lambda vg: vg.max_lv, 0),
    "max_pv": _of_vg(lambda vg: vg.max_pv, 0),
    "pv_count": _of_vg(lambda vg: len(vg.pvs), 0),
    "vg_missing_pv_count": _of_vg(lambda vg: len(vg.missing_pvs), 0),
    "lv_count": _of_vg(visible_lvs, 0),
    "snap_count": _of_vg(lambda vg: len(vg.snapshot_records), 0),
    "vg_seqno": _of_vg(lambda vg: vg.seqno, 0),
    "vg_tags": _of_vg(lambda vg: sorted(vg.tags), []),
    "vg_profile": _of_vg(lambda vg: str(vg.extra.get("profile", ""))),
    "vg_mda_count": _of_vg(lambda vg: len(vg_mdas(vg)), 0),
    "vg_mda_used_count": _of_vg(lambda vg: sum(not mda.ignored for mda in vg_mdas(vg)), 0),
    "vg_mda_free": _of_vg(_vg_mda_free, 0),
    "vg_mda_size": _of_vg(lambda vg: min((sectors(mda.size) for mda in vg_mdas(vg)), default=0), 0),
    "vg_mda_copies": _of_vg(lambda vg: vg.metadata_copies or "unmanaged", 0),
}
