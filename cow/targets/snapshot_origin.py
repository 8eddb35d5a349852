"""snapshot-origin: `<dev>`. Before the device is written its snapshots get their copies."""

from __future__ import annotations

from collections.abc import Iterator

from cow import _core
from cow.errors import TargetError
from cow.target import NameOf, Target, TargetContext, open_device


class SnapshotOriginTarget(Target):
    """The way to write a device that has snapshots; without any it is a plain linear map."""

    name = "snapshot-origin"
    version = (1, 9, 0)

    def __init__(self, context: TargetContext, start: int, length: int, args: list[str]) -> None:
        if len(args) != 1:
            raise TargetError("origin: incorrect number of arguments")
        self.dev = open_device(
            context, args[0], "Cannot get target device", writable=not context.readonly
        )
        self.family = self.dev.family
        self.length = length
        self.map = _core.Origin(start, length, self.dev)

    def table_args(self, name_of: NameOf) -> str:
        return name_of(self.dev)

    @property
    def supports_discard(self) -> bool:
        """Never: it would destroy what the snapshots still share."""
        return False

    def areas(self) -> Iterator[tuple[_core.BlockDevice, int, int]]:
        yield self.dev, 0, self.length
