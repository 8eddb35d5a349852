"""Images: the files that stand where the kernel has block devices. Open, lock, grow.

An image is locked as a whole with flock(2) while it is open: exclusively for writing, shared for
reading. So a base image may be read by many processes at once, and written by one.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from typing import Any

from cow import _core
from cow.errors import ImageError, ImageLocked, ImageNotFound, InvalidArgument
from cow.units import SECTOR_SIZE, bytes_of, is_power_of_2, sectors


class Image(_core.FileDevice):
    """A file, mmap'd as a whole, that tables can name by its path.

    `size` in bytes makes the device larger than the file, which then grows on demand; both are
    rounded down to whole sectors. `logical_block_size` (bytes, a power of two from 512 on) is what
    tables and chunk sizes have to be aligned to.
    """

    def __init__(
        self,
        gate: _core.Gate,
        path: str,
        *,
        size: int | None = None,
        readonly: bool = False,
        logical_block_size: int = SECTOR_SIZE,
    ) -> None:
        self._files: list[int] = []
        if logical_block_size < SECTOR_SIZE or not is_power_of_2(logical_block_size):
            raise InvalidArgument(
                f"{path}: logical block size {logical_block_size} is not a power of 2 from 512 on"
            )
        self.path = path
        self.logical_block_size = logical_block_size
        self.major_minor = (7, 0)
        self.holders: list[object] = []
        self.kept = 0
        self._grow_to = size
        try:
            self._attach(readonly)
        except BaseException:
            self.close()
            raise

    def _attach(self, readonly: bool) -> None:
        file = _open(self.path, readonly)
        self._files.append(file)
        if len(self._files) == 1:
            _lock(file, self.path, readonly)
        else:
            _relock(self._files[0], self.path)
        self._map(file, readonly)

    def _map(self, file: int, readonly: bool) -> None:
        status = os.fstat(file)
        file_size = os.lseek(file, 0, os.SEEK_END)
        size = bytes_of(sectors(file_size))
        growing = self._grow_to is not None and self._grow_to > file_size
        if growing:
            if readonly or not stat.S_ISREG(status.st_mode):
                raise InvalidArgument(f"{self.path}: only a writable regular file can grow")
            assert self._grow_to is not None
            size = bytes_of(sectors(self._grow_to))
        if size == 0:
            raise ImageError(f"{self.path}: smaller than one sector")
        sparse = growing or (
            stat.S_ISREG(status.st_mode) and status.st_blocks * SECTOR_SIZE < file_size
        )
        self.attach(file, size, min(size, file_size), not readonly, sparse)

    def make_writable(self) -> None:
        """Open the file for writing too. The gate is held exclusively."""
        if not self.writable:
            self._attach(readonly=False)

    def update_size(self) -> None:
        """Be as large as the file, if that was made larger. The gate is held exclusively."""
        file = self._files[-1]
        if bytes_of(sectors(os.lseek(file, 0, os.SEEK_END))) > self.size:
            self._map(file, readonly=not self.writable)

    def is_file(self, path: str) -> bool:
        """Whether `path` leads to the file that is open here."""
        try:
            return os.path.samestat(os.stat(path), os.fstat(self._files[0]))
        except (OSError, ValueError):
            return False

    def close(self) -> None:
        """Unmap and unlock. Views that are still out keep their memory until they go."""
        self.detach()
        while self._files:
            os.close(self._files.pop())

    def __str__(self) -> str:
        return self.path

    def __repr__(self) -> str:
        return f"<Image {self.path} {self.sectors} sectors>"


class OpenImages:
    """The images of a mapper: a file is open once, however many tables name it.

    `own_file_systems` are the st_dev of file systems that show the mapper's devices: no image may
    lie there, because a request on it would wait for another one behind it.
    """

    def __init__(self, gate: _core.Gate) -> None:
        self.own_file_systems: set[int] = set()
        self._gate = gate
        self._images: list[Image] = []

    def find(self, path: str) -> Image | None:
        """Return the image that is open at a path, if there is one."""
        self._images[:] = [image for image in self._images if not image.removed]
        for image in self._images:
            if image.is_file(path):
                return image
        return None

    def open(self, path: str, **options: Any) -> Image:  # noqa: ANN401
        """Open an image, numbered as a loop device; the options are those of Image."""
        if _file_system(path) in self.own_file_systems:
            raise ImageError(
                f"{path}: shows a device of this mapper: name the device itself", errno.ELOOP
            )
        image = Image(self._gate, path, **options)
        taken = {other.major_minor[1] for other in self._images}
        image.major_minor = (7, next(n for n in range(len(taken) + 1) if n not in taken))
        self._images.append(image)
        return image

    def get(self, path: str, *, writable: bool) -> Image:
        """Return the image at a path, opened if it is not, for writing too where that is asked."""
        image = self.find(path)
        if image is None:
            return self.open(path, readonly=not writable)
        if writable and not image.writable:
            if image.kept:
                raise ImageError(f"{path}: the image was opened read-only", errno.EACCES)
            with self._gate:
                image.make_writable()
        return image

    def close(self) -> None:
        """Close all."""
        for image in self._images:
            if not image.removed:
                with image.gate:
                    image.close()
        self._images.clear()


def close_unused(devices: list[_core.BlockDevice]) -> None:
    """Close those that are images which nobody needs any more."""
    for device in devices:
        if isinstance(device, Image) and not device.holders and not device.kept:
            with device.gate:
                device.close()


def _file_system(path: str) -> int | None:
    """Return the st_dev of what a path leads to, None where it leads nowhere."""
    try:
        return os.stat(path).st_dev
    except (OSError, ValueError):
        return None


def _open(path: str, readonly: bool) -> int:
    try:
        file = os.open(path, (os.O_RDONLY if readonly else os.O_RDWR) | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise ImageNotFound(f"{path}: no such device or file") from error
    except ValueError as error:  # a name no file can have: a NUL, or not to be encoded
        raise ImageError(f"{path!r}: {error}", errno.EINVAL) from error
    except OSError as error:
        code = errno.ENOTBLK if error.errno == errno.EISDIR else error.errno
        raise ImageError(f"{path}: cannot open: {error.strerror}", code) from error
    mode = os.fstat(file).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
        os.close(file)
        raise ImageError(f"{path}: neither a file nor a block device", errno.ENOTBLK)
    return file


def _lock(file: int, path: str, readonly: bool) -> None:
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if readonly else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError as error:
        pid = _holder(file)
        by = f"process {pid}" if pid else "another process"
        if pid == os.getpid():
            by = f"another mapper of this process ({pid})"
        raise ImageLocked(f"{path}: in use by {by}", pid, path) from error


def _relock(file: int, path: str) -> None:
    """Turn the shared lock into an exclusive one, or keep the shared one."""
    try:
        _lock(file, path, readonly=False)
    except ImageLocked:
        fcntl.flock(file, fcntl.LOCK_SH)
        raise


def wait_for_lock(path: str) -> None:
    """Wait until nobody else holds an image, which the caller does not hold either."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    finally:
        os.close(file)


def _holder(file: int) -> int | None:
    """Return the process that holds a lock on the file, as /proc/locks tells (proc(5))."""
    status = os.fstat(file)
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    try:
        with open("/proc/locks", encoding="ascii") as locks:
            for line in locks:
                fields = line.split()
                if len(fields) >= 6 and fields[1] == "FLOCK" and fields[5] == device:
                    return int(fields[4])
    except OSError:
        pass
    return None
