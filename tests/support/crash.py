"""Power cuts and kills: what a disk may hold after a cut, and a program to be killed at any moment.

A disk is recorded through the log-writes target. After a power cut each of its sectors holds what
was durable, or any of the versions written since the last flush of a range with that sector in it,
whatever its neighbours hold: every prefix, every subset and every tear at 512 bytes.

As a program (`python -m support.crash`) this is the nursery of the process tests: it forks a child
for each line on its standard input, which works on snapshots until it is killed.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import random
import signal
import struct
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from . import SECTOR

FLUSH, FUA, DISCARD, MARK = 1, 2, 4, 8
LOG_END = "dm-log-writes-end"
PAGE = 4096

LONG = int(os.environ.get("COW_LONG") or 0)
"""How many times as long the tests of crashes and faults take; 0 is the default suite."""


# --- the log, in the kernel's format ------------------------------------------------------------


class Entry(NamedTuple):
    """One entry of a dm-log-writes log. A flush of a part of the disk names its `length`."""

    sector: int
    count: int
    flags: int
    length: int
    data: bytes

    @property
    def text(self) -> str:
        return self.data[: self.length].decode() if self.flags & MARK else ""


def read_log(path: str | Path) -> list[Entry]:
    """Read a log as a stock tool does, and check what such a tool checks."""
    log = Path(path).read_bytes()
    magic, version, count, block = struct.unpack_from("<QQQI", log)
    assert (magic, version, block) == (0x6A736677736872, 1, SECTOR)
    entries = []
    at = block
    for _ in range(count):
        sector, blocks, flags, length = struct.unpack_from("<QQQQ", log, at)
        assert flags or blocks
        assert flags == MARK or log[at + 32] == 0
        data = log[at + 32 : at + block] if flags & MARK else b""
        at += block
        if not flags & DISCARD:
            data = data or log[at : at + blocks * block]
            at += blocks * block
        entries.append(Entry(sector, blocks, flags, length, data))
    return entries


# --- the disk -----------------------------------------------------------------------------------


class Disk:
    """What was durable, and what each sector may hold instead."""

    def __init__(self, contents: bytes) -> None:
        self.durable = bytearray(contents)
        self.pending: dict[int, list[bytes]] = {}

    def write(self, sector: int, data: bytes) -> None:
        for i in range(0, len(data), SECTOR):
            at = sector + i // SECTOR
            new = data[i : i + SECTOR]
            versions = self.pending.setdefault(at, [bytes(self.sector(at))])
            if new in versions:
                versions.remove(new)
            versions.append(new)
            if len(versions) == 1:
                del self.pending[at]

    def flush(self, sector: int, count: int) -> None:
        for at in [each for each in self.pending if sector <= each < sector + count]:
            self.durable[at * SECTOR : (at + 1) * SECTOR] = self.pending.pop(at)[-1]

    def sector(self, at: int) -> bytes:
        return self.durable[at * SECTOR : (at + 1) * SECTOR]

    @property
    def nr_states(self) -> int:
        return math.prod(map(len, self.pending.values()))

    def states(self, most: int, rng: random.Random) -> Iterator[bytes]:
        """Yield every state, or a choice of `most` where there are more.

        The choice: nothing and all of what is pending, each single sector new, each single sector
        old, the prefixes in order of sectors, and random ones.
        """
        sectors = sorted(self.pending)
        versions = [self.pending[at] for at in sectors]
        if self.nr_states <= most:
            yield from (self._with(sectors, each) for each in itertools.product(*versions))
            return
        old = [each[0] for each in versions]
        new = [each[-1] for each in versions]
        likely = [old, new]
        for i in range(len(sectors)):
            likely.append([*old[:i], new[i], *old[i + 1 :]])
            likely.append([*new[:i], old[i], *new[i + 1 :]])
            likely.append([*new[:i], *old[i:]])
            likely.append([*old[:i], *new[i:]])
        rng.shuffle(likely)
        likely = likely[: most // 2]
        likely += [[rng.choice(each) for each in versions] for _ in range(most - len(likely))]
        yield from (self._with(sectors, each) for each in likely)

    def _with(self, sectors: list[int], contents: Any) -> bytes:
        disk = bytearray(self.durable)
        for at, data in zip(sectors, contents, strict=True):
            disk[at * SECTOR : (at + 1) * SECTOR] = data
        return bytes(disk)


@dataclass
class Cuts:
    """The states visited so far, and whether they were all there are."""

    most: int
    rng: random.Random
    visited: int = 0
    all_of_them: bool = True
    seen: set[bytes] = field(default_factory=set)

    def of(self, before: bytes, entries: list[Entry]) -> Iterator[tuple[str, bytes]]:
        """Yield (last mark, contents) for every state a cut during the recorded program can leave.

        Between two flushes the pending writes only become more, so the states before each flush
        hold all those of the cuts before it; marks count as flushes do, because what may be lost
        changes there.
        """
        disk = Disk(before)
        mark = ""
        for entry in entries:
            if entry.flags & (FLUSH | MARK):
                yield from self._cut(disk, mark)
            if entry.text == LOG_END:
                return
            if entry.flags & MARK:
                mark = entry.text
            elif entry.flags & FLUSH:
                end = entry.sector + -(-entry.length // SECTOR) if entry.length else math.inf
                disk.flush(entry.sector, end - entry.sector)
            elif entry.flags & DISCARD:
                disk.write(entry.sector, bytes(entry.count * SECTOR))
            else:
                disk.write(entry.sector, entry.data)
        yield from self._cut(disk, mark)

    def _cut(self, disk: Disk, mark: str) -> Iterator[tuple[str, bytes]]:
        self.all_of_them &= disk.nr_states <= self.most
        for state in disk.states(self.most, self.rng):
            key = hashlib.blake2b(mark.encode() + state, digest_size=16).digest()
            if key not in self.seen:
                self.seen.add(key)
                self.visited += 1
                yield mark, state


# --- what may be read afterwards ----------------------------------------------------------------


class Content:
    """What a device shows, and what each of its sectors may show instead after a power cut."""

    def __init__(self, data: bytes) -> None:
        self.now = bytearray(data)
        self.old: dict[int, set[bytes]] = {}
        self.may_be_invalid = False

    def write(self, offset: int, data: bytes) -> None:
        """Write bytes: until a flush, the sectors they touch may show what they did before."""
        first, end = offset // SECTOR, -(-(offset + len(data)) // SECTOR)
        for at in range(first, end):
            self.old.setdefault(at, set()).add(bytes(self.now[at * SECTOR : (at + 1) * SECTOR]))
        self.now[offset : offset + len(data)] = data

    def flush(self) -> None:
        self.old.clear()

    def copy(self) -> Content:
        other = Content(self.now)
        other.old = {at: set(versions) for at, versions in self.old.items()}
        other.may_be_invalid = self.may_be_invalid
        return other

    def wrong(self, data: bytes) -> list[int]:
        """Return the sectors of `data` that hold what they may not."""
        if data == self.now:
            return []
        assert len(data) == len(self.now)
        found = []
        for at in range(len(data) // SECTOR):
            sector = data[at * SECTOR : (at + 1) * SECTOR]
            if sector != self.now[at * SECTOR : (at + 1) * SECTOR] and sector not in self.old.get(
                at, ()
            ):
                found.append(at)
        return found


# --- children that are killed -------------------------------------------------------------------

ORIGIN_SECTORS = 1024
COW_SECTORS = 2048
CHUNKS = {"snap0": 8, "snap1": 16}


class Work(NamedTuple):
    """What one child does: `operations(work)` tells it to the child and to its judge alike."""

    seed: int
    folder: str
    durability: str
    merging: bool
    stream: str = "all"  # or "origin", "snapshots": one of two threads at work


class Operation(NamedTuple):
    kind: str
    device: str = ""
    writes: tuple[tuple[int, bytes], ...] = ()


def operations(work: Work) -> Iterator[Operation]:
    """Generate what the child does, from its seed; it ends only after a merge."""
    rng = random.Random(f"{work.seed}/{work.stream}")
    merging = work.merging
    targets = {"all": ["base", "snap0", "snap1"], "origin": ["base"]}.get(
        work.stream, ["snap0", "snap1"]
    )
    if merging:
        targets.remove("snap0")
    for number in itertools.count():
        dice = rng.random()
        device = rng.choice(targets)
        if dice < 0.8:
            writes = tuple(_write(rng) for _ in range(rng.choice((1, 1, 1, 2, 5))))
            if len(writes) > 1:
                size = min(len(data) for _, data in writes)
                writes = tuple((offset, data[:size]) for offset, data in writes)
            yield Operation("write", device, writes)
        elif dice < 0.88:
            yield Operation("flush", device)
        elif dice < 0.96 or work.stream != "all":
            yield Operation("suspend" if merging and device == "base" else "reload", device)
        elif merging:
            yield Operation("finish")
            return
        elif number > 30:
            yield Operation(rng.choice(("merge", "handover")))
            merging = True
            targets.remove("snap0")


def _write(rng: random.Random) -> tuple[int, bytes]:
    size = rng.choice((1, 8, 8, 16, 24, 64)) * SECTOR
    if rng.random() < 0.1:
        size = rng.randrange(1, 5000)
    offset = rng.randrange(0, ORIGIN_SECTORS * SECTOR - size)
    if rng.random() < 0.8:
        offset -= offset % SECTOR
    return offset, rng.randbytes(16) * (size // 16) + bytes(size % 16)


def table_of(work: Work, device: str) -> str:
    """Return the table a device of the child has."""
    line = f"0 {ORIGIN_SECTORS}"
    if device == "base-real":
        return f"{line} linear {work.folder}/origin.img 0"
    cow = f"base-real {work.folder}/{device}.cow P {CHUNKS.get(device)}"
    if device == "base":
        if work.merging:
            return f"{line} snapshot-merge base-real {work.folder}/snap0.cow P 8"
        return f"{line} snapshot-origin base-real"
    return f"{line} snapshot {cow}"


def devices_of(work: Work) -> list[str]:
    """Return the devices the child has, in the order in which they are made."""
    snapshots = ["snap1"] if work.merging else ["snap0", "snap1"]
    return ["base-real", *snapshots, "base"]


def open_store(dm: Any, work: Work) -> None:
    """Open the store of snap0, a file that grows as it fills."""
    dm.image(f"{work.folder}/snap0.cow", size=COW_SECTORS * SECTOR)


def open_devices(dm: Any, work: Work) -> None:
    open_store(dm, work)
    for name in devices_of(work):
        dm.create(name, table_of(work, name))


def run(dm: Any, work: Work, ack: Callable[[int], object]) -> None:
    """Do the work, and acknowledge each operation by its number."""
    for number, operation in enumerate(operations(work)):
        kind, name, writes = operation
        if kind == "write":
            device = dm.device(name)
            if len(writes) == 1:
                device.pwrite(writes[0][1], writes[0][0])
            else:
                import numpy as np

                device.write_many(
                    [offset for offset, _ in writes],
                    np.stack([np.frombuffer(data, "u1") for _, data in writes]),
                )
        elif kind == "flush":
            dm.device(name).flush()
        elif kind == "suspend":
            dm.suspend(name)
            dm.resume(name)
        elif kind == "reload":
            dm.load(name, table_of(work, name))
            dm.suspend(name)
            dm.resume(name)
        elif kind in ("merge", "handover"):
            work = work._replace(merging=True)
            if kind == "merge":
                dm.suspend("base")
                dm.remove("snap0")
                dm.load("base", table_of(work, "base"))
            else:
                dm.load("base", table_of(work, "base"))
                dm.suspend("base")
                dm.suspend("snap0")
            dm.resume("base")
        else:
            dm.wait_merge("base")
            dm.load("base", table_of(work._replace(merging=False), "base"))
            dm.suspend("base")
            dm.resume("base")
        ack(number)


def child(work: Work) -> None:
    """Work until killed. Standard output carries the pid and the acknowledgements."""
    import cow

    os.write(1, f"{os.getpid()}\n".encode())
    with cow.Mapper(durability=work.durability) as dm:
        open_devices(dm, work)
        os.write(1, b"ready\n")
        streams = ["all"] if work.stream == "all" else ["origin", "snapshots"]
        threads = [threading.Thread(target=stream, args=(dm, work, name)) for name in streams]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def stream(dm: Any, work: Work, name: str) -> None:
    """Do the work of one thread; a failure ends the child."""
    try:
        run(dm, work._replace(stream=name), lambda n: os.write(1, f"{name} {n}\n".encode()))
    except BaseException:
        traceback.print_exc()
        os._exit(1)


class Nursery:
    """The process whose children are killed."""

    def __init__(self) -> None:
        import cow

        paths = [str(Path(__file__).parent.parent), str(Path(cow.__file__).parent.parent)]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "support.crash"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )

    def kill_one(self, work: Work, after: int, spin: int) -> tuple[dict[str, int], str]:
        """Let a child work, and kill it `spin` turns of a loop after so many words of it.

        Return the last acknowledged number of each stream (-1: none), and how the child ended:
        "killed", "done", or with which status.
        """
        acked = {"all": -1, "origin": -1, "snapshots": -1}
        self._send(json.dumps(work))
        pid = int(self._line())
        heard = 0
        while True:
            if heard == after:
                for _ in range(spin):
                    pass
                os.kill(pid, signal.SIGKILL)
            word, _, number = self._line().partition(" ")
            heard += 1
            if word == "ended":
                self._send("reap")
                return acked, number
            if word in acked:
                acked[word] = int(number)

    def _send(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().decode()
        assert line, "the nursery has gone"
        return line.rstrip("\n")

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


def main() -> None:
    import numpy  # noqa: F401

    import cow  # noqa: F401

    while line := sys.stdin.readline():
        pid = os.fork()
        if pid == 0:
            try:
                child(Work(*json.loads(line)))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        # Told before it is reaped, so that nobody kills another process of its number.
        end = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        status = -end.si_status if end.si_code != os.CLD_EXITED else end.si_status
        how = {-9: "killed", 0: "done"}.get(status, f"status {status}")
        os.write(1, f"ended {how}\n".encode())
        sys.stdin.readline()
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
