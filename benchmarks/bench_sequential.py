"""Pieces of 1 MiB one after the other, beside memcpy of the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from suite.baselines import MappedFile, make_file
from suite.devices import Stand
from suite.race import limit, other
from suite.scale import MIB

import cow

SECTION = "Sequential"
TARGETS = {"linear": "linear", "base": "snapshot-origin", "snap": "snapshot, all in the store"}


@dataclass
class Images:
    """An origin whose chunks were all rewritten since its snapshot was taken."""

    stand: Stand
    plain: np.ndarray  # the origin's bytes, MiB by MiB


@pytest.fixture(scope="module")
def images(folder, scale):
    with cow.Mapper(durability="process") as dm:
        stand = Stand(dm, folder, scale.image_size)
        stand.linear()
        stand.snapshot()
        plain = stand.blocks(MIB)
        for number, row in enumerate(plain):
            stand.base.pwrite(~row, number * MIB)
        yield Images(stand, plain)


def each_mib(call: Callable[[object, int], object], buffer: object, size: int):
    """Return a function that makes `call(buffer, offset)` for each MiB of `size` bytes."""
    places = range(0, size, MIB)

    def run() -> None:
        for offset in places:
            call(buffer, offset)

    return run


@pytest.mark.parametrize("device", TARGETS)
def test_read(race, images, scale, device):
    """`preadinto` of 1 MiB beside `numpy.copyto` from the origin's mmap."""
    buffer = np.zeros(MIB, np.uint8)

    def baseline() -> None:
        for row in images.plain:
            np.copyto(buffer, row)

    dev = images.stand.dm.device(device)
    race(
        f"read 1 MiB, {TARGETS[device]}",
        each_mib(dev.preadinto, buffer, scale.image_size),
        limit("memcpy", baseline),
        count=scale.image_size,
    )
    last = scale.image_size - MIB
    assert dev.preadinto(buffer, last) == MIB
    words = np.arange(last // 8, scale.image_size // 8, dtype=np.uint64)
    assert np.array_equal(buffer.view(np.uint64), words if device == "snap" else ~words)


@pytest.mark.parametrize("device", TARGETS)
def test_rewrite(race, images, scale, device):
    """`pwrite` of 1 MiB beside `numpy.copyto` to the origin's mmap, and beside no snapshot."""
    data = np.full(MIB, 0x5A, np.uint8)

    def baseline() -> None:
        for row in images.plain:
            np.copyto(row, data)

    dm, size = images.stand.dm, scale.image_size
    dev, without = dm.device(device), dm.device("linear")
    others = [limit("memcpy", baseline)]
    if device != "linear":
        others.append(other("cow, no snapshot", each_mib(without.pwrite, data, size)))
    usage = dm.status("snap")
    race(f"rewrite 1 MiB, {TARGETS[device]}", each_mib(dev.pwrite, data, size), *others, count=size)
    assert dm.status("snap") == usage
    assert dev.pread(MIB, 0) == data.tobytes()


def test_first_write(race, images, scale):
    """`pwrite` of 1 MiB where every chunk is shared; the plain work is two copies."""
    stand, plain = images.stand, images.plain
    data = np.full(MIB, 0x5A, np.uint8)
    copy_path = stand.folder / "copy.img"
    copies: list[MappedFile] = []

    def prepare() -> None:
        stand.drop("snap")
        stand.forget("second")
        stand.snapshot("second")

    def prepare_copy() -> None:
        copies.clear()
        copy_path.unlink(missing_ok=True)
        make_file(copy_path, scale.image_size)
        copies.append(MappedFile(copy_path, populate=False))

    def baseline() -> None:
        copies[0].populate_write(scale.image_size)
        for row, copy in zip(plain, copies[0].blocks(MIB), strict=True):
            np.copyto(copy, row)
            np.copyto(row, data)

    race(
        "first write 1 MiB, fresh store",
        each_mib(stand.base.pwrite, data, scale.image_size),
        limit("populate + memcpy × 2", baseline, prepare_copy),
        count=scale.image_size,
        prepare=prepare,
    )
    copies.clear()
    copy_path.unlink()
    stand.forget("second")
    stand.take("snap")
