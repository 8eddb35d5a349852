"""Options and hooks of the whole suite: the seed, the build under test, no skipped test in CI."""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from support import COUNTED
from support.faults import disk, failing  # noqa: F401  (fixtures)

import cow._core

ROOT = Path(__file__).resolve().parent.parent
PROFILE = os.environ.get("COW_BUILD") or "release"
OPTIONS = ("ASAN_OPTIONS", "TSAN_OPTIONS", "PYTHONMALLOC")
IN_CI = os.environ.get("CI", "").lower() not in ("", "0", "false")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--seed",
        type=int,
        metavar="N",
        help="seed of every random program (default: a new one each run)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Settle the seed, and refuse to test another build than the one asked for."""
    if config.option.seed is None:
        config.option.seed = secrets.randbits(32)
    built = Path(cow._core.__file__)
    if PROFILE not in ("release", "coverage") and ROOT / "build" / PROFILE not in built.parents:
        raise pytest.UsageError(f"COW_BUILD={PROFILE}, but cow._core comes from {built}")
    state = tempfile.mkdtemp(prefix="cow-state-")
    config.add_cleanup(lambda: shutil.rmtree(state, ignore_errors=True))
    os.environ["XDG_STATE_HOME"] = state  # where cow lvm keeps backups of metadata
    if preloaded := os.environ.pop("LD_PRELOAD", ""):
        config.add_cleanup(preload_pythons(preloaded))


def preload_pythons(libraries: str) -> Callable[[], None]:
    """Let each Python that a test starts as `sys.executable` have libraries preloaded, nobody else.

    A sanitizer's has to be loaded before our extension; in other programs it only does harm.
    """
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    python = folder / "python"
    # What starts a Python for a test may have cleaned the environment.
    options = " ".join(
        f"{name}={shlex.quote(os.environ[name])}" for name in OPTIONS if name in os.environ
    )
    python.write_text(
        f"#!/bin/sh\n{options} PYTHONPATH='{folder}':$PYTHONPATH LD_PRELOAD='{libraries}' "
        f"exec '{sys.executable}' \"$@\"\n"
    )
    python.chmod(0o755)
    (folder / "sitecustomize.py").write_text(
        f"import os, sys\ndel os.environ['LD_PRELOAD']\nsys.executable = {str(python)!r}\n"
    )
    sys.executable = str(python)
    return lambda: shutil.rmtree(folder)


def pytest_report_header(config: pytest.Config) -> str:
    return f"cow: {PROFILE} build, --seed {config.option.seed}"


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config
) -> None:
    if COUNTED:
        terminalreporter.section("counted")
        for what, number in sorted(COUNTED.items()):
            terminalreporter.write_line(f"{number:9} {what}")
    if exitstatus != pytest.ExitCode.OK:
        terminalreporter.write_line(f"this run had --seed {config.option.seed}")


@pytest.fixture(scope="session")
def seed(request: pytest.FixtureRequest) -> int:
    """The seed of this run, for `random.Random(seed)`; the header names it, --seed sets it."""
    return request.config.option.seed


def fail_if_skipped(report: pytest.CollectReport | pytest.TestReport) -> None:
    """Turn a skip into a failure with the skip's reason, in CI; xfail stays what it is."""
    if IN_CI and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"no test may be skipped in CI. {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report():
    report = yield
    fail_if_skipped(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    report = yield
    fail_if_skipped(report)
    return report
