"""Power cuts while cow changes a VG: the real lvm2 finds a legal generation, and no byte is lost.

The states are those of tests/test_lvm_power.py and tests/test_lvm_snapshot_power.py: what the disk
may hold after a cut at any moment. Of each change some, chosen anew in every run, are given to the
real lvm2; COW_LONG=1 gives it more. It must find a generation that is legal then,
activate it, and read of every LV what cow reads; a merge that was under way it must finish.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import test_lvm_power as plain
import test_lvm_snapshot_power as snapshots
from support import SECTOR, count
from support.crash import LONG, Cuts

import cow
from cow import lvm

from .lvm_judge import MERGES, POLLING, SETTINGS_WORDS, complaints
from .record_lvm import CONFIG, START, shell
from .uml import Kernel

CHOSEN = 16 * LONG or 2
"""States of each change."""
PV_BYTES = plain.PV_SECTORS * SECTOR
GROUPS = "{0} vgs --noheadings --separator ' ' -o name,seqno,exported"
LVS = "{0} lvs -a --noheadings -o name"
MEND = "{0} vgck --updatemetadata {1} >/dev/null 2>&1; {0} vgck {1}; {0} lvs -a"


class Found(NamedTuple):
    """What cow finds in a state, looking without writing."""

    name: str
    seqno: int
    exported: bool
    lvs: set[str]
    """All but the records, as `lvs -a` names them."""
    contents: dict[str, str]
    """The crc of each LV that users see, by dm name; a merge is shown as if it were done."""
    merging: bool
    half_renamed: bool
    """Whether the PVs disagree about the name of the VG."""


def looked_at(path: Path) -> Found | None:
    """Look at a state; None if there is no VG."""
    with cow.Mapper(durability="process") as dm:
        dm.image(str(path), readonly=True)
        dm.create("disk", f"0 {2 * plain.PV_SECTORS} linear {path} 0", readonly=True)
        for number, name in enumerate(plain.NAMES):
            table = f"0 {plain.PV_SECTORS} linear disk {plain.PV_SECTORS * number}"
            dm.create(name, table, readonly=True)
        with lvm.scan(plain.NAMES, mapper=dm, readonly=True) as scan:
            if not scan.vgs:
                return None
            (vg,) = scan.vgs
            vg.activate()
            contents = {}
            for lv in vg.lvs():
                device = vg.device(lv.name)
                if lv.snapshot is None or not lv.snapshot.segments[0].merging:
                    data = device.pread(device.size, 0)
                    contents[f"{vg.name}-{lv.name}"] = f"{zlib.crc32(data):08x}"
            names = {lv.name if lv.visible else f"[{lv.name}]" for lv in vg.lvs(hidden=True)}
            merging = any(lv.merging_snapshot is not None for lv in vg.metadata.lvs)
            exported = "EXPORTED" in vg.metadata.status
            texts = [mda.read_text() for pv in vg.pvs for mda in pv.mdas if mda.seqno]
            half_renamed = len({text.split()[0] for text in texts}) > 1
            return Found(
                vg.name, vg.metadata.seqno, exported, names, contents, merging, half_renamed
            )


def finish_rename(path: Path, found: Found) -> Found:
    """Have cow mend a VG whose PVs disagree about its name.

    The real lvm2 believes the PV that it reads last, reports internal errors, and cannot mend it.
    """
    with cow.Mapper(durability="process") as dm:
        plain.open_disk(dm, path)
        with lvm.VolumeGroup.open(plain.NAMES, mapper=dm) as vg:
            vg.update_metadata()
    mended = looked_at(path)
    assert mended == found._replace(seqno=found.seqno + 1, half_renamed=False)
    return mended


def check_state(kernel: Kernel, folder: Path, state: bytes) -> Found | None:
    """Have the real lvm2 look at a state, activate it, read it, and mend it."""
    path = folder / "state.img"
    path.write_bytes(state)
    first = found = looked_at(path)
    if first is not None and first.half_renamed:
        found = finish_rename(path, first)
        state = path.read_bytes()
    images = {name: folder / f"{name}.img" for name in plain.NAMES}
    for number, image in enumerate(images.values()):
        image.write_bytes(state[number * PV_BYTES : (number + 1) * PV_BYTES])
    program = f"{SETTINGS_WORDS} lvm"
    steps = [shell(START), shell(GROUPS.format(program))]
    if found is None:
        steps += [shell(LVS.format(program))]
        for listed in kernel.run(images, steps)[1:]:
            assert listed["out"][:2] == ["0", ""], listed
        return None
    # What is exported has to be imported before its LVs are shown.
    steps += [shell(f"{program} vgimport {found.name}" if found.exported else "true")]
    steps += [shell(LVS.format(program))]
    steps += [shell(f"{program} vgchange -ay {found.name}")]
    steps += [shell(MERGES.format(settings=SETTINGS_WORDS))]
    steps += [["r", name, 0, 1 << 40] for name in found.contents]
    steps += [shell("dmsetup table")]
    steps += [shell(f"{program} vgchange -an {found.name}")]
    steps += [shell(MEND.format(program, found.name))]
    _, groups, imported, lvs, active, _, *read, table, stopped, mended = kernel.run(images, steps)
    where = f"cow: {found}\nthe real lvm2: {groups} {imported} {lvs} {active} {read} {table}"
    words = [found.name, str(found.seqno), *["exported"] * found.exported]
    assert (groups["out"][0], groups["out"][1].split()) == ("0", words), where
    assert imported["out"][0] == "0", where
    assert (lvs["out"][0], set(lvs["out"][1].split())) == ("0", found.lvs), where
    assert active["out"][0] == stopped["out"][0] == "0", where
    assert "snapshot-merge" not in table["out"][1], where
    crcs = dict(zip(found.contents, (answer.split()[-1] for answer in read), strict=True))
    assert crcs == found.contents, where
    status, out, err = mended["out"]
    assert not complaints([(int(status), out, err)]), (where, mended)
    return first


@pytest.fixture
def folder(judge):
    """A folder for the record of a change, and for its states."""
    folder = judge.new_folder()
    folder.mkdir()
    (judge.folder / "lvm.conf").write_text(CONFIG.replace("activation {", POLLING))
    return folder


def chosen(states: Iterator[Any], seed: int) -> list[Any]:
    """Return some of the states, each as likely as any other."""
    dice = random.Random(seed)
    kept: list[Any] = []
    for number, state in enumerate(states):
        if number < CHOSEN:
            kept.append(state)
        elif (slot := dice.randrange(number + 1)) < CHOSEN:
            kept[slot] = state
    return kept


CHANGES: list[tuple[Any, str]] = [
    *((plain, name) for name in plain.CHANGES),
    *((snapshots, name) for name in snapshots.CHANGES),
]


@pytest.mark.parametrize(("changes", "name"), CHANGES, ids=[name for _, name in CHANGES])
def test_the_real_lvm2_finds_a_legal_generation_after_a_cut(judge, folder, seed, changes, name):
    disk, entries, generations = changes.record_change(name, folder)
    cuts = Cuts(changes.MOST, random.Random(seed))
    for mark, state in chosen(((m, s) for m, s in cuts.of(disk, entries) if m), seed):
        legal = [generations[n]["seqno"] for n in plain.legal_generations(mark)]
        found = check_state(judge.running(), folder, state)
        assert found is not None
        assert found.seqno in legal, (mark, found)
        count("disk states after a power cut in a change, given to the real lvm2")


def make_pv(dm: cow.Mapper) -> None:
    lvm.create_pv("pv0", mapper=dm, **plain.SMALL)


def remove_vg(dm: cow.Mapper) -> None:
    with plain.open_vg(dm) as vg:
        vg.remove()


MAKING: dict[str, tuple[Callable[[cow.Mapper], None], Callable[[cow.Mapper], None]]] = {
    "pvcreate": (plain.nothing, make_pv),
    "pvremove": (make_pv, lambda dm: lvm.remove_pv("pv0", mapper=dm)),
    "vgcreate": (plain.nothing, lambda dm: plain.make_vg(dm).close()),
    "vgremove": (plain.two_lvs, remove_vg),
}


@pytest.mark.parametrize("name", MAKING)
def test_the_real_lvm2_finds_the_vg_that_cow_finds_after_a_cut(judge, folder, seed, name):
    disk, entries = plain.record(folder, *MAKING[name])
    cuts = Cuts(plain.MOST, random.Random(seed))
    for _, state in chosen(cuts.of(disk, entries), seed):
        check_state(judge.running(), folder, state)
        count("disk states after a power cut in a change, given to the real lvm2")
