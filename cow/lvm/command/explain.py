"""explain: which LVs, records, dm devices and tables make up an LV, in words and a small tree.

This is the answer to "why does LVM make a snapshot0 beside the COW volume": it shows the record.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from cow.errors import CowOSError
from cow.lvm.command.command import Command
from cow.lvm.cow_size import shown_percent
from cow.lvm.errors import LVMError, LVNotFound
from cow.lvm.group import VolumeGroup
from cow.lvm.metadata import LogicalVolume, PhysicalVolume, Segment
from cow.lvm.report.traits import is_merging, layout
from cow.lvm.tables import DMDevice, Family, family, holder_of

WHY_A_RECORD = (
    "{record} is no volume: it has no extents and no device, and lvs never shows it. It is the"
    " record that ties the COW store {store} to its origin {origin}. In the text of the metadata"
    " only an LV can hold such a thing, so it is written as one: with a name, a uuid and a single"
    ' segment of type "snapshot". The status of {record} is {status}, that of {store}'
    " {store_status}: what is seen as {store} is the snapshot, not the store, so VISIBLE stands"
    " with the record."
)
WIDTH = 96

MEANINGS = {
    "snapshot-origin": "before a chunk changes, it is copied into every store that lacks it",
    "snapshot": "a chunk that is in the store comes from there, any other from the origin",
    "snapshot-merge": "the chunks of the store are moved back into the origin",
    "error": "nobody reads or writes here: it is being merged",
    "zero": "reads as zeros",
    "striped": "chunks go to the legs in turn",
    "mirror": "every leg has everything",
}


def explain(command: Command) -> None:
    """Explain LVs, snapshotN records among them."""
    for number, name in enumerate(command.args):
        try:
            vg_name, lv_name = command.lv_of(name)
            if not lv_name:
                raise LVMError(f"{name}: please name an LV, VG/LV.")
            vg = command.vg(vg_name)
            lv = vg.metadata.find_lv(lv_name)
            if lv is None:
                raise LVNotFound(f'Failed to find logical volume "{vg_name}/{lv_name}"')
            if number:
                command.print("")
            for line in _lines(command, vg, lv):
                command.print(line)
        except CowOSError as error:
            command.fail_with(error)


def _lines(command: Command, vg: VolumeGroup, lv: LogicalVolume) -> Iterator[str]:
    top = holder_of(lv)
    record = lv if lv.is_snapshot_record else lv.snapshot
    yield _headline(lv, record)
    yield ""
    yield from _metadata_lines(command, vg, top, record)
    records = [record] if record is not None else top.snapshots
    if records:
        yield ""
        yield from textwrap.wrap(_why(records[0]), WIDTH, break_on_hyphens=False)
    yield ""
    try:
        found = family(top, merge=_merges(command, top), partial=True)
    except LVMError as error:
        yield f"There are no devices: {error.strerror}"
        return
    yield from _device_lines(command, found, record)


def _headline(lv: LogicalVolume, record: LogicalVolume | None) -> str:
    if lv.is_snapshot_record:
        return f"{lv} is the record of a snapshot."
    if record is not None:
        segment = record.segments[0]
        origin = segment.origin
        if origin is not None and origin.is_virtual_origin:
            return f"{lv} is a sparse LV: a snapshot of an origin of zeros, {origin.name}."
        if segment.merging:
            return f"{lv} is a snapshot of {origin}, and is merged back into it."
        return f"{lv} is a snapshot of {origin}: what was there when it was made."
    if lv.is_virtual_origin:
        return f"{lv} is the origin of zeros that a sparse LV stands on."
    if lv.is_origin:
        count = len(lv.snapshots)
        return f"{lv} is an origin with {count} snapshot{'s' * (count > 1)}."
    hidden = "" if lv.visible else "hidden "
    return f"{lv} is a {hidden}{', '.join(layout(lv))} LV."


def _metadata_lines(
    command: Command, vg: VolumeGroup, top: LogicalVolume, record: LogicalVolume | None
) -> Iterator[str]:
    """Yield a line for each LV of the family, as the metadata has it."""
    extent = command.size(vg.metadata.extent_size)
    yield f"In the metadata of {vg.name} (extents of {extent}):"
    rows: list[tuple[str, str, str, LogicalVolume]] = []
    rows.append((top.name, command.size(top.sectors), "origin" if top.is_origin else "LV", top))
    for each in top.snapshots:
        if record is not None and each is not record:
            continue
        store = each.segments[0].cow
        if store is not None:
            rows.append((store.name, command.size(store.sectors), "COW store", store))
        rows.append((each.name, "-", "record", each))
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:3]]
    for name, size, kind, lv in rows:
        words = _where(lv) if lv.segments and not lv.is_snapshot_record else _keys(lv)
        yield (
            f"  {name:<{widths[0]}}  {size:>{widths[1]}}  {kind:<{widths[2]}}  {words}"
            f"{_usage(command, lv)}"
        )
    others = [each for each in top.snapshots if record is not None and each is not record]
    if others:
        stores = [store for each in others if (store := each.segments[0].cow) is not None]
        yield f"  ({top.name} has more snapshots: {', '.join(store.name for store in stores)})"


def _where(lv: LogicalVolume) -> str:
    """Return where the extents of an LV lie."""
    return ", ".join(_segment_place(segment) for segment in lv.segments)


def _segment_place(segment: Segment) -> str:
    if not segment.areas:
        return segment.type_text
    places = []
    for area in segment.areas:
        name = str(area.of) if isinstance(area.of, PhysicalVolume) else area.of.name
        last = area.start + segment.area_extents - 1
        places.append(f"{name} {area.start}" + (f"-{last}" if last > area.start else ""))
    return (" + " if segment.type == "striped" else " = ").join(places)


def _keys(record: LogicalVolume) -> str:
    """Return what the segment of a snapshotN says, as the text has it."""
    segment = record.segments[0]
    key = "merging_store" if segment.merging else "cow_store"
    origin = segment.origin.name if segment.origin else ""
    store = segment.cow.name if segment.cow else ""
    return f'origin = "{origin}", {key} = "{store}", chunk_size = {segment.chunk_size}'


def _usage(command: Command, lv: LogicalVolume) -> str:
    usage = command.live.usage(lv) if lv.is_cow else None
    if usage is None:
        return ""
    if usage.problem:
        return f"  ({usage.problem})"
    left = "left to merge" if is_merging(lv) else "used"
    return f"  ({shown_percent(usage.percent):.2f}% {left})"


def _why(record: LogicalVolume) -> str:
    segment = record.segments[0]
    store, origin = segment.cow, segment.origin
    return WHY_A_RECORD.format(
        record=record.name,
        store=store.name if store else "",
        origin=origin.name if origin else "",
        status="+".join(record.status),
        store_status="+".join(store.status) if store else "",
    )


def _merges(command: Command, top: LogicalVolume) -> bool:
    """Tell whether a merge runs, or would on activation."""
    device = command.live.device(top)
    return device is None or device.usage("snapshot-merge") is not None


# ---- devices


def _device_lines(command: Command, found: Family, record: LogicalVolume | None) -> Iterator[str]:
    active = command.live.is_active(found.lv)
    yield "Device-mapper runs:" if active else "When it is active, device-mapper runs:"
    known: set[str] = set()
    store = record.segments[0].cow if record is not None else None
    for top in found.tops:
        if store is not None and top.lv not in (found.lv, store):
            continue
        yield from _tree(command, top, known, "  ", "  ")


def _tree(
    command: Command, device: DMDevice, known: set[str], first: str, rest: str
) -> Iterator[str]:
    """Yield a device with its table lines, and below it what it stands on."""
    if device.uuid in known:
        yield f"{first}{device.name} (see above)"
        return
    known.add(device.uuid)
    live = command.live.device(device.lv, device.layer)
    number = f" ({live.info.major}:{live.info.minor})" if live is not None else ""
    readonly = ", read-only" if device.readonly else ""
    yield f"{first}{device.name}{number}{readonly}"
    below = list(dict.fromkeys(device.below))
    bar = "│ " if below else "  "
    for line in device.table.split("\n"):
        yield f"{rest}{bar}{line}"
    if meaning := MEANINGS.get(device.type):
        yield f"{rest}{bar}# {meaning}"
    yield from _branches(command, below, known, rest)


def _branches(
    command: Command, devices: Sequence[DMDevice], known: set[str], indent: str
) -> Iterator[str]:
    for index, device in enumerate(devices):
        last = index == len(devices) - 1
        yield from _tree(
            command,
            device,
            known,
            f"{indent}{'└─' if last else '├─'} ",
            f"{indent}{'   ' if last else '│  '}",
        )
