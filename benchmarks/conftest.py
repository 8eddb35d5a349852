"""How a race is run, where its images lie, and the table of ratios at the end.

pytest benchmarks --benchmark-only            all of it: images of 1 GiB, below 6 GiB of memory
pytest benchmarks --benchmark-only --scale small      a look whether everything runs: seconds

In a race the baselines and `cow` take turns, round by round, because the speed of a machine
drifts while it works. What counts is the median of the rounds.
"""

from __future__ import annotations

import copy
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for `import baselines`

MIB = 1 << 20
GIB = 1 << 30


# ---------------------------------------------------------------- scale


@dataclass(frozen=True)
class Scale:
    """How much of everything. Sizes are in bytes."""

    image_size: int  # the origin of most races
    batch: int  # blocks in one read_many or write_many, exceptions of a merge
    calls: int  # calls timed together where one is too short
    lookups: int  # exceptions of the lookup races, and chunks looked up
    store_exceptions: int  # exceptions of the store that is opened
    huge_size: int  # the sparse image a snapshot is made of
    rounds: int
    space: int  # what must be free where the images lie


SCALES = {
    "full": Scale(
        image_size=GIB,
        batch=65536,
        calls=2000,
        lookups=1 << 20,
        store_exceptions=10_000_000,
        huge_size=16 << 40,
        rounds=9,
        space=5 * GIB,
    ),
    "small": Scale(
        image_size=8 * MIB,
        batch=512,
        calls=50,
        lookups=1 << 12,
        store_exceptions=10_000,
        huge_size=1 << 40,
        rounds=2,
        space=48 * MIB,
    ),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("benchmark").addoption(
        "--scale", choices=SCALES, default="full", help="sizes of the races (default: full)"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


@pytest.fixture(scope="session")
def scale(request: pytest.FixtureRequest) -> Scale:
    return SCALES[request.config.getoption("--scale")]


# ---------------------------------------------------------------- images


@pytest.fixture(scope="session")
def images_folder(request: pytest.FixtureRequest, scale: Scale) -> Iterator[Path]:
    """A folder in /dev/shm that goes away even when this process is killed."""
    places = [Path("/dev/shm")]
    if request.config.getoption("--scale") == "small":
        places.append(Path(tempfile.gettempdir()))
    for place in places:
        if place.is_dir() and shutil.disk_usage(place).free >= scale.space:
            break
    else:
        pytest.exit(f"the benchmarks need {scale.space // MIB} MiB free in /dev/shm", 1)
    folder = tempfile.mkdtemp(prefix="cow-bench-", dir=place)
    # The shell waits for the end of its input, which is the end of this process at the latest.
    remover = subprocess.Popen(
        ["/bin/sh", "-c", 'cat >/dev/null; rm -rf -- "$0"', folder],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        yield Path(folder)
    finally:
        remover.communicate()


@pytest.fixture(scope="module")
def folder(images_folder: Path) -> Iterator[Path]:
    """A folder for the images of one module."""
    path = Path(tempfile.mkdtemp(dir=images_folder))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def tmp_images(images_folder: Path) -> Iterator[Path]:
    """A folder for the images of one race."""
    path = Path(tempfile.mkdtemp(dir=images_folder))
    yield path
    shutil.rmtree(path)


# ---------------------------------------------------------------- races


@dataclass(frozen=True)
class Row:
    """A line of the table at the end."""

    what: str
    ours: str
    baseline: str = ""
    name: str = ""
    ratio: str = ""
    goal: str = ""
    met: str = ""


ROWS = pytest.StashKey[list[Row]]()


def duration(seconds: float) -> str:
    """Return a time with three digits and its unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def measure(seconds: float, count: int, unit: str) -> str:
    """Return a throughput where bytes are counted, else the time for one of `count`."""
    if unit == "B":
        return f"{count / seconds / GIB:.2f} GiB/s"
    return duration(seconds / count) + unit


def add_to_group(benchmark, name: str, laps: list[float]) -> None:
    """Give the baseline its own line in pytest-benchmark's table, beside ours.

    A benchmark fixture times one function; the baseline's turns are taken in the setup of ours,
    so the seconds they took are handed in here.
    """
    twin = copy.copy(benchmark)
    twin.name = f"{benchmark.name}: {name}"
    twin.fullname = f"{benchmark.fullname}: {name}"
    stats = twin._make_stats(iterations=1)
    for lap in laps:
        stats.update(lap)


class Race:
    """Rounds of `cow` and a baseline in turns."""

    def __init__(self, benchmark, rows: list[Row], rounds: int) -> None:
        self.benchmark = benchmark
        self.rows = rows
        self.rounds = rounds

    def __call__(
        self,
        what: str,
        ours: Callable[[], object],
        baseline: tuple[str, Callable[[], object]],
        *,
        count: int,
        unit: str = "B",
        rounds: int = 1,
        prepare: Callable[[], object] = lambda: None,
        prepare_baseline: Callable[[], object] = lambda: None,
        speed: float | None = None,
        within: float | None = None,
        throughput: float | None = None,
    ) -> None:
        """Time `ours` and the baseline (name, function), each after its untimed preparation.

        `count` is what one round does: bytes, or with another `unit` ("/chunk") that many of it;
        short rounds are repeated `rounds` times as often as the others.
        Goals: `speed` is ours over the baseline's, at least; `within` is seconds for one of
        `count`, at most; `throughput` is bytes a second, at least.
        """
        name, run_baseline = baseline
        laps: list[float] = []

        def take_turns() -> None:
            prepare_baseline()
            start = time.perf_counter()
            run_baseline()
            laps.append(time.perf_counter() - start)
            prepare()

        benchmark = self.benchmark
        benchmark.group = what
        benchmark.extra_info.update(count=count, unit=unit)
        benchmark.pedantic(ours, setup=take_turns, rounds=rounds * self.rounds, warmup_rounds=1)
        if benchmark.disabled:
            return
        del laps[0]  # the warm-up round
        add_to_group(benchmark, name, laps)
        our_seconds = benchmark.stats.stats.median
        seconds = statistics.median(laps)
        ratio = seconds / our_seconds
        goals, met = [], True
        if speed is not None:
            goals.append(f"≥ {speed:.3g} ×")
            met = met and ratio >= speed
        if within is not None:
            goals.append(f"≤ {duration(within)}{unit}")
            met = met and our_seconds / count <= within
        if throughput is not None:
            goals.append(f"≥ {throughput / GIB:.3g} GiB/s")
            met = met and count / our_seconds >= throughput
        self.rows.append(
            Row(
                what,
                measure(our_seconds, count, unit),
                measure(seconds, count, unit),
                name,
                f"{ratio:.2f}",
                ", ".join(goals),
                ("yes" if met else "NO") if goals else "",
            )
        )


@pytest.fixture
def race(benchmark, request: pytest.FixtureRequest, scale: Scale) -> Race:
    return Race(benchmark, request.config.stash[ROWS], scale.rounds)


@pytest.fixture
def note_figure(request: pytest.FixtureRequest):
    """A function that adds a line without a race to the table: a size, a number."""

    def note(what: str, value: float, unit: str, limit: float | None = None) -> None:
        goal, met = "", ""
        if limit is not None:
            goal, met = f"≤ {limit:.3g} {unit}", "yes" if value <= limit else "NO"
        request.config.stash[ROWS].append(Row(what, f"{value:.3g} {unit}", goal=goal, met=met))

    return note


@pytest.fixture
def memory() -> Callable[[], int]:
    """A function that returns the bytes of this process's own pages and of its page tables.

    Pages of mapped files are not counted: they are the page cache's, whoever maps them.
    """

    def used() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "VmPTE"))

    return used


# ---------------------------------------------------------------- the table at the end


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    if not rows:
        return
    scale = config.getoption("--scale")
    terminalreporter.section(f"cow and its baselines, scale {scale}, medians of rounds in turns")
    head = Row("what", "cow", "baseline", "", "speed, cow/baseline", "goal", "met")
    table = [tuple(vars(row).values()) for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        line = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        terminalreporter.write_line(line.rstrip())
