"""Record where the real LVM2 puts extents: record_allocation.py OUTPUT [SEEDS].

As root, with lvm2 and three free loop devices; nothing is activated (global/activation=0), so no
device-mapper is needed. Each line of the output is one session, JSON: sizes of the PVs in MiB, the
extent size in sectors, and the commands, each with its exit code and, where it is 0, the segments
of its LV afterwards: [extents, stripe size, [[PV number, extent], …]].
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

CONFIG = """
global {{ activation=0 event_activation=0 locking_dir="{0}" }}
activation {{ udev_sync=0 udev_rules=0 monitoring=0 }}
backup {{ backup=0 archive=0 }}
devices {{ use_devicesfile=0 hints="none" obtain_device_list_from_udev=0
    filter=["a|^{1}$|","a|^{2}$|","a|^{3}$|","r|.*|"] }}
"""


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, check=False)


def lvm(*words: str) -> tuple[int, str]:
    done = run(*words)
    return done.returncode, done.stdout


def segments(vg: str, name: str, devices: list[str]) -> list:
    fields = "seg_size_pe,stripe_size,seg_pe_ranges"
    _, text = lvm(
        "lvs",
        "--noheadings",
        "--nosuffix",
        "--units",
        "s",
        "--segments",
        "-o",
        fields,
        f"{vg}/{name}",
    )
    found = []
    for line in text.splitlines():
        extents, size, *ranges = line.split()
        legs = [re.fullmatch(r"(\S+):(\d+)-\d+", each) for each in ranges]
        places = [[devices.index(leg[1]), int(leg[2])] for leg in legs if leg]
        found.append([int(extents), int(size), places])
    return found


def session(seed: int, folder: Path, devices: list[str]) -> dict:
    rng = random.Random(seed)
    sizes = [rng.choice([32, 48, 64, 64, 100]) for _ in devices]
    extent_size = rng.choice([1024, 2048, 4096])
    for number, (device, size) in enumerate(zip(devices, sizes, strict=True)):
        path = folder / f"pv{number}.img"
        path.unlink(missing_ok=True)
        path.touch()
        os.truncate(path, size << 20)
        subprocess.run(["losetup", device, str(path)], check=True)
    try:
        code, text = lvm("vgcreate", "-s", f"{extent_size}s", "v", *devices)
        assert code == 0, text
        steps: list[dict] = []
        lvs: dict[str, int] = {}
        while len(steps) < 40:
            step = choose(rng, lvs, len(steps))
            code, _ = lvm(*command(step, devices))
            step["code"] = code
            name = step["name"]
            if code == 0 and step["verb"] == "lvremove":
                del lvs[name]
            elif code == 0:
                step["segments"] = segments("v", name, devices)
                lvs[name] = sum(each[0] for each in step["segments"])
            steps.append(step)
    finally:
        for device in devices:
            run("losetup", "-d", device)
    return {"sizes": sizes, "extent_size": extent_size, "steps": steps}


def choose(rng: random.Random, lvs: dict[str, int], number: int) -> dict:
    """Choose what is done next."""
    verb = rng.choice(["lvcreate"] * 4 + ["lvextend"] * 4 + ["lvremove", "lvreduce"])
    if not lvs:
        verb = "lvcreate"
    step: dict = {"verb": verb, "name": f"l{number}" if verb == "lvcreate" else rng.choice([*lvs])}
    if verb == "lvcreate":
        step["extents"] = rng.randint(1, rng.choice([5, 20, 60]))
        step["stripes"] = rng.choice([1, 1, 1, 2, 3])
        step["stripe_size"] = rng.choice([16, 128, 512])
        step["policy"] = rng.choice([None, None, None, "contiguous", "cling", "normal"])
    elif verb == "lvextend":
        step["extents"] = lvs[step["name"]] + rng.randint(1, rng.choice([3, 20]))
    elif verb == "lvreduce":
        step["extents"] = rng.randint(1, lvs[step["name"]])
    if verb in ("lvcreate", "lvextend") and rng.random() < 0.2:
        step["pv"] = rng.randrange(3)
    return step


def command(step: dict, devices: list[str]) -> list[str]:
    """Return the command line of a step."""
    verb, name = step["verb"], step["name"]
    words = [verb, "-y"]
    if "extents" in step:
        words += ["-l", str(step["extents"])]
    if verb == "lvcreate":
        words += ["-an", "-Zn", "-Wn", "-n", name, "v", "-i", str(step["stripes"])]
        if step["stripes"] > 1:
            words += ["-I", f"{step['stripe_size'] // 2}k"]
        if step["policy"]:
            words += ["--alloc", step["policy"]]
    else:
        words.append(f"v/{name}")
    return words + [devices[step["pv"]]] if "pv" in step else words


def main() -> None:
    output, seeds = sys.argv[1], int((sys.argv[2:] or ["8"])[0])
    with tempfile.TemporaryDirectory() as name, open(output, "w", encoding="utf-8") as file:
        folder = Path(name)
        devices = []
        for _ in range(3):
            (folder / "hold").touch()
            os.truncate(folder / "hold", 1 << 20)
            free = run("losetup", "-f", "--show", str(folder / "hold")).stdout.strip()
            devices.append(free)
        for device in devices:
            run("losetup", "-d", device)
        (folder / "lvm.conf").write_text(CONFIG.format(folder, *devices))
        os.environ.update(LVM_SYSTEM_DIR=str(folder), LVM_SUPPRESS_FD_WARNINGS="1")
        for seed in range(seeds):
            print(json.dumps(session(seed, folder, devices)), file=file)


if __name__ == "__main__":
    main()
