"""vgcreate, vgextend, vgreduce, vgremove, vgrename, vgexport, vgimport, vgchange, vgck, backups."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

from cow.errors import CowOSError
from cow.lvm import manage
from cow.lvm.backups import describe, write_backup
from cow.lvm.command import activate
from cow.lvm.command.command import Command
from cow.lvm.command.options import ParseError, UsageError
from cow.lvm.command.pv import pv_options, read_text
from cow.lvm.errors import LVMError, RequestError, VGNotFound
from cow.lvm.group import VolumeGroup
from cow.lvm.metadata_text import vg_from_text
from cow.lvm.names import is_name
from cow.lvm.text import parse

CHANGES = (
    "addtag",
    "alloc",
    "deltag",
    "logicalvolume",
    "maxphysicalvolumes",
    "resizeable",
    "setautoactivation",
)
"""The options of vgchange that change the metadata."""


def check_new_name(name: str) -> None:
    """Refuse a name that no VG can have, with LVM's reason."""
    if is_name(name):
        return
    if name.startswith("-"):
        reason = "Name cannot start with hyphen."
    elif name in (".", ".."):
        reason = "Name starts with . or .. and has no following character(s)."
    elif not name:
        reason = "Name is zero length."
    elif len(name) > 127:
        reason = "Name length exceeds maximum limit of 128."
    else:
        reason = "Name contains invalid character, valid set includes: [a-zA-Z0-9.-_+]."
    raise RequestError(f'{reason}\nNew volume group name "{name}" is invalid.')


def vgcreate(command: Command) -> None:
    """Make a VG of devices, which become PVs if they are none."""
    options = command.options
    name, *devices = command.args
    name = name.removeprefix("/dev/")
    check_new_name(name)
    given = pv_options(command)
    if options.get("physicalextentsize") == 0:
        raise RequestError("Physical extent size may not be zero")
    others = command.other_devices(devices)
    if others and _exists(command, name):
        raise LVMError(f"A volume group called {name} already exists.")
    paths = [command.image(device) for device in devices]
    with manage.create_vg(
        name,
        paths,
        mapper=command.mapper,
        others=others,
        extent_size=options.get("physicalextentsize", manage.DEFAULT_EXTENT_SIZE),
        max_lv=options.get("maxlogicalvolumes", 0),
        max_pv=options.get("maxphysicalvolumes", 0),
        tags=options.get("addtag", ()),
        policy=options.get("alloc"),
        flags=["NOAUTOACTIVATE"] if options.no("setautoactivation") else [],
        command=command.line,
        report=command.report,
        confirm=command.confirm,
        **given,
    ) as vg:
        command.remember(devices)
        if backups := command.automatic_backups:
            backups.backup(vg.metadata, command.line)


def _exists(command: Command, name: str) -> bool:
    try:
        command.scan().vg(name)
    except VGNotFound:
        return False
    finally:
        command.close()
    return True


def vgextend(command: Command) -> None:
    """Add devices to a VG; they become PVs if they are none."""
    name, *devices = command.args
    given = pv_options(command)
    paths = [command.image(device) for device in devices]
    scan = command.scan(readonly=False, paths=devices)
    try:
        vg = command.vg(command.vg_of(name))
    except VGNotFound:
        scan.close()
        raise
    command.asking(partial(vg.extend, paths, **given))
    command.remember(devices)


def vgreduce(command: Command) -> None:
    """Take PVs out of a VG: those that are named, all that are empty, or those that are missing."""
    options = command.options
    if not command.args:
        raise UsageError("")
    if options.has("removemissing") and options.has("all"):
        raise ParseError("Command does not accept option: --removemissing.")
    if options.has("removemissing", "all") and len(command.args) > 1:
        raise ParseError(f"Command does not accept argument: {command.args[1]}.")
    if not options.has("removemissing", "all") and len(command.args) < 2:
        raise UsageError("")
    name, *named = command.args
    named = command.existing(named) if named else []
    if not (named or options.has("removemissing", "all")):
        return
    paths = [command.image(each) for each in named]
    command.scan(readonly=False)
    try:
        vg = command.vg(command.vg_of(name))
        if options.has("removemissing"):
            vg.remove_missing()
            return
    except VGNotFound as error:
        command.fail_with(error)
        for each in named:
            command.fail(f'Failed to find physical volume "{each}".')
        return
    members = [pv.path for pv in vg.pvs if not pv.missing]
    chosen = [path for path in members if path in (*named, *paths) or not named]
    for path in chosen:
        try:
            if named and "EXPORTED" in vg.metadata.status:
                raise LVMError(f"Cannot use PV {path} in exported VG {vg.name}.")
            vg.reduce(path)
        except CowOSError as error:
            command.fail_with(error)
    for each, path in zip(named, paths, strict=True):
        if each not in chosen and path not in chosen:
            command.fail(f'Failed to find physical volume "{each}".')


def vgexport(command: Command) -> None:
    """Export VGs: nobody uses them until they are imported."""
    _export(command, True)


def vgimport(command: Command) -> None:
    """Import VGs that were exported."""
    _export(command, False)


def _export(command: Command, exported: bool) -> None:
    options = command.options
    if not (command.args or options.has("all", "select")):
        raise UsageError("")
    if command.args and options.has("all"):
        raise ParseError(f"Command does not accept argument: {command.args[0]}.")
    command.scan(readonly=False)
    for vg in command.each_vg(command.args):
        if exported and options.has("all") and "EXPORTED" in vg.metadata.status:
            continue
        try:
            if exported:
                vg.export_vg()
            else:
                vg.import_vg()
        except CowOSError as error:
            command.fail_with(error)


def vgremove(command: Command) -> None:
    """Remove VGs with their LVs, which is asked about."""
    command.scan(readonly=False)
    for vg in command.each_vg(command.args):
        if command.passes_over(vg, command.args):
            continue
        count = sum(lv.visible for lv in vg.metadata.lvs)
        question = (
            f'Do you really want to remove volume group "{vg.name}" containing {count} logical'
            " volumes?"
        )
        if count and not command.forced and not command.confirm(question):
            command.fail(f'Volume group "{vg.name}" not removed')
            continue
        try:
            activate.deactivate_for_removal(command, vg)
            command.asking(vg.remove)
        except CowOSError as error:
            command.fail_with(error)
        command.changed()


def vgrename(command: Command) -> None:
    """Give a VG another name."""
    old, new = (name.removeprefix("/dev/") for name in command.args)
    try:
        check_new_name(new)
    except RequestError as error:
        raise LVMError(error.strerror or "") from error
    command.scan(readonly=False)
    vg = command.vg(old)
    vg.rename(new)


def vgchange(command: Command) -> None:
    """Change VGs, or activate and deactivate their LVs."""
    options = command.options
    changes = options.has(*CHANGES)
    if not changes and not options.has("activate", "refresh", "poll", "monitor", "sysinit"):
        raise UsageError("")
    command.scan(readonly=not (changes or options.has("activate", "refresh")))
    for vg in command.each_vg(command.args):
        if command.passes_over(vg, command.args):
            continue
        try:
            if changes:
                _change(command, vg)
            if options.has("activate"):
                activate.activate_vg(command, vg, options["activate"])
            elif options.has("refresh"):
                activate.refresh(command, vg, [lv for lv in vg.metadata.lvs if lv.visible])
        except CowOSError as error:
            command.fail_with(error)


def _change(command: Command, vg: VolumeGroup) -> None:
    options = command.options
    flags = {}
    if options.has("setautoactivation"):
        flags["NOAUTOACTIVATE"] = not options["setautoactivation"]
    vg.change_vg(
        add_tags=options.get("addtag", ()),
        remove_tags=options.get("deltag", ()),
        resizeable=options.get("resizeable"),
        max_lv=options.get("logicalvolume"),
        max_pv=options.get("maxphysicalvolumes"),
        policy=options.get("alloc"),
        flags=flags,
    )


def vgck(command: Command) -> None:
    """Check the metadata of VGs, or repair it on all PVs."""
    update = command.options.has("updatemetadata")
    command.scan(readonly=not update)
    for vg in command.each_vg(command.args):
        try:
            if update:
                vg.update_metadata()
                continue
        except CowOSError as error:
            command.fail_with(error)
            continue
        if command.passes_over(vg, command.args):
            continue
        for problem in vg.problems():
            command.fail(problem)


# ---- backups


def backup_path(command: Command, name: str) -> str:
    """Return where the backup of a VG is if no file is named."""
    path = command.backups.path(name)
    if path is None:
        raise RequestError("Please name a file with --file: LVM_SYSTEM_DIR and HOME are not set.")
    return str(path)


def vgcfgbackup(command: Command) -> None:
    """Write the metadata of VGs into files."""
    vgs = list(command.each_vg(command.args))
    given = command.options.get("file")
    if given is not None and len(vgs) > 1 and "%s" not in given:
        raise LVMError(
            "VGs must be backed up into different files. Use %s in filename for VG name."
        )
    for vg in vgs:
        name = backup_path(command, vg.name) if given is None else given.replace("%s", vg.name)
        try:
            write_backup(Path(command.shell.path(name)), vg.backup())
        except OSError as error:
            command.fail(f"{name}: {error.strerror}")
            continue
        command.say(f'Volume group "{vg.name}" successfully backed up.')


def vgcfgrestore(command: Command) -> None:
    """Make the metadata in a file that of a VG, or list the files there are."""
    file = command.options.get("file")
    if command.options.has("list"):
        if not (command.args or file):
            raise UsageError("")
        _list_backups(command, file)
        return
    if not command.args:
        raise UsageError("")
    name = command.args[0].removeprefix("/dev/")
    try:
        _restore(command, name, file or backup_path(command, name))
    except CowOSError as error:
        command.fail_with(error)
        command.fail("Restore failed.")


def _list_backups(command: Command, file: str | None) -> None:
    if file is not None:
        found = [Path(command.shell.path(file))]
    else:
        found = command.backups.files(command.args[0].removeprefix("/dev/"))
        if not found:
            command.say(f"No archives found in {command.backups.archive_dir}.")
    for path in found:
        try:
            name, description, written = describe(path)
        except OSError as error:
            command.fail(f"{path}: {error.strerror}")
            continue
        when = time.ctime(written)
        command.say(" ")
        command.say(f"File:\t\t{path}\nVG name:    \t{name}")
        command.say(f"Description:\t{description}\nBackup Time:\t{when}")
        command.shell.out("\n")


def _restore(command: Command, name: str, file: str) -> None:
    try:
        text = read_text(command, file)
    except LVMError as error:
        raise LVMError(
            f"{error.strerror}\nWARNING: couldn't read volume group metadata from file.\n"
            f"Failed to read VG {name} from {file}",
            error.errno,
        ) from error
    if vg_from_text(parse(text)).name != name:
        raise LVMError(f"'{file}' does not contain volume group '{name}'.")
    scan = command.scan(readonly=False)
    vg = next((each for each in scan.vgs if each.name == name), None)
    active = [lv for lv in vg.metadata.lvs if command.live.is_active(lv)] if vg else []
    if active:
        for lv in active:
            if lv.visible:
                command.say(f"Volume group {name} has active volume: {lv.name}.")
        command.warn(f'WARNING: Found {len(active)} active volume(s) in volume group "{name}".')
        command.say("Restoring VG with active LVs, may cause mismatch with its metadata.")
        question = (
            f'Do you really want to proceed with restore of volume group "{name}", while'
            f" {len(active)} volume(s) are active?"
        )
        if not command.confirm(question):
            command.fail("Restore aborted.")
            return
    paths = [command.shell.path(each.path) for each in scan.pvs]
    command.close()
    manage.restore_vg(
        text,
        paths,
        mapper=command.mapper,
        command=command.line,
        report=command.report,
    )
