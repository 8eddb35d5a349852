"""The persistent COW store as Linux lays it out, seen from Python: read, check, repair.

In chunks of the header's chunk size: chunk 0 is the header, chunk 1 + (E + 1)·a is metadata area
a, every other chunk holds data; E = chunk bytes / 16 records an area. A record is two little-endian
u64, old chunk (of the origin) and new chunk (of the store); one whose new chunk is 0 ends the list.
(dm-snap-persistent.c; the transient store "N" leaves nothing on disk to read.)
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from cow.errors import ImageError, ImageNotFound, StoreError
from cow.units import MAX_CHUNK_SIZE, SECTOR_SIZE, is_power_of_2, sectors

if TYPE_CHECKING:
    import numpy

HEADER = struct.Struct("<4I")
MAGIC = 0x70416E53
VERSION = 1
RECORD_SIZE = 16


class Header(NamedTuple):
    """The fields of chunk 0 behind the magic; `chunk_size` in sectors."""

    valid: bool
    version: int
    chunk_size: int


class Readable(Protocol):
    """Anything with pread: a device, or an open store file."""

    def pread(self, size: int, offset: int) -> bytes:
        """Read up to `size` bytes at `offset`."""


def wrong_chunk_size(chunk_size: int) -> str | None:
    """Return the kernel's words for what is wrong with a chunk size in sectors, or None."""
    if not is_power_of_2(chunk_size):
        return "Chunk size is not a power of 2"
    if chunk_size > MAX_CHUNK_SIZE:
        return "Chunk size is too high"
    return None


def read_header(device: Readable) -> Header | None:
    """Read the header; None where the magic is 0 and the store is yet to be made.

    StoreError with the kernel's errno: ENXIO for another magic, EINVAL for version or chunk size.
    """
    data = device.pread(HEADER.size, 0)
    if len(data) < HEADER.size:
        raise StoreError(f"{device}: too short for a header", errno.EIO)
    magic, valid, version, chunk_size = HEADER.unpack(data)
    if magic == 0:
        return None
    if magic != MAGIC:
        raise StoreError(f"{device}: Invalid or corrupt snapshot (magic {magic:#x})", errno.ENXIO)
    wrong = wrong_chunk_size(chunk_size)
    if wrong:
        raise StoreError(f"{device}: invalid on-disk chunk size {chunk_size}: {wrong}.")
    if version != VERSION:
        raise StoreError(f"{device}: unable to handle snapshot disk version {version}")
    return Header(bool(valid), version, chunk_size)


def _assume_header(chunk_size: int) -> Header:
    wrong = wrong_chunk_size(chunk_size)
    if wrong:
        raise StoreError(f"chunk size {chunk_size}: {wrong}.")
    return Header(True, VERSION, chunk_size)


def exceptions_per_area(chunk_size: int) -> int:
    """Return E, the records in one metadata area, for a chunk size in sectors."""
    return chunk_size * SECTOR_SIZE // RECORD_SIZE


def area_location(area: int, chunk_size: int) -> int:
    """Return the chunk that holds metadata area `area`."""
    return 1 + (exceptions_per_area(chunk_size) + 1) * area


@dataclass(frozen=True)
class Finding:
    """One thing `check` found wrong.

    `kind` is a word for programs: header, truncated, old-twice, old-range, new-range, new-metadata,
    new-twice or tail; `area` and `record` say where, -1 where that has no meaning.
    """

    kind: str
    area: int
    record: int
    text: str

    def __str__(self) -> str:
        if self.area < 0:
            return self.text
        return f"area {self.area}, record {self.record}: {self.text}"


class Store:
    """What a persistent COW store held when it was opened. No device is needed, nothing is locked.

    `exceptions` is uint64[n, 2], old and new chunk in order of commit; `areas` uint64[a, E, 2] with
    every metadata area up to the one that ends the list. Both are read when first asked for.
    `chunk_size` (sectors) is taken instead of the header, where that is damaged.
    """

    def __init__(self, path: str | os.PathLike[str], *, chunk_size: int | None = None) -> None:
        self.path = os.fspath(path)
        with _File(self.path) as file:
            self.size = file.size
            header = read_header(file) if chunk_size is None else _assume_header(chunk_size)
        if header is None:
            raise StoreError(f"{self.path}: no COW store (magic 0)", errno.ENXIO)
        self.valid, self.version, self.chunk_size = header
        self.exceptions_per_area = exceptions_per_area(self.chunk_size)
        self._areas: numpy.ndarray[Any, Any] | None = None

    @property
    def nr_chunks(self) -> int:
        """Whole chunks in the file."""
        return self.size // (self.chunk_size * SECTOR_SIZE)

    @property
    def areas(self) -> numpy.ndarray[Any, Any]:
        """uint64[a, E, 2]: the metadata areas up to the one that ends the list of exceptions."""
        if self._areas is None:
            self._areas = self._read_areas()
        return self._areas

    def _read_areas(self) -> numpy.ndarray[Any, Any]:
        import numpy

        chunk_bytes = self.chunk_size * SECTOR_SIZE
        areas: list[numpy.ndarray[Any, Any]] = []
        with _File(self.path) as file:
            while True:
                where = area_location(len(areas), self.chunk_size) * chunk_bytes
                data = file.pread(chunk_bytes, where)
                if len(data) < chunk_bytes:
                    break
                areas.append(numpy.frombuffer(data, dtype="<u8").reshape(-1, 2))
                if not areas[-1][:, 1].all():
                    break
        if not areas:
            return numpy.empty((0, self.exceptions_per_area, 2), dtype="<u8")
        return numpy.stack(areas)

    @property
    def nr_exceptions(self) -> int:
        """How many records there are before the one that ends the list."""
        import numpy

        ends = numpy.flatnonzero(self.areas.reshape(-1, 2)[:, 1] == 0)
        return int(ends[0]) if len(ends) else self.areas.size // 2

    @property
    def exceptions(self) -> numpy.ndarray[Any, Any]:
        """uint64[n, 2]: (old chunk, new chunk) in order of commit."""
        return self.areas.reshape(-1, 2)[: self.nr_exceptions]

    @property
    def usage(self) -> tuple[int, int, int]:
        """(allocated, total, metadata) in sectors, as the status line of a device prints them."""
        allocated = int(self.exceptions[:, 1].max(initial=1)) + 1
        if allocated % (self.exceptions_per_area + 1) == 1:  # never handed out: a metadata area
            allocated += 1
        metadata = self.nr_exceptions // self.exceptions_per_area + 2
        return allocated * self.chunk_size, sectors(self.size), metadata * self.chunk_size

    def close(self) -> None:
        """Forget what was read; for the sake of `with`."""
        self._areas = None

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "valid" if self.valid else "invalid"
        return f"<Store {self.path} {state} chunk_size={self.chunk_size}>"


def open(path: str | os.PathLike[str]) -> Store:
    """Open a persistent COW store to look at it.

    StoreError if there is none or its header is wrong, ImageError if the file cannot be read.
    """
    return Store(path)


def check(path: str | os.PathLike[str]) -> list[Finding]:
    """Look for damage in a persistent COW store: an empty list is a sound one.

    The length of the origin is not on disk, so old chunks past its end are not found here. A file
    that cannot be read is an ImageError, not a finding.
    """
    try:
        store = Store(path)
    except StoreError as error:
        return [Finding("header", -1, -1, error.strerror or "")]
    return _look_for_damage(store)[0]


def _look_for_damage(
    store: Store, origin_size: int | None = None
) -> tuple[list[Finding], numpy.ndarray[Any, Any]]:
    """Return what is wrong, and a mask of the exceptions that are sound.

    Of two exceptions with the same old or new chunk the first is taken for the sound one.
    """
    import numpy

    findings: list[Finding] = []
    per_area = store.exceptions_per_area
    old, new = store.exceptions[:, 0], store.exceptions[:, 1]
    sound = numpy.ones(len(old), dtype=bool)
    nr_old = numpy.iinfo(numpy.uint64).max
    if origin_size is not None:
        nr_old = -(-origin_size // (store.chunk_size * SECTOR_SIZE))
    if store.nr_exceptions == store.areas.size // 2:
        place = area_location(len(store.areas), store.chunk_size)
        text = f"the list of exceptions does not end: area {len(store.areas)} at chunk {place} "
        text += "is past the end of the store"
        findings.append(Finding("truncated", len(store.areas), -1, text))
    for kind, wrong, text in (
        ("old-twice", _again(old), "old chunk {old} has an exception already"),
        ("new-twice", _again(new), "new chunk {new} is used by another exception"),
        ("new-metadata", new % (per_area + 1) == 1, "new chunk {new} is a metadata area"),
        (
            "new-range",
            new >= store.nr_chunks,
            "new chunk {new} is past the end of the store, which has {nr_chunks} chunks",
        ),
        ("old-range", old >= nr_old, "old chunk {old} is past the end of the origin"),
    ):
        sound &= ~wrong
        for i in numpy.flatnonzero(wrong):
            words = text.format(old=int(old[i]), new=int(new[i]), nr_chunks=store.nr_chunks)
            findings.append(Finding(kind, int(i) // per_area, int(i) % per_area, words))
    tail = store.areas.reshape(-1, 2)[store.nr_exceptions :]
    behind = numpy.flatnonzero(tail.any(axis=1))
    if len(behind):
        first = store.nr_exceptions + int(behind[0])
        text = "something stands behind the last exception; the next ones replace it"
        findings.append(Finding("tail", first // per_area, first % per_area, text))
    return findings, sound


def _again(values: numpy.ndarray[Any, Any]) -> numpy.ndarray[Any, Any]:
    """Tell for each value whether it stood before."""
    import numpy

    again = numpy.ones(len(values), dtype=bool)
    again[numpy.unique(values, return_index=True)[1]] = False
    return again


@dataclass(frozen=True)
class Repair:
    """What `repair` did: how many exceptions it kept, and what was wrong with the store.

    Every finding whose kind names a chunk (old-… or new-…) is an exception that is lost.
    """

    kept: int
    findings: list[Finding]


def repair(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    chunk_size: int | None = None,
    origin_size: int | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Repair:
    """Write what can be kept of a damaged store into a new file, and say what was lost.

    `chunk_size` (sectors) is needed where the header is damaged; with `origin_size` (bytes) old
    chunks past the end of the origin are found too. A store marked invalid lacks what the origin
    lost since, so it takes `force`; the new one is valid. `progress` is called with the exceptions
    copied and their number. `path` is only read; `output` must not exist.
    """
    store = Store(path, chunk_size=chunk_size)
    if not store.valid and not force:
        raise StoreError(f"{store.path}: marked invalid: what the origin lost since is not in it")
    findings, sound = _look_for_damage(store, origin_size)
    kept = store.exceptions[sound]
    try:
        _write_store(store, kept, os.fspath(output), progress)
    except FileExistsError as error:
        raise StoreError(f"{output}: exists already", errno.EEXIST) from error
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(f"{output}: cannot write: {error.strerror}", error.errno) from error
    return Repair(len(kept), findings)


def _write_store(
    store: Store,
    exceptions: numpy.ndarray[Any, Any],
    output: str,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Write a store of the same size that holds `exceptions`: data, then areas, then the header."""
    import numpy

    chunk_bytes = store.chunk_size * SECTOR_SIZE
    per_area = store.exceptions_per_area
    numbers = numpy.arange(len(exceptions), dtype=numpy.uint64)
    new_chunks = numbers + 2 + numbers // per_area
    records = numpy.zeros(((len(exceptions) // per_area + 1) * per_area, 2), dtype="<u8")
    records[: len(exceptions), 0] = exceptions[:, 0]
    records[: len(exceptions), 1] = new_chunks
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        os.ftruncate(file, store.size)
        with _File(store.path) as source:
            for i, (old, new) in enumerate(zip(exceptions[:, 1], new_chunks, strict=True)):
                data = source.pread(chunk_bytes, int(old) * chunk_bytes)
                if len(data) < chunk_bytes:
                    text = f"{store.path}: cut short while it was read"
                    raise StoreError(text, errno.EIO)
                _pwrite(file, data, int(new) * chunk_bytes)
                if progress:
                    progress(i + 1, len(exceptions))
        for area, content in enumerate(records.reshape(-1, per_area * 2)):
            _pwrite(file, content.tobytes(), area_location(area, store.chunk_size) * chunk_bytes)
        os.fsync(file)
        header = HEADER.pack(MAGIC, 1, VERSION, store.chunk_size)
        _pwrite(file, header.ljust(chunk_bytes, b"\0"), 0)
        os.fsync(file)
        _sync_name(output)
    except BaseException:
        os.unlink(output)
        raise
    finally:
        os.close(file)


def _pwrite(file: int, data: bytes, offset: int) -> None:
    """Write all of `data`: a disk that gets full, or a signal, may cut a write short."""
    left = memoryview(data)
    while left:
        done = os.pwrite(file, left, offset)
        left = left[done:]
        offset += done


def _sync_name(path: str) -> None:
    """Make the name of a new file durable, which its directory holds."""
    directory = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


class _File:
    """A file to read a store from."""

    def __init__(self, path: str) -> None:
        self._path = path
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError as error:
            raise ImageNotFound(f"{path}: no such file") from error
        except OSError as error:
            raise ImageError(f"{path}: cannot open: {error.strerror}", error.errno) from error
        mode = os.fstat(self._file).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            os.close(self._file)
            raise ImageError(f"{path}: neither a file nor a block device", errno.ENOTBLK)
        self.size = os.lseek(self._file, 0, os.SEEK_END)

    def pread(self, size: int, offset: int) -> bytes:
        try:
            return os.pread(self._file, size, offset)
        except OSError as error:
            raise ImageError(f"{self._path}: cannot read: {error.strerror}", error.errno) from error

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *exc_info: object) -> None:
        os.close(self._file)

    def __str__(self) -> str:
        return self._path
