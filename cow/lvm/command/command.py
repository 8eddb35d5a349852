"""A command that runs: its options, what it prints, the VGs, LVs and PVs its arguments mean."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from cow.errors import CowOSError
from cow.lvm import group
from cow.lvm.backups import Backups
from cow.lvm.command.options import FAILED, OK, Options
from cow.lvm.command.rehearsal import (
    RehearsalActivation,
    RehearsalMapper,
    rehearsal_mapper,
)
from cow.lvm.command.shell import Shell
from cow.lvm.errors import LVMError, RequestError, VGNotFound
from cow.lvm.group import Scan, VolumeGroup
from cow.lvm.label_scan import PVDevice
from cow.lvm.metadata import LogicalVolume
from cow.lvm.names import is_name, split_dm_name
from cow.lvm.report.fields import find_fields, list_fields
from cow.lvm.report.live import Live
from cow.lvm.report.rows import Row, lv_rows
from cow.lvm.report.selection import Selection
from cow.lvm.settings import Settings
from cow.lvm.size import Units, display_size, parse_units
from cow.mapper import DIRECTORY

T = TypeVar("T")


class _Question(Exception):
    """An operation has to know an answer."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


class Command:
    """One command line; `status` is the worst exit code so far."""

    def __init__(
        self,
        verb: str,
        options: Options,
        args: Sequence[str],
        shell: Shell,
        settings: Settings,
        line: str,
    ) -> None:
        self.verb = verb
        self.options = options
        self.args = list(args)
        self.shell = shell
        self.mapper = shell.mapper
        """What images are opened with; None: a mapper is made for each operation."""
        if options.has("test"):
            self.mapper = rehearsal_mapper(shell.mapper)
        self.settings = settings
        self.line = line
        """As the metadata describes who wrote it."""
        self.status = OK
        self.quiet = options.get("quiet", 0)
        self._scan: Scan | None = None
        self._backups: Backups | None = None
        self._shown: dict[str, str] = {}
        self._live: Live | None = None
        self._units: Units | None = None
        self._answers: dict[str, bool] = {}
        self.last_report = ""
        """The last line that an operation told."""
        self._said: list[str] = []
        self._repeated = 0
        """How many of the lines that an operation said it has said once more."""

    # Output.

    def say(self, text: str) -> None:
        """Print lines to stdout."""
        if self.quiet < 2:
            self.print(text)

    def print(self, text: str) -> None:
        """Print lines to stdout, -qq or not."""
        self.shell.out(self._indented(text))

    def warn(self, text: str) -> None:
        """Print lines to stderr."""
        self.shell.err(self._indented(text))

    def report(self, text: str) -> None:
        """Print what an operation tells: warnings to stderr, the rest to stdout."""
        if self._said[self._repeated : self._repeated + 1] == [text]:
            self._repeated += 1
            return
        self.last_report = text
        self._said[self._repeated :] = [text]
        self._repeated += 1
        if re.match(r"WARNING|THIS (MAY|WILL) DESTROY|TEST MODE", text):
            self.warn(text)
        else:
            self.say(text)

    def fail(self, text: str, code: int = FAILED) -> None:
        """Print an error, and go on."""
        self.warn(text)
        self.status = max(self.status, code)

    def fail_with(self, error: CowOSError) -> None:
        """Print an error of an operation, and go on."""
        self.fail(error.strerror or str(error), getattr(error, "exit_code", FAILED))

    def _indented(self, text: str) -> str:
        for path, named in self._shown.items():
            text = text.replace(path, named)
        return "".join(f"  {line}\n" for line in text.split("\n"))

    # Questions.

    def confirm(self, question: str) -> bool:
        """Ask; yes if --yes was given, no where nobody answers. Other commands run meanwhile."""
        question = question.removesuffix(" [y/n]: ")
        if self.options.has("yes"):
            return True
        while True:
            with self.shell.waiting():
                answer = self.shell.ask(f"{question} [y/n]: ")
            if answer is None:
                self.shell.err("[n]\n")
                return False
            word = answer.strip().lower()
            if word and "yes".startswith(word):
                return True
            if word and "no".startswith(word):
                return False
            self.warn(f"WARNING: Invalid input '{answer.strip()}'.")

    @property
    def forced(self) -> bool:
        """Whether --force or --yes leaves nothing to ask."""
        return self.options.has("yes", "force")

    def asking(self, operation: Callable[[], T]) -> T:
        """Run an operation that may ask, through `confirm` of a VG, and report.

        It asks before it changes anything, with locks held. So it is stopped there, the question
        is asked without them, and it runs once more; what it said already is not said again.
        """
        self._said.clear()
        while True:
            self._repeated = 0
            try:
                return operation()
            except _Question as question:
                self._answers[question.text] = self.confirm(question.text)

    def _confirm_later(self, question: str) -> bool:
        if self.forced:
            return True
        if question not in self._answers:
            raise _Question(question)
        return self._answers[question]

    # Settings.

    @property
    def units(self) -> Units:
        """What sizes are shown in."""
        if self._units is None:
            suffix = not self.options.has("nosuffix") and self.settings.flag("global/suffix")
            given = self.options.get("units")
            self._units = self._parse_units(given, suffix)
        return self._units

    def _parse_units(self, given: str | None, suffix: bool) -> Units:
        if given is not None:
            return parse_units(given, suffix=suffix)
        text = self.settings.text("global/units")
        try:
            return parse_units(text, suffix=suffix)
        except RequestError as error:
            raise LVMError(
                f"Unrecognised configuration setting for global/units: {text}\n"
                "Updated config file invalid. Aborting."
            ) from error

    def size(self, sectors: int) -> str:
        """Write a size as messages have it."""
        return display_size(sectors, self.units)

    @property
    def activation(self) -> bool:
        """Whether LVs can be active: there is a mapper, and nobody said not to touch it."""
        return (
            self.shell.mapper is not None
            and self.options.get("driverloaded", True)
            and self.settings.flag("global/activation")
        )

    @property
    def partial(self) -> bool:
        """Whether LVs that miss a PV may be activated."""
        mode = self.options.get("activationmode", "degraded")
        if mode not in ("complete", "degraded", "partial"):
            raise RequestError("Invalid activation mode given.")
        return self.options.has("partial") or mode == "partial"

    # Devices and VGs.

    def scan(self, *, readonly: bool = True, paths: Iterable[str] = ()) -> Scan:
        """Open the devices of the command, and those in `paths`, and find what is on them."""
        if self._scan is None:
            if self.partial and self.options.has("activate"):
                self.warn("PARTIAL MODE. Incomplete logical volumes will be processed.")
            named = [*self._given_devices(there=True), *paths]
            self._shown = {self.shell.path(name): name for name in named}
            self._shown = {path: name for path, name in self._shown.items() if path != name}
            known = [] if self.options.has("devices") else self.shell.devices
            known = [path for path in known if self._is_there(path)]
            everything = dict.fromkeys([*map(self.shell.path, named), *known])
            if not everything and not self._given_devices():
                raise RequestError(
                    "No devices are given: use --devices IMAGE[,IMAGE…] or COW_LVM_DEVICES."
                )
            self._scan = self._open(everything, readonly)
            self.remember(list(everything))
        return self._scan

    def _given_devices(self, *, there: bool = False) -> list[str]:
        """Return what --devices or COW_LVM_DEVICES name; `there`: not what is not there."""
        given: list[str] = self.options.get("devices", [])
        if not self.options.has("devices"):
            names = self.shell.environ.get("COW_LVM_DEVICES", "").split(",")
            given = [name for name in names if name]
        missing = [name for name in given if there and not self._is_there(name)]
        for name in missing:
            self.warn(f"Device not found for {name}.")
        return [name for name in given if name not in missing]

    def _is_there(self, name: str) -> bool:
        path = self.shell.path(name)
        return os.path.exists(path) or self.shell.is_device(path)

    def image(self, name: str) -> str:
        """Return the path of a device that is to become a PV, or to stop being one."""
        path = self.shell.path(name)
        if path != name:
            self._shown[path] = name
        if not self._is_there(name):
            raise LVMError(f"No device found for {name}.", errno.ENOENT)
        return path

    def other_devices(self, names: Sequence[str]) -> list[str]:
        """Return the devices of the command but for those that are named."""
        known = [] if self.options.has("devices") else self.shell.devices
        given = [self.shell.path(name) for name in self._given_devices()]
        named = [self.shell.path(name) for name in names]
        found = [path for path in dict.fromkeys([*given, *known]) if path not in named]
        return [path for path in found if self._is_there(path)]

    def remember(self, names: Sequence[str]) -> None:
        """Keep devices in mind for commands that are given none."""
        for name in names:
            if self.shell.path(name) not in self.shell.devices:
                self.shell.devices.append(self.shell.path(name))

    def _open(self, paths: Iterable[str], readonly: bool) -> Scan:
        try:
            scan = group.scan(paths, mapper=self.mapper, readonly=readonly)
        except CowOSError as error:
            if error.errno == errno.ENOENT:
                raise LVMError(error.strerror or "") from error
            raise
        for warning in scan.warnings:
            self.warn(warning)
        scan.without_label = [self._shown.get(path, path) for path in scan.without_label]
        for each in (*scan.pvs, *scan.duplicates):
            each.path = self._shown.get(each.path, each.path)
        for vg in scan.vgs:
            vg.report = self.report
            vg.confirm = self._confirm_later
            if self.options.has("test"):
                vg.activation = vg.work = RehearsalActivation(vg.mapper, report=self.report)
            vg.command = self.line
            vg.partial = self.partial
            vg.backups = None if readonly else self.automatic_backups
            for pv in vg.metadata.pvs:
                pv.path = self._shown.get(pv.path, pv.path)
        return scan

    @property
    def backups(self) -> Backups:
        """Where the metadata from before and after a command is kept, as lvm.conf says.

        Below LVM_SYSTEM_DIR, or below XDG_STATE_HOME/cow/lvm (~/.local/state/cow/lvm).
        """
        if self._backups is None:
            self._backups = Backups(
                self._backup_folder("backup"),
                self._backup_folder("archive"),
                retain_min=self.settings.number("backup/retain_min"),
                retain_days=self.settings.number("backup/retain_days"),
            )
        return self._backups

    def _backup_folder(self, kind: str) -> Path | None:
        environ = self.shell.environ
        folder = environ.get("LVM_SYSTEM_DIR")
        if not folder:
            home = environ.get("HOME")
            state = environ.get("XDG_STATE_HOME") or (home and os.path.join(home, ".local/state"))
            folder = os.path.join(state, "cow", "lvm") if state else None
        chosen = self.settings.text(f"backup/{kind}_dir")
        if not chosen and folder is None:
            return None
        return Path(self.shell.path(chosen or os.path.join(folder or "", kind)))

    @property
    def automatic_backups(self) -> Backups | None:
        """The same for what is kept without being asked for; None: nothing is."""
        kept = self.backups
        if self.options.has("test") or self.options.no("autobackup"):
            return None
        if not self.shell.environ.get("LVM_SYSTEM_DIR") and kept.archive_dir is not None:
            try:  # who has no home of his own can work all the same
                kept.archive_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                self.warn(f"WARNING: {kept.archive_dir}: metadata is not kept: {error.strerror}")
                return None
        return Backups(
            kept.backup_dir if self.settings.flag("backup/backup") else None,
            kept.archive_dir if self.settings.flag("backup/archive") else None,
            retain_min=kept.retain_min,
            retain_days=kept.retain_days,
        )

    def close(self) -> None:
        """Give the devices back."""
        if self._scan is not None:
            for vg in self._scan.vgs:
                self._monitor(vg)
            self._scan.close()
            self._scan = None
        if isinstance(self.mapper, RehearsalMapper):
            self.mapper.close()

    def _monitor(self, vg: VolumeGroup) -> None:
        """Have the stores of snapshots grow by themselves, where lvm.conf says so."""
        threshold = self.settings.number("activation/snapshot_autoextend_threshold")
        percent = self.settings.number("activation/snapshot_autoextend_percent")
        if not self.activation or self.options.has("test", "ignoremonitoring"):
            return
        if self.options.get("monitor") is False:
            vg.monitor(threshold=100)
        elif threshold < 100 and self.settings.flag("activation/monitoring") and vg.snapshots_live:
            vg.monitor(threshold=threshold, percent=percent)

    @property
    def live(self) -> Live:
        """What the devices tell, since changed() was last called."""
        if self._live is None:
            self._live = Live(self.shell.mapper if self.activation else None)
        return self._live

    def changed(self) -> None:
        """Note that devices have changed."""
        self._live = None

    def vg(self, name: str) -> VolumeGroup:
        """Return a VG, or say as LVM does that there is none."""
        try:
            return self.scan().vg(name)
        except VGNotFound as error:
            raise VGNotFound(f"{error.strerror}\nCannot process volume group {name}") from error

    def vg_of(self, text: str) -> str:
        """Return the name of a VG as an argument has it, with or without /dev/."""
        name = self.vg_name_of(text)
        if "/" in name or not is_name(name):
            raise LVMError(
                f'Volume group name "{name}" has invalid characters.\n'
                f"Cannot process volume group {name}"
            )
        return name

    def lv_of(self, text: str) -> tuple[str, str]:
        """Return VG and LV of an argument: VG/LV, /dev/VG/LV, /dev/mapper/VG-LV; "" for no LV."""
        if text.startswith(DIRECTORY):
            vg_name, lv_name, _ = split_dm_name(text.removeprefix(DIRECTORY))
            return vg_name, lv_name
        parts = [part for part in text.removeprefix("/dev/").split("/") if part]
        if len(parts) > 2 or not parts:
            raise LVMError(f'"{text}": Invalid path for Logical Volume.')
        return parts[0], parts[1] if len(parts) > 1 else ""

    @staticmethod
    def vg_name_of(text: str) -> str:
        """Return the name of a VG that an argument may be."""
        return text.removeprefix("/dev/").rstrip("/")

    def each_vg(self, names: Sequence[str]) -> Iterator[VolumeGroup]:
        """Yield the VGs of names and @tags, all if there are none; what is not there fails.

        LVM takes them in the reverse of the order in which it finds them.
        """
        found: dict[str, VolumeGroup] = {}
        scan = self.scan()
        if not names:
            found = {vg.id: vg for vg in reversed(scan.vgs)}
            for broken in scan.unreadable:
                self.fail(f"Cannot process volume group {broken.name}")
        for name in names:
            if name.startswith("@"):
                found |= {vg.id: vg for vg in scan.vgs if name[1:] in vg.metadata.tags}
                continue
            try:
                vg = self.vg(self.vg_of(name))
                found[vg.id] = vg
            except LVMError as error:
                self.fail_with(error)
        matches = self.selection("vg")
        for vg in found.values():
            if matches is None or any(map(matches, self._vg_rows(vg))):
                yield vg

    def passes_over(self, vg: VolumeGroup, names: Sequence[str]) -> bool:
        """Tell whether a VG is exported: its LVs are left out, which is an error if it is named."""
        exported = "EXPORTED" in vg.metadata.status
        if exported and names:
            self.fail(f"Volume group {vg.name} is exported")
        return exported

    def each_lv(
        self, names: Sequence[str], *, hidden: bool = False
    ) -> Iterator[tuple[VolumeGroup, list[LogicalVolume]]]:
        """Yield each VG that VGs, LVs and @tags name, with those of its LVs that they mean.

        An LV of a VG or a tag counts if the user sees it; `hidden` ones are there too. An LV that
        is named counts in any case, but for snapshotN, which is no LV to anybody.
        """
        scan = self.scan()
        wanted: dict[str, tuple[VolumeGroup, list[str]]] = {}
        tags = [name[1:] for name in names if name.startswith("@")]
        if not names or tags:
            wanted = {vg.id: (vg, []) for vg in reversed(scan.vgs)}
        if not names:
            for broken in scan.unreadable:
                self.fail(f"Cannot process volume group {broken.name}")
        whole = set() if names else set(wanted)
        for name in names:
            if name.startswith("@"):
                continue
            try:
                vg_name, lv_name = self.lv_of(name)
                vg = self.vg(vg_name)
            except LVMError as error:
                self.fail_with(error)
                continue
            wanted.setdefault(vg.id, (vg, []))
            if lv_name:
                wanted[vg.id][1].append(lv_name)
            else:
                whole.add(vg.id)
        matches = self.selection("lv")
        for vg, lv_names in wanted.values():
            if self.passes_over(vg, names):
                continue
            everything = vg.id in whole or any(tag in vg.metadata.tags for tag in tags)
            lvs = []
            missing = dict.fromkeys(lv_names)
            with vg.metadata.looked_at():
                for lv in vg.metadata.lvs:
                    if lv.is_snapshot_record:
                        continue
                    if lv.name in missing and (hidden or not lv.is_virtual_origin):
                        del missing[lv.name]
                        lvs.append(lv)
                    elif lv.name in missing:
                        self.say(f"Ignoring virtual origin logical volume {lv}.")
                    elif (lv.visible or hidden) and (everything or any(t in lv.tags for t in tags)):
                        lvs.append(lv)
                if matches is not None:
                    row = Row(self.live)
                    lvs = [lv for lv in lvs if any(map(matches, lv_rows(row, [lv], segments=True)))]
            yield vg, lvs
            for name in missing:
                self.fail(f'Failed to find logical volume "{vg.name}/{name}"')

    def selection(
        self, kind: str, groups: Sequence[str] = ("lv", "vg", "seg")
    ) -> Callable[[Row], bool] | None:
        """Return what -S picks; None without it."""
        text = self.options.get("select")
        if text is None:
            return None
        found = Selection(
            text,
            lambda name: find_fields(name, groups, f"{kind}_"),
            lambda: list_fields(groups),
        )
        return found.matches

    def _vg_rows(self, vg: VolumeGroup) -> Iterator[Row]:
        row = Row(self.live, vg=vg.metadata)
        lvs = [lv for lv in vg.metadata.lvs if lv.visible]
        yield from lv_rows(row, lvs, segments=True) if lvs else [row]

    def existing(self, names: Sequence[str]) -> list[str]:
        """Return the names of devices that are there, and say of the others that they are not."""
        found = []
        for name in names:
            if name.startswith("@") or self._is_there(name):
                found.append(name)
            elif len(names) == 1:
                self.fail(f"Cannot use {name}: device not found")
            else:
                self.fail(f'Failed to find device "{name}".')
        return found

    def pv(self, name: str) -> PVDevice | None:
        """Return the PV on a device that was named; None if none is there."""
        path = self.shell.path(name)
        scan = self.scan()
        shown = self._shown.get(path, path)
        return next((each for each in scan.pvs if each.path in (path, shown, name)), None)
