"""A guest that hangs is an error in bounded time that says what it did, and no later job waits."""

from __future__ import annotations

import os
import signal
import time

import pytest

from . import uml
from .sides import SECTORS, Theirs, kernel_writes, make_images
from .uml import Kernel, KernelError


@pytest.fixture
def kernel(judge, monkeypatch):
    monkeypatch.setattr(uml, "LAST_WORDS", 2.0)
    with Kernel(judge.folder) as kernel:
        yield kernel


def test_a_guest_that_is_stopped_in_a_job_is_an_error_at_once_for_all_that_follows(judge, kernel):
    images = make_images(judge.new_folder())
    started = time.monotonic()

    def hang() -> None:
        with Theirs(kernel, images, judge.folder):
            name = kernel.start(None, [["run", "sleep", "60"]])
            os.killpg(kernel.process.pid, signal.SIGSTOP)
            kernel.finish(name, 1)

    with pytest.raises(KernelError, match=r"no @done job\d+ within 1 s; .* state T"):
        hang()
    with pytest.raises(KernelError, match="failed before"):
        kernel.run(images, [])
    kernel.close()
    assert kernel.process.returncode == -signal.SIGKILL
    assert time.monotonic() - started < 60


def test_a_guest_that_hangs_but_hears_tells_what_waits_in_it(judge, kernel, monkeypatch):
    monkeypatch.setattr(uml, "LAST_WORDS", 60.0)  # it takes no longer than it needs
    images = make_images(judge.new_folder())
    table = f"0 {SECTORS} linear @b 0"
    writes = kernel_writes([("low", 0, 1, 1)])
    name = kernel.start(images, [["create", "low", table], ["suspend", "low"], ["work", writes]])
    kernel.hear("@did 0")
    with pytest.raises(KernelError, match=r"(?s)within 1 s; .* Show Blocked State.* state:D"):
        kernel.finish(name, 1)


def test_a_management_console_that_is_silent_is_an_error(kernel):
    os.killpg(kernel.process.pid, signal.SIGSTOP)
    with pytest.raises(KernelError, match="version: timed out"):
        kernel.monitor("version", 0.5)


def test_the_kernel_of_a_judge_that_failed_is_followed_by_another(judge):
    first = judge.running()
    first.error("on purpose")
    assert judge.ask(make_images(judge.new_folder()), [["status"]])[0]["rc"] == 0
    assert judge.running() is not first
