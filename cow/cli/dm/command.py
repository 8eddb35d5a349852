"""What every verb of `cow dm` works with: the device meant, the connection, the tables."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from cow.cli import printable
from cow.cli.dm.names import MAJOR, Refused, mangle, no_node, unmangle
from cow.daemon.client import Client, NotServed, absolute_paths
from cow.errors import CowOSError, DeviceNotFound

if TYPE_CHECKING:
    from cow.cli.dm.report import Report


class Which(NamedTuple):
    """A device as the user gave it: by name, by uuid, or by number."""

    name: str | None = None
    uuid: str | None = None
    number: tuple[int, int] | None = None
    shown: str | None = None
    """The name as it was typed, which is how the looking verbs print it."""

    def args(self) -> dict[str, Any]:
        """Return what a request names it by."""
        if self.number is not None:
            major, minor = self.number
            return {"minor": minor if major == MAJOR and minor >= 0 else 2**32}
        return {"uuid": self.uuid} if self.name is None else {"name": self.name}

    def label(self) -> str:
        """Return how libdm's error line names it."""
        number = "({}:{})".format(*self.number) if self.number else ""
        return f"{mangle(self.name or '')} {mangle(self.uuid or '')}{number}"


class Table(NamedTuple):
    """Table text, checked as libdm does before it asks the kernel."""

    text: str
    empty: bool


def error(*lines: str) -> None:
    """Print lines on stderr, as dmsetup does."""
    for line in lines:
        print(printable(line), file=sys.stderr)


class Command:
    """One command line: its options, its connection, what it prints."""

    def __init__(self, options: dict[str, str], verb: str, verbose: int) -> None:
        self.options = options
        self.verb = verb
        self.verbose = verbose
        self.multiple = False
        self.json: list[Any] = []
        self.concise: list[str] = []
        self.report: Report | None = None
        self._client: Client | None = None
        self._world: list[dict[str, Any]] | None = None

    # Asking.

    @property
    def client(self) -> Client:
        """The connection, made when first needed."""
        if self._client is None:
            self._client = Client(self.options.get("socket"))
        return self._client

    def ask(self, ioctl: str, verb: str, which: Which, **args: Any) -> Any:  # noqa: ANN401
        """Run a verb on a device; Refused with libdm's line if it fails."""
        try:
            return self.client.call(verb, **which.args(), **args)
        except NotServed:
            raise
        except (CowOSError, TimeoutError) as failure:
            raise Refused(*ioctl_failed(ioctl, which.label(), failure)) from failure

    def devices(self, which: Which | None = None, ioctl: str = "") -> list[dict[str, Any]]:
        """Describe one device, or all by name. If it is missing `ioctl` is what failed."""
        try:
            found: list[dict[str, Any]] = self.client.call(
                "devices", **({} if which is None else which.args())
            )
        except DeviceNotFound as failure:
            if which is None or not ioctl:
                raise Refused("Device does not exist.") from failure
            raise Refused(*ioctl_failed(ioctl, which.label(), failure)) from failure
        if "inactive" in self.options:
            for device in found:
                device["readonly"] = device["inactive_readonly"]
                device["nr_targets"] = device["inactive_targets"]
        return sorted(found, key=lambda device: mangle(device["name"]))

    def each(self, found: Sequence[Which] | None, show: Callable[[Command, Which], None]) -> None:
        """Show devices; one that fails does not keep the others from being shown."""
        failed = None
        for which in found or ():
            try:
                show(self, which)
            except Refused as refused:
                if failed is not None:
                    error(*failed.lines)
                failed = refused
        if failed is not None:
            raise failed

    def close(self) -> None:
        """Hang up."""
        if self._client is not None:
            self._client.close()

    def world(self) -> list[dict[str, Any]]:
        """Describe all devices, asked for once."""
        if self._world is None:
            self._world = self.devices()
        return self._world

    def which(self, name: str | None) -> Which:
        """Return the device that an argument or -u, or -j and -m, stand for."""
        options = self.options
        if name is not None:
            if "/" not in name:
                return Which(unmangle(name), shown=name)
            found = Which(unmangle(name.removeprefix("/dev/mapper/")), shown=name)
            if "/" not in (found.name or "/"):
                try:
                    self.devices(found)
                except Refused:
                    pass
                else:
                    return found
            raise Refused(f"Device {name} not found")
        if "uuid" in options:
            return Which(uuid=unmangle(options["uuid"]))
        if "major" in options:
            return Which(number=self.number())
        raise Refused("No device specified.")

    def number(self) -> tuple[int, int]:
        """Return what -j and -m say."""
        major, minor = atoi(self.options["major"]), atoi(self.options["minor"])
        if major <= 0 <= minor:
            raise Refused(
                "Missing major number for persistent device.", "Couldn't create ioctl argument."
            )
        return major, minor

    def all_or(self, name: str | None) -> list[Which] | None:
        """Return the devices a looking verb goes over; None where there is no device at all."""
        if name is not None or "uuid" in self.options or "major" in self.options:
            return [self.which(name)]
        names = [Which(device["name"]) for device in self.world()]
        if not names and "json" not in self.options:
            print("No devices found")
        return names or None

    def prefix(self, which: Which, device: dict[str, Any]) -> str:
        """Return what stands before a line where there are several devices."""
        name = which.shown or device["name"]
        return f"{name}: " if self.multiple and not self.verbose else ""

    # Tables.

    def read_table(self, file: str | None) -> Table:
        """Read --table, a file or stdin, and make its paths absolute."""
        if "table" in self.options:
            text, source = self.options["table"], ""
        else:
            text, source = read_file(file), "on stdin" if file is None else file
        return self.check_table(text, source)

    def check_table(self, text: str, source: str = "") -> Table:
        """Refuse what is no table, with libdm's words."""
        empty = True
        for number, line in enumerate(text.split("\n"), 1):
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            found = re.match(r"[+-]?[0-9]+\s+[+-]?[0-9]+\s+(\S+)", line)
            if not found:
                raise Refused(f"Invalid format on line {number} of table {source}.")
            if len(found[1].encode("utf-8", "surrogateescape")) >= 16:
                raise Refused(f"Target type name {found[1]} is too long.")
            empty = False
        names: set[str] = set()

        def is_device(name: str) -> bool:
            if not names:
                names.update(self.client.call("names"), [""])
            return name in names

        return Table(absolute_paths(text, os.getcwd(), is_device), empty)

    def show_info(self, which: Which) -> None:
        """Print the block of `info`, for -v."""
        if self.verbose:
            for device in self.devices(which):
                print_info(device)


def ioctl_failed(ioctl: str, label: str, failure: OSError) -> list[str]:
    """Return libdm's line about a failed ioctl, and ours with the reason."""
    code = failure.errno or errno.EINVAL
    lines = [f"device-mapper: {ioctl} ioctl on {label} failed: {os.strerror(code)}"]
    if not (isinstance(failure, DeviceNotFound) and str(failure.strerror).endswith("such device")):
        lines.append(f"cow: {failure.strerror or failure}")
    return lines


def atoi(text: str) -> int:
    """Return the number that a text begins with, 0 if with none."""
    found = re.match(r"\s*[+-]?[0-9]+", text)
    return int(found[0]) if found else 0


def read_file(path: str | None) -> str:
    """Return what a file, or stdin, holds."""
    if path is None and sys.stdin is None:  # closed
        return ""
    if path is None:
        return sys.stdin.buffer.read().decode("utf-8", "surrogateescape")
    try:
        with open(path, "rb") as file:
            return file.read().decode("utf-8", "surrogateescape")
    except IsADirectoryError:
        return ""
    except OSError as failure:
        raise Refused(f"Couldn't open '{path}' for reading.") from failure


def print_info(device: dict[str, Any]) -> None:
    """Print the block of `info`."""
    tables = [name for name in ("live", "inactive") if device[name]]
    lines = [
        f"Name:              {device['name']}",
        f"State:             {'SUSPENDED' if device['suspended'] else 'ACTIVE'}"
        f"{' (READ-ONLY)' if device['readonly'] else ''}"
        f"{' (DEFERRED REMOVE)' if device['deferred_remove'] else ''}",
        *(["Read Ahead:        256"] if device["live"] else []),
        f"Tables present:    {' & '.join(tables).upper() or 'None'}",
        f"Open count:        {device['open_count']}",
        f"Event number:      {device['event_nr']}",
        f"Major, minor:      {device['major']}, {device['minor']}",
        f"Number of targets: {device['nr_targets']}",
        *([f"UUID: {device['uuid']}"] if device["uuid"] else []),
        "",
    ]
    if not device["live"]:
        error(no_node(device["name"]))
    print(*lines, sep="\n")
