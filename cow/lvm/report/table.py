"""From rows to lines: columns, separators, prefixes, rows turned to columns, JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from cow.lvm.report.fields import RIGHT, SELECTED, Field, Style
from cow.lvm.report.rows import Row
from cow.lvm.report.selection import Matches

INDENT: Final = "    "


@dataclass(frozen=True)
class Format:
    """How a report is printed; what is not said is LVM's default."""

    style: Style = field(default_factory=Style)
    headings: bool = True
    aligned: bool = True
    buffered: bool = True
    """Whether rows are sorted, and columns as wide as the widest value in them."""
    separator: str = " "
    prefixes: bool = False
    quoted: bool = True
    as_rows: bool = False
    json: str = ""
    """The key of the list of rows in JSON; "" for text."""
    compact: bool = False
    compact_fields: frozenset[str] = frozenset()
    """Fields that have no column where all values are blank; `compact`: all fields."""


class Report:
    """Gathers rows, and makes lines of them. `sort` has (field, descending) pairs."""

    def __init__(
        self,
        fields: Sequence[Field],
        sort: Sequence[tuple[Field, bool]],
        form: Format,
        matches: Matches | None = None,
    ) -> None:
        self.fields = list(fields)
        self._sort = sort
        self._form = form
        self._matches = matches
        self._cells: list[list[str]] = []
        self._keys: list[list[Any]] = []

    def add(self, rows: Iterable[Row]) -> None:
        """Take in rows, those that are selected."""
        for row in rows:
            selected = self._matches is None or self._matches(row)
            if not selected and SELECTED not in self.fields:
                continue
            self._cells.append([self._cell(each, row, selected) for each in self.fields])
            self._keys.append([each.sort_key(each.value(row)) for each, _ in self._sort])

    def _cell(self, each: Field, row: Row, selected: bool) -> str:
        if each is SELECTED:
            return str(int(selected))
        return each.text(each.value(row), self._form.style)

    def _sorted(self) -> list[list[str]]:
        order = list(range(len(self._cells)))
        if self._form.buffered:
            for index in reversed(range(len(self._sort))):
                keys = [row[index] for row in self._keys]
                order.sort(key=keys.__getitem__, reverse=self._sort[index][1])
        return [self._cells[row] for row in order]

    def lines(self) -> list[str]:
        """Return what is printed; nothing at all where there is no row, but in JSON."""
        form = self._form
        cells = self._sorted()
        if form.json:
            return json_lines(form.json, [each.name for each in self.fields], cells)
        if not cells:
            return []
        fields, cells = self._compact(cells)
        if form.aligned and not form.as_rows and not form.prefixes:
            return self._columns(fields, cells)
        if form.prefixes:
            quote = "'" if form.quoted else ""
            cells = [
                [
                    f"LVM2_{each.name.upper()}={quote}{cell}{quote}"
                    for each, cell in zip(fields, row, strict=True)
                ]
                for row in cells
            ]
        if form.headings:
            cells.insert(0, [each.heading for each in fields])
        if form.as_rows:
            cells = [list(column) for column in zip(*cells, strict=True)]
        return [form.separator.join(row) for row in cells]

    def _compact(self, cells: list[list[str]]) -> tuple[list[Field], list[list[str]]]:
        """Drop the columns that are blank, where that is asked for."""
        form = self._form
        kept = [
            index
            for index, each in enumerate(self.fields)
            if not (form.compact or each.name in form.compact_fields)
            or any(row[index] for row in cells)
        ]
        return [self.fields[index] for index in kept], [[row[i] for i in kept] for row in cells]

    def _columns(self, fields: list[Field], cells: list[list[str]]) -> list[str]:
        if self._form.buffered:
            return self._aligned(fields, cells, headings=self._form.headings)
        lines: list[str] = []
        for row in cells:
            headings = self._form.headings and not lines
            lines += self._aligned(fields, [row], headings=headings)
        return lines

    def _aligned(self, fields: list[Field], cells: list[list[str]], *, headings: bool) -> list[str]:
        widths = [
            max(each.width, *(_width(row[index]) for row in cells))
            for index, each in enumerate(fields)
        ]
        lines = []
        if headings:
            cut = [
                each.heading[:width].ljust(width)
                for each, width in zip(fields, widths, strict=True)
            ]
            lines.append(self._form.separator.join(cut))
        for row in cells:
            padded = []
            for each, cell, width in zip(fields, row, widths, strict=True):
                blanks = " " * (width - _width(cell))
                padded.append(blanks + cell if each.kind in RIGHT else cell + blanks)
            lines.append(self._form.separator.join(padded))
        return lines


def json_lines(key: str, names: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    """Return a report as JSON, a row a line."""
    lines = ["{", f'{INDENT}"report": [', f"{INDENT * 2}{{", f'{INDENT * 3}"{key}": [']
    rows = []
    for row in cells:
        pairs = [f'"{name}":{quoted(cell)}' for name, cell in zip(names, row, strict=True)]
        rows.append(f"{INDENT * 4}{{{', '.join(pairs)}}}")
    lines += [f"{row}," for row in rows[:-1]] + rows[-1:]
    return [*lines, f"{INDENT * 3}]", f"{INDENT * 2}}}", f"{INDENT}]", "}"]


def empty_json() -> list[str]:
    """Return JSON without any report."""
    return ["{", f'{INDENT}"report": [', f"{INDENT}]", "}"]


def quoted(text: str) -> str:
    """Return a JSON string; characters that are not ASCII stand as they are."""
    return json.dumps(text, ensure_ascii=False)


def _width(cell: str) -> int:
    """Return how wide printf takes a cell to be."""
    return len(cell.encode("utf-8", "surrogateescape"))
