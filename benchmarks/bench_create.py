"""Creating and removing a snapshot: of a very large sparse image, and of one that is in pieces."""

from __future__ import annotations

import mmap
import os

import numpy as np
from suite.baselines import make_file, store_size
from suite.devices import BLOCK, CHUNK_SIZE, Stand, break_all
from suite.race import limit
from suite.scale import GIB, MIB

import cow

SECTION = "Creating, opening, merging, removing"


def test_create(race, note_figure, memory, tmp_images, scale):
    """Suspend the origin, create the snapshot, resume: what a user waits for."""
    with cow.Mapper(durability="process") as dm:
        stand = Stand(dm, tmp_images, scale.huge_size, sparse=True)
        plain_path = tmp_images / "plain.cow"

        def prepare() -> None:
            stand.forget("snap")
            make_file(stand.store("snap"), GIB)

        def baseline() -> None:
            descriptor = os.open(plain_path, os.O_RDWR)
            with mmap.mmap(descriptor, 0) as mapping:
                mapping[: 2 * BLOCK] = bytes(2 * BLOCK)
            os.close(descriptor)

        def prepare_baseline() -> None:
            plain_path.unlink(missing_ok=True)
            make_file(plain_path, GIB)

        race(
            "create a snapshot of a huge sparse image",
            lambda: stand.take("snap"),
            limit("open, mmap, write 8 KiB", baseline, prepare_baseline),
            count=1,
            unit="",
            repeat=5,
            prepare=prepare,
        )
        prepare()
        before = memory()
        snap = stand.take("snap")
        used = memory() - before
        assert dm.status("snap") == f"0 {stand.sectors} snapshot 16/{GIB // 512} 16"
        stand.base.pwrite(b"new", stand.size - BLOCK)
        assert snap.pread(3, stand.size - BLOCK) == bytes(3)
    note_figure("memory of a snapshot of a huge sparse image", used / MIB, "MiB")


def test_create_in_pieces(race, tmp_images, scale):
    """A snapshot of an origin that was broken to pieces at random, for the snapshot before it."""
    numbers = np.random.default_rng(15).permutation(scale.image_size // BLOCK)[: scale.batch]
    with cow.Mapper(durability="process") as dm:
        stand = Stand(dm, tmp_images, scale.image_size)
        stand.snapshot("first")
        break_all(stand.base, numbers, scale.batch)

        def prepare() -> None:
            stand.forget("snap")
            make_file(stand.store("snap"), store_size(scale.batch, CHUNK_SIZE))

        race(
            "create a snapshot after random first writes",
            lambda: stand.take("snap"),
            count=1,
            unit="",
            repeat=5,
            prepare=prepare,
        )


def test_remove(race, tmp_images, scale):
    """Remove a snapshot of many exceptions; the plain work is to unmap a file of that size."""
    numbers = np.random.default_rng(16).permutation(scale.image_size // BLOCK)[: scale.batch]
    with cow.Mapper(durability="process") as dm:
        stand = Stand(dm, tmp_images, scale.image_size)
        stand.snapshot("snap")
        break_all(stand.base, numbers, scale.batch)
        mapped: list[mmap.mmap] = []

        def prepare() -> None:
            if "snap" not in dm.names():
                stand.take("snap")
            dm.device("snap").pread(BLOCK, int(numbers[0]) * BLOCK)

        def prepare_baseline() -> None:
            with stand.store("snap").open("r+b") as file:
                mapped.append(mmap.mmap(file.fileno(), 0))
            assert mapped[0][0] is not None  # a page of it is mapped

        race(
            "remove a snapshot of many exceptions",
            lambda: dm.remove("snap"),
            limit("munmap", lambda: mapped.pop().close(), prepare_baseline),
            count=1,
            unit="",
            repeat=3,
            prepare=prepare,
        )
