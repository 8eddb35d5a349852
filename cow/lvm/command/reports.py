"""lvs, vgs and pvs: which rows there are, and how the options make a report of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from cow.lvm.command.command import Command
from cow.lvm.command.options import FAILED
from cow.lvm.errors import LVMError
from cow.lvm.group import VolumeGroup
from cow.lvm.label_scan import PVDevice
from cow.lvm.metadata import LogicalVolume, VolumeGroupMetadata
from cow.lvm.report.fields import (
    GROUPS,
    SELECTED,
    Field,
    FieldError,
    Style,
    find_fields,
    list_fields,
)
from cow.lvm.report.rows import Row, lv_rows, pv_rows
from cow.lvm.report.selection import Selection
from cow.lvm.report.table import Format, Report, empty_json

REPORT_OPTIONS: Final = (
    "aligned a|all binary configreport=configreport foreign ignorelockingfailure logonly"
    " nameprefixes noheadings nosuffix o|options=text+ readonly reportformat=reportformat rows"
    " S|select=text separator=text shared O|sort=text unbuffered units=text unquoted"
)


@dataclass(frozen=True)
class Kind:
    """A type of report: its name in JSON and in errors, its settings, the prefix of its fields."""

    key: str
    settings: str
    prefix: str
    everything: tuple[str, ...]
    """The groups of fields that `-o all` means."""


LVS = Kind("lv", "lvs", "lv_", ("lv", "vg"))
SEGMENTS = Kind("seg", "segs", "lv_", ("lv", "vg", "seg"))
VGS = Kind("vg", "vgs", "vg_", ("vg",))
PVS = Kind("pv", "pvs", "pv_", ("pv",))
PIECES = Kind("pvseg", "pvsegs", "pv_", ("pv", "pvseg"))


def lvs(command: Command) -> None:
    """Report on LVs, or on their segments."""
    kind = SEGMENTS if command.options.has("segments") else LVS
    _Reporter(command, kind).run()


def vgs(command: Command) -> None:
    """Report on VGs."""
    _Reporter(command, VGS).run()


def pvs(command: Command) -> None:
    """Report on PVs, or on the pieces of them that are used or free."""
    _Reporter(command, PIECES if command.options.has("segments") else PVS).run()


class _Reporter:
    """Makes one report."""

    def __init__(self, command: Command, kind: Kind) -> None:
        self._command = command
        self._kind = kind
        self._options = command.options
        self._settings = command.settings
        self._groups = tuple(GROUPS) if kind in (VGS, PVS, PIECES) else ("lv", "vg", "seg")
        self._mark_hidden = self._settings.flag("report/mark_hidden_devices")

    def run(self) -> None:
        command = self._command
        if command.options.has("readonly"):
            command.options["driverloaded"] = False
        compact: set[str] = set()
        try:
            fields = self._fields(compact)
            if fields is None:
                command.warn("\n".join(list_fields(self._groups)))
                return
            sort = self._sort()
            selection = self._selection()
        except LVMError as error:
            if self._as_json():
                command.print("\n".join(empty_json()))
            if not isinstance(error, FieldError):
                raise
            command.fail("\n".join([*error.fields, error.strerror or ""]))
            return
        looked_at = [*fields, *(each for each, _ in sort), *(selection.fields if selection else ())]
        groups = {each.group for each in looked_at}
        self._check(groups)
        form = self._format(compact)
        report = Report(fields, sort, form, selection.matches if selection else None)
        for rows in self._rows(groups):
            report.add(rows)
        for line in report.lines():
            command.print(line)

    # What the options say.

    def _fields(self, compact: set[str]) -> list[Field] | None:
        """Return the fields of -o; None for its help. `compact` gets those of -o#."""
        verbose = "_verbose" if self._options.get("verbose") else ""
        default = self._settings.text(f"report/{self._kind.settings}_cols{verbose}")
        found = self._find_all(default)
        for text in self._options.get("options", []):
            if not text or text in ("+", "-"):
                raise LVMError(f"Invalid options string: {text}")
            sign = text[0] if text[0] in "+-#" else ""
            names = text[len(sign) :]
            if names in ("help", "?"):
                return None
            wanted = self._find_all(names)
            if sign == "+":
                found += wanted
            elif sign == "-":
                found = [each for each in found if each not in wanted]
            elif sign == "#":
                compact |= {each.name for each in wanted}
            else:
                found = wanted
        return found

    def _find_all(self, names: str) -> list[Field]:
        return [each for name in names.split(",") if name for each in self._find(name)]

    def _find(self, name: str) -> list[Field]:
        if name == SELECTED.name:
            return [SELECTED]
        groups = self._kind.everything if name.lower() == "all" else self._groups
        found = find_fields(name, groups, self._kind.prefix)
        if not found:
            raise FieldError(f"Unrecognised field: {name}", list_fields(self._groups))
        return found

    def _sort(self) -> list[tuple[Field, bool]]:
        text = self._options.get("sort")
        if text is None:
            text = self._settings.text(f"report/{self._kind.settings}_sort")
        found: list[tuple[Field, bool]] = []
        for name in text.split(","):
            if not name:
                continue
            try:
                (each,) = self._find(name.lstrip("+-"))
            except FieldError as error:
                raise FieldError(f"dm_report: {error.strerror}", error.fields) from error
            if any(each is other for other, _ in found):
                self._command.warn(f"dm_report: Ignoring duplicate sort field: {each.name}.")
                continue
            found.append((each, name.startswith("-")))
        return found

    def _selection(self) -> Selection | None:
        text = self._options.get("select")
        if text is None:
            return None
        groups = self._groups
        return Selection(
            text,
            lambda name: find_fields(name, groups, self._kind.prefix),
            lambda: list_fields(groups),
        )

    def _check(self, groups: set[str]) -> None:
        """Refuse fields of LVs and PVs side by side, but where the rows are pieces of PVs."""
        lv, pv = groups & {"lv", "seg"}, groups & {"pv", "pvseg"}
        if lv and pv and self._kind not in (PVS, PIECES):
            raise LVMError(
                "Can't report LV and PV fields at the same time in report type"
                f' "{self._kind.key}".'
            )

    def _as_json(self) -> bool:
        default = self._settings.text("report/output_format")
        return bool(self._options.get("reportformat", default) == "json")

    def _format(self, compact: set[str]) -> Format:
        options, settings = self._options, self._settings
        separator = options.get("separator")
        aligned = settings.flag("report/aligned") and separator is None
        blank = self._find_all(settings.text("report/compact_output_cols"))
        return Format(
            style=Style(
                self._command.units,
                options.has("binary") or settings.flag("report/binary_values_as_numeric"),
                settings.text("report/list_item_separator"),
                settings.text("report/time_format"),
            ),
            headings=settings.flag("report/headings") and not options.has("noheadings"),
            aligned=aligned or options.has("aligned"),
            buffered=settings.flag("report/buffered") and not options.has("unbuffered"),
            separator=settings.text("report/separator") if separator is None else separator,
            prefixes=options.has("nameprefixes") or settings.flag("report/prefixes"),
            quoted=settings.flag("report/quoted") and not options.has("unquoted"),
            as_rows=options.has("rows") or settings.flag("report/columns_as_rows"),
            json=self._kind.key if self._as_json() else "",
            compact=settings.flag("report/compact_output"),
            compact_fields=frozenset(compact.union(each.name for each in blank)),
        )

    # Rows.

    def _rows(self, groups: set[str]) -> Iterator[Iterator[Row]]:
        if self._kind in (LVS, SEGMENTS):
            yield from self._lv_rows(groups)
        elif self._kind is VGS:
            yield from self._vg_rows(groups)
        else:
            pieces = self._kind is PIECES or bool(groups & {"lv", "seg", "pvseg"})
            for row in pv_list(self._command, self._base()):
                yield pv_rows(row, pieces=pieces)

    def _base(self) -> Row:
        return Row(self._command.live, show_hidden=self._mark_hidden)

    def _lv_rows(self, groups: set[str]) -> Iterator[Iterator[Row]]:
        segments = self._kind is SEGMENTS or "seg" in groups
        hidden = self._options.has("all")
        for vg, found in _each_lv(self._command, hidden):
            with vg.metadata.looked_at():
                yield lv_rows(self._base(), found, segments=segments)

    def _vg_rows(self, groups: set[str]) -> Iterator[Iterator[Row]]:
        for vg in _each_vg(self._command):
            with vg.metadata.looked_at():
                yield from self._rows_of_vg(vg, groups)

    def _rows_of_vg(self, vg: VolumeGroup, groups: set[str]) -> Iterator[Iterator[Row]]:
        base = Row(self._command.live, vg=vg.metadata, show_hidden=self._mark_hidden)
        if groups & {"pv", "pvseg"}:
            for row in vg_pvs(self._command, base, vg):
                yield pv_rows(row, pieces="pvseg" in groups)
        elif groups & {"lv", "seg"}:
            yield lv_rows(base, vg.metadata.visible_lvs(), segments="seg" in groups)
        else:
            yield iter([base])


def _each_lv(command: Command, hidden: bool) -> Iterator[tuple[VolumeGroup, list[LogicalVolume]]]:
    """As each_lv, without -S: the report looks at its rows itself."""
    select = command.options.pop("select", None)
    try:
        yield from command.each_lv(command.args, hidden=hidden)
    finally:
        if select is not None:
            command.options["select"] = select


def _each_vg(command: Command) -> Iterator[VolumeGroup]:
    select = command.options.pop("select", None)
    try:
        yield from command.each_vg(command.args)
    finally:
        if select is not None:
            command.options["select"] = select


# ---- PVs, for pvdisplay and pvscan too


def pv_list(command: Command, base: Row) -> Iterator[Row]:
    """Yield a row for each PV that the arguments name (paths, @tags), or for all of them."""
    names = command.existing(command.args)
    if command.args and not names:
        return
    scan = command.scan(paths=[name for name in names if not name.startswith("@")])
    everything = list(all_pvs(command, base))
    if not command.args:
        yield from everything
        if command.options.has("all"):
            yield from _duplicates(command, base)
            yield from (Row(base.live, path=path) for path in scan.without_label)
        return
    tags = {name[1:] for name in names if name.startswith("@")}
    devices = []
    for name in (name for name in names if not name.startswith("@")):
        device = command.pv(name)
        if device is None:
            command.fail(f'Failed to find physical volume "{name}".', FAILED)
        else:
            devices.append(device)
    for row in everything:
        if row.device in devices or (row.pv is not None and not tags.isdisjoint(row.pv.tags)):
            yield row


def _duplicates(command: Command, base: Row) -> Iterator[Row]:
    """Yield a row for each device with the PV of another; of its VG it has the name only."""
    scan = command.scan()
    for each in scan.duplicates:
        found = (vg for vg in scan.vgs if vg.metadata.pv_with_id(each.label.pv_id))
        names = [VolumeGroupMetadata(vg.name, vg.id, status=["READ"]) for vg in found]
        yield Row(base.live, names[0] if names else None, device=each, duplicate=True)


def all_pvs(command: Command, base: Row) -> Iterator[Row]:
    """Yield a row for each PV: those of VGs, missing ones too, then orphans.

    VGs come as in Command.each_vg, and their PVs in the order of the metadata.
    """
    scan = command.scan()
    seen: set[PVDevice] = set()
    for vg in reversed(scan.vgs):
        for row in vg_pvs(command, base, vg):
            if row.device is not None:
                seen.add(row.device)
            yield row
    for each in scan.pvs:
        if each not in seen:
            yield Row(base.live, device=each, show_hidden=base.show_hidden)


def vg_pvs(command: Command, base: Row, vg: VolumeGroup) -> Iterator[Row]:
    """Yield a row for each PV of a VG, in the order of its metadata."""
    pvs = command.scan().pvs  # of duplicates the VG has one
    for pv in vg.metadata.pvs:
        device = next((each for each in pvs if each.device is pv.device), None)
        yield Row(base.live, vg.metadata, pv=pv, device=device, show_hidden=base.show_hidden)
