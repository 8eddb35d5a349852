"""The columns of `cow dm info -c` and `splitname`: fields, selection, sorting, layout (libdm's)."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from cow.cli.dm.command import error
from cow.cli.dm.names import Refused, SubsystemName, disk_name, mangle, no_node

Device = dict[str, Any]
"""A device as the server describes it."""


class Row(NamedTuple):
    """What a line is made of: a device, all devices (for who uses whom), the parts of its name."""

    device: Device
    others: Sequence[Device]
    parts: SubsystemName


class Field(NamedTuple):
    """A column. Numbers are set right and compared as numbers."""

    group: str
    name: str
    heading: str
    width: int
    numeric: bool
    value: Callable[[Row], str | int]
    description: str


def attributes(device: Device) -> str:
    """Return the four letters of the Stat column."""
    letters = zip("LIsr", ("live", "inactive", "suspended", "readonly"), "---w", strict=True)
    return "".join(letter if device[key] else other for letter, key, other in letters)


def _tables(row: Row) -> str:
    names = {(1, 1): "Both", (1, 0): "Live", (0, 1): "Inactive", (0, 0): "None"}
    return names[row.device["live"], row.device["inactive"]]


def _read_ahead(row: Row) -> int:
    if row.device["live"]:
        return 256
    error(no_node(row.device["name"]))
    return 0


def _disk(row: Row) -> str:
    found = disk_name(row.device)
    if found is None:
        raise Refused(
            "Could not resolve block device name for {major}:{minor}.".format(**row.device),
            "_do_report_object: report function failed for field blkdevname",
        )
    return found


def _users(row: Row) -> list[Device]:
    number = row.device["minor"]
    return [
        other
        for other in row.others
        if any(dep["dm"] and dep["minor"] == number for dep in other["deps"])
    ]


def _numbers(devices: Sequence[Device]) -> str:
    return ",".join("{major}:{minor}".format(**device) for device in devices)


def _names(devices: Sequence[Device]) -> str:
    return ",".join(device["name"] for device in devices)


def _deps(row: Row) -> list[Device]:
    deps: list[Device] = row.device["deps"]
    return deps


GROUPS = {
    "name": "Mapped Device Name Fields",
    "info": "Mapped Device Information Fields",
    "deps": "Mapped Device Relationship Information Fields",
    "splitname": "Mapped Device Name Components Fields",
}

# fmt: off
FIELDS = (
    Field("name", "name", "Name", 16, False, lambda r: r.device["name"],
          "Name of mapped device."),
    Field("name", "mangled_name", "MangledName", 16, False, lambda r: mangle(r.device["name"]),
          "Mangled name of mapped device."),
    Field("name", "unmangled_name", "UnmangledName", 16, False, lambda r: r.device["name"],
          "Unmangled name of mapped device."),
    Field("name", "uuid", "UUID", 32, False, lambda r: r.device["uuid"],
          "Unique (optional) identifier for mapped device."),
    Field("name", "mangled_uuid", "MangledUUID", 32, False, lambda r: mangle(r.device["uuid"]),
          "Mangled unique (optional) identifier for mapped device."),
    Field("name", "unmangled_uuid", "UnmangledUUID", 32, False, lambda r: r.device["uuid"],
          "Unmangled unique (optional) identifier for mapped device."),
    Field("name", "read_ahead", "RAhead", 6, True, _read_ahead,
          "Read ahead value."),
    Field("info", "blkdevname", "BlkDevName", 16, False, _disk,
          "Name of block device."),
    Field("info", "attr", "Stat", 4, False, lambda r: attributes(r.device),
          "(L)ive, (I)nactive, (s)uspended, (r)ead-only, read-(w)rite."),
    Field("info", "tables_loaded", "Tables", 6, False, _tables,
          "Which of the live and inactive table slots are filled."),
    Field("info", "suspended", "Suspended", 9, False,
          lambda r: "Suspended" if r.device["suspended"] else "Active",
          "Whether the device is suspended."),
    Field("info", "readonly", "Read-only", 9, False,
          lambda r: "Read-only" if r.device["readonly"] else "Writeable",
          "Whether the device is read-only or writeable."),
    Field("info", "devno", "DevNo", 5, False, lambda r: _numbers([r.device]),
          "Device major and minor numbers"),
    Field("info", "major", "Maj", 3, True, lambda r: r.device["major"],
          "Block device major number."),
    Field("info", "minor", "Min", 3, True, lambda r: r.device["minor"],
          "Block device minor number."),
    Field("info", "open", "Open", 4, True, lambda r: r.device["open_count"],
          "Number of references to open device, if requested."),
    Field("info", "segments", "Targ", 4, True, lambda r: r.device["nr_targets"],
          "Number of segments in live table, if present."),
    Field("info", "events", "Event", 6, True, lambda r: r.device["event_nr"],
          "Number of most recent event."),
    Field("deps", "device_count", "#Devs", 5, True, lambda r: len(_deps(r)),
          "Number of devices used by this one."),
    Field("tree", "devs_used", "DevNamesUsed", 16, False,
          lambda r: _names([dep for dep in _deps(r) if dep["dm"]]),
          "List of names of mapped devices used by this one."),
    Field("deps", "devnos_used", "DevNosUsed", 16, False, lambda r: _numbers(_deps(r)),
          "List of device numbers of devices used by this one."),
    Field("deps", "blkdevs_used", "BlkDevNamesUsed", 16, False,
          lambda r: ",".join(disk_name(dep) or "" for dep in _deps(r)),
          "List of names of block devices used by this one."),
    Field("tree", "device_ref_count", "#Refs", 5, True, lambda r: len(_users(r)),
          "Number of mapped devices referencing this one."),
    Field("tree", "names_using_dev", "RefNames", 8, False, lambda r: _names(_users(r)),
          "List of names of mapped devices using this one."),
    Field("tree", "devnos_using_dev", "RefDevNos", 9, False, lambda r: _numbers(_users(r)),
          "List of device numbers of mapped devices using this one."),
    Field("splitname", "subsystem", "Subsys", 6, False, lambda r: r.parts.subsystem,
          "Userspace subsystem responsible for this device."),
    Field("splitname", "vg_name", "VG", 4, False, lambda r: r.parts.vg,
          "LVM Volume Group name."),
    Field("splitname", "lv_name", "LV", 4, False, lambda r: r.parts.lv,
          "LVM Logical Volume name."),
    Field("splitname", "lv_layer", "LVLayer", 7, False, lambda r: r.parts.layer,
          "LVM device layer."),
)
# fmt: on

SELECTION = """\
Selection syntax
----------------
  FIELD=VALUE           - Is the value; != is not.
  FIELD>VALUE           - For numbers only, also <, >= and <=.
  FIELD=~REGEX          - Holds a match of the regular expression; !~ holds none.
  A && B, A , B         - Both.
  A || B, A # B         - At least one; && goes first.
  (A), !(A)             - As one; not so.
  'VALUE', "VALUE"      - With blanks or operators in it; a REGEX also in (), [] or {}.
"""

INFO_FIELDS = "name,major,minor,attr,open,segments,events,uuid"
SPLITNAME_FIELDS = "vg_name,lv_name,lv_layer"


def help_lines(groups: Sequence[str] = tuple(GROUPS), *, kinds: bool = False) -> list[str]:
    """Return the list of fields that `-o help` shows; with their kinds, that of `-S help`."""
    lines = []
    for group in groups:
        own = ("deps", "tree") if group == "deps" else (group,)
        rows = [] if kinds else [(f"{group}_all", "All fields in this section.")]
        for field in FIELDS:
            if field.group in own:
                kind = f" [{'number' if field.numeric else 'string'}]" if kinds else ""
                rows.append((field.name, f"{field.description}{kind}"))
        lines += [GROUPS[group], "-" * len(GROUPS[group])]
        lines += [f"  {name:<21} - {text}" for name, text in rows] + [" "]
    kind = " [unselectable number]" if kinds else ""
    lines += ["Special Fields", "--------------"]
    return [*lines, *(f"  {name:<21} - Show help.{kind}" for name in ("help", "?")), " "]


def selection_help() -> list[str]:
    """Return how a selection is written, for `-S help`."""
    return [*SELECTION.splitlines(), " "]


def find_fields(text: str, default: str, groups: Sequence[str] = tuple(GROUPS)) -> list[Field]:
    """Return the fields of an -o list: names, GROUP_all, all; + in front adds to the default."""
    if not text:
        return []
    names = re.sub(",+", ",", text.removeprefix("+")).removeprefix(",").split(",")
    found = find_fields(default, "", groups) if text.startswith("+") else []
    for name in names:
        wanted = name.lower().replace("_", "")
        known = [each for each in FIELDS if each.group in groups or "deps" in groups]
        fields = [each for each in known if each.name.replace("_", "") == wanted]
        if wanted.endswith("all") and not fields:
            fields = [each for each in known if wanted in ("all", f"{each.group}all")]
        if not fields:
            raise Refused(*help_lines(groups), f"Unrecognised field: {name}")
        found += fields
    return found


def find_field(name: str) -> Field | None:
    """Return the one field of a name, None if there is none."""
    wanted = name.lower().replace("_", "")
    return next((each for each in FIELDS if each.name.replace("_", "") == wanted), None)


class Report:
    """Rows of fields and how to print them, as dm_report_output does."""

    def __init__(self, fields: Sequence[Field], options: dict[str, str]) -> None:
        self.fields = fields
        self.rows: list[list[str | int]] = []
        self.kept: list[Row] = []
        self._keys: list[list[str | int]] = []
        self._options = options
        self._matches = Selection(options["select"]).matches if "select" in options else None
        self._sort = self._sort_fields(options.get("sort", ""))

    def _sort_fields(self, text: str) -> list[tuple[Field, bool]]:
        found: list[tuple[Field, bool]] = []
        for name in re.sub(",+", ",", text).removeprefix(",").split(",") if text else ():
            field = find_field(name.lstrip("+-"))
            if field is None:
                unknown = f"dm_report: Unrecognised field: {name.lstrip('+-')}"
                raise Refused(*help_lines(), unknown)
            if field in [each for each, _ in found]:
                error(f"dm_report: Ignoring duplicate sort field: {field.name}.")
            else:
                found.append((field, name.startswith("-")))
        return found

    def add(self, row: Row) -> None:
        """Add a row, if it is selected; Refused if one of its fields cannot be had."""
        if self._matches is not None and not self._matches(row):
            return
        values = [field.value(row) for field in self.fields]
        self._keys.append([field.value(row) for field, _ in self._sort])
        self.rows.append(values)
        self.kept.append(row)

    def _sorted(self) -> list[list[str | int]]:
        order = list(range(len(self.rows)))
        for index in reversed(range(len(self._sort))):
            keys = [row[index] for row in self._keys]
            order.sort(key=keys.__getitem__, reverse=self._sort[index][1])
        return [self.rows[row] for row in order]

    def lines(self) -> list[str]:
        """Return what is printed; nothing at all where there is no row."""
        options, rows = self._options, self._sorted()
        if not rows:
            return []
        headings = "noheadings" not in options
        prefixed = "nameprefixes" in options
        separator = options.get("separator", " " if headings else ":")
        cells = [[str(value) for value in row] for row in rows]
        if prefixed:
            quote = "" if "unquoted" in options else "'"
            cells = [
                [
                    f"DM_{field.name.upper()}={quote}{cell}{quote}"
                    for field, cell in zip(self.fields, row, strict=True)
                ]
                for row in cells
            ]
        if headings:
            cells.insert(0, [field.heading for field in self.fields])
        if "rows" in options:
            return [separator.join(column) for column in zip(*cells, strict=True)]
        if not headings or prefixed or "separator" in options:
            return [separator.join(row) for row in cells]
        return self._aligned(cells)

    def _aligned(self, cells: list[list[str]]) -> list[str]:
        widths = [
            max(field.width, *(_bytes(row[index]) for row in cells))
            for index, field in enumerate(self.fields)
        ]
        lines = []
        for number, row in enumerate(cells):
            padded = []
            for field, cell, width in zip(self.fields, row, widths, strict=True):
                blanks = " " * (width - _bytes(cell))
                padded.append(blanks + cell if field.numeric and number else cell + blanks)
            lines.append(" ".join(padded))
        return lines


def _bytes(cell: str) -> int:
    """Return how wide printf takes a cell to be."""
    return len(cell.encode("utf-8", "surrogateescape"))


# ---- selection

COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "=~": lambda value, pattern: re.search(pattern, str(value)) is not None,
    "!~": lambda value, pattern: re.search(pattern, str(value)) is None,
    "!=": operator.ne,
    ">=": operator.ge,
    "<=": operator.le,
    "=": operator.eq,
    ">": operator.gt,
    "<": operator.lt,
}

STRING_QUOTES = {"'": "'", '"': '"'}
REGEX_QUOTES = {**STRING_QUOTES, "(": ")", "[": "]", "{": "}"}

Selects = Callable[[Row], bool]


class Selection:
    """The expression behind -S: FIELD OP VALUE, joined by && , || #, grouped by ( ) and !( )."""

    def __init__(self, text: str) -> None:
        self._rest = text
        self.matches: Selects = self._any() if text else lambda row: True
        if self._rest.strip():
            raise Refused("Expecting logical operator", *self._hint(self._rest.strip()))

    def _take(self, *tokens: str) -> bool:
        rest = self._rest.lstrip()
        for token in tokens:
            if rest.startswith(token):
                self._rest = rest[len(token) :]
                return True
        return False

    def _any(self) -> Selects:
        terms = [self._all()]
        while self._take("||", "#"):
            terms.append(self._all())
        return lambda row: any(term(row) for term in terms)

    def _all(self) -> Selects:
        terms = [self._one()]
        while self._take("&&", ","):
            terms.append(self._one())
        return lambda row: all(term(row) for term in terms)

    def _one(self) -> Selects:
        negate = self._take("!")
        if negate and not self._rest.lstrip().startswith("("):
            raise Refused(f"Syntax error: left parenthesis expected at '{self._rest.lstrip()}'")
        if self._take("("):
            inner = self._any()
            if not self._take(")"):
                raise Refused(
                    f"Syntax error: right parenthesis expected at '{self._rest.lstrip()}'"
                )
            return (lambda row: not inner(row)) if negate else inner
        return self._comparison()

    def _comparison(self) -> Selects:
        here = self._rest.lstrip()
        found = re.match(r"([\w.-]*)\s*(=~|!~|!=|>=|<=|=|>|<|)\s*", here)
        assert found
        name, sign = found[1], found[2]
        if not name:
            raise Refused("Expecting field name", *self._hint(here))
        field = find_field(name)
        if field is None:
            lines = help_lines(kinds=True)
            raise Refused(*lines, f"Unrecognised selection field: {name}", *self._hint(here))
        self._rest = here[found.end() :]
        compare = COMPARE.get(sign)
        if compare is None or (not field.numeric and sign not in ("=", "!=", "=~", "!~")):
            only = "Operator can be used only with {} fields: " + here
            if compare is not None:
                why = only.format("number, size, time or percent")
            elif re.match("since|after|until|before", self._rest):
                why = only.format("time")
            else:
                why = f"Unrecognised comparison operator: {self._rest}"
            raise Refused(*selection_help(), why, *self._hint(here))
        if sign in ("=~", "!~"):
            if field.numeric:
                incompatible = "incompatible comparison type for selection field"
                raise Refused(f"dm_report: {incompatible} {field.name}")
            pattern = self._string(here, "regex", field, REGEX_QUOTES)
            if not pattern:
                expected = f"Regular expression expected for selection field {field.name}"
                raise Refused(expected, *self._hint(here))
            try:
                re.compile(pattern)
            except re.error as failure:
                raise Refused(f"Failed to parse regex: {failure}", *self._hint(here)) from failure
            return lambda row: compare(field.value(row), pattern)
        value = self._number(here, field) if field.numeric else self._string(here, "string", field)
        return lambda row: compare(field.value(row), value)

    def _string(
        self, here: str, kind: str, field: Field, quotes: dict[str, str] = STRING_QUOTES
    ) -> str:
        end = quotes.get(self._rest[:1])
        if end is None:
            plain = re.match(r"(?:(?!&&|\|\|)[^\s,#)])*", self._rest)
            assert plain
            self._rest = self._rest[plain.end() :]
            return plain[0]
        value, found, self._rest = self._rest[1:].partition(end)
        if not found:
            failed = f"Failed to parse {kind} value for selection field {field.name}."
            raise Refused("Missing end quote.", failed, *self._hint(here))
        return value

    def _number(self, here: str, field: Field) -> int:
        found = re.match(r"([0-9]+)[0-9.]*([bskmgtpe]?)", self._rest, re.IGNORECASE)
        if found and not found[2]:
            self._rest = self._rest[found.end() :]
            return int(found[1])
        why = "Found size unit specifier but numeric value expected" if found else ""
        why = f"{why or 'Failed to parse numeric value'} for selection field {field.name}."
        raise Refused(why, *self._hint(here))

    @staticmethod
    def _hint(text: str) -> tuple[str, str]:
        return (
            f"Selection syntax error at '{text}'.",
            "Use 'help' for selection to get more help.",
        )
