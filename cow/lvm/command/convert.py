"""lvconvert: merge a snapshot into its origin, split one off, attach one again."""

from __future__ import annotations

import time
from functools import partial
from typing import Final

from cow.errors import CowOSError
from cow.lvm.command.command import Command
from cow.lvm.command.options import UsageError
from cow.lvm.cow_size import DEFAULT_CHUNK, check_chunk_size
from cow.lvm.errors import LVMError, LVNotFound, RequestError
from cow.lvm.group import VolumeGroup
from cow.lvm.merge import report_progress
from cow.lvm.metadata import LogicalVolume
from cow.lvm.report.traits import is_merging, layout
from cow.mapper import Mapper

LOOK_SECONDS: Final = 0.2
"""How often a wait looks whether its client is still there."""


def lvconvert(command: Command) -> None:
    """Do what the options say; without one there is nothing to do."""
    options = command.options
    if options.has("merge", "mergesnapshot"):
        if not command.args:
            raise UsageError("")
        merge(command)
    elif options.has("splitsnapshot"):
        if len(command.args) != 1:
            raise UsageError("")
        _split(command)
    elif options.has("snapshot") or options.get("type") == "snapshot":
        if len(command.args) != 2:
            raise UsageError("")
        _attach(command)
    else:
        if len(command.args) != 1:
            raise UsageError("")
        vg, name = _named(command, command.args[0])
        _not_permitted(_lv(vg, name), "linear")


def _named(command: Command, text: str) -> tuple[VolumeGroup, str]:
    vg_name, lv_name = command.lv_of(text)
    command.scan(readonly=False)
    return command.vg(vg_name), lv_name


def _lv(vg: VolumeGroup, name: str) -> LogicalVolume:
    lv = vg.metadata.find_lv(name)
    if lv is None or lv.is_snapshot_record:
        raise LVNotFound(f'Failed to find logical volume "{vg.name}/{name}"')
    return lv


def _not_permitted(lv: LogicalVolume, kind: str) -> None:
    raise LVMError(
        f"Command on LV {lv} does not accept LV type {kind}.\nCommand not permitted on LV {lv}."
    )


# ---- merging


def merge(command: Command) -> None:
    """Start the merges of snapshots, then wait for all of them unless --background was given."""
    command.scan(readonly=False)
    started: list[tuple[VolumeGroup, LogicalVolume, LogicalVolume]] = []
    for vg, lvs in command.each_lv(command.args):
        for lv_id in [lv.id for lv in lvs]:
            lv = vg.metadata.lv_with_id(lv_id)
            if lv is None:
                continue
            try:
                if (origin := _start(command, vg, lv)) is not None:
                    started.append((vg, lv, origin))
            except CowOSError as error:
                command.fail_with(error)
            command.changed()
    if command.options.has("background"):
        return
    for vg, lv, origin in started:
        command.shell.background(f"  The merge of {lv} into {origin} goes on in the background.\n")
        try:
            _wait(command, vg, lv, origin)
        except CowOSError as error:
            command.fail_with(error)


def _start(command: Command, vg: VolumeGroup, lv: LogicalVolume) -> LogicalVolume | None:
    """Start a merge; return the origin if it runs and is to be waited for."""
    _check_merge(command, lv)
    record = lv.snapshot
    assert record is not None
    origin = record.segments[0].origin
    assert origin is not None
    if not command.activation:
        _merge_here(command, vg, lv, origin)
        return None
    vg.merge(lv.name, background=True)
    return origin if vg.activation.is_merging(origin) else None


def _check_merge(command: Command, lv: LogicalVolume) -> None:
    """Refuse what is no snapshot that can be merged, in LVM's words."""
    if is_merging(lv) or lv.merging_snapshot is not None:
        kind = "lv_is_merging_cow" if is_merging(lv) else "lv_is_merging_origin"
        lines = [f"Command on LV {lv} is invalid on LV with properties: {kind} ."]
        if is_merging(lv) and command.options.has("mergesnapshot"):
            lines.append(f"Command on LV {lv} requires LV with properties: lv_is_visible .")
        if is_merging(lv):
            lines.append(f"Command not permitted on LV {lv}.")
        raise LVMError("\n".join(lines))
    if not lv.is_cow:
        raise LVMError(f"{lv} cannot be merged because --trackchanges was not used.")


def _wait(command: Command, vg: VolumeGroup, lv: LogicalVolume, origin: LogicalVolume) -> None:
    """Wait for the end of a merge, and tell how far it is from time to time."""
    interval = command.options.get(
        "interval", command.settings.number("activation/polling_interval")
    )
    mapper = command.shell.mapper
    assert isinstance(mapper, Mapper)
    while True:
        seen = mapper.event_nr
        if vg.finish_merge(origin.id):
            _report_end(command, lv, origin)
            return
        if not vg.activation.is_merging(origin):
            raise LVMError(f"{origin}: the merge was stopped: {origin} is not active.")
        if not command.shell.alive():
            return
        try:
            with command.shell.waiting():
                _wait_for_event(command, mapper, seen, interval)
        except TimeoutError:
            report_progress(vg.activation, origin, command.say)


def _report_end(command: Command, lv: LogicalVolume, origin: LogicalVolume) -> None:
    """Say that a merge is over, if it was the monitor of the VG that finished it."""
    last = f'Logical volume "{lv.name}" successfully removed.'
    if command.last_report != last:
        command.say(f"{origin}: Merged: 100.00%")
        command.say(f"Merge of snapshot into logical volume {origin} has finished.")
        command.say(last)


def _wait_for_event(command: Command, mapper: Mapper, seen: int, seconds: float) -> None:
    """Wait until something happens in the mapper, as long as somebody waits for the command."""
    deadline = time.monotonic() + seconds
    while command.shell.alive():
        left = deadline - time.monotonic()
        try:
            mapper.wait_any(seen, timeout=max(0.0, min(left, LOOK_SECONDS)))
        except TimeoutError:
            if left <= LOOK_SECONDS:
                raise
        else:
            return


def _merge_here(
    command: Command, vg: VolumeGroup, lv: LogicalVolume, origin: LogicalVolume
) -> None:
    """Merge without a server: the LVs are active in this process until it is done."""
    vg.activate(lvs=[origin.name])
    try:
        vg.merge(lv.name, interval=command.settings.number("activation/polling_interval"))
    finally:
        vg.deactivate(lvs=[origin.name])


# ---- splitting and attaching


def _split(command: Command) -> None:
    vg, name = _named(command, command.args[0])
    lv = _lv(vg, name)
    if not lv.is_cow:
        _not_permitted(lv, ",".join(layout(lv)))
    command.asking(partial(vg.split_snapshot, name))


def _attach(command: Command) -> None:
    options = command.options
    vg, store = _named(command, command.args[1])
    origin = command.args[0]
    if "/" in origin.removeprefix("/dev/"):
        origin_vg, origin = _named(command, origin)
        if origin_vg is not vg:
            raise LVMError(
                f'Please use a single volume group name ("{origin_vg.name}" or "{vg.name}").'
            )
    lv = _lv(vg, store)
    if lv.is_cow:
        _not_permitted(lv, "snapshot")
    chunk = options.get("chunksize", DEFAULT_CHUNK)
    try:
        check_chunk_size(chunk)
    except RequestError as error:
        raise LVMError(error.strerror or "") from error
    command.asking(
        partial(
            vg.attach_snapshot, origin, lv.name, chunk_size=chunk, zero=options.get("zero", True)
        )
    )
