"""zero: reads give zeros, writes vanish."""

from __future__ import annotations

from cow import _core
from cow.errors import TargetError
from cow.target import NameOf, Target, TargetContext


class ZeroTarget(Target):
    """/dev/zero as a block device."""

    name = "zero"
    version = (1, 2, 0)
    plain = True

    def __init__(self, context: TargetContext, start: int, length: int, args: list[str]) -> None:
        if args:
            raise TargetError("No arguments required")
        self.map = _core.Zero(start, length)

    def table_args(self, name_of: NameOf) -> str:
        return ""
