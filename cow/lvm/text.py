"""The grammar of LVM's metadata text and of lvm.conf: parse it, and write it as LVM does.

    file  := { key "=" value | key "{" file "}" }
    value := scalar | "[" [ scalar { [","] scalar } ] "]"

A scalar is an integer (a leading 0 makes it octal; signed, 64 bits), a float, a "string" where
a backslash quotes only a quote or a backslash, a 'string' without escapes, or a bare word. White
space is free, # starts a comment, a NUL ends the text. A key "a/b" is b in section a. The first
of two equal keys counts. (libdm-config.c)

There are two forms: the one on disk has no indentation, the VG first and the header last; the one
in /etc/lvm/backup is indented, has the header first, and comments that tell sizes and times.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from decimal import Decimal
from math import isfinite
from typing import Final, TypeAlias

from cow.lvm.errors import MetadataError

Scalar: TypeAlias = int | float | str
Value: TypeAlias = "Scalar | list[Scalar] | Section"

MAX_DEPTH: Final = 64
"""The deepest nesting of sections that is read."""

_SPACE = re.compile(r"(?:[ \t\n\v\f\r]+|#[^\n]*)*")
_KEY = re.compile(r'"([^"\\]*(?:\\.[^"\\]*)*)"|([^ \t\n\v\f\r#={}"]+)', re.DOTALL)
_SCALAR = re.compile(
    r'"([^"\\]*(?:\\.[^"\\]*)*)"'
    r"|'([^']*)'"
    r"|([+-]?[0-9]+)(?![0-9.])"
    r"|([+-]?(?:[0-9]+\.[0-9]*|\.[0-9]+))"
    r"|([^ \t\n\v\f\r#={}\[\],\"'0-9+.-][^ \t\n\v\f\r#={}\[\],\"']*)",
    re.DOTALL,
)


class Section(dict[str, Value]):
    """The keys of one section in their order. `path` names it in errors: "vg0/logical_volumes"."""

    def __init__(self, path: str = "") -> None:
        super().__init__()
        self.path = path

    def where(self, key: str) -> str:
        """Return how an error names one of the keys."""
        return f"{self.path}/{key}" if self.path else key

    def sections(self) -> Iterator[tuple[str, Section]]:
        """Yield name and content of each section inside."""
        for key, value in self.items():
            if isinstance(value, Section):
                yield key, value

    def take_text(self, key: str, default: str | None = None) -> str:
        """Remove a string and return it, or `default`; without one it has to be there."""
        value = self.pop(key, default)
        if not isinstance(value, str):
            raise MetadataError(f"{self.where(key)}: {_expected('a string', value)}")
        return value

    def take_number(self, key: str, default: int | None = None, *, most: int = 2**64 - 1) -> int:
        """Remove an integer from 0 to `most` and return it, or `default`."""
        value = self.pop(key, default)
        if not isinstance(value, int):
            raise MetadataError(f"{self.where(key)}: {_expected('an integer', value)}")
        if not 0 <= value <= most:
            raise MetadataError(f"{self.where(key)}: {value} is not from 0 to {most}")
        return value

    def take_texts(self, key: str) -> list[str]:
        """Remove a list of strings (a single one counts as a list) and return it, or []."""
        value = self.pop(key, [])
        values = value if isinstance(value, list) else [value]
        texts = [text for text in values if isinstance(text, str)]
        if len(texts) != len(values):
            raise MetadataError(f"{self.where(key)}: {_expected('a list of strings', value)}")
        return texts

    def take_section(self, key: str) -> Section:
        """Remove a section and return it; an empty one where there is none."""
        value = self.pop(key, None)
        if value is None:
            return Section(self.where(key))
        if not isinstance(value, Section):
            raise MetadataError(f"{self.where(key)}: {_expected('a section', value)}")
        return value

    def copy(self) -> Section:
        """Return a copy, of the sections inside too."""
        new = Section(self.path)
        for key, value in self.items():
            new[key] = value.copy() if isinstance(value, Section | list) else value
        return new


def _expected(what: str, found: Value | None) -> str:
    if found is None:
        return f"missing, expected {what}"
    shown = "a section" if isinstance(found, Section) else value_text(found)
    if len(shown) > 60:
        shown = shown[:60] + "…"
    return f"expected {what}, found {shown}"


# Reading.


def parse(data: bytes | str, warn: Callable[[str], None] | None = None) -> Section:
    """Parse a text. `warn` is told of what is ignored; MetadataError names the line."""
    text = data if isinstance(data, str) else data.decode("utf-8", "surrogateescape")
    return _Parser(text.partition("\0")[0], warn).parse()


class _Parser:
    def __init__(self, text: str, warn: Callable[[str], None] | None) -> None:
        self._text = text
        self._at = 0
        self._warn = warn

    def parse(self) -> Section:
        root = Section()
        open_sections = [root]
        self._skip_space()
        while self._at < len(self._text):
            if self._peek("}"):
                if len(open_sections) == 1:
                    raise self._error("} without a section")
                open_sections.pop()
                continue
            key = self._key()
            section, name = self._find(open_sections[-1], key, len(open_sections))
            if self._peek("{"):
                if len(open_sections) + key.count("/") >= MAX_DEPTH:
                    raise self._error(f"sections nested deeper than {MAX_DEPTH}")
                open_sections.append(self._enter(section, name))
            elif self._peek("="):
                value = self._value()
                if name in section:
                    self._ignore(section, name)
                else:
                    section[name] = value
            else:
                raise self._error(f"expected = or {{ behind {key!r}")
        if len(open_sections) > 1:
            raise self._error(f"section {open_sections[-1].path} does not end")
        return root

    def _error(self, text: str) -> MetadataError:
        line = self._text.count("\n", 0, self._at) + 1
        return MetadataError(f"Parse error at byte {self._at} (line {line}): {text}")

    def _ignore(self, section: Section, name: str) -> None:
        if self._warn:
            self._warn(f"WARNING: Ignoring duplicate config value: {section.where(name)}")

    def _skip_space(self) -> None:
        found = _SPACE.match(self._text, self._at)
        assert found is not None
        self._at = found.end()

    def _peek(self, mark: str) -> bool:
        """Step over `mark` and what is blank behind it, if it stands here."""
        if not self._text.startswith(mark, self._at):
            return False
        self._at += len(mark)
        self._skip_space()
        return True

    def _key(self) -> str:
        found = _KEY.match(self._text, self._at)
        if found is None:
            raise self._error(f"expected a key, found {self._text[self._at : self._at + 20]!r}")
        self._at = found.end()
        self._skip_space()
        return found[2] if found[1] is None else _unescape(found[1])

    def _find(self, section: Section, key: str, depth: int) -> tuple[Section, str]:
        """Return where `key` belongs, which may be a path, and its name there."""
        *above, name = key.split("/")
        if depth + len(above) > MAX_DEPTH:
            raise self._error(f"sections nested deeper than {MAX_DEPTH}")
        for part in above:
            if part:
                section = self._enter(section, part)
        return section, name

    def _enter(self, section: Section, name: str) -> Section:
        found = section.get(name)
        if isinstance(found, Section):
            return found
        new = Section(section.where(name))
        if found is None:
            section[name] = new
        else:
            self._ignore(section, name)
        return new

    def _value(self) -> Scalar | list[Scalar]:
        if not self._peek("["):
            return self._scalar()
        values: list[Scalar] = []
        while not self._peek("]"):
            values.append(self._scalar())
            self._peek(",")
        return values

    def _scalar(self) -> Scalar:
        found = _SCALAR.match(self._text, self._at)
        if found is None:
            raise self._error(f"expected a value, found {self._text[self._at : self._at + 20]!r}")
        quoted, single, integer, real, word = found.groups()
        value: Scalar
        if quoted is not None:
            value = _unescape(quoted)
        elif integer is not None:
            value = self._integer(integer)
        elif real is not None:
            value = float(real)
            if not isfinite(value):
                raise self._error("number out of range")
        else:
            value = word if single is None else single
        self._at = found.end()
        self._skip_space()
        return value

    def _integer(self, digits: str) -> int:
        octal = digits.lstrip("+-").startswith("0")
        if len(digits.lstrip("+-0")) > 22:
            raise self._error("number out of range")
        try:
            value = int(digits, 8 if octal else 10)
        except ValueError:
            raise self._error(f"{digits} is not an octal number") from None
        if not -(2**63) <= value < 2**63:
            raise self._error(f"number {digits} out of range")
        return value


def _unescape(text: str) -> str:
    return re.sub(r'\\(["\\])', r"\1", text)


# Writing.

COMMENT_COLUMN = 40
"""Where a comment of the backup form starts, or behind the line with one tab."""

_AREA_LISTS = {"stripes": 2, "mirrors": 2, "raids": 2, "raid0_lvs": 1}
"""Lists of areas, and how many items of them stand on a line."""
_AFTER_BLANK = ("type", *_AREA_LISTS)
_SIZES = ("extent_size", "dev_size", "stripe_size")
_UNITS = ("Kilobytes", "Megabytes", "Gigabytes", "Terabytes", "Petabytes", "Exabytes")
_HEADER_GROUPS = (("contents", "version"), ("description",))


def value_text(value: Scalar | list[Scalar]) -> str:
    """Write a value on one line."""
    if isinstance(value, list):
        return "[" + ", ".join(value_text(each) for each in value) + "]"
    if isinstance(value, str):
        return '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'
    if isinstance(value, float):
        digits = format(Decimal(repr(value)), "f")
        return digits if "." in digits else digits + ".0"
    return str(value)


def disk_text(vg_name: str, vg: Section, header: Section, generator: str, host: str = "") -> bytes:
    """Write the text as it stands in a metadata area, with the NUL at its end.

    `generator` is named in the first line of the header; `host` (system, release, machine) is the
    comment behind creation_host.
    """
    lines = [f"{_key_text(vg_name)} {{", *_Writer(vg, backup=False).body(), "}"]
    lines += [*_header_lines(header, generator, host), *_other_sections(header, backup=False)]
    return ("\n".join([*lines, "", ""]) + "\0").encode("utf-8", "surrogateescape")


def backup_text(vg_name: str, vg: Section, header: Section, generator: str, host: str = "") -> str:
    """Write the text as LVM does into /etc/lvm/backup and archive."""
    lines = [*_header_lines(header, generator, host), ""]
    lines += [f"{_key_text(vg_name)} {{", *_Writer(vg, backup=True).body(), "}"]
    return "\n".join([*lines, *_other_sections(header, backup=True)]) + "\n"


def section_text(section: Section) -> str:
    """Write any section with tabs and without comments, as lvm.conf is written."""
    return "\n".join(_Writer(section, backup=True, plain=True).body(0)) + "\n"


def _header_lines(header: Section, generator: str, host: str) -> list[str]:
    created = header.get("creation_time")
    date = time.ctime(created) if isinstance(created, int) and 0 <= created < 2**40 else ""
    lines = [f"# Generated by {generator}: {date}".rstrip(), ""]
    for group in _HEADER_GROUPS:
        lines += [f"{key} = {_plain(header[key])}" for key in group if key in header]
        lines.append("")
    comments = {"creation_host": host, "creation_time": date}
    for key in ("creation_host", "creation_host_system_id", "creation_time"):
        if key in header:
            comment = comments.get(key)
            line = f"{key} = {_plain(header[key])}"
            lines.append(f"{line}\t# {comment}" if comment else line)
    known = {"creation_host", "creation_host_system_id", "creation_time"}.union(*_HEADER_GROUPS)
    others = Section()
    for key, value in header.items():
        if key not in known and not isinstance(value, Section):
            others[key] = value
    return lines + _Writer(others, backup=False).body(0)


def _other_sections(header: Section, *, backup: bool) -> list[str]:
    """Write the sections beside that of the VG, which has to be the first."""
    others = Section()
    others.update(header.sections())
    return _Writer(others, backup=backup).body(0)


def _plain(value: Value) -> str:
    return value_text([] if isinstance(value, Section) else value)


def _key_text(key: str) -> str:
    found = _KEY.fullmatch(key)
    return key if found and found[2] == key else value_text(key)


class _Writer:
    """Lays out a section; the blank lines are where LVM has them (export.c)."""

    def __init__(self, section: Section, *, backup: bool, plain: bool = False) -> None:
        self._section = section
        self._backup = backup
        self._comments = backup and not plain
        extent_size = section.get("extent_size")
        self._extent_size = extent_size if isinstance(extent_size, int) else 0
        self._lines: list[str] = []

    def body(self, level: int = 1) -> list[str]:
        self._write(self._section, level)
        if level and "physical_volumes" in self._section:
            if "logical_volumes" not in self._section:
                self._lines.append("")
            self._lines.append("")
        return self._lines

    def _write(self, section: Section, level: int) -> None:
        scalars = [(k, v) for k, v in section.items() if not isinstance(v, Section)]
        for key, value in scalars:
            self._item(section, key, value, level)
        for number, (key, inner) in enumerate(section.sections()):
            if number == 0 or not re.fullmatch(r"segment[0-9]+", key):
                self._lines.append("")
            self._line(level, f"{_key_text(key)} {{")
            self._write(inner, level + 1)
            self._line(level, "}")

    def _line(self, level: int, text: str, comment: str = "") -> None:
        if not self._backup:
            self._lines.append(text)
            return
        column = 8 * level + len(text)
        if comment and self._comments:
            tabs = max(1, -(-(COMMENT_COLUMN - column) // 8))
            text += "\t" * tabs + "# " + comment
        self._lines.append("\t" * level + text)

    def _item(self, section: Section, key: str, value: Scalar | list[Scalar], level: int) -> None:
        if key in _AFTER_BLANK or (key == "status" and "device" in section):
            self._lines.append("")
        if key in _AREA_LISTS and isinstance(value, list):
            step = _AREA_LISTS[key]
            self._line(level, f"{key} = [")
            for at in range(0, len(value), step):
                comma = "," if at + step < len(value) else ""
                line = ", ".join(value_text(each) for each in value[at : at + step])
                self._line(level + 1, line + comma)
            self._line(level, "]")
            return
        comment = self._comment(section, key, value) if self._comments else ""
        self._line(level, f"{_key_text(key)} = {value_text(value)}", comment)

    def _comment(self, section: Section, key: str, value: Scalar | list[Scalar]) -> str:
        if key == "format" and section is self._section:
            return "informational"
        if key == "device":
            return "Hint only"
        if not isinstance(value, int):
            return ""
        if key in _SIZES or (key == "chunk_size" and section.get("type") != "snapshot"):
            return _size(value)
        if key in ("pe_count", "extent_count"):
            return _size(value * self._extent_size)
        if key == "stripe_count" and value == 1:
            return "linear"
        if key == "creation_time" and 0 <= value < 2**40:
            return time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(value))
        return ""


def _size(sectors: int) -> str:
    size = sectors / 2
    unit = 0
    while size > 1024 and unit < len(_UNITS) - 1:
        size /= 1024
        unit += 1
    return f"{size:g} {_UNITS[unit]}"
