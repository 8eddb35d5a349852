"""What benchmarks are given: a scale, folders for images, a race; and the tables at the end.

pytest benchmarks --benchmark-only            all of it: images of 1 GiB, below 6 GiB of memory
pytest benchmarks --benchmark-only --scale medium     a look at the figures: two minutes
pytest benchmarks --benchmark-only --scale small      a look whether everything runs: seconds
pytest benchmarks/peers                       beside other programs and the kernel
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from suite.goals import GOALS, judge
from suite.machine import ROOT, code_digest, describe
from suite.memory import use_memory
from suite.race import RaceTrack
from suite.results import COW, Figures, Point, Result, Run, lines, races
from suite.scale import MIB, SCALES, Scale

RESULTS = pytest.StashKey[list[Result]]()
LOAD = pytest.StashKey[float]()
GROWTH = {
    "count": "snapshots",
    "chunk_size": "chunk_sizes",
    "size": "image_sizes",
    "exceptions": "exceptions",
    "run": "runs",
}
HERE = Path(__file__).parent
PEERS = HERE / "peers"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmark")
    group.addoption("--scale", choices=SCALES, default="full", help="how much of everything")
    group.addoption(
        "--results", type=Path, metavar="FILE", help="where the figures go (build/bench/last.json)"
    )
    group.addoption(
        "--disk",
        type=Path,
        metavar="DIR",
        default=ROOT / "build",
        help="a folder on a real disk, for what waits for one (default: build/)",
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave the peers out of a run unless they, or one of them, are named."""
    if collection_path != PEERS:
        return None
    named = [Path(config.invocation_params.dir, arg.split("::")[0]) for arg in config.args]
    return None if any(PEERS in (p.resolve(), *p.resolve().parents) for p in named) else True


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RESULTS] = []
    config.stash[LOAD] = round(os.getloadavg()[0], 2)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give a test that shows how cost grows each of the values that its argument has."""
    scale = SCALES[metafunc.config.getoption("--scale")]
    for argument, values in GROWTH.items():
        if argument in metafunc.fixturenames:
            metafunc.parametrize(argument, getattr(scale, values), scope="module")


@pytest.fixture(scope="session")
def scale(request: pytest.FixtureRequest) -> Scale:
    return SCALES[request.config.getoption("--scale")]


# ---------------------------------------------------------------- images


@pytest.fixture(scope="session")
def images_folder(request: pytest.FixtureRequest, scale: Scale) -> Iterator[Path]:
    """A folder in /dev/shm that goes away even when this process is killed."""
    with_peers = any(PEERS in item.path.parents for item in request.session.items)
    space = scale.peer_space if with_peers else scale.space
    places = [Path("/dev/shm")]
    if scale is SCALES["small"]:
        places.append(Path(tempfile.gettempdir()))
    for place in places:
        if place.is_dir() and shutil.disk_usage(place).free >= space:
            break
    else:
        pytest.exit(f"the benchmarks need {space // MIB} MiB free in /dev/shm", 1)
    with scratch(place) as folder:
        yield folder


class scratch:
    """A folder that is gone afterwards, even when this process is killed."""

    def __init__(self, place: Path) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="cow-bench-", dir=place))
        # The shell waits for the end of its input, which is that of this process at the latest.
        self.remover = subprocess.Popen(
            ["/bin/sh", "-c", 'cat >/dev/null; rm -rf -- "$0"', str(self.folder)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )

    def __enter__(self) -> Path:
        return self.folder

    def __exit__(self, *_: object) -> None:
        self.remover.communicate()


@pytest.fixture(scope="session")
def new_folder(images_folder: Path) -> Callable[[], AbstractContextManager[Path]]:
    """A function that makes a folder for images: it is gone at the end of a `with`."""

    @contextmanager
    def make() -> Iterator[Path]:
        path = Path(tempfile.mkdtemp(dir=images_folder))
        yield path
        shutil.rmtree(path)

    return make


@pytest.fixture(scope="module")
def folder(new_folder) -> Iterator[Path]:
    """A folder for the images of one module."""
    with new_folder() as path:
        yield path


@pytest.fixture
def tmp_images(new_folder) -> Iterator[Path]:
    """A folder for the images of one race."""
    with new_folder() as path:
        yield path


@pytest.fixture
def disk_images(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder for the images of one race on a disk, as far as --disk is one."""
    place = request.config.getoption("--disk")
    place.mkdir(parents=True, exist_ok=True)
    with scratch(place) as folder:
        yield folder


# ---------------------------------------------------------------- races


@pytest.fixture
def race(benchmark, request: pytest.FixtureRequest, scale: Scale, images_folder) -> RaceTrack:
    results = request.config.stash[RESULTS]
    if PEERS not in request.path.parents:
        return RaceTrack(benchmark, request.module.SECTION, results, scale.rounds)

    def before_each() -> None:
        if not scale.sample:
            use_memory(images_folder, 2 * scale.file_size)

    return RaceTrack(benchmark, request.module.SECTION, results, scale.peer_rounds, before_each)


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[..., None]:
    """A function that adds a result that was measured elsewhere: what, unit, figures, point."""

    def note(what: str, unit: str, figures: list[Figures], point: Point | None = None) -> None:
        section = request.module.SECTION
        request.config.stash[RESULTS].append(Result(section, what, unit, figures, point))

    return note


@pytest.fixture
def note_figure(record) -> Callable[[str, float, str], None]:
    """A function that adds a result without a race: what, the amount, its unit."""

    def note(what: str, value: float, unit: str, point: Point | None = None) -> None:
        record(what, unit, [Figures("cow", COW, [value])], point)

    return note


@pytest.fixture
def memory() -> Callable[[], int]:
    """A function that returns the bytes of this process's own pages and of its page tables.

    Pages of mapped files are not counted: they are the page cache's, whoever maps them.
    """

    def used() -> int:
        text = Path("/proc/self/status").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in text)
        return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "VmPTE"))

    return used


# ---------------------------------------------------------------- the end


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    results = config.stash[RESULTS]
    if not results:
        return
    scale = config.getoption("--scale")
    run = Run(describe(), scale, code_digest(), config.stash[LOAD], results)
    path = config.getoption("--results") or ROOT / "build" / "bench" / "last.json"
    run.save(path)
    if config.getoption("benchmark_disable"):
        return
    found = races([run])
    terminalreporter.section(f"cow, its limits and its peers, scale {scale}, medians of rounds")
    table = [("", "", "cost", "spread", "cow is … × as fast", "server CPU")]
    for each in found:
        first, *rest = lines(each)
        table += [(each.what, *first), *(("", *line) for line in rest)]
    write_table(terminalreporter, table)
    terminalreporter.section("goals")
    table = [("goal", "reached", "peer", "limit", "met")]
    judged = [judge(goal, found) for goal in GOALS]
    write_table(
        terminalreporter, table + [(j.goal.text, *j.cells()) for j in judged if j is not None]
    )


def write_table(terminalreporter, table: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        line = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        terminalreporter.write_line(line.rstrip())
