"""Let the real lvm2 on the real kernel and `cow lvm` do the same, and compare all that is seen."""

from __future__ import annotations

import re
import shlex
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from support import fill, poll

from cow.lvm.command import Shell, run
from cow.mapper import Mapper

from .lvm_programs import DISKS, VG, Step
from .record_lvm import CONFIG, HOST, SETTINGS, guest_step, placed, shell
from .uml import Kernel

ROWS = ("--noheadings", "--separator", ";", "--units", "s")
REPORTS = (
    (
        "lvs", "-a", *ROWS, "-o",
        "lv_name,lv_attr,lv_size,origin,origin_size,data_percent,chunk_size,segtype,stripes,"
        "stripe_size,seg_start_pe,seg_size,devices,lv_tags,lv_permissions,lv_active",
    ),
    (
        "vgs", *ROWS, "-o",
        "vg_name,vg_attr,vg_size,vg_free,vg_extent_size,vg_extent_count,vg_free_count,pv_count,"
        "lv_count,snap_count,vg_tags,vg_mda_count,vg_mda_used_count",
    ),
    (
        "pvs", *ROWS, "-o",
        "pv_name,vg_name,pv_attr,pv_size,pv_free,pv_used,pv_pe_count,pv_pe_alloc_count,pe_start,"
        "pv_mda_count,pv_mda_used_count,pv_mda_size,dev_size",
    ),
    ("pvs", "--segments", *ROWS, "-o", "pv_name,pvseg_start,pvseg_size,lv_name,seg_start_pe"),
    ("vgs", *ROWS, "-o", "vg_seqno"),
)  # fmt: skip
CHECKS = (("vgck",), ("lvs", "-a", *ROWS))
MERGES = """\
tries=0
while dmsetup table | grep -q snapshot-merge && [ $tries -lt 500 ]; do
    tries=$((tries + 1))
    sleep 0.01
done
[ $tries = 0 ] || {settings} lvm lvs >/dev/null
"""
"""Waits for merges in the background; what the last of them changes is done when lvs answers."""
OPEN = "exec 9</dev/mapper/{0}; sleep 10000 <&9 >/dev/null 2>&1 9<&- & echo $! >/run/open-{0}"
CLOSE = """\
kill $(cat /run/open-{0}); rm /run/open-{0}; tries=0
while [ "$(dmsetup info -c --noheadings -o open {0})" -gt 0 ] && [ $tries -lt 500 ]; do
    tries=$((tries + 1))
done
"""
POLLING = "activation { polling_interval = 1"
NO_DEVICES = "No devices found"
TABLES = (
    "dmsetup table",
    "dmsetup info -c --noheadings --separator ' ' -o name,major,minor",
)

Answer = tuple[int, str, str]
"""Exit status, stdout, stderr."""


class Side(Protocol):
    """A machine with disks and lvm. `step` answers None to a look, else what came of it."""

    def steps(self, steps: Sequence[Step]) -> list[Any]: ...
    def tables(self) -> list[str]: ...
    def contents(self) -> dict[str, str]: ...


def device_name(lv: str) -> str:
    return f"{VG}-{lv.replace('-', '--')}"


class Cow:
    """`cow lvm` on image files with one mapper."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mapper = Mapper(durability="process")
        self.opened: dict[str, Any] = {}

    def close(self) -> None:
        for each in self.opened.values():
            each.close()
        self.mapper.close()

    def lvm(self, args: Sequence[str]) -> Answer:
        out: list[str] = []
        err: list[str] = []
        shell = Shell(
            out.append,
            err.append,
            self.mapper,
            directory=str(self.folder),
            environ={
                "LVM_SYSTEM_DIR": str(self.folder / "etc"),
                "COW_LVM_DEVICES": ",".join(DISKS),
            },
        )
        status = run(list(args), shell)
        return status, self.shown(out), self.shown(err)

    def shown(self, lines: list[str]) -> str:
        return "".join(lines).replace(f"{self.folder}/", "")

    def steps(self, steps: Sequence[Step]) -> list[Any]:
        return [self.step(step) for step in steps]

    def step(self, step: Step) -> Any:
        if step[0] == "lvm":
            return self.lvm(step[1:])
        if step[0] == "look":
            found = [self.lvm(report) for report in REPORTS]
            reports = max(each[0] for each in found), "".join(each[1] for each in found), ""
            return [reports, (0, "".join(f"{line}\n" for line in self.tables()), "")]
        if step[0] == "check":
            return [self.lvm(words) for words in checks(step)]
        if step[0] == "settle":
            poll(lambda: "snapshot-merge" not in self.mapper.table())
            self.lvm(["lvs"])
            return None
        if step[0] in ("open", "close"):
            return self.hold(device_name(step[1]), step[0] == "open")
        _, lv, offset, length, seed = step
        try:
            return self.mapper.device(device_name(lv)).pwrite(fill(length, seed), offset)
        except OSError:
            return "error"

    def hold(self, name: str, is_open: bool) -> None:
        """Have a device open, if there is one, until it is to be closed."""
        if not is_open:
            if name in self.opened:
                self.opened.pop(name).close()
        elif name in self.mapper.names():
            self.opened[name] = self.mapper.device(name).open()

    def tables(self) -> list[str]:
        """Return the tables, with @DISK and %DEVICE for what they stand on."""
        lines = self.mapper.table().splitlines()
        names = self.mapper.names()

        def word(text: str) -> str:
            if text in names:
                return f"%{text}"
            return f"@{Path(text).name}" if text.startswith(str(self.folder)) else text

        return sorted(" ".join(map(word, line.rstrip().split(" "))) for line in lines)

    def contents(self) -> dict[str, str]:
        found = {}
        for name in self.mapper.names():
            device = self.mapper.device(name)
            try:
                found[name] = f"{zlib.crc32(device.pread(device.size, 0)):08x}"
            except OSError:
                found[name] = "error"
        return found


class Real:
    """The real lvm2 in the guest, with the same disks."""

    def __init__(self, kernel: Kernel, folder: Path) -> None:
        self.kernel = kernel
        self.folder = folder
        self.paths = {name: f"/dev/ubd{chr(ord('b') + slot)}" for slot, name in enumerate(DISKS)}
        images = {name.removesuffix(".img"): folder / name for name in DISKS}
        (kernel.folder / "lvm.conf").write_text(CONFIG.replace("activation {", POLLING))
        start = (
            f"hostname {HOST}; rm -rf /run/files /run/lvm /dev/{VG} /dev/mapper/{VG}-*;"
            " mkdir -p /run/files /run/lock /run/lvm"
        )
        kernel.run(images, [shell(start)], clean=False)

    def close(self) -> None:
        self.kernel.run(None, [], clean=True)

    def lvm(self, args: Sequence[str]) -> Answer:
        answer: Answer = self.steps([["lvm", *args]])[0]
        return answer

    def steps(self, steps: Sequence[Step]) -> list[Any]:
        asked: list[list[Any]] = []
        for step in steps:
            if step[0] == "w":
                asked.append(["w", device_name(step[1]), *step[2:]])
            elif step[0] in ("open", "close"):
                script = OPEN if step[0] == "open" else CLOSE
                asked.append(shell(script.format(device_name(step[1]))))
            elif step[0] == "settle":
                asked.append(shell(MERGES.format(settings=SETTINGS_WORDS)))
            elif step[0] == "lvm":
                asked.append(guest_step({"args": step[1:], "stdin": ""}, self.paths))
            elif step[0] == "look":
                asked += [self.script(REPORTS), *map(shell, TABLES)]
            else:
                asked.append(self.script(checks(step)))
        answers = iter(self.kernel.run(None, asked, clean=False, seconds=120))
        return [self.answer(step, answers) for step in steps]

    def script(self, lines: Sequence[Sequence[str]]) -> list[Any]:
        """Return the step in which one process of lvm prints all that is asked, and a newline."""
        text = "".join(
            f"{shlex.join(placed(word, self.paths) for word in line)}\n" for line in lines
        )
        return shell(f"printf %s {shlex.quote(text)} | {SETTINGS_WORDS} lvm")

    def answer(self, step: Step, answers: Any) -> Any:
        if step[0] == "w":
            word = next(answers).removeprefix("w ")
            return "error" if word.startswith("E") else int(word)
        if step[0] in ("settle", "open", "close"):
            next(answers)
            return None
        status, out, err = self.shown(next(answers))
        if step[0] == "lvm":
            return status, out, err
        if step[0] == "look":
            out = out.removesuffix("\n")
            tables = self.lines(*(next(answers)["out"][1] for _ in TABLES))
            return [(status, out, err), (0, "".join(f"{line}\n" for line in tables), "")]
        return [(status, out, err)]

    def shown(self, answer: dict[str, Any]) -> Answer:
        assert answer["rc"] == 0, answer
        status, out, err = answer["out"]
        for name, path in self.paths.items():
            out, err = out.replace(path, name), err.replace(path, name)
        return int(status), out, err

    def tables(self) -> list[str]:
        answers = self.kernel.run(None, [*map(shell, TABLES)], clean=False)
        return self.lines(*(answer["out"][1] for answer in answers))

    def lines(self, tables: str, devices: str) -> list[str]:
        """Return tables with @DISK and %DEVICE for what they stand on, from what dmsetup says."""
        numbers = {number: f"%{name}" for number, name in device_numbers(devices).items()}
        numbers |= {f"98:{16 * slot}": f"@{name}" for slot, name in enumerate(DISKS, 1)}
        found = []
        for line in tables.splitlines():
            if line != NO_DEVICES:
                words = line.rstrip().split(" ")
                found.append(" ".join(numbers.get(word, word) for word in words))
        return sorted(found)

    def contents(self) -> dict[str, str]:
        answer = self.kernel.run(None, [shell(TABLES[1])], clean=False)[0]
        names = list(device_numbers(answer["out"][1]).values())
        answers = self.kernel.run(None, [["r", name, 0, 1 << 40] for name in names], clean=False)
        hashes = [answer.split()[-1] for answer in answers]
        return {
            name: "error" if text.startswith("E") else text
            for name, text in zip(names, hashes, strict=True)
        }


SETTINGS_WORDS = " ".join(f"{name}={value}" for name, value in SETTINGS.items())


def device_numbers(listed: str) -> dict[str, str]:
    """Return the names of dm devices by their numbers."""
    rows = [line.split() for line in listed.splitlines() if line != NO_DEVICES]
    return {f"{major}:{minor}": name for name, major, minor in rows}


def checks(step: Step) -> list[Sequence[str]]:
    """Return the command lines of ["check", PVS]; the first PVS disks are PVs."""
    disks = list(DISKS)[: step[1]]
    return [*CHECKS, *(("pvck", "--dump", "headers", disk) for disk in disks)]


def counts_otherwise(step: Step) -> bool:
    """Tell whether a command leaves another seqno, see docs/architecture.md."""
    if step[:2] == ["lvm", "lvremove"]:
        return len(step) > 4
    return step[:2] == ["lvm", "vgcfgrestore"]


def same(step: Step, theirs: Any, ours: Any, counted: bool) -> bool:
    """Tell whether two answers agree: of a command its status, of a look all that is printed."""
    if step[0] == "lvm":
        return bool(theirs[0] == ours[0])
    if step[0] == "look":
        return looked(theirs, counted) == looked(ours, counted)
    return bool(theirs == ours)


def looked(answers: Sequence[Answer], counted: bool) -> list[tuple[int, list[str]]]:
    """Return what is compared of a look; seqno is the last line of the reports."""
    (status, reports, _), (_, tables, _) = answers
    lines = reports.splitlines()
    return [(status, lines if counted else lines[:-1]), (0, tables.splitlines())]


def difference(real: Real, cow: Cow, steps: Sequence[Step]) -> str:
    """Run steps on both sides; return what differs first, "" if nothing does."""
    theirs, ours = real.steps(steps), cow.steps(steps)
    counted = True
    for number, (step, their, our) in enumerate(zip(steps, theirs, ours, strict=True)):
        counted = counted and not counts_otherwise(step)
        if not same(step, their, our, counted):
            return f"step {number} {step}\n{told(step, their, our)}"
    found = [(each.tables(), determined(each.contents())) for each in (real, cow)]
    for what, their, our in zip(("tables", "contents"), *found, strict=True):
        if their != our:
            return f"{what} at the end\n{told(['w'], their, our)}"
    return ""


def determined(contents: dict[str, str]) -> dict[str, str]:
    """Leave out stores that overflowed: what the last chunks hold depends on who was first."""
    lost = {f"{name}-cow" for name, data in contents.items() if data == "error"}
    return {name: data for name, data in contents.items() if name not in lost}


def told(step: Step, theirs: Any, ours: Any) -> str:
    if step[0] == "look":
        lines = []
        for their, our in zip(theirs, ours, strict=True):
            if their[:2] != our[:2]:
                left, right = their[1].splitlines(), our[1].splitlines()
                lines += [f"  real: {row} {their[2]}" for row in left if row not in right]
                lines += [f"  cow:  {row} {our[2]}" for row in right if row not in left]
        return "\n".join(lines)
    if isinstance(theirs, list):
        lines = [f"  real: {row}" for row in theirs if row not in ours]
        return "\n".join(lines + [f"  cow:  {row}" for row in ours if row not in theirs])
    if isinstance(theirs, dict):
        rows = sorted(theirs.items() ^ ours.items())
        return "\n".join(f"  {'real' if row in theirs.items() else 'cow'}: {row}" for row in rows)
    return f"  real: {theirs}\n  cow:  {ours}"


def make_disks(folder: Path) -> None:
    """Make the disks of a program, empty."""
    folder.mkdir(parents=True)
    for name, size in DISKS.items():
        with (folder / name).open("wb") as file:
            file.truncate(size << 20)


COMPLAINT = re.compile(
    r"\b(warning|error|fail(ed|ure)?|invalid|mismatch|corrupt(ed)?|bad)\b", re.IGNORECASE
)
"""As words of their own: a checksum may begin with 0xbad."""


def complaints(answers: Sequence[Answer]) -> list[Answer]:
    """Return the answers of a check that are no success, or that complain."""
    return [each for each in answers if each[0] or each[2] or COMPLAINT.search(each[1])]
