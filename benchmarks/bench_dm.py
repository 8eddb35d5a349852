"""What a verb of `cow dm` takes from a cold start: a new Python each time."""

from __future__ import annotations

import os
import subprocess
import sys

from suite.baselines import make_file
from suite.race import limit

import cow
from cow.daemon.server import Server

SECTION = "The command line"


def test_dm(race, tmp_images):
    """A verb that scripts run often, beside a Python that does nothing."""
    image = make_file(tmp_images / "disk.img", 1 << 20)
    with cow.Mapper(durability="process") as dm:
        dm.create("base", f"0 2048 snapshot-origin {image}")
        server = Server(dm, str(tmp_images / "control.sock"))
        server.start()
        environment = os.environ | {"COW_SOCKET": server.path}

        def run(*words: str) -> None:
            command = [sys.executable, *words]
            subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)

        race(
            "cow dm status, cold",
            lambda: run("-m", "cow", "dm", "status", "base"),
            limit("python -c pass", lambda: run("-c", "pass")),
            count=1,
            unit="",
        )
        server.stop()
