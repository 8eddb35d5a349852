"""How cost grows: with the image, its exceptions, the chunks, and fragmentation.

The work is the same at every point; only one thing changes. What does not depend on it shows as a
level line. (What several snapshots cost is in bench_snapshots.py.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
from suite.baselines import (
    MappedFile,
    data_chunks,
    gather,
    make_file,
    make_store,
    stamp,
)
from suite.devices import BLOCK, CHUNK_SIZE, SECTOR, Stand, break_all, offsets
from suite.race import limit
from suite.results import Point
from suite.scale import MIB, amount

import cow

SECTION = "How cost grows"


def plain_file(folder, size: int) -> MappedFile:
    """Return a new mapped file, all of it with pages."""
    path = make_file(folder / "plain.cow", size)
    stamp(path)
    return MappedFile(path)


# ---------------------------------------------------------------- the size of the image


@dataclass
class Sized:
    """A sparse image of some size, and blocks all over it."""

    stand: Stand
    plain: np.ndarray
    plain_store: np.ndarray
    numbers: np.ndarray
    data: np.ndarray
    at: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.at = offsets(self.numbers)

    def prepare(self) -> None:
        self.stand.drop("snap")
        self.stand.used_snapshot("snap", self.numbers.size)

    def prepare_store(self) -> None:
        self.prepare()
        self.stand.drop("snap")
        self.stand.wipe("snap")


@pytest.fixture(scope="module")
def sized(scale, size, new_folder) -> Iterator[Sized]:
    numbers = np.random.default_rng(21).choice(size // BLOCK, scale.some, replace=False)
    data = np.full((scale.some, BLOCK), 0x5A, np.uint8)
    with new_folder() as folder, cow.Mapper(durability="process") as dm:
        stand = Stand(dm, folder, size, sparse=True)
        stand.base.write_many(offsets(numbers), data)
        plain = MappedFile(stand.image, populate=False).blocks(BLOCK)
        plain_store = plain_file(folder, data.nbytes).blocks(BLOCK)
        yield Sized(stand, plain, plain_store, numbers, data)


def test_size_first_writes(race, sized, size):
    """First writes spread over an image of some size."""

    def baseline() -> None:
        gather(sized.plain, sized.numbers, sized.plain_store)
        sized.plain[sized.numbers] = sized.data

    race(
        f"first writes 4 KiB over {amount(size)}",
        lambda: sized.stand.base.write_many(sized.at, sized.data),
        limit("take + scatter", baseline),
        count=sized.numbers.size,
        unit="/chunk",
        prepare=sized.prepare,
        point=Point("image size", "first writes", size),
    )


def test_size_reads(race, sized, size):
    """Reads of a snapshot where all that is read is in the store."""
    out = np.zeros_like(sized.data)
    sized.prepare()
    sized.stand.base.write_many(sized.at, sized.data)
    snap = sized.stand.dm.device("snap")
    race(
        f"random 4 KiB reads of a snapshot of {amount(size)}",
        lambda: snap.read_many(sized.at, BLOCK, out=out),
        limit("numpy.take", lambda: gather(sized.plain, sized.numbers, out)),
        count=sized.numbers.size,
        unit="/chunk",
        point=Point("image size", "reads of the snapshot", size),
    )


def test_size_create(race, sized, size):
    """Suspend, create, resume: what a user waits for."""
    race(
        f"create a snapshot of {amount(size)}",
        lambda: sized.stand.take("snap"),
        count=1,
        unit="",
        repeat=5,
        prepare=sized.prepare_store,
        point=Point("image size", "create a snapshot", size),
    )


# ---------------------------------------------------------------- the number of exceptions


@dataclass
class Full:
    """A store of so many exceptions, at random in an origin four times as large."""

    dm: cow.Mapper
    table: str
    new_chunks: np.ndarray  # of each chunk of the origin; 0 where it has none
    asked: np.ndarray

    def remove(self) -> None:
        if self.dm.names():
            self.dm.remove("snap")

    def open(self) -> cow.Device:
        return self.dm.create("snap", self.table)


@pytest.fixture(scope="module")
def full(scale, exceptions, new_folder) -> Iterator[Full]:
    rng = np.random.default_rng(22)
    chunks = 4 * exceptions
    old_chunks = rng.permutation(chunks)[:exceptions].astype(np.uint64)
    new_chunks = np.zeros(chunks, np.uint64)
    new_chunks[old_chunks] = data_chunks(exceptions, CHUNK_SIZE)
    with new_folder() as folder, cow.Mapper(durability="process") as dm:
        origin = make_file(folder / "origin.img", chunks * BLOCK)
        make_store(folder / "snap.cow", old_chunks, CHUNK_SIZE)
        table = f"0 {chunks * CHUNK_SIZE} snapshot {origin} {folder / 'snap.cow'} P {CHUNK_SIZE}"
        yield Full(dm, table, new_chunks, rng.choice(old_chunks, scale.lookups))


def test_exceptions_open(race, full, exceptions):
    """Open the store."""
    race(
        f"open a store of {exceptions:,} exceptions",
        full.open,
        count=exceptions,
        unit="exception",
        prepare=full.remove,
        point=Point("exceptions", "open, for one of them", exceptions),
    )


def test_exceptions_lookup(race, full, exceptions):
    """Look chunks up, all of which are in the store."""
    full.remove()
    lookup = full.open().live.targets[0].map.lookup_many
    found = np.zeros_like(full.asked)
    race(
        f"lookups among {exceptions:,} exceptions",
        lambda: lookup(full.asked),
        limit("numpy.take of a plain array", lambda: gather(full.new_chunks, full.asked, found)),
        count=full.asked.size,
        unit="/chunk",
        point=Point("exceptions", "lookup", exceptions),
    )
    assert np.array_equal(lookup(full.asked), full.new_chunks[full.asked])


# ---------------------------------------------------------------- the size of a chunk


@dataclass
class Chunked:
    """An origin, and some of its chunks."""

    stand: Stand
    plain: np.ndarray
    plain_store: np.ndarray
    chunk_size: int
    numbers: np.ndarray

    def prepare(self) -> None:
        self.stand.drop("snap")
        self.stand.used_snapshot("snap", self.numbers.size, chunk_size=self.chunk_size)


@pytest.fixture(scope="module")
def chunked(scale, chunk_size, new_folder) -> Iterator[Chunked]:
    chunk = chunk_size * SECTOR
    with new_folder() as folder, cow.Mapper(durability="process") as dm:
        stand = Stand(dm, folder, scale.image_size)
        plain = stand.blocks(chunk)
        count = max(2, scale.some * BLOCK // chunk)
        numbers = np.random.default_rng(23).permutation(plain.shape[0])[:count]
        plain_store = plain_file(folder, count * chunk).blocks(chunk)
        yield Chunked(stand, plain, plain_store, chunk_size, numbers)


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "part"])
def test_chunk_first_writes(race, chunked, chunk_size, whole):
    """First writes of whole chunks, and of 4 KiB in each."""
    chunk = chunk_size * SECTOR
    at = offsets(chunked.numbers, chunk)
    data = np.full((at.size, chunk if whole else BLOCK), 0x5A, np.uint8)

    def baseline() -> None:
        gather(chunked.plain, chunked.numbers, chunked.plain_store)
        chunked.plain[chunked.numbers, : data.shape[1]] = data

    race(
        f"first writes of {'whole chunks' if whole else '4 KiB'}, chunks of {amount(chunk)}",
        lambda: chunked.stand.base.write_many(at, data),
        limit("take + scatter", baseline),
        count=at.size * chunk,
        prepare=chunked.prepare,
        point=Point("chunk size", f"first writes{'' if whole else ' of 4 KiB'}", chunk),
    )


def test_chunk_reads(race, chunked, scale, chunk_size):
    """Random reads of a snapshot that has some chunks in its store."""
    chunk = chunk_size * SECTOR
    blocks = chunked.stand.blocks()
    numbers = np.random.default_rng(24).integers(0, blocks.shape[0], scale.some)
    at, out = offsets(numbers), np.zeros((scale.some, BLOCK), np.uint8)
    chunked.prepare()
    some = offsets(chunked.numbers, chunk)
    chunked.stand.base.write_many(some, np.full((some.size, chunk), 0x5A, np.uint8))
    snap = chunked.stand.dm.device("snap")
    race(
        f"random 4 KiB reads of a snapshot, chunks of {amount(chunk)}",
        lambda: snap.read_many(at, BLOCK, out=out),
        limit("numpy.take", lambda: gather(blocks, numbers, out)),
        count=out.nbytes,
        point=Point("chunk size", "random 4 KiB reads", chunk),
    )


# ---------------------------------------------------------------- fragmentation


@dataclass
class Fragmented:
    """An image half of which is in the store, in runs of chunks of some length, in random order."""

    stand: Stand
    plain: np.ndarray
    shape: str


@pytest.fixture(scope="module")
def fragmented(scale, run, new_folder) -> Iterator[Fragmented]:
    blocks = scale.image_size // BLOCK
    starts = np.random.default_rng(25).permutation(blocks // run)[: max(1, blocks // run // 2)]
    numbers = (starts[:, None] * run + np.arange(run)).reshape(-1)
    with new_folder() as folder, cow.Mapper(durability="process") as dm:
        stand = Stand(dm, folder, scale.image_size)
        stand.snapshot()
        break_all(stand.base, numbers, scale.batch)
        yield Fragmented(stand, stand.blocks(MIB), f"in runs of {amount(run * BLOCK)}")


def test_fragmented_reads(race, fragmented, scale, run):
    """Read all of the snapshot, 1 MiB at a time."""
    buffer = np.zeros(MIB, np.uint8)
    snap = fragmented.stand.dm.device("snap")

    def read() -> None:
        for offset in range(0, scale.image_size, MIB):
            snap.preadinto(buffer, offset)

    def baseline() -> None:
        for row in fragmented.plain:
            np.copyto(buffer, row)

    race(
        f"read 1 MiB of a snapshot, {fragmented.shape}",
        read,
        limit("memcpy", baseline),
        count=scale.image_size,
        point=Point("fragmentation", "read 1 MiB", run),
    )


def test_fragmented_extents(race, fragmented, scale, run):
    """Ask what a part of the snapshot is made of."""
    snap = fragmented.stand.dm.device("snap")
    chunks = min(scale.calls, scale.image_size // BLOCK)
    race(
        f"extents of a snapshot, {fragmented.shape}",
        lambda: snap.extents(0, chunks * BLOCK),
        count=chunks,
        unit="/chunk",
        point=Point("fragmentation", "extents", run),
    )


def test_fragmented_create(race, fragmented, run):
    """Take a second snapshot beside the one in pieces."""
    stand = fragmented.stand

    def prepare() -> None:
        stand.forget("second")
        make_file(stand.store("second"), MIB)

    race(
        f"create a snapshot, the one before it {fragmented.shape}",
        lambda: stand.take("second"),
        count=1,
        unit="",
        repeat=5,
        prepare=prepare,
        point=Point("fragmentation", "create a snapshot", run),
    )
    stand.forget("second")
