"""What stands in the fields of LVs and their segments.

A value is what the kind of its field says (cow.lvm.report.fields): text, a number, a size in
sectors, a percentage, true or false, a list, a time. None is a blank, and of true or false neither:
unknown. A field that has no function here is blank for every LV that can be run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final, TypeAlias

from cow.lvm.cow_size import Usage, shown_percent
from cow.lvm.metadata import Area, LogicalVolume, PhysicalVolume, Segment
from cow.lvm.names import dashed_id, dm_name
from cow.lvm.report.live import LiveDevice
from cow.lvm.report.rows import Row
from cow.lvm.report.traits import (
    CACHES,
    THIN,
    VIRTUAL,
    ancestors,
    attributes,
    cache_settings,
    descendants,
    first_type,
    has_fixed_minor,
    has_link,
    image_is_synced,
    integrity,
    is_merging,
    is_moved,
    is_partial,
    is_pool,
    is_raid,
    layout,
    modules,
    named_lv,
    origin_of,
    parent,
    pool_of,
    read_ahead_in_use,
    role,
    role_of_part,
    shown_name,
    sync_percent,
    thin_lvs_of,
    virtual_sectors,
    zeroes,
)

WITHOUT_PARTS: Final = (*CACHES, "integrity")
"""Types of LVs that are not said to be the parent of what they stand on."""
WITH_RESHAPE: Final = ("raid4", "raid5", "raid6", "raid10")
"""Levels of raid whose layout can be changed, which takes space that is told of."""

Value: TypeAlias = Any
"""What a field holds, as its kind says."""
Values: TypeAlias = Callable[[Row], Value]


def _lv(row: Row) -> LogicalVolume:
    assert row.lv is not None
    return row.lv


def _live(row: Row, tell: Callable[[LiveDevice], Value], absent: Value = None) -> Value:
    device = row.live.device(row.lv) if row.lv is not None else None
    return absent if device is None else tell(device)


def _of_state(row: Row, tell: Callable[[Usage], bool]) -> bool | None:
    lv = row.lv
    usage = row.live.usage(lv) if lv is not None and lv.is_cow else None
    return None if usage is None else tell(usage)


def _uuid(lv: LogicalVolume | None) -> str:
    return dashed_id(lv.id) if lv is not None else ""


def _name(row: Row, lv: LogicalVolume | None) -> str:
    return shown_name(lv, row) if lv is not None else ""


def _data_percent(row: Row) -> float | None:
    usage = row.live.usage(row.lv) if row.lv is not None else None
    return shown_percent(usage.percent) if usage is not None else None


def _shown_parent(lv: LogicalVolume) -> LogicalVolume | None:
    """Return what a hidden LV is a part of, if it is one that LVM says that of."""
    above = parent(lv)
    if above is None or is_moved(lv) or first_type(above) in WITHOUT_PARTS:
        return None
    return above


def _moved_pv(row: Row) -> PhysicalVolume | None:
    """Return the PV that a pvmove moves away from."""
    if row.lv is None or not is_moved(row.lv) or not row.lv.segments[0].areas:
        return None
    of = row.lv.segments[0].areas[0].of
    return of if isinstance(of, PhysicalVolume) else None


def _sync_percent(row: Row) -> float | None:
    percent = sync_percent(row) if row.lv is not None else None
    return shown_percent(percent) if percent is not None else None


def _snap_percent(row: Row) -> float | None:
    return _data_percent(row) if row.lv is not None and row.lv.is_cow else None


def _active(row: Row) -> str:
    if not row.live.known:
        return "unknown"
    return "active" if _is_active(row) else ""


def _is_active(row: Row) -> bool | None:
    if not row.live.known:
        return None
    return row.lv is not None and row.live.is_active(row.lv)


def _permissions(row: Row) -> str:
    if row.lv is None:
        return "unknown"
    if not row.lv.writable:
        return "read-only"
    device = row.live.device(_lv(row))
    if device is None:
        return "unknown"
    return "read-only-override" if device.info.readonly else "writeable"


def _read_ahead(row: Row) -> int | str:
    value = row.lv.read_ahead if row.lv is not None else -1
    return max(value, 0) if value else "auto"


def _kernel_read_ahead(row: Row) -> int | str:
    return read_ahead_in_use(_lv(row)) if _is_active(row) else "-1"


def _health(row: Row) -> str:
    if row.lv is None:
        return ""
    if is_partial(row.lv):
        return "partial"
    return "writemostly" if "WRITEMOSTLY" in row.lv.status else ""


def _legs(segment: Segment) -> int:
    if segment.type in ("striped", "mirror"):
        return len(segment.areas)
    if segment.type in VIRTUAL or segment.type == "thin":
        return 0
    count = segment.extra.get("device_count") or segment.extra.get("stripe_count") or 1
    return count if isinstance(count, int) else 1


def data_legs(segment: Segment) -> int:
    """Return over how many legs the data of a segment is spread."""
    if segment.type.startswith("raid10"):
        return _legs(segment) // (_number(segment, "data_copies") or 2)
    parity = (_parity_legs(segment) or 0) if _level(segment) != "raid1" else 0
    return max(_legs(segment) - parity, 0)


def _level(segment: Segment) -> str:
    """Return the level of a raid without its layout; nothing of other segments."""
    return segment.type.split("_")[0] if segment.type.startswith("raid") else ""


def _parity_legs(segment: Segment) -> int | None:
    """Return how many legs can be lost without losing data; None where that is none."""
    return {"raid1": 1, "raid4": 1, "raid5": 1, "raid6": 2, "raid10": 1}.get(_level(segment))


def _copies(segment: Segment) -> int:
    if segment.type == "raid1":
        return _legs(segment)
    return _number(segment, "data_copies") or (_parity_legs(segment) or 0) + 1


def _reshape_extents(row: Row) -> int | None:
    """Return the extents that are kept for a change of layout, of a raid and of its images."""
    segment, above = row.segment, parent(row.lv) if row.lv is not None else None
    if segment is not None and role_of_part(_lv(row)) == "image" and above is not None:
        segment = above.segments[0]
    if segment is None or _level(segment) not in WITH_RESHAPE:
        return None
    return _number(segment, "reshape_count") or 0


def _number(segment: Segment, key: str) -> int | None:
    value = segment.extra.get(key)
    return value if isinstance(value, int) else None


def _segtype(row: Row) -> str:
    segment = row.segment
    if segment is None:
        return "free"
    if segment.type == "striped" and len(segment.areas) == 1:
        return "linear"
    return segment.type if segment.known else segment.type_text


def _chunk_size(row: Row) -> int:
    record = row.lv.snapshot if row.lv is not None else None
    if record is not None:
        return record.segments[0].chunk_size
    if row.segment is None:
        return 0
    return _number(cache_settings(row.segment, row.lv), "chunk_size") or 0


def _ranges(row: Row) -> list[str]:
    segment = row.segment
    if segment is None:
        return []
    count = segment.area_extents if segment.areas else _part_extents(segment)
    found = []
    for area in segment.areas:
        start, extents = area.start, count
        if isinstance(area.of, LogicalVolume):  # LVM tells of the whole of it
            start, extents = 0, area.of.extent_count
        found.append(f"{_area_name(row, area)}:{start}-{start + extents - 1}")
    return found + [f"{name}:0-{count - 1}" for name in _parts(segment)]


def _part_extents(segment: Segment) -> int:
    """Return the extents of each LV that holds data of a raid, a pool or a cache."""
    legs = 1 if segment.type == "raid1" else data_legs(segment)
    return segment.extent_count // legs if segment.type.startswith("raid") else segment.extent_count


def _pe_ranges(row: Row) -> list[str]:
    found = _ranges(row)
    return [" ".join(found)] if found else []


def _le_ranges(row: Row) -> list[str]:
    """Return the same with hidden LVs in brackets."""
    if row.lv is None:
        return []
    hidden = {lv.name for lv in row.lv.vg.lvs if not lv.visible}
    pairs = (each.rpartition(":") for each in _ranges(row))
    return [f"[{name}]:{run}" if name in hidden else f"{name}:{run}" for name, _, run in pairs]


def _metadata_le_ranges(row: Row) -> list[str]:
    """Return the extents of the metadata of a raid, one LV for each leg."""
    names = _metadata_parts(row.segment) if row.segment is not None else []
    lvs = [lv for name in names if (lv := _lv(row).vg.find_lv(name)) is not None]
    return [f"{_name(row, lv)}:0-{lv.extent_count - 1}" for lv in lvs]


def _devices(row: Row) -> list[str]:
    segment = row.segment
    if segment is None:
        return []
    found = [
        f"{_area_name(row, area)}({0 if isinstance(area.of, LogicalVolume) else area.start})"
        for area in segment.areas
    ]
    return found + [f"{name}(0)" for name in _parts(segment)]


def _parts(segment: Segment) -> Iterator[str]:
    """Yield the names of the LVs that hold the data of a raid, a pool or a cache."""
    for key in ("pool", "data", "raid0_lvs"):
        value = segment.extra.get(key)
        values = value if isinstance(value, list) else [value]
        yield from [each for each in values if isinstance(each, str)]
    raids = segment.extra.get("raids")
    if isinstance(raids, list):
        yield from [str(each) for each in raids[1::2]]
    origin = segment.extra.get("origin")
    if segment.type in (*CACHES, "integrity") and isinstance(origin, str):
        yield origin


def _discards(row: Row) -> str:
    lv = row.lv
    if lv is None:
        return ""
    pool = lv if is_pool(lv) else named_lv(lv, "thin_pool")
    return str(pool.segments[0].extra.get("discards", "")) if pool is not None else ""


def _area_name(row: Row, area: Area) -> str:
    return str(area.of) if isinstance(area.of, PhysicalVolume) else area.of.name


def _metadata_devices(row: Row) -> list[str]:
    names = _metadata_parts(row.segment) if row.segment is not None else []
    return [f"{name}(0)" for name in names]


def _metadata_parts(segment: Segment) -> list[str]:
    raids = segment.extra.get("raids")
    return [str(each) for each in raids[::2]] if isinstance(raids, list) else []


def _of_cache(key: str) -> Values:
    def tell(row: Row) -> str:
        if row.segment is None:
            return ""
        return str(cache_settings(row.segment, row.lv).extra.get(key, ""))

    return tell


def _of_segment(tell: Callable[[Segment], Value], absent: Value = None) -> Values:
    return lambda row: absent if row.segment is None else tell(row.segment)


def _of_lv(tell: Callable[[LogicalVolume], Value], absent: Value = "") -> Values:
    return lambda row: absent if row.lv is None else tell(row.lv)


def _named(find: Callable[[LogicalVolume], LogicalVolume | None]) -> Values:
    return lambda row: "" if row.lv is None else _name(row, find(row.lv))


def _seg_extents(row: Row) -> int:
    if row.segment is not None:
        return row.segment.extent_count
    return row.piece.count if row.piece is not None else 0


VALUES: Final[dict[str, Values]] = {
    "lv_uuid": _of_lv(_uuid),
    "lv_name": lambda row: _name(row, row.lv),
    "lv_full_name": _of_lv(str),
    "lv_path": _of_lv(lambda lv: f"/dev/{lv}" if has_link(lv) else ""),
    "lv_dm_path": _of_lv(lambda lv: f"/dev/mapper/{dm_name(lv.vg.name, lv.name)}"),
    "lv_parent": _named(_shown_parent),
    "lv_image_synced": lambda row: (
        row.lv is not None and role_of_part(row.lv) == "image" and image_is_synced(row)
    ),
    "lv_initial_image_sync": _of_lv(
        lambda lv: (is_raid(lv) or first_type(lv) == "mirror") and "NOTSYNCED" not in lv.status
    ),
    "lv_layout": _of_lv(layout, []),
    "lv_role": _of_lv(role, []),
    "lv_merging": _of_lv(lambda lv: is_merging(lv) or lv.merging_snapshot is not None, False),
    "lv_converting": _of_lv(lambda lv: "CONVERTING" in lv.status, False),
    "lv_allocation_policy": _of_lv(lambda lv: lv.allocation_policy or "inherit"),
    "lv_allocation_locked": _of_lv(lambda lv: "LOCKED" in lv.status, False),
    "lv_fixed_minor": _of_lv(has_fixed_minor, False),
    "lv_skip_activation": _of_lv(lambda lv: "ACTIVATION_SKIP" in lv.flags, False),
    "lv_autoactivation": _of_lv(lambda lv: "NOAUTOACTIVATE" not in lv.flags, False),
    "lv_when_full": _of_lv(
        lambda lv: (
            ("error" if "ERROR_WHEN_FULL" in lv.flags else "queue")
            if first_type(lv) == "thin-pool"
            else ""
        )
    ),
    "lv_active": _active,
    "lv_active_locally": _is_active,
    "lv_active_remotely": lambda row: False if row.live.known else None,
    "lv_active_exclusively": _is_active,
    "lv_major": _of_lv(lambda lv: lv.major if lv.major is not None else -1, -1),
    "lv_minor": _of_lv(lambda lv: lv.minor if lv.minor is not None else -1, -1),
    "lv_read_ahead": _read_ahead,
    "lv_size": _of_lv(lambda lv: lv.sectors, 0),
    "lv_metadata_size": _of_lv(
        lambda lv: part.sectors if is_pool(lv) and (part := named_lv(lv, "metadata")) else None,
        None,
    ),
    "seg_count": _of_lv(lambda lv: len(lv.segments), 0),
    "origin": _named(origin_of),
    "origin_uuid": _of_lv(lambda lv: _uuid(origin_of(lv))),
    "origin_size": _of_lv(virtual_sectors, None),
    "lv_ancestors": _of_lv(lambda lv: [each.name for each in ancestors(lv)], []),
    "lv_full_ancestors": _of_lv(lambda lv: [each.name for each in ancestors(lv)], []),
    "lv_descendants": _of_lv(lambda lv: [each.name for each in descendants(lv)], []),
    "lv_full_descendants": _of_lv(lambda lv: [each.name for each in descendants(lv)], []),
    "raidintegritymode": _of_lv(
        lambda lv: (
            {"J": "journal", "B": "bitmap"}.get(str(found.extra.get("mode")), "")
            if (found := integrity(lv)) is not None
            else ""
        )
    ),
    "raidintegrityblocksize": _of_lv(
        lambda lv: _number(found, "block_size") if (found := integrity(lv)) is not None else -1, -1
    ),
    "move_pv": lambda row: "" if (pv := _moved_pv(row)) is None else str(pv),
    "move_pv_uuid": lambda row: "" if (pv := _moved_pv(row)) is None else dashed_id(pv.id),
    "mirror_log": lambda row: _name(row, row.segment.mirror_log if row.segment else None),
    "mirror_log_uuid": lambda row: _uuid(row.segment.mirror_log if row.segment else None),
    "data_lv": _named(lambda lv: named_lv(lv, "pool", "data")),
    "data_lv_uuid": _of_lv(lambda lv: _uuid(named_lv(lv, "pool", "data"))),
    "metadata_lv": _named(lambda lv: named_lv(lv, "metadata")),
    "metadata_lv_uuid": _of_lv(lambda lv: _uuid(named_lv(lv, "metadata"))),
    "pool_lv": _named(pool_of),
    "pool_lv_uuid": _of_lv(lambda lv: _uuid(pool_of(lv))),
    "lv_tags": _of_lv(lambda lv: sorted(lv.tags), []),
    "lv_time": _of_lv(lambda lv: lv.creation_time, None),
    "lv_host": _of_lv(lambda lv: lv.creation_host or ""),
    "lv_modules": _of_lv(modules, []),
    "lv_profile": _of_lv(lambda lv: str(lv.extra.get("profile", ""))),
    "lv_historical": lambda row: False,
    "writecache_block_size": _of_segment(
        lambda segment: _number(segment, "writecache_block_size") or -1, -1
    ),
    "lv_kernel_major": lambda row: _live(row, lambda device: device.info.major, -1),
    "lv_kernel_minor": lambda row: _live(row, lambda device: device.info.minor, -1),
    "lv_kernel_read_ahead": _kernel_read_ahead,
    "lv_permissions": _permissions,
    "lv_suspended": lambda row: _live(row, lambda device: device.info.suspended),
    "lv_live_table": lambda row: _live(row, lambda device: device.info.live),
    "lv_inactive_table": lambda row: _live(row, lambda device: device.info.inactive),
    "lv_device_open": lambda row: _live(row, lambda device: device.info.open_count > 0),
    "data_percent": _data_percent,
    "snap_percent": _snap_percent,
    "copy_percent": _sync_percent,
    "sync_percent": _sync_percent,
    "lv_health_status": _health,
    "lv_check_needed": lambda row: None,
    "lv_merge_failed": lambda row: _of_state(row, lambda usage: usage.merge_failed),
    "lv_snapshot_invalid": lambda row: _of_state(row, lambda usage: usage.invalid),
    "lv_attr": lambda row: attributes(row) if row.lv is not None else "",
    "segtype": _segtype,
    "stripes": _of_segment(_legs, 0),
    "data_stripes": _of_segment(data_legs, 0),
    "reshape_len": lambda row: (
        None if (extents := _reshape_extents(row)) is None else extents * _lv(row).vg.extent_size
    ),
    "reshape_len_le": _reshape_extents,
    "data_copies": _of_segment(_copies),
    "parity_chunks": _of_segment(_parity_legs),
    "stripe_size": _of_segment(
        lambda segment: segment.stripe_size or _number(segment, "stripe_size") or 0, 0
    ),
    "region_size": _of_segment(
        lambda segment: segment.region_size or _number(segment, "region_size") or 0, 0
    ),
    "chunk_size": _chunk_size,
    "thin_count": lambda row: (
        len(thin_lvs_of(_lv(row)))
        if row.segment is not None and row.segment.type == "thin-pool"
        else None
    ),
    "discards": _discards,
    "cache_metadata_format": lambda row: (
        None
        if row.segment is None
        else _number(cache_settings(row.segment, row.lv), "metadata_format")
    ),
    "cache_mode": _of_cache("cache_mode"),
    "zero": lambda row: zeroes(row.lv) if row.lv and first_type(row.lv) in THIN else None,
    "transaction_id": _of_segment(lambda segment: _number(segment, "transaction_id")),
    "thin_id": _of_segment(lambda segment: _number(segment, "device_id")),
    "seg_start": lambda row: (
        row.segment.start_extent * _lv(row).vg.extent_size if row.segment else 0
    ),
    "seg_start_pe": _of_segment(lambda segment: segment.start_extent, 0),
    "seg_size": lambda row: _seg_extents(row) * (row.vg.extent_size if row.vg else 0),
    "seg_size_pe": _seg_extents,
    "seg_tags": _of_segment(lambda segment: sorted(segment.tags), []),
    "seg_pe_ranges": _pe_ranges,
    "seg_le_ranges": _le_ranges,
    "seg_metadata_le_ranges": _metadata_le_ranges,
    "devices": _devices,
    "metadata_devices": _metadata_devices,
    "seg_monitor": lambda row: row.live.monitored(_lv(row)) if row.lv else "",
    "cache_policy": _of_cache("policy"),
}
