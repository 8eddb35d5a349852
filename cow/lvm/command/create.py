"""lvcreate: plain LVs, snapshots, sparse ones."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from cow.lvm.allocation import PVRange, allocatable_areas
from cow.lvm.command import activate
from cow.lvm.command.command import Command
from cow.lvm.command.options import UsageError
from cow.lvm.cow_size import check_chunk_size, percent_of_origin
from cow.lvm.create import LVOptions, new_lv_name
from cow.lvm.errors import LVMError, RequestError
from cow.lvm.group import VolumeGroup
from cow.lvm.metadata import MAX_EXTENTS, LogicalVolume, PhysicalVolume, VolumeGroupMetadata
from cow.lvm.names import check_lv_name
from cow.lvm.size import Amount
from cow.lvm.snapshot_record import find_origin
from cow.mapper import MAJOR
from cow.units import bytes_of

MAX_MINOR = 2**20 - 1
WIPED = 4096
"""Bytes at the start of a new LV that are zeroed, so that nothing old is found there."""


def lvcreate(command: Command) -> None:
    """Make an LV."""
    options = command.options
    snapshot = options.has("snapshot") or options.get("type") == "snapshot"
    _check_options(command, snapshot)
    vg_name, origin, name = _names(command, snapshot)
    if not snapshot and not options.has("size", "extents"):
        raise UsageError("")
    command.scan(readonly=False)
    vg = command.vg(vg_name)
    if name is not None:
        new_lv_name(vg.metadata, name)
    given = _lv_options(command, vg)
    if snapshot and origin:
        lv = _snapshot(command, vg, origin, name, given)
    elif snapshot:
        lv = _sparse(command, vg, name, given)
    else:
        lv = _plain(command, vg, name, given)
    if options.get("persistent"):
        _fix_minor(command, vg, lv)


def _check_options(command: Command, snapshot: bool) -> None:
    options = command.options
    if options.has("size") and options.has("extents"):
        raise RequestError("Please specify either size or extents (not both).")
    for name in ("size", "virtualsize", "chunksize", "stripesize", "stripes"):
        if options.get(name) == 0:
            raise RequestError(f"--{name} may not be zero.")
    if options.has("extents") and options["extents"].extents == 0:
        raise RequestError("--extents may not be zero.")
    if not 1 <= options.get("stripes", 1) <= 128:
        raise RequestError(f"Number of stripes ({options['stripes']}) must be between 1 and 128.")
    if snapshot:
        for name in ("zero", "wipesignatures"):
            if options.has(name):
                raise RequestError(f"Option --{name} is unsupported with snapshots.")
        if options.has("chunksize"):
            check_chunk_size(options["chunksize"])
    kind = options.get("type", "striped")
    if kind not in ("striped", "linear", "snapshot", "zero", "error"):
        raise RequestError(f"Creation of LVs of type {kind} is not supported.")
    if options.has("virtualsize") and not (kind == "snapshot" and options.has("size", "extents")):
        raise RequestError("Thin LVs are not supported; a sparse one needs --type snapshot and -L.")
    for name, needs in (("chunksize", snapshot), ("stripesize", options.has("stripes"))):
        if options.has(name) and not needs:
            raise RequestError(f"Command does not accept option: --{name}.")
    if options.get("persistent"):
        if not options.has("minor"):
            raise LVMError("Please specify minor number with --minor when using -My.")
        check_number(command)


def _names(command: Command, snapshot: bool) -> tuple[str, str, str | None]:
    """Return VG, origin ("" if there is none) and the name of the new LV (None: lvol%d)."""
    options = command.options
    sparse = options.has("virtualsize")
    name: str | None = options.get("name")
    given_vg, slash, rest = (name or "").removeprefix("/dev/").partition("/")
    if not command.args and snapshot and not sparse:
        raise RequestError("The origin name should include the volume group.")
    if not command.args and not slash:
        raise UsageError("")
    place = command.args[0] if command.args else given_vg
    origin = ""
    if snapshot and not sparse:
        vg_name, origin = command.lv_of(place)
        if not origin:
            raise RequestError("The origin name should include the volume group.")
    else:
        if "/" in place.removeprefix("/dev/"):
            raise RequestError("Volume group name expected (no slash)")
        vg_name = command.vg_of(place)
    if name is None:
        return vg_name, origin, None
    if slash:
        if given_vg != vg_name:
            text = f'Inconsistent volume group names given: "{given_vg}" and "{vg_name}"'
            if snapshot:
                text = f'Please use a single volume group name ("{vg_name}" or "{given_vg}").'
            raise RequestError(text)
        name = rest
    check_lv_name(name, vg_name)
    return vg_name, origin, name


def _lv_options(command: Command, vg: VolumeGroup) -> dict[str, Any]:
    """Return what the options say, as LVOptions has it."""
    options = command.options
    flags = ["ACTIVATION_SKIP"] if options.get("setactivationskip") else []
    flags += ["NOAUTOACTIVATE"] if options.no("setautoactivation") else []
    policy = options.get("alloc")
    if options.has("contiguous"):
        policy = "contiguous" if options["contiguous"] else "inherit"
    kind = options.get("type", "striped")
    found: dict[str, Any] = {
        "type": kind if kind in ("zero", "error") else "striped",
        "stripes": options.get("stripes", 1),
        "stripe_size": options.get("stripesize"),
        "policy": policy,
        "permission": options.get("permission", "rw"),
        "tags": options.get("addtag", ()),
        "read_ahead": options.get("readahead"),
        "flags": flags,
        "ranges": pv_ranges(vg.metadata, command.args[1:], command),
    }
    LVOptions(**found)
    return found


def pv_ranges(
    vg: VolumeGroupMetadata, names: Sequence[str], command: Command
) -> list[PVRange] | None:
    """Return where extents may come from: PVs, PV:START-END[:…], @tags; None if none is named."""
    if not names:
        return None
    found: list[PVRange] = []
    for text in names:
        if text.startswith("@"):
            found += [PVRange(pv) for pv in vg.pvs if text[1:] in pv.tags]
            continue
        name, *ranges = _split_ranges(text)
        path = command.shell.path(name)
        pv = next((pv for pv in vg.pvs if str(pv) in (name, path)), None)
        if pv is None:
            raise LVMError(f'Physical Volume "{name}" not found in Volume Group "{vg.name}".')
        found += [_range(pv, each) for each in ranges] or [PVRange(pv)]
    if not found:
        raise LVMError("No specified PVs have space available.")
    return found


def _split_ranges(text: str) -> list[str]:
    folder, slash, last = text.rpartition("/")
    name, *ranges = last.split(":")
    return [folder + slash + name, *ranges]


def _range(pv: PhysicalVolume, text: str) -> PVRange:
    match = re.fullmatch(r"([0-9]+)?(?:([-+])([0-9]+)?)?", text)
    if not match:
        raise LVMError(f"Physical extent parsing error at {text}.")
    start = int(match[1] or 0)
    end = pv.pe_count - 1
    if match[2] == "-" and match[3]:
        end = int(match[3])
    elif match[2] == "+" and match[3]:
        end = start + int(match[3]) - 1
    elif not match[2] and match[1]:
        end = start
    if not start <= end < pv.pe_count:
        raise LVMError(f"PE range error: start extent {start} to end extent {end}.")
    return PVRange(pv, start, end - start + 1)


# ---- sizes


def size_of(
    command: Command,
    vg: VolumeGroup,
    ranges: Sequence[PVRange] | None,
    allowed: str,
    origin: LogicalVolume | None = None,
) -> dict[str, int]:
    """Return extents or size (bytes) as the operations of a VG take them."""
    options = command.options
    if options.has("size"):
        _check_size(command, vg, options["size"])
        return {"size": bytes_of(options["size"])}
    if not options.has("extents"):
        return {}
    amount: Amount = options["extents"]
    count = amount.extents or 0
    metadata = vg.metadata
    if not amount.percent_of:
        return {"extents": min(count, MAX_EXTENTS)}
    if f"%{amount.percent_of}" not in allowed:
        raise LVMError(f"Please express size as {allowed}.")
    if amount.percent_of == "ORIGIN":
        assert origin is not None
        chunk = options.get("chunksize", 8)
        count = percent_of_origin(count, origin.extent_count, chunk, metadata.extent_size)
    else:
        base = {
            "VG": metadata.extent_count,
            "FREE": metadata.free_extents,
            "PVS": extents_of_pvs(metadata, ranges),
        }[amount.percent_of]
        count = base * count // 100
    if count > metadata.free_extents:
        count = metadata.free_extents
        if amount.percent_of not in ("FREE", "PVS"):
            text = f"{amount.extents}%{amount.percent_of}"
            command.say(
                f"Reducing {text} to remaining free space"
                f" {command.size(count * metadata.extent_size)} in VG."
            )
    count = within(metadata, ranges, count)
    if count == 0:
        raise LVMError("Calculated size of logical volume is 0 extents. Needs to be larger.")
    return {"extents": count}


def extents_of_pvs(vg: VolumeGroupMetadata, ranges: Sequence[PVRange] | None) -> int:
    """Return of how many extents %PVS is a part: of those that are free where PVs are named."""
    if not ranges:
        return vg.extent_count
    return sum(area.count for area in allocatable_areas(vg, ranges))


def within(vg: VolumeGroupMetadata, ranges: Sequence[PVRange] | None, extents: int) -> int:
    """Return what a percentage comes to where PVs are named: no more than is free there."""
    room = sum(area.count for area in allocatable_areas(vg, ranges)) if ranges else 0
    return min(extents, room or extents)


def _check_size(command: Command, vg: VolumeGroup, sectors: int) -> None:
    extent_size = vg.metadata.extent_size
    extents = -(-sectors // extent_size)
    if extents <= MAX_EXTENTS:
        return
    if sectors % extent_size:
        shown = command.size(extents * extent_size)
        command.say(f"Rounding up size to full physical extent {shown}")
    raise LVMError(
        f"Volume too large ({command.size(extents * extent_size)}) for extent size"
        f" {command.size(extent_size)}. Upper limit is less than"
        f" {command.size(MAX_EXTENTS * extent_size)}."
    )


# ---- the three kinds


def _plain(
    command: Command, vg: VolumeGroup, name: str | None, given: dict[str, Any]
) -> LogicalVolume:
    options = command.options
    size = size_of(command, vg, given["ranges"], "%FREE, %PVS or %VG")
    mode = options.get("activate", "y")
    active = (
        activate.wants_active(mode)
        and command.activation
        and not (options.get("setactivationskip") and not options.has("ignoreactivationskip"))
    )
    virtual = given["type"] in ("zero", "error")
    wanted = options.get("zero", True) and given["permission"] == "rw"
    lv = vg.create_lv(name, **size, **given)
    if active:
        vg.activate(lvs=[lv.name], ignore_skip=options.has("ignoreactivationskip"))
        command.changed()
    if virtual:
        return lv
    inactive = not activate.wants_active(mode) or (
        options.get("setactivationskip") and not options.has("ignoreactivationskip")
    )
    if wanted and not inactive:
        wipe(vg, lv, active=active)
    elif not options.has("test"):
        command.warn(f"WARNING: Logical volume {lv} not zeroed.")
    return lv


def wipe(vg: VolumeGroup, lv: LogicalVolume, *, active: bool) -> None:
    """Zero the start of a new LV."""
    if not active or vg.activation.name(lv) is None:
        vg.activation.wipe(lv)
        return
    device = vg.device(lv.name)
    device.write_zeroes(0, min(WIPED, device.size))
    device.flush()


def _snapshot(
    command: Command, vg: VolumeGroup, origin: str, name: str | None, given: dict[str, Any]
) -> LogicalVolume:
    held = vg.metadata.find_lv(origin)
    if not command.options.has("size", "extents"):
        if held is not None and held.segments and held.segments[0].type == "thin":
            raise LVMError(f"Cannot make a thin snapshot of {held}: LVs of type thin are not run.")
        raise LVMError("Please specify either size or extents with snapshots.")
    if held is not None and held.is_virtual_origin:
        raise LVMError("Can't share virtual origins. Use --virtualsize.")
    found = find_origin(vg.metadata, origin)
    size = size_of(command, vg, given["ranges"], "%FREE, %ORIGIN, %PVS or %VG", found)
    chunk = command.options.get("chunksize", 8)
    return command.asking(
        partial(vg.create_snapshot, origin, name, chunk_size=chunk, **size, **given)
    )


def _sparse(
    command: Command, vg: VolumeGroup, name: str | None, given: dict[str, Any]
) -> LogicalVolume:
    size = size_of(command, vg, given["ranges"], "%FREE, %PVS or %VG")
    extent_size = vg.metadata.extent_size
    virtual = -(-command.options["virtualsize"] // extent_size)
    if command.options["virtualsize"] % extent_size:
        shown = command.size(virtual * extent_size)
        command.say(f"Rounding up size to full physical extent {shown}")
    mode = command.options.get("activate", "y")
    return vg.create_sparse(
        name,
        virtual_extents=virtual,
        chunk_size=command.options.get("chunksize", 8),
        activate=activate.wants_active(mode) and command.activation,
        **size,
        **given,
    )


def check_number(command: Command) -> None:
    """Refuse a minor number that no device can have; the major one is device-mapper's."""
    minor, major = command.options["minor"], command.options.get("major", MAJOR)
    if minor > MAX_MINOR:
        raise LVMError(f"Minor number {minor} outside range 0-{MAX_MINOR}.")
    if major != MAJOR:
        command.warn(
            f"WARNING: Ignoring supplied major number {major} - kernel assigns major numbers"
            f" dynamically. Using major number {MAJOR} instead."
        )


def _fix_minor(command: Command, vg: VolumeGroup, lv: LogicalVolume) -> None:
    active = command.live.is_active(lv)
    if active:
        vg.deactivate(lvs=[lv.name])
    with vg.change(command.line) as new:
        changed = new.lv(lv.name)
        changed.set_status("FIXED_MINOR", True)
        changed.major, changed.minor = MAJOR, command.options["minor"]
    if active:
        vg.activate(lvs=[lv.name])
