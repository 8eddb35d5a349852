"""Where a command runs: its streams, its mapper, its directory, whom it asks.

The same verbs run in the process of `cow lvm` and inside `cow serve`; what is different there
stands here.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cow.mapper import Mapper

DIRECTORY = "/dev/mapper/"

Write = Callable[[str], None]
Ask = Callable[[str], str | None]


def _nobody(question: str) -> str | None:
    return None


@dataclass
class Shell:
    """What a command is given to run with.

    `mapper` is the one whose devices LVs become; None: no LV is ever active, and the images are
    opened only as long as the command runs.
    """

    out: Write
    err: Write
    mapper: Mapper | None = None
    ask: Ask = _nobody
    """Asks a question and returns a line of answer; None where nobody answers."""
    directory: str = ""
    """Where relative paths start; "" for that of the process."""
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    devices: list[str] = field(default_factory=list)
    """Absolute paths that are known from before, for commands that are given none."""
    background: Write = lambda text: None
    """Told what goes on if nobody waits for the command any more."""
    flush: Callable[[], None] = lambda: None
    """Passes on what was written; never called with the lock held."""
    alive: Callable[[], bool] = lambda: True
    """Tells whether somebody waits for the command."""
    lock: threading.RLock = field(init=False)
    """Held by a command that runs, but not while it waits for an answer or a merge.

    It is that of all changes in the mapper: the monitor of a VG changes nothing under a command.
    """

    def __post_init__(self) -> None:
        if self.mapper is None:
            self.lock = threading.RLock()
            return
        from cow.lvm.devices import lock_of

        self.lock = lock_of(self.mapper)

    def path(self, name: str) -> str:
        """Return where an image lies: from the directory of the command, not of the process."""
        if not self.directory or os.path.isabs(name) or self.is_device(name):
            return name
        return os.path.normpath(os.path.join(self.directory, name))

    def is_device(self, name: str) -> bool:
        """Tell whether a name is a dm device's."""
        if self.mapper is None:
            return False
        return name.removeprefix(DIRECTORY) in self.mapper.names()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Let other commands run meanwhile."""
        self.lock.release()
        try:
            self.flush()
            yield
        finally:
            self.lock.acquire()
