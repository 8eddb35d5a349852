"""lvdisplay, vgdisplay, pvdisplay, lvscan, vgscan and pvscan: what there is, in words."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from cow.lvm.allocation import free_areas
from cow.lvm.command import reports
from cow.lvm.command.command import Command
from cow.lvm.command.maps import map_lines
from cow.lvm.cow_size import shown_percent
from cow.lvm.errors import RequestError
from cow.lvm.group import VolumeGroup
from cow.lvm.metadata import (
    LogicalVolume,
    PhysicalVolume,
    Segment,
    VolumeGroupMetadata,
    may_write,
)
from cow.lvm.names import dashed_id
from cow.lvm.report.live import LiveDevice
from cow.lvm.report.rows import Row
from cow.lvm.report.traits import (
    cow_stores,
    first_type,
    has_fixed_minor,
    has_link,
    hidden_origin,
    is_partial,
    is_pool,
    read_ahead_in_use,
)
from cow.lvm.report.values_pv import (
    device_sectors,
    pv_free_sectors,
    pv_name,
    pv_sectors,
    pv_used_extents,
    pv_uuid,
    used_extents,
    vg_mdas,
    visible_lvs,
)

STATUS_BITS = {"EXPORTED": 2, "RESIZEABLE": 4, "ALLOCATABLE": 8, "READ": 256, "WRITE": 512}
"""How lvm2 writes the words of a status in colon-separated output."""


def _check_forms(command: Command, *forms: str) -> None:
    """Refuse columns (-C) together with another form."""
    if command.options.has("columns") and command.options.has(*forms):
        raise RequestError("Incompatible options selected")


# ---- LVs


def lvdisplay(command: Command) -> None:
    """Tell about LVs in blocks of lines, or in colon-separated ones (-c)."""
    _check_forms(command, "colon", "maps")
    if command.options.has("colon") and command.options.has("maps"):
        raise RequestError("Options -c and -m are incompatible.")
    if command.options.has("columns"):
        reports.lvs(command)
        return
    hidden = command.options.has("all")
    for _, lvs in command.each_lv(command.args, hidden=hidden):
        for lv in lvs:
            if not (lv.visible or hidden):
                continue
            if command.options.has("colon"):
                command.print(_lv_colons(command, lv))
            else:
                command.print("\n".join(_lv_lines(command, lv)))
                if command.options.has("maps"):
                    command.print("\n".join(map_lines(command, lv)))


def _lv_colons(command: Command, lv: LogicalVolume) -> str:
    device = command.live.device(lv)
    active = command.live.is_active(lv)
    fields = [
        f"/dev/{lv}",
        lv.vg.name,
        (3 if lv.writable else 1) | (4 if device and device.info.readonly else 0),
        int(active),
        -1,
        device.info.open_count if device else 0,
        lv.sectors,
        lv.extent_count,
        -1,
        2 if lv.allocation_policy == "contiguous" else 0,
        max(lv.read_ahead, 0) if lv.read_ahead else -1,
        device.info.major if device else -1,
        device.info.minor if device else -1,
    ]
    return ":".join(map(str, fields))


def _lv_lines(command: Command, lv: LogicalVolume) -> Iterator[str]:
    live = command.live
    device = live.device(lv)
    yield "--- Logical volume ---"
    if has_link(lv):
        yield f"LV Path                /dev/{lv}"
    if lv.visible:
        yield f"LV Name                {lv.name}"
    else:
        yield f"Internal LV Name       {lv.name}"
    yield f"VG Name                {lv.vg.name}"
    yield f"LV UUID                {dashed_id(lv.id)}"
    yield f"LV Write Access        {_access(lv, device)}"
    yield f"LV Creation host, time {lv.creation_host or ''}, {_time(lv.creation_time)}"
    yield from _snapshot_lines(command, lv)
    yield from _pool_lines(lv)
    if live.known:
        yield f"LV Status              {_status(lv, device)}"
    if device is not None:
        yield f"# open                 {device.info.open_count}"
    yield from _size_lines(command, lv)
    yield from _mirror_lines(lv)
    yield f"Segments               {len(lv.segments)}"
    yield f"Allocation             {lv.allocation_policy or 'inherit'}"
    ahead = max(lv.read_ahead, 0) if lv.read_ahead else "auto"
    yield f"Read ahead sectors     {ahead}"
    if device is not None and read_ahead_in_use(lv) != ahead:
        yield f"- currently set to     {read_ahead_in_use(lv)}"
    if has_fixed_minor(lv):
        if lv.major is not None and lv.major >= 0:
            yield f"Persistent major       {lv.major}"
        yield f"Persistent minor       {lv.minor}"
    if device is not None:
        yield f"Block device           {device.info.major}:{device.info.minor}"
    yield " "


def _access(lv: LogicalVolume, device: LiveDevice | None) -> str:
    if not lv.writable:
        return "read only"
    if device is not None and device.info.readonly:
        return "read/write (activated read only)"
    return "read/write"


def _time(seconds: int | None) -> str:
    return time.strftime("%Y-%m-%d %T %z", time.localtime(seconds)) if seconds else ""


def _status(lv: LogicalVolume, device: LiveDevice | None) -> str:
    if device is not None and device.info.suspended:
        return "suspended"
    available = "NOT available" if device is None else "available"
    return f"{available} (partial)" if is_partial(lv) else available


def is_readable(command: Command, lv: LogicalVolume) -> bool:
    """Tell whether a snapshot is active and not lost."""
    usage = command.live.usage(lv)
    return usage is not None and not usage.problem


def _snapshot_lines(command: Command, lv: LogicalVolume) -> Iterator[str]:
    if lv.is_origin:
        yield "LV snapshot status     source of"
        for store in cow_stores(lv):
            state = "active" if is_readable(command, store) else "INACTIVE"
            yield f"                       {store.name} [{state}]"
    record = lv.snapshot
    if record is not None:
        origin = record.segments[0].origin
        state = "active" if is_readable(command, lv) else "INACTIVE"
        yield (f"LV snapshot status     {state} destination for {origin.name if origin else ''}")


def _pool_lines(lv: LogicalVolume) -> Iterator[str]:
    """Yield what a pool consists of, and what a thin LV or the origin of a cache belongs to."""
    extra = lv.segments[0].extra if lv.segments else {}
    if is_pool(lv):
        yield f"LV Pool metadata       {extra.get('metadata', '')}"
        yield f"LV Pool data           {extra.get('pool') or extra.get('data', '')}"
    elif first_type(lv) == "thin":
        yield f"LV Pool name           {extra.get('thin_pool', '')}"
        if "origin" in extra:
            yield f"LV Thin origin name    {extra['origin']}"
        if "external_origin" in extra:
            yield f"LV External origin name {extra['external_origin']}"
    elif hidden_origin(lv) == "cache":
        for user in lv.users:
            yield f"LV origin of Cache LV  {user.name}"


def _mirror_lines(lv: LogicalVolume) -> Iterator[str]:
    if first_type(lv) == "mirror":
        yield f"Mirrored volumes       {len(lv.segments[0].areas)}"
    elif first_type(lv) in ("raid1", "raid10"):
        yield f"Mirrored volumes       {lv.segments[0].extra.get('device_count', 0)}"


def _size_lines(command: Command, lv: LogicalVolume) -> Iterator[str]:
    record = lv.snapshot
    if record is None:
        yield f"LV Size                {command.size(lv.sectors)}"
        yield f"Current LE             {lv.extent_count}"
        return
    extents = record.segments[0].extent_count
    yield f"LV Size                {command.size(extents * lv.vg.extent_size)}"
    yield f"Current LE             {extents}"
    yield f"COW-table size         {command.size(lv.sectors)}"
    yield f"COW-table LE           {lv.extent_count}"
    usage = command.live.usage(lv)
    if usage is not None and not usage.problem:
        yield f"Allocated to snapshot  {shown_percent(usage.percent):.2f}%"
    yield f"Snapshot chunk size    {command.size(record.segments[0].chunk_size)}"


def lvscan(command: Command) -> None:
    """Say in a line for each LV whether it is active."""
    for _, lvs in command.each_lv((), hidden=command.options.has("all")):
        for lv in lvs:
            record = lv.snapshot
            active = is_readable(command, lv) if record else command.live.is_active(lv)
            kind = "Original" if lv.is_origin else "Snapshot" if record else "        "
            command.print(
                f"{'ACTIVE  ' if active else 'inactive'} {kind} '/dev/{lv}'"
                f" [{command.size(lv.sectors)}] {lv.allocation_policy or 'inherit'}"
            )


# ---- VGs


def vgdisplay(command: Command) -> None:
    """Tell about VGs in blocks of lines, in short (-s) or in colon-separated ones (-c)."""
    _check_forms(command, "colon", "short")
    if command.options.has("colon") and command.options.has("short"):
        raise RequestError("Option -c is not allowed with option -s")
    if command.options.has("columns"):
        reports.vgs(command)
        return
    for vg in command.each_vg(command.args):
        if command.options.has("colon"):
            command.print(_vg_colons(command, vg))
        elif command.options.has("short"):
            command.print(_vg_short(command, vg.metadata))
        else:
            command.print("\n".join(_vg_lines(command, vg)))
            if command.options.get("verbose"):
                _vg_contents(command, vg)


def _vg_colons(command: Command, vg: VolumeGroup) -> str:
    metadata = vg.metadata
    free = metadata.free_extents
    writable = may_write(metadata.status, metadata.flags)
    status = [word for word in metadata.status if word != "WRITE"] + ["WRITE"] * writable
    fields = [
        vg.name,
        "r/w" if writable else "r",
        sum(STATUS_BITS.get(word, 0) for word in status),
        -1,
        metadata.max_lv,
        visible_lvs(metadata),
        _open_lvs(command, metadata),
        -1,
        metadata.max_pv,
        len(metadata.pvs),
        len(metadata.pvs) - len(metadata.missing_pvs),
        metadata.extent_count * metadata.extent_size // 2,
        metadata.extent_size // 2,
        metadata.extent_count,
        metadata.extent_count - free,
        free,
        dashed_id(metadata.id),
    ]
    return ":".join(map(str, fields))


def _open_lvs(command: Command, vg: VolumeGroupMetadata) -> int:
    return sum(lv.visible and command.live.is_open(lv) for lv in vg.lvs)


def _vg_short(command: Command, vg: VolumeGroupMetadata) -> str:
    total, free = vg.extent_count, vg.free_extents
    sizes = [command.size(count * vg.extent_size) for count in (total, total - free, free)]
    return f'"{vg.name}" {sizes[0]:<9} [{sizes[1]:<9} used / {sizes[2]} free]'


def _vg_lines(command: Command, vg: VolumeGroup) -> Iterator[str]:
    metadata = vg.metadata
    status = metadata.status
    total, free = metadata.extent_count, metadata.free_extents
    exported = "exported/" if "EXPORTED" in status else ""
    resizable = "resizable" if "RESIZEABLE" in status else "NOT resizable"
    yield "--- Volume group ---"
    yield f"VG Name               {vg.name}"
    yield f"System ID             {metadata.system_id or ''}"
    yield f"Format                {metadata.format}"
    yield f"Metadata Areas        {len(vg_mdas(metadata))}"
    yield f"Metadata Sequence No  {metadata.seqno}"
    access = "read/write" if may_write(status, metadata.flags) else "read"
    yield f"VG Access             {access}"
    yield f"VG Status             {exported}{resizable}"
    yield f"MAX LV                {metadata.max_lv}"
    yield f"Cur LV                {visible_lvs(metadata)}"
    yield f"Open LV               {_open_lvs(command, metadata)}"
    yield f"Max PV                {metadata.max_pv}"
    yield f"Cur PV                {len(metadata.pvs)}"
    yield f"Act PV                {len(metadata.pvs) - len(metadata.missing_pvs)}"
    yield f"VG Size               {command.size(total * metadata.extent_size)}"
    yield f"PE Size               {command.size(metadata.extent_size)}"
    yield f"Total PE              {total}"
    used = total - free
    yield f"Alloc PE / Size       {used} / {command.size(used * metadata.extent_size)}"
    yield f"Free  PE / Size       {free} / {command.size(free * metadata.extent_size)}"
    yield f"VG UUID               {dashed_id(metadata.id)}"
    yield " "


def _vg_contents(command: Command, vg: VolumeGroup) -> None:
    """Tell about the LVs and the PVs of a VG, as vgdisplay -v does."""
    for lv in vg.metadata.lvs:
        if lv.visible:
            command.print("\n".join(_lv_lines(command, lv)))
    command.print("--- Physical volumes ---")
    for pv in vg.metadata.pvs:
        allocatable = "allocatable" if "ALLOCATABLE" in pv.status else "NOT allocatable"
        free = pv.pe_count - used_extents(vg.metadata, pv)
        command.print(f"PV Name               {pv}     ")
        command.print(f"PV UUID               {dashed_id(pv.id)}")
        command.print(f"PV Status             {allocatable}")
        command.print(f"Total PE / Free PE    {pv.pe_count} / {free}")
        command.print(" ")


def vgscan(command: Command) -> None:
    """Name the VGs that are found."""
    for vg in command.each_vg(()):
        exported = "exported " if "EXPORTED" in vg.metadata.status else ""
        command.print(
            f'Found {exported}volume group "{vg.name}" using metadata type {vg.metadata.format}'
        )


# ---- PVs


def pvdisplay(command: Command) -> None:
    """Tell about PVs in blocks of lines, in short (-s) or in colon-separated ones (-c)."""
    _check_forms(command, "colon", "maps", "short")
    if command.options.has("colon") and command.options.has("maps"):
        raise RequestError("Option -c not allowed with option -m")
    if command.options.has("columns"):
        reports.pvs(command)
        return
    matches = command.selection("pv", ("pv", "vg"))
    for row in reports.pv_list(command, Row(command.live)):
        if matches is not None and not matches(row):
            continue
        if command.options.has("short"):
            size = pv_free_sectors(row)
            command.print(f'Device "{pv_name(row)}" has a capacity of {command.size(size)}')
            continue
        if row.pv is None:
            size = device_sectors(row)
            command.print(f'"{pv_name(row)}" is a new physical volume of "{command.size(size)}"')
        elif row.vg is not None and _is_exported(row):
            what = f'Physical volume "{pv_name(row)}" of volume group "{row.vg.name}"'
            command.print(f"{what} is exported")
        if command.options.has("colon"):
            command.print(_pv_colons(row))
        elif row.pv is None:
            command.print("\n".join(_orphan_lines(command, row)))
            if command.options.has("maps"):
                command.print(" ")
        else:
            command.print("\n".join(_pv_lines(command, row)))
            if command.options.has("maps") and row.vg is not None:
                command.print("\n".join(_pieces_lines(row.vg, row.pv)))


def _is_exported(row: Row) -> bool:
    return row.vg is not None and "EXPORTED" in row.vg.status


def _pv_colons(row: Row) -> str:
    extents = row.pv.pe_count if row.pv else 0
    used = pv_used_extents(row)
    allocatable = STATUS_BITS["ALLOCATABLE"] if row.pv and row.pv.allocatable else 0
    fields: Sequence[object] = [
        pv_name(row),
        row.vg.name if row.vg else "",
        device_sectors(row),
        -1,
        allocatable + (STATUS_BITS["EXPORTED"] if _is_exported(row) else 0),
        allocatable,
        -1,
        row.vg.extent_size // 2 if row.vg else 0,
        extents,
        extents - used,
        used,
        pv_uuid(row),
    ]
    return ":".join(map(str, fields))


def _orphan_lines(command: Command, row: Row) -> Iterator[str]:
    yield "--- NEW Physical volume ---"
    yield f"PV Name               {pv_name(row)}"
    yield "VG Name               "
    yield f"PV Size               {command.size(device_sectors(row))}"
    yield "Allocatable           NO"
    yield "PE Size               0   "
    yield "Total PE              0"
    yield "Free PE               0"
    yield "Allocated PE          0"
    yield f"PV UUID               {pv_uuid(row)}"
    yield " "


def _pv_lines(command: Command, row: Row) -> Iterator[str]:
    assert row.pv is not None
    assert row.vg is not None
    used = pv_used_extents(row)
    size = row.pv.dev_size or device_sectors(row)
    unusable = size - pv_sectors(row)
    if unusable <= row.pv.pe_start:
        unusable = 0
    shown = f"{command.size(size)} / not usable {command.size(unusable)}"
    full = " (but full)" if used == row.pv.pe_count else " "
    yield "--- Physical volume ---"
    yield f"PV Name               {pv_name(row)}"
    yield f"VG Name               {row.vg.name}" + (" (exported)" if _is_exported(row) else "")
    yield f"PV Size               {shown}"
    yield "Allocatable           " + (f"yes{full}" if "ALLOCATABLE" in row.pv.status else "NO")
    yield f"PE Size               {command.size(row.vg.extent_size)}"
    yield f"Total PE              {row.pv.pe_count}"
    yield f"Free PE               {row.pv.pe_count - used}"
    yield f"Allocated PE          {used}"
    yield f"PV UUID               {pv_uuid(row)}"
    yield " "


def _pieces_lines(vg: VolumeGroupMetadata, pv: PhysicalVolume) -> Iterator[str]:
    used = [
        (area.start, segment.area_extents, lv, segment)
        for lv in vg.lvs
        for segment in lv.segments
        for area in segment.areas
        if area.of is pv
    ]
    pieces: list[tuple[int, int, LogicalVolume | None, Segment | None]] = [*used]
    pieces += [(area.start, area.count, None, None) for area in free_areas(vg) if area.pv is pv]
    yield "--- Physical Segments ---"
    for start, count, lv, segment in sorted(pieces, key=lambda piece: piece[0]):
        yield f"Physical extent {start} to {start + count - 1}:"
        if lv is None or segment is None:
            yield "  FREE"
        else:
            yield f"  Logical volume\t/dev/{lv}"
            yield f"  Logical extents\t{segment.start_extent} to {segment.end_extent - 1}"
    yield " "


def pvscan(command: Command) -> None:
    """List the PVs in a line each, with totals."""
    options = command.options
    if options.has("exported"):
        command.warn("WARNING: only considering physical volumes of exported volume group(s)")
    if options.has("novolumegroup"):
        command.warn("WARNING: only considering physical volumes in no volume group")
    rows = [
        row
        for row in reports.all_pvs(command, Row(command.live))
        if not (options.has("novolumegroup") and row.vg is not None)
        and not (
            options.has("exported") and not (row.vg is not None and "EXPORTED" in row.vg.status)
        )
    ]
    if not rows:
        command.print("No matching physical volumes found")
        return
    for line in _pvscan_lines(command, rows):
        command.print(line)
    sizes = {
        used: [pv_sectors(row) for row in rows if (row.vg is not None) is used]
        for used in (True, False)
    }
    total = sizes[True] + sizes[False]
    command.print(
        f"Total: {len(total)} [{command.size(sum(total))}]"
        f" / in use: {len(sizes[True])} [{command.size(sum(sizes[True]))}]"
        f" / in no VG: {len(sizes[False])} [{command.size(sum(sizes[False]))}]"
    )


def _pvscan_lines(command: Command, rows: Sequence[Row]) -> Iterator[str]:
    if command.options.has("short"):
        yield from map(pv_name, rows)
        return
    by_uuid = command.options.has("uuid")
    names = [
        f"{pv_name(row)} with UUID {pv_uuid(row)}" if by_uuid else pv_name(row) for row in rows
    ]
    width = max(map(len, names)) + (4 if by_uuid else 3)
    for row, name in zip(rows, names, strict=True):
        vg = f"VG {row.vg.name}" if row.vg else ""
        size = command.size(pv_sectors(row))
        free = f" / {command.size(pv_free_sectors(row))} free" if row.vg else ""
        if row.vg and "EXPORTED" in row.vg.status:
            yield f"PV {name:<{width}} is in exported {vg} [{size}{free}]"
        else:
            yield f"PV {name:<{width}}{vg:<18} lvm2 [{size}{free}]"
