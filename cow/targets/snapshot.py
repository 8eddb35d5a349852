"""snapshot: `<origin> <cow> <P|PO|N> <chunk> [<n> <feature>…]`.

The rules of loading, of refusing, and of handover between tables (dm-snap.c, snapshot_ctr and
snapshot_resume). What happens to reads and writes is the core's.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from typing import ClassVar

from cow import _core, store
from cow.errors import CowOSError, TargetError
from cow.target import (
    NameOf,
    Target,
    TargetContext,
    open_device,
    parse_features,
    parse_number,
)
from cow.units import DEFAULT_CHUNK_SIZE, bytes_of

log = logging.getLogger("cow")

FEATURES = ("discard_zeroes_cow", "discard_passdown_origin")
PAIRING_FAILED = "Snapshot cow pairing for exception table handover failed"
NO_MERGE = "Snapshot exception store does not support snapshot-merge."


class SnapshotTarget(Target):
    """A snapshot of an origin, its changed chunks on a COW device."""

    name = "snapshot"
    version = (1, 16, 0)
    merging: ClassVar[bool] = False
    map: _core.Snapshot

    def __init__(self, context: TargetContext, start: int, length: int, args: list[str]) -> None:
        if len(args) < 4:
            raise TargetError("requires 4 or more arguments")
        self.features = parse_features(
            args[4:],
            FEATURES,
            count_error="Invalid number of feature arguments",
            unknown_error="Unrecognised feature requested",
        )
        if self.features == ["discard_passdown_origin"]:
            raise TargetError("discard_passdown_origin feature depends on discard_zeroes_cow")
        self.origin = open_device(
            context,
            args[0],
            "Cannot get origin device",
            writable=self.merging or "discard_passdown_origin" in self.features,
        )
        # Written even where the table is read-only: copies for origin writes, a fresh header. On
        # a read-only device nothing is: there a fresh store stays as it is.
        self.cow = open_device(context, args[1], "Cannot get COW device", writable=True)
        if self.cow is self.origin:
            raise TargetError("COW device cannot be the same as origin device")
        persistent, overflow = _parse_store(args[2])
        self._chunk_size = _parse_chunk_size(args[3], self.cow, self.origin)
        self.length = length
        self.map = _core.Snapshot(
            start,
            length,
            self.origin,
            _core.ExceptionStore(self.cow, persistent=persistent, overflow_supported=overflow),
            merging=self.merging,
            discard_zeroes_cow="discard_zeroes_cow" in self.features,
            discard_passdown_origin="discard_passdown_origin" in self.features,
        )
        self.family = self.origin.family
        self._end = start + length
        self._members = self.family.members

    def read_metadata(self) -> None:
        if not self._waits_for_handover():
            if self.merging and not self.map.store.persistent:
                raise TargetError(NO_MERGE)
            origin_size = max(self.origin.size, bytes_of(self._end))
            _read_metadata(self.map.store, self._chunk_size, origin_size)
        self._members.append(self)
        _cow_users(self.cow).append(self)

    @property
    def supports_discard(self) -> bool:
        """With discard_zeroes_cow, where both devices take discards.

        A COW device that itself has snapshots cannot take one.
        """
        return (
            "discard_zeroes_cow" in self.features
            and self.cow.plain
            and self.origin.supports_discard
        )

    def set_low_water_mark(self, sectors: int) -> None:
        """Raise an event, once, when less than so much of the store is free: now, or later."""
        allocated, total, _ = self.map.store.usage
        self.map.store.low_water_mark = sectors
        if total - allocated < sectors:
            self.map.store.low_water_mark = 0
            self.device.raise_event()

    # Two tables with the same origin and the same COW device: the one that is active is the source,
    # the one that is not is the destination of a handover.

    def _sharing(self) -> list[SnapshotTarget]:
        return [each for each in self._members if each.cow is self.cow and each is not self]

    def _waits_for_handover(self) -> bool:
        """Tell whether the exceptions come from a live table; refuse what cannot be paired."""
        if any(each.origin is not self.origin for each in _cow_users(self.cow)):
            raise TargetError("COW device is used by a snapshot of another origin", errno.EBUSY)
        sharing = self._sharing()
        if len(sharing) >= 2 or any(not each.map.active for each in sharing):
            raise TargetError(PAIRING_FAILED)
        if not sharing:
            return False
        if self.merging:
            if any(each.merging for each in self._members):
                raise TargetError("A snapshot is already merging.")
            if not sharing[0].map.store.persistent:
                raise TargetError(NO_MERGE)
        return True

    def _handover(self) -> tuple[SnapshotTarget | None, SnapshotTarget | None]:
        """Return the (source, destination) this table is one of, or (None, None)."""
        everybody = [*self._sharing(), self]
        sources = [each for each in everybody if each.map.active]
        destinations = [each for each in everybody if not each.map.active]
        if not sources or not destinations:
            return None, None
        return sources[0], destinations[0]

    def prepare(self) -> None:
        source, destination = self._handover()
        if source is not None and destination is self:
            try:
                with self.origin.gate:
                    self.map.make_room(source.map)
            except MemoryError as error:
                raise TargetError(str(error), errno.ENOMEM) from error

    def preresume(self) -> None:
        source, destination = self._handover()
        if source is None:
            return
        if source is self:
            raise TargetError("Unable to resume snapshot source until handover completes.")
        if destination is self and not source.is_suspended():
            raise TargetError("Unable to perform snapshot handover until source is suspended.")
        self.prepare()

    def resume(self) -> None:
        source, destination = self._handover()
        if source is not None and destination is self:
            self.map.hand_over(source.map)
        self.map.activate(self.device)

    def is_suspended(self) -> bool:
        """Whether the device of this table is suspended."""
        return self.device.suspended

    def release(self) -> None:
        if self not in self._members:
            return
        source, destination = self._handover()
        if source is self and destination is not None:
            destination.map.store.valid = False
            log.error("%s: Cancelling snapshot handover.", self.cow)
        self._members.remove(self)
        _cow_users(self.cow).remove(self)
        with self.origin.gate:
            self.map.deactivate()

    def table_args(self, name_of: NameOf) -> str:
        store_ = self.map.store
        words = [name_of(self.origin), name_of(self.cow), store_.letters, str(store_.chunk_size)]
        if self.features:
            words += [str(len(self.features)), *self.features]
        return " ".join(words)

    def status(self, name_of: NameOf) -> str:
        if not self.map.store.valid:
            return "Invalid"
        if self.map.merge_failed:
            return "Merge failed"
        if self.map.store.overflowed:
            return "Overflow"
        allocated, total, metadata = self.map.store.usage
        return f"{allocated}/{total} {metadata}"

    def areas(self) -> Iterator[tuple[_core.BlockDevice, int, int]]:
        yield self.origin, 0, self.length
        yield self.cow, 0, self.cow.sectors


def _cow_users(cow: _core.BlockDevice) -> list[SnapshotTarget]:
    """Return the snapshot tables that keep their exceptions on a device."""
    if not hasattr(cow, "cow_users"):
        cow.cow_users = []
    return cow.cow_users


def _parse_store(text: str) -> tuple[bool, bool]:
    """Parse P, PO or N into (persistent, overflow supported)."""
    letter, rest = text[:1].upper(), text[1:]
    if letter == "P" and (not rest or rest[0] in "oO"):
        return True, bool(rest)
    if letter == "N":
        return False, False
    reason = f"no store type {text!r}"
    if letter == "P":
        reason = f"Unsupported persistent store option: {rest}"
    raise TargetError(f"Couldn't create exception store: {reason}")


def _parse_chunk_size(text: str, cow: _core.BlockDevice, origin: _core.BlockDevice) -> int:
    """Parse a chunk size in sectors; 0 is "as on disk, or the default"."""
    failed = "Couldn't create exception store: "
    size = parse_number(text, f"{failed}Invalid chunk size {text!r}", 2**32 - 1)
    if size == 0:
        return 0
    wrong = store.wrong_chunk_size(size)
    if wrong:
        raise TargetError(f"{failed}chunk size {size}: {wrong}")
    for device in (cow, origin):
        if bytes_of(size) % device.logical_block_size:
            raise TargetError(
                f"{failed}chunk size {size}: Chunk size is not a multiple of device blocksize "
                f"({device.logical_block_size} bytes, {device})"
            )
    return size


def _read_metadata(store_: _core.ExceptionStore, chunk_size: int, origin_size: int) -> None:
    """Open the store on the COW device, or make one where there is none.

    The errno is the store's; nothing on the device changes unless it is fresh.
    """
    try:
        if store_.persistent:
            _read_persistent(store_, chunk_size, origin_size)
        elif chunk_size:
            store_.configure(chunk_size, origin_size)
    except CowOSError as error:
        raise TargetError(
            f"Failed to read snapshot metadata: {error.strerror}", error.errno
        ) from error
    except MemoryError as error:
        raise TargetError("Unable to allocate hash table space", errno.ENOMEM) from error
    if not store_.chunk_size:
        raise TargetError("Chunk size not set")


def _read_persistent(store_: _core.ExceptionStore, chunk_size: int, origin_size: int) -> None:
    cow = store_.cow
    provisional = chunk_size or max(DEFAULT_CHUNK_SIZE, cow.logical_block_size // 512)
    if cow.sectors < provisional:
        raise TargetError(
            f"{cow} has {cow.sectors} sectors, less than one chunk of {provisional}", errno.EIO
        )
    header = store.read_header(store_)
    if header is None:
        store_.configure(provisional, origin_size)
        if not cow.readonly:
            store_.format()
        return
    if chunk_size and header.chunk_size != chunk_size:
        log.warning(
            "%s: chunk size %d in device metadata overrides table chunk size of %d.",
            cow,
            header.chunk_size,
            chunk_size,
        )
    store_.configure(header.chunk_size, origin_size)
    if header.valid:
        store_.load()
    else:
        store_.valid = False
        log.warning("%s: Snapshot is marked invalid.", cow)
