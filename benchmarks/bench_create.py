"""Creating a snapshot of a very large sparse image: time and memory."""

from __future__ import annotations

import mmap
import os

from baselines import make_file

import cow

CHUNK_SIZE = 8
STORE_SIZE = 1 << 30
MIB = 1 << 20


def test_create(race, note_figure, memory, tmp_images, scale):
    """Suspend the origin, create the snapshot, resume: what a user waits for."""
    size = scale.huge_size
    origin = make_file(tmp_images / "origin.img", size)
    path = tmp_images / "snap.cow"
    with cow.Mapper(durability="process") as dm:
        dm.create("base", f"0 {size // 512} snapshot-origin {origin}")
        table = f"0 {size // 512} snapshot {origin} {path} P {CHUNK_SIZE}"

        def prepare() -> None:
            if "snap" in dm.names():
                dm.remove("snap")
            path.unlink(missing_ok=True)
            make_file(path, STORE_SIZE)

        def create() -> None:
            dm.suspend("base")
            dm.create("snap", table)
            dm.resume("base")

        plain_path = tmp_images / "plain.cow"

        def baseline() -> None:
            descriptor = os.open(plain_path, os.O_RDWR)
            with mmap.mmap(descriptor, 0) as mapping:
                mapping[: 2 * 4096] = bytes(2 * 4096)
            os.close(descriptor)

        def prepare_baseline() -> None:
            plain_path.unlink(missing_ok=True)
            make_file(plain_path, STORE_SIZE)

        race(
            f"create a snapshot of {size >> 40} TiB",
            create,
            ("open, mmap, write 8 KiB", baseline),
            count=1,
            unit="",
            rounds=5,
            prepare=prepare,
            prepare_baseline=prepare_baseline,
            within=5e-3,
        )
        prepare()
        before = memory()
        create()
        used = memory() - before
        assert dm.status("snap") == f"0 {size // 512} snapshot 16/{STORE_SIZE // 512} 16"
        base, snap = dm.device("base"), dm.device("snap")
        base.pwrite(b"new", size - 4096)
        assert snap.pread(3, size - 4096) == bytes(3)
    note_figure(f"memory of a snapshot of {size >> 40} TiB", used / MIB, "MiB", limit=4)
