"""error: every request but a flush fails with EIO."""

from __future__ import annotations

from cow import _core
from cow.target import NameOf, Target, TargetContext


class ErrorTarget(Target):
    """Takes any arguments and heeds none."""

    name = "error"
    version = (1, 7, 0)
    plain = True

    def __init__(self, context: TargetContext, start: int, length: int, args: list[str]) -> None:
        self.map = _core.Error(start, length)

    def table_args(self, name_of: NameOf) -> str:
        return ""
