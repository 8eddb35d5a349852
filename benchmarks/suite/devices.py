"""What races are run on: an origin whose every block differs, with snapshots."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

import cow
from suite.baselines import MappedFile, make_file, stamp, store_size

SECTOR = 512
BLOCK = 4096
CHUNK_SIZE = 8


class Stand:
    """The device "base" over an image, a snapshot-origin, and snapshots of it by name.

    A sparse image is left as it is, any other is stamped.
    """

    def __init__(self, dm: cow.Mapper, folder: Path, size: int, *, sparse: bool = False) -> None:
        self.dm = dm
        self.folder = folder
        self.size = size
        self.sectors = size // SECTOR
        self.image = make_file(folder / "origin.img", size)
        if not sparse:
            stamp(self.image)
        self.kept_mapped: dict[str, object] = {}
        self.base = dm.create("base", f"0 {self.sectors} snapshot-origin {self.image}")

    def linear(self) -> cow.Device:
        """Return the device "linear" over the same image: what no snapshot knows of."""
        return self.dm.create("linear", f"0 {self.sectors} linear {self.image} 0")

    def snapshot(
        self, name: str = "snap", room: int | None = None, *, chunk_size: int = CHUNK_SIZE
    ) -> cow.Device:
        """Take a snapshot into a store that is a new sparse file.

        It has room for so many exceptions, without `room` for one of every chunk.
        """
        store = self.store(name)
        store.unlink(missing_ok=True)
        if room is None:
            room = self.sectors // chunk_size
        make_file(store, store_size(room, chunk_size))
        return self.take(name, chunk_size)

    def used_snapshot(self, name: str, room: int, *, chunk_size: int = CHUNK_SIZE) -> cow.Device:
        """Take a snapshot into a store whose pages exist and are mapped: it is used again."""
        store = self.store(name)
        if name not in self.kept_mapped:
            stamp(make_file(store, store_size(room, chunk_size)), first=1)
            self.kept_mapped[name] = self.dm.image(store)
        self.wipe(name)
        return self.take(name, chunk_size)

    def wipe(self, name: str) -> None:
        """Make a store a fresh one again; its pages stay."""
        descriptor = os.open(self.store(name), os.O_WRONLY)
        os.pwrite(descriptor, bytes(BLOCK), 0)
        os.close(descriptor)

    def store(self, name: str) -> Path:
        return self.folder / f"{name}.cow"

    def take(self, name: str, chunk_size: int = CHUNK_SIZE) -> cow.Device:
        """Create the snapshot, as users do: suspend, create, resume."""
        self.dm.suspend("base")
        device = self.dm.create(name, self.table(name, chunk_size))
        self.dm.resume("base")
        return device

    def table(self, name: str, chunk_size: int = CHUNK_SIZE) -> str:
        return f"0 {self.sectors} snapshot {self.image} {self.store(name)} P {chunk_size}"

    def drop(self, *names: str) -> None:
        """Remove these snapshots, those that exist."""
        for name in names:
            if name in self.dm.names():
                self.dm.remove(name)

    def forget(self, *names: str) -> None:
        """Remove these snapshots and their stores."""
        self.drop(*names)
        for name in names:
            self.kept_mapped.pop(name, None)
            self.store(name).unlink(missing_ok=True)

    def blocks(self, size: int = BLOCK) -> np.ndarray:
        """Return the image as rows of `size` bytes, past all devices."""
        return MappedFile(self.image).blocks(size)

    def check(self, numbers: np.ndarray, *names: str) -> None:
        """Write other data to some blocks: the snapshots must keep what was there."""
        at = offsets(numbers[:64])
        old = self.base.read_many(at, BLOCK)
        self.base.write_many(at, ~old)
        assert np.array_equal(self.base.read_many(at, BLOCK), ~old)
        for name in names:
            assert np.array_equal(self.dm.device(name).read_many(at, BLOCK), old)


def offsets(numbers: np.ndarray, size: int = BLOCK) -> np.ndarray:
    """Return where blocks begin, in bytes."""
    return numbers.astype(np.uint64) * size


def in_batches(numbers: np.ndarray, batch: int) -> list[np.ndarray]:
    """Cut block numbers into batches of at most about `batch`."""
    return np.array_split(numbers, max(1, -(-numbers.size // batch)))


def break_all(device: cow.Device, numbers: np.ndarray, batch: int) -> None:
    """Rewrite blocks with their complement, batch by batch."""
    for part in in_batches(numbers, batch):
        device.write_many(offsets(part), ~device.read_many(offsets(part), BLOCK))
