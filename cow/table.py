"""The grammar of dmsetup: table text and --concise text, both ways; and loading a table.

    START LENGTH TYPE [PARAM…]          one target a line, sectors; # starts a comment

Lines go to the targets in the order written, and the rules of the kernel are checked in its order
(dm-table.c): length, type, gap, the target's own arguments; sizes and alignment at the end.
"""

from __future__ import annotations

import errno
import re
from typing import NamedTuple

from cow import _core
from cow.errors import TableError, TableFormatError, TargetError
from cow.target import NameOf, Target, TargetContext, find_target
from cow.units import MAX_SECTORS, SECTOR_SIZE

MAX_TARGETS = 1048576
MAX_TYPE_NAME = 16


class Line(NamedTuple):
    """One line of a table as written; `number` counts from 1 in its text."""

    number: int
    start: int
    length: int
    type: str
    args: list[str]


def parse(text: str) -> list[Line]:
    """Split table text into lines; TableFormatError names the line that is none."""
    lines = []
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.lstrip()
        if not line or line.startswith("#"):
            continue
        found = re.match(r"([+-]?[0-9]+)\s+([+-]?[0-9]+)\s+(\S+)(.*)", line, re.DOTALL)
        if not found:
            raise TableFormatError(
                f"Invalid format: expected START LENGTH TYPE, found {line!r}", line=number
            )
        type_name = found[3]
        if len(type_name) >= MAX_TYPE_NAME:
            raise TableFormatError(f"Target type name {type_name} is too long.", line=number)
        start, length = _scan_number(found[1]), _scan_number(found[2])
        lines.append(Line(number, start, length, type_name, split_args(found[4])))
    return lines


def _scan_number(text: str) -> int:
    """Read a number as scanf's %llu does: it wraps at a minus sign, and stops at the largest."""
    digits = text.lstrip("+-").lstrip("0")
    if len(digits) > 20 or int(digits or "0") >= 2**64:
        return 2**64 - 1
    return int(digits or "0") * (-1 if text[0] == "-" else 1) % 2**64


def split_args(text: str) -> list[str]:
    """Split parameters at white space; # ends them.

    A backslash before a blank, a # or a backslash quotes it.
    """
    words = re.findall(r"(?:\\[\s\\#]|[^\s#])+|#", text)
    if "#" in words:
        words = words[: words.index("#")]
    return [re.sub(r"\\([\s\\#])", r"\1", word) for word in words]


def quote_arg(word: str) -> str:
    """Write a parameter so that `split_args` reads it back."""
    return re.sub(r"([\s\\#])", r"\\\1", word)


class Table:
    """A loaded table: its targets in order. `devices` lists what it opened, in order of opening."""

    def __init__(self, text: str, context: TargetContext) -> None:
        self.readonly = context.readonly
        self.targets: list[Target] = []
        self._lines: list[Line] = parse(text)
        self.devices: list[_core.BlockDevice] = []
        if not self._lines:
            raise TableError("no targets specified")
        if len(self._lines) > MAX_TARGETS:
            raise TableError(f"more than {MAX_TARGETS} targets", errno.EOVERFLOW)
        try:
            for line in self._lines:
                self._add_target(line, context)
            self.map = _core.Map([target.map for target in self.targets])
        except BaseException:
            self.release()
            raise

    def _add_target(self, line: Line, context: TargetContext) -> None:
        try:
            if line.length == 0:
                raise TargetError("zero-length target")
            if line.start + line.length > MAX_SECTORS:
                raise TargetError(f"too large device: more than {MAX_SECTORS} sectors")
            target_class = find_target(line.type)
            expected = self.sectors
            if line.start != expected:
                raise TargetError(
                    f"{line.type}: Gap in table: starts at sector {line.start}, not at {expected}"
                )
            try:
                target = target_class(context, line.start, line.length, line.args)
            except TargetError as error:
                raise TargetError(f"{line.type}: {error.strerror}", error.errno) from error
        except TargetError as error:
            raise TableError(error.strerror or "", error.errno, line=line.number) from error
        self.targets.append(target)

    def read_metadata(self) -> None:
        """Let the targets read what they keep on their devices: the table is accepted so far."""
        for line, target in zip(self._lines, self.targets, strict=True):
            try:
                target.read_metadata()
            except TargetError as error:
                raise TableError(
                    f"{line.type}: {error.strerror}", error.errno, line=line.number
                ) from error

    @property
    def sectors(self) -> int:
        """The length of the device: where the last target ends."""
        if not self.targets:
            return 0
        last = self._lines[len(self.targets) - 1]
        return last.start + last.length

    def check_limits(self) -> None:
        """Check sizes and alignment against the devices of now (dm_calculate_queue_limits)."""
        for line, target in zip(self._lines, self.targets, strict=True):
            for device, start, length in target.areas():
                reason = _area_is_invalid(device, start, length)
                if reason:
                    raise TableError(reason, line=line.number)
        block = self.logical_block_size // SECTOR_SIZE
        remaining = 0
        for line, target in zip(self._lines, self.targets, strict=True):
            own = max(
                (device.logical_block_size for device, _, _ in target.areas()), default=SECTOR_SIZE
            )
            misfit = remaining < line.length and remaining % (own // SECTOR_SIZE)
            rest = (line.start + line.length) % block
            remaining = block - rest if rest else 0
            if misfit or (remaining and line is self._lines[-1]):
                raise TableError(
                    f"(start sect {line.start} len {line.length}) not aligned to h/w logical block "
                    f"size {block * SECTOR_SIZE}",
                    line=line.number,
                )

    @property
    def logical_block_size(self) -> int:
        """Bytes: the largest of the devices below."""
        sizes = (d.logical_block_size for target in self.targets for d, _, _ in target.areas())
        return max(sizes, default=SECTOR_SIZE)

    def lines(self, name_of: NameOf, target: str | None = None) -> list[str]:
        """Return the table lines, as `dmsetup table` prints them."""
        return [
            f"{line.start} {line.length} {line.type} {each.table_args(name_of)}"
            for line, each in zip(self._lines, self.targets, strict=True)
            if target in (None, line.type)
        ]

    def status_lines(self, name_of: NameOf, target: str | None = None) -> list[str]:
        """Return the status lines, as `dmsetup status` prints them."""
        return [
            f"{line.start} {line.length} {line.type} {each.status(name_of)}"
            for line, each in zip(self._lines, self.targets, strict=True)
            if target in (None, line.type)
        ]

    def target_at(self, sector: int) -> Target:
        """Return the target that holds a sector; TargetError if none does."""
        for line, target in zip(self._lines, self.targets, strict=True):
            if line.start <= sector < line.start + line.length:
                return target
        raise TargetError("Target message sector outside device.")

    def release(self) -> None:
        """Let the targets go; the devices are closed by whoever opened them."""
        for target in reversed(self.targets):
            target.release()


def _area_is_invalid(device: _core.BlockDevice, start: int, length: int) -> str | None:
    """Return the kernel's words for an area that a device does not have, or None.

    A device without a live table is checked when there is one.
    """
    if not device.sectors:
        return None
    if start + length > device.sectors:
        return (
            f"{device} too small for target: start={start}, len={length}, dev_size={device.sectors}"
        )
    block = device.logical_block_size
    for name, value in (("start", start), ("len", length)):
        if value % (block // SECTOR_SIZE):
            return f"{name}={value} not aligned to h/w logical block size {block} of {device}"
    return None


class ConciseDevice(NamedTuple):
    """One device of a --concise text; `minor` and `readonly` None where the field is empty."""

    name: str
    uuid: str
    minor: int | None
    readonly: bool | None
    table: str


def parse_concise(text: str) -> list[ConciseDevice]:
    """Parse `name,uuid,minor,flags,table[,table…][;…]`; TableFormatError says what is missing."""
    return [_parse_concise_device(fields) for fields in _split_concise(text.strip("\n"))]


def _split_concise(text: str) -> list[list[str]]:
    """Split at unescaped ; and , and undo the escapes. Blanks before the first five fields go."""
    devices: list[list[str]] = [[""]]
    chars = iter(text)
    for char in chars:
        fields = devices[-1]
        if char == "\\":
            fields[-1] += next(chars, "")
        elif char == ";":
            devices.append([""])
        elif char == ",":
            fields.append("")
        elif char == " " and not fields[-1] and len(fields) <= 5:
            continue
        else:
            fields[-1] += char
    return [fields for fields in devices if fields != [""]]


def _parse_concise_device(fields: list[str]) -> ConciseDevice:
    if len(fields) < 5:
        names = ("name", "uuid", "minor", "flags", "table")
        parsed = " ".join(
            f"{name}: {value}" for name, value in zip(names, [*fields, *[""] * 5], strict=False)
        )
        raise TableFormatError(
            "Incomplete entry: five comma-separated fields are required for each device; "
            f"Parsed {len(fields)} fields: {parsed}"
        )
    name, uuid, minor, flags, *table = fields
    if flags not in ("", "ro", "rw"):
        raise TableFormatError(f"Invalid flags parameter '{flags}' must be 'ro' or 'rw' or empty.")
    if minor and not re.fullmatch(r"[0-9]{1,20}", minor):
        raise TableFormatError(f"Failed to parse minor number from '{minor}'.")
    return ConciseDevice(
        name,
        uuid,
        int(minor) if minor else None,
        flags == "ro" if flags else None,
        "\n".join(table),
    )


def format_concise(devices: list[ConciseDevice]) -> str:
    """Write devices as one line of --concise text."""
    entries = []
    for device in devices:
        fields = [
            _quote_concise(device.name),
            _quote_concise(device.uuid),
            "" if device.minor is None else str(device.minor),
            "" if device.readonly is None else "ro" if device.readonly else "rw",
            *(_quote_concise(line) for line in device.table.split("\n")),
        ]
        entries.append(",".join(fields))
    return ";".join(entries)


def _quote_concise(field: str) -> str:
    """Quote what would end a field, and a blank that would be skipped before it."""
    quoted = re.sub(r"([,;\\])", r"\\\1", field)
    return f"\\{quoted}" if quoted[:1].isspace() else quoted
