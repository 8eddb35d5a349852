"""The rules a VG must obey, in LVM's words where LVM has them.

`reading_problems` are what makes LVM refuse to read a VG; `problems` also what nobody should write.
A change may not bring in a problem that was not there before. `refuse_change` says whether a VG may
be changed at all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Final

from cow.lvm.errors import LVMError, VGNotWritable
from cow.lvm.metadata import (
    LV_STATUS,
    MAX_EXTENTS,
    LogicalVolume,
    PhysicalVolume,
    Segment,
    VolumeGroupMetadata,
    segment_lvs,
)
from cow.lvm.names import ID_LENGTH, fits, is_name, is_tag
from cow.units import is_power_of_2, sectors

VG_STATUS: Final = frozenset(
    "RESIZEABLE READ WRITE EXPORTED PVMOVE CLUSTERED SHARED PARTIAL PRECOMMITTED".split()
)
PV_STATUS: Final = frozenset("ALLOCATABLE EXPORTED MISSING".split())

MIN_SNAPSHOT_CHUNK: Final = 8
MAX_SNAPSHOT_CHUNK: Final = 1024
"""Sectors."""
MIN_SNAPSHOT_CHUNKS: Final = 3
MAX_STRIPES: Final = 128
MAX_EXTENT_SIZE: Final = 2**32 - 1
"""Sectors."""


# May it be changed?


def unknown_status(vg: VolumeGroupMetadata) -> list[str]:
    """Return the words in `status` that are not known; LVM does not read such a VG at all."""
    words = {word for word in vg.status if word not in VG_STATUS}
    words |= {word for pv in vg.pvs for word in pv.status if word not in PV_STATUS}
    words |= {word for lv in vg.lvs for word in lv.status if word not in LV_STATUS}
    return sorted(words)


def unknown_segment_types(vg: VolumeGroupMetadata) -> list[str]:
    """Return the segment types, with their flags, that LVM would not know."""
    segments = (segment for lv in vg.lvs for segment in lv.segments)
    return sorted({segment.type_text for segment in segments if not segment.known})


def access_problem(vg: VolumeGroupMetadata) -> str | None:
    """Return why LVM would not let this host use the VG: whose it is. None: it may be used."""
    if vg.system_id:
        return (
            f"Cannot access VG {vg.name} with system ID {vg.system_id}"
            " with unknown local system ID."
        )
    if vg.needs_lockd:
        return f"Cannot access VG {vg.name} with lock type {vg.lock_type} that requires lvmlockd."
    if "CLUSTERED" in vg.status or "SHARED" in vg.status:
        return f"Cannot access clustered VG {vg.name}."
    return None


def change_problem(vg: VolumeGroupMetadata) -> str | None:
    """Return why the VG may only be read, None if it may be changed."""
    if reason := access_problem(vg):
        return reason
    if "EXPORTED" in vg.status:
        return f"Volume group {vg.name} is exported"
    if "WRITE" not in vg.status:
        return f"Volume group {vg.name} is read-only."
    if "WRITE_LOCKED" in vg.flags:
        return f"Volume group {vg.name} is write-locked."
    if "PVMOVE" in vg.status or any("PVMOVE" in lv.status for lv in vg.lvs):
        return f"Volume group {vg.name} has a pvmove in progress."
    if words := unknown_status(vg):
        return f"Cannot change VG {vg.name} with unknown status flag '{words[0]}'."
    if vg.missing_pvs:
        return f"Cannot change VG {vg.name} while PVs are missing.\nSee vgreduce --removemissing."
    if unknown_segment_types(vg):
        return f"Cannot change VG {vg.name} with unknown segments in it!"
    return None


def refuse_change(vg: VolumeGroupMetadata) -> None:
    """Raise VGNotWritable if the VG may only be read."""
    if reason := change_problem(vg):
        raise VGNotWritable(reason)


# Is it in order?


def reading_problems(vg: VolumeGroupMetadata) -> list[str]:
    """Return what makes the VG unreadable for LVM; [] if there is nothing."""
    return list(_reading_problems(vg))


def problems(vg: VolumeGroupMetadata) -> list[str]:
    """Return everything that is wrong with the VG."""
    return [*_reading_problems(vg), *_writing_problems(vg)]


def check_change(old: VolumeGroupMetadata | None, new: VolumeGroupMetadata) -> None:
    """Refuse a new generation that brings in a problem."""
    known = Counter(problems(old)) if old else Counter[str]()
    fresh = Counter(problems(new)) - known
    if fresh:
        raise LVMError(next(iter(fresh)))


def _reading_problems(vg: VolumeGroupMetadata) -> Iterator[str]:
    for pv_id, count in Counter(pv.id for pv in vg.pvs).items():
        if count > 1:
            yield f"Duplicate PV uuid {pv_id} in VG {vg.name}"
    for lv in vg.lvs:
        yield from _extents(lv)
    if loop := _loop(vg):
        yield f"LV {loop} stands on itself"
    yield from _overlaps(vg, PhysicalVolume)


def _extents(lv: LogicalVolume) -> Iterator[str]:
    expected = 0
    for number, segment in enumerate(lv.segments, 1):
        if segment.start_extent != expected:
            yield (
                f"LV {lv.name} invalid: segment {number} should begin at LE {expected}"
                f" (found {segment.start_extent})."
            )
        expected = segment.end_extent
        yield from _segment(lv, number, segment)
    if expected > MAX_EXTENTS:
        yield f"LV {lv.name}: {expected} extents, more than {MAX_EXTENTS}"
    if len(lv.segments) > 1 and any(segment.type == "snapshot" for segment in lv.segments):
        yield f"LV {lv.name}: only one segment permitted for snapshot"


def _segment(lv: LogicalVolume, number: int, segment: Segment) -> Iterator[str]:
    if segment.extent_count == 0:
        yield f"LV {lv.name} invalid: segment {number} has no extents."
    if segment.type == "striped" and segment.areas and segment.extent_count % len(segment.areas):
        yield (
            f"LV {lv.name} invalid: segment {number} has {segment.extent_count} extents in"
            f" {len(segment.areas)} stripes."
        )
    for area in segment.areas:
        end = area.start + segment.area_extents
        if isinstance(area.of, PhysicalVolume) and end > area.of.pe_count:
            yield f"Segment with extent {end} in PV {area.of.label} not found"
        elif isinstance(area.of, LogicalVolume) and end > area.of.extent_count:
            yield f"LV {lv.name} invalid: segment {number} needs LE {end - 1} of {area.of.name}."


def _loop(vg: VolumeGroupMetadata) -> str | None:
    """Return the name of an LV that stands on itself, by whatever way."""
    done: set[LogicalVolume] = set()
    for start in vg.lvs:
        path: list[tuple[LogicalVolume, Iterator[LogicalVolume]]] = [(start, _below(start))]
        above = {start}
        while path:
            lv, rest = path[-1]
            below = next(rest, None)
            if below is None:
                path.pop()
                above.discard(lv)
                done.add(lv)
            elif below in above:
                return below.name
            elif below not in done:
                above.add(below)
                path.append((below, _below(below)))
    return None


def _below(lv: LogicalVolume) -> Iterator[LogicalVolume]:
    return (below for segment in lv.segments for below in segment_lvs(segment))


def _overlaps(
    vg: VolumeGroupMetadata, kind: type[PhysicalVolume] | type[LogicalVolume]
) -> Iterator[str]:
    """Find extents of PVs, or of LVs, that two areas use."""
    runs: dict[PhysicalVolume | LogicalVolume, list[tuple[int, int, str]]] = {}
    for lv in vg.lvs:
        for segment in lv.segments:
            for area in (area for area in segment.areas if isinstance(area.of, kind)):
                run = (area.start, area.start + segment.area_extents, lv.name)
                runs.setdefault(area.of, []).append(run)
    for of, used in runs.items():
        what = f"PV {of.label}" if isinstance(of, PhysicalVolume) else f"LV {of.name}"
        end, owner = 0, ""
        for start, stop, name in sorted(used):
            if start < end:
                yield (
                    f"PV segments corrupted in VG {vg.name}: extent {start} of {what} is used by"
                    f" {owner} and {name}."
                )
            if stop > end:
                end, owner = stop, name


def _writing_problems(vg: VolumeGroupMetadata) -> Iterator[str]:
    yield from _names(vg)
    yield from _overlaps(vg, LogicalVolume)
    if not is_power_of_2(vg.extent_size) and vg.extent_size % 256:
        yield f"Extent size {vg.extent_size} sectors is neither a power of 2 nor whole 128 KiB."
    if vg.max_lv and len(vg.visible_lvs()) > vg.max_lv:
        yield f"Maximum number of logical volumes ({vg.max_lv}) reached in volume group {vg.name}"
    if vg.max_pv and len(vg.pvs) > vg.max_pv:
        yield f"Maximum number of physical volumes ({vg.max_pv}) exceeded for {vg.name}"
    for pv in vg.pvs:
        # pvresize writes a dev_size without what is before the extents.
        extents = pv.pe_count * vg.extent_size
        if pv.dev_size is not None and extents > pv.dev_size:
            yield f"PV {pv}: {pv.pe_count} extents do not fit on {pv.dev_size} sectors."
        elif pv.device is not None and pv.pe_start + extents > sectors(pv.device.size):
            size = sectors(pv.device.size)
            yield f"PV {pv}: {pv.pe_count} extents do not fit on {size} sectors."
    for lv in vg.lvs:
        if (lv.creation_time is None) is not (lv.creation_host is None):
            yield f"LV {lv.name}: creation_time and creation_host belong together."
        for segment in lv.segments:
            if segment.type == "striped" and len(segment.areas) > 1:
                yield from _stripes(lv, segment)
    yield from _snapshots(vg)


def _names(vg: VolumeGroupMetadata) -> Iterator[str]:
    if not is_name(vg.name):
        yield f'Volume group name "{vg.name}" is invalid.'
    ids = Counter([vg.id, *(pv.id for pv in vg.pvs), *(lv.id for lv in vg.lvs)])
    for each, count in ids.items():
        if count > 1 or len(each) != ID_LENGTH:
            yield f"uuid {each} is not unique in VG {vg.name}."
    labels = {pv.label for pv in vg.pvs}
    if len(labels) != len(vg.pvs):
        yield f"PVs of VG {vg.name} have the same label."
    for name, count in Counter(lv.name for lv in vg.lvs).items():
        if count > 1:
            yield f'Logical Volume "{name}" already exists in volume group "{vg.name}"'
        if not is_name(name):
            yield f'Logical volume name "{name}" is invalid.'
        elif not fits(vg.name, name):
            yield f'Name "{vg.name}/{name}" is too long.'
    stood_on = {below for lv in vg.lvs for below in _below(lv)}
    for lv in vg.lvs:
        if lv.name in labels and lv in stood_on:
            yield f"LV {lv.name} has the name of a PV's section and an LV stands on it."
    tags = {*vg.tags, *(tag for pv in vg.pvs for tag in pv.tags)}
    tags.update(tag for lv in vg.lvs for tag in lv.tags)
    tags.update(tag for lv in vg.lvs for segment in lv.segments for tag in segment.tags)
    for tag in sorted(tags):
        if not is_tag(tag):
            yield f"Invalid tag {tag}."


def _stripes(lv: LogicalVolume, segment: Segment) -> Iterator[str]:
    if len(segment.areas) > MAX_STRIPES:
        yield f"LV {lv.name}: {len(segment.areas)} stripes, more than {MAX_STRIPES}."
    if not is_power_of_2(segment.stripe_size) or segment.stripe_size > lv.vg.extent_size:
        yield (
            f"LV {lv.name}: stripe size {segment.stripe_size} sectors is not a power of 2 up to the"
            " extent size."
        )


def _snapshots(vg: VolumeGroupMetadata) -> Iterator[str]:
    by_cow, by_origin = vg.records_by_cow(), vg.records_by_origin()
    for record in vg.snapshot_records:
        segment = record.segments[0]
        origin, cow, chunk = segment.origin, segment.cow, segment.chunk_size
        assert origin is not None
        assert cow is not None
        if not is_power_of_2(chunk) or not MIN_SNAPSHOT_CHUNK <= chunk <= MAX_SNAPSHOT_CHUNK:
            yield f"{record.name}: Chunk size must be a power of 2 in the range 4K to 512K."
        elif cow.sectors < MIN_SNAPSHOT_CHUNKS * chunk:
            yield f"Snapshot volume {cow.name} cannot be smaller than {MIN_SNAPSHOT_CHUNKS} chunks."
        if origin is cow or cow.is_snapshot_record or origin.is_snapshot_record:
            yield f"{record.name}: {origin.name} and {cow.name} cannot be origin and COW store."
        if origin in by_cow or cow in by_origin:
            yield "Snapshots of snapshots are not supported."
        if by_cow[cow] is not record:
            yield f"COW store {cow.name} is used by {record.name} and another snapshot."
        if segment.extent_count > origin.extent_count:
            yield f"{record.name}: larger than its origin {origin.name}."
    for origin, records in by_origin.items():
        merging = [record.name for record in records if record.segments[0].merging]
        if len(merging) > 1:
            yield f"LV {origin.name} has more than one merging snapshot: {', '.join(merging)}."
