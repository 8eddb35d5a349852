"""The verbs of `cow dm` that look: text as dmsetup prints it, or JSON."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from cow.cli.dm.command import Command, Which, error, ioctl_failed, print_info
from cow.cli.dm.names import MAJOR, Refused, disk_name, mangle, split_name
from cow.errors import CowOSError

LIBRARY_VERSION = "1.02.185 (2022-05-18)"
"""The libdevmapper whose command line this is."""


def table(command: Command, args: Sequence[str]) -> None:
    """Print the lines of `table` and `status`."""
    found = command.all_or(args[0] if args else None)
    if {"concise", "names"} <= command.options.keys() and not args:
        found = _in_order(command.world())
    command.each(found, _table_of)


def _in_order(devices: Sequence[dict[str, Any]]) -> list[Which]:
    """Return devices so that each comes after what it stands on, as they have to be created."""
    known = {device["name"]: device for device in devices}
    order: dict[str, None] = {}

    def add(name: str) -> None:
        if name in known and name not in order:
            for dep in known[name]["deps"]:
                if dep["dm"]:
                    add(dep["name"])
            order[name] = None

    for name in known:
        add(name)
    return [Which(name) for name in order]


def _table_of(command: Command, which: Which) -> None:
    options = command.options
    as_json = "json" in options
    if command.verb == "status":
        command.devices(which)  # says in its own words what is missing
    text = command.ask(
        command.verb,
        command.verb,
        which,
        inactive="inactive" in options,
        target=options.get("target"),
        numbers=not as_json and "names" not in options,
    )
    device = command.devices(which)[0]
    lines = text.split("\n") if text or "target" not in options else []
    if as_json:
        command.json.append({"name": device["name"], "targets": _targets_of(lines)})
    elif not lines:
        return
    elif "concise" in options and command.verb == "table":
        command.concise.append(_concise(which, device, lines, with_comma="names" in options))
    else:
        if command.verbose:
            print_info(device)
        for line in lines:
            print(f"{command.prefix(which, device)}{line}")
        if command.verbose and command.multiple:
            print()


def _targets_of(lines: Sequence[str]) -> list[dict[str, Any]]:
    rows = [line.split(" ", 3) for line in lines if line]
    return [
        {"start": int(start), "length": int(length), "type": kind, "params": params}
        for start, length, kind, params in rows
    ]


def _concise(
    which: Which, device: dict[str, Any], lines: Sequence[str], *, with_comma: bool
) -> str:
    def quote(text: str) -> str:
        return re.sub(r"([,;\\])", r"\\\1", text)

    flags = "ro" if device["readonly"] else "rw"
    fields = [
        quote(which.shown or device["name"]),
        quote(device["uuid"]),
        str(device["minor"]),
        flags,
    ]
    return ",".join([*fields, *(quote(line) for line in lines if line or with_comma)])


def info(command: Command, args: Sequence[str]) -> None:
    """Print blocks, or rows of columns."""
    command.each(command.all_or(args[0] if args else None), _info_of)


def _info_of(command: Command, which: Which) -> None:
    device = command.devices(which)[0]
    if "json" in command.options:
        command.json.append(device)
    elif command.report is not None:
        _report_row(command, device)
    else:
        print_info(device)


def start_report(command: Command) -> bool:
    """Settle the columns; False where only a list of them was asked for."""
    from cow.cli.dm import report

    options = command.options
    default, groups = report.INFO_FIELDS, tuple(report.GROUPS)
    if command.verb == "splitname":
        default, groups = report.SPLITNAME_FIELDS, ("splitname",)
    text = default
    if "columns" in options and command.verb in ("info", "splitname"):
        text = options.get("options", default)
    if {"help", "?"} & {*text.split(","), *options.get("sort", "").split(",")}:
        error(*report.help_lines(groups))
        return False
    if options.get("select") in ("help", "?"):
        error(*report.help_lines(groups, kinds=True), *report.selection_help())
        return False
    fields = report.find_fields(text, default, groups)
    command.report = report.Report(fields, options)
    return True


def selected(command: Command, args: Sequence[str]) -> list[str]:
    """Return the names of the devices that -S picks."""
    found = [command.which(arg) for arg in args] or command.all_or(None) or []
    for which in found:
        _report_row(command, command.devices(which)[0])
    report, command.report = command.report, None
    assert report is not None
    return [str(row.device["name"]) for row in report.kept]


def _report_row(command: Command, device: dict[str, Any]) -> None:
    from cow.cli.dm.report import Row

    assert command.report is not None
    subsystem, dash, _ = str(device["uuid"]).partition("-")
    parts = split_name(subsystem if dash else "", device["name"])
    command.report.add(Row(device, command.world(), parts))


def deps(command: Command, args: Sequence[str]) -> None:
    """Print what devices stand on."""
    command.each(command.all_or(args[0] if args else None), _deps_of)


def _deps_of(command: Command, which: Which) -> None:
    device = command.devices(which, "deps")[0]
    below = device["inactive_deps" if "inactive" in command.options else "deps"]
    if "json" in command.options:
        command.json.append({"name": device["name"], "deps": below})
        return
    if command.verbose:
        print_info(device)
    names = "".join(f" ({_dev_name(command, dep, ', ')})" for dep in below)
    print(f"{command.prefix(which, device)}{len(below)} dependencies\t:{names}")
    if command.verbose and command.multiple:
        print()


def _dev_name(command: Command, device: dict[str, Any], comma: str) -> str:
    """Return a device as -o wants it: its number, dm-N or its dm name."""
    disk = disk_name(device)
    if disk is not None and command.options.get("options") == "blkdevname":
        return disk
    if disk is not None and command.options.get("options") == "devname":
        return disk if device["major"] != MAJOR else str(device["name"])
    return f"{device['major']}{comma}{device['minor']}"


def ls(command: Command, args: Sequence[str]) -> None:
    """List devices, or draw who stands on whom."""
    options = command.options
    devices = command.world()
    if "target" in options:
        kept = []
        for device in devices:
            text = command.ask("table", "table", Which(device["name"]), target=options["target"])
            kept += [device] if text else []
    else:
        kept = devices
    if "json" in options:
        command.json += [
            {name: device[name] for name in ("name", "uuid", "major", "minor")} for device in kept
        ]
    elif not devices:
        print("No devices found")
    elif "target" in options:
        for device in kept:
            print("{name}\t({major}, {minor})".format(**device))
    elif "tree" in options:
        _print_tree(command, devices)
    else:
        for device in kept:
            print(f"{device['name']}\t({_dev_name(command, device, ':')})")


def _print_tree(command: Command, devices: Sequence[dict[str, Any]]) -> None:
    from cow.cli.dm.tree import Tree, build, parse_options

    chosen = parse_options(command.options.get("options", ""))
    columns = 80
    if "vt100" not in chosen and sys.stdout.isatty():
        width = os.get_terminal_size(sys.stdout.fileno()).columns
        columns = width - 3 if width > 3 else columns
    for line in Tree(chosen, columns).draw(build(devices)):
        print(line)


def targets(command: Command, args: Sequence[str]) -> None:
    """Print the types of targets and their versions."""
    for target in command.client.call("targets"):
        _print_target(command, target)


def target_version(command: Command, args: Sequence[str]) -> None:
    """Print the version of one type of target."""
    found = [each for each in command.client.call("targets") if each["name"] == args[0]]
    if not found:
        missing = CowOSError(f"{args[0]}: unknown target type")
        raise Refused(*ioctl_failed("target-version", Which(args[0]).label(), missing))
    _print_target(command, found[0])


def _print_target(command: Command, target: dict[str, Any]) -> None:
    if "json" in command.options:
        command.json.append(target)
    else:
        print("{:<16} v{}.{}.{}".format(target["name"], *target["version"]))


def version(command: Command, args: Sequence[str]) -> None:
    """Print the versions of the command line and of the verbs behind it."""
    served = command.client.call("version")
    if "json" in command.options:
        command.json.append(served)
        return
    print(f"Library version:   {LIBRARY_VERSION}")
    print("Driver version:    {}.{}.{}".format(*served["version"]))


def splitname(command: Command, args: Sequence[str]) -> None:
    """Print the parts of a name; no server is asked."""
    from cow.cli.dm.report import Row

    assert command.report is not None
    command.report.add(Row({}, (), split_name(args[1] if len(args) == 2 else "LVM", args[0])))


def mangled(command: Command, args: Sequence[str]) -> None:
    """Print names as libdm would write them; they are never stored in another form."""
    command.each(command.all_or(args[0] if args else None), _mangled)


def _mangled(command: Command, which: Which) -> None:
    try:
        device = command.devices(which)[0]
    except Refused:
        raise Refused from None
    name, uuid = mangle(device["name"]), mangle(device["uuid"])
    what = "name and UUID" if uuid else "name"
    print(f"{name}: {uuid or '[no UUID]'}: {what} already in correct form")
