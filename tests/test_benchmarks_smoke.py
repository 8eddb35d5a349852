"""The benchmarks run: every race once, on small images, untimed."""

import os
import subprocess
import sys
from pathlib import Path

import cow

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_every_benchmark_runs_on_small_images():
    package = Path(cow.__file__).parents[1]
    paths = [str(package), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", "-q"]
        + ["--benchmark-disable", "--scale", "small", str(BENCHMARKS)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        cwd=BENCHMARKS.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
