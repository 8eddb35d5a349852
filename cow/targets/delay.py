"""delay: `<dev> <start> <ms>`, once, twice (read, write) or three times (and flush)."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

from cow import _core
from cow.errors import TargetError
from cow.target import NameOf, Target, TargetContext, open_device, parse_number

GROUPS = ("read", "write", "flush")


class DelayTarget(Target):
    """Passes requests on some milliseconds later."""

    name = "delay"
    version = (1, 4, 0)
    map: _Delay

    def __init__(self, context: TargetContext, start: int, length: int, args: list[str]) -> None:
        if len(args) not in (3, 6, 9):
            raise TargetError("Requires exactly 3, 6 or 9 arguments")
        self.args = args
        self.groups = []
        for i in range(0, len(args), 3):
            dev_start = parse_number(args[i + 1], "Invalid device sector")
            milliseconds = parse_number(args[i + 2], "Invalid delay", 2**32 - 1)
            dev = open_device(
                context, args[i], "Device lookup failed", writable=not context.readonly
            )
            self.groups.append((dev, dev_start, milliseconds))
        if any(group[:2] != self.groups[0][:2] for group in self.groups):
            raise TargetError("reads, writes and flushes have to go to the same place here")
        self.length = length
        self.map = _Delay(start, length, *self.groups[0][:2], [group[2] for group in self.groups])

    def table_args(self, name_of: NameOf) -> str:
        return " ".join(f"{name_of(dev)} {start} {ms}" for dev, start, ms in self.groups)

    def status(self, name_of: NameOf) -> str:
        return " ".join(str(self.map.outstanding[group]) for group in GROUPS)

    def areas(self) -> Iterator[tuple[_core.BlockDevice, int, int]]:
        for dev, dev_start, _ in self.groups:
            yield dev, dev_start, self.length

    @property
    def supports_discard(self) -> bool:
        """As the device below."""
        return self.groups[0][0].supports_discard


class _Delay(_core.FilterTarget):
    def __init__(
        self, start: int, length: int, dev: _core.BlockDevice, dev_start: int, delays: list[int]
    ) -> None:
        super().__init__(start, length, dev, dev_start)
        write = delays[min(1, len(delays) - 1)]
        self.delays = {"read": delays[0], "write": write, "flush": delays[-1], "discard": write}
        self.outstanding = dict.fromkeys(GROUPS, 0)
        self._lock = threading.Lock()

    def start(self, op: str, offset: int, length: int) -> int:
        group = "write" if op == "discard" else op
        with self._lock:
            self.outstanding[group] += 1
        time.sleep(self.delays[op] / 1000)
        with self._lock:
            self.outstanding[group] -= 1
        return self.PASS
