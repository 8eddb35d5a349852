"""Let the n-th libc call of the extension fail: no memory, a disk error, a signal in between.

Only what the core itself calls is counted, nothing of Python's, so that n runs over the places in
the core where such a call stands. The calls are led through libc_faults.c, which is compiled here.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import cow._core

from . import count

MEMORY = "malloc calloc realloc mmap mremap"
FOREVER = 1 << 40


class Fault:
    """While entered, `times` calls from the `at`-th on fail; `fired` tells whether any did."""

    def __init__(self, library: ctypes.CDLL, names: str, error: int, at: int, times: int) -> None:
        self.plan = (names.encode(), at, times, error)
        self.library = library
        self.fired = False

    def __enter__(self) -> Fault:
        assert self.library.faults_plan(*self.plan) == 0
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.fired = self.library.faults_end() >= self.plan[1]
        count("libc calls of the core made to fail", self.fired)


class LibcFaults:
    """The faults of this process. The extension is led here once, and stays so."""

    def __init__(self) -> None:
        source = Path(__file__).with_suffix(".c")
        with tempfile.TemporaryDirectory() as folder:
            library = f"{folder}/libc_faults.so"
            subprocess.run(
                [os.environ.get("CC", "cc"), "-O2", "-shared", "-fPIC"]
                + ["-o", library, str(source), "-ldl"],
                # The compiler does without the sanitizer of this process.
                env={name: text for name, text in os.environ.items() if name != "LD_PRELOAD"},
                check=True,
            )
            self.library = ctypes.CDLL(library)
        number, count = ctypes.c_int, ctypes.c_long
        self.library.faults_plan.argtypes = [ctypes.c_char_p, count, count, number]
        self.library.faults_end.restype = count
        self.library.faults_synced.restype = ctypes.c_size_t
        assert self.library.faults_install(os.fsencode(cow._core.__file__)) > 0

    def synced(self) -> int:
        """Return for how many bytes msync has waited since the last call of this."""
        return int(self.library.faults_synced())

    def fault(self, names: str, error: int, at: int = 1, times: int = 1) -> Fault:
        """Return a fault for calls of the functions named, with blanks between."""
        return Fault(self.library, names, error, at, times)

    def each(self, names: str, error: int, times: int = 1) -> Iterator[Fault]:
        """Yield a fault for the first call, for the second, …, until one is not met any more."""
        for at in itertools.count(1):
            fault = self.fault(names, error, at, times)
            yield fault
            if not fault.fired:
                return
