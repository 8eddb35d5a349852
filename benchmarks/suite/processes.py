"""Programs that work for a benchmark: kept to the same cores, and ended with it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

CORES = 2
PR_SET_PDEATHSIG = 1
CLONE_NEWNS = 0x20000
START_SECONDS = 20
STOP_SECONDS = 3
SBIN = "/usr/local/sbin:/usr/sbin:/sbin"
libc = ctypes.CDLL(None, use_errno=True)


def lacking(*programs: str) -> str:
    """Return which of these programs are not installed, as a reason; empty if all are."""
    path = f"{os.environ.get('PATH', '')}:{SBIN}"
    names = [name for name in programs if shutil.which(name, path=path) is None]
    return f"not installed: {', '.join(names)} (tools/setup bench)" if names else ""


def child_setup() -> None:
    """Before exec: run on the first two cores, servers and clients alike, and die with us."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])


class Program:
    """A running server. Its output is kept, and shown if it does not start."""

    def __init__(
        self, words: Sequence[str], log: Path, environment: dict[str, str] | None = None
    ) -> None:
        self.log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | (environment or {}),
                preexec_fn=child_setup,
            )

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """Return when the server is ready."""
        end = time.monotonic() + START_SECONDS
        while not ready():
            if self.process.poll() is not None or time.monotonic() > end:
                self.stop()
                words = " ".join(map(str, self.process.args))
                raise RuntimeError(f"{words}: {self.log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.005)

    def cpu(self) -> float:
        """Return the seconds of CPU that it has used, its own and the kernel's for it."""
        text = Path(f"/proc/{self.process.pid}/stat").read_text()
        fields = text.rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        """End it; kindly at first, so that it unmounts what it has mounted."""
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=STOP_SECONDS)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def own_mounts() -> str:
    """Make what this process mounts from now on its own, so that it goes away with it.

    Return why that is not possible here; empty if it is.
    """
    if os.geteuid():
        return "mounting needs root"
    if libc.unshare(CLONE_NEWNS):
        return f"no mount namespace: {os.strerror(ctypes.get_errno())}"
    done = call(["mount", "--make-rprivate", "/"])
    return f"mount --make-rprivate: {done}" if done else ""


def call(words: Iterable[str | Path]) -> str:
    """Run a program; return what it says where it fails, else nothing."""
    path = f"{os.environ.get('PATH', '')}:{SBIN}"
    done = subprocess.run(
        [str(word) for word in words],
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": path},
    )
    return "" if done.returncode == 0 else (done.stderr or done.stdout).strip()[-500:] or "failed"
