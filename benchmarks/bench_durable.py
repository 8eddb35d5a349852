"""Durability "power": what waits for a disk, on a disk, beside as many plain barriers.

Every first write has to be on the disk before the origin changes, in two steps: the copy, then its
record. One pair of barriers serves a whole batch, and writers on other threads.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from suite.baselines import make_file, stamp
from suite.devices import BLOCK, Stand, offsets
from suite.race import Entrant, absent, limit, other, together

import cow

SECTION = "Durable: through a power cut"
WRITERS = 8


def kind_of(folder: Path) -> str:
    """Return the type of the file system a folder is on."""
    command = ["stat", "--file-system", "--format", "%T", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@dataclass
class Images:
    """An origin and a store on a disk, both with all their blocks; and a plain file there."""

    stand: Stand
    numbers: np.ndarray
    data: np.ndarray
    plain: int  # file descriptor
    kind: str

    def prepare(self) -> None:
        """Take a fresh snapshot."""
        self.stand.drop("snap")
        self.stand.used_snapshot("snap", self.numbers.size)

    def one_by_one(self, numbers: np.ndarray) -> Callable[[], object]:
        """Return a function that writes these blocks, each with a call of its own."""
        base, data = self.stand.base, self.data[0]
        places = [int(number) * BLOCK for number in numbers]
        return lambda: [base.pwrite(data, place) for place in places]

    def barriers(self, count: int, blocks: int) -> Callable[[], object]:
        """Return a function: `count` times, write so many blocks and their records, each synced."""
        data = self.data[:blocks].tobytes()

        def run() -> None:
            for _ in range(count):
                os.pwrite(self.plain, data, BLOCK)
                os.fdatasync(self.plain)
                os.pwrite(self.plain, data[:BLOCK], 0)
                os.fdatasync(self.plain)

        return run

    def without_disk(self, entrant: Entrant) -> Entrant:
        """Return the entrant, absent where this is no disk: a ratio would say nothing."""
        if self.kind not in ("tmpfs", "ramfs"):
            return entrant
        return absent(entrant.name, f"{self.kind} is no disk; --disk names a folder", entrant.role)


@pytest.fixture
def images(disk_images, scale) -> Iterator[Images]:
    count = max(scale.disk_batch, WRITERS * scale.disk_calls)
    numbers = np.random.default_rng(17).permutation(4 * count)[:count]
    data = np.full((count, BLOCK), 0x5A, np.uint8)
    stamp(make_file(disk_images / "plain", (1 + count) * BLOCK))
    plain = os.open(disk_images / "plain", os.O_RDWR)
    try:
        with cow.Mapper(durability="power") as dm:
            stand = Stand(dm, disk_images, 4 * count * BLOCK)
            yield Images(stand, numbers, data, plain, kind_of(disk_images))
    finally:
        os.close(plain)


def test_batch(race, images, scale):
    """One `write_many` of first writes beside one `pwrite` for each."""
    size, calls = scale.disk_batch, scale.disk_calls
    at, data = offsets(images.numbers[:size]), images.data[:size]
    one_by_one = other(
        "cow, one by one", images.one_by_one(images.numbers[:calls]), images.prepare, count=calls
    )
    race(
        "a batch of first writes, durable",
        lambda: images.stand.base.write_many(at, data),
        images.without_disk(one_by_one),
        limit("pwrite + fdatasync, twice", images.barriers(1, size)),
        count=size,
        unit="request",
        prepare=images.prepare,
    )


def test_writers(race, images, scale):
    """Eight threads with first writes of one block, beside one thread."""
    calls = scale.disk_calls
    parts = np.split(images.numbers[: WRITERS * calls], WRITERS)
    one = other("cow, one writer", images.one_by_one(parts[0]), images.prepare, count=calls)
    syncs = limit("pwrite + fdatasync, twice, for each", images.barriers(calls, 1))
    race(
        f"first writes by {WRITERS} threads, durable",
        together(*map(images.one_by_one, parts)),
        images.without_disk(one),
        replace(syncs, count=calls),
        count=WRITERS * calls,
        unit="request",
        prepare=images.prepare,
    )


def test_flush(race, images, scale):
    """Rewrites, each with a flush, beside `os.pwrite` with `fdatasync`."""
    calls = scale.disk_calls
    base, data = images.stand.base, images.data[0]
    places = [int(number) * BLOCK for number in images.numbers[:calls]]
    images.prepare()
    images.one_by_one(images.numbers[:calls])()

    def ours() -> None:
        for place in places:
            base.pwrite(data, place)
            base.flush()

    def baseline() -> None:
        for place in places:
            os.pwrite(images.plain, data, place % (images.numbers.size * BLOCK))
            os.fdatasync(images.plain)

    race(
        "rewrites with a flush each, durable",
        ours,
        limit("pwrite + fdatasync", baseline),
        count=calls,
        unit="request",
    )


def test_in_memory(race, tmp_images, scale):
    """What the barriers themselves cost where nothing waits: "power" beside "process"."""
    numbers = np.random.default_rng(18).permutation(4 * scale.some)[: scale.some]
    at, data = offsets(numbers), np.full((scale.some, BLOCK), 0x5A, np.uint8)
    stands = {}
    with cow.Mapper(durability="power") as dm, cow.Mapper(durability="process") as second:
        for name, mapper in (("power", dm), ("process", second)):
            (tmp_images / name).mkdir()
            stands[name] = Stand(mapper, tmp_images / name, 4 * scale.some * BLOCK)

        def prepare(name: str) -> Callable[[], None]:
            def fresh() -> None:
                stands[name].drop("snap")
                stands[name].used_snapshot("snap", scale.some)

            return fresh

        race(
            "first writes 4 KiB, durable, images in memory",
            lambda: stands["power"].base.write_many(at, data),
            other(
                'cow, durability "process"',
                lambda: stands["process"].base.write_many(at, data),
                prepare("process"),
            ),
            count=numbers.size,
            unit="/chunk",
            prepare=prepare("power"),
        )
