"""A thread that does what dmeventd and lvmpolld do: stores grow, merges are finished.

It sleeps until something happens in the mapper: an event of a device, a new live table, the end of
a merge. It looks at the clock only while a command holds an image that it needs. A snapshot has an
event when its store is as full as the threshold allows. (daemons/dmeventd/plugins/snapshot,
lvmpolld)
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from errno import EACCES, EBUSY
from typing import Protocol

from cow.errors import CowError, DeviceNotFound
from cow.lvm.activation import Activation
from cow.lvm.cow_size import low_water_mark, useful_extents
from cow.lvm.errors import LVMError
from cow.lvm.merge import usage_of
from cow.lvm.metadata import LogicalVolume, VolumeGroupMetadata
from cow.mapper import DIRECTORY, Mapper

log = logging.getLogger("cow.lvm")

RETRY_MS = 1000
"""How long to wait until an image that is in other hands is tried again."""
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
        self._postponed = False
        """Whether an image was in other hands, as those of a command that only looks."""
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
                self._gate.wait_event(seen, RETRY_MS if self._postponed else 3_600_000)
                if self._postponed:
                    break
            seen = self._gate.event_nr

    def _look(self) -> bool:
        """Do what there is to do; False if the mapper is gone."""
        mapper = self._mapper()
        if mapper is None or mapper.closed:
            return False
        self._postponed = False
        try:
            with self._opener(mapper) as group, group.lock:
                for lv in list(group.metadata.lvs):
                    self._look_at(group, lv)
        except CowError as error:
            if mapper.closed or isinstance(error, DeviceNotFound):
                return not mapper.closed
            self._postponed = isinstance(error, OSError) and error.errno in (EACCES, EBUSY)
            if self._postponed:
                return True
            self._say_once(str(error))
        return True

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


def monitor_of(mapper: Mapper, vg_id: str, opener: Opener) -> Monitor:
    """Return the monitor of a VG in a mapper; there is one at most."""
    with _lock:
        monitors = _monitors.setdefault(mapper, {})
        found = monitors.get(vg_id)
        if found is None or not found.running:
            found = monitors[vg_id] = Monitor(mapper, opener)
        return found
