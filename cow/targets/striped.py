"""striped: `<n> <chunk> {<dev> <start>} × n`, chunks dealt out over several devices in turn."""

from __future__ import annotations

from collections.abc import Iterator

from cow import _core
from cow.errors import TargetError
from cow.target import NameOf, Target, TargetContext, open_device, parse_number


class StripedTarget(Target):
    """Chunk c of the target lies on stripe c mod n, as its chunk c div n."""

    name = "striped"
    version = (1, 6, 0)
    plain = True

    def __init__(self, context: TargetContext, start: int, length: int, args: list[str]) -> None:
        if len(args) < 2:
            raise TargetError("Not enough arguments")
        count = parse_number(args[0], "Invalid stripe count", 2**32 - 1)
        if not count:
            raise TargetError("Invalid stripe count")
        self.chunk_size = parse_number(args[1], "Invalid chunk_size", 2**32 - 1)
        if not self.chunk_size:
            raise TargetError("Invalid chunk_size")
        if length % count:
            raise TargetError("Target length not divisible by number of stripes")
        self.leg_length = length // count
        if self.leg_length % self.chunk_size:
            raise TargetError("Target length not divisible by chunk size")
        if len(args) != 2 + 2 * count:
            raise TargetError("Not enough destinations specified")
        self.legs = []
        for i in range(count):
            name, sector = args[2 + 2 * i : 4 + 2 * i]
            dev_start = parse_number(sector, "Couldn't parse stripe destination")
            dev = open_device(
                context,
                name,
                "Couldn't parse stripe destination",
                writable=not context.readonly,
            )
            self.legs.append((dev, dev_start))
        self.map = _core.Striped(start, length, self.chunk_size, self.legs)

    def table_args(self, name_of: NameOf) -> str:
        legs = " ".join(f"{name_of(dev)} {dev_start}" for dev, dev_start in self.legs)
        return f"{len(self.legs)} {self.chunk_size} {legs}"

    def status(self, name_of: NameOf) -> str:
        names = " ".join(name_of(dev) for dev, _ in self.legs)
        return f"{len(self.legs)} {names} 1 {'A' * len(self.legs)}"

    def areas(self) -> Iterator[tuple[_core.BlockDevice, int, int]]:
        for dev, dev_start in self.legs:
            yield dev, dev_start, self.leg_length

    @property
    def supports_discard(self) -> bool:
        """As the devices below."""
        return all(dev.supports_discard for dev, _ in self.legs)
