"""What is done to devices and metadata, in which order: as the real lvm2 does it, verb by verb.

tests/data/lvm/order.txt was recorded by tests/kernel/record_lvm_order.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.lvm_order import DISK_SIZE, DISKS, WRITTEN, Scenario, Step, read_scenarios

import cow
from cow import lvm
from cow.lvm.allocation import PVRange
from cow.lvm.mda import MetadataArea
from cow.lvm.metadata import Area, Segment
from cow.targets import snapshot_merge

MIB = 1 << 20
SCENARIOS = list(read_scenarios())


class Recorder(cow.Mapper):
    """A mapper that notes its verbs as the recorder of the real ones does."""

    def __init__(self) -> None:
        super().__init__(durability="process")
        self.done: list[str] = []
        self.disks: dict[str, str] = {}

    def create(self, name, table=None, **options):
        assert table is None
        self.done.append(f"create {name}")
        return super().create(name, table, **options)

    def load(self, name, table, *, readonly=None):
        for path, disk in self.disks.items():
            table = table.replace(path, disk)
        flag = " readonly" if readonly else ""
        self.done.append(f"load {plain(name)}{flag} | {'; '.join(table.splitlines())}")
        for path, disk in self.disks.items():
            table = re.sub(rf"\b{disk}\b", path, table)
        super().load(name, table, readonly=readonly)

    def suspend(self, name, **options):
        self.done.append(f"suspend {plain(name)}")
        super().suspend(name, **options)

    def resume(self, name):
        self.done.append(f"resume {plain(name)}")
        super().resume(name)

    def remove(self, name, **options):
        self.done.append(f"remove {plain(name)}")
        super().remove(name, **options)

    def rename(self, name, new_name):
        self.done.append(f"rename {plain(name)} {new_name}")
        super().rename(name, new_name)


def plain(name: str) -> str:
    return name.removeprefix("/dev/mapper/")


@pytest.fixture
def dm(monkeypatch) -> Iterator[Recorder]:
    with Recorder() as mapper:
        for step in ("precommit", "commit"):
            original = getattr(MetadataArea, step)

            def noted(mda, *args, step=step, original=original):
                if mapper.done[-1:] != [step]:
                    mapper.done.append(step)
                return original(mda, *args)

            monkeypatch.setattr(MetadataArea, step, noted)
        yield mapper


class Player:
    """Does with a VG what the lines of a scenario say."""

    def __init__(self, dm: Recorder, folder: Path) -> None:
        self.dm = dm
        paths = []
        for number in range(DISKS):
            paths.append(str(folder / f"pv{number}.img"))
            Path(paths[-1]).touch()
            os.truncate(paths[-1], DISK_SIZE)
            dm.disks[paths[-1]] = f"pv{number}"
        self.vg = lvm.create_vg("vg", paths, mapper=dm)
        self.files: dict[str, Any] = {}

    def play(self, step: Step) -> list[str]:
        self.dm.done = []
        kind, *words = step.text.split()
        if kind == "$":
            getattr(self, words[0])(Arguments(words[1:]))
        else:
            getattr(self, words[0])(words[1])
        return self.dm.done

    def open(self, name: str) -> None:
        self.files[name] = self.dm.device(name).open()

    def close(self, name: str) -> None:
        self.files[name].close()

    def write(self, name: str) -> None:
        for number in range(WRITTEN):
            self.dm.device(name).pwrite(bytes([number + 1]) * 4096, 8192 * number)

    def lvcreate(self, args: Arguments) -> None:
        size = args.size("-L")
        options: dict[str, Any] = {"size": size}
        if "-i" in args:
            options["stripes"] = int(args["-i"])
        if args.pvs:
            pvs = {"/dev/ubdc": 1, "/dev/mapper/slow": 0}
            options["ranges"] = [PVRange(self.vg.pvs[pvs[name]]) for name in args.pvs]
        if args.get("--type") == "mirror":
            self.make_mirror(args["-n"], log=args.get("--mirrorlog") != "core")
        elif "-s" in args:
            if "-c" in args:
                options["chunk_size"] = args.size("-c") // 512
            if args.get("-p") == "r":
                options["permission"] = "r"
            self.vg.create_snapshot(args.lv, args["-n"], **options)
        elif "-V" in args:
            virtual = args.size("-V") // (4 * MIB)
            self.vg.create_sparse(args["-n"], virtual_extents=virtual, activate=True, **options)
        else:
            self.vg.create_lv(args["-n"], **options)
            if args.get("-a") != "n":
                self.vg.activate(lvs=[args["-n"]])

    def make_mirror(self, name: str, *, log: bool) -> None:
        with self.vg.change("lvcreate --type mirror") as new:
            lv = new.new_lv(name)
            segment = Segment(0, 2, "mirror", region_size=1024 if log else 128)
            for number in range(2):
                image = new.new_lv(f"{name}_mimage_{number}", status=["READ", "WRITE"])
                image.segments.append(Segment(0, 2, "striped", areas=[Area(new.pvs[number], 0)]))
                segment.areas.append(Area(image, 0))
            if log:
                segment.mirror_log = new.new_lv(f"{name}_mlog", status=["READ", "WRITE"])
                area = Area(new.pvs[2], 0)
                segment.mirror_log.segments.append(Segment(0, 1, "striped", areas=[area]))
            lv.segments.append(segment)
        self.vg.activate(lvs=[name])

    def lvremove(self, args: Arguments) -> None:
        self.vg.remove_lv(args.lv)

    def lvrename(self, args: Arguments) -> None:
        self.vg.rename_lv(args.lv, args.other)

    def lvextend(self, args: Arguments) -> None:
        now = self.vg.lv(args.lv).sectors * 512
        self.vg.extend_lv(args.lv, size=now + args.size("-L"))

    def lvreduce(self, args: Arguments) -> None:
        self.vg.reduce_lv(args.lv, size=args.size("-L"))

    def lvchange(self, args: Arguments) -> None:
        if "--refresh" in args:
            self.vg.refresh_lv(args.lv)
        elif "-p" in args:
            self.vg.change_lv(args.lv, permission=args["-p"])
        elif "--addtag" in args:
            self.vg.change_lv(args.lv, add_tags=[args["--addtag"]])
        elif args["-a"] == "y":
            self.vg.activate(lvs=[args.lv])
        else:
            self.vg.deactivate([args.lv])

    def lvconvert(self, args: Arguments) -> None:
        if "--merge" in args:
            self.vg.merge(args.lv, background="-b" in args)
        elif "--splitsnapshot" in args:
            self.vg.split_snapshot(args.lv)
        else:
            self.vg.attach_snapshot(args.lv, args.other, zero=args.get("-Z") != "n")


class Arguments(dict[str, str]):
    """The options of a command line with their arguments, and what else there is."""

    FLAGS = frozenset("-y -s -f -b --merge --splitsnapshot --refresh --nosync".split())

    def __init__(self, words: list[str]) -> None:
        rest = []
        words = list(words)
        while words:
            word = words.pop(0)
            if not word.startswith("-"):
                rest.append(word)
            elif word in self.FLAGS:
                self[word] = ""
            elif not word.startswith("--") and len(word) > 2:
                self[word[:2]] = word[2:]
            else:
                self[word] = words.pop(0)
        self.pvs = [word for word in rest if word.startswith("/dev/")]
        names = [word.removeprefix("vg/") for word in rest if not word.startswith("/dev/")]
        self.lv, self.other = [*names, "", ""][:2]

    def size(self, name: str) -> int:
        number, unit = re.fullmatch(r"\+?(\d+)([kM])", self[name]).groups()
        return int(number) * {"k": 1024, "M": MIB}[unit]


def expected(step: Step) -> list[str]:
    """Return what is to be done: a store that grows goes live after the commit, not before."""
    lines = list(step.done)
    if step.text.startswith("$ lvextend"):
        loaded = [line.split()[1] for line in lines if line.startswith("load") and "-cow " in line]
        for name in loaded:
            lines.remove(f"resume {name}")
    if "--nosync" in step.text:
        lines = [line.replace("core 2 128 nosync", "core 1 128") for line in lines]
    if "--type mirror" in step.text:
        commit = len(lines) - 1 - lines[::-1].index("commit")
        lines = lines[commit - 1 :]
    return lines


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_verbs_and_commits_come_in_the_order_of_lvm(dm, tmp_path, monkeypatch, scenario: Scenario):
    if scenario.slow:
        monkeypatch.setattr(snapshot_merge._Worker, "_run", lambda worker: worker._stop.wait())
    player = Player(dm, tmp_path)
    for step in scenario.steps:
        assert player.play(step) == expected(step) or step.text.startswith("!"), step.text
