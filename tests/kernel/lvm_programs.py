"""Random programs of lvm command lines, written with a small model of what exists.

A step is one of

    ["lvm", VERB, ARGS…]
    ["w", LV, OFFSET, LENGTH, SEED]     write to the device of an LV of vg0
    ["open", LV], ["close", LV]         somebody has it open meanwhile
    ["settle"]                          wait for merges that began in the background
    ["look"]                            compare the reports and the tables

The model is a guess: what it holds for possible may be refused, and now and then it asks for what
it knows to be wrong.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Step = list[Any]

VG = "vg0"
DISKS = {"disk1.img": 24, "disk2.img": 32, "disk3.img": 20}
"""Sizes in MiB."""
KIB = 1 << 10
TAGS = ("blue", "red", "a/b", "x-1")
BACKUP = "vg0.backup"
POLICIES = ("contiguous", "cling", "normal", "anywhere", "inherit")
NEW_PV_OPTIONS = (
    ("--pvmetadatacopies", "0"),
    ("--pvmetadatacopies", "2"),
    ("--metadatasize", "256k"),
    ("--dataalignment", "64k", "--metadatasize", "32k"),
    ("--metadataignore", "y"),
)
PV_OPTIONS = (
    *NEW_PV_OPTIONS,
    (),
    ("--metadatacopies", "0"),
    ("--metadatacopies", "2"),
    ("--bootloaderareasize", "64k"),
    ("-ff", "--dataalignmentoffset", "7k"),
)


@dataclass
class Model:
    """What an LV is, as the author believes."""

    size: int
    """Extents."""
    origin: str = ""
    sparse: bool = False
    active: bool = True
    writable: bool = True
    tags: set[str] = field(default_factory=set)


class Author:
    """Writes steps; asked again, it goes on with what it wrote before."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.seed = seed
        self.lvs: dict[str, Model] = {}
        self.count = 0
        self.extent = self.random.choice((64, 256, 1024))
        """KiB."""
        self.pvs = 1 if self.random.random() < 0.5 else 2
        self.steps: list[Step] = []
        self.kept: dict[str, Model] | None = None
        """What the backup has, if there is one."""
        self.two_areas: set[str] = set()
        """Disks with a metadata area at the end too; those PVs `cow lvm` does not resize."""

    def begin(self) -> list[Step]:
        """Write the steps that make the VG."""
        disks = list(DISKS)[: self.pvs]
        if self.random.random() < 0.5:
            self.lvm("pvcreate", *disks)
        more: list[str] = []
        if self.random.random() < 0.3:
            more += self.random.choice(
                (
                    ("--addtag", "mine"),
                    ("--alloc", "cling"),
                    ("-l", "0", "-p", "9"),
                    ("--pvmetadatacopies", "2"),
                    ("--metadatasize", "128k"),
                    ("--dataalignment", "128k"),
                )
            )
        self.note_areas(more, *disks)
        self.lvm("vgcreate", "-s", f"{self.extent}k", *more, VG, *disks)
        return self.taken()

    def write(self, count: int, look: int = 8) -> list[Step]:
        """Write `count` steps, with a look at the reports after each few."""
        for number in range(count):
            self.command()
            if number % look == look - 1:
                self.steps.append(["look"])
        if self.steps[-1:] != [["look"]]:
            self.steps.append(["look"])
        self.kept = None
        return self.taken()

    def taken(self) -> list[Step]:
        steps, self.steps = self.steps, []
        return steps

    def lvm(self, *words: str) -> None:
        self.steps.append(["lvm", *words])

    # choices

    def pick(self, *, origins: bool = False, snapshots: bool = False) -> str | None:
        """Return an LV of some kind, or any."""
        found = [
            name
            for name, lv in self.lvs.items()
            if (not origins or (not lv.origin and not lv.sparse)) and (not snapshots or lv.origin)
        ]
        return self.random.choice(found) if found else None

    def snapshots_of(self, name: str) -> list[str]:
        return [each for each, lv in self.lvs.items() if lv.origin == name]

    def new_name(self) -> str:
        self.count += 1
        return self.random.choice(("a", "b-b", "c_c", "d.d")) + str(self.count)

    def command(self) -> None:
        """Write one command or some writes."""
        if self.random.random() < 0.08:
            self.refused()
            return
        kinds = {
            self.linear: 12 if len(self.lvs) < 6 else 3,
            self.striped: 5,
            self.snapshot: 16 if len(self.lvs) < 9 else 4,
            self.sparse: 4,
            self.data: 26,
            self.rename: 6,
            self.extend: 10,
            self.permission: 4,
            self.tags: 5,
            self.activation: 8,
            self.merge: 7,
            self.split: 5,
            self.attach: 5,
            self.remove: 8,
            self.merge_later: 3,
            self.merge_tagged: 2,
            self.resize: 6,
            self.policy: 2,
            self.refresh: 2,
            self.all_at_once: 3,
            self.vgchange: 2,
            self.vgck: 3,
            self.vgextend: 3,
            self.pvresize: 3,
            self.spare: 3,
            self.backup: 3,
            self.restore: 4,
            self.again: 1,
        }
        while True:
            kind = self.random.choices(list(kinds), list(kinds.values()))[0]
            before = len(self.steps)
            kind()
            if len(self.steps) > before:
                return

    # the verbs

    def size_words(self, least: int, most: int) -> tuple[int, list[str]]:
        """Return a number of extents and an option that asks for it."""
        size = self.random.randint(least, most)
        if self.random.random() < 0.5:
            return size, ["-l", str(size)]
        return size, ["-L", f"{size * self.extent}k"]

    def many(self, kib: int) -> int:
        """Return how many extents are that large, at least one."""
        return max(1, kib // self.extent)

    def linear(self) -> None:
        name = self.new_name()
        size, words = self.size_words(1, self.many(3072))
        if self.random.random() < 0.2:
            words = ["-l", self.random.choice(("5%VG", "10%FREE", "8%PVS"))]
        lv = Model(size)
        place: list[str] = []
        if self.random.random() < 0.3:
            words += self.random.choice(
                (
                    ("-an", "-Zn"),
                    ("-pr",),
                    ("-Wn",),
                    ("-Zn",),
                    ("--alloc", "contiguous"),
                    ("--addtag", "blue", "--addtag", "red"),
                    ("-r", "128"),
                )
            )
            lv.active, lv.writable = "-an" not in words, "-pr" not in words
            lv.tags |= {"blue", "red"} & set(words)
        if self.random.random() < 0.2:
            disk = list(DISKS)[self.random.randrange(self.pvs)]
            start = self.random.randint(0, 20)
            place = self.random.choice(([disk], [f"{disk}:{start}-{start + 15}"], [f"{disk}:3-"]))
        self.lvm("lvcreate", "-y", *words, "-n", name, VG, *place)
        self.lvs[name] = lv

    def striped(self) -> None:
        if self.pvs < 2:
            return
        name = self.new_name()
        size, words = self.size_words(2, self.many(4096) + 2)
        stripe = self.random.choice((4, 8, 64))
        count = self.random.randint(2, self.pvs)
        self.lvm("lvcreate", "-y", f"-i{count}", "-I", f"{stripe}k", *words, "-n", name, VG)
        self.lvs[name] = Model(size)

    def snapshot(self) -> None:
        origin = self.pick(origins=True)
        if origin is None:
            return
        name = self.new_name()
        chunk = self.random.choice((None, 4, 4, 8, 16, 64))
        words = [] if chunk is None else ["-c", f"{chunk}k"]
        size = 1
        match self.random.randrange(3):
            case 0:
                words += ["-l", f"{self.random.choice((10, 50, 100, 120))}%ORIGIN"]
            case 1:
                size, more = self.size_words(1, self.many(1024) + 2)
                words += more
            case _:
                words += ["-L", f"{self.random.randint(50, 2000)}k"]
        if self.random.random() < 0.2:
            words += ["-p", "r"]
        if self.random.random() < 0.1:
            words += self.random.choice((["-an"], ["-kn"], ["--addtag", "blue"], ["-i1"]))
        self.lvm("lvcreate", "-y", "-s", *words, "-n", name, f"{VG}/{origin}")
        self.lvs[name] = Model(size, origin, writable="r" not in words)

    def sparse(self) -> None:
        name = self.new_name()
        size, words = self.size_words(1, self.many(1024) + 1)
        virtual = self.random.randint(1, 64)
        self.lvm(
            "lvcreate", "-y", "--type", "snapshot", "-V", f"{virtual}m", *words, "-n", name, VG
        )
        self.lvs[name] = Model(size, sparse=True)

    def data(self) -> None:
        """Write here and there; small, so that not every snapshot overflows."""
        for _ in range(self.random.randint(1, 4)):
            name = self.pick()
            if name is None or not self.lvs[name].writable:
                return
            length = 4 * KIB * self.random.choice((1, 1, 2, 5, 16))
            end = max(1, self.extent * self.lvs[name].size // 4 - length // (4 * KIB))
            offset = 4 * KIB * self.random.randrange(end)
            self.steps.append(["w", name, offset, length, self.random.randrange(1, 1 << 16)])

    def rename(self) -> None:
        name = self.pick()
        if name is not None:
            self.rename_to_new(name)

    def rename_to_new(self, name: str) -> None:
        new = self.new_name()
        both = (VG, name, new) if self.random.random() < 0.3 else (f"{VG}/{name}", f"{VG}/{new}")
        self.lvm("lvrename", *both)
        self.lvs[new] = self.lvs.pop(name)
        for lv in self.lvs.values():
            lv.origin = new if lv.origin == name else lv.origin

    def extend(self) -> None:
        name = self.pick()
        if name is None:
            return
        size = self.random.randint(1, self.many(1024))
        words = ["-l", f"+{size}"]
        if self.random.random() < 0.3:
            words = ["-L", f"+{size * self.extent}k"]
        elif self.random.random() < 0.3:
            share = self.random.choice(("10%LV", "50%LV", "5%VG", "10%FREE", "5%PVS", "30%ORIGIN"))
            words = ["-l", f"+{share}"]
        self.lvm("lvextend", *words, f"{VG}/{name}")
        self.lvs[name].size += size

    def permission(self) -> None:
        name = self.pick()
        if name is None:
            return
        lv = self.lvs[name]
        lv.writable = not lv.writable
        self.lvm("lvchange", "-prw" if lv.writable else "-pr", f"{VG}/{name}")

    def tags(self) -> None:
        name = self.pick()
        if name is not None:
            verb = self.random.choice(("--addtag", "--addtag", "--deltag"))
            tag = self.random.choice(TAGS)
            self.lvm("lvchange", verb, tag, f"{VG}/{name}")
            self.lvs[name].tags.discard(tag)
            if verb == "--addtag":
                self.lvs[name].tags.add(tag)

    def activation(self) -> None:
        name = self.pick(origins=True)
        if name is None:
            return
        lv = self.lvs[name]
        lv.active = not lv.active
        self.lvm("lvchange", "-ay" if lv.active else "-an", f"{VG}/{name}")
        if lv.active:
            self.steps.append(["settle"])

    def merge(self) -> None:
        name = self.pick(snapshots=True)
        if name is None:
            return
        word = self.random.choice(("--merge", "--merge", "--mergesnapshot"))
        if self.random.random() < 0.3:
            self.lvm("lvconvert", word, "-b", f"{VG}/{name}")
            self.steps.append(["settle"])
        else:
            self.lvm("lvconvert", word, "-i", "0", f"{VG}/{name}")
        del self.lvs[name]

    def merge_later(self) -> None:
        """Ask for a merge while the origin or the snapshot is open; it is put off."""
        name = self.pick(snapshots=True)
        if name is None:
            return
        origin = self.lvs[name].origin
        held = self.random.choice((origin, origin, name))
        self.steps.append(["open", held])
        self.lvm("lvconvert", "--merge", f"{VG}/{name}")
        self.steps.append(["look"])
        for _ in range(self.random.randrange(3)):
            self.random.choice((self.data, self.linear, self.tags, self.rename_other))()
        self.steps.append(["close", held])
        del self.lvs[name]
        match self.random.randrange(3):
            case 0:
                self.lvm("lvchange", "--refresh", f"{VG}/{origin}")
            case 1:
                self.lvm("lvchange", "-an", f"{VG}/{origin}")
                self.lvm("lvchange", "-ay", f"{VG}/{origin}")
            case _:
                self.lvm("vgchange", "--refresh", VG)
        # None is left waiting: the real lvm2 takes its origin for a store, and a new permission
        # makes it begin, with nobody there to finish it.
        self.steps.append(["settle"])

    def rename_other(self) -> None:
        """Rename an LV that is no origin and has none."""
        plain = [n for n, lv in self.lvs.items() if not lv.origin and not self.snapshots_of(n)]
        if plain:
            self.rename_to_new(self.random.choice(plain))

    def merge_tagged(self) -> None:
        """Merge what has a tag; of several snapshots of one origin only one can be."""
        tag = self.random.choice(TAGS)
        found = [name for name, lv in self.lvs.items() if tag in lv.tags]
        if not any(self.lvs[name].origin for name in found):
            return
        self.lvm("lvconvert", "--merge", "-i", "0", f"@{tag}")
        for name in found:
            if self.lvs[name].origin:
                del self.lvs[name]

    def split(self) -> None:
        name = self.pick(snapshots=True)
        if name is not None:
            self.lvm("lvconvert", "-y", "--splitsnapshot", f"{VG}/{name}")
            self.lvs[name].origin = ""

    def resize(self) -> None:
        """Make an LV shorter or longer, whatever is on it; stores only longer."""
        name = self.pick(origins=True) if self.random.random() < 0.8 else self.pick()
        if name is None:
            return
        lv = self.lvs[name]
        shorter = not lv.origin and not lv.sparse and self.random.random() < 0.6
        by = self.random.randint(1, max(1, lv.size // 2))
        verb = self.random.choice(("lvreduce", "lvresize")) if shorter else "lvresize"
        sign = "-" if shorter else "+"
        amount = ["-l", f"{sign}{by}"] if self.random.random() < 0.5 else []
        amount = amount or ["-L", f"{sign}{by * self.extent}k"]
        if self.random.random() < 0.3:
            size = lv.size - by if shorter else lv.size + by
            amount = ["-l", str(size)] if self.random.random() < 0.5 else []
            amount = amount or ["-L", f"{size * self.extent}k"]
        self.lvm(verb, self.random.choice(("-f", "-y")), *amount, f"{VG}/{name}")
        lv.size += -by if shorter else by

    def policy(self) -> None:
        name = self.pick()
        if name is not None:
            self.lvm("lvchange", "--alloc", self.random.choice(POLICIES), f"{VG}/{name}")

    def refresh(self) -> None:
        name = self.pick()
        if name is not None:
            self.lvm("lvchange", "--refresh", f"{VG}/{name}")
            self.steps.append(["settle"])

    def all_at_once(self) -> None:
        """Deactivate and activate everything."""
        self.lvm("vgchange", "-an", VG)
        if self.random.random() < 0.5:
            self.steps.append(["look"])
        self.lvm("vgchange", "-ay", VG)
        self.steps.append(["settle"])
        for lv in self.lvs.values():
            lv.active = True

    def vgchange(self) -> None:
        words = self.random.choice(
            (
                ("--addtag", "red"),
                ("--deltag", "red"),
                ("--alloc", "normal"),
                ("-l", "0"),
                ("-p", "0"),
                ("-x", "y"),
            )
        )
        self.lvm("vgchange", *words, VG)

    def attach(self) -> None:
        name, store = self.pick(origins=True), self.pick(origins=True)
        if name is None or store in (None, name) or self.snapshots_of(store):
            return
        words = [self.random.choice(("-s", "-s", "--snapshot"))]
        words = ["--type", "snapshot"] if self.random.random() < 0.2 else words
        words += ["-Zn"] if self.random.random() < 0.3 else []
        words += self.random.choice(([], ["-c", "4k"], ["-c", "32k"]))
        self.lvm("lvconvert", "-y", *words, f"{VG}/{name}", f"{VG}/{store}")
        self.lvs[store].origin = name

    def remove(self) -> None:
        name = self.pick()
        if name is None:
            return
        found = {name, *self.snapshots_of(name)}
        more = []
        if self.random.random() < 0.1 and (other := self.pick()) is not None:
            more = [f"{VG}/{other}"]
            found |= {other, *self.snapshots_of(other)}
        force = "-f" if self.random.random() < 0.5 else "-y"
        self.lvm("lvremove", force, f"{VG}/{name}", *more)
        for each in found:
            del self.lvs[each]

    def vgck(self) -> None:
        if self.random.random() < 0.4:
            self.lvm("vgck", "--updatemetadata", VG)
        else:
            self.lvm("vgck", *([VG] if self.random.random() < 0.5 else []))

    def vgextend(self) -> None:
        if self.pvs < len(DISKS):
            words = self.random.choice(NEW_PV_OPTIONS) if self.random.random() < 0.4 else ()
            self.note_areas(words, list(DISKS)[self.pvs])
            self.lvm("vgextend", *words, VG, list(DISKS)[self.pvs])
            self.pvs += 1
            self.kept = None  # the real lvm2 leaves the newer metadata on a PV that goes

    def note_areas(self, words: Sequence[str], *disks: str) -> None:
        if "2" in words:
            self.two_areas |= {*disks}

    def pvresize(self) -> None:
        """Let a PV have another size, or that of its disk."""
        disk = self.random.choice(list(DISKS))
        if disk in self.two_areas:
            return
        words = ["-y"] if self.random.random() < 0.5 else []
        if words:
            words += ["--setphysicalvolumesize", f"{self.random.randrange(1, DISKS[disk] + 1)}m"]
        self.lvm("pvresize", *words, disk)

    def spare(self) -> None:
        """Make a PV of a disk that is in no VG, or unmake it."""
        if self.pvs == len(DISKS):
            return
        disk = list(DISKS)[self.pvs]
        if self.random.random() < 0.6:
            words = self.random.choice(PV_OPTIONS)
            self.note_areas(words, disk)
            self.lvm("pvcreate", *words, disk)
            if self.random.random() < 0.3:
                self.lvm("pvs", "-o", "name,pe_start,mda_count,mda_size,ba_start,ba_size", disk)
        else:
            self.lvm("pvremove", disk)

    def backup(self) -> None:
        self.lvm("vgcfgbackup", "-f", BACKUP, VG)
        self.kept = copy.deepcopy(self.lvs)

    def restore(self) -> None:
        """Go back to the backup, with nothing active."""
        if self.kept is None:
            return
        self.lvm("vgchange", "-an", VG)
        self.lvm("vgcfgrestore", "-f", BACKUP, VG)
        self.steps.append(["look"])
        self.lvm("vgchange", "-ay", VG)
        self.steps.append(["settle"])
        self.lvs = copy.deepcopy(self.kept)

    def again(self) -> None:
        """Remove the VG with all that is in it, and make it once more."""
        self.lvm("vgremove", self.random.choice(("-f", "-y")), VG)
        self.lvs.clear()
        self.kept = None
        self.steps.append(["look"])
        steps, self.steps = self.steps, []
        self.steps = steps + self.begin()

    # what is refused

    def refused(self) -> None:
        """Ask for something that is wrong, or likely to be."""
        name = self.pick() or "none"
        plain = self.pick(origins=True) or "none"
        snapshot = self.pick(snapshots=True) or "none"
        choices: list[tuple[str, ...]] = [
            ("lvcreate", "-y", "-l", "1", "-n", name, VG),
            ("lvcreate", "-y", "-L", "1t", "-n", "huge", VG),
            ("lvcreate", "-y", "-l", "1", "-n", "bad name", VG),
            ("lvcreate", "-y", "-l", "1", "-n", "x_vorigin", VG),
            ("lvcreate", "-y", "-l", "1", "-n", "snapshot7", VG),
            ("lvcreate", "-y", "-l", "1", "-i9", "-n", "wide", VG),
            ("lvcreate", "-y", "-l", "0", "-n", "zero", VG),
            ("lvcreate", "-y", "-s", "-l", "2", "-c", "3k", "-n", "odd", f"{VG}/{plain}"),
            ("lvcreate", "-y", "-s", "-l", "2", "-c", "1m", "-n", "odd", f"{VG}/{plain}"),
            ("lvcreate", "-y", "-s", "-l", "2", "-n", "odd", f"{VG}/{snapshot}"),
            ("lvcreate", "-y", "-s", "-l", "2", "-n", "odd", f"{VG}/none"),
            ("lvrename", f"{VG}/{name}", f"{VG}/{plain}"),
            ("lvrename", f"{VG}/none", f"{VG}/more"),
            ("lvrename", f"{VG}/{name}", f"{VG}/pvmove0"),
            ("lvextend", "-l", "1", f"{VG}/{name}"),
            ("lvextend", "-l", "+100000", f"{VG}/{name}"),
            ("lvextend", "-L", "-4m", f"{VG}/{name}"),
            ("lvchange", "--addtag", "b@d", f"{VG}/{name}"),
            ("lvchange", "-pr", f"{VG}/none"),
            ("lvchange", f"{VG}/{name}"),
            ("lvconvert", "--merge", f"{VG}/{plain}"),
            ("lvconvert", "-y", "--splitsnapshot", f"{VG}/{plain}"),
            ("lvconvert", "-y", "-s", f"{VG}/{plain}", f"{VG}/{snapshot}"),
            ("lvconvert", "-y", "-s", f"{VG}/{plain}", f"{VG}/{plain}"),
            ("lvremove", "-y", f"{VG}/none"),
            ("lvremove", f"{VG}/{name}/x"),
            ("vgextend", VG, "disk1.img"),
            ("vgextend", "none", "disk1.img"),
            ("vgcreate", "other", "disk1.img"),
            ("vgck", "none"),
            ("pvcreate", "disk1.img"),
            ("nosuchverb",),
        ]
        self.lvm(*self.random.choice(choices))
