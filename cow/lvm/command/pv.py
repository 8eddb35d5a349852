"""pvcreate, pvresize, pvremove, pvck."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from functools import partial

from cow import _core
from cow.errors import CowOSError
from cow.lvm import manage
from cow.lvm.command import dump
from cow.lvm.command.command import Command
from cow.lvm.errors import LVMError, RequestError
from cow.lvm.pv import PVOptions, size_of
from cow.units import bytes_of, sectors


def pv_options(command: Command) -> dict[str, object]:
    """Return what the options say about the layout of new PVs, as PVOptions has it."""
    options = command.options
    found: dict[str, object] = {}
    for name, field in (
        ("bootloaderareasize", "bootloader_area_size"),
        ("dataalignment", "data_alignment"),
        ("dataalignmentoffset", "data_alignment_offset"),
        ("metadatasize", "metadata_size"),
    ):
        if options.has(name):
            found[field] = bytes_of(options[name])
    for name in ("pvmetadatacopies", "metadatacopies"):
        if options.has(name):
            found["metadata_copies"] = options[name]
    if options.has("metadataignore"):
        found["metadata_ignore"] = options["metadataignore"]
    if options.has("labelsector"):
        found["label_sector"] = options["labelsector"]
        if options["labelsector"] > 3:
            raise RequestError("labelsector must be less than 4.")
    return found


def pvcreate(command: Command) -> None:
    """Make PVs."""
    options = command.options
    settings = pv_options(command)
    restore = None
    if options.has("uuid"):
        if not options.has("restorefile", "norestorefile"):
            raise RequestError("--restorefile is required with --uuid")
        if len(command.args) != 1:
            raise RequestError("Can only set uuid on one volume at once")
        settings["uuid"] = options["uuid"]
    if options.has("restorefile"):
        if not options.has("uuid"):
            raise RequestError("--uuid is required with --restorefile")
        restore = read_text(command, options["restorefile"])
    if options.has("setphysicalvolumesize"):
        settings["size"] = bytes_of(options["setphysicalvolumesize"])
    PVOptions(**settings)  # type: ignore[arg-type]
    for name in command.args:
        try:
            _check_size(command, name)
            manage.create_pv(
                command.image(name),
                mapper=command.mapper,
                others=command.other_devices(command.args),
                restore=restore,
                report=command.report,
                confirm=command.confirm,
                **settings,
            )
        except LVMError as error:
            command.fail_with(error)


def _check_size(command: Command, name: str) -> None:
    """Ask whether what is a PV already shall have another size than its device."""
    wanted = command.options.get("setphysicalvolumesize")
    if wanted is None:
        return
    command.scan(readonly=False)
    device = command.pv(name)
    if device is None or sectors(device.device.size) == wanted:
        return
    shown = command.size(sectors(device.device.size)), command.size(wanted)
    text = f"device size {shown[0]} does not match requested size {shown[1]}."
    if not command.confirm(f"WARNING: {name}: {text} Proceed?"):
        raise LVMError(f"{name}: physical volume not initialized.")
    command.warn(f"WARNING: Faking size of PV {name}. Don't write outside real device.")


def pvresize(command: Command) -> None:
    """Let PVs be as large as their devices, or as --setphysicalvolumesize says."""
    named = [name for each in command.args for name in command.existing([each])]
    scan = command.scan(readonly=False)
    found = {name: command.pv(name) for name in named}
    done: Counter[bool] = Counter()
    for vg in reversed(scan.vgs):
        of_vg = [pv.path for pv in found.values() if pv is not None and pv.vg_id == vg.id]
        for pv in [pv for pv in vg.pvs if pv.path in of_vg]:
            if "EXPORTED" in vg.metadata.status:
                command.fail(f"Cannot use PV {pv.path} in exported VG {vg.name}.")
            elif pv.device is not None:
                done[_resized(command, pv.path, size_of(pv.device), vg.resize_pv)] += 1
    for name, orphan in found.items():
        if orphan is None:
            command.fail(f'Failed to find physical volume "{name}".')
        elif not orphan.vg_name:
            resize = partial(
                manage.resize_pv,
                mapper=command.mapper,
                others=command.other_devices([name]),
                report=command.report,
            )
            path = command.shell.path(name)
            done[_resized(command, path, size_of(orphan.device), resize)] += 1
    command.say(
        f"{done[True]} physical volume(s) resized or updated"
        f" / {done[False]} physical volume(s) not resized"
    )


def _resized(command: Command, path: str, device_size: int, resize: Callable[..., None]) -> bool:
    """Resize a PV, when it has been asked whether that is meant; tell whether it was done."""
    size = bytes_of(command.options.get("setphysicalvolumesize", 0)) or device_size
    shown = command.size(sectors(size)), command.size(sectors(device_size))
    question = f"{path}: Requested size {shown[0]} is less than real size {shown[1]}. Proceed? "
    try:
        if size < device_size and not command.confirm(question):
            raise LVMError(f"Physical Volume {path} not resized.")
        if size < device_size:
            command.warn(
                f"WARNING: {path}: Pretending size is {sectors(size)} not {sectors(device_size)}"
                " sectors."
            )
        resize(path, size=size)
    except CowOSError as error:
        command.fail_with(error)
        return False
    return True


def pvremove(command: Command) -> None:
    """Take the labels off PVs."""
    for name in command.args:
        try:
            manage.remove_pv(
                command.image(name),
                mapper=command.mapper,
                others=command.other_devices(command.args),
                report=command.report,
            )
        except LVMError as error:
            command.fail_with(error)


def read_text(command: Command, name: str) -> str:
    """Read a backup of metadata."""
    path = command.shell.path(name)
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except OSError as error:
        raise LVMError(
            f"{name}: stat failed: {error.strerror}"
            if not os.path.exists(path)
            else f"{name}: {error.strerror}",
            error.errno,
        ) from error


def pvck(command: Command) -> None:
    """Look at the label and the metadata areas of a device, or print them field by field."""
    for name in command.args:
        path = command.shell.path(name)
        if not os.path.exists(path) and not command.shell.is_device(path):
            command.fail(f"Cannot access {name}.")
            continue
        try:
            with dump.open_device(command.shell.mapper, path) as device:
                _pvck(command, device, name)
        except CowOSError as error:
            command.fail_with(error)


def _pvck(command: Command, device: _core.BlockDevice, name: str) -> None:
    what = command.options.get("dump")
    if what is None:
        lines = dump.check_lines(device, name)
    elif what == "headers":
        lines = dump.headers(device, command.options.get("labelsector")).lines
    elif what in ("metadata_all", "metadata_search"):
        lines = dump.copies(device, search=what == "metadata_search")
    elif what == "metadata":
        lines, text = dump.metadata(device)
        if text and not command.options.has("file"):
            command.print("\n".join([*lines, "---"]))
            command.shell.out(text.decode("utf-8", "surrogateescape") + "\n")
            command.print("---")
            return
        if text:
            _write_file(command, text)
    else:
        raise RequestError(f"--dump {what} is not supported.")
    for line in lines:
        command.print(line)


def _write_file(command: Command, text: bytes) -> None:
    name = command.options["file"]
    try:
        with open(command.shell.path(name), "wb") as file:
            file.write(text)
    except OSError as error:
        raise LVMError(f"{name}: {error.strerror}", error.errno) from error
