"""Run the command lines of tests/data/dmsetup.jsonl with the real dmsetup on the real kernel.

    python tests/kernel/record_dmsetup.py [FROM]

Writes what they print, from line FROM on; what stands before is run, too, and has to print what is
recorded. A line needs "args", and "stdin" where there is some; "open" and "close" hold a device
open in between.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tests.kernel.uml import Kernel, missing, scratch  # noqa: E402

RECORDS = ROOT / "tests/data/dmsetup.jsonl"
DISKS = {"{o}": "/dev/loop0", "{c}": "/dev/loop1", "{s}": "/dev/loop2"}
DRIVERS = "/usr/lib/uml/modules/$(uname -r)/kernel/drivers"
START = f"""
    insmod {DRIVERS}/block/loop.ko
    for name in dm-delay dm-log-writes; do insmod {DRIVERS}/md/$name.ko; done
    mkdir /run/files; cd /run/files
    truncate -s 64M 0; truncate -s 16M 1; truncate -s 1M 2
    for number in 0 1 2; do losetup /dev/loop$number $number || exit 1; done
    printf '0 8 zero\\n0 9\\n' >bad.tab; printf '0 8 zero\\n' >good.tab
    printf '0 8 zero' >'a blank.tab'
"""
OPEN = "sleep 10000 </dev/mapper/{0} >/dev/null 2>&1 & echo $! >/run/open-{0}"
CLOSE = "p=$(cat /run/open-{0}); kill $p; while [ -e /proc/$p/fd/0 ]; do :; done"


def shell(text: str) -> list[str]:
    return ["run", "sh", "-c", text]


def placed(text: str) -> str:
    for mark, path in DISKS.items():
        text = text.replace(mark, path)
    return text


def guest_step(line: dict[str, Any]) -> list[str]:
    """Return a line as a step of the guest."""
    if "args" in line:
        words = shlex.join(map(placed, line["args"]))
        stdin = f"printf %s {shlex.quote(placed(line['stdin']))} | " if "stdin" in line else ""
        return shell(f"cd /run/files; {stdin}DM_DISABLE_UDEV=1 LC_ALL=C dmsetup {words}")
    return shell((OPEN if "open" in line else CLOSE).format(*line.values()))


def normal(text: str) -> str:
    """Cut usage texts and what is about statistics, and name the disks as the session does."""
    for mark, path in DISKS.items():
        text = text.replace(path, mark)
    text = re.sub(r"Mapped Device Statistics.*\n-+\n(  .*\n)* \n", "", text)
    text = re.sub(r"  selected  .*\n", "", text)
    text = re.sub(r"Selection operands\n(.+\n)* \n(.+\n)* \n(.+\n)* \n", "SYNTAX\n", text)
    return text[: text.index("Usage:\n")] + "USAGE\n" if "Usage:\n" in text else text


def main(first: int) -> None:
    """Record all lines from the one with this number on."""
    if reason := missing():
        raise SystemExit(f"no kernel to ask: {reason}")
    lines = [json.loads(line) for line in RECORDS.read_text(encoding="utf-8").splitlines()]
    with scratch() as folder, Kernel(folder) as kernel:
        answer = kernel.run({}, [shell(START)], clean=False)[0]
        assert answer["out"][0] == "0", answer
        steps = [guest_step(line) for line in lines]
        for number, answer in enumerate(kernel.run(None, steps, clean=False), 1):
            line = lines[number - 1]
            if "args" not in line:
                continue
            status, stdout, stderr = answer["out"]
            got = {"stdout": normal(stdout), "stderr": normal(stderr), "status": int(status)}
            if number < first and got != {key: line[key] for key in got}:
                print(f"line {number}: {line}\n  got {got}", file=sys.stderr)
            elif number >= first:
                line |= got
    with RECORDS.open("w", encoding="utf-8") as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    os.chdir(ROOT)
    main(int((sys.argv[1:] or ["1"])[0]))
