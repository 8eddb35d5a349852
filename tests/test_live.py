"""Snapshots of a disk in use: fio writes and verifies an origin all the time, over NBD.

Meanwhile snapshots of it are created by `cow dm`, copied out with nbdcopy, compared with what the
image was while the origin was suspended, merged and removed, again and again. `make test-live` does
so for minutes; COW_LIVE_SECONDS says for how long.
"""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import SECTOR, stamp
from support.daemon import Daemon
from support.nbd import WRITE, Client, need, run

SECTORS = 1 << 16
SIZE = SECTORS * SECTOR
QUARTER = SIZE // 4
"""The first is for a fio that runs all the time, the second for one after the other."""
HALF = SIZE // 2
"""From here on the disk is changed by merges alone."""
RUNTIME = float(os.environ.get("COW_LIVE_SECONDS") or 8)
WRITTEN = 4 << 20
"""Bytes that a merge brings, at least; a quarter of them in one piece."""


class Live:
    """A daemon with the origin `base` over an image, its snapshots, and their frozen references."""

    def __init__(self, folder: Path, durability: str) -> None:
        self.folder = folder
        self.image = folder / "disk.img"
        self.image.write_bytes(bytes(HALF) + stamp(SECTORS // 2, SECTORS // 2, 0))
        self.address = f"{folder}/nbd.sock"
        self.daemon = Daemon(folder, "--nbd", f"unix:{self.address}", "--durability", durability)
        self.dm("create", "base-real", "--table", f"0 {SECTORS} linear {self.image} 0")
        self.dm("create", "base", "--table", self.origin_line)
        self.control = self.daemon.client()
        self.cycles = 0
        self.under_way = 0
        """How many looks at a merge found it half done."""

    origin_line = f"0 {SECTORS} snapshot-origin base-real"

    def dm(self, *words: str) -> str:
        """Run a `cow dm` as a shell would."""
        command = [sys.executable, "-P", "-m", "cow", "dm", "--socket", self.daemon.path]
        return run(*command, *words)

    def uri(self, name: str) -> str:
        return f"nbd+unix:///{name}?socket={self.address}"

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        self.dm("suspend", "base")
        yield
        self.dm("resume", "base")

    def line(self, name: str, kind: str = "snapshot", chunk: int = 8) -> str:
        return f"0 {SECTORS} {kind} base-real {self.folder}/{name}.cow P {chunk}"

    def snapshot(self, name: str, chunk: int = 8) -> bytes:
        """Take a snapshot, and return what the image holds at that moment."""
        with open(f"{self.folder}/{name}.cow", "wb") as file:
            file.truncate(2 * SIZE)
        with self.suspended():
            frozen = self.image.read_bytes()
            self.dm("create", name, "--table", self.line(name, chunk=chunk))
        return frozen

    def copy(self, name: str) -> bytes:
        """Return a device as nbdcopy copies it."""
        path = self.folder / f"{name}.copy"
        run("nbdcopy", self.uri(name), str(path))
        return path.read_bytes()

    def drop(self, name: str) -> None:
        """Remove a snapshot; its store is sound."""
        self.dm("remove", "--retry", name)
        run(sys.executable, "-P", "-m", "cow", "store", "check", f"{self.folder}/{name}.cow")
        os.unlink(f"{self.folder}/{name}.cow")

    def merge(self, dice: random.Random, tag: int) -> bytes:
        """Bring new data into the second half by way of a snapshot; return what has to be there.

        The data is written to the snapshot while the origin is suspended, so that the snapshot
        holds nothing else; what fio writes while it is merged goes past it.
        """
        with open(f"{self.folder}/new.cow", "wb") as file:
            file.truncate(SIZE)
        with self.suspended():
            expected = bytearray(self.image.read_bytes()[HALF:])
            self.dm("create", "new", "--table", self.line("new"))
            client = Client(self.address)
            client.go("new")
            places = [(dice.randrange((HALF - WRITTEN) // SECTOR), WRITTEN // 4 // SECTOR)]
            places += [(dice.randrange(HALF // SECTOR - 64), 16) for _ in range(WRITTEN // 8192)]
            for sector, count in places:
                data = stamp(SECTORS // 2 + sector, count, tag)
                at = sector * SECTOR
                assert client.ask(WRITE, HALF + at, len(data), data) == (0, b"")
                expected[at : at + len(data)] = data
            client.close()
            self.dm("remove", "--retry", "new")
            self.dm("load", "base", "--table", self.line("new", "snapshot-merge"))
        self.watch_merge()
        with self.suspended():
            self.dm("load", "base", "--table", self.origin_line)
        return bytes(expected)

    def watch_merge(self) -> None:
        """Look at the status until all is merged; there is less and less to do."""
        last = None
        while True:
            _, _, _, used, metadata = self.control.call("status", name="base").split(" ")
            allocated = int(used.split("/")[0])
            assert last is None or allocated <= last
            if allocated == int(metadata):
                return
            self.under_way += allocated != last
            last = allocated

    def cycle(self, dice: random.Random) -> None:
        """Take a snapshot, copy it, merge another one beside it, copy it again, remove it."""
        tag = self.cycles = self.cycles + 1
        frozen = self.snapshot("old", dice.choice([8, 16, 64]))
        assert self.copy("old") == frozen
        later = self.snapshot("later")
        reader = threading.Thread(target=self.copy, args=("later",))
        reader.start()
        expected = self.merge(dice, tag)
        reader.join()
        assert self.copy("base")[HALF:] == expected
        assert self.copy("later") == later
        self.drop("later")
        assert self.copy("old") == frozen
        self.drop("old")

    def fio(self, name: str, offset: int, *more: str) -> subprocess.Popen[str]:
        """Start a fio that writes a quarter of the origin and verifies it."""
        words = ["fio", f"--name={name}", "--ioengine=nbd", f"--uri={self.uri('base')}"]
        words += [f"--offset={offset}", f"--size={QUARTER}", "--iodepth=16", "--minimal"]
        words += ["--verify=crc32c", "--verify_fatal=1", "--rw=randwrite", *more]
        return subprocess.Popen(
            words, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )


def finish(process: subprocess.Popen[str]) -> None:
    """Wait for a fio; what it verified was right."""
    out, _ = process.communicate(timeout=RUNTIME + 120)
    assert process.returncode == 0, out


@pytest.mark.parametrize("durability", ["process", "power"])
def test_nothing_is_lost_while_snapshots_come_and_go(durability, tmp_path, seed):
    need("fio", "nbdcopy", "qemu-img")
    print("seed", seed)
    dice = random.Random(f"{seed} {durability}")
    live = Live(tmp_path, durability)
    over = threading.Event()
    loops: list[int] = []
    failed: list[BaseException] = []

    def verify_again_and_again() -> None:
        """Run fio from the first write to the last verified block, then again."""
        try:
            while not over.is_set():
                finish(live.fio("loop", QUARTER, "--bs=512-32k", "--loops=1"))
                loops.append(1)
        except BaseException as error:
            failed.append(error)

    steady = live.fio(
        *("steady", 0, "--bs=4k", "--time_based", f"--runtime={RUNTIME}"),
        *("--verify_backlog=512", "--rate_iops=4000"),
    )
    looping = threading.Thread(target=verify_again_and_again)
    looping.start()
    try:
        end = time.monotonic() + RUNTIME
        while time.monotonic() < end and not failed and steady.poll() is None:
            live.cycle(dice)
    finally:
        over.set()
        looping.join()
        finish(steady)
    assert not failed, failed
    assert live.cycles
    assert loops
    out = run("qemu-img", "compare", "-f", "raw", "-F", "raw", live.uri("base"), str(live.image))
    assert "identical" in out
    live.control.close()
    status, logged = live.daemon.stop()
    assert status == 0
    assert "Traceback" not in logged
    print(f"{live.cycles} cycles, {len(loops)} loops of fio, {live.under_way} looks at merges")
