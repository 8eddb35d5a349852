"""Run tests/data/lvm_sessions.txt with the real lvm2 on the real kernel, and keep what it prints.

    python tests/kernel/record_lvm.py [SESSION …]

Writes tests/data/lvm.jsonl anew, or in it the sessions that are named. support/lvm_session.py tells
what stands in both files.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support.lvm_session import RECORDS, Normal, Session, make_disk, read_sessions  # noqa: E402

from tests.kernel.uml import Kernel, missing, scratch  # noqa: E402

HOST = "host.test"
CONFIG = """\
devices {
    dir = "/dev"
    scan = [ "/dev" ]
    use_devicesfile = 0
    filter = [ "a|^/dev/ubd[b-z]$|", "r|.*|" ]
    obtain_device_list_from_udev = 0
    types = [ "ubd", 16 ]
    hints = "none"
}
activation { udev_sync = 0 udev_rules = 0 monitoring = 0 }
global { event_activation = 0 use_lvmpolld = 0 locking_dir = "/run/lock" }
backup { backup_dir = "/run/lvm/backup" archive_dir = "/run/lvm/archive" }
"""
SETTINGS = {
    "LVM_SYSTEM_DIR": "/run/scratch",
    "LVM_SUPPRESS_FD_WARNINGS": "1",
    "DM_DISABLE_UDEV": "1",
    "TZ": "UTC",
    "LC_ALL": "C",
}
START = f"""
    hostname {HOST}
    rm -rf /run/files /run/lvm /dev/vg* /dev/my-vg /dev/mapper/*-*
    mkdir -p /run/files /run/lock /run/lvm
"""
OPEN = "sleep 10000 </dev/mapper/{0} >/dev/null 2>&1 & echo $! >/run/open-{0}"
CLOSE = "p=$(cat /run/open-{0}); kill $p; while [ -e /proc/$p/fd/0 ]; do :; done"


def shell(text: str) -> list[str]:
    return ["run", "sh", "-c", text]


def guest_step(step: dict[str, Any], disks: dict[str, str]) -> list[Any]:
    """Return a step of a session as one of the guest."""
    if "args" in step:
        settings = " ".join(f"{name}={value}" for name, value in SETTINGS.items())
        words = shlex.join(placed(arg, disks) for arg in step["args"])
        stdin = f"printf {shlex.quote(step['stdin'])} | " if step["stdin"] else ""
        return shell(f"cd /run/files; {stdin}{settings} lvm {words}")
    if "write" in step:
        return ["w", *step["write"]]
    if "open" in step:
        return shell(OPEN.format(step["open"]))
    if "close" in step:
        return shell(CLOSE.format(step["close"]))
    return shell(f"cd /run/files; {step['shell']}")


def placed(arg: str, disks: dict[str, str]) -> str:
    for name, path in disks.items():
        arg = arg.replace(name, path)
    return arg


def record(kernel: Kernel, folder: Path, session: Session) -> Iterator[dict[str, Any]]:
    """Run a session and yield its lines for the file."""
    images = {}
    for name, what in session.disks.items():
        images[name.removesuffix(".img")] = folder / name
        make_disk(folder / name, what)
    disks = {name: f"/dev/ubd{chr(ord('b') + slot)}" for slot, name in enumerate(session.disks)}
    kernel.run(images, [shell(START)], clean=False)
    yield {"session": session.name, "disks": session.disks}
    normal = Normal({path: name for name, path in disks.items()})
    for step in session.steps:
        answer = kernel.run(None, [guest_step(step, disks)], clean=False, seconds=120)[0]
        if "write" in step:
            assert answer == f"w {step['write'][2]}", (step, answer)
            yield step
            continue
        assert answer["rc"] == 0, answer
        status, stdout, stderr = answer["out"]
        if "args" not in step:
            assert status == "0" or "close" in step, (step, answer)
            yield step
            continue
        line = {"args": step["args"], "stdout": normal(stdout), "stderr": normal(stderr)}
        if step["stdin"]:
            line["stdin"] = step["stdin"]
        yield line | {"status": int(status)}
    kernel.run(None, [shell("dmsetup remove_all -f; true")], clean=True)


def recorded() -> dict[str, list[dict[str, Any]]]:
    """Return the lines that are there, by session."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in RECORDS.read_text().splitlines() if RECORDS.exists() else []:
        entry = json.loads(line)
        if "session" in entry:
            lines = found.setdefault(entry["session"], [])
        lines.append(entry)
    return found


def main(names: list[str]) -> None:
    """Record the named sessions, or all of them."""
    if reason := missing():
        raise SystemExit(f"no kernel to ask: {reason}")
    records = recorded()
    sessions = list(read_sessions())
    with scratch() as folder:
        (folder / "lvm.conf").write_text(CONFIG)
        with Kernel(folder) as kernel:
            for session in sessions:
                if not names or session.name in names:
                    records[session.name] = list(record(kernel, folder, session))
                    print(f"{session.name}: {len(session.steps)} steps", file=sys.stderr)
    with open(RECORDS, "w") as file:
        for session in sessions:
            for entry in records.get(session.name, []):
                file.write(json.dumps(entry) + "\n")


if __name__ == "__main__":
    os.chdir(ROOT)
    main(sys.argv[1:])
