"""File systems that can share blocks between files: xfs and btrfs on loop devices over memory."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from suite.baselines import MappedFile, make_file, stamp
from suite.devices import BLOCK
from suite.processes import call, lacking
from suite.scale import MIB

FICLONE = 0x40049409
KINDS = {
    "xfs": (["mkfs.xfs", "-q", "-K"], "loop"),
    "btrfs": (["mkfs.btrfs", "-q", "-K"], "loop,nodiscard"),
}
SMALLEST = 400 * MIB  # mkfs.xfs wants 300


class Reflinked:
    """A file on such a file system, and its clone: what stands for an origin and a snapshot."""

    def __init__(self, folder: Path, size: int) -> None:
        self.size = size
        self.image, self.clone = folder / "image", folder / "clone"
        self.fd = -1

    def fresh(self) -> None:
        """Write the file anew, in one go; no clone shares it."""
        self.drop()
        self.close()
        self.image.unlink(missing_ok=True)
        stamp_by_writes(self.image, self.size)
        self.fd = os.open(self.image, os.O_RDWR)

    def take(self) -> None:
        """Clone the file."""
        clone = os.open(self.clone, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            fcntl.ioctl(clone, FICLONE, self.fd)
        finally:
            os.close(clone)

    def drop(self) -> None:
        self.clone.unlink(missing_ok=True)

    def renew(self) -> None:
        """Write the file anew and clone it, on the disk."""
        self.fresh()
        self.take()
        self.sync()

    def sync(self) -> None:
        os.fsync(self.fd)

    def write(self, places: list[int], data: bytes) -> None:
        """Write a block at each of these offsets."""
        fd, pwrite = self.fd, os.pwrite
        for place in places:
            pwrite(fd, data, place)

    def write_and_sync(self, places: list[int], data: bytes) -> None:
        self.write(places, data)
        self.sync()

    def blocks(self) -> np.ndarray:
        """Return the clone as rows of blocks."""
        return MappedFile(self.clone).blocks(BLOCK)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def stamp_by_writes(path: Path, size: int) -> None:
    """Write a file whose every block differs, and sync it."""
    with path.open("xb", buffering=0) as file:
        for start in range(0, size, 8 * MIB):
            stop = min(start + 8 * MIB, size)
            file.write(np.arange(start // 8, stop // 8, dtype=np.uint64).data)
        os.fsync(file.fileno())


@contextlib.contextmanager
def mounted(kind: str, folder: Path, size: int) -> Iterator[Path | str]:
    """Give a folder on a new file system with room for three files of `size`, or why there is none.

    The mounts of this process are its own (processes.own_mounts) and go with it in any case.
    """
    command, options = KINDS[kind]
    if reason := lacking(command[0]):
        yield reason
        return
    image, place = folder / f"{kind}.img", folder / kind
    # With all its pages: it is not the file system's fault that memory has to be found.
    stamp(make_file(image, max(3 * size, SMALLEST)))
    place.mkdir()
    error = call([*command, "-f", image]) or call(["mount", "-o", options, image, place])
    if error:
        yield f"{kind}: {error}"
        return
    try:
        yield place
    finally:
        error = call(["umount", place])
        assert not error, error
        image.unlink()
