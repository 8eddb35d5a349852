"""linear: `<dev> <start>`, a range of a device."""

from __future__ import annotations

from collections.abc import Iterator

from cow import _core
from cow.errors import TargetError
from cow.target import NameOf, Target, TargetContext, open_device, parse_number


class LinearTarget(Target):
    """Maps its sectors to those of a device from `start` on."""

    name = "linear"
    version = (1, 4, 0)
    plain = True

    def __init__(self, context: TargetContext, start: int, length: int, args: list[str]) -> None:
        if len(args) != 2:
            raise TargetError("Invalid argument count")
        self.dev_start = parse_number(args[1], "Invalid device sector")
        self.dev = open_device(
            context, args[0], "Device lookup failed", writable=not context.readonly
        )
        self.length = length
        self.map = _core.Linear(start, length, self.dev, self.dev_start)

    def table_args(self, name_of: NameOf) -> str:
        return f"{name_of(self.dev)} {self.dev_start}"

    def areas(self) -> Iterator[tuple[_core.BlockDevice, int, int]]:
        yield self.dev, self.dev_start, self.length

    @property
    def supports_discard(self) -> bool:
        """As the device below."""
        return self.dev.supports_discard
