"""Metadata of a VG from its parsed text, and back: keys, their order, their types.

Nothing is judged here that `cow.lvm.check` can judge: reading fails only where there is nothing to
hold on to. (format_text/import_vsn1.c and export.c)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from cow.lvm.errors import MetadataError
from cow.lvm.metadata import (
    MAX_EXTENTS,
    Area,
    LogicalVolume,
    PhysicalVolume,
    Segment,
    VolumeGroupMetadata,
)
from cow.lvm.names import dashed_id, plain_id
from cow.lvm.text import Scalar, Section, Value

CONTENTS: Final = "Text Format Volume Group"
VERSION: Final = 1
_MAX_U32: Final = 2**32 - 1

_VG_KEYS = (
    "id seqno format status flags tags system_id lock_type lock_args pr extent_size max_lv max_pv"
    " allocation_policy profile metadata_copies physical_volumes logical_volumes"
).split()
_PV_KEYS = (
    "id device device_id_type device_id status flags tags dev_size pe_start pe_count ba_start"
    " ba_size"
).split()
_LV_KEYS = (
    "id status flags tags creation_time creation_host lock_args allocation_policy profile"
    " read_ahead major minor segment_count"
).split()
_SEGMENT_KEYS = "start_extent extent_count reshape_count type tags".split()
_MIRROR_KEYS = "mirror_count extents_moved mirror_log region_size mirrors".split()


# From text.


def vg_from_text(text: Section) -> VolumeGroupMetadata:
    """Make it of a parsed text: the first section is the VG, all else is the header."""
    for key, wanted in (("contents", CONTENTS), ("version", VERSION)):
        if text.get(key) != wanted:
            raise MetadataError(f"{key} is not {wanted!r}: no metadata of a volume group")
    name = next((name for name, _ in text.sections()), None)
    if name is None:
        raise MetadataError("no section of a volume group")
    header = text.copy()
    return vg_from_section(name, header.take_section(name), header)


def vg_from_section(
    name: str, section: Section, header: Section | None = None
) -> VolumeGroupMetadata:
    """Make it of the VG's section, which is left as it is; MetadataError names the key."""
    section = section.copy()
    pv_sections = section.take_section("physical_volumes")
    lv_sections = section.take_section("logical_volumes")
    vg = VolumeGroupMetadata(
        name=name,
        id=_take_id(section),
        seqno=section.take_number("seqno", most=_MAX_U32),
        format=section.take_text("format", "lvm2"),
        status=section.take_texts("status"),
        flags=section.take_texts("flags"),
        tags=section.take_texts("tags"),
        system_id=_take_optional_text(section, "system_id"),
        lock_type=_take_optional_text(section, "lock_type"),
        extent_size=section.take_number("extent_size", most=_MAX_U32),
        max_lv=section.take_number("max_lv", 0),
        max_pv=section.take_number("max_pv", 0),
        allocation_policy=_take_optional_text(section, "allocation_policy"),
        metadata_copies=section.take_number("metadata_copies", 0),
        header=Section() if header is None else header,
    )
    if vg.extent_size == 0:
        raise MetadataError(f"{section.where('extent_size')}: 0")
    vg.extra = section
    vg.pvs = [_read_pv(label, inner) for label, inner in _take_sections(pv_sections)]
    _read_lvs(vg, lv_sections)
    for key, rest in (("physical_volumes", pv_sections), ("logical_volumes", lv_sections)):
        if rest:
            vg.extra[key] = rest
    return vg


def _take_id(section: Section) -> str:
    text = section.take_text("id")
    try:
        return plain_id(text)
    except MetadataError as error:
        raise MetadataError(f"{section.where('id')}: {error.strerror}") from None


def _take_optional_text(section: Section, key: str) -> str | None:
    return section.take_text(key) if key in section else None


def _take_optional_number(section: Section, key: str, least: int = 0) -> int | None:
    value = section.get(key)
    if isinstance(value, int) and least <= value < 0:
        del section[key]
        return value
    return section.take_number(key) if key in section else None


def _take_sections(section: Section) -> list[tuple[str, Section]]:
    return [(key, section.take_section(key)) for key, _ in list(section.sections())]


def _read_pv(label: str, section: Section) -> PhysicalVolume:
    return PhysicalVolume(
        label=label,
        id=_take_id(section),
        device_hint=section.take_text("device", ""),
        status=section.take_texts("status"),
        flags=section.take_texts("flags"),
        tags=section.take_texts("tags"),
        dev_size=_take_optional_number(section, "dev_size"),
        pe_start=section.take_number("pe_start"),
        pe_count=section.take_number("pe_count", most=_MAX_U32),
        ba_start=section.take_number("ba_start", 0),
        ba_size=section.take_number("ba_size", 0),
        extra=section,
    )


def _read_lvs(vg: VolumeGroupMetadata, sections: Section) -> None:
    """Read the LVs, then their segments, which may name any of them."""
    segments: list[tuple[LogicalVolume, list[Section]]] = []
    for name, section in _take_sections(sections):
        lv = LogicalVolume(
            name=name,
            id=_take_id(section),
            vg=vg,
            status=section.take_texts("status"),
            flags=section.take_texts("flags"),
            tags=section.take_texts("tags"),
            creation_time=_take_optional_number(section, "creation_time"),
            creation_host=_take_optional_text(section, "creation_host"),
            allocation_policy=_take_optional_text(section, "allocation_policy"),
            read_ahead=_take_optional_number(section, "read_ahead", least=-1),
            major=_take_optional_number(section, "major", least=-1),
            minor=_take_optional_number(section, "minor", least=-1),
        )
        count = section.take_number("segment_count")
        keys = [key for key, _ in section.sections() if re.fullmatch(r"segment[0-9]+", key)]
        if len(keys) != count:
            raise MetadataError(
                "segment_count and actual number of segments disagree for logical volume"
                f" {name}: {count} and {len(keys)}"
            )
        segments.append((lv, [section.take_section(key) for key in keys]))
        lv.extra = section
        vg.lvs.append(lv)
    reader = _SegmentReader(vg)
    for lv, inner in segments:
        lv.segments = sorted(map(reader.read, inner), key=lambda segment: segment.start_extent)


class _SegmentReader:
    """Reads segments; PVs and LVs are looked up by name, PVs first."""

    def __init__(self, vg: VolumeGroupMetadata) -> None:
        self._lvs = {lv.name: lv for lv in vg.lvs}
        self._places: dict[str, PhysicalVolume | LogicalVolume] = dict(self._lvs)
        self._places.update((pv.label, pv) for pv in vg.pvs)

    def read(self, section: Section) -> Segment:
        type_name, *flags = section.take_text("type").split("+")
        segment = Segment(
            start_extent=section.take_number("start_extent", most=MAX_EXTENTS),
            extent_count=section.take_number("extent_count", most=MAX_EXTENTS),
            type="striped" if type_name == "linear" else type_name,
            type_flags=flags,
            tags=section.take_texts("tags"),
        )
        if segment.runnable:
            getattr(self, f"_read_{segment.type}")(segment, section)
        segment.extra = section
        return segment

    def _read_zero(self, segment: Segment, section: Section) -> None:
        """Nothing but the common keys."""

    _read_error = _read_zero

    def _read_striped(self, segment: Segment, section: Section) -> None:
        count = section.take_number("stripe_count")
        segment.areas = self._areas(section, "stripes", count)
        if count > 1:
            segment.stripe_size = section.take_number("stripe_size", most=_MAX_U32)

    def _read_mirror(self, segment: Segment, section: Section) -> None:
        segment.areas = self._areas(section, "mirrors", section.take_number("mirror_count"))
        segment.region_size = section.take_number("region_size", 0)
        if "mirror_log" in section:
            segment.mirror_log = self._lv(section, "mirror_log")

    def _read_snapshot(self, segment: Segment, section: Section) -> None:
        segment.chunk_size = section.take_number("chunk_size", most=_MAX_U32)
        segment.origin = self._lv(section, "origin")
        segment.merging = "merging_store" in section
        if segment.merging and "cow_store" in section:
            raise MetadataError(f"{section.path}: both cow_store and merging_store")
        segment.cow = self._lv(section, "merging_store" if segment.merging else "cow_store")

    def _lv(self, section: Section, key: str) -> LogicalVolume:
        name = section.take_text(key)
        if name not in self._lvs:
            raise MetadataError(f"{section.where(key)}: there is no LV {name}")
        return self._lvs[name]

    def _areas(self, section: Section, key: str, count: int) -> list[Area]:
        values = section.pop(key, None)
        if not isinstance(values, list) or not count or len(values) != 2 * count:
            raise MetadataError(f"{section.where(key)}: not a list of {count} pairs")
        areas = []
        for name, start in zip(values[::2], values[1::2], strict=True):
            of = self._places.get(name) if isinstance(name, str) else None
            if of is None:
                raise MetadataError(f"Couldn't find volume '{name}' for segment '{section.path}'.")
            if not isinstance(start, int) or not 0 <= start <= MAX_EXTENTS:
                raise MetadataError(f"{section.where(key)}: {start!r} is no extent")
            areas.append(Area(of, start))
        return areas


# To text.


def vg_section(vg: VolumeGroupMetadata) -> Section:
    """Write the VG's section: keys in LVM's order, visible LVs before hidden ones."""
    known: dict[str, Value | None] = {
        "id": dashed_id(vg.id),
        "seqno": vg.seqno,
        "format": vg.format,
        "status": list[Scalar](vg.status),
        "flags": list[Scalar](vg.flags),
        "tags": list[Scalar](vg.tags) or None,
        "system_id": vg.system_id,
        "lock_type": vg.lock_type,
        "extent_size": vg.extent_size,
        "max_lv": vg.max_lv,
        "max_pv": vg.max_pv,
        "allocation_policy": vg.allocation_policy,
        "metadata_copies": vg.metadata_copies,
    }
    pvs = vg.extra.copy().take_section("physical_volumes")
    pvs.update((pv.label, _pv_section(pv)) for pv in vg.pvs)
    lvs = vg.extra.copy().take_section("logical_volumes")
    visible = vg.visible_lvs()
    shown = set(visible)
    for lv in [*visible, *(lv for lv in vg.lvs if lv not in shown)]:
        lvs[lv.name] = _lv_section(lv)
    known["physical_volumes"] = pvs
    known["logical_volumes"] = lvs or None
    return _ordered(known, vg.extra, _VG_KEYS)


def _ordered(known: Mapping[str, Value | None], extra: Section, order: list[str]) -> Section:
    """Lay out known and other keys: those of `order` first, in its order; sections at the end."""
    found = {**extra, **{key: value for key, value in known.items() if value is not None}}
    section = Section()
    section.update((key, found.pop(key)) for key in order if key in found)
    section.update(found)
    return section


def _pv_section(pv: PhysicalVolume) -> Section:
    known: dict[str, Value | None] = {
        "id": dashed_id(pv.id),
        "device": pv.device_hint,
        "status": list[Scalar](pv.status),
        "flags": list[Scalar](pv.flags),
        "tags": list[Scalar](pv.tags) or None,
        "dev_size": pv.dev_size,
        "pe_start": pv.pe_start,
        "pe_count": pv.pe_count,
        "ba_start": pv.ba_start if pv.ba_size else None,
        "ba_size": pv.ba_size or None,
    }
    return _ordered(known, pv.extra, _PV_KEYS)


def _lv_section(lv: LogicalVolume) -> Section:
    known: dict[str, Value | None] = {
        "id": dashed_id(lv.id),
        "status": list[Scalar](lv.status),
        "flags": list[Scalar](lv.flags),
        "tags": list[Scalar](lv.tags) or None,
        "creation_time": lv.creation_time,
        "creation_host": lv.creation_host,
        "allocation_policy": lv.allocation_policy,
        "read_ahead": lv.read_ahead,
        "major": lv.major,
        "minor": lv.minor,
        "segment_count": len(lv.segments),
    }
    for number, segment in enumerate(lv.segments, 1):
        known[f"segment{number}"] = _segment_section(segment)
    return _ordered(known, lv.extra, _LV_KEYS)


def _segment_section(segment: Segment) -> Section:
    known: dict[str, Value | None] = {
        "start_extent": segment.start_extent,
        "extent_count": segment.extent_count,
        "type": segment.type_text,
        "tags": list[Scalar](segment.tags) or None,
    }
    order = list(_SEGMENT_KEYS)
    if segment.runnable and segment.type == "striped":
        known["stripe_count"] = len(segment.areas)
        known["stripe_size"] = segment.stripe_size if len(segment.areas) > 1 else None
        known["stripes"] = _area_list(segment)
    elif segment.runnable and segment.type == "mirror":
        known["mirror_count"] = len(segment.areas)
        known["mirror_log"] = segment.mirror_log.name if segment.mirror_log else None
        known["region_size"] = segment.region_size or None
        known["mirrors"] = _area_list(segment)
        order += _MIRROR_KEYS
    elif segment.runnable and segment.type == "snapshot":
        assert segment.origin is not None
        assert segment.cow is not None
        known["chunk_size"] = segment.chunk_size
        known["origin"] = segment.origin.name
        known["merging_store" if segment.merging else "cow_store"] = segment.cow.name
    return _ordered(known, segment.extra, order)


def _area_list(segment: Segment) -> list[Scalar]:
    values: list[Scalar] = []
    for area in segment.areas:
        values.append(area.of.label if isinstance(area.of, PhysicalVolume) else area.of.name)
        values.append(area.start)
    return values
