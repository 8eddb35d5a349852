"""`cow lvm pvck --dump headers` prints what the real pvck prints, of good and of damaged PVs."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from support.lvm_replay import Replay

from cow import lvm

PVCK = shutil.which("pvck", path="/usr/sbin:/sbin:/usr/bin")
LABEL, AREA = 512, 4096
DAMAGE: dict[str, tuple[int, bytes]] = {
    "nothing": (0, b""),
    "the id of the label": (LABEL, b"LABELTWO"),
    "the number of its sector": (LABEL + 8, struct.pack("<Q", 2)),
    "its checksum": (LABEL + 16, b"crc!"),
    "where the PV's header begins": (LABEL + 20, struct.pack("<I", 40)),
    "where it begins, so that it ends with the sector": (LABEL + 20, struct.pack("<I", 440)),
    "its type": (LABEL + 24, b"LVM3 001"),
    "the uuid": (LABEL + 32, b"?" * 32),
    # Not its first byte: pvck takes the uuid to go on until a zero.
    "the size": (LABEL + 65, b"\xff" * 7),
    "the list of data areas": (LABEL + 72, b"\xff" * 200),
    "the version of the extension": (LABEL + 136, b"\xff" * 4),
    "the checksum of the area": (AREA, b"crc!"),
    "its magic": (AREA + 4, b"x" * 16),
    "its version": (AREA + 20, b"\x09"),
    "its start": (AREA + 24, struct.pack("<Q", 8192)),
    "its size": (AREA + 32, struct.pack("<Q", 1 << 16)),
    "the size of the text": (AREA + 48, struct.pack("<Q", 100)),
    "the text's place, so that it wraps": (AREA + 40, struct.pack("<Q", 1044480 - 512)),
    "the checksum of the text": (AREA + 56, b"crc!"),
    "the flags": (AREA + 60, b"\x01"),
    "the other slot": (AREA + 64, struct.pack("<QQII", 1024, 512, 7, 0)),
}


@pytest.fixture
def disk(tmp_path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"")
    os.truncate(path, 8 << 20)
    return path


def real(*args: str, folder: Path) -> str:
    assert PVCK, "pvck (Debian: lvm2) is not installed"
    done = subprocess.run([PVCK, *args], capture_output=True, text=True, cwd=folder)
    return done.stdout.replace(f"{folder}/", "")


def ours(*args: str, folder: Path) -> str:
    replay = Replay(folder, {})
    try:
        return replay.run(["pvck", *args])[0]
    finally:
        replay.close()


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_headers_are_dumped_as_pvck_dumps_them(name, disk):
    with lvm.create_vg("vg", [str(disk)]) as vg:
        vg.create_lv("lv", extents=1)
    at, data = DAMAGE[name]
    with open(disk, "r+b") as file:
        file.seek(at)
        file.write(data)
    args = ("--dump", "headers", "disk.img")
    folder = disk.parent
    mine = Replay(folder, {}).normal
    assert ours(*args, folder=folder) == mine(real(*args, folder=folder))


@pytest.mark.parametrize("copies", [0, 1, 2])
def test_the_headers_of_a_fresh_pv_are_dumped_as_pvck_dumps_them(copies, disk):
    lvm.create_pv(str(disk), metadata_copies=copies)
    args = ("--dump", "headers", "disk.img")
    mine = Replay(disk.parent, {}).normal
    assert ours(*args, folder=disk.parent) == mine(real(*args, folder=disk.parent))


@pytest.mark.parametrize("what", ["metadata", "metadata_all", "metadata_search"])
def test_texts_are_dumped_as_pvck_dumps_them(what, disk):
    with lvm.create_vg("vg", [str(disk)], metadata_size=16384) as vg:
        for number in range(8):
            vg.create_lv(f"lv{number}", extents=1)
            vg.remove_lv(f"lv{number}")
    args = ("--dump", what, "disk.img")
    mine = Replay(disk.parent, {}).normal
    assert ours(*args, folder=disk.parent) == mine(real(*args, folder=disk.parent))


@pytest.mark.parametrize("what", ["metadata_all", "metadata_search"])
def test_a_text_that_goes_on_at_the_beginning_of_the_ring_is_dumped_whole(what, disk):
    with lvm.create_vg("vg", [str(disk)], metadata_size=16384, extent_size=128) as vg:
        for number in range(12):
            vg.create_lv(f"lv{number}", extents=1)
    args = ("--dump", what, "disk.img")
    mine = Replay(disk.parent, {}).normal
    assert ours(*args, folder=disk.parent) == mine(real(*args, folder=disk.parent))


def test_the_text_is_written_into_a_file_as_pvck_writes_it(disk):
    lvm.create_vg("vg", [str(disk)]).close()
    texts = []
    for run in (real, ours):
        shown = run("--dump", "metadata", "-f", "text", "disk.img", folder=disk.parent)
        texts.append(((disk.parent / "text").read_bytes(), shown.partition(" crc ")[0]))
        (disk.parent / "text").unlink()
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    "line",
    [
        "--dump headers disk.img",
        "--dump metadata disk.img",
        "--dump metadata_all disk.img",
        "--dump metadata_search disk.img",
        "--dump nosuch disk.img",
        "nosuch.img",
    ],
)
@pytest.mark.parametrize("kind", ["no PV", "a PV without metadata", "a PV"])
def test_what_is_not_there_is_missed_as_pvck_misses_it(kind, line, disk):
    if kind == "a PV without metadata":
        lvm.create_pv(str(disk), metadata_copies=0)
    elif kind == "a PV":
        lvm.create_vg("vg", [str(disk)]).close()
    done = subprocess.run(
        [PVCK or "pvck", *line.split()], capture_output=True, text=True, cwd=disk.parent
    )
    replay = Replay(disk.parent, {})
    try:
        out, err, status = replay.run(["pvck", *line.split()])
    finally:
        replay.close()
    shown = replay.normal(done.stdout.replace(f"{disk.parent}/", ""))
    assert (out, bool(err), status) == (shown, bool(done.stderr), done.returncode), (done, err)


def test_without_dump_the_label_is_told_or_missed(disk):
    folder = disk.parent
    replay = Replay(folder, {})
    missed = "  Could not find LVM label on disk.img\n"
    assert replay.run(["pvck", "disk.img"]) == ("", missed, 5)
    lvm.create_pv(str(disk))
    assert "Found label on disk.img, sector 1" in ours("disk.img", folder=folder)
    replay.close()


def test_a_text_that_cannot_be_written_is_an_error(disk):
    lvm.create_vg("vg", [str(disk)]).close()
    replay = Replay(disk.parent, {})
    line = "pvck --dump metadata -f nosuch/text disk.img"
    assert replay.run(line.split()) == ("", "  nosuch/text: No such file or directory\n", 5)
    replay.close()
