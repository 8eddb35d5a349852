"""A virtual machine that boots of our devices: a PC as QEMU emulates it, without KVM."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from support import SECTOR
from support.daemon import Daemon
from support.fuse import need_fuse
from support.nbd import need

SECTORS = 2048
SECONDS = 120

LEFT = 0x21
"""QEMU's exit status after `out 0xf4, 0x10` (isa-debug-exit: twice the value and 1)."""

BOOT = bytes.fromhex(
    "fa 31c0 8ed8 8ec0 8ed0 bc007c"  # cli; ds, es, ss = 0; sp = 0x7c00
    "fe067c7d"  # inc byte [0x7d7c]: the count, below
    "b80103 b90100 b600 bb007c cd13"  # int 13h: write this sector back
    "b80102 b90200 b600 bb007e cd13"  # int 13h: read the second one to 0x7e00
    "be007e ac 84c0 7406 baf803 ee ebf5"  # print it at COM1, up to a zero
    "a07c7d 0430 baf803 ee"  # and the count, a digit
    "baf400 b010 ee f4"  # leave
)
"""Counts in itself how often it was booted, prints the text of the second sector and the count."""


def disk(text: str) -> bytes:
    return BOOT.ljust(510, b"\0") + b"\x55\xaa" + text.encode().ljust(SECTOR, b"\0")


def boot(drive: str) -> str:
    """Run a VM that boots of a drive; return what it says at its serial port."""
    command = ["qemu-system-x86_64", "-nodefaults", "-display", "none", "-serial", "stdio"]
    command += ["-device", "isa-debug-exit,iobase=0xf4", "-drive", f"{drive},format=raw"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == LEFT, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("way", ["fuse", "nbd"])
def test_a_vm_boots_of_a_disk_and_its_snapshot_stays(way, tmp_path):
    need("qemu-system-x86_64")
    where = {"nbd": f"unix:{tmp_path}/nbd.sock", "fuse": f"{tmp_path}/mnt"}[way]
    if way == "fuse":
        need_fuse()
        Path(where).mkdir()
    (tmp_path / "disk.img").write_bytes(disk("boots: ").ljust(SECTORS * SECTOR, b"\0"))
    (tmp_path / "snap.cow").write_bytes(bytes(SECTORS * SECTOR))
    daemon = Daemon(tmp_path, "--nbd" if way == "nbd" else "--mount", where)
    dm = daemon.client()
    try:
        file = {"nbd": f"nbd+unix:///{{}}?socket={tmp_path}/nbd.sock", "fuse": f"{where}/{{}}"}[way]
        drives = {name: f"file={file.format(name)}" for name in ("base", "snap")}
        origin = f"0 {SECTORS} snapshot-origin {tmp_path}/disk.img"
        dm.call("create", name="base", table=origin)
        assert boot(drives["base"]) == "boots: 1"
        dm.call("suspend", name="base")
        store = f"{tmp_path}/disk.img {tmp_path}/snap.cow P 8"
        dm.call("create", name="snap", table=f"0 {SECTORS} snapshot {store}")
        dm.call("resume", name="base")
        assert boot(drives["base"]) == "boots: 2"
        assert boot(drives["base"]) == "boots: 3"
        # The snapshot knows of the first boot, and of its own.
        assert boot(drives["snap"]) == "boots: 2"
        assert boot(drives["base"]) == "boots: 4"
    finally:
        dm.close()
        status, logged = daemon.stop()
    assert status == 0, logged
