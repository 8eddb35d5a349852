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
    THIN,
    VIRTUAL,
    ancestors,
    attributes,
    descendants,
    first_type,
    has_fixed_minor,
    image_is_synced,
    is_merging,
    is_partial,
    is_pool,
    is_raid,
    layout,
    modules,
    named_lv,
    origin_of,
    parent,
    read_ahead_in_use,
    role,
    role_of_part,
    shown_name,
    sync_percent,
    virtual_sectors,
    zeroes,
)

Value: TypeAlias = Any
"""What a field holds, as its kind says."""
Values: TypeAlias = Callable[[Row], Value]


def _lv(row: Row) -> LogicalVolume:
    assert row.lv is not None
    return row.lv


def _live(row: Row, tell: Callable[[LiveDevice], Value], absent: Value = None) -> Value:
    device = row.live.device(_lv(row))
    return absent if device is None else tell(device)


def _of_state(row: Row, tell: Callable[[Usage], bool]) -> bool | None:
    lv = _lv(row)
    usage = row.live.usage(lv) if lv.is_cow else None
    return None if usage is None else tell(usage)


def _uuid(lv: LogicalVolume | None) -> str:
    return dashed_id(lv.id) if lv is not None else ""


def _name(row: Row, lv: LogicalVolume | None) -> str:
    return shown_name(lv, row) if lv is not None else ""


def _data_percent(row: Row) -> float | None:
    usage = row.live.usage(_lv(row))
    return shown_percent(usage.percent) if usage is not None else None


def _shown_parent(lv: LogicalVolume) -> LogicalVolume | None:
    """Return what a hidden LV is a part of; a cache is not said to be that of what it caches."""
    above = parent(lv)
    return None if above is not None and first_type(above) == "cache" else above


def _sync_percent(row: Row) -> float | None:
    percent = sync_percent(row)
    return shown_percent(percent) if percent is not None else None


def _snap_percent(row: Row) -> float | None:
    return _data_percent(row) if _lv(row).is_cow else None


def _active(row: Row) -> str:
    if not row.live.known:
        return "unknown"
    return "active" if row.live.is_active(_lv(row)) else ""


def _is_active(row: Row) -> bool | None:
    return row.live.is_active(_lv(row)) if row.live.known else None


def _permissions(row: Row) -> str:
    if not _lv(row).writable:
        return "read-only"
    device = row.live.device(_lv(row))
    if device is None:
        return "unknown"
    return "read-only-override" if device.info.readonly else "writeable"


def _read_ahead(row: Row) -> int | str:
    value = _lv(row).read_ahead
    return "auto" if not value else "none" if value < 0 else value


def _kernel_read_ahead(row: Row) -> int | str:
    return read_ahead_in_use(_lv(row)) if row.live.is_active(_lv(row)) else "-1"


def _health(row: Row) -> str:
    return "partial" if is_partial(_lv(row)) else ""


def _legs(segment: Segment) -> int:
    if segment.type in ("striped", "mirror"):
        return len(segment.areas)
    if segment.type in VIRTUAL or segment.type == "thin":
        return 0
    count = segment.extra.get("device_count") or segment.extra.get("stripe_count") or 1
    return count if isinstance(count, int) else 1


def _data_legs(segment: Segment) -> int:
    if segment.type.startswith("raid10"):
        return _legs(segment) // (_number(segment, "data_copies") or 2)
    parity = {"raid4": 1, "raid5": 1, "raid6": 2}.get(segment.type.split("_")[0], 0)
    return max(_legs(segment) - parity, 0)


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
    return _number(row.segment, "chunk_size") or 0 if row.segment is not None else 0


def _ranges(row: Row) -> list[str]:
    segment = row.segment
    if segment is None:
        return []
    count = segment.area_extents if segment.areas else _part_extents(segment)
    found = [
        f"{_area_name(row, area)}:{area.start}-{area.start + count - 1}" for area in segment.areas
    ]
    return found + [f"{name}:0-{count - 1}" for name in _parts(segment)]


def _part_extents(segment: Segment) -> int:
    """Return the extents of each LV that holds data of a raid, a pool or a cache."""
    legs = 1 if segment.type == "raid1" else _data_legs(segment)
    return segment.extent_count // legs if segment.type.startswith("raid") else segment.extent_count


def _pe_ranges(row: Row) -> list[str]:
    found = _ranges(row)
    return [" ".join(found)] if found else []


def _le_ranges(row: Row) -> list[str]:
    """Return the same with hidden LVs in brackets."""
    vg = _lv(row).vg
    hidden = {lv.name for lv in vg.lvs if not lv.visible}
    pairs = (each.rpartition(":") for each in _ranges(row))
    return [f"[{name}]:{run}" if name in hidden else f"{name}:{run}" for name, _, run in pairs]


def _devices(row: Row) -> list[str]:
    segment = row.segment
    if segment is None:
        return []
    found = [f"{_area_name(row, area)}({area.start})" for area in segment.areas]
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
    if segment.type == "cache" and isinstance(origin := segment.extra.get("origin"), str):
        yield origin


def _discards(row: Row) -> str:
    lv = _lv(row)
    pool = lv if is_pool(lv) else named_lv(lv, "thin_pool")
    return str(pool.segments[0].extra.get("discards", "")) if pool is not None else ""


def _area_name(row: Row, area: Area) -> str:
    return str(area.of) if isinstance(area.of, PhysicalVolume) else area.of.name


def _metadata_devices(row: Row) -> list[str]:
    segment = row.segment
    if segment is None:
        return []
    raids = segment.extra.get("raids")
    names = [str(each) for each in raids[::2]] if isinstance(raids, list) else []
    return [f"{name}(0)" for name in names]


def _of_segment(tell: Callable[[Segment], Value], absent: Value = None) -> Values:
    return lambda row: absent if row.segment is None else tell(row.segment)


def _of_lv(tell: Callable[[LogicalVolume], Value], absent: Value = "") -> Values:
    return lambda row: absent if row.lv is None else tell(row.lv)


def _seg_extents(row: Row) -> int:
    if row.segment is not None:
        return row.segment.extent_count
    return row.piece.count if row.piece is not None else 0


VALUES: Final[dict[str, Values]] = {
    "lv_uuid": _of_lv(_uuid),
    "lv_name": lambda row: _name(row, row.lv),
    "lv_full_name": _of_lv(str),
    "lv_path": _of_lv(lambda lv: f"/dev/{lv}" if lv.visible and not is_pool(lv) else ""),
    "lv_dm_path": _of_lv(lambda lv: f"/dev/mapper/{dm_name(lv.vg.name, lv.name)}"),
    "lv_parent": lambda row: _name(row, _shown_parent(_lv(row))),
    "lv_image_synced": lambda row: role_of_part(_lv(row)) == "image" and image_is_synced(row),
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
    "origin": lambda row: _name(row, origin_of(_lv(row))),
    "origin_uuid": _of_lv(lambda lv: _uuid(origin_of(lv))),
    "origin_size": _of_lv(virtual_sectors, None),
    "lv_ancestors": _of_lv(lambda lv: [each.name for each in ancestors(lv)], []),
    "lv_full_ancestors": _of_lv(lambda lv: [each.name for each in ancestors(lv)], []),
    "lv_descendants": _of_lv(lambda lv: [each.name for each in descendants(lv)], []),
    "lv_full_descendants": _of_lv(lambda lv: [each.name for each in descendants(lv)], []),
    "raidintegrityblocksize": lambda row: -1,
    "mirror_log": lambda row: _name(row, row.segment.mirror_log if row.segment else None),
    "mirror_log_uuid": lambda row: _uuid(row.segment.mirror_log if row.segment else None),
    "data_lv": lambda row: _name(row, named_lv(_lv(row), "pool", "data")),
    "data_lv_uuid": _of_lv(lambda lv: _uuid(named_lv(lv, "pool", "data"))),
    "metadata_lv": lambda row: _name(row, named_lv(_lv(row), "metadata")),
    "metadata_lv_uuid": _of_lv(lambda lv: _uuid(named_lv(lv, "metadata"))),
    "pool_lv": lambda row: _name(row, named_lv(_lv(row), "thin_pool", "cache_pool")),
    "pool_lv_uuid": _of_lv(lambda lv: _uuid(named_lv(lv, "thin_pool", "cache_pool"))),
    "lv_tags": _of_lv(lambda lv: sorted(lv.tags), []),
    "lv_time": _of_lv(lambda lv: lv.creation_time, None),
    "lv_host": _of_lv(lambda lv: lv.creation_host or ""),
    "lv_modules": _of_lv(modules, []),
    "lv_historical": lambda row: False,
    "writecache_block_size": lambda row: -1,
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
    "lv_attr": attributes,
    "segtype": _segtype,
    "stripes": _of_segment(_legs, 0),
    "data_stripes": _of_segment(_data_legs, 0),
    "data_copies": _of_segment(lambda segment: _number(segment, "data_copies") or 1, 0),
    "stripe_size": _of_segment(
        lambda segment: segment.stripe_size or _number(segment, "stripe_size") or 0, 0
    ),
    "region_size": _of_segment(
        lambda segment: segment.region_size or _number(segment, "region_size") or 0, 0
    ),
    "chunk_size": _chunk_size,
    "thin_count": lambda row: (
        sum(named_lv(lv, "thin_pool") is row.lv for lv in _lv(row).vg.lvs)
        if row.segment is not None and row.segment.type == "thin-pool"
        else None
    ),
    "discards": _discards,
    "cache_mode": _of_segment(lambda segment: str(segment.extra.get("cache_mode", "")), ""),
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
    "devices": _devices,
    "metadata_devices": _metadata_devices,
    "seg_monitor": lambda row: row.live.monitored(_lv(row)) if row.lv else "",
    "cache_policy": _of_segment(lambda segment: str(segment.extra.get("policy", "")), ""),
}
