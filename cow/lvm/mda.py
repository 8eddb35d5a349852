"""The metadata area (mda) of a PV: a header of one sector, and a ring that holds the texts.

The header, little-endian: u32 checksum of the rest of its 512 bytes, 16 bytes of magic, u32 version
1, u64 where it lies on the device, u64 size of the area, header included; then two slots of {u64
offset in the area, u64 size, u32 checksum, u32 flags}: slot 0 is the committed text, slot 1 the
precommitted one. Sizes count the NUL behind the text. A text that meets the end of the area goes on
behind the header. (format_text/format-text.c)

A new text is written where it hurts none that counts; the header, one sector, is what switches from
the old to the new one.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from enum import IntFlag
from typing import TYPE_CHECKING, Final, NamedTuple

from cow.lvm.errors import MetadataError, NoSpaceError
from cow.lvm.label import checksum
from cow.units import SECTOR_SIZE

if TYPE_CHECKING:
    from cow import _core

MAGIC: Final = b" LVM2 x[5A%r0N*>"
VERSION: Final = 1
HEADER_SIZE: Final = 512
MAX_TEXT: Final = 64 << 20
"""The longest text that is read, in bytes; a thousand LVs need half a MiB."""

_HEADER = struct.Struct("<I16sIQQ")
_SLOT = struct.Struct("<QQII")
_CHECKED_FROM = 4
_IGNORED = 1


class Bad(IntFlag):
    """What is wrong with an area, with LVM's numbers (BAD_MDA_…)."""

    READ = 0x01
    HEADER = 0x04
    TEXT = 0x08
    CHECKSUM = 0x10
    MAGIC = 0x20
    VERSION = 0x40
    START = 0x80


REPAIRABLE: Final = Bad.HEADER | Bad.TEXT | Bad.CHECKSUM
"""What `vgck --updatemetadata` writes anew; with other damage the area is left alone."""


class Location(NamedTuple):
    """Where a text lies: offset in the area and size in bytes, its checksum, flags."""

    offset: int
    size: int
    checksum: int
    flags: int = 0

    @property
    def present(self) -> bool:
        """Whether there is a text."""
        return self.offset != 0


NOWHERE: Final = Location(0, 0, 0)


class MetadataArea:
    """One mda. `read` fills in the rest; `where` names the device in messages."""

    def __init__(
        self, device: _core.BlockDevice, where: str, start: int, size: int, number: int
    ) -> None:
        self.device = device
        self.where = where
        self.start = start
        self.size = size
        """Bytes, header included: the label's word until the header was read."""
        self.number = number
        """1 or 2: it is called mda1 or mda2."""
        self.bad = Bad(0)
        self.committed = NOWHERE
        self.precommitted = NOWHERE
        self.seqno: int | None = None
        """Of the committed text, where it was read."""
        self._written: Location | None = None
        self._seen = b""

    @property
    def ignored(self) -> bool:
        """Whether it is set aside: it holds no text and gets none."""
        return bool(self.committed.flags & _IGNORED)

    @property
    def max_text(self) -> int:
        """The longest text, in bytes with its NUL: two have to fit, each from a new sector on."""
        return max((self.size - HEADER_SIZE) // 2 - SECTOR_SIZE, 0)

    @property
    def free(self) -> int:
        """What LVM calls free space: how much longer the text may get, in bytes."""
        return max(self.max_text - self.committed.size, 0)

    def __repr__(self) -> str:
        return f"<MetadataArea {self.where} mda{self.number} at {self.start}>"

    # Reading.

    def read(self, warn: Callable[[str], None] | None = None) -> None:
        """Read the header; what is wrong with it goes to `bad` and to `warn`, in LVM's words."""
        self.bad = Bad(0)
        self.committed = self.precommitted = NOWHERE
        data = self._seen = self._read_at(self.start, HEADER_SIZE)
        wrong = []
        if len(data) < HEADER_SIZE:
            wrong.append((Bad.READ, "failed to read mda header"))
        else:
            crc, magic, version, start, size = _HEADER.unpack_from(data)
            if crc != checksum(data[_CHECKED_FROM:]):
                wrong.append((Bad.CHECKSUM, f"wrong checksum {crc:x} in mda header"))
            if magic != MAGIC:
                wrong.append((Bad.MAGIC, "wrong magic number in mda header"))
            if version != VERSION:
                wrong.append((Bad.VERSION, f"wrong version {version} in mda header"))
            if start != self.start:
                wrong.append((Bad.START, f"wrong start sector {start} in mda header"))
            if size < HEADER_SIZE and not wrong:
                wrong.append((Bad.HEADER, f"wrong size {size} in mda header"))
        for flag, text in wrong:
            self.bad |= flag | Bad.HEADER
            if warn:
                warn(f"WARNING: {text} on {self.where} at {self.start}")
        if not wrong:
            self.size = size
            self.committed = Location(*_SLOT.unpack_from(data, _HEADER.size))
            self.precommitted = Location(*_SLOT.unpack_from(data, _HEADER.size + _SLOT.size))

    def changed(self) -> bool:
        """Tell whether the header on disk is no longer the one that was read or written."""
        return self._read_at(self.start, HEADER_SIZE) != self._seen

    def read_text(self) -> bytes:
        """Return the committed text without its NUL; MetadataError if it cannot be one."""
        at = self.start + self.committed.offset
        parts = self._parts(self.committed)
        data = [self._read_at(offset, size) for offset, size in parts]
        if [len(part) for part in data] != [size for _, size in parts]:
            raise MetadataError(f"Failed to read metadata text on {self.where} at offset {at}.")
        if checksum(*data) != self.committed.checksum:
            raise MetadataError(f"Checksum error on {self.where} at offset {at}.")
        return b"".join(data).partition(b"\0")[0]

    def _read_at(self, offset: int, size: int) -> bytes:
        if offset + size > self.device.size:
            return b""
        try:
            return self.device.pread(size, offset)
        except OSError:
            return b""

    def _parts(self, location: Location) -> list[tuple[int, int]]:
        """Return where a text lies on the device: (offset, size) once, or twice if it wraps."""
        offset, size = location.offset, location.size
        where = f"on {self.where} at {self.start}"
        if not HEADER_SIZE <= offset < self.size:
            raise MetadataError(f"metadata text offset {offset} is outside the area {where}")
        if not 0 < size <= self.size - HEADER_SIZE:
            raise MetadataError(f"metadata text size {size} is larger than the area {where}")
        if size > MAX_TEXT:
            raise MetadataError(f"metadata text size {size} is over the limit {MAX_TEXT} {where}")
        first = min(size, self.size - offset)
        parts = [(self.start + offset, first)]
        if first < size:
            parts.append((self.start + HEADER_SIZE, size - first))
        return parts

    # Writing: text, precommit, commit, each to be flushed before the next.

    def write_text(self, text: bytes, what: str) -> None:
        """Write a text (with its NUL) into free room of the ring; no slot points there yet.

        `what` names VG and seqno in errors.
        """
        if len(text) > self.max_text:
            raise NoSpaceError(
                f"{what} metadata on {self.where} ({len(text)} bytes) exceeds maximum metadata size"
                f" ({self.max_text} bytes)"
            )
        location = Location(self._next_offset(), len(text), checksum(text))
        room = self._room(location.offset)
        if len(text) > room:
            raise NoSpaceError(
                f"{what} metadata on {self.where} ({len(text)} bytes) does not fit beside the"
                f" committed one ({room} bytes)"
            )
        padded = text.ljust(min(-(-len(text) // SECTOR_SIZE) * SECTOR_SIZE, room), b"\0")
        for offset, size in self._parts(location._replace(size=len(padded))):
            self.device.pwrite(padded[:size], offset)
            padded = padded[size:]
        self._written = location

    @property
    def _occupied(self) -> Location:
        """The committed text, if it is one."""
        if self.bad or not HEADER_SIZE <= self.committed.offset < self.size:
            return NOWHERE
        return self.committed

    def _next_offset(self) -> int:
        """Return where LVM puts the next text: behind the committed one, from a new sector on."""
        old = self._occupied
        if not old.present:
            return HEADER_SIZE
        last = old.offset + old.size - 1
        if last >= self.size:
            last -= self.size - HEADER_SIZE
        new = (last + SECTOR_SIZE) // SECTOR_SIZE * SECTOR_SIZE
        if self.size - last < SECTOR_SIZE or new > self.size - SECTOR_SIZE:
            return HEADER_SIZE
        return new

    def _room(self, offset: int) -> int:
        """Return the bytes from `offset` around the ring to where the committed text begins."""
        ring = self.size - HEADER_SIZE
        old = self._occupied
        if not old.present:
            return ring
        gap = (offset - old.offset) % ring
        return ring - gap if gap >= old.size else 0

    def precommit(self) -> None:
        """Let slot 1 point to the text that was written; slot 0 stays in force."""
        assert self._written is not None
        self.precommitted = self._written
        self._write_header()

    def commit(self) -> None:
        """Let slot 0 point to the text that was written, and flush it.

        If that fails the fields are as before, so that revert() can write the old header again.
        """
        assert self._written is not None
        before = self.committed, self.precommitted
        self.committed, self.precommitted = self._written, NOWHERE
        try:
            self._write_header()
            self.device.flush()
        except BaseException:
            self.committed, self.precommitted = before
            raise
        self._written = None
        self.bad = Bad(0)

    def revert(self) -> None:
        """Clear slot 1, if it was written."""
        self._written = None
        if self.precommitted.present:
            self.precommitted = NOWHERE
            self._write_header()

    def initialize(self, *, ignored: bool = False) -> None:
        """Write an empty header, as a new PV and a removed VG have."""
        self.bad = Bad(0)
        self._written = None
        self.committed = Location(0, 0, 0, _IGNORED if ignored else 0)
        self.precommitted = NOWHERE
        self.seqno = None
        self._write_header()

    def _write_header(self) -> None:
        data = struct.pack("<16sIQQ", MAGIC, VERSION, self.start, self.size)
        data += _SLOT.pack(*self.committed) + _SLOT.pack(*self.precommitted)
        data = data.ljust(HEADER_SIZE - _CHECKED_FROM, b"\0")
        data = struct.pack("<I", checksum(data)) + data
        self.device.pwrite(data, self.start)
        self._seen = data
