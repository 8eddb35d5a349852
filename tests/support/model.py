"""A model of device-mapper with snapshots in plain bytes and dicts, to run beside the engine.

It has the methods of cow.Mapper that programs use, and knows nothing of the engine: it follows
facts on the kernel's behaviour one request at a time, without threads, barriers or speed. A merge
runs to its end inside `resume`. What it does not model raises Nonsense, before anything changed.

Offsets and lengths are bytes, in tables sectors, as everywhere.
"""

from __future__ import annotations

import copy
import errno
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from . import SECTOR, area_location


class Nonsense(Exception):
    """The request has no meaning in the model; nothing was changed."""


def failure(code: int, text: str = "") -> OSError:
    """Return the error the kernel answers with."""
    return OSError(code, text or os.strerror(code))


def too_small(device: Device) -> Exception:
    """Return what a table past the end of what lies below meets: a reload only at its resume."""
    if device.live is None:
        return failure(errno.EINVAL, "too small for target")
    return Nonsense("a reload past the end of what lies below")


def pieces(offset: int, length: int, unit: int) -> Iterator[tuple[int, int]]:
    """Cut a range into (offset, length) at the multiples of `unit`."""
    end = offset + length
    while offset < end:
        count = min(end, (offset // unit + 1) * unit) - offset
        yield offset, count
        offset += count


def images_of(block: Block) -> Iterator[Image]:
    """Yield the images that a block is, or lies on."""
    if isinstance(block, Image):
        yield block
    elif isinstance(block, Device):
        for target in block.live or []:
            for below in target.blocks():
                yield from images_of(below)


class Block(Protocol):
    """What a table can name: an image or a device."""

    label: str

    @property
    def size(self) -> int: ...
    def read(self, offset: int, length: int) -> bytes: ...
    def write(self, offset: int, data: bytes) -> None: ...
    def discard(self, offset: int, length: int) -> None: ...
    def can_discard(self) -> bool: ...
    def forget(self, keep: int) -> None: ...


class Image:
    """An image: bytes. `known` says how far its contents are determined (None: all of it)."""

    def __init__(self, label: str, data: bytes) -> None:
        self.label = label
        self.data = bytearray(data)
        self.known: int | None = None

    @property
    def size(self) -> int:
        return len(self.data)

    def read(self, offset: int, length: int) -> bytes:
        if offset + length > self.size:
            raise failure(errno.EIO)
        return bytes(self.data[offset : offset + length])

    def write(self, offset: int, data: bytes) -> None:
        if offset + len(data) > self.size:
            raise failure(errno.EIO)
        self.data[offset : offset + len(data)] = data

    def discard(self, offset: int, length: int) -> None:
        self.write(offset, bytes(length))

    def can_discard(self) -> bool:
        return True

    def forget(self, keep: int) -> None:
        self.known = keep


# --- targets ------------------------------------------------------------------------------------


class Target:
    """One line of a table. Offsets are those of the whole device."""

    kind = ""

    def __init__(self, model: Model, device: Device, start: int, length: int) -> None:
        self.model = model
        self.device = device
        self.start = start
        self.length = length

    def blocks(self) -> list[Block]:
        return []

    def read(self, offset: int, length: int) -> bytes:
        raise NotImplementedError

    def write(self, offset: int, data: bytes) -> None:
        raise NotImplementedError

    def discard(self, offset: int, length: int) -> None:
        raise NotImplementedError

    def can_discard(self) -> bool:
        return all(block.can_discard() for block in self.blocks())

    def forget(self) -> None:
        for block in self.blocks():
            block.forget(0)

    def preresume(self) -> None:
        pass

    def resume(self) -> None:
        pass

    def destroy(self) -> None:
        pass

    def table(self) -> str:
        return ""

    def status(self) -> str:
        return ""


class Linear(Target):
    kind = "linear"

    def __init__(self, model, device, start, length, args) -> None:
        super().__init__(model, device, start, length)
        if len(args) != 2:
            raise failure(errno.EINVAL, "Invalid argument count")
        if not args[1].isdigit():
            raise failure(errno.EINVAL, "Invalid device sector")
        self.dev = model.block(args[0])
        self.offset = int(args[1])
        if (self.offset + length) * SECTOR > self.dev.size:
            raise too_small(device)

    def blocks(self):
        return [self.dev]

    def below(self, offset: int) -> int:
        return offset + (self.offset - self.start) * SECTOR

    def read(self, offset, length):
        return self.dev.read(self.below(offset), length)

    def write(self, offset, data):
        self.dev.write(self.below(offset), data)

    def discard(self, offset, length):
        self.dev.discard(self.below(offset), length)

    def table(self):
        return f"{self.dev.label} {self.offset}"


class Striped(Target):
    kind = "striped"

    def __init__(self, model, device, start, length, args) -> None:
        super().__init__(model, device, start, length)
        if len(args) < 2 or not all(word.isdigit() for word in args[:2]):
            raise failure(errno.EINVAL)
        count, self.chunk = int(args[0]), int(args[1])
        if not count or not self.chunk or length % count or (length // count) % self.chunk:
            raise failure(errno.EINVAL)
        if len(args) != 2 + 2 * count:
            raise failure(errno.EINVAL)
        self.legs = [
            (model.block(dev), int(at)) for dev, at in zip(args[2::2], args[3::2], strict=True)
        ]
        for dev, at in self.legs:
            if (at + length // count) * SECTOR > dev.size:
                raise too_small(device)

    def blocks(self):
        return [dev for dev, _ in self.legs]

    def below(self, offset: int) -> tuple[Block, int]:
        chunk, rest = divmod(offset - self.start * SECTOR, self.chunk * SECTOR)
        dev, at = self.legs[chunk % len(self.legs)]
        return dev, at * SECTOR + chunk // len(self.legs) * self.chunk * SECTOR + rest

    def cut(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        begin = self.start * SECTOR
        for at, count in pieces(offset - begin, length, self.chunk * SECTOR):
            yield at + begin, count

    def read(self, offset, length):
        parts = []
        for at, count in self.cut(offset, length):
            dev, below = self.below(at)
            parts.append(dev.read(below, count))
        return b"".join(parts)

    def write(self, offset, data):
        for at, count in self.cut(offset, len(data)):
            dev, below = self.below(at)
            dev.write(below, data[at - offset : at - offset + count])

    def discard(self, offset, length):
        for at, count in self.cut(offset, length):
            dev, below = self.below(at)
            dev.discard(below, count)

    def table(self):
        legs = " ".join(f"{dev.label} {at}" for dev, at in self.legs)
        return f"{len(self.legs)} {self.chunk} {legs}"

    def status(self):
        devs = " ".join(dev.label for dev, _ in self.legs)
        return f"{len(self.legs)} {devs} 1 {'A' * len(self.legs)}"


class Zero(Target):
    kind = "zero"

    def __init__(self, model, device, start, length, args) -> None:
        super().__init__(model, device, start, length)
        if args:
            raise failure(errno.EINVAL, "No arguments required")

    def read(self, offset, length):
        return bytes(length)

    def write(self, offset, data):
        pass

    def discard(self, offset, length):
        pass


class Error(Target):
    kind = "error"

    def __init__(self, model, device, start, length, args) -> None:
        super().__init__(model, device, start, length)

    def read(self, offset, length):
        raise failure(errno.EIO)

    def write(self, offset, data):
        raise failure(errno.EIO)

    def discard(self, offset, length):
        raise Nonsense("discard of an error target")


class Flakey(Linear):
    """Down from the start and for ever: it drops writes, or answers nothing but EIO."""

    kind = "flakey"

    def __init__(self, model, device, start, length, args) -> None:
        super().__init__(model, device, start, length, args[:2])
        if args[2:] not in (["0", "1", "1", "drop_writes"], ["0", "1"]):
            raise Nonsense("a flakey target that is not always down")
        self.words = args[2:]

    def read(self, offset, length):
        if len(self.words) == 2:
            raise failure(errno.EIO)
        return super().read(offset, length)

    def write(self, offset, data):
        if len(self.words) == 2:
            raise failure(errno.EIO)

    def discard(self, offset, length):
        raise Nonsense("a discard of a flakey target")

    def table(self):
        words = self.words if len(self.words) > 2 else [*self.words, "0"]
        return f"{super().table()} {' '.join(words)}"


class Mirror(Target):
    """In step from the start; no leg fails."""

    kind = "mirror"

    def __init__(self, model, device, start, length, args) -> None:
        super().__init__(model, device, start, length)
        self.log = args[:4]
        if args[:2] != ["core", "2"] or args[3:5] != ["nosync", "2"] or len(args) != 9:
            raise Nonsense("a mirror other than core 2 REGION nosync 2")
        self.region = int(args[2])
        self.legs = [(model.block(args[n]), int(args[n + 1])) for n in (5, 7)]
        for dev, at in self.legs:
            if (at + length) * SECTOR > dev.size:
                raise too_small(device)

    def blocks(self):
        return [dev for dev, _ in self.legs]

    def below(self, offset: int) -> list[tuple[Block, int]]:
        return [(dev, offset + (at - self.start) * SECTOR) for dev, at in self.legs]

    def read(self, offset, length):
        dev, at = self.below(offset)[0]
        return dev.read(at, length)

    def write(self, offset, data):
        for dev, at in self.below(offset):
            dev.write(at, data)

    def discard(self, offset, length):
        for dev, at in self.below(offset):
            dev.discard(at, length)

    def table(self):
        legs = " ".join(f"{dev.label} {at}" for dev, at in self.legs)
        return f"{' '.join(self.log)} {len(self.legs)} {legs}"

    def status(self):
        regions = -(-self.length // self.region)
        devs = " ".join(dev.label for dev in self.blocks())
        return f"{len(self.legs)} {devs} {regions}/{regions} 1 {'A' * len(self.legs)} 1 core"


class Origin(Target):
    kind = "snapshot-origin"

    def __init__(self, model, device, start, length, args) -> None:
        super().__init__(model, device, start, length)
        if len(args) != 1:
            raise failure(errno.EINVAL, "origin: incorrect number of arguments")
        self.dev = model.block(args[0])
        if length * SECTOR > self.dev.size:
            raise too_small(device)

    def blocks(self):
        return [self.dev]

    def read(self, offset, length):
        return self.dev.read(offset, length)

    def write(self, offset, data):
        self.model.break_sharing(self.dev, offset, len(data))
        self.dev.write(offset, data)

    def can_discard(self):
        return False

    def table(self):
        return self.dev.label


# --- exception stores ---------------------------------------------------------------------------


class Transient:
    """Chunks are handed out from 0; nothing is kept on the COW device but data."""

    letter = "N"

    def __init__(self, cow: Block, chunk: int) -> None:
        self.cow = cow
        self.chunk = chunk
        self.overflow = False
        self.next_free = 0

    def load(self) -> dict[int, int]:
        return {}

    def prepare(self) -> int | None:
        if self.cow.size < (self.next_free + 1) * self.chunk * SECTOR:
            return None
        self.next_free += 1
        return self.next_free - 1

    def commit(self, old: int, new: int) -> bool:
        return True

    def drop(self) -> None:
        pass

    def usage(self) -> str:
        return f"{self.next_free * self.chunk}/{self.cow.size // SECTOR} 0"


class Persistent:
    """Header, areas of records, data; `area` and `committed` say where the next record goes."""

    def __init__(self, cow: Block, chunk: int, overflow: bool) -> None:
        self.cow = cow
        self.chunk = chunk
        self.overflow = overflow
        self.good = True
        self.marked_valid = True
        self.area = 0
        self.committed = 0
        self.next_free = 2
        self.buffer = bytearray()

    @property
    def letter(self) -> str:
        return "PO" if self.overflow else "P"

    @property
    def per_area(self) -> int:
        return 32 * self.chunk

    def at(self, chunk: int) -> int:
        return chunk * self.chunk * SECTOR

    def write_header(self, valid: int) -> None:
        header = struct.pack("<IIII", 0x70416E53, valid, 1, self.chunk)
        self.cow.write(0, header.ljust(self.chunk * SECTOR, b"\0"))

    def area_at(self, area: int) -> int:
        return self.at(area_location(area, self.chunk))

    def load(self) -> dict[int, int]:
        # The header is read as a chunk of the table's size, or of the default one.
        magic, valid, version, chunk = struct.unpack_from(
            "<IIII", self.cow.read(0, (self.chunk or 32) * SECTOR)
        )
        if magic == 0:
            self.chunk = self.chunk or 32
            self.buffer = bytearray(self.chunk * SECTOR)
            self.cow.write(self.area_at(0), bytes(self.buffer))
            self.write_header(1)
            return {}
        if magic != 0x70416E53:
            raise failure(errno.ENXIO)
        if version != 1 or chunk & (chunk - 1) or not 0 < chunk < 1 << 22:
            raise failure(errno.EINVAL)
        self.chunk = chunk
        if not valid:
            self.marked_valid = False
            return {}
        exceptions: dict[int, int] = {}
        highest = 1
        while True:
            self.buffer = bytearray(self.cow.read(self.area_at(self.area), chunk * SECTOR))
            for slot in range(self.per_area):
                old, new = self.record(slot)
                if new == 0:
                    self.committed = slot
                    self.next_free = max(2, highest + 1)
                    self.skip_metadata()
                    return exceptions
                exceptions[old] = new
                highest = max(highest, new)
            self.area += 1

    def record(self, slot: int) -> tuple[int, int]:
        return struct.unpack_from("<QQ", self.buffer, 16 * slot)

    def skip_metadata(self) -> None:
        if self.next_free % (self.per_area + 1) == 1:
            self.next_free += 1

    def prepare(self) -> int | None:
        if self.cow.size < self.at(self.next_free + 1):
            return None
        new = self.next_free
        self.next_free += 1
        self.skip_metadata()
        return new

    def write_area(self) -> None:
        self.cow.write(self.area_at(self.area), bytes(self.buffer))

    def commit(self, old: int, new: int) -> bool:
        struct.pack_into("<QQ", self.buffer, 16 * self.committed, old, new)
        self.committed += 1
        full = self.committed == self.per_area
        try:
            if full:
                self.cow.write(self.area_at(self.area + 1), bytes(self.chunk * SECTOR))
            if self.good:
                self.write_area()
        except OSError:
            self.good = False
        if full:
            self.area += 1
            self.committed = 0
            self.buffer = bytearray(self.chunk * SECTOR)
        return self.good

    def drop(self) -> None:
        try:
            self.write_header(0)
        except OSError:
            self.good = False
        self.cow.forget(16)

    def prepare_merge(self) -> list[tuple[int, int]]:
        """Return the next run to merge, last record first; empty when all is merged."""
        if self.committed == 0:
            if self.area == 0:
                return []
            self.area -= 1
            self.buffer = bytearray(self.cow.read(self.area_at(self.area), self.chunk * SECTOR))
            self.committed = self.per_area
        run = [self.record(self.committed - 1)]
        while len(run) < self.committed:
            old, new = self.record(self.committed - 1 - len(run))
            if (old + 1, new + 1) != run[-1]:
                break
            run.append((old, new))
        return run

    def commit_merge(self, count: int) -> None:
        first = 16 * (self.committed - count)
        self.buffer[first : 16 * self.committed] = bytes(16 * count)
        self.write_area()
        self.committed -= count
        self.next_free = area_location(self.area, self.chunk) + self.committed + 1

    def usage(self) -> str:
        total = self.cow.size // SECTOR
        return f"{self.next_free * self.chunk}/{total} {(self.area + 2) * self.chunk}"


# --- snapshot and snapshot-merge ----------------------------------------------------------------

FEATURES = ["discard_zeroes_cow", "discard_passdown_origin"]


class Snapshot(Target):
    kind = "snapshot"

    def __init__(self, model, device, start, length, args) -> None:
        super().__init__(model, device, start, length)
        self.exceptions: dict[int, int] = {}
        self.valid = True
        self.active = False
        self.overflowed = False
        self.merge_failed = False
        if len(args) < 4:
            raise failure(errno.EINVAL, "requires 4 or more arguments")
        self.features = self.parse_features(args[4:])
        self.origin = model.block(args[0])
        self.cow = model.block(args[1])
        if self.origin is self.cow:
            raise failure(errno.EINVAL, "COW device cannot be the same as origin device")
        if any(image.known == 0 for image in images_of(self.cow)):
            raise Nonsense("the contents of the COW image are not determined")
        self.store = self.parse_store(args[2], args[3])
        if length * SECTOR > self.origin.size:
            raise too_small(device)
        if not self.register():
            try:
                self.exceptions = self.store.load()
            except OSError:
                model.snapshots.remove(self)
                raise
            if any(old * self.unit >= self.origin.size for old in self.exceptions):
                model.snapshots.remove(self)
                raise Nonsense("a store of a larger origin")
            self.valid = getattr(self.store, "marked_valid", True)
            if not self.store.chunk:
                model.snapshots.remove(self)
                raise failure(errno.EINVAL, "Chunk size not set")

    @staticmethod
    def parse_features(words: list[str]) -> list[str]:
        if not words:
            return []
        if not words[0].isdigit() or not int(words[0]) <= min(2, len(words) - 1):
            raise failure(errno.EINVAL, "Invalid number of feature arguments")
        given = [word.lower() for word in words[1 : 1 + int(words[0])]]
        if any(word not in FEATURES for word in given):
            raise failure(errno.EINVAL, "Unrecognised feature requested")
        if given and FEATURES[0] not in given:
            raise failure(errno.EINVAL, "discard_passdown_origin feature depends")
        return [word for word in FEATURES if word in given]

    def parse_store(self, letter: str, chunk: str) -> Persistent | Transient:
        kind, option = letter[:1].upper(), letter[1:2].upper()
        size = int(chunk) if chunk.isdigit() else -1
        good = size >= 0 and size & (size - 1) == 0 and size < 1 << 22
        if not good or kind not in ("P", "N") or (kind == "P" and option not in ("", "O")):
            raise failure(errno.EINVAL, "Couldn't create exception store")
        if kind == "N":
            if self.kind == "snapshot-merge":
                if any(other.cow is self.cow for other in self.model.snapshots):
                    raise Nonsense("a merge that names another store type than its source")
                raise failure(errno.EINVAL, "does not support snapshot-merge.")
            return Transient(self.cow, size)
        return Persistent(self.cow, size, option == "O")

    def blocks(self):
        return [self.origin, self.cow]

    @property
    def unit(self) -> int:
        return self.store.chunk * SECTOR

    # handover: at most two tables share a COW device, one of them not resumed yet

    def sharing(self) -> tuple[Snapshot | None, Snapshot | None]:
        """Return (source, destination) among the registered snapshots with this COW device."""
        source = destination = None
        for other in self.model.family(self.origin):
            if other.cow is self.cow:
                if other.active:
                    source = other
                else:
                    destination = other
        return source, destination

    def register(self) -> bool:
        """Join the family; return whether the exceptions will come from another table."""
        if any(s.cow is self.cow and s.origin is not self.origin for s in self.model.snapshots):
            raise Nonsense("one COW device under two origins")
        same = [s for s in self.model.family(self.origin) if s.cow is self.cow]
        if len(same) == 2 or any(not s.active for s in same):
            raise failure(errno.EINVAL, "Snapshot cow pairing for exception table handover failed")
        if same:
            if self.kind == "snapshot-merge":
                if any(s.kind == "snapshot-merge" for s in self.model.family(self.origin)):
                    raise failure(errno.EINVAL, "A snapshot is already merging.")
                if same[0].store.letter == "N":
                    raise failure(errno.EINVAL, "does not support snapshot-merge.")
            if same[0].store.letter[0] != self.store.letter[0]:
                raise Nonsense("handover between store types")
            self.store.chunk = 0
        self.model.snapshots.append(self)
        return bool(same)

    def preresume(self):
        source, destination = self.sharing()
        if source is None or destination is None:
            return
        if source is self:
            text = "Unable to resume snapshot source until handover completes."
            raise failure(errno.EINVAL, text)
        if not source.device.suspended:
            text = "Unable to perform snapshot handover until source is suspended."
            raise failure(errno.EINVAL, text)

    def resume(self):
        source, destination = self.sharing()
        if source is not None and destination is self:
            source.exceptions, self.exceptions = {}, source.exceptions
            source.store, self.store = self.store, source.store
            self.store.overflow = source.store.overflow
            self.valid, source.valid = source.valid, False
            self.overflowed = source.overflowed
        self.active = True

    def destroy(self):
        source, destination = self.sharing()
        if source is self and destination is not None:
            destination.valid = False
        self.model.snapshots.remove(self)

    # reads and writes, a chunk at a time

    def read(self, offset, length):
        if not self.valid:
            raise failure(errno.EIO)
        parts = []
        for at, count in pieces(offset, length, self.unit):
            new = self.exceptions.get(at // self.unit)
            if new is None:
                parts.append(self.origin.read(at, count))
            else:
                parts.append(self.cow.read(new * self.unit + at % self.unit, count))
        return b"".join(parts)

    def write(self, offset, data):
        failed = False
        for at, count in pieces(offset, len(data), self.unit or SECTOR):
            part = data[at - offset : at - offset + count]
            failed |= not self.write_piece(at, part)
        if failed:
            raise failure(errno.EIO)

    def write_piece(self, at: int, data: bytes) -> bool:
        if not self.valid or self.overflowed:
            return False
        old, within = divmod(at, self.unit)
        if old not in self.exceptions:
            new = self.store.prepare()
            if new is None:
                if self.store.overflow:
                    self.overflowed = True
                else:
                    self.invalidate()
                return False
            if not self.copy_out(old, new, data if len(data) == self.unit else None):
                return False
        self.cow.write(self.exceptions[old] * self.unit + within, data)
        return True

    def copy_out(self, old: int, new: int, data: bytes | None = None) -> bool:
        """Give chunk `old` its own copy; a failure makes the snapshot invalid."""
        try:
            if data is None:
                count = min(self.unit, self.origin.size - old * self.unit)
                data = self.origin.read(old * self.unit, count)
            self.cow.write(new * self.unit, data)
        except OSError:
            self.invalidate()
            return False
        if not self.store.commit(old, new):
            self.invalidate()
            return False
        self.exceptions[old] = new
        return True

    def invalidate(self) -> None:
        if self.valid:
            self.valid = False
            self.cow.forget(0)
            self.store.drop()
            self.device.event_nr += 1

    def origin_changes(self, at: int) -> None:
        """Keep what the origin holds at `at` before it is overwritten."""
        if self.kind == "snapshot-merge" or not self.valid or not self.active:
            return
        old = at // self.unit
        if at >= self.device.size or old in self.exceptions:
            return
        new = self.store.prepare()
        if new is None:
            self.invalidate()
        else:
            self.copy_out(old, new)

    def discard(self, offset, length):
        failed = False
        for at, count in pieces(offset, length, self.unit or SECTOR):
            if not self.valid or self.overflowed:
                failed = True
                continue
            new = self.exceptions.get(at // self.unit)
            if new is not None:
                self.cow.write(new * self.unit + at % self.unit, bytes(count))
            if FEATURES[1] in self.features:
                self.origin.discard(at, count)
        if failed:
            raise failure(errno.EIO)

    def can_discard(self):
        return bool(self.features) and super().can_discard()

    def forget(self) -> None:
        self.cow.forget(0)

    def table(self):
        text = f"{self.origin.label} {self.cow.label} {self.store.letter} {self.store.chunk}"
        if self.features:
            text += f" {len(self.features)} {' '.join(self.features)}"
        return text

    def status(self):
        if not self.valid:
            return "Invalid"
        if self.merge_failed:
            return "Merge failed"
        if self.overflowed:
            return "Overflow"
        if not self.store.chunk:
            return f"0/{self.cow.size // SECTOR} 0"
        return self.store.usage()


class Merge(Snapshot):
    kind = "snapshot-merge"

    def read(self, offset, length):
        return super().read(offset, length) if self.valid else self.origin.read(offset, length)

    def write(self, offset, data):
        for at, count in pieces(offset, len(data), self.unit or SECTOR):
            part = data[at - offset : at - offset + count]
            new = self.exceptions.get(at // self.unit) if self.valid else None
            if new is not None:
                self.cow.write(new * self.unit + at % self.unit, part)
            else:
                self.model.break_sharing(self.origin, at, count)
                self.origin.write(at, part)

    def discard(self, offset, length):
        pass

    def resume(self):
        super().resume()
        while self.valid and not self.merge_failed and self.merge_run():
            pass

    def merge_run(self) -> bool:
        run = self.store.prepare_merge()
        if not run:
            return False
        old, new = run[-1]
        length = min(len(run) * self.unit, self.origin.size - old * self.unit)
        try:
            data = self.cow.read(new * self.unit, length)
            self.model.break_sharing(self.origin, old * self.unit, length)
            self.origin.write(old * self.unit, data)
            self.store.commit_merge(len(run))
        except OSError:
            self.merge_failed = True
            return False
        for chunk, _ in run:
            del self.exceptions[chunk]
        return True


TARGETS = (Linear, Striped, Zero, Error, Flakey, Mirror, Origin, Snapshot, Merge)
KINDS: dict[str, type[Target]] = {target.kind: target for target in TARGETS}


# --- devices and the mapper ---------------------------------------------------------------------


@dataclass
class Info:
    """What `info` says of a device; only what the model knows."""

    minor: int
    open_count: int
    event_nr: int
    nr_targets: int
    live: bool
    inactive: bool
    suspended: bool


class Device:
    """A dm device: a live and an inactive table, and the face of cow.Device."""

    def __init__(self, model: Model, label: str, minor: int) -> None:
        self.model = model
        self.label = label
        self.minor = minor
        self.uuid = ""
        self.live: list[Target] | None = None
        self.inactive: list[Target] | None = None
        self.suspended = False
        self.event_nr = 0

    @property
    def size(self) -> int:
        return sum(target.length for target in self.live or []) * SECTOR

    def cut(self, offset: int, length: int) -> Iterator[tuple[Target, int, int]]:
        for target in self.live or []:
            first = max(offset, target.start * SECTOR)
            last = min(offset + length, (target.start + target.length) * SECTOR)
            if first < last:
                yield target, first, last - first

    def read(self, offset: int, length: int) -> bytes:
        if offset + length > self.size:
            raise failure(errno.EIO)
        return b"".join(target.read(at, count) for target, at, count in self.cut(offset, length))

    def write(self, offset: int, data: bytes) -> None:
        if offset + len(data) > self.size:
            raise failure(errno.EIO)
        for target, at, count in self.cut(offset, len(data)):
            target.write(at, data[at - offset : at - offset + count])

    def discard(self, offset: int, length: int) -> None:
        for target, at, count in self.cut(offset, length):
            target.discard(at, count)

    def can_discard(self) -> bool:
        return all(target.can_discard() for target in self.live or [])

    def forget(self, keep: int) -> None:
        for target in self.live or []:
            target.forget()

    def below(self) -> Iterator[Device]:
        """Yield this device and every device under it."""
        yield self
        for target in self.live or []:
            for block in target.blocks():
                if isinstance(block, Device):
                    yield from block.below()

    def check_usable(self) -> None:
        """Refuse I/O that would wait for a resume."""
        if self.live is None or any(device.suspended for device in self.below()):
            raise Nonsense(f"{self.label} is suspended or has no table")

    def check_room(self, offset: int, length: int) -> None:
        if offset + length > self.size:
            raise failure(errno.ENOSPC)

    def pread(self, size: int, offset: int) -> bytes:
        self.check_usable()
        size = max(0, min(size, self.size - offset))
        return self.read(offset, size) if size else b""

    def rehearse(self, requests: list[tuple[int, bytes]]) -> None:
        """Refuse writes that fail below another snapshot-origin, on a copy of the model.

        How many copies the snapshots above take before is not determined.
        """
        under = [device.label for device in self.below()]
        stacked = any(
            isinstance(target, Origin | Merge)
            and isinstance(block, Device)
            and any(isinstance(t, Snapshot) for t in block.live or [])
            for label in under
            for target in self.model.devices[label].live or []
            for block in target.blocks()
        )
        if not stacked:
            return
        twin = copy.deepcopy(self.model)
        try:
            for offset, data in requests:
                twin.devices[self.label].write(offset, data)
        except OSError:
            raise Nonsense("a write that fails below a snapshot-origin") from None
        for label in under:
            for mine, other in zip(
                self.live_of(self.model, label), self.live_of(twin, label), strict=True
            ):
                if mine.status().isalpha() != other.status().isalpha():
                    raise Nonsense("a snapshot that ends below a snapshot-origin")

    @staticmethod
    def live_of(model: Model, label: str) -> list[Target]:
        return model.devices[label].live or []

    def pwrite(self, data: bytes, offset: int) -> int:
        self.check_usable()
        self.check_room(offset, len(data))
        self.rehearse([(offset, data)])
        self.write(offset, data)
        return len(data)

    def write_zeroes(self, offset: int, length: int) -> None:
        self.pwrite(bytes(length), offset)

    def flush(self) -> None:
        self.check_usable()

    def discard_range(self, offset: int, length: int) -> None:
        """Do what cow.Device.discard does; `discard` is what a table above calls."""
        self.check_usable()
        if not self.can_discard():
            raise failure(errno.EOPNOTSUPP)
        if offset + length > self.size:
            raise Nonsense("discard past the end")
        self.discard(offset, length)

    def write_many(self, offsets: list[int], data: list[bytes]) -> None:
        self.check_usable()
        for offset, row in zip(offsets, data, strict=True):
            self.check_room(offset, len(row))
        self.rehearse(list(zip(offsets, data, strict=True)))
        for offset, row in zip(offsets, data, strict=True):
            self.write(offset, row)

    def read_many(self, offsets: list[int], size: int) -> list[bytes]:
        self.check_usable()
        for offset in offsets:
            if offset + size > self.size:
                raise Nonsense("read_many past the end")
        return [self.read(offset, size) for offset in offsets]


def same_table(text: str) -> list[str]:
    """Return the lines of a table that are not blank."""
    return [line for line in text.splitlines() if line.strip()]


class Model:
    """The set of devices; `images` maps what a table calls an image to the Image."""

    def __init__(self, images: dict[str, bytes]) -> None:
        self.images = {label: Image(label, data) for label, data in images.items()}
        self.devices: dict[str, Device] = {}
        self.snapshots: list[Snapshot] = []

    def block(self, label: str) -> Block:
        """Return the device or image that a table names."""
        if label in self.devices:
            return self.devices[label]
        if label in self.images:
            return self.images[label]
        raise failure(errno.ENOENT)

    def family(self, origin: Block) -> list[Snapshot]:
        """Return the snapshots of an origin, largest chunk first, then as they came."""
        members = [snapshot for snapshot in self.snapshots if snapshot.origin is origin]
        return sorted(members, key=lambda snapshot: -snapshot.store.chunk)

    def break_sharing(self, origin: Block, offset: int, length: int) -> None:
        """Let every snapshot of `origin` keep the bytes that are about to change."""
        family = self.family(origin)
        unit = min((s.unit for s in family if s.unit), default=1 << 40)
        for at, _ in pieces(offset, length, unit):
            for snapshot in family:
                snapshot.origin_changes(at)

    def device(self, name: str) -> Device:
        if name not in self.devices:
            raise failure(errno.ENXIO)
        return self.devices[name]

    def users(self, device: Device) -> int:
        """Return how many tables hold the device open."""
        tables = [t for d in self.devices.values() for t in (d.live, d.inactive) if t is not None]
        return sum(
            any(block is device for target in table for block in target.blocks())
            for table in tables
        )

    def build(self, device: Device, text: str) -> list[Target]:
        table: list[Target] = []
        try:
            for line in same_table(text):
                start, length, kind, *args = line.split()
                expected = table[-1].start + table[-1].length if table else 0
                if kind not in KINDS or int(start) != expected or int(length) == 0:
                    raise failure(errno.EINVAL)
                table.append(KINDS[kind](self, device, int(start), int(length), args))
            if not table:
                raise failure(errno.EINVAL, "no targets specified")
            if any(block is device for target in table for block in target.blocks()):
                raise failure(errno.EINVAL)
        except (OSError, Nonsense):
            self.destroy(table)
            raise
        return table

    @staticmethod
    def destroy(table: list[Target] | None) -> None:
        for target in table or []:
            target.destroy()

    def create(self, name: str, table: str | None = None) -> None:
        if name in self.devices:
            raise failure(errno.EBUSY)
        used = {device.minor for device in self.devices.values()}
        minor = next(n for n in range(len(used) + 1) if n not in used)
        device = Device(self, name, minor)
        if table is None:
            self.devices[name] = device
            return
        device.inactive = self.build(device, table)
        self.devices[name] = device
        try:
            self.resume(name)
        except OSError:
            self.destroy(device.live)
            del self.devices[name]
            raise

    def load(self, name: str, table: str) -> None:
        device = self.device(name)
        new = self.build(device, table)
        self.destroy(device.inactive)
        device.inactive = new

    def clear(self, name: str) -> None:
        device = self.device(name)
        self.destroy(device.inactive)
        device.inactive = None

    def suspend(self, name: str) -> None:
        self.device(name).suspended = True

    def resume(self, name: str) -> None:
        device = self.device(name)
        if device.inactive is not None:
            device.suspended = True
            old, device.live, device.inactive = device.live, device.inactive, None
            try:
                self.start(device)
            finally:
                self.destroy(old)
        elif device.suspended:
            if device.live is None:
                raise failure(errno.EINVAL)
            self.start(device)

    @staticmethod
    def start(device: Device) -> None:
        """Resume the live table; a target that refuses leaves the device suspended."""
        for target in device.live or []:
            target.preresume()
        device.suspended = False
        for target in device.live or []:
            target.resume()

    def remove(self, name: str) -> None:
        device = self.device(name)
        if self.users(device):
            raise failure(errno.EBUSY)
        self.destroy(device.inactive)
        self.destroy(device.live)
        del self.devices[name]

    def rename(self, name: str, new_name: str) -> None:
        device = self.device(name)
        if new_name in self.devices:
            raise failure(errno.EBUSY)
        del self.devices[name]
        self.devices[new_name] = device
        device.label = new_name
        device.event_nr += device.live is not None

    def close(self) -> None:
        """Forget every device; what is in the images stays."""
        self.devices.clear()
        self.snapshots.clear()

    def wipe(self, label: str, data: bytes) -> None:
        """Replace the contents of an image that no device uses, as `dd` would."""
        image = self.images[label]
        tables = [t for d in self.devices.values() for t in (d.live, d.inactive) if t is not None]
        if any(image in target.blocks() for table in tables for target in table):
            raise Nonsense("the image is in use")
        image.data[:] = data
        image.known = None

    def set_uuid(self, name: str, uuid: str) -> None:
        device = self.device(name)
        if any(other.uuid == uuid for other in self.devices.values()):
            raise failure(errno.EBUSY)  # that it has one itself is looked at behind this
        if device.uuid:
            raise failure(errno.EINVAL)
        device.uuid = uuid
        device.event_nr += device.live is not None

    def info(self, name: str) -> Info:
        device = self.device(name)
        return Info(
            minor=device.minor,
            open_count=self.users(device),
            event_nr=device.event_nr,
            nr_targets=len(device.live or []),
            live=device.live is not None,
            inactive=device.inactive is not None,
            suspended=device.suspended,
        )

    def lines(self, name: str | None, inactive: bool, what: str) -> str:
        lines = []
        for each in sorted(self.devices) if name is None else [name]:
            device = self.device(each)
            prefix = f"{each}: " if name is None else ""
            table = device.inactive if inactive else device.live
            if table is None:
                lines.append(prefix)
            for target in table or []:
                text = getattr(target, what)()
                lines.append(f"{prefix}{target.start} {target.length} {target.kind} {text}")
        return "\n".join(lines)

    def status(self, name: str | None = None, *, inactive: bool = False) -> str:
        return self.lines(name, inactive, "status")

    def table(self, name: str | None = None, *, inactive: bool = False) -> str:
        return self.lines(name, inactive, "table")
