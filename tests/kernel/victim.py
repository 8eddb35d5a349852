"""A process that works on images through cow until it is killed.

    python -m kernel.victim JOB        JOB: a JSON file, see test_kill.py

Does the steps and the writes; says "@did 0" before the first write and "@did N" after N writes.
Then starts a merge of base by the steps in "merge", and kills itself "after" so many seconds;
without such steps it waits for its end.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from support import SECTOR, stamp

import cow

from .judge import replayer


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    dm = cow.Mapper(durability=job["durability"])
    runner = replayer(dm, job["paths"])
    for step in job["steps"]:
        assert runner.answer(step) == [], step
    say("@did 0")
    for number, (name, first, count, tag) in enumerate(job["writes"]):
        dm.device(name).pwrite(stamp(first, count, tag), first * SECTOR)
        say(f"@did {number + 1}")
    for step in job["merge"]:
        assert runner.answer(step) == [], step
    if job["merge"]:
        time.sleep(job["after"])
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(240)


if __name__ == "__main__":
    main()
