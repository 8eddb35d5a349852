"""First writes: random blocks, each of which breaks a chunk.

The plain work in one to the origin: gather the old chunks into the store, scatter the new ones
over the origin. It is measured twice, as a fresh store is dominated by the page faults of its new
pages: once where the store's pages exist already, once with all of them made by one madvise call.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from suite.baselines import MappedFile, gather, make_file, scatter, stamp, store_size
from suite.devices import BLOCK, CHUNK_SIZE, Stand, offsets
from suite.race import limit, other, together

import cow

SECTION = "First writes"


@dataclass
class Images:
    """An origin, and a batch of blocks to write to it."""

    stand: Stand
    plain: np.ndarray
    numbers: np.ndarray  # the blocks that are written, in that order
    data: np.ndarray


@pytest.fixture(scope="module")
def images(folder, scale):
    numbers = np.random.default_rng(3).permutation(scale.image_size // BLOCK)[: scale.batch]
    data = np.full((scale.batch, BLOCK), 0x5A, np.uint8)
    with cow.Mapper(durability="process") as dm:
        stand = Stand(dm, folder, scale.image_size)
        yield Images(stand, stand.blocks(), numbers, data)


class FreshFile:
    """A file that is all a hole whenever it is prepared, as the plain work's store."""

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = path, size
        self.mapped: MappedFile | None = None

    def prepare(self) -> None:
        self.remove()
        self.mapped = MappedFile(make_file(self.path, self.size), populate=False)

    def remove(self) -> None:
        self.mapped = None
        self.path.unlink(missing_ok=True)

    def populated(self) -> np.ndarray:
        """Make its pages in one call, and return its blocks."""
        assert self.mapped is not None
        self.mapped.populate_write(self.size)
        return self.mapped.blocks(BLOCK)


@pytest.mark.parametrize("threads", [1, 2])
def test_store_with_pages(race, images, threads):
    """The store's pages exist and are mapped: it is used again and again."""
    stand, plain, data = images.stand, images.plain, images.data
    plain_file = make_file(stand.folder / "plain.cow", data.nbytes)
    stamp(plain_file)
    plain_store = MappedFile(plain_file).blocks(BLOCK)
    parts = [
        slice(n * len(data) // threads, (n + 1) * len(data) // threads) for n in range(threads)
    ]

    def prepare() -> None:
        stand.drop("snap")
        stand.used_snapshot("snap", images.numbers.size)

    def writes(part: slice):
        at = offsets(images.numbers[part])
        return lambda: stand.base.write_many(at, data[part])

    def plainly(part: slice):
        def work() -> None:
            gather(plain, images.numbers[part], plain_store[part])
            scatter(plain, images.numbers[part], data[part])

        return work

    whole = slice(0, len(data))
    others = [limit("take + scatter", together(*map(plainly, parts)))]
    if threads > 1:
        others.insert(0, other("cow, one thread", writes(whole), prepare))
    by = " by two threads" if threads > 1 else ""
    race(
        f"first writes 4 KiB on the origin{by}, store with pages",
        together(*map(writes, parts)),
        *others,
        count=images.numbers.size,
        unit="/chunk",
        prepare=prepare,
    )
    prepare()
    stand.check(images.numbers, "snap")
    stand.forget("snap")
    plain_file.unlink()


def test_fresh_store(race, images):
    """The store is a new sparse file each time: all of its pages have to be made."""
    stand, plain, data = images.stand, images.plain, images.data
    at = offsets(images.numbers)
    copies = FreshFile(stand.folder / "plain.cow", data.nbytes)

    def prepare() -> None:
        stand.drop("snap")
        stand.snapshot("snap", images.numbers.size)

    def baseline() -> None:
        gather(plain, images.numbers, copies.populated())
        scatter(plain, images.numbers, data)

    race(
        "first writes 4 KiB on the origin, fresh store",
        lambda: stand.base.write_many(at, data),
        limit("populate + take + scatter", baseline, copies.prepare),
        count=images.numbers.size,
        unit="/chunk",
        prepare=prepare,
    )
    copies.remove()
    prepare()
    stand.check(images.numbers, "snap")
    stand.forget("snap")


def test_snapshot(race, images):
    """Writes of whole chunks to the snapshot itself: the plain work is a copy into the store."""
    stand, data = images.stand, images.data
    at = offsets(images.numbers)
    copies = FreshFile(stand.folder / "plain.cow", data.nbytes)

    def prepare() -> None:
        stand.drop("snap")
        stand.snapshot("snap", images.numbers.size)

    race(
        "first writes 4 KiB on the snapshot, fresh store",
        lambda: stand.dm.device("snap").write_many(at, data),
        limit("populate + copy", lambda: np.copyto(copies.populated(), data), copies.prepare),
        count=images.numbers.size,
        unit="/chunk",
        prepare=prepare,
    )
    copies.remove()
    assert np.array_equal(stand.dm.device("snap").read_many(at[:64], BLOCK), data[:64])
    stand.forget("snap")


def test_part_of_a_chunk(race, images):
    """Half a chunk to the snapshot: the other half has to be copied first."""
    stand, plain = images.stand, images.plain
    half = images.data[:, : BLOCK // 2]
    data = np.ascontiguousarray(half)
    at = offsets(images.numbers)
    copies = FreshFile(stand.folder / "plain.cow", images.data.nbytes)

    def prepare() -> None:
        stand.drop("snap")
        stand.snapshot("snap", images.numbers.size)

    def baseline() -> None:
        store = copies.populated()
        gather(plain, images.numbers, store)
        store[:, : BLOCK // 2] = data

    race(
        "first writes 2 KiB on the snapshot, fresh store",
        lambda: stand.dm.device("snap").write_many(at, data),
        limit("populate + take + copy", baseline, copies.prepare),
        count=images.numbers.size,
        unit="/chunk",
        prepare=prepare,
    )
    copies.remove()
    found = stand.dm.device("snap").read_many(at[:64], BLOCK)
    assert np.array_equal(found[:, : BLOCK // 2], data[:64])
    assert np.array_equal(found[:, BLOCK // 2 :], plain[images.numbers[:64], BLOCK // 2 :])
    stand.forget("snap")


def test_one_call_each(race, images, scale):
    """One `pwrite` for each chunk beside one `os.pwrite` to the store and one to the origin."""
    stand, plain = images.stand, images.plain
    places = [int(number) * BLOCK for number in images.numbers[: scale.calls]]
    data = images.data[0].tobytes()
    plain_file = make_file(stand.folder / "plain.cow", len(places) * BLOCK)
    stamp(plain_file)
    mapped = memoryview(plain.reshape(-1))

    def prepare() -> None:
        stand.drop("snap")
        stand.used_snapshot("snap", images.numbers.size)

    def ours() -> None:
        pwrite = stand.base.pwrite
        for place in places:
            pwrite(data, place)

    with plain_file.open("r+b") as store, stand.image.open("r+b") as origin:

        def baseline() -> None:
            pwrite, store_fd, origin_fd = os.pwrite, store.fileno(), origin.fileno()
            for number, place in enumerate(places):
                pwrite(store_fd, mapped[place : place + BLOCK], number * BLOCK)
                pwrite(origin_fd, data, place)

        race(
            "first writes by one pwrite each, store with pages",
            ours,
            limit("os.pwrite × 2", baseline),
            count=len(places),
            unit="/chunk",
            repeat=4,
            prepare=prepare,
        )
    allocated = (store_size(len(places), CHUNK_SIZE) // BLOCK - 1) * CHUNK_SIZE
    assert stand.dm.status("snap").split()[3].startswith(f"{allocated}/")
    stand.forget("snap")
    plain_file.unlink()
