"""First writes: random blocks over the origin, each of which breaks a chunk.

The plain work in them: gather the old chunks into the store, scatter the new ones over the
origin. It is measured twice, as a fresh store is dominated by the page faults of its new pages:
once where the store's pages exist already, once with all of them made by one madvise call.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from baselines import MappedFile, gather, make_file, scatter, stamp, store_size

import cow

BLOCK = 4096
CHUNK_SIZE = 8


@dataclass
class Images:
    """An origin, and batches of blocks to write to it."""

    dm: cow.Mapper
    folder: Path
    origin: Path
    numbers: np.ndarray  # the blocks that are written, in that order
    data: np.ndarray
    offsets: np.ndarray = field(init=False)
    room: int = field(init=False)

    def __post_init__(self) -> None:
        self.offsets = self.numbers.astype(np.uint64) * BLOCK
        self.room = store_size(self.numbers.size, CHUNK_SIZE)

    def take_snapshot(self, store: Path) -> None:
        """Replace the snapshot by a fresh one in `store`."""
        self.dm.suspend("base")
        self.drop_snapshot()
        sectors = self.dm.device("base").sectors
        table = f"0 {sectors} snapshot {self.origin} {store} P {CHUNK_SIZE}"
        self.dm.create("snap", table)
        self.dm.resume("base")

    def drop_snapshot(self) -> None:
        """Remove the snapshot if there is one."""
        if "snap" in self.dm.names():
            self.dm.remove("snap")

    def check(self) -> None:
        """Write other data to some of the blocks: the snapshot must keep what was there."""
        base, snap = self.dm.device("base"), self.dm.device("snap")
        offsets = self.offsets[:64]
        old = base.read_many(offsets, BLOCK)
        base.write_many(offsets, ~old)
        assert np.array_equal(snap.read_many(offsets, BLOCK), old)
        assert np.array_equal(base.read_many(offsets, BLOCK), ~old)


@pytest.fixture(scope="module")
def images(folder, scale) -> Iterator[Images]:
    origin = make_file(folder / "origin.img", scale.image_size)
    stamp(origin)
    rng = np.random.default_rng(3)
    numbers = rng.permutation(scale.image_size // BLOCK)[: scale.batch]
    data = np.full((scale.batch, BLOCK), 0x5A, np.uint8)
    with cow.Mapper(durability="process") as dm:
        dm.create("base", f"0 {scale.image_size // 512} snapshot-origin {origin}")
        yield Images(dm, folder, origin, numbers, data)


def test_store_with_pages(race, images):
    """The store's pages exist and are mapped: it is used again and again."""
    store = make_file(images.folder / "used.cow", images.room)
    stamp(store, first=1)
    kept_mapped = images.dm.image(store)
    base = images.dm.device("base")

    def prepare() -> None:
        images.drop_snapshot()
        descriptor = os.open(store, os.O_WRONLY)
        os.pwrite(descriptor, bytes(BLOCK), 0)
        os.close(descriptor)
        images.take_snapshot(store)

    plain = MappedFile(images.origin).blocks(BLOCK)
    plain_file = make_file(images.folder / "plain.cow", images.data.nbytes)
    stamp(plain_file)
    plain_store = MappedFile(plain_file).blocks(BLOCK)

    def baseline() -> None:
        gather(plain, images.numbers, plain_store)
        scatter(plain, images.numbers, images.data)

    race(
        "first writes 4 KiB, store with pages",
        lambda: base.write_many(images.offsets, images.data),
        ("take + scatter", baseline),
        count=images.numbers.size,
        unit="/chunk",
        prepare=prepare,
        speed=0.8,
    )
    prepare()
    images.check()
    images.drop_snapshot()
    del kept_mapped
    store.unlink()
    plain_file.unlink()


def test_fresh_store(race, images):
    """The store is a new sparse file each time: all of its pages have to be made."""
    store = images.folder / "fresh.cow"
    base = images.dm.device("base")

    def prepare() -> None:
        images.drop_snapshot()
        store.unlink(missing_ok=True)
        images.take_snapshot(make_file(store, images.room))

    plain = MappedFile(images.origin).blocks(BLOCK)
    plain_file = images.folder / "plain.cow"
    plain_store: list[MappedFile] = []

    def prepare_baseline() -> None:
        plain_store.clear()
        plain_file.unlink(missing_ok=True)
        make_file(plain_file, images.data.nbytes)
        plain_store.append(MappedFile(plain_file, populate=False))

    def baseline() -> None:
        plain_store[0].populate_write(images.data.nbytes)
        gather(plain, images.numbers, plain_store[0].blocks(BLOCK))
        scatter(plain, images.numbers, images.data)

    race(
        "first writes 4 KiB, fresh store",
        lambda: base.write_many(images.offsets, images.data),
        ("populate + take + scatter", baseline),
        count=images.numbers.size,
        unit="/chunk",
        prepare=prepare,
        prepare_baseline=prepare_baseline,
        speed=0.7,
    )
    prepare()
    images.check()
