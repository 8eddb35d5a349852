"""The jobs that servers and devices are given: one fio process each, the same for everybody."""

from __future__ import annotations

import json
import subprocess
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from suite.processes import child_setup


@dataclass(frozen=True)
class Job:
    """What fio does: so many requests, each block once at most, or else for some seconds.

    `area` is the part of the device, start and length in bytes; with several connections each
    has its own share of it.
    """

    what: str
    rw: str
    area: tuple[int, int]
    block: int = 4096
    depth: int = 32
    connections: int = 1
    requests: int | None = None
    seconds: float = 0.0
    read_share: int | None = None  # percent, of a mix

    @property
    def title(self) -> str:
        connections = f", {self.connections} connections" if self.connections > 1 else ""
        return f"{self.what}, depth {self.depth}{connections}"

    @property
    def unit(self) -> str:
        return "B" if self.block > 65536 else "request"

    def words(self) -> list[str]:
        """Return the options that are the same for every engine."""
        start, length = self.area
        share = length // self.connections // self.block * self.block
        words = [
            "--name=job",
            "--output-format=json",
            "--gtod_reduce=1",
            "--thread",
            "--group_reporting",
            f"--rw={self.rw}",
            f"--randseed={zlib.crc32(self.title.encode())}",
            f"--bs={self.block}",
            f"--iodepth={self.depth}",
            f"--numjobs={self.connections}",
            f"--offset={start}",
            f"--size={share}",
            f"--offset_increment={share}",
        ]
        if self.read_share is not None:
            words.append(f"--rwmixread={self.read_share}")
        if self.requests is not None:
            words.append(f"--number_ios={max(1, self.requests // self.connections)}")
        else:
            words += [f"--runtime={int(1000 * self.seconds)}ms", "--time_based"]
        return words


def run(job: Job, engine: Sequence[str]) -> tuple[float, float]:
    """Run a job with these options of an engine; return the seconds of one request, and how many.

    Where fio fails its words are the error.
    """
    done = subprocess.run(
        ["fio", *job.words(), *engine],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        preexec_fn=child_setup,
    )
    report = done.stdout[done.stdout.find("{") :]
    if done.returncode or not report:
        raise RuntimeError(f"fio {job.title}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    (result,) = json.loads(report)["jobs"]
    both = (result["read"], result["write"])
    count = sum(way["total_ios"] for way in both)
    # A job of less than a millisecond has no rate.
    rate = sum(way["iops"] for way in both) or 1000.0 * count
    if result["error"] or not count:
        raise RuntimeError(f"fio {job.title}: error {result['error']}, {count} requests")
    return 1 / rate, count
