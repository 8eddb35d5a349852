"""snapshot-merge: as snapshot, in the origin's place; its exceptions go back into the origin."""

from __future__ import annotations

import logging
import threading

from cow import _core
from cow.errors import CowOSError
from cow.targets.snapshot import SnapshotTarget

log = logging.getLogger("cow")


class SnapshotMergeTarget(SnapshotTarget):
    """Merges by itself from resume on, until all is merged or a step fails.

    With a read-only table it merges nothing, and shows what merging will give.
    The device has no event at the end, as in the kernel: allocated equals metadata then. Who waits
    for any event of the mapper wakes up.
    """

    name = "snapshot-merge"
    version = (1, 5, 0)
    merging = True
    _worker: _Worker | None = None

    def resume(self) -> None:
        super().resume()
        if not self.device.readonly:
            self._worker = _Worker(self.map, self.device.gate)
            self._worker.start()

    def presuspend(self) -> None:
        if self._worker is not None:
            self._worker.stop()
            self._worker = None

    def wait(self, timeout: float | None) -> bool:
        """Wait until the merge does not run any more: done, failed or stopped by a suspend.

        False if it still runs after `timeout` seconds.
        """
        worker = self._worker
        return worker is None or worker.wait(timeout)

    def release(self) -> None:
        self.presuspend()
        super().release()


class _Worker:
    """The thread that takes the steps."""

    def __init__(self, snapshot: _core.Snapshot, gate: _core.Gate) -> None:
        self._snapshot = snapshot
        self._gate = gate
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cow-merge", daemon=True)

    def start(self) -> None:
        if not self._snapshot.store.valid:
            log.error("Snapshot is invalid: can't merge")
            return
        if not self._snapshot.merge_failed:
            self._thread.start()

    def stop(self) -> None:
        """Return when the present step is over."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()

    def wait(self, timeout: float | None) -> bool:
        """Wait for the thread; False if it still runs."""
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while not self._stop.is_set() and self._snapshot.merge() is not False:
                pass
        except CowOSError as error:
            log.error("%s: shutting down merge", error.strerror)  # noqa: TRY400
        self._gate.raise_event()
