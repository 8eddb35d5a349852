"""Reflinks: a clone of an image file on xfs and on btrfs is what `cp --reflink` makes.

The file systems lie on loop devices over memory, ours lies in the same memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from suite.baselines import gather
from suite.devices import BLOCK, Stand, offsets
from suite.processes import own_mounts
from suite.race import Entrant, absent, limit, other, peer
from suite.reflink import KINDS, Reflinked, mounted

import cow

SECTION = "Beside reflinks"
Work = Callable[[Reflinked], object]


@dataclass
class Images:
    """The same image here and on each file system; blocks of it, and what is written to them."""

    stand: Stand
    durable: Stand
    files: dict[str, Reflinked]
    reasons: dict[str, str]  # why there is no such file system
    numbers: np.ndarray
    data: np.ndarray

    @property
    def places(self) -> list[int]:
        return [int(number) * BLOCK for number in self.numbers]

    def peers(self, run: Work, prepare: Work) -> Iterator[Entrant]:
        """Yield an entrant for each file system: `run` after `prepare`, on its file."""
        for kind in KINDS:
            name = f"reflink on {kind}"
            if kind in self.reasons:
                yield absent(name, self.reasons[kind])
                continue
            file = self.files[kind]
            yield peer(name, lambda file=file: run(file), lambda file=file: prepare(file))

    def take(self, stand: Stand) -> None:
        """Take a fresh snapshot, in a store that has its pages."""
        stand.drop("snap")
        stand.used_snapshot("snap", self.numbers.size)


@pytest.fixture(scope="module")
def images(new_folder, scale) -> Iterator[Images]:
    rng = np.random.default_rng(41)
    numbers = rng.permutation(scale.file_size // BLOCK)[: scale.breaks]
    data = np.full((numbers.size, BLOCK), 0x5A, np.uint8)
    reason = own_mounts()
    reasons = dict.fromkeys(KINDS, reason) if reason else {}
    files = {}
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(new_folder())
        for kind in KINDS if not reason else ():
            place = stack.enter_context(mounted(kind, folder, scale.file_size))
            if isinstance(place, str):
                reasons[kind] = place
            else:
                files[kind] = Reflinked(place, scale.file_size)
                stack.callback(files[kind].close)
        stands = []
        for durability in ("process", "power"):
            (folder / durability).mkdir()
            dm = stack.enter_context(cow.Mapper(durability=durability))
            stands.append(Stand(dm, folder / durability, scale.file_size))
        yield Images(*stands, files, reasons, numbers, data)


def break_up(images: Images) -> Work:
    """Return what leaves a file in pieces: random first writes after a clone."""
    places, data = images.places, images.data[0].tobytes()

    def run(file: Reflinked) -> None:
        file.renew()
        file.write_and_sync(places, data)
        file.drop()
        file.sync()

    return run


def test_create(race, images):
    """Take a snapshot of an image that was written in one go."""
    stand = images.stand
    race(
        "reflink: create a snapshot, fresh image",
        lambda: stand.take("snap"),
        *images.peers(lambda file: file.take(), lambda file: (file.fresh(), file.sync())),
        count=1,
        unit="",
        prepare=lambda: (images.take(stand), stand.drop("snap"), stand.wipe("snap")),
    )


def test_create_in_pieces(race, images):
    """Take one of an image that was broken to pieces by random first writes."""
    stand = images.stand

    def prepare() -> None:
        images.take(stand)
        stand.base.write_many(offsets(images.numbers), images.data)
        stand.drop("snap")
        stand.wipe("snap")

    race(
        "reflink: create a snapshot, image in pieces",
        lambda: stand.take("snap"),
        *images.peers(lambda file: file.take(), break_up(images)),
        count=1,
        unit="",
        prepare=prepare,
    )


@pytest.mark.parametrize("durable", [False, True], ids=["process", "power"])
def test_first_writes(race, images, durable):
    """Random first writes, in the page cache alone, or with all of it on the disk at the end."""
    stand = images.durable if durable else images.stand
    at, places, data = offsets(images.numbers), images.places, images.data[0].tobytes()

    def write() -> None:
        stand.base.write_many(at, images.data)
        if durable:
            stand.base.flush()

    def write_each() -> None:
        pwrite = stand.base.pwrite
        for place in places:
            pwrite(data, place)

    run = Reflinked.write_and_sync if durable else Reflinked.write
    others = (
        [] if durable else [other("cow, one call each", write_each, lambda: images.take(stand))]
    )
    race(
        f"reflink: first writes 4 KiB{', with a sync' if durable else ''}",
        write,
        *others,
        *images.peers(lambda file: run(file, places, data), Reflinked.renew),
        count=len(places),
        unit="/chunk",
        prepare=lambda: images.take(stand),
    )


def test_rewrites(race, images):
    """The same blocks again."""
    stand = images.stand
    at, places, data = offsets(images.numbers), images.places, images.data[0].tobytes()

    def prepare(file: Reflinked) -> None:
        if not file.clone.exists():
            file.renew()
            file.write_and_sync(places, data)

    images.take(stand)
    stand.base.write_many(at, images.data)
    race(
        "reflink: rewrites 4 KiB",
        lambda: stand.base.write_many(at, images.data),
        *images.peers(lambda file: file.write(places, data), prepare),
        count=len(places),
        unit="/chunk",
    )


def test_reads(race, images):
    """Random reads of the snapshot, half of it broken: a clone's are those of an mmap."""
    stand = images.stand
    half = images.numbers.size // 2
    places, data = images.places[:half], images.data[0].tobytes()
    at, out = offsets(images.numbers), np.zeros_like(images.data)
    mapped: dict[Reflinked, np.ndarray] = {}

    def prepare(file: Reflinked) -> None:
        if file not in mapped:
            file.renew()
            file.write_and_sync(places, data)
            mapped[file] = file.blocks()

    images.take(stand)
    stand.base.write_many(at[:half], images.data[:half])
    snap, plain = stand.dm.device("snap"), stand.blocks()
    race(
        "reflink: random 4 KiB reads of the snapshot, half copied",
        lambda: snap.read_many(at, BLOCK, out=out),
        limit("numpy.take", lambda: gather(plain, images.numbers, out)),
        *images.peers(lambda file: gather(mapped[file], images.numbers, out), prepare),
        count=out.nbytes,
    )
    mapped.clear()


def test_remove(race, images):
    """Remove the snapshot after random first writes."""
    stand = images.stand
    at, places, data = offsets(images.numbers), images.places, images.data[0].tobytes()

    def prepare() -> None:
        images.take(stand)
        stand.base.write_many(at, images.data)

    def prepare_file(file: Reflinked) -> None:
        file.renew()
        file.write_and_sync(places, data)

    def remove_file(file: Reflinked) -> None:
        file.drop()
        file.sync()

    race(
        "reflink: remove a snapshot and its store",
        lambda: stand.forget("snap"),
        *images.peers(remove_file, prepare_file),
        count=1,
        unit="",
        prepare=prepare,
    )
