"""lvextend, lvreduce, lvresize."""

from __future__ import annotations

from functools import partial
from typing import Any

from cow.lvm.command.command import Command
from cow.lvm.command.create import extents_of_pvs, pv_ranges, within
from cow.lvm.command.options import ParseError, UsageError
from cow.lvm.edit import whole_stripes
from cow.lvm.errors import LVMError, LVNotFound, RequestError
from cow.lvm.group import VolumeGroup
from cow.lvm.metadata import LogicalVolume
from cow.lvm.size import Amount


def lvextend(command: Command) -> None:
    """Make an LV larger, or a snapshot's store by policy."""
    if command.options.has("usepolicies"):
        if command.options.has("size", "extents"):
            raise ParseError("Command does not accept option: --usepolicies.")
        _extend_by_policy(command)
        return
    _resize(command, "lvextend")


def lvreduce(command: Command) -> None:
    """Make an LV smaller."""
    _resize(command, "lvreduce")


def lvresize(command: Command) -> None:
    """Make an LV larger or smaller."""
    _resize(command, "lvresize")


def _find(command: Command) -> tuple[VolumeGroup, LogicalVolume]:
    if not command.args:
        raise UsageError("")
    vg_name, lv_name = command.lv_of(command.args[0])
    if not lv_name:
        raise RequestError("Please specify a logical volume path.")
    command.scan(readonly=False)
    vg = command.vg(vg_name)
    lv = vg.metadata.find_lv(lv_name)
    if lv is None or lv.is_snapshot_record:
        raise LVNotFound(f"Logical volume {lv_name} not found in volume group {vg_name}.")
    return vg, lv


def _amount(command: Command) -> Amount:
    options = command.options
    if options.has("size") and options.has("extents"):
        raise RequestError("Please specify either size or extents but not both.")
    if not options.has("size", "extents"):
        raise UsageError("")
    for name in ("size", "extents"):
        if options.has(name):
            amount: Amount = options[name]
            if (amount.sectors if name == "size" else amount.extents) == 0:
                raise RequestError(f"--{name} may not be zero.")
    found: Amount = options.get("size") or options["extents"]
    return found


def _resize(command: Command, verb: str) -> None:
    options = command.options
    amount = _amount(command)
    if options.has("resizefs"):
        raise LVMError("--resizefs is not supported: no filesystem is resized.")
    vg, lv = _find(command)
    ranges = pv_ranges(vg.metadata, command.args[1:], command)
    old = lv.extent_count
    new = _new_extents(command, vg, lv, amount, verb)
    if new == old:
        raise LVMError(f"New size ({new} extents) matches existing size ({old} extents).")
    if verb == "lvreduce" or (verb == "lvresize" and new < old):
        _reduce(command, vg, lv, new)
        return
    settings: dict[str, Any] = {"ranges": ranges, "policy": options.get("alloc")}
    if options.has("stripes"):
        settings["stripes"] = options["stripes"]
    if options.has("stripesize"):
        settings["stripe_size"] = options["stripesize"]
    vg.extend_lv(lv.name, extents=new, **settings)


def _new_extents(
    command: Command, vg: VolumeGroup, lv: LogicalVolume, amount: Amount, verb: str
) -> int:
    """Return how many extents the LV is to have."""
    old = lv.extent_count
    extent_size = vg.metadata.extent_size
    sign = amount.sign
    if verb == "lvreduce" and sign == "+":
        what = "Extents" if amount.sectors is None else "Size"
        raise ParseError(f"{what} may not be positive.")
    if amount.sectors is not None:
        count = -(-amount.sectors // extent_size)
        if amount.sectors % extent_size:
            if sign == "-":
                count = amount.sectors // extent_size
            shown = command.size(count * extent_size)
            command.say(f"Rounding size to boundary between physical extents: {shown}.")
    else:
        count = _counted(command, vg, lv, amount)
    if sign == "+":
        return old + count
    if sign == "-":
        if count >= old:
            raise LVMError(f"Unable to reduce {lv} below 1 extent.")
        return old - count
    return count


def _counted(command: Command, vg: VolumeGroup, lv: LogicalVolume, amount: Amount) -> int:
    """Return what a number of extents, or a percentage, comes to."""
    count = amount.extents or 0
    metadata = vg.metadata
    if not amount.percent_of:
        return count
    record = lv.snapshot
    if amount.percent_of == "ORIGIN":
        origin = record.segments[0].origin if record is not None else None
        if origin is None:
            raise LVMError("Specified LV does not have an origin LV.")
        return -(-origin.extent_count * count // 100)
    ranges = pv_ranges(metadata, command.args[1:], command)
    base = {
        "VG": metadata.extent_count,
        "FREE": metadata.free_extents,
        "LV": lv.extent_count,
        "PVS": extents_of_pvs(metadata, ranges),
    }[amount.percent_of]
    wanted = base * count // 100 if amount.sign == "-" else -(-base * count // 100)
    free = metadata.free_extents
    more = wanted if amount.sign else wanted - lv.extent_count
    if amount.sign != "-" and more > 0:
        wanted -= more - within(metadata, ranges, more)
        more = within(metadata, ranges, more)
    if amount.sign != "-" and more > free and amount.percent_of != "LV":
        wanted -= more - free
        text = f"{amount.extents}%{amount.percent_of}"
        shown = command.size(wanted * metadata.extent_size)
        command.say(f"Reducing {text} to remaining free space {shown} in VG.")
    return wanted


def _reduce(command: Command, vg: VolumeGroup, lv: LogicalVolume, extents: int) -> None:
    """Make an LV smaller, which is asked about: what is behind is lost."""
    old = lv.extent_count
    if extents >= old:
        raise LVMError(
            f"New size given ({extents} extents) not less than existing size ({old} extents)"
        )
    if lv.is_origin:
        raise LVMError("Snapshot origin volumes cannot be reduced in size yet.")
    kind = "active logical volume" if command.live.is_active(lv) else "logical volume"
    if command.live.is_open(lv):
        kind = "active and open logical volume"
    shown = command.size(whole_stripes(lv, extents) * vg.metadata.extent_size)
    command.warn(f"WARNING: Reducing {kind} to {shown}.")
    command.warn("THIS MAY DESTROY YOUR DATA (filesystem etc.)")
    if not command.forced and not command.confirm(f"Do you really want to reduce {lv}?"):
        raise LVMError(f"Logical volume {lv} NOT reduced.")
    command.asking(partial(vg.reduce_lv, lv.name, extents=extents))


def _extend_by_policy(command: Command) -> None:
    """Extend a snapshot's store if it is fuller than activation/snapshot_autoextend_threshold."""
    vg, lv = _find(command)
    if not lv.is_cow:
        raise LVMError(
            "Policy-based resize is supported only for snapshot, thin pool and vdo pool volumes."
        )
    threshold = command.settings.number("activation/snapshot_autoextend_threshold")
    percent = command.settings.number("activation/snapshot_autoextend_percent")
    if threshold < 50:
        command.warn(
            f"WARNING: Snapshot autoextend threshold {threshold}% is set bellow minimal supported"
            " value 50%."
        )
    if percent == 0:
        raise LVMError(f"Can't extend {lv} with linear autoextend percent set to 0%.")
    vg.extend_by_policy(lv.name, threshold=threshold, percent=percent)
