"""log-writes: `<dev> <logdev>`, passes everything on and keeps a log of what is written.

The log device, in blocks of the device's logical block size; all numbers are little-endian:
  block 0   u64 magic 0x6a736677736872, u64 version 1, u64 number of entries, u32 block size
  then, for each entry, one block that begins with
            u64 block, u64 number of blocks, u64 flags, u64 data length
            followed by the blocks that were written, unless it is a discard.
Flags: FLUSH 1, FUA 2, DISCARD 4, MARK 8, META 16. A mark has no blocks; its text stands behind the
four numbers, and the data length is that of the text. (dm-log-writes.c; replay-log of xfstests
plays such a log back.)

Two things are more exact than in the kernel. Writes are logged as they are issued, not at the next
flush, so a mark stands between the requests it was sent between. And a flush of a range says which:
its entry has the first block and, as data length, the bytes from its start, 0 for the whole device.
Who replays a log block by block need not care, since every beginning of the log is a possible disk.
"""

from __future__ import annotations

import logging
import os
import struct
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any

from cow import _core
from cow.errors import CowOSError, TargetError
from cow.image import Image
from cow.target import NameOf, Target, TargetContext, open_device

log = logging.getLogger("cow")

SECTOR_SIZE = 512
SUPER = struct.Struct("<QQQI")
ENTRY = struct.Struct("<QQQQ")
MAGIC = 0x6A736677736872
VERSION = 1
FLUSH, FUA, DISCARD, MARK, META = 1, 2, 4, 8, 16
END = "dm-log-writes-end"
KNOWN_BLOCKS = 1 << 16
"""Blocks written in part that are remembered; 32 MiB of them with blocks of a sector."""


class LogWritesTarget(Target):
    """Passes requests on to `dev` and logs writes, discards, flushes and marks on `logdev`.

    A block that is written in part is logged whole; what it held before is read from the image
    below, so `dev` has to be an image, or linear targets over images.
    """

    name = "log-writes"
    version = (1, 1, 0)
    map: _LogWrites

    def __init__(self, context: TargetContext, start: int, length: int, args: list[str]) -> None:
        if len(args) < 2:
            raise TargetError("Invalid argument count")
        writable = not context.readonly
        self.dev = open_device(context, args[0], "Device lookup failed", writable=writable)
        self.logdev = open_device(context, args[1], "Log device lookup failed", writable=writable)
        if not _stands_on_images(self.dev):
            raise TargetError(f"{self.dev} is neither an image nor linear targets over images")
        self.start = start
        self.length = length
        self._readonly = context.readonly
        self._live = False
        self._log = _Log(self.logdev, self.dev.logical_block_size)
        self.map = _LogWrites(start, length, self.dev, start, self._log)

    def table_args(self, name_of: NameOf) -> str:
        return f"{name_of(self.dev)} {name_of(self.logdev)}"

    def status(self, name_of: NameOf) -> str:
        words = f"{self._log.entries} {self._log.next_sector - 1}"
        return words if self._log.enabled else f"{words} logging_disabled"

    def areas(self) -> Iterator[tuple[_core.BlockDevice, int, int]]:
        # As the kernel, the target does not move sectors: its start is the start on `dev`.
        yield self.dev, self.start, self.length

    @property
    def supports_discard(self) -> bool:
        """As the device below."""
        return self.dev.supports_discard

    def message(self, args: list[str]) -> str:
        if len(args) != 2:
            raise TargetError(
                f"Invalid log-writes message arguments, expect 2 arguments, got {len(args)}"
            )
        if args[0].lower() != "mark":
            raise TargetError(f"Unrecognised log writes target message received: {args[0]}")
        self._log.mark(args[1])
        return ""

    def resume(self) -> None:
        self._live = True

    def presuspend(self) -> None:
        self._log.drain()

    def release(self) -> None:
        # A table that never went live leaves what is on the log device alone.
        if self._live and not self._readonly:
            self._log.mark(END)
        self._log.stop()


def _stands_on_images(dev: Any) -> bool:  # noqa: ANN401
    try:
        _read_image(dev, 0, 1)
    except OSError:
        return False
    return True


def _read_image(dev: Any, offset: int, length: int) -> bytes:  # noqa: ANN401
    """Read from the image below a device, past the core; OSError if there is none.

    The bytes lie inside one block. A request is under way and holds the gate, so no other may be
    made through the device, and nothing changes below.
    """
    while not isinstance(dev, Image):
        end = 0
        for target in dev.live.targets if dev.live else ():
            start, end = end, end + getattr(target, "length", 0) * SECTOR_SIZE
            if target.name == "linear" and start <= offset < end:
                dev, offset = target.dev, offset - start + target.dev_start * SECTOR_SIZE
                break
            if target.name != "linear":
                raise CowOSError(f"{dev}: no image below", 5)
        else:
            raise CowOSError(f"{dev}: no image below", 5)
    return os.pread(dev._files[-1], length, offset).ljust(length, b"\0")


class _LogWrites(_core.FilterTarget):
    def __init__(
        self, start: int, length: int, dev: _core.BlockDevice, dev_start: int, log_: _Log
    ) -> None:
        super().__init__(start, length, dev, dev_start)
        self._dev = dev
        self._start = start * SECTOR_SIZE
        self._log = log_
        self._lock = threading.Lock()
        # What blocks hold that were written in part: the writes may be on their way still.
        self._known: dict[int, bytes] = {}

    def start(self, op: str, offset: int, length: int) -> int:
        if op == "read" or not self._log.enabled:
            return self.PASS
        if op == "write":
            return self.MANGLE
        offset += self._start
        block = self._log.block
        if op == "discard":
            # Only blocks that are discarded as a whole.
            first, end = -(-offset // block), (offset + length) // block
            with self._lock:
                for each in [known for known in self._known if first <= known // block < end]:
                    del self._known[each]
                if first < end:
                    self._log.add(first, end - first, DISCARD)
        else:
            whole = offset == 0 and length == self._dev.size
            data_len = 0 if whole else offset % block + length
            self._log.add(offset // block, 0, FLUSH, data_len=data_len)
        return self.PASS

    def mangle(self, op: str, offset: int, data: memoryview) -> None:
        offset += self._start
        block = self._log.block
        first = offset // block * block
        end = -(-(offset + len(data)) // block) * block
        with self._lock:
            # Blocks written in part, at the start and at the end, are logged whole.
            head = self._content(first)[: offset - first] if first < offset else b""
            behind = end - offset - len(data)
            tail = self._content(end - block)[-behind:] if behind else b""
            whole = head + bytes(data) + tail
            if len(self._known) > KNOWN_BLOCKS:
                self._known.clear()
            if head:
                self._known[first] = b""
            if tail:
                self._known[end - block] = b""
            if self._known:
                for each in range(first, end, block):
                    if each in self._known:
                        self._known[each] = whole[each - first : each - first + block]
            self._log.add(first // block, (end - first) // block, 0, whole)

    def _content(self, at: int) -> bytes:
        """Return what a block holds before the write that is being logged."""
        found = self._known.get(at)
        return _read_image(self._dev, at, self._log.block) if found is None else found


class _Log:
    """The log device. Entries are placed at once, and written in order by a thread of their own.

    Whoever logs holds the gate, under which no other request can be made. When the device is full
    or fails, logging is disabled, as in the kernel.
    """

    def __init__(self, device: _core.BlockDevice, block: int) -> None:
        self.block = block
        self.entries = 0
        self.next_sector = block // SECTOR_SIZE
        self.enabled = True
        self._device = device
        self._queue: deque[tuple[int, bytes]] = deque()
        self._changed = threading.Condition()
        self._stopped = False
        self._thread: threading.Thread | None = None

    def add(
        self, first: int, count: int, flags: int, data: bytes = b"", data_len: int | None = None
    ) -> None:
        """Log an entry; `first` and `count` are blocks, `data` follows in blocks of its own."""
        head = ENTRY.pack(first, count, flags, data_len or 0).ljust(self.block, b"\0")
        with self._changed:
            self._place(head + data)

    def mark(self, text: str) -> None:
        """Log a mark, cut to what fits in a block, and the number of entries with it."""
        data = text.encode()[: self.block - ENTRY.size - 1]
        head = ENTRY.pack(0, 0, MARK, len(data)) + data
        with self._changed:
            self._place(head.ljust(self.block, b"\0"))
            head = SUPER.pack(MAGIC, VERSION, self.entries, self.block)
            self._put(0, head.ljust(self.block, b"\0"))

    def _place(self, data: bytes) -> None:
        sector = self.next_sector
        if not self.enabled:
            return
        self.next_sector += len(data) // SECTOR_SIZE
        if self.next_sector >= self._device.sectors:
            log.error("%s: Ran out of space on the logdev", self._device)
            self.enabled = False
            return
        self.entries += 1
        self._put(sector, data)

    def _put(self, sector: int, data: bytes) -> None:
        self._queue.append((sector, data))
        if self._thread is None:
            self._thread = threading.Thread(target=self._write, name="cow-log", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    def _write(self) -> None:
        while True:
            with self._changed:
                while not self._queue and not self._stopped:
                    self._changed.wait()
                if not self._queue:
                    return
                sector, data = self._queue[0]
            try:
                self._device.pwrite(data, sector * SECTOR_SIZE)
            except OSError as error:
                log.error("%s: Error writing log block: %s", self._device, error)  # noqa: TRY400
                with self._changed:
                    self.enabled = False
                    self._queue.clear()
            with self._changed:
                if self._queue:
                    self._queue.popleft()
                self._changed.notify_all()

    def drain(self) -> None:
        """Wait until all entries are written; not while the log device itself is suspended."""
        with self._changed:
            while self._queue and not getattr(self._device, "suspended", False):
                self._changed.wait(0.1)

    def stop(self) -> None:
        """Write what is left and end the thread."""
        self.drain()
        with self._changed:
            if self._queue:
                log.error("%s: suspended, %d log entries lost", self._device, len(self._queue))
                self._queue.clear()
            self._stopped = True
            self._changed.notify_all()
            thread, self._thread = self._thread, None
        if thread is not None and not getattr(self._device, "suspended", False):
            thread.join()
