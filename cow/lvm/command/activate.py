"""Activating and deactivating, for lvchange, vgchange and what has to deactivate before it acts."""

from __future__ import annotations

from collections.abc import Sequence

from cow.errors import CowOSError
from cow.lvm.command.command import Command
from cow.lvm.errors import LVMError
from cow.lvm.group import VolumeGroup
from cow.lvm.metadata import LogicalVolume
from cow.lvm.report.traits import cow_stores


def wants_active(mode: str) -> bool:
    """Tell whether an argument of -a means to activate: y, ay, ey, ly, sy."""
    return mode.endswith("y")


def activate_lv(command: Command, vg: VolumeGroup, lv: LogicalVolume, mode: str) -> None:
    """Activate or deactivate an LV with its family."""
    if not command.activation:
        raise LVMError(
            f"Cannot activate {lv}: no server answers; start one with: cow serve"
            if wants_active(mode)
            else f"Logical volume {lv} is not active."
        )
    if wants_active(mode):
        if mode == "ay" and "NOAUTOACTIVATE" in [*lv.flags, *vg.metadata.flags]:
            return
        skip = command.options.has("ignoreactivationskip")
        if "ACTIVATION_SKIP" in lv.flags and not skip:
            return
        vg.activate(lvs=[lv.name], ignore_skip=skip)
    else:
        vg.deactivate(lvs=[lv.name])
    command.changed()


def activate_vg(command: Command, vg: VolumeGroup, mode: str) -> None:
    """Activate or deactivate the LVs of a VG, and say how many are active then."""
    if "EXPORTED" in vg.metadata.status:
        raise LVMError(f"Volume group {vg.name} is exported")
    if not wants_active(mode):
        opened = [lv for lv in vg.metadata.lvs if lv.visible and command.live.is_open(lv)]
        if opened:
            for lv in opened:
                command.fail(f"Logical volume {lv} in use.")
            command.fail(
                f'Can\'t deactivate volume group "{vg.name}" with {len(opened)} open logical'
                " volume(s)"
            )
            return
    if mode == "ay" and "NOAUTOACTIVATE" in vg.metadata.flags:
        return
    lvs = [lv for lv in vg.metadata.lvs if lv.visible and not _goes_with_origin(lv)]
    if wants_active(mode) and vg.idle_reason is not None:
        command.fail(vg.idle_reason)
        lvs = []
    for lv in lvs:
        try:
            activate_lv(command, vg, lv, mode)
        except CowOSError as error:
            command.fail_with(error)
    active = sum(lv.visible and command.live.is_active(lv) for lv in vg.metadata.lvs)
    command.say(f'{active} logical volume(s) in volume group "{vg.name}" now active')


def _goes_with_origin(lv: LogicalVolume) -> bool:
    """Tell whether an LV is a snapshot of one that users see; a sparse LV is not."""
    record = lv.snapshot
    origin = record.segments[0].origin if record is not None else None
    return origin is not None and not origin.is_virtual_origin


def refresh(command: Command, vg: VolumeGroup, lvs: Sequence[LogicalVolume]) -> None:
    """Load the tables of active LVs anew; a merge that was put off may begin then."""
    for lv in lvs:
        if command.live.is_active(lv):
            vg.refresh_lv(lv.name)
    command.changed()


def confirm_family(command: Command, lv: LogicalVolume) -> bool:
    """Ask before the whole family of a snapshot is activated or deactivated with it."""
    record = lv.snapshot
    origin = record.segments[0].origin if record is not None else None
    if lv.vg.name in map(command.vg_name_of, command.args):
        return True  # the whole VG is meant, and the origin in it
    if origin is None or origin.is_virtual_origin or command.options.has("yes"):
        return True
    others = len(cow_stores(origin)) - 1
    more = f" and {others} other snapshot(s)" if others else ""
    if command.confirm(
        f"Change of snapshot {lv} will also change its origin {origin}{more}. Proceed?"
    ):
        return True
    command.fail(f"Logical volume {lv} not changed.")
    return False


def deactivate_for_removal(command: Command, vg: VolumeGroup) -> None:
    """Deactivate a whole VG before it is removed."""
    if command.activation:
        for lv in [lv for lv in vg.metadata.lvs if command.live.is_open(lv)]:
            raise LVMError(f"Logical volume {lv} in use.")
        vg.deactivate()
