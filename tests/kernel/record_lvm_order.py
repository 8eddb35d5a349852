"""Run tests/data/lvm/order.txt with the real lvm2 on the real kernel, and keep what it did.

    python tests/kernel/record_lvm_order.py [SCENARIO …]

With names, only these scenarios are run, and nothing is written. What LVM does stands in its
debugging output: ioctls of libdm, tables, writes of metadata headers.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support.lvm_order import (  # noqa: E402
    DISK_SIZE,
    DISKS,
    WRITTEN,
    Scenario,
    read_scenarios,
    write_scenarios,
)

from tests.kernel.uml import Kernel, missing, scratch  # noqa: E402

CONFIG = """\
devices {{
    dir = "/dev"
    scan = [ "/dev" ]
    scan_lvs = 1
    use_devicesfile = 0
    filter = [ {filter}, "r|.*|" ]
    obtain_device_list_from_udev = 0
    types = [ "ubd", 16 ]
    hints = "none"
}}
activation {{ udev_sync = 0 udev_rules = 0 monitoring = 0 raid_region_size = 64 }}
global {{ event_activation = 0 use_lvmpolld = 0 locking_dir = "/run/lock" }}
backup {{ backup = 0 archive = 0 }}
"""
FILTERS = {False: '"a|^/dev/ubd[b-d]$|"', True: '"a|/dev/mapper/slow|", "a|^/dev/ubd[cd]$|"'}
SETTINGS = (
    "LVM_SYSTEM_DIR=/run/scratch LVM_SUPPRESS_FD_WARNINGS=1 DM_DISABLE_UDEV=1 TZ=UTC LC_ALL=C"
)
MODULES = "dm-log dm-region-hash dm-mirror dm-delay"
FOLDER = "/usr/lib/uml/modules/$(uname -r)/kernel/drivers/md"
OPEN = "sleep 10000 </dev/mapper/{0} >/dev/null 2>&1 & echo $! >/run/open-{0}"
CLOSE = "p=$(cat /run/open-{0}); kill $p; while [ -e /proc/$p/fd/0 ]; do :; done"
WRITE = (
    'python3 -c \'import os; f = os.open("/dev/mapper/{0}", os.O_RDWR);'
    " [os.pwrite(f, bytes([i + 1]) * 4096, 8192 * i) for i in range({1})]; os.fsync(f)'"
)
VERBS = ("create", "reload", "suspend", "resume", "remove", "rename")


class Guest:
    """The kernel, and a shell in it."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def shell(self, text: str, images: Any = None) -> tuple[str, str]:
        answer = self.kernel.run(images, [["run", "sh", "-c", text]], clean=False, seconds=120)[0]
        assert answer["rc"] == 0, answer
        status, stdout, stderr = answer["out"]
        assert status == "0", (text, stdout, stderr[-3000:])
        return stdout, stderr

    def names(self) -> dict[str, str]:
        """Return the names of all dm devices, by minor number."""
        out, _ = self.shell("dmsetup info -c --noheadings -o minor,name --separator ' '")
        return dict(line.split() for line in out.splitlines() if " " in line and line[0].isdigit())


def trace(debug: str, names: dict[str, str]) -> list[str]:
    """Return what the debugging output of a command tells."""
    found: list[str] = []
    tables: dict[str, list[str]] = {}
    for line in debug.splitlines():
        if match := re.search(r"metadata (precommit|commit) seq \d+ on", line):
            if found[-1:] != [match[1]]:
                found.append(match[1])
        elif match := re.search(r"Adding target to \(254:(\d+)\): (.*)", line):
            if match[2].startswith("0 "):
                tables[match[1]] = []
            tables[match[1]].append(named(match[2].strip(), names))
        elif match := re.search(r"(?:^| )dm (\w+) +(.*?) \[ (.*?) \]", line):
            verb, what, options = match.groups()
            if verb not in VERBS:
                continue
            number = re.match(r"\(254:(\d+)\)", what)
            name = names[number[1]] if number else what.split()[0]
            if verb == "create":
                minor = next(n for n in range(1000) if str(n) not in names)
                names[str(minor)] = name
                found.append(f"create {name}")
            elif verb == "reload":
                assert number
                readonly = " readonly" if "readonly" in options.split() else ""
                found.append(f"load {name}{readonly} | {'; '.join(tables.pop(number[1]))}")
            elif verb == "rename":
                old, new = what.split()[:2]
                minor = next(n for n, each in names.items() if each == old)
                names[minor] = new
                found.append(f"rename {old} {new}")
            else:
                found.append(f"{verb} {name}")
                if verb == "remove" and number:
                    del names[number[1]]
    return found


def named(table: str, names: dict[str, str]) -> str:
    """Put names in place of numbers."""

    def name(match: re.Match[str]) -> str:
        if match[1] == "98":
            return f"pv{int(match[2]) // 16 - 1}"
        found = names[match[2]]
        return "pv0" if found == "slow" else found

    return re.sub(r"(?<!\S)(98|254):(\d+)(?!\S)", name, table)


def record(guest: Guest, folder: Path, scenario: Scenario) -> None:
    """Run a scenario and note what each of its commands did."""
    images = {}
    for number in range(DISKS):
        images[f"pv{number}"] = folder / f"pv{number}.img"
        with open(images[f"pv{number}"], "wb") as file:
            file.truncate(DISK_SIZE)
    (folder / "lvm.conf").write_text(CONFIG.format(filter=FILTERS[scenario.slow]))
    insert = f"for each in {MODULES}; do insmod {FOLDER}/$each.ko; done"
    guest.shell(f"{insert}; mkdir -p /run/lock /run/lvm", images)
    first = "/dev/ubdb"
    if scenario.slow:
        first = "/dev/mapper/slow"
        size = DISK_SIZE // 512
        table = f"0 {size} delay /dev/ubdb 0 0 /dev/ubdb 0 20"
        guest.shell(f"{SETTINGS} dmsetup create slow --table '{table}'")
    disks = f"{first} /dev/ubdc /dev/ubdd"
    guest.shell(f"{SETTINGS} pvcreate -q {disks}; {SETTINGS} vgcreate -q vg {disks}")
    for step in scenario.steps:
        kind, text = step.text.split(" ", 1)
        words = text.split()
        if kind == "$":
            names = guest.names()
            _, debug = guest.shell(f"{SETTINGS} lvm {text} -vvvv")
            step.done = trace(debug, names)
        elif words[0] == "open":
            guest.shell(OPEN.format(words[1]))
        elif words[0] == "close":
            guest.shell(CLOSE.format(words[1]))
        else:
            guest.shell(WRITE.format(words[1], WRITTEN))


def main(wanted: list[str]) -> None:
    """Run scenarios and write them, or print the named ones."""
    if reason := missing():
        raise SystemExit(f"no kernel to ask: {reason}")
    scenarios = [each for each in read_scenarios() if not wanted or each.name in wanted]
    for scenario in scenarios:
        with scratch() as folder, Kernel(folder) as kernel:
            record(Guest(kernel), folder, scenario)
        if wanted:
            for step in scenario.steps:
                print(step.text, *(f"  {line}" for line in step.done), sep="\n")
    if not wanted:
        write_scenarios(scenarios)


if __name__ == "__main__":
    os.chdir(ROOT)
    main(sys.argv[1:])
