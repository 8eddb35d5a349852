"""Let the real lvm2 on the real kernel and `cow lvm` do the same, and compare all that is seen."""

from __future__ import annotations

import re
import shlex
import threading
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
        "lv_count,snap_count,vg_seqno,vg_tags",
    ),
    (
        "pvs", *ROWS, "-o",
        "pv_name,vg_name,pv_attr,pv_size,pv_free,pv_used,pv_pe_count,pv_pe_alloc_count,pe_start,"
        "pv_mda_count,pv_mda_size,dev_size",
    ),
    ("pvs", "--segments", *ROWS, "-o", "pv_name,pvseg_start,pvseg_size,lv_name,seg_start_pe"),
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
        self.lock = threading.RLock()

    def close(self) -> None:
        self.mapper.close()

    def lvm(self, args: Sequence[str]) -> Answer:
        out: list[str] = []
        err: list[str] = []
        shell = Shell(
            out.append,
            err.append,
            self.mapper,
            lock=self.lock,
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
            return [(max(each[0] for each in found), "".join(each[1] for each in found) + "\n", "")]
        if step[0] == "check":
            return [self.lvm(words) for words in checks(step)]
        if step[0] == "settle":
            poll(lambda: "snapshot-merge" not in self.mapper.table())
            self.lvm(["lvs"])
            return None
        _, lv, offset, length, seed = step
        try:
            return self.mapper.device(device_name(lv)).pwrite(fill(length, seed), offset)
        except OSError:
            return "error"

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
        (kernel.folder / "lvm.conf").write_text(CONFIG)
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
            elif step[0] == "settle":
                asked.append(shell(MERGES.format(settings=SETTINGS_WORDS)))
            elif step[0] == "lvm":
                asked.append(guest_step({"args": step[1:], "stdin": ""}, self.paths))
            else:
                asked.append(self.script(REPORTS if step[0] == "look" else checks(step)))
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
        if step[0] == "settle":
            next(answers)
            return None
        found = self.shown(next(answers))
        return found if step[0] == "lvm" else [found]

    def shown(self, answer: dict[str, Any]) -> Answer:
        assert answer["rc"] == 0, answer
        status, out, err = answer["out"]
        for name, path in self.paths.items():
            out, err = out.replace(path, name), err.replace(path, name)
        return int(status), out, err

    def devices(self) -> dict[str, str]:
        """Return the numbers of the dm devices."""
        command = "dmsetup info -c --noheadings --separator ' ' -o name,major,minor"
        answer = self.kernel.run(None, [shell(command)], clean=False)[0]
        lines = answer["out"][1].splitlines()
        rows = [line.split() for line in lines if line != "No devices found"]
        return {f"{major}:{minor}": name for name, major, minor in rows}

    def tables(self) -> list[str]:
        names = {number: f"%{name}" for number, name in self.devices().items()}
        names |= {f"98:{16 * slot}": f"@{name}" for slot, name in enumerate(DISKS, 1)}
        answer = self.kernel.run(None, [shell("dmsetup table")], clean=False)[0]
        found = []
        for line in answer["out"][1].splitlines():
            if line != "No devices found":
                words = line.rstrip().split(" ")
                found.append(" ".join(names.get(word, word) for word in words))
        return sorted(found)

    def contents(self) -> dict[str, str]:
        names = list(self.devices().values())
        answers = self.kernel.run(None, [["r", name, 0, 1 << 40] for name in names], clean=False)
        hashes = [answer.split()[-1] for answer in answers]
        return {
            name: "error" if text.startswith("E") else text
            for name, text in zip(names, hashes, strict=True)
        }


SETTINGS_WORDS = " ".join(f"{name}={value}" for name, value in SETTINGS.items())


def checks(step: Step) -> list[Sequence[str]]:
    """Return the command lines of ["check", PVS]; the first PVS disks are PVs."""
    disks = list(DISKS)[: step[1]]
    return [*CHECKS, *(("pvck", "--dump", "headers", disk) for disk in disks)]


def same(step: Step, theirs: Any, ours: Any) -> bool:
    """Tell whether two answers agree: of a command its status, of a look all that is printed."""
    if step[0] == "lvm":
        return bool(theirs[0] == ours[0])
    if step[0] == "look":
        return [each[:2] for each in theirs] == [each[:2] for each in ours]
    return bool(theirs == ours)


def difference(real: Real, cow: Cow, steps: Sequence[Step]) -> str:
    """Run steps on both sides; return what differs first, "" if nothing does."""
    theirs, ours = real.steps(steps), cow.steps(steps)
    for number, (step, their, our) in enumerate(zip(steps, theirs, ours, strict=True)):
        if not same(step, their, our):
            return f"step {number} {step}\n{told(step, their, our)}"
    for what in ("tables", "contents"):
        their, our = getattr(real, what)(), getattr(cow, what)()
        if their != our:
            return f"{what} at the end\n{told(['w'], their, our)}"
    return ""


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


COMPLAINT = re.compile(r"warning|error|fail|invalid|mismatch|corrupt|bad", re.IGNORECASE)


def complaints(answers: Sequence[Answer]) -> list[Answer]:
    """Return the answers of a check that are no success, or that complain."""
    return [each for each in answers if each[0] or each[2] or COMPLAINT.search(each[1])]
