"""The benchmarks run: everything once, on small images, and makes a report."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import report
from suite.charts import TITLES
from suite.goals import GOALS
from suite.results import Run, races

import cow

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PEERS = sorted((BENCHMARKS / "peers").glob("bench_*.py"))


def start(path: Path, results: Path) -> subprocess.Popen[str]:
    """Start a run of some benchmarks, untimed."""
    package = Path(cow.__file__).parents[1]
    paths = [str(package), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", "-q"]
        + ["--benchmark-disable", "--scale", "small", "--results", str(results), str(path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        cwd=BENCHMARKS.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Run]:
    """The runs of all benchmarks, at the same time: nothing is measured."""
    folder = tmp_path_factory.mktemp("results")
    started = {path: start(path, folder / path.stem) for path in (BENCHMARKS, *PEERS)}
    said = {path: run.communicate()[0] for path, run in started.items()}
    failed = [said[path] for path, run in started.items() if run.returncode]
    assert not failed, "\n".join(failed)
    return [Run.read(folder / path.stem) for path in started]


def test_every_benchmark_runs_on_small_images(runs):
    assert all(race.figures(name) for race in races(runs) for name in race.names)


def test_every_goal_is_about_races_that_are_run(runs):
    names = {race.what for race in races(runs)}
    assert {what for goal in GOALS for what in goal.races} <= names


def test_every_chart_has_lines(runs):
    assert {race.point.chart for race in races(runs) if race.point} == set(TITLES)


def test_the_report_has_every_goal_and_every_race(runs):
    page = "\n".join(report.write(runs, races(runs), list(TITLES), report.read_notes()))
    wanted = [*(goal.text for goal in GOALS), *(race.what for race in races(runs))]
    assert [text for text in wanted if text not in page] == []
