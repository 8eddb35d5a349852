"""The persistent COW store as Linux lays it out, seen from Python: read it, dump it, check it.

In chunks of the header's chunk size: chunk 0 is the header, chunk 1 + (E + 1)·a is metadata area
a, every other chunk holds data; E = chunk bytes / 16 records an area. A record is two little-endian
u64, old chunk (of the origin) and new chunk (of the store); one whose new chunk is 0 ends the list.
(dm-snap-persistent.c; the transient store "N" leaves nothing on disk to read.)
"""

from __future__ import annotations

import errno
import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from cow.errors import ImageNotFound, StoreError
from cow.units import MAX_CHUNK_SIZE, SECTOR_SIZE, is_power_of_2

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


def exceptions_per_area(chunk_size: int) -> int:
    """Return E, the records in one metadata area, for a chunk size in sectors."""
    return chunk_size * SECTOR_SIZE // RECORD_SIZE


def area_location(area: int, chunk_size: int) -> int:
    """Return the chunk that holds metadata area `area`."""
    return 1 + (exceptions_per_area(chunk_size) + 1) * area


@dataclass(frozen=True)
class Finding:
    """One thing `check` found wrong.

    `kind` is a word for programs: header, truncated, old-twice, new-range, new-metadata, new-twice
    or tail; `area` and `record` say where, -1 where that has no meaning.
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
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        with _File(self.path) as file:
            self.size = file.size
            header = read_header(file)
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
    """Open a persistent COW store to look at it; StoreError if the header cannot be read."""
    return Store(path)


def check(path: str | os.PathLike[str]) -> list[Finding]:
    """Look for damage in a persistent COW store: an empty list is a sound one.

    The length of the origin is not on disk, so old chunks past its end are not found here.
    """
    import numpy

    try:
        store = Store(path)
    except StoreError as error:
        return [Finding("header", -1, -1, error.strerror or "")]
    findings = []
    per_area = store.exceptions_per_area
    if store.nr_exceptions == store.areas.size // 2:
        findings.append(
            Finding(
                "truncated",
                len(store.areas),
                -1,
                f"the list of exceptions does not end: area {len(store.areas)} at chunk "
                f"{area_location(len(store.areas), store.chunk_size)} is past the end of the store",
            )
        )
    old, new = store.exceptions[:, 0], store.exceptions[:, 1]

    def add(kind: str, wrong: numpy.ndarray[Any, Any], text: str) -> None:
        for i in numpy.flatnonzero(wrong):
            words = text.format(old=int(old[i]), new=int(new[i]), nr_chunks=store.nr_chunks)
            findings.append(Finding(kind, int(i) // per_area, int(i) % per_area, words))

    add("old-twice", _again(old), "old chunk {old} has an exception already")
    add("new-twice", _again(new), "new chunk {new} is used by another exception")
    add("new-metadata", new % (per_area + 1) == 1, "new chunk {new} is a metadata area")
    outside = "new chunk {new} is past the end of the store, which has {nr_chunks} chunks"
    add("new-range", new >= store.nr_chunks, outside)
    tail = store.areas.reshape(-1, 2)[store.nr_exceptions :]
    behind = numpy.flatnonzero(tail.any(axis=1))
    if len(behind):
        i = store.nr_exceptions + int(behind[0])
        text = "something stands behind the last exception; the next ones replace it"
        findings.append(Finding("tail", i // per_area, i % per_area, text))
    return findings


def _again(values: numpy.ndarray[Any, Any]) -> numpy.ndarray[Any, Any]:
    """Tell for each value whether it stood before."""
    import numpy

    again = numpy.ones(len(values), dtype=bool)
    again[numpy.unique(values, return_index=True)[1]] = False
    return again


class _File:
    """A file to read a store from."""

    def __init__(self, path: str) -> None:
        self._path = path
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise ImageNotFound(f"{path}: no such file") from error
        except OSError as error:
            raise StoreError(f"{path}: cannot open: {error.strerror}", error.errno) from error
        self.size = os.lseek(self._file, 0, os.SEEK_END)

    def pread(self, size: int, offset: int) -> bytes:
        try:
            return os.pread(self._file, size, offset)
        except OSError as error:
            raise StoreError(f"{self._path}: cannot read: {error.strerror}", error.errno) from error

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *exc_info: object) -> None:
        os.close(self._file)

    def __str__(self) -> str:
        return self._path
