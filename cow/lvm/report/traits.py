"""What an LV is, as reports tell it: layout, role, relatives, and the ten letters of lv_attr.

The letters are those of lvs(8).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from typing import Final

from cow.lvm.cow_size import Usage
from cow.lvm.metadata import LogicalVolume, PhysicalVolume, Segment, segment_lvs
from cow.lvm.report.live import LiveDevice
from cow.lvm.report.rows import Row
from cow.lvm.tables import REAL

MIN_READ_AHEAD: Final = 256
"""Sectors that a device without stripes reads ahead."""

THIN: Final = ("thin", "thin-pool")
CACHES: Final = ("cache", "writecache")
VIRTUAL: Final = ("zero", "error")
NAMED_LAYOUTS: Final = (
    *("raid5_la", "raid5_ra", "raid5_ls", "raid5_rs"),
    *("raid6_zr", "raid6_nr", "raid6_nc"),
)
"""Layouts of raid that have names of their own in lv_layout."""


def first_type(lv: LogicalVolume) -> str:
    """Return the type of the first segment."""
    return lv.segments[0].type if lv.segments else ""


def is_raid(lv: LogicalVolume) -> bool:
    """Tell whether the LV is of one of the raid types."""
    return first_type(lv).startswith("raid")


def is_pool(lv: LogicalVolume) -> bool:
    """Tell whether the LV is a pool."""
    return first_type(lv) in ("thin-pool", "cache-pool", "vdo-pool")


def has_link(lv: LogicalVolume) -> bool:
    """Tell whether an LV has a name in /dev/VG."""
    return lv.visible and first_type(lv) not in ("thin-pool", "vdo-pool")


def parent(lv: LogicalVolume) -> LogicalVolume | None:
    """Return the LV that a hidden LV is a part of."""
    if lv.visible or lv.is_cow or lv.is_origin:
        return None
    return next((user for user in lv.users if not user.is_snapshot_record), None)


def role_of_part(lv: LogicalVolume) -> str:
    """Return image, metadata, log, data … for the hidden LVs that are named after another."""
    for part, role in (
        ("_imeta", "metadata"),
        ("_iorig", ""),
        ("_rimage", "image"),
        ("_mimage", "image"),
        ("_rmeta", "metadata"),
        ("_mlog", "log"),
        ("_tdata", "data"),
        ("_tmeta", "metadata"),
        ("_cdata", "data"),
        ("_cmeta", "metadata"),
        ("_pmspare", "spare"),
    ):
        if part in lv.name and not lv.visible:
            return role
    return ""


def shown_name(lv: LogicalVolume, row: Row) -> str:
    """Return the name, in brackets if the LV is hidden."""
    return lv.name if lv.visible or not row.show_hidden else f"[{lv.name}]"


def origin_of(lv: LogicalVolume) -> LogicalVolume | None:
    """Return what the LV is a snapshot of."""
    record = lv.snapshot
    if record is not None:
        return record.segments[0].origin
    for segment in lv.segments:
        name = segment.extra.get("origin") or segment.extra.get("external_origin")
        if segment.type in ("thin", "integrity", *CACHES) and isinstance(name, str):
            return lv.vg.find_lv(name)
    return None


def thin_snapshots(lv: LogicalVolume, key: str = "origin") -> list[LogicalVolume]:
    """Return the thin LVs that are snapshots of an LV; `key` "external_origin": based on it."""
    return [
        each
        for each in lv.users
        if first_type(each) == "thin" and each.segments[0].extra.get(key) == lv.name
    ]


def is_cache_volume(lv: LogicalVolume) -> bool:
    """Tell whether an LV is data and metadata of a cache in one."""
    return lv.name.endswith("_cvol") and not lv.visible


def hidden_origin(lv: LogicalVolume) -> str:
    """Return what a hidden LV is the origin of: a cache, a writecache, integrity; or nothing."""
    if not lv.visible:
        for part, kind in (
            ("_wcorig", "writecache"),
            ("_corig", "cache"),
            ("_iorig", "integrity"),
        ):
            if part in lv.name:
                return kind
    return ""


def integrity(lv: LogicalVolume) -> Segment | None:
    """Return the integrity segment of an LV, or of the first image of a raid."""
    names = lv.segments[0].extra.get("raids") if is_raid(lv) else None
    image = lv.vg.find_lv(str(names[1])) if isinstance(names, list) and len(names) > 1 else lv
    if image is not None and first_type(image) == "integrity":
        return image.segments[0]
    return None


def named_lv(lv: LogicalVolume, *keys: str) -> LogicalVolume | None:
    """Return the LV that a key of a pool's or a pool's user's segment names."""
    for segment in lv.segments:
        for key in keys:
            name = segment.extra.get(key)
            if isinstance(name, str):
                return lv.vg.find_lv(name)
    return None


def pool_of(lv: LogicalVolume) -> LogicalVolume | None:
    """Return the pool, or the fast volume, that an LV uses."""
    return named_lv(lv, "thin_pool", "cache_pool", "writecache")


def thin_lvs_of(pool: LogicalVolume) -> list[LogicalVolume]:
    """Return the thin LVs of a pool."""
    return [each for each in pool.users if named_lv(each, "thin_pool") is pool]


def cache_settings(segment: Segment, lv: LogicalVolume | None) -> Segment:
    """Return the segment that tells how a cache works: that of its pool, if it has one."""
    pool = named_lv(lv, "cache_pool") if lv is not None and segment.type == "cache" else None
    return pool.segments[0] if pool is not None and is_pool(pool) else segment


def cow_stores(lv: LogicalVolume) -> list[LogicalVolume]:
    """Return the snapshots of an origin in the order of their records."""
    return [store for each in lv.snapshots if (store := each.segments[0].cow) is not None]


def ancestors(lv: LogicalVolume) -> Iterator[LogicalVolume]:
    """Yield what the LV is a snapshot of, and what that is one of."""
    seen = {lv}
    above: LogicalVolume | None = lv
    while above is not None and (above.is_cow or first_type(above) == "thin"):
        above = origin_of(above)
        if above is None or above in seen:
            return
        yield above
        seen.add(above)


def descendants(lv: LogicalVolume) -> Iterator[LogicalVolume]:
    """Yield the snapshots of an LV that have a COW store, or else the thin ones, and theirs."""
    seen = {lv}
    left = [lv]
    while left:
        above = left.pop(0)
        thin = thin_snapshots(above) + thin_snapshots(above, "external_origin")
        for below in cow_stores(above) or thin:
            if below not in seen:
                seen.add(below)
                left.append(below)
                yield below


def virtual_sectors(lv: LogicalVolume) -> int | None:
    """Return how large the view of a snapshot is; an origin is as large as it is."""
    record = lv.snapshot
    if record is not None:
        return record.segments[0].extent_count * lv.vg.extent_size
    if first_type(lv) == "thin" and "external_origin" in lv.segments[0].extra:
        above = origin_of(lv)
        return above.sectors if above is not None else None
    return lv.sectors if lv.is_origin else None


def read_ahead_in_use(lv: LogicalVolume) -> int:
    """Return the sectors that LVM lets a device read ahead: two rows of stripes, at least 256."""
    if lv.read_ahead:
        return max(lv.read_ahead, 0)
    rows = (len(each.areas) * each.stripe_size for each in lv.segments if len(each.areas) > 1)
    return max(2 * max(rows, default=0), MIN_READ_AHEAD)


def layout(lv: LogicalVolume) -> list[str]:
    """Return how an LV is laid out: linear, striped, mirror …"""
    kind = first_type(lv)
    if is_cache_volume(lv):
        return [_family(lv) or "cache", "cachevol"]
    if kind == "striped":
        return ["striped" if len(lv.segments[0].areas) > 1 else "linear"]
    if kind == "thin":
        return ["thin", "sparse"]
    if kind in ("thin-pool", "cache-pool", "vdo-pool"):
        return [kind.removesuffix("-pool"), "pool"]
    if kind in VIRTUAL:
        return ["virtual"] if is_virtual_origin(lv) else ["unknown"]
    if kind.startswith("raid"):
        level = kind.split("_")[0]
        usual = {"raid5": "raid5_ls", "raid6": "raid6_zr"}.get(kind, kind)
        found = ["raid", *([level] if kind != "raid0_meta" else [])]
        return found + ([usual] if usual in NAMED_LAYOUTS else [])
    return [kind] if lv.segments and lv.segments[0].known else ["unknown"]


def is_virtual_origin(lv: LogicalVolume) -> bool:
    """Tell whether an LV without extents is there for its snapshots."""
    return first_type(lv) in VIRTUAL and (lv.is_origin or not lv.visible)


def role(lv: LogicalVolume) -> list[str]:
    """Return what an LV is there for: public or private, origin, snapshot …"""
    public = (lv.visible and not is_pool(lv) and not is_virtual_origin(lv)) or lv.is_cow
    found = ["public" if public else "private"]
    kind = first_type(lv)
    part = role_of_part(lv)
    if part:
        above = parent(lv)
        family = "pool" if part == "spare" else first_type(above).split("-")[0] if above else ""
        if above is not None and is_pool(above):
            found += [family, "pool"]
        elif family:
            found.append("raid" if family.startswith("raid") else family)
        found.append(part)
    if above_kind := hidden_origin(lv):
        found += [above_kind, "origin", f"{above_kind}origin"]
    thin = thin_snapshots(lv)
    based = thin_snapshots(lv, "external_origin")
    if thin or based or lv.is_origin:
        found.append("origin")
    if thin:
        found += ["thinorigin", *(["multithinorigin"] if len(thin) > 1 else [])]
    if based:
        found += ["extthinorigin", *(["multiextthinorigin"] if len(based) > 1 else [])]
    if lv.is_origin:
        found += ["thickorigin", *(["multithickorigin"] if len(lv.snapshots) > 1 else [])]
    if is_moved(lv):
        found.append("pvmove")
    if lv.is_cow:
        found += ["snapshot", "thicksnapshot"]
    if kind == "thin" and origin_of(lv) is not None:
        found += ["snapshot", "thinsnapshot"]
    return found


def modules(lv: LogicalVolume) -> list[str]:
    """Return the modules of device-mapper that run it, beside those that are always there."""
    found: list[str] = []
    for segment in lv.segments:
        if segment.type in VIRTUAL or segment.type in ("mirror", *THIN):
            names = ["thin", "thin-pool"] if segment.type == "thin" else [segment.type]
            found += [each for each in names if each not in found]
        elif segment.type.startswith("raid") and "raid" not in found:
            found.append("raid")
        elif segment.type in ("cache", "cache-pool"):
            found.append("cache")
        elif segment.type in ("writecache", "integrity"):
            found.append(segment.type)
    if "raid" in found and integrity(lv) is not None:
        found.insert(0, "integrity")
    if lv.is_origin or lv.is_cow:
        first = found[:1] in (["mirror"], ["raid"], ["cache"])
        found.insert(len(found) if first else 0, "snapshot")
    return found


# ---- mirrors


def sync_percent(row: Row) -> Fraction | None:
    """Return how much of an active mirror is the same on all legs; None of anything else."""
    lv = row.lv
    assert lv is not None
    device = row.live.device(lv, REAL if lv.is_origin else "")
    return device.sync_percent if device is not None else None


def image_is_synced(row: Row) -> bool:
    """Tell whether an image of a mirror holds what the mirror does; only an active one tells."""
    assert row.lv is not None
    above = parent(row.lv)
    return above is not None and sync_percent(replace(row, lv=above)) == 100


# ---- attr


def attributes(row: Row) -> str:
    """Return the ten letters of lv_attr."""
    lv = row.lv
    assert lv is not None
    device = row.live.device(lv)
    usage = row.live.usage(lv)
    return "".join(
        (
            _type_letter(row, lv),
            _permission_letter(lv, device),
            _policy_letter(lv),
            "m" if has_fixed_minor(lv) else "-",
            _state_letter(row, device, usage),
            "X" if not row.live.known else "o" if device and device.info.open_count else "-",
            _target_letter(lv),
            "z" if zeroes(lv) else "-",
            "p" if is_partial(lv) else "w" if "WRITEMOSTLY" in lv.status else "-",
            "k" if "ACTIVATION_SKIP" in lv.flags else "-",
        )
    )


def _type_letter(row: Row, lv: LogicalVolume) -> str:
    kind = first_type(lv)
    part = role_of_part(lv)
    above = parent(lv)
    letters = (
        ("O", lv.merging_snapshot is not None),
        ("p", is_moved(lv)),
        ("o", lv.is_origin or bool(thin_snapshots(lv, "external_origin"))),
        ("e", part in ("metadata", "spare")),
        ("T", part == "data" and above is not None and first_type(above) == "thin-pool"),
        ("C", part == "data"),
        ("R" if "NOTSYNCED" in lv.status else "r", is_raid(lv)),
        ("M" if "NOTSYNCED" in lv.status else "m", kind == "mirror"),
        ("V", kind == "thin"),
        ("g", kind == "integrity"),
        ("v", kind in VIRTUAL or not all(segment.known for segment in lv.segments)),
        ("t", kind == "thin-pool"),
        ("C", kind in ("cache-pool", *CACHES) or is_cache_volume(lv)),
        ("d", kind == "vdo-pool"),
        ("v", kind == "vdo"),
        ("i" if image_is_synced(row) else "I", part == "image"),
        ("l", part == "log"),
        ("S" if is_merging(lv) else "s", lv.is_cow),
        ("o", hidden_origin(lv) in CACHES),
    )
    return next((letter for letter, is_it in letters if is_it), "-")


def _permission_letter(lv: LogicalVolume, device: LiveDevice | None) -> str:
    if is_moved(lv):
        return "-"
    if not lv.writable:
        return "r"
    return "R" if device is not None and device.info.readonly else "w"


def _policy_letter(lv: LogicalVolume) -> str:
    letter = {"contiguous": "c", "cling": "l", "normal": "n", "anywhere": "a"}.get(
        lv.allocation_policy or "inherit", "i"
    )
    return letter.upper() if "LOCKED" in lv.status else letter


def _state_letter(row: Row, device: LiveDevice | None, usage: Usage | None) -> str:
    if not row.live.known:
        return "X"
    if device is None:
        return "-"
    failed = usage is not None and usage.merge_failed
    invalid = usage is not None and usage.invalid
    if device.info.suspended:
        return "S" if invalid else "M" if failed else "s"
    if device.info.live:
        return "I" if invalid else "m" if failed else "a"
    return "i" if device.info.inactive else "d"


def _target_letter(lv: LogicalVolume) -> str:
    kind = first_type(lv)
    if kind in THIN:
        return "t"
    if kind in ("cache-pool", *CACHES) or _family(lv) in CACHES:
        return "C"
    in_raid = _family(lv).startswith("raid") and role_of_part(lv) in ("image", "metadata")
    if is_raid(lv) or in_raid:
        return "r"
    if kind == "mirror" or _family(lv) == "mirror":
        return "m"
    if lv.is_cow or lv.is_origin:
        return "s"
    if kind in VIRTUAL:
        return "v"
    return "-" if all(segment.known for segment in lv.segments) else "u"


def _family(lv: LogicalVolume) -> str:
    above = parent(lv)
    return first_type(above) if above is not None else ""


def is_merging(lv: LogicalVolume) -> bool:
    """Tell whether a snapshot is merging, or is to be merged, into its origin."""
    record = lv.snapshot
    return record is not None and record.segments[0].merging


def is_moved(lv: LogicalVolume) -> bool:
    """Tell whether it is what a pvmove that has not ended puts below the LVs that it moves."""
    return "PVMOVE" in lv.status


def has_fixed_minor(lv: LogicalVolume) -> bool:
    """Tell whether its device always has the same number."""
    return "FIXED_MINOR" in lv.status


def zeroes(lv: LogicalVolume) -> bool:
    """Tell whether a thin pool, or that of a thin LV, zeroes what it hands out."""
    pool = lv if first_type(lv) == "thin-pool" else named_lv(lv, "thin_pool")
    return pool is not None and pool.segments[0].extra.get("zero_new_blocks") == 1


def is_partial(lv: LogicalVolume) -> bool:
    """Tell whether a PV is missing somewhere below the LV or below its snapshots."""
    seen: set[LogicalVolume] = set()
    left = [lv, *cow_stores(lv)]
    while left:
        each = left.pop()
        if each in seen:
            continue
        seen.add(each)
        for segment in each.segments:
            pvs = [area.of for area in segment.areas if isinstance(area.of, PhysicalVolume)]
            if any(pv.missing for pv in pvs):
                return True
            left += segment_lvs(segment)
            for value in segment.extra.values():
                names = value if isinstance(value, list) else [value]
                found = (lv.vg.find_lv(name) for name in names if isinstance(name, str))
                left += [other for other in found if other is not None]
    return False
