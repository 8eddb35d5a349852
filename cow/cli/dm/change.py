"""The verbs of `cow dm` that change something. They are silent, as dmsetup's are."""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Callable, Iterator, Sequence

from cow.cli.dm.command import Command, Table, Which, atoi, error, ioctl_failed, read_file
from cow.cli.dm.names import MAJOR, Refused, check_new_name, check_new_uuid, unmangle
from cow.daemon.client import NotServed
from cow.errors import CowOSError, ResumeError, TableError

RETRIES = 25
RETRY_SECONDS = 0.2

BACKSLASH = "Backslash must be followed by another character at end of string."
FIVE = "five comma-separated fields are required for each device"


def create(command: Command, args: Sequence[str]) -> None:
    """Make a device; with a table, load and resume it."""
    options = command.options
    if "concise" in options:
        _create_concise(command, args)
        return
    if not args:
        raise Refused("Please provide a name for the new device.")
    check_new_name(args[0])
    check_new_uuid(options.get("uuid", ""))
    table = None
    if "notable" not in options:
        table = command.read_table(args[1] if len(args) == 2 else None)
    number = command.number() if "major" in options else None
    _create_one(command, args[0], table, options.get("uuid", ""), "readonly" in options, number)


def _create_one(
    command: Command,
    name: str,
    table: Table | None,
    uuid: str,
    readonly: bool,
    number: tuple[int, int] | None,
) -> None:
    name, uuid = unmangle(name), unmangle(uuid)
    minor = number[1] % 2**20 if number and number[1] >= 0 else None
    try:
        command.client.call(
            "create",
            name=name,
            table=None if table is None or table.empty else table.text,
            uuid=uuid or None,
            readonly=readonly,
            minor=minor,
        )
    except NotServed:
        raise
    except (TableError, ResumeError) as failure:
        # By then the device is made, and has a number.
        ioctl = "resume" if isinstance(failure, ResumeError) else "reload"
        described = command.client.described
        made = Which(name, None, (described["major"], described["minor"]))
        raise Refused(*ioctl_failed(ioctl, made.label(), failure)) from failure
    except CowOSError as failure:
        if f"minor {minor} is taken" in str(failure):
            failure.errno = errno.ENXIO  # what libdm makes of it
        label = Which(name, uuid, number).label()
        raise Refused(*ioctl_failed("create", label, failure)) from failure
    command.show_info(Which(name))


def _create_concise(command: Command, args: Sequence[str]) -> None:
    if len(args) > 1:
        raise Refused("dmsetup create --concise takes at most one argument")
    if command.options.keys() & {"table", "minor", "uuid", "notable", "inactive"}:
        raise Refused("--concise is incompatible with --[no]table, --minor, --uuid and --inactive.")
    for name, uuid, minor, flags, text in _concise_devices(args[0] if args else read_file(None)):
        if flags not in ("", "ro", "rw"):
            raise Refused(f"Invalid flags parameter '{flags}' must be 'ro' or 'rw' or empty.")
        check_new_name(name)
        check_new_uuid(uuid)
        table = command.check_table(text)
        number = (MAJOR, atoi(minor)) if minor else None
        readonly = flags == "ro" or "readonly" in command.options
        _create_one(command, name, table, uuid, readonly, number)


def _concise_devices(text: str) -> Iterator[list[str]]:
    """Yield the five fields of each device; those before an incomplete one are yielded first."""

    def incomplete(why: str) -> Refused:
        names = ("name", "uuid", "minor", "flags", "table")
        padded = [*fields, *["(null)"] * 5]
        parsed = " ".join(f"{name}: {padded[index]}" for index, name in enumerate(names))
        return Refused(why, f"Parsed {len(fields)} fields: {parsed}")

    fields = [""]
    at, end = 0, len(text)
    while at < end:
        char = text[at]
        at += 1
        if char == "\\":
            if at == end:
                raise incomplete(BACKSLASH)
            fields[-1] += text[at]
            at += 1
        elif char == ",":
            if len(fields) == 5:
                fields[-1] += "\n"
                continue
            fields.append("")
            at += len(text[at:]) - len(text[at:].lstrip())
        elif char == ";" or at == end:
            fields[-1] += char if char != ";" else ""
            if len(fields) != 5:
                raise incomplete(FIVE.capitalize())
            yield fields
            fields = [""]
            at += len(text[at:]) - len(text[at:].lstrip())
        else:
            fields[-1] += char
    if fields != [""]:
        raise incomplete(f"Incomplete entry: {FIVE}")


def load(command: Command, args: Sequence[str]) -> None:
    """Load a table into the inactive slot."""
    options = command.options
    if "notable" in options:
        raise Refused("--notable only available when creating new device.")
    rest = list(args)
    name = None
    if "uuid" not in options and "major" not in options:
        if not rest:
            raise Refused("Please specify device.")
        name = rest.pop(0)
    elif len(rest) > 1:
        raise Refused("Too many command line arguments.")
    which = command.which(name)
    table = command.read_table(rest[0] if rest else None)
    readonly = "readonly" in options
    command.ask("reload", "load", which, table=table.text, readonly=readonly)
    command.show_info(which)


def simple(verb: str) -> Callable[[Command, Sequence[str]], None]:
    """Make the function of a verb that needs nothing but the device."""

    def run(command: Command, args: Sequence[str]) -> None:
        which = command.which(args[0] if args else None)
        flags = {}
        if verb == "suspend":
            flags = {name: name in command.options for name in ("noflush", "nolockfs")}
        command.ask(verb, verb, which, **flags)
        command.show_info(which)

    return run


def wipe_table(command: Command, args: Sequence[str]) -> None:
    """Put one error target in the place of the live table."""
    if not args:
        raise Refused("No device specified.")
    which = command.which(args[0])
    size = 0
    try:
        for line in command.ask("table", "table", which).split("\n"):
            size += int(line.split()[1]) if line else 0
    except Refused as refused:
        error(*refused.lines)
    readonly = "readonly" in command.options
    command.ask("reload", "load", which, table=f"0 {size} error", readonly=readonly)
    try:
        command.ask("resume", "resume", which)
    except Refused:
        command.ask("clear", "clear", which)
        raise


def remove(command: Command, args: Sequence[str]) -> None:
    """Remove a device; --force makes its I/O fail first."""
    if "force" in command.options and args:
        try:
            wipe_table(command, args)
        except Refused as refused:
            error(*refused.lines)
    which = command.which(args[0] if args else None)
    deferred = "deferred" in command.options
    for left in reversed(range(RETRIES if "retry" in command.options else 1)):
        try:
            command.ask("remove", "remove", which, deferred=deferred)
            return
        except Refused as refused:
            cause = refused.__cause__
            if not left or not isinstance(cause, OSError) or cause.errno != errno.EBUSY:
                raise
            time.sleep(RETRY_SECONDS)


def remove_all(command: Command, args: Sequence[str]) -> None:
    """Remove every device that is not in use, with --force the others too if they can be."""
    deferred = "deferred" in command.options
    command.client.call("remove_all", deferred=deferred)
    names = command.client.call("names")
    if "force" not in command.options or not names:
        return
    for name in names:
        try:
            wipe_table(command, [name])
        except Refused as refused:
            error(*refused.lines)
    command.client.call("remove_all", deferred=deferred)
    left = len(command.client.call("names"))
    if left:
        error(f"Unable to remove {left} device(s).")


def rename(command: Command, args: Sequence[str]) -> None:
    """Give a device another name, or a uuid."""
    which = command.which(args[0] if len(args) == 2 else None)
    new = args[-1]
    if "setuuid" in command.options:
        check_new_uuid(new)
        command.ask("rename", "set_uuid", which, new_uuid=unmangle(new))
    else:
        check_new_name(new, renaming=True)
        command.ask("rename", "rename", which, new_name=unmangle(new))


def message(command: Command, args: Sequence[str]) -> None:
    """Send a message and print the answer."""
    rest = list(args)
    by_name = "uuid" not in command.options and "major" not in command.options
    which = command.which(rest.pop(0) if by_name else None)
    if not re.fullmatch(r"\s*[+-]?[0-9]+", rest[0]) or abs(int(rest[0])) >= 2**64:
        raise Refused("Invalid sector.")
    sector = int(rest.pop(0)) % 2**64
    if not rest:
        error("No message supplied.")
    answer = command.ask("message", "message", which, sector=sector, text=" ".join(rest))
    if answer:
        print(answer.removesuffix("\n"))


def wait(command: Command, args: Sequence[str]) -> None:
    """Wait for an event."""
    rest = list(args)
    name = None
    if "uuid" not in command.options and "major" not in command.options:
        if not rest:
            raise Refused("No device specified.")
        name = rest.pop(0)
    which = command.which(name)
    event_nr = atoi(rest[-1]) % 2**32 if rest else 0
    command.ask("waitevent", "wait", which, event_nr=event_nr)
    command.show_info(which)


def nothing(command: Command, args: Sequence[str]) -> None:
    """Do nothing: there are no device nodes."""
