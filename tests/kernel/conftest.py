"""The kernel that the tests of this folder share, and why there may be none.

They take minutes, so they run only where they are asked for: make test-kernel.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from .author import version
from .judge import Judge
from .uml import KernelError, missing, scratch

HERE = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--programs",
        type=int,
        default=200,
        metavar="N",
        help="how many new random programs to compare with the kernel (default: %(default)s)",
    )
    parser.addoption(
        "--program",
        type=int,
        metavar="SEED",
        help="the seed of the one new program to compare, as a failure names it",
    )


def pytest_report_header(config: pytest.Config) -> str:
    """Name the generator: a seed means another program to another version of it."""
    return f"kernel: programs by author {version()}"


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """Leave this folder out of a run unless it, or something in it, is named."""
    named = [Path(config.invocation_params.dir, arg.split("::")[0]) for arg in config.args]
    asked = any(HERE in (path.resolve(), *path.resolve().parents) for path in named)
    return None if asked else True


@pytest.fixture(scope="session")
def shared_judge():
    """The kernel beside cow, booted once for all traces, in a folder that is gone afterwards."""
    if reason := missing():
        pytest.skip(f"no kernel to compare with: {reason}")
    with scratch() as folder:
        judge = Judge(folder)
        try:
            judge.running()
        except KernelError as error:
            pytest.skip(f"no kernel starts here: {error}")
        yield judge
        judge.close()


@pytest.fixture
def judge(shared_judge):
    """The kernel beside cow; what a test leaves in the folder is removed."""
    yield shared_judge
    for folder in shared_judge.folder.glob("run*"):
        shutil.rmtree(folder)
