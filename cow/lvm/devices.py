"""The devices that PVs are on: opened through a mapper, given back when they are done with."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable

from cow import _core
from cow.mapper import Mapper

_locks: weakref.WeakKeyDictionary[Mapper, threading.RLock] = weakref.WeakKeyDictionary()


def lock_of(mapper: Mapper) -> threading.RLock:
    """Return the lock for changes of the VGs in a mapper, whoever has them open."""
    with mapper.lock:
        return _locks.setdefault(mapper, threading.RLock())


class Releases:
    """Tells those who could not write to an image when somebody gives back those he reads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._number = 0
        self._waiting: list[Callable[[], None]] = []

    @property
    def number(self) -> int:
        """How often devices were given back so far."""
        return self._number

    def call(self, after: int, waiting: Callable[[], None]) -> None:
        """Call once when devices are given back; at once if they were since number was `after`."""
        with self._lock:
            if self._number == after:
                self._waiting.append(waiting)
                return
        waiting()

    def note(self) -> None:
        """Call those who wait: devices were given back."""
        with self._lock:
            self._number += 1
            waiting, self._waiting = self._waiting, []
        for each in waiting:
            each()


_releases: weakref.WeakKeyDictionary[Mapper, Releases] = weakref.WeakKeyDictionary()


def releases_of(mapper: Mapper) -> Releases:
    """Return who tells of devices that are given back in a mapper."""
    with mapper.lock:
        return _releases.setdefault(mapper, Releases())


class Devices:
    """Devices opened by path or dm name in one mapper; one of its own if none is given.

    With `readonly`, images are opened so that nothing can write to them. Closing gives back what
    was opened here, and closes a mapper of its own.
    """

    def __init__(self, mapper: Mapper | None = None, *, readonly: bool = False) -> None:
        self.readonly = readonly
        self._own = mapper is None
        self.mapper = Mapper() if mapper is None else mapper
        self._open: dict[str, _core.BlockDevice] = {}

    def open(self, path: str) -> _core.BlockDevice:
        """Return the device, opened the first time it is asked for."""
        if path not in self._open:
            self._open[path] = self.mapper.use(path, readonly=self.readonly)
        return self._open[path]

    def open_all(self, paths: Iterable[str]) -> None:
        """Open devices; one that was opened under another path is not taken twice."""
        for path in paths:
            if path in self._open:
                continue
            device = self.mapper.use(path, readonly=self.readonly)
            if device in self._open.values():
                self.mapper.release(device)
            else:
                self._open[path] = device

    def items(self) -> list[tuple[str, _core.BlockDevice]]:
        """Return (path, device) of all that are open, in the order they were opened."""
        return list(self._open.items())

    def close(self) -> None:
        """Give the devices back."""
        if self._own:
            self.mapper.close()
        else:
            for device in self._open.values():
                self.mapper.release(device)
            if self.readonly:  # what is open to be written is in nobody's way
                releases_of(self.mapper).note()
        self._open.clear()
