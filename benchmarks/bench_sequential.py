"""Reads and rewrites of 1 MiB one after the other, beside memcpy of the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from baselines import MappedFile, make_file, stamp, store_size

import cow

MIB = 1 << 20
CHUNK_SIZE = 8


@dataclass
class Images:
    """An origin whose chunks were all rewritten since its snapshot was taken."""

    dm: cow.Mapper
    plain: np.ndarray  # the origin's bytes, MiB by MiB


@pytest.fixture(scope="module")
def images(folder, scale):
    origin = make_file(folder / "origin.img", scale.image_size)
    stamp(origin)
    room = store_size(scale.image_size // 512 // CHUNK_SIZE, CHUNK_SIZE)
    store = make_file(folder / "snap.cow", room)
    sectors = scale.image_size // 512
    plain = MappedFile(origin).blocks(MIB)
    with cow.Mapper(durability="process") as dm:
        dm.create("linear", f"0 {sectors} linear {origin} 0")
        dm.create("base", f"0 {sectors} snapshot-origin {origin}")
        dm.suspend("base")
        dm.create("snap", f"0 {sectors} snapshot {origin} {store} P {CHUNK_SIZE}")
        dm.resume("base")
        base = dm.device("base")
        for number, row in enumerate(plain):
            base.pwrite(~row, number * MIB)
        yield Images(dm, plain)


TARGETS = {"linear": "linear", "base": "snapshot-origin", "snap": "snapshot, all in the store"}


def each_mib(call: Callable[[object, int], object], buffer: object, size: int):
    """Return a function that makes `call(buffer, offset)` for each MiB of `size` bytes."""
    offsets = range(0, size, MIB)

    def run() -> None:
        for offset in offsets:
            call(buffer, offset)

    return run


@pytest.mark.parametrize("device", TARGETS)
def test_read(race, images, scale, device):
    """`preadinto` of 1 MiB beside `numpy.copyto` from the origin's mmap."""
    buffer = np.zeros(MIB, np.uint8)

    def baseline() -> None:
        for row in images.plain:
            np.copyto(buffer, row)

    dev = images.dm.device(device)
    race(
        f"read 1 MiB, {TARGETS[device]}",
        each_mib(dev.preadinto, buffer, scale.image_size),
        ("memcpy", baseline),
        count=scale.image_size,
        speed=0.9,
    )
    last = scale.image_size - MIB
    assert dev.preadinto(buffer, last) == MIB
    words = np.arange(last // 8, scale.image_size // 8, dtype=np.uint64)
    assert np.array_equal(buffer.view(np.uint64), words if device == "snap" else ~words)


@pytest.mark.parametrize("device", TARGETS)
def test_rewrite(race, images, scale, device):
    """`pwrite` of 1 MiB beside `numpy.copyto` to the origin's mmap."""
    data = np.full(MIB, 0x5A, np.uint8)

    def baseline() -> None:
        for row in images.plain:
            np.copyto(row, data)

    dev = images.dm.device(device)
    usage = images.dm.status("snap")
    race(
        f"rewrite 1 MiB, {TARGETS[device]}",
        each_mib(dev.pwrite, data, scale.image_size),
        ("memcpy", baseline),
        count=scale.image_size,
        speed=0.9,
    )
    assert images.dm.status("snap") == usage
    assert dev.pread(MIB, 0) == data.tobytes()
