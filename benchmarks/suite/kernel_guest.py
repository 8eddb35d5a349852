"""The work of bench_kernel.py on the kernel's device-mapper, run inside User Mode Linux.

Its disk is memory of the guest (brd), so that no request leaves the kernel; fio gives it 32
requests at a time, in batches, which is what it is fastest with. Prints the costs as JSON.

    kernel_guest.py FOLDER SIZE COUNT…      FOLDER has the agent, guest.py; SIZE is bytes of the
                                            origin; each COUNT is a number of snapshots
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

sys.path.insert(0, sys.argv[1])
import guest

SECTOR = 512
BLOCK = 4096
CHUNK_SIZE = 8
PER_AREA = CHUNK_SIZE * SECTOR // 16
RAM = "1:0"
MERGE_SECONDS = 60
BATCHES = ("--iodepth=32", "--iodepth_batch_submit=32", "--iodepth_batch_complete_max=32")


class Bench:
    """An origin on the guest's memory disk, and room behind it for as many stores."""

    def __init__(self, size: int, counts: list[int]) -> None:
        self.size = size
        self.sectors = size // SECTOR
        chunks = size // BLOCK
        self.store_sectors = (chunks + chunks // PER_AREA + 4) * CHUNK_SIZE
        total = self.sectors + max(counts) * self.store_sectors
        module = f"/usr/lib/uml/modules/{os.uname().release}/kernel/drivers/block/brd.ko"
        file = os.open(module, os.O_RDONLY)
        options = f"rd_nr=1 rd_size={total * SECTOR // 1024 + 1}".encode()
        guest.check(guest.libc.syscall(guest.FINIT_MODULE, file, options, 0), "insmod brd")
        os.close(file)
        self.control = guest.Control()
        self.create("real", f"0 {self.sectors} linear {RAM} 0")
        for n in range(max(counts)):
            start = self.sectors + n * self.store_sectors
            self.create(f"cow{n}", f"0 {self.store_sectors} linear {RAM} {start}")
            self.write_all(f"cow{n}")  # brd has its pages after this
        self.write_all("real")
        self.create("base", f"0 {self.sectors} snapshot-origin {self.number('real')}")

    def create(self, name: str, table: str) -> None:
        self.control.call(guest.CREATE, name)
        self.control.load(name, table)
        self.control.call(guest.SUSPEND, name)

    def number(self, name: str) -> str:
        info = self.control.call(guest.STATUS, name)
        return f"{info.major}:{info.minor}"

    def path(self, name: str) -> str:
        return f"/dev/dm-{self.control.call(guest.STATUS, name).minor}"

    def write_all(self, name: str) -> None:
        piece = b"\x5a" * (1 << 20)
        with open(self.path(name), "r+b", buffering=0) as disk:
            size = disk.seek(0, os.SEEK_END)
            disk.seek(0)
            for start in range(0, size, len(piece)):
                disk.write(piece[: size - start])
            os.fsync(disk.fileno())

    def fio(self, name: str, rw: str) -> float:
        """Read or write each block of a device once, at random; return seconds a block."""
        words = ["fio", "--name=job", "--ioengine=io_uring", "--direct=1", f"--bs={BLOCK}"]
        words += [f"--rw={rw}", f"--filename={self.path(name)}", f"--size={self.size}"]
        words += [*BATCHES, "--gtod_reduce=1", "--output-format=json"]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        report = done.stdout[done.stdout.find("{") :]
        assert done.returncode == 0, done.stderr
        assert report, done.stdout
        (result,) = json.loads(report)["jobs"]
        way = result["read" if "read" in rw else "write"]
        return max(1, way["runtime"]) / 1000 / way["total_ios"]

    def take(self, n: int) -> float:
        """Take a snapshot into a fresh store; return the seconds from suspend to resume."""
        with open(self.path(f"cow{n}"), "r+b", buffering=0) as disk:
            disk.write(bytes(BLOCK))
            os.fsync(disk.fileno())
        start = time.perf_counter()
        self.control.call(guest.SUSPEND, "base", flags=guest.SUSPENDED)
        self.create(f"snap{n}", self.table("snapshot", n))
        self.control.call(guest.SUSPEND, "base")
        return time.perf_counter() - start

    def table(self, target: str, n: int) -> str:
        devices = f"{self.number('real')} {self.number(f'cow{n}')}"
        return f"0 {self.sectors} {target} {devices} P {CHUNK_SIZE}"

    def drop(self, count: int) -> None:
        for n in range(count):
            self.control.call(guest.REMOVE, f"snap{n}")

    def merge(self) -> float:
        """Merge snapshot 0 back; return seconds a block, from the resume to the last status."""
        self.control.call(guest.SUSPEND, "base", flags=guest.SUSPENDED)
        self.drop(1)
        self.control.load("base", self.table("snapshot-merge", 0))
        start = time.perf_counter()
        self.control.call(guest.SUSPEND, "base")
        while True:
            used, metadata = self.control.lines("base")[0].split()[3:5]
            if used.partition("/")[0] == metadata:
                break
            assert time.perf_counter() - start < MERGE_SECONDS, used
            time.sleep(0.0005)
        seconds = time.perf_counter() - start
        self.control.load("base", f"0 {self.sectors} snapshot-origin {self.number('real')}")
        self.control.call(guest.SUSPEND, "base", flags=guest.SUSPENDED)
        self.control.call(guest.SUSPEND, "base")
        return seconds / (self.size // BLOCK)


def main() -> None:
    size, counts = int(sys.argv[2]), [int(word) for word in sys.argv[3:]]
    bench = Bench(size, counts)
    costs = {"linear write": bench.fio("real", "randwrite")}
    costs["linear read"] = bench.fio("real", "randread")
    for count in counts:
        created = [bench.take(n) for n in range(count)]
        if count == 1:
            costs["create"] = created[0]
            costs["read untouched"] = bench.fio("snap0", "randread")
        costs[f"first {count}"] = bench.fio("base", "randwrite")
        costs[f"rewrite {count}"] = bench.fio("base", "randwrite")
        if count == 1:
            costs["read copied"] = bench.fio("snap0", "randread")
            costs["merge"] = bench.merge()
        else:
            bench.drop(count)
    bench.take(0)
    costs["snapshot first"] = bench.fio("snap0", "randwrite")
    costs["snapshot rewrite"] = bench.fio("snap0", "randwrite")
    bench.drop(1)
    print(json.dumps(costs))
    bench.control.clean()
    del bench
    guest.check(guest.libc.syscall(176, b"brd", os.O_NONBLOCK), "rmmod brd")


if __name__ == "__main__":
    main()
