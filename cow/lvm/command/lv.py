"""lvremove, lvrename, lvchange."""

from __future__ import annotations

from functools import partial

from cow.errors import CowOSError
from cow.lvm.command import activate
from cow.lvm.command.command import Command
from cow.lvm.command.create import check_number
from cow.lvm.command.options import UsageError
from cow.lvm.errors import LVMError, RequestError
from cow.lvm.group import VolumeGroup
from cow.lvm.metadata import LogicalVolume
from cow.lvm.names import check_lv_name, is_name
from cow.mapper import MAJOR

PROPERTIES = (
    "addtag",
    "alloc",
    "contiguous",
    "deltag",
    "permission",
    "persistent",
    "readahead",
    "setactivationskip",
    "setautoactivation",
)
"""The options of lvchange that change the metadata."""


def lvremove(command: Command) -> None:
    """Remove LVs; active ones are asked about, and an origin takes its snapshots along."""
    command.scan(readonly=False)
    for vg, lvs in command.each_lv(command.args):
        for lv_id in [lv.id for lv in lvs]:
            lv = vg.metadata.lv_with_id(lv_id)
            if lv is None:  # it went with its origin
                continue
            try:
                command.asking(partial(vg.remove_lv, lv.name))
            except CowOSError as error:
                command.fail_with(error)
            command.changed()


def lvrename(command: Command) -> None:
    """Rename an LV: VG OLD NEW, or VG/OLD [VG/]NEW."""
    args = command.args
    if len(args) == 3:
        vg_name, old, new = command.vg_of(args[0]), args[1], args[2]
        old, new = (name.removeprefix("/dev/").removeprefix(f"{vg_name}/") for name in (old, new))
    else:
        vg_name, old = command.lv_of(args[0])
        new = args[1].removeprefix("/dev/")
        if not old:
            raise UsageError("")
        if "/" in new:
            new_vg, _, new = new.partition("/")
            if new_vg != vg_name:
                raise RequestError(
                    "Logical volume names must have the same volume group"
                    f' ("{vg_name}" or "{new_vg}")'
                )
    if not is_name(new):
        raise RequestError(f'New logical volume name "{new}" is invalid')
    check_lv_name(new, vg_name)
    if old == new:
        raise RequestError("Old and new logical volume names must differ")
    command.scan(readonly=False)
    command.vg(vg_name).rename_lv(old, new)


def lvchange(command: Command) -> None:
    """Change properties of LVs, or activate, deactivate and refresh them."""
    options = command.options
    changes = options.has(*PROPERTIES)
    if options.get("persistent") and not options.has("minor"):
        raise UsageError("")
    if not changes and not options.has("activate", "refresh", "monitor", "poll"):
        raise UsageError("")
    if changes and options.has("activate"):
        command.warn("WARNING: Combining activation change with other commands is not advised.")
    command.scan(readonly=not (changes or options.has("activate", "refresh")))
    for vg, lvs in command.each_lv(command.args):
        for lv_id in [lv.id for lv in lvs]:
            try:
                _change_one(command, vg, lv_id, changes)
            except CowOSError as error:
                command.fail_with(error)


def _change_one(command: Command, vg: VolumeGroup, lv_id: str, changes: bool) -> None:
    options = command.options
    lv = vg.metadata.lv_with_id(lv_id)
    if lv is None:
        return
    if changes:
        _change_properties(command, vg, lv)
        lv = vg.metadata.lv_with_id(lv_id)
        assert lv is not None
    if options.has("activate"):
        if activate.confirm_family(command, lv):
            activate.activate_lv(command, vg, lv, options["activate"])
    elif options.has("refresh"):
        activate.refresh(command, vg, [lv])
    elif options.has("monitor", "poll") and not command.live.is_active(lv):
        raise LVMError(f"Logical volume {lv} is not active.")


def _change_properties(command: Command, vg: VolumeGroup, lv: LogicalVolume) -> None:
    options = command.options
    policy = options.get("alloc")
    if options.has("contiguous"):
        policy = "contiguous" if options["contiguous"] else "inherit"
    flags = {}
    if options.has("setactivationskip"):
        flags["ACTIVATION_SKIP"] = options["setactivationskip"]
    if options.has("setautoactivation"):
        flags["NOAUTOACTIVATE"] = not options["setautoactivation"]
    if options.has("persistent"):
        _change_minor(command, vg, lv)
        if not options.has(*(name for name in PROPERTIES if name != "persistent")):
            return
    vg.change_lv(
        lv.name,
        permission=options.get("permission"),
        add_tags=options.get("addtag", ()),
        remove_tags=options.get("deltag", ()),
        policy=policy,
        read_ahead=options.get("readahead"),
        flags=flags,
    )
    command.changed()


def _change_minor(command: Command, vg: VolumeGroup, lv: LogicalVolume) -> None:
    """Give the LV's device a number for good, or none."""
    persistent = command.options["persistent"]
    minor = command.options.get("minor")
    if persistent:
        check_number(command)
    if not persistent and "FIXED_MINOR" not in lv.status:
        raise LVMError(f"Minor number is already not persistent for {lv}.")
    active = persistent and command.live.is_active(lv)
    question = f"Logical volume {lv} will be deactivated temporarily. Continue?"
    if active and not command.forced and not command.confirm(question):
        raise LVMError(f"{lv} device number not changed.")
    if active:
        vg.deactivate(lvs=[lv.name])
    with vg.change(command.line) as new:
        changed = new.lv(lv.name)
        changed.set_status("FIXED_MINOR", persistent)
        changed.major = MAJOR if persistent else None
        changed.minor = minor if persistent else None
    if active:
        vg.activate(lvs=[lv.name])
    command.changed()
    if not persistent:
        command.say(f"Logical volume {lv} changed.")
