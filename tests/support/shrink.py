"""Make a failing program shorter: delta debugging over its list of operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

Op = TypeVar("Op")


def shrink(program: Sequence[Op], fails: Callable[[list[Op]], bool], runs: int = 200) -> list[Op]:
    """Return a part of `program`, in its order, that still fails; try at most `runs` programs.

    Pieces are left out, first large, then small, as long as what remains fails.
    """
    best = list(program)
    size = max(1, len(best) // 2)
    while runs > 0:
        start, shorter = 0, False
        while start < len(best) and runs > 0:
            candidate = best[:start] + best[start + size :]
            runs -= 1
            if candidate and fails(candidate):
                best, shorter = candidate, True
            else:
                start += size
        if size > 1:
            size //= 2
        elif not shorter:
            break
    return best
