"""COW snapshots in the metadata: the record that ties a COW store to its origin, and the rules.

A snapshot is three LVs: the origin, the COW store with the name users know, and snapshotN. The
record snapshotN owns nothing; it is VISIBLE where the store is not. While a snapshot waits to be
merged, or is merged, the record is hidden too. These are edits of a generation, without any device.
(lib/metadata/snapshot_manip.c)
"""

from __future__ import annotations

from collections.abc import Callable

from cow.lvm.cow_size import cap_new, check_chunk_size, check_minimum
from cow.lvm.create import LVOptions, create_lv
from cow.lvm.errors import InUse, LVMError, LVNotFound
from cow.lvm.metadata import LogicalVolume, Segment, VolumeGroupMetadata
from cow.lvm.names import free_name

Report = Callable[[str], None]

RECORD_PREFIX = "snapshot"
VIRTUAL_ORIGIN_SUFFIX = "_vorigin"


def find_origin(vg: VolumeGroupMetadata, name: str) -> LogicalVolume:
    """Return the LV that is to be an origin."""
    lv = vg.find_lv(name)
    if lv is None or lv.is_snapshot_record:
        raise LVNotFound(f"Snapshot origin LV {name} not found in Volume group {vg.name}.")
    return lv


def check_origin(origin: LogicalVolume, report: Report = lambda text: None) -> None:
    """Refuse an LV that can have no snapshot, or no further one."""
    if origin.is_cow:
        raise LVMError("Snapshots of snapshots are not supported.")
    if "LOCKED" in origin.status or "PVMOVE" in origin.status:
        raise LVMError("Snapshots of locked volumes are not supported.")
    if origin.merging_snapshot is not None:
        raise LVMError("Snapshots of an origin that has a merging snapshot are not supported.")
    if not origin.visible:
        raise LVMError(f"Snapshots of hidden logical volume {origin} are not supported.")
    for segment in origin.segments:
        if not segment.runnable:
            raise LVMError(f"Snapshots of {segment.type_text} volumes are not supported.")
    if any(segment.type == "mirror" for segment in origin.segments):
        report("WARNING: Snapshots of mirrors can deadlock under rare device failures.")
        report("WARNING: Consider using the raid1 mirror type to avoid this.")
        report("WARNING: See global/mirror_segtype_default in lvm.conf.")


def create_store(
    origin: LogicalVolume,
    name: str | None,
    extents: int,
    chunk_size: int,
    options: LVOptions,
    report: Report = lambda text: None,
) -> LogicalVolume:
    """Add the LV that is to be the store of a snapshot: as yet a plain one that users see.

    It is no larger than is of use, and large enough for one exception.
    """
    vg = origin.vg
    check_origin(origin, report)
    check_chunk_size(chunk_size)
    check_minimum(extents, chunk_size, vg.extent_size)
    extents = cap_new(extents, origin.extent_count, chunk_size, vg.extent_size, report)
    return create_lv(vg, name, extents, options, report)


def attach(origin: LogicalVolume, cow: LogicalVolume, chunk_size: int) -> LogicalVolume:
    """Make an LV the COW store of a new snapshot of an origin; return the record."""
    vg = origin.vg
    record = vg.new_lv(
        free_name(RECORD_PREFIX, (lv.name for lv in vg.lvs)),
        segments=[
            Segment(
                0,
                origin.extent_count,
                "snapshot",
                chunk_size=chunk_size,
                origin=origin,
                cow=cow,
            )
        ],
    )
    cow.set_status("VISIBLE", False)
    return record


def add_virtual_origin(vg: VolumeGroupMetadata, name: str, extents: int) -> LogicalVolume:
    """Add the origin of the sparse snapshot `name`: hidden, read-only, all zeros."""
    lv = vg.new_lv(name + VIRTUAL_ORIGIN_SUFFIX, status=["READ"])
    lv.segments.append(Segment(0, extents, "zero"))
    return lv


def detach(cow: LogicalVolume) -> None:
    """Make a COW store a plain LV that users see; its record is gone."""
    record = cow.snapshot
    assert record is not None
    cow.vg.lvs.remove(record)
    cow.set_status("VISIBLE", True)


def find_snapshot(vg: VolumeGroupMetadata, name: str) -> tuple[LogicalVolume, LogicalVolume]:
    """Return a snapshot's COW store and its origin."""
    cow = vg.lv(name)
    record = cow.snapshot
    if record is None:
        kind = cow.segments[0].type if cow.segments else "error"
        kind = "linear" if kind == "striped" and len(cow.segments[0].areas) == 1 else kind
        raise LVMError(
            f"Command on LV {cow} does not accept LV type {kind}.\n"
            f"Command not permitted on LV {cow}."
        )
    origin = record.segments[0].origin
    assert origin is not None
    return cow, origin


def check_not_merging(cow: LogicalVolume) -> None:
    """Refuse what cannot be done to a snapshot that is, or is to be, merged."""
    record = cow.snapshot
    if record is not None and record.segments[0].merging:
        raise LVMError(
            f"Command on LV {cow} is invalid on LV with properties: lv_is_merging_cow .\n"
            f"Command not permitted on LV {cow}."
        )


def check_split(cow: LogicalVolume, origin: LogicalVolume) -> None:
    """Refuse to split off a snapshot that is nothing without its origin."""
    check_not_merging(cow)
    if origin.is_virtual_origin:
        raise LVMError(f"Unable to split off snapshot {cow} with virtual origin.")


def check_attach(origin: LogicalVolume, cow: LogicalVolume, chunk_size: int) -> None:
    """Refuse to make `cow` the store of a snapshot of `origin`."""
    if cow is origin:
        raise LVMError(f"Unable to use {cow} as both snapshot and origin.")
    if cow.is_cow:
        raise LVMError(
            f"Command on LV {cow} does not accept LV type snapshot.\n"
            f"Command not permitted on LV {cow}."
        )
    check_origin(origin)
    check_chunk_size(chunk_size)
    if cow.is_origin:
        raise LVMError(
            f"Unable to convert an LV into a snapshot of itself or another: {cow} is an origin."
        )
    if not cow.visible or "LOCKED" in cow.status:
        raise LVMError(f"Command not permitted on LV {cow}.")
    for segment in cow.segments:
        if segment.type != "striped" or not segment.runnable:
            raise LVMError(
                f"Command on LV {cow} does not accept LV type {segment.type_text}.\n"
                f"Command not permitted on LV {cow}."
            )
    check_minimum(cow.extent_count, chunk_size, cow.vg.extent_size)


def start_merge(cow: LogicalVolume, origin: LogicalVolume) -> None:
    """Ask for the merge of a snapshot into its origin."""
    check_not_merging(cow)
    if "LOCKED" in cow.status:
        raise InUse(f"Unable to merge locked logical volume {cow}.")
    if other := origin.merging_snapshot:
        raise LVMError(
            f"Cannot merge snapshot {cow} into the origin {origin} with merging snapshot"
            f" {other.segments[0].cow}."
        )
    if not origin.writable:
        raise LVMError(
            f"Cannot merge snapshot {cow} into the read-only origin {origin}. (Use lvchange -p rw)."
        )
    record = cow.snapshot
    assert record is not None
    record.segments[0].merging = True
    record.set_status("VISIBLE", False)
