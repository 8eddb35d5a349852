"""A thread that does what dmeventd and lvmpolld do: stores grow, merges are finished.

It sleeps until something happens in the mapper: an event of a device, a new live table, the end of
a merge. A snapshot has an event when its store is as full as the threshold allows. Where an image
is in other hands, as those of a command that only looks, it goes on when it is given back; it never
looks at the clock. (daemons/dmeventd/plugins/snapshot, lvmpolld)
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from errno import EACCES
from typing import Protocol

from cow.errors import CowError, DeviceNotFound, ImageError, ImageLocked
from cow.image import wait_for_lock
from cow.lvm.activation import Activation
from cow.lvm.cow_size import low_water_mark, useful_extents
from cow.lvm.devices import releases_of
from cow.lvm.errors import LVMError
from cow.lvm.merge import usage_of
from cow.lvm.metadata import LogicalVolume, VolumeGroupMetadata
from cow.mapper import DIRECTORY, Mapper

log = logging.getLogger("cow.lvm")

FOREVER_MS = 3_600_000
"""Nothing is looked at when it is over."""
STEP = 5
"""Percent between two tries to extend a store, and between two warnings."""
WARN_FROM = 80
"""Percent of use from which on a store that does not grow is warned of."""


class Watched(Protocol):
    """What the thread asks of a volume group."""

    activation: Activation

    @property
    def metadata(self) -> VolumeGroupMetadata:
        """The committed generation."""

    @property
    def lock(self) -> threading.RLock:
        """Held while something is changed."""

    def finish_merge(self, origin_id: str) -> bool:
        """Remove the snapshot of a merge that is over."""

    def extend_by_policy(self, name: str, *, threshold: int, percent: int) -> None:
        """Extend a store that is too full."""


Opener = Callable[[Mapper], AbstractContextManager[Watched]]


class Monitor:
    """The thread of one VG in one mapper. It ends with the mapper, or at stop()."""

    def __init__(self, mapper: Mapper, opener: Opener) -> None:
        self.threshold = 100
        self.percent = 20
        self._mapper = weakref.ref(mapper)
        self._gate = mapper.gate
        self._opener = opener
        self._stopped = False
        self._awaited: set[str] = set()
        """Images that other processes hold, for each of which a thread waits."""
        self._said: set[str] = set()
        self._thread = threading.Thread(target=self._run, name="cow-lvm-monitor", daemon=True)

    def set_policy(self, threshold: int, percent: int) -> None:
        """Extend stores that are used by more than `threshold` percent; 100: never."""
        if (threshold, percent) != (self.threshold, self.percent):
            self.threshold, self.percent = threshold, percent
            self.wake()

    def wake(self) -> None:
        """Look at everything now, in the thread."""
        if self._thread.ident is None:
            self._thread.start()
        self._gate.raise_event()

    @property
    def running(self) -> bool:
        """Whether the thread works, or has not been started yet."""
        return not self._stopped and (self._thread.ident is None or self._thread.is_alive())

    def stop(self) -> None:
        """End the thread when it has done what it does just now."""
        self._stopped = True
        self._gate.raise_event()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        seen = self._gate.event_nr
        while not self._stopped and self._look():
            while not self._stopped and self._gate.event_nr == seen:
                self._gate.wait_event(seen, FOREVER_MS)
            seen = self._gate.event_nr

    def _look(self) -> bool:
        """Do what there is to do; False if the mapper is gone."""
        mapper = self._mapper()
        if mapper is None or mapper.closed:
            return False
        releases = releases_of(mapper)
        seen = releases.number
        try:
            with self._opener(mapper) as group, group.lock:
                for lv in list(group.metadata.lvs):
                    self._look_at(group, lv)
        except ImageLocked as error:
            self._await(error.path)
        except ImageError as error:
            if mapper.closed:
                return False
            self._say_unless_held(error)
            releases.call(seen, self.wake)
        except CowError as error:
            if mapper.closed or isinstance(error, DeviceNotFound):
                return not mapper.closed
            self._say_once(str(error))
        return True

    def _say_unless_held(self, error: ImageError) -> None:
        """Say what is wrong with an image, but for one that somebody has open to be read."""
        if error.errno != EACCES:
            self._say_once(str(error))

    def _await(self, path: str) -> None:
        """Look again when another process is done with an image; a thread waits for its lock."""
        if path not in self._awaited:
            self._awaited.add(path)
            name = "cow-lvm-lock"
            threading.Thread(target=self._wait_for, args=(path,), name=name, daemon=True).start()

    def _wait_for(self, path: str) -> None:
        try:
            wait_for_lock(path)
        except OSError as error:
            self._say_once(f"{path}: {error.strerror}")
        self._awaited.discard(path)
        if self.running:
            self.wake()

    def _look_at(self, group: Watched, lv: LogicalVolume) -> None:
        try:
            if lv.merging_snapshot is not None and group.activation.is_merging(lv):
                group.finish_merge(lv.id)
            elif lv.is_cow and self.threshold < 100:
                self._look_at_store(group, lv)
        except LVMError as error:
            self._say_once(error.strerror or "")

    def _look_at_store(self, group: Watched, lv: LogicalVolume) -> None:
        usage = usage_of(group.activation, lv)
        if usage is None:
            return
        if usage.problem:
            self._say_once(
                f"WARNING: Snapshot {lv} changed state to: {usage.problem} and should be removed."
            )
            return
        if _cannot_grow(lv):
            return
        try:
            group.extend_by_policy(lv.name, threshold=self.threshold, percent=self.percent)
        finally:
            self._set_mark(group, lv)

    def _set_mark(self, group: Watched, lv: LogicalVolume) -> None:
        """Have the next event when the store is too full, or fuller by a step if it is already."""
        lv = group.metadata.lv(lv.name)
        usage = usage_of(group.activation, lv)
        name = group.activation.name(lv)
        if usage is None or usage.problem or name is None:
            return
        mark = low_water_mark(usage.total, self.threshold)
        if _cannot_grow(lv):
            mark = 0
        elif usage.total - usage.allocated < mark:
            used = int(usage.percent)
            if used >= WARN_FROM:
                self._say_once(f"WARNING: Snapshot {lv} is now {float(usage.percent):.2f}% full.")
            mark = max(1, usage.total - usage.total * (used // STEP + 1) * STEP // 100)
        group.activation.mapper.set_low_water_mark(DIRECTORY + name, mark)

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            log.warning("%s", text)


def _cannot_grow(lv: LogicalVolume) -> bool:
    record = lv.snapshot
    if record is None:
        return True
    segment = record.segments[0]
    most = useful_extents(segment.extent_count, segment.chunk_size, lv.vg.extent_size)
    return lv.extent_count >= most


_monitors: weakref.WeakKeyDictionary[Mapper, dict[str, Monitor]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def threshold_of(mapper: Mapper, vg_id: str) -> int | None:
    """Return from which percentage on the stores of a VG grow; None if nobody looks at them."""
    with _lock:
        found = _monitors.get(mapper, {}).get(vg_id)
    return found.threshold if found is not None and found.running else None


def monitor_of(mapper: Mapper, vg_id: str, opener: Opener) -> Monitor:
    """Return the monitor of a VG in a mapper; there is one at most."""
    with _lock:
        monitors = _monitors.setdefault(mapper, {})
        found = monitors.get(vg_id)
        if found is None or not found.running:
            found = monitors[vg_id] = Monitor(mapper, opener)
        return found
