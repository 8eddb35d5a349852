"""The kernel's own dm-snapshot, run as a process (User Mode Linux), on the same work.

Under UML a system call and a page fault cost more than on the machine itself, so two figures stand
side by side: what a block costs here and there, and what it costs over a linear device of the same
kernel, or of ours. Images are in memory, with all their pages; kernel and `cow` take turns.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from kernel.uml import HERE as AGENT
from kernel.uml import PYTHON, Kernel, KernelError, missing, scratch
from suite.devices import BLOCK, Stand, offsets
from suite.results import COW, PEER, Figures, Point
from suite.scale import MIB, Scale

import cow

SECTION = "Beside the kernel"
GUEST = Path(__file__).parents[1] / "suite" / "kernel_guest.py"
GUEST_SECONDS = 600
MERGE_SECONDS = 60
KERNEL = "Linux under UML"


def of(count: str) -> str:
    return {"0": "no snapshot", "1": "1 snapshot"}.get(count, f"{count} snapshots")


def title(key: str) -> str:
    """Return what a key of the guest's answer stands for."""
    work, _, count = key.rpartition(" ")
    if count.isdigit():
        return f"{'first writes' if work == 'first' else 'rewrites'} on an origin with {of(count)}"
    return {
        "linear write": "writes to a linear device",
        "linear read": "reads of a linear device",
        "create": "create a snapshot",
        "read untouched": "reads of a snapshot, untouched",
        "read copied": "reads of a snapshot, all of it copied",
        "merge": "merge random exceptions",
        "snapshot first": "first writes on the snapshot",
        "snapshot rewrite": "rewrites on the snapshot",
    }[key]


class Ours:
    """The same work on `cow`, in this process: whole batches of random blocks."""

    def __init__(self, stand: Stand) -> None:
        self.stand = stand
        self.linear = stand.linear()
        blocks = stand.size // BLOCK
        self.at = offsets(np.random.default_rng(31).permutation(blocks))
        self.again = np.random.default_rng(32).permutation(self.at)
        self.data = np.full((blocks, BLOCK), 0x5A, np.uint8)
        self.write(self.linear, self.at)  # its memory and the image's are mapped after this

    def seconds(self, work: Callable[[], object]) -> float:
        """Return what a block costs."""
        start = time.perf_counter()
        work()
        return (time.perf_counter() - start) / len(self.data)

    def write(self, device: cow.Device, at: np.ndarray) -> float:
        return self.seconds(lambda: device.write_many(at, self.data))

    def read(self, device: cow.Device) -> float:
        return self.seconds(lambda: device.read_many(self.again, BLOCK, out=self.data))

    def take(self, n: int) -> None:
        self.stand.used_snapshot(f"snap{n}", len(self.data))

    def create(self) -> float:
        """Take snapshot 0 again, into the store it had; return the seconds."""
        self.take(0)
        self.stand.drop("snap0")
        self.stand.wipe("snap0")
        start = time.perf_counter()
        self.stand.take("snap0")
        return time.perf_counter() - start

    def merge(self) -> float:
        dm, table = self.stand.dm, self.stand.table("snap0").replace("snapshot", "snapshot-merge")
        dm.suspend("base")
        dm.remove("snap0")
        dm.load("base", table)

        def run() -> None:
            dm.resume("base")
            assert dm.wait_merge("base", MERGE_SECONDS)

        cost = self.seconds(run)
        dm.suspend("base")
        dm.load("base", f"0 {self.stand.sectors} snapshot-origin {self.stand.image}")
        dm.resume("base")
        return cost

    def round(self, counts: tuple[int, ...]) -> dict[str, float]:
        """Do what the guest does, in its order; return the costs by its keys."""
        base, linear, dm = self.stand.base, self.linear, self.stand.dm
        costs = {"linear write": self.write(linear, self.at), "linear read": self.read(linear)}
        for count in counts:
            names = [f"snap{n}" for n in range(count)]
            if count == 1:
                costs["create"] = self.create()
                costs["read untouched"] = self.read(dm.device("snap0"))
            else:
                for n in range(count):
                    self.take(n)
            costs[f"first {count}"] = self.write(base, self.at)
            costs[f"rewrite {count}"] = self.write(base, self.again)
            if count == 1:
                costs["read copied"] = self.read(dm.device("snap0"))
                costs["merge"] = self.merge()
            self.stand.drop(*names)
        self.take(0)
        costs["snapshot first"] = self.write(dm.device("snap0"), self.at)
        costs["snapshot rewrite"] = self.write(dm.device("snap0"), self.again)
        self.stand.drop("snap0")
        return costs


def kernel_round(kernel: Kernel, scale: Scale) -> dict[str, float]:
    words = [PYTHON, "-I", "-S", str(GUEST), str(AGENT), str(scale.kernel_size)]
    step = ["run", *words, *map(str, scale.kernel_snapshots)]
    (answer,) = kernel.run({}, [step], seconds=GUEST_SECONDS, clean=False)
    status, said, error = answer["out"]
    if status != "0":
        raise KernelError(f"{GUEST.name}: {said}{error}")
    found: dict[str, float] = json.loads(said)
    return found


def both(scale: Scale, folder: Path) -> tuple[list[dict[str, float]], list[dict[str, float]], str]:
    """Return the rounds of ours, those of the kernel, and why it has none."""
    reason = missing()
    ours: list[dict[str, float]] = []
    theirs: list[dict[str, float]] = []
    with cow.Mapper(durability="process") as dm:
        bench = Ours(Stand(dm, folder, scale.kernel_size))
        if reason:
            return (
                [bench.round(scale.kernel_snapshots) for _ in range(scale.peer_rounds)],
                [],
                reason,
            )
        memory = (max(scale.kernel_snapshots) + 2) * scale.kernel_size * 9 // 8 + 256 * MIB
        with scratch() as place, Kernel(place, memory // MIB * MIB) as kernel:
            for _ in range(scale.peer_rounds):
                theirs.append(kernel_round(kernel, scale))
                ours.append(bench.round(scale.kernel_snapshots))
    return ours, theirs, ""


def test_kernel(record, new_folder, scale):
    """Every kind of work, ours and the kernel's; and what it costs over a linear device."""
    with new_folder() as folder:
        ours, theirs, reason = both(scale, folder)
    for key in ours[0]:
        what = title(key)
        figures = [
            Figures("cow", COW, [costs[key] for costs in ours]),
            Figures(KERNEL, PEER, [costs[key] for costs in theirs], missing=reason),
        ]
        record(f"kernel: {what}", "" if key == "create" else "/chunk", figures)
        if key in ("create", "merge") or key.startswith("linear"):
            continue
        linear = "linear read" if key.startswith("read") else "linear write"
        count = key.split()[-1]
        point = None
        if count.isdigit():
            line = "first writes" if key.startswith("first") else "rewrites"
            point = Point("kernel", line, int(count))
        record(
            f"kernel: {what}, over a linear device",
            "× linear",
            [
                Figures("cow", COW, [costs[key] / costs[linear] for costs in ours]),
                Figures(
                    KERNEL, PEER, [costs[key] / costs[linear] for costs in theirs], missing=reason
                ),
            ],
            point,
        )
