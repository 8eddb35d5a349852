"""Choose what fuzz/corpus keeps of what the fuzzer found: pick.py NAME [MOST].

Inputs are taken one after another, always the one that adds most for its size: edges of the
extension, by how often they are passed, and lines of Python. Those that have a name, because they
once found something, stay. `make corpus` runs it for every harness.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import logging
import sys
from collections.abc import Hashable
from pathlib import Path
from types import FrameType
from typing import Any

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
MOST = 40
LONGEST = 1500
"""Bytes of an input that is worth keeping."""


def main() -> None:
    name, most = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else MOST
    kept = FOLDER / "corpus" / name
    sys.path[:0] = [str(FOLDER), str(ROOT / "tests")]
    logging.disable(logging.CRITICAL)
    harness = importlib.import_module(f"fuzz_{name}")
    named, found = [], {}
    new = ROOT / "build" / "corpus" / name
    for path in sorted([*kept.iterdir(), *(new.iterdir() if new.is_dir() else ())]):
        data = path.read_bytes()
        if path.parent == kept and not is_digest(path.name):
            named.append(path)
        elif len(data) <= LONGEST:
            found[digest(data)] = data
    features = {each: reached(harness, data) for each, data in found.items()}
    left = set().union(*features.values())
    total = len(left)
    for path in named:
        left -= reached(harness, path.read_bytes())
    picked: list[str] = []
    while left and len(picked) + len(named) < most:
        best = max(features, key=lambda each: len(features[each] & left) / (64 + len(found[each])))
        if not features[best] & left:
            break
        left -= features[best]
        picked.append(best)
    for path in kept.iterdir():
        if path not in named and path.name not in picked:
            path.unlink()
    for each in picked:
        (kept / each).write_bytes(found[each])
    print(
        f"{name}: {len(picked)} of {len(found)} inputs and {len(named)} with a name reach "
        f"{total - len(left)} of {total} features"
    )


def digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()[:16]


def is_digest(name: str) -> bool:
    return len(name) == 16 and not set(name) - set("0123456789abcdef")


def reached(harness: Any, data: bytes) -> set[Hashable]:
    """Return what an input reaches: (edge, how often as a power of two), (file, line)."""
    library = ctypes.CDLL(None)
    size = ctypes.c_uint.in_dll(library, "fuzz_nr_counters").value
    counters = (ctypes.c_uint8 * size).in_dll(library, "fuzz_counters")
    ctypes.memset(counters, 0, size)
    lines: set[Hashable] = set()

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        if "/cow/" not in frame.f_code.co_filename:
            return None
        if event == "line":
            lines.add((frame.f_code.co_filename, frame.f_lineno))
        return trace

    # The first time things are imported and caches filled.
    harness.run(data)
    ctypes.memset(counters, 0, size)
    sys.settrace(trace)
    try:
        harness.run(data)
    finally:
        sys.settrace(None)
    edges = {(i, count.bit_length()) for i, count in enumerate(bytes(counters)) if count}
    return edges | lines


if __name__ == "__main__":
    main()
